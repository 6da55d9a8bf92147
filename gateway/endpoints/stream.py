"""`POST /v2/models/{m}[/versions/{v}]/infer_stream`: documents in, answers out, in order.

Both ways are open at once: a document is answered as soon as it is complete and its rows have run,
however many are still to come. What is unanswered is bounded, and while it is at its bound, or the
client does not read, nothing more is read from it.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from gateway.access import Access
from gateway.endpoints.predict import REQUEST_ID, read_timeout_s
from gateway.endpoints.route import error_body, error_headers
from gateway.errors import (
    EncodingError,
    GatewayError,
    IdleError,
    MediaTypeError,
    MethodError,
    QueueFullError,
    shown,
)
from gateway.prediction import DataPlane, Head, infer
from gateway.protocol.messagepack import (
    HEADERS,
    MEDIA_TYPES,
    Framer,
    MessagePack,
    encode_error,
    identity,
)
from gateway.router import Headers
from gateway.telemetry import event

ABORT = "driftgate.abort"
"""The ASGI extension of a listener that can drop a connection at once."""

_PREFIX, _SUFFIX = "/v2/models/", "/infer_stream"
_LENGTH_MIN = len(_PREFIX + _SUFFIX)
_UNANSWERED_MAX = 16
_JOINED_BYTES_MAX = 65_536
"""Answers that are ready together go out in one piece, up to about so many bytes."""
_SMALL_BYTES = 65_536
"""A larger document is looked at again, for its id, off the loop."""
_TYPES = MEDIA_TYPES | {"", "application/octet-stream"}


def is_stream(path: str) -> bool:
    """Whether a path is this endpoint's."""
    return path.endswith(_SUFFIX) and path.startswith(_PREFIX) and len(path) >= _LENGTH_MIN


@dataclass(frozen=True, slots=True)
class _Asked:
    """What every document of a stream has in common."""

    model: str
    version: str | None
    timeout_s: float | None
    request_id: bytes
    headers: Headers
    wanted: bytes | None
    caller: str


