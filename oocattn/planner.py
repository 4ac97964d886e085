"""From a problem, budgets and a small description of the hardware to a `Plan`, before the first byte is read.

Planning is a pure function of records: nothing here reads data, measures hardware or starts a task. Every candidate
division is costed (memory, bytes a link, seconds) and those that do not fit the budgets are dropped. Of the rest the
fastest is taken; where predictions differ by less than 5%, cyclic quorums before strips, partials in memory before
partials on disk, and fewer chunks before more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from oocattn.errors import BudgetError, ProblemError
from oocattn.plans import Hardware, InputCost, Link, Memory, Plan, make_division
from oocattn.problem import DTYPES, Problem
from oocattn.quorum import candidate_chunk_counts, chunk_reads, quorum_size
from oocattn.units import format_bytes

MAX_CHUNKS = 9507

CHECKPOINT_SECONDS = 60.0
"""A subproblem is what a kill costs: where the budgets leave a choice, none takes longer than this."""

TIE = 1.05

OUT_CHUNK_BYTES = 32 << 20
"""Aim for the chunks of `out`: between the 8 and 64 MiB at which chunk files are read fast."""

STAGING_SLOTS = 2
"""Subproblems staged on a lane at a time: one that is computed and one that is read."""

PIECE = 16
"""Subproblems of a lane that are submitted to the scheduler together."""

WINDOW = 32
"""Subproblems of a lane that may wait there before no more are submitted: enough to hide a round trip."""

UNFINISHED = 4 * WINDOW
"""Tasks of a lane, of any layer, that may wait there before no more are submitted."""

PARTIAL_BLOCK_ROWS = 4096
"""Rows of a block of a partial's file: some megabytes, so that merging streams through little memory."""

MERGE_SCRATCH_BYTES = 2 << 20
"""Temporaries of one merge and one finalisation, which may run beside the kernel."""

LEDGER_BYTES = 24
"""Temporaries a row when the ledger of a chunk is checked."""

DECOMPOSITIONS = ("auto", "cqs", "strips")


@dataclass(frozen=True)
class _Candidate:
    """A division with the place of its partials, before its cost is known."""

    decomposition: str
    chunks: int
    span: int
    partials: str
    accumulators: int


def make_plan(
    problem: Problem,
    hardware: Hardware,
    *,
    device_memory: int,
    host_memory: int,
    inputs: InputCost = InputCost(),  # noqa: B008 - frozen
    chunks: int | None = None,
    decomposition: str = "auto",
) -> Plan:
    """Choose the division, tiles and place of partials that finish soonest within the budgets (bytes, over all lanes).

    `chunks` pins c and `decomposition` the kind. Raises ProblemError for a choice that does not exist and BudgetError,
    naming the smallest budget that works, where nothing fits.
    """
    if decomposition not in DECOMPOSITIONS:
        raise ProblemError(f"decomposition {decomposition!r}: expected one of {', '.join(DECOMPOSITIONS)}")
    if chunks is not None and not 1 <= chunks <= min(problem.tokens, MAX_CHUNKS):
        raise ProblemError(
            f"chunks = {chunks}: expected 1 to {min(problem.tokens, MAX_CHUNKS):,} for {problem.tokens:,} tokens"
        )
    plans = [
        _cost(candidate, problem, hardware, inputs, device_memory, host_memory)
        for candidate in _candidates(problem, chunks, decomposition)
    ]
    fitting = [plan for plan in plans if plan.peak_device <= device_memory and plan.peak_host <= host_memory]
    fitting = [plan for plan in fitting if plan.scratch_disk <= hardware.scratch_disk]
    if not fitting:
        raise _budget_error(plans, device_memory, host_memory, hardware.scratch_disk)
    prompt = [plan for plan in fitting if _subproblem_seconds(plan) <= CHECKPOINT_SECONDS] or fitting
    fastest = min(plan.seconds for plan in prompt)
    ties = [plan for plan in prompt if plan.seconds <= TIE * fastest]
    return min(ties, key=lambda plan: (plan.decomposition != "cqs", plan.partials == "disk", plan.chunks, plan.seconds))


