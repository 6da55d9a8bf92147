"""The whole room: windows, reports, alarms, and what no block can do to them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors import BlockError, Monitor, MonitorError, Profile
from monitors.monitor import UNKNOWN_MAX

N_CHANNELS = 10


def rows(random, n_rows, shift=0.0):
    """Ten channels: eight of numbers, one of them with holes, and two of names."""
    columns = {f"x{k}": random.normal(shift, 1, n_rows).astype(np.float32) for k in range(7)}
    columns["holes"] = np.where(random.random(n_rows) < 0.1, np.nan, random.normal(size=n_rows))
    columns["few"] = np.array(["AA", "UA", "DL"], object)[random.integers(0, 3, n_rows)]
    columns["many"] = np.array([f"c{k}" for k in range(30)], object)[
        random.binomial(29, 0.3, n_rows)
    ]
    return columns


@pytest.fixture(scope="module")
def profile() -> Profile:
    return Profile.fit(rows(np.random.default_rng(0), 20_000))


def cut(columns, start, stop):
    return {name: column[start:stop] for name, column in columns.items()}


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 700), max_size=8),
    window_rows=st.sampled_from([1, 7, 100, 350, 1000]),
)
def test_how_rows_are_cut_into_blocks_does_not_matter(cuts, window_rows) -> None:
    """One block of 700 rows, or any way of cutting it, gives the same windows and totals."""
    random = np.random.default_rng(3)
    columns = {"x": random.normal(size=700), "s": random.choice(["a", "b"], 700)}
    profile = Profile.fit(columns)
    whole, parts = Monitor(profile, window_rows), Monitor(profile, window_rows)

    expected = whole.update(columns)
    found = []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 700], strict=True):
        found += parts.update(cut(columns, start, stop))

    assert [window.index for window in found] == list(range(1, 700 // window_rows + 1))
    assert all(window.n_rows == window_rows for window in found)
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.table, other.table)
    assert parts.counts == whole.counts
    assert parts.report("current").to_dict() == whole.report("current").to_dict()


def test_a_block_larger_than_is_counted_at_once_is_counted_whole() -> None:
    """Thirty thousand rows in one block give thirty windows."""
    profile = Profile.fit({"x": np.arange(1000)})
    monitor = Monitor(profile)

    windows = monitor.update({"x": np.arange(30_000)})

    assert len(windows) == 30
    assert monitor.counts["x"].sum() == 30_000
    assert windows[9].table[0, -4:].sum() == 1000


def test_unknown_columns_are_listed_and_lacking_ones_are_not_counted(profile) -> None:
    """Neither raises; a channel counts only the rows that had it."""
    monitor = Monitor(profile)

    monitor.update({"x0": np.zeros(30), "new": np.zeros(7)})
    monitor.update({"x1": np.zeros(20)})

    assert monitor.unknown == ("new",)
    assert monitor.counts.n_rows == 50
    assert {name: int(counts.sum()) for name, counts in monitor.counts.items() if counts.any()} == {
        "x0": 30,
        "x1": 20,
    }


def test_names_made_up_by_clients_take_bounded_memory(profile) -> None:
    """Only the first hundred unknown columns are remembered."""
    monitor = Monitor(profile)

    for number in range(1000):
        monitor.update({f"made up {number}": [1]})

    assert len(monitor.unknown) == UNKNOWN_MAX
    assert monitor.counts.n_rows == 0


def test_columns_of_unequal_length_are_refused_before_counting(profile) -> None:
    """Half a block would be worse than none."""
    monitor = Monitor(profile)

    with pytest.raises(BlockError, match="'x1' has 3 rows, column 'x0' has 2"):
        monitor.update({"x0": [1.0, 2.0], "x1": [1.0, 2.0, 3.0]})
    assert monitor.counts.n_rows == 0


@pytest.mark.parametrize("window_rows", [0, -5])
def test_a_window_holds_at_least_one_row(profile, window_rows) -> None:
    """Another size is refused by name."""
    with pytest.raises(MonitorError, match="window_rows"):
        Monitor(profile, window_rows)


def test_an_unknown_window_is_refused(profile) -> None:
    """The error lists the three that there are."""
    with pytest.raises(MonitorError, match="last, current or total"):
        Monitor(profile).report("1h")


def test_a_report_says_what_it_is_about(profile) -> None:
    """Last closed window, the one being filled, or all rows, with their times."""
    monitor = Monitor(profile, window_rows=500)
    random = np.random.default_rng(5)

    empty = monitor.report()
    monitor.update(rows(random, 300), at=10.0)
    partial = monitor.report()
    monitor.update(rows(random, 300), at=20.0)
    last, current, total = (monitor.report(name) for name in ("last", "current", "total"))

    assert (empty.n_rows, empty.is_partial, empty.index) == (0, True, 1)
    assert (partial.n_rows, partial.is_partial, partial.index) == (300, True, 1)
    assert (last.n_rows, last.is_partial, last.index) == (500, False, 1)
    assert (last.since, last.until) == (10.0, 20.0)
    assert (current.n_rows, current.is_partial, current.index) == (100, True, 2)
    assert (current.since, current.until) == (20.0, 20.0)
    assert (total.n_rows, total.index, total.since, total.until) == (600, 1, 10.0, 20.0)
    assert [channel.name for channel in last.channels] == list(profile.channels)


def test_scores_are_those_of_the_kind(profile) -> None:
    """Orders have a cumulative distance, numbers a scale, names unseen levels."""
    monitor = Monitor(profile)
    monitor.update(rows(np.random.default_rng(6), 400))
    channels = {channel.name: channel for channel in monitor.report().channels}
    shared = {"psi", "jensen_shannon", "hellinger", "l_infinity", "missing_rate"}

    assert set(channels["x0"].scores) == shared | {"kolmogorov_smirnov", "wasserstein"}
    assert set(channels["few"].scores) == shared | {"unseen_rate"}
    assert channels["x0"].n_rows == 400
    assert channels["x0"].n_reference == 20_000
    assert sum(channels["x0"].current) == pytest.approx(1)
    assert sum(channels["x0"].reference) == pytest.approx(1)
    assert channels["holes"].scores["missing_rate"].value == pytest.approx(
        channels["holes"].current[-2]
    )


def test_wasserstein_of_a_shift_is_about_the_shift_in_standard_deviations(profile) -> None:
    """Half a standard deviation to the right, seen through ten bins."""
    monitor = Monitor(profile)
    monitor.update(rows(np.random.default_rng(6), 900, shift=0.5))
    score = monitor.report().channels[0].scores["wasserstein"]

    assert score.value == pytest.approx(0.5, abs=0.12)
    assert score.is_above


def test_scores_among_values_ignore_a_change_of_what_is_missing() -> None:
    """Nine tenths missing is news for the rate and psi, not for the order of the rest."""
    random = np.random.default_rng(8)
    monitor = Monitor(Profile.fit({"x": random.normal(size=20_000)}))
    column = random.normal(size=1000)
    column[:900] = np.nan
    monitor.update({"x": column})

    scores = monitor.report().channels[0].scores

    assert scores["missing_rate"].is_above
    assert scores["psi"].is_above
    assert not scores["kolmogorov_smirnov"].is_above
    assert not scores["wasserstein"].is_above
    assert scores["kolmogorov_smirnov"].line > 0.1


def test_a_report_is_plain_json_without_nan(profile) -> None:
    """Also for channels without rows, constant ones and empty monitors."""
    constant = Profile.fit({"c": [1.0] * 9, "e": [math.nan] * 9, "b": [True, False, None] * 3})
    for monitor in (Monitor(profile), Monitor(constant)):
        monitor.update({"x0": [1.0, 2.0], "c": [1.0, 1.0]})
        for window in ("last", "current", "total"):
            text = json.dumps(monitor.report(window).to_dict(), allow_nan=False)
            assert json.loads(text)["window"] == window


def test_two_thousand_quiet_windows_raise_no_alarm(profile) -> None:
    """Ten channels, windows of 500 rows, nothing changed: nobody is called."""
    monitor = Monitor(profile, window_rows=500)
    random = np.random.default_rng(11)

    for _ in range(100):
        monitor.update(rows(random, 10_000))

    assert monitor.report().index == 2000
    assert monitor.episodes == ()


def test_a_shift_of_one_standard_deviation_alarms_in_its_second_window(profile) -> None:
    """Opens once with the second window, names the first, and lasts while the shift does."""
    monitor = Monitor(profile, window_rows=500)
    random = np.random.default_rng(12)
    monitor.update(rows(random, 2000), at=1.0)
    monitor.update(rows(random, 500, shift=1.0), at=2.0)
    after_one = monitor.alarms
    monitor.update(rows(random, 500, shift=1.0), at=3.0)
    after_two = monitor.alarms
    monitor.update(rows(random, 1500, shift=1.0), at=4.0)

    assert after_one == ()
    assert [alarm.channel for alarm in after_two] == [f"x{k}" for k in range(7)]
    for alarm in after_two:
        assert (alarm.statistic, alarm.since, alarm.window, alarm.at) == ("psi", 5, 6, 3.0)
        assert alarm.value >= 0.25
        assert alarm.value > alarm.line
    assert monitor.alarms == after_two == monitor.report().alarms
    assert len(monitor.episodes) == 7


def test_an_alarm_closes_with_the_first_window_below_and_may_open_again(profile) -> None:
    """Each episode knows the windows of its beginning and its end."""
    monitor = Monitor(profile, window_rows=500)
    random = np.random.default_rng(13)
    for shift, n_windows in ((1, 3), (0, 1), (1, 1), (0, 1), (1, 2)):
        monitor.update(rows(random, 500 * n_windows, shift=shift))

    of_x0 = [episode for episode in monitor.episodes if episode.alarm.channel == "x0"]
    assert [(episode.opened, episode.closed) for episode in of_x0] == [(2, 4), (8, None)]


def test_a_window_without_a_channel_says_nothing_about_it(profile) -> None:
    """No rows neither close an alarm nor break the row of two."""
    monitor = Monitor(profile, window_rows=500)
    random = np.random.default_rng(14)
    drifted = {"x0": random.normal(2, 1, 500)}
    elsewhere = {"x1": random.normal(size=500)}

    for block in (drifted, elsewhere, drifted, elsewhere):
        monitor.update(block)

    assert [(alarm.channel, alarm.since, alarm.window) for alarm in monitor.alarms] == [
        ("x0", 1, 3)
    ]


def test_an_unfinished_window_raises_no_alarm(profile) -> None:
    """Only closed windows are judged, however far the rows are."""
    monitor = Monitor(profile, window_rows=500)

    monitor.update(rows(np.random.default_rng(15), 999, shift=9.0))

    assert monitor.alarms == ()


def test_a_few_rows_of_a_channel_do_not_alarm(profile) -> None:
    """Five rows have a psi of several, and a line above it."""
    monitor = Monitor(profile, window_rows=500)
    random = np.random.default_rng(16)
    for _ in range(20):
        columns = rows(random, 500)
        few = columns.pop("x0")[:5]
        monitor.update(cut(columns, 0, 495))
        monitor.update({"x0": few, **cut(columns, 495, 500)})

    assert monitor.report().channels[0].n_rows == 5
    assert monitor.report().channels[0].scores["psi"].value > 0.25
    assert monitor.episodes == ()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("holes", lambda column: np.where(np.arange(column.size) % 2 == 0, np.nan, column)),
        ("few", lambda column: np.full(column.size, "ZZ", object)),
        ("x0", lambda column: column.astype(str)),
        ("x0", lambda column: np.full(column.size, np.inf, np.float32)),
        ("many", lambda column: np.full(column.size, None, object)),
    ],
)
def test_faults_of_a_feed_alarm(profile, name, change) -> None:
    """Missing values, a new level, text for numbers, infinities: all are drift of their channel."""
    monitor = Monitor(profile, window_rows=500)
    columns = rows(np.random.default_rng(17), 1000)
    columns[name] = change(columns[name])

    monitor.update(columns)

    assert [alarm.channel for alarm in monitor.alarms] == [name]
