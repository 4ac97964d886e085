"""Arrays of Zarr as sources of a run. Plain files are read by direct.py, others by codecs.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from oocattn.errors import ProblemError
from oocattn.problem.arrays import KEY_BIAS
from oocattn.storage.chunk_errors import missing_chunk, torn_chunk
from oocattn.storage.inputs.ahead import MOST_READS
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.codecs import CodecReader
from oocattn.storage.inputs.direct import MOST_THREADS, SCRATCH_BYTES, DirectReader
from oocattn.storage.inputs.fingerprints import chunk_files, fingerprints_of
from oocattn.storage.inputs.given_store import GivenStore
from oocattn.storage.inputs.origin import Origin
from oocattn.storage.inputs.parts import Part
from oocattn.storage.inputs.shards import check_shard
from oocattn.storage.inputs.source import TensorSource, heads_between
from oocattn.storage.layout import ChunkFiles, chunk_key, obstacles, stored_bytes, stored_chunks
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.metadata import open_array
from oocattn.storage.nodes import node_name
from oocattn.storage.remote.store import RemoteStore
from oocattn.storage.zarr_compat import RangeByteRequest, buffer_prototype, sync
from oocattn.threads import ThreadPool

MOST_FILES = 256  # chunk files along the tokens that are read at a time: where the first is missing, no more are looked for
ASKED = 64  # chunks of a remote array that are asked for at the same time, where they are not listed


class ZarrSource(TensorSource):
    """An array of Zarr. Messages call its group `location`; the arrays of a dataset share one `reading`."""

    def __init__(
        self,
        name: str,
        array: zarr.Array[Any],
        location: str,
        reading: DirectReader | None = None,
        axes: Axes | None = None,
    ) -> None:
        axes = axes or Axes("bhn"[-array.ndim :] if name == KEY_BIAS else "bhnd"[array.ndim == 3 :])
        # A dtype that is not ours keeps Zarr's name for it.
        super().__init__(name, _origin(array, location, axes), array.shape, array.dtype.name)
        self.array = array
        self._location = location
        self._root = array.store.root if isinstance(array.store, MappedStore) else None
        self._reading = reading or DirectReader()

    def __reduce__(self) -> tuple[Any, ...]:
        return ZarrSource, (self.name, self.array, self._location, self._reading, self.axes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `TensorSource.dtype`."""
        return self.array.dtype.newbyteorder("=")

    @property
    def path(self) -> Path | None:
        """See `TensorSource.path`."""
        if isinstance(self.array.store, GivenStore):
            return self.array.store.file
        return None if self._root is None else self._root / self.array.path

    @property
    def direct(self) -> bool:
        """Whether the chunk files are read directly, not through Zarr."""
        return self._files is not None

    @property
    def chunk_rows(self) -> int:
        """See `TensorSource.chunk_rows`."""
        return self.array.chunks[self.axes.token_axis]

    @cached_property
    def shared_heads(self) -> int:
        """See `TensorSource.shared_heads`."""
        return self._codec_reader.shared_heads if self._files is None else heads_between(self, self._first_rows)

    @cached_property
    def _scattered(self) -> bool:
        """Whether other bytes lie between the rows of a head in a file."""
        return any(part.scattered for part in self.parts(0, 0, 0, self._first_rows) or ())

    @property
    def _first_rows(self) -> int:
        """Rows of the first chunk."""
        return min(self.chunk_rows, self.extents[2])

    @property
    def decode_bytes(self) -> int:
        """See `TensorSource.decode_bytes`."""
        if self.direct:
            return MOST_THREADS * SCRATCH_BYTES if self._scattered else 0
        return self._codec_reader.decode_bytes

    @property
    def is_remote(self) -> bool:
        """See `TensorSource.is_remote`."""
        return self.path is None

    @property
    def received(self) -> float:
        """See `TensorSource.received`."""
        return self.array.store.received if isinstance(self.array.store, RemoteStore) else 0.0

    def ask(self) -> None:
        """See `TensorSource.ask`: for the first byte of the first chunk."""
        key = chunk_key(self.array, next(stored_chunks(self.array)))
        sync(self.array.store.get(key, buffer_prototype, RangeByteRequest(0, 1)))

    def decode_bytes_ahead(self, nbytes: int) -> int:
        """See `TensorSource.decode_bytes_ahead`."""
        return self._codec_reader.decode_bytes_ahead(nbytes)

    @property
    def decodes_packed(self) -> bool:
        """See `TensorSource.decodes_packed`."""
        return not self.direct and self._codec_reader.has_all_packed

    @property
    def reader(self) -> str:
        """How rows are read: "preadv" or "map", as was measured, or "zarr"."""
        return self._reading.name(self.shared_heads) if self.direct else "zarr"

    def describe(self) -> str:
        """See `TensorSource.describe`."""
        if self.direct:
            return "uncompressed, read directly"
        found = obstacles(self.array, self.axes)
        if (heads := self._codec_reader.shared_heads) > 1:
            found.append(f"{heads} heads to a chunk")
        if self._root is None:
            found.append("not in a local folder")
        return f"{', '.join(found)}: read through Zarr's codecs"

    def check_complete(self) -> None:
        """Check that every chunk is there. Raises IntegrityError naming array, chunk and key.

        A chunk that is stored as it is (no compressor, no shards) must have its size, where that is told. Elsewhere
        than in a local folder the keys are listed once, where that is possible, and those not listed are asked for by
        name. Of a shard the index is read as well (16 bytes a chunk). What chunks decode to is not checked.
        """
        expected = stored_bytes(self.array)
        for found in _sizes(self.array, self._location):
            for _, key, size in found:
                if expected is not None and size is not None and size != expected:
                    raise torn_chunk(self._location, key, size, expected)
            if self.array.shards is not None:
                self._check_shards(found)

    def _check_shards(self, found: Sequence[_Stored]) -> None:
        """Check the indices of shards; those of a store that lets requests wait are asked for at the same time."""

        def check(stored: _Stored) -> None:
            check_shard(self.array, stored[0], self._location, stored[2])

        if not self.is_remote:
            for each in found:
                check(each)
            return
        with ThreadPool(min(MOST_READS, len(found)), "oocattn-ask") as pool:
            for _ in pool.map(check, found):
                pass

    def fingerprints(self) -> tuple[str, str, str]:
        """See `TensorSource.fingerprints`."""
        return fingerprints_of(self.name, self.array, self._location, self.axes)

    def reopen(self) -> TensorSource:
        """See `TensorSource.reopen`."""
        found = open_array(self.array.store, self.array.path, self._location)
        if found is None:
            raise ProblemError(f"{node_name(self.array.path, self._location)} is gone: expected it to stay")
        return ZarrSource(self.name, found, self._location, self._reading, self.axes)

    def parts(self, batch: int, head: int, start: int, stop: int) -> Sequence[Part] | None:
        """See `TensorSource.parts`."""
        return None if self._files is None else self._files.parts(batch, head, start, stop)

    def read_packed(self, batch: int, start: int, stop: int, wanted: Sequence[tuple[Axes, int, NDArray[Any]]]) -> None:
        """See `TensorSource.read_packed`."""
        self._codec_reader.read_packed(batch, start, stop, wanted)

    def _read(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        self._read_heads(batch, [head], start, stop, [out])

    def _read_heads(self, batch: int, heads: Sequence[int], start: int, stop: int, outs: Sequence[NDArray[Any]]) -> None:
        if self._files is None:
            self._codec_reader.read(batch, heads, start, stop, outs)
            return
        step = MOST_FILES * self.chunk_rows
        for low in range(start - start % self.chunk_rows, stop, step):
            first, last = max(low, start), min(low + step, stop)
            wanted = [(head, out[first - start : last - start]) for head, out in zip(heads, outs, strict=True)]
            self._reading.read([(self._files.parts(batch, head, first, last), out) for head, out in wanted])

    @cached_property
    def _files(self) -> ChunkFiles | None:
        if self._root is None or obstacles(self.array, self.axes):
            return None
        return ChunkFiles(self.array, self._root, self._location, self.axes)

    @cached_property
    def _codec_reader(self) -> CodecReader:
        return CodecReader(self.array, self._location, self.axes)


def _origin(array: zarr.Array[Any], location: str, axes: Axes) -> Origin:
    if isinstance(array.store, GivenStore):
        return Origin(f"zarr, {array.store.location}", "", "", axes)
    return Origin("zarr", location, array.path, axes)


_Stored = tuple[tuple[int, ...], str, int | None]
"""Coordinates, key and size, if it is told, of a stored chunk."""


def _sizes(array: zarr.Array[Any], location: str) -> Iterator[Sequence[_Stored]]:
    """All stored chunks, some at a time. Raises at the first that is missing."""
    store: Any = array.store
    if isinstance(store, MappedStore):
        yield from ([(coordinates, key, status.st_size)] for coordinates, key, status in chunk_files(array, location))
        return
    listed, stored = sync(store.list_sizes(array.path)), stored_chunks(array)
    while batch := {chunk_key(array, coordinates): coordinates for coordinates in itertools.islice(stored, ASKED)}:
        found = sync(store.find_sizes([key for key in batch if key not in listed]))
        for key in batch:
            if key not in listed and key not in found:
                raise missing_chunk(location, key)
        yield [(coordinates, key, listed[key] if key in listed else found[key]) for key, coordinates in batch.items()]
