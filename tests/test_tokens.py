"""Prompts to token ids, batches and masks: nothing is added, lost, or taken for a pad."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, WORDS, Tiny, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_tl import tokens
from lmprobe_tl.errors import EmptyMaskError, InputError, PromptTooLongError
from lmprobe_tl.tokens import (
    batches_by_length,
    bos_id,
    check_prompts,
    check_rows_count,
    counted_lengths,
    pad_id,
    pad_rows,
    tokenize_prompts,
    tokenizer_record,
    use_bos,
    without_bos,
)

BOS, EOS, PAD = 0, 1, 2
CONTEXT = 12
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "dogs"}]
ROWS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=6)


def make_model(
    *,
    prepend: bool = True,
    n_ctx: int | None = CONTEXT,
    d_vocab: int | None = None,
    tokenizer: Any = "its own",
    **names: str,
) -> Any:
    """As much of a model as tokenization looks at; `names` renames special tokens."""
    tokenizer = build_tokenizer() if tokenizer == "its own" else tokenizer
    for key, value in names.items():
        setattr(tokenizer, key, value)
    return SimpleNamespace(
        cfg=SimpleNamespace(default_prepend_bos=prepend, n_ctx=n_ctx, d_vocab=d_vocab), tokenizer=tokenizer
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def one_special_id() -> Any:
    """As GPT-2's: one token is BOS, EOS and pad."""
    return make_model(bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def words(model: Any) -> list[int]:
    """Token ids of all words, in the order of the text, made by hand from the vocabulary."""
    return encode_by_hand(model, WORDS)


def encode_by_hand(model: Any, text: str) -> list[int]:
    """Byte-level BPE through the Rust tokenizer itself: no template, no special tokens added."""
    return list(model.tokenizer._tokenizer.encode(text, add_special_tokens=False).ids)


# --- what is a list of prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one text", r"prompts is one string \('one text'\), not a list; expected a list of prompts.*Write \[prompt\]"),
        (np.str_("one text"), r"prompts is one string"),
        (b"bytes", r"prompts\[0\] is a int, 98"),
        (CHAT, r"prompts\[0\] is a single chat message; a chat is a list of messages"),
        ([], r"prompts is empty; expected a list of prompts"),
        ((), r"prompts is empty"),
        (np.array([], dtype=object), r"prompts is empty"),
        ({"text": "a"}, r"prompts is a dict; expected a list of prompts"),
        ({"a", "b"}, r"prompts is a set; expected a list of prompts"),
        (3, r"prompts is a int; expected"),
        (None, r"prompts is a NoneType; expected"),
        (torch.tensor([3, 4]), r"prompts is one 1-D array; .*Write \[tokens\]"),
        (np.array([3, 4]), r"prompts is one 1-D array"),
        (torch.tensor(3), r"prompts is one array of shape \(\)"),
        (np.array("text"), r"prompts is one array of shape \(\)"),
        (torch.tensor([[3, 4], [5, 2]]), r"prompts is one array of shape \(2, 2\).*Its rows may hold pads"),
        (np.array([["a", "b"]]), r"prompts is one array of shape \(1, 2\)"),
        (["a", None], r"prompts\[1\] is a NoneType, None; expected"),
        (["a", 3.5], r"prompts\[1\] is a float, 3\.5; expected"),
        (["a", ["b", "c"]], r"prompts\[1\] is a list, \['b', 'c'\]; expected"),
        (["a", [3, 4]], r"prompts\[1\] is a list, \[3, 4\]; expected"),
        (["a", []], r"prompts\[1\] is a list, \[\]; expected"),
        (["a", [CHAT[0], "b"]], r"prompts\[1\] is a list, .*'b'\]; expected"),
        (["a", ["b" * 99]], r"prompts\[1\] is a list, \['b{55}\.\.\.; expected"),
        ([[{"role": "user"}]], r"prompts\[0\] is a list, .*role/content"),
        ([[{"role": "user", "content": None}]], r"prompts\[0\] is a list"),
        ([[{"content": "no role"}]], r"prompts\[0\] is a list"),
        (["a", torch.tensor([[3, 4]])], r"prompts\[1\] is a Tensor"),
        (["a", torch.tensor([3.0])], r"prompts\[1\] is a Tensor, tensor\(\[3\.\]\)"),
        (["a", torch.tensor([True])], r"prompts\[1\] is a Tensor"),
        (["a", np.array([3.0])], r"prompts\[1\] is a ndarray"),
        (["a", torch.tensor(3)], r"prompts\[1\] is a Tensor"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_of_prompts_is_refused_by_name(prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        check_prompts(prompts)


def test_every_iterable_of_prompts_becomes_the_same_list() -> None:
    texts = ["a", "b"]
    keys = dict.fromkeys(texts).keys()
    for prompts in (texts, tuple(texts), np.array(texts), np.array(texts, dtype=object), iter(texts), keys):
        assert check_prompts(prompts) == texts
    tool_call = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert check_prompts(["a", CHAT, tuple(CHAT), tool_call]) == ["a", CHAT, tuple(CHAT), tool_call]


# --- text --------------------------------------------------------------------------------------------------------------


def test_text_becomes_its_own_tokens_behind_one_bos(model: Any, words: list[int]) -> None:
    rows = tokenize_prompts(make_model(n_ctx=None), [WORDS, "cat"])
    assert rows == [[BOS, *words], [BOS, *encode_by_hand(model, "cat")]]
    assert len(set(words)) > 15


def test_many_texts_reach_the_tokenizer_a_part_at_a_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["cat", WORDS, torch.tensor([5, 6]), "dogs", "rain", "the cat", "sun", "music"]
    at_once = tokenize_prompts(make_model(n_ctx=None), prompts)
    monkeypatch.setattr(tokens, "_TEXTS_AT_ONCE", 3)
    asked: list[int] = []

    class Counting(type(model.tokenizer)):
        def __call__(self, text: list[str], **options: Any) -> Any:
            asked.append(len(text))
            return super().__call__(text, **options)

    counted = make_model(n_ctx=None, tokenizer=build_tokenizer())
    counted.tokenizer.__class__ = Counting
    assert tokenize_prompts(counted, prompts) == at_once
    assert asked == [3, 3, 1]


@pytest.mark.parametrize(
    ("habit", "asked", "expected"), [(True, None, 1), (False, None, 0), (True, False, 0), (False, True, 1)]
)
def test_bos_is_prepended_as_asked_else_as_the_model_does(
    model: Any, habit: bool, asked: bool | None, expected: int
) -> None:
    other = make_model(prepend=habit)
    assert tokenize_prompts(other, ["the cat"], prepend_bos=asked) == [[BOS] * expected + encode_by_hand(model, "the cat")]
    assert use_bos(other, asked) is bool(expected)


@pytest.mark.parametrize("prepend", [True, False, None])
def test_text_that_begins_with_bos_gets_no_second_one(model: Any, prepend: bool | None) -> None:
    ids = encode_by_hand(model, "the cat")
    assert tokenize_prompts(model, ["<bos>the cat"], prepend_bos=prepend) == [[BOS, *ids]]
    assert tokenize_prompts(model, ["the cat<bos>"], prepend_bos=True) == [[BOS, *ids, BOS]]


def test_a_tokenizer_without_bos_prepends_nothing_and_refuses_to(model: Any) -> None:
    without = make_model(bos_token=None)
    assert bos_id(without) is None
    assert tokenize_prompts(without, ["the cat"]) == [encode_by_hand(model, "the cat")]
    with pytest.raises(InputError, match="prepend_bos=True, but this model's tokenizer has no BOS token"):
        tokenize_prompts(without, ["the cat"], prepend_bos=True)


def test_an_empty_text_is_bos_or_nothing(model: Any) -> None:
    assert tokenize_prompts(model, ["", "a"], prepend_bos=True)[0] == [BOS]
    assert tokenize_prompts(model, ["", "a"], prepend_bos=False)[0] == []


def test_a_tokenizer_that_loses_the_text_is_an_error() -> None:
    """Transformers makes an empty GPT-2 tokenizer for a folder that has none; every prompt would be BOS alone."""
    from transformers import GPT2Tokenizer

    broken = make_model(tokenizer=GPT2Tokenizer())
    with pytest.raises(InputError, match=r"prompts\[1\] \('the cat'\) turns into no token at all.*GPT2Tokenizer is empty"):
        tokenize_prompts(broken, ["", "the cat"])


def test_a_model_without_tokenizer_takes_tokens_and_refuses_text() -> None:
    bare = make_model(tokenizer=None)
    assert tokenize_prompts(bare, [torch.tensor([4, 5])]) == [[4, 5]]
    assert (bos_id(bare), pad_id(bare)) == (None, 0)
    for prompt in ("text", CHAT):
        with pytest.raises(InputError, match="has no tokenizer, so text cannot be its prompt; pass 1-D tensors"):
            tokenize_prompts(bare, [prompt])


# --- chats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepend", [True, False, None])
@pytest.mark.parametrize("chat", [CHAT, tuple(CHAT)])
def test_a_chat_is_its_template_with_one_bos(model: Any, prepend: bool | None, chat: Any) -> None:
    text = "[user] the cat\n[assistant] dogs\n"
    expected = [BOS, *encode_by_hand(model, text)]
    roomy = make_model(n_ctx=None)
    assert tokenize_prompts(roomy, [chat, "cat"], prepend_bos=prepend)[0] == expected
    generating = tokenize_prompts(roomy, [chat], prepend_bos=prepend, add_generation_prompt=True)
    assert generating == [[BOS, *encode_by_hand(model, text + "[assistant]")]]


def test_a_template_without_bos_adds_none(model: Any) -> None:
    plain = make_model(n_ctx=None, chat_template=CHAT_TEMPLATE.replace("{{ bos_token }}", ""))
    expected = encode_by_hand(model, "[user] the cat\n[assistant] dogs\n")
    assert tokenize_prompts(plain, [CHAT], prepend_bos=True) == [expected]


def test_a_chat_without_template_is_an_error() -> None:
    with pytest.raises(InputError, match="tokenizer has no chat template; pass strings instead"):
        tokenize_prompts(make_model(chat_template=None), [CHAT])


# --- token arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        np.array,
        lambda ids: np.array(ids, dtype=np.uint16),
        lambda ids: torch.tensor([ids])[0],
    ],
)
def test_token_arrays_are_taken_as_they_are(model: Any, make: Any) -> None:
    """No BOS is added, and pad, EOS and BOS ids stay wherever they stand."""
    rows = [[7, 8, EOS], [PAD, 9, PAD, PAD], [BOS, BOS, 3]]
    found = tokenize_prompts(model, [make(row) for row in rows], prepend_bos=True)
    assert found == rows
    assert all(type(token) is int for row in found for token in row)


@pytest.mark.parametrize("wrong", [-1, 329, 50256])
def test_token_ids_that_the_model_does_not_know_are_refused(wrong: int) -> None:
    with pytest.raises(InputError, match=rf"prompts\[1\] holds token id {wrong}, but this model's ids go from 0 to 328"):
        tokenize_prompts(make_model(d_vocab=329), [torch.tensor([328, 0]), torch.tensor([5, wrong])])


def test_text_with_a_token_beyond_the_embedding_is_refused() -> None:
    grown = make_model(d_vocab=329)
    grown.tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match=r"prompts\[0\] holds token id 329"):
        tokenize_prompts(grown, ["the <new>"])


