"""The same tensors give the same bits, whatever kind of source they are, and however their axes lie."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sources import KINDS, LAYOUTS, Place, exists, forget, stored_tensors
from support import normal_arrays

import oocattn

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
    result = oocattn.attention(oocattn.Inputs(**given, layout=layout, **heads), folder / "out.zarr", **PINNED)
    np.testing.assert_array_equal(result.out[...].view(np.uint8), imported[dtype, batch == 2].view(np.uint8))
