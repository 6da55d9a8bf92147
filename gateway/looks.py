"""A worker's looks at the registry directory: often, and cheap however large it is.

A look at a thousand models is a system call for each, so the next one comes the later the longer
the last one took. Of several workers of a host only one makes them then; it tells the others when
there is something to see.
"""

import contextlib
import os
import time
from pathlib import Path

from registry.catalog import Catalog, Reader
from registry.errors import WriteError
from registry.store import Lease

_SHARE = 500
"""The next look comes so many times later as the last one took of a processor. A clock would count
what others did meanwhile."""
_PAUSE_S_MAX = 1.5
_SMALL_S = 0.001
"""A look that takes no longer is made by every worker for itself."""
_ALONE_S = 10.0
"""So long a worker leaves looking to another one."""


class Looks:
    """What is in the registry, as one worker has seen it last. For one thread at a time.

    Parameters
    ----------
    run_dir : of the host, if other workers look at the same; None: they do not
    """

    def __init__(self, registry: Path, settle_s: float, run_dir: Path | None) -> None:
        self.reader = Reader(registry, settle_s=settle_s)
        self._lease = None if run_dir is None else Lease(run_dir / "looks.lock")
        self._told = None if run_dir is None else run_dir / "looked"
        self._heard = 0
        self._found = Catalog({}, ())
        self._looked_at = self._due = self._took_s = 0.0
        self._last_s = float("inf")

    def look(self, *, at_once: bool = False) -> Catalog:
        """What is there now, as far as it is time to look; the same object if nothing is new.

        Raises
        ------
        RegistryError : it cannot be read.
        """
        start = time.monotonic()
        if not at_once and not self._is_due(start):
            return self._found
        before = time.thread_time()
        found = self.reader.look()
        self._looked_at = start
        if found is self._found:
            took_s = time.thread_time() - before
            self._took_s, self._last_s = min(took_s, self._last_s), took_s
        else:
            self._found = found
            self._tell()
        self._due = start + min(_SHARE * self._took_s, _PAUSE_S_MAX)
        return found

    def _is_due(self, now: float) -> bool:
        if self._lease is None or self._told is None or self._took_s < _SMALL_S:
            return now >= self._due
        if (heard := _stamp(self._told)) != self._heard:
            self._heard = heard
            return True
        if now < self._due:
            return False
        if self._found.pending or self._lease.is_held or now - self._looked_at > _ALONE_S:
            return True
        try:
            return self._lease.acquire()
        except WriteError:
            return True

    def _tell(self) -> None:
        if self._told is not None:
            with contextlib.suppress(OSError):
                self._told.touch()
                os.utime(self._told)
                self._heard = _stamp(self._told)


def _stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
