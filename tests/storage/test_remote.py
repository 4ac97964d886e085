"""Datasets behind http: every request of every command survives what passes, and tells what does not in one line."""

from __future__ import annotations

import gzip
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from http_server import PAGE, TRANSIENT, Fault, Handler, Server, drop, first_try, serving, stall, status
from support import assert_same_bits, carry_out, normal_arrays, plan_for, write_dataset

import oocattn
from oocattn.cli.main import main
from oocattn.errors import IntegrityError, ProblemError, RemoteDeniedError, RemoteError
from oocattn.pipelines.run import find_unfinished
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.paths import ResultPaths
from oocattn.storage.remote import transient

aiohttp = pytest.importorskip("aiohttp")
http_files = pytest.importorskip("oocattn.storage.remote.http_files")

ARRAYS = normal_arrays(64)

STORAGE: dict[str, dict[str, Any]] = {
    "plain": {},
    "zstd": {"compressors": zarr.codecs.ZstdCodec()},
    "sharded": {"shards": (1, 1, 64, 8)},
}

SOME_SECONDS = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for name, storage in STORAGE.items():
        write_dataset(folder / f"{name}.zarr", ARRAYS, chunk_rows=32, **storage)
    return folder


@pytest.fixture(scope="module")
def right(folder: Path) -> oocattn.Result:
    with serving(folder) as served:
        url: Any = f"{served.url}/plain.zarr"
        return carry_out(plan_for(url, chunks=3), url, folder / "right")


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as served:
        yield served


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a minute takes a moment."""
    monkeypatch.setattr(transient, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(transient, "PATIENCE", SOME_SECONDS)
    monkeypatch.setattr(transient.retry, "__defaults__", (SOME_SECONDS,))


@pytest.fixture
def impatient(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, for what fails for good."""
    monkeypatch.setattr(transient.retry, "__defaults__", (SOME_SECONDS / 10,))


def read(dataset: Dataset) -> None:
    """Compare all rows with what was written."""
    dataset.check_complete()
    for array, data in zip(dataset.arrays.values(), ARRAYS, strict=True):
        out = np.empty(data.shape[2:], array.dtype)
        for head in range(data.shape[1]):
            array.read_rows(0, head, 0, 64, out)
            np.testing.assert_array_equal(out, data[0, head])


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("storage", "kind"), [*(("plain", kind) for kind in TRANSIENT), ("zstd", "504"), ("sharded", "a truncated body")]
)
def test_each_request_for_a_dataset_may_fail_once(server: Server, storage: str, kind: str) -> None:
    expected = Dataset.open(f"{server.url}/{storage}.zarr").fingerprint()
    server.fault = first_try(TRANSIENT[kind])
    dataset = Dataset.open(f"{server.url}/{storage}.zarr")
    read(dataset)
    assert dataset.reopen().fingerprint() == expected
    assert min(tries for (method, _), tries in server.tries.items() if method == "GET") >= 2


def test_each_request_of_plan_run_and_verify_may_fail_once(
    server: Server, right: oocattn.Result, tmp_path: Path, hurried: None
) -> None:
    faults = itertools.cycle(TRANSIENT.values())
    server.fault = first_try(lambda request: next(faults)(request))
    url: Any = f"{server.url}/plain.zarr"
    oocattn.plan(url, kernel="cpu")
    result = carry_out(plan_for(url, chunks=3), url, tmp_path / "result")
    assert_same_bits(result, right)
    assert oocattn.verify(tmp_path / "result", inputs=url).passed
    assert min(tries for (method, _), tries in server.tries.items() if method == "GET") >= 2


