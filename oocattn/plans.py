"""The records of planning: what is known of the machine and the dataset, and the `Plan` that follows from them.

All are frozen and hold no behaviour beyond describing themselves; how a plan is chosen is in `planner`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from oocattn.drawing import draw_division
from oocattn.memory import Buffers, Tiles
from oocattn.problem import Problem
from oocattn.quorum import CyclicQuorums, Division
from oocattn.strips import Strips
from oocattn.text import printable
from oocattn.units import format_bytes, format_count, format_seconds


@dataclass(frozen=True)
class Hardware:
    """What a plan needs to know of the machine. Rates are in bytes/s and FLOP/s.

    `device` is "cpu" or "cuda". `kernel_flops` is one lane's rate on large tiles, `half_rate_rows` the query rows of a
    call at which it falls to half, `max_keys` the most keys of a call; `scratch_bytes(group_size, rows, keys, head_dim,
    dtype)` bounds what the kernel allocates. `copy_rate` is between host and device. `read_rate` and `write_rate` are the
    disk's, shared by all lanes, and `reread_rate` that of what was read before, from the page cache if it fits there;
    `scratch_disk` is the room for partials, in bytes, and `measuring_bytes` what finding all this out took on the device.
    """

    kernel: str
    kernel_flops: float
    scratch_bytes: Callable[[int, int, int, int, str], int]
    device: str = "cpu"
    half_rate_rows: int = 256
    max_keys: int = 1 << 16
    lanes: int = 1
    threads: int = 1
    copy_rate: float = 50e9
    read_rate: float = 1e9
    reread_rate: float = 1e9
    write_rate: float = 1e9
    task_seconds: float = 0.003
    scratch_disk: int = 1 << 60
    measuring_bytes: int = 0


@dataclass(frozen=True)
class InputCost:
    """What reading the dataset costs beyond its bytes.

    `decode_bytes` is the transient host memory of one read and `decode_rate` bytes/s, both through Zarr's codecs; chunks
    of tokens are best aligned to `align_rows`; `notes` say so in words.
    """

    decode_bytes: int = 0
    decode_rate: float = float("inf")
    align_rows: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """One resource that a run occupies: how many bytes (compute: floating-point operations), for how many seconds."""

    name: str
    amount: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything decided before a run. Seconds are predictions; peaks are upper bounds on what all lanes allocate."""

    problem: Problem
    decomposition: str  # "cqs" or "strips"
    chunks: int  # c
    span: int  # key chunks that a strip's subproblem reads; 0 for cqs
    chunk_rows: int
    out_chunk_rows: int
    kernel: str
    device: str  # "cpu" or "cuda"
    tiles: Tiles
    partials: str  # "memory" or "disk"
    accumulators: int  # states of query chunks that a lane holds at a time
    slot_bytes: int
    lanes: int
    threads: int
    device_memory: int
    host_memory: int
    peak_device: int
    peak_host: int
    scratch_disk: int
    checkpoint_seconds: float  # what a kill may cost; 0: what lanes hold in memory is never saved
    links: tuple[Link, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @cached_property
    def division(self) -> Division:
        """The chunk pairs of one head group, divided into subproblems."""
        return make_division(self.decomposition, self.chunks, self.span, self.problem.causal)

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
    def digest(self) -> str:
        """Identity of what determines the result bit for bit: the problem, the division and the kernel."""
        tiling = [self.chunk_rows, self.out_chunk_rows, min(self.tiles.query, self.tiles.key), self.tiles.key]
        decided = [self.decomposition, self.chunks, self.span, *tiling, self.kernel]
        text = json.dumps([asdict(self.problem), decided], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {**asdict(self), "digest": self.digest}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        fields = dict(content)
        digest = fields.pop("digest")
        problem, tiles = Problem(**fields.pop("problem")), Tiles(**fields.pop("tiles"))
        links = tuple(Link(**link) for link in fields.pop("links"))
        plan = cls(**fields | {"problem": problem, "tiles": tiles, "links": links, "notes": tuple(fields.pop("notes"))})
        if plan.digest != digest or plan.chunks * plan.chunk_rows < problem.tokens:
            raise ValueError("the plan does not fit its digest")
        return plan

    def tokens(self, chunk: int) -> range:
        """The token positions of a chunk; those of the last chunks may be few or none."""
        start = min(chunk * self.chunk_rows, self.problem.tokens)
        return range(start, min(start + self.chunk_rows, self.problem.tokens))

    def visualize(self, path: str | Path) -> Path:
        """Draw the chunk-pair matrix, coloured by the subproblem that owns each pair, as an SVG file; return its path.

        Raises ResultExistsError where something is at `path` that oocattn has not drawn, and ProblemError where its folder
        does not exist or cannot be written to.
        """
        return draw_division(self.division, Path(path))

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
            division = f"cyclic quorums over c = {shape}, k = {len(CyclicQuorums(self.chunks, False).quorum(0))}"
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
        return "\n".join(map(printable, [*lines, *(f"note: {note}" for note in self.notes)]))


def make_division(decomposition: str, chunks: int, span: int, causal: bool) -> Division:
    """The division that a plan names; a new decomposition is registered here."""
    if decomposition == "strips":
        return Strips(chunks, span, causal)
    return CyclicQuorums(chunks, causal)
