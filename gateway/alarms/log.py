"""The event log of alarms: one line for each thing that happened, never changed, only appended to.

A monitor that crosses its line opens an *episode*. While it is open, further crossings of the same
monitor belong to it: whoever was told once is not told again. It ends when somebody acknowledges
it, accepts what is served as the new normal, or when the condition has been over for the hold-off.
"""

import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import msgspec

from gateway.telemetry import event

FORMAT = 1
Kind = Literal["opened", "passed", "acknowledged", "accepted", "delivered", "dead"]
_LINE_BYTES_MAX = 16 * 1024
_SLUG = re.compile(r"[^A-Za-z0-9_.-]+")
_RUNBOOK = (
    "1. see what moved: driftgate drift {model} --version {version}; "
    "2. seen, and being worked on: driftgate alarm ack {id}; "
    "3. it is the new normal: driftgate drift accept {model}; "
    "4. the model is wrong now: put an earlier version back, or retrain"
)


class Crossing(NamedTuple):
    """A monitor that is above its line now."""

    model: str
    version: int
    monitor: str
    """What watches: `drift:input:temp`, `performance:auc`, `rollout:r-12`."""
    reason: str
    """A sentence for people: what, how much, compared with what."""
    since: float
    """Since when, in seconds since 1970, as far as it is known."""
    details: dict[str, Any]
    """Numbers for programs: score, line, evidence."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the log."""

    event: Kind
    id: str
    time: float
    format: int = FORMAT
    model: str = ""
    version: int = 0
    monitor: str = ""
    episode: int = 0
    reason: str = ""
    since: float = 0.0
    details: dict[str, Any] = {}
    by: str = ""
    target: str = ""
    key: str = ""


class Episode(msgspec.Struct):
    """One alarm, from its opening on."""

    id: str
    """Names it, everywhere and for good; the idempotency key of whoever is told."""
    model: str
    version: int
    monitor: str
    episode: int
    """Counts the episodes of this monitor."""
    reason: str
    opened: float
    since: float
    details: dict[str, Any]
    state: Literal["open", "passed", "acknowledged", "accepted"] = "open"
    changed: float = 0.0
    by: str = ""
    note: str = ""
    delivered: list[str] = []
    """Targets that were told, or that nobody will try again."""

    @property
    def key(self) -> tuple[str, int]:
        """Model and version."""
        return self.model, self.version

    @property
    def runbook(self) -> str:
        """What to do now, in commands."""
        return _RUNBOOK.format(model=self.model, version=self.version, id=self.id)

    @property
    def about(self) -> str:
        """`inputs` (and outputs); `labels`, so answers; or how the monitor's name begins."""
        kind = self.monitor.partition(":")[0]
        return "inputs" if kind == "drift" else kind

    @property
    def report(self) -> str:
        """Path of what the server shows about it."""
        model = quote(self.model, safe="")
        path = f"/drift/{model}/performance" if self.about == "labels" else f"/drift/{model}"
        return f"{path}?version={self.version}"

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return {**found, "about": self.about, "report": self.report, "runbook": self.runbook}


def identity(model: str, version: int, monitor: str, episode: int) -> str:
    """Names an episode in letters that every scheduler takes as the id of a run.

    >>> identity("fraud", 7, "drift:input:amount", 2)
    'fraud-7-drift_input_amount-42b2eb4f-2'
    """
    slug = _SLUG.sub("_", monitor)[:48]
    digest = hashlib.sha256(monitor.encode()).hexdigest()[:8]
    return f"{model}-{version}-{slug}-{digest}-{episode}"


