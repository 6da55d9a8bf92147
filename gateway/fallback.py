"""Who answers when a variant cannot: one hop within one time, and the breaker of each variant.

Counted on the loop, per variant and per worker: another worker finds out for itself. A breaker that
is open keeps requests from a variant that fails, as long as somebody else can answer them. What it
refused still counts against the variant that was assigned.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

from gateway.errors import BreakerOpenError, DeadlineError, GatewayError, UnsupportedError
from gateway.router import Choice, Decision, Routing, Variant
from gateway.telemetry import BREAKER_OPENED, Sample, Telemetry, event
from registry import routes

_SLICES = 10
"""The window moves on by so many parts of itself."""
_FIRST_SHARE = 2 / 3
"""Of a request's time, for the variant that should answer; the rest is for one hop."""
_MOST = 0.9
LEFT_S_MIN = 0.001
"""With less time left nobody else is asked."""
_OURS = 500
"""Statuses from here on are not the client's doing."""

_UNWATCHED = nullcontext()

State = Literal["closed", "open", "half_open"]
Variants = Callable[[], Mapping[int, Variant]]
"""The open versions of a model at this moment; nobody holds them meanwhile."""


class Budget:
    """One time for one request, whoever answers it.

    Parameters
    ----------
    start : `time.perf_counter()` when the request was first seen
    total_s : what server and route allow
    can_hop : something must be left for somebody else when the time of the first is over
    """

    __slots__ = ("_allowed_s", "_share", "_start", "given_s", "total_s")

    def __init__(self, start: float, total_s: float, *, can_hop: bool) -> None:
        self._start = start
        self._allowed_s = total_s
        self._share = _FIRST_SHARE if can_hop else 1.0
        self.given_s = self.total_s = total_s

    @property
    def is_shortened(self) -> bool:
        """Whether the client allowed a good deal less time than the route gives."""
        return self.total_s < _MOST * self._allowed_s

    @property
    def left_s(self) -> float:
        """Until the client must have its answer."""
        return self.total_s - (time.perf_counter() - self._start)

    def take(self, total_s: float) -> float:
        """Seconds for whoever is asked next, now that it is known what the client allows."""
        self.total_s = total_s
        self.given_s, self._share = total_s * self._share, 1.0
        return max(self.left_s - (total_s - self.given_s), LEFT_S_MIN)


class Breaker:
    """Whether one variant is asked, by one worker.

    Closed, it counts; open, it waits; half open, it lets a few requests through to see. Its rules
    are given at each step: another revision may have others.
    """

    __slots__ = ("_clock", "_opened_at", "_passed", "_probing", "_slice_s", "_slices", "state")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.state: State = "closed"
        self._opened_at = 0.0
        self._probing = 0
        self._passed = 0
        self._slice_s = 0.0
        self._slices: list[list[int]] = []

    def lets_in(self, rules: routes.Breaker) -> bool:
        """Whether a request may go to the variant now; changes nothing."""
        if self.state == "open":
            return self._clock() - self._opened_at >= rules.open_s
        return self.state == "closed" or self._probing + self._passed < rules.probes

    def enter(self, rules: routes.Breaker) -> bool:
        """A request goes to the variant; whether it is a probe. It must leave."""
        if self.state == "closed" or not self.lets_in(rules):
            return False
        if self.state == "open":
            self.state, self._probing, self._passed = "half_open", 0, 0
        self._probing += 1
        return True

    def leave(
        self,
        rules: routes.Breaker,
        *,
        is_probe: bool,
        is_failure: bool | None,
        may_open: Callable[[], bool] = lambda: True,
    ) -> bool:
        """A request has ended; whether the breaker opens by it.

        Parameters
        ----------
        is_failure : None: it ended by its client's doing, or was never run, and says nothing
        may_open : asked when it would open: whether somebody else can answer
        """
        if is_probe:
            return self._probed(rules, is_failure=is_failure)
        if self.state != "closed" or is_failure is None:
            return False  # It began before the breaker opened.
        n, failed = self._counted(rules.window_s, is_failure=is_failure)
        is_over = n >= rules.requests_min and failed * 100 >= n * rules.error_share
        if is_failure and is_over and may_open():
            self._open()
            return True
        return False

    def _probed(self, rules: routes.Breaker, *, is_failure: bool | None) -> bool:
        if self.state != "half_open":
            return False  # Another probe has failed meanwhile.
        self._probing -= 1
        if is_failure:
            self._open()
            return True
        if is_failure is False:
            self._passed += 1
            if self._passed >= rules.probes:
                self.state = "closed"
        return False

    def _open(self) -> None:
        self.state, self._opened_at = "open", self._clock()
        self._slices.clear()

    def _counted(self, window_s: float, *, is_failure: bool) -> tuple[int, int]:
        """Requests of the window, this one among them, and those that failed."""
        slice_s = window_s / _SLICES
        if slice_s != self._slice_s:
            self._slice_s = slice_s
            self._slices.clear()
        at, slices = int(self._clock() / slice_s), self._slices
        if not slices or slices[-1][0] != at:
            slices.append([at, 0, 0])
            while slices[0][0] <= at - _SLICES:
                del slices[0]
        slices[-1][1] += 1
        slices[-1][2] += is_failure
        return sum(n for _, n, _ in slices), sum(failed for _, _, failed in slices)


