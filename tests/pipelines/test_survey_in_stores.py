"""Surveys of results in Zarr stores and at URLs: the bits of a local one, whole arrays or none, nothing else left."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from interrupting import EnoughError, interrupt
from object_store import BUCKET, objects_in
from passes import ARRAYS, bits, planned
from support import BESIDE, normal_arrays, write_dataset

import oocattn
from oocattn import ProblemError, ResultExistsError, Survey
from oocattn.storage.paths import SURVEY
from oocattn.storage.remote.objects import Objects

TOKENS = 120

NUMBERS = itertools.count()

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def dataset(shared_path: Path) -> Path:
    return write_dataset(shared_path / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2))


@pytest.fixture(scope="module")
def right(dataset: Path, shared_path: Path) -> dict[str, bytes]:
    """The bits of the survey of a local result."""
    oocattn.attention(dataset, shared_path / "right.zarr", engine="inline")
    return bits(survey({"result": shared_path / "right.zarr"}))


PLACES = ["memory", "zarr store", "path in a zarr store", "s3", "icechunk"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, here: Path, dataset: Path) -> dict[str, Any]:
    """A finished result, as arguments."""
    name, found = f"r{next(NUMBERS)}.zarr", {"scratch": here / "scratch", "lock": "none"}
    if request.param == "memory":
        found = {"result": f"memory://surveys/{name}"}
    elif request.param == "s3":
        found = {"result": f"s3://{BUCKET}/a/{name}", "storage_options": request.getfixturevalue("s3")}
    elif request.param == "icechunk":
        icechunk = pytest.importorskip("icechunk")
        found["result"] = icechunk.Repository.create(icechunk.in_memory_storage()).writable_session("main").store
    else:
        store = zarr.storage.MemoryStore()
        found["result"] = store if request.param == "zarr store" else zarr.storage.StorePath(store, "a/b")
    oocattn.attention(dataset, **found, engine="inline")
    return found


def survey(place: dict[str, Any], **options: Any) -> Survey:
    with planned(3):
        return oocattn.survey(**place, **{"engine": "inline", "pool": 7, **options})


def group_of(place: dict[str, Any], **options: Any) -> zarr.Group:
    return zarr.open_group(place["result"], mode="r", storage_options=place.get("storage_options"), **options)


def keys_of(place: dict[str, Any]) -> set[str]:
    """The first parts of the keys of a result at a URL, and what is beside it."""
    name = place["result"].partition(f"{BUCKET}/")[2]
    found = {key.removeprefix(name) for key in objects_in(place["storage_options"], name)}
    return {key.strip("/").partition("/")[0] if key.startswith("/") else key for key in found}


def test_a_survey_has_the_bits_of_that_of_a_local_result(place: dict[str, Any], right: dict[str, bytes], here: Path) -> None:
    found = survey(place)
    assert bits(found) == right
    assert {name: np.asarray(group_of(place)[name]).tobytes() for name in ARRAYS} == right
    document = group_of(place).metadata.consolidated_metadata
    if document is not None:
        assert set(document.metadata) == {"out", "lse", *ARRAYS}
    assert not [path for path in here.rglob("*") if SURVEY in path.name or path.name == "added.zarr"]
    begun: list[oocattn.Event] = []
    assert bits(survey(place, callbacks=[begun.append])) == right
    assert not begun, "it is found"


@pytest.mark.parametrize("place", [place for place in PLACES if place != "s3"], indirect=True)
def test_a_surveyed_result_in_a_store_is_surveyed_again_verified_and_replaced(place: dict[str, Any], dataset: Path) -> None:
    survey(place)
    with pytest.raises(ResultExistsError, match="of another survey"):
        survey(place, top=3)
    assert survey(place, top=3, overwrite=True).arrays["top_keys"].shape == (1, 4, TOKENS, 3)
    read = {name: value for name, value in place.items() if name != "lock"}
    assert oocattn.verify(**read, rows=4).passed
    assert oocattn.status(**read).state == "finished"
    oocattn.attention(dataset, **place, causal=True, engine="inline", overwrite=True)
    assert {name for name, _ in group_of(place, use_consolidated=False).arrays()} == {"out", "lse"}


def test_a_result_that_is_open_is_surveyed_and_verified_where_it_is(place: dict[str, Any], right: dict[str, bytes]) -> None:
    """Without storage options: its store is open."""
    own = {name: value for name, value in place.items() if name in ("scratch", "lock")}
    opened = oocattn.open(**{name: value for name, value in place.items() if name != "lock"})
    assert bits(survey({"result": opened, **own})) == right
    assert {name: np.asarray(group_of(place)[name]).tobytes() for name in ARRAYS} == right
    own.pop("lock", None)
    certificate = oocattn.verify(opened, rows=4, **own)
    assert (certificate.passed, certificate.result) == (True, str(opened.path))
    assert oocattn.status(opened, **own).certificate == "passed"


def in_s3(options: dict[str, Any], dataset: Path) -> dict[str, Any]:
    place = {"result": f"s3://{BUCKET}/r{next(NUMBERS)}.zarr", "storage_options": options}
    oocattn.attention(dataset, **place, engine="inline")
    return place


def test_nothing_is_left_beside_a_result_at_a_url(s3: dict[str, Any], dataset: Path, here: Path) -> None:
    place = in_s3(s3, dataset)
    cut_off(place)
    survey(place)
    assert keys_of(place) == {"zarr.json", "out", "lse", *ARRAYS, *(f".oocattn/{name}" for name in BESIDE)}
    assert not list(here.iterdir())


def cut_off(place: dict[str, Any], kind: str = "attended", count: int = 4, **options: Any) -> None:
    with pytest.raises(EnoughError):
        survey(place, callbacks=[interrupt(kind, count)], **options)


@pytest.mark.parametrize("kind", ["attended", "written", "ended"])
def test_a_survey_of_a_result_in_memory_goes_on_from_its_scratch(
    kind: str, dataset: Path, right: dict[str, bytes], here: Path
) -> None:
    place = {"result": zarr.storage.MemoryStore(), "scratch": here / "scratch", "lock": "none"}
    oocattn.attention(dataset, **place, engine="inline")
    cut_off(place, kind, 1)
    assert {name for name, _ in group_of(place).arrays()} == {"out", "lse"}
    begun: list[bool] = []
    found = survey(place, callbacks=[lambda event: begun.append(event.resumed) if event.kind == "started" else None])
    assert begun == ([] if kind == "ended" else [True])
    assert bits(found) == right


@pytest.mark.parametrize("replaces", [False, True], ids=["added", "replaced"])
def test_a_store_that_fails_at_any_change_has_whole_arrays_or_none(
    replaces: bool, dataset: Path, right: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, scratch = zarr.storage.MemoryStore(), here / "scratch"
    place = {"result": store, "scratch": scratch, "lock": "none"}
    oocattn.attention(dataset, **place, engine="inline")
    before = bits(survey(place, top=3, pool=5)) if replaces else {}
    kept = dict(store._store_dict)
    shutil.copytree(scratch, here / "kept")
    after, failed = 0, True
    while failed:
        store._store_dict.clear()
        store._store_dict.update(kept)
        shutil.rmtree(scratch)
        shutil.copytree(here / "kept", scratch)
        with monkeypatch.context() as patch, suppress(EnoughError):
            changes = fail_at_change(patch, after)
            survey(place, overwrite=replaces)
        for consolidated in (None, False):
            for name, array in group_of(place, use_consolidated=consolidated).arrays():
                if name in ARRAYS and array.attrs["oocattn"] != {"unfinished": True}:
                    assert np.asarray(array).tobytes() in (right[name], before.get(name)), name
        assert bits(survey(place, overwrite=replaces)) == right
        assert {name: np.asarray(group_of(place)[name]).tobytes() for name in ARRAYS} == right
        failed, after = len(changes) > after, 2 * after + 1
    assert after > 20


def fail_at_change(patch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Have the `after`-th change of a store not happen, and what does it be interrupted; return the keys of all changes."""
    changes: list[str] = []

    def failing(real: Callable[..., None]) -> Callable[..., None]:
        def change(objects: Objects, key: str, *content: bytes) -> None:
            changes.append(key)
            if len(changes) == after + 1:
                raise EnoughError
            real(objects, key, *content)

        return change

    for name in ("write", "remove"):
        patch.setattr(Objects, name, failing(getattr(Objects, name)))
    return changes


def test_a_place_to_which_nothing_could_be_added_is_refused_before_anything_is_computed(dataset: Path, here: Path) -> None:
    place = {"result": zarr.storage.MemoryStore(), "scratch": here / "scratch"}
    oocattn.attention(dataset, **place, lock="none", engine="inline")
    before = set((here / "scratch").iterdir())
    begun: list[oocattn.Event] = []
    with pytest.raises(ProblemError, match="say so with lock='none'"):
        survey(place, callbacks=[begun.append])
    read_only = place["result"].with_read_only(True)
    with pytest.raises(ProblemError, match="read-only"):
        survey({**place, "result": read_only, "lock": "none"}, callbacks=[begun.append])
    url = {"result": f"memory://surveys/r{next(NUMBERS)}.zarr", "scratch": "store"}
    oocattn.attention(dataset, **url, engine="inline")
    with pytest.raises(ProblemError, match="scratch = 'store': a survey keeps its job state in a folder"):
        survey(url, callbacks=[begun.append])
    assert not begun
    assert set((here / "scratch").iterdir()) == before
