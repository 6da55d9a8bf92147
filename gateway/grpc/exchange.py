"""One call over HTTP/2: the messages that come, and the answer as it is written."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.errors import GatewayError
from gateway.grpc import wire
from gateway.router import Headers

_UNREAD_BYTES_MAX = 64 * 1024
_UNREAD_MAX = 64
"""Messages of one call that wait for its handler; then the client's window is no longer opened."""
_PENDING_BYTES_MAX = 256 * 1024
"""Bytes of one answer that wait for the client's window; then its handler waits."""
_PIECE_BYTES = 64 * 1024
"""A large answer goes out in pieces: each grant of a window copies all that waits behind it."""
_UNPACK_BYTES = 4 * 1024
"""Longer packed messages are unpacked off the loop."""
_CONTENT_TYPE = (b"content-type", b"application/grpc")


class GoneError(Exception):
    """The client has given the call up, or has left."""


class Stream(Protocol):
    """The sending half of one stream."""

    @property
    def stream_id(self) -> int:
        """Its number."""
        ...

    @property
    def pending_bytes(self) -> int | None:
        """Bytes that wait for the client's window; None once the stream is over."""
        ...

    def send_response(
        self, status: int, headers: list[tuple[bytes, bytes]] | None = ..., end_stream: bool = ...
    ) -> None:
        """Send the headers."""
        ...

    def send_data(self, data: Any, /) -> None:
        """Send bytes, or keep them until the client's window opens."""
        ...

    def end_message(self, trailers: list[tuple[bytes, bytes]] | None = ..., /) -> None:
        """End the answer once all bytes are out."""
        ...


class Line(Protocol):
    """What a call needs of its connection."""

    is_paused: bool
    """Whether the kernel takes no more bytes at the moment."""
    local_errors: tuple[type[Exception], ...]
    """What a stream raises that is not there any more."""

    def flush(self) -> None:
        """Write what is to be written."""
        ...

    def flush_soon(self) -> None:
        """The same at the end of the loop's turn, unless nobody else would write there."""
        ...

    def wait_for_room(self, call: "Call") -> "asyncio.Future[None]":
        """Done when it is worth looking again whether there is room to write."""
        ...

    def release(self, call: "Call") -> None:
        """Take up what was held back while the handler had not read."""
        ...

    def answered(self, call: "Call") -> None:
        """Note that the whole answer is written."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """What answers a path."""

    name: str
    answer: Callable[["Call"], Coroutine[Any, Any, None]]
    is_unary: bool = True
    """Whether the client sends one message, and the handler need not begin before it is there."""
    grace_s: float = 0.0
    """How much later than the client's deadline the call is ended from here."""


