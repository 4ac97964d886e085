"""What a second pass asks of a kernel besides attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from oocattn.kernels.kernel import Operands
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import Places, Reducing
from oocattn.kernels.reductions.totals import Totals
from oocattn.problem.second_pass import SecondPass, sign_vectors


def of_second_pass(operands: Operands, asked: SecondPass, shift: torch.Tensor) -> Operands:
    """The operands of a call by itself as those of a second pass, with the log-sum-exp [g, n] of its rows."""
    if asked.seed is not None:
        projection = torch.from_numpy(sign_vectors(asked.seed, operands.value.shape[1]))
        return replace(operands, shift=shift, projection=projection)
    along_keys, along_rows = reductions_of(asked.reduced or ())
    rows, tokens = range(operands.rows), np.arange(operands.keys)
    group_size, device, places = len(operands.query), operands.query.device, Places(rows, range(operands.keys), tokens)
    if device.type == "cpu":
        reducing = Reducing(along_keys, [each.begin(group_size, rows, tokens) for each in along_rows], places)
    else:

        def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        kept = [each for each, _ in along_keys]
        totals = Totals.begin(kept, along_rows, group_size, rows, [range(operands.keys)], take)
        reducing = Reducing(along_keys, [], places, totals)
    return replace(operands, value=operands.value[:, :0], shift=shift, reducing=reducing)
