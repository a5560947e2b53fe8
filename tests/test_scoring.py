"""Scoring prompts with probe files: batch pooling by hand, the estimator and the live code all say the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from live_reference import BOS, PAD, assert_same, encode, expected_running, features_of, make_probe
from torch import Tensor

from lmprobe_tl.errors import EmptyMaskError, IncompatibleProbeError, InputError, PromptTooLongError
from lmprobe_tl.probe_file import load_probe
from lmprobe_tl.scoring import PromptScores, score_prompts, sequence_maxima
from lmprobe_tl.tokens import tokenizer_record
from lmprobe_tl.weights import ProbeWeights

PROMPTS = [
    "the model", "a short line and then it writes one more", "cats", "rain sun music and light", "dogs and cats", "it",
    "the model reads every word", "music", "one more line about the rain", "sun",
]  # fmt: skip
POOLINGS = ("score:max", "mean", "score:mean", "last_token", "first_token", "score:min", "score:rolling_max(3)", "all")


def probes_of_all_kinds() -> list[ProbeWeights]:
    hooks = ("blocks.2.hook_resid_post", "blocks.0.hook_resid_post")
    binary = [make_probe(pooling, hooks, seed=3, inference=pooling) for pooling in POOLINGS]
    return [
        *binary,
        make_probe("classes", "blocks.1.hook_out", seed=4, n_classes=3, inference="score:mean"),
        make_probe("bos", "blocks.2.hook_resid_post", seed=5, inference="score:mean", include_bos=True),
    ]


def by_hand(tiny: Tiny, rows: list[list[int]], probe: ProbeWeights) -> PromptScores:
    features = [features_of(tiny, row, probe) for row in rows]
    scores = [expected_running(one, probe, row)[-1] for one, row in zip(features, rows, strict=True)]
    return PromptScores(torch.stack(scores), [probe.logits(one) for one in features])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_equal_batch_pooling_by_hand_in_the_order_of_the_prompts(tiny: Tiny, batch_size: int) -> None:
    probes = probes_of_all_kinds()
    found = score_prompts(tiny.bridge, PROMPTS, probes, batch_size=batch_size)
    assert list(found) == [probe.name for probe in probes]
    rows = [encode(tiny, text) for text in PROMPTS]
    for probe in probes:
        expected = by_hand(tiny, rows, probe)
        assert_same(found[probe.name].scores, expected.scores, probe.name)
        for one, other in zip(found[probe.name].token_logits, expected.token_logits, strict=True):
            assert_same(one, other, probe.name)
    assert len({round(float(score), 6) for score in found["mean"].scores}) == len(PROMPTS)  # an order can be seen


@pytest.mark.parametrize("inference", ["last_token", "mean", "score:max", "score:mean", "score:ema_max(0.5)"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_saved_probe_scores_what_its_estimator_predicts(
    all_tiny: dict[str, Tiny], name: str, inference: str, tmp_path: Any, recwarn: pytest.WarningsRecorder
) -> None:
    import warnings

    from lmprobe_tl.probe import Probe

    model = all_tiny[name].bridge
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = Probe(model, [1, 3], train_pooling="mean", inference_pooling=inference, name="d", random_state=0)
        probe.fit(PROMPTS, [0, 1] * 5)
    path = probe.save(tmp_path / "d.safetensors")
    scores = score_prompts(model, PROMPTS, path, strict=True)["d"].scores
    on_logits = inference == "score:ema_max(0.5)"
    expected = probe.decision_function(PROMPTS) if on_logits else probe.predict_proba(PROMPTS)[:, 1]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert expected.max() - expected.min() > 0.1


def test_the_model_runs_once_a_batch_and_no_further_than_the_last_hook_point(gpt2: Tiny) -> None:
    reached: list[str] = []
    names = ("blocks.2.hook_resid_post", "blocks.3.hook_in", "unembed.hook_in")
    hooks = [(name, lambda activations, hook, name=name: reached.append(name)) for name in names]
    with gpt2.bridge.hooks(fwd_hooks=hooks):
        score_prompts(gpt2.bridge, PROMPTS, probes_of_all_kinds(), batch_size=4)
        assert reached == ["blocks.2.hook_resid_post"] * 3
        gpt2.bridge(torch.tensor([[5]]))  # the control
    assert reached[3:] == list(names)


def test_scores_need_no_gradient_and_come_in_float32(llama: Tiny) -> None:
    found = score_prompts(llama.bridge, PROMPTS[:2], make_probe())["p"]
    for values in (found.scores, *found.token_logits):
        assert values.dtype == torch.float32
        assert not values.requires_grad


def test_a_prompt_that_extends_another_is_scored_on_its_own(llama: Tiny) -> None:
    """In batches of one the second looks like the next step of the first."""
    rows = [[5, 6, 7, 8], [5, 6, 7], [5, 6], [5, 6, 7, 8]]
    probe = make_probe(inference="score:mean")
    found = score_prompts(llama.bridge, [torch.tensor(row) for row in rows], probe, batch_size=1)["p"]
    expected = by_hand(llama, rows, probe)
    assert_same(found.scores, expected.scores)
    assert list(map(len, found.token_logits)) == [4, 3, 2, 4]


def test_pads_and_ends_inside_a_prompt_are_tokens_like_others(gpt2: Tiny) -> None:
    """The mask comes from lengths, not from ids."""
    rows = [[5, PAD, 7, PAD], [1, 1], [5, 6, 7, 8, 9, 1]]
    found = score_prompts(gpt2.bridge, [torch.tensor(row) for row in rows], make_probe())["p"]
    expected = by_hand(gpt2, rows, make_probe())
    assert_same(found.scores, expected.scores)
    for one, other in zip(found.token_logits, expected.token_logits, strict=True):
        assert_same(one, other)


def test_bos_is_prepended_as_the_probe_file_says(gpt2: Tiny) -> None:
    without = make_probe(tokenizer=tokenizer_record(gpt2.bridge, False))
    for settings, bos in (({}, False), ({"prepend_bos": True}, True)):
        rows = [encode(gpt2, text, bos=bos) for text in PROMPTS]
        found = score_prompts(gpt2.bridge, PROMPTS, without, **settings)["p"]
        assert_same(found.scores, by_hand(gpt2, rows, without).scores)


def test_long_prompts_are_refused_or_cut(gpt2: Tiny) -> None:
    with pytest.raises(PromptTooLongError, match="longer than the 4 tokens allowed"):
        score_prompts(gpt2.bridge, PROMPTS, make_probe(), max_length=4)
    found = score_prompts(gpt2.bridge, PROMPTS, make_probe(), max_length=4, truncation="left")["p"]
    rows = [encode(gpt2, text) for text in PROMPTS]
    rows = [row if len(row) <= 4 else [BOS, *row[-3:]] for row in rows]
    assert_same(found.scores, by_hand(gpt2, rows, make_probe()).scores)


def test_prompts_without_a_token_that_counts_are_named(gpt2: Tiny) -> None:
    with pytest.raises(EmptyMaskError, match="no token counts in prompt 1") as caught:
        score_prompts(gpt2.bridge, ["cats", ""], make_probe())
    assert caught.value.rows == [1]
    with pytest.raises(EmptyMaskError):
        score_prompts(gpt2.bridge, ["cats", ""], [make_probe("a", include_bos=True), make_probe("b")])
    seen = [make_probe("a", include_bos=True), make_probe("b", inference="first_token")]
    found = score_prompts(gpt2.bridge, ["cats", ""], seen)
    for probe in seen:
        assert_same(found[probe.name].scores, by_hand(gpt2, [encode(gpt2, "cats"), [BOS]], probe).scores)


def test_bad_requests_fail_before_the_model_runs(gpt2: Tiny) -> None:
    ran: list[Any] = []
    handle = gpt2.bridge.original_model.register_forward_pre_hook(lambda *_: ran.append(0))
    try:
        for prompts, probes, error in (
            ("cats", make_probe(), InputError),
            ([], make_probe(), InputError),
            (["cats"], [], InputError),
            (["cats"], [make_probe(), make_probe()], InputError),
            (["cats"], make_probe(n_layers=9), IncompatibleProbeError),
            (["cats"], make_probe(inference="activation:max"), IncompatibleProbeError),
        ):
            with pytest.raises(error):
                score_prompts(gpt2.bridge, prompts, probes)
        with pytest.raises(InputError, match="batch_size is 0"):
            score_prompts(gpt2.bridge, ["cats"], make_probe(), batch_size=0)
    finally:
        handle.remove()
    assert not ran


@pytest.mark.parametrize("inference", ["score:max", "score:mean", "score:ema_max(0.5)"])
@pytest.mark.parametrize("unit", ["probability", "logit"])
def test_a_score_that_equals_the_threshold_is_flagged_and_the_next_one_down_is_not(
    llama: Tiny, inference: str, unit: Any
) -> None:
    """Compared in the threshold's own unit, to the last bit."""
    probe = make_probe(inference=inference)
    maxima = sequence_maxima(
        llama.bridge, PROMPTS, probe, unit=unit
    )  # of these reductions but the mean the final score, too
    chosen = maxima[4] if inference != "score:mean" else final_score(llama, probe, unit)
    at = score_prompts(llama.bridge, PROMPTS, probe.with_threshold(float(chosen), unit))["p"].flagged
    above = float(np.nextafter(np.float32(chosen), np.float32(9e9)))
    over = score_prompts(llama.bridge, PROMPTS, probe.with_threshold(above, unit))["p"].flagged
    assert at is not None and over is not None and at.dtype == torch.bool
    assert at[4] and not over[4]
    assert 0 < over.sum() < at.sum() < len(PROMPTS)


