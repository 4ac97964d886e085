"""What is made durably is on disk down from the first folder that was there, as far as the file system can."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from oocattn.storage.files import operations
from oocattn.storage.files.durable import make_durably, page_aligned, sync, write_durably, write_text
from oocattn.storage.files.regular import read_file


def test_every_folder_that_gets_an_entry_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("oocattn.storage.files.durable.sync", synced.append)
    make_durably(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    synced.clear()
    make_durably(tmp_path / "a" / "b" / "c")
    assert synced == []


def answering(number: int, wanted: Callable[[str], bool] = lambda path: True) -> Callable[[int], None]:
    """An fsync that answers so for what is open at the paths that are wanted."""

    def call(descriptor: int) -> None:
        if wanted(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_said", set())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EISDIR, errno.EBADF])
def test_a_folder_that_cannot_be_synced_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, answering(number, os.path.isdir))
    for place in (tmp_path / "a", tmp_path / "b"):
        place.mkdir()
        for _ in range(3):
            write_text(place / "file", "text")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/a: this file system does not sync folders ({os.strerror(number)}): a power cut may cost what was "
        "written last; after one, resume with check_finished=True, and verify the result"
    ]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR])
def test_a_folder_that_cannot_be_opened_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *arguments: int, **options: int) -> int:
        if os.path.isdir(path) and not flags & os.O_PATH:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    write_text(tmp_path / "file", "text")
    sync(tmp_path)
    assert (tmp_path / "file").read_text() == "text"
    assert caplog.text.count("does not sync folders") == 1


def test_fdatasync_is_tried_where_fsync_is_unsupported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", answering(errno.EINVAL))
    write_text(tmp_path / "file", "text")
    assert caplog.text == ""


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("wanted", [os.path.isdir, os.path.isfile], ids=["folder", "file"])
def test_data_that_may_be_lost_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, wanted: Callable[[str], bool]
) -> None:
    (tmp_path / "there").touch()
    monkeypatch.setattr(os, "fsync", answering(number, wanted))
    with pytest.raises(OSError, match=rf"cannot sync {tmp_path}(/file)?: {os.strerror(number)}; ") as failure:
        write_text(tmp_path / "file", "text")
    assert failure.value.errno == number
    with pytest.raises(OSError, match=rf"cannot sync {tmp_path}"):
        sync(tmp_path / "there" if wanted is os.path.isfile else tmp_path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_that_cannot_be_extended_is_filled_with_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "ftruncate", refuse)
    write_durably(tmp_path / "file", [np.arange(3, dtype=np.uint8)], 10_000)
    assert (tmp_path / "file").read_bytes() == bytes([0, 1, 2]) + bytes(9_997)


def test_writes_and_reads_may_do_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, offset: write(descriptor, content[:100], offset))
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: read(descriptor, min(count, 70), offset))
    content = np.random.default_rng(0).integers(0, 256, 12_345, np.uint8)
    write_durably(tmp_path / "file", [content[:8192], content[8192:]])
    assert read_file(tmp_path / "file", 1 << 20) == content.tobytes()


@pytest.mark.parametrize("shape", [(2, 3, 1024), (5,)])
def test_memory_for_an_array_begins_on_a_page_and_is_written_as_any_other(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = page_aligned(shape, "int64")
    assert (array.shape, array.dtype, array.ctypes.data % mmap.PAGESIZE) == (shape, np.dtype("int64"), 0)
    array[...] = np.arange(array.size).reshape(shape)
    assert write_durably(tmp_path / "file", [array]) == array.nbytes
    assert (tmp_path / "file").read_bytes() == np.arange(array.size).tobytes()


def test_a_write_that_does_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/file: nothing is written"):
        write_text(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_be_longer_than_its_file_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5000)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda descriptor: os.stat_result([*real(descriptor)[:6], 0, *real(descriptor)[7:10]]))
    assert read_file(tmp_path / "file", 5000) == b"x" * 5000
