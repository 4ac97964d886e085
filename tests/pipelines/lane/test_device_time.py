"""Times of a GPU's streams: events become spans of the host's clock, join_spans where nothing lies between them."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise
from random import Random

import pretend
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocattn.pipelines.lane import device_time
from oocattn.pipelines.lane.device_time import ANCHOR_SECONDS, JOIN_SECONDS, DeviceClock, Stretch, join_spans, record_event
from oocattn.pipelines.watch.events import Span
from oocattn.pipelines.watch.timeline import busy_seconds

TICK = JOIN_SECONDS / 4

spans = st.lists(
    st.builds(
        lambda resource, start, length: Span(resource, start * TICK, (start + length) * TICK),
        st.sampled_from(["compute", "copy in", "merge"]),
        st.integers(0, 200),
        st.integers(0, 30),
    ),
    max_size=25,
)


def by_resource(these: list[Span] | tuple[Span, ...]) -> dict[str, list[Span]]:
    found = defaultdict(list)
    for span in these:
        found[span.resource].append(span)
    return found


@given(spans)
def test_joining_keeps_when_each_resource_was_busy_but_for_small_gaps(given_spans: list[Span]) -> None:
    found = join_spans(given_spans)
    assert [span.start for span in found] == sorted(span.start for span in found)
    before, after = by_resource(given_spans), by_resource(found)
    assert before.keys() == after.keys()
    for resource, these in after.items():
        for first, second in pairwise(these):
            assert second.start - first.stop >= JOIN_SECONDS
        for span in before[resource]:
            assert any(whole.start <= span.start and span.stop <= whole.stop for whole in these)
        ends = {span.start for span in before[resource]}, {span.stop for span in before[resource]}
        assert {span.start for span in these} <= ends[0]
        assert {span.stop for span in these} <= ends[1]
        # What joining adds are gaps, each smaller than JOIN_SECONDS, between spans that were there.
        added = busy_seconds(these) - busy_seconds(before[resource])
        assert -1e-12 <= added <= JOIN_SECONDS * (len(before[resource]) - len(these)) + 1e-12


@given(spans, st.randoms(use_true_random=False))
def test_joining_spans_again_or_in_another_order_changes_nothing(given_spans: list[Span], chance: Random) -> None:
    found = join_spans(given_spans)
    assert join_spans(found) == found
    shuffled = list(given_spans)
    chance.shuffle(shuffled)
    assert set(join_spans(shuffled)) == set(found)


def test_a_device_clock_gives_seconds_of_the_host_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's times are float32 milliseconds after another event: those of an early one would be coarse."""
    asked = []

    class Event(pretend.Event):
        def elapsed_time(self, later: pretend.Event) -> float:
            asked.append(later.seconds - self.seconds)
            return super().elapsed_time(later)

    monkeypatch.setattr(pretend.Torch.cuda, "Event", Event)
    monkeypatch.setattr(device_time, "torch", pretend.Torch())
    stream = pretend.Stream()
    began = time.time() - time.perf_counter()
    clock = DeviceClock(stream)
    base = time.perf_counter()
    for second in range(0, 7200, 10):
        start, stop = record_event(stream), record_event(stream)
        start.seconds, stop.seconds = base + second, base + second + 3
        (span,) = clock.spans([Stretch("compute", start, stop)])
        assert span.resource == "compute"
        assert span.start == pytest.approx(began + start.seconds, abs=0.01)
        assert span.stop - span.start == pytest.approx(3)
    assert max(asked) < ANCHOR_SECONDS + 20
    assert clock.spans([]) == ()
