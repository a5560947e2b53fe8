"""Laws of pooling: the mask alone decides, names mean one thing, and errors say what to do."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmprobe_tl import pooling
from lmprobe_tl.errors import EmptyMaskError, InputError
from lmprobe_tl.pooling import (
    ParsedPooling,
    get_pooling_fn,
    parse_pooling_strategy,
    pool_all,
    pool_eos,
    pool_mean,
    reduce_scores,
    resolve_pooling,
)

EOS = 7
NAMES = ["last_token", "first_token", "mean", "max", "min"]
LOOPS = {
    "last_token": lambda vectors: vectors[-1],
    "first_token": lambda vectors: vectors[0],
    "mean": lambda vectors: sum(v.double() for v in vectors) / len(vectors),
    "max": lambda vectors: torch.stack([max(column) for column in zip(*vectors, strict=True)]),
    "min": lambda vectors: torch.stack([min(column) for column in zip(*vectors, strict=True)]),
}
quick = settings(deadline=None, max_examples=40)


def pool(name: str, activations: Tensor, mask: Tensor | None) -> Tensor:
    return get_pooling_fn(f"activation:{name}")(activations, mask)


@st.composite
def ragged_batches(draw: st.DrawFn) -> list[Tensor]:
    """Rows [length d_model=3] of negative and positive activations."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    offset = draw(st.sampled_from([-5.0, 0.0, 5.0]))  # all negative, mixed, all positive
    return [torch.randn(length, 3, generator=generator) + offset for length in lengths]


@st.composite
def layouts(draw: st.DrawFn, rows: list[Tensor], junk: float) -> tuple[Tensor, Tensor]:
    """The rows in one batch, their tokens at random places in order, junk everywhere else."""
    pos = max(map(len, rows)) + draw(st.integers(0, 4))
    activations, mask = torch.full((len(rows), pos, rows[0].shape[1]), junk), torch.zeros(len(rows), pos)
    for i, row in enumerate(rows):
        places = sorted(draw(st.permutations(range(pos)))[: len(row)])
        activations[i, places], mask[i, places] = row, 1
    return activations, mask


@pytest.mark.parametrize("name", NAMES)
@quick
@given(data=st.data(), rows=ragged_batches(), junk=st.sampled_from([0.0, 1e9, torch.nan, torch.inf, -torch.inf]))
def test_padding_gaps_and_batch_mates_never_matter(name: str, data: st.DataObject, rows: list[Tensor], junk: float) -> None:
    activations, mask = data.draw(layouts(rows, junk))
    activations.requires_grad_()
    pooled = pool(name, activations, mask)
    expected = torch.stack([LOOPS[name](list(row)) for row in rows]).float()
    torch.testing.assert_close(pooled.detach(), expected, rtol=1e-5, atol=1e-6)
    pooled.sum().backward()
    assert activations.grad is not None
    assert (activations.grad[mask == 0] == 0).all()  # also false for NaN
    torch.testing.assert_close(activations.grad.sum(dim=1), torch.ones(len(rows), 3))  # all of it went to real tokens


@quick
@given(data=st.data(), rows=ragged_batches(), ids=st.sampled_from([EOS, [EOS], (EOS, 9)]))
def test_eos_is_the_last_real_one(data: st.DataObject, rows: list[Tensor], ids: int | list[int] | tuple[int, ...]) -> None:
    activations, mask = data.draw(layouts(rows, torch.nan))
    tokens = torch.full(mask.shape, EOS)  # pads look like EOS, as with many tokenizers
    expected = []
    for i, row in enumerate(rows):
        ends = data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row)).filter(any))
        tokens[i, mask[i] == 1] = torch.tensor([EOS if end else 3 for end in ends])
        expected.append(row[max(j for j, end in enumerate(ends) if end)])
    assert torch.equal(pool_eos(activations, mask, tokens=tokens, eos_token_id=ids), torch.stack(expected))


