"""Predictions with their labels as numbers that can be compared. Pure.

Rows that cannot be compared (a score that is missing, a text where a number should be) are left
out, one by one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gateway.labels.rows import Joined
from gateway.labels.target import Target
from monitors.loss import Outcomes, Task


@dataclass(slots=True)
class Pairs:
    """Columns of equal length."""

    task: Task
    predicted: list[Any] = field(default_factory=list)
    """Scores, numbers, lists of probabilities, or classes."""
    labels: list[Any] = field(default_factory=list)
    rows: list[Joined] = field(default_factory=list)

    @property
    def weights(self) -> list[float]:
        """What each row stands for."""
        return [1 / row.sampled for row in self.rows]

    @property
    def is_right(self) -> list[float]:
        """Of classes: 1 where the one predicted came."""
        return [
            float((int(np.argmax(p)) if isinstance(p, list) else p) == label)
            for p, label in zip(self.predicted, self.labels, strict=True)
        ]

    def outcomes(self) -> Outcomes:
        """As monitors judge them."""
        if self.task == "binary":
            return Outcomes.binary(self.predicted, self.labels)
        if self.task == "regression":
            return Outcomes.numbers(self.predicted, self.labels)
        if self.predicted and isinstance(self.predicted[0], list):
            return Outcomes.probabilities(self.predicted, self.labels)
        return Outcomes.classes(_named(self.predicted), _named(self.labels))


def pairs_of(rows: Iterable[Joined], target: Target, task: Task) -> Pairs:
    """Those of the rows that can be compared."""
    found = Pairs(task)
    width: int | None = None
    for row in rows:
        value, label = target.value(row.outputs), row.label
        if task == "binary":
            value, truth = number(value), target.truth(label)
            if value is None or truth is None or not 0 <= value <= 1:
                continue
            label = truth
        elif task == "regression":
            value = number(value)
            if value is None or isinstance(label, str):
                continue
        elif isinstance(value, list):
            width = len(value) if width is None else width
            is_class = isinstance(label, float) and label == int(label) and 0 <= label < width
            if len(value) != width or not is_class or any(number(v) is None for v in value):
                continue
        elif value is None or isinstance(value, str) != isinstance(label, str):
            continue
        found.predicted.append(value)
        found.labels.append(label)
        found.rows.append(row)
    return found


def task_of(values: Iterable[Any], labels: Iterable[float | str], target: Target) -> Task:
    """The task that is declared, else what scores and labels look like.

    Binary when all labels are 0 or 1 and all scores lie within.
    """
    if target.task != "auto":
        return target.task
    scores = (number(value) for value in values)
    is_probability = all(score is None or 0 <= score <= 1 for score in scores)
    return "binary" if is_probability and set(labels) <= {0.0, 1.0} else "regression"


def number(value: Any) -> float | None:
    """A finite number, else None."""
    is_number = isinstance(value, bool | int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _named(values: Sequence[Any]) -> list[str]:
    """Classes as text, so that 2 and 2.0 are one."""
    return [value if isinstance(value, str) else f"{value:g}" for value in values]
