"""The thread that writes predictions and labels down. Whoever hands them over never waits for disk.

Predictions wait in a bounded queue and are written in batches, each in one transaction. While the
database cannot be written (a full disk, a server that is away), they wait until the queue is full;
then the newest are lost and counted. Labels are answered when they are on disk.
"""

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.counters import Counter
from gateway.labels import ids
from gateway.labels.rows import Bounds, Kept, Label, StoreError, Verdict, pack
from gateway.telemetry import event
from gateway.tensors import BFLOAT16, Array, widened
from registry.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from gateway.labels.store import Store  # SQLAlchemy takes its time to load

T = TypeVar("T")

_PAUSE_S = 0.25
"""Predictions are written at most so often: a transaction waits for the disk."""
_BATCH_ROWS = 5_000
_RETRY_S = (0.5, 10.0)
"""The first and the longest pause after a write that failed."""
_FORGET_S = 60.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request among those of an observation."""

    id: str
    rows: int
    variant: str
    traffic: str = "primary"
    assigned: float = 1.0
    """The probability with which the variant was chosen."""
    unit: str | None = None
    """Hash of what the assignment is sticky to."""
    sampled: float = 1.0
    """The probability with which the request was handed over at all."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Requests of one version that ran together; their rows follow each other in every tensor."""

    model: str
    version: int
    requests: Sequence[Asked]
    signature: Signature
    outputs: Sequence[Array]
    inputs: Sequence[Array] = ()
    time: float | None = None
    """Seconds since 1970; None: now."""


@dataclass(slots=True)
class LogMeters:
    """What is counted; each by the one thread named."""

    kept: Counter
    """Rows written, by the log's thread."""
    lost_full: Counter
    """Rows that found the queue full, by the event loop."""
    lost_unwritten: Counter
    """Rows that could not be written before the end, or not at all, by the log's thread."""
    forgotten: Counter
    """Rows let go by retention, by the log's thread."""


