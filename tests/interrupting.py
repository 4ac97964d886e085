"""Interrupts a run at an event: what tests of resuming share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import Client
from support import (
    carry_out,
    normal_arrays,
    plan_for,
    write_dataset,
)

import oocattn
from oocattn import Event, Plan, Result

TOKENS = 170
"""Tokens of the datasets in tests of resuming: 13 chunks of 14 rows, the last of 2."""


def write_resuming_dataset(folder: Path) -> Path:
    """A dataset of two head groups."""
    return write_dataset(folder / "dataset.zarr", normal_arrays(TOKENS, heads=4, kv_heads=2))


def uninterrupted_results(folder: Path, client: Client) -> dict[bool, Result]:
    """Results of uninterrupted runs on that dataset, causal or not; they are the same wherever partials are."""
    dataset = write_resuming_dataset(folder)
    return {
        causal: carry_out(plan_for(dataset, chunks=13, causal=causal), dataset, folder / f"{causal}.zarr", client)
        for causal in (False, True)
    }


class EnoughError(BaseException):
    """What interrupts a run: an Exception of a listener would not."""


def interrupt(kind: str, count: int) -> Callable[[Event], None]:
    """A listener that raises at the `count`-th event of a kind."""
    seen = []

    def listen(event: Event) -> None:
        if event.kind == kind:
            seen.append(event)
            if len(seen) == count:
                raise EnoughError

    return listen


def interrupted(plan: Plan, dataset: Path, result: Path, client: Client, kind: str = "written", count: int = 5) -> None:
    with pytest.raises(EnoughError):
        carry_out(plan, dataset, result, client, callbacks=[interrupt(kind, count)])
    assert oocattn.status(result).state == "interrupted"
