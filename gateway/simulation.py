"""What a route would do, with one request or with captured ones. Nothing is executed.

Exact as long as the salt of the split is the one that a request was captured under, and the route
looks at nothing that was not kept; what is not exact is counted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from gateway.capture.record import Record, Unit, array_of
from gateway.errors import TensorError
from gateway.protocol.call import Call, n_rows
from gateway.recorder import salt_id
from gateway.router import Choice, Decision, Headers, Look, Model, Routing
from gateway.telemetry import Telemetry
from registry import buckets, routes
from registry.revisions import ModelState
from registry.routes import Route
from registry.signature import Signature

_REST_RECORDS = 4
"""After so many records others get their turn."""


class Way:
    """A route in force, or one that might be: who would get a captured request."""

    def __init__(self, model: str, state: ModelState, revision: int = 0) -> None:
        """A model without a route has one that leaves everything to the champion."""
        self.model = model
        route = state.route or Route()
        whole = msgspec.structs.replace(state, route=route)
        self.routing = Routing(model, whole, revision, Telemetry())
        self._salt = bytes.fromhex(state.salts.get("split", "00" * buckets.SALT_BYTES))
        self.salt_id = salt_id(self._salt)
        self._sources = routes.sources(route)
        self._kinds = [kind for kind in route.unit if kind != routes.UNIT_REQUEST]

    def decide(self, record: Record) -> "Guess":
        """What the route says of a captured request."""
        headers = [
            (name.encode(), value.encode("latin-1", "replace"))
            for name, value in record.headers.items()
        ]
        headers += [
            (unit.kind.removeprefix("header:").encode(), unit.value)
            for unit in record.units
            if unit.value is not None and unit.kind.startswith("header:")
        ]
        look = _look(record) if self.routing.reads_body else None
        unknown = tuple(sorted(s for s in self._sources if not _is_known(s, record, look)))
        if (decision := self.routing.ruled(headers, look)) is not None:
            return Guess(decision, "", unknown=unknown)
        return self._split(record, self.routing.units_of(headers, look), look, unknown)

    def _split(
        self,
        record: Record,
        values: Mapping[str, bytes],
        look: Look | None,
        unknown: tuple[str, ...],
    ) -> "Guess":
        kept = {unit.kind: unit for unit in record.units}
        for kind in self._kinds:
            if kind in values:
                bucket = buckets.bucket_of_bytes(self._salt, values[kind])
                return Guess(self.routing.drawn(kind, bucket), kind, unknown=unknown)
            if kind in kept:
                bucket, is_exact = self._bucket(record, kept[kind])
                return Guess(self.routing.drawn(kind, bucket), kind, is_exact, unknown)
            if kind not in record.kinds and not _is_known(kind, record, look):
                unknown = (*unknown, kind)
        kind = routes.UNIT_REQUEST
        drawn = kept.get(kind, Unit(kind, 0, record.id))
        if kind in kept and record.salt == self.salt_id:
            return Guess(self.routing.drawn(kind, drawn.bucket), kind, unknown=unknown)
        bucket, _ = self._bucket(record, drawn, is_other=True)
        # Another draw is as good: a request that has no unit is drawn anew each time.
        return Guess(self.routing.drawn(kind, bucket), kind, unknown=unknown)

    def _bucket(self, record: Record, unit: Unit, *, is_other: bool = False) -> tuple[int, bool]:
        """The bucket of a unit by this route's salt, and whether it is that for sure."""
        if record.salt == self.salt_id and not is_other:
            return unit.bucket, True
        if unit.value is not None:
            return buckets.bucket_of_bytes(self._salt, unit.value), True
        # Its hash stands for it: as even, as sticky, but not the same bucket.
        stand_in = unit.hash or record.id
        return buckets.bucket_of(self._salt, stand_in), False


class Guess(NamedTuple):
    """What a route says of a captured request, and how sure that is."""

    decision: Decision
    unit: str
    """Kind of the unit that decided; empty where none did."""
    is_exact: bool = True
    """False where a stand-in was drawn for a unit."""
    unknown: tuple[str, ...] = ()
    """What the route looks at and the capture does not hold: taken as absent."""

    @property
    def rule(self) -> str:
        """The rule that decided; empty where none did."""
        reason = self.decision.choice.reason
        is_rule = reason.startswith("RULE_MATCH(")
        return reason.removeprefix("RULE_MATCH(").removesuffix(")") if is_rule else ""


@dataclass(slots=True)
class _Side:
    """What one route makes of all requests."""

    variants: "Counter[tuple[str, int]]" = field(default_factory=Counter)
    rules: "Counter[str]" = field(default_factory=Counter)
    units: "Counter[str]" = field(default_factory=Counter)

    def add(self, guess: Guess) -> None:
        choice = guess.decision.choice
        self.variants[choice.variant, choice.version] += 1
        if guess.rule:
            self.rules[guess.rule] += 1
        elif guess.unit:
            self.units[guess.unit] += 1


