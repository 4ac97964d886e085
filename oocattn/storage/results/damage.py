"""Parts of a result that are not as they were written, by checksum."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import IntegrityError
from oocattn.records import Count
from oocattn.storage.results.checksums import Checksums, as_digits
from oocattn.storage.results.rows import RowReader


@dataclass(frozen=True)
class Damage:
    """Tokens [start, stop) of one head that are not as they were written."""

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


def find_damage(reader: RowReader, recorded: Checksums, step: int) -> Iterator[Damage]:
    """Find the damaged parts of an array, read `step` rows at a time.

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
