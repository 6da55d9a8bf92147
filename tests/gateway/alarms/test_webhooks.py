"""Delivery: against real sockets that hang, redirect, lie; and the rules of trying again."""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from gateway import outgoing
from gateway.alarms.log import AlarmLog, Crossing
from gateway.alarms.targets import Target, Targets
from gateway.alarms.webhooks import QUEUE_MAX, TRIES_MAX, WAITS_S, WITHIN_S, WebhookMeters, Webhooks
from gateway.counters import Region
from gateway.outgoing import Allowed, DeliveryError, deliver, is_public
from tests.receiver import Receiver, status
from tests.serving import wait_until

LOOPBACK = Allowed.of(["127.0.0.1", "hooks.example.com"])


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def send(url: str, allowed: Allowed = LOOPBACK, **options: Any) -> int:
    return asyncio.run(
        deliver(url, b"{}", {"content-type": "application/json"}, allowed, **options)
    )


# -- where it may go


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True), ("2606:4700::1111", True), ("10.0.0.1", False),
        ("127.0.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("192.168.1.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False), ("::", False), ("fe80::1", False), ("fc00::1", False), ("ff02::1", False),
        ("::ffff:10.0.0.1", False), ("::ffff:93.184.216.34", True), ("64:ff9b::a00:1", False),
        ("64:ff9b::7f00:1", False), ("2002:a00:1::", False), ("2001:db8::1", False),
        ("198.18.0.1", False), ("192.0.2.1", False),
    ],
)  # fmt: skip
def test_only_addresses_of_the_internet_at_large_are_public(address: str, expected: bool) -> None:
    """Also when an IPv6 address wraps the private one, and beyond what is called private."""
    assert is_public(ip_address(address)) is expected


