"""What a thousand models cost while nobody asks.

Question  How long does a server with a thousand models take to be ready, and what does it use idle?
Method    A registry of so many small models, one version each, all of them open. From the start of
          the process to the first 200 of /v2/health/ready; then, after `--rest` seconds, the CPU
          seconds of its process tree, supervisor included, over a minute. Files are in the page
          cache.
Budget    ready in 5 s; 1 % of a core.
Run       make bench NAME=idle
"""

import argparse
import http.client
import json
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench import BenchError
from bench.overhead import driftgate
from bench.processes import Server, cpu_s, pss_bytes
from bench.swap import write_model

READY_S_MAX = 5.0
SHARE_MAX = 0.01


def write_registry(directory: Path, n_models: int) -> None:
    """Write version 1 of so many models; they are copies of one file."""
    for number in range(n_models):
        version = directory / f"model{number:04d}" / "1"
        version.mkdir(parents=True)
        if number == 0:
            first = version / "model.onnx"
            write_model(first, 1)
        else:
            shutil.copyfile(first, version / "model.onnx")


def check(server: Server, n_models: int) -> None:
    """Look that all of them are open.

    Raises
    ------
    BenchError : some are not.
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10.0)
    try:
        connection.request("POST", "/v2/repository/index", body=b"{}")
        index = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    n_ready = sum(entry.get("state") == "READY" for entry in index)
    if n_ready != n_models:
        raise BenchError(f"{n_ready} of {n_models} models are ready")


def main() -> None:
    """Start once, let it rest, and print what it used meanwhile."""
    parser = argparse.ArgumentParser(description="What a thousand models cost idle.")
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--rest", type=float, default=30.0, help="seconds before the measurement")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with ExitStack() as stack:
        registry = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_registry(registry, options.models)
        server = driftgate(stack, registry)
        check(server, options.models)
        time.sleep(options.rest)
        before, began = cpu_s(server.pid), time.monotonic()
        time.sleep(options.seconds)
        share = (cpu_s(server.pid) - before) / (time.monotonic() - began)
        mib = pss_bytes(server.pid) / 2**20
    is_within = server.ready_s <= READY_S_MAX and share <= SHARE_MAX
    print(
        f"idle: {options.models:,} models ready in {server.ready_s:.1f} s; then {share:.2%} of a"
        f" core and {mib:.0f} MiB PSS (budget {READY_S_MAX:g} s, {SHARE_MAX:.0%}:"
        f" {'within' if is_within else 'OVER'})"
    )


if __name__ == "__main__":
    main()
