"""The file is a contract: golden bytes, lossless round trips, writing all or nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_reference import HEADS, make_head_probe

from lmprobe_tl import files, probe_file, probe_spec
from lmprobe_tl.errors import InputError, ProbeFileError
from lmprobe_tl.probe_file import load_probe, save_probe
from lmprobe_tl.probe_summary import probe_summary
from lmprobe_tl.weights import ProbeWeights

GOLDEN = Path(__file__).parent / "data" / "golden_probe_3.safetensors"
GOLDEN_2 = Path(__file__).parent / "data" / "golden_probe_2.safetensors"  # written with format version 2
GOLDEN_1 = Path(__file__).parent / "data" / "golden_probe.safetensors"  # written with format version 1
HOOKS = ("blocks.1.hook_resid_post", "blocks.0.hook_resid_post")


def golden_probe() -> ProbeWeights:
    """Every field filled in, with numbers that float32 holds exactly."""
    return ProbeWeights.from_direction(
        torch.tensor([1.5, -1.5, 0.25, -0.25]),
        -0.5,
        name="täuschung ☂",
        hook_points=HOOKS,
        labels=(False, "yes"),
        description='says "so"\nand so',
        n_layers=2,
        model=probe_spec.ModelRecord(id="tiny", revision="abc", config_fingerprint="c1"),
        tokenizer=probe_spec.TokenizerRecord(fingerprint="t1", prepend_bos=False, chat_template_fingerprint="ct"),
        residual_basis="any",
        normalization="layernorm",
        pooling=probe_spec.PoolingRecord(train="mean", inference="score:ema_max(0.5)", include_bos=True),
        threshold=probe_spec.ThresholdRecord(
            value=0.75,
            unit="probability",
            method="pac",
            fpr=0.01,
            delta=0.05,
            n=500,
            rank=499,
            statistic="running maximum of score:ema_max(0.5)",
            guarantee="At most 1% of new text,\nmostly.",
        ),
        probability_calibration=probe_spec.ProbabilityRecord(
            slope=1.5,
            intercept=-0.25,
            n_negative=500,
            n_positive=20,
            statistic="running maximum of score:ema_max(0.5)",
            log_loss_before=0.75,
            log_loss_after=0.5,
            brier_before=0.25,
            brier_after=0.125,
        ),
        training=probe_spec.TrainingRecord(
            data_sha256="ab" * 32, n_prompts=4, n_examples=40, class_counts=(15, 25), classifier="lda", random_state=7
        ),
        metrics={
            "auroc": probe_spec.MetricRecord(value=0.9, low=0.8, high=0.95, confidence=0.95, n=100),
            "accuracy": probe_spec.MetricRecord(value=1, n=3),
        },
        versions={"torch": "2.13.0", "lmprobe_tl": "0.1.0"},
        licence="MIT",
    )


# The contract


def test_saved_bytes_are_the_golden_bytes(tmp_path: Path) -> None:
    path = golden_probe().save(tmp_path / "probe.safetensors")
    assert path == tmp_path / "probe.safetensors"
    assert path.read_bytes() == GOLDEN.read_bytes()


def test_the_golden_file_loads_as_what_was_saved() -> None:
    loaded, original = load_probe(str(GOLDEN)), golden_probe()
    assert loaded.spec.to_dict() == original.spec.to_dict() and loaded.spec == original.spec
    assert [type(label) for label in loaded.labels] == [bool, str]
    assert loaded.direction.tolist() == [[1.5, -1.5, 0.25, -0.25]] and loaded.intercept.tolist() == [-0.5]
    assert loaded.logits(torch.tensor([1.0, 0.0, 2.0, 0.0])).item() == 1.5


def test_the_golden_file_of_version_1_loads_and_what_it_could_not_say_is_none() -> None:
    loaded, now = load_probe(GOLDEN_1), golden_probe()
    assert now.threshold is not None
    threshold = replace(now.threshold, rank=None, statistic=None, guarantee=None)
    assert loaded.spec == replace(now.spec, threshold=threshold, probability_calibration=None)
    assert torch.equal(loaded.direction, now.direction) and torch.equal(loaded.intercept, now.intercept)
    rows = probe_summary(loaded)
    assert rows["threshold"] == "probability >= 0.75 (method pac, fpr 0.01, delta 0.05, n 500)"
    assert (rows["guarantee"], rows["probability calibration"]) == ("not recorded", "none")


@pytest.mark.parametrize(("old", "version"), [(GOLDEN_1, 1), (GOLDEN_2, 2)])
def test_an_older_file_is_saved_as_the_newest_version(old: Path, version: int, tmp_path: Path) -> None:
    assert f'\\"format_version\\":{version}'.encode() in old.read_bytes()
    path = load_probe(old).save(tmp_path / "probe.safetensors")
    assert b'\\"format_version\\":3' in path.read_bytes()
    assert load_probe(path).spec == load_probe(old).spec


def test_the_golden_file_of_version_2_says_the_same() -> None:
    loaded, now = load_probe(GOLDEN_2), golden_probe()
    assert loaded.spec == now.spec
    assert torch.equal(loaded.direction, now.direction) and torch.equal(loaded.intercept, now.intercept)


GOLDEN_HEADS = Path(__file__).parent / "data" / "golden_polynomial.safetensors"


def golden_polynomial() -> ProbeWeights:
    spec = probe_spec.ProbeSpec(
        name="curved",
        hook_points=("blocks.0.hook_resid_post",),
        d_model=2,
        kind="polynomial",
        head=probe_spec.HeadRecord(degree=2, rank=1),
    )
    readout, readout_intercept = torch.tensor([[1.0, 0.5]]), torch.tensor([0.25])
    return ProbeWeights(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, -0.5]), spec, readout, readout_intercept)


def test_a_golden_file_with_a_readout(tmp_path: Path) -> None:
    assert golden_polynomial().save(tmp_path / "probe.safetensors").read_bytes() == GOLDEN_HEADS.read_bytes()
    loaded = load_probe(GOLDEN_HEADS)
    # readings of (1, -1): -1 + 0.5 and -1 - 0.5; -0.5 + 0.5 * 1.5 ** 2 + 0.25
    assert loaded.logits(torch.tensor([1.0, -1.0])).item() == 0.875


@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_survives_the_file(kind: str, tmp_path: Path) -> None:
    weights = make_head_probe(kind, HOOKS)
    loaded = load_probe(weights.save(tmp_path / "probe.safetensors"))
    assert loaded.spec == weights.spec
    for what in ("direction", "intercept", "readout", "readout_intercept"):
        before, after = getattr(weights, what), getattr(loaded, what)
        assert (after is None) if before is None else torch.equal(after, before)


def test_the_golden_file_is_laid_out_as_documented() -> None:
    """Read with the standard library and numpy alone."""
    content = GOLDEN.read_bytes()
    (n_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n_bytes])
    assert set(header) == {"__metadata__", "probe.direction", "probe.intercept"}
    start, end = header["probe.direction"]["data_offsets"]
    np.testing.assert_array_equal(
        np.frombuffer(content[8 + n_bytes :][start:end], "<f4"), np.array([1.5, -1.5, 0.25, -0.25], "<f4")
    )
    assert list(header["__metadata__"]) == ["lmprobe_tl"]
    text = header["__metadata__"]["lmprobe_tl"]
    document = json.loads(text)
    assert (document["format"], document["format_version"]) == ("lmprobe_tl.probe", 3)
    assert document["spec"]["labels"] == [False, "yes"] and document["spec"]["threshold"]["fpr"] == 0.01
    assert text.isascii() and text == json.dumps(document, sort_keys=True, separators=(",", ":"))


def test_another_process_writes_the_same_bytes_and_needs_neither_sklearn_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from lmprobe_tl.probe_file import load_probe;"
        "from lmprobe_tl.probe_summary import probe_summary;"
        f"p = load_probe({str(GOLDEN)!r}); p.probabilities(torch.zeros(2, 4)); p.to_raw_basis(); probe_summary(p);"
        "p.save(sys.argv[1]);"
        "print([m for m in ('sklearn', 'transformer_lens', 'transformers', 'torch') if m in sys.modules])"
    )
    target, environment = tmp_path / "probe.safetensors", {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code, str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "['torch']"
    assert target.read_bytes() == GOLDEN.read_bytes()


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
share = st.floats(0, 1)
labels = st.lists(st.booleans() | st.integers(-(2**63), 2**63 - 1) | text, min_size=2, max_size=4, unique=True)
metrics = st.builds(probe_spec.MetricRecord, value=st.floats(-1e300, 1e300), n=st.integers(1, 10**9))
thresholds = st.builds(
    probe_spec.ThresholdRecord,
    value=share,
    fpr=share,
    n=st.just(9),
    rank=st.none() | st.integers(1, 9),
    statistic=st.none() | text,
    guarantee=st.none() | text,
)
size = st.integers(1, 10**9)
loss = st.floats(0, 1e300)
curves = st.builds(
    probe_spec.ProbabilityRecord,
    slope=st.floats(1e-300, 1e300),
    intercept=st.floats(-1e300, 1e300),
    n_negative=size,
    n_positive=size,
    statistic=text,
    log_loss_before=loss,
    log_loss_after=loss,
    brier_before=loss,
    brier_after=loss,
)


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(), chosen=labels, hooks=st.lists(printable, min_size=1, max_size=3, unique=True), width=st.integers(1, 5)
)
def test_every_probe_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, chosen: list[Any], hooks: list[str], width: int
) -> None:
    spec = probe_spec.ProbeSpec(
        name=data.draw(printable),
        description=data.draw(text),
        hook_points=tuple(hooks),
        d_model=width,
        labels=tuple(chosen),
        model=probe_spec.ModelRecord(id=data.draw(text)),
        threshold=data.draw(st.none() | thresholds) if len(chosen) == 2 else None,
        probability_calibration=data.draw(st.none() | curves) if len(chosen) == 2 else None,
        metrics=data.draw(st.dictionaries(text, metrics, max_size=3)),
        versions=data.draw(st.dictionaries(text, text, max_size=3)),
    )
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    size = spec.n_outputs * width * len(hooks)
    direction = torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size))).reshape(spec.n_outputs, -1)
    probe = ProbeWeights(direction, torch.zeros(spec.n_outputs), spec)
    path = tmp_path_factory.mktemp("round") / "probe.safetensors"
    first = probe.save(path).read_bytes()
    loaded = load_probe(path)
    assert loaded.spec == spec
    # == alone would let True pass for 1
    assert [(type(label), label) for label in loaded.labels] == [(type(label), label) for label in chosen]
    assert torch.equal(loaded.direction, direction)
    assert loaded.save(path).read_bytes() == first
    assert all(character >= " " for row in probe_summary(loaded).values() for character in row)


# Writing


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "probe.safetensors"
    path.write_bytes(b"old")
    return path


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("where", ["write", "fsync", "replace", "copymode"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    old: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    if where == "write":
        monkeypatch.setattr(files, "open", type("Full", (io.FileIO,), {"write": failing(error)}), raising=False)
    elif where == "copymode":
        monkeypatch.setattr(files.shutil, where, failing(error))
    else:
        monkeypatch.setattr(files.os, where, failing(error))
    if isinstance(error, OSError):
        with pytest.raises(ProbeFileError, match=r"No space left on device. An older file there is unchanged") as caught:
            golden_probe().save(old)
        assert caught.value.__cause__ is error
    else:
        with pytest.raises(KeyboardInterrupt):
            golden_probe().save(old)
    monkeypatch.undo()
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == [old.name]


def test_a_file_system_that_takes_no_more_leaves_the_old_file(old: Path) -> None:
    code = (
        "import resource, sys; from lmprobe_tl.probe_file import load_probe;"
        f"p = load_probe({str(GOLDEN)!r}); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); p.save(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(old)], capture_output=True, text=True)
    assert done.returncode == 1 and "ProbeFileError: Cannot save" in done.stderr and "File too large" in done.stderr
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == [old.name]


def test_the_new_file_is_written_beside_the_old_one(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename is atomic on one disk only."""
    moves: list[tuple[Path, Path]] = []
    monkeypatch.setattr(files.os, "replace", lambda source, target: moves.append((source, target)))
    golden_probe().save(old)
    [(source, target)] = moves
    assert target == old and source.parent == old.parent and source.read_bytes() == GOLDEN.read_bytes()


