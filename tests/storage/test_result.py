"""The places of a result: what grows is beside it, what lies at its path is whole, and JSON is validated."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

from oocattn import IntegrityError, ProblemError
from oocattn.storage.result import ResultArrays, ResultPaths, read_json, write_json

SHAPE = (1, 2, 50, 4)
ATTRIBUTES = {"problem": {"tokens": 50}}


@pytest.fixture
def paths(tmp_path: Path) -> ResultPaths:
    return ResultPaths.at(tmp_path / "result.zarr")


def begin(paths: ResultPaths, dtype: str = "float16") -> ResultArrays:
    paths.begin(shape=SHAPE, dtype=dtype, chunk_rows=20, attributes=ATTRIBUTES)
    return ResultArrays.open(paths.unfinished)


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
    arrays = begin(paths, dtype)
    assert arrays.out.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    out, lse = fill(arrays)
    assert paths.attributes() is None
    assert not paths.result.exists()
    paths.commit()
    assert paths.attributes() == ATTRIBUTES
    group = zarr.open_group(paths.result, mode="r")
    np.testing.assert_array_equal(group["out"][...], out)
    np.testing.assert_array_equal(group["lse"][...], lse)
    assert (group["out"].chunks, group["lse"].chunks) == ((1, 1, 20, 4), (1, 1, 20))
    assert paths.unfinished is None
    assert not paths.scratch.exists()
    assert not list(paths.result.rglob("*.partial"))


def test_a_result_replaces_an_older_one(paths: ResultPaths) -> None:
    for seed in (1, 2):
        out, _ = fill(begin(paths), seed)
        paths.commit()
        np.testing.assert_array_equal(ResultArrays.open(paths.result).out[...], out)
    assert sorted(path.name for path in paths.result.parent.iterdir()) == ["result.zarr", "result.zarr.oocattn"]


def test_beginning_again_forgets_what_was_begun(paths: ResultPaths) -> None:
    fill(begin(paths))
    (paths.scratch / "partial-0-0-0").write_text("old")
    again = begin(paths)
    assert list(paths.scratch.iterdir()) == []
    assert not np.any(again.out[...])


def test_a_late_writer_finds_its_result_gone(paths: ResultPaths) -> None:
    """A worker that nobody has told that its run has ended, and that another one has begun."""
    late = begin(paths)
    again = begin(paths)
    with pytest.raises(FileNotFoundError):
        fill(late)
    assert not np.any(again.out[...])
    assert not list(paths.state.rglob("*.partial"))


def test_what_cannot_be_removed_is_not_taken_for_the_result(paths: ResultPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(begin(paths), seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        again = begin(paths)
    out, _ = fill(again, seed=2)
    paths.commit()
    np.testing.assert_array_equal(ResultArrays.open(paths.result).out[...], out)
    assert not list(paths.state.iterdir())


@pytest.mark.parametrize("url", ["memory://r.zarr", "s3://bucket/r.zarr"])
def test_results_are_local(url: str) -> None:
    with pytest.raises(ProblemError, match="results are written to a local path, not to a URL"):
        ResultPaths.at(url)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    assert ResultPaths.at(f"file://{tmp_path}/r.zarr").result == tmp_path / "r.zarr"


def test_what_is_not_a_result_has_no_attributes(paths: ResultPaths) -> None:
    paths.result.mkdir()
    assert paths.attributes() == {}
    zarr.open_group(paths.result, mode="w", attributes={"oocattn": "text"})
    assert paths.attributes() == {}


def test_a_group_without_the_arrays_is_refused(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    group.create_array("out", shape=3, dtype="f4")
    with pytest.raises(IntegrityError, match=r"expected the arrays out and lse, found \['out'\]"):
        ResultArrays.open(tmp_path / "g.zarr")


def test_json_is_replaced_at_once_and_read_with_care(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_json(path) is None
    for content in ({"a": 1}, {"b": [1.5, "two"]}):
        write_json(path, content)
        assert read_json(path) == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]
    for text, message in (("{", "not JSON"), ("", "not JSON"), ("[1]", "expected a JSON object, found list")):
        path.write_text(text)
        with pytest.raises(IntegrityError, match=f"status.json: {message}"):
            read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(IntegrityError, match="not JSON"):
        read_json(path)
