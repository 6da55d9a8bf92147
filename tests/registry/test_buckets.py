"""Units to buckets: uniform, independent of each other, and moved no more than asked for."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from registry import buckets
from registry.buckets import Buckets, BucketsError, N, bucket_of, moved

SALTS = [bytes(range(k, k + 16)) for k in range(3)]
UNITS = [f"user-{k}" for k in range(100_000)]
NAMES = ("champion", "challenger", "9", "previous")


@pytest.fixture(scope="module")
def assigned() -> list[np.ndarray]:
    """The bucket of each unit, by salt."""
    return [np.array([bucket_of(salt, unit) for unit in UNITS]) for salt in SALTS]


@pytest.mark.parametrize(
    ("salt", "unit", "bucket"),
    [
        ("000102030405060708090a0b0c0d0e0f", "user-1", 9196),
        ("000102030405060708090a0b0c0d0e0f", "42", 2103),
        ("00000000000000000000000000000000", "user-1", 7674),
        ("000102030405060708090a0b0c0d0e0f", "Zoë", 2602),
    ],
)
def test_the_hash_is_the_one_of_the_page(salt: str, unit: str, bucket: int) -> None:
    """Anybody can compute a bucket: these are the vectors of docs/reference/route-format.md."""
    assert bucket_of(bytes.fromhex(salt), unit) == bucket
    assert buckets.bucket_of_bytes(bytes.fromhex(salt), unit.encode()) == bucket


def test_units_spread_evenly_with_every_salt(assigned: list[np.ndarray]) -> None:
    """Chi-square over 100 groups of buckets, per salt, at one in a hundred thousand."""
    for found in assigned:
        counts = np.bincount(found // 100, minlength=100)
        assert stats.chisquare(counts).pvalue > 1e-5


def test_salts_assign_independently_of_each_other(assigned: list[np.ndarray]) -> None:
    """Who is in the canary tells nothing about who is shadowed or captured: 10 x 10 tables."""
    for one, other in pairwise([*assigned, assigned[0]]):
        table = np.zeros((10, 10), np.int64)
        np.add.at(table, (one // 1000, other // 1000), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-5


def test_raising_5_to_20_percent_moves_exactly_15_percent_of_units_and_none_back() -> None:
    """Everybody who saw the challenger at 5 percent still does at 20; 1 500 buckets moved."""
    seed = b"rollout 1"
    at_5 = Buckets.all_to("champion").moved_to({"champion": 9500, "challenger": 500}, seed)
    at_20 = at_5.moved_to({"champion": 8000, "challenger": 2000}, seed)

    assert moved(at_5, at_20) == {("champion", "challenger"): 1500}
    before = {u for u in UNITS[:20_000] if at_5.owner(bucket_of(SALTS[0], u)) == "challenger"}
    after = {u for u in UNITS[:20_000] if at_20.owner(bucket_of(SALTS[0], u)) == "challenger"}
    assert before < after


def test_buckets_are_given_back_in_reverse() -> None:
    """5 -> 20 -> 50 -> 20 -> 5 goes through the same tables on the way down as on the way up."""
    tables = [Buckets.all_to("champion")]
    for percent in (5, 20, 50, 20, 5):
        weights = {"champion": N - 100 * percent, "challenger": 100 * percent}
        tables.append(tables[-1].moved_to(weights, b"seed"))

    _, at_5, at_20, _, again_20, again_5 = (table.format() for table in tables)
    assert (again_20, again_5) == (at_20, at_5)


def test_another_rollout_asks_other_units_first() -> None:
    """The order is fixed by the seed, so that not the same users try every new version."""
    tables = [
        Buckets.all_to("a").moved_to({"a": 9900, "b": 100}, b"rollout %d" % k) for k in range(20)
    ]

    firsts = {table.format().split(",")[1] for table in tables}
    assert len(firsts) > 15


_weights = st.lists(st.integers(0, N), min_size=3, max_size=3).map(
    lambda cuts: dict(zip(NAMES, np.diff([0, *sorted(cuts), N]).tolist(), strict=True))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_weights, min_size=2, max_size=4), st.binary(max_size=8))
def test_tables_hold_the_weights_and_move_no_more_than_they_must(
    steps: list[dict[str, int]], seed: bytes
) -> None:
    """The least that can move is half the sum of the changes; more never does."""
    table = Buckets.all_to("champion")
    for weights in steps:
        before = dict.fromkeys(NAMES, 0) | table.weights()
        after = table.moved_to(weights, seed)

        assert after.weights() == {name: n for name, n in weights.items() if n}
        least = sum(abs(weights[name] - before[name]) for name in NAMES) // 2
        assert sum(moved(table, after).values()) == least
        assert Buckets.parse(after.format()).format() == after.format()
        table = after


def test_a_variant_under_a_new_name_keeps_its_units() -> None:
    """`challenger` becoming `9` moves its own buckets, and nobody else's."""
    before = Buckets.all_to("champion").moved_to({"champion": 9000, "challenger": 1000}, b"s")
    after = before.moved_to({"champion": 9000, "9": 1000}, b"s")

    assert moved(before, after) == {("challenger", "9"): 1000}


@pytest.mark.parametrize(
    "text",
    ["", "0-9999", "0-9999:", "0-9998:a", "0-10000:a", "1-9999:a", "0-10:a,12-9999:a",
     "0-10:a,11-9:a", "a-b:c", "0-9999:a,", "-1-9999:a", "\u0660-9999:a",
     "0-99999999999999999999:a"],
)  # fmt: skip
def test_a_table_that_cannot_be_is_refused(text: str) -> None:
    """Ranges follow each other from 0 to 9999, or there is no table."""
    with pytest.raises(BucketsError):
        Buckets.parse(text)


def test_weights_that_do_not_add_up_make_no_table() -> None:
    """9 999 buckets, or a negative share, is a mistake of whoever asks."""
    for weights in ({"a": 9999}, {"a": 10_001, "b": -1}):
        with pytest.raises(BucketsError):
            Buckets.all_to("a").moved_to(weights, b"")
