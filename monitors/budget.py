"""How many false alarms a model may raise, in days or in rows, and who may spend how much of it.

A budget is a rate of mass. Detectors take from it with every block, alarm when their evidence times
the mass reaches one, and so raise at most as many false alarms as mass was taken, in expectation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

from monitors.errors import BlockError

Name = TypeVar("Name", str, str | None)
Purpose: TypeAlias = Literal["serving", "requests", "segments", "labels", "canary"]
"""What a detector of a model looks at."""

WEIGHTS: Mapping[Purpose, float] = {
    "serving": 0.55,
    "requests": 0.05,
    "segments": 0.15,
    "labels": 0.15,
    "canary": 0.10,
}
"""Parts of a model's budget while all purposes are there: rows of served versions beside requests
that were refused, segments, labels, and versions beside the champion."""

DAY_S = 86_400.0
_WARNINGS = 90 / 7
_AT_ONCE_MAX = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """False alarms allowed in a period of days or of rows; give one of the two.

    Without either it is 90 days. Under a budget in rows nobody needs to tell the time.
    """

    alarms: float = 1.0
    """Expected false pages in the period at most."""
    days: float | None = None
    rows: float | None = None
    warnings: float | None = None
    """Expected false warnings in the period at most: the step below a page. Without a number,
    about 13 for each page, which is one a week beside one in 90 days."""
    share: float = 1.0
    """Part of it that is spent here: one over the number of hosts that watch on their own."""

    def __post_init__(self) -> None:
        if self.days is not None and self.rows is not None:
            raise BlockError("a budget has days or rows, not both")
        if self.days is None and self.rows is None:
            object.__setattr__(self, "days", 90.0)
        for name in ("alarms", "days", "rows", "warnings", "share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise BlockError(f"budget.{name} = {value}: must be above 0 and finite")
        if self.share > 1:
            raise BlockError(f"budget.share = {self.share}: must be at most 1")
        if self.warnings is None:
            object.__setattr__(self, "warnings", self.alarms * _WARNINGS)

    @property
    def levels(self) -> tuple[float, float]:
        """Pages and warnings of one period that are allowed here."""
        assert self.warnings is not None  # noqa: S101  set when it was made
        return self.alarms * self.share, self.warnings * self.share

    def spent(self, rows: int, seconds: float) -> float:
        """Part of the period that a block takes up.

        A gap without rows takes a hundredth at most: what a silence leaves over is not spent at
        once on the first rows after it.
        """
        if self.rows is not None:
            return rows / self.rows
        assert self.days is not None  # noqa: S101  one of the two is set
        return min(max(seconds, 0.0) / (self.days * DAY_S), _AT_ONCE_MAX)

    def part(self, share: float) -> "Budget":
        """A share of it, for one of several detectors."""
        return replace(self, share=self.share * share)

    def with_share(self, share: float) -> "Budget":
        """The same budget, of which another share is spent here."""
        return replace(self, share=share)


def divide(detectors: Mapping[Name, Purpose]) -> dict[Name, float]:
    """Share of a model's budget for each of its detectors, by name.

    Parameters
    ----------
    detectors : name of a detector -> what it looks at

    Returns
    -------
    Shares that add up to 1 (to nothing without detectors). Purposes that are absent leave their
    part to the others, in proportion; detectors of one purpose have equal parts.

    Notes
    -----
    Shares may be divided anew at any block: mass taken before stays taken, so that the sum over a
    model never exceeds its budget. Expected false alarms add up whatever the detectors depend on.

    >>> {k: round(v, 2) for k, v in divide({"1": "serving", "2": "serving", "*": "labels"}).items()}
    {'1': 0.39, '2': 0.39, '*': 0.21}
    """
    present = set(detectors.values())
    total = sum(WEIGHTS[purpose] for purpose in present)
    peers = {purpose: list(detectors.values()).count(purpose) for purpose in present}
    return {name: WEIGHTS[purpose] / total / peers[purpose] for name, purpose in detectors.items()}
