"""What monitoring costs: a row, a report, a profile.

Question  Does a row of 35 columns cost at most 3 us of CPU, evidence included?
Method    Blocks of 500 rows, as the observer takes them at 2,500 rows a second, best of 5 rounds of
          50,000 rows; a report over 1,000 columns, its lines known, best of 5; a profile of 1 M
          rows. CPU seconds of the process, so that a busy machine matters less.
Budget    3 us a row; 50 ms a report; 10 s a profile.
Run       make bench NAME=monitor, and NAME=observer for the thread behind a tap
"""

import time
from collections.abc import Callable

import numpy as np

from monitors import Budget, Monitor, Profile
from tests.world import World, cut

ROUNDS = 5
ROWS = 50_000
BLOCK = 500


def main() -> None:
    """Print three lines."""
    world, draw = World(1), np.random.default_rng(1)
    profile = Profile.fit(world.rows(draw, 20_000))
    columns = world.rows(draw, ROWS)
    blocks = [cut(columns, start, start + BLOCK) for start in range(0, ROWS, BLOCK)]
    monitor = Monitor(profile, budget=Budget(rows=500_000))
    best = min(_cpu(monitor, blocks) for _ in range(ROUNDS))
    print(
        f"monitor: {best / ROWS * 1e6:.2f} us CPU a row of 35 columns, evidence included, budget 3"
    )

    wide = {f"x{k}": draw.normal(size=2000).astype(np.float32) for k in range(1000)}
    monitor = Monitor(Profile.fit(wide), budget=Budget(rows=500_000))
    monitor.update(wide)
    monitor.report()
    best = min(_cpu_s(lambda: monitor.report().to_dict()) for _ in range(ROUNDS))
    print(f"monitor: {best * 1e3:.1f} ms CPU a report, 1,000 columns, budget 50")

    large = world.rows(draw, 1_000_000)
    start = time.perf_counter()
    told: list[float] = []
    used = _cpu_s(lambda: Profile.fit(large, progress=told.append))
    print(
        f"monitor: {used:.1f} s CPU, {time.perf_counter() - start:.1f} s in all, a profile of 1 M"
        f" rows x 35, budget 10; progress told {len(told)} times"
    )


def _cpu_s(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _cpu(monitor: Monitor, blocks: list[dict]) -> float:
    start = time.process_time()
    for block in blocks:
        monitor.update(block)
    return time.process_time() - start


if __name__ == "__main__":
    main()
