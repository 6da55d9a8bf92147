"""Plan, phases and allowed transitions of a rollout: pure functions of a model's state.

    preparing -> shadowing -> step k -> step k + 1 ... -> baking -> done
    any of these -> holding -> where it was      any of them -> aborted      preparing -> failed

A rollout owns the split of its model's route until it ends. Abort is unlike the others: it only
takes weight from the candidate, needs nothing, and always succeeds.
"""

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from registry import buckets, routes
from registry.changes import Known, Models, SetRollout, managed
from registry.errors import RolloutError
from registry.revisions import ModelState
from registry.routes import CHAMPION, Part, Percent, Route, Shadow, Share, Tolerance

CANDIDATE = "challenger"
"""The alias that a candidate gets."""
PREVIOUS = "previous"
UNITS_UNKNOWN = -1
"""In place of the units met so far, from those who move a rollout by hand."""

Phase = Literal["preparing", "shadowing", "step", "holding", "baking", "done", "aborted", "failed"]
ENDED: tuple[Phase, ...] = ("done", "aborted", "failed")
MOVES: dict[Phase, tuple[Phase, ...]] = {
    "preparing": ("shadowing", "step", "holding", "aborted", "failed"),
    "shadowing": ("step", "holding", "aborted"),
    "step": ("step", "holding", "baking", "done", "aborted"),
    "holding": ("preparing", "shadowing", "step", "baking", "done", "aborted"),
    "baking": ("holding", "done", "aborted"),
    "done": (),
    "aborted": (),
    "failed": (),
}
"""Where each phase may lead."""
Cause = Literal["manual", "inconclusive", "invalid", "breach", "window", "drift", "workers"]
GuardAction = Literal["abort", "hold", "ignore"]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Step(Part, frozen=True):
    """A weight, and what must have been seen before the next one."""

    weight: Percent
    """Percent of units that the candidate answers."""
    for_s: float = 600.0
    """Shortest time, in seconds."""
    units_min: int = 200
    """Units that the candidate must have met in this step."""


class ShadowFirst(Part, frozen=True):
    """Copies before any answers."""

    for_s: float = 3600.0
    """Shortest time, in seconds."""
    pairs_min: int = 2000
    """Pairs of answers that must have been compared."""
    sample: Percent = 100
    """Percent of units that are copied."""
    disagreement_max: Percent = 3
    """Percent of units that may disagree."""
    compare: dict[str, Tolerance] = msgspec.field(default_factory=dict)
    """By output, as in a route; others by the default tolerance."""
    inflight_max: int = 64
    """Copies that may wait or run in a worker; with more than 1 % dropped no step follows."""
    deadline_s: float = 0.5
    """A copy that is older is dropped."""
    action: Literal["abort", "hold"] = "hold"
    """What it does when more disagree."""

    @property
    def shadow(self) -> Shadow:
        """As a part of the route."""
        return Shadow(
            to=CANDIDATE,
            sample=self.sample,
            inflight_max=self.inflight_max,
            deadline_s=self.deadline_s,
            compare=self.compare,
            disagreement_max=self.disagreement_max,
        )


class Harm(Part, frozen=True):
    """A guard on how often something bad happens, candidate to champion."""

    ratio_max: float = 1.1
    """Ratio of rates that nobody minds."""
    action: GuardAction = "abort"
    """What a breach does."""


class Slow(Part, frozen=True):
    """A guard on how often requests are slower than the champion's own quantile."""

    quantile: float = 0.95
    """The champion's quantile that becomes the threshold; frozen when the candidate starts."""
    ratio_max: float = 1.2
    """Ratio of rates that nobody minds."""
    action: GuardAction = "abort"
    """What a breach does."""


class Watch(Part, frozen=True):
    """A guard without a number of its own."""

    action: GuardAction = "hold"
    """What a breach does."""


class Drift(Part, frozen=True):
    """The guard on drift alarms: they say that the population is unusual, not whose fault it is."""

    action: Literal["hold", "ignore"] = "hold"
    """What an open alarm does."""


class SampleRatio(Part, frozen=True):
    """The guard on where units went. A breach makes the rollout invalid: it holds."""

    alpha: float = 0.001
    """Its own level."""
    action: Literal["hold", "ignore"] = "hold"
    """What a breach does."""


