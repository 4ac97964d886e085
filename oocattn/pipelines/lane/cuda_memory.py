"""Memory of a lane on a GPU: device buffers, and host memory pinned for it.

Huge pages, touched by several threads and then registered, are pinned at 15 GB/s (H200 host); CUDA's own allocator: 2.5.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Generic, TypeVar

import numpy as np
import torch

from oocattn.errors import BudgetError
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.naming import named
from oocattn.pipelines.lane.memory import Arena
from oocattn.planning.layout import call_size
from oocattn.planning.memory import DevicePieces, Pieces, Tiles
from oocattn.planning.plan import Plan
from oocattn.threads import ThreadPool
from oocattn.units import format_bytes

SMALLEST_TILE = 128  # query rows below which a tile is not halved when the device is out of memory

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process
_TOUCHING_THREADS = 8

logger = logging.getLogger("oocattn")

T = TypeVar("T")


class TileRows:
    """Query rows of a tile on a device, halved each time that it is out of memory."""

    def __init__(self, device: torch.device, rows: int) -> None:
        self._device = device
        self.count = rows
        self._halvings = 0

    def halve(self, error: torch.OutOfMemoryError) -> None:
        """Halve the rows: another process has taken memory that the plan counted on."""
        if self.count < 2 * SMALLEST_TILE:
            raise BudgetError(
                f"{self._device} has no memory left even for tiles of {self.count} queries: free some, or lower "
                f"{named('device_memory')}"
            ) from error
        self.count //= 2
        self._halvings += 1
        torch.cuda.empty_cache()
        logger.warning("%s is out of memory; the run continues with tiles of %d queries", self._device, self.count)

    def take_halvings(self) -> int:
        """The number of halvings since the last call."""
        halvings, self._halvings = self._halvings, 0
        return halvings


@dataclass
class Slot(Generic[T]):
    """A buffer, and the event after which it may be overwritten; None if unused."""

    buffer: T
    freed: torch.cuda.Event | None = None


class SlotRing(Generic[T]):
    """Slots in the order of their use; the user of one sets the event that frees it."""

    def __init__(self, buffers: Iterable[T]) -> None:
        self._slots = cycle([Slot(buffer) for buffer in buffers])

    def acquire(self, stream: torch.cuda.Stream) -> Slot[T]:
        """The next slot; the stream waits from here on until it is free."""
        slot = next(self._slots)
        if slot.freed is not None:
            stream.wait_event(slot.freed)
        return slot


class DeviceBuffers:
    """Device memory of a lane: rings of query tiles, states and keys, and scratch; `pieces` cut of one allocation."""

    def __init__(self, memory: torch.Tensor, pieces: DevicePieces) -> None:
        arena = Arena(memory)

        def take(each: Pieces) -> tuple[torch.Tensor, ...]:
            return tuple(arena.take(piece.shape, getattr(torch, piece.dtype)) for piece in each)

        self.queries, self.keys = (SlotRing(list(map(take, slots))) for slots in (pieces.queries, pieces.keys))
        self.states = SlotRing([AttentionState(*take(state)) for state in pieces.states])
        self.finalised = AttentionState(*take(pieces.finalised))
        self.out, self.lse = take(pieces.divided)
        *slots, kept = take(pieces.totals) or (torch.empty(0, dtype=torch.uint8, device=memory.device),)
        self.totals, self.kept_totals = SlotRing[torch.Tensor](slots), kept
        self.merged = [AttentionState(*take(state)) for state in pieces.merged]


def take_device_memory(device: torch.device, compute: torch.cuda.Stream, plan: Plan, rows: TileRows) -> DeviceBuffers:
    """Take all device memory at once, with smaller tiles where it is short; BudgetError where none are small enough."""
    problem, kernel = plan.problem, get_kernel(plan.kernel)
    while True:
        tiles = Tiles(rows.count, plan.tiles.key)
        pieces = DevicePieces.of(problem, tiles, plan.partials, plan.totals_bytes)
        segment = kernel.segment_bytes(call_size(problem, tiles.query, tiles.key, plan.threads))
        try:
            with torch.cuda.stream(compute):  # of which the results of all calls are cut
                torch.empty(segment, dtype=torch.uint8, device=device)
            return DeviceBuffers(torch.empty(pieces.nbytes, dtype=torch.uint8, device=device), pieces)
        except torch.OutOfMemoryError as error:
            rows.halve(error)


def copy_heads(into: torch.Tensor, source: torch.Tensor) -> None:
    """Copy [heads, ...] between host and device in few pieces, for Python's lock, and contiguous ones: others block."""
    whole = into.shape == source.shape and into.is_contiguous() and source.is_contiguous()
    for target, each in [(into, source)] if whole else zip(into, source, strict=True):
        target.copy_(each, non_blocking=True)


def copy_state(into: AttentionState, state: AttentionState) -> None:
    """Copy a state between host and device, as `copy_heads`."""
    for target, source in ((into.num, state.num), (into.den, state.den), (into.max, state.max)):
        copy_heads(target, source)
    into.keys.copy_(state.keys, non_blocking=True)
    into.key_sum.copy_(state.key_sum, non_blocking=True)


@cache
def pinning(device: torch.device) -> ThreadPool:
    """The one thread of this process that pins host memory for a GPU, after it has unpinned what another lane gave up."""
    return ThreadPool(1, f"oocattn-pin-{device}")


class PinnedMemory:
    """Page-locked host memory for the current GPU, the uint8 tensor `tensor`, until `close`. Raises BudgetError."""

    def __init__(self, nbytes: int) -> None:
        try:
            region = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as refused:
            raise BudgetError(
                f"{format_bytes(nbytes)} of host memory cannot be allocated ({refused.strerror}): lower "
                f"{named('host_memory')}, or raise the limit on address space (ulimit -v)"
            ) from refused
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                region.madvise(mmap.MADV_HUGEPAGE)
        content = np.frombuffer(region, np.uint8)
        _touch(content)
        error = torch.cuda.cudart().cudaHostRegister(content.ctypes.data, len(content), _PORTABLE)
        if error != torch.cuda.cudart().cudaError.success:
            raise BudgetError(
                f"{format_bytes(nbytes)} of host memory cannot be pinned ({error}): lower {named('host_memory')}, or "
                "raise the limit on locked memory"
            )
        self.tensor = torch.from_numpy(content)
        self.close = weakref.finalize(self, _unregister, content, torch.cuda.current_device())
        self.close.atexit = False  # CUDA might not answer, and the end of the process unlocks them


def close_all(memories: Iterable[PinnedMemory]) -> None:
    """Give pinned memory back; its tensors must not be used any more."""
    for memory in memories:
        memory.close()


def _unregister(content: np.ndarray[tuple[int], np.dtype[np.uint8]], index: int) -> None:
    """Unlock the pages, to be given back with this last view; on the GPU of the lock, or CUDA would set up the first."""
    with torch.cuda.device(index):
        torch.cuda.cudart().cudaHostUnregister(content.ctypes.data)


def _touch(content: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    """Fault every page in, from several threads."""
    step = -(-len(content) // _TOUCHING_THREADS // mmap.PAGESIZE) * mmap.PAGESIZE

    def touch(start: int) -> None:
        content[start : start + step : mmap.PAGESIZE] = 0

    with ThreadPool(_TOUCHING_THREADS, "oocattn-touch") as pool:
        list(pool.map(touch, range(0, len(content), step)))
