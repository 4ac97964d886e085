"""What a second pass asks of a kernel besides attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from oocattn.kernels.kernel import Operands
from oocattn.kernels.reductions import reductions_of
from oocattn.kernels.reductions.base import Places, Reducing
from oocattn.problem.second_pass import SecondPass, sign_vectors


def of_second_pass(operands: Operands, asked: SecondPass, shift: torch.Tensor) -> Operands:
    """The operands of a call by itself as those of a second pass, with the log-sum-exp [g, n] of its rows."""
    if asked.seed is not None:
        projection = torch.from_numpy(sign_vectors(asked.seed, operands.value.shape[1]))
        return replace(operands, shift=shift, projection=projection)
    along_keys, along_rows = reductions_of(asked.reduced or ())
    rows, tokens = range(operands.rows), np.arange(operands.keys)
    sums = [each.begin(len(operands.query), rows, tokens) for each in along_rows]
    reducing = Reducing(along_keys, sums, Places(rows, range(operands.keys), tokens))
    return replace(operands, value=operands.value[:, :0], shift=shift, reducing=reducing)
