"""The public functions: plan, run, look at and verify exact attention over a dataset on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr

from oocattn.certificate import Certificate
from oocattn.certifying import certify
from oocattn.errors import IntegrityError, LockedError, ProblemError, ResultExistsError
from oocattn.hardware import count_lanes, default_device_memory, default_host_memory, describe_hardware, input_cost, warm_up
from oocattn.pipelines.events import Callback
from oocattn.pipelines.rehearsal import rehearse
from oocattn.pipelines.report import RunReport
from oocattn.pipelines.status import Status, StatusFile, read_status
from oocattn.planner import make_plan
from oocattn.plans import Plan
from oocattn.problem import Problem, make_problem
from oocattn.resuming import Choices, Unfinished, begin_journal, describe, find_unfinished
from oocattn.storage.create import refuse_to_destroy
from oocattn.storage.dataset import Dataset
from oocattn.storage.lock import Lock
from oocattn.storage.result import ResultArrays, ResultPaths, read_json
from oocattn.units import parse_size
from oocattn.version import versions

if TYPE_CHECKING:  # importing distributed takes a second: only runs do, while the GPU starts
    from distributed import Client


@dataclass(frozen=True)
class Result:
    """A finished result: `out` [B, Hq, N, D] in the output's dtype, `lse` [B, Hq, N] float32, and how it came about.

    `report` is None for a result that was copied without the folder beside it.
    """

    path: Path
    out: zarr.Array[Any]
    lse: zarr.Array[Any]
    report: RunReport | None


def plan(
    dataset: str | Path,
    *,
    causal: bool = False,
    scale: float | None = None,
    dtype: str | None = None,
    device_memory: float | str | None = None,
    host_memory: float | str | None = None,
    chunks: int | None = None,
    decomposition: str = "auto",
    kernel: str | None = None,
    lanes: int | None = None,
    result: str | Path | None = None,
) -> Plan:
    """Decide everything about a run of exact attention over `dataset`, and predict its bytes, memory and seconds.

    `dataset` is the path or URL of a Zarr group with q [B, Hq, N, D], k and v [B, Hkv, N, D] (or three-dimensional, as
    B = 1) in float16, bfloat16 or float32. `scale` defaults to 1/sqrt(D), `dtype` of the output to the inputs'.
    `device_memory` and `host_memory` are hard limits in bytes, as numbers or like "2GiB", on all that the run allocates
    (default: half of the free memory). `chunks` pins the number of chunks c, `decomposition` is "auto", "cqs" or
    "strips", `kernel` pins a kernel, and with it the CPU or GPUs. `lanes` is the number of workers that will share the run
    (default: one, or one for each GPU); `result` tells on which file system partials would lie.

    Raises ProblemError for input that is no attention problem and BudgetError, with the smallest budget that works.
    """
    opened = Dataset.open(str(dataset))
    problem = make_problem(*opened.specs, causal=causal, scale=scale, out_dtype=dtype)
    choices = Choices(device_memory, host_memory, chunks, decomposition, kernel)
    return _plan_for(opened, problem, choices, lanes, None if result is None else ResultPaths.at(result).state)


def _plan_for(dataset: Dataset, problem: Problem, choices: Choices, lanes: int | None, scratch: Path | None) -> Plan:
    """Measure this machine and plan; partials would lie in the folder `scratch`."""
    if lanes is not None and lanes < 1:
        raise ProblemError(f"{lanes} workers: a run needs one at least; start them and try again")
    hardware = describe_hardware(dataset, problem, kernel=choices.kernel, lanes=lanes, scratch=scratch)
    device_memory = choices.device_bytes
    if device_memory is None:
        device_memory = default_host_memory() if hardware.device == "cpu" else default_device_memory(hardware.lanes)
    return make_plan(
        problem,
        hardware,
        device_memory=device_memory,
        host_memory=default_host_memory() if choices.host_bytes is None else choices.host_bytes,
        inputs=input_cost(dataset, problem),
        chunks=choices.chunks,
        decomposition=choices.decomposition,
    )


def attention(
    dataset: str | Path,
    result: str | Path,
    *,
    causal: bool = False,
    scale: float | None = None,
    dtype: str | None = None,
    device_memory: float | str | None = None,
    host_memory: float | str | None = None,
    chunks: int | None = None,
    decomposition: str = "auto",
    kernel: str | None = None,
    client: Client | None = None,
    dashboard_address: str = "127.0.0.1:0",
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
) -> Result:
    """Run exact attention over `dataset` and write `out` and `lse` as the Zarr group `result`, a local path.

    The options up to `kernel` are those of `plan`. The run uses the workers of `client`, which must see the same paths,
    or a cluster of its own in this process with its dashboard at `dashboard_address`. `callbacks` are called with every
    `Event`. A finished result of the same problem and dataset is returned as it is; an unfinished one is resumed, with the
    plan that it was begun with.

    Raises ProblemError, BudgetError, ResultExistsError (something else is at `result`; `overwrite` replaces a Zarr
    group, and begins an unfinished run anew), LockedError (another run writes it), IntegrityError (the dataset or a partial
    is damaged), WorkerLostError and OSError. After an error nothing has appeared at `result`, and the run can be resumed
    unless the error says otherwise.
    """
    paths = ResultPaths.at(result)
    opened = Dataset.open(str(dataset))
    # Bad input is refused before a cluster starts.
    problem = make_problem(*opened.specs, causal=causal, scale=scale, out_dtype=dtype)
    _refuse_to_replace_dataset(paths, opened)
    if _is_finished(paths, problem, opened, overwrite):
        return open_result(paths.result)

    choices = Choices(device_memory, host_memory, chunks, decomposition, kernel)
    begun = None if overwrite else find_unfinished(paths)
    if begun is not None:
        begun.check_asked(problem, opened)
        begun.check_chosen(choices)

    def decide(lanes: int) -> Plan:
        return begun.plan if begun is not None else _plan_for(opened, problem, choices, lanes, paths.state)

    with _planned_cluster(client, dashboard_address, problem, kernel, decide) as (running, chosen):
        return run_plan(chosen, opened, paths, running, callbacks=callbacks, overwrite=overwrite)


def resume(
    result: str | Path,
    *,
    client: Client | None = None,
    dashboard_address: str = "127.0.0.1:0",
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Go on with the unfinished run to `result`, with the plan and the dataset that it was begun with.

    The options are those of `attention`. A finished result is returned as it is. Raises ProblemError where no run has begun,
    IntegrityError where the dataset has changed since or the journal is damaged, and what `attention` raises.
    """
    paths = ResultPaths.at(result)
    begun = find_unfinished(paths)
    if begun is None:
        if paths.attributes():
            _tidy(paths)
            return open_result(paths.result)
        raise ProblemError(f"{paths.result}: no run to resume; begin one with `oocattn run` or oocattn.attention()")
    plan, dataset = begun.plan, begun.open_dataset()
    with (
        _planned_cluster(client, dashboard_address, plan.problem, plan.kernel, lambda _: plan) as (running, _),
        Lock(paths.lock),
    ):
        begun = find_unfinished(paths)
        if begun is not None:  # else another process has finished it in between
            _carry_on(begun, dataset, paths, running, callbacks)
    return open_result(paths.result)