def test_a_server_that_stalls_once_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_files, "IDLE_SECONDS", 0.5)
    dataset = Dataset.open(f"{server.url}/zstd.zarr")
    stalling = first_try(stall(5))
    server.fault = lambda request: request.command == "GET" and "/k/c/0/0/0/0" in request.path and stalling(request)
    read(dataset)
    assert server.tries["GET", "/zstd.zarr/k/c/0/0/0/0"] == 2


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("where", ["zarr.json", "/q/zarr.json", "/c/"])
def test_a_lasting_failure_of_a_server_ends_in_one_line(server: Server, storage: str, where: str) -> None:
    for code, said in [(503, r"503 .*\d+ tries in \d+ s"), (403, "403 .* not allowed"), (401, "401"), (418, "418")]:
        server.fault = lambda request, code=code: where in request.path and status(code)(request)
        with pytest.raises(RemoteError, match=rf"^\w[^\n]* {server.url}/{storage}.zarr/[^\n]*{said}") as found:
            read(Dataset.open(f"{server.url}/{storage}.zarr"))
        assert isinstance(found.value, RemoteDeniedError) == (code in (401, 403))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("storage", STORAGE)
def test_a_server_that_fails_later_is_no_damage(server: Server, storage: str) -> None:
    dataset = Dataset.open(f"{server.url}/{storage}.zarr")
    read(dataset)
    server.fault = status(503)
    for rows in (64, 20):  # a shard as a whole, and parts of it
        with pytest.raises(RemoteError, match=r"reading .*/k/c/.* 503"):
            read_all_of(dataset, "k", rows)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("code", "expected"), [(503, RemoteError), (404, IntegrityError)])
def test_a_part_of_a_shard_that_cannot_be_read_is_no_zeros(server: Server, code: int, expected: type[Exception]) -> None:
    dataset = Dataset.open(f"{server.url}/sharded.zarr")
    read(dataset)
    index = "bytes=-"
    server.fault = lambda request: not request.headers.get("Range", index).startswith(index) and status(code)(request)
    with pytest.raises(expected, match=f"{code} |is missing"):
        read_all_of(dataset, "k", 20)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("code", [404, 410])
def test_missing_is_what_a_server_says_is_missing(server: Server, code: int) -> None:
    server.fault = lambda request: request.path.endswith("/k/c/0/0/1/0") and status(code)(request)
    with pytest.raises(IntegrityError, match=r"array 'k' of .*chunk 'c/0/0/1/0' .* is missing"):
        Dataset.open(f"{server.url}/plain.zarr").check_complete()
    with pytest.raises(IntegrityError, match=r"array 'k' of .* is missing"):
        read_all_of(Dataset.open(f"{server.url}/plain.zarr"), "k")
    server.fault = status(code)
    with pytest.raises(ProblemError, match="no Zarr group at"):
        Dataset.open(f"{server.url}/plain.zarr")


def read_all_of(dataset: Dataset, name: str, rows: int = 64) -> None:
    array = dataset.arrays[name]
    array.read_rows(0, 0, 0, rows, np.empty((rows, 8), array.dtype))


SERVERS: dict[str, dict[str, bool]] = {
    "no ranges": {"ranges": False},
    "no lengths": {"length": False},
    "no ranges, no lengths": {"ranges": False, "length": False},
    "all compressed": {"ranges": False, "compress": True},
}


