"""A load generator for one HTTP/1.1 path: N keep-alive connections in a process of its own.

Closed loop: each connection sends its next request when it has its answer; right for CPU per
request. Open loop (a rate): requests are due at fixed moments and timed from then, whether or not
a connection was free, so that a server that stalls cannot hide its queue; right for latency.

It is cheap because it is narrow: request bytes are built before the run, an answer is its status
and its Content-Length. It counts what it saw: every request sent ends as ok, non-2xx or broken.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import ipaddress
import json
import os
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_HEAD_BYTES_MAX = 65536
_ABSOLUTE = 1
"""TFD_TIMER_ABSTIME"""
_GRACE_S = 5.0  # How long answers may still arrive after the last request was due.


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one run sent and saw; latencies are seconds, of answered requests."""

    mode: str
    connections: int
    requests: int
    ok: int
    non_2xx: int
    broken: int
    unsent: int
    """Due in open loop but never sent, for want of a free connection."""
    seconds: float
    requests_per_s: float
    latency_s: dict[str, float]
    send_late_s_p99: float
    """How late requests left in open loop: the part of latency spent before sending."""
    cpu_us_per_request: float
    """What the generator itself used."""


class NotLoopbackError(ValueError):
    """The target is another machine, or a name that might be one."""

    def __init__(self, host: str) -> None:
        super().__init__(f"host {host!r}: load is sent to loopback addresses only, as 127.0.0.1")


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight."""

    __slots__ = ("began", "head", "is_last", "is_ok", "missing", "run", "transport")

    def __init__(self, run: "_Run") -> None:
        self.run = run
        self.transport: asyncio.Transport
        self.began = -1.0  # When the request in flight was sent or due; negative: none is.
        self.head = b""
        self.missing = 0
        self.is_ok = False
        self.is_last = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # TCP gives the full kind
        self.run.open.add(self)
        self.run.free(self, time.perf_counter())

    def data_received(self, data: bytes) -> None:
        if self.missing:
            self.missing -= len(data)
        else:
            if self.head:
                data = self.head + data
            end = data.find(b"\r\n\r\n")
            if end < 0 and len(data) <= _HEAD_BYTES_MAX:
                self.head = data
                return
            self.head = b""
            length = self._parse(data[: end + 2]) if end >= 0 else -1
            if length < 0:
                self.transport.abort()
                return
            self.missing = end + 4 + length - len(data)
        if self.missing > 0:
            return
        if self.missing < 0 or self.began < 0:  # Bytes that nobody asked for.
            self.transport.abort()
            return
        now = time.perf_counter()
        self.run.answered(self.is_ok, now - self.began)
        self.began = -1.0
        if self.is_last:
            self.transport.close()
        else:
            self.run.free(self, now)

    def _parse(self, head: bytes) -> int:
        """Note the status and return the body's length, -1 for what is not understood."""
        if not head.startswith(b"HTTP/1.1 ") or head[9:10] not in b"2345":
            return -1
        self.is_ok = head[9:10] == b"2"
        head = head.lower()
        self.is_last = b"\r\nconnection: close\r\n" in head
        if (at := head.find(b"\r\ncontent-length:")) < 0:
            return 0 if head[9:12] in {b"204", b"304"} else -1
        value = head[at + 17 : head.find(b"\r\n", at + 17)].strip()
        return int(value) if value.isdigit() else -1

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002  # asyncio's name
        self.run.lost(self)