def test_a_listed_name_opens_no_network_and_a_listed_network_does() -> None:
    """A name can be made to point anywhere; whoever means the inside lists it."""
    inside = ip_address("10.1.2.3")

    assert not Allowed.of(["hooks.example.com"]).takes(inside)
    assert Allowed.of(["hooks.example.com", "10.1.0.0/16"]).takes(inside)
    assert Allowed.of(["10.1.0.0/16"]).takes(ip_address("::ffff:10.1.2.3"))
    assert Allowed.of(["Hooks.Example.com."]).names("hooks.example.COM")
    assert not Allowed.of(["example.com"]).names("hooks.example.com")
    assert not Allowed.of(["10.1.0.0/16"]).names("10.2.0.1")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://other.example.com/", "not allowed"),
        ("http://10.0.0.1/", "not allowed"),
        ("http://[::1]/", "not allowed"),
        ("http://2130706433/", "not allowed"),
        ("http://0x7f.1/", "not allowed"),
        ("file:///etc/passwd", "not allowed"),
        ("http://127.0.0.1@evil.example.com/", "not allowed"),
    ],
)
def test_what_is_not_listed_is_not_looked_up(
    url: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for good, before any name is asked for."""
    monkeypatch.setattr(socket, "getaddrinfo", None)

    with pytest.raises(DeliveryError, match=said) as caught:
        send(url)
    assert caught.value.is_final


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Names lead to these addresses, one after the other; gives the list of names asked for."""
    asked: list[str] = []

    def getaddrinfo(host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else str(host)
        if name == "hooks.example.com":
            asked.append(name)
            name = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_listed_name_that_leads_inside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebinding: the name is allowed, its address is the cloud's metadata service."""
    resolve_to(monkeypatch, "169.254.169.254")

    with pytest.raises(DeliveryError, match="inside the network") as caught:
        send("https://hooks.example.com/", Allowed.of(["hooks.example.com"]))
    assert caught.value.is_final


def test_the_address_that_was_judged_is_the_one_connected_to(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is asked for once; a second answer would lead elsewhere. Host stays the name."""
    asked = resolve_to(monkeypatch, "127.0.0.1", "10.0.0.1")

    assert send(f"http://hooks.example.com:{receiver.port}/hook?x=1") == 204

    assert asked == ["hooks.example.com"]
    path, headers, _ = receiver.requests[0]
    assert (path, headers["host"]) == ("/hook?x=1", f"hooks.example.com:{receiver.port}")


def test_beyond_loopback_only_https(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature is not a secret, but an alarm's content is nobody else's."""
    resolve_to(monkeypatch, "93.184.216.34")

    with pytest.raises(DeliveryError, match="only https"):
        send("http://hooks.example.com/")


# -- what receivers do


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    """Nor tried again: a door that sends elsewhere was checked for nothing."""
    receiver.answers = [status(302, location=receiver.url)]

    with pytest.raises(DeliveryError, match="redirects") as caught:
        send(receiver.url)
    assert caught.value.is_final
    assert len(receiver.requests) == 1


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(5)
    handler.close_connection = True


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    try:
        for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize("answer", [hang, drip])
def test_a_receiver_that_hangs_is_given_up(receiver: Receiver, answer: Any) -> None:
    """One bound on all of it, also on an answer that comes byte by byte."""
    receiver.answers = [answer]
    start = time.monotonic()

    with pytest.raises(DeliveryError, match="no answer within") as caught:
        send(receiver.url, timeout_s=0.4)

    assert time.monotonic() - start < 2
    assert not caught.value.is_final
    assert outgoing.DELIVERY_S == 5


def test_an_answer_without_end_is_cut(receiver: Receiver) -> None:
    """Its status is what counts; 64 KiB of the rest are read."""

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        try:
            while True:
                handler.wfile.write(b"x" * 65536)
        except OSError:
            pass

    receiver.answers = [endless]

    assert send(receiver.url) == 200


@pytest.mark.parametrize(
    ("code", "is_final"), [(400, True), (401, True), (404, True), (409, True), (429, False),
                           (500, False), (503, False)]
)  # fmt: skip
def test_what_may_change_is_tried_again_and_what_will_not_is_not(
    receiver: Receiver, code: int, is_final: bool
) -> None:
    """As the status says."""
    receiver.answers = [status(code, retry_after="7")]

    with pytest.raises(DeliveryError, match=f"answered {code}") as caught:
        send(receiver.url)
    assert (caught.value.is_final, caught.value.retry_after_s) == (is_final, 7.0)


def test_told_before_is_told(receiver: Receiver) -> None:
    """409 of a scheduler whose run of this id is there."""
    receiver.answers = [status(409)]

    assert send(receiver.url, done=frozenset((409,))) == 409


def test_nobody_there_and_a_body_too_large(receiver: Receiver) -> None:
    """The first may change, the second not."""
    receiver.close()
    with pytest.raises(DeliveryError, match="not reached") as caught:
        send(receiver.url)
    assert not caught.value.is_final
    with pytest.raises(DeliveryError, match="more than 65536") as caught:
        asyncio.run(deliver(receiver.url, b"x" * 65537, {}, LOOPBACK))
    assert caught.value.is_final


# -- the thread


class Harness:
    """Webhooks with a log, a send that is told what to do, and no real pauses."""

    def __init__(self, directory: Path, send: Any = None, *names: str) -> None:
        self.log = AlarmLog(directory / "alarms.jsonl", hold_off_s=0)
        self.dead = directory / "dead.jsonl"
        self.pauses: list[float] = []
        region = Region()
        self.meters = WebhookMeters(*(region.counter() for _ in range(4)))
        self.targets = Targets(
            tuple(Target(name=name, url="http://127.0.0.1:1/") for name in names or ("t",)),
            ("127.0.0.1",),
        )
        self.hooks = Webhooks(
            self.targets, self.log, self.dead, self.meters,
            sleep=self.sleep, jitter=lambda high: high, send=send,
        )  # fmt: skip

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    def cross(self, monitor: str = "drift:a") -> None:
        self.log.crossed(Crossing("m", 1, monitor, "why", 0.0, {}))

    def settle(self) -> None:
        wait_until(lambda: self.hooks.waiting == 0, "all told or given up")


def failing(error: DeliveryError, until: int = 10**9) -> Callable[..., Awaitable[int]]:
    tries = 0

    async def send(*_: Any, **__: Any) -> int:
        nonlocal tries
        tries += 1
        if tries <= until:
            raise error
        return 200

    return send


def test_five_tries_over_ten_minutes_then_a_dead_letter(tmp_path: Path) -> None:
    """Full jitter below four bounds that add up to ten minutes; the letter says why and what."""
    harness = Harness(tmp_path, failing(DeliveryError("answered 503")))
    harness.hooks.start()
    harness.cross()
    harness.settle()
    harness.hooks.stop()

    assert harness.pauses == list(WAITS_S)
    assert (len(WAITS_S), sum(WAITS_S)) == (TRIES_MAX - 1, WITHIN_S)
    letter = json.loads(harness.dead.read_text())
    assert (letter["target"], letter["reason"]) == ("t", "answered 503")
    assert letter["key"] == letter["alarm"]["alarm"] == harness.log.episodes()[0].id
    assert (harness.meters.retried.value, harness.meters.dead.value) == (4, 1)


@pytest.mark.parametrize(
    ("error", "until", "pauses"),
    [
        (DeliveryError("answered 404", is_final=True), 9, []),
        (DeliveryError("answered 503"), 2, [20.0, 60.0]),
        (DeliveryError("answered 429", retry_after_s=100.0), 1, [100.0]),
        (DeliveryError("answered 429", retry_after_s=9999.0), 1, []),
    ],
)
def test_what_is_tried_again_and_when(
    tmp_path: Path, error: DeliveryError, until: int, pauses: list[float]
) -> None:
    """Not what would fail again; not before the receiver allows; not beyond the ten minutes."""
    harness = Harness(tmp_path, failing(error, until))
    harness.hooks.start()
    harness.cross()
    harness.settle()
    harness.hooks.stop()

    assert harness.pauses == pauses
    is_told = harness.meters.delivered.value == 1
    assert is_told is (until < 9 and error.retry_after_s != 9999.0)
    assert is_told is not harness.dead.exists()


def test_a_target_that_hangs_delays_no_other_and_nobody_who_alarms(tmp_path: Path) -> None:
    """Each delivery is by itself; whoever opens an episode goes on at once."""
    told: list[str] = []

    async def send(url: str, content: bytes, *_: Any, **__: Any) -> int:
        if "hang" in url:
            await asyncio.sleep(30)
        told.append(json.loads(content)["subject"])
        return 200

    harness = Harness(tmp_path, send)
    hanging = Target(name="hang", url="http://127.0.0.1/hang")
    harness.hooks._targets = Targets((hanging, *harness.targets.targets), ("127.0.0.1",))
    harness.hooks.start()
    start = time.monotonic()
    for k in range(10):
        harness.cross(f"drift:{k}")
    assert time.monotonic() - start < 2
    wait_until(lambda: len(told) == 10, "the other target is told of all")
    harness.hooks.stop()
    assert time.monotonic() - start < 10


def test_a_full_queue_refuses_and_counts(tmp_path: Path) -> None:
    """A thousand wait at most."""
    harness = Harness(tmp_path, failing(DeliveryError("x")))
    harness.hooks.start()
    harness.hooks._waiting = QUEUE_MAX
    harness.cross()
    harness.hooks._waiting = 0
    harness.hooks.stop()

    assert harness.meters.refused.value == 1


def test_what_was_opened_and_not_told_is_told_after_a_restart(tmp_path: Path) -> None:
    """Once: who was told before is not told again."""
    told: list[str] = []

    async def send(_: str, content: bytes, *__: Any, **___: Any) -> int:
        told.append(json.loads(content)["id"])
        return 200

    first = Harness(tmp_path, send)
    first.cross()  # before its thread runs: as if it had died first
    assert first.meters.refused.value == 1
    first.hooks.stop()
    for _ in range(2):
        again = Harness(tmp_path, send)
        again.hooks.start()
        again.settle()
        again.hooks.stop()

    assert told == [first.log.episodes()[0].id]


def test_of_several_workers_one_tells_what_was_left(tmp_path: Path) -> None:
    """All start at once after a crash; the alarm that nobody was told of is told once."""
    told: list[str] = []

    async def send(_: str, content: bytes, *__: Any, **___: Any) -> int:
        told.append(json.loads(content)["id"])
        return 200

    left = Harness(tmp_path, send)
    left.cross()
    left.hooks.stop()
    workers = [Harness(tmp_path, send) for _ in range(3)]
    for worker in workers:
        worker.hooks.start()
    for worker in workers:
        worker.settle()
        worker.hooks.stop()

    assert told == [left.log.episodes()[0].id]