class Outcome(Part, frozen=True):
    """The guard on what turned out to be true, by labels that arrive later."""

    metric: Literal["label", "wrong", "absolute_error", "squared_error"] = "label"
    """The label itself, or how the answer missed it."""
    direction: Literal["lower_is_better", "higher_is_better"] | None = None
    """Needed for `label`; of a miss lower is better."""
    margin: float = 0.0
    """Worse by so much, on average over units, is nobody's concern; in units of the metric."""
    labels_within_s: float = 604800.0
    """Labels that arrive later than so long after their prediction do not count, in seconds."""
    required: bool = False
    """Whether a step is ok only once the candidate is shown not to be worse by the margin."""
    action: GuardAction = "abort"
    """What a breach does."""

    @property
    def is_lower_better(self) -> bool:
        """Which way is worse."""
        return self.direction != "higher_is_better"


class Ceiling(Part, frozen=True):
    """Objectives that the candidate must meet whatever the champion does."""

    error_share: Percent | None = None
    """Percent of its requests that may fail."""
    p99_s: float | None = None
    """One request in a hundred may take longer, in seconds."""


class Guards(Part, frozen=True):
    """What is watched."""

    error_rate: Harm = Harm()
    """Requests that fail, or are not answered in time."""
    slow_requests: Slow = Slow()
    """Requests slower than the champion's quantile."""
    not_finite: Harm = Harm(ratio_max=1.0)
    """Outputs that are not numbers; a hard breach while the champion has none."""
    output_shift: Watch = Watch()
    """What is answered."""
    input_balance: Watch = Watch()
    """What is asked: must not differ, or the rollout is invalid."""
    srm: SampleRatio = SampleRatio()
    """Where units went."""
    drift: Drift = Drift()
    """Drift alarms of either version, against its reference."""
    outcome: Outcome | None = None
    """What turned out to be true; none: labels are not looked at."""
    ceiling: Ceiling = Ceiling()
    """Objectives."""


class Window(Part, frozen=True):
    """When weights may rise. Holding, aborting and watching know no hours."""

    days: tuple[Day, ...] = DAYS
    """Days of the week, in UTC."""
    from_h: float = 0.0
    """Hour of the day, in UTC."""
    to_h: float = 24.0
    """Hour of the day, in UTC."""


class Plan(Part, frozen=True):
    """How a candidate gets its traffic, and what must hold meanwhile."""

    steps: tuple[Step, ...] = (
        Step(weight=1, for_s=600.0, units_min=200),
        Step(weight=5, for_s=1800.0, units_min=2000),
        Step(weight=20, for_s=7200.0, units_min=5000),
        Step(weight=50, for_s=21600.0, units_min=10000),
    )
    """In order; weights only rise."""
    shadow_first: ShadowFirst | None = None
    """Copies before the first step; none: at once."""
    guards: Guards = Guards()
    """What is watched."""
    alpha: float = 0.01
    """Probability that a candidate without fault is found at fault, over all guards."""
    no_worse_than: float | None = None
    """Ratio of rates that errors and slowness must show not to reach; none: units are enough."""
    on_inconclusive: Literal["hold", "abort", "advance"] = "hold"
    """What happens when a step has lasted `deadline_s` and is not ok."""
    deadline_s: float = 259200.0
    """Longest time of one step, in seconds."""
    hold_back: Percent = 5
    """Percent that stay with the old champion while baking: afterwards there is no control."""
    bake_s: float = 86400.0
    """Time after promotion during which a breach rolls back, in seconds."""
    window: Window = Window()
    """When weights may rise."""
    auto_promote: bool = True
    """Promote by itself when the last step is ok; else hold there for somebody to promote."""
    unattended_s_max: float = 900.0
    """Without a controller for so long, workers take the weight from the candidate; 0: never."""


PARTS: tuple[type[Part], ...] = (
    Plan, Step, ShadowFirst, Guards, Harm, Slow, Watch, Drift, SampleRatio, Outcome, Ceiling,
    Window,
)  # fmt: skip
"""Every mapping there is: docs/reference/rollout-format.md lists their fields, a test compares."""


