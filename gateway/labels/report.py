"""What labels say: how right a version was, and which variant of a split did better.

Joined rows to arrays; the numbers come from `monitors`.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gateway.labels.pairs import number, pairs_of, task_of
from gateway.labels.rows import Joined
from gateway.labels.target import Target
from monitors import cbpe, performance
from monitors.guards import outcome
from monitors.loss import Task

COVERAGE = (
    "figures are those of predictions with labels; they are those of all only if labels do not stay"
    " away, or come late, because of what they say"
)
_COHORTS_MAX = 31
_COMPARED_MIN = 30
_Z_DIFFER = 3.29
"""Two means of one kind differ by more once in a thousand times."""
_DAY_S = 86_400
_ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Kept:
    """One prediction without its label: what an estimate needs."""

    outputs: dict[str, Any]
    sampled: float


def performance_of(
    joined: Sequence[Joined],
    kept: Sequence[Kept],
    target: Target,
    calibration: cbpe.Calibration | None = None,
) -> dict[str, Any]:
    """Realised and estimated performance, and realised by day of the prediction.

    Parameters
    ----------
    calibration : what scores were worth on labelled rows of a reference
    """
    values = (target.value(row.outputs) for row in kept)
    task = task_of(values, (row.label for row in joined), target)
    days: dict[int, list[Joined]] = {}
    for row in joined:
        days.setdefault(int(row.time // _DAY_S), []).append(row)
    return {
        "output": target.output,
        "task": task,
        "n_predictions": len(kept),
        "n_labelled": len(joined),
        "coverage": _coverage(joined, kept, target),
        "realised": _realised(joined, target, task),
        "estimated": _estimated(kept, target, task, calibration),
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


def _realised(rows: Iterable[Joined], target: Target, task: Task) -> dict[str, Any] | None:
    found = pairs_of(rows, target, task)
    if not found.rows:
        return None
    if task == "binary":
        figures = performance.binary(
            found.predicted, found.labels, found.weights, threshold=target.threshold
        )
    elif task == "regression":
        figures = performance.regression(found.predicted, found.labels, found.weights)
    else:
        figures = performance.classes(found.is_right, found.weights)
    return {name: estimate.to_dict() for name, estimate in figures.items()}


def _estimated(
    kept: Iterable[Kept], target: Target, task: Task, calibration: cbpe.Calibration | None
) -> dict[str, Any] | None:
    if task != "binary":
        return None
    rows = [(number(target.value(row.outputs)), 1 / row.sampled) for row in kept]
    scored = [(score, weight) for score, weight in rows if score is not None and 0 <= score <= 1]
    if not scored:
        return None
    scores, weights = zip(*scored, strict=True)
    found = cbpe.estimated(scores, weights, calibration=calibration, threshold=target.threshold)
    return {name: estimate.to_dict() for name, estimate in found.items()}


def _coverage(joined: Sequence[Joined], kept: Sequence[Kept], target: Target) -> dict[str, Any]:
    """How many predictions have labels, and whether those that have look like the others.

    Labels that stay away because of what they would say cannot be seen. What can: that they stay
    away for other scores.
    """
    share = len(joined) / len(kept) if kept else None
    about: dict[str, Any] = {"share": share and round(share, 6), "means": COVERAGE}
    with_label = [
        score for row in joined if (score := number(target.value(row.outputs))) is not None
    ]
    scores = [score for row in kept if (score := number(target.value(row.outputs))) is not None]
    n, k = len(scores), len(with_label)
    if min(k, n - k) < _COMPARED_MIN:
        return {**about, "scores": None}
    mean, labelled = float(np.mean(scores)), float(np.mean(with_label))
    rest = (mean * n - labelled * k) / (n - k)
    error = float(np.std(scores)) * math.sqrt(1 / k + 1 / (n - k))
    return {
        **about,
        "scores": {
            "labelled": round(labelled, 6),
            "unlabelled": round(rest, 6),
            "differ": abs(labelled - rest) > _Z_DIFFER * error,
        },
    }


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
