"""The files of all captures of a host: bounded together, those at rest for longest go first.

A file is written by one worker and may be read meanwhile. Room is made, and bytes are written,
under a lock that all workers of the host share, so that the bound holds whoever writes. A worker
that loses a file of its own that way goes on in a new one.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.capture.record import HEAD_LINE

SUFFIX = ".capture"
_LOCK = ".lock"
_FILES_MAX = 10_000
"""Files of all captures: looking at many small ones would take longer than writing."""


@dataclass(slots=True)
class _Segment:
    path: Path
    n_bytes: int


class Shelf:
    """One worker's hand on the files. For one thread.

    Parameters
    ----------
    directory : has a directory for each model
    worker : tells its files from those of others
    bytes_max : of all files of the host
    segment_bytes_max : of one file
    days : a file that was not added to for so long is removed
    on_removed : is told how many bytes went
    """

    def __init__(
        self,
        directory: Path,
        worker: str,
        *,
        bytes_max: int,
        segment_bytes_max: int,
        days: float,
        on_removed: Callable[[int], None] = lambda _: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.n_bytes = 0
        """Bytes of all files, when somebody looked last."""
        self._worker = worker
        self._bytes_max = bytes_max
        self._segment_bytes_max = segment_bytes_max
        self._days = days
        self._on_removed = on_removed
        self._now = now
        self._current: dict[str, _Segment] = {}
        """By model, the file that goes on growing. It is opened for each write: somebody may have
        removed it meanwhile, and there may be many models."""

    def write(self, model: str, data: bytes) -> None:
        """Add whole frames to a capture, as one: all of them, or none.

        Raises
        ------
        OSError : they could not be written.
        """
        with self._locked():
            self._make_room(len(HEAD_LINE) + len(data))
            segment, fd = self._opened(model, len(data))
            if segment.n_bytes == 0:
                data = HEAD_LINE + data
            try:
                _write(fd, data)
            except OSError:
                # What went in before the disk was full is taken out again, if that is possible.
                del self._current[model]
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, segment.n_bytes)
                    if segment.n_bytes == 0:
                        segment.path.unlink()
                raise
            finally:
                os.close(fd)
            segment.n_bytes += len(data)
            self.n_bytes += len(data)

    def sweep(self) -> None:
        """Let go what is too old.

        Raises
        ------
        OSError : the directory cannot be read.
        """
        if not self.directory.is_dir():
            self.n_bytes = 0
            return
        with self._locked():
            self._make_room(0)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _opened(self, model: str, n_bytes: int) -> tuple[_Segment, int]:
        """The file that so much more goes into, opened: the current one, else a new one."""
        segment = self._current.get(model)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        if segment is not None and segment.n_bytes + n_bytes <= self._segment_bytes_max:
            with contextlib.suppress(FileNotFoundError):
                return segment, os.open(segment.path, flags)
        folder = self.directory / model
        folder.mkdir(exist_ok=True, mode=0o700)
        number = int(self._now() * 1000)
        while True:
            path = folder / f"{number:013d}-{self._worker}{SUFFIX}"
            try:
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                number += 1
                continue
            segment = self._current[model] = _Segment(path, 0)
            return segment, fd

    def _make_room(self, n_bytes: int) -> None:
        """Remove files until so many bytes more are within the bound.

        First those that nobody has added to for longest: a model with little traffic keeps its own.
        """
        found = []
        for path in files(self.directory):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                found.append((about.st_mtime, path.name, path, about.st_size))
        found.sort()
        self.n_bytes = sum(size for *_, size in found)
        too_old = self._now() - self._days * 86_400
        n_files = len(found)
        for changed, _, path, size in found:
            is_full = self.n_bytes + n_bytes > self._bytes_max or n_files >= _FILES_MAX
            if not is_full and changed >= too_old:
                continue
            path.unlink(missing_ok=True)
            n_files -= 1
            self.n_bytes -= size
            self._on_removed(size)


def files(directory: Path, model: str | None = None) -> list[Path]:
    """All files of captures, or of one model's, in no order."""
    try:
        folders = [directory / model] if model else [*directory.iterdir()]
    except OSError:
        return []
    found: list[Path] = []
    for folder in folders:
        with contextlib.suppress(OSError):
            found += [path for path in folder.iterdir() if path.name.endswith(SUFFIX)]
    return found


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
