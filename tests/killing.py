"""Kills runs, or their workers, at moments spread over their life, and compares the results bit for bit.

    python tests/killing.py --moments 200 --partials memory
    python tests/killing.py --moments 200 --partials memory disk --workers
    python tests/killing.py --moments 50 --mask window
    python tests/killing.py --moments 50 --store            (to S3 on the loopback; it takes moto and s3fs)
    python tests/killing.py --moments 50 --store --scratch  (each resumed by another machine)
    python tests/killing.py --moments 50 --all-rows         (second passes over a result, which go on)
    python tests/killing.py --moments 50 --survey           (surveys; with --overwrite of a result that has another)

A run that was killed is resumed; one whose worker was killed goes on by itself. Runs are forks of this process, which has
imported everything and started nothing; workers are two processes that are replaced when they die. It prints a tally, and
exits with 1 where a result is not the uninterrupted one's, where something is left beside it, or where a killed run lost
work that had begun longer before than the checkpoint interval.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import dask
import warm  # noqa: F401  worker processes are its forks
from distributed import Client, LocalCluster
from fuse import arm, moments
from killing_places import PassPlace, Place, StorePlace, SurveyPlace
from object_store import serving_s3_apart
from support import carry_out, normal_arrays, plan_for, replanned, write_dataset

import oocattn
from oocattn import Plan
from oocattn.pipelines import attempt
from oocattn.pipelines.engines.dask.local_cluster import NO_PROFILER, local_client
from oocattn.storage.journal import store_lock

MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (60, 0), "sink_tokens": 3, "alibi_slopes": [0.1, 0.05, 0.0, 0.2]},
    "documents": {"causal": True, "cu_seqlens_q": [0, 70, 70, 71, 190, 330, 400], "learnable_sink": [0.0, 1.0, -2.0, 3.0]},
}
"""What is asked, by the name of the mask."""


class Tally:
    """What has come of all that was killed."""

    def __init__(self) -> None:
        self.runs = self.kills = self.wrong = self.again = 0
        self.most_lost = 0.0

    def check(self, place: Place, expected: dict[str, bytes], moment: int) -> None:
        """Compare a finished result with what it must be."""
        self.runs += 1
        left = place.left_behind()
        if left or place.bits() != expected:
            self.wrong += 1
            print(f"killed at moment {moment}: {f'left behind: {left}' if left else 'wrong'}", file=sys.stderr)

    def count_lost(self, log: str) -> None:
        """Add up what runs that were killed had begun and later ones began again: how long before the kill that was."""
        lives = [parsed(life) for life in log.split(BORDER)]
        for number, life in enumerate(lives):
            later = {place for other in lives[number + 1 :] for what, place, _ in other if what == "begin"}
            lost = [seconds for what, place, seconds in life if what == "begin" and place in later]
            kills = [seconds for what, _, seconds in life if what == "kill"]
            self.kills += len(kills)
            self.again += len(lost)
            self.most_lost = max([self.most_lost, *(kills[0] - seconds for seconds in lost)])


BORDER = "---\n"
"""In the log, between a run that was killed and the next."""


def parsed(life: str) -> list[tuple[str, tuple[str, ...], float]]:
    """What was done in one life: the word, which subproblem, and when."""
    lines = (line.split() for line in life.splitlines())
    return [(what, tuple(place), float(seconds)) for what, *place, seconds in lines]


def place_of(folder: Path, options: argparse.Namespace) -> Place:
    if options.survey:
        return SurveyPlace(folder)
    return (PassPlace if options.all_rows else StorePlace if options.store else Place)(folder)


def plan_of(folder: Path, options: argparse.Namespace) -> Plan:
    lanes = 2 if options.workers else options.lanes
    choices = {"chunks": options.chunks, "partials": options.partials, "lanes": lanes}
    plan = plan_for(folder / "dataset.zarr", **MASKS[options.mask], **choices)
    return replanned(plan, checkpoint_seconds=options.interval)


def run(folder: Path, options: argparse.Namespace, client: Client | None) -> None:
    plan = plan_of(folder, options)
    carry_out(
        plan, folder / "dataset.zarr", place_of(folder, options).paths, client or "inline", overwrite=options.overwrite
    )


def run_or_resume(folder: Path, options: argparse.Namespace) -> None:
    """As a user would: a run that was killed before its journal was there begins anew."""
    if options.all_rows:
        PassPlace(folder).compute()
        return
    if options.survey:
        SurveyPlace(folder).compute(options.chunks, options.partials)
        return
    place = place_of(folder, options)
    place.enter()
    ours = ((place.paths.attributes() or {}).get("problem") or {}).get("causal")  # the one to replace is not
    engine = nullcontext(None) if options.inline else local_client(workers=options.lanes)
    with engine as client:
        if ours or oocattn.status(**place.arguments).state == "interrupted":
            oocattn.resume(**place.arguments, engine="dask" if client else "inline", client=client)
        else:
            run(folder, options, client)


def fork(work: Callable[[], object], folder: Path, last: int | None = None) -> bool:
    """Do the work in a fork, until its moment `last`; return whether it was killed."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            arm(folder / "result.zarr", folder / "log", last)
            work()
            (folder / "moments").write_text(str(moments(folder / "result.zarr")))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    if not os.WIFSIGNALED(status) and status:
        raise RuntimeError(f"a run failed: {status}")
    return os.WIFSIGNALED(status)


