"""The spec's records: a bad field is named with its value, whether it comes by hand or from a dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmprobe_tl.errors import InputError, ProbeFileError
from lmprobe_tl.probe_spec import MetricRecord, ModelRecord, ProbabilityRecord, ProbeSpec, ThresholdRecord, TrainingRecord

HOOKS = ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post")
WIDTH = 6
GOOD_TRAINING: dict[str, Any] = {
    "data_sha256": "0" * 64,
    "n_prompts": 4,
    "n_examples": 4,
    "class_counts": [2, 2],
    "classifier": "lda",
    "random_state": None,
}
GOOD_METRIC: dict[str, Any] = {"value": 0.9, "low": 0.8, "high": 0.95, "confidence": 0.95, "n": 10}
GOOD_THRESHOLD: dict[str, Any] = {
    "value": 0.5,
    "unit": "probability",
    "method": "m",
    "fpr": None,
    "delta": None,
    "n": None,
    "rank": None,
    "statistic": None,
    "guarantee": None,
}
GOOD_CURVE: dict[str, Any] = {
    "slope": 1.5,
    "intercept": -1,
    "n_negative": 5,
    "n_positive": 1,
    "statistic": "running maximum",
    "log_loss_before": 0.7,
    "log_loss_after": 0.5,
    "brier_before": 0.2,
    "brier_after": 0,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": ""}, "name is ''; expected 1 to 200 characters"),
        ({"name": "x" * 201}, "name is 'xxx"),
        ({"name": "a\x1b[31m"}, r"name is 'a\\x1b\[31m'; .*none of them a control character"),
        ({"name": "\ud800"}, r"name is '\\ud800'; expected text"),
        ({"name": 3}, "name is 3; expected text"),
        ({"kind": "svm"}, "kind is 'svm'; expected 'linear' or 'mlp' or 'polynomial' or 'attention'"),
        ({"labels": ["no"]}, r"labels is \('no',\); expected two or more labels"),
        ({"labels": ["no", "no"]}, "no two of them equal"),
        ({"labels": [1, True]}, r"labels is \(1, True\).*no two of them equal"),
        ({"labels": [0, 1.0]}, r"labels\[1\] is 1.0; expected bool or int or str"),
        ({"labels": [np.str_("no"), "yes"]}, r"labels\[0\] is np.str_\('no'\); expected bool or int or str"),
        ({"labels": [0, None]}, r"labels\[1\] is None; expected bool or int or str"),
        ({"labels": [0, 2**63]}, r"labels\[1\] is 9223372036854775808; expected a whole number of at most 64 bits"),
        ({"hook_points": "blocks.0.hook_resid_post"}, "hook_points is 'blocks.0.hook_resid_post'; expected a list"),
        ({"hook_points": []}, r"hook_points is \(\); expected one or more hook names"),
        ({"hook_points": ["a", "a"]}, "all different"),
        ({"hook_points": ["a", ""]}, "expected one or more hook names"),
        ({"d_model": 0}, "d_model is 0; expected at least 1"),
        ({"d_model": True}, "d_model is True; expected a whole number"),
        ({"d_model": 6.0}, "d_model is 6.0; expected a whole number"),
        ({"n_layers": 0}, "n_layers is 0; expected at least 1"),
        ({"residual_basis": "cooked"}, "residual_basis is 'cooked'; expected 'raw' or 'centered' or 'any'"),
        ({"normalization": None}, "normalization is None; expected 'layernorm'"),
        ({"model": None}, "model is None; expected a ModelRecord"),
        ({"model": {"id": "gpt2", "revision": None}}, "model.config_fingerprint is missing; expected the keys id, revision"),
        (
            {"tokenizer": {"fingerprint": None, "prepend_bos": 1, "chat_template_fingerprint": None}},
            "tokenizer.prepend_bos is 1",
        ),
        ({"pooling": {"train": "", "inference": "mean", "include_bos": False}}, "pooling.train is ''"),
        ({"pooling": {"train": "mean", "inference": "", "include_bos": False}}, "pooling.inference is ''"),
        ({"threshold": {**GOOD_THRESHOLD, "value": 1.5}}, r"threshold.value is 1.5; .*say unit='logit'"),
        ({"threshold": {**GOOD_THRESHOLD, "value": float("nan")}}, "threshold.value is nan; expected a finite number"),
        (
            {"threshold": {**GOOD_THRESHOLD, "value": np.float32("inf")}},
            "threshold.value is .*inf.*; expected a finite number",
        ),
        ({"threshold": {**GOOD_THRESHOLD, "value": 10**400}}, "threshold.value is 1000.*expected a finite number"),
        ({"threshold": {**GOOD_THRESHOLD, "value": False}}, "threshold.value is False; expected a finite number"),
        (
            {"threshold": {**GOOD_THRESHOLD, "unit": "percent"}},
            "threshold.unit is 'percent'; expected 'probability' or 'logit'",
        ),
        ({"threshold": {**GOOD_THRESHOLD, "fpr": 2}}, "threshold.fpr is 2.0; expected a number from 0 to 1"),
        ({"threshold": {**GOOD_THRESHOLD, "delta": -0.1}}, "threshold.delta is -0.1"),
        ({"threshold": {**GOOD_THRESHOLD, "n": 0}}, "threshold.n is 0; expected at least 1"),
        (
            {"threshold": {**GOOD_THRESHOLD, "surprise": "x"}},
            "threshold.'surprise' .value 'x'. is an unknown key; expected value",
        ),
        ({"threshold": GOOD_THRESHOLD, "labels": [0, 1, 2]}, "expected None, since 3 classes give more than one score"),
        ({"threshold": {**GOOD_THRESHOLD, "rank": 1}}, "threshold.rank is 1; expected None, or a number from 1 to n, None"),
        ({"threshold": {**GOOD_THRESHOLD, "rank": 0, "n": 5}}, "threshold.rank is 0; .*a number from 1 to n, 5"),
        ({"threshold": {**GOOD_THRESHOLD, "rank": 6, "n": 5}}, "threshold.rank is 6; .*a number from 1 to n, 5"),
        ({"threshold": {**GOOD_THRESHOLD, "guarantee": 3}}, "threshold.guarantee is 3; expected text"),
        ({"threshold": {**GOOD_THRESHOLD, "statistic": True}}, "threshold.statistic is True; expected text"),
        (
            {"probability_calibration": {**GOOD_CURVE, "slope": 0}},
            "probability_calibration.slope is 0.0; .*a number above 0",
        ),
        ({"probability_calibration": {**GOOD_CURVE, "n_positive": 0}}, "n_positive is 0; expected at least 1"),
        ({"probability_calibration": {**GOOD_CURVE, "n_negative": 0}}, "n_negative is 0; expected at least 1"),
        ({"probability_calibration": {**GOOD_CURVE, "brier_after": -0.1}}, "brier_after is -0.1; expected 0 or more"),
        ({"probability_calibration": {**GOOD_CURVE, "intercept": None}}, "intercept is None; expected a finite number"),
        ({"probability_calibration": GOOD_CURVE, "labels": [0, 1, 2]}, "expected None, since 3 classes give more than one"),
        ({"training": {**GOOD_TRAINING, "data_sha256": "F" * 64}}, "training.data_sha256 is 'FFF.*64 lower-case hex digits"),
        ({"training": {**GOOD_TRAINING, "n_prompts": 0}}, "training.n_prompts is 0"),
        ({"training": {**GOOD_TRAINING, "n_examples": 0}}, "training.n_examples is 0"),
        ({"training": {**GOOD_TRAINING, "class_counts": [5, -1]}}, r"training.class_counts is \(5, -1\)"),
        ({"training": {**GOOD_TRAINING, "class_counts": [4]}}, r"training.class_counts is \(4,\); expected 2 counts"),
        ({"metrics": {"auroc": {**GOOD_METRIC, "low": None}}}, r"metrics\['auroc'\].\(low, high, confidence\) is \(None"),
        (
            {"metrics": {"auroc": {**GOOD_METRIC, "low": 0.99}}},
            r"metrics\['auroc'\].low is 0.99; expected at most high, 0.95",
        ),
        ({"metrics": {"auroc": {**GOOD_METRIC, "confidence": 95}}}, r"metrics\['auroc'\].confidence is 95.0"),
        ({"metrics": {"auroc": {**GOOD_METRIC, "n": 0}}}, r"metrics\['auroc'\].n is 0"),
        ({"metrics": ["auroc"]}, r"metrics is \['auroc'\]; expected a dictionary"),
        ({"versions": {"torch": 2}}, r"versions\['torch'\] is 2; expected text"),
        ({"versions": {3: "x"}}, "a key of versions is 3; expected text"),
    ],
)
def test_a_bad_field_is_named_with_its_value_by_hand_and_from_a_dictionary(change: dict[str, Any], message: str) -> None:
    good = ProbeSpec(name="p", hook_points=HOOKS, d_model=WIDTH).to_dict()
    with pytest.raises(InputError, match=message):
        ProbeSpec(**{**good, **change})
    with pytest.raises(ProbeFileError, match=message):
        ProbeSpec.from_dict({**good, **change})


def test_a_good_spec_passes_with_each_record() -> None:
    given_records = {"training": GOOD_TRAINING, "metrics": {"auroc": GOOD_METRIC}, "threshold": GOOD_THRESHOLD}
    given_records["probability_calibration"] = GOOD_CURVE
    spec = ProbeSpec(name="p", hook_points=HOOKS, d_model=WIDTH, model=ModelRecord(id="gpt2"), **given_records)  # type: ignore
    assert spec.training == TrainingRecord(**GOOD_TRAINING) and spec.metrics["auroc"] == MetricRecord(**GOOD_METRIC)
    assert spec.threshold == ThresholdRecord(**GOOD_THRESHOLD)
    assert spec.probability_calibration == ProbabilityRecord(**GOOD_CURVE)


@pytest.mark.parametrize(
    "data, message", [([], "ProbeSpec is .*expected a dictionary"), ({}, "name is missing; expected the keys")]
)
def test_from_dict_wants_every_key(data: Any, message: str) -> None:
    with pytest.raises(ProbeFileError, match=message):
        ProbeSpec.from_dict(data)


def test_numbers_of_numpy_become_plain_and_whole_floats_stay_floats() -> None:
    metric = MetricRecord(value=np.float32(0.5), n=np.int64(3))  # type: ignore[arg-type]
    assert [type(metric.value), type(metric.n)] == [float, int]
    assert type(ThresholdRecord(value=1).value) is float  # 1 and 1.0 must give equal bytes


def test_a_spec_cannot_be_changed_through_the_mappings_it_was_made_from() -> None:
    versions = {"torch": "2"}
    spec = ProbeSpec(name="p", hook_points=HOOKS, d_model=WIDTH, versions=versions)
    versions["torch"] = "3"
    assert spec.versions == {"torch": "2"}
    with pytest.raises(TypeError):
        spec.versions["torch"] = "4"  # type: ignore[index]
