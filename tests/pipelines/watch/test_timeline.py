"""A timeline holds every span of a run: as a trace that viewers can draw, and as a small picture with busy shares."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from support import carry_out, make_event, normal_arrays, plan_for, write_dataset

from oocattn import Event, ProblemError, ResultExistsError
from oocattn.pipelines.watch.events import Span
from oocattn.pipelines.watch.timeline import Timeline, busy_seconds

START = 1.7e9
SVG = "{http://www.w3.org/2000/svg}"

spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda at: Span("read", at[0], at[0] + at[1])), max_size=30
)


@given(spans)
def test_busy_seconds_are_those_in_which_any_span_was_under_way(given_spans: list[Span]) -> None:
    seconds = {second for span in given_spans for second in range(int(span.start), int(span.stop))}
    assert busy_seconds(given_spans) == len(seconds)


@given(spans, st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_nor_division_changes_busy_seconds(given_spans: list[Span], random: Any) -> None:
    busy = busy_seconds(given_spans)
    halves = [
        Span(span.resource, *part)
        for span in given_spans
        for middle in [(span.start + span.stop) / 2]
        for part in ((span.start, middle), (middle, span.stop))
    ]
    random.shuffle(halves)
    assert busy_seconds(iter(halves + given_spans)) == pytest.approx(busy)


def span(resource: Any, start: float, stop: float) -> Span:
    return Span(resource, START + start, START + stop)


def write(
    path: Path, events: list[Event], stop: float = 10.0, kind: Any = "ended", problem: str = "2 heads & <more>"
) -> Timeline:
    timeline = Timeline(path)
    plan = SimpleNamespace(problem=problem)
    timeline(make_event("started", START, START, plan=plan))
    for event in events:
        timeline(event)
    timeline(make_event(kind, START, START + stop))
    return timeline


def read(path: Path) -> tuple[dict[tuple[str, str], list[dict[str, Any]]], int]:
    """The slices of a trace by names of process and thread, and how many slices there are."""
    events = json.loads(path.read_text())["traceEvents"]
    names: dict[Any, str] = {}
    for event in events:
        if event["ph"] == "M" and event["name"] in ("process_name", "thread_name"):
            names[event["pid"], event.get("tid")] = event["args"]["name"]
    tracks = defaultdict(list)
    slices = [event for event in events if event["ph"] == "X"]
    for event in slices:
        tracks[names[event["pid"], None], names[event["pid"], event["tid"]]].append(event)
    return dict(tracks), len(slices)


def check_tracks(tracks: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Within a track, slices follow one another; none begins before the run or before the one before it has ended."""
    for track in tracks.values():
        end = 0.0
        for event in track:
            assert event["ts"] >= end - 1e-6
            assert event["dur"] >= 0
            end = event["ts"] + event["dur"]


EVENTS = [
    make_event("staged", worker="0", spans=(span("read", 0, 2), span("read", 1, 3), span("read", 2, 4))),
    make_event("attended", worker="0", spans=(span("copy in", 4, 4.5), span("compute", 4.25, 9))),
    make_event("staged", head_group=1, index=3, worker="10", spans=(span("read", 5, 6),)),
    make_event("written", head_group=1, index=7, worker="2", spans=(span("write", 6, 8),)),
]


def test_the_trace_names_lanes_and_resources_and_keeps_overlapping_spans_apart(tmp_path: Path) -> None:
    write(tmp_path / "timeline.json", EVENTS)
    tracks, _ = read(tmp_path / "timeline.json")
    check_tracks(tracks)
    found = {place: [(event["ts"], event["dur"]) for event in track] for place, track in tracks.items()}
    assert found == {
        ("lane 0", "read"): [(0, 2e6), (2e6, 2e6)],
        ("lane 0", "read 2"): [(1e6, 2e6)],
        ("lane 0", "copy in"): [(4e6, 0.5e6)],
        ("lane 0", "compute"): [(4.25e6, 4.75e6)],
        ("lane 2", "write"): [(6e6, 2e6)],
        ("lane 10", "read"): [(5e6, 1e6)],
    }
    assert list(found)[-1] == ("lane 10", "read")
    assert tracks["lane 10", "read"][0]["args"] == {"head group": 1, "subproblem": 3}
    assert tracks["lane 2", "write"][0]["args"] == {"head group": 1, "chunk": 7}
    assert {path.name for path in tmp_path.iterdir()} == {"timeline.json", "timeline.svg"}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(-1, 9), st.floats(0, 3)), max_size=40))
def test_any_spans_make_a_trace_that_holds_each_of_them_once(
    tmp_path: Path, moments: list[tuple[str, float, float]]
) -> None:
    events = [
        make_event("staged", index=number, worker=worker, spans=(span("read", start, start + length),))
        for number, (worker, start, length) in enumerate(moments)
    ]
    write(tmp_path / "timeline.json", events)
    tracks, count = read(tmp_path / "timeline.json")
    check_tracks(tracks)
    assert count == len(moments)
    assert {event["args"]["subproblem"] for track in tracks.values() for event in track} == set(range(count))
    ElementTree.parse(tmp_path / "timeline.svg")


