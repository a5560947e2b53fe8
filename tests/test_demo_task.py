"""The demo's labels: against a list written by hand, against texts whose labels are known, and against another lexer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from embedded import embedded_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_tl.demo import main_job, task
from lmprobe_tl.demo.main_job import TokenIdentity, check_live_scores, generated_labels, live_prompts
from lmprobe_tl.demo.task import (
    INSIDE,
    PROBE_EVAL_MODULES,
    PROBE_TRAIN_MODULES,
    UNKNOWN,
    LabelledText,
    inside_after_each_char,
    labelled_pieces,
    stdlib_source,
    token_labels,
    top_level_starts,
)
from lmprobe_tl.errors import InputError

# Source, and under each character the state after it: 1 inside, 0 outside, ? unknown. The same on every Python.
CASES = [
    ("", ""),
    ("\n", "0"),
    ("x = 1", "00000"),
    ("  ", "00"),
    # comments
    ("# c", "111"),
    ("x # c\ny", "00111" + "00"),
    ('# it\'s """\nx', "1" * 10 + "00"),
    ("# c\r\nx\r\n", "111" + "00" + "000"),
    # quotes of each kind
    ("'a' b", "11000"),
    ('"a" b', "11000"),
    ("'' b", "1000"),
    ("'''a'''b", "0011" + "1100"),
    ('"""a"b"""c', "0011" + "11" + "1100"),
    ("'''a\n# b'''", "0011" + "1" * 6 + "0"),
    ("'a\"b' c", "111100" + "0"),
    ("'# a' # b", "11110" + "0" + "111"),
    # prefixes
    ("r'a'", "0110"),
    ("b'a'", "0110"),
    ("Rb'a\\'b'c", "00" + "11111" + "00"),
    ("rb'''a'''", "00" + "0011" + "110"),
    ("f'a'", "0110"),
    ("fR'a'", "00110"),
    ("x = rb'a' # c'd\n", "0000" + "001100" + "11111" + "0"),
    # escapes
    (r"'a\'b' c", "11111" + "000"),
    (r"'a\\' c", "11110" + "00"),
    ('"""a\\"""" c', "001" + "1" + "11" + "110" + "00"),
    # implicit concatenation and line continuation
    ("'a' 'b'\"c\"", "110" + "0" + "110" + "110"),
    ("('a'\n 'b')", "0110" + "00" + "1100"),
    ("x = \\\n 'a' \\\n 'b'", "000000" + "0110" + "000" + "0110"),
    ("'a\\\nb' c", "11111000"),
    ("'a\\\r\nb' c", "111111000"),
    # f-strings: the whole literal, fields included
    ("f'{x}' + y", "01111" + "00000"),
    ("f'{d[\"k\"]}' + y", "0" + "1" * 9 + "00000"),
    ("f'{{' + 'a'", "0111" + "0" + "000" + "110"),
    ("f'{{}}{x}' 'a'", "0" + "1" * 8 + "00" + "110"),
    ("f'{x:{w}}' 'a'", "0" + "1" * 8 + "00" + "110"),
    ("f'{x!r:>{w}}' # c", "0" + "1" * 11 + "00" + "111"),
    ("f'{d[\"}\"]}' 'a'", "0" + "1" * 9 + "00" + "110"),
    ("f'{f\"{x}\"}' 'a'", "0" + "1" * 9 + "00" + "110"),
    ("f'''{\nx}''' 'a'", "000" + "1" * 7 + "00" + "110"),
    ("f'''{x}''' f'b'", "000" + "1" * 6 + "00" + "0110"),
    ("rf'\\{x}' 'a'", "00" + "1" * 5 + "00" + "110"),
    ("f'\\N{DASH}' 'a'", "0" + "1" * 9 + "00" + "110"),
    ("f'é😀{y}😀' + 'a'", "0" + "1" * 7 + "0000" + "110"),
    # an f-string that Python 3.11 reads in another way than 3.12, or that is none
    ('f"{d["k"]}" + 1', "0" + "?" * 14),
    ("f'{x\n}' 'a'", "0" + "?" * 10),
    ("f'}' 'a'", "0" + "?" * 7),
    ("x = 'a' + f'{' # c", "0000110" + "0000" + "?" * 7),
    # characters at which str.splitlines would split
    ("x = 'a\x0cb'\n'y'", "0000" + "11110" + "0" + "110"),
    ("# a\x0cb\n'y'", "11111" + "0" + "110"),
    ("\x0c\n'y'", "00" + "110"),
    ("'a\u2028b'\n'y' # z", "11110" + "0" + "110" + "0" + "111"),
    ("# \x1c\x1d\x1e\x85\u2029\x0b\n'y'", "1" * 8 + "0" + "110"),
    ("'''\x0c\n\x0c'''\n'y'", "001" + "11111" + "0" + "0" + "110"),
    # line ends, tabs, other alphabets
    ("x\r\n'y'\r\n# c\r\n", "000" + "110" + "00" + "111" + "00"),
    ("x\r'y'\r", "00" + "110" + "0"),
    ("# a\r'c'", "111" + "0" + "110"),
    ("if x:\n\ty = 'a'\n\t# c\nz", "0" * 6 + "00000110" + "0" + "0111" + "00"),
    ("é = 'ü😀' # 😀é\n'a'", "0000" + "1110" + "0" + "1111" + "0" + "110"),
    # text that stops to tokenize
    ("x = '''a\nb", "0000" + "001" + "111"),
    ("x = rb'''a\n'", "0000" + "00" + "001" + "111"),
    ("x = f'''a{1}\nb", "0000" + "0" + "001" + "1" * 6),
    ("x = f'''a{\nb", "0000" + "0" + "001" + "1" * 4),
    ("'''a''' + \"\"\"b", "0011" + "110" + "000" + "001" + "1"),
    ("x = 'a\ny = 'b'\n", "0000" + "?" * 11),
    ("x = rb'a\ny", "000000" + "?" * 4),
    ("x = f'a\ny", "00000" + "?" * 4),
    ("'a\\\nb", "?" * 5),
    ("'a' + 'b", "110000" + "??"),
    ("x \\ 'a'", "00" + "?" * 5),
    ("if a:\n    b\n  c\n'x'\n", "0" * 14 + "?" * 6),
    ("('a'", "0110"),
    (")'a'", "0110"),
    ("a $ 'x' ? # c", "0000" + "110" + "000" + "111"),
]


