"""What a division costs: its chunks and tiles, memory, bytes a link, and seconds, on a machine that is described.

Pure arithmetic over records; which of the costed divisions is taken is decided in `planner`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from oocattn.division.base import Division, chunk_reads
from oocattn.division.quorums import quorum_size
from oocattn.planning.memory import Buffers, LaneMemory, Tiles, cpu_memory, cuda_memory, partial_file_bytes, slot_bytes
from oocattn.planning.plan import Hardware, InputCost, Link, Plan, ScratchBytes, make_division
from oocattn.problem.problem import DTYPES, Problem

OUT_CHUNK_BYTES = 16 << 20
"""Aim for the chunks of `out`: between the 8 and 64 MiB at which chunk files are read fast, and short to wait for at the end
of a run."""

TILE_UNIT = 128
"""GPU tiles are a multiple of this: kernels work on blocks of 128 rows."""

PIN_RATE = 10e9
"""Bytes per second at which host memory is pinned (15 measured, where there are huge pages)."""

HALF_RATE_KEYS = 512
"""Keys of a call at which a GPU's kernel falls to half its rate: launching it takes as long as they do."""

PIECE = 16
"""Subproblems of a lane that are submitted to the scheduler together."""

WINDOW = 32
"""Subproblems of a lane that may wait there before no more are submitted: enough to hide a round trip."""

UNFINISHED = 4 * WINDOW
"""Tasks of a lane, of any layer, that may wait there before no more are submitted."""


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


def recost(plan: Plan, scratch_bytes: ScratchBytes) -> Plan:
    """The plan with all that follows from what is given and chosen in it computed again, as `cost` does."""
    hardware = Hardware(**asdict(plan.machine), scratch_bytes=scratch_bytes)
    candidate = Candidate(plan.decomposition, plan.chunks, plan.span, plan.partials, plan.accumulators)
    chosen = (hardware, plan.inputs, plan.device_memory, plan.host_memory, plan.checkpoint_seconds)
    return cost(candidate, plan.problem, *chosen, tiles=plan.tiles)


@dataclass(frozen=True)
class _Layout:
    """A candidate with its tiles and the memory that follows from them."""

    chunk_rows: int
    out_chunk_rows: int
    tiles: Tiles
    query_chunks: int  # the most of a subproblem
    memory: LaneMemory


