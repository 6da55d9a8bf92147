"""Recent rows as counts, and what they say beside the reference: scores with their lines.

Windows are kept as counts of whole blocks: the newest rows, an hour, a day, and all with older
ones weighing less. Nothing here decides on an alarm.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from monitors.channel import Channel, Kind
from monitors.counts import Counts, share
from monitors.distance import (
    hellinger,
    jensen_shannon,
    kolmogorov_smirnov,
    l_infinity,
    psi,
    wasserstein,
)
from monitors.profile import Profile
from monitors.significance import NoDrift, Statistic

Level: TypeAlias = Literal["page", "warning"]
WindowName: TypeAlias = Literal["last", "1h", "24h", "decayed", "total"]
WINDOWS: tuple[WindowName, ...] = get_args(WindowName)
"""The newest rows, the newest hour and day, all rows with older ones weighing less, and all."""

_PIECES = 32
_SLOTS: Mapping[WindowName, tuple[float, int]] = {"1h": (60.0, 60), "24h": (3600.0, 24)}


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A stretch of rows, as counts of every cell of one profile."""

    n_rows: int
    is_partial: bool
    """Whether it holds fewer rows, or less time, than it could."""
    since: float | None
    """Time of the first block in it, in seconds, as far as blocks had one."""
    until: float | None
    """Time of the last block in it."""
    counts: Counts = field(repr=False)
    """(n_cells,) rows per cell of the layout."""


