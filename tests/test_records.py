"""Records survive JSON, and everything else is refused, with the field by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from oocattn.records import ADDED, Count, Excerpt, Pattern, Range, differences, from_json, parse_json, to_json


@dataclass(frozen=True)
class Inner:
    pair: tuple[Count, Count]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    share: Annotated[float, Range(0.0, 1.0)]
    error: float
    word: Literal["a", "b"]
    digits: Annotated[str, Pattern("[0-9a-f]*")]
    places: Mapping[str, Count | None]
    anything: Mapping[str, Any]
    later: Annotated[Count, ADDED] = 7


@dataclass(frozen=True)
class Part(Excerpt):
    share: float


OUTER = Outer(Inner((1, 2**70), ("x",)), 0.5, math.inf, "a", "00ff", {"p": 1, "q": None}, {"free": [1, None]}, later=3)

JSON = to_json(OUTER)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in JSON.items() if key != name}


def test_a_record_survives_json() -> None:
    assert from_json(Outer, JSON) == OUTER


def test_a_field_of_a_later_version_has_its_default() -> None:
    assert from_json(Outer, without("later")).later == 7


def test_an_excerpt_ignores_other_fields() -> None:
    assert from_json(Part, JSON) == Part(0.5)
    with pytest.raises(ValueError, match="expected the fields"):
        from_json(Part, without("share"))


@pytest.mark.parametrize("name", [name for name in JSON if name != "later"])
def test_a_missing_field_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"expected the fields .*{name}"):
        from_json(Outer, without(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "expected the fields"),
        ({"share": 1.5}, "share is 1.5, expected 0 to 1"),
        ({"share": "nan"}, "share is nan, expected 0 to 1"),
        ({"share": True}, "share is True, expected float"),
        ({"error": 10**400}, "error is too large"),
        ({"error": "infinity"}, "error is 'infinity', expected float"),
        ({"word": "c"}, "word is 'c', expected"),
        ({"digits": "0G"}, r"digits is '0G', expected a text like \[0-9a-f\]\*"),
        ({"digits": "0f\n"}, "digits is"),
        ({"later": True}, "later is True, expected int"),
        ({"places": {"p": -1}}, "places is -1, expected 0"),
        ({"inner": None}, "expected a Inner, found None"),
        ({"inner": {"pair": [1], "names": []}}, "inner.pair has 1 items, expected 2"),
        ({"inner": {"pair": [1, 2], "names": [3]}}, "inner.names is 3, expected str"),
    ],
)
def test_a_wrong_field_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(Outer, {**JSON, **change})


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' * 100_000, b"\xff", b"[]", b'{"a": NaN}', b"", b'{"a": 1'])
def test_what_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="JSON"):
        parse_json(content)


def test_differences_name_both_values() -> None:
    assert differences({"a_b": 1, "c": 2}, {"a_b": 3, "c": 2}) == "a b 1, now 3"
    assert differences(OUTER, OUTER) == ""
