"""Shift: whether what the candidate answers, or is asked, is distributed as with the control.

Values fall in bins that were frozen before they came. In each bin the candidate's share should be
its weight; the bets suppose that it is some other share, drawn from a beta distribution around the
weight. On outputs a breach means that the candidate answers differently. On inputs it means that
assignment is broken (a cache in front, clients that choose, a lost header): the rollout is invalid.
"""

import numpy as np

from monitors.guards.bets import CANDIDATE, CONTROL, Floats, Integers, log_beta

CONCENTRATION = 200.0
"""How close around the weight the shares are supposed to be, as a number of observations."""


def log_evidence(
    counts: Integers, weights: Floats, *, concentration: float = CONCENTRATION
) -> Floats:
    """Logarithm of the evidence that some bin's share differs from the weight.

    Parameters
    ----------
    counts : (..., n_weights, n_bins, 2) observations of candidate and control, one per unit
    weights : (n_weights,) the candidate's share of what the two variants got, 0 < w < 1
    concentration : of the beta distribution around the weight; larger finds smaller shifts, later

    Returns
    -------
    (...,) natural logarithms; log(1 / alpha) is reached with probability alpha at most while
    assignment does not depend on the bin.

    Notes
    -----
    Beta-binomial against binomial, multiplied over bins and weights. Source: Lindon and Malek
    (2022), arXiv 2011.03567, for the multinomial form.
    """
    candidate = counts[..., CANDIDATE].astype(np.float64)
    control = counts[..., CONTROL].astype(np.float64)
    weight = weights[:, None]
    before = log_beta(concentration * weights, concentration * (1 - weights))[:, None]
    mixed = log_beta(concentration * weight + candidate, concentration * (1 - weight) + control)
    null = candidate * np.log(weight) + control * np.log1p(-weight)
    logs: Floats = (mixed - before - null).sum(axis=(-2, -1))
    return logs
