"""How often chunks of the inputs are decoded that lie across those of a plan, or that q, k and v share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.core.codec_pipeline import BatchedCodecPipeline

import oocattn
from oocattn.pipelines.lane.stager import Stager
from oocattn.planning.decoding import times_decoded

TOKENS, HEADS, DIM = 240, 4, 8


@given(tokens=st.integers(1, 300), rows=st.integers(1, 300), unit=st.integers(1, 300))
def test_chunks_are_decoded_for_each_read_that_touches_them(tokens: int, rows: int, unit: int) -> None:
    touched = [{token // unit for token in range(low, min(low + rows, tokens))} for low in range(0, tokens, rows)]
    assert times_decoded(tokens, rows, unit) == sum(map(len, touched)) / len(set.union(*touched))


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "bnf", "bn3hd"])
@pytest.mark.parametrize("rows", [240, 60, 50])
def test_a_plan_says_how_often_chunks_are_decoded(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, rows: int
) -> None:
    inputs = write_inputs(fast_path, layout, rows)
    options: dict[str, Any] = {"chunks": 3, "decomposition": "cqs", "kernel": "cpu", "host_memory": "1GiB"}
    decoded, plans = count_decoded(monkeypatch), []
    result = oocattn.attention(inputs, fast_path / "out.zarr", engine="inline", callbacks=[plans.append], **options)
    plan = next(event.plan for event in plans if event.kind == "started")
    if layout == "bhnd":
        times = times_decoded(TOKENS, plan.key_chunk_rows, rows)
        assert (times > 1) == (f"decoded      {times:.3g} times over" in str(plan))
        assert result.report is not None
        assert sum(decoded) == pytest.approx(times * result.report.bytes_read, rel=0.05)  # the last chunk is filled up
    else:  # held
        stored = -(-TOKENS // rows) * rows * 3 * HEADS * DIM * 4
        assert plan.read_factor == 1
        assert sum(decoded) == stored


def write_inputs(folder: Path, layout: str, rows: int) -> oocattn.Inputs:
    """Compressed tensors in chunks of so many tokens and, where they lie between each other's, of all heads."""
    tensors = np.random.default_rng(0).standard_normal((3, 1, TOKENS, HEADS, DIM), np.float32)
    if layout in ("bnf", "bn3hd"):
        packed = tensors.transpose(1, 2, 0, 3, 4)
        if layout == "bnf":
            packed = packed.reshape(1, TOKENS, -1)
        zarr.create_array(folder / "in.zarr", name="qkv", data=packed, chunks=(1, rows, *packed.shape[2:]))
        heads = {"heads": HEADS, "kv_heads": HEADS} if layout == "bnf" else {}
        return oocattn.Inputs(qkv=folder / "in.zarr/qkv", layout=layout, **heads)
    chunks = (1, 1, rows, DIM) if layout == "bhnd" else (1, rows, HEADS, DIM)
    for name, each in zip("qkv", tensors, strict=True):
        stored = each.transpose(0, 2, 1, 3) if layout == "bhnd" else each
        zarr.create_array(folder / "in.zarr", name=name, data=stored, chunks=chunks)
    return oocattn.Inputs(*(folder / "in.zarr" / name for name in "qkv"), layout=layout)


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each chunk that Zarr decodes once a run stages."""
    decoded: list[int] = []
    read, stage = BatchedCodecPipeline.read, Stager.stage

    async def counted(self: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        batch = list(batch)
        decoded.extend(int(np.prod(spec.shape)) * 4 for _, spec, *_ in batch)
        return await read(self, batch, *rest, **options)

    def first(self: Stager, turn: int, *rest: Any) -> Any:
        if turn == 0:
            decoded.clear()
        return stage(self, turn, *rest)

    monkeypatch.setattr(BatchedCodecPipeline, "read", counted)
    monkeypatch.setattr(Stager, "stage", first)
    return decoded