@pytest.mark.parametrize("options", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("storage", STORAGE)
def test_poor_servers_serve(folder: Path, storage: str, options: dict[str, bool]) -> None:
    with serving(folder, **options) as served:
        dataset = Dataset.open(f"{served.url}/{storage}.zarr")
        read(dataset)
        found = dataset.fingerprint()
    with serving(folder) as served:
        assert Dataset.open(f"{served.url}/{storage}.zarr").fingerprint() == found


@pytest.mark.parametrize("storage", STORAGE)
def test_a_wrong_answer_to_head_does_not_count(server: Server, storage: str) -> None:
    server.fault = lambda request: request.command == "HEAD" and not request.answer(200, b"x")
    read(Dataset.open(f"{server.url}/{storage}.zarr"))


def test_a_part_that_is_not_said_to_be_one_is_refused(server: Server) -> None:
    def whole(request: Handler) -> bool:
        path = server.folder / request.path.lstrip("/")
        return "Range" in request.headers and path.is_file() and not request.answer(206, path.read_bytes())

    server.fault = whole
    with pytest.raises(RemoteError, match=r"a part of it, status 206, that does not say which .* copy the dataset"):
        read(Dataset.open(f"{server.url}/sharded.zarr"))


def test_a_part_of_a_compressed_body_is_cut_from_the_whole(server: Server) -> None:
    def stored_compressed(request: Handler) -> bool:
        path = server.folder / request.path.lstrip("/")
        content = gzip.compress(path.read_bytes()) if path.is_file() else b""
        if content and "Range" in request.headers:
            request.answer(206, content[:-9], {"Content-Encoding": "gzip"})
        elif content:
            request.answer(200, content, {"Content-Encoding": "gzip"})
        return bool(content)

    server.fault = stored_compressed
    read(Dataset.open(f"{server.url}/sharded.zarr"))


def test_format_2_opens_where_what_is_missing_is_not_allowed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d.zarr", ARRAYS, chunk_rows=32)
    group = zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2)
    for name, data in zip("qkv", ARRAYS, strict=True):
        group.create_array(name, shape=data.shape, dtype=data.dtype, chunks=(1, 1, 32, 8), compressors=None)[...] = data
        (tmp_path / f"old.zarr/{name}/.zattrs").unlink(missing_ok=True)
    with serving(tmp_path) as served:
        served.fault = lambda request: not (tmp_path / request.path[1:]).is_file() and status(403)(request)
        read(Dataset.open(f"{served.url}/old.zarr"))
        with pytest.raises(RemoteDeniedError, match=r"reading .*/none.zarr/zarr.json failed: .* 403 .* not allowed"):
            Dataset.open(f"{served.url}/none.zarr")


def test_a_page_in_the_place_of_what_is_missing_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.zarr", ARRAYS, chunk_rows=32, compressors=zarr.codecs.ZstdCodec())
    plain = write_dataset(tmp_path / "plain.zarr", ARRAYS, chunk_rows=32)
    for path in (dataset, plain):
        (path / "k/c/0/0/1/0").unlink()
    with serving(tmp_path, pages=True) as served:
        with pytest.raises(IntegrityError, match=r"zarr.json of .*/none.zarr is an HTML page .*<!DOCTYPE html.*URL"):
            Dataset.open(f"{served.url}/none.zarr")
        with pytest.raises(IntegrityError, match=r"chunk 'c/0/0/1/0' .* is an HTML page"):
            read_all_of(Dataset.open(f"{served.url}/d.zarr"), "k")
        with pytest.raises(IntegrityError, match=rf"chunk 'c/0/0/1/0' .* has {len(PAGE)} bytes, expected 1024"):
            Dataset.open(f"{served.url}/plain.zarr").check_complete()


def test_a_chunk_of_the_wrong_size_is_named_as_it_is_read(server: Server) -> None:
    server.fault = lambda request: request.path.endswith("/k/c/0/0/1/0") and not request.answer(200, b"short")
    with pytest.raises(IntegrityError, match=r"chunk 'c/0/0/1/0' .* has 5 bytes, expected 1024"):
        read_all_of(Dataset.open(f"{server.url}/plain.zarr"), "k")


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, folder: Path, code: int) -> None:
    with serving(folder) as other:
        server.fault = lambda request: status(code, Location=other.url + request.path)(request)
        read(Dataset.open(f"{server.url}/plain.zarr"))
        assert other.requests


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_redirects_lead_to_no_other_scheme(server: Server, target: str) -> None:
    server.fault = status(302, Location=target)
    with pytest.raises(RemoteError, match=r"redirects to .*are not followed"):
        Dataset.open(f"{server.url}/plain.zarr")


