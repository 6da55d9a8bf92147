"""What follows for a rollout from its evidence: pure functions, which the controller acts on.

Plan -> guards; evidence -> verdict (by `monitors.guards`); verdict, time and what else there is ->
the next move, or none. No clock and no file, so that thousands of rollouts are decided in tests.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gateway.exposures import BREAKER, RUN_ENDED
from gateway.shadow.tally import BIASED
from monitors.guards import verdict
from monitors.guards.bets import CANDIDATE, CONTROL
from monitors.guards.evidence import Evidence
from monitors.guards.labelled import Labelled, Side
from monitors.guards.verdict import Exposure, Guard, Peaks, Verdict
from registry import rollouts
from registry.revisions import ModelState
from registry.rollouts import Cause, Outcome, Rollout

Move = Callable[[ModelState], ModelState]
"""From the state of a model to the next."""

FOR_PEOPLE = ("manual", "breach", "invalid")
"""Holds that only somebody ends. What a guard once found stays found, also when the worker that
remembered its highest evidence is no more."""
_BEHIND_S_MAX = 30.0
"""Workers that are replaced are behind for a moment; for longer the rollout holds."""


class Readiness(NamedTuple):
    """Whether the live workers could follow a revision."""

    behind: tuple[str, ...] = ()
    """Workers that have not observed it yet, or do not have the candidate open."""
    refused: str = ""
    """Why one of them refused it."""
    for_s: float = 0.0
    """How long it has been so."""


def _ready() -> Readiness:
    return Readiness()


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What else a decision rests on."""

    now: float
    """Seconds of UTC."""
    alarms: Callable[[], Sequence[str]] = tuple
    """Drift alarms that are open for the candidate or the control, as sentences."""
    ready: Callable[[], Readiness] = _ready
    """Whether the workers could follow."""


def judge(
    rollout: Rollout,
    evidence: Evidence,
    *,
    units: int,
    now: float,
    peaks: Peaks | None = None,
    hard: Sequence[str] = (),
    labelled: Labelled | None = None,
) -> Verdict:
    """The verdict on where a rollout is.

    Parameters
    ----------
    evidence : of the whole rollout, all workers together
    units : met by the candidate since the phase or step began
    hard : what happened that needs no statistics
    labelled : outcomes of units that have got one
    """
    plan = rollout.plan
    units_min, for_s = 1, 0.0
    if rollout.at == "step":
        step = plan.steps[rollout.step]
        units_min, for_s = step.units_min, step.for_s
    elif rollout.at == "shadowing" and plan.shadow_first is not None:
        units = evidence.pairs.get("n", 0)
        units_min, for_s = plan.shadow_first.pairs_min, plan.shadow_first.for_s
    elif rollout.at == "baking":
        # Without a hold-back there is no draw, and nobody is counted: only time passes.
        units_min, for_s = int(plan.hold_back > 0), plan.bake_s
    said = verdict.judge(
        evidence,
        guards_of(rollout),
        alpha=plan.alpha,
        exposure=Exposure(
            is_long_enough=now - rollout.since >= for_s,
            units=units,
            units_min=units_min,
            no_worse_than=plan.no_worse_than if rollout.at == "step" else None,
        ),
        hard=[*hard, *_not_finite(rollout, evidence), *_broken(rollout, evidence)],
        peaks=peaks,
        labelled=labelled,
    )
    if said.kind == "ok" and rollout.at == "shadowing" and (why := _biased(evidence)):
        return Verdict("inconclusive", why, said.findings, needs=(why,))
    return said


def _biased(evidence: Evidence) -> str:
    """Why the pairs may not speak for all, if they may not."""
    sampled, dropped = evidence.pairs.get("sampled", 0), evidence.pairs.get("dropped", 0)
    if dropped <= BIASED * sampled:
        return ""
    return (
        f"{100 * dropped / sampled:.1f} % of copies were dropped: what was compared may not speak"
        " for all; raise shadow_first.inflight_max, or lower its sample"
    )


def next_move(rollout: Rollout, said: Verdict, *, met: int, around: Around) -> Move | None:
    """What is to be done now; None: nothing.

    Parameters
    ----------
    met : units that the candidate has met in the whole rollout
    """
    now = around.now
    if said.kind == "breach" and said.action == "abort":
        return lambda state: rollouts.abort(state, said.reason, now=now)
    if rollout.at == "preparing" and (refused := around.ready().refused):
        return lambda state: rollouts.fail(state, refused, now=now)
    if rollout.cause in FOR_PEOPLE:
        return None
    if said.kind in ("invalid", "breach"):
        return _hold(rollout, "invalid" if said.kind == "invalid" else "breach", said.reason, now)
    if rollout.plan.guards.drift.action == "hold" and (alarms := around.alarms()):
        return _hold(rollout, "drift", _of_alarms(alarms), now)
    if rollout.at == "preparing":
        return _rise(rollout, around, lambda state: rollouts.commit(state, now=now))
    if said.kind == "inconclusive":
        return _wait(rollout, said, met, around)
    return _rise(rollout, around, _on(rollout, met, now))


def _wait(rollout: Rollout, said: Verdict, met: int, around: Around) -> Move | None:
    """Too little seen: go on waiting, and after the deadline do as the plan says."""
    now, plan = around.now, rollout.plan
    if rollout.at == "baking" or now - rollout.since < plan.deadline_s:
        return rollouts.resume if rollout.cause not in (None, "inconclusive") else None
    why = f"not ok after {plan.deadline_s:g} s: {said.reason}"
    if plan.on_inconclusive == "abort":
        return lambda state: rollouts.abort(state, why, now=now)
    if plan.on_inconclusive == "advance":
        return _rise(rollout, around, _on(rollout, met, now))
    return _hold(rollout, "inconclusive", why, now)


