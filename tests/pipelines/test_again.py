"""What `status` and messages propose to go on with a run, does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import normal_arrays
from zarr.storage import MemoryStore

import oocattn
from oocattn.cli.main import main

Q, K, V = TENSORS = normal_arrays(64, heads=2, kv_heads=2, dtype="float32", seed=5)

RUN: dict[str, Any] = {"engine": "inline", "chunks": 3, "kernel": "cpu", "host_memory": "64MiB"}


def interrupt(inputs: Any, result: Any, **options: Any) -> None:
    """Begin a run, and end it before its first subproblem."""

    def stop(event: oocattn.Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oocattn.attention(inputs, result, callbacks=[stop], **RUN, **options)


def save_files(folder: Path) -> dict[str, Path]:
    for name, each in zip("qkv", TENSORS, strict=True):
        np.save(folder / f"{name}'s file.npy", each.transpose(0, 2, 1, 3))
    return {name: folder / f"{name}'s file.npy" for name in "qkv"}


def packed(folder: Path) -> str:
    place = f"memory://again/{folder.name}/qkv"
    features = np.stack(TENSORS, 1).transpose(0, 3, 1, 2, 4)
    zarr.create_array(place, data=features)
    return place


def dataset(place: Any) -> Any:
    return oocattn.import_arrays(place, q=Q, k=K, v=V) or place


INPUTS = {
    "a folder": lambda folder: dataset(folder / "a dataset.zarr"),
    "files": lambda folder: oocattn.Inputs(**save_files(folder), layout="bnhd"),
    "a URL": lambda folder: dataset(f"memory://again/{folder.name}/qkv.zarr"),
    "a packed URL": lambda folder: oocattn.Inputs(qkv=packed(folder)),
}

RESULTS: dict[str, Any] = {
    "a folder": lambda folder: (folder / "-r.zarr", {}),
    "a URL": lambda folder: (f"memory://again/{folder.name}/r.zarr", {}),
    "a URL and a folder": lambda folder: (f"memory://again/{folder.name}/r.zarr", {"scratch": folder / "job state"}),
    "a URL alone": lambda folder: (f"memory://again/{folder.name}/r.zarr", {"scratch": "store", "lock": "none"}),
}


@pytest.mark.parametrize(("inputs", "result"), list(zip([*INPUTS, *INPUTS], [*RESULTS, *reversed(RESULTS)], strict=True)))
def test_the_command_that_status_proposes_finishes_the_run_from_any_folder(
    inputs: str, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place, options = RESULTS[result](tmp_path)
    interrupt(INPUTS[inputs](tmp_path), place, **options)
    scratch = ["--scratch", str(options["scratch"])] if options else []
    assert main(["status", str(place) if "://" in str(place) else "./-r.zarr", *scratch]) == 0
    (command,) = re.findall(r"^go on with: oocattn (.*)$", capsys.readouterr().out, re.MULTILINE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main([*shlex.split(command), "--engine", "inline"]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["memory", "a store"])
def test_inputs_that_no_command_names_are_named_by_the_call(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = MemoryStore()
    for name, each in zip("qkv", TENSORS, strict=True):
        zarr.create_array(store, name=name, data=each)
    inputs = {"q": Q, "k": K, "v": V} if kind == "memory" else store
    interrupt(inputs, tmp_path / "r.zarr")
    call = f"oocattn.resume({str(tmp_path / 'r.zarr')!r}, inputs=...)"
    assert oocattn.status(tmp_path / "r.zarr").resume == call
    assert main(["status", str(tmp_path / "r.zarr")]) == 0
    assert capsys.readouterr().out.endswith(f"go on with: {call}\n")
    assert oocattn.resume(tmp_path / "r.zarr", inputs=inputs, engine="inline").report


def test_python_gets_a_call_that_works(tmp_path: Path) -> None:
    inputs = dataset(f"memory://again/{tmp_path.name}/qkv.zarr")
    place, options = RESULTS["a URL alone"](tmp_path)
    interrupt(inputs, place, **options)
    status = oocattn.status(place, scratch="store", storage_options={"anon": True, "key": "secret"})
    assert status.resume.endswith(
        f"inputs={inputs!r}, scratch='store', lock='none', storage_options={{'anon': True, 'key': ...}}) "
        "(with the values of the storage options)"
    )
    call = status.resume.split(", storage_options=")[0]
    assert eval(f"{call}, engine='inline')").report


def test_a_run_in_another_folder_is_resumed_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, options = RESULTS["a URL and a folder"](tmp_path)
    interrupt(INPUTS["a folder"](tmp_path), place, **options)
    monkeypatch.chdir(tmp_path)
    assert main(["status", place]) == 0
    (command,) = re.findall(r"^go on with: oocattn (.*) \(with the inputs, unless", capsys.readouterr().out, re.MULTILINE)
    assert main([*shlex.split(command), "--engine", "inline"]) == 0


def test_status_says_how_a_run_ended_and_counts_tokens_of_all_batch_entries(tmp_path: Path) -> None:
    q, k, v = normal_arrays(64, heads=1, batch=3, dtype="float32")
    interrupt({"q": q, "k": k, "v": v}, tmp_path / "r.zarr")
    words = str(oocattn.status(tmp_path / "r.zarr"))
    assert "0 of 192 tokens in 3 batch entries (0%)" in words
    assert "it ended: interrupted by Ctrl-C or another signal\n" in words
