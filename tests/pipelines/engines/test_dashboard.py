"""What a cluster of our own listens on, which web pages may read its dashboard, and why it does not start."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import dask
import psutil
import pytest
import warm
from bokeh.util.token import generate_jwt_token, generate_session_id
from distributed import Client, LocalCluster
from support import carry_out, plan_for
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

import oocattn
from oocattn import ProblemError
from oocattn.pipelines.engines.dask.dashboard import DashboardAddress
from oocattn.pipelines.engines.dask.local_cluster import local_client

PAGES = ("/status", "/json/identity.json", "/metrics", "/sitemap.json", "/individual-plots.json")
FOREIGN = ("http://evil.example", "http://127.0.0.1:1", "http://127.0.0.1.evil.example:{port}", "null")


def listening() -> set[tuple[str, int]]:
    """Where this process listens."""
    return {
        (found.laddr.ip, found.laddr.port)
        for found in psutil.Process().net_connections("inet")
        if found.status == psutil.CONN_LISTEN
    }


def answer(client: Client, origin: str, host: str = "", page: str = "status") -> int:
    """What a dashboard, which the page calls `host`, answers to a web page of this origin that opens a WebSocket."""
    address = urlsplit(client.dashboard_link)
    urlopen(client.dashboard_link, timeout=20).close()  # the first page that is asked for opens them all
    url = f"ws://{address.netloc}/{page}/ws"
    token = generate_jwt_token(generate_session_id())
    headers = {"Origin": origin.format(port=address.port), "Host": host or address.netloc}
    request = HTTPRequest(url, headers=headers, connect_timeout=5)

    async def connect() -> int:
        try:
            connection = await websocket_connect(request, subprotocols=["bokeh", token])
        except HTTPClientError as error:
            return error.code
        connection.close()
        return 101

    return asyncio.run(connect())


@contextmanager
def started(address: str) -> Iterator[tuple[Client, set[tuple[str, int]]]]:
    """A client of a new cluster, and where the process listens because of it."""
    before = listening()
    with local_client(address) as client:
        yield client, listening() - before


def test_a_dashboard_is_read_by_its_own_pages_alone() -> None:
    with started("127.0.0.1:0") as (client, opened):
        port = urlsplit(client.dashboard_link).port
        assert client.dashboard_link == f"http://127.0.0.1:{port}/oocattn"
        assert opened == {("127.0.0.1", port)}  # and no page of a worker
        for page in ("status", "oocattn"):
            assert [answer(client, origin, page=page) for origin in FOREIGN] == [403] * len(FOREIGN)
            assert answer(client, f"http://127.0.0.1:{port}", page=page) == 101
        for own, other in itertools.permutations([f"127.0.0.1:{port}", f"localhost:{port}"]):
            assert answer(client, f"http://{own}", host=other) == 101


def test_pages_are_imported_when_the_first_is_asked_for() -> None:
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen
from oocattn.pipelines.engines.dask.local_cluster import local_client

with local_client() as client:
    assert "bokeh.server.server" not in sys.modules
    own = client.dashboard_link
    paths = [own, *(own.replace("oocattn", page) for page in ("", "status", "graph", "workers"))]
    with ThreadPoolExecutor() as threads:
        pages = list(threads.map(lambda page: urlopen(page, timeout=30).read().decode(), paths))
    assert all("Dask" in page for page in pages), pages
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(oocattn.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_pages_keep_to_their_origins_whatever_dask_is_set_to_when_they_are_opened() -> None:
    with (
        started("127.0.0.1:0") as (client, _),
        dask.config.set({"distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin": ["*"]}),
    ):
        assert [answer(client, origin) for origin in FOREIGN] == [403] * len(FOREIGN)


def test_the_first_page_leads_to_no_other_host() -> None:
    with started("127.0.0.1:0") as (client, _):
        address = urlsplit(client.dashboard_link)
        connection = HTTPConnection("127.0.0.1", address.port, timeout=30)
        connection.request("GET", "//evil.example/status", headers={"Host": address.netloc})
        assert connection.getresponse().getheader("Location") == "/evil.example/status"
        connection.close()


def test_a_name_that_is_made_to_point_at_the_loopback_reads_nothing() -> None:
    with started("127.0.0.1:0") as (client, _):
        address = urlsplit(client.dashboard_link)
        evil = f"evil.example:{address.port}"
        assert answer(client, f"http://{evil}", host=evil) == 403
        statuses = {evil: 403, f"localhost.{evil}": 403, address.netloc: 200, f"localhost:{address.port}": 200}
        for (host, status), page in itertools.product(statuses.items(), PAGES):
            connection = HTTPConnection("127.0.0.1", address.port, timeout=10)
            connection.request("GET", page, headers={"Host": host})
            assert connection.getresponse().status == status, (host, page)
            connection.close()


def test_a_port_alone_is_the_loopbacks() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with started(f":{port}") as (client, opened):
        assert client.dashboard_link == f"http://127.0.0.1:{port}/oocattn"
        assert opened == {("127.0.0.1", port)}


def test_the_loopback_of_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with started("[::1]:0") as (client, opened):
        port = urlsplit(client.dashboard_link).port
        assert client.dashboard_link == f"http://[::1]:{port}/oocattn"
        assert opened == {("::1", port)}
        assert answer(client, f"http://[::1]:{port}") == 101
        assert answer(client, "http://[::2]:{port}") == 403


def test_every_interface_is_opened_only_when_asked_for() -> None:
    with started("0.0.0.0:0") as (client, opened):
        port = urlsplit(client.dashboard_link).port
        assert opened == {("0.0.0.0", port)}
        assert [answer(client, f"http://{host}:{port}") for host in (socket.gethostname(), "0.0.0.0")] == [101, 101]
        assert answer(client, f"http://127.0.0.1:{port}", host=f"{socket.gethostname()}:{port}") == 101
        assert [answer(client, origin) for origin in FOREIGN] == [403] * len(FOREIGN)


def test_a_host_that_was_given_is_the_origin() -> None:
    assert DashboardAddress.parse("Node7.example:8787").origins(8787) == {"node7.example:8787"}
    assert DashboardAddress.parse("10.1.2.3:0").origins(41234) == {"10.1.2.3:41234"}


def test_dasks_configuration_is_put_back() -> None:
    def settings() -> list[object]:
        names = ("scheduler.dashboard.bokeh-application", "dashboard.link", "worker.profile.enabled")
        return [dask.config.get(f"distributed.{name}") for name in names]

    with dask.config.set({"distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin": ["*"]}):
        before = settings()
        with local_client() as client:
            assert answer(client, "http://evil.example") == 403
        assert settings() == before


def test_clusters_that_overlap_leave_dasks_configuration_as_it_was() -> None:
    before, first, second = repr(dask.config.config), ExitStack(), ExitStack()
    with first:
        first.enter_context(local_client())
        with second:
            second.enter_context(local_client())
            first.close()
    assert repr(dask.config.config) == before


# A cluster that cannot start


def failure(address: str = "127.0.0.1:0") -> str:
    with pytest.raises(ProblemError) as failed, local_client(address):
        pass
    assert "\n" not in str(failed.value)
    return str(failed.value)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert failure(address) == (
            f"dashboard address '{address}': Address already in use: another process listens there; choose another port, or "
            "0 for any free one"
        )


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("no-such-host.invalid:8787", "choose a host of this machine"),
        ("203.0.113.7:8787", "Cannot assign requested address: choose a host of this machine"),
        ("a..b:8787", "no name of a host"),
    ],
)
def test_a_host_that_is_not_this_machines_is_named(address: str, words: str) -> None:
    message = failure(address)
    assert message.startswith(f"dashboard address '{address}': ")
    assert words in message


@contextmanager
def without_privileged_ports() -> Iterator[None]:
    """Take from this thread the right to listen on ports below 1024, if it has it."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, after = ((ctypes.c_uint32 * 6)() for _ in range(2))  # effective, permitted, inheritable, and their upper halves
    assert libc.capget(header, before) == libc.capget(header, after) == 0
    after[0] &= ~(1 << 10)
    assert libc.capset(header, after) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def test_a_port_that_needs_a_privilege_is_named() -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 87:
        pytest.skip("every user may listen on every port here")
    with without_privileged_ports():
        message = failure("127.0.0.1:87")
    assert message == (
        "dashboard address '127.0.0.1:87': Permission denied: this user may not listen on that port; choose one from 1024 on"
    )


