"""The pass of a survey that is not finished: what it did is kept, whatever is asked for next, until it is thrown away."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from interrupting import EnoughError, interrupt
from passes import ARRAYS, bits, copied, survey
from support import BESIDE, normal_arrays, write_dataset

import oocattn
from oocattn import ResultExistsError
from oocattn.storage.paths import SURVEY

TOKENS = 150


@pytest.fixture(scope="module")
def dataset(shared_path: Path) -> Path:
    return write_dataset(shared_path / "dataset.zarr", normal_arrays(TOKENS, heads=2, kv_heads=2))


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


def cut_off(result: Path, kind: str = "attended", count: int = 2, **options: Any) -> None:
    with pytest.raises(EnoughError):
        survey(result, callbacks=[interrupt(kind, count)], **options)


def went_on(result: Path, **options: Any) -> list[bool]:
    """Ask for a survey; whether its pass went on, for each start of one."""
    events: list[oocattn.Event] = []
    survey(result, callbacks=[events.append], **options)
    return [event.resumed for event in events if event.kind == "started"]


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["attended", "written"])
@pytest.mark.parametrize("arrays", [["entropy"], ["entropy", "top_keys"], ["received"]], ids=",".join)
def test_what_a_pass_has_done_is_not_done_again_also_where_it_sums_nothing_over_rows(
    arrays: list[str], kind: str, partials: str, result: Path, right: dict[str, bytes]
) -> None:
    cut_off(result, kind, 4, arrays=arrays, partials=partials)
    attended: list[int] = []
    found = survey(
        result, partials, arrays=arrays, callbacks=[lambda e: attended.append(e.pairs) if e.kind == "attended" else None]
    )
    assert bits(found) == {name: right[name] for name in found.arrays}
    assert sum(attended) < TOKENS * (TOKENS + 1) // 2  # of both heads it would be twice as many


OTHERS_BEGUN: dict[str, tuple[dict[str, Any], str]] = {
    "other arrays": ({"arrays": ["received", "entropy"]}, r"arrays=\('received', 'entropy'\)"),
    "another top": ({"arrays": ["top_keys"], "top": 3}, r"arrays=\('top_keys',\), top=3"),
    "other pools": ({"arrays": ["pooled"], "pool": 5}, r"arrays=\('pooled',\), pool=5"),
    "pools as large as by default": ({"arrays": ["pooled"], "pool": TOKENS}, r"arrays=\('pooled',\), pool=1024"),
}


@pytest.mark.parametrize("moment", ["attended", "ended"])
@pytest.mark.parametrize("begun", OTHERS_BEGUN)
def test_the_pass_of_another_survey_is_kept_and_goes_on(begun: str, moment: str, result: Path) -> None:
    options, words = OTHERS_BEGUN[begun]
    cut_off(result, moment, 1, **options)
    before = files_beside(result)
    with pytest.raises(ResultExistsError, match=rf"cannot go on \(it began with {words}\): .* away with overwrite=True"):
        survey(result)
    assert files_beside(result) == before
    assert went_on(result, **options) == ([True] if moment == "attended" else [])


def test_the_pass_of_another_survey_is_thrown_away_by_who_overwrites(
    result: Path, right: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    cut_off(result, arrays=["entropy"])
    assert bits(survey(result, overwrite=True)) == right
    why = "it began with arrays=('entropy',)"
    assert caplog.messages == [f"a second pass that was begun cannot go on, and begins again ({why})"]
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse", *ARRAYS}
    assert {path.name for path in state_of(result).iterdir()} == BESIDE


def test_a_pass_over_inputs_at_another_place_is_kept(result: Path, dataset: Path, fast_path: Path) -> None:
    shutil.copytree(dataset, fast_path / "elsewhere.zarr")
    cut_off(result)
    with pytest.raises(ResultExistsError, match="asked for with other options or inputs"):
        survey(result, inputs=fast_path / "elsewhere.zarr")
    assert went_on(result) == [True]


def state_of(result: Path) -> Path:
    return result.with_name(f"{result.name}.oocattn")


def files_beside(result: Path) -> dict[str, bytes]:
    """What is in the folder of job state, but for locks."""
    files = (path for path in state_of(result).rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if path.name != "judging"}


def test_the_status_of_a_pass_opens_as_many_files_whatever_sums_it_has_kept(
    result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(result, "written", 1)
    place = state_of(result) / SURVEY
    real, opened = os.open, list[str]()

    def spy(path: Any, *options: Any, **named: Any) -> int:
        opened.append(str(path))
        return real(path, *options, **named)

    monkeypatch.setattr(os, "open", spy)
    before = oocattn.status(place)
    with_sums, sums = len(opened), list((place.with_name(f"{SURVEY}.oocattn") / "partials").glob("sums-*"))
    assert before.share > 0
    assert with_sums
    assert not [path for path in opened if "sums-" in path]
    for path in sums:
        shutil.copy(path, path.with_name(f"{path.name}0"))  # of a block that there is not
    opened.clear()
    assert oocattn.status(place).share == before.share
    assert (len(opened), len(sums) > 2) == (with_sums, True)
