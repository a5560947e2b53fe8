"""Hostile and broken files: each is refused by a ProbeFileError that says what is wrong with it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_tl import probe_file
from lmprobe_tl.errors import ProbeFileError
from lmprobe_tl.probe_file import load_probe
from lmprobe_tl.weights import ProbeWeights

GOLDEN = Path(__file__).parent / "data" / "golden_probe_2.safetensors"
GOLDEN_1 = Path(__file__).parent / "data" / "golden_probe.safetensors"
GOLDEN_BYTES = GOLDEN.read_bytes()


def document_of(change: Callable[[dict[str, Any]], Any], golden: Path = GOLDEN) -> str:
    content = golden.read_bytes()
    (n_bytes,) = struct.unpack("<Q", content[:8])
    document = json.loads(json.loads(content[8 : 8 + n_bytes])["__metadata__"]["lmprobe_tl"])
    change(document)
    return json.dumps(document)


def file_with(metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> bytes:
    """A safetensors file with the golden content, unless told otherwise."""
    golden = load_probe(GOLDEN)
    named = {f"probe.{key}": value for key, value in tensors.items()}
    named = {"probe.direction": golden.direction, "probe.intercept": golden.intercept} | named
    return safetensors.torch.save(named, {"lmprobe_tl": document_of(lambda d: None)} if metadata is None else metadata)


def raw_file(header: str | bytes, data: bytes = b"") -> bytes:
    encoded = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(encoded)) + encoded + data


def with_document(change: Callable[[dict[str, Any]], Any]) -> bytes:
    return file_with({"lmprobe_tl": document_of(change)})


def with_document_1(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The same in format version 1."""
    return file_with({"lmprobe_tl": document_of(change, GOLDEN_1)})


def with_header(change: Callable[[dict[str, Any]], Any]) -> bytes:
    content = file_with()
    (n_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n_bytes])
    change(header)
    return raw_file(json.dumps(header), content[8 + n_bytes :])


def torch_save(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"direction": torch.ones(3)}, buffer, **options)
    return buffer.getvalue()


def metadata_text(text: str) -> bytes:
    return file_with({"lmprobe_tl": text})


