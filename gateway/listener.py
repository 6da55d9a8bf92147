"""uvicorn with what it lacks: sockets bound early, one write per answer, a quiet and clean end."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.config import ServerConfig
from gateway.errors import StartError
from gateway.telemetry import event

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_GRACE_S = 30
_JOINED_BYTES_MAX = 65_536


def bind(host: str, port: int) -> socket.socket:
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
            errno.EADDRINUSE: "in use by another program; choose one with --port",
            errno.EACCES: "not allowed; ports below 1024 need a privilege",
            errno.EADDRNOTAVAIL: "its host is no address of this machine",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
        raise StartError(f"port {port} on {host}: {why}") from None
    listening.setblocking(False)  # noqa: FBT003  the socket module's own signature
    return listening


class WholeAnswers(asyncio.Transport):
    """A transport that holds the head of an answer back until its body is there.

    uvicorn writes head and body apart, and uvloop hands each to the kernel at once: two system
    calls, and two wake-ups of the client, cost more than decoding, routing and running a small
    model together.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._held = b""
        # What is not changed goes straight through.
        self.get_extra_info = transport.get_extra_info  # type: ignore[method-assign]
        self.is_closing = transport.is_closing  # type: ignore[method-assign]
        self.pause_reading = transport.pause_reading  # type: ignore[method-assign]
        self.resume_reading = transport.resume_reading  # type: ignore[method-assign]
        self.set_protocol = transport.set_protocol  # type: ignore[method-assign]
        self.abort = transport.abort  # type: ignore[method-assign]

    def write(self, data: "bytes | bytearray | memoryview[int]") -> None:
        """Write, after what was held; hold a head."""
        if self._held and len(data) <= _JOINED_BYTES_MAX:
            held, self._held = self._held, b""
            self._transport.write(held + data)
        elif self._held:
            self.flush()  # copying much costs more than a call
            self._transport.write(data)
        elif isinstance(data, bytes) and data.startswith(b"HTTP/1.1 ") and data[9:12] != b"100":
            self._held = data
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Write what is held: an answer without a body has ended."""
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)

    def close(self) -> None:
        """Write what is held, then close."""
        self.flush()
        self._transport.close()


class Protocol(HttpToolsProtocol):
    """One HTTP connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; every answer leaves in one write."""
        self._answers = WholeAnswers(transport)
        super().connection_made(self._answers)

    def on_response_complete(self) -> None:
        """End an answer."""
        self._answers.flush()
        super().on_response_complete()


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
