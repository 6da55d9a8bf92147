"""The whole room: windows, reports, state, merging, and what no block can do to them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors import BlockError, Budget, Monitor, MonitorError, Profile
from monitors.monitor import UNKNOWN_MAX
from monitors.window import WINDOWS

N_CHANNELS = 10
ROWS = Budget(rows=500_000)


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


def states(monitor) -> bytes:
    """Everything it knows, for comparison to the last bit."""
    return monitor.to_bytes()


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_two_workers_merged_are_one_to_the_last_bit(profile, data) -> None:
    """Rows of each block shared out among workers in any way, counts added in any order."""
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    whole, merged = Monitor(profile, budget=ROWS), Monitor(profile, budget=ROWS)
    workers = [Monitor(profile, budget=ROWS) for _ in range(3)]
    for _ in range(4):
        columns = rows(random, 200, shift=0.4)
        whole.fold(whole.count(columns)[1], 200)
        owner = random.integers(0, 3, 200)
        parts = [
            worker.count({name: column[owner == k] for name, column in columns.items()})
            for k, worker in enumerate(workers)
        ]
        random.shuffle(parts)
        merged.fold(sum(counts for _, counts in parts), sum(n for n, _ in parts))

    assert states(merged) == states(whole)
    assert merged.evidence == whole.evidence


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 700), max_size=8))
def test_counts_add_up_exactly_however_rows_are_cut(cuts) -> None:
    """One block of 700 rows, or any way of cutting it, gives the same counts and scores."""
    random = np.random.default_rng(3)
    columns = {"x": random.normal(size=700), "s": random.choice(["a", "b"], 700)}
    profile = Profile.fit(columns)
    whole, parts = Monitor(profile, budget=ROWS), Monitor(profile, budget=ROWS)
    whole.update(columns)
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 700], strict=True):
        parts.update(cut(columns, start, stop))
    whole.flush()
    parts.flush()

    assert parts.counts == whole.counts
    for one, other in zip(
        parts.report("total").channels, whole.report("total").channels, strict=True
    ):
        assert (one.scores, one.current) == (other.scores, other.current)


def test_state_survives_a_restart_to_the_last_bit(profile) -> None:
    """Bytes to a new monitor: it goes on as the old one would have, alarms and all."""
    random = np.random.default_rng(4)
    before = Monitor(profile, budget=Budget(days=90))
    for k in range(30):
        before.update(rows(random, 101, shift=0.5), at=1000.0 + k)
    assert before.alarms
    after = Monitor(profile, budget=Budget(days=90))
    after.restore(before.to_bytes())
    assert states(after) == states(before)
    assert after.alarms == before.alarms
    more = [rows(random, 75) for _ in range(20)]
    for k, block in enumerate(more):
        before.update(block, at=1100.0 + k)
        after.update(block, at=1100.0 + k)

    assert states(after) == states(before)


@pytest.mark.parametrize("damage", [b"", b"nothing", None])
def test_a_state_that_is_damaged_or_of_another_profile_is_refused(profile, damage) -> None:
    """And what was there before stays."""
    monitor = Monitor(profile, budget=ROWS)
    other = Monitor(Profile.fit({"x0": np.arange(100.0)}), budget=ROWS)
    state = other.to_bytes() if damage is None else damage
    with pytest.raises(MonitorError, match="state of a monitor"):
        monitor.restore(state)
    with pytest.raises(MonitorError, match="state of a monitor"):
        monitor.restore(monitor.to_bytes()[:-40])
    assert monitor.n_rows == 0


def test_unknown_columns_are_listed_and_lacking_ones_are_not_counted(profile) -> None:
    """Neither raises; a channel counts only the rows that had it."""
    monitor = Monitor(profile, budget=ROWS)

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
    monitor = Monitor(profile, budget=ROWS)

    for number in range(1000):
        monitor.update({f"made up {number}": [1]})

    assert len(monitor.unknown) == UNKNOWN_MAX
    assert monitor.counts.n_rows == 0


def test_columns_of_unequal_length_are_refused_before_counting(profile) -> None:
    """Half a block would be worse than none."""
    monitor = Monitor(profile, budget=ROWS)

    with pytest.raises(BlockError, match="'x1' has 3 rows, column 'x0' has 2"):
        monitor.update({"x0": [1.0, 2.0], "x1": [1.0, 2.0, 3.0]})
    assert monitor.counts.n_rows == 0


def test_a_budget_in_days_asks_for_the_time(profile) -> None:
    """Without it nothing would ever be spent, and no alarm ever raised."""
    with pytest.raises(BlockError, match="at="):
        Monitor(profile).update({"x0": [1.0]})


@pytest.mark.parametrize(("name", "value"), [("window_rows", 0), ("tolerance", -1.0)])
def test_settings_without_meaning_are_refused(profile, name, value) -> None:
    """By name."""
    with pytest.raises(MonitorError, match=name):
        Monitor(profile, budget=ROWS, **{name: value})


def test_an_unknown_window_is_refused(profile) -> None:
    """The error lists those that there are."""
    with pytest.raises(MonitorError, match="last, 1h, 24h, decayed, total"):
        Monitor(profile, budget=ROWS).report("2h")


def test_windows_hold_the_newest_rows_the_hour_the_day_and_all(profile) -> None:
    """Slots of absolute time; "last" is the newest whole blocks with at least so many rows."""
    monitor = Monitor(profile, budget=Budget(days=90), window_rows=500)
    random = np.random.default_rng(5)
    assert monitor.report("last").is_partial
    start = 1_000_000 * 3600.0
    for minute in range(26 * 60):
        monitor.update(rows(random, 50), at=start + 60 * minute + 1)
    monitor.flush()
    found = {name: monitor.report(name) for name in WINDOWS}

    assert {name: report.n_rows for name, report in found.items() if name != "decayed"} == {
        "last": 500,
        "1h": 60 * 50,
        "24h": 24 * 60 * 50,
        "total": 26 * 60 * 50,
    }
    assert found["1h"].since == start + 25 * 3600
    assert found["1h"].until == start + 26 * 3600 - 60 + 1
    assert not any(report.is_partial for report in found.values())
    # 500 rows of half-life weigh as an even window of about 2 * 500 / ln 2 rows.
    assert found["decayed"].n_rows == pytest.approx(2 * 500 / math.log(2), rel=0.05)
    for report in found.values():
        assert [channel.n_rows for channel in report.channels] == pytest.approx(
            [report.n_rows] * N_CHANNELS, abs=10
        )


def test_scores_are_those_of_the_kind(profile) -> None:
    """Orders have a cumulative distance, numbers a scale, names unseen levels."""
    monitor = Monitor(profile, budget=ROWS)
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
    monitor = Monitor(profile, budget=ROWS)
    monitor.update(rows(np.random.default_rng(6), 900, shift=0.5))
    score = monitor.report().channels[0].scores["wasserstein"]

    assert score.value == pytest.approx(0.5, abs=0.12)
    assert score.is_above


def test_scores_among_values_ignore_a_change_of_what_is_missing() -> None:
    """Nine tenths missing is news for the rate and psi, not for the order of the rest."""
    random = np.random.default_rng(8)
    monitor = Monitor(Profile.fit({"x": random.normal(size=20_000)}), budget=ROWS)
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
    for known in (profile, constant):
        monitor = Monitor(known, budget=ROWS)
        for window in WINDOWS:
            text = json.dumps(monitor.report(window).to_dict(), allow_nan=False)
        monitor.update({"x0": np.full(60, 99.0), "c": np.full(60, 2.0)})
        for window in WINDOWS:
            text = json.dumps(monitor.report(window).to_dict(), allow_nan=False)
            assert json.loads(text)["window"] == window


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
def test_faults_of_a_feed_alarm_at_once(profile, name, change) -> None:
    """Missing values, a new level, text for numbers, infinities: found within 100 rows."""
    monitor = Monitor(profile, budget=ROWS)
    columns = rows(np.random.default_rng(17), 100)
    columns[name] = change(columns[name])

    monitor.update(columns)

    assert name in {alarm.feature for alarm in monitor.alarms}


def test_a_drift_of_one_segment_is_seen_in_it() -> None:
    """A tenth of the rows shifts: its own channels say so, under the same budget."""
    random = np.random.default_rng(18)

    def drawn(n, shift):
        where = random.choice(["at", "de", "ch"], n, p=[0.5, 0.4, 0.1])
        return {"x": random.normal(size=n) + shift * (where == "ch"), "where": where}

    profile = Profile.from_json(Profile.fit(drawn(20_000, 0), segments="where").to_json())
    monitor = Monitor(profile, budget=ROWS)
    for _ in range(100):
        monitor.update(drawn(500, 0))
    assert monitor.episodes == ()
    for _ in range(8):
        monitor.update(drawn(500, 1.0))

    assert "ch" in {alarm.segment for alarm in monitor.alarms}
    assert {alarm.feature for alarm in monitor.alarms if alarm.segment} == {"x"}
    assert {alarm.segment for alarm in monitor.alarms} <= {None, "ch"}


def test_another_versions_rows_can_be_the_reference(profile) -> None:
    """Canary against champion: the champion's counts, the same bins; equal traffic is quiet."""
    random = np.random.default_rng(19)
    champion = Monitor(profile, budget=ROWS)
    champion.update(rows(random, 20_000, shift=0.5))
    second = champion.rebased("total", {"origin": "champion"})
    canary = Monitor(second, budget=ROWS)
    for _ in range(10):
        canary.update(rows(random, 2000, shift=0.5))

    assert second.n_rows == 20_000
    assert champion.alarms
    assert canary.episodes == ()
    assert canary.report("total").channels[0].scores["psi"].value < 0.01
    assert Profile.from_json(second.to_json()) == second


