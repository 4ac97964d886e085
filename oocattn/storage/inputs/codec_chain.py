"""Which codecs are decoded, and how many bytes each may decode to.

A chunk has a known size, so every stage of its decoding has one too: what a codec made of so many bytes when the chunk
was written. Codecs that are not on the list are refused by name, before Zarr makes them: some run code (pickle), some
make objects (json2, vlen-utf8), and of others no bound is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oocattn.errors import ProblemError
from oocattn.naming import by_face
from oocattn.text import printable
from oocattn.units import ceil_div

COMPRESSORS = ("blosc", "zstd", "gzip", "zlib", "bz2", "lzma", "lz4")
CHECKSUMS = ("crc32", "crc32c", "adler32", "fletcher32")
FILTERS = ("delta", "astype", "quantize", "fixedscaleoffset", "bitround", "shuffle")
SHARDS = "sharding_indexed"

_V3 = ("bytes", "transpose", "blosc", "gzip", "zstd", "crc32c", SHARDS)
"""The names that Zarr v3 has itself; the others begin with "numcodecs." there."""

MOST_CODECS = 16
MOST_DEPTH = 3  # levels of shards within shards
MOST_SHARD_CHUNKS = 1 << 20  # chunks of a shard: its index, 16 bytes for each, is read whole
MOST_NESTED = 1 << 12  # shards within a shard: each has an index of its own to be read
MOST_DICTIONARY = 1 << 26  # bytes of the dictionary of a raw LZMA stream, as large as its highest preset has it
SLACK_BYTES = 1 << 16  # for headers and the like of what a compressor makes
_NUMBERS = re.compile(r"[<>|=]?[a-z]{1,8}[0-9]{0,2}")

_CHECKSUM_BYTES = 4

Codec = tuple[str, Mapping[str, Any]]
"""A name without "numcodecs.", and its configuration."""


@dataclass(frozen=True)
class Stage:
    """A codec of a chain, and the most bytes that it decodes to. Where `exact`, it decodes to just so many."""

    name: str
    decoded: int
    exact: bool


@dataclass(frozen=True)
class Chain:
    """The codecs of a chunk, in the order of writing.

    `stored` is the most bytes of a stored chunk, `widest` those of its largest stage. Where it is a shard, `inner` is
    the chain of the chunks in it, `widest` is theirs, and `index` the bytes of its index.
    """

    stages: tuple[Stage, ...]
    stored: int
    widest: int
    inner: Chain | None = None
    index: int = 0


def v3_codecs(found: object, array: str) -> list[Codec]:
    """The codecs of an array in Zarr v3. Raises ProblemError, naming `array`, for one that is not on the list."""
    return [_v3_codec(item, array) for item in _as_list(found, array)]


def v2_codecs(filters: object, compressor: object, array: str) -> list[Codec]:
    """The filters and the compressor of an array in Zarr v2. Raises as `v3_codecs`."""
    found = [*([] if filters is None else _as_list(filters, array)), *([] if compressor is None else [compressor])]
    return [_v2_codec(item, array) for item in found]


def chain_of(codecs: Sequence[Codec], chunk: Sequence[int], itemsize: int, array: str, depth: int = 1) -> Chain:
    """The chain of a chunk of that shape. Raises ProblemError, naming `array`, for one that is not decoded."""
    if any(name == SHARDS for name, _ in codecs):
        return _shard_chain(codecs, chunk, itemsize, array, depth)
    nbytes, exact, stages = math.prod(chunk) * itemsize, True, []
    widest = nbytes
    for name, config in codecs:
        stages.append(Stage(name, nbytes, exact))
        if name in COMPRESSORS:  # all store what is random
            nbytes, exact = nbytes + nbytes // 64 + SLACK_BYTES, False
        elif name in CHECKSUMS:
            nbytes += _CHECKSUM_BYTES
        elif name in FILTERS:
            decoded, encoded = _itemsizes(name, config, itemsize, array)
            count = ceil_div(nbytes, decoded)
            nbytes = count * encoded
            if exact:  # else it is small change
                widest = max(widest, 16 * count if name == "fixedscaleoffset" else nbytes)  # numpy's float64, twice
    return Chain(tuple(stages), nbytes, widest)


def _shard_chain(codecs: Sequence[Codec], shard: Sequence[int], itemsize: int, array: str, depth: int) -> Chain:
    if len(codecs) != 1:  # an index that other codecs hide or turn is not read: Zarr would give fill values for it
        found = ", ".join(name for name, _ in codecs)
        raise ProblemError(
            f"{array} has the codecs {found}: expected {SHARDS} alone, for the index of a shard among others does not show "
            "which chunks were never written; write the array again with the others among the codecs within the shard"
        )
    if depth > MOST_DEPTH:
        raise ProblemError(
            f"{array} has shards more than {MOST_DEPTH} deep: expected fewer levels; write the array again with fewer"
        )
    config = codecs[0][1]
    chunk = config.get("chunk_shape")
    sized = isinstance(chunk, Sequence) and len(chunk) == len(shard) and all(type(n) is int and n > 0 for n in chunk)
    if not sized or any(extent % size for extent, size in zip(shard, chunk or (), strict=True)):
        raise ProblemError(f"{array} has shards {list(shard)} of chunks {chunk!r:.80}: expected chunks that divide them")
    chunks = math.prod(extent // size for extent, size in zip(shard, chunk or (), strict=True))
    codecs_within = v3_codecs(config.get("codecs"), array)
    most = MOST_NESTED if any(name == SHARDS for name, _ in codecs_within) else MOST_SHARD_CHUNKS
    if chunks > most:
        raise ProblemError(f"{array} has {chunks:,} chunks to a shard: expected at most {most:,}; write the array again")
    if [name for name, _ in v3_codecs(config.get("index_codecs"), array)] not in (["bytes"], ["bytes", "crc32c"]):
        raise ProblemError(f"{array} has a shard index in other codecs than bytes and crc32c: write the array again")
    inner = chain_of(codecs_within, chunk or (), itemsize, array, depth + 1)
    index = 16 * chunks + _CHECKSUM_BYTES
    stored = 2 * (chunks * inner.stored + index)  # chunks may lie apart
    return Chain((Stage(SHARDS, math.prod(shard) * itemsize, True),), stored, inner.widest, inner, index + inner.index)


def _itemsizes(name: str, config: Mapping[str, Any], itemsize: int, array: str) -> tuple[int, int]:
    """Bytes of an element as a filter decodes to it, and as it has it stored."""
    if name in ("shuffle", "bitround"):
        return 1, 1
    decoded = config.get("decode_dtype" if name == "astype" else "dtype")
    encoded = config.get("encode_dtype" if name == "astype" else "astype")
    decoded_bytes = itemsize if decoded is None else _itemsize(decoded, array)
    return decoded_bytes, decoded_bytes if encoded is None else _itemsize(encoded, array)


def _itemsize(dtype: object, array: str) -> int:
    if isinstance(dtype, str) and _NUMBERS.fullmatch(dtype):
        try:
            found = np.dtype(dtype)
        except TypeError:
            found = np.dtype(object)
        if found.kind in "iufb" and found.itemsize <= 8:
            return found.itemsize
    raise ProblemError(f"{array} has a filter for elements of type {dtype!r}: expected one of numbers")


def _v3_codec(found: object, array: str) -> Codec:
    described = found if isinstance(found, Mapping) else {"name": found}
    named, config = described.get("name"), described.get("configuration")
    name = named if isinstance(named, str) else ""
    plain = name.removeprefix("numcodecs.")
    allowed = name in _V3 or (name != plain and _is_numcodec(plain))
    return _check_codec(found, plain, {} if config is None else config, array, allowed)


def _v2_codec(found: object, array: str) -> Codec:
    name = found.get("id") if isinstance(found, Mapping) else None
    return _check_codec(found, str(name), found, array, isinstance(name, str) and _is_numcodec(name))


def _is_numcodec(name: str) -> bool:
    return name in (*COMPRESSORS, *CHECKSUMS, *FILTERS)


def _check_codec(found: object, name: str, config: object, array: str, allowed: bool) -> Codec:
    if not allowed:
        shown = printable(repr(name or found))
        raise ProblemError(
            f"{array} has the codec {shown:.80}: only compressors, checksums and filters of numbers are decoded "
            f"({', '.join((*COMPRESSORS, *CHECKSUMS, *FILTERS))}, shards); write the array again with these, or import its "
            f"tensors with {by_face('oocattn.import_arrays', '`oocattn import`')}"
        )
    if not isinstance(config, Mapping):
        raise ProblemError(f"{array} has the codec {name} with the configuration {config!r:.80}: expected an object")
    if name in FILTERS:
        _itemsizes(name, config, 1, array)
    if name == "lzma" and config.get("filters") is not None:  # of a raw stream
        for each in _as_list(config["filters"], array):
            size = each.get("dict_size", 0) if isinstance(each, Mapping) else -1
            if type(size) is not int or not 0 <= size <= MOST_DICTIONARY:
                raise ProblemError(f"{array} has the codec lzma with the filter {each!r:.80}: expected a smaller dictionary")
    return name, config


def _as_list(found: object, array: str) -> Sequence[Any]:
    if not isinstance(found, list | tuple) or len(found) > MOST_CODECS:
        raise ProblemError(f"{array} has the codecs {printable(repr(found)[:80])}: expected a list of up to {MOST_CODECS}")
    return found
