"""The judge of labels: each label once, whoever judges, whoever dies; and what it tells."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.alarms import AlarmLog
from gateway.errors import BadRequestError, NotFoundError
from gateway.labels.judge import Judge
from gateway.labels.labelled import JudgeMeters, Labelled, Settings
from gateway.labels.rows import Bounds, Kept, Label, pack
from gateway.labels.store import Store
from gateway.labels.target import Target
from gateway.telemetry import LABELS_JUDGED, Telemetry
from monitors import Budget
from monitors.loss import LossReference, Outcomes
from monitors.loss_monitor import LossMonitor

DAY_S = 86_400.0
START = 1_700_000_000.0
SETTINGS = Settings(
    alarms=1.0, days=90.0, rows=0.0, share=1.0, tolerance=0.01, mature_s=0.0, adopt_rows=0
)


TARGET = Target("y", task="binary")


class World:
    """A database, a log of alarms and a clock that several judges share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now = START
        self.draw = np.random.default_rng(5)
        self.n = 0
        self.telemetry, self.ids = Telemetry(), itertools.count()
        self.store = Store(f"sqlite:///{directory / 'labels.sqlite3'}")
        p = self.draw.beta(1.5, 3, 4000)
        self.reference = LossReference.fit(Outcomes.binary(p, self.draw.random(4000) < p))

    def log(self) -> AlarmLog:
        return AlarmLog(self.directory / "alarms.jsonl", hold_off_s=DAY_S, clock=lambda: self.now)

    def judge(
        self,
        *,
        own: bool = True,
        is_judge: bool = True,
        target: Target = TARGET,
        **changed: Any,
    ) -> tuple[Judge, Labelled]:
        settings = Settings(**{name: changed.get(name, getattr(SETTINGS, name))
                               for name in Settings.__slots__})  # fmt: skip
        judge = Judge(
            Store(f"sqlite:///{self.directory / 'labels.sqlite3'}"),
            self.log(),
            is_judge=lambda: is_judge,
            spends=lambda *given: given[3](0.2),
            spends_not=lambda *_: None,
            clock=lambda: self.now,
        )
        meters = JudgeMeters(
            *(self.telemetry.counter(LABELS_JUDGED, f"m{next(self.ids)}", "1") for _ in range(3))
        )
        one = Labelled("m", 1, target, settings, meters, self.reference if own else None)
        judge.add(one)
        return judge, one

    def predict(self, n: int, lift: float = 1.0, version: int = 1) -> list[Label]:
        """Predictions of one request, kept; their labels, which nobody has sent yet."""
        p = self.draw.beta(1.5, 3, n)
        truth = self.draw.random(n) < lift * p + (1 - lift) * p.mean()
        self.n += 1
        name = f"r{self.n}"
        self.store.keep([
            Kept(name, k, "m", version, "primary", "champion", self.now + k / n, 1.0, 1.0, None,
                 pack({"y": float(p[k])}), None)
            for k in range(n)
        ])  # fmt: skip
        return [Label(name, k, "m", float(truth[k])) for k in range(n)]

    def send(self, labels: list[Label]) -> None:
        self.store.label(labels, self.now, is_kept=[True] * len(labels))

    def hour(self, n: int = 100, lift: float = 1.0) -> None:
        """Predictions, their labels, and an hour more on the clock."""
        labels = self.predict(n, lift)
        self.now += 60
        self.send(labels)
        self.now += 3540


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.store.close()


def test_each_label_counts_once_whatever_the_order_and_the_number_of_judges(world: World) -> None:
    """Two judges of two processes, labels before and after their predictions, some sent twice."""
    first, one = world.judge()
    second, other = world.judge()
    late = world.predict(50)
    for k in range(8):
        world.hour()
        (first if k % 2 else second).tick()
    world.send(late)
    early = [Label(f"r{world.n + 1}", k, "m", 1.0) for k in range(30)]
    world.send(early)
    world.now += 10
    second.tick()
    first.tick()
    assert other.monitor is not None
    assert other.monitor.n_rows == 850
    world.predict(30)  # what the early labels were waiting for
    world.now += 10
    world.send(late)
    for judge in (first, second, first):
        judge.tick()

    assert one.monitor is not None
    assert one.monitor.n_rows == other.monitor.n_rows == 880
    assert one.meters.judged.value + other.meters.judged.value == 880
    assert one.monitor.evidence == other.monitor.evidence


