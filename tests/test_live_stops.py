"""What happens at a crossing: rows that end in the same step, callbacks, cascades with a judge; runs without scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Tiny
from live_reference import (
    BOS,
    EOS,
    PAD,
    PROMPTS,
    assert_same,
    encode,
    expected_running,
    features_of,
    left_padded,
    make_probe,
)
from torch import Tensor

from lmprobe_tl.attach import attach_probes
from lmprobe_tl.errors import InputError, MonitorError
from lmprobe_tl.generation import monitored_generate
from lmprobe_tl.live.records import Alarm, Escalate
from lmprobe_tl.weights import ProbeWeights

NEW = 8
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}


def batch_of(tiny: Tiny) -> tuple[list[list[int]], Tensor, Tensor]:
    rows = [encode(tiny, text) for text in PROMPTS]
    return rows, *left_padded(rows)


def free_run(tiny: Tiny) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and greedy continuations without probes; none of them ends by itself."""
    rows, tokens, mask = batch_of(tiny)
    output = tiny.bridge.generate(tokens, attention_mask=mask, verbose=False, stop_at_eos=False, **GREEDY)
    generated = output[:, tokens.shape[1] :].tolist()
    assert not any(EOS in ids for ids in generated)
    return rows, generated


def crossing(tiny: Tiny, inference: str = "score:max") -> tuple[ProbeWeights, int, int]:
    """A probe whose running score first crosses its threshold at a generated token of one row, with two or more to come, and
    nowhere else; with the row and the position."""
    rows, generated = free_run(tiny)
    for seed in range(400):
        probe = make_probe(seed=seed, inference=inference)
        highest = []
        for ids in [row + new[:-1] for row, new in zip(rows, generated, strict=True)]:
            running = expected_running(features_of(tiny, ids, probe), probe, ids)
            highest.append(running.logit() if "(" not in inference else running)
        tops = [values.nan_to_num(nan=-torch.inf).max() for values in highest]
        row = int(torch.stack(tops).argmax())
        at = int(highest[row].nan_to_num(nan=-torch.inf).argmax())
        before = [highest[row][:at], *(values for other, values in enumerate(highest) if other != row)]
        rest = torch.cat(before).nan_to_num(nan=-torch.inf).max()
        if len(rows[row]) < at < len(rows[row]) + NEW - 3 and highest[row][at] - rest > 0.02:
            return probe.with_threshold(float((highest[row][at] + rest) / 2), unit="logit"), row, at
    raise AssertionError("no seed gives such a probe")


# --- stop: the row ends in the step that sees the crossing ---

CALLS = {
    "generate": lambda model, *inputs, **options: model.generate(*inputs, verbose=False, **GREEDY, **options),
    "no cache": lambda model, *inputs, **options: model.generate(
        *inputs, use_past_kv_cache=False, verbose=False, **GREEDY, **options
    ),
    "stream": lambda model, *inputs, **options: torch.cat(
        list(model.generate_stream(*inputs, max_tokens_per_yield=1, verbose=False, **GREEDY, **options)), dim=1
    ),
    "hf": lambda model, *inputs, **options: model.hf_generate(*inputs, **GREEDY, **options),
    "hf chunks": lambda model, *inputs, **options: model.hf_generate(*inputs, prefill_chunk_size=3, **GREEDY, **options),
}


@pytest.mark.parametrize("way", CALLS)
def test_a_stop_acts_before_the_next_token_is_emitted(tiny: Tiny, way: str) -> None:
    probe, row, at = crossing(tiny)
    rows, free = free_run(tiny)
    _, tokens, mask = batch_of(tiny)
    with attach_probes(tiny.bridge, probe, stop=True) as monitor:
        output = CALLS[way](tiny.bridge, tokens, attention_mask=mask)
    generated = output[:, tokens.shape[1] :].tolist()
    kept = at + 1 - len(rows[row])
    assert 0 < kept < NEW - 1
    assert generated[row][:kept] == free[row][:kept]
    assert generated[row][kept] == EOS  # in the place of the token that was to follow
    assert set(generated[row][kept:]) <= {EOS, PAD}
    assert [ids for other, ids in enumerate(generated) if other != row] == [
        ids for other, ids in enumerate(free) if other != row
    ]
    assert [ids.tolist() for ids in monitor.tokens()][row] == rows[row] + free[row][:kept]
    assert [[alarm.position for alarm in found] for found in monitor.alarms()] == [
        [at] if other == row else [] for other in range(3)
    ]


