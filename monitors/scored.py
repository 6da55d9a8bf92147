"""Labelled rows as counts, how good they say the answers were, and loss channels for a detector.

performance.py reckons from rows and their weights; here nothing but counts is kept.

What is kept of a labelled row is one cell: the bin of its score and its label, or the bin of its
error. So labels of many workers and months add up exactly, in any order, like everything here. The
same cells are channels of a detector, under the budget of the model.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from monitors.counts import Counts
from monitors.errors import BlockError
from monitors.layout import SPECIAL, Floats, Layout

SCORE_BINS = 200
"""Bins of a probability: fine enough that an area from counts is that from rows within 0.005."""
LOSS_EDGES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.5)
"""Between the bins of a row's log loss, in nats."""
GAP_BINS = 10
"""Bins of the score in the calibration channel, each told apart by its label."""

_Z = 1.959964
_CLIP = 1e-6


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; nan where there is nothing to say."""

    value: float
    low: float
    high: float
    n_rows: int


@dataclass(frozen=True, eq=False)
class Scored:
    """Labelled rows of a binary classifier, by score and label."""

    counts: Counts
    """(2, SCORE_BINS) rows with label 0 and label 1."""

    @classmethod
    def of(cls, scores: npt.ArrayLike, labels: npt.ArrayLike) -> "Scored":
        """Count rows.

        Parameters
        ----------
        scores : (n_rows,) probability of label 1, in [0, 1]
        labels : (n_rows,) 0 or 1

        Raises
        ------
        BlockError : lengths differ, a score is no probability, or a label is neither 0 nor 1.
        """
        p = np.asarray(scores, np.float64)
        y = np.asarray(labels, np.float64)
        if p.shape != y.shape or p.ndim != 1:
            raise BlockError(f"scores of shape {p.shape}, labels of shape {y.shape}")
        if p.size and not ((p >= 0) & (p <= 1)).all():
            raise BlockError("a score is not a probability: it must be from 0 to 1")
        if not np.isin(y, (0.0, 1.0)).all():
            raise BlockError("a label is neither 0 nor 1")
        cells = y.astype(np.intp) * SCORE_BINS + _bin_of(p)
        return cls(np.bincount(cells, minlength=2 * SCORE_BINS).reshape(2, SCORE_BINS))

    def __add__(self, other: "Scored") -> "Scored":
        return Scored(self.counts + other.counts)

    @property
    def n_rows(self) -> int:
        """Rows counted."""
        return int(self.counts.sum())

    def accuracy(self, threshold: float = 0.5) -> Estimate:
        """Share of rows on the right side of a threshold (to the nearest edge of a bin)."""
        cut = round(threshold * SCORE_BINS)
        right = int(self.counts[0, :cut].sum() + self.counts[1, cut:].sum())
        return _share(right, self.n_rows)

    def base_rate(self) -> Estimate:
        """Share of rows with label 1."""
        return _share(int(self.counts[1].sum()), self.n_rows)

    def auc(self) -> Estimate:
        """Area under the ROC curve; rows of one bin count as ties.

        Notes
        -----
        Interval by the variance of Hanley and McNeil (1982), Radiology 143.
        """
        negative, positive = self.counts.astype(np.float64)
        n, m = negative.sum(), positive.sum()
        if not n or not m:
            return Estimate(math.nan, math.nan, math.nan, self.n_rows)
        below = np.cumsum(negative) - negative
        area = float((positive * (below + negative / 2)).sum() / (n * m))
        q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
        variance = area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)
        half = _Z * math.sqrt(max(variance, 0.0) / (n * m))
        return Estimate(area, max(0.0, area - half), min(1.0, area + half), self.n_rows)

    def log_loss(self) -> Estimate:
        """Mean of -log of the probability that was given to what happened, in nats."""
        p = np.clip(_CENTERS, _CLIP, 1 - _CLIP)
        return _mean(self.counts, np.array([-np.log1p(-p), -np.log(p)]))

    def brier(self) -> Estimate:
        """Mean squared distance of score and label."""
        return _mean(self.counts, np.array([_CENTERS**2, (1 - _CENTERS) ** 2]))

    def calibration(self, n_bins: int = GAP_BINS) -> list[tuple[float, Estimate]]:
        """Mean score and share of label 1, for scores in each of `n_bins` equal parts with rows."""
        found = []
        for part in np.split(np.arange(SCORE_BINS), n_bins):
            rows = self.counts[:, part].sum(axis=0)
            n = int(rows.sum())
            if n:
                mean = float((rows * _CENTERS[part]).sum() / n)
                found.append((mean, _share(int(self.counts[1, part].sum()), n)))
        return found

    def calibration_error(self, n_bins: int = GAP_BINS) -> float:
        """Mean gap of score and share of label 1 over the parts, weighted by their rows."""
        rows = [share.n_rows for _, share in self.calibration(n_bins)]
        gaps = [abs(mean - share.value) for mean, share in self.calibration(n_bins)]
        return float(np.average(gaps, weights=rows)) if rows else math.nan


@dataclass(frozen=True, slots=True)
class Errors:
    """Labelled rows of a regression: sums of errors, which add up.

    Sums are kept in whole steps, so that they are exact in any order.
    """

    n_rows: int
    step: float
    """What one unit of the sums is."""
    absolute: int
    squared: int
    """In steps squared."""
    fourth: int
    """In steps to the fourth power."""

    @classmethod
    def of(cls, predicted: npt.ArrayLike, actual: npt.ArrayLike, *, step: float) -> "Errors":
        """Count rows; an error is rounded to `step`, for which a thousandth of the sd is fine.

        Raises
        ------
        BlockError : lengths differ, a value is not finite, or an error is beyond 2**31 steps.
        """
        a, b = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
        if a.shape != b.shape or a.ndim != 1:
            raise BlockError(f"predictions of shape {a.shape}, labels of shape {b.shape}")
        steps = np.rint((a - b) / step)
        if not np.isfinite(steps).all() or (np.abs(steps) > 2**31).any():
            raise BlockError("an error is not finite, or too large for its step")
        whole = [int(value) for value in steps.tolist()]
        return cls(
            len(whole),
            step,
            sum(map(abs, whole)),
            sum(value**2 for value in whole),
            sum(value**4 for value in whole),
        )

    def __add__(self, other: "Errors") -> "Errors":
        if self.step != other.step:
            raise BlockError(f"errors in steps of {self.step} and of {other.step} do not add up")
        return Errors(
            self.n_rows + other.n_rows,
            self.step,
            self.absolute + other.absolute,
            self.squared + other.squared,
            self.fourth + other.fourth,
        )

    def mae(self) -> Estimate:
        """Mean absolute error."""
        if not self.n_rows:
            return Estimate(math.nan, math.nan, math.nan, 0)
        mean, square = self.absolute / self.n_rows, self.squared / self.n_rows
        half = _Z * math.sqrt(max(square - mean**2, 0.0) / self.n_rows)
        return Estimate(
            self.step * mean,
            self.step * max(0.0, mean - half),
            self.step * (mean + half),
            self.n_rows,
        )

    def rmse(self) -> Estimate:
        """Root of the mean squared error."""
        if not self.n_rows:
            return Estimate(math.nan, math.nan, math.nan, 0)
        square = self.squared / self.n_rows
        half = _Z * math.sqrt(max(self.fourth / self.n_rows - square**2, 0.0) / self.n_rows)
        low, high = math.sqrt(max(0.0, square - half)), math.sqrt(square + half)
        return Estimate(
            self.step * math.sqrt(square), self.step * low, self.step * high, self.n_rows
        )


class LossChannels:
    """The channels of labels: log loss per row, and label by part of the score (calibration).

    With the layout a detector judges them under the labels' part of the budget
    (`Detector(channels.layout, budget.part(...))`), by cohorts of prediction time.

    Parameters
    ----------
    reference : labelled rows of the training data, or of a healthy time
    """

    def __init__(self, reference: Scored) -> None:
        if not reference.n_rows:
            raise BlockError("no labelled rows to compare with")
        self.reference = reference
        self._n_loss = len(LOSS_EDGES) + 1

    @cached_property
    def layout(self) -> Layout:
        """Two channels, `loss` and `calibration`."""
        edges = (0.0, *LOSS_EDGES, math.inf)
        labels = [f"loss {a:g} .. {b:g}" for a, b in itertools.pairwise(edges)]
        labels += [
            f"score {k / GAP_BINS:g} .. {(k + 1) / GAP_BINS:g}, label {label}"
            for label in (0, 1)
            for k in range(GAP_BINS)
        ]
        counts = self.cells(self.reference)
        return Layout(
            names=("loss", "calibration"),
            features=("loss", "calibration"),
            sizes=np.array([self._n_loss, 2 * GAP_BINS], np.intp),
            n_ordered=np.array([self._n_loss, 0], np.intp),
            counts=counts,
            doubt=np.full(counts.size, 0.5),
            labels=tuple(labels),
            special={word: [-1, -1] for word in SPECIAL},
            effects=np.ones(2),
        )

    def cells(self, rows: Scored) -> Counts:
        """(n_cells,) rows in the cells of the layout."""
        loss = np.bincount(_LOSS_BIN.ravel(), weights=rows.counts.ravel(), minlength=self._n_loss)
        parts = rows.counts.reshape(2, GAP_BINS, -1).sum(axis=2)
        return np.concatenate([loss.astype(np.int64), parts.ravel()])


def _bin_of(p: Floats) -> npt.NDArray[np.intp]:
    return np.minimum((p * SCORE_BINS).astype(np.intp), SCORE_BINS - 1)


_CENTERS: Floats = (np.arange(SCORE_BINS) + 0.5) / SCORE_BINS
_LOSS_BIN = np.searchsorted(LOSS_EDGES, np.array([-np.log1p(-_CENTERS), -np.log(_CENTERS)]))


def _share(hits: int, n: int) -> Estimate:
    """A share with the interval of Wilson (1927), J. Am. Stat. Assoc. 22."""
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p, z2 = hits / n, _Z**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, max(0.0, center - half), min(1.0, center + half), n)


def _mean(counts: Counts, values: Floats) -> Estimate:
    """Mean of a value per cell over rows, with a normal interval."""
    n = int(counts.sum())
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float((counts * values).sum() / n)
    half = _Z * math.sqrt(max(float((counts * values**2).sum() / n) - mean**2, 0.0) / n)
    return Estimate(mean, mean - half, mean + half, n)
