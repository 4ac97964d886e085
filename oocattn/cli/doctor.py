"""Checks of this machine and installation: what is here, how fast it is, and whether its kernels compute what they must.

Every check is independent of the others and leaves nothing behind; printing them and the exit code are `cli`'s.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import zarr
from zarr.storage import MemoryStore

from oocattn import clock
from oocattn.forks import refuse_lost_gpus, refuse_lost_threads
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.merging import finalise
from oocattn.kernels.registry import device_type, get_kernel, kernel_names
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.plain_threads import plain_threads
from oocattn.planning.kernel_rates import Sample, copy_rates, kernel_rate
from oocattn.problem.arrays import DTYPES
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores
from oocattn.records import document
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.files.durable import sync_descriptor
from oocattn.storage.files.operations import describe_error
from oocattn.storage.files.regular import advise
from oocattn.units import format_bytes, format_count
from oocattn.verification.rounding import UNIT_ROUNDOFF
from oocattn.version import versions

FORMAT = 1
"""Of the JSON document."""

DISK_BYTES = 64 << 20  # written and read to measure the disk
ROWS, HEAD_DIM = 1000, 64  # queries, keys and head dimension on which a kernel is compared: no multiple of any tile
TIMED = {"cpu": (1024, 4096), "cuda": (16_384, 65_536)}  # rows and keys of the calls on which a kernel is timed
_EDGES = np.array([0, 300, 303, ROWS])  # documents of the masked case
KERNEL_CASES: dict[str, tuple[Mask, float | None]] = {
    "full": (Mask.of(ROWS, ROWS), None),
    "diagonal": (Mask.of(ROWS, ROWS, causal=True), None),
    "masked": (Mask(_EDGES, _EDGES, causal=True, left=199, sinks=4), 5.0),
}
"""What a kernel is tried on: a mask, and a softcap. The last is a window with sinks over packed documents."""

LSE_ERROR = 1e-5  # how far the log-sum-exp may be from that of float64


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, whether it is as it must be, and what was found."""

    name: str
    passed: bool
    found: str

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED':<6}  {self.name:<28}  {self.found}"


@dataclass(frozen=True)
class Examination:
    """All checks, as far as they were made."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The checks as a JSON document (docs/scripts.md)."""
        return document(FORMAT, self, "passed")


def examine() -> Iterator[Check]:
    """Look at everything, one check at a time. Raises ProblemError in a fork where computing would never end or begin."""
    refuse_lost_threads()
    if torch.cuda.is_available():
        refuse_lost_gpus()
    yield Check("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Check("versions", True, ", ".join(f"{name} {version}" for name, version in versions().items()))
    yield _attempt("cores and memory", _machine)
    yield _attempt("disk in this folder", _disk)
    for index in range(torch.cuda.device_count()):
        yield _attempt(f"GPU {index}", partial(_gpu, index))
    for kernel in kernel_names():
        yield from _kernel_checks(kernel)
    yield _attempt("bfloat16 in Zarr", _bfloat16)
    yield _attempt("dashboard on the loopback", _dashboard)


def _attempt(name: str, look: Callable[[], tuple[bool, str]]) -> Check:
    """The outcome of a check; whatever it raises is a finding, and the checks after it still run."""
    try:
        with plain_threads(1, "oocattn-doctor") as thread:
            return Check(name, *thread.submit(look).result())
    except Exception as error:
        return Check(name, False, describe_error(error))


def _machine() -> tuple[bool, str]:
    memory = psutil.virtual_memory()
    return True, (
        f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads; "
        f"{format_bytes(memory.total)} of memory, {format_bytes(memory.available)} free"
    )


def _disk() -> tuple[bool, str]:
    """Rates of the disk under the current folder: writing up to fsync, and reading what the page cache was told to drop."""
    block = os.urandom(DISK_BYTES)
    with tempfile.TemporaryFile(dir=".", buffering=0) as file:
        start = time.perf_counter()
        file.write(block)
        sync_descriptor(file.fileno(), Path.cwd())
        written = time.perf_counter()
        advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begun = time.perf_counter()
        same = file.read(DISK_BYTES) == block
        stop = time.perf_counter()
    write, read = (clock.rate(DISK_BYTES, seconds) for seconds in (written - start, stop - begun))
    rates = f"write {format_count(write)}B/s, read {format_count(read)}B/s"
    return same, rates if same else f"{rates}, but what was read is not what was written"


def _gpu(index: int) -> tuple[bool, str]:
    """What a GPU is, the versions that it works with, and the rates of copies from and to pinned memory."""
    properties = torch.cuda.get_device_properties(index)
    to_device, to_host = copy_rates(index)
    return True, (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{format_bytes(properties.total_memory)}; driver {_driver_version()}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version() or 'not here'}; "
        f"pinned copies {format_count(to_device)}B/s to it, {format_count(to_host)}B/s from it"
    )


