"""Distances against closed forms, scipy, plain Python, and the properties that define them."""

import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import chi2_contingency, ks_2samp, norm, wasserstein_distance

from monitors import BinMismatchError, distance
from monitors.distance import (
    chi_square,
    hellinger,
    jensen_shannon,
    kolmogorov_smirnov,
    l_infinity,
    psi,
    wasserstein,
)

N_BINS = 6
POSITIONS = np.array([-3.0, -1.0, -0.5, 0.25, 1.0, 4.0])


def psi_without_floor(reference, current):
    return psi(reference, current, floor=1e-300)


def wasserstein_here(reference, current):
    return wasserstein(reference, current, positions=POSITIONS)


ALL = [
    psi,
    jensen_shannon,
    hellinger,
    kolmogorov_smirnov,
    wasserstein_here,
    l_infinity,
    chi_square,
]
histograms = (
    st.lists(st.integers(0, 1000), min_size=N_BINS, max_size=N_BINS)
    .filter(any)
    .map(lambda counts: np.array(counts, np.int64))
)
full_histograms = st.lists(st.integers(1, 1000), min_size=N_BINS, max_size=N_BINS).map(
    lambda counts: np.array(counts, np.int64)
)
quick = settings(deadline=None, max_examples=60)


def normal_counts(mean: float, sd: float = 1.0) -> np.ndarray:
    edges = np.linspace(-9, 10, 4001)
    return (np.diff(norm.cdf(edges, mean, sd)) * 1e15).astype(np.int64)


def test_examples_in_docstrings_hold() -> None:
    """Every example of the module gives what it says."""
    failed, tried = doctest.testmod(distance)

    assert tried >= 7
    assert failed == 0


def test_psi_of_shifted_normals_nears_the_closed_form() -> None:
    """N(0, 1) against N(1, 1) diverges by exactly 1; fine bins come close from below."""
    score = psi(normal_counts(0), normal_counts(1), floor=1e-15)

    assert 1 - 1e-3 < score < 1


def test_hellinger_of_shifted_normals_nears_the_closed_form() -> None:
    """The squared distance of N(0, 1) and N(1, 1) is 1 - exp(-1/8)."""
    score = hellinger(normal_counts(0), normal_counts(1))

    assert score == pytest.approx(math.sqrt(1 - math.exp(-1 / 8)), rel=1e-4)


def test_kolmogorov_smirnov_of_shifted_normals_nears_the_closed_form() -> None:
    """The cumulative shares of N(0, 1) and N(1, 1) differ most at 1/2: by 2 Phi(1/2) - 1."""
    score = kolmogorov_smirnov(normal_counts(0), normal_counts(1))

    assert score == pytest.approx(2 * norm.cdf(0.5) - 1, rel=1e-4)


def test_wasserstein_of_shifted_normals_is_the_shift() -> None:
    """Moving a distribution by d costs d."""
    positions = np.linspace(-9, 10, 4001)
    middles = (positions[1:] + positions[:-1]) / 2

    score = wasserstein(normal_counts(0), normal_counts(0.7), positions=middles)

    assert score == pytest.approx(0.7, rel=1e-4)


@quick
@given(histograms, histograms)
def test_psi_is_the_textbook_sum(reference, current) -> None:
    """An implementation in plain Python agrees, floor included."""
    expected = 0.0
    for before, now in zip(reference.tolist(), current.tolist(), strict=True):
        r = max(before / sum(reference.tolist()), 1e-4)
        c = max(now / sum(current.tolist()), 1e-4)
        expected += (c - r) * math.log(c / r)

    assert psi(reference, current) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@quick
@given(histograms, histograms)
def test_scipy_agrees_on_jensen_shannon(reference, current) -> None:
    """Scipy's distance in base 2 is the same number."""
    expected = jensenshannon(reference, current, base=2)

    assert jensen_shannon(reference, current) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@quick
@given(histograms, histograms)
def test_scipy_agrees_on_kolmogorov_smirnov(reference, current) -> None:
    """The two-sample statistic of the bin numbers, row by row, is the same number."""
    rows = [np.repeat(np.arange(N_BINS), counts) for counts in (reference, current)]
    expected = ks_2samp(*rows, method="asymp").statistic

    assert kolmogorov_smirnov(reference, current) == pytest.approx(expected, abs=1e-12)


@quick
@given(histograms, histograms)
def test_scipy_agrees_on_wasserstein(reference, current) -> None:
    """The earth mover's distance of weighted points is the same number."""
    expected = wasserstein_distance(POSITIONS, POSITIONS, reference, current)

    assert wasserstein_here(reference, current) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@quick
@given(full_histograms, full_histograms)
def test_scipy_agrees_on_chi_square(reference, current) -> None:
    """The test of homogeneity without continuity correction has the same statistic."""
    expected = chi2_contingency([reference, current], correction=False).statistic

    assert chi_square(reference, current) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@quick
