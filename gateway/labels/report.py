"""What labels say: how right a version was, and which variant of a split did better.

Joined rows to arrays; the numbers come from `monitors`.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gateway.labels.rows import Joined
from gateway.labels.target import Target, Task
from monitors import cbpe, performance
from monitors.guards import outcome

_COHORTS_MAX = 31
_DAY_S = 86_400
_ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Kept:
    """One prediction without its label: what an estimate needs."""

    outputs: dict[str, Any]
    sampled: float


def performance_of(
    joined: Sequence[Joined], kept: Sequence[Kept], target: Target
) -> dict[str, Any]:
    """Realised and estimated performance, and realised by day of the prediction."""
    task = _task(joined, kept, target)
    days: dict[int, list[Joined]] = {}
    for row in joined:
        days.setdefault(int(row.time // _DAY_S), []).append(row)
    return {
        "output": target.output,
        "task": task,
        "n_predictions": len(kept),
        "n_labelled": len(joined),
        "realised": _realised(joined, target, task),
        "estimated": _estimated(kept, target, task),
        "estimated_means": cbpe.BLINDNESS if task == "binary" else None,
        "cohorts": [
            {
                "day": time.strftime("%Y-%m-%d", time.gmtime(day * _DAY_S)),
                "n": len(rows),
                "realised": _realised(rows, target, task),
            }
            for day, rows in sorted(days.items())[-_COHORTS_MAX:]
        ],
    }


def _task(joined: Sequence[Joined], kept: Sequence[Kept], target: Target) -> Task:
    """The task that is declared, else what scores and labels look like."""
    if target.task != "auto":
        return target.task
    scores = [_number(target.value(row.outputs)) for row in kept]
    labels = {row.label for row in joined}
    is_probability = all(score is None or 0 <= score <= 1 for score in scores)
    return "binary" if is_probability and labels <= {0.0, 1.0} else "regression"


def _realised(rows: Iterable[Joined], target: Target, task: Task) -> dict[str, Any] | None:
    predicted: list[Any] = []
    labels: list[Any] = []
    weights: list[float] = []
    for row in rows:
        value = target.value(row.outputs)
        if task == "multiclass":
            value = int(np.argmax(value)) if isinstance(value, list) else value
        elif (value := _number(value)) is None or isinstance(row.label, str):
            continue
        if value is None or (task == "binary" and row.label not in {0.0, 1.0}):
            continue
        predicted.append(value)
        labels.append(row.label)
        weights.append(1 / row.sampled)
    if not predicted:
        return None
    if task == "binary":
        found = performance.binary(predicted, labels, weights)
    elif task == "regression":
        found = performance.regression(predicted, labels, weights)
    else:
        right = [float(p == label) for p, label in zip(predicted, labels, strict=True)]
        found = performance.classes(right, weights)
    return {name: estimate.to_dict() for name, estimate in found.items()}


def _estimated(kept: Iterable[Kept], target: Target, task: Task) -> dict[str, Any] | None:
    if task != "binary":
        return None
    rows = [(_number(target.value(row.outputs)), 1 / row.sampled) for row in kept]
    scores = [score for score, _ in rows if score is not None and 0 <= score <= 1]
    if not scores:
        return None
    weights = [weight for score, weight in rows if score is not None and 0 <= score <= 1]
    found = cbpe.estimated(scores, weights)
    return {name: estimate.to_dict() for name, estimate in found.items()}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, bool | int | float) and math.isfinite(value)
    return float(value) if is_number else None


# -- variants


@dataclass(frozen=True, slots=True)
class _Unit:
    """One unit of a split: what came of all that it was answered."""

    variant: str
    version: int
    assigned: float
    total: float = 0.0
    n: int = 0


def outcomes_of(joined: Iterable[Joined], control: str = "champion") -> dict[str, Any]:
    """Labels by variant, and each variant against `control`: by unit, with always-valid intervals.

    A unit is what the assignment is sticky to, else the request; its outcome is the mean of its
    labels. Only answers that were drawn by lot count: not calls by number, not shadows.
    """
    units: dict[tuple[str, str], _Unit] = {}
    for row in joined:
        if row.traffic != "primary" or isinstance(row.label, str):
            continue
        key = (row.variant, row.unit or row.request)
        unit = units.get(key) or _Unit(row.variant, row.version, row.assigned)
        units[key] = replace(unit, total=unit.total + row.label, n=unit.n + 1)
    by_variant: dict[str, list[_Unit]] = {}
    for (variant, _), unit in units.items():
        by_variant.setdefault(variant, []).append(unit)
    return {
        "control": control,
        "variants": {name: _about(found) for name, found in sorted(by_variant.items())},
        "differences": {
            name: _difference(found, by_variant[control])
            for name, found in sorted(by_variant.items())
            if name != control and control in by_variant
        },
    }


def _about(units: Sequence[_Unit]) -> dict[str, Any]:
    means = np.array([unit.total / unit.n for unit in units])
    return {
        "versions": sorted({unit.version for unit in units}),
        "units": len(units),
        "labels": sum(unit.n for unit in units),
        "mean": round(float(means.mean()), 6),
        "deviation": round(float(means.std()), 6),
    }


def _difference(candidate: Sequence[_Unit], control: Sequence[_Unit]) -> dict[str, Any]:
    """Candidate minus control, weighted by the odds that the gateway knew."""
    # Between these two alone: whoever was given a third variant says nothing about them.
    drawn = [
        (unit, weight)
        for units, is_candidate in ((candidate, True), (control, False))
        for unit in units
        if 0 < (weight := unit.assigned if is_candidate else 1 - unit.assigned) < 1
    ]
    empty = {"units": len(drawn), "mean": None, "low": None, "high": None, "detectable": None}
    if not drawn:
        return {**empty, "verdict": "inconclusive", "reason": "nothing was drawn by lot"}
    effects = outcome.effects(
        np.array([unit.total / unit.n for unit, _ in drawn]),
        np.array([float(unit.variant == candidate[0].variant) for unit, _ in drawn]),
        np.array([weight for _, weight in drawn]),
    )
    mean, low, high = outcome.interval(outcome.Sums.of(effects), alpha=_ALPHA)
    if not math.isfinite(low):
        reason = f"fewer than {2 * outcome.UNITS_MIN} units with a label"
        return {**empty, "verdict": "inconclusive", "reason": reason}
    half = (high - low) / 2
    verdict = "higher" if low > 0 else "lower" if high < 0 else "inconclusive"
    reason = (
        f"the interval of {1 - _ALPHA:.0%} holds at every look"
        if verdict != "inconclusive"
        else f"a difference below {half:.3g} cannot be seen yet"
    )
    return {
        "units": len(drawn), "mean": round(mean, 6), "low": round(low, 6), "high": round(high, 6),
        "detectable": round(half, 6), "verdict": verdict, "reason": reason,
    }  # fmt: skip
