"""The numbers of tensors: their dtypes, a checksum of all of them, a digest of some, and how many are NaN or Inf."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import ProblemError
from oocattn.problem.arrays import DTYPES
from oocattn.storage.inputs.source import TensorSource
from oocattn.threads import ThreadPool

SAMPLED_WHOLE, SAMPLED_SPANS, SPAN_BYTES = 640 << 10, 3, 4 << 10
"""Bytes up to which a sample is of all numbers, and the spans of a larger tensor's, of as many bytes: to read one, rows of
all heads are read where they lie between, or a chunk is decoded."""

CHECKED_BYTES, PIECE_BYTES, CHECK_THREADS = 16 << 20, 256 << 10, 8
"""Bytes that one checksum is of, bytes that are copied for it at a time, and threads that do, at most."""

_BLOCK = 1 << 16  # elements of temporary arrays, which stay small


def check_dtype(name: str, label: str, dtype: np.dtype[Any] | str) -> None:
    """Raise ProblemError for a dtype that is neither one of a problem nor float64, which `import` converts."""
    called = dtype if isinstance(dtype, str) else dtype.name
    if called in (*DTYPES, "float64"):
        return
    structured = not isinstance(dtype, str) and dtype.names
    remedy = "give one field of it" if structured else "convert it first"
    if called in ("uint16", "int16", "void16"):
        remedy = "if it holds the bits of bfloat16, give its view of that dtype (ml_dtypes.bfloat16, torch.bfloat16)"
    raise ProblemError(f"{name} ({label}) has dtype {called}: expected one of {', '.join(DTYPES)}; {remedy}")


def checksum(source: TensorSource) -> str:
    """A digest of shape, dtype and all bytes of a tensor, in the order [B, H, N, D], wherever and however it lies."""
    return _digest(source.spec.shape, source.spec.dtype, _all_checksums(source))


def checksum_like(source: TensorSource, recorded: str) -> str:
    """The `recorded` checksum where it is of these numbers, with or without axes of size 1 before them; else their own."""
    numbers, full = _all_checksums(source), (*source.extents, *source.row_shape)
    shapes = [full[first:] for first in range(4) if set(full[:first]) <= {1}]
    found = [_digest(shape, source.spec.dtype, numbers) for shape in (source.spec.shape, *shapes)]
    return recorded if recorded in found else found[0]


def sample(source: TensorSource) -> str:
    """A digest of some of the numbers, the same wherever and however they lie.

    A few spans of rows, from the first to the last: what makes it known that tensors differ, never that they are the same.
    """
    batches, heads, tokens = source.extents
    digest = hashlib.sha256(f"{source.extents} {source.row_shape} {source.spec.dtype}".encode())
    rows, starts = tokens, [tokens * head for head in range(batches * heads)]
    if batches * heads * tokens * source.row_bytes > SAMPLED_WHOLE:
        rows = min(tokens, max(1, SPAN_BYTES // max(1, source.row_bytes)))
        last = batches * heads * tokens - rows
        starts = [place * last // (SAMPLED_SPANS - 1) for place in range(SAMPLED_SPANS)]

    def read(first: int) -> memoryview:
        buffer = np.empty((rows, *source.row_shape), source.dtype)
        head, start = divmod(first, tokens)
        start = min(start, tokens - rows)
        source.read_rows(*divmod(head, heads), start, start + rows, buffer)
        return buffer.reshape(-1).view(np.uint8).data

    found: Iterable[memoryview] = map(read, starts)
    if source.is_remote:  # in a store that may let each request wait
        with ThreadPool(SAMPLED_SPANS, "oocattn-ask") as pool:
            found = list(pool.map(read, starts))
    for numbers in found:
        digest.update(numbers)
    return digest.hexdigest()[:32]


def _digest(shape: Sequence[int], dtype: str, checksums: Mapping[tuple[int, int, int], int]) -> str:
    digest = hashlib.sha256(f"{tuple(shape)} {dtype}".encode())
    for place in sorted(checksums):
        digest.update(checksums[place].to_bytes(4, "little"))
    return digest.hexdigest()[:32]


def _all_checksums(source: TensorSource) -> dict[tuple[int, int, int], int]:
    """The checksums of all spans, by batch, head and first token."""
    found: dict[tuple[int, int, int], int] = {}
    if not source.direct or math.prod(source.extents) * source.row_bytes < CHECKED_BYTES:
        for span in _spans(source):
            found |= _checksums(source, span)
    else:
        with ThreadPool(min(CHECK_THREADS, os.cpu_count() or 1), "oocattn-checksum") as pool:
            for numbers in pool.map(partial(_checksums, source), _spans(source)):
                found |= numbers
    return found


_Span = tuple[int, range, int, int]


def _spans(source: TensorSource) -> Iterator[_Span]:
    """Batch, heads that are read together, first and last token: what checksums, one for each head, are of."""
    batches, heads, tokens = source.extents
    step, together = max(1, CHECKED_BYTES // max(1, source.row_bytes)), source.shared_heads if not source.direct else 1
    for batch, head, start in itertools.product(range(batches), range(0, heads, together), range(0, tokens, step)):
        yield batch, range(head, min(head + together, heads)), start, min(start + step, tokens)


def _checksums(source: TensorSource, span: _Span) -> dict[tuple[int, int, int], int]:
    """The checksums of a span, by batch, head and first token."""
    batch, heads, start, stop = span
    step = max(1 if source.direct else source.chunk_rows, PIECE_BYTES // max(1, source.row_bytes * len(heads)))
    buffers = [np.empty((min(step, stop - start), *source.row_shape), source.dtype) for _ in heads]
    found = dict.fromkeys(heads, 0)
    for low in range(start, stop, step):
        parts = [buffer[: min(step, stop - low)] for buffer in buffers]
        source.read_heads(batch, heads, low, low + len(parts[0]), parts)
        for head, part in zip(heads, parts, strict=True):
            found[head] = zlib.crc32(part.reshape(-1).view(np.uint8).data, found[head])
    return {(batch, head, start): number for head, number in found.items()}


def count_not_finite(array: NDArray[Any]) -> int:
    """Count the NaN and Inf: exponent bits all ones, so as integers the largest of either sign: two maxima tell of none."""
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}[array.dtype.name]
    unsigned, signed = (np.uint16, np.int16) if array.itemsize == 2 else (np.uint32, np.int32)
    bits: NDArray[Any] = array.reshape(-1).view(unsigned)
    with_sign: NDArray[Any] = bits.view(signed)
    sign = 1 << (8 * array.itemsize - 1)
    if not len(bits) or (int(np.max(bits)) < sign + exponent and int(np.max(with_sign)) < exponent):
        return 0
    mask = bits.dtype.type(exponent)
    return sum(int(np.count_nonzero((part & mask) == mask)) for part in np.split(bits, range(_BLOCK, len(bits), _BLOCK)))
