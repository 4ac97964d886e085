"""What a dashboard of our own answers before Dask does: for other hosts, and where Dask's answer fails or lies."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import Any, cast

from distributed import Scheduler
from distributed.diagnostics.websocket import WebsocketPlugin
from distributed.http.scheduler.info import EventstreamHandler, IndividualPlots
from distributed.http.scheduler.json import IdentityJSON
from tornado.routing import PathMatches
from tornado.web import Application, HTTPError, RequestHandler

from oocattn.imports import IMPORTING, with_some_home
from oocattn.pipelines.engines.dask.runs import Runs
from oocattn.text import printable
from oocattn.threads import begin_call

_NO_PROFILER = "Dask's profiler is off here: it can end the process. Try py-spy, or the timeline"

LEFT_OUT = {
    "profile": _NO_PROFILER,
    "profile-server": _NO_PROFILER,
    "fine-performance-metrics": "Dask counts its own threads here, which wait while those of lanes work. Try /oocattn",
    "hardware": "Dask would measure disk and memory here, and hold up the run meanwhile. Try oocattn doctor",
}
"""Dask's pages that have nothing true to show or do harm, alone and as `individual-` ones, and why."""


def restrict(scheduler: Scheduler, hosts: Iterable[str]) -> None:
    """Have a scheduler's web application answer requests for these hosts alone, with what there is to show."""
    http, own = scheduler.http_application, "|".join(map(re.escape, hosts))
    http.add_handlers(rf"(?!(?:{own})$).*$", [(r".*", _Elsewhere)])
    handlers: list[tuple[Any, ...]] = [
        (rf"/(?:individual-)?({'|'.join(LEFT_OUT)})(?:/.*)?", _LeftOut),
        (r"/sitemap\.json", _Sitemap),
        (r"/individual-plots\.json", _Plots, {"dask_server": scheduler}),
        (r"/json/identity\.json", _Identity, {"dask_server": scheduler}),
        (r"/eventstream", _Events, {"dask_server": scheduler}),
    ]
    http.add_handlers(r".*$", handlers)
    rules = http.default_router.rules  # the last one has Dask's routes, but for /sitemap.json, which Dask has put before
    rules[:] = [*rules[-3:-1], *rules[:-3], rules[-1]]


def is_left_out(path: str) -> bool:
    """Whether a page of Dask's dashboard is not served."""
    return path.strip("/").removeprefix("individual-") in LEFT_OUT


class DashboardPages(Application):
    """Dask's pages and our own, imported when the first one is asked for.

    That takes half a second, which most runs would spend for nobody. They replace this application then.
    """

    def __init__(self, scheduler: Scheduler, origins: Iterable[str], runs: Runs) -> None:
        super().__init__([(r".*", _FirstRequest)])
        self._scheduler = scheduler
        self._runs = runs
        self._origins = frozenset(origins)
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        """Have the pages served, to their own origins. Raises HTTPError where they cannot be imported."""
        http = self._scheduler.http_application
        async with self._opening:
            if self not in http.applications:  # another request has come first
                return
            try:
                own = await asyncio.wrap_future(begin_call(_import_pages))
            except ImportError as error:
                raise HTTPError(503, reason=printable(f"Dask's dashboard cannot be imported: {error}")) from error
            own.add_pages(self._scheduler, self._runs, is_left_out)
            http.applications.remove(self)
            for pages in http.applications:
                pages.websocket_origins.clear()  # of what Dask's configuration allows now
                pages.websocket_origins.update(self._origins)


class _FirstRequest(RequestHandler):
    """Has the pages opened, and sends the browser to the one that it asked for."""

    async def prepare(self) -> None:
        await cast(DashboardPages, self.application).open()
        self.redirect("/" + (self.request.uri or "").lstrip("/"))  # here, whatever is asked for


def _import_pages() -> ModuleType:
    """The module of our own pages, which imports Dask's."""
    with IMPORTING, with_some_home():
        return import_module("oocattn.pipelines.engines.dask.page")


class _LeftOut(RequestHandler):
    """Refuses a page that is left out."""

    def prepare(self) -> None:
        raise HTTPError(404, reason=LEFT_OUT[self.path_args[0]])


class _Elsewhere(RequestHandler):
    """Refuses a request for another host."""

    def prepare(self) -> None:
        raise HTTPError(403, reason="Open the dashboard at the address that was printed")


class _OfPages(RequestHandler):
    """Answers with what pages there are, which are opened for it."""

    async def prepare(self) -> None:
        for pages in list(cast(Any, self.application).applications):
            if isinstance(pages, DashboardPages):
                await pages.open()


class _Plots(_OfPages, IndividualPlots):
    """The pages of one plot each, which JupyterLab shows."""


class _Sitemap(_OfPages):
    """The paths that need no argument. Dask's own fails where there are pages of bokeh (distributed 2026.8)."""

    def get(self) -> None:
        """Send the paths."""
        http = cast(Any, self.application)
        pages = {path for each in http.applications for path in each.app_paths}
        matchers = [rule.matcher for rule in http.wildcard_router.rules if isinstance(rule.matcher, PathMatches)]
        routes = {each.regex.pattern.rstrip("$") for each in matchers if not each.regex.groups}
        self.write({"paths": sorted(pages | routes)})


class _Identity(IdentityJSON):
    """The scheduler and its workers. Dask's own fails while a task executes, for our keys of tasks are tuples."""

    def get(self) -> None:
        """Send the identity."""
        self.write(_with_text_keys(self.server.identity()))


def _with_text_keys(value: Any) -> Any:
    """A value with texts as keys of all its dictionaries."""
    return {str(key): _with_text_keys(each) for key, each in value.items()} if isinstance(value, dict) else value


class _Events(EventstreamHandler):
    """Dask's stream of events. Without a WebSocket, Dask's own would stay with the scheduler, and fail at every event."""

    def initialize(self, dask_server: Any = None, extra: Any = None) -> None:
        """Know the scheduler."""
        self.server = dask_server

    def open(self) -> None:
        """Follow the scheduler from now on."""
        self.plugin = WebsocketPlugin(self, self.server)
        self.server.add_plugin(self.plugin)
        super().open()  # type: ignore[no-untyped-call]
