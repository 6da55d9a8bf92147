"""Which variant answers a call. Tables are frozen: a request reads one and sees no change."""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Protocol

from gateway.counters import Counter, Histogram
from gateway.errors import (
    ModelNotFoundError,
    NotReadyError,
    OverrideError,
    UnloadedError,
    VersionNotFoundError,
    VersionRefusedError,
)
from gateway.protocol.call import Served
from gateway.telemetry import REQUEST_SECONDS, REQUESTS, UNIT_FALLBACK, Telemetry
from gateway.tensors import Array
from registry import buckets, names, routes
from registry.buckets import Buckets
from registry.monitoring import Monitoring
from registry.revisions import ModelState
from registry.routes import HeaderMatch, Range, Route, Rule
from registry.signature import Signature

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case and values, as they came."""

FAILED_N, FAILED_NS = "failed_n", "failed_ns"
"""Requests that failed, and nanoseconds until they did: no metrics, but asked for by protocols."""
SHARED_N, SHARED_NS = "shared_n", "shared_ns"
"""Requests, beyond one a run, that had their run together with others, and its nanoseconds."""
NEWEST_RAN_MS = "newest_ran_ms"
"""When a version ran last, in milliseconds since 1970."""
_DRAWN_BYTES = 4096


class Queue(Protocol):
    """Where a variant's rows wait; a route knows no session."""

    @property
    def is_busy(self) -> bool:
        """Whether rows submitted now would have to wait."""

    @property
    def is_behind(self) -> bool:
        """Whether more rows wait than one batch holds."""

    def submit(
        self,
        inputs: list[Array],
        rows: int,
        timeout_s: float,
        allowed_s: float | None = None,
    ) -> "asyncio.Future[list[Array]]":
        """Queue rows; the future holds the outputs."""


class Work(Protocol):
    """What one version's session has done."""

    @property
    def queue_s(self) -> Histogram:
        """Seconds from queued to started, by request."""

    @property
    def run_s(self) -> Histogram:
        """Seconds of each run."""

    @property
    def rows(self) -> Histogram:
        """Rows of each run."""

    @property
    def ran_at(self) -> float:
        """When the newest run started, by `time.monotonic`; 0: none has."""


class Twin(Protocol):
    """A second way into a version's session, beside its queue: the same weights, runs of its own.

    For one thread at a time.
    """

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """All outputs for the inputs, in the model's order."""

    def stop(self) -> None:
        """Ask the run under way to end; from any thread."""


class Meters:
    """What one variant met in one kind of traffic."""

    __slots__ = ("_labels", "_telemetry", "failed_n", "failed_ns", "ok", "seconds")

    def __init__(
        self, telemetry: Telemetry, model: str, version: int, variant: str, traffic: str
    ) -> None:
        self._telemetry = telemetry
        self._labels = (model, str(version), variant, traffic)
        self.ok: Counter = self.failed("ok")
        self.failed_n = telemetry.cell(FAILED_N, *self._labels)
        self.failed_ns = telemetry.cell(FAILED_NS, *self._labels)
        self.seconds: Histogram = telemetry.histogram(REQUEST_SECONDS, *self._labels)

    def failed(self, code: str) -> Counter:
        """Requests that ended with this code."""
        return self._telemetry.counter(REQUESTS, *self._labels, code)

    def fail(self, code: str, seconds: float) -> None:
        """Count one request that ended with an error after so many seconds."""
        self.failed(code).add()
        self.failed_n.add()
        self.failed_ns.add(int(seconds * 1e9))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Variant:
    """A version in a role: what answers. Its session is closed when nobody holds it any more."""

    served: Served
    queue: Queue
    observe: Callable[[list[Array], list[Array], int], None]
    """Offers inputs, outputs and their rows to the monitors. Never waits: drops when full."""
    meters: Meters
    """Counts of calls that named no version."""
    about: Mapping[str, Any]
    """What the warm-up found, for people."""
    work: Work
    can_batch: bool
    """Rows of several requests may share a run."""
    twin: Callable[[], Twin]
    """Makes another way to run it, for copies."""

    @property
    def model(self) -> str:
        """Its model."""
        return self.served.model

    @property
    def version(self) -> int:
        """Its number."""
        return self.served.version

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self.served.signature


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant and why it was picked; made once for a revision, shared by its requests."""

    variant: str
    """As the route's `to` says it."""
    version: int
    reason: str
    p: float
    """The probability that a unit like this one is given this variant."""
    traffic: str
    revision: int
    before: bytes
    after: bytes
    """The decision header around the number of the bucket."""

    @classmethod
    def of(
        cls,
        variant: str,
        version: int,
        reason: str,
        revision: int,
        p: float = 1.0,
        unit: str = "",
        traffic: str = "primary",
    ) -> "Choice":
        """A choice with its header."""
        said = f"rev={revision}; variant={variant}; version={version}; reason={reason}"
        before, after = f"{said}; bucket=", f"; p={p:g}; unit={unit}"
        if not unit:
            before, after = f"{said}; p={p:g}", ""
        return cls(variant, version, reason, p, traffic, revision, before.encode(), after.encode())


