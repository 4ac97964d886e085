"""What several test modules need: datasets of a few kilobytes, runs of plans, and a machine that is made up."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
import zarr
from distributed import Client
from numpy.typing import NDArray
from reference import Array64

import oocattn
from oocattn import Event, Plan, Result
from oocattn.kernels.kernel import Kernel, Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState
from oocattn.pipelines.engines.dask.engine import DaskEngine
from oocattn.pipelines.engines.inline import InlineEngine
from oocattn.pipelines.existing import Request
from oocattn.pipelines.lane.lane import Lane
from oocattn.pipelines.run import Run, begin_run
from oocattn.pipelines.session import run_plan
from oocattn.planning.candidates import make_plan
from oocattn.planning.machine import Hardware, Machine
from oocattn.planning.reading import input_cost
from oocattn.planning.recosting import recost
from oocattn.planning.stored_plan import read_plan
from oocattn.problem.given import DTYPES, GivenArrays
from oocattn.problem.options import ProblemOptions
from oocattn.problem.problem import Problem
from oocattn.records import to_json
from oocattn.storage.inputs.dataset import Dataset, pose
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.growing import GrowingResult, Layout, RunState

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
MakeLane = Callable[..., Lane]  # makes one from a plan, and the name of its result

GENEROUS = 1 << 40

BESIDE = {"report.json", "attempts.json", "full-report.json", "report.html"}
"""The files beside a finished result."""

TOKENS = 64
"""Tokens of the `dataset` fixture."""


def numpy_type(name: str) -> np.dtype[Any]:
    """The numpy dtype of that name; bfloat16 is that of ml_dtypes."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def normal_arrays(
    tokens: int,
    *,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 8,
    batch: int = 1,
    dtype: str = "float32",
    seed: int = 0,
) -> Arrays:
    """Unit-normal q [B, Hq, N, D] and k, v [B, Hkv, N, D]."""
    random = np.random.default_rng(seed)
    q = random.standard_normal((batch, heads, tokens, head_dim), np.float32)
    k, v = (random.standard_normal((batch, kv_heads, tokens, head_dim), np.float32) for _ in range(2))
    return q.astype(numpy_type(dtype)), k.astype(numpy_type(dtype)), v.astype(numpy_type(dtype))


_written: dict[str, Path] = {}
_folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def _first_like(arrays: Arrays, chunk_rows: int | None, key_rows: int | None) -> Path:
    """A dataset of these arrays, written by Zarr once in this process; not to be changed."""
    content = [(array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).hexdigest()) for array in arrays]
    key = repr((chunk_rows, key_rows, content))
    if key not in _written:
        place = Path(_folder.name) / f"{len(_written)}.zarr"
        place.mkdir()
        _written[key] = write_dataset(place, arrays, chunk_rows, key_rows=key_rows)
    return _written[key]


def write_dataset(
    path: Path,
    arrays: Arrays,
    chunk_rows: int | None = None,
    *,
    key_rows: int | None = None,
    key_bias: NDArray[np.float32] | None = None,
    shard_chunks: int = 0,
    **storage: Any,
) -> Path:
    """Write q, k and v as a Zarr group: one head to a chunk and uncompressed, unless `storage` says otherwise.

    `key_rows` are those of a chunk of k and v, as many as of q by default; a shard has `shard_chunks` of them. A plain and
    small one at a new path is a copy of the first like it, for which Zarr takes five times as long.
    """
    plain = key_bias is None and not shard_chunks and not storage
    if plain and not os.path.lexists(path) and sum(array.nbytes for array in arrays) <= 1 << 20:
        return Path(shutil.copytree(_first_like(arrays, chunk_rows, key_rows), path, copy_function=shutil.copyfile))
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for name, data in zip("qkv", arrays, strict=True):
        rows = (chunk_rows if name == "q" else key_rows or chunk_rows) or data.shape[-2]
        chunks = (*(1 for _ in data.shape[:-2]), rows, data.shape[-1])
        options = {"chunks": chunks, "compressors": None, "config": {"write_empty_chunks": True}, **storage}
        if shard_chunks:
            options["shards"] = (*chunks[:-2], shard_chunks * rows, chunks[-1])
        group.create_array(name, shape=data.shape, dtype=data.dtype, **options)[...] = data
    if key_bias is not None:
        options = {"compressors": None, "config": {"write_empty_chunks": True}}
        group.create_array("key_bias", shape=key_bias.shape, dtype=key_bias.dtype, **options)[...] = key_bias
    return path


def damage(path: Path, content: Callable[[bytes], bytes | None]) -> None:
    """Replace a file at once, as Zarr does, or remove it."""
    changed = content(path.read_bytes())
    if changed is None:
        path.unlink()
    else:
        path.with_name("new").write_bytes(changed)
        path.with_name("new").replace(path)


