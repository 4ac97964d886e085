"""What this machine can do, measured briefly, and the plan of a problem for it.

Kernels are timed in `kernel_rates`, reading in `reading`, small files in `host`; the rate of writing large files is assumed.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch

from oocattn.cores import Cores, Workers, usable_cores
from oocattn.errors import BudgetError, ProblemError
from oocattn.forks import refuse_lost_gpus, refuse_lost_threads
from oocattn.kernels.cuda.device import default_device_memory, launcher, release_cached_memory
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import HALF_DTYPES
from oocattn.kernels.merging import finalise, merge
from oocattn.kernels.registry import (
    default_kernel,
    device_type,
    get_kernel,
    max_keys,
    require_kernel,
    rounds_weights,
    takes_long_calls,
)
from oocattn.kernels.state import AttentionState
from oocattn.planning.candidates import Choices, make_plan, overhead_warning
from oocattn.planning.host import default_host_memory, file_seconds, round_rates
from oocattn.planning.kernel_rates import SETTLING_SECONDS, Sample, kernel_rate
from oocattn.planning.layout import call_size
from oocattn.planning.machine import FILE_SECONDS, MAX_LANES, TASK_SECONDS, Device, Engine, Hardware, reread_rate
from oocattn.planning.measured import HALF_RATE_KEYS
from oocattn.planning.memory import totals_bytes
from oocattn.planning.options import CHECKPOINT_SECONDS
from oocattn.planning.plan import Plan
from oocattn.planning.reading import input_cost, sample_rate
from oocattn.planning.recosting import recost
from oocattn.planning.sharing import cores_of_lanes, lane_threads, share_machine, with_lanes
from oocattn.problem.mask import Mask
from oocattn.problem.problem import Problem
from oocattn.storage.files.folders import UNKNOWN_DISK, free_disk
from oocattn.storage.inputs.dataset import Dataset

logger = logging.getLogger("oocattn")

SEGMENTS = 40 << 20
"""By how much torch's allocator may take more than it was asked for while a kernel is timed."""

PASS_ROWS = 4096
"""Rows on which a kernel of second passes is timed on a CPU: it makes keys ready once for so many."""

CUDA_SAMPLE = 1 << 15
"""Rows, and keys at least, on which a kernel is timed on a GPU: enough to fill it, in little memory."""


