"""One HTTP/2 connection by zttp, with what that lacks to lose no call: the only file that knows it.

zttp reads and writes frames and headers, and keeps the state of streams. Beyond it:

* **An end that loses nothing.** It ends a connection after 4,096 streams, or 256 that are reset.
  Long before, we say that no more calls should come (GOAWAY with the highest number), wait until
  the client has surely read that (PING), name the last call that counts (GOAWAY), answer all up
  to it, and let the client close. The same at the end of the server.
* **A window for each call.** zttp opens the client's window again for whatever it has seen. So it
  does not see bytes of a call whose handler is behind: they wait here, and the other calls go on.
* **Bytes of calls that are over** are taken here: zttp would never give their room back.
* **Bounds** on what a client may do without being answered: pings, bytes that it does not take.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any
from typing import Protocol as Interface

import zttp

from gateway.errors import GatewayError, HeadTooLargeError
from gateway.grpc import wire
from gateway.grpc.exchange import Call, Route

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAMS_MAX = 3500
"""Calls of one connection; then the client is asked to open another one. zttp's end is at 4096."""
RESETS_MAX = 64
"""Calls given up on one connection; then the same. With all that may be open, zttp's end is 256."""
_OPEN_MAX = 64
"""With more calls open than that, zttp may refuse the next: it is asked before bytes come to it."""
_FRAME_BYTES = 9
_FRAME_BYTES_MAX = 16_384
_WINDOW_BYTES = 256 * 1024
"""Of one call: what a client may send before its handler reads."""
_HELD_BYTES_MAX = 2 * _WINDOW_BYTES
_CONNECTION_BYTES = 128 * _WINDOW_BYTES
"""Of all calls: more than can be held, so that no call waits for another one's handler."""
_CREDIT_BYTES = 32 * 1024
_BUFFER_BYTES_MAX = 16 * 1024 * 1024
"""Bytes that a client has asked for, and does not take."""
_METADATA_BYTES_MAX = 16 * 1024
_ACK_S_MAX = 5.0
"""Longest wait for the answer to a ping before the last call is named."""
_CLOSE_S_MAX = 3.0
"""Time for a client to close a connection that is over."""
_SILENCE_S_MAX = 60.0
_DEAD_S = 20.0
"""So long after a ping a client without a sign of life is gone."""
_PING_S_MIN = 10.0
_STRIKES_MAX = 2

_DATA, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 4, 6, 7, 8
_NO_ERROR, _FLOW_CONTROL_ERROR, _ENHANCE_YOUR_CALM = 0, 3, 11
_FAREWELL = b"farewell"
_ID_MAX = 2**31 - 1

_SERVING, _WARNED, _LAST = range(3)
"""Calls come; the client is told to send no more; and knows which was the last."""


class Shared(Interface):
    """What all connections of a carrier have in common."""

    message_bytes_max: int
    head_s_max: float
    connections: "set[Connection]"
    is_stopping: bool

    def may_open(self, connection: "Connection") -> bool:
        """Whether there is room for one more connection; it counts from now on."""
        ...

    def closed(self, connection: "Connection") -> None:
        """Forget a connection."""
        ...

    def enter(self) -> bool:
        """Whether there is room for one more call; it counts from now on."""
        ...

    def leave(self) -> None:
        """Forget a call."""
        ...

    def route(self, path: bytes) -> Route | None:
        """What answers a path."""
        ...

    def run(self, call: Call) -> Coroutine[Any, Any, None]:
        """Answer a call, whatever happens."""
        ...


