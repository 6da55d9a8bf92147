"""The batcher against its promises, with functions in place of sessions and real time."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.batcher import Batcher, BatchMeters
from gateway.counters import Region
from gateway.errors import (
    DeadlineError,
    InputRefusedError,
    ModelFailedError,
    NotReadyError,
    QueueFullError,
    TooLargeError,
)
from gateway.tensors import Array
from gateway.watchdog import Watchdog


class Session:
    """Adds one to every element, and notes the rows of each run."""

    def __init__(self, *, gate: threading.Event | None = None) -> None:
        self.batches: list[int] = []
        self.seen: list[float] = []
        self.gate = gate
        self.started = threading.Event()
        self.threads: set[int] = set()

    def __call__(self, inputs: list[Array]) -> list[Array]:
        self.batches.append(len(inputs[0]))
        self.seen += inputs[0].ravel().tolist()
        self.threads.add(threading.get_ident())
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(10)
        if (inputs[0] < 0).any():
            raise InputRefusedError("negative")
        return [inputs[0] + 1]


def batcher(run: Callable[[list[Array]], list[Array]], **changes: object) -> Batcher:
    region = Region()
    settings_ = {
        "model": "m",
        "version": 1,
        "can_batch": True,
        "is_inline": True,
        "rows_max": 8,
        "wait_s_max": 0.0,
        "queue_rows_max": 1000,
        "inline_s_max": 1.0,
        "meters": BatchMeters(
            queue_s=region.histogram((0.001,), 10**9),
            run_s=region.histogram((0.001,), 10**9),
            rows=region.histogram((1, 8), 1),
            refused=region.counter(),
            late=region.counter(),
            gone=region.counter(),
            ended=region.counter(),
            shared_n=region.counter(),
            shared_ns=region.counter(),
        ),
    }
    return Batcher(run, **{**settings_, **changes})  # type: ignore[arg-type]


def rows(*values: float) -> list[Array]:
    return [np.array(values, dtype=np.float32).reshape(-1, 1)]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.001)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Closed until set; opened at the end, so that no thread stays behind."""
    event = threading.Event()
    yield event
    event.set()


def test_requests_of_one_turn_share_a_batch() -> None:
    """No delay is added, yet all that arrive in one turn of the loop leave together."""

    async def scenario() -> tuple[list[list[Array]], list[int]]:
        session = Session()
        queue = batcher(session)
        futures = [queue.submit(rows(k), 1, 10) for k in range(5)]
        return await asyncio.gather(*futures), session.batches

    answers, batches = asyncio.run(scenario())

    assert batches == [5]
    assert [float(answer[0][0, 0]) for answer in answers] == [1, 2, 3, 4, 5]


def test_rows_are_counted_not_requests() -> None:
    """Three requests of four rows make batches of eight and four, not one of three requests."""

    async def scenario() -> list[int]:
        session = Session()
        queue = batcher(session)
        await asyncio.gather(*(queue.submit(rows(1, 2, 3, 4), 4, 10) for _ in range(3)))
        return session.batches

    assert asyncio.run(scenario()) == [8, 4]


def test_while_a_batch_runs_the_next_one_gathers(gate: threading.Event) -> None:
    """A busy session is never interrupted; what arrives meanwhile leaves as one batch after it."""

    async def scenario() -> Session:
        session = Session(gate=gate)
        queue = batcher(session, is_inline=False)
        first = queue.submit(rows(0), 1, 10)
        await until(session.started.is_set)
        others = [queue.submit(rows(k), 1, 10) for k in range(1, 4)]
        await asyncio.sleep(0)
        assert queue.is_busy
        gate.set()
        await asyncio.gather(first, *others)
        await queue.close()
        return session

    session = asyncio.run(scenario())

    assert session.batches == [1, 3]
    assert threading.get_ident() not in session.threads


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_request_gets_its_own_rows_back(
    sizes: list[int], rows_max: int, is_inline: bool
) -> None:
    """However requests are cut and joined: no row is lost, doubled, or given to a neighbour."""
    starts = np.cumsum([0, *sizes])
    requests = [rows(*range(a, b)) for a, b in pairwise(starts.tolist())]

    async def scenario() -> tuple[list[list[Array]], Session]:
        session = Session()
        queue = batcher(session, rows_max=rows_max, is_inline=is_inline)
        futures = [queue.submit(inputs, len(inputs[0]), 10) for inputs in requests]
        answers = await asyncio.gather(*futures)
        await queue.close()
        return answers, session

    answers, session = asyncio.run(scenario())

    for inputs, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(answer[0], inputs[0] + 1)
    # With 1 nothing is batched, so nothing is cut: requests run as they came.
    assert max(session.batches) <= (rows_max if rows_max > 1 else max(sizes))
    assert sorted(session.seen) == list(range(int(starts[-1])))


