"""The threads that read for a lane: what is under way at a time, in which order, and how failures end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from oocattn.pipelines.lane.readers import Read, Readers
from oocattn.storage.inputs.ahead import cut_at_multiples


class Rows:
    """Rows of a store that lets each read wait; a token is 100 bytes decoded. It notes what is under way."""

    name, of_all_batches, ahead_rows = "q", False, 10

    def __init__(self, is_remote: bool = True, fails_at: int = -1, *, direct: bool = False) -> None:
        self.is_remote, self._fails_at, self.direct = is_remote, fails_at, direct
        self._changing = threading.Lock()
        self.under_way = self.most = 0
        self.order: list[int] = []

    def decoded_bytes(self, start: int, stop: int) -> int:
        return 100 * (stop - start)

    def read_rows(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        with self._changing:
            self.order.append(start)
            self.under_way += stop - start
            self.most = max(self.most, self.under_way)
        time.sleep(0.02)
        with self._changing:
            self.under_way -= stop - start
        if start == self._fails_at:
            raise OSError("broken")
        out[:] = range(start, stop)


def reads_of(rows: Rows, tokens: int) -> tuple[list[Read], NDArray[np.float32]]:
    """Reads of ten tokens each, and where they go."""
    out = np.zeros(tokens, np.float32)
    parts = cut_at_multiples(range(tokens), rows.ahead_rows)
    return [Read(rows, 0, 0, part, out[part.start : part.stop], 0) for part in parts], out


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_direct_reads_are_shared_out_and_none_begins_after_one_has_failed(threads: int) -> None:
    for fails_at in (-1, 70):
        rows = Rows(False, fails_at, direct=True)
        reads, out = reads_of(rows, 200)
        readers = Readers(threads, ahead=0, step=lambda: None)
        if fails_at < 0:
            assert [not_finite for _, not_finite in readers.carry_out(reads)] == [0] * 20
            np.testing.assert_array_equal(out, np.arange(200))
            assert rows.most == 10 * threads
        else:
            with pytest.raises(OSError, match="broken"):
                readers.carry_out(reads)
            assert rows.under_way == 0  # all that had begun have ended
            assert len(rows.order) <= 8 + threads
        readers.close()


def test_of_direct_reads_that_fail_the_first_is_told() -> None:
    class Failing(Rows):
        def read_rows(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
            time.sleep(0.02 if start == 0 else 0)
            raise OSError(f"broken at {start}")

    reads, _ = reads_of(Failing(False, direct=True), 200)
    readers = Readers(4, ahead=0, step=lambda: None)
    with pytest.raises(OSError, match="broken at 0"):
        readers.carry_out(reads)
    readers.close()


def test_reads_of_a_store_that_waits_fill_the_window_and_no_more() -> None:
    rows = Rows()
    reads, out = reads_of(rows, 200)
    readers = Readers(1, ahead=5000, step=lambda: None)
    found = readers.carry_out(reads)
    readers.close()
    assert rows.most == 50
    np.testing.assert_array_equal(out, np.arange(200))
    assert [not_finite for _, not_finite in found] == [0] * 20


def test_a_read_larger_than_the_window_is_alone() -> None:
    rows = Rows()
    reads, _ = reads_of(rows, 50)
    readers = Readers(1, ahead=1, step=lambda: None)
    readers.carry_out(reads)
    readers.close()
    assert rows.most == 10


@pytest.mark.parametrize(("is_remote", "ahead"), [(True, 0), (False, 10**6)])
def test_other_reads_are_decoded_one_at_a_time(is_remote: bool, ahead: int) -> None:
    rows = Rows(is_remote)
    reads, _ = reads_of(rows, 50)
    readers = Readers(8, ahead, step=lambda: None)
    readers.carry_out(reads)
    readers.close()
    assert rows.most == 10


def test_reads_of_an_earlier_turn_begin_before_those_that_wait_already() -> None:
    rows = Rows()
    readers = Readers(1, ahead=1000, step=lambda: None)
    first, later = reads_of(rows, 60)[0], [read for read in reads_of(rows, 160)[0] if read.tokens.start >= 60]
    with ThreadPoolExecutor(2) as pool:
        two = pool.submit(readers.carry_out, later, 1)
        while not rows.order:
            time.sleep(0.001)
        one = pool.submit(readers.carry_out, first, 0)
        one.result()
        assert not two.done()
    readers.close()
    assert rows.order.index(50) < 6 + 3  # but for those of the later turn that had begun
    assert sorted(rows.order) == [*range(0, 160, 10)]


def test_a_failure_is_raised_when_no_read_is_under_way_and_begins_no_others() -> None:
    rows = Rows(fails_at=20)
    reads, _ = reads_of(rows, 1000)
    readers = Readers(1, ahead=3000, step=lambda: None)
    with pytest.raises(OSError, match="broken"):
        readers.carry_out(reads)
    assert rows.under_way == 0
    assert len(rows.order) < 20
    readers.close()


def test_the_reads_of_the_next_subproblem_begin_while_the_last_of_this_one_are_under_way() -> None:
    rows = Rows()
    readers = Readers(1, ahead=3000, step=lambda: None)
    first, second = reads_of(rows, 60)[0], [read for read in reads_of(rows, 120)[0] if read.tokens.start >= 60]
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(readers.carry_out, first)
        while not rows.order:
            time.sleep(0.001)
        two = pool.submit(readers.carry_out, second, 1)
        ends = max(begun for begun, _ in one.result()), min(begun for begun, _ in two.result())
    readers.close()
    assert max(rows.order.index(read.tokens.start) for read in first) < 8  # in their order, but for those of one moment
    assert 0 <= ends[1] - ends[0] < 0.02 * 2
    assert rows.most == 30
