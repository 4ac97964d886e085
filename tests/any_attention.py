"""Carries out random compositions of everything that may be asked of an attention, and checks what must hold.

    python tests/any_attention.py 17 4711

runs the cases of these seeds (`compositions`), and prints what they ask and what does not hold; `--longest` and `--kernel`
are as a failed test says.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compositions import LONGEST, STORAGE, Case, World, make_case
from interrupting import interrupted
from numpy.typing import NDArray
from support import (
    GPU,
    MACHINE,
    UNIT_ROUNDOFF,
    assert_exact,
    assert_same_bits,
    carry_out,
    plan_for,
    replanned,
    write_dataset,
)

import oocattn
from oocattn import BudgetError, Plan
from oocattn.kernels.registry import device_type, get_kernel
from oocattn.pipelines.watch.events import Attended, Event, Staged
from oocattn.planning.machine import Hardware
from oocattn.planning.memory import Tiles


def store(case: Case, world: World, path: Path) -> Path:
    """Write the dataset of a case."""
    arrays, bias = world.arrays, world.bias
    if case.squeezed:
        arrays = tuple(array[0] for array in arrays)  # type: ignore[assignment]
    rows_q, rows_k = case.chunk_rows
    return write_dataset(path, arrays, rows_q, key_rows=rows_k, key_bias=bias, **STORAGE[case.storage])


def plan_of(case: Case, dataset: Path) -> Plan:
    """The plan of a case: with its choices, and the smallest budget that works where it is tight."""
    options: dict[str, Any] = {**case.asked, "chunks": case.chunks, "decomposition": case.decomposition}
    options |= {"threads": case.threads, "machine": machine_of(case.kernel)}
    if case.tight:
        with pytest.raises(BudgetError) as refused:
            plan_for(dataset, **options, host_memory=1)
        found = re.search(r"works is (\d+)MiB", str(refused.value))
        assert found is not None, refused.value
        options["host_memory"] = int(found[1]) << 20
    plan = plan_for(dataset, partials=case.partials, **options)
    if plan.device == "cpu":
        return plan
    rows, keys = min(case.tiles[0], plan.chunk_rows), min(case.tiles[1], plan.key_chunk_rows)
    return replanned(plan, tiles=Tiles(rows, keys))


def machine_of(kernel: str) -> Hardware:
    """A machine that is made up, with the kernel of that name."""
    machine = MACHINE if device_type(kernel) == "cpu" else GPU
    return replace(machine, kernel=kernel, scratch_bytes=get_kernel(kernel).scratch_bytes)


def check(case: Case, folder: Path) -> None:
    """Carry out a case. Raises AssertionError, or whatever a run raises, where something does not hold."""
    world = World.of(case)
    dataset = store(case, world, folder / "dataset.zarr")
    plan = plan_of(case, dataset)
    events: list[Event] = []
    result = carry_out(plan, dataset, folder / "result.zarr", callbacks=[events.append], overwrite=True)
    check_answer(case, world, np.asarray(result.out[...]), np.asarray(result.lse[...]))
    check_pruning(case, world, plan, events)
    pairs = int(world.attended.sum()) * len(case.heads)
    assert result.report is not None
    assert (result.report.pairs, plan.problem.pairs) == (pairs, pairs)


def check_resuming(case: Case, folder: Path) -> None:
    """Interrupt a case after a few of its subproblems: it is resumed to the same bits, and passes `verify`."""
    dataset = store(case, World.of(case), folder / "interrupted.zarr")
    plan = plan_of(case, dataset)
    right = carry_out(plan, dataset, folder / "right.zarr")
    if plan.subproblems:
        interrupted(plan, dataset, folder / "resumed.zarr", "attended", 1 + case.seed % plan.subproblems)
        assert_same_bits(oocattn.resume(folder / "resumed.zarr", engine="inline"), right)
    certificate = oocattn.verify(right.path, rows=24, all_rows=True, engine="inline")
    assert not certificate.failed, certificate
    assert certificate.all_rows is not None
    assert certificate.all_rows.rows == right.lse.size


def check_answer(case: Case, world: World, out: NDArray[Any], lse: NDArray[Any]) -> None:
    """Compare a result with float64, NaN with NaN, and rows without a key exactly."""
    assert (out.shape, lse.shape) == (world.out.shape, world.lse.shape)
    empty = np.broadcast_to(~world.attended.any(axis=2)[:, None], lse.shape)
    assert not out[empty].any(), "rows without a key are 0"
    assert np.array_equal(np.isneginf(lse), np.isneginf(world.lse)), "rows without weight have a log-sum-exp of -inf"
    assert np.isneginf(world.lse[empty]).all() or "learnable_sink" in case.asked
    finite = np.isfinite(world.out).all(axis=3)
    assert np.isnan(out[~finite].astype(np.float32)).all(), "rows that attend NaN are NaN, and no others"
    largest = float(np.nanmax(np.abs(world.arrays[2].astype(np.float64)), initial=0.0))
    weights = case.dtype if get_kernel(case.kernel).rounds_weights else "float32"
    assert_exact(out[finite], world.out[finite], case.asked.get("out_dtype", case.dtype), largest, weights)
    known = np.isfinite(world.lse)
    np.testing.assert_allclose(lse[known], world.lse[known], rtol=5e-7, atol=max(1e-5, rounding_of_scores(case, world)))


def rounding_of_scores(case: Case, world: World) -> float:
    """A size of float32's rounding of the largest product of a query and a key: 2e-5 for 1024 dimensions scaled by 0.3."""
    q, k = (np.linalg.norm(array.astype(np.float64), axis=-1) for array in world.arrays[:2])
    largest = np.nanmax(q, initial=0.0) * np.nanmax(k, initial=0.0)
    return UNIT_ROUNDOFF["float32"] * float(case.asked.get("scale", case.head_dim**-0.5) * largest)