def test_sampling_never_escapes_a_stop(llama: Tiny) -> None:
    always = make_probe().with_threshold(0.0)
    _, tokens, mask = batch_of(llama)
    torch.manual_seed(0)
    for temperature in (0.01, 1.0, 50.0):
        with attach_probes(llama.bridge, always, stop=True):
            output = llama.bridge.generate(
                tokens, attention_mask=mask, max_new_tokens=3, do_sample=True, temperature=temperature, verbose=False
            )
        assert output.shape[1] == tokens.shape[1] + 1
        assert (output[:, -1] == EOS).all()


def test_other_rows_sample_what_they_would_have_sampled(llama: Tiny) -> None:
    _, tokens, mask = batch_of(llama)

    def sampled(probe: ProbeWeights, **options: Any) -> tuple[list[list[int]], Tensor]:
        torch.manual_seed(5)
        with attach_probes(llama.bridge, probe, **options) as monitor:
            output = llama.bridge.generate(tokens, attention_mask=mask, max_new_tokens=NEW, temperature=0.7, verbose=False)
        return output[:, tokens.shape[1] :].tolist(), monitor.runs[-1].maxima("p", "logit")

    free, tops = sampled(make_probe(seed=2))
    second, first = tops.sort().values[1:].tolist()
    stopped, _ = sampled(make_probe(seed=2).with_threshold((first + second) / 2, unit="logit"), stop=True)
    assert [after == before for after, before in zip(stopped, free, strict=True)] == (tops < first).tolist()


def test_a_forbidden_eos_is_an_error_and_no_text_that_went_on(gpt2: Tiny) -> None:
    tokens = torch.tensor([[BOS, 40, 50, 60]])
    always = make_probe().with_threshold(0.0)
    with (
        pytest.raises(
            MonitorError,
            match=r"row 0 was to end at an alarm \(stop=True\).* another token in the place of .*min_new_tokens",
        ),
        attach_probes(gpt2.bridge, always, stop=True),
    ):
        gpt2.bridge.hf_generate(tokens, min_new_tokens=4, **GREEDY)


def test_a_stop_needs_an_end_of_sequence_token_and_a_threshold(gpt2: Tiny) -> None:
    three = make_probe(n_classes=3)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (
            make_probe(),
            {"stop": True, "eos_token_id": []},
            "ends a row by an end-of-sequence token, and this model has none",
        ),
        (three, {"stop": True}, "no attached probe has two classes"),
        (make_probe(), {"stop": "p"}, "stop is 'p'; expected True"),
        (make_probe(), {"escalate": 0.3}, "escalate is 0.3; expected an Escalate"),
        (make_probe(), {"escalate": {"q": Escalate(low=0.1)}}, r"by name of a probe with two classes: \['p'\]"),
        ([make_probe(), make_probe("q")], {"escalate": Escalate(low=0.1)}, "expected a dict by name"),
    ]
    for probes, options, message in cases:
        with pytest.raises(InputError, match=message), attach_probes(gpt2.bridge, probes, **options):
            pass


@pytest.mark.parametrize("inference", ["score:max", "score:ema_max(0.5)"])
@pytest.mark.parametrize("keep", [True, False])
def test_the_crossing_token_is_kept_or_dropped_as_asked(tiny: Tiny, keep: bool, inference: str) -> None:
    probe, row, at = crossing(tiny, inference)
    _, free = free_run(tiny)
    prompts = [torch.tensor(ids) for ids in batch_of(tiny)[0]]
    told: list[Alarm] = []
    results = monitored_generate(
        tiny.bridge, prompts, probe, stop=True, keep_crossing=keep, on_crossing=told.append, score_last_token=True, **GREEDY
    )
    result, prompt = results[row], prompts[row].tolist()
    assert result.tokens.tolist() == (prompt + free[row])[: at + keep]
    assert (result.stopped_by, len(result.scores["p"]), result.verdicts) == ("p", at + keep, {"p": "positive"})
    assert told == [result.alarms[0]]  # once, though the last tokens were scored by one more pass
    assert told[0].position == at
    others = [one for other, one in enumerate(results) if other != row]
    assert [one.verdicts["p"] for one in others] == ["negative"] * 2
    assert all(len(one.scores["p"]) == len(one.tokens) for one in others)