class Rollout(Part, frozen=True):
    """Where a rollout is. Part of a revision, written by the tool."""

    id: str
    """`r-` and twelve hexadecimal digits."""
    candidate: int
    """Version that is tried."""
    control: int
    """Version that was champion when it began."""
    phase: Phase
    """Where it is."""
    plan: Plan
    """What was asked for."""
    began: float = 0.0
    """When it was started, in seconds of UTC."""
    step: int = 0
    """Which step, from 0."""
    since: float = 0.0
    """When the phase (or the step) began, in seconds of UTC."""
    units_before: int = 0
    """Units that the candidate had met when the step began; -1: the controller counts them from
    its first look, because whoever moved it did not know."""
    cause: str | None = None
    """Why it holds: one of `Cause`; or who has ended it from outside."""
    held: Phase | None = None
    """The phase that it holds in."""
    reason: str = ""
    """Why it is where it is, in a sentence."""
    slow_s: dict[str, float] = msgspec.field(default_factory=dict)
    """Thresholds of duration that were frozen, by guard."""
    edges: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    """Edges of bins that were frozen, by channel of numbers."""
    levels: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Classes with bins of their own that were frozen, by channel; of texts a hash."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.phase in ENDED

    @property
    def at(self) -> Phase:
        """The phase that it is in, or holds in."""
        return self.phase if self.is_over else self.held or self.phase

    @property
    def weight(self) -> float:
        """Percent that the candidate answers."""
        if self.at == "step":
            return self.plan.steps[self.step].weight
        return {"baking": 100 - self.plan.hold_back, "done": 100}.get(self.at, 0)


def _unchanged(state: ModelState) -> ModelState:
    return state


@dataclass(frozen=True, slots=True)
class Roll(SetRollout):
    """A transition of a rollout as a change, so that it goes through the one door."""

    move: Callable[[ModelState], ModelState] = _unchanged
    """From the state of a managed model to the next."""

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        return {**models, self.model: self.move(managed(models, self.model, known))}


def parse_plan(value: object) -> Plan:
    """A plan from YAML or JSON text, or from what such a text holds.

    Raises
    ------
    RolloutError : every problem at once.
    """
    if value is None:
        return Plan()
    try:
        tree = routes.read_text(value) if isinstance(value, str | bytes) else value
    except routes.RouteError as error:
        raise RolloutError(*error.problems) from None
    plan, problems = routes.read_part(Plan, {} if tree is None else tree, "plan")
    if plan is not None:
        problems.extend(f"plan{problem}" for problem in _check(plan))
    if problems or plan is None:
        raise RolloutError(*problems)
    return plan


def rollout_of(state: ModelState) -> Rollout | None:
    """The rollout that a model's state holds, also one that has ended.

    Raises
    ------
    RolloutError : it was written by something else.
    """
    if state.rollout is None:
        return None
    try:
        return msgspec.convert(state.rollout, Rollout)
    except msgspec.ValidationError as error:
        raise RolloutError(f"rollout: {error}") from None


def start(state: ModelState, candidate: int, plan: Plan, *, now: float, control: int) -> ModelState:
    """The state with a new rollout, prepared with weight 0, and a new salt.

    Parameters
    ----------
    control : the version that answers now

    Raises
    ------
    RolloutError : another one is under way, the candidate is champion, or the split is somebody's.
    """
    before = rollout_of(state)
    route = state.route or Route()
    problems = []
    if before is not None and not before.is_over:
        problems.append(f"rollout {before.id} of version {before.candidate} is under way")
    if candidate == control:
        problems.append(f"version {candidate} is the champion already")
    others = [str(share.to) for share in route.split if str(share.to) not in (CHAMPION, CANDIDATE)]
    if others:
        problems.append(f"the route's split names {', '.join(others)}: take them out first")
    if problems:
        raise RolloutError(*problems)
    rollout = Rollout(
        id=f"r-{secrets.token_hex(6)}",
        candidate=candidate,
        control=control,
        phase="preparing",
        plan=plan,
        began=now,
        since=now,
        reason="preparing: waiting until all workers have the candidate warm",
    )
    # A new draw: nobody is the first to try every candidate, and evidence starts from nothing.
    salts = {**state.salts, "split": secrets.token_hex(16), "shadow": secrets.token_hex(16)}
    aliases = {**state.aliases, CHAMPION: control, CANDIDATE: candidate}
    state = msgspec.structs.replace(state, follow=False, aliases=aliases, salts=salts, buckets="")
    return _with(state, rollout)


