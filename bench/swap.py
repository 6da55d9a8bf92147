"""What clients notice of a hundred swaps in a row.

Question  Does anybody fail, meet a mixed answer, or wait, while versions are swapped at full speed?
Method    Two workers; four keep-alive connections in a process of their own ask without a pause.
          Versions answer with their own number, so that an answer shows which one computed it and
          which one it says it is from. The next version is published when every connection has
          met the one before. Delay: from the end of publish to the first answer of the new version
          and to the last one of the old. Quiet: the same load before the first swap.
Budget    0 failed, 0 mixed; first answer 0.5 s at the median and 2 s at most; last old answer 2 s;
          99th percentile of latency at most 2 x quiet.
Run       make bench NAME=swap
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from bench import BenchError
from bench.overhead import READY
from bench.processes import Server, free_port, serve
from gateway import publisher

CONNECTIONS = 4
_BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [0]}]}
).encode()
_SAID = re.compile(rb'"model_version":"(\d+)".*"data":\[(\d+)', re.DOTALL)
_SERVED_S_MAX = 20.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer: which connection, when it came, how long it took, what it said."""

    connection: int
    at: float
    seconds: float
    version: int
    """0: it failed."""
    computed: int


def write_model(path: Path, number: int) -> None:
    """Write a model that answers its number to every row."""
    from onnx import TensorProto, helper, numpy_helper, save

    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "number"], ["y"]),
        ],
        "constant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [
            numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
            numpy_helper.from_array(np.full(1, number, np.float32), "number"),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


class Load:
    """The clients, in a process of their own, and what they have met."""

    def __init__(self, server: Server, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.swap", "--ask", str(server.port), str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._met: dict[int, set[int]] = {}
        self._news = threading.Condition()
        threading.Thread(target=self._hear, args=(self._process.stdout,), daemon=True).start()

    def _hear(self, lines: IO[bytes]) -> None:
        for line in lines:
            connection, version = map(int, line.split())
            with self._news:
                self._met.setdefault(version, set()).add(connection)
                self._news.notify_all()

    def wait_for(self, version: int) -> None:
        """Return when every connection has been answered by this version."""
        with self._news:
            is_met = self._news.wait_for(
                lambda: len(self._met.get(version, ())) == CONNECTIONS, _SERVED_S_MAX
            )
        if not is_met:
            raise BenchError(f"version {version} did not answer everybody in {_SERVED_S_MAX:g} s")

    def end(self) -> list[Seen]:
        """End the clients; everything they were answered."""
        self._process.communicate(timeout=30)
        rows = np.load(self._log)
        return [Seen(int(c), at, s, int(v), int(n)) for c, at, s, v, n in rows.tolist()]


def ask(port: int, log: Path) -> None:
    """Ask on four connections until standard input ends; say who met which version first."""
    seen: list[list[tuple[int, float, float, int, int]]] = [[] for _ in range(CONNECTIONS)]
    is_over = threading.Event()
    head = "POST /v2/models/m/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    message = f"{head}Content-Length: {len(_BODY)}\r\n\r\n".encode() + _BODY

    def one(connection: int) -> None:
        rows, newest = seen[connection], 0
        with socket.create_connection(("127.0.0.1", port)) as line:
            while not is_over.is_set():
                start = time.monotonic()
                try:
                    line.sendall(message)
                    answer = line.recv(65536)
                except OSError:
                    answer = b""
                end = time.monotonic()
                said = _SAID.search(answer) if answer.startswith(b"HTTP/1.1 200") else None
                version, computed = (int(said[1]), int(said[2])) if said else (0, 0)
                rows.append((connection, end, end - start, version, computed))
                if version > newest:
                    newest = version
                    os.write(1, f"{connection} {version}\n".encode())  # whole, among threads
                if not answer:
                    return

    threads = [threading.Thread(target=one, args=(k,)) for k in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    sys.stdin.buffer.read()
    is_over.set()
    for thread in threads:
        thread.join(10)
    np.save(log, np.array([row for rows in seen for row in rows], np.float64))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all is at most."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Swap, and print one line."""
    parser = argparse.ArgumentParser(description="What clients notice of swaps.")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=5.0, help="seconds before the first swap")
    parser.add_argument("--ask", nargs=2, metavar=("PORT", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(int(options.ask[0]), Path(options.ask[1]))
        return
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        registry, file = directory / "models", directory / "next.onnx"
        registry.mkdir()
        write_model(file, 1)
        publisher.publish(registry, "m", file)
        port = free_port()
        command = [str(Path(sys.executable).with_name("driftgate")), "serve", str(registry)]
        command += ["--port", str(port), "--no-grpc", "--workers", str(options.workers)]
        server = stack.enter_context(serve(command, port=port, ready_path=READY))
        load = Load(server, directory / "seen.npy")
        load.wait_for(1)
        time.sleep(options.quiet)
        began = time.monotonic()
        published = {}
        for version in range(2, options.swaps + 2):
            write_model(file, version)
            publisher.publish(registry, "m", file, version=version)
            published[version] = time.monotonic()
            load.wait_for(version)
        seen = load.end()
    report(seen, published, began)


def report(seen: Sequence[Seen], published: dict[int, float], began: float) -> None:
    """Print what it came to."""
    good = [answer for answer in seen if answer.version]
    mixed = sum(answer.version != answer.computed for answer in good)
    firsts, lasts = [], []
    for version, at in published.items():
        firsts.append(max(0.0, min(a.at for a in good if a.version == version) - at))
        lasts.append(max(0.0, max(a.at for a in good if a.version < version) - at))
    quiet = percentile([a.seconds for a in good if a.at < began], 0.99)
    busy = percentile([a.seconds for a in good if a.at >= began], 0.99)
    n_failed = len(seen) - len(good)
    is_within = (
        not n_failed and not mixed and statistics.median(firsts) <= 0.5 and max(firsts) <= 2
        and max(lasts) <= 2 and busy <= 2 * quiet
    )  # fmt: skip
    print(
        f"swap: {len(published)} swaps, {len(seen)} answers, {n_failed} failed, {mixed} mixed;"
        f" first answer after {statistics.median(firsts):.2f} s at the median and"
        f" {max(firsts):.2f} s at most, the last old one after {max(lasts):.2f} s;"
        f" 99th percentile {busy * 1e3:.1f} ms, quiet {quiet * 1e3:.1f} ms"
        f" (budget 0.5 s, 2 s, 2 s, 2 x quiet: {'within' if is_within else 'OVER'})"
    )


if __name__ == "__main__":
    main()
