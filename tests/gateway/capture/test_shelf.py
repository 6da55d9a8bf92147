"""Files of captures: bounded together, whole or not at all, whoever dies."""

import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gateway.capture.reading import Reading, find
from gateway.capture.shelf import files
from gateway.errors import NotFoundError
from tests.gateway.capture.records import frames, record, shelf


def on_disk(directory: Path) -> int:
    """Bytes of all captures."""
    return sum(path.stat().st_size for path in files(directory))


def test_bytes_stay_within_the_bound_whoever_writes(tmp_path: Path) -> None:
    """Three workers and two models: never more than the bound; what is left is the newest."""
    removed: list[int] = []
    clock = [1000.0]
    hands = [
        shelf(tmp_path, str(k), on_removed=removed.append, now=lambda: clock[0]) for k in range(3)
    ]
    for k in range(300):
        clock[0] += 0.5
        model = "mn"[k % 2]
        hands[k % 3].write(model, frames(record(k, n_bytes=4000, model=model)))
        assert on_disk(tmp_path) <= 256 * 1024

    kept = sorted(int(each.id[2:]) for each in find("all", tmp_path, None))
    assert sum(removed) > 256 * 1024
    assert kept[-1] == 299
    assert on_disk(tmp_path) > (256 - 2 * 64) * 1024  # no more went than had to
    assert len(kept) == len(set(kept)) > 30
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files(tmp_path))
    assert all(path.stat().st_size <= 64 * 1024 for path in files(tmp_path))
    assert hands[0].n_bytes <= 256 * 1024


def test_many_models_share_few_files(tmp_path: Path) -> None:
    """A hundred models in turn: each goes on in the file that it has."""
    hand = shelf(tmp_path, bytes_max=1 << 20)
    for k in range(300):
        model = f"m{k % 100}"
        hand.write(model, frames(record(k, model=model)))
    assert len(files(tmp_path)) == 100
    assert len(list(find("all", tmp_path, None))) == 300


def test_what_is_too_old_goes_without_a_write(tmp_path: Path) -> None:
    """Retention is by the time of the last addition; a file of our own is closed as well."""
    clock = [1000.0]
    hand = shelf(tmp_path, days=1.0, now=lambda: clock[0])
    hand.write("m", frames(record(1)))
    (file,) = files(tmp_path)
    os.utime(file, (1000, 1000))
    clock[0] += 86_000
    hand.sweep()
    assert files(tmp_path) == [file]

    clock[0] += 1000
    hand.sweep()
    assert files(tmp_path) == []
    assert hand.n_bytes == 0

    hand.write("m", frames(record(2)))
    assert [each.id for each in find("all", tmp_path, "m")] == ["r-2"]


def test_a_file_that_was_removed_is_not_written_to(tmp_path: Path) -> None:
    """By another worker, or by hand: the next records go into a new one."""
    hand = shelf(tmp_path)
    hand.write("m", frames(record(1)))
    (file,) = files(tmp_path)
    file.unlink()
    hand.write("m", frames(record(2)))

    assert [each.id for each in find("all", tmp_path, "m")] == ["r-2"]


def test_a_write_that_fails_half_way_leaves_whole_records(tmp_path: Path) -> None:
    """The system takes part of a write and refuses the rest, as on a full disk; then it heals."""
    hand = shelf(tmp_path)
    hand.write("m", frames(record(1)))
    (file,) = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 50, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            hand.write("m", frames(record(2, n_bytes=5000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reading = Reading(files(tmp_path))
    assert [each.id for each in reading] == ["r-1"]
    assert reading.said() == ""

    hand.write("m", frames(record(3)))
    assert [each.id for each in find("all", tmp_path, "m")] == ["r-1", "r-3"]


def test_a_writer_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    """kill -9 while it writes: whole records in order, at most one torn; another goes on."""
    script = textwrap.dedent(f"""
        from pathlib import Path
        from tests.gateway.capture.records import frames, record, shelf
        hand, k = shelf(Path({str(tmp_path)!r}), bytes_max=1 << 30, segment_bytes_max=1 << 22), 0
        while True:
            hand.write("m", frames(record(k, n_bytes=30_000), record(k + 1, n_bytes=30_000)))
            k += 2
            print(k, flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(40)][-1]
        writer.send_signal(signal.SIGKILL)
        told = max([told, *map(int, writer.stdout.read().split())])

    reading = find("all", tmp_path, "m")
    found = [int(each.id[2:]) for each in reading]

    assert found == list(range(len(found)))
    assert len(found) >= told
    assert reading.torn <= 1
    assert reading.skipped == 0
    shelf(tmp_path, bytes_max=1 << 30).write("m", frames(record(9999)))
    assert [each.id for each in find("all", tmp_path, "m")][-1] == "r-9999"


def test_the_newest_files_are_taken_where_there_is_a_bound(tmp_path: Path) -> None:
    """Whole files, at least one, and what is left out is said."""
    clock = [1000.0]
    hand = shelf(tmp_path, now=lambda: clock[0])
    for k in range(6):
        clock[0] += 1
        hand.write("m", frames(record(k, n_bytes=40_000)))
    reading = find("all", tmp_path, "m")
    assert len(reading.files) == 6
    for bytes_max, ids in ((1, ["r-5"]), (100_000, ["r-4", "r-5"])):
        newest = reading.newest(bytes_max)
        assert [each.id for each in newest] == ids
        assert newest.said() == f"{6 - len(ids)} older files left out"
    assert reading.newest(1 << 30).said() == ""


def test_a_capture_is_found_by_time_name_or_whole(tmp_path: Path) -> None:
    """`last-90s` counts back from now, by file and by record; other words are said to be none."""
    clock = [1000.0]
    hand = shelf(tmp_path, now=lambda: clock[0])
    hand.write("m", frames(record(0), record(60), record(100)))
    (file,) = files(tmp_path)
    os.utime(file, (1100, 1100))

    def ids(what: str, now: float) -> list[str]:
        return [each.id for each in find(what, tmp_path, "m", now=now)]

    assert ids("last-50s", 1101.0) == ["r-60", "r-100"]
    assert ids("last-1h", 1101.0) == ["r-0", "r-60", "r-100"]
    assert ids("last-1s", 1200.0) == []
    assert ids(file.name, 0.0) == ids("all", 0.0) == ["r-0", "r-60", "r-100"]
    for what in ("last", "last-5y", "../m", "1.capture"):
        with pytest.raises(NotFoundError, match="last-24h, all, or the name of a file"):
            find(what, tmp_path, "m")
    for model in ("other", "..", "m/../m"):
        with pytest.raises(NotFoundError, match="no capture of model"):
            find("all", tmp_path, model)
