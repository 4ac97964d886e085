"""The doctor: a whole machine passes, and what is broken is found without hiding the rest."""

import pytest

from oocattn import doctor
from oocattn.kernels.cpu import CpuKernel


class Biased(CpuKernel):
    """A kernel that is right but for a scale that is off by 1%."""

    def attend(self, query, key, value, state, *, scale, diagonal):
        super().attend(query, key, value, state, scale=1.01 * scale, diagonal=diagonal)


@pytest.fixture(autouse=True)
def only_the_fast_kernel(monkeypatch):
    monkeypatch.setattr(doctor, "kernel_names", lambda: ("cpu",))
    monkeypatch.setattr(doctor, "kernel_rate", lambda *arguments: 1e9)


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
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_reference_kernel_is_within_rounding_of_its_output(dtype, diagonal):
    limit = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-22}[dtype]
    assert doctor.kernel_error("reference", dtype, diagonal) < limit
