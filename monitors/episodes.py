"""Alarms from raised to over: which of them are one episode, and when a channel is let go again.

Detectors say when a channel crosses its line; this says what that is to people. An alarm is open
until it is over, or its hold-off after an acknowledgement is; alarms of one level that are raised
within a hold-off of the first are one episode, and one page.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from monitors.budget import DAY_S, Budget
from monitors.detector import Finding
from monitors.errors import BlockError
from monitors.window import Alarm

EPISODES_MAX = 1000
"""Alarms that are remembered, oldest closed ones dropped first."""

_HOLD_OFFS = 90


class Episodes:
    """The alarms of one monitor, in the order in which they were raised."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._alarms: deque[Alarm] = deque()
        self._n_alarms = 0
        self.n_rows = 0
        """Rows judged so far: kept by whoever judges."""
        self.at: float | None = None
        """Time of the newest block, likewise."""

    def __iter__(self) -> Iterator[Alarm]:
        return iter(tuple(self._alarms))

    @property
    def open(self) -> tuple[Alarm, ...]:
        """Alarms that last, pages first, oldest first."""
        lasting = (alarm for alarm in self._alarms if alarm.is_open)
        return tuple(sorted(lasting, key=lambda alarm: (alarm.level != "page", alarm.id)))

    def add(
        self, finding: Finding, *, channel: str, feature: str, segment: str | None = None
    ) -> Alarm:
        """Raise an alarm about a channel, in the episode that is on if there is one."""
        # A warning of the same channel becomes a page; it is not two alarms.
        self.close(channel, segment, "page")
        self._n_alarms += 1
        first = next(
            (
                alarm
                for alarm in reversed(self._alarms)
                if alarm.level == finding.level
                and alarm.id == alarm.episode
                and self._is_within(alarm.at, alarm.row)
            ),
            None,
        )
        alarm = Alarm(
            id=self._n_alarms,
            episode=self._n_alarms if first is None else first.id,
            level=finding.level,
            feature=feature,
            channel=channel,
            segment=segment,
            evidence=finding.evidence,
            since=finding.since,
            since_row=finding.since_row,
            at=finding.at,
            row=self.n_rows,
            moved=finding.moved,
        )
        self._alarms.append(alarm)
        if len(self._alarms) > EPISODES_MAX:
            self._alarms.remove(next((a for a in self._alarms if not a.is_open), self._alarms[0]))
        return alarm

    def close(self, channel: str, segment: str | None, why: str) -> None:
        """The alarms of a channel are over."""
        for alarm in self._alarms:
            if alarm.is_open and alarm.segment == segment and alarm.channel == channel:
                alarm.closed, alarm.closed_row, alarm.why_closed = self.at, self.n_rows, why

    def expire(self) -> Iterator[Alarm]:
        """Alarms that were acknowledged a hold-off ago.

        Whoever is given one closes it, and lets its channel raise alarms again.
        """
        for alarm in self._alarms:
            if (
                alarm.is_open
                and alarm.acknowledged_row is not None
                and not self._is_within(alarm.acknowledged, alarm.acknowledged_row)
            ):
                yield alarm

    def acknowledge(self, alarm_id: int, at: float | None) -> Alarm:
        """Somebody has seen it.

        Raises
        ------
        BlockError : there is no open alarm of that number.
        """
        for alarm in self._alarms:
            if alarm.id == alarm_id and alarm.is_open:
                alarm.acknowledged = at if at is not None else self.at
                alarm.acknowledged_row = self.n_rows
                return alarm
        raise BlockError(f"there is no open alarm {alarm_id}")

    def state(self) -> dict[str, Any]:
        """Everything that a restart must not lose, in plain JSON types."""
        return {
            "n_alarms": self._n_alarms,
            "alarms": [
                {name: getattr(alarm, name) for name in Alarm.__slots__} for alarm in self._alarms
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; KeyError or TypeError for anything else."""
        self._n_alarms = state["n_alarms"]
        self._alarms = deque(
            Alarm(**{**alarm, "moved": tuple(tuple(moved) for moved in alarm["moved"])})
            for alarm in state["alarms"]
        )

    def _hold_off(self) -> tuple[float, float]:
        """Seconds and rows; one of them is what the budget counts in."""
        if self._budget.days is not None:
            return self._budget.days * DAY_S / _HOLD_OFFS, np.inf
        assert self._budget.rows is not None  # noqa: S101  one of the two is set
        return np.inf, self._budget.rows / _HOLD_OFFS

    def _is_within(self, since: float | None, since_row: int) -> bool:
        """Whether the hold-off has not passed since then."""
        seconds, rows = self._hold_off()
        if self.n_rows - since_row >= rows:
            return False
        return since is None or self.at is None or self.at - since < seconds
