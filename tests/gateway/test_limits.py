"""What one model, and one caller of it, may take of a worker."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import ServerConfig
from gateway.errors import ModelBusyError, RateLimitedError, TooLargeError
from gateway.limits import Gate, Rates, batch_limits, refuse_rows
from registry.routes import Batch, Limits, Route


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bucket:
    """A token bucket as it is drawn in books: filled as time goes by, emptied one by one."""

    def __init__(self, rate_per_s: float, size: float) -> None:
        self.rate_per_s, self.size, self.tokens = rate_per_s, size, size

    def wait(self, seconds: float) -> None:
        self.tokens = min(self.size, self.tokens + seconds * self.rate_per_s)

    def take(self) -> bool:
        if self.tokens < 1 - 1e-6:
            return False
        self.tokens -= 1
        return True


def test_as_many_requests_are_let_in_as_may_be_under_way() -> None:
    """One more is refused, until one has left; the number of another revision counts at once."""
    gate = Gate("m")
    for _ in range(2):
        gate.enter(Limits(inflight_max=2))
    with pytest.raises(ModelBusyError):
        gate.enter(Limits(inflight_max=2))
    gate.leave()
    gate.enter(Limits(inflight_max=2))
    gate.enter(Limits())
    assert gate.inflight == 3


@given(
    st.lists(st.floats(0, 2), max_size=80),
    st.floats(0.1, 50),
    st.floats(1, 20),
)
def test_a_rate_is_a_token_bucket(waits: list[float], rate_per_s: float, size: float) -> None:
    """Against another one, request by request; and the wait that is told is the true one."""
    clock = Clock()
    rates, bucket = Rates(clock), Bucket(rate_per_s, size)
    for wait_s in waits:
        clock.now += wait_s
        bucket.wait(wait_s)
        told_s = rates.take("key:a", rate_per_s, size)
        if told_s == 0:
            assert bucket.take()
            continue
        assert not bucket.take()
        assert told_s == pytest.approx((1 - bucket.tokens) / rate_per_s, abs=1e-6)
        assert rates.take("key:b", rate_per_s, 1000) == 0  # Others have buckets of their own.


def test_workers_together_never_exceed_the_rate_whoever_they_serve() -> None:
    """Each has its part of rate and size; asked all the time they let in just the rate."""
    clock = Clock()
    gates = [Gate("m", 4, clock) for _ in range(4)]
    limits = Limits(rate_per_s_max=20, burst_max=8)
    n = 0
    for _ in range(1000):  # ten seconds
        for gate in gates:
            try:
                gate.enter(limits, "key:a")
                gate.leave()
                n += 1
            except RateLimitedError:
                pass
        clock.now += 0.01

    assert 8 + 20 * 10 - 4 <= n <= 8 + 20 * 10


@pytest.mark.parametrize(
    ("limits", "workers", "at_once", "wait_s"),
    [
        (Limits(rate_per_s_max=5), 1, 5, 0.2),  # By default one second's worth,
        (Limits(rate_per_s_max=0.25), 1, 1, 4.0),  # and one at least.
        (Limits(rate_per_s_max=10, burst_max=3), 1, 3, 0.1),
        (Limits(rate_per_s_max=10, burst_max=4), 2, 2, 0.2),
        (Limits(rate_per_s_max=1, burst_max=1), 4, 1, 4.0),
    ],
)
def test_who_comes_too_soon_is_told_when_to_come_back(
    limits: Limits, workers: int, at_once: int, wait_s: float
) -> None:
    """In whole seconds for Retry-After, rounded up: after them there is room, and not before."""
    clock = Clock()
    gate = Gate("m", workers, clock)
    for _ in range(at_once):
        gate.enter(limits, "key:0a1b2c3d")
    with pytest.raises(RateLimitedError, match=r"key 0a1b2c3d may make") as refused:
        gate.enter(limits, "key:0a1b2c3d")
    assert f"the next one in {wait_s:.3g} s" in str(refused.value)
    assert refused.value.retry_after_s == -(-wait_s // 1)
    assert gate.inflight == at_once  # Who is refused takes nothing,
    for _ in range(at_once):
        gate.enter(limits)
    with pytest.raises(RateLimitedError, match="all who show no key, together,"):
        gate.enter(limits)

    clock.now += wait_s - 0.001
    with pytest.raises(RateLimitedError):
        gate.enter(limits, "key:0a1b2c3d")
    clock.now += 0.001
    gate.enter(limits, "key:0a1b2c3d")


def test_who_is_refused_for_want_of_room_pays_nothing() -> None:
    """The rate counts what was let in."""
    gate = Gate("m", 1, Clock())
    limits = Limits(inflight_max=1, rate_per_s_max=2)
    gate.enter(limits)
    for _ in range(9):
        with pytest.raises(ModelBusyError):
            gate.enter(limits)
    gate.leave()
    gate.enter(limits)


def test_callers_who_could_start_afresh_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of buckets is bounded; whoever still owes time is remembered."""
    monkeypatch.setattr("gateway.limits._CALLERS_MAX", 10)
    clock = Clock()
    rates = Rates(clock)
    for k in range(40):
        rates.take(f"key:{k}", 1, 1)
        clock.now += 0.5
    assert len(rates._full_at) <= 12
    assert rates.take("key:39", 1, 1) > 0


def test_rows_beyond_the_route_are_refused_with_both_numbers() -> None:
    """Without a number in the route there is none."""
    refuse_rows("m", 8, 8)
    refuse_rows("m", 10_000, None)
    with pytest.raises(TooLargeError, match=r"9 rows.*allows 8"):
        refuse_rows("m", 9, 8)


def test_a_route_is_over_the_settings_part_by_part() -> None:
    """0 is a number too: no waiting, whatever the setting says."""
    config = ServerConfig()
    usual = batch_limits(config, None)
    assert batch_limits(config, Route(batch=Batch(rows_max=1))) == {**usual, "rows_max": 1}
    limits = Route(limits=Limits(queue_rows_max=7), batch=Batch(wait_s_max=0.0))
    assert batch_limits(config, limits) == {**usual, "queue_rows_max": 7, "wait_s_max": 0.0}
