"""References in the order of time: hours are learnt, and how closely rows follow each other."""

import numpy as np
import pytest
from scipy.signal import lfilter

from monitors import Budget, Monitor, Profile
from tests.world import World, cut

BUDGET = Budget(alarms=1, rows=500_000)
N_REFERENCE = 20_000
MINUTE_S = 60.0
DAY_S = 86_400.0


class Ordered:
    """A row a minute; five columns swing by half a standard deviation in a day, or repeat."""

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        self._world = World(seed)
        self._draw = np.random.default_rng(seed)
        self._last = np.zeros((5, 1))
        self._n = 0

    def rows(self, n: int, shift=None):
        times = (self._n + np.arange(n)) * MINUTE_S
        self._n += n
        normal = self._world.normal(self._draw, n)
        if self._kind == "repeats":
            # Independent of the others, so that each column is AR(1) with 0.9 exactly.
            noise = np.sqrt(1 - 0.9**2) * self._draw.normal(size=(5, n))
            found = [
                lfilter([1], [1, -0.9], x, zi=z) for x, z in zip(noise, self._last, strict=True)
            ]
            normal[:, :5] = np.array([x for x, _ in found]).T
            self._last = np.array([z for _, z in found])
        else:
            normal[:, :5] += 0.5 * np.sin(2 * np.pi * times / DAY_S)[:, np.newaxis]
        return self._world.rows(self._draw, n, normal=normal, shift=shift), times


@pytest.mark.parametrize("kind", ["swings", "repeats"])
@pytest.mark.parametrize("is_timed", [True, False])
def test_ordered_worlds_are_quiet_and_a_shift_is_still_found(kind, is_timed) -> None:
    """300 windows of 500 rows raise no page; half a standard deviation is found in 500 rows.

    The bench runs 1,000 windows, of which five may raise one.
    """
    source = Ordered(kind, seed=1)
    columns, times = source.rows(N_REFERENCE)
    profile = Profile.fit(columns, times=times if is_timed else None, is_ordered=True)
    monitor = Monitor(profile, budget=BUDGET)
    for _ in range(15):
        columns, times = source.rows(10_000)
        for start in range(0, 10_000, 100):
            monitor.update(cut(columns, start, start + 100), at=times[start])

    assert [alarm for alarm in monitor.episodes if alarm.level == "page"] == []

    columns, times = source.rows(2000, shift=(11, 0.5))
    for start in range(0, 2000, 50):
        if monitor.update(cut(columns, start, start + 50), at=times[start]):
            break
    assert start < 500
    assert {alarm.feature for alarm in monitor.alarms} == {"n11"}


def test_a_reference_without_order_alarms_on_a_daily_swing() -> None:
    """That is what the order is for: without it the evening is drift."""
    source = Ordered("swings", seed=2)
    columns, _ = source.rows(N_REFERENCE)
    monitor = Monitor(Profile.fit(columns), budget=BUDGET)
    columns, _ = source.rows(5000)
    for start in range(0, 5000, 50):
        monitor.update(cut(columns, start, start + 50))

    assert monitor.episodes


def test_the_design_effect_of_ar_1_is_near_theory() -> None:
    """(1 + r) / (1 - r) = 19 for r = 0.9, times the margin of 1.3; independent rows have none."""
    columns, _ = Ordered("repeats", seed=3).rows(N_REFERENCE)
    layout = Profile.fit(columns, is_ordered=True).layout
    effects = dict(zip(layout.names, layout.effects.tolist(), strict=True))

    assert all(10 < effects[f"n{j}"] < 60 for j in range(3))
    assert np.mean([effects[f"n{j}"] for j in range(5, 30)]) < 1.2


def test_hours_are_learnt_where_there_are_any() -> None:
    """Columns that swing have a season of 24 hours, the others none; JSON keeps both exactly."""
    columns, times = Ordered("swings", seed=4).rows(N_REFERENCE)
    profile = Profile.fit(columns, times=times)
    again = Profile.from_json(profile.to_json())

    assert profile.order.n_slots == 24
    seasonal = {
        name
        for name, pull in zip(profile.layout.names, profile.order.pulls, strict=True)
        if np.isfinite(pull)
    }
    assert {f"n{j}" for j in range(4)} <= seasonal
    assert len(seasonal & {f"n{j}" for j in range(5, 30)}) <= 2
    assert again == profile
    assert np.array_equal(again.order.counts, profile.order.counts)
    assert np.array_equal(again.layout.effects, profile.layout.effects)


def test_rows_are_put_in_the_order_of_their_times() -> None:
    """Shuffled rows with their times teach what rows in order do."""
    columns, times = Ordered("repeats", seed=5).rows(5000)
    shuffled = np.random.default_rng(0).permutation(5000)
    mixed = {name: column[shuffled] for name, column in columns.items()}

    assert Profile.fit(mixed, times=times[shuffled]) == Profile.fit(columns, times=times)


@pytest.mark.parametrize("times", [[1.0], [[1.0, 2.0]], ["a", "b"], [np.nan, 1.0]])
def test_times_that_are_none_are_refused(times) -> None:
    """By name."""
    from monitors import ProfileError

    with pytest.raises(ProfileError, match="times"):
        Profile.fit({"x": [1.0, 2.0]}, times=times)
