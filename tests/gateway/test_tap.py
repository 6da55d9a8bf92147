"""The tap never waits, never holds more than it may, and counts what it drops."""

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gateway.counters import Counter, Region
from gateway.tap import BLOCK_ROWS, Observation, Tap


def observation(rows: int, n_bytes: int = 8) -> Observation:
    array = np.zeros((rows, 1), np.float32)
    return Observation("m", 1, [array], [array], rows, n_bytes)


def dropped() -> Counter:
    return Region().counter()


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=60))
def test_rows_are_taken_or_counted_as_dropped(steps: list[tuple[int, bool]]) -> None:
    """Offered = taken + dropped, and never more than rows_max wait."""
    tap, lost, offered, taken = Tap(100, 10**9), dropped(), 0, 0
    for rows, takes in steps:
        tap.offer(observation(rows), lost)
        offered += rows
        if takes:
            taken += sum(seen.rows for seen in tap.take(30))
        waiting = offered - lost.value - taken
        assert 0 <= waiting <= 100
    while more := tap.take(10):
        taken += sum(seen.rows for seen in more)
    assert offered == taken + lost.value


def test_bytes_are_bounded_too() -> None:
    """A few huge rows fill the tap as well as many small ones."""
    tap, lost = Tap(10**6, 1000), dropped()
    for _ in range(3):
        tap.offer(observation(2, 400), lost)
    assert (len(tap.take(10)), lost.value) == (2, 2)
    tap.offer(observation(2, 400), lost)
    assert len(tap.take(10)) == 1


def test_the_observer_is_called_when_a_block_is_there() -> None:
    """Below a block's rows nobody is woken; from then on once, until it rests again."""
    tap, lost = Tap(10**6, 10**9), dropped()
    tap.offer(observation(BLOCK_ROWS - 1), lost)
    assert not tap.called.is_set()
    tap.offer(observation(1), lost)
    assert tap.called.is_set()
    tap.rest(0)
    assert not tap.called.is_set()


def test_two_threads_lose_nothing() -> None:
    """One offers, one takes, at full speed: every row is taken or counted, in order."""
    tap, lost, n = Tap(500, 10**9), dropped(), 20_000
    seen: list[int] = []
    is_over = threading.Event()

    def take() -> None:
        while True:
            ends = is_over.is_set()
            batch = tap.take(64)
            seen.extend(int(item.n_bytes) for item in batch)
            if ends and not batch:
                return

    taker = threading.Thread(target=take)
    taker.start()
    for k in range(n):
        tap.offer(observation(1, k % 1000), lost)
    is_over.set()
    taker.join(30)

    assert not taker.is_alive()
    assert len(seen) + lost.value == n