def test_several_eos_ids_and_rows_without_one() -> None:
    activations = torch.arange(6.0).reshape(2, 3, 1)
    tokens = torch.tensor([[EOS, 9, 3], [3, EOS, 9]])
    assert pool_eos(activations, tokens=tokens, eos_token_id=[EOS, 9]).tolist() == [[1.0], [5.0]]
    with pytest.raises(InputError, match=r"row\(s\) \[1\].*last_token"):
        pool_eos(activations, torch.tensor([[1, 1, 1], [1, 0, 0]]), tokens=tokens, eos_token_id=EOS)
    for bad in ([], True, "7", [EOS, None]):
        with pytest.raises(InputError, match="eos_token_id"):
            pool_eos(activations, tokens=tokens, eos_token_id=bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"tokens.*\[2, 3\].*shape \[2, 2\]"):
        pool_eos(activations, tokens=tokens[:, :2], eos_token_id=EOS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_dtypes(name: str, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    activations = torch.tensor([[[3.0], [-2.0], [torch.nan]], [[torch.inf], [1.0], [4.0]]], dtype=dtype)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).to(mask_dtype)
    pooled = pool(name, activations, mask)
    assert pooled.dtype == dtype
    wanted = {"last_token": [-2, 4], "first_token": [3, 1], "mean": [0.5, 2.5], "max": [3, 4], "min": [-2, 1]}
    assert pooled.flatten().tolist() == wanted[name]


def test_mean_sums_wider_than_its_input() -> None:
    assert pool_mean(torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)).item() == 1.0  # a bfloat16 sum stops at 256
    assert pool_mean(torch.full((1, 4, 1), 60000.0, dtype=torch.float16)).item() == 60000.0  # a float16 sum is inf
    tiny = torch.tensor([1.0, 1e-12], dtype=torch.float64).reshape(1, 2, 1)
    assert pool_mean(tiny).item() == (1 + 1e-12) / 2  # float64 is not narrowed


@pytest.mark.parametrize("name", NAMES)
def test_no_mask_means_all_real(name: str) -> None:
    activations = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pool(name, activations, None), pool(name, activations, torch.ones(3, 4)))


def all_functions() -> dict[str, object]:
    eos = partial(pool_eos, tokens=torch.full((3, 4), EOS), eos_token_id=EOS)
    reductions = [*NAMES, "ema_max(.5)", "rolling_max(2)", "softmax(1)"]
    scores = {f"score:{s}": lambda a, m, s=s: reduce_scores(a[..., 0], s, m) for s in reductions}
    return {name: partial(pool, name) for name in NAMES} | {"eos": eos, "all": pool_all} | scores


@pytest.mark.parametrize("name", all_functions())
def test_bad_masks_are_refused_by_every_strategy(name: str) -> None:
    function, activations = all_functions()[name], torch.zeros(3, 4, 2)
    mask = torch.ones(3, 4)
    function(activations, mask)  # the control
    with pytest.raises(EmptyMaskError, match=r"row\(s\) \[0, 2\]") as caught:
        function(activations, torch.tensor([[0], [1], [0]]).expand(3, 4))
    assert caught.value.rows == [0, 2]
    for bad in (torch.nan, 0.5, 2.0, -torch.inf):
        mask[1, 2] = bad
        with pytest.raises(InputError, match=f"{bad} at row 1, position 2; expected 1"):
            function(activations, mask)
    with pytest.raises(InputError, match=r"shape \[3, 5\], expected \[batch pos\] = \[3, 4\]"):
        function(activations, torch.ones(3, 5))
    with pytest.raises(InputError, match=r"must be a tensor.*list"):
        function(activations, [[1] * 4] * 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pos", [0, 3])
def test_no_rows_and_no_positions(name: str, pos: int) -> None:
    assert pool(name, torch.zeros(0, pos, 4), torch.ones(0, pos)).shape == (0, 4)
    assert reduce_scores(torch.zeros(0, pos), name).shape == (0,)
    assert reduce_scores(torch.zeros(0, pos, 3), name).shape == (0, 3)
    with pytest.raises(EmptyMaskError, match=r"\[0, 1\]"):
        pool(name, torch.zeros(2, 0, 4), None)


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_activations_are_floats_with_three_axes(name: str) -> None:
    function = pool_all if name == "all" else partial(pool, name)
    with pytest.raises(InputError, match=r"\[batch pos d_model\], got shape \[2, 3\]"):
        function(torch.zeros(2, 3), None)
    with pytest.raises(InputError, match=r"floats, got torch\.int64"):
        function(torch.zeros(2, 3, 1, dtype=torch.int64), None)
    with pytest.raises(InputError, match="got list"):
        function([[[1.0]]], None)


def test_all_is_the_same_object() -> None:
    activations = torch.zeros(1, 2, 3)
    assert pool_all(activations, torch.tensor([[0, 1]])) is activations


STREAMING = {"ema_max(0.5)": ("ema_max", 0.5), "rolling_max(10)": ("rolling_max", 10), "softmax(5)": ("softmax", 5)}
PARSED = (
    {name: (name, False, None) for name in ["last_token", "first_token", "mean", "eos", "all"]}
    | {name: (name, True, None) for name in ["max", "min"]}
    | {f"score:{name}": (name, True, None) for name in NAMES}
    | {f"activation:{name}": (name, False, None) for name in [*NAMES, "eos"]}
    | {prefix + raw: (name, True, number) for raw, (name, number) in STREAMING.items() for prefix in ("", "score:")}
)


@pytest.mark.parametrize("raw", PARSED)
def test_every_strategy_parses_and_has_a_function(raw: str) -> None:
    base, is_score, parameter = PARSED[raw]
    assert parse_pooling_strategy(raw) == ParsedPooling(base, is_score, raw, parameter)
    assert get_pooling_fn(raw) is (pool_all if is_score else getattr(pooling, f"pool_{base}"))
    assert resolve_pooling("mean", None, raw) == ("mean", raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("lst_token", "Closest: 'last_token'"),
        ("score:meen", "Closest: 'score:mean'"),
        ("score:peak(3)", r"If 'peak' is a reduction of your own, register it first: register_reduction\('peak', \.\.\.\)"),
        ("peak", "'peak' is a reduction of your own"),
        ("score:ema_maxx(0.5)", r"Closest: 'score:ema_max\(alpha\)'"),
        ("scores:max", "Closest: 'score:max'"),
        ("", r"All strategies: last_token, .*score:rolling_max\(window\).*activation:eos"),
        ("zzz:max", "All strategies"),
        (":max", "All strategies"),
        ("score:activation:max", "All strategies"),
        ("activation:ema_max(0.5)", "Unknown"),
        ("score:ema_max(0.5", "Unknown"),
        (None, "Unknown pooling strategy None"),
        ("score:all", "nothing to reduce"),
        ("activation:all", "pools nothing"),
        ("score:eos", "'eos' without a prefix"),
        ("score:mean(3)", "'mean' takes no parameter"),
        ("mean(3)", "'mean' takes no parameter"),
        ("score:softmax(hot)", "'hot' is no number"),
        ("score:softmax()", "'' is no number"),
        ("score:ema_max", "alpha=None, expected a number above 0 and at most 1"),
        ("score:ema_max(0)", "alpha=0,"),
        ("score:ema_max(1.5)", "alpha=1.5,"),
        ("score:ema_max(nan)", "alpha=nan,"),
        ("score:rolling_max(0)", "window=0, expected a whole number"),
        ("score:rolling_max(2.5)", "window=2.5,"),
        ("score:softmax(0)", "temperature=0, expected a finite number, 1e-09 or more"),
        ("score:softmax(inf)", "temperature=inf,"),
    ],
)
def test_wrong_strategies_say_what_exists(raw: str, text: str) -> None:
    for use in (parse_pooling_strategy, get_pooling_fn, lambda s: resolve_pooling("mean", None, s or 3)):
        with pytest.raises(InputError, match=text.replace("None", "(None|3)")):
            use(raw)


