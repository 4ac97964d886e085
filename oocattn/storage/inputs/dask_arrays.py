"""Arrays of Dask as sources of a run: computed as they are read, by the thread that reads them.

The chunks of a persisted array are results on a cluster. They are fetched from there, and no task is asked of its workers:
all their threads may be reading. An array can be sent to workers of a cluster where its graph is small, as one is that reads
files, and is not persisted: its results belong to the client of this process. Neither dask nor distributed is imported
before there is such an array.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from oocattn.errors import ProblemError
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.computed import ComputedSource
from oocattn.storage.inputs.kept import find
from oocattn.storage.inputs.source import Opened, TensorSource
from oocattn.storage.inputs.values import check_dtype
from oocattn.storage.locations import describe
from oocattn.storage.remote.options import StorageOptions

if TYPE_CHECKING:
    import dask.array

MOST_SENT_BYTES = 64 << 20
"""Bytes of an array's graph, with the arrays in it, that are sent to each worker at most."""


class DaskSource(ComputedSource):
    """An array of Dask."""

    _advice = (
        'compute it by itself, with scheduler="synchronous", to see why; in place of one whose tasks hold futures of a '
        "cluster give CLIENT.persist(ARRAY)"
    )

    def __reduce__(self) -> tuple[Any, ...]:
        if self._pickled is None:
            return super().__reduce__()
        return _recall, (self._token, self.name, self._pickled, self._chunks, self.axes, self._checksum)

    @cached_property
    def _pickled(self) -> bytes | None:
        """The array in bytes; None where it cannot be sent."""
        import cloudpickle
        from dask.sizeof import sizeof

        graph = self._content.dask
        if _results_in(graph) or sum(map(sizeof, graph.values())) > MOST_SENT_BYTES:
            return None
        try:
            return cast(bytes, cloudpickle.dumps(self._content))
        except Exception:  # whatever the caller's objects raise: open files, locks
            return None

    def _numbers(self, selection: tuple[slice, ...]) -> Any:
        part = self._content[selection]
        needed = part.dask.cull(part.__dask_keys__())
        if results := _results_in(needed):
            client = next(iter(results.values())).client
            part = type(part)({**needed, **client.gather(results)}, part.name, part.chunks, meta=part)
        # Threads of Dask's own would wait for this one's in a worker, or share no bound with it.
        return part.compute(scheduler="synchronous")


def _results_in(graph: Mapping[Any, Any]) -> dict[Any, Any]:
    """The futures of a cluster that stand in a graph for their results."""
    distributed = sys.modules.get("distributed")  # without it, nothing was persisted
    return {} if distributed is None else {key: each for key, each in graph.items() if isinstance(each, distributed.Future)}


def _recall(token: str, name: str, pickled: bytes, chunks: Sequence[int], axes: Axes, checksum: str) -> TensorSource:
    """The source of a token in its own process; in another one its like, with the checksum that was computed there."""
    known: TensorSource | None = find(token)
    if known is not None:
        return known
    found = DaskSource(name, pickle.loads(pickled), chunks, "dask", axes)
    found.__dict__["_checksum"] = checksum
    return found


def open_dask(name: str, typed: object, _: StorageOptions | None = None) -> Opened | None:
    """An array of Dask; None for anything else. Raises ProblemError for one of other things than numbers."""
    arrays = sys.modules.get("dask.array")  # who passes an array has imported it
    return open_dask_array(name, typed, describe(typed)) if arrays is not None and isinstance(typed, arrays.Array) else None


def open_dask_array(name: str, given: dask.array.Array, label: str) -> Opened:
    """An array of Dask that messages call `label`. Raises ProblemError for one of other things than numbers."""
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
    return Opened(label, given.shape, lambda own, axes: DaskSource(own, content, chunks, "dask", axes))
