"""Between answers and files: nothing waits, and nothing is lost uncounted."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.capture.log import CaptureLog, CaptureMeters
from gateway.capture.reading import Reading, find
from gateway.capture.record import Record
from gateway.capture.shelf import Shelf, files
from gateway.counters import Region
from tests.gateway.capture.records import record, shelf
from tests.serving import wait_until


class Request:
    """One request to capture."""

    model = "m"

    def __init__(self, k: int, n_bytes: int = 100) -> None:
        self.k = k
        self.n_bytes = n_bytes

    def record(self) -> Record:
        if self.k < 0:
            raise ValueError("a request that nobody thought of")
        return record(self.k, n_bytes=self.n_bytes)


@contextlib.contextmanager
def log_of(hand: Shelf, **how: Any) -> Iterator[tuple[CaptureLog, CaptureMeters]]:
    """A log, and what it counts."""
    region = Region()
    meters = CaptureMeters(*(region.counter() for _ in range(4)))
    made = CaptureLog(
        hand, lambda _: meters, **{"queue_bytes_max": 10_000, "record_bytes_max": 60_000, **how}
    )
    try:
        yield made, meters
    finally:
        made.stop()


def test_what_is_handed_over_is_on_disk_after_the_end(tmp_path: Path) -> None:
    """In order; the thread starts with the first request."""
    with log_of(shelf(tmp_path)) as (log, meters):
        assert "capture" not in {thread.name for thread in threading.enumerate()}
        for k in range(50):
            log.offer(Request(k))
    assert [each.id for each in find("all", tmp_path, "m")] == [f"r-{k}" for k in range(50)]
    assert meters.written.value == 50


def test_a_full_buffer_drops_and_counts_and_waits_for_nobody(tmp_path: Path) -> None:
    """While the disk does not answer, the buffer is all there is."""
    held, go_on = threading.Event(), threading.Event()

    class Stuck(Shelf):
        def write(self, model: str, data: bytes) -> None:
            held.set()
            assert go_on.wait(20)
            super().write(model, data)

    hand = Stuck(tmp_path, "0", bytes_max=1 << 20, segment_bytes_max=1 << 16, days=7)
    with log_of(hand) as (log, meters):
        log.offer(Request(0))
        assert held.wait(20)
        for k in range(1, 251):
            log.offer(Request(k))
        assert meters.full.value == 150  # 100 of them are 10 000 bytes
        go_on.set()
        wait_until(lambda: meters.written.value == 101, "what was in the buffer is written")
        log.offer(Request(251))
    assert [each.id for each in find("all", tmp_path, "m")][-1] == "r-251"


def test_a_disk_that_cannot_be_written_costs_what_came_then(tmp_path: Path) -> None:
    """Said while it lasts, counted, and over by itself."""
    directory = tmp_path / "captures"
    directory.write_text("a file where the directory should be")
    with log_of(shelf(directory)) as (log, meters):
        for k in range(3):
            log.offer(Request(k))
        wait_until(lambda: meters.unwritten.value == 3, "they are counted")
        assert log.problem
        directory.unlink()
        log.offer(Request(3))
        wait_until(lambda: meters.written.value == 1, "it goes on")
        assert log.problem is None
    assert [each.id for each in find("all", directory, "m")] == ["r-3"]


def test_a_disk_that_is_full_heals_by_itself(tmp_path: Path) -> None:
    """On a file system of half a MiB that somebody else has filled: whole records all the time."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    try:
        done = subprocess.run(mount, check=False, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount on this machine")
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        other = tmp_path / "other"
        other.write_bytes(bytes(400_000))
        hand = shelf(tmp_path / "captures", bytes_max=1 << 20)
        with log_of(hand, queue_bytes_max=1 << 20) as (log, meters):
            for k in range(30):
                log.offer(Request(k, 10_000))
            wait_until(lambda: meters.unwritten.value, "the disk is full")
            assert log.problem == "No space left on device"
            n_kept = len(list(Reading(files(tmp_path / "captures"))))
            assert n_kept == meters.written.value
            other.unlink()
            log.offer(Request(99, 10_000))
            wait_until(lambda: log.problem is None, "it goes on")
        reading = find("all", tmp_path / "captures", "m")
        assert [each.id for each in reading][-1] == "r-99"
        assert reading.said() == ""
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_requests_that_do_not_fit_are_counted_and_hurt_no_other(tmp_path: Path) -> None:
    """One larger than a file may be; one that cannot be put into a record."""
    with log_of(shelf(tmp_path), queue_bytes_max=1 << 20) as (log, meters):
        for each in (Request(0), Request(1, 70_000), Request(-1), Request(2)):
            log.offer(each)
    assert [each.id for each in find("all", tmp_path, "m")] == ["r-0", "r-2"]
    assert (meters.large.value, meters.unwritten.value, meters.written.value) == (1, 1, 2)


def test_portions_never_outgrow_a_file(tmp_path: Path) -> None:
    """Many small requests at once go into several files, each within its bound."""
    with log_of(shelf(tmp_path, bytes_max=1 << 20), queue_bytes_max=1 << 22) as (log, meters):
        for k in range(150):
            log.offer(Request(k, 3000))
    assert meters.written.value == 150
    assert [each.id for each in find("all", tmp_path, "m")] == [f"r-{k}" for k in range(150)]
    assert max(path.stat().st_size for path in (tmp_path / "m").iterdir()) <= 64 * 1024
