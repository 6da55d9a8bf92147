"""uvicorn with what it lacks.

A socket shared in turn, one write per answer, deadlines for what arrives, limits on connections and
headers, a check of the Host header, a quiet and clean end.
"""

import asyncio
import contextlib
import math
import re
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application, HTTPScope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from gateway.acceptor import Acceptor, Guests, Turn, is_loopback
from gateway.config import ServerConfig
from gateway.endpoints.predict import DIRECT, is_prediction
from gateway.endpoints.route import error_body, error_headers
from gateway.endpoints.stream import ABORT, is_stream
from gateway.errors import (
    BadRequestError,
    BusyError,
    GatewayError,
    HeadTooLargeError,
    HostError,
    SlowRequestError,
)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_HALF_REQUEST_S = 1.0
_JOINED_BYTES_MAX = 65_536
_TICKS_A_SECOND = 10
_TICKS_MAX = 864_000
_HOSTS_MAX = 256
_LOCAL_NAMES = ("localhost", "localhost.localdomain")
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9._~-]{1,253})(?::[0-9]{1,5})?")

_HEAD, _BODY, _ANSWER, _IDLE = range(4)
"""What a connection is about: a request's headers, its body, its answer, or nothing."""


class Exchange(RequestResponseCycle):
    """One request for a prediction and its answer: uvicorn's cycle, in whole pieces.

    It is the ASGI extension `driftgate.direct`. uvicorn writes head and body apart, and uvloop
    hands each to the kernel at once: two system calls, and two wake-ups of the client, cost more
    than decoding, routing and running a small model together. It also checks every header for
    characters that this program never writes, and makes an event that hardly any prediction needs.
    """

    access_log = False
    disconnected = response_started = response_complete = False
    more_body = True
    chunked_encoding: bool | None = None
    expected_content_length = 0
    body: bytes | bytearray = b""  # type: ignore[assignment]  # as it came, while in one piece
    has_read = False
    """The whole body was taken at once: all that can come is that the client hangs up."""
    _event: asyncio.Event | None = None
    task: "asyncio.Task[None]"

    def __init__(self, protocol: "Protocol", *, keep_alive: bool) -> None:
        # Not the constructor above: what it sets for each request is true of the class.
        self.scope = protocol.scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.logger = protocol.logger
        self.access_logger = protocol.access_logger
        self.default_headers = protocol.server_state.default_headers
        self.waiting_for_100_continue = protocol.expect_100_continue
        self.on_response = protocol.on_response_complete
        self.keep_alive = keep_alive
        self._tasks = protocol.tasks

    @property
    def message_event(self) -> asyncio.Event:  # type: ignore[override]  # made when it is needed
        """Set when there is something to receive."""
        if self._event is None:
            self._event = asyncio.Event()
            if self.body or not (self.more_body or self.has_read):
                self._event.set()
        return self._event

    def read(self) -> bytes | None:
        """The whole body, once; None while parts of it are missing."""
        if self.more_body:
            return None
        self.flow.resume_reading()
        if self._event is not None:
            self._event.clear()
        self.has_read = True
        body, self.body = self.body, b""
        return bytes(body)

    def take(self, part: bytes) -> None:
        """Add a part of the body."""
        if self.response_complete:
            return
        if not self.body:
            self.body = part
        else:
            if type(self.body) is bytes:
                self.body = bytearray(self.body)
            self.body += part
        if len(self.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        if self._event is not None:
            self._event.set()

    def is_whole(self) -> None:
        """Be told that all of the body has come."""
        self.more_body = False
        if self._event is not None:
            self._event.set()

    async def write(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Answer, once; headers are lower case and hold no control characters."""
        if self.response_started:
            raise RuntimeError("the answer is written already")
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        self.response_started = self.response_complete = True
        parts = [STATUS_LINE[status]]
        for name, value in (*self.default_headers, *headers):
            if name == b"connection":
                self.keep_alive = False
            else:
                parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        if len(body) <= _JOINED_BYTES_MAX:
            parts.append(body)
            self.transport.write(b"".join(parts))
        else:  # copying much costs more than a call
            self.transport.write(b"".join(parts))
            self.transport.write(body)
        if self._event is not None:
            self._event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    async def run(self, app: ASGI3Application) -> None:
        """Let the application answer."""
        try:
            await app(self.scope, self.receive, self.send)
            if not (self.response_complete or self.disconnected):
                self.transport.close()
        except BaseException:  # as uvicorn does: it ends this connection only
            self.logger.exception("Exception in ASGI application")
            if not self.response_started:
                await self.send_500_response()
            else:
                self.transport.close()
        finally:
            # Who holds this is held by it, several times: let go, or only gc could free them.
            self.scope.pop("extensions", None)
            self.on_response = _nothing
            # It leaves uvicorn's list itself, not by a callback a turn later.
            self._tasks.discard(self.task)
            del self.task


def _nothing() -> None:
    """Told of an answer that is over already."""


class Door:
    """Who may come in: what all connections of one listener share."""

    def __init__(self, config: ServerConfig) -> None:
        self.limits = config.limits
        self.guests = Guests(config.limits)
        named = [name.strip().lower() for name in config.hosts.split(",") if name.strip()]
        self._is_any = "*" in named or (not named and not config.is_local)
        self._names = frozenset(named or (*_LOCAL_NAMES, config.host.lower()))
        self._fits: dict[bytes, bool] = {}

    def fits(self, host: bytes) -> bool:
        """Whether a Host header names this server."""
        known = self._fits.get(host)
        if known is None:
            if len(self._fits) >= _HOSTS_MAX:  # They are the clients' own words.
                self._fits.clear()
            known = self._fits[host] = self._judge(host)
        return known

    def _judge(self, host: bytes) -> bool:
        parts = _HOST.fullmatch(host)
        if parts is None:
            return False
        name = parts[1].decode().lower().strip("[]").rstrip(".")
        return self._is_any or name in self._names or _is_own(name, self._names)


class Protocol(HttpToolsProtocol):
    """One HTTP connection: uvicorn's, with a shorter way for predictions, and bounds.

    Times are looked at once a second by `check`: a timer a request would cost more than routing.
    """

    def __init__(self, door: Door, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._scope: HTTPScope = {}  # type: ignore[typeddict-item]  # filled when connected
        """What is the same for all requests of the connection."""
        self._door = door
        self._refusal: GatewayError | None = None
        self._room = 0
        """Bytes that the headers may still have."""
        self._hosts: list[bytes] = []
        self._since = 0.0
        """When the connection, the request that is arriving, or the idle time began."""
        self._phase = _HEAD
        self._received = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let a connection in, unless there are too many."""
        super().connection_made(transport)
        self._scope = {  # type: ignore[typeddict-item]  # the rest differs by request
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
        }
        self._since = time.monotonic()
        address = self.client[0] if self.client else None
        if self._door.guests.is_full(len(self.connections), address):
            self._refuse(BusyError("as many connections are open as may be; retry later"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._door.guests.left(self.client[0] if self.client else None)

    def shutdown(self) -> None:
        """End gracefully; who has not sent a whole request a moment later is not waited for."""
        super().shutdown()
        self.loop.call_later(_HALF_REQUEST_S, self._abandon)

    def check(self, now: float) -> None:
        """End a connection that has kept us waiting for too long.

        Parameters
        ----------
        now : by `time.monotonic`
        """
        if self.transport.is_closing():
            return
        limits, waited_s = self._door.limits, now - self._since
        if self._phase == _IDLE:
            if waited_s > self.timeout_keep_alive:
                self.transport.close()
        elif self.flow.read_paused:
            return  # It is we who are slow.
        elif self._phase == _HEAD:
            if waited_s > limits.head_s_max:
                why = f"no whole headers within {limits.head_s_max:g} s (limits.head_s_max)"
                self._refuse(SlowRequestError(why))
        elif (
            self._phase == _BODY
            and waited_s > limits.body_s_max
            and self._received < limits.body_rate_min * waited_s
            and not is_stream(self.scope["path"])  # A stream has a watch of its own.
        ):
            self._refuse(SlowRequestError(
                f"the body came with less than {limits.body_rate_min} bytes a second for"
                f" {waited_s:.0f} s (limits.body_rate_min)"
            ))  # fmt: skip

    # -- callbacks of the parser

    def on_message_begin(self) -> None:
        """Begin to read a request."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self.scope = self._scope.copy()
        self.scope["headers"] = self.headers
        self._room = self._door.limits.head_bytes_max
        if self._hosts:
            self._hosts = []
        if self._phase != _HEAD:  # The first request has had its time since the connection came.
            self._phase = _HEAD
            self._since = time.monotonic()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header, while there is room for it."""
        self._room -= len(name) + len(value)
        if self._room < 0:
            self._stop(HeadTooLargeError(
                f"the headers are longer than {self._door.limits.head_bytes_max} bytes"
                " (limits.head_bytes_max)"
            ))  # fmt: skip
        name = name.lower()
        if name == b"host":
            self._hosts.append(value)
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Begin a request: a prediction with a plain path without asking uvicorn's URL parser."""
        parser = self.parser
        http_version = parser.get_http_version()
        self._examine(http_version)
        self._phase, self._received = _BODY, 0
        try:
            path = self.url.decode("ascii")
        except UnicodeDecodeError:
            path = ""
        scope = self.scope
        is_plain = is_prediction(path) and "%" not in path and "?" not in path
        if not is_plain or parser.should_upgrade():
            scope["state"] = self.app_state.copy()
            super().on_headers_complete()
            path = scope["path"]
            if is_stream(path):
                scope["extensions"] = {ABORT: {"now": self.transport.abort}}
            return
        scope["method"] = parser.get_method().decode("ascii")
        scope["http_version"] = http_version
        scope["path"], scope["raw_path"], scope["query_string"] = path, self.url, b""
        before = self.cycle
        self.cycle = exchange = Exchange(
            self, keep_alive=http_version != "1.0" and parser.should_keep_alive()
        )
        scope["extensions"] = {DIRECT: exchange}  # type: ignore[dict-item]  # an object of ours
        if before is None or before.response_complete:
            self._start_asgi_task(exchange, self.app)
        else:  # A pipelined request waits for the answer before it.
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self._received += len(body)
        if type(self.cycle) is Exchange:
            self.cycle.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request: from now on we keep the client waiting, and not the other way round."""
        self._phase, cycle = _ANSWER, self.cycle
        if cycle.response_complete:  # It was answered before it had all arrived.
            self._phase, self._since = _IDLE, time.monotonic()
        if type(cycle) is Exchange:
            cycle.is_whole()
        else:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, or was refused while it was read, and close."""
        refusal = self._refusal or BadRequestError("not a request of HTTP/1.1 that can be read")
        self.logger.debug(msg)
        self._refuse(refusal)

    def _examine(self, http_version: str) -> None:
        """Refuse a request by its headers alone."""
        limits = self._door.limits
        if len(self.headers) > limits.headers_max:
            self._stop(HeadTooLargeError(
                f"more than {limits.headers_max} headers (limits.headers_max)"
            ))  # fmt: skip
        if len(self.url) * 2 > limits.head_bytes_max:
            self._stop(HeadTooLargeError(
                f"the path is longer than {limits.head_bytes_max // 2} bytes"
                " (half of limits.head_bytes_max)"
            ))  # fmt: skip
        hosts = self._hosts
        if len(hosts) != 1 and (hosts or http_version != "1.0"):
            self._stop(HostError("a request has one Host header"))
        if hosts and not self._door.fits(hosts[0]):
            self._stop(HostError("the Host header names another server; see the setting 'hosts'"))
        if not self.url.startswith(b"/") and self.url != b"*":
            named = urlsplit(self.url.decode("latin-1")).netloc.encode("latin-1")
            if not self._door.fits(named):
                self._stop(HostError("the request is for another server"))

    def _stop(self, error: GatewayError) -> NoReturn:
        """Leave the parser; uvicorn then has the request answered as one that is none."""
        self._refusal = error
        raise error

    def _refuse(self, error: GatewayError) -> None:
        """Answer on the bare connection, and close it."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._phase == _HEAD:  # The request before has its answer first; it is the last.
                cycle.keep_alive = False
                self.flow.pause_reading()
                return
            cycle.disconnected = True  # Whoever waits for the rest is told that it is over.
            cycle.message_event.set()
        is_begun = cycle is not None and cycle.response_started and not cycle.response_complete
        if not is_begun and not self.transport.is_closing():
            content = error_body(error)
            headers = {"content-type": "application/json", **error_headers(error)}
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(
                STATUS_LINE[error.status]
                + lines.encode()
                + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(content)
                + content
            )
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Run the application; the task leaves uvicorn's list itself, not by a callback later."""
        if type(cycle) is Exchange:
            cycle.task = task = self.loop.create_task(cycle.run(app))
        else:
            task = self.loop.create_task(self._run(cycle, app))
        self.tasks.add(task)

    async def _run(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        try:
            await cycle.run_asgi(app)
        finally:
            task = asyncio.current_task()
            if task is not None:
                self.tasks.discard(task)

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
        if self._phase == _ANSWER:
            self._phase = _IDLE
            self._since = time.monotonic()

    def _abandon(self) -> None:
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete:
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a client that asks for websockets is answered over HTTP, and that is all."""


def _is_own(name: str, names: frozenset[str]) -> bool:
    """Whether an address names this machine, where the machine's own names are taken."""
    return "localhost" in names and is_loopback(name)


class Listener(uvicorn.Server):
    """One server on one inherited socket. Ends with exit code 0 when told to."""

    ticks = 5
    """Tenths of a second between two ticks; a divisor of ten."""

    def __init__(self, app: ASGIApp, config: ServerConfig, turn: "Turn | None" = None) -> None:
        """Listen for an application.

        Parameters
        ----------
        turn : when to take a connection; None: nobody else listens on the socket
        """
        door = Door(config)
        self._turn = turn
        self._acceptors: list[Acceptor] = []
        self._stirred: asyncio.Future[None] | None = None
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
                host=config.host,
                port=config.port,
                loop="uvloop",
                http=partial(Protocol, door),  # type: ignore[arg-type]  # called, never subclassed
                proxy_headers=False,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=config.tls_cert or None,
                ssl_keyfile=config.tls_key or None,
                ssl_ca_certs=config.tls_client_ca or None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if config.tls_client_ca else ssl.CERT_NONE,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(config.stop.grace_s),
                backlog=_BACKLOG,
            )
        )

    async def main_loop(self) -> None:
        """uvicorn's, which counts tenths of a second; without its waking for each of them."""
        counter = 0
        while not await self.on_tick(counter):
            await self._rest(self.ticks / _TICKS_A_SECOND)
            counter = (counter + self.ticks) % _TICKS_MAX

    async def _rest(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._stirred = loop.create_future()
        timer = loop.call_later(timeout_s, self.stir)
        try:
            await self._stirred
        finally:
            timer.cancel()

    def stir(self) -> None:
        """Tick now."""
        if self._stirred is not None and not self._stirred.done():
            self._stirred.set_result(None)

    async def on_tick(self, counter: int) -> bool:
        """Look after connections that keep us waiting, once a second."""
        if counter % _TICKS_A_SECOND == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.check(now)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then take connections: all there are, or in turn with others."""
        if self._turn is None or sockets is None:
            await super().startup(sockets)
            return
        await super().startup([])
        self._acceptors = [
            Acceptor(listening, self.new_protocol, self.config.ssl, self._turn)
            for listening in sockets
        ]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end those that there are."""
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets)

    def new_protocol(self) -> asyncio.Protocol:
        """For one more connection."""
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM as a wish to end; uvicorn would raise it again at the end.

        SIGINT is the supervisor's: a terminal sends it to everybody.
        """
        before = signal.signal(signal.SIGTERM, self.told)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def told(self, number: int, _: FrameType | None) -> None:
        """End, gracefully; who wants it to end now ends the process."""
        del number
        self.should_exit = True
        self.stir()
