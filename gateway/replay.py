"""A capture run again: the same requests through two versions, compared pair by pair.

No server is involved. Where the capture was made by just the files of a version its answers are
taken as they are; the other runs. Besides the paired report it is said which guard of a rollout
would have fired: each unit is given to one of the two versions by a fair coin that its hash throws,
and the guards see what they would have seen of such a split.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gateway import values
from gateway.capture.record import Record, TensorKept, array_of
from gateway.comparison import Difference, compare
from gateway.errors import GatewayError, TensorError
from gateway.protocol.call import Call, Tensor
from gateway.shadow import tally
from gateway.shadow.report import compared
from gateway.tensors import BFLOAT16, Array, widened
from gateway.values import Bins, Value
from monitors.guards import paired, verdict
from monitors.guards.bets import CANDIDATE, CONTROL
from monitors.guards.evidence import Evidence, count
from monitors.guards.verdict import Guard, Verdict
from registry import buckets, routes
from registry.routes import Tolerance
from registry.signature import Signature

_HALF = (buckets.N // 2, buckets.N // 2)
_COIN_KEY = b"replay"
_DISTANCES_MAX = 1_000_000
"""Distances of an output that quantiles are taken of: the first so many."""
_WORST = 5
_EXAMPLES_MAX = 5


class Session(Protocol):
    """An opened version."""

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """All outputs for the inputs; raises GatewayError."""


@dataclass(slots=True)
class Side:
    """One of the two versions."""

    model: str
    version: int
    digest: str
    session: Session
    places: tally.Places | None = None
    """Rows by bin of its reference profile, if it has one."""
    n_run: int = 0
    n_captured: int = 0
    """Requests whose captured answer was taken."""
    seconds: list[float] = field(default_factory=list)

    def answer(self, record: Record) -> "Answer":
        """What this version says to a captured request.

        Raises
        ------
        TensorError : the capture does not hold what that needs.
        """
        if record.digest == self.digest and record.code == "ok" and self._is_whole(record.outputs):
            self.n_captured += 1
            return Answer({t.name: array_of(t) for t in record.outputs or ()})
        if record.inputs is None:
            raise TensorError("its inputs were not captured")
        given = [Tensor(t.name, t.datatype, t.shape, array_of(t)) for t in record.inputs]
        self.n_run += 1
        try:
            inputs = Call(given).bind(self.session.signature, self.model)
            start = time.perf_counter()
            outputs = self.session.run(inputs)
        except GatewayError as error:
            return Answer({}, error.code, str(error))
        self.seconds.append(time.perf_counter() - start)
        names = [spec.name for spec in self.session.signature.outputs]
        return Answer(dict(zip(names, outputs, strict=True)))

    def inputs(self, record: Record) -> list[Array]:
        """What the capture has of its inputs, in its own order; nothing if it lacks one."""
        given = {tensor.name: tensor for tensor in record.inputs or ()}
        specs = self.session.signature.inputs
        try:
            return [array_of(given[spec.name]) for spec in specs]
        except (KeyError, TensorError):
            return []

    def document(self) -> dict[str, Any]:
        """As programs are told it."""
        return {
            "version": self.version,
            "digest": self.digest,
            "run": self.n_run,
            "captured": self.n_captured,
            "median_run_s": round(float(np.median(self.seconds)), 7) if self.seconds else None,
        }

    def _is_whole(self, outputs: Sequence[TensorKept] | None) -> bool:
        """Whether no output was left out, by the route or by its list of what is redacted."""
        wanted = {spec.name for spec in self.session.signature.outputs}
        return outputs is not None and {tensor.name for tensor in outputs} == wanted


@dataclass(frozen=True, slots=True)
class Answer:
    """What a version said."""

    outputs: Mapping[str, Array]
    code: str = "ok"
    said: str = ""

    @property
    def is_finite(self) -> bool:
        """Whether all of its numbers are."""
        return all(_is_finite(array) for array in self.outputs.values())


@dataclass(slots=True)
class Distances:
    """How far the two are apart in one output, over all requests."""

    rows: int = 0
    apart: int = 0
    """Rows without a finite distance."""
    largest: float = 0.0
    total: float = 0.0
    distances: list[npt.NDArray[np.float64]] = field(default_factory=list)
    worst: list[tuple[float, str]] = field(default_factory=list)
    """The largest distances with their prediction ids, the largest first."""
    n_kept: int = 0

    def add(self, record: Record, difference: Difference) -> None:
        """Count the rows of one request."""
        distance = difference.distance
        finite = distance[np.isfinite(distance)]
        self.rows += len(distance)
        self.apart += len(distance) - len(finite)
        if len(finite):
            self.largest = max(self.largest, float(finite.max()))
            self.total += float(finite.sum())
            if self.n_kept < _DISTANCES_MAX:
                self.distances.append(finite)
                self.n_kept += len(finite)
        if difference.differs.any():
            row = int(np.argmax(np.where(difference.differs, distance, -1.0)))
            self.worst.append((float(distance[row]), f"{record.id}/{row}"))
            self.worst = sorted(self.worst, key=lambda pair: -pair[0])[:_WORST]

    def document(self, tolerance: Tolerance | None) -> dict[str, Any]:
        """As programs are told it: no infinities."""
        n_finite = self.rows - self.apart
        kept = np.concatenate(self.distances) if self.distances else np.zeros(0)
        quantiles = np.quantile(kept, (0.5, 0.9, 0.99)).tolist() if len(kept) else [None] * 3
        return {
            "rows": self.rows,
            "without_distance": self.apart,
            "mean": self.total / n_finite if n_finite else None,
            "quantiles": dict(zip(("50", "90", "99"), quantiles, strict=True)),
            "largest": self.largest if n_finite else None,
            "tolerance": None if tolerance is None else _plain(tolerance),
            "worst": [
                {"prediction": name, "distance": far if math.isfinite(far) else None}
                for far, name in self.worst
            ],
        }


@dataclass(slots=True)
class Report:
    """What came of a replay."""

    target: Side
    against: Side
    tolerances: Mapping[str, Tolerance]
    allowed: float
    """Share of units that may disagree."""
    requests: int = 0
    pairs: tally.Tally = field(default_factory=tally.Tally)
    """What both have answered, counted as of a shadow."""
    left_out: "Counter[str]" = field(default_factory=Counter)
    """Requests that could not be run, by the reason."""
    errors: "Counter[str]" = field(default_factory=Counter)
    """`target`, `against` alone, or `both`."""
    examples: list[str] = field(default_factory=list)
    not_finite: "Counter[str]" = field(default_factory=Counter)
    outputs: dict[str, Distances] = field(default_factory=dict)
    judged: Verdict | None = None
    passed_over: str = ""

    @property
    def is_breach(self) -> bool:
        """Whether a guard would have found what must not be."""
        return self.judged is not None and self.judged.kind in ("breach", "invalid")

    def document(self) -> dict[str, Any]:
        """As programs are told it."""
        assert self.judged is not None  # noqa: S101  made by `replay`
        said = compared(self.pairs, allowed=self.allowed)
        for name, distances in self.outputs.items():
            said["outputs"][name] |= distances.document(self.tolerances.get(name))
        return {
            "model": self.target.model,
            "version": self.target.version,
            "against": self.against.version,
            **said,
            "errors": {key: self.errors[key] for key in ("target", "against", "both")},
            "examples": self.examples,
            "not_finite": {key: self.not_finite[key] for key in ("target", "against")},
            "ran": {"target": self.target.document(), "against": self.against.document()},
            "replayed": self.requests,
            "left_out": dict(self.left_out),
            "passed_over": self.passed_over,
            **self.judged.to_dict(),
        }

    def add(self, record: Record, answers: tuple[Answer, Answer]) -> None:
        """Count one request with the answers of target and against."""
        target, against = answers
        self.requests += 1
        failed = [key for key, a in zip(("target", "against"), answers, strict=True) if a.said]
        if failed:
            self.errors["both" if len(failed) == 2 else failed[0]] += 1
            if target.said and len(self.examples) < _EXAMPLES_MAX:
                self.examples.append(f"{record.id}: {target.code}: {target.said}")
            if failed == ["target"]:
                self.pairs.fail(_unit(record), record.rows)
            return
        for key, answer in zip(("target", "against"), answers, strict=True):
            self.not_finite[key] += not answer.is_finite
        has_rows = self.against.session.signature.has_row_axis
        rows = record.rows if has_rows else 1
        found = compare(against.outputs, target.outputs, rows, self.tolerances)
        columns = tally.numeric(against.outputs, target.outputs, rows)
        self.pairs.pair(_unit(record), found, rows, columns=columns)
        places = self.against.places
        if places is not None and has_rows and (inputs := self.against.inputs(record)):
            self.pairs.place(places, inputs, found.differs)
        for name, difference in found.outputs.items():
            self.outputs.setdefault(name, Distances()).add(record, difference)


def replay(
    records: Iterable[Record],
    target: Side,
    against: Side,
    guards: Sequence[Guard],
    *,
    alpha: float,
    disagreement_max: float,
    units_min: int = 1,
    tolerances: Mapping[str, Tolerance] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Report:
    """Captured requests of a model through two versions.

    Parameters
    ----------
    guards : of a rollout; those that a replay has something for are asked
    alpha : probability that a version without fault is found at fault by any of them
    disagreement_max : percent of units that may disagree
    units_min : so many must be seen before it says something that nothing was found
    progress : called after every request

    Notes
    -----
    A unit counts once, with its first request: requests of one user are no evidence of each other.
    """
    report = Report(target, against, tolerances or {}, disagreement_max / 100)
    seen = _Seen()
    for record in records:
        if record.model != target.model:
            continue
        try:
            _refuse_gaps(record, against.session.signature)
            answers = target.answer(record), against.answer(record)
        except TensorError as error:
            report.left_out[str(error)] += 1
            continue
        report.add(record, answers)
        seen.add(record, answers)
        progress()
    asked = _asked(guards, alpha, disagreement_max)
    hard = []
    if report.not_finite["target"] and not report.not_finite["against"]:
        n = report.not_finite["target"]
        hard.append(f"version {target.version} gave outputs that are not finite: {n}")
    report.judged = verdict.judge(
        seen.evidence(report.pairs.cases),
        asked,
        alpha=alpha,
        hard=hard,
        exposure=verdict.Exposure(is_long_enough=True, units=len(seen.units), units_min=units_min),
    )
    report.judged = _with_errors(report, alpha / (len(asked) + 1))
    return report


def _refuse_gaps(record: Record, signature: Signature) -> None:
    """See that the inputs are all there: a route may redact some.

    Raises
    ------
    TensorError : one is not.
    """
    if record.inputs is None:
        return
    kept = {tensor.name for tensor in record.inputs}
    if missing := sorted(spec.name for spec in signature.inputs if spec.name not in kept):
        raise TensorError(f"input {missing[0]!r} was not captured")


def _asked(guards: Sequence[Guard], alpha: float, disagreement_max: float) -> list[Guard]:
    """The guards that pairs say something about, and disagreement; alpha is shared evenly.

    Durations of a replay are not those of a server, and inputs and shares are equal by design.
    """
    kept = [
        guard
        for guard in guards
        if guard.kind == "shift"
        or (guard.kind == "harm" and guard.event in ("error", "not_finite"))
    ]
    kept.append(
        Guard(
            name="disagreement",
            kind="disagreement",
            action="hold",
            share_max=disagreement_max / 100,
        )
    )
    return [replace(guard, alpha=alpha / (len(kept) + 1)) for guard in kept]


def _with_errors(report: Report, alpha: float) -> Verdict:
    """The verdict with one more finding: errors of one version alone, pair by pair."""
    assert report.judged is not None  # noqa: S101  the caller has judged
    alone = report.errors["target"], report.errors["against"]
    finding = verdict.Finding(
        "errors_alone",
        "abort",
        float(paired.log_evidence_wrong_more_often(*alone)),
        math.log(1 / alpha),
        (alone[0], report.requests),
        (alone[1], report.requests),
    )
    judged = replace(report.judged, findings=(*report.judged.findings, finding))
    if finding.is_breach and judged.kind != "breach":
        reason = f"errors_alone: target {alone[0]}, against {alone[1]} of {report.requests}"
        return replace(judged, kind="breach", reason=reason, action="abort")
    return judged


class _Seen:
    """The first request of each unit, as guards are shown it."""

    def __init__(self) -> None:
        self.units: set[int] = set()
        self._coins: list[int] = []
        self._channels: dict[int, list[values.Channel]] = {}
        self._values: list[tuple[dict[str, Value], dict[str, Value]]] = []
        """What target and against answered, by channel; empty of those that failed."""
        self._events: list[tuple[set[str], set[str]]] = []

    def add(self, record: Record, answers: tuple[Answer, Answer]) -> None:
        """One request, if it is its unit's first."""
        unit = _unit(record)
        if unit in self.units:
            return
        self.units.add(unit)
        coin = blake2b(unit.to_bytes(8), digest_size=1, key=_COIN_KEY).digest()[0] & 1
        self._coins.append(CANDIDATE if coin else CONTROL)
        self._values.append((self._read(0, answers[0]), self._read(1, answers[1])))
        self._events.append((_events(answers[0]), _events(answers[1])))

    def evidence(self, pairs: tuple[int, int]) -> Evidence:
        """As a rollout at half the traffic would have counted them.

        Parameters
        ----------
        pairs : units that both have answered, and those that they disagree about
        """
        made = Evidence(pairs={"n": pairs[0], "differ": pairs[1]})
        # Of all that the version in force answered, so that no coin has a say in the bins.
        together: dict[str, list[Value]] = {}
        for _, against in self._values:
            for channel, value in against.items():
                together.setdefault(channel, []).append(value)
        bins = Bins(values.freeze([together]))
        for at, pair, events in zip(self._coins, self._values, self._events, strict=True):
            count(made.requests, _HALF, at)
            count(made.units, _HALF, at)
            place = 0 if at == CANDIDATE else 1
            for kind in events[place]:
                count(made.events.setdefault(kind, {}), _HALF, at)
                counts = made.all_events.setdefault(kind, np.zeros(2, np.int64))
                counts[at] += 1
            for name, bin_ in zip(bins.names, bins.of(pair[place]), strict=True):
                if bin_ != values.MISSING:
                    table = made.bins.setdefault(name, {})
                    count(table, _HALF, at, bin_=bin_, bins=bins.n(name))
        return made

    def _read(self, side: int, answer: Answer) -> dict[str, Value]:
        if not answer.outputs:
            return {}
        arrays = [_wide(array) for array in answer.outputs.values()]
        if side not in self._channels:
            self._channels[side] = values.channels("output:", arrays, [*answer.outputs])
        return values.read(self._channels[side], arrays)


def _unit(record: Record) -> int:
    """64 bits of what a request counts for: its sticky unit, else itself."""
    sticky = next((u.hash for u in record.units if u.kind != routes.UNIT_REQUEST), "")
    return int.from_bytes(blake2b((sticky or record.id).encode(), digest_size=8).digest())


def _events(answer: Answer) -> set[str]:
    if answer.said:
        return {"error"}
    return set() if answer.is_finite else {"not_finite"}


def _wide(output: Array) -> Array:
    return widened(output) if output.dtype == BFLOAT16 else output


def _is_finite(output: Array) -> bool:
    output = _wide(output)
    return output.dtype.kind != "f" or bool(np.isfinite(output).all())


def _plain(tolerance: Tolerance) -> dict[str, float | None]:
    return {
        "atol": tolerance.atol, "rtol": tolerance.rtol, "threshold": tolerance.threshold,
    }  # fmt: skip
