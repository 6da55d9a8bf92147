"""How far apart two histograms are. Counts in, one number out.

Every function takes (n_bins,) counts and gives a float, or stacks (..., n_bins) that broadcast
against each other and gives one number for each histogram of the stack: there an empty histogram
scores nan instead of raising. A bin that is empty on both sides adds nothing to any of them.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from monitors.counts import Counts, Shares, share
from monitors.errors import BinMismatchError

Scores: TypeAlias = Any
"""A float for two histograms, an array for stacks: types cannot tell the number of axes."""


def psi(reference: Counts, current: Counts, *, floor: float = 1e-4) -> Scores:
    """Population stability index of two histograms, in nats.

    Parameters
    ----------
    reference : (n_bins,) rows per bin in the reference profile
    current : (n_bins,) rows per bin in the window, same bins
    floor : smallest share a bin may have, so that an empty bin stays finite

    Returns
    -------
    A score >= 0, symmetric in its arguments, 0 when all shares are equal. No upper bound but the
    floor's: ln(1 / floor) for each side.

    Raises
    ------
    BinMismatchError : the shapes differ, or a histogram holds no rows.

    Notes
    -----
    Sum of (c - r) * ln(c / r): the Jeffreys divergence of the shares. Without drift, n and m
    rows score about (n_bins - 1) * (1/n + 1/m): a threshold means nothing without them.
    Source: Jeffreys (1946), Proc. R. Soc. A 186; Yurdakul (2018), Western Michigan Univ.

    >>> round(psi(np.array([50, 50]), np.array([60, 40])), 4)
    0.0405
    """
    r, c = _shares(reference, current)
    r, c = np.maximum(r, floor), np.maximum(c, floor)
    return _scores(((c - r) * (np.log(c) - np.log(r))).sum(axis=-1))


def jensen_shannon(reference: Counts, current: Counts) -> Scores:
    """Jensen-Shannon distance: the square root of the divergence in bits.

    Parameters
    ----------
    reference, current : (n_bins,) rows per bin, same bins

    Returns
    -------
    A metric in [0, 1], symmetric: 0 when all shares are equal, 1 when no bin is shared.

    Raises
    ------
    BinMismatchError : the shapes differ, or a histogram holds no rows.

    Notes
    -----
    Mean Kullback-Leibler divergence of both from their midpoint. Without drift, n and m rows have
    a squared distance of about (n_bins - 1) * (1/n + 1/m) / (8 ln 2).
    Source: Lin (1991), IEEE Trans. Inf. Theory 37; Endres and Schindelin (2003), ibid. 49.

    >>> jensen_shannon(np.array([3, 0]), np.array([0, 5]))
    1.0
    """
    r, c = _shares(reference, current)
    middle = (r + c) / 2
    # In terms of differences from the midpoint: equal shares give exactly 0, and so does 0 ln 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(r > 0, r * np.log2(r / middle), 0.0) + np.where(
            c > 0, c * np.log2(c / middle), 0.0
        )
    return _scores(np.sqrt(np.clip(_nan_if_empty(bits.sum(axis=-1), r, c) / 2, 0.0, 1.0)))


def hellinger(reference: Counts, current: Counts) -> Scores:
    """Hellinger distance of the shares.

    Parameters
    ----------
    reference, current : (n_bins,) rows per bin, same bins

    Returns
    -------
    A metric in [0, 1], symmetric: 0 when all shares are equal, 1 when no bin is shared.

    Raises
    ------
    BinMismatchError : the shapes differ, or a histogram holds no rows.

    Notes
    -----
    sqrt(sum (sqrt r - sqrt c)^2 / 2): bounded, and unlike psi at ease with empty bins. Without
    drift, n and m rows have a square of about (n_bins - 1) * (1/n + 1/m) / 8.
    Source: Hellinger (1909), J. reine angew. Math. 136; Le Cam and Yang (2000), section 3.

    >>> hellinger(np.array([1, 0]), np.array([0, 1]))
    1.0
    """
    r, c = _shares(reference, current)
    squares = ((np.sqrt(r) - np.sqrt(c)) ** 2).sum(axis=-1)
    return _scores(np.sqrt(np.clip(squares / 2, 0.0, 1.0)))


def kolmogorov_smirnov(reference: Counts, current: Counts) -> Scores:
    """Largest difference of the cumulative shares, seen at the bins' edges.

    Parameters
    ----------
    reference, current : (n_bins,) rows per bin, bins in the order of their values

    Returns
    -------
    A metric in [0, 1], symmetric: 0 when all shares are equal, 1 when one lies wholly below the
    other. Never more than the statistic of the rows themselves.

    Raises
    ------
    BinMismatchError : the shapes differ, or a histogram holds no rows.

    Notes
    -----
    Source: Smirnov (1948), Ann. Math. Stat. 19; its usual p-value needs raw rows and is too large
    on bins: Noether (1963), Ann. Math. Stat. 34.

    >>> kolmogorov_smirnov(np.array([2, 2, 0]), np.array([0, 2, 2]))
    0.5
    """
    r, c = _shares(reference, current)
    return _scores(np.abs(np.cumsum(r - c, axis=-1)).max(axis=-1).clip(0.0, 1.0))


def wasserstein(
    reference: Counts, current: Counts, *, positions: npt.NDArray[np.float64]
) -> Scores:
    """Mean way a row has to move to turn one histogram into the other, in units of positions.

    Parameters
    ----------
    reference, current : (n_bins,) rows per bin, bins in the order of their values
    positions : (n_bins,) place of each bin, not falling; here in reference standard deviations

    Returns
    -------
    A metric >= 0, symmetric, 0 when all shares are equal, at most the range of the positions. A
    shift by d standard deviations within the range scores about d.

    Raises
    ------
    BinMismatchError : the shapes differ, or a histogram holds no rows.

    Notes
    -----
    Integral of |F - G|, the first Wasserstein or earth mover's distance on a line.
    Source: Vallender (1974), Theory Probab. Appl. 18.

    >>> wasserstein(np.array([1, 0]), np.array([0, 1]), positions=np.array([0.0, 2.5]))
    2.5
    """
    r, c = _shares(reference, current)
    if positions.shape[-1] != r.shape[-1]:
        raise BinMismatchError(f"{positions.shape[-1]} positions for {r.shape[-1]} bins")
    gaps = np.abs(np.cumsum(r - c, axis=-1)[..., :-1])
    return _scores((gaps * np.diff(positions)).sum(axis=-1))


def l_infinity(reference: Counts, current: Counts) -> Scores:
    """Largest change of the share of any one bin.

    Parameters
    ----------
    reference, current : (n_bins,) rows per bin, same bins

    Returns
    -------
    A metric in [0, 1], symmetric, 0 when all shares are equal: 0.05 means that one bin gained or
    lost five points.

    Raises
    ------
    BinMismatchError : the shapes differ, or a histogram holds no rows.

    Notes
    -----
    The Chebyshev distance of the shares.
    Source: the measure for categories in TensorFlow Data Validation's drift comparator.

    >>> l_infinity(np.array([1, 1, 2]), np.array([2, 1, 1]))
    0.25
    """
    r, c = _shares(reference, current)
    return _scores(np.abs(r - c).max(axis=-1))


def chi_square(reference: Counts, current: Counts) -> Scores:
    """Pearson's statistic for two histograms drawn from the same shares.

    Parameters
    ----------
    reference, current : (n_bins,) rows per bin, same bins

    Returns
    -------
    A statistic >= 0, symmetric, 0 when all shares are equal. Not a distance: it grows with the
    rows, at most to their sum.

    Raises
    ------
    BinMismatchError : the shapes differ, or a histogram holds no rows.

    Notes
    -----
    n m / (n + m) * sum (r - c)^2 / pooled share. Without drift about chi-squared with one degree
    of freedom less than there are bins with rows, where a bin expects 5 rows or more.
    Source: Pearson (1911), Biometrika 8; Cochran (1952), Ann. Math. Stat. 23.

    >>> round(chi_square(np.array([10, 20]), np.array([20, 10])), 4)
    6.6667
    """
    r, c = _shares(reference, current)
    n, m = np.sum(reference, axis=-1), np.sum(current, axis=-1)
    pooled = (np.asarray(reference) + np.asarray(current)) / (n + m)[..., np.newaxis]
    squares = (r - c) ** 2 / np.where(pooled > 0, pooled, 1.0)
    return _scores(n / (n + m) * m * squares.sum(axis=-1))


def _shares(reference: Counts, current: Counts) -> tuple[Shares, Shares]:
    """Shares of both, checked; nan in the rows of a stack that are empty."""
    a, b = np.asarray(reference), np.asarray(current)
    if not a.ndim or not b.ndim or a.shape[-1] != b.shape[-1] or not a.shape[-1]:
        raise BinMismatchError(f"bins differ: shapes {a.shape} and {b.shape}")
    if a.min(initial=0) < 0 or b.min(initial=0) < 0:
        raise BinMismatchError("a bin holds a negative number of rows")
    if a.ndim == b.ndim == 1 and not (a.any() and b.any()):
        raise BinMismatchError("a histogram holds no rows")
    return share(a), share(b)


def _nan_if_empty(
    scores: npt.NDArray[np.float64], reference: Shares, current: Shares
) -> npt.NDArray[np.float64]:
    empty = np.isnan(reference[..., 0]) | np.isnan(current[..., 0])
    return np.where(empty, np.nan, scores)


def _scores(scores: npt.NDArray[np.float64]) -> Scores:
    return float(scores) if np.ndim(scores) == 0 else scores
