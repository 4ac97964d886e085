"""Chunks of a growing result that are objects of a store, written in place.

A chunk is put under its final name once, by a conditional put: a put of a run that was killed, or that lost its lock, may
come late, and then replaces nothing. Where an object is there already it is compared: an earlier try, or an earlier life of
the run, has written the same bits. Anything else is removed, by a run that still holds the lock, and put again: a run that
loses it in between may at worst remove a chunk, which its own run notices.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import wait
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from oocattn.errors import IntegrityError
from oocattn.storage.journal.claims import Claim
from oocattn.storage.layout import chunk_bytes
from oocattn.storage.remote.objects import Content, Objects
from oocattn.storage.results.arrays import ChunkOf
from oocattn.storage.results.stored import StoredResult
from oocattn.threads import begin_call


class ChunkObjects:
    """Chunks in a store, written under a `claim` where it has conditional puts; `sizes` were listed. Implements Chunks."""

    def __init__(self, stored: StoredResult, claim: Claim | None, sizes: Mapping[str, int | None] | None = None) -> None:
        self._stored = stored
        self._claim = claim
        self._sizes = sizes

    @property
    def _objects(self) -> Objects:
        return self._stored.objects  # not kept: a store of this process is not sent to workers

    def size(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> int | None:
        """See `Chunks.size`."""
        key = _key(array, coordinates)
        return self._objects.find_size(key) if self._sizes is None else self._sizes.get(key)

    def listed(self) -> ChunkObjects:
        """See `Chunks.listed`."""
        return ChunkObjects(self._stored, self._claim, self._objects.list_sizes())

    def read(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> bytes:
        """See `Chunks.read`."""
        key = _key(array, coordinates)
        content = self._objects.read(key, chunk_bytes(array))
        if content is None or len(content) != chunk_bytes(array):
            raise IntegrityError(f"{self._objects}/{key} is missing or cut")
        return content

    def write_both(self, first: ChunkOf, second: ChunkOf) -> None:
        """See `Chunks.write_both`: at the same time, for each waits for the store's answer."""
        other = begin_call(self._write, *second)
        try:
            self._write(*first)
        finally:
            wait([other])  # nothing is written after this has failed
        other.result()

    def _write(self, array: zarr.Array[Any], coordinates: tuple[int, ...], data: npt.NDArray[np.generic]) -> None:
        content: Content = bytearray(chunk_bytes(array))
        key = _key(array, coordinates)
        np.frombuffer(content, data.dtype, data.size)[:] = data.reshape(-1)
        if self._claim is None:
            self._objects.write(key, content)
            return
        self._claim.check()
        while not self._objects.create(key, content) and self._objects.read(key, len(content)) != content:
            self._claim.check(afresh=True)
            self._objects.remove(key)

    def remove(self, array: zarr.Array[Any], coordinates: tuple[int, ...]) -> None:
        """See `Chunks.remove`."""
        self._objects.remove(_key(array, coordinates))


def _key(array: zarr.Array[Any], coordinates: tuple[int, ...]) -> str:
    return f"{array.path}/{array.metadata.encode_chunk_key(coordinates)}"
