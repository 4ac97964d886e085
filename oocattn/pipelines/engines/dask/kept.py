"""The page of a run whose cluster has ended: served by a thread of this process, at the same address, as its last state.

It is made when it is asked for. The next cluster of this process takes its place.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Collection
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from typing import Any

from oocattn.imports import IMPORTING, with_some_home

logger = logging.getLogger("oocattn")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, hosts: Collection[str], record: dict[str, Any]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.hosts = {f"{name}:{port}" for name in hosts}
        self.record = record
        self.process = os.getpid()
        super().__init__((host, port), _Page)


class _Page(BaseHTTPRequestHandler):
    """Answers every request for one of its own hosts with the page."""

    server: _Server
    timeout = 10.0  # seconds for a request to arrive

    def do_GET(self) -> None:
        """Send the page."""
        if (self.headers.get("Host") or "").lower() not in self.server.hosts:
            self.send_error(403, "Open the dashboard at the address that was printed")
            return
        try:
            with IMPORTING, with_some_home():
                page = import_module("oocattn.pipelines.engines.dask.page")
            content = page.as_file(self.server.record).encode()
        except ImportError:
            self.send_error(503, "bokeh cannot be imported")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


_lock = threading.Lock()
_kept: list[_Server] = []


def keep(host: str, port: int, hosts: Collection[str], record: dict[str, Any]) -> None:
    """Serve the page of a run that has ended, until the next cluster starts or the process ends."""
    try:
        server = _Server(host, port, hosts, record)
    except OSError as error:  # somebody else has the port now
        logger.info("the page of the run is not kept: %s", error)
        return
    with _lock:
        _kept.append(server)
    threading.Thread(target=server.serve_forever, name="oocattn-kept", daemon=True).start()


def release() -> None:
    """Stop serving, and give the port back."""
    with _lock:
        servers, _kept[:] = _kept[:], []
    for server in servers:
        if server.process == os.getpid():  # the thread that serves is not in a fork
            server.shutdown()
        server.server_close()
