"""How connections come in: from a socket shared in turn, and not too many from one address."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from gateway.config import LimitsConfig
from gateway.telemetry import event

_STEP_BACK_S = 0.002
"""So long the others have to take a connection first."""
_PAUSE_S = 0.1


class Guests:
    """Connections of one listener, by the address that they come from."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._by_address: Counter[str] = Counter()

    def is_full(self, n_connections: int, address: str | None) -> bool:
        """Whether one more connection, of this address, is too many; it counts from now on."""
        if address is None:
            return n_connections > self._limits.connections_max
        self._by_address[address] += 1
        return n_connections > self._limits.connections_max or (
            self._by_address[address] > self._limits.connections_per_address_max
            and not is_loopback(address)
        )

    def left(self, address: str | None) -> None:
        """A connection of this address is over."""
        if address is not None:
            self._by_address[address] -= 1
            if self._by_address[address] <= 0:
                del self._by_address[address]


def is_loopback(name: str) -> bool:
    """Whether an address is this machine's own, and nobody else's."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Turn(Protocol):
    """Says when to take a connection from a socket that several processes listen on."""

    def is_mine(self) -> bool:
        """Whether nobody else should take the next connection before this process."""
        ...

    def took_one(self) -> None:
        """One more connection is open here."""
        ...


class Acceptor:
    """Takes connections from a shared socket, one a turn of the loop.

    The kernel wakes every process that listens, and the first takes all that waits, for as long as
    clients keep their connections. So each takes one at a time, and who has more than another steps
    back for a moment; what nobody else has taken by then it takes after all.
    """

    def __init__(
        self,
        listening: socket.socket,
        new_protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
        turn: Turn,
    ) -> None:
        self._listening = listening
        self._new_protocol = new_protocol
        self._tls = tls
        self._turn = turn
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        self._is_failing = False
        self._listen()

    def close(self) -> None:
        """Take no more."""
        self._is_closed = True
        self._loop.remove_reader(self._listening.fileno())

    def _listen(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listening.fileno(), self._come)

    def _come(self) -> None:
        if self._turn.is_mine():
            self._accept()
            return
        self._loop.remove_reader(self._listening.fileno())
        self._loop.call_later(_STEP_BACK_S, self._accept_after_all)

    def _accept_after_all(self) -> None:
        if not self._is_closed:
            self._accept()
            self._listen()

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # Somebody else was quicker, or the client has left.
        except OSError as error:  # No descriptor is left: what waits must wait.
            if not self._is_failing:
                event("accept_failed", logging.ERROR, reason=os.strerror(error.errno or 0))
            self._is_failing = True
            self._loop.remove_reader(self._listening.fileno())
            self._loop.call_later(_PAUSE_S, self._listen)
            return
        self._is_failing = False
        connection.setblocking(False)  # noqa: FBT003  the socket module's own signature
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._turn.took_one()
        task = self._loop.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        # A client that leaves during its handshake is nobody's fault.
        with contextlib.suppress(OSError):
            await self._loop.connect_accepted_socket(self._new_protocol, connection, ssl=self._tls)
