"""The doctor: a whole machine passes, and what is broken is found without hiding the rest."""

from dataclasses import replace

import pytest
import torch

from oocattn.cli import doctor
from oocattn.kernels.cpu import CpuKernel
from oocattn.kernels.merging import finalise
from oocattn.kernels.registry import kernel_names
from oocattn.planning.kernel_rates import MOMENT, kernel_rate
from oocattn.problem.scores import Scores


class Biased(CpuKernel):
    """A kernel that is right but for a scale that is off by 1%."""

    def attend(self, operands, state):
        super().attend(replace(operands, scores=Scores(1.01 * operands.scores.scale)), state)


@pytest.fixture(autouse=True)
def only_the_fast_kernel(monkeypatch):
    monkeypatch.setattr(doctor, "kernel_names", lambda: ("cpu",))
    monkeypatch.setitem(MOMENT, "cpu", 0.0)  # one call


def failed(checks):
    return {check.name for check in checks if not check.passed}


def test_this_machine_passes_and_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checks = list(doctor.examine())
    assert not failed(checks), "\n".join(map(str, checks))
    assert {"kernel cpu, float16", "kernel cpu, bfloat16", "kernel cpu, float32"} < {check.name for check in checks}
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_is_wrong_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "get_kernel", lambda name: Biased())
    assert failed(doctor.examine()) >= {"kernel cpu, float32", "kernel cpu, float16"}


def test_a_check_that_raises_fails_and_the_others_still_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.os, "fsync", full)
    checks = list(doctor.examine())
    assert failed(checks) == {"disk in this folder"}
    assert any("No space left" in str(check) for check in checks)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", doctor.KERNEL_CASES)
def test_the_reference_kernel_is_within_rounding_of_its_output(dtype, case):
    limit = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-22}[dtype]
    of_out, of_lse = doctor.kernel_error("reference", dtype, case)
    assert of_out < limit
    assert of_lse < 2e-6


def test_a_log_sum_exp_that_is_wrong_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "finalise", lambda state, out, lse: (finalise(state, out, lse), lse.add_(1e-4)))
    assert failed(doctor.examine()) == {"kernel cpu, float16", "kernel cpu, bfloat16", "kernel cpu, float32"}


def test_a_kernel_that_is_not_here_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "kernel_names", lambda: ("fa3", "torch"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    checks = [check for check in doctor.examine() if check.name.startswith("kernel")]
    assert [str(check) for check in checks] == [
        "ok      kernel fa3                    not here: torch finds no NVIDIA GPU",
        "ok      kernel torch                  not here: torch finds no NVIDIA GPU",
    ]


@pytest.mark.gpu
def test_a_gpu_and_its_kernels_pass(monkeypatch):
    monkeypatch.setattr(doctor, "kernel_names", kernel_names)
    monkeypatch.setattr(doctor, "kernel_rate", kernel_rate)
    checks = [check for check in doctor.examine() if check.name.startswith(("GPU", "kernel"))]
    print(*checks, sep="\n")
    assert not failed(checks), "\n".join(map(str, checks))
    assert checks[0].name == "GPU 0"
    assert "compute capability" in checks[0].found
    assert {"kernel torch, float32", "kernel flash, float16", "kernel cudnn, bfloat16"} < {check.name for check in checks}