def begin_anew(folder: Path, options: argparse.Namespace) -> None:
    place_of(folder, options).clear()
    if options.overwrite and not options.survey:
        shutil.copytree(folder / "other.zarr", folder / "result.zarr")
    (folder / "log").write_bytes(b"")


def write_other(folder: Path) -> None:
    """The result of another problem, which is to be replaced."""
    with local_client() as client:
        carry_out(plan_for(folder / "dataset.zarr"), folder / "dataset.zarr", folder / "other.zarr", client)


def moment_of(number: int, whole: int, options: argparse.Namespace) -> int:
    """The moment of the `number`-th kill in a life of `whole` moments: kills are spread evenly."""
    return 1 + (2 * number + 1) * (whole - 1) // (2 * options.moments)


def kill_runs(folder: Path, options: argparse.Namespace, tally: Tally) -> None:
    chance = random.Random(options.seed)
    begin_anew(folder, options)
    fork(partial(run_or_resume, folder, options), folder)
    expected, whole = place_of(folder, options).bits(), int((folder / "moments").read_text())
    print(f"a run has {whole} moments")
    for number in range(options.moments):
        begin_anew(folder, options)
        last = moment_of(number, whole, options)
        killed = fork(partial(run_or_resume, folder, options), folder, last)
        while killed:
            with (folder / "log").open("a") as log:
                log.write(BORDER)
            again = chance.randrange(1, whole // 2) if chance.random() < options.again else None
            killed = fork(partial(run_or_resume, folder, options), folder, again)
        tally.count_lost((folder / "log").read_text())
        tally.check(place_of(folder, options), expected, last)


def kill_workers(folder: Path, options: argparse.Namespace, tally: Tally) -> None:
    attempt.WORKER_CHECK_SECONDS = 0.2
    # Else it gives a worker up that is not there 15 s after it died: the one in its place may just have died too.
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 day", **NO_PROFILER}),
        LocalCluster(n_workers=2, threads_per_worker=4, processes=True, memory_limit=0, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for place in options.places:
            options.partials = place
            kill_workers_of(client, folder, options, tally)


def kill_workers_of(client: Client, folder: Path, options: argparse.Namespace, tally: Tally) -> None:
    result = folder / "result.zarr"
    begin_anew(folder, options)
    client.run(arm, result, folder / "log", None)
    run(folder, options, client)
    expected, whole = place_of(folder, options).bits(), min(client.run(moments, result).values())
    print(f"a worker has at least {whole} moments")
    for number in range(options.moments):
        begin_anew(folder, options)
        client.wait_for_workers(2, timeout=60)
        last = moment_of(number, whole, options)
        victim = sorted(client.nthreads())[tally.runs % 2]
        client.run(arm, result, folder / "log", last, workers=[victim])
        run(folder, options, client)
        tally.kills += (folder / "log").read_text().count("kill")
        tally.check(place_of(folder, options), expected, last)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """What a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=200, help="how many to kill (default: %(default)s)")
    parser.add_argument("--workers", action="store_true", help="kill workers instead of runs")
    parser.add_argument("--partials", choices=("memory", "disk"), nargs="+", default=["disk"], dest="places")
    parser.add_argument("--mask", choices=MASKS, default="causal", help="what is asked (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=31)
    parser.add_argument("--interval", type=float, default=0.5, help="checkpoint interval, seconds (default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--overwrite", action="store_true", help="have every run take the place of another result")
    parser.add_argument("--again", type=float, default=0.5, help="chance that a resumed run is killed too")
    parser.add_argument("--grace", type=float, default=0.0, help="seconds more that may be lost (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", action="store_true", help="write results to S3, on the loopback")
    parser.add_argument("--inline", action="store_true", help="without Dask: a third of the time")
    parser.add_argument("--all-rows", action="store_true", help="kill second passes over a result instead of runs")
    parser.add_argument("--survey", action="store_true", help="kill surveys of a result instead of runs")
    parser.add_argument("--scratch", action="store_const", const="store", help="keep job state there as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    memory, tally = Path("/dev/shm"), Tally()
    server = serving_s3_apart() if options.store else nullcontext({})
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name, server as StorePlace.server:
        StorePlace.scratch = options.scratch
        if options.store:
            import s3fs  # noqa: F401  its requests are moments

            store_lock.BEAT = 0.05  # a stale lock is known by silence
        folder = Path(name)
        fork(lambda: write_dataset(folder / "dataset.zarr", normal_arrays(400, heads=4, kv_heads=2)), folder)
        if options.overwrite and not options.survey:
            fork(lambda: write_other(folder), folder)
        if options.all_rows or options.survey:
            options.partials = options.places[0]
            first = argparse.Namespace(**{**vars(options), "overwrite": False})
            fork(lambda: run(folder, first, None), folder)
        if options.survey:
            SurveyPlace.replaces = options.overwrite
            fork(SurveyPlace(folder).keep, folder)
        if options.workers:
            kill_workers(folder, options, tally)
        else:
            for place in options.places:
                options.partials = place
                kill_runs(folder, options, tally)
    killed = f"{tally.runs - tally.wrong} of {tally.runs} bit-identical after {tally.kills} kills"
    print(f"{killed}, {options.mask}, partials in {' and '.join(options.places)}")
    if options.workers:
        return int(bool(tally.wrong))
    print(
        f"{tally.again} subproblems begun again; the oldest had begun {tally.most_lost:.2f} s before the kill, with a "
        f"checkpoint interval of {options.interval:g} s"
    )
    return int(bool(tally.wrong) or tally.most_lost > options.interval + options.grace)


if __name__ == "__main__":
    sys.exit(main())
