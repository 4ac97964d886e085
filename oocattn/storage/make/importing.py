"""Import of .npy, .safetensors and .pt files into a dataset of our own. All are checked first."""

from __future__ import annotations

import os
import re
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
from oocattn.problem.arrays import DTYPES, KEY_BIAS, ArraySpec
from oocattn.problem.problem import make_problem
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.meaning import LAYOUTS, warn_if_transposed
from oocattn.storage.locations import describe, parse_location
from oocattn.storage.make.create import create_array, create_dataset, dimension_names, fill_array
from oocattn.storage.make.tensor_files import FileTensor, open_npy, open_safetensors, open_torch

_FILE_AND_TENSOR = re.compile(r"(.+\.(?:npy|safetensors|pt|pth))(?::(.+))?")


@checked(layout=arguments.choice(*LAYOUTS), dtype=arguments.dtype, overwrite=arguments.boolean)
@keep_denormals()
def import_arrays(
    path: str | Path,
    *,
    q: str | Path,
    k: str | Path,
    v: str | Path,
    key_bias: str | Path | None = None,
    layout: str = "bhnd",
    dtype: Dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Copy the tensors of files into a new dataset at `path`.

    Its arrays q, k and v have the shape [B, H, N, D]. More heads than tokens, by `layout`, are logged as a warning: the
    axes may be in another order. `key_bias` becomes float32 [B, H, N], of 1 head or as many as q has; its file may lack B,
    or B and H.

    A file is `FILE.npy`, `FILE.safetensors` or `FILE.pt`, the last two with `:TENSOR` where they hold several tensors
    and none is called q, k, v or key_bias. `layout` is the order of the axes of q, k and v in the files. float16, bfloat16
    and float32 are kept unless `dtype` asks for another of them, by a name or as that of NumPy or PyTorch; float64 is read
    only with a `dtype`. Raises ProblemError for a file that is missing or not understood and for options, shapes and dtypes
    that cannot be, before anything is written, and for a finite value that overflows `dtype`; ResultExistsError where
    `path` is taken and `overwrite` is not given.
    """
    converted = None if dtype is None else str(dtype)
    sources = {name: _open(name, file) for name, file in (("q", q), ("k", k), ("v", v))}
    specs = {name: _spec(name, source, layout, converted) for name, source in sources.items()}
    readers = {name: partial(_read_rows, source, layout, specs[name].dtype) for name, source in sources.items()}
    if key_bias is not None:
        sources[KEY_BIAS] = _open(KEY_BIAS, key_bias)
        specs[KEY_BIAS] = _bias_spec(sources[KEY_BIAS])
        readers[KEY_BIAS] = partial(_read_bias, sources[KEY_BIAS])
    make_problem(specs["q"], specs["k"], specs["v"], key_bias=specs.get(KEY_BIAS))
    as_filed = {name: replace(specs[name], shape=source.shape) for name, source in sources.items()}
    warn_if_transposed(as_filed["q"], as_filed["k"], layout)
    origin = {name: source.label for name, source in sources.items()}
    dimensions = dimension_names({name: spec.shape for name, spec in specs.items()})
    with create_dataset(path, attributes={"oocattn": {"imported_from": origin}}, overwrite=overwrite) as group:
        for name, spec in specs.items():
            array = create_array(group, name, spec.shape, spec.dtype, dimensions=dimensions[name])
            fill_array(array, readers[name])


def _spec(name: str, source: FileTensor, layout: str, dtype: str | None) -> ArraySpec:
    """The array that `source` becomes in the dataset. Raises ProblemError where its rank or dtype cannot become that."""
    if len(source.shape) != len(layout):
        raise ProblemError(
            f"{name} ({source.label}) has shape {list(source.shape)}: layout {layout} has {len(layout)} dimensions; "
            f"name the order of the axes with --layout, one of {', '.join(LAYOUTS)}"
        )
    found = source.dtype.name
    if found not in (*DTYPES, "float64"):
        raise ProblemError(
            f"{name} ({source.label}) has dtype {found}: expected one of {', '.join(DTYPES)}; convert it first"
        )
    if found == "float64" and dtype is None:
        raise ProblemError(f"{name} ({source.label}) has dtype float64: convert it on the way in with --dtype float32")
    size = dict(zip(layout, source.shape, strict=True))
    return ArraySpec(f"{name} ({source.label})", tuple(size.get(axis, 1) for axis in "bhnd"), dtype or found)


def _read_rows(source: FileTensor, layout: str, dtype: str, batch: int, head: int, start: int, stop: int) -> NDArray[Any]:
    """Rows [start, stop) of one head: [stop - start, D] in `dtype`."""
    part = {"b": slice(batch, batch + 1), "h": slice(head, head + 1), "n": slice(start, stop), "d": slice(None)}
    rows = source.read([part[axis] for axis in layout]).reshape(stop - start, -1)
    return _convert(source, dtype, rows, f"head {head}, tokens {start} to {stop}: import as bfloat16 or float32 (--dtype)")


def _bias_spec(source: FileTensor) -> ArraySpec:
    """The key bias that `source` becomes, [B, H, N]. Raises ProblemError where its rank or dtype cannot become that."""
    rank, dtype = len(source.shape), source.dtype.name
    if not 1 <= rank <= 3 or dtype not in (*DTYPES, "float64"):
        raise ProblemError(
            f"{KEY_BIAS} ({source.label}) is {dtype} {list(source.shape)}: expected floating-point numbers [B, H, N], "
            "[H, N] or [N], one for each key"
        )
    return ArraySpec(f"{KEY_BIAS} ({source.label})", (1,) * (3 - rank) + source.shape, "float32")


def _read_bias(source: FileTensor, batch: int, head: int, start: int, stop: int) -> NDArray[Any]:
    """The bias of keys [start, stop) of one head: [stop - start]."""
    part = (slice(batch, batch + 1), slice(head, head + 1), slice(start, stop))
    rows = source.read(part[-len(source.shape) :]).reshape(stop - start)
    return _convert(source, "float32", rows, f"head {head}, keys {start} to {stop}: write smaller ones, or -inf")


def _convert(source: FileTensor, dtype: str, rows: NDArray[Any], advice: str) -> NDArray[Any]:
    """The same numbers in `dtype`. Raises ProblemError, which says where, for a finite one that overflows it."""
    try:
        with np.errstate(over="raise"):
            return rows.astype(numpy_dtype(dtype), copy=False)
    except FloatingPointError as error:
        raise ProblemError(f"{source.label} holds values too large for {dtype}, {advice}") from error


def _open(name: str, typed: object) -> FileTensor:
    """Open the tensor that is to become array `name`."""
    if not isinstance(typed, str | os.PathLike):
        raise ProblemError(
            f"{name}: found {describe(typed)}, expected the path of a file: save the tensor with torch.save or numpy.save, "
            "and name FILE.pt, FILE.npy or FILE.safetensors"
        )
    file = os.fsdecode(typed)
    match = _FILE_AND_TENSOR.fullmatch(file)
    if match is None:
        raise ProblemError(f"{name}: {file} is not understood: expected FILE.npy, FILE.safetensors or FILE.pt[:TENSOR]")
    path, tensor = parse_location(match[1]).path, match[2]
    if path is None:
        raise ProblemError(f"{name}: {file} is a URL: tensors are imported from local files; copy it first")
    try:
        if path.suffix != ".npy":
            return (open_safetensors if path.suffix == ".safetensors" else open_torch)(name, path, tensor)
        found = open_npy(name, path)
    except (FileNotFoundError, NotADirectoryError):
        raise ProblemError(f"{name}: there is no file {path}") from None
    if found.dtype.str[1:] in ("V2", "u2"):
        raise ProblemError(
            f"{name}: {path} has dtype {found.dtype}: .npy cannot say bfloat16, if that is what it holds; "
            "save it as .safetensors or .pt, or as float32"
        )
    return found
