"""The driver's side of the lanes of an attempt: opened on the workers that take part, stopped, saved and closed.

No other worker of the cluster is touched. As a run ends, a worker that fails or is silent costs what it held, never the end.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from distributed import Client, Future

from oocattn.errors import WorkerLostError
from oocattn.pipelines.deadline import Deadline
from oocattn.pipelines.engines.dask.cluster import begin_call, living_workers
from oocattn.pipelines.engines.dask.tasks import close_lane, open_lane, save, stop
from oocattn.pipelines.lane.lane import Job
from oocattn.storage.files.operations import words_of

SAVING = 600.0
"""Seconds that saving may take."""

PAUSE = 0.05
"""Seconds between two looks at whether tasks still execute."""

logger = logging.getLogger("oocattn")


class Lanes:
    """One lane on each of these workers, by address, for a job."""

    def __init__(self, client: Client, job: Job, workers: Collection[str], deadline: Deadline) -> None:
        self._process = os.getpid()
        self._client = client
        self._job = job
        self._workers = workers
        self._deadline = deadline
        self._answering: list[str] = []  # as the run ends

    def open(self) -> None:
        """Make the lanes. Raises what the first that fails raises."""
        self._client.run(open_lane, self._job, workers=list(self._workers))

    def stop(self, tasks: Sequence[Future[Any]], patience: float) -> None:
        """Let nothing else begin of these tasks, and what is executing end, for so many seconds."""
        self._answering = self._living()
        if not self._answering:
            return
        with self._telling("some tasks may go on"):
            self._client.cancel(list(tasks), force=True, reason="the run has ended")
        until = time.monotonic() + patience
        while any(self._ask_stopped(stop, self._deadline.silence)):
            if time.monotonic() > until:
                logger.warning("some tasks did not end in time: their work is not saved")
                break
            time.sleep(PAUSE)

    def save(self) -> int:
        """Have on disk what stopped lanes hold in memory; return the bytes written."""
        return sum(self._ask_stopped(save, SAVING))

    def close(self) -> None:
        """Close the lanes of all workers that are still there; those of the others are gone with them."""
        self._ask(close_lane, self._living(), self._deadline.silence, "its lane may not be closed, and keep its memory")

    def _ask_stopped(self, function: Callable[..., object], seconds: float) -> list[int]:
        """What this returns on each worker that has answered so far."""
        consequence = "what it held in memory may be lost, and is computed again"
        found = self._ask(function, self._answering, seconds, consequence)
        self._answering = list(found)
        return list(found.values())

    def _ask(
        self, function: Callable[..., object], workers: Collection[str], seconds: float, consequence: str
    ) -> dict[str, int]:
        """What this returns on each of these workers; one that fails or is silent is named, with the consequence."""
        run, answers = self._job.run, {}
        for address in workers:
            answers[address] = begin_call(partial(self._client.run, function, run, workers=[address], on_error="return"))
        wait(answers.values(), timeout=seconds)
        found: dict[str, int] = {}
        for address, answer in answers.items():
            with self._telling(f"worker {address}: {consequence}"):
                said = answer.result(timeout=0)[address]
                if isinstance(said, BaseException):
                    raise said
                found[address] = int(said)
        return found

    def _living(self) -> list[str]:
        """The workers that are still there; none where the scheduler is not, or in a fork of the process of the run."""
        if os.getpid() != self._process:  # a listener has forked
            return []
        with suppress(WorkerLostError, TimeoutError):
            there = begin_call(lambda: living_workers(self._client)).result(timeout=self._deadline.silence)
            return [address for address in there if address in self._workers]
        return []

    @contextmanager
    def _telling(self, consequence: str) -> Iterator[None]:
        """What fails inside is logged, with what comes of it."""
        try:
            yield
        except Exception as error:
            logger.warning("%s: %s", consequence, words_of(error))