def states(text: str) -> str:
    return "".join("?01"[state + 1] for state in inside_after_each_char(text))


@pytest.mark.parametrize(("source", "expected"), CASES, ids=[ascii(source) for source, _ in CASES])
def test_state_after_each_character_is_as_written_by_hand(source: str, expected: str) -> None:
    assert len(source) == len(expected), "the case itself is wrong"
    assert states(source) == expected


# --- texts whose labels are known because they are put together from labelled parts --------------------------------------

SINGLE_BODY = [
    "a",
    "#",
    " ",
    "\t",
    "é",
    "😀",
    "\x0c",
    "\x1c",
    "\u2028",
    "\x85",
    "\\\\",
    "\\n",
    "\\'",
    '\\"',
    "(",
    "\\\n",
    "f",
]
FIELDS = ["{x}", "{{", "}}", "{x!r:>{w}}", "{d[k]}", "{ {1: 2}[1] }"]


@dataclass(frozen=True)
class Part:
    text: str
    labels: str


def literal(prefix: str, quotes: str, body: str) -> Part:
    inner = len(quotes) - 1
    return Part(f"{prefix}{quotes}{body}{quotes}", "0" * (len(prefix) + inner) + "1" + "1" * (len(body) + inner) + "0")


@st.composite
def literals(draw: st.DrawFn) -> Part:
    quote = draw(st.sampled_from("'\""))
    quotes = quote * draw(st.sampled_from([1, 3]))
    prefix = draw(st.sampled_from(["", "r", "b", "Rb", "f", "fr", "U"]))
    other = {"'": '"', '"': "'"}[quote]
    alphabet = [*SINGLE_BODY, other]
    if len(quotes) == 3:
        alphabet += ["\n", "\n\n# ", quote + " ", "\r\n"]
    if "f" in prefix:
        alphabet = [piece for piece in alphabet if "\\" not in piece] + FIELDS
    if "b" in prefix.lower():
        alphabet = [piece for piece in alphabet if piece.isascii()]
    return literal(prefix, quotes, "".join(draw(st.lists(st.sampled_from(alphabet), max_size=8))))


