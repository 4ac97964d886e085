"""Fixtures for all tests: one cluster in this process, and hypothesis without chance or deadlines."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, here and in processes that tests start. Threads of OpenMP that wait for each other would keep the
# cores busy: on two cores with two test processes, a test of the kernels took 21 s of CPU time instead of 2.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ["XDG_STATE_HOME"] = os.devnull  # tests keep nothing in the home of who runs them

# A shell makes what it starts in the background ignore Ctrl-C, and tests send it, to themselves and to processes of theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import dask
import pytest
import warm  # noqa: F401  worker processes are its forks
from distributed import Client
from hypothesis import HealthCheck, settings
from process_state import differences, process_state
from support import TOKENS, normal_arrays, write_dataset

from oocattn.pipelines.engines.dask.local_cluster import NO_PROFILER, local_client

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("repeatable")
dask.config.set(NO_PROFILER)  # in the clusters that tests make for themselves too


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """A cluster like that of a run without a client, started once."""
    with local_client() as connected:
        yield connected


def fresh_folder() -> Iterator[Path]:
    """A fresh folder, in memory where there is such a place: hundreds of runs sync every file they write."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


fast_path = pytest.fixture(fresh_folder, name="fast_path")
shared_path = pytest.fixture(fresh_folder, scope="module", name="shared_path")
"""A folder for what the tests of a module share and do not change."""


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(TOKENS), chunk_rows=16)


@pytest.fixture
def result(fast_path: Path) -> Path:
    return fast_path / "result.zarr"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """An S3 server on the loopback, and the storage options that reach it."""
    from object_store import serving_s3  # takes fsspec and s3fs

    with serving_s3() as options:
        yield options


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def _process_state_is_left_as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a setting of the process changed, and name the setting."""
    if "client" in request.fixturenames:
        request.getfixturevalue("client")  # a cluster that starts now is part of what is found
    before = process_state()
    yield
    changed = differences(before, process_state())
    assert not changed, "settings of the process are not as the test found them: " + "; ".join(changed)