def test_a_bad_request_never_fails_its_neighbours() -> None:
    """A batch that fails is run again request by request: only the culprit hears of it."""

    async def scenario() -> list[object]:
        queue = batcher(Session())
        futures = [queue.submit(rows(value), 1, 10) for value in (1, -1, 3)]
        return await asyncio.gather(*futures, return_exceptions=True)

    good, bad, other = asyncio.run(scenario())

    assert isinstance(bad, InputRefusedError)
    assert float(good[0][0, 0]) == 2  # type: ignore[index]
    assert float(other[0][0, 0]) == 4  # type: ignore[index]


def test_an_output_of_wrong_length_is_not_dealt_out() -> None:
    """A model whose output loses rows in a batch (NonZero) must not shift rows to neighbours."""

    def run(inputs: list[Array]) -> list[Array]:
        return [inputs[0][inputs[0] > 0].reshape(-1, 1)]

    async def scenario() -> list[object]:
        queue = batcher(run)
        futures = [queue.submit(rows(value), 1, 10) for value in (5, 0, 7)]
        return await asyncio.gather(*futures)

    answers = asyncio.run(scenario())

    assert [answer[0].ravel().tolist() for answer in answers] == [[5], [], [7]]  # type: ignore[index]


def test_any_failure_of_a_run_settles_every_future(gate: threading.Event) -> None:
    """Even an error nobody thought of ends as an answer, and the next run works."""
    gate.set()
    outcomes: list[object] = []

    def run(inputs: list[Array]) -> list[Array]:
        if inputs[0][0, 0] == 13:
            raise MemoryError
        return [inputs[0]]

    async def scenario() -> None:
        queue = batcher(run, is_inline=False)
        outcomes.extend(await asyncio.gather(queue.submit(rows(13), 1, 10), return_exceptions=True))
        outcomes.append(await queue.submit(rows(1), 1, 10))
        await queue.close()

    asyncio.run(scenario())

    assert isinstance(outcomes[0], ModelFailedError)
    assert outcomes[1][0].tolist() == [[1]]  # type: ignore[index]


def test_rows_of_clients_that_left_do_not_run(gate: threading.Event) -> None:
    """A cancelled future's rows are dropped before they run, and counted."""

    async def scenario() -> tuple[Session, int, int]:
        session = Session(gate=gate)
        queue = batcher(session, is_inline=False)
        first = queue.submit(rows(0), 1, 10)
        await until(session.started.is_set)
        gone = [queue.submit(rows(100 + k), 1, 10) for k in range(3)]
        kept = queue.submit(rows(7), 1, 10)
        for future in gone:
            future.cancel()
        gate.set()
        await asyncio.gather(first, kept)
        await queue.close()
        return session, queue._meters.gone.value, queue.rows_queued

    session, n_gone, n_queued = asyncio.run(scenario())

    assert session.seen == [0, 7]
    assert (n_gone, n_queued) == (3, 0)


def test_a_deadline_is_answered_while_the_session_is_busy(gate: threading.Event) -> None:
    """Waiting rows are answered by a timer, not when the session comes round to them."""

    async def scenario() -> tuple[float, float, Session, int]:
        session = Session(gate=gate)
        queue = batcher(session, is_inline=False)
        start = time.monotonic()
        running = queue.submit(rows(0), 1, 0.1, 0.15)
        await until(session.started.is_set)
        waiting = queue.submit(rows(1), 1, 0.05)
        with pytest.raises(DeadlineError, match=r"0\.05 s"):
            await waiting
        waited = time.monotonic() - start
        with pytest.raises(DeadlineError, match=r"0\.15 s"):  # A third of it had passed.
            await running
        ran = time.monotonic() - start
        gate.set()
        await queue.submit(rows(2), 1, 10)
        await queue.close()
        return waited, ran, session, queue._meters.late.value

    waited, ran, session, n_late = asyncio.run(scenario())

    assert 0.05 <= waited < 0.25  # the promise: within 0.2 s of the deadline
    assert 0.1 <= ran < 0.3
    assert session.seen == [0, 2]  # expired rows never ran
    assert n_late == 2


