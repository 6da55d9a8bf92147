"""Recent rows as counts, and what they say beside the reference: scores with their lines.

A window is filled elsewhere; here it is only described. Nothing here decides on an alarm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

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


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A stretch of rows, as counts of every channel of one profile."""

    index: int
    """Number of the window, from 1."""
    n_rows: int
    since: float | None
    """Time of the first block in it, in seconds, as far as blocks had one."""
    until: float | None
    """Time of the last block in it."""
    table: Counts = field(repr=False)
    """(n_channels, width) rows per bin, as in Profile.counts."""


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
            "bins": list(self.bins),
            "reference": [_plain(value) for value in self.reference],
            "current": [_plain(value) for value in self.current],
        }


@dataclass(frozen=True, slots=True)
class Alarm:
    """A channel that has drifted, by the rule that the monitor states."""

    channel: str
    statistic: str
    value: float
    """Score of the window that raised the alarm."""
    line: float
    window: int
    """Number of the window that raised it."""
    since: int
    """Number of the window that began it."""
    at: float | None
    """Time of the last block of the window that raised it."""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "channel": self.channel,
            "statistic": self.statistic,
            "value": _plain(self.value),
            "line": _plain(self.line),
            "window": self.window,
            "since": self.since,
            "at": self.at,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """Every channel of one window, and the alarms that are open."""

    window: str
    """Which one was asked for: last, current or total."""
    n_rows: int
    is_partial: bool
    """Whether the window was still being filled."""
    index: int
    since: float | None
    until: float | None
    channels: tuple[ChannelReport, ...]
    alarms: tuple[Alarm, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types; nan becomes None."""
        return {
            "window": self.window,
            "n_rows": self.n_rows,
            "is_partial": self.is_partial,
            "index": self.index,
            "since": self.since,
            "until": self.until,
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
        self._positions = np.zeros((len(self._channels), width))
        for row, scored in enumerate(self._channels):
            self._in_order[row, : scored.channel.n_ordered] = True
            positions = scored.channel.positions
            if positions is not None:
                self._positions[row] = positions[-1]
                self._positions[row, : positions.size] = positions

    def psi(self, table: Counts) -> npt.NDArray[np.float64]:
        """(n_channels,) population stability index; nan for a channel without rows."""
        scores: npt.NDArray[np.float64] = psi(self._reference, table)
        return scores

    def psi_line(self, row: int, n_rows: int) -> float:
        """What psi of that channel stays below without drift."""
        return self._channels[row].no_drift.lines(n_rows)["psi"]

    def score(self, table: Counts) -> tuple[ChannelReport, ...]:
        """Describe every channel of a window, given its counts."""
        if not self._channels:
            return ()
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
