"""Carries the calls over HTTP/2 by zttp, on the worker's own event loop: the other carrier.

Same handlers, bounds, statuses and sentences as `carrier`, for about a quarter of the CPU; why it
is not the default is in docs/decisions/0029-grpc-over-http2.md.
"""

import asyncio
import importlib.metadata
import logging
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from gateway.acceptor import Acceptor, Guests, Turn
from gateway.access import SCOPES, Access, Caller, Scope
from gateway.config import ServerConfig
from gateway.errors import GatewayError, StartError
from gateway.grpc import health, reflection, service, wire
from gateway.grpc.exchange import Call, GoneError, Route
from gateway.grpc.health import Health
from gateway.grpc.reflection import Reflection
from gateway.grpc.service import Asked, Service
from gateway.prediction import DataPlane, Head
from gateway.router import Headers, wanted_of
from gateway.telemetry import event

ZTTP = "0.0.35"
"""The one release whose limits `connection` stays below; each may have others."""

try:
    from gateway.grpc.connection import Connection

    found = importlib.metadata.version("zttp")
except ImportError:
    found = "none"
if found != ZTTP:
    raise StartError(
        f"grpc_carrier = 'zttp' needs zttp {ZTTP} and found {found}: pip install 'driftgate[http2]'"
    )

_BACKLOG = 2048
_GRACE_S = 30.0
_LOOK_EVERY_S = 1.0
_LOOK_EVERY_S_AT_END = 0.1
_DEADLINE_GRACE_S = 0.01
"""The batcher drops late rows itself, and counts them as late; this is for whatever else waits."""
_ID = b"x-request-id"
_ID_LENGTH_MAX = 128
_DECISION = b"x-driftgate-decision"
_COMMON = frozenset((
    b"te", b"content-type", b"host", b"user-agent", b"grpc-accept-encoding", b"accept-encoding",
    b"grpc-timeout", b"grpc-encoding",
))  # fmt: skip
"""What most calls have; routes look at none of it."""