def test_one_timer_serves_deadlines_in_any_order(gate: threading.Event) -> None:
    """A later request with an earlier deadline is answered first."""

    async def scenario() -> list[str]:
        session = Session(gate=gate)
        queue = batcher(session, is_inline=False)
        order: list[str] = []
        queue.submit(rows(0), 1, 10).add_done_callback(lambda _: order.append("running"))
        await until(session.started.is_set)
        for name, timeout_s in (("late", 0.12), ("early", 0.02), ("middle", 0.07)):
            future = queue.submit(rows(1), 1, timeout_s)
            future.add_done_callback(lambda done, name=name: order.append(name) or done.exception())
        await until(lambda: len(order) == 3)
        gate.set()
        await queue.close()
        return order[:3]

    assert asyncio.run(scenario()) == ["early", "middle", "late"]


def test_a_full_queue_refuses_and_says_when_to_come_back(gate: threading.Event) -> None:
    """The bound is in rows; what fits is taken, what does not gets 429 with Retry-After."""

    async def scenario() -> tuple[QueueFullError, TooLargeError]:
        session = Session(gate=gate)
        queue = batcher(session, is_inline=False, queue_rows_max=10)
        futures = [queue.submit(rows(0), 1, 10)]
        await until(session.started.is_set)
        futures.append(queue.submit(rows(*range(10)), 10, 10))
        with pytest.raises(QueueFullError) as full:
            queue.submit(rows(1), 1, 10)
        with pytest.raises(TooLargeError, match="11 rows in one request; 10 are allowed") as large:
            queue.submit(rows(*range(11)), 11, 10)
        gate.set()
        await asyncio.gather(*futures)
        await queue.submit(rows(1), 1, 10)  # room again
        await queue.close()
        return full.value, large.value

    full, large = asyncio.run(scenario())

    assert full.status == 429
    assert full.retry_after_s is not None
    assert full.retry_after_s >= 1
    assert large.status == 413


def test_what_cannot_be_batched_runs_one_by_one() -> None:
    """Requests to a model that mixes rows stay whole and alone, however large."""

    async def scenario() -> list[int]:
        session = Session()
        queue = batcher(session, can_batch=False, rows_max=4)
        sizes = (1, 6, 2)
        await asyncio.gather(*(queue.submit(rows(*range(n)), n, 10) for n in sizes))
        return session.batches

    assert asyncio.run(scenario()) == [1, 6, 2]


def test_rows_of_different_shape_do_not_share_a_batch() -> None:
    """With a free axis behind the first, only equal row shapes are stacked; order is kept."""

    async def scenario() -> list[int]:
        session = Session()
        queue = batcher(session, has_free_axes=True)
        inputs = [[np.zeros((1, width), np.float32)] for width in (3, 3, 5, 3)]
        await asyncio.gather(*(queue.submit(given, 1, 10) for given in inputs))
        return session.batches

    assert asyncio.run(scenario()) == [2, 1, 1]


@pytest.mark.alone
def test_waiting_for_company_is_bounded_and_optional() -> None:
    """With wait_s_max a first row waits for others, but no longer; a full batch leaves at once."""

    async def scenario() -> tuple[list[int], float]:
        session = Session()
        queue = batcher(session, wait_s_max=0.05, rows_max=4)
        start = time.monotonic()
        first = queue.submit(rows(0), 1, 10)
        await asyncio.sleep(0.01)
        await asyncio.gather(first, queue.submit(rows(1), 1, 10))
        waited = time.monotonic() - start
        start = time.monotonic()
        await asyncio.gather(*(queue.submit(rows(k), 1, 10) for k in range(4)))
        assert time.monotonic() - start < 0.05
        return session.batches, waited

    batches, waited = asyncio.run(scenario())

    assert batches == [2, 4]
    assert waited >= 0.05


def test_a_model_that_turns_slow_leaves_the_loop() -> None:
    """Two inline runs that burn ten times what is allowed move the model to its own thread."""
    threads: list[int] = []

    def burn(inputs: list[Array]) -> list[Array]:
        threads.append(threading.get_ident())
        end = time.thread_time() + 0.003
        while time.thread_time() < end:
            pass
        return [inputs[0]]

    async def scenario() -> bool:
        queue = batcher(burn, inline_s_max=0.0001)
        for k in range(6):
            await queue.submit(rows(k), 1, 10)
        await queue.close()
        return queue.is_inline

    assert asyncio.run(scenario()) is False
    assert threads[0] == threading.get_ident()
    assert threads[-1] != threading.get_ident()


