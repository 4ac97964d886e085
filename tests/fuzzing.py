"""Random damage to what lies on disk, and what must hold of a command that meets it. A seed determines a case."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import socket
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import zarr
from distributed import Client
from numcodecs.checksum32 import CRC32C
from support import carry_out, normal_arrays, plan_for, replanned, write_dataset
from test_resuming import interrupted

import oocattn
from oocattn import Plan
from oocattn.kernels import get_kernel
from oocattn.records import from_json
from oocattn.storage.durable import encode_record
from oocattn.stored_plan import read_plan

LIMIT_SECONDS = 10.0
"""For any command on any bytes."""

LIMIT_BYTES = 1 << 30
"""Of memory that a command may take beyond what it has as it starts."""

EXITS = (0, 1, 3)

RESULTS = {"memory.zarr": "unfinished", "disk.zarr": "unfinished", "finished.zarr": "finished"}
DATASETS = ("plain.zarr", "v2.zarr", "sharded.zarr")

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


@dataclass(frozen=True)
class Kept:
    """A file as it was, its content None for a folder; `mark` changes with each way of changing it."""

    content: bytes | None
    modified: int = 0
    mark: tuple[int, ...] = ()


@dataclass
class World:
    """Datasets, results and a stranger's files in one folder, and all of it as it was made."""

    folder: Path
    kept: dict[str, Kept] = field(default_factory=dict)
    right: dict[str, bytes] = field(default_factory=dict)

    @property
    def victim(self) -> Path:
        """Files of somebody else."""
        return self.folder / "victim"

    def restore(self, *touched: str) -> None:
        """Bring everything back; `touched` may differ without showing it."""
        for name in touched:
            _remove(self.folder / name)
        for name, path in list(_tree(self.folder)):
            if name not in self.kept or not self._is_as_kept(name, path):
                _remove(path)
        for name, kept in sorted(self.kept.items()):
            path = self.folder / name
            if kept.content is None:
                path.mkdir(exist_ok=True)
            elif not os.path.lexists(path):
                path.write_bytes(kept.content)
                os.utime(path, ns=(kept.modified, kept.modified))
                self.kept[name] = Kept(kept.content, kept.modified, _mark(path))

    def keep(self) -> None:
        """Remember everything as it is now."""
        for name, path in _tree(self.folder):
            status = os.lstat(path)
            content = None if stat.S_ISDIR(status.st_mode) else path.read_bytes()
            self.kept[name] = Kept(content, status.st_mtime_ns, _mark(path))

    def changed(self, damaged: set[str], own: tuple[str, ...]) -> list[str]:
        """What is not as it was kept, but for what was damaged and what a command may change."""
        found = dict(_tree(self.folder))
        names = found.keys() | self.kept.keys()
        spared = (*damaged, *own)
        foreign = [name for name in names if not any(name == each or name.startswith(f"{each}/") for each in spared)]
        return [
            name for name in foreign if name not in self.kept or name not in found or not self._is_as_kept(name, found[name])
        ]

    def _is_as_kept(self, name: str, path: Path) -> bool:
        kept = self.kept[name]
        return stat.S_ISDIR(os.lstat(path).st_mode) if kept.content is None else _mark(path) == kept.mark


def _mark(path: Path) -> tuple[int, ...]:
    status = os.lstat(path)
    return stat.S_IFMT(status.st_mode), status.st_ino, status.st_size, status.st_mtime_ns


def _tree(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            yield path.relative_to(folder).as_posix(), path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_world(folder: Path, client: Client) -> World:
    """Datasets of each kind, runs that were interrupted with partials in memory and on disk, and a finished result."""
    arrays = normal_arrays(170, heads=4, kv_heads=2)
    plain = write_dataset(folder / "plain.zarr", arrays, chunk_rows=64)
    sharded = {"shards": (1, 1, 128, 8), "chunk_rows": 32}
    write_dataset(folder / "sharded.zarr", arrays, **sharded)
    group = zarr.open_group(folder / "v2.zarr", mode="w", zarr_format=2)
    for name, data in zip("qkv", arrays, strict=True):
        group.create_array(name, shape=data.shape, dtype=data.dtype, chunks=(1, 1, 64, 8))[...] = data
    world = World(folder)
    world.victim.mkdir()
    (world.victim / "thesis.txt").write_text("precious")
    (world.victim / "data.json").write_text("{}")
    plan = plan_for(plain, chunks=7, causal=True)
    finished = carry_out(plan, plain, folder / "finished.zarr", client).path
    oocattn.verify(finished)
    for partials in ("memory", "disk"):
        interrupted(plan_for(plain, chunks=7, causal=True, partials=partials), plain, folder / f"{partials}.zarr", client)
    world.right = _bits(finished)
    world.keep()
    return world


# Damage


@dataclass(frozen=True)
class Case:
    """What a seed makes of a world: the paths that it damaged, how, and the command that meets it."""

    seed: int
    damaged: tuple[str, ...]
    how: str
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.how} of {', '.join(self.damaged)}; {' '.join(self.command)}"


