"""Thresholds set on the scores of a vLLM engine: those of TransformerLens in float32, and kept where they are served."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from lmprobe_tl import ActivationStore, ProbeWeights, calibrate_probe, extract_activations, load_probe, sequence_maxima
from lmprobe_tl.cli.app import app
from lmprobe_tl.demo import MODEL_FOLDER, load_demo_model
from lmprobe_tl.errors import CalibrationWarning, EngineError, IncompatibleProbeError, InputError, PromptTooLongError
from lmprobe_tl.vllm import ProbedLLM

SMALL: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 256,
    "seed": 0,
}


def texts_of(n: int, seed: int) -> list[str]:
    """Of 3 to 25 words of random letters, so that no two have their maximum at the same beginning."""
    drawn = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz_(). "))
    words = ["".join(drawn.choice(letters, drawn.integers(2, 5))) for _ in range(40 * n)]
    return [" ".join(drawn.choice(words, drawn.integers(3, 26))) for _ in range(n)]


NEGATIVES = texts_of(120, 0)
POSITIVES = [f"def area_{at}(width, height):\n    return width * height + {at}\n" for at in range(40)]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_demo_model()


@cache
def direction() -> torch.Tensor:
    """From random letters to code, unit length."""
    found = extract_activations(load_demo_model(), [*NEGATIVES[:20], *POSITIVES[:20]], 3, "mean")
    (values,) = found.values.values()
    apart = values[20:].mean(dim=0) - values[:20].mean(dim=0)
    return apart / apart.norm()


def probe_of(pooling: str, name: str = "direction", hook_point: str = "blocks.3.hook_resid_post") -> ProbeWeights:
    made = ProbeWeights.from_direction(direction(), -0.4, name=name, hook_points=hook_point, residual_basis="raw")
    return made.with_inference_pooling(pooling)


POOLINGS = ["score:max", "score:ema_max(0.3)", "score:mean", "mean", "last_token"]


def start_shared() -> ProbedLLM:
    served = probe_of("score:max", "served")
    return ProbedLLM(MODEL_FOLDER, probes=served, dtype="float32", enforce_eager=True, **SMALL)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_in_float32_the_threshold_is_that_of_transformer_lens(engine: ProbedLLM, model: Any, pooling: str) -> None:
    probe = probe_of(pooling)
    settings: dict[str, Any] = {"fpr": 0.05, "positive_prompts": POSITIVES, "probability": True}
    found = calibrate_probe(engine, probe, NEGATIVES, **settings)
    expected = calibrate_probe(model, probe, NEGATIVES, **settings)
    ours, theirs = found.threshold, expected.threshold
    assert ours is not None and theirs is not None
    assert ours.value == pytest.approx(theirs.value, abs=1e-4)
    assert ours.statistic == f"{theirs.statistic}, scored by vLLM in float32"
    assert replace(ours, value=theirs.value, statistic=theirs.statistic) == theirs
    assert found.spec.metrics["recall_at_fpr"].n == len(POSITIVES)
    curve, reference = found.spec.probability_calibration, expected.spec.probability_calibration
    assert curve is not None and reference is not None
    assert curve.slope == pytest.approx(reference.slope, rel=1e-3)


@pytest.mark.parametrize("pooling", ["score:max", "score:mean"])
def test_running_maxima_equal_one_by_one(engine: ProbedLLM, model: Any, pooling: str) -> None:
    probe = probe_of(pooling)
    before = engine.probes
    engine.replace_probes(probe)
    try:
        rows = extract_activations(model, NEGATIVES, 0).tokens
        for unit in ("logit", "probability"):
            found = engine.sequence_maxima(rows, probe.name, unit)
            torch.testing.assert_close(found, sequence_maxima(model, NEGATIVES, probe, unit=unit), rtol=1e-5, atol=1e-4)
        assert engine.sequence_maxima([[0]], probe.name, "logit").isnan().all()  # BOS alone: nothing counts
    finally:
        engine.replace_probes(before)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_what_is_calibrated_here_holds_here(alone: None, model: Any, tmp_path: Path, dtype: str, rounding: float) -> None:
    fpr, path = 0.1, tmp_path / "probe.safetensors"
    rows = extract_activations(model, NEGATIVES, 0).tokens
    with ProbedLLM(MODEL_FOLDER, probes=probe_of("score:max"), dtype=dtype, **SMALL) as engine:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # in bfloat16 more than fpr of them lie near the threshold
            calibrate_probe(engine, probe_of("score:max"), NEGATIVES, fpr, method="empirical").save(path)
        maxima = engine.sequence_maxima(rows, "direction", "logit")
        engine.replace_probes(path)
        assert false_alarms(engine, rows) == int(fpr * len(NEGATIVES)) == 12
    threshold = load_probe(path).threshold
    assert threshold is not None and threshold.statistic.endswith(f"scored by vLLM in {dtype}")
    # Served from the file, in other batches and without a compiled graph: but for rounding, the same ones.
    with ProbedLLM(MODEL_FOLDER, probes=path, dtype=dtype, enforce_eager=True, **(SMALL | {"max_num_seqs": 3})) as served:
        alarms = false_alarms(served, rows)
    surely, possibly = (int((maxima >= threshold.value + margin).sum()) for margin in (rounding, -rounding))
    assert surely <= alarms <= possibly
    assert possibly - surely < 10


def false_alarms(engine: ProbedLLM, rows: list[list[int]]) -> int:
    prompts = [{"prompt_token_ids": row} for row in rows]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    return sum(bool(output.alarms) for output in outputs)


def test_the_engine_has_its_own_probes_again(engine: ProbedLLM) -> None:
    calibrate_probe(engine, probe_of("score:max", "other"), NEGATIVES, 0.05)
    assert [weights.name for weights in engine.probes] == ["served"]
    with pytest.raises(IncompatibleProbeError, match="this engine was compiled for"):
        calibrate_probe(engine, probe_of("score:max", hook_point="blocks.1.hook_resid_post"), NEGATIVES, 0.05)
    with pytest.raises(PromptTooLongError):  # fails after the probes were replaced
        calibrate_probe(engine, probe_of("score:max", "other"), [*NEGATIVES, "import os " * 80], 0.05)
    (output,) = engine.generate(["import os"], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)
    assert list(output.probe_scores) == ["served"] and output.n_unknown == 0


def test_what_cannot_be_is_refused(engine: ProbedLLM, model: Any) -> None:
    probe = probe_of("score:max")
    with pytest.raises(InputError, match="engine is 'transformer_lens', but the model is a vLLM engine"):
        calibrate_probe(engine, probe, NEGATIVES, 0.05, engine="transformer_lens")
    with pytest.raises(InputError, match="engine is 'vllm', but the model is a TransformerBridge"):
        calibrate_probe(model, probe, NEGATIVES, 0.05, engine="vllm")
    with pytest.raises(InputError, match="engine is 'sglang'; expected"):
        calibrate_probe(model, probe, NEGATIVES, 0.05, engine="sglang")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="belong to an engine that is yet to be started"):
        calibrate_probe(engine, probe, NEGATIVES, 0.05, batch_size=4)
    with pytest.raises(PromptTooLongError, match="longer than the 127 tokens allowed: prompt 120"):
        calibrate_probe(engine, probe, [*NEGATIVES, "import os " * 80], 0.05)
    with pytest.raises(EngineError, match="a token of a prompt of 5 has no score"):
        engine._maximum(None, 5, "served")
    three = ProbeWeights.from_direction(torch.randn(3, 192), name="three", hook_points=probe.hook_points, labels=(0, 1, 2))
    with pytest.raises(InputError, match="3 classes; a threshold needs"):
        calibrate_probe(engine, three, NEGATIVES, 0.05)


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_calibrates_and_extracts_with_an_engine(
    alone: None, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe, texts = tmp_path / "probe.safetensors", tmp_path / "texts.txt"
    probe_of("score:max").save(probe)
    texts.write_text("\n".join(NEGATIVES))
    arguments = '{"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "block_size": 32, "enforce_eager": true}'
    engine = ["--engine", "vllm", "--engine-args", arguments]
    app(["calibrate", str(probe), str(texts), "--fpr", "0.05", *engine], standalone_mode=False)
    assert "scored by vLLM in float32" in capsys.readouterr().out
    expected = calibrate_probe(model, probe_of("score:max"), NEGATIVES, 0.05).threshold
    found = load_probe(probe).threshold
    assert found is not None and expected is not None
    assert found.value == pytest.approx(expected.value, abs=1e-4)

    store = tmp_path / "store"
    options = ["--hook-points", "1,4", "--pooling", "mean", "-o", str(store)]
    app(["extract", str(texts), *options, *engine], standalone_mode=False)
    opened = ActivationStore(store)
    assert opened.manifest.engine == "vllm" and opened.hook_points == (
        "blocks.1.hook_resid_post",
        "blocks.4.hook_resid_post",
    )
    reference = extract_activations(model, NEGATIVES, [1, 4], "mean").concatenated()
    torch.testing.assert_close(opened.values(), reference, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"dtpye": "float32"}', "'dtpye' is no argument of an engine of vLLM .*Did you mean 'dtype'"),
        ('{"model": "x"}', "'model' is among the engine's arguments, but it is set already"),
        ('{"probes": []}', "'probes' is among the engine's arguments, but it is set already"),
    ],
)
def test_arguments_that_no_engine_has_are_refused_before_one_starts(arguments: str, message: str, tmp_path: Path) -> None:
    probe, texts = tmp_path / "probe.safetensors", tmp_path / "texts.txt"
    probe_of("score:max").save(probe)
    texts.write_text("\n".join(NEGATIVES))
    given = ["--fpr", "0.05", "--engine", "vllm", "--engine-args", arguments]
    with pytest.raises(InputError, match=message):
        app(["calibrate", str(probe), str(texts), *given], standalone_mode=False)