class Windows:
    """Counts of the newest rows, of slots of absolute time, and of everything.

    An hour is 60 slots of a minute and a day 24 of an hour; both hold the slot that is being
    filled and those before it. "last" holds the newest blocks with at least `rows` rows together.
    """

    def __init__(self, n_cells: int, rows: int) -> None:
        self.rows = rows
        self._recent: deque[_Piece] = deque()
        self._n_recent = 0
        self._sum = np.zeros(n_cells, np.int64)
        self._slots = {
            name: (np.full(n, -1, np.int64), np.zeros((n, n_cells + 1), np.int64))
            for name, (_, n) in _SLOTS.items()
        }
        self._decayed = np.zeros(n_cells)
        self._weight = self._weight_squared = 0.0
        self._total = np.zeros(n_cells, np.int64)
        self._n_total = 0
        self._since: float | None = None
        self._until: float | None = None

    def add(self, counts: Counts, n_rows: int, at: float | None) -> None:
        """One more block."""
        if self._since is None:
            self._since = at
        self._until = self._until if at is None else at
        self._total += counts
        self._n_total += n_rows
        keep = 0.5 ** (n_rows / self.rows)
        self._decayed *= keep
        self._decayed += counts
        self._weight = self._weight * keep + n_rows
        self._weight_squared = self._weight_squared * keep**2 + n_rows
        self._sum += counts
        self._n_recent += n_rows
        last = self._recent[-1] if self._recent else None
        if last is not None and last.n_rows + n_rows <= self.rows / _PIECES:
            last.add(counts, n_rows, at)
        else:
            self._recent.append(_Piece(n_rows, at, at, counts.copy()))
        while self._n_recent - self._recent[0].n_rows >= self.rows:
            old = self._recent.popleft()
            self._sum -= old.counts
            self._n_recent -= old.n_rows
        if at is not None:
            for name, (numbers, table) in self._slots.items():
                seconds, n = _SLOTS[name]
                number = int(at // seconds)
                row = number % n
                if numbers[row] < number:
                    numbers[row] = number
                    table[row] = 0
                if numbers[row] == number:
                    table[row, :-1] += counts
                    table[row, -1] += n_rows

    def window(self, name: WindowName) -> Window:
        """One of them as it is now."""
        if name == "last":
            since = self._recent[0].since if self._recent else None
            is_partial = self._n_recent < self.rows
            return Window(self._n_recent, is_partial, since, self._until, self._sum.copy())
        if name == "decayed":
            # As many rows as an even window of the same noise would hold.
            worth = self._weight / self._weight_squared if self._weight_squared else 0.0
            counts = np.rint(self._decayed * worth).astype(np.int64)
            n_rows = round(self._weight * worth)
            return Window(n_rows, n_rows < self.rows, self._since, self._until, counts)
        if name in _SLOTS:
            seconds, n = _SLOTS[name]
            numbers, table = self._slots[name]
            newest = int(self._until // seconds) if self._until is not None else -1
            chosen = numbers > newest - n
            chosen &= numbers >= 0
            sums = table[chosen].sum(axis=0)
            since = None
            if self._until is not None and self._since is not None:
                since = max(self._since, (newest - n + 1) * seconds)
            is_partial = since is None or since > (newest - n + 1) * seconds
            return Window(int(sums[-1]), is_partial, since, self._until, sums[:-1])
        is_partial = False
        return Window(self._n_total, is_partial, self._since, self._until, self._total.copy())

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays by name."""
        pieces = list(self._recent)
        state: dict[str, npt.NDArray[Any]] = {
            "recent": np.array([piece.counts for piece in pieces], np.int64).reshape(
                len(pieces), self._sum.size
            ),
            "recent_rows": np.array([piece.n_rows for piece in pieces], np.int64),
            "recent_times": np.array(
                [(_nan(piece.since), _nan(piece.until)) for piece in pieces]
            ).reshape(len(pieces), 2),
            "decayed": self._decayed,
            "weights": np.array([self._weight, self._weight_squared]),
            "total": self._total,
            "n_total": np.array(self._n_total),
            "times": np.array([_nan(self._since), _nan(self._until)]),
        }
        for name, (numbers, table) in self._slots.items():
            state |= {f"{name}_numbers": numbers, f"{name}_table": table}
        return state

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        self._recent = deque(
            _Piece(int(n), _none(times[0]), _none(times[1]), counts.copy())
            for n, times, counts in zip(
                state["recent_rows"], state["recent_times"], state["recent"], strict=True
            )
        )
        self._n_recent = int(state["recent_rows"].sum())
        self._sum = state["recent"].sum(axis=0, dtype=np.int64)
        self._decayed = state["decayed"].copy()
        self._weight, self._weight_squared = state["weights"].tolist()
        self._total = state["total"].copy()
        self._n_total = int(state["n_total"])
        self._since, self._until = (_none(value) for value in state["times"].tolist())
        self._slots = {
            name: (state[f"{name}_numbers"].copy(), state[f"{name}_table"].copy())
            for name in self._slots
        }


@dataclass(slots=True)
class _Piece:
    """Neighbouring blocks that leave a window together."""

    n_rows: int
    since: float | None
    until: float | None
    counts: Counts

    def add(self, counts: Counts, n_rows: int, at: float | None) -> None:
        self.n_rows += n_rows
        self.until = at
        self.counts += counts


@dataclass(frozen=True, slots=True)
class Score:
    """One number about a channel, and what it would be worth without drift."""

    value: float
    """nan where there are no rows to judge by."""
    line: float
    """What 99 % of windows of this size without drift do not exceed."""

    @property
    def is_above(self) -> bool:
        """Whether the value exceeds what no drift would show."""
        return self.value > self.line


@dataclass(frozen=True, slots=True)
class ChannelReport:
    """What a window says about one channel."""

    name: str
    kind: Kind
    n_rows: int
    """Rows of the window that had this channel."""
    n_reference: int
    scores: Mapping[str, Score]
    bins: tuple[str, ...]
    reference: tuple[float, ...]
    """Share of the reference per bin."""
    current: tuple[float, ...]
    """Share of the window per bin, nan without rows."""
    evidence: float = 1.0
    """The e-value of the channel or of its witness, whichever is larger."""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types; nan becomes None."""
        return {
            "name": self.name,
            "kind": self.kind,
            "n_rows": self.n_rows,
            "n_reference": self.n_reference,
            "scores": {
                name: {
                    "value": _plain(score.value),
                    "line": _plain(score.line),
                    "is_above": score.is_above,
                }
                for name, score in self.scores.items()
            },
            "evidence": self.evidence,
            "bins": list(self.bins),
            "reference": [_plain(value) for value in self.reference],
            "current": [_plain(value) for value in self.current],
        }


@dataclass(slots=True)
class Alarm:
    """A channel whose evidence has crossed the line, from then until it is over."""

    id: int
    """Counts up within one monitor."""
    episode: int
    """The id of the first alarm of those that were raised together: one page."""
    level: Level
    """A page, or the step below, a warning."""
    feature: str
    """The column that it is about; empty when it is about all of them."""
    channel: str
    """The column itself, or the witness of it: `witness:NAME`."""
    segment: str | None
    """The segment it was seen in, None for all rows."""
    evidence: float
    """An e-value: at most 1 in expectation without drift. 40,000 is odds of 40,000 to 1."""
    since: float | None
    """Time of the block with which the evidence began."""
    since_row: int
    at: float | None
    """Time of the block that raised it."""
    row: int
    """Rows seen when it was raised."""
    moved: tuple[tuple[str, float, float], ...]
    """Bins that moved most: label, share in the reference, share of late."""
    acknowledged: float | None = None
    """Time, or number of the row, at which somebody said that it has been seen."""
    acknowledged_row: int | None = None
    closed: float | None = None
    closed_row: int | None = None
    """Rows seen when it was over: the reference explains the rows again. None while it lasts."""
    why_closed: str | None = None
    """back: rows are as before; acknowledged: its hold-off is over, it may be raised again."""

    @property
    def is_open(self) -> bool:
        """Whether it lasts."""
        return self.closed_row is None

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        plain["evidence"] = min(self.evidence, 1e200)
        plain["moved"] = [
            {"bin": label, "reference": before, "current": late}
            for label, before, late in self.moved
        ]
        return plain


@dataclass(frozen=True, slots=True)
class Report:
    """Every channel of one window, and the alarms that are open."""

    window: WindowName
    n_rows: int
    is_partial: bool
    """Whether the window holds fewer rows, or less time, than it could."""
    since: float | None
    until: float | None
    channels: tuple[ChannelReport, ...]
    alarms: tuple[Alarm, ...]
    level: float
    """How much of a page there is; it is raised at 1."""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types; nan becomes None."""
        return {
            "window": self.window,
            "n_rows": self.n_rows,
            "is_partial": self.is_partial,
            "since": self.since,
            "until": self.until,
            "level": self.level,
            "channels": [channel.to_dict() for channel in self.channels],
            "alarms": [alarm.to_dict() for alarm in self.alarms],
        }


class Scorer:
    """Scores any window of one profile; remembers the lines, which cost most."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._reference = profile.counts
        self._channels = [_ScoredChannel(channel) for channel in profile]
        width = profile.width
        # Channels side by side in one table, so that one call scores them all. For the scores of
        # an order, bins without a place in it count as empty and stand still behind the last.
        self._in_order = np.zeros(profile.counts.shape, np.bool_)
        self._within = np.zeros(profile.counts.shape, np.bool_)
        for row, scored in enumerate(self._channels):
            self._within[row, : scored.channel.n_bins] = True
        self._n_cells = int(self._within.sum())
        self._positions = np.zeros((len(self._channels), width))
        for row, scored in enumerate(self._channels):
            self._in_order[row, : scored.channel.n_ordered] = True
            positions = scored.channel.positions
            if positions is not None:
                self._positions[row] = positions[-1]
                self._positions[row, : positions.size] = positions

    def table(self, cells: Counts) -> Counts:
        """(n_channels, width) counts of the columns, as `score` takes them."""
        table = np.zeros(self._reference.shape, np.int64)
        table[self._within] = cells[: self._n_cells]
        return table

    def score(self, table: Counts, evidence: Sequence[float] = ()) -> tuple[ChannelReport, ...]:
        """Describe every channel of a window, given its counts and evidence."""
        if not self._channels:
            return ()
        odds = evidence or [1.0] * len(self._channels)
        reference = self._reference
        ordered_reference = np.where(self._in_order, reference, 0)
        ordered = np.where(self._in_order, table, 0)
        values = {
            "psi": psi(reference, table),
            "jensen_shannon": jensen_shannon(reference, table),
            "kolmogorov_smirnov": kolmogorov_smirnov(ordered_reference, ordered),
            "wasserstein": wasserstein(ordered_reference, ordered, positions=self._positions),
            "hellinger": hellinger(reference, table),
            "l_infinity": l_infinity(reference, table),
        }
        columns = {name: column.tolist() for name, column in values.items()}
        n_rows = table.sum(axis=1).tolist()
        n_ordered = ordered.sum(axis=1).tolist()
        shares = share(table).tolist()
        return tuple(
            scored.report(
                {name: column[row] for name, column in columns.items()},
                table[row],
                shares[row],
                n_rows[row],
                n_ordered[row],
                odds[row],
            )
            for row, scored in enumerate(self._channels)
        )


class _ScoredChannel:
    """One channel with its lines and what does not change from window to window."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        counts = channel.counts
        n_ordered = channel.n_ordered
        statistics = {
            "psi": Statistic(psi, 1.0),
            "jensen_shannon": Statistic(jensen_shannon, 0.5),
            "hellinger": Statistic(hellinger, 0.5),
            "l_infinity": Statistic(l_infinity, 0.5),
        }
        self._share_ordered = float(counts[:n_ordered].sum() / counts.sum())
        if self._share_ordered > 0:
            statistics["kolmogorov_smirnov"] = Statistic(
                partial(_in_order, n_ordered, kolmogorov_smirnov), 0.5
            )
            if channel.positions is not None:
                statistics["wasserstein"] = Statistic(
                    partial(
                        _in_order, n_ordered, partial(wasserstein, positions=channel.positions)
                    ),
                    0.5,
                )
        self.no_drift = NoDrift(counts, channel.doubt, statistics)
        self._n_reference = int(counts.sum())
        self._reference = tuple(share(counts).tolist())

    def report(
        self,
        values: Mapping[str, float],
        counts: Counts,
        shares: list[float],
        n_rows: int,
        n_ordered: int,
        evidence: float,
    ) -> ChannelReport:
        channel = self.channel
        lines = self.no_drift.lines(n_rows)
        scores = {
            "psi": Score(values["psi"], lines["psi"]),
            "jensen_shannon": Score(values["jensen_shannon"], lines["jensen_shannon"]),
        }
        if channel.is_ordered:
            scores |= self._ordered_scores(values, n_ordered)
        scores["hellinger"] = Score(values["hellinger"], lines["hellinger"])
        scores["l_infinity"] = Score(values["l_infinity"], lines["l_infinity"])
        scores["missing_rate"] = self._rate(channel.missing_bins, counts, n_rows)
        if channel.unseen_bin is not None:
            scores["unseen_rate"] = self._rate((channel.unseen_bin,), counts, n_rows)
        return ChannelReport(
            channel.name,
            channel.kind,
            n_rows,
            self._n_reference,
            scores,
            channel.bins,
            self._reference,
            tuple(shares[: channel.n_bins]),
            evidence,
        )

    def _ordered_scores(self, values: Mapping[str, float], n_ordered: int) -> dict[str, Score]:
        """Scores among the rows that have a place in the order.

        Their lines are those of the window in which so many rows would be expected to have one.
        """
        if not n_ordered or not self._share_ordered:
            nothing = Score(math.nan, math.nan)
            return {"kolmogorov_smirnov": nothing, "wasserstein": nothing}
        lines = self.no_drift.lines(max(1, round(n_ordered / self._share_ordered)))
        distance = math.nan
        if "wasserstein" in lines:
            distance = values["wasserstein"]
        return {
            "kolmogorov_smirnov": Score(values["kolmogorov_smirnov"], lines["kolmogorov_smirnov"]),
            "wasserstein": Score(distance, lines.get("wasserstein", math.nan)),
        }

    def _rate(self, bins: tuple[int, ...], counts: Counts, n_rows: int) -> Score:
        if not n_rows:
            return Score(math.nan, math.nan)
        hits = sum(int(counts[number]) for number in bins)
        return Score(hits / n_rows, self.no_drift.rate_line(n_rows, bins))


def _in_order(n_ordered: int, function: Any, reference: Counts, current: Counts) -> Any:
    """A statistic of the first bins only, those that have a place in the order."""
    return function(reference[..., :n_ordered], current[..., :n_ordered])


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
