"""Rows read by every way equal what plain zarr reads, to the bit; a chunk that is missing or damaged is an error."""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import CODECS, V2_CODECS, buffer_for, decode, opened, random_data, read_files, same_bits, write
from zarr.codecs import BytesCodec, ZstdCodec

import oocattn.storage.bfloat16  # noqa: F401  registers the data type
from oocattn.storage.inputs.direct import TRIAL_BYTES, TRIALS, FastestReader, Reader, read_mapped, read_preadv
from oocattn.storage.inputs.parts import Together


@st.composite
def stored_arrays(draw: st.DrawFn, plain: bool, row_rank: int) -> tuple[np.ndarray, dict[str, Any]]:
    """An array with batch or without and a way to store it; `plain`: neither encoded nor sharded nor chunked along D."""
    sizes = [st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)][draw(st.integers(0, 1)) :]
    shape = tuple(draw(size) for size in (*sizes, *[st.integers(1, 6)] * row_rank))
    chunks = [draw(st.integers(1, size)) for size in shape]
    if plain and row_rank:
        chunks[-1] = shape[-1]
    zarr_format = draw(st.sampled_from([2, 3]))
    data = random_data(shape, draw(st.sampled_from(["float16", "float32", *(["bfloat16"] * (zarr_format == 3))])))
    codec = "none" if plain else draw(st.sampled_from(list(CODECS)))
    order, separator = draw(st.sampled_from(["little", "big"])), draw(st.sampled_from("./"))
    storage: dict[str, Any] = {"chunks": tuple(chunks), "zarr_format": zarr_format}
    if zarr_format == 2:
        data = data.astype(data.dtype.newbyteorder(order))
        storage |= {"compressors": V2_CODECS[codec], "order": "C" if plain else draw(st.sampled_from("CF"))}
        storage |= {"chunk_key_encoding": {"name": "v2", "separator": separator}}
    else:
        storage |= {"compressors": CODECS[codec], "serializer": BytesCodec(endian=order)}
        storage |= {"chunk_key_encoding": {"name": "default", "separator": separator}}
        if not plain and draw(st.booleans()):
            storage["shards"] = tuple(chunk * draw(st.integers(1, 3)) for chunk in chunks)
    return data, storage


@pytest.mark.parametrize(("name", "row_rank"), [("q", 1), ("key_bias", 0)])
@pytest.mark.parametrize("plain", [True, False])
@settings(max_examples=40, deadline=None)
@given(choice=st.data())
def test_every_way_reads_what_plain_zarr_reads(name: str, row_rank: int, plain: bool, choice: st.DataObject) -> None:
    data, storage = choice.draw(stored_arrays(plain, row_rank))
    with tempfile.TemporaryDirectory() as folder:
        write(folder, data, name, **storage)
        array = opened(Path(folder), name)
        batches, heads, tokens = array.extents
        batch, head = choice.draw(st.integers(0, batches - 1)), choice.draw(st.integers(0, heads - 1))
        start = choice.draw(st.integers(0, tokens - 1))
        stop = choice.draw(st.integers(start + 1, tokens))
        stored = zarr.open_group(folder, mode="r")[name][...]
        expected = stored.reshape(*array.extents, *array.row_shape)[batch, head, start:stop].astype(array.dtype)
        ways = [partial(decode, array), array.read_rows]
        if array.direct:
            ways += [partial(read_files, read, array) for read in (read_preadv, read_mapped)]
        for read in ways:
            out = buffer_for(array, stop - start)
            read(batch, head, start, stop, out)
            assert same_bits(out, expected)


@pytest.mark.parametrize("read", [read_preadv, read_mapped])
def test_heads_that_share_a_chunk_file_are_told_apart(tmp_path: Path, read: Reader) -> None:
    data = random_data((3, 4, 40, 8))
    write(tmp_path, data, chunks=(2, 3, 16, 8))
    array = opened(tmp_path)
    for batch, head in np.ndindex(3, 4):
        out = np.empty((30, 8), "float16")
        read_files(read, array, batch, head, 5, 35, out)
        assert same_bits(out, data[batch, head, 5:35])


