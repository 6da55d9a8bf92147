"""Rollouts drawn at random, all at once: the situations of which the guards promise something."""

import numpy as np

from monitors.guards import harm

ALPHA = 0.01
BOUND = np.log(1 / ALPHA)
RAMP = np.array([0.01, 0.05, 0.20, 0.50])


def four_errors(n_rollouts, rate=ALPHA):
    """Four standard errors of a rate found by so many rollouts."""
    return 4 * np.sqrt(rate * (1 - rate) / n_rollouts)


def bad_events(random, n_rollouts, n_events, weights, weight_at, ratio=1.0):
    """(n_rollouts, n_events, n_weights, 2) bad events so far, one more at each place.

    `weight_at`: (n_events,) which weight is in force at the event.
    """
    share = harm.candidate_share(ratio, weights)[weight_at]
    is_candidate = random.random((n_rollouts, n_events)) < share
    steps = np.zeros((n_rollouts, n_events, weights.size, 2), np.int32)
    at = np.arange(n_events)
    steps[:, at, weight_at, 0] = is_candidate
    steps[:, at, weight_at, 1] = ~is_candidate
    return steps.cumsum(axis=1)


def first_crossing(logs, bound=BOUND):
    """(n_rollouts,) the place at which evidence first reaches the bound; -1: never."""
    over = logs >= bound
    return np.where(over.any(axis=1), over.argmax(axis=1), -1)


def events_until_found(random, n_rollouts, n_requests, rate, ratio, weight):
    """(n_rollouts,) requests of both variants until harm is found; n_requests where it is not."""
    bad_rate = rate * (weight * ratio + 1 - weight)
    n_events = int(n_requests * bad_rate + 8 * np.sqrt(n_requests * bad_rate) + 20)
    gaps = random.geometric(bad_rate, (n_rollouts, n_events))
    logs = harm.log_evidence(
        bad_events(
            random, n_rollouts, n_events, np.array([weight]), np.zeros(n_events, int), ratio
        ),
        np.array([weight]),
    )
    at = first_crossing(logs)
    when = gaps.cumsum(axis=1)[np.arange(n_rollouts), np.maximum(at, 0)]
    return np.where((at < 0) | (when > n_requests), n_requests, when)
