"""Episodes: one for each thing that goes wrong, whatever happens to the file."""

import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.alarms.log import AlarmLog, Crossing, Event, identity


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "alarms.jsonl"


@pytest.fixture
def log(file: Path, clock: Clock) -> AlarmLog:
    return AlarmLog(file, hold_off_s=100, clock=clock)


def crossing(monitor: str = "drift:input:x", version: int = 7) -> Crossing:
    return Crossing("fraud", version, monitor, "PSI 0.4", 900.0, {"score": 0.4})


def test_while_an_episode_is_open_nothing_new_is_told(log: AlarmLog) -> None:
    """Whoever was told once is not told again, however often the line is crossed."""
    heard: list[Event] = []
    log.listeners.append(lambda happened, _: heard.append(happened))

    first = log.crossed(crossing())
    assert first is not None
    assert [log.crossed(crossing()) for _ in range(50)] == [None] * 50

    assert [happened.event for happened in heard] == ["opened"]
    assert (first.id, first.state, first.reason) == (first.id, "open", "PSI 0.4")
    assert first.id in first.runbook
    assert log.n_open() == 1


def test_what_passes_and_comes_back_within_the_hold_off_is_the_same_story(
    log: AlarmLog, clock: Clock
) -> None:
    """A score that wavers around its line is one alarm; after the hold-off it is another."""
    log.crossed(crossing())
    for _ in range(5):
        clock.now += 10
        log.passed("fraud", 7, "drift:input:x")
        assert log.crossed(crossing()) is None
    clock.now += 101

    second = log.crossed(crossing())

    assert second is not None
    assert second.episode == 2


def test_an_acknowledged_alarm_holds_off_and_then_may_open_again(
    log: AlarmLog, clock: Clock
) -> None:
    """Seen is not cured."""
    first = log.crossed(crossing())
    assert first is not None
    seen = log.acknowledge(first.id, "ada", "retraining")
    assert (seen.state, seen.by, seen.note) == ("acknowledged", "ada", "retraining")
    assert log.crossed(crossing()) is None
    clock.now += 101
    assert log.crossed(crossing()) is not None
    with pytest.raises(KeyError):
        log.acknowledge("fraud-7-nothing-00000000-1")


def test_a_new_normal_ends_every_episode_of_the_version(log: AlarmLog) -> None:
    """Judged by a new profile, a crossing is a new story at once; other versions go on."""
    log.crossed(crossing("drift:a"))
    log.crossed(crossing("drift:b"))
    log.crossed(crossing("drift:a", version=8))

    accepted = log.accept("fraud", 7, "ada")

    assert sorted(episode.monitor for episode in accepted) == ["drift:a", "drift:b"]
    assert log.n_open() == 1
    again = log.crossed(crossing("drift:a"))
    assert again is not None
    assert again.episode == 2


def test_episodes_outlive_the_process_and_are_shared_by_all(
    log: AlarmLog, file: Path, clock: Clock
) -> None:
    """Another process sees what was opened, and its acknowledgement is seen here."""
    first = log.crossed(crossing())
    assert first is not None
    other = AlarmLog(file, hold_off_s=100, clock=clock)

    assert other.crossed(crossing()) is None
    other.acknowledge(first.id, "eve")

    assert [(e.id, e.state, e.by) for e in log.episodes()] == [(first.id, "acknowledged", "eve")]
    log.told(first.id, "retrain", is_dead=False)
    assert other.episodes()[0].delivered == ["retrain"]


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 400))
def test_a_torn_line_loses_itself_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """Cut anywhere, as by a crash: what is whole counts, what comes later is read."""
    file = tmp_path_factory.mktemp("torn") / "alarms.jsonl"
    log = AlarmLog(file, hold_off_s=0)
    log.crossed(crossing("drift:a"))
    log.crossed(crossing("drift:b"))
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    n_whole = whole[:cut].count(b"\n")

    after = AlarmLog(file, hold_off_s=0)
    assert len(after.episodes()) == n_whole
    after.crossed(crossing("drift:c"))
    later = AlarmLog(file, hold_off_s=0)

    monitors = {episode.monitor for episode in later.episodes()}
    assert "drift:c" in monitors
    assert len(monitors) >= n_whole + 1


def test_lines_of_strangers_are_passed_over(log: AlarmLog, file: Path) -> None:
    """Neither a newer release nor a slip of an editor takes the alarms away."""
    log.crossed(crossing())
    with file.open("ab") as handle:
        handle.write(b'not json\n[]\n{"event": "exploded", "id": "x", "time": 1}\n\xff\n\n')

    assert len(AlarmLog(file, hold_off_s=0).episodes()) == 1


def test_when_the_disk_is_full_the_alarm_counts_all_the_same(log: AlarmLog, file: Path) -> None:
    """It is told and listed; that it is not on disk is said."""
    log.crossed(crossing("drift:a"))
    heard: list[Event] = []
    log.listeners.append(lambda happened, _: heard.append(happened))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, hard))
    try:
        assert log.crossed(crossing("drift:b")) is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert log.problem is not None
    assert [happened.monitor for happened in heard] == ["drift:b"]
    assert log.n_open() == 2
    log.crossed(crossing("drift:c"))
    assert log.problem is None
    assert {e.monitor for e in AlarmLog(file, hold_off_s=0).episodes()} == {"drift:a", "drift:c"}


def test_a_reason_without_end_is_cut(log: AlarmLog, file: Path) -> None:
    """Names come from clients; a line stays short."""
    log.crossed(crossing()._replace(reason="x" * 100_000, details={"y": "z" * 100_000}))

    assert file.stat().st_size < 16 * 1024


@settings(max_examples=50)
@given(st.text(max_size=100), st.text(max_size=100))
def test_ids_are_safe_for_schedulers_and_differ_with_the_monitor(one: str, other: str) -> None:
    """Letters, digits, dot, dash, underscore, as Airflow asks; one monitor one id."""
    made = identity("fraud", 7, one, 1)

    assert set(made) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert len(made) < 250
    assert (made == identity("fraud", 7, other, 1)) is (one == other)
