"""A dataset is found at paths and URLs, in Zarr v2 and v3, and says what is wrong with it before a run finds out."""

import errno
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from oocattn.errors import IntegrityError, ProblemError
from oocattn.problem.arrays import ArraySpec
from oocattn.problem.problem import make_problem
from oocattn.storage.inputs.dataset import Dataset

SHAPE, CHUNKS = (1, 2, 40, 8), (1, 1, 16, 8)
DATA = np.arange(1, 641, dtype="float16").reshape(SHAPE)


def write(store: Any, names: str = "qkv", data: np.ndarray = DATA, **storage: Any) -> zarr.Group:
    """Write a dataset of equal arrays, uncompressed unless asked otherwise."""
    group = zarr.open_group(store, mode="w", zarr_format=storage.pop("zarr_format", 3))
    storage = {"compressors": None, "chunks": CHUNKS[-data.ndim :], **storage}
    for name in names:
        group.create_array(name, shape=data.shape, dtype=data.dtype, **storage)[...] = data
    return group


@pytest.fixture
def memory_url() -> str:
    fsspec.filesystem("memory").store.clear()
    return "memory://folder/dataset.zarr"


def assert_holds_the_data(dataset: Dataset) -> None:
    for array in dataset.arrays.values():
        out = np.empty((40, 8), array.dtype)
        for head in range(2):
            array.read_rows(0, head, 0, 40, out)
            np.testing.assert_array_equal(out, DATA[0, head])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", ["path", "relative", "file URL", "memory URL", "chained URL"])
def test_datasets_open_from_paths_and_urls(
    tmp_path: Path, memory_url: str, monkeypatch: pytest.MonkeyPatch, kind: str, zarr_format: int
) -> None:
    path = tmp_path / "data set.zarr"
    where = memory_url if kind == "memory URL" else path
    write(str(where), zarr_format=zarr_format)
    if kind == "relative":
        monkeypatch.chdir(tmp_path)
        where = path.name
    elif kind == "file URL":
        where = path.as_uri()
    elif kind == "chained URL":
        where = f"zip::{shutil.make_archive(str(tmp_path / 'archived'), 'zip', path)}"
    dataset = Dataset.open(where)
    dataset.check_complete()
    assert_holds_the_data(dataset)
    local = kind in ("path", "relative", "file URL")
    assert all(array.direct == local for array in dataset.arrays.values())
    assert dataset.location == (str(path) if local else str(where))
    assert dataset.specs == tuple(ArraySpec(name, SHAPE, "float16") for name in "qkv")
    monkeypatch.chdir("/")
    assert_holds_the_data(Dataset.open(dataset.location))
    assert_holds_the_data(pickle.loads(pickle.dumps(dataset)))  # as workers in other folders get it


def test_arrays_of_rank_three_are_one_batch(tmp_path: Path) -> None:
    write(tmp_path, data=DATA[0])
    dataset = Dataset.open(tmp_path)
    dataset.check_complete()
    assert dataset.specs[0].four_dimensional == SHAPE
    assert_holds_the_data(dataset)


def test_specs_name_dtypes_as_problems_do_and_leave_judgement_to_them(tmp_path: Path) -> None:
    for dtype in ("float16", "float32", ml_dtypes.bfloat16):
        write(tmp_path, data=DATA.astype(dtype))
        assert make_problem(*Dataset.open(tmp_path).specs).dtype == np.dtype(dtype).name
    for data in (DATA.astype("int8"), DATA.astype("complex64"), DATA[0, 0], DATA[:, :, :0], DATA[None]):
        chunks = tuple(max(1, size) for size in data.shape)
        write(tmp_path, data=data, chunks=chunks)
        with pytest.raises(ProblemError, match="array 'q'"):
            make_problem(*Dataset.open(tmp_path).specs)


def test_a_place_without_a_dataset_is_refused_with_what_was_found(tmp_path: Path, memory_url: str) -> None:
    for nowhere, found in (
        (tmp_path / "none", "nothing"),
        (tmp_path, r"a folder without zarr.json or \.zgroup"),
        ("memory://none", r"neither zarr.json nor \.zgroup"),
        (Path(__file__), "a file"),
    ):
        with pytest.raises(ProblemError, match=rf"no Zarr group at .*\(found {found}\).*q, k and v"):
            Dataset.open(nowhere)
    for where in (str(tmp_path / "partial"), memory_url):
        write(where, names="qv")
        with pytest.raises(ProblemError, match=r"no array 'k' in .*: found \['q', 'v'\]"):
            Dataset.open(where)
    write(tmp_path / "group", names="qk").create_group("v")
    with pytest.raises(ProblemError, match=r"'v' in .* is a group: expected an array"):
        Dataset.open(tmp_path / "group")
    with pytest.raises(ProblemError, match=r"no Zarr group at .*\(found an array\): give the path or URL of a group"):
        Dataset.open(tmp_path / "group" / "q")
    write(tmp_path / "unknown")
    metadata = tmp_path / "unknown/k/zarr.json"
    metadata.write_text(metadata.read_text().replace('"float16"', '"float8_e5m2"'))
    with pytest.raises(ProblemError, match=r"array 'k' of .* cannot be opened: it has dtype float8_e5m2, expected one of"):
        Dataset.open(tmp_path / "unknown")


