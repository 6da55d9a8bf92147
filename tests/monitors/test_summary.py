"""Embeddings: a few columns that see a shift, a collapse and a rotation, in any batches."""

import numpy as np
import pytest

from monitors import Budget, Monitor, Profile, ProfileError
from monitors.summary import N_LINES, names, summarised

WIDTH = 64


def embedded(draw, n):
    """Clusters on a sphere, as encoders make them."""
    centers = np.random.default_rng(0).normal(size=(5, WIDTH))
    rows = centers[draw.integers(0, 5, n)] + 0.5 * draw.normal(size=(n, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_batches_do_not_matter_to_the_last_bit() -> None:
    """Row by row the same sums, whatever stands beside."""
    rows = np.random.default_rng(1).normal(size=(100, 768))
    whole = summarised("e", rows)
    for k in (0, 7, 99):
        alone = summarised("e", rows[k : k + 1])
        assert all(alone[name][0] == whole[name][k] for name in names("e"))
    assert len(whole) == 1 + N_LINES


def test_rows_that_are_not_finite_are_missing() -> None:
    """Not an error, and not a number."""
    rows = np.ones((3, 4))
    rows[1, 2], rows[2, 0] = np.nan, np.inf
    found = summarised("e", rows)
    assert all(np.isnan(column[1:]).all() and np.isfinite(column[0]) for column in found.values())


@pytest.mark.parametrize("change", ["shift", "collapse", "rotation", None])
def test_changes_of_embeddings_are_paged_and_more_of_the_same_is_not(change) -> None:
    """Within 1,000 rows; 20,000 quiet ones raise nothing."""
    draw = np.random.default_rng(2)
    profile = Profile.from_json(
        Profile.fit({"e": embedded(draw, 10_000), "x": draw.normal(size=10_000)}).to_json()
    )
    monitor = Monitor(profile, budget=Budget(rows=500_000))
    assert set(names("e")) <= set(profile.channels)
    for _ in range(20):
        monitor.update({"e": embedded(draw, 1000), "x": draw.normal(size=1000)})
    assert not [alarm for alarm in monitor.episodes if alarm.level == "page"]
    if change is None:
        return
    rows = embedded(draw, 1000)
    if change == "shift":
        rows += np.float32(0.1)
    elif change == "collapse":
        rows[:] = rows[0]
    else:
        rows = np.roll(rows, 1, axis=1)
    monitor.update({"e": rows, "x": draw.normal(size=1000)})

    assert any(alarm.feature.startswith("e.") for alarm in monitor.alarms)


def test_columns_of_rows_without_numbers_are_refused_by_name() -> None:
    """Text in two dimensions has no norm."""
    with pytest.raises(ProfileError, match="'e'"):
        Profile.fit({"e": np.array([["a", "b"]])})
