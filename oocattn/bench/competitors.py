"""The ways to compute a problem that a bench compares. A new one is a class here and a line in `competitors`.

The calls of libraries are in `resident`.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import Client

from oocattn.api import attention
from oocattn.errors import OocattnError
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import finalise
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.operations.tiles import pieces
from oocattn.pipelines.result import Result
from oocattn.pipelines.watch.report import RunReport
from oocattn.problem.mask import Cover
from oocattn.problem.problem import HeadGroup, Problem
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths
from oocattn.verification.rounding import Array64

TILE = {"cpu": 8192, "cuda": 131_072}  # queries and keys of a tile of the query-stationary loop

RowIndex = tuple[int, int, int]  # batch, head and row of `out`


class Competitor(ABC):
    """One way to compute the problem."""

    name: str

    def prepare(self) -> None:  # noqa: B027  nothing, for most
        """Prepare a run, untimed."""

    @abstractmethod
    def run(self) -> RunReport | None:
        """Compute `out` once, whole; return the report, where there is one."""

    @abstractmethod
    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """Rows [R, Dv] of the `out` that was computed last."""


class SkippedCompetitor(Competitor):
    """A competitor that cannot run: says why when it is asked to."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self._reason = name, reason

    def run(self) -> None:
        """Raises OocattnError with the reason."""
        raise OocattnError(self._reason)

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """There are none."""
        return np.empty((0, 0))


@dataclass(frozen=True)
class Inputs:
    """What is attended, and room for `out`, in host memory, pinned for a GPU.

    q [B, Hq, rows, D] and `out` [B, Hq, rows, Dv] have the rows that are asked for; k is [B, Hkv, Nk, D] and v [B, Hkv, Nk,
    Dv].
    """

    problem: Problem
    device: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor

    @classmethod
    def load(cls, dataset: Dataset, problem: Problem, device: str) -> Inputs:
        """Read a dataset into memory that is allocated here."""
        loaded = {}
        for name, array in dataset.arrays.items():
            batch, heads, tokens = array.extents
            rows = range(*problem.rows_asked) if name == "q" else range(tokens)
            loaded[name] = _host_tensor((batch, heads, len(rows), *array.row_shape), problem.dtype, device)
            for entry, head in np.ndindex(batch, heads):
                there = loaded[name][entry, head].view(torch.uint8).numpy().view(array.dtype)
                array.read_rows(entry, head, rows.start, rows.stop, there)
        return cls(problem, device, out=_host_tensor(problem.out_shape, problem.dtype, device), **loaded)

    @staticmethod
    def nbytes(problem: Problem) -> int:
        """Bytes that `load` allocates."""
        rows = problem.rows + problem.batch * problem.kv_heads * problem.keys
        return rows * (problem.head_dim + problem.value_dim) * problem.itemsize


def _host_tensor(shape: tuple[int, ...], dtype: str, device: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="cpu", pin_memory=device == "cuda")


