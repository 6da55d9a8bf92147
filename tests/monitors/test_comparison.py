"""Two versions side by side: fair bets, quiet while equal, quick when not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors import BlockError, Budget, Profile
from monitors.comparison import Comparison, bets

BUDGET = Budget(alarms=1, rows=50_000)
LEVELS = np.array(["a", "b", "c"], object)


def drawn(draw: np.random.Generator, n: int, shift: float = 0.0, day: float = 0.0) -> dict:
    """A number with ties and holes, a class, and a score; `day` moves all of it."""
    score = draw.normal(day + shift, 1, n)
    return {
        "x": np.where(draw.random(n) < 0.05, np.nan, np.round(draw.normal(day, 1, n), 1)),
        "place": LEVELS[draw.choice(3, n, p=[0.6, 0.3, 0.1])],
        "score": score,
    }


def profile() -> Profile:
    return Profile.fit(drawn(np.random.default_rng(0), 5000), has_witness=False)


def run(side: Comparison, seen: Profile, n_blocks: int, *, seed=0, shift=0.0, size=(20, 180)):
    """Fold blocks of a canary with a tenth of the rows, on days that go up and down."""
    draw = np.random.default_rng(seed)
    for k in range(n_blocks):
        day = 0.8 * np.sin(k / 20)
        ours, theirs = (
            seen.binner.count(seen.binner.rows(drawn(draw, n, s, day)))[0, 0]
            for n, s in zip(size, (shift, 0.0), strict=True)
        )
        if side.fold(ours, theirs):
            return side.n_rows
    return 0


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.floats(0.01, 0.99), st.floats(0, 0.5), st.integers(1, 40))
def test_no_bet_earns_anything_while_shares_are_within_the_tolerance(seed, w, tau, n) -> None:
    """E[e] in closed form, for any shares, any guesses, any sizes of the two; and at the rim.

    The rows of a block are independent: E[e] is a power of what one of either earns.
    """
    layout = profile().layout
    draw = np.random.default_rng(seed)
    cells = slice(int(layout.starts[1]), int(layout.starts[1] + layout.sizes[1]))
    k = int(layout.sizes[1])
    guess = np.concatenate([draw.dirichlet(np.ones(size)) for size in layout.sizes])
    ratios = np.exp(draw.normal(0, 1, (3, layout.n_cells)))
    n_a = max(1, round(n * w))
    n_b = max(1, n - n_a)
    part = n_a / (n_a + n_b)
    log_a, log_b, cost, is_placed = bets(layout, ratios, np.full(3, part), guess, tau)
    for shape in (0.3, 3.0):
        theirs = draw.dirichlet(np.full(k, shape))
        step = draw.normal(size=k) * np.sqrt(theirs)
        for bet in range(3):
            for way in (step, theirs * np.sign(log_a[bet, cells])):
                move = way - theirs * way.sum()
                size = np.sqrt((move**2 / np.maximum(theirs, 1e-300)).sum())
                if size < 1e-9:  # nothing but rounding: it would no longer be a share
                    continue
                ours = theirs + move * (tau / size)
                if (ours < 0).any() or not is_placed[bet, 1]:
                    continue
                each_a = (ours * np.exp(log_a[bet, cells])).sum()
                each_b = (theirs * np.exp(log_b[bet, cells])).sum()
                log_mean = n_a * np.log(each_a) + n_b * np.log(each_b)
                assert log_mean - (n_a + n_b) * cost[bet, 1] <= 1e-9


def test_equal_versions_are_quiet_whatever_the_day_does() -> None:
    """90,000 rows of the canary, a budget of one in 50,000: two expected at most, none seen.

    All of it swings by 0.8 standard deviations, which a reference would not forgive.
    """
    seen = profile()
    for seed in range(3):
        side = Comparison(seen.layout, BUDGET)
        run(side, seen, 1500, seed=seed)
        assert side.differences == ()
        assert side.n_rows == 30_000


@pytest.mark.parametrize(("shift", "rows"), [(0.5, 400), (1.0, 160), (0.05, 0)])
def test_a_difference_is_found_and_named(shift: float, rows: int) -> None:
    """Half a standard deviation within 400 rows of the canary; what is tolerated, never."""
    seen = profile()
    found = []
    for seed in range(5):
        side = Comparison(seen.layout, BUDGET)
        found.append(run(side, seen, 400 if rows else 700, seed=seed, shift=shift))
        assert {one.channel for one in side.differences} <= {"score"}
        for one in side.differences:
            assert one.evidence > 100
            assert 0 <= one.since_row < one.row
            assert one.moved
    assert (np.median(found) <= rows and min(found) > 0) if rows else not any(found)


def test_what_was_concluded_survives_a_restart_to_the_last_bit() -> None:
    """Restored in the middle, it goes on as if nothing had been; other bins are refused."""
    seen = profile()
    whole, half = Comparison(seen.layout, BUDGET), Comparison(seen.layout, BUDGET)
    draw = np.random.default_rng(5)
    for k in range(40):
        ours, theirs = (
            seen.binner.count(seen.binner.rows(drawn(draw, n, s)))[0, 0]
            for n, s in ((20, 0.5), (100, 0.0))
        )
        whole.fold(ours, theirs, at=float(k))
        half.fold(ours, theirs, at=float(k))
        if k == 20:
            kept, half = half.to_bytes(), Comparison(seen.layout, BUDGET)
            half.restore(kept)
    assert half.to_bytes() == whole.to_bytes()
    assert half.differences
    assert half.report("total") == whole.report("total")

    other = Comparison(Profile.fit({"y": np.arange(50.0)}).layout, BUDGET)
    for damaged in (whole.to_bytes(), b"", b"x" * 999):
        with pytest.raises(BlockError):
            other.restore(damaged)


def test_a_report_shows_both_over_the_same_stretch_of_time() -> None:
    """Shares are those counted; without rows of the other there is nothing to compare."""
    seen = profile()
    side = Comparison(seen.layout, BUDGET, window_rows=100)
    draw = np.random.default_rng(5)
    rows = [seen.binner.rows(drawn(draw, n, s)) for n, s in ((100, 1.0), (900, 0.0))]
    ours, theirs = (seen.binner.count(one)[0, 0] for one in rows)
    side.fold(ours, np.zeros_like(theirs))
    assert side.report()["channels"][2]["scores"] == {}
    assert side.evidence == {"x": 1.0, "place": 1.0, "score": 1.0}
    side.fold(ours, theirs)
    found = side.report()

    assert (found["n_rows"], found["n_against"], found["is_partial"]) == (100, 900, False)
    score = found["channels"][2]
    assert score["scores"]["psi"]["is_above"]
    assert not found["channels"][1]["scores"]["psi"]["is_above"]
    assert score["against"] == pytest.approx((theirs[-len(score["bins"]) :] / 900).tolist())