class Stream:
    """Streams of predictions over HTTP; called with every path for which `is_stream` holds."""

    def __init__(self, plane: DataPlane, access: Access) -> None:
        self._plane = plane
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one stream."""
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = os.urandom(8).hex().encode()
        lines = [(b"x-request-id", request_id)]
        try:
            asked = self._asked(scope, headers, request_id)
        except GatewayError as error:
            self._plane.rejected(error)
            content = error_body(error)
            lines += [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(content)),
                *((name.encode(), text.encode()) for name, text in error_headers(error).items()),
            ]
            await send({"type": "http.response.start", "status": error.status, "headers": lines})
            await send({"type": "http.response.body", "body": content})
            return
        abort = scope.get("extensions", {}).get(ABORT, {}).get("now")
        await _Exchange(self._plane, asked, receive, send, abort).run([*HEADERS, *lines])

    def _asked(self, scope: Scope, headers: dict[bytes, bytes], request_id: bytes) -> _Asked:
        """Whom a stream is for; one that nobody could answer is refused before it begins."""
        if scope["method"] != "POST":
            raise MethodError(scope["method"], ["POST"])
        caller = self._access.guard("predict", "POST", headers)
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip()
        if kind.lower() not in _TYPES:
            raise MediaTypeError(
                f"content-type {shown(kind)} is not read here; send application/msgpack"
            )
        coding = headers.get(b"content-encoding", b"identity")
        if coding.lower() != b"identity":
            raise EncodingError(
                f"content-encoding {shown(coding.decode('latin-1'))} is not read in streams;"
                " send the documents as they are"
            )
        path: str = scope["path"]
        model, _, number = path[len(_PREFIX) : -len(_SUFFIX)].partition("/versions/")
        version = number if path.count("/") > 4 else None
        self._plane.table.model(model).pick(version)
        wanted = headers.get(b"x-driftgate-version")
        timeout_s = read_timeout_s(headers)
        headers_ = scope["headers"]
        return _Asked(model, version, timeout_s, request_id, headers_, wanted, caller.name)


class _Exchange:
    """One stream, from its head to its last answer.

    Three tasks beside the caller's own, which writes: one receives, one cuts documents out of what
    came and starts an answer for each, one watches for silence.
    """

    def __init__(
        self,
        plane: DataPlane,
        asked: _Asked,
        receive: Receive,
        send: Send,
        abort: Callable[[], None] | None,
    ) -> None:
        self._plane = plane
        self._asked = asked
        self._number = 0
        self._receive = receive
        self._send = send
        self._abort = abort
        limits = plane.config.limits
        self._bytes_max = min(limits.json_bytes_max, limits.body_bytes_max)
        self._codec = MessagePack(self._bytes_max, in_stream=True)
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self._unanswered: deque[tuple[asyncio.Future[bytes], int]] = deque()
        """Answers that are not written yet, in order, with the sizes of their documents."""
        self._n_bytes = 0
        self._has_all = False
        """No more answers will be queued."""
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._gone = asyncio.Event()
        self._is_writing = False
        self._moved = time.monotonic()
        """When a byte last came, or an answer was last taken."""

    async def run(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Read and answer, both until the end."""
        works = (self._receive_all, self._cut, self._watch)
        tasks = [asyncio.create_task(work()) for work in works]
        try:
            # The first receive says "100 Continue" to a client that waits for it: it goes first.
            await asyncio.sleep(0)
            # A client may wait for the head before it sends a document.
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._write()
            if not self._gone.is_set():
                await self._send({"type": "http.response.body", "body": b""})
        finally:
            self._gone.set()  # Rows that wait for nobody are dropped.
            for task in tasks:
                task.cancel()
            left = [answer for answer, _ in self._unanswered]
            await asyncio.gather(*tasks, *left, return_exceptions=True)

    # -- reading

    async def _receive_all(self) -> None:
        """Receive a chunk ahead of what is being cut: so a client that hangs up is noticed."""
        has_ended = False
        while (message := await self._receive())["type"] != "http.disconnect":
            if has_ended:
                continue
            self._moved = time.monotonic()
            if chunk := message.get("body", b""):
                await self._chunks.put(chunk)
            if has_ended := not message.get("more_body", False):
                await self._chunks.put(None)
        self._gone.set()
        self._changed.set()
        self._room.set()

    async def _cut(self) -> None:
        """Start an answer for every document, in order, while there is room."""
        framer = Framer(self._bytes_max)
        try:
            while (chunk := await self._chunks.get()) is not None:
                framer.feed(chunk)
                for document in framer.documents():
                    await self._wait_for_room(len(document))
                    if self._gone.is_set() or self._has_all:
                        return
                    before = self._unanswered[-1][0] if self._unanswered else None
                    answer = asyncio.create_task(self._answer(document, self._number, before))
                    self._number += 1
                    self._queue(answer, len(document))
            framer.end()
        except GatewayError as error:
            self._end_with(error)
        except Exception:  # noqa: BLE001  the stream must end, and say so
            event("request_failed", logging.ERROR, path=_SUFFIX, exc=True)
            self._end_with(GatewayError("internal error; the server's log says more"))
        self._has_all = True
        self._changed.set()

    async def _wait_for_room(self, size: int) -> None:
        while not self._gone.is_set() and self._unanswered:
            if len(self._unanswered) < _UNANSWERED_MAX and self._n_bytes + size <= self._bytes_max:
                return
            self._room.clear()
            await self._room.wait()

    def _queue(self, answer: "asyncio.Future[bytes]", size: int) -> None:
        self._unanswered.append((answer, size))
        self._n_bytes += size
        self._changed.set()

    def _end_with(self, error: GatewayError) -> None:
        """Answer what came before, then say why there is no more."""
        self._plane.rejected(error)
        last: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        last.set_result(encode_error(error))
        self._queue(last, 0)
        self._has_all = True

    # -- answering

    async def _answer(
        self, document: bytes, number: int, before: "asyncio.Future[bytes] | None"
    ) -> bytes:
        """One document's answer, or what was wrong with it: the stream goes on."""
        answer = await self._tried(document, number)
        if isinstance(answer, QueueFullError) and before is not None and not before.done():
            # The stream's own rows may be what fills the queue: it waits for them, and asks again.
            await asyncio.wait((before,))
            answer = await self._tried(document, number)
        if isinstance(answer, bytes):
            return answer
        if len(document) <= _SMALL_BYTES:
            return encode_error(answer, identity(document, self._bytes_max))
        found = await asyncio.to_thread(identity, document, self._bytes_max)
        return encode_error(answer, found)

    async def _tried(self, document: bytes, number: int) -> bytes | GatewayError:
        asked = self._asked
        name = b"%s.%d" % (asked.request_id, number)
        head = Head(asked.model, asked.version, asked.timeout_s, self._until_gone, name)
        head.caller = asked.caller
        head.headers, head.wanted = asked.headers, asked.wanted
        try:
            answer = await infer(self._plane, self._codec, head, document, time.perf_counter())
        except GatewayError as error:
            return error
        except Exception:  # noqa: BLE001  no trace may reach a client
            event("request_failed", logging.ERROR, path=_SUFFIX, exc=True)
            return GatewayError("internal error; the server's log says more")
        return answer.body

    async def _until_gone(self) -> None:
        await self._gone.wait()

    async def _write(self) -> None:
        """Write the answers in order; those that are ready together go out in one piece."""
        unanswered = self._unanswered
        while not self._gone.is_set():
            if not unanswered:
                if self._has_all:
                    return
                self._changed.clear()
                await self._changed.wait()
                continue
            await asyncio.wait((unanswered[0][0],))
            parts: list[bytes] = []
            size, n_bytes = 0, 0
            for answer, document_size in unanswered:
                if not answer.done() or size > _JOINED_BYTES_MAX:
                    break
                parts.append(answer.result())
                size += len(parts[-1])
                n_bytes += document_size
            self._is_writing = True
            await self._send(
                {"type": "http.response.body", "body": b"".join(parts), "more_body": True}
            )
            self._is_writing = False
            self._moved = time.monotonic()
            # Room is made only now: who does not read the answers has no more documents read.
            for _ in parts:
                unanswered.popleft()
            self._n_bytes -= n_bytes
            self._room.set()

    async def _watch(self) -> None:
        """End a stream on which nothing has moved for `limits.timeout_s`."""
        silence_s_max = self._plane.timeout_s
        while not self._has_all or self._unanswered:
            left_s = self._moved + silence_s_max - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
            elif self._is_writing:
                # The client takes nothing: an answer that says so would not be taken either.
                if self._abort is not None:
                    self._abort()
                return
            elif self._unanswered:
                await asyncio.sleep(min(silence_s_max, 1.0))  # Each has a deadline of its own.
            else:
                self._end_with(IdleError(silence_s_max))
                return