def _rise(rollout: Rollout, around: Around, move: Move) -> Move | None:
    """Give the candidate more, if hour and workers allow it; one that holds resumes first."""
    at = time.gmtime(around.now)
    if not rollouts.is_open(rollout.plan.window, at.tm_wday, at.tm_hour + at.tm_min / 60):
        why = "outside the window in which weights may rise"
        return _hold(rollout, "window", why, around.now)
    ready = around.ready()
    if ready.behind or ready.refused:
        if rollout.at == "preparing" or ready.for_s < _BEHIND_S_MAX:
            return None
        why = ready.refused or f"not all workers are ready: {', '.join(ready.behind)}"
        return _hold(rollout, "workers", why, around.now)
    return rollouts.resume if rollout.phase == "holding" else move


def _on(rollout: Rollout, met: int, now: float) -> Move:
    is_last = rollout.at == "step" and rollout.step + 1 >= len(rollout.plan.steps)
    if is_last and not rollout.plan.auto_promote:
        why = "the last step is ok; promote it (driftgate canary promote)"
        return lambda state: rollouts.hold(state, "manual", why, now=now)
    return lambda state: rollouts.advance(state, now=now, units=met)


def _hold(rollout: Rollout, cause: Cause, why: str, now: float) -> Move | None:
    """Hold for this cause; one that does already is left alone."""
    if rollout.phase == "holding" and rollout.cause == cause:
        return None
    return lambda state: rollouts.hold(state, cause, why, now=now)


def _of_alarms(alarms: Sequence[str]) -> str:
    return (
        f"drift alarms are open: {'; '.join(alarms)}. It goes on when none is: acknowledge them"
        " (driftgate alarm ack ID), or let what comes in be the new normal"
        " (driftgate drift accept MODEL)"
    )


def guards_of(rollout: Rollout) -> tuple[Guard, ...]:
    """The guards of a rollout, as its plan states them."""
    guards, plan = rollout.plan.guards, rollout.plan
    found = [
        Guard(
            name=name,
            kind="harm",
            event=kind,
            ratio_max=guard.ratio_max,
            action=guard.action,
            # Outputs that are not finite are seen once, or never: there is no rate to show.
            must_show=kind != "not_finite",
        )
        for name, kind, guard in (
            ("error_rate", "error", guards.error_rate),
            ("slow_requests", "slow", guards.slow_requests),
            ("not_finite", "not_finite", guards.not_finite),
        )
        if guard.action != "ignore"
    ]
    for name, kind, watch in (
        ("output_shift", "shift", guards.output_shift),
        ("input_balance", "inputs", guards.input_balance),
    ):
        if watch.action != "ignore":
            action: Any = "invalid" if kind == "inputs" and watch.action == "hold" else watch.action
            found.append(Guard(name=name, kind=kind, action=action))  # type: ignore[arg-type]  # a literal
    if guards.srm.action != "ignore":
        found.append(Guard(name="srm", kind="balance", action="invalid", alpha=guards.srm.alpha))
    if guards.outcome is not None and guards.outcome.action != "ignore":
        found.extend(_on_outcomes(rollout, guards.outcome))
    if guards.ceiling.error_share is not None:
        share = guards.ceiling.error_share / 100
        found.append(
            Guard(name="ceiling_error_share", kind="ceiling", event="error", share_max=share)
        )
    if guards.ceiling.p99_s is not None:
        found.append(Guard(name="ceiling_p99", kind="ceiling", event="late", share_max=0.01))
    if plan.shadow_first is not None:
        share = plan.shadow_first.disagreement_max / 100
        found.append(
            Guard(
                name="disagreement",
                kind="disagreement",
                action=plan.shadow_first.action,
                share_max=share,
            )
        )
    return tuple(found)


def _on_outcomes(rollout: Rollout, outcome: Outcome) -> Iterator[Guard]:
    yield Guard(
        name="outcome",
        kind="outcome",
        action=outcome.action,  # type: ignore[arg-type]  # not "ignore"
        side=Side(outcome.margin, outcome.is_lower_better),
        must_show=outcome.required and rollout.at == "step",
    )
    srm = rollout.plan.guards.srm
    if srm.action != "ignore":
        # Which units get a label must not depend on who answered them.
        yield Guard(name="labelled_ratio", kind="labelled", action="invalid", alpha=srm.alpha)


def _not_finite(rollout: Rollout, evidence: Evidence) -> list[str]:
    """Hard only while the champion has none."""
    bad = evidence.all_events.get("not_finite")
    if bad is None or bad[CONTROL] or not bad[CANDIDATE]:
        return []
    if rollout.plan.guards.not_finite.action != "abort":
        return []
    return [f"version {rollout.candidate} gave outputs that are not finite: {bad[CANDIDATE]}"]


def _broken(rollout: Rollout, evidence: Evidence) -> list[str]:
    """An open breaker of the candidate; a run of it without end, while the champion has none."""
    opened, ended = (
        evidence.all_events.get(kind, np.zeros(2, np.int64)) for kind in (BREAKER, RUN_ENDED)
    )
    found = []
    if opened[CANDIDATE]:
        found.append(f"the breaker of version {rollout.candidate} has opened")
    if ended[CANDIDATE] and not ended[CONTROL]:
        found.append(f"version {rollout.candidate} did not end a run: the watchdog had to")
    return found
