"""Kernels and copies, timed on this machine."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

import torch

from oocattn.kernels.cuda.device import launcher
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import device_type, get_kernel
from oocattn.kernels.second_pass import of_second_pass
from oocattn.kernels.state import AttentionState
from oocattn.plain_threads import plain_threads
from oocattn.problem.mask import Mask
from oocattn.problem.problem import Problem
from oocattn.problem.scores import Scores
from oocattn.problem.second_pass import SecondPass

MOMENT = {"cpu": 0.1, "cuda": 0.05}
"""Seconds for which a kernel is timed: some tens of calls. On a CPU they are of a core's time."""

CALLS_AHEAD, LAST_CALLS = 4, 64
"""Calls that are launched on a GPU ahead of the one that it computes, and the last ones, which count."""

SETTLING_SECONDS = 0.4
"""After so long a GPU has the clock that its power allows, 0.84 to 0.92 of the first (H200, D = 128 and 64)."""

PATIENCE = 6
"""By how much longer that may take where others use the core."""

COPY_BYTES = 64 << 20
"""Copied to and from a GPU to measure how fast that is."""


class Sample(NamedTuple):
    """The kind of call that is timed: dimensions, dtype, and the terms of its scores besides the scale."""

    head_dim: int
    value_dim: int
    dtype: str
    softcap: float | None = None
    alibi: bool = False
    biased: bool = False
    second_pass: SecondPass | None = None
    row_calls: int = 0  # after which rows are new again, which costs a survey more; 0: never

    @classmethod
    def of(cls, problem: Problem) -> Sample:
        """That of a problem's tiles."""
        alibi, biased = problem.given.alibi_slopes is not None, bool(problem.bias_heads)
        terms = problem.softcap, alibi, biased
        return cls(problem.head_dim, problem.value_dim, problem.dtype, *terms, problem.second_pass)

    def with_row_calls(self, problem: Problem, keys: int) -> Sample:
        """Say after how many calls of so many keys a survey's rows are new: as many as a row of the problem attends.

        That is so in a run where one subproblem has all keys of a row.
        """
        calls = round(problem.pairs / max(1, problem.rows * keys))
        is_survey = self.second_pass is not None and self.second_pass.reduced is not None
        return self._replace(row_calls=max(1, calls) if is_survey and calls < LAST_CALLS else 0)

    @property
    def columns(self) -> int:
        """Columns of a state."""
        return self.value_dim if self.second_pass is None else self.second_pass.columns

    def operands(self, rows: int, keys: int, where: torch.device) -> Operands:
        """Random operands of one head."""
        dtype = getattr(torch, self.dtype)
        of = {"device": where, "dtype": dtype, "generator": torch.Generator(where)}  # the caller's is left alone
        query = torch.randn(1, rows, self.head_dim, **of)
        key, value = (torch.randn(keys, dim, **of) for dim in (self.head_dim, self.value_dim))
        intervals = make_intervals(Mask.of(rows, keys), range(rows), range(keys)) if self.alibi else None
        bias = torch.zeros(1, keys, device=where, dtype=torch.float32) if self.biased else None
        scores = Scores(self.head_dim**-0.5, self.softcap)
        found = Operands(query, key, value, scores, intervals, (0.01,) if self.alibi else None, bias)
        if self.second_pass is None:
            return found
        shift = torch.full((1, rows), math.log(keys), device=where, dtype=torch.float32)
        return of_second_pass(found, self.second_pass.of_sample(rows, keys), shift)


def kernel_rate(
    name: str, sample: Sample, rows: int = 1024, keys: int = 2048, device: str | None = None, *, settled: bool = False
) -> float:
    """Floating-point operations per second of a kernel on random data, over the short calls of a moment.

    On a CPU each of torch's threads makes calls of its own, and the best of each counts, in time on its core: what else the
    machine does hardly changes that. On a GPU the median call counts, timed there, if `settled` when its clock has; the mean
    where rows begin again.
    `device` defaults to the type that the kernel is for.
    """
    where = torch.device(device or device_type(name))
    return measured_rate(name, sample, rows, keys, where, torch.get_num_threads() if where.type == "cpu" else 1, settled)


@lru_cache
def measured_rate(name: str, sample: Sample, rows: int, keys: int, where: torch.device, cores: int, settled: bool) -> float:
    """As `kernel_rate`, on so many cores of a CPU."""
    call = name, sample, rows, keys
    flops = 2.0 * rows * keys * (sample.head_dim + sample.columns)
    if where.type == "cpu":
        with plain_threads(cores, "oocattn-time", 1) as threads:
            timed = [threads.submit(_time_calls, *call, where) for _ in range(cores)]
            return sum(flops / max(min(each.result()), 1e-9) for each in timed)  # a clock may be too coarse
    where = torch.device("cuda", where.index or 0)
    moment = MOMENT["cuda"] + (SETTLING_SECONDS if settled else 0.0)
    seconds = launcher(where).submit(_time_launches, *call, where, moment).result()
    rounds = sample.row_calls and len(seconds) // sample.row_calls * sample.row_calls
    usual = fmean(seconds[-rounds:]) if rounds else median(seconds)
    return flops / max(usual, 1e-9)


def _time_calls(name: str, sample: Sample, rows: int, keys: int, where: torch.device) -> list[float]:
    """Seconds of calls of a kernel on this thread's core, one after another, for a moment."""
    attend = _calls(name, sample, rows, keys, where)
    seconds: list[float] = []
    began = time.perf_counter()
    while not seconds or (sum(seconds) < MOMENT["cpu"] and time.perf_counter() - began < PATIENCE * MOMENT["cpu"]):
        start = time.thread_time()
        attend()
        seconds.append(time.thread_time() - start)
    return seconds


def _time_launches(name: str, sample: Sample, rows: int, keys: int, where: torch.device, moment: float) -> list[float]:
    """Seconds of the last calls of a kernel on a GPU, which are launched ahead for so long, as a run does.

    A GPU that waits for each has a faster clock than one that is busy all the time.
    """
    with torch.cuda.device(where):
        attend = _calls(name, sample, rows, keys, where)
        ends = deque[torch.cuda.Event](maxlen=LAST_CALLS)
        began = time.perf_counter()
        while len(ends) < max(3, sample.row_calls + 1) or time.perf_counter() - began < moment:
            attend()
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            ends.append(end)
            if len(ends) > CALLS_AHEAD:
                ends[-1 - CALLS_AHEAD].synchronize()
        ends[-1].synchronize()
        return [first.elapsed_time(second) / 1e3 for first, second in pairwise(ends)]


def _calls(name: str, sample: Sample, rows: int, keys: int, where: torch.device) -> Callable[[], None]:
    """What calls the kernel on a sample, and has done so once: the first call is never the usual one."""
    kernel, operands = get_kernel(name), sample.operands(rows, keys, where)
    state, calls = AttentionState.empty(1, rows, sample.columns, where), itertools.count(1)

    def attend() -> None:
        if sample.row_calls and next(calls) % sample.row_calls == 0:
            state.reset()
        kernel.attend(operands, state)

    attend()
    return attend


def copy_rates(index: int) -> tuple[float, float]:
    """Bytes per second of a copy to GPU `index` and of one back, timed on the GPU."""
    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        host = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)

    def rate(into: torch.Tensor, source: torch.Tensor) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            into.copy_(source, non_blocking=True)
            begin.record()
            into.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            return float(COPY_BYTES * 1e3 / begin.elapsed_time(end))

    return rate(there, host), rate(host, there)
