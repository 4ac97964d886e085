"""Layout of a candidate: rows of chunks, tiles on the device, and memory. Pure arithmetic over records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oocattn.division.quorums import quorum_size
from oocattn.planning.live import ChunkGrid, keys_needed, live_pairs
from oocattn.planning.machine import Hardware, InputCost
from oocattn.planning.memory import Buffers, Tiles, count_slots, lane_bytes, slot_bytes, totals_bytes
from oocattn.problem.arrays import DTYPES
from oocattn.problem.calls import CallSize
from oocattn.problem.problem import Problem
from oocattn.units import ceil_div, round_up

OUT_CHUNK_BYTES = 16 << 20  # bytes to aim for in a chunk of `out`; files of 8 to 64 MiB are read fast
MOST_ROWS = 1 << 18  # rows of a GPU's tile, over all heads: more gain nothing, and are written late
USUAL_ROWS = 1 << 16  # rows of each head that a tile may have, of however many heads
TILE_UNIT = 128  # GPU tiles are a multiple of this: kernels work on blocks of 128 rows


@dataclass(frozen=True)
class Candidate:
    """A division with the place of its partials, before its cost is known."""

    decomposition: Literal["cqs", "strips"]
    query_chunks: int
    chunks: int
    span: int
    partials: Literal["memory", "disk"]
    accumulators: int


@dataclass(frozen=True)
class Layout:
    """A candidate's chunks and tiles, query chunks of a subproblem, and a lane's bytes.

    These are of a slot, of what a GPU sums over the rows of a block, on the device and on the host in all.
    """

    grid: ChunkGrid
    out_chunk_rows: int
    tiles: Tiles
    query_chunks: int
    slot: int
    totals: int
    device: int
    host: int

    @property
    def chunk_rows(self) -> int:
        """Rows of a query chunk."""
        return self.grid.chunk_rows


def lay_out(
    candidate: Candidate,
    problem: Problem,
    hardware: Hardware,
    inputs: InputCost,
    device_memory: int,
    tiles: Tiles | None,
    *,
    to_store: bool,
) -> Layout:
    """Chunks, tiles (unless given, the largest that fit `device_memory`) and what one lane allocates for them."""
    chunk_rows, out_chunk_rows = _chunk_rows(problem, problem.out_rows, candidate.query_chunks, hardware, inputs)
    key_chunk_rows = _key_chunk_rows(problem, candidate, chunk_rows, hardware, inputs)
    grid = ChunkGrid(*problem.rows_asked, candidate.query_chunks, chunk_rows, candidate.chunks, key_chunk_rows)
    staged = _most_staged(candidate, problem, grid)
    slot, query_chunks = max((slot_bytes(problem, count * chunk_rows, keys), count) for count, keys in staged)
    keys = max(keys for _, keys in staged)
    of_gpu = hardware.device == "cuda"
    totals = totals_bytes(problem.second_pass, problem.group_size, chunk_rows, keys) if of_gpu else 0
    device, states = hardware.device, (candidate.partials, candidate.accumulators)
    slots = count_slots(device, inputs.ahead)
    buffers = Buffers(slot, slots, chunk_rows, out_chunk_rows, *states, device, to_store)

    def laid_out(tiles: Tiles) -> Layout:
        rows, of_call = (chunk_rows, keys) if hardware.device == "cpu" else (tiles.query, tiles.key)
        call = call_size(problem, rows, of_call, hardware.threads)
        device, host = lane_bytes(problem, buffers, tiles, hardware.scratch_bytes(call), keys)
        device, host = max(device, hardware.measuring_bytes), host + inputs.decode_bytes + problem.given_bytes
        return Layout(grid, out_chunk_rows, tiles, query_chunks, slot, totals, device, host)

    if hardware.device == "cpu":
        return laid_out(Tiles(chunk_rows, key_chunk_rows))
    if tiles is not None:
        return laid_out(tiles)
    choices = _tile_choices(problem, chunk_rows, key_chunk_rows, hardware.max_keys)
    fitting = (layout for layout in map(laid_out, choices) if layout.device <= device_memory)
    # A kernel's scratch comes in segments: the smallest tiles may need a little more of them than those before.
    return next(fitting, None) or min(map(laid_out, choices), key=lambda layout: layout.device)


def call_size(problem: Problem, rows: int, keys: int, threads: int) -> CallSize:
    """The size of a kernel's call on so many rows and keys, at most."""
    dims = (problem.head_dim, problem.value_dim, problem.dtype, threads)
    masked = any(not mask.is_simple for mask in problem.sampled_masks)
    reduced = () if problem.second_pass is None else problem.second_pass.reduced or ()
    return CallSize(problem.group_size, rows, keys, *dims, plain=problem.is_plain, masked=masked, reduced=reduced)


