"""Tensors in the memory of this process, as sources of a run: arrays of NumPy and tensors of PyTorch, also on a GPU."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oocattn.errors import ProblemError
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.storage.inputs.axes import Axes
from oocattn.storage.inputs.in_process import InProcessSource
from oocattn.storage.inputs.source import Opened, TensorSource
from oocattn.storage.inputs.values import check_dtype
from oocattn.storage.locations import describe
from oocattn.storage.remote.options import StorageOptions

if TYPE_CHECKING:
    import torch


class MemorySource(InProcessSource):
    """A tensor in memory. `content` holds its numbers in `axes`."""

    def __init__(self, name: str, content: NDArray[Any] | torch.Tensor, axes: Axes) -> None:
        kind = "numpy" if isinstance(content, np.ndarray) else "torch"
        dtype = content.dtype.name if isinstance(content, np.ndarray) else str(content.dtype).removeprefix("torch.")
        super().__init__(name, content, kind, content.shape, dtype, axes)

    @property
    def reader(self) -> str:
        """See `TensorSource.reader`."""
        return "memory"

    def describe(self) -> str:
        """See `TensorSource.describe`."""
        return "in memory, copied"

    def reopen(self) -> TensorSource:
        """The same memory, with the numbers that it holds now."""
        return MemorySource(self.name, self._content, self.axes)

    def _read(self, batch: int, head: int, start: int, stop: int, out: NDArray[Any]) -> None:
        found = self._content[self.axes.select(batch, head, slice(start, stop))]
        target = out.reshape(tuple(found.shape))
        if isinstance(found, np.ndarray):
            np.copyto(target, found)
        else:
            _as_torch(target).copy_(found)


def open_memory(name: str, typed: object, _: StorageOptions | None = None) -> Opened | None:
    """An array of NumPy or a tensor of PyTorch; None for anything else. Raises ProblemError where it cannot be read."""
    torch = sys.modules.get("torch")  # who passes a tensor has imported it
    if torch is not None and isinstance(typed, torch.Tensor):
        content: Any = plain_tensor(name, typed)
    elif isinstance(typed, np.ndarray):
        if isinstance(typed, np.ma.MaskedArray):
            raise ProblemError(f"{name}: found {describe(typed)}: expected plain numbers; give .filled(0)")
        check_dtype(name, describe(typed), typed.dtype)
        content = typed
    else:
        return None
    return Opened(describe(typed), tuple(content.shape), lambda own, axes: MemorySource(own, content, axes))


def plain_tensor(name: str, given: torch.Tensor) -> torch.Tensor:
    """A tensor without its gradient, of which every number lies in memory. Raises ProblemError for another one."""
    import torch

    found = f"{name}: found {describe(given)} of {str(given.dtype).removeprefix('torch.')}"
    if given.requires_grad and torch.is_grad_enabled():
        raise ProblemError(f"{found} that requires a gradient, which is not computed here: give {name}.detach()")
    if given.is_nested or given.layout is not torch.strided:
        layout = "nested" if given.is_nested else str(given.layout).removeprefix("torch.")
        raise ProblemError(f"{found}, {layout}: expected a dense tensor; give {name}.to_dense(), or a padded one")
    if isinstance(given, torch.masked.MaskedTensor):
        raise ProblemError(f"{found}, masked: expected plain numbers; give {name}.to_tensor(0)")
    if given.is_quantized:
        raise ProblemError(f"{found}, quantised: expected plain numbers; give {name}.dequantize()")
    if given.device.type not in ("cpu", "cuda"):
        remedy = "it has no numbers" if given.device.type == "meta" else f"give {name}.cpu()"
        raise ProblemError(f"{found} on {given.device}: expected it on cpu or cuda; {remedy}")
    check_dtype(name, describe(given), str(given.dtype).removeprefix("torch."))
    if given.is_cuda:
        torch.cuda.current_stream(given.device).synchronize()  # reads are on streams of other threads
    content = given.detach()
    if content.numel():
        _check_numbers(found, content)
    return content


def _check_numbers(found: str, content: torch.Tensor) -> None:
    """Raise ProblemError for a tensor that only looks like one: a fake one, or that of a program being traced."""
    import torch

    try:
        torch.empty((), dtype=content.dtype).copy_(content[(0,) * content.ndim])
    except Exception as error:
        raise ProblemError(
            f"{found} whose numbers cannot be read ({type(error).__name__}): expected a plain tensor"
        ) from error


def _as_torch(out: NDArray[Any]) -> torch.Tensor:
    """The same memory as a tensor of PyTorch."""
    import torch

    if out.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(out.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(out)
