"""Files of prompts, labels and scores: nothing is lost, cut or taken for something else without a word."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmprobe_tl.cli.data_files import read_labelled, read_prompts, read_standard_input, write_records
from lmprobe_tl.errors import InputError

# Line ends to str.splitlines, but not to anybody who writes JSONL, CSV or lines of text.
NO_LINE_ENDS = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"
TEXTS = st.text(
    st.one_of(st.sampled_from([*"ab,\"'\n\r\t", "\u2028", "\x85", "\x0c", "é", "😀"]), st.characters(codec="utf-8")),
    max_size=20,
)
RELAXED = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@RELAXED
@given(
    st.lists(st.tuples(TEXTS, st.one_of(st.integers(-3, 3), st.booleans(), TEXTS)), min_size=1, max_size=5), st.booleans()
)
def test_jsonl_round_trip_keeps_every_text_and_label(tmp_path: Path, rows: list, escape: bool) -> None:
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=escape) for text, label in rows]
    prompts, labels = read_labelled(write(tmp_path / "d.jsonl", "\n".join(lines)), "text", "label")
    assert list(zip(prompts, labels, strict=True)) == rows
    assert [type(label) for label in labels] == [type(label) for _, label in rows]


@RELAXED
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_csv_round_trip_keeps_every_text_line_ends_and_all(tmp_path: Path, rows: list, end: str) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *rows])
    prompts, labels = read_labelled(write(tmp_path / "d.csv", file.getvalue()), "text", "label")
    assert list(zip(prompts, labels, strict=True)) == rows


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv", "O.CSV", None])
def test_written_records_are_read_back(
    tmp_path: Path, name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [NO_LINE_ENDS, 'a,"b"\nc', "é😀", "x\r\ny"]
    out = None if name is None else tmp_path / name
    write_records([{"text": text, "score": 0.5} for text in texts], out)
    printed = capsys.readouterr().out
    if out is None:
        out = write(tmp_path / "printed.jsonl", printed)
        assert "é😀" in printed
    else:
        assert printed == f"{out}: 4 prompts\n"
    assert read_prompts(str(out), "text") == texts


def test_records_on_a_terminal_without_unicode_are_still_json(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    write_records([{"text": "é😀"}], None)
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == {"text": "é😀"}


def test_lines_of_text_are_cut_at_line_ends_only_and_blank_ones_left_out(tmp_path: Path) -> None:
    for end in ("\n", "\r\n"):
        path = write(tmp_path / "p.txt", end.join(["one", "", NO_LINE_ENDS, "  ", "  two ", ""]))
        assert read_prompts(str(path), "text") == ["one", NO_LINE_ENDS, "  two "]
    assert read_prompts(str(write(tmp_path / "no_suffix", "one\n")), "text") == ["one"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert read_prompts(str(write(tmp_path / "p.txt", b"\xef\xbb\xbfone\n")), "text") == ["one"]
    assert read_prompts(str(write(tmp_path / "p.csv", b"\xef\xbb\xbftext\r\none\r\n")), "text") == ["one"]
    assert read_prompts(str(write(tmp_path / "p.jsonl", b'\xef\xbb\xbf{"text": "one"}')), "text") == ["one"]


def standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))


def test_standard_input_is_utf_8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, "é\r\n😀\n".encode(), encoding="ascii")
    assert read_prompts("-", "text") == ["é", "😀"]
    standard_input(monkeypatch, "é\r\nb".encode(), encoding="latin-1")
    assert read_standard_input() == "é\nb"
    standard_input(monkeypatch, b"a\xff")
    with pytest.raises(InputError, match=r"standard input is not UTF-8 text \(byte 1\)"):
        read_prompts("-", "text")
    standard_input(monkeypatch, b"\n \n")
    with pytest.raises(InputError, match="standard input holds no prompt"):
        read_prompts("-", "text")


def test_other_columns_and_column_order_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", 'id,y,prompt\n1,no,"a, b"\n\n2,yes,c\n')
    assert read_labelled(path, "prompt", "y") == (["a, b", "c"], ["no", "yes"])
    path = write(tmp_path / "d.JSONL", '{"id": 1, "y": true, "prompt": "a"}\n\n{"prompt": "b", "y": false}\n')
    assert read_labelled(path, "prompt", "y") == (["a", "b"], [True, False])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', "line 2: no JSON"),
        ("d.jsonl", '{"text": "a", "label": ' + "1" * 5000 + "}", "line 1: no JSON"),
        ("d.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("d.jsonl", '{"text": "a", "label": 1}\n["b", 0]\n', "line 2: expected an object"),
        ("d.jsonl", '\n\n{"text": "a"}\n', "line 3: no 'label'; it has 'text'"),
        ("d.jsonl", '{"text": null, "label": 1}\n', "line 1: 'text' has no value"),
        ("d.jsonl", '{"text": "a\\ud800b", "label": 1}\n', "line 1: 'text' holds half a character"),
        ("d.jsonl", "\n \n", "holds no record"),
        ("d.csv", "", "holds no record"),
        ("d.csv", "text,label\n", "holds no record"),
        ("d.csv", "text;label\na;1\n", "line 2: no 'text'; it has 'text;label'"),
        ("d.csv", "text,label\na,1\nb\n", "line 3: 'label' has no value"),
        ("d.csv", "text,label\na,1\nhello, world,0\n", "line 3: more fields than the 2 of the header"),
        ("d.csv", 'text,label\n"a"b,1\n', "line 2: broken CSV"),
        ("d.csv", 'text,label\n"a,1\n', "broken CSV"),
        ("d.csv", b"text,label\ncaf\xe9,1\n", "is not UTF-8 text (byte 14)"),
        ("d.csv", "text,label\na,1\n".encode("utf-16"), "is not UTF-8 text (byte 0)"),
        ("d.txt", "a\n", "has no known format; expected a name ending in .jsonl or .csv"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as raised:
        read_labelled(path, "text", "label")
    assert says in str(raised.value)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.txt", "there is no file"),
        ("none.jsonl", "there is no file"),
        ("folder", "is a folder"),
        ("folder.csv", "is a folder"),
        ("prompts.json", "no known format; expected a name ending in .txt, .jsonl or .csv"),
        ("empty.txt", "holds no prompt"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path: Path, name: str, says: str) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    elif not name.startswith("none"):
        write(tmp_path / name, "\n")
    with pytest.raises(InputError) as raised:
        read_prompts(str(tmp_path / name), "text")
    assert says in str(raised.value)