class PredictionLog:
    """Keeps predictions and labels.

    Parameters
    ----------
    share : 0 to 1, of requests whose predictions are kept
    elements_max : a tensor with more values a row is not kept
    with_inputs : keep inputs too
    queue_rows_max : predictions that may wait to be written
    """

    def __init__(
        self,
        store: "Store",
        *,
        share: float,
        bounds: Bounds,
        meters: LogMeters,
        elements_max: int = 64,
        with_inputs: bool = False,
        queue_rows_max: int = 100_000,
    ) -> None:
        self.store = store
        self.share = share
        self.shares: Mapping[str, float] = {}
        """By model, where revisions say another; replaced as a whole."""
        self.days: Mapping[str, float] = {}
        """How long predictions wait for labels, likewise."""
        self.meters = meters
        self.problem: str | None = None
        """Why the last write failed; None when it did not."""
        self._bounds = bounds
        self._elements_max = elements_max
        self._with_inputs = with_inputs
        self._queue_rows_max = queue_rows_max
        # One thread adds to the first number and the other to the second; neither is locked.
        self._rows_in = self._rows_out = 0
        self._raw: deque[tuple[Observed, Asked, slice, float]] = deque()
        self._waiting: deque[Kept] = deque()
        self._asked: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._called = threading.Event()
        self._is_ending = False
        self._retry_at = 0.0
        self._retry_s = _RETRY_S[0]
        self._forget_at = time.monotonic() + _FORGET_S * random.random()  # noqa: S311  spreads work
        self._thread = threading.Thread(target=self._work, name="labels", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Write what waits, then end the thread; what cannot be written by then is lost."""
        self._is_ending = True
        self._called.set()
        self._thread.join(timeout_s)
        self.store.close()

    # -- handed over

    def wants(self, request: str, model: str) -> bool:
        """Whether predictions of this request are kept at all."""
        return ids.is_kept(request, self.shares.get(model, self.share))

    def record(self, observed: Observed) -> None:
        """Keep the predictions of those requests that are kept at all. Never waits.

        One thread may call this: the event loop. Nobody writes to the arrays from now on.
        """
        at = 0
        moment = time.time() if observed.time is None else observed.time
        for asked in observed.requests:
            start, at = at, at + asked.rows
            if not self.wants(asked.id, observed.model):
                continue
            if self._rows_in - self._rows_out + asked.rows > self._queue_rows_max:
                self.meters.lost_full.add(asked.rows)
                continue
            self._rows_in += asked.rows
            self._raw.append((observed, asked, slice(start, at), moment))

    async def label(self, labels: Sequence[Label]) -> list[Verdict]:
        """Store labels, after all predictions handed over before; what became of each.

        Raises
        ------
        StoreError : nothing was stored.
        """
        is_kept = [self.wants(label.request, label.model) for label in labels]
        return await self._ask(lambda: self.store.label(labels, time.time(), is_kept=is_kept))

    async def rows_of(self, requests: Sequence[str]) -> dict[str, dict[str, int]]:
        """Rows of these requests by model, after all predictions handed over before."""
        return await self._ask(lambda: self.store.rows_of(requests))

    async def _ask(self, question: Callable[[], T]) -> T:
        answer: Future[T] = Future()
        self._asked.append((question, answer))
        self._called.set()
        return await asyncio.wrap_future(answer)

    # -- the thread

    def _work(self) -> None:
        while not self._is_ending:
            self._called.wait(1.0)
            self._called.clear()
            if self._asked:
                self._answer()
            else:
                self._write()
                self._forget()
            if not self._is_ending and not self._asked:
                self._called.wait(_PAUSE_S)
        self._retry_at = 0.0
        self._answer()
        self._write()
        self.meters.lost_unwritten.add(len(self._waiting))

    def _answer(self) -> None:
        while self._asked:
            question, answer = self._asked.popleft()
            self._retry_at = 0.0  # Somebody waits to hear it.
            self._write()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(question())
            except Exception as error:  # noqa: BLE001  whoever asked is told
                answer.set_exception(error)

    def _drain(self) -> None:
        """What was handed over, as rows of the table."""
        while self._raw:
            observed, asked, rows, moment = self._raw.popleft()
            try:
                self._waiting.extend(self._kept(observed, asked, rows, moment))
            except Exception:  # noqa: BLE001  one bad answer must not end the thread
                self._rows_out += asked.rows
                self.meters.lost_unwritten.add(asked.rows)
                event("prediction_not_kept", logging.ERROR, model=observed.model, exc=True)

    def _kept(self, observed: Observed, asked: Asked, rows: slice, moment: float) -> Iterator[Kept]:
        n = sum(one.rows for one in observed.requests)
        signature = observed.signature
        outputs = self._rows(signature.outputs, observed.outputs, n, rows)
        inputs: Sequence[bytes | None] = [None] * asked.rows
        if self._with_inputs:
            inputs = self._rows(signature.inputs, observed.inputs, n, rows)
        sampled = asked.sampled * min(self.shares.get(observed.model, self.share), 1.0)
        for k in range(asked.rows):
            yield Kept(
                asked.id, k, observed.model, observed.version, asked.traffic, asked.variant,
                moment, sampled, asked.assigned, asked.unit, outputs[k], inputs[k],
            )  # fmt: skip

    def _rows(
        self, specs: Sequence[TensorSpec], tensors: Sequence[Array], n: int, rows: slice
    ) -> list[bytes]:
        """The tensors of these rows, packed row by row."""
        columns: list[tuple[str, list[Any]]] = []
        for spec, tensor in zip(specs, tensors, strict=True):
            if not tensor.ndim or tensor.shape[0] != n:
                continue  # it has no row for each row of a request
            part = tensor[rows]
            if part.dtype == BFLOAT16:
                part = widened(part)
            width = part.size // max(len(part), 1)
            if width > self._elements_max:
                continue
            values = part.reshape(len(part)) if width == 1 else part.reshape(len(part), width)
            columns.append((spec.name, values.tolist()))
        return [
            pack({name: values[k] for name, values in columns})
            for k in range(rows.stop - rows.start)
        ]

    def _write(self) -> None:
        self._drain()
        while self._waiting and time.monotonic() >= self._retry_at:
            batch = [self._waiting[k] for k in range(min(len(self._waiting), _BATCH_ROWS))]
            try:
                self.store.keep(batch)
            except StoreError as error:
                self._failed(str(error))
                return
            # Only now: what a failed write has at hand is still first in the queue.
            for _ in batch:
                self._waiting.popleft()
            self._rows_out += len(batch)
            self.meters.kept.add(len(batch))
            self._succeeded()

    def _forget(self) -> None:
        if time.monotonic() < self._forget_at:
            return
        self._forget_at = time.monotonic() + _FORGET_S
        try:
            self.meters.forgotten.add(self.store.forget(self._bounds, time.time(), self.days))
        except StoreError as error:
            self._failed(str(error))

    def _failed(self, reason: str) -> None:
        if self.problem is None:
            event("predictions_not_kept", logging.ERROR, reason=reason)
            self._retry_s = _RETRY_S[0]
        self.problem = reason
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(self._retry_s * 2, _RETRY_S[1])

    def _succeeded(self) -> None:
        if self.problem is not None:
            event("predictions_kept_again")
        self.problem = None
