"""The places of a result: what grows is beside it, what lies at its path is whole, and JSON is validated."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

from oocattn import IntegrityError, LockedError, ResultExistsError
from oocattn.problem.given import GivenArrays
from oocattn.storage.files.durable import read_json, write_text
from oocattn.storage.journal.journal import Journal
from oocattn.storage.journal.lock import FileLock
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.arrays import ResultArrays
from oocattn.storage.results.growing import GrowingResult, Layout, RunState

SHAPE = (1, 2, 50, 4)
ATTRIBUTES = {"problem": {"tokens": 50}}


class Held:
    """A claim that is held until it is lost."""

    lost = False

    def check(self, *, afresh: bool = False) -> None:
        if self.lost:
            raise LockedError("the lock of this run was lost")


@pytest.fixture
def paths(tmp_path: Path) -> ResultPaths:
    return ResultPaths.at(tmp_path / "result.zarr")


def begin(paths: ResultPaths, dtype: str = "float16", overwrite: bool = True) -> tuple[RunState, GrowingResult]:
    paths.make_state()
    state = RunState(paths, Held())
    growing = state.begin(Layout(SHAPE, dtype, 20, ATTRIBUTES), overwrite=overwrite)
    Journal.begin(paths.state, {"result": growing.name}, Held())
    return state, growing


def fill(arrays: ResultArrays, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    out = random.standard_normal(SHAPE).astype(arrays.out.dtype)
    lse = random.standard_normal(SHAPE[:3]).astype(np.float32)
    for head in range(2):
        for part, rows in enumerate((slice(0, 20), slice(20, 40), slice(40, 50))):
            written = arrays.write(0, head, part, out[0, head, rows], lse[0, head, rows])
            assert written.nbytes == (rows.stop - rows.start) * (4 * out.itemsize + 4)
    return out, lse


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_result_appears_whole_and_readable_by_plain_zarr(paths: ResultPaths, dtype: str) -> None:
    state, growing = begin(paths, dtype)
    assert growing.arrays.out.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    out, lse = fill(growing.arrays)
    assert paths.attributes() is None
    assert not paths.result.exists()
    state.commit(growing)
    state.tidy()
    assert paths.attributes() == ATTRIBUTES
    group = zarr.open_group(paths.result, mode="r")
    np.testing.assert_array_equal(group["out"][...], out)
    np.testing.assert_array_equal(group["lse"][...], lse)
    assert (group["out"].chunks, group["lse"].chunks) == ((1, 1, 20, 4), (1, 1, 20))
    assert list(paths.state.iterdir()) == []
    assert not list(paths.result.rglob("*.partial"))


def test_a_result_replaces_an_older_one(paths: ResultPaths) -> None:
    for seed in (1, 2):
        state, growing = begin(paths)
        out, _ = fill(growing.arrays, seed)
        state.commit(growing)
        state.commit(growing)  # again, as after an error of the file system
        state.tidy()
        np.testing.assert_array_equal(ResultArrays.open(paths.result).out[...], out)
    assert sorted(path.name for path in paths.result.parent.iterdir()) == ["result.zarr", "result.zarr.oocattn"]


def test_beginning_again_forgets_what_was_begun(paths: ResultPaths) -> None:
    fill(begin(paths)[1].arrays)
    (paths.scratch / "partial-0-0-0").write_text("old")
    again = begin(paths)[1]
    assert list(paths.scratch.iterdir()) == []
    assert not np.any(again.arrays.out[...])


def test_a_late_writer_finds_its_result_gone(paths: ResultPaths) -> None:
    """A worker that nobody has told that its run has ended, and that another one has begun."""
    late = begin(paths)[1].arrays
    again = begin(paths)[1]
    with pytest.raises(FileNotFoundError):
        fill(late)
    assert not np.any(again.arrays.out[...])
    assert not list(paths.state.rglob("*.partial"))


def test_only_the_result_that_was_there_is_replaced(paths: ResultPaths) -> None:
    """Another one, put there meanwhile, is left, and the run can go on once it was moved away."""
    state, growing = begin(paths)
    fill(growing.arrays, seed=1)
    state.commit(growing)
    state.tidy()
    state, growing = begin(paths)
    out, _ = fill(growing.arrays, seed=2)
    paths.result.rename(paths.result.with_name("first.zarr"))
    for appear in (
        lambda: shutil.copytree(paths.result.with_name("first.zarr"), paths.result),
        lambda: paths.result.write_text("precious"),
        paths.result.mkdir,
        lambda: paths.result.symlink_to(paths.result.with_name("first.zarr")),
    ):
        appear()
        before = sorted(path.name for path in paths.result.rglob("*")) if paths.result.is_dir() else paths.result.read_text()
        with pytest.raises(ResultExistsError, match=r"has appeared, or was replaced, .*: move it away and resume"):
            state.commit(growing)
        after = sorted(path.name for path in paths.result.rglob("*")) if paths.result.is_dir() else paths.result.read_text()
        assert after == before
        if paths.result.is_dir() and not paths.result.is_symlink():
            shutil.rmtree(paths.result)
        else:
            paths.result.unlink()
    state.commit(growing)
    np.testing.assert_array_equal(ResultArrays.open(paths.result).out[...], out)


def test_without_overwrite_nothing_is_replaced(paths: ResultPaths) -> None:
    state, growing = begin(paths, overwrite=False)
    fill(growing.arrays)
    other = zarr.create_group(paths.result, attributes={"oocattn": ATTRIBUTES})
    with pytest.raises(ResultExistsError, match="has appeared"):
        state.commit(growing)
    assert dict(other.attrs) == {"oocattn": ATTRIBUTES}


def test_a_run_that_lost_its_lock_changes_nothing(paths: ResultPaths) -> None:
    state, growing = begin(paths)
    fill(growing.arrays)
    lost = RunState(paths, Held())
    lost.claim.lost = True
    before = sorted(paths.state.rglob("*"))
    for step in (
        lambda: lost.commit(growing),
        lambda: lost.discard(growing),
        lost.tidy,
        lost.remove_leftovers,
        lambda: lost.begin(Layout(SHAPE, "float16", 20, ATTRIBUTES), overwrite=True),
    ):
        with pytest.raises(LockedError):
            step()
    assert sorted(paths.state.rglob("*")) == before
    assert not paths.result.exists()
    state.commit(growing)


FOREIGN = ["partials/thesis.txt", "finished/0-0.json.bak", "replaced.zarr/notes.md", "GROWING/out/thesis.txt"]


@pytest.mark.parametrize("place", FOREIGN)
def test_files_of_others_are_named_and_left(paths: ResultPaths, place: str) -> None:
    growing = begin(paths)[1]
    foreign = paths.state / place.replace("GROWING", growing.name)
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("precious")
    with pytest.raises(ResultExistsError, match=rf"{foreign.name} lies in .* is not a file that oocattn writes .*: move it"):
        begin(paths)
    assert foreign.read_text() == "precious"
    foreign.rename(paths.result.with_name("away"))
    begin(paths)


def test_a_file_that_comes_later_is_left_too(paths: ResultPaths, caplog: pytest.LogCaptureFixture) -> None:
    state, growing = begin(paths)
    fill(growing.arrays)
    state.commit(growing)
    (paths.scratch / "thesis.txt").write_text("precious")
    state.tidy()
    (left,) = paths.state.rglob("thesis.txt")
    assert left.read_text() == "precious"
    assert "was not removed: oocattn did not write it; move it away" in caplog.text


def test_a_result_with_a_file_of_others_is_not_replaced(paths: ResultPaths) -> None:
    state, growing = begin(paths)
    fill(growing.arrays)
    state.commit(growing)
    state.tidy()
    (paths.result / "out" / "README.txt").write_text("precious")
    with pytest.raises(ResultExistsError, match=r"README\.txt lies in"):
        begin(paths)
    assert (paths.result / "out" / "README.txt").read_text() == "precious"


LINKED = ["", "partials", "finished", "GROWING", "GROWING/out", "GROWING/lse", "replaced.zarr"]


@pytest.mark.parametrize("place", LINKED)
def test_links_are_not_followed_out_of_the_folder(paths: ResultPaths, tmp_path: Path, place: str) -> None:
    """A planted link in place of a folder: nothing is written to, or removed from, where it leads."""
    state, growing = begin(paths)
    fill(growing.arrays)
    link = paths.state / place.replace("GROWING", growing.name) if place else paths.state
    elsewhere = tmp_path / "elsewhere"
    link.rename(elsewhere) if link.exists() else elsewhere.mkdir()
    for name in ("partial-0-0-0", "0-0.json", "c.0.0.0.0", "zarr.json"):
        (elsewhere / name).write_text("precious")
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    link.symlink_to(elsewhere)
    for step in (
        lambda: begin(paths),
        lambda: state.resume(growing, Layout(SHAPE, "float16", 20, ATTRIBUTES)),
        state.remove_leftovers,
        state.tidy,
        lambda: state.discard(growing),
    ):
        with suppress(IntegrityError, ResultExistsError):
            step()
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def owned(monkeypatch: pytest.MonkeyPatch, owner: Callable[[str], int]) -> None:
    """Have the file system say whose what is open is, by its path."""
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = list(real(descriptor))
        found[4] = owner(os.readlink(f"/proc/self/fd/{descriptor}"))
        return os.stat_result(found)

    monkeypatch.setattr("os.fstat", fstat)


def test_the_folder_must_be_of_this_user(paths: ResultPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    paths.state.mkdir()
    owned(monkeypatch, lambda path: 12345 if path == str(paths.state) else os.geteuid())
    with pytest.raises(IntegrityError, match=r"belongs to user 12345: expected a folder of user"):
        paths.make_state()


def test_a_file_system_may_have_users_of_its_own(paths: ResultPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    owned(monkeypatch, lambda path: 12345)
    paths.make_state()
    assert list(paths.state.parent.iterdir()) == [paths.state]


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    assert ResultPaths.at(f"file://{tmp_path}/r.zarr").result == tmp_path / "r.zarr"


def test_a_place_without_a_result_has_no_attributes(paths: ResultPaths) -> None:
    paths.result.mkdir()
    assert paths.attributes() == {}
    zarr.open_group(paths.result, mode="w", attributes={"oocattn": "text"})
    assert paths.attributes() == {}


def test_a_group_without_the_arrays_is_refused(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    group.create_array("out", shape=3, dtype="f4")
    with pytest.raises(IntegrityError, match=r"expected the arrays out and lse, found \['out'\]"):
        ResultArrays.open(tmp_path / "g.zarr")


def test_json_is_read_with_care(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_json(path) is None
    write_text(path, json.dumps({"b": [1.5, "two"]}), synced=False)
    assert read_json(path) == {"b": [1.5, "two"]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]
    for text, message in (("{", "not JSON"), ("", "not JSON"), ("[1]", "expected a JSON object, found list")):
        path.write_text(text)
        with pytest.raises(IntegrityError, match=f"status.json: {message}"):
            read_json(path)
    path.write_text("{" + " " * 5000 + "}")
    with pytest.raises(IntegrityError, match="has more than 4,096 bytes"):
        read_json(path, 4096)


def test_a_run_that_was_killed_after_its_commit_can_be_replaced(paths: ResultPaths) -> None:
    """The result that it replaced is still in the folder of job state."""
    for seed in (1, 2):
        state, growing = begin(paths)
        fill(growing.arrays, seed)
        state.commit(growing)  # and no tidy
    state, growing = begin(paths)
    out, _ = fill(growing.arrays, seed=3)
    state.commit(growing)
    state.tidy()
    np.testing.assert_array_equal(ResultArrays.open(paths.result).out[...], out)
    assert list(paths.state.iterdir()) == []


def test_a_run_that_waits_for_the_lock_still_gets_it(paths: ResultPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """What killed writes have left is removed meanwhile."""
    monkeypatch.setattr("oocattn.storage.journal.lock.PATIENCE", 5.0)
    paths.make_state()
    abandoned = [paths.state / f"{name}.{'0' * 32}.partial" for name in ("lock", "plan.json", "other-bits.json")]
    for path in abandoned:
        path.write_text("{}")
    with ThreadPoolExecutor(1) as other:
        with FileLock(paths.lock) as held:
            waiting = other.submit(FileLock, paths.lock)
            while len(list(paths.state.glob("lock.*.partial"))) < 2:
                time.sleep(0.01)
            time.sleep(0.1)
            RunState(paths, held.claim).remove_leftovers()
            assert not any(map(Path.exists, abandoned))
        waiting.result().release()
    assert list(paths.state.iterdir()) == []


def test_a_growing_result_keeps_what_was_given_and_misses_it(paths: ResultPaths) -> None:
    layout = Layout(SHAPE, "float16", 20, ATTRIBUTES, GivenArrays(learnable_sink=np.ones(2, np.float32)))
    paths.make_state()
    state = RunState(paths, Held())
    growing = state.begin(layout, overwrite=False)
    Journal.begin(paths.state, {"result": growing.name}, Held())
    state.resume(growing, layout)
    (growing.path / "learnable_sink/c.0").write_bytes(bytes(8))
    with pytest.raises(IntegrityError, match="learnable_sink is not what the run was given"):
        state.resume(growing, layout)
    state.discard(growing)
    assert not growing.path.exists()