def test_closing_finishes_what_waits_and_takes_nothing_more(gate: threading.Event) -> None:
    """A drain loses no accepted request."""

    async def scenario() -> list[list[Array]]:
        session = Session(gate=gate)
        queue = batcher(session, is_inline=False)
        futures = [queue.submit(rows(k), 1, 10) for k in range(3)]
        await until(session.started.is_set)
        futures.append(queue.submit(rows(3), 1, 10))
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)
        with pytest.raises(NotReadyError):
            queue.submit(rows(9), 1, 10)
        gate.set()
        await closing
        return await asyncio.gather(*futures)

    answers = asyncio.run(scenario())

    assert [float(answer[0][0, 0]) for answer in answers] == [1, 2, 3, 4]


def test_every_run_that_succeeds_is_shown_once_with_its_rows_stacked() -> None:
    """What the monitors see: whole runs, split and joined as they ran; failed requests never."""
    shown: list[tuple[list[float], list[float], int]] = []

    def observe(inputs: list[Array], outputs: list[Array], n: int) -> None:
        shown.append((inputs[0].ravel().tolist(), outputs[0].ravel().tolist(), n))

    async def scenario() -> None:
        queue = batcher(Session(), rows_max=4, observe=observe)
        futures = [queue.submit(rows(*values), len(values), 10) for values in ((1, 2), (-5,), (3,))]
        futures.append(queue.submit(rows(*range(10, 16)), 6, 10))
        await asyncio.gather(*futures, return_exceptions=True)

    asyncio.run(scenario())

    assert shown == [
        ([1, 2], [2, 3], 2),
        ([3], [4], 1),
        ([10, 11, 12, 13], [11, 12, 13, 14], 4),
        ([14, 15], [15, 16], 2),
    ]


# -- runs that do not come back


class Endless:
    """Runs until it is told to stop; deaf, it does not even then, but only when it is let go."""

    def __init__(self, *, is_deaf: bool = False) -> None:
        self.is_deaf = is_deaf
        self.let_go = threading.Event()
        self.told = threading.Event()
        self.runs: list[str] = []

    def __call__(self, inputs: list[Array]) -> list[Array]:
        self.runs.append(threading.current_thread().name)
        self.told.clear()
        if inputs[0][0, 0] >= 0:
            return [inputs[0] + 1]
        over = self.let_go if self.is_deaf else self.told
        assert over.wait(20)
        raise ModelFailedError("ended")

    def stop(self) -> None:
        self.told.set()


def test_a_run_that_nobody_waits_for_is_ended_and_the_next_one_runs() -> None:
    """When the deadlines of all its requests are over; not before, and its parts run no more."""

    async def scenario() -> tuple[list[object], float, list[Array]]:
        model = Endless()
        queue = batcher(model, is_inline=False, stop=model.stop)
        start = time.monotonic()
        late = await asyncio.gather(
            queue.submit(rows(-1), 1, 0.05), queue.submit(rows(2), 1, 0.3), return_exceptions=True
        )
        took_s = time.monotonic() - start
        after = await queue.submit(rows(7), 1, 10)
        await queue.close()
        assert len(model.runs) == 2
        return list(late), took_s, after

    late, took_s, after = asyncio.run(scenario())

    assert [type(one) for one in late] == [DeadlineError, DeadlineError]
    assert took_s >= 0.3
    assert after[0].tolist() == [[8.0]]


def test_a_run_that_holds_the_loop_is_ended_and_runs_again_on_a_thread() -> None:
    """The requests in it are still answered: here in time to be late, with the loop free."""

    async def scenario() -> tuple[list[str], object, bool]:
        model, watchdog = Endless(), Watchdog(held_s_max=0.1)
        queue = batcher(model, stop=model.stop, watchdog=watchdog)
        answer = await asyncio.gather(queue.submit(rows(-1), 1, 0.9), return_exceptions=True)
        await queue.close()
        watchdog.stop()
        return model.runs, answer[0], queue.is_inline

    runs, answer, is_inline = asyncio.run(scenario())

    assert runs == [threading.main_thread().name, "session m 1"]
    assert isinstance(answer, DeadlineError)
    assert not is_inline


