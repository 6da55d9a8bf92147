"""What shadows and champions said to the same requests: counts of all workers to a verdict.

ok            shown to disagree on fewer units than allowed
breach        shown to disagree on more, or to be wrong more often, or it crashed
inconclusive  neither; no data is neither good nor bad
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gateway.labels.rows import Joined
from gateway.labels.target import Target
from gateway.shadow import tally
from gateway.shadow.tally import BIASED, Coverage, Kept, Pairing, Tally
from monitors.guards import outcome, paired
from registry.revisions import ModelState

ALPHA = 0.01
"""Probability that a shadow that disagrees no more than allowed is ever said to; of each test."""
_SHOWN = 20.0
"""Odds at which a share counts as shown to be below what is allowed."""
_BINS = 10
_BIN_ROWS_MIN = 20
_MINUTES = 60
_Z = 1.96


def report(
    state_dir: Path,
    model: str,
    state: ModelState,
    *,
    joined: Sequence[Joined] = (),
    target: Target | None = None,
) -> list[dict[str, Any]]:
    """Every shadow that a model has or had: those of its route first, then others by name.

    Parameters
    ----------
    joined : predictions of the model with their labels, of primary and shadow traffic
    target : what of an answer labels are compared with
    """
    root = tally.directory(state_dir, model)
    found = tally.together(root.glob("*/*.json") if root.is_dir() else ())
    running = {pairing.key: pairing for pairing in tally.pairings(model, state)}
    by_key = {kept.pairing.key: kept for kept in found}
    entries = []
    for key, pairing in running.items():
        kept = by_key.pop(key, None) or Kept(pairing, 0.0)
        kept.pairing = pairing
        entries.append(_entry(kept, joined, target, is_running=True))
    left = sorted(by_key.values(), key=lambda kept: kept.since, reverse=True)
    entries += [_entry(kept, joined, target, is_running=False) for kept in left]
    return entries


def cases_of(state_dir: Path, pairing: Pairing) -> tuple[dict[str, int], str]:
    """Counts of one pairing as the guards of a rollout take them, and why it was barred."""
    directory = tally.directory(state_dir, pairing.model, pairing.key)
    found = tally.together(directory.glob("*.json") if directory.is_dir() else ())
    if not found:
        return {}, ""
    n, differ = found[0].tally.cases
    cover = found[0].coverage
    counts = {
        "n": n,
        "differ": differ,
        "failed": found[0].tally.failed,
        "sampled": cover.sampled,
        "dropped": sum(cover.dropped.values()),
    }
    return counts, found[0].barred


def _entry(
    kept: Kept, joined: Sequence[Joined], target: Target | None, *, is_running: bool
) -> dict[str, Any]:
    pairing, counts = kept.pairing, kept.tally
    shadow = pairing.shadow
    said = compared(counts, allowed=shadow.disagreement_max / 100)
    agreement = said["disagreement"]
    cover = coverage(kept.coverage)
    labels = None
    if target is not None:
        found = shadow.compare.get(target.output)
        threshold = 0.5 if found is None or found.threshold is None else found.threshold
        labels = who_is_right(joined, pairing, target, threshold)
    verdict, reason = _verdict(kept, agreement, labels, cover)
    return {
        "to": pairing.to,
        "version": pairing.version,
        "against": pairing.against,
        "running": is_running,
        "sample": shadow.sample,
        "since": kept.since or None,
        "verdict": verdict,
        "reason": reason,
        "problem": kept.problem,
        **said,
        "coverage": cover,
        "labels": labels,
    }


def compared(counts: Tally, *, allowed: float) -> dict[str, Any]:
    """What pairs say by unit, request, row, output and place: of shadows and of replays alike.

    Parameters
    ----------
    allowed : share of units that may disagree
    """
    return {
        "disagreement": disagreement(*counts.cases, allowed=allowed),
        "requests": {"compared": counts.requests, "failed": counts.failed},
        "rows": {"compared": counts.rows, "differ": counts.rows_differ},
        "outputs": {
            name: {"rows_differ": n, "problem": counts.problems.get(name, "")}
            for name, n in counts.outputs.items()
        },
        "differences": {name: _difference(sums) for name, sums in counts.sums().items()},
        "worst_bins": worst(counts),
    }


def _verdict(
    kept: Kept,
    agreement: Mapping[str, Any],
    labels: Mapping[str, Any] | None,
    cover: Mapping[str, Any],
) -> tuple[str, str]:
    if kept.barred:
        return "breach", kept.barred
    reasons = []
    if agreement["breach"]:
        reasons.append(
            f"{agreement['differ']} of {agreement['n']} units disagree,"
            f" {100 * agreement['allowed']:g} % are allowed; evidence {agreement['evidence']:,.0f}"
            f" (needs {agreement['evidence_needed']:,.0f})"
        )
    if labels is not None and labels["breach"]:
        reasons.append(
            f"wrong more often: {labels['shadow_alone']} units where the shadow alone was wrong,"
            f" {labels['champion_alone']} where the champion alone was;"
            f" evidence {labels['evidence']:,.0f} (needs {labels['evidence_needed']:,.0f})"
        )
    if reasons:
        return "breach", "; ".join(reasons)
    if not agreement["n"]:
        return "inconclusive", kept.problem or "no pair has been compared yet"
    said = f"{agreement['differ']} of {agreement['n']} units disagree"
    if cover["load_biased"]:
        return (
            "inconclusive",
            f"{said}; {100 * cover['dropped_share']:.1f} % of copies were dropped",
        )
    if agreement["below"]:
        return "ok", f"{said}: shown to be below {100 * agreement['allowed']:g} %"
    return "inconclusive", f"{said}: neither above nor below what is allowed is shown yet"


def disagreement(n: int, differ: int, *, allowed: float) -> dict[str, Any]:
    """Whether more units disagree than are allowed, or fewer: valid at every look.

    Parameters
    ----------
    n, differ : pairs, one per unit, and how many of them disagree
    allowed : share
    """
    log_above = float(paired.log_evidence_above(differ, n, allowed))
    log_below = float(paired.log_evidence_above(n - differ, n, 1 - allowed))
    return {
        "n": n,
        "differ": differ,
        "share": round(differ / n, 6) if n else None,
        "allowed": allowed,
        "evidence": _factor(log_above),
        "evidence_needed": 1 / ALPHA,
        "breach": log_above >= math.log(1 / ALPHA),
        "below": log_below >= math.log(_SHOWN),
    }


def coverage(counted: Coverage) -> dict[str, Any]:
    """What share of the sampled was compared, in all and by minute.

    Load drops what comes at busy times: when that is more than 1 %, what is left may not speak for
    all.
    """
    dropped = sum(counted.dropped.values())
    minutes = sorted(counted.minutes.items(), key=lambda item: int(item[0]))[-_MINUTES:]
    return {
        "sampled": counted.sampled,
        "dropped": counted.dropped,
        "share": round(1 - dropped / counted.sampled, 6) if counted.sampled else None,
        "dropped_share": round(dropped / counted.sampled, 6) if counted.sampled else 0.0,
        "load_biased": dropped > BIASED * counted.sampled,
        "minutes": [
            {
                "at": 60 * int(minute),
                "sampled": sampled,
                "dropped": lost,
                "load_biased": lost > BIASED * sampled,
            }
            for minute, (sampled, lost) in minutes
        ],
    }


def worst(counts: Tally) -> list[dict[str, Any]]:
    """Bins of the champion's reference profile whose rows disagree most.

    In the order of the least share that the counts leave probable (Wilson's lower bound at 95 %),
    so that a handful of rows does not lead the list.
    """
    found = []
    for name, (rows, differ) in counts.bins.items():
        for label, n, k in zip(counts.labels[name], rows.tolist(), differ.tolist(), strict=True):
            if n >= _BIN_ROWS_MIN and k:
                found.append((wilson_low(k, n), name, label, n, k))
    found.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    return [
        {"channel": name, "bin": label, "rows": n, "differ": k, "share": round(k / n, 6)}
        for _, name, label, n, k in found[:_BINS]
    ]


def wilson_low(hits: int, n: int) -> float:
    """The lower end of Wilson's interval for a share, at 95 %.

    Notes
    -----
    Source: Wilson (1927), J. Am. Stat. Assoc. 22.
    """
    share, square = hits / n, _Z * _Z
    middle = share + square / (2 * n)
    half = _Z * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return (middle - half) / (1 + square / n)


def who_is_right(
    joined: Iterable[Joined], pairing: Pairing, target: Target, threshold: float
) -> dict[str, Any]:
    """Which of the two is wrong more often, by the labels that have come: sequential McNemar.

    One row of each unit counts, the first that has a label. Of numbers that are no probabilities,
    the one that is further off is wrong.
    """
    sides: dict[tuple[str, int], dict[str, Joined]] = {}
    for row in joined:
        side = {"primary": pairing.against, "shadow": pairing.version}.get(row.traffic)
        if side == row.version:
            sides.setdefault((row.request, row.row), {})[row.traffic] = row
    alone = {"shadow": 0, "primary": 0}
    seen: set[str] = set()
    units = 0
    for both in sides.values():
        if len(both) < 2:
            continue
        first = both["primary"]
        unit = first.unit or first.request
        if unit in seen:
            continue
        seen.add(unit)
        wrong = _wrong(both, target, threshold)
        if wrong is None:
            continue
        units += 1
        if wrong["shadow"] != wrong["primary"]:
            alone["shadow" if wrong["shadow"] else "primary"] += 1
    log = float(paired.log_evidence_wrong_more_often(alone["shadow"], alone["primary"]))
    better = float(paired.log_evidence_wrong_more_often(alone["primary"], alone["shadow"]))
    return {
        "units": units,
        "shadow_alone": alone["shadow"],
        "champion_alone": alone["primary"],
        "evidence": _factor(log),
        "evidence_better": _factor(better),
        "evidence_needed": 1 / ALPHA,
        "breach": log >= math.log(1 / ALPHA),
        "better": better >= math.log(1 / ALPHA),
    }


def _wrong(both: Mapping[str, Joined], target: Target, threshold: float) -> dict[str, bool] | None:
    values = {side: target.value(row.outputs) for side, row in both.items()}
    label = both["primary"].label
    if any(value is None for value in values.values()):
        return None
    if isinstance(label, str) or target.task == "multiclass":
        return {side: _class(value) != label for side, value in values.items()}
    numbers: dict[str, float] = {}
    for side, value in values.items():
        if not isinstance(value, bool | int | float):
            return {s: _class(v) != label for s, v in values.items()}
        numbers[side] = float(value)
    is_score = target.task == "binary" or (
        target.task == "auto"
        and label in {0.0, 1.0}
        and all(0 <= number <= 1 for number in numbers.values())
    )
    if is_score:
        return {side: (number >= threshold) != (label == 1) for side, number in numbers.items()}
    off = {side: abs(number - label) for side, number in numbers.items()}
    return {side: distance > min(off.values()) for side, distance in off.items()}


def _class(value: Any) -> Any:
    return int(np.argmax(value)) if isinstance(value, list) else value


def _difference(sums: outcome.Sums) -> dict[str, Any]:
    """Shadow minus champion, on average, with an interval of 95 % that holds at every look."""
    mean, low, high = outcome.interval(sums, alpha=0.05)
    if not math.isfinite(low):
        mean = sums.total / sums.n if sums.n else math.nan
    return {"units": sums.n, **{
        name: round(value, 9) if math.isfinite(value) else None
        for name, value in (("mean", mean), ("low", low), ("high", high))
    }}  # fmt: skip


def _factor(log: float) -> float:
    return float(f"{math.exp(min(log, 230.0)):.4g}")