STORAGE = {
    "plain": {},
    "plain v2": {"zarr_format": 2},
    "nested v2": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "zstd": {"compressors": ZstdCodec()},
    "sharded": {"shards": (1, 1, 32, 8)},
}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("storage", STORAGE.values(), ids=STORAGE)
def test_a_missing_chunk_is_found_and_named(tmp_path: Path, memory_url: str, storage: dict[str, Any], remote: bool) -> None:
    where = memory_url if remote else str(tmp_path)
    group = write(where, **storage)
    dataset = Dataset.open(where)
    dataset.check_complete()
    filesystem, root = fsspec.url_to_fs(where)
    key = "k/" + group["k"].metadata.encode_chunk_key((0, 1, 1, 0))
    filesystem.rm(f"{root}/{key}")
    with pytest.raises(IntegrityError, match=f"array 'k' of {where}: chunk .*{key}.* is missing"):
        dataset.check_complete()


@pytest.mark.parametrize("storage", [{}, {"zarr_format": 2}, {"chunks": (1, 1, 16, 4)}, {"shards": (1, 1, 32, 8)}])
@pytest.mark.parametrize("change", [-1, -200, 1])
def test_a_local_chunk_of_the_wrong_size_is_found(tmp_path: Path, storage: dict[str, Any], change: int) -> None:
    group = write(tmp_path, data=np.random.default_rng(0).random(SHAPE, dtype="f4"), **storage)
    dataset = Dataset.open(tmp_path)
    key = "v/" + group["v"].metadata.encode_chunk_key((0, 1, 0, 0))
    os.truncate(tmp_path / key, (tmp_path / key).stat().st_size + change)
    with pytest.raises(IntegrityError, match=key):
        dataset.check_complete()


@pytest.mark.parametrize("remote", [False, True])
def test_a_chunk_missing_within_a_shard_is_found(tmp_path: Path, memory_url: str, remote: bool) -> None:
    where = memory_url if remote else str(tmp_path)
    group = write(where, shards=(1, 2, 32, 8))
    Dataset.open(where).check_complete()
    group["q"][0, 1, 32:] = 0  # zarr drops chunks that are all fill value
    with pytest.raises(IntegrityError, match=r"array 'q' .*q/c/0/0/1/0, chunk 0/1/0/0 of the shard"):
        Dataset.open(where).check_complete()


def test_the_fingerprint_follows_data_and_layout_alone(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = Dataset.open(tmp_path)
    first = dataset.fingerprint()
    zarr.open_group(tmp_path)["q"].attrs["note"] = "read"
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert Dataset.open(moved).fingerprint() == first
    moved.rename(tmp_path)
    chunk = tmp_path / "v/c/0/0/0/0"
    status = chunk.stat()
    os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    seen = {first, dataset.fingerprint()}
    content, status = bytearray(chunk.read_bytes()), chunk.stat()
    for place in (0, len(content) - 1):  # behind the back of size and time
        content[place] ^= 1
        chunk.write_bytes(content)
        os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns))
        seen.add(dataset.fingerprint())
    for storage in ({"chunks": (1, 1, 8, 8)}, {"compressors": ZstdCodec()}, {"data": DATA.astype("f4")}):
        write(tmp_path, **storage)
        seen.add(Dataset.open(tmp_path).fingerprint())
    assert len(seen) == 7


@pytest.mark.parametrize("remote", [False, True])
def test_a_dataset_without_a_chunk_has_no_fingerprint(tmp_path: Path, memory_url: str, remote: bool) -> None:
    where = memory_url if remote else str(tmp_path)
    group = write(where)
    key = "v/" + group["v"].metadata.encode_chunk_key((0, 1, 1, 0))
    filesystem, root = fsspec.url_to_fs(where)
    filesystem.rm(f"{root}/{key}")
    with pytest.raises(IntegrityError, match=f"array 'v' of {where}: .*{key}.* is missing"):
        Dataset.open(where).fingerprint()


def test_a_remote_fingerprint_needs_metadata_and_a_few_bytes_of_chunks(memory_url: str) -> None:
    write(memory_url)
    first = Dataset.open(memory_url).fingerprint()
    assert Dataset.open(memory_url).fingerprint() == first
    memory = fsspec.filesystem("memory")
    content = bytearray(memory.cat(f"{memory_url}/q/c/0/0/0/0"))
    content[-1] ^= 1
    memory.pipe(f"{memory_url}/q/c/0/0/0/0", bytes(content))
    changed = Dataset.open(memory_url).fingerprint()
    assert changed != first
    write(memory_url, chunks=(1, 1, 8, 8))
    assert Dataset.open(memory_url).fingerprint() != first


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_a_dataset_sent_to_another_process_is_the_same(tmp_path: Path, dtype: Any) -> None:
    write(tmp_path, data=DATA.astype(dtype))
    dataset = Dataset.open(tmp_path)
    out = np.empty((40, 8), dtype)
    dataset.arrays["k"].read_rows(0, 1, 0, 40, out)
    script = """
import pickle, sys
import numpy as np
dataset = pickle.load(sys.stdin.buffer)
array = dataset.arrays["k"]
out = np.empty((40, 8), array.dtype)
array.read_rows(0, 1, 0, 40, out)
print(dataset.fingerprint(), out.astype("float32").sum())
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, input=pickle.dumps(dataset), capture_output=True, check=True).stdout.split()
    assert printed == [dataset.fingerprint().encode(), str(out.astype("float32").sum()).encode()]


def test_the_fingerprint_needs_no_inodes_no_advice_and_no_whole_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every file system has them."""
    write(tmp_path)
    first = Dataset.open(tmp_path).fingerprint(within_run=True)
    look, read, numbers = os.stat, os.pread, itertools.count()

    class OtherNumber:
        def __init__(self, status: os.stat_result) -> None:
            self._status, self.st_ino = status, next(numbers)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._status, name)

    def refuse(*_: object) -> None:
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

    monkeypatch.setattr(os, "stat", lambda *arguments, **options: OtherNumber(look(*arguments, **options)))
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: read(descriptor, min(count, 50), offset))
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert Dataset.open(tmp_path).fingerprint(within_run=True) == first
