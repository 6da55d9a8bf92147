"""Lines against chi-squared and beta-binomial theory, and against windows without drift.

A rate of 1 % over 2,000 windows has a standard error of 0.22 points; four of them are 0.89.
"""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom, chi2, kstwobign

from monitors import Profile
from monitors.distance import hellinger, jensen_shannon, kolmogorov_smirnov, psi
from monitors.significance import LEVEL, NoDrift, Statistic, nearest_size, rate_line
from monitors.window import Scorer

N_WINDOWS = 2000
FOUR_ERRORS = 4 * math.sqrt(0.01 * 0.99 / N_WINDOWS)
quick = settings(deadline=None, max_examples=60)


def no_drift(reference, **statistics) -> NoDrift:
    chosen = statistics or {"psi": Statistic(psi, 1.0)}
    return NoDrift(reference, np.full(reference.size, 0.5), chosen)


@pytest.mark.parametrize(
    ("n_bins", "n_rows"),
    [(bins, rows) for bins in (2, 10, 40) for rows in (20 * bins, 1000, 1300, 50_000, 10_000_000)],
)
def test_lines_are_those_of_chi_squared_when_bins_are_full(n_bins, n_rows) -> None:
    """Psi times nm/(n+m), and eight squares of the others, follow chi-squared with B - 1."""
    n_reference = 1_000_000
    reference = np.full(n_bins, n_reference // n_bins)
    lines = no_drift(
        reference,
        psi=Statistic(psi, 1.0),
        jensen_shannon=Statistic(jensen_shannon, 0.5),
        hellinger=Statistic(hellinger, 0.5),
    ).lines(n_rows)
    noise = 1 / n_rows + 1 / n_reference

    for value in (
        lines["psi"] / noise,
        lines["jensen_shannon"] ** 2 * 8 * math.log(2) / noise,
        lines["hellinger"] ** 2 * 8 / noise,
    ):
        # 1,000 draws behind a line of many bins: their own error on top.
        assert chi2.sf(value, n_bins - 1) == pytest.approx(0.01, abs=FOUR_ERRORS * 1.5)


def test_kolmogorov_smirnov_on_fine_bins_has_the_line_of_the_raw_rows() -> None:
    """With 500 bins the 99 % line nears the limiting distribution's 1.628, from below."""
    reference = np.full(500, 10_000)
    lines = no_drift(reference, ks=Statistic(kolmogorov_smirnov, 0.5)).lines(1000)
    scaled = lines["ks"] / math.sqrt(1 / 1000 + 1 / reference.sum())

    assert kstwobign.sf(scaled) == pytest.approx(0.01, abs=FOUR_ERRORS * 1.5)


@quick
@given(
    hits=st.floats(0.5, 5000),
    misses=st.floats(0.5, 5000),
    n_rows=st.integers(1, 3000),
)
@example(hits=0.5, misses=0.5, n_rows=566)
def test_rate_line_is_the_quantile_of_the_beta_binomial(hits, misses, n_rows) -> None:
    """At most 1 % exceed it, and more than 1 % would exceed one row less."""
    spread = betabinom.std(n_rows, hits, misses)
    line = rate_line(hits, misses, n_rows)
    rows = line * n_rows
    theory = betabinom(n_rows, hits, misses)

    if spread < 199:
        assert rows == pytest.approx(round(rows), abs=1e-6)
        assert theory.sf(round(rows)) <= 0.01 + 1e-6
        assert rows < 0.5 or theory.sf(round(rows) - 1) > 0.01 - 1e-6
    else:
        assert theory.sf(rows) <= 0.0108
        assert theory.sf(rows - 1 - spread / 50) >= 0.0092


@pytest.mark.parametrize("n_rows", [10**5, 10**6, 10**7])
@pytest.mark.parametrize(("hits", "misses"), [(0.5, 1000.0), (300.0, 700.0), (50_000.0, 1e6)])
def test_rate_line_holds_for_windows_of_millions(hits, misses, n_rows) -> None:
    """Where counts are as good as continuous, the line is scaled, and still at 1 %."""
    random = np.random.default_rng(0)
    rates = random.binomial(n_rows, random.beta(hits, misses, 200_000)) / n_rows

    exceeded = (rates > rate_line(hits, misses, n_rows)).mean()

    assert exceeded == pytest.approx(0.01, abs=4 * math.sqrt(0.0099 / 200_000) + 0.0005)


def normal(random, n_rows):
    return random.normal(size=n_rows).astype(np.float32)


def atoms_and_missing(random, n_rows):
    values = np.where(random.random(n_rows) < 0.5, 0.0, random.exponential(size=n_rows))
    return np.where(random.random(n_rows) < 0.2, np.nan, values)


def integers(random, n_rows):
    return random.poisson(4, n_rows)


SHARES = np.random.default_rng(9).dirichlet(np.full(40, 0.7))
LEVELS = np.array([f"level {number}" for number in range(40)], object)


def sparse_levels(random, n_rows):
    return LEVELS[random.choice(40, n_rows, p=SHARES)]


def long_tail(random, n_rows):
    return np.array([f"z{rank}" for rank in np.minimum(random.zipf(1.6, n_rows), 10**6)], object)


@pytest.mark.parametrize("n_rows", [5, 50, 230, 1000])
@pytest.mark.parametrize("draw", [normal, atoms_and_missing, integers, sparse_levels, long_tail])
def test_one_window_in_a_hundred_without_drift_is_above_its_line(draw, n_rows) -> None:
    """Rates of 2,000 fresh windows; at most so where a score takes few values (5 rows, rates).

    Several references, so that the luck of one does not decide; the lines' own simulation noise
    is inside the four standard errors.
    """
    random = np.random.default_rng([7, n_rows])
    above: dict[str, list[bool]] = {}
    for _ in range(10):
        profile = Profile.fit({"c": draw(random, 20_000)})
        scorer, channel = Scorer(profile), profile.channels["c"]
        numbers = channel.assign(draw(random, n_rows * (N_WINDOWS // 10))).reshape(-1, n_rows)
        for window in numbers:
            table = np.bincount(window, minlength=channel.n_bins)[np.newaxis]
            for name, score in scorer.score(table)[0].scores.items():
                above.setdefault(name, []).append(score.is_above)

    rates = {name: np.mean(flags) for name, flags in above.items()}
    assert all(rate <= 0.01 + FOUR_ERRORS for rate in rates.values()), rates
    if n_rows >= 230 and draw is not long_tail:
        smooth = {name: rates[name] for name in rates if name in {"psi", "hellinger"}}
        assert all(rate >= 0.01 - FOUR_ERRORS for rate in smooth.values()), rates


def test_a_small_reference_is_not_taken_for_the_whole_truth() -> None:
    """Of 400 references of 50 rows about four are unlucky; beyond their range rows are expected.

    Windows of 1,000 rows then fall out of range at a rate of 1/51 on each side, more or less.
    """
    random = np.random.default_rng(21)
    above = []
    for _ in range(400):
        profile = Profile.fit({"c": random.normal(size=50)})
        channel = profile.channels["c"]
        served = np.bincount(channel.assign(random.normal(size=1000)), minlength=channel.n_bins)
        lines = NoDrift(channel.counts, channel.doubt, {"psi": Statistic(psi, 1.0)}).lines(1000)
        above.append(psi(channel.counts, served) > lines["psi"])

    assert np.mean(above) <= 0.01 + 4 * math.sqrt(0.0099 / 400)


def test_a_column_of_ids_does_not_drift_by_itself() -> None:
    """All names of a window are unseen when all names of the reference were seen once."""
    profile = Profile.fit({"id": [f"r{number}" for number in range(5000)]})
    channel = profile.channels["id"]
    served = channel.assign([f"s{number}" for number in range(1000)])
    table = np.bincount(served, minlength=channel.n_bins)[np.newaxis]

    scores = Scorer(profile).score(table)[0].scores

    assert scores["unseen_rate"].value == 1.0
    assert not any(score.is_above for score in scores.values())


def test_an_unseen_level_in_a_closed_set_is_above_the_line() -> None:
    """Where every level is frequent, two rows in a hundred of a new one are news."""
    profile = Profile.fit({"s": ["a", "b"] * 5000})
    channel = profile.channels["s"]
    table = np.bincount(channel.assign(["a", "b"] * 490 + ["new"] * 20), minlength=6)[np.newaxis]

    scores = Scorer(profile).score(table)[0].scores

    assert scores["unseen_rate"].is_above
    assert scores["psi"].is_above


def test_lines_do_not_depend_on_what_was_asked_before() -> None:
    """Two workers that meet sizes in another order state the same lines."""
    reference = np.array([100, 300, 50, 7, 0])
    one, two = no_drift(reference), no_drift(reference)
    sizes = [5, 57, 1000, 1234, 57]

    assert [one.lines(n) for n in sizes] == [two.lines(n) for n in reversed(sizes)][::-1]


def test_lines_fall_with_the_size_of_the_window() -> None:
    """More rows tell more; in the limit the reference's own noise remains."""
    reference = np.full(10, 1000)
    lines = [no_drift(reference).lines(n)["psi"] for n in (5, 50, 500, 5000, 10**6, 10**12)]

    assert lines == sorted(lines, reverse=True)
    assert chi2.sf(lines[-1] * reference.sum(), 9) == pytest.approx(0.01, abs=FOUR_ERRORS * 1.5)


def test_without_rows_there_is_no_line() -> None:
    """Nan says so; a comparison with it is never above."""
    assert math.isnan(no_drift(np.array([3, 4])).lines(0)["psi"])
    assert math.isnan(no_drift(np.array([3, 4])).rate_line(0, [1]))


@quick
@given(st.integers(1, 10**13))
def test_the_nearest_simulated_size_is_near(n_rows) -> None:
    """Within half of the widest step, 3 to 4, by ratio; exact up to 32 rows."""
    size = nearest_size(n_rows)

    assert abs(math.log(size / n_rows)) <= math.log(4 / 3) / 2 + 1e-9
    assert size == n_rows or n_rows > 32


def test_the_level_is_the_one_promised() -> None:
    """Documents and reports say 99 %."""
    assert LEVEL == 0.99
