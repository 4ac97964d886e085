"""Files behind http and https, on servers as they really are.

They may lack ranges and HEAD, compress, redirect or stall. fsspec's own class takes the whole file for a range where a
server ignores ranges, and takes every failure to learn a size for a missing file. Importing this module needs aiohttp.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import weakref
from types import SimpleNamespace
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from oocattn import clock
from oocattn.errors import RemoteError

CONNECT_SECONDS, IDLE_SECONDS = 15.0, 20.0
"""Seconds in which a server must take a connection, and in which it must send something."""

LEAST_RATE = 1000.0
"""Bytes per second that a body must have on average after `IDLE_SECONDS`: a server may not drip for hours."""

TOTAL_SECONDS = 300.0  # seconds that a request may take whose body is not read here, as in a chain such as zip::https
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


async def get_client(**options: Any) -> aiohttp.ClientSession:
    """A session with timeouts that follows no redirect to a nearer network."""
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    timeout = aiohttp.ClientTimeout(total=TOTAL_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=IDLE_SECONDS)
    return aiohttp.ClientSession(**{"timeout": timeout, **options, "trace_configs": [trace]})


class HttpFiles(HTTPFileSystem):  # type: ignore[misc]
    """fsspec's file system for http, with true ranges and sizes."""

    _session: Any = None

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """All bytes of a file, [start, end), or the last -`start`.

        The server need not know ranges. Little more than these is held in memory. Raises FileNotFoundError and aiohttp's.
        """
        if start is not None and start == end:
            return b""
        async with await self._request(url, _range_header(start, end)) as response:
            if response.status == 416:  # the file ends before `start`
                return b""
            self._check(response, url)
            if not (_is_encoded(response) and response.status == 206):
                return await _read(response, start or 0, end)
        async with await self._request(url, {}) as response:  # a part of what is compressed means nothing
            self._check(response, url)
            return await _read(response, start or 0, end)

    async def _info(self, url: str, **_: Any) -> dict[str, Any]:
        """The file's name and size, None where the server does not tell it. Some answer HEAD with another size."""
        async with await self._request(url, {"Range": "bytes=0-0"}) as response:
            if response.status != 416:  # an empty file
                self._check(response, url)
            return {"name": url, "size": _size(response), "type": "file"}

    async def set_session(self) -> aiohttp.ClientSession:
        """The session of this object, which is closed with it."""
        if self._session is None:
            self._session = await self.get_client(**self.client_kwargs)
            weakref.finalize(self, self.close_session, asyncio.get_running_loop(), self._session)
        session: aiohttp.ClientSession = self._session
        return session

    async def _request(self, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """A response to GET whose body has not been read. Ranges and sizes are of bytes not compressed on their way."""
        session = await self.set_session()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=IDLE_SECONDS)
        options = {"timeout": timeout, **self.kwargs, "allow_redirects": True}
        options["headers"] = {**self.kwargs.get("headers", {}), "Accept-Encoding": "identity", **headers}
        response: aiohttp.ClientResponse = await session.get(self.encode_url(url), **options)
        return response

    def _check(self, response: aiohttp.ClientResponse, url: str) -> None:
        self._raise_not_found_for_status(response, url)
        if response.status not in (200, 206):
            raise RemoteError(f"{url} is answered with status {response.status}, expected 200 or 206: check the URL")


def _range_header(start: int | None, end: int | None) -> dict[str, str]:
    if start is None and end is None:
        return {}
    if start is not None and start < 0:
        return {"Range": f"bytes={start}"}
    return {"Range": f"bytes={start or 0}-{'' if end is None else end - 1}"}


def _is_encoded(response: aiohttp.ClientResponse) -> bool:
    return response.headers.get("Content-Encoding", "identity") not in ("identity", "")


def _size(response: aiohttp.ClientResponse) -> int | None:
    """Bytes of the whole file, where the response to GET of its first byte says so."""
    if response.status != 416 and _is_encoded(response):
        return None
    if response.status in (206, 416):
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isascii() and total.isdigit() else None
    return response.content_length


async def _read(response: aiohttp.ClientResponse, start: int, end: int | None) -> bytes:
    """[start, end) of a file, or its last -`start` bytes. The response has these, or the whole file."""
    expected = None if response.status == 200 else _part_bytes(response, start)
    most = None if end is None else end - start
    skip = start if response.status == 200 and start > 0 else 0
    content, began, received = bytearray(), clock.now(), 0
    async for piece in response.content.iter_any():
        received += len(piece)
        if (seconds := clock.now() - began) > IDLE_SECONDS and received < LEAST_RATE * seconds:
            raise TimeoutError(f"{received:,} bytes in {seconds:.0f} s")
        content += piece[skip:]
        skip = max(0, skip - len(piece))
        if start < 0 and len(content) > -2 * start:
            del content[:start]
        if most is not None and len(content) >= most:
            return bytes(content[:most])
    if expected is not None and received < expected:
        raise aiohttp.ClientPayloadError(f"{received:,} bytes of {expected:,}")
    return bytes(content[start:] if start < 0 else content)


def _part_bytes(response: aiohttp.ClientResponse, start: int) -> int:
    """How many bytes a response to a range request has. Raises for another range, or one that is not said."""
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    fault = "a part of it, status 206, that does not say which (Content-Range)"
    if match is not None:
        first, last = int(match[1]), int(match[2])
        if (first == start) if start >= 0 else (match[3] == "*" or last == int(match[3]) - 1):
            return last - first + 1
        fault = f"bytes {first} to {last}, expected those from {start} on"
    raise RemoteError(
        f"{response.url} is answered with {fault}: its server does not do as it is asked; copy the dataset elsewhere"
    )


async def _check_redirect(session: Any, context: SimpleNamespace, redirect: aiohttp.TraceRequestRedirectParams) -> None:
    """Raise RemoteError for a redirect to a nearer network, or away from TLS."""
    there = redirect.url.join(URL(redirect.response.headers.get("Location", "")))
    why = ""
    if there.scheme not in ("http", "https") or (redirect.url.scheme == "https" and there.scheme == "http"):
        why = f"from {redirect.url.scheme} to {there.scheme}"
    elif there.host != redirect.url.host and max(await _nearness(there.host)) > min(await _nearness(redirect.url.host)):
        why = "to a host in a network that is nearer than its own"
    if why:
        raise RemoteError(
            f"{redirect.url} redirects to {there}: redirects {why} are not followed; if you trust that place, give its URL"
        )


async def _nearness(host: str | None) -> list[int]:
    """Of each address: 0 Internet, 1 private, 2 link-local, 3 this host."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError:  # the request will say so
        return [0]
    return [_nearness_of(str(address[0])) for *_, address in found]


def _nearness_of(text: str) -> int:
    address = ipaddress.ip_address(text.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback or address.is_unspecified:
        return 3
    return 2 if address.is_link_local else 0 if address.is_global else 1