CAUSES = """
import contextlib, dask, io, json, os, resource, sys, tempfile
from oocattn.cli import main as cli
import oocattn.pipelines.engines.dask.local_cluster

dataset, result, address = sys.argv[1:]

def few_files():
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, most))

def no_folder():
    tempfile.tempdir = None
    tempfile._candidate_tempdir_list = lambda: ["/dev/null"]
    dask.config.set({"temporary-directory": None})

causes = {
    "encryption": lambda: dask.config.set({"distributed.comm.require-encryption": True}),
    "plain": lambda: dask.config.set({"distributed.comm.require-encryption": None}),
    "file": lambda: dask.config.set({"temporary-directory": dataset + "/zarr.json"}),
    "folders": no_folder,
    "files": few_files,
}
found = {}
for name, cause in causes.items():
    cause()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main(["run", dataset, result, "--dashboard", address if name == "plain" else "127.0.0.1:0"])
    found[name] = [code, said.getvalue()]
print(json.dumps(found), file=sys.__stdout__)
"""


def test_a_command_says_in_one_line_why_its_cluster_does_not_start(dataset: Path, result: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = warm.script(CAUSES, str(dataset), str(result), f"127.0.0.1:{taken.getsockname()[1]}")
        printed, complaints = process.communicate()
    assert (process.returncode, complaints) == (0, "")
    words = {
        "encryption": "TLS .*configuration sets distributed.comm.require-encryption; set distributed.comm.tls as well",
        "plain": "^oocattn: dashboard address .*Address already in use",
        "file": r"Not a directory: .*zarr\.json.*set its temporary-directory, or TMPDIR",
        "folders": "No usable temporary directory found",
        "files": r"Too many open files: raise the limit on open files \(ulimit -n\)",
    }
    for name, (code, said) in json.loads(printed.splitlines()[-1]).items():
        assert (code, said.count("\n"), "Traceback" in said) == (1, 1, False), said
        assert re.search(words.pop(name), said), said
        assert name == "plain" or "dashboard" not in said
    assert not words
    assert not os.path.lexists(result)


# A cluster of the caller's


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_cluster_that_others_can_reach_unencrypted_is_warned_of(
    dataset: Path, result: Path, caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    options = {"n_workers": 1, "processes": False, "memory_limit": 0, "protocol": "tcp://"}
    with (
        LocalCluster(host=host, dashboard_address="127.0.0.1:0", **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        carry_out(plan_for(dataset), dataset, result, client)
    found = [record.getMessage() for record in caplog.records if "not encrypted" in record.getMessage()]
    assert bool(found) is warned
    assert all(re.search("tcp://.*whoever reaches its port can run code", message) for message in found)
