"""Metadata is read with a bound and checked before Zarr sees it, and any file may be anything."""

import json
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from support import normal_arrays, write_dataset
from zarr.codecs import ZstdCodec

import oocattn
from oocattn.errors import BudgetError, IntegrityError, OocattnError, ProblemError
from oocattn.storage import metadata
from oocattn.storage.inputs.dataset import Dataset
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.metadata import open_array
from oocattn.storage.nodes import group_attributes

SECONDS = 10
"""Of a core, however busy the machine is."""


@pytest.fixture(autouse=True)
def nothing_takes_long() -> Any:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


def rewrite(document: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(document.read_text())
    change(content)
    document.write_text(json.dumps(content))


def set_in(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = to

    return change


GRID = ("chunk_grid", "configuration", "chunk_shape")
SHARDED = {"chunk_shape": [1, 1, 32, 8], "codecs": [{"name": "bytes"}], "index_codecs": [{"name": "bytes"}]}


def nested(depth: int) -> list[Any]:
    inner: list[Any] = [{"name": "bytes"}]
    for _ in range(depth):
        inner = [{"name": "sharding_indexed", "configuration": {**SHARDED, "codecs": inner}}]
    return inner


V3 = {
    "shape absurd": (set_in("shape", to=[1, 1, 2**62, 8]), "'k' .*shape"),
    "shape negative": (set_in("shape", to=[1, 1, -1, 8]), "'k' .*shape"),
    "shape of text": (set_in("shape", to="1234"), "'k' .*shape"),
    "shape of numbers with a point": (set_in("shape", to=[1, 1, 64.0, 8]), "'k' .*shape"),
    "shape of truths": (set_in("shape", to=[True, True, 64, 8]), "'k' .*shape"),
    "shape of many": (set_in("shape", to=[1] * 10**5), "'k' .*shape"),
    "shape of much": (set_in("shape", to=[2**40] * 4), "'k' .*shape"),
    "chunk of none": (set_in(*GRID, to=[1, 1, 0, 8]), "'k' .*chunk shape"),
    "chunk absurd": (set_in(*GRID, to=[1, 1, 2**40, 2**40]), "'k' .*chunk"),
    "chunk of another rank": (set_in(*GRID, to=[1, 64, 8]), "'k' .*ranks"),
    "no grid": (set_in("chunk_grid", to=None), "'k' .*chunk_grid"),
    "other grid": (set_in("chunk_grid", "name", to="rectilinear"), "'k' .*chunk_grid 'rectilinear'"),
    "other keys": (set_in("chunk_key_encoding", "name", to="../../etc"), "'k' .*chunk_key_encoding"),
    "separator": (set_in("chunk_key_encoding", "configuration", "separator", to="/../"), "'k' .*separator"),
    "transformers": (set_in("storage_transformers", to=[{"name": "x"}]), "'k' .*storage transformers"),
    "unknown field": (set_in("hidden", to=1), "'k' .*cannot be opened by zarr"),
    "fill value": (set_in("fill_value", to={"a": 1}), "'k' .*cannot be opened by zarr"),
    "dtype string": (set_in("data_type", to="string"), r"'k' .*dtype string"),
    "dtype struct": (set_in("data_type", to={"name": "structured", "configuration": {}}), r"'k' .*dtype \{'name'"),
    "dtype with escapes": (set_in("data_type", to="\x1b[2J"), r"'k' .*dtype \\x1b\[2J"),
    "codec unknown": (set_in("codecs", to=[{"name": "numcodecs.pickle"}]), "'k' .*'pickle'.*oocattn.import_arrays"),
    "codec vlen": (set_in("codecs", to=[{"name": "vlen-utf8"}]), "'k' .*'vlen-utf8'"),
    "codec zfpy": (set_in("codecs", to=[{"name": "numcodecs.zfpy"}]), "'k' .*'zfpy'"),
    "codec pcodec": (set_in("codecs", to=[{"name": "numcodecs.pcodec"}]), "'k' .*'pcodec'"),
    "codec packbits": (set_in("codecs", to=[{"name": "numcodecs.packbits"}, {"name": "bytes"}]), "'k' .*'packbits'"),
    "codec a number": (set_in("codecs", to=[7]), "'k' .*codec"),
    "codecs a number": (set_in("codecs", to=7), "'k' .*codecs"),
    "codecs many": (set_in("codecs", to=[{"name": "zstd"}] * 10**5), "'k' .*codecs"),
    "codecs none": (set_in("codecs", to=[]), "'k' .*cannot be opened"),
    "codec configuration": (set_in("codecs", to=[{"name": "bytes", "configuration": 7}]), "'k' .*configuration"),
    "codec in a shard": (set_in("codecs", to=[{"name": "sharding_indexed", "configuration": {
        **SHARDED, "codecs": [{"name": "vlen-bytes"}]}}]), "'k' .*'vlen-bytes'"),
    "index codec": (set_in("codecs", to=[{"name": "sharding_indexed", "configuration": {
        **SHARDED, "index_codecs": [{"name": "bytes"}, {"name": "zstd"}]}}]), "'k' .*index"),
    "shards deep": (set_in("codecs", to=nested(4)), "'k' .*deep"),
    "shards among others": (set_in("codecs", to=[*nested(1), {"name": "zstd"}]), "'k' .*sharding_indexed, zstd: .* alone"),
    "shards that do not divide": (set_in("codecs", to=[{"name": "sharding_indexed", "configuration": {
        **SHARDED, "chunk_shape": [1, 1, 33, 8]}}]), "'k' .*divide"),
    "attributes": (set_in("attributes", to=[1]), "'k' .*attributes"),
    "node type": (set_in("node_type", to="other"), "'k' .*neither a group nor an array"),
    "format": (set_in("zarr_format", to=4), "'k' .*neither a group nor an array"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), V3.values(), ids=V3)
def test_metadata_of_zarr_3_that_cannot_be_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64))
    rewrite(dataset / "k/zarr.json", change)
    with pytest.raises((ProblemError, IntegrityError), match=message) as refused:
        oocattn.plan(dataset)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