class Hop(NamedTuple):
    """Who is asked instead."""

    variant: Variant
    decision: Decision


class Breakers:
    """All breakers of a worker. They outlive revisions."""

    def __init__(
        self,
        telemetry: Telemetry,
        on_open: Callable[[str, int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_open`: told the model and the version whose breaker has opened."""
        self._telemetry = telemetry
        self._on_open = on_open
        self._clock = clock
        self._all: dict[tuple[str, int], Breaker] = {}

    def state(self, model: str, version: int) -> State:
        """Of a version, whether its route has a breaker or not."""
        found = self._all.get((model, version))
        return "closed" if found is None else found.state

    def lets_in(self, routing: Routing, model: str, version: int) -> bool:
        """Whether a request may go to a version now; changes nothing."""
        rules = routing.route.breaker
        found = self._all.get((model, version))
        return rules is None or found is None or found.lets_in(rules)

    def hop(
        self, routing: Routing, variant: Variant, error: GatewayError, variants: Variants
    ) -> Hop | None:
        """Who is asked instead of a variant that failed so; None: nobody.

        The first of the route's that is another version, is open, and whose breaker lets it in.
        """
        fallback = routing.route.fallback
        if fallback is None or not is_fault(error) or _kind(error) not in fallback.on:
            return None
        reason = "BREAKER" if isinstance(error, BreakerOpenError) else "FALLBACK"
        there = variants()
        for to in fallback.to:
            other = there.get(routing.version_of(to))
            if (
                other is not None
                and other.version != variant.version
                and self.lets_in(routing, other.model, other.version)
            ):
                said = f"{reason}({variant.version})"
                choice = Choice.of(
                    str(to), other.version, said, routing.revision, traffic="fallback"
                )
                return Hop(other, Decision(choice))
        return None

    def diverted(
        self, routing: Routing, variant: Variant, decision: Decision, variants: Variants
    ) -> Hop | None:
        """Who is asked instead of a variant whose breaker is open; None: it is asked itself.

        What a client has named by itself is never refused, and so is the last that can answer.
        """
        if routing.route.breaker is None or decision.choice.traffic != "primary":
            return None
        if self.lets_in(routing, variant.model, variant.version):
            return None
        refused = BreakerOpenError(variant.model, variant.version)
        return self.hop(routing, variant, refused, variants)

    def around(
        self,
        routing: Routing,
        variant: Variant,
        decision: Decision,
        budget: Budget,
        variants: Variants,
    ) -> AbstractContextManager[None]:
        """Around a request to a variant: how it ends is counted, and may open the breaker.

        That of a client who named the variant is not: whoever tries out a version on purpose does
        not take it from the others.
        """
        rules = routing.route.breaker
        if rules is None or decision.choice.traffic == "pinned":
            return _UNWATCHED
        # By name and number: its session closes when the request has let go of the variant.
        return self._watched(routing, rules, variant.model, variant.version, budget, variants)

    @contextmanager
    def _watched(
        self,
        routing: Routing,
        rules: routes.Breaker,
        model: str,
        version: int,
        budget: Budget,
        variants: Variants,
    ) -> Iterator[None]:
        breaker = self._all.get((model, version))
        if breaker is None:
            breaker = self._all[model, version] = Breaker(self._clock)
        is_probe, is_failure = breaker.enter(rules), None
        try:
            yield
            is_failure = False
        except GatewayError as error:
            is_late = isinstance(error, DeadlineError)
            if is_fault(error) and not (is_late and budget.is_shortened):
                is_failure = True
            raise
        finally:
            was = breaker.state
            if breaker.leave(
                rules,
                is_probe=is_probe,
                is_failure=is_failure,
                may_open=lambda: self._has_other(routing, version, variants),
            ):
                self._telemetry.counter(BREAKER_OPENED, model, str(version)).add()
                event("breaker_opened", logging.WARNING, model=model, version=version)
                if self._on_open is not None:
                    self._on_open(model, version)
            elif was != breaker.state:
                event("breaker_closed", model=model, version=version)

    def samples(self, routes_of: Callable[[str], routes.Route | None]) -> list[Sample]:
        """1 for each version that is not asked as ever, of routes with a breaker."""
        found: list[Sample] = []
        for (model, version), breaker in self._all.items():
            route = routes_of(model)
            if route is not None and route.breaker is not None:
                found.append(((model, str(version)), float(breaker.state != "closed")))
        return found

    def _has_other(self, routing: Routing, version: int, variants: Variants) -> bool:
        """Whether somebody else is there to answer, with a breaker that is closed."""
        fallback = routing.route.fallback
        there = variants()
        others = (there.get(routing.version_of(to)) for to in (fallback.to if fallback else ()))
        return any(
            other is not None
            and other.version != version
            and self.state(other.model, other.version) == "closed"
            for other in others
        )


def is_fault(error: GatewayError) -> bool:
    """Whether an error is ours: not the client's doing, and no refusal for want of room."""
    return error.status >= _OURS and error.status != UnsupportedError.status


def _kind(error: GatewayError) -> Literal["error", "timeout", "breaker"]:
    if isinstance(error, BreakerOpenError):
        return "breaker"
    return "timeout" if isinstance(error, DeadlineError) else "error"
