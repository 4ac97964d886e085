"""Checks of a shard's index, before Zarr reads the shard: complete, and within the shard.

Zarr reads a chunk that an index does not list as fill values, and believes every offset and length in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from oocattn.storage.chunk_errors import missing_chunk, refuse_missing, undecodable_chunk
from oocattn.storage.inputs.codec_chain import Chain
from oocattn.storage.inputs.decoding import array_chain
from oocattn.storage.layout import chunk_key
from oocattn.storage.remote.store import all_of
from oocattn.storage.zarr_compat import Buffer, RangeByteRequest, SuffixByteRequest, buffer_prototype, sync
from oocattn.units import ceil_div

_ABSENT = 2**64 - 1
"""Offset and length of a chunk that a shard does not hold (Zarr v3 sharding codec, binary shard format)."""


@dataclass(frozen=True)
class _Shard:
    """A shard, or one within it: where it lies in the array and in an object.

    It begins at element `origin`, and takes the bytes [begin, end) of the object `key`; messages call it `place`.
    """

    array: zarr.Array[Any]
    location: str
    key: str
    place: str
    origin: tuple[int, ...]
    extents: tuple[int, ...]
    begin: int
    end: int


def check_shard(array: zarr.Array[Any], shard: tuple[int, ...], location: str, nbytes: int | None = None) -> Buffer:
    """Check that a shard exists, and that its index lists every chunk in the array.

    Shards within the shard are checked as well. No two chunks may share bytes, nor a chunk and the index; none may be longer
    than its codecs can make it, or lie beyond the shard, which has `nbytes` bytes where that is known. Reads indices alone,
    16 bytes a chunk, and returns that of the shard itself. Raises IntegrityError.
    """
    assert array.shards is not None
    key = chunk_key(array, shard)
    origin = tuple(at * extent for at, extent in zip(shard, array.shards, strict=True))
    described: Any = array.metadata.to_dict()["codecs"]
    index = None
    if nbytes is None:
        with refuse_missing(location, key):
            nbytes, index = sync(_ask(array, key, described[0]["configuration"]))
    found = _Shard(array, location, key, key, origin, array.shards, 0, nbytes)
    return _check(found, described, array_chain(array), index)


async def _ask(array: zarr.Array[Any], key: str, config: Mapping[str, Any]) -> tuple[int, Buffer | None]:
    """The bytes of a shard, and its index where that is at its end: asked for at the same time."""
    nbytes, index = 0, None

    async def ask_size() -> None:
        nonlocal nbytes
        nbytes = await array.store.getsize(key)

    async def ask_index() -> None:
        nonlocal index
        size = _index_bytes(array.shards or (), config)
        index = await array.store.get(key, buffer_prototype, SuffixByteRequest(size))

    await all_of([ask_size(), *([ask_index()] if config["index_location"] == "end" else [])])
    return nbytes, index


def _index_bytes(extents: Sequence[int], config: Mapping[str, Any]) -> int:
    """Bytes of the index of a shard of this extent: 16 a chunk, and a checksum."""
    chunks: int = math.prod(extent // size for extent, size in zip(extents, config["chunk_shape"], strict=True))
    return 16 * chunks + (4 if len(config["index_codecs"]) == 2 else 0)


def _check(shard: _Shard, codecs: Any, chain: Chain, stored: Buffer | None = None) -> Buffer:
    """Check a shard by its index, which is read unless it is `stored`. Returns it."""
    config, inner = codecs[0]["configuration"], chain.inner
    assert inner is not None
    chunk = tuple(config["chunk_shape"])
    counts = tuple(extent // size for extent, size in zip(shard.extents, chunk, strict=True))
    size = _index_bytes(shard.extents, config)
    stored = _read_index(shard, config, size) if stored is None or len(stored) != size else stored
    index = stretches_of(stored, config, counts)
    first = size if config["index_location"] == "start" else 0
    _check_stretches(shard, index.reshape(-1, 2), inner.stored, range(first, first + shard.end - shard.begin - size))
    present = index[_inside(shard, chunk)]
    absent = np.argwhere((present == _ABSENT).all(axis=-1))
    if len(absent):
        raise missing_chunk(shard.location, _place_of(shard, absent[0]))
    if inner.inner is not None:
        for at in np.ndindex(present.shape[:-1]):
            begin, length = (int(number) for number in present[at])
            origin = tuple(start + i * size for start, i, size in zip(shard.origin, at, chunk, strict=True))
            begin += shard.begin
            place = _place_of(shard, at)
            nested = _Shard(shard.array, shard.location, shard.key, place, origin, chunk, begin, begin + length)
            _check(nested, config["codecs"], inner)
    return stored


def _place_of(shard: _Shard, at: Iterable[int]) -> str:
    """What messages call the chunk at these coordinates in a shard."""
    return f"{shard.place}, chunk {'/'.join(map(str, at))} of the shard"


def _read_index(shard: _Shard, config: Mapping[str, Any], size: int) -> Buffer:
    """Read the index of a shard, of `size` bytes."""
    at_start = config["index_location"] == "start"
    first, last = (shard.begin, shard.begin + size) if at_start else (max(shard.begin, shard.end - size), shard.end)
    content = sync(shard.array.store.get(shard.key, buffer_prototype, RangeByteRequest(first, last)))
    if content is None:
        raise missing_chunk(shard.location, shard.place)
    if len(content) != size:
        raise undecodable_chunk(shard.location, shard.place, f"its index has {len(content)} bytes of {size}")
    return content


def stretches_of(content: Buffer, config: Mapping[str, Any], counts: Sequence[int]) -> NDArray[np.uint64]:
    """Offset and length of every chunk, as the index of a shard has them: [*counts, 2]."""
    order = config["index_codecs"][0].get("configuration", {}).get("endian", "little")
    numbers = np.frombuffer(content.to_bytes(), ">u8" if order == "big" else "<u8", 2 * math.prod(counts))
    return numbers.astype(np.uint64, copy=False).reshape(*counts, 2)


def _check_stretches(shard: _Shard, index: NDArray[np.uint64], most: int, content: range) -> None:
    """Check the stretches of bytes that an index lists: up to `most`, in `content`, the shard without its index."""
    listed = index[(index != _ABSENT).any(axis=-1)]
    offsets, lengths = listed[np.argsort(listed[:, 0], kind="stable")].T
    fault = ""
    if np.any(lengths == 0):  # Zarr would read fill values
        fault = "lists a chunk of no bytes"
    elif np.any(lengths > most):
        fault = f"lists {int(lengths.max()):,} bytes for one chunk"
    elif np.any(offsets > 2**63) or np.any((offsets + lengths)[:-1] > offsets[1:]):
        fault = "lists chunks that overlap"
    elif len(listed) and not content.start <= int(offsets[0]) <= int(offsets[-1] + lengths[-1]) <= content.stop:
        fault = f"points beyond the {len(content):,} bytes of its chunks"
    if fault:
        raise undecodable_chunk(shard.location, shard.place, f"its index {fault}")


def _inside(shard: _Shard, chunk: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a shard's grid of chunks that lies within the array."""
    extents = zip(shard.origin, shard.extents, shard.array.shape, chunk, strict=True)
    return tuple(slice(ceil_div(min(extent, size - start), step)) for start, extent, size, step in extents)