# --- length ------------------------------------------------------------------------------------------------------------


def test_prompts_beyond_the_context_are_named(model: Any) -> None:
    fits, long = torch.arange(3, 3 + CONTEXT), torch.arange(3, 4 + CONTEXT)
    assert tokenize_prompts(model, [fits]) == [fits.tolist()]
    message = r"longer than the 12 tokens allowed: prompt 1 \(13 tokens\), prompt 3 \(14 tokens\)\. .*truncation='left'"
    with pytest.raises(PromptTooLongError, match=message) as caught:
        tokenize_prompts(model, [fits, long, fits, torch.arange(3, 5 + CONTEXT)])
    assert caught.value.rows == [1, 3]


def test_many_long_prompts_are_counted_and_not_all_printed(model: Any) -> None:
    with pytest.raises(PromptTooLongError, match=r"prompt 7 \(13 tokens\) and 3 more\. ") as caught:
        tokenize_prompts(model, [torch.arange(13)] * 11)
    assert caught.value.rows == list(range(11))


def test_bos_counts_towards_the_length(model: Any) -> None:
    text = "cats" * 12
    length = len(encode_by_hand(model, text))
    assert tokenize_prompts(make_model(n_ctx=length), [text], prepend_bos=False)
    with pytest.raises(PromptTooLongError):
        tokenize_prompts(make_model(n_ctx=length), [text], prepend_bos=True)


