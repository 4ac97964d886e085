"""Kills runs at moments spread over their life, resumes them, and compares the results bit for bit.

    python tests/killing.py --moments 200 --partials disk

A moment is a step of a run towards the disk: a write, which then is only half made, a sync, a rename or a removal, or the
end of a subproblem. All runs are forks of this process, which has imported everything and started nothing. It prints a
tally, and exits with 1 where a result is not the uninterrupted one's.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from support import carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import Event, Plan
from oocattn.pipelines.cluster import local_client
from oocattn.pipelines.cpu_lane import CpuLane
from oocattn.storage.result import ResultPaths

STEPS = ("pwrite", "fsync", "replace", "rename", "unlink")
"""Functions of `os` that bring a run's files about; each call is a moment."""


class Fuse:
    """Counts the moments of this process within `folder`, and kills it at the last of them, if that is given."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.folder = str(folder)
        self.last = last
        self.moments = 0
        for name in STEPS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            if path.startswith(self.folder) and self.burns_down() and name == "pwrite":
                content, offset = arguments
                real(target, content[: len(content) // 2], offset)
            self.kill_at_the_end()
            return real(target, *arguments, **options)

        return call

    def __call__(self, event: Event) -> None:
        if event.kind == "attended":
            self.burns_down()
            self.kill_at_the_end()

    def burns_down(self) -> bool:
        """Count a moment; whether it is the last."""
        self.moments += 1
        return self.moments == self.last

    def kill_at_the_end(self) -> None:
        if self.last is not None and self.moments >= self.last:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Outcome:
    """How a fork ended: killed or not, its moments (if not) and the subproblems that it began to attend."""

    killed: bool
    moments: int
    begun: int


Listeners = list[Callable[[Event], None]]


def fork(work: Callable[[Listeners], object], folder: Path, last: int | None = None) -> Outcome:
    """Do the work in a fork, with listeners that it is to call, until its moment `last`."""
    log = folder / "begun"
    log.write_bytes(b"")
    process = os.fork()
    if process == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
            count_subproblems(descriptor)
            fuse = Fuse(folder / "result.zarr", last)
            work([fuse])
            os.write(descriptor, f" {fuse.moments}".encode())
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    begun, _, moments = log.read_text().partition(" ")
    killed = os.WIFSIGNALED(status)
    if not killed and status:
        raise RuntimeError(f"a run failed: {status}")
    return Outcome(killed, int(moments or 0), len(begun))


def count_subproblems(descriptor: int) -> None:
    """Have a lane write a byte for every subproblem that it begins to attend."""
    real = CpuLane.attend

    def attend(self: CpuLane, turn: int) -> Event:
        os.write(descriptor, b".")
        return real(self, turn)

    CpuLane.attend = attend  # type: ignore[method-assign]


def plan_of(folder: Path, options: argparse.Namespace) -> Plan:
    return plan_for(folder / "dataset.zarr", causal=True, chunks=13, partials=options.partials, lanes=options.lanes)


def begin(folder: Path, options: argparse.Namespace, listeners: Listeners) -> None:
    plan = plan_of(folder, options)
    with local_client(workers=plan.lanes) as client:
        carry_out(plan, folder / "dataset.zarr", folder / "result.zarr", client, callbacks=listeners)


def resume(folder: Path, options: argparse.Namespace, listeners: Listeners) -> None:
    """As a user would: a run that was killed before its journal was there begins anew."""
    if oocattn.status(folder / "result.zarr").state != "interrupted":
        begin(folder, options, listeners)
        return
    with local_client(workers=options.lanes) as client:
        oocattn.resume(folder / "result.zarr", client=client, callbacks=listeners)


def bits_of(result: Path) -> dict[str, bytes]:
    """The chunk files of a result. (Zarr would start threads, and then nothing may be forked.)"""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in result.glob("*/c.*")}


def left_behind(result: Path) -> set[str]:
    """What lies beside a finished result that should not."""
    return {path.name for path in ResultPaths.at(result).state.iterdir()} - {"report.json"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=200, help="how many runs to kill (default: %(default)s)")
    parser.add_argument("--partials", choices=("memory", "disk"), default="disk")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--again", type=float, default=0.5, help="chance that a resumed run is killed too")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        return kill_and_resume(Path(name), options)


def kill_and_resume(folder: Path, options: argparse.Namespace) -> int:
    """Kill as many runs as the options say; return the exit code."""
    result, chance = folder / "result.zarr", random.Random(options.seed)
    fork(lambda _: write_dataset(folder / "dataset.zarr", normal_arrays(170, heads=4, kv_heads=2)), folder)
    whole = fork(partial(begin, folder, options), folder)
    expected = bits_of(result)
    print(f"{whole.begun} subproblems, {whole.moments} moments, partials in {options.partials}, {options.lanes} lanes")
    kills = wrong = redone = most_redone = 0
    for number in range(options.moments):
        for leftover in (result, ResultPaths.at(result).state):
            shutil.rmtree(leftover, ignore_errors=True)
        last = 1 + number * (whole.moments - 1) // max(options.moments - 1, 1)
        outcome = fork(partial(begin, folder, options), folder, last)
        begun, deaths = outcome.begun, int(outcome.killed)
        while outcome.killed:
            again = chance.randrange(1, whole.moments // 2) if chance.random() < options.again else None
            outcome = fork(partial(resume, folder, options), folder, again)
            begun, deaths = begun + outcome.begun, deaths + outcome.killed
        kills += deaths
        redone += begun - whole.begun
        most_redone = max(most_redone, (begun - whole.begun) / max(deaths, 1))
        left = left_behind(result)
        if left or bits_of(result) != expected:
            wrong += 1
            print(f"killed at moment {last}: {f'left behind: {left}' if left else 'wrong'}", file=sys.stderr)
    print(f"{options.moments - wrong} of {options.moments} bit-identical after {kills} kills")
    print(f"{redone} subproblems begun again, at most {most_redone:.1f} a kill")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
