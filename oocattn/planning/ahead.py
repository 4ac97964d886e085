"""Plans before there is data or a machine: for a problem in words, on devices of a table. No I/O, no PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, cast

from oocattn import arguments
from oocattn.arguments import Dtype, Duration, Size, checked
from oocattn.errors import ProblemError
from oocattn.kernels.registry import device_type, max_keys, rounds_weights
from oocattn.naming import as_given
from oocattn.planning.candidates import make_plan
from oocattn.planning.devices import DEVICES, DISK_RATE, DeviceRate, device_rate
from oocattn.planning.devices import disk_rate as parse_rate
from oocattn.planning.machine import MAX_LANES, TASK_SECONDS, Engine, Hardware, InputCost, reread_rate
from oocattn.planning.options import CHECKPOINT_SECONDS, DECOMPOSITIONS, MAX_CHUNKS
from oocattn.planning.plan import Plan
from oocattn.problem.arrays import ArraySpec
from oocattn.problem.calls import CallSize
from oocattn.problem.given import DTYPES, GivenArrays
from oocattn.problem.options import ProblemOptions
from oocattn.problem.problem import Problem, make_problem
from oocattn.problem_arguments import PROBLEM_OPTIONS, stated

Rate: TypeAlias = "Size"
"""Bytes per second, as a number or like "6GB/s"."""

HALF_RATE_ROWS = {"cpu": 256, "cuda": 2048}

ASKED = {name: option for name, option in PROBLEM_OPTIONS.items() if name not in ("heads", "dtype", "key_bias", "recorded")}
"""What may be asked of a dataset that is not there, besides its shape."""


SHAPE_OPTIONS = {
    **dict.fromkeys(("tokens", "keys", "heads", "kv_heads", "head_dim", "value_dim", "batch"), arguments.size),
    "dtype": arguments.dtype,
    "device": arguments.choice(*DEVICES),
    "devices": arguments.integer(1, MAX_LANES),
    "disk_rate": parse_rate,
}
"""What the options may be that say what the dataset and the machine will be."""


PLAN_OPTIONS = {
    "device_memory": arguments.size,
    "host_memory": arguments.size,
    "chunks": arguments.integer(1, MAX_CHUNKS),
    "decomposition": arguments.choice(*DECOMPOSITIONS),
    "precise": arguments.boolean,
    "checkpoint_interval": arguments.duration,
}

AHEAD_OPTIONS = (*ASKED, *SHAPE_OPTIONS, *PLAN_OPTIONS)
"""The names of all options of `plan_ahead` but its engine."""


@checked(ASKED, **SHAPE_OPTIONS, **PLAN_OPTIONS, engine=arguments.choice(*TASK_SECONDS))
def plan_ahead(
    *,
    tokens: Size,
    heads: Size,
    head_dim: Size,
    dtype: Dtype,
    device: str,
    devices: int = 1,
    disk_rate: Rate = DISK_RATE,
    keys: Size | None = None,
    kv_heads: Size | None = None,
    value_dim: Size | None = None,
    batch: Size = 1,
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    chunks: int | None = None,
    decomposition: str = "auto",
    precise: bool = False,
    checkpoint_interval: Duration | None = None,
    engine: Engine = "dask",
    **asked: Any,
) -> Plan:
    """Plan a run over a dataset that need not be there, on devices that need not be here.

    q is [batch, heads, tokens, head_dim], k [batch, kv_heads, keys, head_dim] and v [batch, kv_heads, keys, value_dim], of
    one `dtype`; sizes are numbers or like "1G". `device` is a name of the table in `oocattn/planning/devices.py`, and
    `devices` how many of them ("cpu": cores of one). The plan's notes say which rates were measured and which are estimates.
    `disk_rate` is that of reading and of writing, in bytes/s or like "6GB/s". Budgets default to half of the memory that
    the table names. The other arguments are those of `oocattn.plan`; an array is given as numbers, not by a name.

    Raises ProblemError for what is no attention problem, and BudgetError with the smallest budget that works.
    """
    shape: Any = {"tokens": tokens, "keys": keys or tokens, "heads": heads, "kv_heads": kv_heads or heads, "batch": batch}
    shape |= {"head_dim": head_dim, "value_dim": value_dim or head_dim, "dtype": dtype}
    problem = _problem(shape, asked)
    record = DEVICES[device]
    found = device_rate(device, problem.dtype, problem.head_dim, problem.value_dim, precise)
    hardware, note = _hardware(problem, device, devices, found, float(cast(float, disk_rate)), engine)
    again = "; what was read before comes from the page cache" if hardware.reread_rate > hardware.read_rate else ""
    notes = (note, f"disk: {hardware.read_rate / 1e9:.3g} GB/s, not measured{again}")
    return make_plan(
        problem,
        hardware,
        device_memory=cast("int | None", device_memory) or devices * record.memory // 2,
        host_memory=cast("int | None", host_memory) or devices * record.host_memory // 2,
        inputs=InputCost(notes=notes),
        chunks=chunks,
        decomposition=decomposition,
        checkpoint_seconds=CHECKPOINT_SECONDS if checkpoint_interval is None else cast(float, checkpoint_interval),
    )


def _problem(shape: dict[str, Any], asked: dict[str, Any]) -> Problem:
    """The problem of a dataset of that shape."""
    options = stated(asked)
    given: dict[str, Any] = {name: options.pop(name) for name in DTYPES if name in options}
    for name, value in given.items():
        if isinstance(value, str | Path):
            raise ProblemError(f"{as_given(name, value)}: expected numbers; without a dataset no files are read")
    of_keys = shape["batch"], shape["kv_heads"], shape["keys"]
    return make_problem(
        ArraySpec("q", (shape["batch"], shape["heads"], shape["tokens"], shape["head_dim"]), shape["dtype"]),
        ArraySpec("k", (*of_keys, shape["head_dim"]), shape["dtype"]),
        ArraySpec("v", (*of_keys, shape["value_dim"]), shape["dtype"]),
        ProblemOptions(key_bias=False, given=GivenArrays(**given), **options),
    )


def _hardware(
    problem: Problem, device: str, devices: int, found: DeviceRate, rate: float, engine: Engine
) -> tuple[Hardware, str]:
    """The machine, and a note that says where its rates come from."""
    record, on_cpu = DEVICES[device], device == "cpu"
    kind = device_type(found.kernel)
    hardware = Hardware(
        kernel=found.kernel,
        kernel_flops=found.flops * (devices if on_cpu else 1),
        scratch_bytes=estimated_scratch(kind),
        device=kind,
        half_rate_rows=HALF_RATE_ROWS[kind],
        max_keys=max_keys(found.kernel, max(problem.head_dim, problem.value_dim)),
        rounds_weights=rounds_weights(found.kernel),
        lanes=1 if on_cpu else devices,
        threads=devices if on_cpu else 1,
        copy_rate=record.copy_rate,
        read_rate=rate,
        reread_rate=reread_rate(problem.input_bytes, record.host_memory * (1 if on_cpu else devices), rate),
        write_rate=rate,
        task_seconds=TASK_SECONDS[engine],
    )
    each = "core" if on_cpu else "device"
    return hardware, f"{devices} x {device}: {found.words}, a {each}"


def estimated_scratch(kind: str) -> Callable[[CallSize], int]:
    """An estimate of what a kernel allocates in a call; the kernels' own bounds need PyTorch."""

    def estimate(call: CallSize) -> int:
        of_row = 2 * (4 * call.value_dim + 8) if kind == "cuda" else 8 * max(call.head_dim, call.value_dim)
        rows = call.group_size * (call.rows if kind == "cuda" else min(call.rows, 4096))
        return (64 << 20) + rows * of_row if kind == "cuda" else (16 << 20) + rows * of_row + call.threads * (1 << 21)

    return estimate
