"""Small files that claim to be, or are, large ones."""

import struct
import zlib

import numcodecs

CHUNK_BYTES = 256


MIB = 1 << 20


def zstd_frame(blocks: list[bytes], stated: int | None) -> bytes:
    size = b"\x00\x38" if stated is None else b"\xe0" + struct.pack("<Q", stated)
    return struct.pack("<I", 0xFD2FB528) + size + b"".join(blocks)


def zstd_repeated(size: int, last: bool) -> bytes:
    return struct.pack("<I", size << 3 | 2 | last)[:3] + b"\0"


BIG_BLOCKS = [zstd_repeated(1 << 17, number == 2047) for number in range(2048)]  # 256 MiB


SKIPPED = struct.pack("<II", 0x184D2A50, 3) + b"abc"


ZEROS = bytes(16 * MIB)


def zlib_bomb() -> bytes:
    stream = zlib.compressobj(1)
    return b"".join([*(stream.compress(ZEROS) for _ in range(4)), stream.flush()])


def lying_blosc() -> bytes:
    content = bytearray(numcodecs.Blosc("lz4").encode(bytes(4 * MIB)))
    content[4:8] = struct.pack("<I", CHUNK_BYTES)
    return bytes(content)
