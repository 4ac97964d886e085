"""The memory-mapped store: Zarr's own store tests, and that its reads are views that outlive their files."""

import errno
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.testing.store import StoreTests

from oocattn.storage.mapped_store import MappedStore


class TestMappedStore(StoreTests[MappedStore, cpu.Buffer]):
    store_cls = MappedStore
    buffer_cls = cpu.Buffer

    async def get(self, store: MappedStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes((store.root / key).read_bytes())

    async def set(self, store: MappedStore, key: str, value: Buffer) -> None:
        (store.root / key).parent.mkdir(parents=True, exist_ok=True)
        (store.root / key).write_bytes(value.to_bytes())

    @pytest.fixture
    def store_kwargs(self, tmp_path: Path) -> dict[str, Any]:
        return {"root": str(tmp_path)}

    def test_store_repr(self, store: MappedStore) -> None:
        assert str(store) == f"file://{store.root.as_posix()}"
        assert repr(store) == f"MappedStore('{store}')"

    def test_store_supports_writes(self, store: MappedStore) -> None:
        assert store.supports_writes

    def test_store_supports_listing(self, store: MappedStore) -> None:
        assert store.supports_listing


@pytest.fixture
def store(tmp_path: Path) -> MappedStore:
    (tmp_path / "chunk").write_bytes(bytes(range(100)))
    return MappedStore(tmp_path)


def test_a_read_is_a_read_only_view_of_the_file(store: MappedStore) -> None:
    buffer = store.get_sync("chunk")
    assert buffer is not None
    view = buffer.as_numpy_array()
    assert not view.flags.owndata
    assert not view.flags.writeable
    with (store.root / "chunk").open("r+b") as file:  # a view sees what is written into its file, a copy does not
        file.write(b"\xff")
    assert view[0] == 0xFF


def test_a_view_outlives_replacement_and_removal_of_its_file(store: MappedStore) -> None:
    buffer = store.get_sync("chunk")
    assert buffer is not None
    (store.root / "new").write_bytes(b"new")
    (store.root / "new").replace(store.root / "chunk")
    assert store.get_sync("chunk").to_bytes() == b"new"  # type: ignore[union-attr]
    (store.root / "chunk").unlink()
    assert buffer.to_bytes() == bytes(range(100))
    assert store.get_sync("chunk") is None


async def test_missing_keys_folders_and_empty_files(store: MappedStore) -> None:
    (store.root / "empty").touch()
    (store.root / "folder").mkdir()
    wanted = [("empty", None), ("folder", None), ("missing", None), ("chunk/below", None), ("chunk", None)]
    found = await store.get_partial_values(default_buffer_prototype(), wanted)
    assert [None if value is None else len(value) for value in found] == [0, None, None, None, 100]


@pytest.mark.parametrize("shards", [None, (1000,)])
def test_reading_many_chunks_needs_few_file_descriptors(tmp_path: Path, shards: tuple[int] | None) -> None:
    data = np.arange(1000, dtype="float32")
    array = zarr.create_array(MappedStore(tmp_path), data=data, chunks=(2,), shards=shards, compressors=None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, hard))
    try:
        np.testing.assert_array_equal(array[2:800], data[2:800])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(params=[errno.ENODEV, errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE])
def unmappable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system, or a limit of this process, that refuses maps."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr("mmap.mmap", refuse)


@pytest.mark.usefixtures("unmappable")
@pytest.mark.parametrize("shards", [None, (1000,)])
def test_files_that_cannot_be_mapped_are_read(tmp_path: Path, shards: tuple[int] | None) -> None:
    data = np.arange(1000, dtype="float32")
    array = zarr.create_array(MappedStore(tmp_path), data=data, chunks=(100,), shards=shards, compressors=None)
    np.testing.assert_array_equal(array[...], data)
    np.testing.assert_array_equal(array[150:153], data[150:153])


@pytest.mark.usefixtures("unmappable")
def test_parts_of_what_cannot_be_mapped(store: MappedStore) -> None:
    for part, expected in (
        (RangeByteRequest(3, 9), slice(3, 9)),
        (RangeByteRequest(90, 200), slice(90, 200)),
        (OffsetByteRequest(95), slice(95, None)),
        (SuffixByteRequest(4), slice(-4, None)),
        (SuffixByteRequest(400), slice(-400, None)),
        (None, slice(None)),
    ):
        assert store.get_sync("chunk", byte_range=part).to_bytes() == bytes(range(100))[expected]  # type: ignore[union-attr]
    assert not store.can_map("")


def test_whether_files_are_mapped_is_told_by_the_metadata(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", data=np.arange(3.0))
    assert MappedStore(tmp_path).can_map("a")
    assert not MappedStore(tmp_path).can_map("b")


def test_files_without_numbers_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size, while the map of the first is held, and of one that is replaced."""
    real = os.fstat

    class NoNumber:
        st_ino = 0

        def __init__(self, descriptor: int) -> None:
            self._status = real(descriptor)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._status, name)

    monkeypatch.setattr(os, "fstat", NoNumber)
    store = MappedStore(tmp_path)
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 100)
    first, second = store.get_sync("a"), store.get_sync("b")
    (tmp_path / "b").replace(tmp_path / "a")
    assert (first.to_bytes(), second.to_bytes()) == (b"a" * 100, b"b" * 100)  # type: ignore[union-attr]
    assert store.get_sync("a").to_bytes() == b"b" * 100  # type: ignore[union-attr]
