"""The CUDA lane: an NVIDIA GPU fed from pinned host memory, so that its kernel never waits.

A staged subproblem is worked through in tiles (`tiles.py`) on three streams, which only wait for each other's events (a
fourth merges partials from disk and finalises chunks):

    copy     query tiles, and key tiles one after another, to the device
    compute  the kernel, which adds to the tile's float32 state
    back     the tile's partial to the host or, where its chunk has earlier partials, those to the device first, one
             fused merge, and the sum back

A task has all of this enqueued for its subproblem, by the one thread that launches, and then waits until the partials
have come back; meanwhile the next subproblem's task has its own enqueued behind it. So two are in flight.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from oocattn import clock
from oocattn.division.base import Block
from oocattn.errors import BudgetError
from oocattn.kernels import AttentionState, finalise, get_kernel, merge
from oocattn.kernels.cuda.device import launcher, release_cached_memory
from oocattn.pipelines.failing import naming_subproblem
from oocattn.pipelines.lane.device_time import DeviceClock, Stretch, recorded
from oocattn.pipelines.lane.lane import Job, Lane, StagedChunks
from oocattn.pipelines.lane.memory import Arena, PinnedMemory, close_all, pinning
from oocattn.pipelines.lane.partials.store import Destination
from oocattn.pipelines.lane.tiles import KeyTile, key_tiles, pieces
from oocattn.pipelines.watch.events import Attended, Resource
from oocattn.planning.memory import (
    FINALISED_ROWS,
    KEY_SLOTS,
    PARTIAL_BLOCK_ROWS,
    PARTIAL_BUFFERS,
    QUERY_SLOTS,
    SEGMENT,
    Tiles,
    device_arena_bytes,
)

READERS = 8
"""Threads that read: 28 GB/s from the page cache were measured with 8, 6 with one (16 cores)."""

AHEAD = 32
"""Key tiles that are enqueued ahead of the device. Where CUDA's own queue is full, it is the driver that waits, and with it
every other thread that asks it for something."""

SMALLEST_TILE = 128
"""Query rows below which a tile is not halved any more when the device is out of memory."""

SWITCH_INTERVAL = 5e-4
"""Seconds after which a thread of the process lets another run, instead of Python's 5e-3, while there is such a lane: the
thread that enqueues needs its turn before the device runs dry. (1M tokens x 8 heads: the gaps fell from 53 to 22 ms.)"""

logger = logging.getLogger("oocattn")


@dataclass
class _Work:
    """One subproblem on the device: what was enqueued and has not come back."""

    staged: StagedChunks
    coming_back: int = 0  # query chunks whose partials have not been handed over
    stretches: list[Stretch] = field(default_factory=list)
    pairs: int = 0
    partial_bytes: int = 0
    halved: int = 0


@dataclass(frozen=True)
class _TileBack:
    """The row of its chunk up to which a tile goes, and the event after which its partial is in host memory."""

    stop: int
    returned: torch.cuda.Event


class CudaLane(Lane):
    """One GPU. Raises BudgetError where it has no room even for the smallest tiles."""

    def __init__(self, job: Job, device: str) -> None:
        self._device = torch.device(device)
        self._pinned: list[PinnedMemory] = []
        with torch.cuda.device(self._device):
            self._copy, self._compute = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
            # Small kernels go first where a block of the large one ends, or they would wait for all that is enqueued.
            self._back, self._merge_stream = (torch.cuda.Stream(self._device, priority=-1) for _ in range(2))
            self._tile_rows = job.plan.tiles.query
            self._halved = 0  # times since the last subproblem told
            self._take_device_memory(job)
            super().__init__(job, READERS, pinning(self._device))
            self._clock = DeviceClock(self._compute)
        _switch_often(1)
        self._finishing = threading.Lock()
        self._turn = 0
        self._works: dict[int, _Work] = {}
        self._coming_back: deque[tuple[_Work, int, torch.cuda.Event]] = deque()
        """Query chunks whose partials are on their way, and the event after which each is in host memory."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):
            self._pinned.append(PinnedMemory(nbytes))
        return self._pinned[-1].tensor

    def _take_device_memory(self, job: Job) -> None:
        """Take all device memory at once; with smaller tiles where it is not there any more."""
        plan, problem = job.plan, job.plan.problem
        dtype = getattr(torch, problem.dtype)
        while True:
            tiles = Tiles(self._tile_rows, plan.tiles.key)
            nbytes = device_arena_bytes(problem, tiles, plan.partials)
            scratch = get_kernel(plan.kernel).scratch_bytes(
                problem.group_size, tiles.query, tiles.key, problem.head_dim, problem.dtype, plan.threads
            )
            try:
                with torch.cuda.stream(self._compute):  # one segment, of which the results of all calls are cut
                    torch.empty(max(0, scratch - SEGMENT), dtype=torch.uint8, device=self._device)
                memory = Arena(torch.empty(nbytes, dtype=torch.uint8, device=self._device))
                break
            except torch.OutOfMemoryError as error:
                self._halve(error)
        group, dim = problem.group_size, problem.head_dim
        self._queries = [memory.take((group * tiles.query, dim), dtype) for _ in range(QUERY_SLOTS)]
        self._states = [memory.partial(group, tiles.query, dim) for _ in range(QUERY_SLOTS)]
        self._keys = [memory.take((2, tiles.key, dim), dtype) for _ in range(KEY_SLOTS)]
        merging = [tiles.query] if plan.partials == "memory" else 2 * [PARTIAL_BLOCK_ROWS]
        self._finalised = memory.partial(1, FINALISED_ROWS, dim)
        self._out_block = memory.take((1, FINALISED_ROWS, dim), getattr(torch, problem.out_dtype))
        self._lse_block = memory.take((1, FINALISED_ROWS), torch.float32)
        self._merge_states = [memory.partial(group, rows, dim) for rows in merging]
        # What must have happened before a slot is used again: None at first.
        self._query_free: list[torch.cuda.Event | None] = [None] * QUERY_SLOTS
        self._state_free: list[torch.cuda.Event | None] = [None] * QUERY_SLOTS
        self._key_free: list[torch.cuda.Event | None] = [None] * KEY_SLOTS
        self._tile_count = self._key_count = 0
        self._ahead: deque[torch.cuda.Event] = deque()

    def close(self) -> None:
        super().close()
        _switch_often(-1)
        try:
            for stream in (self._copy, self._compute, self._back, self._merge_stream):
                stream.synchronize()
        finally:
            del self._queries, self._states, self._keys, self._merge_states
            del self._finalised, self._out_block, self._lse_block
            del self._query_free, self._state_free, self._key_free, self._ahead, self._clock
            release_cached_memory(self._device)
            # Last, for the driver does one thing at a time, be it to forget an event: 20 ms a GiB, for which no result
            # need wait.
            pinning(self._device).submit(close_all, self._pinned)

    def compute(self, turn: int) -> Attended:
        start = clock.now()
        launcher(self._device).submit(self._enqueue_until, turn).result()
        work = self._works.pop(turn)
        while work.coming_back:
            with self._finishing, self.telling_the_first_error():
                if work.coming_back:
                    self._finish_chunk()
        spans = self._clock.spans(work.stretches)
        return Attended(
            start=start,
            stop=clock.now(),
            head_group=work.staged.head_group,
            index=work.staged.subproblem.index,
            pairs=work.pairs,
            partial_bytes=work.partial_bytes,
            out_of_memory=work.halved,
            spans=spans,
        )

    def _enqueue_until(self, turn: int) -> None:
        """Enqueue what was staged up to this turn, in order."""
        with torch.cuda.device(self._device), self.telling_the_first_error():
            while self._turn <= turn:
                work = self._works[self._turn] = _Work(self._staged.pop(self._turn), halved=self._halved)
                self._halved = 0
                self._turn += 1
                with naming_subproblem(work.staged.head_group, work.staged.subproblem.index):
                    self._enqueue(work)

    def _enqueue(self, work: _Work) -> None:
        """Enqueue a whole subproblem. With partials on disk this waits for buffers that are still being written."""
        staged = work.staged
        for block in staged.subproblem.blocks:
            if block.query_chunk not in staged.queries:
                continue  # beyond the last token, or not wanted
            while self._must_come_back(staged.head_group, block.query_chunk):  # only this thread adds to what does
                with self._finishing, self.telling_the_first_error():
                    if self._must_come_back(staged.head_group, block.query_chunk):
                        self._finish_chunk()
            not_finite = staged.not_finite[block.query_chunk]
            destination = self.partials.begin(staged.head_group, block.query_chunk, staged.subproblem.index, not_finite)
            work.coming_back += 1
            tiles = self._enqueue_chunk(work, block, destination)
            self._coming_back.append((work, block.query_chunk, tiles[-1].returned))
            last = self.plan.division.contributors(block.query_chunk)[-1] == staged.subproblem.index
            if last and self.plan.partials == "memory":
                self.finisher.begin(staged.head_group, block.query_chunk, _whole(tiles))

    def _must_come_back(self, head_group: int, chunk: int) -> bool:
        """Whether a partial of a chunk has to wait for those before it: for their buffers, or because a save waits for
        them."""
        if self.plan.partials == "disk":
            return len(self._coming_back) == PARTIAL_BUFFERS["cuda"]
        return bool(self._coming_back) and self.partials.awaited(head_group, chunk)

    def _finish_chunk(self) -> None:
        """Wait until the oldest partial that was begun is in host memory, and hand it over."""
        work, chunk, returned = self._coming_back[0]
        head_group, index = work.staged.head_group, work.staged.subproblem.index
        with naming_subproblem(head_group, index):
            returned.synchronize()
            work.partial_bytes += self.partials.end(head_group, chunk, index)
        self.step()
        work.coming_back -= 1
        self._coming_back.popleft()

    def _enqueue_chunk(self, work: _Work, block: Block, destination: Destination) -> list[_TileBack]:
        """Enqueue one query chunk tile by tile; a tile for which the device has no memory is begun again with half of it."""
        rows = work.staged.queries[block.query_chunk].shape[1]
        tiles: list[_TileBack] = []
        while not tiles or tiles[-1].stop < rows:
            first = tiles[-1].stop if tiles else 0
            tile = range(first, min(first + self._tile_rows, rows))
            try:
                tiles.append(_TileBack(tile.stop, self._enqueue_tile(work, block, tile, destination)))
                self.step()  # the device works off what was enqueued: only so much waits there
            except torch.OutOfMemoryError as error:
                self._halve(error)
                work.halved, self._halved = work.halved + self._halved, 0
        return tiles

    def _enqueue_tile(self, work: _Work, block: Block, tile: range, destination: Destination) -> torch.cuda.Event:
        """Enqueue the query rows `tile` of a chunk, their keys and the way back; return the event after it."""
        slot = self._tile_count % QUERY_SLOTS
        self._tile_count += 1
        query, loaded = self._load_query(work, block.query_chunk, tile, slot)
        state = self._states[slot].rows(0, len(tile))
        pairs = 0
        try:
            with torch.cuda.stream(self._compute):
                self._compute.wait_event(loaded)
                _wait(self._compute, self._state_free[slot])
                state.reset()
            sizes = self.plan.tiles.key, self.plan.problem.causal
            for keys in key_tiles(block, work.staged.key_rows, tile, *sizes):
                self._attend_keys(work, query, keys, state)
                pairs += keys.pairs
        finally:  # also what was launched before an error reads the slot
            self._query_free[slot] = attended = recorded(self._compute)
        work.pairs += pairs * self.plan.problem.group_size
        self._state_free[slot] = returned = self._bring_back(work, state, tile, destination, attended)
        return returned

    def _load_query(self, work: _Work, chunk: int, tile: range, slot: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Enqueue the copy of a query tile [g, n, D]; return it and the event after which it is there."""
        heads = work.staged.queries[chunk][:, tile.start : tile.stop]
        query = self._queries[slot][: heads.shape[0] * heads.shape[1]].view(heads.shape)
        _wait(self._copy, self._query_free[slot])
        with torch.cuda.stream(self._copy), self._timed(work, "copy in", self._copy) as stretch:
            for on_device, staged in zip(query, heads, strict=True):
                on_device.copy_(staged, non_blocking=True)
        return query, stretch.stop

    def _attend_keys(self, work: _Work, query: torch.Tensor, tile: KeyTile, state: AttentionState) -> None:
        """Enqueue the copy of a key tile and the kernel calls on it."""
        if len(self._ahead) == AHEAD:
            self._ahead.popleft().synchronize()
        slot = self._key_count % KEY_SLOTS
        self._key_count += 1
        keys = slice(tile.keys.start, tile.keys.stop)
        key, value = self._keys[slot][:, : len(tile.keys)]
        _wait(self._copy, self._key_free[slot])
        with torch.cuda.stream(self._copy), self._timed(work, "copy in", self._copy) as copied:
            key.copy_(work.staged.key[keys], non_blocking=True)
            value.copy_(work.staged.value[keys], non_blocking=True)
        self._compute.wait_event(copied.stop)
        try:
            with torch.cuda.stream(self._compute), self._timed(work, "compute", self._compute):
                for call in tile.calls:
                    rows = slice(call.rows.start, call.rows.stop)
                    part = state.rows(call.rows.start, call.rows.stop)
                    scale = self.plan.problem.scale
                    self.kernel.attend(query[:, rows], key, value, part, scale=scale, diagonal=call.diagonal)
        finally:
            self._key_free[slot] = done = recorded(self._compute)
            self._ahead.append(done)

    def _bring_back(
        self, work: _Work, state: AttentionState, tile: range, destination: Destination, attended: torch.cuda.Event
    ) -> torch.cuda.Event:
        """Enqueue the way of a tile's state to the host, through a merge where its chunk has earlier partials.

        Returns the event at its end.
        """
        host = destination.state.rows(tile.start, tile.stop)
        source = state
        with torch.cuda.stream(self._back):
            if destination.merged:
                source = self._merge_states[0].rows(0, len(tile))
                with self._timed(work, "copy in", self._back):
                    _copy(source, host)
            self._back.wait_event(attended)
            if destination.merged:
                with self._timed(work, "merge", self._back):
                    merge(source, state)
            with self._timed(work, "copy out", self._back) as stretch:
                _copy(host, source)
        return stretch.stop

    @contextmanager
    def _timed(self, work: _Work, resource: Resource, stream: torch.cuda.Stream) -> Iterator[_Timed]:
        """Time what is enqueued inside; afterwards `stop` is the event at its end."""
        timed = _Timed()
        start = recorded(stream)
        yield timed
        timed.stop = recorded(stream)
        work.stretches.append(Stretch(resource, start, timed.stop))

    def merge_states(self, into: AttentionState, partial: AttentionState) -> None:
        """Merge on the device: both are copied there, and the sum back."""
        rows = len(partial.keys)
        first, second = (state.rows(0, rows) for state in self._merge_states)
        with torch.cuda.device(self._device), torch.cuda.stream(self._merge_stream):
            _copy(first, into)
            _copy(second, partial)
            merge(first, second)
            _copy(into, first)
            done = recorded(self._merge_stream)
        done.synchronize()

    def finalise(self, state: AttentionState, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Divide on the device, block by block through one buffer: copied there, divided and copied back."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._merge_stream):
            for block in pieces(range(len(state.keys)), FINALISED_ROWS):
                rows = slice(block.start, block.stop)
                on_device = self._finalised.rows(0, len(block))
                on_device_out, on_device_lse = self._out_block[:, : len(block)], self._lse_block[:, : len(block)]
                _copy(on_device, state.rows(block.start, block.stop))
                finalise(on_device, on_device_out, on_device_lse)
                out[0, rows].copy_(on_device_out[0], non_blocking=True)
                lse[0, rows].copy_(on_device_lse[0], non_blocking=True)
            done = recorded(self._merge_stream)
        done.synchronize()

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Go on with half the query rows to a tile: another process has taken memory that was free when it was planned."""
        if self._tile_rows < 2 * SMALLEST_TILE:
            raise BudgetError(
                f"{self._device} has no memory left even for tiles of {self._tile_rows} queries: free some, or lower "
                "--device-memory"
            ) from error
        self._tile_rows //= 2
        self._halved += 1
        torch.cuda.empty_cache()
        logger.warning("%s is out of memory: tiles of %d queries from here on", self._device, self._tile_rows)


_switching = threading.Lock()
_lanes, _usual_interval = 0, 0.0


def _switch_often(lanes: int) -> None:
    """Count the lanes of this process, and have its threads take turns often while there are any."""
    global _lanes, _usual_interval
    with _switching:
        if not _lanes:
            _usual_interval = sys.getswitchinterval()
        _lanes += lanes
        sys.setswitchinterval(min(SWITCH_INTERVAL, _usual_interval) if _lanes else _usual_interval)


@dataclass
class _Timed:
    stop: torch.cuda.Event = field(init=False)


def _whole(tiles: Iterable[_TileBack]) -> Iterator[int]:
    """Up to which row a chunk is in host memory, as its tiles come back."""
    for tile in tiles:
        tile.returned.synchronize()
        yield tile.stop


def _wait(stream: torch.cuda.Stream, event: torch.cuda.Event | None) -> None:
    if event is not None:
        stream.wait_event(event)


def _copy(into: AttentionState, state: AttentionState) -> None:
    """Copy a state between host and device on the current stream, in contiguous pieces: a strided copy would block."""
    for target, source in ((into.num, state.num), (into.den, state.den), (into.max, state.max)):
        for target_head, source_head in zip(target, source, strict=True):
            target_head.copy_(source_head, non_blocking=True)
    into.keys.copy_(state.keys, non_blocking=True)
