"""Who is suspected of a worker's end, and when a version is left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.quarantine import ENDS_MAX, WINDOW_S, Quarantine

KEY = ("fraud", 7)
PROCESS = """
import os, pathlib, signal, sys
from gateway.quarantine import Quarantine
under_way = Quarantine(pathlib.Path(sys.argv[1])).under_way
cells, at = under_way.cell(("good", 1))
cells[at] += 1
cells[at] -= 1
if sys.argv[3] == "run":
    cells, at = under_way.cell(("fraud", 7))
    cells[at] += 1
    os.kill(os.getpid(), int(sys.argv[2]))
with under_way.opening(("fraud", 7)):
    os.kill(os.getpid(), int(sys.argv[2]))
"""


def die(run_dir: Path, number: signal.Signals, doing: str = "run", why: str = "") -> None:
    """A worker ends by a signal, and its supervisor buries it."""
    command = [sys.executable, "-c", PROCESS, str(run_dir), str(int(number)), doing]
    with subprocess.Popen(command) as process:
        assert process.wait(30) == -number
    (run_dir / "deaths").mkdir(exist_ok=True)
    (run_dir / "deaths" / str(process.pid)).write_text(f"{int(number)} {why}".strip())


def suspects(run_dir: Path, *moments: float, kind: str = "run_stuck") -> None:
    directory = run_dir / "suspects"
    directory.mkdir(exist_ok=True)
    lines = "".join(f"{moment} {kind}\n" for moment in moments)
    (directory / "fraud@7").write_text(lines)
    os.utime(directory)


def test_three_faults_with_a_version_under_way_put_it_into_quarantine(tmp_path: Path) -> None:
    """Each death counts once, whoever looks; what had ended before is not suspected."""
    one, other = Quarantine(tmp_path), Quarantine(tmp_path)
    for _ in range(ENDS_MAX - 1):
        die(tmp_path, signal.SIGSEGV)
        assert one.look() | other.look() == set()
    assert not one.held
    die(tmp_path, signal.SIGABRT)
    assert one.look() == {"fraud"}
    assert other.look() == {"fraud"}, "it is the host's"
    assert {*one.held} == {*other.held} == {KEY}
    assert not one.held[KEY].is_of_opening
    assert "3 workers died" in one.held[KEY].reason
    assert one.look() == set(), "told once"
    one.lift(KEY)
    assert (not one.held, other.look(), other.held) == (True, {"fraud"}, {})


@pytest.mark.parametrize(
    ("number", "why", "counts"),
    [
        (signal.SIGKILL, "", False),  # memory, or a person
        (signal.SIGTERM, "", False),
        (signal.SIGKILL, "frozen", True),
        (signal.SIGILL, "", True),
    ],
)
def test_only_faults_and_frozen_workers_are_laid_to_what_ran(
    tmp_path: Path, number: signal.Signals, why: str, counts: bool
) -> None:
    """Whatever else ends a worker says nothing about the version that it had in hand."""
    quarantine = Quarantine(tmp_path)
    die(tmp_path, number, why=why)
    quarantine.look()
    assert (tmp_path / "suspects" / "fraud@7").exists() == counts
    assert [*(tmp_path / "under_way").iterdir()] == [tmp_path / "under_way" / str(os.getpid())]


def test_a_death_that_nobody_has_buried_yet_waits(tmp_path: Path) -> None:
    """The supervisor says a moment later what it was."""
    quarantine = Quarantine(tmp_path)
    die(tmp_path, signal.SIGSEGV)
    (said,) = (tmp_path / "deaths").iterdir()
    text = said.read_text()
    said.unlink()
    quarantine.look()
    assert not (tmp_path / "suspects").exists()
    said.write_text(text)
    quarantine.look()
    assert (tmp_path / "suspects" / "fraud@7").exists()


def test_deaths_while_it_is_opened_keep_everybody_from_opening_it(tmp_path: Path) -> None:
    """Else no worker could start while something names it."""
    quarantine = Quarantine(tmp_path)
    for _ in range(ENDS_MAX):
        die(tmp_path, signal.SIGBUS, "open")
    quarantine.look()
    assert quarantine.held[KEY].is_of_opening


def test_three_ends_count_within_ten_minutes_and_for_ever_once_they_did(tmp_path: Path) -> None:
    """Older ones are forgotten; a quarantine does not end by itself."""
    now = time.time()
    apart = [now - 2 * WINDOW_S - 2, now - WINDOW_S - 1, now]
    for moments, is_held in (
        (apart, False),
        ([now - 2 * WINDOW_S, now - 1.5 * WINDOW_S, now - 1.1 * WINDOW_S], True),
        ([*apart, now, now], True),
        ([now, now], False),
    ):
        suspects(tmp_path, *moments)
        quarantine = Quarantine(tmp_path)
        quarantine.look()
        assert (KEY in quarantine.held) == is_held, moments
    suspects(tmp_path, now, kind="open_stuck")
    quarantine.look()
    assert quarantine.held[KEY].is_of_opening, "an opening that does not end: at once"
    (tmp_path / "suspects" / "fraud@7").write_bytes(b"\xff\nnan run_stuck\nx y\n")
    os.utime(tmp_path / "suspects")
    quarantine.look()
    assert not quarantine.held, "what is no list of ends holds nobody"