V2 = {
    "pickle": (set_in("compressor", to={"id": "pickle", "protocol": 0}), "'k' .*'pickle'.*oocattn.import_arrays"),
    "json2": (set_in("filters", to=[{"id": "json2"}]), "'k' .*'json2'"),
    "msgpack2": (set_in("filters", to=[{"id": "msgpack2"}]), "'k' .*'msgpack2'"),
    "categorize": (set_in("filters", to=[{"id": "categorize", "labels": ["a"], "dtype": "O"}]), "'k' .*'categorize'"),
    "object": (set_in("dtype", to="|O"), "'k' .*dtype"),
    "struct": (set_in("dtype", to=[["a", "<f4"]]), "'k' .*dtype"),
    "bfloat16": (
        set_in("dtype", to="bfloat16"),
        "'k' .*bfloat16 in Zarr format 2, as TensorStore .*: expected Zarr format 3",
    ),
    "text": (set_in("dtype", to="<U1000000"), "'k' .*dtype"),
    "filter of objects": (set_in("filters", to=[{"id": "delta", "dtype": "O"}]), "'k' .*filter"),
    "filter of text": (
        set_in("filters", to=[{"id": "astype", "encode_dtype": "<f4", "decode_dtype": "S99"}]),
        "'k' .*filter",
    ),
    "filter of structs": (set_in("filters", to=[{"id": "delta", "dtype": "f4,f4"}]), "'k' .*filter"),
    "dictionary": (
        set_in("compressor", to={"id": "lzma", "format": 3, "filters": [{"id": 33, "dict_size": 2**32 - 1}]}),
        "'k' .*dictionary",
    ),
    "order": (set_in("order", to="K"), "'k' .*order"),
    "separator": (set_in("dimension_separator", to="/../../"), "'k' .*separator"),
    "shape": (set_in("shape", to=[2**62, 1, 64, 8]), "'k' .*shape"),
    "format": (set_in("zarr_format", to=3), "'k' .*format 2"),
}


