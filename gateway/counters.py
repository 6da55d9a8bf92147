"""Counts in memory-mapped files: 64-bit integers side by side, one writer each, read by anybody.

A cell is one integer in memory that never moves, so that a hot path holds block and index and adds
to it without a lookup. Seconds are kept as whole nanoseconds: integers add up exactly in any order.

A region is the file of one writing thread. It outlives its process: who takes the dead one's place
opens the same file and goes on counting where it stopped, so that no count ever goes backwards. All
files of a host lie in one directory, and what the host has counted is their sum. Without a file, or
when the disk is full, a region counts in the memory of its process.

The file, little-endian, everything on a multiple of 8 bytes:

    head    64 bytes    magic (16), format number (4), zeros
    entry   16 bytes    checksum (4), bytes of the name (4), number of cells (4), zeros
            name        UTF-8, filled with zeros
            cells       8 bytes each
    entry   ...         until one whose checksum is wrong: nothing was written there yet, or a
                        writer died over it

An entry is only ever added, its checksum (of sizes and name) last. So a reader needs no lock, and a
writer may die at any byte.
"""

import mmap
import os
import struct
import threading
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FORMAT: Final = 1
SUFFIX: Final = ".counts"
_MAGIC = b"driftgate counts"
_HEAD = struct.Struct("<16sI44x")
_ENTRY = struct.Struct("<III4x")
_CHECK = struct.Struct("<I")
_SIZES = struct.Struct("<II")
_CELLS_PER_BLOCK = 1024
_FILE_BYTES_MIN = 65_536
"""A new file's size; a full one is made twice as large."""
_NAME_BYTES_MAX = 65_536


class Counter:
    """A count that only grows."""

    __slots__ = ("at", "cells")

    def __init__(self, cells: "memoryview[int]", at: int) -> None:
        self.cells = cells
        self.at = at

    def add(self, n: int = 1) -> None:
        """Count `n` more."""
        self.cells[self.at] += n

    @property
    def value(self) -> int:
        """The count so far, of this region."""
        return self.cells[self.at]


class Histogram:
    """Counts of values by size, with their sum.

    Cells: one per bound (values <= it and above the one before), one for the rest, one for the sum.
    """

    __slots__ = ("at", "bounds", "cells", "scale")

    def __init__(
        self, cells: "memoryview[int]", at: int, bounds: Sequence[float], scale: int
    ) -> None:
        self.cells = cells
        self.at = at
        self.bounds = bounds
        self.scale = scale

    def observe(self, value: float) -> None:
        """Count one value, in the unit of the bounds."""
        cells, at = self.cells, self.at
        cells[at + bisect_left(self.bounds, value)] += 1
        cells[at + len(self.bounds) + 1] += int(value * self.scale)

    @property
    def counts(self) -> list[int]:
        """(len(bounds) + 1,) values per bin, not cumulated."""
        return list(self.cells[self.at : self.at + len(self.bounds) + 1])

    @property
    def total(self) -> float:
        """Sum of all values, in the unit of the bounds."""
        return self.cells[self.at + len(self.bounds) + 1] / self.scale


class Gauge:
    """A number that may fall, with the time it was set; without one it is absent.

    Cells: nanoseconds of the machine's monotonic clock, or 0; the bits of a double.
    """

    __slots__ = ("at", "cells")

    def __init__(self, cells: "memoryview[int]", at: int) -> None:
        self.cells = cells
        self.at = at

    def set(self, value: float) -> None:
        """Say the number now."""
        self.cells[self.at + 1] = bits_of(value)
        self.cells[self.at] = time.monotonic_ns()

    def clear(self) -> None:
        """Say that there is no such number any more."""
        self.cells[self.at] = 0


def bits_of(value: float) -> int:
    """A double as an integer of the same bits, as the second cell of a gauge holds it."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def gauge_value(cells: Sequence[int]) -> float:
    """The number in a gauge's two cells; it is absent if the first is 0."""
    value: float = struct.unpack("<d", struct.pack("<q", cells[1]))[0]
    return value