class FromHostMemory(Competitor):
    """A way to compute that takes q, k and v from host memory, and leaves `out` there."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self._out = inputs, inputs.out

    def run(self) -> None:
        """See `Competitor.run`."""
        self._compute()
        if self._inputs.device == "cuda":
            torch.cuda.synchronize()

    @abstractmethod
    def _compute(self) -> None:
        """Have `out` computed, on a GPU in the order of the stream."""

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """See `Competitor.rows`."""
        return torch.stack([self._out[place] for place in places]).double().numpy()


class QueryStationaryLoop(FromHostMemory):
    """The loop people write first: over heads, query tiles, and key tiles.

    A tile of queries and their state stay on the device. Tiles of as many keys and values, where the mask attends any,
    are copied there one after another and attended by one call of the kernel that oocattn would use; then `out` of the
    tile is copied back. All is in the order of one stream, so copies and kernel take turns.
    """

    name = "query-stationary loop"

    def __init__(self, inputs: Inputs, kernel: str) -> None:
        super().__init__(inputs)
        self._kernel, self._tile = get_kernel(kernel), TILE[inputs.device]

    def _compute(self) -> None:
        problem = self._inputs.problem
        for index in range(problem.head_groups):
            group = problem.head_group(index)
            for place in range(len(group.query_heads)):
                for rows in pieces(range(*problem.rows_asked), self._tile):
                    self._attend(group, place, rows)

    def _attend(self, group: HeadGroup, place: int, rows: range) -> None:
        """Attend a tile of rows of one of the group's heads."""
        inputs, problem, batch = self._inputs, self._inputs.problem, group.batch
        slopes, sinks = (found and found[place : place + 1] for found in (problem.slopes(group), problem.sinks(group)))
        there = (batch, group.outputs[place], slice(rows.start - problem.rows_asked[0], rows.stop - problem.rows_asked[0]))
        query = inputs.q[there].to(inputs.device, non_blocking=True).unsqueeze(0)  # [1, n, D]
        state = AttentionState.empty(1, len(rows), problem.value_dim, inputs.device)
        mask = problem.mask(batch)
        for live in mask.live_keys(rows):
            for keys in pieces(live, self._tile):
                of_keys = (batch, group.kv_head, slice(keys.start, keys.stop))
                key, value = (kv[of_keys].to(inputs.device, non_blocking=True) for kv in (inputs.k, inputs.v))
                plain = slopes is None and mask.cover(rows, keys) is Cover.FULL
                intervals = None if plain else make_intervals(mask, rows, keys)
                self._kernel.attend(Operands(query, key, value, problem.scores, intervals, slopes), state)
        out, lse = query.new_empty(1, len(rows), problem.value_dim), torch.empty_like(state.den)
        finalise(state, out, lse, sinks)
        inputs.out[there].copy_(out[0], non_blocking=True)


class StreamCqsa(FromHostMemory):
    """The Stream-CQSA package of the method's authors. It streams from host memory, with the least memory.

    Raises OocattnError for anything but full or causal attention of a square.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        problem, mask = inputs.problem, inputs.problem.mask()
        whole = problem.rows_asked == (0, problem.keys) and problem.value_dim == problem.head_dim
        if not (whole and problem.is_plain and not problem.digests and (mask.is_full or mask.is_triangular)):
            raise OocattnError("it attends whole squares only, full or causal")
        self._forward = import_module("stream_cqsa").stream_cqsa_forward
        try:
            self.name = f"stream_cqsa {version('stream_cqsa')}"
        except PackageNotFoundError:
            self.name = "stream_cqsa"

    def _compute(self) -> None:
        inputs = self._inputs
        options = {"min_itr": 1, "stream_from_host": True, "low_memory": True, "out_device": "acc"}
        self._out, _ = self._forward(inputs.q, inputs.k, inputs.v, causal=inputs.problem.causal, **options)


class OutOfCore(Competitor):
    """oocattn from a dataset to a result beside it, on a cluster that is there already."""

    def __init__(
        self, name: str, dataset: Path, client: Client, options: Mapping[str, Any], before: Callable[[], None]
    ) -> None:
        self.name = name
        self._dataset, self._client, self._options, self._before = dataset, client, options, before
        self._paths = ResultPaths.at(dataset.with_name("out.zarr"))
        self._result: Result | None = None

    def prepare(self) -> None:
        """Remove the result of the last run, and set the page cache's state."""
        for path in (self._paths.folder, self._paths.state):
            shutil.rmtree(path, ignore_errors=True)
        self._before()

    def run(self) -> RunReport | None:
        """See `Competitor.run`."""
        self._result = attention(self._dataset, self._paths.folder, client=self._client, **self._options)
        return self._result.report

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """See `Competitor.rows`."""
        assert self._result is not None
        return np.stack([np.asarray(self._result.out[place]).astype(np.float64) for place in places])
