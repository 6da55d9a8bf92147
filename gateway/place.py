"""Where a worker sits: its slot, its sockets, and its lines to the supervisor.

Two lines, because they are for different times. The board is shared memory, a row for each slot: a
worker that goes round its loop says so there, without a system call, and sees how many connections
its neighbours hold. The line is a socket for what is said once: ready, leaving, cannot start. It
also ends when either process does.
"""

import json
import mmap
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BEATS, _CONNECTIONS, _IS_OPEN = range(3)
_CELLS = 4
_MESSAGE_BYTES_MAX = 65_536


class Board:
    """A row of numbers for each slot, in memory that processes made by fork share."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._cells = memoryview(mmap.mmap(-1, 8 * _CELLS * n_slots)).cast("q")

    def beat(self, slot: int) -> None:
        """Say that this worker goes round its loop."""
        self._cells[_CELLS * slot + _BEATS] += 1

    def beats(self, slot: int) -> int:
        """How often it has said so: it lives while this number changes."""
        return self._cells[_CELLS * slot + _BEATS]

    def clear(self, slot: int) -> None:
        """Nobody sits there now."""
        self._cells[_CELLS * slot + _IS_OPEN] = 0

    def say_connections(self, slot: int, n: int) -> None:
        """So many connections are open there, and it takes more."""
        self._cells[_CELLS * slot + _CONNECTIONS] = n
        self._cells[_CELLS * slot + _IS_OPEN] = 1

    def connections(self) -> dict[int, int]:
        """Open connections of every slot that takes more."""
        rows = (self._cells[_CELLS * k : _CELLS * (k + 1)] for k in range(self.n_slots))
        return {k: row[_CONNECTIONS] for k, row in enumerate(rows) if row[_IS_OPEN]}

    def is_behind_all(self, slot: int) -> bool:
        """Whether no open slot holds fewer connections: it is this one's turn to take one."""
        cells = self._cells
        mine = cells[_CELLS * slot + _CONNECTIONS]
        return all(
            cells[at + _CONNECTIONS] >= mine or not cells[at + _IS_OPEN]
            for at in range(0, _CELLS * self.n_slots, _CELLS)
        )


class Turns:
    """Says when a worker should take a connection from a socket that it shares."""

    def __init__(self, board: Board, slot: int) -> None:
        self._board = board
        self._slot = slot

    def is_mine(self) -> bool:
        """Whether nobody holds fewer connections."""
        return self._board.is_behind_all(self._slot)

    def took_one(self) -> None:
        """Say it at once: the next one may be there already."""
        self._board.say_connections(self._slot, self._board.connections().get(self._slot, 0) + 1)


class Line:
    """One end of the socket between a supervisor and a worker; messages are small JSON objects."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)  # noqa: FBT003  the socket module's own signature
        self._end = end

    @classmethod
    def pair(cls) -> tuple["Line", "Line"]:
        """Both ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    def fileno(self) -> int:
        """For selectors and loops."""
        return self._end.fileno()

    def say(self, **message: object) -> None:
        """Send one message; lost if nobody listens any more."""
        with suppress(OSError):
            self._end.send(json.dumps(message).encode()[:_MESSAGE_BYTES_MAX])

    def hear(self) -> tuple[list[dict[str, Any]], bool]:
        """What has been said since, and whether the other end is gone."""
        messages: list[dict[str, Any]] = []
        while True:
            try:
                data = self._end.recv(_MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return messages, False
            except OSError:
                return messages, True
            if not data:
                return messages, True
            messages.append(json.loads(data))

    def close(self) -> None:
        """Let this end go."""
        self._end.close()


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker is given by its supervisor."""

    slot: int
    n_workers: int
    run_dir: Path | None
    """Where this host's counts are; None: in memory."""
    listening: socket.socket
    """Shared by all workers, held open by the supervisor."""
    grpc_listening: socket.socket | None
    """The same for gRPC; None where its carrier opens a socket itself, or there is none."""
    address: str
    """Where it is bound to, without the port."""
    board: Board
    line: Line
    server: str
    """Tells the servers of one host apart; the first has no name."""
    is_joining: bool
    """Somebody has served here before: take connections only when ready for them."""

    @property
    def name(self) -> str:
        """Of the slot, as in the names of its files."""
        return str(self.slot)

    @property
    def turns(self) -> Turns | None:
        """When to take a connection; None: there is nobody to share with."""
        return Turns(self.board, self.slot) if self.n_workers > 1 else None
