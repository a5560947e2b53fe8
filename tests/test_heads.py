"""Heads: each kind against a plain loop, and its online form against its batch form under chunks, gaps and batch mates."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_tl.heads import LinearHead, ReadoutHead, SequenceHead, polynomial_orders
from lmprobe_tl.online import OnlineReduction

HEADS = [
    SequenceHead("attention", 1),
    SequenceHead("attention", 3),
    SequenceHead("multimax", 1),
    SequenceHead("multimax", 4),
    SequenceHead("rolling_attention", 2, window=1),
    SequenceHead("rolling_attention", 3, window=4),
    SequenceHead("rolling_attention", 1, window=50),
]


def attention(queries, values):
    """queries, values: per token a list over heads."""
    total = 0.0
    for head in range(len(values[0])):
        weights = [math.exp(query[head]) for query in queries]
        total += sum(w * value[head] for w, value in zip(weights, values, strict=True)) / sum(weights)
    return total


def by_hand(head, tokens):
    """tokens: readings of one probe, a list a token."""
    if head.kind == "multimax":
        return sum(max(token[h] for token in tokens) for h in range(head.n_heads))
    queries = [token[: head.n_heads] for token in tokens]
    values = [token[head.n_heads :] for token in tokens]
    n, window = len(tokens), head.window
    if window is None or n < window:
        return attention(queries, values)
    starts = range(n - window + 1)
    return max(attention(queries[at : at + window], values[at : at + window]) for at in starts)


def make_stream(seed, *, batch, pos, n, scale):
    generator = torch.Generator().manual_seed(seed)
    readings = torch.randn(batch, pos, n, generator=generator) * scale
    counted = torch.rand(batch, pos, generator=generator) < 0.7
    counted[torch.arange(batch), torch.randint(pos, (batch,), generator=generator)] = True
    return readings, counted


@pytest.mark.parametrize("head", HEADS, ids=str)
@given(
    seed=st.integers(0, 10_000), pos=st.integers(1, 15), n_probes=st.integers(1, 3), scale=st.sampled_from([0.1, 1.0, 20.0])
)
@settings(max_examples=15, deadline=None)
def test_batch_and_online_forms_equal_the_plain_loop(head, seed, pos, n_probes, scale):
    readings, counted = make_stream(seed, batch=3, pos=pos, n=n_probes * head.n_readings, scale=scale)
    expected = torch.full((3, pos, n_probes), torch.nan)
    for row in range(3):
        for at in range(pos):
            kept = readings[row, : at + 1][counted[row, : at + 1]].double()
            for probe in range(n_probes if len(kept) else 0):
                mine = kept[:, probe * head.n_readings : (probe + 1) * head.n_readings]
                expected[row, at, probe] = by_hand(head, mine.tolist())

    zeroed = torch.where(counted[..., None], readings.double(), 0.0)
    whole = head.batch(zeroed, counted[..., None])
    torch.testing.assert_close(whole.float(), expected[:, -1], rtol=1e-5, atol=1e-5)

    junk = readings.masked_fill(~counted[..., None], torch.nan)
    cuts = sorted({0, pos, *torch.randint(pos + 1, (4,), generator=torch.Generator().manual_seed(seed)).tolist()})
    for edges in (cuts, range(pos + 1), [0, pos]):
        online = OnlineReduction(head.start, head.step, (), 3, n_probes * head.n_readings, "cpu", n_scores=n_probes)
        running = [online.update(junk[:, start:stop], counted[:, start:stop]) for start, stop in pairwise(edges)]
        torch.testing.assert_close(torch.cat(running, dim=1), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_one_token_alone_has_its_token_logit(head):
    readings = torch.randn(5, 1, 2 * head.n_readings, dtype=torch.float64)
    alone = head.batch(readings, torch.ones(5, 1, 1, dtype=torch.bool))
    torch.testing.assert_close(head.token_logits(readings)[:, 0], alone)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_long_chunks_are_worked_on_in_blocks_that_change_nothing(head, monkeypatch):
    monkeypatch.setattr("lmprobe_tl.online.BLOCK_SCORES", 40)
    readings, counted = make_stream(0, batch=2, pos=300, n=head.n_readings, scale=1.0)
    online = OnlineReduction(head.start, head.step, (), 2, head.n_readings, "cpu", n_scores=1)
    running = online.update(readings, counted)
    whole = head.batch(torch.where(counted[..., None], readings.double(), 0.0), counted[..., None])
    torch.testing.assert_close(running[:, -1], whole.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_rows_can_come_and_go(head):
    """As in an engine: rows step at their own times, and a new request takes a row that another had."""
    readings, counted = make_stream(3, batch=4, pos=9, n=head.n_readings, scale=1.0)
    online = OnlineReduction(head.start, head.step, (), 2, head.n_readings, "cpu", n_scores=1)
    online.grow(4)
    online.update_rows(torch.tensor([2]), readings[:1] * 9, counted[:1])
    online.reset_rows(torch.tensor([2]))
    online.update_rows(torch.tensor([3, 0]), readings[[3, 0], :4], counted[[3, 0], :4])
    online.update_rows(torch.tensor([0, 2]), readings[[0, 2], 4:4].new_zeros(2, 1, head.n_readings), torch.zeros(2, 1) > 0)
    online.update_rows(torch.tensor([2]), readings[2:3], counted[2:3])
    ends = online.update_rows(torch.tensor([0, 3]), readings[[0, 3], 4:], counted[[0, 3], 4:])
    whole = head.batch(torch.where(counted[..., None], readings.double(), 0.0), counted[..., None]).float()
    torch.testing.assert_close(ends[:, -1], whole[[0, 3]], rtol=1e-5, atol=1e-5)


def test_linear_head_hands_its_readings_on():
    readings = torch.randn(2, 5, 3)
    head = LinearHead(3)
    assert head.n_readings == 3
    assert head.token_logits(readings) is readings


def test_mlp_and_polynomial_equal_their_formulas():
    generator = torch.Generator().manual_seed(0)
    readings = torch.randn(2, 7, 5, generator=generator)
    readout, intercept = torch.randn(2, 5, generator=generator), torch.randn(2, generator=generator)
    mlp = ReadoutHead(2, readout, intercept).token_logits(readings)
    orders = polynomial_orders(degree=3, rank=2)
    assert orders.tolist() == [1, 2, 2, 3, 3]
    polynomial = ReadoutHead(2, readout, intercept, orders).token_logits(readings)
    for row in range(2):
        for at in range(7):
            for output in range(2):
                mine = readings[row, at].tolist()
                weights, bias = readout[output].tolist(), intercept[output].item()
                relu = sum(w * max(x, 0) for w, x in zip(weights, mine, strict=True)) + bias
                powers = sum(w * x**order for w, x, order in zip(weights, mine, (1, 2, 2, 3, 3), strict=True)) + bias
                assert mlp[row, at, output].item() == pytest.approx(relu, abs=1e-5)
                assert polynomial[row, at, output].item() == pytest.approx(powers, abs=1e-5)


def test_powers_beyond_float32_saturate_and_keep_their_sign():
    head = ReadoutHead(1, torch.tensor([[0.0, 1.0, -2.0]]), torch.zeros(1), torch.tensor([1, 3, 3]))
    readings = torch.tensor([[0.0, 1e14, 0.0], [0.0, -1e14, 0.0], [0.0, 0.0, 1e14], [0.0, 1e14, 1e14], [0.0, 1e12, 1e12]])
    highest = torch.finfo(torch.float32).max
    assert head.token_logits(readings)[:4, 0].tolist() == [highest, -highest, -highest, -highest]
    assert head.token_logits(readings)[4].item() == pytest.approx(-1e36, rel=1e-6)


@pytest.mark.parametrize(
    "head",
    [
        ReadoutHead(1, torch.tensor([[1.0, 0.0]]), torch.zeros(1)),
        ReadoutHead(1, torch.tensor([[0.0, 0.0]]), torch.zeros(1), torch.tensor([1, 2])),
        SequenceHead("attention", 1),
        SequenceHead("rolling_attention", 1, window=3),
    ],
    ids=["mlp", "polynomial", "attention", "rolling_attention"],
)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_readings_that_are_not_finite_have_no_logit(head, bad):
    """relu(-inf) is 0, and the token logit of attention has no query in it: such readings must show all the same."""
    for place in range(2):
        readings = torch.ones(2, 2)
        readings[1, place] = bad
        assert head.token_logits(readings)[:, 0].isfinite().tolist() == [True, False]


def test_autocast_narrows_no_readout_where_the_wide_dtype_is_float32(monkeypatch):
    """As on MPS, which has no float64."""
    monkeypatch.setattr("lmprobe_tl.heads.wide_dtype", lambda device: torch.float32)
    generator = torch.Generator().manual_seed(0)
    readings, readout = torch.randn(4, 5, generator=generator), torch.randn(1, 5, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ReadoutHead(1, readout, torch.zeros(1)).token_logits(readings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, readings.relu() @ readout.T)
