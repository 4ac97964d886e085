"""No chunk decodes to more than a chunk has, whatever its stored bytes say or do, and what is whole decodes as before."""

import bz2
import gzip
import json
import lzma
import struct
from pathlib import Path
from typing import Any

import fsspec
import numcodecs
import numpy as np
import pytest
import warm
import zarr
from bombs import BIG_BLOCKS, CHUNK_BYTES, MIB, SKIPPED, ZEROS, lying_blosc, zlib_bomb, zstd_frame, zstd_repeated
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

import oocattn
from oocattn.errors import IntegrityError, ProblemError
from oocattn.storage.inputs.dataset import Dataset

SHAPE, CHUNK = (1, 1, 64, 8), (1, 1, 16, 8)
DATA = np.random.default_rng(0).standard_normal(SHAPE).astype("float16")

V2: dict[str, dict[str, Any]] = {
    "blosc": {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1, "blocksize": 0},
    "zstd": {"id": "zstd", "level": 1},
    "gzip": {"id": "gzip", "level": 1},
    "zlib": {"id": "zlib", "level": 1},
    "bz2": {"id": "bz2", "level": 1},
    "lz4": {"id": "lz4", "acceleration": 1},
    "lzma": {"id": "lzma", "format": 1, "check": -1, "preset": 1, "filters": None},
}


def write(store: Any, data: np.ndarray = DATA, **storage: Any) -> Any:
    """A dataset whose k and v are as stored as `q`, which Zarr writes."""
    group = zarr.open_group(store, mode="w", zarr_format=storage.pop("zarr_format", 3))
    for name in "qkv":
        group.create_array(name, shape=data.shape, dtype=data.dtype, **{"chunks": CHUNK, **storage})[...] = data
    return group


def read(where: Any) -> np.ndarray:
    array = Dataset.open(where).arrays["q"]
    out = np.empty((64, 8), array.dtype)
    array.read_rows(0, 0, 0, 64, out)
    return out


def numcodec(name: str, **config: Any) -> Any:
    import zarr.codecs.numcodecs as found

    return getattr(found, name)(**config)


