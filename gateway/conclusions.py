"""What the workers of a host share of their monitors: counts that add up, conclusions in files.

A conclusion is written together with how far the counts had been read, both at once: so every row
counts once, whoever dies.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gateway.counters import Counter
from registry import store

Cells = npt.NDArray[np.int64]

_SAVE_S = 1.0
_SAVE_BYTES_PER_S = 2_000_000


class Shared:
    """Where counts and conclusions are: in this process alone, or on the host for all workers.

    Parameters
    ----------
    directory : of the conclusions; None: they are not kept
    array : (name, n) -> cells of this worker that all workers can read; None: they cannot
    total : name -> the sum of these cells over all workers; `is_looking` for new workers, too
    """

    def __init__(
        self,
        directory: Path | None = None,
        array: "Callable[[str, int], memoryview[int]] | None" = None,
        total: Callable[..., Cells | None] | None = None,
    ) -> None:
        self.directory = directory
        self.is_holder = False
        """Whether this worker holds the lease: it judges, and it alone writes conclusions."""
        self._array = array
        self._total = total

    @property
    def is_host_wide(self) -> bool:
        """Whether counts of several workers add up."""
        return self._array is not None and self._total is not None

    @property
    def is_judge(self) -> bool:
        """Whether this worker turns counts into evidence."""
        return self.is_holder or not self.is_host_wide

    def cells(self, name: str, n: int) -> Cells:
        """(n,) counts that this worker adds to."""
        if self._array is None:
            return np.zeros(n, np.int64)
        return np.frombuffer(self._array(name, n), np.int64)

    def counted(self, name: str, own: Counter) -> int:
        """What all workers have counted of one series, of which this worker has counted `own`."""
        found = self._total(name) if self._total is not None else None
        return own.value if found is None else int(found[0])

    def total(self, name: str, own: Cells, *, is_looking: bool = True) -> Cells:
        """(n,) counts of all workers."""
        found = None
        if self._total is not None and self._array is not None:
            found = self._total(name, is_looking=is_looking)
        return own.copy() if found is None or found.size != own.size else found

    def conclusions(self, name: str) -> "Conclusions":
        """Those of this name."""
        return Conclusions(None if self.directory is None else self.directory / f"{name}.state")


class Conclusions:
    """One file: how far counts were read, and what was concluded from them."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.saved_at = 0.0
        self._save_s = _SAVE_S
        self._read: tuple[float, int] | None = None

    @property
    def is_due(self) -> bool:
        """Whether it is time to write again: the larger they are, the more seldom."""
        return time.monotonic() - self.saved_at >= self._save_s

    def save(self, cursor: Cells, concluded: bytes) -> None:
        """Write both.

        Raises
        ------
        OSError, RegistryError : the disk says no.
        """
        self.saved_at = time.monotonic()
        if self.file is None:
            return
        data = cursor.tobytes() + concluded
        self._save_s = max(_SAVE_S, len(data) / _SAVE_BYTES_PER_S)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        store.replace(self.file, data, is_durable=False)

    def read(self, n_cells: int) -> tuple[Cells, bytes, float] | None:
        """The cursor, what was concluded, and when that was written; None if there is no news.

        Raises
        ------
        OSError, ValueError : it cannot be read, or is too short.
        """
        if self.file is None:
            return None
        try:
            found = self.file.stat()
            if self._read == (found.st_mtime, found.st_ino):
                return None
            data = self.file.read_bytes()
        except FileNotFoundError:
            return None
        n_bytes = n_cells * np.dtype(np.int64).itemsize
        cursor = np.frombuffer(data[:n_bytes], np.int64).copy()
        if cursor.size != n_cells:
            raise ValueError("shorter than its counts")
        self._read = (found.st_mtime, found.st_ino)
        return cursor, data[n_bytes:], found.st_mtime

    def forget(self) -> None:
        """Read the file anew when it is next asked for."""
        self._read = None
