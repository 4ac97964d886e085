"""Figures of lanes together: the memory of their processes, and how busy each of them was, or all on average."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from oocattn.pipelines.watch.events import Memory
from oocattn.pipelines.watch.timeline import RESOURCES

MOST_LANES = 16  # that are shown one by one

Floats = npt.NDArray[np.float64]


class LaneMemory:
    """What lanes hold, by process: each is known by what it told last."""

    def __init__(self) -> None:
        self._last: dict[str, Memory] = {}

    def add(self, memory: Memory) -> None:
        """Take in what a process holds now."""
        self._last[memory.process] = memory

    @property
    def processes(self) -> int:
        """How many are known."""
        return len(self._last)

    @property
    def host(self) -> int:
        """Bytes of host memory of all processes; what one has given back of what it had before counts against others."""
        return max(0, sum(each.host for each in self._last.values()))

    @property
    def device(self) -> int:
        """Bytes on the devices of all processes."""
        return sum(each.device for each in self._last.values())


def rows_of_lanes(lanes: Mapping[str, Mapping[str, Floats]]) -> list[tuple[str, str, Floats]]:
    """A row (lane, resource, values) for each resource of each lane; of more than `MOST_LANES` lanes their mean.

    `lanes` has the values by lane and resource. Lanes are in the order of their numbers. One without a resource was not
    busy with it.
    """
    if len(lanes) > MOST_LANES:
        return [(f"mean of {len(lanes):,} lanes", name, total / len(lanes)) for name, total in _totals(lanes).items()]
    order = sorted(lanes, key=lambda lane: (len(lane), lane))
    return [(lane, name, lanes[lane][name]) for lane in order for name in RESOURCES if name in lanes[lane]]


def _totals(lanes: Mapping[str, Mapping[str, Floats]]) -> dict[str, Floats]:
    """The sum of all lanes, by resource."""
    values = {name: [each[name] for each in lanes.values() if name in each] for name in RESOURCES}
    return {name: np.sum(found, axis=0) for name, found in values.items() if found}
