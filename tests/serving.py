"""Real servers for tests: the command `driftgate serve` in a process of its own, on a free port."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

DRIFTGATE = str(Path(sys.executable).with_name("driftgate"))
START_S_MAX = 30.0
STOP_S_MAX = 30.0
FAILURES = ("request_failed", "observer_failed", "load_failed")
"""Events that a server logs when driftgate itself is at fault; a test that expects one says so."""


class Server:
    """One running server, and what it has written to standard error."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self.url = ""
        self.code: int | None = None
        self.lines: list[str] = []
        self._heard = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        number, rest = self.process.stderr.fileno(), b""
        while select.select([number], [], []):
            with self._heard:  # Whoever finds the pipe empty finds all in the lines.
                data = os.read(number, 1 << 16)
                *whole, rest = (rest + data).split(b"\n")
                if rest and not data:
                    whole, rest = [rest], b""
                self.lines += [line.decode("utf-8", "replace") for line in whole]
                self._heard.notify_all()
            if not data:
                return

    def _catch_up(self) -> None:
        """Wait until all that the server has written by now is read; it may be far ahead."""
        assert self.process.stderr is not None
        until = time.monotonic() + 1
        with self._heard:
            while self._reader.is_alive() and time.monotonic() < until:
                if not select.select([self.process.stderr], [], [], 0)[0]:
                    return
                self._heard.wait(0.01)

    @property
    def stderr(self) -> str:
        """Everything written so far."""
        return "\n".join(self.lines)

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Log lines with one of these events, in order."""
        self._catch_up()
        found = []
        for line in list(self.lines):
            with suppress(json.JSONDecodeError):
                event = json.loads(line)
                if event["event"] in names:
                    found.append(event)
        return found

    def wait_for(self, *names: str, timeout_s: float = START_S_MAX) -> dict[str, Any]:
        """The first log line with one of these events, as soon as it is there."""
        until = time.monotonic() + timeout_s
        with self._heard:
            while True:
                if found := self.events(*names):
                    return found[0]
                left = until - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    raise AssertionError(f"no event {names} came; stderr:\n{self.stderr}")
                self._heard.wait(min(left, 0.5))

    def client(self, **options: Any) -> httpx.Client:
        """A client of this server."""
        return httpx.Client(**{"base_url": self.url, "timeout": 20, "trust_env": False, **options})

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for sockets."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, unless it was asked before; its exit code."""
        if self.code is None:
            assert self.process.poll() is None, f"the server died:\n{self.stderr}"
            self.process.send_signal(number)
            self.code = self.process.wait(STOP_S_MAX)
            self.join()
        return self.code

    def join(self) -> None:
        """Wait until all that it has written is read."""
        self._reader.join(5)


@contextmanager
def serve(
    registry: Path,
    settings: Mapping[str, object] | None = None,
    *,
    flags: tuple[str, ...] = ("--port", "0"),
    is_ready: bool = True,
    expected_failures: tuple[str, ...] = (),
) -> Iterator[Server]:
    """A server of a registry, with settings by key (`limits.timeout_s`).

    At the end it must stop by SIGTERM with exit code 0, and must not have logged a fault of its
    own, unless that is among `expected_failures`.
    """
    environ = environment(settings)
    command = [DRIFTGATE, "serve", str(registry), "--log-format", "json", *flags]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        server = Server(process)
        try:
            if is_ready:
                server.url = server.wait_for("ready", "no_model_opened")["url"]
            yield server
            assert server.stop() == 0, server.stderr
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            server.join()
        faults = [e for e in server.events(*FAILURES) if e["event"] not in expected_failures]
        assert not faults, f"the server logged faults of its own: {faults[:3]}"


def environment(settings: Mapping[str, object] | None = None) -> dict[str, str]:
    """This process's environment without driftgate's own variables, plus these settings.

    gRPC listens on a free port, and what tests have just written is complete, unless a setting or
    flag says otherwise.
    """
    kept = {name: text for name, text in os.environ.items() if not name.startswith("DRIFTGATE_")}
    kept["DRIFTGATE_GRPC_PORT"] = "0"
    kept |= {"DRIFTGATE_SYNC_SETTLE_S": "0", "DRIFTGATE_SYNC_START_S_MAX": "60"}
    given = {
        f"DRIFTGATE_{key.replace('.', '_').upper()}": str(value)
        for key, value in (settings or {}).items()
    }
    return kept | given


def driftgate(
    *words: str, settings: Mapping[str, object] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """One command, run to its end."""
    return subprocess.run(
        [DRIFTGATE, *words],
        env=environment(settings),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def tensor(name: str, datatype: str, shape: list[int], data: Any) -> dict[str, Any]:
    """One input of a request."""
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def request(*tensors: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request body."""
    return {"inputs": list(tensors), **more}


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Any, what: str, timeout_s: float = 10.0) -> Any:
    """The first true value of `condition()`, asked again and again until the deadline."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, f"after {timeout_s} s still not: {what}"
        time.sleep(0.02)
    return value
