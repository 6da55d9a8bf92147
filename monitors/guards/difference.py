"""A difference of means against a margin: evidence that it is more, or less, at every look.

What is compared is how often (or how much) something bad comes out, candidate minus control. The
gateway knows the probability `w` with which a unit was the candidate's, so

    effect = (y - c) * (1/w if candidate else -1/(1 - w))

is the difference on average, for any constant c. Yes-or-no outcomes leave finitely many effects:
bets on them are exact, and need counts only. Others get a test that is right for many units
(`UNITS_MIN` of each variant), by the normal mixture that also makes the interval.
"""

import math

import numpy as np

from monitors.guards.bets import CANDIDATE, CONTROL, Floats, Integers, mixture

UNITS_MIN = 100
"""Units of each variant with an outcome, before which one that is a number is not judged."""
N_DECISION = 5000
"""Units at which intervals are narrowest; fixed beforehand."""
_STAKES = np.array([*(0.002 * 2.0 ** np.arange(9)), 0.9])
"""Parts of the highest stake that cannot be ruined."""
_CENTRES = np.array([0.0, 0.5, 1.0])
"""Constants that are taken off: each is best for outcomes that are rare, even or common."""


def log_evidence_binary(counts: Integers, weights: Floats, *, margin: float, side: int) -> Floats:
    """Logarithm of the evidence that the difference of shares is on one side of the margin.

    Parameters
    ----------
    counts : (..., n_weights, 2, 2) units with a good (0) and a bad (1) outcome, of candidate and
        control, while a weight was in force
    weights : (n_weights,) the candidate's share of what the two variants got, 0 < w < 1
    margin : difference of the shares of bad outcomes, candidate minus control
    side : 1 for "more than the margin", -1 for "less than the margin"

    Returns
    -------
    (...,) natural logarithms; log(1 / alpha) is reached with probability alpha at most while the
    expected difference is not on that side, unit for unit.

    Notes
    -----
    Thirty bets with an even stake: ten stakes times three constants. Source: Waudby-Smith and
    Ramdas (2024), J. R. Stat. Soc. B 86, for means of bounded variables by betting.
    """
    weight = weights[:, None, None]
    draw = np.concatenate([1 / weight, -1 / (1 - weight)], axis=-1)  # (n_weights, 1, 2)
    outcome = np.array([0.0, 1.0])[:, None]
    bets = []
    for centre in _CENTRES:
        gain = side * ((outcome - centre) * draw - margin)  # (n_weights, 2, 2)
        highest = 1 / np.maximum(-gain.min(axis=(-2, -1)), 1e-9)
        for part in _STAKES:
            factor = np.log1p((part * highest)[:, None, None] * gain)
            bets.append((counts * factor).sum(axis=(-3, -2, -1)))
    return mixture(np.stack(bets, axis=-1))


def log_evidence_mean(
    n: Floats, total: Floats, squares: Floats, weights: Floats, *, margin: float, side: int
) -> Floats:
    """The same for outcomes that are numbers, from sums of effects; right for many units.

    Parameters
    ----------
    n, total, squares : (..., n_weights) number, sum and sum of squares of effects
    weights, margin, side : as in `log_evidence_binary`
    """
    scale = weights * (1 - weights)
    deviation = np.sqrt((scale**2 * _scatter(n, total, squares)).sum(axis=-1))
    lead = side * (scale * (total - n * margin)).sum(axis=-1)
    time = n.sum(axis=-1) * _tuning(0.01) / N_DECISION
    z = np.maximum(lead, 0.0) / np.maximum(deviation, 1e-300)
    # Half of the two-sided test is thrown away, not used twice: a little less power.
    logs: Floats = np.where(
        deviation > 0, z**2 * time / (2 * (time + 1)) - 0.5 * np.log1p(time), 0.0
    )
    return logs


def interval(
    n: Floats, total: Floats, squares: Floats, weights: Floats, *, alpha: float = 0.05
) -> tuple[float, float, float]:
    """(best, low, high) of the difference, candidate minus control, valid at every look.

    Parameters as in `log_evidence_mean`, without leading axes. Units drawn at an even weight say
    more than others, and weigh more.
    """
    scale = weights * (1 - weights)
    whole = float((scale * n).sum())
    if not whole:
        return math.nan, -math.inf, math.inf
    best = float((scale * total).sum()) / whole
    deviation = math.sqrt(float((scale**2 * _scatter(n, total, squares)).sum())) / whole
    time = float(n.sum()) * _tuning(alpha) / N_DECISION
    half = deviation * math.sqrt(2 * (time + 1) / time * math.log(math.sqrt(time + 1) / alpha))
    return best, best - half, best + half


def _scatter(n: Floats, total: Floats, squares: Floats) -> Floats:
    """Sum of squares around the mean, under each weight."""
    scatter: Floats = np.maximum(squares - total**2 / np.maximum(n, 1), 0.0)
    return scatter


def _tuning(alpha: float) -> float:
    level = -2 * math.log(alpha)
    return level + math.log(level + 1)


def is_enough(units: Integers) -> bool:
    """Whether both variants have units enough for a test of numbers. `units`: (2,)."""
    return int(min(units[CANDIDATE], units[CONTROL])) >= UNITS_MIN