INNER = document_of(lambda d: None)
SPEC_KEY_TWICE = INNER.replace('"name":', '"name": "x", "name":', 1)
nan, wide = float("nan"), {"d_model": 2**40, "residual_basis": "raw"}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has only 0 bytes"),
    "too small": (b"\x02\x00\x00\x00\x00\x00\x00\x00{", "has only 9 bytes"),
    "truncated header": (GOLDEN_BYTES[:400], r"truncated: its header should have \d+ bytes and has 392"),
    "truncated data": (GOLDEN_BYTES[:-1], r"announces \d+ bytes but has only \d+"),
    "longer than announced": (GOLDEN_BYTES + b"\0", r"announces \d+ bytes but has more"),
    "text": (b"name,direction\n" * 9, "not a safetensors file: it starts with b'name"),
    "torch.save": (torch_save(), "a zip archive, as torch.save.*never loaded"),
    "old torch.save": (torch_save(_use_new_zipfile_serialization=False), "a Python pickle. Pickles can run code"),
    **{f"pickle {p}": (pickle.dumps({"a": [1.0] * 99}, p), "a Python pickle. .*never loaded") for p in range(2, 6)},
    "short pickle": (pickle.dumps(1, 2), "a Python pickle"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run 'git lfs pull'"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "its header has 9223372036854775808 bytes; .*at most 1048576"),
    "header over the cap": (raw_file("{" + " " * 2**20 + "}"), "its header has 1048578 bytes"),
    "header not JSON": (raw_file("{oops}"), "header is not valid JSON"),
    "header not UTF-8": (raw_file(b'{"\xff":1}'), "header is not valid JSON"),
    "header key twice": (raw_file('{"a": 1, "a": 2}'), "its header has the key 'a' twice"),
    "header nested": (raw_file('{"a":' + "[" * 10**5 + "]" * 10**5 + "}"), "nested too deeply"),
    "a model's weights": (
        safetensors.torch.save({"wte.weight": torch.zeros(2)}),
        "not a probe: .*1 tensors are .'wte.weight'.",
    ),
    "another metadata": (file_with({"format": "pt"}), "a safetensors file but not a probe"),
    "metadata is a list": (
        with_header(lambda h: h.update(__metadata__=["lmprobe_tl"])),
        "a safetensors file but not a probe",
    ),
    "metadata is a number": (with_header(lambda h: h.update(__metadata__={"lmprobe_tl": 3})), "expected one key"),
    "more metadata": (file_with({"lmprobe_tl": INNER, "x": "y"}), "its metadata is .*expected one key, 'lmprobe_tl'"),
    "JSON broken": (metadata_text(INNER[:-1]), "metadata 'lmprobe_tl' is not valid JSON"),
    "JSON a list": (metadata_text("[1]"), r"metadata 'lmprobe_tl' is \[1\]; expected a JSON object"),
    "JSON nested": (metadata_text("[" * 10**5), "nested too deeply"),
    "JSON long integer": (metadata_text('{"format":' + "9" * 9999 + "}"), "not valid JSON"),
    "NaN": (with_document(lambda d: d["spec"]["threshold"].update(value=nan)), "'lmprobe_tl' holds NaN"),
    "Infinity": (with_document(lambda d: d["spec"].update(d_model=-float("inf"))), "'lmprobe_tl' holds -Infinity"),
    "1e999": (
        metadata_text(INNER.replace('"value": 0.75', '"value": 1e999')),
        "threshold.value is inf; expected a finite number",
    ),
    "rank beyond n": (
        with_document(lambda d: d["spec"]["threshold"].update(rank=501)),
        r"threshold.rank is 501; .*1 to n, 500",
    ),
    "falling curve": (
        with_document(lambda d: d["spec"]["probability_calibration"].update(slope=-1)),
        r"probability_calibration.slope is -1.0; expected a number above 0",
    ),
    "no rank in version 2": (with_document(lambda d: d["spec"]["threshold"].pop("rank")), "threshold.rank is missing"),
    "no curve in version 2": (
        with_document(lambda d: d["spec"].pop("probability_calibration")),
        "probability_calibration is missing",
    ),
    "version 1 with a newer key": (
        with_document_1(lambda d: d["spec"].update(probability_calibration=None)),
        "'probability_calibration' is an unknown key in a file of format version 1",
    ),
    "version 1 with a newer key of the threshold": (
        with_document_1(lambda d: d["spec"]["threshold"].update(guarantee="all is well")),
        "'guarantee' is an unknown key in a file of format version 1",
    ),
    "version 2 that says 1": (
        with_document(lambda d: d.update(format_version=1)),
        "unknown key in a file of format version 1",
    ),
    "version 1 that says 2": (with_document_1(lambda d: d.update(format_version=2)), "probability_calibration is missing"),
    "version 1, unknown key": (with_document_1(lambda d: d["spec"].update(hook=1)), r"'hook' \(value 1\) is an unknown key"),
    "version 1, missing key": (with_document_1(lambda d: d["spec"].pop("licence")), "licence is missing"),
    "version 1, no threshold": (with_document_1(lambda d: d["spec"].pop("threshold")), "threshold is missing"),
    "version 1, bad threshold": (
        with_document_1(lambda d: d["spec"].update(threshold=[1])),
        r"threshold is \[1\]; expected",
    ),
    "version 1, spec a list": (with_document_1(lambda d: d.update(spec=[])), r"ProbeSpec is \[\]; expected a dictionary"),
    "key twice": (metadata_text(SPEC_KEY_TWICE), "'lmprobe_tl' has the key 'name' twice"),
    "format": (with_document(lambda d: d.update(format="sae")), "its format is 'sae'; expected 'lmprobe_tl.probe'"),
    "no format": (with_document(lambda d: d.pop("format")), "its format is None"),
    "newer": (with_document(lambda d: d.update(format_version=4)), "written by a newer lmprobe_tl .*version 4.*upgrade"),
    "version 0": (
        with_document(lambda d: d.update(format_version=0)),
        "format_version is 0; expected a whole number from 1 to 3",
    ),
    "version True": (
        with_document(lambda d: d.update(format_version=True)),
        "format_version is True; expected a whole number",
    ),
    "version text": (
        with_document(lambda d: d.update(format_version="9")),
        "format_version is '9'; expected a whole number",
    ),
    "no spec": (with_document(lambda d: d.pop("spec")), r"its keys are \['format', 'format_version'\]"),
    "extra key": (with_document(lambda d: d.update(code="x")), r"its keys are \['code',"),
    "spec a list": (with_document(lambda d: d.update(spec=[])), r"ProbeSpec is \[\]; expected a dictionary"),
    "unknown kind": (with_document(lambda d: d["spec"].update(kind="os.system")), "kind is 'os.system'; expected 'linear'"),
    "unknown spec key": (with_document(lambda d: d["spec"].update(hook=1)), r"'hook' \(value 1\) is an unknown key"),
    "missing spec key": (with_document(lambda d: d["spec"].pop("licence")), "licence is missing"),
    "long value": (with_document(lambda d: d["spec"].update(kind="x" * 10**5)), r"kind is 'x{119}\.\.\.; expected"),
    "escape sequence": (with_document(lambda d: d["spec"].update(name="\x1b[2J")), r"name is '\\x1b\[2J'"),
    "tensor missing": (
        with_header(lambda h: h.pop("probe.intercept")),
        r"tensors missing: \['probe.intercept'\], .*many: \[\]",
    ),
    "tensor extra": (file_with(scale=torch.ones(1)), r"tensors missing: \[\], tensors too many: \['probe.scale'\]"),
    "direction shape": (file_with(direction=torch.ones(1, 5)), r"'probe.direction' has shape \[1, 5\]; expected \[1, 4\]"),
    "flat direction": (file_with(direction=torch.ones(4)), r"'probe.direction' has shape \[4\]; expected \[1, 4\]"),
    "intercept shape": (file_with(intercept=torch.ones(2)), r"'probe.intercept' has shape \[2\]; expected \[1\]"),
    "third label": (
        with_document(
            lambda d: d["spec"].update(labels=[0, 1, 2], threshold=None, training=None, probability_calibration=None)
        ),
        r"'probe.direction' has shape \[1, 4\]; expected \[3, 4\], from kind 'linear', 3 labels, 2 hook points",
    ),
    "float64": (file_with(direction=torch.ones(1, 4, dtype=torch.float64)), "has dtype 'F64'; expected 'F32'"),
    "bfloat16": (file_with(intercept=torch.ones(1, dtype=torch.bfloat16)), "'probe.intercept' has dtype 'BF16'"),
    "entry a number": (with_header(lambda h: h.update({"probe.intercept": 3})), "'probe.intercept' has dtype None"),
    "nan direction": (file_with(direction=torch.tensor([[0, 0, nan, 0]])), r"direction is nan at \[0, 2\]"),
    "inf intercept": (file_with(intercept=torch.tensor([float("inf")])), r"intercept is inf at \[0\]"),
    "not centred": (file_with(direction=torch.tensor([[1.0, 0, 0, 0]])), "says residual_basis 'any'"),
    "overlap": (with_header(lambda h: h["probe.intercept"].update(data_offsets=[0, 4])), "(?i)offset"),
    "no offsets": (with_header(lambda h: h["probe.intercept"].pop("data_offsets")), "data_offsets"),
    "announces terabytes": (
        raw_file(
            json.dumps(
                {
                    "__metadata__": {"lmprobe_tl": document_of(lambda d: d["spec"].update(wide))},
                    "probe.direction": {"dtype": "F32", "shape": [1, 2**41], "data_offsets": [0, 2**43]},
                    "probe.intercept": {"dtype": "F32", "shape": [1], "data_offsets": [2**43, 2**43 + 4]},
                }
            )
        ),
        "announces 87960930.* bytes; the limit is 268435456",
    ),
}


