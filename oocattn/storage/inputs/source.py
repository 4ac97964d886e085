"""Tensors as a run sees them: what each is, where it lies, and its rows by head.

A kind of tensor is a class of its own, made by a function of `opening.KINDS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn.problem.arrays import KEY_BIAS, ArraySpec
from oocattn.storage.inputs.ahead import AHEAD_BYTES
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.origin import Origin
from oocattn.storage.inputs.parts import Part
from oocattn.units import ceil_div, round_up


class TensorSource(ABC):
    """One tensor of a problem, wherever it lies: [B, H, N, D], or key_bias [B, H, N]. B may be left out.

    Reads may run in several threads at once. A source can be sent to other processes, unless it lies in memory.
    """

    def __init__(self, name: str, origin: Origin, stored: tuple[int, ...], dtype: str) -> None:
        self.name = name
        self.origin = origin
        self.stored = stored
        self.spec = ArraySpec(name, origin.axes.shape(stored), dtype)

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """The dtype of `read_rows`' buffers: the tensor's, in native byte order."""

    @property
    def axes(self) -> Axes:
        """How the stored axes lie."""
        return self.origin.axes

    @property
    def extents(self) -> tuple[int, int, int]:
        """Batches, heads and tokens."""
        shape = self.spec.shape[:-1] if self.axes.row_rank else self.spec.shape
        batch, heads, tokens = (1, 1, *shape)[-3:]
        return batch, heads, tokens

    @property
    def of_all_batches(self) -> bool:
        """Whether each batch entry reads the rows of the only one: of a key_bias that is shared."""
        return self.name == KEY_BIAS and self.extents[0] == 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of what one token has: (D,), or () in key_bias."""
        return self.spec.shape[-1:] if self.axes.row_rank else ()

    @property
    def row_bytes(self) -> int:
        """Bytes of what one token has."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def path(self) -> Path | None:
        """The local file or folder that it lies in, which a result must not replace; None where there is none."""
        return None

    @property
    def direct(self) -> bool:
        """Whether reads are of bytes as they lie, by several threads at once; else they are decoded, one at a time."""
        return True

    @property
    def chunk_rows(self) -> int:
        """Tokens of a chunk; reads that start and stop there touch only whole ones."""
        return 1

    @property
    def shared_heads(self) -> int:
        """Heads that are read as soon as one is: their rows lie between its own, or in the same encoded chunks.

        Of tensors that are packed, all of them count.
        """
        return 1

    @property
    def decodes_packed(self) -> bool:
        """Whether what is decoded for some tokens has all of q, k and v: `read_packed` serves."""
        return False

    @property
    def is_remote(self) -> bool:
        """Whether what is decoded comes from a store that may let each request wait: several reads may be under way."""
        return False

    @property
    def ahead_rows(self) -> int:
        """Tokens of one of the reads of a head that are under way together; they are cut at its multiples."""
        return round_up(max(1, AHEAD_BYTES // (self.row_bytes * self.shared_heads)), self.chunk_rows)

    def decoded_bytes(self, start: int, stop: int) -> int:
        """Bytes of the chunks that are decoded for tokens [start, stop) of a head."""
        return (ceil_div(stop, self.chunk_rows) - start // self.chunk_rows) * self._chunk_row_bytes

    @property
    def _chunk_row_bytes(self) -> int:
        """Bytes of the chunks that have the same tokens as one chunk of a head."""
        return self.chunk_rows * self.row_bytes * self.shared_heads

    @property
    def received(self) -> float:
        """When the last bytes came from the store that it `is_remote` in, by `time.perf_counter`; 0 where nobody knows."""
        return 0.0

    def ask(self) -> None:
        """Make a request for next to nothing of the store that it `is_remote` in, and wait for the answer."""
        raise NotImplementedError

    @property
    def decode_bytes(self) -> int:
        """Bound on host memory, in bytes, of one read besides the caller's buffer."""
        return 0

    def decode_bytes_ahead(self, nbytes: int) -> int:
        """The same bound on reads that decode so many bytes together (`decoded_bytes`)."""
        raise NotImplementedError

    @property
    @abstractmethod
    def reader(self) -> str:
        """How rows are read, in a word."""

    @abstractmethod
    def describe(self) -> str:
        """How the tensor is stored and therefore read, for the plan to print."""

    @abstractmethod
    def check_complete(self) -> None:
        """Check that all of it is there. Raises IntegrityError naming what is missing."""

    @abstractmethod
    def fingerprints(self) -> tuple[str, str, str]:
        """Digests of the tensor as it is now; see `Fingerprints`. Raises IntegrityError where a part is found missing."""

    @abstractmethod
    def reopen(self) -> TensorSource:
        """The tensor as it is now: what says how it lies is read again."""

    def read_rows(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Read tokens [start, stop) of one head into `out` [stop - start, D], or [stop - start] for key_bias.

        `out` is C-contiguous, of dtype `dtype`. Raises ValueError for rows that the tensor has not or a buffer that does not
        fit, and IntegrityError for a part that is missing, of the wrong size or undecodable; `out` is then undefined.
        """
        entry = 0 if self.of_all_batches else batch
        self._check(entry, head, start, stop, out)
        self._read(entry, head, start, stop, out)

    def read_heads(self, batch: int, heads: Sequence[int], start: int, stop: int, outs: Sequence[NDArray[Any]]) -> None:
        """Read the same tokens of several heads, each into its own of `outs`: what they share is decoded once.

        Raises as `read_rows`.
        """
        for head, out in zip(heads, outs, strict=True):
            self._check(batch, head, start, stop, out)
        self._read_heads(batch, heads, start, stop, outs)

    def read_packed(self, batch: int, start: int, stop: int, wanted: Sequence[tuple[Axes, int, NDArray[Any]]]) -> None:
        """Read the same tokens of heads of q, k and v that are packed, each by its axes into its buffer, as `read_heads`."""
        raise NotImplementedError

    def _check(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Raise ValueError for rows that the tensor has not, or a buffer that does not fit."""
        batches, heads, tokens = self.extents
        if not (0 <= batch < batches and 0 <= head < heads and 0 <= start < stop <= tokens):
            raise ValueError(
                f"tokens [{start}, {stop}) of batch {batch}, head {head} of {self.name!r}: "
                f"the array has {batches} batches, {heads} heads and {tokens} tokens"
            )
        expected = (stop - start, *self.row_shape)
        if out.shape != expected or out.dtype != self.dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"buffer of {out.dtype} {list(out.shape)} for rows of {self.name!r}: expected {self.dtype} "
                f"{list(expected)}, C-contiguous and writeable"
            )

    def parts(self, batch: int, head: int, start: int, stop: int) -> Sequence[Part] | None:
        """Where rows lie as they are in local files; None where they are decoded, or in memory."""
        return None

    @abstractmethod
    def _read(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """As `read_rows`; the arguments are checked."""

    def _read_heads(self, batch: int, heads: Sequence[int], start: int, stop: int, outs: Sequence[NDArray[Any]]) -> None:
        """As `read_heads`; the arguments are checked."""
        for head, out in zip(heads, outs, strict=True):
            self._read(batch, head, start, stop, out)


def heads_between(source: TensorSource, rows: int) -> int:
    """`shared_heads` of a source in files, by its first rows: how many times their own bytes those of a head span."""
    first, second = (source.parts(0, min(head, source.extents[1] - 1), 0, rows) or () for head in (0, 1))
    between = source.axes.packed or 0 < abs(first[0].offset - second[0].offset) < first[0].reach
    return first[0].spread if between else 1


@dataclass(frozen=True)
class Opened:
    """A tensor that a caller named, before it is known what its axes are.

    `source` makes the source of a name with these axes; `names` are those of its dimensions, one or more for each.
    """

    label: str
    shape: tuple[int, ...]
    source: Callable[[str, Axes], TensorSource]
    names: Sequence[list[Any] | tuple[Any, ...]] = ()
