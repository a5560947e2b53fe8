"""The demo's task: after this token, is the text inside a comment or a string literal?

The text is the source of Python's own standard library; the labels are computed by Python's `tokenize`, so they are exact
and they exist for text that a model writes, too. A bag of tokens cannot solve the task: a quote opens or closes, and
the same word stands in code and in prose.
"""

from __future__ import annotations

import io
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

INSIDE, OUTSIDE, UNKNOWN = 1, 0, -1

_OPENING = re.compile(r"""(?P<prefix>[rRbBuUfFtT]{0,2})(?P<quotes>\"{3}|'{3}|["'])""")
_CLOSING = {quote: re.compile(rf"(?P<body>(?:[^\\\n{quote}]|\\(?:\r\n|.))*){quote}", re.DOTALL) for quote in "'\""} | {
    3 * quote: re.compile(rf"(?P<body>(?:[^\\]|\\.)*?){3 * quote}", re.DOTALL) for quote in "'\""
}
_NESTED = re.compile(r"""'[^'\n]*'|"[^"\n]*\"""")
_BLANK = re.compile(r"(?:[ \t\f\r\n]|\\\r?\n)*")

# Names that exist in every supported Python. None of these modules is in the language model's training text.
PROBE_TRAIN_MODULES = (
    "ast", "bisect", "calendar", "cmd", "codeop", "copy", "csv", "difflib", "fnmatch", "fractions", "getopt", "glob",
    "gzip", "heapq", "hmac", "imaplib", "ipaddress", "keyword", "mailbox", "netrc", "optparse", "pickletools", "plistlib",
    "pprint", "profile", "sched", "shelve", "smtplib", "stat", "timeit", "trace", "uuid", "weakref", "zipapp",
)  # fmt: skip
PROBE_EVAL_MODULES = (
    "argparse", "base64", "bdb", "configparser", "contextlib", "filecmp", "ftplib", "functools", "graphlib", "poplib",
    "queue", "random", "reprlib", "shlex", "shutil", "socketserver", "statistics", "string", "tabnanny", "tempfile",
    "textwrap", "threading", "warnings", "wave",
)  # fmt: skip


@dataclass(frozen=True)
class LabelledText:
    """A piece of source with its tokens: `token_ids` and `labels` (1 inside, 0 outside) have one entry a token, no BOS."""

    module: str
    text: str
    token_ids: list[int]
    labels: list[int]


