"""Attention of tensors in memory, streamed through a lane: the result grows in a scratch folder and is read into a tensor.

What is in host memory is read from there. The result grows in memory where the budget has room for it, else on disk. One
that is larger than the whole budget comes back as a map of a file, which has no name any more.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from oocattn import arguments
from oocattn.arguments import Size
from oocattn.cores import Workers
from oocattn.errors import BudgetError, ProblemError
from oocattn.nn.tracing import not_compiled, refuse_traced
from oocattn.pipelines.engines import DASHBOARD
from oocattn.pipelines.existing import Request
from oocattn.pipelines.result import Result
from oocattn.pipelines.session import run_plan
from oocattn.pipelines.workplace import Workplace
from oocattn.planning.candidates import Choices
from oocattn.planning.host import default_host_memory
from oocattn.planning.measure import plan_here
from oocattn.planning.plan import Plan
from oocattn.problem.options import ProblemOptions
from oocattn.problem.problem import Problem, make_problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.axes import BHND
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.memory import MemorySource, plain_tensor
from oocattn.storage.inputs.source import TensorSource
from oocattn.storage.inputs.zarr_source import ZarrSource
from oocattn.storage.locations import output_path
from oocattn.storage.paths import ResultPaths
from oocattn.threads import ThreadPool

READERS = 4
"""Threads that read a result into its tensor."""

IN_MEMORY = Path("/dev/shm")
"""Where Linux has files in memory."""


@dataclass(frozen=True)
class Budgets:
    """Bytes that a call may allocate on the device and in host memory (None: half of what is free), and its folder."""

    device_memory: int | None = None
    host_memory: int | None = None
    scratch: Path | None = None

    @classmethod
    def parse(cls, device_memory: Size | None, host_memory: Size | None, scratch: str | Path | None) -> Budgets:
        """What a caller gives. Raises ProblemError for what is not understood, and for a folder that is not there."""
        return cls(
            None if device_memory is None else arguments.size("device_memory", device_memory),
            None if host_memory is None else arguments.size("host_memory", host_memory),
            None if scratch is None else _existing_folder(scratch),
        )


class _Operand(MemorySource):
    """A tensor of a call. Nobody resumes the call, so its bytes are not digested."""

    def fingerprints(self) -> tuple[str, str, str]:
        """See `TensorSource.fingerprints`."""
        return "", "", ""

    def reopen(self) -> TensorSource:
        """See `TensorSource.reopen`."""
        return self


@not_compiled
def stream(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: ProblemOptions, budgets: Budgets
) -> torch.Tensor:
    """Attend q [B, Hq, Nq, D] to k [B, Hkv, Nk, D] and v [B, Hkv, Nk, Dv]: [B, Hq, Nq, Dv], of q's device and dtype, or
    autocast's.

    Raises ProblemError for tensors that pose no problem or want a gradient, BudgetError with the smallest budget that works,
    and what `attention` raises.
    """
    refuse_traced(query, key, value)
    _refuse(query, key, value)
    dtype = _result_dtype(query)
    if torch.is_autocast_enabled(query.device.type) and len({each.dtype for each in (query, key, value)}) > 1:
        query, key, value = (each.to(dtype) for each in (query, key, value))  # as torch's own call does, with all
    options = replace(options, out_dtype=str(dtype).removeprefix("torch."))
    if query.device.type == "cuda":
        torch.cuda.synchronize(query.device)  # lanes have streams of their own
    named = {"q": ("query", query), "k": ("key", key), "v": ("value", value)}
    sources = {name: _Operand(name, plain_tensor(*tensor), BHND) for name, tensor in named.items()}
    dataset = Dataset.of({**sources})
    problem = make_problem(*dataset.specs, options)
    host = default_host_memory() if budgets.host_memory is None else budgets.host_memory
    with _folder(budgets.scratch) as on_disk, _folder(IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else on_disk) as in_memory:
        result = _run(problem, dataset, budgets.device_memory, host, on_disk, in_memory)
        out = _new_output(problem, dtype, host, on_disk)
        _read(result, out)
    return out.to(query.device)


def _refuse(*tensors: torch.Tensor) -> None:
    """Raise ProblemError for tensors on several devices, or of which a gradient is wanted."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise ProblemError(f"query, key and value lie on {' and '.join(devices)}: expected one device; move them to one")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ProblemError(
            "query, key or value wants a gradient (requires_grad), and attention that is streamed has none: call it under "
            "torch.no_grad(), or give as much device_memory as torch's own call needs"
        )


