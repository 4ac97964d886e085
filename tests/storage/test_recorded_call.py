"""What the model of a captured layer asked, as the dataset records it: taken where it is not given, and never believed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import zarr
from support import normal_arrays, write_dataset

import oocattn
from oocattn.cli.main import main

RECORD = {"scale": 0.7, "softcap": 3.0, "causal": True, "window_size": [4, None], "learnable_sink": False}


def record(path: Path, **changed: Any) -> Path:
    """A dataset with such a record."""
    write_dataset(path, normal_arrays(40, head_dim=16))
    zarr.open_group(path).attrs["oocattn"] = {"asked": {**RECORD, **changed}}
    return path


def asked(place: Path, **given: Any) -> tuple[Any, ...]:
    found = oocattn.plan(place, engine="inline", **given).problem
    return found.scale, found.softcap, found.causal, found.window_size


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.7, 3.0, True, (4, None))),
        ({"scale": 0.5}, (0.5, 3.0, True, (4, None))),
        ({"softcap": 0}, (0.7, None, True, (4, None))),
        ({"causal": True}, (0.7, 3.0, True, (4, None))),
        ({"causal": False}, (0.7, 3.0, False, (None, None))),
        ({"causal": False, "window_size": (2, 3)}, (0.7, 3.0, False, (2, 3))),
        ({"window_size": (-1, None)}, (0.7, 3.0, True, (None, None))),
        ({"recorded": False}, (0.25, None, False, (None, None))),
        ({"recorded": False, "causal": True}, (0.25, None, True, (None, None))),
    ],
    ids=str,
)
def test_what_is_recorded_is_taken_where_it_is_not_given(tmp_path: Path, given: Any, expected: Any) -> None:
    assert asked(record(tmp_path), **given) == expected


def test_the_plan_and_the_log_say_what_is_of_the_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="oocattn")
    place = record(tmp_path)
    words = "scale 0.7, softcap 3, causal, window 4, none, of the dataset"
    assert f"\nnote: {words}" in str(oocattn.plan(place, engine="inline"))
    assert words in caplog.text
    assert "of the dataset" not in str(oocattn.plan(place, engine="inline", recorded=False))
    given = oocattn.plan(place, engine="inline", scale=0.5, softcap=2, causal=False)
    assert "note: window" not in str(given)
    assert "scale 0.5" in str(given)


def test_a_mask_that_is_not_recorded_must_be_given(tmp_path: Path) -> None:
    place = record(tmp_path, causal=None)
    with pytest.raises(oocattn.ProblemError, match=r"no band of keys .* say which keys .*causal=False: all"):
        asked(place)
    assert asked(place, seqused_k=[30])[0] == 0.7
    assert asked(place, causal=False)[2] is False


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": "nan"},
        {"scale": "inf"},
        {"scale": 0},
        {"scale": -1.0},
        {"scale": 10**400},
        {"scale": True},
        {"softcap": [1]},
        {"causal": 1},
        {"window_size": [-1, None]},
        {"window_size": [4]},
        {"window_size": [2**49, None]},
        {"learnable_sink": "../../etc/passwd"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_believed_is_refused_unless_it_is_left_out(tmp_path: Path, changed: Any) -> None:
    place = record(tmp_path, **changed)
    with pytest.raises(oocattn.IntegrityError, match=r"oocattn\.asked of .* cannot be believed .*recorded=False") as caught:
        asked(place)
    assert len(str(caught.value).splitlines()) == 1
    assert asked(place, recorded=False)[0] == 0.25


def test_other_attributes_of_that_name_are_no_record(tmp_path: Path) -> None:
    place = record(tmp_path)
    for value in ({"imported_from": {}}, 3, None, {"asked": None}):
        zarr.open_group(place).attrs["oocattn"] = value
        assert asked(place)[0] == 0.25


def test_sinks_that_are_recorded_and_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(oocattn.ProblemError, match="learnable_sink = 'learnable_sink': found no such array"):
        asked(record(tmp_path, learnable_sink=True))


def test_the_command_takes_and_refuses_what_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(record(tmp_path))
    for options, words in (([], "window 4, none, of the dataset"), (["--no-causal"], "softcap 3, of the dataset")):
        assert main(["plan", place, "--engine", "inline", *options]) == 0
        assert words in capsys.readouterr().out
    assert main(["plan", place, "--engine", "inline", "--no-recorded"]) == 0
    assert "of the dataset" not in capsys.readouterr().out
    record(tmp_path, causal=None)
    assert main(["plan", place]) == 1
    assert "--no-causal: all" in capsys.readouterr().err


def test_tensors_that_are_named_one_by_one_have_no_record(tmp_path: Path) -> None:
    place = record(tmp_path)
    found = oocattn.plan({name: place / name for name in "qkv"}, engine="inline")
    assert found.problem.scale == 0.25
