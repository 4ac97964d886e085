"""A chunk that has many tiles of keys is decoded once, whatever threads read them, and no more are kept than are counted."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
from in_memory import ArrayInMemory, dataset_of, problem_of
from numpy.typing import NDArray
from support import normal_arrays

from oocattn.errors import IntegrityError
from oocattn.threads import ThreadPool
from oocattn.verification.chunk_cache import ChunkCache, chunk_bytes, most_chunks
from oocattn.verification.recompute import ExactRow, recompute_rows

TOKENS, CHUNK, TILE = 1000, 300, 64


class DecodedInMemory(ArrayInMemory):
    """An array whose chunks are decoded, which takes a while."""

    direct, chunk_rows = False, CHUNK

    def __init__(self, data: NDArray[Any]) -> None:
        super().__init__(data)
        self.extents, self.row_shape, self.dtype = data.shape[:3], data.shape[3:], data.dtype
        self.row_bytes = data.shape[3] * data.itemsize
        self._decoded: list[weakref.ref[NDArray[Any]]] = []
        self.most_kept = 0  # chunks that somebody had at a time

    def read_rows(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        if len(out) > TILE:
            self._decoded.append(weakref.ref(out))
            self.most_kept = max(self.most_kept, sum(ref() is not None for ref in list(self._decoded)))
        time.sleep(0.002)
        super().read_rows(batch, head, start, stop, out)


def decoded_dataset(heads: int = 1) -> tuple[Any, Any]:
    arrays = normal_arrays(TOKENS, heads=heads, kv_heads=heads)
    dataset = dataset_of(arrays)
    for name, array in zip("kv", arrays[1:], strict=True):
        dataset.arrays[name] = DecodedInMemory(array)
    return problem_of(arrays, causal=True), dataset


def rows_of(problem: Any, dataset: Any, threads: int, chunks: int) -> list[ExactRow]:
    options: dict[str, Any] = {"borders": [], "rows": 12, "seed": 0, "key_rows": TILE}
    return list(recompute_rows(problem, dataset, **options, threads=threads, chunks=chunks))


@pytest.mark.parametrize("threads", [1, 3])
def test_each_chunk_is_decoded_once(threads: int) -> None:
    problem, dataset = decoded_dataset()
    problem = problem_of(normal_arrays(TOKENS, heads=1))  # all rows attend all keys: they are one group
    rows_of(problem, dataset, threads, most_chunks(dataset, TILE, threads))
    for name in "kv":
        assert Counter(dataset.arrays[name].read) == Counter(
            range(first, min(first + CHUNK, TOKENS)) for first in range(0, TOKENS, CHUNK)
        )


@pytest.mark.parametrize("chunks", [1, 2, 100])
@pytest.mark.parametrize("threads", [1, 5])
def test_rows_are_the_same_however_many_chunks_are_kept(threads: int, chunks: int) -> None:
    """To the last bit, with several heads and groups of rows."""
    problem, dataset = decoded_dataset(heads=2)
    expected = rows_of(problem, dataset, 1, 0)
    found = rows_of(problem, dataset, threads, chunks)
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert (row.head, row.token, row.lse, row.allowed) == (other.head, other.token, other.lse, other.allowed)
        np.testing.assert_array_equal(row.out, other.out)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_chunks_are_kept_than_are_counted(most: int) -> None:
    """Others are read without, while those that are kept are in use."""
    _, dataset = decoded_dataset(heads=2)
    cache, data = ChunkCache(dataset.arrays, TILE, most), dataset.arrays["k"]
    expected = np.empty((2, TOKENS, 8), np.float32)
    for head in range(2):
        ArrayInMemory.read_rows(data, 0, head, 0, TOKENS, expected[head])

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            start, head = int(random.integers(TOKENS - TILE)), int(random.integers(2))
            out = np.empty((TILE, 8), np.float32)
            cache.read("k", 0, head, range(start, start + TILE), out)
            np.testing.assert_array_equal(out, expected[head, start : start + TILE])

    with ThreadPool(4, "oocattn-test") as pool:
        for found in [pool.submit(read, seed) for seed in range(4)]:
            found.result()
    assert data.most_kept == most


def test_a_chunk_that_cannot_be_decoded_fails_every_read_of_it() -> None:
    _, dataset = decoded_dataset()
    broken, cache = threading.Event(), ChunkCache(dataset.arrays, TILE, 4)
    read = dataset.arrays["k"].read_rows

    def fail(*arguments: Any) -> None:
        if not broken.is_set():
            raise IntegrityError("it is damaged")
        read(*arguments)

    dataset.arrays["k"].read_rows = fail
    out = np.empty((TILE, 8), np.float32)
    for _ in range(3):
        with pytest.raises(IntegrityError):
            cache.read("k", 0, 0, range(TILE), out)
    broken.set()
    cache.read("k", 0, 0, range(TILE), out)


def test_chunks_no_larger_than_a_tile_and_plain_files_are_not_kept() -> None:
    _, dataset = decoded_dataset()
    assert most_chunks(dataset, TILE, 2) == 2 * 2  # of each, those that 128 keys lie in
    assert most_chunks(dataset, TILE, 16) == 2 * 5
    assert chunk_bytes(dataset, TILE) == CHUNK * 8 * 4
    assert (most_chunks(dataset, CHUNK, 2), chunk_bytes(dataset, CHUNK)) == (0, 0)
    assert most_chunks(dataset_of(normal_arrays(TOKENS)), TILE, 2) == 0