@pytest.mark.parametrize(("change", "message"), V2.values(), ids=V2)
def test_metadata_of_zarr_2_that_cannot_be_is_refused(
    tmp_path: Path, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = zarr.open_group(tmp_path, mode="w", zarr_format=2)
    for name, data in zip("qkv", normal_arrays(64), strict=True):
        group.create_array(name, shape=data.shape, dtype=data.dtype, chunks=(1, 1, 64, 8))[...] = data
    oocattn.plan(tmp_path)
    rewrite(tmp_path / "k/.zarray", change)
    for codec in ("pickle", "json2", "msgpack2"):
        made = numcodecs.registry.codec_registry.get(codec, numcodecs.Pickle)
        monkeypatch.setattr(made, "__init__", lambda self, **config: pytest.fail("a codec was made"))
    with pytest.raises((ProblemError, IntegrityError), match=message):
        oocattn.plan(tmp_path)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    os.truncate(path, 1 << 40)


def deep(path: Path) -> None:
    path.write_text('{"a":' * 10**5)


def wide(path: Path) -> None:
    path.write_text('{"zarr_format": 3, "node_type": "group", "attributes": [' + "[]," * 3 * 10**5 + "[]]}")


KINDS = [fifo, folder, loop, device, huge]


@pytest.mark.parametrize("kind", [*KINDS, deep, wide])
@pytest.mark.parametrize("document", ["zarr.json", "k/zarr.json"])
def test_metadata_may_be_anything(tmp_path: Path, kind: Callable[[Path], None], document: str) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64))
    kind(dataset / document)
    with pytest.raises((ProblemError, IntegrityError)) as refused:
        oocattn.plan(dataset)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compressors", [None, ZstdCodec()])
def test_chunks_may_be_anything(tmp_path: Path, kind: Callable[[Path], None], compressors: Any) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64), compressors=compressors)
    kind(dataset / "k/c/0/0/0/0")
    works: list[Callable[[], Any]] = [
        lambda: oocattn.attention(dataset, tmp_path / "result.zarr", kernel="cpu", engine="inline"),
        lambda: oocattn.plan(dataset, kernel="cpu"),
    ]
    for work in works:
        with pytest.raises((OocattnError, OSError)):
            work()
    if kind is not huge or compressors is None:
        with pytest.raises((OocattnError, OSError)):
            Dataset.open(dataset).check_complete()
        if kind is not huge:
            with pytest.raises((OocattnError, OSError)):
                Dataset.open(dataset).fingerprint()


def test_links_are_followed(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64))
    (dataset / "k").rename(tmp_path / "elsewhere")
    (dataset / "k").symlink_to(tmp_path / "elsewhere")
    (dataset / "v/c/0/0/0/0").rename(tmp_path / "chunk")
    (dataset / "v/c/0/0/0/0").symlink_to(tmp_path / "chunk")
    (tmp_path / "link.zarr").symlink_to(dataset)
    assert oocattn.attention(tmp_path / "link.zarr", tmp_path / "result.zarr", kernel="cpu").out.shape == (1, 2, 64, 8)


def test_other_nodes_of_the_group_are_not_opened(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64))
    os.mkfifo(dataset / "fifo")
    (dataset / "loop").symlink_to(dataset)
    for number in range(20):
        (dataset / f"other{number:02}").mkdir()
        (dataset / f"other{number:02}/zarr.json").touch()
    oocattn.plan(dataset, kernel="cpu")
    (dataset / "v").rename(dataset / "w\x1b")
    with pytest.raises(ProblemError, match=r"no array 'v' .*'k', 'loop', 'other00', .*and more; a dataset"):
        oocattn.plan(dataset)