def starting(candidate: int, plan: Plan, *, now: float) -> Callable[[ModelState], ModelState]:
    """`start` against the champion of the state that it is made on.

    Raises
    ------
    RolloutError : the plan asks for what this release does not do.
    """
    return lambda state: start(
        state, candidate, plan, now=now, control=state.aliases.get(CHAMPION, 0)
    )


def asked(action: str, *, now: float, reason: str = "") -> Callable[[ModelState], ModelState]:
    """What somebody asks of a rollout: pause, resume, advance, abort or promote.

    Raises
    ------
    RolloutError : there is no such action.
    """
    moves: dict[str, Callable[[ModelState], ModelState]] = {
        "pause": lambda state: hold(state, "manual", reason or "paused", now=now),
        "resume": resume,
        "advance": lambda state: advance(state, now=now, units=UNITS_UNKNOWN),
        "abort": lambda state: abort(state, reason or "aborted by hand", now=now),
        "promote": lambda state: promote(state, now=now, units=UNITS_UNKNOWN),
    }
    if action not in moves:
        raise RolloutError(f"no action {action[:40]!r}; there are: {', '.join(moves)}")
    return moves[action]


def find(models: Models, name: str) -> tuple[str, Rollout] | None:
    """The model and the rollout of this id, or of the model of this name."""
    found = {
        model: rollout
        for model, state in models.items()
        if (rollout := rollout_of(state)) is not None
    }
    for model, rollout in found.items():
        if rollout.id == name:
            return model, rollout
    return (name, found[name]) if name in found else None


def commit(state: ModelState, *, now: float) -> ModelState:
    """All workers are ready: copies first if the plan says so, else the first weight."""
    rollout = _under_way(state)
    if rollout.plan.shadow_first is not None and rollout.at == "preparing":
        return _moved(state, "shadowing", now, reason="comparing copies")
    return _moved(state, "step", now, step=0, reason=f"{rollout.plan.steps[0].weight:g} %")


def advance(state: ModelState, *, now: float, units: int = 0) -> ModelState:
    """The next step, or promotion after the last one. `units`: met by the candidate so far."""
    rollout = _under_way(state)
    if rollout.at in ("preparing", "shadowing"):
        if rollout.at == "preparing":
            raise RolloutError("still preparing: not all workers have the candidate warm")
        return commit(state, now=now)
    if rollout.at == "baking":
        return finish(state, now=now)
    if rollout.step + 1 >= len(rollout.plan.steps):
        return promote(state, now=now, units=units)
    step = rollout.step + 1
    weight = rollout.plan.steps[step].weight
    return _moved(state, "step", now, step=step, units_before=units, reason=f"{weight:g} %")


def hold(state: ModelState, cause: Cause, reason: str, *, now: float) -> ModelState:
    """Stay as it is until somebody (or the controller) resumes; a held one stays held."""
    rollout = _under_way(state)
    if rollout.phase == "holding":
        if (rollout.cause, rollout.reason) == (cause, reason) or rollout.cause == "manual":
            return state
        return _with(state, msgspec.structs.replace(rollout, cause=cause, reason=reason))
    held = msgspec.structs.replace(
        rollout, phase="holding", held=rollout.phase, cause=cause, reason=reason
    )
    del now  # The step's time goes on.
    return _with(state, held)


def resume(state: ModelState) -> ModelState:
    """Go on where it holds; one that does not hold stays as it is."""
    rollout = _under_way(state)
    if rollout.held is None:
        return state
    gone_on = msgspec.structs.replace(
        rollout, phase=rollout.held, held=None, cause=None, reason="resumed"
    )
    return _with(state, gone_on)


def freeze(
    state: ModelState,
    *,
    slow_s: Mapping[str, float],
    edges: Mapping[str, Sequence[float]],
    levels: Mapping[str, Sequence[str]] | None = None,
) -> ModelState:
    """Thresholds from the champion's own numbers, which the guards count by from now on."""
    rollout = _under_way(state)
    frozen = msgspec.structs.replace(
        rollout,
        slow_s={**slow_s, **rollout.slow_s},
        edges={**{name: tuple(cuts) for name, cuts in edges.items()}, **rollout.edges},
        levels={**{name: tuple(of) for name, of in (levels or {}).items()}, **rollout.levels},
    )
    return _with(state, frozen)


