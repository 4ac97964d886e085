"""The call of a library that a user would make of tensors in memory: which one follows from the mask and the device.

Libraries know full and causal attention, windows and packed documents, aligned bottom-right. `library_mask` says what they
lack of what a problem asks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from oocattn.bench.competitors import FromHostMemory, Inputs
from oocattn.bench.records import RESIDENT
from oocattn.errors import OocattnError
from oocattn.kernels.libraries.fa3 import library_call
from oocattn.problem.problem import Problem

LEAST_BLOCK, MOST_SCORES = 128, 1 << 26
"""Rows of a block of a band on the CPU at least, and scores of all its heads at most, unless it has fewer rows."""


@dataclass(frozen=True)
class LibraryMask:
    """A mask as libraries take it: boundaries of documents among the queries and the keys, and the window within each."""

    edges_q: tuple[int, ...]
    edges_k: tuple[int, ...]
    causal: bool
    left: int | None
    right: int | None

    @property
    def is_plain(self) -> bool:
        """True for what `scaled_dot_product_attention` has an argument for: full, or causal and square."""
        return len(self.edges_q) == 2 and not self.is_band and (not self.causal or self.edges_q == self.edges_k)

    @property
    def is_band(self) -> bool:
        """True if there is a window."""
        return self.left is not None or (self.right is not None and not self.causal)

    @property
    def documents(self) -> Iterator[tuple[range, range]]:
        """Rows and keys of each document that has some of both."""
        for rows, keys in zip(pairwise(self.edges_q), pairwise(self.edges_k), strict=True):
            if rows[0] < rows[1] and keys[0] < keys[1]:
                yield range(*rows), range(*keys)


def library_mask(problem: Problem, known: Collection[str] = ()) -> LibraryMask:
    """The mask of a problem of one batch entry. Raises OocattnError for an argument that no call has, `known` ones apart."""
    asked = {
        "prefix": problem.prefix,
        "sink_tokens": problem.sink_tokens,
        "softcap": problem.softcap,
        "key_bias": problem.bias_heads,
        **{name: True for name in ("alibi_slopes", "learnable_sink") if name in problem.digests},
    }
    missing = [name for name, given in asked.items() if given and name not in known]
    if missing:
        raise OocattnError(f"no call of the library has {', '.join(missing)}")
    mask, (start, stop) = problem.mask(), problem.rows_asked
    left, right = problem.window_size
    edges_q, edges_k = (tuple(map(int, edges)) for edges in (mask.query_edges, mask.key_edges))
    found = LibraryMask(edges_q, edges_k, problem.causal, left, right)
    if (start, stop) == (0, problem.queries):
        return found
    if mask.documents > 1 or (found.is_band and not found.causal):
        raise OocattnError("no call of the library takes part of the queries of such a mask")
    last = mask.keys + stop - mask.queries if found.causal else mask.keys  # so that it is aligned bottom-right
    return LibraryMask((0, stop - start), (0, max(0, last)), found.causal, left, right)


class ResidentCall(FromHostMemory):
    """Copy q, k and v to the device, one call of a library, copy `out` back. Raises OocattnError where there is none.

    On a GPU: `scaled_dot_product_attention`, asked for cuDNN, the fastest, which may refuse; for windows, documents and
    unequal lengths torch's FlashAttention-2. On a CPU: a loop over documents, and over blocks of rows within a band.
    """

    name = RESIDENT

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.mask = library_mask(inputs.problem, self._known)
        """The mask of the call."""
        self._backend = SDPBackend.CUDNN_ATTENTION if inputs.device == "cuda" else None

    _known: Collection[str] = ()
    """Arguments of the call beside the mask."""

    def _compute(self) -> None:
        inputs = self._inputs
        used = self.mask.edges_k[-1]
        for entry in range(inputs.problem.batch):
            q, k, v = (tensor[entry].to(inputs.device, non_blocking=True) for tensor in (inputs.q, inputs.k, inputs.v))
            inputs.out[entry].copy_(self._attend(q, k[:, :used], v[:, :used]), non_blocking=True)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output [h, n, Dv] of q [h, n, D], k [h or fewer, m, D] and v [as k, m, Dv]."""
        if self.mask.is_plain and (q.is_cuda or q.shape[2] == v.shape[2]):
            return self._sdpa(q, k, v)
        return self._flash(q, k, v) if q.is_cuda else self._blocks(q, k, v)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._backend is not None:
            try:
                with sdpa_kernel(self._backend):
                    return self._call(q, k, v, is_causal=self.mask.causal)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self._backend = None
        return self._call(q, k, v, is_causal=self.mask.causal)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        query, key, value = (tensor.unsqueeze(0) for tensor in (q, k, v))
        scale = self._inputs.problem.scale
        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=len(q) > len(k), **options)[0]

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask
        options = {"scale": self._inputs.problem.scale, "window_size_left": mask.left, "window_size_right": mask.right}
        operands = (tensor.transpose(0, 1) for tensor in (q, k, v))
        packed = _packed(mask, q.device)
        out, *_ = torch.ops.aten._flash_attention_forward(*operands, *packed, 0.0, mask.causal, False, **options)
        found: Tensor = out.transpose(0, 1)
        return found

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        for rows, keys in self.mask.documents:
            of_rows, of_keys = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
            operands = q[:, of_rows], k[:, of_keys], v[:, of_keys]
            if not self.mask.is_band and q.shape[2] == v.shape[2] and not (self.mask.causal and len(rows) != len(keys)):
                out[:, of_rows] = self._call(*operands, is_causal=self.mask.causal)
            else:
                self._band(*operands, out[:, of_rows])
        return out

    def _band(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Attend a document by blocks of rows, each with the keys that any of them attends."""
        rows, keys = q.shape[1], k.shape[1]
        shift, far = keys - rows, keys + rows
        left = far if self.mask.left is None else self.mask.left
        right = 0 if self.mask.causal else far if self.mask.right is None else self.mask.right
        width = min(keys, left + right + 1)
        step = max(1, min(max(LEAST_BLOCK, width // 4), MOST_SCORES // (len(q) * width)))
        first, last = max(0, -shift - right), min(rows, keys - shift + left)  # others attend nothing
        for start in range(first, last, step):
            position = torch.arange(start, min(start + step, last))[:, None] + shift
            near = slice(max(0, int(position[0]) - left), min(keys, int(position[-1]) + right + 1))
            key = torch.arange(near.start, near.stop)
            attended = (key >= position - left) & (key <= position + right)
            block = slice(start, start + len(position))
            out[:, block] = self._call(q[:, block], k[:, near], v[:, near], attn_mask=attended)


class Fa3Call(ResidentCall):
    """The same with the call of FlashAttention-3 for packed documents."""

    name = f"{RESIDENT}, FA3"
    _known = ("softcap",)

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self._library = fa3_library()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self._library is not None, "`fa3_library` was not asked"
        mask, problem = self.mask, self._inputs.problem
        window = tuple(-1 if side is None else side for side in (mask.left, mask.right))
        options: dict[str, Any] = {"softmax_scale": problem.scale, "causal": mask.causal, "window_size": window}
        if problem.softcap is not None:
            options["softcap"] = problem.softcap
        operands = (tensor.transpose(0, 1) for tensor in (q, k, v))
        found = self._library(*operands, *_packed(mask, q.device), **options)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(0, 1)


def fa3_library() -> Callable[..., Any] | None:
    """FlashAttention-3's call for packed documents, where it is installed and loads."""
    return library_call("flash_attn_varlen_func")


def _packed(mask: LibraryMask, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Boundaries of documents, and the most rows and keys of any, as FlashAttention's calls take them."""
    edges = (mask.edges_q, mask.edges_k)
    boundaries = (torch.tensor(of_side, dtype=torch.int32, device=device) for of_side in edges)
    longest = (max(stop - start for start, stop in pairwise(of_side)) for of_side in edges)
    return (*boundaries, *longest)  # type: ignore[return-value]
