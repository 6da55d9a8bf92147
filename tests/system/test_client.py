"""The Python client against real servers, and against servers that do wrong."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway import client
from gateway.client import AsyncClient, Client
from gateway.demo import sample
from gateway.tensors import DTYPES
from tests import models
from tests.serving import Server, free_port, serve

KINDS = [kind for kind in models.ELEMENTS if kind != "BF16"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every datatype and a few shapes, and the demo's."""
    registry = tmp_path_factory.mktemp("registry")
    for kind in KINDS:
        models.put(registry, f"is_{kind.lower()}", 1, models.identity(kind, ("n", 2)))
    models.put(registry, "pair", 1, models.sum_and_difference())
    models.put(registry, "pair", 3, models.sum_and_difference())
    models.put(registry, "scalar", 1, models.scalar())
    models.put(registry, "mixed", 1, models.mixed())
    place = registry / "flights" / "1"
    place.mkdir(parents=True)
    (place / "model.onnx").write_bytes(sample.model_path("january_march").read_bytes())
    return registry


@pytest.fixture(scope="module")
def server(registry: Path) -> Iterator[Server]:
    """One server for all tests that do it no harm."""
    with serve(registry) as server:
        yield server


def values(kind: str) -> np.ndarray[Any, Any]:
    """Two rows of two, with the ends of the datatype's range."""
    dtype = DTYPES[kind]
    if kind == "BYTES":
        return np.array([["", "é"], ["a b", "\U0001f600"]], dtype=np.object_)
    if kind == "BOOL":
        return np.array([[True, False], [False, True]])
    if dtype.kind == "f":
        return np.array([[0.5, np.finfo(dtype).max], [np.nan, np.inf]], dtype=dtype)
    info = np.iinfo(dtype)
    return np.array([[info.min, info.max], [0, 1]], dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("binary", [False, None])
def test_arrays_come_back_as_they_went(server: Server, kind: str, binary: bool | None) -> None:
    """Every datatype through an identity; JSON knows no infinity, it is the one thing lost."""
    sent = values(kind)
    with Client(server.url, binary=binary) as gate:
        answer = gate.predict(f"is_{kind.lower()}", {"x": sent})

    expected = sent
    if binary is False and sent.dtype.kind == "f":
        expected = np.where(np.isinf(sent), np.nan, sent)
    assert answer["y"].dtype == sent.dtype
    np.testing.assert_array_equal(answer["y"], expected)


def test_an_answer_says_who_gave_it(server: Server) -> None:
    """Model, version, both ids; outputs in the order asked for."""
    pair = {name: np.ones((1, 2), np.float32) for name in "ab"}
    with Client(server.url) as gate:
        answer = gate.predict(
            "pair", pair, outputs=["difference", "sum"], id="mine", request_id="label-7"
        )
        older = gate.predict("pair", pair, version=1)

    assert list(answer) == ["difference", "sum"]
    assert answer["sum"].tolist() == [[2, 2]]
    assert (answer.model, answer.version, answer.id) == ("pair", 3, "mine")
    assert answer.request_id == "label-7"
    assert (older.version, older.id) == (1, None)


def test_a_table_of_flights_is_one_call(server: Server) -> None:
    """Columns as they are read, float64 and text; the same numbers as row by row."""
    flights = sample.load()
    columns = {name: column[:50] for name, column in flights.columns.items()}
    wide = {n: c.astype(np.float64) if c.dtype.kind == "f" else c for n, c in columns.items()}
    with Client(server.url) as gate:
        answer = gate.predict_table("flights", wide)
        one = gate.predict("flights", {n: c[7:8].reshape(1, 1) for n, c in columns.items()})

    assert answer["probability"].shape == (50, 1)
    np.testing.assert_allclose(answer["probability"][7:8], one["probability"], rtol=1e-5)


def test_lists_and_numbers_become_what_the_model_takes(server: Server) -> None:
    """No dtype to be named by the caller."""
    with Client(server.url) as gate:
        mixed = gate.predict("mixed", {"amount": [1.5, 2], "count": [1, 2], "place": ["a", "b"]})
        scalar = gate.predict("scalar", {"x": 3})

    assert mixed["twice"].tolist() == [3, 4]
    assert mixed["where"].tolist() == ["a", "b"]
    assert scalar["y"].shape == ()
    assert scalar["y"] == 6


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda gate: gate.predict("par", {"x": np.ones(1)}), client.ModelNotFoundError),
        (
            lambda gate: gate.predict("pair", {"x": np.ones(1)}, version=9),
            client.VersionNotFoundError,
        ),
        (lambda gate: gate.predict("pair", {"x": np.ones(1)}), client.TensorError),
        (lambda gate: gate.predict("pair", {"a": np.ones((1, 2))}), client.TensorError),
        (lambda gate: gate.metadata("nothing"), client.ModelNotFoundError),
        (lambda gate: gate.drift("pair", window="yesterday"), client.BadRequestError),
        (lambda gate: gate.predict("..", {"x": np.ones(1)}), client.NotFoundError),
    ],
)
def test_the_servers_reasons_arrive_as_types(
    server: Server, ask: Callable[[Client], Any], kind: type[client.ClientError]
) -> None:
    """The sentence, the code, the status and the id under which the log has it."""
    with Client(server.url) as gate, pytest.raises(kind) as raised:
        ask(gate)

    assert raised.value.code == kind.code
    assert raised.value.status == kind.status
    assert raised.value.request_id