class Call:
    """One call: a stream of an HTTP/2 connection."""

    __slots__ = (
        "_buffer",
        "_length",
        "_line",
        "_problem",
        "_reader",
        "bytes_max",
        "coding",
        "deadline",
        "expiry",
        "headers",
        "held",
        "held_bytes",
        "initial",
        "is_answered",
        "is_begun",
        "is_counted",
        "is_ended",
        "is_expired",
        "is_gone",
        "messages",
        "room",
        "route",
        "stream",
        "task",
        "unread_bytes",
    )  # fmt: skip

    def __init__(self, line: Line, stream: Stream, route: Route, headers: Headers) -> None:
        self._line = line
        self.stream = stream
        self.route = route
        self.headers = headers
        self.coding = b""
        self.bytes_max = 0
        self.deadline: float | None = None
        """When it is over, on the loop's clock."""
        self.expiry: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        self.initial: list[tuple[bytes, bytes]] = []
        """Metadata that go out before the answer."""
        self.messages: deque[tuple[int, bytes]] = deque()
        """Those that nobody has read, each with whether it is packed."""
        self.unread_bytes = 0
        self.held: deque[bytes] = deque()
        """Frames that wait until messages are read; the client's window stays closed for them."""
        self.held_bytes = 0
        self.room: asyncio.Future[None] | None = None
        self.is_begun = False
        self.is_answered = False
        self.is_counted = False
        """Whether it takes one of the places for calls."""
        self.is_ended = False
        """Whether the client has sent all that it will."""
        self.is_gone = False
        self.is_expired = False
        self._buffer: bytes | bytearray = b""
        self._length = -1
        self._problem: GatewayError | None = None
        self._reader: asyncio.Future[None] | None = None

    # -- what the connection tells

    @property
    def is_complete(self) -> bool:
        """Whether the handler of a single message may begin."""
        return self.is_ended or self._problem is not None

    @property
    def is_stalled(self) -> bool:
        """Whether so much is unread that no more should come; a single message must end first."""
        return (
            bool(self.messages)
            and not self.route.is_unary
            and (self.unread_bytes > _UNREAD_BYTES_MAX or len(self.messages) > _UNREAD_MAX)
        )

    def feed(self, data: bytes) -> None:  # noqa: C901  one message, on one screen
        """Take bytes of the body."""
        if self.is_answered or self._problem is not None:
            return  # Nobody will read it.
        buffer: bytes | bytearray = data
        if self._buffer:
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)
            self._buffer += data
            buffer = self._buffer
        position, end = 0, len(buffer)
        try:
            while end - position >= wire.PREFIX_BYTES:
                if self._length < 0:
                    prefix = buffer[position : position + wire.PREFIX_BYTES]
                    self._length = wire.size(prefix, self.bytes_max)
                body = position + wire.PREFIX_BYTES
                if end - body < self._length:
                    break
                position = body + self._length
                message = bytes(buffer[body:position])
                self.messages.append((buffer[body - wire.PREFIX_BYTES], message))
                self.unread_bytes += self._length
                self._length = -1
            if self.route.is_unary and len(self.messages) + (position < end) > 1:
                raise wire.StatusError("INTERNAL", f"{self.route.name} takes one message")
        except GatewayError as error:
            self._problem, self._buffer = error, b""
        else:
            if position or not self._buffer:
                self._buffer = buffer[position:]
        self._tell()

    def end(self) -> None:
        """Take it that no more comes."""
        self.is_ended = True
        if self._buffer and self._problem is None:
            self._problem = wire.StatusError("INTERNAL", "the last message is cut off")
        self._tell()

    def drop(self) -> None:
        """Stop: nobody waits for an answer any more."""
        self.is_gone = True
        self.held.clear()
        self.stop()

    def expire(self) -> None:
        """Stop, and say that the deadline is over."""
        self.is_expired = True
        self.stop()

    def stop(self) -> None:
        """Cancel the handler, if it is at work."""
        if self.task is not None and not self.task.done():
            self.task.cancel()

    def hold(self, frame: bytes) -> int:
        """Keep a frame for later; bytes that are kept by now."""
        self.held.append(frame)
        self.held_bytes += len(frame)
        return self.held_bytes

    def _tell(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # -- what handlers read

    async def message(self) -> bytes:
        """The one message of a unary call.

        Raises
        ------
        GatewayError : it cannot be read, or there is none.
        """
        if self._problem is not None:
            raise self._problem
        if not self.messages:
            raise wire.StatusError("INTERNAL", f"{self.route.name} takes one message, not none")
        return await self._next()

    async def read(self) -> AsyncIterator[bytes]:
        """All messages, as they come.

        Raises
        ------
        GatewayError : what came cannot be read.
        """
        while True:
            while self.messages:
                yield await self._next()
            if self._problem is not None:
                raise self._problem
            if self.is_ended:
                return
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    async def _next(self) -> bytes:
        is_packed, message = self.messages.popleft()
        self.unread_bytes -= len(message)
        if self.held and not self.is_stalled:
            self._line.release(self)
        if not is_packed:
            return message
        if len(message) <= _UNPACK_BYTES:
            return wire.unpacked(message, self.coding, self.bytes_max)
        return await asyncio.to_thread(wire.unpacked, message, self.coding, self.bytes_max)

    # -- what handlers write

    def begin(self) -> None:
        """Send what goes before all answers, if it is not out.

        Raises
        ------
        GoneError : the client waits for nothing any more.
        """
        if self.is_begun:
            return
        self.is_begun = True
        try:
            self.stream.send_response(200, [_CONTENT_TYPE, *self.initial])
        except self._line.local_errors:
            raise GoneError from None

    async def send(self, message: bytes) -> None:
        """Send one message; waits while the client takes none.

        Raises
        ------
        GoneError : the client waits for nothing any more.
        """
        data = wire.prefixed(message)
        self.begin()
        try:
            await self._room()
            if len(data) <= _PIECE_BYTES:
                self.stream.send_data(data)
                return
            view = memoryview(data)
            for start in range(0, len(data), _PIECE_BYTES):
                await self._room()
                self.stream.send_data(view[start : start + _PIECE_BYTES])
                self._line.flush()
        except self._line.local_errors:
            raise GoneError from None

    async def give(self, message: bytes, trailers: list[tuple[bytes, bytes]]) -> None:
        """Send the one message of a unary call, and that all is well."""
        await self.send(message)
        self.finish("OK", "", trailers)

    def finish(self, status: str, sentence: str, trailers: list[tuple[bytes, bytes]]) -> None:
        """End the call with a status."""
        if self.is_answered or self.is_gone:
            return
        fields = [(b"grpc-status", b"%d" % wire.CODES[status])]
        if sentence:
            fields.append((b"grpc-message", wire.details(sentence)))
        fields += trailers
        try:
            if not self.is_begun and not self.initial:
                self.stream.send_response(200, [_CONTENT_TYPE, *fields], True)  # noqa: FBT003  its name is end_stream
            else:
                if not self.is_begun:
                    self.stream.send_response(200, [_CONTENT_TYPE, *self.initial])
                self.stream.end_message(fields)
        except self._line.local_errors:
            self.is_gone = True
        self.is_answered = True
        self.messages.clear()
        self.unread_bytes, self._buffer = 0, b""
        self._line.answered(self)

    def push(self) -> None:
        """Have a message of a stream go out now; an answer that is finished goes by itself."""
        self._line.flush_soon()

    async def _room(self) -> None:
        """Return when there is room to write."""
        while self._line.is_paused or (self.stream.pending_bytes or 0) > _PENDING_BYTES_MAX:
            await self._line.wait_for_room(self)
