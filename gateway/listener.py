"""uvicorn with what it lacks: sockets bound before anything is loaded, and a quiet, clean end."""

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

from gateway.config import ServerConfig
from gateway.errors import StartError
from gateway.telemetry import event

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_GRACE_S = 30


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
                http="httptools",
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
