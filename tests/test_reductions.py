"""Laws of the reductions: batch equals a plain loop, stream equals batch, and windows see what a mean dilutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lmprobe_tl import online as online_module
from lmprobe_tl.errors import EmptyMaskError, InputError
from lmprobe_tl.online import OnlineReduction
from lmprobe_tl.pooling import parse_pooling_strategy, pool_mean, reduce_scores
from lmprobe_tl.reductions import REDUCTIONS, make_online, reduce_batch

Case = tuple[str, float | None]
quick = settings(deadline=None, max_examples=25)
BASE = ["last_token", "first_token", "mean", "max", "min"]
CASES: list[Case] = [
    *((name, None) for name in BASE),
    *(("ema_max", alpha) for alpha in (0.001, 0.5, 1)),
    *(("rolling_max", window) for window in (1, 3, 100)),
    *(("softmax", temperature) for temperature in (0.01, 1, 5)),
]
by_case = pytest.mark.parametrize(("name", "parameter"), CASES)


def loop(name: str, parameter: float | None, z: Sequence[float]) -> float:
    """Each reduction as one reads it aloud, in plain Python."""
    if name == "ema_max":
        averages = [z[0]]
        for value in z[1:]:
            averages.append(parameter * value + (1 - parameter) * averages[-1])
        return max(averages)
    if name == "rolling_max":
        starts = range(max(1, len(z) - parameter + 1))
        windows = [z[start : start + parameter] for start in starts]
        return max(math.fsum(window) / len(window) for window in windows)
    if name == "softmax":
        top = max(z)
        weights = [math.exp((value - top) / parameter) for value in z]
        return math.fsum(w * value for w, value in zip(weights, z, strict=True)) / math.fsum(weights)
    simple = {"last_token": z[-1], "first_token": z[0], "mean": math.fsum(z) / len(z), "max": max(z), "min": min(z)}
    return simple[name]


@st.composite
def streams(draw: st.DrawFn, may_be_empty: bool) -> tuple[Tensor, Tensor]:
    """scores [batch pos probes] with junk wherever counted [batch pos] is False."""
    batch, pos, probes = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    rows = st.lists(st.booleans(), min_size=pos, max_size=pos)
    counted = torch.tensor([draw(rows if may_be_empty else rows.filter(any)) for _ in range(batch)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scale, shift = draw(st.sampled_from([0.1, 1.0, 30.0])), draw(st.sampled_from([-50.0, 0.0, 50.0]))
    scores = torch.randn(batch, pos, probes, generator=generator) * scale + shift
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    scores = scores.to(dtype)
    junk = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e4]))
    return scores.masked_fill(~counted[..., None], junk), counted


def chunks(draw: st.DrawFn, length: int) -> list[slice]:
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))  # equal cuts make empty chunks
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5, equal_nan=True)


@by_case
@quick
@given(stream=streams(may_be_empty=False))
def test_batch_form_is_the_loop_over_what_counts(name: str, parameter: float | None, stream: tuple[Tensor, Tensor]) -> None:
    scores, counted = stream
    scores.requires_grad_()
    reduced = reduce_batch(scores, name, parameter, counted)
    for row in range(len(scores)):
        for probe in range(scores.shape[2]):
            expected = loop(name, parameter, scores[row, counted[row], probe].tolist())
            close(reduced[row, probe].detach(), torch.tensor(expected, dtype=torch.float64))
            alone = reduce_batch(scores[..., probe], name, parameter, counted)
            torch.testing.assert_close(alone, reduced[:, probe], rtol=1e-6, atol=1e-6)
    reduced.sum().backward()
    assert scores.grad is not None
    assert (scores.grad[~counted] == 0).all()
    assert scores.grad.isfinite().all()
    assert scores.grad.any()


@by_case
@quick
@given(data=st.data(), stream=streams(may_be_empty=True))
def test_every_running_score_is_the_batch_form_of_its_prefix(
    name: str, parameter: float | None, data: st.DataObject, stream: tuple[Tensor, Tensor]
) -> None:
    scores, counted = stream
    parts = data.draw(st.composite(chunks)(scores.shape[1]))
    with pytest.MonkeyPatch.context() as patch:  # long chunks are worked on in blocks: here of 1 or 3 positions, or whole
        patch.setattr(
            online_module, "BLOCK_SCORES", data.draw(st.sampled_from([1, 3, 2**18])) * len(scores) * scores.shape[2]
        )
        online = make_online(name, parameter, len(scores), scores.shape[2])
    running = torch.cat([online.update(scores[:, part], counted[:, part]) for part in parts], dim=1)
    assert (running.dtype, running.shape) == (torch.float32, scores.shape)
    for row in range(len(scores)):
        for end in range(1, scores.shape[1] + 1):
            prefix = scores[row : row + 1, :end], counted[row : row + 1, :end]
            nothing_yet = torch.full((scores.shape[2],), torch.nan)
            expected = reduce_batch(prefix[0], name, parameter, prefix[1])[0] if prefix[1].any() else nothing_yet
            close(running[row, end - 1], expected)
            if end > 1 and not counted[row, end - 1]:
                assert torch.equal(running[row, end - 1].nan_to_num(), running[row, end - 2].nan_to_num())


@by_case
def test_long_streams_stay_exact(name: str, parameter: float | None) -> None:
    """100,000 tokens at a level of 30: float32 sums grown token by token lose the fourth digit here."""
    length, start = 100_000, 99_000
    z = torch.randn(1, length, 1, generator=torch.Generator().manual_seed(0)) + 30
    counted = torch.ones(1, length, dtype=torch.bool)
    expected = torch.tensor(loop(name, parameter, z.flatten().tolist()), dtype=torch.float64)
    close(reduce_batch(z[..., 0], name, parameter), expected[None])
    online = make_online(name, parameter, 1, 1)
    for part in [slice(i, i + 500) for i in range(0, start, 500)] + [slice(i, i + 1) for i in range(start, length)]:
        running = online.update(z[:, part], counted[:, part])
    torch.testing.assert_close(running[0, -1, 0].double(), expected, rtol=2e-7, atol=0)


@by_case
@quick
@given(stream=streams(may_be_empty=False), constant=st.sampled_from([-1000.0, -3.7, 0.25, 1000.0]))
def test_a_constant_passes_through(
    name: str, parameter: float | None, stream: tuple[Tensor, Tensor], constant: float
) -> None:
    """reduce(z + c) = reduce(z) + c, in both forms: no score depends on the intercept but by the intercept."""
    scores, counted = stream[0].double(), stream[1]
    expected = reduce_batch(scores, name, parameter, counted) + constant
    close(reduce_batch(scores + constant, name, parameter, counted), expected)
    running = make_online(name, parameter, len(scores), scores.shape[2]).update(scores + constant, counted)
    close(running[:, -1], expected)


def test_a_clear_negative_does_not_rise_at_its_first_token() -> None:
    running = make_online("ema_max", 0.5, 1, 1).update(torch.full((1, 3, 1), -8.0), torch.ones(1, 3, dtype=torch.bool))
    assert running.flatten().tolist() == [-8.0, -8.0, -8.0]  # from 0 it would begin at -4


MONOTONE = [case for case in CASES if case[0] != "softmax"]


@pytest.mark.parametrize(("name", "parameter"), MONOTONE)
@quick
@given(data=st.data(), stream=streams(may_be_empty=False))
def test_a_raised_logit_never_lowers_the_score(
    name: str, parameter: float | None, data: st.DataObject, stream: tuple[Tensor, Tensor]
) -> None:
    scores, counted = stream[0].double(), stream[1]
    raised = scores.clone()
    raised[:, data.draw(st.integers(0, scores.shape[1] - 1))] += data.draw(st.sampled_from([0.1, 5.0, 500.0]))
    risen = reduce_batch(raised, name, parameter, counted) - reduce_batch(scores, name, parameter, counted)
    assert (risen >= -1e-9).all()
    running = [make_online(name, parameter, len(z), z.shape[2]).update(z, counted)[:, -1] for z in (scores, raised)]
    assert (running[1] >= running[0] - 1e-4).all()  # float32 at a score of 500


def test_softmax_is_no_monotone_reduction() -> None:
    """The control: a raised logit can take weight from a higher one."""
    low, raised = torch.tensor([[10.0, -20.0]]), torch.tensor([[10.0, 7.0]])
    assert reduce_batch(raised, "softmax", 5) < reduce_batch(low, "softmax", 5) - 0.4


@pytest.mark.parametrize("window", [2, 3, 10])
@pytest.mark.parametrize("chunk", [1, 2, 7, 60])
@pytest.mark.parametrize("gone", [-1e25, -math.inf])
def test_a_value_that_left_its_window_is_not_felt(window: int, chunk: int, gone: float) -> None:
    """A sum kept up by differences loses every digit to it, for good."""
    z = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    z[3], z[21] = gone, gone
    expected = [loop("rolling_max", window, z[: end + 1]) for end in range(60)]
    scores, counted = torch.tensor(z, dtype=torch.float64).reshape(1, 60, 1), torch.ones(1, 60, dtype=torch.bool)
    online = make_online("rolling_max", window, 1, 1)
    running = torch.cat(
        [online.update(scores[:, at : at + chunk], counted[:, at : at + chunk]) for at in range(0, 60, chunk)], 1
    )
    close(running.flatten(), torch.tensor(expected, dtype=torch.float64))
    close(reduce_batch(scores[..., 0], "rolling_max", window), torch.tensor(expected[-1:]))


STATE_BYTES = {"last_token": 4, "first_token": 4, "mean": 8, "max": 4, "min": 4, "ema_max": 16, "softmax": 16}


@by_case
def test_the_state_does_not_grow(name: str, parameter: float | None) -> None:
    """Neither in what it holds nor in what it keeps from being freed, such as the chunk that a slice looks into."""
    n_rows, n_probes = 3, 5
    online = make_online(name, parameter, n_rows, n_probes)
    expected = 8 * (parameter + 2) if name == "rolling_max" else STATE_BYTES[name]
    for length in (0, 1, 1, 7, 3000, 1, 2, 1):
        online.update(torch.zeros(n_rows, length, n_probes), torch.ones(n_rows, length, dtype=torch.bool))
        assert online.state_bytes == expected
        assert online._seen.untyped_storage().nbytes() == 8 * n_rows


@pytest.mark.parametrize(("state_length", "expected"), [(1, [187] * 5 + [65]), (600, [600, 400])])
def test_long_chunks_are_worked_on_in_blocks(state_length: int, expected: list[int]) -> None:
    """2^18 scores are 187 positions of 2 rows and 700 probes; a block is no shorter than the state, which each one turns."""
    lengths = []

    def step(state: tuple[Tensor, ...], z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        lengths.append(z.shape[1])
        return z, state

    online = OnlineReduction(lambda zero: (zero.new_zeros(2, state_length, 700),), step, (), 2, 700, "cpu")
    scores = torch.randn(2, 1000, 700)
    assert torch.equal(online.update(scores, torch.ones(2, 1000, dtype=torch.bool)), scores)
    assert lengths == expected


@by_case
def test_inference_mode_may_come_and_go(name: str, parameter: float | None) -> None:
    """Generation runs in it; what reads scores afterwards, and brings them up to date, does not."""
    scores = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(2, 12, dtype=torch.bool)
    expected = make_online(name, parameter, 2, 3).update(scores, counted)
    for first in (0, 1):
        with torch.inference_mode() if first else nullcontext():
            online = make_online(name, parameter, 2, 3)
        found = []
        for index, part in enumerate([slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 9), slice(9, 10), slice(10, 12)]):
            with torch.inference_mode() if index % 2 == first else nullcontext():
                found.append(online.update(scores[:, part], counted[:, part]).clone())
        close(torch.cat(found, dim=1), expected)


def test_mean_of_a_stream_token_by_token() -> None:
    value = torch.tensor([[[0.1]]])
    online = make_online("mean", None, 1, 1)
    naive = torch.tensor(0.0)
    for _ in range(5000):
        running = online.update(value, torch.tensor([[True]]))
        naive = naive + value
    assert running.item() == value.item()
    assert abs(naive.item() / 5000 - value.item()) > 1e-6  # the control: a float32 sum is off


@by_case
def test_updates_never_wait_for_the_device(name: str, parameter: float | None) -> None:
    """On the meta device nothing has a value, so any branch on a value, and any copy to the host, is an error."""
    online = make_online(name, parameter, 2, 3, "meta")
    for new in (5, 1, 0, 2):
        running = online.update(torch.zeros(2, new, 3, device="meta"), torch.ones(2, new, dtype=torch.bool, device="meta"))
        assert running.shape == (2, new, 3)
    with pytest.raises((NotImplementedError, RuntimeError)):
        running.sum().item()  # the control


def test_streams_keep_no_graph() -> None:
    scores = torch.zeros(1, 2, 1, requires_grad=True)
    assert not make_online("mean", None, 1, 1).update(scores, torch.tensor([[True, True]])).requires_grad


def test_wrong_updates_and_names_are_refused() -> None:
    online = make_online("rolling_max", 3, 2, 4)
    counted = torch.ones(2, 5, dtype=torch.bool)
    for scores in (torch.zeros(2, 5), torch.zeros(3, 5, 4), torch.zeros(2, 5, 3), torch.zeros(2, 5, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match="batch=2 and n_probes=4"):
            online.update(scores, counted)
    for mask in (counted.float(), counted[:, :4]):
        with pytest.raises(InputError, match=r"counted must be bool \[batch new\] = \[2, 5\]"):
            online.update(torch.zeros(2, 5, 4), mask)
    assert online.update(torch.zeros(2, 5, 4), counted).eq(0).all()  # the control: nothing of these reached the state
    with pytest.raises(InputError, match=r"Unknown reduction 'median'\. All names: last_token"):
        make_online("median", None, 1, 1)
    for name, parameter in [("max", 2), ("ema_max", None), ("ema_max", True), ("rolling_max", 2.0), ("softmax", "1")]:
        with pytest.raises(InputError, match=f"Reduction '{name}'"):
            make_online(name, parameter, 1, 1)  # type: ignore[arg-type]
    for temperature in (1e-10, 1e-320, math.inf):
        with pytest.raises(InputError, match="expected a finite number, 1e-09 or more"):
            make_online("softmax", temperature, 1, 1)
    for window in (2**18 + 1, 2**62, 10**30):  # before memory for it is asked for
        with pytest.raises(InputError, match="expected a whole number of tokens, from 1 to 262144"):
            make_online("rolling_max", window, 1, 1)


def test_the_lowest_temperature_takes_the_highest_logits() -> None:
    """Below it the quotient of logit and temperature would be infinite, and the score NaN, which raises no alarm."""
    logits = torch.tensor([[[3e38], [-3e38], [1e38]]])
    running = make_online("softmax", 1e-9, 1, 1).update(logits, torch.ones(1, 3, dtype=torch.bool))
    assert running.flatten().tolist() == [logits[0, 0].item()] * 3
    assert torch.equal(reduce_batch(logits, "softmax", 1e-9), logits[:, 0])


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, dtype=torch.int64), [[0.5]]])
def test_scores_are_float_tensors(scores: object) -> None:
    with pytest.raises(InputError, match="scores must be"):
        reduce_scores(scores, "mean")  # type: ignore[arg-type]


def test_score_mean_is_not_mean() -> None:
    x = torch.tensor([[[0.0], [3.0]]])  # the probe has w=2, b=0
    assert reduce_scores(torch.sigmoid(2 * x[..., 0]), "score:mean").item() == pytest.approx(0.7488, abs=5e-5)
    assert torch.sigmoid(2 * pool_mean(x)).item() == pytest.approx(0.9526, abs=5e-5)


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("n_classes", [2, 3, 5])
@quick
@given(seed=st.integers(0, 10**6))
def test_class_rows_sum_to_one(name: str, n_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 6, n_classes, generator=generator).mul(4).softmax(dim=-1)
    mask = torch.rand(3, 6, generator=generator) < 0.5
    mask[:, 2] = True
    reduced = reduce_scores(scores.masked_fill(~mask[..., None], torch.nan), f"score:{name}", mask)
    close(reduced.sum(dim=-1), torch.ones(3))
    each = torch.stack([reduce_batch(scores[..., c], name, None, mask) for c in range(n_classes)], dim=-1)
    if n_classes == 2:
        close(reduced[:, 1], each[:, 1])  # the positive class is what is reduced
    else:
        close(reduced, each / each.sum(dim=-1, keepdim=True))


def test_one_loud_token_wins_over_a_confident_negative() -> None:
    scores = torch.tensor([[[1.0, 0.0], [0.01, 0.99]]])  # class-wise maxima would be (1, .99): negative
    close(reduce_scores(scores, "max"), torch.tensor([[0.01, 0.99]]))


def test_min_where_no_class_keeps_probability() -> None:
    close(reduce_scores(torch.eye(3)[None], "min"), torch.full((1, 3), 1 / 3))


def test_what_reduce_scores_refuses() -> None:
    probabilities = torch.full((1, 2, 3), 1 / 3)
    for strategy in ("score:ema_max(0.5)", "rolling_max(2)", "softmax(1)"):
        assert reduce_scores(probabilities[..., 0], strategy).shape == (1,)  # the control
        with pytest.raises(InputError, match=r"takes logits \[batch pos\], got shape \[1, 2, 3\]"):
            reduce_scores(probabilities, strategy)
    with pytest.raises(InputError, match="fewer than 2 classes"):
        reduce_scores(probabilities[..., :1], "max")
    for strategy, text in {"activation:max": "pools activations", "all": "nothing to reduce", "mex": "'score:max'"}.items():
        with pytest.raises(InputError, match=text):
            reduce_scores(probabilities, strategy)
    with pytest.raises(EmptyMaskError, match=r"\[0\]"):
        reduce_scores(probabilities, "max", torch.zeros(1, 2))


def test_score_dtypes() -> None:
    for dtype, wanted in {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}.items():
        assert all(reduce_batch(torch.zeros(1, 2, dtype=dtype), *case).dtype == wanted for case in CASES)


def test_every_reduction_is_tested() -> None:
    assert {name for name, _ in CASES} == set(REDUCTIONS)


SIGNAL, SHIFT = 10, 1.5  # tokens, and standard deviations of the noise
# AUROC by simulation, standard errors up to 0.0025: 100,000 texts with the signal and as many without at 64 tokens, 60,000
# at 512, 24,000 at 4096. For 'mean' and 'max' there are formulas.
DILUTION = {
    64: {"ema_max(0.5)": 0.950, "rolling_max(10)": 0.996, "softmax(1)": 0.935},
    512: {"ema_max(0.5)": 0.869, "rolling_max(10)": 0.978, "softmax(1)": 0.777},
    4096: {"ema_max(0.5)": 0.739, "rolling_max(10)": 0.937, "softmax(1)": 0.620},
}


def mean_auroc(pos: int) -> float:
    """Sums of `pos` logits are N(0, pos), or N(k m, pos) with the signal."""
    return float(norm.cdf(SIGNAL * SHIFT / math.sqrt(2 * pos)))


def max_auroc(pos: int) -> float:
    """The maximum has the product of the tokens' distributions; integrated numerically."""
    x = np.linspace(-8, 12, 20_001)
    noise, signal = norm.cdf(x) ** pos, norm.cdf(x) ** (pos - SIGNAL) * norm.cdf(x - SHIFT) ** SIGNAL
    return float(trapezoid(noise, signal))


