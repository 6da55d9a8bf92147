"""The observer's watches, without their thread."""

from pathlib import Path

import numpy as np
import pytest

from gateway.counters import Region
from gateway.observer import Watch, WatchMeters
from gateway.tap import Observation
from registry.signature import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 1)),))


def watch(references: Path | None = None) -> Watch:
    region = Region()
    meters = WatchMeters(*(region.counter() for _ in range(4)))
    return Watch("m", 1, SIGNATURE, window_rows=100, meters=meters, references=references)


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
