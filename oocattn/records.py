"""Records: frozen dataclasses to JSON and back, validated by field types. All JSON that the package reads is parsed here.

Unknown and missing fields, wrong types and numbers out of range are refused. NaN and Inf are "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_NOT_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included: `Annotated[int, Range(1, 64)]`."""

    least: float
    most: float


@dataclass(frozen=True)
class Pattern:
    """A regular expression that a text matches in full: the annotation of a field."""

    expression: str


ADDED = object()
"""The annotation of a field that older versions did not write: where it is missing, it has its default."""


OMITTED = object()
"""The annotation of a field that is written only where it is not None: records without it are those of older versions."""


UNRECORDED = object()
"""The annotation of a field that is not written to JSON: what is read has its default."""


class Excerpt:
    """Base of records that hold some fields of a JSON object, and ignore others."""


MOST_COUNT = 2**96
"""The largest number of things, bytes among them, that a record holds."""

Count = Annotated[int, Range(0, MOST_COUNT)]
"""A number of things, bytes among them."""

Positive = Annotated[int, Range(1, MOST_COUNT)]
"""A number of things of which there is at least one."""

Seconds = Annotated[float, Range(0.0, 1e12)]
"""A duration, or a moment since the epoch."""


def parse_json(content: bytes, not_finite: bool = False) -> dict[str, Any]:
    """Parse a JSON object; ValueError for anything else, however long, deep or badly encoded it is.

    `not_finite` accepts NaN, Infinity and -Infinity too, which JSON lacks, and which Zarr writes in attributes.
    """
    try:
        found = parse_value(content.decode("utf-8"), not_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}")
    return found


def parse_value(text: str, not_finite: bool = False) -> Any:
    """Parse JSON of any kind, as `parse_json`."""
    try:
        return json.loads(text, parse_constant=None if not_finite else _refuse_constant)
    except RecursionError:
        raise ValueError("not JSON that is believed: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def to_json(value: Any) -> Any:
    """Convert a value to JSON-ready ones."""
    if is_dataclass(value) and not isinstance(value, type):
        found = {name: (getattr(value, name), hint) for name, hint in _hints(type(value))[0].items()}
        return {name: to_json(item) for name, (item, hint) in found.items() if item is not None or not _is(OMITTED, hint)}
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def document(number: int, record: Any, *follows: str) -> dict[str, Any]:
    """Convert a record to a JSON document of this format, with properties that follow from its fields."""
    return {"format": number, **to_json(record), **{name: to_json(getattr(record, name)) for name in follows}}


def from_json(kind: type[T], content: object, name: str = "") -> T:
    """Convert what `to_json` made to the record `kind`; ValueError for anything else.

    Numbers must lie in the `Range` of their field; a NaN is accepted only where the field has none. `name` is what messages
    call the record: the field that holds it.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a {kind.__name__}, found {content!r:.80}")
    hints, required = _hints(kind)  # type: ignore[arg-type]  # a class is hashable
    if not (required <= content.keys() and (issubclass(kind, Excerpt) or content.keys() <= hints.keys())):
        found = str(sorted(map(str, content)))
        raise ValueError(f"expected the fields {sorted(hints)} of a {kind.__name__}, found {found:.200}")
    prefix = f"{name}." if name else ""
    return kind(**{field: _value(hint, content[field], prefix + field) for field, hint in hints.items() if field in content})


@cache
def _hints(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """A record's field types by name, and the names of required fields."""
    hints = get_type_hints(kind, include_extras=True)
    own: dict[str, Any] = {field.name: hints[field.name] for field in fields(kind)}
    own = {name: hint for name, hint in own.items() if not _is(UNRECORDED, hint)}
    return own, frozenset(name for name, hint in own.items() if not (_is(ADDED, hint) or _is(OMITTED, hint)))


def _is(annotation: object, hint: Any) -> bool:
    """Whether a field has this annotation."""
    return annotation in get_args(hint)


def differences(before: object, now: object) -> str:
    """Describe differences: "causal False, now True; scale 0.1, now none", or "". Of `digests`, the arrays are named."""
    old, new = to_json(before), to_json(now)
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return "" if old == new else f"{_show(old)}, now {_show(new)}"
    found = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name) and name == "digests":
            arrays, others = (values.get(name) or {} for values in (old, new))
            found += [f"other {each}" for each in {**arrays, **others} if arrays.get(each) != others.get(each)]
        elif old.get(name) != new.get(name):
            found.append(f"{str(name).replace('_', ' ')} {differences(old.get(name), new.get(name))}")
    return "; ".join(found)


def _show(value: object) -> str:
    return "none" if value is None else f"{value!s:.200}"


def _value(hint: Any, found: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _check_annotations(arguments[1:], _value(arguments[0], found, name), name)
    if origin is Literal and any(found == each and type(found) is type(each) for each in arguments):
        return found
    if origin in (Union, UnionType) and found is None and NoneType in arguments:
        return None
    if origin in (Union, UnionType) and found is not None:
        return _value(next(argument for argument in arguments if argument is not NoneType), found, name)
    if origin is tuple and isinstance(found, list):
        return _tuple(arguments, found, name)
    if origin is Mapping and isinstance(found, Mapping):
        return {str(key): _value(arguments[1], item, name) for key, item in found.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, found, name)
    if hint is float and (type(found) in (int, float) or (isinstance(found, str) and found in _NOT_FINITE)):
        try:
            return float(found)
        except OverflowError:
            raise ValueError(f"{name} is too large for a number") from None
    if hint is Any or (hint in (int, str, bool) and type(found) is hint):
        return found
    raise ValueError(f"{name} is {found!r:.80}, expected {getattr(hint, '__name__', hint)}")


def _tuple(arguments: tuple[Any, ...], found: list[Any], name: str) -> tuple[Any, ...]:
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(found)
    if len(arguments) != len(found):
        raise ValueError(f"{name} has {len(found)} items, expected {len(arguments)}")
    return tuple(_value(hint, item, name) for hint, item in zip(arguments, found, strict=True))


def _check_annotations(annotations: tuple[Any, ...], found: Any, name: str) -> Any:
    for allowed in annotations:
        if isinstance(allowed, Range) and not allowed.least <= found <= allowed.most:
            raise ValueError(f"{name} is {found!r:.80}, expected {allowed.least:g} to {allowed.most:g}")
        if isinstance(allowed, Pattern) and not re.fullmatch(allowed.expression, found):
            raise ValueError(f"{name} is {found!r:.80}, expected a text like {allowed.expression}")
    return found
