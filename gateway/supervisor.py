"""Owns the sockets; starts, watches, replaces and drains workers. Imports no app and no ONNX.

Workers are forks: they inherit sockets and settings, and share what is in memory already. The
supervisor has one thread, which waits for signals, messages and deaths, and decides; it never waits
for a worker. What happens here is written to the log, a line a change.
"""

import ctypes
import errno
import logging
import os
import random
import selectors
import signal
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gateway import __version__, counters
from gateway.config import ServerConfig
from gateway.errors import StartError
from gateway.place import Board, Line, Place
from gateway.telemetry import (
    DEGRADED,
    RESTARTS,
    SUPERVISOR,
    WORKERS,
    Telemetry,
    event,
    start_logging,
)
from registry import catalog
from registry.errors import RegistryError
from registry.store import Lease

Work = Callable[[ServerConfig, Place], int]
"""What a worker does until it ends: the exit code."""

_BACKLOG = 2048
_SILENCE_S_MAX = 5.0
"""A worker that has not gone round its loop for so long is frozen."""
_START_S_MAX = 120.0
"""So long it may take to its first round."""
_BACK_OFF_S = (0.1, 10.0)
_STEADY_S = 10.0
"""Who lived so long had started well: the next one is not held back."""
_DEATHS_MAX = 256
"""Of so many workers it is remembered what ended them: who asks does so within seconds."""
_FAILED_STARTS_MAX = 5
_TICK_S = 0.5
"""Who speaks, ends or is told to end wakes it at once; this is for what must not be silent."""
_END_S_MAX = 2.0
"""Beyond the grace, for what is no request: threads and files."""
_LEASE_S_MAX = 1.0
_SERVERS_MAX = 64
"""Servers of one host on one state directory, each with a run directory of its own."""
_PR_SET_PDEATHSIG = 1
_STOPS = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = (*_STOPS, signal.SIGCHLD, signal.SIGHUP)


