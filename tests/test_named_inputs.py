"""Inputs that are in no local file must be named again, and be the same, to resume a run and to verify its result."""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import torch
import zarr
from interrupting import EnoughError, interrupt
from support import normal_arrays
from zarr.storage import FsspecStore, LoggingStore, MemoryStore, ZipStore

import oocattn
from oocattn import IntegrityError, ProblemError, Result
from oocattn.cli.main import main
from oocattn.pipelines.run import DatasetIdentity
from oocattn.records import from_json, to_json
from oocattn.storage.inputs.axes import BHND, Axes
from oocattn.storage.inputs.fingerprints import changed_arrays
from oocattn.storage.inputs.opening import open_inputs, open_recorded
from oocattn.storage.inputs.origin import Numbers, Origin, command_options
from oocattn.storage.results.summary import DatasetRecord

PINNED: dict[str, Any] = {"chunks": 3, "decomposition": "cqs", "kernel": "cpu", "host_memory": "64MiB", "engine": "inline"}

TENSORS = dict(zip("qkv", normal_arrays(48, heads=1, batch=2), strict=True))

Inputs = dict[str, Any]


def changed(tensors: Inputs) -> Inputs:
    """The same tensors but for one number in the middle of k."""
    k = tensors["k"].copy()
    k[1, 0, 23, 5] += 1
    return {**tensors, "k": k}


def interrupted(inputs: Any, result: Path) -> None:
    with pytest.raises(EnoughError):
        oocattn.attention(inputs, result, **PINNED, checkpoint_interval=0, callbacks=[interrupt("written", 2)])


def in_store(make: Callable[[], Any]) -> Callable[[Inputs], Inputs]:
    """Arrays in chunks of 16 tokens and one number of the head dimension."""

    def put(tensors: Inputs) -> Inputs:
        store = make()
        for name, each in tensors.items():
            zarr.create_array(store, name=name, data=each, chunks=(1, 1, 16, 8), overwrite=True)
        return {name: zarr.open_array(store, path=name, mode="r") for name in tensors}

    return put


