"""The attention state of a range of query rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Take = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
"""What gives an uninitialised tensor of a shape and dtype."""


@dataclass(frozen=True)
class AttentionState:
    """Attention of n rows of g heads over the keys so far, before the division: tensors that kernels update in place.

    With the scores s of a row and a shift no less than a few units below the largest of them: `max` [g, n] is the shift,
    `den` [g, n] the sum of exp(s - max) and `num` [g, n, Dv] the sum of exp(s - max) * v, all float32. A row with no key has
    num = 0, den = 0 and max = -inf. The ledger, the same for all heads, says which keys were attended: `keys` [n] int64
    counts them, `key_sum` [n] int64 is the sum of their indices modulo 2^64. Kernels do not touch it; merging adds it.

    Source: the running softmax of Milakov and Gimelshein, arXiv 1805.02867, section 3, as a mergeable record. Raises
    ValueError where the shapes do not fit each other.
    """

    num: torch.Tensor
    den: torch.Tensor
    max: torch.Tensor
    keys: torch.Tensor
    key_sum: torch.Tensor

    def __post_init__(self) -> None:
        group_size, rows, _ = self.num.shape
        numbers, ledger = (self.den, self.max), (self.keys, self.key_sum)
        if any(field.shape != (group_size, rows) for field in numbers) or any(field.shape != (rows,) for field in ledger):
            raise ValueError(
                f"state with num {list(self.num.shape)}: expected den and max {[group_size, rows]}, keys and key_sum "
                f"{[rows]}, found {', '.join(str(list(field.shape)) for field in (*numbers, *ledger))}"
            )

    @classmethod
    def empty(cls, group_size: int, rows: int, value_dim: int, device: torch.device | str = "cpu") -> AttentionState:
        """Allocate the state of [group_size, rows, value_dim] without keys."""

        def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        state = cls.allocate(take, group_size, rows, value_dim)
        state.reset()
        return state

    @classmethod
    def allocate(cls, take: Take, group_size: int, rows: int, value_dim: int) -> AttentionState:
        """An uninitialised state of [group_size, rows, value_dim], of tensors that `take` gives."""
        numbers = (group_size, rows, value_dim), (group_size, rows), (group_size, rows)
        tensors = [take(shape, torch.float32) for shape in numbers]
        return cls(*tensors, *(take((rows,), torch.int64) for _ in range(2)))

    @classmethod
    def without_ledger(cls, num: torch.Tensor, den: torch.Tensor, max: torch.Tensor) -> AttentionState:
        """A kernel's numbers, to be merged into a state; its ledger is empty."""
        nothing = torch.zeros((), dtype=torch.int64, device=num.device).expand(num.shape[1])
        return cls(num, den, max, nothing, nothing)

    def reset(self) -> None:
        """Forget every key: all fields are 0, but max is -inf."""
        self.num.zero_()
        self.den.zero_()
        self.max.fill_(-math.inf)
        self.keys.zero_()
        self.key_sum.zero_()

    def rows(self, start: int, stop: int) -> AttentionState:
        """Query rows [start, stop) as views: to write to them is to write to this state."""
        if start == 0 and stop >= self.keys.shape[0]:
            return self
        rows = slice(start, stop)
        return AttentionState(self.num[:, rows], self.den[:, rows], self.max[:, rows], self.keys[rows], self.key_sum[rows])

    def heads(self, start: int, stop: int) -> AttentionState:
        """Heads [start, stop) as views."""
        heads = slice(start, stop)
        return AttentionState(self.num[heads], self.den[heads], self.max[heads], self.keys, self.key_sum)

    def head(self, index: int) -> AttentionState:
        """The state of one head as views, with g = 1."""
        return self.heads(index, index + 1)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.nbytes_for(*self.num.shape)

    @staticmethod
    def nbytes_for(group_size: int, rows: int, value_dim: int) -> int:
        """Bytes of a state: Dv + 2 float32 per head and row, two int64 per row."""
        return rows * (group_size * (value_dim + 2) * 4 + 16)
