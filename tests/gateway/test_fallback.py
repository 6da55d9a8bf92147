"""One hop within one time, and the breaker: against a second count, and a clock moved by hand."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import (
    BadRequestError,
    ClientGoneError,
    DeadlineError,
    GatewayError,
    ModelFailedError,
    QueueFullError,
    UnsupportedError,
)
from gateway.fallback import LEFT_S_MIN, Breaker, Breakers, Budget
from gateway.router import Choice, Decision, Routing
from gateway.telemetry import BREAKER_OPENED, Telemetry
from registry import routes
from registry.revisions import ModelState

RULES = routes.Breaker(requests_min=4, error_share=50, window_s=10, open_s=5, probes=2)
DOCUMENT = {
    "fallback": {"on": ["error", "timeout", "breaker"], "to": ["champion", "previous"]},
    "breaker": {"requests_min": 4, "probes": 2},
}


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ask(breaker: Breaker, *, fails: bool | None, may_open: Callable[[], bool] = lambda: True):
    """One request, from start to end; whether the breaker opens by it."""
    is_probe = breaker.enter(RULES)
    return breaker.leave(RULES, is_probe=is_probe, is_failure=fails, may_open=may_open)


@given(
    st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=60),
    st.integers(1, 8),
    st.integers(1, 100),
)
@settings(max_examples=100, deadline=None)
def test_it_opens_at_the_share_of_the_window_and_not_before(
    asked: list[tuple[float, bool]], requests_min: int, share: int
) -> None:
    """Against a list of everything that happened: the first failure that makes both bounds."""
    rules = routes.Breaker(requests_min=requests_min, error_share=share, window_s=10)
    clock = Clock()
    breaker, seen = Breaker(clock), []
    for wait_s, fails in asked:
        clock.now += wait_s
        seen.append((int(clock.now), fails))  # Slices of a tenth of the window: a second.
        recent = [failed for at, failed in seen if at > int(clock.now) - 10]
        expected = (
            fails and len(recent) >= requests_min and 100 * sum(recent) >= share * len(recent)
        )
        assert breaker.enter(rules) is False
        assert breaker.leave(rules, is_probe=False, is_failure=fails) is expected
        if expected:
            assert breaker.state == "open"
            return


def test_open_it_waits_then_lets_a_few_through_and_closes_when_all_of_them_succeed() -> None:
    """What began before says nothing; a probe that fails opens it again, for as long again."""
    clock = Clock()
    breaker = Breaker(clock)
    before = breaker.enter(RULES)
    opened = [ask(breaker, fails=True) for _ in range(4)]
    assert opened == [False, False, False, True]
    clock.now += 4.9
    assert not breaker.lets_in(RULES)
    assert not breaker.leave(RULES, is_probe=before, is_failure=False)
    assert breaker.state == "open"

    clock.now += 0.2
    first, second = breaker.enter(RULES), breaker.enter(RULES)
    assert (first, second) == (True, True)
    assert breaker.state == "half_open"
    assert not breaker.lets_in(RULES)  # As many as there are probes, no more.
    assert not breaker.leave(RULES, is_probe=True, is_failure=False)
    assert breaker.leave(RULES, is_probe=True, is_failure=True)  # Opens again.
    assert not breaker.lets_in(RULES)

    clock.now += 5
    assert not ask(breaker, fails=None)  # Its client left: the place is free again.
    assert not ask(breaker, fails=False)
    assert breaker.state == "half_open"
    assert not ask(breaker, fails=False)
    assert breaker.state == "closed"
    # And what was before is forgotten.
    assert [ask(breaker, fails=True) for _ in range(4)] == [False, False, False, True]


def test_failures_of_an_earlier_window_are_forgotten() -> None:
    """One failure every four seconds never makes four in ten."""
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(50):
        assert not ask(breaker, fails=True)
        clock.now += 4
    assert breaker.state == "closed"


# -- whom to ask


class Rig:
    """A route of versions 7 (champion), 6 (previous) and 9, all open; a clock moved by hand."""

    def __init__(self, **document: Any) -> None:
        self.clock, self.telemetry = Clock(), Telemetry()
        self.opened: list[tuple[str, int]] = []
        self.breakers = Breakers(
            self.telemetry, lambda model, version: self.opened.append((model, version)), self.clock
        )
        state = ModelState(
            follow=False,
            aliases={"champion": 7, "challenger": 9, "previous": 6},
            route=routes.parse_one("m", DOCUMENT | document),
        )
        self.routing = Routing("m", state, 42, self.telemetry)
        self.open: dict[int, Any] = {n: SimpleNamespace(model="m", version=n) for n in (6, 7, 9)}

    def decision(self, version: int, traffic: str = "primary") -> Decision:
        return Decision(Choice.of(str(version), version, "SPLIT", 42, traffic=traffic))

    def diverted(self, version: int, traffic: str = "primary") -> str | None:
        """Who is asked instead, in the words of the decision."""
        decision = self.decision(version, traffic)
        hop = self.breakers.diverted(self.routing, self.open[version], decision, lambda: self.open)
        return hop and hop.decision.header.decode()

    def ask(
        self,
        version: int,
        error: BaseException | None = None,
        traffic: str = "primary",
        total_s: float = 1.0,
    ) -> None:
        """A request to a version that ends so."""
        budget = Budget(0, 1.0, can_hop=False)
        budget.take(total_s)
        around = self.breakers.around(
            self.routing, self.open[version], self.decision(version, traffic), budget,
            lambda: self.open,
        )  # fmt: skip
        with pytest.raises(type(error)) if error else nullcontext(), around:
            if error:
                raise error


def failing(rig: Rig, version: int, n: int = 4, error: BaseException | None = None) -> None:
    for _ in range(n):
        rig.ask(version, error or ModelFailedError("no"))


def test_an_open_breaker_is_said_and_the_first_other_that_can_answer_is_asked() -> None:
    """In the decision, in a metric, to whoever asked to be told; calls by number are let alone."""
    rig = Rig()
    failing(rig, 9, 3)
    assert rig.diverted(9) is None
    failing(rig, 9, 1)

    assert rig.diverted(9) == "rev=42; variant=champion; version=7; reason=BREAKER(9); p=1"
    assert rig.diverted(9, "pinned") is None
    assert rig.opened == [("m", 9)]
    assert rig.telemetry.counter(BREAKER_OPENED, "m", "9").value == 1
    assert rig.breakers.samples(lambda _: rig.routing.route) == [(("m", "9"), 1.0)]
    assert rig.breakers.samples(lambda _: routes.Route()) == []
    del rig.open[7]
    assert "version=6" in (rig.diverted(9) or "")
    del rig.open[6]
    assert rig.diverted(9) is None  # Nobody else is there: it is asked all the same.


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (ModelFailedError("it failed"), True),
        (DeadlineError("m", 1.0), True),
        (GatewayError("a fault"), True),
        (BadRequestError("the client's"), False),
        (UnsupportedError("the client's too"), False),
        (QueueFullError("m", 9, 10, 1), False),
        (ClientGoneError("gone"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_counts_as_a_failure(error: BaseException, counts: bool) -> None:
    """Errors of the model and time that is over; not what clients did, nor what was shed."""
    rig = Rig()
    failing(rig, 9, 10, error)
    assert (rig.breakers.state("m", 9) == "open") is counts


def test_time_that_the_client_cut_short_says_nothing_of_the_variant() -> None:
    """Else anybody could open a breaker by asking for a millisecond; so could calls by number."""
    rig = Rig()
    for _ in range(10):
        rig.ask(9, DeadlineError("m", 0.001), total_s=0.001)
        rig.ask(9, ModelFailedError("no"), traffic="pinned")
    assert rig.breakers.state("m", 9) == "closed"


def test_without_a_breaker_nothing_is_counted() -> None:
    """A route without one costs nothing, and an old count does not come back."""
    rig = Rig(breaker=None, fallback={"to": ["previous"]})
    failing(rig, 9, 10)
    assert rig.breakers.samples(lambda _: rig.routing.route) == []
    assert rig.diverted(9) is None


@given(st.lists(st.tuples(st.sampled_from([6, 7, 9]), st.booleans(), st.floats(0, 4)), max_size=80))
@settings(max_examples=100, deadline=None)
def test_it_never_opens_on_the_last_that_can_answer(
    asked: list[tuple[int, bool, float]],
) -> None:
    """Whoever is assigned, in any order of failures: somebody closed is asked, or it is itself."""
    rig = Rig(breaker={"requests_min": 1, "error_share": 1, "open_s": 3, "probes": 1})
    for version, fails, wait_s in asked:
        rig.clock.now += wait_s
        rig.ask(version, ModelFailedError("no") if fails else None)
        states = {n: rig.breakers.state("m", n) for n in rig.open}
        assert states[6] == "closed" or states[7] == "closed", states
        for assigned in rig.open:
            said = rig.diverted(assigned)
            if states[assigned] == "closed":
                assert said is None


@pytest.mark.parametrize(
    ("on", "error", "is_asked"),
    [
        (["error"], ModelFailedError("no"), True),
        (["error"], DeadlineError("m", 1), False),
        (["timeout"], DeadlineError("m", 1), True),
        (["timeout"], ModelFailedError("no"), False),
        (["error", "timeout"], BadRequestError("the client's"), False),
        (["error", "timeout"], QueueFullError("m", 9, 10, 1), False),
    ],
)
def test_a_request_hops_for_what_its_route_says_and_for_nothing_of_its_clients(
    on: list[str], error: GatewayError, is_asked: bool
) -> None:
    """And never to the version that has just failed."""
    rig = Rig(fallback={"on": on, "to": [9, "previous"]}, breaker=None)
    hop = rig.breakers.hop(rig.routing, rig.open[9], error, lambda: rig.open)
    assert (hop is not None) is is_asked
    if hop is not None:
        assert hop.decision.choice.reason == "FALLBACK(9)"
        assert hop.variant.version == 6


def test_one_time_for_both_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds for the first if another may follow; what is left for that one, and no more."""
    clock = Clock()
    monkeypatch.setattr("gateway.fallback.time.perf_counter", clock)
    alone, both, hasty = (Budget(clock.now, 3.0, can_hop=can) for can in (False, True, True))
    assert alone.take(3.0) == pytest.approx(3.0)
    assert both.take(3.0) == pytest.approx(2.0)
    assert hasty.take(0.3) == pytest.approx(0.2)  # The client allows less.
    assert (both.is_shortened, hasty.is_shortened) == (False, True)
    clock.now += 0.2
    assert hasty.left_s == pytest.approx(0.1)
    assert hasty.take(0.3) == pytest.approx(0.1)
    # What an error may say was allowed does not shrink by what has passed.
    assert [b.given_s for b in (alone, both, hasty)] == pytest.approx([3.0, 2.0, 0.3])
    clock.now += 1.8
    assert both.take(3.0) == pytest.approx(1.0)
    clock.now += 5
    assert both.take(3.0) == LEFT_S_MIN
