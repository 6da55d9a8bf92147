"""What an ordered reference teaches: the hours of a day or week, and how much neighbours repeat.

A season is a table of counts by hour. A design effect is the number of rows that are worth one:
with rows that follow each other closely, a sum over a block varies by that factor more.
"""

from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from monitors.counts import Counts
from monitors.layout import Floats, Layout

HOUR_S = 3600.0
DAY_HOURS = 24
WEEK_HOURS = 168
EFFECT_MAX = 1000.0

_DAYS_MIN = 2
_WEEK_ROWS_MIN = 200
_DAY_ROWS_MIN = 30
_DOUBT = 0.001
_MARGIN = 1.3
_BLOCKS_MIN = 16
_EXPECTED_MIN = 2.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Order:
    """What the order of a reference has taught."""

    effects: Floats
    """(n_channels,) design effects, at least 1."""
    pulls: Floats
    """(n_channels,) see `strength`; inf for channels without a season."""
    counts: Counts = field(repr=False)
    """(n_slots, n_cells) rows by hour, zero for channels without a season; no slots: no season."""

    @property
    def n_slots(self) -> int:
        """Hours of the season, 0 without one."""
        return int(self.counts.shape[0])


def n_slots(times: Floats) -> int:
    """Hours of the season that a reference of these times can teach: 168, 24 or 0.

    An hour of the week needs two weeks and 200 rows each, an hour of the day two days and 30.
    """
    days = float(times.max() - times.min()) / (DAY_HOURS * HOUR_S) if times.size else 0.0
    if days >= 14 and times.size >= _WEEK_ROWS_MIN * WEEK_HOURS:
        return WEEK_HOURS
    return DAY_HOURS if days >= _DAYS_MIN and times.size >= _DAY_ROWS_MIN * DAY_HOURS else 0


def slot_of(at: float, slots: int) -> int:
    """The hour that a time in seconds since 1970 (UTC) belongs to."""
    return int(at // HOUR_S) % slots


def strength(layout: Layout, counts: Counts) -> Floats:
    """(n_channels,) rows of the whole reference that an hour is drawn to it by; inf: no season.

    Notes
    -----
    Noise over signal (empirical Bayes): with v the mean distance of the hours from the whole
    beyond what sampling explains, an hour's own rows are worth (n_bins - 1) / v of the whole.
    """
    slots = counts.shape[0]
    rows = layout.sums(counts.astype(np.float64))
    expected = layout.spread(rows) * layout.shares
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = np.where(expected > 0, (counts - expected) ** 2 / expected, 0.0)
    # Of the hours' sums, of which only bins with some rows each say something.
    is_told = expected.mean(axis=0) >= _EXPECTED_MIN
    distance = layout.sums(np.where(is_told, parts, 0.0)).sum(axis=0)
    bins = np.maximum(layout.sums(is_told.astype(np.float64)) - 1, 0.0)
    freedom = bins * (slots - 1) * layout.effects
    z = NormalDist().inv_cdf(1 - _DOUBT / max(layout.n_channels, 1))
    beyond = distance - freedom
    is_season = (bins > 0) & (beyond > z * np.sqrt(2 * np.maximum(freedom, 1.0)))
    with np.errstate(invalid="ignore", divide="ignore"):
        signal = beyond / np.maximum(layout.n_reference, 1)
        return np.where(is_season, bins / signal, np.inf)


def design_effects(layout: Layout, blocks: Counts, expected: Floats) -> Floats:
    """(n_channels,) variance of sums over blocks in units of what independent rows would have.

    Parameters
    ----------
    blocks : (n_blocks, n_cells) rows of consecutive blocks of equal size
    expected : the same under the reference (and season)

    Returns
    -------
    1 where nothing is beyond chance, else the largest ratio found among the sums of scores, of
    squared scores and of bins, over blocks of growing length, times 1.3.

    Notes
    -----
    For an AR(1) process of coefficient r the ratio of long blocks is (1 + r) / (1 - r).
    """
    scores = layout.scores(layout.shares)
    effects = np.ones(layout.n_channels)
    off = blocks - expected
    rows = layout.sums(blocks.astype(np.float64))
    n_scales = max(1, int(np.log2(max(blocks.shape[0] / _BLOCKS_MIN, 1))) + 1)
    level = 1 - _DOUBT / max(1, n_scales * (layout.n_cells + 2 * layout.n_channels))
    z = NormalDist().inv_cdf(level)
    squares = np.where(layout.ordered, scores**2 - 1, 0.0)
    while off.shape[0] >= _BLOCKS_MIN:
        k = off.shape[0]
        n = rows.mean(axis=0)
        line = _ratio_line(k - 1, z)
        for weights in (scores, squares):
            sums = layout.sums(weights * off)
            variance = layout.sums(layout.shares * weights**2) * n
            effects = np.maximum(effects, _beyond((sums**2).mean(axis=0), variance, line))
        spread = layout.shares * (1 - layout.shares) * layout.spread(n)
        ratios = _beyond(
            (off**2).mean(axis=0), np.where(spread >= _EXPECTED_MIN, spread, np.inf), line
        )
        effects = np.maximum(effects, np.maximum.reduceat(ratios, layout.starts))
        half = k // 2
        off = off[: 2 * half].reshape(half, 2, -1).sum(axis=1)
        rows = rows[: 2 * half].reshape(half, 2, -1).sum(axis=1)
    return np.minimum(np.where(effects > 1, effects * _MARGIN, 1.0), EFFECT_MAX)


def _beyond(found: Floats, variance: Floats, line: float) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(variance > 0, found / variance, 1.0)
    return np.where(ratios > line, ratios, 1.0)


def _ratio_line(freedom: int, z: float) -> float:
    """Ratio of variances that chance does not exceed: the cube of Wilson and Hilferty."""
    part = 2 / (9 * freedom)
    return float((1 - part + z * part**0.5) ** 3)


def base_rows(n_rows: int) -> int:
    """Rows of the shortest blocks: 50, or so many that there are at most 4,096 blocks."""
    return max(50, -(-n_rows // 4096))
