"""Harm: never more false aborts than promised, whatever the traffic does; and how fast it finds.

A rate of 1 % over 2,000 rollouts has a standard error of 0.22 points. The figures of detection are
medians over simulated rollouts, in requests of both variants together.
"""

import numpy as np
import pytest

from monitors.guards import harm
from tests.monitors.guards.simulation import (
    ALPHA,
    RAMP,
    bad_events,
    events_until_found,
    first_crossing,
    four_errors,
)

N = 2000


@pytest.mark.parametrize("weight", [0.01, 0.05, 0.2, 0.5])
def test_no_difference_aborts_one_rollout_in_a_hundred_at_most(weight) -> None:
    """A look at every bad event, up to 400 of them: more looks than any controller takes."""
    random = np.random.default_rng(1)
    bad = bad_events(random, N, 400, np.array([weight]), np.zeros(400, int))

    aborted = first_crossing(harm.log_evidence(bad, np.array([weight]))) >= 0

    assert aborted.mean() <= ALPHA + four_errors(N)


def test_ramp_while_the_base_rate_doubles_aborts_one_in_a_hundred_at_most() -> None:
    """1, 5, 20, 50 % with errors doubling at each step: pooled rates differ, variants do not."""
    random = np.random.default_rng(2)
    weight_at = np.repeat(np.arange(4), [30, 60, 120, 240])
    bad = bad_events(random, N, weight_at.size, RAMP, weight_at)

    aborted = first_crossing(harm.log_evidence(bad, RAMP)) >= 0
    pooled = bad[:, -1].sum(axis=1)
    requests = 10_000 * np.array([RAMP.sum(), (1 - RAMP).sum()])
    pooled_rates = pooled / requests
    z = (pooled_rates[:, 0] - pooled_rates[:, 1]) / np.sqrt(
        450 / 40_000 * (1 / requests[0] + 1 / requests[1])
    )

    assert aborted.mean() <= ALPHA + four_errors(N)
    assert (z > 2.33).mean() > 0.9  # What comparing pooled rates would have done.


def sticky(random, n_rollouts, n_units, per_unit):
    """Bad events of sticky units on a ramp: usage has a heavy tail, 2 % of units cause most.

    (n_rollouts, n_events, n_weights, 2) counts so far: first events of units, or all of them.
    """
    usage = random.lognormal(0, 1.5, (n_rollouts, n_units))
    prone = np.where(random.random((n_rollouts, n_units)) < 0.02, 0.5, 0.002)
    bucket = random.random((n_rollouts, n_units))
    trend = np.array([1, 2, 4, 8]) * 0.25
    n_bad = random.poisson(usage[..., None] * prone[..., None] * trend)
    if per_unit:
        first = (n_bad.cumsum(axis=-1) > 0) & (n_bad.cumsum(axis=-1) - n_bad == 0)
        n_bad = first.astype(int)
    arm = bucket[..., None] < RAMP
    counts = np.stack([(n_bad * arm).sum(axis=1), (n_bad * ~arm).sum(axis=1)], axis=-1)
    looks = np.zeros((n_rollouts, 4, 4, 2), int)
    for step in range(4):
        looks[:, step:, step] = counts[:, None, step]
    return looks


def test_sticky_clusters_abort_one_in_a_hundred_at_most_if_units_are_counted() -> None:
    """Counting requests of sticky units would abort many times more often."""
    units = sticky(np.random.default_rng(3), N, 1500, per_unit=True)
    requests = sticky(np.random.default_rng(3), N, 1500, per_unit=False)

    by_unit = first_crossing(harm.log_evidence(units, RAMP)) >= 0
    by_request = first_crossing(harm.log_evidence(requests, RAMP)) >= 0

    assert by_unit.mean() <= ALPHA + four_errors(N)
    assert by_request.mean() > 5 * ALPHA


def test_a_candidate_that_is_as_bad_as_allowed_is_not_aborted() -> None:
    """With a ratio of 1.5 allowed, a candidate 1.5 times worse counts as no worse."""
    random = np.random.default_rng(4)
    weights = np.array([0.2])
    bad = bad_events(random, N, 300, weights, np.zeros(300, int), ratio=1.5)

    allowed = first_crossing(harm.log_evidence(bad, weights, ratio_allowed=1.5)) >= 0
    strict = first_crossing(harm.log_evidence(bad, weights)) >= 0

    assert allowed.mean() <= ALPHA + four_errors(N)
    assert strict.mean() > 0.3