class HTTP2Carrier:
    """One gRPC server of one worker.

    Parameters
    ----------
    listening : the socket; of all workers, if `turn` is given
    turn : when to take a connection; None: nobody else listens on the socket
    """

    def __init__(
        self, plane: DataPlane, access: Access, listening: socket.socket, turn: Turn | None = None
    ) -> None:
        limits = plane.config.limits
        self._config = plane.config
        self._plane = plane
        self._access = access
        self._listening = listening
        self._turn = turn
        self._service = Service(plane, access)
        self._health = Health(plane, (service.NAME,))
        self._reflection = Reflection((service.NAME, health.NAME, *reflection.NAMES))
        self.routes = self._routes()
        """What answers each path."""
        self.message_bytes_max = limits.grpc_message_bytes_max
        self.head_s_max = limits.head_s_max
        self.connections: set[Connection] = set()
        self.is_stopping = False
        self._n_calls = 0
        self._guests = Guests(limits)
        self._acceptor: Acceptor | None = None
        self._server: asyncio.AbstractServer | None = None
        self._looking: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    @property
    def n_connections(self) -> int:
        """How many are open here."""
        return len(self.connections)

    async def start(self) -> None:
        """Take connections.

        Raises
        ------
        StartError : the certificate is none.
        """
        loop = asyncio.get_running_loop()
        tls = _tls(self._config)
        self._looking = loop.create_task(self._look())
        if self._turn is not None:
            self._acceptor = Acceptor(self._listening, lambda: Connection(self), tls, self._turn)
            return
        self._server = await loop.create_server(
            lambda: Connection(self),
            sock=self._listening,
            ssl=tls,
            backlog=_BACKLOG,
            ssl_handshake_timeout=self.head_s_max if tls else None,
        )

    async def stop(self) -> None:
        """Take nothing new, answer what is in flight, end; may be asked for twice."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self.is_stopping = True
        if self._acceptor is not None:
            self._acceptor.close()
        if self._server is not None:
            self._server.close()
        self._health.close()
        await self._service.close()
        for connection in list(self.connections):
            connection.go_away()
        until = time.monotonic() + _GRACE_S
        while self.connections and time.monotonic() < until:
            for connection in list(self.connections):
                connection.check(time.monotonic())
            await asyncio.sleep(_LOOK_EVERY_S_AT_END)
        for connection in list(self.connections):
            connection.end()
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.check(now)

    # -- what connections share

    def may_open(self, connection: Connection) -> bool:
        """Whether there is room for one more connection; it counts from now on."""
        self.connections.add(connection)
        return not self._guests.is_full(len(self.connections), connection.address)

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self.connections.discard(connection)
        self._guests.left(connection.address)

    def enter(self) -> bool:
        """Whether there is room for one more call; it counts from now on."""
        if self._n_calls >= self._config.limits.grpc_calls_max:
            return False
        self._n_calls += 1
        return True

    def leave(self) -> None:
        """Forget a call."""
        self._n_calls -= 1

    def route(self, path: bytes) -> Route | None:
        """What answers a path."""
        return self.routes.get(path)

    async def run(self, call: Call) -> None:
        """Answer a call, whatever happens."""
        try:
            await call.route.answer(call)
        except GatewayError as error:
            _refuse(call, error)
        except GoneError:
            pass
        except asyncio.CancelledError:
            if not call.is_expired:
                raise
            call.finish("DEADLINE_EXCEEDED", "the deadline is over", [])
        except Exception:  # noqa: BLE001  no trace may reach a client
            event("request_failed", logging.ERROR, path=call.route.name, exc=True)
            _refuse(call, GatewayError("internal error; the server's log says more"))

    # -- calls

    def _routes(self) -> dict[bytes, Route]:
        found = {
            f"/{service.NAME}/{name}": self._unary(name, call.scope, call.answer)
            for name, call in self._service.calls.items()
        }
        found[f"/{service.NAME}/ModelInfer"] = Route(
            "ModelInfer", self._infer, grace_s=_DEADLINE_GRACE_S
        )
        found[f"/{service.NAME}/ModelStreamInfer"] = Route(
            "ModelStreamInfer", self._stream_infer, is_unary=False
        )
        found[f"/{health.NAME}/Check"] = self._unary("Check", "open", self._health.check)
        found[f"/{health.NAME}/Watch"] = Route("Watch", self._watch)
        for name in reflection.NAMES:
            found[f"/{name}/ServerReflectionInfo"] = Route(
                "ServerReflectionInfo", self._reflect, is_unary=False
            )
        return {path.encode(): route for path, route in found.items()}

    def _unary(self, name: str, scope: Scope, answer: Callable[[bytes], Awaitable[bytes]]) -> Route:
        if scope not in SCOPES:
            raise ValueError(f"{name}: no scope {scope!r}")

        async def called(call: Call) -> None:
            _echo_id(call)
            self._guard(scope, call.headers)
            await call.give(await answer(await call.message()), [])

        return Route(name, called)

    async def _infer(self, call: Call) -> None:
        head = Head(None, None, _left_s(call), None)
        for name, _ in call.headers:
            if name not in _COMMON:
                head.request_id = _echo_id(call)
                head.headers = wire.metadata(call.headers)
                head.wanted = wanted_of(head.headers)
                break
        made: Headers = ()
        if not head.request_id:
            head.request_id = self._plane.ids.make()
            made = ((_ID, head.request_id),)
        try:
            head.caller = self._guard("predict", call.headers).name
            answer = await self._service.infer(await call.message(), head)
        except GatewayError as error:
            _refuse(call, error, head.decision, made)
            return
        await call.give(answer, [(_DECISION, head.decision), *made])

    async def _stream_infer(self, call: Call) -> None:
        request_id = _echo_id(call)
        if not request_id:
            request_id = self._plane.ids.make()
            call.initial.append((_ID, request_id))
        caller = self._guard("predict", call.headers)
        asked = Asked(wire.metadata(call.headers), caller.name, request_id)
        call.begin()  # A client may wait for the id before it sends anything.
        call.push()
        answers = self._service.stream(call.read(), lambda: _left_s(call), asked)
        await _send(answers, call)

    async def _watch(self, call: Call) -> None:
        await _send(self._health.watch(await call.message()), call)

    async def _reflect(self, call: Call) -> None:
        self._guard("predict", call.headers)
        await _send(self._reflection.stream(call.read()), call)

    def _guard(self, scope: Scope, headers: Headers) -> Caller:
        """Who calls, or raise what `Access.authorise` raises."""
        credentials = None
        for name, value in headers:
            if name == b"authorization":
                credentials = value
        return self._access.authorise(scope, credentials)


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
        if config.tls_client_ca:
            context.load_verify_locations(config.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError):  # SSLError is an OSError.
        raise StartError("tls_cert, tls_key and tls_client_ca: cannot be read") from None
    context.set_alpn_protocols(["h2"])
    return context


def _left_s(call: Call) -> float | None:
    """Time that the client gives the call from now on."""
    if call.deadline is None:
        return None
    return max(0.0, call.deadline - asyncio.get_running_loop().time())


def _echo_id(call: Call) -> bytes:
    """Give a request's id back before the answer, if it has one."""
    for name, value in call.headers:
        if name == _ID and len(value) <= _ID_LENGTH_MAX and wire.is_plain(value):
            call.initial.append((_ID, value))
            return value
    return b""


async def _send(answers: AsyncGenerator[bytes, None], call: Call) -> None:
    """Send one answer after the other, each when the client has room for it; then that all is well.

    A call that is cancelled while it sends leaves the answers behind: they must end as well.
    """
    async with aclosing(answers):
        async for answer in answers:
            await call.send(answer)
            call.push()
    call.finish("OK", "", [])


def _refuse(call: Call, error: GatewayError, decision: bytes = b"", made: Headers = ()) -> None:
    trailers = [(b"x-driftgate-code", error.code.encode()), *made]
    if decision:
        trailers.append((_DECISION, decision))
    if error.retry_after_s is not None:
        trailers.append((b"retry-after", str(error.retry_after_s).encode()))
    call.finish(error.grpc_status, str(error), trailers)
