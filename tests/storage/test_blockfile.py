"""A file of blocks gives back the bytes that were written, or an IntegrityError that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocattn import IntegrityError
from oocattn.storage.journal.blocks import read_blocks, write_blocks

LABEL = {"run": "abc", "work": [0, 1, 2]}

SIZES = st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=4), max_size=6)


def blocks_of(sizes: list[list[int]], seed: int = 0) -> list[list[np.ndarray]]:
    random = np.random.default_rng(seed)
    return [[random.standard_normal(size).astype(("f4", "f8", "f2")[size % 3]) for size in block] for block in sizes]


def read_all(path: Path, like: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    found = [[np.full_like(array, 7) for array in block] for block in like]
    assert list(read_blocks(path, found)) == list(range(len(like)))
    return found


@given(sizes=SIZES)
def test_blocks_are_read_as_they_were_written(fast_path: Path, sizes: list[list[int]]) -> None:
    path, blocks = fast_path / "blocks", blocks_of(sizes)
    assert write_blocks(path, blocks, LABEL) == path.stat().st_size
    for found, expected in zip(read_all(path, blocks), blocks, strict=True):
        for array, right in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array, right)
    assert [entry.name for entry in fast_path.iterdir()] == ["blocks"]


def test_many_blocks_need_a_longer_header(fast_path: Path) -> None:
    blocks = blocks_of([[3]] * 2000)
    write_blocks(fast_path / "blocks", blocks, LABEL)
    np.testing.assert_array_equal(read_all(fast_path / "blocks", blocks)[1999][0], blocks[1999][0])


def test_blocks_may_share_memory_when_they_are_used_one_by_one(fast_path: Path) -> None:
    blocks = blocks_of([[5], [5], [2]])
    write_blocks(fast_path / "blocks", blocks, LABEL)
    buffer = np.empty(5, blocks[0][0].dtype)
    shared = [[buffer], [buffer], [buffer[:2]]]
    for index in read_blocks(fast_path / "blocks", shared):
        np.testing.assert_array_equal(shared[index][0], blocks[index][0])


@given(position=st.integers(0, 5_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(fast_path: Path, position: int, bit: int) -> None:
    path, blocks = fast_path / "blocks", blocks_of([[100, 50], [30]])
    size = write_blocks(path, blocks, LABEL)
    content = bytearray(path.read_bytes())
    content[position % size] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = read_all(path, blocks)
    except IntegrityError:
        return
    assert position < 4096  # in the padding of the header, where it does no harm
    assert all(np.array_equal(*pair) for pair in zip(found[0] + found[1], blocks[0] + blocks[1], strict=True))


@given(length=st.integers(0, 5_000))
def test_a_file_cut_short_anywhere_is_found(fast_path: Path, length: int) -> None:
    path, blocks = fast_path / "blocks", blocks_of([[100, 50], [30]])
    size = write_blocks(path, blocks, LABEL)
    path.write_bytes(path.read_bytes()[: min(length, size - 1)])
    with pytest.raises(IntegrityError, match=str(path)):
        read_all(path, blocks)


def test_a_missing_file_is_named(fast_path: Path) -> None:
    with pytest.raises(IntegrityError, match="nothing: the file is missing"):
        list(read_blocks(fast_path / "nothing", []))


def test_blocks_before_the_damage_are_given_and_nothing_after(fast_path: Path) -> None:
    path, blocks = fast_path / "blocks", blocks_of([[100], [100], [100]])
    write_blocks(path, blocks, LABEL)
    content = bytearray(path.read_bytes())
    content[4096 + blocks[0][0].nbytes + 3] ^= 1
    path.write_bytes(content)
    reader = read_blocks(path, blocks_of([[100], [100], [100]]))
    assert next(reader) == 0
    with pytest.raises(IntegrityError, match="block 1 is damaged"):
        next(reader)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not JSON\n",
        b"{}\n",
        b"[]\n",
        b'{"blocks": 7}\n',
        b'{"blocks": [[1]]}\n',
        b'{"blocks": [["a", 2]]}\n',
        b"\xff\xfe\n",
    ],
)
def test_a_header_that_is_not_ours_is_refused(fast_path: Path, header: bytes) -> None:
    path = fast_path / "blocks"
    path.write_bytes(header)
    with pytest.raises(IntegrityError, match="the record is damaged"):
        list(read_blocks(path, blocks_of([[1]])))


def test_another_number_or_size_of_blocks_is_refused(fast_path: Path) -> None:
    path = fast_path / "blocks"
    write_blocks(path, blocks_of([[3], [4]]), LABEL)
    with pytest.raises(IntegrityError, match="2 blocks, expected 1"):
        list(read_blocks(path, blocks_of([[3]])))
    with pytest.raises(IntegrityError, match="block 0 is damaged"):
        list(read_blocks(path, blocks_of([[30], [4]])))


def test_a_failed_write_leaves_the_old_file(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, blocks = fast_path / "blocks", blocks_of([[3]])
    write_blocks(path, blocks, LABEL)
    monkeypatch.setattr("os.replace", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_blocks(path, blocks_of([[3]], seed=1), LABEL)
    np.testing.assert_array_equal(read_all(path, blocks)[0][0], blocks[0][0])