def check_pruning(case: Case, world: World, plan: Plan, events: list[Event]) -> None:
    """Compare what each subproblem read and attended with its live pairs, counted in the dense matrix."""
    staged = {(event.head_group, event.index): event.bytes for event in events if isinstance(event, Staged)}
    attended = {(event.head_group, event.index): event.pairs for event in events if isinstance(event, Attended)}
    problem = plan.problem
    expected_bytes, expected_pairs = {}, {}
    for number in range(problem.head_groups):
        group, division = problem.head_group(number), plan.division_of(number)
        heads, dense = len(group.query_heads), np.zeros((case.queries, case.keys), bool)
        dense[case.rows] = world.attended[group.batch]
        bias_bytes = 4 * (heads if case.bias_heads > 1 else 1) * case.uses_bias
        owned = np.zeros_like(dense, np.int64)
        contributors: dict[int, list[int]] = {chunk: [] for chunk in range(plan.query_chunks)}
        for index in division.indices:
            needed = np.zeros_like(dense)
            for block in division.subproblem(index).blocks:
                contributors[block.query_chunk].append(index)
                rows = plan.query_rows(block.query_chunk)
                for chunk in block.key_chunks:
                    pair = np.ix_(rows, plan.key_rows(chunk))
                    assert dense[pair].any(), f"subproblem {index} owns a dead pair: {block.query_chunk}, {chunk}"
                    owned[pair] += 1
                    needed[pair] = dense[pair]
            rows_read, keys_read = int(needed.any(axis=1).sum()), int(needed.any(axis=0).sum())
            assert needed.any(), f"subproblem {index} has no live pair"
            key_bytes = (case.head_dim + case.value_dim) * problem.itemsize + bias_bytes
            row_bytes = heads * case.head_dim * problem.itemsize
            expected_bytes[number, index] = rows_read * row_bytes + keys_read * key_bytes
            expected_pairs[number, index] = heads * int(needed.sum())
        assert np.all(owned[dense] == 1), "each live pair has one owner"
        assert {chunk: division.contributors(chunk) for chunk in contributors} == {
            chunk: tuple(sorted(indices)) for chunk, indices in contributors.items()
        }
    assert attended == expected_pairs, "pairs of the subproblems"
    assert staged == expected_bytes, "bytes that the subproblems staged"


def with_kernel(case: Case, kernel: str) -> Case:
    """The case with another kernel; without NaN for those that let it reach other rows."""
    kept = not get_kernel(kernel).rounds_weights
    return replace(case, kernel=kernel, poisoned=case.poisoned if kept else (), poison_dead=kept and case.poison_dead)


def rerun(arguments: list[str], about: str, *checks: Callable[[Case, Path], None]) -> int:
    """Check the cases of some seeds that a command line names; return 1 if any fails."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--longest", type=int, default=LONGEST, help="as in `make_case` (default: %(default)s)")
    parser.add_argument("--kernel", help="instead of the case's own")
    options = parser.parse_args(arguments)
    failed = 0
    for seed in options.seeds:
        case = make_case(seed, options.longest)
        case = with_kernel(case, options.kernel) if options.kernel else case
        print(case)
        with tempfile.TemporaryDirectory() as folder:
            try:
                for each in checks:
                    each(case, Path(folder))
            except Exception:
                failed = 1
                traceback.print_exc()
    return failed


if __name__ == "__main__":
    sys.exit(rerun(sys.argv[1:], (__doc__ or "").partition("\n")[0], check, check_resuming))