class Region:
    """Cells that one thread counts in. It grows; what was handed out stays where it is.

    New series may be asked for from any thread, but each is written to by one only.

    Parameters
    ----------
    file : where the counts are kept; None: in the memory of this process. Nobody else may be
        writing to it: whoever starts processes sees to that.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.problem: str | None = None
        """Why (some of) the counts are in memory although there is a file, for people."""
        self._file = file
        self._lock = threading.Lock()
        self._places: dict[str, tuple[memoryview[int], int, int]] = {}
        self._in_memory: list[str] = []
        self._block: memoryview[int] = memoryview(b"").cast("q")
        self._block_free = 0
        self._map: memoryview = memoryview(b"")
        self._free = 0
        self._handle = -1
        if file is not None:
            try:
                self._open(file)
            except OSError as error:
                self._give_up(error)

    def counter(self, name: str = "") -> Counter:
        """The count of this name, new ones at 0. Without a name: a new one that nobody finds."""
        return Counter(*self._cells(name, 1))

    def histogram(self, bounds: Sequence[float], scale: int, name: str = "") -> Histogram:
        """The same for counts of values; `scale`: steps per unit that the sum is kept in."""
        return Histogram(*self._cells(name, len(bounds) + 2), bounds, scale)

    def gauge(self, name: str) -> Gauge:
        """The same for a number that may fall."""
        return Gauge(*self._cells(name, 2))

    def array(self, name: str, n: int) -> "memoryview[int]":
        """(n,) counts side by side, new ones at 0; numpy makes a writable array of it for free.

        `np.frombuffer(region.array(name, n), np.int64)` is that array. A reader may see an addition
        to several cells half done, but never half a cell.
        """
        view, at = self._cells(name, n)
        return view[at : at + n]

    @property
    def n_series(self) -> int:
        """How many series there are: it only grows."""
        return len(self._places)

    def places(self, start: str) -> "list[tuple[str, memoryview[int], int]]":
        """Where the first cell of every series is whose name starts so, whoever began it."""
        with self._lock:
            places = dict(self._places)
        return [
            (name, view, at) for name, (view, at, _) in places.items() if name.startswith(start)
        ]

    def in_memory(self) -> "Iterator[tuple[str, list[int]]]":
        """Series that no file holds: for readers in this process."""
        with self._lock:
            names = list(self._in_memory)
        for name in names:
            view, at, n = self._places[name]
            yield name, view[at : at + n].tolist()

    def close(self) -> None:
        """Let the file go; what was handed out goes on counting in it."""
        with self._lock, suppress(OSError):
            if self._handle >= 0:
                os.close(self._handle)
            self._handle = -1
            self._file = None

    def _cells(self, name: str, n: int) -> "tuple[memoryview[int], int]":
        with self._lock:
            found = self._places.get(name) if name else None
            if found is not None and found[2] == n:
                return found[0], found[1]
            if found is None and name and self._handle >= 0:
                try:
                    view, at = self._append(name.encode(), n)
                except OSError as error:
                    self._give_up(error)
                else:
                    self._places[name] = (view, at, n)
                    return view, at
            if found is not None:
                self.problem = f"counters: {name} has {found[2]} cells in the file, {n} here"
            view, at = self._take(n)
            if name:
                self._places[name] = (view, at, n)
                self._in_memory.append(name)
            return view, at

    def _take(self, n: int) -> "tuple[memoryview[int], int]":
        """Cells in memory."""
        if self._block_free + n > len(self._block):
            size = max(n, _CELLS_PER_BLOCK)
            self._block = memoryview(bytearray(8 * size)).cast("q")
            self._block_free = 0
        at = self._block_free
        self._block_free += n
        return self._block, at

    def _open(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._handle).st_size
        if size:
            self._remap(size)
            if not _is_begun(self._map):  # Its writer died before the first byte.
                size = 0
            elif not _is_ours(self._map):
                os.close(self._handle)
                aside = file.with_suffix(".aside")
                file.replace(aside)
                self.problem = f"counters: {file.name} is of another format; kept as {aside.name}"
                self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                size = 0
        if not size:
            self._grow(max(_FILE_BYTES_MIN, os.fstat(self._handle).st_size))
            _HEAD.pack_into(self._map, 0, _MAGIC, FORMAT)
        cells = self._map.cast("q")
        self._free = _HEAD.size
        for name, at, n in _entries(self._map, _HEAD.size):
            self._places[name] = (cells, at, n)
            self._free = 8 * (at + n)

    def _append(self, name: bytes, n: int) -> "tuple[memoryview[int], int]":
        """A new entry in the file, with its cells at 0.

        Raises
        ------
        OSError : the file cannot grow.
        """
        if len(name) > _NAME_BYTES_MAX or not n:
            raise ValueError(f"a series of {n} cells with a name of {len(name)} bytes")
        start, at = self._free, self._free + _ENTRY.size + _padded(len(name))
        end = at + 8 * n
        if end > len(self._map):
            self._grow(max(2 * len(self._map), end))
        view = self._map
        # A writer that died here may have left anything.
        view[start:end] = bytes(end - start)
        view[start + _ENTRY.size : start + _ENTRY.size + len(name)] = name
        _SIZES.pack_into(view, start + _CHECK.size, len(name), n)
        _CHECK.pack_into(view, start, _check(name, n))
        self._free = end
        return view.cast("q"), at // 8

    def _grow(self, size: int) -> None:
        """Make the file larger and map it anew; old maps show the same memory and stay valid."""
        # Not truncate: it promises space that is not there, and writing there is a signal, not an
        # error.
        os.posix_fallocate(self._handle, 0, size)
        self._remap(size)

    def _remap(self, size: int) -> None:
        self._map = memoryview(mmap.mmap(self._handle, size))[: size // 8 * 8]

    def _give_up(self, error: OSError) -> None:
        name = self._file.name if self._file is not None else "?"
        self.problem = f"counters: {name}: {os.strerror(error.errno or 0)}; counting in memory"


class HostCounts:
    """What all regions of a directory hold; it remembers where, so that asking again is cheap.

    Parameters
    ----------
    directory : of the files; None: there are none
    own : regions of this process, for what they have in memory
    """

    def __init__(self, directory: Path | None, own: Sequence[Region] = ()) -> None:
        self._directory = directory
        self._own = own
        self._files: dict[str, _Reader] = {}
        self._lock = threading.Lock()
        self.problems: list[str] = []
        """Files that cannot be read, as of the last time somebody asked."""

    def files(self) -> dict[str, dict[str, list[int]]]:
        """Cells by series for every file, by its name without suffix; memory of `own` is ``""``."""
        with self._lock:
            self._look()
            found = {name: reader.series() for name, reader in self._files.items()}
        memory = add_up(dict(region.in_memory()) for region in self._own)
        return {**found, "": memory} if memory else found

    def totals(self) -> dict[str, list[int]]:
        """The sum of all files by series."""
        return add_up(self.files().values())

    def array(self, name: str, *, is_looking: bool = True) -> "npt.NDArray[np.int64] | None":
        """(n,) sum of one series over all files; None: nobody has counted it.

        Without `is_looking` in the files that are known, which is cheap to ask a thousand times.
        """
        import numpy as np  # noqa: PLC0415  the supervisor reads counts too, and stays small

        with self._lock:
            if is_looking:
                self._look()
            found = [reader.cells(name) for reader in self._files.values()]
        parts = [np.frombuffer(cells, np.int64) for cells in found if cells is not None]
        for region in self._own:
            parts += [np.array(cells) for known, cells in region.in_memory() if known == name]
        if not parts:
            return None
        same = [part for part in parts if len(part) == len(parts[0])]
        total: npt.NDArray[np.int64] = np.sum(same, axis=0)
        return total

    def _look(self) -> None:
        """Open files that are new, or that took another one's place; forget those that are gone."""
        self.problems = []
        files = sorted(self._directory.glob(f"*{SUFFIX}")) if self._directory is not None else []
        known, self._files = self._files, {}
        for file in files:
            name = file.name.removesuffix(SUFFIX)
            try:
                reader = known.get(name)
                if reader is None or not reader.is_of(os.stat(file)):  # noqa: PTH116  compared
                    reader = _Reader(file)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                self.problems.append(f"counters: {file.name}: {error}")
                continue
            self._files[name] = reader