MACHINE = Hardware(kernel="cpu", kernel_flops=1e11, scratch_bytes=get_kernel("cpu").scratch_bytes)
"""A machine that is made up, so that plans do not depend on the one that runs the tests."""


GPU = Hardware(
    kernel="cudnn",
    kernel_flops=4.7e14,
    scratch_bytes=get_kernel("cudnn").scratch_bytes,
    device="cuda",
    half_rate_rows=2048,
    max_keys=65_536,
    read_rate=2e9,
    reread_rate=5e9,
)
"""A GPU that is made up after an H200, with cuDNN's memory."""


ASKED = [field.name for kind in (ProblemOptions, GivenArrays) for field in fields(kind) if field.name != "given"]
"""The arguments that pose a problem."""


def problem_options(**asked: Any) -> ProblemOptions:
    """What a caller asks, arrays as lists."""
    given = {name: np.asarray(asked.pop(name), DTYPES[name]) for name in DTYPES if asked.get(name) is not None}
    return ProblemOptions(**asked, given=GivenArrays(**given))


def plan_for(
    dataset: Path,
    *,
    partials: str | None = None,
    lanes: int = 1,
    threads: int = 1,
    machine: Hardware = MACHINE,
    **options: Any,
) -> Plan:
    """Plan without measuring speeds; `partials` overrides where they are kept."""
    opened = Dataset.open(dataset, key_bias=options.get("key_bias", True))
    problem = pose(opened, problem_options(**{name: options.pop(name) for name in ASKED if name in options}))
    machine = replace(machine, lanes=lanes, threads=threads)
    inputs = replace(input_cost(opened, problem, host_memory=0), decode_rate=1e9)  # nothing is measured in no memory
    budgets = {"device_memory": GENEROUS, "host_memory": GENEROUS}
    plan = make_plan(problem, machine, inputs=inputs, **{**budgets, **options})
    return plan if partials is None else with_partials(plan, partials)


def with_partials(plan: Plan, partials: str) -> Plan:
    """The plan with its partials kept in "memory" or on "disk"."""
    return replanned(plan, partials=partials, accumulators=plan.query_chunks if partials == "memory" else 2)


def replanned(plan: Plan, **changed: Any) -> Plan:
    """The plan with other choices, or of another machine, and with the numbers that follow from them."""
    of_machine = {name: value for name, value in changed.items() if name in {field.name for field in fields(Machine)}}
    of_plan = {name: value for name, value in changed.items() if name not in of_machine}
    changed_plan = replace(plan, machine=replace(plan.machine, **of_machine), **of_plan)
    return recost(changed_plan, get_kernel(changed_plan.kernel).scratch_bytes)


def read_again(plan: Plan) -> Plan:
    """The plan as it is read from JSON, with the arrays of its problem."""
    content = json.loads(json.dumps(to_json(plan)))
    return read_plan(content, lambda kernel, _: get_kernel(kernel).scratch_bytes, lambda _: plan.problem.given)


def carry_out(
    plan: Plan,
    dataset: Path,
    result: Path | ResultPaths,
    client: Client | Literal["inline"] = "inline",
    callbacks: Sequence[Callable[[Event], None]] = (),
    overwrite: bool = False,
) -> Result:
    """Run a plan inline or, where Dask is the point, on the workers of a client."""
    opened = Dataset.open(dataset, key_bias=plan.problem.bias_heads > 0)
    paths = result if isinstance(result, ResultPaths) else ResultPaths.at(result)
    request = Request(plan.problem, opened, paths, overwrite)
    engine = InlineEngine(plan.lanes) if client == "inline" else DaskEngine(client)
    return run_plan(plan, request, engine, callbacks=callbacks)


def run_of(folder: Path, plan: Plan, result: str = "result.zarr") -> Run:
    """The run of a lane by itself, on `folder`/dataset.zarr and with a new result in `folder`."""
    state, growing = begun(ResultPaths.at(folder / result), plan)
    return begin_run(state, plan, Dataset.open(folder / "dataset.zarr"), growing, {})


def begun(paths: ResultPaths, plan: Plan) -> tuple[RunState, GrowingResult]:
    """The places of a result in the hands of a run, and the result that it has begun."""
    problem = plan.problem
    paths.make_state()
    state = RunState(paths, Unlocked())
    return state, state.begin(Layout(problem.out_shape, problem.out_dtype, plan.out_chunk_rows, {}), overwrite=True)


class Unlocked:
    """A claim that nobody disputes."""

    def check(self, *, afresh: bool = False) -> None:
        """It is held."""


