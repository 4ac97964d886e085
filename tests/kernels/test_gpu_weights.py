"""Second passes on a GPU: sums of weights, and of weights times projected values, against float64 on the same device."""

import math
import random

import pytest
import torch
from any_mask import Terms, by_dense_mask, make_operands, random_intervals, random_mask
from on_gpu import kernel_for, poisoned_state

from oocattn.kernels.registry import second_pass_kernel
from oocattn.kernels.second_pass import of_second_pass
from oocattn.problem.second_pass import VECTORS, SecondPass, sign_vectors

pytestmark = pytest.mark.gpu

BOUND = {"float16": 5e-4, "bfloat16": 5e-4, "float32": 3e-6}  # relative, of the sums with projected values
EVERY_TERM = Terms(softcap=20.0, slopes=True, bias="each")


def check(call, dtype, about):
    kernel = kernel_for("hopper-weights", dtype, call.query.shape[-1], call.value.shape[-1])
    out, lse = by_dense_mask(call)
    attended = lse > -math.inf
    state = poisoned_state(*call.query.shape[:2], VECTORS)
    kernel.attend(of_second_pass(call, SecondPass(7), lse.float()), state)
    signs = torch.from_numpy(sign_vectors(7, call.value.shape[1])).to(out)
    assert (state.max[attended] == 0).all(), about
    assert not state.num[~attended].any(), about
    assert not state.den[~attended].any(), about
    given = (lse - lse.float()).exp()  # what weights are by the shifts as float32 has them
    expected = (given.unsqueeze(-1) * (out @ signs))[attended]
    size = lse[attended].abs()  # of scores, which float32 rounds
    allowed = (BOUND[dtype] + 1e-7 * size).unsqueeze(-1) * expected
    assert (state.num[attended] - expected).norm() <= allowed.norm(), about
    rounding = 3e-6 + 3e-7 * size
    assert ((state.den - given)[attended].abs() <= rounding).all(), about


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("terms", [Terms(), EVERY_TERM], ids=["plain", "terms"])
def test_any_mask_and_terms_give_the_sums_of_weights(dtype, terms):
    rng = random.Random(17)
    for case in range(12):
        dims = rng.choice([(64, 64), (128, 64)])
        call = make_operands(random_intervals(rng, random_mask(rng)), rng.choice([1, 3]), dims, dtype, terms, case)
        check(call, dtype, (case, dims))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", [(1000, 1500), (50, 9000), (300, 20_000)], ids=str)
def test_full_calls_long_ones_and_those_of_few_rows(dtype, size):
    check(make_operands(None, 2, (64, 64), dtype, Terms(), size=size), dtype, size)


def test_weights_of_a_wrong_shift_are_wrong_and_finite():
    call = make_operands(None, 1, (64, 64), "float16", Terms(), size=(200, 500))
    kernel, (_, lse) = kernel_for("hopper-weights", "float16", 64), by_dense_mask(call)
    state = poisoned_state(1, 200, VECTORS)
    kernel.attend(of_second_pass(call, SecondPass(7), lse.float() + 0.01), state)
    assert (state.den - math.exp(-0.01)).abs().max() <= 1e-5


def test_it_is_chosen_where_it_serves():
    kernel_for("hopper-weights", "float16", 64)
    assert second_pass_kernel("proofs", "cuda", "float16", 64, 128) == "hopper-weights"
    assert second_pass_kernel("proofs", "cuda", "float16", 64, 60) == "weights"
