"""Results in stores beside what is somebody else's: objects of others, and job state of other results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from in_stores import NUMBERS, begin, in_s3, paths_of
from object_store import BUCKET, client_of, objects_in
from support import assert_same_bits, carry_out, plan_for

import oocattn
from oocattn.errors import ProblemError, ResultExistsError, TaintedError
from oocattn.storage.journal.store_lock import StoreLock
from oocattn.storage.paths import ResultPaths
from oocattn.storage.state_folder import folder_of_url

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("found", ["a file", "an array", "a group", "an unfinished array", "an array beside chunks"])
def test_what_others_have_put_there_is_refused_and_left(
    found: str, plan: oocattn.Plan, dataset: Path, s3: dict[str, Any]
) -> None:
    name = f"taken{next(NUMBERS)}"
    url, client = f"s3://{BUCKET}/{name}", client_of(s3)
    if found == "a file":
        client.put_object(Bucket=BUCKET, Key=f"{name}/notes.txt", Body=b"mine")
    elif found == "an array beside chunks":
        begin(plan, dataset, {"result": url, "storage_options": s3})
        zarr.save_array(f"{url}/mine", np.arange(3), storage_options=s3)
    elif found == "an unfinished array":
        client.put_object(Bucket=BUCKET, Key=f"{name}/out/c/0/0/0/0", Body=b"mine")
    elif found == "an array":
        zarr.save_array(url, np.arange(3), storage_options=s3)
    else:
        zarr.open_group(url, mode="w", storage_options=s3)
    before = objects_in(s3, name)
    for overwrite in (False, True):
        with pytest.raises(ResultExistsError):
            carry_out(plan_for(dataset, chunks=1), dataset, ResultPaths.at(url, storage_options=s3), overwrite=overwrite)
    assert objects_in(s3, name) == before


def test_what_others_put_there_while_it_grows_stays_when_it_is_discarded(
    plan: oocattn.Plan, dataset: Path, s3: dict[str, Any]
) -> None:
    place, client = in_s3(s3), client_of(s3)
    name = str(place["result"]).rpartition("/")[2]
    others = {"notes.txt", "mine/zarr.json", "out/mine.json"}

    def disturb(event: oocattn.Event) -> None:
        if event.kind == "staged":
            for key in others:
                client.put_object(Bucket=BUCKET, Key=f"{name}/{key}", Body=b"mine")
            os.utime(dataset / "k" / "c" / "0" / "0" / "0" / "0")

    with pytest.raises(TaintedError):
        carry_out(plan, dataset, paths_of(place), callbacks=[disturb])
    assert {key.partition("/")[2] for key in objects_in(s3, f"{name}/")} == others


@pytest.mark.parametrize("scratch", [None, "store"])
def test_results_of_the_same_name_have_job_state_of_their_own(
    scratch: str | None, plan: oocattn.Plan, dataset: Path, s3: dict[str, Any], right: oocattn.Result
) -> None:
    number = next(NUMBERS)
    one, other = ({"result": f"s3://{BUCKET}/{of}{number}/out.zarr", "storage_options": s3} for of in ("x", "y"))
    kept = {"scratch": scratch} if scratch else {}
    begin(plan, dataset, {**one, **kept})
    assert oocattn.status(**other, **kept).state == "none"
    assert_same_bits(carry_out(plan, dataset, paths_of({**other, **kept})), right)
    left = oocattn.status(**one, **kept)
    assert left.state == "interrupted"
    assert "EnoughError" in left.error
    assert "was killed" not in str(left)
    assert_same_bits(oocattn.resume(**one, **kept, engine="inline"), right)


def test_a_folder_with_the_job_state_of_another_result_is_refused(
    plan: oocattn.Plan, dataset: Path, s3: dict[str, Any], here: Path, right: oocattn.Result
) -> None:
    one, other = ({**in_s3(s3), "scratch": here / "shared"} for _ in range(2))
    begin(plan, dataset, one)
    for call in (oocattn.status, oocattn.resume):
        with pytest.raises(ResultExistsError, match=f"holds the job state of {one['result']}"):
            call(**other)
    with pytest.raises(ResultExistsError, match="give another folder"):
        oocattn.attention(dataset, **other, overwrite=True)
    in_memory = {"result": zarr.storage.StorePath(zarr.storage.MemoryStore(), "a"), "lock": "none"}
    with pytest.raises(ResultExistsError, match="not of a result in a store of this process"):
        oocattn.attention(dataset, **in_memory, scratch=here / "shared", overwrite=True)
    assert_same_bits(oocattn.resume(**one, engine="inline"), right)
    assert_same_bits(carry_out(plan, dataset, paths_of(other)), right)  # the folder is free again


def test_the_docs_name_the_folder_of_a_url(here: Path) -> None:
    folder = folder_of_url("s3://bucket/out.zarr", None)
    docs = Path(oocattn.__file__).parents[1] / "docs" / "remote.md"
    assert folder.parent == here
    assert f"`{folder.name}`" in docs.read_text()


def test_a_run_of_another_folder_is_refused_unless_it_is_to_be_replaced(
    plan: oocattn.Plan,
    dataset: Path,
    s3: dict[str, Any],
    right: oocattn.Result,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = in_s3(s3)
    begin(plan, dataset, place)
    elsewhere = here.with_name("elsewhere")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ResultExistsError, match=f"its job state in {here}.* on host .*: resume it there"):
        carry_out(plan, dataset, paths_of(place))
    with pytest.raises(ProblemError, match=f"no run to resume from here, but one with its job state in {here}"):
        oocattn.resume(**place, engine="inline")
    assert not list(elsewhere.iterdir())
    found = oocattn.status(**place)
    assert (found.state, str(here) in found.error) == ("interrupted", True)
    beside = paths_of(place).beside
    assert beside is not None
    with StoreLock(beside, "there"):
        found = oocattn.status(**place)
        assert (found.state, str(here) in found.holder) == ("running", True)
    assert_same_bits(carry_out(plan, dataset, paths_of(place), overwrite=True), right)
    monkeypatch.chdir(here)
    with pytest.raises(ResultExistsError, match="is not the place of the unfinished run in"):
        oocattn.resume(**place, engine="inline")
