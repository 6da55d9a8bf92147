"""What all guards share: bets in logarithms, mixed, and the logarithm of the gamma function."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

CANDIDATE, CONTROL = 0, 1
"""Places of the two variants on the last axis of every count."""

_STIRLING_FROM = 8


def mixture(logs: Floats) -> Floats:
    """Logarithm of the mean of exp(logs) over the last axis: a stake spread evenly over bets."""
    highest = logs.max(axis=-1, keepdims=True)
    mean = np.exp(logs - highest).mean(axis=-1)
    total: Floats = np.log(mean) + highest[..., 0]
    return total


def log_gamma(x: Floats | float) -> Floats:
    """Logarithm of the gamma function for x > 0, to about 1e-12.

    Notes
    -----
    Stirling's series of x + 8, and the recurrence back to x. scipy has the same function; its
    import takes half a second, which every worker would pay.

    >>> round(float(log_gamma(5.0)), 10) == round(math.log(24), 10)
    True
    """
    x = np.asarray(x, dtype=np.float64)
    shifted = x + _STIRLING_FROM
    steps = np.ones_like(x)
    for step in range(_STIRLING_FROM):
        steps = steps * (x + step)
    inverse = 1 / shifted
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    log: Floats = (
        (shifted - 0.5) * np.log(shifted) - shifted + 0.5 * np.log(2 * np.pi) + series
    ) - np.log(steps)
    return log


def log_beta(a: Floats, b: Floats) -> Floats:
    """Logarithm of the beta function."""
    return log_gamma(a) + log_gamma(b) - log_gamma(a + b)
