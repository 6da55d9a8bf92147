"""Harm: whether bad events (errors, timeouts, slow requests) fall on the candidate too often.

Bets are made at bad events only. If the candidate's rate of them is `ratio` times the control's,
and it gets the share `weight` of requests, then a bad event is one of the candidate's with
probability weight * ratio / (weight * ratio + 1 - weight), whatever the rates themselves are.
With sticky units count the first bad event of each unit only: later ones say nothing new.
"""

import numpy as np

from monitors.guards.bets import CANDIDATE, CONTROL, Floats, Integers, mixture

RATIOS = np.array([1.25, 1.5, 2, 3, 5, 10, 30, 100])
"""How many times worse than allowed the bets suppose the candidate to be."""

_BETTER = np.array([0.5, 0.7, 0.8, 0.9])
_GRID = np.exp(np.linspace(np.log(1e-3), np.log(1e3), 601))


def candidate_share(ratio: Floats | float, weight: Floats | float) -> Floats:
    """Share of bad events that are the candidate's, at this ratio of rates and this weight.

    >>> float(candidate_share(3.0, 0.25))
    0.5
    """
    ratio, weight = np.asarray(ratio, np.float64), np.asarray(weight, np.float64)
    share: Floats = weight * ratio / (weight * ratio + 1 - weight)
    return share


def log_evidence(bad: Integers, weights: Floats, *, ratio_allowed: float = 1.0) -> Floats:
    """Logarithm of the evidence that the candidate is worse than allowed.

    Parameters
    ----------
    bad : (..., n_weights, 2) bad events of candidate and control while a weight was in force
    weights : (n_weights,) the candidate's share of what the two variants got, 0 < w < 1
    ratio_allowed : the ratio of rates, candidate to control, that nobody minds

    Returns
    -------
    (...,) natural logarithms; log(1 / alpha) is reached with probability alpha at most while the
    candidate's rate is `ratio_allowed` times the control's, or less.

    Notes
    -----
    An even mixture of eight likelihood ratios, at `RATIOS` times the ratio allowed. Source: Ville
    (1939); Lindon, Sanden, Shirikian (2022), arXiv 2205.14762, for counts in canaries.
    """
    return mixture(_log_ratios(bad, weights, RATIOS * ratio_allowed, ratio_allowed))


def log_evidence_no_worse(bad: Integers, weights: Floats, *, ratio_margin: float) -> Floats:
    """Logarithm of the evidence that the candidate's rate is below `ratio_margin` times control's.

    Shapes as in `log_evidence`. The bets suppose equal rates (half of the stake) or better ones.
    """
    supposed = np.concatenate([np.ones(_BETTER.size), _BETTER])
    return mixture(_log_ratios(bad, weights, supposed, ratio_margin))


def ratio_interval(
    bad: Integers, weights: Floats, *, alpha: float = 0.05
) -> tuple[float, float, float]:
    """The ratio of rates that fits best, and the always-valid interval around it.

    Parameters
    ----------
    bad : (n_weights, 2) bad events of candidate and control
    weights : (n_weights,) the candidate's share, 0 < w < 1

    Returns
    -------
    (best, low, high): ratios between 1/1000 and 1000, to about 2 %; (nan, 0, inf) without events.
    The interval holds the true ratio at every look with probability 1 - alpha.
    """
    if not bad.sum():
        return float("nan"), 0.0, float("inf")
    logs = _log_likelihood(bad, weights, _GRID)
    # The stake is spread over the whole grid; a ratio is out when the mixture beats it by 1/alpha.
    inside = mixture(logs) - logs < np.log(1 / alpha)
    low, high = _GRID[inside][[0, -1]]
    best = _GRID[logs.argmax()]
    if not bad[..., CANDIDATE].sum():
        best = low = 0.0
    if not bad[..., CONTROL].sum():
        best = high = float("inf")
    return float(best), float(low), float(high)


def _log_ratios(bad: Integers, weights: Floats, ratios: Floats, ratio_null: float) -> Floats:
    """(..., n_ratios) log likelihood ratios of each supposed ratio against the null's."""
    null = _log_likelihood(bad, weights, np.array([ratio_null]))
    return _log_likelihood(bad, weights, ratios) - null


def _log_likelihood(bad: Integers, weights: Floats, ratios: Floats) -> Floats:
    share = candidate_share(ratios, weights[:, None])
    candidate = bad[..., CANDIDATE].astype(np.float64) @ np.log(share)
    logs: Floats = candidate + bad[..., CONTROL].astype(np.float64) @ np.log1p(-share)
    return logs
