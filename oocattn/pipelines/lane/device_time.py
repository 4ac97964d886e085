"""When a GPU did what: stretches between two events of a stream, as spans of the host's clock."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from oocattn import clock
from oocattn.pipelines.watch.events import Resource, Span

JOIN = 2e-5
"""Spans of one resource with a smaller gap (seconds) between them are joined: the gap is the launch of the next."""

ANCHOR = 60.0
"""Seconds after which times are measured from a later event: CUDA gives them as float32 milliseconds."""


@dataclass(frozen=True)
class Stretch:
    """What a stream did between two recorded events."""

    resource: Resource
    start: torch.cuda.Event
    stop: torch.cuda.Event


def record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """A new event at this point of the stream, to be timed, waited for by streams, or by the host without spinning."""
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
        """When finished stretches were, those of one resource joined where nothing lies between."""
        with self._lock:
            timed = [Span(each.resource, self._seconds(each.start), self._seconds(each.stop)) for each in stretches]
            if timed and timed[-1].stop > self._time + ANCHOR:
                self._anchor, self._time = stretches[-1].stop, timed[-1].stop
        return join_spans(timed)

    def _seconds(self, event: torch.cuda.Event) -> float:
        return self._time + float(self._anchor.elapsed_time(event)) / 1e3


def join_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans in order, those of one resource joined where the gap between them is smaller than `JOIN`."""
    found: list[Span] = []
    last: dict[Resource, int] = {}
    for span in sorted(spans, key=lambda span: span.start):
        place = last.get(span.resource)
        if place is not None and span.start - found[place].stop < JOIN:
            found[place] = Span(span.resource, found[place].start, max(span.stop, found[place].stop))
        else:
            last[span.resource] = len(found)
            found.append(span)
    return tuple(found)
