"""Probes fitted on a store against the same probes fitted on the prompts themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from sklearn.linear_model import RidgeClassifier
from sweep_data import with_a_word

from lmprobe_tl import ActivationStore, Probe, extract_to_store, load_probe, store_examples
from lmprobe_tl.errors import CalibrationError, InputError, PoolingMismatchWarning, StoreError
from lmprobe_tl.estimators import CLASSIFIERS
from lmprobe_tl.estimators.streaming import can_stream
from lmprobe_tl.tokens import bos_id, tokenize_prompts

PROMPTS, LABELS = with_a_word(30, seed=11)
PROMPTS = [*PROMPTS, *PROMPTS[:3]]  # equal ones, too
LABELS = [*LABELS, *LABELS[:3]]
THREE = ["abc"[at % 3] for at in range(len(PROMPTS))]
UNSEEN = with_a_word(12, seed=12)[0]
NAMES = [*sorted(filter(can_stream, CLASSIFIERS)), "stacking"]
ANY: tuple[Any, ...] = (*NAMES, RidgeClassifier())
Stores = dict[str, ActivationStore]


@pytest.fixture(scope="module")
def stores(all_tiny: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """A store of each model in several shards."""
    return {
        name: extract_to_store(
            all_tiny[name].bridge,
            PROMPTS,
            tmp_path_factory.mktemp(name) / "store",
            hook_points=[0, 2, "blocks.3.hook_resid_pre"],
            pooling=["last_token", "mean", "all", "first_token"],
            prompts_per_shard=10,
            progress=False,
        )
        for name in ("gpt2", "llama")
    }


@pytest.fixture(params=["gpt2", "llama"])
def name(request: pytest.FixtureRequest) -> str:
    """One with LayerNorm and one with RMSNorm."""
    return request.param


def assert_equal_probes(found: Probe, expected: Probe, tolerance: float = 2e-4) -> None:
    """Batches differ between a store's shards and all prompts at once, and with them the last digits of float32."""
    assert found.training_ == expected.training_
    assert found.classes_.tolist() == expected.classes_.tolist()
    assert found.hook_names_ == expected.hook_names_
    assert found.n_features_in_ == expected.n_features_in_
    assert hasattr(found, "groups_") == hasattr(expected, "groups_")
    if hasattr(expected, "groups_"):
        assert found.groups_.tolist() == expected.groups_.tolist()
    scores = [probe.decision_function(UNSEEN) for probe in (found, expected)]
    np.testing.assert_allclose(scores[0], scores[1], atol=tolerance, rtol=tolerance)
    assert found.weights_.spec == expected.weights_.spec
    directions = [probe.weights_.direction for probe in (found, expected)]
    torch.testing.assert_close(*directions, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("labels", [LABELS, THREE], ids=["two classes", "three"])
@pytest.mark.parametrize("classifier", ANY, ids=str)
def test_a_probe_fitted_on_a_store_is_the_one_fitted_on_its_prompts(
    all_tiny: dict[str, Tiny], stores: Stores, name: str, classifier: Any, labels: list[Any]
) -> None:
    probes = [
        Probe(all_tiny[name].bridge, [2, 0], "mean", classifier=classifier, random_state=3, progress=False) for _ in range(2)
    ]
    assert_equal_probes(probes[0].fit_store(stores[name], labels), probes[1].fit(PROMPTS, labels))


@pytest.mark.parametrize("classifier", ["logistic_regression", "mass_mean", "ridge"])
@pytest.mark.parametrize("equal_prompt_weight", [False, True])
@pytest.mark.parametrize("labelled", ["prompts", "tokens"])
def test_so_is_one_on_every_token(
    all_tiny: dict[str, Tiny], stores: Stores, name: str, classifier: str, equal_prompt_weight: bool, labelled: str
) -> None:
    model, labels = all_tiny[name].bridge, list[Any](LABELS)
    if labelled == "tokens":
        rows = [row[row[0] == bos_id(model) :] for row in tokenize_prompts(model, PROMPTS)]
        labels = [[token % 2 for token in row] for row in rows]
    settings: dict[str, Any] = {"classifier": classifier, "equal_prompt_weight": equal_prompt_weight, "progress": False}
    found = Probe(model, 2, "all", inference_pooling="all", **settings).fit_store(stores[name], labels)
    expected = Probe(model, 2, "all", inference_pooling="all", **settings).fit(PROMPTS, labels)
    assert_equal_probes(found, expected)
    other = Probe(model, 2, "all", **{**settings, "equal_prompt_weight": not equal_prompt_weight})
    moved = (other.fit_store(stores[name], labels).weights_.direction - found.weights_.direction).abs().max()
    assert moved > 1e-3, "the weights of prompts do change something"


def test_from_one_shard_the_files_are_equal(gpt2: Tiny, tmp_path: Path) -> None:
    store = extract_to_store(gpt2.bridge, PROMPTS, tmp_path / "store", 1, "mean", progress=False)
    for classifier in NAMES:
        probe = Probe(gpt2.bridge, 1, "mean", classifier=classifier, random_state=0, progress=False)
        paths = [
            probe.fit(PROMPTS, LABELS).save(tmp_path / "a.safetensors"),
            probe.fit_store(store, LABELS).save(tmp_path / "b.safetensors"),
            probe.fit_store(tmp_path / "store", LABELS).save(tmp_path / "c.safetensors"),
        ]
        assert len({path.read_bytes() for path in paths}) == 1, classifier
    assert load_probe(paths[0]).spec.training == probe.training_


@pytest.mark.parametrize("pooling", ["mean", "all"])
@pytest.mark.parametrize("classifier", ["logistic_regression", "lda", RidgeClassifier()], ids=str)
def test_the_size_of_the_blocks_does_not_matter_and_no_block_is_larger(
    gpt2: Tiny, stores: Stores, monkeypatch: pytest.MonkeyPatch, classifier: Any, pooling: str
) -> None:
    probe = Probe(gpt2.bridge, [0, 2], pooling, classifier=classifier, progress=False)
    whole = probe.fit_store(stores["gpt2"], LABELS).weights_
    sizes: list[int] = []
    blocks = store_examples.StoreExamples.blocks

    def measured(self: Any) -> Any:
        for block in blocks(self):
            sizes.append(block.features.size)
            yield block

    monkeypatch.setattr(store_examples, "_BLOCK_ELEMENTS", 5 * 64)
    monkeypatch.setattr(store_examples.StoreExamples, "blocks", measured)
    weights = probe.fit_store(stores["gpt2"], LABELS).weights_
    assert max(sizes) == 5 * 64
    assert weights.spec == whole.spec
    torch.testing.assert_close(weights.direction, whole.direction, atol=1e-5, rtol=1e-5)


def test_the_sample_is_the_rows_that_fit_keeps(gpt2: Tiny, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_tl.features._SAMPLE", 7)
    monkeypatch.setattr(store_examples, "_BLOCK_ELEMENTS", 4 * 32)
    probes = [Probe(gpt2.bridge, 2, "mean", classifier="mass_mean", progress=False) for _ in range(2)]
    found, expected = probes[0].fit_store(stores["gpt2"], LABELS)._sample, probes[1].fit(PROMPTS, LABELS)._sample
    assert found.shape == (7, 32)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_calibration_refuses_what_was_in_the_store(gpt2: Tiny, stores: Stores) -> None:
    probe = Probe(gpt2.bridge, 2, "mean", progress=False).fit_store(stores["gpt2"], LABELS)
    with pytest.raises(CalibrationError, match="1 of the 12 negative_prompts were trained on, the first at index 11"):
        probe.calibrate([*UNSEEN[:11], PROMPTS[4]], 0.2, method="conformal")
    assert probe.calibrate(UNSEEN, 0.2, method="conformal").weights_.threshold is not None
    assert not hasattr(probe.fit_store(stores["gpt2"], LABELS), "calibration_")


def test_a_fit_on_prompts_forgets_the_groups_of_one_on_tokens(gpt2: Tiny, stores: Stores) -> None:
    probe = Probe(gpt2.bridge, 2, "all", classifier="mass_mean", progress=False).fit_store(stores["gpt2"], LABELS)
    assert len(probe.groups_) == stores["gpt2"].n_tokens
    assert not hasattr(probe.set_params(pooling="mean").fit(PROMPTS, LABELS), "groups_")


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "labels", "says", "error"),
    [
        ({"hook_points": 1}, LABELS, "no hook point 'blocks.1.hook_resid_post'; it has blocks.0", InputError),
        ({"pooling": "eos"}, LABELS, "pooling is 'eos'; this store has last_token, mean, all, first_token", InputError),
        ({"train_pooling": lambda activations, attention_mask: activations[:, 0]}, LABELS, "is a function", InputError),
        ({"prepend_bos": False}, LABELS, "prepend_bos True, here False", StoreError),
        ({"include_bos": True}, LABELS, "include_bos False, here True", StoreError),
        ({"max_length": 20}, LABELS, "max_length None, here 20", StoreError),
        ({"truncation": "left"}, LABELS, "truncation None, here 'left'", StoreError),
        ({"classifier": "rigde"}, LABELS, "Closest: 'ridge'", InputError),
        ({}, LABELS[:-1], "33 prompts but 32 labels", InputError),
        ({}, [1] * 33, "at least two classes", InputError),
        ({}, [[0, 1]] * 33, "token labels need 'all'", InputError),
        ({"pooling": "all"}, [[0, 1]] * 33, r"labels\[0\] has 2 token labels, but prompt 0 has", InputError),
        ({"pooling": "all"}, [[0, 1]] * 32, "33 prompts but 32 sequences of token labels", InputError),
    ],
)
def test_a_store_that_does_not_fit_is_refused(
    gpt2: Tiny, stores: Stores, changed: dict[str, Any], labels: Any, says: str, error: type[Exception]
) -> None:
    settings: dict[str, Any] = {"hook_points": 2, "pooling": "mean", "progress": False} | changed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoolingMismatchWarning)  # of the function
        probe = Probe(gpt2.bridge, **settings)
    with pytest.raises(error, match=says):
        probe.fit_store(stores["gpt2"], labels)
    assert not hasattr(probe, "classifier_")