CODE = ["x", " = ", " + ", "1.5", "é", ":", "(1,\n\n  2)", "[\n]", " \\\n ", "\t", "if", ")", "not "]
LINE_ENDS = ["\n", "\r\n", "\n\n", "\n\x0c\n", "\n    \n"]


@st.composite
def sources(draw: st.DrawFn) -> Part:
    """Lines of code, strings and comments, each line at the margin."""
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        for _ in range(draw(st.integers(0, 4))):
            if draw(st.booleans()):
                parts += [draw(literals()), Part(" ", "0")]
            else:
                code = draw(
                    st.sampled_from(CODE if parts and not parts[-1].text.endswith("\n") else ["x", "(", "é", "not "])
                )
                parts += [Part(code + " ", "0" * (len(code) + 1))]
        if draw(st.booleans()):
            comment = "#" + "".join(draw(st.lists(st.sampled_from([*SINGLE_BODY[:9], "'", '"""', "\\"]), max_size=6)))
            parts.append(Part(comment, "1" * len(comment)))
        end = draw(st.sampled_from(LINE_ENDS))
        parts.append(Part(end, "0" * len(end)))
    return Part("".join(part.text for part in parts), "".join(part.labels for part in parts))


@settings(deadline=None, max_examples=300)
@given(sources())
def test_labels_of_texts_put_together_from_labelled_parts(source: Part) -> None:
    assert states(source.text) == source.labels


@settings(deadline=None, max_examples=150)
@given(sources(), st.sampled_from(["'''", '"""', "f'''", 'rb"""']), st.text(alphabet="a# \n{}\t\x0cé😀", max_size=12))
def test_an_unclosed_triple_quoted_string_is_inside_to_the_end_after_any_text(before: Part, opening: str, body: str) -> None:
    expected = before.labels + "0" * (len(opening) - 1) + "1" * (len(body) + 1)
    assert states(before.text + opening + body) == expected


@settings(deadline=None, max_examples=300)
@given(sources(), st.integers(0, 200))
def test_cutting_a_text_short_never_turns_a_known_label_around(source: Part, at: int) -> None:
    """What a model has written so far is labelled as it will be once it has written on, or not at all."""
    cut = states(source.text[:at])
    wrong = [place for place, (ours, truth) in enumerate(zip(cut, source.labels, strict=False)) if ours not in ("?", truth)]
    # In an unclosed triple quote the first two quotes may be an empty string, and so may those of a closing.
    assert not [place for place in wrong if place < at - 2]


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet=list("ab'\"#\\\n\r\t {}()f:=é😀\x0c\u2028\x1c$1"), max_size=40))
def test_any_text_at_all_gets_one_state_a_character(text: str) -> None:
    assert len(inside_after_each_char(text)) == len(text)
    assert set(states(text)) <= set("01?")


# --- against another lexer, on real source -------------------------------------------------------------------------------


def lexed_by_hand(text: str) -> list[int]:
    """A lexer of its own, character by character, for source that is complete and has no f-string that reuses its quotes."""
    state, found, at = "", [], 0
    while at < len(text):
        width = 1
        if state == "":
            if text[at] == "#":
                state = "#"
            elif text[at] in "'\"":
                state = text[at] * 3 if text[at : at + 3] == text[at] * 3 else text[at]
                width = len(state)
                found += [0] * (width - 1)
        elif state == "#":
            state = "" if text[at] == "\n" else "#"
        elif text[at] == "\\":
            width = 2
            found.append(1)
        elif text.startswith(state, at):
            width = len(state)
            found += [1] * (width - 1)
            state = ""
        found.append(int(state != ""))
        at += width
    return found


@pytest.mark.parametrize("module", ["argparse", "cmd", "pprint", "shlex", "string", "statistics", "textwrap", "uuid"])
def test_labels_of_the_standard_library_agree_with_a_lexer_of_another_make(module: str) -> None:
    text = stdlib_source(module)
    assert text
    ours = inside_after_each_char(text)
    assert ours == lexed_by_hand(text)
    assert 0.1 < np.mean(ours) < 0.9


# --- modules, pieces, tokens ---------------------------------------------------------------------------------------------


