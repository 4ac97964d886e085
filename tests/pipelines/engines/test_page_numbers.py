"""The numbers of a run's page are those of its events, after some of them and at the end."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from bokeh.models import LinearAxis
from looking import FailingOnce, Look, headline, opened, source, text
from support import Recorder, carry_out, normal_arrays, plan_for, write_dataset

from oocattn import Event, Plan, clock
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.watch.timeline import RESOURCES, busy_seconds
from oocattn.storage.paths import ResultPaths
from oocattn.units import format_bytes


@pytest.fixture
def plan(fast_path: Path) -> Plan:
    return plan_for(write_dataset(fast_path / "dataset.zarr", normal_arrays(130, kv_heads=2)), chunks=13, causal=True)


@pytest.fixture
def looks(plan: Plan, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Look]:
    """Of the page in a run of two heads with a fault: early, after the fault, and at the end."""
    recorder, seen, failing = Recorder([]), list[Look](), FailingOnce(9)
    scratch = ResultPaths.at(fast_path / "result.zarr").scratch
    monkeypatch.setattr("oocattn.pipelines.session.bytes_in", lambda path: 12345 if path == scratch else 0)
    monkeypatch.setattr("oocattn.pipelines.watch.board.FIRST_WIDTH", 0.002)  # so that a short run has many
    monkeypatch.setattr(Lane, "attend", lambda lane, turn: failing(lane, turn))

    def look(event: Event) -> None:
        recorder(event)
        count = len(recorder.of("attended"))
        if (event.kind == "attended" and count in (5, 20)) or event.kind == "ended":
            before = clock.now()
            seen.append(Look(list(recorder.events), opened(client), before, clock.now()))

    with local_client() as client:
        carry_out(plan, fast_path / "dataset.zarr", fast_path / "result.zarr", client, callbacks=[look])
        menu = urlopen(client.dashboard_link.replace("oocattn", "status"), timeout=30).read().decode()
        assert menu.index('href="oocattn"') < menu.index('href="status"')
    assert [len(each.of("recovered")) for each in seen] == [0, 1, 1]
    return seen


def test_the_numbers_of_the_page_are_those_of_the_events(plan: Plan, looks: list[Look]) -> None:
    for look in looks:
        assert_progress(plan, look)
        assert_rates(look)
        assert_lanes(look)
        assert_resources(look)
        log = text(look.document, "log")
        for event in look.of("recovered"):
            assert f"recovered: {event.error}" in log
            assert "<Input/output error>" in log
        assert ("recovered" in log) == bool(look.of("recovered"))


def assert_progress(plan: Plan, look: Look) -> None:
    """Share and chunk pairs."""
    assert f"{look.done:,} of 26 subproblems" in text(look.document, "headline")
    if look.of("ended"):
        assert "finished in " in headline(look.document)
        assert source(look.document, "strip")["share"][0].ravel().tolist() == [1.0, 1.0]
        return
    assert f"running: {look.done / 26:.1%}, " in headline(look.document)
    if not look.of("recovered"):  # then what was staged is staged again
        attended, staged = ({(e.head_group, e.index) for e in look.of(kind)} for kind in ("attended", "staged"))
        division = plan.division_of(0)
        for name, these in (("done", attended), ("in_flight", staged - attended)):
            expected = np.zeros((13, 13), int)
            for group, index in these:
                for block in division.subproblem(index).blocks if group == 0 else ():
                    expected[block.query_chunk, list(block.key_chunks)] = 1
            assert source(look.document, "matrix")[name][0].tolist() == expected.tolist()


def assert_rates(look: Look) -> None:
    """What was done up to the end of each bin but the last, which may be filled in part."""
    rates, (started,) = source(look.document, "rates"), look.of("started")
    edges = np.asarray(rates["seconds"])[:-1]
    assert len(edges) >= 5
    for name in ("tokens", "read", "written"):
        done = np.zeros(len(edges))
        for amount, start, stop in look.amounts(name):
            done += amount * np.clip((started.start + edges - start) / (stop - start), 0, 1)
        assert np.cumsum(np.asarray(rates[name])[:-1] * edges[0]) == pytest.approx(done, rel=2e-3, abs=2e-3 * max(done))
    flops = np.asarray(rates["flops"]) / np.maximum(1e-9, rates["tokens"])
    assert flops[np.asarray(rates["tokens"]) > 0] == pytest.approx(4 * 8 * 2 * 131 / 2, rel=2e-3)  # D = 8, 2 heads


def assert_lanes(look: Look) -> None:
    """How busy each resource of the lane was."""
    lanes = source(look.document, "lanes")
    spans = [span for event in look.events for span in getattr(event, "spans", ())]
    seconds = max(span.stop for span in spans) - look.of("started")[0].start
    assert lanes["dw"] == pytest.approx([seconds])
    (axis,) = [each for each in look.document.select({"type": LinearAxis}) if each.major_label_overrides]
    labels = list(axis.major_label_overrides.values())
    names = [name for name in RESOURCES if any(span.resource == name for span in spans)]
    assert len(labels) == len(names)
    for name, label, cells in zip(names, labels, lanes["busy"][0], strict=True):
        share = busy_seconds([span for span in spans if span.resource == name]) / seconds
        assert cells.mean() == pytest.approx(share, abs=0.006)
        assert label == f"0: {name} {round(share, 4):.0%}"


def assert_resources(look: Look) -> None:
    """Memory, scratch, and when something was last saved."""
    said = text(look.document, "resources")
    memory = [event.memory for event in look.of("attended") if event.memory][-1]
    assert f"host memory: {format_bytes(max(0, memory.host))}, planned peak" in said
    if look.of("ended"):
        assert "scratch on disk: 0 B" in said
        assert "everything is saved" in said
        return
    assert f"scratch on disk: {format_bytes(12345)}" in said
    (age,) = re.findall(r"last saved ([0-9.e-]+) s ago", said)
    assert look.before - look.saved - 0.01 <= float(age) <= look.after - look.saved + 0.01
