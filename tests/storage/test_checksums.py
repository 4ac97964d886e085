"""Checksums are of what the elements are, whatever their storage, and what is recorded is validated."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from support import numpy_type

from oocattn import IntegrityError
from oocattn.records import from_json, to_json
from oocattn.storage.mapped_store import MappedStore
from oocattn.storage.results.checksums import (
    ArrayBits,
    Checksums,
    as_digits,
    read_bits,
    result_digest,
)
from oocattn.storage.results.rows import Damage, RowReader, checksum, find_damage

SHAPE, ROWS = (2, 3, 50, 4), 20


def test_checksums_are_of_little_endian_elements_in_c_order() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5
    expected = zlib.crc32(struct.pack("<6f", *rows.ravel()))
    assert checksum(rows) == checksum(rows.astype(">f4")) == checksum(np.asfortranarray(rows)) == expected
    assert checksum(rows[1:], checksum(rows[:1])) == expected
    assert as_digits(0xAB) == "000000ab"
    ones = np.ones(3, numpy_type("bfloat16"))
    assert checksum(ones) == zlib.crc32(bytes([0x80, 0x3F] * 3))


@pytest.mark.parametrize("wrong", ["0123ABCD", "0123abcg", 123, None, "0123abc\n"])
def test_only_hexadecimal_digits_are_checksums(wrong: object) -> None:
    content = {"algorithm": "crc32", "rows": 5, "digits": "0123abcd"}
    assert from_json(Checksums, content) == Checksums(5, "0123abcd")
    with pytest.raises(ValueError, match="digits is"):
        from_json(Checksums, {**content, "digits": wrong})


def written(folder: Path, dtype: str = "float16", **storage: Any) -> tuple[RowReader, Checksums, np.ndarray]:
    """An array of random numbers and its checksums."""
    data = np.random.default_rng(0).standard_normal(SHAPE).astype(numpy_type(dtype))
    array = zarr.create_array(folder / "a.zarr", data=data, **{"chunks": (1, 1, ROWS, 4), "compressors": None, **storage})
    digits = "".join(as_digits(checksum(data[b, h, i : i + ROWS])) for b, h, i in np.ndindex(2, 3, 41) if i % ROWS == 0)
    opened = zarr.open_array(MappedStore(folder / "a.zarr", read_only=True), mode="r")
    assert opened.dtype == array.dtype
    return RowReader("out", opened, "a.zarr"), Checksums(ROWS, digits), data


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"chunks": (2, 3, 7, 3)},
        {"compressors": "auto"},
        {"chunks": (1, 1, 10, 4), "shards": (2, 1, 30, 4)},
        {"serializer": {"name": "bytes", "configuration": {"endian": "big"}}},
    ],
)
def test_the_same_elements_are_as_they_were_written(tmp_path: Path, dtype: str, storage: dict[str, Any]) -> None:
    reader, recorded, _ = written(tmp_path, dtype, **storage)
    assert len(recorded) == 18
    for step, threads in ((1, 1), (8, 1), (8, 3), (1000, 3)):
        assert list(find_damage(reader, recorded, step, threads)) == []


def test_a_part_that_changed_is_named(tmp_path: Path) -> None:
    reader, recorded, data = written(tmp_path)
    zarr.open_array(tmp_path / "a.zarr", mode="r+")[1, 2, 45, 3] = data[1, 2, 45, 3] + 1
    (found,) = find_damage(reader, recorded, 8)
    assert (found.array, found.batch, found.head, found.start, found.stop) == ("out", 1, 2, 40, 50)
    assert recorded[17] in found.reason
    assert str(found).startswith("out, batch 1, head 2, tokens 40 to 49: checksum ")


def test_several_threads_name_damaged_parts_in_their_order(tmp_path: Path) -> None:
    reader, recorded, data = written(tmp_path)
    array = zarr.open_array(tmp_path / "a.zarr", mode="r+")
    array[0, :, 10:30] = data[0, :, 10:30] + 1
    (tmp_path / "a.zarr" / "c" / "1" / "0" / "1" / "0").unlink()
    expected = list(find_damage(reader, recorded, 7))
    assert [(found.batch, found.head, found.start) for found in expected] == [
        *((0, head, start) for head in range(3) for start in (0, 20)),
        (1, 0, 20),
    ]
    for threads in (2, 9):
        assert list(find_damage(reader, recorded, 7, threads)) == expected


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-2])])
@pytest.mark.parametrize("storage", [{}, {"compressors": "auto"}])
def test_a_chunk_that_is_missing_or_short_is_named_and_others_are_still_read(
    tmp_path: Path, change: Any, storage: dict[str, Any]
) -> None:
    reader, recorded, _ = written(tmp_path, **storage)
    change(tmp_path / "a.zarr" / "c" / "0" / "1" / "2" / "0")
    (found,) = find_damage(reader, recorded, 8)
    assert (found.batch, found.head, found.start, found.stop) == (0, 1, 40, 50)
    assert "missing" in found.reason or "cannot be decoded" in found.reason or "torn" in found.reason


@pytest.mark.parametrize(
    "attribute",
    [
        7,
        {},
        {"algorithm": "md5", "rows": 20, "digits": "0" * 144},
        {"algorithm": "crc32", "rows": 0, "digits": "0" * 144},
        {"algorithm": "crc32", "rows": "20", "digits": "0" * 144},
        {"algorithm": "crc32", "rows": 20, "digits": "0" * 143},
        {"algorithm": "crc32", "rows": 20, "digits": "x" * 144},
        {"algorithm": "crc32", "rows": 21, "digits": ["0"] * 144},
    ],
)
def test_an_attribute_that_is_not_ours_is_refused(tmp_path: Path, attribute: Any) -> None:
    group = zarr.create_group(tmp_path)
    group.create_array("lse", shape=SHAPE[:3], dtype="f4")
    array = group.create_array("out", shape=SHAPE, dtype="f2")
    assert read_bits(tmp_path)["out"] == ArrayBits(SHAPE, "float16", None)
    right = Checksums(20, "0123abcd" * 18)
    array.attrs["checksums"] = to_json(right)
    assert read_bits(tmp_path)["out"].checksums == right
    array.attrs["checksums"] = attribute
    with pytest.raises(IntegrityError, match=r"'checksums' is not the checksums of an array \[2, 3, 50, 4\]"):
        read_bits(tmp_path)


def test_the_digest_is_of_names_shapes_dtypes_and_checksums() -> None:
    def digest(
        shape: tuple[int, ...] = (1, 1, 4), dtype: str = "float32", digits: str = "01234567", name: str = "lse"
    ) -> str | None:
        return result_digest({name: ArrayBits(shape, dtype, Checksums(4, digits))})

    others = [digest((1, 1, 3)), digest(dtype="float16"), digest(digits="01234568"), digest(name="out")]
    assert len({digest(), *others}) == 5
    assert digest() == digest()


def test_the_words_of_a_damage() -> None:
    assert str(Damage("lse", 0, 3, 1000, 2000, "gone")) == "lse, batch 0, head 3, tokens 1,000 to 1,999: gone"
