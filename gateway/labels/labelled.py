"""One version whose labels are judged: its reference, its monitor, and what they say."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.alarms import Crossing
from gateway.counters import Counter
from gateway.labels.pairs import pairs_of, task_of
from gateway.labels.rows import Evidence, Joined
from gateway.labels.target import Target
from gateway.telemetry import event
from monitors import Alarm, Budget, MonitorError
from monitors.cbpe import Calibration
from monitors.loss import LossReference
from monitors.loss_monitor import BLOCK_ROWS_MAX, LossMonitor

MONITOR = "labels:"
"""What names of such monitors begin with, in the log of alarms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the labels of a model are judged."""

    alarms: float
    days: float
    rows: float
    """The period in rows; 0: in days."""
    share: float
    """Of the budget, that is spent here: all of it where one database serves all hosts."""
    tolerance: float
    mature_s: float
    """A prediction is judged when it is so old: its label may come late."""
    adopt_rows: int
    """So many first labelled predictions become the reference; 0: somebody accepts some."""

    def budget(self, share: float) -> Budget:
        """Of labels, which have this share of the model's."""
        return Budget(
            alarms=self.alarms,
            days=None if self.rows else self.days,
            rows=self.rows or None,
            share=self.share * share,
        )


@dataclass(frozen=True, slots=True)
class JudgeMeters:
    """What is counted about one version, by the judge's thread."""

    judged: Counter
    pages: Counter
    warnings: Counter


@dataclass(frozen=True, slots=True)
class View:
    """What is known about one version, for whoever asks."""

    about: dict[str, Any]
    """In plain JSON types."""
    calibration: Calibration | None = None
    evidence: dict[str, float] = field(default_factory=dict)
    """By channel."""
    losses: dict[str, float] = field(default_factory=dict)
    """Mean of late, and in the reference."""
    n_open: int = 0


class Labelled:
    """One version. Used by one thread at a time."""

    def __init__(
        self,
        model: str,
        version: int,
        target: Target,
        settings: Settings,
        meters: JudgeMeters,
        own: LossReference | None = None,
        problem: str = "",
    ) -> None:
        """Nothing is read yet.

        Parameters
        ----------
        own : the reference that it was published with
        problem : why that cannot be used
        """
        self.model, self.version = model, version
        self.target = target
        self.settings = settings
        self.meters = meters
        self.read: Evidence | None = None
        """What it goes on from; None: it has to be read again."""
        self.monitor: LossMonitor | None = None
        self._share = 0.0
        self._own = own
        self._own_problem = problem
        self._problem = ""
        self._source = ""

    @property
    def key(self) -> tuple[str, int]:
        """Model and version."""
        return self.model, self.version

    @property
    def waits(self) -> bool:
        """Whether it has no reference yet and adopts its first labelled predictions."""
        return self.monitor is None and not self._problem and self.settings.adopt_rows > 0

    def spend(self, share: float) -> None:
        """Have this part of the model's budget from now on."""
        self._share = share
        if self.monitor is not None and share:
            self.monitor.spend(self.settings.budget(share).share)

    def take_up(self, read: Evidence) -> None:
        """Go on from what was written."""
        self.read, self.monitor = read, None
        reference, self._source, self._problem = self._own, "labels.json", self._own_problem
        try:
            if read.reference is not None:
                reference, self._source = LossReference.from_json(read.reference), "accepted"
                self._problem = ""
            if reference is None:
                return
            monitor = LossMonitor(
                reference,
                budget=self.settings.budget(self._share or 1.0),
                tolerance=self.settings.tolerance,
            )
        except MonitorError as error:
            self._problem = f"the reference of labels: {error}"
            return
        try:
            if read.state is not None:
                monitor.restore(read.state)
        except MonitorError as error:
            event(
                "label_evidence_skipped",
                logging.WARNING,
                model=self.model,
                version=self.version,
                reason=str(error),
            )
            monitor = LossMonitor(reference, budget=monitor.budget, tolerance=monitor.tolerance)
        self.monitor = monitor

    def fold(self, rows: Sequence[Joined]) -> tuple[int, list[Alarm]]:
        """Judge rows in the order in which they were predicted: how many, and what was raised."""
        assert self.monitor is not None  # noqa: S101  the caller has looked
        pairs = pairs_of(rows, self.target, self.monitor.reference.task)
        if not pairs.rows:
            return 0, []
        outcomes = pairs.outcomes()
        raised: list[Alarm] = []
        for start in range(0, outcomes.n_rows, BLOCK_ROWS_MAX):
            stop = min(start + BLOCK_ROWS_MAX, outcomes.n_rows)
            raised += self.monitor.update(outcomes[start:stop], at=pairs.rows[stop - 1].time)
        return outcomes.n_rows, raised

    def reference_of(self, rows: Sequence[Joined], lineage: dict[str, Any]) -> LossReference:
        """A reference made of labelled predictions, in the order in which they were made.

        Raises
        ------
        MonitorError : there are too few.
        """
        values = (self.target.value(row.outputs) for row in rows)
        task = task_of(values, (row.label for row in rows), self.target)
        pairs = pairs_of(rows, self.target, task)
        if not pairs.rows:
            raise MonitorError("no prediction has a label that it can be compared with")
        lineage = {**lineage, "since": pairs.rows[0].time, "until": pairs.rows[-1].time}
        return LossReference.fit(pairs.outcomes(), is_ordered=True, lineage=lineage)

    def crossing(self, alarm: Alarm) -> Crossing:
        """An alarm in the words of the event log."""
        assert self.monitor is not None  # noqa: S101  it has raised the alarm
        monitor = self.monitor
        late = monitor.loss_late
        return Crossing(
            self.model,
            self.version,
            f"{MONITOR}{alarm.channel}",
            monitor.reason(alarm),
            alarm.since if alarm.since is not None else 0.0,
            {
                "channel": alarm.channel,
                "evidence": min(alarm.evidence, 1e200),
                "alarm": f"{self.model}-{self.version}-labels-{alarm.id}",
                "task": monitor.reference.task,
                "loss": None if math.isnan(late) else round(late, 6),
                "loss_reference": round(monitor.reference.loss_mean, 6),
                "until": alarm.at,
            },
        )

    def view(self) -> View:
        """What is known, for whoever asks."""
        monitor = self.monitor
        if monitor is None:
            return View({"reference": None, "message": self._message(), "alarms": []})
        late = monitor.loss_late
        reference = monitor.reference
        return View(
            {
                "reference": {
                    "source": self._source,
                    "task": reference.task,
                    "rows": reference.n_rows,
                    "digest": reference.digest,
                    "loss": round(reference.loss_mean, 6),
                },
                "rows": monitor.n_rows,
                "until": monitor.at,
                "loss": None if math.isnan(late) else round(late, 6),
                "evidence": {name: min(e, 1e200) for name, e in monitor.evidence.items()},
                "alarms": [
                    {**alarm.to_dict(), "reason": monitor.reason(alarm)} for alarm in monitor.alarms
                ],
            },
            reference.calibration,
            dict(monitor.evidence),
            {"late": late, "reference": reference.loss_mean},
            len(monitor.alarms),
        )

    def _message(self) -> str:
        if self._problem:
            return self._problem
        if self.settings.adopt_rows:
            return f"the first {self.settings.adopt_rows} labelled predictions become the reference"
        return (
            "no reference for labels: publish the version with labelled data (--target), or accept"
            f" labelled predictions: driftgate labels accept {self.model}"
        )
