"""A ring hands its slots out in turn, and has a stream wait for what used a slot last, if anything did."""

from __future__ import annotations

import pretend

from oocattn.pipelines.lane.cuda_memory import SlotRing


class Stream(pretend.Stream):
    """Notes which events it waits for."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_slots_are_acquired_in_turn_when_their_last_use_has_ended() -> None:
    ring, stream, events = SlotRing(["a", "b", "c"]), Stream(), [object() for _ in range(7)]
    buffers = []
    for event in events:
        slot = ring.acquire(stream)
        buffers.append(slot.buffer)
        slot.freed = event
    assert buffers == ["a", "b", "c", "a", "b", "c", "a"]
    assert stream.waited == events[:4]


def test_a_slot_whose_use_failed_before_it_was_freed_waits_for_the_use_before() -> None:
    ring, stream, event = SlotRing(["a"]), Stream(), object()
    ring.acquire(stream).freed = event
    ring.acquire(stream)
    ring.acquire(stream)
    assert stream.waited == [event, event]
