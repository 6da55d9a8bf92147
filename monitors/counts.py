"""Rows per bin: add, subtract, share. Integers only, so that sums are exact in any order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from monitors.errors import BinMismatchError, ProfileMismatchError

Counts: TypeAlias = npt.NDArray[np.int64]
"""(n_bins,) rows per bin, or a stack (..., n_bins) of them."""

Shares: TypeAlias = npt.NDArray[np.float64]
"""Counts divided by their sum over the last axis."""


def add(left: Counts, right: Counts) -> Counts:
    """Rows per bin of both together; raises BinMismatchError when the shapes differ."""
    _check_same_bins(left, right)
    total: Counts = left + right
    return total


def subtract(left: Counts, right: Counts) -> Counts:
    """Rows per bin of left without right; raises BinMismatchError when a bin would go negative."""
    _check_same_bins(left, right)
    rest: Counts = left - right
    if rest.size and rest.min() < 0:
        raise BinMismatchError("cannot subtract more rows than a bin holds")
    return rest


def share(counts: Counts) -> Shares:
    """Share of the rows in each bin, over the last axis; nan where there are no rows."""
    total = counts.sum(axis=-1, keepdims=True)
    return counts / np.where(total == 0, np.nan, total)


def _check_same_bins(left: Counts, right: Counts) -> None:
    if left.shape != right.shape:
        raise BinMismatchError(f"bins differ: {left.shape} against {right.shape}")


@dataclass(frozen=True, slots=True, eq=False)
class MonitorCounts(Mapping[str, Counts]):
    """Rows per bin of every channel of one profile; sums are exact and order-free.

    A mapping from channel name to its counts; the arrays are read-only.
    """

    digest: str
    """Digest of the profile whose bins these are."""
    n_rows: int
    """Rows seen, also those that lacked some of the channels."""
    by_channel: Mapping[str, Counts]

    def __add__(self, other: "MonitorCounts") -> "MonitorCounts":
        self._check_same_profile(other)
        return MonitorCounts(
            self.digest,
            self.n_rows + other.n_rows,
            {name: _frozen(add(mine, other[name])) for name, mine in self.by_channel.items()},
        )

    def __sub__(self, other: "MonitorCounts") -> "MonitorCounts":
        self._check_same_profile(other)
        if other.n_rows > self.n_rows:
            raise BinMismatchError(f"cannot subtract {other.n_rows} rows from {self.n_rows}")
        return MonitorCounts(
            self.digest,
            self.n_rows - other.n_rows,
            {name: _frozen(subtract(mine, other[name])) for name, mine in self.by_channel.items()},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MonitorCounts):
            return NotImplemented
        return (
            self.digest == other.digest
            and self.n_rows == other.n_rows
            and all(np.array_equal(mine, other[name]) for name, mine in self.by_channel.items())
        )

    __hash__ = None  # type: ignore[assignment]  # equal by content of arrays, so not hashable

    def __getitem__(self, name: str) -> Counts:
        return self.by_channel[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_channel)

    def __len__(self) -> int:
        return len(self.by_channel)

    def _check_same_profile(self, other: "MonitorCounts") -> None:
        if self.digest != other.digest:
            raise ProfileMismatchError(self.digest, other.digest)


def _frozen(counts: Counts) -> Counts:
    counts.flags.writeable = False
    return counts
