"""The lock of a result in an object store, by conditional puts alone."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from oocattn.errors import LockedError, ProblemError
from oocattn.storage.journal import store_lock
from oocattn.storage.journal.store_lock import StoreLock
from oocattn.storage.remote.objects import Objects
from oocattn.storage.remote.store import RemoteStore
from oocattn.storage.results.stored import stored_result

NUMBERS = itertools.count()


def new_objects() -> Objects:
    found = stored_result(f"memory://locks/{next(NUMBERS)}", None).beside
    assert found is not None
    return found


beside = pytest.fixture(new_objects, name="beside")


def test_a_lock_keeps_others_out_while_its_holder_lives(beside: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "BEAT", 0.02)
    with StoreLock(beside, "here") as held:
        with pytest.raises(LockedError, match="is being written by process"):
            StoreLock(beside, "there")
        held.claim.check()
    assert beside.list() == []


def test_a_stale_lock_is_taken_over(beside: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "BEAT", 0.01)
    lost = StoreLock(beside, "there")
    lost._released.set()  # it beats no more
    lost._beating.join()
    with StoreLock(beside, "here") as held:
        held.claim.check()
        with pytest.raises(LockedError, match="was lost to process"):
            lost.claim.check()
    with pytest.raises(LockedError, match="was removed"):
        lost.claim.check()


def test_a_lock_that_is_released_while_another_watches_it_is_no_stale_one(
    beside: Objects, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_lock, "BEAT", 0.05)
    held = StoreLock(beside, "there")
    held._released.set()  # it beats no more: as in the seconds between two
    held._beating.join()
    threading.Timer(0.03, held.__exit__).start()
    with StoreLock(beside, "here") as found:
        assert found.claim.number == 1
    assert "stale" not in caplog.text


def test_a_lock_of_the_same_folder_is_taken_over_at_once(beside: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lock, "BEAT", 1000.0)
    StoreLock(beside, "here")._released.set()
    with StoreLock(beside, "here") as held:
        held.claim.check()


def test_a_put_whose_answer_is_lost_knows_itself(beside: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    create = RemoteStore.create

    async def lose_answer(self: RemoteStore, key: str, content: Any) -> bool:
        return await create(self, key, content) and not key.startswith("lock")

    monkeypatch.setattr(RemoteStore, "create", lose_answer)
    with StoreLock(beside, "here") as held:
        held.claim.check()


def test_a_release_whose_answer_is_lost_leaves_the_next_ones_lock(beside: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    files, tries = beside.store.fs, 0
    remove = files._rm_file

    async def lose_answer(path: str) -> None:
        nonlocal tries
        await remove(path)
        if path.endswith("lock-00000001"):
            tries += 1
            await files._pipe_file(path, b"the next one's")
            raise ConnectionResetError

    with StoreLock(beside, "here"):
        monkeypatch.setattr(files, "_rm_file", lose_answer)
    assert (tries, beside.read("lock-00000001")) == (1, b"the next one's")


@pytest.mark.parametrize("answer", ["unknown", "disregarded"])
def test_a_store_without_conditional_puts_needs_the_callers_word(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = MemoryFileSystem.pipe_file

    def pipe_file(self: Any, path: str, value: Any, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and answer == "unknown":
            raise NotImplementedError("no mode create")
        write(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    objects = new_objects()
    with pytest.raises(ProblemError, match=r"lock='none'"):
        StoreLock(objects, "here")
    assert objects.list() == []
