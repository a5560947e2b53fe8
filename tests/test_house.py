"""The structure of the package: which file may import which, what importing it costs, and which names are public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmprobe_tl

PACKAGE = Path(lmprobe_tl.__file__).parent

FLOORS = {
    0: {"errors", "types", "files"},
    1: {"heads", "masks", "pooling", "reductions", "online", "precision", "softmax_twins", "twins", "twin_check"},
    2: {
        "checked_record",
        "probe_spec",
        "weight_tensors",
        "direction_blocks",
        "weights",
        "probe_file",
        "probe_summary",
        "labels",
        "metrics",
    }
    | {"calibration", "early_exit"}
    | {"given_probes", "provenance", "store", "store.record", "activation_store", "splits", "token_bag"}
    | {"bootstrap", "scored", "measures"}
    | {"estimators", "estimators.blocks", "estimators.fitting", "estimators.linear_rule", "estimators.mass_mean"}
    | {
        "estimators.streaming",
        "estimators.linear_classifier",
        "estimators.logit_classifier",
        "estimators.logit_scale",
        "estimators.pairs",
    }
    | {"estimators.pca", "estimators.ccs", "estimators.layer_stack", "estimators.contrast"}
    | {"estimators.sample_weight", "estimators.fitted_head", "estimators.token_sequences"}
    | {"estimators.ragged", "estimators.token_scaling", "estimators.training", "estimators.torch_classifier"}
    | {"estimators.threads"}
    | {"estimators.sequence_classifier", "estimators.sequence_classifiers", "estimators.vector_classifiers"}
    | {"estimators.baselines"},
    3: {
        "forward_watch",
        "generate_call",
        "hook_points",
        "tokens",
        "forward_batches",
        "batch_pooling",
        "extraction",
        "compatibility",
    }
    | {"activation_source", "token_text", "labelled_prompts", "special_tokens"}
    | {"vllm", "vllm._compat", "vllm._compat.blocks", "vllm.hooks", "vllm.offline", "vllm.pages", "vllm.probes"}
    | {"vllm.results", "vllm.running", "vllm.offline_engine"}
    | {"vllm.runtime", "vllm.slots", "vllm.steps", "vllm.structure", "vllm.wire", "vllm.worker", "vllm.activations"}
    | {"vllm.engine", "vllm.connection", "vllm.inbox", "vllm.online_engine", "vllm.publisher"}
    | {"vllm.server", "vllm.server.choices", "vllm.server.metrics", "vllm.server.middleware", "vllm.server.request"}
    | {"vllm.server.response"}
    | {"weights_fingerprint", "store.writing", "store.shards", "store.merging"}
    | {"live", "live.records", "live.reduction", "live.watches", "live.scoring_plan", "live.history", "live.crossings"}
    | {"live.rows", "live.columns", "live.run", "live.events", "live.passes", "live.residual_basis"}
    | {"live.edit", "live.change", "live.chosen_positions", "live.editor", "live.targets"},
    4: {
        "inference",
        "evaluation",
        "probe",
        "probe_poolings",
        "probe_settings",
        "probe_outputs",
        "training_examples",
        "learnt",
        "artefact",
        "features",
        "store_examples",
        "sweep_run",
        "sweep_examples",
        "sweep_judge",
        "sweep_result",
        "plots",
        "plots.curves",
        "plots.judged",
        "plots.lengths",
        "plots.look",
        "plots.scores",
        "plots.svg",
        "plots.sweep",
        "monitor",
        "attach",
        "generation",
        "scoring",
        "steering",
    }
    | {"judged_probe", "recipe", "controls", "verdict", "probe_report", "report_table", "probe_evaluation", "shift"}
    | {"live.calibration", "live.maxima", "live.sequences", "live.evaluation"},
    5: {"demo", "demo.task", "demo.train_model", "demo.main_job"},
    6: {"colours", "report"}
    | {"report_page", "report_page.examples", "report_page.markup", "report_page.page", "report_page.pictures"}
    | {"report_page.style", "report_page.tables"}
    | {"terminal", "terminal.printer", "terminal.growing_text", "terminal.live_screen", "terminal.status_line"}
    | {"terminal.token_style"},
    7: {"cli", "cli.app", "cli.options", "cli.data_files"}
    | {"cli.calibrate", "cli.demo", "cli.extract", "cli.fit", "cli.generate", "cli.inspect", "cli.score", "cli.serve"}
    | {"cli.sweep", "cli.eval"},
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
SKINS = {module for floor in (6, 7) for module in FLOORS[floor]}

# Third-party packages that only these modules may import, at any depth of the file.
ONLY_IN = {
    "sklearn": {
        "estimators",
        "estimators.fitting",
        "estimators.linear_rule",
        "estimators.mass_mean",
        "estimators.streaming",
        "estimators.ccs",
        "estimators.layer_stack",
        "estimators.linear_classifier",
        "estimators.logit_classifier",
        "estimators.pairs",
        "estimators.fitted_head",
        "estimators.torch_classifier",
        "estimators.sequence_classifier",
        "estimators.sequence_classifiers",
        "estimators.vector_classifiers",
        "estimators.baselines",
        "metrics",
        "probe",
        "artefact",
        "judged_probe",
        "recipe",
        "controls",
        "splits",
        "token_bag",
        "cli.fit",
    },
    "transformer_lens": {"hook_points"},
    "transformers": {"monitor", "demo.train_model", "cli.options"},
    "matplotlib": {"plots.look", "plots.svg", "plots.sweep"},
    "pandas": {"sweep_result"},
    "vllm": {"vllm._compat", "vllm._compat.blocks", "vllm.engine", "vllm.offline", "vllm.online_engine"},
    "msgspec": {"vllm.wire"},
    "zmq": {"vllm.inbox", "vllm.publisher"},
    "prometheus_client": {"vllm.server.metrics"},
    "pydantic": {"vllm.server.request"},
    "typer": {name for name in FLOORS[7] if name.startswith("cli.")},
    "rich": {"cli.demo", "cli.generate"} | {name for name in FLOORS[6] if name.startswith("terminal.")},
}


def module_names() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    del found["__init__"]
    return found


def imports_of(source: str, *, at_load: bool = False) -> set[str]:
    """Every module that a source imports, inside functions too unless `at_load`; `from a import b` is `a` and `a.b`."""
    found: set[str] = set()
    tree = ast.parse(source)
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(module: str, source: str) -> list[str]:
    """Imports of `module` that the floors forbid."""
    wrong = []
    for imported in imports_of(source):
        inner = imported.removeprefix("lmprobe_tl.")
        if inner in FLOOR_OF and imported != inner and inner != module:
            if FLOOR_OF[inner] > FLOOR_OF[module]:
                wrong.append(f"{module} (floor {FLOOR_OF[module]}) imports {inner} (floor {FLOOR_OF[inner]})")
            if inner in SKINS and module not in SKINS:
                wrong.append(f"{module} imports the skin {inner}")
        outer = imported.split(".")[0]
        if outer in ONLY_IN and module not in ONLY_IN[outer]:
            wrong.append(f"{module} imports {outer}")
    return wrong


def test_every_file_has_a_floor() -> None:
    assert set(module_names()) == set(FLOOR_OF)


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_arrows_point_down(module: str) -> None:
    assert not wrong_imports(module, module_names()[module].read_text())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pooling", "from lmprobe_tl.probe import Probe"),
        ("weights", "def f():\n    from lmprobe_tl import hook_points"),
        ("monitor", "import lmprobe_tl.terminal.printer"),
        ("demo.main_job", "from lmprobe_tl.report import write_report"),
        ("monitor", "import sklearn.base"),
        ("extraction", "from transformer_lens.model_bridge import TransformerBridge"),
    ],
)
def test_a_planted_upward_import_is_found(module: str, source: str) -> None:
    assert wrong_imports(module, source)


def test_imports_make_no_circle() -> None:
    below = {
        module: {name.removeprefix("lmprobe_tl.") for name in imports_of(path.read_text(), at_load=True)} - {module}
        for module, path in module_names().items()
    }
    while below:
        ground = [module for module, imported in below.items() if not imported & set(below)]
        assert ground, f"a circle of imports among {sorted(below)}"
        for module in ground:
            del below[module]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformer_lens', 'transformers', 'sklearn', 'numpy', 'scipy'}"
    assert run_python(f"import sys, lmprobe_tl; print(sorted({heavy} & set(sys.modules)))") == "[]"
    assert "torch" in run_python(f"import sys, lmprobe_tl; lmprobe_tl.load_probe; print(sorted({heavy} & set(sys.modules)))")


def test_loading_and_attaching_import_neither_transformer_lens_nor_scikit_learn() -> None:
    code = (
        "import sys; from lmprobe_tl import load_probe, attach_probes, monitored_generate, extract_activations, pooling;"
        "print(sorted({'transformer_lens', 'sklearn', 'typer', 'rich'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_the_estimators_that_a_user_needs_have_public_names() -> None:
    from lmprobe_tl import estimators

    assert estimators.__all__ == sorted(estimators.__all__, key=lambda name: (not name.isupper(), name))
    made = {type(estimators.make_classifier(name, 0)) for name in estimators.CLASSIFIERS}
    ours = {one.__name__ for one in made if one.__module__.startswith("lmprobe_tl")}
    assert len(ours) == 11
    assert ours <= set(estimators.__all__)
    for name in set(estimators.__all__) - {"CLASSIFIERS", "SEQUENCE_CLASSIFIERS"}:
        assert getattr(estimators, name).__doc__, name


def test_public_names_are_sorted_documented_and_there() -> None:
    assert lmprobe_tl.__all__ == sorted(lmprobe_tl.__all__)
    assert set(lmprobe_tl.__all__) == set(lmprobe_tl._HOMES) | {"pooling"}
    for name in lmprobe_tl.__all__:
        assert getattr(lmprobe_tl, name).__doc__, name
        assert name in dir(lmprobe_tl)
    fixed = {"Probe", "ProbeWeights", "load_probe", "attach_probes", "monitored_generate", "extract_activations", "pooling"}
    assert fixed <= set(lmprobe_tl.__all__)
    # Importing a module binds its name in the package, where it would hide what should stand there.
    assert set(lmprobe_tl._HOMES) & set(FLOOR_OF) == set()
    with pytest.raises(AttributeError, match="'load_prob'"):
        _ = lmprobe_tl.load_prob


def test_nothing_in_the_package_unpickles() -> None:
    for module, path in module_names().items():
        if module == "demo.train_model":  # its own checkpoint, with weights_only=True
            continue
        assert not {"pickle", "joblib", "dill", "cloudpickle"} & {
            name.split(".")[0] for name in imports_of(path.read_text())
        }
        assert not re.search(r"(?<!safetensors\.)torch\.load\(", path.read_text()), module
