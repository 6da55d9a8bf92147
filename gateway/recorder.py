"""Which requests of a route are captured, and what is kept of each.

Whether is asked on the loop, by the hash of the unit and a salt of its own; what is kept is put
together by the capture's thread. Nothing of this runs for a model whose route asks for no capture.
"""

import os
import time
from collections.abc import Sequence
from hashlib import blake2b

from gateway.capture.log import CaptureLog
from gateway.capture.record import Record, TensorKept, Unit, kept
from gateway.protocol.call import Call, Served
from gateway.router import Decision, Headers, Look, Routing
from gateway.tensors import Array, n_bytes
from registry import buckets, routes
from registry.routes import Capture
from registry.signature import TensorSpec

_RECORD_BYTES = 1024
"""What a request takes beside its tensors, about."""
_WHOLE_MIN, _WHOLE_MAX = -(2**63), 2**64


class Taking:
    """A request that is captured, until it has ended; then handed over, and changed no more."""

    __slots__ = (
        "_decision", "_headers", "_id", "_parameters", "_recorder", "_start", "_time", "_units",
        "code", "inputs", "n_bytes", "outputs", "rows", "seconds", "served", "version",
    )  # fmt: skip

    def __init__(
        self,
        recorder: "Recorder",
        name: str,
        decision: Decision,
        version: int,
        units: dict[str, bytes],
        start: float,
    ) -> None:
        self._recorder = recorder
        self._id = name
        self._decision = decision
        self.version = version
        self._units = units
        self._start = start
        self._headers: dict[str, str] = {}
        self._parameters: dict[str, bool | int | float | str] = {}
        self._time = self.seconds = 0.0
        self.code = "ok"
        self.served: Served | None = None
        self.inputs: Sequence[Array] = ()
        self.outputs: Sequence[Array] = ()
        self.rows = self.n_bytes = 0

    @property
    def model(self) -> str:
        """Whose request it is."""
        return self._recorder.model

    def bound(self, served: Served, inputs: Sequence[Array], rows: int, call: Call) -> None:
        """It fits this version, which is asked now."""
        self.served, self.inputs, self.rows, self.outputs = served, inputs, rows, ()
        given = call.parameters or {}
        for name in self._recorder.parameters:
            value = given.get(name)
            if isinstance(value, bool | float | str) or (
                isinstance(value, int) and _WHOLE_MIN <= value < _WHOLE_MAX
            ):
                self._parameters[name] = value

    def sent(self, headers: Headers) -> None:
        """What came with it: of these, what rules look at is kept."""
        wanted = self._recorder.headers
        for name, value in headers:
            if name in wanted:
                self._headers.setdefault(wanted[name], value.strip().decode("latin-1"))

    def ended(self, code: str = "ok") -> None:
        """It is answered, or has failed; if it ever was a request to the model, it is handed over.

        What did not fit the model is not captured: there is nothing to run again.
        """
        if self.served is None:
            return
        self.code = code
        self._time, self.seconds = time.time(), time.perf_counter() - self._start
        self.n_bytes = n_bytes([*self.inputs, *self.outputs]) + _RECORD_BYTES
        self._recorder.log.offer(self)

    def record(self) -> Record:
        """What is kept of it."""
        recorder, choice, served = self._recorder, self._decision.choice, self.served
        assert served is not None  # noqa: S101  asked before it is handed over
        signature, capture = served.signature, recorder.capture
        is_drawn = choice.reason == "SPLIT"
        return Record(
            time=self._time,
            id=self._id,
            model=self.model,
            revision=choice.revision,
            variant=choice.variant,
            version=self.version,
            traffic=choice.traffic,
            reason=choice.reason,
            sampled=recorder.share / buckets.N,
            rows=self.rows,
            seconds=self.seconds,
            code=self.code,
            served=served.version if served.version != self.version else None,
            digest=recorder.digests.get(str(served.version), ""),
            p=choice.p,
            odds=recorder.odds if is_drawn else {choice.variant: 1.0},
            bucket=self._decision.bucket,
            unit=self._decision.unit_kind,
            kinds=self._recorder.routing.route.unit,
            units=tuple(recorder.unit(kind, unit) for kind, unit in self._units.items()),
            salt=recorder.salt_id,
            looked=recorder.looked,
            headers=self._headers,
            parameters=self._parameters,
            inputs=recorder.tensors(signature.inputs, self.inputs) if capture.inputs else None,
            outputs=(
                recorder.tensors(signature.outputs, self.outputs)
                if capture.outputs and self.outputs
                else None
            ),
        )


