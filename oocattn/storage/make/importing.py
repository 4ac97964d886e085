"""Import of tensors of every kind into a dataset of our own. All are checked first."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oocattn import arguments
from oocattn.arguments import Dtype, checked
from oocattn.denormals import keep_denormals
from oocattn.errors import ProblemError
from oocattn.naming import named, setting
from oocattn.problem.arrays import DTYPES, KEY_BIAS, ArraySpec
from oocattn.problem.problem import make_problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.axes import LAYOUTS
from oocattn.storage.inputs.layouts import LayoutLike, check_layout
from oocattn.storage.inputs.meaning import warn_if_transposed
from oocattn.storage.inputs.opening import Tensor, bias_source, open_tensor, plain_sources
from oocattn.storage.inputs.source import TensorSource
from oocattn.storage.make.create import create_array, create_dataset, dimension_names, fill_array
from oocattn.storage.remote.options import StorageOptions, parse_options

RANKS = {"q": 4, "k": 4, "v": 4, KEY_BIAS: 3}
"""The ranks of the arrays of a dataset."""


@checked(
    layout=partial(check_layout, known=LAYOUTS, tensors=("q", "k", "v")),
    dtype=arguments.dtype,
    overwrite=arguments.boolean,
    storage_options=parse_options,
)
@keep_denormals()
def import_arrays(
    path: str | Path,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    layout: LayoutLike = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    storage_options: StorageOptions | None = None,
) -> None:
    """Copy tensors into a new dataset at `path`.

    Its arrays q, k and v have the shape [B, H, N, D]. More heads than tokens, by `layout`, are logged as a warning: the
    axes may be in another order. `key_bias` becomes float32 [B, H, N], of 1 head or as many as q has; it may lack B, or
    B and H.

    A tensor is any that `oocattn.Inputs` takes: files as `FILE.npy`, `FILE.safetensors` or `FILE.pt`, the last two with
    `:TENSOR` where they hold several tensors and none is called q, k, v or key_bias. `layout` is the order of the axes
    of q, k and v, as in `oocattn.Inputs`, and `storage_options` are for URLs, also that of the dataset. float16,
    bfloat16 and float32 are kept unless `dtype` asks for another of them, by a name or as that of NumPy or PyTorch;
    float64 is read only with a `dtype`.
    Raises ProblemError for a tensor that is missing or not understood and for options, shapes and dtypes that cannot be,
    before anything is written, and for a finite value that overflows `dtype`; ResultExistsError where `path` is taken and
    `overwrite` is not given.
    """
    converted = None if dtype is None else str(dtype)
    opened = {name: open_tensor(name, tensor, storage_options) for name, tensor in (("q", q), ("k", k), ("v", v))}
    sources = plain_sources(opened, layout)
    dtypes = {name: _dtype(source, converted) for name, source in sources.items()}
    if key_bias is not None:
        sources[KEY_BIAS] = bias_source(open_tensor(KEY_BIAS, key_bias, storage_options))
        dtypes[KEY_BIAS] = _dtype(sources[KEY_BIAS], "float32")
    specs = {name: _spec(source, dtypes[name]) for name, source in sources.items()}
    make_problem(specs["q"], specs["k"], specs["v"], key_bias=specs.get(KEY_BIAS))
    q_spec, k_spec = (replace(specs[name], shape=opened[name].shape) for name in ("q", "k"))
    warn_if_transposed(q_spec, k_spec, [sources[name].axes.order for name in ("q", "k")])
    origin = {name: str(source.origin) for name, source in sources.items()}
    dimensions = dimension_names({name: spec.shape for name, spec in specs.items()})
    attributes = {"oocattn": {"imported_from": origin}}
    with create_dataset(path, attributes=attributes, overwrite=overwrite, storage_options=storage_options) as group:
        for name, spec in specs.items():
            array = create_array(group, name, spec.shape, spec.dtype, dimensions=dimensions[name])
            fill_array(array, partial(_read_rows, sources[name], spec.dtype))


def _spec(source: TensorSource, dtype: str) -> ArraySpec:
    """The array that a tensor becomes in the dataset."""
    shape = source.spec.shape
    return ArraySpec(f"{source.name} ({source.origin})", (1,) * (RANKS[source.name] - len(shape)) + shape, dtype)


def _dtype(source: TensorSource, wanted: str | None) -> str:
    """The dtype that a tensor has in the dataset. Raises ProblemError where it cannot be converted, or must be."""
    found = source.spec.dtype
    if found not in (*DTYPES, "float64"):
        raise ProblemError(
            f"{source.name} ({source.origin}) has dtype {found}: expected one of {', '.join(DTYPES)}; convert it first"
        )
    if found == "float64" and wanted is None:
        raise ProblemError(
            f"{source.name} ({source.origin}) has dtype float64: convert it on the way in with {setting('dtype', 'float32')}"
        )
    return wanted or found


def _read_rows(source: TensorSource, dtype: str, batch: int, head: int, start: int, stop: int) -> NDArray[Any]:
    """Tokens [start, stop) of one head in `dtype`: [stop - start, D], or [stop - start] of a key bias."""
    rows = np.empty((stop - start, *source.row_shape), source.dtype)
    source.read_rows(batch, head, start, stop, rows)
    return _convert(source, dtype, rows, f"head {head}, tokens {start} to {stop}")


def _convert(source: TensorSource, dtype: str, rows: NDArray[Any], where: str) -> NDArray[Any]:
    """The same numbers in `dtype`. Raises ProblemError, which says where, for a finite one that overflows it."""
    try:
        with np.errstate(over="raise"):
            return rows.astype(numpy_dtype(dtype), copy=False)
    except FloatingPointError as error:
        remedy = (
            "write smaller ones, or -inf"
            if source.name == KEY_BIAS
            else f"import as bfloat16 or float32, with {named('dtype')}"
        )
        raise ProblemError(f"{source.origin} holds values too large for {dtype}, {where}: {remedy}") from error
