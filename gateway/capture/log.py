"""Between answers and files: a bounded buffer that drops and counts, and a thread that writes.

The event loop hands over and never waits. What cannot be written, because the disk is full or gone,
is lost and counted; the next batch tries again.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gateway.capture.record import Record, framed, pack
from gateway.capture.shelf import Shelf
from gateway.counters import Counter
from gateway.telemetry import event

_PAUSE_S = 0.25
"""What has gathered is written so often."""
_SWEEP_S = 5.0
_BATCH_BYTES = 1024 * 1024


class Taken(Protocol):
    """One request that is to be captured. Nobody changes it any more."""

    @property
    def model(self) -> str:
        """Whose request it is."""

    @property
    def n_bytes(self) -> int:
        """Memory that it holds."""

    def record(self) -> Record:
        """What is kept of it; takes its time."""


@dataclass(slots=True)
class CaptureMeters:
    """What is counted for one model."""

    written: Counter
    """By the log's thread."""
    full: Counter
    """Found no room in the buffer; by the event loop."""
    large: Counter
    """Larger than one file may be; by the log's thread."""
    unwritten: Counter
    """Could not be written; by the log's thread."""


class CaptureLog:
    """Hands requests over to the disk.

    Parameters
    ----------
    shelf : belongs to the log's thread from now on
    meters : of a model; asked by the event loop
    queue_bytes_max : of what waits to be written
    record_bytes_max : of one request
    """

    def __init__(
        self,
        shelf: Shelf,
        meters: Callable[[str], CaptureMeters],
        *,
        queue_bytes_max: int,
        record_bytes_max: int,
    ) -> None:
        self.problem: str | None = None
        """Why the last write failed; None when it did not."""
        self._shelf = shelf
        self._meters = meters
        self._queue_bytes_max = queue_bytes_max
        self._record_bytes_max = record_bytes_max
        self._waiting: deque[tuple[Taken, CaptureMeters]] = deque()
        # One thread adds to the first number and the other to the second; neither is locked.
        self._bytes_in = self._bytes_out = 0
        self._by_model: dict[str, CaptureMeters] = {}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def directory(self) -> Path:
        """Where the captures of the host are."""
        return self._shelf.directory

    @property
    def n_bytes(self) -> int:
        """Bytes of all captures of the host, when somebody looked last."""
        return self._shelf.n_bytes

    def offer(self, taken: Taken) -> None:
        """Hand over one request, or count it as dropped. Never waits."""
        if (meters := self._by_model.get(taken.model)) is None:
            meters = self._by_model[taken.model] = self._meters(taken.model)
        if self._bytes_in - self._bytes_out + taken.n_bytes > self._queue_bytes_max:
            meters.full.add()
            return
        self._bytes_in += taken.n_bytes
        self._waiting.append((taken, meters))
        if self._thread is None:
            self.start()

    def start_if_any(self) -> None:
        """Start the thread if there are captures, which grow old; else the first request does."""
        if self._shelf.directory.is_dir():
            self.start()

    def start(self) -> None:
        """Start the thread, if it does not run yet."""
        if self._thread is None and not self._ending.is_set():
            self._thread = threading.Thread(target=self._work, name="capture", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Write what waits, then end the thread."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        pauses = 0
        while not self._ending.wait(_PAUSE_S):
            self._write()
            if pauses % int(_SWEEP_S / _PAUSE_S) == 0:
                self._sweep()
            pauses += 1
        self._write()

    def _write(self) -> None:
        waiting = self._waiting
        while waiting:
            batches: dict[str, tuple[CaptureMeters, list[bytes]]] = {}
            n_bytes = 0
            while waiting and n_bytes < _BATCH_BYTES:
                taken, meters = waiting.popleft()
                self._bytes_out += taken.n_bytes
                if (frame := self._frame(taken, meters)) is not None:
                    n_bytes += len(frame)
                    batches.setdefault(taken.model, (meters, []))[1].append(frame)
            for model, (meters, frames) in batches.items():
                self._put(model, meters, frames)

    def _frame(self, taken: Taken, meters: CaptureMeters) -> bytes | None:
        try:
            frame = framed(pack(taken.record()))
        except UnicodeEncodeError:  # half a character: JSON can hold it, UTF-8 cannot
            meters.unwritten.add()
            return None
        except Exception:  # noqa: BLE001  one odd request must not end the thread
            meters.unwritten.add()
            event("request_not_captured", logging.ERROR, model=taken.model, exc=True)
            return None
        if len(frame) > self._record_bytes_max:
            meters.large.add()
            return None
        return frame

    def _put(self, model: str, meters: CaptureMeters, frames: list[bytes]) -> None:
        """Write frames in portions that one file holds."""
        portion_max = min(self._record_bytes_max, _BATCH_BYTES)
        while frames:
            n, n_bytes = 0, 0
            while n < len(frames) and (n == 0 or n_bytes + len(frames[n]) <= portion_max):
                n_bytes += len(frames[n])
                n += 1
            portion, frames = frames[:n], frames[n:]
            try:
                self._shelf.write(model, b"".join(portion))
            except OSError as error:
                meters.unwritten.add(n)
                self._failed(error)
            else:
                meters.written.add(n)
                self._succeeded()

    def _sweep(self) -> None:
        try:
            self._shelf.sweep()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        reason = error.strerror or type(error).__name__
        if self.problem is None:
            event("captures_not_written", logging.ERROR, reason=reason)
        self.problem = reason

    def _succeeded(self) -> None:
        if self.problem is not None:
            event("captures_written_again")
        self.problem = None