# --- callbacks and events ---


def test_a_crossing_is_told_when_it_happens_and_kept(gpt2: Tiny) -> None:
    probe, row, at = crossing(gpt2)
    rows, free = free_run(gpt2)
    _, tokens, mask = batch_of(gpt2)
    told: list[tuple[Alarm, int]] = []
    with attach_probes(
        gpt2.bridge, probe, on_crossing=lambda alarm: told.append((alarm, monitor.runs[-1].n_columns))
    ) as monitor:
        gpt2.bridge.generate(tokens, attention_mask=mask, verbose=False, **GREEDY)
    ((alarm, columns),) = told
    assert monitor.events == (alarm,)
    assert (alarm.probe, alarm.row, alarm.position, alarm.run) == ("p", row, at, 0)
    ids = rows[row] + free[row]
    assert alarm.token_id == ids[at]
    assert columns == tokens.shape[1] - len(rows[row]) + at + 1  # in the very step
    logits = probe.logits(features_of(gpt2, ids[:-1], probe))
    assert_same(torch.tensor([alarm.logit, alarm.score]), torch.stack([logits[at], logits[1 : at + 1].max()]))
    assert (alarm.threshold, alarm.unit, alarm.verdict) == (pytest.approx(probe.threshold.value), "logit", "positive")
    with pytest.raises(AttributeError):
        alarm.row = 3  # type: ignore[misc]


# --- cascades ---


def cascade(tiny: Tiny, **options: Any) -> tuple[ProbeWeights, Escalate, list[Tensor]]:
    """A probe with a low threshold that two of three rows reach, and a high one that none does."""
    rows, generated = free_run(tiny)
    probe = make_probe(seed=1)
    running = []
    for ids in [row + new[:-1] for row, new in zip(rows, generated, strict=True)]:
        running.append(expected_running(features_of(tiny, ids, probe), probe, ids).logit())
    tops = torch.stack([values[1:].max() for values in running]).sort().values
    low, high = float((tops[0] + tops[1]) / 2), float(tops[2] + 1)
    return probe, Escalate(low=low, high=high, unit="logit", **options), running


