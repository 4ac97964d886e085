"""What a worker says of itself before a run, and what in that keeps it from taking part.

Every worker is asked twice. First for its Python and packages, by text that it evaluates: one without this package, or with
another Python, answers as well. Then those that have the same look at the dataset, the folder of the result, their memory
and their arithmetic. All here is records and comparisons; who is asked when, and what comes of it, is in `enlisting`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import socket
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import dask
from distributed import Status, Worker

from oocattn.errors import LockedError, OocattnError
from oocattn.kernels.arithmetic import arithmetic_of
from oocattn.pipelines.engines.dask.tasks import close_stale_lanes
from oocattn.planning.plan import Plan
from oocattn.storage.files.durable import PARTIAL
from oocattn.storage.files.operations import name_failure, words_of
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.fingerprints import Fingerprints, changed_arrays
from oocattn.storage.journal.claims import Claim
from oocattn.storage.results.growing import RunState
from oocattn.threads import begin_call
from oocattn.units import format_bytes
from oocattn.version import __version__, source_digest

PACKAGES = ("oocattn", "torch", "zarr", "dask", "distributed")
"""Packages whose versions must be the driver's: what computes, and what is sent between processes."""

SAME_DATA = "mount the same file system there, or copy the dataset to the same path with its times (rsync -a)"
"""What to do about a worker that sees another dataset."""

SAME_SOFTWARE = "install there what is here, and restart it"
"""What to do about a process that has other software."""


