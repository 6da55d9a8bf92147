"""One HTTP/2 connection, driven with frames written by hand: bounds, windows, and its end."""

import asyncio
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.grpc import connection as module
from gateway.grpc import wire
from gateway.grpc.connection import Connection
from gateway.grpc.exchange import Call, Route
from gateway.grpc.http2 import HTTP2Carrier

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
ID_MAX = 2**31 - 1
HELLO = module.PREFACE + b"\0\0\0\4\0\0\0\0\0"


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(
        ">I", stream
    ) + payload  # fmt: skip


def text(value: bytes) -> bytes:
    """A string of HPACK, not packed."""
    rest, head = len(value) - 127, bytes((min(len(value), 127),))
    while rest >= 128:
        head, rest = head + bytes((rest % 128 + 128,)), rest // 128
    return head + (bytes((rest,)) if len(value) >= 127 else b"") + value


def headers(
    stream: int, path: bytes = b"/t/Echo", *more: tuple[bytes, bytes], flags: int = END_HEADERS,
    method: bytes = b"POST", kind: bytes = b"application/grpc",
) -> bytes:  # fmt: skip
    fields = [(b":method", method), (b":scheme", b"http"), (b":path", path), (b"te", b"trailers")]
    fields += [(b"content-type", kind), *more]
    block = b"".join(b"\0" + text(name) + text(value) for name, value in fields)
    if len(block) <= 16_384:
        return frame(HEADERS, flags, stream, block)
    rest = frame(CONTINUATION, END_HEADERS, stream, block[16_384:])
    return frame(HEADERS, flags & ~END_HEADERS, stream, block[:16_384]) + rest


def message(stream: int, body: bytes = b"hi", flags: int = 0) -> bytes:
    return frame(DATA, flags, stream, wire.prefixed(body))


def call(stream: int, body: bytes = b"hi", path: bytes = b"/t/Echo") -> bytes:
    return headers(stream, path) + message(stream, body, END_STREAM)


class Wire:
    """A transport that remembers."""

    def __init__(self) -> None:
        self.written = b""
        self.is_closed = False
        self.buffered = 0

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else None

    def frames(self) -> list[Frame]:
        """What has been written since the last time, as frames."""
        data, self.written, found = self.written, b"", []
        while data:
            end = 9 + int.from_bytes(data[:3], "big")
            found.append(Frame(data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]))
            data = data[end:]
        return found


class Server:
    """What connections share: calls that echo, wait for `go`, or read only when they may."""

    def __init__(self, calls_max: int = 1000) -> None:
        self.message_bytes_max = 1 << 20
        self.head_s_max = 10.0
        self.connections: set[Connection] = set()
        self.is_stopping = False
        self.n_calls, self.calls_max = 0, calls_max
        self.go = asyncio.Event()
        self.seen: list[bytes] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.routes = {
            b"/t/Echo": Route("Echo", self._echo), b"/t/Wait": Route("Wait", self._wait),
            b"/t/Read": Route("Read", self._read, is_unary=False),
            b"/t/Flood": Route("Flood", self._flood),
        }  # fmt: skip

    async def _echo(self, one: Call) -> None:
        await one.give(await one.message(), [])

    async def _wait(self, one: Call) -> None:
        await self.go.wait()
        await self._echo(one)

    async def _read(self, one: Call) -> None:
        await self.go.wait()
        async for each in one.read():
            self.seen.append(each)
        one.finish("OK", "", [])

    async def _flood(self, one: Call) -> None:
        for _ in range(1000):
            await one.send(bytes(60_000))
            self.seen.append(b"")

    def may_open(self, connection: Connection) -> bool:
        self.connections.add(connection)
        return True

    def closed(self, connection: Connection) -> None:
        self.connections.discard(connection)

    def enter(self) -> bool:
        if self.n_calls >= self.calls_max:
            return False
        self.n_calls += 1
        return True

    def leave(self) -> None:
        self.n_calls -= 1

    def route(self, path: bytes) -> Route | None:
        return self.routes.get(path)

    def run(self, one: Call) -> Coroutine[Any, Any, None]:
        return self._run(one)

    async def _run(self, one: Call) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await HTTP2Carrier.run(self, one)  # type: ignore[arg-type]  # it needs nothing of self
        finally:
            self.tasks.discard(task)


