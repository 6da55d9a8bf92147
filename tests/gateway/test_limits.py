"""What one model, and one caller of it, may take of a worker."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
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
    gate = Gate("m", Rates())
    for _ in range(2):
        gate.enter(Limits(inflight_max=2))
    with pytest.raises(ModelBusyError):
        gate.enter(Limits(inflight_max=2))
    gate.leave()
    gate.enter(Limits(inflight_max=2))
    gate.enter(Limits())
    assert gate.inflight == 3


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(0, 2)), max_size=80),
    st.floats(0.1, 50),
    st.floats(1, 20),
)
@settings(deadline=None, max_examples=50)
def test_a_rate_is_one_token_bucket_for_all_workers(
    asked: list[tuple[float, int]], rate_per_s: float, size: float
) -> None:
    """Against another one, request by request, whoever is asked; the wait is the true one."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        workers = [Rates(Path(directory, "rates"), clock) for _ in range(3)]
        bucket = Bucket(rate_per_s, size)
        for wait_s, worker in asked:
            clock.now += wait_s
            bucket.wait(wait_s)
            told_s = workers[worker].take("m", "key:a", rate_per_s, size)
            # Others have buckets of their own.
            assert workers[worker].take("m", "key:b", rate_per_s, 1000) == 0
            assert workers[worker].take("n", "key:a", rate_per_s, 1000) == 0
            if told_s == 0:
                assert bucket.take()
                continue
            assert not bucket.take()
            assert told_s == pytest.approx((1 - bucket.tokens) / rate_per_s, abs=1e-6)


def test_workers_that_are_asked_all_the_time_let_in_just_the_rate(tmp_path: Path) -> None:
    """Processes of their own, by the machine's own clock, with one file: none goes beyond it."""
    code = (
        "import sys, time; from pathlib import Path; from gateway.limits import Rates\n"
        "rates, n = Rates(Path(sys.argv[1])), 0\n"
        "print(0, flush=True); sys.stdin.readline(); end = time.monotonic() + 1.0\n"
        "while (now := time.monotonic()) < end: n += rates.take('m', 'key:a', 200, 20) == 0\n"
        "print(n)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run" / "rates")]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "0\n"
    start = time.monotonic()
    counts = [int(worker.communicate("\n")[0]) for worker in workers]
    took_s = time.monotonic() - start
    # Two that take in the same microsecond may both get a token: some in a million do.
    assert 200 <= sum(counts) <= (20 + 200 * took_s) * 1.05, counts


def test_what_another_boot_or_another_route_has_left_keeps_nobody_out_for_long(
    tmp_path: Path,
) -> None:
    """No bucket is emptier than empty, whatever its cell says."""
    clock = Clock()
    before = Rates(tmp_path / "rates", clock)
    for _ in range(1000):
        assert before.take("m", "key:a", 1, 1000) == 0
    clock.now = 5.0  # The machine has started again: its clock begins anew.
    rates = Rates(tmp_path / "rates", clock)
    assert rates.take("m", "key:a", 2, 4) == pytest.approx(0.5)
    clock.now += 0.5
    assert rates.take("m", "key:a", 2, 4) == 0


def test_where_no_file_can_be_each_worker_counts_for_itself(tmp_path: Path) -> None:
    """Fail static: a disk that is full, or read-only, refuses nobody."""
    (tmp_path / "file").write_text("")
    rates = Rates(tmp_path / "file" / "rates", Clock())
    assert [rates.take("m", "a", 1, 2) for _ in range(3)] == [0, 0, 1.0]


def test_more_callers_than_places_share_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused for want of a place."""
    monkeypatch.setattr("gateway.limits._PLACES", 8)
    rates = Rates(clock=Clock())
    assert all(rates.take("m", f"key:{k}", 1, 100) == 0 for k in range(40))


@pytest.mark.parametrize(
    ("limits", "at_once", "wait_s"),
    [
        (Limits(rate_per_s_max=5), 5, 0.2),  # By default one second's worth,
        (Limits(rate_per_s_max=0.25), 1, 4.0),  # and one at least.
        (Limits(rate_per_s_max=10, burst_max=3), 3, 0.1),
    ],
)
def test_who_comes_too_soon_is_told_when_to_come_back(
    limits: Limits, at_once: int, wait_s: float
) -> None:
    """In whole seconds for Retry-After, rounded up: after them there is room, and not before."""
    clock = Clock()
    gate = Gate("m", Rates(clock=clock))
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
    gate = Gate("m", Rates(clock=Clock()))
    limits = Limits(inflight_max=1, rate_per_s_max=2)
    gate.enter(limits)
    for _ in range(9):
        with pytest.raises(ModelBusyError):
            gate.enter(limits)
    gate.leave()
    gate.enter(limits)


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
