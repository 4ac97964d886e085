"""The public functions that compute: plan, run, resume and verify exact attention over a dataset on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch  # noqa: F401 - before Zarr, which imports CuPy where there is one: torch's import then wakes all of it

from oocattn import arguments, clock
from oocattn.arguments import MOST_SEED, Dtype, Duration, Size, checked
from oocattn.denormals import keep_denormals
from oocattn.errors import ProblemError, TimeLimitError
from oocattn.forks import refuse_lost_client, refuse_lost_threads
from oocattn.kernels.registry import kernel_names
from oocattn.pipelines.engines import DASHBOARD, ENGINES, INLINE, check_engine
from oocattn.pipelines.lane.rehearsal import rehearse
from oocattn.pipelines.record import find_unfinished
from oocattn.pipelines.resuming import Choices, check_asked, check_chosen, open_dataset
from oocattn.pipelines.session import (
    Result,
    Resuming,
    finished_result,
    is_finished,
    open_result,
    refuse_to_replace_dataset,
    resume_run,
    run_plan,
)
from oocattn.pipelines.watch.events import Callback
from oocattn.planning.candidates import make_plan, overhead_warning
from oocattn.planning.measure import (
    count_lanes,
    default_device_memory,
    default_host_memory,
    describe_hardware,
    input_cost,
    warm_up,
)
from oocattn.planning.options import CHECKPOINT_SECONDS, DECOMPOSITIONS, MAX_CHUNKS
from oocattn.planning.plan import Plan
from oocattn.problem.problem import Problem
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.inputs.posing import pose
from oocattn.storage.locations import parse_location
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays
from oocattn.threads import ThreadPool

if TYPE_CHECKING:  # importing distributed takes a second: only runs do, while the GPU starts
    from distributed import Client

    from oocattn.verification.certificate import Certificate

logger = logging.getLogger("oocattn")

PROBLEM_OPTIONS = {"causal": arguments.boolean, "scale": arguments.scale, "dtype": arguments.dtype}
"""What the options that pose a problem may be."""

PLAN_OPTIONS = {
    "device_memory": arguments.size,
    "host_memory": arguments.size,
    "chunks": arguments.integer(1, MAX_CHUNKS),
    "decomposition": arguments.choice(*DECOMPOSITIONS),
    "kernel": arguments.choice(*kernel_names()),
    "checkpoint_interval": arguments.duration,
}
"""What the options may be that change the plan and not the problem."""

RUN_OPTIONS = {
    "time_limit": arguments.duration,
    "engine": arguments.choice(*ENGINES),
    "dashboard_address": arguments.text,
    "callbacks": arguments.functions,
}
"""What the options may be that say how a run is carried out."""


@checked(**PROBLEM_OPTIONS, **PLAN_OPTIONS, lanes=arguments.integer(1))
def plan(
    dataset: str | Path,
    *,
    causal: bool = False,
    scale: float | None = None,
    dtype: Dtype | None = None,
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    chunks: int | None = None,
    decomposition: str = "auto",
    kernel: str | None = None,
    checkpoint_interval: Duration | None = None,
    lanes: int | None = None,
    result: str | Path | None = None,
) -> Plan:
    """Decide everything about a run of exact attention over `dataset`, and predict its bytes, memory and seconds.

    `dataset` is the path or URL of a Zarr group with q [B, Hq, N, D], k and v [B, Hkv, N, D] (or three-dimensional, as B =
    1) in float16, bfloat16 or float32. `scale` (positive, finite) defaults to 1/sqrt(D), `dtype` of the output to the
    inputs'; it is a name ("bfloat16", "bf16") or a dtype of NumPy or PyTorch. `device_memory` and `host_memory` are hard
    limits in bytes, as numbers or like "2GiB", on all that the run allocates (default: half of the free memory). `chunks`
    pins the number of chunks c, `decomposition` is "auto", "cqs" or "strips", `kernel` pins a kernel, and with it the CPU or
    GPUs. `checkpoint_interval` is what a kill may cost, in seconds or like "5m" (default: a minute; 0: no checkpoints, only
    finished query chunks are kept). `lanes` is the number of workers that will share the run (default: one, or one for each
    GPU); `result` tells on which file system partials would lie.

    Here and elsewhere a path may begin with `~` or `file://`. More heads than tokens are logged as a warning: the axes may
    be in another order.

    Raises ProblemError for input that is no attention problem, and for an option of another type, before anything is opened,
    and BudgetError, with the smallest budget that works.
    """
    opened = Dataset.open(dataset)
    problem = pose(opened, causal=causal, scale=scale, out_dtype=dtype)
    choices = _chosen(device_memory, host_memory, chunks, decomposition, kernel, checkpoint_interval)
    return _plan_for(opened, problem, choices, lanes, None if result is None else ResultPaths.at(result).state)


def _chosen(*parsed: Any) -> Choices:
    """The choices of a user, as `checked` has parsed them."""
    return Choices(*parsed)


def _plan_for(dataset: Dataset, problem: Problem, choices: Choices, lanes: int | None, scratch: Path | None) -> Plan:
    """Measure this machine and plan; partials would lie in the folder `scratch`."""
    if lanes is not None and lanes < 1:
        raise ProblemError(f"{lanes} workers: a run needs at least one; start workers and run again")
    hardware = describe_hardware(dataset, problem, kernel=choices.kernel, lanes=lanes, scratch=scratch)
    device_memory = choices.device_memory
    if device_memory is None:
        device_memory = default_host_memory() if hardware.device == "cpu" else default_device_memory(hardware.lanes)
    host_memory = default_host_memory() if choices.host_memory is None else choices.host_memory
    plan = make_plan(
        problem,
        hardware,
        device_memory=device_memory,
        host_memory=host_memory,
        inputs=input_cost(dataset, problem, host_memory),
        chunks=choices.chunks,
        decomposition=choices.decomposition,
        checkpoint_seconds=CHECKPOINT_SECONDS if choices.checkpoint_seconds is None else choices.checkpoint_seconds,
    )
    warning = overhead_warning(plan, hardware)
    if warning is not None:
        logger.warning("%s", warning)
    return plan


@checked(**PROBLEM_OPTIONS, **PLAN_OPTIONS, **RUN_OPTIONS, overwrite=arguments.boolean)
def attention(
    dataset: str | Path,
    result: str | Path,
    *,
    causal: bool = False,
    scale: float | None = None,
    dtype: Dtype | None = None,
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    chunks: int | None = None,
    decomposition: str = "auto",
    kernel: str | None = None,
    checkpoint_interval: Duration | None = None,
    time_limit: Duration | None = None,
    engine: str = "dask",
    client: Client | None = None,
    dashboard_address: str = DASHBOARD,
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
) -> Result:
    """Run exact attention over `dataset` and write `out` and `lse` as the Zarr group `result`, a local path.

    The options up to `checkpoint_interval` are those of `plan`. A run that would take longer than `time_limit`, in seconds
    or like "8h" from this call, ends before that with all it has done on disk. `engine` is "dask", or "inline": threads of
    this process without a scheduler, for small calls, notebooks and tests. With Dask the run uses the workers of `client`,
    a connected `distributed.Client` that is not asynchronous, or a cluster of its own in this process with its dashboard at
    `dashboard_address`. All workers of a client must have the same software and see the same dataset and result; for the
    first one it waits 60 seconds. `callbacks` are called with every `Event`. A finished result of the same problem and
    dataset is returned as it is, with a warning where its certificate failed (`overwrite` computes it again); an unfinished
    one is resumed, with the plan that it was begun with.

    A callback that raises an `Exception` is logged and called no more; `KeyboardInterrupt` or `SystemExit` from it end the
    run. In the main thread, the run holds SIGINT, SIGTERM, SIGHUP and SIGUSR1 back until what is in flight is on disk,
    unless they are ignored, and then delivers the first one; a second one is delivered at once. SIGUSR1, by which Slurm
    warns that time is short, ends the run as a time limit does, with TimeLimitError, after a handler of the caller's was
    called; a second SIGUSR1 changes nothing.

    Raises ProblemError (also where the cluster is not ready), BudgetError, ResultExistsError (something else is at `result`;
    `overwrite` replaces a result, and begins an unfinished run again), LockedError (another run writes it), IntegrityError
    (the dataset or a partial is damaged), TimeLimitError, TaskError (a task failed time and again), StalledError (no task
    ended or got on for three minutes, or for far longer than planned), WorkerLostError and OSError. After an error nothing
    has appeared at `result`, and the run can be resumed unless the error says otherwise.
    """
    until = _end(time_limit)
    check_engine(engine, client, dashboard_address)
    paths = ResultPaths.at(result)
    opened = Dataset.open(dataset)
    # Bad input is refused before a cluster starts.
    problem = pose(opened, causal=causal, scale=scale, out_dtype=dtype)
    refuse_to_replace_dataset(paths, opened)
    if is_finished(paths, problem, opened, overwrite):
        return finished_result(paths)

    choices = _chosen(device_memory, host_memory, chunks, decomposition, kernel, checkpoint_interval)
    begun = None if overwrite else find_unfinished(paths)
    if begun is not None:
        check_asked(begun, problem, opened)
        check_chosen(begun, choices)

    def decide(lanes: int) -> Plan:
        return begun.plan if begun is not None else _plan_for(opened, problem, choices, lanes, paths.state)

    with _planned_cluster(engine, client, dashboard_address, problem, kernel, decide, until) as (running, chosen):
        return run_plan(chosen, opened, paths, running, callbacks=callbacks, overwrite=overwrite, until=until)


@checked(**RUN_OPTIONS, accept_other_bits=arguments.boolean, check_finished=arguments.boolean)
def resume(
    result: str | Path,
    *,
    dataset: str | Path | None = None,
    accept_other_bits: bool = False,
    check_finished: bool = False,
    time_limit: Duration | None = None,
    engine: str = "dask",
    client: Client | None = None,
    dashboard_address: str = DASHBOARD,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Go on with the unfinished run to `result`, with the plan and the dataset that it was begun with.

    `dataset` says where it is now; without it, the journal is believed only if it names a local path. On a processor, GPU or
    torch that rounds otherwise the run is refused, unless `accept_other_bits` is given; then the report says so. The
    checksums of finished chunks are compared for a few seconds, or with `check_finished` all of them. The other options are
    those of `attention`. A finished result is returned as it is, with a warning where its certificate failed. Raises
    ProblemError where no run has begun, IntegrityError where the dataset has changed since or the journal is damaged, and
    what `attention` raises.
    """
    until = _end(time_limit)
    check_engine(engine, client, dashboard_address)
    paths, named = ResultPaths.at(result), None if dataset is None else parse_location(dataset)
    begun = find_unfinished(paths)
    if begun is None:
        if paths.attributes():
            return finished_result(paths)
        raise ProblemError(f"{paths.result}: no run to resume; begin one with `oocattn run` or oocattn.attention()")
    plan, opened = begun.plan, open_dataset(begun, named)
    resuming = Resuming(accept_other_bits, check_finished)
    with _planned_cluster(engine, client, dashboard_address, plan.problem, plan.kernel, lambda _: plan, until) as (
        running,
        _,
    ):
        return resume_run(begun, opened, paths, running, callbacks, until, resuming)