def test_truncation_left_keeps_bos_and_the_last_tokens(model: Any, words: list[int]) -> None:
    ids = list(range(3, 23))
    prompts = [torch.tensor([BOS, *ids]), torch.tensor(ids), torch.tensor([3, 4]), torch.tensor(ids[:CONTEXT])]
    rows = tokenize_prompts(model, prompts, truncation="left")
    assert rows == [[BOS, *ids[-11:]], ids[-12:], [3, 4], ids[:CONTEXT]]
    assert tokenize_prompts(model, [WORDS], truncation="left", max_length=5) == [[BOS, *words[-4:]]]
    assert tokenize_prompts(model, [WORDS], truncation="left", max_length=2) == [[BOS, words[-1]]]
    assert tokenize_prompts(model, [WORDS], truncation="left", max_length=1) == [[words[-1]]]


def test_truncation_right_keeps_the_first_tokens(model: Any, words: list[int]) -> None:
    ids = list(range(3, 23))
    prompts = [torch.tensor([BOS, *ids]), torch.tensor(ids), torch.tensor([3, 4])]
    assert tokenize_prompts(model, prompts, truncation="right") == [[BOS, *ids[:11]], ids[:12], [3, 4]]
    assert tokenize_prompts(model, [WORDS], truncation="right", max_length=5) == [[BOS, *words[:4]]]


