"""All of the room behind three names: update(rows), report(), counts.

Rows go in as blocks of columns and are kept as counts in tumbling windows. Not for several threads
at once: the owner calls it from one, or holds a lock.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from monitors.channel import Channel, Column, as_column
from monitors.counts import MonitorCounts
from monitors.errors import BlockError
from monitors.profile import Profile
from monitors.window import Alarm, Report, Scorer, Window

PSI_MIN = 0.25
"""Smallest index that raises an alarm: the trade's word for a major change."""
EPISODES_MAX = 1000
"""Episodes that are remembered, oldest dropped first."""
UNKNOWN_MAX = 100
"""Names of unknown columns that are remembered."""

_ROWS_AT_ONCE = 8192


@dataclass(slots=True)
class Episode:
    """An alarm from its opening to its end."""

    alarm: Alarm
    opened: int
    """Number of the window that raised it."""
    closed: int | None = None
    """Number of the window that was below again; None while it lasts."""


class Monitor:
    """Counts rows into the bins of a reference profile, and says when they have drifted.

    An alarm is raised for a channel whose psi is at least 0.25 and above its own no-drift line in
    two closed windows running. It opens once, lasts as long as the condition does and closes with
    the first closed window that is below; a window without rows of the channel says nothing.
    """

    def __init__(self, profile: Profile, window_rows: int = 1000) -> None:
        if window_rows < 1:
            raise BlockError(f"window_rows = {window_rows}: must be at least 1")
        self.profile = profile
        self.window_rows = window_rows
        self._scorer = Scorer(profile)
        self._places: dict[str, tuple[int, Channel]] = {
            name: (row * profile.width, channel)
            for row, (name, channel) in enumerate(profile.channels.items())
        }
        self._names = list(profile.channels)
        self._unknown: dict[str, None] = {}
        self._closed = np.zeros(profile.counts.shape, np.int64)
        self._current = np.zeros(profile.counts.shape, np.int64)
        self._n_current = 0
        self._n_closed = 0
        self._n_windows = 0
        self._times: tuple[float | None, float | None] = (None, None)
        self._first_time: float | None = None
        self._last_time: float | None = None
        self._last: Window | None = None
        self._begun: dict[int, int] = {}
        self._open: dict[int, Episode] = {}
        self._episodes: deque[Episode] = deque(maxlen=EPISODES_MAX)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of columns that came and that the profile does not have, the first hundred."""
        return tuple(self._unknown)

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Alarms that are open, in the order of the channels."""
        return tuple(self._open[row].alarm for row in sorted(self._open))

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """Alarms open and closed, oldest first."""
        return tuple(self._episodes)

    @property
    def counts(self) -> MonitorCounts:
        """Every row since the start, per channel and bin."""
        table = self._closed + self._current
        table.flags.writeable = False
        return MonitorCounts(
            self.profile.digest,
            self._n_closed + self._n_current,
            {
                name: table[row, : channel.n_bins]
                for row, (name, channel) in enumerate(self.profile.channels.items())
            },
        )

    def update(self, columns: Mapping[str, npt.ArrayLike], at: float | None = None) -> list[Window]:
        """Count a block of rows; the windows that it closed.

        Parameters
        ----------
        columns : name -> (n_rows,) values of any type. Channels without a column are not counted
            for these rows; columns without a channel are only noted in `unknown`.
        at : time of the block in seconds, recorded and not interpreted

        Raises
        ------
        BlockError : columns of channels differ in length; then nothing has been counted.
        """
        block: list[tuple[int, Channel, Column]] = []
        for name, values in columns.items():
            place = self._places.get(name)
            if place is None:
                if len(self._unknown) < UNKNOWN_MAX:
                    self._unknown[name] = None
            else:
                block.append((*place, as_column(values)))
        if not block:
            return []
        n_rows = block[0][2].size
        for _, channel, column in block:
            if column.size != n_rows:
                raise BlockError(
                    f"column {channel.name!r} has {column.size} rows,"
                    f" column {block[0][1].name!r} has {n_rows}"
                )
        windows: list[Window] = []
        offsets = np.array([offset for offset, _, _ in block], np.intp)[:, np.newaxis]
        for start in range(0, n_rows, _ROWS_AT_ONCE):
            stop = min(n_rows, start + _ROWS_AT_ONCE)
            cells = np.empty((len(block), stop - start), np.intp)
            for row, (_, channel, column) in enumerate(block):
                part = column if stop - start == n_rows else column[start:stop]
                cells[row] = channel.place(part)
            cells += offsets
            windows += self._count(cells, at)
        return windows

    def report(self, window: Literal["last", "current", "total"] = "last") -> Report:
        """Score a window: the newest closed one, the one being filled, or all rows so far.

        While no window has closed, "last" is the one being filled; `is_partial` says so.
        """
        if window == "last" and self._last is not None:
            chosen, is_partial = self._last, False
        elif window == "total":
            chosen, is_partial = self._total(), False
        elif window in {"last", "current"}:
            chosen, is_partial = self._filling(), True
        else:
            raise BlockError(f"window {window!r}: must be last, current or total")
        return Report(
            window,
            chosen.n_rows,
            is_partial,
            chosen.index,
            chosen.since,
            chosen.until,
            self._scorer.score(chosen.table),
            self.alarms,
        )

    def _count(self, cells: npt.NDArray[np.intp], at: float | None) -> list[Window]:
        """Add rows given as cells of the table, cut exactly where windows end."""
        windows: list[Window] = []
        n_rows = cells.shape[1]
        start = 0
        while start < n_rows:
            stop = min(n_rows, start + self.window_rows - self._n_current)
            part = cells if stop - start == n_rows else cells[:, start:stop]
            self._current += np.bincount(part.ravel(), minlength=self._current.size).reshape(
                self._current.shape
            )
            self._n_current += stop - start
            if at is not None:
                first = self._times[0]
                self._times = (at if first is None else first, at)
            if self._n_current == self.window_rows:
                windows.append(self._close())
            start = stop
        return windows

    def _close(self) -> Window:
        window = self._filling()
        self._n_windows += 1
        self._closed += self._current
        self._n_closed += self._n_current
        if self._first_time is None:
            self._first_time = window.since
        self._last_time = self._last_time if window.until is None else window.until
        self._current = np.zeros_like(self._current)
        self._n_current = 0
        self._times = (None, None)
        self._last = window
        self._judge(window)
        return window

    def _judge(self, window: Window) -> None:
        """Open and close alarms by what a closed window shows."""
        scores = self._scorer.psi(window.table)
        n_rows = window.table.sum(axis=1)
        for row in np.flatnonzero(scores < PSI_MIN).tolist():
            self._end(row, window)
        for row in np.flatnonzero(scores >= PSI_MIN).tolist():
            value, line = float(scores[row]), self._scorer.psi_line(row, int(n_rows[row]))
            if value <= line:
                self._end(row, window)
            elif row not in self._begun:
                self._begun[row] = window.index
            elif row not in self._open:
                alarm = Alarm(
                    channel=self._names[row],
                    statistic="psi",
                    value=value,
                    line=line,
                    window=window.index,
                    since=self._begun[row],
                    at=window.until,
                )
                self._open[row] = Episode(alarm, window.index)
                self._episodes.append(self._open[row])

    def _end(self, row: int, window: Window) -> None:
        self._begun.pop(row, None)
        episode = self._open.pop(row, None)
        if episode is not None:
            episode.closed = window.index

    def _filling(self) -> Window:
        return Window(
            self._n_windows + 1, self._n_current, *self._times, _frozen_copy(self._current)
        )

    def _total(self) -> Window:
        since, until = self._times
        return Window(
            self._n_windows,
            self._n_closed + self._n_current,
            since if self._first_time is None else self._first_time,
            self._last_time if until is None else until,
            _frozen_copy(self._closed + self._current),
        )


def _frozen_copy(table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    copied = table.copy()
    copied.flags.writeable = False
    return copied
