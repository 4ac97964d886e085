"""Pictures of the map of a survey: what their panels are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import normal_arrays, write_dataset

import oocattn


@pytest.mark.parametrize(
    ("heads", "mean_heads", "names"),
    [
        (None, False, ["head 0", "head 1", "head 2", "head 3"]),
        ([1, 3], False, ["head 1", "head 3"]),
        ([2], False, ["head 2"]),
        ([2], True, ["head 2"]),
        ([1, 3], True, ["heads averaged"]),
    ],
)
def test_the_panels_of_a_picture_have_the_numbers_of_the_query_heads(
    heads: list[int] | None, mean_heads: bool, names: list[str], fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(fast_path / "dataset.zarr", normal_arrays(40, heads=4, kv_heads=2))
    oocattn.attention(dataset, fast_path / "part.zarr", heads=heads, engine="inline")
    drawn: list[list[str]] = []
    monkeypatch.setattr("oocattn.drawing.pooled.draw_pooled", lambda panels, about, file, names: drawn.append(names))
    for _ in range(2):  # once computed, once found
        found = oocattn.survey(fast_path / "part.zarr", arrays=["pooled"], mean_heads=mean_heads, engine="inline")
        found.visualize(fast_path / "map.png")
    assert drawn == [names, names]
