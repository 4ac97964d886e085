"""The records of planning: what is known of the machine and the dataset, and the `Plan` that follows from them.

All are frozen and hold no behaviour beyond describing themselves; how a plan is chosen is in `planner`, and how one that is
read from a file is checked in `stored_plan`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from oocattn.division.base import Division
from oocattn.division.drawing import draw_division
from oocattn.division.quorums import CyclicQuorums, quorum_size
from oocattn.division.strips import Strips
from oocattn.planning.memory import Buffers, Tiles
from oocattn.problem.mask import Mask
from oocattn.problem.problem import Problem
from oocattn.records import Count, Positive, Range, Seconds, to_json
from oocattn.storage.files.outputs import write_drawing
from oocattn.text import printable
from oocattn.units import MOST_SECONDS, format_bytes, format_count, format_seconds

ScratchBytes = Callable[[int, int, int, int, str, int], int]
"""Bounds what a kernel allocates: (group_size, rows, keys, head_dim, dtype, threads) to bytes."""

Rate = Annotated[float, Range(1e-3, inf)]
"""Bytes, or floating-point operations, per second."""

Device = Literal["cpu", "cuda"]
"""Where lanes are."""

MAX_LANES = 1024
"""Lanes of a run: of more workers than that, the others take no part."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan records of the machine. Rates are in bytes/s and FLOP/s.

    `kernel_flops` is one lane's rate on large tiles, `half_rate_rows` the query rows of a call at which it falls to half,
    `max_keys` the most keys of a call; `rounds_weights` says whether the kernel rounds softmax weights to the inputs' dtype.
    `copy_rate` is between host and device. `read_rate` and `write_rate` are the disk's,
    shared by all lanes, and `reread_rate` that of what was read before, from the page cache if it fits there; `scratch_disk`
    is the room for partials, in bytes, and `measuring_bytes` what finding all this out took on the device.
    """

    kernel: str
    kernel_flops: Rate
    device: Device = "cpu"
    half_rate_rows: Positive = 256
    max_keys: Positive = 1 << 16
    rounds_weights: bool = False
    lanes: Annotated[int, Range(1, MAX_LANES)] = 1
    threads: Annotated[int, Range(1, 1 << 16)] = 1
    copy_rate: Rate = 50e9
    read_rate: Rate = 1e9
    reread_rate: Rate = 1e9
    write_rate: Rate = 1e9
    task_seconds: Seconds = 0.003
    scratch_disk: Count = 1 << 60
    measuring_bytes: Count = 0


@dataclass(frozen=True, kw_only=True)
class Hardware(Machine):
    """What a plan needs to know of the machine: what it records, and what the kernel allocates."""

    scratch_bytes: ScratchBytes

    @property
    def machine(self) -> Machine:
        """What a plan records of it."""
        return Machine(**{field.name: getattr(self, field.name) for field in fields(Machine)})


@dataclass(frozen=True)
class InputCost:
    """What reading the dataset costs beyond its bytes.

    `decode_bytes` is the transient host memory of one read and `decode_rate` bytes/s, both through Zarr's codecs; chunks
    of tokens are best aligned to `align_rows`; `notes` say so in words.
    """

    decode_bytes: Count = 0
    decode_rate: Rate = inf
    align_rows: Positive = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """One resource that a run occupies: how many bytes (compute: floating-point operations), for how many seconds."""

    name: str
    amount: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything decided before a run. Seconds are predictions; peaks are upper bounds on what all lanes allocate.

    What is given and chosen comes first, down to `checkpoint_seconds`; all else follows from that.
    """

    problem: Problem
    machine: Machine
    inputs: InputCost
    decomposition: Literal["cqs", "strips"]
    chunks: Positive  # c
    span: Count  # key chunks that a strip's subproblem reads; 0 for cqs
    partials: Literal["memory", "disk"]
    accumulators: Positive  # states of query chunks that a lane holds at a time
    tiles: Tiles
    device_memory: Positive
    host_memory: Positive
    checkpoint_seconds: Annotated[
        float, Range(0.0, MOST_SECONDS)
    ]  # what a kill may cost; 0: partials in memory are not saved
    chunk_rows: Positive
    out_chunk_rows: Positive
    slot_bytes: Positive
    peak_device: Count
    peak_host: Count
    scratch_disk: Count
    links: tuple[Link, ...]
    seconds: Seconds

    @property
    def kernel(self) -> str:
        """The name of the kernel."""
        return self.machine.kernel

    @property
    def rounds_weights(self) -> bool:
        """Whether the kernel rounds softmax weights to the inputs' dtype: `verify` allows more then."""
        return self.machine.rounds_weights

    @property
    def device(self) -> Device:
        """Where the lanes are."""
        return self.machine.device

    @property
    def lanes(self) -> int:
        """How many lanes the plan is for."""
        return self.machine.lanes

    @property
    def threads(self) -> int:
        """Threads of a lane's kernel, on a CPU."""
        return self.machine.threads

    @cached_property
    def division(self) -> Division:
        """The chunk pairs of one head group, divided into subproblems."""
        return make_division(self.decomposition, self.chunks, self.span, self.problem.mask)

    @property
    def buffers(self) -> Buffers:
        """What a lane keeps in host memory."""
        return Buffers(self.slot_bytes, self.chunk_rows, self.out_chunk_rows, self.partials, self.accumulators, self.device)

    @property
    def subproblems(self) -> int:
        """Subproblems over all head groups."""
        return self.division.subproblems * self.problem.head_groups

    @property
    def subproblem_seconds(self) -> float:
        """How long a lane is predicted to compute a subproblem."""
        compute = next(link.seconds for link in self.links if link.name == "compute")
        return compute * self.lanes / self.subproblems

    @property
    def saves(self) -> bool:
        """Whether what lanes hold in memory is saved."""
        return self.partials == "memory" and self.checkpoint_seconds > 0

    @property
    def binds(self) -> str:
        """What takes longest: compute, copy or tasks, or, where the links that share the disk do, the largest of them."""
        alone = [link for link in self.links if link.name in ("compute", "copy", "tasks")]
        disk = [link for link in self.links if link not in alone]
        longest = max(alone, key=lambda link: link.seconds)
        if sum(link.seconds for link in disk) > longest.seconds:
            longest = max(disk, key=lambda link: link.seconds)
        return longest.name

    @property
    def decided(self) -> dict[str, str | int]:
        """What determines the result bit for bit besides the problem, in the order in which it is hashed."""
        return {
            "decomposition": self.decomposition,
            "chunks": self.chunks,
            "span": self.span,
            "chunk_rows": self.chunk_rows,
            "out_chunk_rows": self.out_chunk_rows,
            "query_tile": min(self.tiles.query, self.tiles.key),
            "key_tile": self.tiles.key,
            "kernel": self.kernel,
        }

    @property
    def digest(self) -> str:
        """Identity of what determines the result bit for bit: the problem, the division and the kernel."""
        text = json.dumps([asdict(self.problem), [*self.decided.values()]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready values; `stored_plan.read_plan` reads it."""
        content: dict[str, Any] = to_json(self)
        return content

    def tokens(self, chunk: int) -> range:
        """The token positions of a chunk; those of the last chunks may be few or none."""
        start = min(chunk * self.chunk_rows, self.problem.tokens)
        return range(start, min(start + self.chunk_rows, self.problem.tokens))

    def visualize(self, path: str | Path) -> Path:
        """Draw the chunk-pair matrix, coloured by the subproblem that owns each pair, as an SVG file; return its path.

        Raises ResultExistsError where something is at `path` that oocattn has not drawn, and ProblemError where its folder
        does not exist or cannot be written to, or `path` does not end in .svg.
        """
        return write_drawing(path, draw_division(self.division, str(self.problem.mask)))

    def _partials(self) -> str:
        if self.partials == "disk":
            return "merged in files"
        kept = f"saved every {format_seconds(self.checkpoint_seconds / 2)}" if self.saves else "never saved"
        return f"merged in memory, {kept}"

    def _lanes(self) -> str:
        if self.device == "cpu":
            return f"{self.lanes} lane{'s' * (self.lanes > 1)}, {self.threads} threads each"
        gpus = f"{self.lanes} GPU{'s' * (self.lanes > 1)}"
        return f"{gpus}, tiles of {self.tiles.query:,} queries by {self.tiles.key:,} keys"

    def __str__(self) -> str:
        shape = f"{self.chunks} chunk{'s' * (self.chunks > 1)} of {self.chunk_rows:,} tokens"
        if self.decomposition == "cqs":
            division = f"cyclic quorums over c = {shape}, k = {quorum_size(self.chunks)}"
        else:
            division = f"strips over c = {shape}, {self.span} key chunk{'s' * (self.span > 1)} at a time"
        lines = [
            f"problem      {self.problem}",
            f"division     {division}; {self.subproblems:,} subproblems",
            f"kernel       {self.kernel}, {self._lanes()}",
            f"partials     {self._partials()}, at most {format_bytes(self.scratch_disk)} of scratch on disk",
            f"peak memory  host {format_bytes(self.peak_host)} of {format_bytes(self.host_memory)}, "
            f"device {format_bytes(self.peak_device)} of {format_bytes(self.device_memory)}",
            "",
            f"{'link':<12} {'amount':>12} {'seconds':>9}",
        ]
        for link in self.links:
            amount = f"{format_count(link.amount)}{'' if link.name == 'tasks' else 'FLOP'}"
            if link.name not in ("compute", "tasks"):
                amount = format_bytes(link.amount)
            mark = "  <- binds" if link.name == self.binds else ""
            lines.append(f"{link.name:<12} {amount:>12} {link.seconds:>9.3g}{mark}")
        lines.append(f"{'predicted':<12} {'':>12} {self.seconds:>9.3g}  ({format_seconds(self.seconds)})")
        return "\n".join(map(printable, [*lines, *(f"note: {note}" for note in self.inputs.notes)]))


def make_division(decomposition: str, chunks: int, span: int, mask: Mask) -> Division:
    """The division that a plan names, of the pairs that a mask attends; a new decomposition is registered here."""
    if decomposition == "strips":
        return Strips(chunks, span, mask.triangular)
    return CyclicQuorums(chunks, mask.triangular)
