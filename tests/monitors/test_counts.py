"""Rows per bin add up exactly, in any order, and only with their own kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors import BinMismatchError, Budget, Monitor, Profile, ProfileMismatchError
from monitors.counts import add, share, subtract

ROWS = Budget(rows=500_000)

counts = st.lists(st.integers(0, 10**12), min_size=4, max_size=4).map(
    lambda values: np.array(values, np.int64)
)


@settings(deadline=None, max_examples=50)
@given(counts, counts, counts)
def test_adding_is_exact_and_free_of_order(a, b, c) -> None:
    """Integers associate, commute, and come back by subtraction."""
    assert np.array_equal(add(add(a, b), c), add(c, add(b, a)))
    assert np.array_equal(subtract(add(a, b), b), a)


def test_subtracting_more_than_there_is_is_refused() -> None:
    """No bin holds a negative number of rows."""
    with pytest.raises(BinMismatchError):
        subtract(np.array([1, 2]), np.array([2, 0]))
    with pytest.raises(BinMismatchError):
        add(np.array([1, 2]), np.array([1, 2, 3]))


def test_shares_add_to_one_or_are_nan() -> None:
    """Without rows there is no share."""
    shares = share(np.array([[1, 3], [0, 0]]))

    assert shares[0].tolist() == [0.25, 0.75]
    assert np.isnan(shares[1]).all()


def test_counts_of_two_monitors_add_to_those_of_one() -> None:
    """Which worker saw a row does not matter."""
    random = np.random.default_rng(1)
    rows = {"x": random.normal(size=1000), "s": random.choice(["a", "b", "c"], 1000)}
    profile = Profile.fit(rows)
    whole, left, right = (Monitor(profile, budget=ROWS) for _ in range(3))
    whole.update(rows)
    left.update({name: column[:413] for name, column in rows.items()})
    right.update({name: column[413:] for name, column in rows.items()})

    assert left.counts + right.counts == right.counts + left.counts == whole.counts
    assert whole.counts - left.counts == right.counts
    assert (left.counts + right.counts).n_rows == 1000
    assert list(whole.counts) == ["x", "s"]
    assert whole.counts["x"].sum() == 1000


def test_counts_of_two_profiles_do_not_add() -> None:
    """Bins of another reference are other bins, even when there are as many."""
    one, two = (
        Monitor(Profile.fit({"x": np.arange(100.0) + shift}), budget=ROWS) for shift in (0, 1)
    )

    with pytest.raises(ProfileMismatchError, match="do not add up"):
        one.counts + two.counts
    assert one.counts != two.counts


def test_counts_cannot_be_changed_from_outside() -> None:
    """What a monitor hands out is a copy that refuses writing."""
    monitor = Monitor(Profile.fit({"x": np.arange(100.0)}), budget=ROWS)
    monitor.update({"x": np.arange(10.0)})

    with pytest.raises(ValueError, match="read-only"):
        monitor.counts["x"][0] = 7