def final_score(tiny: Tiny, probe: ProbeWeights, unit: str) -> Tensor:
    scores = score_prompts(tiny.bridge, PROMPTS, probe)["p"].scores[4]
    return scores if unit == "probability" else scores.double().logit().float()


def test_a_default_threshold_flags_at_one_half_and_several_classes_have_no_flags(llama: Tiny) -> None:
    centre = score_prompts(llama.bridge, PROMPTS, make_probe(inference="mean"))["p"].scores.median().logit()
    probe = make_probe(inference="mean")
    probes = [replace(probe, intercept=probe.intercept - centre), make_probe("classes", n_classes=3, inference="score:mean")]
    found = score_prompts(llama.bridge, PROMPTS, probes)
    flagged = found["p"].flagged
    assert flagged is not None and torch.equal(flagged, found["p"].scores >= 0.5)
    assert 0 < flagged.sum() < len(PROMPTS)
    assert found["classes"].flagged is None


SMALL_MODEL = """
import sys, torch
from types import SimpleNamespace


class Point(torch.nn.Identity):
    def __init__(self):
        super().__init__()
        self.fwd_hooks = []

    def add_hook(self, function):
        handle = self.register_forward_hook(lambda module, _, out: function(out, hook=module))
        self.fwd_hooks.append(SimpleNamespace(hook=handle))


class Model(torch.nn.Module):
    cfg = SimpleNamespace(n_layers=1, d_model=4, n_ctx=16, eos_token_id=9)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.point = torch.nn.Embedding(10, 4), Point()
        self.hook_dict = {"blocks.0.hook_resid_post": self.point}

    def forward(self, tokens, attention_mask=None):
        return self.point(self.embed(tokens))


from lmprobe_tl import attach_probes, load_probe
from lmprobe_tl.scoring import score_prompts

weights, model = load_probe(sys.argv[1]), Model()
with attach_probes(model, sys.argv[1]) as monitor:
    model(torch.tensor([[1, 2, 3]]))
expected = weights.logits(model.embed.weight[[1, 2, 3]])
torch.testing.assert_close(monitor.token_scores("small")[0], expected.detach())
(score,) = score_prompts(model, [torch.tensor([1, 2, 3])], weights)["small"].scores
torch.testing.assert_close(score, expected.max().sigmoid().detach())
assert not model.point.fwd_hooks and not model.point._forward_hooks
print(sorted({"sklearn", "transformers", "transformer_lens", "matplotlib", "pandas"} & set(sys.modules)))
"""


def test_loading_attaching_and_scoring_need_nothing_but_torch_and_a_model_with_hook_points(tmp_path: Any) -> None:
    weights = ProbeWeights.from_direction(
        torch.randn(4),
        name="small",
        hook_points="blocks.0.hook_resid_post",
        pooling={"inference": "score:max", "train": "all", "include_bos": False},
    )
    path = weights.save(tmp_path / "small.safetensors")
    assert load_probe(path).name == "small"
    done = subprocess.run([sys.executable, "-c", SMALL_MODEL, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
