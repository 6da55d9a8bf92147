"""Power: what a step can see at the traffic there is, said before it starts."""

import math
from dataclasses import dataclass

import numpy as np

from monitors.guards import harm
from monitors.guards.bets import Floats

ENOUGH_EVIDENCE = 20.0
"""Evidence at which "no worse than the margin" counts as shown."""

_RATIO_MAX = 1000.0


@dataclass(frozen=True, slots=True)
class Sight:
    """What one step can tell apart."""

    requests: float
    """Requests of both variants together while the step lasts."""
    rate: float
    """The control's rate of bad events."""
    ratio: float
    """The smallest ratio of rates found in four of five cases; inf: not even a broken candidate."""


def requests_needed(
    rate: float, ratio: float, weight: float, *, log_bound: float, power: float = 0.5
) -> float:
    """Requests, of both variants together, until a candidate this much worse is found.

    Parameters
    ----------
    rate : the control's rate of bad events
    ratio : the candidate's rate divided by it
    weight : the candidate's share of requests
    log_bound : log(m / alpha) for m guards
    power : share of rollouts in which that many requests are enough

    Returns
    -------
    inf where no number of requests below 1e12 is enough.
    """
    low, high = 1.0, 1e12
    if not _is_found(high, rate, ratio, weight, log_bound, power):
        return math.inf
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if _is_found(middle, rate, ratio, weight, log_bound, power):
            high = middle
        else:
            low = middle
    return high


def detectable_ratio(
    requests: float, rate: float, weight: float, *, log_bound: float, power: float = 0.8
) -> float:
    """The smallest ratio of rates that so many requests find; inf when none is found.

    Parameters as in `requests_needed`; the candidate's rate is 1 at most.
    """
    low, high = 1.0, min(1 / rate, _RATIO_MAX) if rate > 0 else _RATIO_MAX
    rate = max(rate, 1e-6)
    if requests <= 0 or not _is_found(requests, rate, high, weight, log_bound, power):
        return math.inf
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        if _is_found(requests, rate, middle, weight, log_bound, power):
            high = middle
        else:
            low = middle
    return high


def events_to_show_no_worse(ratio_margin: float, weight: float) -> float:
    """Bad events, of both variants together, to show that an equal candidate is below the margin.

    Notes
    -----
    log(20) over the divergence between the shares at ratio 1 and at the margin.

    >>> round(events_to_show_no_worse(1.25, 0.5))
    484
    """
    equal = float(harm.candidate_share(1.0, weight))
    worse = float(harm.candidate_share(ratio_margin, weight))
    divergence = equal * math.log(equal / worse) + (1 - equal) * math.log((1 - equal) / (1 - worse))
    return math.log(ENOUGH_EVIDENCE) / divergence


def sentence(weight: float, requests_per_h: float, hours: float, sights: list[Sight]) -> str:
    """What a step sees, and what it does not, for people."""
    seen = [_change(sight) for sight in sights if math.isfinite(sight.ratio)]
    blind = [f"{100 * sight.rate:g} %" for sight in sights if not math.isfinite(sight.ratio)]
    parts = []
    if seen:
        parts.append("sees " + ", ".join(seen) + " or worse")
    if blind:
        parts.append("sees nothing short of luck at a rate of " + " or ".join(blind))
    return (
        f"{100 * weight:g} % of {requests_per_h:,.0f} requests/h: within {hours:g} h this step "
        + "; ".join(parts)
    )


def _change(sight: Sight) -> str:
    return f"{100 * sight.rate:.2g} % -> {100 * min(sight.rate * sight.ratio, 1):.2g} %"


def _is_found(
    requests: float, rate: float, ratio: float, weight: float, log_bound: float, power: float
) -> bool:
    """Whether evidence at the typical outcome, less its spread, reaches the bound.

    The number of the candidate's bad events is what decides; its lower quantile is that of a
    Poisson variable, by Wilson and Hilferty.
    """
    candidate_rate = min(rate * ratio, 1.0)
    candidate = _poisson_quantile(requests * weight * candidate_rate, 1 - power)
    control = requests * (1 - weight) * rate
    bad = np.array([[candidate, control]])
    weights: Floats = np.array([weight])
    return bool(harm.log_evidence(bad, weights) >= log_bound)


def _poisson_quantile(mean: float, level: float) -> float:
    if mean <= 0:
        return 0.0
    z = _normal_quantile(level)
    # The median of a Poisson variable is mean - 1/3 or so; nothing is found by part of an event.
    root = 1 - 1 / (9 * (mean + 1e-9)) + z / (3 * math.sqrt(mean))
    return max(mean * max(root, 0.0) ** 3, 0.0)


def _normal_quantile(level: float) -> float:
    """To 5e-4, by Hastings (1955)."""
    if level == 0.5:
        return 0.0
    tail = min(level, 1 - level)
    t = math.sqrt(-2 * math.log(tail))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (
        1 + t * (1.432788 + t * (0.189269 + t * 0.001308))
    )
    return z if level > 0.5 else -z
