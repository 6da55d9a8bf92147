"""Shift, input balance and sample ratio: quiet without a difference, and how fast they find one."""

import numpy as np
import pytest
from scipy.special import gammaln
from scipy.stats import betabinom, binom, chi2

from monitors.guards import balance, shift
from monitors.guards.bets import log_gamma
from tests.monitors.guards.simulation import ALPHA, BOUND, RAMP, first_crossing, four_errors

LOOKS = np.unique(np.geomspace(50, 20_000, 40).astype(int))
EDGES = np.array([-1.2816, -0.8416, -0.5244, -0.2533, 0, 0.2533, 0.5244, 0.8416, 1.2816])


def counts_at_looks(random, n_rollouts, weight, change=lambda x: x, n=LOOKS[-1]):
    """(n_rollouts, n_looks, 1, 10, 2) units so far, in the control's deciles."""
    found = np.zeros((n_rollouts, LOOKS.size, 1, 10, 2), np.int32)
    for rollout in range(n_rollouts):
        is_candidate = random.random(n) < weight
        values = random.normal(size=n)
        values = np.where(is_candidate, change(values), values)
        cell = EDGES.searchsorted(values) * 2 + ~is_candidate
        block = LOOKS.searchsorted(np.arange(1, n + 1))
        table = np.bincount(block * 20 + cell, minlength=LOOKS.size * 20)
        found[rollout, :, 0] = table.reshape(LOOKS.size, 10, 2).cumsum(axis=0)
    return found


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_equal_outputs_are_called_shifted_in_one_rollout_of_a_hundred_at_most(weight) -> None:
    """Ten bins, looks up to 20,000 units."""
    counts = counts_at_looks(np.random.default_rng(1), 1000, weight)

    found = first_crossing(shift.log_evidence(counts, np.array([weight]))) >= 0

    assert found.mean() <= ALPHA + four_errors(1000)


@pytest.mark.parametrize(
    ("weight", "change", "units"),
    [
        (0.1, lambda x: x + 0.2, 7_000),
        (0.5, lambda x: x + 0.2, 2_750),
        (0.1, lambda x: x + 0.5, 1_500),
        (0.5, lambda x: x + 0.5, 800),
        (0.1, lambda x: 1.2 * x, 6_000),
        (0.5, lambda x: 1.2 * x, 2_750),
    ],
)
def test_a_shift_is_found_by_the_median_rollout_after(weight, change, units) -> None:
    """A shift by 0.2 or 0.5 standard deviations, or a spread 1.2 times as wide."""
    counts = counts_at_looks(np.random.default_rng(2), 150, weight, change)

    at = first_crossing(shift.log_evidence(counts, np.array([weight])))

    assert np.median(np.where(at < 0, LOOKS[-1], LOOKS[at])) <= units


def test_weights_multiply_and_bins_are_a_ratio_of_known_probabilities() -> None:
    """In one bin the evidence is beta-binomial over binomial; over weights and bins it adds up."""
    counts = np.array([[[7, 40], [12, 51]], [[30, 25], [9, 14]]])
    weights = np.array([0.1, 0.5])

    expected = 0.0
    for table, weight in zip(counts, weights, strict=True):
        for c, d in table:
            a, b = 200 * weight, 200 * (1 - weight)
            expected += betabinom.logpmf(c, c + d, a, b) - binom.logpmf(c, c + d, weight)

    assert shift.log_evidence(counts, weights) == pytest.approx(expected, abs=1e-8)


def test_the_logarithm_of_the_gamma_function_is_that_of_scipy() -> None:
    """From a thousandth to ten millions."""
    x = np.geomspace(1e-3, 1e7, 500)

    assert log_gamma(x) == pytest.approx(gammaln(x), rel=1e-11, abs=1e-11)


def test_sample_ratio_stays_quiet_where_chi_square_on_requests_does_not() -> None:
    """Sticky units with a heavy tail of requests: chi-square at 0.001 fires most of the time."""
    random = np.random.default_rng(3)
    n_rollouts, n_units = 2000, 2000
    usage = np.ceil(random.lognormal(1, 1.8, (n_rollouts, n_units)))
    is_candidate = random.random((n_rollouts, n_units)) < 0.5
    requests = (usage * is_candidate).sum(axis=1)
    total = usage.sum(axis=1)
    p = chi2.sf((requests - total / 2) ** 2 / (total / 4), 1)
    so_far = is_candidate.cumsum(axis=1)[:, 49::50]
    looks = np.stack([so_far, np.arange(50, n_units + 1, 50) - so_far], axis=-1)[:, :, None]

    found = first_crossing(balance.log_evidence(looks, np.array([0.5])), np.log(1 / balance.ALPHA))

    assert (p < 0.001).mean() > 0.6
    assert (found >= 0).mean() <= balance.ALPHA + four_errors(n_rollouts, balance.ALPHA)


@pytest.mark.parametrize(("share", "units"), [(0.52, 12_500), (0.51, 52_000)])
def test_a_wrong_ratio_is_found_after(share, units) -> None:
    """52 to 48 or 51 to 49 instead of 50 to 50."""
    random = np.random.default_rng(4)
    n = np.arange(500, 4 * units, 500)
    candidate = random.binomial(500, share, (400, n.size)).cumsum(axis=1)
    looks = np.stack([candidate, n - candidate], axis=-1)[:, :, None]

    at = first_crossing(balance.log_evidence(looks, np.array([0.5])), np.log(1 / balance.ALPHA))

    assert np.median(np.where(at < 0, n[-1], n[at])) <= units


def test_a_ramp_of_sticky_units_keeps_its_ratio() -> None:
    """Each unit counts under the weight it was first seen with: no step makes a mismatch."""
    random = np.random.default_rng(5)
    units = np.array([2000, 2000, 2000, 2000])
    candidate = random.binomial(units, RAMP, (2000, 4))
    counts = np.stack([candidate, units - candidate], axis=-1)

    found = balance.log_evidence(counts, RAMP) >= np.log(1 / balance.ALPHA)

    assert found.mean() <= balance.ALPHA + four_errors(2000, balance.ALPHA)
    assert BOUND > 0
