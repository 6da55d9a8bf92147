"""Verdicts: what the guards say about a step of a rollout, from counts alone.

breach        a guard found what must not be, or something happened that needs no statistics
invalid       the numbers cannot be trusted: units or inputs are not split as the weights say
ok            nothing was found, and enough has been seen to say so
inconclusive  nothing was found, and not enough has been seen. No data is neither good nor bad.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from monitors.guards import balance, harm, outcome, paired, shift
from monitors.guards.bets import CANDIDATE, CONTROL
from monitors.guards.evidence import Evidence, Table, both
from monitors.guards.power import ENOUGH_EVIDENCE

Action: TypeAlias = Literal["abort", "hold", "invalid"]
Kind: TypeAlias = Literal["ok", "breach", "invalid", "inconclusive"]
GuardKind: TypeAlias = Literal[
    "harm", "shift", "balance", "inputs", "ceiling", "disagreement", "outcome"
]

_SHOWN = math.log(ENOUGH_EVIDENCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """One thing that is watched, and what is done about it."""

    name: str
    kind: GuardKind
    action: Action = "abort"
    event: str = ""
    """Kind of bad event, for harm and ceilings; the outcome's name."""
    ratio_max: float = 1.0
    """Ratio of rates, candidate to control, that nobody minds."""
    share_max: float = 0.0
    """Share of the candidate's cases that is allowed, for ceilings and disagreement."""
    alpha: float | None = None
    """Its own level; None: an equal part of the rollout's."""
    must_show: bool = True
    """Of a harm guard: whether `no_worse_than` is to be shown of it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one guard found."""

    name: str
    action: Action
    log_evidence: float
    log_bound: float
    """Natural logarithms; a breach when the first reaches the second."""
    candidate: tuple[int, int]
    control: tuple[int, int]
    """Bad events (or hits) and units of each."""
    ratio: tuple[float, float, float] | None = None
    """Best, lowest and highest ratio of rates, always valid at 95 %."""

    @property
    def is_breach(self) -> bool:
        """Whether it found what must not be."""
        return self.log_evidence >= self.log_bound

    @property
    def has_data(self) -> bool:
        """Whether there was anything to bet on."""
        return self.candidate[1] + self.control[1] > 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON: evidence as a factor, no infinities."""
        return {
            "guard": self.name,
            "action": self.action,
            "evidence": _factor(self.log_evidence),
            "evidence_needed": _factor(self.log_bound),
            "share_of_bound": round(max(self.log_evidence, 0.0) / self.log_bound, 4),
            "breach": self.is_breach,
            "candidate": {"hits": self.candidate[0], "of": self.candidate[1]},
            "control": {"hits": self.control[0], "of": self.control[1]},
            "ratio": None
            if self.ratio is None
            else [round(value, 4) if math.isfinite(value) else None for value in self.ratio],
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all guards together say, and why."""

    kind: Kind
    reason: str
    findings: tuple[Finding, ...] = ()
    action: Action | None = None
    """What to do about a breach."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "verdict": self.kind,
            "reason": self.reason,
            "action": self.action,
            "guards": [finding.to_dict() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """What a step must have seen before silence means anything."""

    is_long_enough: bool
    units: int
    """Units that the candidate met in this step."""
    units_min: int
    no_worse_than: float | None = None
    """Ratio that must be shown not to be reached; None: enough units are enough."""


@dataclass(slots=True)
class Peaks:
    """The highest evidence each guard has had: a crossing counts even if it falls back."""

    highest: dict[str, float] = field(default_factory=dict)

    def raised(self, name: str, log_evidence: float) -> float:
        """The highest so far, with this one."""
        self.highest[name] = max(self.highest.get(name, -math.inf), log_evidence)
        return self.highest[name]


def log_bounds(guards: Sequence[Guard], alpha: float) -> dict[str, float]:
    """Evidence at which each guard speaks: alpha is shared evenly by those without their own."""
    sharing = sum(1 for guard in guards if guard.alpha is None)
    return {
        guard.name: math.log(1 / guard.alpha)
        if guard.alpha is not None
        else math.log(sharing / alpha)
        for guard in guards
    }


def judge(
    evidence: Evidence,
    guards: Sequence[Guard],
    *,
    alpha: float,
    exposure: Exposure,
    hard: Sequence[str] = (),
    peaks: Peaks | None = None,
    outcomes: Mapping[str, Table] | None = None,
) -> Verdict:
    """The verdict on a step.

    Parameters
    ----------
    evidence : counts of the whole rollout, all workers together
    alpha : probability that a candidate without fault is ever found at fault, over all guards
    hard : sentences about what needs no statistics (a worker killed, outputs not finite)
    peaks : highest evidence so far; updated
    outcomes : (n_weights, 2) bad outcomes by name, where labels have arrived
    """
    peaks = peaks if peaks is not None else Peaks()
    bounds = log_bounds(guards, alpha)
    found = tuple(
        _finding(guard, evidence, bounds[guard.name], peaks, outcomes or {}) for guard in guards
    )
    if hard:
        return Verdict("breach", "; ".join(hard), found, "abort")
    for action, kind in (("abort", "breach"), ("invalid", "invalid"), ("hold", "breach")):
        over = [finding for finding in found if finding.is_breach and finding.action == action]
        if over:
            reason = "; ".join(_why(finding) for finding in over)
            return Verdict(kind, reason, found, over[0].action)  # type: ignore[arg-type]  # literals
    missing = _missing(evidence, guards, exposure)
    if missing:
        return Verdict("inconclusive", missing, found)
    return Verdict("ok", f"{exposure.units} units and nothing found", found)


def _finding(
    guard: Guard,
    evidence: Evidence,
    log_bound: float,
    peaks: Peaks,
    outcomes: Mapping[str, Table],
) -> Finding:
    units = evidence.total(evidence.units)
    hits = np.zeros(2, np.int64)
    ratio = None
    log = 0.0
    if guard.kind == "ceiling":
        n = int(evidence.total(evidence.requests)[CANDIDATE])
        hits = evidence.all_events.get(guard.event, hits)
        log = float(paired.log_evidence_above(int(hits[CANDIDATE]), n, guard.share_max))
        units = evidence.total(evidence.requests)
    elif guard.kind == "disagreement":
        units = np.array([evidence.pairs.get("n", 0), 0])
        hits = np.array([evidence.pairs.get("differ", 0), 0])
        log = float(
            paired.log_evidence_above(int(hits[CANDIDATE]), int(units[CANDIDATE]), guard.share_max)
        )
    elif guard.kind in ("harm", "outcome"):
        source = outcomes if guard.kind == "outcome" else evidence.events
        weights, bad = both(source.get(guard.event, {}))
        if weights.size:
            hits = bad.sum(axis=0)
            ratio = harm.ratio_interval(bad, weights)
            log = float(
                harm.log_evidence(bad, weights, ratio_allowed=guard.ratio_max)
                if guard.kind == "harm"
                else outcome.log_evidence_two_sided(bad, weights)
            )
    elif guard.kind == "balance":
        weights, counts = both(evidence.units)
        log = float(balance.log_evidence(counts, weights)) if weights.size else 0.0
        hits = units
    else:
        prefix = "output:" if guard.kind == "shift" else "input:"
        logs = []
        for channel, table in evidence.bins.items():
            weights, counts = both(table)
            if channel.startswith(prefix) and weights.size:
                logs.append(float(shift.log_evidence(counts, weights)))
                units = counts.sum(axis=(0, 1))
        # The highest of several channels pays for their number.
        log = max(logs) - math.log(len(logs)) if logs else 0.0
    return Finding(
        guard.name,
        guard.action,
        peaks.raised(guard.name, log),
        log_bound,
        (int(hits[CANDIDATE]), int(units[CANDIDATE])),
        (int(hits[CONTROL]), int(units[CONTROL])),
        ratio,
    )


def _missing(evidence: Evidence, guards: Sequence[Guard], exposure: Exposure) -> str:
    if exposure.units < exposure.units_min:
        return f"the candidate has met {exposure.units} of {exposure.units_min} units"
    if not exposure.is_long_enough:
        return "the step has not lasted long enough"
    for guard in guards:
        if exposure.no_worse_than is None or guard.kind != "harm" or not guard.must_show:
            continue
        weights, bad = both(evidence.events.get(guard.event, {}))
        shown = 0.0
        if weights.size:
            margin = exposure.no_worse_than
            shown = float(harm.log_evidence_no_worse(bad, weights, ratio_margin=margin))
        if shown < _SHOWN:
            missing = (
                f"evidence {_factor(shown):,.3g}, needs {ENOUGH_EVIDENCE:g}"
                if bad.any()
                else "no bad event of either variant"
            )
            return (
                f"{guard.name}: not yet shown that the ratio is below"
                f" {exposure.no_worse_than:g} ({missing})"
            )
    return ""


def _why(finding: Finding) -> str:
    (hits, of), (control_hits, control_of) = finding.candidate, finding.control
    return (
        f"{finding.name}: candidate {hits} of {of}, control {control_hits} of {control_of};"
        f" evidence {_factor(finding.log_evidence):,.0f} (needs {_factor(finding.log_bound):,.0f})"
    )


def _factor(log: float) -> float:
    return float(f"{math.exp(min(log, 230.0)):.4g}")
