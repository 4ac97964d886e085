"""The `Plan` of a run: a frozen record that describes itself. `candidates` chooses one, `stored_plan` reads one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from oocattn.division.base import Division
from oocattn.division.drawing import draw_division
from oocattn.division.quorums import CyclicQuorums
from oocattn.division.strips import Strips
from oocattn.pins import Pins
from oocattn.planning.live import ChunkGrid, kept_with_mask, live_pairs
from oocattn.planning.machine import MAX_LANES, Device, InputCost, Machine
from oocattn.planning.memory import Buffers, Tiles, count_slots
from oocattn.planning.plan_text import plan_line, plan_text
from oocattn.problem.arrays import weights_dtype
from oocattn.problem.mask import Mask
from oocattn.problem.problem import Problem
from oocattn.records import ADDED, Count, Positive, Range, Seconds, document, to_json
from oocattn.shown import Shown, named_lines
from oocattn.units import MOST_SECONDS, format_seconds

FORMAT = 1
"""Of the JSON document."""

STOP_SECONDS = 1.0  # in which lanes stop and begin again, besides the subproblem in flight
STOPS_APART = 5  # by how many times as long lanes work before they stop for others


@dataclass(frozen=True)
class Link:
    """One resource that a run occupies: how much of it, for how many seconds."""

    name: str
    amount: float
    seconds: float


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Every decision before a run: what is given and chosen, down to `checkpoint_seconds`, and what follows from that.

    Seconds are predictions; peaks are upper bounds on what all lanes of a machine allocate, and budgets are a machine's.
    """

    problem: Problem
    machine: Machine
    inputs: InputCost
    decomposition: Literal["cqs", "strips"]
    query_chunks: Positive  # c with cqs
    chunks: Positive  # c, of the keys
    span: Count  # key chunks that a strip's subproblem reads; 0 for cqs
    partials: Literal["memory", "disk"]
    accumulators: Positive  # states of query chunks that a lane holds at a time
    tiles: Tiles
    device_memory: Positive
    host_memory: Positive
    checkpoint_seconds: Annotated[float, Range(0.0, MOST_SECONDS)]  # cost of a kill; 0: accumulators are not saved
    chunk_rows: Positive  # of a query chunk
    key_chunk_rows: Positive
    out_chunk_rows: Positive
    slot_bytes: Positive
    peak_device: Count
    peak_host: Count
    scratch_disk: Count
    links: tuple[Link, ...]
    seconds: Seconds
    held_groups: Annotated[Count, ADDED] = 0  # head groups whose interleaved rows a lane holds at a time
    read_factor: Annotated[float, Range(1.0, inf), ADDED] = 1.0  # how many times over inputs are read, that lie interleaved
    to_store: Annotated[bool, ADDED] = False  # whether the result is sent to a store, which takes copies
    totals_bytes: Annotated[Count, ADDED] = 0  # of what a GPU sums over the rows of a block of a survey

    @property
    def kernel(self) -> str:
        """The name of the kernel."""
        return self.machine.kernel

    @property
    def rounds_weights(self) -> bool:
        """True if the kernel rounds softmax weights to the inputs' dtype."""
        return self.machine.rounds_weights

    @property
    def weights_dtype(self) -> str:
        """The dtype of softmax weights; those of a precise plan are float32."""
        return weights_dtype(self.problem.dtype, self.rounds_weights)

    @property
    def device(self) -> Device:
        """Kind of device of the lanes."""
        return self.machine.device

    @property
    def lanes(self) -> int:
        """Lanes that the plan is for."""
        return self.machine.lanes

    @property
    def sharing_lanes(self) -> int:
        """The most lanes that share the budgets of one machine."""
        return self.machine.sharing_lanes

    @property
    def most_sharing_lanes(self) -> int:
        """The most lanes that take part on one machine: as planned where workers are left out, else as budgets have room."""
        if self.machine.most_lanes:
            return self.machine.most_lanes
        peaks = ((self.peak_device, self.device_memory), (self.peak_host, self.host_memory))
        room = (self.sharing_lanes * budget // peak for peak, budget in peaks if peak)
        return max(self.sharing_lanes, min(room, default=MAX_LANES))

    @property
    def threads(self) -> int:
        """Threads of a lane's kernel, on a CPU."""
        return self.machine.threads

    @property
    def grid(self) -> ChunkGrid:
        """The chunks of rows and keys."""
        start, stop = self.problem.rows_asked
        return ChunkGrid(start, stop, self.query_chunks, self.chunk_rows, self.chunks, self.key_chunk_rows)

    def mask(self, head_group: int) -> Mask:
        """The mask of a head group."""
        return self.problem.mask(head_group // self.problem.entry_groups)

    def division_of(self, head_group: int) -> Division:
        """The live chunk pairs of a head group, divided into subproblems."""
        return self._divided(self.mask(head_group))

    @property
    def divisions(self) -> Mapping[Division, int]:
        """The different divisions of head groups, and how many head groups have each."""
        return {self._divided(mask): self.problem.entry_groups * entries for mask, entries in self.problem.masks.items()}

    def _divided(self, mask: Mask) -> Division:
        return divide(mask, self.grid, self.decomposition, self.span)

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # without what follows from them

    @property
    def buffers(self) -> Buffers:
        """Host memory of a lane."""
        slots, rows = count_slots(self.device, self.inputs.ahead), (self.chunk_rows, self.out_chunk_rows)
        return Buffers(self.slot_bytes, slots, *rows, self.partials, self.accumulators, self.device, self.to_store)

    @cached_property
    def subproblems(self) -> int:
        """Subproblems over all head groups."""
        return sum(count * len(division.indices) for division, count in self.divisions.items())

    def link(self, name: str) -> Link:
        """The link of that name; one that this plan does not occupy is empty."""
        return next((link for link in self.links if link.name == name), Link(name, 0, 0.0))

    @property
    def subproblem_seconds(self) -> float:
        """Predicted time in which a lane computes a subproblem."""
        masks = self.problem.sampled_masks.items()
        subproblems = self.problem.entry_groups * sum(entries * len(self._divided(mask).indices) for mask, entries in masks)
        return self.link("compute").seconds * self.lanes / max(1, subproblems)

    @property
    def work_seconds(self) -> float:
        """Predicted time of what every plan does: the longer of computing, and reading inputs once and writing results."""
        read = min(self.problem.input_bytes, self.link("read").amount) / self.machine.read_rate
        write = self.link("write").seconds
        disk = read + write if self.machine.from_disk or self.inputs.from_disk else max(read, write)
        return max(self.link("compute").seconds, disk)

    @property
    def overhead_seconds(self) -> float:
        """Predicted time of tasks and files, which compute nothing."""
        return self.link("tasks").seconds + self.link("files").seconds

    @property
    def saves(self) -> bool:
        """True if accumulators in memory are saved at an interval."""
        return self.partials == "memory" and self.checkpoint_seconds > 0

    @property
    def joining_seconds(self) -> float:
        """Seconds after which lanes stop for workers that have joined, so that stops take a sixth of the time at most.

        They are no more than a checkpoint takes to come, and Inf where stopping would lose what lanes hold in memory.
        """
        if self.partials == "memory" and not self.saves:
            return inf
        often = STOPS_APART * (STOP_SECONDS + self.subproblem_seconds)
        return min(often, self.checkpoint_seconds / 2) if self.checkpoint_seconds else often

    @property
    def saving_seconds(self) -> float:
        """Predicted time to save all that lanes hold in memory."""
        held = self.lanes * min(self.accumulators, self.problem.head_groups * self.query_chunks)
        return self.scratch_disk / self.machine.write_rate + held * self.machine.file_seconds

    @property
    def fits(self) -> bool:
        """True if the plan keeps to its budgets of memory."""
        return self.peak_device <= self.device_memory and self.peak_host <= self.host_memory

    @property
    def scratch_fits(self) -> bool:
        """True if partials have room on disk."""
        return self.scratch_disk <= self.machine.scratch_disk

    @property
    def binds(self) -> str:
        """The link that takes longest; links that share the disk count together, and those that share Python."""
        reads = ("read",) if self.machine.from_disk or self.inputs.from_disk else ()
        disk = [link for link in self.links if link.name in (*reads, "partials", "write")]
        python = [link for link in self.links if link.name in ("python", "tasks")]
        alone = [[link] for link in self.links if link not in disk + python]
        longest = max([*alone, python, disk], key=lambda links: sum(link.seconds for link in links))
        return max(longest, key=lambda link: link.seconds).name

    @property
    def decisions(self) -> dict[str, str | int]:
        """All that determines the result's bits besides the problem, as it is hashed."""
        return {
            "decomposition": self.decomposition,
            "query_chunks": self.query_chunks,
            "chunks": self.chunks,
            "span": self.span,
            "chunk_rows": self.chunk_rows,
            "key_chunk_rows": self.key_chunk_rows,
            "out_chunk_rows": self.out_chunk_rows,
            "query_tile": min(self.tiles.query, self.tiles.key),
            "key_tile": self.tiles.key,
            "kernel": self.kernel,
        }

    @property
    def pins(self) -> Pins:
        """The arguments with which another run, of as many GPUs or on a CPU, computes the same bits."""
        return Pins(
            chunks=self.chunks,
            decomposition=self.decomposition,
            kernel=self.kernel,
            span=self.span,
            device_memory=None if self.device == "cpu" else self.device_memory,
        )

    @property
    def digest(self) -> str:
        """Identity of the result's bits: the problem, the division and the kernel."""
        text = json.dumps([to_json(self.problem), [*self.decisions.values()]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON document, with what follows from its fields (docs/scripts.md)."""
        return document(FORMAT, self, "subproblems", "binds", "digest", "pins")

    def query_rows(self, chunk: int) -> range:
        """The rows of q of a query chunk; those of the last chunks may be few or none."""
        return self.grid.rows(chunk)

    def key_rows(self, chunk: int) -> range:
        """The rows of k and v of a key chunk; those of the last chunks may be few or none."""
        return self.grid.keys(chunk, self.problem.keys)

    def out_rows(self, chunk: int) -> range:
        """The rows of `out` of a query chunk."""
        rows, start = self.query_rows(chunk), self.problem.rows_asked[0]
        return range(rows.start - start, rows.stop - start)

    def visualize(self, path: str | Path) -> Path:
        """Draw the chunk-pair matrix as an SVG file, a colour for each owning subproblem; return its path.

        Raises ResultExistsError where something is at `path` that oocattn has not drawn, and ProblemError where its folder
        does not exist or cannot be written to, or `path` does not end in .svg.
        """
        from oocattn.storage.files.outputs import write_drawing  # all else here is pure

        return write_drawing(path, draw_division(self.division_of(0), str(self.mask(0))))

    def _line(self) -> str:
        return plan_line(self)

    def _table(self) -> list[tuple[str, str]]:
        decided = named_lines(str(self).partition("\n\n")[0])
        seconds = ", ".join(f"{link.name} {format_seconds(link.seconds)}" for link in self.links)
        predicted = [("links", seconds), ("binds", self.binds), ("predicted", format_seconds(self.seconds))]
        return [*decided, *predicted, *(("note", note) for note in self.inputs.notes)]

    def __str__(self) -> str:
        return plan_text(self)


@kept_with_mask
def divide(mask: Mask, grid: ChunkGrid, decomposition: str, span: int) -> Division:
    """The division of a mask's live pairs that a plan names; a new decomposition is registered here."""
    live = live_pairs(mask, grid)
    return Strips(live, span) if decomposition == "strips" else CyclicQuorums(live)