class Decision:
    """What was picked for one request. Statistics rest on `p`: it is what was, not what is."""

    __slots__ = ("bucket", "choice", "unit", "unit_kind")

    def __init__(
        self,
        choice: Choice,
        bucket: int | None = None,
        unit_kind: str = "",
        unit: bytes | None = None,
    ) -> None:
        self.choice = choice
        self.bucket = bucket
        self.unit_kind = unit_kind
        self.unit = unit

    @property
    def header(self) -> bytes:
        """`rev=42; variant=challenger; version=9; reason=SPLIT; bucket=317; p=0.05; unit=...`."""
        choice = self.choice
        if self.bucket is None:
            return choice.before
        return b"%b%d%b" % (choice.before, self.bucket, choice.after)


class Look:
    """What a rule or a unit may see of a request's body."""

    __slots__ = ("_arrays", "_names", "_parameters", "rows")

    def __init__(
        self,
        parameters: Mapping[str, Any],
        input_names: Sequence[str],
        arrays: Sequence[Array],
        rows: int,
    ) -> None:
        self._parameters = parameters
        self._names = input_names
        self._arrays = arrays
        self.rows = rows

    def field(self, name: str) -> object:
        """A request parameter of that name, else an input of one element; None: there is none."""
        found = self._parameters.get(name)
        if found is None and name in self._names:
            array = self._arrays[self._names.index(name)]
            if array.size == 1 and array.dtype.kind != "V":
                found = array.item()
        return found