class Talk:
    """One client of one server, over no network."""

    def __init__(self, **options: Any) -> None:
        self.server = Server(**options)
        self.wire = Wire()
        self.connection = Connection(self.server)
        self.connection.connection_made(self.wire)  # type: ignore[arg-type]
        self.connection.data_received(HELLO)
        self.wire.frames()

    async def say(self, *data: bytes) -> list[Frame]:
        """Send, and hear what comes back by the end of a few turns of the loop."""
        self.connection.data_received(b"".join(data))
        for _ in range(8):
            await asyncio.sleep(0)
        return self.wire.frames()


def talk(scenario: Callable[[Talk], Coroutine[Any, Any, None]], **options: Any) -> Talk:
    """Run a conversation; nothing may be left over when the client has gone."""

    async def whole() -> Talk:
        talked = Talk(**options)
        await scenario(talked)
        talked.connection.connection_lost(None)
        for _ in range(8):
            await asyncio.sleep(0)
        assert (talked.server.n_calls, talked.server.tasks) == (0, set())
        assert not talked.server.connections
        return talked

    return asyncio.run(whole())


def statuses(frames: list[Frame]) -> dict[int, bytes]:
    """The last header block of each stream; its fields are written out, for we pack nothing."""
    return {each.stream: each.payload for each in frames if each.kind == HEADERS}


def goaways(frames: list[Frame]) -> list[tuple[int, int]]:
    return [struct.unpack(">II", each.payload[:8]) for each in frames if each.kind == GOAWAY]  # type: ignore[misc]


# -- calls


def test_a_call_is_answered_with_headers_message_and_trailers_in_one_write() -> None:
    """However the bytes are cut."""

    async def scenario(client: Talk) -> None:
        whole = call(1, b"abc")
        for byte in whole[:-1]:
            assert await client.say(bytes((byte,))) == []
        first, body, last = await client.say(whole[-1:])
        assert (first.kind, body.payload, last.kind) == (HEADERS, wire.prefixed(b"abc"), HEADERS)
        assert last.flags & END_STREAM
        assert last.payload.endswith(b"grpc-status" + text(b"0"))

    talk(scenario)


def test_a_large_message_may_end_with_a_frame_of_its_own() -> None:
    """As clients in other languages do; it does not wait for a reader that waits for it."""
    body = wire.prefixed(bytes(200_000))

    async def scenario(client: Talk) -> None:
        frames = await client.say(headers(1))
        for start in range(0, len(body), 16_000):
            frames += await client.say(frame(DATA, 0, 1, body[start : start + 16_000]))
        assert HEADERS not in {each.kind for each in frames}
        frames = await client.say(frame(DATA, END_STREAM, 1))
        assert sum(len(each.payload) for each in frames if each.kind == DATA) == 65_535

    talk(scenario)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (call(1, path=b"/t/None"), b"12"),
        (headers(1, b"/t/Echo", (b"grpc-timeout", b"soon")), b"3"),
        (headers(1, b"/t/Echo", *((b"x-%d" % k, bytes(1000 * b"a")) for k in range(17))), b"8"),
        (headers(1) + frame(DATA, END_STREAM, 1), b"13"),
        (headers(1, flags=END_HEADERS | END_STREAM), b"13"),
        (headers(1) + frame(DATA, END_STREAM, 1, wire.prefixed(b"abc")[:-1]), b"13"),
        (headers(1) + message(1) + message(1), b"13"),
        (headers(1) + frame(DATA, 0, 1, b"\0\x7f\0\0\0"), b"8"),
        (headers(1) + frame(DATA, 0, 1, b"\7\0\0\0\0"), b"13"),
        (headers(1) + frame(DATA, END_STREAM, 1, b"\1\0\0\0\1x"), b"13"),
        (headers(1, b"/t/Wait", (b"grpc-timeout", b"0n")), b"4"),
    ],
)
def test_what_is_wrong_with_a_call_is_its_own_status(sent: bytes, status: bytes) -> None:
    """Unknown, late, too much, cut off, too many, none: and the connection goes on."""

    async def scenario(client: Talk) -> None:
        found = statuses(await client.say(sent))
        await asyncio.sleep(0.01)
        found |= statuses(await client.say())
        assert b"grpc-status" + text(status) in found[1]
        assert DATA in {each.kind for each in await client.say(call(3))}

    talk(scenario)


