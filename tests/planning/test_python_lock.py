"""Python's lock in the cost of a plan: of lanes on GPUs that share a machine, and of no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made_up import plan
from support import GPU, MACHINE, a_problem

from oocattn.kernels.registry import get_kernel, max_keys
from oocattn.planning.memory import READ_BYTES
from oocattn.planning.plan import Link, Plan
from oocattn.planning.plan_text import plan_text
from oocattn.units import ceil_div

HOPPER = replace(GPU, kernel="hopper", scratch_bytes=get_kernel("hopper").scratch_bytes, max_keys=max_keys("hopper", 64))
SEVERAL = replace(HOPPER, lanes=4)
DECODE: dict[str, Any] = {"causal": False, "rows_asked": (0, 1024)}


def python(made: Plan) -> Link:
    return made.link("python")


def decoding(lanes: int = 4, **given: Any) -> Plan:
    """1,024 queries of 2^24 keys in strips of a chunk each."""
    hardware = replace(HOPPER, lanes=lanes, **given)
    problem = a_problem(1 << 24, **DECODE)
    return plan(problem, hardware, chunks=32, decomposition="strips")


def test_a_call_a_read_and_a_tile_count_each() -> None:
    made = decoding()
    partials = made.subproblems
    calls = made.problem.keys / made.tiles.key
    reads = made.link("read").amount / READ_BYTES["cuda"]
    assert calls > partials
    assert made.tiles.query == made.chunk_rows  # one tile of each partial
    assert python(made).amount == pytest.approx(calls + reads + partials, rel=0.02)
    assert python(made).seconds == pytest.approx(0.001 * (calls + reads) + 0.0035 * partials, rel=0.02)


def test_each_tile_takes_a_call_and_each_chunk_a_read() -> None:
    problem = a_problem(1 << 17, query_heads=8, kv_heads=8, causal=True, window_size=(15, None))
    made = plan(problem, SEVERAL, chunks=128, decomposition="strips")
    tiles = 8 * made.query_chunks * ceil_div(made.chunk_rows, made.tiles.query)
    reads = 8 * 3 * made.query_chunks
    assert python(made).amount >= 2 * tiles + reads  # a call of each tile at least, and what is done with it


@pytest.mark.parametrize(
    "hardware",
    [replace(MACHINE, lanes=4), HOPPER, *(replace(SEVERAL, **{each: 1}) for each in ("machine_lanes", "process_lanes"))],
)
def test_others_do_not_wait_for_each_other(hardware: Any) -> None:
    assert not python(plan(a_problem(1 << 17), hardware, chunks=7, decomposition="cqs")).amount


@pytest.mark.parametrize("sharing", ["machine_lanes", "process_lanes"])
def test_two_processes_have_a_lock_each(sharing: str) -> None:
    one, two = (python(decoding(4, **{sharing: lanes})).seconds for lanes in (0, 2))
    assert two == pytest.approx(one / 2)


def test_python_and_tasks_bind_together() -> None:
    made = decoding(kernel_flops=1e17, read_rate=1e12, reread_rate=1e12, copy_rate=1e13, write_rate=1e12)
    both = python(made).seconds + made.link("tasks").seconds
    assert made.binds in ("python", "tasks")
    assert made.seconds > both
    assert made.seconds < both + 0.2  # and what nothing overlaps with
    apart = replace(
        made, links=(Link("compute", 1, 0.6), Link("python", 1, 0.5), Link("tasks", 1, 0.4), Link("read", 1, 0.1))
    )
    assert apart.binds == "python"


def test_a_plan_names_it() -> None:
    assert "\npython " in plan_text(decoding())
    assert "\npython " not in plan_text(decoding(lanes=1))


def test_waits_for_files_are_shared_by_writers() -> None:
    """On a GPU four threads write chunks; what is left when all is computed never exceeds what there was."""
    problem = a_problem(1 << 18, query_heads=8, kv_heads=8)
    for hardware in (replace(HOPPER, lanes=lanes) for lanes in (1, 8)):
        quick, slow = (plan(problem, replace(hardware, file_seconds=each), chunks=1) for each in (1e-6, 1.0))
        files = slow.link("files")
        assert files.seconds < files.amount / 2
        assert slow.seconds - quick.seconds <= files.seconds + 1e-3