def test_fully_broken_at_one_per_cent_is_found_within_250_requests() -> None:
    """Control errs one time in a thousand; the median is two failures of the candidate."""
    found = events_until_found(np.random.default_rng(5), 2000, 3000, 0.001, 1000, 0.01)

    assert np.median(found) <= 250


@pytest.mark.parametrize(
    ("weight", "rate", "ratio", "requests"),
    [
        (0.05, 0.01, 5, 3_500),
        (0.05, 0.01, 50, 140),
        (0.05, 0.001, 10, 10_500),
        (0.2, 0.01, 2, 10_500),
        (0.2, 0.001, 10, 3_800),
        (0.5, 0.01, 2, 7_400),
    ],
)
def test_harm_is_found_by_the_median_rollout_after(weight, rate, ratio, requests) -> None:
    """For 1 % -> 5 % at a weight of 5 %: 3,500 requests."""
    found = events_until_found(np.random.default_rng(6), 1000, 4 * requests, rate, ratio, weight)

    assert np.median(found) <= requests


def test_half_the_errors_at_five_per_cent_are_found_by_most_within_40_000_requests() -> None:
    """1 % -> 2 % at a weight of 5 % is hard to see: two in three rollouts see it by then."""
    found = events_until_found(np.random.default_rng(7), 1000, 40_000, 0.01, 2, 0.05)

    assert (found < 40_000).mean() > 0.6


def test_slow_requests_are_found_by_a_threshold_frozen_from_the_control() -> None:
    """Lognormal latencies above the control's p95, weight 10 %: half as slow again, 20 % slower."""
    random = np.random.default_rng(8)
    for factor, requests in ((1.5, 900), (1.2, 5_500)):
        # Of a lognormal with spread 0.5, a share of `beyond` exceeds the control's p95.
        normal = random.normal(0, 0.5, 1_000_000)
        beyond = (normal + np.log(factor) > np.quantile(normal, 0.95)).mean()
        found = events_until_found(random, 600, 6 * requests, 0.05, beyond / 0.05, 0.1)

        assert np.median(found) <= requests


def test_evidence_depends_on_counts_alone_and_adds_up() -> None:
    """The logarithm of each bet is linear in the counts, so workers' counts may be added first."""
    random = np.random.default_rng(9)
    one, other = random.integers(0, 9, (2, 4, 2))

    for ratio in harm.RATIOS:
        parts = [harm._log_ratios(counts, RAMP, np.array([ratio]), 1.0) for counts in (one, other)]
        whole = harm._log_ratios(one + other, RAMP, np.array([ratio]), 1.0)
        assert whole == pytest.approx(sum(parts))


def test_no_worse_than_the_margin_is_shown_and_rarely_wrongly() -> None:
    """An equal candidate is shown to be below twice the rate; one at the margin is not."""
    random = np.random.default_rng(10)
    weights, at = np.array([0.5]), np.zeros(300, int)
    shown = [
        first_crossing(
            harm.log_evidence_no_worse(
                bad_events(random, N, 300, weights, at, ratio), weights, ratio_margin=2.0
            ),
            np.log(20),
        )
        for ratio in (1.0, 2.0)
    ]

    assert np.median(shown[0]) < 90
    assert (shown[1] >= 0).mean() <= 0.05 + four_errors(N, 0.05)


def test_the_interval_of_the_ratio_holds_at_every_look() -> None:
    """A true ratio of 3 leaves the 95 % interval in one rollout of twenty at most."""
    random = np.random.default_rng(11)
    weights = np.array([0.05, 0.5])
    bad = bad_events(random, 300, 60, weights, np.repeat([0, 1], 30), ratio=3.0)

    outside = [
        any(
            not low <= 3 <= high
            for _, low, high in (harm.ratio_interval(look, weights) for look in rollout[::6])
        )
        for rollout in bad
    ]

    assert np.mean(outside) <= 0.05 + four_errors(300, 0.05)
    best, low, high = harm.ratio_interval(np.array([[30, 190], [300, 100]]), weights)
    assert low < 3 < high
    assert best == pytest.approx(3, rel=0.1)
