"""Requests that wait for company: rows of several requests, run at once.

A batch leaves as soon as the session is idle: at the end of the loop's turn, so that requests which
arrived in the same turn share it, and while it runs the next ones gather. Nothing waits for a clock
unless `wait_s_max` says so. The batcher gets a function to run and knows no runtime.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from gateway.counters import Counter, Histogram
from gateway.errors import (
    DeadlineError,
    GatewayError,
    ModelFailedError,
    NotReadyError,
    QueueFullError,
    TooLargeError,
)
from gateway.tensors import Array, stack
from gateway.watchdog import HELD_S_MAX, Watchdog

Run = Callable[[list[Array]], list[Array]]
Observe = Callable[[list[Array], list[Array], int], None]
"""Is shown the inputs, outputs and rows of every run that succeeded; called on the loop."""

_OVERRUN = 10
"""An inline run this many times longer than allowed is an overrun; two move the model."""
_PROBATION_RUNS = 32
"""After a slow run, so many runs have their CPU time measured: was it the model or the machine?"""
_STUCK_S = 5.0
"""A run that nobody waits for and that has not ended so long after it was asked to never will."""
_ASK_S = 0.5


class _Waiting:
    """One request in the queue."""

    __slots__ = (
        "allowed_s", "deadline", "done", "future", "inputs", "key", "parts", "queued", "rows",
    )  # fmt: skip

    def __init__(
        self,
        inputs: list[Array],
        rows: int,
        key: object,
        future: "asyncio.Future[list[Array]]",
        queued: float,
        deadline: float,
        allowed_s: float,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.key = key
        self.future = future
        self.queued = queued
        self.deadline = deadline
        self.allowed_s = allowed_s
        self.done = 0  # rows handed to batches so far
        self.parts: list[list[Array]] = []


_Part = tuple[_Waiting, int, int]
"""A request and its rows from .. to in one batch."""
_Stack = tuple[list[Array], list[Array], int]
"""Inputs, outputs and rows of one run."""
_Outcome = list[Array] | GatewayError


class BatchMeters:
    """What a batcher counts."""

    __slots__ = (
        "ended", "gone", "late", "queue_s", "ran_at", "refused", "rows", "run_s", "shared_n",
        "shared_ns",
    )  # fmt: skip

    def __init__(
        self,
        *,
        queue_s: Histogram,
        run_s: Histogram,
        rows: Histogram,
        refused: Counter,
        late: Counter,
        gone: Counter,
        ended: Counter,
        shared_n: Counter,
        shared_ns: Counter,
    ) -> None:
        self.queue_s = queue_s
        self.run_s = run_s
        self.rows = rows
        self.refused = refused
        self.late = late
        self.gone = gone
        self.ended = ended
        self.ran_at = 0.0
        """When the newest batch started, by `time.monotonic`; 0: none has."""
        self.shared_n = shared_n
        """Requests, beyond one a run, that had their run together with others."""
        self.shared_ns = shared_ns
        """Nanoseconds of those runs, for each of these requests."""


class Batcher:
    """The queue in front of one session.

    Parameters
    ----------
    run : all outputs for stacked inputs; called by one thread at a time
    can_batch : whether rows of several requests may share a run
    is_inline : run on the event loop; else on one thread of its own
    inline_rows_max : batches that may be larger never run on the event loop; None: all may
    rows_max : rows in one batch; a larger request is split when it can be batched. 1: no batching
    stop : asks the run under way to end, from any thread; None: it cannot be ended
    watchdog : looks after runs on the event loop
    on_stuck : told when a run does not end although it was asked to
    on_ended : told when a run is asked to end that has gone on for a second and more, and not
        because its clients have left; on the loop, or on the watchdog's thread
    """

    def __init__(
        self,
        run: Run,
        *,
        model: str,
        version: int,
        can_batch: bool,
        is_inline: bool,
        rows_max: int,
        wait_s_max: float,
        queue_rows_max: int,
        inline_s_max: float,
        inline_rows_max: int | None = None,
        meters: BatchMeters,
        has_free_axes: bool = False,
        observe: Observe | None = None,
        stop: Callable[[], None] | None = None,
        watchdog: Watchdog | None = None,
        on_stuck: Callable[[], None] | None = None,
        on_ended: Callable[[], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._run = run
        self.model = model
        self.version = version
        self._is_independent = can_batch
        self.is_inline = is_inline
        self._inline_rows_max = inline_rows_max
        self.set_limits(rows_max=rows_max, wait_s_max=wait_s_max, queue_rows_max=queue_rows_max)
        self._overrun_s = inline_s_max * _OVERRUN
        self._meters = meters
        self._has_free_axes = has_free_axes
        self._observe = observe
        self._queue: deque[_Waiting] = deque()
        self.rows_queued = 0
        self._is_running = False
        self._is_closed = False
        self._dispatch_at: asyncio.Handle | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_time = math.inf
        self._in_flight: list[_Waiting] = []
        self._row_s = 0.0
        self._probation = 0
        self._overruns = 0
        self._batches: SimpleQueue[tuple[list[_Part], list[Array]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stop = stop
        self._watchdog = watchdog
        self._on_stuck = on_stuck
        self._on_ended = on_ended
        self._is_ending = False
        self._is_stuck = False
        self._asked_at = 0.0
        self._asking: asyncio.TimerHandle | None = None
        if watchdog is not None and is_inline:
            watchdog.start()

    @property
    def ran_at(self) -> float:
        """When the newest batch started, by `time.monotonic`."""
        return self._meters.ran_at

    @property
    def is_busy(self) -> bool:
        """Whether a request submitted now would have to wait for a batch to end."""
        if self._is_running or self.rows_queued > self._rows_max:
            return True
        return not self.can_batch and len(self._queue) > 1

    @property
    def is_behind(self) -> bool:
        """Whether more rows wait than one batch holds."""
        return self.rows_queued > self._rows_max

    def submit(
        self,
        inputs: list[Array],
        rows: int,
        timeout_s: float,
        allowed_s: float | None = None,
    ) -> "asyncio.Future[list[Array]]":
        """Queue one request; the future holds its outputs, or the reason there are none.

        Cancel the future when nobody waits for it any more: rows that did not run are dropped.

        Parameters
        ----------
        timeout_s : from now on
        allowed_s : what the error says was allowed, where a part of it has passed before

        Raises
        ------
        QueueFullError, TooLargeError : there is no room for so many rows.
        NotReadyError : the version is being closed.
        """
        # A request without rows takes a place in the queue too.
        if max(self.rows_queued + rows, len(self._queue) + 1) > self._queue_rows_max:
            raise self._no_room(rows)
        if self._is_closed:
            raise NotReadyError(f"model {self.model!r} version {self.version} is being closed")
        if self._is_stuck:
            raise self._stuck()
        future: asyncio.Future[list[Array]] = self._loop.create_future()
        now = time.monotonic()
        key = tuple(array.shape[1:] for array in inputs) if self._has_free_axes else None
        allowed_s = timeout_s if allowed_s is None else allowed_s
        waiting = _Waiting(inputs, rows, key, future, now, now + timeout_s, allowed_s)
        self._queue.append(waiting)
        self.rows_queued += rows
        if waiting.deadline < self._sweep_time:
            self._sweep_by(waiting.deadline, now)
        if self._dispatch_at is None and not self._is_running:
            if self._wait_s_max > 0 and self.rows_queued < self._rows_max:
                self._dispatch_at = self._loop.call_later(self._wait_s_max, self._dispatch)
            else:
                self._dispatch_at = self._loop.call_soon(self._dispatch)
        elif self._wait_s_max > 0 and self.rows_queued >= self._rows_max and not self._is_running:
            self._dispatch_now()
        return future

    def set_limits(self, *, rows_max: int, wait_s_max: float, queue_rows_max: int) -> None:
        """Other limits, in force from the next batch and the next request on."""
        self.can_batch = self._is_independent and rows_max > 1
        self._rows_max = rows_max
        self._wait_s_max = wait_s_max
        self._queue_rows_max = queue_rows_max
        # Batches were measured, up to a size: larger ones might hold the loop for too long.
        if self.can_batch and rows_max > (self._inline_rows_max or rows_max):
            self.is_inline = False

    async def close(self) -> None:
        """Take nothing more, finish what waits, end the thread."""
        self._is_closed = True
        waiting = [item.future for item in (*self._queue, *self._in_flight)]
        if waiting:
            await asyncio.wait(waiting)
        if self._sweep is not None:
            self._sweep.cancel()
        while self._is_running and not self._is_stuck:  # For nobody: whoever waited has hung up.
            if not self._is_ending:
                self._end_run()
            await asyncio.sleep(0.02)
        if self._asking is not None:
            self._asking.cancel()
        if self._thread is not None and not self._is_stuck:
            self._batches.put(None)
            await asyncio.to_thread(self._thread.join)

    # -- from queue to session

    def _dispatch_now(self) -> None:
        if self._dispatch_at is not None:
            self._dispatch_at.cancel()
        self._dispatch_at = self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_at = None
        now = time.monotonic()
        batch = self._take(now)
        if not batch:
            return
        inputs = self._stacked(batch)
        self._meters.ran_at = now
        if self.is_inline:
            self._run_inline(batch, inputs)
            if self._queue and not self._is_running:
                self._dispatch_at = self._loop.call_soon(self._dispatch)
            return
        self._hand_over(batch, inputs)

    def _hand_over(self, batch: list[_Part], inputs: list[Array]) -> None:
        """Let the session's own thread run a batch."""
        self._is_running = True
        self._in_flight = [waiting for waiting, _, _ in batch]
        if self._thread is None:
            name = f"session {self.model} {self.version}"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()
        self._batches.put((batch, inputs))

    def _take(self, now: float) -> list[_Part]:
        """The parts of the next batch; who left or whose time is over is dropped here."""
        queue, meters, room = self._queue, self._meters, self._rows_max
        batch: list[_Part] = []
        while queue:
            waiting = queue[0]
            left = waiting.rows - waiting.done
            if waiting.future.done() or waiting.deadline <= now:
                queue.popleft()
                self.rows_queued -= left
                self._drop(waiting)
                continue
            if batch and (left > room or waiting.key != batch[0][0].key or not self.can_batch):
                break
            if waiting.done == 0:
                meters.queue_s.observe(now - waiting.queued)
            n = min(left, room) if self.can_batch else left
            batch.append((waiting, waiting.done, waiting.done + n))
            waiting.done += n
            self.rows_queued -= n
            room -= n
            if waiting.done == waiting.rows:
                queue.popleft()
            if room <= 0:
                break
        return batch

    @staticmethod
    def _stacked(batch: list[_Part]) -> list[Array]:
        return stack(
            [
                waiting.inputs
                if stop - start == waiting.rows
                else [array[start:stop] for array in waiting.inputs]
                for waiting, start, stop in batch
            ]
        )

    def _run_inline(self, batch: list[_Part], inputs: list[Array]) -> None:
        is_watched = self._probation > 0
        cpu = time.thread_time() if is_watched else 0.0
        start = time.perf_counter()
        if (watchdog := self._watchdog) is not None:
            watchdog.holder = self
            outcomes, stacks = self._outcomes(batch, inputs)
            watchdog.holder = None
        else:
            outcomes, stacks = self._outcomes(batch, inputs)
        run_s = time.perf_counter() - start
        if self._is_ending:
            # It held the loop for too long: it runs again where it holds up nobody else.
            self._is_ending, self.is_inline = False, False
            self._hand_over(batch, inputs)
            return
        self._settle(batch, outcomes, stacks, run_s)
        if is_watched:
            self._probation -= 1
            if time.thread_time() - cpu > self._overrun_s:
                self._overruns += 1
                # Queued rows follow on the thread; nothing runs at this moment.
                self.is_inline = self._overruns < 2
        elif run_s > self._overrun_s:
            self._probation, self._overruns = _PROBATION_RUNS, 0

    def _work(self) -> None:
        """The session's own thread: one batch after another."""
        while (work := self._batches.get()) is not None:
            start = time.perf_counter()
            outcomes, stacks = self._outcomes(*work)
            run_s = time.perf_counter() - start
            with contextlib.suppress(RuntimeError):  # It took so long that the loop has ended.
                self._loop.call_soon_threadsafe(self._finish, work[0], outcomes, stacks, run_s)

    def _outcomes(
        self, batch: list[_Part], inputs: list[Array]
    ) -> tuple[list[_Outcome], list[_Stack]]:
        """Each part's outputs or error, and what ran; a batch that fails runs again by parts."""
        rows = sum(stop - start for _, start, stop in batch)
        try:
            outputs = self._run(inputs)
            if len(batch) > 1 and any(array.shape[:1] != (rows,) for array in outputs):
                raise ModelFailedError("an output has not one row for each row of the inputs")  # noqa: TRY301  handled like any failure of a batch
        except Exception as error:  # noqa: BLE001  whatever it was, every future must be settled
            if len(batch) > 1 and not self._is_ending:
                again = [self._outcomes([part], self._stacked([part])) for part in batch]
                return [one for ran, _ in again for one in ran], [s for _, ss in again for s in ss]
            if isinstance(error, GatewayError):
                return [error] * len(batch), []
            kind = type(error).__name__
            return [ModelFailedError(f"the model failed on this input ({kind})")] * len(batch), []
        stacks: list[_Stack] = [(inputs, outputs, rows)]
        if len(batch) == 1:
            return [outputs], stacks
        outcomes: list[_Outcome] = []
        at = 0
        for _, start, stop in batch:
            to = at + stop - start
            outcomes.append([array[at:to] for array in outputs])
            at = to
        return outcomes, stacks

    # -- from session to future

    def _finish(
        self,
        batch: list[_Part],
        outcomes: Sequence[_Outcome],
        stacks: Sequence[_Stack],
        run_s: float,
    ) -> None:
        self._is_running = self._is_ending = self._is_stuck = False
        self._in_flight = []
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        self._settle(batch, outcomes, stacks, run_s)
        if self._queue and self._dispatch_at is None:
            self._dispatch()

    def _settle(
        self,
        batch: list[_Part],
        outcomes: Sequence[_Outcome],
        stacks: Sequence[_Stack],
        run_s: float,
    ) -> None:
        if self._observe is not None:
            for stack_ in stacks:
                self._observe(*stack_)
        rows = sum(stop - start for _, start, stop in batch)
        self._meters.run_s.observe(run_s)
        self._meters.rows.observe(rows)
        if len(batch) > 1:
            self._meters.shared_n.add(len(batch) - 1)
            self._meters.shared_ns.add(int(run_s * (len(batch) - 1) * 1e9))
        self._row_s += 0.1 * (run_s / max(rows, 1) - self._row_s)
        for (waiting, _, stop), outcome in zip(batch, outcomes, strict=True):
            future = waiting.future
            if future.done():
                continue
            if isinstance(outcome, GatewayError):
                future.set_exception(outcome)
            elif stop == waiting.rows and not waiting.parts:
                future.set_result(outcome)
            else:
                waiting.parts.append(outcome)
                if stop == waiting.rows:
                    _join(waiting.parts, future)

    # -- deadlines

    def _sweep_by(self, deadline: float, now: float) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self._sweep_time = deadline
        self._sweep = self._loop.call_later(max(deadline - now, 0) + 0.001, self._expire)

    def _expire(self) -> None:
        """Answer every request whose time is over; one timer serves the whole queue."""
        now, following = time.monotonic(), math.inf
        for waiting in (*self._queue, *self._in_flight):
            if waiting.future.done():
                continue
            if waiting.deadline <= now:
                self._drop(waiting)
            else:
                following = min(following, waiting.deadline)
        self._sweep, self._sweep_time = None, math.inf
        if following < math.inf:
            self._sweep_by(following, now)
        if (
            self._is_running
            and not self._is_ending
            and all(waiting.future.done() for waiting in self._in_flight)
        ):
            self._end_run()

    # -- runs that nobody waits for

    def interrupt(self) -> None:
        """End a run that holds the loop; it is run again on a thread. For the watchdog's thread."""
        if self._stop is not None:
            self._is_ending = True
            self._stop()
            if self._on_ended is not None:
                self._on_ended()

    def _end_run(self) -> None:
        """Ask the run under way to end, again and again: a flag set too early would be missed."""
        if self._stop is None:
            return
        now = time.monotonic()
        if not self._is_ending:
            self._is_ending, self._asked_at = True, now
            self._meters.ended.add()
            is_late = any(not waiting.future.cancelled() for waiting in self._in_flight)
            if self._on_ended is not None and is_late and now - self.ran_at >= HELD_S_MAX:
                self._on_ended()
        if now - self._asked_at < _STUCK_S:
            self._stop()
            self._asking = self._loop.call_later(_ASK_S, self._end_run)
            return
        self._is_stuck, self._asking = True, None
        while self._queue:
            waiting = self._queue.popleft()
            if not waiting.future.done():
                waiting.future.set_exception(self._stuck())
        self.rows_queued = 0
        if self._on_stuck is not None:
            self._on_stuck()

    def _stuck(self) -> GatewayError:
        return NotReadyError(
            f"model {self.model!r} version {self.version}: a run of it does not end; retry while"
            " the process that holds it is replaced"
        )

    def _drop(self, waiting: _Waiting) -> None:
        if waiting.future.cancelled():
            self._meters.gone.add()
        elif not waiting.future.done():
            self._meters.late.add()
            waiting.future.set_exception(DeadlineError(self.model, waiting.allowed_s))

    def _no_room(self, rows: int) -> GatewayError:
        if rows > self._queue_rows_max:
            return TooLargeError(
                f"model {self.model!r}: {rows} rows in one request;"
                f" {self._queue_rows_max} are allowed (limits.queue_rows_max)"
            )
        self._meters.refused.add()
        retry_after_s = max(1, min(60, math.ceil(self.rows_queued * self._row_s)))
        return QueueFullError(self.model, self.version, self._queue_rows_max, retry_after_s)


def _join(parts: list[list[Array]], future: "asyncio.Future[list[Array]]") -> None:
    """Answer a split request with its outputs put together again."""
    try:
        future.set_result(stack(parts))
    except ValueError:
        future.set_exception(
            ModelFailedError("the model's outputs for parts of the rows do not fit together")
        )
