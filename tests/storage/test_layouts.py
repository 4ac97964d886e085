"""Tensors of every layout, container and dtype are read in place, as NumPy reads them; interleaved heads at once."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from reading import DTYPES, same_bits
from safetensors.torch import save_file
from tensors import to_torch
from zarr.codecs import BytesCodec, ZstdCodec

import oocattn
import oocattn.storage.bfloat16
from oocattn import Inputs
from oocattn.planning.plan_text import WIDTH
from oocattn.storage.inputs import direct
from oocattn.storage.inputs.axes import Axes, packed_axes
from oocattn.storage.inputs.direct import read_mapped, read_preadv
from oocattn.storage.inputs.file_source import open_file
from oocattn.storage.inputs.held import hold
from oocattn.storage.inputs.memory import open_memory
from oocattn.storage.inputs.parts import group_parts
from oocattn.storage.inputs.source import TensorSource
from oocattn.storage.inputs.zarr_source import ZarrSource
from oocattn.storage.mapped_store import MappedStore

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 2, 4, 2, 37, 8
SHAPES = {
    "bhnd": (BATCH, HEADS, TOKENS, DIM),
    "bnhd": (BATCH, TOKENS, HEADS, DIM),
    "hnd": (HEADS, TOKENS, DIM),
    "nhd": (TOKENS, HEADS, DIM),
    "bn3hd": (BATCH, TOKENS, 3, HEADS, DIM),
    "n3hd": (TOKENS, 3, HEADS, DIM),
    "bnf": (BATCH, TOKENS, (HEADS + 2 * KV_HEADS) * DIM),
    "nf": (TOKENS, (HEADS + 2 * KV_HEADS) * DIM),
}


def axes_of(layout: str) -> list[Axes]:
    """The axes of the tensors that a stored one of this layout has."""
    if "3" in layout or "f" in layout:
        return [*packed_axes(layout, SHAPES[layout], HEADS, KV_HEADS, "").values()]
    return [Axes(layout)]


def expected_of(stored: np.ndarray, layout: str, axes: Axes) -> np.ndarray:
    """The tensor [B, H, N, D], by NumPy alone."""
    whole = stored if "b" in layout else stored[None]
    if "3" in layout:
        return whole[:, :, axes.part].transpose(0, 2, 1, 3)
    if "f" in layout:
        columns = whole[..., axes.first_head * DIM : (axes.first_head + axes.heads) * DIM]
        return columns.reshape(*columns.shape[:2], axes.heads, DIM).transpose(0, 2, 1, 3)
    return whole.transpose(0, 2, 1, 3) if layout.endswith("nhd") else whole


def of_zarr(folder: Path, stored: np.ndarray, axes: Axes, chunks: tuple[int, ...], **storage: Any) -> TensorSource:
    group = zarr.open_group(folder, mode="w")
    options = {"compressors": None, "config": {"write_empty_chunks": True}, **storage}
    group.create_array("q", shape=stored.shape, dtype=stored.dtype, chunks=chunks, **options)[...] = stored
    opened = zarr.open_group(MappedStore(folder, read_only=True), mode="r")["q"]
    return ZarrSource("q", opened, str(folder), axes=axes)


def of_file(path: str, axes: Axes) -> TensorSource:
    opened = open_file("q", path)
    assert opened is not None
    return opened.source("q", axes)


def sources_of(folder: Path, stored: np.ndarray, axes: Axes) -> Iterator[TensorSource]:
    """The tensor in every container that holds such numbers."""
    whole, order = stored.shape, axes.order
    if stored.dtype != ml_dtypes.bfloat16:
        np.save(folder / "c.npy", stored)
        np.save(folder / "f.npy", np.asfortranarray(stored))
        np.save(folder / "big.npy", stored.astype(stored.dtype.newbyteorder(">")))
        yield from (of_file(f"{folder}/{name}.npy", axes) for name in ("c", "f", "big"))
    save_file({"other": torch.ones(3), "q": to_torch(stored)}, folder / "q.safetensors")
    yield of_file(f"{folder}/q.safetensors:q", axes)
    torch.save({"q": to_torch(np.concatenate([stored, stored]))[len(stored) :]}, folder / "q.pt")  # a view
    yield of_file(f"{folder}/q.pt", axes)
    yield of_zarr(folder / "whole", stored, axes, whole)
    tokens = tuple(10 if axis == "n" else size for axis, size in zip(order, whole, strict=True))
    yield of_zarr(folder / "tokens", stored, axes, tokens, serializer=BytesCodec(endian="big"))
    heads = tuple({"n": 16, "h": 3, "b": 1, "f": 2 * DIM, "3": 2}.get(a, size) for a, size in zip(order, whole, strict=True))
    yield of_zarr(folder / "heads", stored, axes, heads)
    yield of_zarr(folder / "zstd", stored, axes, heads, compressors=ZstdCodec())
    odd = tuple({"n": 7, "f": 13, "d": 5}.get(axis, size) for axis, size in zip(order, whole, strict=True))
    yield of_zarr(folder / "odd", stored, axes, odd)
    held = open_memory("q", stored)
    assert held is not None
    yield held.source("q", axes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
def test_every_layout_and_container_is_read_as_numpy_reads_it(tmp_path: Path, layout: str, dtype: str) -> None:
    random = np.random.default_rng(0)
    stored = random.standard_normal(SHAPES[layout]).astype(DTYPES[dtype])
    axes = axes_of(layout)[-1]
    expected = expected_of(stored, layout, axes)
    for source in sources_of(tmp_path, stored, axes):
        batches, heads, tokens = source.extents
        assert (batches, heads, tokens, DIM) == expected.shape
        start = int(random.integers(tokens))
        stop = int(random.integers(start, tokens)) + 1
        batch, whole = int(random.integers(batches)), range(heads)
        outs = np.ones((heads, stop - start, DIM), source.dtype)
        source.read_heads(batch, whole, start, stop, [*outs])
        assert same_bits(outs, expected[batch, :, start:stop]), source.describe()
        held = hold(dict.fromkeys("qkv", source), {"q": 2}, {"q": range(start, stop)})["q"]
        for head, read in itertools.product(whole, (source.read_rows, held.read_rows)):
            out = np.ones((stop - start, DIM), source.dtype)
            read(batch, head, start, stop, out)
            assert same_bits(out, expected[batch, head, start:stop]), source.describe()


@pytest.mark.parametrize("scratch", [1, 100, 5000])
@pytest.mark.parametrize("layout", ["bnhd", "bn3hd", "bnf"])
def test_parts_with_gaps_are_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, scratch: int
) -> None:
    monkeypatch.setattr(direct, "SCRATCH_BYTES", scratch)
    stored = np.random.default_rng(0).standard_normal(SHAPES[layout]).astype(np.float32)
    np.save(tmp_path / "q.npy", stored)
    for axes, read in itertools.product(axes_of(layout), (read_preadv, read_mapped)):
        source, expected = of_file(f"{tmp_path}/q.npy", axes), expected_of(stored, layout, axes)
        outs = np.ones((source.extents[1], 30, DIM), np.float32)
        requests = [(source.parts(1, head, 5, 35), out) for head, out in enumerate(outs)]
        read(group_parts([(parts, out) for parts, out in requests if parts is not None]))
        assert same_bits(outs, expected[1, :, 5:35])


class Counted:
    """Bytes of input files that are read, where nothing is mapped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes, real = 0, os.preadv

        def preadv(descriptor: int, buffers: Any, offset: int) -> int:
            self.nbytes += (count := real(descriptor, buffers, offset))
            return count

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(direct, "map_file", lambda *_: None)


