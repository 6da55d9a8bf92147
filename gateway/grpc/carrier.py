"""Carries the calls with grpcio, on the worker's own event loop: the only file that knows grpcio.

Handlers get bytes and give bytes, so that another carrier can take this one's place.
"""

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from gateway.access import SCOPES, Access, Caller, Scope
from gateway.config import ServerConfig
from gateway.errors import GatewayError, StartError
from gateway.grpc import health, reflection, service
from gateway.grpc.health import Health
from gateway.grpc.reflection import Reflection
from gateway.grpc.service import Asked, Service
from gateway.prediction import DataPlane, Head
from gateway.router import Headers, wanted_of
from gateway.telemetry import event

_GRACE_S = 30.0
_DETAILS_MAX = 2000
"""An error's text travels in a header, of which all together may have 8 KiB with most clients."""
_METADATA_BYTES_MAX = 16 * 1024
_PING_S_MIN = 10
_SILENCE_S_MAX = 60
_ID = "x-request-id"
_ID_LENGTH_MAX = 128
_DECISION = "x-driftgate-decision"
"""In trailing metadata, which leave with the answer: initial ones cost a system call."""
_STATUS = {status.name: status for status in grpc.StatusCode}


class Carrier:
    """One gRPC server of one worker.

    Parameters
    ----------
    host : the address itself, no name: where HTTP listens
    """

    def __init__(self, plane: DataPlane, access: Access, host: str) -> None:
        services = (service.NAME, health.NAME, *reflection.NAMES)
        self._config = plane.config
        self._plane = plane
        self._access = access
        self._host = f"[{host}]" if ":" in host else host
        self._service = Service(plane, access)
        self._health = Health(plane, (service.NAME,))
        self._reflection = Reflection(services)
        self._server: Any = None
        self._stopping: asyncio.Task[None] | None = None
        self.port = 0
        """Where it listens; known once it has started."""
        self.n_connections = 0
        """Those that it would share in turn: none, the kernel deals them out."""

    async def start(self) -> None:
        """Listen.

        Raises
        ------
        StartError : the port was taken, or the certificate is none.
        """
        config = self._config
        self._server = server = grpc.aio.server(
            options=_options(config), maximum_concurrent_rpcs=config.limits.grpc_calls_max
        )
        server.add_generic_rpc_handlers(self._handlers())
        address = f"{self._host}:{config.grpc_port}"
        try:
            if config.tls_cert:
                self.port = server.add_secure_port(address, _credentials(config))
            else:
                self.port = server.add_insecure_port(address)
        except RuntimeError:
            raise StartError(
                f"port {config.grpc_port} on {self._host}: cannot be had for gRPC; choose one with"
                " --grpc-port, or look at the certificate"
            ) from None
        await server.start()

    async def stop(self) -> None:
        """Take nothing new, answer what is in flight, end; may be asked for twice."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        if self._server is None:
            return
        self._health.close()
        await self._service.close()
        await self._server.stop(_GRACE_S)

    def _handlers(self) -> tuple[Any, ...]:
        calls = {
            name: grpc.unary_unary_rpc_method_handler(self._unary(name, call.scope, call.answer))
            for name, call in self._service.calls.items()
        }
        calls["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self._infer)
        calls["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream_infer)
        check = self._unary("Check", "open", self._health.check)
        return tuple(
            grpc.method_handlers_generic_handler(name, handlers)
            for name, handlers in (
                (service.NAME, calls),
                (
                    health.NAME,
                    {
                        "Check": grpc.unary_unary_rpc_method_handler(check),
                        "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
                    },
                ),
                *(
                    (name, {
                        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self._reflect)
                    })
                    for name in reflection.NAMES
                ),
            )
        )  # fmt: skip

    async def _infer(self, message: bytes, context: Any) -> bytes:
        metadata = context.invocation_metadata()
        head = Head(None, None, context.time_remaining(), None)
        if len(metadata) != 1 or metadata[0][0] != "user-agent":  # Most calls have nothing else.
            head.request_id = (await _echo_id(context)).encode()
            head.headers = _headers(metadata)
            head.wanted = wanted_of(head.headers)
        made: tuple[tuple[str, str], ...] = ()
        if not head.request_id:
            head.request_id = self._plane.ids.make()
            made = ((_ID, head.request_id.decode()),)
        try:
            head.caller = self._guard("predict", metadata).name
            answer = await self._service.infer(message, head)
        except GatewayError as error:
            await _refuse(context, error, head.decision, made)
        except Exception:  # noqa: BLE001  no trace may reach a client
            await _fail(context, "ModelInfer")
        else:
            context.set_trailing_metadata(((_DECISION, head.decision.decode()), *made))
            return answer
        return b""

    async def _stream_infer(self, messages: AsyncIterator[bytes], context: Any) -> None:
        request_id = (await _echo_id(context)).encode()
        if not request_id:
            request_id = self._plane.ids.make()
            await context.send_initial_metadata(((_ID, request_id.decode()),))
        if (caller := await self._caller("predict", context)) is None:
            return
        asked = Asked(_headers(context.invocation_metadata()), caller.name, request_id)
        answers = self._service.stream(messages, context.time_remaining, asked)
        await _send(answers, context, "ModelStreamInfer")

    async def _watch(self, message: bytes, context: Any) -> None:
        await _send(self._health.watch(message), context, "Watch")

    async def _reflect(self, messages: AsyncIterator[bytes], context: Any) -> None:
        if await self._caller("predict", context) is None:
            return
        await _send(self._reflection.stream(messages), context, "ServerReflectionInfo")

    def _guard(self, scope: Scope, metadata: Any) -> Caller:
        """Who calls, or raise what `Access.authorise` raises."""
        shown = [value for name, value in metadata if name == "authorization"]
        credentials = shown[-1] if shown else None
        return self._access.authorise(
            scope, credentials.encode() if isinstance(credentials, str) else credentials
        )

    async def _caller(self, scope: Scope, context: Any) -> Caller | None:
        """Who calls a stream; None when they may not have it, and have been told."""
        try:
            return self._guard(scope, context.invocation_metadata())
        except GatewayError as error:
            await _refuse(context, error)
            return None

    def _unary(
        self, name: str, scope: Scope, answer: Callable[[bytes], Awaitable[bytes]]
    ) -> Callable[[bytes, Any], Awaitable[bytes]]:
        if scope not in SCOPES:
            raise ValueError(f"{name}: no scope {scope!r}")

        async def call(message: bytes, context: Any) -> bytes:
            await _echo_id(context)
            try:
                self._guard(scope, context.invocation_metadata())
                return await answer(message)
            except GatewayError as error:
                await _refuse(context, error)
            except Exception:  # noqa: BLE001  no trace may reach a client
                await _fail(context, name)
            return b""

        return call


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    limits = config.limits
    return [
        ("grpc.max_receive_message_length", limits.grpc_message_bytes_max),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", _METADATA_BYTES_MAX),
        ("grpc.max_concurrent_streams", limits.grpc_calls_max),
        # The workers share the port; the supervisor keeps it from anybody else.
        ("grpc.so_reuseport", 1),
        # Clients that ping an idle connection are well-behaved; those that flood are not.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_S_MIN * 1000),
        ("grpc.keepalive_time_ms", _SILENCE_S_MAX * 1000),
    ]


def _credentials(config: ServerConfig) -> Any:
    try:
        key, certificate = (Path(p).read_bytes() for p in (config.tls_key, config.tls_cert))
        authorities = Path(config.tls_client_ca).read_bytes() if config.tls_client_ca else None
    except OSError:
        raise StartError("tls_cert, tls_key and tls_client_ca: cannot be read") from None
    return grpc.ssl_server_credentials(
        [(key, certificate)], authorities, require_client_auth=authorities is not None
    )


def _headers(metadata: Any) -> Headers:
    """Metadata as headers: gRPC keeps names in lower case as well."""
    return [(k.encode(), v if isinstance(v, bytes) else v.encode()) for k, v in metadata or ()]


async def _echo_id(context: Any) -> str:
    """Give a request's id back, if it has one. Only then: metadata costs a system call."""
    for name, value in context.invocation_metadata() or ():
        if name == _ID and isinstance(value, str) and 0 < len(value) <= _ID_LENGTH_MAX:
            await context.send_initial_metadata(((_ID, value),))
            return value
    return ""