@pytest.mark.parametrize("compressors", [None, ZstdCodec()])
@pytest.mark.parametrize(
    ("tokens", "rows"), [(2**34, 1), (10**7, 1), (2**40, 2**20), (2**47, 2**33), (64, 2**20), (64, 2**36)]
)
def test_an_absurd_shape_ends_at_once(tmp_path: Path, tokens: int, rows: int, compressors: Any) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64), compressors=compressors)
    for name in "qkv":
        rewrite(dataset / name / "zarr.json", set_in("shape", 2, to=tokens))
        rewrite(dataset / name / "zarr.json", set_in(*GRID, 2, to=rows))
    works: list[Callable[[], Any]] = [
        lambda: oocattn.plan(dataset, kernel="cpu", host_memory="64MiB"),
        lambda: oocattn.attention(dataset, tmp_path / "result.zarr", kernel="cpu", host_memory="64MiB"),
    ]
    if rows <= tokens:
        works += [Dataset.open(dataset).fingerprint, Dataset.open(dataset).check_complete]
    for work in works:
        with pytest.raises((ProblemError, IntegrityError, BudgetError)):
            work()


def test_a_chunk_that_the_budget_cannot_hold_is_not_decoded_to_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64), compressors=ZstdCodec())
    rewrite(dataset / "k/zarr.json", set_in(*GRID, to=[1, 1, 2**22, 8]))
    monkeypatch.setattr(
        "oocattn.storage.inputs.codecs.CodecReader.read",
        lambda self, *_: pytest.fail("decoded") if self.decode_bytes > 64 << 20 else None,
    )
    with pytest.raises(BudgetError, match="host_memory 64 MiB is too small"):
        oocattn.plan(dataset, host_memory="64MiB", kernel="cpu")


def test_arrays_of_results_are_opened_with_their_attributes(tmp_path: Path) -> None:
    for version in (2, 3):
        group = zarr.open_group(tmp_path / str(version), mode="w", zarr_format=version, attributes={"a": {"b": 1}})
        written = group.create_array("out", data=np.arange(24.0).reshape(1, 2, 3, 4), chunks=(1, 1, 2, 4))
        written.attrs["checksums"] = ["x"]
        group.create_group("inner")
        store = MappedStore(tmp_path / str(version), read_only=True)
        assert group_attributes(store.root) == {"a": {"b": 1}}
        array = open_array(store, "out", "the result")
        assert array is not None
        np.testing.assert_array_equal(array[...], written[...])
        assert array.attrs["checksums"] == ["x"]
        assert open_array(store, "lse", "the result") is None
        with pytest.raises(ProblemError, match="'inner' in the result is a group"):
            open_array(store, "inner", "the result")
        assert group_attributes(store.root / "out") == {}
        assert group_attributes(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    "change",
    [
        set_in("fill_value", to=1e308),
        set_in(
            "codecs",
            to=[
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "numcodecs.zlib", "configuration": {"level": 1}},
            ],
        ),
    ],
    ids=["overflow", "codec"],
)
def test_warnings_of_zarr_and_numpy_about_metadata_are_not_shown(
    dataset: Path, change: Callable[[dict[str, Any]], None], recwarn: pytest.WarningsRecorder
) -> None:
    rewrite(dataset / "k" / "zarr.json", change)
    Dataset.open(dataset)
    assert not recwarn.list


def test_two_threads_that_open_arrays_leave_the_filters_of_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one ends while the second one is in the middle, if they may be there together."""
    dataset = write_dataset(tmp_path / "dataset.zarr", normal_arrays(64))
    second, first_ended, parse = threading.Event(), threading.Event(), metadata.parse_metadata
    turns = iter([lambda: second.wait(0.5), lambda: second.set() or first_ended.wait(10)])

    def parse_in_turn(found: dict[str, Any]) -> Any:
        next(turns)()
        return parse(found)

    def open_one(name: str) -> None:
        open_array(MappedStore(dataset), name, "the dataset")
        first_ended.set()

    monkeypatch.setattr(metadata, "parse_metadata", parse_in_turn)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(open_one, ["q", "k"]))
    assert list(warnings.filters) == before
