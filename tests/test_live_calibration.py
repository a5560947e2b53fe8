"""Calibration on text: the statistic is that of a live run, and the threshold in the file means there what it meant here."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from live_reference import encode, expected_running, features_of, left_padded, make_probe
from sklearn.base import clone

from lmprobe_tl import (
    Probe,
    attach_probes,
    calibrate_probe,
    extract_activations,
    load_probe,
    score_prompts,
    sequence_maxima,
)
from lmprobe_tl.calibration import Calibration, required_negatives
from lmprobe_tl.demo import MODEL_FOLDER
from lmprobe_tl.errors import (
    CalibrationError,
    CalibrationWarning,
    EmptyMaskError,
    InputError,
    MonitorError,
    PoolingMismatchWarning,
    PromptTooLongError,
)
from lmprobe_tl.hook_points import forward_once, load_model
from lmprobe_tl.probe_spec import MetricRecord, ThresholdRecord
from lmprobe_tl.scoring import live_unit, prompt_rows, score_batches
from lmprobe_tl.weights import ProbeWeights

POOLINGS = (
    "score:max", "mean", "score:mean", "last_token", "score:last_token", "first_token", "score:min", "all",
    "score:ema_max(0.5)", "score:rolling_max(3)", "score:softmax(2)",
)  # fmt: skip
# Many of the prompts begin with the same words, and some score highest there.
pytestmark = pytest.mark.filterwarnings("ignore::lmprobe_tl.errors.CalibrationWarning")
LOOSE: dict[str, Any] = {"fpr": 0.1, "delta": 0.1}  # 22 sequences will do


def make_prompts(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS.split(), generator.integers(3, 9))) for _ in range(count)]


NEGATIVES, POSITIVES, TRAINING = make_prompts(60, 1), make_prompts(30, 2), make_prompts(24, 3)


def probe_for(inference: str, **options: Any) -> ProbeWeights:
    return make_probe("p", inference=inference, **options)


# --- the statistic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", POOLINGS)
@pytest.mark.parametrize("include_bos", [False, True])
def test_the_statistic_is_the_greatest_running_score_of_a_plain_loop(gpt2: Tiny, inference: str, include_bos: bool) -> None:
    probe = probe_for(inference, include_bos=include_bos)
    found = sequence_maxima(gpt2.bridge, NEGATIVES[:10], probe, batch_size=4)
    assert found.dtype == torch.float32 and found.shape == (10,)
    for text, maximum in zip(NEGATIVES[:10], found.tolist(), strict=True):
        ids = encode(gpt2, text)
        running = expected_running(features_of(gpt2, ids, probe), probe, ids)
        expected = running[~running.isnan()].max()
        on_logits = inference.partition("(")[0] in ("score:ema_max", "score:rolling_max", "score:softmax")
        if live_unit(probe) == "logit" and not on_logits:
            expected = expected.double().logit()
        assert maximum == pytest.approx(expected.item(), rel=1e-3, abs=1e-4), inference
    assert (live_unit(probe) == "probability") == (inference == "score:mean")


def test_both_units_and_any_batch_say_the_same(llama: Tiny) -> None:
    for inference in ("score:max", "score:mean"):
        probe = probe_for(inference)
        logits = sequence_maxima(llama.bridge, NEGATIVES, probe, unit="logit", batch_size=7)
        probabilities = sequence_maxima(llama.bridge, NEGATIVES, probe, unit="probability", batch_size=1)
        torch.testing.assert_close(logits.sigmoid(), probabilities, rtol=1e-4, atol=1e-6)
        own = sequence_maxima(llama.bridge, NEGATIVES, probe, batch_size=7)
        assert torch.equal(own, logits) == (inference == "score:max")


def test_logits_stay_apart_where_probabilities_are_all_one(llama: Tiny) -> None:
    probe = probe_for("score:max", scale=30.0)
    assert (sequence_maxima(llama.bridge, NEGATIVES, probe, unit="probability") == 1).sum() > 20
    assert len(sequence_maxima(llama.bridge, NEGATIVES, probe).unique()) > 50


def test_it_takes_a_file_token_ids_and_the_options_of_scoring(llama: Tiny, tmp_path: Any) -> None:
    path = probe_for("score:max").save(tmp_path / "p.safetensors")
    texts = sequence_maxima(llama.bridge, NEGATIVES[:5], path, prepend_bos=True, max_length=4, truncation="right")
    ids = [torch.tensor(encode(llama, text, bos=True)[:4]) for text in NEGATIVES[:5]]
    torch.testing.assert_close(sequence_maxima(llama.bridge, ids, path), texts)
    with pytest.raises(InputError, match="unit is 'percent'; expected 'logit' or 'probability'"):
        sequence_maxima(llama.bridge, ids, path, unit="percent")  # type: ignore[arg-type]
    with pytest.raises(EmptyMaskError, match="no token counts in prompt 1"):
        sequence_maxima(llama.bridge, ["cats", ""], path, prepend_bos=True)
    with pytest.raises(InputError, match="3 classes; a threshold needs a probe with two"):
        sequence_maxima(llama.bridge, ids, make_probe(n_classes=3))


def test_an_error_in_the_middle_leaves_no_hook(llama: Tiny) -> None:
    overflow = probe_for("score:max", scale=3e37)
    with pytest.raises(MonitorError, match="not finite"):
        sequence_maxima(llama.bridge, NEGATIVES, overflow)


# --- the threshold means the same everywhere -----------------------------------------------------------------------------


def alarms_when_attached(tiny: Tiny, probe: Any, prompts: list[str], batch_size: int = 8) -> list[bool]:
    """Whether a live run over each prompt raises an alarm; left padding, another order, plain forward passes."""
    raised: list[bool] = []
    for start in range(0, len(prompts), batch_size):
        tokens, mask = left_padded([encode(tiny, text) for text in prompts[start : start + batch_size]])
        with attach_probes(tiny.bridge, probe) as monitor:
            forward_once(tiny.bridge, tokens, mask)
        raised += [bool(alarms) for alarms in monitor.alarms()]
    return raised


def in_doubt(tiny: Tiny, probe: ProbeWeights, prompts: list[str]) -> np.ndarray:
    """Which maxima lie so near to the threshold that the rounding of another batch may decide."""
    assert probe.threshold is not None
    maxima = sequence_maxima(tiny.bridge, prompts, probe).numpy()
    return np.abs(maxima - probe.threshold.value) <= 1e-5 * max(1, abs(probe.threshold.value))


@pytest.mark.parametrize("inference", POOLINGS)
def test_alarms_of_the_loaded_file_are_those_that_the_calibration_counted(gpt2: Tiny, inference: str, tmp_path: Any) -> None:
    path = calibrate_probe(gpt2.bridge, probe_for(inference), NEGATIVES, **LOOSE).save(tmp_path / "p.safetensors")
    loaded = load_probe(path)
    assert loaded.threshold is not None and loaded.threshold.unit == live_unit(loaded)
    assert (loaded.threshold.n, loaded.threshold.rank) == (60, 58)
    maxima = sequence_maxima(gpt2.bridge, NEGATIVES, loaded).numpy()
    at_rank = np.sort(maxima)[57]
    assert loaded.threshold.value == np.nextafter(at_rank, np.float32(np.inf))
    tied = inference in ("first_token", "score:min")
    assert (maxima == at_rank).sum() == 1 or tied
    assert int((maxima > at_rank).sum()) == 2 or tied
    # in the very same passes the alarms are exactly these
    alarms: dict[int, bool] = {}
    rows = prompt_rows(gpt2.bridge, NEGATIVES, [loaded])
    score_batches(
        gpt2.bridge, rows, [loaded], lambda at, monitor: alarms.update(zip(at, map(bool, monitor.alarms()), strict=True))
    )
    assert [alarms[at] for at in range(60)] == (maxima > at_rank).tolist()
    # in other batches, too, but for what rounding decides
    raised = np.array(alarms_when_attached(gpt2, path, NEGATIVES))
    expected = maxima >= np.float32(loaded.threshold.value)
    doubt = in_doubt(gpt2, loaded, NEGATIVES)
    assert doubt.sum() == 1 or tied, "the one at the rank itself"
    assert (raised == expected)[~doubt].all()
    assert raised[~doubt].sum() == 2 or tied


def test_ties_at_the_rank_raise_no_alarm(gpt2: Tiny) -> None:
    """Equal prompts in batches of one get equal scores, to the last bit."""
    maxima = sequence_maxima(gpt2.bridge, NEGATIVES, probe_for("score:max"), batch_size=1)
    in_order = [NEGATIVES[index] for index in maxima.argsort().tolist()]
    tied = [*in_order[:50], *[in_order[50]] * 9, in_order[59]]
    with pytest.warns(CalibrationWarning, match=r"10 of 60 negative sequences have a running maximum of .*begin alike\?"):
        calibrated = calibrate_probe(gpt2.bridge, probe_for("score:max"), tied, batch_size=1, **LOOSE)
    assert calibrated.threshold is not None and calibrated.threshold.rank == 58
    flagged = score_prompts(gpt2.bridge, tied, calibrated, batch_size=1)["p"].flagged
    assert flagged is not None and flagged.tolist() == [False] * 59 + [True]
    lower = calibrated.with_threshold(float(np.nextafter(np.float32(calibrated.threshold.value), np.float32(-9))), "logit")
    flagged = score_prompts(gpt2.bridge, tied, lower, batch_size=1)["p"].flagged
    assert flagged is not None and int(flagged.sum()) == 10, "the control: at the score itself, all ten would be"


def test_scores_that_differ_give_no_warning_of_ties(gpt2: Tiny) -> None:
    maxima = sequence_maxima(gpt2.bridge, NEGATIVES, probe_for("score:max"))
    _, first = np.unique(maxima.numpy().round(4), return_index=True)
    apart = [NEGATIVES[index] for index in first]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("pac", "conformal", "empirical"):
            calibrate_probe(gpt2.bridge, probe_for("score:max"), apart, method=method, **LOOSE)


@pytest.mark.parametrize("method", ["pac", "conformal", "empirical"])
def test_the_file_says_what_it_promises(llama: Tiny, tmp_path: Any, method: str) -> None:
    probe = make_probe(inference="score:ema_max(0.5)", include_bos=True)
    calibrated = calibrate_probe(llama.bridge, probe, NEGATIVES, method=method, **LOOSE)
    loaded = load_probe(calibrated.save(tmp_path / "p.safetensors")).threshold
    assert loaded == calibrated.threshold and loaded is not None
    assert (loaded.method, loaded.fpr, loaded.n) == (method, 0.1, 60)
    assert loaded.delta == (0.1 if method == "pac" else None)
    assert loaded.rank == {"pac": 58, "conformal": 55, "empirical": 54}[method]
    assert loaded.statistic == "running maximum of score:ema_max(0.5), BOS included"
    assert (
        loaded.guarantee is not None
        and {"pac": "With 90% confidence", "conformal": "On average", "empirical": "None for"}[method] in loaded.guarantee
    )


def test_a_probe_of_the_centred_stream_is_calibrated_as_it_is_attached(gpt2: Tiny) -> None:
    centred = probe_for("score:max", residual_basis="centered")
    calibrated = calibrate_probe(gpt2.bridge, centred, NEGATIVES, **LOOSE)
    assert calibrated.spec.residual_basis == "centered"
    assert calibrated.threshold == calibrate_probe(gpt2.bridge, centred.to_raw_basis(), NEGATIVES, **LOOSE).threshold


# --- positives -----------------------------------------------------------------------------------------------------------


def test_recall_is_a_metric_and_a_target_that_is_missed_is_an_error(llama: Tiny) -> None:
    probe = probe_for("score:max").with_metrics({"auroc": MetricRecord(value=0.9, n=10)})
    found = calibrate_probe(llama.bridge, probe, NEGATIVES, positive_prompts=POSITIVES, **LOOSE)
    assert found.threshold is not None
    positives = sequence_maxima(llama.bridge, POSITIVES, probe)
    share = (positives >= found.threshold.value).float().mean().item()
    recall = found.spec.metrics["recall_at_fpr"]
    assert recall.value == pytest.approx(share) and recall.n == 30 and recall.low is not None
    assert found.spec.metrics["auroc"].value == 0.9
    target = share + 0.01
    with pytest.raises(CalibrationError, match=rf"recall is {share:.3f} .* on 30 .*below the target {target:g}.* an FPR of"):
        calibrate_probe(llama.bridge, probe, NEGATIVES, positive_prompts=POSITIVES, min_recall=target, **LOOSE)
    if share:
        calibrate_probe(llama.bridge, probe, NEGATIVES, positive_prompts=POSITIVES, min_recall=share, **LOOSE)


def test_a_new_threshold_takes_away_what_was_measured_at_the_old_one(llama: Tiny) -> None:
    one = MetricRecord(value=0.5, n=10)
    probe = probe_for("score:max").with_metrics({"auroc": one, "recall_at_fpr": one, "live_recall": one})
    for changed in (calibrate_probe(llama.bridge, probe, NEGATIVES, **LOOSE), probe.with_threshold(0.7)):
        assert set(changed.spec.metrics) == {"auroc"}


def separated(tiny: Tiny) -> tuple[list[str], list[str]]:
    """The prompts parted by their scores, so that there is something to find."""
    maxima = sequence_maxima(tiny.bridge, NEGATIVES + POSITIVES, probe_for("score:max"))
    order = maxima.argsort().tolist()
    texts = NEGATIVES + POSITIVES
    return [texts[at] for at in order[:60]], [texts[at] for at in order[50:]]


def test_calibrated_probabilities_never_move_a_threshold_or_an_alarm(llama: Tiny, tmp_path: Any) -> None:
    below, above = separated(llama)
    options: dict[str, Any] = {"positive_prompts": above, **LOOSE}
    plain = calibrate_probe(llama.bridge, probe_for("score:max"), below, **options)
    curved = calibrate_probe(llama.bridge, probe_for("score:max"), below, probability=True, **options)
    assert plain.threshold == curved.threshold and plain.spec.metrics == curved.spec.metrics
    assert plain.spec.probability_calibration is None
    curve = curved.spec.probability_calibration
    assert curve is not None and (curve.n_negative, curve.n_positive) == (60, 40)
    loaded = load_probe(curved.save(tmp_path / "p.safetensors"))
    assert alarms_when_attached(llama, loaded, above) == alarms_when_attached(llama, plain, above)
    maxima = sequence_maxima(llama.bridge, above, loaded, unit="logit")
    found = loaded.calibrated_probabilities(maxima)
    torch.testing.assert_close(found, (curve.slope * maxima.double() + curve.intercept).sigmoid().float())
    assert torch.equal(found.argsort(), maxima.argsort())
    below_found = loaded.calibrated_probabilities(sequence_maxima(llama.bridge, below, loaded, unit="logit"))
    assert torch.cat([found, below_found]).mean().item() == pytest.approx(0.4, abs=0.02)
    assert loaded.with_threshold(0.9).spec.probability_calibration == curve, "apart from the threshold"
    recalibrated = calibrate_probe(llama.bridge, loaded, below, **LOOSE)
    assert recalibrated.spec.probability_calibration is None, "of another calibration"
    assert loaded.with_inference_pooling("score:mean").spec.probability_calibration is None


def test_calibrated_probabilities_of_anything_and_without_a_curve(llama: Tiny) -> None:
    below, above = separated(llama)
    probe = calibrate_probe(llama.bridge, probe_for("score:mean"), below, positive_prompts=above, probability=True, **LOOSE)
    one = probe.calibrated_probabilities([[-math.inf, 0.0], [3.0, math.inf]])
    assert one.shape == (2, 2) and one.dtype == torch.float32 and one.isfinite().all()
    assert one[0, 0] < one[0, 1] < one[1, 0] < one[1, 1]
    assert probe.calibrated_probabilities(0.0).ndim == 0
    for bad in (math.nan, [1.0, math.nan], torch.tensor([1, 2])):
        with pytest.raises(InputError, match="expected logits, floats that are not NaN"):
            probe.calibrated_probabilities(bad)
    with pytest.raises(InputError, match=r"probe 'p' has no probability calibration; make one with calibrate\("):
        probe_for("score:max").calibrated_probabilities([0.0])


# --- what cannot work fails before the model runs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "60 negative sequences are too few: method 'pac' with fpr 0.01, delta 0.05 needs at least 299"),
        ({"method": "conformal"}, "method 'conformal' with fpr 0.01 needs at least 99"),
        ({"fpr": 0}, "fpr is 0"),
        ({"method": "best"}, "method is 'best'"),
        ({**LOOSE, "min_recall": 0.9}, "min_recall=0.9 needs positive_prompts"),
        ({**LOOSE, "probability": True}, "probability=True needs positive_prompts"),
        ({**LOOSE, "positive_prompts": "cats"}, r"one string .*not a list"),
        ({**LOOSE, "positive_prompts": []}, "prompts is empty"),
        ({**LOOSE, "positive_prompts": ["cats"], "min_recall": 90}, "min_recall is 90; expected a share above 0"),
        ({**LOOSE, "positive_prompts": ["cats"], "min_recall": True}, "min_recall is True"),
        ({**LOOSE, "positive_prompts": ["cats"], "min_recall": 0}, "min_recall is 0"),
        ({**LOOSE, "positive_prompts": ["cats"], "probability": "yes"}, "probability is 'yes'"),
    ],
)
def test_what_is_certain_to_fail_fails_before_the_model_runs(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("lmprobe_tl.scoring.run_to_hook_points", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message):
        calibrate_probe(llama.bridge, probe_for("score:max"), NEGATIVES, **change)
    fitted = Probe(llama.bridge, 2, random_state=0).fit(TRAINING, [0, 1] * 12)
    with pytest.raises(InputError, match=message):
        fitted.calibrate(NEGATIVES, **change)
    assert not hasattr(fitted, "calibration_")


def test_probes_without_one_score_and_other_misuse_are_refused(llama: Tiny) -> None:
    with pytest.raises(InputError, match="3 classes; a threshold needs a probe with two"):
        calibrate_probe(llama.bridge, make_probe(n_classes=3), NEGATIVES, **LOOSE)
    with pytest.raises(InputError, match="one string .*not a list"):
        calibrate_probe(llama.bridge, make_probe(), "cats", **LOOSE)
    certain = ProbeWeights.from_direction(torch.ones(32), 1e3, name="p", hook_points="blocks.2.hook_resid_post")
    certain = certain.with_inference_pooling("score:mean")
    with pytest.raises(
        CalibrationError, match=r"above every possible score: .* reach a probability of 1\..*such as 'score:max'"
    ):
        calibrate_probe(llama.bridge, certain, NEGATIVES, 0.3, 0.1)
    assert calibrate_probe(llama.bridge, certain.with_inference_pooling("score:max"), NEGATIVES, 0.3, 0.1).threshold


# --- the estimator -------------------------------------------------------------------------------------------------------


def fitted(tiny: Tiny, **options: Any) -> Probe:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoolingMismatchWarning)
        probe = Probe(
            tiny.bridge, 2, train_pooling="mean", **{"inference_pooling": "score:max", "random_state": 0, **options}
        )
    return probe.fit(TRAINING, [0, 1] * 12)


def test_calibrate_is_learnt_saved_and_dropped_by_another_fit(llama: Tiny, tmp_path: Any) -> None:
    probe = fitted(llama, name="learnt")
    assert probe.weights_.threshold is None and not hasattr(probe, "calibration_")
    assert probe.calibrate(NEGATIVES, 0.1, 0.1, positive_prompts=POSITIVES) is probe
    assert isinstance(probe.calibration_, Calibration)
    assert (
        probe.weights_.threshold
        == probe.calibration_.threshold
        == load_probe(probe.save(tmp_path / "p.safetensors")).threshold
    )
    evaluation = probe.evaluate(TRAINING, [0, 1] * 12, n_bootstrap=20)
    metrics = load_probe(probe.save(tmp_path / "q.safetensors", evaluation=evaluation)).spec.metrics
    assert {"recall_at_fpr", "auroc"} <= set(metrics) and metrics["recall_at_fpr"] == probe.calibration_.recall
    raised = alarms_when_attached(llama, probe, NEGATIVES)
    assert abs(sum(raised) - 2) <= in_doubt(llama, probe.weights_, NEGATIVES).sum()
    assert not hasattr(clone(probe), "calibration_")
    assert probe.fit(TRAINING, [0, 1] * 12).weights_.threshold is None
    assert not hasattr(probe, "calibration_")


def test_calibrate_and_calibrate_probe_agree(llama: Tiny) -> None:
    probe = fitted(llama, prepend_bos=True, max_length=7, truncation="right", batch_size=5)
    plain = probe.weights_
    probe.calibrate(NEGATIVES, 0.1, 0.1)
    from_file = calibrate_probe(llama.bridge, plain, NEGATIVES, 0.1, 0.1, max_length=7, truncation="right", batch_size=5)
    assert probe.weights_.spec == from_file.spec
    with pytest.raises(PromptTooLongError):
        calibrate_probe(llama.bridge, plain, NEGATIVES, 0.1, 0.1, max_length=7)


def test_a_threshold_is_never_carried_to_another_score(llama: Tiny) -> None:
    probe = fitted(llama).calibrate(NEGATIVES, 0.1, 0.1)
    other_bos = not probe.weights_.spec.tokenizer.prepend_bos
    for change in ({"inference_pooling": "score:mean"}, {"include_bos": True}, {"prepend_bos": other_bos}):
        old = {name: getattr(probe, name) for name in change}
        probe.set_params(**change)
        with pytest.raises(InputError, match=rf"the threshold was calibrated with .*{next(iter(change))}.*call calibrate"):
            _ = probe.weights_
        probe.set_params(**old)
        assert probe.weights_.threshold is not None
    probe.set_params(inference_pooling="score:mean")
    assert probe.calibrate(NEGATIVES, 0.1, 0.1).weights_.threshold.unit == "probability"
    probe.set_params(name="other", batch_size=3)
    assert probe.weights_.threshold is not None, "what does not touch the score keeps it"


def test_prompts_that_were_trained_on_promise_nothing(llama: Tiny) -> None:
    probe = fitted(llama)
    mixed = [*NEGATIVES, TRAINING[3], *POSITIVES]
    with pytest.raises(CalibrationError, match="1 of the 91 negative_prompts were trained on, the first at index 60"):
        probe.calibrate(mixed, 0.1, 0.1)
    with pytest.raises(CalibrationError, match="2 of the 2 positive_prompts were trained on, the first at index 0"):
        probe.calibrate(NEGATIVES, 0.1, 0.1, positive_prompts=TRAINING[:2])
    assert not hasattr(probe, "calibration_")
    probe.calibrate(TRAINING, 0.1, method="empirical")
    assert probe.calibration_.threshold.guarantee.startswith("None for new text")


def test_three_classes_have_no_threshold_to_calibrate(llama: Tiny) -> None:
    probe = Probe(llama.bridge, 2, random_state=0).fit(TRAINING, [0, 1, 2] * 8)
    with pytest.raises(InputError, match="3 classes"):
        probe.calibrate(NEGATIVES, 0.1, 0.1)


@settings(deadline=None, max_examples=25)
@given(fpr=st.floats(0.05, 0.5), delta=st.floats(0.05, 0.5), n=st.integers(20, 60))
def test_few_sequences_fail_where_the_rule_says(all_tiny: dict[str, Tiny], fpr: float, delta: float, n: int) -> None:
    probe, model = probe_for("score:max"), all_tiny["llama"].bridge
    if n < required_negatives(fpr, delta):
        with pytest.raises(CalibrationError, match=f"^{n} negative sequences are too few"):
            calibrate_probe(model, probe, NEGATIVES[:n], fpr, delta)
    else:
        found = calibrate_probe(model, probe, NEGATIVES[:n], fpr, delta, batch_size=60).threshold
        assert isinstance(found, ThresholdRecord) and found.n == n


# --- engines of low precision --------------------------------------------------------------------------------------------


class StandIn:
    """For a running engine, whose scores are given: one a prompt."""

    model, longest_prompt, probes = MODEL_FOLDER, 64, ()

    def __init__(self, dtype: str, maxima: Any) -> None:
        self.dtype, self._maxima = dtype, torch.tensor(maxima, dtype=torch.float32)

    def replace_probes(self, probes: Any) -> None:
        self.probes = probes

    def sequence_maxima(self, rows: Any, name: str, unit: str, *, progress: bool | None) -> torch.Tensor:
        return self._maxima


def calibrated_by(dtype: str, maxima: Any, *, pooling: str = "score:max") -> tuple[ThresholdRecord, list[str]]:
    """The threshold, and the warnings about ties."""
    probe = ProbeWeights.from_direction(torch.ones(192), name="p", hook_points="blocks.3.hook_resid_post")
    prompts = [f"import {at}" for at in range(len(maxima))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CalibrationWarning)
        found = calibrate_probe(
            StandIn(dtype, maxima), probe.with_inference_pooling(pooling), prompts, 0.1, method="empirical"
        )
    assert found.threshold is not None
    return found.threshold, [str(one.message) for one in caught if one.category is CalibrationWarning]


SPREAD = np.linspace(-3.0, 2.0, 40)  # 0.13 apart
NEAR = np.concatenate([np.linspace(-3.0, 1.0, 30), 2.0 + 0.001 * np.arange(10)])  # ten within a hundredth


@pytest.mark.parametrize(("dtype", "margin"), [("float32", 1e-5), ("float16", 0.0125), ("bfloat16", 0.1)])
def test_a_warning_of_ties_follows_the_dtype(dtype: str, margin: float) -> None:
    assert calibrated_by(dtype, SPREAD)[1] == []
    threshold, told = calibrated_by(dtype, NEAR)
    assert threshold.value == pytest.approx(2.005, abs=1e-5)
    if dtype == "float32":
        assert told == []
    else:
        (message,) = told
        assert message.startswith("10 of 40 negative sequences have a running maximum of 2.005 or more, up to rounding")
        assert float(message.split("(")[1].split(")")[0]) == pytest.approx(margin, rel=0.01)


def test_the_guarantee_says_what_a_small_dtype_does_to_it() -> None:
    promise = "None for new text: at most 10% of these very 40 calibration sequences raise an alarm."
    assert calibrated_by("float32", NEAR)[0].guarantee == promise
    assert calibrated_by("bfloat16", NEAR)[0].guarantee == (
        f"{promise} That is of scores as computed here: in bfloat16, another device, another engine or other batches may "
        "move a score by about 0.1, and 10 of the 40 calibration sequences lie that near to the threshold."
    )
    assert "and 1 of the 40" in str(calibrated_by("bfloat16", SPREAD)[0].guarantee)
    assert "may move a score by about 0.1," in str(calibrated_by("float8_e4m3fn", SPREAD)[0].guarantee)


def test_of_probabilities_the_rounding_is_that_of_their_logits() -> None:
    spread = 1 / (1 + np.exp(-SPREAD))
    (threshold, told), z = calibrated_by("bfloat16", spread, pooling="score:mean"), SPREAD[35]
    share = 1 / (1 + math.exp(-z))
    assert threshold.unit == "probability" and told == []
    assert f"by about {0.1 * share * (1 - share):.2g}," in str(threshold.guarantee)
    saturated = np.concatenate([np.full(32, 0.5), np.full(8, 1 - 2**-23)])  # no rounding of logits moves these by much
    assert calibrated_by("bfloat16", saturated, pooling="score:mean")[1] != []


def test_a_model_of_transformer_lens_says_it_too(llama: Tiny) -> None:
    probe = probe_for("score:max")
    threshold = calibrate_probe(llama.bridge, probe, NEGATIVES, **LOOSE).threshold
    assert threshold is not None and "may move" not in str(threshold.guarantee)
    narrow = load_model(str(llama.folder)).to(torch.bfloat16)  # one of its own: no way leads back to the numbers of before
    threshold = calibrate_probe(narrow, probe, NEGATIVES, **LOOSE).threshold
    assert threshold is not None and "in bfloat16, another device" in str(threshold.guarantee)


def test_a_running_engine_of_the_other_kind_is_refused() -> None:
    class ActivationEngine:
        longest_prompt, pooled = 64, None

    with pytest.raises(InputError, match="the model is a running ActivationEngine; expected a ProbedLLM, or the name"):
        calibrate_probe(ActivationEngine(), probe_for("score:max"), NEGATIVES, **LOOSE)
    with pytest.raises(InputError, match="the model is a running ProbedLLM; expected an ActivationEngine, or the name"):
        extract_activations(StandIn("float32", [0.0]), NEGATIVES, 1)
