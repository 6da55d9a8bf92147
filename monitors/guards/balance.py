"""Balance: whether the candidate got as many units as its weight says (sample-ratio mismatch).

Count units, each in the weight under which it was first seen: requests of sticky units come in
heaps, and a chi-square test on requests is wrong four times in five. A breach says that numbers
from this rollout cannot be trusted, not that the candidate is bad.
"""

from monitors.guards import shift
from monitors.guards.bets import Floats, Integers

ALPHA = 0.001
"""The customary level for this check: it is looked at all the time and must stay quiet."""
CONCENTRATION = 100.0


def log_evidence(units: Integers, weights: Floats) -> Floats:
    """Logarithm of the evidence that the candidate's share of units is not its weight.

    Parameters
    ----------
    units : (..., n_weights, 2) units of candidate and control
    weights : (n_weights,) the candidate's share of what the two variants got, 0 < w < 1
    """
    return shift.log_evidence(units[..., None, :], weights, concentration=CONCENTRATION)
