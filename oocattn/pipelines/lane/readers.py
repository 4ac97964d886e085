"""The threads that read for a lane: bytes as they lie by a few, what is decoded one at a time, or many ahead of each other.

A store behind a network answers each request after a while, and all of them at some rate. To have that rate, as many bytes
must be asked for at any time as it sends in that while. So reads of such a store begin one after another, also of the next
subproblem, until what they decode fills the window that the plan counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oocattn import clock
from oocattn.storage.inputs.ahead import MOST_READS, Window
from oocattn.storage.inputs.held import Rows
from oocattn.storage.inputs.values import count_not_finite
from oocattn.threads import ThreadPool


@dataclass(frozen=True)
class Read:
    """Tokens of a head of an array, and where they go. NaN and Inf are counted where `counted_for` is a query chunk."""

    array: Rows
    batch: int
    head: int
    tokens: range
    out: npt.NDArray[Any]
    counted_for: int | None


ReadResult = tuple[float, int]
"""When a read began, and how many elements are NaN or Inf, if that is counted."""


class Readers:
    """Carries out the reads of a lane by `count` threads, a `step` each.

    What is decoded is decoded one read at a time; where the plan says how many bytes may be read `ahead`, up to that.
    """

    def __init__(self, count: int, ahead: int, step: Callable[[], None]) -> None:
        self._step = step
        self._threads = ThreadPool(count, "oocattn-read")
        self._count = count
        self._decoding = threading.Lock()
        self._window = Window(ahead) if ahead else None
        self._ahead = ThreadPool(MOST_READS, "oocattn-ahead")

    def carry_out(self, reads: Sequence[Read], turn: int = 0) -> list[ReadResult]:
        """Carry out reads, in their order as far as they wait for each other; return what each found.

        What is read ahead for a lower `turn` begins first.
        """
        if self._window is not None and any(read.array.is_remote for read in reads):
            return self._read_ahead(reads, turn, self._window)
        if self._count == 1:  # to hand over each read takes longer than a small one
            return self._threads.submit(lambda: [self._read(read) for read in reads]).result()
        return self._share_out(reads)

    def close(self) -> None:
        """Wait for all reads; no more begin."""
        self._threads.shutdown()
        self._ahead.shutdown()

    def _share_out(self, reads: Sequence[Read]) -> list[ReadResult]:
        """Have each thread take one read after another. To hand over each to a thread would take Python's lock.

        Where reads fail, no more begin; the first of them says why.
        """
        found, failed = dict[int, ReadResult](), dict[int, BaseException]()
        numbers = iter(range(len(reads)))

        def take() -> None:
            for number in numbers:
                if failed:
                    break
                try:
                    found[number] = self._read(reads[number])
                except BaseException as error:
                    failed[number] = error

        wait([self._threads.submit(take) for _ in range(min(self._count, len(reads)))])
        if failed:
            raise failed[min(failed)]
        return [found[number] for number in range(len(reads))]

    def _read_ahead(self, reads: Sequence[Read], turn: int, window: Window) -> list[ReadResult]:
        """Begin reads as the window has room; those of a later turn begin when all of these have begun."""
        begun: list[Future[ReadResult]] = []
        failed = threading.Event()
        with window.turn(turn):
            for read in reads:
                if failed.is_set():
                    break
                begun.append(self._begin(read, turn, window, failed))
        wait(begun)  # none goes on into a slot that is used again
        return [each.result() for each in begun]

    def _begin(self, read: Read, turn: int, window: Window, failed: threading.Event) -> Future[ReadResult]:
        if not read.array.is_remote:
            return self._threads.submit(self._read, read)
        taken = window.take(read.array.decoded_bytes(read.tokens.start, read.tokens.stop), turn)

        def end(future: Future[ReadResult]) -> None:
            window.give(taken)
            if future.cancelled() or future.exception() is not None:
                failed.set()

        try:
            future = self._ahead.submit(self._read, read, together=True)
        except BaseException:
            window.give(taken)
            raise
        future.add_done_callback(end)
        return future

    def _read(self, read: Read, together: bool = False) -> ReadResult:
        """Carry a read out; one that is decoded alone unless `together` with others."""
        # What is decoded is decoded one read at a time: the plan counts the memory of one.
        with nullcontext() if together or read.array.direct else self._decoding:
            begun = clock.now()
            read.array.read_rows(read.batch, read.head, read.tokens.start, read.tokens.stop, read.out)
        self._step()
        if read.counted_for is None:
            return begun, 0
        # A bias of -inf leaves its key out: that is no fault.
        masked = int(np.isneginf(read.out).sum()) if read.array.name == "key_bias" else 0
        return begun, count_not_finite(read.out) - masked