def test_no_probe_module_is_missing_from_this_python() -> None:
    assert [name for name in PROBE_TRAIN_MODULES + PROBE_EVAL_MODULES if stdlib_source(name) is None] == []
    assert stdlib_source("no_such_module") is None


def test_training_and_evaluation_modules_are_disjoint_and_named_once() -> None:
    both = PROBE_TRAIN_MODULES + PROBE_EVAL_MODULES
    assert len(set(both)) == len(both)


def test_every_probe_module_is_known_to_its_end() -> None:
    for name in PROBE_TRAIN_MODULES + PROBE_EVAL_MODULES:
        assert UNKNOWN not in inside_after_each_char(stdlib_source(name) or ""), name


STATEMENTS = '''\
"""Doc
not a statement
"""
import a
\x0c
# a comment before
@decorated
def f(x,
y=(1,
2)):
    """Doc

at the margin, but inside
"""
    return x

x = """
y"""; z = \\
1
if x:
\tpass
class C: pass  # done
'''


def test_top_level_statements_start_at_the_margin_and_outside_of_strings_and_brackets() -> None:
    starts = top_level_starts(STATEMENTS)
    first_lines = [STATEMENTS[at:].split("\n")[0] for at in starts]
    expected = [
        '"""Doc',
        "import a",
        "# a comment before",
        "@decorated",
        "def f(x,",
        'x = """',
        "if x:",
        "class C: pass  # done",
    ]
    assert first_lines == expected
    state = inside_after_each_char(STATEMENTS)
    assert all(at == 0 or (STATEMENTS[at - 1] == "\n" and state[at - 1] == 0) for at in starts)


def test_top_level_starts_end_where_the_text_stops_to_tokenize() -> None:
    assert top_level_starts("a\nb\n'''c\nd\ne\n") == [0, 2]
    assert top_level_starts("") == []


def token_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """Where each token ends in ASCII text, from decoding ever longer prefixes."""
    return [len(tokenizer.decode(ids[: at + 1])) for at in range(len(ids))]


def check_pieces(text: str, pieces: list[LabelledText], max_tokens: int) -> None:
    tokenizer, state, end = embedded_tokenizer(), lexed_by_hand(text), 0
    for piece in pieces:
        start = text.index(piece.text, end)  # in order, and none overlaps the one before
        assert start == 0 or text[start - 1] == "\n"
        end = start + len(piece.text)
        assert piece.text.endswith("\n")
        assert piece.token_ids == tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        assert 1 <= len(piece.token_ids) == len(piece.labels) <= max_tokens
        ends = token_ends(tokenizer, piece.token_ids)
        assert ends[-1] == len(piece.text)
        assert piece.labels == [state[start + at - 1] for at in ends]


@pytest.mark.parametrize("module", ["textwrap", "argparse", "netrc"])
def test_pieces_are_disjoint_whole_lines_with_a_label_a_token(module: str) -> None:
    pieces = list(labelled_pieces(embedded_tokenizer(), module))
    text = stdlib_source(module)
    assert text
    assert text.isascii()
    check_pieces(text, pieces, 192)
    assert len(pieces) > 1
    assert all(len(piece.token_ids) >= 48 and piece.module == module for piece in pieces)
    assert {label for piece in pieces for label in piece.labels} == {0, 1}


def test_pieces_of_a_text_with_form_feeds_are_whole_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"x{n} = 'a\x0cb \x1c c'  # it's {n} \x0c and more\n\x0c\n" for n in range(12))
    monkeypatch.setattr(task, "stdlib_source", lambda module: text)
    pieces = list(labelled_pieces(embedded_tokenizer(), "m", min_tokens=5, max_tokens=60))
    assert len(pieces) > 2
    check_pieces(text, pieces, 60)
    assert all(line == "\x0c" or line.startswith("x") for piece in pieces for line in piece.text.split("\n")[:-1])


def test_a_module_without_source_has_no_pieces_and_broken_text_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(labelled_pieces(embedded_tokenizer(), "no_such_module")) == []
    monkeypatch.setattr(task, "stdlib_source", lambda module: "x = 1\n" * 8 + "y = 'cut\n" + "z = 2\n" * 40)
    pieces = list(labelled_pieces(embedded_tokenizer(), "m", min_tokens=5, max_tokens=60))
    assert all(UNKNOWN not in piece.labels for piece in pieces)


