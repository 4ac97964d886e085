"""Rows of heads that lie interleaved: read together when the first one is asked for, and held for the others."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from oocattn.storage.inputs.direct import DirectReader
from oocattn.storage.inputs.source import TensorSource
from oocattn.units import ceil_div, round_up

BLOCK_BYTES = 8 << 20
"""Bytes of the rows, of all heads that are held, that are read at a time."""


class Rows(Protocol):
    """What rows are read from: a source, or what holds some of its heads."""

    @property
    def name(self) -> str:
        """Of the tensor."""

    @property
    def direct(self) -> bool:
        """See `TensorSource.direct`."""

    @property
    def is_remote(self) -> bool:
        """See `TensorSource.is_remote`."""

    @property
    def ahead_rows(self) -> int:
        """See `TensorSource.ahead_rows`."""

    def decoded_bytes(self, start: int, stop: int) -> int:
        """See `TensorSource.decoded_bytes`."""

    @property
    def of_all_batches(self) -> bool:
        """See `TensorSource.of_all_batches`."""

    def read_rows(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """See `TensorSource.read_rows`."""


def lie_together(sources: Mapping[str, TensorSource]) -> bool:
    """Whether q, k and v are packed in one tensor, in files or in the same encoded chunks: their rows are read together."""
    packed = [sources[name] for name in ("q", "k", "v")]
    return all(source.axes.packed and (source.decodes_packed or source.parts(0, 0, 0, 1) is not None) for source in packed)


def hold(sources: Mapping[str, TensorSource], heads: Mapping[str, int], tokens: Mapping[str, range]) -> dict[str, Rows]:
    """The rows of sources, of which `heads` says how many heads of a tensor are held at a time, of these `tokens`.

    Heads are counted in windows of so many. Those of the next window take the place of the last one's.
    """
    held = [name for name, count in heads.items() if count]
    sets = [held] if held and lie_together(sources) else [[name] for name in held]
    rows: dict[str, Rows] = dict(sources)
    for names in sets:
        window = _Window([(sources[name], heads[name]) for name in names], tokens[names[0]])
        rows |= {name: HeldRows(sources[name], window) for name in names}
    return rows


@dataclass(frozen=True)
class HeldRows:
    """The rows of a source, by way of a window that may be of several sources."""

    source: TensorSource
    window: _Window

    @property
    def name(self) -> str:
        """See `Rows.name`."""
        return self.source.name

    @property
    def direct(self) -> bool:
        """See `Rows.direct`."""
        return self.source.direct

    @property
    def is_remote(self) -> bool:
        """See `TensorSource.is_remote`."""
        return self.source.is_remote

    @property
    def ahead_rows(self) -> int:
        """See `TensorSource.ahead_rows`."""
        return self.window.block_rows

    def decoded_bytes(self, start: int, stop: int) -> int:
        """See `TensorSource.decoded_bytes`: a block at a time is decoded, of all heads that are held."""
        return self.window.block_bytes

    @property
    def of_all_batches(self) -> bool:
        """See `Rows.of_all_batches`."""
        return self.source.of_all_batches

    def read_rows(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """See `TensorSource.read_rows`."""
        self.window.read_rows(self.name, batch, head, start, stop, out)


class _Window:
    """Memory for the rows of some heads of sources, a block of tokens at a time. Each block has a lock of its own."""

    def __init__(self, members: Sequence[tuple[TensorSource, int]], tokens: range) -> None:
        self._sources = {source.name: source for source, _ in members}
        self._heads = {source.name: heads for source, heads in members}
        self._tokens = tokens
        row_bytes = sum(source.row_bytes * heads for source, heads in members)
        unit = max(1 if source.direct else source.chunk_rows for source, _ in members)
        self._block = round_up(max(1, BLOCK_BYTES // row_bytes), unit)  # chunks that are decoded are decoded once
        self.block_rows, self.block_bytes = self._block, self._block * row_bytes
        blocks = ceil_div(tokens.stop, self._block)
        self._locks = [threading.Lock() for _ in range(blocks)]
        self._content: list[tuple[int, int] | None] = [None] * blocks  # batch and number of the window that it has
        self._memory = {
            source.name: np.empty((heads, len(tokens), *source.row_shape), source.dtype) for source, heads in members
        }
        self._reading = DirectReader()

    def read_rows(self, name: str, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        """Copy rows of a head, those that are not there after they were read with others."""
        number, place = divmod(head, self._heads[name])
        for block in range(start // self._block, ceil_div(stop, self._block)):
            rows = range(max(start, block * self._block), min(stop, (block + 1) * self._block))
            with self._locks[block]:
                if self._content[block] != (batch, number):
                    self._content[block] = None  # should it fail
                    self._fill(block, batch, number)
                    self._content[block] = batch, number
                out[rows.start - start : rows.stop - start] = self._memory[name][place, self._places(rows)]

    def _fill(self, block: int, batch: int, number: int) -> None:
        """Read the rows of a block, of all heads of a window."""
        rows = range(max(self._tokens.start, block * self._block), min(self._tokens.stop, (block + 1) * self._block))
        requests, packed = [], []
        for name, source in self._sources.items():
            first = number * self._heads[name]
            heads = range(first, min(first + self._heads[name], source.extents[1]))
            outs = [*self._memory[name][: len(heads), self._places(rows)]]
            parts = [source.parts(batch, head, rows.start, rows.stop) for head in heads]
            if source.decodes_packed:
                packed += [(source.axes, head, out) for head, out in zip(heads, outs, strict=True)]
            elif None in parts:
                source.read_heads(batch, heads, rows.start, rows.stop, outs)
            requests += [(each, out) for each, out in zip(parts, outs, strict=True) if each is not None]
        if packed:
            source.read_packed(batch, rows.start, rows.stop, packed)
        if requests:
            self._reading.read(requests)

    def _places(self, rows: range) -> slice:
        """Where rows lie in the memory of a head."""
        return slice(rows.start - self._tokens.start, rows.stop - self._tokens.start)