class _Reader:
    """One file, read while somebody writes to it.

    Raises
    ------
    FileNotFoundError : it is not there, or nobody has written to it yet.
    ValueError : it is no file of counts, or of a newer format.
    """

    def __init__(self, file: Path) -> None:
        self._handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self._handle)
        self._identity = (found.st_dev, found.st_ino)
        self._map = self._mapped(found.st_size) if found.st_size else memoryview(b"")
        if not _is_begun(self._map):
            raise FileNotFoundError
        if not _is_ours(self._map):
            raise ValueError("not a file of counts of this release")
        self._places: dict[str, tuple[int, int]] = {}
        self._free = _HEAD.size

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def is_of(self, found: os.stat_result) -> bool:
        """Whether this is the file that was looked up."""
        return self._identity == (found.st_dev, found.st_ino)

    def series(self) -> dict[str, list[int]]:
        """Cells of every series so far."""
        self.look()
        cells = self._map.cast("q")
        return {name: cells[at : at + n].tolist() for name, (at, n) in self._places.items()}

    def look(self) -> None:
        """See the entries that are new."""
        if (size := os.fstat(self._handle).st_size) > len(self._map) + 7:
            self._map = self._mapped(size)
        for name, at, n in _entries(self._map, self._free):
            self._places[name] = (at, n)
            self._free = 8 * (at + n)

    def cells(self, name: str) -> "memoryview[int] | None":
        """Cells of one series, as they are and will be; None: it is not in the file."""
        if name not in self._places:
            self.look()
        if name not in self._places:
            return None
        at, n = self._places[name]
        return self._map.cast("q")[at : at + n]

    def _mapped(self, size: int) -> memoryview:
        return memoryview(mmap.mmap(self._handle, size, access=mmap.ACCESS_READ))[: size // 8 * 8]


def host_totals(run_dir: Path) -> dict[str, list[int]]:
    """Every series that processes with this run directory have counted, added up."""
    return HostCounts(directory(run_dir)).totals()


def host_array(run_dir: Path, name: str) -> "npt.NDArray[np.int64] | None":
    """(n,) sum of one array over all workers; None: nobody has counted it."""
    return HostCounts(directory(run_dir)).array(name)


def directory(run_dir: Path) -> Path:
    """Where the files of counts are."""
    return run_dir / "counters"


def file_of(run_dir: Path, slot: str, thread: str) -> Path:
    """The file that one thread of the worker in a slot counts in."""
    return directory(run_dir) / f"{slot}-{thread}{SUFFIX}"


def begin(run_dir: Path) -> None:
    """Count from zero: for whoever starts the first worker of a host, while none runs."""
    for file in directory(run_dir).glob(f"*{SUFFIX}"):
        with suppress(OSError):
            file.unlink()


def add_up(parts: Iterable[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Cell by cell, by series. Of series that differ in length, the first one's counts."""
    total: dict[str, list[int]] = {}
    for series in parts:
        for name, cells in series.items():
            before = total.get(name)
            if before is None:
                total[name] = cells
            elif len(before) == len(cells):
                total[name] = [a + b for a, b in zip(before, cells, strict=True)]
    return total


def _is_begun(view: memoryview) -> bool:
    return any(view[: _HEAD.size])


def _is_ours(view: memoryview) -> bool:
    return len(view) >= _HEAD.size and _HEAD.unpack_from(view) == (_MAGIC, FORMAT)


def _entries(view: memoryview, start: int) -> "Iterator[tuple[str, int, int]]":
    """Name, index of the first cell, and number of cells of every whole entry."""
    while start + _ENTRY.size <= len(view):
        check, name_bytes, n = _ENTRY.unpack_from(view, start)
        at = start + _ENTRY.size + _padded(name_bytes)
        end = at + 8 * n
        if not check or name_bytes > _NAME_BYTES_MAX or not n or end > len(view):
            return
        name = bytes(view[start + _ENTRY.size : start + _ENTRY.size + name_bytes])
        if check != _check(name, n):
            return
        yield name.decode("utf-8", "replace"), at // 8, n
        start = end


def _check(name: bytes, n: int) -> int:
    return zlib.crc32(_SIZES.pack(len(name), n) + name) or 1


def _padded(size: int) -> int:
    return (size + 7) // 8 * 8
