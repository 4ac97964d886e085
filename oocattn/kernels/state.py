"""The attention state of a range of query rows; how it is filled and merged lies in the kernels and in `merge`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionState:
    """Attention of n query rows of g heads over the keys attended so far, before the division.

    With the scores s = scale * q @ k.T of a row and a shift no less than a few units below the largest of them: `max`
    [g, n] is the shift, `den` [g, n] the sum of exp(s - max) and `num` [g, n, D] the sum of exp(s - max) * v, all
    float32; `keys` [n] int64 counts the attended keys, which are the same for all heads. A row with no key has num = 0,
    den = 0 and max = -inf.

    Source: the running softmax of Milakov and Gimelshein, arXiv 1805.02867, section 3, as a mergeable record. The
    fields are tensors that kernels update in place. Raises ValueError where their shapes do not fit each other.
    """

    num: torch.Tensor
    den: torch.Tensor
    max: torch.Tensor
    keys: torch.Tensor

    def __post_init__(self) -> None:
        group_size, rows, _ = self.num.shape
        if not self.den.shape == self.max.shape == (group_size, rows) or self.keys.shape != (rows,):
            raise ValueError(
                f"partial with num {list(self.num.shape)}: expected den and max {[group_size, rows]} and keys {[rows]}"
                f", found {list(self.den.shape)}, {list(self.max.shape)} and {list(self.keys.shape)}"
            )

    @classmethod
    def empty(cls, group_size: int, rows: int, head_dim: int, device: torch.device | str = "cpu") -> AttentionState:
        """Allocate the state of [group_size, rows, head_dim] on `device`, with no key attended."""
        state = cls(
            num=torch.empty((group_size, rows, head_dim), dtype=torch.float32, device=device),
            den=torch.empty((group_size, rows), dtype=torch.float32, device=device),
            max=torch.empty((group_size, rows), dtype=torch.float32, device=device),
            keys=torch.empty(rows, dtype=torch.int64, device=device),
        )
        state.reset()
        return state

    def reset(self) -> None:
        """Forget every key: num = 0, den = 0, max = -inf, keys = 0."""
        self.num.zero_()
        self.den.zero_()
        self.max.fill_(-math.inf)
        self.keys.zero_()

    def rows(self, start: int, stop: int) -> AttentionState:
        """Query rows [start, stop) as views: to write to them is to write to this state."""
        return AttentionState(
            self.num[:, start:stop], self.den[:, start:stop], self.max[:, start:stop], self.keys[start:stop]
        )

    def head(self, index: int) -> AttentionState:
        """The state of one head as views, with g = 1."""
        heads = slice(index, index + 1)
        return AttentionState(self.num[heads], self.den[heads], self.max[heads], self.keys)

    @staticmethod
    def nbytes_for(group_size: int, rows: int, head_dim: int) -> int:
        """Bytes of a state of that size: D + 2 float32 per head and row, one int64 per row."""
        return rows * (group_size * (head_dim + 2) * 4 + 8)

    @property
    def nbytes(self) -> int:
        """Bytes of this state."""
        return self.nbytes_for(*self.num.shape)
