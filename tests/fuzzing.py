"""Random damage to what lies on disk, and what must hold of a command that meets it. A seed determines a case."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from mutations import dumps, is_json, other_bytes, other_index, other_json, other_value, replace_node
from support import read_again, replanned
from worlds import DATASETS, RESULTS, World, remove, result_bits

from oocattn import Plan
from oocattn.records import from_json, to_json
from oocattn.storage.files.durable import encode_record

LIMIT_SECONDS = 10.0
"""For any command on any bytes."""

LIMIT_BYTES = 1 << 30
"""Of memory that a command may take beyond what it has as it starts."""

EXITS = (0, 1, 3)


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
        command = random.choice(("status", "status", "resume"))
        result = name.removesuffix(".oocattn/plan.json")
        return Case(seed, (name,), how, _command(world, command, result, random))
    if seed % 20 == 10:
        names, how = _other_arrays(world, random)
        return Case(seed, names, how, _choose_command(world, names[0], random))
    name = _choose_target(world, random, seed)
    how = _damage(world, name, random)
    return Case(seed, (name,), how, _choose_command(world, name, random))


def _other_plan(world: World, random: Random) -> tuple[str, str]:
    """Write a plan whose numbers fit each other into a journal, however large they are."""
    name = f"{random.choice(('memory', 'disk'))}.zarr.oocattn/plan.json"
    header = json.loads((world.kept[name].content or b"")[9:])
    plan = replace(from_json(Plan, header["plan"]), device_memory=2**96, host_memory=2**96)
    for _ in range(50):
        with suppress(ValueError, ArithmeticError):  # what the planner would not compute
            other = read_again(_random_plan(plan, random))
            (world.folder / name).write_bytes(encode_record({**header, "plan": to_json(other)}))
            return name, "another plan"
    return name, "the same plan"


def _random_plan(plan: Plan, random: Random) -> Plan:
    kv_heads, queries = 2 ** random.randrange(48), 2 ** random.randrange(1, 48)
    problem = {
        "keys": 2 ** random.randrange(1, 48),
        "window_size": (2 ** random.randrange(48), random.choice((None, 0, 2 ** random.randrange(90)))),
        "prefix": 2 ** random.randrange(90),
        "softcap": 10.0 ** random.randrange(-30, 30),
        "value_dim": random.randrange(1, 1025),
        "bias_heads": random.choice((1, kv_heads)),
        "queries": queries,
        "scale": 10.0 ** random.randrange(-300, 300),
        "batch": 2 ** random.randrange(40),
        "causal": random.random() < 0.5,
        "head_dim": random.randrange(1, 257),
        "kv_heads": kv_heads,
        "query_heads": kv_heads * 2 ** random.randrange(20),
    }
    fields = random.sample(sorted(problem), random.randrange(len(problem)))
    without_arrays = replace(plan.problem, digests={})
    posed = replace(without_arrays, **{field: problem[field] for field in fields})
    posed = replace(posed, rows_asked=(0, posed.queries))
    strips, chunks = random.random() < 0.5, random.choice((1, 2, 7, 100, 1024, 8192, 9507))
    on_disk = not strips and random.random() < 0.5
    division = {"chunks": chunks, "decomposition": "strips", "span": 2} if strips else {"chunks": chunks, "span": 0}
    partials = {"partials": "disk", "accumulators": 2} if on_disk else {"partials": "memory", "accumulators": chunks}
    lanes = {"lanes": 2 ** random.randrange(11), "threads": 2 ** random.randrange(11)} if random.random() < 0.5 else {}
    inputs = replace(plan.inputs, align_rows=random.choice((1, 64, 2**40)))
    return replanned(replace(plan, problem=posed, inputs=inputs), **division, **partials, **lanes)


def _other_arrays(world: World, random: Random) -> tuple[tuple[str, ...], str]:
    """Change the metadata of q, k and v of a dataset in the same way, or give them other shapes and chunks."""
    dataset = random.choice(DATASETS)
    names = tuple(f"{dataset}/{name}/{'.zarray' if dataset == 'v2.zarr' else 'zarr.json'}" for name in "qkv")
    contents = [json.loads(world.kept[name].content or b"") for name in names]
    if random.random() < 0.5:
        seed = random.random()
        contents = [other_value(content, Random(seed)) for content in contents]
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
        (world.folder / name).write_text(dumps(content), "utf-8", "surrogatepass")
    return names, "other arrays"


def _choose_target(world: World, random: Random, turn: int) -> str:
    """A path; kinds of files take turns, or most would be chunks."""
    kind = random.choices(("state", "result", "dataset", "planted", "folder"), (10, 4, 6, 2, 1))[0]
    if kind == "planted":
        result = random.choice(list(RESULTS))
        state, digits = f"{result}.oocattn", "9" * random.choice((1, 20, 100))
        names = (
            "lock",
            "lock",
            "other-bits.json",
            "plan.json",
            "status.json",
            "report.json",
            "attempts.json",
            "certificate.json",
        )
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
        return _command(world, command, top, random)
    dataset = str(world.folder / top)
    commands: list[tuple[str, ...]] = [
        ("plan", dataset),
        ("verify", str(world.folder / "finished.zarr"), "--dataset", dataset),
    ]
    if top == "plain.zarr":
        commands += [_command(world, "resume", f"{run}.zarr", random) for run in ("memory", "disk")]
    return random.choice(commands)


def _command(world: World, command: str, result: str, random: Random) -> tuple[str, ...]:
    """A command on a result. Its dataset is named most of the time: its files have been restored, so their inodes differ."""
    named = ("--dataset", str(world.folder / "plain.zarr")) if command == "resume" and random.random() < 0.9 else ()
    return command, str(world.folder / result), *named


def _damage(world: World, name: str, random: Random) -> str:
    """Replace a file or a folder; return in words by what."""
    path, kept = world.folder / name, world.kept.get(name)
    content = None if kept is None else kept.content
    if content is None and random.random() < 0.5:
        content = _sibling(world, name, random)
    ways: list[tuple[int, Callable[[], str]]] = [(2, lambda: replace_node(path, world.victim, random))]
    if content is not None:
        found = content
        ways.append(
            (3, lambda: _write(path, *other_bytes(found, _sibling(world, name, random) or b"", world.victim, random)))
        )
        if is_json(found):
            ways.append((8, lambda: _write(path, other_json(found, random), "JSON")))
        elif len(found) > 100 and "sharded" in name:
            ways.append((6, lambda: _write(path, other_index(found, random), "shard index")))
    remove(path)
    path.parent.mkdir(exist_ok=True)
    way = random.choices([way for _, way in ways], [weight for weight, _ in ways])[0]
    how = way()
    status = os.lstat(path) if os.path.lexists(path) else None
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or random.random() < 0.5:
        return how
    chunk = re.fullmatch(r"[a-z0-9]+\.zarr/[qkv]/.*[0-9]", name)  # of a dataset that a command names, and so vouches for
    if kept is not None and not chunk:
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
    return result_bits(path) == world.right


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
