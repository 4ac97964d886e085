"""What is opened is what the caller named: files name local paths alone, and URLs have schemes that do not run code."""

import os
import re
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import zarr
from support import normal_arrays, plan_for, write_dataset

import oocattn
from oocattn import IntegrityError, ProblemError, synthesise
from oocattn.naming import on_command_line
from oocattn.pipelines.watch.timeline import Timeline
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.locations import parse_location, recorded_location
from oocattn.storage.make.create import create_dataset
from oocattn.storage.make.importing import import_arrays
from oocattn.storage.paths import ResultPaths


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        pytest.fail(f"opened {arguments} {options}")

    for owner, name in [(socket.socket, "connect"), (fsspec, "filesystem"), (fsspec.core, "url_to_fs")]:
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(fsspec.core, "get_filesystem_class", refuse)


REFUSED = [
    "dask://127.0.0.1:8786/x",
    "ftp://host/x",
    "sftp://host/x",
    "reference://x",
    "github://owner:repo@main/x",
    "DASK://127.0.0.1:8786/x",
    " s3://bucket/x",
    "s3 ://bucket/x",
    "://x",
    "local:///x",
    "s3://bucket/x\n",
    "zip::dask://127.0.0.1:8786/x.zip",
    "dask::s3://bucket/x",
    "reference::s3://bucket/x",
    "s3://bucket/x::zip://",
    "simplecache::reference::file:///x",
    "zip::zip",
    "zip::",
    "::",
    "file://host/x",
    "file:relative",
    "file://relative/x",
    "file:///x?y",
    "file:///%00",
    "file:///x#y",
    "x\0y",
    "",
]


@pytest.mark.usefixtures("nothing_is_opened")
@pytest.mark.parametrize("typed", REFUSED)
def test_other_schemes_and_chains_are_refused_before_anything_is_opened(typed: str) -> None:
    with pytest.raises(ProblemError, match=r"^[^\n\0]*$"):
        Dataset.open(typed)
    with pytest.raises(ProblemError), create_dataset(typed, attributes={}):
        pass
    with pytest.raises(ProblemError):
        ResultPaths.at(typed)
    with pytest.raises(ProblemError):
        import_arrays("x", q=typed + ".npy", k=typed, v=typed)


def test_paths_and_file_urls_are_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for typed, path in {
        "/x": "/x",
        "/x/a::b": "/x/a::b",
        "/s3://x": "/s3:/x",
        "x": tmp_path / "x",
        "./s3://x": tmp_path / "s3:/x",
        "~": "/home/me",
        "~/x": "/home/me/x",
        "~/a::b": "/home/me/a::b",
        "~root/x": Path("~root").expanduser() / "x",
        "~nobody of that name/x": tmp_path / "~nobody of that name/x",
        "./~/x": tmp_path / "~/x",
        "/~/x": "/~/x",
        "file:///~/x": "/~/x",
        Path("~/x"): "/home/me/x",
        PurePosixPath("x"): tmp_path / "x",
        "s3:x": tmp_path / "s3:x",
        "file:///x%20y": "/x y",
        "FILE:///x": "/x",
        "file:/x": "/x",
        "file://localhost/x": "/x",
        "file:///%C3%A9": "/é",
        Path("dask://x"): tmp_path / "dask:/x",
        Path("a::b"): tmp_path / "a::b",
    }.items():
        found = parse_location(typed)
        assert found.path == Path(path)
        assert found.text == str(path)
        assert parse_location(found) == found
    with pytest.raises(ProblemError, match="chain"):
        parse_location("a::b")
    (tmp_path / "a::b").mkdir()
    (tmp_path / "file:x").mkdir()
    assert parse_location("a::b").path == tmp_path / "a::b"
    assert parse_location("file:x").path == tmp_path / "file:x"


def test_remote_locations_keep_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.zip").touch()
    for typed, text in {
        "s3://bucket/x y": "s3://bucket/x y",
        "S3://Bucket/x": "s3://Bucket/x",
        "https://host:80/x?y#z": "https://host:80/x?y#z",
        "memory://x": "memory://x",
        "simplecache::GS://bucket/x": "simplecache::gs://bucket/x",
        "zip://q/r::x.zip": f"zip://q/r::{tmp_path}/x.zip",
        "filecache::zip::abfs://x.zip": "filecache::zip::abfs://x.zip",
    }.items():
        assert parse_location(typed).text == text
        assert parse_location(typed).path is None