def test_a_store_of_other_weights_or_ids_is_refused(
    all_tiny: dict[str, Tiny], stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = all_tiny["gpt2"].bridge
    probe = Probe(model, 2, "mean", progress=False)
    bias = model.blocks[0].mlp.out.original_component.bias
    with torch.no_grad():
        bias[0] += 1e-3
    try:
        with pytest.raises(StoreError, match="was not made as this probe sees its prompts: weights '.*', here '"):
            probe.fit_store(stores["gpt2"], LABELS)
    finally:
        with torch.no_grad():
            bias[0] -= 1e-3
    with pytest.raises(StoreError, match="weights "):
        Probe(all_tiny["llama"].bridge, 2, "mean", progress=False).fit_store(stores["gpt2"], LABELS)
    monkeypatch.setattr(model.cfg, "eos_token_id", 7, raising=False)
    with pytest.raises(StoreError, match=r"EOS ids \(1,\), here \(7,\)"):
        probe.fit_store(stores["gpt2"], LABELS)


def test_an_incomplete_store_is_refused_before_the_weights_are_read(
    gpt2: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = extract_to_store(
        gpt2.bridge, PROMPTS, tmp_path / "part", 2, "mean", shard=(0, 2), prompts_per_shard=10, progress=False
    )
    monkeypatch.setattr(store_examples, "weights_sha256", None)
    with pytest.raises(StoreError, match="is not complete: 2 of 4 shards are missing"):
        Probe(gpt2.bridge, 2, "mean", progress=False).fit_store(store, LABELS)
    with pytest.raises(StoreError, match="has no manifest.json"):
        Probe(gpt2.bridge, 2, "mean", progress=False).fit_store(tmp_path, LABELS)


@pytest.mark.parametrize("classifier", ["mass_mean_whitened", "logistic_regression", RidgeClassifier()], ids=str)
def test_activations_that_are_all_the_same_are_refused_as_by_fit(llama: Tiny, tmp_path: Path, classifier: Any) -> None:
    settings: dict[str, Any] = {"classifier": classifier, "prepend_bos": True, "progress": False}
    store = extract_to_store(llama.bridge, PROMPTS, tmp_path / "s", 2, "first_token", prepend_bos=True, progress=False)
    probe = Probe(llama.bridge, 2, "first_token", **settings)
    for fit, given in ((probe.fit_store, store), (probe.fit, PROMPTS)):
        with pytest.raises(InputError, match="with pooling 'first_token' the activations of all prompts are the same"):
            fit(given, LABELS)