def test_who_is_slower_writes_nothing_and_begins_again(world: World) -> None:
    """Both have read the same labels; the second finds that they are judged."""
    first, one = world.judge()
    second, other = world.judge()
    for judge in (first, second):
        judge.tick()
    world.hour(300)
    judged = second._judged
    write = judged.write

    def beaten(*given: Any, **more: Any) -> bool:
        judged.write = write  # type: ignore[method-assign]
        first.tick()  # meanwhile
        return write(*given, **more)

    judged.write = beaten  # type: ignore[method-assign]
    second.tick()
    second.tick()

    assert one.monitor is not None
    assert other.monitor is not None
    assert one.monitor.n_rows == other.monitor.n_rows == 300
    assert (one.meters.judged.value, other.meters.judged.value) == (300, 0)


def test_evidence_outlives_its_judge_and_is_that_of_one_who_never_died(world: World) -> None:
    """A new judge for each hour: the evidence of one monitor that was given the same blocks."""
    whole = LossMonitor(world.reference, budget=Budget(days=90).part(0.2))
    for _ in range(12):
        before = world.now
        world.hour(100)
        judge, one = world.judge()
        judge.tick()
        rows = world.store.joined("m", since=before)
        whole.update(
            Outcomes.binary([row.outputs["y"] for row in rows], [row.label for row in rows]),
            at=rows[-1].time,
        )
    assert one.monitor is not None
    assert one.monitor.evidence == whole.evidence
    reader, read = world.judge(is_judge=False)
    reader.tick()
    assert reader.views["m", 1].evidence == whole.evidence
    assert read.meters.judged.value == 0


def fall(world: World, judge: Judge, hours: int = 60) -> None:
    for _ in range(hours):
        world.hour(100, lift=0.0)
        judge.tick()
        if world.log().n_open():
            return
    raise AssertionError("labels lost their cause, and nobody was called")


def test_an_alarm_says_what_fell_and_is_told_once_by_whoever_lives(world: World) -> None:
    """In the log of alarms: model, version, monitor, episode, reason, since; quiet before."""
    judge, _ = world.judge()
    for _ in range(20):
        world.hour()
        judge.tick()
    assert world.log().episodes() == []
    fell = world.now
    fall(world, judge)

    (episode,) = world.log().episodes()
    assert (episode.model, episode.version, episode.episode) == ("m", 1, 1)
    assert episode.monitor.startswith("labels:")
    assert "fell, by labels" in episode.reason
    assert episode.since >= fell - 4 * 3600
    assert episode.details["task"] == "binary"
    for _ in range(3):
        world.now += 1000
        world.judge()[0].tick()
    assert len(world.log().episodes()) == 1


def test_what_a_dead_judge_could_not_tell_is_told_by_the_next(world: World) -> None:
    """It dies between its verdict and the log of alarms."""
    judge, one = world.judge()
    judge._told = lambda *_: None  # type: ignore[method-assign]  # it dies here, each time
    for _ in range(60):
        world.hour(100, lift=0.0)
        judge.tick()
        assert one.monitor is not None
        if any(alarm.level == "page" for alarm in one.monitor.alarms):
            break
    assert world.log().episodes() == []
    world.now += 100
    for _ in range(2):
        world.judge()[0].tick()
    assert len(world.log().episodes()) >= 1
    assert len({e.monitor for e in world.log().episodes()}) == len(world.log().episodes())


def test_an_acknowledged_alarm_is_quiet_and_a_cohort_that_is_accepted_ends_it(
    world: World,
) -> None:
    """Acknowledged at another worker; then what labels say now becomes the reference."""
    judge, one = world.judge()
    fall(world, judge)
    (episode,) = world.log().episodes()
    world.log().acknowledge(episode.id, "ada")
    judge.tick()
    assert one.monitor is not None
    assert all(a.acknowledged_row is not None for a in one.monitor.alarms if a.level == "page")

    for _ in range(10):
        world.hour(100, lift=0.0)
    answer = judge._accept("m", 1, 30.0, "ada")
    assert answer["reference"]["rows"] >= 1000
    assert {e.state for e in world.log().episodes()} == {"accepted"}
    for _ in range(20):
        world.hour(100, lift=0.0)
        judge.tick()
    other, read = world.judge()
    other.tick()
    assert read.monitor is not None
    assert read.monitor.n_rows == 2000  # those of the reference are none of the evidence
    assert not [alarm for alarm in read.monitor.alarms if alarm.level == "page"]
    assert other.views["m", 1].about["reference"]["source"] == "accepted"


