"""The carrier zttp under load and under attack: no call is lost, and the worker lives.

`make bench NAME=carrier` is the long form.
"""

import asyncio
import random
import socket
import struct
from pathlib import Path

import grpc

from bench.carrier import Client, run
from tests import models
from tests.gateway.grpc.test_connection import (
    CONTINUATION,
    HEADERS,
    HELLO,
    PING,
    RST,
    SETTINGS,
    WINDOW,
    call,
    frame,
    headers,
    message,
)
from tests.serving import serve

INFER = b"/inference.GRPCInferenceService/ModelInfer"
ATTACKS = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a greeting of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "settings without end": HELLO + frame(SETTINGS, 0, 0) * 50_000,
    "pings without end": HELLO + frame(PING, 0, 0, bytes(8)) * 50_000,
    "headers without end": HELLO + headers(1, INFER, flags=0)
    + frame(CONTINUATION, 0, 1, bytes(1000)) * 5_000,
    "calls given up at once": HELLO + b"".join(
        headers(k, INFER) + frame(RST, 0, k, bytes(4)) for k in range(1, 10_001, 2)
    ),
    "calls without end": HELLO + b"".join(headers(k, INFER) for k in range(1, 10_001, 2)),
    "empty frames without end": HELLO + headers(1, INFER) + frame(0, 0, 1) * 100_000,
    "a window beyond all bounds": HELLO + frame(WINDOW, 0, 0, struct.pack(">I", 2**31 - 1)) * 3,
    "a frame beyond all bounds": HELLO + b"\xff\xff\xff" + bytes(6) + bytes(100_000),
    "a message beyond all bounds": HELLO + headers(1, INFER)
    + frame(0, 0, 1, b"\0\xff\xff\xff\xff"),
    "more than was granted": HELLO + headers(1, INFER[:-5] + b"StreamInfer")
    + message(1, bytes(16_000)) * 2_000,
    "a call of nothing": HELLO + call(1, b"", INFER),
    "a table of headers that was never agreed": HELLO
    + frame(HEADERS, 5, 1, b"\x3f\xff\xff\xff\x7f"),
}  # fmt: skip


def attack(address: tuple[str, int], data: bytes) -> None:
    """Send all of it without reading, unless the server ends the connection."""
    with socket.create_connection(address, timeout=5) as client:
        try:
            client.sendall(data)
        except OSError:
            return


def test_nothing_is_lost_and_nothing_that_comes_ends_the_worker(tmp_path: Path) -> None:
    """Connections taken out of service, calls expired and given up, attacks, SIGTERM under load."""
    models.put(tmp_path, "wide", 1, models.identity("FP32", ("n", "k")))
    with serve(tmp_path, {"grpc_carrier": "zttp"}) as server:
        url = server.wait_for("ready")["grpc_url"]
        host, _, port = url.rpartition(":")
        with grpc.insecure_channel(url) as channel:
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            generator = random.Random(5)
            noise = {f"noise {k}": HELLO + generator.randbytes(2_000) for k in range(30)}
            for data in (ATTACKS | noise).values():
                attack((host, int(port)), data)
                assert live(b"", timeout=5) == b"\x08\x01"
        assert not server.events("worker_ended")

        client = Client(url, "wide", 2)
        tally = asyncio.run(
            run(
                client, n_calls=18_000, n_given_up=600, shapes=((1, 32), (2, 16)),
                pid=server.process.pid,
            )
        )  # fmt: skip
        assert not tally.lost, tally
        assert tally.answered > 18_000
        assert tally.messages == 8_000
        assert sum(tally.given_up.values()) == 600
        assert tally.under_way > 0
        server.code = server.process.wait(30)
        assert not server.events("worker_ended", "request_failed")
    assert server.code == 0