def test_the_picture_shows_each_lane_and_resource_and_how_busy_it_was(tmp_path: Path) -> None:
    timeline = write(tmp_path / "timeline.json", EVENTS)
    root = ElementTree.parse(timeline.picture).getroot()
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert words[0] == "2 heads & <more>, in 10 s"
    shares = dict(pairwise(words))
    expected = {"0: read": "40.0%", "0: copy in": "5.0%", "0: compute": "47.5%", "2: write": "20.0%", "10: read": "10.0%"}
    assert [word for word in words if word.startswith("lane")] == [f"lane {row}" for row in expected]
    assert {row: shares[f"lane {row}"] for row in expected} == expected
    bars = [path.get("d") for path in root.iter(f"{SVG}path") if path.get("fill") and path.get("fill-opacity") == "1.0"]
    lengths = [sum(map(float, re.findall(r"h([\d.]+)v", bar))) for bar in bars]
    assert [length / 10 for length in lengths] == pytest.approx([40, 5, 47.5, 20, 10], abs=0.2)  # 1,000 wide


@pytest.mark.parametrize(
    "name", ["0", "tcp://node-0123.partition.cluster.example.org:34567", "W" * 300, "ワーカー" * 9, "a\x1b[31m\udcff" * 9]
)
def test_no_name_or_caption_leaves_the_picture(tmp_path: Path, name: str) -> None:
    problem = "128/16 heads x 16,777,216 tokens x D = 256, " + "bfloat16 to float32, " * 12 + "causal"
    events = [make_event("attended", worker=name, spans=(span("compute", 0, 1), span("copy out", 0, 1)))]
    timeline = write(tmp_path / "timeline.json", events, problem=problem)
    root = ElementTree.parse(timeline.picture).getroot()
    width = float(root.get("width"))
    for text in root.iter(f"{SVG}text"):
        size = float(text.get("font-size", root.get("font-size")))
        cells = sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text.text)
        length = 0.61 * size * cells  # of the usual monospaced fonts
        begins = {"end": 1.0, "middle": 0.5, None: 0.0}[text.get("text-anchor")]
        start = float(text.get("x")) - begins * length
        assert start >= 0, text.text
        assert start + length <= width, text.text
    shown = " ".join(text.text for text in root.iter(f"{SVG}text"))
    assert shown.startswith(" ".join(f"{problem}, in 10 s".split()))


@pytest.mark.parametrize("lanes", [1, 60])
def test_the_picture_of_many_short_spans_stays_small(tmp_path: Path, lanes: int) -> None:
    count = 8_000 // lanes
    events = [
        make_event("staged", index=number, worker=str(lane), spans=(span(resource, at, at + 5 / count),))
        for number in range(count)
        for lane in range(lanes)
        for resource in ("read", "copy in", "compute", "write")
        for at in [10 * number / count]
    ]
    timeline = write(tmp_path / "timeline.json", events)
    assert timeline.picture.stat().st_size < 1_000_000
    shares = [text.text for text in ElementTree.parse(timeline.picture).iter(f"{SVG}text") if text.text[-1] == "%"]
    assert shares == ["50.0%"] * 4 * lanes


def test_a_failed_run_leaves_its_timeline(tmp_path: Path) -> None:
    timeline = write(tmp_path / "timeline.json", EVENTS, stop=9.0, kind="failed")
    assert read(timeline.path)[1] == 7
    assert "failed after 9 s" in timeline.picture.read_text()


def test_a_run_without_spans_has_an_empty_timeline(tmp_path: Path) -> None:
    timeline = write(tmp_path / "timeline.json", [], stop=0.0)
    assert read(timeline.path) == ({}, 0)
    ElementTree.parse(timeline.picture)


def test_a_timeline_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    timeline = Timeline(folder / "timeline.json")
    folder.rmdir()
    with pytest.warns(UserWarning, match="timeline was not written"):
        timeline(make_event("ended", START, START + 1))


@pytest.mark.parametrize("name", ["nowhere/timeline.json", "picture.svg", "picture.SVG", "picture.png", "timeline"])
def test_a_path_that_will_not_do_is_refused_before_the_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProblemError, match=name):
        Timeline(tmp_path / name)


def test_only_files_that_a_timeline_wrote_are_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path / "timeline.json", EVENTS)
    for name in ("timeline.json", "timeline.svg"):
        (tmp_path / name).write_text('{"written by": "oocattn"}')
        with pytest.raises(ResultExistsError, match=name):
            Timeline(tmp_path / "timeline.json")
        (tmp_path / name).unlink()


def test_a_file_that_appears_during_the_run_is_kept_with_a_warning(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    timeline.picture.write_text("a drawing")
    with pytest.warns(UserWarning, match=r"timeline was not written: .*timeline\.svg exists"):
        timeline(make_event("ended", START, START + 1))
    assert timeline.picture.read_text() == "a drawing"


def test_a_run_tells_when_its_lane_read_computed_merged_and_wrote(tmp_path: Path, client: Client) -> None:
    dataset = write_dataset(tmp_path / "qkv.zarr", normal_arrays(200))
    plan = plan_for(dataset, causal=True, chunks=7)
    carry_out(plan, dataset, tmp_path / "out.zarr", client, [timeline := Timeline(tmp_path / "timeline.json")])
    tracks, _ = read(timeline.path)
    check_tracks(tracks)
    resources = {thread.split()[0] for _, thread in tracks}
    assert resources == {"read", "compute", "merge", "write"}
    attended = [event["args"] for (_, thread), track in tracks.items() if thread == "compute" for event in track]
    assert {(args["head group"], args["subproblem"]) for args in attended} == {(0, index) for index in range(7)}