def test_without_a_reference_labels_wait_and_the_first_cohort_may_become_it(world: World) -> None:
    """Asked for by a setting: the first 400, in the order of the predictions; the others count."""
    plain, _ = world.judge(own=False)
    world.hour(300)
    plain.tick()
    about = plain.views["m", 1].about
    assert about["reference"] is None
    assert "driftgate labels accept m" in about["message"]
    with pytest.raises(BadRequestError, match="no prediction has a label"):
        world.judge(own=False)[0]._accept("m", 1, 1e-9, "")

    adopting, one = world.judge(own=False, adopt_rows=400)
    adopting.tick()
    assert one.monitor is None
    world.hour(300)
    adopting.tick()
    assert one.monitor is not None
    assert (one.monitor.reference.n_rows, one.monitor.n_rows) == (400, 200)
    with pytest.raises(NotFoundError):
        adopting._accept("m", 2, 30, "")


def test_predictions_are_judged_when_they_are_old_enough(world: World) -> None:
    """Labels that come at once wait for the cohort to be whole."""
    judge, one = world.judge(mature_s=7200.0)
    world.hour()
    judge.tick()
    assert one.monitor is not None
    assert one.monitor.n_rows == 0
    world.now += 7200
    judge.tick()
    assert one.monitor.n_rows == 100


def test_labels_that_say_something_else_than_the_task_are_passed_over(world: World) -> None:
    """A text, and a 7 of a binary task: not judged, and not looked at again and again."""
    judge, one = world.judge()
    labels = world.predict(4)
    values = ["x", 7.0, 1.0, 0.0]
    world.send([label._replace(value=value) for label, value in zip(labels, values, strict=True)])
    world.now += 10
    for _ in range(2):
        judge.tick()
    assert one.monitor is not None
    assert one.monitor.n_rows == 2
    assert judge._judged.unjudged_models() == []


def test_names_of_classes_count_as_declared(world: World) -> None:
    """Labels by name: which of them is class 1 is declared."""
    target = Target("y", task="binary", takes_text=True, positive="late", is_named=True)
    judge, one = world.judge(target=target)
    labels = world.predict(300)
    world.send([
        label._replace(value="late" if label.value else "punctual") for label in labels
    ])  # fmt: skip
    world.now += 10
    judge.tick()
    assert one.monitor is not None
    assert one.monitor.n_rows == 300
    assert one.monitor.loss_late == pytest.approx(world.reference.loss_mean, abs=0.1)


def test_tables_of_format_1_become_those_of_today(world: World, tmp_path: Path) -> None:
    """What was kept before is there, and its labels are judged."""
    import sqlalchemy as sa

    url = f"sqlite:///{tmp_path / 'labels.sqlite3'}"
    world.hour(120)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in (
            "DROP INDEX driftgate_labels_unjudged",
            "ALTER TABLE driftgate_labels DROP COLUMN judged",
            "DROP TABLE driftgate_evidence",
            "UPDATE driftgate_about SET value = 1",
        ):
            connection.exec_driver_sql(statement)
    engine.dispose()

    judge, one = world.judge()
    judge.tick()
    assert one.monitor is not None
    assert one.monitor.n_rows == 120
    assert Store(url).forget(Bounds(30, 1 << 30, 60), world.now) == 0


@pytest.mark.parametrize("ends", ["write", "unjudged"])
def test_a_database_that_says_no_loses_no_label(
    world: World, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass fails as a whole; the next one that works judges each label once."""
    from gateway.labels.rows import StoreError

    judge, one = world.judge()
    judge.tick()
    world.hour()

    def fails(*_: Any, **__: Any) -> Callable[..., Any]:
        raise StoreError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(judge._judged, ends, fails)
        with pytest.raises(StoreError):
            judge.tick()
    judge.tick()
    assert one.monitor is not None
    assert one.monitor.n_rows == 100
