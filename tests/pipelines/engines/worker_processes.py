"""Workers of Dask in processes of their own, for tests of what they see."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from distributed import Client, LocalCluster


def command(scheduler: str) -> list[str]:
    options = ["--no-nanny", "--nthreads", "4", "--memory-limit", "0", "--no-dashboard"]
    return [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, *options]


@contextmanager
def cluster_of(count: int) -> Iterator[tuple[Client, ExitStack]]:
    """A scheduler, with a client that waits for so many workers, and what ends their processes."""
    with (
        LocalCluster(n_workers=0, processes=True, dashboard_address="127.0.0.1:0", host="127.0.0.1") as own,
        Client(own, set_as_default=False) as client,
        ExitStack() as ending,
    ):
        yield client, ending


def start(ending: ExitStack, arguments: list[str], **environment: str) -> None:
    process = subprocess.Popen(arguments, env={**os.environ, **environment}, stderr=subprocess.DEVNULL, cwd="/")
    ending.callback(process.wait)
    ending.callback(process.kill)
