"""`verify` refuses inputs whose numbers are known not to be the run's, whatever kind of source they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from sources import KINDS, Place, exists, forget, stored_tensors
from support import normal_arrays
from zarr.storage import MemoryStore

import oocattn
from oocattn.cli.main import main
from oocattn.errors import IntegrityError
from oocattn.storage.inputs.opening import open_inputs
from oocattn.storage.inputs.values import sample
from oocattn.storage.paths import ResultPaths
from oocattn.storage.results.inputs_of_run import fingerprint_like
from oocattn.storage.results.summary import ResultAttributes

TENSORS = normal_arrays(32, heads=2, kv_heads=2, dtype="float32", seed=3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The results of the same tensors in a folder, in memory, and in a store in memory."""
    folder = tmp_path_factory.mktemp("results")
    dataset, (q, k, v) = folder / "qkv.zarr", TENSORS
    oocattn.import_arrays(dataset, q=q, k=k, v=v)
    options: dict[str, Any] = {"engine": "inline", "chunks": 2, "kernel": "cpu", "host_memory": "64MiB"}
    oocattn.attention(dataset, folder / "folder.zarr", **options)
    oocattn.attention({"q": q, "k": k, "v": v}, folder / "memory.zarr", **options)
    store = MemoryStore()
    for name, each in zip("qkv", TENSORS, strict=True):
        zarr.create_array(store, name=name, data=each, chunks=(1, 2, 16, 8))
    oocattn.attention(store, folder / "store.zarr", **options)
    return {name: folder / f"{name}.zarr" for name in ("folder", "memory", "store")}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path, "bnhd")
    forget(tmp_path)


def inputs(kind: str, place: Place, v: Any) -> oocattn.Inputs:
    stored = stored_tensors("bnhd", *TENSORS[:2], v)
    return oocattn.Inputs(**{name: KINDS[kind](place, name, each) for name, each in stored.items()}, layout="bnhd")


def verify(result: Path, given: Any = None) -> oocattn.Certificate:
    return oocattn.verify(result, inputs=given, rows=1, checksums=False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if exists(kind, "bnhd", "float32")])
@pytest.mark.parametrize("other", [False, True], ids=["the same numbers", "one other number"])
def test_one_number_decides_wherever_tensors_lie(kind: str, other: bool, results: dict[str, Path], place: Place) -> None:
    v = TENSORS[2].copy()
    v[0, 1, 17, 3] += np.float32(1e-6 if other else 0)  # far below the tolerance of a row
    dataset = open_inputs(inputs(kind, place, v))
    for where, result in results.items():
        recorded = ResultAttributes.read(ResultPaths.at(result)).dataset
        if other:
            with pytest.raises(IntegrityError, match=r"is not what the run to r read: numbers of v differ; name"):
                fingerprint_like(dataset, recorded, "r")
        else:
            known = fingerprint_like(dataset, recorded, "r") == recorded.fingerprint
            assert known == (where != "folder"), "a checksum of all numbers tells, wherever they are"


def test_tensors_from_memory_are_known_in_files_also_without_an_axis_of_one_batch_entry(
    results: dict[str, Path], tmp_path: Path
) -> None:
    for name, each in zip("qkv", TENSORS, strict=True):
        np.save(tmp_path / f"{name}.npy", each[0])
    files = {name: tmp_path / f"{name}.npy" for name in "qkv"}
    certificate = verify(results["memory"], oocattn.Inputs(**files, layout="hnd"))
    assert (certificate.verdict, certificate.dataset_unchanged) == (
        "passed, the rows alone: not all checksums were compared",
        True,
    )


def test_every_row_of_a_small_tensor_is_compared_however_many_heads_it_has(tmp_path: Path) -> None:
    q, k, v = normal_arrays(1, heads=256, kv_heads=256, dtype="float32", seed=4)
    names = {name: tmp_path / f"{name}.npy" for name in "qkv"}
    for name, each in zip("qkv", (q, k, v), strict=True):
        np.save(names[name], each)
    recorded = sample(open_inputs(names).arrays["q"])
    for head in range(256):
        other = q.copy()
        other[0, head, 0, 3] += np.float32(1e-6)
        assert sample(open_inputs({"q": other, "k": k, "v": v}).arrays["q"]) != recorded, f"head {head}"
    assert sample(open_inputs({"q": q, "k": k, "v": v}).arrays["q"]) == recorded


def touch(dataset: Path) -> None:
    for path in dataset.rglob("*"):
        os.utime(path)


def compress(dataset: Path) -> None:
    for name, each in zip("qkv", TENSORS, strict=True):
        zarr.create_array(dataset, name=name, data=each, chunks=(1, 1, 7, 64), overwrite=True)


@pytest.mark.parametrize("change", [touch, compress])
def test_the_same_numbers_pass_when_files_are_others(
    change: Callable[[Path], None], results: dict[str, Path], tmp_path: Path
) -> None:
    dataset = shutil.copytree(results["folder"].with_name("qkv.zarr"), tmp_path / "qkv.zarr")
    change(dataset)
    certificate = verify(results["folder"], dataset)
    assert certificate.verdict.endswith("against a dataset that is not known to be the one that the run read")
    assert certificate.passed


def test_the_command_fails_in_one_line_and_keeps_the_certificate(
    results: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(results["folder"])
    kept = (results["folder"].with_name("folder.zarr.oocattn") / "certificate.json").read_bytes()
    oocattn.import_arrays(tmp_path / "other.zarr", q=TENSORS[0], k=TENSORS[1], v=-TENSORS[2])
    assert main(["verify", str(results["folder"]), "--dataset", str(tmp_path / "other.zarr")]) == 1
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)
    assert "name the inputs of that run with --dataset, or --q --k --v" in printed.err
    assert (results["folder"].with_name("folder.zarr.oocattn") / "certificate.json").read_bytes() == kept


def test_a_run_that_is_resumed_records_what_tells_its_inputs(tmp_path: Path) -> None:
    q, k, v = TENSORS
    oocattn.import_arrays(tmp_path / "qkv.zarr", q=q, k=k, v=v)

    def stop(event: oocattn.Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oocattn.attention(tmp_path / "qkv.zarr", tmp_path / "out.zarr", engine="inline", callbacks=[stop])
    oocattn.resume(tmp_path / "out.zarr", engine="inline")
    with pytest.raises(IntegrityError, match="numbers of q, k and v differ"):
        verify(tmp_path / "out.zarr", {"q": -q, "k": k + 1, "v": v * 2})