class Routing:
    """A route, compiled: rules in order, then unit, bucket, variant. Holds versions, no sessions.

    Parameters
    ----------
    state : of a model whose route this is
    fallback : counts, by the unit that was taken, requests that had no better one
    """

    __slots__ = (
        "_any", "_choices", "_drawn", "_has_shadow", "_late", "_owners", "_rules", "_salt",
        "_units", "allows_override", "odds", "reads_body", "revision", "route", "state",
    )  # fmt: skip

    def __init__(self, name: str, state: ModelState, revision: int, telemetry: Telemetry) -> None:
        assert state.route is not None  # noqa: S101  said by the docstring
        self.route = route = state.route
        self.state = state
        self.revision = revision
        self.allows_override = route.allow_override
        units = [unit for unit in route.unit if unit != routes.UNIT_REQUEST]
        self._salt = bytes.fromhex(state.salts.get("split", "00" * buckets.SALT_BYTES))
        self._rules = [
            (_rule(rule), Decision(self.choice(rule.to, f"RULE_MATCH({rule.name})")))
            for rule in route.rules
        ]
        self._units = [
            (unit, kind == "header", key.encode(), key)
            for unit in units
            for kind, _, key in (unit.partition(":"),)
        ]
        others = [*units[1:], routes.UNIT_REQUEST] if units else []
        self._late = {unit: telemetry.counter(UNIT_FALLBACK, name, unit) for unit in others}
        self.reads_body = any(not is_header for _, is_header, _, _ in self._units) or any(
            rule.when.field or rule.when.rows is not None for rule in route.rules
        )
        self._has_shadow = bool(route.shadow)
        self._owners = b""
        self._drawn: Iterator[bytes] = iter(())
        self._any = Decision(self.choice(routes.CHAMPION, "DEFAULT"))
        self._choices: dict[str, list[Choice]] = {}
        self.odds: dict[str, float] = {routes.CHAMPION: 1.0}
        """Probability of each variant, for whatever no rule takes."""
        if route.split and state.buckets:
            table = Buckets.parse(state.buckets)
            shares = table.weights()
            self.odds = {name: n / buckets.N for name, n in shares.items()}
            self._owners = table.owners
            self._choices = {
                unit: [
                    self.choice(name, "SPLIT", shares.get(name, 0) / buckets.N, unit)
                    for name in table.names
                ]
                for unit in (*units, routes.UNIT_REQUEST)
            }

    def version_of(self, to: str | int) -> int:
        """The version behind a `to`; 0: the champion, whichever answers now."""
        text = str(to)
        return names.version(text) or self.state.aliases.get(text, 0)

    def choice(self, to: str | int, reason: str, p: float = 1.0, unit: str = "") -> Choice:
        """A choice of this route."""
        return Choice.of(str(to), self.version_of(to), reason, self.revision, p, unit)

    def pick(self, headers: Headers, look: Look | None) -> Decision:
        """By rule, else by unit and bucket."""
        if (decision := self.ruled(headers, look)) is not None:
            return self._with_unit(decision, headers, look) if self._has_shadow else decision
        if not self._owners:
            return self._with_unit(self._any, headers, look) if self._has_shadow else self._any
        kind, unit = self._unit(headers, look)
        bucket = int.from_bytes(blake2b(unit, digest_size=8, key=self._salt).digest()) % buckets.N
        return Decision(self._choices[kind][self._owners[bucket]], bucket, kind, unit)

    def ruled(self, headers: Headers, look: Look | None) -> Decision | None:
        """What the first rule that matches says; None: none does."""
        for matches, decision in self._rules:
            if matches(headers, look):
                return decision
        return None

    def drawn(self, kind: str, bucket: int) -> Decision:
        """What the split says of a unit of this kind, by its bucket; nothing is counted."""
        if not self._owners:
            return self._any
        return Decision(self._choices[kind][self._owners[bucket]], bucket, kind)

    def units_of(self, headers: Headers, look: Look | None) -> dict[str, bytes]:
        """By kind, every unit of the route that a request has; nothing is counted."""
        found: dict[str, bytes] = {}
        for kind, is_header, raw, name in self._units:
            if unit := _header(headers, raw) if is_header else _text(look, name):
                found[kind] = unit
        return found

    def _with_unit(self, decision: Decision, headers: Headers, look: Look | None) -> Decision:
        """A decision that no unit made, with the unit that shadows are drawn by."""
        kind, unit = self._unit(headers, look)
        return Decision(decision.choice, None, kind, unit)

    def _unit(self, headers: Headers, look: Look | None) -> tuple[str, bytes]:
        """What this request is assigned by: the first of the route's units that it has."""
        is_first = True
        for kind, is_header, raw, name in self._units:
            unit = _header(headers, raw) if is_header else _text(look, name)
            if unit:
                if not is_first:
                    self._late[kind].add()
                return kind, unit
            is_first = False
        if not is_first:
            self._late[routes.UNIT_REQUEST].add()
        # Drawn here, never the client's own id: the odds must be those that are said.
        if (drawn := next(self._drawn, None)) is None:
            many = os.urandom(_DRAWN_BYTES)  # One system call for many requests.
            self._drawn = iter([many[k : k + 16] for k in range(16, _DRAWN_BYTES, 16)])
            drawn = many[:16]
        return routes.UNIT_REQUEST, drawn

    def override(self, wanted: str) -> Decision:
        """What a client named itself; counted apart, and in no statistics.

        Raises
        ------
        OverrideError : the route does not allow that, or nothing has this name.
        """
        if not self.allows_override:
            raise OverrideError
        number = names.version(wanted) or self.state.aliases.get(wanted, 0)
        if not number:
            known = ", ".join(self.state.aliases) or "none"
            raise OverrideError(f"x-driftgate-version: no version or alias; aliases: {known}")
        return Decision(
            Choice.of(wanted, number, "TARGET_OVERRIDE", self.revision, traffic="pinned")
        )


def wanted_of(headers: Headers) -> bytes | None:
    """The variant that a client names in a header, where nobody has looked for it yet."""
    return _header(headers, b"x-driftgate-version")