def test_a_shorter_max_length_is_the_limit(model: Any) -> None:
    with pytest.raises(PromptTooLongError, match="longer than the 5 tokens allowed"):
        tokenize_prompts(model, [torch.arange(6)], max_length=5)
    assert tokenize_prompts(model, [torch.arange(5)], max_length=5)


@pytest.mark.parametrize("max_length", [0, -1, CONTEXT + 1, 2.5, "5", True])
def test_a_max_length_that_cannot_be_is_refused(model: Any, max_length: Any) -> None:
    with pytest.raises(InputError, match=rf"max_length is {max_length!r}; expected an integer from 1 to 12"):
        tokenize_prompts(model, ["a"], max_length=max_length)


@pytest.mark.parametrize("truncation", ["middle", True, 5])
def test_an_unknown_truncation_is_refused_though_nothing_is_long(model: Any, truncation: Any) -> None:
    with pytest.raises(InputError, match=rf"truncation is {truncation!r}; expected None .*'left' or 'right'"):
        tokenize_prompts(model, ["a"], truncation=truncation)


def test_a_model_without_known_context_has_no_limit(model: Any) -> None:
    endless = make_model(n_ctx=None)
    assert len(tokenize_prompts(endless, [torch.arange(3, 300)])[0]) == 297
    assert len(tokenize_prompts(endless, [torch.arange(3, 300)], max_length=9, truncation="left")[0]) == 9
    with pytest.raises(InputError, match="expected an integer from 1 to any number"):
        tokenize_prompts(endless, ["a"], max_length=0)


