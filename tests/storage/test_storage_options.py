"""Storage options reach the file system of a URL, and no message, journal, report or certificate."""

from __future__ import annotations

import base64
import logging
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from http_server import Handler, serving
from interrupting import EnoughError, interrupt
from support import write_dataset

import oocattn
from oocattn.cli.main import main
from oocattn.errors import IntegrityError, ProblemError, RemoteError
from oocattn.storage.locations import parse_location
from oocattn.storage.remote.options import by_protocol
from oocattn.storage.remote.store import open_remote

PASSWORD = "hunter2-of-the-bucket"
NUMBERS = np.random.default_rng(0).standard_normal((3, 1, 2, 32, 8), np.float32)


class Guarded(MemoryFileSystem):
    """A store that asks for a password, and repeats in its errors what it was given."""

    protocol = "s3"

    def __init__(self, key: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.given = key

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("s3://", "memory://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self.given != PASSWORD:
            raise RuntimeError(f"wrong password {self.given}")
        return bytes(super().cat_file(path, start, end, **options))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a dataset for which the option `key` must be right."""
    monkeypatch.setitem(_registry, "s3", Guarded)
    write_dataset(tmp_path / "plain.zarr", tuple(NUMBERS))
    files = fsspec.filesystem("memory")
    files.put(f"{tmp_path}/plain.zarr", f"/{tmp_path.name}", recursive=True)
    return f"s3://{tmp_path.name}"


def everything_in(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_options_open_inputs_behind_urls_and_are_recorded_nowhere(
    guarded: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    options = {"key": PASSWORD}
    result = tmp_path / "results" / "out.zarr"
    result.parent.mkdir()
    asked: dict[str, Any] = {"host_memory": "64MiB", "kernel": "cpu"}
    print(oocattn.plan(guarded, storage_options=options, engine="inline", **asked))
    print(oocattn.attention(guarded, result, storage_options=options, engine="inline", **asked).report)
    print(oocattn.verify(result, inputs=guarded, storage_options=options, rows=4))
    assert main(["verify", str(result), "--rows", "4", "--dataset", guarded, "--storage-option", f"key={PASSWORD}"]) == 0
    assert PASSWORD not in everything_in(result.parent) + caplog.text + "".join(capsys.readouterr())


def test_options_open_tensors_one_by_one_and_are_given_again_to_resume(
    guarded: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    option = f"--storage-option=key={PASSWORD}"
    named = [f"--{name}={guarded}/{name}" for name in "qkv"]
    result, tensors = tmp_path / "results" / "out.zarr", {name: f"{guarded}/{name}" for name in "qkv"}
    result.parent.mkdir()
    assert main(["import", str(tmp_path / "results" / "imported.zarr"), *named, option]) == 0
    assert main(["plan", *named, option, "--kernel", "cpu"]) == 0
    asked: dict[str, Any] = {"host_memory": "64MiB", "kernel": "cpu", "chunks": 2, "checkpoint_interval": 0}
    options = {"storage_options": {"key": PASSWORD}, "engine": "inline"}
    with pytest.raises(EnoughError):
        oocattn.attention(tensors, result, **options, **asked, callbacks=[interrupt("written", 1)])
    with pytest.raises(IntegrityError, match=r"recorded as .*s3://.*name it with inputs"):
        oocattn.resume(result, engine="inline")
    assert main(["resume", str(result), *named, option, "--engine", "inline"]) == 0
    assert oocattn.verify(result, inputs=tensors, rows=4, storage_options={"key": PASSWORD}).outcome == "passed"
    said = "".join(capsys.readouterr())
    assert PASSWORD not in everything_in(result.parent) + caplog.text + said


@pytest.mark.parametrize("given", [None, {"key": "not-this-one"}, {"s3": {"key": "not-this-one"}}])
def test_a_refused_password_is_not_in_the_error(given: Any, guarded: str) -> None:
    with pytest.raises(RemoteError, match="wrong password") as caught:
        oocattn.plan(guarded, storage_options=given)
    assert "not-this-one" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("given", [["key=hunter2"], "key=hunter2", {7: "hunter2"}, 7])
def test_options_that_are_no_mapping_are_refused_without_their_values(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="storage_options") as caught:
        oocattn.plan(tmp_path, storage_options=given)
    assert "hunter2" not in str(caught.value)


def test_options_of_a_command_are_json_or_text(capsys: pytest.CaptureFixture[str]) -> None:
    from oocattn.cli.inputs import given_storage_options
    from oocattn.cli.options import _COMMANDS, make_parser

    words = ["anon=true", "key=abc=", 'client_kwargs={"region_name": "x"}', "number=NaN", "empty="]
    typed = ["plan", "DATASET", *(f"--storage-option={word}" for word in words)]
    parser = make_parser(dict.fromkeys(_COMMANDS, lambda _: 0))
    found = given_storage_options(parser.parse_args(typed))
    assert found == {"anon": True, "key": "abc=", "client_kwargs": {"region_name": "x"}, "number": "NaN", "empty": ""}
    for words in (["--storage-option=a=hunter2", "--storage-option=a=hunter3"], ["--storage-option", "hunter2"]):
        with pytest.raises(SystemExit):
            main(["plan", "DATASET", *words])
    said = capsys.readouterr().err
    assert "given twice" in said
    assert "expected KEY=VALUE" in said
    assert "hunter" not in said


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://b/x", {"s3": {"anon": True}}),
        ("zip::s3://b/x.zip", {"s3": {"anon": True}}),
        ("zip::/b/x.zip", {"file": {"anon": True}}),
        ("zip://part::https://h/x.zip", {"https": {"anon": True}}),
    ],
)
def test_options_are_those_of_the_last_link(url: str, expected: dict[str, Any]) -> None:
    assert by_protocol(url, {"anon": True}) == expected
    assert by_protocol(url, expected) == expected


def test_http_options_do_not_replace_the_checks_of_redirects() -> None:
    store = open_remote(parse_location("http://127.0.0.1:9/x"), {"headers": {"X-Key": PASSWORD}, "get_client": None})
    assert store.fs.kwargs["headers"] == {"X-Key": PASSWORD}
    assert store.fs.get_client.__module__ == "oocattn.storage.remote.http_files"


def test_user_and_password_of_a_url_open_it_and_are_shown_and_recorded_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "oocattn")
    (tmp_path / "served").mkdir()
    write_dataset(tmp_path / "served" / "qkv.zarr", tuple(NUMBERS))
    expected = f"Basic {base64.b64encode(f'me:{PASSWORD}'.encode()).decode()}"

    def refuse(request: Handler) -> bool:
        if allowed := request.headers.get("Authorization") == expected:
            return False
        request.answer(401)
        return not allowed

    with serving(tmp_path / "served") as server:
        server.fault = refuse
        url = server.url.replace("://", f"://me:{PASSWORD}@") + "/qkv.zarr"
        asked: dict[str, Any] = {"host_memory": "64MiB", "kernel": "cpu", "engine": "inline"}
        result = tmp_path / "results" / "out.zarr"
        with suppress(KeyboardInterrupt):
            oocattn.attention(url, result, callbacks=[_stop], **asked)
        assert main(["status", str(result)]) == 0
        assert f"--dataset {server.url}/qkv.zarr (with" in capsys.readouterr().out
        assert main(["resume", str(result), "--dataset", url, "--engine", "inline"]) == 0
        assert main(["verify", str(result), "--dataset", url, "--rows", "2"]) == 0
        apart = {name: f"{url}/{name}" for name in "qkv"}
        print(oocattn.attention(apart, tmp_path / "results" / "apart.zarr", **asked).report)
        server.fault = lambda request: request.answer(403) or True
        assert main(["plan", url]) == 1
    printed = "".join(capsys.readouterr())
    assert "not allowed" in printed
    assert PASSWORD not in everything_in(result.parent) + caplog.text + printed


def _stop(event: oocattn.Event) -> None:
    raise KeyboardInterrupt
