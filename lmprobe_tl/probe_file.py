"""ProbeWeights <-> one .safetensors file. Nothing here ever unpickles; every file is checked as if it meant harm."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError

from lmprobe_tl.checked_record import shown
from lmprobe_tl.errors import InputError, ProbeFileError
from lmprobe_tl.files import canonical_json, write_atomically
from lmprobe_tl.probe_spec import HeadRecord, ProbeSpec
from lmprobe_tl.weight_tensors import tensor_shapes
from lmprobe_tl.weights import ProbeWeights

SUFFIX = ".safetensors"
METADATA_KEY = "lmprobe_tl"
FORMAT = "lmprobe_tl.probe"
FORMAT_VERSION = 3
_OLDEST_VERSION = 1
MAX_FILE_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20

_LENGTH_BYTES = 8  # a safetensors file opens with its header's length, little-endian, and then the header's "{"
_DAMAGED = "The file is damaged or was not written by lmprobe_tl; get it again from its source."
_PICKLES_ARE_REFUSED = "Pickles can run code and are never loaded; ask its author to save the probe as .safetensors."
_OTHER_FORMATS = {
    b"PK\x03\x04": f"It is a zip archive, as torch.save (.pt) and numpy (.npz) write. {_PICKLES_ARE_REFUSED}",
    b"version https://git-lfs": "It is a Git LFS pointer, not the file itself; run 'git lfs pull'.",
} | {bytes([0x80, protocol]): f"It is a Python pickle. {_PICKLES_ARE_REFUSED}" for protocol in range(2, 6)}


def save_probe(weights: ProbeWeights, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
    """Write the probe as one .safetensors file, all or nothing, and return its path.

    Equal probes give equal bytes. On any failure an older file at `path` stays as it was. A symlink is kept and its target
    replaced; a replaced file's permissions are kept. InputError: another suffix. ProbeFileError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"path is {str(path)!r}; expected a name that ends in {SUFFIX}, such as 'my_probe{SUFFIX}'.")
    try:
        payload = _serialised(weights)
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise ProbeFileError(f"the folder {str(target.parent)!r} does not exist; create it first.")
        if not overwrite and target.exists():
            raise ProbeFileError("the file exists already; choose another name or pass overwrite=True.")
        write_atomically(target, payload)
    except ProbeFileError as error:
        raise ProbeFileError(f"Cannot save probe {weights.name!r} to {str(path)!r}: {error}") from error
    except OSError as error:
        hint = "An older file there is unchanged; check the folder's free space and permissions."
        raise ProbeFileError(f"Cannot save probe {weights.name!r} to {str(path)!r}: {error}. {hint}") from error
    return path


def load_probe(path: str | os.PathLike[str]) -> ProbeWeights:
    """Read a probe file; needs no model. ProbeFileError says what is wrong with the file and what to do."""
    path = Path(path)
    try:
        return _load(path)
    except FileNotFoundError as error:
        raise ProbeFileError(f"Cannot load probe {str(path)!r}: there is no such file; check the path.") from error
    except RecursionError as error:
        raise ProbeFileError(f"Cannot load probe {str(path)!r}: its JSON is nested too deeply. {_DAMAGED}") from error
    except (OSError, ProbeFileError) as error:
        raise ProbeFileError(f"Cannot load probe {str(path)!r}: {error}") from error


def probe_to_bytes(weights: ProbeWeights) -> bytes:
    """The content of the probe's file, for another process or machine."""
    return _serialised(weights)


def probe_from_bytes(payload: bytes) -> ProbeWeights:
    """The probe of a file's content. ProbeFileError says what is wrong with it."""
    return _read(io.BytesIO(payload))


def _serialised(weights: ProbeWeights) -> bytes:
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "spec": weights.spec.to_dict()}
    tensors = {f"probe.{what}": getattr(weights, what) for what in tensor_shapes(weights.spec)}
    payload = safetensors.torch.save(tensors, {METADATA_KEY: canonical_json(document)})
    header_bytes = int.from_bytes(payload[:_LENGTH_BYTES], "little")
    if header_bytes > MAX_HEADER_BYTES or len(payload) > MAX_FILE_BYTES:
        raise ProbeFileError(
            f"it would take {len(payload)} bytes, {header_bytes} of them for the header; the limits are {MAX_FILE_BYTES} "
            f"and {MAX_HEADER_BYTES}. Shorten the description or the metrics, or read fewer hook points."
        )
    return payload