def test_a_character_split_over_tokens_has_one_label_on_all_of_them() -> None:
    text = "'😀' 😀"
    ids, labels = token_labels(embedded_tokenizer(), text, inside_after_each_char(text))
    assert len(ids) == len(labels) > len(text)
    quotes = [at for at, token in enumerate(ids) if embedded_tokenizer().decode([token]) == "'"]
    assert quotes[0] == 0
    assert labels == [1] * quotes[1] + [0] * (len(ids) - quotes[1])


def test_a_python_without_sources_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(InputError, match="no source of its standard library"):
        main_job.load_task(embedded_tokenizer())


def test_task_takes_the_first_pieces_of_each_module_and_keeps_the_parts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_job, "PROBE_TRAIN_MODULES", ("cmd", "netrc"))
    monkeypatch.setattr(main_job, "PROBE_EVAL_MODULES", ("textwrap",))
    monkeypatch.setattr(main_job, "PIECES_PER_MODULE", 2)
    data = main_job.load_task(embedded_tokenizer())
    assert [piece.module for piece in data.train] == ["cmd"] * 2 + ["netrc"] * 2
    assert data.test == list(labelled_pieces(embedded_tokenizer(), "textwrap"))[:2]


# --- labels of generated text --------------------------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    return list(embedded_tokenizer()(text, add_special_tokens=False)["input_ids"])


def generation(tokens: list[int], prompt_length: int) -> Any:
    return SimpleNamespace(tokens=torch.tensor(tokens), prompt_length=prompt_length)


PROMPT, WRITTEN = "def f(x):\n", "    # a note\n    return 'it' + x\n"


def labels_by_decoding(tokens: list[int], prompt_length: int, text: str) -> dict[int, int]:
    """Position in the row -> label, for the generated tokens that are not special; ASCII only."""
    tokenizer, state = embedded_tokenizer(), lexed_by_hand(text)
    found, end = {}, 0
    for at, token in enumerate(tokens):
        if token in tokenizer.all_special_ids:
            continue
        end += len(tokenizer.decode([token]))
        if at >= prompt_length:
            found[at] = state[end - 1]
    return found


@pytest.mark.parametrize("layout", ["bos", "no bos", "eos", "special in the middle", "special in the prompt"])
def test_generated_tokens_get_the_labels_of_their_own_positions(layout: str) -> None:
    tokenizer = embedded_tokenizer()
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = encode(PROMPT + WRITTEN)
    head, tail = ids[: len(encode(PROMPT)) - 1], ids[len(encode(PROMPT)) - 1 :]
    prompt = tokenizer.decode(head)
    before = [] if layout == "no bos" else [bos]
    middle = [pad] if layout == "special in the middle" else []
    if layout == "special in the prompt":
        head = [*head[:2], pad, *head[2:]]
    row = [*before, *head, *tail[:3], *middle, *tail[3:], *([eos] if layout == "eos" else [])]
    prompt_length = len(before) + len(head)
    truth, at = generated_labels(tokenizer, prompt, generation(row, prompt_length))
    expected = labels_by_decoding(row, prompt_length, PROMPT + WRITTEN)
    assert dict(zip(at.tolist(), truth.tolist(), strict=True)) == expected
    assert set(expected.values()) == {0, 1}


def test_generated_labels_stop_where_the_text_stops_to_tokenize() -> None:
    ids = encode(PROMPT + "    y = 'cut\n    z = 1\n")
    prompt_length = len(encode(PROMPT)) - 1
    truth, at = generated_labels(
        embedded_tokenizer(), embedded_tokenizer().decode(ids[:prompt_length]), generation(ids, prompt_length)
    )
    quote = ids.index(encode("'")[0])
    assert at.tolist() == list(range(prompt_length, quote))
    assert not truth.any()


def test_generated_labels_stop_where_the_tokens_are_not_those_of_the_text() -> None:
    tokenizer = embedded_tokenizer()
    ids = encode(PROMPT + "    return x\n# a note\n")
    where = next(
        at for at, token in enumerate(ids) if tokenizer.decode([token]) == " return" or "return" in tokenizer.decode([token])
    )
    pieces = [
        encode(char)[0] for char in tokenizer.decode([ids[where]])
    ]  # the same text, spelled by a model that knows no words
    row = ids[:where] + pieces + ids[where + 1 :]
    assert tokenizer.decode(row) == tokenizer.decode(ids)
    _, at = generated_labels(tokenizer, tokenizer.decode(ids[:2]), generation(row, 2))
    assert at.tolist() == list(range(2, where))


