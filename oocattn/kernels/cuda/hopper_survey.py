"""The kernel of surveys for Hopper GPUs: it reduces the weights of a second pass in the registers that they come in."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from oocattn.kernels.cuda.device import allocated_bytes, small_bytes
from oocattn.kernels.cuda.hopper import HopperKernel, refusal_of
from oocattn.kernels.cuda.items import scratch_sizes
from oocattn.kernels.cuda.reducing import Reductions
from oocattn.kernels.cuda.tuning import Numbers, numbers_for, reducing_tuning
from oocattn.kernels.kernel import Operands
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import merging_sizes
from oocattn.kernels.second_pass import of_second_pass
from oocattn.kernels.state import AttentionState
from oocattn.problem.calls import CallSize
from oocattn.problem.scores import Scores
from oocattn.problem.second_pass import Reduced, SecondPass


class HopperSurveyKernel(HopperKernel):
    """Reductions of weights of known shifts; how it works is in cuda/survey.cu.

    Weights are float32, of products of 16-bit numbers, or of float32 ones in two float16 parts. Its bits do not depend on
    which block of the GPU is faster.
    """

    name = "hopper-survey"
    shifted = True
    rounds_weights = False

    def numbers(self, dtype: str) -> Numbers:
        return numbers_for(dtype, reduced=True)

    def scratch_bytes(self, call: CallSize) -> int:
        """What `hopper` takes but for values; sums of rows; and what merging states takes, on another stream."""
        return super().scratch_bytes(call) + self._merging_bytes(call)

    def scratch_sizes(self, call: CallSize) -> tuple[int, ...]:
        along_keys, along_rows = reductions_of(call.reduced)
        logarithms = any(each.needs_exponents for each, _ in along_keys)
        top = max((each.top for each, _ in along_keys), default=0)
        pooled = [each.pools is not None for each in along_rows]
        reductions = Reductions(logarithms, not all(pooled), any(pooled), top)
        tuning = reducing_tuning(call.head_dim, self.numbers(call.dtype), reductions, plain=call.plain)
        return *scratch_sizes(replace(call, value_dim=0), tuning), 4 * call.group_size * call.rows

    @staticmethod
    def _merging_bytes(call: CallSize) -> int:
        """What torch's allocator takes to merge states, many rows at a time and at last few."""
        sizes = merging_sizes("cuda", call.group_size, call.reduced)
        return allocated_bytes(*sizes) + small_bytes(*sizes)

    def unsupported_reason(self, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        return super().unsupported_reason(device, dtype, head_dim, head_dim)  # values are not read

    def _check_limits(self, operands: Operands, state: AttentionState) -> None:
        if operands.shift is None or operands.reducing is None:
            raise ValueError("expected operands of a survey: with a shift, and what is reduced")
        reason = self._operands_reason(str(operands.query.dtype).removeprefix("torch."), *2 * operands.query.shape[-1:])
        if reason:
            raise ValueError(reason)

    @classmethod
    @cache
    def _refusal(cls, device: torch.device, dtype: str, head_dim: int, value_dim: int) -> str:
        def attend() -> None:
            key = torch.zeros(1, head_dim, dtype=getattr(torch, dtype), device=device)
            asked = SecondPass(reduced=(Reduced("entropy", (), 1),))
            call = of_second_pass(Operands(key.unsqueeze(0), key, key, Scores(1.0)), asked, torch.zeros(1, 1, device=device))
            cls().attend(call, AttentionState.empty(1, 1, asked.columns, device))

        return refusal_of(cls.name, attend)
