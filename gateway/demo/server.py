"""A real server for the demo, as `driftgate serve` runs it, in a process that never outlives it.

Run as a program it is that process; imported, it starts one and ends it.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from gateway.demo.sample import model_path, profile_path
from gateway.errors import GatewayError, StartError

MODEL = "flights"
INFER = f"/v2/models/{MODEL}/infer"
TRAINED_ON = "january_march"

_READY_S_MAX = 20.0
_END_S_MAX = 8.0
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and where it may be reached."""

    url: str
    port_note: str
    """Why it is not at the port asked for; empty if it is."""
    ready_s: float
    """From its start to its readiness."""
    folder: Path
    """Holds its registry; removed with it."""
    process: "subprocess.Popen[bytes]"

    @property
    def last_words(self) -> str:
        """What it logged last, for when it ended although nobody asked it to."""
        lines = (self.folder / "server.log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"


@contextlib.contextmanager
def running(port: int, window_rows: int, budget_rows: int) -> Iterator[Server]:
    """Serve the first model of the demo until the block is left, however it is left.

    Raises
    ------
    StartError : the server ended or did not become ready in time; with what it said.
    """
    made = tempfile.TemporaryDirectory(prefix="driftgate-demo-", ignore_cleanup_errors=True)
    folder = Path(made.name)
    process: subprocess.Popen[bytes] | None = None
    note = ""
    try:
        _fill(folder / "models" / MODEL / "1")
        start = time.monotonic()
        with _undisturbed():
            process = _start(folder, port, window_rows, budget_rows)
        try:
            url = _ready(process, folder / "server.log")
        except StartError:
            if not (note := _why_not(port)):
                raise
            with _undisturbed():
                process = _start(folder, 0, window_rows, budget_rows)
            url = _ready(process, folder / "server.log")
        yield Server(url, note, time.monotonic() - start, folder, process)
    finally:
        # A second Ctrl-C must not leave half of it behind; this is bounded in time.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
        if process is not None:
            _end(process)
        made.cleanup()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C wait, so that a process just started is known to those who end it."""
    told: list[int] = []
    before = {n: signal.signal(n, lambda number, _: told.append(number)) for n in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        signal.raise_signal(told[0])


def _why_not(port: int) -> str:
    """Why the port cannot be had, or nothing."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
            tried.listen()
        except OSError as error:
            return f"port {port} cannot be had ({(error.strerror or '').lower()}): took a free one"
    return ""


def _fill(version: Path) -> None:
    version.mkdir(parents=True)
    shutil.copyfile(model_path(TRAINED_ON), version / "model.onnx")
    shutil.copyfile(profile_path(TRAINED_ON), version / "reference.json")


def _start(
    folder: Path, port: int, window_rows: int, budget_rows: int
) -> "subprocess.Popen[bytes]":
    # Settings of the user's own servers are not meant for this one.
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DRIFTGATE_")}
    arguments = [str(os.getpid()), str(folder), str(port), str(window_rows), str(budget_rows)]
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603  this interpreter, and arguments made here
            [sys.executable, "-P", "-m", "gateway.demo.server", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            start_new_session=True,  # Ctrl-C is for the demo, which ends the server in good order.
        )


def _ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The URL that the server says it is ready at."""
    deadline = time.monotonic() + _READY_S_MAX
    said: list[str] = []
    while time.monotonic() < deadline:
        is_over = process.poll() is not None
        said = log.read_text(errors="replace").splitlines()
        for line in said:
            with contextlib.suppress(orjson.JSONDecodeError):
                record = orjson.loads(line)
                if record.get("event") == "ready":
                    return str(record["url"])
        if is_over:
            break
        time.sleep(0.02)
    why = said[-1] if said else "it said nothing"
    raise StartError(f"the demo's server did not become ready: {why}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_END_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(parent: int, folder: Path, port: int, window_rows: int, budget_rows: int) -> None:
    """Serve, and end when the parent does: then nobody else tidies up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        if os.getppid() == parent:  # It may have ended before the line above.
            from gateway import config, supervisor, worker  # noqa: PLC0415  only as a program

            flags = {
                "registry": str(folder / "models"),
                "port": port,
                "no_grpc": True,
                "monitor.window_rows": window_rows,
                "monitor.budget_rows": budget_rows,
                "labels.sample": 100,  # Whether flights were late is told for some of them.
                "sync.settle_s": 0.0,  # Its files are complete: _fill has written them.
                "log.format": "json",
            }
            supervisor.serve(config.load(flags), worker.run)
    except GatewayError as error:
        sys.exit(str(error))
    finally:
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]))
