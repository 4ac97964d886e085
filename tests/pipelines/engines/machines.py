"""Machines of their own, as far as one kernel has them: each a worker with its own host name, /tmp, /dev/shm and network.

Nothing that the driver writes is seen there, and nothing that a worker writes is seen here or by another. They meet at the
scheduler and at an S3 server. Networks of their own take root; without it, all are on the loopback.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from object_store import serving_s3

import oocattn

HAS_NETWORKS = os.geteuid() == 0

_numbers = itertools.count()

_INSIDE = """
import json, os, pathlib, subprocess, sys
name, kept, texts, *command = sys.argv[1:]
sys.stdin.readline()  # the network is there
def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)
subprocess.run(["hostname", name], check=True)
mount("-t", "tmpfs", "tmpfs", "/mnt")
for path in filter(None, kept.split(":")):  # of Python, where it lies in /tmp
    inside = pathlib.Path("/mnt" + path.removeprefix("/tmp"))
    inside.mkdir(parents=True, exist_ok=True)
    mount("--rbind", path, str(inside))
mount("--rbind", "/mnt", "/tmp")
mount("-t", "tmpfs", "tmpfs", "/dev/shm")
os.makedirs("/tmp/scratch")
os.chdir("/tmp/scratch")
for name, text in json.loads(texts).items():
    pathlib.Path(name).write_text(text)
os.execv(command[0], command)
"""


@cache
def _can_unshare() -> bool:
    tools = all(map(shutil.which, ("unshare", "mount", "hostname", "ip", "nsenter")))
    return tools and not subprocess.run([*_unshare(), "true"], capture_output=True).returncode


def _unshare() -> list[str]:
    return ["unshare", "--mount", "--uts", *(["--net"] if HAS_NETWORKS else ["--user", "--map-root-user"])]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Network:
    """A bridge, at which this process has the address `host`."""

    def __init__(self) -> None:
        number = next(_numbers)
        self._bridge, self._addresses = f"oo{os.getpid()}{chr(97 + number % 26)}", f"10.{100 + os.getpid() % 100}.{number}"
        self.host = f"{self._addresses}.1" if HAS_NETWORKS else "127.0.0.1"

    @contextmanager
    def up(self) -> Iterator[None]:
        """The bridge is there while inside."""
        if not HAS_NETWORKS:
            yield
            return
        _ip("link", "add", self._bridge, "type", "bridge")
        try:
            _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            yield
        finally:
            _ip("link", "del", self._bridge)

    def connect(self, process: int, number: int) -> None:
        """Give the namespace of a process a network card."""
        here, there = f"{self._bridge}{number}", "uplink"
        while Path(f"/proc/{process}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)  # unshare has not done its work yet
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", str(process))
        _ip("link", "set", here, "master", self._bridge, "up")
        inside = ["nsenter", "--target", str(process), "--net", "ip"]
        for arguments in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{self._addresses}.{number}/24", "dev", there],
            ["link", "set", there, "up"],
        ):
            subprocess.run([*inside, *arguments], check=True)


class Machines:
    """A scheduler and an S3 server on a network, and the processes of workers by the name of their machine."""

    def __init__(self, network: Network, client: Client, s3: dict[str, Any], ending: ExitStack) -> None:
        self._network = network
        self.client = client
        self.s3 = s3
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ending = ending

    def start(self, name: str, *options: str, count: int = 1, copied: Sequence[Path] = ()) -> None:
        """Start a machine, and as many workers on it as that, in a folder with copies of some files."""
        number = len(self.processes) + 2
        python = {sys.prefix, sys.base_prefix, str(Path(oocattn.__file__).parents[1])}
        kept = ":".join(path for path in sorted(python) if path.startswith("/tmp/"))
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", str(self.client.scheduler.address)]
        worker += ["--nthreads", "4", "--memory-limit", "0", "--no-dashboard", "--local-directory", "/tmp/scratch"]
        worker += ["--name", name, "--nworkers", str(count)] + (["--no-nanny"] if count == 1 else []) + list(options)
        texts = {path.name: path.read_text() for path in copied}
        process = subprocess.Popen(
            [*_unshare(), sys.executable, "-c", _INSIDE, name, kept, json.dumps(texts), *worker],
            stdin=subprocess.PIPE,
            stderr=None if os.environ.get("SHOW_WORKERS") else subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        )
        self._ending.callback(process.wait)
        self._ending.callback(process.kill)
        self.processes[name] = process
        assert process.stdin is not None
        if HAS_NETWORKS:
            self._network.connect(process.pid, number)
        process.stdin.write(b"go\n")
        process.stdin.close()

    def wait(self, count: int) -> None:
        """Wait until so many workers are there."""
        self.client.wait_for_workers(count, timeout=90)


@contextmanager
def machines(security: Any = None) -> Iterator[Machines]:
    """No machine yet, and where to start some."""
    if not _can_unshare():
        pytest.skip("this machine lets no process have mounts of its own")
    network = Network()
    with (
        network.up(),
        serving_s3(network.host) as s3,
        LocalCluster(
            n_workers=0,
            processes=True,
            dashboard_address=f"{network.host}:0",
            host=network.host,
            security=security,
            protocol="tls" if security else None,
        ) as own,
        Client(own, set_as_default=False) as client,
        ExitStack() as ending,
    ):
        yield Machines(network, client, s3, ending)
