"""Frozen dataclasses to JSON and back, by the types of their fields: what is read back has those types, or is refused.

Every JSON text that this package reads is parsed here, whoever wrote it. JSON has no NaN and no Inf: they are written as
the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_NOT_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included: the annotation of a field, as in `Annotated[int, Range(1, 64)]`."""

    least: float
    most: float


MOST_COUNT = 2**96
"""The largest number of things, bytes among them, that a record holds."""

Count = Annotated[int, Range(0, MOST_COUNT)]
"""A number of things, bytes among them."""

Positive = Annotated[int, Range(1, MOST_COUNT)]
"""A number of things of which there is at least one."""

Seconds = Annotated[float, Range(0.0, 1e12)]
"""A duration, or a moment since the epoch."""


def parse_json(content: bytes, not_finite: bool = False) -> dict[str, Any]:
    """The JSON object in a text. Raises ValueError for anything else, however long, deep or badly encoded it is.

    `not_finite` takes NaN, Infinity and -Infinity too, which JSON has not, and which Zarr writes in attributes.
    """
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=None if not_finite else _refuse_constant)
    except RecursionError:
        raise ValueError("not JSON that is believed: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def to_json(value: Any) -> Any:
    """A value as JSON-ready ones."""
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(kind: type[T], content: object, may_lack: Collection[str] = ()) -> T:
    """The dataclass of type `kind` that `to_json` made this of. Raises ValueError for anything else.

    Numbers must lie in the `Range` of their field. A NaN or an Inf is taken only where the field has none. The fields
    `may_lack`, which older versions did not write, have their defaults where they are missing.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a {kind.__name__}, found {content!r:.80}")
    hints = get_type_hints(kind, include_extras=True)
    if not hints.keys() - set(may_lack) <= content.keys() <= hints.keys():
        found = str(sorted(map(str, content)))
        raise ValueError(f"expected the fields {sorted(hints)} of a {kind.__name__}, found {found:.200}")
    return kind(**{name: _value(hint, content[name], name) for name, hint in hints.items() if name in content})


def differences(before: object, now: object) -> str:
    """Where two records, JSON objects or values differ, with both values: "causal False, now True; scale 0.1, now 0.2".

    "" where they do not. A value that is missing is "none".
    """
    old, new = to_json(before), to_json(now)
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return "" if old == new else f"{_shown(old)}, now {_shown(new)}"
    found = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            found.append(f"{str(name).replace('_', ' ')} {differences(old.get(name), new.get(name))}")
    return "; ".join(found)


def _shown(value: object) -> str:
    return "none" if value is None else f"{value!s:.200}"


def _value(hint: Any, found: object, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_range(arguments[1], _value(arguments[0], found, name), name)
    if origin is Literal and isinstance(found, str) and found in arguments:
        return found
    if origin in (Union, UnionType) and found is None and NoneType in arguments:
        return None
    if origin in (Union, UnionType) and found is not None:
        return _value(next(argument for argument in arguments if argument is not NoneType), found, name)
    if origin is tuple and isinstance(found, list):
        return tuple(_value(arguments[0], item, name) for item in found)
    if origin is Mapping and isinstance(found, Mapping):
        return {str(key): _value(arguments[1], item, name) for key, item in found.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, found)
    if hint is float and (type(found) in (int, float) or (isinstance(found, str) and found in _NOT_FINITE)):
        return _as_float(found, name)
    if hint in (int, str, bool) and type(found) is hint:
        return found
    raise ValueError(f"{name} is {found!r:.80}, expected {getattr(hint, '__name__', hint)}")


def _as_float(found: Any, name: str) -> float:
    try:
        return float(found)
    except OverflowError:
        raise ValueError(f"{name} is too large for a number") from None


def _in_range(allowed: Range, found: Any, name: str) -> Any:
    if not allowed.least <= found <= allowed.most:
        raise ValueError(f"{name} is {found!r:.80}, expected {allowed.least:g} to {allowed.most:g}")
    return found
