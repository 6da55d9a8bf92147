"""The observer's watches, without their thread."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gateway.conclusions import Shared
from gateway.config import MonitorConfig
from gateway.counters import HostCounts, Region, directory, file_of
from gateway.tap import Observation
from gateway.telemetry import TAP_DROPPED, series_name
from gateway.watch import Watch, WatchMeters
from monitors import Profile
from registry.signature import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 1)),))


CONFIG = MonitorConfig(window_rows=100, budget_rows=500_000)


def watch(
    references: Path | None = None, shared: Shared | None = None, region: Region | None = None
) -> Watch:
    region = region or Region()
    meters = WatchMeters(*(region.counter() for _ in range(5)))
    return Watch(
        "m", 1, SIGNATURE, config=CONFIG, meters=meters, references=references, shared=shared
    )


def observations(rows: np.ndarray, size: int) -> list[Observation]:
    """The rows as requests of `size` rows each."""
    return [
        Observation("m", 1, [part], [part[:, :1]], len(part), part.nbytes)
        for part in (rows[start : start + size] for start in range(0, len(rows), size))
    ]


@pytest.mark.parametrize("n_at_once", [1, 2, 5, 50])
def test_rows_beyond_an_adoption_are_judged_however_slices_fall(n_at_once: int) -> None:
    """The first 150 rows become the reference; each row after them is counted once, in order."""
    rows = np.random.default_rng(3).normal(size=(500, 2)).astype(np.float32)
    rows[150:] += 100
    seen = watch()
    seen.adopt(150)

    requests = observations(rows, 40)
    for start in range(0, len(requests), n_at_once):
        seen.count(requests[start : start + n_at_once])

    assert seen.monitor is not None
    assert seen.monitor.profile.n_rows == 150
    assert seen.meters.observed.value == 350
    seen.catch_up()
    report = seen.monitor.report("total")
    assert report.n_rows == 350
    above = report.channels[0].bins.index(
        next(label for label in report.channels[0].bins if label.startswith("above"))
    )
    assert report.channels[0].current[above] == 1.0


def test_columns_are_watched_by_name_and_position() -> None:
    """Channel j of a matrix holds its column j, for rows of many requests and of one."""
    rows = np.arange(600, dtype=np.float32).reshape(300, 2)
    seen = watch()
    seen.adopt(300)
    seen.count(observations(rows, 7))

    assert seen.monitor is not None
    channels = seen.monitor.profile.channels
    assert list(channels) == ["input:x[0]", "input:x[1]", "output:y"]
    monitor = seen.monitor
    monitor.update({"input:x[1]": rows[:, 1]})
    monitor.flush()
    assert monitor.report("total").channels[1].scores["psi"].value == 0


def test_batches_without_rows_are_nothing_to_watch() -> None:
    """An empty batch is a legal request, and may be all that a slice holds."""
    rows = np.arange(200, dtype=np.float32).reshape(100, 2)
    empty = Observation("m", 1, [rows[:0]], [rows[:0, :1]], 0, 0)
    seen = watch()
    seen.count([empty])
    seen.adopt(100)
    seen.count([empty, *observations(rows, 10), empty])
    seen.count([empty, empty])

    assert seen.monitor is not None
    assert seen.monitor.profile.n_rows == 100
    assert seen.meters.observed.value == 0


def test_classes_are_watched_also_when_a_reference_is_adopted() -> None:
    """They are judged like any column; a profile without them is read, and asks for nothing."""
    signature = Signature(
        (TensorSpec("x", "FP32", (-1, 3)),),
        (TensorSpec("p", "FP32", (-1, 3)), TensorSpec("y", "FP32", (-1, 3))),
    )
    exps = np.exp(np.random.default_rng(3).normal(size=(900, 3))).astype(np.float32)
    p = exps / exps.sum(axis=1, keepdims=True)
    requests = [
        Observation("m", 1, [part], [part, part * 3], 30, 0)
        for part in (p[start : start + 30] for start in range(0, 900, 30))
    ]
    meters = WatchMeters(*(Region().counter() for _ in range(5)))
    seen = Watch("m", 1, signature, config=CONFIG, meters=meters, references=None)
    seen.adopt(600)
    for start in range(0, 30, 7):
        seen.count(requests[start : start + 7])

    found = seen.report("total")["report"]["channels"]
    made = {channel["name"]: channel for channel in found if "." in channel["name"]}
    assert sorted(made) == ["output:p.class", "output:p.confidence"]
    of_class = made["output:p.class"]
    assert of_class["n_rows"] == 300
    share = dict(zip(of_class["bins"], of_class["current"], strict=True))
    assert share["1"] == pytest.approx((p[600:].argmax(axis=1) == 1).mean())

    assert seen.monitor is not None
    plain = [name for name in seen.monitor.profile.channels if "." not in name]
    seen.judge_by(seen.monitor.profile.select(plain), "reference.json")
    assert seen.problems == []


def test_what_is_not_judged_is_said_for_the_whole_host(tmp_path: Path) -> None:
    """Rows that any worker's tap dropped, rows that nobody judges, no reference, a sample."""
    name = series_name(TAP_DROPPED, ("m", "1"))
    workers = [Worker(tmp_path, slot, profile(), is_holder=False) for slot in "01"]
    for slot, worker, n in zip("01", workers, (3, 4), strict=True):
        worker.watch.meters.dropped = Region(file_of(tmp_path, slot, "loop")).counter(name)
        worker.watch.meters.dropped.add(n)
        worker.count(drawn(50, 3))

    for worker in workers:
        found = worker.watch.report("last")
        assert found["rows_dropped"] == 7
        assert found["coverage"]["share"] == pytest.approx(100 / 107)
        assert found["coverage"]["rows_waiting"] == 100
        assert found["coverage"]["gaps"] == ["7 rows were dropped by full taps, 100 were counted"]
        later = worker.watch.coverage(time.time() + 60)["gaps"]
        assert [gap for gap in later if "100 rows have not been judged" in gap]
    workers[1].shared.is_holder = True
    assert workers[1].watch.report("last")["coverage"]["rows_waiting"] == 0
    assert len(workers[1].watch.coverage(time.time() + 60)["gaps"]) == 1

    alone = watch()
    assert "no reference" in alone.report("last")["coverage"]["gaps"][0]
    alone.config = replace(CONFIG, sample=20)
    assert "only 20 % of requests" in str(alone.coverage(0.0)["gaps"])