@pytest.mark.parametrize(
    ("storage", "description"),
    [
        ({}, "uncompressed, read directly"),
        ({"zarr_format": 2}, "uncompressed, read directly"),
        ({"chunks": (2, 2, 16, 8)}, "uncompressed, read directly"),
        ({"compressors": ZstdCodec()}, "zstd-compressed: read through Zarr's codecs"),
        ({"zarr_format": 2, "compressors": {"id": "gzip", "level": 1}}, "gzip-compressed: read through Zarr's codecs"),
        ({"compressors": ZstdCodec(), "shards": (1, 1, 32, 8)}, "zstd-compressed, sharded: read through Zarr's codecs"),
        ({"serializer": BytesCodec(endian="big")}, "uncompressed, read directly"),
        ({"zarr_format": 2, "order": "F"}, "column-major: read through Zarr's codecs"),
        ({"chunks": (1, 2, 16, 4)}, "chunked along D, 2 heads to a chunk: read through Zarr's codecs"),
    ],
)
def test_the_description_says_how_an_array_is_read(tmp_path: Path, storage: dict[str, Any], description: str) -> None:
    write(tmp_path, random_data((2, 2, 40, 8)), **{"chunks": (1, 1, 16, 8), **storage})
    array = opened(tmp_path)
    assert array.describe() == description
    assert array.direct == (description == "uncompressed, read directly")
    assert array.reader == ("preadv" if array.direct else "zarr")
    assert (array.decode_bytes == 0) == array.direct
    assert array.chunk_rows == 16


def test_rows_and_buffers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path, random_data((1, 2, 64, 8)), chunks=(1, 1, 16, 8))
    array = opened(tmp_path)
    read_only = np.empty((4, 8), "float16")
    read_only.flags.writeable = False
    for out in (
        np.empty((5, 8), "float16"),
        np.empty((4, 8), "float32"),
        np.empty((4, 8), "float16", order="F"),
        np.empty((4, 16), "float16")[:, ::2],
        read_only,
    ):
        with pytest.raises(ValueError, match=r"buffer of .*'q'.*expected float16 \[4, 8\]"):
            array.read_rows(0, 0, 0, 4, out)
    for rows in ((1, 0, 0, 4), (0, 2, 0, 4), (0, 0, 61, 65), (0, 0, -1, 3), (0, 0, 4, 4)):
        with pytest.raises(ValueError, match="2 heads and 64 tokens"):
            array.read_rows(*rows, np.empty((4, 8), "float16"))


def test_threads_share_an_array(tmp_path: Path) -> None:
    data = random_data((1, 4, 4096, 8))
    write(tmp_path, data, chunks=(1, 1, 512, 8))
    write(tmp_path, data, name="k", chunks=(1, 1, 512, 8), compressors=ZstdCodec(), shards=(1, 1, 1024, 8))
    arrays = [opened(tmp_path), opened(tmp_path, "k")]
    wrong = []

    def work(head: int) -> None:
        for array in arrays * 5:
            out = buffer_for(array, 4000)
            array.read_rows(0, head, 50, 4050, out)
            if not same_bits(out, data[0, head, 50:4050]):
                wrong.append(head)

    threads = [threading.Thread(target=work, args=(head,)) for head in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def slowed(read: Reader, seconds: float) -> Reader:
    def slow(wanted: Sequence[Together]) -> None:
        read(wanted)
        time.sleep(seconds)

    return slow


@pytest.mark.parametrize(("preadv_seconds", "map_seconds", "expected"), [(0.05, 0, "map"), (0, 0.05, "preadv")])
def test_the_faster_reader_is_learned_from_large_reads(
    tmp_path: Path, preadv_seconds: float, map_seconds: float, expected: str
) -> None:
    rows = TRIAL_BYTES // 128
    data = random_data((1, 1, rows, 64))
    write(tmp_path, data, chunks=(1, 1, rows // 4, 64))
    readers = {"preadv": slowed(read_preadv, preadv_seconds), "map": slowed(read_mapped, map_seconds)}
    fastest = FastestReader(readers["preadv"], readers["map"])
    array = opened(tmp_path)
    out = np.empty((rows, 64), "float16")
    for _ in range(20):
        read_files(fastest.read, array, 0, 0, 0, 64, out[:64])
    assert fastest.learned is None
    for _ in range(2 * TRIALS):
        out[:] = 0
        read_files(fastest.read, array, 0, 0, 0, rows, out)
        assert same_bits(out, data[0, 0])
    assert fastest.learned is readers[expected]
    read_files(fastest.read, array, 0, 0, 0, rows, out)
    assert same_bits(out, data[0, 0])


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOMEM])
@pytest.mark.parametrize("compressor", [None, ZstdCodec()], ids=["plain", "zstd"])
def test_files_that_cannot_be_mapped_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, compressor: ZstdCodec | None
) -> None:
    data = random_data((2, 30, 4))
    write(tmp_path, data, chunks=(1, 8, 4), compressors=compressor)
    array = opened(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("mmap.mmap", refuse)
    ways = [array.read_rows, partial(decode, array)]
    if array.direct:
        ways.append(partial(read_files, read_mapped, array))
    for read in ways:
        out = buffer_for(array, 20)
        read(0, 1, 5, 25, out)
        assert same_bits(out, data[1, 5:25])
