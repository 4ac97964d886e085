"""Sizes of zstd frames, by the headers alone (RFC 8878, section 3.1)."""

from __future__ import annotations

_FRAME, _SKIPPABLE = 0xFD2FB528, 0x184D2A50

_RAW, _REPEATED = 0, 1
"""Kinds of a block: its bytes as they are, one byte so many times; others are compressed."""

MOST_BLOCK_BYTES = 1 << 17
"""What a compressed block holds at most."""

MOST_BLOCKS = 1 << 18
"""Blocks that are looked at: there is one for each 128 KiB, or for what was flushed."""


def first_size(content: memoryview) -> int | None:
    """The size that the first frame states, or None."""
    try:
        return _header(content, 4)[0] if _number(content, 0, 4) == _FRAME else None
    except ValueError:
        return None


def frame_sizes(content: memoryview) -> tuple[int | None, int]:
    """The size that all frames state, or None, and the most they can hold.

    Raises ValueError where there is something other than whole frames.
    """
    position, stated, most, seen, all_state = 0, 0, 0, 0, True
    while position < len(content):
        magic, seen = _number(content, position, 4), seen + 1
        if magic & ~0xF == _SKIPPABLE:
            position += 8 + _number(content, position + 4, 4)
        elif magic == _FRAME:
            size, checksum, position = _header(content, position + 4)
            all_state, stated = all_state and size is not None, stated + (size or 0)
            last = False
            while not last and seen <= MOST_BLOCKS:
                last, held, position = _block(content, position)
                most, seen = most + held, seen + 1
            position += checksum
        else:
            raise ValueError("it is not a zstd frame")
        if seen > MOST_BLOCKS:
            raise ValueError(f"it has more than {MOST_BLOCKS:,} zstd blocks")
    return stated if all_state else None, most


def _header(content: memoryview, position: int) -> tuple[int | None, int, int]:
    """A frame's stated size, its checksum's bytes, and where its blocks begin."""
    descriptor = _number(content, position, 1)
    single, checksum = descriptor >> 5 & 1, 4 * (descriptor >> 2 & 1)
    nbytes = (single, 2, 4, 8)[descriptor >> 6]
    begin = position + 1 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    size = _number(content, begin, nbytes) + (256 if nbytes == 2 else 0) if nbytes else None
    return size, checksum, begin + nbytes


def _block(content: memoryview, position: int) -> tuple[bool, int, int]:
    """Whether a block is the last, the most bytes in it, and where it ends."""
    header = _number(content, position, 3)
    kind, size = header >> 1 & 3, header >> 3
    held = size if kind in (_RAW, _REPEATED) else MOST_BLOCK_BYTES
    return bool(header & 1), held, position + 3 + (1 if kind == _REPEATED else size)


def _number(content: memoryview, start: int, nbytes: int) -> int:
    if start + nbytes > len(content):
        raise ValueError(f"it ends early, after {len(content):,} bytes")
    return int.from_bytes(content[start : start + nbytes], "little")
