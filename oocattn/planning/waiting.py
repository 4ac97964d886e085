"""Seconds that requests to a store wait, as a plan counts them. Pure arithmetic.

How long a store lets a request wait is measured where the inputs are read. A result's store is taken to be as slow.
"""

from __future__ import annotations

from oocattn.planning.machine import Hardware, InputCost
from oocattn.planning.memory import count_slots, count_writers
from oocattn.problem.problem import Problem
from oocattn.units import ceil_div

CHECKS = 4
"""Requests one after another besides reading: for the first index and bytes, and two to check the dataset at the end."""

COMMITS = 12
"""Requests one after another with which a result in a store is committed."""


def asking(inputs: InputCost, *, to_store: bool) -> float:
    """Seconds of requests that nothing overlaps with."""
    return (CHECKS + (COMMITS if to_store else 0)) * inputs.latency


def reading(seconds: float, staged: int, inputs: InputCost, hardware: Hardware) -> float:
    """Seconds at least of reading that takes so many by its bytes, where so many subproblems are `staged`.

    Each waits for its first bytes in a slot.
    """
    if not inputs.latency:
        return 0.0
    of_lane = ceil_div(staged, hardware.lanes) * inputs.latency + hardware.lanes * seconds
    return of_lane / count_slots(hardware.device, inputs.ahead)


def sending(nbytes: float, problem: Problem, out_chunk_rows: int, inputs: InputCost, hardware: Hardware) -> float:
    """Seconds in which `nbytes` of a result are sent to a store, in chunks of `out` of so many rows."""
    writers = hardware.lanes * count_writers(problem, hardware.device, out_chunk_rows, to_store=True)
    chunks = problem.batch * problem.out_heads * ceil_div(problem.out_rows, out_chunk_rows)
    rate = min(hardware.write_rate, inputs.decode_rate) if inputs.latency else hardware.write_rate
    return max(nbytes / rate, chunks * inputs.latency / writers)
