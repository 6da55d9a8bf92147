"""Verdicts: what the guards say about a step of a rollout, from counts alone.

breach        a guard found what must not be, or something happened that needs no statistics
invalid       the numbers cannot be trusted: units or inputs are not split as the weights say
ok            nothing was found, and enough has been seen to say so
inconclusive  nothing was found, and not enough has been seen. No data is neither good nor bad.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from monitors.guards import balance, harm, paired, shift
from monitors.guards.bets import CANDIDATE, CONTROL, Floats, Integers
from monitors.guards.evidence import Evidence, both
from monitors.guards.labelled import Labelled, Side
from monitors.guards.power import ENOUGH_EVIDENCE

Action: TypeAlias = Literal["abort", "hold", "invalid"]
Kind: TypeAlias = Literal["ok", "breach", "invalid", "inconclusive"]
GuardKind: TypeAlias = Literal[
    "harm", "shift", "balance", "inputs", "ceiling", "disagreement", "outcome", "labelled"
]

_SHOWN = math.log(ENOUGH_EVIDENCE)
_NO_WORSE = Side(0.0, is_lower_better=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """One thing that is watched, and what is done about it."""

    name: str
    kind: GuardKind
    action: Action = "abort"
    event: str = ""
    """Kind of bad event, for harm and ceilings."""
    ratio_max: float = 1.0
    """Ratio of rates, candidate to control, that nobody minds."""
    share_max: float = 0.0
    """Share of the candidate's cases that is allowed, for ceilings and disagreement."""
    alpha: float | None = None
    """Its own level; None: an equal part of the rollout's."""
    must_show: bool = True
    """Of a harm guard: whether `no_worse_than` is to be shown of it. Of outcomes: whether they must
    be shown not to be worse by the margin."""
    side: Side = _NO_WORSE
    """Of outcomes: by how much worse nobody minds, and which way is worse."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Outcomes of the two variants, and what difference could have been seen."""

    side: Side
    means: tuple[float, float]
    """Of candidate and control, as they are."""
    interval: tuple[float, float, float] | None
    """Best, lowest and highest difference, candidate minus control, always valid at 95 %; None:
    fewer units have an outcome than that takes."""
    log_shown: float
    """Evidence that the candidate is not worse by the margin."""

    @property
    def is_shown(self) -> bool:
        """Whether the candidate is known not to be worse by the margin."""
        return self.log_shown >= _SHOWN

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; a mean of nobody is null."""
        low_high = self.interval
        return {
            "candidate": _rounded(self.means[CANDIDATE]),
            "control": _rounded(self.means[CONTROL]),
            "better": "lower" if self.side.is_lower_better else "higher",
            "margin": self.side.margin,
            "difference": None if low_high is None else [_rounded(value) for value in low_high],
            "detectable": None if low_high is None else _rounded((low_high[2] - low_high[1]) / 2),
            "evidence_not_worse": _factor(self.log_shown),
            "evidence_needed": ENOUGH_EVIDENCE,
            "not_worse": self.is_shown,
        }


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
    events: tuple[Integers, Floats] | None = None
    """Bad events by weight and variant, and the weights."""
    compared: Compared | None = None
    """Of outcomes."""

    @property
    def is_breach(self) -> bool:
        """Whether it found what must not be."""
        return self.log_evidence >= self.log_bound

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """Best, lowest and highest ratio of rates, always valid at 95 %; reckoned if asked."""
        return None if self.events is None else harm.ratio_interval(*self.events)

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
            if (ratio := self.ratio) is None
            else [round(value, 4) if math.isfinite(value) else None for value in ratio],
            **({} if self.compared is None else {"outcome": self.compared.to_dict()}),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all guards together say, and why."""

    kind: Kind
    reason: str
    findings: tuple[Finding, ...] = ()
    action: Action | None = None
    """What to do about a breach."""
    needs: tuple[str, ...] = ()
    """What must still be seen before it is ok."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "verdict": self.kind,
            "reason": self.reason,
            "needs": self.needs,
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
    labelled: Labelled | None = None,
) -> Verdict:
    """The verdict on a step.

    Parameters
    ----------
    evidence : counts of the whole rollout, all workers together
    alpha : probability that a candidate without fault is ever found at fault, over all guards
    hard : sentences about what needs no statistics (a worker killed, outputs not finite)
    peaks : highest evidence so far; updated
    labelled : outcomes of units, where labels have arrived
    """
    peaks = peaks if peaks is not None else Peaks()
    bounds = log_bounds(guards, alpha)
    labelled = labelled if labelled is not None else Labelled()
    found = tuple(
        _finding(guard, evidence, bounds[guard.name], peaks, labelled) for guard in guards
    )
    found = _doubted(guards, found)
    if hard:
        return Verdict("breach", "; ".join(hard), found, "abort")
    for action, kind in (("abort", "breach"), ("invalid", "invalid"), ("hold", "breach")):
        over = [finding for finding in found if finding.is_breach and finding.action == action]
        if over:
            reason = "; ".join(_why(finding) for finding in over)
            return Verdict(kind, reason, found, over[0].action)  # type: ignore[arg-type]  # literals
    if needs := tuple(_needs(evidence, guards, exposure, found)):
        return Verdict("inconclusive", "; ".join(needs), found, needs=needs)
    return Verdict("ok", f"{exposure.units} units and nothing found", found)


def _finding(
    guard: Guard,
    evidence: Evidence,
    log_bound: float,
    peaks: Peaks,
    labelled: Labelled,
) -> Finding:
    units = evidence.total(evidence.units)
    hits = np.zeros(2, np.int64)
    events = compared = None
    log = 0.0
    if guard.kind == "outcome":
        log, shown = labelled.log_evidence(guard.side)
        units = labelled.n()
        ones = evidence.total(labelled.ones)
        hits = ones if labelled.is_binary else hits
        compared = _compared(guard.side, labelled, peaks.raised(f"{guard.name}:shown", shown))
    elif guard.kind == "labelled":
        units = hits = labelled.n()
        weights, counts = both(labelled.units)
        log = float(balance.log_evidence(counts, weights)) if weights.size else 0.0
    elif guard.kind == "ceiling":
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
    elif guard.kind == "harm":
        weights, bad = both(evidence.events.get(guard.event, {}))
        if weights.size:
            hits = bad.sum(axis=0)
            events = bad, weights
            log = float(harm.log_evidence(bad, weights, ratio_allowed=guard.ratio_max))
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
        events,
        compared,
    )


def _doubted(guards: Sequence[Guard], found: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings about outcomes, as far as it can be trusted who gets a label.

    Where labels depend on the variant, outcomes seem to differ too. So these need more evidence, by
    the factor that there is against fair labels; once those are known to be unfair, nothing is
    said about the candidate.
    """
    unfair = next(
        (f for guard, f in zip(guards, found, strict=True) if guard.kind == "labelled"), None
    )
    if unfair is None:
        return tuple(found)
    more = max(unfair.log_evidence, 0.0)
    return tuple(
        replace(
            finding,
            log_bound=finding.log_bound + more,
            action="invalid" if unfair.is_breach else finding.action,
        )
        if guard.kind == "outcome"
        else finding
        for guard, finding in zip(guards, found, strict=True)
    )


