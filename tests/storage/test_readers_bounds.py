"""Memory that a read takes, and failures that are no damage."""

import errno
import os
import shutil
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numcodecs
import numpy as np
import pytest
import zarr
from stored import V2_CODECS, buffer_for, opened, random_data, same_bits, write
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ZstdCodec

import oocattn.storage.bfloat16  # noqa: F401  registers the data type
from oocattn.errors import IntegrityError
from oocattn.storage.inputs import direct
from oocattn.storage.inputs.codecs import CodecReader
from oocattn.storage.inputs.direct import Reader, read_mapped, read_preadv
from oocattn.storage.inputs.readers import InputArray
from oocattn.storage.layout import ChunkFiles


def tracemalloc_peak(work: Any) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    "storage",
    [
        {"compressors": ZstdCodec()},
        {"compressors": GzipCodec(level=1)},
        {"compressors": BloscCodec()},
        {"serializer": BytesCodec(endian="big")},
        {"chunks": (1, 1, 2**15, 16)},
        {"chunks": (1, 2, 2**14, 64), "compressors": ZstdCodec()},
        {"shards": (1, 1, 2**17, 64)},
        {"shards": (1, 1, 2**17, 64), "compressors": ZstdCodec()},
        {"zarr_format": 2, "compressors": V2_CODECS["blosc"], "filters": [numcodecs.Shuffle(2)]},
        {"zarr_format": 2, "order": "F", "compressors": V2_CODECS["zstd"]},
    ],
)
def test_decoding_stays_within_its_bound(tmp_path: Path, storage: dict[str, Any], remote: bool) -> None:
    data = np.random.default_rng(0).standard_normal((1, 2, 2**17, 64), dtype="f4").astype("f2")  # 32 MiB, incompressible
    if remote:
        fsspec.filesystem("memory").store.clear()
    write("memory://bound" if remote else tmp_path, data, **{"chunks": (1, 1, 2**15, 64), **storage})
    if remote:
        array = InputArray("q", zarr.open_group("memory://bound", mode="r")["q"], "memory://bound")
    else:
        array = opened(tmp_path)
    out = buffer_for(array, 2**17)
    peak = tracemalloc_peak(lambda: array.read_rows(0, 1, 0, 2**17, out))
    assert same_bits(out, data[0, 1])
    assert peak <= array.decode_bytes
    shutil.rmtree(tmp_path)


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
    ways = [array.read_rows, CodecReader(array.array, "dataset").read]
    if array.direct:
        ways.append(partial(read_mapped, ChunkFiles(array.array, tmp_path, "dataset")))
    for read in ways:
        out = buffer_for(array, 20)
        read(0, 1, 5, 25, out)
        assert same_bits(out, data[1, 5:25])


def test_a_chunk_that_shrinks_before_it_is_mapped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data((1, 8, 4))
    write(tmp_path, data, chunks=(1, 8, 4))
    array = opened(tmp_path)
    real = direct.map_file

    def shrink(*arguments: int) -> object:
        os.truncate(tmp_path / "q/c/0/0/0", 10)
        return real(*arguments)

    monkeypatch.setattr(direct, "map_file", shrink)
    with pytest.raises(IntegrityError, match=r"chunk 'c/0/0/0'.* has 10 bytes, expected 64"):
        read_mapped(ChunkFiles(array.array, tmp_path, "dataset"), 0, 0, 0, 8, buffer_for(array, 8))


@pytest.mark.parametrize("read", [read_preadv, read_mapped])
def test_a_chunk_that_cannot_be_read_is_no_evidence_of_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Reader
) -> None:
    write(tmp_path, random_data((1, 8, 4)), chunks=(1, 8, 4))
    array = opened(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("mmap.mmap", refuse)
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(OSError, match=rf"cannot read {tmp_path}/q/c/0/0/0: Input/output error; the disk"):
        read(ChunkFiles(array.array, tmp_path, "dataset"), 0, 0, 0, 8, buffer_for(array, 8))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_chunk_that_there_is_no_room_to_decode_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write(tmp_path, random_data((1, 8, 4)), chunks=(1, 8, 4), compressors=ZstdCodec())
    array = opened(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(zarr.Array, "get_basic_selection", refuse)
    with pytest.raises((MemoryError, OSError), match=r"^$|cannot start a thread: .*ulimit -u"):
        array.read_rows(0, 0, 0, 8, buffer_for(array, 8))
