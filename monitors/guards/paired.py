"""Pairs: two versions asked the same, so that what differs is the version alone.

Unlike the bets on the variant these rest on the stream of data: count one pair per unit when units
repeat, and read a share as "at every time, given the past".
"""

import numpy as np
import numpy.typing as npt

from monitors.guards.bets import Floats, mixture

_TIMES = np.array([1.25, 1.5, 2, 3, 5, 10, 20])
_WRONG_ALONE = np.arange(0.55, 0.95, 0.05)

Numbers = npt.NDArray[np.int64] | int


def log_evidence_above(hits: Numbers, n: Numbers, share_allowed: float) -> Floats:
    """Logarithm of the evidence that more than this share of cases are hits.

    For disagreement beyond a tolerance, and for ceilings on errors or slow requests.

    Parameters
    ----------
    hits, n : (...,) cases that disagree (err, are slow), and all cases
    share_allowed : 0 < share < 1

    Notes
    -----
    Mixture of likelihood ratios at multiples of the share allowed, none above half-way from it
    to 1; Ville's inequality bounds false alarms at every look.
    """
    supposed = np.unique(np.minimum(_TIMES * share_allowed, (1 + share_allowed) / 2))
    hit = np.asarray(hits, np.float64)[..., None]
    rest = np.asarray(n - hits, np.float64)[..., None]
    logs = hit * np.log(supposed / share_allowed) + rest * np.log(
        (1 - supposed) / (1 - share_allowed)
    )
    return mixture(logs)


def log_evidence_wrong_more_often(candidate_alone: Numbers, champion_alone: Numbers) -> Floats:
    """Logarithm of the evidence that the candidate is wrong more often, once labels are there.

    Parameters
    ----------
    candidate_alone : (...,) cases in which only the candidate was wrong
    champion_alone : (...,) cases in which only the champion was

    Notes
    -----
    Cases in which both are right, or both wrong, say nothing. Without a difference the others are
    throws of a fair coin. Source: McNemar (1947), Psychometrika 12, made sequential by betting.
    """
    candidate = np.asarray(candidate_alone, np.float64)[..., None]
    champion = np.asarray(champion_alone, np.float64)[..., None]
    return mixture(candidate * np.log(2 * _WRONG_ALONE) + champion * np.log(2 - 2 * _WRONG_ALONE))
