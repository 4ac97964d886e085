"""A lane's device that is an NVIDIA GPU, fed from pinned host memory.

A staged subproblem is worked through in tiles (`tiles.py`) on three streams, which only wait for each other's events (a
fourth merges partials from disk and divides chunks):

    copy     query tiles, and key tiles one after another, to the device
    compute  the kernel, which adds to the tile's float32 state
    back     the tile's partial to the host or, where its chunk has earlier partials, those to the device first, one
             fused merge, and the sum back

A launch enqueues all of this for a subproblem. The next one is launched behind it, so two are in flight.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from oocattn import clock
from oocattn.division.base import Block
from oocattn.kernels.cuda.device import launcher, release_cached_memory
from oocattn.kernels.state import AttentionState
from oocattn.operations import Operation
from oocattn.operations.base import SummedBlock
from oocattn.operations.tiles import Tile, pieces
from oocattn.pipelines.failing import naming_subproblem
from oocattn.pipelines.lane.cuda_memory import (
    PinnedMemory,
    TileRows,
    close_all,
    copy_heads,
    copy_state,
    pinning,
    take_device_memory,
)
from oocattn.pipelines.lane.device import Health
from oocattn.pipelines.lane.device_time import DeviceClock, Stretch, record_event
from oocattn.pipelines.lane.finisher import Finisher
from oocattn.pipelines.lane.memory import Arena
from oocattn.pipelines.lane.partials.store import Destination, PartialStore
from oocattn.pipelines.lane.returning import ReturningTiles
from oocattn.pipelines.lane.stager import StagedChunks
from oocattn.pipelines.lane.switching import hold_short_interval
from oocattn.pipelines.watch.events import Attended, Resource
from oocattn.planning.memory import PARTIAL_BUFFERS, READERS
from oocattn.planning.plan import Plan

AHEAD = 32  # key tiles enqueued ahead: where CUDA's queue is full, the driver blocks all


@dataclass
class _Launch:
    """One subproblem on the device: what was enqueued and has not come back."""

    staged: StagedChunks
    partials: PartialStore
    start: float
    halvings: int
    coming_back: int = 0  # query chunks whose partials have not been handed over
    stretches: list[Stretch] = field(default_factory=list)
    pairs: int = 0
    partial_bytes: int = 0


class CudaDevice:
    """One GPU. Implements Device. Raises BudgetError where it has no room even for the smallest tiles."""

    readers = READERS["cuda"]
    cores = 1  # of all GPUs together there are dozens of threads that finish chunks, on the cores that launch

    def __init__(self, name: str, plan: Plan, operation: Operation, health: Health) -> None:
        self._device = torch.device(name)
        self._plan = plan
        self._operation = operation
        self._health = health
        self.allocator, self.launcher = pinning(self._device), launcher(self._device)
        self.tile_rows = TileRows(self._device, plan.tiles.query)
        self._pinned: list[PinnedMemory] = []
        with torch.cuda.device(self._device):
            self._copy, self._compute = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
            # Small kernels go first where a block of the large one ends, or they would wait for all that is enqueued.
            self._back, self._merge_stream = (torch.cuda.Stream(self._device, priority=-1) for _ in range(2))
            self._buffers = take_device_memory(self._device, self._compute, plan, self.tile_rows)
            self._clock = DeviceClock(self._compute)
        self._ahead: deque[tuple[torch.cuda.Event, int]] = deque()
        """The end of each key tile that is ahead, and its pairs of all heads."""
        self._coming_back: deque[tuple[_Launch, int, torch.cuda.Event, SummedBlock | None]] = deque()
        """Query chunks in flight, the event after which each is on the host, and what is summed over its rows."""
        self._handing_over = threading.Lock()
        self._end_short_interval = hold_short_interval(self)

    def allocate(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):
            self._pinned.append(PinnedMemory(nbytes))
        return self._pinned[-1].tensor

    def merge(self, into: AttentionState, state: AttentionState) -> None:
        heads, rows = state.den.shape
        first, second = (merged.heads(0, heads).rows(0, rows) for merged in self._buffers.merged)
        with torch.cuda.device(self._device), torch.cuda.stream(self._merge_stream):
            copy_state(first, into)
            copy_state(second, state)
            self._operation.merge(first, second)
            copy_state(into, first)
            done = record_event(self._merge_stream)
        done.synchronize()
        self._health.copied(into.nbytes + state.nbytes, into.nbytes)

    def finalise(self, head_group: int, head: int, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        buffers = self._buffers
        with torch.cuda.device(self._device), torch.cuda.stream(self._merge_stream):
            for block in pieces(range(len(state.keys)), len(buffers.finalised.keys)):
                rows = slice(block.start, block.stop)
                on_device = buffers.finalised.rows(0, len(block))
                on_device_out, on_device_lse = buffers.out[:, : len(block)], buffers.lse[:, : len(block)]
                copy_state(on_device, state.rows(block.start, block.stop))
                self._operation.finalise(head_group, head, on_device, on_device_out, on_device_lse)
                out[0, rows].copy_(on_device_out[0], non_blocking=True)
                lse[0, rows].copy_(on_device_lse[0], non_blocking=True)
            done = record_event(self._merge_stream)
        done.synchronize()
        self._health.copied(state.nbytes, out.nbytes + lse.nbytes)
        self._health.step()

    def close(self) -> None:
        self._end_short_interval()
        try:
            for stream in (self._copy, self._compute, self._back, self._merge_stream):
                stream.synchronize()
        finally:
            self._coming_back.clear()
            self._ahead.clear()
            del self._buffers, self._clock  # or torch would keep their memory in its cache
            release_cached_memory(self._device)
            # Last, for the driver does one thing at a time: 20 ms a GiB, for which no result need wait.
            pinned, self._pinned = self._pinned, []
            self.allocator.submit(close_all, pinned)

    def launch(self, staged: StagedChunks, partials: PartialStore, finisher: Finisher) -> Callable[[], Attended]:
        launch = _Launch(staged, partials, clock.now(), self.tile_rows.take_halvings())
        with torch.cuda.device(self._device):
            for block in staged.blocks:
                self._launch_chunk(launch, block, finisher)
        return partial(self._finish, launch)

    def _finish(self, launch: _Launch) -> Attended:
        """Wait until all partials of a subproblem have been handed over."""
        self._hand_over_while(lambda: launch.coming_back > 0)
        return Attended(
            start=launch.start,
            stop=clock.now(),
            head_group=launch.staged.head_group,
            index=launch.staged.index,
            pairs=launch.pairs,
            partial_bytes=launch.partial_bytes,
            out_of_memory=launch.halvings,
            spans=self._clock.spans(launch.stretches),
        )

    def _launch_chunk(self, launch: _Launch, block: Block, finisher: Finisher) -> None:
        """Enqueue a query chunk's partial and its copy back; the last one's is finished."""
        staged, chunk = launch.staged, block.query_chunk
        self._hand_over_while(lambda: self._must_come_back(launch, chunk))  # only this thread adds to what comes back
        destination = launch.partials.begin(staged.head_group, chunk, staged.index, staged.not_finite[chunk])
        launch.coming_back += 1
        tiles = ReturningTiles()
        last = self._plan.division_of(staged.head_group).contributors(chunk)[-1] == staged.index
        with tiles.all():
            if last and self._plan.partials == "memory":  # while later tiles are computed, those before are written
                finisher.begin(staged.head_group, chunk, tiles.rows())
            sums = self._launch_tiles(launch, block, destination, tiles)
        self._coming_back.append((launch, chunk, tiles.last, sums))

    def _must_come_back(self, launch: _Launch, chunk: int) -> bool:
        """True if earlier partials of a chunk must come first: for buffers, or a save."""
        on_disk = self._plan.partials == "disk"
        if (on_disk or self._plan.totals_bytes) and len(self._coming_back) == PARTIAL_BUFFERS["cuda"]:
            return True
        return not on_disk and bool(self._coming_back) and launch.partials.save_pending(launch.staged.head_group, chunk)

    def _hand_over_while(self, due: Callable[[], bool]) -> None:
        """Hand partials over, the oldest first, while due; other threads may, too."""
        while due():
            with self._handing_over, self._health.reraise_first_failure():
                if due():
                    self._hand_over_oldest()

    def _hand_over_oldest(self) -> None:
        """Wait until the oldest partial in flight is on the host, and hand it over."""
        launch, chunk, returned, sums = self._coming_back[0]
        head_group, index = launch.staged.head_group, launch.staged.index
        with naming_subproblem(head_group, index):
            returned.synchronize()
            with torch.cuda.stream(self._merge_stream):
                arrays = [] if sums is None else sums.arrays
            launch.partial_bytes += launch.partials.end(head_group, chunk, index, arrays)
        self._health.step()
        launch.coming_back -= 1
        self._coming_back.popleft()

    def _begin_sums(self, launch: _Launch, block: Block) -> tuple[torch.Tensor, SummedBlock | None]:
        """What is summed over the rows of a block, and the memory in which it is; the one before last is handed over."""
        staged = launch.staged
        if not self._plan.totals_bytes:
            return self._buffers.kept_totals, None
        with torch.cuda.stream(self._compute):
            memory = self._buffers.totals.acquire(self._compute).buffer
            return memory, self._operation.begin_sums(staged.head_group, block, staged.rows, Arena(memory).take)

    def _launch_tiles(
        self, launch: _Launch, block: Block, destination: Destination, tiles: ReturningTiles
    ) -> SummedBlock | None:
        """Enqueue a query chunk tile by tile, again with half the rows if memory is short; return what it sums over them."""
        rows = launch.staged.queries[block.query_chunk][0].shape[1]
        memory, sums = self._begin_sums(launch, block)
        first = 0
        while first < rows:
            tile = range(first, min(first + self.tile_rows.count, rows))
            self._copy_totals(self._buffers.kept_totals, memory)
            try:
                tiles.add(tile.stop, self._launch_tile(launch, block, tile, destination, sums))
                first = tile.stop
                self._health.step()  # the device works off what was enqueued: only so much waits there
            except torch.OutOfMemoryError as error:
                self._copy_totals(memory, self._buffers.kept_totals)  # without what the tile has added
                self.tile_rows.halve(error)
                launch.halvings += self.tile_rows.take_halvings()
        return sums

    def _copy_totals(self, into: torch.Tensor, memory: torch.Tensor) -> None:
        if len(memory):
            with torch.cuda.stream(self._compute):
                into.copy_(memory)

    def _launch_tile(
        self, launch: _Launch, block: Block, tile: range, destination: Destination, sums: SummedBlock | None
    ) -> torch.cuda.Event:
        """Enqueue query rows `tile`, their keys and the way back; return its event."""
        slot = self._buffers.queries.acquire(self._copy)
        given = [tensor[:, tile.start : tile.stop] for tensor in launch.staged.queries[block.query_chunk]]
        query = [buffer[: tensor.numel()].view(tensor.shape) for buffer, tensor in zip(slot.buffer, given, strict=True)]
        group_size = len(given[0])
        loaded = self._load(launch, query, given)
        pairs = 0
        try:
            with torch.cuda.stream(self._compute):
                self._compute.wait_event(loaded)
                state_slot = self._buffers.states.acquire(self._compute)
                state = state_slot.buffer.heads(0, group_size).rows(0, len(tile))
                state.reset()
            staged, first = launch.staged, self._plan.query_rows(block.query_chunk).start
            rows = range(first + tile.start, first + tile.stop)
            for keys in self._operation.tiles(staged.head_group, block, staged.rows, rows, self._plan.tiles.key):
                self._attend_keys(launch, query, keys, state, sums)
                pairs += keys.pairs
        finally:  # also what was launched before an error reads the slot
            slot.freed = attended = record_event(self._compute)
        launch.pairs += pairs * group_size
        host = destination.state.rows(tile.start, tile.stop)
        returned = self._bring_back(launch, state, Destination(host, destination.merged), attended)
        state_slot.freed = returned
        return returned

    def _load(self, launch: _Launch, on_device: Iterable[torch.Tensor], staged: Iterable[torch.Tensor]) -> torch.cuda.Event:
        """Enqueue copies of tensors [heads, ...] to the device; return the event after them."""
        with torch.cuda.stream(self._copy), self._timed(launch, "copy in", self._copy):
            for into, source in zip(on_device, staged, strict=True):
                copy_heads(into, source)
                self._health.copied(to_device=source.nbytes)
        return launch.stretches[-1].stop

    def _attend_keys(
        self, launch: _Launch, query: list[torch.Tensor], tile: Tile, state: AttentionState, sums: SummedBlock | None
    ) -> None:
        """Enqueue the copy of a key tile and the kernel's call on it."""
        if len(self._ahead) == AHEAD:
            ended, attended = self._ahead.popleft()
            ended.synchronize()
            self._health.attended(attended)
        slot = self._buffers.keys.acquire(self._copy)
        staged = [tensor[:, tile.keys.start : tile.keys.stop] for tensor in launch.staged.keys]
        keys = [buffer[: tensor.numel()].view(tensor.shape) for buffer, tensor in zip(slot.buffer, staged, strict=True)]
        copied = self._load(launch, keys, staged)
        self._compute.wait_event(copied)
        try:
            with torch.cuda.stream(self._compute), self._timed(launch, "compute", self._compute):
                self._operation.compute(launch.staged.head_group, tile, query, keys, state, None, sums)
        finally:
            slot.freed = done = launch.stretches[-1].stop
            self._ahead.append((done, tile.pairs * len(query[0])))

    def _bring_back(
        self, launch: _Launch, state: AttentionState, destination: Destination, attended: torch.cuda.Event
    ) -> torch.cuda.Event:
        """Enqueue the copy of a tile's state to the host, merged with earlier partials of its chunk; return its end."""
        host, source = destination.state, state
        with torch.cuda.stream(self._back):
            if destination.merged:
                source = self._buffers.merged[0].heads(0, len(host.num)).rows(0, len(host.keys))
                with self._timed(launch, "copy in", self._back):
                    copy_state(source, host)
                    self._health.copied(to_device=host.nbytes)
            self._back.wait_event(attended)
            if destination.merged:
                with self._timed(launch, "merge", self._back):
                    self._operation.merge(source, state)
            with self._timed(launch, "copy out", self._back):
                copy_state(host, source)
                self._health.copied(from_device=host.nbytes)
        return launch.stretches[-1].stop

    @contextmanager
    def _timed(self, launch: _Launch, resource: Resource, stream: torch.cuda.Stream) -> Iterator[None]:
        """Time what is enqueued inside: afterwards it is the last stretch of the launch."""
        start = record_event(stream)
        try:
            yield
        finally:  # also what was launched before an error uses its slots
            launch.stretches.append(Stretch(resource, start, record_event(stream)))
