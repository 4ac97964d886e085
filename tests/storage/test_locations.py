"""What is opened is what the caller named: files name local paths alone, and URLs have schemes that do not run code."""

import os
import socket
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zarr
from support import normal_arrays, write_dataset

import oocattn
from oocattn import IntegrityError, ProblemError
from oocattn.storage.create import create_dataset
from oocattn.storage.dataset import Dataset
from oocattn.storage.importing import import_arrays
from oocattn.storage.locations import parse_location, recorded_location
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
    for typed, path in {
        "/x": "/x",
        "/x/a::b": "/x/a::b",
        "/s3://x": "/s3:/x",
        "x": tmp_path / "x",
        "./s3://x": tmp_path / "s3:/x",
        "~/x": tmp_path / "~/x",
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
    with pytest.raises(IntegrityError, match=r"recorded as [^\n\x1b]* an absolute local path .*--dataset"):
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
    with pytest.raises(IntegrityError, match=r"recorded as [^\n\x1b]*--dataset"):
        oocattn.verify(result)
    assert oocattn.verify(result, dataset=dataset).passed


def test_a_location_is_shown_without_credentials() -> None:
    for typed, shown in {
        "https://me:secret@host/x": "https://host/x",
        "https://token@host:80/x@y": "https://host:80/x@y",
        "https://host:80/x@y": "https://host:80/x@y",
        "zip::https://me:se@cret@host/x.zip": "zip::https://host/x.zip",
        "s3://key:secret@bucket/x": "s3://bucket/x",
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
