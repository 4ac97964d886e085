"""A proxy that makes an HTTP or S3 server slow: each request waits, and all of them share one rate.

It runs in a process of its own, so that it takes no turns of the tests' Python. What it saw is asked for at `/-/seen`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

PIECE = 1 << 16
"""Bytes that are sent at a time."""

BURST_SECONDS = 0.02
"""How much of the rate may be made up for after a pause of the proxy's own; a client's pause is lost."""


@dataclass
class Seen:
    """What was asked for since the last look: requests by method, bytes of bodies both ways, and the most at a time."""

    gets: int = 0
    puts: int = 0
    others: int = 0
    sent: int = 0
    received: int = 0
    most_at_a_time: int = 0


class Rate:
    """A rate in bytes per second that all connections share."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0

    async def take(self, nbytes: int) -> None:
        """Wait until so many more bytes may pass."""
        now = time.monotonic()
        self._free = max(self._free, now - BURST_SECONDS) + nbytes / self._rate
        if self._free > now:
            await asyncio.sleep(self._free - now)


class Proxy:
    """Passes requests on to a server, each after a wait."""

    def __init__(self, upstream: str, latency: float, rate: float) -> None:
        parts = urlsplit(upstream)
        self._upstream = parts.hostname, parts.port
        self._latency, self._rate = latency, Rate(rate)
        self._seen, self._open = Seen(), 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection, one after another."""
        with suppress(OSError, asyncio.IncompleteReadError):
            while await self._answer(reader, writer):
                pass
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        came = time.monotonic()
        request, fields = _parse(head)
        method, path, _ = request.split(" ", 2)
        if path == "/-/seen":
            content = json.dumps(asdict(self._seen)).encode()
            self._seen = Seen(most_at_a_time=self._open)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
            return True
        self._open += 1
        self._seen.most_at_a_time = max(self._seen.most_at_a_time, self._open)
        kind = {"GET": "gets", "PUT": "puts"}.get(method, "others")
        setattr(self._seen, kind, getattr(self._seen, kind) + 1)
        try:
            body = await self._receive(reader, writer, fields)
            await asyncio.sleep(max(0.0, came + self._latency - time.monotonic()))
            return await self._pass_on(request, fields, body, writer)
        finally:
            self._open -= 1

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: dict[str, str]) -> bytes:
        """The body of a request, at the rate."""
        if fields.pop("expect", ""):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        left, body = int(fields.get("content-length", 0)), bytearray()
        while left:
            body += (piece := await reader.readexactly(min(left, PIECE)))
            left -= len(piece)
            await self._rate.take(len(piece))
        self._seen.received += len(body)
        return bytes(body)

    async def _pass_on(self, request: str, fields: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Have the server answer; send its answer at the rate. False if the connection is to be closed after it."""
        there, back = await asyncio.open_connection(*self._upstream, limit=1 << 20)
        try:
            back.write(_head(request, {**fields, "connection": "close"}) + body)
            status, answer = _parse(await there.readuntil(b"\r\n\r\n"))
            answer.pop("connection", None)
            closing = "content-length" not in answer and not request.startswith("HEAD") and " 204 " not in status
            if closing:
                answer["connection"] = "close"
            writer.write(_head(status, answer))
            while not request.startswith("HEAD") and (piece := await there.read(PIECE)):
                self._seen.sent += len(piece)
                await self._rate.take(len(piece))
                writer.write(piece)
                await writer.drain()
            return not closing
        finally:
            back.close()


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    """The first line of a request or an answer, and its fields by name in lower case."""
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    return first, {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _head(first: str, fields: dict[str, str]) -> bytes:
    """What `_parse` took apart."""
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in fields.items()), "", ""]).encode("latin-1")


@dataclass(frozen=True)
class SlowStore:
    """A slow server at `url`, of so many seconds a request and bytes per second."""

    url: str
    latency: float
    rate: float

    def seen(self) -> Seen:
        """What was asked for since the last look."""
        with urllib.request.urlopen(f"{self.url}/-/seen") as answer:
            return Seen(**json.load(answer))


@contextmanager
def slowing(upstream: str, latency: float, rate: float) -> Iterator[SlowStore]:
    """Make the server at a URL slow, by a proxy on the loopback."""
    command = [sys.executable, __file__, upstream, str(latency), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            yield SlowStore(f"http://127.0.0.1:{int(proxy.stdout.readline())}", latency, rate)
        finally:
            proxy.terminate()


async def _main(upstream: str, latency: float, rate: float) -> None:
    server = await asyncio.start_server(Proxy(upstream, latency, rate).serve, "127.0.0.1", 0, limit=1 << 20, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upstream")
    parser.add_argument("latency", type=float)
    parser.add_argument("rate", type=float)
    asyncio.run(_main(**vars(parser.parse_args())))
