"""The version of this package, and of what it computes and stores results with."""

from importlib.metadata import version

import numpy as np
import torch
import zarr

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions that a result is recorded with."""
    return {
        "oocattn": __version__,
        "torch": str(torch.__version__),
        "zarr": zarr.__version__,
        "numpy": np.__version__,
        "dask": version("dask"),
    }