@contextmanager
def _planned_cluster(
    client: Client | None, dashboard_address: str, problem: Problem, kernel: str | None, decide: Callable[[int], Plan]
) -> Iterator[tuple[Client, Plan]]:
    """The client, or one of a new cluster, and the plan that `decide` makes for so many lanes, as it starts."""
    if client is not None:
        from oocattn.pipelines.cluster import worker_addresses

        yield client, decide(len(worker_addresses(client)))
        return
    with ThreadPoolExecutor(1) as beside:
        warm = beside.submit(warm_up, problem, kernel)  # seconds in a new process, as importing Dask is
        from oocattn.pipelines.cluster import local_client

        warm.result()
        chosen = decide(count_lanes(kernel))
        rehearsed = beside.submit(rehearse, chosen)
        with local_client(dashboard_address, chosen.lanes) as own:
            rehearsed.result()
            yield own, chosen


def run_plan(
    plan: Plan,
    dataset: Dataset,
    paths: ResultPaths,
    client: Client,
    *,
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
) -> Result:
    """Carry out a plan made for `dataset`: the part of `attention` after planning, for callers who plan themselves.

    An unfinished run of an equal plan is resumed.
    """
    _refuse_to_replace_dataset(paths, dataset)
    if _is_finished(paths, plan.problem, dataset, overwrite):
        return open_result(paths.result)
    dataset.check_complete()
    paths.state.mkdir(parents=True, exist_ok=True)
    with Lock(paths.lock):
        if _is_finished(paths, plan.problem, dataset, overwrite):  # another run may have ended in between
            return open_result(paths.result)
        begun = None if overwrite else find_unfinished(paths)
        if begun is None:
            _begin(plan, dataset, paths, client, callbacks)
        else:
            begun.check_asked(plan.problem, dataset)
            begun.check_plan(plan)
            _carry_on(begun, dataset, paths, client, callbacks)
    return open_result(paths.result)


