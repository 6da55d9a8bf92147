"""What one month of the replay showed: outcomes as the client knows them, scores as served."""

import calendar
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm as the server reports it."""

    channel: str
    psi: float
    """Of the month in which it was first seen."""
    line: float
    since: int
    """The month in which the evidence began."""


@dataclass(frozen=True, slots=True)
class Month:
    """One month, closed."""

    number: int
    n_flights: int
    late_rate: float
    score_mean: float
    auc: float
    auc_error: float
    """Half the width of its 95 % interval."""
    psi: Mapping[str, float]
    """By channel: `input:temp`, `output:probability`; nan where the window has no rows of it."""
    lines: Mapping[str, float]
    """By channel: what 99 % of windows without drift do not exceed."""
    alarms: tuple[Alarm, ...]
    """Pages of columns and answers that were open when it closed."""
    n_witnesses: int = 0
    """Pages that were open then about how columns lie among each other."""

    @property
    def name(self) -> str:
        """In full."""
        return name_of(self.number)


def name_of(window: int) -> str:
    """The month that a window is, as long as nobody else sends rows too."""
    return calendar.month_name[window] if 1 <= window <= 12 else f"window {window}"


def auc(late: NDArray[np.bool_], score: NDArray[np.float64]) -> float:
    """Area under the ROC curve: the chance that a late flight scores above a punctual one.

    Parameters
    ----------
    late : (n_rows,) the outcome
    score : (n_rows,) what the model said; equal scores count half

    Returns
    -------
    A share, 0.5 for guessing; nan if all outcomes are the same.

    Notes
    -----
    Mann and Whitney's U by mean ranks, divided by the number of pairs.

    >>> auc(np.array([False, False, True]), np.array([0.1, 0.3, 0.3]))
    0.75
    """
    n_late = int(late.sum())
    n_pairs = n_late * (len(late) - n_late)
    if n_pairs == 0:
        return math.nan
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[late].sum() - n_late * (n_late + 1) / 2) / n_pairs)


def auc_error(area: float, n_late: int, n_punctual: int) -> float:
    """Half the width of the 95 % interval of an AUC.

    Parameters
    ----------
    area : the AUC
    n_late, n_punctual : rows of either outcome

    Returns
    -------
    1.96 standard errors; nan without rows of both.

    Notes
    -----
    Source: Hanley and McNeil (1982), Radiology 143, formula 1 with negative exponential scores.

    >>> round(auc_error(0.7, 500, 1500), 3)
    0.028
    """
    if n_late == 0 or n_punctual == 0:
        return math.nan
    both_late = area / (2 - area)
    both_punctual = 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area)
        + (n_late - 1) * (both_late - area**2)
        + (n_punctual - 1) * (both_punctual - area**2)
    ) / (n_late * n_punctual)
    return 1.96 * math.sqrt(variance)
