"""Address of a run's dashboard, and the web pages that may read it.

A browser lets any page open a WebSocket to any address, the loopback too, and a page whose name is made to point at the
loopback may read all that is there. Only the server can refuse: ours answers requests for the dashboard's own hosts, and
WebSockets of pages that come from there.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import dask
import psutil
from tornado.netutil import bind_sockets

from oocattn.errors import ProblemError

LOOPBACK = "127.0.0.1"

ADVICE = {
    errno.EADDRINUSE: "another process listens there; choose another port, or 0 for any free one",
    errno.EACCES: "this user may not listen on that port; choose one from 1024 on",
}
"""Advice by the reason why nothing can listen; for others the host is wrong."""


@dataclass(frozen=True)
class DashboardAddress:
    """A host of this machine and a port, 0 for any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> DashboardAddress:
        """Parse HOST:PORT, [IPv6]:PORT or, on the loopback, :PORT; or ProblemError."""
        host, _, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if (":" in host) != bracketed or not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
            raise ProblemError(f"dashboard address {text!r}: expected HOST:PORT, such as 127.0.0.1:8787 or [::1]:8787")
        return cls((host[1:-1] if bracketed else host).lower() or LOOPBACK, int(port))

    def __str__(self) -> str:
        return f"{self._in_urls}:{self.port}"

    @property
    def _in_urls(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    def page(self, port: int) -> str:
        """The URL of our page that is printed, of a dashboard at `port`."""
        scheme = "https" if dask.config.get("distributed.scheduler.dashboard.tls.cert", None) else "http"
        return f"{scheme}://{self._in_urls}:{port}/oocattn"

    def check_free(self) -> None:
        """ProblemError where nothing can listen here, OSError where no file can be opened."""
        try:
            for listener in bind_sockets(self.port, self.host):
                listener.close()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            advice = ADVICE.get(error.errno or 0, "choose a host of this machine")
            raise ProblemError(f"dashboard address {str(self)!r}: {error.strerror}: {advice}") from error
        except ValueError as error:
            raise ProblemError(f"dashboard address {str(self)!r}: no name of a host ({error})") from error

    def check_port(self, port: int) -> None:
        """Raise ProblemError where Dask let the dashboard listen on another port."""
        if self.port not in (0, port):
            raise ProblemError(f"dashboard address {str(self)!r}: Address already in use: {ADVICE[errno.EADDRINUSE]}")

    def origins(self, port: int) -> set[str]:
        """HOST:PORT of pages that may open a WebSocket to a dashboard at `port`."""
        return {f"{host}:{port}" for host in self.hosts}

    @property
    def hosts(self) -> set[str]:
        """Names of this address in URLs."""
        hosts, ip = {self._in_urls}, _ip_address(self.host)
        if self.host == "localhost" or (ip and (ip.is_loopback or ip.is_unspecified)):
            hosts |= {LOOPBACK, "localhost"}
        if ip and ip.is_unspecified:
            hosts |= {socket.gethostname().lower(), *_own_addresses()}
        return hosts


def _ip_address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _own_addresses() -> set[str]:
    """The addresses of this machine, as URLs have them."""
    found = {address.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses}
    ips = {ip for ip in map(_ip_address, found) if ip}
    return {f"[{ip}]" if ip.version == 6 else str(ip) for ip in ips}