async def _send(answers: AsyncGenerator[bytes, None], context: Any, name: str) -> None:
    """Send one answer after the other, each when the client has room for it."""
    # A call that is cancelled while it sends leaves the answers behind: they must end as well.
    async with aclosing(answers):
        try:
            async for answer in answers:
                try:
                    await context.write(answer)
                except grpc.aio.InternalError:  # All it can mean: the client is gone.
                    return
        except GatewayError as error:
            await _refuse(context, error)
        except Exception:  # noqa: BLE001  no trace may reach a client
            await _fail(context, name)


async def _refuse(
    context: Any,
    error: GatewayError,
    decision: bytes = b"",
    made: tuple[tuple[str, str], ...] = (),
) -> None:
    trailing = [("x-driftgate-code", error.code), *made]
    if decision:
        trailing.append((_DECISION, decision.decode()))
    if error.retry_after_s is not None:
        trailing.append(("retry-after", str(error.retry_after_s)))
    # An aborted call and its exceptions hold each other until cycles are collected, which an idle
    # server hardly ever does; their frames would hold a table, and it all versions of its time.
    for held in (error, sys.exception()):
        if held is not None:
            held.__traceback__ = held.__context__ = held.__cause__ = None
    await context.abort(_STATUS[error.grpc_status], str(error)[:_DETAILS_MAX], tuple(trailing))


async def _fail(context: Any, name: str) -> None:
    event("request_failed", logging.ERROR, path=name, exc=True)
    await _refuse(context, GatewayError("internal error; the server's log says more"))
