"""Results in memory with a second pass over them, right or spoilt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from in_memory import dataset_of, problem_of
from numpy.typing import NDArray
from reference import attention_by_definition, mask_by_definition
from support import Arrays, numpy_type

from oocattn.problem.second_pass import sign_vectors
from oocattn.storage.results.arrays import ResultArrays
from oocattn.verification.all_rows import AllRowsArrays, Sizes, check_all_rows
from oocattn.verification.blocks import Compared
from oocattn.verification.findings import AllRows
from oocattn.verification.recompute import Tiles
from oocattn.verification.rounding import UNIT_ROUNDOFF

SIZES = {"block_rows": 128, "threads": 2, "key_rows": 90, "group_rows": 64}
SEED = 3


class StoredInMemory:
    """A reader of rows, as `RowReader`, of an array in memory."""

    mapped = True

    def __init__(self, data: NDArray[Any]) -> None:
        self._data, self.shape, self.dtype = data, data.shape, data.dtype

    def nbytes(self, rows: int) -> int:
        return 0

    def read(self, batch: int, head: int, start: int, out: NDArray[Any]) -> None:
        out[...] = self._data[batch, head, start : start + len(out)]


@dataclass(frozen=True)
class Attended:
    """Inputs, what was asked of them, and `out` (of any dtype) and lse as they were found."""

    arrays: Arrays
    asked: dict[str, Any]
    out: NDArray[Any]
    lse: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    rounds_weights: bool = False

    def spoilt(self, head: int, row: int, out: Any = None, lse: float | None = None) -> Attended:
        """The same with another row."""
        outs, lses = self.out.copy(), self.lse.copy()
        if out is not None:
            outs[0, head, row] = out
        if lse is not None:
            lses[0, head, row] = lse
        return replace(self, out=outs, lse=lses)

    def judge(self, **options: int) -> AllRows:
        """What `check_all_rows` finds with a right second pass; `out` is rounded to the dtype of the inputs."""
        compared = self.beside(*second_pass(self.arrays, self.lse, SEED, key_bias=self.bias, **self.asked))
        about = AllRowsArrays(None, "", SEED, "numpy", True, False)  # type: ignore[arg-type]  # its arrays are read already
        roundoff = UNIT_ROUNDOFF[compared.problem.dtype if self.rounds_weights else "float32"]
        sizes = {**SIZES, **options}
        tiles = Tiles(sizes["key_rows"], sizes["group_rows"], sizes["threads"])
        return check_all_rows(compared, about, Sizes(sizes["block_rows"], sizes["threads"], tiles), roundoff)

    def beside(self, out: NDArray[np.float32], lse: NDArray[np.float32]) -> Compared:
        """Beside `out` and lse of a second pass; that of the result is rounded to the dtype of the inputs."""
        problem, dataset = problem_of(self.arrays, self.bias, **self.asked), dataset_of(self.arrays, self.bias)
        arrays = (self.out.astype(numpy_type(problem.out_dtype)), self.lse), (out, lse)
        readers: Any = [{"out": StoredInMemory(out), "lse": StoredInMemory(lse)} for out, lse in arrays]
        return Compared(problem, dataset, *readers, SEED, self.rounds_weights, False)


def attend32(arrays: Arrays, rounds_weights: bool = False, **asked: Any) -> Attended:
    """Attention in float32, with weights that are rounded to the dtype of the inputs where asked."""
    q, k, v = (array.astype(np.float32) for array in arrays)
    mask = {name: value for name, value in asked.items() if name != "learnable_sink"}
    attended, _ = mask_by_definition(len(q), q.shape[2], k.shape[2], **mask)
    groups = q.shape[1] // k.shape[1]
    scores = (q * np.float32(q.shape[3] ** -0.5)) @ np.repeat(k, groups, axis=1).swapaxes(2, 3)
    scores[~np.broadcast_to(attended[:, np.newaxis], scores.shape)] = -np.inf
    maximum = scores.max(axis=-1, keepdims=True)
    sinks = None if "learnable_sink" not in asked else np.float32(asked["learnable_sink"]).reshape(1, -1, 1, 1)
    maximum = maximum if sinks is None else np.maximum(maximum, sinks)
    maximum[np.isneginf(maximum)] = 0
    weights = np.exp(scores - maximum)
    den = weights.sum(axis=-1, keepdims=True) + (0 if sinks is None else np.exp(sinks - maximum))
    weights = weights.astype(arrays[0].dtype).astype(np.float32) if rounds_weights else weights
    out = weights @ np.repeat(v, groups, axis=1) / np.where(den == 0, 1, den)
    with np.errstate(divide="ignore"):
        lse = np.float32(maximum + np.log(den))[..., 0]
    return Attended(arrays, asked, out, lse, rounds_weights=rounds_weights)


def attend64(arrays: Arrays, bias: NDArray[np.float32] | None = None, **asked: Any) -> Attended:
    """Attention by its definition."""
    out, lse = attention_by_definition(*arrays, key_bias=bias, **asked)
    return Attended(arrays, asked, out, lse.astype(np.float32), bias)


def second_pass(
    arrays: Arrays, lse: NDArray[np.float32], seed: int, **asked: Any
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`out` and lse of a second pass over a result with this lse, in float64 and rounded."""
    q, k, v = arrays
    projected = v.astype(np.float64) @ sign_vectors(seed, v.shape[3])
    out, sums = attention_by_definition(q, k, projected, **{**asked, "learnable_sink": None})
    with np.errstate(all="ignore"):
        sums = np.where(np.isneginf(sums), sums, sums - lse)
        out = out * np.exp(sums)[..., np.newaxis]
    return out.astype(np.float32), sums.astype(np.float32)


def stored_pass(folder: Path, out: NDArray[Any], lse: NDArray[np.float32], compressors: str | None = None) -> AllRowsArrays:
    """A second pass as it is stored."""
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    for name, data in {"out": out, "lse": lse}.items():
        options: dict[str, Any] = {"chunks": (1, 1, 50, *data.shape[3:]), "compressors": compressors}
        group.create_array(name, shape=data.shape, dtype=data.dtype, **options)[...] = data
    return AllRowsArrays(ResultArrays.open(folder), str(folder), SEED, "kernel numpy, strips", True, False)
