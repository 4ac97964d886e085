"""Tensors that are computed or decoded as they are read, chunk by chunk."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import IntegrityError, OocattnError
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.in_process import InProcessSource
from oocattn.storage.inputs.source import TensorSource
from oocattn.storage.locations import describe

COPIES = 4
"""Bound on the copies of the chunks of one read that live at once. What a graph of Dask needs besides is not known."""


class ComputedSource(InProcessSource):
    """A tensor whose numbers are computed as they are read, in this process, with `chunks` along its stored axes."""

    _advice = "compute it by itself to see why"

    def __init__(self, name: str, content: Any, chunks: Sequence[int], kind: str, axes: Axes) -> None:
        super().__init__(name, content, kind, content.shape, content.dtype.name, axes)
        self._chunks = tuple(chunks)

    @property
    def direct(self) -> bool:
        """See `TensorSource.direct`."""
        return False

    @property
    def chunk_rows(self) -> int:
        """See `TensorSource.chunk_rows`."""
        return self._chunks[self.axes.token_axis]

    @property
    def shared_heads(self) -> int:
        """See `TensorSource.shared_heads`."""
        return self.axes.heads_in(self._chunks, self.stored)

    @property
    def decode_bytes(self) -> int:
        """See `TensorSource.decode_bytes`."""
        extents = [
            size if axis == "d" else min(size, 2 * chunk)  # chunks may begin anywhere
            for axis, size, chunk in zip(self.axes.order, self.stored, self._chunks, strict=True)
        ]
        return COPIES * math.prod(extents) * self.dtype.itemsize

    @property
    def reader(self) -> str:
        """See `TensorSource.reader`."""
        return self.origin.kind

    def describe(self) -> str:
        """See `TensorSource.describe`."""
        return f"an array of {self.origin.kind}, computed as it is read"

    def reopen(self) -> TensorSource:
        """The same: what it is computed from is not known."""
        return self

    def _read(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        self._read_heads(batch, [head], start, stop, [out])

    def _read_heads(self, batch: int, heads: Sequence[int], start: int, stop: int, outs: Sequence[NDArray[Any]]) -> None:
        of_heads = dict(zip(heads, outs, strict=True))
        for group in self._groups(heads):
            for low in range(start - start % self.chunk_rows, stop, self.chunk_rows):
                first, last = max(low, start), min(low + self.chunk_rows, stop)
                found = self._compute(self.axes.select_heads(batch, range(group[0], group[-1] + 1), slice(first, last)))
                for head in group:
                    part = of_heads[head][first - start : last - start]
                    part[...] = found[self.axes.among(head - group[0])].reshape(part.shape)

    def _groups(self, heads: Sequence[int]) -> list[list[int]]:
        """Heads by the chunk that they begin in."""
        groups: dict[int, list[int]] = {}
        for head in sorted(heads):
            groups.setdefault(self.axes.chunk_of(head, self._chunks), []).append(head)
        return list(groups.values())

    def _compute(self, selection: tuple[slice, ...]) -> NDArray[Any]:
        """The numbers of a selection. Raises IntegrityError where they cannot be had, or are others than was said."""
        described = f"{self.name} ({self.origin})"
        try:
            found = self._numbers(selection)
        except (OocattnError, MemoryError):
            raise
        except Exception as error:  # whatever the caller's functions, or a backend, raise
            raise IntegrityError(
                f"{described} could not be computed ({type(error).__name__}: {error}): {self._advice}"
            ) from error
        expected = [len(range(*part.indices(size))) for part, size in zip(selection, self.stored, strict=True)]
        plain = isinstance(found, np.ndarray) and not isinstance(found, np.ma.MaskedArray)
        if not plain or list(found.shape) != expected or found.dtype.name != self.spec.dtype:
            raise IntegrityError(
                f"{described} gave {describe(found)} where its shape and dtype promise {self.spec.dtype} {expected}: give "
                "an array of NumPy chunks, with the dtype that its functions return"
            )
        return cast(NDArray[Any], found)

    @abstractmethod
    def _numbers(self, selection: tuple[slice, ...]) -> Any:
        """The numbers of a selection, as whatever computes them hands them out."""
