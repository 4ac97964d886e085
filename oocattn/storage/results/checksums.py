"""Checksums of a result's bits, kept in the attributes of its arrays.

A part is T tokens of one head, what a run writes as one chunk. Its checksum is the CRC-32 of its elements, little-endian and
in C order: of what they are, and not of how they are stored. A result copied to other chunks or compressed has the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from oocattn.errors import IntegrityError
from oocattn.records import Pattern, Positive, from_json, to_json
from oocattn.storage.nodes import StoredGroup, read_array
from oocattn.units import ceil_div

ATTRIBUTE = "checksums"
"""The attribute of an array that has them."""

DIGITS = 8
"""Hexadecimal digits of a checksum."""

Digits = Annotated[str, Pattern("[0-9a-f]*")]
"""The checksums of some parts, one after another."""


@dataclass(frozen=True)
class Checksums:
    """Checksums of an array [B, H, N, ...]: 8 digits for every part. A part is `rows` tokens of one (batch, head)."""

    rows: Positive
    digits: Digits
    algorithm: Literal["crc32"] = "crc32"

    def __len__(self) -> int:
        return len(self.digits) // DIGITS

    def __getitem__(self, part: int) -> str:
        return self.digits[DIGITS * part : DIGITS * (part + 1)]


def as_digits(value: int) -> str:
    """A checksum as it is recorded."""
    return f"{value:0{DIGITS}x}"


@dataclass(frozen=True)
class ArrayBits:
    """Shape, dtype and checksums (None: not recorded) of an array."""

    shape: tuple[int, ...]
    dtype: str
    checksums: Checksums | None


def read_bits(result: Path | StoredGroup) -> dict[str, ArrayBits]:
    """Read what metadata say of the bits of `out` and `lse`. Raises IntegrityError where they are missing or damaged."""
    bits = {}
    for name in ("out", "lse"):
        found, checksums = read_array(result, name), None
        try:
            if ATTRIBUTE in found.attributes:
                checksums = from_json(Checksums, found.attributes[ATTRIBUTE])
                expected = DIGITS * math.prod(found.shape[:2]) * ceil_div(found.shape[2], checksums.rows)
                if len(checksums.digits) != expected:
                    raise ValueError(f"{len(checksums.digits)} digits, expected {expected}")
        except (IndexError, ValueError) as error:
            raise IntegrityError(
                f"{result}/{name}: its attribute {ATTRIBUTE!r} is not the checksums of an array {list(found.shape)} "
                f"({error}): it is damaged; copy the result again"
            ) from None
        bits[name] = ArrayBits(found.shape, found.dtype, checksums)
    return bits


def result_digest(arrays: Mapping[str, ArrayBits]) -> str | None:
    """The identity of a result's bits: a SHA-256 of shapes and checksums. None where these are not recorded."""
    if any(array.checksums is None for array in arrays.values()):
        return None
    described = [[name, list(array.shape), array.dtype, to_json(array.checksums)] for name, array in sorted(arrays.items())]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