def drawn(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, size=(n, 2)).astype(np.float32)


def profile() -> Profile:
    rows = drawn(5000, 1)
    return Profile.fit({"input:x[0]": rows[:, 0], "input:x[1]": rows[:, 1], "output:y": rows[:, 0]})


class Worker:
    """A worker's watch on counts that it shares with the host."""

    def __init__(self, run_dir: Path, slot: str, reference: Profile, *, is_holder: bool) -> None:
        region = Region(file_of(run_dir, slot, "observer"))
        host = HostCounts(directory(run_dir))
        self.shared = Shared(run_dir / "monitors", region.array, host.array)
        self.shared.is_holder = is_holder
        self.watch = watch(shared=self.shared)
        self.watch.judge_by(reference, "reference.json")

    def count(self, rows: np.ndarray) -> None:
        self.watch.count(observations(rows, 25))


def test_rows_of_all_workers_are_judged_once_by_the_holder_and_survive_its_death(
    tmp_path: Path,
) -> None:
    """Killed at any moment: the next holder goes on from the file and the counts, exactly.

    What it concludes is what one worker would have from the same blocks, to the last bit.
    """
    reference = profile()
    first = Worker(tmp_path, "0", reference, is_holder=True)
    second = Worker(tmp_path, "1", reference, is_holder=False)
    alone = watch()
    alone.judge_by(reference, "reference.json")
    now = 1_000_000.0
    for k in range(12):
        rows = drawn(100, 10 + k, shift=0.0 if k < 6 else 1.0)
        first.count(rows[:70])
        second.count(rows[70:])
        alone.count(observations(rows, 100))
        if k == 7:
            # The holder dies between judging and its next save: what it judged since is judged
            # again from the counts, by who takes the lease.
            first.watch.save()
            saved = k
            first.shared.is_holder = False
            second.shared.is_holder = True
        holder = first if k < 7 else second
        holder.watch.tick(now + k)
        alone.tick(now + k)

    assert saved == 7
    assert second.watch.monitor is not None
    assert alone.monitor is not None
    assert second.watch.monitor.n_rows == 1200
    assert second.watch.monitor.to_bytes() == alone.monitor.to_bytes()
    assert [alarm.level for alarm in second.watch.monitor.alarms]
    assert second.watch.report("total")["report"]["n_rows"] == 1200
    second.watch.save()
    # The one that does not judge answers from what the holder has written.
    assert first.watch.report("total")["report"] == second.watch.report("total")["report"]


