"""The kernel of second passes against float64: sums of exp(score - shift), and of these times projected values."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from random_masks import random_call

from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import get_kernel, kernel_names
from oocattn.kernels.state import AttentionState
from oocattn.problem.second_pass import VECTORS, sign_vectors

KERNELS = kernel_names(shifted=True)
ERROR = 3e-6  # relative, of denominators and of num / den, where scores are a few tens at most


def second_pass(call: Operands, shift: torch.Tensor) -> Operands:
    return replace(call, shift=shift.float(), projection=torch.from_numpy(sign_vectors(1, call.value.shape[1])))


def attend(name: str, *calls: Operands) -> AttentionState:
    """The state of second passes over the same rows, one after the other."""
    state = AttentionState.empty(*calls[0].query.shape[:2], VECTORS)
    for call in calls:
        get_kernel(name).attend(call, state)
    return state


def check(state: AttentionState, call: Operands, scores: torch.Tensor, error: float = ERROR) -> None:
    """Compare with scores [g, n, m] in float64, -inf where a row does not attend a key."""
    assert call.shift is not None
    assert call.projection is not None
    keyless = (scores == -math.inf).all(-1)
    weights = torch.where(keyless.unsqueeze(-1), 0.0, (scores - call.shift.double().unsqueeze(-1)).exp())
    den, num = weights.sum(-1), weights @ (call.value.double() @ call.projection.double())
    assert ((state.den - den).abs() <= error * den).all()
    assert (state.num - num).norm() <= error * num.norm()
    assert not state.num[keyless].any()
    assert not state.keys.any(), "a kernel enters nothing in the ledger"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", range(40))
def test_any_mask_and_terms_give_the_sums_of_weights(name: str, seed: int) -> None:
    call, scores, _ = random_call(random.Random(seed), largest=400 if seed % 4 else 1500)
    given = second_pass(call, scores.logsumexp(-1))
    state = attend(name, given)
    check(state, given, scores)
    attends = torch.from_numpy(call.intervals.bounds.ledger()[0] > 0) if call.intervals else torch.ones(call.rows) > 0
    assert torch.equal(state.max == 0, attends.expand_as(state.max))
    assert (state.max[:, ~attends] == -math.inf).all()
