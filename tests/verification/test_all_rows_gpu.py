"""`verify --all-rows` on a GPU: the pass is computed there, proves right results, and finds a wrong row."""

from dataclasses import replace

import numpy as np
import pytest
import zarr

import oocattn
from oocattn.kernels.registry import second_pass_kernel
from oocattn.storage.bfloat16 import numpy_dtype
from oocattn.verification.beside import ProcessBeside

pytestmark = pytest.mark.gpu

TOKENS, WRONG = 6000, 4321


@pytest.fixture(autouse=True)
def _needs_hopper():
    if second_pass_kernel("proofs", "cuda", "float16", 64, 64) != "hopper-weights":
        pytest.skip("no Hopper GPU")


@pytest.mark.parametrize(
    ("dtype", "asked", "kernel"),
    [
        ("float16", {"causal": True}, "hopper-weights"),
        ("bfloat16", {"window_size": (700, 300)}, "hopper-weights"),
        ("float32", {"causal": True, "softcap": 20.0}, "hopper-weights"),
        ("float16", {"causal": True, "alibi_slopes": np.array([0.5, 0.01], np.float32)}, "hopper-weights"),
        ("float16", {"precise": True, "dtype": "float32"}, "weights"),  # for the GPU's rounds weights to float16
    ],
    ids=str,
)
def test_every_row_is_proved_and_a_wrong_one_is_found(tmp_path, dtype, asked, kernel):
    rng = np.random.default_rng(3)
    shapes = {"q": (1, 2, TOKENS, 64), "k": (1, 1, TOKENS, 64), "v": (1, 1, TOKENS, 64)}
    inputs = {name: rng.standard_normal(shape).astype(numpy_dtype(dtype)) for name, shape in shapes.items()}
    place = tmp_path / "result.zarr"
    oocattn.attention(inputs, place, device_memory="512MiB", engine="inline", chunks=7, **asked)
    options = {"rows": 2, "inputs": inputs, "all_rows": True, "engine": "inline"}
    certificate = oocattn.verify(place, **options)
    assert certificate.passed
    assert certificate.all_rows.computed_by.split(",")[0] == kernel
    assert certificate.all_rows.suspected == 0
    out = zarr.open_group(place)["out"]
    row = np.asarray(out[0, 1, WRONG])
    out[0, 1, WRONG] = (row.astype(np.float32) * (1 + 0.1 * rng.standard_normal(64))).astype(row.dtype)
    found = oocattn.verify(place, checksums=False, **options)
    assert not found.passed
    assert [(each.head, each.token) for each in found.all_rows.wrong] == [(1, WRONG)]


def test_a_process_beside_a_pass_finds_what_is_found_after_it(tmp_path, monkeypatch):
    oocattn.synthesise(tmp_path / "data.zarr", tokens=TOKENS, heads=2, head_dim=64, dtype="float16")
    oocattn.attention(tmp_path / "data.zarr", tmp_path / "result.zarr", causal=True, engine="inline")
    answers, answer = [], ProcessBeside.answer

    def note(process):
        answers.append(answer(process))
        return answers[-1]

    monkeypatch.setattr(ProcessBeside, "answer", note)
    found = []
    for worth in (True, False):
        monkeypatch.setattr("oocattn.afterwards.is_worth_a_process", lambda started, worth=worth: worth)
        certificate = oocattn.verify(tmp_path / "result.zarr", all_rows=True, engine="inline")
        found.append(replace(certificate, made="", files=()).to_json())
    assert [each is None for each in answers] == [False, True]
    assert found[0] == found[1]