# --- batches and masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@settings(deadline=None, max_examples=50)
@given(rows=ROWS, pad=st.integers(0, 5))
def test_the_mask_says_the_lengths_whatever_the_ids(side: str, rows: list[list[int]], pad: int) -> None:
    """The pad id is among the rows' own ids: a token equal to it stays a token."""
    tokens, mask = pad_rows(rows, pad_token_id=pad, side=side)
    longest = max(map(len, rows))
    assert tokens.shape == mask.shape == (len(rows), longest)
    assert tokens.dtype == mask.dtype == torch.int64
    for index, row in enumerate(rows):
        n_pads = longest - len(row)
        ones, pads = [1] * len(row), [0] * n_pads
        assert mask[index].tolist() == (ones + pads if side == "right" else pads + ones)
        assert tokens[index].tolist() == (row + [pad] * n_pads if side == "right" else [pad] * n_pads + row)


@pytest.mark.parametrize("side", ["right", "left"])
@settings(deadline=None, max_examples=50)
@given(rows=ROWS, bos=st.none() | st.integers(0, 2), pad=st.integers(0, 2))
def test_only_a_leading_bos_does_not_count(side: str, rows: list[list[int]], bos: int | None, pad: int) -> None:
    tokens, mask = pad_rows(rows, pad_token_id=pad, side=side)
    counted = without_bos(tokens, mask, bos)
    assert counted.dtype == torch.bool
    expected = [row[1:] if bos is not None and row[0] == bos else row for row in rows]
    assert [tokens[index][counted[index]].tolist() for index in range(len(rows))] == expected
    assert counted_lengths(rows, bos, False) == list(map(len, expected)) == counted.sum(dim=1).tolist()
    assert counted_lengths(rows, bos, True) == list(map(len, rows)) == mask.sum(dim=1).tolist()


def test_without_bos_leaves_the_mask_as_it_was() -> None:
    tokens, mask = pad_rows([[BOS, 3], [BOS]], pad_token_id=BOS)
    before = mask.clone()
    assert without_bos(tokens, mask, BOS).tolist() == [[False, True], [False, False]]
    assert torch.equal(mask, before)


def test_a_trailing_eos_that_equals_bos_and_pad_is_a_token(one_special_id: Any) -> None:
    model = one_special_id
    assert bos_id(model) == pad_id(model) == EOS
    rows = tokenize_prompts(model, ["cat<eos>", "the cat dogs", "<eos>cat<eos><eos>"])
    cat, longer = encode_by_hand(model, "cat"), encode_by_hand(model, "the cat dogs")
    assert rows == [[EOS, *cat, EOS], [EOS, *longer], [EOS, *cat, EOS, EOS]]
    for side in ("right", "left"):
        tokens, mask = pad_rows(rows, pad_token_id=pad_id(model), side=side)
        assert mask.sum(dim=1).tolist() == [len(row) for row in rows]
        assert [one[here.bool()].tolist() for one, here in zip(tokens, mask, strict=True)] == rows
        counted = without_bos(tokens, mask, bos_id(model))
        assert [one[here].tolist() for one, here in zip(tokens, counted, strict=True)] == [row[1:] for row in rows]


def test_rows_without_a_token_that_counts_are_named() -> None:
    check_rows_count([1, 2])
    with pytest.raises(EmptyMaskError, match=r"no token counts in prompt 1, 3; every prompt needs .* beside BOS") as caught:
        check_rows_count([1, 0, 2, 0])
    assert caught.value.rows == [1, 3]
    with pytest.raises(EmptyMaskError, match=r"prompt 0, 1, 2, 3, 4, 5, 6, 7 \.\.\.; ") as caught:
        check_rows_count([0] * 9)
    assert caught.value.rows == list(range(9))


