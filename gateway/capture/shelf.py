"""The files of all captures of a host: bounded together, the oldest go first.

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
_OPEN_MAX = 32
"""Files that a worker holds open; beyond it that of the model that was quiet longest is closed."""


@dataclass(slots=True)
class _Segment:
    path: Path
    fd: int
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
        self._open: dict[str, _Segment] = {}

    def write(self, model: str, data: bytes) -> None:
        """Add whole frames to a capture, as one: all of them, or none.

        Raises
        ------
        OSError : they could not be written.
        """
        with self._locked():
            self._segment(model, len(data))
            self._make_room(len(HEAD_LINE) + len(data))
            segment = self._open.get(model) or self._create(model)
            if segment.n_bytes == 0:
                data = HEAD_LINE + data
            try:
                _write(segment.fd, data)
            except OSError:
                # What went in before the disk was full is taken out again, if that is possible.
                with contextlib.suppress(OSError):
                    os.ftruncate(segment.fd, segment.n_bytes)
                self._leave(model)
                raise
            segment.n_bytes += len(data)
            self.n_bytes += len(data)

    def sweep(self) -> None:
        """Let go what is too old, and files of ours that somebody else has removed.

        Raises
        ------
        OSError : the directory cannot be read.
        """
        if not self.directory.is_dir():
            self.n_bytes = 0
            return
        with self._locked():
            for model in [*self._open]:
                self._segment(model, 0)
            self._make_room(0)

    def close(self) -> None:
        """Nothing more is written."""
        for model in [*self._open]:
            self._leave(model)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _segment(self, model: str, n_bytes: int) -> _Segment | None:
        """The open file of a model, if it is still there and so much more goes into it."""
        segment = self._open.get(model)
        if segment is None:
            return None
        is_gone = os.fstat(segment.fd).st_nlink == 0
        if is_gone or segment.n_bytes + n_bytes > self._segment_bytes_max:
            self._leave(model)
            return None
        self._open[model] = self._open.pop(model)  # The last in order was used last.
        return segment

    def _create(self, model: str) -> _Segment:
        while len(self._open) >= _OPEN_MAX:
            self._leave(next(iter(self._open)))
        folder = self.directory / model
        folder.mkdir(exist_ok=True, mode=0o700)
        number = int(self._now() * 1000)
        while True:
            path = folder / f"{number:013d}-{self._worker}{SUFFIX}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            try:
                fd = os.open(path, flags, 0o600)
            except FileExistsError:
                number += 1
                continue
            segment = self._open[model] = _Segment(path, fd, 0)
            return segment

    def _leave(self, model: str) -> None:
        segment = self._open.pop(model)
        with contextlib.suppress(OSError):
            if segment.n_bytes == 0:
                segment.path.unlink(missing_ok=True)
            os.close(segment.fd)

    def _make_room(self, n_bytes: int) -> None:
        """Remove the oldest files until so many bytes more are within the bound."""
        found = sorted(files(self.directory), key=lambda path: (path.name, str(path)))
        sizes = []
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                sizes.append((path, about.st_size, about.st_mtime))
        self.n_bytes = sum(size for _, size, _ in sizes)
        too_old = self._now() - self._days * 86_400
        ours = {segment.path: model for model, segment in self._open.items()}
        for path, size, changed in sizes:
            if self.n_bytes + n_bytes <= self._bytes_max and changed >= too_old:
                continue
            path.unlink(missing_ok=True)
            self.n_bytes -= size
            self._on_removed(size)
            if path in ours:
                self._leave(ours[path])


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
