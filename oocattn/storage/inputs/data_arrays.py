"""Arrays of xarray as sources of a run. The package is not imported here: who passes an array has imported it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from oocattn.cf_packing import packing_attribute
from oocattn.errors import ProblemError
from oocattn.storage.inputs.axes import LAYOUTS
from oocattn.storage.inputs.computed import ComputedSource
from oocattn.storage.inputs.dask_arrays import open_dask_array
from oocattn.storage.inputs.meaning import believed_order
from oocattn.storage.inputs.memory import MemorySource
from oocattn.storage.inputs.source import Opened
from oocattn.storage.inputs.values import check_dtype
from oocattn.storage.locations import describe
from oocattn.storage.remote.options import StorageOptions

if TYPE_CHECKING:
    import xarray

SLICE_ROWS = 1024
"""Elements along its longest axis that are read at a time of an array whose chunks are not known."""


class LazySource(ComputedSource):
    """A variable of xarray that is read by slices, with xarray's decoding."""

    def _numbers(self, selection: tuple[slice, ...]) -> Any:
        return self._content[selection].to_numpy()


def open_data_array(name: str, typed: object, _: StorageOptions | None = None) -> Opened | None:
    """A DataArray of xarray; None for anything else. Raises ProblemError for one of other things than numbers."""
    xarray = sys.modules.get("xarray")
    if xarray is not None and isinstance(typed, xarray.DataArray):
        return _open(name, typed)
    if xarray is not None and isinstance(typed, xarray.Variable | xarray.Dataset):
        raise ProblemError(f"{name}: found {describe(typed)}: expected one xarray.DataArray, such as DATASET[{name!r}]")
    return None


def _open(name: str, given: xarray.DataArray) -> Opened:
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
        found = open_dask_array(name, given.data, label)
        return Opened(label, found.shape, found.source, names)
    check_dtype(name, label, given.dtype)
    content = given.variable
    if content._in_memory:  # else it is read by slices, each of which goes through xarray's indexing
        numbers = given.to_numpy()
        return Opened(label, given.shape, lambda own, axes: MemorySource(own, numbers, axes), names)
    preferred, longest = given.encoding.get("preferred_chunks", {}), max(given.shape, default=1)
    plain = [SLICE_ROWS if size == longest else 1 for size in given.shape]  # most likely of the tokens
    chunks = [_extent(preferred.get(dim, rows)) for dim, rows in zip(given.dims, plain, strict=True)]
    return Opened(label, given.shape, lambda own, axes: LazySource(own, content, chunks, "xarray", axes), names)


def _extent(preferred: Any) -> int:
    """The extent of a chunk, of one number or several."""
    return max(map(int, preferred), default=1) if isinstance(preferred, tuple | list) else max(1, int(preferred))