def standard_error(auroc: float, n: int) -> float:
    """Of an AUROC of n positives and n negatives (Hanley and McNeil 1982)."""
    both_positive, both_negative = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = (n - 1) * (both_positive + both_negative - 2 * auroc**2)
    return math.sqrt((auroc * (1 - auroc) + spread) / n**2)


@pytest.mark.parametrize(("pos", "n"), [(64, 2000), (512, 2000), (4096, 500)])
def test_windows_see_what_a_mean_dilutes(pos: int, n: int) -> None:
    """10 tokens of signal among 64, 512 or 4096: the AUROC of each reduction, within 3 standard errors."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2 * n, pos, generator=generator)
    start = torch.randint(0, pos - SIGNAL + 1, (n, 1), generator=generator)
    z[torch.arange(n)[:, None], start + torch.arange(SIGNAL)] += SHIFT
    labels = [1] * n + [0] * n
    table = {"mean": mean_auroc(pos), "max": max_auroc(pos), **DILUTION[pos]}
    found = {}
    for strategy, expected in table.items():
        scores = reduce_scores(z, strategy)
        found[strategy] = roc_auc_score(labels, scores)
        assert found[strategy] == pytest.approx(expected, abs=3 * standard_error(expected, n)), strategy
        if pos == 512:
            parsed = parse_pooling_strategy(f"score:{strategy}")
            online = make_online(parsed.base_strategy, parsed.parameter, 2 * n, 1)
            running = online.update(z[..., None], torch.ones(2 * n, pos, dtype=torch.bool))[:, -1, 0]
            close(running, scores)
            assert roc_auc_score(labels, running) == pytest.approx(found[strategy], abs=1e-4)
    assert found["rolling_max(10)"] > found["ema_max(0.5)"] > found["softmax(1)"] > found["mean"]
