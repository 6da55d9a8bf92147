"""Servers under measurement: start one, wait until it is ready, read what it used.

CPU and memory come from /proc and cover the process, its threads and all its descendants, so that
a server that forks is charged for its workers.
"""

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench import BenchError

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class ServerError(BenchError):
    """A server ended, or was not ready, before its deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server on a loopback port."""

    pid: int
    port: int
    ready_s: float
    """From the start of the process to its first good answer."""


@contextmanager
def serve(
    command: Sequence[str],
    *,
    port: int,
    ready_path: str,
    ready_s_max: float = 30.0,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Iterator[Server]:
    """Run `command`, yield once `ready_path` answers 200, end it and its descendants at exit.

    Raises ServerError with the last lines the server wrote if it ends or is late.
    """
    # A file takes any amount of log without making the server wait, which a pipe would not.
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, log, port, ready_path, began + ready_s_max)
            yield Server(pid=process.pid, port=port, ready_s=time.perf_counter() - began)
        finally:
            _end(process)


def free_port() -> int:
    """Find a loopback port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(port: int, path: str) -> bool:
    """Whether a GET is answered with 200 right now."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def tree(pid: int) -> list[int]:
    """List a process and all its descendants that are alive or not yet waited for."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for member in found:  # Grows while it is walked: breadth first.
        found += children.get(member, [])
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds, user and system, that a process tree has used since it began.

    A descendant that has ended is in the sums of the parent that waited for it. The kernel
    reports ticks of 10 ms: measure over a second or more.
    """
    ticks = 0
    for member in tree(pid):
        if fields := _stat(member):
            ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return ticks * _TICK_S


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process tree: shared pages count once, split among their users."""
    total = 0
    for member in tree(pid):
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text("ascii")
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has ended since the tree was listed.
        total += next(
            (int(line.split()[1]) * 1024 for line in rollup.splitlines() if line[:4] == "Pss:"), 0
        )
    return total


def machine_cpu_s() -> float:
    """CPU seconds that all of this machine, or its host in its stead, has used since boot."""
    fields = Path("/proc/stat").read_text("ascii").split(maxsplit=9)[1:9]
    user, nice, system, _idle, _waiting, interrupt, soft_interrupt, stolen = map(int, fields)
    return (user + nice + system + interrupt + soft_interrupt + stolen) * _TICK_S


def settle(pid: int, *, quiet_s: float = 0.2, settle_s_max: float = 2.0) -> None:
    """Wait until a tree has stopped working, so that work left for later is measured as well."""
    deadline = time.monotonic() + settle_s_max
    used, since = cpu_s(pid), time.monotonic()
    while (now := time.monotonic()) < deadline and now - since < quiet_s:
        time.sleep(0.02)
        if (current := cpu_s(pid)) > used:
            used, since = current, time.monotonic()


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; none if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()  # The second field is a name that may hold anything.


def _wait_until_ready(
    process: subprocess.Popen[bytes], log: IO[bytes], port: int, path: str, deadline: float
) -> None:
    while not is_ready(port, path):
        if process.poll() is not None:
            raise ServerError(f"ended with {process.returncode} before it was ready: {_tail(log)}")
        if time.perf_counter() > deadline:
            raise ServerError(f"not ready at its deadline: {_tail(log)}")
        time.sleep(0.005)
    # Another process may have taken the port first, and would be the one that answered.
    if process.poll() is not None:
        raise ServerError(f"ended with {process.returncode}: {_tail(log)}")


def _tail(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
    return log.read().decode("utf-8", "replace").strip() or "(it wrote nothing)"


def _end(process: subprocess.Popen[bytes], *, drain_s_max: float = 10.0) -> None:
    """Ask the server to stop, then end whatever is left of its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(drain_s_max)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
