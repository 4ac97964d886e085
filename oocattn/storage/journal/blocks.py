"""Checksummed files of array blocks: partials and checkpoints.

A file is a record, `{"blocks": [[bytes, crc32], ...], "label": {...}}`, padded to 4,096 bytes or a multiple, and then
the raw bytes of the blocks. What blocks and label mean is the caller's business.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocattn.errors import IntegrityError
from oocattn.records import Count, from_json
from oocattn.storage.files.durable import decode_record, encode_record, write_durably
from oocattn.storage.files.operations import name_failure, shows_damage
from oocattn.storage.files.regular import open_regular
from oocattn.units import ceil_div

_PAGE = 4096
_MAX_HEADER = 1 << 24
_STEP = 1 << 20

Block = Sequence[npt.NDArray[np.generic]]


@dataclass(frozen=True)
class _Header:
    """Bytes and CRC-32 of each block, and the label."""

    blocks: tuple[tuple[Count, Count], ...]
    label: Mapping[str, Any]


def write_blocks(path: Path, blocks: Sequence[Block], label: Mapping[str, Any]) -> int:
    """Write blocks of C-contiguous arrays durably; return the bytes written."""
    entries = []
    for block in blocks:
        checksum = 0
        for array in block:
            checksum = zlib.crc32(_raw(array), checksum)
        entries.append([sum(array.nbytes for array in block), checksum])
    header = encode_record({"blocks": entries, "label": label}).rstrip()
    header = header.ljust(ceil_div(len(header) + 1, _PAGE) * _PAGE - 1) + b"\n"
    return write_durably(path, itertools.chain([np.frombuffer(header, np.uint8)], *blocks))


def read_label(path: Path) -> Mapping[str, Any]:
    """Read the label of a file. Raises IntegrityError where it is missing or its header is damaged."""
    with _open_blocks(path) as file:
        return _read_header(path, file).label


def read_blocks(path: Path, blocks: Sequence[Block]) -> Iterator[int]:
    """Read blocks into the caller's arrays; yield the index of each whole one.

    The arrays of different blocks may be the same memory: use what was read before asking for the next. Raises
    IntegrityError, naming the file, where it is missing, short, or does not match its checksums.
    """
    with _open_blocks(path) as file:
        entries = _read_header(path, file).blocks
        if len(entries) != len(blocks):
            raise IntegrityError(f"{path}: {len(entries)} blocks, expected {len(blocks)}")
        for index, (block, (size, expected)) in enumerate(zip(blocks, entries, strict=True)):
            checksum = found = 0
            for array in block:
                found += file.readinto(_raw(array))
                checksum = zlib.crc32(_raw(array), checksum)
            if found != size or checksum != expected:
                raise IntegrityError(f"{path}: block {index} is damaged (checksum {checksum:08x}, expected {expected:08x})")
            yield index


def is_whole(path: Path) -> bool:
    """Whether the blocks of a file match their checksums. Raises OSError where that is not known."""
    step = bytearray(_STEP)
    try:
        with _open_blocks(path) as file:
            for size, expected in _read_header(path, file).blocks:
                checksum, left = 0, size
                while left and (count := file.readinto(memoryview(step)[: min(left, _STEP)])):
                    checksum, left = zlib.crc32(memoryview(step)[:count], checksum), left - count
                if left or checksum != expected:
                    return False
    except (IntegrityError, OSError) as error:
        if not shows_damage(error):
            raise
        return False
    return True


@contextmanager
def _open_blocks(path: Path) -> Iterator[BufferedReader]:
    try:
        with (
            open_regular(path, follow=False) as descriptor,
            open(descriptor, "rb", closefd=False) as file,
            name_failure("read", path),
        ):
            yield file
    except FileNotFoundError:
        raise IntegrityError(f"{path}: the file is missing") from None


def _raw(array: npt.NDArray[np.generic]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read_header(path: Path, file: BufferedReader) -> _Header:
    try:
        return from_json(_Header, decode_record(file.readline(_MAX_HEADER), path))
    except ValueError as error:
        raise IntegrityError(f"{path}: not the header of a file of blocks ({error})") from None
