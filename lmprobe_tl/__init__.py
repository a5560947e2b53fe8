"""Train probes on a language model's residual stream, share them as one file, and score every token live.

from lmprobe_tl import Probe, load_probe, monitored_generate

probe = Probe(model, hook_points=6).fit(prompts, labels)
probe.save("deceit.safetensors")
results = monitored_generate(model, prompts, [load_probe("deceit.safetensors")], stop=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmprobe_tl import pooling
    from lmprobe_tl.activation_store import ActivationStore
    from lmprobe_tl.attach import attach_probes
    from lmprobe_tl.calibration import Calibration
    from lmprobe_tl.evaluation import Evaluation
    from lmprobe_tl.extraction import ExtractedActivations, extract_activations
    from lmprobe_tl.generation import GenerationResult, monitored_generate
    from lmprobe_tl.live.calibration import calibrate_probe
    from lmprobe_tl.live.evaluation import LiveEvaluation, evaluate_live
    from lmprobe_tl.live.records import Alarm, Escalate, TokenEvent
    from lmprobe_tl.live.run import LiveRun
    from lmprobe_tl.monitor import Monitor
    from lmprobe_tl.probe import Probe
    from lmprobe_tl.probe_evaluation import evaluate_probe
    from lmprobe_tl.probe_file import load_probe
    from lmprobe_tl.probe_report import ProbeReport, ShiftReport
    from lmprobe_tl.reductions import ReductionParameter, register_reduction
    from lmprobe_tl.report_page import save_report
    from lmprobe_tl.scoring import score_prompts, sequence_maxima
    from lmprobe_tl.shift import evaluate_shift
    from lmprobe_tl.steering import ablate, steer
    from lmprobe_tl.store.merging import merge_stores
    from lmprobe_tl.store.writing import extract_to_store
    from lmprobe_tl.sweep_result import SweepResult
    from lmprobe_tl.sweep_run import sweep
    from lmprobe_tl.weights import ProbeWeights

__version__ = "0.1.0"

# Where each public name lives: it is imported when it is first used (PEP 562), so that `import lmprobe_tl` costs nothing.
_HOMES = {
    "ActivationStore": "activation_store",
    "Alarm": "live.records",
    "Calibration": "calibration",
    "Escalate": "live.records",
    "Evaluation": "evaluation",
    "ExtractedActivations": "extraction",
    "GenerationResult": "generation",
    "LiveEvaluation": "live.evaluation",
    "LiveRun": "live.run",
    "Monitor": "monitor",
    "Probe": "probe",
    "ProbeReport": "probe_report",
    "ProbeWeights": "weights",
    "ReductionParameter": "reductions",
    "ShiftReport": "probe_report",
    "SweepResult": "sweep_result",
    "TokenEvent": "live.records",
    "ablate": "steering",
    "attach_probes": "attach",
    "calibrate_probe": "live.calibration",
    "evaluate_live": "live.evaluation",
    "evaluate_probe": "probe_evaluation",
    "evaluate_shift": "shift",
    "extract_activations": "extraction",
    "extract_to_store": "store.writing",
    "load_probe": "probe_file",
    "merge_stores": "store.merging",
    "monitored_generate": "generation",
    "register_reduction": "reductions",
    "save_report": "report_page",
    "score_prompts": "scoring",
    "sequence_maxima": "scoring",
    "steer": "steering",
    "sweep": "sweep_run",
}

__all__ = [
    "ActivationStore",
    "Alarm",
    "Calibration",
    "Escalate",
    "Evaluation",
    "ExtractedActivations",
    "GenerationResult",
    "LiveEvaluation",
    "LiveRun",
    "Monitor",
    "Probe",
    "ProbeReport",
    "ProbeWeights",
    "ReductionParameter",
    "ShiftReport",
    "SweepResult",
    "TokenEvent",
    "ablate",
    "attach_probes",
    "calibrate_probe",
    "evaluate_live",
    "evaluate_probe",
    "evaluate_shift",
    "extract_activations",
    "extract_to_store",
    "load_probe",
    "merge_stores",
    "monitored_generate",
    "pooling",
    "register_reduction",
    "save_report",
    "score_prompts",
    "sequence_maxima",
    "steer",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name == "pooling":
        return import_module("lmprobe_tl.pooling")
    if name not in _HOMES:
        raise AttributeError(f"module 'lmprobe_tl' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(f"lmprobe_tl.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
