"""Tensors that are computed or decoded as they are read: arrays of Dask and of xarray. Neither package is imported here."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from oocattn.cf_packing import packing_attribute
from oocattn.errors import IntegrityError, OocattnError, ProblemError
from oocattn.storage.inputs.axes import LAYOUTS, Axes
from oocattn.storage.inputs.in_process import InProcessSource
from oocattn.storage.inputs.meaning import believed_order
from oocattn.storage.inputs.memory import MemorySource
from oocattn.storage.inputs.source import Opened, TensorSource
from oocattn.storage.inputs.values import check_dtype
from oocattn.storage.locations import describe
from oocattn.storage.remote.options import StorageOptions

if TYPE_CHECKING:
    import dask.array
    import xarray

SLICE_ROWS = 1024
"""Elements along its longest axis that are read at a time of an array whose chunks are not known."""

COPIES = 4
"""Bound on the copies of the chunks of one read that live at once. What a graph of Dask needs besides is not known."""


class ComputedSource(InProcessSource):
    """A tensor whose numbers are computed as they are read, in this process, with `chunks` along its stored axes."""

    def __init__(
        self, name: str, content: dask.array.Array | xarray.Variable, chunks: Sequence[int], kind: str, axes: Axes
    ) -> None:
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
        last = self._chunks[-1] // self.axes.head_dim if "f" in self.axes.order else 1
        along = self._chunks[self.axes.order.index("h")] if "h" in self.axes.order else last
        return min(self.extents[1], max(1, along))

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
            part: Any = self._content[selection]
            # Threads of Dask's own would wait for this one's in a worker, or share no bound with it.
            found: Any = part.compute(scheduler="synchronous") if self.origin.kind == "dask" else part.to_numpy()
        except (OocattnError, MemoryError):
            raise
        except Exception as error:  # whatever the caller's functions, or a backend, raise
            raise IntegrityError(
                f"{described} could not be computed ({type(error).__name__}: {error}): compute it by itself to see why"
            ) from error
        expected = [len(range(*part.indices(size))) for part, size in zip(selection, self.stored, strict=True)]
        plain = isinstance(found, np.ndarray) and not isinstance(found, np.ma.MaskedArray)
        if not plain or list(found.shape) != expected or found.dtype.name != self.spec.dtype:
            raise IntegrityError(
                f"{described} gave {describe(found)} where its shape and dtype promise {self.spec.dtype} {expected}: give "
                "an array of NumPy chunks, not persisted on a cluster, with the dtype that its functions return"
            )
        return cast(NDArray[Any], found)


def open_computed(name: str, typed: object, _: StorageOptions | None = None) -> Opened | None:
    """An array of Dask or xarray; None for anything else. Raises ProblemError for one of other things than numbers."""
    arrays, xarray = sys.modules.get("dask.array"), sys.modules.get("xarray")  # who passes an array has imported it
    if xarray is not None and isinstance(typed, xarray.DataArray):
        return _open_data_array(name, typed)
    if xarray is not None and isinstance(typed, xarray.Variable | xarray.Dataset):
        raise ProblemError(f"{name}: found {describe(typed)}: expected one xarray.DataArray, such as DATASET[{name!r}]")
    if arrays is not None and isinstance(typed, arrays.Array):
        return _open_dask(name, typed, describe(typed))
    return None


def _open_data_array(name: str, given: xarray.DataArray) -> Opened:
    """A DataArray, as its dimensions are called; in an order that no layout has it is transposed as it is read."""
    label = f"an xarray.DataArray {list(given.shape)} ({', '.join(map(str, given.dims))})"
    if (packing := packing_attribute(given.attrs)) is not None:
        raise ProblemError(
            f"{name}: found {label} with {packing} by which its numbers are packed or masked (CF conventions): expected "
            "plain numbers; open it with mask_and_scale=True, or decode its dataset with xarray.decode_cf"
        )
    order = believed_order(name, given.dims)
    if name in ("q", "k", "v") and order is not None and order not in LAYOUTS:
        given = given.transpose(*(given.dims[order.index(axis)] for axis in "bhnd" if axis in order))
    names = [tuple(given.dims)]
    if given.chunks is not None:
        found = _open_dask(name, given.data, label)
        return Opened(label, found.shape, found.source, names)
    check_dtype(name, label, given.dtype)
    content = given.variable
    if content._in_memory:  # else it is read by slices, each of which goes through xarray's indexing
        numbers = given.to_numpy()
        return Opened(label, given.shape, lambda own, axes: MemorySource(own, numbers, axes), names)
    preferred, longest = given.encoding.get("preferred_chunks", {}), max(given.shape, default=1)
    plain = [SLICE_ROWS if size == longest else 1 for size in given.shape]  # most likely of the tokens
    chunks = [_extent(preferred.get(dim, rows)) for dim, rows in zip(given.dims, plain, strict=True)]
    return Opened(label, given.shape, lambda own, axes: ComputedSource(own, content, chunks, "xarray", axes), names)


def _extent(preferred: Any) -> int:
    """The extent of a chunk, of one number or several."""
    return max(map(int, preferred), default=1) if isinstance(preferred, tuple | list) else max(1, int(preferred))


def _open_dask(name: str, given: dask.array.Array, label: str) -> Opened:
    if any(math.isnan(size) for size in given.shape):
        raise ProblemError(f"{name}: found {label} of unknown sizes: expected known ones; give ARRAY.compute_chunk_sizes()")
    if isinstance(given._meta, np.ma.MaskedArray):
        raise ProblemError(
            f"{name}: found {label} of masked chunks: expected plain numbers; give dask.array.ma.filled(ARRAY, 0)"
        )
    if not isinstance(given._meta, np.ndarray):
        raise ProblemError(f"{name}: found {label} of chunks of {describe(given._meta)}: expected arrays of NumPy")
    check_dtype(name, label, given.dtype)
    content, chunks = given, [max(sizes) for sizes in given.chunks]
    return Opened(label, given.shape, lambda own, axes: ComputedSource(own, content, chunks, "dask", axes))