@pytest.mark.parametrize("content, message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "probe.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProbeFileError, match=message) as caught:
        load_probe(path)
    assert str(path) in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 1500


def test_the_hostile_files_differ_from_a_good_one_only_where_they_say(tmp_path: Path) -> None:
    """The control: the builders above, with nothing changed, make files that load."""
    for content in (file_with(), with_document(lambda d: None), with_header(lambda h: None), metadata_text(INNER)):
        (tmp_path / "probe.safetensors").write_bytes(content)
        assert load_probe(tmp_path / "probe.safetensors").spec == load_probe(GOLDEN).spec
    (tmp_path / "probe.safetensors").write_bytes(with_document_1(lambda d: None))
    assert load_probe(tmp_path / "probe.safetensors").spec == load_probe(GOLDEN_1).spec
    (tmp_path / "probe.safetensors").write_bytes(with_document_1(lambda d: d["spec"].update(threshold=None)))
    assert load_probe(tmp_path / "probe.safetensors").threshold is None


@pytest.mark.parametrize("n_bytes", [896, 1152, 1408])
def test_a_header_length_that_looks_like_a_pickle_still_loads(tmp_path: Path, n_bytes: int) -> None:
    """Little-endian, these lengths start with 0x80 and 3 to 5, as pickles do."""
    for length in range(1200):
        probe = ProbeWeights.from_direction([1.0], name="p", hook_points="h", description="x" * length)
        content = probe_file._serialised(probe)
        if content[:8] == struct.pack("<Q", n_bytes):
            break
    assert content[:2] == bytes([0x80, n_bytes >> 8])
    path = tmp_path / "probe.safetensors"
    path.write_bytes(content)
    assert load_probe(path).spec == probe.spec


@settings(deadline=None, max_examples=150)
@given(golden=st.sampled_from([GOLDEN, GOLDEN_1]), position=st.integers(0), byte=st.integers(0, 255))
def test_a_changed_byte_gives_a_probe_or_a_probe_file_error(
    tmp_path_factory: pytest.TempPathFactory, golden: Path, position: int, byte: int
) -> None:
    content = bytearray(golden.read_bytes())
    content[position % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(content)
    with suppress(ProbeFileError):
        assert isinstance(load_probe(path), ProbeWeights)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ProbeFileError, match="there is no such file; check the path"):
        load_probe(tmp_path / "absent.safetensors")
    with pytest.raises(ProbeFileError, match=r"it is a folder; give the path of the \.safetensors file"):
        load_probe(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer forever
    with pytest.raises(ProbeFileError, match="not a regular file"):
        load_probe(tmp_path / "pipe")
