"""A plan describes itself: on a screen, as a picture, and by a digest of what decides the bits."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import problems
from support import GENEROUS, GPU, MACHINE, a_problem

from oocattn.naming import on_command_line
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import InputCost
from oocattn.planning.memory import Tiles
from oocattn.planning.plan import Plan
from oocattn.problem.problem import Problem

NOTES = tuple(
    f"{name} is blosc-compressed, sharded, 8 heads to a chunk: read through Zarr's codecs: that bounds it" for name in "qkv"
)


def plan(problem: Problem, **options: object) -> Plan:
    return make_plan(problem, MACHINE, **{"device_memory": GENEROUS, "host_memory": GENEROUS, **options})


@given(problems(), st.sampled_from(["auto", "cqs", "strips"]), st.sampled_from([(), NOTES]))
@settings(max_examples=50)
def test_a_printed_plan_fits_a_screen(problem: Problem, decomposition: str, notes: tuple[str, ...]) -> None:
    lines = str(plan(problem, decomposition=decomposition, inputs=InputCost(notes=notes))).splitlines()
    assert len(lines) <= 25
    assert max(len(line) for line in lines) <= 100


def test_a_printed_plan_says_what_a_user_asks() -> None:
    problem = a_problem(10**9, query_heads=8, kv_heads=8)
    made = plan(problem, chunks=31, decomposition="cqs", host_memory=1 << 40)
    text = str(made)
    assert "8 heads x 1,000,000,000 tokens x D = 64, float16, causal" in text
    assert f"cyclic quorums over c = 31 chunks of {made.chunk_rows:,} tokens, k = 6; 248 subproblems" in text
    assert "of 1 TiB" in text
    assert made.binds == "compute"
    assert [line.split()[0] for line in text.splitlines() if line.endswith("<- binds")] == ["compute"]
    strips = plan(problem, chunks=32, decomposition="strips")
    assert f"strips over c = 32 chunks of {strips.chunk_rows:,} tokens, 1 key chunk at a time" in str(strips)


def test_scratch_on_disk_is_said() -> None:
    problem = a_problem(1 << 22, causal=False)
    made = plan(problem, decomposition="cqs", host_memory=256 << 20)
    assert made.partials == "disk"
    assert made.scratch_disk > 0
    assert "partials     merged in files" in str(made)


def test_chunks_cover_rows_and_keys_without_overlap() -> None:
    for tokens in (1, 2, 50, 97, 100):
        for chunks in (1, 7, 21, 50):
            made = plan(a_problem(tokens), chunks=min(chunks, tokens))
            for rows in (made.query_rows, made.key_rows, made.out_rows):
                assert [token for chunk in range(made.chunks) for token in rows(chunk)] == list(range(tokens))


@pytest.mark.parametrize("decomposition", ["cqs", "strips"])
def test_chunks_of_the_rows_that_are_asked_for_are_at_their_place(decomposition: str) -> None:
    problem = a_problem(100, keys=333, rows_asked=(30, 77))
    made = plan(problem, chunks=7, decomposition=decomposition)
    chunks = range(made.query_chunks)
    assert [row for chunk in chunks for row in made.query_rows(chunk)] == list(range(30, 77))
    assert [row for chunk in chunks for row in made.out_rows(chunk)] == list(range(47))
    assert [key for chunk in range(made.chunks) for key in made.key_rows(chunk)] == list(range(333))


def test_a_plan_is_sent_without_its_divisions() -> None:
    made = plan(a_problem(100_000, window_size=(100, None)), chunks=307)
    sent = pickle.dumps(made)
    subproblems = made.subproblems
    assert len(pickle.dumps(made)) == len(sent) < 10_000
    assert pickle.loads(sent) == made
    assert pickle.loads(sent).subproblems == subproblems


def test_pairs_and_chunks_that_are_left_are_said() -> None:
    """Of 1,000 rows the last, and 4 keys before each: 14 chunk pairs of 100 are live."""
    window = a_problem(1000, window_size=(4, None))
    text = str(plan(window, chunks=10, decomposition="strips"))
    assert "window of 4 before" in text
    assert "pairs        4.99 k of queries and keys, 0.499% of all" in text
    assert plan(window, chunks=10, decomposition="strips").subproblems in (10, 19)
    cross = a_problem(50, keys=3000, value_dim=32)
    text = str(plan(cross, chunks=30, decomposition="strips"))
    assert "50 queries, 3,000 keys x D = 64, Dv = 32, float16, causal" in text
    assert re.search(
        r"strips over c = 30 chunks of 100 keys, \d+ key chunks? at a time; .*\nqueries +\d chunks? of \d+ rows$", text, re.M
    )


def test_a_plan_says_with_which_arguments_its_bits_are_computed_again() -> None:
    made = plan(a_problem(1000), chunks=7, decomposition="cqs")
    assert "\nsame bits    chunks=7, decomposition='cqs', kernel='cpu'\n" in str(made)
    with on_command_line():
        assert "\nsame bits    --chunks 7 --decomposition cqs --kernel cpu\n" in str(made)
    strips = replace(made, decomposition="strips", span=2)
    assert str(strips.pins).endswith("kernel='cpu', if the plan then takes 2 key chunks at a time again")
    gpu = make_plan(a_problem(1000), GPU, device_memory=123 << 20, host_memory=GENEROUS)
    assert f"device_memory={123 << 20}" in str(gpu.pins)


@given(problems(), st.sampled_from([5e8, 2e9]))
@settings(max_examples=30)
def test_quorums_that_are_pinned_have_the_same_digest_whatever_is_faster(problem: Problem, rate: float) -> None:
    made = plan(problem, decomposition="cqs")
    pins = {name: getattr(made.pins, name) for name in ("chunks", "decomposition")}
    other = replace(MACHINE, kernel_flops=rate, lanes=3)
    assert make_plan(problem, other, device_memory=GENEROUS, host_memory=2 * GENEROUS, **pins).digest == made.digest


@pytest.mark.parametrize(
    "changed",
    [
        {"chunks": 13}, {"chunk_rows": 300}, {"query_chunks": 13}, {"key_chunk_rows": 300},
        {"decomposition": "strips", "span": 2},
        {"machine": replace(MACHINE.machine, kernel="reference")},
        {"problem": a_problem(1000, causal=False)}, {"problem": a_problem(1000, window_size=(9, None))},
        {"problem": a_problem(1000, digests={"learnable_sink": "0" * 32})},
        {"out_chunk_rows": 1}, {"tiles": Tiles(1000, 500)},
    ],
)  # fmt: skip
def test_the_digest_names_what_decides_the_bits(changed: dict) -> None:
    made = plan(a_problem(1000), chunks=7)
    assert replace(made, **changed).digest != made.digest


@pytest.mark.parametrize(
    "changed",
    [
        {"partials": "disk"}, {"machine": replace(MACHINE.machine, lanes=4, threads=9)},
        {"seconds": 1.0}, {"accumulators": 2},
    ],
)  # fmt: skip
def test_the_digest_ignores_what_does_not(changed: dict) -> None:
    made = plan(a_problem(1000), chunks=7)
    assert replace(made, **changed).digest == made.digest
