"""Which kernel serves what, on machines that are made up: nothing here needs a GPU."""

import pytest
import torch

from oocattn.errors import ProblemError
from oocattn.kernels.cuda.hopper import HopperKernel, HopperPreciseKernel
from oocattn.kernels.cuda.hopper_survey import HopperSurveyKernel
from oocattn.kernels.libraries import fa3 as fa3_module
from oocattn.kernels.registry import (
    default_kernel,
    device_type,
    get_kernel,
    kernel_names,
    max_keys,
    require_kernel,
    rounds_weights,
    second_pass_kernel,
    share_code,
    takes_long_calls,
)
from oocattn.pins import Pins
from oocattn.problem.calls import CallSize
from oocattn.records import from_json, to_json

CUDA = torch.device("cuda:0")
DEVICE_TYPES = {
    **dict.fromkeys(("cpu", "reference"), "cpu"),
    **dict.fromkeys(("hopper", "hopper-precise", "fa3", "cudnn", "flash", "torch"), "cuda"),
}
"""Every kernel that attends, and where it runs."""
SHIFTED_DEVICE_TYPES = {
    "proofs": {"weights": "cpu", "hopper-weights": "cuda"},
    "surveys": {"weights": "cpu", "hopper-survey": "cuda"},
}
"""Every kernel for second passes, by what these are."""


