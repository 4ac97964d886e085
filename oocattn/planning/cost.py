"""Cost of a division on a described machine: amount and seconds of each link. Pure arithmetic over records.

Seconds of a run. Links that work at the same time do not add up, the longest counts:

    compute   on a GPU its own, and what is between two subproblems; on a CPU it takes turns with Python, some of what bytes
              and scheduling take of the cores, and partials that its thread writes
    copy      between host and device
    disk      partials and write share it with read, unless that is from the page cache or a network, and add up
    files     a writer waits for one after another until it is on disk, which has room for others' bytes meanwhile
    python    the lock that lanes on GPUs share; it and tasks add up
    tasks     one scheduler serves all lanes; on a CPU, with what Python takes within them

and then what nothing overlaps with: the first staging before, and after it the last writing, its files, and the commit's.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

from oocattn.planning.amounts import Amounts
from oocattn.planning.decoding import times_decoded, times_keys_decoded
from oocattn.planning.interleaving import Holding, choose_holding
from oocattn.planning.layout import Candidate, Layout, lay_out
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
from oocattn.planning.memory import WRITERS, Tiles
from oocattn.planning.plan import Link, Plan
from oocattn.planning.python_lock import on_cpus, on_gpus
from oocattn.planning.waiting import asking, reading, sending
from oocattn.planning.work import calls_apart, edge_calls
from oocattn.problem.arrays import DTYPES
from oocattn.problem.problem import Problem

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
    amounts = Amounts(candidate, layout, problem, hardware.lanes, hardware.device)
    run = _Run(candidate, layout, amounts, problem, hardware, inputs, checkpoint_seconds, holding, to_store)
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
        scratch_disk=math.ceil(amounts.scratch_disk(saved=checkpoint_seconds > 0)),
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
    amounts: Amounts
    problem: Problem
    hardware: Hardware
    inputs: InputCost
    checkpoint_seconds: float
    holding: Holding
    to_store: bool

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """All links, in the order in which a plan prints them."""
        copy = [self._copy()] if self.hardware.device == "cuda" else []
        python = [self._python()] if self.hardware.device == "cuda" and self.hardware.locked_lanes > 1 else []
        return (self._read(), *copy, self._compute(), self._partials(), self._write(), self._files(), *python, self._tasks())

    @property
    def seconds(self) -> float:
        """The longest of the links that overlap, with what comes before and after them."""
        amounts, seconds = self.amounts, {link.name: link.seconds for link in self.links}
        of_disk = seconds["read"] if self.hardware.from_disk or self.inputs.from_disk else 0.0
        disk = of_disk + seconds["partials"] + seconds["write"]
        compute = seconds["compute"]
        if self.hardware.device == "cpu":
            written = amounts.handed_back if self.candidate.partials == "disk" else 0  # by the thread that attends
            waiting = TASK_SHARE * (self._scheduling_seconds + self._byte_seconds) + self._python_seconds
            waiting += written * self.hardware.file_seconds
            compute += waiting / (self.hardware.lanes * min(1.0, self.hardware.lane_cores))
        else:
            compute += amounts.subproblems * BETWEEN_SECONDS * amounts.balance
        last_files = self._waits(amounts.last_share) + RUN_FILES * self.hardware.file_seconds
        files = seconds["write"] + seconds["files"] - last_files  # that are written while others compute
        locked = seconds.get("python", 0.0) + seconds["tasks"]
        longest = max(compute, disk, files, seconds["read"], seconds.get("copy", 0.0), locked)
        apart = (
            self._fill() + asking(self.inputs, to_store=self.to_store) + amounts.last_share * seconds["write"] + last_files
        )
        return RUN_SECONDS + longest + apart + LAST_TASKS * self.hardware.task_seconds

    @cached_property
    def _python_seconds(self) -> float:
        """What Python takes within tasks, which on a CPU takes turns with computing."""
        if self.hardware.device == "cuda":
            return 0.0
        return on_cpus(self.amounts.reads, self.amounts.handed_back, on_disk=self.candidate.partials == "disk")

    @property
    def _byte_seconds(self) -> float:
        """What bytes that are read and written take of a core."""
        amount = {link.name: link.amount for link in self.links}
        return amount["read"] / CORE_READ_RATE + amount["write"] / CORE_WRITE_RATE

    @property
    def _scheduling_seconds(self) -> float:
        return self.amounts.tasks * self.hardware.task_seconds

    def _read(self) -> Link:
        problem, amounts, (queries, keys) = self.problem, self.amounts, self.amounts.staged
        amount = queries + keys
        once = min(amount, problem.input_bytes)
        factor, hardware = self.holding.factor, self.hardware
        seconds = once * factor / hardware.read_rate + (amount - once) / hardware.reread_rate
        if self.holding.groups:  # decoded in whole chunks, all heads at once
            decoded = once * factor / choose_holding(problem, self.inputs, 1, 0).factor
        else:
            unit = self.inputs.align_rows
            decoded = queries * times_decoded(problem.queries, self.layout.chunk_rows, unit)
            times = [times_keys_decoded(work.mask, self.layout.grid, unit) for work in amounts.work]
            of_keys = sum(work.head_groups * work.keys * each for work, each in zip(amounts.work, times, strict=True))
            decoded += of_keys * problem.kv_row_bytes
        in_python = amounts.gap_reads * READ_SECONDS if hardware.device == "cuda" else 0.0
        seconds = max(seconds, decoded / self.inputs.decode_rate)
        least = reading(seconds, amounts.subproblems, self.inputs, hardware)
        return Link("read", amount, max(seconds, least) + in_python)

    def _copy(self) -> Link:
        amounts, problem = self.amounts, self.problem
        states = 2 * amounts.handed_back * problem.state_bytes(self.layout.chunk_rows)
        amount = amounts.keys_copied * problem.kv_row_bytes + amounts.staged[0] + states
        return Link("copy", amount, amount * amounts.balance / self.hardware.copy_rate)

    @cached_property
    def _compute_seconds(self) -> float:
        amounts, tiles, hardware, problem = self.amounts, self.layout.tiles, self.hardware, self.problem
        rows = tiles.query * problem.group_size
        rate = hardware.kernel_flops * rows / (rows + hardware.half_rate_rows)
        if hardware.device == "cuda":
            seconds = problem.flops / (rate * tiles.key / (tiles.key + HALF_RATE_KEYS))
            apart = amounts.total(lambda work: calls_apart(work, problem)) * LAUNCH_SECONDS
            return (seconds + apart) * amounts.balance
        calls = amounts.handed_back
        calls += amounts.total(lambda work: edge_calls(work, problem, self.candidate.query_chunks))
        return (problem.flops / rate + calls * CALL_SECONDS) * amounts.balance

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
        amounts = self.amounts
        if self.candidate.partials == "memory":
            saved = self._saves * amounts.held * amounts.partial_file
            return Link("partials", saved, saved / self.hardware.write_rate)
        saved = amounts.handed_back * amounts.partial_file
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
        amounts = self.amounts
        reread = amounts.handed_back if self.candidate.partials == "disk" else 0
        others = RUN_FILES + self._saves * amounts.held + reread
        seconds = others * self.hardware.file_seconds + reread * REREAD_FILE_SECONDS
        return Link("files", others + amounts.chunk_files, self._waits(1.0) + seconds)

    def _waits(self, share: float) -> float:
        """Seconds for which the writers of a lane wait for a share of the files of finished chunks."""
        writers = min(WRITERS[self.hardware.device], max(1.0, share * self.amounts.out_chunks))
        return share * self.amounts.chunk_files / writers * self.hardware.file_seconds

    def _python(self) -> Link:
        """Calls of the kernel, reads and tiles of partials, of the lanes of one process."""
        share = self.hardware.locked_lanes / self.hardware.lanes
        counts = [share * each for each in (self.amounts.calls, self.amounts.reads_in_pieces, self.amounts.query_tiles)]
        return Link("python", sum(counts), on_gpus(*counts))

    def _tasks(self) -> Link:
        return Link("tasks", self.amounts.tasks, self._scheduling_seconds + self._python_seconds)

    def _fill(self) -> float:
        """Seconds until the first subproblem is staged."""
        slot, hardware = self.layout.slot, self.hardware
        pinned = slot / PIN_RATE if hardware.device == "cuda" else 0.0
        return pinned + max(hardware.lanes * slot / hardware.read_rate, slot / self.inputs.decode_rate)
