"""Rates: false alarms against the budget, delays against the figures promised, and e-values."""

import numpy as np
import pytest
from scipy import stats

from monitors import Budget, Monitor, Profile
from monitors.detector import Detector, chi2_quantile, discoveries
from tests.world import HOLES, SYMMETRIC, World, in_blocks

BUDGET = Budget(alarms=1, rows=500_000)
"""One false page in 1,000 windows of 500 rows."""
N_REFERENCE = 20_000


@pytest.fixture(scope="module")
def worlds() -> dict[int, tuple[World, Profile]]:
    found = {}
    for seed in (1, 2):
        world = World(seed)
        found[seed] = world, Profile.fit(world.rows(np.random.default_rng(seed), N_REFERENCE))
    return found


@pytest.mark.parametrize("tolerance", [0.01, 0.0])
def test_a_thousand_quiet_windows_raise_no_page(worlds, tolerance) -> None:
    """35 columns, 500,000 rows each: at most one page is allowed; the level stays far below one.

    The bench runs 2,000 windows of several worlds.
    """
    for seed, n_rows in ((1, 250_000), (2, 250_000)):
        world, profile = worlds[seed]
        monitor = Monitor(profile, budget=BUDGET, tolerance=tolerance)
        draw = np.random.default_rng(100 + seed)
        for _ in range(n_rows // 25_000):
            monitor.update(world.rows(draw, 25_000))

        assert monitor.n_rows == n_rows
        assert [alarm for alarm in monitor.episodes if alarm.level == "page"] == []
        assert monitor.report().level < 0.5


def delays(world: World, profile: Profile, change, *, n_runs: int = 10) -> float:
    """Median of rows until the first page, 10,000 where there is none."""
    found = []
    for run in range(n_runs):
        draw = np.random.default_rng(1000 * run + 7)
        monitor = Monitor(profile, budget=BUDGET)
        monitor.update(world.rows(draw, 2000))
        assert monitor.alarms == ()
        found.append(in_blocks(monitor, change(draw, run)) or 10_000)
    return float(np.median(found))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("change", "rows_max"),
    [("0.25 sd", 450), ("0.5 sd", 130), ("flipped correlation", 100), ("missing 15 %", 800)],
)
def test_a_change_is_found_within_the_rows_promised(worlds, seed, change, rows_max) -> None:
    """Median over a column of every shape, at the default tolerance, in blocks of 50 rows."""
    world, profile = worlds[seed]

    def changed(draw, run):
        if change.endswith("sd"):
            return world.rows(draw, 4000, shift=(7 * run % 30, float(change[:-3])))
        if change.startswith("flipped"):
            normal = world.normal(draw, 4000)
            others = np.abs(world.correlations - np.eye(30)).max(axis=1)
            normal[:, sorted(SYMMETRIC, key=lambda j: -others[j])[run % 6]] *= -1
            return world.rows(draw, 4000, normal=normal)
        columns = world.rows(draw, 4000)
        name = f"n{HOLES[run % len(HOLES)]}"
        columns[name] = np.where(draw.random(4000) < 0.1 / 0.95, np.nan, columns[name])
        columns[name] = columns[name].astype(np.float32)
        return columns

    assert delays(world, profile, changed) <= rows_max


def test_an_alarm_names_what_changed_since_when_and_the_bins(worlds) -> None:
    """The column or its witness, not before the change, with odds above those of the budget."""
    world, profile = worlds[1]
    monitor = Monitor(profile, budget=BUDGET)
    draw = np.random.default_rng(5)
    monitor.update(world.rows(draw, 10_000))

    rows = in_blocks(monitor, world.rows(draw, 2000, shift=(10, 1.0)))
    page = next(alarm for alarm in monitor.alarms if alarm.level == "page")

    assert 0 < rows <= 100
    assert page.feature == "n10"
    assert page.channel in {"n10", "witness:n10"}
    assert 10_000 <= page.since_row <= page.row <= 10_000 + rows
    assert page.evidence > 50
    assert page.moved
    assert all(late != before for _, before, late in page.moved)


def test_what_is_tolerated_is_no_alarm_however_long_it_lasts() -> None:
    """PSI of 0.005 under a tolerance of 0.01 is quiet for half a million rows; at 0 it is not."""
    draw = np.random.default_rng(3)
    profile = Profile.fit({"x": draw.normal(size=N_REFERENCE)})
    calm = Monitor(profile, budget=BUDGET, tolerance=0.01)
    strict = Monitor(profile, budget=BUDGET, tolerance=0.0)
    for _ in range(20):
        block = {"x": draw.normal(0.07, 1, 25_000)}
        calm.update(block)
        strict.update(block)

    assert calm.episodes == ()
    assert strict.episodes


def test_evidence_is_an_e_value_without_drift() -> None:
    """Its mean over many monitors is at most 1, within four standard errors."""
    draw = np.random.default_rng(4)
    profile = Profile.fit({"x": draw.normal(size=5000), "s": draw.choice(list("abc"), 5000)})
    found = []
    for _ in range(300):
        monitor = Monitor(profile, budget=BUDGET, tolerance=0.0)
        for _ in range(20):
            monitor.update({"x": draw.normal(size=50), "s": draw.choice(list("abc"), 50)})
        found.append(list(monitor.evidence.values()))
    means = np.mean(found, axis=0)
    errors = np.std(found, axis=0) / np.sqrt(len(found))

    assert (means <= 1 + 4 * errors).all()


