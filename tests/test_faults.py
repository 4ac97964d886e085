"""What goes wrong while a run is under way: the message names it, and nothing has appeared under the result's name."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from support import (
    TOKENS,
    Recorder,
    assert_nothing_written,
    assert_same_bits,
    carry_out,
    damage,
    normal_arrays,
    plan_for,
    write_dataset,
)

import oocattn
from oocattn import Event, IntegrityError, Result
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.lane.partials.files import PartialFiles, PartialId
from oocattn.storage.paths import ResultPaths

# Damage while a run is under way


def on_first(kind: str, action: Callable[[], None]) -> Callable[[Event], None]:
    """A listener that acts on the first event of a kind."""
    seen = []

    def listen(event: Event) -> None:
        if event.kind == kind and not seen:
            seen.append(event)
            action()

    return listen


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_dataset_that_changes_during_the_run_is_noticed(dataset: Path, result: Path, partials: str) -> None:
    chunk = dataset / "q/c/0/0/0/0"
    plan = plan_for(dataset, chunks=7, partials=partials)
    rewrite = on_first("attended", lambda: damage(chunk, lambda data: bytes(len(data))))
    with pytest.raises(IntegrityError, match=r"zarr: q of the dataset changed while the run read it.*run again"):
        carry_out(plan, dataset, result, callbacks=[rewrite])
    assert_nothing_written(result)
    assert carry_out(plan, dataset, result).path == result


@pytest.mark.parametrize("replaced", [False, True])
def test_a_chunk_that_changes_is_noticed_though_size_and_time_are_set_back(
    fast_path: Path, result: Path, replaced: bool
) -> None:
    """In the middle of a chunk whose content is not sampled, in place or by another file."""
    dataset = write_dataset(fast_path / "large.zarr", normal_arrays(1 << 12, head_dim=32), chunk_rows=1 << 11)
    chunk = dataset / "k/c/0/0/1/0"

    def change() -> None:
        status, content = chunk.stat(), bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        if replaced:
            damage(chunk, lambda _: bytes(content))
        else:
            with chunk.open("r+b") as file:  # not cut in between: the run reads it meanwhile
                file.write(content)
        os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(IntegrityError, match=r"zarr: k of the dataset changed while the run read it.*run again"):
        carry_out(plan_for(dataset, chunks=7), dataset, result, callbacks=[on_first("attended", change)])
    assert_nothing_written(result)


def test_a_chunk_that_disappears_during_the_run_is_named(dataset: Path, result: Path) -> None:
    plan = plan_for(dataset, chunks=31)
    with pytest.raises(IntegrityError, match=r"array 'v' of .*'c/0/0/3/0'.* is missing"):
        carry_out(plan, dataset, result, callbacks=[on_first("staged", (dataset / "v/c/0/0/3/0").unlink)])
    assert not os.path.lexists(result)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 16
    path.write_bytes(content)


@pytest.fixture(scope="module")
def right(shared_path: Path) -> Result:
    """The result of the `dataset` fixture in 40 chunks, without a fault."""
    dataset = write_dataset(shared_path / "dataset.zarr", normal_arrays(TOKENS), chunk_rows=16)
    return carry_out(plan_for(dataset, chunks=40, decomposition="cqs", causal=True), dataset, shared_path / "right.zarr")


@pytest.mark.parametrize(
    "spoil",
    [flip_a_bit, lambda path: os.truncate(path, path.stat().st_size - 1), lambda path: path.write_bytes(b"")],
    ids=["flipped", "short", "empty"],
)
def test_a_damaged_partial_is_computed_again(
    client: Client, dataset: Path, result: Path, right: Result, spoil: Callable[[Path], None]
) -> None:
    """Of a chunk whose last partial is not even submitted when the first is done: so it cannot be merged before."""
    plan = plan_for(dataset, chunks=40, decomposition="cqs", causal=True, partials="disk")
    contributors = {chunk: plan.division_of(0).contributors(chunk) for chunk in range(40) if plan.query_rows(chunk)}
    chunk = next(chunk for chunk, these in contributors.items() if these[0] == 0 and these[-1] >= 33)
    partial = ResultPaths.at(result).scratch / f"partial-0-{chunk}-0"
    found = carry_out(plan, dataset, result, client, callbacks=[on_first("attended", lambda: spoil(partial))])
    assert found.report.recomputed == 1
    assert "computed again" in str(found.report)
    assert_same_bits(found, right)
    assert found.report.pairs == right.report.pairs


@pytest.mark.parametrize("partials", ["memory", "disk"])
def test_a_partial_that_cannot_be_read_is_computed_again(
    dataset: Path, result: Path, right: Result, partials: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(dataset, chunks=40, decomposition="cqs", causal=True, partials=partials)
    recorder = Recorder([])

    def stop(event: Event) -> None:
        if len(recorder.of("attended")) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, dataset, result, callbacks=[recorder, stop])
    real, refused = PartialFiles.read, []

    def read(files: PartialFiles, partial: PartialId, buffers: Sequence[AttentionState]) -> Iterator[int]:
        if not refused:
            refused.append(partial)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(files.path(partial)))
        return real(files, partial, buffers)

    monkeypatch.setattr(PartialFiles, "read", read)
    found = oocattn.resume(result, engine="inline")
    assert found.report.recomputed == len(refused) == 1
    assert_same_bits(found, right)


def test_recomputation_counts_nothing_twice(fast_path: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = normal_arrays(TOKENS)
    arrays[0][0, 0, 0, 0] = np.nan
    dataset = write_dataset(fast_path / "nan.zarr", arrays)
    plan = plan_for(dataset, chunks=40, partials="disk")
    real, lost = PartialFiles.write, []

    def write(files: PartialFiles, partial: PartialId, state: AttentionState, not_finite: int) -> int:
        written = real(files, partial, state, not_finite)
        if partial == PartialId(0, 0, (0,)) and not lost:
            lost.append(partial)
            files.path(partial).unlink()
        return written

    monkeypatch.setattr(PartialFiles, "write", write)
    found = carry_out(plan, dataset, result)
    assert found.report.recomputed == len(lost) == 1
    assert found.report.not_finite == 1
    assert found.report.subproblems == plan.subproblems


# Disk full


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_stops_the_run_and_leaves_no_result(
    client: Client, dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    plan = plan_for(dataset, chunks=7)
    real = getattr(os, call)

    def full(*arguments: Any, **options: Any) -> Any:
        folder = arguments[0] if call == "fsync" else options.get("dst_dir_fd", 0)
        named = os.readlink(f"/proc/self/fd/{folder}") + ("" if call == "fsync" else f"/{arguments[1]}")
        return no_space() if re.search(r"/out/c[./]0[./]1[./]", named) else real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match="no space left for the result and its partials; make room and resume") as failure:
            carry_out(plan, dataset, result, client)
    assert failure.value.errno == errno.ENOSPC
    assert not os.path.lexists(result)
    status = oocattn.status(result)
    assert status.state == "interrupted"
    assert "no space left" in str(status).lower()
    with pytest.raises(IntegrityError, match="no finished result here"):
        oocattn.verify(result)
    assert oocattn.verify(carry_out(plan, dataset, result, client).path, rows=8).passed  # once there is room


def test_a_disk_that_is_full_of_partials_stops_the_run(dataset: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def full(source: Any, target: Any, **folders: int) -> None:
        if Path(target).name.startswith("partial-"):
            no_space()
        real(source, target, **folders)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left for the result and its partials; make room and resume"):
            carry_out(plan_for(dataset, chunks=7, partials="disk"), dataset, result)
    assert not os.path.lexists(result)


def test_a_listener_ends_the_run_by_a_keyboard_interrupt(client: Client, dataset: Path, result: Path) -> None:
    def refuse() -> None:
        raise KeyboardInterrupt

    events: list[Event] = []
    worker = next(iter(client.cluster.workers.values()))
    plugins = set(worker.plugins)
    with pytest.raises(KeyboardInterrupt):
        carry_out(
            plan_for(dataset, chunks=31), dataset, result, client, callbacks=[events.append, on_first("merged", refuse)]
        )
    assert events[-1].kind == "failed"
    assert events[-1].error == "interrupted by Ctrl-C or another signal"
    assert not os.path.lexists(result)
    assert set(worker.plugins) == plugins
    assert oocattn.status(result).state == "interrupted"
    assert carry_out(plan_for(dataset, chunks=31), dataset, result, client).path == result
