"""The tables that an engine's scores are kept in, against plain dicts; running scores of rows that come and go, against each
row alone; and what of the probes is compiled in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from engine_plan import the_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_tl.errors import EngineError, IncompatibleProbeError, InputError
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.online import OnlineReduction
from lmprobe_tl.probe_spec import HeadRecord, PoolingRecord, ProbeSpec
from lmprobe_tl.reductions import REDUCTIONS, make_online
from lmprobe_tl.vllm.pages import PAGE, Pages
from lmprobe_tl.vllm.running import RunningScores
from lmprobe_tl.vllm.slots import SlotCache
from lmprobe_tl.vllm.structure import ResidualPoint, Structure
from lmprobe_tl.weights import ProbeWeights

ONLINE = {name: (r.parameter.examples[-1] if r.parameter else None) for name, r in REDUCTIONS.items()}

tokens_at = st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 7, PAGE - 1, PAGE, 3 * PAGE + 2, 6 * PAGE]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.lists(tokens_at, min_size=1, max_size=9), st.integers(0, 5)), max_size=12))
def test_pages_are_a_dict_of_row_and_position(acts: list[list[tuple[int, int]] | int]) -> None:
    pages, held = Pages(2), dict[tuple[int, int], float]()
    for number, act in enumerate(acts):
        if isinstance(act, int):
            pages.free(act)
            held = {key: value for key, value in held.items() if key[0] != act}
        else:
            keys = list(dict.fromkeys(act))
            rows, positions = np.array(keys).T
            values = np.array([[100.0 * number + at, -at] for at in range(len(keys))], dtype=np.float32)
            pages.write(rows, positions, values)
            held |= dict(zip(keys, values[:, 0].tolist(), strict=True))
        for row in range(7):  # one more than there is
            found = pages.read(row, 0, 7 * PAGE)[:, 0]
            expected = [held.get((row, position), math.nan) for position in range(7 * PAGE)]
            np.testing.assert_array_equal(found, np.array(expected, dtype=np.float32))
        assert pages.n_pages_held == len({(row, position // PAGE) for row, position in held})
    for row in range(6):
        pages.free(row)
    assert pages.n_pages_held == 0


def test_freed_pages_are_used_again() -> None:
    pages = Pages(1)
    for _ in range(50):
        for row in range(40):
            pages.write(np.full(3, row), np.array([0, PAGE, 2 * PAGE]), np.ones((3, 1), dtype=np.float32))
        assert pages.n_pages_held == 120
        for row in range(40):
            pages.free(row)
    assert len(pages._pool) == 128


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slots_are_a_dict_of_block_and_offset(data: st.DataObject) -> None:
    size, n_blocks = data.draw(st.sampled_from([1, 4])), 12
    slots, held = SlotCache(n_blocks, size, 1), dict[tuple[int, int], float]()
    blocks: dict[int, list[int]] = {}
    some_blocks = st.lists(st.integers(0, n_blocks - 1), min_size=1, max_size=5, unique=True)
    for number in range(data.draw(st.integers(1, 10))):
        row, act = data.draw(st.integers(0, 9)), data.draw(st.sampled_from(["set", "add", "copy", "write"]))
        if act == "copy":
            source, target = data.draw(st.integers(0, n_blocks - 1)), data.draw(st.integers(0, n_blocks - 1))
            slots.copy_block(source, target)
            copied = {offset: held.get((source, offset)) for offset in range(size)}
            held = {key: value for key, value in held.items() if key[0] != target}
            held |= {(target, offset): value for offset, value in copied.items() if value is not None}
        elif act == "add" and row in blocks:
            more = data.draw(some_blocks)
            slots.add_blocks(row, more)
            blocks[row] = blocks[row] + more
        elif act == "write" and row in blocks:
            stop = data.draw(st.integers(1, size * len(blocks[row])))
            values = np.arange(stop, dtype=np.float32)[:, None] + 100 * number
            distinct = len(set(blocks[row])) == len(blocks[row])
            if not distinct:  # a scheduler gives a request no block twice
                continue
            slots.write(np.full(stop, row), np.arange(stop), values)
            held |= {(blocks[row][at // size], at % size): float(values[at, 0]) for at in range(stop)}
        else:
            blocks[row] = data.draw(some_blocks)
            slots.set_blocks(row, blocks[row])
        for one, owned in blocks.items():
            expected = [held.get((block, offset), math.nan) for block in owned for offset in range(size)]
            np.testing.assert_array_equal(slots.read(one, 0, len(expected))[:, 0], np.array(expected, dtype=np.float32))
            np.testing.assert_array_equal(slots.read(one, 1, len(expected))[:, 0], np.array(expected[1:], dtype=np.float32))


# --- running scores ---


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", sorted(ONLINE))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_that_come_and_go_are_each_as_alone(name: str, data: st.DataObject) -> None:
    # `update` of a fresh reduction of one row is the reference; rows are chosen, begun anew and added at random.
    n_rows, generator = data.draw(st.integers(1, 4)), torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    online = make_online(name, ONLINE[name], n_rows, 2)
    alone = [make_online(name, ONLINE[name], 1, 2) for _ in range(n_rows)]
    for _ in range(data.draw(st.integers(1, 10))):
        act = data.draw(st.sampled_from(["update", "update", "update", "reset", "grow"]))
        rows = data.draw(st.lists(st.integers(0, n_rows - 1), min_size=1, unique=True))
        if act == "grow":
            online.grow(n_rows + 3)
            alone += [make_online(name, ONLINE[name], 1, 2) for _ in range(3)]
            n_rows += 3
        elif act == "reset":
            online.reset_rows(torch.tensor(rows))
            for row in rows:
                alone[row] = make_online(name, ONLINE[name], 1, 2)
        else:
            new = data.draw(st.sampled_from([1, 1, 2, 5]))
            scores = torch.rand(len(rows), new, 2, generator=generator)
            counted = torch.rand(len(rows), new, generator=generator) < 0.7
            before = scores.clone()
            found = online.update_rows(torch.tensor(rows), scores, counted)
            assert torch.equal(scores, before)
            for at, row in enumerate(rows):
                same(found[at], alone[row].update(scores[at : at + 1], counted[at : at + 1])[0])
    # all rows at once, as `update` takes them
    scores, counted = torch.rand(n_rows, 2, 2, generator=generator), torch.ones(n_rows, 2, dtype=torch.bool)
    found = online.update(scores, counted)
    for row, one in enumerate(alone):
        same(found[row], one.update(scores[row : row + 1], counted[row : row + 1])[0])


def test_a_refused_update_of_rows_changes_nothing() -> None:
    online = make_online("mean", None, 3, 1)
    online.update(torch.ones(3, 2, 1), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="batch=2"):
        online.update_rows(torch.tensor([0, 1]), torch.ones(3, 1, 1), torch.ones(3, 1, dtype=torch.bool))
    found = online.update(torch.full((3, 1, 1), 4.0), torch.ones(3, 1, dtype=torch.bool))
    same(found, torch.full((3, 1, 1), 2.0))


def test_a_step_that_fails_leaves_all_rows() -> None:
    def step(state: Any, z: torch.Tensor, counted: torch.Tensor, seen: torch.Tensor) -> Any:
        if (z > 5).any():
            raise RuntimeError("too much")
        total = state[0] + z.cumsum(dim=1)
        return total, (total[:, -1:],)

    online = OnlineReduction(lambda zero: (zero,), step, (), 2, 1, "cpu")
    ones = torch.ones(2, 1, dtype=torch.bool)
    online.update(torch.ones(2, 1, 1), ones)
    with pytest.raises(RuntimeError, match="too much"):
        online.update_rows(torch.tensor([1]), torch.full((1, 1, 1), 9.0), ones[:1])
    same(online.update(torch.ones(2, 1, 1), ones), torch.full((2, 1, 1), 2.0))


def test_rows_grown_in_inference_mode_work_outside_of_it() -> None:
    online = make_online("ema_max", 0.5, 2, 1)
    with torch.inference_mode():
        online.grow(4)
        online.update_rows(torch.tensor([3]), torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    online.reset_rows(torch.tensor([2]))
    found = online.update_rows(torch.tensor([3, 2]), torch.full((2, 1, 1), 3.0), torch.ones(2, 1, dtype=torch.bool))
    same(found.flatten(), torch.tensor([2.0, 3.0]))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_running_scores_of_many_rows_are_those_of_one(data: st.DataObject) -> None:
    plan = the_plan()
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    running, alone = RunningScores(plan), dict[int, list[Any]]()
    position: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        rows = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True))
        for row in rows:
            if row not in alone or data.draw(st.integers(0, 3)) == 0:
                running.begin(row)
                assert running.crossings(row) == []
                alone[row] = [group.make_online(1) for group in plan.groups]
                position[row] = 0
        new = data.draw(st.sampled_from([1, 3]))
        readings = generator.normal(size=(len(rows), new, plan.n_readings)).astype(np.float32)
        readings[generator.random((len(rows), new)) < 0.2] = np.nan
        places = np.array([position[row] for row in rows])[:, None] + np.arange(new)
        is_bos = places == 0
        values = running.update(np.array(rows), readings, places, is_bos)
        logits = plan.token_logits(torch.from_numpy(readings))
        for at, row in enumerate(rows):
            read, scores = torch.from_numpy(readings[at : at + 1]), logits[at : at + 1]
            known = read.isfinite().all(-1)
            for group, online in zip(plan.groups, alone[row], strict=True):
                counted = known if group.reduction.counts_bos else known & ~torch.from_numpy(is_bos[at : at + 1])
                z = group.enter(read[..., group.readings], scores[..., group.columns])
                expected = group.values(online.update(z, counted))[0]
                same(torch.from_numpy(values[at][:, group.columns]), expected)
            position[row] += new


def test_a_head_that_overflows_counts_as_unknown_for_its_own_probe_alone() -> None:
    spec = ProbeSpec(
        name="p", hook_points=("a",), d_model=1, kind="polynomial", head=HeadRecord(degree=40, rank=2),
        pooling=PoolingRecord(inference="score:max"),
    )  # fmt: skip
    readout = torch.zeros(1, 79)
    readout[0, -2:] = torch.tensor([1.0, -1.0])  # inf - inf at large readings
    steep = ProbeWeights(torch.ones(79, 1), torch.zeros(79), spec, readout, torch.zeros(1))
    flat = ProbeWeights.from_direction([1.0], name="q", hook_points="a", pooling=PoolingRecord(inference="score:max"))
    plan = ScoringPlan([steep, flat])
    running = RunningScores(plan)
    running.begin(0)
    read = torch.ones(1, 3, 80) * torch.tensor([1, 1e10, 1])[:, None]
    readings = plan.combine([read], torch.device("cpu")).numpy()
    assert plan.n_readings == 2, "one logit is kept of a token, not all that the polynomial reads"
    values = running.update(np.array([0]), readings, np.arange(3)[None], np.zeros((1, 3), bool))[0]
    np.testing.assert_allclose(values[:, plan.columns["p"]][:, 0], 0.0)
    np.testing.assert_allclose(values[:, plan.columns["q"]][:, 0], [1.0, 1e10, 1e10])


def test_a_crossing_is_told_once_and_not_of_the_row_before() -> None:
    plan = ScoringPlan([one_probe("p").with_threshold(1.0, "logit")])
    running = RunningScores(plan)

    def update(row: int, *logits: float, start: int) -> None:
        z = np.array(logits, dtype=np.float32)[None, :, None]
        running.update(np.array([row]), z, np.arange(start, start + len(logits))[None], np.zeros((1, len(logits)), bool))

    running.begin(2)
    update(2, 0.5, math.nan, 1.0, 3.0, start=0)
    update(2, 5.0, start=4)
    (found,) = running.crossings(2)
    assert (found.line, found.position, found.logit, found.value) == (0, 2, 1.0, 1.0)
    running.begin(2)
    update(2, 0.5, start=0)
    assert running.crossings(2) == []
    update(2, 2.0, start=1)
    assert [one.position for one in running.crossings(2)] == [1]


# --- what is compiled in ---


def one_probe(name: str, hook_points: Any = "blocks.1.hook_resid_post") -> ProbeWeights:
    n = 1 if isinstance(hook_points, str) else len(hook_points)
    return ProbeWeights.from_direction(torch.ones(2 * n), name=name, hook_points=hook_points)


@pytest.mark.parametrize(
    "name, layer", [("blocks.0.hook_resid_pre", -1), ("blocks.3.hook_resid_pre", 2), ("blocks.3.hook_resid_post", 3)]
)
def test_hook_points_by_the_block_that_writes_them(name: str, layer: int) -> None:
    assert ResidualPoint.of(name, 4) == ResidualPoint(layer)


@pytest.mark.parametrize(
    "name", ["blocks.2.hook_mlp_out", "hook_embed", "blocks.2.hook_resid_postx", "x.blocks.2.hook_resid_post"]
)
def test_other_hook_points_are_refused(name: str) -> None:
    with pytest.raises(IncompatibleProbeError, match="cannot be read in vLLM"):
        ResidualPoint.of(name)


def test_a_block_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(IncompatibleProbeError, match=r"'blocks\.4\.hook_resid_pre' is beyond the 4 layers"):
        ResidualPoint.of("blocks.4.hook_resid_pre", 4)


def test_a_structure_is_the_same_after_its_configuration() -> None:
    plan = ScoringPlan([one_probe("a"), one_probe("b", ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"))])
    structure = Structure.of(plan)
    assert structure.columns == {"blocks.1.hook_resid_post": 2, "blocks.0.hook_resid_pre": 1}
    assert Structure.from_config(structure.to_config()) == structure
    assert Structure.of(plan, 5).columns == dict.fromkeys(structure.columns, 5)
    with pytest.raises(EngineError, match="capacity is 1; expected at least 2"):
        Structure.of(plan, 1)


@pytest.mark.parametrize(
    "config, text",
    [
        (None, "has no 'lmprobe_tl'"),
        ({"another": 1}, "has no 'lmprobe_tl'"),
        ({"lmprobe_tl": {"format": 2, "mode": "scores", "columns": {"a": 1}}}, "has format 2; expected 1"),
        ({"lmprobe_tl": {"format": 1, "mode": "scores", "columns": {}}}, "no usable columns"),
        ({"lmprobe_tl": {"format": 1, "mode": "scores", "columns": {"a": True}}}, "no usable columns"),
        ({"lmprobe_tl": {"format": 1, "mode": "all", "columns": {"a": 1}}}, "no usable columns or mode"),
    ],
)
def test_a_configuration_of_something_else_is_refused(config: Any, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        Structure.from_config(config)


def test_probes_beyond_what_was_compiled_are_refused() -> None:
    structure = Structure({"blocks.1.hook_resid_post": 2})
    structure.check_fits(ScoringPlan([one_probe("a"), one_probe("b")]))
    with pytest.raises(IncompatibleProbeError, match="3 columns at .* compiled for 2.*capacity=3"):
        structure.check_fits(ScoringPlan([one_probe(name) for name in "abc"]))
    with pytest.raises(IncompatibleProbeError, match=r"read 'blocks\.0\.hook_resid_pre', but this engine was compiled for"):
        structure.check_fits(ScoringPlan([one_probe("a", "blocks.0.hook_resid_pre")]))
