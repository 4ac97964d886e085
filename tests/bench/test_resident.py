"""The resident call is attention as float64 has it, on the CPU and by every library on a GPU, or says what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import attention_by_definition, relative_error
from support import numpy_type, problem_options, write_dataset

from oocattn import OocattnError
from oocattn.bench import resident
from oocattn.bench.competitors import Inputs
from oocattn.bench.resident import Fa3Call, ResidentCall, fa3_library
from oocattn.storage.inputs.dataset import Dataset, pose

DOCUMENTS = {"cu_seqlens_q": [0, 70, 70, 71, 300], "cu_seqlens_k": [0, 0, 40, 90, 260]}

ASKED: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "a window": {"window_size": (20, 7)},
    "an open window": {"window_size": (None, 3)},
    "a causal window": {"causal": True, "window_size": (33, 0)},
    "documents": DOCUMENTS,
    "causal documents": {"causal": True, **DOCUMENTS},
    "documents with a window": {"window_size": (11, 5), **DOCUMENTS},
    "keys that are used": {"causal": True, "seqused_k": [150]},
    "part of the rows": {"causal": True, "queries": (100, 201)},
}


def arrays_of(dtype: str, queries: int = 300, value_dim: int = 16) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(0)
    shapes = (1, 4, queries, 16), (1, 2, 260, 16), (1, 2, 260, value_dim)
    q, k, v = (random.standard_normal(shape, np.float32).astype(numpy_type(dtype)) for shape in shapes)
    return q, k, v


def load(folder: Path, arrays: tuple[NDArray[Any], ...], device: str, **asked: Any) -> Inputs:
    dataset = Dataset.open(write_dataset(folder / "dataset.zarr", arrays))  # type: ignore[arg-type]
    return Inputs.load(dataset, pose(dataset, problem_options(**asked)), device)


def rows_of(call: ResidentCall) -> NDArray[np.float64]:
    """All of `out`."""
    shape = call._inputs.problem.out_shape
    return call.rows(list(np.ndindex(shape[:3]))).reshape(shape)


@pytest.mark.parametrize("value_dim", [16, 5])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_the_resident_call_on_a_cpu(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], value_dim: int
) -> None:
    monkeypatch.setattr(resident, "LEAST_BLOCK", 13)
    arrays = arrays_of("float32", value_dim=value_dim)
    call = ResidentCall(load(fast_path, arrays, "cpu", **asked))
    call.run()
    np.testing.assert_allclose(rows_of(call), attention_by_definition(*arrays, **asked)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [ResidentCall, Fa3Call])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_the_resident_call_on_a_gpu(fast_path: Path, asked: dict[str, Any], kind: type[ResidentCall]) -> None:
    if kind is Fa3Call and fa3_library() is None:
        pytest.skip("FlashAttention-3 is not installed")
    queries = 300 if DOCUMENTS.items() <= asked.items() else 260
    arrays = arrays_of("bfloat16", queries)
    call = kind(load(fast_path, arrays, "cuda", **asked))
    try:
        call.run()
    except RuntimeError as error:
        if kind is ResidentCall or "does not support" not in str(error):
            raise
        pytest.skip(f"this build of FlashAttention-3 refuses it: {error}")
    assert relative_error(rows_of(call), attention_by_definition(*arrays, **asked)[0]) < 4e-3


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        ({"causal": True, "window_size": (9, 0), "sink_tokens": 2}, "no call of the library has sink_tokens"),
        ({"causal": True, "prefix": 2, "softcap": 3.0}, "no call of the library has prefix, softcap"),
        ({"alibi_slopes": [0.1, 0.2, 0.3, 0.4]}, "no call of the library has alibi_slopes"),
        ({"queries": (3, 9), "window_size": (9, 9)}, "part of the queries of such a mask"),
    ],
)
def test_what_no_library_computes_is_said(fast_path: Path, asked: dict[str, Any], missing: str) -> None:
    with pytest.raises(OocattnError, match=missing):
        ResidentCall(load(fast_path, arrays_of("float32"), "cpu", **asked))
