"""The ways to compute a problem that a bench compares.

Each is a `Competitor`; a new one is a class here and a line in `comparison.competitors`. Timing them is not done here.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from oocattn.api import attention
from oocattn.bench.records import RESIDENT
from oocattn.errors import OocattnError
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import finalise
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.operations.tiles import pieces
from oocattn.pipelines.existing import Result
from oocattn.pipelines.watch.report import RunReport
from oocattn.problem.mask import Cover
from oocattn.problem.problem import Problem
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths
from oocattn.verification.recompute import Array64

TILE = {"cpu": 8192, "cuda": 131_072}
"""Queries and keys of a tile of the query-stationary loop."""

RowIndex = tuple[int, int, int]
"""Batch, query head and token of one row of `out`."""


class SkippedError(OocattnError):
    """A competitor has nothing to run on this machine."""


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
        """Rows [R, D] of the `out` that was computed last."""


class SkippedCompetitor(Competitor):
    """A competitor that cannot run: says why when it is asked to."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def run(self) -> None:
        """Raises SkippedError."""
        raise SkippedError(self._reason)

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """There are none."""
        return np.empty((0, 0))


@dataclass(frozen=True)
class Inputs:
    """q, k, v and room for `out` in host memory, pinned where there is a GPU.

    q is [B, Hq, N, D], k and v are [B, Hkv, N, D].
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
        for name, heads in (("q", problem.query_heads), ("k", problem.kv_heads), ("v", problem.kv_heads)):
            loaded[name] = _host_tensor(problem, heads, device)
            for batch in range(problem.batch):
                for head in range(heads):
                    rows = loaded[name][batch, head].view(torch.uint8).numpy().view(dataset.arrays[name].dtype)
                    dataset.arrays[name].read_rows(batch, head, 0, problem.tokens, rows)
        return cls(problem, device, out=_host_tensor(problem, problem.query_heads, device), **loaded)

    @staticmethod
    def nbytes(problem: Problem) -> int:
        """Bytes that `load` allocates."""
        rows = 2 * problem.batch * (problem.query_heads + problem.kv_heads) * problem.tokens
        return rows * problem.head_dim * problem.itemsize

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """Rows of `out`."""
        return torch.stack([self.out[place] for place in places]).double().numpy()


def _host_tensor(problem: Problem, heads: int, device: str) -> torch.Tensor:
    shape = (problem.batch, heads, problem.tokens, problem.head_dim)
    return torch.empty(shape, dtype=getattr(torch, problem.dtype), device="cpu", pin_memory=device == "cuda")


class ResidentCall(Competitor):
    """PyTorch's way: copy q, k and v to the device, one call, copy `out` back.

    On a GPU cuDNN is asked for, as the fastest, and PyTorch's own choice is taken where that refuses.
    """

    name = RESIDENT

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._backend = SDPBackend.CUDNN_ATTENTION if inputs.device == "cuda" else None

    def run(self) -> None:
        """See `Competitor.run`."""
        inputs = self._inputs
        q, k, v = (tensor.to(inputs.device, non_blocking=True) for tensor in (inputs.q, inputs.k, inputs.v))
        inputs.out.copy_(self._attend(q, k, v), non_blocking=True)
        _wait(inputs.device)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self._backend is not None:
            try:
                with sdpa_kernel(self._backend):
                    return self._call(q, k, v)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self._backend = None
        return self._call(q, k, v)

    def _call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        problem = self._inputs.problem
        return scaled_dot_product_attention(
            q, k, v, is_causal=problem.mask.triangular, scale=problem.scale, enable_gqa=problem.group_size > 1
        )

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """See `Competitor.rows`."""
        return self._inputs.rows(places)


class QueryStationaryLoop(Competitor):
    """The loop people write first: over heads, query tiles, and key tiles.

    A tile of 128K queries (8K on the CPU) and their state stay on the device. Tiles of as many keys and values, where the
    mask attends any, are copied there one after another, attended by one call of the kernel that oocattn would use, and
    merged into the state; then `out` of the tile is copied back. All is in the order of one stream, so copies and
    kernel take turns.
    """

    name = "query-stationary loop"

    def __init__(self, inputs: Inputs, kernel: str) -> None:
        self._inputs = inputs
        self._kernel = get_kernel(kernel)
        self._tile = TILE[inputs.device]

    def run(self) -> None:
        """See `Competitor.run`."""
        problem = self._inputs.problem
        for batch in range(problem.batch):
            for head in range(problem.query_heads):
                for start in range(0, problem.tokens, self._tile):
                    self._attend(batch, head, start)
        _wait(self._inputs.device)

    def _attend(self, batch: int, head: int, start: int) -> None:
        inputs, problem, kv_head = self._inputs, self._inputs.problem, head // self._inputs.problem.group_size
        stop = min(start + self._tile, problem.tokens)
        query = inputs.q[batch, head, start:stop].to(inputs.device, non_blocking=True).unsqueeze(0)  # [1, n, D]
        state = AttentionState.empty(1, stop - start, problem.head_dim, inputs.device)
        rows, mask = range(start, stop), problem.mask.entry(batch)
        for keys in pieces(range(problem.tokens), self._tile):
            if (cover := mask.cover(rows, keys)) is not Cover.DEAD:
                there = (kv[batch, kv_head, keys.start : keys.stop] for kv in (inputs.k, inputs.v))
                key, value = (tensor.to(inputs.device, non_blocking=True) for tensor in there)
                intervals = None if cover is Cover.FULL else make_intervals(mask, rows, keys)
                self._kernel.attend(Operands(query, key, value, problem.scores, intervals), state)
        out, lse = torch.empty_like(query), torch.empty_like(state.den)
        finalise(state, out, lse)
        inputs.out[batch, head, start:stop].copy_(out[0], non_blocking=True)

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """See `Competitor.rows`."""
        return self._inputs.rows(places)


class StreamCqsa(Competitor):
    """The Stream-CQSA package of the method's authors, if installed.

    It streams from host memory, with the least memory.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._forward = import_module("stream_cqsa").stream_cqsa_forward
        self._inputs = inputs
        self._out = inputs.out
        try:
            self.name = f"stream_cqsa {version('stream_cqsa')}"
        except PackageNotFoundError:
            self.name = "stream_cqsa"

    def run(self) -> None:
        """See `Competitor.run`."""
        inputs = self._inputs
        options = {"min_itr": 1, "stream_from_host": True, "low_memory": True, "out_device": "acc"}
        self._out, _ = self._forward(inputs.q, inputs.k, inputs.v, causal=inputs.problem.mask.triangular, **options)
        _wait(inputs.device)

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """See `Competitor.rows`."""
        return torch.stack([self._out[place] for place in places]).double().numpy()


class OutOfCore(Competitor):
    """oocattn from a dataset to a result on disk, on a cluster that is there already."""

    def __init__(
        self,
        name: str,
        dataset: Path,
        result: Path,
        client: Client,
        options: Mapping[str, Any],
        before: Callable[[], None],
    ) -> None:
        self.name = name
        self._dataset, self._client, self._options, self._before = dataset, client, options, before
        self._paths = ResultPaths.at(result)
        self._result: Result | None = None

    def prepare(self) -> None:
        """Remove the result of the last run, and set the page cache's state."""
        for path in (self._paths.result, self._paths.state):
            shutil.rmtree(path, ignore_errors=True)
        self._before()

    def run(self) -> RunReport | None:
        """See `Competitor.run`."""
        self._result = attention(self._dataset, self._paths.result, client=self._client, **self._options)
        return self._result.report

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """See `Competitor.rows`."""
        assert self._result is not None
        return np.stack([np.asarray(self._result.out[place]).astype(np.float64) for place in places])


def _wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
