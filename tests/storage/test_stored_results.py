"""Results at URLs and in Zarr stores: the same bits, published at once, resumed, and nothing of others touched."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from in_stores import NUMBERS, begin, in_s3, paths_of, seen
from object_store import BUCKET, SECRET, client_of, objects_in
from support import BESIDE, assert_same_bits, carry_out, plan_for

import oocattn
from oocattn.cli.main import main
from oocattn.errors import IntegrityError, LockedError, ProblemError, RemoteDeniedError, TaskError
from oocattn.pipelines import failing
from oocattn.storage.journal import store_lock
from oocattn.storage.paths import ResultPaths
from oocattn.storage.remote import transient
from oocattn.storage.results.stored import stored_result

ASKED: dict[str, Any] = {"kernel": "cpu", "engine": "inline", "chunks": 3, "host_memory": "64MiB"}


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(params=["memory", "s3", "fsspec store", "zarr store", "path in a zarr store", "icechunk"])
def place(request: pytest.FixtureRequest, here: Path) -> dict[str, Any]:
    """A place for a result, as arguments."""
    name = f"r{next(NUMBERS)}.zarr"
    if request.param == "memory":
        return {"result": f"memory://a/{name}"}
    if request.param == "s3":
        return {"result": f"s3://{BUCKET}/a/{name}", "storage_options": request.getfixturevalue("s3")}
    if request.param == "fsspec store":
        return {"result": zarr.storage.FsspecStore.from_url(f"memory://a/{name}")}
    found: dict[str, Any] = {"scratch": here / "scratch", "lock": "none"}
    if request.param == "icechunk":
        icechunk = pytest.importorskip("icechunk")
        repository = icechunk.Repository.create(icechunk.in_memory_storage())
        return {**found, "result": repository.writable_session("main").store}
    store = zarr.storage.MemoryStore()
    return {**found, "result": store if request.param == "zarr store" else zarr.storage.StorePath(store, "a/b")}


def test_a_result_has_the_same_bits_wherever_it_is(
    place: dict[str, Any], plan: oocattn.Plan, dataset: Path, right: oocattn.Result, here: Path
) -> None:
    found = carry_out(plan, dataset, paths_of(place))
    assert_same_bits(found, right)
    opened = oocattn.open(**seen(place))
    assert_same_bits(opened, right)
    assert opened.report == found.report
    assert oocattn.verify(**seen(place), rows=4).passed
    assert oocattn.status(**seen(place)).certificate == "passed"
    assert carry_out(plan, dataset, paths_of(place)).report == found.report
    assert set(here.iterdir()) <= {here / "scratch"}
    changed = carry_out(plan_for(dataset, chunks=3, causal=True), dataset, paths_of(place), overwrite=True)
    assert changed.report.pairs < found.report.pairs
    assert not oocattn.status(**seen(place)).certificate


def test_a_run_is_seen_when_it_is_complete_and_not_before(
    place: dict[str, Any], plan: oocattn.Plan, dataset: Path, right: oocattn.Result
) -> None:
    begin(plan, dataset, place)
    stored = stored_result(place["result"], place.get("storage_options"))
    keys = stored.objects.list()
    assert any(key.startswith("out/c/") for key in keys)
    assert "zarr.json" not in keys
    assert stored.needs_arrays_first or not any(key.endswith("zarr.json") for key in keys)
    with pytest.raises(IntegrityError, match="no finished result here"):
        oocattn.open(**seen(place))
    assert oocattn.status(**seen(place)).state == "interrupted"
    assert_same_bits(oocattn.resume(**place, engine="inline"), right)


def test_a_server_that_fails_and_loses_answers_costs_time_alone(
    plan: oocattn.Plan, dataset: Path, s3: dict[str, Any], right: oocattn.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError
    from s3fs import S3FileSystem

    monkeypatch.setattr(transient, "FIRST_PAUSE", 0.002)
    call, chance = S3FileSystem._call_s3, random.Random(0)

    async def answer(files: Any, method: str, *arguments: Any, **options: Any) -> Any:
        if chance.random() < 0.2:
            if chance.random() < 0.5:
                await call(files, method, *arguments, **options)
            error = {"Code": "ServiceUnavailable", "Message": "no"}
            raise ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": 503}}, method)
        return await call(files, method, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", answer)
    place = in_s3(s3)
    assert_same_bits(carry_out(plan, dataset, paths_of(place)), right)
    beside = place["result"].partition(f"{BUCKET}/")[2] + ".oocattn/"
    assert set(objects_in(s3, beside)) == {f"{beside}{name}" for name in BESIDE}


@pytest.mark.parametrize(("method", "advice"), [("put_object", "may write and remove there"), ("get_object", "anon")])
def test_what_a_server_does_not_allow_is_said_in_one_line(
    plan: oocattn.Plan, dataset: Path, s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str, advice: str
) -> None:
    from botocore.exceptions import ClientError
    from s3fs import S3FileSystem

    call = S3FileSystem._call_s3

    async def answer(files: Any, asked: str, *arguments: Any, **options: Any) -> Any:
        if asked == method:
            error = {"Code": "AccessDenied", "Message": "no"}
            raise ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": 403}}, method)
        return await call(files, asked, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", answer)
    with pytest.raises(RemoteDeniedError, match=r"^(writing|reading) s3://[^\n]*403[^\n]*not allowed") as found:
        carry_out(plan, dataset, paths_of(in_s3(s3)))
    assert (advice in str(found.value), "anon" in str(found.value)) == (True, advice == "anon")


def test_a_chunk_that_others_removed_is_noticed_and_computed_again(
    plan: oocattn.Plan, dataset: Path, s3: dict[str, Any], right: oocattn.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failing, "PAUSES_SECONDS", (0.01,))
    place = in_s3(s3)
    objects = paths_of(place).stored.objects

    def remove(event: oocattn.Event) -> None:
        if event.kind == "written" and event.index == 1:
            objects.remove("out/c/0/0/1/0")

    with pytest.raises(TaskError, match="1 finished chunks are not there any more; resume"):
        carry_out(plan, dataset, paths_of(place), callbacks=[remove])
    assert_same_bits(oocattn.resume(**place, engine="inline"), right)


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_another_machine_resumes_from_the_store(
    partials: Any,
    dataset: Path,
    s3: dict[str, Any],
    fast_path: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, place = plan_for(dataset, chunks=7, partials=partials), {**in_s3(s3), "scratch": "store"}
    name = place["result"].rpartition("/")[2]
    begin(plan, dataset, place)
    assert not list(here.iterdir())
    left = objects_in(s3, name)
    assert any("/scratch/partials/" in key for key in left)
    assert not any(SECRET.encode() in content for content in left.values())
    found = oocattn.status(**place)
    assert (found.state, found.subproblems_done > 0) == ("interrupted", True)
    assert_same_bits(oocattn.resume(**place, engine="inline"), carry_out(plan, dataset, fast_path / "right.zarr"))
    for name_left in ("run.json", "lock-00000003", "scratch/partials/partial-0-0-0"):  # by one that was killed at its end
        client_of(s3).put_object(Bucket=BUCKET, Key=f"{name}.oocattn/{name_left}", Body=b"{}")
    monkeypatch.setattr(store_lock, "BEAT", 0.01)
    oocattn.resume(**place, engine="inline")
    beside = {key.partition(".oocattn/")[2] for key in objects_in(s3, f"{name}.oocattn")}
    assert beside == BESIDE
    assert not list(here.iterdir())


def test_a_run_that_is_taken_over_writes_no_more(
    plan: oocattn.Plan, dataset: Path, s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_lock, "BEAT", 0.01)
    paths = paths_of(in_s3(s3))
    holder = {"host": "h", "process": 1, "kernel": "", "token": "t", "flocked": True}

    def take_over(event: oocattn.Event) -> None:
        if event.kind == "staged":
            paths.beside.create("lock-00000002", json.dumps({"holder": holder}).encode())

    with pytest.raises(LockedError, match="lost to process 1 on host h"):
        carry_out(plan, dataset, paths, callbacks=[take_over])
    assert not any(key.endswith("zarr.json") for key in paths.stored.objects.list())


@pytest.mark.parametrize(
    ("result", "more", "message"),
    [
        ("https://host/r.zarr", {}, "not written to"),
        ("zip::memory://r.zip", {}, "not written to"),
        ("s3://bucket", {}, "a name after the bucket"),
        ("ftp://host/r.zarr", {}, "scheme 'ftp'"),
        ("r.zarr", {"scratch": "folder"}, r"is a local path, and scratch is given"),
        ("r.zarr", {"lock": "none"}, r"is a local path, and lock is given"),
        (zarr.storage.MemoryStore(), {}, "say with scratch "),
        (zarr.storage.MemoryStore(), {"scratch": "store"}, "give a folder as scratch"),
        (zarr.storage.MemoryStore(), {"scratch": "folder"}, "lock='none'"),
        (zarr.storage.MemoryStore(read_only=True), {"scratch": "folder"}, "is read-only"),
        (7, {}, "expected"),
        ("memory://r.zarr", {"scratch": "s3://bucket/scratch"}, "local path"),
    ],
)
def test_what_is_no_place_of_a_result_is_refused(
    result: Any, more: dict[str, Any], message: str, dataset: Path, here: Path
) -> None:
    with pytest.raises(ProblemError, match=message):
        oocattn.attention(dataset, result, **more, **ASKED)
    assert not list(here.iterdir())


def test_workers_in_this_process_write_to_a_store_of_it(dataset: Path, client: Client, fast_path: Path) -> None:
    plan, store = plan_for(dataset, chunks=3), zarr.storage.MemoryStore()
    found = carry_out(plan, dataset, ResultPaths.at(store, fast_path / "scratch", "none"), client)
    assert_same_bits(found, carry_out(plan, dataset, fast_path / "right.zarr"))
    with pytest.raises(ProblemError, match="leave client out"):
        oocattn.attention(dataset, store, client=client, scratch=fast_path / "scratch", lock="none")


def test_a_local_store_is_its_path(plan: oocattn.Plan, dataset: Path, right: oocattn.Result, fast_path: Path) -> None:
    store = zarr.storage.LocalStore(fast_path / "store")
    found = carry_out(plan, dataset, ResultPaths.at(zarr.storage.StorePath(store, "a")))
    assert found.path == fast_path / "store" / "a"
    assert_same_bits(found, right)


def test_the_commit_of_an_icechunk_session_is_the_callers(
    plan: oocattn.Plan, dataset: Path, right: oocattn.Result, here: Path
) -> None:
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.in_memory_storage())
    session = repository.writable_session("main")
    place = zarr.storage.StorePath(session.store, "attention")
    assert_same_bits(carry_out(plan, dataset, ResultPaths.at(place, here / "scratch", "none")), right)
    assert session.has_uncommitted_changes
    session.commit("attention")
    store = repository.readonly_session("main").store
    np.testing.assert_array_equal(zarr.open_array(store, path="attention/out", mode="r")[...], right.out[...])


def test_a_dataset_is_imported_to_where_storage_options_lead(dataset: Path, s3: dict[str, Any], here: Path) -> None:
    for name in "qkv":
        np.save(here / f"{name}.npy", zarr.open_array(dataset, path=name, mode="r")[...])
    place, files = in_s3(s3), {name: here / f"{name}.npy" for name in "qkv"}
    oocattn.import_arrays(place["result"], **files, storage_options=place["storage_options"])
    assert oocattn.plan(place["result"], storage_options=place["storage_options"]).problem == oocattn.plan(dataset).problem


def test_a_missing_bucket_is_one_line(dataset: Path, s3: dict[str, Any], here: Path) -> None:
    with pytest.raises(ProblemError, match="no such bucket"):
        oocattn.attention(dataset, "s3://no-such-bucket/r.zarr", storage_options=s3, **ASKED)
    assert not list(here.iterdir())


def test_the_command_writes_to_urls(
    dataset: Path, s3: dict[str, Any], capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    url = f"s3://{BUCKET}/r{next(NUMBERS)}.zarr"
    options = [f"--storage-option={key}={json.dumps(value)}" for key, value in s3.items()]
    run = ["run", str(dataset), url, "--engine", "inline", "--kernel", "cpu", "--scratch", str(here / "s"), *options]
    assert main(run) == 0
    assert main(["status", url, *options]) == 0
    assert main(["verify", url, "--rows", "4", *options]) == 0
    assert main(run) == 0
    assert "is there already" in capsys.readouterr().out
    shutil.rmtree(here / "s", ignore_errors=True)
    assert not list(here.iterdir())