def make_case(world: World, seed: int) -> Case:
    """Damage something of a world."""
    random = Random(seed)
    if seed % 20 == 0:
        name, how = _other_plan(world, random)
        command = random.choice(("status", "status", "resume")), str(world.folder / name.removesuffix(".oocattn/plan.json"))
        return Case(seed, (name,), how, command)
    if seed % 20 == 10:
        names, how = _other_arrays(world, random)
        return Case(seed, names, how, _choose_command(world, names[0], random))
    name = _choose_target(world, random, seed)
    how = _damage(world, name, random)
    return Case(seed, (name,), how, _choose_command(world, name, random))


def _other_plan(world: World, random: Random) -> tuple[str, str]:
    """Write a plan whose numbers fit each other into a journal, however large they are."""
    name = f"{random.choice(('memory', 'disk'))}.zarr.oocattn/plan.json"
    content = world.kept[name].content or b""
    header = json.loads(content[9:])
    plan = replace(from_json(Plan, header["plan"]), device_memory=2**96, host_memory=2**96)
    for _ in range(50):
        problem = {"tokens": 2 ** random.randrange(1, 48), "scale": 10.0 ** random.randrange(-300, 300)}
        problem |= {
            "batch": 2 ** random.randrange(40),
            "causal": random.random() < 0.5,
            "head_dim": random.randrange(1, 257),
        }
        problem["kv_heads"] = 2 ** random.randrange(48)
        problem["query_heads"] = problem["kv_heads"] * 2 ** random.randrange(20)
        kept = random.sample(sorted(problem), random.randrange(len(problem)))
        changed = {field: value for field, value in problem.items() if field in kept}
        strips = random.random() < 0.5
        chosen = {"chunks": random.choice((1, 2, 7, 100, 1024, 8192, 9507)), "decomposition": "strips" if strips else "cqs"}
        chosen |= {
            "span": random.randrange(1, 3) if strips else 0,
            "partials": "disk" if not strips and random.random() < 0.5 else "memory",
        }
        of_machine = (
            {"lanes": 2 ** random.randrange(11), "threads": 2 ** random.randrange(11)} if random.random() < 0.5 else {}
        )
        inputs = replace(plan.inputs, align_rows=random.choice((1, 64, 2**40)))
        with suppress(ValueError, ArithmeticError):
            changed_problem = replace(plan.problem, **changed)
            accumulators = 2 if chosen["partials"] == "disk" else chosen["chunks"]
            other = replanned(
                replace(plan, problem=changed_problem, inputs=inputs), accumulators=accumulators, **chosen, **of_machine
            )
            found = read_plan(other.to_json(), lambda kernel, _: get_kernel(kernel).scratch_bytes)
            (world.folder / name).write_bytes(encode_record({**header, "plan": found.to_json()}))
            return name, "another plan"
    return name, "the same plan"


def _other_arrays(world: World, random: Random) -> tuple[tuple[str, ...], str]:
    """Change the metadata of q, k and v of a dataset in the same way."""
    dataset = random.choice(DATASETS)
    names = tuple(f"{dataset}/{name}/{'.zarray' if dataset == 'v2.zarr' else 'zarr.json'}" for name in "qkv")
    contents = [json.loads(world.kept[name].content or b"") for name in names]
    if random.random() < 0.5:
        seed = random.random()
        contents = [_changed(content, Random(seed)) for content in contents]
    else:
        tokens, head_dim = 2 ** random.randrange(1, 48), random.choice((1, 8, 256))
        heads, chunk = 2 ** random.randrange(48), random.choice(("whole", "one", "same"))
        shape = random.choice(([1, heads, tokens, head_dim], [1, 4, tokens, 8], [1, heads, 170, 8]))
        for content in contents:
            grid = content if "chunks" in content else content["chunk_grid"]["configuration"]
            place = "chunks" if "chunks" in content else "chunk_shape"
            content["shape"] = shape
            if chunk != "same":
                grid[place] = content["shape"] if chunk == "whole" else [1, 1, 1, 1]
    for name, content in zip(names, contents, strict=True):
        (world.folder / name).write_text(_dumps(content), "utf-8", "surrogatepass")
    return names, "other arrays"


