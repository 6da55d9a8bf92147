"""A short soak: what `make bench NAME=soak` does for a minute, with bounds for any host."""

from bench.soak import soak


def test_a_server_does_not_grow_under_swaps_errors_and_hang_ups() -> None:
    """Memory, open files and threads are level after the first third; nobody's request fails."""
    found = soak(9.0, n_workers=1, publish_s=1.0)

    assert found.n_published >= 4
    assert set(found.statuses) == {"ask 200", "err 400"}, found.statuses
    assert found.growth_mib < 30
    assert found.spread(lambda sample: sample.n_files) <= 8
    assert found.spread(lambda sample: sample.n_threads) <= 8
