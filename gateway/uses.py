"""When each version of a host was last used: what a server opens first when it starts again.

A small file for each worker in the run directory, written once a minute while something is called,
and at the end. Lost with a crash is a minute, and nothing depends on it but an order.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from registry import names, store
from registry.errors import WriteError

Key = tuple[str, int]
"""Model and version."""

WRITE_S = 60.0
_KEYS_MAX = 10_000


class Uses:
    """The uses that one worker knows of.

    Parameters
    ----------
    directory : of all workers of the host
    name : of this one's file
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._file = directory / f"{name}.json"
        self._known: dict[Key, float] = {}
        self._written: Mapping[Key, float] = {}
        self._due = 0.0

    def start(self) -> None:
        """Read what all workers have written."""
        self._known = {}
        with contextlib.suppress(OSError):
            for file in self._directory.glob("*.json"):
                for key, used in _read(file).items():
                    self._known[key] = max(used, self._known.get(key, 0.0))
        self._written = dict(self._known)
        self._due = time.monotonic() + WRITE_S

    def recent(self) -> list[Key]:
        """Versions by their last use, the newest first."""
        return sorted(self._known, key=lambda key: -self._known[key])

    @property
    def is_due(self) -> bool:
        """Whether it is time to write down what has changed."""
        return time.monotonic() >= self._due

    def note(self, ran: Iterable[tuple[Key, float]], *, at_once: bool = False) -> None:
        """Write down when versions ran, if it is time to or `at_once`.

        Parameters
        ----------
        ran : by `time.monotonic`; 0 for never
        """
        if not (self.is_due or at_once):
            return
        now = time.monotonic()
        self._due = now + WRITE_S
        wall = time.time()
        for key, at in ran:
            if at:
                self._known[key] = max(round(wall - (now - at), 1), self._known.get(key, 0.0))
        if self._known == self._written:
            return
        kept = {f"{name}@{n}": self._known[name, n] for name, n in self.recent()[:_KEYS_MAX]}
        with contextlib.suppress(WriteError, OSError):
            store.make_directory(self._directory)
            store.replace(self._file, msgspec.json.encode(kept), is_durable=False)
            self._written = dict(self._known)


def _read(file: Path) -> dict[Key, float]:
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=dict[str, float])
    except (OSError, msgspec.DecodeError):
        return {}
    found: dict[Key, float] = {}
    for entry, used in kept.items():
        model, _, text = entry.rpartition("@")
        if (number := names.version(text)) is not None:
            found[model, number] = used
    return found