def _candidates(problem: Problem, chunks: int | None, decomposition: str) -> Iterator[_Candidate]:
    limit = min(problem.tokens, MAX_CHUNKS)
    if decomposition in ("auto", "cqs"):
        for c in (chunks,) if chunks else candidate_chunk_counts(limit):
            for accumulators in {c, 2 * c}:
                yield _Candidate("cqs", c, 0, "memory", accumulators)
            yield _Candidate("cqs", c, 0, "disk", 2)
    if decomposition in ("auto", "strips"):
        for c in (chunks,) if chunks else _powers_of_two(limit):
            for span in _powers_of_two(c):
                yield _Candidate("strips", c, span, "memory", 2)


def _powers_of_two(limit: int) -> Iterator[int]:
    return (1 << power for power in range(limit.bit_length()) if 1 << power <= limit)


def _cost(
    candidate: _Candidate, problem: Problem, hardware: Hardware, inputs: InputCost, device_memory: int, host_memory: int
) -> Plan:
    """Cost one candidate: its tiles, memory, bytes a link and seconds."""
    chunk_rows, out_chunk_rows = _tiles(problem, candidate.chunks, inputs.align_rows)
    memory = _lane_memory(candidate, problem, hardware, inputs, chunk_rows, out_chunk_rows)
    division = make_division(candidate.decomposition, candidate.chunks, candidate.span, problem.causal)
    lanes = hardware.lanes

    query_reads, key_reads = chunk_reads(division)
    row_bytes = problem.head_dim * problem.itemsize * problem.head_groups
    read = chunk_rows * row_bytes * (problem.group_size * query_reads + 2 * key_reads)
    out_row = problem.batch * problem.query_heads * (problem.head_dim * DTYPES[problem.out_dtype] + 4)
    written = problem.tokens * out_row
    partials = scratch_disk = 0.0
    if candidate.partials == "disk":
        of_head_group = query_reads * problem.partial_bytes(chunk_rows)
        waiting = (UNFINISHED + 4 * PIECE) * lanes / candidate.chunks  # head groups whose chunks are not written yet
        partials = problem.head_groups * of_head_group
        scratch_disk = min(problem.head_groups, 2 + waiting) * of_head_group

    units = problem.head_groups * (division.subproblems if candidate.partials == "disk" else 1)
    balance = math.ceil(units / lanes) / units
    rows = chunk_rows * problem.group_size
    rate = hardware.kernel_flops * rows / (rows + hardware.half_rate_rows)
    tasks = problem.head_groups * (2 * division.subproblems + 2 * candidate.chunks)
    read_rate = min(hardware.read_rate, inputs.decode_rate)
    links = (
        Link("read", read, read / read_rate),
        Link("compute", problem.flops, problem.flops * balance / rate),
        Link("partials", 2 * partials, partials / hardware.write_rate + partials / hardware.read_rate),
        Link("write", written, written / hardware.write_rate),
        Link("tasks", tasks, tasks * hardware.task_seconds),
    )
    read_link, compute, partials_link, write, overhead = (link.seconds for link in links)
    disk = read_link + partials_link + write
    fill = memory.slot / read_rate + write / (candidate.chunks * problem.head_groups)
    return Plan(
        problem=problem,
        decomposition=candidate.decomposition,
        chunks=candidate.chunks,
        span=candidate.span,
        chunk_rows=chunk_rows,
        out_chunk_rows=out_chunk_rows,
        kernel=hardware.kernel,
        partials=candidate.partials,
        accumulators=candidate.accumulators,
        slot_bytes=memory.slot,
        lanes=lanes,
        threads=hardware.threads,
        device_memory=device_memory,
        host_memory=host_memory,
        peak_device=memory.device * lanes,
        peak_host=memory.host * lanes,
        scratch_disk=math.ceil(scratch_disk),
        links=links,
        seconds=max(compute, disk, overhead) + fill,
        notes=inputs.notes,
    )


