"""Readiness of a worker: its account of itself before a run, and its faults.

Every worker is asked twice. The first question is for its Python and packages, by text that it evaluates: a worker without
this package, or with another Python, answers as well. Workers with the same software then inspect the dataset, the folder of
the result, their memory and their arithmetic. Here are records and comparisons; `enlisting` asks and decides.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distributed import Status, Worker

from oocattn.errors import LockedError, OocattnError
from oocattn.kernels.arithmetic import arithmetic_of, small_problem
from oocattn.naming import named, setting
from oocattn.pipelines.engines.dask.cluster import is_in_process
from oocattn.pipelines.engines.dask.departure import is_leaving
from oocattn.pipelines.engines.dask.tasks import close_stale_lanes
from oocattn.pipelines.engines.dask.worker_share import Memory, memory_of
from oocattn.planning.plan import Plan
from oocattn.problem.problem import Problem
from oocattn.storage.files.durable import PARTIAL
from oocattn.storage.files.operations import name_failure, words_of
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.fingerprints import Fingerprints, changed_arrays
from oocattn.storage.inputs.kept import ElsewhereError
from oocattn.storage.journal.claims import Claim
from oocattn.storage.results.growing import RunState
from oocattn.storage.results.locking import claim_elsewhere
from oocattn.threads import begin_call
from oocattn.units import ceil_div, format_bytes
from oocattn.version import __version__, source_digest

PACKAGES = ("oocattn", "torch", "zarr", "dask", "distributed")
"""Packages that compute or are sent: their versions must be the driver's."""

SAME_DATA = "mount the same file system there, or copy the dataset to the same path with its times (rsync -a)"
NETWORK = "give it the network and the credentials that it needs"
SAME_SOFTWARE = "install there what is here, and restart it"


def describe_interpreter(packages: tuple[str, ...]) -> dict[str, str]:
    """Host, and versions of Python and packages, of a process.

    It needs nothing around it, for its text is sent. The first package is imported, as what is sent next will be; of
    others that are not, the version is the installed one.
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
NAMES = {"source": inspect.getsource(describe_interpreter), "packages": PACKAGES}
"""Names for the evaluation of `EXPRESSION`, which any Python answers with its versions."""


def find_interpreter_faults(found: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Versions that differ from this process's, but for builds of one torch."""
    others = [
        f"no {name}{value.removeprefix('none')}" if value.startswith("none") else f"{name} {value} instead of {here[name]}"
        for name, value in found.items()
        if name != "host" and value.partition("+")[0] != here[name].partition("+")[0]
    ]
    return [f"has {' and '.join(others)}: {SAME_SOFTWARE}"] if others else []


@dataclass(frozen=True)
class Expectations:
    """State of the driver that every worker must see, or have room for.

    `lane_bytes` is the host memory of a lane, `call` the arguments of `arithmetic_of`, and `computing` the arithmetic of the
    run's workers, where it has begun. `elsewhere` is the claim of a worker that shares no folder, where there may be such:
    then `state` need not be there, and stale lanes are told by the `result`.
    """

    dataset: Dataset
    fingerprints: Fingerprints
    state: Path
    claim: Claim
    lane_bytes: int
    call: tuple[str, Problem, str]
    computing: Mapping[str, str] | None = None
    result: str = ""
    elsewhere: Claim | None = None

    @classmethod
    def of_run(cls, plan: Plan, dataset: Dataset, state: RunState) -> Expectations:
        """The expectations of a run of this plan."""
        call = (plan.kernel, small_problem(plan.problem), plan.device)
        lane_bytes = ceil_div(plan.peak_host, plan.sharing_lanes)
        elsewhere = None if state.paths.mirror is None else claim_elsewhere(state.claim)
        found, paths = dataset.as_found, state.paths
        return cls(dataset, found, paths.state, state.claim, lane_bytes, call, result=str(paths.result), elsewhere=elsewhere)


@dataclass(frozen=True)
class WorkerState:
    """State of a worker as it sees itself.

    `code` is the digest of its sources, `dataset` its fingerprints, or why it cannot be read, `result` why no result can be
    written, `probe` the file that it has written beside the result ("" where it need not share that folder).
    """

    id: str
    code: str
    dataset: Fingerprints | str
    result: str
    probe: str
    paused: bool
    memory: Memory
    computing: Mapping[str, str]
    leaving: bool = False


async def inspect_worker(expected: Expectations, dask_worker: Worker) -> WorkerState:
    """Look at what a run needs, after closing stale lanes of the same result."""
    await close_stale_lanes(expected.result, expected.state, dask_worker)
    if expected.elsewhere is not None and not is_in_process(dask_worker.address):
        looking = begin_call(_look_at_store, Path(dask_worker.local_directory), expected.elsewhere)
    else:
        looking = begin_call(_look_at_state, expected.state, expected.claim)
    # Each takes seconds, and a minute where a store does not answer.
    at_dataset = begin_call(_look_at_dataset, expected.dataset)
    dataset, (result, probe) = await asyncio.gather(asyncio.wrap_future(at_dataset), asyncio.wrap_future(looking))
    return WorkerState(
        id=str(dask_worker.id),
        code=source_digest(),
        dataset=dataset,
        result=result,
        probe=probe,
        paused=dask_worker.status == Status.paused,
        memory=memory_of(dask_worker),
        computing=arithmetic_of(*expected.call),
        leaving=is_leaving(dask_worker),
    )


