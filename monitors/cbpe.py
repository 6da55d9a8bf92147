"""How good a model probably is while labels are not there yet: from its own calibrated scores.

If a score of 0.8 meant label 1 in 80 of 100 cases, expected hits follow from scores alone. The
estimate is blind to one thing, and that thing is common: when what the inputs mean has changed
(concept drift), the scores are as confident as before, and so is the estimate. It answers "given
that the model is still right about what it sees, how good is it on these rows", nothing more.
"""

from dataclasses import dataclass

import numpy as np

from monitors.counts import Counts
from monitors.errors import BlockError
from monitors.layout import Floats
from monitors.scored import SCORE_BINS, Estimate, Scored

BLINDNESS = (
    "estimated from the scores alone: a change of what the inputs mean (concept drift) is not in it"
)
"""What has to stand beside every such figure."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a score was worth on labelled reference rows: rising, by isotonic regression."""

    shares: Floats
    """(SCORE_BINS,) probability of label 1 per bin of the score."""

    @classmethod
    def fit(cls, reference: Scored) -> "Calibration":
        """Pool adjacent violators over the bins.

        Raises
        ------
        BlockError : fewer than 50 labelled rows, or only one label among them.

        Notes
        -----
        Source: Ayer et al. (1955), Ann. Math. Stat. 26. Bins without rows take the line between
        their neighbours.
        """
        rows = reference.counts.sum(axis=0)
        hits = reference.counts[1]
        if reference.n_rows < 50 or not 0 < hits.sum() < reference.n_rows:
            raise BlockError("calibration needs at least 50 labelled rows, with both labels")
        pools: list[list[float]] = []  # mean, weight, and the places of bins
        places: list[list[int]] = []
        for k in np.flatnonzero(rows).tolist():
            pools.append([float(hits[k] / rows[k]), float(rows[k])])
            places.append([k])
            while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
                (mean, weight), (last, more) = pools[-2], pools.pop()
                pools[-1] = [(mean * weight + last * more) / (weight + more), weight + more]
                last_places = places.pop()
                places[-1] += last_places
        known = [k for group in places for k in group]
        values = [mean for (mean, _), group in zip(pools, places, strict=True) for _ in group]
        return cls(np.interp(np.arange(SCORE_BINS), known, values))


def estimated(scores: Counts, calibration: Calibration) -> Scored:
    """Expected labelled rows of unlabelled ones, in thousandths of a row.

    Parameters
    ----------
    scores : (SCORE_BINS,) rows by score, of any number of workers added up
    """
    ones = scores * calibration.shares
    return Scored(np.rint(1000 * np.array([scores - ones, ones])).astype(np.int64))


def accuracy(scores: Counts, calibration: Calibration, threshold: float = 0.5) -> Estimate:
    """Expected accuracy; the interval is that of the labels if the scores are right."""
    cut = round(threshold * SCORE_BINS)
    right = np.where(np.arange(SCORE_BINS) >= cut, calibration.shares, 1 - calibration.shares)
    n = int(scores.sum())
    if not n:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean = float((scores * right).sum() / n)
    half = 1.959964 * float(np.sqrt((scores * right * (1 - right)).sum())) / n
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def auc(scores: Counts, calibration: Calibration) -> Estimate:
    """Expected area under the ROC curve, with the interval of as many labelled rows."""
    found = estimated(scores, calibration).auc()
    n = int(scores.sum())
    # Of thousandths the interval is too narrow by the root of a thousand.
    half = (found.high - found.low) / 2 * 1000**0.5
    return Estimate(found.value, max(0.0, found.value - half), min(1.0, found.value + half), n)