def _compared(side: Side, labelled: Labelled, log_shown: float) -> Compared:
    means = [sums.total / sums.n if sums.n else math.nan for sums in labelled.outcomes]
    return Compared(side, (means[CANDIDATE], means[CONTROL]), labelled.interval(), log_shown)


def _needs(
    evidence: Evidence, guards: Sequence[Guard], exposure: Exposure, found: Sequence[Finding]
) -> Iterator[str]:
    if exposure.units < exposure.units_min:
        yield f"the candidate has met {exposure.units} of {exposure.units_min} units"
    if not exposure.is_long_enough:
        yield "the step has not lasted long enough"
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
            yield (
                f"{guard.name}: not yet shown that the ratio is below"
                f" {exposure.no_worse_than:g} ({missing})"
            )
    for guard, finding in zip(guards, found, strict=True):
        compared = finding.compared
        if compared is not None and guard.must_show and not compared.is_shown:
            yield (
                f"{guard.name}: not yet shown that it is not worse by {guard.side.margin:g};"
                f" {finding.candidate[1]} and {finding.control[1]} units have a label"
                f" (evidence {_factor(compared.log_shown):,.3g}, needs {ENOUGH_EVIDENCE:g})"
            )


def _why(finding: Finding) -> str:
    if finding.compared is not None:
        return _why_outcome(finding, finding.compared)
    (hits, of), (control_hits, control_of) = finding.candidate, finding.control
    return (
        f"{finding.name}: candidate {hits} of {of}, control {control_hits} of {control_of};"
        f" evidence {_factor(finding.log_evidence):,.0f} (needs {_factor(finding.log_bound):,.0f})"
    )


def _why_outcome(finding: Finding, compared: Compared) -> str:
    better = "lower" if compared.side.is_lower_better else "higher"
    means = [f"{mean:.4g} of {n} units" for mean, n in (
        (compared.means[CANDIDATE], finding.candidate[1]),
        (compared.means[CONTROL], finding.control[1]),
    )]  # fmt: skip
    return (
        f"{finding.name}: candidate {means[0]}, control {means[1]}, {better} is better,"
        f" {compared.side.margin:g} is allowed;"
        f" evidence {_factor(finding.log_evidence):,.0f} (needs {_factor(finding.log_bound):,.0f})"
    )


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _factor(log: float) -> float:
    return float(f"{math.exp(min(log, 230.0)):.4g}")
