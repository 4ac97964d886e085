"""The second pass: the pairs of a result once more, with the log-sum-exp that it found."""

from __future__ import annotations

import torch
from torch import Tensor

from oocattn.kernels.state import AttentionState
from oocattn.operations.forward import Forward
from oocattn.planning.plan import Plan
from oocattn.problem.problem import HeadGroup
from oocattn.problem.second_pass import LSE, sign_vectors


class SecondPass(Forward):
    """The weights of a result, exp(score - log-sum-exp), and their sums with projected values. Implements Operation."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        problem, asked = plan.problem, plan.problem.second_pass
        if asked is not None and asked.seed is not None:
            self._projection = torch.from_numpy(sign_vectors(asked.seed, problem.value_dim))

    def heads(self, name: str, group: HeadGroup) -> tuple[int, ...]:
        return tuple(group.outputs) if name == LSE else super().heads(name, group)

    def owns(self, name: str, head_group: int) -> bool:
        return name != LSE and super().owns(name, head_group)

    def finalise(self, head_group: int, head: int, state: AttentionState, out: Tensor, lse: Tensor) -> None:
        """Write the numerators to `out`, and the logarithm of the sum of the weights to `lse`."""
        out.copy_(state.num)
        torch.log(state.den, out=lse)
