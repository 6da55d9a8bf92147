"""False alarms and delays of the monitors, in full.

Question  Is the budget of false alarms kept, and how many rows does a change take to be paged?
Method    Seeded worlds (tests/world.py) of 35 columns, reference 20,000 rows, blocks of 50 rows,
          tolerance 0.01, one page in 1,000 windows of 500 rows allowed; delays are medians over 30
          columns. In order: 1,000 windows with a daily swing, or AR(0.9), at a row a minute.
Budget    0 pages in 2,000 quiet windows; 450, 130, 100 and 800 rows; at most 5 pages in order.
Run       make bench NAME=rates
More      python -m bench rates 1 2 3          (the seeds)
"""

import sys
from collections.abc import Callable

import numpy as np

from monitors import Budget, Monitor, Profile
from tests.monitors.test_season import Ordered
from tests.world import HOLES, SYMMETRIC, World, cut, in_blocks

ALLOWED = Budget(alarms=1, rows=500_000)
N_QUIET = 1_000_000
N_ORDERED = 500_000
BOUNDS = {"0.25 sd": 450, "0.5 sd": 130, "flipped correlation": 100, "missing 5 to 15 %": 800}


def main() -> None:
    """Print a line for each world and figure."""
    for seed in map(int, sys.argv[1:] or ["1", "2", "3"]):
        world = World(seed)
        profile = Profile.fit(world.rows(np.random.default_rng(seed), 20_000))
        print(
            f"world {seed}: {_quiet(world, profile, seed)} pages in 2,000 quiet windows, 0 allowed"
        )
        for name, bound in BOUNDS.items():
            rows = _delay(world, profile, _change(world, name))
            print(f"world {seed}: {name}: {rows:.0f} rows, at most {bound}")
        for kind in ("swings", "repeats"):
            print(f"world {seed}: {kind}: {_ordered(kind, seed)} pages in 1,000 windows, at most 5")


def _pages(monitor: Monitor) -> int:
    return len({alarm.episode for alarm in monitor.episodes if alarm.level == "page"})


def _quiet(world: World, profile: Profile, seed: int) -> int:
    monitor, draw = Monitor(profile, budget=ALLOWED), np.random.default_rng(seed + 100)
    for _ in range(N_QUIET // 10_000):
        columns = world.rows(draw, 10_000)
        for start in range(0, 10_000, 50):
            monitor.update(cut(columns, start, start + 50))
    return _pages(monitor)


def _change(world: World, name: str) -> Callable[[np.random.Generator, int], dict]:
    def changed(draw: np.random.Generator, run: int) -> dict:
        if name.endswith("sd"):
            return world.rows(draw, 6000, shift=(run, float(name[:-3])))
        if name.startswith("flipped"):
            normal = world.normal(draw, 6000)
            normal[:, SYMMETRIC[run % len(SYMMETRIC)]] *= -1
            return world.rows(draw, 6000, normal=normal)
        columns = world.rows(draw, 6000)
        hole = f"n{HOLES[run % len(HOLES)]}"
        lost = np.where(draw.random(6000) < 0.1 / 0.95, np.nan, columns[hole])
        columns[hole] = lost.astype(np.float32)
        return columns

    return changed


def _delay(
    world: World, profile: Profile, change: Callable[[np.random.Generator, int], dict]
) -> float:
    found = []
    for run in range(30):
        draw = np.random.default_rng(1000 * run + 7)
        monitor = Monitor(profile, budget=ALLOWED)
        monitor.update(world.rows(draw, 2000))
        found.append(in_blocks(monitor, change(draw, run)) or 10_000)
    return float(np.median(found))


def _ordered(kind: str, seed: int) -> int:
    source = Ordered(kind, seed)
    columns, times = source.rows(20_000)
    monitor = Monitor(Profile.fit(columns, times=times), budget=ALLOWED)
    for _ in range(N_ORDERED // 10_000):
        columns, times = source.rows(10_000)
        for start in range(0, 10_000, 50):
            monitor.update(cut(columns, start, start + 50), at=times[start])
    return _pages(monitor)


if __name__ == "__main__":
    main()