def cost(
    candidate: Candidate,
    problem: Problem,
    hardware: Hardware,
    inputs: InputCost,
    device_memory: int,
    host_memory: int,
    checkpoint_seconds: float,
    tiles: Tiles | None = None,
) -> Plan:
    """Cost one candidate: its tiles, unless they are given, memory, bytes a link and seconds."""
    layout = _lay_out(candidate, problem, hardware, inputs, device_memory // hardware.lanes, tiles)
    division = candidate.division(problem)
    links, scratch_disk = _links(candidate, division, layout, problem, hardware, inputs, checkpoint_seconds)
    seconds = {link.name: link.seconds for link in links}
    disk = seconds["read"] + seconds["partials"] + seconds["write"]
    pinned = layout.memory.slot / PIN_RATE if hardware.device == "cuda" else 0.0
    fill = pinned + max(hardware.lanes * layout.memory.slot / hardware.read_rate, layout.memory.slot / inputs.decode_rate)
    # What each lane writes when nothing is left to compute: a GPU's writes chunks tile by tile as they come back.
    last = layout.query_chunks * layout.chunk_rows
    if hardware.device == "cuda" and candidate.partials == "memory":
        tile = layout.chunk_rows % layout.tiles.query or layout.tiles.query  # the last one
        last = layout.chunk_rows - (layout.chunk_rows - tile) // layout.out_chunk_rows * layout.out_chunk_rows
    drain = seconds["write"] * min(1.0, hardware.lanes * last / (candidate.chunks * layout.chunk_rows * problem.head_groups))
    return Plan(
        problem=problem,
        machine=hardware.machine,
        inputs=inputs,
        **asdict(candidate),
        tiles=layout.tiles,
        device_memory=device_memory,
        host_memory=host_memory,
        checkpoint_seconds=checkpoint_seconds,
        chunk_rows=layout.chunk_rows,
        out_chunk_rows=layout.out_chunk_rows,
        slot_bytes=layout.memory.slot,
        peak_device=layout.memory.device * hardware.lanes,
        peak_host=layout.memory.host * hardware.lanes,
        scratch_disk=scratch_disk,
        links=links,
        seconds=max(seconds["compute"], disk, seconds.get("copy", 0.0), seconds["tasks"]) + fill + drain,
    )


def _links(
    candidate: Candidate,
    division: Division,
    layout: _Layout,
    problem: Problem,
    hardware: Hardware,
    inputs: InputCost,
    checkpoint_seconds: float,
) -> tuple[tuple[Link, ...], int]:
    """Bytes and seconds of every link, and the bytes that partials take on disk at most at a time."""
    lanes, head_groups = hardware.lanes, problem.head_groups
    row_bytes = problem.head_dim * problem.itemsize * head_groups
    query_reads, key_reads = chunk_reads(division)
    read = layout.chunk_rows * row_bytes * (problem.group_size * query_reads + 2 * key_reads)
    once = min(read, problem.tokens * row_bytes * (problem.group_size + 2))
    read_seconds = once / hardware.read_rate + (read - once) / hardware.reread_rate
    written = problem.tokens * problem.batch * problem.query_heads * (problem.head_dim * DTYPES[problem.out_dtype] + 4)
    balance = _largest_share(division, layout.chunk_rows, problem, lanes, candidate.partials)
    compute = problem.flops * balance / _rate(layout.tiles, problem, hardware)
    partial = partial_file_bytes(problem, layout.chunk_rows)
    handed_back = head_groups * query_reads  # partials
    saved = read_back = scratch_disk = 0.0
    if candidate.partials == "disk":
        waiting = (UNFINISHED + 4 * PIECE) * lanes / candidate.chunks  # head groups whose chunks are not written yet
        saved = read_back = handed_back * partial
        scratch_disk = min(head_groups, 2 + waiting) * query_reads * partial
    elif checkpoint_seconds:
        held = lanes * min(candidate.accumulators, head_groups * candidate.chunks) * partial
        saved = compute // (checkpoint_seconds / 2) * held
        scratch_disk = held + lanes * partial  # one is replaced
    tasks = head_groups * (2 * division.subproblems + 2 * candidate.chunks)
    links = [
        Link("read", read, max(read_seconds, read / inputs.decode_rate)),
        Link("compute", problem.flops, compute),
        Link("partials", saved + read_back, saved / hardware.write_rate + read_back / hardware.read_rate),
        Link("write", written, written / hardware.write_rate),
        Link("tasks", tasks, tasks * hardware.task_seconds),
    ]
    if hardware.device == "cuda":
        passes = problem.flops / (4 * problem.head_dim * problem.group_size * min(layout.tiles.query, layout.chunk_rows))
        keys = 2 * problem.head_dim * problem.itemsize * passes
        queries = problem.group_size * query_reads * layout.chunk_rows * row_bytes
        copied = keys + queries + 2 * handed_back * problem.state_bytes(layout.chunk_rows)
        links.insert(1, Link("copy", copied, copied * balance / hardware.copy_rate))
    return tuple(links), math.ceil(scratch_disk)


def _largest_share(division: Division, chunk_rows: int, problem: Problem, lanes: int, partials: str) -> float:
    """What of all pairs the lane computes that has most to do; how lanes share is in `pipelines.schedule`."""
    if partials == "disk":
        subproblems = problem.head_groups * division.subproblems
        return math.ceil(subproblems / lanes) / subproblems
    rounds, rest = divmod(problem.head_groups, lanes)
    if not rest:
        return rounds / problem.head_groups
    edges = np.minimum(np.arange(division.chunks + 1, dtype=np.float64) * chunk_rows, problem.tokens)
    pairs = np.diff(problem.mask.pairs_before(edges))
    of_lanes = np.bincount(division.chunk_lanes(lanes), weights=pairs, minlength=lanes)
    most = np.sum([np.roll(of_lanes, group) for group in range(rest)], axis=0).max()  # the next one's begin one lane on
    return (rounds + float(most / pairs.sum())) / problem.head_groups


def _rate(tiles: Tiles, problem: Problem, hardware: Hardware) -> float:
    """A lane's kernel rate at these tiles."""
    rows = tiles.query * problem.group_size
    rate = hardware.kernel_flops * rows / (rows + hardware.half_rate_rows)
    return rate if hardware.device == "cpu" else rate * tiles.key / (tiles.key + HALF_RATE_KEYS)


def _chunk_rows(problem: Problem, chunks: int, hardware: Hardware, inputs: InputCost) -> tuple[int, int]:
    """Rows of a chunk and of a chunk of `out`; the second divides the first, so that every output chunk has one writer."""
    rows = math.ceil(problem.tokens / chunks)
    unit = inputs.align_rows if rows >= inputs.align_rows else 1
    if unit > 1 or hardware.device == "cpu" or rows < 64 * TILE_UNIT:
        return _whole_blocks(problem, rows, unit)
    tiles = math.ceil(rows / hardware.max_keys)  # so many key tiles of one size are a chunk
    while _whole_blocks(problem, rows, TILE_UNIT * tiles)[0] > tiles * hardware.max_keys:
        tiles += 1
    return _whole_blocks(problem, rows, TILE_UNIT * tiles)


def _whole_blocks(problem: Problem, rows: int, unit: int) -> tuple[int, int]:
    """`rows` rounded up to whole chunks of `out`, themselves of whole units; and the rows of a chunk of `out`."""
    blocks = math.ceil(rows / unit)
    out_bytes = rows * problem.head_dim * DTYPES[problem.out_dtype]
    blocks_per_out_chunk = math.ceil(blocks / max(1, round(out_bytes / OUT_CHUNK_BYTES)))
    out_chunk_rows = blocks_per_out_chunk * unit
    return math.ceil(blocks / blocks_per_out_chunk) * out_chunk_rows, out_chunk_rows


def _lay_out(
    candidate: Candidate, problem: Problem, hardware: Hardware, inputs: InputCost, device_memory: int, tiles: Tiles | None
) -> _Layout:
    """Chunks and tiles of a candidate and what one lane allocates for them.

    The tiles are the largest that fit `device_memory`, unless they are given.
    """
    chunk_rows, out_chunk_rows = _chunk_rows(problem, candidate.chunks, hardware, inputs)
    query_chunks, key_chunks = _staged_chunks(candidate, problem)
    slot = slot_bytes(problem, chunk_rows, query_chunks, key_chunks)
    buffers = Buffers(slot, chunk_rows, out_chunk_rows, candidate.partials, candidate.accumulators, hardware.device)

    def scratch(queries: int, keys: int) -> int:
        shape = (problem.group_size, queries, keys, problem.head_dim)
        return hardware.scratch_bytes(*shape, problem.dtype, hardware.threads)

    def laid_out(tiles: Tiles) -> _Layout:
        if hardware.device == "cpu":
            memory = cpu_memory(problem, buffers, scratch(chunk_rows, chunk_rows * key_chunks))
        else:
            memory = cuda_memory(problem, buffers, tiles, scratch(tiles.query, tiles.key))
        device = max(memory.device, hardware.measuring_bytes)
        memory = replace(memory, device=device, host=memory.host + inputs.decode_bytes)
        return _Layout(chunk_rows, out_chunk_rows, tiles, query_chunks, memory)

    if hardware.device == "cpu":
        return laid_out(Tiles(chunk_rows, chunk_rows))
    if tiles is not None:
        return laid_out(tiles)
    choices = _tile_choices(problem, chunk_rows, hardware.max_keys)
    fitting = (layout for layout in map(laid_out, choices) if layout.memory.device <= device_memory)
    # A kernel's scratch comes in segments: the smallest tiles may need a little more of them than those before.
    return next(fitting, None) or min(map(laid_out, choices), key=lambda layout: layout.memory.device)


def _tile_choices(problem: Problem, chunk_rows: int, max_keys: int) -> list[Tiles]:
    """Tiles for a GPU, the fastest first: up to four key tiles of rows (over all heads), down to the smallest that works.

    Measured (H200, cuDNN, D = 64, keys 65,536): 446, 471, 478 and 491 TFLOP/s for 16K, 64K, 128K and 256K rows.
    """
    least = math.ceil(chunk_rows / max_keys)
    equal = (count for count in range(least, 2 * least + 1) if chunk_rows % (count * TILE_UNIT) == 0)
    count = next(equal, least)
    key = min(chunk_rows, math.ceil(chunk_rows / count / TILE_UNIT) * TILE_UNIT)
    most = max(key, 4 * max_keys // problem.group_size)
    choices = [(query, key) for query in (4 * key, 2 * key, key, key // 2, key // 4) if query <= most]
    choices += [(key // 4, key // 2)] + [(key >> power, key >> power) for power in range(2, key.bit_length())]
    enough = [(query, keys) for query, keys in choices if keys >= TILE_UNIT and query >= TILE_UNIT] or [(key, key)]
    return list(dict.fromkeys(Tiles(min(chunk_rows, query), keys) for query, keys in enough))


def _staged_chunks(candidate: Candidate, problem: Problem) -> tuple[int, int]:
    """The most query chunks and key chunks that one subproblem stages.

    Triangular and perfect: every pair of the quorum is owned, so its lowest chunk stages no Q and its highest no K/V, but
    for the one diagonal that it owns.
    """
    if candidate.decomposition == "strips":
        return 1, candidate.span
    k = quorum_size(candidate.chunks)
    if not problem.mask.triangular or k * (k - 1) + 1 != candidate.chunks or k == 1:
        return k, k
    return (k, k - 1) if problem.group_size >= 2 else (k - 1, k)
