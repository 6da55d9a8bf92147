"""uvicorn with what it lacks: sockets bound early, one write per answer, a quiet and clean end."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from gateway.config import ServerConfig
from gateway.endpoints.predict import DIRECT, is_prediction
from gateway.endpoints.stream import ABORT, is_stream
from gateway.errors import StartError
from gateway.telemetry import event

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_GRACE_S = 30
_HALF_REQUEST_S = 1.0
_JOINED_BYTES_MAX = 65_536


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


class Exchange:
    """One request and its answer in whole pieces: the ASGI extension `driftgate.direct`.

    uvicorn writes head and body apart, and uvloop hands each to the kernel at once: two system
    calls, and two wake-ups of the client, cost more than decoding, routing and running a small
    model together. It also checks every header for characters that this program never writes.
    """

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle: RequestResponseCycle | None = cycle

    def read(self) -> bytes | None:
        """The whole body, once; None while parts of it are missing."""
        cycle = self._cycle
        if cycle is None or cycle.more_body:
            return None
        cycle.flow.resume_reading()
        cycle.message_event.clear()
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    async def write(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Answer, once; headers are lower case and hold no control characters."""
        # The cycle holds the scope and the scope holds this: let go, or only gc could free them.
        cycle, self._cycle = self._cycle, None
        if cycle is None:
            raise RuntimeError("the answer is written already")
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected:
            return
        cycle.response_started = cycle.response_complete = True
        parts = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            if name == b"connection":
                cycle.keep_alive = False
            else:
                parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        if len(body) <= _JOINED_BYTES_MAX:
            parts.append(body)
            cycle.transport.write(b"".join(parts))
        else:  # copying much costs more than a call
            cycle.transport.write(b"".join(parts))
            cycle.transport.write(body)
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()


class Protocol(HttpToolsProtocol):
    """One HTTP connection: uvicorn's, with a shorter way for predictions."""

    _idle_since = 0.0
    _idle_timer: asyncio.TimerHandle | None = None

    def shutdown(self) -> None:
        """End gracefully; who has not sent a whole request a moment later is not waited for."""
        super().shutdown()
        self.loop.call_later(_HALF_REQUEST_S, self._abandon)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def on_headers_complete(self) -> None:
        """Begin a request: a prediction with a plain path without asking uvicorn's URL parser."""
        try:
            path = self.url.decode("ascii")
        except UnicodeDecodeError:
            path = ""
        if "%" in path or "?" in path or not is_prediction(path) or self.parser.should_upgrade():
            super().on_headers_complete()
            if is_prediction(self.scope["path"]):
                self.scope["extensions"] = _direct(self.cycle)
            elif is_stream(self.scope["path"]):
                self.scope["extensions"] = {ABORT: {"now": self.transport.abort}}
            return
        scope, parser = self.scope, self.parser
        http_version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = http_version
        scope["path"], scope["raw_path"], scope["query_string"] = path, self.url, b""
        before = self.cycle
        self.cycle = cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=http_version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        scope["extensions"] = _direct(cycle)
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:  # A pipelined request waits for the answer before it.
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Run the application; the task leaves uvicorn's list itself, not by a callback later."""
        task = self.loop.create_task(self._run(cycle, app))
        self.tasks.add(task)

    async def _run(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        try:
            await cycle.run_asgi(app)
        finally:
            task = asyncio.current_task()
            if task is not None:
                self.tasks.discard(task)

    # One timer a connection watches for idleness; one a request would cost more than routing.

    def on_response_complete(self) -> None:
        """End an answer: begin the next pipelined request, or be idle."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        self._idle_since = time.monotonic()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._check_idle)

    def _check_idle(self) -> None:
        self._idle_timer = None
        if self.transport.is_closing() or not self.cycle.response_complete:
            return  # The next answer arms the timer again.
        left_s = self._idle_since + self.timeout_keep_alive - time.monotonic()
        if left_s <= 0:
            self.transport.close()
        else:
            self._idle_timer = self.loop.call_later(left_s, self._check_idle)

    def _abandon(self) -> None:
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete:
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a client that asks for websockets is answered over HTTP, and that is all."""


def _direct(cycle: RequestResponseCycle) -> dict[str, dict[object, object]]:
    exchange = Exchange(cycle)
    return {DIRECT: {"read": exchange.read, "write": exchange.write}}


class Listener(uvicorn.Server):
    """One server on one inherited socket. Ends with exit code 0 when told to."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                host=config.host,
                port=config.port,
                loop="uvloop",
                http=Protocol,
                proxy_headers=False,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=config.tls_cert or None,
                ssl_keyfile=config.tls_key or None,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
                backlog=_BACKLOG,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as a wish to end; uvicorn would raise them again at the end."""
        before = {
            number: signal.signal(number, self._told) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, _: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True  # the second signal ends now
        else:
            event("stop_asked", logging.INFO, signal=signal.Signals(number).name)
        self.should_exit = True
