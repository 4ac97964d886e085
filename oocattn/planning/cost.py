"""Cost of a division on a described machine: amount and seconds of each link. Pure arithmetic over records.

Seconds of a run. Links that work at the same time do not add up, the longest counts:

    compute   on a GPU its own, and what is between two subproblems; on a CPU it takes turns with Python, some of what bytes
              and scheduling take of the cores, and partials that its thread writes
    copy      between host and device
    disk      partials and write share it with read, unless that is from the page cache or a network, and add up
    files     a writer waits for one after another until it is on disk, which has room for others' bytes meanwhile
    tasks     one scheduler serves all lanes; on a CPU, with what Python takes within them; on GPUs lanes share Python's lock

and then what nothing overlaps with: the first staging before, and after it the last writing, its files, and the commit's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from oocattn.planning.decoding import times_decoded, times_keys_decoded
from oocattn.planning.interleaving import Holding, choose_holding
from oocattn.planning.layout import Candidate, Layout, lay_out
from oocattn.planning.live import keys_needed, row_edges
from oocattn.planning.machine import Hardware, InputCost
from oocattn.planning.measured import (
    BETWEEN_SECONDS,
    CALL_SECONDS,
    CORE_READ_RATE,
    CORE_WRITE_RATE,
    HALF_RATE_KEYS,
    LAUNCH_SECONDS,
    PIN_RATE,
    READ_SECONDS,
    REREAD_FILE_SECONDS,
    RUN_FILES,
    RUN_SECONDS,
    TASK_SHARE,
)
from oocattn.planning.memory import WRITERS, Tiles, partial_file_bytes, sums_bytes
from oocattn.planning.options import MOST_UNFINISHED, PIECE
from oocattn.planning.plan import Link, Plan
from oocattn.planning.python_lock import on_cpus, on_gpus
from oocattn.planning.waiting import asking, reading, sending
from oocattn.planning.work import Work, calls_apart, edge_calls, work_of
from oocattn.problem.arrays import DTYPES
from oocattn.problem.problem import Problem
from oocattn.units import ceil_div

LAST_TASKS = 4  # tasks one after another: the first stage and attend, the last merge and write


def cost(
    candidate: Candidate,
    problem: Problem,
    hardware: Hardware,
    inputs: InputCost,
    device_memory: int,
    host_memory: int,
    checkpoint_seconds: float,
    tiles: Tiles | None = None,
    *,
    to_store: bool = False,
) -> Plan:
    """Cost one candidate: tiles (unless given), memory, bytes a link and seconds."""
    layout = lay_out(candidate, problem, hardware, inputs, device_memory // hardware.sharing_lanes, tiles, to_store=to_store)
    holding = choose_holding(problem, inputs, hardware.lanes, host_memory // hardware.sharing_lanes - layout.host)
    run = _Run(candidate, layout, problem, hardware, inputs, checkpoint_seconds, holding, to_store)
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
        key_chunk_rows=layout.grid.key_chunk_rows,
        out_chunk_rows=layout.out_chunk_rows,
        slot_bytes=layout.slot,
        peak_device=layout.device * hardware.sharing_lanes,
        peak_host=(layout.host + holding.nbytes) * hardware.sharing_lanes,
        scratch_disk=math.ceil(run.scratch_disk),
        links=run.links,
        seconds=run.seconds,
        held_groups=holding.groups,
        read_factor=holding.factor,
        to_store=to_store,
        totals_bytes=layout.totals,
    )


@dataclass(frozen=True)
class _Run:
    """A run of a candidate: the links that it occupies, and how long it takes."""

    candidate: Candidate
    layout: Layout
    problem: Problem
    hardware: Hardware
    inputs: InputCost
    checkpoint_seconds: float
    holding: Holding
    to_store: bool

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """All links, in the order in which a plan prints them."""
        copy, python = ([self._copy()], [self._python()]) if self.hardware.device == "cuda" else ([], [])
        return (self._read(), *copy, self._compute(), self._partials(), self._write(), self._files(), *python, self._tasks())

    @property
    def seconds(self) -> float:
        """The longest of the links that overlap, with what comes before and after them."""
        seconds = {link.name: link.seconds for link in self.links}
        of_disk = seconds["read"] if self.hardware.from_disk or self.inputs.from_disk else 0.0
        disk = of_disk + seconds["partials"] + seconds["write"]
        compute = seconds["compute"]
        if self.hardware.device == "cpu":
            written = self._handed_back if self.candidate.partials == "disk" else 0  # by the thread that attends
            waiting = TASK_SHARE * (self._scheduling_seconds + self._byte_seconds) + self._python_seconds
            waiting += written * self.hardware.file_seconds
            compute += waiting / (self.hardware.lanes * min(1.0, self.hardware.lane_cores))
        else:
            compute += self._total(lambda work: work.subproblems) * BETWEEN_SECONDS * self._balance
        last_files = (self._last_share * self._chunk_files + RUN_FILES) * self.hardware.file_seconds
        files = seconds["write"] + seconds["files"] - last_files  # that are written while others compute
        locked = seconds.get("python", 0.0) + seconds["tasks"]
        longest = max(compute, disk, files, seconds["read"], seconds.get("copy", 0.0), locked)
        apart = self._fill() + asking(self.inputs, to_store=self.to_store) + self._last_share * seconds["write"] + last_files
        return RUN_SECONDS + longest + apart + LAST_TASKS * self.hardware.task_seconds

    @property
    def scratch_disk(self) -> float:
        """The bytes that partials take on disk at most at a time, and sums over their rows."""
        lanes, chunk_rows = self.hardware.lanes, ceil_div(self.problem.out_rows, self.candidate.query_chunks)
        sums = sums_bytes(self.problem, self._handed_back, self._total(lambda work: work.keys_of_blocks), chunk_rows)
        if self.candidate.partials == "disk":
            # Head groups whose chunks are not written yet.
            waiting = (MOST_UNFINISHED + 4 * PIECE) * lanes / self.candidate.query_chunks
            of_group = max(work.query_chunks for work in self._work)
            return sums + min(self.problem.head_groups, 2 + waiting) * of_group * self._partial_file
        return sums + ((self._held + lanes) * self._partial_file if self.checkpoint_seconds else 0)  # a lane replaces one

    @cached_property
    def _work(self) -> list[Work]:
        """The head groups by their mask."""
        divided = self.layout.grid, self.candidate.decomposition, self.candidate.span
        return [
            work_of(mask, entries * self.problem.entry_groups, *divided)
            for mask, entries in self.problem.sampled_masks.items()
        ]

    def _total(self, amount: Callable[[Work], int]) -> int:
        """An amount over all head groups."""
        return sum(work.head_groups * amount(work) for work in self._work)

    @property
    def _group_heads(self) -> float:
        """Query heads of a head group, in the mean."""
        return self.problem.out_heads / self.problem.entry_groups

    @cached_property
    def _python_seconds(self) -> float:
        """What Python takes within tasks, which on a CPU takes turns with computing."""
        if self.hardware.device == "cuda":
            return 0.0
        reads = self._group_heads * self._handed_back + 2 * self._total(lambda work: work.key_chunks) + self._gap_reads
        return on_cpus(reads, self._handed_back, on_disk=self.candidate.partials == "disk")

    @property
    def _byte_seconds(self) -> float:
        """What bytes that are read and written take of a core."""
        amount = {link.name: link.amount for link in self.links}
        return amount["read"] / CORE_READ_RATE + amount["write"] / CORE_WRITE_RATE

    @property
    def _gap_reads(self) -> float:
        """Reads that gaps within chunks add."""
        return self._group_heads * self._total(lambda work: work.query_gaps) + 2 * self._total(lambda work: work.key_gaps)

    @cached_property
    def _task_count(self) -> int:
        return 2 * (self._total(lambda work: work.subproblems) + self.problem.head_groups * self.candidate.query_chunks)

    @property
    def _scheduling_seconds(self) -> float:
        return self._task_count * self.hardware.task_seconds

    @property
    def _query_bytes(self) -> float:
        """Bytes of a row of q over the heads of a head group."""
        return self.problem.query_row_bytes * self._group_heads

    @cached_property
    def _handed_back(self) -> int:
        """Partials of the run."""
        return self._total(lambda work: work.query_chunks)

    @property
    def _held(self) -> int:
        """Accumulators that a checkpoint saves, over all lanes."""
        everything = self.problem.head_groups * self.candidate.query_chunks
        return self.hardware.lanes * min(self.candidate.accumulators, everything)

    @property
    def _partial_file(self) -> int:
        return partial_file_bytes(self.problem, self.layout.chunk_rows)

    @cached_property
    def _balance(self) -> float:
        """The share of all pairs of the busiest lane, as `pipelines.schedule` divides."""
        problem, lanes = self.problem, self.hardware.lanes
        if lanes == 1:
            return 1.0
        if self.candidate.partials == "disk":
            subproblems = max(1, self._total(lambda work: work.subproblems))
            return ceil_div(subproblems, lanes) / subproblems
        rounds, rest = divmod(problem.head_groups, lanes)
        if not rest:
            return rounds / problem.head_groups
        work = self._work[0]
        pairs = np.asarray(work.mask.pairs_between(row_edges(self.layout.grid, self.layout.chunk_rows)), np.float64)
        of_lanes = np.bincount(work.division.chunk_lanes(lanes), weights=pairs, minlength=lanes)
        most = np.sum([np.roll(of_lanes, group) for group in range(rest)], axis=0).max()  # the next one's begin one lane on
        return (rounds + float(most / max(1.0, pairs.sum()))) / problem.head_groups

    @cached_property
    def _staged(self) -> tuple[float, float]:
        """Bytes of queries that are staged, and of keys."""
        queries = self._handed_back * self.layout.chunk_rows * self._query_bytes
        return queries, self._total(lambda work: work.keys) * self.problem.kv_row_bytes

    def _read(self) -> Link:
        problem, queries, amount = self.problem, self._staged[0], sum(self._staged)
        once = min(amount, problem.input_bytes)
        factor, hardware = self.holding.factor, self.hardware
        seconds = once * factor / hardware.read_rate + (amount - once) / hardware.reread_rate
        if self.holding.groups:  # decoded in whole chunks, all heads at once
            decoded = once * factor / choose_holding(problem, self.inputs, 1, 0).factor
        else:
            unit = self.inputs.align_rows
            decoded = queries * times_decoded(problem.queries, self.layout.chunk_rows, unit)
            times = [times_keys_decoded(work.mask, self.layout.grid, unit) for work in self._work]
            of_keys = sum(work.head_groups * work.keys * each for work, each in zip(self._work, times, strict=True))
            decoded += of_keys * problem.kv_row_bytes
        in_python = self._gap_reads * READ_SECONDS if hardware.device == "cuda" else 0.0
        seconds = max(seconds, decoded / self.inputs.decode_rate)
        least = reading(seconds, self._total(lambda work: work.subproblems), self.inputs, hardware)
        return Link("read", amount, max(seconds, least) + in_python)

    def _copy(self) -> Link:
        problem, tiles = self.problem, self.layout.tiles
        rows = min(tiles.query, self.layout.chunk_rows)
        keys = self._total(lambda work: self._keys_copied(work, rows)) * problem.kv_row_bytes
        amount = keys + self._staged[0] + 2 * self._handed_back * problem.state_bytes(self.layout.chunk_rows)
        return Link("copy", amount, amount * self._balance / self.hardware.copy_rate)

    def _keys_copied(self, work: Work, rows: int) -> int:
        """Keys that go to the device for tiles of so many rows: all that any of the rows attends."""
        simple = work.mask.is_simple
        return ceil_div(work.pairs, rows) if simple else keys_needed(work.mask, self.layout.grid, rows)[0]

    @cached_property
    def _compute_seconds(self) -> float:
        tiles, hardware, rows = self.layout.tiles, self.hardware, self.layout.tiles.query * self.problem.group_size
        rate = hardware.kernel_flops * rows / (rows + hardware.half_rate_rows)
        if hardware.device == "cuda":
            seconds = self.problem.flops / (rate * tiles.key / (tiles.key + HALF_RATE_KEYS))
            apart = self._total(lambda work: calls_apart(work, self.problem)) * LAUNCH_SECONDS
            return (seconds + apart) * self._balance
        calls = self._handed_back
        calls += self._total(lambda work: edge_calls(work, self.problem, self.candidate.query_chunks))
        return (self.problem.flops / rate + calls * CALL_SECONDS) * self._balance

    def _compute(self) -> Link:
        return Link("compute", self.problem.flops, self._compute_seconds)

    @property
    def _saves(self) -> int:
        """Checkpoints of all that lanes hold in memory."""
        if self.candidate.partials == "disk" or not self.checkpoint_seconds:
            return 0
        return int(self._compute_seconds // (self.checkpoint_seconds / 2))

    def _partials(self) -> Link:
        """Bytes of partials in files, which are read back, or of checkpoints."""
        if self.candidate.partials == "memory":
            saved = self._saves * self._held * self._partial_file
            return Link("partials", saved, saved / self.hardware.write_rate)
        saved = self._handed_back * self._partial_file
        return Link("partials", 2 * saved, saved / self.hardware.write_rate + saved / self.hardware.read_rate)

    def _write(self) -> Link:
        problem = self.problem
        written = problem.rows * (problem.columns * DTYPES[problem.out_dtype] + 4)  # of out and lse
        seconds = written / self.hardware.write_rate
        if self.to_store:
            seconds = sending(written, problem, self.layout.out_chunk_rows, self.inputs, self.hardware)
        return Link("write", written, seconds)

    def _files(self) -> Link:
        """Durable files: partials or checkpoints, `out` and `lse`, and journal entries."""
        reread = self._handed_back if self.candidate.partials == "disk" else 0
        files = RUN_FILES + self._chunk_files + self._saves * self._held + reread
        waits = files - self._chunk_files + self._chunk_files / WRITERS[self.hardware.device]
        return Link("files", files, waits * self.hardware.file_seconds + reread * REREAD_FILE_SECONDS)

    @property
    def _chunk_files(self) -> int:
        """Files of finished query chunks: `out`, `lse` and an entry of the journal."""
        problem, layout = self.problem, self.layout
        chunks = problem.head_groups * ceil_div(problem.out_rows, layout.chunk_rows)
        return chunks + 2 * problem.batch * problem.out_heads * ceil_div(problem.out_rows, layout.out_chunk_rows)

    def _python(self) -> Link:
        """Calls of the kernel, reads and partials of the lanes of one machine."""
        layout, share = self.layout, self.hardware.sharing_lanes / self.hardware.lanes
        rows = min(layout.tiles.query, layout.chunk_rows)
        calls = share * self._total(lambda work: self._keys_copied(work, rows)) / layout.tiles.key
        return Link("python", *on_gpus(calls, share * sum(self._staged), share * self._handed_back))

    def _tasks(self) -> Link:
        return Link("tasks", self._task_count, self._scheduling_seconds + self._python_seconds)

    def _fill(self) -> float:
        """Seconds until the first subproblem is staged."""
        slot, hardware = self.layout.slot, self.hardware
        pinned = slot / PIN_RATE if hardware.device == "cuda" else 0.0
        return pinned + max(hardware.lanes * slot / hardware.read_rate, slot / self.inputs.decode_rate)

    @cached_property
    def _last_share(self) -> float:
        """The share of all rows that is written after the last computing; on a GPU that of the last tiles only."""
        layout, lanes = self.layout, self.hardware.lanes
        last = layout.query_chunks * layout.chunk_rows
        if self.hardware.device == "cuda" and self.candidate.partials == "memory":
            tile = layout.chunk_rows % layout.tiles.query or layout.tiles.query  # the last one
            last = layout.chunk_rows - (layout.chunk_rows - tile) // layout.out_chunk_rows * layout.out_chunk_rows
        return min(1.0, lanes * last / (self.candidate.query_chunks * layout.chunk_rows * self.problem.head_groups))