class Connection(asyncio.Protocol):
    """One connection of one client."""

    local_errors: tuple[type[Exception], ...] = (zttp.LocalProtocolError,)

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._http = zttp.Connection(zttp.SERVER, zttp.HTTP2)
        self._transport: asyncio.Transport | None = None
        self.address: str | None = None
        self.is_paused = False
        self._calls: dict[int, Call] = {}
        self._waiting: set[Call] = set()
        """Those that have something to write, and no room."""
        self._n_unanswered = 0
        self._rest = b""
        """The beginning of a frame."""
        self._is_greeted = False
        self._is_open = False
        self._newest = 0
        self._n_streams = 0
        self._n_resets = 0
        self._credit = 0
        self._is_flushing = False
        self._phase = _SERVING
        self._last = _ID_MAX
        self._since = time.monotonic()
        """When it began, was warned, or answered the last call: what `check` looks at."""
        self._is_heard = True
        self._heard = self._since
        self._pinged = 0.0
        self._ping_due = 0.0
        self._strikes = 0

    # -- the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet a client, unless there are too many."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's share no base class
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if isinstance(peer, tuple) else None
        tls = transport.get_extra_info("ssl_object")
        if not self._shared.may_open(self) or (
            tls is not None and tls.selected_alpn_protocol() != "h2"
        ):
            transport.close()
            return
        self._http.initiate_connection()
        window = (4).to_bytes(2, "big") + _WINDOW_BYTES.to_bytes(4, "big")
        room = _CONNECTION_BYTES.to_bytes(4, "big")
        self._write(_frame(_SETTINGS, 0, window) + _frame(_WINDOW_UPDATE, 0, room))
        if self._shared.is_stopping:
            self.go_away()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop what is under way."""
        del exc
        self._shared.closed(self)
        self._drop_all()

    def pause_writing(self) -> None:
        """Let handlers wait."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """Let handlers go on."""
        self.is_paused = False
        self._wake_all()

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client."""
        self._is_heard = True
        if self._rest:
            data = self._rest + data
        position = 0
        if not self._is_greeted:
            if len(data) < len(PREFACE) and PREFACE.startswith(data):
                self._rest = data
                return
            self._is_greeted = True
            position = len(PREFACE)
        try:
            self._rest = self._walk(data, position)
        except zttp.RemoteProtocolError:
            self._fail()
            return
        self.flush()
        transport = self._transport
        if self.is_paused and transport and transport.get_write_buffer_size() > _BUFFER_BYTES_MAX:
            transport.abort()
        elif self._phase == _SERVING and (
            self._n_streams >= STREAMS_MAX or self._n_resets >= RESETS_MAX
        ):
            self.go_away()

    def _walk(self, data: bytes, position: int) -> bytes:  # noqa: C901  one frame, on one screen
        """Give whole frames to zttp, but for bytes that it must not see; the rest."""
        calls = self._calls
        start, size = 0, len(data)
        while size - position >= _FRAME_BYTES:
            length = data[position] << 16 | data[position + 1] << 8 | data[position + 2]
            if length > _FRAME_BYTES_MAX:
                position = size  # zttp has the words for it.
                break
            end = position + _FRAME_BYTES + length
            if end > size:
                break
            if data[position + 3] == _DATA:
                number = int.from_bytes(data[position + 5 : position + 9], "big") & _ID_MAX
                call = calls.get(number)
                if call is None:
                    is_known = 0 < number <= self._newest
                    if not is_known and self._n_unanswered > _OPEN_MAX:
                        self._feed(data[start:position])
                        start = position
                        is_known = number not in calls and 0 < number <= self._newest
                    if is_known:
                        self._feed(data[start:position])
                        start = end
                        self._give_back(length)
                elif call.is_stalled or call.held:
                    self._feed(data[start:position])
                    start = end
                    if call.is_gone:
                        self._give_back(length)
                    elif call.hold(data[position:end]) > _HELD_BYTES_MAX:
                        self._write(_goaway(self._newest, _FLOW_CONTROL_ERROR))
                        raise zttp.RemoteProtocolError
            position = end
        self._feed(data[start:position])
        return data[position:]

    def _feed(self, data: bytes) -> None:
        if data:
            self._http.receive_data(data)
            self._hear()

    def _hear(self) -> None:  # noqa: C901  an event each
        """Take all that zttp has to tell."""
        calls, next_event = self._calls, self._http.next_event
        while (event := next_event()) is not zttp.NEED_DATA:
            if isinstance(event, zttp.Request):
                self._begin(event)
            elif isinstance(event, zttp.Data):
                if (call := calls.get(event.stream_id)) is not None:
                    call.feed(event.data)
                    if call.task is None and call.is_complete:
                        self._start(call)
            elif isinstance(event, zttp.EndOfMessage):
                self._end(event.stream_id)
            elif isinstance(event, zttp.RstStream):
                self._reset(event.stream_id)
            elif isinstance(event, zttp.WindowUpdate):
                if event.stream_id == 0:
                    self._wake_all()
                elif (call := calls.get(event.stream_id)) is not None:
                    _wake(call)
            elif isinstance(event, zttp.Ping):
                self._ping(event)
            elif isinstance(event, zttp.Settings):
                self._is_open = True
                self._wake_all()

    # -- calls

    def _begin(self, request: zttp.Request) -> None:
        number = self._newest = request.stream_id
        self._n_streams += 1
        if number > self._last:
            return  # It came after the last that counts; the client sends it again elsewhere.
        stream = self._http.stream(number)
        status = _status(request)
        if status != 200:
            stream.send_response(status, [], True)  # noqa: FBT003  its name is end_stream
            stream.reset(_NO_ERROR)
            return
        route = self._shared.route(request.path) or _UNKNOWN
        headers = request.headers if isinstance(request.headers, list) else list(request.headers)
        call = Call(self, stream, route, headers)
        call.bytes_max = self._shared.message_bytes_max
        self._calls[number] = call
        self._n_unanswered += 1
        if not self._shared.enter():
            call.finish("RESOURCE_EXHAUSTED", "as many calls are open as may be; retry later", [])
            return
        call.is_counted = True
        try:
            self._prepare(call)
        except GatewayError as error:
            call.finish(error.grpc_status, str(error), [(b"x-driftgate-code", error.code.encode())])
            return
        if not route.is_unary:
            self._start(call)
        if request.end_stream:
            self._end(number)

    def _prepare(self, call: Call) -> None:
        """Read what HTTP/2 says about a call.

        Raises
        ------
        GatewayError : it says too much, or nonsense.
        """
        room = _METADATA_BYTES_MAX
        for name, value in call.headers:
            room -= len(name) + len(value)
            if name == b"grpc-timeout":
                call.deadline = self._loop.time() + wire.timeout_s(value)
            elif name == b"grpc-encoding":
                call.coding = value
        if room < 0:
            raise HeadTooLargeError(f"the metadata are longer than {_METADATA_BYTES_MAX} bytes")
        if call.deadline is not None:
            call.expiry = self._loop.call_at(call.deadline + call.route.grace_s, self._expire, call)

    def _start(self, call: Call) -> None:
        if not call.is_answered:
            call.task = self._loop.create_task(self._shared.run(call))

    def _end(self, number: int) -> None:
        """The client has sent all of a call."""
        if (call := self._calls.get(number)) is None:
            return
        call.end()
        if call.is_answered:
            del self._calls[number]
        elif call.task is None:
            self._start(call)

    def _reset(self, number: int) -> None:
        """A call is given up: by the client, or by zttp for what the client did."""
        self._n_resets += 1
        self._newest = max(self._newest, number)
        if (call := self._calls.pop(number, None)) is not None:
            self._drop(call)

    def _expire(self, call: Call) -> None:
        if call.task is None:
            call.finish("DEADLINE_EXCEEDED", "the deadline was over before the call had come", [])
        else:
            call.expire()

    def answered(self, call: Call) -> None:
        """Note that the whole answer is written."""
        self._leave(call)
        self._since = time.monotonic()
        if call.held:  # Nobody reads it, but it may say that the client has ended.
            self.release(call)
        if call.is_ended:
            self._calls.pop(call.stream.stream_id, None)
        self.flush_soon()

    def _leave(self, call: Call) -> None:
        """A call is over from here, one way or the other."""
        self._n_unanswered -= 1
        self._waiting.discard(call)
        if call.is_counted:
            call.is_counted = False
            self._shared.leave()
        if call.expiry is not None:
            call.expiry.cancel()

    def _drop(self, call: Call) -> None:
        if call.held:
            self._give_back(call.held_bytes - _FRAME_BYTES * len(call.held))
        if not call.is_answered:
            self._leave(call)
        call.drop()
        _wake(call)

    def _drop_all(self) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            self._drop(call)

    def release(self, call: Call) -> None:
        """Let zttp see what was held back; the client may send more then."""
        try:
            while call.held and not call.is_stalled:
                frame = call.held.popleft()
                call.held_bytes -= len(frame)
                self._feed(frame)
        except zttp.RemoteProtocolError:
            self._fail()
            return
        self.flush_soon()

    # -- room to write

    def wait_for_room(self, call: Call) -> "asyncio.Future[None]":
        """Done when it is worth looking again whether there is room to write."""
        self.flush()
        call.room = self._loop.create_future()
        self._waiting.add(call)
        return call.room

    def _wake_all(self) -> None:
        for call in self._waiting:
            _wake(call)
        self._waiting.clear()

    def flush(self) -> None:
        """Write what zttp has ready."""
        self._is_flushing = False
        data = self._http.data_to_send()
        if data:
            self._write(data)

    def flush_soon(self) -> None:
        """Write at the end of the loop's turn, with what other calls have by then."""
        self._strikes, self._ping_due = 0, 0.0  # Who is answered may ping: clients measure by it.
        if self._n_unanswered == 0:
            self.flush()
        elif not self._is_flushing:
            self._is_flushing = True
            self._loop.call_soon(self.flush)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _give_back(self, n_bytes: int) -> None:
        """Let the client send as many bytes again, that zttp has not seen."""
        self._credit += n_bytes
        if self._credit >= _CREDIT_BYTES:
            self._write(_frame(_WINDOW_UPDATE, 0, self._credit.to_bytes(4, "big")))
            self._credit = 0

    # -- pings, time, and the end

    def _ping(self, ping: zttp.Ping) -> None:
        if ping.ack:
            if ping.data == _FAREWELL and self._phase == _WARNED:
                self._name_last()
            return
        now = time.monotonic()
        if now < self._ping_due:
            self._strikes += 1
            if self._strikes > _STRIKES_MAX:
                self._write(_goaway(self._newest, _ENHANCE_YOUR_CALM, b"too_many_pings"))
                raise zttp.RemoteProtocolError
        self._ping_due = now + _PING_S_MIN

    def check(self, now: float) -> None:
        """Look after a connection that keeps us waiting; once a second, or more often.

        Parameters
        ----------
        now : by `time.monotonic`
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if not self._is_open:
            if now - self._since > self._shared.head_s_max:
                transport.abort()
            return
        if self._phase == _WARNED and now - self._since > _ACK_S_MAX:
            self._name_last()
        elif self._phase == _LAST and self.is_idle and now - self._since > _CLOSE_S_MAX:
            transport.close()
        if self._is_heard:
            self._is_heard, self._heard, self._pinged = False, now, 0.0
        elif self._pinged:
            if now - self._pinged > _DEAD_S:
                transport.abort()
        elif now - self._heard > _SILENCE_S_MAX:
            self._pinged = now
            self._write(_frame(_PING, 0, b"are you?"))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to answer or to write."""
        return self._n_unanswered == 0 and not self._http.has_pending_send()

    def go_away(self) -> None:
        """Ask the client to send no more calls here, and find out which was the last."""
        if self._phase == _SERVING and self._is_open:
            self._phase, self._since = _WARNED, time.monotonic()
            self.flush()
            self._write(_goaway(_ID_MAX, _NO_ERROR) + _frame(_PING, 0, _FAREWELL))
        elif not self._is_open and self._transport is not None:
            self._transport.close()  # Nothing has come that could be lost.

    def _name_last(self) -> None:
        self._phase, self._since = _LAST, time.monotonic()
        self._last = self._newest
        self.flush()
        self._write(_goaway(self._last, _NO_ERROR))

    def end(self) -> None:
        """Close now, whatever is under way."""
        if self._transport is not None:
            self._transport.close()

    def _fail(self) -> None:
        """End a connection that broke the protocol; zttp has written why."""
        self.flush()
        self._drop_all()
        self.end()


_UNKNOWN_SENTENCE = "no such call; reflection lists those that there are"


async def _unknown(call: Call) -> None:
    call.finish("UNIMPLEMENTED", _UNKNOWN_SENTENCE, [])


_UNKNOWN = Route("", _unknown, is_unary=False)


def _status(request: zttp.Request) -> int:
    """200 for what is gRPC at all, else what HTTP says to it."""
    if request.method != b"POST":
        return 405
    for name, value in request.headers:
        if name == b"content-type":
            return 200 if value.startswith(b"application/grpc") else 415
    return 415


def _wake(call: Call) -> None:
    if call.room is not None and not call.room.done():
        call.room.set_result(None)


def _frame(kind: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, 0)) + stream.to_bytes(4, "big") + payload


def _goaway(last: int, code: int, why: bytes = b"") -> bytes:
    return _frame(_GOAWAY, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big") + why)
