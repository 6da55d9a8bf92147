"""The hot path: one prediction, bytes in, bytes out, the same for every carrier."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import count

from gateway.config import ServerConfig
from gateway.errors import (
    BreakerOpenError,
    ClientGoneError,
    DeadlineError,
    GatewayError,
    NotReadyError,
    OverrideError,
)
from gateway.exposures import Exposures
from gateway.fallback import LEFT_S_MIN, Breakers, Budget
from gateway.labels import Asked, Observed, PredictionLog
from gateway.limits import Gate, Rates, refuse_rows
from gateway.protocol.call import Answer, Call, Codec, choose, classified, n_rows, refuse_texts
from gateway.recorder import Recorders, Taking
from gateway.router import Choice, Decision, Headers, Look, Meters, Model, Routing, Table, Variant
from gateway.shadow import Copies
from gateway.tap import Tap
from gateway.telemetry import REJECTED, SHED, Telemetry
from gateway.tensors import Array
from registry.catalog import VersionFiles
from registry.routes import Limits, Route

_SMALL_BYTES = 256 * 1024
"""Larger bodies are decoded off the loop."""

_UNLIMITED = Limits()
Gone = Callable[[], Awaitable[None]]
"""Returns when the client has hung up."""


@dataclass(slots=True)
class Head:
    """What came beside the body."""

    model: str | None
    """None where only the message itself names it (gRPC)."""
    version: str | None
    timeout_s: float | None
    gone: Gone | None
    """None where the carrier cancels the task of a call that nobody waits for."""
    request_id: bytes = b""
    """What predictions are called when labels come; empty: nobody was told, so none are kept."""
    headers: Headers = ()
    """What rules and units may look at."""
    caller: str = "anybody"
    """Whose rate it counts for: the key that was shown, as `Caller.name` says it."""
    wanted: bytes | None = None
    """The variant that the client names, if its route allows that."""
    decision: bytes = b""
    """Set once a variant is picked: what `x-driftgate-decision` says."""


@dataclass(slots=True)
class _Request:
    """A message and what is known of it so far."""

    codec: Codec
    head: Head
    body: bytes
    start: float
    call: Call | None = None
    """Its body, once something has had to read it."""


@dataclass(slots=True)
class _Terms:
    """What a route asks of the answer."""

    budget: Budget
    rows_max: int | None
    taking: Taking | None
    """Where it is captured."""
    copies: Copies | None = None
    """Shadows that get it too."""


class RequestIds:
    """Names for requests that came without one."""

    def __init__(self) -> None:
        # Unique over workers and restarts without asking the system for each request.
        self._start = os.urandom(6).hex().encode()
        self._numbers = count(1)

    def make(self) -> bytes:
        """One that nobody has had."""
        return b"%s-%x" % (self._start, next(self._numbers))


class DataPlane:
    """What the hot path reads. Its table is replaced as a whole, never changed."""

    def __init__(self, config: ServerConfig, telemetry: Telemetry, tap: Tap) -> None:
        self.config = config
        self.telemetry = telemetry
        self.tap = tap
        self.table = Table()
        self._is_ready = False
        self.is_leaving = False
        """Told to end: what still comes is answered, but no more is asked for."""
        self.open_version: Callable[[str, int], Awaitable[Variant]] | None = None
        """Opens a version that is in the registry but not in the table."""
        self.find_files: Callable[[str, int], VersionFiles | None] | None = None
        """Where a version's files are, and what its manifest says."""
        self.try_version: Callable[[str, int | None], Awaitable[Variant]] | None = None
        """Opens a version that is in the registry now, to see whether it can be; hold it."""
        self.recycle: Callable[[str], None] | None = None
        """Asks, with a reason, for this process to be replaced once a successor is ready."""
        self.timeout_s = config.limits.timeout_s
        self.sample = config.monitor.sample / 100
        self.exposures: Exposures | None = None
        """What variants of rollouts met, where it is counted."""
        self.copies: Mapping[str, Copies] = {}
        """Shadows of models that have some."""
        self.predictions: PredictionLog | None = None
        """Where predictions wait for labels, if they do."""
        self.recorders: Recorders | None = None
        """Where requests are captured, of models whose route asks for it."""
        self.ids = RequestIds()
        self._large = asyncio.Semaphore(1)
        self.breakers = Breakers(telemetry, self._opened)
        self.rates = Rates()
        """Of callers; shared by the workers of a host, where there are some."""
        self._gates: dict[str, Gate] = {}
        self._meters: dict[tuple[str, int], dict[tuple[str, str], Meters]] = {}

    @property
    def is_ready(self) -> bool:
        """Whether load balancers should send requests here."""
        return self._is_ready and not self.is_leaving

    @is_ready.setter
    def is_ready(self, is_ready: bool) -> None:
        self._is_ready = is_ready

    def rejected(self, error: GatewayError) -> None:
        """Count a request that was refused before a version was picked."""
        self.telemetry.counter(REJECTED, error.code).add()

    def variants(self, model: str) -> Mapping[int, Variant]:
        """The open versions of a model at this moment."""
        found = self.table.models.get(model)
        return {} if found is None else found.variants

    def route(self, model: str) -> Route | None:
        """The route of a model, if it has one."""
        found = self.table.models.get(model)
        return None if found is None else found.route

    def _opened(self, model: str, version: int) -> None:
        """A breaker has opened: a rollout of that version ends."""
        if self.exposures is not None:
            self.exposures.opened(model, version)

    def gate(self, model: str) -> Gate:
        """Who is let in to a model."""
        if (gate := self._gates.get(model)) is None:
            gate = self._gates[model] = Gate(model, self.rates)
        return gate

    def meters(self, variant: Variant, choice: Choice) -> Meters:
        """Counts of a variant in a role; the series exist from the first such call on."""
        name = choice.variant
        if name == "champion" and choice.traffic == "primary":
            return variant.meters
        roles = self._meters.setdefault((variant.model, variant.version), {})
        if (meters := roles.get((name, choice.traffic))) is None:
            meters = Meters(self.telemetry, variant.model, variant.version, name, choice.traffic)
            roles[name, choice.traffic] = meters
        return meters

    async def decode(self, codec: Codec, body: bytes) -> Call:
        """A large body as a call, on a thread and one at a time: the loop serves on."""
        async with self._large:
            return await asyncio.to_thread(codec.decode, body)


