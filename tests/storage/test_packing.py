"""Arrays whose attributes say that their numbers mean others are refused; attributes that change nothing are not."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import zarr
from support import assert_nothing_written, normal_arrays

import oocattn
from oocattn import ProblemError
from oocattn.storage.inputs.dataset import Dataset

NAN = float("nan")


def encoded(number: float) -> str:
    """A number as xarray writes a `_FillValue` in Zarr v3."""
    return base64.b64encode(struct.pack("<d", number)).decode()


def write(path: Path, attributes: dict[str, Any], zarr_format: int = 3, dtype: str = "float32") -> Path:
    """A dataset whose array k has these attributes."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for name, data in zip("qkv", normal_arrays(20), strict=True):
        array = group.create_array(name, data=data.astype(dtype), chunks=data.shape)
        if name == "k":
            array.attrs.update(attributes)
    return path


PACKED: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({"scale_factor": 0.01}, r"scale_factor = 0\.01"),
    "scale of zero": ({"scale_factor": 0}, r"scale_factor = 0\.0"),
    "scale as text": ({"scale_factor": "0.5"}, r"scale_factor = 0\.5"),
    "scale in a list": ({"scale_factor": [2.0]}, r"scale_factor = 2\.0"),
    "scale that is no number": ({"scale_factor": {"a": 1}}, r"scale_factor = \{'a': 1\}"),
    "scale that no double can be": ({"scale_factor": 10**400}, r"scale_factor = 10+"),
    "offset": ({"scale_factor": 1.0, "add_offset": 5}, r"add_offset = 5\.0"),
    "offset of NaN": ({"add_offset": NAN}, r"add_offset = nan"),
    "filled": ({"_FillValue": -9999.0}, r"_FillValue = -9999\.0"),
    "filled with zero": ({"_FillValue": 0.0}, r"_FillValue = 0\.0"),
    "filled, as xarray has it": ({"_FillValue": encoded(-9999.0)}, r"_FillValue = -9999\.0"),
    "filled with Inf": ({"_FillValue": float("inf")}, r"_FillValue = inf"),
    "filled with something": ({"_FillValue": "\x1b[2J"}, r"_FillValue = '\\x1b\[2J'"),
    "missing": ({"missing_value": -1}, r"missing_value = -1\.0"),
    "several missing": ({"missing_value": [NAN, 1e20]}, r"missing_value = 1e\+20"),
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("attributes", "message"), PACKED.values(), ids=PACKED)
def test_packed_numbers_are_refused_by_array_and_attribute(
    tmp_path: Path, zarr_format: int, attributes: dict[str, Any], message: str
) -> None:
    dataset = write(tmp_path / "dataset.zarr", attributes, zarr_format)
    with pytest.raises(ProblemError, match=rf"array 'k' of .* has the attribute {message} .*CF.*write the decoded ones"):
        oocattn.plan(dataset)
    with pytest.raises(ProblemError, match="array 'k'"):
        oocattn.attention(dataset, tmp_path / "result.zarr")
    assert_nothing_written(tmp_path / "result.zarr")


def test_packed_integers_are_refused_as_packed(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"scale_factor = 0\.01"):
        oocattn.plan(write(tmp_path, {"scale_factor": 0.01}, dtype="int16"))


UNCHANGED: dict[str, dict[str, Any]] = {
    "NaN": {"_FillValue": NAN},
    "NaN as text": {"_FillValue": "NaN"},
    "NaN as xarray has it": {"_FillValue": encoded(NAN), "missing_value": [NAN]},
    "a scale of one": {"scale_factor": 1, "add_offset": 0.0},
    "none": {"_FillValue": None},
    "of integers": {"_Unsigned": "true"},
    "not applied by xarray": {"valid_range": [0.0, 1.0], "valid_min": 0.0},
    "words": {"units": "1", "long_name": "keys", "scale": 0.5, "history": [NAN]},
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("attributes", UNCHANGED.values(), ids=UNCHANGED)
def test_attributes_that_change_no_number_are_let_pass(tmp_path: Path, zarr_format: int, attributes: dict[str, Any]) -> None:
    Dataset.open(write(tmp_path, attributes, zarr_format))


@pytest.mark.parametrize(
    ("filled", "named", "refused"),
    [(-9999.0, True, True), (-9999.0, False, False), (0.0, True, False), ("NaN", True, False), (None, True, False)],
)
def test_the_fill_value_of_zarr_2_masks_where_xarray_wrote_it(
    tmp_path: Path, filled: Any, named: bool, refused: bool
) -> None:
    dataset = write(tmp_path, {"_ARRAY_DIMENSIONS": ["a", "b", "c", "d"]} if named else {}, zarr_format=2)
    document = dataset / "k/.zarray"
    document.write_text(json.dumps({**json.loads(document.read_text()), "fill_value": filled}))
    if refused:
        with pytest.raises(ProblemError, match=r"array 'k' of .* has the fill_value -9999\.0, .* _FillValue"):
            oocattn.plan(dataset)
    else:
        Dataset.open(dataset)
