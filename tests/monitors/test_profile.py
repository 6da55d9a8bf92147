"""Profiles: what is refused, what survives JSON, and what a hostile text can do (nothing)."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from monitors import MonitorError, Profile, ProfileError

quick = settings(deadline=None, max_examples=80)
N_ROWS = 12
columns = st.one_of(
    *(
        hnp.arrays(dtype, N_ROWS)
        for dtype in (np.float16, np.float32, np.float64, np.int8, np.int64, np.uint64, np.bool_)
    ),
    st.lists(
        st.one_of(st.none(), st.just(math.nan), st.text(max_size=4)),
        min_size=N_ROWS,
        max_size=N_ROWS,
    ),
    st.lists(st.one_of(st.none(), st.floats()), min_size=N_ROWS, max_size=N_ROWS),
)


def example() -> Profile:
    random = np.random.default_rng(2)
    return Profile.fit(
        {
            "x": random.normal(size=200).astype(np.float32),
            "k": random.integers(0, 50, 200),
            "b": random.random(200) < 0.2,
            "s": random.choice(["AA", "UA", "DL"], 200),
        },
        levels_max=2,
        lineage={"data": "flights", "rows": [1, 2]},
    )


@quick
@given(st.dictionaries(st.text(min_size=1, max_size=4), columns, min_size=1, max_size=4))
def test_a_profile_survives_json(data) -> None:
    """Text to profile to text changes nothing, nor do the bins that rows fall into."""
    profile = Profile.fit(data, n_bins=4, levels_max=3)
    text = profile.to_json()
    again = Profile.from_json(text.encode())

    assert again.to_json() == text
    assert again.digest == profile.digest
    assert again == profile
    assert list(again.channels) == list(profile.channels)
    for name, column in data.items():
        before, after = profile.channels[name], again.channels[name]
        assert (before.kind, before.bins) == (after.kind, after.bins)
        assert np.array_equal(before.doubt, after.doubt)
        assert np.array_equal(after.assign(column), before.assign(column))


def test_equal_references_have_equal_digests() -> None:
    """The text is canonical: no order of making, no address, no time is in it."""
    assert example().digest == example().digest
    assert len(example().digest) == 64
    assert example().digest != example().select(["x", "k", "b"]).digest


def test_a_profile_keeps_no_rows() -> None:
    """A thousand times the rows make the text no longer than their counts do."""
    random = np.random.default_rng(0)
    small, large = (Profile.fit({"x": random.normal(size=n)}).to_json() for n in (200, 200_000))

    assert len(large) < len(small) + 14 * 3


def test_selected_channels_stand_in_the_order_asked_for() -> None:
    """A model may take fewer columns than the reference has."""
    profile = example().select(["s", "x"])

    assert list(profile.channels) == ["s", "x"]
    assert profile.n_rows == 200
    with pytest.raises(ProfileError, match="'nope'"):
        profile.select(["nope"])


def test_lineage_is_kept_and_cannot_be_changed() -> None:
    """It is copied in, and comes back equal."""
    lineage = {"data": {"name": "flights"}}
    profile = Profile.fit({"x": [1.0]}, lineage=lineage)
    lineage["data"]["name"] = "other"

    assert Profile.from_json(profile.to_json()).lineage == {"data": {"name": "flights"}}
    for bad in ({"a": math.nan}, {"a": object()}, {1: 2}):
        with pytest.raises(ProfileError, match="lineage"):
            Profile.fit({"x": [1.0]}, lineage=bad)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "no columns"),
        ({"a": [], "b": []}, "'a'.*no rows"),
        ({"a": [1.0], "b": [1.0, 2.0]}, "'b'.*2 rows.*1"),
        ({"a": np.zeros((2, 2), "U1")}, "'a'.*shape"),
        ({"a": [1.0, "x"]}, "'a'.*mixes float and string"),
        ({"a": [True, 2]}, "'a'.*mixes boolean and integer"),
        ({"a": [[1], [2]]}, "'a'.*list"),
        ({"a": np.zeros(2, complex)}, "'a'.*complex"),
        ({"a": np.zeros(2, "M8[s]")}, "'a'.*datetime"),
        ({"": [1.0]}, "name"),
        ({3: [1.0]}, "name"),
    ],
)
def test_a_reference_without_bins_is_refused_by_name(data, words) -> None:
    """The error says which column, and what is wrong with it."""
    with pytest.raises(ProfileError, match=words):
        Profile.fit(data)


@pytest.mark.parametrize("options", [{"n_bins": 1}, {"levels_max": 0}])
def test_too_few_bins_are_refused(options) -> None:
    """One bin cannot tell anything."""
    with pytest.raises(ProfileError, match="too few"):
        Profile.fit({"x": [1.0]}, **options)


def edited(**changes):
    document = json.loads(example().to_json())
    for path, value in changes.items():
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("__")]
        part = document
        for parent in parents:
            part = part[parent]
        if value is KeyError:
            del part[last]
        else:
            part[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 3}, "format 3"),
        ({"format": True}, "format.*integer"),
        ({"format": KeyError}, "format.*lacking"),
        ({"n_rows": 0}, "n_rows.*between"),
        ({"n_rows": 199}, "counts"),
        ({"lineage": []}, "lineage.*object"),
        ({"extra": 1}, "extra.*not known"),
        ({"channels": {}}, "channels.*list"),
        ({"channels__0": 3}, r"channels\[0\].*object"),
        ({"channels__0__name": ""}, r"channels\[0\].name"),
        ({"channels__0__name": "k"}, "'k'.*two of this name"),
        ({"channels__0__kind": "odd"}, "'x'.*kind"),
        ({"channels__0__kind": "integer"}, "'x'.*dtype"),
        ({"channels__0__counts": [200]}, "'x'.*counts.*1 counts for 14 bins"),
        ({"channels__0__counts__1": -1}, "'x'.*counts.*negative"),
        ({"channels__0__counts__1": 2.0}, "'x'.*counts.*integers"),
        ({"channels__0__counts__1": 21}, "'x'.*counts"),
        ({"channels__0__dtype": "float16"}, "'x'.*dtype"),
        ({"channels__0__dtype": "object"}, "'x'.*dtype"),
        ({"channels__0__edges__2": 0.1}, "'x'.*edges.*not a float32"),
        ({"channels__0__edges__2": "a"}, "'x'.*edges.*numbers"),
        ({"channels__0__edges__2": 10**400}, "'x'.*edges.*range"),
        ({"channels__0__edges__2": 99.0}, "'x'.*edges.*rise"),
        ({"channels__0__centers": []}, "'x'.*centers"),
        ({"channels__0__centers__0": 99.0}, "'x'.*centers.*fall"),
        ({"channels__0__sd": -1}, "'x'.*sd"),
        ({"channels__0__sd": "1"}, "'x'.*sd.*number or null"),
        ({"channels__0__mean": KeyError}, "'x'.*mean"),
        ({"channels__0__levels": []}, "'x'.*levels.*not known"),
        ({"channels__1__edges__0": 1.5}, "'k'.*edges.*integers"),
        ({"channels__1__edges__0": -(2**64)}, "'k'.*edges.*64 bits"),
        ({"channels__2__counts": [200, 0]}, "'b'.*counts"),
        ({"channels__3__levels__0": 3}, "'s'.*levels.*texts"),
        ({"channels__3__levels": ["AA", "AA"]}, "'s'.*levels.*twice"),
        ({"channels__3__rare": ["a", "b", "c", "d"] * 99}, "'s'.*levels.*twice"),
        ({"channels__3__n_single": 200}, "'s'.*n_levels"),
        ({"channels__3__n_levels": 2}, "'s'.*n_levels"),
        ({"channels__3__n_levels": 9}, "'s'.*counts.*fewer"),
    ],
)
def test_a_malformed_part_is_named(changes, words) -> None:
    """The error says which channel and which field."""
    with pytest.raises(ProfileError, match=words):
        Profile.from_json(edited(**changes))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "NaN",
        "[" * 100_000,
        '{"format":1,"format":1}',
        '{"format":' + "1" * 5000 + "}",
        '{"format":1,"n_rows":NaN,"lineage":{},"channels":[]}',
        '{"format":1,"n_rows":1,"lineage":' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
        b"\xff\xfe\x00",
        b"\x80",
    ],
    ids=lambda text: str(text[:12]),
)
def test_a_text_that_is_no_profile_is_refused(text) -> None:
    """Nothing but ProfileError comes out, also from deep nesting and endless numbers."""
    with pytest.raises(ProfileError):
        Profile.from_json(text)


def test_a_text_of_a_hundred_megabytes_is_not_parsed() -> None:
    """The bound is checked before any work."""
    with pytest.raises(ProfileError, match="at most"):
        Profile.from_json(b" " * 100_000_000)


def test_every_beginning_of_a_profile_is_refused() -> None:
    """A file cut short is no smaller profile."""
    text = example().to_json()

    for length in range(0, len(text), 7):
        with pytest.raises(ProfileError):
            Profile.from_json(text[:length])


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just(2**53)
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_text_changed_anywhere_is_refused_or_works(data) -> None:
    """Whatever is believed can count rows and be written again."""
    document = json.loads(example().to_json())
    part, key = {"document": document}, "document"
    while isinstance(part[key], dict | list) and data.draw(st.booleans() | st.just(value=True)):
        part = part[key]
        if not part:
            return
        key = data.draw(
            st.sampled_from(list(part)) if isinstance(part, dict) else st.integers(0, len(part) - 1)
        )
    part[key] = data.draw(
        scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars)
    )
    try:
        profile = Profile.from_json(json.dumps(document))
    except MonitorError as error:
        assert str(error).startswith("reference profile: ")  # noqa: PT017  # either is fine
        return
    assert Profile.from_json(profile.to_json()) == profile
    for channel in profile:
        assert (channel.assign([1.0, None, "AA"]) < channel.n_bins).all()
        assert len(channel.bins) == channel.n_bins
