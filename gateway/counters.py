"""Counts of one worker: 64-bit integers side by side, one writer, read by anybody.

A cell is one integer in a block of memory that never moves, so that a hot path holds block and
index and adds to it without a lookup. Seconds are kept as whole nanoseconds: integers add up
exactly in any order.
"""

from bisect import bisect_left
from collections.abc import Sequence

_CELLS_PER_BLOCK = 1024


class Counter:
    """A count that only grows."""

    __slots__ = ("at", "cells")

    def __init__(self, cells: "memoryview[int]", at: int) -> None:
        self.cells = cells
        self.at = at

    def add(self, n: int = 1) -> None:
        """Count `n` more."""
        self.cells[self.at] += n

    @property
    def value(self) -> int:
        """The count so far."""
        return self.cells[self.at]


class Histogram:
    """Counts of values by size, with their sum.

    Cells: one per bound (values <= it and above the one before), one for the rest, one for the sum.
    """

    __slots__ = ("at", "bounds", "cells", "scale")

    def __init__(
        self, cells: "memoryview[int]", at: int, bounds: Sequence[float], scale: int
    ) -> None:
        self.cells = cells
        self.at = at
        self.bounds = bounds
        self.scale = scale

    def observe(self, value: float) -> None:
        """Count one value, in the unit of the bounds."""
        cells, at = self.cells, self.at
        cells[at + bisect_left(self.bounds, value)] += 1
        cells[at + len(self.bounds) + 1] += int(value * self.scale)

    @property
    def counts(self) -> list[int]:
        """(len(bounds) + 1,) values per bin, not cumulated."""
        return list(self.cells[self.at : self.at + len(self.bounds) + 1])

    @property
    def total(self) -> float:
        """Sum of all values, in the unit of the bounds."""
        return self.cells[self.at + len(self.bounds) + 1] / self.scale


class Region:
    """Memory that one thread counts in. It grows by blocks; what was handed out stays."""

    def __init__(self) -> None:
        self._free = 0
        self._cells: memoryview[int] = memoryview(b"").cast("q")

    def counter(self) -> Counter:
        """A new count, at 0."""
        return Counter(*self._take(1))

    def histogram(self, bounds: Sequence[float], scale: int) -> Histogram:
        """New counts of values; `scale`: steps per unit that the sum is kept in."""
        return Histogram(*self._take(len(bounds) + 2), bounds, scale)

    def _take(self, n: int) -> "tuple[memoryview[int], int]":
        if self._free + n > len(self._cells):
            size = max(n, _CELLS_PER_BLOCK)
            self._cells = memoryview(bytearray(8 * size)).cast("q")
            self._free = 0
        at = self._free
        self._free += n
        return self._cells, at