def _result_dtype(query: torch.Tensor) -> torch.dtype:
    """The query's, or that of autocast, to which torch's own call rounds inputs as well."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _run(problem: Problem, dataset: Dataset, device_memory: int | None, host: int, on_disk: Path, in_memory: Path) -> Result:
    """Run the problem to a result in one of the folders."""
    workplace, chosen = Workplace("inline", None, DASHBOARD), [on_disk]

    def decide(workers: Workers) -> Plan:
        def plan(budget: int, folder: Path) -> Plan:
            device = device_memory if torch.cuda.is_available() else None
            choices = Choices(device, budget, checkpoint_seconds=0.0)  # nobody resumes it
            return plan_here(dataset, problem, choices, workers, folder, "inline")

        left = host - _out_bytes(problem)
        if left > 0 and shutil.disk_usage(in_memory).free > 2 * _out_bytes(problem):
            try:
                found = plan(left, in_memory)
            except BudgetError:
                pass
            else:
                if found.partials == "memory":
                    chosen[0] = in_memory
                    return found
        return plan(host, on_disk)

    with workplace.prepare(problem, None, decide, math.inf) as (engine, plan):
        return run_plan(plan, Request(problem, dataset, ResultPaths.at(chosen[0] / "result.zarr")), engine)


def _out_bytes(problem: Problem) -> int:
    """Bytes of `out` and `lse`."""
    return problem.rows * (problem.value_dim * numpy_dtype(problem.out_dtype).itemsize + 4)


def _new_output(problem: Problem, dtype: torch.dtype, host: float, folder: Path) -> torch.Tensor:
    """An empty tensor for `out` in host memory, or a map of a file where that would be more than `host` bytes."""
    if _out_bytes(problem) <= host:
        return torch.empty(problem.out_shape, dtype=dtype, device="cpu")
    count = math.prod(problem.out_shape)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="out-") as file:  # the map keeps it, not its name
        os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)  # a full disk is an error now, not a signal later
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype, device="cpu").view(problem.out_shape)


def _read(result: Result, out: torch.Tensor) -> None:
    """Read a result into a tensor in host memory."""
    source = ZarrSource("out", result.out, str(result.path))
    rows = _as_numpy(out)
    batches, heads, tokens = source.extents
    step = source.chunk_rows

    def read(part: Sequence[int]) -> None:
        batch, head, start = part
        stop = min(start + step, tokens)
        source.read_rows(batch, head, start, stop, rows[batch, head, start:stop])

    with ThreadPool(READERS, "oocattn-read") as pool:
        for _ in pool.map(read, itertools.product(range(batches), range(heads), range(0, tokens, step))):
            pass


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """The memory of a tensor, as an array of its dtype."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(numpy_dtype("bfloat16"))
    return np.asarray(tensor.numpy())


def _existing_folder(typed: object) -> Path:
    if not isinstance(typed, str | os.PathLike):
        raise arguments.refused("scratch", typed, "the path of a folder")
    folder = output_path(typed, "scratch folder")
    if not os.path.isdir(folder):
        raise ProblemError(f"scratch: {folder} is no folder: expected one that is there; make it")
    return folder


@contextmanager
def _folder(within: str | Path | None) -> Iterator[Path]:
    """A folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="oocattn-", dir=within, ignore_cleanup_errors=True) as name:
        yield Path(name)
