"""The attempts at a run, as `RESULT.oocattn/attempts.json` keeps them through kills: what each did, and how it ended.

An attempt is a process that began or resumed the run. Number and size of everything are bounded. What is read is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from oocattn.errors import IntegrityError
from oocattn.pipelines.watch.events import Resource
from oocattn.pipelines.watch.series import MOST_BINS
from oocattn.pipelines.watch.status_record import Status
from oocattn.planning.plan import Plan
from oocattn.records import Count, Pattern, Positive, Range, Seconds, from_json, to_json
from oocattn.storage.files.durable import read_json
from oocattn.storage.files.folders import is_folder
from oocattn.storage.paths import ATTEMPTS, ResultPaths

FORMAT = 1
"""Of the file."""

MOST_BYTES = 1 << 22  # of the file
MOST_ATTEMPTS = 64  # that are kept: the first and the last ones
MOST_DETAILED = 8  # of them that keep what they did over time: the last ones
MOST_ROWS = 112  # of a timeline: seven resources of sixteen lanes
MOST_LINES = 50  # of the log of an attempt
MOST_NAMES = 64  # of anything that has names
MOST_TEXT, MOST_PLAN = 2000, 20_000  # characters of a text, and of the words of a plan

Amount = Annotated[float, Range(0.0, 1e30)]
Percents = Annotated[str, Pattern(rf"([0-9][0-9]){{0,{MOST_BINS}}}")]
Text = Annotated[str, Pattern(rf"(?s).{{0,{MOST_TEXT}}}")]

End = Literal["", "finished", "stopped", "failed", "killed"]


@dataclass(frozen=True)
class PlannedLink:
    """A link of the plan: its amount in bytes or FLOP, and the seconds that it is predicted to take."""

    name: Text
    amount: Amount
    seconds: Seconds


@dataclass(frozen=True)
class Planned:
    """What the run was to do: some of its plan, in figures, all of it in words, and the command that repeats it."""

    problem: Text
    dataset: Text
    command: Text
    plan: Annotated[str, Pattern(rf"(?s).{{0,{MOST_PLAN}}}")]
    digest: Text
    device: Text
    kernel: Text
    lanes: Positive
    subproblems: Count
    tokens: Positive
    pairs: Count
    flops: Amount
    kernel_flops: Amount
    seconds: Seconds
    links: tuple[PlannedLink, ...]
    peak_host: Count
    host_memory: Count
    peak_device: Count
    device_memory: Count
    scratch_disk: Count

    @classmethod
    def of(cls, plan: Plan, dataset: str, command: str) -> Planned:
        """The record of a plan over the dataset of that name."""
        on_gpu = plan.device == "cuda"
        return cls(
            problem=_shortened(str(plan.problem), MOST_TEXT),
            dataset=_shortened(dataset, MOST_TEXT),
            command=_shortened(command, MOST_TEXT),
            plan=_shortened(str(plan), MOST_PLAN),
            digest=plan.digest,
            device=plan.device,
            kernel=plan.kernel,
            lanes=plan.lanes,
            subproblems=plan.subproblems,
            tokens=plan.problem.out_rows * plan.problem.batch,
            pairs=plan.problem.pairs,
            flops=float(plan.problem.flops),
            kernel_flops=float(plan.machine.kernel_flops),
            seconds=plan.seconds,
            links=tuple(PlannedLink(link.name, float(link.amount), link.seconds) for link in plan.links),
            peak_host=plan.peak_host,
            host_memory=plan.host_memory,
            peak_device=plan.peak_device if on_gpu else 0,
            device_memory=plan.device_memory if on_gpu else 0,
            scratch_disk=plan.scratch_disk,
        )


@dataclass(frozen=True)
class LogLine:
    """Something that happened, at a moment (seconds since the epoch)."""

    moment: Seconds
    words: Text


@dataclass(frozen=True)
class BusyRow:
    """A resource of a lane: seconds in which it was busy, and the percentage of each bin, in two digits (99: all of it)."""

    lane: Text
    resource: Resource
    seconds: Seconds
    percent: Percents

    @property
    def percentages(self) -> list[int]:
        """The percentage of each bin in which it was busy, up to 99."""
        return [int(self.percent[place : place + 2]) for place in range(0, len(self.percent), 2)]


@dataclass(frozen=True)
class OverTime:
    """What an attempt did over time, in bins of `width` seconds.

    `rates` are amounts a second by name, `host` and `device` the highest bytes of memory in each bin, and `busy` a row for
    each resource of each lane, or their mean where there are many lanes.
    """

    width: Annotated[float, Range(1e-6, 1e12)]
    rates: Mapping[str, tuple[Amount, ...]]
    host: tuple[Count, ...]
    device: tuple[Count, ...]
    busy: tuple[BusyRow, ...]


@dataclass(frozen=True)
class Attempt:
    """A process that worked on the run: `started`, and `seen` at work last (seconds since the epoch).

    `end` is "" while nothing says how it ended: it is running, or was killed. Then `seen` is its last heartbeat, and the
    counts are those written down before it. `words` say why it ended. `subproblems` are those that it did after
    `subproblems_before`, and once it has ended those that are on disk; `pairs`, after `pairs_before`, count all its work.
    `busy` are the seconds of each resource over all its lanes, `peak_host` and `peak_device` the most bytes that its lanes
    held. Of what was copied to GPUs and from them a CPU has none.
    """

    started: Seconds
    seen: Seconds
    end: End
    words: Text
    process: Text
    hardware: Mapping[str, Text]
    versions: Mapping[str, Text]
    lanes: Count
    subproblems_before: Count
    pairs_before: Count
    subproblems: Count
    pairs: Count
    bytes_read: Count
    bytes_written: Count
    bytes_saved: Count
    bytes_copied_in: Count
    bytes_copied_out: Count
    peak_host: Count
    peak_device: Count
    recomputed: Count
    retried: Count
    workers_lost: Count
    out_of_memory: Count
    busy: Mapping[str, Seconds]
    log: tuple[LogLine, ...]
    over_time: OverTime | None

    @property
    def seconds(self) -> float:
        """How long it is known to have worked."""
        return max(0.0, self.seen - self.started)

    @property
    def state(self) -> str:
        """How it ended, or that it is running."""
        return self.end or "running"

    def having_saved(self, done: int) -> Attempt:
        """The same of an attempt after which so many subproblems are on disk: a kill costs what was not saved."""
        return replace(self, subproblems=max(0, done - self.subproblems_before))

    @property
    def faults(self) -> dict[str, int]:
        """How often something went wrong that it recovered from, in words."""
        return {
            "tasks retried": self.retried,
            "workers lost": self.workers_lost,
            "partials computed again": self.recomputed,
            "times out of device memory": self.out_of_memory,
        }


@dataclass(frozen=True)
class Attempts:
    """The attempts at the run of that identity, and how many between the first and the others are left out."""

    format: Annotated[int, Range(FORMAT, FORMAT)]
    run: Text
    planned: Planned
    left_out: Count
    attempts: tuple[Attempt, ...]

    def adding(self, attempt: Attempt) -> Attempts:
        """The same with one more attempt, within what is kept."""
        kept, left_out = [*self.attempts, attempt], self.left_out
        if len(kept) > MOST_ATTEMPTS:
            left_out += len(kept) - MOST_ATTEMPTS
            kept = [kept[0], *kept[1 - MOST_ATTEMPTS :]]
        kept[:-MOST_DETAILED] = [replace(each, over_time=None) for each in kept[:-MOST_DETAILED]]
        return replace(self, left_out=left_out, attempts=tuple(kept))

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(to_json(self), separators=(",", ":"))


def read_attempts(paths: ResultPaths) -> Attempts | None:
    """The attempts at the run to a result, from beside it or from its folder of job state; None where none are recorded.

    Raises IntegrityError for what no run has written.
    """
    content = _load(paths)
    if content is None:
        return None
    try:
        found = from_json(Attempts, content)
        _check(found)
    except ValueError as error:
        raise IntegrityError(f"the attempts beside {paths.result} are not those of a run: {error!s:.500}") from None
    return found


def with_end(attempt: Attempt, status: Status, last: Status | None) -> Attempt:
    """The last attempt at a run of that status, with how it ended where nobody has recorded it, and what it left on disk.

    `last` is what was written last into the file of its status.
    """
    if attempt.end == "":
        if status.state == "finished":
            return replace(attempt, end="finished", words="its process was killed as it had finished, before it said so")
        running = status.state == "running"
        if running and status.holder not in ("", attempt.process):  # another one goes on, and has not written of itself yet
            return replace(attempt, end="killed")
        last = status if running else last
        attempt = attempt if last is None else with_heartbeat(attempt, last)
        attempt = attempt if running else replace(attempt, end="killed")
    known = status.state == "interrupted" and status.subproblems
    return attempt.having_saved(status.subproblems_done) if known else attempt


def with_heartbeat(attempt: Attempt, last: Status) -> Attempt:
    """An attempt whose end nobody has recorded, with what its process wrote last into the file of its status."""
    if last.beat < attempt.seen:
        return attempt
    return replace(
        attempt,
        seen=last.beat,
        subproblems=max(attempt.subproblems, last.subproblems_done - attempt.subproblems_before),
        pairs=max(attempt.pairs, last.pairs_done - attempt.pairs_before),
        bytes_read=max(attempt.bytes_read, last.bytes_read),
        bytes_written=max(attempt.bytes_written, last.bytes_written),
        bytes_saved=max(attempt.bytes_saved, last.bytes_saved),
    )


def _shortened(text: str, most: int) -> str:
    """A text of so many characters at most, which shows where it was cut."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _load(paths: ResultPaths) -> dict[str, Any] | None:
    """What is recorded: of a run to a store that is not over, in the folder of job state; else beside the result."""
    here = paths.state_folder
    if paths.beside is not None and here is not None and is_folder(here):
        found = read_json(here / ATTEMPTS, MOST_BYTES)
        if found is not None:
            return found
    return paths.load(ATTEMPTS, MOST_BYTES)


def _check(found: Attempts) -> None:
    """Raise ValueError for more of anything than is ever written."""
    sizes = [(len(found.attempts), MOST_ATTEMPTS), (len(found.planned.links), MOST_NAMES)]
    detailed = 0
    for attempt in found.attempts:
        sizes += [(len(each), MOST_NAMES) for each in (attempt.hardware, attempt.versions, attempt.busy)]
        sizes += [(len(attempt.log), MOST_LINES)]
        if (over_time := attempt.over_time) is not None:
            detailed += 1
            series = [*over_time.rates.values(), over_time.host, over_time.device]
            sizes += [(len(each), MOST_BINS) for each in series]
            sizes += [(len(over_time.rates), MOST_NAMES), (len(over_time.busy), MOST_ROWS)]
    sizes += [(detailed, MOST_DETAILED)]
    if any(size > most for size, most in sizes):
        raise ValueError("there is more of something than any run writes")