@given(histograms, histograms)
def test_plain_python_agrees_on_l_infinity_and_hellinger(reference, current) -> None:
    """Sums over the bins, written out."""
    r = [count / sum(reference.tolist()) for count in reference.tolist()]
    c = [count / sum(current.tolist()) for count in current.tolist()]
    affinity = sum(math.sqrt(a * b) for a, b in zip(r, c, strict=True))

    assert l_infinity(reference, current) == pytest.approx(
        max(abs(a - b) for a, b in zip(r, c, strict=True)), abs=1e-15
    )
    assert hellinger(reference, current) ** 2 == pytest.approx(1 - affinity, abs=1e-9)


@pytest.mark.parametrize("distance", ALL)
@quick
@given(histograms, histograms)
def test_distances_are_symmetric_and_never_negative(distance, reference, current) -> None:
    """Which one is called the reference does not matter."""
    score = distance(reference, current)

    assert score >= 0
    assert score == pytest.approx(distance(current, reference), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("distance", ALL)
@quick
@given(histograms, st.integers(1, 1000))
def test_equal_shares_are_at_distance_zero(distance, reference, times) -> None:
    """More rows of the same are no drift."""
    assert distance(reference, reference * times) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("distance", [jensen_shannon, hellinger, kolmogorov_smirnov])
def test_bounded_distances_reach_one_when_no_bin_is_shared(distance) -> None:
    """Two histograms apart are as far apart as can be."""
    assert distance(np.array([3, 4, 0, 0]), np.array([0, 0, 0, 9])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "distance", [psi_without_floor, jensen_shannon, hellinger, kolmogorov_smirnov, chi_square]
)
@quick
@given(full_histograms, full_histograms, st.integers(0, N_BINS - 2))
def test_merging_two_neighbouring_bins_never_adds_distance(
    distance, reference, current, place
) -> None:
    """What is forgotten cannot tell two histograms apart."""

    def merged(counts):
        return np.add.reduceat(counts, [b for b in range(N_BINS) if b != place + 1])

    assert distance(merged(reference), merged(current)) <= distance(reference, current) + 1e-9


@pytest.mark.parametrize("distance", [d for d in ALL if d is not chi_square])
@quick
@given(full_histograms, full_histograms)
def test_distance_grows_as_drifted_rows_are_mixed_in(distance, reference, drifted) -> None:
    """Seven tenths of drifted rows are not nearer to the reference than three tenths."""
    scores = [
        distance(
            reference, reference * drifted.sum() * (10 - tenth) + drifted * reference.sum() * tenth
        )
        for tenth in range(11)
    ]

    assert all(later >= earlier - 1e-7 for earlier, later in itertools.pairwise(scores))


@pytest.mark.parametrize("distance", ALL)
def test_a_stack_is_scored_one_by_one(distance) -> None:
    """A stack gives what its histograms give alone, and nan for an empty one."""
    random = np.random.default_rng(3)
    reference = random.integers(0, 50, N_BINS)
    stack = random.integers(0, 9, (7, N_BINS))
    stack[4] = 0

    scores = distance(reference, stack)

    assert np.isnan(scores[4])
    for row in (0, 1, 2, 3, 5, 6):
        assert scores[row] == pytest.approx(distance(reference, stack[row]), rel=1e-12)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize(
    ("reference", "current"),
    [
        (np.ones(N_BINS, np.int64), np.ones(N_BINS - 1, np.int64)),
        (np.ones(N_BINS, np.int64), np.zeros(N_BINS, np.int64)),
        (np.zeros(N_BINS, np.int64), np.ones(N_BINS, np.int64)),
        (np.ones(N_BINS, np.int64), np.array([1, 1, 1, 1, 1, -1])),
        (np.int64(3), np.int64(3)),
        (np.zeros(0, np.int64), np.zeros(0, np.int64)),
    ],
)
def test_histograms_that_do_not_compare_are_refused(distance, reference, current) -> None:
    """Other shapes, no rows or negative rows raise BinMismatchError."""
    with pytest.raises(BinMismatchError):
        distance(reference, current)


def test_a_floor_keeps_an_empty_bin_finite() -> None:
    """All rows moved from one bin to another score 2 (1 - floor) ln(1 / floor)."""
    score = psi(np.array([10, 0]), np.array([0, 10]), floor=1e-3)

    assert score == pytest.approx(2 * (1 - 1e-3) * math.log(1e3))


def test_positions_must_be_as_many_as_bins() -> None:
    """A distance with one place too few would be silently wrong."""
    with pytest.raises(BinMismatchError, match="5 positions for 6 bins"):
        wasserstein(np.ones(6, np.int64), np.ones(6, np.int64), positions=POSITIONS[:5])


def test_counts_of_a_billion_rows_do_not_overflow() -> None:
    """Products of row numbers stay within floats."""
    many = np.array([4 * 10**15, 4 * 10**15])

    assert chi_square(many, many) == 0
    assert chi_square(many, many[::-1] + np.array([0, 4 * 10**9])) > 0