def _end(time_limit: Duration | None) -> float:
    """When a run that begins now must have ended, in seconds since the epoch."""
    return math.inf if time_limit is None else clock.now() + cast(float, time_limit)


def _check_time(until: float) -> None:
    if clock.now() > until:
        raise TimeLimitError("time limit reached while it waited for a first worker: nothing was begun")


@contextmanager
def _planned_cluster(
    engine: str,
    client: Client | None,
    dashboard_address: str,
    problem: Problem,
    kernel: str | None,
    decide: Callable[[int], Plan],
    until: float,
) -> Iterator[tuple[Client | Literal["inline"], Plan]]:
    """The client, or one of a new cluster, or "inline", and the plan that `decide` makes for so many lanes, as it starts."""
    if client is not None:
        refuse_lost_client(client)
    refuse_lost_threads()
    if client is not None:
        from oocattn.pipelines.engines.dask.cluster import wait_for_first, worker_addresses
        from oocattn.pipelines.engines.dask.obstacles import refuse_own_thread

        refuse_own_thread(client)
        wait_for_first(client, lambda: _check_time(until))
        yield client, decide(len(worker_addresses(client)))
        return
    with ThreadPool(1, "oocattn-prepare") as beside:
        warm = beside.submit(warm_up, problem, kernel)  # seconds in a new process, as importing Dask is
        if engine == "dask":
            from oocattn.pipelines.engines.dask.local_cluster import local_client
        warm.result()
        lanes = count_lanes(kernel)
        chosen = decide(lanes)
        rehearsed = beside.submit(rehearse, chosen)
        count = min(chosen.lanes, lanes)  # the plan may be of another machine
        with local_client(dashboard_address, count) if engine == "dask" else nullcontext(INLINE) as running:
            rehearsed.result()
            yield running, chosen


