"""Records of a machine and of the cost of reading; `measure` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Annotated, Literal

from oocattn.problem.calls import ScratchBytes
from oocattn.records import ADDED, Count, Positive, Range, Seconds

Rate = Annotated[float, Range(1e-3, inf)]
"""Bytes, or floating-point operations, per second."""

Device = Literal["cpu", "cuda"]
"""Kind of device of the lanes."""

Engine = Literal["dask", "inline"]
"""Name of the engine that carries out the tasks of a run."""

MAX_LANES = 1024
"""The most lanes of a run; further workers take no part."""

TASK_SECONDS: dict[Engine, float] = {"dask": 0.0035, "inline": 0.0006}
"""Processor seconds of a task, besides reads and kernel calls: 2 cores, a task of nothing takes 1.9 and 0.06 ms."""

CACHE_RATE = 5e9
"""Bytes per second at least from the page cache; one thread reads 6 to 7 GB/s."""

FILE_SECONDS = 0.002
"""Seconds to write and sync a small file (ext4, SSD: 0.6 to 2.6 ms; tmpfs: 0.07)."""


def reread_rate(inputs: int, memory: int, read_rate: float) -> float:
    """Bytes per second of what was read before: from the page cache, if `inputs` bytes stay in half of the free `memory`."""
    return max(read_rate, CACHE_RATE) if inputs < memory // 2 else read_rate


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts of the machine that a plan records. Rates are in bytes/s and FLOP/s.

    `kernel_flops` is one lane's rate on large tiles, `half_rate_rows` the query rows of a call at which it falls to half,
    `max_keys` the most keys of a call; `rounds_weights` says whether the kernel rounds softmax weights to the inputs' dtype.
    Of the `lanes` at most `machine_lanes` are on one machine (0: all), and share its budgets and, on a CPU, its `cores` (0:
    one for each of their threads). At most `process_lanes` of these are in one process (0: all), and wait for its Python.
    `most_lanes` of a machine take part where others are left out (0: as many as the budgets have room for).
    `copy_rate` is between host and device. `read_rate` and `write_rate` are the disk's, shared by all lanes, and
    `reread_rate` that of data that was read before, from the page cache if it fits there. `from_disk` says whether inputs
    that are read as they lie come from the disk, which has less time to write then: not where the page cache has them.
    `task_seconds` is the cost of a task, `file_seconds` that of a durable file beside its bytes. `scratch_disk` is the room
    for partials, in bytes, and `measuring_bytes` the device memory that measuring took.
    """

    kernel: str
    kernel_flops: Rate
    device: Device = "cpu"
    half_rate_rows: Positive = 256
    max_keys: Positive = 1 << 16
    rounds_weights: bool = False
    lanes: Annotated[int, Range(1, MAX_LANES)] = 1
    machine_lanes: Annotated[int, Range(0, MAX_LANES), ADDED] = 0
    process_lanes: Annotated[int, Range(0, MAX_LANES), ADDED] = 0
    most_lanes: Annotated[int, Range(0, MAX_LANES), ADDED] = 0
    threads: Annotated[int, Range(1, 1 << 16)] = 1
    cores: Annotated[int, Range(0, 1 << 16), ADDED] = 0
    copy_rate: Rate = 50e9
    read_rate: Rate = 1e9
    reread_rate: Rate = 1e9
    from_disk: Annotated[bool, ADDED] = True
    write_rate: Rate = 1e9
    task_seconds: Seconds = TASK_SECONDS["dask"]
    file_seconds: Seconds = FILE_SECONDS
    scratch_disk: Count = 1 << 60
    measuring_bytes: Count = 0

    @property
    def sharing_lanes(self) -> int:
        """The most lanes that share the budgets of one machine."""
        return min(self.lanes, self.machine_lanes or self.lanes)

    @property
    def locked_lanes(self) -> int:
        """The most lanes that share Python's lock, in one process."""
        return min(self.sharing_lanes, self.process_lanes or self.sharing_lanes)

    @property
    def lane_cores(self) -> float:
        """The cores that a lane's threads have at a time, its share of the machine's at most."""
        return min(self.threads, self.cores / self.sharing_lanes) if self.cores else self.threads


@dataclass(frozen=True, kw_only=True)
class Hardware(Machine):
    """A machine, and a bound on its kernel's allocation, which is not recorded."""

    scratch_bytes: ScratchBytes

    @property
    def machine(self) -> Machine:
        """The part that a plan records."""
        return Machine(**{field.name: getattr(self, field.name) for field in fields(Machine)})


@dataclass(frozen=True)
class InputCost:
    """Cost of reading the dataset beyond its bytes.

    `decode_bytes` is the transient host memory of one read and `decode_rate` bytes/s, both through Zarr's codecs; chunks
    of tokens are best aligned to `align_rows`; `notes` say so in words. `shared_heads` has the tensors of which other heads
    are read as soon as one is, and how many; `packed` says that q, k and v lie in one, and are read together. Where a store
    lets each request wait, for `latency` seconds, `ahead` bytes are decoded at a time by several reads, which `decode_bytes`
    counts; 0 stands for one read at a time. `from_disk` is as a machine's, of inputs that are decoded.
    """

    decode_bytes: Count = 0
    decode_rate: Rate = inf
    align_rows: Positive = 1
    notes: tuple[str, ...] = ()
    shared_heads: Annotated[Mapping[str, Positive], ADDED] = field(default_factory=dict)
    packed: Annotated[bool, ADDED] = False
    ahead: Annotated[Count, ADDED] = 0
    latency: Annotated[Seconds, ADDED] = 0.0
    from_disk: Annotated[bool, ADDED] = False
