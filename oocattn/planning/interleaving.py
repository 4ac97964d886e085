"""Heads whose rows lie between each other's: read together, and held in memory until each was used. Pure arithmetic.

To read one head of [B, N, H, D] takes the bytes of all of them from a disk. So the first head group of a window has the rows
of all its head groups read, which are held until the last one is done. What room the budget leaves decides how many that
are; chunks, tiles and results do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from oocattn.planning.machine import InputCost
from oocattn.problem.problem import Problem
from oocattn.units import ceil_div, format_bytes

MOST_WINDOWS = 64  # into which the head groups are divided, unless each is one: more are hardly better


@dataclass(frozen=True)
class Holding:
    """So many head groups are held at a time, 0 for none, in `nbytes` of a lane; inputs are read `factor` times over."""

    groups: int
    nbytes: int
    factor: float


def choose_holding(problem: Problem, inputs: InputCost, lanes: int, room: float = inf) -> Holding:
    """Hold as many head groups as have bytes read the fewest times, within `room` bytes of a lane."""
    if not inputs.shared_heads:
        return Holding(0, 0, 1.0)
    every = problem.kv_heads
    windows = [every, *range(min(every, MOST_WINDOWS), 0, -1)]
    counts = [0, *dict.fromkeys(ceil_div(every, number) for number in windows)]
    choices = [
        Holding(count, held_bytes(problem, inputs, count), _factor(problem, inputs, lanes, count)) for count in counts
    ]
    return min((each for each in choices if each.nbytes <= max(0.0, room)), key=lambda each: (each.factor, each.nbytes))


def held_heads(problem: Problem, inputs: InputCost, groups: int) -> dict[str, int]:
    """How many heads of each tensor are held at a time."""
    most = {name: heads for name, (heads, _, _) in _tensors(problem).items() if name in inputs.shared_heads}
    of_group = problem.query_heads // problem.kv_heads
    return {name: min(heads, groups * (of_group if name == "q" else 1)) for name, heads in most.items()}


def window_of(problem: Problem, groups: int, head_group: int) -> tuple[int, int]:
    """Batch and number of the window of a head group, where `groups` are held at a time; (0, 0) of each where none is."""
    if not groups:
        return 0, 0
    of = problem.head_group(head_group)
    return of.batch, of.kv_head // groups


def held_tokens(problem: Problem, inputs: InputCost) -> dict[str, range]:
    """The rows of each tensor that may be held."""
    found = {name: tokens for name, (_, tokens, _) in _tensors(problem).items()}
    return dict.fromkeys(found, found["k"]) if inputs.packed else found


def _tensors(problem: Problem) -> dict[str, tuple[int, range, int]]:
    """Heads of each tensor, the rows that a run may read, and the bytes of a row."""
    keys, width = range(problem.keys), problem.head_dim * problem.itemsize
    return {
        "q": (problem.query_heads, range(*problem.rows_asked), width),
        "k": (problem.kv_heads, keys, width),
        "v": (problem.kv_heads, keys, problem.value_dim * problem.itemsize),
    }


def held_bytes(problem: Problem, inputs: InputCost, groups: int) -> int:
    """Bytes of the rows of so many head groups that a lane holds."""
    tokens, tensors = held_tokens(problem, inputs), _tensors(problem)
    heads = held_heads(problem, inputs, groups)
    return sum(count * len(tokens[name]) * tensors[name][2] for name, count in heads.items())


def _factor(problem: Problem, inputs: InputCost, lanes: int, groups: int) -> float:
    """How many times over inputs are read: for each window, by each lane that has head groups in it."""
    tensors, held = _tensors(problem), held_heads(problem, inputs, groups)
    sizes = {name: heads * len(tokens) * row for name, (heads, tokens, row) in tensors.items()}
    packed = sum(heads for heads, _, _ in tensors.values())
    read = 0.0
    for name, (heads, _, _) in tensors.items():
        times = float(inputs.shared_heads.get(name, 1))
        if held.get(name):
            times = max(1.0, ceil_div(heads, held[name]) * times / (packed if inputs.packed else heads))
        read += times * sizes[name]
    return read / sum(sizes.values()) * (min(lanes, groups) if groups else 1)


def describe_interleaving(
    problem: Problem, inputs: InputCost, lanes: int, groups: int, factor: float, peak_host: int
) -> str:
    """A plan's line on how heads are read that lie between each other; empty where none do."""
    if not inputs.shared_heads:
        return ""
    names, times = ", ".join(inputs.shared_heads), f"read {factor:.3g} times over"
    best = choose_holding(problem, inputs, lanes)
    if factor <= best.factor:
        return f"interleaved  {names}: all heads are read together, inputs are {'read once' if best.factor == 1 else times}"
    least = format_bytes(peak_host + lanes * (best.nbytes - held_bytes(problem, inputs, groups)))
    held = f"{groups} of {problem.kv_heads} head groups are read together" if groups else "no room"
    fewest = "once" if best.factor == 1 else f"{best.factor:.3g} times"
    return f"interleaved  {names}: {held}, inputs are {times}; {fewest} with a host memory of {least}"