class _Run:
    """A bounded run in closed loop; also what both loops share."""

    mode = "closed"

    def __init__(
        self, address: tuple[str, int], requests: Sequence[bytes], *, seconds: float, n_max: int
    ) -> None:
        self.address = address
        self.requests = requests
        self.seconds = seconds
        self.n_max = n_max
        self.n_sent = self.n_ok = self.n_non_2xx = self.n_broken = 0
        self.latencies = array("d")
        self.late = array("d")
        self.is_over = False
        self.first = self.last = 0.0
        self.open: set[_Connection] = set()
        self.reopening: set[asyncio.Task[None]] = set()

    async def drive(self, n_connections: int) -> None:
        """Open all connections, send until a bound is met, wait for the last answers."""
        self.loop = asyncio.get_running_loop()
        self.done = self.loop.create_future()
        # Nothing is sent before all are connected: the accepting is not what is measured.
        self.held: list[_Connection] | None = []
        for _ in range(n_connections):
            await self._open()
        held, self.held = self.held, None
        self.first = self.last = time.perf_counter()
        timer = self.loop.call_later(self.seconds, self._time_is_up)
        self.begin(held)
        await self.done
        timer.cancel()
        # uvloop can wait for ever for a connection attempt that was cancelled, so each is let
        # end (on loopback that is at once), and all connections are closed before the loop.
        await asyncio.gather(*self.reopening)
        for connection in list(self.open):
            connection.transport.abort()

    def begin(self, connections: list[_Connection]) -> None:
        for connection in connections:
            self.free(connection, time.perf_counter())

    def free(self, connection: _Connection, now: float) -> None:
        """Give a connection without a request in flight its next one."""
        if self.held is not None:
            self.held.append(connection)
        elif self.is_over:
            self._check()
        else:
            self.send(connection, now)

    def send(self, connection: _Connection, began: float) -> None:
        connection.began = began
        connection.transport.write(self.requests[self.n_sent % len(self.requests)])
        self.n_sent += 1
        if self.n_sent == self.n_max:
            self.is_over = True

    def answered(self, is_ok: bool, latency: float) -> None:
        if is_ok:
            self.n_ok += 1
        else:
            self.n_non_2xx += 1
        self.latencies.append(latency)

    def lost(self, connection: _Connection) -> None:
        """Count what was in flight on a lost connection, and open another in its place."""
        self.open.discard(connection)
        if self.done.done():
            return
        if connection.began >= 0:
            self.n_broken += 1
            connection.began = -1.0
        if self.is_over:
            self._check()
        else:
            task = self.loop.create_task(self._reopen())
            self.reopening.add(task)
            task.add_done_callback(self.reopening.discard)

    async def _open(self) -> None:
        await self.loop.create_connection(lambda: _Connection(self), *self.address)

    async def _reopen(self) -> None:
        try:
            await self._open()
        except OSError:
            if not self.open:  # Nobody listens any more: the time that is left is pointless.
                self.is_over = True
                self._check()

    def _time_is_up(self) -> None:
        self.is_over = True
        self.loop.call_later(_GRACE_S, self._finish)
        self._check()

    def _check(self) -> None:
        """End the run once every request sent is accounted for."""
        if self.n_sent == self.n_ok + self.n_non_2xx + self.n_broken:
            self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.last = time.perf_counter()
            # What is still out was sent and will not be waited for.
            self.n_broken = self.n_sent - self.n_ok - self.n_non_2xx
            self.done.set_result(None)


class _FixedRate(_Run):
    """Open loop: request i is due at the start plus i / rate, and timed from then.

    The moment is waited for by a timer of the kernel's, since uvloop's count whole milliseconds: it
    is met within some tens of microseconds, and no core is kept from who is measured.
    """

    mode = "open"

    def __init__(
        self,
        address: tuple[str, int],
        requests: Sequence[bytes],
        *,
        seconds: float,
        n_max: int,
        rate: float,
    ) -> None:
        super().__init__(
            address, requests, seconds=seconds, n_max=max(1, min(n_max, int(rate * seconds)))
        )
        self.rate = rate
        self.idle: deque[_Connection] = deque()
        self.is_ticking = False
        self.alarm = _Alarm()

    def begin(self, connections: list[_Connection]) -> None:
        self.idle.extend(connections)
        self.loop.add_reader(self.alarm.file, self._rung)
        self._tick()

    def _rung(self) -> None:
        self.alarm.hear()
        self._tick()

    def free(self, connection: _Connection, now: float) -> None:  # noqa: ARG002  # due times decide
        if self.held is not None:
            self.held.append(connection)
            return
        self.idle.append(connection)
        if self.n_sent == self.n_max:
            self._check()
        elif not self.is_ticking:
            self._tick()

    def lost(self, connection: _Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)
        super().lost(connection)

    def _tick(self) -> None:
        """Send what is due, then arrange to be called when the next one is."""
        now = time.perf_counter()
        while self.idle and self.n_sent < self.n_max:
            due = self.first + self.n_sent / self.rate
            if due > now:
                break
            connection = self.idle.popleft()
            if connection.transport.is_closing():
                continue
            self.late.append(now - due)
            self.send(connection, due)
        # Without a free connection the next answer calls again.
        self.is_ticking = bool(self.idle) and self.n_sent < self.n_max
        if self.is_ticking:
            self.alarm.ring_at(self.first + self.n_sent / self.rate)

    def _time_is_up(self) -> None:
        # What is due and unsent still goes out in the grace: dropping it would hide the queue.
        self.loop.call_later(_GRACE_S, self._finish)
        if self.n_sent == self.n_max:
            self._check()


