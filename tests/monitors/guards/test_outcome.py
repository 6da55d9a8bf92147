"""Outcomes and pairs: intervals that hold at every look, and the gain of asking both versions."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from monitors.guards import outcome, paired
from monitors.guards.outcome import Sums
from tests.monitors.guards.simulation import ALPHA, first_crossing, four_errors


def running(values):
    """(mean, deviation, n) of the values so far, over the last axis."""
    n = np.arange(1, values.shape[-1] + 1)
    mean = values.cumsum(axis=-1) / n
    deviation = np.sqrt(np.maximum((values**2).cumsum(axis=-1) / n - mean**2, 0))
    return mean, deviation, n


def test_the_interval_of_a_difference_holds_at_every_look_on_a_ramp() -> None:
    """Weights 5 to 50 % and a trend: the true difference of 0.3 is left in 5 % at most."""
    random = np.random.default_rng(1)
    n_rollouts, n = 400, 4000
    weights = np.repeat([0.05, 0.2, 0.5, 0.5], n // 4)
    is_candidate = (random.random((n_rollouts, n)) < weights).astype(float)
    base = np.linspace(0, 3, n)
    y = base + 0.3 * is_candidate + random.normal(size=(n_rollouts, n))
    effects = outcome.effects(
        y, is_candidate, weights, predicted_candidate=base, predicted_control=base
    )

    mean, deviation, units = running(effects)
    half = outcome.half_width(units, deviation, alpha=0.05, n_decision=2000)
    missed = (np.abs(mean - 0.3) > half)[:, 200:].any(axis=1)

    assert missed.mean() <= 0.05 + four_errors(n_rollouts, 0.05)


def test_a_prediction_narrows_the_interval_and_a_wrong_one_does_not_bias_it() -> None:
    """AIPW: what earlier units tell may be subtracted, right or wrong."""
    random = np.random.default_rng(2)
    n = 200_000
    is_candidate = (random.random(n) < 0.2).astype(float)
    known = random.normal(5, 3, n)
    y = known + 0.5 * is_candidate + random.normal(size=n)

    plain = outcome.effects(y, is_candidate, np.full(n, 0.2))
    good = outcome.effects(
        y, is_candidate, np.full(n, 0.2), predicted_candidate=known, predicted_control=known
    )
    wrong = outcome.effects(
        y, is_candidate, np.full(n, 0.2), predicted_candidate=-3.0, predicted_control=8.0
    )

    for found in (plain, good, wrong):
        assert found.mean() == pytest.approx(0.5, abs=4 * found.std() / math.sqrt(n))
    assert good.std() < plain.std() / 4


def test_the_interval_costs_about_one_and_a_half_times_a_fixed_size() -> None:
    """At the size it is tuned for; up to twice as wide a factor of ten away."""
    fixed = norm.isf(0.025)
    for n, factor in ((5000, 1.55), (500, 1.97), (50_000, 1.65)):
        half = outcome.half_width(np.float64(n), np.float64(1), alpha=0.05, n_decision=5000)
        assert half * math.sqrt(n) / fixed == pytest.approx(factor, rel=0.01)


def test_sums_of_workers_add_up_and_few_units_give_no_interval() -> None:
    """Below a hundred units a variant the approximation is none."""
    random = np.random.default_rng(3)
    values = random.normal(1, 1, 1000)

    whole = outcome.interval(Sums.of(values), alpha=0.05)
    parts = outcome.interval(Sums.of(values[:400]) + Sums.of(values[400:]), alpha=0.05)

    assert parts == pytest.approx(whole)
    assert whole[1] < 1 < whole[2]
    assert outcome.interval(Sums.of(values[:199]), alpha=0.05)[1:] == (-math.inf, math.inf)


def test_a_binary_outcome_is_judged_in_both_directions() -> None:
    """Fewer bad outcomes are found like more of them; none are found where there are none."""
    random = np.random.default_rng(4)
    for rate, expected in ((0.10, "quiet"), (0.16, "found"), (0.05, "found")):
        is_bad = [random.random((600, 4000)) < share for share in (rate, 0.10)]
        looks = np.stack([bad.cumsum(axis=1)[:, 99::100] for bad in is_bad], axis=-1)[:, :, None]
        found = (first_crossing(outcome.log_evidence_two_sided(looks, np.array([0.5]))) >= 0).mean()
        assert found > 0.9 if expected == "found" else found <= ALPHA + four_errors(600)


@pytest.mark.parametrize(("true", "pairs"), [(0.03, 3_200), (0.04, 900), (0.10, 90)])
def test_disagreement_beyond_two_per_cent_is_found_after(true, pairs) -> None:
    """True shares of 3, 4 and 10 % where 2 % are allowed."""
    random = np.random.default_rng(5)
    differ = (random.random((400, 4 * pairs)) < true).cumsum(axis=1)
    n = np.arange(1, 4 * pairs + 1)

    at = first_crossing(paired.log_evidence_above(differ, n, 0.02))

    assert np.median(np.where(at < 0, 4 * pairs, at)) <= pairs


def test_disagreement_as_allowed_is_reported_in_one_of_a_hundred_at_most() -> None:
    """Two per cent where two per cent are allowed, at every one of 3,000 pairs."""
    random = np.random.default_rng(6)
    differ = (random.random((1000, 3000)) < 0.02).cumsum(axis=1)

    found = first_crossing(paired.log_evidence_above(differ, np.arange(1, 3001), 0.02)) >= 0

    assert found.mean() <= ALPHA + four_errors(1000)


def test_who_is_wrong_more_often_is_decided_by_discordant_pairs() -> None:
    """3 % against 1 % discordant pairs: decided after about 910 pairs; equal ones hardly ever."""
    random = np.random.default_rng(7)
    for shares, median in (((0.03, 0.01), 1_150), ((0.02, 0.02), None)):
        draw = random.random((800, 4000))
        candidate = (draw < shares[0]).cumsum(axis=1)
        champion = ((draw >= shares[0]) & (draw < sum(shares))).cumsum(axis=1)
        at = first_crossing(paired.log_evidence_wrong_more_often(candidate, champion))
        if median is None:
            assert (at >= 0).mean() <= ALPHA + four_errors(800)
        else:
            assert np.median(np.where(at < 0, 4000, at)) <= median


def test_a_numeric_difference_of_pairs_needs_no_weights() -> None:
    """The interval of the mean difference per unit, as for effects."""
    random = np.random.default_rng(8)
    mean, low, high = outcome.interval(Sums.of(random.normal(0.1, 0.5, 5000)), alpha=0.05)

    assert low < 0.1 < high
    assert 0 < low < mean < high
