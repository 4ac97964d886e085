"""What Dask's own pages say of a run, read from the data that they show."""

from __future__ import annotations

import asyncio
import html
import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import urlopen

import dask
import pytest
from distributed import Client
from distributed.dashboard.components.scheduler import TaskGroupGraph
from distributed.system import MEMORY_LIMIT
from support import Recorder, carry_out, plan_for

from oocattn.pipelines.engines import base
from oocattn.pipelines.engines.dask.lane_plugin import WORK
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.pipelines.engines.dask.routes import LEFT_OUT
from oocattn.pipelines.lane.device_time import join_spans
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.watch.events import Attended, Event, TaskEvent

STEPS = {"staged": "stage", "attended": "attend", "merged": "merge", "written": "write"}


def test_the_time_of_a_task_is_its_work_and_not_its_wait(
    dataset: Path, result: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform, recorder = base.perform, Recorder([])

    def perform_late(lane: Lane, task: base.Task) -> TaskEvent:
        time.sleep(0.01)
        return perform(lane, task)

    monkeypatch.setattr("oocattn.pipelines.engines.dask.tasks.perform", perform_late)
    client.get_task_stream()  # from now on
    began = time.time()
    carry_out(plan_for(dataset, chunks=7, causal=True), dataset, result, client, [recorder])
    stream = client.get_task_stream(start=began)
    shown = {
        (key[0].partition("-")[0], *key[1:]): [(each["start"], each["stop"]) for each in task["startstops"]]
        for task in stream
        if isinstance(key := task["key"], tuple)
    }
    events = [event for event in recorder.events if isinstance(event, TaskEvent)]
    assert len(shown) == len(events) >= 28
    assert {task["thread"] for task in stream} == set(range(4))  # a row of the task stream for each step
    for event in events:
        work = [(each.start, each.stop) for each in join_spans(event.spans) if each.resource == WORK[type(event)]]
        for (start, stop), (shown_start, shown_stop) in zip(
            work, shown[STEPS[event.kind], event.head_group, event.index], strict=True
        ):
            assert shown_stop - shown_start == pytest.approx(stop - start, abs=1e-5)
            assert began - 1 < shown_start <= shown_stop < time.time() + 1


def test_the_groups_of_a_run_are_its_steps_and_count_what_it_has_done(dataset: Path, result: Path, client: Client) -> None:
    scheduler: Any = client.cluster.scheduler
    plan, seen = plan_for(dataset, chunks=7, causal=True), []
    others = set(scheduler.task_groups)  # of tasks that other tests have submitted

    async def look() -> tuple[dict[str, dict[str, int]], dict[str, set[str]]]:
        page = TaskGroupGraph(scheduler)
        page.update()  # raises where a group is not found, or in a cycle
        groups = [group for name, group in scheduler.task_groups.items() if name not in others]
        return {group.prefix.name: dict(group.states) for group in groups}, {
            group.name: group.dependencies for group in groups
        }

    def listen(event: Event) -> None:
        if isinstance(event, Attended):
            seen.append(client.sync(look))

    carry_out(plan, dataset, result, client, [listen])
    for number, (states, dependencies) in enumerate(seen):
        assert set(states) == set(STEPS.values())
        assert not any(dependencies.values())
        assert sum(counts["released"] + counts["memory"] for counts in states.values()) >= number
        assert not any(counts["forgotten"] for counts in states.values())
    assert len(seen) == plan.subproblems
    groups = seen[0][1].keys()

    async def wait_until_forgotten() -> None:
        while groups & scheduler.task_groups.keys():
            await asyncio.sleep(0.01)

    client.sync(wait_until_forgotten)
    for name in groups:
        assert not any(name.partition("-")[2] in plugin for plugin in scheduler.plugins)
        prefix = scheduler.task_prefixes[name.partition("-")[0]]
        assert prefix.states["released"] == sum(group.states["released"] for group in prefix.groups)


def test_the_memory_limit_of_a_worker_is_the_machines_and_nothing_is_done_about_it(client: Client) -> None:
    scheduler: Any = client.cluster.scheduler
    (shown,) = scheduler.workers.values()
    (worker,) = client.cluster.workers.values()
    assert shown.memory_limit == MEMORY_LIMIT > 0
    assert type(worker.data) is dict  # which spills nothing
    assert "memory_monitor" not in worker.periodic_callbacks
    assert dask.config.get("distributed.worker.memory.pause")


LINK = re.compile(r'href="([^"]+)"')


def test_links_of_pages_lead_to_pages(client: Client) -> None:
    status = client.dashboard_link
    found, left = {status}, [status]
    while left:
        with urlopen(left.pop(), timeout=30) as answer:  # which raises for what is no page
            if "text/html" in answer.headers["Content-Type"]:
                links = {urljoin(answer.url, html.unescape(link)) for link in LINK.findall(answer.read().decode())}
                left += [link for link in links - found if urlsplit(link).path.startswith("/info")]
                found |= links
    paths = {urlsplit(link).path for link in found}
    assert {
        "/groups",
        "/graph",
        "/tasks",
        "/individual-task-stream",
        "/info",
        "/info/main/logs.html",
    } <= paths
    assert sum(path.startswith(("/info/worker/", "/info/logs/", "/info/call-stacks/")) for path in paths) == 3
    assert not any(any(word in path for word in (*LEFT_OUT, "proxy")) for path in paths)


@pytest.mark.parametrize(
    "page", [*LEFT_OUT, *(f"individual-{name}" for name in LEFT_OUT), "profile/", "profile/autoload.js"]
)
def test_no_page_is_there_that_shows_nothing_true_or_holds_up_a_run(client: Client, page: str) -> None:
    with pytest.raises(HTTPError, match=r"404: Dask('s profiler is off| counts its own threads| would measure)"):
        urlopen(urljoin(client.dashboard_link, page), timeout=30)


def routes(scheduler: Any, task: object, worker: str) -> set[str]:
    """Every path that a scheduler's dashboard serves, but for files and WebSockets; those of tasks and workers for these."""
    http, found = scheduler.http_application, set()
    for pages in http.applications:
        found |= {each for path in pages.app_paths for each in (path, f"{path}/metadata", path + AUTOLOADED)}
    for pattern in (rule.matcher.regex.pattern.rstrip("$") for rule in http.wildcard_router.rules):
        argument = task if pattern.startswith(("/info/task/", "/info/call-stack/")) else worker
        found.add(pattern.replace("(.*)", quote(str(argument), safe="")))
    return found - {"/eventstream"} - {path for path in found if path.startswith(("/proxy/", "/statics/"))}


AUTOLOADED = "/autoload.js?bokeh-autoload-element=1"  # of a page that is shown within another


def failing(client: Client, paths: set[str]) -> dict[str, object]:
    """What those of some paths answer that do not answer 200."""
    found: dict[str, object] = {}
    for path in sorted(paths):
        try:
            urlopen(urljoin(client.dashboard_link, path), timeout=30).close()
        except OSError as error:
            found[path] = error
    return found


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_route_of_the_dashboard_answers_during_a_run_and_after_it(
    dataset: Path, result: Path, everything: bool
) -> None:
    during: list[tuple[set[str], dict[str, object]]] = []

    def look(event: Event) -> None:
        if isinstance(event, Attended) and not during:
            tasks, (worker,) = list(scheduler.tasks), scheduler.workers
            paths = routes(scheduler, tasks[0], worker)
            if not everything:
                paths = {path for path in paths if "/individual-" not in path and not path.endswith(AUTOLOADED)}
            during.append((paths, failing(client, paths)))

    with local_client() as client:
        scheduler: Any = client.cluster.scheduler
        plots = read_json(client, "/individual-plots.json")  # the first request, which opens all pages
        carry_out(plan_for(dataset, chunks=7, causal=True), dataset, result, client, [look])
        ((paths, failed),) = during
        assert failed == {}
        listed = set(read_json(client, "/sitemap.json")["paths"])
        assert {"/oocattn", "/status", "/individual-progress", "/json/counts.json", "/health"} <= listed
        assert set(plots.values()) <= listed | {"/statics/individual-cluster-map.html"}
        assert failing(client, paths & listed | {"/sitemap.json"}) == {}


def read_json(client: Client, path: str) -> Any:
    with urlopen(urljoin(client.dashboard_link, path), timeout=30) as answer:
        return json.load(answer)


def test_a_request_for_events_without_a_socket_leaves_nothing_behind(client: Client) -> None:
    before = set(client.cluster.scheduler.plugins)
    with pytest.raises(HTTPError, match="400"):
        urlopen(urljoin(client.dashboard_link, "/eventstream"), timeout=30)
    assert set(client.cluster.scheduler.plugins) == before
