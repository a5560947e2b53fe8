"""Prompts, labels and scores as files: text lines, JSONL and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmprobe_tl.errors import InputError

Record = dict[str, Any]

_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # JSON can spell them


def read_labelled(path: Path, text_column: str, label_column: str) -> tuple[list[str], list[Any]]:
    """Texts and labels of a .jsonl or .csv file, a record each."""
    prompts, labels = read_columns(path, text_column, label_column)
    return prompts, labels


def read_columns(path: Path, *columns: str) -> list[list[Any]]:
    """The values of each column of a .jsonl or .csv file."""
    records = _read_records(path)
    return [[_field(record, column, path, number) for number, record in records] for column in columns]


def has_column(path: Path, column: str) -> bool:
    """Whether the first record of a .jsonl or .csv file has such a column."""
    return column in _read_records(path)[0][1]


def read_prompts(source: str, text_column: str) -> list[str]:
    """Texts of a .jsonl or .csv file, or the lines of a text file, or of standard input for '-'."""
    if source == "-":
        return _lines(read_standard_input(), "standard input")
    path = Path(source)
    if path.suffix.lower() in _READERS:
        return [_field(record, text_column, path, number) for number, record in _read_records(path)]
    if path.suffix.lower() not in (".txt", ""):
        raise InputError(f"{str(path)!r} has no known format; expected a name ending in .txt, .jsonl or .csv.")
    return _lines(_read_text(path), str(path))


def read_standard_input() -> str:
    """All of standard input, which has to be UTF-8 whatever the locale says."""
    return _decoded(sys.stdin.buffer.read(), "standard input").replace("\r\n", "\n")


def _lines(text: str, where: str) -> list[str]:
    # not str.splitlines, which would cut a prompt at a form feed or at U+2028, too
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{where} holds no prompt; expected one a line.")
    return lines


def _read_text(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), repr(str(path)))
    except FileNotFoundError:
        raise InputError(f"there is no file {str(path)!r}.") from None
    except IsADirectoryError:
        raise InputError(f"{str(path)!r} is a folder; expected a file.") from None


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}).") from error


def _read_records(path: Path) -> list[tuple[int, Record]]:
    """Records with their line numbers."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{str(path)!r} has no known format; expected a name ending in .jsonl or .csv.")
    records = reader(_read_text(path), path)
    if not records:
        raise InputError(f"{str(path)!r} holds no record.")
    return records


def _from_jsonl(text: str, path: Path) -> list[tuple[int, Record]]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: broken JSON, or a number with thousands of digits
            raise InputError(f"{path}, line {number}: no JSON ({error}).") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: expected an object with a text and a label, got {line[:40]!r}.")
        records.append((number, record))
    return records


def _from_csv(text: str, path: Path) -> list[tuple[int, Record]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records = []
    try:
        for record in reader:
            if None in record:  # where DictReader puts what is too much
                raise InputError(
                    f"{path}, line {reader.line_num}: more fields than the {len(record) - 1} of the header. "
                    "Put quotes around a text with commas."
                )
            records.append((reader.line_num, record))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: broken CSV ({error}).") from error
    return records


_READERS: dict[str, Callable[[str, Path], list[tuple[int, Record]]]] = {".jsonl": _from_jsonl, ".csv": _from_csv}


def _field(record: Record, column: str, path: Path, number: int) -> Any:
    where, value = f"{path}, line {number}", record.get(column)
    if value is None and column in record:
        raise InputError(f"{where}: {column!r} has no value.")
    if value is None:
        raise InputError(f"{where}: no {column!r}; it has {', '.join(map(repr, record))}. Name the column with an option.")
    if isinstance(value, str) and _HALF_CHARACTERS.search(value):
        raise InputError(f"{where}: {column!r} holds half a character (a lone surrogate), which is no text.")
    return value


def write_records(records: list[Record], out: Path | None) -> None:
    """Write a .csv or .jsonl file, or JSONL to standard output."""
    if out is None:
        escape = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        for record in records:
            print(json.dumps(record, ensure_ascii=escape))
        return
    with out.open("w", encoding="utf-8", newline="") as file:
        if out.suffix.lower() == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        else:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    print(f"{out}: {len(records)} prompts")