@pytest.mark.parametrize(("how", "status"), [
    ({"method": b"GET"}, b"405"), ({"kind": b"application/json"}, b"415"), ({"kind": b""}, b"415"),
])  # fmt: skip
def test_what_is_no_grpc_has_a_status_of_http(how: dict[str, Any], status: bytes) -> None:
    """As the document asks for."""

    async def scenario(client: Talk) -> None:
        assert text(status) in statuses(await client.say(headers(1, **how)))[1]
        assert len(await client.say(call(3))) == 3

    talk(scenario)


def test_calls_beyond_the_limit_are_refused_and_their_places_come_free() -> None:
    """Answered, given up or refused: a place is taken once and given back once."""

    async def scenario(client: Talk) -> None:
        await client.say(call(1, path=b"/t/Wait"), call(3, path=b"/t/Wait"))
        refused = statuses(await client.say(call(5)))
        assert b"grpc-status" + text(b"8") in refused[5]
        await client.say(frame(RST, 0, 1, struct.pack(">I", 8)))
        assert len(await client.say(call(7))) == 3
        client.server.go.set()
        assert {each.stream for each in await client.say()} == {3}

    talk(scenario, calls_max=2)


# -- windows


def granted(frames: list[Frame]) -> Counter[int]:
    """Bytes that the client may send, by stream."""
    found: Counter[int] = Counter()
    for each in frames:
        if each.kind == WINDOW:
            found[each.stream] += int.from_bytes(each.payload, "big")
    return found


def test_a_call_that_is_not_read_closes_its_own_window_only() -> None:
    """What was granted at first may come, and no more; other calls go on; then all is read."""
    piece = bytes(16_000)

    async def scenario(client: Talk) -> None:
        frames = await client.say(headers(1, b"/t/Read"))
        sent = 0
        for k in range(16):  # 256 KiB: the whole window
            frames += await client.say(message(1, piece[:-1] + bytes((k,))))
            sent += 1
        assert granted(frames)[1] < 200_000
        quiet = await client.say(call(3))
        assert len(quiet) == 3
        client.server.go.set()
        frames += await client.say()
        frames += await client.say(frame(DATA, END_STREAM, 1))
        assert [each[-1] for each in client.server.seen] == list(range(sent))
        assert granted(frames)[1] > 16 * 16_000 - 32_768
        assert b"grpc-status" + text(b"0") in statuses(frames)[1]

    talk(scenario)


def test_a_client_that_ignores_its_window_is_closed() -> None:
    """What may be held is bounded, whatever a client does."""

    async def scenario(client: Talk) -> None:
        await client.say(headers(1, b"/t/Read"))
        frames: list[Frame] = []
        for _ in range(100):
            if client.wire.is_closed:
                break
            frames += await client.say(message(1, bytes(16_000)))
        assert client.wire.is_closed
        assert [code for _, code in goaways(frames)] == [3]

    talk(scenario)


def test_bytes_for_calls_that_are_over_are_given_back_for_ever() -> None:
    """16 MB of them: the connection lives, and the client may go on sending."""

    async def scenario(client: Talk) -> None:
        late = frame(DATA, 0, 1, bytes(16_000))
        frames = await client.say(headers(1, b"/t/Wait"), frame(RST, 0, 1, bytes(4)))
        for _ in range(1000):
            frames += await client.say(late)
        assert granted(frames)[0] > 1000 * 16_000 - 32_768
        assert len(await client.say(call(3))) == 3

    talk(scenario)


