"""The page `/oocattn` in Dask's dashboard: a document of bokeh that draws the record of a run, at most twice a second.

An update sends what has changed. bokeh walks through the whole document, which takes longer than all the rest, whenever a
model of it is replaced: updates change plain properties and the data of sources alone.

This module imports bokeh and Dask's pages: it is imported when the first page is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, CustomJS, LayoutDOM
from bokeh.models.widgets import Div
from bokeh.resources import INLINE
from bokeh.server.tornado import BokehTornado
from distributed import Scheduler
from distributed.dashboard.components.scheduler import env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import applications, template_variables
from tornado.ioloop import IOLoop
from tornado.web import RedirectHandler

from oocattn.pipelines.engines.dask import page_words
from oocattn.pipelines.engines.dask.page_figures import Lanes, Matrix, RateLines
from oocattn.pipelines.engines.dask.runs import PAGE, UPDATE_SECONDS, Runs, pause_after
from oocattn.pipelines.watch.timeline import RESOURCES

FULL_WIDTH = ":host .bk-clearfix { display: block; width: 100%; }"  # else a text is as wide as its longest line
NO_RUN = "<p>No run has told this scheduler of itself yet.</p>"

STAMP = """
window.oocattn_updated = Date.now();
window.oocattn_pause = stamp.data.pause[0];
window.oocattn_over = stamp.data.over[0]
"""

TEMPLATE = """{% extends "simple.html" %}
{% block extra_resources %}
<script>
  setInterval(function () {
    var silent = (Date.now() - (window.oocattn_updated || Date.now())) / 1000;
    var said = document.getElementById("oocattn-silence");
    said.style.display = silent > 6 + (window.oocattn_pause || 0) && !window.oocattn_over ? "block" : "none";
    said.textContent = "no data for " + Math.round(silent) + " s: the process has ended or is stopped";
  }, 1000);
