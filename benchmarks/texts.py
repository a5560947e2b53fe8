"""Real ragged text: comments, docstrings and functions of Python's standard library, 5 to 400 tokens each."""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

SHORTEST, LONGEST = 5, 400


def ragged_texts(tokenizer: Any, n: int, *, longest: int = LONGEST, seed: int = 0) -> list[str]:
    """`n` different texts in random order, of `SHORTEST` to `longest` tokens by this tokenizer, longer ones cut.

    Where the library has too few, numbered ones are made of those that it has.
    """
    rng = random.Random(seed)
    pieces = rng.sample(standard_library_pieces(), len(standard_library_pieces()))
    chosen: dict[str, None] = {}
    for start in range(0, len(pieces), 512):
        some = pieces[start : start + 512]
        encoded = tokenizer(some, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, spans in zip(some, encoded["offset_mapping"], strict=True):
            if len(spans) >= SHORTEST:
                chosen[text if len(spans) <= longest else text[: spans[longest - 1][1]]] = None
        if len(chosen) >= n:
            break
    texts = list(chosen)
    return [*texts[:n], *(f"# {number}\n{texts[number % len(texts)]}" for number in range(n - len(texts)))]


@cache
def standard_library_pieces() -> tuple[str, ...]:
    """Comments, docstrings and functions, each once, in the order of files and lines."""
    root, found = Path(sysconfig.get_path("stdlib")), dict[str, None]()
    for path in sorted(root.glob("*.py")):
        if not {"test", "tests", "idle_test", "lib2to3"} & set(path.relative_to(root).parts):
            try:
                source = path.read_text(encoding="utf-8")
                found.update(dict.fromkeys(_pieces(source)))
            except (SyntaxError, UnicodeDecodeError):
                continue
    return tuple(found)


def _pieces(source: str) -> Iterator[str]:
    lines = source.splitlines(keepends=True)
    yield from _comments(lines)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield "".join(lines[node.lineno - 1 : node.end_lineno])


def _comments(lines: Sequence[str]) -> Iterator[str]:
    """Comment lines that follow each other, as one."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.lstrip().startswith("#"):
            block.append(line.lstrip())
        elif block:
            yield "".join(block)
            block = []


class NumberedTexts(Sequence[str]):
    """`n` short texts, all different, made when they are asked for, so that they take no memory."""

    def __init__(self, texts: Sequence[str], n: int) -> None:
        self._texts, self._n = texts, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._n:
            raise IndexError(index)
        return f"# {index}\n{self._texts[index % len(self._texts)]}"