def test_only_what_may_be_a_reduction_is_called_one() -> None:
    for raw in ("activation:peak", "zzz:max", "", "score:a b"):
        with pytest.raises(InputError, match="All strategies") as caught:
            parse_pooling_strategy(raw)
        assert "of your own" not in str(caught.value)


def two_arguments(activations: Tensor, attention_mask: Tensor | None) -> Tensor:
    return activations[:, 0]


class Module(nn.Module):
    def forward(self, activations: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return activations[:, 0]


class OneArgument(nn.Module):
    def forward(self, activations: Tensor) -> Tensor:
        return activations[:, 0]


def test_the_specific_strategy_wins() -> None:
    assert resolve_pooling("mean", None, None) == ("mean", "mean")
    assert resolve_pooling("mean", "eos", None) == ("eos", "mean")
    assert resolve_pooling("max", "last_token", None) == ("last_token", "max")
    assert resolve_pooling(None, "all", "score:max") == ("all", "score:max")
    for function in (two_arguments, Module(), lambda *both: both[0], pool_mean):
        assert resolve_pooling(function, None, None) == (function, function)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((None, None, None), "No strategy for train_pooling"),
        ((None, "mean", None), "No strategy for inference_pooling"),
        (("max", None, None), "train_pooling cannot be 'max': no scores exist.*inference_pooling='max'"),
        (("softmax(5)", None, None), "no scores exist before training"),
        (("score:mean", None, "mean"), "no scores exist before training"),
        (("mean", "activation:max", None), "takes no prefix"),
        (("mean", "mena", None), "Closest: 'mean'"),
        (
            (lambda activations: activations, None, None),
            r"\(activations \[batch pos d_model\], attention_mask \[batch pos\]",
        ),
        ((lambda a, m, *, tokens: a, None, None), "missing a required.*tokens"),
        (("mean", None, OneArgument()), "too many positional arguments"),
        ((pool_eos, None, None), "tokens"),
        ((torch.amax, None, None), "no signature found.*Wrap it in such a function"),
    ],
)
def test_unusable_sides_are_refused(arguments: tuple[object, object, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        resolve_pooling(*arguments)  # type: ignore[arg-type]
