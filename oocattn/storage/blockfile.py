"""Checksummed files of array blocks: what a run keeps on disk between computing it and needing it again.

A file is one JSON line, `{"blocks": [[bytes, crc32], ...]}`, padded to 4,096 bytes or a multiple, and then the raw bytes of
the blocks. It is written under a temporary name and renamed, so a file under its final name is whole; the checksums find
what happened to it since. What the blocks mean is the caller's business.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from oocattn.errors import IntegrityError

_PAGE = 4096
_MAX_HEADER = 1 << 24

Block = Sequence[npt.NDArray[np.generic]]


def write_blocks(path: Path, blocks: Sequence[Block]) -> int:
    """Write blocks, each a sequence of C-contiguous arrays, under `path`; return the bytes written."""
    entries = []
    for block in blocks:
        checksum = 0
        for array in block:
            checksum = zlib.crc32(_raw(array), checksum)
        entries.append([sum(array.nbytes for array in block), checksum])
    header = json.dumps({"blocks": entries}).encode()
    header += b" " * (-(len(header) + 1) % _PAGE) + b"\n"
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(header)
        for block in blocks:
            for array in block:
                file.write(_raw(array))
    os.replace(temporary, path)
    return len(header) + sum(size for size, _ in entries)


def read_blocks(path: Path, blocks: Sequence[Block]) -> Iterator[int]:
    """Read a file's blocks one after another into the caller's arrays; yield each block's index once it is whole.

    The arrays of different blocks may be the same memory: use what was read before asking for the next. Raises
    IntegrityError, naming the file, where it is missing, short, or does not match its checksums.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise IntegrityError(f"{path}: the file is missing") from None
    with file:
        entries = _read_header(path, file.readline(_MAX_HEADER))
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


def _raw(array: npt.NDArray[np.generic]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read_header(path: Path, line: bytes) -> list[tuple[int, int]]:
    try:
        entries = json.loads(line)["blocks"]
        return [(int(size), int(checksum)) for size, checksum in entries]
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: the header is damaged") from None
