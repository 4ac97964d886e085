"""Memory of a lane in bytes: the one place that both the planner and the lanes use.

A CPU lane is its own device, so its device memory is part of its host memory; of a GPU's one allocation the
pieces are described here, which a lane takes. There a query tile (its rows of each head of the group) stays with its state
while one key tile after another passes by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from oocattn.problem.arrays import DTYPES
from oocattn.problem.problem import Problem
from oocattn.problem.second_pass import SecondPass
from oocattn.problem.staged import StagedArray, key_arrays, query_arrays
from oocattn.records import Positive
from oocattn.units import ceil_div, round_up

STAGING_SLOTS = {"cpu": 2, "cuda": 3}  # subproblems staged on a lane: one read, one computed (on a GPU two in flight)
SLOTS_AHEAD = 4  # where a store is read ahead: one is computed, one may wait for that, two are read
READERS = {"cpu": 1, "cuda": 8}  # threads of a lane that read: from the page cache 28 GB/s with 8, with one 6 (16 cores)
READ_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
"""That each of several reads at a time. On a GPU's host threads wait for their turn at Python with each: of 64 GiB of keys
from the page cache in pieces of 8, 16, 32 and 64 MiB, 11.5, 13.3, 16.0 and 16.6 GB/s came in (H200 host, 16 cores), and
where four lanes read, each with eight threads, 8.4, 11.7 and 12.8."""

QUERY_SLOTS = 2  # query tiles on a GPU, each with its state: one computed, one copied
KEY_SLOTS = 3  # key tiles on a GPU at a time: one that is attended and two that are copied in
PARTIAL_BLOCK_ROWS = 4096  # rows of a block of a partial's file: some megabytes, so that merging streams
PAGE = 4096  # multiple to which a file's header, before its blocks, is padded
FINALISED_ROWS, FINALISED_BYTES = 32768, 64 << 20
"""Rows of one head that a GPU finalises at a time: so many, or those of so many bytes; each time takes ten calls."""

WRITERS = {"cpu": 1, "cuda": 4}  # threads that write chunks of `out`: one makes checksums and copies of 0.6 GB/s
OUT_BLOCKS = {"cpu": 1, "cuda": 5}  # chunks of `out` that a lane holds: on a GPU one is finalised, others are written
SENT_COPIES = 4  # of a chunk of `out` on its way to a store: ours, and those of the libraries that send it (3.9 with s3fs)
SENT_BYTES, MOST_WRITERS = 16 << 20, 16
"""Bytes of chunks of `out` that are sent to a store at a time, and the threads that do, at most."""

PARTIAL_BUFFERS = {"cpu": 1, "cuda": 2}  # partials on their way to disk: on a GPU one is computed, one written
TOTALS_SLOTS = PARTIAL_BUFFERS["cuda"] + 1  # sums over the rows of blocks on a GPU, and those before a tile
MERGE_SCRATCH_BYTES = 2 << 20  # temporaries of one merge and one finalisation, which may run beside the kernel
LEDGER_SCRATCH_BYTES = 2 << 20  # temporaries of the ledger: some rows are entered while others are checked
LEDGER_ROWS, LEDGER_ROW_BYTES = {"cpu": 1 << 15, "cuda": 1 << 19}, 33
"""Rows of which numbers are compared at a time, and the bytes of each: fewer make threads of GPUs wait for Python's lock."""

KEY_NUMBER_BYTES = 16  # of the number of each staged key that a survey has, twice while they are gathered
ALIGNMENT = 256  # every buffer begins at a multiple of this
SEGMENT = 2 << 20  # unit of large allocations on a GPU, and of host memory in huge pages
LEAST_ARENA = 10 << 20  # of a GPU's one allocation: for a smaller one torch's allocator takes 20 MiB

_ITEMSIZES = {**DTYPES, "int64": 8, "uint8": 1}


@dataclass(frozen=True)
class Tiles:
    """Rows and keys on the device at a time; on a CPU whole chunks."""

    query: Positive
    key: Positive


