"""Checksums of a result's bits: made as it is written, kept in the attributes of its arrays, compared when it is verified.

A part is T tokens of one head, what a run writes as one chunk. Its checksum is the CRC-32 of its elements, little-endian and
in C order: of what they are, and not of how they are stored. A result that was copied to other chunks or compressed has the
same.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray

from oocattn.errors import IntegrityError
from oocattn.records import Count, Pattern, Positive, from_json, to_json
from oocattn.storage.results.rows import RowReader
from oocattn.units import ceil_div

ATTRIBUTE = "checksums"
"""The attribute of an array that has them."""

DIGITS = 8
"""Hexadecimal digits of a checksum."""

Digits = Annotated[str, Pattern("[0-9a-f]*")]
"""The checksums of some parts, one after another."""


@dataclass(frozen=True)
class Checksums:
    """Of an array [B, H, N, ...]: `digits` are 8 hexadecimal digits for every part of `rows` tokens, over (b, h, part)."""

    rows: Positive
    digits: Digits
    algorithm: Literal["crc32"] = "crc32"

    def __len__(self) -> int:
        return len(self.digits) // DIGITS

    def __getitem__(self, part: int) -> str:
        return self.digits[DIGITS * part : DIGITS * (part + 1)]


@dataclass(frozen=True)
class Damage:
    """Tokens [start, stop) of one head of an array that are not those that were written, and what is wrong with them."""

    array: str
    batch: Count
    head: Count
    start: Count
    stop: Count
    reason: str

    def __str__(self) -> str:
        where = f"batch {self.batch}, head {self.head}, tokens {self.start:,} to {self.stop - 1:,}"
        return f"{self.array}, {where}: {self.reason}"


def checksum(rows: NDArray[Any], before: int = 0) -> int:
    """The CRC-32 of some rows, which go on after those whose checksum is `before`."""
    native = np.ascontiguousarray(rows, rows.dtype.newbyteorder("="))
    words = native.reshape(-1).view(f"u{native.itemsize}").astype(f"<u{native.itemsize}", copy=False)
    return zlib.crc32(words.view(np.uint8).data, before)


def as_digits(value: int) -> str:
    """A checksum as it is recorded."""
    return f"{value:0{DIGITS}x}"


def recorded_checksums(array: zarr.Array[Any]) -> Checksums | None:
    """Those of an array [B, H, N, ...], None where there are none. Raises IntegrityError for what cannot be ours."""
    if ATTRIBUTE not in array.attrs:
        return None
    try:
        found = from_json(Checksums, array.attrs[ATTRIBUTE])
        parts = array.shape[0] * array.shape[1] * ceil_div(array.shape[2], found.rows)
        if len(found.digits) != DIGITS * parts:
            raise ValueError(f"{len(found.digits)} digits, expected {DIGITS * parts}")
    except ValueError as error:
        raise IntegrityError(
            f"{array.store_path}: its attribute {ATTRIBUTE!r} is not the checksums of an array {list(array.shape)} "
            f"({error}): it is damaged; copy the result again"
        ) from None
    return found


def result_digest(arrays: Mapping[str, zarr.Array[Any]], recorded: Mapping[str, Checksums]) -> str:
    """A SHA-256 over names, shapes, dtypes and the checksums of all parts: the identity of a result's bits."""
    described = [
        [name, list(array.shape), array.dtype.name, to_json(recorded[name])] for name, array in sorted(arrays.items())
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def find_damage(reader: RowReader, recorded: Checksums, step: int) -> Iterator[Damage]:
    """The parts of an array that are not as they were written, read `step` rows at a time.

    Raises OSError as the file system does: what could not be read may be as it was.
    """
    batches, heads, tokens, *row = reader.shape
    buffer = np.empty((min(step, recorded.rows, tokens), *row), reader.dtype)
    places = (
        (batch, head, start)
        for batch in range(batches)
        for head in range(heads)
        for start in range(0, tokens, recorded.rows)
    )
    for part, (batch, head, start) in enumerate(places):
        stop = min(start + recorded.rows, tokens)
        try:
            found = as_digits(_checksum_of_part(reader, batch, head, start, stop, buffer))
        except IntegrityError as error:
            yield Damage(reader.name, batch, head, start, stop, str(error))
            continue
        if found != recorded[part]:
            yield Damage(reader.name, batch, head, start, stop, f"checksum {found}, written with {recorded[part]}")


def _checksum_of_part(reader: RowReader, batch: int, head: int, start: int, stop: int, buffer: NDArray[Any]) -> int:
    value = 0
    for low in range(start, stop, len(buffer)):
        rows = buffer[: min(stop - low, len(buffer))]
        reader.read(batch, head, low, rows)
        value = checksum(rows, value)
    return value