@pytest.mark.parametrize("where", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"])
def test_redirects_lead_to_no_nearer_network(server: Server, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    real = http_files._nearness_of  # the server is taken to be on the Internet
    monkeypatch.setattr(http_files, "_nearness_of", lambda text: 0 if text == "127.0.0.1" and where != text else real(text))
    if where == "127.0.0.1":
        monkeypatch.setattr(http_files, "_nearness_of", lambda text: 3 if text == "127.0.0.1" else 0)
        server.url = server.url.replace("127.0.0.1", "localhost")
        monkeypatch.setattr(http_files, "_nearness", near)
    server.fault = status(307, Location=f"http://{where}:9/plain.zarr/zarr.json")
    with pytest.raises(RemoteError, match=r"redirects to .* nearer than its own are not followed"):
        Dataset.open(f"{server.url}/plain.zarr")


async def near(host: str) -> list[int]:
    return [0 if host == "localhost" else 3]


def test_redirects_end(server: Server) -> None:
    server.fault = lambda request: status(302, Location=request.path)(request)
    with pytest.raises(RemoteError, match="redirects again and again"):
        Dataset.open(f"{server.url}/plain.zarr")


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("fault", [status(503), status(403), status(404), drop, None])
def test_credentials_in_a_url_are_used_and_never_shown(
    server: Server, fault: Fault | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sent = set()

    def note(request: Handler) -> bool:
        sent.add(request.headers.get("Authorization"))
        return (fault or status(401))(request) if fault or None in sent else False

    server.fault = note
    url = server.url.replace("//", "//me:pa%40ss@") + "/plain.zarr"
    code = main(["run", url, str(tmp_path / "out"), "--kernel", "cpu", "--host-memory", "1GiB"])
    printed = "".join(capfd.readouterr())
    assert code == (fault is not None)
    assert sent == {"Basic bWU6cGFAc3M="}
    recorded = [path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("pa%40ss" in text or "pa@ss" in text or "//me" in text for text in [printed, *recorded])
    if fault is not None:
        assert "Traceback" not in printed
        assert printed.count("\n") == 1


def test_a_run_resumes_where_its_server_was_gone(
    server: Server, right: oocattn.Result, hurried: None, tmp_path: Path
) -> None:
    url: Any = f"{server.url}/plain.zarr"
    plan = plan_for(url, chunks=3)

    def gone(request: Handler) -> bool:  # as the run reads
        started = find_unfinished(ResultPaths.at(tmp_path / "result")) is not None
        return started and "Range" in request.headers and "/v/c/" in request.path and drop(request)

    server.fault = gone
    with pytest.raises(RemoteError, match=r"reading .*/v/c/.* tries in"):
        carry_out(plan, url, tmp_path / "result")
    server.fault = None
    assert_same_bits(oocattn.resume(tmp_path / "result", inputs=url, engine="inline"), right)


def test_a_retry_after_beyond_the_minute_ends_it(server: Server) -> None:
    server.fault = status(503, Retry_After="3600")
    with pytest.raises(RemoteError, match=r"503 .* 1 tries in 0 s; it asks to wait 3600 s"):
        Dataset.open(f"{server.url}/plain.zarr")


def test_an_archive_behind_a_url_is_read(server: Server, folder: Path, hurried: None, tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        shutil.make_archive(str(tmp_path / "d"), "zip", folder / "plain.zarr")
        for fault in (None, status(503), drop):
            served.tries.clear()
            served.fault = lambda request, fault=fault: max(served.tries.values()) == 1 and fault and fault(request)
            read(Dataset.open(f"zip::{served.url}/d.zip"))
        served.fault = status(503)
        with pytest.raises(RemoteError, match=r"opening zip::.*503"):
            Dataset.open(f"zip::{served.url}/d.zip?again")
        served.fault = None
        with pytest.raises(ProblemError, match="no Zarr group"):
            Dataset.open(f"zip::{served.url}/none.zip")
