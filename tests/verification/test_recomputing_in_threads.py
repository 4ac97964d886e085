"""Rows in float64 are the same to the last bit whatever threads take tiles of their keys, in whatever order these end."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from in_memory import ArrayInMemory, dataset_of, problem_of
from support import Arrays, normal_arrays

from oocattn.errors import IntegrityError
from oocattn.problem.problem import Problem
from oocattn.verification import recompute
from oocattn.verification.groups import RowGroup
from oocattn.verification.recompute import AHEAD, ExactRow, recompute_rows
from oocattn.verification.softmax import Tile, most_borders

KEYS = 700

Made = tuple[Arrays, np.ndarray | None, dict[str, Any]]


def many_heads() -> Made:
    return normal_arrays(KEYS, heads=6, kv_heads=3, batch=2), None, {"causal": True, "window_size": (300, 0)}


def few_queries() -> Made:
    """All rows attend all keys, some of which are equal."""
    (q, _, _), (_, k, v) = normal_arrays(20, heads=1), normal_arrays(KEYS, heads=1, seed=1)
    k[0, 0, ::3] = k[0, 0, :1]
    return (q, k, v), None, {}


def every_term() -> Made:
    """With NaN and Inf in values, and keys that a bias shuts."""
    q, k, v = normal_arrays(KEYS, heads=4, kv_heads=2)
    v[0, 0, 300, 2], v[0, 1, 500, 1] = np.nan, np.inf
    bias = np.random.default_rng(0).standard_normal((1, 4, KEYS), np.float32)
    bias[0, 0, 100:400] = -np.inf
    asked = {"softcap": 5.0, "alibi_slopes": [0.1, 0.0, -0.1, 1.0], "learnable_sink": [-9.0, 0.0, 9.0, 1.0]}
    return (q, k, v), bias, {"window_size": (600, 3), "sink_tokens": 4, **asked}


def documents() -> Made:
    """Each with keys of its own, some with none."""
    edges = np.arange(0, KEYS + 1, 35)
    of_keys = np.append(np.maximum(edges[:-1] - 35, 0), KEYS)
    return normal_arrays(KEYS, heads=2, kv_heads=2), None, {"cu_seqlens_q": edges, "cu_seqlens_k": of_keys}


def problem_and_data(made: Made) -> tuple[Problem, Any]:
    arrays, bias, asked = made
    return problem_of(arrays, bias, **asked), dataset_of(arrays, bias)


def rows_of(problem: Problem, dataset: Any, threads: int, key_rows: int = 64, rows: int = 100) -> list[ExactRow]:
    options: dict[str, Any] = {"borders": [], "rows": rows, "seed": 0, "weight_roundoff": 2.0**-11}
    return list(recompute_rows(problem, dataset, **options, key_rows=key_rows, threads=threads))


def numbers(row: ExactRow) -> list[float]:
    return [*row.out.tolist(), row.lse, row.size, row.allowed, row.allowed_lse]


@pytest.fixture
def slow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of which every third takes long: tiles end in another order than they begin."""
    count, read = itertools.count(), ArrayInMemory.read_rows

    def read_slowly(self: ArrayInMemory, batch: int, head: int, start: int, stop: int, out: Any) -> None:
        if stop - start > 1:
            time.sleep(0.004 if next(count) % 3 == 0 else 0)
        read(self, batch, head, start, stop, out)

    monkeypatch.setattr(ArrayInMemory, "read_rows", read_slowly)


@pytest.mark.usefixtures("slow_reads")
@pytest.mark.parametrize("threads", [2, 5, 16])
@pytest.mark.parametrize("make", [many_heads, few_queries, every_term, documents])
def test_several_threads_find_the_same_rows_in_the_same_order(make: Callable[[], Made], threads: int) -> None:
    problem, dataset = problem_and_data(make())
    expected, found = (rows_of(problem, dataset, count) for count in (1, threads))
    assert len(found) == len(expected) > 15
    for row, other in zip(found, expected, strict=True):
        assert (row.batch, row.head, row.token, row.strata) == (other.batch, other.head, other.token, other.strata)
        np.testing.assert_array_equal(numbers(row), numbers(other))