def _header(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a header, without spaces around it."""
    for key, value in headers:
        if key == name:
            return value.strip()
    return None


def _text(look: Look | None, name: str) -> bytes | None:
    """A field as a unit: whole numbers in decimal, other numbers as Python writes them."""
    value = None if look is None else look.field(name)
    if value is None:
        return None
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).encode("utf-8", "surrogatepass")


Test = Callable[[Headers, "Look | None"], bool]


def _rule(rule: Rule) -> Test:
    """All conditions of a rule as one."""
    tests: list[Test] = [_header_test(name, wanted) for name, wanted in rule.when.header.items()]
    tests += [_field_test(name, wanted) for name, wanted in rule.when.field.items()]
    if (rows := rule.when.rows) is not None:
        tests.append(lambda _, look: look is not None and _fits(look.rows, rows))
    if len(tests) == 1:
        return tests[0]
    return lambda headers, look: all(test(headers, look) for test in tests)


def _header_test(name: str, wanted: str | tuple[str, ...] | HeaderMatch) -> Test:
    key = name.encode()
    if isinstance(wanted, HeaderMatch):
        prefix = None if wanted.prefix is None else wanted.prefix.encode()
        present = wanted.present

        def matches(headers: Headers, _: Look | None) -> bool:
            value = _header(headers, key)
            if present is not None and (value is not None) is not present:
                return False
            return prefix is None or (value is not None and value.startswith(prefix))

        return matches
    texts = (wanted,) if isinstance(wanted, str) else wanted
    values = frozenset(text.encode() for text in texts)
    return lambda headers, _: _header(headers, key) in values


def _field_test(name: str, wanted: object) -> Test:
    def matches(_: Headers, look: Look | None) -> bool:
        value = None if look is None else look.field(name)
        return value is not None and _fits(value, wanted)

    return matches


def _fits(value: object, wanted: object) -> bool:
    if isinstance(wanted, Range):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (
            (wanted.gte is None or value >= wanted.gte)
            and (wanted.gt is None or value > wanted.gt)
            and (wanted.lte is None or value <= wanted.lte)
            and (wanted.lt is None or value < wanted.lt)
        )
    choices: Iterable[object] = wanted if isinstance(wanted, tuple) else (wanted,)
    # True equals 1 in Python: a truth value and a number are told apart here.
    return any(isinstance(value, bool) is isinstance(c, bool) and value == c for c in choices)


@dataclass(frozen=True, slots=True)
class Model:
    """One name that clients call."""

    name: str
    versions: tuple[int, ...]
    """All that are in the registry, ascending."""
    variants: Mapping[int, Variant] = field(default_factory=dict)
    """Those that are open."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Those that could not be opened, with the reason."""
    held: Mapping[int, str] = field(default_factory=dict)
    """Those that the champion does not follow to, with the reason; they answer by number."""
    champion: Variant | None = None
    """What answers when no version is named."""
    default: int | None = None
    """The version that answers when none is named, where it is not open yet."""
    aliases: Mapping[str, int] = field(default_factory=dict)
    """Versions by name."""
    is_unloaded: bool = False
    """Somebody has closed it; nothing opens until it is loaded again."""
    routing: Routing | None = None
    """Its route; None: the champion answers whatever names no version."""
    revision: int = 0
    """The revision that this is of."""
    monitoring: Monitoring = field(default_factory=Monitoring)
    """What that says about its monitors."""
    said: bytes = field(init=False, default=b"")
    """The decision header of what the champion answers without a route."""

    def __post_init__(self) -> None:
        number = self.champion.version if self.champion is not None else self.default or 0
        choice = Choice.of(routes.CHAMPION, number, "DEFAULT", self.revision)
        object.__setattr__(self, "said", choice.before)

    @property
    def route(self) -> Route | None:
        """Its route document."""
        return None if self.routing is None else self.routing.route

    def pick(self, version: str | None) -> Variant | int:
        """What answers, or the number of a version that must be opened first.

        Raises
        ------
        VersionNotFoundError, VersionRefusedError, NotReadyError
        """
        if self.is_unloaded:
            raise UnloadedError(self.name)
        if version is None:
            if self.champion is None:
                if self.default is not None:
                    return self.default
                if not self.refused:
                    raise NotReadyError(f"model {self.name!r} is still being opened; retry")
                why = "; ".join(f"{n}: {reason}" for n, reason in sorted(self.refused.items()))
                raise VersionRefusedError(f"no version of model {self.name!r} can answer: {why}")
            return self.champion
        number = names.version(version)
        if number is None or number not in self.versions:
            raise VersionNotFoundError(self.name, version, self.versions)
        if number in self.refused:
            raise VersionRefusedError(
                f"model {self.name!r} version {number} was refused: {self.refused[number]}"
            )
        return self.variants.get(number, number)

    def labelled(self, label: str) -> str | None:
        """The version that a label names, as a call by number says it; None: no version is named.

        Raises
        ------
        VersionNotFoundError : no alias has this name.
        """
        if label == routes.CHAMPION:
            return None
        if (number := self.aliases.get(label)) is None:
            raise VersionNotFoundError(self.name, label, self.versions, self.aliases)
        return str(number)


@dataclass(frozen=True, slots=True)
class Table:
    """Everything that can be called, at one moment."""

    models: Mapping[str, Model] = field(default_factory=dict)
    is_complete: bool = False
    """Whether the registry has been read and opened once."""

    def model(self, name: str) -> Model:
        """The model of this name.

        Raises
        ------
        ModelNotFoundError : with the nearest name there is.
        """
        try:
            return self.models[name]
        except KeyError:
            if not self.is_complete:
                raise NotReadyError("the registry is still being opened; retry") from None
            raise ModelNotFoundError(name, list(self.models)) from None

    def replaced(self, model: Model) -> "Table":
        """A copy with one model replaced."""
        return replace(self, models={**self.models, model.name: model})
