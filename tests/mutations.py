"""Ways to damage a file: other nodes in its place, other bytes, other values in its JSON with checksums that fit."""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numcodecs.checksum32 import CRC32C

DEEP = "@deep@"
"""Stands for brackets that the json module would not write."""

NASTY: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**34, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**400, -(2**63)),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, 1e-300, math.nan, math.inf, -math.inf, 1.0, 2.0),
    *("", "nan", "inf", "0", "x", "\x1b[2J\n", "\u202e\ud800", "a\0b", "..", "/", "../../etc", "é" * 5000, "1" * 5000),
    *("dask://127.0.0.1:1/x", "ftp://127.0.0.1:1/x", "s3://x/y", "http://127.0.0.1:1/x", "zip::http://127.0.0.1:1/x"),
    *("/dev/zero", "/proc/self/mem", "/tmp/a\nb", "file:///etc", "victim", "../victim", "/nowhere/plain.zarr"),
    *("pickle", "vlen-utf8", "json2", "numcodecs.pickle", "zstd", "numcodecs.zlib", "sharding_indexed", "bytes"),
    *("float16", "bfloat16", "float64", "int32", "<f8", "|O", "object", "<M8[ns]", "cpu", "cudnn", "torch", "reference"),
    *("cuda", "cqs", "strips", "disk", "memory", "big", "v2", "C", "F", "plain.zarr", "result-00000000.zarr"),
    *([], {}, None, True, False, [[]], [[[[[]]]]], [1, 2, 3], [0], [None], {"id": "pickle"}, {"name": "numcodecs.pickle"}),
    *({"name": "vlen-utf8", "configuration": {}}, {"name": "numcodecs.zlib", "configuration": {"level": 1}}),
    *({"id": "zlib", "level": 1}, {"": ""}, [0] * 1000, [2**40] * 4, DEEP),
)
"""Values that a reader may not expect."""


class Bomb:
    """Unpickled, it makes a folder among the files of somebody else."""

    def __init__(self, place: Path) -> None:
        self._place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._place,)


def replace_node(path: Path, victim: Path, random: Random) -> str:
    """Put something at a path that is no file of its own; return what."""
    how = random.choice(
        (
            "nothing",
            "fifo",
            "folder",
            "socket",
            "file to file",
            "file to folder",
            "to itself",
            "zero",
            "dangling",
            "hard",
            "sparse",
        )
    )
    targets = {
        "file to file": victim / random.choice(("thesis.txt", "data.json")),
        "file to folder": victim,
        "to itself": path,
        "zero": Path("/dev/zero"),
        "dangling": victim.parent / "nowhere" / "at all",
    }
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
        if random.random() < 0.5:
            (path / "thesis.txt").write_text("precious")
    elif how == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # such a path may have a hundred characters
        try:
            socket.socket(socket.AF_UNIX).bind(path.name[:90])
        finally:
            os.chdir(here)
    elif how in targets:
        path.symlink_to(targets[how])
    elif how == "hard":
        os.link(victim / "data.json", path)
    elif how == "sparse":
        with open(path, "wb") as file:
            file.truncate(2 ** random.choice((20, 31, 33, 40)))
    return how


def other_bytes(content: bytes, sibling: bytes, victim: Path, random: Random) -> tuple[bytes, str]:
    """Other content of a file, perhaps that of its `sibling`, and in a word how it was made."""
    way = random.choice(
        ("flip", "flip", "flip", "cut", "junk", "longer", "empty", "insert", "sibling", "pickle", "deep", "text")
    )
    place = random.randrange(len(content) + 1)
    if way == "flip":
        changed = bytearray(content)
        for _ in range(random.choice((1, 1, 8)) if content else 0):
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        return bytes(changed), way
    texts = (
        b"null",
        b"[]",
        b"{}",
        b"NaN",
        b"Infinity",
        b"1e400",
        b"9" * 5000,
        b"\xff\xfe{}",
        b'"\xed\xa0\x80"',
        b"\0",
        b"\n",
    )
    made: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[:place],
        "junk": lambda: random.randbytes(random.choice((1, len(content), 1 << 22))),
        "longer": lambda: content + random.choice((b"\0", b"\n", b" " * 5000, random.randbytes(1 << 22))),
        "empty": lambda: b"",
        "insert": lambda: (
            content[:place] + random.randbytes(random.randrange(1, 9)) + content[place + random.randrange(9) :]
        ),
        "sibling": lambda: sibling,
        "pickle": lambda: pickle.dumps(Bomb(victim / "bomb")),
        "deep": lambda: random.choice((b"[", b'{"a":')) * 100_000,
        "text": lambda: random.choice(texts),
    }
    return made[way](), way


