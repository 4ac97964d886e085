"""Places of results in stores, for tests."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from interrupting import EnoughError, interrupt
from object_store import BUCKET
from support import carry_out

import oocattn
from oocattn.storage.paths import ResultPaths

ARGUMENTS = {"result": None, "scratch": None, "lock": "auto", "storage_options": None}

NUMBERS = itertools.count()


def paths_of(place: dict[str, Any]) -> ResultPaths:
    return ResultPaths.at(*(place.get(name, default) for name, default in ARGUMENTS.items()))


def in_s3(options: dict[str, Any]) -> dict[str, Any]:
    return {"result": f"s3://{BUCKET}/r{next(NUMBERS)}.zarr", "storage_options": options}


def seen(place: dict[str, Any]) -> dict[str, Any]:
    """What a reader is given."""
    return {name: value for name, value in place.items() if name != "lock"}


def begin(plan: oocattn.Plan, dataset: Path, place: dict[str, Any]) -> None:
    """A run that ends after its first chunk."""
    with pytest.raises(EnoughError):
        carry_out(plan, dataset, paths_of(place), callbacks=[interrupt("written", 1)])