def write_inputs(folder: Path, layout: str, tokens: int) -> tuple[Inputs, int]:
    """Inputs in .npy files of this layout, and the bytes of their numbers."""
    random, heads = np.random.default_rng(0), 8
    if layout == "bnhd":
        tensors = [random.standard_normal((1, tokens, heads, DIM), np.float32) for _ in range(3)]
        for name, tensor in zip("qkv", tensors, strict=True):
            np.save(folder / f"{name}.npy", tensor)
        return Inputs(*(folder / f"{name}.npy" for name in "qkv"), layout=layout), sum(each.nbytes for each in tensors)
    packed = random.standard_normal((1, tokens, 3, heads, DIM), np.float32)
    np.save(folder / "qkv.npy", packed)
    return Inputs(qkv=folder / "qkv.npy", layout=layout), packed.nbytes


@pytest.mark.parametrize("layout", ["bnhd", "bn3hd"])
def test_interleaved_heads_are_read_once_where_the_budget_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    inputs, size = write_inputs(tmp_path, layout, 16384)
    options: dict[str, Any] = {"engine": "inline", "kernel": "cpu", "chunks": 1, "window_size": (16, 0)}
    plan = oocattn.plan(inputs, **options)
    assert (plan.read_factor, plan.held_groups) == (1, 8)
    assert "all heads are read together, inputs are read once" in str(plan)
    counted = Counted(monkeypatch)
    held = oocattn.attention(inputs, tmp_path / "held.zarr", **options)
    assert size <= counted.nbytes <= 1.2 * size

    small = plan.peak_host - size // 2
    scarce = oocattn.plan(inputs, **options, host_memory=small)
    assert scarce.peak_host <= small
    assert 0 < scarce.held_groups < 8
    assert 2 <= scarce.read_factor <= 3
    words = f"{scarce.held_groups} of 8 head groups are read together, inputs are read {scarce.read_factor:.3g} times"
    assert words in " ".join(str(scarce).split())
    assert max(map(len, str(scarce).splitlines())) <= WIDTH
    assert scarce.to_json()["read_factor"] == scarce.read_factor
    counted.nbytes, plans = 0, []  # a run plans anew, on a machine that it measures anew

    def keep_plan(event: oocattn.Event) -> None:
        if event.kind == "started":
            plans.append(event.plan)

    again = oocattn.attention(inputs, tmp_path / "again.zarr", **options, host_memory=small, callbacks=[keep_plan])
    assert counted.nbytes <= 1.2 * plans[0].read_factor * size
    for name in ("out", "lse"):
        assert same_bits(getattr(held, name)[...], getattr(again, name)[...])