def test_an_answer_waits_for_the_window_of_the_client() -> None:
    """And takes a bounded place meanwhile; a grant lets as much go on."""

    async def scenario(client: Talk) -> None:
        frames = await client.say(call(1, path=b"/t/Flood"))
        assert sum(len(each.payload) for each in frames if each.kind == DATA) == 65_535
        assert len(client.server.seen) < 10
        before = len(client.server.seen)
        room = struct.pack(">I", 600_000)
        frames = await client.say(frame(WINDOW, 0, 0, room), frame(WINDOW, 0, 1, room))
        for _ in range(20):
            frames += await client.say()
        assert sum(len(each.payload) for each in frames if each.kind == DATA) == 600_000
        assert 5 <= len(client.server.seen) - before <= 15

    talk(scenario)


def test_an_answer_waits_while_the_kernel_takes_nothing() -> None:
    """However large the window."""

    async def scenario(client: Talk) -> None:
        room = struct.pack(">I", 2**30)
        client.connection.pause_writing()
        await client.say(frame(WINDOW, 0, 0, room), headers(1, b"/t/Flood"))
        await client.say(frame(WINDOW, 0, 1, room), message(1, flags=END_STREAM))
        assert client.server.seen == []
        client.connection.resume_writing()
        await client.say()
        assert client.server.seen

    talk(scenario)


def test_a_client_that_takes_nothing_and_asks_on_is_closed() -> None:
    """Acknowledgements that nobody reads are not kept without bound."""

    async def scenario(client: Talk) -> None:
        client.connection.pause_writing()
        client.wire.buffered = 17 << 20
        await client.say(frame(SETTINGS, 0, 0))
        assert client.wire.is_closed

    talk(scenario)


# -- the end


