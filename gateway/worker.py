"""One worker process: one event loop with its listeners, in a place that a supervisor gave it."""

import asyncio
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from gateway import memory
from gateway.app import App
from gateway.config import ServerConfig
from gateway.errors import GatewayError, StartError
from gateway.listener import Listener
from gateway.place import Place
from gateway.prediction import DataPlane
from gateway.scheduling import take_short_turns
from gateway.sync import look
from gateway.telemetry import event, start_logging

_TICKS_A_BEAT = 5
_TICKS_A_LOOK = 20
"""At memory: some 2 s."""
_ORPHAN_S_MAX = 1.0


class Worker(Listener):
    """The HTTP listener, with gRPC beside it; keeps the supervisor informed."""

    def __init__(self, app: App, config: ServerConfig, place: Place) -> None:
        super().__init__(app, config, place.turns)
        self._app = app
        self._config = config
        self._place = place
        self._leaves_at = float("inf")
        self._grown_from = 0
        self._has_asked = False
        app.plane.recycle = self.recycle
        if place.turns is not None:
            self.ticks = 1  # Whose turn it is to take a connection is told by how many each has.

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and end with the supervisor."""
        asyncio.get_running_loop().add_reader(self._place.line.fileno(), self._hear)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End both at once: a call that came by one must not wait for the other's."""
        self._place.board.clear(self._place.slot)
        carrier = self._app.carrier
        ending = None if carrier is None else asyncio.ensure_future(carrier.stop())
        await super().shutdown(sockets)
        if ending is not None:
            await ending

    async def on_tick(self, counter: int) -> bool:
        """Say that the loop goes round, and look whether it is time to leave."""
        place = self._place
        if counter % _TICKS_A_BEAT == 0:
            place.board.beat(place.slot)
        if self._turn is not None:
            carrier = self._app.carrier
            n_connections = 0 if carrier is None else carrier.n_connections
            n_connections += len(self.server_state.connections)
            place.board.say_connections(place.slot, n_connections)
        if counter % _TICKS_A_LOOK == 0 or not self._grown_from:
            self._look_at_memory()
        if time.monotonic() >= self._leaves_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def told(self, number: int, frame: FrameType | None) -> None:
        """Be no longer ready, linger, then end; whoever says it again changes nothing."""
        if self._leaves_at < float("inf"):
            return
        self._app.plane.is_leaving = True
        self._leaves_at = time.monotonic() + self._config.stop.linger_s
        self._place.line.say(kind="leaving")
        if not self._config.stop.linger_s:
            super().told(number, frame)
        else:
            asyncio.get_running_loop().call_later(self._config.stop.linger_s, self.stir)

    def recycle(self, reason: str, **about: object) -> None:
        """Ask for a successor; this worker leaves when that is ready. Asked for once."""
        if not self._has_asked:
            self._has_asked = True
            self._place.line.say(kind="recycle", reason=reason, **about)

    def _hear(self) -> None:
        if self._place.line.hear()[1]:  # Where the kernel does not end us with our parent.
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._place.line.fileno())
            loop.call_later(_ORPHAN_S_MAX, os._exit, 1)
            self.should_exit = True
            self.stir()

    def _look_at_memory(self) -> None:
        limit = self._config.recycle_bytes
        if not limit or not self._app.plane.is_ready:
            return
        held = memory.resident()
        self._grown_from = self._grown_from or held
        if held - self._grown_from > limit:
            self.recycle("memory", grown_bytes=held - self._grown_from, held_bytes=held)


def run(config: ServerConfig, place: Place) -> int:
    """Work until told to end; the exit code."""
    more = {"worker": place.slot} if place.n_workers > 1 else {}
    start_logging(config.log.format, config.log.level, **more)
    try:
        look(Path(config.registry))
        _check_certificate(config)
        app = App(config, _say_ready(place), None if config.no_grpc else place.address, place)
    except GatewayError as error:
        place.line.say(kind="cannot_start", reason=str(error))
        return 2
    worker = Worker(app, config, place)
    take_short_turns()
    try:
        worker.run(sockets=[place.listening])
    except SystemExit:  # uvicorn's word for a start that failed; it has logged why
        event("worker_not_started", logging.ERROR, grpc_port=config.grpc_port)
        return 3
    return 0


def _say_ready(place: Place) -> Callable[[DataPlane], None]:
    def say(plane: DataPlane) -> None:
        models = plane.table.models.values()
        place.line.say(
            kind="ready",
            models=sum(model.champion is not None for model in models),
            refused=sum(len(model.refused) for model in models),
        )

    return say


def _check_certificate(config: ServerConfig) -> None:
    if not config.tls_cert:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ValueError):  # SSLError is an OSError.
        raise StartError(
            "tls_cert and tls_key: not a certificate and its private key in PEM, or not readable"
        ) from None
