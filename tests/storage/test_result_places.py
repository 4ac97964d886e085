"""Results in stores next to something else: other runs' job state, inputs, runs that lost their lock."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from interrupting import EnoughError, interrupt
from support import carry_out, plan_for, replanned

import oocattn
from oocattn.errors import IntegrityError, LockedError, ProblemError, RemoteError, ResultExistsError
from oocattn.planning.memory import ALIGNMENT
from oocattn.storage.inputs.zarr_nodes import open_node
from oocattn.storage.journal import store_lock
from oocattn.storage.journal.journal import Journal
from oocattn.storage.journal.store_lock import StoreLock
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.chunk_objects import ChunkObjects
from oocattn.storage.results.growing import RunState, is_untidy
from oocattn.storage.results.marks import read_mark
from oocattn.storage.results.stored import stored_result
from oocattn.storage.zarr_compat import StorePath

ASKED: dict[str, Any] = {"kernel": "cpu", "engine": "inline", "chunks": 3, "host_memory": "64MiB"}

NUMBERS = itertools.count()

pytestmark = pytest.mark.usefixtures("here")


def test_a_run_begun_in_a_folder_is_not_removed_by_a_resume_from_the_store(dataset: Path, here: Path) -> None:
    url = f"memory://places/r{next(NUMBERS)}.zarr"
    with pytest.raises(EnoughError):
        carry_out(plan_for(dataset, chunks=3), dataset, ResultPaths.at(url), callbacks=[interrupt("written", 1)])
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    assert before
    with pytest.raises(ProblemError, match="no run to resume from here"):
        oocattn.resume(url, scratch="store", engine="inline")
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()} == before
    oocattn.resume(url, engine="inline")


@pytest.mark.parametrize("scratch", [None, "store"])
def test_a_run_that_ended_before_its_journal_was_there_is_begun_anew(
    dataset: Path, here: Path, scratch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://places/r{next(NUMBERS)}.zarr"

    def fail(*_: Any) -> None:
        raise EnoughError

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "begin", fail)
        with pytest.raises(EnoughError):
            oocattn.attention(dataset, url, scratch=scratch, **ASKED)
    assert read_mark(ResultPaths.at(url, scratch)) is not None
    assert oocattn.status(url, scratch=scratch).state == "none"
    with pytest.raises(ProblemError, match="no run to resume; begin one"):
        oocattn.resume(url, scratch=scratch, engine="inline")
    oocattn.attention(dataset, url, scratch=scratch, **ASKED)
    assert not list(here.iterdir())


@pytest.mark.parametrize("scratch", [None, "store"])
@pytest.mark.parametrize("step", ["_remove_journal", "_throw_away"])
def test_a_run_that_was_killed_while_it_tidied_up_is_finished(
    dataset: Path, here: Path, scratch: str | None, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://places/r{next(NUMBERS)}.zarr"
    before = getattr(RunState, step)

    def fail_once_published(self: RunState, *arguments: Any) -> None:
        if self.paths.is_taken():
            raise EnoughError
        before(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, step, fail_once_published)
        with pytest.raises(EnoughError):
            oocattn.attention(dataset, url, scratch=scratch, **ASKED)
    assert ResultPaths.at(url, scratch).is_taken()
    assert oocattn.status(url, scratch=scratch).state == "finished"
    oocattn.resume(url, scratch=scratch, engine="inline")
    assert not list(here.iterdir())
    assert not is_untidy(ResultPaths.at(url, scratch))


def test_a_late_chunk_of_a_run_that_lost_its_lock_does_not_replace_that_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = stored_result(f"memory://places/r{next(NUMBERS)}.zarr", None)
    names = "out", "lse"
    arrays = [zarr.create_array({}, name=name, shape=(2,), dtype="uint8", chunks=(2,), compressors=None) for name in names]

    def write(content: bytes) -> None:
        out, lse = ((array, (0,), np.frombuffer(content, np.uint8)) for array in arrays)
        chunks.write_both(out, lse)

    assert stored.beside is not None
    with StoreLock(stored.beside, "here") as lock:
        chunks = ChunkObjects(stored, lock.claim)
        for content in (b"ab", b"cd"):
            write(content)
            assert [stored.read(f"{name}/c/0") for name in names] == [content, content]
        lock.claim.check()
        stored.beside.write("lock-00000002", b"{}")
        with pytest.raises(LockedError, match="was lost to"):
            write(b"ef")
        assert [stored.read(f"{name}/c/0") for name in names] == [b"cd", b"cd"]
        monkeypatch.setattr(store_lock, "BEAT", 0.0)  # what was known before does not count any more
        chunks.remove(arrays[0], (0,))
        with pytest.raises(LockedError, match="was lost to"):
            write(b"ef")
    assert stored.read("out/c/0") is None


@pytest.mark.parametrize("kind", ["URL", "FsspecStore", "beside", "MemoryStore", "read-only", "wrapped", "local, wrapped"])
def test_a_result_never_replaces_a_tensor_that_it_is_computed_from(kind: str, fast_path: Path) -> None:
    numbers = np.ones((1, 1, 8, 4), np.float32)
    url, held = f"memory://places/r{next(NUMBERS)}.zarr", zarr.storage.MemoryStore()
    store: Any = held
    if kind in ("URL", "FsspecStore", "beside"):
        store = zarr.storage.FsspecStore.from_url(url + (".oocattn" if kind == "beside" else ""))
    elif kind == "local, wrapped":
        store = zarr.storage.LoggingStore(zarr.storage.LocalStore(fast_path / "r"))
    elif kind == "wrapped":
        store = zarr.storage.LoggingStore(held)
    q: Any = zarr.create_array(store, name="a/out", data=numbers)
    if kind == "read-only":
        q = zarr.open_array(store, path="a/out", mode="r")
    result: Any = zarr.storage.StorePath(held, "a")
    if kind in ("URL", "beside"):
        q, result = f"{url}{'.oocattn' if kind == 'beside' else ''}/a/out", f"{url}/a" if kind == "URL" else url
    elif kind == "FsspecStore":
        result = zarr.storage.StorePath(store, "a/out/b")
    elif kind == "local, wrapped":
        result = fast_path / "r"
    place = {} if kind == "local, wrapped" else {"scratch": fast_path / "scratch", "lock": "none"}
    with pytest.raises(ResultExistsError, match="belongs to the dataset"):
        oocattn.attention({"q": q, "k": numbers, "v": numbers}, result, overwrite=True, **place, **ASKED)
    np.testing.assert_array_equal(zarr.open_array(store, path="a/out", mode="r")[...], numbers)


def test_a_plan_counts_the_copies_of_chunks_on_their_way_to_a_store(dataset: Path, here: Path) -> None:
    url, plans = f"memory://places/r{next(NUMBERS)}.zarr", list[oocattn.Plan]()

    def keep_plan(event: oocattn.Event) -> None:
        if event.kind == "started":
            plans.append(event.plan)

    with pytest.raises(EnoughError):
        oocattn.attention(dataset, url, **ASKED, callbacks=[keep_plan, interrupt("written", 1)])
    oocattn.resume(url, engine="inline", callbacks=[keep_plan])
    plans += [oocattn.plan(dataset, result=result, **ASKED) for result in (url, zarr.storage.MemoryStore())]
    assert len(plans) == 4
    for plan in plans:
        chunk = plan.out_chunk_rows * plan.problem.value_dim * np.dtype(plan.problem.out_dtype).itemsize
        held = chunk + 4 * plan.out_chunk_rows + 2 * ALIGNMENT  # with its part of lse
        assert plan.peak_host == replanned(plan, to_store=False).peak_host + 16 * (4 * chunk + held)  # 16 threads send
    assert not oocattn.plan(dataset, result=here / "result.zarr", **ASKED).to_store


def test_a_result_may_lie_beside_its_tensors(fast_path: Path) -> None:
    numbers, store = np.ones((1, 1, 8, 4), np.float32), zarr.storage.MemoryStore()
    q = zarr.create_array(store, name="a/q", data=numbers)
    place = zarr.storage.StorePath(store, "a/qout")
    asked = {**ASKED, "scratch": fast_path / "scratch", "lock": "none"}
    found = oocattn.attention({"q": q, "k": numbers, "v": numbers}, place, **asked)
    np.testing.assert_array_equal(found.out[...], numbers)


def test_a_finished_result_is_read_from_a_store_that_is_not_open_for_writing(dataset: Path, here: Path) -> None:
    store, places = zarr.storage.MemoryStore(), {"scratch": here / "scratch", "lock": "none"}
    made = oocattn.attention(dataset, StorePath(store, "r"), **places, **ASKED)
    given = StorePath(store.with_read_only(True), "r")
    assert np.array_equal(oocattn.open(given).out[...], made.out[...])
    assert oocattn.status(given).state == "finished"
    with pytest.raises(ProblemError, match="is read-only: open it for writing"):
        oocattn.attention(dataset, given, **places, **ASKED)


@pytest.mark.parametrize("where", ["folder", "URL", "store", "beside"])
def test_a_result_does_not_lie_in_another(dataset: Path, here: Path, where: str) -> None:
    store = zarr.storage.MemoryStore()
    outer, inner = {
        "folder": (here / "r.zarr", here / "r.zarr" / "out" / "x"),
        "URL": (url := f"memory://places/r{next(NUMBERS)}.zarr", f"{url}/out/x"),
        "store": (StorePath(store, "a"), StorePath(store, "a/out/x")),
        "beside": (here / "r.zarr", here / "r.zarr.oocattn" / "x"),
    }[where]
    places: dict[str, Any] = {} if isinstance(outer, Path) else {"scratch": here / "scratch"}
    places |= {"lock": "none"} if where == "store" else {}
    oocattn.attention(dataset, outer, **places, **ASKED)
    with pytest.raises(ResultExistsError, match=r"lies in .*: choose a place outside it"):
        oocattn.attention(dataset, inner, **places, **ASKED)
    oocattn.attention(dataset, outer, **places, overwrite=True, **ASKED)


def test_what_may_be_computed_from_a_result_in_a_store_does_not_replace_it(dataset: Path, here: Path) -> None:
    arrays = pytest.importorskip("dask.array")
    url = f"memory://places/r{next(NUMBERS)}.zarr"
    inputs = {name: zarr.open_array(dataset, path=name, mode="r")[...] for name in "qkv"}
    before = oocattn.attention(inputs, url, **ASKED).out[...]
    given = {**inputs, "q": arrays.from_array(inputs["q"])}
    with pytest.raises(ResultExistsError, match=r"q .* may be computed from it"):
        oocattn.attention(given, url, overwrite=True, **ASKED)
    assert np.array_equal(oocattn.attention(inputs, url, **ASKED).out[...], before)
    for name in ("new", "new"):
        oocattn.attention(given, here / name, overwrite=True, **ASKED)


def test_a_finished_result_is_not_that_of_other_inputs(dataset: Path, here: Path) -> None:
    inputs = {name: zarr.open_array(dataset, path=name, mode="r")[...] for name in "qkv"}
    oocattn.attention(inputs, here / "r.zarr", **ASKED)
    oocattn.resume(here / "r.zarr", inputs=inputs)
    with pytest.raises(IntegrityError, match=r"r.zarr is finished, and not known to be of .*: v differ"):
        oocattn.resume(here / "r.zarr", inputs={**inputs, "v": inputs["v"] + 1})


def test_a_result_within_a_store_is_opened_by_xarray_where_it_is(dataset: Path, fast_path: Path) -> None:
    pytest.importorskip("xarray")
    place = zarr.storage.StorePath(zarr.storage.MemoryStore(), "a/b")
    found = carry_out(plan_for(dataset, chunks=1), dataset, ResultPaths.at(place, fast_path / "scratch", "none"))
    opened = found.to_xarray()
    np.testing.assert_array_equal(opened["out"], found.out[...])


def test_no_message_shows_the_secrets_of_a_store_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    secret, options = "a-long-secret-value", {"token": "a-long-secret-value"}

    def refuse(self: Any, path: str, *arguments: Any, **options: Any) -> bytes:
        raise PermissionError(f"{path}: {secret} is not allowed")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    store = zarr.storage.FsspecStore.from_url(f"memory://places/r{next(NUMBERS)}", storage_options=options)
    result = stored_result(store, None)
    assert result.beside is not None
    for read in (result.read, result.beside.read, lambda key: zarr.open_group(open_node(store)[0], mode="r", path=key)):
        with pytest.raises(RemoteError, match=r"\*\*\* is not allowed") as found:
            read("key")
        assert secret not in str(found.value)
    named = zarr.storage.FsspecStore(store.fs, path="/user:password@host/r")
    assert "password" not in str(stored_result(named, None))


def test_what_a_run_left_in_the_store_is_removed_from_any_folder(
    dataset: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(self: RunState) -> None:
        raise EnoughError

    url = f"memory://places/r{next(NUMBERS)}.zarr"
    with monkeypatch.context() as patched:
        patched.setattr(RunState, "tidy", end)
        with pytest.raises(EnoughError):
            carry_out(plan_for(dataset, chunks=3), dataset, ResultPaths.at(url, "store"))
    paths = ResultPaths.at(url)
    assert paths.beside is not None
    assert {"run.json", "scratch/plan.json"} <= set(paths.beside.list())
    paths.beside.write("notes.txt", b"mine")
    assert is_untidy(paths)
    oocattn.resume(url, engine="inline")
    assert set(paths.beside.list()) == {"notes.txt", "report.json"}
    assert not is_untidy(paths)
