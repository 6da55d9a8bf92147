"""What counting for a rollout costs a request.

Question  Does a request of a model with a rollout pay 10 us at most, and others next to nothing?
Method    Best of 5 runs of 20 000 requests: new sticky units, one input, one output, all guards.
Budget    10 us a request with a rollout.
Run       make bench NAME=exposures
"""

import tempfile
import timeit
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from gateway.exposures import Exposures
from registry.rollouts import Plan, Rollout

N = 20_000


def main() -> None:
    """Print the seconds of one request."""
    edges = tuple(np.arange(1, 10) / 10)
    rollout = Rollout(
        id="r-1", candidate=9, control=7, phase="step", plan=Plan(),
        slow_s={"slow_requests": 0.01}, edges={"input:x[0]": edges, "output:y[0]": edges},
    )  # fmt: skip
    names = count()
    x = [np.random.default_rng(1).random((1, 1), np.float32)]
    signature = SimpleNamespace(
        inputs=[SimpleNamespace(name="x")], outputs=[SimpleNamespace(name="y")]
    )

    def ask(exposures: Exposures, model: str) -> None:
        decision = SimpleNamespace(
            choice=SimpleNamespace(version=7, reason="SPLIT", p=0.95),
            unit=b"user-%d" % next(names),
            unit_kind="header:x-user-id",
        )
        watched = exposures.begin(SimpleNamespace(model=model, signature=signature), decision)
        if watched:
            watched.answered(0.002, x, x)

    with tempfile.TemporaryDirectory() as directory:
        exposures = Exposures(Path(directory), None, "bench-0")
        exposures.follow({"m": rollout})
        with_one, without = (
            min(timeit.repeat(lambda: ask(exposures, model), number=N, repeat=5)) / N * 1e6  # noqa: B023  called at once
            for model in ("m", "other")
        )
        exposures.close()
    print(
        f"exposures: {with_one:.2f} us with a rollout, {without:.2f} us without, both with the"
        " stand-ins made for each; budget 10 us"
    )


if __name__ == "__main__":
    main()
