"""What a saturated shadow costs those who are answered.

Question  Is the 99th percentile of a light model's latency within 1.2 x of what it is without a
          shadow, while every request is copied to a shadow that can run a third of them, and is
          nobody's request failed?
Method    Rounds in turn on a server without a shadow and one with it, one worker each, the same
          light champion and a shadow of 5 ms that is given all requests; open loop at a fixed rate,
          latency from when a request was due, generator in a process of its own; the median of the
          ratios of neighbouring rounds.
Budget    1.2 x; 0 failed.
Run       make bench NAME=shadow
"""

import argparse
import json
import statistics
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import BenchError
from bench.load import Report, run_apart
from bench.overhead import READY
from bench.processes import Server, free_port, serve
from bench.workers import RUN_S, seconds_of, write_model
from gateway.cli import main as driftgate

RATIO_MAX = 1.2
_PATH = "/v2/models/m/infer"
_BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [0.5]}]}
).encode()
_DONE = 0


def write_registry(directory: Path) -> tuple[float, float]:
    """Write a light champion and a heavy shadow; return their seconds."""
    light, heavy = (directory / "m" / str(k) / "model.onnx" for k in (1, 2))
    for path in (light, heavy):
        path.parent.mkdir(parents=True)
    write_model(light, 0)
    write_model(heavy, 4)
    write_model(heavy, max(1, round(4 * RUN_S / seconds_of(heavy))))
    return seconds_of(light), seconds_of(heavy)


def change(*words: str) -> None:
    """Run one command in this process."""
    sys.argv = ["driftgate", *words]
    try:
        driftgate()
    except SystemExit as end:
        if end.code != _DONE:
            raise BenchError(f"driftgate {' '.join(words)}: exit {end.code}") from None


def told(server: Server) -> dict[str, Any]:
    """What the shadow's report says."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/drift/m/shadows") as answer:
        (found,) = json.load(answer)["shadows"]
    return dict(found)


def main() -> None:
    """Measure in turn and print one line."""
    parser = argparse.ArgumentParser(description="What a saturated shadow costs the others.")
    parser.add_argument("--rate", type=float, default=600.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: list[Server] = []
        for name in ("without", "with"):
            light_s, heavy_s = write_registry(root / name)
            change("promote", "m", "1", "-r", str(root / name))
            if name == "with":
                change("shadow", "start", "m", "2", "-r", str(root / name))
            port = free_port()
            command = [str(Path(sys.executable).with_name("driftgate")), "serve", str(root / name)]
            command += ["--port", str(port), "--no-grpc"]
            servers.append(stack.enter_context(serve(command, port=port, ready_path=READY)))

        def measure(server: Server) -> Report:
            return run_apart(
                server.port, _PATH, [_BODY],
                connections=options.connections, seconds=options.seconds, rate=options.rate,
            )  # fmt: skip

        for server in servers:
            measure(server)
        rounds = [(measure(servers[0]), measure(servers[1])) for _ in range(options.rounds)]
        cover = told(servers[1])["coverage"]
    ratio = statistics.median(b.latency_s["p99"] / a.latency_s["p99"] for a, b in rounds)
    quiet, shadowed = (
        statistics.median(pair[k].latency_s["p99"] for pair in rounds) * 1e3 for k in (0, 1)
    )
    failed = sum(r.requests - r.ok + r.unsent for pair in rounds for r in pair)
    is_within = ratio <= RATIO_MAX and not failed
    print(
        f"shadow: p99 {ratio:.2f} x of without, medians {shadowed:.2f} and {quiet:.2f} ms at"
        f" {options.rate:g} requests/s (champion {light_s * 1e3:.2f} ms, shadow"
        f" {heavy_s * 1e3:.1f} ms; {cover['sampled']} copies, {100 * cover['dropped_share']:.0f} %"
        f" dropped), {failed} failed; budget {RATIO_MAX:g} x, 0 failed:"
        f" {'within' if is_within else 'OVER'}"
    )


if __name__ == "__main__":
    main()
