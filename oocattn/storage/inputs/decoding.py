"""Bounded decompression: no chunk decodes to more bytes than it must have.

A few kilobytes can claim to be, and can really be, gigabytes. Formats that state their size are checked before anything
is allocated; streams are decompressed piece by piece until they exceed the bound. `bounded_metadata` puts these
decoders in the place of an array's own compressors; they decode and do not encode.
"""

from __future__ import annotations

import asyncio
import bz2
import lzma
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numcodecs
import numpy as np
import zarr
from numcodecs.abc import Codec as Numcodec

from oocattn.storage.inputs.codec_chain import COMPRESSORS, Chain, Codec, Stage, chain_of, v2_codecs, v3_codecs
from oocattn.storage.zarr_compat import ArraySpec, Buffer, BytesBytesCodec
from oocattn.threads import begin_call

PIECE_BYTES = 1 << 16
"""Compressed bytes that a stream is given at a time: deflate makes at most a thousand times as many of them."""

STREAM_MEMORY = 1 << 27  # bytes that an LZMA decoder may need for its dictionary; the highest preset needs 65 MiB
_FRAME, _SKIPPABLE = 0xFD2FB528, 0x184D2A50

_RAW, _REPEATED = 0, 1  # kinds of a block: its bytes as they are, one byte so many times; others are compressed
MOST_BLOCK_BYTES = 1 << 17  # what a compressed block holds at most
MOST_BLOCKS = 1 << 18  # blocks that are looked at: there is one for each 128 KiB, or for what was flushed


def array_chain(array: zarr.Array[Any]) -> Chain:
    """The codecs of an open array. Raises ProblemError for one that is not decoded."""
    return chain_of(_codecs(array), array.shards or array.chunks, array.dtype.itemsize, f"array {array.path!r}")


def bounded_metadata(array: zarr.Array[Any]) -> Any:
    """The array's metadata with bounded decoders in place of its compressors."""
    metadata: Any = array.metadata
    codecs, stages = _codecs(array), array_chain(array)
    if metadata.zarr_format == 3:
        return replace(metadata, codecs=tuple(_bounded_v3(metadata.codecs, codecs, stages)))
    own = [*(metadata.filters or ()), *([] if metadata.compressor is None else [metadata.compressor])]
    made = [
        _BoundedNumcodec(partial(decode, codec, stage)) if codec[0] in COMPRESSORS else original
        for original, codec, stage in zip(own, codecs, stages.stages, strict=True)
    ]
    compressor = None if metadata.compressor is None else made.pop()
    return replace(metadata, filters=made or None, compressor=compressor)


def _codecs(array: zarr.Array[Any]) -> list[Codec]:
    described, name = array.metadata.to_dict(), f"array {array.path!r}"
    if array.metadata.zarr_format == 3:
        return v3_codecs(described["codecs"], name)
    return v2_codecs(described["filters"], described["compressor"], name)


def _bounded_v3(own: Any, codecs: list[Codec], chain: Chain) -> list[Any]:
    if chain.inner is None:
        return [
            _BoundedCodec(partial(decode, codec, stage)) if codec[0] in COMPRESSORS else original
            for original, codec, stage in zip(own, codecs, chain.stages, strict=True)
        ]
    (shards,) = own
    inner = _bounded_v3(shards.codecs, v3_codecs(codecs[0][1]["codecs"], "the array"), chain.inner)
    return [replace(shards, codecs=inner)]


@dataclass(frozen=True)
class _BoundedCodec(BytesBytesCodec):
    """A decoder as Zarr v3 takes it."""

    decoder: Callable[[Any], Any]

    is_fixed_size = False

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return chunk_spec.prototype.buffer.from_bytes(self.decoder(chunk_bytes.as_numpy_array()))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.wrap_future(begin_call(self._decode_sync, chunk_bytes, chunk_spec))

    def _encode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        raise NotImplementedError

    async def _encode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        raise NotImplementedError

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError


class _BoundedNumcodec(Numcodec):  # type: ignore[misc]
    """A decoder as Zarr v2 takes it."""

    codec_id = "bounded"

    def __init__(self, decoder: Callable[[Any], Any]) -> None:
        self.decoder = decoder

    def decode(self, buf: Any, out: Any = None) -> Any:
        """What `buf` decodes to."""
        return self.decoder(buf)

    def encode(self, buf: Any) -> Any:
        raise NotImplementedError


def decode(codec: Codec, stage: Stage, stored: Any) -> Any:
    """What a compressor made `stored` of. Raises ValueError and what the codec raises where it is damaged or too large."""
    name, config = codec
    content = np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data
    if name in _SIZED:
        return _SIZED[name](content, stage)
    return _inflate(partial(_STREAMS[name], config), content, stage.decoded, several=name != "zlib")


def _refuse_size(most: int) -> NoReturn:
    raise ValueError(f"it decodes to more than the {most:,} bytes of a chunk")


def _blosc(content: memoryview, stage: Stage) -> Any:
    """Decode blosc, whose header has all sizes (README_CHUNK_FORMAT)."""
    if len(content) < 16:
        raise ValueError(f"it has {len(content)} bytes, expected 16 at least")
    nbytes, block, stored = (int.from_bytes(content[start : start + 4], "little") for start in (4, 8, 12))
    if nbytes > stage.decoded:
        _refuse_size(stage.decoded)
    if stored != len(content):
        raise ValueError(f"it has {len(content)} bytes, expected {stored}")
    if block > nbytes or (content[2] & 2 and stored != nbytes + 16):  # bit 1: the bytes as they were
        raise ValueError("its header contradicts itself")
    return numcodecs.Blosc().decode(content)


