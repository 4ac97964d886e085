"""Workers that take part: all are asked before a run, and after some were lost.

A run does not begin while one is not ready, and all that is wrong is told at once. Of a run that goes on, those that are not
ready take no part. What they are asked is in `readiness`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from distributed import Client

from oocattn.errors import ProblemError, WorkerLostError
from oocattn.kernels.arithmetic import combine
from oocattn.pipelines.engines.base import Check
from oocattn.pipelines.engines.dask.cluster import (
    ANSWER_SECONDS,
    GONE_SECONDS,
    LEAST_ANSWER_SECONDS,
    ask_each,
    begin,
    living_workers,
    poll,
    wait_for_first,
)
from oocattn.pipelines.engines.dask.readiness import (
    EXPRESSION,
    NAMES,
    PACKAGES,
    SAME_SOFTWARE,
    Expectations,
    WorkerState,
    describe_interpreter,
    find_faults,
    find_interpreter_faults,
    inspect_worker,
    remove_probes,
)
from oocattn.text import MOST_SHOWN, some_of
from oocattn.units import format_seconds

MOST_NAMED = 20  # workers with the same fault

logger = logging.getLogger("oocattn")


@dataclass(frozen=True)
class Roll:
    """Workers that are ready, by address, what is wrong with others, by name, and the addresses of all that were
    asked, and of those that are to end."""

    ready: Mapping[str, WorkerState]
    wrong: Mapping[str, Sequence[str]] = field(default_factory=dict)
    asked: Collection[str] = ()
    leaving: Collection[str] = ()

    @property
    def have_left(self) -> bool:
        """Whether nobody is ready, because all were asked to end or are gone."""
        return not self.ready and (bool(self.leaving) or not self.wrong)

    @property
    def ids(self) -> dict[str, str]:
        """`Worker.id` of ready workers by address; a restarted one has another."""
        return {address: seen.id for address, seen in self.ready.items()}

    @property
    def computing(self) -> dict[str, str]:
        """Arithmetic of those that are ready (`arithmetic`)."""
        return combine([seen.computing for seen in self.ready.values()])

    def __str__(self) -> str:
        return "; ".join(self.lines)

    @property
    def lines(self) -> list[str]:
        """The faults in words, one line for each that workers share."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, found in self.wrong.items():
            alike.setdefault(tuple(found), []).append(name)
        return [f"{some_of(names, MOST_NAMED)} {', and '.join(found)}" for found, names in alike.items()]


def enlist(client: Client, expected: Expectations, check: Check) -> Roll:
    """The workers of a run that is to begin, all ready; ProblemError with all that is wrong with the cluster."""
    wait_for_first(client, check)
    roll = call_roll(client, expected, check)
    if roll.wrong:
        if len(str(roll)) > MOST_SHOWN // 2:
            for line in roll.lines:
                logger.error("%s", line)
        raise ProblemError(f"the cluster is not ready for this run: {roll}")
    if not roll.ready:
        raise WorkerLostError("all workers are gone before the run began; start some and try again")
    for name, values in roll.computing.items():
        if " | " in values:
            logger.warning(
                "the workers compute with different %s (%s): the bits of the result depend on the worker that computes each "
                "part; another run may give others",
                name,
                values,
            )
    return roll


def enlist_again(client: Client, expected: Expectations, check: Check) -> Roll:
    """The workers that can continue a run; others are logged."""
    roll = call_roll(client, expected, check)
    for line in roll.lines:
        logger.warning("%s; it takes no part", line)
    return roll


def call_roll(client: Client, expected: Expectations, check: Check) -> Roll:
    """Ask the scheduler and all workers; LockedError where the lock was lost."""
    here = describe_interpreter(PACKAGES)
    scheduler = _call(client, lambda: client.run_on_scheduler(eval, EXPRESSION, NAMES), check)
    reasons = _software_faults(scheduler, here)  # it unpickles the tasks as well
    wrong = {"the scheduler": reasons} if reasons else {}
    same, hosts = [], {}
    for address, found in _ask(client, living_workers(client), check, eval, EXPRESSION, NAMES).items():
        hosts[address] = f" (host {found['host']})" if isinstance(found, dict) else ""
        if reasons := _software_faults(found, here):
            wrong[f"worker {address}{hosts[address]}"] = reasons
        else:
            same.append(address)
    seen = _ask(client, same, check, inspect_worker, expected)
    probes = {address: each.probe for address, each in seen.items() if isinstance(each, WorkerState) and each.probe}
    there = set(remove_probes(expected.state, probes.values()))
    astray = [name for name in probes.values() if name not in there]
    if astray:  # on another file system, where they would stay
        _ask(client, list(probes), check, remove_probes, expected.state, astray)
    expected.claim.check()
    ready = {}
    for address, each in seen.items():
        reasons = (
            find_faults(each, expected, each.probe in there) if isinstance(each, WorkerState) else [_describe_silence(each)]
        )
        if reasons:
            wrong[f"worker {address}{hosts[address]}"] = reasons
        else:
            ready[address] = each
    leaving = [address for address, each in seen.items() if isinstance(each, WorkerState) and each.leaving]
    return Roll(ready, wrong, hosts, leaving)


def _software_faults(answer: object, here: Mapping[str, str]) -> list[str]:
    if isinstance(answer, dict):
        return find_interpreter_faults(answer, here)
    return [_describe_silence(answer)]


def _describe_silence(answer: object) -> str:
    """The fault of a process whose answer is an error."""
    if isinstance(answer, TimeoutError):
        return f"does not answer for {format_seconds(ANSWER_SECONDS)}: restart it"
    return f"cannot answer ({type(answer).__name__}: {answer}): see its log; {SAME_SOFTWARE}"


def _ask(
    client: Client, workers: Sequence[str], check: Check, function: Callable[..., Any], *arguments: object
) -> dict[str, Any]:
    """A function's result, or error, on each worker that is still there; TimeoutError where one is silent."""
    calls = ask_each(client, workers, ANSWER_SECONDS, check, function, *arguments)
    answers = {address: _answer_of(call) for address, call in calls.items()}
    if any(isinstance(each, OSError) and not isinstance(each, TimeoutError) for each in answers.values()):
        time.sleep(GONE_SECONDS)  # a connection broke: the scheduler may not know yet that the worker is gone
    there = living_workers(client) if calls else []
    return {address: each for address, each in answers.items() if address in there}


def _answer_of(call: Future[Any]) -> Any:
    """A call's result or error; TimeoutError of one that has not ended, which is cancelled."""
    if call.cancel() or call.cancelled():
        return TimeoutError()
    return call.exception() or call.result()


def _call(client: Client, call: Callable[[], Any], check: Check) -> Any:
    """A call's result or error; TimeoutError when late; `check` ends it by raising."""
    called = begin(client, call)

    def look(passed: float) -> None:
        if passed > LEAST_ANSWER_SECONDS:  # it has that also where a time limit has passed
            check()

    poll({"scheduler": called}, ANSWER_SECONDS, look)
    return _answer_of(called)