def describe_hardware(
    dataset: Dataset,
    problem: Problem,
    *,
    kernel: str | None,
    precise: bool,
    lanes: int,
    machine_lanes: int,
    cores: Cores,
    scratch: Path | None,
    engine: Engine,
) -> Hardware:
    """Measure the kernel, reading and small files on this machine and describe it for a plan.

    `kernel` pins one (default: the best for device and dtype); `precise` leaves out those that round softmax weights to 16
    bits. At most `machine_lanes` of the `lanes` share a machine, and on a CPU its `cores`. `scratch` is the folder whose
    file system takes the partials, `engine` carries the tasks out. Raises ProblemError for a kernel that is unknown or
    cannot serve the problem here, and in a fork.
    """
    device, name = _choose_kernel(problem, kernel, precise)
    refuse_lost_threads()
    if device == "cpu":
        threads, half_rate_rows, measuring_bytes = lane_threads(cores, machine_lanes), 256, 0
        rows = PASS_ROWS if problem.second_pass else 1024
        flops = kernel_rate(name, Sample.of(problem), rows) / torch.get_num_threads()
        flops *= min(threads, cores.machine / machine_lanes)
    else:
        threads, half_rate_rows = max(1, torch.get_num_threads() // machine_lanes), 1024
        flops, measuring_bytes = _gpu_rate(name, problem, half_rate_rows, threads)
    found = sample_rate(dataset, device)
    return Hardware(
        kernel=name,
        kernel_flops=flops,
        scratch_bytes=get_kernel(name).scratch_bytes,
        device=device,
        half_rate_rows=half_rate_rows,
        max_keys=max_keys(name, max(problem.head_dim, problem.value_dim)),
        rounds_weights=rounds_weights(name),
        lanes=lanes,
        machine_lanes=machine_lanes if machine_lanes < lanes else 0,
        threads=threads,
        cores=cores.machine if device == "cpu" else 0,
        read_rate=found.rate,
        reread_rate=reread_rate(problem.input_bytes, int(psutil.virtual_memory().available), found.rate),
        from_disk=found.from_disk,
        task_seconds=TASK_SECONDS[engine],
        file_seconds=FILE_SECONDS if scratch is None else file_seconds(scratch),
        measuring_bytes=measuring_bytes,
        scratch_disk=UNKNOWN_DISK if scratch is None else free_disk(scratch),
    )


def cuda_sample(name: str, dtype: str) -> tuple[int, int]:
    """Rows and keys of a call by which a kernel is timed on a GPU: of a fast one more keys, or launches take longer."""
    is_fast = takes_long_calls(name) and dtype in HALF_DTYPES
    return CUDA_SAMPLE, (4 if is_fast else 1) * CUDA_SAMPLE


def _gpu_rate(name: str, problem: Problem, half_rate_rows: int, threads: int) -> tuple[float, int]:
    """Floating-point operations per second of a kernel in calls of any length, and the bytes that measuring it takes."""
    rows, keys = cuda_sample(name, problem.dtype)
    sample = Sample.of(problem).with_row_calls(problem, keys)
    measured = kernel_rate(name, sample, rows, keys, "cuda")
    if problem.flops / measured > 2 * SETTLING_SECONDS:
        measured = kernel_rate(name, sample, rows, keys, "cuda", settled=True)
    release_cached_memory(torch.device("cuda"))
    inputs = (rows + keys) * problem.head_dim + keys * problem.value_dim
    operands = AttentionState.nbytes_for(1, rows, problem.columns) + inputs * problem.itemsize + 4 * keys
    asked = problem.second_pass and problem.second_pass.of_sample(rows, keys)
    call = replace(call_size(problem, rows, keys, threads), group_size=1, masked=False)
    taken = operands + get_kernel(name).scratch_bytes(call) + totals_bytes(asked, 1, rows, keys) + SEGMENTS
    return measured * (1 + half_rate_rows / rows) * (1 + HALF_RATE_KEYS / keys), taken


def plan_here(
    dataset: Dataset,
    problem: Problem,
    choices: Choices,
    workers: Workers,
    scratch: Path | None,
    engine: Engine,
    *,
    to_store: bool = False,
) -> Plan:
    """Measure this machine and plan for an engine; partials would lie in the folder `scratch`, the result in a store.

    Of the `workers`, `MAX_LANES` at most have a lane, and small budgets leave some of them out. Raises ProblemError as
    `describe_hardware` and BudgetError as `make_plan`.
    """
    hardware, cores = _hardware_of(dataset, problem, choices, workers, scratch, engine)
    device_memory, host_memory = _budgets(choices, hardware)
    make = partial(
        make_plan,
        problem,
        chunks=choices.chunks,
        decomposition=choices.decomposition,
        preferred=choices.preferred,
        checkpoint_seconds=CHECKPOINT_SECONDS if choices.checkpoint_seconds is None else choices.checkpoint_seconds,
        to_store=to_store,
    )
    share = partial(share_machine, round_rates(hardware), cores, (device_memory, host_memory))
    inputs = input_cost(dataset, problem, host_memory)
    try:
        chosen = share(partial(make, inputs=inputs))
    except BudgetError:
        if not inputs.ahead:
            raise
        inputs = input_cost(dataset, problem, host_memory, ahead=False)
        chosen = share(partial(make, inputs=inputs))
    hardware = with_lanes(hardware, chosen.machine)
    plan = recost(replace(chosen, machine=hardware.machine), hardware.scratch_bytes)
    warning = overhead_warning(plan, hardware)
    if warning is not None:
        logger.warning("%s", warning)
    return plan


def _hardware_of(
    dataset: Dataset, problem: Problem, choices: Choices, workers: Workers, scratch: Path | None, engine: Engine
) -> tuple[Hardware, Cores]:
    """The hardware that so many workers have, and the cores of a machine's. Raises ProblemError where there is none."""
    if workers.count is not None and workers.count < 1:
        raise ProblemError(f"{workers.count} workers: a run needs at least one; start workers and run again")
    lanes = min(workers.count or count_lanes(choices.kernel), MAX_LANES)
    sharing = min(lanes, workers.of_machine or lanes)
    found = workers.find_cores() if choose_device(choices.kernel) == "cpu" else None
    cores = cores_of_lanes(found, usable_cores(), torch.get_num_threads(), sharing)
    hardware = describe_hardware(
        dataset,
        problem,
        kernel=choices.kernel,
        precise=choices.precise,
        lanes=lanes,
        machine_lanes=sharing,
        cores=cores,
        scratch=scratch,
        engine=engine,
    )
    return replace(hardware, process_lanes=workers.of_process if workers.of_process < sharing else 0), cores


def _budgets(choices: Choices, hardware: Hardware) -> tuple[int, int]:
    """The budgets of memory of device and host, in bytes: those that were chosen, or shares of what is free."""
    device_memory = choices.device_memory
    if device_memory is None:
        device_memory = default_host_memory() if hardware.device == "cpu" else default_device_memory(hardware.sharing_lanes)
    return device_memory, default_host_memory() if choices.host_memory is None else choices.host_memory


def _choose_kernel(problem: Problem, kernel: str | None, precise: bool) -> tuple[Device, str]:
    """The type of device of a run on this machine, and its kernel. Raises ProblemError as `describe_hardware`."""
    device = choose_device(kernel)
    dims = (problem.dtype, problem.head_dim, problem.value_dim)
    name = kernel or default_kernel(device, *dims, precise=precise)
    require_kernel(name, device, *dims, precise=precise)
    return device, name


def choose_device(kernel: str | None) -> Device:
    """ "cuda" where there is a GPU, unless `kernel` is one for the CPU; else "cpu".

    Raises ProblemError if it is unknown, or for GPUs that are lost in a fork.
    """
    device = device_type(kernel) if kernel is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        refuse_lost_gpus()
    return device


def count_lanes(kernel: str | None) -> int:
    """Lanes that a run of its own has on this machine: one for each GPU, or one for the CPU."""
    return max(1, torch.cuda.device_count()) if choose_device(kernel) == "cuda" else 1


def warm_up(problem: Problem, kernel: str | None, precise: bool = False) -> None:
    """Launch on every GPU what a run will launch, if it will use any: at first use libraries are loaded and compiled.

    Raises ProblemError for a kernel that is unknown or cannot serve the problem here.
    """
    device, name = _choose_kernel(problem, kernel, precise)
    if device == "cuda":
        gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        launched = [launcher(gpu).submit(_launch_everything, name, Sample.of(problem), gpu) for gpu in gpus]
        for each in launched:
            each.result()


def _launch_everything(name: str, sample: Sample, where: torch.device) -> None:
    """What will be timed, once, and every kind of launch of a lane, but for what a rehearsal makes."""
    kernel, (rows, keys) = get_kernel(name), cuda_sample(name, sample.dtype)
    operands, state = sample.operands(rows, keys, where), AttentionState.empty(1, rows, sample.columns, where)
    kernel.attend(operands, state)
    if not kernel.plans_shapes:  # else it takes a while
        causal = make_intervals(Mask.of(rows, keys, causal=True), range(rows), range(keys))
        kernel.attend(replace(operands, intervals=causal), state)
    merge(state, state)
    finalise(state, state.num.to(getattr(torch, sample.dtype)), torch.empty_like(state.den))
    torch.cuda.synchronize(where)
    del operands, state
    release_cached_memory(where)
