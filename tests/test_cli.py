"""The command as its users call it: each subcommand in this process, and a few times as a process of its own."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from embedded import embedded_model
from sklearn.exceptions import ConvergenceWarning
from test_report import Page
from tiny_terminal import TinyTerminal

from lmprobe_tl import ActivationStore, Probe, calibrate_probe, cli, demo, extract_activations, load_probe, sweep
from lmprobe_tl.demo import main_job
from lmprobe_tl.estimators import CLASSIFIERS, SEQUENCE_CLASSIFIERS
from lmprobe_tl.weights import ProbeWeights

PROSE = ["A good day", "We went out", "The rain fell", "She said so", "Nobody knew", "It was late"] * 2
CODE = ["import os", "x = 1", "def f(x):", "return y", "for i in x:", "class C:"] * 2
TEXTS = [f"{text} {at}" for at, text in enumerate(PROSE + CODE)]
LABELS = [1] * len(PROSE) + [0] * len(CODE)
PROMPTS = ["It was a good idea", "import sys", "y = f(x)  # 'a, b'", "é 😀\u2028."]
STARTS = "import sys; from lmprobe_tl.cli.app import main; main()"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        assert self.code == 2, self
        assert self.out == "", self
        (line,) = self.err.splitlines()
        assert line.startswith("lmprobe-tl: error: "), self
        return line.removeprefix("lmprobe-tl: error: ")

    @property
    def fine(self) -> str:
        assert self.code == 0, self
        assert "Traceback" not in self.err
        return self.out

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.fine.split("\n")[:-1]]


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command in this process, with the embedded model loaded already."""
    monkeypatch.setattr(demo, "load_demo_model", embedded_model)
    monkeypatch.setattr(main_job, "load_demo_model", embedded_model)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` puts its own in place

    def call(*arguments: Any, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "argv", ["lmprobe-tl", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return Ran(code, printed.out, printed.err)

    return call


def no_model_may_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the model was loaded")

    for module in ("options", "fit", "generate", "score", "sweep", "eval"):
        monkeypatch.setattr(f"lmprobe_tl.cli.{module}.load_or_demo", never)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(path: Path, texts: list[Any], labels: list[Any]) -> Path:
    lines = (json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True))
    return write(path, "\n".join(lines))


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Probe files on the embedded model, made by the library and not by the command."""
    folder = tmp_path_factory.mktemp("probes")
    probe = Probe(embedded_model(), 3, name="prose", random_state=0).fit(TEXTS, LABELS)
    live = Probe(embedded_model(), [1, 3], "all", name="live", random_state=0).fit(TEXTS, LABELS)
    three = Probe(embedded_model(), 3, name="three", random_state=0).fit(TEXTS, ["abc"[at % 3] for at in range(len(TEXTS))])
    return {one.name: one.save(folder / f"{one.name}.safetensors") for one in (probe, live, three)}


# --- fit -----------------------------------------------------------------------------------------------------------------


def test_fit_saves_the_probe_that_the_library_fits(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    ran = run("fit", jsonl(tmp_path / "d.jsonl", TEXTS, LABELS), "--out", out, "--hook-points", "3", "--test-share", "0")
    assert ran.fine == f"{out}: probe 'mine' at blocks.3.hook_resid_post, trained on {len(TEXTS)} prompts\n"
    own = Probe(embedded_model(), 3, random_state=0).fit(TEXTS, LABELS).weights_
    saved = load_probe(out)
    torch.testing.assert_close(saved.direction, own.direction, rtol=1e-4, atol=1e-5)
    assert saved.labels == (0, 1)
    assert saved.spec.metrics == {}
    assert saved.spec.training is not None
    assert saved.spec.training.class_counts == (len(CODE), len(PROSE))


def test_fit_holds_out_a_share_of_each_class_and_reports_on_it(run: Run, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", TEXTS, LABELS)
    out = tmp_path / "p.safetensors"
    lines = run("fit", data, "-o", out, "--test-share", "0.25", "--seed", "3").fine.splitlines()
    saved = load_probe(out)
    assert saved.spec.training is not None
    assert saved.spec.training.n_prompts == 18
    assert saved.spec.training.class_counts == (9, 9)
    assert saved.spec.training.random_state == 3
    assert {metric.n for metric in saved.spec.metrics.values()} == {6}
    assert lines[0].endswith("trained on 18 prompts")
    metrics = {name: f"{metric.value:.3f}" for name, metric in saved.spec.metrics.items()}
    shown = [re.fullmatch(r"(\w+(?:\.\d+)?): (\d\.\d{3})( \[.*\])? on 6 held-out prompts", line) for line in lines[1:]]
    assert {line[1]: line[2] for line in shown if line} == metrics
    assert len(shown) == len(metrics) == 3
    assert run("fit", data, "-o", tmp_path / "q.safetensors", "--test-share", "0.25", "--seed", "3").code == 0
    torch.testing.assert_close(load_probe(tmp_path / "q.safetensors").direction, saved.direction)


def test_fit_reports_the_score_of_prompts_that_it_did_not_train_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[list[str], list[int]]] = {}
    for step in ("fit", "evaluate"):
        method = getattr(Probe, step)

        def spy(
            self: Probe, prompts: Any, labels: Any, *rest: Any, _step: str = step, _method: Any = method, **named: Any
        ) -> Any:
            seen[_step] = (list(prompts), list(labels))
            return _method(self, prompts, labels, *rest, **named)

        monkeypatch.setattr(Probe, step, spy)
    assert run("fit", jsonl(tmp_path / "d.jsonl", TEXTS, LABELS), "-o", tmp_path / "p.safetensors").code == 0
    (trained, trained_labels), (held_out, held_out_labels) = seen["fit"], seen["evaluate"]
    assert sorted(trained + held_out) == sorted(TEXTS)
    truth = dict(zip(TEXTS, LABELS, strict=True))
    assert [truth[text] for text in trained + held_out] == trained_labels + held_out_labels


def test_fit_reads_csv_with_words_for_labels_and_columns_of_any_name(run: Run, tmp_path: Path) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(
        [("kind", "prompt"), *(("prose" if y else "code", text) for text, y in zip(TEXTS, LABELS, strict=True))]
    )
    data, out = write(tmp_path / "d.csv", file.getvalue()), tmp_path / "p.safetensors"
    ran = run(
        *("fit", data, "--out", out, "--text-column", "prompt", "--label-column", "kind", "--name", "my probe"),
        *("--hook-points", "1, -1,blocks.2.hook_resid_pre", "--pooling", "mean", "--classifier", "mass_mean", "--no-bos"),
    )
    assert ran.fine
    saved = load_probe(out)
    assert saved.labels == ("code", "prose")
    assert saved.name == "my probe"
    assert saved.hook_points == ("blocks.1.hook_resid_post", "blocks.5.hook_resid_post", "blocks.2.hook_resid_pre")
    assert saved.spec.pooling.train == saved.spec.pooling.inference == "mean"
    assert saved.spec.tokenizer.prepend_bos is False
    assert saved.spec.training is not None
    assert "mass" in saved.spec.training.classifier.lower()


@pytest.mark.parametrize(("option", "names"), [("all", 6), ("-2", 1), ("0", 1)])
def test_fit_takes_layers_counted_from_either_end_and_all(run: Run, tmp_path: Path, option: str, names: int) -> None:
    out = tmp_path / "p.safetensors"
    assert (
        run("fit", jsonl(tmp_path / "d.jsonl", TEXTS, LABELS), "-o", out, "--hook-points", option, "--test-share", 0).code
        == 0
    )
    expected = range(6) if option == "all" else [int(option) % 6]
    assert load_probe(out).hook_points == tuple(f"blocks.{layer}.hook_resid_post" for layer in expected)
    assert len(expected) == names


@pytest.mark.filterwarnings("default::lmprobe_tl.errors.LmprobeWarning")
def test_fit_warns_in_one_line_and_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = jsonl(tmp_path / "d.jsonl", TEXTS, LABELS), tmp_path / "p.safetensors"
    ran = run("fit", data, "-o", out, "--inference-pooling", "score:max", "--test-share", "0")
    assert ran.fine.startswith(str(out))
    assert re.fullmatch(r"lmprobe-tl: warning: trained with pooling 'last_token', used with 'score:max'.*\n", ran.err)
    assert load_probe(out).spec.pooling.inference == "score:max"
    own_fit = Probe.fit

    def restless(self: Probe, *arguments: Any) -> Probe:
        warnings.warn("lbfgs failed\nto converge", ConvergenceWarning, stacklevel=1)
        warnings.warn("of no interest", DeprecationWarning, stacklevel=1)
        return own_fit(self, *arguments)

    monkeypatch.setattr(Probe, "fit", restless)
    assert run("fit", data, "-o", out, "--test-share", "0").err == "lmprobe-tl: warning: lbfgs failed to converge\n"


def test_fit_on_a_label_for_each_token(run: Run, tmp_path: Path) -> None:
    lengths = [len(embedded_model().tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    data = jsonl(tmp_path / "d.jsonl", TEXTS, [[at % 2 for at in range(length)] for length in lengths])
    assert "trained on 19 prompts" in run("fit", data, "-o", tmp_path / "p.safetensors", "--pooling", "all").fine
    saved = load_probe(tmp_path / "p.safetensors").spec
    assert saved.training is not None
    assert saved.training.n_examples > 19


def pooled_by(inference: str, weights: ProbeWeights) -> ProbeWeights:
    return replace(weights, spec=replace(weights.spec, pooling=replace(weights.spec.pooling, inference=inference)))


# --- calibrate -----------------------------------------------------------------------------------------------------------

HARMLESS = [f"{word} = {at} + {other}" for at, word in enumerate("abcdefghij") for other in ("x", "yy", "zzz")]
SUSPECT = [f"{word} was late {at}" for at, word in enumerate(["She", "He", "It", "Nobody", "The rain", "A day"])]
CODE_WORDS = (
    "a", "def", "for", "import", "class", "return", "if", "while", "try", "with",
    "lambda", "not", "print", "self", "open", "list", "dict", "set", "int", "str",
)  # fmt: skip
QUICK = ("--fpr", "0.1", "--delta", "0.1")


def lines_of(path: Path, texts: list[str]) -> Path:
    return write(path, "\n".join(texts))


def test_calibrate_writes_the_threshold_into_the_file_and_says_what_it_promises(
    run: Run, probes: dict[str, Path], tmp_path: Path
) -> None:
    path = write(tmp_path / "mine.safetensors", probes["prose"].read_bytes())
    before = load_probe(path)
    said = run("calibrate", path, lines_of(tmp_path / "n.txt", HARMLESS), *QUICK).fine.splitlines()
    after = load_probe(path)
    expected = calibrate_probe(embedded_model(), before, HARMLESS, 0.1, 0.1)
    assert after.spec == expected.spec and torch.equal(after.direction, before.direction)
    threshold = after.threshold
    assert threshold is not None and (threshold.n, threshold.rank, threshold.method) == (30, 30, "pac")
    assert said == [
        f"{path}: probe 'prose', calibrated",
        f"threshold: logit >= {threshold.value:g} (running maximum of last_token)",
        "method: pac (just above rank 30 of 30 negative sequences in rising order)",
        f"guarantee: {threshold.guarantee}",
    ]
    rows = run("inspect", path).fine
    assert threshold.guarantee is not None and threshold.guarantee in rows
    assert "rank 30, statistic running maximum of last_token" in rows
    assert {one.name for one in tmp_path.iterdir()} == {"mine.safetensors", "n.txt"}


def test_calibrate_reports_recall_and_probabilities_and_writes_elsewhere(
    run: Run, probes: dict[str, Path], tmp_path: Path
) -> None:
    original, out = probes["prose"].read_bytes(), tmp_path / "out.safetensors"
    negatives = jsonl(tmp_path / "n.jsonl", HARMLESS, [0] * 30)
    positives = write(tmp_path / "p.csv", "text\n" + "\n".join(SUSPECT))
    arguments = [
        "--positives",
        positives,
        "--probability",
        "--method",
        "conformal",
        "--out",
        out,
        "--max-tokens-per-batch",
        64,
    ]
    said = run("calibrate", probes["prose"], negatives, *QUICK, *arguments).fine.splitlines()
    assert probes["prose"].read_bytes() == original
    saved = load_probe(out)
    recall, curve = saved.spec.metrics["recall_at_fpr"], saved.spec.probability_calibration
    assert curve is not None and (curve.n_negative, curve.n_positive) == (30, 6)
    assert said[-2] == f"recall: {recall.value:.3f} [{recall.low:.3f}, {recall.high:.3f}] on 6 positive sequences"
    assert said[-1].startswith(
        f"probability: sigmoid({curve.slope:g} z {curve.intercept:+g}) of the running maximum's logit z"
    )
    assert saved.threshold is not None and saved.threshold.method == "conformal" and saved.threshold.rank == 28
    column = run("calibrate", out, negatives, *QUICK, "--text-column", "label")
    assert "prompts[0] is a int" in column.error


def test_calibrate_then_score_flags_by_the_new_threshold(run: Run, probes: dict[str, Path], tmp_path: Path) -> None:
    weights = load_probe(probes["live"]).with_inference_pooling("score:max")
    # so certain that probabilities round to 1, where only logits tell scores apart
    path = ProbeWeights(weights.direction * 99, weights.intercept * 99 + 300, weights.spec).save(tmp_path / "p.safetensors")
    negatives = lines_of(tmp_path / "n.txt", list(CODE_WORDS))
    run("calibrate", path, negatives, "--fpr", "0.2", "--method", "empirical").fine  # noqa: B018
    records = run("score", path, negatives).records
    assert len(records) == 20
    assert sum(record["score"] == 1 for record in records) > 4, "probabilities are no help here"
    assert sum(record["flagged"] for record in records) == 4


def test_calibrate_with_a_model_of_ones_own_and_its_bos(run: Run, llama: Tiny, tmp_path: Path) -> None:
    path = Probe(llama.bridge, 2, name="tiny", prepend_bos=True).fit(TEXTS, LABELS).save(tmp_path / "tiny.safetensors")
    texts = [f"{first} {second}" for first in ("the", "cats", "rain", "sun", "music") for second in "abcde"]
    negatives = lines_of(tmp_path / "n.txt", texts)
    for option, bos in (("--bos", True), ("--no-bos", False)):
        out = tmp_path / f"{option}.safetensors"
        run("calibrate", path, negatives, *QUICK, "--model", llama.folder, option, "-o", out).fine  # noqa: B018
        expected = calibrate_probe(llama.bridge, path, texts, 0.1, 0.1, prepend_bos=bos).threshold
        found = load_probe(out).threshold
        assert found is not None and expected is not None
        assert found.value == pytest.approx(expected.value, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["{probe}", "{negatives}"],
            "30 negative sequences are too few: method 'pac' with fpr 0.01, delta 0.05 needs at least 299",
        ),
        (["{probe}", "{negatives}", "--fpr", "2"], "fpr is 2.0; expected a number between 0 and 1"),
        (["{probe}", "{negatives}", "--method", "magic"], "method is 'magic'; expected 'pac', 'conformal', 'empirical'"),
        (["{probe}", "{negatives}", *QUICK, "--min-recall", "0.9"], "min_recall=0.9 needs positive_prompts"),
        (["{probe}", "{negatives}", *QUICK, "--probability"], "probability=True needs positive_prompts"),
        (["{probe}", "{negatives}", *QUICK, "--out", "x.pt"], "--out is 'x.pt'; a probe file ends in .safetensors"),
        (
            ["{probe}", "{negatives}", *QUICK, "--out", "no/x.safetensors"],
            "--out is 'no/x.safetensors', but there is no folder",
        ),
        (["{probe}", "-", "--positives", "-"], "both read standard input"),
        (["{probe}", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["{probe}", "{negatives}", "--positives", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["nowhere.safetensors", "{negatives}"], "there is no such file"),
        (["{three}", "{negatives}", *QUICK], "3 classes; a threshold needs a probe with two"),
    ],
)
def test_calibrate_fails_in_one_line_before_the_model_is_loaded(
    run: Run,
    probes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    no_model_may_load(monkeypatch)
    monkeypatch.chdir(tmp_path)
    names = {**probes, "probe": probes["prose"], "negatives": lines_of(tmp_path / "n.txt", HARMLESS)}
    before = probes["prose"].read_bytes()
    assert says in run("calibrate", *(argument.format(**names) for argument in arguments)).error
    assert probes["prose"].read_bytes() == before


def test_a_recall_below_the_target_leaves_the_file_as_it_was(run: Run, probes: dict[str, Path], tmp_path: Path) -> None:
    path = write(tmp_path / "mine.safetensors", probes["prose"].read_bytes())
    negatives, positives = lines_of(tmp_path / "n.txt", list(CODE_WORDS)), lines_of(tmp_path / "p.txt", list(CODE_WORDS))
    rates = ("--fpr", "0.2", "--delta", "0.2")
    ran = run("calibrate", path, negatives, *rates, "--positives", positives, "--min-recall", "0.9")
    assert ran.code == 2 and ran.out == ""
    assert "error: the recall is 0.050 [0.001, 0.249] on 20 positive sequences" in ran.err
    assert path.read_bytes() == probes["prose"].read_bytes()


# --- score ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def expected_scores(probes: dict[str, Path]) -> np.ndarray:
    return Probe(embedded_model(), 3, name="prose", random_state=0).fit(TEXTS, LABELS).predict_proba(PROMPTS)[:, 1]


@pytest.mark.parametrize("source", ["txt", "jsonl", "csv", "-"])
def test_score_gives_each_prompt_its_probability_in_order(
    run: Run, probes: dict[str, Path], tmp_path: Path, source: str, expected_scores: np.ndarray
) -> None:
    content = "\n\n".join(PROMPTS) + "\n"
    if source == "jsonl":
        content = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in PROMPTS)
    elif source == "csv":
        content = "text\n" + "".join(f'"{text}"\n' for text in PROMPTS)
    path = write(tmp_path / f"p.{source}", content)
    ran = run("score", probes["prose"], "-" if source == "-" else path, "--max-tokens-per-batch", 32, stdin=content.encode())
    records = ran.records
    assert [record["text"] for record in records] == PROMPTS
    np.testing.assert_allclose([record["score"] for record in records], expected_scores, atol=1e-5)
    assert [record["flagged"] for record in records] == (expected_scores >= 0.5).tolist()
    assert {record["unit"] for record in records} == {"probability"}
    assert set(records[0]) == {"text", "score", "unit", "flagged"}


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv"])
def test_score_writes_a_file_with_the_same_scores(
    run: Run, probes: dict[str, Path], tmp_path: Path, name: str, expected_scores: np.ndarray
) -> None:
    out = tmp_path / name
    ran = run("score", probes["prose"], "-", "--out", out, stdin="\n".join(PROMPTS).encode())
    assert ran.fine == f"{out}: 4 prompts\n"
    text = out.read_bytes().decode()
    rows = (
        list(csv.DictReader(io.StringIO(text, newline="")))
        if name == "o.csv"
        else [json.loads(line) for line in text.split("\n")[:-1]]
    )
    assert [row["text"] for row in rows] == PROMPTS
    np.testing.assert_allclose([float(row["score"]) for row in rows], expected_scores, atol=1e-5)
    assert [str(row["flagged"]) for row in rows] == [str(score >= 0.5) for score in expected_scores]


def test_score_adds_a_logit_for_each_token_bos_included(run: Run, probes: dict[str, Path]) -> None:
    weights = load_probe(probes["prose"])
    (record,) = run("score", probes["prose"], "-", "--tokens", stdin=PROMPTS[2].encode()).records
    model = embedded_model()
    _, cache = model.run_with_cache(
        torch.tensor([model.tokenizer(PROMPTS[2])["input_ids"]]), names_filter=weights.hook_points[0]
    )
    expected = weights.logits(cache[weights.hook_points[0]][0])
    np.testing.assert_allclose(record["token_logits"], expected.numpy(), rtol=1e-4, atol=1e-4)
    assert record["score"] == pytest.approx(expected[-1].sigmoid().item(), abs=1e-5)


def test_score_of_several_classes_names_the_most_probable(run: Run, probes: dict[str, Path]) -> None:
    records = run("score", probes["three"], "-", stdin="\n".join(PROMPTS).encode()).records
    for record in records:
        assert sum(record["score"]) == pytest.approx(1, abs=1e-5)
        assert record["label"] == "abc"[int(np.argmax(record["score"]))]
        assert "flagged" not in record


@pytest.mark.parametrize("inference", ["score:max", "score:ema_max(0.5)"])
@pytest.mark.parametrize("unit", ["probability", "logit"])
def test_score_flags_what_reaches_the_threshold_in_whatever_unit_it_is_given(
    run: Run, probes: dict[str, Path], tmp_path: Path, inference: str, unit: Any
) -> None:
    weights = pooled_by(inference, load_probe(probes["live"]))
    stdin = "\n".join(PROMPTS).encode()
    scores = [record["score"] for record in run("score", weights.save(tmp_path / "p.safetensors"), "-", stdin=stdin).records]
    own_unit = "logit" if "ema" in inference else "probability"
    logits = np.array(scores) if own_unit == "logit" else np.log(scores) - np.log1p(-np.array(scores))
    in_order = np.sort(logits)
    thresholds = [in_order[0] - 1, *(in_order[1:] + in_order[:-1]) / 2, in_order[-1] + 1]
    for above, logit in enumerate(thresholds):
        value = float(logit) if unit == "logit" else float(1 / (1 + np.exp(-logit)))
        with_threshold = weights.with_threshold(value, unit).save(tmp_path / "q.safetensors")
        records = run("score", with_threshold, "-", stdin=stdin).records
        assert [record["flagged"] for record in records] == (logits >= logit).tolist()
        assert {record["unit"] for record in records} == {own_unit}
        assert sum(record["flagged"] for record in records) == len(PROMPTS) - above


def test_score_with_a_model_of_ones_own(run: Run, llama: Tiny, tmp_path: Path) -> None:
    path = Probe(llama.bridge, 2, name="tiny", prepend_bos=True).fit(TEXTS, LABELS).save(tmp_path / "tiny.safetensors")
    for bos in ("--bos", "--no-bos"):
        records = run("score", path, "-", "--model", llama.folder, bos, stdin=b"the model\ncats").records
        rows = [llama.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the model", "cats")]
        rows = [[llama.tokenizer.bos_token_id] * (bos == "--bos") + row for row in rows]
        expected = [load_probe(path).probabilities(llama.hidden(row, 2)[-1]).item() for row in rows]
        np.testing.assert_allclose([record["score"] for record in records], expected, atol=1e-5)


# --- extract, merge ------------------------------------------------------------------------------------------------------


@contextmanager
def passes() -> Iterator[list[int]]:
    """Gets an entry for each forward pass of the embedded model."""
    seen: list[int] = []
    handle = embedded_model().blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def test_extract_writes_a_store_that_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    prompts, out = lines_of(tmp_path / "p.txt", TEXTS), tmp_path / "new" / "store"
    arguments = ["extract", prompts, "--out", out, "--hook-points", "1,-1", "--pooling", "mean, all", "--dtype", "float16"]
    said = run(*arguments, "--keep-tokens", "--no-bos", "--max-tokens-per-batch", 64).fine
    assert said == (f"ActivationStore({str(out)!r}: 24 prompts, 2 hook points, poolings mean, all, float16; complete)\n")
    store = ActivationStore(out)
    assert store.hook_points == ("blocks.1.hook_resid_post", "blocks.5.hook_resid_post")
    assert (store.manifest.max_tokens_per_batch, store.manifest.tokenizer.prepend_bos) == (64, False)
    assert store.tokens() == [embedded_model().tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    own = extract_activations(embedded_model(), TEXTS, 1, "mean", prepend_bos=False).values["blocks.1.hook_resid_post"]
    torch.testing.assert_close(store.values(1, "mean"), own, rtol=1e-2, atol=1e-2)

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "index.json").unlink()
    with passes() as seen:
        assert run(*arguments, "--keep-tokens", "--no-bos", "--max-tokens-per-batch", 64).fine == said
    assert seen == [], "nothing was left to compute"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    other = run(*arguments, "--no-bos", "--max-tokens-per-batch", 64)
    assert "holds another extraction; wanted is keeps_tokens: false, not true" in other.error


def test_processes_with_shards_share_a_folder_or_are_merged(run: Run, tmp_path: Path) -> None:
    prompts = lines_of(tmp_path / "p.txt", TEXTS)
    common = ["extract", prompts, "--hook-points", "2"]
    whole = run(*common, "--out", tmp_path / "shared", "--shard", "0/2").fine
    assert "1 of 2 shards missing)" in whole
    assert run(*common, "--out", tmp_path / "shared", "--shard", "1/2").fine.endswith("; complete)\n")
    for part in "01":
        run(*common, "--out", tmp_path / part, "--shard", f"{part}/2").fine  # noqa: B018
    few = run("merge", tmp_path / "merged", tmp_path / "0")
    assert "1 of 2 shards are in none of the folders" in few.error
    merged = run("merge", tmp_path / "merged", tmp_path / "0", tmp_path / "1").fine
    assert merged == f"{ActivationStore(tmp_path / 'merged')}\n" and "complete" in merged
    values = [ActivationStore(tmp_path / name).values() for name in ("merged", "shared")]
    assert torch.equal(*values)
    assert values[0].shape == (24, 192)
    assert "Missing argument" in run("merge", tmp_path / "merged").error
    assert "it has no manifest.json" in run("merge", tmp_path / "merged", tmp_path).error


def test_extract_reads_standard_input_and_columns(run: Run, tmp_path: Path) -> None:
    run("extract", "-", "-o", tmp_path / "a", "--hook-points", "0", stdin="\n".join(PROMPTS).encode()).fine  # noqa: B018
    data = write(tmp_path / "p.jsonl", "\n".join(json.dumps({"words": text}) for text in PROMPTS))
    run("extract", data, "-o", tmp_path / "b", "--hook-points", "0", "--text-column", "words").fine  # noqa: B018
    assert torch.equal(ActivationStore(tmp_path / "a").values(), ActivationStore(tmp_path / "b").values())


# --- sweep ---------------------------------------------------------------------------------------------------------------

MANY = [f"{text} {name}" for name in ("a", "bb", "ccc") for text in (*PROSE[:6], *CODE[:6])]
KINDS = ["prose"] * 6 + ["code"] * 6


def test_sweep_says_what_the_library_finds_and_writes_what_is_asked_for(run: Run, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", MANY, KINDS * 3)
    out, table, plot = tmp_path / "best.safetensors", tmp_path / "all.csv", tmp_path / "layers.png"
    options = ["--hook-points", "1,3", "--pooling", "mean,last_token", "--classifier", "ridge,mass_mean", "--folds", 3]
    options += ["--test-share", 0.3, "--seed", 2]
    printed = run("sweep", data, *options, "--out", out, "--table", table, "--plot", plot).fine
    result = sweep(
        embedded_model(),
        MANY,
        KINDS * 3,
        [1, 3],
        ["mean", "last_token"],
        ["ridge", "mass_mean"],
        validation=3,
        test_share=0.3,
        random_state=2,
        name="best",
        progress=False,
    )
    assert printed == f"{result}\n{out}: the best, trained on {result.n_selection} prompts\n"
    saved = load_probe(out)
    assert saved.spec == result.probe_.weights_.with_metrics(result.test.records()).spec
    assert torch.equal(saved.direction, result.probe_.weights_.direction)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["auroc"]) for row in rows] == [row.validation.value for row in result.rows]
    assert [row["is_best"] for row in rows].count("True") == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run("sweep", data, *options).fine == f"{result}\n"


def test_sweep_with_a_store_computes_once(run: Run, tmp_path: Path) -> None:
    arguments = ["sweep", jsonl(tmp_path / "d.jsonl", MANY, KINDS * 3), "--hook-points", "3", "--store", tmp_path / "store"]
    first = run(*arguments).fine
    assert ActivationStore(tmp_path / "store").n_prompts == len(MANY)
    with passes() as seen:
        assert run(*arguments).fine == first
        assert seen == []
        assert run(*arguments[:-2]).fine == first
        assert seen, "without the store the model does run"


@pytest.mark.parametrize(
    ("command", "without"), [("fit", set()), ("sweep", {"ccs", "pca", "stacking", *SEQUENCE_CLASSIFIERS})]
)
def test_the_help_names_every_classifier(run: Run, command: str, without: set[str]) -> None:
    said = " ".join(run(command, "--help").fine.split())
    for name in set(CLASSIFIERS) - without:
        assert re.search(rf"\b{name}\b", said), name


def test_a_classifier_of_token_sequences_is_fitted_saved_and_scores(run: Run, tmp_path: Path) -> None:
    data, probe = jsonl(tmp_path / "d.jsonl", MANY, KINDS * 3), tmp_path / "p.safetensors"
    assert "p.safetensors: probe 'p'" in run("fit", data, "--out", probe, "--classifier", "multimax").fine
    assert "multimax (n heads" in run("inspect", probe).fine
    assert len(run("score", probe, data).records) == len(MANY)
    refused = run("fit", data, "--out", probe, "--classifier", "multimax", "--pooling", "mean")
    assert "pooling is 'mean'; expected None, since multimax reduces the tokens of a prompt itself" in refused.error


@pytest.mark.parametrize("package", ["matplotlib.pyplot", "pandas"])
def test_sweep_misses_a_package_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    no_model_may_load(monkeypatch)
    monkeypatch.setitem(sys.modules, package, None)
    option = ("--table", "t.csv") if package == "pandas" else ("--plot", "t.png")
    ran = run("sweep", jsonl(tmp_path / "d.jsonl", MANY, KINDS * 3), option[0], tmp_path / option[1])
    assert f"needs {package.split('.')[0]}: pip install 'lmprobe-tl[plots]'" in ran.error


FIT, SWEEP, EXTRACT = ["fit", "{data}", "-o", "x.safetensors"], ["sweep", "{data}"], ["extract", "{prompts}", "-o", "new"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*FIT, "--classifier", "rigde"], "Closest: 'ridge'"),
        ([*FIT, "--pooling", "men"], "Closest: 'mean'"),
        ([*FIT, "--inference-pooling", "score:men"], "Unknown pooling strategy 'score:men'"),
        (["fit", "one.jsonl", "-o", "x.safetensors", "--test-share", "0"], "at least two classes"),
        ([*EXTRACT, "--shard", "2/2"], "--shard is '2/2'; expected i/n with i from 0 to n - 1"),
        ([*EXTRACT, "--shard", "one"], "--shard is 'one'; expected i/n"),
        ([*EXTRACT, "--shard", "-1/2"], "--shard is '-1/2'; expected i/n"),
        ([*EXTRACT, "--pooling", "men"], "Closest: 'mean'"),
        ([*EXTRACT, "--pooling", "mean,mean"], "names 'mean' more than once"),
        ([*EXTRACT, "--pooling", ","], "pooling is an empty list"),
        ([*EXTRACT, "--pooling", "score:max"], "reduces scores, and extraction has none"),
        ([*EXTRACT, "--dtype", "float8"], "--dtype is 'float8'; expected 'float32', 'float16', 'bfloat16'"),
        ([*EXTRACT, "--max-tokens-per-batch", "0"], "--max-tokens-per-batch"),
        (["extract", "none.txt", "-o", "new"], "there is no file 'none.txt'"),
        (["extract", "{prompts}", "-o", "full"], "--out is 'full', which exists and is no activation store"),
        (["extract", "{prompts}", "-o", "{prompts}"], "which exists and is no activation store"),
        (["extract", "{prompts}"], "Missing option '--out'"),
        ([*SWEEP, "--out", "x.pt"], "--out is 'x.pt'; expected a name ending in .safetensors"),
        ([*SWEEP, "--table", "x.xlsx"], "--table is 'x.xlsx'; expected a name ending in .csv"),
        ([*SWEEP, "--plot", "x.jpg"], "--plot is 'x.jpg'; expected a name ending in .png or .svg or .pdf"),
        ([*SWEEP, "--out", "no/x.safetensors"], "--out is 'no/x.safetensors', but there is no folder"),
        ([*SWEEP, "--table", "no/x.csv"], "--table is 'no/x.csv', but there is no folder"),
        ([*SWEEP, "--plot", "no/x.png"], "--plot is 'no/x.png', but there is no folder"),
        ([*SWEEP, "--store", "full"], "--store is 'full', which exists and is no activation store"),
        ([*SWEEP, "--pooling", "men"], "Closest: 'mean'"),
        ([*SWEEP, "--pooling", "max"], "train_pooling cannot be 'max'"),
        ([*SWEEP, "--pooling", "all,mean"], "Sweep 'all' alone"),
        ([*SWEEP, "--pooling", ","], "poolings is empty"),
        ([*SWEEP, "--classifier", "rigde"], "Closest: 'ridge'"),
        ([*SWEEP, "--classifier", "lda,lda"], "names 'lda' more than once"),
        ([*SWEEP, "--folds", "1"], "--folds"),
        ([*SWEEP, "--test-share", "0.7"], "the share to hold out is 0.7"),
        ([*SWEEP, "--test-share", "nan"], "the share to hold out is nan"),
        (["sweep", "one.jsonl"], "at least two classes"),
        (["sweep", "tokens.jsonl"], "token labels need poolings=['all']"),
        (["sweep", "none.jsonl"], "there is no file 'none.jsonl'"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_one_line_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    no_model_may_load(monkeypatch)
    monkeypatch.chdir(tmp_path)
    names = {"data": jsonl(tmp_path / "d.jsonl", TEXTS, LABELS), "prompts": lines_of(tmp_path / "p.txt", PROMPTS)}
    jsonl(tmp_path / "one.jsonl", TEXTS, [1] * 24)
    jsonl(tmp_path / "tokens.jsonl", TEXTS, [[0, 1]] * 24)
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "notes.txt", "mine")
    before = sorted(tmp_path.rglob("*"))
    assert says in run(*(argument.format(**names) for argument in arguments)).error
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep", "few.jsonl"], "class 1 is in too few groups of prompts to be in every one of 4 parts"),
        ([*SWEEP, "--hook-points", "6"], "layer 6 does not exist: this model has 6 layers"),
        ([*EXTRACT, "--hook-points", "blocks.3.hook_resid_pots"], "Closest: 'blocks.3.hook_resid_post'"),
        (["extract", "long.txt", "-o", "new"], "longer than the 512 tokens allowed: prompt 1"),
    ],
)
def test_what_only_the_model_can_tell_is_one_line_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"data": jsonl(tmp_path / "d.jsonl", TEXTS, LABELS), "prompts": lines_of(tmp_path / "p.txt", PROMPTS)}
    jsonl(tmp_path / "few.jsonl", TEXTS, [0] * 22 + [1] * 2)
    write(tmp_path / "long.txt", "short\n" + "word " * 600)
    assert says in run(*(argument.format(**names) for argument in arguments)).error


# --- generate ------------------------------------------------------------------------------------------------------------


def written(out: str) -> str:
    """The text before the closing lines, without marks."""
    return re.sub("[⟦⟧]", "", re.split(r"(?m)^(?:alarm: |ended by: )", out)[0])


def test_generate_continues_the_prompt_and_says_how_it_ended(run: Run, probes: dict[str, Path]) -> None:
    out = run("generate", probes["live"], "def f(x):", "-n", 8, "--seed", 1).fine
    assert written(out).startswith("def f(x):")
    assert len(written(out)) > len("def f(x):\n")
    assert re.search(r"^ended by: (max_new_tokens|eos); .*; [1-8] tokens?$", out, re.M)


def test_generate_gives_the_same_text_for_a_seed_and_another_without_one(run: Run, probes: dict[str, Path]) -> None:
    def text(*options: Any) -> str:
        return run("generate", probes["live"], "x = ", "-n", 12, "--temperature", 1.5, *options).fine

    one = text("--seed", 1)
    assert text("--seed", 1) == one
    assert text("--seed", 2) != one
    torch.manual_seed(5)
    first = text()
    torch.manual_seed(5)
    assert text() != first


def test_generate_is_greedy_at_temperature_zero(run: Run, probes: dict[str, Path]) -> None:
    one, two = (
        run("generate", probes["live"], "import ", "-n", 8, "--temperature", 0, "--seed", seed).fine for seed in (1, 2)
    )
    assert one == two
    model = embedded_model()
    ids = torch.tensor([model.tokenizer("import ")["input_ids"]])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    expected = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert written(one).rstrip("\n") == expected.rstrip("\n")


def test_generate_stops_at_the_threshold_and_raises_the_alarm(run: Run, probes: dict[str, Path], tmp_path: Path) -> None:
    path = pooled_by("score:max", load_probe(probes["live"])).save(tmp_path / "p.safetensors")
    never = run("generate", path, "x = ", "-n", 12, "--seed", 1, "--threshold", 1, "--stop").fine
    assert "alarm:" not in never
    assert "; no alarm (score at most 0." in never
    assert "⟦" not in never
    at_once = run("generate", path, "x = ", "-n", 12, "--seed", 1, "--threshold", 0, "--stop").fine
    assert written(at_once) == "x = \n"
    assert re.fullmatch(
        r"ended by: probe 'live'; ALARM at prompt token 2; score \d\.\d{3}; 0 tokens", at_once.splitlines()[-1]
    )
    assert re.search(
        r"^alarm: .* 'live' \(pooling score:max\) reached \d\.\d{3} \(threshold 0\) at token 2 of the prompt, 'x'$",
        at_once,
        re.M,
    )
    on = run("generate", path, "x = ", "-n", 12, "--seed", 1, "--threshold", 0).fine
    assert "ended by: probe" not in on
    assert written(on) == written(never)
    assert on.count("⟦") == 1


def test_generate_marks_the_tokens_at_or_above_the_threshold(run: Run, probes: dict[str, Path], tmp_path: Path) -> None:
    """Against the scores that `score --tokens` gives for the same text."""
    out = run("generate", probes["live"], "It was x = 1", "-n", 1, "--temperature", 0).fine
    marked = re.split(r"(?m)^(?:alarm: |ended by: )", out)[0].removesuffix("\n")
    text = re.sub("[⟦⟧]", "", marked)
    (record,) = run("score", probes["live"], jsonl(tmp_path / "t.jsonl", [text], [0]), "--tokens").records
    tokenizer = embedded_model().tokenizer
    tokens = [tokenizer.decode([token]) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    expected, flagged = "", False
    for token, logit in zip(tokens, record["token_logits"][1:], strict=True):
        expected += {(False, True): "⟦", (True, False): "⟧"}.get((flagged, logit >= 0), "") + token
        flagged = logit >= 0
    assert marked.rstrip("⟧") == expected.rstrip("⟧")


def test_generate_reads_the_prompt_from_standard_input(run: Run, probes: dict[str, Path]) -> None:
    out = run("generate", probes["live"], "-", "-n", 2, "--seed", 1, stdin="# é 😀\r\nx".encode()).fine
    assert written(out).startswith("# é 😀\nx")


# --- inspect, help -------------------------------------------------------------------------------------------------------


def test_inspect_prints_every_row_of_the_summary(run: Run, probes: dict[str, Path], tmp_path: Path) -> None:
    lines = run("inspect", probes["live"]).fine.splitlines()
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines}
    assert rows["name"] == "live"
    assert rows["labels"] == "1 (positive), 0 (negative)"
    assert rows["hook points"] == "blocks.1.hook_resid_post, blocks.3.hook_resid_post"
    assert rows["d_model"] == "192"
    assert rows["threshold"] == "probability >= 0.5 (default)"
    weights = ProbeWeights.from_direction([1.0], name="p", hook_points="h", description="a\x1b[2Jb\nc")
    assert "a\\x1b[2Jb\\nc" in run("inspect", weights.save(tmp_path / "p.safetensors")).fine


def test_without_arguments_the_command_explains_itself(run: Run) -> None:
    assert run().fine == run("--help").fine
    for command in ("demo", "fit", "calibrate", "score", "generate", "extract", "merge", "sweep", "serve", "inspect"):
        assert re.search(rf"^  {command}\s+[A-Z].*[.]$", run().out, re.M), command
        assert "Usage:" in run(command, "--help").fine


# --- demo ----------------------------------------------------------------------------------------------------------------


def test_demo_writes_a_probe_and_a_report_that_name_no_path_of_this_machine(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_job, "PROBE_TRAIN_MODULES", ("bisect", "cmd", "csv", "glob", "netrc", "stat", "uuid"))
    monkeypatch.setattr(main_job, "PROBE_EVAL_MODULES", ("textwrap", "queue", "shlex", "string"))
    monkeypatch.setattr(main_job, "PIECES_PER_MODULE", 3)
    monkeypatch.setattr(main_job, "SHOWN_PROMPTS", ("def f(x):\n", "# <b> & "))
    monkeypatch.setattr(main_job, "run_demo", partial(main_job.run_demo, n_bootstrap=20, live_rows=16, max_new_tokens=40))
    out = tmp_path / "a folder that does not exist yet" / ("with a long name " * 8).strip()
    ran = run("demo", "--out", out)
    printed = ran.fine.replace("⟦", "").replace("⟧", "")
    assert ran.err == ""
    assert len(re.findall(r"(?m)^ended by: (?:max_new_tokens|eos); .*; \d+ tokens?$", printed)) == 2
    probe_file, report = out / "inside_text.safetensors", out / "report.html"
    assert f"\nprobe file  {probe_file}\nreport      {report}\n" in printed, "long lines are not wrapped"
    assert sorted(path.name for path in out.iterdir()) == ["inside_text.safetensors", "report.html"]

    numbers = re.findall(r"AUROC of the (\w+).*? (\d\.\d{3}) \[(\d\.\d{3}), (\d\.\d{3})\]", printed)
    assert [name for name, *_ in numbers] == ["probe", "token", "live", "token"]
    for _, value, low, high in numbers:
        assert 0 <= float(low) <= float(value) <= float(high) <= 1
    assert float(numbers[0][1]) > 0.8
    assert "def f(x):\n" in printed
    assert "# <b> & " in printed

    weights = load_probe(probe_file)
    assert weights.hook_points == ("blocks.3.hook_resid_post",)
    assert f"{weights.spec.metrics['token_auroc'].value:.3f}" == numbers[0][1]
    page = Page(report.read_text(encoding="utf-8"))
    assert [
        text.startswith(prompt) for text, prompt in zip(page.texts("pre"), ["def f(x):\n", "# <b> & "], strict=True)
    ] == [True] * 2
    assert dict(zip(page.texts("th"), page.texts("td"), strict=True))["AUROC of the probe, unseen modules"].startswith(
        numbers[0][1]
    )
    for written_file in (probe_file, report):
        content = written_file.read_bytes().decode("latin-1")
        for path in (tmp_path, Path(main_job.__file__).parent, Path.home(), Path(sys.prefix), Path.cwd()):
            assert str(path) not in content
    # The file on disk is the probe that was reported on: it flags the inside of strings.
    (record,) = run("score", probe_file, "-", "--tokens", stdin=b"x = 1  # this is a comment").records
    assert record["token_logits"][-1] > record["token_logits"][1]


# --- what goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scor"], "No such command 'scor'. Did you mean 'score'?"),
        (["fit", "{data}", "--outt", "x"], "--out"),
        (["score", "{probe}", "{prompts}", "--tokns"], "--tokens"),
        (["score"], "Missing argument"),
        (["fit", "{data}"], "Missing option '--out'"),
        (["fit", "{data}", "-o", "x.safetensors", "--test-share", "1"], "--test-share"),
        (["fit", "{data}", "-o", "x.safetensors", "--test-share", "nan"], "--test-share"),
        (["fit", "{data}", "-o", "x.safetensors", "--max-tokens-per-batch", "0"], "--max-tokens-per-batch"),
        (["fit", "{data}", "-o", "x.safetensors", "--seed", "a"], "--seed"),
        (["fit", "{data}", "-o", "x.pt"], "a probe file ends in .safetensors"),
        (["fit", "{data}", "-o", "nowhere/x.safetensors"], "there is no folder '{here}/nowhere'"),
        (["fit", "{data}", "-o", "x.safetensors", "--classifier", "mass_men"], "Closest: 'mass_mean'"),
        (["fit", "{data}", "-o", "x.safetensors", "--classifier", "pca"], "would part. Pass --test-share 0"),
        (["sweep", "{data}", "--classifier", "ccs"], "CcsClassifier learns from pairs"),
        (["fit", "{data}", "-o", "x.safetensors", "--pooling", "lst_token"], "Closest: 'last_token'"),
        (["fit", "{data}", "-o", "x.safetensors", "--pooling", "score:max"], "train_pooling cannot be 'score:max'"),
        (
            ["fit", "{data}", "-o", "x.safetensors", "--hook-points", "blocks.3.hook_resid_pots"],
            "Closest: 'blocks.3.hook_resid_post'",
        ),
        (["fit", "{data}", "-o", "x.safetensors", "--hook-points", "6"], "layer 6 does not exist: this model has 6 layers"),
        (["fit", "{data}", "-o", "x.safetensors", "--hook-points", "--2"], "no hook point '--2'"),
        (["fit", "{data}", "-o", "x.safetensors", "--hook-points", "²"], "no hook point '²'"),
        (["fit", "{data}", "-o", "x.safetensors", "--hook-points", ","], "hook_points is empty"),
        (["fit", "{data}", "-o", "x.safetensors", "--text-column", "prompt"], "line 1: no 'prompt'; it has 'text', 'label'"),
        (["fit", "{data}", "-o", "x.safetensors", "--model", "./nope"], "there is no model folder './nope'"),
        (["fit", "{data}", "-o", "x.safetensors", "--model", "nope/nope"], "cannot load the model 'nope/nope'"),
        (["fit", "{here}", "-o", "x.safetensors"], "no known format"),
        (["fit", "none.csv", "-o", "x.safetensors"], "there is no file 'none.csv'"),
        (["fit", "few.jsonl", "-o", "x.safetensors"], "Pass --test-share 0, or more data"),
        (["fit", "one_class.jsonl", "-o", "x.safetensors", "--test-share", "0"], "at least two classes"),
        (["fit", "mixed.jsonl", "-o", "x.safetensors"], "all of one type"),
        (["fit", "objects.jsonl", "-o", "x.safetensors"], "all of one type"),
        (["fit", "broken.jsonl", "-o", "x.safetensors"], "line 2: no JSON"),
        (["fit", "empty.jsonl", "-o", "x.safetensors"], "holds no record"),
        (["fit", "latin.csv", "-o", "x.safetensors"], "is not UTF-8 text"),
        (["fit", "numbers.jsonl", "-o", "x.safetensors"], "prompts[0] is a int"),
        (["score", "none.safetensors", "{prompts}"], "there is no such file"),
        (["score", "{here}", "{prompts}"], "it is a folder"),
        (["score", "pickle.safetensors", "{prompts}"], "Pickles can run code"),
        (["score", "empty.safetensors", "{prompts}"], "it has only 0 bytes"),
        (["score", "{weights}", "{prompts}"], "it is a safetensors file but not a probe"),
        (["score", "{data}", "{prompts}"], "it is not a safetensors file"),
        (["score", "{probe}", "none.txt"], "there is no file 'none.txt'"),
        (["score", "{probe}", "{here}/folder.txt"], "is a folder"),
        (["score", "{probe}", "prompts.json"], "no known format"),
        (["score", "{probe}", "empty.txt"], "holds no prompt"),
        (["score", "{probe}", "latin.txt"], "is not UTF-8 text"),
        (["score", "{probe}", "{data}", "--text-column", "prompt"], "line 1: no 'prompt'"),
        (["score", "{probe}", "{prompts}", "--out", "x.txt"], "expected a name ending in .jsonl or .csv"),
        (["score", "{probe}", "{prompts}", "--out", "nowhere/x.csv"], "there is no folder '{here}/nowhere'"),
        (["score", "{probe}", "{prompts}", "--out", "x.csv", "--tokens"], "--tokens needs JSONL"),
        (["score", "{probe}", "{prompts}", "--model", "{tiny}"], "192"),
        (["score", "{probe}", "long.txt"], "longer than the 512 tokens allowed: prompt 1"),
        (["generate", "{probe}", "x", "-n", "600"], "exceeds the model's context of 512"),
        (["generate", "{probe}", "x", "-n", "0"], "--max-new-tokens"),
        (["generate", "{probe}", "x", "--threshold", "1.5"], "--threshold"),
        (["generate", "{probe}", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "{probe}", "", "--no-bos"], "prompt 0 has no token"),
        (["generate", "{three}", "x"], "has 3 classes"),
        (["inspect", "{weights}"], "not a probe"),
        (["demo", "--out", "{prompts}"], "File exists"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    run: Run,
    probes: dict[str, Path],
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "here": tmp_path,
        "probe": probes["prose"],
        "three": probes["three"],
        "weights": demo.MODEL_FOLDER / "model.safetensors",
        "tiny": tiny_folders["llama"],
        "data": jsonl(tmp_path / "d.jsonl", TEXTS, LABELS),
        "prompts": write(tmp_path / "p.txt", "a\nb\n"),
    }
    jsonl(tmp_path / "few.jsonl", ["a", "b", "c"], [1, 0, 0])
    jsonl(tmp_path / "one_class.jsonl", ["a", "b"], [1, 1])
    jsonl(tmp_path / "mixed.jsonl", TEXTS, [1, "a"] * 12)
    jsonl(tmp_path / "objects.jsonl", TEXTS, [{"a": 1}] * 24)
    jsonl(tmp_path / "numbers.jsonl", list(range(24)), LABELS)
    write(tmp_path / "broken.jsonl", '{"text": "a", "label": 1}\n{"text": \n')
    write(tmp_path / "pickle.safetensors", pickle.dumps({"a": 1}))
    write(tmp_path / "long.txt", "short\n" + "word " * 600)
    for name in ("empty.jsonl", "empty.txt", "empty.safetensors"):
        write(tmp_path / name, "")
    write(tmp_path / "latin.txt", b"caf\xe9\n")
    write(tmp_path / "latin.csv", b"text,label\ncaf\xe9,1\n")
    (tmp_path / "folder.txt").mkdir()
    before = sorted(tmp_path.iterdir())
    ran = run(*(argument.format(**names) for argument in arguments))
    assert says.format(**names) in ran.error
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


def test_standard_input_that_is_no_text_is_an_error(run: Run, probes: dict[str, Path]) -> None:
    assert "standard input is not UTF-8" in run("score", probes["prose"], "-", stdin=b"a\xff").error
    assert "standard input is not UTF-8" in run("generate", probes["prose"], "-", stdin=b"a\xff").error
    assert "standard input holds no prompt" in run("score", probes["prose"], "-", stdin=b"").error


def test_an_error_is_one_line_even_if_what_it_names_is_not(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "two\nlines.jsonl", "{")
    assert "two lines.jsonl, line 1: no JSON" in run("fit", path, "-o", tmp_path / "x.safetensors").error


def test_what_is_certain_to_fail_fails_before_the_model_is_loaded(
    run: Run, probes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_model_may_load(monkeypatch)
    data = jsonl(tmp_path / "d.jsonl", ["a", "b", "c"], [1, 0, 0])
    prompts = write(tmp_path / "p.txt", "a\n")
    assert run("fit", data, "-o", tmp_path / "x.safetensors").error
    assert run("fit", data, "-o", tmp_path / "no" / "x.safetensors", "--test-share", 0).error
    assert run("score", probes["prose"], prompts, "-o", tmp_path / "no" / "x.csv").error
    assert run("generate", probes["three"], "x").error
    with pytest.raises(AssertionError, match="was loaded"):
        run("score", probes["prose"], prompts)


def test_a_defect_of_the_program_is_not_passed_off_as_an_error_of_the_user(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("lmprobe_tl.cli.fit.read_labelled", broken)
    with pytest.raises(ZeroDivisionError):
        run("fit", "d.csv", "-o", "x.safetensors")


def test_ctrl_c_ends_with_130_and_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmprobe_tl.cli.fit.read_labelled", interrupted)
    ran = run("fit", "d.csv", "-o", "x.safetensors")
    assert ran == Ran(130, "", "lmprobe-tl: interrupted\n")


def test_a_terminal_that_lacks_characters_stops_nothing(
    run: Run, probes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    assert run("generate", probes["live"], "# é 😀", "-n", "4", "--threshold", "0").code == 0
    text = raw.getvalue().decode("cp1252")
    assert "# é \\U0001f600" in text
    assert "\\u27e6" in text
    assert "ended by" in text


# --- as a process --------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return buffered | {
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def test_the_command_scores_with_the_embedded_model_from_any_folder(
    probes: dict[str, Path], tmp_path: Path, expected_scores: np.ndarray
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTS, "score", str(probes["prose"]), "-"],
        input="\n".join(PROMPTS).encode(),
        capture_output=True,
        cwd=tmp_path,
        env=environment(),
        check=False,
    )
    ran = Ran(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert ran.err == ""
    np.testing.assert_allclose([record["score"] for record in ran.records], expected_scores, atol=1e-5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 10**6], ids=["what waits in the buffer", "more than a pipe holds"])
def test_output_into_a_closed_pipe_is_quiet(
    run: Run, probes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    weights = load_probe(probes["prose"])
    monkeypatch.setattr("lmprobe_tl.probe_summary.probe_summary", lambda _: {"name": weights.name * size})
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        ran = run("inspect", probes["prose"])
        assert ran.code in (1, 141)
        assert ran.err == ""


def test_a_process_whose_reader_goes_away_is_quiet_to_its_end(probes: dict[str, Path]) -> None:
    """As in `lmprobe-tl inspect p.safetensors | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS, "inspect", str(probes["prose"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert error == b""
    assert process.returncode in (1, 141)


# --- on a terminal -------------------------------------------------------------------------------------------------------


def on_a_terminal(
    arguments: list[str], *, until: str, then: bytes, seconds: float = 120, **settings: str
) -> tuple[int, str]:
    """Run the command as the foreground process of a terminal of its own, type `then` once `until` has come, and wait for
    its end. Returns exit code and output."""
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background would pass on that it is ignored
        os.execve(sys.executable, [sys.executable, "-c", STARTS, *arguments], environment() | settings)
    output, end = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if not select.select([terminal], [], [], 0.2)[0]:
                continue
            try:
                output += os.read(terminal, 65536)
            except OSError:  # its end
                break
            if then and until.encode() in output:
                os.write(terminal, then)
                then = b""
        else:
            os.kill(process, signal.SIGKILL)
    finally:
        _, status = os.waitpid(process, 0)
        os.close(terminal)
    return os.waitstatus_to_exitcode(status), output.decode()


def test_ctrl_c_amid_the_text_keeps_it_and_leaves_a_terminal_to_go_on_with(probes: dict[str, Path]) -> None:
    code, output = on_a_terminal(
        ["generate", str(probes["live"]), "def f(x):", "-n", "480", "--seed", "1"],
        until=" tokens/s",
        then=b"\x03",
        TERM="xterm-256color",
        COLORTERM="truecolor",
        COLUMNS="",
        NO_COLOR="",
    )
    assert code == 130, output
    terminal = TinyTerminal(80, 25)
    terminal.feed(output)
    *text, summary, message = terminal.lines
    assert message == "lmprobe-tl: interrupted"
    assert re.fullmatch(r"ended by: interrupted; .*; \d+ tokens? at \d+/s", summary)
    assert "def f(x):" in re.sub("[⟦⟧]", "", text[0])
    assert "tokens/s" not in "".join(terminal.lines)
    assert "\x1b[?25l" not in output, "the cursor is never hidden"
    assert output.rfind("\x1b[?7h") > output.rfind("\x1b[?7l"), "lines wrap again"
    assert "48;2;" in output
    assert (terminal.column, terminal.style) == (0, "")
