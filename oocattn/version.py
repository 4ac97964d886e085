"""The version of this package, and of what it computes and stores results with."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

__version__ = "0.1.0"


@cache
def source_digest() -> str:
    """Digest of the sources of this package: two processes may have the same version, and other code."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.cu", "*.cuh") for path in folder.rglob(pattern)):
        digest.update(f"\n{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions that a result is recorded with."""
    import numpy as np
    import torch
    import zarr

    return {
        "oocattn": __version__,
        "torch": str(torch.__version__),
        "zarr": zarr.__version__,
        "numpy": np.__version__,
        "dask": _installed("dask"),
    }


@cache
def _installed(package: str) -> str:
    """The version of a package, which need not be imported for it; its metadata is searched once."""
    return version(package)