def _lz4(content: memoryview, stage: Stage) -> Any:
    if int.from_bytes(content[:4], "little") > stage.decoded:
        _refuse_size(stage.decoded)
    return numcodecs.LZ4().decode(content)


def _zstd(content: memoryview, stage: Stage) -> Any:
    """Decode zstd into a buffer of the size that its frames state. libzstd writes no more than that."""
    nbytes: int | None = _first_size(content)
    if nbytes != stage.decoded:
        nbytes, most = _frame_sizes(content)
        if nbytes is None and stage.exact:
            nbytes = stage.decoded  # another size is an error then
        elif nbytes is None and most <= 2 * stage.decoded:
            decoded = numcodecs.Zstd().decode(content)
            return decoded if len(decoded) <= stage.decoded else _refuse_size(stage.decoded)
        if nbytes is None or nbytes > stage.decoded:
            _refuse_size(stage.decoded)
    try:
        return numcodecs.Zstd().decode(content, out=np.empty(nbytes, np.uint8))
    except RuntimeError as error:
        if "too small" in str(error):
            _refuse_size(nbytes)
        raise


def _inflate(new: Callable[[], Any], content: memoryview, most: int, several: bool) -> Any:
    """What a stream, or `several` one after another, decompresses to. `new` makes a decompressor of the standard library."""
    out, done, decompressor = np.empty(most, np.uint8), 0, new()
    for start in range(0, len(content), PIECE_BYTES):
        piece = bytes(content[start : start + PIECE_BYTES])
        while piece:
            found = decompressor.decompress(piece, most - done + 1)
            if len(found) > most - done:
                _refuse_size(most)
            out[done : done + len(found)] = np.frombuffer(found, np.uint8)
            done += len(found)
            if decompressor.eof and not several:
                return out[:done]
            piece = decompressor.unused_data.lstrip(b"\0") if decompressor.eof else b""
            decompressor = new() if piece else decompressor
    if not decompressor.eof:
        raise ValueError(f"it ends early, after {done:,} bytes")
    return out[:done]


def _new_lzma(config: Mapping[str, Any]) -> lzma.LZMADecompressor:
    if config.get("format", lzma.FORMAT_XZ) == lzma.FORMAT_RAW:
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=config.get("filters"))
    return lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=STREAM_MEMORY)


_SIZED: Mapping[str, Callable[[memoryview, Stage], Any]] = {"blosc": _blosc, "lz4": _lz4, "zstd": _zstd}

_STREAMS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "gzip": lambda config: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "zlib": lambda config: zlib.decompressobj(),
    "bz2": lambda config: bz2.BZ2Decompressor(),
    "lzma": _new_lzma,
}


def _first_size(content: memoryview) -> int | None:
    """The size that the first frame states, or None."""
    try:
        return _frame_header(content, 4)[0] if _number(content, 0, 4) == _FRAME else None
    except ValueError:
        return None


def _frame_sizes(content: memoryview) -> tuple[int | None, int]:
    """The size that all frames state, or None, and the most they can hold. Raises ValueError for anything else."""
    position, stated, most, seen, all_state = 0, 0, 0, 0, True
    while position < len(content):
        magic, seen = _number(content, position, 4), seen + 1
        if magic & ~0xF == _SKIPPABLE:
            position += 8 + _number(content, position + 4, 4)
        elif magic == _FRAME:
            size, checksum, position = _frame_header(content, position + 4)
            all_state, stated = all_state and size is not None, stated + (size or 0)
            last = False
            while not last and seen <= MOST_BLOCKS:
                last, held, position = _frame_block(content, position)
                most, seen = most + held, seen + 1
            position += checksum
        else:
            raise ValueError("it is not a zstd frame")
        if seen > MOST_BLOCKS:
            raise ValueError(f"it has more than {MOST_BLOCKS:,} zstd blocks")
    return stated if all_state else None, most


def _frame_header(content: memoryview, position: int) -> tuple[int | None, int, int]:
    """A frame's stated size, its checksum's bytes, and where its blocks begin."""
    descriptor = _number(content, position, 1)
    single, checksum = descriptor >> 5 & 1, 4 * (descriptor >> 2 & 1)
    nbytes = (single, 2, 4, 8)[descriptor >> 6]
    begin = position + 1 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    size = _number(content, begin, nbytes) + (256 if nbytes == 2 else 0) if nbytes else None
    return size, checksum, begin + nbytes


def _frame_block(content: memoryview, position: int) -> tuple[bool, int, int]:
    """Whether a block is the last, the most bytes in it, and where it ends."""
    header = _number(content, position, 3)
    kind, size = header >> 1 & 3, header >> 3
    held = size if kind in (_RAW, _REPEATED) else MOST_BLOCK_BYTES
    return bool(header & 1), held, position + 3 + (1 if kind == _REPEATED else size)


def _number(content: memoryview, start: int, nbytes: int) -> int:
    if start + nbytes > len(content):
        raise ValueError(f"it ends early, after {len(content):,} bytes")
    return int.from_bytes(content[start : start + nbytes], "little")