async def infer(plane: DataPlane, codec: Codec, head: Head, body: bytes, start: float) -> Answer:
    """One prediction: decode, pick a variant, bind, batch, run, observe, encode.

    Parameters
    ----------
    start : `time.perf_counter()` when the request was first seen

    Raises
    ------
    GatewayError : what the client is told instead of an answer.
    """
    request = _Request(codec, head, body, start)
    try:
        if head.model is None:
            request.call = call = await _decoded(plane, codec, body)
            head.model, head.version = call.model, call.version
        # The table is read once, and not kept: what leaves it is closed with its last request.
        model = plane.table.model(head.model)
        routing = model.routing
        if routing is None:
            picked, decision = pick(model, head, request.call)
            del model
            variant = picked if isinstance(picked, Variant) else await _opened(plane, head, picked)
    except GatewayError as error:
        plane.rejected(error)
        raise
    if routing is None:
        return await _answered(plane, request, variant, decision)
    del model
    return await _routed(plane, request, routing)


async def _answered(  # noqa: C901, PLR0912, PLR0915  one prediction from start to end, on one screen
    plane: DataPlane,
    request: _Request,
    variant: Variant,
    decision: Decision | None,
    terms: _Terms | None = None,
) -> Answer:
    """What the variant that was picked says; all counts are that variant's."""
    codec, head, call, start = request.codec, request.head, request.call, request.start
    served = variant.served
    signature, model = served.signature, served.model
    meters = variant.meters if decision is None else plane.meters(variant, decision.choice)
    # None for all models but those with a rollout under way.
    watched = decision and plane.exposures and plane.exposures.begin(served, decision)
    inputs: list[Array] = []
    try:
        if call is None:
            call = await _decoded(plane, codec, request.body)
        inputs = call.bind(signature, model)
        if call.outputs:
            choose(call, signature, model)  # Before anything runs for a name that is wrong.
            refuse_texts(call, signature)
        rows = n_rows(inputs, signature, model) if signature.has_row_axis else _size(inputs)
        timeout_s = plane.timeout_s
        if terms is not None:
            timeout_s = terms.budget.total_s
            if terms.rows_max is not None:
                refuse_rows(model, rows, terms.rows_max)
            if terms.taking is not None:
                terms.taking.bound(served, inputs, rows, call)
        for asked_s in (call.timeout_s, head.timeout_s):
            if asked_s is not None and asked_s < timeout_s:
                timeout_s = asked_s
        allowed_s = timeout_s
        if terms is not None:
            timeout_s = terms.budget.take(timeout_s)
            allowed_s = terms.budget.given_s
        queue = variant.queue
        future = queue.submit(inputs, rows, timeout_s, allowed_s)
        outputs = await (_unless_gone(future, head.gone) if head.gone and queue.is_busy else future)
        if 0 < plane.sample < 1 and random.random() < plane.sample:  # noqa: S311  no secret
            variant.observe(inputs, outputs, rows)  # Where every request counts, runs are tapped.
        if plane.predictions is not None and head.request_id:
            _keep(plane.predictions, head, variant, decision, inputs, outputs, rows)
        if terms is not None and terms.taking is not None:
            terms.taking.outputs = outputs
        call.decision = head.decision
        given = classified(call, signature, outputs) if call.outputs else outputs
        answer = codec.encode(call, served, given)
    except asyncio.CancelledError:
        meters.fail(ClientGoneError.code, time.perf_counter() - start)
        if watched:
            watched.dropped()
        raise
    except GatewayError as error:
        meters.fail(error.code, time.perf_counter() - start)
        if watched:
            watched.failed(time.perf_counter() - start, error.status, inputs)
        raise
    meters.ok.add()
    meters.seconds.observe(time.perf_counter() - start)
    if watched:
        watched.answered(time.perf_counter() - start, inputs, outputs)
    if terms is not None and terms.copies is not None and decision is not None:
        terms.copies.offer(variant, decision, head.request_id, inputs, outputs, rows)
    return answer


