"""What is passed as `client`, or named by --scheduler, and is none: one line with the cause, soon, and nothing is begun."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

import oocattn
from oocattn import ProblemError
from oocattn.cli import main as cli
from oocattn.pipelines.engines.dask import connecting
from oocattn.pipelines.engines.dask.connecting import connect
from oocattn.storage.paths import ResultPaths


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda client: "tcp://10.0.0.1:8786",
            r"client is a str: .*; make one by distributed.Client\('tcp://10.0.0.1:8786'\)",
        ),
        (lambda client: client.cluster, r"client is of type _Cluster: expected a distributed.Client that is connected"),
        (lambda client: client.cluster.scheduler, "client is of type Scheduler: expected"),
        (lambda client: client.submit(abs, 1), "client is of type Future: expected"),
        (lambda client: client.get_executor(), "client is of type ClientExecutor: expected"),
        (lambda client: Client, "client is the class Client: expected"),
        (lambda client: True, "client is of type bool: expected"),
        (lambda client: 0, "client is of type int: expected"),
        (lambda client: "", "client is a str: expected"),
    ],
)
def test_what_is_no_client_is_refused(
    client: Client, dataset: Path, result: Path, make: Callable[[Client], object], words: str
) -> None:
    for call in (
        lambda: oocattn.attention(dataset, result, client=make(client)),
        lambda: oocattn.resume(result, client=make(client)),
    ):
        with pytest.raises(ProblemError, match=words):
            call()
    assert not ResultPaths.at(result).state.exists()


def test_a_client_that_is_closed_or_asynchronous_is_refused(client: Client, dataset: Path, result: Path) -> None:
    closed = Client(client.cluster, set_as_default=False)
    closed.close()
    with pytest.raises(ProblemError, match=r"client is closed: expected a distributed\.Client that is connected"):
        oocattn.attention(dataset, result, client=closed)

    async def attend() -> None:
        async with (
            LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0", asynchronous=True) as own,
            Client(own, asynchronous=True, set_as_default=False) as waited_for,
        ):
            oocattn.attention(dataset, result, client=waited_for)

    with pytest.raises(ProblemError, match=r"client is asynchronous: expected .*without asynchronous=True"):
        asyncio.run(attend())


@contextmanager
def listening(behave: Callable[[socket.socket], object]) -> Iterator[int]:
    """The port of a server that does this with each connection."""
    server = socket.create_server(("127.0.0.1", 0))
    connections = []

    def serve() -> None:
        try:
            while True:
                connections.append(server.accept()[0])
                behave(connections[-1])
        except OSError:
            return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        for each in connections:
            each.close()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "http://127.0.0.1:8786",
            "scheduler 'http://127.0.0.1:8786' has the scheme 'http': expected one of tcp, tls, ws, wss",
        ),
        ("inproc://127.0.0.1:1", "has the scheme 'inproc'"),
        ("scheduler.json", "scheduler 'scheduler.json' is no address: expected a host and a port"),
        ("", "scheduler '' is no address"),
        ("tcp://", "scheduler 'tcp://' is no address"),
        ("127.0.0.1", "is no address"),
        ("tcp://127.0.0.1", "is no address"),
        ("tcp://127.0.0.1:99999", "is no address"),
        ("tcp://127.0.0.1:0", "is no address"),
        ("tcp://127.0.0.1:abc", "is no address"),
        ("tcp://127.0.0.1:8786/status", "is no address"),
        ("tcp://127.0.0.1:8786 ", "is no address"),
        ("tcp://a\nb:8786", "no"),
        ("tcp://nowhere.invalid:8786", "scheduler tcp://nowhere.invalid:8786: no host nowhere.invalid"),
    ],
)
def test_an_address_that_cannot_be_a_schedulers_is_refused_at_once(
    dataset: Path, result: Path, capsys: pytest.CaptureFixture[str], address: str, words: str
) -> None:
    began = time.monotonic()
    assert cli.main(["run", str(dataset), str(result), "--scheduler", address]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert "give the address of a Dask scheduler, like tcp://HOST:8786" in line
    assert time.monotonic() - began < 5


def test_an_address_where_nobody_listens_is_tried_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "LEAST_CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        ProblemError, match=rf"no scheduler listens at tcp://127.0.0.1:{port} \(.*refused\), tried for 0\.\d"
    ):
        connect(f"tcp://127.0.0.1:{port}", 0.3)


@pytest.mark.parametrize(
    "behave",
    [
        lambda connection: None,
        lambda connection: connection.close(),
        lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"),
        lambda connection: (connection.recv(1), connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
    ],
    ids=["silent", "closing", "ssh", "http"],
)
def test_what_is_no_scheduler_is_told_in_time(
    behave: Callable[[socket.socket], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "LEAST_CONNECT_SECONDS", 0.3)
    with listening(behave) as port:
        began = time.monotonic()
        with pytest.raises(
            ProblemError, match=f"what listens at tcp://127.0.0.1:{port} does not answer as a Dask scheduler"
        ):
            connect(f"tcp://127.0.0.1:{port}", 0.3)
        assert time.monotonic() - began < 5


def test_a_worker_is_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as own:
        (worker,) = own.scheduler_info["workers"]
        with pytest.raises(ProblemError, match=f"what listens at {worker} does not answer as a Dask scheduler"):
            connect(worker, 5)
