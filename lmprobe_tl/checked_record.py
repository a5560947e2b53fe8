"""Frozen records that turn into JSON and back without loss: the annotations are the schema.

Every record checks its fields against them when it is made, whether by hand or from a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from lmprobe_tl.errors import InputError, ProbeFileError

_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # lone surrogates: JSON can spell them, no terminal or file can hold them


@dataclass(frozen=True)
class Record:
    """Base of the records: checks fields when made (InputError), converts to and from JSON-able dictionaries."""

    def __post_init__(self) -> None:
        for name, declared in _schema(type(self)).items():
            object.__setattr__(self, name, _checked(getattr(self, name), declared, name))
        self._validate()

    def _validate(self) -> None:
        """Check what a type cannot say; raises InputError."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)  # the read-only mappings inside have no pickle or copy of their own

    def to_dict(self) -> dict[str, Any]:
        """The record as dictionaries, lists, text, numbers, booleans and None."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record that `to_dict` wrote. Unknown or missing keys and wrong values are a ProbeFileError that names them."""
        try:
            return _from_mapping(cls, data)
        except InputError as error:
            raise ProbeFileError(str(error)) from error


def require(satisfied: bool, key: str, value: object, expected: str) -> None:
    if not satisfied:
        raise InputError(f"{key} is {shown(value)}; expected {expected}.")


def shown(value: object) -> str:
    """The value's repr, cut short: it may come from a file that means harm."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _schema(record: type[Record]) -> dict[str, Any]:
    hints = get_type_hints(record)
    return {item.name: hints[item.name] for item in fields(record)}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _from_mapping(record: Any, data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{record.__name__} is {shown(data)}; expected a dictionary.")
    keys = _schema(record)
    for key in data:
        if key not in keys:
            raise InputError(f"{shown(key)} (value {shown(data[key])}) is an unknown key; expected {', '.join(keys)}.")
    for key in keys:
        if key not in data:
            raise InputError(f"{key} is missing; expected the keys {', '.join(keys)}.")
    return record(**data)


def _checked(value: Any, declared: Any, where: str) -> Any:
    """The value in the declared type, lists made tuples and mappings read-only. InputError names `where` it stands."""
    origin = get_origin(declared)
    if origin is Literal:
        options = get_args(declared)
        require(isinstance(value, str) and value in options, where, value, " or ".join(map(repr, options)))
        return value
    if origin in (Union, UnionType):
        return _checked_union(value, get_args(declared), where)
    if origin is tuple:
        require(isinstance(value, (tuple, list)), where, value, "a list")
        return tuple(_checked(item, get_args(declared)[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        return _checked_mapping(value, get_args(declared)[1], where)
    if issubclass(declared, Record):
        return value if isinstance(value, declared) else _checked_record(value, declared, where)
    return _checked_scalar(value, declared, where)


def _checked_union(value: Any, members: tuple[Any, ...], where: str) -> Any:
    if value is None and NoneType in members:
        return None
    options = [member for member in members if member is not NoneType]
    if len(options) == 1:
        return _checked(value, options[0], where)
    # the exact type: True is an int for isinstance, but label True is not label 1
    require(type(value) in options, where, value, " or ".join(option.__name__ for option in options))
    return _checked(value, type(value), where)


def _checked_mapping(value: Any, declared: Any, where: str) -> Mapping[str, Any]:
    require(isinstance(value, Mapping), where, value, "a dictionary")
    keys = sorted(_checked_scalar(key, str, f"a key of {where}") for key in value)
    return MappingProxyType({key: _checked(value[key], declared, f"{where}[{shown(key)}]") for key in keys})


def _checked_record(value: Any, declared: type[Record], where: str) -> Record:
    require(isinstance(value, Mapping), where, value, f"a {declared.__name__}")
    try:
        return _from_mapping(declared, value)
    except InputError as error:
        raise InputError(f"{where}.{error}") from error


def _checked_scalar(value: Any, declared: type, where: str) -> Any:
    if declared is bool:
        require(isinstance(value, bool), where, value, "True or False")
        return value
    if declared is int:
        whole = isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63
        require(whole, where, value, "a whole number of at most 64 bits")
        return int(value)
    if declared is float:
        try:
            number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        except OverflowError:  # an integer of more than 308 digits
            number = math.nan
        require(math.isfinite(number), where, value, "a finite number")
        return number
    require(isinstance(value, str) and _HALF_CHARACTERS.search(value) is None, where, value, "text")
    return str(value)