def test_what_is_there_can_be_asked(server: Server) -> None:
    """Readiness, tensors, drift."""
    with Client(server.url) as gate:
        about = gate.metadata("pair")
        report = gate.drift("pair", version=3, window="total")

        assert gate.is_ready()
        assert gate.is_ready("pair", 1)
        assert not gate.is_ready("pair", 2)
        assert not gate.is_ready("nothing")
    assert about.versions == (1, 3)
    assert [(t.name, t.datatype, t.shape) for t in about.inputs] == [
        ("a", "FP32", (-1, 2)),
        ("b", "FP32", (-1, 2)),
    ]
    assert (report["model"], report["version"]) == ("pair", 3)


def test_the_models_are_listed_with_their_versions(server: Server) -> None:
    """By the repository index of the protocol."""
    with Client(server.url) as gate:
        listed = gate.models()

    assert {"pair", "scalar", "flights"} <= set(listed)
    assert 3 in listed["pair"]
    assert listed["scalar"] == (1,)


def test_the_async_client_asks_many_at_once(server: Server) -> None:
    """Fifty predictions in flight; each gets its own answer."""

    async def ask() -> list[float]:
        async with AsyncClient(server.url) as gate:
            answers = await asyncio.gather(
                *(gate.predict("is_fp32", {"x": np.full((1, 2), k, np.float32)}) for k in range(50))
            )
            assert await gate.is_ready()
            return [float(answer["y"][0, 0]) for answer in answers]

    assert asyncio.run(ask()) == [float(k) for k in range(50)]


def test_threads_can_share_a_client(server: Server) -> None:
    """One client, eight threads, no answer mixed up."""
    wrong: list[int] = []

    def ask(gate: Client, k: int) -> None:
        for _ in range(10):
            answer = gate.predict("is_int64", {"x": np.full((1, 2), k)})
            if answer["y"].tolist() != [[k, k]]:
                wrong.append(k)

    with Client(server.url) as gate:
        threads = [threading.Thread(target=ask, args=(gate, k)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    assert wrong == []


# -- servers that do wrong


@contextmanager
def misbehaving(*turns: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[int]]]:
    """A server whose k-th connection is treated by the k-th turn; how many there were."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(10)
    came: list[int] = []

    def run() -> None:
        for k, turn in enumerate(turns):
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            came.append(k)
            with connection:
                connection.settimeout(10)
                try:
                    turn(connection)
                except OSError:
                    continue

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", came
    finally:
        listening.close()
        thread.join(15)


BODY = (
    b'{"model_name":"m","model_version":"1","outputs":'
    b'[{"name":"y","datatype":"FP32","shape":[1],"data":[2.5]}]}'
)


def read_request(connection: socket.socket) -> None:
    got = b""
    while b"\r\n\r\n" not in got or not got.endswith(b"}"):
        chunk = connection.recv(65536)
        assert chunk, "the client hung up"
        got += chunk


def hang_up(connection: socket.socket) -> None:
    read_request(connection)


def answer(connection: socket.socket) -> None:
    read_request(connection)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    connection.sendall(head % len(BODY) + BODY)


def cut_short(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY[:20])


def drip(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    connection.settimeout(0.05)
    while True:
        connection.sendall(b" ")
        with suppress(TimeoutError):
            connection.recv(1)  # until the client hangs up
            return


def stay_silent(connection: socket.socket) -> None:
    read_request(connection)
    connection.recv(1)  # until the client hangs up


ONE = {"x": np.zeros(1, np.float32)}


@pytest.mark.parametrize("fault", [hang_up, cut_short])
def test_a_prediction_survives_a_connection_lost_underway(
    fault: Callable[[socket.socket], None],
) -> None:
    """It changes nothing but counters, so it is asked for again."""
    with misbehaving(fault, answer) as (url, came), Client(url, binary=False) as gate:
        assert gate.predict("m", ONE)["y"].tolist() == [2.5]

    assert came == [0, 1]


@pytest.mark.parametrize("slowness", [drip, stay_silent])
@pytest.mark.parametrize("is_async", [False, True])
def test_the_deadline_holds_whatever_the_server_does(
    slowness: Callable[[socket.socket], None], is_async: bool
) -> None:
    """Silence and dripping bytes; one try, and an end in time."""

    async def ask_async(url: str) -> None:
        async with AsyncClient(url, binary=False) as gate:
            await gate.predict("m", ONE, timeout_s=0.5)

    def ask(url: str) -> None:
        with Client(url, binary=False) as gate:
            gate.predict("m", ONE, timeout_s=0.5)

    with misbehaving(slowness) as (url, came):
        start = time.monotonic()
        with pytest.raises(client.DeadlineError) as raised:
            asyncio.run(ask_async(url)) if is_async else ask(url)
        took_s = time.monotonic() - start

    assert came == [0]
    assert raised.value.status is None
    assert 0.4 < took_s < 3


def test_nobody_there_is_unreachable_after_all_tries() -> None:
    """A refused connection; readiness is just not there."""
    with Client(f"http://127.0.0.1:{free_port()}", retries=1, binary=False) as gate:
        with pytest.raises(client.UnreachableError, match="no connection"):
            gate.predict("m", ONE)
        assert not gate.is_ready()


def test_the_server_gives_up_when_the_client_would(tmp_path: Path) -> None:
    """The time left is sent along: a slow model's queue is not kept busy for nobody."""
    models.put(tmp_path, "slow", 1, models.slow(n_rounds=3000))
    rows = {"x": np.ones((64, 1), np.float32)}
    with (
        serve(tmp_path) as server,
        Client(server.url) as gate,
        pytest.raises(client.DeadlineError),
    ):
        gate.predict("slow", rows, timeout_s=0.2)
