"""Indices of shards are checked before Zarr believes them."""

import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from compressed import CHUNK, DATA, read, write
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

import oocattn
from oocattn.errors import IntegrityError, ProblemError
from oocattn.storage.inputs.dataset import Dataset

INDICES = {
    "beyond": (lambda index, size: index.__setitem__((1, 0), size - 10), "points beyond|overlap"),
    "into the index": (lambda index, size: index.__setitem__((1, 0), size - index[1, 1]), "points beyond"),
    "far beyond": (lambda index, size: index.__setitem__((1, 0), 1 << 62), "points beyond"),
    "wraps": (lambda index, size: index.__setitem__((1, 0), (1 << 64) - 100), "overlap"),
    "huge": (lambda index, size: index.__setitem__((1, 1), 1 << 40), "lists 1,099,511,627,776 bytes for one chunk"),
    "same": (lambda index, size: index.__setitem__((1, 0), index[0, 0]), "overlap"),
    "half absent": (lambda index, size: index.__setitem__((1, 0), (1 << 64) - 1), "lists|overlap"),
    "empty": (lambda index, size: index.__setitem__((1, 1), 0), "a chunk of no bytes"),
    "absent": (lambda index, size: index.__setitem__(1, (1 << 64) - 1), "is missing"),
}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize(("change", "message"), INDICES.values(), ids=INDICES)
def test_an_index_that_cannot_be_is_refused(tmp_path: Path, change: Any, message: str, endian: Any, remote: bool) -> None:
    fsspec.filesystem("memory").store.clear()
    where = "memory://index" if remote else str(tmp_path)
    codec = ShardingCodec(chunk_shape=CHUNK, codecs=[BytesCodec(), GzipCodec()], index_codecs=[BytesCodec(endian=endian)])
    write(where, chunks=(1, 1, 32, 8), serializer=codec, compressors=None)
    filesystem, root = fsspec.url_to_fs(where)
    content = filesystem.cat(f"{root}/q/c/0/0/1/0")
    order = "<u8" if endian == "little" else ">u8"
    index = np.frombuffer(content[-32:], order).reshape(2, 2).copy()
    change(index, len(content))
    filesystem.pipe(f"{root}/q/c/0/0/1/0", content[:-32] + index.tobytes())
    with pytest.raises(IntegrityError, match=message):
        read(where)


def sharded(rows: int, *codecs: Any, **options: Any) -> ShardingCodec:
    """Shards of chunks of so many rows."""
    return ShardingCodec(chunk_shape=(1, 1, rows, 8), codecs=codecs or [BytesCodec()], **options)


PLAIN_INDEX: dict[str, Any] = {"index_codecs": [BytesCodec()], "index_location": "start"}


SHARDED: dict[str, ShardingCodec] = {
    "alone": sharded(16),
    "index without checksum": sharded(16, index_codecs=[BytesCodec()]),
    "index at the start": sharded(16, **PLAIN_INDEX),
    "big-endian index": sharded(16, index_codecs=[BytesCodec(endian="big"), Crc32cCodec()]),
    "compressed chunks": sharded(16, BytesCodec(), ZstdCodec()),
    "turned chunks": sharded(16, TransposeCodec(order=(0, 1, 3, 2)), BytesCodec()),
    "in a shard": sharded(32, sharded(16)),
    "in a shard of another kind": sharded(32, sharded(16, **PLAIN_INDEX)),
    "in a shard of a shard": sharded(32, sharded(16, sharded(8), **PLAIN_INDEX)),
    "in a shard of one shard": sharded(64, sharded(64, sharded(8, BytesCodec(), ZstdCodec()))),
}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("serializer", SHARDED.values(), ids=SHARDED)
def test_a_chunk_that_was_never_written_is_found_within_every_shard(
    tmp_path: Path, serializer: ShardingCodec, remote: bool
) -> None:
    where = "memory://never-written.zarr" if remote else str(tmp_path)
    group = write(where, chunks=(1, 1, 64, 8), serializer=serializer, compressors=None)
    Dataset.open(where).check_complete()
    np.testing.assert_array_equal(read(where), DATA[0, 0])
    group["q"][:, :, 32:48] = 0  # Zarr writes no chunk that is all fill value
    np.testing.assert_array_equal(group["q"][0, 0, 32:48], 0)
    for work in (lambda: read(where), Dataset.open(where).check_complete):
        with pytest.raises(IntegrityError, match=r"q/c/0/0/0/0, chunk 0/0/\d/0 of the shard.* is missing"):
            work()


def test_a_chunk_that_is_missing_in_a_shard_within_a_shard_is_named_by_both(tmp_path: Path) -> None:
    group = write(str(tmp_path), chunks=(1, 1, 64, 8), serializer=sharded(32, sharded(16)), compressors=None)
    group["q"][:, :, 48:64] = 0
    with pytest.raises(IntegrityError, match=r"chunk 0/0/1/0 of the shard, chunk 0/0/1/0 of the shard.* is missing"):
        Dataset.open(str(tmp_path)).check_complete()


HIDDEN: dict[str, tuple[Any, ...]] = {
    "compressed": (sharded(16), ZstdCodec()),
    "checked": (sharded(16), Crc32cCodec()),
    "twice": (sharded(16), GzipCodec(), Crc32cCodec()),
    "turned": (TransposeCodec(order=(0, 1, 3, 2)), ShardingCodec(chunk_shape=(1, 1, 8, 8))),
    "compressed in a shard": (sharded(32, sharded(16), ZstdCodec()),),
    "turned in a shard": (sharded(32, TransposeCodec(order=(0, 1, 3, 2)), ShardingCodec(chunk_shape=(1, 1, 8, 8))),),
    "compressed in a shard of a shard": (sharded(64, sharded(32, sharded(16), ZstdCodec())),),
    "compressed index": ({"name": "sharding_indexed", "configuration": {
        "chunk_shape": CHUNK, "codecs": [{"name": "bytes"}], "index_codecs": [{"name": "bytes"}, {"name": "zstd"}]}},),
}  # fmt: skip


@pytest.mark.parametrize("codecs", HIDDEN.values(), ids=HIDDEN)
def test_shards_whose_index_other_codecs_hide_are_refused(tmp_path: Path, codecs: tuple[Any, ...]) -> None:
    for name in "qkv":
        write(tmp_path, chunks=(1, 1, 64, 8))
        document = tmp_path / name / "zarr.json"
        metadata = {
            **json.loads(document.read_text()),
            "codecs": [codec if isinstance(codec, dict) else codec.to_dict() for codec in codecs],
        }
        document.write_text(json.dumps(metadata, default=list))
        for work in (lambda: oocattn.plan(tmp_path), lambda: oocattn.attention(tmp_path, tmp_path.with_name("result"))):
            with pytest.raises(ProblemError, match=rf"array '{name}' .* has .*(sharding_indexed.* alone|index).*write"):
                work()
