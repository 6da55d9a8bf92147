"""All channels of a profile side by side: every bin of every channel is one cell of a flat array.

Workers add rows into such an array, sums of arrays are sums of rows, and one numpy call reaches all
channels at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from monitors.counts import Counts

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

SPECIAL = ("below", "above", "missing", "invalid", "other", "unseen")
"""Bins that mean a fault when they fill: each is watched by itself."""

_ROWS_MIN = 4.0
_ROWS_PER = 1000
# Of a sum weighted 1/2, 1, 1/2: what it is worth in rows, over what it weighs.
_SMOOTH_WORTH = 2 / 1.5


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """Where each channel's bins are, and what the reference had in them."""

    names: tuple[str, ...]
    features: tuple[str, ...]
    """The column that each channel is about; empty for those about all of them."""
    sizes: Places
    """(n_channels,) bins of each channel."""
    n_ordered: Places
    """(n_channels,) how many of its first bins stand in an order."""
    counts: Counts = field(repr=False)
    """(n_cells,) rows of the reference."""
    doubt: Floats = field(repr=False)
    """(n_cells,) rows that the reference may have missed by chance."""
    labels: tuple[str, ...] = field(repr=False)
    """(n_cells,) what people call each bin."""
    special: Mapping[str, Sequence[int]] = field(repr=False)
    """Word of SPECIAL -> for each channel the cell of that bin, -1 where there is none."""
    effects: Floats = field(repr=False)
    """(n_channels,) rows of the reference that are worth one independent row, at least 1."""
    seasons: Counts | None = field(default=None, repr=False)
    """(n_slots, n_cells) rows of the reference by hour of the week or of the day."""
    pulls: Floats | None = field(default=None, repr=False)
    """(n_channels,) rows of the whole that an hour is drawn to; inf without a season."""

    @property
    def n_channels(self) -> int:
        """Number of channels."""
        return self.sizes.size

    @property
    def n_cells(self) -> int:
        """Bins of all channels together."""
        return self.counts.size

    @cached_property
    def starts(self) -> Places:
        """(n_channels,) first cell of each channel."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.intp)

    @cached_property
    def channel_of(self) -> Places:
        """(n_cells,) the channel that a cell belongs to."""
        return np.repeat(np.arange(self.n_channels), self.sizes)

    @cached_property
    def n_reference(self) -> Counts:
        """(n_channels,) rows of the reference in each channel."""
        rows: Counts = self.sums(self.counts)
        return rows

    @cached_property
    def shares(self) -> Floats:
        """(n_cells,) share of a channel's rows in each bin, none of them 0.

        A bin that the reference left empty, or nearly so, is given a few rows of a large one: what
        is true of the world may have been missed by chance.
        """
        least = np.clip(self.n_reference / _ROWS_PER, 0.5, _ROWS_MIN)
        return self._normed(np.maximum(self.counts + self.doubt, self.spread(least)))

    @cached_property
    def ordered(self) -> npt.NDArray[np.bool_]:
        """(n_cells,) whether the bin has a place in an order."""
        within = np.arange(self.n_cells) - self.starts[self.channel_of]
        ordered: npt.NDArray[np.bool_] = within < self.n_ordered[self.channel_of]
        return ordered

    @property
    def n_slots(self) -> int:
        """Hours of the season, 0 without one."""
        return 0 if self.seasons is None else self.seasons.shape[0]

    def at_slot(self, slot: int | None) -> tuple[Floats, Floats]:
        """Shares at an hour of the season, and how many rows of the reference stand behind them.

        An hour's rows and half of those of both neighbours, drawn to the whole.

        Returns
        -------
        (n_cells,) shares, none of them 0; (n_channels,) rows
        """
        if self.seasons is None or self.pulls is None or slot is None or not self.n_slots:
            return self.shares, self.n_reference.astype(np.float64)
        near = [self.seasons[(slot + step) % self.n_slots] for step in (-1, 0, 1)]
        own = (0.5 * near[0] + near[1] + 0.5 * near[2]) * _SMOOTH_WORTH
        is_season = np.isfinite(self.pulls)
        pulls = np.where(is_season, self.pulls, 1.0)
        weights = np.where(self.spread(is_season), own, 0.0) + self.spread(pulls) * self.shares
        rows = np.minimum(self.sums(own) + pulls, self.n_reference)
        return self._normed(weights), np.where(is_season, rows, self.n_reference)

    def sums(self, cells: npt.NDArray[Any]) -> Any:
        """(..., n_channels) sums over the bins of each channel."""
        return np.add.reduceat(cells, self.starts, axis=-1)

    def spread(self, channels: npt.NDArray[Any]) -> Any:
        """(..., n_cells) the channel's value for each of its bins."""
        return np.take(channels, self.channel_of, axis=-1)

    def scores(self, shares: Floats) -> Floats:
        """(n_cells,) normal scores of the bins: mean 0, variance 1 under the shares.

        Of a bin in the middle of its mass, among the bins of an order; 0 for others.
        """
        weights = np.where(self.ordered, shares, 0.0)
        total = self.spread(self.sums(weights))
        with np.errstate(invalid="ignore", divide="ignore"):
            weights = np.where(total > 0, weights / total, 0.0)
            running = np.cumsum(weights) - weights / 2
            before = self.spread(np.concatenate([[0.0], np.cumsum(weights)])[self.starts])
            raw = np.where(self.ordered, normal_quantile(running - before), 0.0)
            raw -= np.where(self.ordered, self.spread(self.sums(weights * raw)), 0.0)
            sd = np.sqrt(self.spread(self.sums(shares * raw**2)))
            return np.where(self.ordered & (sd > 0), raw / sd, 0.0)

    def _normed(self, weights: Floats) -> Floats:
        normed: Floats = weights / self.spread(self.sums(weights))
        return normed


def normal_quantile(shares: Floats) -> Floats:
    """Standard normal quantiles, good to 5e-4; what lies outside of (0, 1) is taken to its ends.

    Notes
    -----
    Source: Abramowitz and Stegun (1964), 26.2.23.
    """
    p = np.clip(shares, 1e-9, 1 - 1e-9)
    t = np.sqrt(-2 * np.log(np.minimum(p, 1 - p)))
    size = t - (2.515517 + 0.802853 * t + 0.010328 * t**2) / (
        1 + 1.432788 * t + 0.189269 * t**2 + 0.001308 * t**3
    )
    quantiles: Floats = np.where(p < 0.5, -size, size)
    return quantiles