def _look_at_dataset(dataset: Dataset) -> Fingerprints | str:
    """The fingerprints of the dataset that is there now, or why it cannot be read."""
    try:
        for path in dataset.paths:
            os.stat(path)
        return dataset.reopen().fingerprints()
    except ElsewhereError as error:
        return words_of(error)
    except (OocattnError, OSError) as error:
        return f"{words_of(error)}; {SAME_DATA if dataset.paths else NETWORK}"
    except Exception as error:  # a remote file system has its own
        return f"{type(error).__name__}: {error}; {SAME_DATA if dataset.paths else NETWORK}"


def _look_at_state(state: Path, claim: Claim) -> tuple[str, str]:
    """The reason why the folder of job state is unusable, or "", and a file there."""
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


def _look_at_store(folder: Path, claim: Claim) -> tuple[str, str]:
    """The reason why no job state can pass through a folder of the worker's own into the store, or ""; no file."""
    try:
        claim.check(afresh=True)
    except (OocattnError, OSError) as error:
        return f"cannot use the store of the result as it can be used here: {words_of(error)}", ""
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"cannot write to its folder {folder} (--local-directory)", ""


def remove_probes(state: Path, names: Iterable[str]) -> list[str]:
    """Remove the files that workers have written; return the names that were there."""
    there = []
    for name in names:
        with suppress(FileNotFoundError), name_failure("remove", state / name):
            (state / name).unlink()
            there.append(name)
    return there


def find_faults(worker: WorkerState, expected: Expectations, written: bool) -> list[str]:
    """Faults of a worker, with advice; `written`: its probe has appeared here."""
    return [*_dataset_faults(worker, expected), *_result_faults(worker, expected, written), *_other_faults(worker, expected)]


def _dataset_faults(worker: WorkerState, expected: Expectations) -> list[str]:
    place, here = f"the dataset {expected.dataset.location}", expected.fingerprints
    if isinstance(worker.dataset, str):
        return [f"cannot read {place} as it can be read here: {worker.dataset}"]
    if changed := changed_arrays(here.untimed, worker.dataset.untimed):
        return [f"sees other data in {changed} of {place} than is here (metadata, sizes or content of chunks): {SAME_DATA}"]
    if changed := changed_arrays(here.recorded, worker.dataset.recorded):
        return [f"sees {changed} of {place} with other modification times than here, and may have an old copy: {SAME_DATA}"]
    return []


def _result_faults(worker: WorkerState, expected: Expectations, written: bool) -> list[str]:
    if worker.result:
        reason = worker.result
    elif worker.probe and not written:
        reason = f"writes to {expected.state}, and nothing of that appears here"
    else:
        return []
    if expected.elsewhere is not None:
        return [f"{reason}: give it the network, credentials and folder that it needs"]
    if "://" in expected.result:
        return [
            f"{reason}: choose {setting('scratch', 'store')}, or a scratch folder that all workers share and may write to"
        ]
    return [f"{reason}: choose a result on a file system that all workers share, and that they may write to"]


def _other_faults(worker: WorkerState, expected: Expectations) -> list[str]:
    found = []
    if worker.leaving:
        found.append("was asked to end (SIGTERM)")
    if worker.code != source_digest():
        found.append(f"has oocattn {__version__} with other code than here: {SAME_SOFTWARE}")
    used, limit = format_bytes(worker.memory.used), format_bytes(worker.memory.limit)
    if worker.paused:
        found.append(
            f"is paused by Dask, with {used}{f' of its memory limit of {limit}' if worker.memory.limit else ''} in use: "
            "restart it with memory_limit=0, or a larger one"
        )
    elif worker.memory.used + expected.lane_bytes > worker.memory.pause:
        found.append(
            f"has a memory limit of {limit}, of which {used} are in use: a lane takes {format_bytes(expected.lane_bytes)} "
            "more, and Dask would give it no tasks: restart it with memory_limit=0 or a larger one, or lower "
            f"{named('host_memory')}"
        )
    if worker.computing.get("gpu") == "none":
        found.append(f"sees no GPU: start it where there is one, or choose {setting('kernel', 'cpu')}")
    for name, recorded in (expected.computing or {}).items():
        value = worker.computing.get(name, "none")
        if value not in recorded.split(" | "):
            words = "other bits of a test call" if name == "arithmetic" else f"{name} {value} instead of {recorded}"
            found.append(f"computes with {words}, so that the result would have other bits: use workers like the first")
    return found
