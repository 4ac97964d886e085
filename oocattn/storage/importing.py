"""Import of tensors from .npy, .safetensors and .pt files into a dataset of our own kind.

A file is opened without being loaded and without running what it may carry (numpy's allow_pickle=False, torch's
weights_only=True); the three tensors are checked against each other before anything is written; then they are copied
chunk by chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from oocattn.denormals import denormals_kept
from oocattn.errors import ProblemError
from oocattn.problem import DTYPES, ArraySpec, make_problem
from oocattn.storage.create import create_array, create_dataset, fill_array, numpy_dtype
from oocattn.storage.locations import parse_location
from oocattn.text import printable

if TYPE_CHECKING:
    import torch

LAYOUTS = ("bhnd", "bnhd", "hnd", "nhd")
"""Orders of a tensor's axes that are understood: b batch, h heads, n tokens, d head dimension."""

_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_FILE_AND_TENSOR = re.compile(r"(.+\.(?:npy|safetensors|pt|pth))(?::(.+))?")


@dataclass(frozen=True)
class Source:
    """One tensor in a file: `read` takes a slice for each axis of `shape`, in the file's order, and gives that part."""

    label: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[slice, ...]], NDArray[Any]]


@denormals_kept()
def import_arrays(
    path: str | Path,
    *,
    q: str | Path,
    k: str | Path,
    v: str | Path,
    layout: str = "bhnd",
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Copy the tensors of three files into a new dataset at `path`, with arrays q, k, v of shape [B, H, N, D].

    A file is `FILE.npy`, `FILE.safetensors` or `FILE.pt`, the last two with `:TENSOR` where they hold several tensors
    and none is called q, k or v. `layout` is the order of the axes in the files. float16, bfloat16 and float32 are kept
    unless `dtype` asks for another of them; float64 is read only with a `dtype`. Raises ProblemError for a file that is
    missing or not understood and for shapes and dtypes that do not go together, before anything is written, and for
    a finite value that overflows `dtype`; ResultExistsError where `path` is taken and `overwrite` is not given.
    """
    if layout not in LAYOUTS:
        raise ProblemError(f"layout {layout!r} is not understood: expected one of {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ProblemError(f"dtype {dtype!r} is not supported: expected one of {', '.join(DTYPES)}")
    sources = {name: _open(name, str(file)) for name, file in (("q", q), ("k", k), ("v", v))}
    specs = {name: _spec(name, source, layout, dtype) for name, source in sources.items()}
    make_problem(specs["q"], specs["k"], specs["v"])
    origin = {name: source.label for name, source in sources.items()}
    with create_dataset(path, attributes={"oocattn": {"imported_from": origin}}, overwrite=overwrite) as group:
        for name, source in sources.items():
            array = create_array(group, name, specs[name].shape, specs[name].dtype)
            fill_array(array, partial(_read_rows, source, layout, specs[name].dtype))


def _spec(name: str, source: Source, layout: str, dtype: str | None) -> ArraySpec:
    """What `source` will be in the dataset; raises ProblemError where its rank or dtype cannot become that."""
    if len(source.shape) != len(layout):
        raise ProblemError(
            f"{name} ({source.label}) has shape {list(source.shape)}: layout {layout} has {len(layout)} dimensions; "
            f"name the order of the axes with --layout, one of {', '.join(LAYOUTS)}"
        )
    if source.dtype not in (*DTYPES, "float64"):
        raise ProblemError(
            f"{name} ({source.label}) has dtype {source.dtype}: expected one of {', '.join(DTYPES)}; convert it first"
        )
    if source.dtype == "float64" and dtype is None:
        raise ProblemError(f"{name} ({source.label}) has dtype float64: convert it on the way in with --dtype float32")
    size = dict(zip(layout, source.shape, strict=True))
    return ArraySpec(f"{name} ({source.label})", tuple(size.get(axis, 1) for axis in "bhnd"), dtype or source.dtype)


def _read_rows(source: Source, layout: str, dtype: str, batch: int, head: int, start: int, stop: int) -> NDArray[Any]:
    """Rows [start, stop) of one head: [stop - start, D] in `dtype`."""
    part = {"b": slice(batch, batch + 1), "h": slice(head, head + 1), "n": slice(start, stop), "d": slice(None)}
    rows = source.read(tuple(part[axis] for axis in layout)).reshape(stop - start, -1)
    try:
        with np.errstate(over="raise"):
            return rows.astype(numpy_dtype(dtype), copy=False)
    except FloatingPointError as error:
        raise ProblemError(
            f"{source.label} holds values too large for {dtype}, head {head}, tokens {start} to {stop}: "
            "import it as bfloat16 or float32 (--dtype)"
        ) from error


def _open(name: str, file: str) -> Source:
    """Open the tensor that is to become array `name`."""
    match = _FILE_AND_TENSOR.fullmatch(file)
    if match is None:
        raise ProblemError(f"{name}: {file} is not understood: expected FILE.npy, FILE.safetensors or FILE.pt[:TENSOR]")
    path, tensor = parse_location(match[1]).path, match[2]
    if path is None:
        raise ProblemError(f"{name}: {printable(file)} is a URL: tensors are imported from local files; copy it first")
    if not path.is_file():
        raise ProblemError(f"{name}: there is no file {printable(path)}")
    if path.suffix == ".npy":
        return _open_npy(name, path)
    if path.suffix == ".safetensors":
        return _open_safetensors(name, path, tensor)
    return _open_torch(name, path, tensor)


def _open_npy(name: str, path: Path) -> Source:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a file that is no .npy numpy has many
        raise ProblemError(
            f"{name}: {path} cannot be mapped as a .npy file of numbers ({printable(error)}): save one plain array with "
            "numpy.save"
        ) from error
    if not isinstance(array, np.ndarray):
        raise ProblemError(f"{name}: {path} is an archive of arrays: save one plain array with numpy.save")
    if array.dtype.str[1:] in ("V2", "u2"):
        raise ProblemError(
            f"{name}: {path} has dtype {array.dtype}: .npy cannot say bfloat16, if that is what it holds; "
            "save it as .safetensors or .pt, or as float32"
        )
    return Source(str(path), array.shape, array.dtype.name, lambda part: np.array(array[part]))


def _open_safetensors(name: str, path: Path, tensor: str | None) -> Source:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ProblemError(
            f"{name}: reading {path} needs the safetensors package: pip install 'oocattn[safetensors]'"
        ) from error
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ProblemError(f"{name}: {path} is not a whole safetensors file: {printable(error)}") from error
    key = _pick(name, path, tensor, list(file.keys()))
    view = file.get_slice(key)
    dtype = _SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
    return Source(f"{path}:{key}", tuple(view.get_shape()), dtype, lambda part: _as_numpy(view[part]))


def _open_torch(name: str, path: Path, tensor: str | None) -> Source:
    import torch

    try:
        found = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except Exception as error:  # of a file that torch did not write it has many
        raise ProblemError(
            f"{name}: {path} is not a file of plain tensors, as torch.save writes them: save one, or a dict of them"
        ) from error
    label = str(path)
    if isinstance(found, dict):
        key = _pick(name, path, tensor, [key for key in found if isinstance(key, str)])
        found, label = found[key], f"{path}:{key}"
    if not isinstance(found, torch.Tensor) or found.layout is not torch.strided:
        raise ProblemError(f"{name}: {label} is a {type(found).__name__}: expected a dense tensor")
    dense = found.detach()
    return Source(label, tuple(dense.shape), str(dense.dtype).removeprefix("torch."), lambda part: _as_numpy(dense[part]))


def _pick(name: str, path: Path, tensor: str | None, found: list[str]) -> str:
    """The key of the tensor meant: the one that is named, or called `name`, or the only one."""
    if tensor is None and len(found) == 1:
        return found[0]
    key = tensor or name
    if key not in found:
        some = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
        raise ProblemError(f"{name}: {path} has no tensor {key!r}: name one as {path}:TENSOR; it holds {some or 'none'}")
    return key


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A contiguous numpy array of the tensor's values; bfloat16 as that of ml_dtypes."""
    import torch

    dense = tensor.contiguous()
    if dense.dtype == torch.bfloat16:
        return dense.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return dense.numpy()
