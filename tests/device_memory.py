"""What torch would hold of a GPU's memory, where there is none: tensors without content, and a model of its allocator."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretend import Event, Stream
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oocattn import Plan
from oocattn.division.base import Block
from oocattn.kernels.cuda import launch, listing, merging, parts
from oocattn.kernels.reductions import base
from oocattn.kernels.state import AttentionState
from oocattn.operations import make_operation
from oocattn.operations.base import SummedBlock
from oocattn.operations.staging import StagedRows, stage_rows
from oocattn.operations.tiles import pieces
from oocattn.pipelines.lane import cuda_memory
from oocattn.pipelines.lane.cuda_memory import TileRows, take_device_memory
from oocattn.pipelines.lane.memory import Arena
from oocattn.planning import kernel_rates, measure
from oocattn.problem.problem import Problem
from oocattn.units import round_up

MIB = 1 << 20
META = torch.device("meta")
"""Tensors on it have sizes, and take nothing."""


@dataclass
class _Block:
    """Bytes of a segment."""

    size: int
    used: bool = False


class CachingAllocator:
    """c10/cuda/CUDACachingAllocator.cpp: segments by stream and size, of which the best fitting block is cut."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        """The current one; None is the default stream."""
        self.reserved = self.most_reserved = 0
        self._segments: dict[object, list[list[_Block]]] = defaultdict(list)

    def allocate(self, nbytes: int) -> tuple[list[_Block], _Block]:
        """The segment and the block of a tensor of so many bytes, more than 0."""
        size = round_up(nbytes, 512)
        small = size <= MIB
        segments = self._segments[self.stream, small]
        free = [(block.size, number) for number, each in enumerate(segments) for block in each if not block.used]
        fitting = [each for each in free if each[0] >= size]
        if not fitting:
            whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else round_up(size, 2 * MIB)
            segments.append([_Block(whole)])
            self.reserved += whole
            self.most_reserved = max(self.reserved, self.most_reserved)
            fitting = [(whole, len(segments) - 1)]
        best, number = min(fitting)
        segment = segments[number]
        place = next(place for place, block in enumerate(segment) if not block.used and block.size == best)
        block, rest = segment[place], best - size
        block.used = True
        if rest >= 512 if small else rest > MIB:
            block.size = size
            segment.insert(place + 1, _Block(rest))
        return segment, block

    def free(self, segment: list[_Block], block: _Block) -> None:
        """Give a block back to its segment, which stays."""
        block.used = False
        joined: list[_Block] = []
        for each in segment:
            if joined and not joined[-1].used and not each.used:
                joined[-1].size += each.size
            else:
                joined.append(each)
        segment[:] = joined


class Recording(TorchDispatchMode):
    """Has an allocator hold the tensors on META that are made inside, until they are let go."""

    def __init__(self, allocator: CachingAllocator) -> None:
        super().__init__()
        self._allocator = allocator
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                self._hold(tensor.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known and storage.nbytes():
            self._known.add(storage)
            weakref.finalize(storage, self._allocator.free, *self._allocator.allocate(storage.nbytes()))


class _Torch:
    """torch, with META for every GPU, whose streams are those that an allocator knows."""

    def __init__(self, allocator: CachingAllocator) -> None:
        @contextmanager
        def stream(of: Stream) -> Iterator[None]:
            before, allocator.stream = allocator.stream, of
            yield
            allocator.stream = before

        nothing = lambda *_: None  # noqa: E731
        self.cuda = SimpleNamespace(Event=Event, Stream=Stream, stream=stream, empty_cache=nothing, synchronize=nothing)
        self.cuda.device = nullcontext

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: str) -> torch.device:
        return META

    def Generator(self, where: torch.device) -> None:  # noqa: N802
        """torch's own one draws the numbers, which nobody sees."""


