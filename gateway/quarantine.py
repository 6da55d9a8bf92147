"""Versions that end workers: noted as it happens, and left alone once it has happened too often.

A version is suspected of each worker that died by a fault, or was killed because it was frozen,
while it ran or opened that version; and of each run that does not end although it was asked to.
Three times within ten minutes put it into quarantine; an opening that does not end does so at once.

What counts lies in the run directory: it is one host's, and outlives every process. What a worker
has under way is in a mapped file, a cell for each version; whoever looks after its death lays it to
what was under way there.
"""

import contextlib
import mmap
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from registry import names

Key = tuple[str, int]
"""Model and version."""
Kind = Literal["run_stuck", "died_running", "died_opening", "open_stuck"]

ENDS_MAX = 3
WINDOW_S = 600.0
_OF_OPENING = ("died_opening", "open_stuck")
_FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_FROZEN = "frozen"
_CELLS = 4096
_OPENING = 1 << 32
"""Added to a cell while its version is opened; runs count by one."""
_UNKNOWN_S_MAX = 10.0
"""Who died so long ago and is in no list of deaths ended with its supervisor."""


@dataclass(frozen=True, slots=True)
class Held:
    """Why a version is in quarantine."""

    reason: str
    is_of_opening: bool
    """It harms whoever opens it: it is opened for nobody, whoever names it."""


