"""What decoding allocates is within the bound that a plan counts, whatever the store, the layout and the codecs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from reading import V2_CODECS, buffer_for, opened, same_bits, write
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.storage import MemoryStore

from oocattn.pipelines.lane.readers import Read, Readers
from oocattn.storage.inputs.ahead import cut_at_multiples
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.given_store import GivenStore
from oocattn.storage.inputs.zarr_source import ZarrSource

TOKENS = 2**15


@cache
def incompressible() -> NDArray[Any]:
    """8 MiB of float16, [B, H, N, D]."""
    return np.random.default_rng(0).standard_normal((1, 2, TOKENS, 64), dtype="f4").astype("f2")


def in_a_folder(folder: Path, data: NDArray[Any], storage: dict[str, Any]) -> zarr.Array[Any]:
    write(folder, data, **storage)
    return opened(folder).array


def behind_a_url(_: Path, data: NDArray[Any], storage: dict[str, Any]) -> zarr.Array[Any]:
    fsspec.filesystem("memory").store.clear()
    write("memory://bound", data, **storage)
    return zarr.open_group("memory://bound", mode="r")["q"]


def in_a_memory_store(_: Path, data: NDArray[Any], storage: dict[str, Any]) -> zarr.Array[Any]:
    store = MemoryStore()
    write(store, data, **storage)
    return zarr.open_group(GivenStore(store), mode="r")["q"]


def in_an_icechunk_session(folder: Path, data: NDArray[Any], storage: dict[str, Any]) -> zarr.Array[Any]:
    icechunk = pytest.importorskip("icechunk")
    if storage.get("zarr_format") == 2:
        pytest.skip("Icechunk stores Zarr 3 alone")
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(folder)))
    session = repository.writable_session("main")
    write(session.store, data, **storage)
    session.commit("written")
    return zarr.open_group(GivenStore(repository.readonly_session("main").store), mode="r")["q"]


STORED: tuple[dict[str, Any], ...] = (
    {"compressors": ZstdCodec()},
    {"compressors": GzipCodec(level=1)},
    {"compressors": BloscCodec()},
    {"chunks": (1, 1, 2**13, 16)},
    {"chunks": (1, 2, 2**12, 64), "compressors": ZstdCodec()},
    {"shards": (1, 1, 2**15, 64)},
    {"shards": (1, 1, 2**15, 64), "compressors": ZstdCodec()},
    {"zarr_format": 2, "compressors": V2_CODECS["blosc"], "filters": [numcodecs.Shuffle(2)]},
    {"zarr_format": 2, "order": "F", "compressors": V2_CODECS["zstd"]},
    {"layout": "bnhd", "chunks": (1, 2**12, 2, 64), "compressors": ZstdCodec()},
    {"layout": "bnhd", "chunks": (1, 2**12, 2, 64), "shards": (1, 2**15, 2, 64), "compressors": ZstdCodec()},
    {"layout": "bnhd", "chunks": (1, 2**12, 1, 64), "shards": (1, 2**14, 2, 64)},
)


@pytest.mark.parametrize("keep", [in_a_folder, behind_a_url, in_a_memory_store, in_an_icechunk_session])
@pytest.mark.parametrize("storage", STORED)
def test_decoding_stays_within_its_bound(tmp_path: Path, storage: dict[str, Any], keep: Callable[..., Any]) -> None:
    data, storage = incompressible(), {"chunks": (1, 1, 2**13, 64), **storage}
    interleaved = storage.get("layout") == "bnhd"
    if interleaved:
        del storage["layout"]
    array = keep(tmp_path, data.transpose(0, 2, 1, 3) if interleaved else data, storage)
    source = ZarrSource("q", array, "the dataset", axes=Axes("bnhd" if interleaved else "bhnd"))
    outs = [buffer_for(source, TOKENS) for _ in range(2)]
    for read, expected in (
        (lambda: source.read_rows(0, 1, 0, TOKENS, outs[1]), data[0, 1:]),
        (lambda: source.read_heads(0, range(2), 0, TOKENS, outs), data[0]),
    ):
        outs[1][:] = 0
        tracemalloc.start()
        try:
            read()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= source.decode_bytes
        assert same_bits(np.stack(outs[-len(expected) :]), expected)


@pytest.mark.parametrize("keep", [behind_a_url, in_a_memory_store])
@pytest.mark.parametrize("storage", STORED)
def test_reading_ahead_stays_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: dict[str, Any], keep: Callable[..., Any]
) -> None:
    monkeypatch.setattr("oocattn.storage.inputs.source.AHEAD_BYTES", 1 << 20)
    data, storage = incompressible(), {"chunks": (1, 1, 2**13, 64), **storage}
    axes = Axes(storage.pop("layout", "bhnd"))
    source = ZarrSource(
        "q", keep(tmp_path, data if axes.order == "bhnd" else data.transpose(0, 2, 1, 3), storage), "it", axes=axes
    )
    out, ahead = np.zeros((2, TOKENS, 64), source.dtype), 1 << 20
    reads = [
        Read(source, 0, head, part, out[head, part.start : part.stop], None)
        for head in range(2)
        for part in cut_at_multiples(range(TOKENS), source.ahead_rows)
    ]
    readers = Readers(1, ahead, lambda: None)
    tracemalloc.start()
    try:
        readers.carry_out(reads)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        readers.close()
    assert peak <= source.decode_bytes_ahead(ahead)
    assert same_bits(out, data[0])
