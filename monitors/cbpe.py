"""How good a model probably is while labels are not there yet: from its own scores.

If a score of 0.8 meant class 1 in 80 of 100 cases, expected hits follow from scores alone. The
estimate is blind to one thing, and that thing is common: when what the inputs mean has changed
(concept drift), the scores are as confident as before, and so is the estimate. It answers "given
that the model is still right about what it sees, how good is it on these rows", nothing more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from monitors.errors import BlockError
from monitors.layout import Floats
from monitors.performance import CLIP, Estimate, area, around, columns, mean, n_effective

BLINDNESS = (
    "estimated from scores alone: blind to concept drift, when the same inputs come to mean"
    " something else"
)
"""What has to stand beside every such figure."""
SCORE_BINS = 200
_ROWS_MIN = 50


@dataclass(frozen=True, eq=False, slots=True)
class Calibration:
    """What a score was worth on labelled reference rows: rising, by isotonic regression."""

    shares: Floats
    """(SCORE_BINS,) probability of class 1 in the middle of each bin of the score."""

    @classmethod
    def fit(cls, scores: Any, labels: Any, weights: Any = None) -> "Calibration":
        """Pool adjacent violators over the bins of the score.

        Raises
        ------
        BlockError : fewer than 50 labelled rows, or only one label among them.

        Notes
        -----
        Source: Ayer et al. (1955), Ann. Math. Stat. 26. Bins without rows take the line between
        their neighbours.
        """
        s, y, w = columns(scores, labels, weights)
        if s.size < _ROWS_MIN or not 0 < y.sum() < y.size:
            raise BlockError(f"calibration needs {_ROWS_MIN} labelled rows, with both labels")
        bins = np.minimum((np.clip(s, 0, 1) * SCORE_BINS).astype(np.intp), SCORE_BINS - 1)
        rows = np.bincount(bins, weights=w, minlength=SCORE_BINS)
        hits = np.bincount(bins, weights=w * y, minlength=SCORE_BINS)
        pools: list[tuple[float, float, list[int]]] = []  # mean, weight, bins
        for k in np.flatnonzero(rows).tolist():
            pools.append((float(hits[k] / rows[k]), float(rows[k]), [k]))
            while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
                (low, n, before), (high, more, own) = pools[-2:]
                pools[-2:] = [((low * n + high * more) / (n + more), n + more, before + own)]
        known = [k for _, _, group in pools for k in group]
        values = [share for share, _, group in pools for _ in group]
        return cls(np.interp(np.arange(SCORE_BINS), known, values))

    def __call__(self, scores: Any) -> Floats:
        """(n,) probability of class 1 at these scores."""
        at = np.asarray(scores, np.float64) * SCORE_BINS - 0.5
        return np.interp(at, np.arange(SCORE_BINS), self.shares)


def estimated(
    scores: Any,
    weights: Any = None,
    *,
    calibration: Calibration | None = None,
    threshold: float = 0.5,
) -> dict[str, Estimate]:
    """What `performance.binary` would find, without any label.

    Parameters
    ----------
    scores : (n,) predicted probability of class 1
    weights : (n,) positive; None: all alike
    calibration : what scores were worth on labelled rows; None: they are believed as they are

    Notes
    -----
    A row of probability p is of class 1 with probability p, so accuracy, AUC, log loss and rate
    have expectations that scores alone give. Source: NannyML's confidence-based performance
    estimation; expected values as in Guillory et al. (2021), ICCV.
    """
    s, _, w = columns(scores, scores, weights)
    p = s if calibration is None else calibration(s)
    sure = np.clip(s, CLIP, 1 - CLIP)
    n, rate = n_effective(w), float(np.average(p, weights=w))
    right = np.where(s >= threshold, p, 1 - p)
    return {
        "accuracy": around(float(np.average(right, weights=w)), right * (1 - right), w),
        "auc": area(s, p * w, (1 - p) * w, n * rate, n * (1 - rate)),
        "log_loss": mean(-(p * np.log(sure) + (1 - p) * np.log1p(-sure)), w),
        "rate": around(rate, p * (1 - p), w),
    }
