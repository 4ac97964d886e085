"""An HTTP server of a folder, in a thread, that can be as bad as real ones are."""

from __future__ import annotations

import gzip
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[["Handler"], bool]
"""Answers a request wrongly; False where it is to be answered rightly after all."""

PAGE = b"<!DOCTYPE html><html><body>Nothing here, but welcome!</body></html>"


@dataclass
class Server:
    """What is served, how well, and what was asked for: (method, path) of every request.

    `fault` says what becomes of a request; `tries` counts those of each (method, path).
    """

    folder: Path
    url: str = ""
    fault: Fault | None = None
    ranges: bool = True
    length: bool = True
    compress: bool = False
    pages: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    tries: Counter[tuple[str, str]] = field(default_factory=Counter)


class Handler(BaseHTTPRequestHandler):
    """Answers as a static host without listings."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its headers
    served: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        served = self.served
        served.requests.append((self.command, self.path))
        served.tries[self.command, self.path] += 1
        if served.fault is not None and served.fault(self):
            return
        path = served.folder / self.path.partition("?")[0].lstrip("/")
        if path.is_dir():
            self.answer(403)
        elif path.is_file():
            self.answer_content(path.read_bytes())
        elif served.pages:
            self.answer(200, PAGE)
        else:
            self.answer(404)

    def answer_content(self, content: bytes) -> None:
        """200 or 206; 416 for what lies beyond."""
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found is None or not self.served.ranges:
            compressed = self.served.compress
            self.answer(
                200, gzip.compress(content) if compressed else content, {"Content-Encoding": "gzip"} if compressed else {}
            )
            return
        first = int(found[1]) if found[1] else max(0, len(content) - int(found[2]))
        last = min(int(found[2]), len(content) - 1) if found[1] and found[2] else len(content) - 1
        if first > last:
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            self.answer(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None, missing: int = 0) -> None:
        """Send a response, the last `missing` bytes of its body excepted."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.served.length:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) - missing])
        if missing:
            self.drop()

    def drop(self) -> None:
        """Close the connection in the middle."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """It is quiet."""


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default of 5, clients that come together wait for seconds

    def handle_error(self, *_: object) -> None:
        """A client that has left is no news."""


@contextmanager
def serving(folder: Path, **options: bool) -> Iterator[Server]:
    """A server of a folder on the loopback."""
    served = Server(folder, **options)
    server = _Quiet(("127.0.0.1", 0), type("_Handler", (Handler,), {"served": served}))
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, **headers: str) -> Fault:
    """Answers with a status."""

    def fault(request: Handler) -> bool:
        request.answer(code, b"", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def drop(request: Handler) -> bool:
    """Closes the connection without a word."""
    request.drop()
    return True


def truncate(request: Handler) -> bool:
    """Closes the connection after half of a body."""
    content = (request.served.folder / request.path.lstrip("/")).read_bytes()
    request.answer(200, content, missing=len(content) // 2 + 1)
    return True


def stall(seconds: float) -> Fault:
    """Sends the first bytes of a body, and no more for so long."""

    def fault(request: Handler) -> bool:
        request.send_response(200)
        request.send_header("Content-Length", "100000")
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(b"{")
            request.wfile.flush()
        time.sleep(seconds)
        request.drop()
        return True

    return fault


def first_try(fault: Fault) -> Fault:
    """The first request for each thing is answered so."""
    return lambda request: request.served.tries[request.command, request.path] % 2 == 1 and fault(request)


TRANSIENT: dict[str, Fault] = {
    **{str(code): status(code) for code in (408, 425, 429, 500, 502, 503, 504)},
    "Retry-After": status(429, Retry_After="0"),
    "a dropped connection": drop,
    "a truncated body": truncate,
}
"""Answers that a server gives for a while."""
