"""Layout of a candidate: rows of chunks, tiles on the device, and memory. Pure arithmetic over records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oocattn.division.base import Division
from oocattn.division.quorums import quorum_size
from oocattn.planning.machine import Hardware, InputCost
from oocattn.planning.memory import Buffers, Tiles, lane_bytes, slot_bytes
from oocattn.planning.plan import make_division
from oocattn.problem.problem import DTYPES, Problem
from oocattn.units import ceil_div, round_up

OUT_CHUNK_BYTES = 16 << 20  # bytes to aim for in a chunk of `out`; files of 8 to 64 MiB are read fast
TILE_UNIT = 128  # GPU tiles are a multiple of this: kernels work on blocks of 128 rows


@dataclass(frozen=True)
class Candidate:
    """A division with the place of its partials, before its cost is known."""

    decomposition: Literal["cqs", "strips"]
    chunks: int
    span: int
    partials: Literal["memory", "disk"]
    accumulators: int

    def division(self, problem: Problem) -> Division:
        """Its chunk pairs, divided."""
        return make_division(self.decomposition, self.chunks, self.span, problem.mask)


@dataclass(frozen=True)
class Layout:
    """A candidate's chunks and tiles, query chunks of a subproblem, and a lane's bytes: a slot, device and host in all."""

    chunk_rows: int
    out_chunk_rows: int
    tiles: Tiles
    query_chunks: int
    slot: int
    device: int
    host: int


def lay_out(
    candidate: Candidate, problem: Problem, hardware: Hardware, inputs: InputCost, device_memory: int, tiles: Tiles | None
) -> Layout:
    """Chunks, tiles (unless given, the largest that fit `device_memory`) and what one lane allocates for them."""
    chunk_rows, out_chunk_rows = _chunk_rows(problem, candidate.chunks, hardware, inputs)
    query_chunks, key_chunks = _staged_chunks(candidate, problem)
    slot = slot_bytes(problem, chunk_rows, query_chunks, key_chunks)
    buffers = Buffers(slot, chunk_rows, out_chunk_rows, candidate.partials, candidate.accumulators, hardware.device)

    def laid_out(tiles: Tiles) -> Layout:
        rows, keys = (chunk_rows, chunk_rows * key_chunks) if hardware.device == "cpu" else (tiles.query, tiles.key)
        call = (problem.group_size, rows, keys, problem.head_dim, problem.dtype, hardware.threads)
        device, host = lane_bytes(problem, buffers, tiles, hardware.scratch_bytes(*call))
        device, host = max(device, hardware.measuring_bytes), host + inputs.decode_bytes
        return Layout(chunk_rows, out_chunk_rows, tiles, query_chunks, slot, device, host)

    if hardware.device == "cpu":
        return laid_out(Tiles(chunk_rows, chunk_rows))
    if tiles is not None:
        return laid_out(tiles)
    choices = _tile_choices(problem, chunk_rows, hardware.max_keys)
    fitting = (layout for layout in map(laid_out, choices) if layout.device <= device_memory)
    # A kernel's scratch comes in segments: the smallest tiles may need a little more of them than those before.
    return next(fitting, None) or min(map(laid_out, choices), key=lambda layout: layout.device)


def _chunk_rows(problem: Problem, chunks: int, hardware: Hardware, inputs: InputCost) -> tuple[int, int]:
    """Rows of a chunk and of a chunk of `out`, which divides it: one writer each."""
    rows = ceil_div(problem.tokens, chunks)
    unit = inputs.align_rows if rows >= inputs.align_rows else 1
    if unit > 1 or hardware.device == "cpu" or rows < 64 * TILE_UNIT:
        return _whole_blocks(problem, rows, unit)
    tiles = ceil_div(rows, hardware.max_keys)  # so many key tiles of one size are a chunk
    while _whole_blocks(problem, rows, TILE_UNIT * tiles)[0] > tiles * hardware.max_keys:
        tiles += 1
    return _whole_blocks(problem, rows, TILE_UNIT * tiles)


def _whole_blocks(problem: Problem, rows: int, unit: int) -> tuple[int, int]:
    """`rows` in whole chunks of `out`, and the rows of such a chunk in whole units."""
    blocks = ceil_div(rows, unit)
    out_bytes = rows * problem.head_dim * DTYPES[problem.out_dtype]
    blocks_per_out_chunk = ceil_div(blocks, max(1, round(out_bytes / OUT_CHUNK_BYTES)))
    out_chunk_rows = blocks_per_out_chunk * unit
    return ceil_div(blocks, blocks_per_out_chunk) * out_chunk_rows, out_chunk_rows


def _tile_choices(problem: Problem, chunk_rows: int, max_keys: int) -> list[Tiles]:
    """Tiles for a GPU, the fastest first, down to the smallest that works: 4 key tiles of rows at most, over all heads.

    Measured (H200, cuDNN, D = 64, keys 65,536): 446, 471, 478 and 491 TFLOP/s for 16K, 64K, 128K and 256K rows.
    """
    least = ceil_div(chunk_rows, max_keys)
    equal = (count for count in range(least, 2 * least + 1) if chunk_rows % (count * TILE_UNIT) == 0)
    count = next(equal, least)
    key = min(chunk_rows, round_up(ceil_div(chunk_rows, count), TILE_UNIT))
    most = max(key, 4 * max_keys // problem.group_size)
    choices = [(query, key) for query in (4 * key, 2 * key, key, key // 2, key // 4) if query <= most]
    choices += [(key // 4, key // 2)] + [(key >> power, key >> power) for power in range(2, key.bit_length())]
    enough = [(query, keys) for query, keys in choices if keys >= TILE_UNIT and query >= TILE_UNIT] or [(key, key)]
    return list(dict.fromkeys(Tiles(min(chunk_rows, query), keys) for query, keys in enough))


def _staged_chunks(candidate: Candidate, problem: Problem) -> tuple[int, int]:
    """The most query chunks and key chunks that one subproblem stages.

    Triangular and perfect: a quorum's lowest chunk stages no Q and its highest no K/V, but for the one diagonal it owns.
    """
    if candidate.decomposition == "strips":
        return 1, candidate.span
    k = quorum_size(candidate.chunks)
    if not problem.mask.triangular or k * (k - 1) + 1 != candidate.chunks or k == 1:
        return k, k
    return (k, k - 1) if problem.group_size >= 2 else (k - 1, k)