def _load(path: Path) -> ProbeWeights:
    if path.is_dir():
        raise ProbeFileError(f"it is a folder; give the path of the {SUFFIX} file inside.")
    if path.exists() and not path.is_file():
        raise ProbeFileError("it is a device or a pipe, not a regular file.")
    with open(path, "rb") as file:
        return _read(file)


def _read(file: BinaryIO) -> ProbeWeights:
    header = _read_header(file)
    spec = _read_spec(header)
    numbers = _check_tensors(header, spec)
    expected_bytes = file.tell() + 4 * numbers
    if expected_bytes > MAX_FILE_BYTES:
        raise ProbeFileError(f"it announces {expected_bytes} bytes; the limit is {MAX_FILE_BYTES}. {_DAMAGED}")
    file.seek(0)
    payload = file.read(expected_bytes + 1)
    if len(payload) != expected_bytes:
        found = f"only {len(payload)}" if len(payload) < expected_bytes else "more"
        raise ProbeFileError(f"it announces {expected_bytes} bytes but has {found}. {_DAMAGED}")
    try:
        tensors = safetensors.torch.load(payload)
        return ProbeWeights(spec=spec, **{name.removeprefix("probe."): tensor for name, tensor in tensors.items()})
    except (SafetensorError, InputError) as error:
        raise ProbeFileError(f"{str(error).rstrip('.')}. {_DAMAGED}") from error


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """The safetensors header; the file then stands at the first byte of the tensors."""
    start = file.read(32)
    n_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if start[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{" or n_bytes > MAX_HEADER_BYTES:
        # only here: 0x80 0x03 opens a pickle, but also a header of 896 bytes
        for magic, message in _OTHER_FORMATS.items():
            if start.startswith(magic):
                raise ProbeFileError(message)
    if len(start) < _LENGTH_BYTES + 2:
        raise ProbeFileError(f"it has only {len(start)} bytes, too few for a safetensors file. {_DAMAGED}")
    if start[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise ProbeFileError(f"it is not a safetensors file: it starts with {start!r}. Give a file saved with .save().")
    if n_bytes > MAX_HEADER_BYTES:
        raise ProbeFileError(f"its header has {n_bytes} bytes; a probe's has at most {MAX_HEADER_BYTES}. {_DAMAGED}")
    file.seek(_LENGTH_BYTES)
    text = file.read(n_bytes)
    if len(text) < n_bytes:
        raise ProbeFileError(f"it is truncated: its header should have {n_bytes} bytes and has {len(text)}. {_DAMAGED}")
    return _parsed(text, "header")


def _read_spec(header: dict[str, Any]) -> ProbeSpec:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or METADATA_KEY not in metadata:
        tensors = [name for name in header if name != "__metadata__"]
        raise ProbeFileError(
            f"it is a safetensors file but not a probe: its metadata has no key {METADATA_KEY!r}, "
            f"and its {len(tensors)} tensors are {shown(tensors[:3])}. Give a file saved by lmprobe_tl."
        )
    if len(metadata) > 1 or not isinstance(metadata[METADATA_KEY], str):
        raise ProbeFileError(f"its metadata is {shown(metadata)}; expected one key, {METADATA_KEY!r}, with text. {_DAMAGED}")
    document = _parsed(metadata[METADATA_KEY], f"metadata {METADATA_KEY!r}")
    _check_format(document)
    try:
        spec = document["spec"]
        for version in range(document["format_version"], FORMAT_VERSION):
            spec = _UPGRADES[version](spec) if isinstance(spec, dict) else spec
        return ProbeSpec.from_dict(spec)
    except ProbeFileError as error:
        raise ProbeFileError(f"{error} {_DAMAGED}") from error


def _check_format(document: dict[str, Any]) -> None:
    if document.get("format") != FORMAT:
        raise ProbeFileError(f"its format is {shown(document.get('format'))}; expected {FORMAT!r}. {_DAMAGED}")
    version = document.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ProbeFileError(
            f"it was written by a newer lmprobe_tl (format version {shown(version)}, this one reads {FORMAT_VERSION}): "
            "upgrade with 'pip install --upgrade lmprobe_tl'."
        )
    if type(version) is not int or version < _OLDEST_VERSION:
        expected = f"a whole number from {_OLDEST_VERSION} to {FORMAT_VERSION}"
        raise ProbeFileError(f"its format_version is {shown(version)}; expected {expected}. {_DAMAGED}")
    if set(document) != {"format", "format_version", "spec"}:
        raise ProbeFileError(f"its keys are {shown(sorted(document))}; expected format, format_version, spec. {_DAMAGED}")


def _from_version_1(spec: dict[str, Any]) -> dict[str, Any]:
    spec, threshold = _with_new(spec, {"probability_calibration": None}, 1), spec.get("threshold")
    if isinstance(threshold, dict):
        spec["threshold"] = _with_new(threshold, dict.fromkeys(["rank", "statistic", "guarantee"]), 1)
    return spec


def _from_version_2(spec: dict[str, Any]) -> dict[str, Any]:
    if spec.get("kind") != "linear":
        raise ProbeFileError(f"kind is {shown(spec.get('kind'))}; expected 'linear' in a file of format version 2 or 1.")
    return _with_new(spec, {"head": HeadRecord().to_dict()}, 2)


# By format version: the spec of the next one. Anything that is no such spec is left to `from_dict`.
_UPGRADES = {1: _from_version_1, 2: _from_version_2}


def _with_new(record: dict[str, Any], new: dict[str, Any], version: int) -> dict[str, Any]:
    """The record with what came with the version after this one."""
    for key in new:
        if key in record:
            raise ProbeFileError(f"{key!r} is an unknown key in a file of format version {version}.")
    return record | new


def _check_tensors(header: dict[str, Any], spec: ProbeSpec) -> int:
    """Check names, dtypes and shapes against the spec, before any number is read. Returns the count of numbers."""
    expected = {f"probe.{what}": list(shape) for what, shape in tensor_shapes(spec).items()}
    found = set(header) - {"__metadata__"}
    if found != set(expected):
        missing, extra = sorted(set(expected) - found), sorted(found - set(expected))
        raise ProbeFileError(f"tensors missing: {shown(missing)}, tensors too many: {shown(extra)}. {_DAMAGED}")
    for name, shape in expected.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        if entry.get("dtype") != "F32":
            raise ProbeFileError(f"tensor {name!r} has dtype {shown(entry.get('dtype'))}; expected 'F32'. {_DAMAGED}")
        if entry.get("shape") != shape:
            raise ProbeFileError(
                f"tensor {name!r} has shape {shown(entry.get('shape'))}; expected {shape}, from kind {spec.kind!r}, "
                f"{spec.n_classes} labels, {len(spec.hook_points)} hook points and d_model {spec.d_model}. {_DAMAGED}"
            )
    return sum(math.prod(shape) for shape in expected.values())


def _parsed(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object, without the liberties that Python takes: no NaN or Infinity, no key twice."""
    try:
        document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except ProbeFileError as error:
        raise ProbeFileError(f"its {what} {error} {_DAMAGED}") from error
    except ValueError as error:  # broken JSON, broken UTF-8, or an integer too long to convert
        raise ProbeFileError(f"its {what} is not valid JSON ({error}). {_DAMAGED}") from error
    if not isinstance(document, dict):
        raise ProbeFileError(f"its {what} is {shown(document)}; expected a JSON object. {_DAMAGED}")
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ProbeFileError(f"has the key {shown(key)} twice.")
        result[key] = value
    return result


def _refuse_constant(constant: str) -> None:
    raise ProbeFileError(f"holds {constant}; expected finite numbers only.")