def test_generated_labels_of_nothing_are_empty() -> None:
    ids = encode(PROMPT)
    truth, at = generated_labels(embedded_tokenizer(), PROMPT, generation(ids, len(ids)))
    assert truth.shape == at.shape == (0,)


def test_a_score_that_is_the_truth_reaches_an_auroc_of_one_and_one_that_lags_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows, positions and labels of the live check belong together."""
    tokenizer, bos = embedded_tokenizer(), embedded_tokenizer().bos_token_id
    texts = [PROMPT + WRITTEN, 'x = """a\nb""" + c\n# d\nreturn\n', "import os  # now\nprint('a', \"b\")\n"]
    rows = [[bos, *encode(text)] for text in texts]
    prompts = [tokenizer.decode(row[1:4]) for row in rows]
    state = [[0, *token_labels(tokenizer, text, lexed_by_hand(text))[1]] for text in texts]

    def check(lag: int) -> Any:
        scores = [np.roll(np.array(labels, dtype=np.float32), lag) for labels in state]
        results = [
            SimpleNamespace(tokens=torch.tensor(row), prompt_length=4, scores={"p": torch.from_numpy(score)})
            for row, score in zip(rows, scores, strict=True)
        ]
        monkeypatch.setattr(main_job, "monitored_generate", lambda *_, **__: results)
        model: Any = SimpleNamespace(tokenizer=tokenizer)
        pieces = [LabelledText("m", "", [5, 6], [0, 1])]
        baseline = TokenIdentity(pieces, len(tokenizer))
        weights: Any = SimpleNamespace(name="p")
        return check_live_scores(model, weights, prompts, baseline, max_new_tokens=8, n_bootstrap=20)

    live = check(0)
    assert live.probe.value == 1.0
    assert live.n_rows == 3
    assert live.n_tokens == sum(len(row) - 4 for row in rows)
    assert check(1).probe.value < 0.95


# --- the baseline and the prompts ----------------------------------------------------------------------------------------


def test_token_identity_is_the_smoothed_rate_of_each_token() -> None:
    pieces = [LabelledText("m", "", [3, 3, 4], [1, 0, 1]), LabelledText("m", "", [3, 7], [1, 0])]
    seen: dict[int, list[int]] = {}
    for piece in pieces:
        for token, label in zip(piece.token_ids, piece.labels, strict=True):
            seen.setdefault(token, []).append(label)
    expected = [(sum(seen.get(token, [])) + 1) / (len(seen.get(token, [])) + 2) for token in range(10)]
    np.testing.assert_allclose(TokenIdentity(pieces, 10).scores(list(range(10))), expected)
    assert TokenIdentity(pieces, 10).scores([9, 3]).tolist() == [0.5, 0.6]


def test_live_prompts_are_whole_lines_from_the_first_piece_to_the_last() -> None:
    tokenizer = embedded_tokenizer()
    pieces = list(labelled_pieces(tokenizer, "argparse"))
    prompts = live_prompts(pieces, tokenizer, 5, n_tokens=24)
    assert len(prompts) == 5
    assert pieces[0].text.startswith(prompts[0])
    assert pieces[-1].text.startswith(prompts[-1])
    for prompt in prompts:
        lines = re.findall(r"[^\n]*\n", prompt)
        assert "".join(lines) == prompt
        assert len(encode("".join(lines[:-1]))) < 24 <= len(encode(prompt))


def test_source_is_read_as_its_coding_line_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\r\n".encode("latin-1"))
    (tmp_path / "pack" / "__init__.py").write_text("y = 1\n")
    (tmp_path / "pack" / "part.py").write_text("z = 1\n")
    monkeypatch.setattr(task.sysconfig, "get_path", lambda name: str(tmp_path))
    assert (stdlib_source("latin") or "").endswith("x = 'é'\n")
    assert stdlib_source("pack") == "y = 1\n"
    assert stdlib_source("pack.part") == "z = 1\n"
    assert INSIDE == 1