@pytest.fixture
def machine(monkeypatch):
    """Make this look like a machine with a GPU of that compute capability, that cuDNN, and FA3 for those dtypes."""

    def pretend(capability, cudnn=91900, fa3=(), ours=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(fa3_module, "library_call", lambda: print if fa3 else None)
        refusal = lambda device, dtype, *dims: "" if dtype in fa3 else "the library refuses it: not built"  # noqa: E731
        monkeypatch.setattr(fa3_module.Fa3Kernel, "_refusal", staticmethod(refusal))
        refused = lambda *_: "" if ours else "it does not compile here: no NVRTC"  # noqa: E731
        for kernel in (HopperKernel, HopperPreciseKernel, HopperSurveyKernel):
            monkeypatch.setattr(kernel, "_refusal", staticmethod(refused))

    return pretend


def test_a_gpu_s_proofs_share_the_code_of_its_runs_and_a_cpu_s_do_not():
    assert share_code("hopper", "hopper-weights")
    assert not share_code("cpu", "weights")
    assert not share_code("hopper", "weights")
    assert second_pass_kernel("proofs", "cpu", "float16", 64, 64) == "weights"


def test_a_gpu_s_surveys_are_computed_there_where_rows_can_be_read(machine):
    machine((9, 0), ours=True)
    for dtype, head_dim, value_dim, name in (
        ("float16", 64, 1000, "hopper-survey"),  # values are not read
        ("bfloat16", 256, 64, "hopper-survey"),
        ("float32", 128, 128, "hopper-survey"),
        ("float32", 136, 64, "weights"),
        ("float16", 60, 64, "weights"),
        ("float16", 264, 64, "weights"),
    ):
        assert second_pass_kernel("surveys", CUDA, dtype, head_dim, value_dim) == name
    assert second_pass_kernel("surveys", "cpu", "float16", 64, 64) == "weights"
    machine((9, 0))
    assert second_pass_kernel("surveys", CUDA, "float16", 64, 64) == "weights"
    machine((8, 0), ours=True)
    assert second_pass_kernel("surveys", CUDA, "float16", 64, 64) == "weights"


def test_every_kernel_has_its_name_and_bounds():
    for passes, device_types in ((None, DEVICE_TYPES), *SHIFTED_DEVICE_TYPES.items()):
        names = kernel_names(passes)
        assert {name: device_type(name) for name in names} == device_types
        for name in names:
            kernel = get_kernel(name)
            assert kernel.name == name
            assert kernel.shifted == (passes is not None)
            assert kernel.rounds_weights == rounds_weights(name)
            for head_dim, long in ((16, 1 << 20), (64, 1 << 18), (256, 1 << 18)):
                assert max_keys(name, head_dim) == (long if name.startswith("hopper") else 1 << 16)
            assert kernel.scratch_bytes(CallSize(2, 1000, 1000, 64, 64, "float16")) > 0
    for call in (get_kernel, device_type, takes_long_calls):
        with pytest.raises(ProblemError, match="'abacus' is not known: expected one of cpu, reference"):
            call("abacus")


def test_a_result_of_every_kernel_can_be_read():
    for name in (*DEVICE_TYPES, *SHIFTED_DEVICE_TYPES["proofs"], "hopper-survey"):
        pins = Pins(chunks=7, decomposition="cqs", kernel=name, span=0)
        assert from_json(Pins, to_json(pins)) == pins
        assert f"kernel='{name}'" in str(pins)


@pytest.mark.parametrize(
    ("capability", "cudnn", "fa3", "ours", "dtype", "head_dim", "chosen"),
    [
        ((9, 0), 91900, ("float16", "bfloat16"), True, "float16", 64, "hopper"),
        ((9, 0), 91900, (), True, "bfloat16", 128, "hopper"),
        ((9, 0), 91900, (), True, "float16", 256, "hopper"),
        ((9, 0), 91900, (), True, "float16", 264, "torch"),
        ((9, 0), 91900, (), True, "float16", 60, "torch"),
        ((9, 0), 91900, (), True, "float32", 128, "hopper"),
        ((9, 0), 91900, (), True, "float32", 136, "torch"),
        ((10, 0), 92000, (), True, "float16", 64, "cudnn"),
        ((9, 0), 91900, ("float16", "bfloat16"), False, "float16", 64, "fa3"),
        ((9, 0), 91900, ("bfloat16",), False, "float16", 64, "cudnn"),
        ((9, 0), 91900, (), False, "bfloat16", 256, "cudnn"),
        ((9, 0), 91800, (), False, "bfloat16", 256, "flash"),
        ((9, 0), 91900, (), False, "float16", 60, "torch"),
        ((9, 0), 91900, ("float16",), False, "float32", 64, "torch"),
        ((9, 0), None, (), False, "float16", 64, "flash"),
        ((10, 0), 92000, ("float16",), False, "float16", 64, "cudnn"),
        ((8, 0), 91900, ("float16",), False, "float16", 160, "flash"),
        ((7, 5), 91900, ("float16",), False, "float16", 64, "torch"),
    ],
)
def test_the_default_is_the_fastest_that_can_serve(machine, capability, cudnn, fa3, ours, dtype, head_dim, chosen):
    machine(capability, cudnn, fa3, ours)
    assert default_kernel("cuda", dtype, head_dim, head_dim) == chosen
    assert require_kernel(chosen, CUDA, dtype, head_dim, head_dim).name == chosen


def test_on_the_cpu_the_cpu_kernel_is_the_default():
    for dtype in ("float16", "bfloat16", "float32"):
        assert default_kernel(torch.device("cpu"), dtype, 33, 1024) == "cpu"
    assert require_kernel("reference", "cpu", "float16", 1, 7).name == "reference"


@pytest.mark.parametrize(
    ("capability", "ours", "dtype", "head_dim", "chosen"),
    [
        ((9, 0), True, "float16", 64, "hopper-precise"),
        ((9, 0), True, "bfloat16", 128, "hopper-precise"),
        ((9, 0), True, "float16", 136, "torch"),
        ((9, 0), True, "float32", 128, "hopper"),
        ((9, 0), True, "float32", 136, "torch"),
        ((9, 0), False, "float16", 64, "torch"),
        ((8, 0), True, "bfloat16", 64, "torch"),
    ],
)
def test_the_default_of_a_precise_run_rounds_no_weights(machine, capability, ours, dtype, head_dim, chosen):
    machine(capability, fa3=("float16", "bfloat16"), ours=ours)
    assert default_kernel("cuda", dtype, head_dim, head_dim, precise=True) == chosen
    assert require_kernel(chosen, CUDA, dtype, head_dim, head_dim, precise=True).name == chosen
    assert default_kernel("cpu", dtype, head_dim, head_dim, precise=True) == "cpu"


def test_a_precise_kernel_is_the_default_of_precise_runs_alone(machine, monkeypatch):
    machine((9, 0), ours=True)
    monkeypatch.setattr(HopperKernel, "_refusal", staticmethod(lambda *_: "it does not compile here"))
    assert default_kernel("cuda", "float16", 64, 64) == "cudnn"
    assert require_kernel("hopper-precise", CUDA, "float16", 64, 64).name == "hopper-precise"


def test_a_kernel_that_rounds_weights_is_refused_for_a_precise_run_and_others_are_named(machine):
    machine((9, 0), ours=True)
    for name, dtype in (("hopper", "float16"), ("cudnn", "bfloat16"), ("flash", "float16")):
        with pytest.raises(ProblemError) as error:
            require_kernel(name, CUDA, dtype, 64, 64, precise=True)
        assert str(error.value) == (
            f"kernel {name!r} cannot attend {dtype} with D = 64 on cuda:0: it rounds softmax weights to {dtype}, which "
            "precise rules out; choose one of hopper-precise, torch or leave kernel out"
        )
    for name in ("cpu", "reference"):
        assert require_kernel(name, "cpu", "float16", 64, 64, precise=True).name == name
    assert require_kernel("hopper", CUDA, "float32", 64, 64, precise=True).name == "hopper"  # of float32 none rounds weights
    with pytest.raises(ProblemError, match="float16, bfloat16 only; choose one of hopper, hopper-precise, torch or leave"):
        require_kernel("cudnn", CUDA, "float32", 64, 64, precise=True)


def test_a_kernel_for_second_passes_serves_every_dtype_of_a_cpu_and_is_no_choice_for_others():
    for dtype in ("float16", "bfloat16", "float32"):
        assert require_kernel("weights", "cpu", dtype, 33, 1024).name == "weights"
    with pytest.raises(ProblemError, match=r"on cuda:0: it runs on CPUs; leave kernel out$"):
        require_kernel("weights", CUDA, "float16", 64, 64)
    with pytest.raises(ProblemError, match=r"float64 with D = 1 on cpu: it attends float16, bfloat16, float32 only; leave"):
        require_kernel("weights", "cpu", "float64", 1, 1)


def test_a_kernel_that_cannot_serve_says_why_and_which_can(machine):
    machine((9, 0))
    for name, dtype, head_dim, message in (
        (
            "fa3",
            "float16",
            64,
            "kernel 'fa3' cannot attend float16 with D = 64 on cuda:0: neither flash_attn_interface nor fa3_fwd_interface "
            "is installed; choose one of cudnn, flash, torch or leave kernel out",
        ),
        ("cudnn", "float32", 64, "D = 64 on cuda:0: it attends float16, bfloat16 only; choose one of torch or"),
        ("flash", "float16", 36, "D must be a multiple of 8, 256 at most; choose one of torch or"),
        ("cpu", "float16", 64, "it runs on CPUs; choose one of cudnn, flash, torch or"),
    ):
        with pytest.raises(ProblemError) as error:
            require_kernel(name, CUDA, dtype, head_dim, head_dim)
        assert message in str(error.value)
    machine((8, 0), fa3=("float16",))
    with pytest.raises(ProblemError, match=r"it needs compute capability 9.0, the GPU has 8.0"):
        require_kernel("fa3", CUDA, "float16", 64, 64)
    with pytest.raises(ProblemError, match="there are 1 GPUs"):
        require_kernel("flash", "cuda:3", "float16", 64, 64)
    machine((12, 0), fa3=("float16",))
    with pytest.raises(ProblemError, match="it runs on Hopper"):
        require_kernel("fa3", CUDA, "float16", 64, 64)


def test_where_no_kernel_serves_every_reason_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu, on_cuda = (
        ", ".join(name for name in kernel_names() if device_type(name) == device) for device in ("cpu", "cuda")
    )
    with pytest.raises(ProblemError, match=rf"on cuda: {on_cuda}: torch finds no NVIDIA GPU$"):
        default_kernel("cuda", "float16", 64, 64)
    with pytest.raises(ProblemError, match=f"float64 with D = 64 on cpu: {on_cpu}: it attends float16, bfloat16"):
        default_kernel("cpu", "float64", 64, 64)
    with pytest.raises(ProblemError, match="float64 with D = 64, Dv = 32 on cpu: "):
        default_kernel("cpu", "float64", 64, 32)
    with pytest.raises(ProblemError, match="kernel 'cpu' cannot attend float64 with D = 64, Dv = 32 on cpu: it attends"):
        require_kernel("cpu", "cpu", "float64", 64, 32)
    with pytest.raises(ProblemError, match="'moon:0' is not known"):
        default_kernel("moon:0", "float32", 64, 64)
    with pytest.raises(ProblemError, match="there are kernels for cpu and cuda"):
        default_kernel("meta", "float32", 64, 64)