def promote(state: ModelState, *, now: float, units: int = 0) -> ModelState:
    """The candidate is champion; the old one is `previous`, and keeps the hold-back."""
    rollout = _under_way(state)
    if rollout.at == "baking":
        return state
    if rollout.at in ("preparing", "shadowing"):
        raise RolloutError(f"still {rollout.at}: it has answered nobody; use alias or promote")
    aliases = {**state.aliases, CHAMPION: rollout.candidate, PREVIOUS: rollout.control}
    state = msgspec.structs.replace(
        state, aliases=aliases, buckets=_renamed(state.buckets, {CANDIDATE: CHAMPION})
    )
    phase: Phase = "baking" if rollout.plan.bake_s > 0 else "done"
    return _moved(state, phase, now, units_before=units, reason="promoted")


def finish(state: ModelState, *, now: float) -> ModelState:
    """Baked: everybody gets the new champion."""
    return _moved(state, "done", now, reason="baked")


def abort(state: ModelState, reason: str, *, now: float) -> ModelState:
    """Take all weight from the candidate. Needs nothing, always succeeds, also twice."""
    rollout = rollout_of(state)
    if rollout is None or rollout.phase in ("aborted", "failed", "done"):
        return state
    if rollout.at == "baking":
        aliases = {**state.aliases, CHAMPION: rollout.control, CANDIDATE: rollout.candidate}
        aliases.pop(PREVIOUS, None)
        state = msgspec.structs.replace(state, aliases=aliases)
    return _moved(state, "aborted", now, reason=reason)


def fail(state: ModelState, reason: str, *, now: float) -> ModelState:
    """The candidate could not be opened: it never answered."""
    return _moved(state, "failed", now, reason=reason)


def is_open(window: Window, weekday: int, hour: float) -> bool:
    """Whether weights may rise at this time (UTC; Monday is 0)."""
    return DAYS[weekday] in window.days and window.from_h <= hour < window.to_h


def _under_way(state: ModelState) -> Rollout:
    rollout = rollout_of(state)
    if rollout is None:
        raise RolloutError("there is no rollout")
    if rollout.is_over:
        raise RolloutError(f"rollout {rollout.id} is {rollout.phase}")
    return rollout


def _moved(state: ModelState, phase: Phase, now: float, **changes: Any) -> ModelState:
    rollout = _under_way(state)
    if phase not in MOVES[rollout.at] and phase != rollout.at:
        raise RolloutError(f"rollout {rollout.id}: {rollout.at} does not lead to {phase}")
    moved = msgspec.structs.replace(
        rollout, phase=phase, since=now, held=None, cause=None, **changes
    )
    return _with(state, moved)


def _with(state: ModelState, rollout: Rollout) -> ModelState:
    """The state with this rollout, and the split and shadow that go with it."""
    route = state.route or Route()
    shadow = tuple(s for s in route.shadow if str(s.to) != CANDIDATE)
    first = rollout.plan.shadow_first
    if rollout.at == "shadowing" and first is not None:
        shadow = (*shadow, first.shadow)
    route = msgspec.structs.replace(route, split=_split(rollout), shadow=shadow)
    seed = bytes.fromhex(state.salts.get("split", "")) or b"\0"
    table = ""
    if route.split:
        # Buckets of the last table whose variants are gone go back to the champion.
        known = {str(share.to): str(share.to) for share in route.split}
        before = _renamed(state.buckets, {}, known) if state.buckets else ""
        table = routes.table(route, before, seed).format()
    # As JSON has it (lists, no tuples), so that what is read back is what was written.
    tree: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(rollout))
    return msgspec.structs.replace(
        state, route=None if route == Route() else route, rollout=tree, buckets=table
    )


def _split(rollout: Rollout) -> tuple[Share, ...]:
    champion = Share(to=CHAMPION, weight="rest")
    if rollout.at == "baking":
        held_back = rollout.plan.hold_back
        return (champion, Share(to=PREVIOUS, weight=held_back)) if held_back else ()
    if rollout.is_over:
        return ()
    return (champion, Share(to=CANDIDATE, weight=rollout.weight))


def _renamed(table: str, names: Mapping[str, str], known: Mapping[str, str] | None = None) -> str:
    """A bucket table under other names: after promotion the candidate's buckets are champion's."""
    if not table:
        return ""
    parsed = buckets.Buckets.parse(table)
    to = {**names, CHAMPION: PREVIOUS} if names else {}
    parts = []
    for part in parsed.format().split(","):
        span, _, name = part.partition(":")
        name = to.get(name, name)
        if known is not None and name not in known:
            name = CHAMPION
        parts.append(f"{span}:{name}")
    return buckets.Buckets.parse(",".join(parts)).format()


