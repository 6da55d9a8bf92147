"""Witnesses: exact whatever the batches, blind to nothing that whitening shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors import Profile
from monitors.witness import group_size
from tests.world import World, cut


@pytest.fixture(scope="module")
def world() -> World:
    return World(4)


@pytest.fixture(scope="module")
def profile(world) -> Profile:
    return Profile.fit(world.rows(np.random.default_rng(0), 20_000))


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 500), max_size=6))
def test_witnesses_do_not_depend_on_how_rows_are_batched(world, profile, cuts) -> None:
    """Sums of whole numbers are exact in any order: no row falls elsewhere in another batch."""
    columns = world.rows(np.random.default_rng(3), 500)
    whole = profile.binner.count(profile.binner.rows(columns)).sum(axis=0)
    ends = [*sorted(cuts), 500]

    parts = sum(
        profile.binner.count(profile.binner.rows(cut(columns, start, stop))).sum(axis=0)
        for start, stop in zip([0, *ends], ends, strict=False)
    )

    assert np.array_equal(parts, whole)


def test_every_row_is_counted_once_in_every_channel(world, profile) -> None:
    """Witnesses and quality included; of the reference, too."""
    columns = world.rows(np.random.default_rng(4), 700)
    counts = profile.binner.count(profile.binner.rows(columns))[0, 0]

    assert set(profile.layout.sums(counts)) == {700}
    assert set(profile.layout.n_reference) == {20_000}


def test_a_witness_is_what_the_others_leave_unsaid() -> None:
    """y = x + noise: the witness of y has the noise's spread, not that of y."""
    draw = np.random.default_rng(5)
    x = draw.normal(size=20_000)
    profile = Profile.fit({"x": x, "y": x + 0.5 * draw.normal(size=20_000)})
    x = draw.normal(size=2000)
    away = {"x": x, "y": x + 0.5 * draw.normal(size=2000) + 0.5}
    layout = profile.layout
    counts = profile.binner.count(profile.binner.rows(away))[0, 0]
    scores = layout.scores(layout.shares)
    means = dict(zip(layout.names, layout.sums(scores * counts) / 2000, strict=True))

    assert means["y"] == pytest.approx(0.5 / np.sqrt(1.25), abs=0.1)
    assert means["witness:y"] > 1.5 * means["y"]


def test_witnesses_need_all_their_columns(profile) -> None:
    """Rows that lack a column are counted in the others, and in no witness."""
    counts = profile.binner.count(profile.binner.rows({"n0": np.zeros(10)}))[0, 0]
    rows = dict(zip(profile.layout.names, profile.layout.sums(counts).tolist(), strict=True))

    assert {name for name, n in rows.items() if n} == {"n0"}


def test_groups_are_as_large_as_the_reference_allows() -> None:
    """n rows whiten sqrt(n / 2) columns, 64 at most, and ten rows two."""
    assert [group_size(n) for n in (10, 200, 5000, 10**6)] == [2, 10, 50, 64]
    profile = Profile.fit({f"x{k}": np.random.default_rng(k).normal(size=200) for k in range(25)})
    assert max(len(group.names) for group in profile.witness.groups) <= 10


def test_selected_columns_keep_the_witnesses_made_of_them(world, profile) -> None:
    """All numbers: the witnesses stay; one less: they go."""
    numbers = [f"n{j}" for j in range(30)]
    kept = profile.select(numbers)
    lost = profile.select(numbers[1:])
    columns = world.rows(np.random.default_rng(6), 300)
    names = list(kept.layout.names)

    assert "witness:n3" in names
    assert "witness:quality" not in names
    assert not any(name.startswith("witness") for name in lost.layout.names)
    counts = kept.binner.count(kept.binner.rows(columns))[0, 0]
    whole = profile.binner.count(profile.binner.rows(columns))[0, 0]
    start, full = kept.layout.starts, profile.layout.starts
    for name in ("n7", "witness:n7", "witness:norm"):
        here, there = names.index(name), profile.layout.names.index(name)
        size = int(kept.layout.sizes[here])
        assert np.array_equal(
            counts[start[here] : start[here] + size], whole[full[there] : full[there] + size]
        )
        assert np.array_equal(
            kept.layout.counts[start[here] : start[here] + size],
            profile.layout.counts[full[there] : full[there] + size],
        )
