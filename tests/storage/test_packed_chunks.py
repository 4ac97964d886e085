"""q, k and v that are packed in the same encoded chunks are decoded together, once, within the bound that a plan counts."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from reading import same_bits
from zarr.codecs import ZstdCodec

from oocattn.storage.inputs.axes import packed_axes
from oocattn.storage.inputs.codecs import CodecReader
from oocattn.storage.inputs.held import hold, lie_together
from oocattn.storage.inputs.zarr_source import ZarrSource
from oocattn.storage.mapped_store import MappedStore

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 2, 4, 2, 100, 8


def write_packed(
    folder: Path, layout: str, whole: bool = True, tokens: int = TOKENS, dim: int = DIM, **storage: Any
) -> dict[str, ZarrSource]:
    """Sources of q, k and v in one array, whose chunks have all of a token if they are `whole`."""
    heads, kv_heads = (HEADS, KV_HEADS) if "f" in layout else (HEADS, HEADS)
    row = ((heads + 2 * kv_heads) * dim,) if "f" in layout else (3, heads, dim)
    shape = (BATCH, tokens, *row) if layout[0] == "b" else (tokens, *row)
    data = np.random.default_rng(0).standard_normal(shape, np.float32)
    of_row = row if whole else (row[0] // 2, *row[1:])
    chunks = (*[1] * (layout[0] == "b"), tokens // 4, *of_row)
    zarr.create_array(folder / "in.zarr", name="qkv", data=data, chunks=chunks, **{"compressors": ZstdCodec(), **storage})
    array = zarr.open_group(MappedStore(folder / "in.zarr", read_only=True), mode="r")["qkv"]
    found = packed_axes(layout, shape, heads, kv_heads, "")
    return {name: ZarrSource(name, array, str(folder), axes=axes) for name, axes in found.items()}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("layout", ["bn3hd", "n3hd", "bnf", "nf"])
def test_heads_of_packed_tensors_are_decoded_once_for_each_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, shards: bool, groups: int
) -> None:
    sources = write_packed(tmp_path, layout)
    if shards:
        chunks = sources["q"].array.chunks
        rows = tuple(2 * size if axis == "n" else size for axis, size in zip(layout, chunks, strict=True))
        sources = write_packed(tmp_path / "sharded", layout, shards=rows)
    assert lie_together(sources)
    windows = sources["k"].extents[1] // groups
    each = {name: source.extents[1] // windows for name, source in sources.items()}
    held = hold(sources, each, dict.fromkeys("qkv", range(5, 95)))
    decoded, read = [], CodecReader._decode

    def counted(self: CodecReader, selection: Any, out: Any) -> None:
        decoded.append(out.nbytes)
        read(self, selection, out)

    batch, outs = sources["q"].extents[0] - 1, {}
    monkeypatch.setattr(CodecReader, "_decode", counted)
    for window in range(windows):
        for name, count in each.items():
            for head in range(window * count, (window + 1) * count):
                outs[name, head] = np.ones((80, DIM), np.float32)
                held[name].read_rows(batch, head, 10, 90, outs[name, head])
    assert sum(decoded) == windows * 90 * sum(source.extents[1] for source in sources.values()) * DIM * 4
    for (name, head), out in outs.items():
        alone = np.ones((80, DIM), np.float32)
        sources[name].read_rows(batch, head, 10, 90, alone)
        assert same_bits(out, alone), (name, head)


@pytest.mark.parametrize("layout", ["bn3hd", "bnf"])
def test_tensors_in_chunks_of_their_own_are_not_decoded_together(tmp_path: Path, layout: str) -> None:
    sources = write_packed(tmp_path, layout, whole=False)
    assert not lie_together(sources)


@pytest.mark.parametrize("layout", ["bn3hd", "bnf"])
def test_packed_tensors_are_decoded_within_their_bound(tmp_path: Path, layout: str) -> None:
    sources = write_packed(tmp_path, layout, tokens=2**15, dim=64)
    outs = [
        (each.axes, head, np.ones((2**15, 64), np.float32)) for each in sources.values() for head in range(each.extents[1])
    ]
    tracemalloc.start()
    try:
        sources["q"].read_packed(0, 0, 2**15, outs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= sources["q"].decode_bytes
