"""Evaluation of live alarms: every number against a plain loop over Hugging Face's activations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, WORDS, Tiny
from live_reference import BOS, encode, expected_running, features_of, make_probe
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from lmprobe_tl import LiveEvaluation, evaluate_live, load_probe
from lmprobe_tl.errors import EmptyMaskError, InputError, PromptTooLongError
from lmprobe_tl.live.sequences import LiveSequence
from lmprobe_tl.probe_spec import MetricRecord
from lmprobe_tl.weights import ProbeWeights

GENERATOR = np.random.default_rng(5)
FIRST = sorted(set(WORDS.split()))[:21]  # each text begins with another word, so that no two have the same score
TEXTS = [" ".join([first, *GENERATOR.choice(WORDS.split(), GENERATOR.integers(2, 8))]) for first in FIRST]
LABELS = [int(at % 3 == 0) for at in range(21)]
NEW = 6


@dataclass
class Plain:
    """One sequence, judged by hand."""

    ids: list[int]
    given: int
    crossing: int | None
    maximum: float


def judged(tiny: Tiny, ids: list[int], given: int, n_scored: int, probe: ProbeWeights) -> Plain:
    """A loop over the scored positions, with the running score as probability or, for the streaming reductions, logit."""
    seen = ids[:n_scored]
    running = expected_running(features_of(tiny, seen, probe), probe, seen).tolist()
    assert probe.threshold is not None
    crossing = None
    for position, score in enumerate(running):
        assert not abs(score - probe.threshold.value) < 1e-5, "too near to the threshold for a test"
        if score >= probe.threshold.value:
            crossing = position
            break
    return Plain(ids, given, crossing, max(score for score in running if score == score))


def check(found: LiveEvaluation, plain: list[Plain], labels: list[int]) -> None:
    """All of an evaluation against lists and loops."""
    lead, generated_tokens, saved = [], {0: 0, 1: 0}, {0: 0, 1: 0}
    alarms = {0: 0, 1: 0}
    for one, label in zip(plain, labels, strict=True):
        kept = len(one.ids)
        if one.crossing is not None:
            alarms[label] += 1
            if label:
                lead.append(len(one.ids[one.crossing + 1 :]))
            kept = max(one.given, one.crossing + 1)  # a stop keeps the token that crossed, and never less than the prompt
        generated_tokens[label] += len(one.ids) - one.given
        saved[label] += len(one.ids) - kept
    assert found.crossings == tuple(one.crossing for one in plain)
    assert [(one.n_tokens, one.prompt_length) for one in found.sequences] == [(len(one.ids), one.given) for one in plain]
    assert found.positives == tuple(map(bool, labels))
    assert (found.n_positive, found.n_negative) == (sum(labels), len(labels) - sum(labels))
    for interval, label, n in ((found.recall, 1, found.n_positive), (found.false_positive_rate, 0, found.n_negative)):
        expected = binomtest(alarms[label], n).proportion_ci(0.95, method="exact")
        assert interval.value == alarms[label] / n
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert (interval.n, interval.confidence) == (n, 0.95)
    assert found.leads == tuple(lead)
    assert found.lead is not None
    assert (found.lead.low, found.lead.median, found.lead.high) == tuple(np.percentile(lead, [25, 50, 75]))
    assert found.lead.n == len(lead)
    assert (found.tokens_saved.saved, found.tokens_saved.generated) == (saved[1], generated_tokens[1])
    assert (found.tokens_cut.saved, found.tokens_cut.generated) == (saved[0], generated_tokens[0])
    assert found.tokens_saved.share == saved[1] / generated_tokens[1]
    assert found.auroc.value == pytest.approx(roc_auc_score(labels, [one.maximum for one in plain]))
    assert found.auroc.low is not None and found.auroc.low <= found.auroc.value


def with_threshold(tiny: Tiny, probe: ProbeWeights, unit: Any) -> ProbeWeights:
    """Near the median of the running maxima, in the widest gap."""
    maxima = []
    for text in TEXTS:
        running = expected_running(features_of(tiny, encode(tiny, text), probe), probe, encode(tiny, text))
        maxima.append(running[~running.isnan()].max().item())
    middle = sorted(maxima)[7:14]
    _, low, high = max((high - low, low, high) for low, high in pairwise(middle))
    return probe.with_threshold((low + high) / 2, unit)


@pytest.mark.parametrize(
    ("inference", "unit"),
    [("score:max", "probability"), ("score:mean", "probability"), ("mean", "probability"), ("score:ema_max(0.5)", "logit")],
)
def test_whole_texts_equal_a_plain_loop(tiny: Tiny, inference: str, unit: str) -> None:
    probe = with_threshold(tiny, make_probe(inference=inference), unit)
    found = evaluate_live(tiny.bridge, TEXTS, LABELS, probe, batch_size=5, n_bootstrap=50)
    plain = []
    for text in TEXTS:
        ids = encode(tiny, text)
        plain.append(judged(tiny, ids, int(ids[0] == BOS), len(ids), probe))
    check(found["p"], plain, LABELS)
    assert list(found) == ["p"]
    assert (found["p"].threshold, found["p"].unit) == (probe.threshold.value, unit)  # type: ignore[union-attr]
    assert found["p"].max_new_tokens == 0
    assert 0 < found["p"].recall.value < 1 or 0 < found["p"].false_positive_rate.value < 1, "something to count"


def greedy(tiny: Tiny, prompt: list[int], eos: int, new: int = NEW) -> list[int]:
    """Hugging Face's own continuation of one prompt alone."""
    output = tiny.reference.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=eos
    )
    return output[0].tolist()


