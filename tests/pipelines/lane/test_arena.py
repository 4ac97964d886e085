"""Memory that is handed out once: aligned, apart, and never more than there is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oocattn import BudgetError
from oocattn.pipelines.lane.memory import Arena
from oocattn.planning.memory import ALIGNMENT

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64]
PIECES = st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.sampled_from(DTYPES)), max_size=12)


def bytes_of(pieces: list[tuple[list[int], torch.dtype]]) -> int:
    """Bytes up to the end of the last piece, each at the next multiple of the alignment."""
    used = 0
    for shape, dtype in pieces:
        used = -(-used // ALIGNMENT) * ALIGNMENT + math.prod(shape) * dtype.itemsize
    return used


@given(PIECES)
def test_pieces_are_aligned_and_do_not_overlap(pieces: list[tuple[list[int], torch.dtype]]) -> None:
    memory = torch.empty(bytes_of(pieces), dtype=torch.uint8)
    arena = Arena(memory)
    taken = [arena.take(shape, dtype) for shape, dtype in pieces]
    for number, (tensor, (shape, dtype)) in enumerate(zip(taken, pieces, strict=True)):
        assert (list(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert (tensor.data_ptr() - memory.data_ptr()) % ALIGNMENT == 0 or not tensor.numel()
        tensor.fill_(number)
    for number, tensor in enumerate(taken):
        assert (tensor == number).all()


@given(PIECES, st.integers(1, 100))
def test_an_arena_refuses_more_than_it_has(pieces: list[tuple[list[int], torch.dtype]], too_much: int) -> None:
    arena = Arena(torch.empty(bytes_of(pieces), dtype=torch.uint8))
    for shape, dtype in pieces:
        arena.take(shape, dtype)
    with pytest.raises(BudgetError, match=r"the lane needs .* where .* were planned"):
        arena.take((ALIGNMENT * too_much,), torch.uint8)


@given(st.integers(1, 8), st.integers(1, 300), st.integers(1, 70))
def test_a_state_takes_what_the_plan_counts(group_size: int, rows: int, head_dim: int) -> None:
    planned = group_size * rows * (head_dim + 2) * 4 + rows * 16 + 5 * ALIGNMENT
    state = Arena(torch.empty(planned, dtype=torch.uint8)).state(group_size, rows, head_dim)
    state.reset()
    assert state.num.shape == (group_size, rows, head_dim)
    assert state.nbytes_for(*state.num.shape) + 5 * ALIGNMENT == planned
    assert state.num.abs().sum() == state.den.sum() == state.keys.sum() == state.key_sum.sum() == 0
    assert (state.max == -math.inf).all()