@pytest.mark.parametrize("sort", [True, False])
@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 9), max_size=20), batch_size=st.integers(1, 8))
def test_every_row_is_in_exactly_one_full_batch(sort: bool, lengths: list[int], batch_size: int) -> None:
    batches = list(batches_by_length(lengths, batch_size, sort=sort))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    ordered = [lengths[index] for index in order]
    assert ordered == sorted(lengths, reverse=True) if sort else order == list(range(len(lengths)))


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=30),
    max_tokens=st.integers(1, 200),
    batch_size=st.none() | st.integers(1, 8),
    sort=st.booleans(),
)
def test_batches_keep_their_budget_and_are_no_smaller_than_they_must_be(
    lengths: list[int], max_tokens: int, batch_size: int | None, sort: bool
) -> None:
    batches = list(batches_by_length(lengths, batch_size, max_tokens=max_tokens, sort=sort))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert not sort or [lengths[index] for index in order] == sorted(lengths, reverse=True)

    def fits(batch: list[int]) -> bool:
        padded = max(lengths[index] for index in batch) * len(batch)
        pads = padded - sum(lengths[index] for index in batch) if sort else 0
        small = padded <= max_tokens and pads <= max_tokens // 16 and len(batch) <= (batch_size or len(batch))
        return len(batch) == 1 or small

    assert all(map(fits, batches))
    assert not any(fits([*batch, following[0]]) for batch, following in pairwise(batches))
    if sort:
        sizes = [max(lengths[index] for index in batch) for batch in batches]
        assert sizes == sorted(sizes, reverse=True)


def test_errors_name_prompts_from_the_number_of_the_first(model: Any) -> None:
    """Where they are a part of a longer list."""
    for prompts, error, message in [
        (["a", None], InputError, r"prompts\[101\] is a NoneType"),
        (["a", {"role": "user"}], InputError, r"prompts\[101\] is a single chat message"),
        (["a", torch.tensor([-1])], InputError, r"prompts\[101\] holds token id -1"),
        (["a", torch.arange(CONTEXT + 1)], PromptTooLongError, r"prompt 101 \(13 tokens\)"),
    ]:
        with pytest.raises(error, match=message) as caught:
            tokenize_prompts(model, prompts, first=100)
        assert getattr(caught.value, "rows", [101]) == [101]
    with pytest.raises(EmptyMaskError, match="no token counts in prompt 101;") as caught:
        check_rows_count([1, 0], first=100)
    assert caught.value.rows == [101]


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "8", True])
def test_a_batch_size_that_cannot_be_is_refused(batch_size: Any) -> None:
    with pytest.raises(InputError, match=rf"batch_size is {batch_size!r}; expected an integer of at least 1"):
        list(batches_by_length([1, 2], batch_size))


def test_padding_takes_an_id_that_the_model_knows() -> None:
    assert pad_id(make_model(d_vocab=329)) == PAD
    assert pad_id(make_model(d_vocab=329, pad_token=None)) == EOS
    assert pad_id(make_model(d_vocab=329, pad_token=None, eos_token=None)) == 0
    added = make_model(d_vocab=329, pad_token="<added later>")
    added.tokenizer.add_special_tokens({"pad_token": "<added later>"})
    assert added.tokenizer.pad_token_id == 329
    assert pad_id(added) == EOS


# --- the record --------------------------------------------------------------------------------------------------------


def test_the_record_of_a_tokenizer_is_stable_across_loads_and_models(tiny: Tiny) -> None:
    first, again = tokenizer_record(tiny.bridge, None), tokenizer_record(make_model(), None)
    assert first.fingerprint == again.fingerprint
    assert first.chat_template_fingerprint == again.chat_template_fingerprint
    assert first == tokenizer_record(tiny.bridge, None)
    assert len(first.fingerprint) == 16
    assert first.prepend_bos is (tiny.name in ("gpt2", "llama"))


def test_the_record_changes_with_vocabulary_template_and_bos() -> None:
    base = tokenizer_record(make_model(), None)
    grown = make_model()
    grown.tokenizer.add_tokens(["<new>"])
    assert tokenizer_record(grown, None).fingerprint != base.fingerprint
    other = tokenizer_record(make_model(chat_template="{{ messages }}"), None)
    assert other.fingerprint == base.fingerprint
    assert other.chat_template_fingerprint not in (None, base.chat_template_fingerprint)
    assert tokenizer_record(make_model(chat_template=None), None).chat_template_fingerprint is None
    assert (base.prepend_bos, tokenizer_record(make_model(), False).prepend_bos) == (True, False)
    none = tokenizer_record(make_model(tokenizer=None), None)
    assert (none.fingerprint, none.prepend_bos, none.chat_template_fingerprint) == (None, False, None)
