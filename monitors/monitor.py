"""All of the room behind three names: update(rows), report(), counts.

Rows go in as blocks of columns, become counts, and counts become evidence, alarms and windows.
Whoever counts elsewhere folds counts in by himself. Not for several threads at once: the owner
calls it from one, or holds a lock.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from monitors import season
from monitors.budget import Budget, Purpose, divide
from monitors.counts import Counts, MonitorCounts
from monitors.detector import Detector, Finding
from monitors.episodes import Episodes
from monitors.errors import BlockError
from monitors.profile import Profile
from monitors.window import WINDOWS, Alarm, Report, Scorer, WindowName, Windows

BLOCK_ROWS = 50
"""Rows after which a block is judged, if the time is not up before."""
BLOCK_S = 1.0
"""Seconds after which a block is judged, however few its rows are."""
UNKNOWN_MAX = 100
"""Names of unknown columns that are remembered."""

_BLOCK_ROWS_MAX = 500
_STATE_FORMAT = 1


class Monitor:
    """Counts rows into the bins of a reference profile, and says when they have drifted.

    Parameters
    ----------
    profile : the reference
    budget : false alarms that may be raised in a period; one page in 90 days by default
    tolerance : distance from the reference, in units of psi, that is no drift
    window_rows : rows of the window "last", and half-life of "decayed"

    Notes
    -----
    The promise: while rows stay within the tolerance of the reference, and follow each other as
    closely as the reference's did, the expected number of alarms in any period is at most the
    budget's, whenever one looks, whatever the number of channels and what they depend on.

    An alarm holds its channel until rows are explained by the reference again, as clearly as they
    were not, or until the hold-off after somebody has acknowledged it: a day under the default
    budget, in general a ninetieth of the period. Alarms raised within that time of the first are
    one episode: one page.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        budget: Budget | None = None,
        tolerance: float = 0.01,
        window_rows: int = 1000,
    ) -> None:
        if window_rows < 1:
            raise BlockError(f"window_rows = {window_rows}: must be at least 1")
        self.profile = profile
        self.budget = budget or Budget()
        self.tolerance = tolerance
        self.window_rows = window_rows
        self._scorer = Scorer(profile)
        self._layers = _layers(profile)
        values = list(profile.segments.counts) if profile.segments is not None else []
        purposes: dict[str | None, Purpose] = {None: "serving"}
        for value in values:
            purposes[value] = "segments"
        self._shares = divide(purposes)
        self._detectors = {
            value: Detector(
                profile.layout if value is None else profile.of_segment(value),
                self.budget.part(part),
                tolerance=tolerance,
            )
            for value, part in self._shares.items()
        }
        self.windows = Windows(profile.layout.n_cells, window_rows)
        self._pending = np.zeros((self.n_layers, profile.layout.n_cells), np.int64)
        self._n_pending = 0
        self._pending_since: float | None = None
        self._n_rows = 0
        self._at: float | None = None
        self._unknown: dict[str, None] = {}
        self._episodes = Episodes(self.budget)

    @property
    def n_layers(self) -> int:
        """Segments that rows are counted apart by, and the rest; 1 without segments."""
        return 1 if self._layers is None else self._layers[2]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of columns that came and that the profile does not have, the first hundred."""
        return tuple(self._unknown)

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Alarms that are open, pages first, oldest first."""
        return self._episodes.open

    @property
    def episodes(self) -> tuple[Alarm, ...]:
        """Alarms open and closed, oldest first."""
        return tuple(self._episodes)

    @property
    def n_rows(self) -> int:
        """Rows seen, judged or not yet."""
        return self._n_rows + self._n_pending

    @property
    def at(self) -> float | None:
        """Time of the newest rows, as far as it was told."""
        return self._at

    @property
    def counts(self) -> MonitorCounts:
        """Every row since the start, per column and bin."""
        cells = self.windows.window("total").counts + self._pending.sum(axis=0)
        table: dict[str, Counts] = {}
        for k, (name, channel) in enumerate(self.profile.channels.items()):
            start = int(self.profile.layout.starts[k])
            table[name] = cells[start : start + channel.n_bins]
            table[name].flags.writeable = False
        return MonitorCounts(self.profile.digest, self.n_rows, table)

    @property
    def evidence(self) -> dict[str, float]:
        """E-value of every channel, witnesses included, over all rows."""
        detector = self._detectors[None]
        return dict(zip(self.profile.layout.names, detector.evidence.tolist(), strict=True))

    def count(self, columns: Mapping[str, npt.ArrayLike]) -> tuple[int, Counts]:
        """Count rows without judging them: for a worker whose counts are merged elsewhere.

        Returns
        -------
        Number of rows; (n_layers, n_cells) counts that `fold` takes. Sums of such counts are
        the counts of all the rows, exactly.
        """
        rows = self._known(columns)
        if not rows:
            return 0, np.zeros_like(self._pending)
        counts = self.profile.binner.count(rows, layers=self._layers)[0]
        return next(iter(rows.values())).size, counts

    def update(self, columns: Mapping[str, npt.ArrayLike], at: float | None = None) -> list[Alarm]:
        """Count rows and judge the blocks that they complete; the alarms that were raised.

        A block is complete with 50 rows, or when a second has passed since its first; rows that
        come together are cut into blocks of 500 at most.

        Parameters
        ----------
        columns : name -> (n_rows,) values of any type. Channels without a column are not counted
            for these rows; columns without a channel are only noted in `unknown`.
        at : time of the rows in seconds since 1970 (UTC); not needed under a budget in rows

        Raises
        ------
        BlockError : columns of channels differ in length, or a time is needed; then nothing has
            been counted.
        """
        self._check_time(at)
        rows = self._known(columns)
        if not rows:
            return []
        n_rows = next(iter(rows.values())).size
        raised: list[Alarm] = []
        is_late = (
            at is not None
            and self._pending_since is not None
            and self._n_pending
            and (at - self._pending_since >= BLOCK_S or self._slot(at) != self._slot(self._at))
        )
        if is_late:
            raised += self._complete()
        stops, start = [], 0
        while n_rows - start > _BLOCK_ROWS_MAX:
            start += _BLOCK_ROWS_MAX
            stops.append(start)
        stops.append(n_rows)
        blocks = self.profile.binner.count(rows, stops, self._layers)
        for block, begin, stop in zip(blocks, [0, *stops], stops, strict=False):
            self._pending += block
            self._n_pending += stop - begin
            if self._pending_since is None:
                self._pending_since = at
            self._at = at if at is not None else self._at
            if self._n_pending >= BLOCK_ROWS:
                raised += self._complete()
        return raised

    def fold(self, counts: Counts, n_rows: int, at: float | None = None) -> list[Alarm]:
        """Judge one block that was counted elsewhere.

        Parameters
        ----------
        counts : (n_layers, n_cells) rows of the block, from `count`, of any number of workers
        n_rows : of the block
        at : as in `update`
        """
        self._check_time(at)
        if n_rows <= 0:
            return []
        total = counts.sum(axis=0)
        self.windows.add(total, n_rows, at)
        self._n_rows += n_rows
        self._at = at if at is not None else self._at
        self._episodes.n_rows, self._episodes.at = self._n_rows, self._at
        slot = self._slot(at)
        raised: list[Alarm] = []
        values = [None, *(v for v in self._detectors if v is not None)]
        for k, value in enumerate(values):
            block = total if value is None else counts[k - 1]
            detector = self._detectors[value]
            findings, over = detector.fold(block, at=at, slot=slot if value is None else None)
            for channel in over:
                self._episodes.close(self.profile.layout.names[channel], value, "back")
            raised += [self._raise(value, finding) for finding in findings]
        self._expire()
        return raised

    def spend(self, share: float) -> None:
        """Have this share of the budget from now on; what was spent before stays spent."""
        self.budget = self.budget.with_share(share)
        for value, detector in self._detectors.items():
            detector.spend(self.budget.part(self._shares[value]))

    def flush(self) -> list[Alarm]:
        """Judge the rows that wait for their block to be complete."""
        return self._complete() if self._n_pending else []

    def report(self, window: WindowName = "last") -> Report:
        """Score a window: "last" rows, "1h", "24h", "decayed", or "total".

        Rows that wait for their block to be complete are in none of them.
        """
        if window not in WINDOWS:
            raise BlockError(f"window {window!r}: must be one of {', '.join(WINDOWS)}")
        chosen = self.windows.window(window)
        detector = self._detectors[None]
        odds = detector.evidence
        by_feature: dict[str, float] = {}
        for feature, value in zip(self.profile.layout.features, odds.tolist(), strict=True):
            by_feature[feature] = max(value, by_feature.get(feature, 0.0))
        evidence = [by_feature[name] for name in self.profile.channels]
        return Report(
            window,
            chosen.n_rows,
            chosen.is_partial,
            chosen.since,
            chosen.until,
            self._scorer.score(self._scorer.table(chosen.counts), evidence),
            tuple(replace(alarm) for alarm in self.alarms),
            float(detector.level[0]),
        )

    def acknowledge(self, alarm_id: int, at: float | None = None) -> Alarm:
        """Say that an alarm has been seen: it stays quiet for its hold-off, then may come again.

        Raises
        ------
        BlockError : there is no open alarm of that number.
        """
        return self._episodes.acknowledge(alarm_id, at)

    def rebased(self, window: WindowName, lineage: Mapping[str, object]) -> Profile:
        """A profile with a window's rows as the reference: the new normal.

        Raises
        ------
        ProfileError : the window holds no rows.
        """
        return self.profile.rebased(self.windows.window(window).counts, lineage)

    def to_bytes(self) -> bytes:
        """Everything that it has seen and concluded; `restore` goes on from there."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for k, detector in enumerate(self._detectors.values()):
            arrays |= {f"detector{k}.{name}": array for name, array in detector.state().items()}
        arrays |= {f"windows.{name}": array for name, array in self.windows.state().items()}
        arrays["pending"] = self._pending
        about = {
            "format": _STATE_FORMAT,
            "profile": self.profile.digest,
            "n_rows": self._n_rows,
            "n_pending": self._n_pending,
            "pending_since": self._pending_since,
            "at": self._at,
            **self._episodes.state(),
        }
        arrays["about"] = np.frombuffer(json.dumps(about).encode("utf-8"), np.uint8)
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        return stream.getvalue()

    def restore(self, state: bytes) -> None:
        """Go on from what `to_bytes` gave, to the last bit.

        Raises
        ------
        BlockError : it is of another profile, of another format, or damaged.
        """
        try:
            with np.load(io.BytesIO(state), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(arrays.pop("about").tobytes())
            if about["format"] != _STATE_FORMAT or about["profile"] != self.profile.digest:
                raise BlockError("state of a monitor: it is of another format or profile")
            for k, detector in enumerate(self._detectors.values()):
                head = f"detector{k}."
                detector.restore(
                    {
                        name.removeprefix(head): a
                        for name, a in arrays.items()
                        if name[: len(head)] == head
                    }
                )
            self.windows.restore(
                {n.removeprefix("windows."): a for n, a in arrays.items() if n[:8] == "windows."}
            )
            self._pending = arrays["pending"].reshape(self._pending.shape).copy()
            self._n_rows, self._n_pending = about["n_rows"], about["n_pending"]
            self._pending_since, self._at = about["pending_since"], about["at"]
            self._episodes.restore(about)
            self._episodes.n_rows, self._episodes.at = self._n_rows, self._at
        except (ValueError, KeyError, TypeError, OSError, BadZipFile, EOFError) as error:
            raise BlockError(f"state of a monitor: cannot be read ({error})") from error

    # -- inside

    def _known(self, columns: Mapping[str, npt.ArrayLike]) -> dict[str, npt.NDArray[Any]]:
        for name in columns.keys() - self.profile.channels.keys():
            if self.profile.binner.is_summarised(name):
                continue
            if len(self._unknown) < UNKNOWN_MAX:
                self._unknown[name] = None
        return self.profile.binner.rows(columns)

    def _check_time(self, at: float | None) -> None:
        if at is None and self.budget.days is not None:
            raise BlockError("a budget in days needs the time of the rows: update(columns, at=...)")

    def _slot(self, at: float | None) -> int | None:
        slots = self.profile.layout.n_slots
        return None if at is None or not slots else season.slot_of(at, slots)

    def _complete(self) -> list[Alarm]:
        counts, n_rows, at = self._pending, self._n_pending, self._at
        self._pending = np.zeros_like(counts)
        self._n_pending = 0
        self._pending_since = None
        return self.fold(counts, n_rows, at)

    def _raise(self, value: str | None, finding: Finding) -> Alarm:
        layout = self.profile.layout
        return self._episodes.add(
            finding,
            channel=layout.names[finding.channel],
            feature=layout.features[finding.channel],
            segment=value,
        )

    def _expire(self) -> None:
        """Let channels raise alarms again whose acknowledged alarm has been quiet long enough."""
        for alarm in self._episodes.expire():
            channel = self.profile.layout.names.index(alarm.channel)
            self._detectors[alarm.segment].rearm(channel)
            self._episodes.close(alarm.channel, alarm.segment, "acknowledged")


def _layers(profile: Profile) -> tuple[str, npt.NDArray[np.intp], int] | None:
    """The column that rows are counted apart by, and the layer of each of its bins."""
    if profile.segments is None:
        return None
    channel = profile.channels[profile.segments.field]
    values = list(profile.segments.counts)
    places = {label: values.index(label) for label in channel.bins if label in values}
    table = np.array([places.get(label, len(values)) for label in channel.bins], np.intp)
    return profile.segments.field, table, len(values) + 1