@dataclass(frozen=True)
class Buffers:
    """Host memory of a lane: slots, accumulators, partials to disk, chunks of `out`."""

    slot: int
    slots: int
    chunk_rows: int
    out_chunk_rows: int
    partials: str
    accumulators: int
    device: str
    to_store: bool = False

    def states(self) -> dict[str, tuple[int, int]]:
        """Number and rows of states: accumulators and, on disk, buffers and blocks."""
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
        return self.out_chunk_rows * (problem.columns * DTYPES[problem.out_dtype] + 4) + 2 * ALIGNMENT

    def writers(self, problem: Problem) -> int:
        """Threads that write chunks of `out`."""
        return count_writers(problem, self.device, self.out_chunk_rows, to_store=self.to_store)

    def out_blocks(self, problem: Problem) -> int:
        """Chunks of `out` that a lane holds: for a store one is finalised while all writers send others."""
        return self.writers(problem) + 1 if self.to_store else OUT_BLOCKS[self.device]

    def nbytes(self, problem: Problem) -> int:
        """Bytes of all, as they are allocated."""
        allocations = [(self.slots, self.slot), (self.out_blocks(problem), self.out_bytes(problem))]
        allocations += [(count, self.state_bytes(problem, rows)) for count, rows in self.states().values()]
        return sum(count * (size if self.device == "cpu" else _in_segments(size)) for count, size in allocations)


def count_slots(device: str, ahead: int) -> int:
    """Staging slots of a lane, where so many bytes are read `ahead` of a store."""
    return SLOTS_AHEAD if ahead else STAGING_SLOTS[device]


def partial_file_bytes(problem: Problem, rows: int) -> int:
    """The most bytes of a partial's file: its blocks and a padded header."""
    header = 1024 + 40 * ceil_div(rows, PARTIAL_BLOCK_ROWS)
    return problem.state_bytes(rows) + round_up(header, PAGE)


