"""Merging on a GPU as single Triton kernels, without temporaries; what they compute is defined in `merge`.

Imported for CUDA tensors only, and only where Triton is installed. Everything is launched on torch's current stream of
the tensors' device; nothing is allocated and nothing waits.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from oocattn.kernels.partial import Partial

_MERGE_ELEMENTS = 4096  # numerators of one program: 32 a thread


def merge(into: Partial, other: Partial) -> None:
    """See `merge.merge`: one launch for all fields."""
    _merge(into, _fields(other.num, other.den, other.max, other.keys), keys=0, diagonal=False)


def fold(state: Partial, out: torch.Tensor, lse: torch.Tensor, *, keys: int, diagonal: bool) -> None:
    """See `merge.fold`: one launch for all fields."""
    _merge(state, _fields(out, None, lse, None), keys=keys, diagonal=diagonal)


def finalise(state: Partial, out: torch.Tensor, lse: torch.Tensor) -> None:
    """See `merge.finalise`: one launch."""
    _launch(
        _finalise_rows,
        state,
        *(state.num, state.den, state.max, *state.num.stride()[:2], *state.den.stride(), *state.max.stride()),
        *(out, lse, *out.stride()[:2], *lse.stride()),
        state.num.shape[1],
    )


def _fields(
    num: torch.Tensor, den: torch.Tensor | None, maximum: torch.Tensor, keys: torch.Tensor | None
) -> tuple[Any, ...]:
    """A state as `_merge_rows` takes it: pointers, and the strides of heads and rows."""
    if num.shape[-1] > 1 and num.stride(-1) != 1:
        raise ValueError(f"strides {num.stride()} of [g, n, D]: the innermost dimension must be contiguous")
    return (
        *(num, den, maximum, keys),
        *num.stride()[:2],
        *((0, 0) if den is None else den.stride()),
        *maximum.stride(),
        0 if keys is None else keys.stride(0),
    )


def _merge(into: Partial, other: tuple[Any, ...], *, keys: int, diagonal: bool) -> None:
    own = _fields(into.num, into.den, into.max, into.keys)
    _launch(_merge_rows, into, *own, *other, into.num.shape[1], keys, diagonal=diagonal)


def _launch(kernel: Any, state: Partial, *arguments: Any, **constants: bool) -> None:
    """Launch a kernel whose programs each take a block of rows of one head of `state`."""
    group_size, rows, head_dim = state.num.shape
    block_dim = triton.next_power_of_2(head_dim)
    block_rows = max(1, _MERGE_ELEMENTS // block_dim)
    programs = group_size * triton.cdiv(rows, block_rows)
    if programs == 0:
        return
    with torch.cuda.device(state.num.device):
        kernel[(programs,)](*arguments, **constants, head_dim=head_dim, block_rows=block_rows, block_dim=block_dim)


@triton.jit(do_not_specialize=["rows", "added_keys"])
def _merge_rows(
    num,
    den,
    maximum,
    keys,
    num_head,
    num_row,
    den_head,
    den_row,
    max_head,
    max_row,
    keys_row,
    other_num,
    other_den,  # None: the other is a library's result, divided already
    other_max,
    other_keys,
    other_num_head,
    other_num_row,
    other_den_head,
    other_den_row,
    other_max_head,
    other_max_row,
    other_keys_row,
    rows,
    added_keys,
    diagonal: tl.constexpr,
    head_dim: tl.constexpr,
    block_rows: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Merge block_rows rows of one head; the programs of the first head also add up the keys."""
    blocks = tl.cdiv(rows, block_rows)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    inside = row < rows

    max_at = maximum + head * max_head + row * max_row
    den_at = den + head * den_head + row * den_row
    own_max = tl.load(max_at, mask=inside, other=0.0)
    own_den = tl.load(den_at, mask=inside, other=0.0)
    added_max = tl.load(other_max + head * other_max_head + row * other_max_row, mask=inside, other=0.0)
    added_den = 1.0
    if other_den is not None:
        added_den = tl.load(other_den + head * other_den_head + row * other_den_row, mask=inside, other=0.0)
    tl.debug_barrier()  # several warps hold the same rows: all must have read what one of them is about to overwrite
    new_max = tl.maximum(own_max, added_max, propagate_nan=tl.PropagateNan.ALL)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    kept = tl.exp(own_max - shift)
    added = tl.exp(added_max - shift)
    tl.store(max_at, new_max, mask=inside)
    tl.store(den_at, own_den * kept + added_den * added, mask=inside)

    dim = tl.arange(0, block_dim)
    filled = inside[:, None] & (dim < head_dim)[None, :]
    num_at = num + head * num_head + row[:, None] * num_row + dim[None, :]
    other_num_at = other_num + head * other_num_head + row[:, None] * other_num_row + dim[None, :]
    own_num = tl.load(num_at, mask=filled, other=0.0)
    added_num = tl.load(other_num_at, mask=filled, other=0.0).to(tl.float32)
    tl.store(num_at, own_num * kept[:, None] + added_num * added[:, None], mask=filled)

    counted = inside & (head == 0)
    keys_at = keys + row * keys_row
    count = tl.load(keys_at, mask=counted, other=0)
    if other_keys is not None:
        count += tl.load(other_keys + row * other_keys_row, mask=counted, other=0)
    elif diagonal:
        count += row + 1
    else:
        count += added_keys
    tl.store(keys_at, count, mask=counted)


@triton.jit(do_not_specialize=["rows"])
def _finalise_rows(
    num,
    den,
    maximum,
    num_head,
    num_row,
    den_head,
    den_row,
    max_head,
    max_row,
    out,
    lse,
    out_head,
    out_row,
    lse_head,
    lse_row,
    rows,
    head_dim: tl.constexpr,
    block_rows: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Divide block_rows rows of one head; a row with no key gives out = 0 and lse = -inf."""
    blocks = tl.cdiv(rows, block_rows)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    inside = row < rows
    own_den = tl.load(den + head * den_head + row * den_row, mask=inside, other=1.0)
    own_max = tl.load(maximum + head * max_head + row * max_row, mask=inside, other=0.0)
    tl.store(lse + head * lse_head + row * lse_row, own_max + tl.log(own_den), mask=inside)

    dim = tl.arange(0, block_dim)
    filled = inside[:, None] & (dim < head_dim)[None, :]
    own_num = tl.load(num + head * num_head + row[:, None] * num_row + dim[None, :], mask=filled, other=0.0)
    divided = own_num / tl.where(own_den == 0, 1.0, own_den)[:, None]
    out_at = out + head * out_head + row[:, None] * out_row + dim[None, :]
    tl.store(out_at, divided.to(out.dtype.element_ty), mask=filled)