@pytest.mark.parametrize(
    "columns",
    [
        {"x": np.full(10, 3.0)},
        {"x": np.full(50, np.nan)},
        {"x": np.array([np.inf, -np.inf, 0.0, 1.0] * 5)},
        {"x": np.arange(10.0), "y": np.arange(10.0), "z": np.repeat([1, 2], 5)},
        {"x": np.array([1.0])},
    ],
)
def test_poor_references_can_be_watched_and_their_own_rows_are_quiet(columns) -> None:
    """Constants, holes, infinities, ties, ten rows or one: no alarm on more of the same."""
    profile = Profile.from_json(Profile.fit(columns).to_json())
    monitor = Monitor(profile, budget=ROWS)
    random = np.random.default_rng(20)
    n = profile.n_rows
    for _ in range(200):
        chosen = random.integers(0, n, 50)
        monitor.update({name: column[chosen] for name, column in columns.items()})

    assert [alarm for alarm in monitor.episodes if alarm.level == "page"] == []
    json.dumps(monitor.report().to_dict(), allow_nan=False)


def test_a_constant_that_changes_is_found_in_few_rows() -> None:
    """It has one bin: any other value is a fault."""
    monitor = Monitor(Profile.fit({"x": np.full(5000, 3.0)}), budget=ROWS)
    monitor.update({"x": np.full(1000, 3.0)})
    monitor.update({"x": np.full(50, 4.0)})

    assert [alarm.channel for alarm in monitor.alarms] == ["x"]


def test_a_million_ids_make_a_small_profile_and_no_alarm() -> None:
    """Names that are new in every row are what such a column always holds."""
    ids = np.array([f"{k:06d}" for k in range(1_000_000)], object)
    profile = Profile.fit({"id": ids[:200_000]})
    monitor = Monitor(profile, budget=ROWS)
    for start in range(200_000, 260_000, 2000):
        monitor.update({"id": ids[start : start + 2000]})

    assert len(profile.to_json()) < 1_000_000
    assert monitor.episodes == ()