class AlarmLog:
    """Episodes of all models of a registry. Several processes may have one open.

    Parameters
    ----------
    hold_off_s : a monitor whose condition is over, or that was acknowledged, opens no new episode
        for so long
    """

    def __init__(
        self, file: Path, *, hold_off_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._file = file
        self._hold_off_s = hold_off_s
        self._clock = clock
        self._lock = threading.Lock()
        self._at = 0
        self._episodes: dict[str, Episode] = {}
        self._newest: dict[tuple[str, int, str], Episode] = {}
        self.problem: str | None = None
        """Why the last event could not be written; None when it could."""
        self.listeners: list[Callable[[Event, Episode], None]] = []
        """Told of every event that this process writes; must not wait."""

    # -- what happens

    def crossed(self, crossing: Crossing) -> Episode | None:
        """Open an episode, unless the monitor has one or is held off; None: nothing new."""
        key = (crossing.model, crossing.version, crossing.monitor)
        with self._turn():
            now, last = self._clock(), self._newest.get(key)
            if last is not None and last.state != "accepted":
                if last.state == "open":
                    return None
                if now - last.changed < self._hold_off_s:
                    return None
            number = 1 if last is None else last.episode + 1
            return self._append(
                Event(
                    "opened",
                    identity(*key, number),
                    now,
                    model=crossing.model,
                    version=crossing.version,
                    monitor=crossing.monitor,
                    episode=number,
                    reason=crossing.reason,
                    since=crossing.since,
                    details=crossing.details,
                )
            )

    def passed(self, model: str, version: int, monitor: str) -> None:
        """The condition is over for now. Another crossing within the hold-off changes nothing."""
        with self._turn():
            last = self._newest.get((model, version, monitor))
            if last is not None and last.state == "open":
                self._append(Event("passed", last.id, self._clock()))

    def acknowledge(self, id_: str, by: str = "", note: str = "") -> Episode:
        """Somebody has seen it; KeyError: no such alarm."""
        with self._turn():
            self._episodes[id_]
            return self._append(Event("acknowledged", id_, self._clock(), by=by, reason=note))

    def accept(
        self, model: str, version: int, by: str = "", note: str = "", *, prefix: str = ""
    ) -> list[Episode]:
        """What is served is the new normal: episodes of the version are over.

        Those of monitors whose names begin with `prefix`: what inputs look like says nothing about
        labels, and the other way round.
        """
        with self._turn():
            return [
                self._append(Event("accepted", last.id, self._clock(), by=by, reason=note))
                for key, last in list(self._newest.items())
                if key[:2] == (model, version)
                and key[2].startswith(prefix)
                and last.state != "accepted"
            ]

    def told(self, id_: str, target: str, *, is_dead: bool, reason: str = "") -> None:
        """A target was told, or will not be: it is not tried again."""
        with self._turn():
            kind: Kind = "dead" if is_dead else "delivered"
            if id_ in self._episodes:
                self._append(Event(kind, id_, self._clock(), target=target, reason=reason))

    # -- what is read

    def episodes(self) -> list[Episode]:
        """All, the newest first."""
        with self._turn(is_writing=False):
            return sorted(self._episodes.values(), key=lambda episode: -episode.opened)

    def n_open(self) -> int:
        """Episodes that nobody has looked into and that are not over."""
        return sum(episode.state == "open" for episode in self.episodes())

    # -- the file

    def _append(self, happened: Event) -> Episode:
        """Write one event; what cannot be written counts in this process all the same."""
        line = msgspec.json.encode(happened)
        if len(line) > _LINE_BYTES_MAX:
            happened = msgspec.structs.replace(happened, details={}, reason=happened.reason[:1000])
            line = msgspec.json.encode(happened)
        try:
            self._write(line + b"\n")
            self.problem = None
        except OSError as error:
            self.problem = error.strerror or type(error).__name__
            event("alarm_not_kept", logging.ERROR, alarm=happened.id, reason=self.problem)
        episode = self._fold(happened)
        assert episode is not None  # noqa: S101  every event here is about an episode that is known
        for listener in self.listeners:
            listener(happened, episode)
        return episode

    def _write(self, line: bytes) -> None:
        handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(handle).st_size
            if size and size != self._at:
                line = b"\n" + line  # A torn line must not swallow this one.
            if os.write(handle, line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(handle)
            self._at = size + len(line)
        finally:
            os.close(handle)

    @contextmanager
    def _turn(self, *, is_writing: bool = True) -> Iterator[None]:
        """One at a time, in this process and among all: reads what others have written first."""
        with self._lock:
            handle = None
            try:
                if is_writing:
                    self._file.parent.mkdir(parents=True, exist_ok=True)
                    lock = self._file.with_suffix(".lock")
                    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                self._catch_up()
            except OSError as error:
                self.problem = error.strerror or type(error).__name__
            try:
                yield
            finally:
                if handle is not None:
                    os.close(handle)

    def _catch_up(self) -> None:
        try:
            with self._file.open("rb") as file:
                file.seek(self._at)
                new = file.read()
        except FileNotFoundError:
            return
        whole, newline, _ = new.rpartition(b"\n")
        self._at += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                self._fold(msgspec.json.decode(line, type=Event))
            except msgspec.DecodeError:
                if line.strip():
                    event("alarm_line_skipped", logging.WARNING, bytes=len(line))

    def _fold(self, happened: Event) -> Episode | None:
        """One event into what is known."""
        if happened.event == "opened":
            key = (happened.model, happened.version, happened.monitor)
            made = Episode(
                happened.id, *key, happened.episode, happened.reason, happened.time,
                happened.since, happened.details, changed=happened.time,
            )  # fmt: skip
            self._episodes[made.id] = self._newest[key] = made
            return made
        episode = self._episodes.get(happened.id)
        if episode is None:
            return None
        if happened.event in {"delivered", "dead"}:
            episode.delivered = [*episode.delivered, happened.target]
            return episode
        episode.state = happened.event  # type: ignore[assignment]  # what is left are states
        episode.changed, episode.by, episode.note = happened.time, happened.by, happened.reason
        return episode