def _chunk_rows(problem: Problem, rows: int, chunks: int, hardware: Hardware, inputs: InputCost) -> tuple[int, int]:
    """Rows of a chunk and of a chunk of `out`, which divides it: one writer each."""
    rows = ceil_div(rows, chunks)
    unit = inputs.align_rows if rows >= inputs.align_rows else 1
    if unit > 1 or hardware.device == "cpu" or rows < 64 * TILE_UNIT:
        return _whole_blocks(problem, rows, unit)
    tiles = ceil_div(rows, hardware.max_keys)  # so many key tiles of one size are a chunk
    while _whole_blocks(problem, rows, TILE_UNIT * tiles)[0] > tiles * hardware.max_keys:
        tiles += 1
    return _whole_blocks(problem, rows, TILE_UNIT * tiles)


def _key_chunk_rows(problem: Problem, candidate: Candidate, chunk_rows: int, hardware: Hardware, inputs: InputCost) -> int:
    """Keys of a chunk: as many as rows, where there are as many of both and of their chunks."""
    if problem.out_rows == problem.keys and candidate.query_chunks == candidate.chunks:
        return chunk_rows
    return _chunk_rows(problem, problem.keys, candidate.chunks, hardware, inputs)[0]


def _whole_blocks(problem: Problem, rows: int, unit: int) -> tuple[int, int]:
    """`rows` in whole chunks of `out`, and the rows of such a chunk in whole units."""
    blocks = ceil_div(rows, unit)
    out_bytes = rows * problem.columns * DTYPES[problem.out_dtype]
    blocks_per_out_chunk = ceil_div(blocks, max(1, round(out_bytes / OUT_CHUNK_BYTES)))
    out_chunk_rows = blocks_per_out_chunk * unit
    return ceil_div(blocks, blocks_per_out_chunk) * out_chunk_rows, out_chunk_rows


def _tile_choices(problem: Problem, chunk_rows: int, key_chunk_rows: int, max_keys: int) -> list[Tiles]:
    """Tiles for a GPU, the fastest first, down to the smallest that works.

    Measured (H200, cuDNN, D = 64, keys 65,536): 446, 471, 478 and 491 TFLOP/s for 16K, 64K, 128K and 256K rows.
    """
    least = ceil_div(key_chunk_rows, max_keys)
    equal = (count for count in range(least, 2 * least + 1) if key_chunk_rows % (count * TILE_UNIT) == 0)
    count = next(equal, least)
    key = min(key_chunk_rows, round_up(ceil_div(key_chunk_rows, count), TILE_UNIT))
    rows = key if chunk_rows <= key_chunk_rows else max(key, round_up(min(chunk_rows, max_keys), TILE_UNIT))
    most = max(USUAL_ROWS, MOST_ROWS // problem.group_size) // TILE_UNIT * TILE_UNIT
    if rows > most:
        rows = round_up(ceil_div(rows, ceil_div(rows, most)), TILE_UNIT)
    choices = [(query, key) for query in (4 * rows, 2 * rows, rows, rows // 2, rows // 4) if query <= most]
    choices += [(rows // 4, key // 2)] + [(rows >> power, key >> power) for power in range(2, rows.bit_length())]
    least_rows, least_keys = (min(TILE_UNIT, count) for count in (rows, key))
    enough = ((query, max(keys, least_keys)) for query, keys in choices if query >= least_rows)
    return list(dict.fromkeys(Tiles(min(chunk_rows, query), keys) for query, keys in enough))


def _most_staged(candidate: Candidate, problem: Problem, grid: ChunkGrid) -> list[tuple[int, int]]:
    """The most query chunks, and the most keys, that one subproblem stages: of each kind of subproblem.

    Triangular and perfect: a quorum's lowest chunk stages no Q and its highest no K/V, but for the one diagonal it owns.
    """
    if candidate.decomposition == "strips":
        needed = max(keys_needed(mask, grid, grid.chunk_rows)[1] for mask in problem.sampled_masks)
        return [(1, max(1, min(candidate.span * grid.key_chunk_rows, needed)))]
    k, rows = quorum_size(candidate.chunks), grid.key_chunk_rows
    triangular = all(live_pairs(mask, grid).is_triangular for mask in problem.sampled_masks)
    if triangular and k * (k - 1) + 1 == candidate.chunks and k > 1:
        return [(k, (k - 1) * rows), (k - 1, k * rows)]
    return [(k, k * rows)]