def test_a_tight_budget_of_false_alarms_is_kept() -> None:
    """One page in 1,000 rows allowed, 200 times 2,000 rows: at most 400, and far fewer."""
    draw = np.random.default_rng(6)
    profile = Profile.fit({"x": draw.normal(size=5000), "y": draw.normal(size=5000)})
    pages = 0
    for _ in range(100):
        monitor = Monitor(profile, budget=Budget(alarms=1, rows=1000), tolerance=0.0)
        for _ in range(40):
            raised = monitor.update({"x": draw.normal(size=50), "y": draw.normal(size=50)})
            pages += len({alarm.episode for alarm in raised if alarm.level == "page"})

    assert pages <= 100 * 2


def test_a_warning_comes_before_a_page_and_becomes_one() -> None:
    """The same evidence reaches the larger mass first; the alarm is one, not two."""
    draw = np.random.default_rng(7)
    profile = Profile.fit({"x": draw.normal(size=N_REFERENCE)})
    monitor = Monitor(profile, budget=Budget(rows=500_000, warnings=100))
    for _ in range(40):
        monitor.update({"x": draw.normal(0.3, 1, 50)})

    warning, page = monitor.episodes
    assert (warning.level, page.level) == ("warning", "page")
    assert warning.row <= page.row
    assert warning.why_closed == "page"
    assert [alarm.level for alarm in monitor.alarms] == ["page"]


def test_an_alarm_is_over_when_the_reference_explains_the_rows_again() -> None:
    """It holds while the drift lasts, raises nothing twice, and closes after it ends."""
    draw = np.random.default_rng(8)
    profile = Profile.fit({"x": draw.normal(size=N_REFERENCE)})
    monitor = Monitor(profile, budget=BUDGET)
    monitor.update({"x": draw.normal(0.5, 1, 10_000)})
    (page,) = monitor.alarms
    monitor.update({"x": draw.normal(0, 1, 3000)})

    assert page.row <= 500
    assert monitor.alarms == ()
    assert page.why_closed == "back"
    assert 10_000 <= page.closed_row <= 12_000
    assert monitor.episodes == (page,)


def test_an_acknowledged_alarm_is_quiet_for_its_hold_off_and_comes_again() -> None:
    """A ninetieth of the period; a drift that lasts is then told anew."""
    draw = np.random.default_rng(9)
    profile = Profile.fit({"x": draw.normal(size=N_REFERENCE)})
    monitor = Monitor(profile, budget=Budget(rows=90_000))
    monitor.update({"x": draw.normal(1, 1, 500)})
    (page,) = monitor.alarms
    monitor.acknowledge(page.id)
    monitor.update({"x": draw.normal(1, 1, 500)})
    assert monitor.alarms == (page,)

    monitor.update({"x": draw.normal(1, 1, 3000)})

    assert page.why_closed == "acknowledged"
    assert [alarm.id != page.id for alarm in monitor.alarms] == [True]


def test_time_is_the_budget_in_days() -> None:
    """Sparse rows over months are judged as well; a silence is not spent at once."""
    draw = np.random.default_rng(10)
    profile = Profile.fit({"x": draw.normal(size=5000)})
    monitor = Monitor(profile, budget=Budget(alarms=1, days=90))
    for day in range(400):
        monitor.update({"x": draw.normal(size=10)}, at=86_400.0 * day)
    assert monitor.episodes == ()
    monitor.update({"x": draw.normal(size=10)}, at=86_400.0 * 5000)
    assert monitor.episodes == ()

    for hour in range(20):
        monitor.update({"x": draw.normal(2, 1, 10)}, at=86_400.0 * 5001 + 3600 * hour)

    assert [alarm.channel for alarm in monitor.alarms] == ["x"]


def test_discoveries_are_those_of_e_bh() -> None:
    """The largest k whose k-th value is at least n / (k alpha), by trying every k."""
    draw = np.random.default_rng(11)
    for _ in range(200):
        values = np.exp(draw.normal(2, 2, 12))
        order = np.sort(values)[::-1]
        expected = max((k for k in range(1, 13) if order[k - 1] >= 12 / (k * 0.05)), default=0)

        found = discoveries(values)

        assert len(found) == expected
        assert all(values[place] >= order[expected - 1] for place in found)


@pytest.mark.parametrize("freedom", [1, 3, 13, 50])
def test_chi_square_quantiles_are_scipys_within_a_few_per_cent(freedom) -> None:
    """In the far tail, where they are used; with one degree they are a tenth too large."""
    z = stats.norm.isf(1e-5)

    found = chi2_quantile(np.array([float(freedom)]), z)[0]

    assert found == pytest.approx(stats.chi2.isf(1e-5, freedom), rel=0.12)
    assert found > 0.99 * stats.chi2.isf(1e-5, freedom)


def test_no_bet_earns_under_any_truth_that_is_tolerated() -> None:
    """For every fixed bet and truths on the edge of the ball, E[e] is at most 1."""
    draw = np.random.default_rng(12)
    profile = Profile.fit(
        {"x": draw.normal(size=N_REFERENCE), "s": draw.choice(list("ab"), 20_000)}
    )
    detector = Detector(profile.layout, BUDGET, tolerance=0.01)
    layout, bets = profile.layout, detector._bets
    for _ in range(200):
        away = draw.normal(size=layout.n_cells) * np.sqrt(layout.shares)
        away -= layout.shares * layout.spread(layout.sums(away))
        distance = np.sqrt(layout.sums(away**2 / layout.shares))
        truth = layout.shares + away * 0.1 / layout.spread(distance)
        if (truth < 0).any():
            truth = np.maximum(truth, 0)
            truth /= layout.spread(layout.sums(truth))
            if (np.sqrt(layout.sums((truth - layout.shares) ** 2 / layout.shares)) > 0.1).any():
                continue

        gains = layout.sums(truth * np.exp(bets.fixed))

        assert gains.max() <= 1 + 1e-9