</script>
{% endblock %}
{% block content %}
<div id="oocattn-silence" style="display:none;background:#b3261e;color:white;padding:8px;font-size:15px"></div>
{{ super() }}
{% endblock %}
"""


class RunPage:
    """The layout of a page, and what fills it from a record. `root` is what a document shows."""

    def __init__(self) -> None:
        self._matrix, self._rates, self._lanes = Matrix(), RateLines(), Lanes(RESOURCES)
        self._headline, self._legend, self._resources, self._log = map(_text, ("headline", "legend", "resources", "log"))
        self._headline.text = NO_RUN
        self._parts: dict[str, object] = {}
        pairs = column(row(self._matrix.figure, self._matrix.strip), self._legend)
        rates = column(self._rates.tokens, self._rates.flops, self._rates.bytes, sizing_mode="stretch_width")
        beside = column(self._lanes.figure, self._resources, sizing_mode="stretch_width")
        self._body = column(
            row(pairs, rates, sizing_mode="stretch_width"),
            beside,
            Div(text="<b>log</b>"),
            self._log,
            sizing_mode="stretch_width",
            visible=False,
        )
        self.root: LayoutDOM = column(self._headline, self._body, sizing_mode="stretch_width", margin=(10, 20, 10, 20))

    def update(self, record: Mapping[str, Any], age: float, others: list[str]) -> None:
        """Show a record that is `age` seconds old. Only what has changed is sent."""
        self._headline.text = page_words.headline(record, age, others)
        if "share" not in record:
            return
        drawn = {
            ("matrix", "strip"): self._matrix.update,
            ("rates",): self._rates.update,
            ("lanes",): self._lanes.update,
        }
        for names, draw in drawn.items():
            if any(record[name] != self._parts.get(name) for name in names):
                draw(record)
                self._parts.update({name: record[name] for name in names})
        self._legend.text = page_words.legend(record)
        self._resources.text = page_words.resources(record)
        self._log.text = page_words.log(record)
        self._body.visible = True


def _text(name: str) -> Div:
    return Div(text="", sizing_mode="stretch_width", name=name, stylesheets=[FULL_WIDTH])


class OpenPage:
    """The page in a document that a browser has opened; it updates itself, in a small share of the time."""

    def __init__(self, runs: Runs, document: Document) -> None:
        self._runs, self._document, self._page = runs, document, RunPage()
        self._stamp = ColumnDataSource({"count": [0], "over": [False], "pause": [0.0]}, name="stamp")
        self._stamp.js_on_change("data", CustomJS(code=STAMP, args={"stamp": self._stamp}))
        arguments = cast(Any, document.session_context).request.arguments
        self._name = b"".join(arguments.get("run", [])).decode("ascii", "replace")
        runs.pages.add(self)
        document.on_session_destroyed(lambda _: runs.pages.discard(self))
        document.title = "oocattn"
        self._update_repeatedly(0.0)
        document.add_root(self._page.root)
        document.add_root(column(Div(text="", tags=[self._stamp]), visible=False))

    def show_now(self) -> None:
        """Show the newest record as soon as the document can be changed."""
        self._document.add_next_tick_callback(self._update)

    def _update_repeatedly(self, most_age: float = UPDATE_SECONDS / 2) -> None:
        """Update; the next time is so late that updates take a small share of the time."""
        began = time.thread_time()
        try:
            self._update(most_age)
        finally:
            pause = pause_after(self._runs.viewers * (time.thread_time() - began), UPDATE_SECONDS)
            self._stamp.data = {**self._stamp.data, "count": [self._stamp.data["count"][0] + 1], "pause": [pause]}
            self._document.add_timeout_callback(self._update_repeatedly, round(1000 * pause))

    def _update(self, most_age: float = 0.0) -> None:
        """Show the record of the run, a new one unless the last is that young."""
        found = self._runs.find(self._name, most_age)
        if found is None:
            return
        shown = self._name or next(iter(self._runs.names))
        self._page.update(*found, [other for other in self._runs.names if other != shown])
        self._document.title = f"oocattn {found[0].get('share', 0):.0%}"
        over = [found[0]["state"] in page_words.OVER]
        if over != self._stamp.data["over"]:
            self._stamp.data = {**self._stamp.data, "over": over}


def make_document(runs: Runs, extra: Mapping[str, Any], document: Document) -> None:
    """Fill a document that a browser has opened."""
    OpenPage(runs, document)
    document.template = env.from_string(TEMPLATE)
    document.template_variables.update(extra)


def as_file(record: Mapping[str, Any]) -> str:
    """The page of a run that has ended, in one file that needs nothing else."""
    page = RunPage()
    page.update(record, 0.0, [])
    return file_html(page.root, INLINE, title="oocattn")


def add_pages(scheduler: Scheduler, runs: Runs, is_left_out: Callable[[str], bool]) -> None:
    """Add Dask's pages, but for some, and our own to a scheduler whose dashboard has none."""
    menu = template_variables(scheduler)  # the one that all pages share
    menu["pages"][:] = [page for page in menu["pages"] if not is_left_out(page)]
    menu["plots"][:] = [plot for plot in menu["plots"] if not is_left_out(plot["url"])]
    documents = {path: make for path, make in applications.items() if not is_left_out(path)}
    pages = _serve(scheduler, documents, "/")
    pages.add_handlers(r".*", [(r"/", RedirectHandler, {"url": "status"})])
    add_page(scheduler, runs)


def add_page(scheduler: Scheduler, runs: Runs) -> str:
    """Add the page to a scheduler's dashboard, first in its menu; return why that is not possible, or ""."""
    pages = next((each for each in scheduler.http_application.applications if isinstance(each, BokehTornado)), None)
    if pages is None:
        return "the scheduler has no dashboard"
    _serve(scheduler, {f"/{PAGE}": lambda _, extra, document: make_document(runs, extra, document)}, pages.prefix)
    menu = template_variables(scheduler)["pages"]
    if PAGE not in menu:
        menu.insert(0, PAGE)
    return ""


def _serve(scheduler: Scheduler, documents: Mapping[str, Callable[..., object]], prefix: str) -> BokehTornado:
    """Serve documents of bokeh by their paths."""
    variables = template_variables(scheduler)
    pages: BokehTornado = BokehApplication(documents, scheduler, prefix=prefix, template_variables=variables)
    scheduler.http_application.add_application(pages)
    pages.initialize(IOLoop.current())
    pages.start()
    return pages