@pytest.mark.parametrize(
    ("timeout_s", "leaves", "told"), [(0.05, False, 0), (0.3, False, 1), (0.3, True, 0)]
)
def test_a_long_run_that_had_to_be_ended_is_told_and_no_short_one(
    monkeypatch: pytest.MonkeyPatch, timeout_s: float, leaves: bool, told: int
) -> None:
    """Not when clients gave it little time, and not when they hung up: that says nothing of it."""
    monkeypatch.setattr("gateway.batcher.HELD_S_MAX", 0.2)
    ended: list[int] = []

    async def scenario() -> None:
        model = Endless()
        queue = batcher(model, is_inline=False, stop=model.stop, on_ended=lambda: ended.append(1))
        future = queue.submit(rows(-1), 1, timeout_s)
        if leaves:
            await until(lambda: bool(model.runs))
            future.cancel()
        await asyncio.gather(future, return_exceptions=True)
        await until(lambda: not queue.is_busy)
        await queue.close()

    asyncio.run(scenario())

    assert len(ended) == told


def test_a_run_that_held_the_loop_is_told_at_once() -> None:
    """By the watchdog's own thread, before anything else can go wrong."""
    threads: list[str] = []

    async def scenario() -> None:
        model, watchdog = Endless(), Watchdog(held_s_max=0.1)
        queue = batcher(
            model,
            stop=model.stop,
            watchdog=watchdog,
            on_ended=lambda: threads.append(threading.current_thread().name),
        )
        await asyncio.gather(queue.submit(rows(-1), 1, 0.5), return_exceptions=True)
        await queue.close()
        watchdog.stop()

    asyncio.run(scenario())

    assert threads == ["watchdog"]


def test_other_limits_hold_from_the_next_request_on(gate: threading.Event) -> None:
    """Rows of a batch and of the queue; batches of one row are none, and nothing is cut."""

    async def scenario() -> list[int]:
        session = Session(gate=gate)
        queue = batcher(session, rows_max=2, queue_rows_max=2, is_inline=False)
        first = queue.submit(rows(0, 0), 2, 10)
        await until(session.started.is_set)
        queue.submit(rows(1, 1), 2, 10).add_done_callback(lambda done: done.result())
        with pytest.raises(QueueFullError):
            queue.submit(rows(1), 1, 10)
        queue.set_limits(rows_max=8, wait_s_max=0, queue_rows_max=8)
        last = queue.submit(rows(*range(5)), 5, 10)
        gate.set()
        await asyncio.gather(first, last)
        queue.set_limits(rows_max=1, wait_s_max=0, queue_rows_max=8)
        await asyncio.gather(*(queue.submit(rows(*range(n)), n, 10) for n in (3, 1)))
        await queue.close()
        return session.batches

    assert asyncio.run(scenario()) == [2, 7, 3, 1]


@pytest.mark.parametrize(("rows_max", "is_inline"), [(16, True), (17, False)])
def test_larger_batches_than_the_loop_can_spare_go_to_a_thread(
    rows_max: int, is_inline: bool
) -> None:
    """As far as the warm-up's measure tells."""

    async def scenario() -> bool:
        queue = batcher(Session(), inline_rows_max=16)
        queue.set_limits(rows_max=rows_max, wait_s_max=0, queue_rows_max=100)
        await queue.submit(rows(1), 1, 10)
        await queue.close()
        return queue.is_inline

    assert asyncio.run(scenario()) is is_inline


def test_a_run_that_does_not_end_is_told_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever waits behind it is refused at once, so that another process may answer."""
    monkeypatch.setattr("gateway.batcher._STUCK_S", 0.1)
    monkeypatch.setattr("gateway.batcher._ASK_S", 0.02)
    stuck = threading.Event()

    async def scenario() -> list[object]:
        model = Endless(is_deaf=True)
        queue = batcher(model, is_inline=False, stop=model.stop, on_stuck=stuck.set)
        late = queue.submit(rows(-1), 1, 0.05)
        await until(lambda: bool(model.runs))
        behind = queue.submit(rows(1), 1, 10)
        found = await asyncio.gather(late, behind, return_exceptions=True)
        with pytest.raises(NotReadyError):
            queue.submit(rows(1), 1, 10)
        await queue.close()
        model.let_go.set()
        return list(found)

    found = asyncio.run(scenario())

    assert [type(one) for one in found] == [DeadlineError, NotReadyError]
    assert stuck.is_set()