def serve(config: ServerConfig, work: Work) -> None:
    """Serve with workers until told to end.

    Raises
    ------
    StartError : a port, a directory or what the first worker found says no; nothing is left over.
    """
    start_logging(config.log.format, config.log.level)
    with bind(config.host, config.port) as listening:
        address = listening.getsockname()[0]
        with _reserved(config) as reserved, _run_dir(config) as (run_dir, problem):
            counters.begin(run_dir)
            settings = replace(config, grpc_port=reserved.port)
            sockets = Sockets(listening, reserved.listening)
            supervisor = Supervisor(settings, work, sockets, address, run_dir, problem)
            supervisor.run()
    event("stopped")


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A listening socket.

    Raises
    ------
    StartError : the port is in use, not allowed, or the host is no address of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise StartError(f"host {host!r}: no such address") from None
    listening = socket.socket(family, kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        why = {
            errno.EADDRINUSE: f"in use by another program; choose one with {flag}",
            errno.EACCES: "not allowed; ports below 1024 need a privilege",
            errno.EADDRNOTAVAIL: "its host is no address of this machine",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
        raise StartError(f"port {port} on {host}: {why}") from None
    listening.setblocking(False)  # noqa: FBT003  the socket module's own signature
    return listening


class Sockets(NamedTuple):
    """What all workers listen on."""

    http: socket.socket
    grpc: socket.socket | None
    """None where the carrier opens one itself, or there is no gRPC."""


class _Reserved(NamedTuple):
    port: int
    listening: socket.socket | None = None


@contextmanager
def _reserved(config: ServerConfig) -> Iterator[_Reserved]:
    """The gRPC port, kept for the workers: grpcio takes no open socket, only a shared port."""
    if config.no_grpc:
        yield _Reserved(config.grpc_port)
        return
    # Once without sharing: two servers on one port would share the calls, without a word.
    probe = bind(config.host, config.grpc_port, "--grpc-port")
    address = probe.getsockname()
    if config.grpc_carrier != "grpcio":
        with probe:
            yield _Reserved(address[1], probe)
        return
    probe.close()
    with socket.socket(probe.family, probe.type) as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            kept.bind(address)
        except OSError:
            raise StartError(
                f"port {address[1]} on {config.host}: in use by another program; choose one with"
                " --grpc-port"
            ) from None
        yield _Reserved(address[1])


@contextmanager
def _run_dir(config: ServerConfig) -> Iterator[tuple[Path, str | None]]:
    """A run directory that is this server's alone, and what is wrong with it.

    Raises
    ------
    StartError : the one named is another server's, or cannot be had.
    """
    if not (config.run_dir or config.state_path.is_dir() or _is_registry(Path(config.registry))):
        # The first worker will say what is wrong; a directory named by mistake is left as it is.
        with tempfile.TemporaryDirectory(prefix="driftgate-run-") as temporary:
            yield Path(temporary), "run_dir"
        return
    try:
        lease = _claimed(config)
    except (OSError, RegistryError) as error:
        if config.run_dir:
            raise StartError(f"run_dir {config.run_dir!r}: {_why(error)}") from None
        # A read-only registry is served all the same.
        event("run_dir_replaced", logging.WARNING, reason=_why(error))
        with tempfile.TemporaryDirectory(prefix="driftgate-run-") as temporary:
            yield Path(temporary), "run_dir"
        return
    try:
        yield lease.path.parent, None
    finally:
        lease.release()


def _claimed(config: ServerConfig) -> Lease:
    """The lock of a run directory; workers inherit it, and hold it until the last one is gone."""
    for directory in _candidates(config):
        directory.mkdir(parents=True, exist_ok=True)
        lease = Lease(directory / "lock")
        # A server that was killed a moment ago leaves when its last worker does.
        until = time.monotonic() + (_LEASE_S_MAX if directory == config.run_path else 0)
        while not lease.acquire():
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        else:
            return lease
    raise StartError(f"run_dir {str(config.run_path)!r}: in use by another server; name another")


def _server(config: ServerConfig, run_dir: Path) -> str:
    """What tells this server from others of its host; the first one needs nothing."""
    if config.run_dir or run_dir.parent != config.run_path.parent:
        return f".{zlib.crc32(str(run_dir.resolve()).encode()):08x}"
    return run_dir.name.removeprefix(config.run_path.name)


def _is_registry(directory: Path) -> bool:
    try:
        return bool(catalog.scan(directory).models)
    except RegistryError:
        return False


def _candidates(config: ServerConfig) -> Iterator[Path]:
    yield config.run_path
    if not config.run_dir:
        for k in range(2, _SERVERS_MAX):
            yield config.run_path.with_name(f"{config.run_path.name}.{k}")


def _why(error: Exception) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


@dataclass(slots=True, eq=False)
class _Worker:
    """One worker process, as seen from here."""

    slot: int
    pid: int
    line: Line
    began: float
    beats: int
    heard: float
    """When it was last seen to go round, on this process's clock."""
    is_beating: bool = False
    is_ready: bool = False
    is_leaving: bool = False
    ends_by: float = float("inf")
    """When it is killed if it has not ended."""
    why: str = ""
    """What ends it, if we do."""
    refusal: str | None = None
    """Why it cannot start, in words for people."""
    follows: "_Worker | None" = None
    """Whose place it takes once it is ready."""


class Supervisor:
    """Keeps so many workers at work."""

    def __init__(
        self,
        config: ServerConfig,
        work: Work,
        sockets: Sockets,
        address: str,
        run_dir: Path,
        problem: str | None,
    ) -> None:
        self._config = config
        self._work = work
        self._sockets = sockets
        self._address = address
        self._run_dir = run_dir
        self._problem = problem
        self._telemetry = Telemetry(run_dir, SUPERVISOR)
        self._telemetry.source(WORKERS, lambda: [((), sum(w.is_ready for w in self._workers))])
        self._telemetry.source(
            DEGRADED, lambda: [(("run_dir",), 1.0)] if self._problem is not None else []
        )
        self._board = Board(2 * config.workers + 1)
        self._workers: list[_Worker] = []
        self._due: list[float] = []
        """When to start the next workers."""
        self._failures = 0
        """Workers in a row that did not live long."""
        self._was_ready = False
        self._port = sockets.http.getsockname()[1]
        self._told = 0
        self._obeyed = 0
        self._signal = ""
        self._ends_by = float("inf")
        self._refusal: str | None = None
        self._round = time.monotonic()
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Start the workers, and look after them until told to end and the last one has.

        Raises
        ------
        StartError : the first workers found a reason that will not change.
        """
        with self._signals():
            self._due = [0.0] * self._config.workers
            while True:
                now = time.monotonic()
                # Who was stopped himself must not take his own silence for that of others.
                if (gap := now - self._round) > 1.0:
                    for worker in self._workers:
                        worker.heard += gap
                self._round = now
                self._obey()
                self._hear()
                self._reap(now)
                self._end_late(now)
                if self._is_stopping:
                    if not self._workers:
                        break
                else:
                    self._look_for_frozen(now)
                    self._start_due(now)
                self._telemetry.refresh()
                self._wait(_TICK_S)
        if self._refusal is not None:
            raise StartError(self._refusal)

    @property
    def _is_stopping(self) -> bool:
        return self._ends_by < float("inf")

    # -- signals and messages

    @contextmanager
    def _signals(self) -> Iterator[None]:
        ear, mouth = socket.socketpair()
        for end in (ear, mouth):
            end.setblocking(False)  # noqa: FBT003  the socket module's own signature
        before = {number: signal.signal(number, self._signalled) for number in _SIGNALS}
        woken = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self._selector.register(ear, selectors.EVENT_READ)
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            ear.close()
            mouth.close()

    def _signalled(self, number: int, _: FrameType | None) -> None:
        """Note it only: the loop may be anywhere. SIGHUP is kept for later, and ends nothing."""
        if number in _STOPS:
            self._told += 1
            self._signal = signal.Signals(number).name

    def _obey(self) -> None:
        if self._told > self._obeyed == 0:
            event("stop_asked", signal=self._signal)
            self._stop(self._config.stop.linger_s + self._config.stop.grace_s + _END_S_MAX)
            self._obeyed = 1
        elif self._told > self._obeyed:
            self._ends_by = 0.0  # the second signal ends now
            self._obeyed = self._told

    def _wait(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.fileobj, socket.socket):
                with suppress(BlockingIOError):
                    key.fileobj.recv(4096)

    def _hear(self) -> None:
        for worker in list(self._workers):
            for message in worker.line.hear()[0]:
                self._heard(worker, message)
            if (beats := self._board.beats(worker.slot)) != worker.beats:
                worker.beats, worker.heard, worker.is_beating = beats, time.monotonic(), True

    def _heard(self, worker: _Worker, message: dict[str, Any]) -> None:
        kind = message.pop("kind")
        if kind == "cannot_start":
            worker.refusal = message["reason"]
        elif kind == "leaving":
            self._let_go(worker)
        elif kind == "recycle" and not self._is_stopping:
            self._recycle(worker, message)
        elif kind == "ready":
            self._is_ready(worker, message)

    def _is_ready(self, worker: _Worker, about: dict[str, Any]) -> None:
        worker.is_ready = True
        took_s = round(time.monotonic() - worker.began, 3)
        if worker.follows is not None:
            self._ask_to_leave(worker.follows)
            worker.follows = None
        if self._was_ready:
            event("worker_ready", worker=worker.slot, pid=worker.pid, seconds=took_s)
        elif sum(each.is_ready for each in self._workers) == self._config.workers:
            self._was_ready = True
            fields: dict[str, Any] = {"release": __version__, **self._urls(), **about}
            if self._config.workers > 1:
                fields["workers"] = self._config.workers
            event("ready" if about["models"] else "no_model_opened", **fields)

    def _urls(self) -> dict[str, str]:
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        scheme = "https" if config.tls_cert else "http"
        urls = {"url": f"{scheme}://{host}:{self._port}"}
        return urls if config.no_grpc else {**urls, "grpc_url": f"{host}:{config.grpc_port}"}

    # -- births

    def _start_due(self, now: float) -> None:
        due, self._due = self._due, [at for at in self._due if at > now]
        for _ in range(len(due) - len(self._due)):
            self._start()

    def _start(self, follows: _Worker | None = None) -> None:
        taken = {worker.slot for worker in self._workers}
        slot = next((k for k in range(self._board.n_slots) if k not in taken), None)
        if slot is None:
            return
        ours, theirs = Line.pair()
        place = Place(
            slot=slot,
            n_workers=self._config.workers,
            run_dir=self._run_dir,
            listening=self._sockets.http,
            grpc_listening=self._sockets.grpc,
            address=self._address,
            board=self._board,
            line=theirs,
            server=_server(self._config, self._run_dir),
            is_joining=self._was_ready,
        )
        parent = os.getpid()
        # A signal between fork and the child's own handlers would be noted here, and lost there.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            self._be_worker(place, ours, parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        theirs.close()
        now = time.monotonic()
        worker = _Worker(slot, pid, ours, now, self._board.beats(slot), now, follows=follows)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ)
        self._telemetry.set_live(str(slot), is_live=True)

    def _be_worker(self, place: Place, ours: Line, parent: int) -> None:
        """Never returns: what is above on the stack is the supervisor's."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            # Ctrl-C goes to all processes of a terminal; the supervisor passes it on.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            _die_with(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._selector.close()
            for line in (ours, *(worker.line for worker in self._workers)):
                line.close()
            code = self._work(self._config, place)
        except BaseException:  # noqa: BLE001  whatever it is, it ends here
            event("worker_failed", logging.ERROR, worker=place.slot, exc=True)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    # -- deaths

    def _reap(self, now: float) -> None:
        """Collect who has ended: also what workers leave behind, where this is process 1."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for worker in [each for each in self._workers if each.pid == pid]:
                for message in worker.line.hear()[0]:
                    self._heard(worker, message)
                self._bury(worker, os.waitstatus_to_exitcode(status), now)

    def _bury(self, worker: _Worker, code: int, now: float) -> None:
        self._selector.unregister(worker.line)
        worker.line.close()
        self._workers.remove(worker)
        self._board.clear(worker.slot)
        self._telemetry.set_live(str(worker.slot), is_live=False)
        self._note_death(worker, code)
        for other in self._workers:
            if other.follows is worker:
                other.follows = None
        if worker.follows is not None:
            worker.follows.why = ""  # It stays.
        if self._is_stopping:
            return
        why = worker.why or ("signal" if code < 0 else "exit")
        is_refused = worker.refusal is not None and not self._was_ready
        if why != "recycled" and not is_refused:
            fields: dict[str, Any] = {"worker": worker.slot, "pid": worker.pid, "reason": why}
            fields["by"] = _cause(code)
            if worker.refusal:
                fields["cannot_start"] = worker.refusal
            event("worker_ended", logging.WARNING, **fields)
        lived_long = worker.is_ready and now - worker.began > _STEADY_S
        self._failures = 0 if lived_long or why == "recycled" else self._failures + 1
        if is_refused or (not self._was_ready and self._failures >= _FAILED_STARTS_MAX):
            self._refusal = worker.refusal or (
                f"{self._failures} workers in a row ended before one was ready"
                f" (the last one by {_cause(code)}); the log says more"
            )
            self._stop(_END_S_MAX)
        else:
            self._replace(now, worker)
        if self._was_ready:
            self._telemetry.counter(RESTARTS, why).add()

    def _note_death(self, worker: _Worker, code: int) -> None:
        """Say what ended a worker, for whoever must lay a request in its hand to a variant."""
        with suppress(OSError):
            deaths = self._run_dir / "deaths"
            deaths.mkdir(exist_ok=True)
            (deaths / str(worker.pid)).write_text(f"{max(-code, 0)} {worker.why}".strip())
            notes = sorted(deaths.iterdir(), key=lambda note: note.stat().st_mtime_ns)
            for note in notes[:-_DEATHS_MAX]:
                note.unlink(missing_ok=True)

    def _replace(self, now: float, worker: _Worker) -> None:
        """Start another one, unless it had been meant to follow one that still serves."""
        if len(self._workers) + len(self._due) >= self._config.workers:
            return
        least_s, most_s = _BACK_OFF_S
        wait_s = min(most_s, least_s * 2 ** max(0, self._failures - 1))
        wait_s *= random.uniform(0.5, 1.0)  # noqa: S311  so that hosts do not start in step
        if worker.refusal is None and self._failures <= 1:
            wait_s = 0.0
        self._due.append(now + wait_s)

    def _look_for_frozen(self, now: float) -> None:
        for worker in self._workers:
            silence_s_max = _SILENCE_S_MAX if worker.is_beating else _START_S_MAX
            if not worker.is_leaving and not worker.why and now - worker.heard > silence_s_max:
                worker.why = "frozen"
                worker.ends_by = 0.0

    def _end_late(self, now: float) -> None:
        """Kill who should have ended by now."""
        for worker in self._workers:
            if now > min(worker.ends_by, self._ends_by):
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

    # -- leaving

    def _stop(self, grace_s: float) -> None:
        """Take nothing new, and end when the workers have."""
        self._ends_by = time.monotonic() + grace_s
        self._due = []
        for listening in self._sockets:
            if listening is not None:
                listening.close()
        for worker in self._workers:
            self._ask_to_leave(worker)

    def _ask_to_leave(self, worker: _Worker) -> None:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGTERM)

    def _let_go(self, worker: _Worker) -> None:
        """It was asked to leave, by us or by somebody else, and drains: another one may come."""
        if worker.is_leaving:
            return
        worker.is_leaving = True
        worker.is_ready = False
        stop = self._config.stop
        now = time.monotonic()
        worker.ends_by = now + stop.linger_s + stop.grace_s + _END_S_MAX
        serving = sum(not other.is_leaving for other in self._workers) + len(self._due)
        if not self._is_stopping and serving < self._config.workers:
            self._due.append(now)

    def _recycle(self, worker: _Worker, about: dict[str, Any]) -> None:
        """Start a successor; when it is ready, this one leaves."""
        if worker.is_leaving or any(other.follows is worker for other in self._workers):
            return
        event("worker_recycled", worker=worker.slot, pid=worker.pid, **about)
        worker.why = "recycled"
        self._start(follows=worker)


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent has ended, however that ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
