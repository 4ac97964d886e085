"""What to give in place of objects that are no tensors here: those of other libraries."""

from __future__ import annotations

import numpy as np

_REMEDIES = {
    "pandas": "give its .to_numpy()",
    "polars": "give its .to_numpy()",
    "pyarrow": "give its numbers as an array of NumPy",
    "h5py": "read it, as with ARRAY[...], or save it as .npy",
    "netCDF4": "open it with xarray, and give a DataArray",
    "tables": "read it, as with ARRAY[...], or save it as .npy",
    "cupy": "give torch.from_dlpack(ARRAY)",
    "jax": "give numpy.asarray(ARRAY)",
    "jaxlib": "give numpy.asarray(ARRAY)",
    "tensorflow": "give ARRAY.numpy()",
    "mlx": "give numpy.array(ARRAY)",
    "tensorstore": "give its path or URL, or numpy.asarray(ARRAY)",
    "scipy": "give its .toarray()",
    "sparse": "give its .todense()",
    "safetensors": "give FILE.safetensors:TENSOR",
    "zarr": "give a zarr.Array",
    "distributed": "give its .result()",
    "dask": "give an array of it (dask.array.from_delayed, .to_dask_array)",
}


def remedy_for(found: object) -> str:
    """What to do with an object that is no tensor, for the end of a message; "" where nothing can be said."""
    if isinstance(found, bytes | bytearray):
        return "; decode it first, as with os.fsdecode"
    if isinstance(found, list | tuple | memoryview):
        return "; give numpy.asarray(...) of it, in float32"
    for cls in type(found).__mro__:
        remedy = _REMEDIES.get(cls.__module__.partition(".")[0])
        if remedy is not None:
            return f"; {remedy}"
    if isinstance(found, np.generic | int | float):
        return ""
    return "; give numpy.asarray(...) of it" if hasattr(found, "__array__") and not isinstance(found, type) else ""
