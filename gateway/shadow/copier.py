"""Copies of one model's requests, run on one shadow by a thread of its own, and compared.

Nothing waits for a copy: it is taken if there is room for it, else dropped and counted. The thread
runs a twin of the version's session, so that calls of that version by others never queue behind it.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from gateway.comparison import Comparison, compare
from gateway.errors import GatewayError
from gateway.exposures import Slot
from gateway.labels import Asked, Observed, PredictionLog
from gateway.router import Meters, Twin, Variant
from gateway.shadow import tally
from gateway.shadow.pacer import Demand, Pacer, give_way
from gateway.shadow.tally import Coverage, Kept, Pairing, Places, numeric
from gateway.telemetry import SHADOW_DROPPED, SHADOW_PAIRS, Telemetry, event
from gateway.tensors import Array, stack
from monitors.guards.bets import CANDIDATE
from registry import buckets
from registry.signature import Signature, TensorSpec

STUCK_S = 5.0
"""A run that was asked to end so long ago will not: until it does, nothing is copied."""
_REST_S_MAX = 2.0
"""However long answers have waited: some copies are run, or the shadow would never be judged."""
_LOOK_EVERY_S = 0.02
"""While it rests."""
_WRITE_BYTES_PER_S = 2_000_000
_WRITE_S = 1.0


class Drawn(NamedTuple):
    """What a request is drawn by."""

    unit: bytes
    is_sticky: bool
    """The unit may come again; else it is the request itself."""


class Given(NamedTuple):
    """What the champion was asked and answered."""

    id: str
    """The prediction id; empty where predictions are not kept."""
    inputs: list[Array]
    """In the champion's order, as the outputs."""
    outputs: list[Array]
    rows: int


class Copy(NamedTuple):
    """One request that the champion has answered."""

    id: str
    """Its prediction id; empty where predictions are not kept."""
    unit: int | None
    """Hash of the sticky unit for counting; None where the request is its own."""
    unit_name: str | None
    """The same as labels know it."""
    inputs: list[Array]
    """In the champion's order."""
    outputs: list[Array]
    """The champion's."""
    rows: int
    size: int
    at: float
    """By `time.monotonic`."""


class Result(NamedTuple):
    """What came of copies that ran together."""

    answered: list[Copy]
    failed: list[tuple[Copy, str]]
    """With the code of the error."""
    dropped: list[tuple[Copy, str]]
    """With the reason."""
    n_differ: int
    inputs: list[Array]
    """Of those answered, stacked, in the shadow's order."""
    outputs: list[Array]
    run_s: float