def written_bits(lane: Lane, head_group: int = 0) -> list[NDArray[Any]]:
    """The bits of `out` and `lse` of a head group of which a lane has attended everything: it is merged and written."""
    for chunk in range(lane.plan.chunks):
        lane.merge(head_group, chunk)
        lane.write(head_group, chunk)
    group = lane.plan.problem.head_group(head_group)
    heads = slice(group.outputs.start, group.outputs.stop)
    found = (np.asarray(array[group.batch, heads]) for array in (lane.result.out, lane.result.lse))
    return [array.reshape(-1).view(np.uint8) for array in found]


def a_problem(tokens: int, **given: Any) -> Problem:
    """One causal head of 64 float16 dimensions, but for the fields that are `given`."""
    dims = {"head_dim": 64, "value_dim": given.get("head_dim", 64), "queries": tokens, "keys": tokens}
    defaults = {"batch": 1, "query_heads": 1, "kv_heads": 1, "dtype": "float16", "causal": True, **dims, **given}
    derived = {"out_dtype": defaults["dtype"], "scale": defaults["head_dim"] ** -0.5, "rows_asked": (0, defaults["queries"])}
    return Problem(**{**derived, **defaults})


@dataclass(frozen=True)
class CrampedKernel:
    """A kernel for which the device has no memory where a call has more than `most_rows` query rows."""

    inner: Kernel
    most_rows: int

    def attend(self, operands: Operands, state: AttentionState) -> None:
        if operands.rows > self.most_rows:
            raise torch.OutOfMemoryError(f"{operands.rows} rows are too many")
        self.inner.attend(operands, state)


def bits(result: Result) -> tuple[NDArray[Any], NDArray[Any]]:
    """The bits of `out` and `lse`, as unsigned integers."""
    out = np.asarray(result.out[...])
    return out.view(np.uint16 if out.itemsize == 2 else np.uint32), np.asarray(result.lse[...]).view(np.uint32)


def assert_same_bits(found: Result, expected: Result) -> None:
    """Both have the same `out` and `lse`, bit for bit."""
    for ours, theirs in zip(bits(found), bits(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


TOLERANCE = {"float16": 3e-4, "bfloat16": 2e-3, "float32": 2e-6}
"""Relative error of the output that is allowed, by the output's dtype: its rounding, with little to spare."""

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


def assert_exact(found: NDArray[Any], expected: Array64, dtype: str, largest: float, weights: str = "float32") -> None:
    """An output in `dtype` is what float64 has, rounded, where the largest value is `largest`.

    `weights` is the dtype to which the kernel rounds softmax weights.
    """
    found = found.astype(np.float64)
    assert found.shape == expected.shape
    if np.count_nonzero(expected) < 512:  # too few elements for their rounding errors to average out
        of_weights = 0.0 if weights == "float32" else 2 * UNIT_ROUNDOFF[weights]
        allowed = UNIT_ROUNDOFF[dtype] * np.abs(expected) + (of_weights + TOLERANCE["float32"]) * largest
        assert np.all(np.abs(found - expected) <= allowed)
    else:
        tolerance = TOLERANCE[dtype] if weights == "float32" else 1.5 * max(TOLERANCE[dtype], TOLERANCE[weights])
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@dataclass
class Recorder:
    """A listener that keeps every event."""

    events: list[Event]

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: str) -> list[Event]:
        """The events of one kind, in the order in which they came."""
        return [event for event in self.events if event.kind == kind]


def assert_nothing_written(result: Path) -> None:
    assert not os.path.lexists(result)
    assert ResultPaths.at(result).unfinished is None
    assert oocattn.status(result).state == "none"


_FIELDS: dict[str, Any] = {"head_group": 0, "index": 0, "pairs": 0, "bytes": 0, "plan": None, "dashboard": "", "left": 0}
_FIELDS |= {"resumed": False, "recomputed": 0, "reason": "", "error": "", "path": "", "report": None}


def make_event(kind: str, start: float = 0.0, stop: float = 0.0, **given: Any) -> Event:
    """The event of that kind; fields that are not given have any value."""
    made: type[Event] = getattr(oocattn, kind.capitalize())
    wanted = {field.name: field for field in fields(made)}
    missing = {name: _FIELDS[name] for name, field in wanted.items() if name in _FIELDS and field.default is MISSING}
    return made(**{"start": start, "stop": stop, **missing, **given})


def amount_of(event: Event) -> int:
    """The bytes or pairs of an event; 0 where it has none."""
    return int(getattr(event, "pairs", getattr(event, "bytes", 0)))


def sizes_of(path: Path) -> dict[str, int]:
    """The lengths of the dimensions of a group, which have one each, as xarray demands."""
    sizes: dict[str, int] = {}
    for _, array in zarr.open_group(path, mode="r").arrays():
        for name, size in zip(array.metadata.dimension_names, array.shape, strict=True):
            assert sizes.setdefault(name, size) == size, f"{name} of {array.path}"
    return sizes