def test_what_was_not_saved_is_judged_again_from_the_counts(tmp_path: Path) -> None:
    """A holder that never saved: the next one has every row all the same."""
    reference = profile()
    first = Worker(tmp_path, "0", reference, is_holder=True)
    first.count(drawn(300, 3, shift=1.0))
    first.watch._kept.saved_at = float("inf")  # It dies before the second is over.
    first.watch.tick(1000.0)
    assert not list((tmp_path / "monitors").glob("*.state"))

    second = Worker(tmp_path, "1", reference, is_holder=True)
    second.watch.tick(1001.0)

    assert second.watch.monitor is not None
    assert second.watch.monitor.n_rows == 300


def test_evidence_outlives_a_restart_of_a_server_alone(tmp_path: Path) -> None:
    """Without shared counts: conclusions are read back, rows counted before are not again."""
    reference = profile()
    for part in range(3):
        shared = Shared(tmp_path)
        shared.is_holder = True
        seen = watch(shared=shared)
        seen.judge_by(reference, "reference.json")
        seen.count(observations(drawn(200, 5 + part), 50))
        seen.catch_up()
        seen.save()

        assert seen.monitor is not None
        assert seen.monitor.n_rows == 200 * (part + 1)


@pytest.mark.parametrize("damage", [b"", b"x" * 10_000])
def test_a_damaged_state_is_left_and_monitoring_begins_anew(tmp_path: Path, damage: bytes) -> None:
    """Half a file, or another one's: said in the log, never an error of the server."""
    shared = Shared(tmp_path)
    shared.is_holder = True
    seen = watch(shared=shared)
    seen.judge_by(profile(), "reference.json")
    assert seen._kept.file is not None
    seen._kept.file.write_bytes(damage)
    seen.count(observations(drawn(60, 5), 50))
    seen.catch_up()

    assert seen.monitor is not None
    assert seen.monitor.n_rows == 60


def test_a_directory_that_cannot_be_written_costs_nothing_but_the_state(tmp_path: Path) -> None:
    """Counted as an error of the observer; reports go on."""
    (tmp_path / "file").write_text("not a directory")
    shared = Shared(tmp_path / "file" / "monitors")
    shared.is_holder = True
    seen = watch(shared=shared)
    seen.judge_by(profile(), "reference.json")
    seen.count(observations(drawn(60, 5), 50))
    seen.catch_up()
    seen.save()

    assert seen.meters.errors.value >= 1
    assert seen.report("total")["report"]["n_rows"] == 60


def test_what_happens_to_alarms_is_told() -> None:
    """Opened, acknowledged: each once, with the name that acknowledges it."""
    seen = watch()
    seen.judge_by(profile(), "reference.json")
    seen.count(observations(drawn(500, 6, shift=2.0), 50))
    seen.catch_up()
    opened = [told for told in seen.told if told.what == "opened"]
    seen.told.clear()
    seen.acknowledge(opened[0].first, before=float("inf"))

    assert {told.id for told in opened} >= {"m-1-1"}
    assert [(told.what, told.id) for told in seen.told] == [
        ("acknowledged", told.id) for told in opened
    ]
    assert seen.meters.pages.value == 1


def test_the_new_normal_is_the_rows_of_a_window(tmp_path: Path) -> None:
    """Accepted, drifted rows are quiet, and the profile is written beside the others."""
    seen = watch(references=tmp_path)
    seen.judge_by(profile(), "reference.json")
    seen.count(observations(drawn(3000, 7, shift=1.0), 50))
    made = seen.accept("total")
    assert seen.monitor is not None
    assert made.n_rows == 3000
    assert Profile.from_json((tmp_path / f"{made.digest}.json").read_bytes()) == made

    seen.count(observations(drawn(1000, 8, shift=1.0), 50))
    seen.catch_up()

    assert seen.monitor.alarms == ()
    assert seen.source == "accepted"
