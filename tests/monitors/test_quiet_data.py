"""Rows as people leave them behind: ties, long tails, zeros, holes, answers that hang together.

Quiet is quiet: the same rows in another order are no drift, however the columns look. Pages are
held against what the budget allows; a budget of one in 2,000 rows allows many, and a monitor that
paged because of ties, rare levels or a small reference would use them all up.
"""

from collections.abc import Callable

import numpy as np
import pytest

from gateway.demo.sample import load
from monitors import Budget, Monitor, Profile

ROWS_A_PAGE = 2_000
Draw = np.random.Generator
Columns = dict[str, np.ndarray]


def census(draw: Draw, n: int) -> Columns:
    """Households as in a census: heavy ties, zero-inflated amounts, a hundred rare trades."""
    age = np.clip(draw.gamma(6, 7, n), 0, 95).astype(np.int64)
    works = (draw.random(n) < np.where((age > 17) & (age < 66), 0.75, 0.08)).astype(np.int64)
    hours = np.where(works == 1, draw.choice([20, 35, 38, 40, 40, 40, 45, 60], n), 0)
    wage = np.where(works == 1, np.round(draw.lognormal(10.2, 0.7, n), -2), 0.0)
    capital = np.where(draw.random(n) < 0.92, 0.0, np.round(draw.pareto(1.2, n) * 1000, -1))
    trades = np.array([f"trade {k}" for k in range(120)], object)
    shares = 1 / np.arange(1, 121) ** 1.1
    trade = trades[draw.choice(120, n, p=shares / shares.sum())]
    trade[works == 0] = None
    schooling = np.minimum(draw.binomial(16, 0.55, n) + works, 16)
    children = draw.poisson(np.where(age > 25, 1.2, 0.1))
    rent = np.where(draw.random(n) < 0.35, np.nan, np.round(300 + 0.01 * wage + 50 * children, -1))
    state = np.array([f"state {k:02}" for k in range(51)], object)
    where = state[np.minimum(draw.geometric(0.08, n) - 1, 50)]
    married = draw.random(n) < 1 / (1 + np.exp(-(age - 28) / 6))
    return {
        "age": age, "works": works, "hours": hours, "wage": wage, "capital": capital,
        "trade": trade, "schooling": schooling, "children": children, "rent": rent,
        "state": where, "married": married,
        "tax": np.round(0.2 * wage + 0.15 * capital + draw.normal(0, 50, n)),
    }  # fmt: skip


def measurements(draw: Draw, n: int) -> Columns:
    """Thirty numbers of one size: no ties at all, and whoever is large is large in all of them."""
    size = draw.normal(size=n)
    return {f"m{k}": np.exp(0.8 * size + 0.4 * draw.normal(size=n)) for k in range(30)}


def flights(draw: Draw, n: int) -> Columns:
    """Real ones: a year of flights and their weather, in no order."""
    rows = draw.permutation(24_000)[:n]
    return {name: column[rows] for name, column in _FLIGHTS.items()}


_FLIGHTS = load().columns


@pytest.mark.parametrize(
    ("world", "n_reference", "n_served", "n_seeds"),
    [(census, 4000, 12_000, 12), (census, 300, 4000, 20), (measurements, 280, 2000, 60),
     (flights, 8000, 12_000, 8), (flights, 500, 6000, 12)],
)  # fmt: skip
def test_real_and_census_like_rows_raise_no_more_pages_than_the_budget(
    world: Callable[[Draw, int], Columns], n_reference: int, n_served: int, n_seeds: int
) -> None:
    """At most a fifth of what the budget allows in all: next to none are seen."""
    pages = 0
    for seed in range(n_seeds):
        columns = world(np.random.default_rng(seed), n_reference + n_served)
        monitor = Monitor(
            Profile.fit({name: column[:n_reference] for name, column in columns.items()}),
            budget=Budget(rows=ROWS_A_PAGE),
        )
        for start in range(n_reference, n_reference + n_served, 50):
            monitor.update({name: c[start : start + 50] for name, c in columns.items()})
        pages += len({alarm.episode for alarm in monitor.episodes if alarm.level == "page"})
    allowed = n_seeds * n_served / ROWS_A_PAGE

    assert pages <= allowed / 5


def test_a_change_in_such_rows_is_still_seen() -> None:
    """Wages up by a fifth, trades renamed, rents no longer asked for: each is paged by its name."""
    changes: dict[str, Callable[[Columns], np.ndarray]] = {
        "wage": lambda rows: np.round(rows["wage"] * 1.3, -2),
        "trade": lambda rows: np.where(rows["trade"] == "trade 0", "trade zero", rows["trade"]),
        "rent": lambda rows: np.where(rows["wage"] > 30_000, np.nan, rows["rent"]),
    }
    draw = np.random.default_rng(3)
    profile = Profile.fit(census(draw, 8000))
    for name, change in changes.items():
        monitor = Monitor(profile, budget=Budget(rows=100_000))
        monitor.update(census(draw, 1000))
        assert not monitor.alarms
        rows = census(draw, 3000)
        rows[name] = change(rows)
        monitor.update(rows)
        assert name in {alarm.feature for alarm in monitor.alarms if alarm.level == "page"}
