"""The same tensors give the same bits, whatever kind of source they are, and however their axes lie."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store import BUCKET, serving_s3
from sources import KINDS, LAYOUTS, Place, as_torch, exists, forget, stored_tensors
from support import normal_arrays
from zarr.storage import FsspecStore

import oocattn
from oocattn import Inputs

DTYPES = ("float32", "float16", "bfloat16")

PINNED: dict[str, Any] = {
    "chunks": 2,
    "decomposition": "cqs",
    "kernel": "cpu",
    "host_memory": "64MiB",
    "engine": "inline",
    "checkpoint_interval": 0,
}

Case = tuple[str, str, str]


def some_cases(count: int) -> list[Case]:
    """Cases of each kind and each layout, and dtypes in turn."""
    found = [case for case in itertools.product(KINDS, LAYOUTS, DTYPES) if exists(*case)]
    random.Random(7).shuffle(found)
    chosen: dict[tuple[str, str], Case] = {}
    for case in found:
        chosen.setdefault(case[:2], case)
    return list(chosen.values())[:count]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], np.ndarray]:
    """Results of imported datasets, by dtype, and whether there are batch entries."""
    folder, found = tmp_path_factory.mktemp("imported"), {}
    for dtype, batch in itertools.product(DTYPES, (1, 2)):
        held = stored_tensors("bhnd", *tensors(dtype, batch))
        place = folder / f"{dtype}{batch}.zarr"
        oocattn.import_arrays(place, **held)
        result = oocattn.attention(place, folder / f"out{dtype}{batch}.zarr", **PINNED)
        found[dtype, batch == 2] = result.out[...]
    return found


def tensors(dtype: str, batch: int) -> Any:
    return normal_arrays(32, heads=2, kv_heads=2, batch=batch, dtype=dtype, seed=batch)


@pytest.fixture
def folder(fast_path: Path) -> Iterator[Path]:
    yield fast_path
    forget(fast_path)


@pytest.mark.parametrize("case", some_cases(100), ids=" - ".join)
def test_a_source_gives_the_bits_of_the_imported_dataset(case: Case, folder: Path, imported: Any) -> None:
    kind, layout, dtype = case
    batch = 2 if "b" in layout else 1
    stored = stored_tensors(layout, *tensors(dtype, batch))
    place = Place(folder, layout)
    heads = {"heads": 2, "kv_heads": 2} if "f" in layout else {}
    given = {name: KINDS[kind](place, name, each) for name, each in stored.items()}
    result = oocattn.attention(Inputs(**given, layout=layout, **heads), folder / "out.zarr", **PINNED)
    assert_bits(result, imported[dtype, batch == 2])


def assert_bits(result: oocattn.Result, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(result.out[...].view(np.uint8), expected.view(np.uint8))


MIXED = [
    (("npy", "array in shards", "torch"), ("bhnd", "bnhd", "bhnd")),
    (("safetensors", "dask", "numpy, backwards"), ("bnhd", "bhnd", "bnhd")),
    (("array in Icechunk", "map of anything", "URL"), ("bhnd", "bnhd", "bnhd")),
    (("checkpoint", "numpy", "xarray"), ("hnd", "nhd", "hnd")),
    (("pt", "array of format 2", "array in a zip"), ("nhd", "hnd", "nhd")),
]
"""Kinds of q, k and v, and their layouts."""


@pytest.mark.parametrize(("kinds", "layouts"), MIXED, ids=lambda names: " - ".join(names))
def test_q_k_and_v_may_be_of_different_kinds_and_layouts(
    kinds: tuple[str, ...], layouts: tuple[str, ...], folder: Path, imported: Any
) -> None:
    if not all(exists(kind, layout, "float16") for kind, layout in zip(kinds, layouts, strict=True)):
        pytest.skip("a package is missing")
    batch = 2 if "b" in layouts[0] else 1
    given = {}
    for name, kind, layout in zip("qkv", kinds, layouts, strict=True):
        stored = stored_tensors(layout, *tensors("float16", batch))[name]
        given[name] = KINDS[kind](Place(folder, layout), name, stored)
    layout = dict(zip("qkv", layouts, strict=True))
    assert_bits(
        oocattn.attention(Inputs(**given, layout=layout), folder / "out.zarr", **PINNED), imported["float16", batch == 2]
    )


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_heads_that_an_expanded_view_repeats_are_those_of_a_copy(kind: str, folder: Path) -> None:
    """Strides of 0, as `repeat_kv` and `expand` leave them."""
    q, k, v = normal_arrays(32, heads=4, kv_heads=1)
    copied = {"q": q, "k": k.repeat(4, 1), "v": v.repeat(4, 1)}
    expected = oocattn.attention(Inputs(**copied), folder / "expected.zarr", **PINNED).out[...]
    views = {"k": np.broadcast_to(k, q.shape), "v": np.broadcast_to(v, q.shape)}
    if kind == "torch":
        views = {name: as_torch(each).expand(q.shape) for name, each in (("k", k), ("v", v))}
    assert_bits(oocattn.attention(Inputs(q=q, **views), folder / "out.zarr", **PINNED), expected)


def test_tensors_in_a_bucket_give_the_bits_of_the_imported_dataset(folder: Path, imported: Any) -> None:
    with serving_s3() as options:
        store = FsspecStore.from_url(f"s3://{BUCKET}/in.zarr", storage_options={**options, "asynchronous": True})
        stored = stored_tensors("bnf", *tensors("float16", 2))["qkv"]
        Place(folder, "bnf").array(store, "qkv", stored)[...] = stored
        inputs = Inputs(qkv=f"s3://{BUCKET}/in.zarr/qkv", layout="bnf", heads=2, kv_heads=2)
        result = oocattn.attention(inputs, folder / "out.zarr", **PINNED, storage_options=options)
    assert_bits(result, imported["float16", True])
