"""What is no tensor, or none that is read, is refused before anything is written: what was given, what is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import torch
import zarr
from torch._subclasses.fake_tensor import FakeTensorMode
from zarr.storage import MemoryStore

import oocattn
from oocattn import ProblemError

SHAPE = (1, 2, 16, 8)
GOOD = np.ones(SHAPE, np.float32)
TENSOR = torch.ones(SHAPE)
NO_TENSOR = r"expected the path or URL of a Zarr array, a zarr\.Array, FILE\.npy, .* or an array of NumPy, PyTorch"
ANOTHER_DTYPE = "expected one of float16, bfloat16, float32"


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(TENSOR, 0.1, 0, torch.qint8)


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(SHAPE)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (GOOD.tolist, rf"q: found a list, {NO_TENSOR}.*numpy\.asarray"),
    "number": (lambda: 3, f"q: found the int 3, {NO_TENSOR}"),
    "bytes": (lambda: b"q.npy", r"q: found the bytes .*os\.fsdecode"),
    "text of a tensor": (lambda: str(TENSOR.flatten()) * 9, r"is no path: it has a name of [\d,]+ bytes"),
    "no file": (lambda: "none.npy", "q: there is no file .*none.npy"),
    "no array": (lambda: "none.zarr/q", r"q: no Zarr array at .*none\.zarr/q \(found nothing\): expected .*FILE\.npy"),
    "group": (lambda: zarr.create_group(MemoryStore()), r"q: no Zarr array at MemoryStore \(found a group\)"),
    "scheme": (lambda: "ftp://host/q", "has the scheme 'ftp'"),
    "gradient": (lambda: TENSOR.clone().requires_grad_(), r"that requires a gradient.*give q\.detach\(\)"),
    "sparse": (TENSOR.to_sparse, r"sparse_coo: expected a dense tensor; give q\.to_dense\(\)"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), "nested: expected a dense"),
    "quantised": (quantised, r"quantised: .*q\.dequantize\(\)"),
    "meta": (lambda: TENSOR.to("meta"), "on meta: expected it on cpu or cuda; it has no numbers"),
    "fake": (fake, r"torch\.FakeTensor .* cannot be read"),
    "complex": (lambda: TENSOR.to(torch.complex64), f"q .*has dtype complex64: {ANOTHER_DTYPE}"),
    "integers": (lambda: GOOD.astype("int8"), f"has dtype int8: {ANOTHER_DTYPE}"),
    "bits of bfloat16": (lambda: TENSOR.to(torch.bfloat16).view(torch.uint16), "uint16.*bits of bfloat16"),
    "float64": (lambda: GOOD.astype("float64"), f"has dtype float64: {ANOTHER_DTYPE}"),
    "structured": (lambda: np.zeros(SHAPE, [("a", "f4")]), "has dtype void32.*give one field of it"),
    "objects": (lambda: np.full(SHAPE, None), f"has dtype object: {ANOTHER_DTYPE}"),
    "masked": (lambda: np.ma.masked_array(GOOD, GOOD > 0), r"found a numpy\.MaskedArray .*\.filled"),
    "array that might be masked": (lambda: np.ma.masked_array(GOOD), r"found a numpy\.MaskedArray \[.*\]: expected plain"),
    "masked chunks": (lambda: masked_chunks(), r"q: found a dask\.Array .* of masked chunks: .*dask\.array\.ma\.filled"),
    "masked tensor": (lambda: torch.masked.masked_tensor(TENSOR, TENSOR > 0), r"masked: .*q\.to_tensor\(0\)"),
    "two dimensions": (lambda: GOOD[0, 0], r"has shape \[16, 8\]: layout bhnd has 4 dimensions.*with layout, one of"),
    "five dimensions": (lambda: GOOD[None], r"has shape \[1, 1, 2, 16, 8\]: layout bhnd has 4 dimensions"),
    "no token": (lambda: GOOD[:, :, :0], r"array 'q' is empty"),
    "no head dimension": (lambda: TENSOR[..., :0], r"array 'q' is empty"),
    "another head dimension": (lambda: GOOD[..., :7], r"'k' has shape .*: expected \[1, 2, 16, 7\]"),
    "delayed": (lambda: dask.delayed(GOOD), r"found a dask\.Delayed\w*, .*dask\.array\.from_delayed"),
    "unknown sizes": (
        lambda: dask.array.from_array(GOOD)[:, :, dask.array.ones(16) > 0],
        r"unknown sizes: .*compute_chunk_sizes",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_tensor_is_refused_with_what_is_accepted(case: str, tmp_path: Path, monkeypatch: Any) -> None:
    make, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProblemError, match=message):
        oocattn.attention({"q": make(), "k": GOOD, "v": GOOD}, "result.zarr", engine="inline", kernel="cpu")
    assert not list(tmp_path.iterdir())


THREE = {"q": GOOD, "k": GOOD, "v": GOOD}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([GOOD] * 3, r"inputs: found a list, expected .*a zarr\.Group, a mapping"),
        (GOOD, r"inputs: found a numpy\.ndarray \[1, 2, 16, 8\], expected"),
        (TENSOR, r"inputs: found a torch\.Tensor"),
        (None, "inputs: found None"),
        (str(TENSOR.flatten()) * 9, "is no path"),
        ({}, "the inputs have no q and no k and no v"),
        ({"q": GOOD, "v": GOOD}, "the inputs have no k: expected q, k and v"),
        ({**THREE, "w": GOOD}, "the inputs have the key 'w': expected q, k, v, key_bias"),
        ({**THREE, "layout": "bdhn"}, r"layout = 'bdhn' .*: expected one of bhnd, bnhd, hnd, nhd"),
        ({**THREE, "layout": "bn3hd"}, r"layout = 'bn3hd' .*: expected one of bhnd"),
        ({**THREE, "layout": 5}, "layout = 5"),
        ({**THREE, "layout": {"k": "bdhn"}}, r"layout of k = 'bdhn' .*: expected one of bhnd"),
        ({**THREE, "layout": {"w": "bhnd"}}, "layout has the key 'w': expected q, k, v"),
        ({**THREE, "layout": {"k": "hnd"}}, r"k \(.*layout hnd has 3 dimensions.*or one for each tensor"),
        ({**THREE, "layout": "hnd"}, "layout hnd has 3 dimensions"),
        ({**THREE, "heads": 2}, "expected with qkv alone"),
        ({**THREE, "qkv": GOOD}, "the inputs have qkv, and q"),
        ({"qkv": GOOD}, "layout bn3hd has 5 dimensions"),
        ({"qkv": GOOD[None]}, "expected 3, q, k and v, along axis 3"),
        ({"qkv": GOOD[0], "layout": "bnf"}, "say how many of each there are with heads and kv_heads"),
        ({"qkv": GOOD[0], "layout": "bnf", "heads": "2", "kv_heads": 1}, r"heads = '2' \(str\): expected a whole number"),
        ({"qkv": GOOD[0], "layout": "bnf", "heads": True, "kv_heads": 1}, r"heads = True \(bool\)"),
        ({**THREE, "key_bias": GOOD}, r"key_bias .*expected \[B, H, N\], \[H, N\] or \[N\]"),
    ],
)
def test_what_are_no_inputs_is_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        oocattn.plan(inputs, engine="inline", kernel="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not the index of a checkpoint"),
        (json.dumps({"weight_map": {"q": 3}}), "is not the index of a checkpoint"),
        (json.dumps({"weight_map": {"q": "../secret.safetensors"}}), "beside it"),
        (json.dumps({"weight_map": {"q": "/secret.safetensors"}}), "beside it"),
        (json.dumps({"weight_map": {"q": "secret.pt"}}), "beside it"),
        (json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}), "has no tensor 'q'.*it holds a, b"),
        (json.dumps({"weight_map": {"q": "none.safetensors"}}), "there is no file"),
    ],
)
def test_an_index_that_names_other_files_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ProblemError, match=message):
        oocattn.plan({"q": tmp_path / "model.safetensors.index.json", "k": GOOD, "v": GOOD})


@torch.no_grad()
def test_parameters_are_read_where_no_gradient_is_asked() -> None:
    oocattn.plan({"q": torch.nn.Parameter(TENSOR), "k": GOOD, "v": GOOD}, engine="inline", kernel="cpu")


def test_a_layout_that_dimension_names_contradict_is_refused() -> None:
    q = zarr.create_array(MemoryStore(), data=GOOD, dimension_names=("batch", "head", "token", "dim"))
    for given in ({"q": q, "k": q, "v": q, "layout": "bnhd"}, {"q": q, "k": GOOD, "v": GOOD, "layout": {"q": "bnhd"}}):
        with pytest.raises(ProblemError, match=r"layout = 'bnhd', but the dimension names of q .* say bhnd"):
            oocattn.plan(given)


def data_array(*given: Any, **options: Any) -> Any:
    return pytest.importorskip("xarray").DataArray(*given, **options)


FIVE = np.zeros((1, 3, 3, 3, 16), np.float32)
FEATURES = np.zeros((1, 96, 96), np.float32)
BNF = {"layout": "bnf", "heads": 2, "kv_heads": 2}


@pytest.mark.parametrize("kind", ["xarray", "zarr"])
@pytest.mark.parametrize(
    ("content", "names", "options", "order"),
    [
        (FIVE, "batch head three token dim", {}, "B, H, 3, N, D"),
        (FIVE, "batch head component token dim", {"layout": "bn3hd"}, "B, H, 3, N, D"),
        (FIVE, "B QKV H N D", {}, "B, 3, H, N, D"),
        (FIVE[0], "head projection token dim", {"layout": "n3hd"}, "H, 3, N, D"),
        (FEATURES, "batch feature token", BNF, "B, F, N"),
        (FEATURES, "batch qkv_dim seq", BNF, "B, F, N"),
        (FEATURES[0], "hidden_size seq_len", {**BNF, "layout": "nf"}, "F, N"),
    ],
)
def test_packed_tensors_whose_names_say_another_order_are_refused(
    kind: str, content: Any, names: str, options: Any, order: str
) -> None:
    qkv: Any = data_array(content, dims=names.split())
    if kind == "zarr":
        qkv = zarr.create_array(MemoryStore(), data=content, dimension_names=names.split())
    with pytest.raises(ProblemError, match=rf"the dimension names of qkv .* say that it is \[{order}\]"):
        oocattn.plan({"qkv": qkv, **options}, engine="inline", kernel="cpu")


@pytest.mark.parametrize(
    ("content", "names", "options"),
    [
        (FIVE, "batch token three head dim", {}),
        (FIVE, "B N 3 H D", {"layout": "bn3hd"}),
        (FIVE, "dim_0 dim_1 dim_2 dim_3 dim_4", {}),
        (FIVE[0], "token qkv head dim", {}),
        (FEATURES, "batch token feature", {"heads": np.int64(2), "kv_heads": torch.tensor(2)}),
    ],
)
def test_names_of_packed_tensors_give_the_layout(content: Any, names: str, options: Any) -> None:
    inputs = {"qkv": data_array(content, dims=names.split()), **options}
    assert oocattn.plan(inputs, engine="inline", kernel="cpu").problem.head_dim == 16


def masked_chunks() -> Any:
    return dask.array.ma.masked_greater(dask.array.from_array(GOOD), 0)


CF = {"q": {"scale_factor": np.float32(2)}, "k": {"missing_value": np.array([1e20])}, "v": {"_FillValue": -999.0}}


@pytest.mark.parametrize("name", ["q", "k", "v", "qkv", "key_bias"])
@pytest.mark.parametrize("lazy", [False, True])
def test_arrays_of_xarray_that_are_packed_are_refused(name: str, lazy: bool) -> None:
    content: Any = {"qkv": FIVE, "key_bias": GOOD[..., 0]}.get(name, GOOD)
    packed = data_array(dask.array.from_array(content) if lazy else content, attrs=CF.get(name, CF["q"]))
    inputs = {name: packed} if name == "qkv" else {**THREE, name: packed}
    with pytest.raises(ProblemError, match=rf"^{name}: .*the attribute \w+ = \S+ by which its numbers are packed"):
        oocattn.plan(inputs, engine="inline", kernel="cpu")


def test_attributes_of_xarray_that_change_no_number_are_read() -> None:
    q = data_array(GOOD, attrs={"scale_factor": 1.0, "_FillValue": np.float32("nan"), "units": "m", 1: 2})
    oocattn.plan({**THREE, "q": q}, engine="inline", kernel="cpu")


def test_chunks_that_are_masked_against_what_their_array_says_are_refused(tmp_path: Path) -> None:
    plain = dask.array.from_array(GOOD)
    q = dask.array.map_blocks(np.ma.masked_greater, plain, 0, dtype="f4", meta=np.empty((0,) * 4, "f4"))
    with pytest.raises(oocattn.IntegrityError, match=r"gave a numpy\.MaskedArray"):
        oocattn.attention({**THREE, "q": q}, tmp_path / "result.zarr", engine="inline", kernel="cpu")
    assert not list(tmp_path.iterdir())