def _choose_target(world: World, random: Random, turn: int) -> str:
    """A path; kinds of files take turns, or most would be chunks."""
    kind = random.choices(("state", "result", "dataset", "planted", "folder"), (10, 4, 6, 2, 1))[0]
    if kind == "planted":
        result = random.choice(list(RESULTS))
        state, digits = f"{result}.oocattn", "9" * random.choice((1, 20, 100))
        names = ("lock", "lock", "other-bits.json", "plan.json", "status.json", "report.json", "certificate.json")
        names += ("replaced.zarr", "trash-01234567", "result-00000000.zarr", "partials", "finished")
        inside = (f"partials/partial-0-0-{digits}", f"partials/partial-{digits}-0-0", "partials/partial-\u0660-0-0")
        inside += ("finished/0-0.json", f"finished/{digits}-0.json", "finished/-.json", "finished/\u0660-\u0661.json")
        place = random.choice((*names, *inside) if RESULTS[result] == "unfinished" else names)
        return f"{state}/{place}"
    patterns = {
        "state": r"[a-z]+\.zarr\.oocattn/.*",
        "result": r"(finished\.zarr|(memory|disk)\.zarr\.oocattn/result-[0-9a-f]+\.zarr)/.*",
        "dataset": r"(plain|v2|sharded)\.zarr/.*",
        "folder": r"(plain|v2|sharded|finished)\.zarr(/[a-z])?|.*\.oocattn(/(?!.*zarr\.json)[^/]+)?",
    }
    wanted = [
        name
        for name, kept in world.kept.items()
        if re.fullmatch(patterns[kind], name) and (kept.content is None) == (kind == "folder")
    ]
    kinds = sorted({_kind_of(name) for name in wanted})
    chosen = kinds[turn % len(kinds)]
    return random.choice(sorted(name for name in wanted if _kind_of(name) == chosen))


def _kind_of(name: str) -> str:
    return re.sub(r"(?<![a-z])[0-9][0-9a-f.-]*", "N", re.sub(r"result-[0-9a-f]+", "growing", name))


def _choose_command(world: World, name: str, random: Random) -> tuple[str, ...]:
    top = name.split("/", 1)[0].removesuffix(".oocattn")
    if top in RESULTS:
        command = random.choice(
            ("status", "resume", "resume") if RESULTS[top] == "unfinished" else ("status", "verify", "verify", "resume")
        )
        command = "verify" if random.random() < 0.05 else command
        return command, str(world.folder / top)
    dataset = str(world.folder / top)
    commands: list[tuple[str, ...]] = [
        ("plan", dataset),
        ("verify", str(world.folder / "finished.zarr"), "--dataset", dataset),
    ]
    if top == "plain.zarr":
        commands += [("resume", str(world.folder / "memory.zarr")), ("resume", str(world.folder / "disk.zarr"))]
    return random.choice(commands)


def _damage(world: World, name: str, random: Random) -> str:
    """Replace a file or a folder; return in words by what."""
    path, kept = world.folder / name, world.kept.get(name)
    content = None if kept is None else kept.content
    if content is None and random.random() < 0.5:
        content = _sibling(world, name, random)
    ways: list[tuple[int, Callable[[], str]]] = [(2, lambda: _replace_node(world, path, random))]
    if content is not None:
        found = content
        ways.append((3, lambda: _write(path, *_bytes(world, found, name, random))))
        if _split(found)[1] is not None:
            ways.append((8, lambda: _write(path, _json(found, random), "JSON")))
        elif len(found) > 100 and "sharded" in name:
            ways.append((6, lambda: _write(path, _shard_index(found, random), "shard index")))
    _remove(path)
    path.parent.mkdir(exist_ok=True)
    way = random.choices([way for _, way in ways], [weight for weight, _ in ways])[0]
    how = way()
    status = os.lstat(path) if os.path.lexists(path) else None
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or random.random() < 0.5:
        return how
    if kept is not None:
        os.utime(path, ns=(kept.modified, kept.modified))  # hides it
    elif name.endswith("/lock"):
        moment = random.choice((0, 1, 2**33))
        os.utime(path, (moment, moment))
    return how


def _write(path: Path, content: bytes, how: str) -> str:
    path.write_bytes(content)
    return how


def _sibling(world: World, name: str, random: Random) -> bytes | None:
    if name.endswith("/lock"):
        holder = {"host": "elsewhere", "process": 17, "kernel": "another", "token": "a token"}
        return json.dumps(holder).encode()
    if name.endswith("other-bits.json"):
        return encode_record({"run": "0" * 32, "words": "\x1b[2J"})
    ending = Path(name).suffix
    names = [other for other, kept in world.kept.items() if kept.content and Path(other).suffix == ending]
    return world.kept[random.choice(sorted(names))].content if names else None


def _replace_node(world: World, path: Path, random: Random) -> str:
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
        "file to file": world.victim / random.choice(("thesis.txt", "data.json")),
        "file to folder": world.victim,
        "to itself": path,
        "zero": Path("/dev/zero"),
        "dangling": world.folder / "nowhere" / "at all",
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
        os.link(world.victim / "data.json", path)
    elif how == "sparse":
        with open(path, "wb") as file:
            file.truncate(2 ** random.choice((20, 31, 33, 40)))
    return how


