"""What a revision says about the monitors of a model: over the settings of the servers."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from registry import routes
from registry.errors import ChangeError
from registry.routes import Part

Task = Literal["auto", "binary", "multiclass", "regression"]

_ELSEWHERE = {
    "segments": "segments are part of a reference profile: driftgate profile --segment",
    "windows": "the windows of time are fixed; the window of rows is window_rows",
}


class BudgetPart(Part, frozen=True):
    """False alarms that are allowed, over the settings `monitor.budget_*`."""

    alarms: float | None = None
    """False pages in a period, in expectation."""
    days: float | None = None
    """The period in days."""
    rows: int | None = None
    """The period in rows instead."""


class LabelsPart(Part, frozen=True):
    """Over the settings `labels.*`. Whether labels are kept at all is a setting of the servers."""

    sample: float | None = None
    """Percent of requests whose predictions are kept."""
    days: float | None = None
    """A prediction waits so many days for its label."""
    mature_s: float | None = None
    """A prediction is judged by its label when it is so old."""
    adopt_rows: int | None = None
    """So many first labelled predictions become the reference; 0: somebody accepts some."""


class TargetPart(Part, frozen=True):
    """What of an answer a label is compared with, where it cannot be seen in the outputs."""

    output: str | None = None
    """Name of the output."""
    column: int | None = None
    """Column of a matrix of probabilities that is the score."""
    task: Task | None = None
    """auto, binary, multiclass or regression."""
    positive: str | float | None = None
    """The label that is class 1; any other is class 0."""
    threshold: float | None = None
    """Scores from here on count as class 1."""


class Monitoring(Part, frozen=True):
    """The `monitor` of a model."""

    sample: float | None = None
    """Percent of requests that are monitored, of those that the server monitors."""
    tolerance: float | None = None
    """Distance from the reference, in units of PSI, that is no drift."""
    window_rows: int | None = None
    """Rows of the window "last"."""
    budget: BudgetPart | None = None
    webhooks: tuple[str, ...] | None = None
    """Only these targets are told of this model's alarms, by name; []: nobody is."""
    labels: LabelsPart | None = None
    target: TargetPart | None = None


def read(document: Mapping[str, Any] | None) -> Monitoring:
    """What a document says.

    Raises
    ------
    ChangeError : with everything that is wrong in it.
    """
    if not document:
        return Monitoring()
    problems = [f"monitor.{name}: {why}" for name, why in _ELSEWHERE.items() if name in document]
    rest = {name: value for name, value in document.items() if name not in _ELSEWHERE}
    found, wrong = routes.read_part(Monitoring, rest, "monitor")
    problems += wrong
    if found is not None:
        problems += [f"monitor.{problem}" for problem in _problems(found)]
    if problems or found is None:
        raise ChangeError("; ".join(problems))
    return found


def merged(document: Mapping[str, Any] | None, patch: Mapping[str, Any]) -> dict[str, Any] | None:
    """A document with another one over it; null takes a field away (JSON Merge Patch, RFC 7396).

    >>> merged({"tolerance": 0.1, "labels": {"days": 7}}, {"tolerance": None, "sample": 5})
    {'labels': {'days': 7}, 'sample': 5}
    """
    result = dict(document or {})
    for name, value in patch.items():
        if isinstance(value, Mapping):
            before = result.get(name)
            value = merged(before if isinstance(before, Mapping) else None, value)  # noqa: PLW2901
        if value is None:
            result.pop(name, None)
        else:
            result[name] = value
    return result or None


def target(found: Monitoring) -> dict[str, Any]:
    """The declared target as plain fields; empty where none is declared."""
    return msgspec.to_builtins(found.target) if found.target is not None else {}


def _problems(found: Monitoring) -> Iterator[str]:
    yield from _within("sample", found.sample, 0, 100)
    yield from _within("tolerance", found.tolerance, 0, 10)
    yield from _within("window_rows", found.window_rows, 2, 10_000_000)
    budget, labels = found.budget or BudgetPart(), found.labels or LabelsPart()
    yield from _within("budget.alarms", budget.alarms, 0.001, 1000)
    yield from _within("budget.days", budget.days, 0.01, 10_000)
    yield from _within("budget.rows", budget.rows, 0, 2**53)
    if budget.days is not None and budget.rows:
        yield "budget: has days or rows, not both"
    yield from _within("labels.sample", labels.sample, 0, 100)
    yield from _within("labels.days", labels.days, 0.001, 3650)
    yield from _within("labels.mature_s", labels.mature_s, 0, 365 * 86_400)
    if labels.adopt_rows:
        yield from _within("labels.adopt_rows", labels.adopt_rows, 200, 100_000)
    wanted = found.target or TargetPart()
    yield from _within("target.threshold", wanted.threshold, 0, 1)
    yield from _within("target.column", wanted.column, 0, 1_000_000)
    if wanted.positive is not None and wanted.task not in {None, "auto", "binary"}:
        yield "target.positive: only a binary task has a positive label"


def _within(name: str, value: float | None, low: float, high: float) -> Iterator[str]:
    if value is not None and not low <= value <= high:
        yield f"{name} = {value}: must be from {low:g} to {high:g}"