class Recorder:
    """The capture that one route asks for."""

    def __init__(self, model: str, routing: Routing, log: CaptureLog) -> None:
        route, state = routing.route, routing.state
        assert route.capture is not None  # noqa: S101  asked by Recorders
        self.model = model
        self.routing = routing
        self.log = log
        self.capture: Capture = route.capture
        self.share = round(self.capture.sample * 100)
        """Buckets of units that are captured."""
        self.odds = routing.odds
        self.digests = state.digests
        self._salt = _salt(state.salts.get("capture", ""))
        self._split_salt = _salt(state.salts.get("split", ""))
        self.salt_id = salt_id(self._split_salt)
        self._redacted = frozenset(self.capture.redact)
        wanted = (routes.sources(route) | {*self.capture.also}) - self._redacted
        self.looked = tuple(sorted(wanted))
        by_kind = [source.partition(":") for source in self.looked]
        self.headers = {name.encode(): name for kind, _, name in by_kind if kind == "header"}
        self.parameters = [name for kind, _, name in by_kind if kind == "field"]

    def begin(
        self,
        name: str,
        headers: Headers,
        decision: Decision,
        version: int,
        look: Look | None,
        start: float,
    ) -> Taking | None:
        """A request; None if it is not among those that are captured.

        Parameters
        ----------
        name : its id
        version : that was picked
        look : its body, for units that are in there
        """
        units = self.routing.units_of(headers, look)
        sticky = next(iter(units.values()), None)
        if sticky is None:
            # What the split has drawn for it, or a draw of its own: it is its own unit.
            sticky = decision.unit or os.urandom(buckets.SALT_BYTES)
            units = {routes.UNIT_REQUEST: sticky}
        if buckets.bucket_of_bytes(self._salt, sticky) >= self.share:
            return None
        # Nobody was told an id where none came over gRPC; a record has one all the same.
        name = name or os.urandom(8).hex()
        taking = Taking(self, name, decision, version, units, start)
        if self.headers:
            taking.sent(headers)
        return taking

    def unit(self, kind: str, unit: bytes) -> Unit:
        """What is kept of a unit: its bucket, and its hash unless it is redacted."""
        bucket = buckets.bucket_of_bytes(self._split_salt, unit)
        if kind in self._redacted:
            return Unit(kind, bucket)
        hashed = blake2b(unit, digest_size=8, key=self._salt).hexdigest()
        return Unit(kind, bucket, hashed, unit if self.capture.units else None)

    def tensors(
        self, specs: Sequence[TensorSpec], arrays: Sequence[Array]
    ) -> tuple[TensorKept, ...]:
        """Those that are not redacted."""
        pairs = [
            (spec, array)
            for spec, array in zip(specs, arrays, strict=True)
            if f"field:{spec.name}" not in self._redacted
        ]
        return kept([spec for spec, _ in pairs], [array for _, array in pairs])


class Recorders:
    """The captures under way, by model."""

    def __init__(self, log: CaptureLog) -> None:
        self.log = log
        self._by_model: dict[str, Recorder] = {}

    def of(self, model: str, routing: Routing) -> Recorder | None:
        """The recorder of a route; None if it asks for no capture."""
        if routing.route.capture is None:
            return None
        known = self._by_model.get(model)
        if known is None or known.routing is not routing:
            known = self._by_model[model] = Recorder(model, routing, self.log)
        return known


def salt_id(salt: bytes) -> str:
    """Tells salts apart, and gives none away."""
    return blake2b(salt, digest_size=4, person=b"capture").hexdigest()


def _salt(text: str) -> bytes:
    return bytes.fromhex(text) if text else bytes(buckets.SALT_BYTES)
