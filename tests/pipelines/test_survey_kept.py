"""The pass of a survey that is not finished: what it did is kept, whatever is asked for next, until it is thrown away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interrupting import EnoughError, interrupt
from passes import bits, copied, planned
from support import normal_arrays, write_dataset

import oocattn
from oocattn import Survey

TOKENS = 150


@pytest.fixture(scope="module")
def dataset(shared_path: Path) -> Path:
    return write_dataset(shared_path / "dataset.zarr", normal_arrays(TOKENS, heads=2, kv_heads=2))


@pytest.fixture(scope="module")
def first(dataset: Path, shared_path: Path) -> Path:
    """A result without a survey; not to be changed."""
    oocattn.attention(dataset, shared_path / "first.zarr", causal=True, engine="inline")
    return shared_path / "first.zarr"


@pytest.fixture(scope="module")
def right(first: Path, shared_path: Path) -> dict[str, bytes]:
    """The bits of its survey."""
    return bits(survey(copied(first, shared_path / "right.zarr")))


@pytest.fixture
def result(first: Path, fast_path: Path) -> Path:
    return copied(first, fast_path / "result.zarr")


def survey(result: Path, partials: str = "memory", **options: Any) -> Survey:
    with planned(3, partials=partials):
        return oocattn.survey(result, **{"engine": "inline", "pool": 7, **options})


def cut_off(result: Path, kind: str = "attended", count: int = 2, **options: Any) -> None:
    with pytest.raises(EnoughError):
        survey(result, callbacks=[interrupt(kind, count)], **options)


@pytest.mark.parametrize("partials", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["attended", "written"])
@pytest.mark.parametrize("arrays", [["entropy"], ["entropy", "top_keys"], ["received"]], ids=",".join)
def test_what_a_pass_has_done_is_not_done_again_also_where_it_sums_nothing_over_rows(
    arrays: list[str], kind: str, partials: str, result: Path, right: dict[str, bytes]
) -> None:
    cut_off(result, kind, 4, arrays=arrays, partials=partials)
    attended: list[int] = []
    found = survey(
        result, partials, arrays=arrays, callbacks=[lambda e: attended.append(e.pairs) if e.kind == "attended" else None]
    )
    assert bits(found) == {name: right[name] for name in found.arrays}
    assert sum(attended) < TOKENS * (TOKENS + 1) // 2  # of both heads it would be twice as many