def _driver_version() -> str:
    """The version of NVIDIA's kernel module, as Linux tells it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return "of unknown version"
    return next((word for word in words if word[0].isdigit() and "." in word), "of unknown version")


def _kernel_checks(name: str) -> Iterator[Check]:
    """A kernel with each dtype; one line for a kernel that is not here, which is no failure."""
    device = torch.device(device_type(name))
    reasons = {dtype: get_kernel(name).unsupported_reason(device, dtype, HEAD_DIM, HEAD_DIM) for dtype in DTYPES}
    if all(reasons.values()):
        yield Check(f"kernel {name}", True, f"not here: {next(iter(reasons.values()))}")
        return
    for dtype, reason in reasons.items():
        check = f"kernel {name}, {dtype}"
        yield Check(check, True, f"not here: {reason}") if reason else _attempt(check, partial(_kernel, name, dtype))


def _kernel(name: str, dtype: str) -> tuple[bool, str]:
    """A kernel against the formula in float64, on every case, and its rate on large tiles."""
    errors = {case: kernel_error(name, dtype, case) for case in KERNEL_CASES}
    allowed = UNIT_ROUNDOFF[dtype] + 2e-6
    found = ", ".join(f"{case} {out:.1e} (lse {lse:.1e})" for case, (out, lse) in errors.items())
    right = all(out <= allowed and lse <= LSE_ERROR for out, lse in errors.values())
    rate = format_count(kernel_rate(name, Sample(HEAD_DIM, HEAD_DIM, dtype), *TIMED[device_type(name)]))
    return right, f"error {found}, allowed {allowed:.1e} (lse {LSE_ERROR:.0e}); {rate}FLOP/s"


def kernel_error(name: str, dtype: str, case: str) -> tuple[float, float]:
    """Errors of a kernel on random inputs against float64: of the output, relative over all rows; the largest of the lse."""
    device = torch.device(device_type(name))
    generator = torch.Generator("cpu").manual_seed(0)
    query, key, value = (
        torch.randn(ROWS, HEAD_DIM, generator=generator, dtype=torch.float32, device="cpu").to(device, getattr(torch, dtype))
        for _ in range(3)
    )
    mask, softcap = KERNEL_CASES[case]
    state = AttentionState.empty(1, ROWS, HEAD_DIM, device)
    intervals = None if mask.is_full else make_intervals(mask, range(ROWS), range(ROWS))
    get_kernel(name).attend(Operands(query[None], key, value, Scores(HEAD_DIM**-0.5, softcap), intervals), state)
    out, lse = torch.empty_like(query[None]), torch.empty_like(state.den)
    finalise(state, out, lse)
    scores = query.double() @ key.double().T * HEAD_DIM**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores.masked_fill_(~_attended(mask).to(device), float("-inf"))
    expected = scores.softmax(-1) @ value.double()
    of_out = (out[0].double() - expected).norm() / expected.norm()
    return float(of_out), float((lse[0].double() - scores.logsumexp(-1)).abs().max())


def _attended(mask: Mask) -> torch.Tensor:
    """Which keys each row attends, pair by pair from the meaning of the arguments: bool [rows, keys]."""
    row = torch.arange(ROWS, dtype=torch.int64, device="cpu").unsqueeze(1)
    key = torch.arange(ROWS, dtype=torch.int64, device="cpu")
    found = torch.ones((ROWS, ROWS), dtype=torch.bool, device="cpu")
    if mask.left is not None:
        found &= key >= row - mask.left
    if mask.causal:
        found &= key <= row
    for first, last in pairwise(mask.query_edges.tolist()):
        of_rows = slice(first, last)
        found[of_rows, first : first + mask.sinks] |= key[first : first + mask.sinks] <= row[of_rows]
        found[of_rows, :first] = found[of_rows, last:] = False
    return found


def _bfloat16() -> tuple[bool, str]:
    """Whether Zarr keeps bfloat16 arrays, and whether it finds the data type without this package being imported."""
    data = np.arange(6, dtype=np.float32).astype(numpy_dtype("bfloat16"))
    store = MemoryStore()
    zarr.create_array(store, shape=data.shape, dtype=data.dtype, chunks=data.shape)[:] = data
    same = np.array_equal(np.asarray(zarr.open_array(store, mode="r")[:]), data)
    plain = "bfloat16" in {entry.name for entry in entry_points(group="zarr.data_type")}
    found = "registered" if plain else "registered by `import oocattn` only: the package is not installed"
    return same, found if same else "an array is not read as it was written"


def _dashboard() -> tuple[bool, str]:
    """Whether a cluster of this process serves its dashboard."""
    with local_client() as client:
        address = client.dashboard_link
        loopback = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine
        with loopback.open(address, timeout=10) as page:
            return page.status == 200, f"served at {address}"
