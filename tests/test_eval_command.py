"""`lmprobe-tl eval` as its users call it."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from embedded import embedded_model
from sweep_data import with_a_word
from test_cli import LABELS, TEXTS, Ran, Run, no_model_may_load, run, write  # noqa: F401

from lmprobe_tl import Probe, ProbeReport, evaluate_probe, evaluate_shift, load_probe

TRAIN, TEST, OTHER = with_a_word(40, 0), with_a_word(40, 1), with_a_word(24, 2)
SOURCES = [("forum", "news", "日本語")[at % 3] for at in range(40)]
QUICK = ["--draws", 3, "--resamples", 100]


def jsonl(path: Path, texts: list[Any], labels: list[Any], sources: list[str] | None = None) -> Path:
    records: list[dict[str, Any]] = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    for record, source in zip(records, sources or [], strict=False):
        record["source"] = source
    return write(path, "\n".join(map(json.dumps, records)))


@pytest.fixture(scope="module")
def probe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = Probe(embedded_model(), 3, name="word", random_state=0).fit(*TRAIN)
    return probe.save(tmp_path_factory.mktemp("probe") / "word.safetensors")


def test_eval_prints_and_writes_what_the_library_finds(run: Run, probe_file: Path, tmp_path: Path) -> None:  # noqa: F811
    files = [
        jsonl(tmp_path / "train.jsonl", *TRAIN, SOURCES),
        jsonl(tmp_path / "test.jsonl", *TEST, SOURCES),
        jsonl(tmp_path / "other.jsonl", *OTHER),
    ]
    out = tmp_path / "out.json"
    options = ["--train", files[0], "--prompts", files[1], "--group", "source", "--shift", f"other={files[2]}"]
    options += ["--shift", f"again={files[1]}", *QUICK, "--seed", 2, "--json", out, "--tokens"]
    printed = run("eval", probe_file, *options).fine
    settings: dict[str, Any] = {"model": embedded_model(), "n_bootstrap": 100, "random_state": 2}
    weights = load_probe(probe_file)
    expected = evaluate_probe(
        weights, *TEST, train=(*TRAIN, SOURCES), groups=SOURCES, n_draws=3, keep_tokens=True, **settings
    )
    expected = expected.with_shift(evaluate_shift(weights, TEST, {"other": OTHER, "again": TEST}, **settings))
    assert printed == f"{expected.table()}\n\n{out}: the whole record\n"
    assert ProbeReport.from_json(out.read_text()) == expected
    assert set(expected.controls) == {"bag_of_words", "layer_0", "length", "group", "random_direction", "shuffled_labels"}
    for line in expected.table().splitlines():
        assert len(line) + sum(unicodedata.east_asian_width(char) in "WF" for char in line) <= 80
    assert expected.examples.texts is not None


def test_eval_without_training_prompts_names_what_did_not_run(run: Run, probe_file: Path, tmp_path: Path) -> None:  # noqa: F811
    data = jsonl(tmp_path / "test.jsonl", *TEST, SOURCES)
    printed = run("eval", probe_file, "--prompts", data, *QUICK).fine
    for name in ("bag_of_words", "layer_0", "shuffled_labels"):
        assert f"  not run: {name}: needs the training prompts (train)" in printed
    assert "  length  " in printed and "  random_direction  " in printed
    untagged = jsonl(tmp_path / "train.jsonl", *TRAIN)
    printed = run("eval", probe_file, "--prompts", data, "--train", untagged, "--group", "source", *QUICK).fine
    assert "not run: group: needs the groups of the training prompts" in printed
    assert "  group                 prompts  AUROC" in printed and "worst" not in printed  # all are as good
    printed = run("eval", probe_file, "--prompts", data, "--controls", "length", *QUICK).fine
    assert "random_direction" not in printed and "not run" not in printed
    assert "verdict: undecided" in run("eval", probe_file, "--prompts", data, "--controls", "none", *QUICK).fine


def test_eval_reads_labels_that_csv_spells_as_text(run: Run, probe_file: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = "\n".join(f'"{text}",{label}' for text, label in zip(*TEST, strict=True))
    data = write(tmp_path / "test.csv", f"prompt,kind\n{rows}\n")
    columns = ["--text-column", "prompt", "--label-column", "kind"]
    printed = run("eval", probe_file, "--prompts", data, *columns, *QUICK).fine
    assert printed == run("eval", probe_file, "--prompts", jsonl(tmp_path / "test.jsonl", *TEST), *QUICK).fine


def test_eval_takes_a_label_for_each_token(run: Run, tmp_path: Path) -> None:  # noqa: F811
    rows = [embedded_model().tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    labels = [[token % 2 for token in row] for row in rows]
    path = Probe(embedded_model(), 1, "all", name="even", random_state=0).fit(TEXTS, labels).save(tmp_path / "e.safetensors")
    printed = run("eval", path, "--prompts", jsonl(tmp_path / "d.jsonl", TEXTS, labels), *QUICK).fine
    assert f"24 prompts, {sum(map(len, rows))} tokens" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{probe}"], "Missing option '--prompts'"),
        (["none.safetensors", "--prompts", "{data}"], "there is no such file"),
        (["{data}", "--prompts", "{data}"], "it is not a safetensors file"),
        (["{probe}", "--prompts", "none.jsonl"], "there is no file 'none.jsonl'"),
        (["{probe}", "--prompts", "d.txt"], "no known format"),
        (["{probe}", "--prompts", "{data}", "--train", "none.csv"], "there is no file 'none.csv'"),
        (["{probe}", "--prompts", "{data}", "--group", "source"], "line 1: no 'source'; it has 'text', 'label'"),
        (["{probe}", "--prompts", "{data}", "--json", "x.txt"], "--json is 'x.txt'; expected a name ending in .json"),
        (["{probe}", "--prompts", "{data}", "--json", "no/x.json"], "--json is 'no/x.json', but there is no folder"),
        (["{probe}", "--prompts", "{data}", "--tokens"], "--tokens is of the record; name its file with --json"),
        (["{probe}", "--prompts", "{data}", "--shift", "{data}"], "expected NAME=FILE, such as forum=forum.jsonl"),
        (["{probe}", "--prompts", "{data}", "--shift", "=x"], "--shift is '=x'"),
        (["{probe}", "--prompts", "{data}", "--shift", "a=none.csv"], "there is no file 'none.csv'"),
        (["{probe}", "--prompts", "{data}", "--shift", "a={data}", "--shift", "a={data}"], "names 'a' more than once"),
        (["{probe}", "--prompts", "{data}", "--controls", "bag"], "control 'bag' is unknown; expected 'default', None, or"),
        (["{probe}", "--prompts", "{data}", "--draws", "0"], "--draws"),
        (["{probe}", "--prompts", "{data}", "--resamples", "0"], "--resamples"),
        (
            ["{probe}", "--prompts", "one.jsonl"],
            "one.jsonl: all are 1; an evaluation needs examples of at least two classes",
        ),
        (["{probe}", "--prompts", "words.jsonl"], "words.jsonl: 'no' is no label of the probe; expected those of [0, 1]"),
        (["{probe}", "--prompts", "{data}", "--train", "one.jsonl"], "one.jsonl: all are 1"),
        (["{probe}", "--prompts", "{data}", "--shift", "a=words.jsonl"], "words.jsonl: 'no' is no label of the probe"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_model_is_loaded(
    run: Run,  # noqa: F811
    probe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    no_model_may_load(monkeypatch)
    monkeypatch.chdir(tmp_path)
    names = {"probe": probe_file, "data": jsonl(tmp_path / "d.jsonl", *TEST)}
    jsonl(tmp_path / "one.jsonl", TEXTS, [1] * 24)
    jsonl(tmp_path / "words.jsonl", TEXTS, ["yes" if label else "no" for label in LABELS])
    before = sorted(tmp_path.rglob("*"))
    assert says in run("eval", *(argument.format(**names) for argument in arguments)).error
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_ctrl_c_leaves_no_record_behind(
    run: Run,  # noqa: F811
    probe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmprobe_tl.probe_evaluation.run_controls", interrupted)
    data, out = jsonl(tmp_path / "d.jsonl", *TEST), tmp_path / "out.json"
    ran = run("eval", probe_file, "--prompts", data, "--json", out)
    assert ran == Ran(130, "", "lmprobe-tl: interrupted\n")
    assert not out.exists()
