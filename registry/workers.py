"""Heartbeats: which workers live, which revision each has in force, and which it refused.

A worker is alive while its sequence number is seen to change, by the reader's own monotonic clock;
the clocks of two hosts are never compared.
"""

import contextlib
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from registry import store

DIRECTORY = "workers"
SILENT_S_MAX = 5.0
"""A worker whose sequence has not changed for so long is not waited for."""
_POLL_S = 0.05
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")


class Rejection(msgspec.Struct, frozen=True):
    """A revision that a worker could not put in force."""

    revision: int
    reason: str


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker says of itself."""

    format: int = 1
    host: str
    server: str = ""
    """Tells the servers of one host apart that share a state directory; the first has no name."""
    slot: int
    pid: int
    sequence: int
    """Higher each time."""
    observed: int
    """The revision in force there."""
    rejected: Rejection | None = None
    """The newest revision, if it could not be put in force: the one before serves on."""
    loaded: tuple[str, ...] = ()
    """Open versions, as `model@version`."""
    rss_bytes: int = 0

    @property
    def name(self) -> str:
        """Host, server and slot."""
        return f"{_NOT_IN_NAMES.sub('_', self.host + self.server)}-{self.slot}"


def beat(state_dir: Path, heartbeat: Heartbeat) -> None:
    """Say it to everybody.

    Raises
    ------
    WriteError : it cannot be written; nothing depends on it but `wait=applied`.
    """
    directory = state_dir / DIRECTORY
    store.make_directory(directory)
    data = msgspec.json.encode(heartbeat)
    store.replace(directory / f"{heartbeat.name}.json", data, is_durable=False)


def forget(state_dir: Path, name: str) -> None:
    """A worker ends by itself: nobody need wait for it."""
    with contextlib.suppress(OSError):
        (state_dir / DIRECTORY / f"{name}.json").unlink()


def read(state_dir: Path) -> dict[str, Heartbeat]:
    """The newest heartbeat of every worker, also of those that have died, by name."""
    found: dict[str, Heartbeat] = {}
    try:
        files = sorted((state_dir / DIRECTORY).glob("*.json"))
    except OSError:
        return {}
    for file in files:
        with contextlib.suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
            heartbeat = msgspec.json.decode(file.read_bytes(), type=Heartbeat)
            found[heartbeat.name] = heartbeat
    return found


class Watch:
    """Tells the living from the dead by looking more than once."""

    def __init__(self, state_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._state_dir = state_dir
        self._clock = clock
        self._seen: dict[str, tuple[int, int, float]] = {}

    def look(self) -> Mapping[str, Heartbeat]:
        """Workers that may live: seen to beat lately, or not watched for long enough to know."""
        now, alive = self._clock(), {}
        for name, heartbeat in read(self._state_dir).items():
            pid, sequence, since = self._seen.get(name, (0, -1, now))
            if (
                heartbeat.host == socket.gethostname()
                and not Path(f"/proc/{heartbeat.pid}").exists()
            ):
                continue
            if (pid, sequence) != (heartbeat.pid, heartbeat.sequence):
                self._seen[name] = (heartbeat.pid, heartbeat.sequence, now)
            elif now - since > SILENT_S_MAX:
                continue
            alive[name] = heartbeat
        return alive


def wait_applied(
    state_dir: Path,
    revision: int,
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Sequence[Heartbeat]:
    """Wait until every live worker has this revision in force, or one says that it cannot.

    Returns
    -------
    Those that have not, when the time is over or one has refused; empty when all have.
    """
    watch, until = Watch(state_dir, clock), clock() + timeout_s
    while True:
        laggards = [beat for beat in watch.look().values() if beat.observed < revision]
        if not laggards or clock() >= until:
            return laggards
        if any(beat.rejected and beat.rejected.revision >= revision for beat in laggards):
            return laggards
        pause(_POLL_S)