@checked(
    rows=arguments.integer(1),
    seed=arguments.integer(0, MOST_SEED),
    host_memory=arguments.size,
    checksums=arguments.boolean,
)
def verify(
    result: str | Path,
    *,
    rows: int = 64,
    seed: int = 0,
    dataset: str | Path | None = None,
    host_memory: Size | None = None,
    checksums: bool = True,
) -> Certificate:
    """Recompute sampled rows of a finished result in float64, compare its checksums, and write a certificate beside it.

    Of at most `rows` rows up to a quarter are the last and the first token and both sides of borders between chunks; the
    others are drawn uniformly from all rows, and of those the certificate says what they show. Which they are follows from
    `seed`. K and V are streamed, and `out` and `lse` read, within `host_memory` bytes (default: half of the free memory);
    `checksums=False` reads the sampled rows alone. `dataset` names the dataset if it was moved. The certificate is written
    to certificate.json and certificate.html in the folder RESULT.oocattn; where that cannot be, a warning says so.

    Raises IntegrityError where there is no finished result, ProblemError where the dataset is not of the result's problem
    and BudgetError, with the smallest budget that works.
    """

    from oocattn.verification.certify import certify  # `plan` does not need it

    found = open_result(result)
    with keep_denormals():
        return certify(
            ResultPaths.at(result),
            ResultArrays(found.out, found.lse),
            rows=rows,
            seed=seed,
            dataset=dataset,
            host_memory=default_host_memory() if host_memory is None else int(host_memory),
            checksums=checksums,
        )