def is_json(content: bytes) -> bool:
    """Whether there is a JSON object in a file, after a checksum or not."""
    return _split(content)[1] is not None


def _split(content: bytes) -> tuple[str, Any, bytes]:
    """Kind, JSON value and what follows it: of plain JSON, of a record, of the header of a file of blocks; else None."""
    line, _newline, rest = content.partition(b"\n")
    for kind, text, after in (("plain", content, b""), ("record", line[9:], rest)):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict):
            return ("header" if kind == "record" and len(line) > len(line.rstrip()) else kind), found, after
    return "none", None, b""


def other_json(content: bytes, random: Random) -> bytes:
    """The same file with something else somewhere in its JSON, and checksums that fit."""
    kind, value, after = _split(content)
    for _ in range(random.choice((1, 1, 1, 2))):
        value = other_value(value, random)
    if kind == "plain":
        return dumps(value).encode("utf-8", "surrogatepass")
    text = dumps(value).encode("utf-8", "surrogatepass")
    line = b"%08x %s" % (zlib.crc32(text), text)
    if kind == "header":
        line = line.ljust(-(-(len(line) + 1) // 4096) * 4096 - 1)
    return line + b"\n" + after


def dumps(value: Any) -> str:
    """JSON, of whatever it is."""
    deep = "[" * 50_000 + "]" * 50_000
    return json.dumps(value, sort_keys=True).replace(json.dumps(DEEP), deep)


def other_value(value: Any, random: Random) -> Any:
    """A JSON value of which one part, at any depth, is another."""
    paths = list(_paths(value))
    *parents, last = random.choice(paths[1:] or [("",)])
    place = value
    for key in parents:
        place = place[key]
    if last == "":
        return random.choice(NASTY)
    if random.random() < 0.05:
        place[last] = DEEP
        return value
    way = random.choice(("replace", "replace", "replace", "remove", "add", "near", "near"))
    if way == "remove":
        del place[last]
    elif way == "add" and isinstance(place, dict):
        place[random.choice(("", "extra", "__class__", "\x1b[2J", "zarr_format", "id"))] = random.choice(NASTY)
    elif way == "add":
        place.extend([random.choice(NASTY)] if random.random() < 0.5 else place * random.choice((1, 1000)))
    elif way == "near":
        place[last] = _near(place[last], random)
    else:
        place[last] = random.choice(NASTY)
    return value


def _near(value: Any, random: Random) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice((value + 1, value - 1, value * 2, -value, value * 1000, type(value)(value / 2)))
    if isinstance(value, str):
        changed = (value[:-1], value + "0", value[::-1], value + "\n", value * 100)
        return random.choice(changed)
    if isinstance(value, list):
        return random.choice((value[::-1], value[:-1], value * 2, [*value, 0]))
    return value


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*at, key))


def other_index(content: bytes, random: Random) -> bytes:
    """A shard of four chunks with another offset or length in its index, and a checksum that fits."""
    index = np.frombuffer(content[-68:-4], "<u8").copy()
    values = (0, 1, 64, len(content), 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
    for _ in range(random.choice((1, 1, 8))):
        index[random.randrange(8)] = random.choice(values)
    encoded = bytes(CRC32C().encode(index.tobytes()))
    return content[:-68] + encoded
