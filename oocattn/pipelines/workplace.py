"""Where a run is carried out: a cluster of the caller's, a new one in this process, or threads of this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from oocattn import clock
from oocattn.cores import Workers
from oocattn.errors import ProblemError, TimeLimitError
from oocattn.forks import refuse_lost_client, refuse_lost_threads
from oocattn.naming import named
from oocattn.pipelines.engines import check_engine
from oocattn.pipelines.engines.base import Engine
from oocattn.pipelines.lane.rehearsal import rehearse
from oocattn.planning.machine import Engine as EngineName
from oocattn.planning.measure import count_lanes, warm_up
from oocattn.planning.plan import Plan
from oocattn.problem.problem import Problem
from oocattn.storage.paths import ResultPaths
from oocattn.threads import ThreadPool

if TYPE_CHECKING:  # importing distributed takes a second: only runs do, while the GPU starts
    from distributed import Client


@dataclass(frozen=True)
class Workplace:
    """What a caller says of where a run is carried out. Raises ProblemError for what contradicts itself."""

    engine: EngineName
    client: Client | None
    dashboard_address: str

    def __post_init__(self) -> None:
        check_engine(self.engine, has_client=self.client is not None, dashboard_address=self.dashboard_address)
        if self.client is not None:
            from oocattn.pipelines.engines.dask.connecting import check_client

            check_client(self.client)

    def check_result(self, paths: ResultPaths) -> None:
        """Raise ProblemError where the workers could not write the result."""
        if paths.stored is None:
            return
        paths.stored.check_writable()
        if self.client is not None and paths.stored.is_of_this_process:
            raise ProblemError(
                f"result: {paths.result} is an object of this process, and the workers of {named('client')} cannot write "
                f"there: expected a path or a URL; give one, or leave {named('client')} out"
            )

    @contextmanager
    def prepare(
        self,
        problem: Problem,
        kernel: str | None,
        decide: Callable[[Workers], Plan],
        until: float,
        *,
        precise: bool = False,
    ) -> Iterator[tuple[Engine, Plan]]:
        """Have an engine while inside, and the plan that `decide` makes.

        Raises ProblemError where no worker can be had, TimeLimitError where none has come by `until`.
        """
        if self.client is not None:
            refuse_lost_client(self.client)
            refuse_lost_threads()
            from oocattn.pipelines.engines.dask.engine import DaskEngine

            yield DaskEngine(self.client), decide(_look_at_workers(self.client, until))
            return
        refuse_lost_threads()
        with ThreadPool(1, "oocattn-prepare") as beside:
            warm = beside.submit(warm_up, problem, kernel, precise)  # seconds in a new process, as importing Dask is
            open_engine = self._import_engine()
            warm.result()
            lanes = count_lanes(kernel)
            plan = decide(Workers(lanes, lanes, lanes))
            rehearsed = beside.submit(rehearse, plan)
            with open_engine(min(plan.lanes, lanes)) as engine:  # the plan may be of another machine
                rehearsed.result()
                yield engine, plan

    def _import_engine(self) -> Callable[[int], AbstractContextManager[Engine]]:
        """What opens an engine in this process, with so many workers."""
        if self.engine == "inline":
            from oocattn.pipelines.engines.inline import InlineEngine

            return lambda count: nullcontext(InlineEngine(count))
        from oocattn.pipelines.engines.dask.engine import local_engine

        return partial(local_engine, self.dashboard_address)


def _look_at_workers(client: Client, until: float) -> Workers:
    """The workers of a client; a first one is waited for."""
    from oocattn.pipelines.engines.dask.cluster import find_cores, host_of, is_in_process, wait_for_first, worker_addresses
    from oocattn.pipelines.engines.dask.obstacles import refuse_own_thread

    def check() -> None:
        if clock.now() > until:
            raise TimeLimitError("time limit reached while it waited for a first worker: nothing was begun")

    refuse_own_thread(client)
    wait_for_first(client, check)
    workers = worker_addresses(client, check=check)
    hosts = Counter(map(host_of, workers))
    of_process = max(1, sum(map(is_in_process, workers)))
    return Workers(len(workers), max(hosts.values(), default=0), of_process, lambda: find_cores(client, workers, check))
