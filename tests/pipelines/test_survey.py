"""A survey of a finished result: which arrays it adds, what it refuses, and what stays as it was."""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from passes import ARRAYS, bits, copied, planned
from support import BESIDE, Recorder, normal_arrays, sizes_of, write_dataset

import oocattn
from oocattn import BudgetError, IntegrityError, LockedError, ProblemError, ResultExistsError, Survey
from oocattn.pipelines.engines.dask.local_cluster import local_client
from oocattn.units import format_seconds

TOKENS, HEADS = 170, 4


@pytest.fixture(scope="module")
def dataset(shared_path: Path) -> Path:
    return write_dataset(shared_path / "dataset.zarr", normal_arrays(TOKENS, heads=HEADS, kv_heads=2, head_dim=16))


@pytest.fixture(scope="module")
def first(dataset: Path, shared_path: Path) -> Path:
    """A result without a survey; not to be changed."""
    oocattn.attention(dataset, shared_path / "first.zarr", causal=True, engine="inline")
    return shared_path / "first.zarr"


@pytest.fixture(scope="module")
def right(first: Path, shared_path: Path) -> dict[str, bytes]:
    """The bits of its survey."""
    return bits(survey(copied(first, shared_path / "right.zarr")))


@pytest.fixture
def result(first: Path, fast_path: Path) -> Path:
    return copied(first, fast_path / "result.zarr")


def survey(result: Any, *, chunks: int = 3, division: str = "cqs", **options: Any) -> Survey:
    with planned(chunks, division):
        return oocattn.survey(result, **{"engine": "inline", "pool": 7, **options})


def files_of(result: Path) -> dict[str, bytes]:
    """All files of a result, and of what is beside it."""
    folders = result, result.with_name(f"{result.name}.oocattn")
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def beside(result: Path) -> set[str]:
    return {path.name for path in result.with_name(f"{result.name}.oocattn").iterdir()}


def test_the_arrays_have_the_shapes_that_were_asked_for_and_nothing_else_is_left(result: Path) -> None:
    found = survey(result, top=5)
    described = {name: (array.shape, array.dtype.name) for name, array in found.arrays.items()}
    assert described == {
        "received": ((1, HEADS, TOKENS), "float32"),
        "entropy": ((1, HEADS, TOKENS), "float32"),
        "top_keys": ((1, HEADS, TOKENS, 5), "int64"),
        "top_weights": ((1, HEADS, TOKENS, 5), "float32"),
        "pooled": ((1, HEADS, 7, 7), "float32"),
    }
    assert beside(result) == BESIDE
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse", *ARRAYS}
    assert {path.name for path in result.parent.iterdir()} == {"result.zarr", "result.zarr.oocattn"}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["entropy"], ["entropy"]),
        (["top_keys"], ["top_keys", "top_weights"]),
        (["pooled", "received"], ["received", "pooled"]),
        ("received", ["received"]),
    ],
)
def test_some_of_the_arrays_have_the_bits_that_they_have_among_all(
    asked: Any, expected: list[str], result: Path, right: dict[str, bytes]
) -> None:
    assert bits(survey(result, arrays=asked)) == {name: right[name] for name in expected}
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse", *expected}
    assert bits(survey(result)) == right, "those that are missing are added"


