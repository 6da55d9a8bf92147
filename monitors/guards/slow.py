"""Slow requests: a threshold frozen from the control, so that latency becomes a count.

Seconds are counted in bins ten per cent wide. The threshold is the upper edge of the bin that holds
the control's quantile before the candidate gets anything; above it a request is slow, and `harm`
judges. Nothing is assumed about how latencies are distributed.
"""

import math
from bisect import bisect_left

import numpy as np

from monitors.guards.bets import Integers

LOWEST_S = 10e-6
WIDTH = 1.1
N_BINS = 170
"""From ten microseconds to a hundred seconds."""
EDGES_S = tuple(LOWEST_S * WIDTH**step for step in range(N_BINS - 1))
"""Upper edges of all bins but the last."""
ROWS_MIN = 200
"""Control requests before a threshold can be frozen."""


def bin_of(seconds: float) -> int:
    """The bin of a duration: above the edge before, up to its own."""
    return bisect_left(EDGES_S, seconds)


def quantile(counts: Integers, level: float) -> float:
    """Upper edge of the bin that holds this quantile, in seconds; nan without requests.

    >>> counts = np.zeros(N_BINS, np.int64)
    >>> counts[[bin_of(0.010), bin_of(0.050)]] = 95, 5
    >>> round(quantile(counts, 0.95), 4)
    0.0105
    """
    n = int(counts.sum())
    if n == 0:
        return math.nan
    at = int(np.searchsorted(counts.cumsum(), level * n - 1e-9))
    return EDGES_S[at] if at < len(EDGES_S) else math.inf


def threshold(counts: Integers, level: float) -> float | None:
    """The threshold to freeze, in seconds; None while the control has met too few requests."""
    if int(counts.sum()) < ROWS_MIN:
        return None
    return quantile(counts, level)
