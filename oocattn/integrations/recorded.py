"""The dataset of a recorded layer: it is made of what the layer gets first, and grows with what its cache gets later.

A growing dataset is never read half-written, wherever its recording ends. New rows are written first, past the shapes of
the arrays. Then the shapes grow, that of `k` first and that of `v` last: until both agree, the dataset is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from oocattn.errors import ProblemError
from oocattn.problem.recorded import LEARNABLE_SINK, RecordedCall
from oocattn.records import differences
from oocattn.storage.files.operations import name_failure
from oocattn.storage.inputs.axes import BHND
from oocattn.storage.inputs.memory import open_memory
from oocattn.storage.locations import Location
from oocattn.storage.make.create import OwnStore, create_array, create_dataset, dimension_names, fill_array
from oocattn.storage.remote.store import open_remote
from oocattn.storage.zarr_compat import array_at

PARTS = ("k", "q", "v")
"""The arrays, in the order in which their shapes grow."""

Tensors = dict[str, torch.Tensor]
"""What a layer gets: q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D]."""

Rows = Callable[[int, int, int, int], NDArray[Any]]
"""(batch, head, start, stop) to rows [stop - start, D]."""


class RecordedLayer:
    """The dataset of a layer, made of its first tensors."""

    def __init__(self, place: Location, tensors: Tensors, call: RecordedCall, sinks: torch.Tensor | None = None) -> None:
        self.place = place
        self.call = call
        self._checksums: dict[str, list[int]] = {}
        dimensions = dimension_names({part: tuple(tensor.shape) for part, tensor in tensors.items()})
        with create_dataset(place.path or place.text, attributes=call.attributes()) as group:
            for part, tensor in tensors.items():
                array = create_array(group, part, tuple(tensor.shape), _dtype(tensor), dimensions=dimensions[part])
                fill_array(array, _rows(part, tensor))
            if sinks is not None:
                numbers = sinks.detach().float().numpy(force=True)
                group.create_array(LEARNABLE_SINK, data=numbers, config={"write_empty_chunks": True})  # also zeros alone

    def append(self, tensors: Tensors, call: RecordedCall) -> None:
        """Append the new tokens of a call. Raises ProblemError, and writes nothing, where they do not go on from here."""
        self._check_form(tensors, call)
        checksums = self._check_earlier(tensors)
        new = tensors["q"].shape[2]
        with name_failure("write", self.place):
            for part, array in self._arrays.items():
                _write_past_end(array, _rows(part, tensors[part][:, :, -new:]), new)
            for array in self._arrays.values():
                array.resize(_shape(array, array.shape[2] + new))
        self._checksums = checksums

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        place = self.place
        store = open_remote(place, read_only=False) if place.path is None else OwnStore(place.path)
        group = zarr.open_group(store, mode="r+")
        return {part: group[part] for part in PARTS}

    def _check_form(self, tensors: Tensors, call: RecordedCall) -> None:
        """Refuse other batch entries, heads, dimensions and dtypes than those recorded, another call, and other lengths."""
        new = tensors["q"].shape[2]
        for part, array in self._arrays.items():
            found = f"{list(tensors[part].shape)} {_dtype(tensors[part])}"
            expected = f"{list(_shape(array, new + (part != 'q' and array.shape[2])))} {array.dtype}"
            if found != expected:
                raise self._refused(f"{part} {list(array.shape)}", f"{new:,} new tokens and {part} {found}", expected)
        if call != self.call:
            raise self._refused("recorded another call", differences(self.call, call), "the same")

    def _check_earlier(self, tensors: Tensors) -> dict[str, list[int]]:
        """The checksums of all keys and values of a call. Raises ProblemError where the earlier ones are not recorded."""
        found = {}
        for part in ("k", "v"):
            array, rows = self._arrays[part], _rows(part, tensors[part])
            before, after = array.shape[2], tensors[part].shape[2]
            if part not in self._checksums:
                self._checksums[part] = _checksums(_stored(array), array, 0, before)
            earlier = _checksums(rows, array, 0, before)
            if earlier != self._checksums[part]:
                raise self._refused(
                    f"{before:,} rows of {part}",
                    f"other numbers in these {before:,} rows, as after a search with beams or of another text",
                    "the same rows, and new ones after them",
                )
            found[part] = _checksums(rows, array, before, after, earlier)
        return found

    def _refused(self, recorded: str, found: str, expected: str) -> ProblemError:
        return ProblemError(
            f"{self.place} has {recorded}, and its layer ran again with {found}: expected {expected}, of one pass or a "
            "cache that grows; record each pass in a store of its own"
        )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(array: zarr.Array[Any], rows: int) -> tuple[int, ...]:
    """The shape of an array with so many rows."""
    return (*array.shape[:2], rows, *array.shape[3:])


def _rows(part: str, tensor: torch.Tensor) -> Rows:
    """The rows of a tensor, wherever it lies."""
    opened = open_memory(part, tensor.detach())
    assert opened is not None
    source = opened.source(part, BHND)

    def read(batch: int, head: int, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *source.row_shape), source.dtype)
        source.read_rows(batch, head, start, stop, out)
        return out

    return read


def _stored(array: zarr.Array[Any]) -> Rows:
    """The rows of an array of a dataset."""
    return lambda batch, head, start, stop: np.asarray(array[batch, head, start:stop])


def _write_past_end(array: zarr.Array[Any], rows: Rows, new: int) -> None:
    """Write `new` rows of each head after those of an array, whose shape stays as it is."""
    start = array.shape[2]
    longer = array_at(array.store, array.path, array.metadata.update_shape(_shape(array, start + new)))
    longer = longer.with_config({"write_empty_chunks": True})  # a chunk of zeros that is not there is refused
    for batch, head in np.ndindex(*array.shape[:2]):
        longer[batch, head, start:] = rows(batch, head, 0, new)


def _checksums(rows: Rows, array: zarr.Array[Any], start: int, stop: int, before: list[int] | None = None) -> list[int]:
    """A checksum of the rows from `start` to `stop` of each head, which goes on from those of the rows before."""
    heads = list(np.ndindex(*array.shape[:2]))
    found = list(before or [0] * len(heads))
    for at, (batch, head) in enumerate(heads):
        for first in range(start, stop, array.chunks[2]):
            block = np.ascontiguousarray(rows(batch, head, first, min(first + array.chunks[2], stop)))
            found[at] = zlib.crc32(block.view(np.uint8).data, found[at])
    return found