def _tiles(problem: Problem, chunks: int, align_rows: int) -> tuple[int, int]:
    """Rows of a chunk and of a chunk of `out`; the second divides the first, so that every output chunk has one writer."""
    rows = math.ceil(problem.tokens / chunks)
    unit = align_rows if rows >= align_rows else 1
    blocks = math.ceil(rows / unit)
    out_bytes = rows * problem.head_dim * DTYPES[problem.out_dtype]
    blocks_per_out_chunk = math.ceil(blocks / max(1, round(out_bytes / OUT_CHUNK_BYTES)))
    out_chunk_rows = blocks_per_out_chunk * unit
    return math.ceil(blocks / blocks_per_out_chunk) * out_chunk_rows, out_chunk_rows


def _lane_memory(
    candidate: _Candidate,
    problem: Problem,
    hardware: Hardware,
    inputs: InputCost,
    chunk_rows: int,
    out_chunk_rows: int,
) -> Memory:
    """What one lane allocates. The CPU is its own device, so its device memory is part of its host memory."""
    if candidate.decomposition == "strips":
        query_chunks, key_chunks = 1, candidate.span
    else:
        query_chunks, key_chunks = _staged_chunks(candidate.chunks, problem)
    row_bytes = problem.head_dim * problem.itemsize
    slot = chunk_rows * row_bytes * (problem.group_size * query_chunks + 2 * key_chunks)
    keys = chunk_rows * key_chunks
    scratch = hardware.scratch_bytes(problem.group_size, chunk_rows, keys, problem.head_dim, problem.dtype)
    partial = problem.partial_bytes(chunk_rows)
    device = STAGING_SLOTS * slot + partial + scratch
    out_chunk = out_chunk_rows * (problem.head_dim * DTYPES[problem.out_dtype] + 4)
    merging = MERGE_SCRATCH_BYTES + LEDGER_BYTES * chunk_rows
    if candidate.partials == "disk":
        merging += problem.partial_bytes(min(PARTIAL_BLOCK_ROWS, chunk_rows))
    host = device + candidate.accumulators * partial + merging + out_chunk + inputs.decode_bytes
    return Memory(slot, device, host)


def _staged_chunks(chunks: int, problem: Problem) -> tuple[int, int]:
    """The most query chunks and key chunks that one quorum stages.

    Causal and perfect: every pair of the quorum is owned, so its lowest chunk stages no Q and its highest no K/V, but for
    the one diagonal that it owns.
    """
    k = quorum_size(chunks)
    if not problem.causal or k * (k - 1) + 1 != chunks or k == 1:
        return k, k
    return (k, k - 1) if problem.group_size >= 2 else (k - 1, k)


def _subproblem_seconds(plan: Plan) -> float:
    compute = next(link.seconds for link in plan.links if link.name == "compute")
    return compute * plan.lanes / plan.subproblems


def _budget_error(plans: list[Plan], device_memory: int, host_memory: int, scratch_disk: int) -> BudgetError:
    """Name the budget that is too small, and the smallest that works."""
    on_disk = [plan for plan in plans if plan.scratch_disk <= scratch_disk]
    on_device = [plan for plan in on_disk if plan.peak_device <= device_memory]
    if not on_disk:
        smallest = min(plan.scratch_disk for plan in plans)
        return BudgetError(
            f"partials need at least {format_bytes(smallest)} of scratch on disk and {format_bytes(scratch_disk)} is "
            "free beside the result: make room, or leave --decomposition and --chunks to the plan"
        )
    if not on_device:
        name, budget, smallest = "device", device_memory, min(plan.peak_device for plan in on_disk)
    else:
        name, budget, smallest = "host", host_memory, min(plan.peak_host for plan in on_device)
    exact = -(-smallest // (1 << 20))
    return BudgetError(
        f"--{name}-memory {format_bytes(budget)} is too small for any tile of this problem: the smallest that works is "
        f"{exact}MiB"
    )
