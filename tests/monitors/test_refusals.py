"""Refused requests: normal is learnt, the promise holds below it, and more is found."""

import numpy as np
import pytest

from monitors import BlockError, Budget
from monitors.refusals import Refusals

CODES = ("bad_request", "bad_tensor")
BUDGET = Budget(alarms=1, rows=20_000)


def blocks(draw: np.random.Generator, shares: tuple[float, ...], n: int, size: int = 50):
    """Blocks of requests: answered, and refused with either code."""
    return draw.multinomial(size, [1 - sum(shares), *shares], n // size)


@pytest.mark.parametrize(
    ("learnt", "later", "allowed"),
    [
        ((0.0, 0.0), (0.003, 0.006), 0.01),  # What is allowed without having been seen.
        ((0.02, 0.05), (0.02, 0.05), 0.01),  # What was learnt.
        ((0.02, 0.05), (0.0, 0.0), 0.01),  # Fewer than ever.
        ((0.4, 0.1), (0.4, 0.1), 0.001),
    ],
)
def test_what_is_normal_raises_no_more_alarms_than_the_budget(learnt, later, allowed) -> None:
    """150,000 requests under a budget of one in 20,000: seven are allowed.

    The bounds are on the safe side, so that there are next to none.
    """
    pages = 0
    for seed in range(6):
        draw = np.random.default_rng(seed)
        seen = Refusals(CODES, budget=BUDGET, allowed=allowed)
        for block in blocks(draw, learnt, 1000):
            seen.fold(block)
        assert not seen.is_learning
        for block in blocks(draw, later, 25_000):
            seen.fold(block)
        pages += len({a.episode for a in seen.episodes if a.level == "page"})
    assert pages <= 2


def test_a_bound_that_is_just_met_keeps_the_promise() -> None:
    """At the bound itself, where bets are fair: alarms stay within 4 deviations of the budget."""
    pages, n_runs, n = 0, 30, 10_000
    for seed in range(n_runs):
        draw = np.random.default_rng(seed)
        seen = Refusals(("code",), budget=BUDGET, allowed=0.03, learn=0)
        for block in draw.multinomial(50, [0.97, 0.03], n // 50):
            seen.fold(block)
        pages += len([a for a in seen.episodes if a.level == "page"])
    allowed = n_runs * n / 20_000
    assert pages <= allowed + 4 * np.sqrt(allowed)


@pytest.mark.parametrize(("share", "requests"), [(0.05, 900), (0.15, 200), (0.9, 50)])
def test_more_refusals_are_paged_by_their_code(share, requests) -> None:
    """From one in a hundred to so many: the code is named, when it began, and when it is over."""
    found = []
    for seed in range(7):
        draw = np.random.default_rng(seed)
        seen = Refusals(CODES, budget=BUDGET)
        for block in blocks(draw, (0.002, 0.01), 4000):
            seen.fold(block)
        begun = seen.n_requests
        for block in blocks(draw, (0.002, share), 5000):
            raised = [a for a in seen.fold(block) if a.level == "page"]
            if raised:
                break
        assert {a.channel for a in raised} <= {"requests:bad_tensor", "requests:any"}
        assert "requests:bad_request" not in {a.channel for a in seen.alarms}
        found.append(seen.n_requests - begun)
        assert raised[0].since_row >= begun - 1000
        for block in blocks(draw, (0.002, 0.0), 5000):
            seen.fold(block)
        assert not seen.alarms
    assert np.median(found) <= requests


def test_state_goes_on_to_the_last_bit() -> None:
    """While learning and after; of other bounds it is refused."""
    draw = np.random.default_rng(1)
    table = [*blocks(draw, (0.01, 0.02), 1500), *blocks(draw, (0.01, 0.3), 1000)]
    whole = Refusals(CODES, budget=Budget())
    parts = Refusals(CODES, budget=Budget())
    for k, block in enumerate(table):
        whole.fold(block, at=float(k))
        parts.fold(block, at=float(k))
        if k in {5, 33}:
            kept, parts = parts.to_bytes(), Refusals(CODES, budget=Budget())
            parts.restore(kept)
    assert parts.to_bytes() == whole.to_bytes()
    assert parts.report() == whole.report()
    assert parts.alarms
    parts.acknowledge(parts.alarms[0].id)
    for damaged in (whole.to_bytes(), b"", b"x" * 500):
        with pytest.raises(BlockError):
            Refusals(CODES, budget=Budget(), allowed=0.5).restore(damaged)
    with pytest.raises(BlockError, match="needs the time"):
        whole.fold(table[0])
