"""Counter files: written by one, read by all, continued by the next, whenever the writer dies."""

import errno
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import counters
from gateway.counters import HostCounts, Region, file_of, host_array, host_totals

WRITER = """
import sys
from pathlib import Path
from gateway.counters import Region
region = Region(Path(sys.argv[1]))
beat = region.counter("beat")
k = beat.value
print("begun", flush=True)
while True:
    region.counter(f"series {k % 3000}").add()
    beat.add()
    k += 1
"""
STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["a", "b", "über", 'm"\n', "x" * 300]),
        st.integers(1, 2**40),
        st.sampled_from(["add", "array", "die", "read"]),
    ),
    max_size=40,
)


def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_order_of_counting_dying_and_reading_adds_up(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str, int, str]]
) -> None:
    """Against a plain dictionary: three writers, each of which may die and be followed."""
    directory = run_dir(tmp_path_factory)
    files = [file_of(directory, str(slot), "loop") for slot in range(3)]
    regions = [Region(file) for file in files]
    host = HostCounts(counters.directory(directory))
    expected: dict[str, list[int]] = {}
    for slot, name, n, step in steps:
        if step == "add":
            regions[slot].counter(name).add(n)
            expected.setdefault(name, [0])[0] += n
        elif step == "array":
            np.frombuffer(regions[slot].array(f"{name}[]", 3), np.int64)[:] += (0, n, 1)
            before = expected.get(f"{name}[]", [0, 0, 0])
            expected[f"{name}[]"] = [a + b for a, b in zip(before, (0, n, 1), strict=True)]
        elif step == "die":
            regions[slot] = Region(files[slot])
        else:
            assert host.totals() == expected

    assert host.totals() == host_totals(directory) == expected
    for name, cells in expected.items():
        assert (found := host_array(directory, name)) is not None
        assert found.tolist() == cells
    assert host_array(directory, "nobody's") is None
    assert not any(region.problem for region in regions)


def test_a_file_cut_or_spoilt_at_any_byte_of_its_newest_entry_keeps_the_others(
    tmp_path: Path,
) -> None:
    """The checksum comes last: whatever a writer had put down before it died is written over."""
    file = file_of(tmp_path, "0", "loop")
    region = Region(file)
    region.counter("kept").add(7)
    before = file.read_bytes()
    region.counter("newest").add(5)
    after = file.read_bytes()
    changed = [k for k in range(len(after)) if after[k] != before[k]]
    start, end = changed[0], changed[-1] + 1
    for size in range(start, end):
        # The checksum, the first four bytes, is what is missing.
        torn = before[:start] + bytes(4) + after[start + 4 : size] + before[max(size, start + 4) :]
        for garbage in (0, 255):
            spoilt = bytearray(torn)
            spoilt[end : end + 64] = bytes([garbage]) * 64
            file.unlink()
            file.write_bytes(spoilt)
            assert host_totals(tmp_path) == {"kept": [7]}
            follower = Region(file)
            assert follower.counter("kept").value == 7
            assert follower.array("newest one", 9).tolist() == [0] * 9
            assert follower.problem is None


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x7fELF" * 100, id="foreign"),
        pytest.param(struct.pack("<16sI44x", b"driftgate counts", 2) + bytes(64), id="newer"),
        pytest.param(b"driftgate", id="cut"),
    ],
)
def test_a_file_of_another_format_is_said_and_kept_aside(tmp_path: Path, content: bytes) -> None:
    """Nobody misreads it, nobody destroys it, and counting goes on."""
    file = file_of(tmp_path, "0", "loop")
    file.parent.mkdir()
    file.write_bytes(content)
    host = HostCounts(file.parent)
    assert host.totals() == {}
    assert "0-loop" in host.problems[0]

    region = Region(file)
    region.counter("a").add(2)

    assert "another format" in str(region.problem)
    assert file.with_suffix(".aside").read_bytes() == content
    assert host.totals() == {"a": [2]}
    assert host.problems == []


def test_a_writer_killed_at_any_moment_is_followed_without_a_step_back(tmp_path: Path) -> None:
    """While it writes and its file grows, a reader sees counts that only rise."""
    file = file_of(tmp_path, "0", "loop")
    host = HostCounts(file.parent)
    seen: dict[str, list[int]] = {}
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            begun = host.totals().get("beat", [0])[0]
            while seen.get("beat", [0])[0] < begun + 1000:
                now = host.totals()
                assert all(cells[0] <= now[name][0] for name, cells in seen.items())
                seen = now
            writer.send_signal(signal.SIGKILL)
    last = host.totals()
    [beats] = last.pop("beat")

    assert file.stat().st_size > 65_536
    # It counts a series before the beat: one at most was under way at each of four deaths.
    assert sum(cells[0] for cells in last.values()) - beats in range(5)
    assert len(last) == 3000 <= beats


def test_a_full_disk_moves_new_series_to_memory_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting never fails, nothing in the file is lost, and growth is tried again later."""
    file = file_of(tmp_path, "0", "loop")
    region = Region(file)
    region.counter("early").add(1)
    is_full = True

    def fallocate(handle: int, start: int, size: int) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, start, size)

    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    region.array("large", 10_000)[9_999] += 3
    region.counter("early").add(1)

    assert "No space left" in str(region.problem)
    assert host_totals(tmp_path) == {"early": [2]}
    own = HostCounts(file.parent, [region]).totals()
    assert own["early"] == [2]
    assert sum(own["large"]) == 3
    is_full = False
    region.array("next", 10_000)[0] += 1
    assert sum(host_totals(tmp_path)["next"]) == 1
    assert region.array("large", 10_000)[9_999] == 3


def test_a_directory_that_cannot_be_had_leaves_counting_in_memory(tmp_path: Path) -> None:
    """A read-only or missing run directory is no reason not to serve."""
    (tmp_path / "counters").write_text("in the way")
    region = Region(file_of(tmp_path, "0", "loop"))
    region.counter("a").add(4)

    assert region.problem is not None
    assert HostCounts(tmp_path / "counters", [region]).totals() == {"a": [4]}


def test_series_may_be_made_by_several_threads(tmp_path: Path) -> None:
    """Making one is rare and locked; counting is not, since each series has one thread."""
    region = Region(file_of(tmp_path, "0", "loop"))

    def count(name: str) -> None:
        for k in range(500):
            region.counter(f"{name} {k}").add(k)

    threads = [threading.Thread(target=count, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert host_totals(tmp_path) == {f"{name} {k}": [k] for name in "abc" for k in range(500)}


def test_a_gauge_is_absent_until_set_and_after_it_was_cleared(tmp_path: Path) -> None:
    """Its two cells hold any double, and when it was said."""
    region = Region(file_of(tmp_path, "0", "loop"))
    gauge = region.gauge("score")
    assert region.array("score", 2)[0] == 0
    gauge.set(-0.25)
    found = host_totals(tmp_path)["score"]
    assert found[0] > 0
    assert counters.gauge_value(found) == -0.25
    gauge.clear()
    assert host_totals(tmp_path)["score"][0] == 0


def test_beginning_anew_removes_what_was_counted(tmp_path: Path) -> None:
    """Only for whoever starts the first worker; other files of the directory stay."""
    Region(file_of(tmp_path, "0", "loop")).counter("a").add()
    other = counters.directory(tmp_path) / "note.txt"
    other.write_text("mine")

    counters.begin(tmp_path)

    assert host_totals(tmp_path) == {}
    assert other.exists()