class UnderWay:
    """What this process runs and opens, in a file that outlives it.

    Parameters
    ----------
    directory : of all such files; None, or one that cannot be written: it is kept in memory
    """

    def __init__(self, directory: Path | None) -> None:
        self._cells = memoryview(bytearray(8 * _CELLS)).cast("q")
        self._path: Path | None = None
        self._at: dict[Key, int] = {}
        if directory is None:
            return
        path = directory / str(os.getpid())
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as file:
                os.posix_fallocate(file.fileno(), 0, 8 * _CELLS)
                self._cells = memoryview(mmap.mmap(file.fileno(), 8 * _CELLS)).cast("q")
            self._path = path

    def cell(self, key: Key) -> tuple[memoryview, int]:
        """Where runs of a version are counted while they are under way."""
        at = self._at.get(key)
        if at is None:
            at = min(len(self._at), _CELLS - 1)
            if at == _CELLS - 1:
                return self._cells, at  # more versions than anybody opens; laid to none of them
            self._at[key] = at
            if self._path is not None:
                with contextlib.suppress(OSError), self._path.open("a", encoding="ascii") as file:
                    file.write(f"{key[0]} {key[1]}\n")
        return self._cells, at

    @contextlib.contextmanager
    def opening(self, key: Key) -> Iterator[None]:
        """While a version is opened."""
        cells, at = self.cell(key)
        cells[at] += _OPENING
        try:
            yield
        finally:
            cells[at] -= _OPENING

    def close(self) -> None:
        """The worker ends of its own will."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    @staticmethod
    def read(path: Path) -> dict[Key, Kind]:
        """What a process that has died had under way."""
        data = path.read_bytes()
        cells = memoryview(data[: 8 * _CELLS]).cast("q")
        found: dict[Key, Kind] = {}
        for line, count in zip(
            data[8 * _CELLS :].decode("ascii").splitlines(), cells, strict=False
        ):
            model, _, version = line.partition(" ")
            if count and names.is_model(model) and (number := names.version(version)):
                found[model, number] = "died_opening" if count >= _OPENING else "died_running"
        return found


class Quarantine:
    """The suspects of a host, as one of its workers sees them. `look` and `note` on any thread."""

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._stamp = 0
        self.held: Mapping[Key, Held] = {}
        self.under_way = UnderWay(None if run_dir is None else run_dir / "under_way")

    def look(self) -> set[str]:
        """Lay deaths to what was under way, and read the list of suspects if it has changed.

        Returns
        -------
        Models of which a version has come into quarantine, or left it.
        """
        if self._run_dir is None:
            return set()
        self._collect(self._run_dir)
        directory = self._run_dir / "suspects"
        try:
            stamp = directory.stat().st_mtime_ns
        except OSError:
            stamp = 0
        if stamp == self._stamp:
            return set()
        self._stamp = stamp
        held: dict[Key, Held] = {}
        with contextlib.suppress(OSError):
            for file in sorted(directory.iterdir()):
                model, _, version = file.name.rpartition("@")
                number = names.version(version)
                if number is not None and (found := _judged(model, number, _ends(file))):
                    held[model, number] = found
        before, self.held = self.held, held
        return {model for model, _ in held.keys() ^ before.keys()}

    def note(self, key: Key, kind: Kind) -> None:
        """A version has ended something once more."""
        if self._run_dir is None:
            return
        directory = self._run_dir / "suspects"
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            # One small write to the end of a file is whole or not there.
            with (directory / f"{key[0]}@{key[1]}").open("a", encoding="ascii") as file:
                file.write(f"{time.time():.3f} {kind}\n")
            os.utime(directory)

    def lift(self, key: Key) -> None:
        """Try a version again; what it did is forgotten."""
        if key in self.held and self._run_dir is not None:
            with contextlib.suppress(OSError):
                (self._run_dir / "suspects" / f"{key[0]}@{key[1]}").unlink()
            self.held = {other: held for other, held in self.held.items() if other != key}

    def _collect(self, run_dir: Path) -> None:
        """Lay each death to what was under way, once: whoever takes the file away does it."""
        try:
            found = [entry.name for entry in os.scandir(run_dir / "under_way")]
        except OSError:
            return
        for name in found:
            if not name.isdecimal() or Path("/proc", name).exists():
                continue
            file = run_dir / "under_way" / name
            is_fault = _is_fault(run_dir / "deaths" / name)
            taken = file.with_name(f"{name}.{os.getpid()}")
            with contextlib.suppress(OSError, ValueError):
                if is_fault is None and time.time() - file.stat().st_mtime < _UNKNOWN_S_MAX:
                    continue  # The supervisor has not buried it yet.
                file.rename(taken)
                if is_fault:
                    for key, kind in UnderWay.read(taken).items():
                        self.note(key, kind)
                taken.unlink()


def _is_fault(file: Path) -> bool | None:
    """Whether a process ended by a fault of what it ran; None where nobody has said."""
    try:
        number, _, why = file.read_text(encoding="ascii").partition(" ")
        return int(number) in _FAULTS or why.strip() == _FROZEN
    except (OSError, ValueError):
        return None


def _ends(file: Path) -> list[tuple[float, str]]:
    """When a version ended something, and what, the oldest first."""
    found: list[tuple[float, str]] = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in file.read_text(encoding="ascii").splitlines():
            moment, _, kind = line.partition(" ")
            with contextlib.suppress(ValueError):
                if kind in get_args(Kind):
                    found.append((float(moment), kind))
    return sorted(found)


def _judged(model: str, version: int, ends: Sequence[tuple[float, str]]) -> Held | None:
    """Whether a version is in quarantine, by what it ended."""
    again = f"driftgate pin {model} {version}, or a load by number, tries it again"
    if any(kind == "open_stuck" for _, kind in ends):
        return Held(f"in quarantine: opening it did not end; {again}", is_of_opening=True)
    for k in range(len(ends) - ENDS_MAX + 1):
        few = ends[k : k + ENDS_MAX]
        if few[-1][0] - few[0][0] <= WINDOW_S:
            n_stuck = sum(kind == "run_stuck" for _, kind in few)
            what = [f"{n_stuck} runs of it did not end"] if n_stuck else []
            if n_stuck < ENDS_MAX:
                what.append(f"{ENDS_MAX - n_stuck} workers died with it under way")
            return Held(
                f"in quarantine: within {WINDOW_S / 60:g} minutes {' and '.join(what)}; {again}",
                is_of_opening=any(kind in _OF_OPENING for _, kind in few),
            )
    return None