def _bytes(world: World, content: bytes, name: str, random: Random) -> tuple[bytes, str]:
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
        "sibling": lambda: _sibling(world, name, random) or b"",
        "pickle": lambda: pickle.dumps(Bomb(world.victim / "bomb")),
        "deep": lambda: random.choice((b"[", b'{"a":')) * 100_000,
        "text": lambda: random.choice(texts),
    }
    return made[way](), way


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


def _json(content: bytes, random: Random) -> bytes:
    """The same file with something else somewhere in its JSON, and checksums that fit."""
    kind, value, after = _split(content)
    for _ in range(random.choice((1, 1, 1, 2))):
        value = _changed(value, random)
    if kind == "plain":
        return _dumps(value).encode("utf-8", "surrogatepass")
    text = _dumps(value).encode("utf-8", "surrogatepass")
    line = b"%08x %s" % (zlib.crc32(text), text)
    if kind == "header":
        line = line.ljust(-(-(len(line) + 1) // 4096) * 4096 - 1)
    return line + b"\n" + after


def _dumps(value: Any) -> str:
    deep = "[" * 50_000 + "]" * 50_000
    return json.dumps(value, sort_keys=True).replace(json.dumps(DEEP), deep)


def _changed(value: Any, random: Random) -> Any:
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


def _shard_index(content: bytes, random: Random) -> bytes:
    """A shard of four chunks with another offset or length in its index, and a checksum that fits."""
    index = np.frombuffer(content[-68:-4], "<u8").copy()
    values = (0, 1, 64, len(content), 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
    for _ in range(random.choice((1, 1, 8))):
        index[random.randrange(8)] = random.choice(values)
    encoded = bytes(CRC32C().encode(index.tobytes()))
    return content[:-68] + encoded


# What must hold


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `events` are what it did that it may not do, `grown` the bytes of memory that it took."""

    code: int
    seconds: float
    out: str
    err: str
    events: tuple[str, ...] = ()
    grown: int = 0


def complaints(world: World, case: Case, outcome: Outcome) -> list[str]:
    """What does not hold of a command."""
    found = [f"it {event}" for event in outcome.events]
    if outcome.code not in EXITS:
        found.append(f"exit code {outcome.code}")
    if outcome.seconds > LIMIT_SECONDS:
        found.append(f"it took {outcome.seconds:.1f} s")
    if outcome.grown > LIMIT_BYTES:
        found.append(f"it took {outcome.grown >> 20:,} MiB")
    if "Traceback" in outcome.err:
        found.append("a traceback")
    if any(ord(character) < 32 and character != "\n" for character in outcome.out + outcome.err):
        found.append("control characters")
    lines = outcome.err.splitlines()
    if outcome.code == 1 and not _said(case, outcome) and not (lines and lines[-1].startswith("oocattn: ")):
        found.append("no line on standard error that says why")
    result = Path(case.command[1]).name
    own = (f"{result}.oocattn", *((result,) if case.command[0] == "resume" else ())) if case.command[0] != "plan" else ()
    found += [f"{name} is not as it was" for name in world.changed(set(case.damaged), own)]
    if outcome.code == 0 and not _is_right(world, case):
        found.append("the result is wrong")
    return found


def _said(case: Case, outcome: Outcome) -> bool:
    """Whether what was asked for is an exit code of 1 in itself."""
    if case.command[0] == "status":
        return outcome.out.startswith("none: ")
    return case.command[0] == "verify" and "\nFAILED" in outcome.out


def _is_right(world: World, case: Case) -> bool:
    """Whether a result that a command has finished, or found right, has the bits of an undisturbed run."""
    if case.command[0] not in ("resume", "verify"):
        return True
    path = Path(case.command[1])
    if case.command[0] == "resume" and path.name == "finished.zarr":
        return True  # looks at no bits
    return _bits(path) == world.right


def _bits(result: Path) -> dict[str, bytes]:
    return {name: np.asarray(zarr.open_array(result / name, mode="r")[...]).tobytes() for name in ("out", "lse")}


_watching: list[list[str]] = []


def watch(events: list[str]) -> None:
    """Have it noted from here on, in this process, what no command may do."""
    if not _watching:
        sys.addaudithook(_note)
    _watching.append(events)


def unwatch() -> None:
    """No more."""
    _watching[:] = [[]]


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        return
    if event == "socket.getaddrinfo" and arguments[0] in (None, "", "localhost", "127.0.0.1", "::1"):
        return
    _watching[-1].append(f"did {event} {str(arguments)[:200]}")
