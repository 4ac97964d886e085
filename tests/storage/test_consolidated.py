"""Consolidated metadata, which Zarr and xarray believe: what they say of q, k and v must be what the arrays say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import normal_arrays

from oocattn.errors import ProblemError
from oocattn.storage.inputs.dataset import Dataset


@pytest.fixture(params=[2, 3])
def consolidated(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A dataset of Zarr format 2 or 3 with consolidated metadata."""
    path = tmp_path / "d.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=request.param)
    for name, data in zip("qkv", normal_arrays(64), strict=True):
        array = group.create_array(name, shape=data.shape, dtype=data.dtype, chunks=(1, 1, 32, 8), fill_value=np.nan)
        array[...] = data
    zarr.consolidate_metadata(path)
    return path


def change(path: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the consolidated metadata say of an array: its shape and so on, and `attributes`."""
    document = path / ".zmetadata" if (path / ".zmetadata").exists() else path / "zarr.json"
    content = json.loads(document.read_text())
    if document.name == "zarr.json":
        change(content["consolidated_metadata"]["metadata"][name])
    else:
        attributes = content["metadata"].setdefault(f"{name}/.zattrs", {})
        array = {**content["metadata"][f"{name}/.zarray"], "attributes": attributes}
        change(array)
        content["metadata"][f"{name}/.zattrs"] = array.pop("attributes")
        content["metadata"][f"{name}/.zarray"] = array
    document.write_text(json.dumps(content))


def test_consolidated_metadata_that_agree_are_accepted(consolidated: Path) -> None:
    change(consolidated, "q", lambda array: array["attributes"].update(history="written in May"))
    assert Dataset.open(consolidated).arrays["q"].array.shape == (1, 2, 64, 8)


@pytest.mark.parametrize(
    ("field", "outdate"),
    [
        ("shape", lambda array: array["shape"].__setitem__(2, 32)),
        ("scale_factor", lambda array: array["attributes"].update(scale_factor=0.01)),
        ("_ARRAY_DIMENSIONS", lambda array: array["attributes"].update(_ARRAY_DIMENSIONS=["b", "t", "h", "d"])),
    ],
)
def test_outdated_consolidated_metadata_are_refused(consolidated: Path, field: str, outdate: Callable[..., Any]) -> None:
    change(consolidated, "k", outdate)
    with pytest.raises(
        ProblemError, match=rf"array 'k' .* has {field} = .*consolidated metadata .*consolidate_metadata\(PATH"
    ):
        Dataset.open(consolidated)


@pytest.mark.parametrize("content", [[], {"metadata": 1}, {"metadata": {"q": 1, "q/.zarray": 1}}])
def test_consolidated_metadata_without_arrays_say_nothing(consolidated: Path, content: object) -> None:
    document = consolidated / ".zmetadata"
    if document.exists():
        document.write_text(json.dumps(content if isinstance(content, dict) else {}))
    else:
        group = json.loads((consolidated / "zarr.json").read_text())
        (consolidated / "zarr.json").write_text(json.dumps({**group, "consolidated_metadata": content}))
    Dataset.open(consolidated)
