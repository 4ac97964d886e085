"""The bfloat16 data type: plain zarr writes and reads it, TensorStore agrees to the bit, Zarr v2 refuses it."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from zarr.codecs import BloscCodec, BytesCodec, ZstdCodec

import oocattn.storage.bfloat16  # noqa: F401  registers the data type

ALL_BITS = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(64, 1024)
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def bits(array: Any) -> np.ndarray:
    return np.asarray(array).view(np.uint16)


def tensorstore_spec(path: Path, **metadata: object) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}


@pytest.mark.parametrize(
    "storage",
    [
        {"compressors": None},
        {"compressors": None, "serializer": BytesCodec(endian="big")},
        {"compressors": ZstdCodec()},
        {"compressors": BloscCodec()},
        {"compressors": None, "shards": (32, 1024)},
        {"compressors": ZstdCodec(), "shards": (32, 1024)},
    ],
)
def test_zarr_and_tensorstore_read_what_zarr_writes(tmp_path: Path, storage: dict[str, Any]) -> None:
    zarr.create_array(tmp_path, shape=ALL_BITS.shape, chunks=(16, 256), dtype=ml_dtypes.bfloat16, **storage)
    zarr.open_array(tmp_path, mode="r+")[...] = ALL_BITS
    read = zarr.open_array(tmp_path, mode="r")[...]
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(bits(read), bits(ALL_BITS))
    theirs = tensorstore.open(tensorstore_spec(tmp_path)).result().read().result()
    np.testing.assert_array_equal(bits(theirs), bits(ALL_BITS))


@pytest.mark.parametrize("endian", ["little", "big"])
def test_zarr_reads_what_tensorstore_writes(tmp_path: Path, endian: str) -> None:
    spec = tensorstore_spec(
        tmp_path,
        shape=ALL_BITS.shape,
        data_type="bfloat16",
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": [16, 256]}},
        codecs=[{"name": "bytes", "configuration": {"endian": endian}}],
    )
    tensorstore.open(spec, create=True).result().write(ALL_BITS).result()
    read = zarr.open_array(tmp_path, mode="r")[...]
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(bits(read), bits(ALL_BITS))


def test_the_metadata_are_those_of_the_extension(tmp_path: Path) -> None:
    zarr.create_array(tmp_path, shape=(4,), chunks=(4,), dtype="bfloat16", compressors=None)
    metadata = json.loads((tmp_path / "zarr.json").read_text())
    assert metadata["data_type"] == "bfloat16"
    assert metadata["fill_value"] == 0.0
    assert metadata["codecs"] == [LITTLE]


@pytest.mark.parametrize("fill_value", [0.0, -0.0, 1.5, 0.1, "NaN", "Infinity", "-Infinity", "0x7fc1", "0x3f80"])
def test_fill_values_mean_what_tensorstore_takes_them_for(tmp_path: Path, fill_value: float | str) -> None:
    grid = {"name": "regular", "configuration": {"chunk_shape": [4]}}
    spec = tensorstore_spec(tmp_path, shape=[4], data_type="bfloat16", chunk_grid=grid, fill_value=fill_value)
    theirs = tensorstore.open(spec, create=True).result().read().result()
    array = zarr.open_array(tmp_path, mode="r")
    np.testing.assert_array_equal(bits(array[...]), bits(theirs))
    written = array.metadata.to_dict()["fill_value"]
    assert written == json.loads((tmp_path / "zarr.json").read_text())["fill_value"]


def test_zarr_v2_and_nonsense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Zarr format 2 has no bfloat16"):
        zarr.create_array(tmp_path, shape=(4,), dtype=ml_dtypes.bfloat16, zarr_format=2)
    with pytest.raises(TypeError, match="bfloat16"):
        zarr.create_array(tmp_path, shape=(4,), dtype="bfloat16", fill_value="zero")
    assert not any(tmp_path.iterdir())


def test_other_data_types_are_left_alone() -> None:
    for dtype in ("float16", "float32", "uint16", "V2"):
        assert zarr.create_array({}, shape=(4,), dtype=dtype).dtype == np.dtype(dtype)


@pytest.mark.skipif(
    not any(point.name == "bfloat16" for point in entry_points(group="zarr.data_type")),
    reason="oocattn is not installed as a distribution",
)
@pytest.mark.skipif(not hasattr(zarr.errors, "DataTypeValidationError"), reason="zarr 3.1 needs `import oocattn`")
def test_zarr_alone_finds_the_data_type_by_its_entry_point() -> None:
    script = "import zarr; print(zarr.create_array({}, shape=(4,), dtype='bfloat16').dtype)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "bfloat16"
