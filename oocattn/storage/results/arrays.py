"""The arrays of a result, `out` and `lse`: written by chunks, or read."""

from __future__ import annotations

import json
import math
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from oocattn.storage.nodes import StoredGroup
from oocattn.storage.results.checksums import ATTRIBUTE as CHECKSUMS
from oocattn.storage.results.checksums import Checksums, as_digits
from oocattn.storage.results.consolidated import consolidate
from oocattn.storage.results.rows import checksum
from oocattn.storage.zarr_compat import Store


@dataclass(frozen=True)
class WrittenChunk:
    """The bytes of a written part, and its checksums in `out` and `lse`."""

    nbytes: int
    out: str
    lse: str


ChunkOf = tuple[zarr.Array[Any], tuple[int, ...], npt.NDArray[np.generic]]
"""A chunk of an array: its coordinates, and its numbers."""


class Chunks(Protocol):
    """Where the chunks of a growing result are, each whole or not there. Raises OSError as file system or server do."""

    def size(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> int | None:
        """The bytes of a chunk; None where it is missing, or is none."""

    def listed(self) -> Chunks:
        """The same, which may have the sizes of all by one request, as they are now."""

    def read(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> bytes:
        """The bytes of a chunk. Raises IntegrityError where it is damaged."""

    def write_both(self, first: ChunkOf, second: ChunkOf) -> None:
        """Write two chunks, each whole; when this returns, they are there for good."""

    def remove(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> None:
        """Remove a chunk, if it is there."""


class ChunkFiles:
    """Chunks in files. Implements Chunks."""

    def size(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> int | None:
        """See `Chunks.size`."""
        status = status_of(chunk_file(array, coordinates))
        return None if status is None or not stat.S_ISREG(status.st_mode) else status.st_size

    def listed(self) -> Chunks:
        """See `Chunks.listed`."""
        return self

    def read(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> bytes:
        """See `Chunks.read`."""
        return read_file(chunk_file(array, coordinates), chunk_bytes(array), follow=False)

    def write_both(self, first: ChunkOf, second: ChunkOf) -> None:
        """See `Chunks.write_both`."""
        for chunk in (first, second):
            write_chunk(*chunk)

    def remove(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> None:
        """See `Chunks.remove`."""
        remove_file(chunk_file(array, coordinates))


class ResultArrays:
    """The arrays of a result; a growing one has one writer a chunk, and its chunks where `chunks` says."""

    def __init__(self, out: zarr.Array[Any], lse: zarr.Array[Any], chunks: Chunks | None = None) -> None:
        self.out, self.lse = out, lse
        self._chunks = chunks or ChunkFiles()

    @property
    def by_name(self) -> dict[str, zarr.Array[Any]]:
        return {"out": self.out, "lse": self.lse}

    @classmethod
    def open(cls, result: Path | StoredGroup) -> ResultArrays:
        """Open the arrays of a result, in a folder through memory maps. Raises IntegrityError where one is missing."""
        if isinstance(result, Path):
            return cls.of(MappedStore(result, read_only=True), str(result))
        return cls.of(result.store, str(result), path=result.path)

    @classmethod
    def of(cls, store: Store, location: str, chunks: Chunks | None = None, path: str = "") -> ResultArrays:
        """The arrays of the result at a path of a store. Raises IntegrityError where one is missing."""
        try:
            out, lse = (open_array(store, f"{path}/{name}".lstrip("/"), location) for name in ("out", "lse"))
        except ProblemError as error:
            raise IntegrityError(str(error)) from None
        if out is None or lse is None:
            raise IntegrityError(
                f"{location}: no finished result here: expected the arrays out and lse, found {array_names(store)}"
            )
        return cls(out, lse, chunks)

    def listed(self) -> ResultArrays:
        """The same, for questions about many chunks as they are now."""
        return ResultArrays(self.out, self.lse, self._chunks.listed())

    def has(self, batch: int, head: int, part: int) -> bool:
        """Whether chunk `part` of one head is there, as long as it must be."""
        return all(
            self._chunks.size(array, _coordinates(array, batch, head, part)) == chunk_bytes(array)
            for array in (self.out, self.lse)
        )

    def checksums(self, batch: int, head: int, part: int) -> dict[str, str]:
        """The checksums of chunk `part` of one head at rest; "" for no chunk. Raises OSError as `Chunks`."""
        found = {}
        for name, array in self.by_name.items():
            coordinates = _coordinates(array, batch, head, part)
            rows = chunk_selection(array, coordinates)[2]
            nbytes = (rows.stop - rows.start) * math.prod(array.shape[3:]) * array.dtype.itemsize
            try:
                found[name] = as_digits(zlib.crc32(self._chunks.read(array, coordinates)[:nbytes]))
            except IntegrityError:
                found[name] = ""
        return found

    def remove(self, batch: int, head: int, part: int) -> None:
        """Remove chunk `part` of one head."""
        for array in self.by_name.values():
            self._chunks.remove(array, _coordinates(array, batch, head, part))

    def write(
        self, batch: int, head: int, part: int, out: npt.NDArray[np.generic], lse: npt.NDArray[np.generic]
    ) -> WrittenChunk:
        """Write chunk `part` of one head, out [n, D] and lse [n]."""
        checksums = [as_digits(checksum(rows)) for rows in (out, lse)]  # of what is to be written, not of what was
        of_lse = self.lse, (batch, head, part), lse[np.newaxis, np.newaxis]
        self._chunks.write_both((self.out, (batch, head, part, 0), out[np.newaxis, np.newaxis]), of_lse)
        return WrittenChunk(out.nbytes + lse.nbytes, *checksums)

    def record(self, checksums: Mapping[str, Checksums]) -> None:
        """Record the checksums in the attributes of `out` and `lse`, and consolidate the group's metadata, durably."""
        for name, array in self.by_name.items():
            assert isinstance(array.store, LocalStore)
            path = array.store.root / array.path / "zarr.json"
            metadata = read_json(path) or {}  # not through zarr, which does not sync what it writes
            metadata.setdefault("attributes", {})[CHECKSUMS] = to_json(checksums[name])
            write_text(path, json.dumps(metadata, indent=2))
        assert isinstance(self.out.store, LocalStore)
        consolidate(self.out.store.root)


def _coordinates(array: zarr.Array[Any], batch: int, head: int, part: int) -> tuple[int, ...]:
    return (batch, head, part, *(0 for _ in array.shape[3:]))
