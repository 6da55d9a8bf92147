"""What a capture costs a request.

Question  Does a request of a model with a capture pay 10 us at most on the loop if it is captured,
          and 3 us if it is not; and how many can one worker write down?
Method    Best of 15 interleaved runs of 2 000 requests with a sticky header and 35 inputs in one
          tensor, less what picking a variant takes; then 20 000 handed over at once and written.
Budget    10 us captured, 3 us not; 5 000 requests a second written.
Run       make bench NAME=captures
"""

import tempfile
import time
import timeit
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gateway.capture.log import CaptureLog, CaptureMeters
from gateway.capture.shelf import Shelf
from gateway.counters import Region
from gateway.protocol.call import Call, Served
from gateway.recorder import Recorders
from gateway.router import Routing
from gateway.telemetry import Telemetry
from registry import routes
from registry.revisions import ModelState
from registry.signature import Signature, TensorSpec

N, N_RUNS, N_WRITTEN = 2_000, 15, 20_000
SIGNATURE = Signature(
    (TensorSpec("features", "FP32", (-1, 35)),), (TensorSpec("score", "FP32", (-1, 1)),)
)


class Nowhere:
    """A log that takes no requests: what is left is the loop's own work."""

    def offer(self, _: Any) -> None:
        """Let it go."""


def routing(percent: int) -> Routing:
    """A route that captures so many units."""
    route = routes.parse_one("m", {
        "unit": ["header:x-user-id", "request"],
        "split": [{"to": "champion", "weight": "rest"}, {"to": 2, "weight": 5}],
        "capture": {"sample": percent},
    })  # fmt: skip
    state = ModelState(
        follow=False, aliases={"champion": 1}, route=route,
        salts={"split": "00" * 16, "capture": "01" * 16},
        buckets=routes.table(route, "", bytes(16)).format(),
    )  # fmt: skip
    return Routing("m", state, 1, Telemetry())


def main() -> None:
    """Print the seconds of one request, and requests a second."""
    served, call = Served("m", 1, SIGNATURE, b""), Call([])
    x, y = [np.ones((1, 35), np.float32)], [np.ones((1, 1), np.float32)]
    names = count()

    def ask(recorders: Recorders, made: Routing) -> None:
        headers = [(b"host", b"a"), (b"x-user-id", b"user-%d" % next(names))]
        decision = made.pick(headers, None)
        recorder = recorders.of("m", made)
        taking = recorder and recorder.begin("id-1", headers, decision, 1, None, 0.0)
        if taking:
            taking.bound(served, x, 1, call)
            taking.outputs = y
            taking.ended()

    def pick(made: Routing) -> None:
        headers = [(b"host", b"a"), (b"x-user-id", b"user-%d" % next(names))]
        made.pick(headers, None)

    nowhere: Any = Nowhere()
    ways = [(made := routing(percent), Recorders(nowhere)) for percent in (0, 100)]
    tasks = [lambda: pick(made), *(lambda w=way: ask(w[1], w[0]) for way in ways)]
    runs = [[timeit.timeit(task, number=N) for task in tasks] for _ in range(N_RUNS)]
    alone, *whole = np.min(runs, axis=0) / N * 1e6
    costs = [each - alone for each in whole]

    with tempfile.TemporaryDirectory() as directory:
        region = Region()
        meters = CaptureMeters(*(region.counter() for _ in range(4)))
        shelf = Shelf(
            Path(directory), "0", bytes_max=1 << 30, segment_bytes_max=1 << 24, days=7.0
        )  # fmt: skip
        log = CaptureLog(
            shelf, lambda _: meters, queue_bytes_max=1 << 28, record_bytes_max=1 << 24
        )  # fmt: skip
        made, recorders = routing(100), Recorders(log)
        start = time.perf_counter()
        for _ in range(N_WRITTEN):
            ask(recorders, made)
        log.stop(60)
        per_s = meters.written.value / (time.perf_counter() - start)
        log_bytes = sum(file.stat().st_size for file in Path(directory).rglob("*.capture"))
    print(
        f"captures: {costs[1]:.1f} us captured, {costs[0]:.1f} us not (budget 10 and 3);"
        f" {per_s:,.0f} requests/s written, {log_bytes / N_WRITTEN:.0f} bytes each"
    )


if __name__ == "__main__":
    main()
