"""The arrays of a result, `out` and `lse`: written by chunks, or read."""

from __future__ import annotations

import json
import math
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from oocattn.errors import IntegrityError, ProblemError
from oocattn.records import to_json
from oocattn.storage.files.durable import read_json, write_text
from oocattn.storage.files.folders import remove_file, status_of
from oocattn.storage.files.regular import read_file
from oocattn.storage.layout import chunk_bytes
from oocattn.storage.make.create import chunk_file, chunk_selection, write_chunk
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.metadata import array_names, open_array
from oocattn.storage.results.checksums import ATTRIBUTE as CHECKSUMS
from oocattn.storage.results.checksums import Checksums, as_digits
from oocattn.storage.results.rows import checksum


@dataclass(frozen=True)
class WrittenChunk:
    """The bytes of a written part, and its checksums in `out` and `lse`."""

    nbytes: int
    out: str
    lse: str


class ResultArrays:
    """The arrays of a result; a growing one has one writer a chunk."""

    def __init__(self, out: zarr.Array[Any], lse: zarr.Array[Any]) -> None:
        self.out, self.lse = out, lse

    @property
    def by_name(self) -> dict[str, zarr.Array[Any]]:
        return {"out": self.out, "lse": self.lse}

    @classmethod
    def open(cls, path: Path) -> ResultArrays:
        """Open the arrays of the result at `path` through memory maps. Raises IntegrityError where one is missing."""
        return cls.of(MappedStore(path, read_only=True))

    @classmethod
    def of(cls, store: LocalStore) -> ResultArrays:
        """The arrays of the result in a store. Raises IntegrityError where one is missing."""
        try:
            out, lse = (open_array(store, name, str(store.root)) for name in ("out", "lse"))
        except ProblemError as error:
            raise IntegrityError(str(error)) from None
        if out is None or lse is None:
            raise IntegrityError(
                f"{store.root}: no finished result here: expected the arrays out and lse, found {array_names(store)}"
            )
        return cls(out, lse)

    def has(self, batch: int, head: int, part: int) -> bool:
        """Whether chunk `part` of one head is there, as long as it must be."""
        for array in (self.out, self.lse):
            status = status_of(chunk_file(array, _coordinates(array, batch, head, part)))
            if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != chunk_bytes(array):
                return False
        return True

    def checksums(self, batch: int, head: int, part: int) -> dict[str, str]:
        """The checksums of chunk `part` of one head on disk; "" for no chunk. Raises OSError as the file system does."""
        found = {}
        for name, array in self.by_name.items():
            coordinates = _coordinates(array, batch, head, part)
            rows = chunk_selection(array, coordinates)[2]
            nbytes = (rows.stop - rows.start) * math.prod(array.shape[3:]) * array.dtype.itemsize
            try:
                content = read_file(chunk_file(array, coordinates), chunk_bytes(array), follow=False)
                found[name] = as_digits(zlib.crc32(content[:nbytes]))
            except IntegrityError:
                found[name] = ""
        return found

    def remove(self, batch: int, head: int, part: int) -> None:
        """Remove chunk `part` of one head."""
        for array in self.by_name.values():
            remove_file(chunk_file(array, _coordinates(array, batch, head, part)))

    def write(
        self, batch: int, head: int, part: int, out: npt.NDArray[np.generic], lse: npt.NDArray[np.generic]
    ) -> WrittenChunk:
        """Write chunk `part` of one head, out [n, D] and lse [n]."""
        checksums = [as_digits(checksum(rows)) for rows in (out, lse)]  # of what is to be written, not of what was
        write_chunk(self.out, (batch, head, part, 0), out[np.newaxis, np.newaxis])
        write_chunk(self.lse, (batch, head, part), lse[np.newaxis, np.newaxis])
        return WrittenChunk(out.nbytes + lse.nbytes, *checksums)

    def record(self, checksums: Mapping[str, Checksums]) -> None:
        """Record the checksums in the attributes of `out` and `lse`, durably."""
        for name, array in self.by_name.items():
            assert isinstance(array.store, LocalStore)
            path = array.store.root / array.path / "zarr.json"
            metadata = read_json(path) or {}  # not through zarr, which does not sync what it writes
            metadata.setdefault("attributes", {})[CHECKSUMS] = to_json(checksums[name])
            write_text(path, json.dumps(metadata, indent=2))


def _coordinates(array: zarr.Array[Any], batch: int, head: int, part: int) -> tuple[int, ...]:
    return (batch, head, part, *(0 for _ in array.shape[3:]))