@pytest.mark.parametrize("inference", ["score:max", "score:mean"])
@pytest.mark.parametrize("ends_early", [False, True])
def test_continued_prompts_equal_a_plain_loop(
    tiny: Tiny, inference: str, ends_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = with_threshold(tiny, make_probe(inference=inference, seed=2), "probability")
    prompts = [encode(tiny, text) for text in TEXTS]
    eos = tiny.bridge.cfg.eos_token_id
    if ends_early:  # a token that some rows generate in the middle
        eos = next(row[-3] for row in (greedy(tiny, prompt, eos) for prompt in prompts))
        monkeypatch.setattr(tiny.bridge.cfg, "eos_token_id", eos)
    rows = [greedy(tiny, prompt, eos) for prompt in prompts]
    if ends_early:
        assert any(len(row) < len(prompt) + NEW for row, prompt in zip(rows, prompts, strict=True))
    # the last token, sampled or EOS, never enters the model
    plain = [judged(tiny, row, len(prompt), len(row) - 1, probe) for row, prompt in zip(rows, prompts, strict=True)]
    found = evaluate_live(
        tiny.bridge, TEXTS, LABELS, probe, max_new_tokens=NEW, do_sample=False, batch_size=5, n_bootstrap=50
    )["p"]
    check(found, plain, LABELS)
    assert found.max_new_tokens == NEW
    inside = [one.crossing is not None and one.crossing < one.given for one in plain]
    assert any(inside), "some prompts cross by themselves"


def test_what_a_stop_would_save_is_what_a_stop_saves(llama: Tiny) -> None:
    from lmprobe_tl.generation import monitored_generate

    probe = with_threshold(llama, make_probe(seed=2), "probability")
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    found = evaluate_live(llama.bridge, TEXTS, LABELS, probe, **options)["p"]
    stopped = monitored_generate(llama.bridge, TEXTS, probe, stop=True, **options)
    for one, result in zip(found.sequences, stopped, strict=True):
        assert one.n_tokens - one.saved == len(result.tokens)
    assert sum(one.saved for one in found.sequences) == found.tokens_saved.saved + found.tokens_cut.saved > 0


def test_sequences_count_as_they_say() -> None:
    late = LiveSequence(n_tokens=10, prompt_length=4, crossing=9, maximum=1.0)
    assert (late.n_generated, late.lead, late.saved) == (6, 0, 0)
    middle = LiveSequence(n_tokens=10, prompt_length=4, crossing=5, maximum=1.0)
    assert (middle.lead, middle.saved) == (4, 4)
    last_of_prompt = LiveSequence(n_tokens=10, prompt_length=4, crossing=3, maximum=1.0)
    assert (last_of_prompt.lead, last_of_prompt.saved) == (6, 6)
    in_prompt = LiveSequence(n_tokens=10, prompt_length=4, crossing=1, maximum=1.0)
    assert (in_prompt.lead, in_prompt.saved) == (8, 6)
    never = LiveSequence(n_tokens=10, prompt_length=4, crossing=None, maximum=1.0)
    assert (never.lead, never.saved) == (None, 0)


def test_several_probes_each_at_its_own_threshold_and_any_batch_size(llama: Tiny) -> None:
    probes = [make_probe("a"), make_probe("b", "blocks.1.hook_resid_post", seed=4, inference="score:mean")]
    probes = [with_threshold(llama, probe, "probability") for probe in probes]
    together = evaluate_live(llama.bridge, TEXTS, LABELS, probes, batch_size=21, n_bootstrap=20)
    assert list(together) == ["a", "b"]
    for probe in probes:
        alone = evaluate_live(llama.bridge, TEXTS, LABELS, probe, batch_size=1, n_bootstrap=20)[probe.name]
        assert alone.crossings == together[probe.name].crossings
        assert alone.recall == together[probe.name].recall
        assert alone.tokens_saved == together[probe.name].tokens_saved
    assert together["a"].crossings != together["b"].crossings


def test_confident_scores_are_ranked_by_their_logits(llama: Tiny) -> None:
    """Probabilities beyond a logit of 17 are all 1 in float32."""
    tame, wild = make_probe(), make_probe(scale=0.1)
    wild = ProbeWeights(wild.direction * 300, wild.intercept * 300, wild.spec)
    for new in (0, 3):
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "n_bootstrap": 20}
        one, other = (evaluate_live(llama.bridge, TEXTS, LABELS, probe, **options)["p"] for probe in (tame, wild))
        assert one.auroc.value == other.auroc.value
        assert sum(sequence.maximum > 20 for sequence in other.sequences) > 8, "they would all be 1"


