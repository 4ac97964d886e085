"""Errors for an object in the place of a path or URL, with the remedy.

Nothing is imported for it: an object of Zarr or torch has brought its own module along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oocattn.errors import ProblemError
from oocattn.text import printable

_TENSORS = (
    "save tensors with torch.save or numpy.save, write them to a dataset with oocattn.import_arrays(DATASET, q=FILE, "
    "k=FILE, v=FILE), and give DATASET"
)


def no_path(found: object, what: str) -> ProblemError:
    """The error for an object where `what` ("dataset", ...) must be a path."""
    expected = "a path or a URL" if what == "dataset" else "a local path"
    return ProblemError(f"{what}: found {describe(found)}, expected {expected}{_remedy(found, what)}")


def no_file(found: object, what: str) -> ProblemError:
    """The error for an object where the file of tensor `what` must be named."""
    return ProblemError(
        f"{what}: found {describe(found)}, expected the path of a file: save the tensor with torch.save or numpy.save, and "
        "name FILE.pt, FILE.npy or FILE.safetensors"
    )


def describe(found: object) -> str:
    """An object in a few words: its type, and its shape or value."""
    if found is None:
        return "None"
    kind = type(found)
    module = kind.__module__.partition(".")[0].removeprefix("_")  # as of _io.BytesIO
    name = kind.__name__ if module == "builtins" else f"{module}.{kind.__name__}"
    article = "an" if name[0] in "aeiouAEIO" else "a"
    shape = getattr(found, "shape", None)
    if isinstance(shape, tuple):
        return f"{article} {name} {printable(list(shape))}"
    if isinstance(found, int | float | bytes):
        return f"the {name} {printable(repr(found)):.80}"
    return f"{article} {name}"


def _remedy(found: object, what: str) -> str:
    if isinstance(found, bytes | bytearray):
        return ": decode it first, as with os.fsdecode"
    if (place := _place_in_zarr(found)) is not None:
        return place
    if what == "dataset" and (isinstance(found, list | tuple | dict) or hasattr(found, "shape")):
        return f": {_TENSORS}"
    return ""


def _place_in_zarr(found: Any) -> str | None:
    """What to give instead of an object of Zarr; None for anything else."""
    if not type(found).__module__.startswith("zarr."):
        return None
    store, name = getattr(found, "store", found), getattr(found, "path", "")
    root = getattr(store, "root", None)
    if isinstance(root, Path):
        place = root / name if isinstance(name, str) else root
        group = place.parent if hasattr(found, "shape") else place
        return f", such as {printable(repr(str(group)))}"
    return ": give the path or URL that it was opened from; if it is in memory, write it to a folder first"