KINDS: dict[str, Callable[[Inputs], Inputs]] = {
    "numpy": dict,
    "torch": lambda tensors: {name: torch.from_numpy(each.copy()) for name, each in tensors.items()},
    "dask": lambda tensors: {name: dask.array.from_array(each, chunks=(1, 1, 16, 8)) for name, each in tensors.items()},
    "store": in_store(MemoryStore),
    "remote": in_store(lambda: FsspecStore.from_url("memory://named-inputs")),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return oocattn.attention(TENSORS, tmp_path_factory.mktemp("expected") / "result.zarr", **PINNED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_over_what_no_file_holds_resumes_with_the_same_numbers_alone(
    kind: str, fast_path: Path, expected: Result
) -> None:
    result = fast_path / "result.zarr"
    inputs = KINDS[kind](TENSORS)
    interrupted(inputs, result)
    with pytest.raises(IntegrityError, match=r"inputs"):
        oocattn.resume(result, engine="inline")
    with pytest.raises(IntegrityError, match=r"\bk of the dataset changed|q, k and v of"):
        oocattn.resume(result, inputs=KINDS[kind](changed(TENSORS)), engine="inline")
    if kind == "remote":
        inputs = KINDS[kind](TENSORS)
        with pytest.raises(IntegrityError, match=r"q, k and v of the dataset changed"):  # were written again
            oocattn.resume(result, inputs=inputs, engine="inline")
        return
    found = oocattn.resume(result, inputs=KINDS[kind](TENSORS) if kind != "store" else inputs, engine="inline")
    np.testing.assert_array_equal(found.out[...], expected.out[...])
    with pytest.raises(IntegrityError, match=r"inputs"):
        oocattn.verify(result, rows=4)
    assert oocattn.verify(result, inputs=inputs, rows=4).outcome == "passed"
    assert main(["verify", str(result), "--rows", "4"]) == 1


def test_tensors_in_memory_are_the_same_whoever_holds_them(fast_path: Path, expected: Result) -> None:
    kinds = itertools.cycle(["numpy", "torch", "dask"])
    result = fast_path / "result.zarr"
    interrupted(KINDS[next(kinds)](TENSORS), result)
    bnhd = {name: each.transpose(0, 2, 1, 3) for name, each in TENSORS.items()}
    found = oocattn.resume(result, inputs=oocattn.Inputs(**KINDS["torch"](bnhd), layout="bnhd"), engine="inline")
    np.testing.assert_array_equal(found.out[...], expected.out[...])
    again = oocattn.attention(KINDS["dask"](TENSORS), result, **PINNED)
    assert again.path == found.path


@pytest.mark.parametrize("layout", [{"q": "bnhd", "v": "bnhd"}, {"q": "bnhd", "k": "bhnd", "v": "bnhd"}])
def test_each_tensor_may_have_a_layout_of_its_own(layout: Any, fast_path: Path, expected: Result) -> None:
    given = {name: each.transpose(0, 2, 1, 3) if name in "qv" else each for name, each in TENSORS.items()}
    found = oocattn.attention({**given, "layout": layout}, fast_path / "result.zarr", **PINNED)
    np.testing.assert_array_equal(found.out[...], expected.out[...])


def test_the_command_takes_and_shows_a_layout_for_each_tensor(fast_path: Path, expected: Result) -> None:
    options = ["--layout", "q=bnhd,k=bhnd,v=bnhd"]
    for name in "qkv":
        np.save(fast_path / f"{name}.npy", TENSORS[name].transpose(0, 2, 1, 3) if name in "qv" else TENSORS[name])
        options += [f"--{name}", str(fast_path / f"{name}.npy")]
    result = fast_path / "result.zarr"
    pinned = ["--chunks", "3", "--decomposition", "cqs", "--kernel", "cpu", "--host-memory", "64MiB", "--engine", "inline"]
    assert main(["run", str(result), *options, *pinned]) == 0
    np.testing.assert_array_equal(oocattn.open(result).out[...], expected.out[...])
    shown = command_options(oocattn.verify(result, rows=4).tensors)
    assert shown == [*options[2:], *options[:2]]
    assert main(["import", str(fast_path / "dataset.zarr"), *options]) == 0
    for name in "qkv":
        np.testing.assert_array_equal(zarr.open_array(fast_path / "dataset.zarr", path=name)[...], TENSORS[name])
    for wrong in ("q=bnhd,k=abcd", "q=bnhd,q=bhnd", "q=bnhd,bhnd"):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", *options[2:], "--layout", wrong])


@pytest.mark.parametrize("order", ["bhnd", "bnhd", "nbhd"])
def test_dimension_names_decide_for_their_own_tensor_alone(order: str, fast_path: Path, expected: Result) -> None:
    names = dict(zip("bhnd", ("batch", "head", "token", "dim"), strict=True))
    axes = ["bhnd".index(axis) for axis in order]
    q = pytest.importorskip("xarray").DataArray(TENSORS["q"].transpose(axes), dims=[names[axis] for axis in order])
    for layout, other in ((None, "bhnd"), ("bhnd", "bhnd"), ("bnhd", "bnhd")):
        others = {name: TENSORS[name].transpose(["bhnd".index(axis) for axis in other]) for name in "kv"}
        inputs = oocattn.Inputs(q=q, **others, layout=layout)
        found = oocattn.attention(inputs, fast_path / f"{layout}.zarr", **PINNED)
        np.testing.assert_array_equal(found.out[...], expected.out[...])


def test_arrays_of_xarray_are_read_as_what_they_hold(fast_path: Path, expected: Result) -> None:
    xarray = pytest.importorskip("xarray")
    dims = ("batch", "head", "token", "dim")
    held = xarray.Dataset({name: (dims, each) for name, each in TENSORS.items()})
    with warnings.catch_warnings(action="ignore"):  # xarray leaves a filter behind
        held.to_zarr(fast_path / "d.zarr")
        lazy = [xarray.open_zarr(fast_path / "d.zarr", chunks=chunks) for chunks in (None, "auto", {})]
    for number, each in enumerate(lazy):
        found = oocattn.attention({name: each[name] for name in "qkv"}, fast_path / str(number), **PINNED)
        np.testing.assert_array_equal(found.out[...], expected.out[...])
    plan = oocattn.plan({name: held[name] for name in "qkv"}, **PINNED)
    assert not plan.inputs.notes, "nothing bounds the reading of memory"


def in_zip(folder: Path, tensor: Any) -> Any:
    with ZipStore(folder / "k.zip", mode="w") as store:
        zarr.create_array(store, data=tensor, chunks=tensor.shape, compressors=None)
    return zarr.open_array(ZipStore(folder / "k.zip", mode="r"), mode="r")


STORES: dict[str, Callable[[Path, Any], Any]] = {
    "memory": lambda folder, tensor: zarr.create_array(MemoryStore(), data=tensor, chunks=tensor.shape, compressors=None),
    "wrapped": lambda folder, tensor: zarr.create_array(
        LoggingStore(MemoryStore()), data=tensor, chunks=tensor.shape, compressors=None
    ),
    "remote": lambda folder, tensor: zarr.create_array(
        FsspecStore.from_url(f"memory://{folder.name}"), data=tensor, chunks=tensor.shape, compressors=None, overwrite=True
    ),
    "folder": lambda folder, tensor: zarr.create_array(
        folder / "k", data=tensor, chunks=tensor.shape, compressors=None, overwrite=True
    ),
    "zip": in_zip,
}


@pytest.mark.parametrize("store", STORES)
def test_one_number_in_the_middle_of_a_large_chunk_changes_the_fingerprint(store: str, fast_path: Path) -> None:
    tensor = np.ones((1, 1, 40_000, 8), np.float32)
    before = open_inputs({"q": tensor, "k": STORES[store](fast_path, tensor), "v": tensor}).fingerprint()
    tensor[0, 0, 20_001, 3] = 2
    after = open_inputs(
        {"q": np.ones_like(tensor), "k": STORES[store](fast_path, tensor), "v": np.ones_like(tensor)}
    ).fingerprint()
    assert changed_arrays(before, after) == "k"


def test_few_large_chunks_of_a_store_are_in_memory_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as have the bytes that may be read: here two."""
    tensor, most, now = np.ones((1, 1, 64, 8), np.float32), [0], [0]

    class Counting(MemoryStore):
        async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
            now[0] += byte_range is None
            most[0] = max(most[0], now[0])
            await asyncio.sleep(0)
            now[0] -= byte_range is None
            return await super().get(key, prototype, byte_range)

    monkeypatch.setattr("oocattn.storage.inputs.given_store.READ_BYTES", 2 * 4 * 8 * 4)
    array = zarr.create_array(Counting(), data=tensor, chunks=(1, 1, 4, 8))
    open_inputs({"q": array, "k": tensor, "v": tensor}).fingerprint()
    assert most == [2]


def test_maps_of_files_resume_by_themselves(fast_path: Path, expected: Result) -> None:
    mapped = {}
    for name, each in TENSORS.items():
        (fast_path / f"{name}.bin").write_bytes(bytes(100) + each.tobytes())
        mapped[name] = np.memmap(fast_path / f"{name}.bin", "float32", "r", 100, each.shape)
    result = fast_path / "result.zarr"
    interrupted(mapped, result)
    del mapped
    found = oocattn.resume(result, engine="inline")
    np.testing.assert_array_equal(found.out[...], expected.out[...])
    assert oocattn.verify(result, rows=4).outcome == "passed"
    with (fast_path / "k.bin").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(IntegrityError, match=r"k\.bin has 200 bytes, expected at least 3,172: it was cut short"):
        oocattn.verify(result, rows=4)
    (fast_path / "k.bin").unlink()
    with pytest.raises(ProblemError, match=r"no file .*k\.bin; if it was moved, say where with inputs"):
        oocattn.verify(result, rows=4)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (Numbers("<f4", 1, (1, 1, 4, 2), (32, 32, 8, 4)), "has 32 bytes, expected at least 33: it was cut short"),
        (Numbers("<f4", 0, (1, 1, 4, 2), (32, 32, 16, 4)), "has 32 bytes, expected at least 56: it was cut short"),
        (Numbers("<f4", 0, (1, 1, 4, 2), (32, 8, 4)), "expected as many"),
        (Numbers("<f4", 0, (1, 4, 2), (32, 8, 4)), "expected as many"),
    ],
    ids=["offset", "strides", "rank", "axes"],
)
def test_a_record_of_more_than_a_file_has_is_refused(fast_path: Path, numbers: Numbers, words: str) -> None:
    (fast_path / "k.bin").write_bytes(bytes(32))
    origins = {"k": Origin("raw", str(fast_path / "k.bin"), numbers=numbers)}
    with pytest.raises(IntegrityError, match=words):
        open_recorded("", origins, None)


def test_a_file_of_another_rank_than_the_run_read_is_refused(fast_path: Path) -> None:
    np.save(fast_path / "k.npy", np.zeros((4, 2), "float32"))
    origins = {"k": Origin("npy", str(fast_path / "k.npy"))}
    with pytest.raises(IntegrityError, match=r"^k .*k\.npy\) has shape \[4, 2\] now: expected the axes bhnd"):
        open_recorded("", origins, None)


@pytest.mark.parametrize("names", ["kv", "qkvx", "x"])
@pytest.mark.parametrize("record", [DatasetRecord, DatasetIdentity])
def test_a_record_of_other_tensors_than_q_k_and_v_is_not_believed(record: type[Any], names: str) -> None:
    origin = {"kind": "npy", "location": "/k.npy", "tensor": "", "axes": to_json(BHND)}
    content = {"location": "/", "fingerprint": "", "within_run": "", "tensors": dict.fromkeys(names, origin)}
    content = {name: each for name, each in content.items() if name in record.__dataclass_fields__}
    with pytest.raises(ValueError, match="expected q, k and v, and perhaps key_bias"):
        from_json(record, content)
    assert from_json(record, {**content, "tensors": dict.fromkeys("qkv", origin)}).tensors.keys() == {*"qkv"}


@pytest.mark.parametrize("order", ["bhhd", "bhd", "dddd"])
def test_axes_that_are_recorded_twice_or_without_tokens_are_not_believed(order: str) -> None:
    with pytest.raises(ValueError, match=f"the order of axes is {order}: expected n, and each letter once"):
        from_json(Axes, {**to_json(BHND), "order": order})


def test_a_dataset_of_another_length_is_not_the_results(fast_path: Path, expected: Result) -> None:
    shorter = {name: each[:, :, :-1] for name, each in TENSORS.items()}
    with pytest.raises(ProblemError, match=r"poses another problem than the result's \(queries \d+, now \d+"):
        oocattn.verify(expected.path, inputs=shorter)


def test_numbers_that_change_while_they_are_read_are_noticed(fast_path: Path) -> None:
    tensors = {name: each.copy() for name, each in TENSORS.items()}

    def change(event: oocattn.Event) -> None:
        tensors["v"][0, 0, 5, 5] = 9

    with pytest.raises(IntegrityError, match="v of the dataset changed while the run read it"):
        oocattn.attention(tensors, fast_path / "result.zarr", **PINNED, callbacks=[change])


def test_the_layout_is_part_of_what_must_be_the_same(fast_path: Path) -> None:
    for name, each in TENSORS.items():
        np.save(fast_path / f"{name}.npy", np.concatenate([each] * 48, 1))  # as many heads as tokens
    files = {name: fast_path / f"{name}.npy" for name in TENSORS}
    result = fast_path / "result.zarr"
    interrupted(files, result)
    with pytest.raises(IntegrityError, match="q, k and v of the dataset changed"):
        oocattn.resume(result, inputs={**files, "layout": "bnhd"}, engine="inline")


@pytest.mark.parametrize("given", [{"q": 1}, {"q": 1, "k": 1, "v": 1, "w": 1}, {}])
def test_a_mapping_without_the_three_tensors_is_refused(given: Inputs) -> None:
    with pytest.raises(ProblemError, match=r"^(the inputs have (no|the key)|q: found the int 1)"):
        oocattn.plan(given)
