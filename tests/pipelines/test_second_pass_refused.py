"""What cannot be proved or surveyed is refused before a second pass begins, and a damaged result has its verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import normal_arrays, write_dataset

import oocattn
from oocattn import BudgetError, IntegrityError, TimeLimitError
from oocattn.storage.paths import ResultPaths

PASSES: dict[str, Callable[..., Any]] = {
    "proof": lambda result, **options: oocattn.verify(result, all_rows=True, engine="inline", **options),
    "survey": lambda result, **options: oocattn.survey(result, arrays=["received"], engine="inline", **options),
}


@pytest.fixture
def dataset(fast_path: Path) -> Path:
    return write_dataset(fast_path / "dataset.zarr", normal_arrays(300, heads=2, kv_heads=1, dtype="float16"))


@pytest.fixture
def result(fast_path: Path, dataset: Path) -> Path:
    oocattn.attention(dataset, fast_path / "result.zarr", causal=True, chunks=3, engine="inline")
    return fast_path / "result.zarr"


def beside(result: Path) -> set[str]:
    return {path.name for path in ResultPaths.at(result).state.iterdir()}


@pytest.mark.parametrize("which", PASSES)
def test_other_inputs_are_refused_before_the_pass(result: Path, fast_path: Path, which: str) -> None:
    arrays = normal_arrays(300, heads=2, kv_heads=1, dtype="float16", seed=5)
    other, before = write_dataset(fast_path / "other.zarr", arrays), beside(result)
    with pytest.raises(IntegrityError, match=r"is not what the run to .* read: numbers of q, k and v differ"):
        PASSES[which](result, inputs=other, callbacks=[lambda event: pytest.fail("a pass began")])
    assert beside(result) == before
    assert not (result / "received").exists()


@pytest.mark.parametrize("which", PASSES)
def test_one_other_number_in_memory_is_refused_before_the_pass(fast_path: Path, which: str) -> None:
    q, k, v = normal_arrays(200, heads=1, kv_heads=1)
    result = fast_path / "result.zarr"
    oocattn.attention({"q": q, "k": k, "v": v, "layout": "bhnd"}, result, engine="inline")
    PASSES[which](result, inputs={"q": q, "k": k, "v": v, "layout": "bhnd"})
    changed = k.copy()
    changed[0, 0, 17, 3] += np.float32(1e-3)
    with pytest.raises(IntegrityError, match="numbers of k differ"):
        PASSES[which](result, inputs={"q": q, "k": changed, "v": v, "layout": "bhnd"})


@pytest.mark.parametrize("which", PASSES)
def test_arrays_of_another_shape_are_refused_before_the_pass(result: Path, which: str) -> None:
    metadata, before = result / "out" / "zarr.json", beside(result)
    content = json.loads(metadata.read_text())
    content["shape"][2] = 299
    metadata.write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="array 'out' of"):
        PASSES[which](result)
    assert beside(result) == before


def test_a_kernel_of_another_version_is_not_said_to_be_other_code(result: Path) -> None:
    group = zarr.open_group(result, mode="r+", use_consolidated=False)
    attributes = group.attrs.asdict()
    attributes["oocattn"]["plan"]["kernel"] = "of-tomorrow"  # type: ignore[index,call-overload]
    group.attrs.put(attributes)
    certificate = PASSES["proof"](result)
    assert certificate.passed
    assert not certificate.all_rows.other


@pytest.mark.parametrize("spoil", [Path.unlink, lambda chunk: chunk.write_bytes(chunk.read_bytes()[:100])])
def test_damaged_lse_has_its_verdict(
    result: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    assert PASSES["proof"](result).passed
    chunk = sorted((result / "lse").glob("c*"))[-1]
    spoil(chunk)
    certificate = PASSES["proof"](result)
    assert certificate.failed
    assert [len(array.damaged) for array in certificate.arrays if array.name == "lse"] == [1]
    assert f"not every row was compared: array {result}/lse: chunk {chunk.name!r} " in caplog.text
    assert not {"all-rows.zarr", "all-rows.zarr.oocattn"} & beside(result)


def test_a_survey_that_has_lost_a_chunk_is_not_there(result: Path) -> None:
    whole = PASSES["survey"](result).arrays["received"][...]
    next((result / "received").glob("c*")).unlink()
    with pytest.raises(IntegrityError, match=r"array 'received' of .*: 1 of \d+ chunks are missing, .* overwrite=True"):
        PASSES["survey"](result)
    np.testing.assert_array_equal(PASSES["survey"](result, overwrite=True).arrays["received"][...], whole)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("budget", ["host_memory", "device_memory"])
def test_a_pass_that_goes_on_keeps_the_budgets_of_now(result: Path, which: str, budget: str) -> None:
    with pytest.raises(TimeLimitError):
        PASSES[which](result, time_limit=0)
    with pytest.raises(BudgetError, match=f"{budget} = '1 KiB': the second pass that was begun takes"):
        PASSES[which](result, **{budget: "1KiB"})
    PASSES[which](result)
