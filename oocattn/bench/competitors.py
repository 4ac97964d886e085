"""The ways to compute a problem that a bench compares. A new one is a class here and a line in `competitors`."""

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

TILE = {"cpu": 8192, "cuda": 131_072}  # queries and keys of a tile of the query-stationary loop

RowIndex = tuple[int, int, int]  # batch, query head and token of one row of `out`


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
        self.name, self._reason = name, reason

    def run(self) -> None:
        """Raises OocattnError with the reason."""
        raise OocattnError(self._reason)

    def rows(self, places: Sequence[RowIndex]) -> Array64:
        """There are none."""
        return np.empty((0, 0))


@dataclass(frozen=True)
class Inputs:
    """q, k, v and room for `out` in host memory, pinned for a GPU. q and `out` are [B, Hq, N, D], k and v [B, Hkv, N, D]."""

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


def _host_tensor(problem: Problem, heads: int, device: str) -> torch.Tensor:
    shape = (problem.batch, heads, problem.tokens, problem.head_dim)
    return torch.empty(shape, dtype=getattr(torch, problem.dtype), device="cpu", pin_memory=device == "cuda")


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


class ResidentCall(FromHostMemory):
    """PyTorch's way: copy q, k and v to the device, one call, copy `out` back.

    On a GPU cuDNN is asked for, as the fastest, and PyTorch's own choice is taken where that refuses.
    """

    name = RESIDENT

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._backend = SDPBackend.CUDNN_ATTENTION if inputs.device == "cuda" else None

    def _compute(self) -> None:
        inputs = self._inputs
        q, k, v = (tensor.to(inputs.device, non_blocking=True) for tensor in (inputs.q, inputs.k, inputs.v))
        inputs.out.copy_(self._attend(q, k, v), non_blocking=True)

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
        for batch in range(problem.batch):
            for head in range(problem.query_heads):
                for start in range(0, problem.tokens, self._tile):
                    self._attend(batch, head, start)

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


class StreamCqsa(FromHostMemory):
    """The Stream-CQSA package of the method's authors. It streams from host memory, with the least memory."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._forward = import_module("stream_cqsa").stream_cqsa_forward
        try:
            self.name = f"stream_cqsa {version('stream_cqsa')}"
        except PackageNotFoundError:
            self.name = "stream_cqsa"

    def _compute(self) -> None:
        inputs = self._inputs
        options = {"min_itr": 1, "stream_from_host": True, "low_memory": True, "out_device": "acc"}
        self._out, _ = self._forward(inputs.q, inputs.k, inputs.v, causal=inputs.problem.mask.triangular, **options)


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
