"""The process that forks a child for each first look, kept for a while between two of them.

Python, numpy and onnxruntime take 0.3 s of CPU to start, and a look at a small model a thirtieth of
that. So a process that has imported them, and has opened no file, stays for whoever looks at
several models. It ends with the process that started it, or when that has not asked for a minute.
"""

import atexit
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import msgspec

IDLE_S = 60.0
"""How long one waits for the next look."""
REQUEST_BYTES_MAX = 1 << 16
_REPLY_BYTES_MAX = 4096
_WRITTEN_BYTES_MAX = 16 << 20
_CHILD = ("-P", "-m", "gateway.admission.child")


class Request(msgspec.Struct, frozen=True):
    """What a child is to look at, and its bounds; the pipe for what it says comes along."""

    file: str
    memory_bytes: int
    seconds: float


class Reply(msgspec.Struct, frozen=True):
    """A child has ended: with this exit status, or by the signal of this number below 0."""

    code: int


@dataclass(frozen=True, slots=True)
class Looked:
    """What a child wrote, and how it ended."""

    written: bytes
    code: int
    is_late: bool = False


class ForkServer:
    """One such process, for one look at a time."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [sys.executable, *_CHILD, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def is_over(self) -> bool:
        """Whether it can look no more."""
        return self._line.fileno() < 0

    def look(self, request: Request, deadline: float) -> Looked | None:
        """Have a child look; None: the process was gone before it could be asked.

        Whatever keeps the child from ending by itself, and in time, ends it with its fork server.

        Parameters
        ----------
        deadline : on the monotonic clock
        """
        try:
            return self._look(request, deadline)
        except BaseException:
            self.end()
            raise

    def _look(self, request: Request, deadline: float) -> Looked | None:
        pipe, theirs = os.pipe()
        written = bytearray()
        with open(pipe, "rb", buffering=0) as lines:  # noqa: PTH123  a pipe has no path
            try:
                socket.send_fds(self._line, [msgspec.json.encode(request)], [theirs])
            except OSError:
                self.end()
                return None
            finally:
                os.close(theirs)
            while len(written) < _WRITTEN_BYTES_MAX and _is_readable(lines.fileno(), deadline):
                data = lines.read(1 << 16)
                if not data:
                    break
                written += data
        if len(written) < _WRITTEN_BYTES_MAX and _is_readable(self._line.fileno(), deadline):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                reply = msgspec.json.decode(self._line.recv(_REPLY_BYTES_MAX), type=Reply)
                return Looked(bytes(written), reply.code)
        is_late = time.monotonic() >= deadline
        return Looked(bytes(written), self.end(), is_late)

    def end(self) -> int:
        """End it, and the child that it may have; its exit status, as of `subprocess`."""
        self.leave()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def leave(self) -> None:
        """Hold no end of its line any more; without one it ends by itself."""
        self._line.close()


class _Kept:
    """The fork servers of this process: those at work, and one at most that waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._working: set[ForkServer] = set()
        self._waiting: ForkServer | None = None
        self._timer: threading.Timer | None = None

    def look(self, request: Request, seconds: float) -> Looked:
        """Have a child look, forked from the one that waits, or else from a new one."""
        deadline = time.monotonic() + seconds
        while True:
            server, is_new = self._take()
            try:
                looked = server.look(request, deadline)
            finally:
                self._give_back(server)
            if looked is not None:
                return looked
            if is_new:
                return Looked(b"", server.end())

    def _take(self) -> tuple[ForkServer, bool]:
        with self._lock:
            server, self._waiting = self._waiting, None
            if self._timer is not None:
                self._timer.cancel()
            if is_new := server is None:
                server = ForkServer()
            self._working.add(server)
        return server, is_new

    def _give_back(self, server: ForkServer) -> None:
        with self._lock:
            self._working.discard(server)
            if server.is_over:
                return
            if self._waiting is None:
                self._waiting = server
                self._timer = threading.Timer(IDLE_S, self.end)
                self._timer.daemon = True
                self._timer.start()
                return
        server.end()

    def end(self) -> None:
        """End the one that waits."""
        with self._lock:
            server, self._waiting = self._waiting, None
        if server is not None:
            server.end()

    def forget(self) -> None:
        """After a fork, in the new process: they are not ours, and must not live as long as we."""
        for server in (*self._working, self._waiting):
            if server is not None:
                server.leave()
        self._lock = threading.Lock()
        self._working, self._waiting, self._timer = set(), None, None


_kept = _Kept()
look, end = _kept.look, _kept.end
atexit.register(end)
os.register_at_fork(after_in_child=_kept.forget)


def _is_readable(file: int, deadline: float) -> bool:
    """Wait until there is something to read, or the end of it; False at the deadline."""
    waiting = select.poll()
    waiting.register(file, select.POLLIN)
    return bool(waiting.poll(max(0.0, deadline - time.monotonic()) * 1e3))


def _environment() -> dict[str, str]:
    """What Python and onnxruntime go by, and nothing that may be a secret."""
    told = {
        name: value
        for name, value in os.environ.items()
        if name in {"PATH", "LANG", "TMPDIR"}
        or name.startswith(("LC_", "LD_", "PYTHON", "ORT_", "OMP_"))
    }
    return told | {"OPENBLAS_NUM_THREADS": "1"}  # no threads of its own: it is forked
