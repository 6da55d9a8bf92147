"""How right predictions were, from their labels, with intervals.

Scores and labels in, estimates out; what can be said without labels is in cbpe.py. Rows may carry
weights (the inverse of the probability with which they were kept); intervals then count as many
rows as the weights are worth.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from monitors.errors import BinMismatchError

Floats: TypeAlias = npt.NDArray[np.float64]

_Z = 1.959963984540054
"""Quantile of the normal distribution for 95 % on both sides."""
CLIP = 1e-7
"""Keeps the logarithm of a score that was sure, and wrong, finite."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval of 95 %; not finite where there are too few rows for one."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """In plain JSON types: what is not finite becomes null."""
        return {
            name: round(value, 6) if math.isfinite(value) else None
            for name, value in (("value", self.value), ("low", self.low), ("high", self.high))
        }


def binary(
    scores: Any, labels: Any, weights: Any = None, *, threshold: float = 0.5
) -> dict[str, Estimate]:
    """Accuracy, AUC, log loss, Brier score, calibration and rate of a score of class 1.

    Parameters
    ----------
    scores : (n,) predicted probability of class 1
    labels : (n,) 0 or 1
    weights : (n,) positive; None: all alike
    threshold : scores from here on count as class 1

    Returns
    -------
    `accuracy`, `auc` (nan with one class only), `log_loss` in nats, `brier`, `calibration` (mean
    label minus mean score: 0 when scores mean what they say), `rate` (of class 1).

    Raises
    ------
    BinMismatchError : lengths differ, or there are no rows.

    >>> round(binary([0.9, 0.8, 0.3, 0.2], [1, 0, 1, 0])["auc"].value, 2)
    0.75
    """
    s, y, w = columns(scores, labels, weights)
    p = np.clip(s, CLIP, 1 - CLIP)
    return {
        "accuracy": share((s >= threshold) == (y > 0), w),
        "auc": area(s, y * w, (1 - y) * w, n_effective(y * w), n_effective((1 - y) * w)),
        "log_loss": mean(-(y * np.log(p) + (1 - y) * np.log1p(-p)), w),
        "brier": mean((s - y) ** 2, w),
        "calibration": mean(y - s, w),
        "rate": share(y > 0, w),
    }


def regression(predicted: Any, actual: Any, weights: Any = None) -> dict[str, Estimate]:
    """Mean absolute error, root of the mean squared error, and bias (predicted minus actual).

    >>> round(regression([1.0, 3.0], [2.0, 1.0])["rmse"].value, 4)
    1.5811
    """
    p, a, w = columns(predicted, actual, weights)
    squares = mean((p - a) ** 2, w)
    roots = (math.sqrt(max(x, 0)) for x in (squares.value, squares.low, squares.high))
    return {
        "mae": mean(np.abs(p - a), w),
        "rmse": Estimate(*roots),
        "bias": mean(p - a, w),
    }


def classes(is_right: Any, weights: Any = None) -> dict[str, Estimate]:
    """Accuracy of named classes: (n,) whether each was the one predicted."""
    right, _, w = columns(is_right, is_right, weights)
    return {"accuracy": share(right > 0, w)}


def columns(x: Any, y: Any, weights: Any) -> tuple[Floats, Floats, Floats]:
    """Two columns and their weights as arrays.

    Raises
    ------
    BinMismatchError : lengths differ, or there are no rows.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    w = np.ones(a.shape) if weights is None else np.asarray(weights, np.float64)
    if a.ndim != 1 or not a.size or a.shape != b.shape or a.shape != w.shape:
        raise BinMismatchError(
            f"predictions {a.shape}, labels {b.shape} and weights {w.shape} must be of one length,"
            " and not empty"
        )
    return a, b, w


def n_effective(weights: Floats) -> float:
    """How many rows of one weight are worth as much (Kish)."""
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0


def mean(values: Floats, weights: Floats) -> Estimate:
    """A mean with its normal interval."""
    found = float(np.average(values, weights=weights))
    n = n_effective(weights)
    if n < 2:
        return Estimate(found, -math.inf, math.inf)
    variance = float(np.average((values - found) ** 2, weights=weights)) * n / (n - 1)
    half = _Z * math.sqrt(variance / n)
    return Estimate(found, found - half, found + half)


def around(expected: float, variances: Floats, weights: Floats) -> Estimate:
    """An expectation, and where a realisation of these rows would be."""
    half = _Z * math.sqrt(float(np.average(variances, weights=weights)) / n_effective(weights))
    return Estimate(expected, expected - half, expected + half)


def share(is_so: npt.NDArray[np.bool_], weights: Floats) -> Estimate:
    """A share with Wilson's interval, which stays within 0 and 1."""
    found, n = float(np.average(is_so, weights=weights)), n_effective(weights)
    middle = (found + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(found * (1 - found) / n + _Z**2 / (4 * n * n))
    # Rounding must not push the share itself out of its interval.
    return Estimate(found, min(middle - half, found), max(middle + half, found))


def area(scores: Floats, ones: Floats, zeros: Floats, n_ones: float, n_zeros: float) -> Estimate:
    """Probability that a row of class 1 scores above one of class 0; ties count half.

    The interval is that of Hanley and McNeil (1982), Radiology 143.
    """
    total = float(ones.sum()) * float(zeros.sum())
    if total <= 0 or min(n_ones, n_zeros) < 1:
        return Estimate(math.nan, math.nan, math.nan)
    _, group = np.unique(scores, return_inverse=True)
    up = np.bincount(group, weights=ones)
    down = np.bincount(group, weights=zeros)
    below = np.cumsum(down) - down
    auc = min(max(float((up * (below + down / 2)).sum()) / total, 0.0), 1.0)
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = (
        auc * (1 - auc) + (n_ones - 1) * (q1 - auc * auc) + (n_zeros - 1) * (q2 - auc * auc)
    ) / (n_ones * n_zeros)
    half = _Z * math.sqrt(max(variance, 0.0))
    return Estimate(auc, max(auc - half, 0.0), min(auc + half, 1.0))
