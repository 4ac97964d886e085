"""Time on a GPU: stretches between events, as spans of the host's clock."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from oocattn import clock
from oocattn.pipelines.watch.events import Resource, Span

JOIN_SECONDS = 2e-5  # gap below which spans of one resource are joined: the launch of the next
ANCHOR_SECONDS = 60.0  # seconds after which a later event is the origin: CUDA's times are float32


@dataclass(frozen=True)
class Stretch:
    """Work of a stream between two recorded events."""

    resource: Resource
    start: torch.cuda.Event
    stop: torch.cuda.Event


def record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Record an event at this point of the stream, timed, waited for without spinning."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(stream)
    return event


class DeviceClock:
    """Turns events of one device into seconds since the epoch."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._anchor = record_event(stream)
        self._anchor.synchronize()
        self._time = clock.now()
        self._lock = threading.Lock()

    def spans(self, stretches: Sequence[Stretch]) -> tuple[Span, ...]:
        """Spans of finished stretches, joined where nothing of the resource lies between."""
        with self._lock:
            timed = [Span(each.resource, self._seconds(each.start), self._seconds(each.stop)) for each in stretches]
            if timed and timed[-1].stop > self._time + ANCHOR_SECONDS:
                self._anchor, self._time = stretches[-1].stop, timed[-1].stop
        return join_spans(timed)

    def _seconds(self, event: torch.cuda.Event) -> float:
        return self._time + float(self._anchor.elapsed_time(event)) / 1e3


def join_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sort spans, and join those of one resource less than `JOIN_SECONDS` apart."""
    found: list[Span] = []
    last: dict[Resource, int] = {}
    for span in sorted(spans, key=lambda span: span.start):
        place = last.get(span.resource)
        if place is not None and span.start - found[place].stop < JOIN_SECONDS:
            found[place] = Span(span.resource, found[place].start, max(span.stop, found[place].stop))
        else:
            last[span.resource] = len(found)
            found.append(span)
    return tuple(found)
