"""Whether a server grows while everything happens to it at once.

Question  Do memory, file descriptors or threads grow under swaps, errors and clients that hang up?
Method    Two workers; for 60 s two clients ask at full speed, one sends what is wrong, one hangs up
          in the middle of requests and answers, and a version is published every two seconds. Once
          a second the resident memory, the open files and the threads of the whole tree are read;
          growth is the median of the last third less that of the second: the first third is for
          caches and pools to fill.
Budget    30 MiB in the last third; descriptors and threads within 8 of each other.
Run       make bench NAME=soak
"""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.overhead import READY
from bench.processes import Server, free_port, serve, tree
from bench.swap import write_model
from gateway import publisher

GROWTH_MIB_MAX = 30.0
SPREAD_MAX = 8
_PUBLISH_S = 2.0
_PATH = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_WRONG = (b"{", b'{"inputs": 3}', b'{"inputs": [{"name": "nothing"}]}', b"\xff" * 200)


@dataclass(frozen=True, slots=True)
class Sample:
    """The whole tree of processes, at one moment."""

    mib: float
    n_files: int
    n_threads: int


@dataclass(slots=True)
class Soak:
    """What one run came to."""

    samples: list[Sample] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    """Answers by client and status."""
    n_published: int = 0

    @property
    def growth_mib(self) -> float:
        """Median of the last third less that of the second."""
        third = len(self.samples) // 3
        middle, last = self.samples[third : 2 * third], self.samples[2 * third :]
        return statistics.median(s.mib for s in last) - statistics.median(s.mib for s in middle)

    def spread(self, what: Callable[[Sample], int]) -> int:
        """Growth of a count from the second third to the last, by their medians."""
        third = len(self.samples) // 3
        middle, last = self.samples[third : 2 * third], self.samples[2 * third :]
        return int(statistics.median(map(what, last)) - statistics.median(map(what, middle)))


def soak(seconds: float, *, n_workers: int = 2, publish_s: float = _PUBLISH_S) -> Soak:
    """Let everything happen at once for so long."""
    found = Soak()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        registry, file = directory / "models", directory / "next.onnx"
        registry.mkdir()
        write_model(file, 1)
        publisher.publish(registry, "m", file)
        port = free_port()
        command = [str(Path(sys.executable).with_name("driftgate")), "serve", str(registry)]
        command += ["--port", str(port), "--no-grpc", "--workers", str(n_workers)]
        server = stack.enter_context(serve(command, port=port, ready_path=READY))
        is_over = threading.Event()
        clients: list[Callable[[int, threading.Event, Soak], None]] = [ask, ask, err, hang_up]
        threads = [threading.Thread(target=client, args=(port, is_over, found))
                   for client in clients]  # fmt: skip
        for thread in threads:
            thread.start()
        began = time.monotonic()
        due = began + publish_s
        while (now := time.monotonic()) < began + seconds:
            found.samples.append(look(server))
            if now >= due:
                due += publish_s
                found.n_published += 1
                write_model(file, found.n_published + 1)
                publisher.publish(registry, "m", file)
            time.sleep(min(1.0, seconds / 30))
        is_over.set()
        for thread in threads:
            thread.join(10)
    return found


def look(server: Server) -> Sample:
    """Memory, files and threads of the whole tree now."""
    pages = n_files = n_threads = 0
    for pid in tree(server.pid):
        with contextlib.suppress(OSError):  # One that was there a moment ago.
            process = Path(f"/proc/{pid}")
            pages += int((process / "statm").read_text("ascii").split()[1])
            n_files += len(list((process / "fd").iterdir()))
            n_threads += len(list((process / "task").iterdir()))
    return Sample(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, n_files, n_threads)


def ask(port: int, is_over: threading.Event, found: Soak) -> None:
    """Ask rightly, one request after the other on one connection."""
    body = json.dumps(
        {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [0, 1]}]}
    ).encode()
    _converse(port, is_over, found, "ask", [body])


def err(port: int, is_over: threading.Event, found: Soak) -> None:
    """Send what is wrong, as a client that never learns."""
    _converse(port, is_over, found, "err", _WRONG)


def hang_up(port: int, is_over: threading.Event, _: Soak) -> None:
    """Leave in the middle of a request, or before its answer."""
    chance = random.Random(7)
    body = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [0]}]}'
    message = _PATH + b"Content-Length: %d\r\n\r\n" % len(body) + body
    while not is_over.is_set():
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=10) as line,
        ):
            line.sendall(message[: chance.randint(1, len(message))])
        is_over.wait(0.005)


def _converse(
    port: int, is_over: threading.Event, found: Soak, who: str, bodies: Sequence[bytes]
) -> None:
    line: socket.socket | None = None
    turn = 0
    while not is_over.is_set():
        turn += 1
        body = bodies[turn % len(bodies)]
        try:
            if line is None:
                line = socket.create_connection(("127.0.0.1", port), timeout=10)
            line.sendall(_PATH + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            answer = line.recv(65536)
        except OSError:
            answer = b""
        status = answer[9:12].decode("latin-1") or "broken"
        key = f"{who} {status}"
        found.statuses[key] = found.statuses.get(key, 0) + 1
        if not answer or b"connection: close" in answer.lower():
            if line is not None:
                line.close()
            line = None
    if line is not None:
        line.close()


def main() -> None:
    """Soak, and print one line."""
    parser = argparse.ArgumentParser(description="Whether a server grows.")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    found = soak(options.seconds)
    files, threads = found.spread(lambda s: s.n_files), found.spread(lambda s: s.n_threads)
    is_within = found.growth_mib <= GROWTH_MIB_MAX and max(files, threads) <= SPREAD_MAX
    counts = ", ".join(f"{n} x {key}" for key, n in sorted(found.statuses.items()))
    print(
        f"soak: {options.seconds:g} s, {found.n_published} versions, {counts};"
        f" {found.growth_mib:+.1f} MiB in the last third (of {found.samples[-1].mib:.0f}),"
        f" {files:+d} descriptors, {threads:+d} threads"
        f" (budget {GROWTH_MIB_MAX:g} MiB, {SPREAD_MAX}: {'within' if is_within else 'OVER'})"
    )


if __name__ == "__main__":
    main()
