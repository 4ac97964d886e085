"""A survey that was cut off, or met damage, goes on to the bits of an undisturbed one, and leaves nothing else."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from interrupting import EnoughError, interrupt
from passes import ARRAYS, bits, copied, survey
from refusing import refusing
from support import BESIDE, damage, normal_arrays, write_dataset

import oocattn
from oocattn import BudgetError, IntegrityError
from oocattn.naming import on_command_line
from oocattn.pipelines import failing
from oocattn.storage.journal import lock
from oocattn.storage.paths import SURVEY
from oocattn.storage.results import added

TOKENS = 150


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failing, "PAUSES_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(lock, "BEAT", 0.05)


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


def state_of(result: Path) -> Path:
    return result.with_name(f"{result.name}.oocattn")


def scratch_of(result: Path) -> Path:
    return state_of(result) / f"{SURVEY}.oocattn" / "partials"


def cut_off(result: Path, kind: str = "attended", count: int = 2, **options: Any) -> None:
    with pytest.raises(EnoughError):
        survey(result, callbacks=[interrupt(kind, count)], **options)


def check_settled(result: Path, right: dict[str, bytes], spared: Set[str] = frozenset()) -> None:
    """All arrays have their bits, Zarr finds them by the consolidated metadata, and nothing else is there, unless spared."""
    group = zarr.open_consolidated(str(result), mode="r")
    assert {name for name, _ in group.arrays()} == {"out", "lse", *ARRAYS}
    assert {name: np.asarray(group[name]).tobytes() for name in ARRAYS} == right
    assert {path.name for path in result.iterdir()} == {"zarr.json", "out", "lse", *ARRAYS}
    assert {path.name for path in state_of(result).iterdir()} - spared == BESIDE
    assert {path.name for path in result.parent.iterdir()} == {"result.zarr", "result.zarr.oocattn"}


MOMENTS = [("staged", 1), ("attended", 1), ("attended", 4), ("attended", 6), ("written", 1), ("written", 6), ("ended", 1)]


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize(("kind", "count"), MOMENTS)
def test_a_survey_that_was_interrupted_goes_on_to_the_same_bits(
    kind: str, count: int, partials: str, result: Path, right: dict[str, bytes]
) -> None:
    cut_off(result, kind, count, partials=partials)
    assert not any((result / name).exists() for name in ARRAYS)
    begun: list[oocattn.Event] = []
    found = survey(result, partials, callbacks=[begun.append])
    assert bits(found) == right
    check_settled(result, right)
    resumed = [event.resumed for event in begun if event.kind == "started"]
    if kind != "staged":  # then nothing need be in flight yet
        assert resumed == ([] if kind == "ended" else [True]), "what was in flight is saved"


def test_a_survey_of_a_result_that_was_computed_again_begins_again(result: Path, dataset: Path, fast_path: Path) -> None:
    cut_off(result, "written")
    oocattn.attention(dataset, result, engine="inline", overwrite=True)
    expected = bits(survey(copied(result, fast_path / "right.zarr")))
    assert bits(survey(result)) == expected


def test_a_pass_that_was_begun_is_refused_less_memory_without_a_word_of_seeds(result: Path) -> None:
    cut_off(result)
    with pytest.raises(BudgetError, match=r"the second pass that was begun takes .*; give that$"):
        survey(result, host_memory=1 << 20)


def test_the_status_of_a_pass_says_how_to_go_on(result: Path) -> None:
    cut_off(result)
    status = oocattn.status(state_of(result) / SURVEY)
    remark = "  # with its other options, if it had any"
    assert (status.state, status.resume) == ("interrupted", f"oocattn.survey({str(result)!r}, pool=7){remark}")
    survey(result)
    cut_off(result, arrays=["top_keys"], top=3, overwrite=True)
    with on_command_line():
        words = oocattn.status(state_of(result) / SURVEY).resume
    assert words == f"oocattn survey {result} --arrays top_keys --top 3{remark}"
    assert oocattn.status(result).state == "finished"


def test_arrays_of_an_earlier_survey_stay_until_the_next_is_complete(result: Path, right: dict[str, bytes]) -> None:
    before = bits(survey(result, top=3))
    cut_off(result, "written", overwrite=True)
    assert bits(survey(result, top=3)) == before, "they are found, and the pass that was begun is kept"
    begun: list[bool] = []
    survey(result, overwrite=True, callbacks=[lambda e: begun.append(e.resumed) if e.kind == "started" else None])
    assert begun == [True]
    check_settled(result, right)


def damaged_block(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


HARM: dict[str, Callable[[bytes], bytes | None]] = {
    "lost": lambda content: None,
    "short": lambda content: content[:-8],
    "with another header": lambda content: content.replace(b'"run"', b'"nur"', 1),
    "with a flipped bit": damaged_block,
}


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("finished", [False, True], ids=["of an unfinished chunk", "of finished chunks"])
def test_sums_that_are_damaged_are_noticed_and_computed_again(
    finished: bool, harm: str, partials: str, result: Path, right: dict[str, bytes]
) -> None:
    """What is found as the run goes on is computed in it; what is found in the end, when the same is asked for again."""
    cut_off(result, *(("written", 5) if finished else ("attended", 5)), partials=partials)
    files = sorted(scratch_of(result).glob("sums-*"))
    assert files
    damage(files[0], HARM[harm])
    with suppress(IntegrityError):
        survey(result, partials)
    for name in ARRAYS:
        assert not (result / name).exists() or np.asarray(zarr.open_array(result / name, mode="r")).tobytes() == right[name]
    assert bits(survey(result, partials)) == right
    check_settled(result, right)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), EnoughError()], ids=["failed", "interrupted"])
@pytest.mark.parametrize("step", ["before", "after"])
@pytest.mark.parametrize("number", range(5))
def test_arrays_whose_adding_was_cut_off_at_a_rename_are_there_in_the_end(
    number: int,
    step: str,
    error: BaseException,
    result: Path,
    right: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, renamed = added.rename_new, []

    def rename(source: Path, target: Path) -> None:
        if len(renamed) == number and step == "before":
            raise error
        real(source, target)
        renamed.append(target)
        if len(renamed) == number + 1:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(added, "rename_new", rename)
        with pytest.raises(type(error)):
            survey(result)
    present = [name for name in ARRAYS if (result / name).exists()]
    assert len(present) == number + (step == "after")
    opened = zarr.open_group(result, mode="r", use_consolidated=False)
    assert {name: np.asarray(opened[name]).tobytes() for name in present} == {name: right[name] for name in present}
    assert bits(survey(result)) == right
    check_settled(result, right)


SOME = [("rename to a new name", True), ("write", False)]
"""Operations that fail in the suite; all others with `-m slow`."""

OTHERS = [
    (operation, replaces)
    for operation in ("rename", "rename to a new name", "remove", "write", "sync", "make a folder", "open", "list")
    for replaces in (False, True)
    if (operation, replaces) not in SOME
]


@pytest.mark.parametrize(
    ("operation", "replaces"), [*SOME, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_any_operation_of_the_file_system_may_fail_while_arrays_are_added(
    operation: str, replaces: bool, result: Path, right: dict[str, bytes], tmp_path: Path
) -> None:
    """Every few calls, one in each life; asked for again, the arrays are there."""
    before = bits(survey(result, top=3, pool=5)) if replaces else {}
    shutil.copytree(result.parent, tmp_path / "kept")
    after, failed = 0, True
    while failed:
        shutil.rmtree(result.parent / result.name)
        shutil.rmtree(state_of(result))
        shutil.copytree(tmp_path / "kept", result.parent, dirs_exist_ok=True)
        with ExitStack() as refused:
            failed = len(fail_while_adding(result, operation, after, replaces, refused)) > after
        for name, array in zarr.open_group(result, mode="r").arrays():
            assert name in ("out", "lse") or np.asarray(array).tobytes() in (right[name], before.get(name)), name
        assert bits(survey(result, overwrite=replaces)) == right
        check_settled(result, right, {"lock"} if operation == "remove" else set())  # its own lock, that it cannot remove
        after += 1 + after // 2
    assert after > 1


def fail_while_adding(result: Path, operation: str, after: int, replaces: bool, refused: ExitStack) -> list[str]:
    """Survey with the `after`-th call of an operation failing, counted from the end of the pass; return all such calls."""
    seen: list[list[str]] = []

    def begin(event: oocattn.Event) -> None:
        if event.kind == "ended":
            seen.append(refused.enter_context(refusing(result.parent, operation, errno.EIO, after, 1)))

    with suppress(OSError, oocattn.OocattnError):
        survey(result, overwrite=replaces, callbacks=[begin])
    return seen[0]


def test_a_result_without_a_folder_beside_it_is_surveyed_and_left_without(first: Path, fast_path: Path) -> None:
    shutil.copytree(first, fast_path / "alone.zarr")
    survey(fast_path / "alone.zarr")
    assert [path.name for path in fast_path.iterdir()] == ["alone.zarr"]


def test_consolidated_metadata_keep_what_they_said(result: Path) -> None:
    before = json.loads((result / "zarr.json").read_text())
    survey(result)
    after = json.loads((result / "zarr.json").read_text())
    assert after["attributes"] == before["attributes"]
    said = after["consolidated_metadata"]["metadata"]
    assert said.items() >= before["consolidated_metadata"]["metadata"].items()
    assert set(said) == {"out", "lse", *ARRAYS}


def test_a_pass_whose_arrays_are_yet_to_be_added_is_kept_while_another_survey_is_there(
    result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oocattn.survey(result, arrays=["entropy"], engine="inline")

    def refuse(*_: object) -> None:
        raise OSError("the disk refuses")

    with monkeypatch.context() as patched:
        patched.setattr("oocattn.pipelines.survey.add_arrays", refuse)
        with pytest.raises(OSError, match="the disk refuses"):
            oocattn.survey(result, arrays=["received"], engine="inline")
    oocattn.survey(result, arrays=["entropy"], engine="inline")
    begun: list[oocattn.Event] = []
    oocattn.survey(result, arrays=["received"], engine="inline", callbacks=[begun.append])
    assert not [event for event in begun if event.kind == "started"], "its pass was finished"
    assert {path.name for path in state_of(result).iterdir()} == BESIDE
