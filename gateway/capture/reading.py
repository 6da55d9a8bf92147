"""What the files of a capture hold, also while they are written, torn or damaged."""

import os
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from gateway.capture import shelf
from gateway.capture.record import FORMAT, HEAD, MARK, TITLE, Record, read_head, unpack
from gateway.errors import BadRequestError, NotFoundError, shown
from registry import names

_TITLE = re.compile(re.escape(TITLE) + rb"([0-9]{1,9})\n")
_TITLE_BYTES = len(TITLE) + 10
_PIECE = 1 << 16
_LAST = re.compile(r"last-(\d{1,9}(?:\.\d{1,9})?)(s|m|h|d)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class CaptureError(BadRequestError):
    """A file is no capture, or one that this release cannot read."""


class Reading:
    """The records of some files, the oldest file first, and what was passed over.

    Iterate over it once; what could not be read is counted meanwhile.
    """

    def __init__(self, files: Sequence[Path], *, since: float = 0.0) -> None:
        """`since`: records of an earlier time are passed over, in seconds since 1970."""
        self.files = tuple(files)
        self.n_bytes = sum(_size(file) for file in files)
        self.done_bytes = 0
        """Of these, how many have been read: for a progress bar."""
        self.skipped = 0
        """Records that are damaged."""
        self.torn = 0
        """Files that end within a record: they are being written, or their writer was killed."""
        self.problems: list[str] = []
        """Files that could not be read, each with the reason."""
        self._since = since

    def newest(self, bytes_max: int) -> "Reading":
        """The newest of these files that hold so many bytes together; one at least."""
        kept: list[Path] = []
        n_bytes = 0
        for file in reversed(self.files):
            n_bytes += _size(file)
            if kept and n_bytes > bytes_max:
                break
            kept.insert(0, file)
        made = Reading(kept, since=self._since)
        if left_out := len(self.files) - len(kept):
            made.problems.append(f"{left_out} older files left out")
        return made

    def __iter__(self) -> Iterator[Record]:
        """Every record that is whole.

        Raises
        ------
        CaptureError : there is one file, and it is none.
        """
        for file in self.files:
            try:
                yield from self._of(file)
            except CaptureError as error:
                if len(self.files) == 1:
                    raise
                self.problems.append(str(error))
            except FileNotFoundError:
                continue  # Its time was over: captures are bounded.
            except OSError as error:
                self.problems.append(f"{file.name}: cannot be read ({error.strerror})")

    def said(self) -> str:
        """What was passed over, in words; empty if nothing was."""
        parts = []
        if self.skipped:
            parts.append(f"{self.skipped} damaged records skipped")
        if self.torn:
            parts.append(f"{self.torn} files end within a record")
        return "; ".join([*parts, *self.problems])

    def _of(self, file: Path) -> Iterator[Record]:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            at = _start(stream, file.name)
            if at is None:
                self.torn += 1
                return
            while at < size:
                content, end = _frame(stream, at, size)
                if content is None:
                    if end is None:
                        self.torn += 1
                        self.done_bytes += size - at
                        return
                    self.skipped += 1
                elif (record := unpack(content)) is None:
                    self.skipped += 1
                elif record.time >= self._since:
                    self.done_bytes += (end or size) - at
                    at = end or size
                    yield record
                    continue
                self.done_bytes += (end or size) - at
                at = end or size


def find(what: str, directory: Path, model: str | None, now: float | None = None) -> Reading:
    """The records that somebody asks for in the captures of a host.

    Parameters
    ----------
    what : `last-24h` (s, m, h, d), the name of a file, or `all`
    directory : `captures` in the run directory
    model : whose; None: of all models

    Raises
    ------
    NotFoundError : nothing was captured, or there is no such file.
    """
    is_name = model is None or names.is_model(model)
    found = sorted(
        shelf.files(directory, model) if is_name else [], key=lambda path: (path.name, str(path))
    )
    of = "" if model is None else f" of model {shown(model)}"
    if not found:
        raise NotFoundError(f"there is no capture{of} here; ask for one in a route: capture")
    if what == "all":
        return Reading(found)
    if last := _LAST.fullmatch(what):
        moment = time.time() if now is None else now
        since = moment - float(last[1]) * _SECONDS[last[2]]
        return Reading([path for path in found if _changed(path) >= since], since=since)
    named = [path for path in found if path.name == what]
    if not named:
        raise NotFoundError(
            f"{shown(what)}: no file of a capture{of} has this name;"
            " say last-24h, all, or the name of a file"
        )
    return Reading(named)


def _start(stream: BinaryIO, name: str) -> int | None:
    """Where the first frame is; None in a file that was cut off before it.

    Raises
    ------
    CaptureError
    """
    line = stream.read(_TITLE_BYTES)
    match = _TITLE.match(line)
    if match is None:
        if TITLE.startswith(line[: len(TITLE)]) and b"\n" not in line and len(line) < _TITLE_BYTES:
            return None
        raise CaptureError(f"{name}: is no capture of driftgate")
    if int(match[1]) > FORMAT:
        raise CaptureError(
            f"{name}: was written by a later release (format {int(match[1])};"
            f" this one reads {FORMAT})"
        )
    return match.end()


def _frame(stream: BinaryIO, at: int, size: int) -> tuple[bytes | None, int | None]:
    """(content, where the next frame starts) of the frame at a place.

    Content is None for a frame that is damaged; there is no next one where the file just ends.
    """
    stream.seek(at)
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None, None
    said = read_head(head)
    if said is None:
        return None, _next(stream, at + 1, size)
    length, checksum = said
    end = at + HEAD.size + length
    if end > size:
        return None, None
    content = stream.read(length)
    return (content if zlib.crc32(content) == checksum else None), end


def _next(stream: BinaryIO, at: int, size: int) -> int | None:
    """Where the next head is that can be one; None if there is none."""
    while at < size:
        stream.seek(at)
        piece = stream.read(_PIECE)
        found = piece.find(MARK)
        if found < 0:
            at += max(len(piece) - len(MARK) + 1, 1)
            continue
        stream.seek(at + found)
        head = stream.read(HEAD.size)
        if len(head) == HEAD.size and read_head(head) is not None:
            return at + found
        at += found + 1
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