def test_a_cascade_tells_clear_deferred_and_positive_apart(tiny: Tiny) -> None:
    probe, escalate, running = cascade(tiny)
    _, tokens, mask = batch_of(tiny)
    told: list[Alarm] = []

    def verdicts(cascade: Escalate, **options: Any) -> list[str]:
        told.clear()
        with attach_probes(tiny.bridge, probe, escalate=cascade, on_crossing=told.append, **options) as monitor:
            tiny.bridge.generate(tokens, attention_mask=mask, verbose=False, **GREEDY)
        assert monitor.events == tuple(told)
        return monitor.runs[-1].verdicts("p")

    deferred = [bool(values[1:].max() >= escalate.low) for values in running]
    assert sorted(deferred) == [False, True, True]
    assert verdicts(escalate, stop=True) == ["deferred" if one else "negative" for one in deferred]
    for alarm in told:
        assert alarm.position == int((running[alarm.row] >= escalate.low).int().argmax())
        assert not alarm.is_positive
    top = max(range(3), key=lambda row: float(running[row][1:].max()))
    reached = Escalate(low=escalate.low, high=escalate.high - 1.01, unit="logit")
    found = verdicts(reached)
    assert found[top] == "positive"
    assert [one for row, one in enumerate(found) if row != top] == [
        "deferred" if deferred[row] else "negative" for row in range(3) if row != top
    ]


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_a_judge_confirms_or_clears_what_was_deferred(llama: Tiny, use_past_kv_cache: bool) -> None:
    rows, free = free_run(llama)
    _, tokens, mask = batch_of(llama)
    asked: list[tuple[Alarm, list[int]]] = []

    def judge(alarm: Alarm, ids: Tensor) -> bool:
        asked.append((alarm, ids.tolist()))
        return alarm.row == sorted(one.row for one, _ in asked)[-1] and alarm.row != 0

    probe, escalate, running = cascade(llama, judge=judge)
    deferred = [row for row, values in enumerate(running) if values[1:].max() >= escalate.low]
    with attach_probes(llama.bridge, probe, escalate={"p": escalate}, stop=True) as monitor:
        output = llama.bridge.generate(
            tokens, attention_mask=mask, use_past_kv_cache=use_past_kv_cache, verbose=False, **GREEDY
        )
    generated = output[:, tokens.shape[1] :].tolist()
    assert sorted(alarm.row for alarm, _ in asked) == deferred
    verdicts = monitor.runs[-1].verdicts("p")
    for alarm, ids in asked:
        at = int((running[alarm.row] >= escalate.low).int().argmax())
        assert (alarm.verdict, alarm.position) == ("deferred", at)
        assert ids[: at + 1] == (rows[alarm.row] + free[alarm.row])[: at + 1]
        new = max(0, at + 1 - len(rows[alarm.row]))
        if verdicts[alarm.row] == "confirmed":
            assert generated[alarm.row][new : new + 1] == [EOS]
            assert [one.verdict for one in monitor.alarms()[alarm.row]] == ["confirmed"]
        else:
            assert verdicts[alarm.row] == "cleared"
            assert EOS not in generated[alarm.row]
            assert monitor.alarms()[alarm.row] == ()
    assert [event.verdict for event in monitor.events] == [verdicts[event.row] for event in monitor.events]


def test_a_cascade_is_checked_when_it_is_made() -> None:
    for options, message in (
        ({"low": 0.5, "high": 0.4}, "low is 0.5 and high 0.4; expected low < high"),
        ({"low": 1.5}, "low: value is 1.5; expected a probability"),
        ({"low": 0.1, "unit": "nats"}, "unit is 'nats'"),
        ({"low": 0.1, "judge": "me"}, "judge is 'me'; expected a function"),
    ):
        with pytest.raises(InputError, match=message):
            Escalate(**options)  # type: ignore[arg-type]


# --- without scores of single tokens ---


def test_runs_without_scores_raise_the_same_alarms(tiny: Tiny) -> None:
    probes = [crossing(tiny)[0], make_probe("mean", inference="score:mean", seed=3), make_probe("three", n_classes=3)]
    _, tokens, mask = batch_of(tiny)
    found = []
    for keep_scores in (True, False):
        with attach_probes(tiny.bridge, probes, keep_scores=keep_scores) as monitor:
            tiny.bridge.generate(tokens, attention_mask=mask, verbose=False, **GREEDY)
        run = monitor.runs[-1]
        found.append((monitor.events, monitor.alarms(), [ids.tolist() for ids in monitor.tokens()]))
        maxima = [run.maxima(name, unit).tolist() for name in ("p", "mean") for unit in (None, "logit", "probability")]
        found[-1] += (maxima,)
    assert found[0] == found[1]
    assert found[0][0]
    for read in (monitor.token_scores, monitor.running_scores):
        with pytest.raises(MonitorError, match="keep_scores=False"):
            read("p")
    with pytest.raises(InputError, match="a maximum needs two"):
        run.maxima("three")


def test_the_maximum_is_the_highest_running_score(tiny: Tiny) -> None:
    _, tokens, mask = batch_of(tiny)
    for inference in ("score:max", "score:mean", "mean", "last_token", "score:ema_max(0.3)", "score:min"):
        probe = make_probe(inference=inference)
        with attach_probes(tiny.bridge, probe) as monitor:
            tiny.bridge.generate(tokens, attention_mask=mask, verbose=False, **GREEDY)
        run = monitor.runs[-1]
        for unit in (None, "logit", "probability"):
            highest = torch.stack([row[~row.isnan()].max() for row in run.running_scores("p", unit)])
            assert_same(run.maxima("p", unit), highest)
