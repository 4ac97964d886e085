"""Temporaries of the kernels that run on a CPU stay within the bound that they state, which is not idle."""

import json
import sys

import pytest
import warm

from oocattn.kernels.registry import get_kernel
from oocattn.problem.calls import CallSize

MEASURE = """
import ctypes, json, sys, numpy, torch
from oocattn.kernels.intervals import make_intervals
from oocattn.kernels.kernel import Operands
from oocattn.kernels.registry import get_kernel
from oocattn.kernels.second_pass import of_second_pass
from oocattn.problem.calls import CallSize
from oocattn.kernels.state import AttentionState
from oocattn.problem.mask import Mask
from oocattn.problem.scores import Scores
from oocattn.problem.second_pass import Reduced, SecondPass

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

name, dtype = sys.argv[1], sys.argv[2]
options, terms = json.loads(sys.argv[3]), json.loads(sys.argv[4])
group_size, rows, keys, head_dim, value_dim = map(int, sys.argv[5:10])
reduced = tuple(Reduced(*each) for each in json.loads("".join(sys.argv[10:]) or "[]"))
kernel, documents = get_kernel(name), options.pop("documents", 1)

def call(rows, keys):
    shapes = (group_size, rows, head_dim), (keys, head_dim), (keys, value_dim)
    tensors = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape in shapes]
    asked = SecondPass(reduced=reduced) if reduced else SecondPass(0)
    if reduced:  # every weight is the largest so far
        tensors[0].fill_(1.0)
        tensors[1].copy_(torch.linspace(0, 1, keys)[:, None])
    state = AttentionState.empty(group_size, rows, asked.columns if kernel.shifted else value_dim)
    mask = Mask(*(numpy.linspace(0, size, documents + 1, dtype=int) for size in (rows, keys)), **options)
    intervals = make_intervals(mask, range(rows), range(keys)) if options else None
    slopes, bias = (0.1,) * group_size if terms else None, torch.zeros(group_size, keys) if terms else None
    operands = Operands(*tensors, Scores(0.1, 2.0 if terms else None), intervals, slopes, bias)
    shift = torch.zeros(group_size, rows)
    return of_second_pass(operands, asked, shift) if kernel.shifted else operands, state

kernel.attend(*call(64, 64))  # loads the code
operands, state = call(rows, keys)
ctypes.CDLL(None).malloc_trim(0)  # or the call would grow into what was freed before, unseen
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before, code = status("VmRSS"), status("RssFile")
kernel.attend(operands, state)
code = status("RssFile") - code  # pages of libraries that this call is the first to touch
masked = bool(options) and (operands.band is None or not operands.band.is_open_below(rows))
size = CallSize(group_size, rows, keys, head_dim, value_dim, dtype, torch.get_num_threads(), not terms, masked, reduced)
print(status("VmHWM") - before - code, kernel.scratch_bytes(size))
"""

CAUSAL, WINDOW = {"causal": True}, {"causal": True, "left": 700}
DOCUMENTS = {"causal": True, "documents": 3}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "dtype", "mask", "terms", "shape"),
    [
        ("cpu", "bfloat16", {}, False, (1, 9000, 20000, 64, 64)),
        ("cpu", "float32", CAUSAL, False, (4, 4000, 4000, 128, 128)),
        ("cpu", "float16", {}, False, (1, 3000, 9000, 256, 256)),
        ("cpu", "float16", WINDOW, False, (2, 9000, 9000, 64, 64)),
        ("cpu", "float16", DOCUMENTS, False, (1, 30000, 30000, 64, 64)),
        ("cpu", "float16", {**DOCUMENTS, "left": 1500}, False, (2, 9000, 9000, 64, 64)),
        ("cpu", "float16", CAUSAL, True, (2, 4000, 4000, 64, 200)),
        ("reference", "float32", {}, False, (2, 500, 5000, 128, 128)),
        ("reference", "float32", WINDOW, True, (2, 900, 900, 64, 64)),
        ("torch", "bfloat16", CAUSAL, False, (2, 5000, 5000, 64, 64)),
        ("torch", "bfloat16", WINDOW, True, (2, 5000, 5000, 64, 256)),
        ("weights", "float16", {}, False, (1, 9000, 9000, 64, 64)),
        ("weights", "float32", CAUSAL, False, (4, 4000, 4000, 128, 128)),
        ("weights", "float16", DOCUMENTS, False, (1, 9000, 9000, 256, 64)),
        ("weights", "float16", WINDOW, True, (2, 4000, 4000, 64, 200)),
    ],
)
def test_scratch_is_within_its_bound_and_the_bound_is_not_idle(name, dtype, mask, terms, shape):
    printed = warm.printed(MEASURE, name, dtype, json.dumps(mask), json.dumps(terms), *map(str, shape))
    grown, bound = map(int, printed.split())
    assert grown <= bound
    assert bound <= (6 if not mask or (mask == CAUSAL and not terms) else 16) * grown


RECEIVED, ENTROPY, TOP, MOST = ["received"], ["entropy", [], 1], ["top_keys", [8], 16], ["top_keys", [128], 256]
MAP, FINE = ["pooled", [16, 16, 0, 625]], ["pooled", [1, 1, 0, 4000]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("reduced", "mask", "terms", "shape"),
    [
        ([RECEIVED], {}, False, (1, 9000, 9000, 64, 64)),
        ([ENTROPY], {}, False, (1, 9000, 9000, 64, 64)),
        ([TOP], {}, False, (2, 2000, 9000, 64, 64)),
        ([MOST], {}, False, (1, 2000, 9000, 64, 64)),
        ([TOP], {}, False, (1, 2048, 60000, 16, 16)),
        ([MAP], {}, False, (1, 9000, 9000, 64, 64)),
        ([FINE], {}, False, (1, 2000, 4000, 64, 64)),
        ([RECEIVED, ENTROPY, TOP, MAP], CAUSAL, False, (4, 4000, 4000, 128, 128)),
        ([RECEIVED, ENTROPY, TOP, MAP], WINDOW, True, (2, 4000, 4000, 64, 200)),
    ],
)
def test_scratch_of_reductions_is_within_its_bound_and_the_bound_is_not_idle(reduced, mask, terms, shape):
    words = "float16", json.dumps(mask), json.dumps(terms), *map(str, shape), json.dumps(reduced)
    grown, bound = map(int, warm.printed(MEASURE, "weights", *words).split())
    assert grown <= bound
    assert bound <= 8 * grown


@pytest.mark.parametrize("terms", [{}, {"plain": False}, {"masked": True}, {"plain": False, "masked": True}], ids=str)
def test_scratch_does_not_grow_with_the_call(terms):
    for name, most in (("cpu", 40 << 20), ("reference", 32 << 20), ("torch", 240 << 20), ("weights", 24 << 20)):
        bounds = [get_kernel(name).scratch_bytes(CallSize(1, n, n, 64, 64, "float32", 2, **terms)) for n in (10**6, 10**9)]
        assert bounds[0] == bounds[1] < most


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("cpu", (14_861_888, 44_072_960)),
        ("reference", (9_619_008, 28_633_728)),
        ("torch", (153_092_096, 132_120_576)),
    ],
)
def test_scratch_of_a_plain_call_is_that_which_older_plans_say(name, recorded):
    calls = CallSize(1, 8192, 8192, 64, 64, "float16", 2), CallSize(4, 100_000, 65_536, 128, 128, "float32", 8)
    assert tuple(map(get_kernel(name).scratch_bytes, calls)) == recorded