@pytest.mark.parametrize("name", ["k", "v"])
def test_all_threads_work_for_rows_that_share_keys(name: str) -> None:
    """Keys are read by three threads at a time, and so are values."""
    problem, dataset = problem_and_data(few_queries())
    together, read = threading.Barrier(3, timeout=30), dataset.arrays[name].read_rows

    def read_together(*arguments: Any) -> None:
        together.wait()
        read(*arguments)

    dataset.arrays[name].read_rows = read_together
    assert len(rows_of(problem, dataset, 3, key_rows=KEYS // 6 + 1)) == 20


@pytest.mark.parametrize("threads", [1, 3])
def test_keys_that_cannot_be_read_end_it(threads: int) -> None:
    """No thread waits for the keys before its own."""
    problem, dataset = problem_and_data(few_queries())
    read = dataset.arrays["k"].read_rows

    def fail(batch: int, head: int, start: int, *rest: Any) -> None:
        if start == 128:
            time.sleep(0.3)  # meanwhile others have begun with the keys after these
            raise IntegrityError("a chunk is missing")
        read(batch, head, start, *rest)

    dataset.arrays["k"].read_rows = fail
    with pytest.raises(IntegrityError, match="a chunk is missing"):
        rows_of(problem, dataset, threads)
    wait_until_none(threading.enumerate)


def wait_until_none(list_threads: Callable[[], list[threading.Thread]]) -> None:
    """Wait until no thread recomputes any more."""
    until = time.monotonic() + 30
    while any(thread.name.startswith("oocattn-recompute") for thread in list_threads()):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_few_groups_of_rows_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, dataset = problem_and_data(documents())
    live: weakref.WeakSet[RowGroup] = weakref.WeakSet()
    most, made = 0, 0

    def count(*arguments: Any) -> RowGroup:
        nonlocal most, made
        group = RowGroup(*arguments)
        live.add(group)
        most, made = max(most, len(live)), made + 1
        return group

    monkeypatch.setattr(recompute, "RowGroup", count)
    monkeypatch.setattr(recompute, "GROUP_ROWS", 1)
    rows_of(problem, dataset, 2)
    assert made > 50
    assert most <= 2 * AHEAD + 2


def check_any_tile(problem: Problem, dataset: Any) -> list[ExactRow]:
    whole = rows_of(problem, dataset, 1, key_rows=8192)
    for key_rows in (1, 7, 64, 500):
        for row, expected in zip(rows_of(problem, dataset, 3, key_rows), whole, strict=True):
            np.testing.assert_allclose(numbers(row), numbers(expected), rtol=1e-9, atol=1e-14)
    return whole


def test_keys_are_repeated_whatever_tiles_they_come_in() -> None:
    """What may be lost is more for that, and the same."""
    (q, k, v), _, _ = few_queries()
    k[0, 0, ::2] = k[0, 0, :1]
    problem, dataset = problem_and_data(((q, k, v), None, {}))
    repeated = check_any_tile(problem, dataset)
    k[0, 0] *= 1 + 1e-6 * np.arange(KEYS)[:, None]
    different = rows_of(problem, dataset_of((q, k, v)), 1, key_rows=8192)
    assert np.median([row.allowed / other.allowed for row, other in zip(repeated, different, strict=True)]) > 2


@pytest.mark.parametrize("first", [1e-3, 1.0, 3.0], ids=["rising", "even", "falling"])
def test_partial_sums_are_taken_at_the_same_keys_whatever_tiles_they_come_in(first: float) -> None:
    """Values cancel in the end: what their partial sums may lose is most of what is allowed."""
    (q, k, v), _, _ = few_queries()
    q, k = np.abs(q), np.abs(k) * np.geomspace(first, 1, KEYS, dtype=np.float32)[:, None]
    v = np.where(np.arange(KEYS) < KEYS / 2, 1, -1).astype(np.float32)[:, None] * np.ones_like(v)
    problem, dataset = problem_and_data(((q, k, v), None, {"learnable_sink": [0.3]}))
    check_any_tile(problem, dataset)


def test_borders_of_a_tile_are_at_most_as_many_as_are_counted() -> None:
    random = np.random.default_rng(0)
    assert sum(ends for _, ends in Tile(0, 0, 8192, 0).steps()) == most_borders(8192) - 1
    for _ in range(500):
        seen, keys = (int(2 ** random.uniform(0, 16)) - 1 for _ in range(2))
        found = list(Tile(3, 5, 5 + keys, seen).steps())
        assert [part.start for part, _ in found] == [0, *(part.stop for part, _ in found)][: len(found)]
        assert sum(ends for _, ends in found) <= most_borders(keys)
