"""One attempt at what is left of a run: lanes are opened, tasks are submitted a bounded window at a time, lanes close.

The window bounds what an engine knows of at a time, the edges of the graph bound what a lane holds (see `graph`). An attempt
ends with the first failure, and then what is in flight is on disk; the driver decides whether there is another attempt.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from oocattn import clock
from oocattn.errors import OocattnError, StalledError, TaintedError, TimeLimitError, WorkerLostError
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.engines.base import Lanes, Outcome, WorkersChangedError
from oocattn.pipelines.failing import SET_UP, naming
from oocattn.pipelines.graph import STEPS, Graph, Task, TaskId, pieces
from oocattn.pipelines.run import Run
from oocattn.pipelines.schedule import Schedule
from oocattn.pipelines.signals import InterruptedRunError, Interrupts
from oocattn.pipelines.standstill import Standstill
from oocattn.pipelines.watch.events import Attended, Callback, Progressed, Saved, Staged, Stalled, TaskEvent
from oocattn.planning.options import MOST_UNFINISHED, TASK_PIECE, TASK_WINDOW
from oocattn.storage.inputs.fingerprints import changed_arrays
from oocattn.storage.remote.limits import current_limit
from oocattn.units import format_seconds

PROGRESS_SECONDS = 1.0  # seconds between two looks at how far subproblems in flight are
WORKER_CHECK_SECONDS = 5.0  # seconds after which it is checked again whether the workers still live
STOPPED_SECONDS = 5.0  # that a wait lasts too long, without work in this process, where it was stopped
IN_FLIGHT = 2  # subproblems of a lane that others could not take over
AT_ONCE = 1.0  # seconds in which lanes close after a second signal, or are left

logger = logging.getLogger("oocattn")

T = TypeVar("T")


class Attempt:
    """What is left of a run, from the opening of its lanes to their end."""

    def __init__(
        self, run: Run, lanes: Lanes, schedule: Schedule, emit: Callback, deadline: Deadline, interrupts: Interrupts
    ) -> None:
        self._run = run
        self._lanes = lanes
        self._schedule = schedule
        self._to_stage = self._to_attend = schedule.left
        self._emit = emit
        self._deadline = deadline
        self._interrupts = interrupts
        self._unfinished: dict[TaskId, Task] = {}
        self._attending = self._attended = 0
        self._began = self._checked = time.monotonic()
        self._standstill = Standstill(lanes.workers, self._pending, lanes.look, emit, deadline)
        self._dataset_checked = False
        self._pairs_ended: Counter[str] = Counter()  # by worker: of subproblems that have ended
        self._pairs_told: dict[str, int] = {}
        self._looked = time.monotonic()

    def drive(self) -> None:
        """Open the lanes, run every task to completion, and close the lanes, however it ends.

        Raises the first failure, WorkerLostError where a worker or the scheduler is gone; but for a TaintedError, what the
        lanes have done is on disk then.
        """
        patience = AT_ONCE
        self._interrupts.tell = partial(self._lanes.outcomes.put, None)  # the next step is to look at it
        with self._prefer_worker_lost():
            try:
                self._open_lanes()
                self._run_to_completion()
                patience = self._deadline.silence_seconds
            except BaseException as error:
                self._stop(error)  # unless a second signal ends it
                patience = self._deadline.silence_seconds
                if isinstance(error, InterruptedRunError | TimeLimitError) and (failing := current_limit().failing):
                    raise type(error)(f"{error}; {failing}: check that server and the network") from None
                raise
            finally:
                self._lanes.close(patience)

    def _check_dataset(self) -> None:
        """Raise TaintedError where the dataset is not what it was when the run began."""
        dataset = self._run.dataset
        with naming("the check of the dataset"):
            changed = changed_arrays(dataset.as_found.within_run, dataset.fingerprint_again())
        if changed:
            raise TaintedError(
                f"{dataset.location}: {changed} of the dataset changed while the run read it; the result is discarded, run "
                "again"
            )
        self._dataset_checked = True

    def _open_lanes(self) -> None:
        with naming(SET_UP), self._prefer_worker_lost():
            opening = self._lanes.open()
            try:
                self._wait(opening, PROGRESS_SECONDS)
                while not opening.done():
                    self._check_workers()  # for one that has died Dask would wait half a minute
                    self._wait(opening, PROGRESS_SECONDS)
                opening.result()
            finally:
                opening.cancel()  # or lanes would be opened after their end
        self._standstill.begin()

    def _run_to_completion(self) -> None:
        """Submit every piece of the graph, and deal with the outcome of every task."""
        ahead = pieces(Graph(self._schedule).tasks())
        subproblems = 1  # few at first: reading begins while the rest is submitted
        while True:
            while self._has_room() and (batch := _take(ahead, subproblems * self._schedule.lanes)):
                self._submit(batch)
                subproblems = TASK_PIECE
            if not self._unfinished:
                break
            for task, outcome in self._next_outcomes():
                self._finish(task, outcome)
        if not self._dataset_checked:  # it had nothing left to read
            self._check_dataset()

    def _has_room(self) -> bool:
        """Whether another piece may be submitted: both what is to be attended and what is to be written is bounded."""
        lanes = self._schedule.lanes
        return self._attending < TASK_WINDOW * lanes and len(self._unfinished) < MOST_UNFINISHED * lanes

    def _submit(self, batch: list[list[Task]]) -> None:
        with naming("the submission of tasks"), self._prefer_worker_lost():
            self._lanes.submit(batch)
        for task in itertools.chain.from_iterable(batch):
            self._unfinished[task.id] = task
            self._attending += task.id[0] == "attend"

    def _next_outcomes(self) -> list[Outcome]:
        """Wait until tasks have ended. Raises InterruptedRunError, TimeLimitError, and StalledError when none ends."""
        ended: list[Outcome] = []
        while not ended:
            seconds = min(PROGRESS_SECONDS, self._check_time())
            if time.monotonic() - self._looked >= PROGRESS_SECONDS:
                self._look_at_lanes()
            if time.monotonic() - self._checked > WORKER_CHECK_SECONDS:
                self._check_workers()
            with suppress(queue.Empty):
                with self._waiting(seconds):
                    outcome = self._lanes.outcomes.get(timeout=seconds)
                while True:
                    if outcome is not None:
                        ended.append(outcome)
                    outcome = self._lanes.outcomes.get_nowait()
        return ended

    def _look_at_lanes(self) -> None:
        """Pass on how far subproblems in flight are. Raises WorkersChangedError where the lanes are to be others."""
        self._looked = time.monotonic()
        self._look_for_changes()
        for worker, lane in self._lanes.progress().items():
            self._standstill.step(worker, clock.now() - lane.stepped)
            in_flight = max(0, lane.pairs - self._pairs_ended[worker])
            if in_flight and lane.pairs != self._pairs_told.get(worker):
                self._pairs_told[worker] = lane.pairs
                now = clock.now()
                self._emit(Progressed(start=now, stop=now, worker=lane.worker, pairs=in_flight))
        self._standstill.note_silent(self._lanes.silent())

    def _look_for_changes(self) -> None:
        """Raise WorkersChangedError where a worker leaves, or where workers have joined that can be used by now."""
        self._look_for_leaving()
        joined, more = self._lanes.joined(), self._to_attend > IN_FLIGHT * self._schedule.lanes
        if joined and more and time.monotonic() - self._began > self._run.plan.joining_seconds:
            raise WorkersChangedError(
                f"{len(joined)} worker{'s' * (len(joined) > 1)} joined: what is left is dealt out again"
            )

    def _look_for_leaving(self) -> None:
        """Raise WorkersChangedError where a worker leaves."""
        leaving = self._lanes.leaving()
        if leaving:
            words = f"worker {', '.join(sorted(leaving))} was asked to end, and hands over what it has done"
            raise WorkersChangedError(words, len(leaving))

    def _finish(self, task: Task, outcome: TaskEvent | BaseException) -> None:
        """Pass on what a task did, or raise its error."""
        if isinstance(outcome, BaseException):
            if not isinstance(outcome, TaintedError):
                self._look_for_leaving()  # it explains it, as one that is gone does
            self._check_workers()
            with naming(task.place):
                raise outcome
        self._standstill.progress(self._lanes.workers[task.lane])
        del self._unfinished[task.id]
        self._lanes.forget(task)
        self._emit(outcome)
        self._deadline.learn(outcome)
        if isinstance(outcome, Attended):
            self._pairs_ended[self._lanes.workers[task.lane]] += outcome.pairs
            self._attending -= 1
            self._attended += 1
            self._to_attend -= 1
        elif isinstance(outcome, Staged):
            self._to_stage -= 1
            if not self._to_stage:  # all is read, and the driver has little else to do
                self._check_dataset()

    def _check_workers(self) -> None:
        """Raise WorkerLostError when a worker is gone, for its tasks can end nowhere else."""
        lost = self._wait_for(self._lanes.find_lost())
        if lost:
            raise WorkerLostError(f"worker {', '.join(sorted(lost))} is gone with what it held in memory")
        self._checked = time.monotonic()

    @contextmanager
    def _prefer_worker_lost(self) -> Iterator[None]:
        """Raise WorkerLostError for what fails because a worker or the scheduler is gone."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # among them distributed's own of connections that broke
            if not isinstance(error, OocattnError):
                self._check_workers()
            raise

    def _stop(self, error: BaseException) -> None:
        """Let what is executing end, and have what lanes hold in memory on disk, unless the error says that it is wrong."""
        start = clock.now()
        deadline = self._deadline
        self._lanes.stop(deadline.silence_seconds if isinstance(error, StalledError) else deadline.patience_seconds)
        saved = 0 if isinstance(error, TaintedError) else self._lanes.save()
        if saved:
            self._emit(Saved(start=start, stop=clock.now(), bytes=saved))

    def _pending(self) -> dict[str, list[Task]]:
        """The unfinished tasks of each worker."""
        pending: defaultdict[str, list[Task]] = defaultdict(list)
        for task in list(self._unfinished.values()):
            pending[self._lanes.workers[task.lane]].append(task)
        return pending

    def _wait_for(self, call: Future[T]) -> T:
        """What a call returns that waits for workers or the scheduler, and may hang."""
        while not call.done():
            self._wait(call)
        return call.result()

    def _wait(self, call: Future[T], most: float = WORKER_CHECK_SECONDS) -> None:
        """Wait for a call, for so many seconds at most."""
        seconds = min(most, self._check_time())
        with self._waiting(seconds):
            wait([call], timeout=seconds)

    @contextmanager
    def _waiting(self, most: float) -> Iterator[None]:
        """Count what is inside as waiting for tasks or workers; StalledError where nothing has ended for too long."""
        start, ran = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            waited = time.monotonic() - start
            stopped = waited - most - (time.process_time() - ran)  # the clock goes on while this process is stopped
            if stopped >= STOPPED_SECONDS and self._lanes.in_process:
                self._tell_stopped(stopped)
            self._standstill.add(min(most, waited))

    def _tell_stopped(self, seconds: float) -> None:
        """Pass on that this process, and its lanes with it, was stopped for so long until now."""
        now = clock.now()
        reason = f"process {os.getpid()} was stopped for {format_seconds(seconds)}, and its run with it"
        logger.warning("%s; the run continues", reason)
        self._emit(Stalled(start=now - seconds, stop=now, reason=reason))
        self._emit(Stalled(start=now, stop=now, reason=""))

    def _check_time(self) -> float:
        """Seconds until it is to be asked again; InterruptedRunError or TimeLimitError where the run must end."""
        if self._interrupts.asked:
            logger.warning(
                "ending: what is in flight is finished and saved first, which may take %s; a second signal ends at once",
                format_seconds(self._deadline.in_flight_seconds),
            )
            raise InterruptedRunError("interrupted: what was in flight is on disk")
        left = self._deadline.seconds_left
        if left <= 0:
            raise TimeLimitError(self._describe_time_limit())
        return min(WORKER_CHECK_SECONDS, left)

    def _describe_time_limit(self) -> str:
        plan = self._run.plan
        words = (
            f"time limit reached: {plan.subproblems - self._to_attend:,} of {plan.subproblems:,} subproblems are done, "
            "not counting those in flight"
        )
        if not self._attended:
            words += f", none of them since the start: one takes about {format_seconds(plan.subproblem_seconds)}"
            words += f", so allow {format_seconds(self._deadline.least_seconds)} and what it takes to start"
        return words


def _take(ahead: Iterator[list[Task]], subproblems: int) -> list[list[Task]]:
    """The next pieces, with the tasks of about so many subproblems: an engine takes them at less cost together."""
    batch: list[list[Task]] = []
    while sum(map(len, batch)) < subproblems * len(STEPS) and (piece := next(ahead, None)) is not None:
        batch.append(piece)
    return batch
