"""The kernel of surveys for Hopper GPUs: what the compiler makes of it, how it is cut, and what it refuses."""

import re

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="it comes with torch's builds for CUDA")

from exact import operands

from oocattn.kernels.cuda.launch import Variant, program_for
from oocattn.kernels.cuda.reducing import Reductions
from oocattn.kernels.cuda.tuning import numbers_for, reducing_tuning
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.second_pass import of_second_pass
from oocattn.kernels.state import AttentionState
from oocattn.problem.scores import Scores
from oocattn.problem.second_pass import Reduced, SecondPass

EVERY = Reductions(logarithms=True, received=True, pooled=True, top=8)
LISTED = {"listed": True}
EVERY_TERM = {"listed": True, "softcap": True, "slopes": True, "bias": True}
VARIANTS = [
    (64, EVERY, {}, torch.float16, 8),  # where the thread that loads takes an item
    (128, EVERY, {}, torch.bfloat16, 8),
    (64, EVERY, LISTED, torch.bfloat16, 0),
    (64, EVERY, EVERY_TERM, torch.float16, 24),
    (64, EVERY, {}, torch.float32, 8),
    (64, EVERY._replace(top=128), {}, torch.float16, 24),
    (256, EVERY, {}, torch.float16, 24),
]
"""D, what is made of weights, options, dtype, and bytes that may be spilled."""
SLOW_VARIANTS = [
    (64, Reductions(logarithms=True), {}, torch.bfloat16, 0),
    (64, Reductions(received=True), {}, torch.float16, 8),
    (64, Reductions(pooled=True), {}, torch.float16, 0),
    (64, Reductions(top=1), {}, torch.float16, 0),
    (8, EVERY, EVERY_TERM, torch.bfloat16, 24),
    (128, EVERY, EVERY_TERM, torch.float16, 24),
    (128, EVERY, {}, torch.float32, 24),
    (128, EVERY._replace(top=128), EVERY_TERM, torch.float32, 24),
    (256, EVERY._replace(top=128), EVERY_TERM, torch.bfloat16, 24),
]
"""The same of programs that are like others."""


@pytest.mark.parametrize(
    ("head_dim", "reductions", "options", "dtype", "most_spilled"),
    [*VARIANTS, *(pytest.param(*variant, marks=pytest.mark.slow) for variant in SLOW_VARIANTS)],
    ids=str,
)
def test_it_compiles_without_a_gpu_and_keeps_to_its_registers(head_dim, reductions, options, dtype, most_spilled):
    program = program_for(Variant(head_dim, 0, dtype, shifted=True, reductions=reductions, **options))
    report = program.report("sm_90a")
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert max(map(int, spilled.groups())) <= most_spilled, report
    assert re.search(r"Used (128|168|232) registers", report), report
    assert "serializ" not in report, report


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_number_of_kept_weights_has_a_cut_that_fits(dtype):
    numbers = numbers_for(dtype, reduced=True)
    for head_dim in range(8, 257 if dtype == "float16" else 129, 8):
        for top in range(129):
            tuning = reducing_tuning(head_dim, numbers, EVERY._replace(top=top), plain=top % 2 == 0)
            assert tuning.shared_bytes <= 232_448
            assert tuning.restart == tuning.fold == 0


def test_calls_of_other_passes_are_refused():
    kernel, call = get_kernel("hopper-survey"), Operands(*operands(1, 10, 10, 64, torch.float16), Scores(1.0))
    with pytest.raises(ValueError, match="expected operands of a survey: with a shift, and what is reduced"):
        kernel.attend(call, AttentionState.empty(1, 10, 64))
    asked = SecondPass(reduced=(Reduced("received"),))
    narrow = Operands(*operands(1, 10, 10, 60, torch.float16), Scores(1.0))
    with pytest.raises(ValueError, match="D and Dv of float16 must be multiples of 8, 256 at most"):
        kernel.attend(of_second_pass(narrow, asked, torch.zeros(1, 10)), AttentionState.empty(1, 10, 1))
    with pytest.raises(ValueError, match="the sums over rows of a call on a GPU must lie there"):
        kernel.attend(of_second_pass(call, asked, torch.zeros(1, 10)), AttentionState.empty(1, 10, 1))