@pytest.mark.parametrize(
    ("own", "convert"),
    [
        ((0, 1), lambda label: label),
        ((0, 1), bool),
        (("no", "yes"), lambda label: "yes" if label else "no"),
        (("no", "yes"), lambda label: label),
        ((1, 0), lambda label: 1 - label),  # the probe's own labels go first: here 0 is its positive class
        ((3, 7), lambda label: (3, 7)[label]),
        ((False, "yes"), bool),
    ],
)
def test_labels_are_the_probes_own_or_zero_and_one(llama: Tiny, own: Any, convert: Any) -> None:
    probe = dataclasses.replace(make_probe(), spec=dataclasses.replace(make_probe().spec, labels=own))
    found = evaluate_live(llama.bridge, TEXTS, [convert(label) for label in LABELS], probe, n_bootstrap=5)["p"]
    assert found.positives == tuple(map(bool, LABELS))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([2, *LABELS[1:]], r"labels holds 2; expected those of probe 'p', \[0, 1\], or 0 and 1"),
        (["yes"] * 21, "labels holds 'yes'"),
        ([1] * 21, "all labels are 1; an evaluation needs positive and negative prompts"),
        ([0] * 21, "all labels are 0"),
        (LABELS[1:], "21 prompts but 20 labels"),
        ([0.5] * 21, "0.5"),
    ],
)
def test_labels_that_mean_nothing(llama: Tiny, labels: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmprobe_tl.scoring.run_to_hook_points", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message):
        evaluate_live(llama.bridge, TEXTS, labels, make_probe())


def test_what_cannot_be_evaluated(llama: Tiny) -> None:
    with pytest.raises(InputError, match="3 classes"):
        evaluate_live(llama.bridge, TEXTS, LABELS, make_probe(n_classes=3))
    for bad in (-1, 2.5, True, None):
        with pytest.raises(InputError, match=f"max_new_tokens is {bad!r}; expected 0"):
            evaluate_live(llama.bridge, TEXTS, LABELS, make_probe(), max_new_tokens=bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one string"):
        evaluate_live(llama.bridge, "cats", [1], make_probe())
    with pytest.raises(EmptyMaskError, match="no token counts in prompt 1"):
        evaluate_live(llama.bridge, ["cats", ""], [0, 1], make_probe())
    with pytest.raises(EmptyMaskError, match="prompt 1"):
        evaluate_live(llama.bridge, ["cats", ""], [0, 1], make_probe(), max_new_tokens=2, prepend_bos=False)
    with pytest.raises(InputError, match=f"max_new_tokens is {CONTEXT}, but the model's context has only {CONTEXT} tokens"):
        evaluate_live(llama.bridge, TEXTS, LABELS, make_probe(), max_new_tokens=CONTEXT)
    with pytest.raises(PromptTooLongError, match=r"longer than the 6 tokens allowed: prompt"):
        evaluate_live(llama.bridge, TEXTS, LABELS, make_probe(), max_new_tokens=CONTEXT - 6)
    short = evaluate_live(
        llama.bridge, TEXTS, LABELS, make_probe(), max_new_tokens=2, max_length=6, truncation="left", n_bootstrap=5
    )["p"]
    assert max(one.prompt_length for one in short.sequences) == 6
    assert max(one.n_tokens for one in short.sequences) == 8


def test_a_chat_is_continued_after_a_generation_prompt_and_taken_whole_without(gpt2: Tiny) -> None:
    chats = [[{"role": "user", "content": text}] for text in TEXTS[:4]]
    lengths = {}
    for new in (0, 3):
        found = evaluate_live(gpt2.bridge, chats, [0, 1, 0, 1], make_probe(), max_new_tokens=new, n_bootstrap=5)["p"]
        lengths[new] = [one.n_tokens - (one.n_generated if new else 0) for one in found.sequences]
        for chat, length in zip(chats, lengths[new], strict=True):
            text = gpt2.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=new > 0)
            assert length == len(encode(gpt2, text, bos=False))
    assert lengths[0] != lengths[3]


def test_metrics_go_into_the_file_and_away_with_another_threshold(llama: Tiny, tmp_path: Any) -> None:
    probe = with_threshold(llama, make_probe(), "probability").with_metrics({"auroc": MetricRecord(value=0.5, n=3)})
    found = evaluate_live(llama.bridge, TEXTS, LABELS, probe, n_bootstrap=50)["p"]
    records = found.records()
    assert set(records) == {
        "live_recall", "live_false_positive_rate", "live_auroc", "live_tokens_saved", "live_tokens_cut", "live_lead_median",
    }  # fmt: skip
    assert records["live_recall"] == MetricRecord(
        value=found.recall.value, low=found.recall.low, high=found.recall.high, confidence=0.95, n=7
    )
    assert records["live_false_positive_rate"].n == 14 and records["live_auroc"].n == 21
    assert records["live_tokens_saved"].value == found.tokens_saved.share
    assert found.lead is not None
    assert records["live_lead_median"] == MetricRecord(value=found.lead.median, n=found.lead.n)
    loaded = load_probe(probe.with_metrics({**probe.spec.metrics, **records}).save(tmp_path / "p.safetensors"))
    assert set(loaded.spec.metrics) == {"auroc", *records}
    assert set(loaded.with_threshold(0.99).spec.metrics) == {"auroc"}


def test_without_any_alarm_there_is_no_lead(llama: Tiny) -> None:
    never = make_probe().with_threshold(1e9, "logit")
    found = evaluate_live(llama.bridge, TEXTS, LABELS, never, n_bootstrap=5)["p"]
    assert found.lead is None and found.leads == () and set(found.crossings) == {None}
    assert found.recall.value == 0 and found.tokens_saved.saved == 0 and found.tokens_saved.share == 0
    assert "live_lead_median" not in found.records()
    assert found.auroc.value == evaluate_live(llama.bridge, TEXTS, LABELS, make_probe(), n_bootstrap=5)["p"].auroc.value


def test_an_evaluation_is_a_frozen_record_with_sampling_by_the_global_seed(llama: Tiny) -> None:
    probe = make_probe()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(evaluate_live(llama.bridge, TEXTS, LABELS, probe, max_new_tokens=3, n_bootstrap=5)["p"])
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        runs[0].recall = None  # type: ignore[misc,assignment]