def _begin(plan: Plan, dataset: Dataset, paths: ResultPaths, client: Client, callbacks: Sequence[Callback]) -> None:
    """Run a plan from its beginning; the result is locked."""
    from oocattn.pipelines.run import Work, run

    problem, identity = plan.problem, describe(plan.problem, dataset)
    decided = ("digest", "decomposition", "chunks", "span", "chunk_rows", "out_chunk_rows", "kernel")
    arrays = paths.begin(
        shape=(problem.batch, problem.query_heads, problem.tokens, problem.head_dim),
        dtype=problem.out_dtype,
        chunk_rows=plan.out_chunk_rows,
        attributes={**identity, "plan": {name: getattr(plan, name) for name in decided}, "versions": versions()},
    )
    journal = begin_journal(paths, plan, identity["dataset"])
    work = Work(plan, dataset, identity["dataset"]["fingerprint"], paths, arrays, journal)
    run(work, client, (StatusFile(paths.status), *callbacks))


def _carry_on(
    begun: Unfinished, dataset: Dataset, paths: ResultPaths, client: Client, callbacks: Sequence[Callback]
) -> None:
    """Do what is left of a run; the result is locked."""
    from oocattn.pipelines.run import Work, run

    work = Work(begun.plan, dataset, begun.dataset["fingerprint"], paths, paths.resume(), begun.journal)
    run(work, client, (StatusFile(paths.status), *callbacks))


def _is_finished(paths: ResultPaths, problem: Problem, dataset: Dataset, overwrite: bool) -> bool:
    """Whether the result is there already. Raises ResultExistsError if something else is and may not be replaced."""
    found = paths.attributes()
    if found is None or overwrite:
        refuse_to_destroy(paths.result, overwrite)
        return False
    ours = describe(problem, dataset)
    if all(found.get(name) == ours[name] for name in ours):
        _tidy(paths)
        return True
    differs = next((name for name in ours if found and found.get(name) != ours[name]), "content")
    raise ResultExistsError(
        f"{paths.result} exists and is not the result of this run (its {differs} differs): choose another path, or "
        "replace it with overwrite=True (--overwrite)"
    )


def _tidy(paths: ResultPaths) -> None:
    """Do what a run that was killed at its very end has left to do."""
    if paths.untidy:
        with suppress(LockedError), Lock(paths.lock):
            paths.tidy()


def _refuse_to_replace_dataset(paths: ResultPaths, dataset: Dataset) -> None:
    """Raise ResultExistsError where the result's path is the dataset's, holds it, or is that of one of its arrays."""
    location, result = Path(dataset.location).resolve(), paths.result.resolve()
    inside = any(result.is_relative_to(location / name) for name in dataset.arrays)
    if "://" not in dataset.location and (inside or location.is_relative_to(result)):
        raise ResultExistsError(
            f"{paths.result} belongs to the dataset {dataset.location}: choose another path for the result"
        )


def open_result(result: str | Path) -> Result:
    """A finished result, its arrays open for reading. Raises IntegrityError where there is none."""
    paths = ResultPaths.at(result)
    report = read_json(paths.report)
    if not os.path.lexists(paths.result):
        raise IntegrityError(f"{paths.result}: no finished result here; `oocattn status` says whether one is under way")
    arrays = ResultArrays.open(paths.result)
    return Result(paths.result, arrays.out, arrays.lse, RunReport.from_json(report) if report else None)


def status(result: str | Path) -> Status:
    """How far the run to `result` is: from any process, whether or not a run is alive."""
    return read_status(ResultPaths.at(result))


def verify(
    result: str | Path,
    *,
    rows: int = 64,
    seed: int = 0,
    dataset: str | Path | None = None,
    host_memory: float | str | None = None,
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
    if rows < 1 or seed < 0:
        raise ProblemError(f"rows = {rows}, seed = {seed}: expected at least one row and a seed that is not negative")
    found = open_result(result)
    return certify(
        ResultPaths.at(result),
        ResultArrays(found.out, found.lse),
        found.report,
        rows=rows,
        seed=seed,
        dataset=None if dataset is None else str(dataset),
        host_memory=default_host_memory() if host_memory is None else parse_size(host_memory, "host memory"),
        checksums=checksums,
    )
