"""A subproblem stages exactly the rows that its live pairs need; NaN and Inf of each live row are counted once."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
from hypothesis import given, settings
from masked_plans import plans
from numpy.typing import NDArray
from support import GENEROUS, MACHINE, a_problem

from oocattn import Plan
from oocattn.division.base import Subproblem
from oocattn.operations.staging import Run, stage_rows
from oocattn.planning.candidates import make_plan
from oocattn.problem.given import GivenArrays


def tokens_of(runs: list[Run]) -> list[int]:
    return [token for run in runs for token in run.rows]


def attended_by(plan: Plan, matrix: NDArray[np.bool_], part: Subproblem) -> NDArray[np.bool_]:
    """The pairs of a head group that a subproblem computes: [queries, keys]."""
    found = np.zeros_like(matrix)
    for block in part.blocks:
        rows = plan.query_rows(block.query_chunk)
        for key in block.key_chunks:
            keys = plan.key_rows(key)
            place = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
            found[place] = matrix[place]
    return found


@given(plans())
@settings(max_examples=100, deadline=None)
def test_staged_rows_are_those_of_live_pairs(made: tuple[Plan, NDArray[np.bool_]]) -> None:
    plan, of_entries = made
    for head_group in range(plan.problem.head_groups):
        matrix, computed = of_entries[head_group], np.zeros(of_entries.shape[1:], int)
        division = plan.division_of(head_group)
        for index in division.indices:
            part = division.subproblem(index)
            pairs = attended_by(plan, matrix, part)
            computed += pairs
            staged = stage_rows(plan, head_group, part)
            assert tuple(staged.queries) == part.query_chunks
            assert tuple(staged.keys) == part.key_chunks
            for chunk, runs in staged.queries.items():
                rows = plan.query_rows(chunk)
                needed = np.flatnonzero(pairs[rows.start : rows.stop].any(1)) + rows.start
                assert tokens_of(runs) == needed.tolist()
                for run in runs:
                    assert run.place == range(run.rows.start - rows.start, run.rows.stop - rows.start)
            end = 0
            for key, runs in staged.keys.items():
                keys = plan.key_rows(key)
                needed = np.flatnonzero(pairs[:, keys.start : keys.stop].any(0)) + keys.start
                assert tokens_of(runs) == needed.tolist()
                for run in runs:  # one after another, over all chunks
                    assert run.place == range(end, end + len(run.rows))
                    end += len(run.rows)
            assert staged.key_total == end
        np.testing.assert_array_equal(computed, matrix)


@given(plans())
@settings(max_examples=100, deadline=None)
def test_each_live_row_is_counted_once_over_all_subproblems(made: tuple[Plan, NDArray[np.bool_]]) -> None:
    """With the partial of a query chunk that the subproblem hands back."""
    plan, of_entries = made
    for head_group in range(plan.problem.head_groups):
        matrix, division = of_entries[head_group], plan.division_of(head_group)
        queries, keys = Counter[int](), Counter[int]()
        for index in division.indices:
            part = division.subproblem(index)
            staged = stage_rows(plan, head_group, part)
            for of_chunks, counted in ((staged.queries, queries), (staged.keys, keys)):
                for runs in of_chunks.values():
                    for run in runs:
                        if run.counted_for is not None:
                            assert run.counted_for in part.query_chunks
                            counted.update(run.rows)
        assert queries == dict.fromkeys(np.flatnonzero(matrix.any(1)).tolist(), 1)
        assert keys == dict.fromkeys(np.flatnonzero(matrix.any(0)).tolist(), 1)


@given(plans())
@settings(max_examples=100, deadline=None)
def test_a_slot_holds_what_a_subproblem_stages_and_a_plan_reads_no_less(made: tuple[Plan, NDArray[np.bool_]]) -> None:
    plan, _ = made
    problem = plan.problem
    row, total = problem.head_dim * problem.itemsize * problem.group_size, 0
    for head_group in range(problem.head_groups):
        division = plan.division_of(head_group)
        for index in division.indices:
            part = division.subproblem(index)
            staged = stage_rows(plan, head_group, part)
            whole = row * plan.chunk_rows * len(part.query_chunks)  # a slot has room for rows that nobody needs
            assert whole + staged.key_total * problem.kv_row_bytes <= plan.slot_bytes
            rows = sum(len(run.rows) for runs in staged.queries.values() for run in runs)
            total += row * rows + staged.key_total * problem.kv_row_bytes
    assert total <= plan.link("read").amount


def test_many_documents_without_queries_are_staged_in_a_moment() -> None:
    """Every second of 8,000 sequences of a cache has a query: their keys lie apart."""
    documents = 8000
    queries = np.cumsum([0, *([1, 0] * (documents // 2))])
    given_arrays = GivenArrays(cu_seqlens_q=queries, cu_seqlens_k=np.arange(0, 3 * documents + 1, 3))
    sizes = {"queries": documents // 2, "keys": 3 * documents, "rows_asked": (0, documents // 2)}
    problem = a_problem(1, **sizes, causal=True, given=given_arrays)
    plan = make_plan(problem, MACHINE, device_memory=GENEROUS, host_memory=GENEROUS, chunks=1)
    began = time.process_time()
    staged = stage_rows(plan, 0, plan.division_of(0).subproblem(0))
    assert time.process_time() - began < 2
    assert staged.key_total == 3 * documents // 2