class _Alarm:
    """A timer of the kernel's (`timerfd_create(2)`) for one moment of `time.perf_counter`."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.file = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def ring_at(self, moment: float) -> None:
        """Be readable from this moment on; from now on when it is past."""
        whole, rest = divmod(max(1, int(moment * 1e9)), 1_000_000_000)
        told = (ctypes.c_long * 4)(0, 0, whole, rest)
        if self._libc.timerfd_settime(self.file, _ABSOLUTE, told, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def hear(self) -> None:
        """Not be readable until it rings again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.file, 8)


def run(
    host: str,
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    connections: int = 64,
    seconds: float = 3.0,
    requests_max: int = 1_000_000,
    rate: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Report:
    """Send load from this process and report; `rate` requests a second makes it open loop.

    Raises NotLoopbackError for a host that is not a loopback address, OSError if nobody listens.
    """
    import uvloop

    if not _is_loopback(host):
        raise NotLoopbackError(host)
    built = [_request(host, port, path, body, headers or {}) for body in bodies]
    load: _Run
    if rate is None:
        load = _Run((host, port), built, seconds=seconds, n_max=requests_max)
    else:
        load = _FixedRate((host, port), built, seconds=seconds, n_max=requests_max, rate=rate)
    # Nothing here makes cycles, so a collection would only be a pause in the measurement.
    gc.disable()
    try:
        cpu = time.process_time()
        uvloop.run(load.drive(connections))
        cpu = time.process_time() - cpu
    finally:
        gc.enable()
    seconds = load.last - load.first
    latencies = sorted(load.latencies)
    planned = load.n_max if load.mode == "open" else load.n_sent
    return Report(
        mode=load.mode,
        connections=connections,
        requests=load.n_sent,
        ok=load.n_ok,
        non_2xx=load.n_non_2xx,
        broken=load.n_broken,
        unsent=planned - load.n_sent,
        seconds=seconds,
        requests_per_s=(load.n_ok + load.n_non_2xx) / seconds if seconds else 0.0,
        latency_s={
            "p50": percentile(latencies, 50),
            "p90": percentile(latencies, 90),
            "p99": percentile(latencies, 99),
            "p99.9": percentile(latencies, 99.9),
            "max": percentile(latencies, 100),
        },
        send_late_s_p99=percentile(sorted(load.late), 99),
        cpu_us_per_request=1e6 * cpu / max(1, load.n_sent),
    )


def run_apart(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    connections: int = 64,
    seconds: float = 3.0,
    requests_max: int = 1_000_000,
    rate: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> Report:
    """Do the same in a process of its own, as measurements should."""
    command = [sys.executable, "-m", "bench.load", "--port", str(port), "--path", path]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    command += ["--requests", str(requests_max)]
    command += [] if rate is None else ["--rate", str(rate)]
    command += [f"--header={name}:{value}" for name, value in (headers or {}).items()]
    command += ["--one-body"] if len(bodies) == 1 else []
    result = subprocess.run(
        command,
        input=b"\n".join(bodies),
        stdout=subprocess.PIPE,
        check=True,
        cwd=Path(__file__).parent.parent,
        timeout=seconds + _GRACE_S + 30,
    )
    return Report(**json.loads(result.stdout))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank: the smallest value that at least `percent` of the values do not exceed."""
    if not ordered:
        return 0.0
    rank = -int(-len(ordered) * percent // 100)  # Rounds up.
    return ordered[max(rank, 1) - 1]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # A name: where it leads is decided elsewhere.
        return False


def _request(host: str, port: int, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    name = f"[{host}]" if ":" in host else host
    lines = {"content-type": "application/json", **headers, "content-length": str(len(body))}
    return (
        f"POST {path} HTTP/1.1\r\nhost: {name}:{port}\r\n"
        + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        + "\r\n"
    ).encode() + body


def main() -> None:
    """Send load to a loopback port; bodies come on standard input, one a line, sent in turn."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--requests", type=int, default=1_000_000, help="at most so many")
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--header", action="append", default=[], help="NAME:VALUE")
    parser.add_argument("--one-body", action="store_true", help="lines are not bodies of their own")
    options = parser.parse_args()
    if not _is_loopback(options.host):
        parser.error(str(NotLoopbackError(options.host)))
    given = sys.stdin.buffer.read()
    bodies = [given] if options.one_body and given else given.splitlines()
    if not bodies:
        parser.error("standard input holds no body")
    try:
        report = run(
            options.host,
            options.port,
            options.path,
            bodies,
            connections=options.connections,
            seconds=options.seconds,
            requests_max=options.requests,
            rate=options.rate,
            headers=dict(header.split(":", 1) for header in options.header),
        )
    except OSError as error:
        parser.exit(1, f"{options.host}:{options.port}: {error}\n")
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
