"""Every row of a result verified: the second pass as a run, what it leaves, and what it refuses."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from interrupting import EnoughError, interrupt
from support import BESIDE, normal_arrays, write_dataset
from zarr.storage import MemoryStore

import oocattn
from oocattn import BudgetError, Certificate, IntegrityError, LockedError, ProblemError
from oocattn.storage.paths import ALL_ROWS as NAME
from oocattn.verification.findings import AllRows

TOKENS = 260


@pytest.fixture(scope="module")
def dataset(shared_path: Path) -> Path:
    return write_dataset(shared_path / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2, head_dim=16))


@pytest.fixture
def result(dataset: Path, fast_path: Path) -> Path:
    oocattn.attention(dataset, fast_path / "result.zarr", causal=True, chunks=7, engine="inline")
    return fast_path / "result.zarr"


def verify(result: Any, **options: Any) -> tuple[Certificate, AllRows]:
    certificate = oocattn.verify(result, **{"rows": 4, "all_rows": True, "engine": "inline", **options})
    assert certificate.all_rows is not None
    return certificate, certificate.all_rows


def cut_off(result: Path, **options: Any) -> Path:
    """Interrupt a verification during its pass; return the place of the pass."""
    with pytest.raises(EnoughError):
        verify(result, callbacks=[interrupt("attended", 2)], **options)
    return result.with_name(f"{result.name}.oocattn") / NAME


def test_a_right_result_passes_and_nothing_else_is_left(result: Path, client: Client) -> None:
    certificate, found = verify(result, engine="dask", client=client)
    assert certificate.passed
    assert (found.rows, found.suspected, found.open, found.other) == (4 * TOKENS, 0, 0, True)
    beside = {path.name for path in result.with_name("result.zarr.oocattn").iterdir()}
    assert beside == BESIDE | {"certificate.json", "certificate.html"}


@pytest.mark.parametrize("lse", [1e5, -1e5, 1e7, -1e7, 1e30, -1e30, math.inf, -math.inf, math.nan])
def test_no_log_sum_exp_hides_a_wrong_row(result: Path, lse: float) -> None:
    group = zarr.open_group(result, mode="r+")
    group["out"][0, 2, 77], group["lse"][0, 2, 77] = 5.0, lse  # type: ignore[index]
    certificate, found = verify(result, checksums=False)
    assert certificate.failed
    assert [(row.head, row.token) for row in found.wrong] == [(2, 77)]


def test_a_pass_that_was_cut_off_is_continued(result: Path) -> None:
    place = cut_off(result)
    status = oocattn.status(place)
    assert (status.state, status.resume) == ("interrupted", f"oocattn.verify({str(result)!r}, all_rows=True)")
    assert oocattn.report(place).command == status.resume
    with pytest.raises(ProblemError, match="is a second pass over another result: go on with"):
        oocattn.resume(place)
    begun: list[bool] = []
    certificate, _ = verify(
        result, callbacks=[lambda event: begun.append(event.resumed) if event.kind == "started" else None]
    )
    assert certificate.passed
    assert begun == [True]
    assert not place.exists()


def test_a_pass_with_another_seed_begins_again(result: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = cut_off(result, seed=1)
    assert oocattn.status(place).resume == f"oocattn.verify({str(result)!r}, all_rows=True, seed=1)"
    certificate, found = verify(result, seed=2)
    assert (certificate.passed, found.seed) == (True, 2)
    assert "cannot go on, and begins again (it was asked for with other options" in caplog.text


def test_a_pass_over_a_result_that_was_computed_again_begins_again(result: Path, dataset: Path) -> None:
    place = cut_off(result)
    oocattn.attention(dataset, result, chunks=7, engine="inline", overwrite=True)
    assert not list(place.parent.glob(f"{NAME}*"))
    certificate, _ = verify(result)
    assert certificate.passed
    assert not certificate.problem.causal


def test_a_pass_that_was_begun_is_refused_less_memory(result: Path) -> None:
    cut_off(result)
    with pytest.raises(BudgetError, match="the second pass that was begun takes"):
        verify(result, host_memory=1 << 20)


def test_a_result_is_verified_by_one_process_at_a_time(result: Path) -> None:
    inside, done, others = threading.Event(), threading.Event(), []

    def wait(event: oocattn.Event) -> None:
        inside.set()
        done.wait(20)

    first = threading.Thread(target=lambda: others.append(verify(result, callbacks=[wait])[0].outcome))
    first.start()
    inside.wait(20)
    with pytest.raises(LockedError):
        verify(result)
    done.set()
    first.join()
    assert others == ["passed"]


def test_a_result_that_is_replaced_meanwhile_is_not_judged(result: Path, dataset: Path) -> None:
    def replace(event: oocattn.Event) -> None:
        if event.kind == "ended":
            oocattn.attention(dataset, result, chunks=7, engine="inline", overwrite=True)

    with pytest.raises(IntegrityError, match="was replaced during a second pass over it"):
        verify(result, callbacks=[replace])


def test_a_result_in_memory_is_verified_with_its_job_state_in_scratch(dataset: Path, fast_path: Path) -> None:
    store, scratch = MemoryStore(), fast_path / "scratch"
    oocattn.attention(dataset, store, engine="inline", scratch=scratch, lock="none")
    certificate, found = verify(store, scratch=scratch)
    assert (certificate.passed, found.rows) == (True, 4 * TOKENS)
    assert not list(scratch.glob(f"{NAME}*"))


@pytest.mark.parametrize("columns", [1, 2])
def test_rows_of_few_columns_are_not_suspected_by_chance(fast_path: Path, columns: int) -> None:
    q, k, v = (np.random.default_rng(0).standard_normal((1, 1, 3000, size), np.float32) for size in (8, 8, columns))
    inputs = {"q": q, "k": k, "v": v}
    oocattn.attention(inputs, fast_path / "narrow.zarr", engine="inline")
    certificate, found = verify(fast_path / "narrow.zarr", inputs=inputs)
    assert (certificate.outcome, found.suspected) == ("passed", 0)


def test_rows_of_which_nothing_is_known_are_counted(fast_path: Path) -> None:
    """An additive mask over all keys of all rows, of which float32 keeps nothing else."""
    dataset = write_dataset(
        fast_path / "masked.zarr", normal_arrays(50, heads=1, head_dim=8), key_bias=np.full((1, 1, 50), -1e9, np.float32)
    )
    oocattn.attention(dataset, fast_path / "masked-out.zarr", engine="inline")
    certificate, found = verify(fast_path / "masked-out.zarr")
    assert (certificate.outcome, found.open) == ("inconclusive", 50)


def test_the_kernel_of_the_pass_may_be_named(result: Path) -> None:
    certificate, found = verify(result, kernel="weights")
    assert (certificate.outcome, found.computed_by.partition(",")[0]) == ("passed", "weights")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_that_does_not_serve_here_or_attends_is_refused(result: Path) -> None:
    with pytest.raises(ProblemError, match="torch finds no NVIDIA GPU"):
        verify(result, kernel="hopper-weights")
    with pytest.raises(ProblemError, match=r"kernel = 'cpu' .*: expected one of weights, hopper-weights"):
        verify(result, kernel="cpu")


OF_PASSES = [
    {"time_limit": "5s"},
    {"engine": "inline"},
    {"progress": True},
    {"callbacks": [print]},
    {"kernel": "weights"},
    {"device_memory": "1GiB"},
]


@pytest.mark.parametrize("option", OF_PASSES)
def test_options_of_the_pass_are_refused_without_it(result: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=f"{next(iter(option))} is of a second pass: give all_rows=True too"):
        oocattn.verify(result, **option)
