"""Every value lands in one bin, and in the right one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors import Profile
from monitors.channel import LEVEL_LENGTH_MAX, Channel, NumericChannel, as_column, fit

quick = settings(deadline=None, max_examples=100)
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.just([1, 2]),
    st.just({}),
    st.just(np.float32("nan")),
    st.just(np.int8(3)),
    st.just(np.datetime64("NaT")),
    st.just(10**400),
    st.just(1j),
)
references = [
    np.random.default_rng(0).normal(size=500).astype(np.float32),
    np.random.default_rng(0).integers(-9, 99, 500),
    np.arange(500) % 3 == 0,
    np.array(["a", "b", "c", "dd", None] * 100, object),
    np.full(500, np.nan),
    np.full(500, None, object),
    np.full(500, 7.5),
]


def fitted(values, **options) -> Channel:
    return Profile.fit({"c": values}, **options).channels["c"]


def rows_in(channel: Channel, values) -> dict[str, int]:
    """Rows per label, bins without rows left out."""
    bins = channel.assign(values)
    return {channel.bins[b]: int((bins == b).sum()) for b in np.unique(bins)}


@pytest.mark.parametrize("reference", references, ids=lambda values: str(values.dtype))
@quick
@given(values=st.lists(anything, max_size=8))
def test_any_value_of_any_type_lands_in_a_bin(reference, values) -> None:
    """A column of strange objects gives a bin number for each, and never raises."""
    channel = fitted(reference)

    bins = channel.assign(values)

    assert bins.dtype == np.int32
    assert bins.shape == (len(values),)
    assert all(0 <= b < channel.n_bins for b in bins)


@pytest.mark.parametrize("reference", references, ids=lambda values: str(values.dtype))
@pytest.mark.parametrize("dtype", [*"?bBhHiIlLqQefdgFDSUOMmV", "T", ">f4", ">i8"])
def test_any_array_type_lands_in_bins(reference, dtype) -> None:
    """A served column of another type than the reference is counted, not refused."""
    dtype = np.dtypes.StringDType() if dtype == "T" else dtype
    for values in (np.zeros(3, dtype), np.zeros((3, 2), dtype), np.zeros((3, 1), dtype)):
        assert fitted(reference).assign(values).shape == (3,)


@quick
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=60),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    n_bins=st.integers(2, 20),
)
def test_counts_are_those_of_a_search_by_hand(values, dtype, n_bins) -> None:
    """Each value lies in the bin between whose edges it lies, in exact arithmetic."""
    with np.errstate(over="ignore"):
        column = np.array(values).astype(dtype)
    channel = fitted(column, n_bins=n_bins)
    edges = channel.edges.tolist()
    expected = [0] * channel.n_bins
    for value in column.tolist():
        if math.isnan(value):
            expected[-2] += 1
        else:
            expected[sum(edge < value for edge in edges)] += 1

    assert channel.counts.tolist() == expected
    assert channel.assign(column).tolist() == channel.assign(column.tolist()).tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.uint64])
def test_the_reference_itself_shows_no_drift_whatever_way_it_comes(dtype) -> None:
    """Strided, byte-swapped or as objects, equal values fall into equal bins."""
    random = np.random.default_rng(4)
    column = np.round(random.normal(50, 9, 2000), 1).astype(dtype)
    channel = fitted(column)
    strided = np.stack([column, column], axis=1)[:, 1]
    swapped = column.astype(column.dtype.newbyteorder(">"))

    for values in (column, strided, swapped, column.astype(object), column.tolist()):
        counts = np.bincount(channel.assign(values), minlength=channel.n_bins)
        assert np.array_equal(counts, channel.counts)


def test_float32_rounded_to_a_decimal_stays_in_its_bin() -> None:
    """Edges are float32 where values are: no value near an edge changes sides."""
    column = (np.arange(1000) / 10).astype(np.float32)
    channel = fitted(column)

    assert channel.edges.dtype == np.float32
    assert channel.counts[1:-3].tolist() == [100] * 10


def test_quantile_bins_are_nearly_equal() -> None:
    """Ten bins of distinct values hold a tenth of the rows each; nothing is out of range."""
    channel = fitted(np.random.default_rng(0).normal(size=9999))

    assert channel.n_bins == 10 + 4
    assert channel.counts[[0, -3, -2, -1]].tolist() == [0, 0, 0, 0]
    assert all(999 <= count <= 1001 for count in channel.counts[1:-3])


def test_a_heavy_value_has_a_bin_of_its_own() -> None:
    """Zeros that are three in ten rows are told from everything just beside them."""
    random = np.random.default_rng(0)
    column = np.where(random.random(5000) < 0.3, 0.0, random.normal(size=5000))
    channel = fitted(column)

    assert "= 0" in channel.bins
    assert channel.counts[channel.bins.index("= 0")] == (column == 0).sum()
    assert rows_in(channel, [0.0, -0.0]) == {"= 0": 2}
    assert "= 0" not in rows_in(channel, [1e-9, -1e-9])


def test_a_constant_column_has_one_bin_and_its_surroundings() -> None:
    """Below, the value, above, missing, invalid."""
    channel = fitted(np.full(50, 3.25))

    assert channel.bins == ("below 3.25", "= 3.25", "above 3.25", "missing", "invalid")
    assert channel.counts.tolist() == [0, 50, 0, 0, 0]
    assert channel.positions is None
    assert channel.assign([3.0, 3.25, 3.5, None, "x"]).tolist() == [0, 1, 2, 3, 4]


def test_a_column_without_any_value_can_be_watched() -> None:
    """A first value is then a change."""
    numbers, objects = fitted(np.full(9, np.nan)), fitted([None] * 9)

    assert numbers.counts.tolist() == [0, 9, 0]
    assert rows_in(numbers, [1.0, math.inf, math.nan]) == {"any": 2, "missing": 1}
    assert objects.kind == "categorical"
    assert rows_in(objects, ["a", None]) == {"unseen": 1, "missing": 1}


def test_infinities_are_out_of_range() -> None:
    """They are numbers beyond all others, in the reference as later."""
    channel = fitted([1.0, 2.0, 3.0, math.inf])

    assert rows_in(channel, [-math.inf, math.inf]) == {"below 1": 1, "above 3": 1}
    assert channel.counts[[0, -3]].tolist() == [0, 1]


def test_integers_have_bins_of_whole_numbers() -> None:
    """Labels name the first and the last integer of a bin."""
    channel = fitted(np.arange(100))

    assert channel.kind == "integer"
    assert channel.bins[:3] == ("below 0", "0 .. 9", "10 .. 19")
    assert channel.counts[1:-3].tolist() == [10] * 10
    assert rows_in(channel, [-1, 100, True]) == {"below 0": 1, "above 99": 1, "0 .. 9": 1}


def test_integers_at_the_ends_of_their_type_are_counted() -> None:
    """No edge overflows, and integers too large for a float are still told apart."""
    ends = np.array([-(2**63), -(2**63), 0, 2**63 - 1, 2**63 - 1])
    large = np.array([2**53, 2**53 + 1, 2**53 + 2] * 3)

    assert fitted(ends).counts.sum() == 5
    assert fitted(np.array([2**64 - 1] * 3 + [0], np.uint64)).counts.sum() == 4
    assert sorted(set(fitted(large).counts.tolist())) == [0, 3]
    assert fitted(large.tolist()).assign(large.tolist()).tolist() == [1, 2, 3] * 3


def test_text_and_none_in_a_numeric_column_are_invalid_and_missing() -> None:
    """A wrong type is not dropped: it has its own bin."""
    channel = fitted(np.arange(100.0))

    assert rows_in(channel, ["12.5", None, math.nan, b"1", object()]) == {
        "missing": 2,
        "invalid": 3,
    }
    assert rows_in(channel, np.array(["a", "b"])) == {"invalid": 2}


def test_rare_levels_are_told_from_unseen_ones() -> None:
    """The two most frequent of four levels have bins; the other two are known by name."""
    channel = fitted(list("aaaabbbccd"), levels_max=2)

    assert channel.bins == ("a", "b", "other", "unseen", "missing", "invalid")
    assert channel.counts.tolist() == [4, 3, 3, 0, 0, 0]
    assert rows_in(channel, ["a", "d", "e", None, math.nan, 5, ["a"]]) == {
        "a": 1,
        "other": 1,
        "unseen": 1,
        "missing": 2,
        "invalid": 2,
    }


@pytest.mark.parametrize("dtype", ["U", "S", object, np.dtypes.StringDType()])
def test_text_is_the_same_in_every_type_of_array(dtype) -> None:
    """Unicode, bytes, objects and variable strings name the same levels."""
    channel = fitted(np.array(["AA", "UA", "AA"]))

    assert channel.assign(np.array(["AA", "UA", "ZZ"], dtype)).tolist() == [0, 1, 3]
    assert fitted(np.array(["AA", "UA", "AA"], dtype)).counts.tolist() == channel.counts.tolist()


def test_long_names_are_known_by_a_short_one() -> None:
    """A profile does not grow with the length of its levels, which stay apart."""
    long = ["x" * 10_000, "x" * 9_999 + "y"]
    channel = fitted(long * 3)

    assert channel.counts.tolist()[:2] == [3, 3]
    assert all(len(level) <= LEVEL_LENGTH_MAX for level in channel.levels)
    assert sorted(channel.assign(long).tolist()) == [0, 1]


def test_levels_named_like_our_words_keep_apart() -> None:
    """A level called missing is not what is missing."""
    channel = fitted(["missing", "other", "", '"', '"other"'])

    assert len(set(channel.bins)) == len(channel.bins)
    assert rows_in(channel, ["missing", None]) == {'"missing"': 1, "missing": 1}


def test_booleans_take_zero_and_one() -> None:
    """Runtimes differ in how they write a boolean; two is none."""
    channel = fitted([True, False, True, None])

    assert channel.kind == "boolean"
    assert channel.counts.tolist() == [1, 2, 1, 0]
    assert channel.assign(np.array([0, 1, 2], np.uint8)).tolist() == [0, 1, 3]
    assert channel.assign(np.array([0.0, 1.0, 0.5, np.nan])).tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, 3], "integer"),
        ([1, None, 3], "numeric"),
        ([1, 2.5], "numeric"),
        ([True, None], "boolean"),
        (["a", None, math.nan], "categorical"),
        ([np.float32(1), np.int8(2)], "numeric"),
        (np.array([1.5, 2], np.longdouble), "numeric"),
        (np.ma.masked_array([1, 2, 3], [0, 1, 0]), "numeric"),
    ],
)
def test_objects_are_what_they_hold(values, kind) -> None:
    """The kind comes from the values, not from the container."""
    assert fitted(values).kind == kind


@quick
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=40), st.integers(2, 12))
def test_labels_are_never_equal(values, n_bins) -> None:
    """Labels are the bins' names in metrics, however close the edges are."""
    channel = fitted(values, n_bins=n_bins)

    assert len(channel.bins) == channel.n_bins == len(set(channel.bins))


