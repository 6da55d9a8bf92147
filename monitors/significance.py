"""The score that no drift would show at this sample size.

Every line is the 99 % quantile of a score when nothing has changed: the shares behind the
reference are drawn from what its rows leave possible (a Dirichlet distribution), then a window
from these shares. So both samples' noise is in it, also where bins are sparse, the window is tiny
or the reference is small. Knows no statistic: the functions are handed in.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from monitors.counts import Counts

LEVEL = 0.99
"""Share of windows without drift that stay at or below a line."""

_SEED = 20130101
_EXACT_ROWS = 32
_STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.3, 8.0, 10.0)
_REMEMBERED = 512
_ROW_ROUNDING = 1e-6
_SPREAD_MAX = 200.0
# The same counts may give a score that differs in its last digits when it is summed in a stack.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Statistic:
    """A score of a window, as significance needs to know it."""

    function: Callable[[Counts, Counts], Any]
    """(n_bins,) reference and (n, n_bins) windows -> (n,) scores."""
    power: float
    """Without drift the score falls like (1/n + 1/m) to this power: 1 for psi, 1/2 for a metric."""


class NoDrift:
    """The lines of one channel, at any number of rows; the same on every machine and in any order.

    Simulated once for each of a series of sizes (ten in a decade, all up to 32 rows), scaled by
    the statistic's power between them.
    """

    def __init__(
        self,
        reference: Counts,
        doubt: npt.NDArray[np.float64],
        statistics: Mapping[str, Statistic],
    ) -> None:
        self._reference = reference
        self._weights = reference + doubt
        self._rows = float(self._weights.sum())
        self._statistics = statistics
        # More draws than noise allows are not needed; more bins cost more, so fewer draws.
        self._n_draws = 2000 if reference.size <= 20 else 1000
        self._simulated: dict[int, dict[str, float]] = {}
        self._lines: dict[int, Mapping[str, float]] = {}

    def lines(self, n_rows: int) -> Mapping[str, float]:
        """The line of every statistic for a window of that many rows, nan without rows."""
        known = self._lines.get(n_rows)
        if known is not None:
            return known
        if n_rows < 1:
            return dict.fromkeys(self._statistics, math.nan)
        size = nearest_size(n_rows)
        simulated = self._simulated.get(size)
        if simulated is None:
            simulated = self._simulated[size] = self._simulate(size)
        noise = (1 / n_rows + 1 / self._rows) / (1 / size + 1 / self._rows)
        lines = {
            name: line * noise ** self._statistics[name].power for name, line in simulated.items()
        }
        if len(self._lines) >= _REMEMBERED:
            self._lines.clear()
        self._lines[n_rows] = lines
        return lines

    def rate_line(self, n_rows: int, bins: Sequence[int]) -> float:
        """The line of the share of rows in any of these bins, exact; nan without rows."""
        if n_rows < 1:
            return math.nan
        hits = float(self._weights[list(bins)].sum())
        return rate_line(hits, self._rows - hits, n_rows)

    def _simulate(self, n_rows: int) -> dict[str, float]:
        random = np.random.default_rng([_SEED, n_rows])
        weights = random.standard_gamma(self._weights, (self._n_draws, self._weights.size))
        windows = random.multinomial(n_rows, weights / weights.sum(axis=1, keepdims=True))
        return {
            name: _quantile(statistic.function(self._reference, windows)) * _ROUNDING
            for name, statistic in self._statistics.items()
        }


def nearest_size(n_rows: int) -> int:
    """The nearest simulated size, by ratio: n_rows itself when small, else ten in a decade."""
    if n_rows <= _EXACT_ROWS:
        return n_rows
    decade = float("1" + "0" * (len(str(n_rows)) - 1))
    sizes = [round(decade * step) for step in _STEPS]
    return min(sizes, key=lambda size: abs(math.log(n_rows / size)))


@lru_cache(maxsize=8192)
def rate_line(hits: float, misses: float, n_rows: int) -> float:
    """Smallest share of n_rows that 99 % of windows without drift do not exceed.

    Parameters
    ----------
    hits, misses : weights of the Beta distribution of the rate: reference rows, and the doubt
    n_rows : rows of the window, at least 1

    Returns
    -------
    A share in [0, 1]; the chance of more is at most 1 %, and less where counts are few.

    Notes
    -----
    The quantile of the beta-binomial distribution, by its recurrence around the mean; above a
    spread of 200 rows, where counts are as good as continuous, scaled from a smaller window.
    Source: Skellam (1948), J. R. Stat. Soc. B 10.

    >>> rate_line(10_000.0, 90_000.0, 500)
    0.132
    """
    if hits <= 0:
        return 0.0
    if misses <= 0:
        return 1.0
    rows = hits + misses
    rate = hits / rows
    size = n_rows
    while (spread := _spread(rate, rows, size)) > _SPREAD_MAX:
        size //= 2
    low = max(0, math.floor(size * rate - 12 * spread))
    high = min(size, math.ceil(size * rate + 30 * spread) + 10)
    k = np.arange(low, high, dtype=np.float64)
    steps = np.log((size - k) / (k + 1) * (hits + k) / (misses + size - k - 1))
    chances = np.concatenate([[0.0], np.cumsum(steps)])
    below = np.cumsum(np.exp(chances - chances.max()))
    line = (low + int(below.searchsorted(LEVEL * below[-1]))) / size
    if size == n_rows:
        return line
    noise = (1 / n_rows + 1 / rows) / (1 / size + 1 / rows)
    scaled = min(1.0, rate + (line - rate) * math.sqrt(noise))
    # Up to a whole row: with a rate near 1 the last row alone may weigh more than one per cent.
    return math.ceil(scaled * n_rows - _ROW_ROUNDING) / n_rows


def _spread(rate: float, rows: float, n_rows: int) -> float:
    """Standard deviation of a beta-binomial count."""
    return math.sqrt(n_rows * rate * (1 - rate) * (rows + n_rows) / (rows + 1))


def _quantile(scores: npt.NDArray[np.float64]) -> float:
    """The score that at most 1 % exceed; a window without a score exceeds nothing."""
    place = math.ceil(scores.size * LEVEL) - 1
    return float(np.partition(np.nan_to_num(scores, nan=0.0), place)[place])