def describe_interpreter(packages: tuple[str, ...]) -> dict[str, str]:
    """Host, version of Python and versions of packages of a process; it needs nothing around it, for its text is sent.

    The first package is imported, as what is sent next will be; of others that are not, the version is the installed one.
    """
    import importlib.metadata
    import socket
    import sys

    found = {"host": socket.gethostname(), "Python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in packages:
        try:
            if name == packages[0]:
                importlib.import_module(name)
            found[name] = str(sys.modules[name].__version__ if name in sys.modules else importlib.metadata.version(name))
        except Exception as error:  # whatever an installation that is broken raises
            found[name] = f"none ({type(error).__name__}: {error})"
    return found


EXPRESSION = f"(exec(source), {describe_interpreter.__name__}(packages))[1]"
"""What a process is asked for its versions."""


NAMES = {"source": inspect.getsource(describe_interpreter), "packages": PACKAGES}
"""What `EXPRESSION` is evaluated with, by `eval`, which every Python has."""


def interpreter_faults(found: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What another process has other than this one; of torch, builds of one release may differ."""
    others = [
        f"no {name}{value.removeprefix('none')}" if value.startswith("none") else f"{name} {value} instead of {here[name]}"
        for name, value in found.items()
        if name != "host" and value.partition("+")[0] != here[name].partition("+")[0]
    ]
    return [f"has {' and '.join(others)}: {SAME_SOFTWARE}"] if others else []


@dataclass(frozen=True)
class Expected:
    """What the driver of a run sees, and what every worker must see or have room for.

    `state` is the folder of job state, locked under the `claim`, `lane_bytes` what a lane allocates in host memory, `asked`
    the arguments of `arithmetic_of`. `computing` is what the workers of the run may compute with, where it has begun.
    """

    dataset: Dataset
    fingerprints: Fingerprints
    state: Path
    claim: Claim
    lane_bytes: int
    asked: tuple[str, int, str, str]
    computing: Mapping[str, str] | None = None

    @classmethod
    def of(cls, plan: Plan, dataset: Dataset, state: RunState) -> Expected:
        """What a run of this plan expects."""
        asked = (plan.kernel, plan.problem.head_dim, plan.problem.dtype, plan.device)
        lane_bytes = -(-plan.peak_host // plan.lanes)
        return cls(dataset, dataset.as_found, state.paths.state, state.claim, lane_bytes, asked)


@dataclass(frozen=True)
class Seen:
    """What a worker sees. `code` is the digest of its sources of this package, `dataset` its fingerprints, or why it cannot
    be read, `result` why no result can be written.

    `probe` names the file that it has written beside the result. Of its memory in bytes it says what is in use, Dask's limit
    (0: none), and from which use on Dask gives it no tasks.
    """

    id: str
    host: str
    code: str
    dataset: Fingerprints | str
    result: str
    probe: str
    paused: bool
    memory_used: int
    memory_limit: int
    memory_pause: float
    computing: Mapping[str, str]


async def look(expected: Expected, dask_worker: Worker) -> Seen:
    """What this worker sees, when what an earlier driver of the same run left in its memory is closed."""
    await close_stale_lanes(expected.state, dask_worker)
    manager = dask_worker.memory_manager
    limit = int(manager.memory_limit or 0)
    share = manager.memory_pause_fraction or dask.config.get("distributed.worker.memory.terminate") or math.inf
    dataset = await asyncio.wrap_future(begin_call(_look_at_dataset, expected.dataset))  # which may take seconds
    result, probe = await asyncio.wrap_future(begin_call(_look_at_state, expected.state, expected.claim))
    return Seen(
        id=str(dask_worker.id),
        host=socket.gethostname(),
        code=source_digest(),
        dataset=dataset,
        result=result,
        probe=probe,
        paused=dask_worker.status == Status.paused,
        memory_used=int(dask_worker.monitor.get_process_memory()),
        memory_limit=limit,
        memory_pause=limit * float(share) if limit else math.inf,
        computing=arithmetic_of(*expected.asked),
    )


def _look_at_dataset(dataset: Dataset) -> Fingerprints | str:
    """The fingerprints of the dataset that is there now, or why it cannot be read."""
    try:
        if dataset.folder is not None:
            os.stat(dataset.folder)
        return dataset.reopen().fingerprints()
    except (OocattnError, OSError) as error:
        return words_of(error)
    except Exception as error:  # a remote file system has its own
        return f"{type(error).__name__}: {error}"


def _look_at_state(state: Path, claim: Claim) -> tuple[str, str]:
    """Why the folder of job state cannot be used, and the name of a file that was written there otherwise."""
    name = f"ready.{uuid.uuid4().hex}{PARTIAL}"
    try:
        os.stat(state)
        claim.check()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(state / name, flags, 0o644))
    except LockedError:
        return f"sees another folder {state} than is here", ""
    except OSError as error:
        return f"cannot write to {state} ({error.strerror})", ""
    return "", name


def remove_probes(state: Path, names: Iterable[str]) -> list[str]:
    """Remove what workers have written into the folder of job state; return the names of those files that were there."""
    there = []
    for name in names:
        with suppress(FileNotFoundError), name_failure("remove", state / name):
            (state / name).unlink()
            there.append(name)
    return there


def faults(seen: Seen, expected: Expected, written: bool) -> list[str]:
    """What keeps a worker from taking part, and what to do about it; `written`: its file has appeared beside the result."""
    return [*_dataset_faults(seen, expected), *_result_faults(seen, expected, written), *_other_faults(seen, expected)]


def _dataset_faults(seen: Seen, expected: Expected) -> list[str]:
    place, here = f"the dataset {expected.dataset.location}", expected.fingerprints
    if isinstance(seen.dataset, str):
        return [f"cannot read {place} as it can be read here ({seen.dataset}): {SAME_DATA}"]
    if changed := changed_arrays(here.untimed, seen.dataset.untimed):
        return [f"sees other data in {changed} of {place} than is here (metadata, sizes or content of chunks): {SAME_DATA}"]
    if changed := changed_arrays(here.recorded, seen.dataset.recorded):
        return [f"sees {changed} of {place} with other modification times than here, and may have an old copy: {SAME_DATA}"]
    return []


def _result_faults(seen: Seen, expected: Expected, written: bool) -> list[str]:
    if seen.result:
        reason = seen.result
    elif not written:
        reason = f"writes to {expected.state}, and nothing of that appears here"
    else:
        return []
    return [f"{reason}: choose a result on a file system that all workers share, and that they may write to"]


def _other_faults(seen: Seen, expected: Expected) -> list[str]:
    found = []
    if seen.code != source_digest():
        found.append(f"has oocattn {__version__} with other code than here: {SAME_SOFTWARE}")
    used, limit = format_bytes(seen.memory_used), format_bytes(seen.memory_limit)
    if seen.paused:
        found.append(
            f"is paused by Dask, with {used}{f' of its memory limit of {limit}' if seen.memory_limit else ''} in use: "
            "restart it with memory_limit=0, or a larger one"
        )
    elif seen.memory_used + expected.lane_bytes > seen.memory_pause:
        found.append(
            f"has a memory limit of {limit}, of which {used} are in use: a lane takes {format_bytes(expected.lane_bytes)} "
            "more, and Dask would give it no tasks: restart it with memory_limit=0 or a larger one, or lower host_memory "
            "(--host-memory)"
        )
    if seen.computing.get("gpu") == "none":
        found.append("sees no GPU: start it where there is one, or choose --kernel cpu")
    for name, recorded in (expected.computing or {}).items():
        value = seen.computing.get(name, "none")
        if value not in recorded.split(" | "):
            words = "other bits of a test call" if name == "arithmetic" else f"{name} {value} instead of {recorded}"
            found.append(f"computes with {words}, so that the result would have other bits: use workers like the first")
    return found
