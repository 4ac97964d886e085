"""The public functions that compute: plan, run and resume exact attention over a dataset on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch  # noqa: F401 - before Zarr, which imports CuPy where there is one: torch's import then wakes all of it

from oocattn import arguments, clock
from oocattn.arguments import Duration, Size, checked
from oocattn.cores import Workers
from oocattn.kernels.registry import kernel_names
from oocattn.pipelines import session
from oocattn.pipelines.engines import DASHBOARD, ENGINES
from oocattn.pipelines.existing import Request, open_result
from oocattn.pipelines.result import Result
from oocattn.pipelines.session import Resuming
from oocattn.pipelines.watch.events import Callback
from oocattn.pipelines.workplace import Workplace
from oocattn.planning.candidates import Choices
from oocattn.planning.machine import Engine
from oocattn.planning.measure import plan_here
from oocattn.planning.options import DECOMPOSITIONS, MAX_CHUNKS
from oocattn.planning.plan import Plan
from oocattn.problem_arguments import PROBLEM_OPTIONS, ProblemArguments
from oocattn.storage.inputs.given import open_posed
from oocattn.storage.inputs.opening import InputsLike, parse_inputs
from oocattn.storage.paths import LOCKS, ResultLike, ResultPaths
from oocattn.storage.remote.limits import limited
from oocattn.storage.remote.options import StorageOptions, parse_options

if TYPE_CHECKING:  # importing distributed takes a second: only runs do, while the GPU starts
    from distributed import Client

PLAN_OPTIONS = {
    "device_memory": arguments.size,
    "host_memory": arguments.size,
    "chunks": arguments.integer(1, MAX_CHUNKS),
    "decomposition": arguments.choice(*DECOMPOSITIONS),
    "kernel": arguments.choice(*kernel_names()),
    "precise": arguments.boolean,
    "checkpoint_interval": arguments.duration,
}
"""What the options may be that change the plan and not the problem."""

RUN_OPTIONS = {
    "time_limit": arguments.duration,
    "engine": arguments.choice(*ENGINES),
    "dashboard_address": arguments.text,
    "callbacks": arguments.functions,
    "progress": arguments.boolean,
    "storage_options": parse_options,
}
"""What the options may be that say how a run is carried out."""

PLACE_OPTIONS = {
    "scratch": arguments.path,
    "lock": arguments.choice(*LOCKS),
}
"""What the options may be that say where job state is, and how runs keep apart."""


@checked(
    PROBLEM_OPTIONS,
    **PLAN_OPTIONS,
    engine=RUN_OPTIONS["engine"],
    lanes=arguments.integer(1),
    storage_options=parse_options,
)
def plan(
    inputs: InputsLike,
    *,
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    chunks: int | None = None,
    decomposition: str = "auto",
    kernel: str | None = None,
    precise: bool = False,
    checkpoint_interval: Duration | None = None,
    engine: Engine = "dask",
    lanes: int | None = None,
    result: ResultLike | None = None,
    storage_options: StorageOptions | None = None,
    **asked: Unpack[ProblemArguments],
) -> Plan:
    """Decide everything about a run of exact attention over `inputs`, and predict its bytes, memory and seconds.

    `inputs` is the path or URL of a Zarr group with q [B, Hq, Nq, D], k [B, Hkv, Nk, D] and v [B, Hkv, Nk, Dv] (or
    three-dimensional, as B = 1) in float16, bfloat16 or float32, or has the three one by one, wherever they lie
    (`oocattn.Inputs`, or a mapping of its fields). The arguments from `causal` to `dtype` say what is computed
    (`help(oocattn.ProblemArguments)`). `device_memory` and `host_memory` are hard limits in bytes, as numbers or like
    "2GiB", on all that the run allocates (default: half of the free memory). `chunks` pins the number of chunks c,
    `decomposition` is "auto", "cqs" or "strips", `kernel` pins a kernel, and with it the CPU or GPUs. `precise` leaves out
    kernels that round softmax weights to 16 bits: `out` is then off by a few 1e-6 before it is rounded to `dtype`.
    `checkpoint_interval` is what a kill may cost, in seconds or like "5m" (default: a minute; 0: no checkpoints, only
    finished query chunks are kept). `engine` is what will run the tasks: they cost more on Dask. `lanes` is the number
    of workers of this machine that will share the run (default: one, or one for each GPU); where a small budget would have
    all of them read more, the plan has fewer lanes on a CPU. `result` tells on which file system partials
    would lie, and whether chunks are sent to a store, which takes memory. `storage_options` are fsspec's for inputs
    behind URLs (docs/remote.md), and are recorded nowhere.

    Here and elsewhere a path may begin with `~` or `file://`. More heads than tokens are logged as a warning: the axes may
    be in another order.

    Raises ProblemError for input that is no attention problem, and for an option of another type, before anything is opened,
    and BudgetError, with the smallest budget that works.
    """
    opened, problem = open_posed(inputs, asked, storage_options)
    parsed: Any = (device_memory, host_memory, chunks, decomposition, kernel, checkpoint_interval, precise)  # checked
    paths = None if result is None else ResultPaths.at(result, storage_options=storage_options)
    scratch, to_store = (None, False) if paths is None else (paths.state_folder, paths.stored is not None)
    return plan_here(opened, problem, Choices(*parsed), Workers(lanes), scratch, engine, to_store=to_store)


@checked(PROBLEM_OPTIONS, **PLAN_OPTIONS, **RUN_OPTIONS, **PLACE_OPTIONS, overwrite=arguments.boolean)
def attention(
    inputs: InputsLike,
    result: ResultLike,
    *,
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    chunks: int | None = None,
    decomposition: str = "auto",
    kernel: str | None = None,
    precise: bool = False,
    checkpoint_interval: Duration | None = None,
    time_limit: Duration | None = None,
    engine: Engine = "dask",
    client: Client | None = None,
    dashboard_address: str = DASHBOARD,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    overwrite: bool = False,
    scratch: str | Path | None = None,
    lock: str = "auto",
    storage_options: StorageOptions | None = None,
    **asked: Unpack[ProblemArguments],
) -> Result:
    """Run exact attention over `inputs` and write `out` and `lse` as the Zarr group `result`.

    `result` is a path, a URL, a Zarr store, or a `Result`. Journal and partials lie beside a local one. Of another one they
    are in the folder `scratch` (default: called after the result, in the current folder), or with "store" also in the store
    itself, so that another machine can resume. `lock` is "none" where the caller sees to it that no other run writes there,
    for a store without conditional puts (docs/remote.md). `storage_options` are those of `plan`, also for the result. What
    mask, scores and rows may be asked: `help(oocattn.ProblemArguments)`. The arguments up to `checkpoint_interval` are
    those of `plan`. `time_limit` is in seconds from this call, or like "8h"; the run ends before it has passed, with all
    its work on disk. `engine` is "dask", or "inline": threads of this process without a scheduler. With Dask the run uses
    the workers of `client`, a connected `distributed.Client` that is not asynchronous, or a cluster of its own with its
    dashboard at `dashboard_address`. `callbacks` are called with every `Event`, and `progress` shows a bar on standard
    error, or in a notebook. A finished result of the same problem and dataset is returned as it is, with a warning where
    its certificate failed, and an unfinished one is resumed with its plan; `overwrite` computes it again. Signals, failing
    callbacks and waiting for workers: docs/interruptions.md, docs/python.md, docs/clusters.md.

    Raises ProblemError (also where the cluster is not ready), BudgetError, ResultExistsError (something else is at
    `result`), LockedError (another run writes it), IntegrityError (the dataset or a partial is damaged), TimeLimitError,
    TaskError (a task failed time and again), StalledError (no task made progress for minutes), WorkerLostError and OSError.
    Then nothing has appeared at `result`, and the run can be resumed unless the error says otherwise.
    """
    until, workplace = end_of(time_limit), Workplace(engine, client, dashboard_address)
    listeners = listeners_of(callbacks, progress)
    with limited(until):
        paths = ResultPaths.at(result, scratch, lock, storage_options)
        opened, problem = open_posed(inputs, asked, storage_options)
        parsed: Any = (device_memory, host_memory, chunks, decomposition, kernel, checkpoint_interval, precise)  # checked
        return session.attend(Request(problem, opened, paths, overwrite), Choices(*parsed), workplace, listeners, until)


@checked(**RUN_OPTIONS, **PLACE_OPTIONS, accept_other_bits=arguments.boolean, check_finished=arguments.boolean)
def resume(
    result: ResultLike,
    *,
    inputs: InputsLike | None = None,
    accept_other_bits: bool = False,
    check_finished: bool = False,
    time_limit: Duration | None = None,
    engine: Engine = "dask",
    client: Client | None = None,
    dashboard_address: str = DASHBOARD,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    scratch: str | Path | None = None,
    lock: str = "auto",
    storage_options: StorageOptions | None = None,
) -> Result:
    """Go on with the unfinished run to `result`, with the plan and the dataset that it was begun with.

    `inputs` says where they are now; without it, the journal is believed only if it names local paths. On a processor, GPU
    or torch that rounds otherwise the run is refused, unless `accept_other_bits` is given; then the report says so. The
    checksums of finished chunks are compared for a few seconds, or with `check_finished` all of them. The other options are
    those of `attention`: `scratch` and `lock` are to be given again. A finished result is returned as it is, with a warning
    where its certificate failed. Raises ProblemError where no run has begun, IntegrityError where the dataset has changed
    since or the journal is damaged, and what `attention` raises.
    """
    until, workplace = end_of(time_limit), Workplace(engine, client, dashboard_address)
    named = None if inputs is None else parse_inputs(inputs)
    resuming, listeners = Resuming(accept_other_bits, check_finished), listeners_of(callbacks, progress)
    with limited(until):
        paths = ResultPaths.at(result, scratch, lock, storage_options)
        return session.resume(paths, named, resuming, workplace, listeners, until, storage_options)


def listeners_of(callbacks: Sequence[Callback], progress: bool) -> list[Callback]:
    """The caller's listeners, and a progress bar where it is asked for."""
    if not progress:
        return list(callbacks)
    from oocattn.pipelines.watch.progress import ProgressBar

    return [*callbacks, ProgressBar()]


def end_of(time_limit: Duration | None) -> float:
    """When a run that begins now must have ended, in seconds since the epoch."""
    return math.inf if time_limit is None else clock.now() + cast(float, time_limit)


@checked(scratch=arguments.path, storage_options=parse_options)
def open(result: ResultLike, *, scratch: str | Path | None = None, storage_options: StorageOptions | None = None) -> Result:
    """Open a finished result, its arrays for reading. Raises IntegrityError where there is none.

    `scratch` and `storage_options` are those of the run: of a result in a Zarr store the report is in `scratch`.
    """
    return open_result(result, scratch, storage_options)