V3: dict[str, Any] = {
    "zstd with checksum": {"compressors": ZstdCodec(checksum=True)},
    "blosc": {"compressors": BloscCodec()},
    "gzip": {"compressors": GzipCodec()},
    "two": {"compressors": [ZstdCodec(), GzipCodec()]},
    "crc32c": {"compressors": [BloscCodec(), Crc32cCodec()]},
    "shard": {"shards": (1, 1, 32, 8), "compressors": [GzipCodec()]},
    "nested": {
        "chunks": (1, 1, 32, 8),
        "serializer": ShardingCodec(chunk_shape=(1, 1, 32, 8), codecs=[ShardingCodec(chunk_shape=CHUNK, codecs=[
            BytesCodec(), ZstdCodec()])]),
        "compressors": None,
    },
    "big-endian index": {
        "chunks": (1, 1, 32, 8),
        "serializer": ShardingCodec(chunk_shape=CHUNK, index_codecs=[BytesCodec(endian="big")], index_location="start"),
        "compressors": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("storage", V3.values(), ids=V3)
def test_arrays_of_zarr_3_are_read(tmp_path: Path, storage: dict[str, Any]) -> None:
    write(tmp_path, **storage)
    dataset = Dataset.open(tmp_path)
    dataset.check_complete()
    np.testing.assert_array_equal(read(tmp_path), DATA[0, 0])


@pytest.mark.parametrize("name", ["Zstd", "Blosc", "GZip", "Zlib", "BZ2", "LZMA", "LZ4"])
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_arrays_of_numcodecs_in_zarr_3_are_read(tmp_path: Path, name: str) -> None:
    filters = [numcodec("AsType", encode_dtype="float32", decode_dtype="float16"), numcodec("Delta", dtype="float32")]
    compressors = [numcodec("Shuffle", elementsize=4), numcodec(name), numcodec("CRC32")]
    data = np.arange(512, dtype="f2").reshape(SHAPE)
    write(tmp_path, data, filters=filters, compressors=compressors)
    np.testing.assert_array_equal(read(tmp_path), data[0, 0])


@pytest.mark.parametrize("compressor", V2.values(), ids=V2)
def test_arrays_of_zarr_2_are_read(tmp_path: Path, compressor: dict[str, Any]) -> None:
    write(tmp_path / "plain", zarr_format=2, compressors=compressor)
    np.testing.assert_array_equal(read(tmp_path / "plain"), DATA[0, 0])
    filters = [numcodecs.FixedScaleOffset(0, 8, "f2", "i4"), numcodecs.Shuffle(4), numcodecs.Fletcher32(), numcodecs.GZip()]
    data = (np.arange(512) / 8).astype("f2").reshape(SHAPE)
    write(tmp_path / "filtered", data, zarr_format=2, compressors=compressor, filters=filters)
    np.testing.assert_array_equal(read(tmp_path / "filtered"), data[0, 0])


BOMBS = {
    "zstd": ("zstd", lambda: numcodecs.Zstd().encode(bytes(64 * MIB))),
    "zstd, repeated": ("zstd", lambda: zstd_frame(BIG_BLOCKS, 256 * MIB)),
    "zstd, size not stated": ("zstd", lambda: zstd_frame(BIG_BLOCKS, None)),
    "zstd, size a lie": ("zstd", lambda: zstd_frame(BIG_BLOCKS, CHUNK_BYTES)),
    "zstd, size absurd": ("zstd", lambda: zstd_frame(BIG_BLOCKS, 1 << 62)),
    "zstd, many frames": ("zstd", lambda: SKIPPED + zstd_frame([zstd_repeated(1 << 17, True)], 1 << 17) * 2048),
    "zstd, one too many": ("zstd", lambda: zstd_frame([zstd_repeated(256, True)], 256) + zstd_frame(BIG_BLOCKS, None)),
    "blosc": ("blosc", lambda: numcodecs.Blosc().encode(bytes(64 * MIB))),
    "blosc, size a lie": ("blosc", lying_blosc),
    "lz4": ("lz4", lambda: numcodecs.LZ4().encode(bytes(64 * MIB))),
    "lz4, size absurd": ("lz4", lambda: b"\xff\xff\xff\x7f" + bytes(10)),
    "gzip": ("gzip", lambda: gzip.compress(ZEROS, 1) * 4),
    "zlib": ("zlib", zlib_bomb),
    "bz2": ("bz2", lambda: bz2.compress(ZEROS) * 4),
    "lzma": ("lzma", lambda: lzma.compress(ZEROS, preset=0) * 4),
}

READ_ALL = """
import resource, sys
import numpy as np
import numcodecs
from oocattn.errors import IntegrityError
from oocattn.storage.inputs.dataset import Dataset
folders = sys.argv[1:]
out = np.empty((64, 8), "f2")
Dataset.open(folders.pop(0)).arrays["q"].read_rows(0, 0, 0, 64, out)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in folders:
    try:
        Dataset.open(folder).arrays["q"].read_rows(0, 0, 0, 64, out)
        print("read")
    except IntegrityError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_are_refused_in_little_memory(tmp_path: Path) -> None:
    names = []
    write(tmp_path / "whole", compressors=GzipCodec())
    for name, (codec, make) in BOMBS.items():
        bomb = make()
        names.append(name)
        write(tmp_path / name, zarr_format=2, compressors=V2[codec])
        (tmp_path / name / "q/0.0.1.0").write_bytes(bomb)
    *said, grown = warm.printed(READ_ALL, *(str(tmp_path / name) for name in ("whole", *names))).splitlines()
    for name, line in zip(names, said, strict=True):
        assert f"array 'q' of {tmp_path / name}: chunk '0.0.1.0' " in line, name
        reasons = ("it decodes to more than the 256 bytes of a chunk", "the most that it can have")
        assert name == "blosc, size a lie" or any(reason in line for reason in reasons), line
    assert int(grown) < 32


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("codec", [ZstdCodec(), GzipCodec(), BloscCodec()], ids=["zstd", "gzip", "blosc"])
def test_bombs_within_shards_are_refused(tmp_path: Path, codec: Any, remote: bool) -> None:
    fsspec.filesystem("memory").store.clear()
    where = "memory://bombs" if remote else str(tmp_path)
    write(where, shards=(1, 1, 32, 8), compressors=codec)
    made = numcodecs.get_codec({"id": codec.to_dict()["name"]}).encode(bytes(CHUNK_BYTES + 1))
    filesystem, root = fsspec.url_to_fs(where)
    content = filesystem.cat(f"{root}/q/c/0/0/1/0")
    index = np.frombuffer(content[-36:-4], "<u8").copy()
    index[1] = len(made)
    shard = made + content[int(index[2]) : int(index[2] + index[3])]
    index[0], index[2] = 0, len(made)
    encoded = index.tobytes()
    crc = numcodecs.CRC32C(location="end").encode(np.frombuffer(encoded, "u1")).tobytes()
    filesystem.pipe(f"{root}/q/c/0/0/1/0", shard + crc)
    with pytest.raises(IntegrityError, match=r"'q/c/0/0/1/0'.*decodes to more than the 256 bytes of a chunk"):
        read(where)


@pytest.mark.parametrize("codecs", [[GzipCodec()], [ZstdCodec(), GzipCodec()], [Crc32cCodec()]])
def test_remote_objects_are_fetched_no_further_than_a_chunk_can_be(codecs: list[Any]) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    write("memory://large", compressors=codecs)
    memory.pipe("/large/q/c/0/0/1/0", bytes(MIB))
    with pytest.raises(IntegrityError, match="'q/c/0/0/1/0'"):
        read("memory://large")


WHOLE = {
    "zstd, size not stated": ("zstd", lambda data: zstd_frame([struct.pack("<I", 256 << 3 | 1)[:3] + data], None)),
    "zstd, two frames": ("zstd", lambda data: numcodecs.Zstd().encode(data[:9]) + numcodecs.Zstd().encode(data[9:])),
    "zstd, skippable": ("zstd", lambda data: SKIPPED + numcodecs.Zstd(checksum=True).encode(data) + SKIPPED),
    "gzip, two members and padding": ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]) + bytes(9)),
    "bz2, two streams": ("bz2", lambda data: bz2.compress(data[:9]) + bz2.compress(data[9:])),
    "lzma, alone": ("lzma", lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
}


@pytest.mark.parametrize(("codec", "encode"), WHOLE.values(), ids=WHOLE)
def test_chunks_of_other_writers_are_read(tmp_path: Path, codec: str, encode: Any) -> None:
    write(tmp_path, zarr_format=2, compressors=V2[codec])
    (tmp_path / "q/0.0.1.0").write_bytes(encode(DATA[0, 0, 16:32].tobytes()))
    np.testing.assert_array_equal(read(tmp_path), DATA[0, 0])


@pytest.mark.parametrize("compressor", V2.values(), ids=V2)
@pytest.mark.parametrize("kept", [0, 3, 15, 20, -1])
def test_a_chunk_that_is_cut_short_is_refused(tmp_path: Path, compressor: dict[str, Any], kept: int) -> None:
    write(tmp_path, zarr_format=2, compressors=compressor)
    chunk = tmp_path / "q/0.0.1.0"
    chunk.write_bytes(chunk.read_bytes()[:kept])
    with pytest.raises(IntegrityError, match=r"array 'q' of .*'0.0.1.0'"):
        read(tmp_path)


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


def test_filters_that_widen_are_counted_in_the_bound(tmp_path: Path) -> None:
    write(tmp_path / "plain", zarr_format=2, compressors=V2["zstd"])
    write(tmp_path / "wide", zarr_format=2, compressors=V2["zstd"], filters=[numcodecs.AsType("f8", "f2")])
    plain, wide = (Dataset.open(tmp_path / name).arrays["q"].decode_bytes for name in ("plain", "wide"))
    assert wide - (8 << 20) == 4 * (plain - (8 << 20)) > 0
    write(tmp_path / "text", zarr_format=2, compressors=V2["zstd"], filters=[numcodecs.AsType("f8", "f2")])
    metadata = tmp_path / "text/q/.zarray"
    metadata.write_text(metadata.read_text().replace('"<f2"', '"S1000000"').replace("float16", "S1000000"))
    with pytest.raises(ProblemError, match="S1000000"):
        Dataset.open(tmp_path / "text")