def test_saving_replaces_unless_told_not_to(old: Path) -> None:
    with pytest.raises(ProbeFileError, match="exists already; choose another name or pass overwrite=True"):
        golden_probe().save(old, overwrite=False)
    assert old.read_bytes() == b"old"
    save_probe(golden_probe(), str(old))
    assert old.read_bytes() == GOLDEN.read_bytes() and os.listdir(old.parent) == [old.name]
    fresh = golden_probe().save(old.with_name("fresh.safetensors"), overwrite=False)
    assert fresh.read_bytes() == GOLDEN.read_bytes()


def test_a_bad_path_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("probe.pt", "probe", "probe.SAFETENSORS"):
        with pytest.raises(InputError, match=r"expected a name that ends in \.safetensors"):
            golden_probe().save(tmp_path / name)
    with pytest.raises(ProbeFileError, match=r"the folder '.*absent' does not exist; create it first"):
        golden_probe().save(tmp_path / "absent" / "probe.safetensors")
    assert os.listdir(tmp_path) == []
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ProbeFileError, match=r"(?i)directory"):
        golden_probe().save(tmp_path / "folder.safetensors")
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_a_probe_that_could_not_be_loaded_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talkative = ProbeWeights.from_direction([1.0], name="p", hook_points="h", description="x" * 2**20)
    with pytest.raises(ProbeFileError, match=r"the limits are 268435456 and 1048576. Shorten the description"):
        talkative.save(tmp_path / "probe.safetensors")
    monkeypatch.setattr(probe_file, "MAX_FILE_BYTES", 100)
    with pytest.raises(ProbeFileError, match="the limits are 100 and"):
        golden_probe().save(tmp_path / "probe.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_a_new_file_has_the_permissions_of_the_umask_and_a_replaced_one_its_own(
    tmp_path: Path, umask: int, mode: int
) -> None:
    path = tmp_path / "probe.safetensors"
    before = os.umask(umask)
    try:
        golden_probe().save(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        path.chmod(0o600)
        golden_probe().save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_symlink_stays_and_its_target_is_replaced(old: Path) -> None:
    link = old.parent / "links" / "link.safetensors"
    link.parent.mkdir()
    link.symlink_to(old)
    assert golden_probe().save(link) == link
    assert link.is_symlink() and old.read_bytes() == GOLDEN.read_bytes()
    assert os.listdir(link.parent) == [link.name]


def test_the_summary_has_a_readable_row_for_everything() -> None:
    rows = probe_summary(load_probe(GOLDEN))
    assert rows == {
        "name": "täuschung ☂",
        "description": 'says "so"\\nand so',
        "labels": "'yes' (positive), False (negative)",
        "kind": "linear",
        "hook points": "blocks.1.hook_resid_post, blocks.0.hook_resid_post",
        "d_model": "2",
        "model": "id tiny, revision abc, config fingerprint c1, layers 2",
        "tokenizer": "fingerprint t1, prepend bos False, chat template fingerprint ct",
        "residual basis": "any (normalization: layernorm)",
        "pooling": "train mean, inference score:ema_max(0.5), include bos True",
        "threshold": "probability >= 0.75 (method pac, fpr 0.01, delta 0.05, n 500, rank 499, "
        "statistic running maximum of score:ema_max(0.5))",
        "guarantee": "At most 1% of new text,\\nmostly.",
        "probability calibration": "sigmoid(1.5 z -0.25), z the logit of the running maximum of score:ema_max(0.5) "
        "(500 negative and 20 positive sequences, log loss 0.75 before and 0.5 after)",
        "training": f"data sha256 {'ab' * 32}, n prompts 4, n examples 40, class counts [15, 25], classifier lda, "
        "random state 7",
        "metric accuracy": "1 (n 3)",
        "metric auroc": "0.9 [0.8, 0.95] (0.95 confidence, n 100)",
        "versions": "lmprobe_tl 0.1.0, torch 2.13.0",
        "licence": "MIT",
        "size": "5 float32 numbers",
    }
    assert list(rows)[:3] == ["name", "description", "labels"]
    assert list(rows.items()) == list(probe_summary(golden_probe()).items())  # saving and loading keeps the order too


def test_the_summary_says_what_was_not_recorded_and_sends_no_command_to_the_terminal() -> None:
    plain = ProbeWeights.from_direction([[1.0], [2.0], [3.0]], name="p", hook_points="h\x1b[2J", labels=(0, "b", True))
    rows = probe_summary(plain)
    assert rows["labels"] == "0, 'b', True" and rows["hook points"] == "h\\x1b[2J"
    assert [rows[key] for key in ("description", "model", "threshold", "training", "versions", "licence")] == [
        "none", "not recorded", "none", "not recorded", "not recorded", "not stated",
    ]  # fmt: skip
    assert (rows["guarantee"], rows["probability calibration"]) == ("not recorded", "none")
