"""What a lane allocates: the one place from which the planner promises it and the lanes do it.

Bytes only, nothing is allocated here. A CPU lane is its own device, so its device memory is part of its host memory. A
CUDA lane stages subproblems in pinned host memory and works through them in tiles: `query_tile` rows (of each head of
the group) stay on the device with their state while `key_tile` keys after another pass by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from oocattn.problem.problem import DTYPES, Problem
from oocattn.records import Positive

STAGING_SLOTS = {"cpu": 2, "cuda": 3}
"""Subproblems staged on a lane at a time: one that is read, and one that is computed or, on a GPU, two in flight."""

QUERY_SLOTS = 2
"""Query tiles on a GPU at a time, each with its state: one that is computed, one that is copied in or out."""

KEY_SLOTS = 3
"""Key tiles on a GPU at a time: one that is attended and two that are copied in."""

PARTIAL_BLOCK_ROWS = 4096
"""Rows of a block of a partial's file: some megabytes, so that merging streams through little memory."""

PAGE = 4096
"""What comes before the blocks of a file is a multiple of this."""

FINALISED_ROWS = 16384
"""Rows of one head that a GPU finalises at a time."""

OUT_BLOCKS = {"cpu": 1, "cuda": 2}
"""Chunks of `out` that a lane holds at a time: on a GPU one is finalised while another is written."""

PARTIAL_BUFFERS = {"cpu": 1, "cuda": 2}
"""Partials on their way to disk that a lane holds: on a GPU one is computed while another is written."""

MERGE_SCRATCH_BYTES = 2 << 20
"""Temporaries of one merge and one finalisation, which may run beside the kernel."""

LEDGER_SLOTS = 8
"""Ledgers of query tiles that a GPU lane holds in pinned host memory, on their way to the device."""

LEDGER_BYTES = 16
"""Bytes a row of a ledger: the count of keys, and the sum of their indices."""

LEDGER_SCRATCH_BYTES = 2 << 20
"""Temporaries when the ledger of some rows is entered while that of others is checked, a few thousand rows at a time."""

INTERVAL_BYTES = 24
"""Bytes a row of a tile whose rows attend different keys: four int32, and what making them takes."""

ALIGNMENT = 256
"""Every buffer begins at a multiple of this."""

SEGMENT = 2 << 20
"""Large allocations on a GPU, and host memory in huge pages, come in multiples of this."""


@dataclass(frozen=True)
class Tiles:
    """Rows and keys that are on the device at a time; on a CPU, where nothing is copied, whole chunks."""

    query: Positive
    key: Positive


@dataclass(frozen=True)
class LaneMemory:
    """What a lane allocates, in bytes: one staging slot, its whole working set on the device, and its share of the host."""

    slot: int
    device: int
    host: int


@dataclass(frozen=True)
class Buffers:
    """What a lane keeps in host memory: staging slots, accumulators, partials on their way to disk, chunks of `out`."""

    slot: int
    chunk_rows: int
    out_chunk_rows: int
    partials: str
    accumulators: int
    device: str

    def states(self) -> dict[str, tuple[int, int]]:
        """How many states of how many rows: accumulators and, on disk, partials on their way there, and blocks of them."""
        found = {"accumulators": (self.accumulators, self.chunk_rows)}
        if self.partials == "disk":
            found["buffers"] = PARTIAL_BUFFERS[self.device], self.chunk_rows
            found["blocks"] = 1, min(PARTIAL_BLOCK_ROWS, self.chunk_rows)
        return found

    def state_bytes(self, problem: Problem, rows: int) -> int:
        """Bytes of the allocation of one state."""
        return problem.state_bytes(rows) + 5 * ALIGNMENT

    def out_bytes(self, problem: Problem) -> int:
        """Bytes of the allocation of a chunk of `out` and `lse`."""
        return self.out_chunk_rows * (problem.head_dim * DTYPES[problem.out_dtype] + 4) + 2 * ALIGNMENT

    def nbytes(self, problem: Problem) -> int:
        """Bytes of all, as they are allocated."""
        allocations = [(STAGING_SLOTS[self.device], self.slot), (OUT_BLOCKS[self.device], self.out_bytes(problem))]
        allocations += [(count, self.state_bytes(problem, rows)) for count, rows in self.states().values()]
        return sum(count * (size if self.device == "cpu" else _in_segments(size)) for count, size in allocations)


def partial_file_bytes(problem: Problem, rows: int) -> int:
    """The most bytes of a file with the partial of so many rows: its blocks, and a header of pages that lists them."""
    header = 1024 + 40 * math.ceil(rows / PARTIAL_BLOCK_ROWS)
    return problem.state_bytes(rows) + math.ceil(header / PAGE) * PAGE


def slot_bytes(problem: Problem, chunk_rows: int, query_chunks: int, key_chunks: int) -> int:
    """Bytes of a staging slot for that many chunks of Q and of K and V."""
    row_bytes = problem.head_dim * problem.itemsize
    return chunk_rows * row_bytes * (problem.group_size * query_chunks + 2 * key_chunks)


def cpu_memory(problem: Problem, buffers: Buffers, kernel_scratch: int) -> LaneMemory:
    """What a CPU lane allocates: slots, one partial and the kernel's scratch are its device memory."""
    working = problem.state_bytes(buffers.chunk_rows) + INTERVAL_BYTES * buffers.chunk_rows + kernel_scratch
    host = buffers.nbytes(problem) + working + MERGE_SCRATCH_BYTES + LEDGER_SCRATCH_BYTES
    return LaneMemory(buffers.slot, STAGING_SLOTS["cpu"] * buffers.slot + working, host)


def cuda_memory(problem: Problem, buffers: Buffers, tiles: Tiles, kernel_scratch: int) -> LaneMemory:
    """What a CUDA lane allocates: its buffers and results on the host, and on the device what its tiles need."""
    device = device_arena_bytes(problem, tiles, buffers.partials) + kernel_scratch
    tiles_host = _in_segments(LEDGER_SLOTS * LEDGER_BYTES * tiles.query) + INTERVAL_BYTES * tiles.query
    host = buffers.nbytes(problem) + tiles_host + MERGE_SCRATCH_BYTES + LEDGER_SCRATCH_BYTES
    return LaneMemory(buffers.slot, device, host)


def device_arena_bytes(problem: Problem, tiles: Tiles, partials: str) -> int:
    """Bytes of a CUDA lane's one allocation on the device: query tiles, their states, key tiles, and what merging needs."""
    query = problem.group_size * tiles.query * problem.head_dim * problem.itemsize
    key = tiles.key * problem.head_dim * problem.itemsize
    state = problem.state_bytes(tiles.query)
    merging = state if partials == "memory" else 2 * problem.state_bytes(PARTIAL_BLOCK_ROWS)
    finalising = FINALISED_ROWS * (problem.head_dim * (4 + DTYPES[problem.out_dtype]) + 28)  # of one head
    pieces = 6 * QUERY_SLOTS + KEY_SLOTS + 17
    return _in_segments(QUERY_SLOTS * (query + state) + 2 * KEY_SLOTS * key + merging + finalising + ALIGNMENT * pieces)


def _in_segments(count: int) -> int:
    return -(-count // SEGMENT) * SEGMENT
