"""Synthetic datasets of any size; each row follows from the seed alone.

Each block of `BLOCK_ROWS` rows of each head of each array has a stretch of its own in the stream of a counter-based
generator: Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by (seed, array), its
256-bit counter started at (0, block, head, batch). So the numbers depend on neither the chunks nor the threads. Within a
block they are drawn in order: normal deviates (ziggurat, with rejection) use a varying number of random words.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from oocattn import arguments
from oocattn.arguments import MOST_SEED, Dtype, checked
from oocattn.problem.arrays import MAX_HEAD_DIM, ArraySpec
from oocattn.problem.problem import make_problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.make.create import create_array, create_dataset, dimension_names, fill_array
from oocattn.units import ceil_div

BLOCK_ROWS = 4096  # rows drawn from one start of the counter; part of the generator's definition
GENERATOR = "philox-normal-1"
"""Name and version of the generator, recorded in the dataset's attributes; a change of the numbers is a new version."""

MAX_WORKERS = 1 << 10  # threads that write at a time
MOST_DEVIATION = 16.0  # A normal number is smaller than that, in all that are ever drawn
ARRAYS = ("q", "k", "v")


DATASET_OPTIONS = {
    "tokens": arguments.integer(1),
    "heads": arguments.integer(1),
    "kv_heads": arguments.integer(1),
    "keys": arguments.integer(1),
    "head_dim": arguments.integer(1, MAX_HEAD_DIM),
    "value_dim": arguments.integer(1, MAX_HEAD_DIM),
    "dtype": arguments.dtype,
    "seed": arguments.integer(0, MOST_SEED),
}
"""What the options may be that every dataset of random numbers is made by."""


@checked(
    **DATASET_OPTIONS,
    batch=arguments.integer(1),
    mean=arguments.number(),
    workers=arguments.integer(1, MAX_WORKERS),
    overwrite=arguments.boolean,
)
def synthesise(
    path: str | Path,
    *,
    tokens: int,
    heads: int,
    kv_heads: int | None = None,
    keys: int | None = None,
    head_dim: int,
    value_dim: int | None = None,
    dtype: Dtype,
    batch: int = 1,
    seed: int = 0,
    mean: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a dataset of unit-normal numbers.

    q is [batch, heads, tokens, head_dim], k [batch, kv_heads, keys, head_dim] and v [batch, kv_heads, keys, value_dim].
    `kv_heads`, `keys` and `value_dim` default to `heads`, `tokens` and `head_dim`. `mean` is added to v; `workers` is the
    number of threads (default: one a core), each holding one chunk. `dtype` is float16, bfloat16 or float32, as a name
    ("bf16" and the like too) or as that of NumPy or PyTorch. The group's attributes record what makes the dataset again.
    Raises ProblemError for an option that cannot be, ResultExistsError where `path` is taken and `overwrite` is not given.
    """
    of_keys = (batch, heads if kv_heads is None else kv_heads, tokens if keys is None else keys)
    shapes = {
        "q": (batch, heads, tokens, head_dim),
        "k": (*of_keys, head_dim),
        "v": (*of_keys, head_dim if value_dim is None else value_dim),
    }
    dtype = str(dtype)
    largest = float(ml_dtypes.finfo(numpy_dtype(dtype)).max)  # type: ignore[no-untyped-call]
    if abs(mean) > largest - MOST_DEVIATION:
        raise arguments.refused("mean", mean, f"{largest - MOST_DEVIATION:g} at most in size, so that {dtype} holds the sum")
    q, k, v = (ArraySpec(name, shapes[name], dtype) for name in ARRAYS)
    make_problem(q, k, v)
    attributes = {"oocattn": {"generator": GENERATOR, "seed": seed, "v_mean": mean}}
    dimensions = dimension_names(shapes)
    with create_dataset(path, attributes=attributes, overwrite=overwrite) as group:
        for name in ARRAYS:
            array = create_array(group, name, shapes[name], dtype, dimensions=dimensions[name])
            rows = partial(
                synthetic_rows, seed, name, head_dim=shapes[name][3], dtype=dtype, mean=mean if name == "v" else 0.0
            )
            fill_array(array, rows, workers)


def synthetic_rows(
    seed: int, array_name: str, batch: int, head: int, start: int, stop: int, head_dim: int, dtype: str, mean: float = 0.0
) -> NDArray[Any]:
    """Rows [start, stop) of one head of array q, k or v, normal around `mean`.

    They are [stop - start, head_dim], drawn as float32 and then rounded to `dtype`.
    """
    rows = np.empty((stop - start, head_dim), numpy_dtype(dtype))
    for block in range(start // BLOCK_ROWS, ceil_div(stop, BLOCK_ROWS)):
        first, last = max(start, block * BLOCK_ROWS), min(stop, (block + 1) * BLOCK_ROWS)
        bits = np.random.Philox(
            key=np.array([seed, ARRAYS.index(array_name)], np.uint64),
            counter=np.array([0, block, head, batch], np.uint64),
        )
        drawn = np.random.Generator(bits).standard_normal((last - block * BLOCK_ROWS, head_dim), np.float32)
        drawn += np.float32(mean)
        rows[first - start : last - start] = drawn[first - block * BLOCK_ROWS :]
    return rows