def stdlib_source(module: str) -> str | None:
    """Source of a standard-library module given by dotted name, or None where this Python does not ship it."""
    base = Path(sysconfig.get_path("stdlib")) / Path(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            with tokenize.open(path) as file:
                return file.read()
    return None


def inside_after_each_char(text: str) -> list[int]:
    """For each character of Python source: 1 if the text right after it is inside a comment or string literal, else 0.

    An f-string is inside from its first quote to its last, replacement fields included, on every Python. Where the text
    stops to tokenize (a cut string, a bad dedent), or where Pythons disagree on it (an f-string that uses its own quotes in
    a field, allowed since 3.12), the state is known up to there and UNKNOWN (-1) after; an unclosed triple-quoted string is
    INSIDE to the end.
    """
    text = re.sub(r"\r(?!\n)", "\n", text)  # a line end to Python, but not to `tokenize`
    line_starts = _line_starts(text)

    def offset(position: tuple[int, int]) -> int:
        row, column = position
        return min(line_starts[min(row, len(line_starts)) - 1] + column, len(text))

    state = [UNKNOWN] * len(text)
    known = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = tokenize.tok_name[token.type]
            start, end = offset(token.start), offset(token.end)
            if kind == "ERRORTOKEN" and set(token.string) & set("'\"\\"):
                break  # a string without an end, or a stray backslash: Python 3.12 and later raise instead
            if end <= known:
                continue  # a part of an f-string, which is taken as a whole
            first_inside = last_inside = end
            if kind == "COMMENT":
                first_inside = start
            elif kind in ("STRING", "FSTRING_START", "TSTRING_START"):
                whole = _literal(text, start)
                if whole is None:
                    break
                first_inside, end = whole
                first_inside, last_inside = first_inside - 1, end - 1
            state[known:end] = [OUTSIDE] * (end - known)
            state[first_inside:last_inside] = [INSIDE] * (last_inside - first_inside)
            known = end
        else:
            state[known:] = [OUTSIDE] * (len(text) - known)
            return state
    except (tokenize.TokenError, SyntaxError):
        pass
    _mark_rest(text, state, known)
    return state


def lines_of(text: str) -> list[str]:
    """Lines with their ends, as `tokenize` counts them: str.splitlines would also split at form feeds and the like."""
    return list(io.StringIO(text))


def _line_starts(text: str) -> list[int]:
    """Offset of each line, and at last the length of the text."""
    return list(accumulate((len(line) for line in lines_of(text)), initial=0))


def _literal(text: str, start: int) -> tuple[int, int] | None:
    """Where the body of the string literal at `start` begins and where the literal ends, prefix and quotes included; None
    if it is not closed, or if its replacement fields are not."""
    opening = _OPENING.match(text, start)
    closed = opening and _CLOSING[opening["quotes"]].match(text, opening.end())
    if not opening or not closed:
        return None
    has_fields = set(opening["prefix"]) & set("fFtT")
    if has_fields and not _fields_are_closed(closed["body"]):
        return None
    return opening.end(), closed.end()


def _fields_are_closed(body: str) -> bool:
    """Whether each brace of an f-string's body that opens a replacement field is closed in it."""
    depth, at = 0, 0
    while at < len(body):
        nested = _NESTED.match(body, at) if depth else None
        if depth == 0 and body[at : at + 2] in ("{{", "}}"):
            at += 2
        elif nested:
            at = nested.end()
        else:
            depth += {"{": 1, "}": -1}.get(body[at], 0)
            if depth < 0:
                return False
            at += 1
    return depth == 0


def _mark_rest(text: str, state: list[int], known: int) -> None:
    """Fill in what is sure where the tokenizer gave up: blanks, and a triple-quoted string that is never closed."""
    blank = _BLANK.match(text, known)
    at = blank.end() if blank else known
    opening = _OPENING.match(text, at)
    endless = opening and len(opening["quotes"]) == 3 and not _CLOSING[opening["quotes"]].match(text, opening.end())
    if opening:
        at = opening.end() - 1 if endless else opening.start("quotes")
    state[known:at] = [OUTSIDE] * (at - known)
    if endless:
        state[at:] = [INSIDE] * (len(text) - at)


def token_labels(tokenizer: Any, text: str, state: list[int]) -> tuple[list[int], list[int]]:
    """Token ids of `text` and the state after each token's last character; a fast Hugging Face tokenizer gives the
    offsets."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [state[end - 1] for _, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), labels


def top_level_starts(text: str) -> list[int]:
    """Offsets at which a top-level statement, or a comment line before one, begins: there the state is known to be
    outside."""
    line_starts = _line_starts(text)
    starts, fresh = [], True
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = tokenize.tok_name[token.type]
            if kind in ("NL", "INDENT", "DEDENT", "ENDMARKER"):
                continue
            if fresh and token.start[1] == 0:
                starts.append(line_starts[token.start[0] - 1])
            if kind != "COMMENT":
                fresh = kind == "NEWLINE"
    except (tokenize.TokenError, SyntaxError):
        pass
    return starts


def labelled_pieces(tokenizer: Any, module: str, *, min_tokens: int = 48, max_tokens: int = 192) -> Iterator[LabelledText]:
    """Pieces of a module, each from the start of a top-level statement on, whole lines, at most `max_tokens` tokens,
    disjoint."""
    text = stdlib_source(module)
    if text is None:
        return
    state = inside_after_each_char(text)
    end_of_last = 0
    for start in top_level_starts(text):
        if start < end_of_last:
            continue
        at, taken = start, 0
        for line in lines_of(text[start:]):
            length = len(tokenizer(line, add_special_tokens=False)["input_ids"])
            if taken + length > max_tokens:
                break
            at, taken = at + len(line), taken + length
        piece_ids, labels = token_labels(tokenizer, text[start:at], state[start:at])
        if min_tokens <= len(piece_ids) <= max_tokens and UNKNOWN not in labels:
            end_of_last = at
            yield LabelledText(module, text[start:at], piece_ids, labels)
