"""Chunks that are missing, damaged or cannot be read are named, and what cannot be read is not called damaged."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from reading import CODECS, V2_CODECS, buffer_for, decode, opened, random_data, read_files, same_bits, write
from zarr.codecs import ZstdCodec

import oocattn.storage.bfloat16  # noqa: F401  registers the data type
from oocattn.errors import IntegrityError
from oocattn.storage.inputs import direct
from oocattn.storage.inputs.direct import Reader, read_mapped, read_preadv


def chunk_files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "q").rglob("*") if path.is_file() and not path.name.startswith((".z", "zarr")))


@pytest.fixture(params=["preadv", "map", "chunked along D", "zstd", "blosc", "gzip", "sharded", "v2 gzip"])
def reading(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A way to read [1, 1, 64, 8] float16 in four chunks of rows (two shards) under `tmp_path`: (root, read)."""
    storage: dict[str, Any] = {
        "chunked along D": {"chunks": (1, 1, 16, 4)},
        "sharded": {"shards": (1, 1, 32, 8), "compressors": ZstdCodec()},
        "v2 gzip": {"zarr_format": 2, "compressors": V2_CODECS["gzip"]},
    }.get(request.param, {"compressors": CODECS.get(request.param)})
    write(tmp_path, random_data((1, 1, 64, 8)), **{"chunks": (1, 1, 16, 8), **storage})

    def read(start: int, stop: int) -> None:
        array = opened(tmp_path)
        out = buffer_for(array, stop - start)
        if array.direct:
            read_files(read_preadv if request.param == "preadv" else read_mapped, array, 0, 0, start, stop, out)
        else:
            decode(array, 0, 0, start, stop, out)

    return tmp_path, read


def test_a_missing_chunk_is_an_error_and_not_fill_values(reading: Any) -> None:
    root, read = reading
    last = chunk_files(root)[-1]
    last.unlink()
    read(0, 32)
    key = str(last.relative_to(root))
    with pytest.raises(IntegrityError, match=rf"array 'q' of the dataset: .*{key}.* is missing"):
        read(0, 64)


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_truncated_chunk_is_an_error(reading: Any, kept: float) -> None:
    root, read = reading
    last = chunk_files(root)[-1]
    content = last.read_bytes()
    last.write_bytes(content[: int(kept * len(content))])
    read(0, 32)
    rows_of_chunks = str(last.relative_to(root))[:-1]  # of the chunks along D, the message names the first
    with pytest.raises(IntegrityError, match=rf"array 'q' of the dataset: .*{rows_of_chunks}"):
        read(0, 64)


def test_a_damaged_chunk_among_many_is_named(tmp_path: Path) -> None:
    write(tmp_path, random_data((1, 1, 64, 8)), chunks=(1, 1, 16, 8), compressors=ZstdCodec(checksum=True))
    damaged = tmp_path / "q/c/0/0/2/0"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="key 'q/c/0/0/2/0'"):
        opened(tmp_path).read_rows(0, 0, 0, 64, np.empty((64, 8), "float16"))


def test_a_chunk_missing_within_a_shard_is_an_error(tmp_path: Path) -> None:
    data = random_data((1, 1, 56, 8))  # the last shard is partly out of bounds: those chunks may be missing
    written = write(tmp_path, data, chunks=(1, 1, 16, 8), shards=(1, 1, 32, 8), compressors=ZstdCodec())
    opened(tmp_path).read_rows(0, 0, 0, 56, np.empty((56, 8), "float16"))
    written[0, 0, 16:32] = 0  # zarr drops chunks that are all fill value
    array = opened(tmp_path)
    with pytest.raises(IntegrityError, match=r"q/c/0/0/0/0, chunk 0/0/1/0 of the shard.* is missing"):
        array.read_rows(0, 0, 0, 8, np.empty((8, 8), "float16"))
    array.read_rows(0, 0, 32, 56, np.empty((24, 8), "float16"))


@pytest.mark.skipif(not hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"), reason="zarr 3.1 has one pipeline")
def test_the_fused_pipeline_of_zarr_is_no_way_around(tmp_path: Path) -> None:
    data = random_data((1, 1, 64, 8))
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}):
        write(tmp_path, data, chunks=(1, 1, 16, 8), compressors=ZstdCodec())
        out = np.empty((64, 8), "float16")
        opened(tmp_path).read_rows(0, 0, 0, 64, out)
        assert same_bits(out, data[0, 0])
        chunk_files(tmp_path)[1].unlink()
        with pytest.raises(IntegrityError, match="is missing"):
            opened(tmp_path).read_rows(0, 0, 0, 64, out)


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
        read_files(read_mapped, array, 0, 0, 0, 8, buffer_for(array, 8))


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
        read_files(read, array, 0, 0, 0, 8, buffer_for(array, 8))


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
