"""What a row costs the observer's thread: from the tap to evidence.

Question  Does a row of 35 columns cost the observer at most 3 us of CPU, tap and evidence included?
Method    The thread itself, on a tap that is offered runs of 16 rows of 30 numbers and 5 texts at
          10,000 rows/s; CPU time of that thread alone; best of 3 rounds of 3 s; and at 5,000.
Budget    3 us a row.
Run       make bench NAME=observer
"""

import asyncio
import time

import numpy as np

from gateway.config import MonitorConfig
from gateway.counters import Region
from gateway.observer import Observer
from gateway.tap import Observation, Tap
from gateway.watch import Watch, WatchMeters
from monitors import Profile
from registry.signature import Signature, TensorSpec
from tests.world import N_NUMBERS, World

ROUNDS = 3
SECONDS = 3.0
AT_ONCE = 16
RATES = (10_000, 5_000)
_N_TEXTS = 5
_N_REFERENCE = 20_000


def main() -> None:
    """Print one line for each rate."""
    world, draw = World(1), np.random.default_rng(1)
    profile = Profile.fit(_named(world.rows(draw, _N_REFERENCE)))
    signature = Signature(
        (
            TensorSpec("x", "FP32", (-1, N_NUMBERS)),
            *(TensorSpec(f"c{k}", "BYTES", (-1,)) for k in range(_N_TEXTS)),
        ),
        (),
    )
    runs = _runs(world.rows(draw, AT_ONCE * 2_000))
    for rate in RATES:
        costs = [asyncio.run(_cost(signature, profile, runs, rate)) for _ in range(ROUNDS)]
        print(
            f"observer: {min(costs):.2f} us CPU of its thread a row of {N_NUMBERS + _N_TEXTS}"
            f" columns at {rate:,} rows/s, budget 3"
        )


def _named(columns: dict) -> dict:
    return {
        f"input:x[{name[1:]}]" if name[0] == "n" else f"input:{name}": values
        for name, values in columns.items()
    }


def _runs(columns: dict) -> list[list]:
    """Tensors of runs, as sessions are given them: texts as bytes."""
    numbers = np.stack([columns[f"n{k}"] for k in range(N_NUMBERS)], axis=1)
    texts = [
        np.array([text.encode() for text in columns[f"c{k}"]], object) for k in range(_N_TEXTS)
    ]
    return [
        [part[start : start + AT_ONCE] for part in (numbers, *texts)]
        for start in range(0, len(numbers), AT_ONCE)
    ]


async def _cost(signature: Signature, profile: Profile, runs: list[list], rate: int) -> float:
    """Microseconds of the observer's thread for each row that it has counted."""
    region = Region()
    meters = WatchMeters(*(region.counter() for _ in range(5)))
    watch = Watch("m", 1, signature, config=MonitorConfig(), meters=meters, references=None)
    watch.judge_by(profile, "reference.json")
    tap = Tap(65_536, 64 * 2**20)
    observer = Observer(tap)
    observer.add(watch)
    observer.start()
    clock = time.pthread_getcpuclockid(observer._thread.ident)  # noqa: SLF001  whose time it is
    await _offer(tap, meters, runs, rate, 0.5)
    before, counted = time.clock_gettime(clock), meters.observed.value
    await _offer(tap, meters, runs, rate, SECONDS)
    used, n_rows = time.clock_gettime(clock) - before, meters.observed.value - counted
    await observer.stop()
    if meters.dropped.value or meters.errors.value or n_rows < 0.8 * rate * SECONDS:
        raise SystemExit(f"observer: counted {n_rows} rows, dropped {meters.dropped.value}")
    return used / n_rows * 1e6


async def _offer(
    tap: Tap, meters: WatchMeters, runs: list[list], rate: int, seconds: float
) -> None:
    """Offer runs at a fixed rate, from the loop as a server does."""
    start = time.perf_counter()
    for k in range(int(seconds * rate / AT_ONCE)):
        inputs = runs[k % len(runs)]
        tap.offer(Observation("m", 1, inputs, [], AT_ONCE, 4096), meters.dropped)
        if (ahead := start + k * AT_ONCE / rate - time.perf_counter()) > 0.002:
            await asyncio.sleep(ahead)


if __name__ == "__main__":
    main()