def test_a_connection_is_taken_out_of_service_in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls sent before the client knew are answered; those after the last are not begun."""
    monkeypatch.setattr(module, "STREAMS_MAX", 3)

    async def scenario(client: Talk) -> None:
        frames = await client.say(call(1), call(3), call(5, path=b"/t/Wait"))
        (ping,) = [each for each in frames if each.kind == PING]
        assert goaways(frames) == [(ID_MAX, 0)]
        frames = await client.say(call(7))
        assert (goaways(frames), 7 in statuses(frames)) == ([], True)
        frames = await client.say(frame(PING, ACK, 0, ping.payload))
        assert goaways(frames) == [(7, 0)]
        assert await client.say(call(9)) == []
        client.server.go.set()
        assert {each.stream for each in await client.say()} == {5}
        now = client.connection._since
        client.connection.check(now + 2.9)
        assert not client.wire.is_closed
        client.connection.check(now + 3.1)
        assert client.wire.is_closed

    talk(scenario)


def test_the_last_call_is_named_also_without_an_answer_to_the_ping() -> None:
    """After 5 s; and an end that was begun is not begun again."""

    async def scenario(client: Talk) -> None:
        await client.say(call(1, path=b"/t/Wait"))
        client.connection.go_away()
        client.connection.go_away()
        assert goaways(client.wire.frames()) == [(ID_MAX, 0)]
        now = client.connection._since
        client.connection.check(now + 4.9)
        assert goaways(client.wire.frames()) == []
        client.connection.check(now + 5.1)
        assert goaways(client.wire.frames()) == [(1, 0)]
        client.connection.check(client.connection._since + 100)
        assert not client.wire.is_closed  # A call is under way.

    talk(scenario)


def test_calls_that_are_given_up_take_a_connection_out_of_service_long_before_zttp_ends_it() -> (
    None
):
    """64 of them with 127 more under way: zttp ends a connection at 257."""

    async def scenario(client: Talk) -> None:
        given_up = b"".join(
            headers(k) + frame(RST, 0, k, struct.pack(">I", 8)) for k in range(1, 129, 2)
        )
        assert goaways(await client.say(given_up)) == [(ID_MAX, 0)]
        under_way = range(129, 129 + 2 * 127, 2)
        await client.say(*(headers(k) for k in under_way))
        await client.say(*(frame(RST, 0, k, bytes(4)) for k in under_way))
        assert len(await client.say(call(1001))) == 3

    talk(scenario)


def test_a_client_that_is_silent_is_asked_and_then_let_go() -> None:
    """After 60 s and 20 s more; a sign of life is enough."""

    async def scenario(client: Talk) -> None:
        now = client.connection._since
        client.connection.check(now)
        client.connection.check(now + 61)
        assert [each.kind for each in client.wire.frames()] == [PING]
        await client.say(frame(PING, ACK, 0, b"are you?"))
        client.connection.check(now + 70)
        client.connection.check(now + 131)
        client.connection.check(now + 150)
        assert not client.wire.is_closed
        client.connection.check(now + 152)
        assert client.wire.is_closed

    talk(scenario)


def test_pings_are_answered_unless_they_are_all_that_comes() -> None:
    """More than two at once without a call between them: GOAWAY, as grpcio does."""
    ping = frame(PING, 0, 0, b"12345678")

    async def scenario(client: Talk) -> None:
        for k in range(20):
            frames = await client.say(ping, call(2 * k + 1))
            assert PING in {each.kind for each in frames}
        assert not client.wire.is_closed
        frames = await client.say(*[ping] * 4)
        assert (goaways(frames)[0][1], client.wire.is_closed) == (11, True)

    talk(scenario)


def test_who_says_nothing_at_all_is_let_go() -> None:
    """A connection must begin within the time for headers."""

    async def scenario(client: Talk) -> None:
        mute = Connection(client.server)
        wire_ = Wire()
        mute.connection_made(wire_)  # type: ignore[arg-type]
        mute.data_received(module.PREFACE[:10])
        mute.check(mute._since + 9)
        assert not wire_.is_closed
        mute.check(mute._since + 11)
        assert wire_.is_closed
        mute.connection_lost(None)

    talk(scenario)


# -- whatever comes

numbers = st.integers(0, 12)
payloads = st.binary(max_size=40)
hostile = st.one_of(
    st.builds(frame, st.integers(0, 11), st.integers(0, 255), numbers, payloads),
    st.builds(headers, numbers, st.sampled_from([b"/t/Echo", b"/t/Wait", b"/t/Read", b"/t/X"]),
              flags=st.integers(0, 63)),
    st.builds(lambda n, body, flags: frame(DATA, flags, n, body), numbers,
              st.one_of(payloads, payloads.map(wire.prefixed), st.just(bytes(16_384))),
              st.sampled_from([0, 1, 8, 9])),
    st.builds(lambda n, body: frame(DATA, 1, n, b"\1" + body), numbers, payloads),
    st.builds(lambda n, code: frame(RST, 0, n, struct.pack(">I", code)), numbers, st.just(8)),
    st.builds(lambda n, by: frame(WINDOW, 0, n, struct.pack(">I", by)), numbers,
              st.sampled_from([0, 1, 65_535, ID_MAX, 2**32 - 1])),
    st.builds(lambda k, v: frame(SETTINGS, 0, 0, struct.pack(">HI", k, v)), st.integers(0, 9),
              st.sampled_from([0, 1, 65_535, ID_MAX, 2**32 - 1])),
    st.builds(lambda flags: frame(PING, flags, 0, b"farewell"), st.sampled_from([0, 1])),
    st.builds(call, numbers.map(lambda n: 2 * n + 1), payloads),
    st.binary(max_size=30),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(hostile, max_size=25), st.integers(1, 400), st.booleans())
def test_whatever_comes_ends_at_worst_the_connection(
    frames: list[bytes], cut: int, is_ending: bool
) -> None:
    """No exception, no call left behind, and nothing written that is no frame."""

    async def scenario(client: Talk) -> None:
        if is_ending:
            client.connection.go_away()
        data = b"".join(frames)
        for start in range(0, len(data), cut):
            if client.wire.is_closed:
                break
            client.connection.data_received(data[start : start + cut])
            await asyncio.sleep(0)
        client.server.go.set()
        assert sum(len(each.payload) for each in await client.say()) >= 0

    talk(scenario)