def sums_bytes(problem: Problem, blocks: int, keys: int, rows: int) -> int:
    """Bytes of the files of sums over rows, of so many blocks of at most so many rows, and so many keys of all blocks."""
    numbers = 0  # of all blocks, for one head
    for each in (problem.second_pass and problem.second_pass.reduced) or ():
        if each.name == "pooled":
            row_block, key_block, *_ = each.numbers
            numbers += (rows // row_block + 2) * (keys // key_block + 2 * blocks)
        elif not each.columns:
            numbers += keys
    return 8 * problem.group_size * numbers + (blocks * PAGE if numbers else 0)


def totals_bytes(asked: SecondPass | None, group_size: int, rows: int, keys: int) -> int:
    """Bytes of what a GPU sums over the rows of a block of g heads, of so many rows and keys at most."""
    of_heads, of_keys, tensors = 0, 0, 0  # numbers of 16 bytes for one head, and of 4 bytes
    for each in (asked and asked.reduced) or ():
        if each.name == "pooled":
            row_block, _, _, most = each.numbers
            of_heads += (rows // row_block + 2) * min(most, keys)
            of_keys += keys
        elif each.name == "top_keys":
            of_keys += keys
        elif not each.columns:
            of_heads += keys
        tensors += 2
    return 16 * group_size * of_heads + 4 * of_keys + ALIGNMENT * tensors


def slot_bytes(problem: Problem, queries: int, keys: int) -> int:
    """Bytes of a staging slot for rows of so many queries and keys."""
    of_query = problem.query_row_bytes * problem.group_size
    padding = 4 * ALIGNMENT if problem.bias_heads or problem.second_pass else 0  # of what is float32
    return queries * of_query + keys * problem.kv_row_bytes + padding


def lane_bytes(problem: Problem, buffers: Buffers, tiles: Tiles, kernel_scratch: int, keys: int) -> tuple[int, int]:
    """Bytes that a lane allocates on its device, and on the host: a CPU's slots, one partial and scratch count as both.

    A subproblem stages at most so many `keys`. What a GPU sums over the rows of a block comes to the host, too.
    """
    asked = problem.second_pass
    numbers = KEY_NUMBER_BYTES * keys if asked is not None and asked.reduced is not None else 0
    host = buffers.nbytes(problem) + sending_bytes(problem, buffers)
    host += MERGE_SCRATCH_BYTES + ledger_bytes(buffers.device, buffers.chunk_rows) + numbers
    if buffers.device == "cuda":
        totals = totals_bytes(asked, problem.group_size, buffers.chunk_rows, keys)
        return DevicePieces.of(problem, tiles, buffers.partials, totals).nbytes + kernel_scratch, host + totals
    working = problem.state_bytes(buffers.chunk_rows) + kernel_scratch
    return buffers.slots * buffers.slot + working, host + working


def ledger_rows(device: str, chunk_rows: int) -> int:
    """Rows of which a lane compares ledgers at a time."""
    return min(LEDGER_ROWS[device], chunk_rows)


def ledger_bytes(device: str, chunk_rows: int) -> int:
    """Temporaries of the ledger of chunks of so many rows, in host memory."""
    return LEDGER_SCRATCH_BYTES + LEDGER_ROW_BYTES * ledger_rows(device, chunk_rows)


def finalised_rows(columns: int, tile_rows: int) -> int:
    """Rows of so many columns that a GPU with query tiles of `tile_rows` finalises at a time: no more than a large tile."""
    of_bytes = FINALISED_BYTES // sum(piece.nbytes for piece in _state(1, 1, columns))
    return max(FINALISED_ROWS, min(tile_rows, of_bytes))


def count_writers(problem: Problem, device: str, out_chunk_rows: int, *, to_store: bool) -> int:
    """Threads of a lane that write chunks of `out`: to a store two at least, so that one's request waits alone."""
    if not to_store:
        return WRITERS[device]
    enough = SENT_BYTES // (out_chunk_rows * problem.columns * DTYPES[problem.out_dtype])
    return max(WRITERS[device], 2, min(MOST_WRITERS, enough))


def sending_bytes(problem: Problem, buffers: Buffers) -> int:
    """Host memory of a lane, in bytes, for chunks of `out` on their way to a store; 0 where they go to files."""
    chunk = buffers.out_chunk_rows * problem.columns * DTYPES[problem.out_dtype]
    return SENT_COPIES * buffers.writers(problem) * chunk if buffers.to_store else 0


class Piece(NamedTuple):
    """A tensor of a lane."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * _ITEMSIZES[self.dtype]


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class DevicePieces:
    """Tensors of a lane on a GPU. Of rings there are those of each slot.

    States are num, den, max, keys and key_sum. Others are the inputs of query tiles and of key tiles, what a finished chunk
    is divided into, and the memory of sums over the rows of blocks, of which the last keeps those before a tile.
    """

    queries: tuple[Pieces, ...]
    states: tuple[Pieces, ...]
    keys: tuple[Pieces, ...]
    finalised: Pieces
    divided: Pieces
    totals: Pieces
    merged: tuple[Pieces, ...]

    @classmethod
    def of(cls, problem: Problem, tiles: Tiles, partials: str, totals: int) -> DevicePieces:
        """Those of a plan with partials in this place, and so many bytes of sums over the rows of a block."""
        group_size, columns = problem.group_size, problem.columns
        state = _state(group_size, tiles.query, columns)
        rows = finalised_rows(columns, tiles.query)
        out = Piece((1, rows, columns), problem.out_dtype), Piece((1, rows), "float32")
        blocks = 2 * (_state(group_size, PARTIAL_BLOCK_ROWS, columns),)
        return cls(
            queries=QUERY_SLOTS * (_tile(query_arrays(problem), tiles.query),),
            states=QUERY_SLOTS * (state,),
            keys=KEY_SLOTS * (_tile(key_arrays(problem), tiles.key),),
            finalised=_state(1, rows, columns),
            divided=out,
            totals=TOTALS_SLOTS * (Piece((totals,), "uint8"),) if totals else (),
            merged=(state,) if partials == "memory" else blocks,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation of all."""
        taken = sum(round_up(piece.nbytes, ALIGNMENT) for each in fields(self) for piece in _flat(getattr(self, each.name)))
        return max(LEAST_ARENA, _in_segments(taken))


def _tile(arrays: tuple[StagedArray, ...], rows: int) -> Pieces:
    return tuple(Piece((each.heads * rows * max(1, each.width),), each.dtype) for each in arrays)


def _state(group_size: int, rows: int, columns: int) -> Pieces:
    of_heads, of_rows = Piece((group_size, rows), "float32"), Piece((rows,), "int64")
    return Piece((group_size, rows, columns), "float32"), of_heads, of_heads, of_rows, of_rows


def _flat(pieces: Pieces | tuple[Pieces, ...]) -> Iterator[Piece]:
    for each in pieces:
        yield from (each,) if isinstance(each, Piece) else each


def _in_segments(count: int) -> int:
    return round_up(count, SEGMENT)