@contextmanager
def a_gpu_of_sizes() -> Iterator[CachingAllocator]:
    """While inside, tensors on META are those of a GPU, on which our own kernels are launched without effect."""
    allocator = CachingAllocator()
    nothing = SimpleNamespace(launch=lambda *_, **__: None)
    with pytest.MonkeyPatch.context() as patch, Recording(allocator):
        for module in (cuda_memory, kernel_rates, measure):
            patch.setattr(module, "torch", _Torch(allocator))
        patch.setattr(launch, "tensor_map", lambda *_: None)
        patch.setattr(launch, "_multiprocessors", lambda _: 132)
        for module, program in ((launch, "program_for"), (listing, "_program"), (parts, "_program"), (merging, "_program")):
            patch.setattr(module, program, lambda *_: nothing)
        patch.setattr("oocattn.kernels.merging._fused", lambda tensor: merging)
        patch.setitem(base._MERGED, "meta", base._MERGED["cuda"])
        yield allocator


def measured(kernel: str, problem: Problem) -> tuple[int, int]:
    """What a kernel's rate is measured in for a problem, at most, and what the plan says of it; in bytes."""
    with a_gpu_of_sizes() as allocator, pytest.MonkeyPatch.context() as patch:
        sample = kernel_rates.Sample.of(problem)
        patch.setattr(measure, "release_cached_memory", lambda _: None)
        kernel_rates._time_launches(kernel, sample, *measure.cuda_sample(kernel, problem.dtype), META, 0.0)
        measure._launch_everything(kernel, sample, META)
        patch.setattr(measure, "kernel_rate", lambda *_, **__: 1.0)
        return allocator.most_reserved, measure._gpu_rate(kernel, problem, 2048, 1)[1]


class SizedLane:
    """The device memory of a lane, and the calls in which it takes more; see `CudaDevice`."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._operation = plan, make_operation(plan)
        self._compute, self._back = Stream(), Stream()
        self._buffers = take_device_memory(META, self._compute, plan, TileRows(META, plan.tiles.query))

    def attend(self, head_group: int, index: int) -> None:
        """Compute a subproblem, and merge its partials."""
        division = self._plan.division_of(head_group)
        staged = stage_rows(self._plan, head_group, division.subproblem(index))
        for block in division.subproblem(index).blocks:
            sums = self._begin_sums(head_group, block, staged)
            first = division.contributors(block.query_chunk)[0] == index
            for rows in pieces(self._plan.query_rows(block.query_chunk), self._plan.tiles.query):
                state = self._attend(head_group, block, staged, rows, sums)
                if self._plan.partials == "disk" or not first:
                    self._merge(state)

    def _begin_sums(self, head_group: int, block: Block, staged: StagedRows) -> SummedBlock | None:
        if not self._plan.totals_bytes:
            return None
        memory = self._buffers.totals.acquire(self._compute).buffer
        with cuda_memory.torch.cuda.stream(self._compute):
            return self._operation.begin_sums(head_group, block, staged, Arena(memory).take)

    def _attend(
        self, head_group: int, block: Block, staged: StagedRows, rows: range, sums: SummedBlock | None
    ) -> AttentionState:
        group, operation = self._plan.problem.head_group(head_group), self._operation
        heads = len(group.query_heads)
        state = self._buffers.states.acquire(self._compute).buffer.heads(0, heads).rows(0, len(rows))
        buffers = self._buffers.queries.acquire(self._compute).buffer
        query = [
            _cut(buffer, source.shape(heads, len(rows)))
            for buffer, source in zip(buffers, operation.query_inputs, strict=True)
        ]
        for tile in operation.tiles(head_group, block, staged, rows, self._plan.tiles.key):
            of_keys = self._buffers.keys.acquire(self._compute).buffer
            key = [
                _cut(buffer, source.shape(len(operation.heads(source.name, group)), len(tile.keys)))
                for buffer, source in zip(of_keys, operation.key_inputs, strict=True)
            ]
            with cuda_memory.torch.cuda.stream(self._compute):
                operation.compute(head_group, tile, query, key, state, None, sums)
        return state

    def _merge(self, state: AttentionState) -> None:
        """Merge a state, as if it came from another subproblem, by as many rows as the lane does."""
        heads, rows = state.den.shape
        into = self._buffers.merged[0].heads(0, heads)
        with cuda_memory.torch.cuda.stream(self._back):
            for part in pieces(range(rows), len(into.keys)):
                self._operation.merge(into.rows(0, len(part)), state.rows(part.start, part.stop))


def _cut(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return buffer[: math.prod(shape)].view(shape)
