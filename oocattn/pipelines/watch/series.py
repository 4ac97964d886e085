"""What a run did over time, in bounded memory: amounts a second, and the intervals in which a resource was busy."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from oocattn.pipelines.watch.timeline import coverage

MOST_BINS = 240  # of a series; when they are used up, each two become one
LEAST_LAST_BIN = 0.5  # share of its width that the last bin must cover to be shown: its rate would be noise
MOST_INTERVALS = 4096  # of a resource; the older half is dropped then


class Rates:
    """Amounts by name, spread over the seconds they took, in at most `MOST_BINS` bins, at first of `width` seconds."""

    def __init__(self, start: float, names: Iterable[str], width: float) -> None:
        self.width = width
        self._start = self._reached = start
        self._bins: dict[str, list[float]] = {name: [] for name in names}

    def track(self, name: str) -> None:
        """Add a name, of which nothing is done yet."""
        self._bins[name] = []

    def add(self, name: str, amount: float, start: float, stop: float) -> None:
        """Spread an amount evenly from `start` to `stop`; what lies before the series counts at its start."""
        begin, end = start - self._start, stop - self._start
        begin = begin if begin > 0.0 else 0.0  # no call of max: this is called for each span of each task
        end = end if end > 0.0 else 0.0
        if stop > self._reached:
            self._reached = stop
        while end >= MOST_BINS * self.width:
            self._coarsen()
        bins, width = self._bins[name], self.width
        first, last = int(begin / width), int(end / width)
        if len(bins) <= last:
            bins.extend([0.0] * (last + 1 - len(bins)))
        if first >= last:
            bins[last] += amount
            return
        density = amount / (end - begin)
        for index in range(first, last + 1):
            bins[index] += density * (min(end, (index + 1) * width) - max(begin, index * width))

    def coarsen_to(self, width: float) -> None:
        """Make bins wider, until they have a width that is a power of two of what they had."""
        while self.width < width:
            self._coarsen()

    def _coarsen(self) -> None:
        self.width *= 2
        for name, bins in self._bins.items():
            self._bins[name] = [sum(bins[index : index + 2]) for index in range(0, len(bins), 2)]

    def totals(self) -> dict[str, float]:
        """The sum of all amounts, by name."""
        return {name: sum(bins) for name, bins in self._bins.items()}

    def rates(self) -> dict[str, list[float]]:
        """Amounts a second, by name, of each bin up to the last moment that is known of."""
        whole, part = divmod(self._reached - self._start, self.width)
        count = int(whole) + (part >= LEAST_LAST_BIN * self.width)
        found = {}
        for name, bins in self._bins.items():
            padded = [*bins, *[0.0] * count][:count]
            seconds = [self.width] * int(whole) + [part]
            found[name] = [amount / width for amount, width in zip(padded, seconds, strict=False)]
        return found


class Busy:
    """The intervals in which a resource was busy: their union, ascending, at most `MOST_INTERVALS`."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.stops: list[float] = []

    def add(self, start: float, stop: float) -> list[tuple[float, float]]:
        """Add an interval, which may overlap others; return the parts of it that none of these covers."""
        starts, stops = self.starts, self.stops
        if stop <= start:
            return []
        if not stops or start > stops[-1]:
            new = [(start, stop)]
            starts.append(start)
            stops.append(stop)
        else:
            first, last = bisect_left(stops, start), bisect_right(starts, stop)
            begins, ends = [start, *stops[first:last]], [*starts[first:last], stop]
            new = [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]
            if first < last:
                start, stop = min(start, starts[first]), max(stop, stops[last - 1])
            starts[first:last], stops[first:last] = [start], [stop]
        if len(starts) > MOST_INTERVALS:
            del starts[: MOST_INTERVALS // 2], stops[: MOST_INTERVALS // 2]
        return new

    def drop_before(self, moment: float) -> None:
        """Forget the intervals that ended before a moment."""
        first = bisect_right(self.stops, moment)
        del self.starts[:first], self.stops[:first]

    def shares(self, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The share of each cell between two edges in which the resource was busy."""
        return coverage(np.asarray(self.starts), np.asarray(self.stops), edges)


class Covered:
    """The seconds in which resources were busy, by name, as rates of the same bins as other amounts.

    Each is counted once, but for those that an interval covers again after `MOST_INTERVALS` later ones.
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._busy: dict[str, Busy] = {}
        self.seconds: dict[str, float] = {}

    def add(self, name: str, start: float, stop: float) -> None:
        """Add an interval in which the resource was busy."""
        if name not in self._busy:
            self._busy[name], self.seconds[name] = Busy(), 0.0
            self._rates.track(name)
        for begin, end in self._busy[name].add(start, stop):
            self._rates.add(name, end - begin, begin, end)
            self.seconds[name] += end - begin


class Highest:
    """The highest value in each bin, in at most `MOST_BINS` bins."""

    def __init__(self, start: float, width: float) -> None:
        self.width = width
        self._start = start
        self._bins: list[int] = []

    def add(self, value: int, moment: float) -> None:
        """Take a value in; bins that had none since the last one have that."""
        while moment - self._start >= MOST_BINS * self.width:
            self.coarsen()
        last = max(0, int((moment - self._start) / self.width))
        if len(self._bins) <= last:
            self._bins.extend([self._bins[-1] if self._bins else 0] * (last + 1 - len(self._bins)))
        self._bins[last] = max(self._bins[last], value)

    def coarsen(self) -> None:
        """Join each two bins to one."""
        self.width *= 2
        self._bins = [max(self._bins[index : index + 2]) for index in range(0, len(self._bins), 2)]

    def values(self, width: float) -> tuple[int, ...]:
        """The values in bins of a width that is a power of two of this one's."""
        while self.width < width:
            self.coarsen()
        return tuple(self._bins)