@quick
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=40))
def test_positions_stand_in_the_order_of_the_bins(values) -> None:
    """Wasserstein needs places that do not fall."""
    channel = fitted(np.array(values, np.float64))

    assert isinstance(channel, NumericChannel)
    if channel.positions is not None:
        assert channel.positions.size == channel.n_ordered
        assert (np.diff(channel.positions) >= 0).all()


@quick
@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=30), st.integers(1, 12))
def test_doubt_never_takes_more_than_there_is(values, levels_max) -> None:
    """Counts and doubt together are the weights of a Dirichlet distribution."""
    channel = fit("c", as_column(values), n_bins=10, levels_max=levels_max)

    assert (channel.counts + channel.doubt >= -1e-12).all()


def test_misses_are_not_remembered() -> None:
    """Clients make up names; a channel's memory does not grow with them."""
    channel = fitted(["a", "b"])
    before = len(channel._lookup)

    channel.assign([f"made up {number}" for number in range(1000)])

    assert len(channel._lookup) == before


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_found_for_many_columns_at_once_are_those_that_each_finds(dtype: type) -> None:
    """Edges themselves and their neighbours, nan, infinities, zeros of both signs, atoms, ties."""
    draw = np.random.default_rng(4)
    n = 3000
    columns = {
        "normal": draw.normal(size=n),
        "tied": np.round(draw.normal(size=n)),
        "zeros": np.maximum(draw.normal(size=n), 0),
        "tiny": draw.normal(size=n) * 1e-30,
        "vast": draw.normal(size=n) * 1e30,
        "one": np.ones(n),
        "empty": np.full(n, np.nan),
    }
    profile = Profile.fit({k: v.astype(dtype) for k, v in columns.items()}, has_witness=False)
    edges = np.concatenate([c.bounds for c in profile])
    edges = edges[np.isfinite(edges)]
    probes = np.concatenate([
        edges, np.nextafter(edges, dtype(np.inf)), np.nextafter(edges, dtype(-np.inf)),
        [np.nan, np.inf, -np.inf, 0.0, -0.0], draw.normal(size=5000),
    ]).astype(dtype)  # fmt: skip
    served = {name: draw.permutation(probes) for name in columns}
    served["vast"] = served["vast"].astype(np.float64)  # Another type, found by itself.
    counts = profile.binner.count(profile.binner.rows(served))[0, 0]

    for channel, start in zip(profile, profile.layout.starts.tolist(), strict=True):
        alone = np.bincount(channel.place(served[channel.name]), minlength=channel.n_bins)
        assert counts[start : start + channel.n_bins].tolist() == alone.tolist(), channel.name
