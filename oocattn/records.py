"""Frozen dataclasses to JSON and back, by the types of their fields: what is read back has those types, or is refused.

JSON has no NaN and no Inf: they are written as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_NOT_FINITE = ("nan", "inf", "-inf")


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


def from_json(kind: type[T], content: object) -> T:
    """The dataclass of type `kind` that `to_json` made this of. Raises ValueError for anything else."""
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a {kind.__name__}, found {content!r:.80}")
    hints = get_type_hints(kind)
    if content.keys() != hints.keys():
        raise ValueError(f"expected the fields {sorted(hints)} of a {kind.__name__}, found {sorted(map(str, content))}")
    return kind(**{name: _value(hint, content[name], name) for name, hint in hints.items()})


def _value(hint: Any, found: object, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal and found in arguments:
        return found
    if origin is UnionType and found is None and NoneType in arguments:
        return None
    if origin is UnionType and found is not None:
        return _value(next(argument for argument in arguments if argument is not NoneType), found, name)
    if origin is tuple and isinstance(found, list):
        return tuple(_value(arguments[0], item, name) for item in found)
    if origin is Mapping and isinstance(found, Mapping):
        return {str(key): _value(arguments[1], item, name) for key, item in found.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, found)
    if hint is float and (type(found) in (int, float) or found in _NOT_FINITE):
        return float(found)  # type: ignore[arg-type]  # checked just now
    if hint in (int, str, bool) and type(found) is hint:
        return found
    raise ValueError(f"{name} is {found!r:.80}, expected {getattr(hint, '__name__', hint)}")
