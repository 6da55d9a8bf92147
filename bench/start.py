"""Start to ready, and memory when idle.

Question  How long until a fresh server with two models is ready, and what does it then hold?
Method    Median of 5 starts, each on a fresh registry of two small models with profiles: from
          the start of the process to the first 200 of /v2/health/ready; then, once quiet, the
          proportional set size of its process tree. Files are in the page cache.
Budget    2 s and 150 MiB.
Run       make bench NAME=start
"""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench.overhead import driftgate, write_registry
from bench.processes import pss_bytes, settle, tree

READY_S_MAX = 2.0
PSS_MIB_MAX = 150.0


def start_once() -> tuple[float, float, int]:
    """Start on a fresh registry; return seconds to ready, MiB when idle, number of processes."""
    with ExitStack() as stack:
        registry = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_registry(registry, ("first", "second"))
        server = driftgate(stack, registry)
        settle(server.pid, quiet_s=0.5)
        return server.ready_s, pss_bytes(server.pid) / 2**20, len(tree(server.pid))


def main() -> None:
    """Start several times and print the medians."""
    parser = argparse.ArgumentParser(description="Start to ready, and memory when idle.")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    starts = [start_once() for _ in range(options.starts)]
    ready_s = statistics.median(seconds for seconds, _, _ in starts)
    mib = statistics.median(size for _, size, _ in starts)
    is_within = ready_s <= READY_S_MAX and mib <= PSS_MIB_MAX
    print(
        f"start: ready in {ready_s:.2f} s with two models, {mib:.0f} MiB PSS when idle"
        f" (budget {READY_S_MAX:g} s, {PSS_MIB_MAX:g} MiB: {'within' if is_within else 'OVER'})"
    )
    if options.verbose:
        for seconds, size, n_processes in starts:
            print(f"  ready in {seconds:.2f} s, {size:.1f} MiB, {n_processes} processes")


if __name__ == "__main__":
    main()
