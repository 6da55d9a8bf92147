"""Outcomes that arrive later: whether the candidate did better, by labels or rewards.

Continuous ones by an interval for the mean difference that holds at every look; binary ones by the
bets of `harm`, in both directions.
"""

import math
from dataclasses import dataclass

import numpy as np

from monitors.guards import harm
from monitors.guards.bets import Floats, Integers, mixture

UNITS_MIN = 100
"""Units per variant before which no interval is given: it is an approximation."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Number, sum and sum of squares of effects seen in single units; sums of workers add up."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    @classmethod
    def of(cls, effects: Floats) -> "Sums":
        """Sums of a block of effects."""
        return cls(effects.size, float(effects.sum()), float((effects**2).sum()))


def effects(
    outcomes: Floats,
    is_candidate: Floats,
    weights: Floats,
    *,
    predicted_candidate: Floats | float = 0.0,
    predicted_control: Floats | float = 0.0,
) -> Floats:
    """What each unit says about the difference candidate minus control; right on average.

    Parameters
    ----------
    outcomes : (n,) one outcome per unit
    is_candidate : (n,) 1 where the candidate answered, 0 where the control did
    weights : (n,) probability with which the unit was given to the candidate
    predicted_candidate, predicted_control : (n,) outcomes expected from *earlier* units; the
        better they are, the narrower the interval, and wrong ones do no harm

    Notes
    -----
    Augmented inverse probability weighting: unbiased under any ramp, because each unit is weighted
    by its own probability. Source: Robins, Rotnitzky, Zhao (1994), JASA 89.
    """
    result: Floats = (
        predicted_candidate
        - predicted_control
        + is_candidate / weights * (outcomes - predicted_candidate)
        - (1 - is_candidate) / (1 - weights) * (outcomes - predicted_control)
    )
    return result


def half_width(
    n: Floats | float, deviation: Floats | float, *, alpha: float, n_decision: int
) -> Floats:
    """Half the width of the interval after n units, valid at every n.

    Parameters
    ----------
    n : (...,) units so far
    deviation : (...,) standard deviation of the effects so far
    n_decision : units at which the interval shall be narrowest; fixed beforehand, 500 at least

    Notes
    -----
    Asymptotic confidence sequence; costs 1.55 times the fixed-size width at n_decision, up to twice
    a factor of ten away. Source: Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (2024), Ann.
    Statist. 52.
    """
    level = -2 * math.log(alpha)
    tuning = (level + math.log(level + 1)) / n_decision
    scaled = np.asarray(n, np.float64) * tuning
    width: Floats = deviation * np.sqrt(
        2 * (scaled + 1) / (n * scaled) * np.log(np.sqrt(scaled + 1) / alpha)
    )
    return width


def interval(sums: Sums, *, alpha: float, n_decision: int = 5000) -> tuple[float, float, float]:
    """(mean, low, high) of the effects; (nan, -inf, inf) with fewer than `2 * UNITS_MIN` units."""
    if sums.n < 2 * UNITS_MIN:
        return math.nan, -math.inf, math.inf
    mean = sums.total / sums.n
    deviation = math.sqrt(max(sums.squares / sums.n - mean * mean, 0.0))
    half = half_width(sums.n, deviation, alpha=alpha, n_decision=max(n_decision, 500))
    return mean, mean - float(half), mean + float(half)


def log_evidence_two_sided(events: Integers, weights: Floats) -> Floats:
    """Logarithm of the evidence that the candidate has more, or fewer, of a binary outcome.

    Shapes as in `harm.log_evidence`; half of the stake goes to each direction.
    """
    more = harm.log_evidence(events, weights)
    less = harm.log_evidence(events[..., ::-1], 1 - weights)
    return mixture(np.stack([more, less], axis=-1))
