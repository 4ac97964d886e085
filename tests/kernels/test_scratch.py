"""Temporaries of the kernels that run on a CPU stay within the bound that they state, which is not idle."""

import sys

import pytest
import warm

from oocattn.kernels.registry import get_kernel

MEASURE = """
import sys, torch
from calling import call
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.state import AttentionState

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

name, dtype, causal = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
group_size, rows, keys, head_dim = map(int, sys.argv[4:])
kernel = get_kernel(name)

def operands(rows, keys):
    shapes = (group_size, rows, head_dim), (keys, head_dim), (keys, head_dim)
    tensors = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape in shapes]
    return *tensors, AttentionState.empty(group_size, rows, head_dim)

call(kernel, *operands(64, 64), scale=0.1, causal=causal)  # loads the code
operands = operands(rows, keys)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = status("VmRSS")
call(kernel, *operands, scale=0.1, causal=causal)
print(status("VmHWM") - before, kernel.scratch_bytes(group_size, rows, keys, head_dim, dtype, torch.get_num_threads()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "dtype", "causal", "shape"),
    [
        ("cpu", "bfloat16", False, (1, 9000, 20000, 64)),
        ("cpu", "float32", True, (4, 4000, 4000, 128)),
        ("cpu", "float16", False, (1, 3000, 9000, 256)),
        ("reference", "float32", False, (2, 500, 5000, 128)),
        ("torch", "bfloat16", True, (2, 5000, 5000, 64)),
    ],
)
def test_scratch_is_within_its_bound_and_the_bound_is_not_idle(name, dtype, causal, shape):
    grown, bound = map(int, warm.printed(MEASURE, name, dtype, str(causal), *map(str, shape)).split())
    assert grown <= bound
    assert bound <= 6 * grown


def test_scratch_does_not_grow_with_the_call():
    for name, most in (("cpu", 32 << 20), ("reference", 32 << 20), ("torch", 160 << 20)):
        bound = get_kernel(name).scratch_bytes
        assert bound(1, 10**6, 10**6, 64, "float32", 2) == bound(1, 10**9, 10**9, 64, "float32", 2) < most
