"""The examples of clusters: what Slurm would be given, and runs on workers of this machine in the place of others."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
from distributed import LocalCluster
from support import normal_arrays, write_dataset

import oocattn

on_interrupt = signal.getsignal(signal.SIGINT)
pytest.importorskip("dask_jobqueue")  # which adds its defaults to Dask's configuration, and ends the process on Ctrl-C
signal.signal(signal.SIGINT, on_interrupt)
asyncssh = pytest.importorskip("asyncssh")


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def slurm() -> ModuleType:
    return example("slurm")


def test_slurm_is_given_a_job_step_without_a_nanny_and_with_certificates(slurm: ModuleType, tmp_path: Path) -> None:
    options = {"cores": "16", "memory": "64GiB", "queue": "long", "shared": str(tmp_path)}
    asked = slurm.parse(["in.zarr", "out.zarr", *(f"--{name}={value}" for name, value in options.items())])
    with slurm.make_cluster(asked) as cluster:
        script = cluster.job_script()
        address = cluster.scheduler_address
    assert address.startswith("tls://")
    for line in ("-p long", "--cpus-per-task=16", "--mem=64G", "-t 04:00:00", "--requeue"):
        assert f"#SBATCH {line}" in script.splitlines()
    (command,) = [line for line in script.splitlines() if "dask_worker" in line]
    assert command.startswith(f"exec srun {sys.executable} -m distributed.cli.dask_worker {address} ")
    assert "--no-nanny" in command.split()
    assert command.index("--memory-limit 0") > command.index("--memory-limit 64")  # the last one counts
    assert f"--tls-key {tmp_path}/" in command


def test_the_slurm_example_ends_at_its_limit_and_continues(
    slurm: ModuleType, fast_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, result = write_dataset(fast_path / "in.zarr", normal_arrays(300, heads=2, kv_heads=2)), fast_path / "out.zarr"

    def local(_: object) -> LocalCluster:
        return LocalCluster(n_workers=0, processes=False, memory_limit=0, dashboard_address="127.0.0.1:0")

    monkeypatch.setattr(slurm, "make_cluster", local)
    asked = [str(inputs), str(result), "--jobs", "2"]
    assert slurm.main([*asked, "--time-limit", "0.1s"]) == slurm.GO_ON_LATER == 75  # in the queue, or just after it
    assert re.search("workers arrived after|time limit reached", capsys.readouterr().err)
    for error in (oocattn.TimeLimitError("limit"), oocattn.WorkerLostError("lost")):
        with monkeypatch.context() as patched:
            patched.setattr(oocattn, "attention", Mock(side_effect=error))
            assert slurm.main([*asked, "--start-with", "1"]) == 75
        assert capsys.readouterr().err == f"{error}\n"
    assert slurm.main(asked) == 0
    assert oocattn.verify(result, rows=8).passed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("when", ["queue", "run"])
def test_signals_take_the_jobs_of_the_slurm_example_out_of_the_queue(
    slurm: ModuleType, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, when: str
) -> None:
    class Jobs(LocalCluster):
        def adapt(self, *_: Any, **__: Any) -> None:
            if when == "run":
                self.scale(1)
            else:
                threading.Timer(0.3, lambda: os.kill(os.getpid(), number)).start()

    with Jobs(n_workers=0, processes=False, memory_limit=0, dashboard_address="127.0.0.1:0") as cluster:
        monkeypatch.setattr(slurm, "make_cluster", lambda _: cluster)
        real = oocattn.attention

        def attention(*arguments: Any, **options: Any) -> oocattn.Result:
            def strike(event: oocattn.Event) -> None:
                if event.kind == "attended":
                    os.kill(os.getpid(), number)

            return real(*arguments, **options, callbacks=[strike], chunks=7, kernel="cpu")

        monkeypatch.setattr(oocattn, "attention", attention)
        before = {each: signal.getsignal(each) for each in slurm.SIGNALS}
        try:
            slurm.leave_on_signals()
            code = slurm.main([str(dataset), str(result), "--jobs", "1"])
        except SystemExit as ended:
            code = ended.code
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        assert code == slurm.SIGNALS[number] != 0
        assert cluster.status.name == "closed"  # which takes jobs out of the queue
    if when == "run":
        assert oocattn.status(result).state == "interrupted"


@contextmanager
def ssh_server() -> Iterator[dict[str, Any]]:
    """A server on the loopback that runs what it is sent, for anyone; yields how to connect."""

    class Server(asyncssh.SSHServer):  # type: ignore[misc, name-defined]
        def begin_auth(self, username: str) -> bool:
            return False

    async def run(process: Any) -> None:
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_shell(process.command, stdin=pipe, stdout=pipe, stderr=pipe)
        await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
        process.exit(await child.wait())

    async def listen() -> Any:
        key = asyncssh.generate_private_key("ssh-ed25519")
        return await asyncssh.listen("127.0.0.1", 0, server_factory=Server, server_host_keys=[key], process_factory=run)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(listen(), loop).result()
        yield {"port": server.get_port(), "known_hosts": None, "username": "anyone"}
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.mark.slow
def test_the_ssh_example_runs_a_worker_on_each_host(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(oocattn.__file__).parents[1]))
    inputs, result = write_dataset(fast_path / "in.zarr", normal_arrays(300, heads=2, kv_heads=2)), fast_path / "out.zarr"
    with ssh_server() as options:
        asked = [str(inputs), str(result), "--hosts", "127.0.0.1", "127.0.0.1", "--host-memory", "256MiB"]
        assert example("ssh_cluster").main(asked, options) == 0
    assert "on 2 lanes" in capsys.readouterr().out
    assert oocattn.verify(result, rows=8).passed