@dataclass(slots=True)
class Simulated:
    """Captured requests through two routes."""

    requests: int = 0
    """Those that a route decides about."""
    pinned: int = 0
    """Calls by number and overrides: they go where they say, under any route."""
    before: _Side = field(default_factory=_Side)
    after: _Side = field(default_factory=_Side)
    moved: "Counter[tuple[str, str]]" = field(default_factory=Counter)
    """Requests that another version answers, by variant before and after."""
    units: set[str] = field(default_factory=set)
    moved_units: set[str] = field(default_factory=set)
    """By hash: sticky units, and those of them with a request that another version answers."""
    stand_ins: int = 0
    unknown: "Counter[str]" = field(default_factory=Counter)
    first: float | None = None
    last: float | None = None

    def add(self, record: Record, before: Guess, after: Guess) -> None:
        """Count one request."""
        self.requests += 1
        self.first = record.time if self.first is None else min(self.first, record.time)
        self.last = record.time if self.last is None else max(self.last, record.time)
        self.before.add(before)
        self.after.add(after)
        was, will = before.decision.choice, after.decision.choice
        is_moved = was.version != will.version
        if is_moved:
            self.moved[was.variant, will.variant] += 1
        sticky = next((u.hash for u in record.units if u.kind != routes.UNIT_REQUEST), "")
        if sticky:
            self.units.add(sticky)
            if is_moved:
                self.moved_units.add(sticky)
        self.stand_ins += not (before.is_exact and after.is_exact)
        self.unknown.update({*before.unknown, *after.unknown})

    def document(self) -> dict[str, Any]:
        """As programs are told it."""
        n = max(self.requests, 1)
        before, after = self.before, self.after
        variants = [
            {
                "variant": name,
                "version": version or None,
                "before": before.variants[name, version],
                "after": after.variants[name, version],
                "percent_before": round(100 * before.variants[name, version] / n, 2),
                "percent_after": round(100 * after.variants[name, version] / n, 2),
            }
            for name, version in sorted({*before.variants, *after.variants})
        ]
        return {
            "requests": self.requests,
            "pinned": self.pinned,
            "first": self.first,
            "last": self.last,
            "variants": variants,
            "moved": {
                "requests": self.moved.total(),
                "percent": round(100 * self.moved.total() / n, 2),
                "units": len(self.moved_units),
                "of_units": len(self.units),
                "ways": [
                    {"before": one, "after": other, "requests": count}
                    for (one, other), count in sorted(self.moved.items())
                ],
            },
            "rules": _both(before.rules, after.rules),
            "units": _both(before.units, after.units),
            "stand_ins": self.stand_ins,
            "not_captured": dict(sorted(self.unknown.items())),
        }


def simulate(
    records: Iterable[Record],
    before: Way,
    after: Way,
    rest: Callable[[], None] = lambda: None,
) -> Simulated:
    """Captured requests of a model through the route in force and through another.

    Parameters
    ----------
    rest : called now and then, so that others get their turn
    """
    found = Simulated()
    for k, record in enumerate(records):
        if k % _REST_RECORDS == 0:
            rest()
        if record.model != before.model:
            continue
        if record.traffic != "primary":
            found.pinned += 1
            continue
        found.add(record, before.decide(record), after.decide(record))
    return found


def explain(
    model: str,
    state: ModelState,
    revision: int,
    champion: int | None,
    headers: Headers,
    call: Call | None,
    signature: Signature | None,
) -> bytes:
    """The decision of a route about a request, as its header says it, with no server running.

    Parameters
    ----------
    champion : the version that answers without a route
    signature : of the champion, where it is known: the request is held against it

    Raises
    ------
    GatewayError : the request does not fit, or names a variant that it may not.
    """
    if state.route is None:
        return Model(model, (), default=champion, revision=revision).said
    routing = Routing(model, state, revision, Telemetry())
    wanted = dict(headers).get(b"x-driftgate-version")
    if wanted is not None:
        return routing.override(wanted.decode("latin-1")).header
    decision = routing.pick(headers, _look_of(call, signature, model))
    choice = decision.choice
    if not choice.version and champion is not None:
        named = Choice.of(choice.variant, champion, choice.reason, revision, choice.p)
        return named.before if decision.bucket is None else decision.header
    return decision.header


def _both(before: "Counter[str]", after: "Counter[str]") -> list[dict[str, Any]]:
    return [
        {"name": name, "before": before[name], "after": after[name]}
        for name in sorted({*before, *after})
    ]


def _look_of(call: Call | None, signature: Signature | None, model: str) -> Look | None:
    if call is None:
        return None
    names, arrays = [tensor.name for tensor in call.inputs], [t.array for t in call.inputs]
    rows = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
    if signature is not None:
        names, arrays = [spec.name for spec in signature.inputs], call.bind(signature, model)
        if signature.has_row_axis:
            rows = n_rows(arrays, signature, model)
    return Look(call.parameters or {}, names, arrays, rows)


def _look(record: Record) -> Look:
    """A captured request as rules and units see it: of its inputs, those of one element."""
    names, arrays = [], []
    for tensor in record.inputs or ():
        if all(size == 1 for size in tensor.shape):
            try:
                arrays.append(array_of(tensor))
                names.append(tensor.name)
            except TensorError:
                continue
    parameters = dict(record.parameters)
    for unit in record.units:
        if unit.value is not None and unit.kind.startswith("field:"):
            parameters.setdefault(unit.kind.removeprefix("field:"), unit.value.decode())
    return Look(parameters, names, arrays, record.rows)


def _is_known(source: str, record: Record, look: Look | None) -> bool:
    """Whether a capture tells what a request had there, or that it had nothing."""
    units = {unit.kind: unit for unit in record.units}
    if source in record.looked or (source in units and units[source].value is not None):
        return True
    kind, _, name = source.partition(":")
    if kind == "field" and look is not None and look.field(name) is not None:
        return True
    # A unit that the route of that time asked for and the request did not have.
    return source in record.kinds and source not in units