def test_a_chain_ends_at_a_file_that_can_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.zip")
    with pytest.raises(ProblemError, match=r"x.zip is no regular file"):
        Dataset.open(f"zip::{tmp_path}/x.zip")


@pytest.mark.parametrize(
    "recorded", [*REFUSED, "s3://bucket/x", "memory://x", "file:///x", "relative", "/x\x1b[2J", None, 7]
)
def test_a_file_names_local_paths_alone(recorded: Any) -> None:
    with pytest.raises(IntegrityError, match=r"recorded as [^\n\x1b]* an absolute local path .* with inputs$"):
        recorded_location(recorded)
    assert str(recorded_location("/x/y::z").path) == "/x/y::z"


@pytest.mark.parametrize("recorded", ["dask://127.0.0.1:8786/x", "ftp://host/x", "zip::file:///x.zip", "\x1b[2J"])
def test_verify_opens_nothing_that_a_result_names(tmp_path: Path, recorded: str, request: pytest.FixtureRequest) -> None:
    dataset, result = write_dataset(tmp_path / "dataset.zarr", normal_arrays(20)), tmp_path / "result.zarr"
    oocattn.attention(dataset, result, kernel="cpu")
    group = zarr.open_group(result, mode="r+")
    attributes = group.attrs["oocattn"]
    group.attrs["oocattn"] = {**attributes, "dataset": {**attributes["dataset"], "location": recorded}}
    request.getfixturevalue("nothing_is_opened")
    with pytest.raises(IntegrityError, match=r"recorded as [^\n\x1b]* with inputs$"):
        oocattn.verify(result)
    assert oocattn.verify(result, inputs=dataset).passed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a space in its name, and an empty current folder beside it."""
    for name in ("my home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "my home"


def as_tilde(home: Path, name: str) -> str:
    return f"~/{name}"


def as_file_url(home: Path, name: str) -> str:
    return (home / name).as_uri()


def as_url_of_this_host(home: Path, name: str) -> str:
    return f"file://localhost{home.as_uri().removeprefix('file://')}/{name}"


def as_path(home: Path, name: str) -> Path:
    return Path("~") / name


@pytest.mark.parametrize("typed", [as_tilde, as_file_url, as_url_of_this_host, as_path])
def test_every_path_may_be_below_home_or_a_file_url(home: Path, typed: Callable[[Path, str], Any]) -> None:
    def place(name: str) -> Any:
        return typed(home, name)

    synthesise(place("qkv.zarr"), tokens=20, heads=2, head_dim=8, dtype="float32")
    oocattn.plan(place("qkv.zarr"), kernel="cpu", result=place("out.zarr")).visualize(place("plan.svg"))
    timeline = Timeline(place("timeline.json"))
    oocattn.attention(place("qkv.zarr"), place("out.zarr"), kernel="cpu", callbacks=[timeline])
    assert oocattn.status(place("out.zarr")).state == "finished"
    assert oocattn.resume(place("out.zarr"), inputs=place("qkv.zarr")).path == home / "out.zarr"
    assert oocattn.verify(place("out.zarr"), inputs=place("qkv.zarr")).passed
    np.save(home / "q.npy", np.zeros((1, 2, 20, 8), np.float32))
    import_arrays(place("imported.zarr"), q=place("q.npy"), k=place("q.npy"), v=place("q.npy"))
    files = ("qkv.zarr", "out.zarr", "plan.svg", "timeline.json", "timeline.svg", "imported.zarr")
    assert all((home / name).exists() for name in files)
    assert not os.listdir()


@pytest.mark.parametrize("url", ["s3://bucket/x", "memory://x", "ftp://host/x", "zip::s3://bucket/x"])
def test_local_outputs_are_refused_at_a_url(url: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(20))
    works: dict[str, Callable[[], Any]] = {
        "timeline": lambda: Timeline(f"{url}.json"),
        "picture": lambda: plan_for(dataset).visualize(url),
    }
    for what, work in works.items():
        with pytest.raises(ProblemError, match=f"{what} {url}.*: {what}s are written to a local path, not to a URL"):
            work()


@pytest.mark.parametrize("root", ["/", "file:///", "/usr/.."])
def test_a_result_has_a_name(root: str) -> None:
    with pytest.raises(ProblemError, match="result /: expected a path with a name"):
        oocattn.status(root)


def test_a_user_without_a_home_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    with pytest.raises(ProblemError, match=r"^~/x: this user has no home folder; give an absolute path$"):
        parse_location("~/x")


class Unprintable:
    """An object that is no path."""

    def __str__(self) -> str:
        pytest.fail("asked for its text")


NO_PATHS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "None": (lambda folder: None, "found None"),
    "bytes": (lambda folder: b"dataset.zarr", r"found the bytes b'dataset.zarr'.*os\.fsdecode"),
    "int": (lambda folder: 3, "found the int 3"),
    "bool": (lambda folder: True, "found the bool True"),
    "object": (lambda folder: Unprintable(), r"found a test_locations\.Unprintable"),
    "list": (lambda folder: ["dataset.zarr"], "found a list"),
    "tensors": (lambda folder: (torch.zeros(2, 3),) * 3, "found a tuple"),
}


@pytest.mark.parametrize(("make", "message"), NO_PATHS.values(), ids=NO_PATHS)
def test_an_object_that_is_no_path_is_refused_with_its_type(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(20))
    found, there = make(tmp_path), set(os.listdir(tmp_path))
    shape: dict[str, Any] = {"tokens": 20, "heads": 2, "head_dim": 8, "dtype": "float32"}
    works: list[Callable[[], Any]] = [
        lambda: oocattn.plan(found),
        lambda: oocattn.attention(found, tmp_path / "result.zarr"),
        lambda: synthesise(found, **shape),
        lambda: oocattn.attention(dataset, found),
        lambda: oocattn.resume(found),
        lambda: oocattn.status(found),
        lambda: oocattn.verify(found),
        lambda: Timeline(found),
        lambda: import_arrays(tmp_path / "imported.zarr", q=found, k=found, v=found),
    ]
    if found is not None:
        works += [lambda: oocattn.plan(dataset, result=found), lambda: oocattn.resume(tmp_path / "none", inputs=found)]
    for number, work in enumerate(works):
        with pytest.raises(ProblemError, match=r"^[a-z]+: found .*, expected ") as refused:
            work()
        if number < 3:
            assert re.search(message, str(refused.value))
    assert set(os.listdir(tmp_path)) == there


@pytest.mark.parametrize(
    "url",
    [
        *("s3://KEY:secret@bucket/x", "s3://KEY:se cret@bucket/x", "s3://KEY:se/cret@bucket/x", "s3://secret@bucket/x"),
        *("gs://me:secret@bucket/x", "az://me:secret@container/x", "abfs://me:secret@account.host/x"),
        "simplecache::s3://KEY:secret@bucket/x",
        "zip::s3://KEY:secret@bucket/x.zip",
        "memory://me:secret@place",
    ],
)
@pytest.mark.parametrize("command", [False, True], ids=["Python", "command"])
def test_credentials_in_the_place_of_a_bucket_are_refused_and_not_shown(url: str, command: bool) -> None:
    with on_command_line() if command else nullcontext(), pytest.raises(ProblemError) as refused:
        parse_location(url)
    assert f"give them with {'--storage-option KEY=VALUE' if command else 'storage_options'}, or in" in str(refused.value)
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize("url", ["s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine/x", "s3://bucket/x@y:z@"])
def test_a_bucket_and_a_key_may_have_colons_and_ats(url: str) -> None:
    assert parse_location(url).text == str(parse_location(url)) == url


def test_a_location_is_shown_without_credentials() -> None:
    for typed, shown in {
        "https://me:secret@host/x": "https://host/x",
        "https://me:se cr et@host/x": "https://host/x",
        "http://[::1]:80/x": "http://[::1]:80/x",
        "http://me:secret@[::1]/x": "http://[::1]/x",
        "https://token@host:80/x@y": "https://host:80/x@y",
        "https://host:80/x@y": "https://host:80/x@y",
        "zip::https://me:se@cret@host/x.zip": "zip::https://host/x.zip",
        "abfs://container@account.host/x": "abfs://container@account.host/x",
        "https://host/x.zip?X-Amz-Signature=secret&part=1": "https://host/x.zip?X-Amz-Signature=***&part=1",
        "https://host/x?sv=1&sig=secret": "https://host/x?sv=1&sig=***",
    }.items():
        assert parse_location(typed).text == typed
        assert str(parse_location(typed)) == shown
    for refused in ("ftp://me:secret@host/x", "https://me:sec/ret@host/x\n"):
        with pytest.raises(ProblemError, match="host/x") as found:
            parse_location(refused)
        assert "ret" not in str(found.value)