async def _routed(plane: DataPlane, request: _Request, routing: Routing) -> Answer:
    """The same under a route: within its limits, which come before any other work."""
    head = request.head
    name = head.model or ""
    gate = plane.gate(name)
    try:
        gate.enter(routing.route.limits or _UNLIMITED, head.caller)
    except GatewayError as error:
        plane.rejected(error)
        plane.telemetry.counter(SHED, name, "", error.code).add()
        raise
    try:
        try:
            if request.call is None and routing.reads_body:
                request.call = await _decoded(plane, request.codec, request.body)
            picked, decision = pick(plane.table.model(name), head, request.call)
            variant = picked if isinstance(picked, Variant) else await _opened(plane, head, picked)
        except GatewayError as error:
            plane.rejected(error)
            raise
        if decision is None:  # The route was deleted meanwhile.
            return await _answered(plane, request, variant, None)
        return await _asked(plane, request, variant, decision, routing)
    finally:
        gate.leave()


async def _asked(
    plane: DataPlane, request: _Request, variant: Variant, decision: Decision, routing: Routing
) -> Answer:
    """What the variant says, or another one instead: within one time, with one hop at most."""
    head, route, breakers = request.head, routing.route, plane.breakers
    rows_max = route.limits.rows_max if route.limits else None
    can_hop = head.version is None and "timeout" in (route.fallback.on if route.fallback else ())
    budget = Budget(request.start, route.timeout_s or plane.timeout_s, can_hop=can_hop)
    variants = partial(plane.variants, variant.model)
    code, taking = ClientGoneError.code, None
    try:
        taking = _taken(plane, request, variant, decision, routing)
        other = breakers.diverted(routing, variant, decision, variants)
        if other is not None:
            _refused(plane, variant, decision)
        else:
            try:
                with breakers.around(routing, variant, decision, budget, variants):
                    copies = plane.copies.get(variant.model)
                    terms = _Terms(budget, rows_max, taking, copies)
                    answer = await _answered(plane, request, variant, decision, terms)
            except GatewayError as error:
                other = breakers.hop(routing, variant, error, variants)
                if other is None or head.version is not None or budget.left_s < LEFT_S_MIN:
                    raise
                request.call = None  # What was bound to one version is read again for another.
        if other is not None:
            head.decision = other.decision.header
            with breakers.around(routing, *other, budget, variants):
                terms = _Terms(budget, rows_max, taking)
                answer = await _answered(plane, request, *other, terms)
        code = "ok"
    except GatewayError as error:
        code = error.code
        raise
    finally:
        if taking is not None:
            taking.ended(code)
    return answer