class Copier:
    """One shadow of a model, in one worker.

    Parameters
    ----------
    champion, shadow : the two versions; held, so that neither is closed meanwhile
    file : where this worker's counts are
    slot : where it says that a run is under way, which outlives a crash
    observe : whether rows of the shadow go to its version's monitors, drawn by lot
    places : rows by bin of the champion's reference profile; None: there is none
    pacer : says when to leave the cores to others
    before : whom this one follows; its counts go on if they are of the same pairing
    """

    def __init__(
        self,
        pairing: Pairing,
        champion: Variant,
        shadow: Variant,
        *,
        salt: bytes,
        rows_max: int,
        file: Path,
        slot: Path,
        telemetry: Telemetry,
        meters: Meters,
        observe: Callable[[], bool],
        places: Callable[[], Places | None],
        pacer: Pacer,
        predictions: PredictionLog | None,
        before: "Copier | None" = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.pairing, self.champion, self.shadow = pairing, champion, shadow
        self.salt = salt
        self._key = key_of(pairing.to, salt)
        self._below = round(pairing.shadow.sample * buckets.N / 100)
        self._rows_max = rows_max if shadow.can_batch else 1
        self.file, self._slot_path = file, slot
        self._telemetry, self._meters, self._observe = telemetry, meters, observe
        self._places, self._pacer, self._predictions = places, pacer, predictions
        self._names = [spec.name for spec in champion.signature.outputs]
        self._shadow_names = [spec.name for spec in shadow.signature.outputs]
        self._order, problem = _order(champion.signature, shadow.signature)
        self.is_followed = False
        """Another one goes on with its counts."""
        self.lock = threading.Lock()
        """Between the shadow's thread and whoever writes its counts down; never the loop."""
        self.kept: Kept = tally.read(file) or Kept(pairing, time.time())
        if before is not None and before.file == file:
            self.kept, self.lock, before.is_followed = before.kept, before.lock, True
        self.kept.pairing, self.kept.problem, self.kept.barred = pairing, problem, ""
        self._coverage: Coverage = self.kept.coverage
        # One thread adds to the first number of each pair, the other to the second.
        self._n_offered = 0
        self._demand = Demand(time.monotonic())
        self._n_in = self._n_out = self._bytes_in = self._bytes_out = 0
        self._queue: SimpleQueue[Copy | None] = SimpleQueue()
        self._next: Copy | None = None
        self._thread: threading.Thread | None = None
        self._twin: Twin | None = None
        self._slot: Slot | None = None
        self._ran_at = 0.0
        self._until = 0.0
        """When the run under way must have ended; 0: none is."""
        self._asked_at = 0.0
        self._is_closed = False
        self._is_stuck = False
        self._is_changed = True
        self._due = 0.0
        self._reference: Places | None = None
        self._has_complained = False

    # -- on the loop

    @property
    def n_waiting(self) -> int:
        """Copies that wait or run."""
        return self._n_in - self._n_out

    def offer(self, drawn: Drawn, given: Given, size: int) -> None:
        """Take a copy of a request that the champion has answered, if its unit is drawn."""
        if buckets.bucket_of_bytes(self._key, drawn.unit) >= self._below:
            return
        if self.kept.problem or self.kept.barred:
            return
        now, moment = time.time(), time.monotonic()
        self._n_offered += 1
        self._coverage.sample(now)
        self._is_changed = True
        shadow = self.pairing.shadow
        reason = ""
        if self._is_stuck:
            reason = "stuck"
        elif self.champion.queue.is_behind:
            reason = "champion_busy"
        elif self.n_waiting >= shadow.inflight_max:
            reason = "inflight_max"
        elif self._bytes_in - self._bytes_out + size > shadow.bytes_max:
            reason = "bytes_max"
        if reason:
            self._drop(reason)
            return
        self._n_in += 1
        self._bytes_in += size
        count = name = None
        if drawn.is_sticky:
            name = blake2b(drawn.unit, digest_size=8).hexdigest()
            count = int.from_bytes(blake2b(drawn.unit, digest_size=8, key=b"pairs").digest())
        self._queue.put(Copy(given.id, count, name, *given[1:], size, moment))
        if self._thread is None:
            self._start()

    def tick(self, moment: float) -> None:
        """End a run that takes too long; see whether one does not end."""
        until, twin = self._until, self._twin
        if not until or moment <= until or twin is None:
            self._asked_at, self._is_stuck = 0.0, False
            return
        if not self._asked_at:
            self._asked_at = moment
        twin.stop()
        if moment - self._asked_at > STUCK_S and not self._is_stuck:
            self._is_stuck = True
            pairing = self.pairing
            event("shadow_stuck", logging.WARNING, model=pairing.model, version=pairing.version)

    def bar(self, reason: str) -> None:
        """Run it no more."""
        if not self.kept.barred:
            self.kept.barred = reason
            self._is_changed = True
            pairing = self.pairing
            event(
                "shadow_barred",
                logging.ERROR,
                model=pairing.model,
                version=pairing.version,
                reason=reason,
            )

    def close(self) -> None:
        """Take nothing more; the thread ends when its run does."""
        self._is_closed = True
        self._queue.put(None)
        if self._until and self._twin is not None:
            self._twin.stop()

    def _start(self) -> None:
        self._slot = Slot(self._slot_path)
        self._twin = self.shadow.twin()
        name = f"shadow {self.pairing.model} {self.pairing.version}"
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _drop(self, reason: str, n: int = 1) -> None:
        self._coverage.drop(reason, time.time(), n)
        labels = (self.pairing.model, str(self.pairing.version), reason)
        self._telemetry.counter(SHADOW_DROPPED, *labels).add(n)

    def _settled(self, result: Result) -> None:
        """Count and pass on, on the loop, what the thread has found."""
        model, version = self.pairing.model, self.pairing.version
        for reason, n in Counts(reason for _, reason in result.dropped).items():
            self._drop(reason, n)
        for _, code in result.failed:
            self._meters.fail(code, result.run_s)
        labels = (model, str(version))
        if result.failed:
            self._telemetry.counter(SHADOW_PAIRS, *labels, "failed").add(len(result.failed))
        n = len(result.answered)
        if not n:
            return
        self._meters.ok.add(n)
        for _ in range(n):  # The run alone: who waits for what is left over tells nothing.
            self._meters.seconds.observe(result.run_s)
        self._telemetry.counter(SHADOW_PAIRS, *labels, "differ").add(result.n_differ)
        self._telemetry.counter(SHADOW_PAIRS, *labels, "agree").add(n - result.n_differ)
        rows = sum(copy.rows for copy in result.answered)
        if self._observe():
            self.shadow.observe(result.inputs, result.outputs, rows)
        if self._predictions is not None and result.answered[0].id:
            asked = tuple(
                Asked(copy.id, copy.rows, self.pairing.to, "shadow", 1.0, copy.unit_name)
                for copy in result.answered
            )
            self._predictions.record(
                Observed(
                    model, version, asked, self.shadow.signature, result.outputs, result.inputs
                )
            )

    # -- on the thread that writes

    def write(self) -> None:
        """Write the counts down, if there are new ones and it is time."""
        moment = time.monotonic()
        if not self._is_changed or moment < self._due:
            return
        self._is_changed = False
        with self.lock:
            data = self.kept.to_json()
        self._due = moment + max(_WRITE_S / 2, len(data) / _WRITE_BYTES_PER_S)
        if not tally.write(self.file, data):
            self._is_changed = True

    def flush(self) -> None:
        """Write them down now."""
        self._due = 0.0
        self.write()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, and leave no trace of a run that is under way no more."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._slot is not None and not self.is_followed:
            self._slot.close()

    # -- on the shadow's thread

    def _work(self) -> None:
        give_way()
        while not self._is_closed:
            copies = self._gather()
            if not copies:
                return
            start = time.monotonic()
            try:
                with self._pacer.run():
                    result = self._ran(copies)
            except Exception:  # noqa: BLE001  whatever it was, it must not end the shadow
                if not self._has_complained:
                    self._has_complained = True
                    event("shadow_failed", logging.ERROR, model=self.pairing.model, exc=True)
                result = Result([], [], [(c, "not_compared") for c in copies], 0, [], [], 0.0)
            with contextlib.suppress(RuntimeError):  # The loop has ended.
                self._loop.call_soon_threadsafe(self._settled, result)
            # Last: where none waits, the next turn of the loop counts all that came of them.
            self._n_out += len(copies)
            self._bytes_out += sum(copy.size for copy in copies)
            self._is_changed = True
            end = time.monotonic()
            # Drops leave a verdict open: one that can do all that is asked of it goes on.
            n = len(result.answered) + len(result.failed)
            if self._demand.ran(n, end - start, n_offered=self._n_offered, now=end) >= 1:
                self._rest(end + _REST_S_MAX)

    def _rest(self, until: float) -> None:
        """Leave the cores to others, if they are wanted: a shadow lives on what is left over."""
        while self._pacer.is_owing and not self._is_closed:
            if (left_s := until - time.monotonic()) <= 0:
                return
            time.sleep(min(_LOOK_EVERY_S, left_s))

    def _gather(self) -> list[Copy]:
        """The oldest copy, and those behind it that fit into one run with it."""
        first = self._next if self._next is not None else self._queue.get()
        self._next = None
        if first is None:
            return []
        copies, rows = [first], first.rows
        shapes = [array.shape[1:] for array in first.inputs]
        while rows < self._rows_max:
            try:
                copy = self._queue.get_nowait()
            except Empty:
                break
            if copy is None:
                self._queue.put(None)
                break
            if rows + copy.rows > self._rows_max or shapes != [a.shape[1:] for a in copy.inputs]:
                self._next = copy
                break
            copies.append(copy)
            rows += copy.rows
        return copies

    def _ran(self, copies: list[Copy]) -> Result:
        """Run copies, together or else one by one, and compare what came."""
        moment = time.monotonic()
        deadline_s = self.pairing.shadow.deadline_s
        dropped = [(c, "deadline_exceeded") for c in copies if moment - c.at > deadline_s]
        waiting = [c for c in copies if moment - c.at <= deadline_s]
        if not waiting:
            return Result([], [], dropped, 0, [], [], 0.0)
        start = time.perf_counter()
        outcome = self._outputs(waiting)
        if isinstance(outcome, GatewayError) and len(waiting) > 1:
            parts = [self._ran([copy]) for copy in waiting]
            return _joined(dropped, parts)
        run_s = time.perf_counter() - start
        if time.monotonic() - waiting[-1].at > deadline_s:
            late = [(copy, "deadline_exceeded") for copy in waiting]
            return Result([], [], dropped + late, 0, [], [], run_s)
        with self.lock:
            if isinstance(outcome, GatewayError):
                (copy,) = waiting
                self.kept.tally.fail(copy.unit, copy.rows)
                return Result([], [(copy, outcome.code)], dropped, 0, [], [], run_s)
            inputs, outputs = outcome
            n_differ = self._compared(waiting, outputs)
        return Result(waiting, [], dropped, n_differ, inputs, outputs, run_s)

    def _outputs(self, copies: list[Copy]) -> "tuple[list[Array], list[Array]] | GatewayError":
        """The shadow's inputs and outputs for copies, stacked; or why there are none."""
        twin, slot = self._twin, self._slot
        assert twin is not None and slot is not None  # noqa: PT018, S101  made with the thread
        inputs = stack([[copy.inputs[k] for k in self._order] for copy in copies])
        rows = sum(copy.rows for copy in copies)
        step = rows if len(copies) > 1 or not self.shadow.can_batch else self._rows_max
        pieces = []
        slot.run(CANDIDATE, 1)
        try:
            for at in range(0, max(rows, 1), max(step, 1)):
                self._until = copies[-1].at + self.pairing.shadow.deadline_s
                piece = inputs if step >= rows else [array[at : at + step] for array in inputs]
                pieces.append(twin.run(piece))
        except GatewayError as error:
            return error
        finally:
            self._until = 0.0
            slot.run(CANDIDATE, -1)
        return inputs, stack(pieces)

    def _compared(self, copies: list[Copy], outputs: list[Array]) -> int:
        """Compare and count; how many requests differ."""
        counts, n_differ, at = self.kept.tally, 0, 0
        tolerances = self.pairing.shadow.compare
        if self._reference is None or not counts.requests % 256:
            self._reference = self._places()
        has_rows = self.shadow.signature.has_row_axis
        for copy in copies:
            mine = outputs
            if len(copies) > 1:
                mine = [array[at : at + copy.rows] for array in outputs]
                at += copy.rows
            rows = copy.rows if has_rows else 1
            first = dict(zip(self._names, copy.outputs, strict=True))
            second = dict(zip(self._shadow_names, mine, strict=True))
            found: Comparison = compare(first, second, rows, tolerances)
            n_differ += not found.is_agreed
            counts.pair(copy.unit, found, rows, columns=numeric(first, second, rows))
            if self._reference is not None and has_rows:
                counts.place(self._reference, copy.inputs, found.differs)
        return n_differ


def _joined(dropped: list[tuple[Copy, str]], parts: Sequence[Result]) -> Result:
    answered = [copy for part in parts for copy in part.answered]
    good = [part for part in parts if part.answered]
    return Result(
        answered,
        [each for part in parts for each in part.failed],
        [*dropped, *(each for part in parts for each in part.dropped)],
        sum(part.n_differ for part in parts),
        stack([part.inputs for part in good]) if good else [],
        stack([part.outputs for part in good]) if good else [],
        sum(part.run_s for part in parts),
    )


def _order(champion: Signature, shadow: Signature) -> tuple[list[int], str]:
    """Places of the shadow's inputs among the champion's; and why it cannot be asked the same."""
    places = {spec.name: k for k, spec in enumerate(champion.inputs)}
    for spec in shadow.inputs:
        if spec.name not in places:
            return [], f"its input {spec.name!r} is none of the champion's"
        other = champion.inputs[places[spec.name]]
        if spec.datatype != other.datatype:
            return [], f"its input {spec.name!r} is {spec.datatype}, and was {other.datatype}"
        if not _takes(spec, other):
            return [], (
                f"its input {spec.name!r} has shape {list(spec.shape)}, and had {list(other.shape)}"
            )
    return [places[spec.name] for spec in shadow.inputs], ""


def _takes(spec: TensorSpec, other: TensorSpec) -> bool:
    return len(spec.shape) == len(other.shape) and all(
        wanted in (given, -1) for wanted, given in zip(spec.row_shape, other.row_shape, strict=True)
    )


def key_of(to: str, salt: bytes) -> bytes:
    """What units are hashed with for one shadow: several of a model are drawn independently."""
    return blake2b(to.encode(), key=salt, digest_size=buckets.SALT_BYTES).digest()
