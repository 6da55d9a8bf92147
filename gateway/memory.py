"""Bytes that open sessions take, the budget for them, and which session leaves next.

A session's bytes are what the process grew by while it was opened and tried out, or the size of its
files where that is more; before it is opened they are estimated. Nothing here closes anything.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

Key = tuple[str, int]
"""Model and version."""

_SHARE = 0.6
"""Of the machine's memory, or of the container's, unless a setting says how much."""
_FIXED_BYTES = 8 << 20
"""What a session takes beside its weights, as a first guess."""
_FACTOR = 2
"""Bytes of memory for each byte of a model's files, as a first guess."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


class Ledger:
    """What every open session takes, against a budget."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.evictions = 0
        self._bytes: dict[Key, int] = {}

    @property
    def used_bytes(self) -> int:
        """All sessions together."""
        return sum(self._bytes.values())

    @property
    def sessions(self) -> Mapping[Key, int]:
        """Bytes by session."""
        return self._bytes

    def enter(self, key: Key, n_bytes: int) -> None:
        """A session was opened and takes so much."""
        self._bytes[key] = n_bytes

    def leave(self, key: Key) -> None:
        """A session was closed."""
        self._bytes.pop(key, None)

    def victims(self, wanted_bytes: int, idle: Iterable[Key]) -> list[Key] | None:
        """Which sessions must leave before one of this size may come.

        Parameters
        ----------
        idle : sessions that no route needs, the one least recently used first

        Returns
        -------
        None when not even all of them would make room.
        """
        missing = self.used_bytes + wanted_bytes - self.budget_bytes
        leaving: list[Key] = []
        for key in idle:
            if missing <= 0:
                break
            leaving.append(key)
            missing -= self._bytes.get(key, 0)
        return leaving if missing <= 0 else None


def estimate(file_bytes: int) -> int:
    """Bytes that a session is likely to take, by the size of its files."""
    return _FACTOR * file_bytes + _FIXED_BYTES


def budget(setting_bytes: int, n_workers: int) -> int:
    """Bytes that the sessions of one worker may take: as set, else a share of what there is."""
    return setting_bytes or int(_SHARE * available() / n_workers)


def available() -> int:
    """Memory of the container, or of the machine where there is no limit."""
    try:
        return int(_CGROUP.read_text(encoding="ascii"))
    except (OSError, ValueError):  # No cgroup of version 2, or `max`.
        pass
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
