"""One worker process: one event loop with its listeners."""

import asyncio
import logging
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

from gateway import __version__
from gateway.app import App
from gateway.config import ServerConfig
from gateway.errors import StartError
from gateway.listener import Listener, bind
from gateway.prediction import DataPlane
from gateway.sync import look
from gateway.telemetry import event, start_logging


class Both(Listener):
    """The HTTP listener; when it begins to end, so does gRPC beside it."""

    def __init__(self, app: App, config: ServerConfig) -> None:
        super().__init__(app, config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End both at once: a call that came by one must not wait for the other's."""
        carrier = self._app.carrier
        ending = None if carrier is None else asyncio.ensure_future(carrier.stop())
        await super().shutdown(sockets)
        if ending is not None:
            await ending


def serve(config: ServerConfig) -> None:
    """Serve until told to end.

    Raises
    ------
    StartError : the registry, a port or the certificate says no; nothing was started.
    """
    start_logging(config.log.format, config.log.level)
    look(Path(config.registry))
    _check_certificate(config)
    listening = bind(config.host, config.port)
    address, port = listening.getsockname()[:2]
    host = f"[{config.host}]" if ":" in config.host else config.host
    if not config.no_grpc:
        # grpcio takes no socket that is open: this one only asks, while nothing has started.
        bind(config.host, config.grpc_port, "--grpc-port").close()

    def say_ready(plane: DataPlane) -> None:
        models = plane.table.models.values()
        open_models = [model for model in models if model.champion is not None]
        carried: dict[str, Any] = (
            {} if app.carrier is None else {"grpc_url": f"{host}:{app.carrier.port}"}
        )
        event(
            "ready" if open_models else "no_model_opened",
            release=__version__,
            url=f"{'https' if config.tls_cert else 'http'}://{host}:{port}",
            **carried,
            models=len(open_models),
            refused=sum(len(model.refused) for model in models),
        )

    app = App(config, say_ready, None if config.no_grpc else address)
    listener = Both(app, config)
    listener.run(sockets=[listening])
    if not listener.started:
        if app.carrier is not None and not app.carrier.port:
            event("grpc_not_started", logging.ERROR, port=config.grpc_port)
        sys.exit(3)
    event("stopped")


def _check_certificate(config: ServerConfig) -> None:
    if not config.tls_cert:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ValueError):  # SSLError is an OSError.
        raise StartError(
            "tls_cert and tls_key: not a certificate and its private key in PEM, or not readable"
        ) from None