def _refused(plane: DataPlane, variant: Variant, decision: Decision) -> None:
    """An open breaker kept a request from the variant that it was assigned to: the blame stays."""
    plane.meters(variant, decision.choice).fail(BreakerOpenError.code, 0.0)
    if plane.exposures and (watched := plane.exposures.begin(variant.served, decision)):
        watched.failed(0.0, BreakerOpenError.status)


def _taken(
    plane: DataPlane, request: _Request, variant: Variant, decision: Decision, routing: Routing
) -> Taking | None:
    """The request as it will be captured, if its route asks for that and it is in the sample."""
    head, model = request.head, variant.model
    if plane.recorders is None or (recorder := plane.recorders.of(model, routing)) is None:
        return None
    look = None
    if routing.reads_body:
        with contextlib.suppress(GatewayError):  # A version called by number may take others.
            look = _look(plane.table.model(model), request.call)
    name = head.request_id.decode("latin-1")
    return recorder.begin(name, head.headers, decision, variant.version, look, request.start)


def pick(model: Model, head: Head, call: Call | None) -> tuple[Variant | int, Decision | None]:
    """What answers, or the version to open first; the decision, unless it is the champion's."""
    routing = model.routing
    if head.version is not None:
        picked = model.pick(head.version)
        number = picked if isinstance(picked, int) else picked.version
        choice = Choice.of(str(number), number, "PINNED", model.revision, traffic="pinned")
        head.decision = choice.before
        return picked, Decision(choice)
    if head.wanted is not None:
        if routing is None:
            raise OverrideError
        decision = routing.override(head.wanted.decode("latin-1"))
    elif routing is None:
        head.decision = model.said
        return model.pick(None), None
    else:
        decision = routing.pick(head.headers, _look(model, call))
    head.decision = decision.header
    number = decision.choice.version
    return model.pick(str(number) if number else None), decision


def _look(model: Model, call: Call | None) -> Look | None:
    """The body as rules and units see it: bound to the champion, whose siblings take the same."""
    if call is None or model.champion is None:
        return None
    signature = model.champion.signature
    inputs = call.bind(signature, model.name)
    rows = n_rows(inputs, signature, model.name) if signature.has_row_axis else _size(inputs)
    return Look(call.parameters or {}, [spec.name for spec in signature.inputs], inputs, rows)


async def _decoded(plane: DataPlane, codec: Codec, body: bytes) -> Call:
    return codec.decode(body) if len(body) <= _SMALL_BYTES else await plane.decode(codec, body)


def _keep(
    log: PredictionLog,
    head: Head,
    variant: Variant,
    decision: Decision | None,
    inputs: list[Array],
    outputs: list[Array],
    rows: int,
) -> None:
    """Let a prediction wait for its label, if its id is among those that are kept."""
    name = head.request_id.decode("latin-1")
    if not log.wants(name, variant.model):
        return
    asked = Asked(name, rows, "champion")
    if decision is not None:
        choice = decision.choice
        unit = decision.unit and blake2b(decision.unit, digest_size=8).hexdigest()
        asked = Asked(name, rows, choice.variant, choice.traffic, choice.p, unit or None)
    log.record(
        Observed(variant.model, variant.version, (asked,), variant.signature, outputs, inputs)
    )


def _size(inputs: list[Array]) -> int:
    """Rows of a request to a model without a common row axis: what its first tensor shows."""
    return inputs[0].shape[0] if inputs[0].ndim else 1


async def _opened(plane: DataPlane, head: Head, version: int) -> Variant:
    """The version, opened now: within the request's deadline, and for later ones beyond it."""
    if plane.open_version is None:
        raise NotReadyError(f"model {head.model!r} version {version} is not open")
    name = head.model or ""
    timeout_s = min(plane.timeout_s, head.timeout_s or plane.timeout_s)
    opening = asyncio.ensure_future(plane.open_version(name, version))
    opening.add_done_callback(lambda done: done.cancelled() or done.exception())
    done, _ = await asyncio.wait((opening,), timeout=timeout_s)
    if not done:
        raise DeadlineError(name, timeout_s)
    return opening.result()


async def _unless_gone(future: "asyncio.Future[list[Array]]", gone: Gone) -> list[Array]:
    """The future's result; when the client hangs up first, the rows are dropped."""
    watcher = asyncio.ensure_future(gone())
    watcher.add_done_callback(lambda done: done.cancelled() or future.cancel())
    try:
        return await future
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            raise ClientGoneError("the client hung up") from None
        future.cancel()
        raise
    finally:
        watcher.cancel()