def _check(plan: Plan) -> Iterator[str]:
    yield from _check_steps(plan)
    if not 0 < plan.alpha <= 0.2:
        yield ".alpha: must be more than 0 and 0.2 at most"
    if not 0 <= plan.hold_back <= 50:
        yield ".hold_back: must be 0 to 50 percent"
    for name in ("deadline_s", "bake_s", "unattended_s_max"):
        if not 0 <= getattr(plan, name) < math.inf:
            yield f".{name}: must be 0 or more seconds"
    if plan.no_worse_than is not None and plan.no_worse_than <= 1:
        yield ".no_worse_than: must be more than 1"
    yield from _check_guards(plan.guards)
    yield from _check_when(plan)


def _check_steps(plan: Plan) -> Iterator[str]:
    if not plan.steps:
        yield ".steps: is empty; name at least one weight"
    before = 0.0
    for k, step in enumerate(plan.steps):
        if not 0 < step.weight < 100 or round(step.weight, 2) != step.weight:
            yield f".steps[{k}].weight: must be more than 0 and less than 100, with two decimals"
        elif step.weight <= before:
            yield f".steps[{k}].weight: {step.weight:g} is not more than {before:g} before"
        before = step.weight
        if not 0 <= step.for_s <= plan.deadline_s:
            yield f".steps[{k}].for_s: must be 0 to deadline_s ({plan.deadline_s:g}) seconds"
        if step.units_min < 1:
            yield f".steps[{k}].units_min: must be at least 1: no data is no success"


def _check_when(plan: Plan) -> Iterator[str]:
    if plan.shadow_first is not None:
        yield from _check_first(plan.shadow_first)
    if not plan.window.days:
        yield ".window.days: is empty: weights could never rise"
    if not 0 <= plan.window.from_h < plan.window.to_h <= 24:
        yield ".window: from_h must be before to_h, both between 0 and 24"


def _check_first(first: ShadowFirst) -> Iterator[str]:
    for name in ("pairs_min", "inflight_max"):
        if getattr(first, name) < 1:
            yield f".shadow_first.{name}: must be at least 1"
    if not 0 < first.deadline_s < math.inf:
        yield ".shadow_first.deadline_s: must be more than 0 seconds"
    for name in ("sample", "disagreement_max"):
        if not 0 < getattr(first, name) < 100 + (name == "sample"):
            yield f".shadow_first.{name}: must be more than 0, and a percentage"


def _check_guards(guards: Guards) -> Iterator[str]:
    for name in ("error_rate", "slow_requests", "not_finite"):
        if not getattr(guards, name).ratio_max >= 1:
            yield f".guards.{name}.ratio_max: must be at least 1"
    if not 0.5 <= guards.slow_requests.quantile < 1:
        yield ".guards.slow_requests.quantile: must be at least 0.5 and less than 1"
    if not 0 < guards.srm.alpha <= 0.2:
        yield ".guards.srm.alpha: must be more than 0 and 0.2 at most"
    if guards.outcome is not None:
        yield from _check_outcome(guards.outcome)
    share, p99_s = guards.ceiling.error_share, guards.ceiling.p99_s
    if share is not None and not 0 < share < 100:
        yield ".guards.ceiling.error_share: must be more than 0 and less than 100 percent"
    if p99_s is not None and not p99_s > 0:
        yield ".guards.ceiling.p99_s: must be more than 0 seconds"


def _check_outcome(outcome: Outcome) -> Iterator[str]:
    at = ".guards.outcome"
    if outcome.metric == "label" and outcome.direction is None:
        yield f"{at}.direction: say lower_is_better or higher_is_better: a label may be either"
    if outcome.metric != "label" and not outcome.is_lower_better:
        yield f"{at}.direction: of {outcome.metric} lower is better"
    if not 0 <= outcome.margin < math.inf:
        yield f"{at}.margin: must be 0 or more"
    if not 0 < outcome.labels_within_s < math.inf:
        yield f"{at}.labels_within_s: must be more than 0 seconds"
    if outcome.required and outcome.action == "ignore":
        yield f"{at}: is required and ignored; leave one of them out"
