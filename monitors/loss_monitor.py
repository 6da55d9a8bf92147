"""Labelled rows judged block by block: loss and calibration, under the labels' part of a budget."""

import io
import json
import math
from zipfile import BadZipFile

import numpy as np

from monitors.budget import Budget
from monitors.detector import Detector
from monitors.episodes import Episodes
from monitors.errors import BlockError
from monitors.loss import LossReference, Outcomes
from monitors.window import Alarm

BLOCK_ROWS_MAX = 500
"""Rows that are judged at once, at most."""

_LATE_ROWS = 500.0
"""Half-life, in rows, of the means that are told beside an alarm."""
_STATE_FORMAT = 1


class LossMonitor:
    """Judges labelled rows block by block, under the labels' part of a model's budget.

    Parameters
    ----------
    reference : labelled rows of a healthy time
    budget : false alarms that may be raised by labels
    tolerance : distance from the reference, in units of psi, that is no drift

    Notes
    -----
    The promise is that of `Monitor`: while labelled rows stay within the tolerance of the
    reference, expected alarms are at most the budget's. Labels that come or stay away because of
    what they say are not within it: count a cohort when it is old enough to be whole.
    """

    def __init__(
        self, reference: LossReference, *, budget: Budget, tolerance: float = 0.01
    ) -> None:
        self.reference = reference
        self.budget = budget
        self.tolerance = tolerance
        self._detector = Detector(reference.layout, budget, tolerance=tolerance)
        self._episodes = Episodes(budget)
        self._late = np.zeros(reference.layout.n_cells)
        self._loss = self._weight = 0.0

    @property
    def n_rows(self) -> int:
        """Labelled rows judged."""
        return self._episodes.n_rows

    @property
    def at(self) -> float | None:
        """Time of the newest row judged."""
        return self._episodes.at

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Alarms that are open, pages first."""
        return self._episodes.open

    @property
    def episodes(self) -> tuple[Alarm, ...]:
        """Alarms open and closed, oldest first."""
        return tuple(self._episodes)

    @property
    def evidence(self) -> dict[str, float]:
        """E-value of every channel over all rows."""
        names = self.reference.layout.names
        return dict(zip(names, self._detector.evidence.tolist(), strict=True))

    @property
    def loss_late(self) -> float:
        """Mean loss of late; nan before any row."""
        return self._loss / self._weight if self._weight else math.nan

    def spend(self, share: float) -> None:
        """Have this share of the budget from now on; what was spent before stays spent."""
        self.budget = Budget(
            alarms=self.budget.alarms, days=self.budget.days, rows=self.budget.rows,
            warnings=self.budget.warnings, share=share,
        )  # fmt: skip
        self._detector.spend(self.budget)

    def update(self, rows: Outcomes, at: float | None = None) -> list[Alarm]:
        """Judge labelled rows; the alarms that were raised.

        Parameters
        ----------
        rows : of one cohort; more than BLOCK_ROWS_MAX are judged in several blocks
        at : when the newest of them was predicted, in seconds since 1970. Time never runs back
            here: rows of an earlier cohort take no new time from the budget.

        Raises
        ------
        BlockError : rows of another task, or a time is needed.
        """
        if rows.task != self.reference.task:
            raise BlockError(f"{rows.task} rows, the reference is of {self.reference.task} ones")
        if at is None and self.budget.days is not None:
            raise BlockError("a budget in days needs the time of the rows: update(rows, at=...)")
        if at is not None and self._episodes.at is not None:
            at = max(at, self._episodes.at)
        raised: list[Alarm] = []
        for start in range(0, rows.n_rows, BLOCK_ROWS_MAX):
            raised += self._fold(rows[start : start + BLOCK_ROWS_MAX], at)
        return raised

    def acknowledge(self, alarm_id: int, at: float | None = None) -> Alarm:
        """Say that an alarm has been seen: it stays quiet for its hold-off, then may come again."""
        return self._episodes.acknowledge(alarm_id, at)

    def reason(self, alarm: Alarm) -> str:
        """A sentence for people: what labels say, compared with what."""
        layout, reference = self.reference.layout, self.reference
        if alarm.feature == "loss":
            name = {"binary": "log loss", "regression": "squared error"}.get(reference.task, "loss")
            return (
                f"accuracy fell, by labels: {name} {self.loss_late:.4g} of late,"
                f" {reference.loss_mean:.4g} in the reference"
            )
        k = layout.names.index(alarm.channel)
        start = int(layout.starts[k])
        before = float(layout.shares[start + 1])
        rows = self._late[start : start + 2]
        late = float(rows[1] / rows.sum()) if rows.sum() > 0 else math.nan
        part = reference.part_names[k - 1]
        words = layout.labels[start + 1]
        return (
            f"calibration fell, by labels: of predictions {part} {late:.1%} {words} of late,"
            f" {before:.1%} in the reference"
        )

    def to_bytes(self) -> bytes:
        """Everything that it has seen and concluded; `restore` goes on from there."""
        about = {
            "format": _STATE_FORMAT,
            "reference": self.reference.digest,
            "n_rows": self._episodes.n_rows,
            "at": self._episodes.at,
            "loss": self._loss,
            "weight": self._weight,
            **self._episodes.state(),
        }
        stream = io.BytesIO()
        np.savez(
            stream,
            allow_pickle=False,
            late=self._late,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            **{f"detector.{name}": array for name, array in self._detector.state().items()},
        )
        return stream.getvalue()

    def restore(self, state: bytes) -> None:
        """Go on from what `to_bytes` gave, to the last bit.

        Raises
        ------
        BlockError : it is of another reference, of another format, or damaged.
        """
        try:
            with np.load(io.BytesIO(state), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(arrays.pop("about").tobytes())
            if about["format"] != _STATE_FORMAT or about["reference"] != self.reference.digest:
                raise BlockError("state of labels: it is of another format or reference")
            self._detector.restore(
                {n.removeprefix("detector."): a for n, a in arrays.items() if n[:9] == "detector."}
            )
            self._late = arrays["late"].reshape(self._late.shape).copy()
            self._loss, self._weight = about["loss"], about["weight"]
            self._episodes.restore(about)
            self._episodes.n_rows, self._episodes.at = about["n_rows"], about["at"]
        except (ValueError, KeyError, TypeError, OSError, BadZipFile, EOFError) as error:
            raise BlockError(f"state of labels: cannot be read ({error})") from error

    def _fold(self, rows: Outcomes, at: float | None) -> list[Alarm]:
        cells = self.reference.cells(rows)
        keep = 0.5 ** (rows.n_rows / _LATE_ROWS)
        self._late = self._late * keep + cells
        self._loss = self._loss * keep + float(rows.loss.sum())
        self._weight = self._weight * keep + rows.n_rows
        self._episodes.n_rows += rows.n_rows
        self._episodes.at = at if at is not None else self._episodes.at
        findings, over = self._detector.fold(cells, at=at)
        names, features = self.reference.layout.names, self.reference.layout.features
        for channel in over:
            self._episodes.close(names[channel], None, "back")
        raised: list[Alarm] = []
        for finding in findings:
            k = finding.channel
            if self.reference.is_worse(k, self._late):
                raised.append(self._episodes.add(finding, channel=names[k], feature=features[k]))
            else:
                self._detector.rearm(k)  # Nobody is called because answers became better.
        for alarm in self._episodes.expire():
            self._detector.rearm(names.index(alarm.channel))
            self._episodes.close(alarm.channel, None, "acknowledged")
        return raised
