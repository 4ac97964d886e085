"""The picture of a division shows every chunk pair that is computed, in the colour of its owner."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support import GENEROUS, MACHINE, a_problem

from oocattn import ProblemError, ResultExistsError
from oocattn.division.drawing import MOST_CHUNKS, draw_division
from oocattn.division.live import LivePairs
from oocattn.division.quorums import CyclicQuorums
from oocattn.division.strips import Strips
from oocattn.planning.candidates import make_plan

SVG = "{http://www.w3.org/2000/svg}"
TITLE = re.compile(r"query chunk (\d+), key chunk (\d+): subproblem (\d+)")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("chunks", "decomposition"), [(1, "cqs"), (7, "cqs"), (13, "cqs"), (9, "strips")])
def test_every_pair_is_drawn_once_in_its_place_and_colour(
    tmp_path: Path, chunks: int, decomposition: str, causal: bool
) -> None:
    problem = a_problem(1000, causal=causal)
    plan = make_plan(
        problem, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, chunks=chunks, decomposition=decomposition
    )
    path = plan.visualize(tmp_path / "plan.svg")
    division = plan.division_of(0)
    cells = {}
    colours: dict[int, set[str]] = {}
    for rect in ElementTree.parse(path).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            query, key, owner = map(int, TITLE.fullmatch(title.text).groups())
            assert owner == division.owner(query, key)
            assert (query, key) not in cells
            cells[query, key] = (float(rect.get("x")), float(rect.get("y")), float(rect.get("width")))
            colours.setdefault(owner, set()).add(rect.get("fill"))
    assert cells.keys() == {(a, b) for a in range(chunks) for b in range(chunks) if b <= a or not causal}
    left, top, side = cells[0, 0]
    for (query, key), (x, y, _) in cells.items():
        assert x == pytest.approx(left + key * side, abs=0.1)
        assert y == pytest.approx(top + query * side, abs=0.1)
    assert all(len(colour) == 1 for colour in colours.values())
    assert len({colour for (colour,) in colours.values()}) == len(colours) == len(division.indices)


def test_only_a_drawing_is_drawn_over(tmp_path: Path) -> None:
    plan = make_plan(a_problem(1000), MACHINE, device_memory=GENEROUS, host_memory=GENEROUS)
    path = tmp_path / "plan.svg"
    for _ in range(2):
        assert plan.visualize(path) == path
    path.write_text("<svg>mine</svg>")
    with pytest.raises(ResultExistsError, match="was not written by oocattn"):
        plan.visualize(path)
    assert path.read_text() == "<svg>mine</svg>"


@pytest.mark.parametrize("name", ["plan.png", "plan.pdf", "plan", "plan.svg.gz"])
def test_a_drawing_is_named_as_what_it_is(tmp_path: Path, name: str) -> None:
    plan = make_plan(a_problem(1000), MACHINE, device_memory=GENEROUS, host_memory=GENEROUS)
    with pytest.raises(ProblemError, match=rf"{name}: plans are drawn as SVG, .* ends in \.svg"):
        plan.visualize(tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert plan.visualize(tmp_path / "PLAN.SVG").exists()


def test_what_does_not_fit_is_left_out_and_said_so() -> None:
    text = draw_division(CyclicQuorums(LivePairs.triangular(9507)), "causal")
    assert f"9507 chunks, 9507 subproblems, causal: a colour is a subproblem (the first {MOST_CHUNKS} chunks" in text
    assert text.count("<title>") == MOST_CHUNKS * (MOST_CHUNKS + 1) // 2
    assert all(7.3 * len(line) <= 840 - 60 for line in re.findall(r'<text x="60"[^>]*>(.*?)</text>', text))


def test_dead_pairs_are_left_blank_and_a_cell_is_as_wide_as_a_key_chunk() -> None:
    owners, starts, stops = np.array([[0, 0, 2], [1, 5, 6], [1, 0, 1]]).T
    division = Strips(LivePairs.of_ranges(2, 6, owners, starts, stops), 2)
    text = draw_division(division, "causal, 2 documents")
    assert "2 query chunks, 6 key chunks, 2 subproblems, causal, 2 documents: a colour is a subproblem" in text
    assert [tuple(map(int, title)) for title in TITLE.findall(text)] == [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 5, 1)]
    sides = {
        (float(width), float(height)) for width, height in re.findall(r'width="([\d.]+)" height="([\d.]+)" fill="#', text)
    }
    assert sides == {(120.0, 360.0)}