@pytest.mark.parametrize(
    "wrong",
    [
        {"arrays": ["top_weights"]},
        {"arrays": ["entropy", "what"]},
        {"arrays": []},
        {"arrays": 7},
        {"top": 0},
        {"top": 129},
        {"top": 2.5},
        {"pool": 0},
        {"pool": 4097},
        {"mean_heads": "yes"},
        {"overwrite": 1},
        {"host_memory": "much"},
        {"engine": "what"},
        {"scratch": "somewhere"},
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(wrong: dict[str, Any], result: Path) -> None:
    before = files_of(result)
    with pytest.raises(ProblemError, match=next(iter(wrong))):
        oocattn.survey(result, **{"engine": "inline", **wrong})
    assert files_of(result) == before


def test_the_same_survey_is_found_and_nothing_is_computed(result: Path) -> None:
    survey(result)
    before, recorder = files_of(result), Recorder([])
    found = survey(result, callbacks=[recorder])
    assert list(found.arrays) == list(ARRAYS)
    assert survey(result, arrays=["entropy"], top=3, callbacks=[recorder]).arrays.keys() == {"entropy"}
    assert not recorder.events
    assert files_of(result) == before


@pytest.mark.parametrize("other", [{"top": 3}, {"pool": 5}, {"mean_heads": True}], ids=str)
def test_another_survey_is_refused_unless_it_is_to_replace_the_first(other: dict[str, Any], result: Path) -> None:
    survey(result)
    before = files_of(result)
    with pytest.raises(ResultExistsError, match="or replace it with overwrite=True"):
        survey(result, **other)
    assert files_of(result) == before
    found = survey(result, **other, overwrite=True)
    shapes = {name: array.shape[1:] for name, array in found.arrays.items()}
    asked = {"top": 8, "pool": 7, "mean_heads": False, **other}
    assert shapes["top_keys"] == shapes["top_weights"] == (HEADS, TOKENS, asked["top"])
    assert shapes["pooled"] == (1 if asked["mean_heads"] else HEADS, asked["pool"], asked["pool"])
    assert beside(result) == BESIDE
    assert bits(survey(result, **other)) == bits(found)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["an array", "a group", "a folder", "a file", "a link"])
def test_what_somebody_else_has_put_there_is_refused_and_left(what: str, overwrite: bool, result: Path) -> None:
    place = result / "entropy"
    if what == "an array":
        zarr.create_array(place, shape=(1, HEADS, TOKENS), dtype="float32")[...] = 7.0
    elif what == "a group":
        zarr.open_group(place, mode="w", attributes={"oocattn": {}})
    elif what == "a folder":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    elif what == "a file":
        place.write_text("mine")
    else:
        place.symlink_to(result / "lse")
    before = files_of(result)
    with pytest.raises((ResultExistsError, IntegrityError, ProblemError), match="entropy"):
        survey(result, overwrite=overwrite)
    assert files_of(result) == before
    assert beside(result) == BESIDE


def test_zarr_and_xarray_open_the_arrays_by_the_consolidated_metadata(result: Path) -> None:
    survey(result, top=3)
    group = zarr.open_consolidated(str(result), mode="r")
    assert {name for name, _ in group.arrays()} == {"out", "lse", *ARRAYS}
    with warnings.catch_warnings():
        opened = xarray.open_zarr(result, consolidated=True)
    dimensions = {name: opened[name].dims for name in ARRAYS}
    rows = opened["lse"].dims
    assert dimensions == {
        "received": (*rows[:2], "key_token"),
        "entropy": rows,
        "top_keys": (*rows, "rank"),
        "top_weights": (*rows, "rank"),
        "pooled": (*rows[:2], "row_block", "key_block"),
    }
    np.testing.assert_array_equal(opened["entropy"].values, np.asarray(group["entropy"]))
    about = group["pooled"].attrs["oocattn"]["survey"]
    assert about == {"row_block": 25, "key_block": 25, "first_row": 0, "rows": TOKENS, "keys": TOKENS}
    assert opened["pooled"].shape == (1, HEADS, 7, 7)


@pytest.mark.parametrize("mean_heads", [False, True])
def test_each_dimension_has_one_size_as_xarray_demands(mean_heads: bool, dataset: Path, fast_path: Path) -> None:
    result, sinks = fast_path / "some.zarr", {"learnable_sink": [0.0, 1.0, 2.0, 3.0], "seqused_k": [TOKENS]}
    oocattn.attention(dataset, result, heads=[0, 2, 3], queries=(3, 90), **sinks, engine="inline")
    survey(result, top=3, mean_heads=mean_heads)
    sizes = sizes_of(result)
    assert sizes["asked_query_head"] == 3
    assert (sizes["key_token"], sizes["rank"], sizes["row_block"], sizes["key_block"]) == (TOKENS, 3, 7, 7)


def test_a_surveyed_result_is_verified_opened_and_replaced(result: Path, dataset: Path) -> None:
    survey(result)
    assert oocattn.status(result).state == "finished"
    assert oocattn.verify(result, rows=4, all_rows=True, engine="inline").passed
    assert np.asarray(oocattn.open(result).lse[...]).shape == (1, HEADS, TOKENS)
    assert oocattn.attention(dataset, result, causal=True, engine="inline").path == result, "it is found"
    assert (result / "entropy").is_dir()
    oocattn.attention(dataset, result, engine="inline", overwrite=True)
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse"}
    assert bits(survey(result))["entropy"]
    assert beside(result) == BESIDE


@pytest.mark.parametrize("arrays", [["received"], ["pooled"], ["received", "entropy", "top_keys"]])
@pytest.mark.parametrize("lse", [-60.0, -1000.0, 3.0, 1000.0])
def test_a_wrong_log_sum_exp_is_said_and_no_more(
    lse: float, arrays: list[str], result: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    array = zarr.open_array(result, path="lse", mode="r+")
    array[0, 2, 100:103] = np.asarray(array[0, 2, 100:103]) + lse
    survey(result, arrays=arrays)
    said = "the weights of 3 rows do not sum to 1: their log-sum-exp is wrong; verify the result"
    assert [message for message in caplog.messages if "sum to 1" in message] == [said]
    assert not [str(each.message) for each in recwarn if "oocattn" in each.filename]


def test_weights_with_a_learnable_sink_sum_to_less_than_1_without_a_warning(
    dataset: Path, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oocattn.attention(dataset, fast_path / "sink.zarr", learnable_sink=[9.0, 0.0, -9.0, 1.0], engine="inline")
    total = np.asarray(survey(fast_path / "sink.zarr").arrays["received"]).sum(2)
    assert (total < TOKENS).all()
    assert total[0, 0] < 0.1 * TOKENS < 0.9 * TOKENS < total[0, 2]
    assert "sum to 1" not in caplog.text


def test_a_division_of_another_kind_gives_the_same_up_to_rounding(first: Path, fast_path: Path) -> None:
    found = [
        survey(copied(first, fast_path / f"{division}-{chunks}.zarr"), chunks=chunks, division=division)
        for division, chunks in (("cqs", 1), ("cqs", 7), ("strips", 5))
    ]
    for name in ARRAYS:
        one, *others = (np.asarray(each.arrays[name]) for each in found)
        for other in others:
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6, err_msg=name)


def test_one_lane_or_two_have_the_same_bits(first: Path, fast_path: Path, right: dict[str, bytes]) -> None:
    with local_client(workers=2) as client:
        found = survey(copied(first, fast_path / "two.zarr"), engine="dask", client=client)
    assert bits(found) == right


def test_memory_that_is_too_small_is_refused_with_that_which_works_and_leaves_nothing(result: Path) -> None:
    before = files_of(result)
    with pytest.raises(BudgetError, match="works is"):
        oocattn.survey(result, host_memory="1MiB", engine="inline")
    assert files_of(result) == before
    assert beside(result) == BESIDE


def test_a_survey_shows_what_was_added_and_where(result: Path) -> None:
    found = survey(result, arrays=["entropy", "top_keys"], top=2)
    assert repr(found) == f"<Survey: entropy, top_keys, top_weights of {result}>"
    assert str(found).splitlines() == [
        f"path         {result}",
        f"entropy      [1, {HEADS}, {TOKENS}] float32",
        f"top_keys     [1, {HEADS}, {TOKENS}, 2] int64",
        f"top_weights  [1, {HEADS}, {TOKENS}, 2] float32",
        f"time         {format_seconds(found.seconds)}, of which the pass took {format_seconds(found.report.seconds)} "
        f"(predicted {format_seconds(found.plan.seconds)})",
    ]
    assert 0 < found.report.seconds < found.seconds
    again = survey(result, arrays=["entropy", "top_keys"], top=2)
    assert (again.seconds, again.plan, again.report) == (None, None, None)
    assert str(again) == str(found).rpartition("\n")[0]
    document = json.loads(json.dumps(found.to_json()))
    assert (document["format"], document["path"]) == (1, str(result))
    assert document["report"]["predicted_seconds"] == document["plan"]["seconds"]
    with pytest.raises(ProblemError, match="does not know its result"):
        found.report.to_html("report.html")
    assert document["arrays"]["top_keys"] == {"shape": [1, HEADS, TOKENS, 2], "dtype": "int64", "chunks": [1, 1, TOKENS, 2]}
    assert "<td" in found._repr_html_()


def test_inputs_that_were_moved_are_named(first: Path, dataset: Path, fast_path: Path, right: dict[str, bytes]) -> None:
    shutil.copytree(dataset, fast_path / "before.zarr")
    oocattn.attention(fast_path / "before.zarr", fast_path / "r.zarr", causal=True, engine="inline")
    (fast_path / "before.zarr").rename(fast_path / "after.zarr")
    with pytest.raises((ProblemError, OSError), match=r"before\.zarr"):
        survey(fast_path / "r.zarr")
    other = write_dataset(fast_path / "other.zarr", normal_arrays(TOKENS + 1, heads=HEADS, kv_heads=2, head_dim=16))
    with pytest.raises(ProblemError):
        survey(fast_path / "r.zarr", inputs=other)
    assert bits(survey(fast_path / "r.zarr", inputs=fast_path / "after.zarr")) == right


def test_what_is_no_finished_result_is_refused(fast_path: Path, dataset: Path) -> None:
    for place in (fast_path / "nothing.zarr", dataset):
        with pytest.raises(IntegrityError, match="no finished result"):
            survey(place)
    assert not list(fast_path.iterdir())


def test_a_result_is_surveyed_by_one_process_at_a_time(result: Path) -> None:
    inside, done, others = threading.Event(), threading.Event(), []

    def wait(event: oocattn.Event) -> None:
        inside.set()
        done.wait(20)

    with planned(3):
        both = {"engine": "inline", "pool": 7}
        one = threading.Thread(target=lambda: others.append(oocattn.survey(result, callbacks=[wait], **both)))
        one.start()
        inside.wait(20)
        try:
            with pytest.raises(LockedError):
                oocattn.survey(result, **both)
        finally:
            done.set()
            one.join()
    assert [list(each.arrays) for each in others] == [list(ARRAYS)]


def test_a_result_that_is_replaced_meanwhile_is_given_nothing(result: Path, dataset: Path) -> None:
    def replace(event: oocattn.Event) -> None:
        if event.kind == "ended":
            oocattn.attention(dataset, result, engine="inline", overwrite=True)

    with pytest.raises(IntegrityError, match="was replaced during a second pass over it"):
        survey(result, callbacks=[replace])
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse"}
