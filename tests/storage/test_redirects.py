"""Redirects of a server: followed, but to no other scheme and no nearer network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import Server, serving, status
from served import ARRAYS, read
from support import write_dataset

from oocattn.errors import RemoteError
from oocattn.storage.inputs.dataset import Dataset

http_files = pytest.importorskip("oocattn.storage.remote.http_files")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("served") / "plain.zarr", ARRAYS, chunk_rows=32).parent


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as served:
        yield served


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
