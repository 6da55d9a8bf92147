"""Many clients at once: nobody gets another's answer, waits beyond a deadline, or fails for others.

Answers are known in closed form for every request, so that rows which met in a batch cannot be
confused without being noticed.
"""

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from tests import models
from tests.serving import Server, request, serve, tensor, wait_until

pytestmark = pytest.mark.alone

N_CLIENTS = 64
QUEUE_ROWS_MAX = 8
LATE_S_MAX = 0.2
"""An answer may come this much after its deadline."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registry")
    models.put(root, "same", 1, models.identity("INT64", ("n", 2)))
    models.put(root, "texts", 1, models.identity("BYTES"))
    models.put(root, "wide", 1, models.identity("FP32", ("n", "k")))
    models.put(root, "lookup", 1, models.lookup())
    models.put(root, "fixed", 1, models.fixed_rows())
    for kind in ("FP32", "INT64", "INT32"):
        for width in (1, 2, 3, 4):
            models.put(root, f"centred-{kind}-{width}", 1, models.centred(kind, width))
    models.put(root, "slow", 1, models.slow(rows=1))
    models.put(root, "slower", 1, models.slow(rows=1, n_rounds=1500))
    models.put(root, "rows", 1, models.slow())
    return root


@pytest.fixture(scope="module")
def server(registry: Path) -> Iterator[Server]:
    """One that leaves at once; every model on a thread of its own, as larger ones run."""
    with serve(registry, {"runtime.inline_s_max": 0}) as running:
        yield running


@pytest.fixture(scope="module")
def patient(registry: Path) -> Iterator[Server]:
    """One that waits for company, so that requests do meet in a batch."""
    with serve(registry, {"batch.wait_s_max": 0.01}) as running:
        yield running


@pytest.fixture(scope="module")
def tight(registry: Path) -> Iterator[Server]:
    """One with a short queue."""
    with serve(registry, {"limits.queue_rows_max": QUEUE_ROWS_MAX}) as running:
        yield running


@asynccontextmanager
async def clients_of(server: Server) -> Any:
    """One client with a connection for each of many tasks."""
    limits = httpx.Limits(max_connections=2 * N_CLIENTS, max_keepalive_connections=2 * N_CLIENTS)
    async with httpx.AsyncClient(
        base_url=server.url, limits=limits, timeout=30, trust_env=False
    ) as client:
        yield client


def together(
    server: Server, tasks: list[Callable[[httpx.AsyncClient], Awaitable[Any]]]
) -> list[Any]:
    """Run all tasks at once on one event loop; their results."""

    async def run() -> list[Any]:
        async with clients_of(server) as client:
            return await asyncio.gather(*(task(client) for task in tasks))

    return uvloop.run(run())


def counted(server: Server, model: str, name: str, **labels: str) -> float:
    """The value of one metric."""
    with server.client() as client:
        text = client.get("/metrics").text
    wanted = {"model": model, **labels}
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and wanted.items() <= sample.labels.items()
    )


# -- one of many


def post(model: str, body: Any, **headers: str) -> Callable[[httpx.AsyncClient], Awaitable[Any]]:
    """One request as a task: its answer, and how long it took."""
    content = body if isinstance(body, bytes) else json.dumps(body)

    async def task(client: httpx.AsyncClient) -> tuple[httpx.Response, float]:
        start = time.perf_counter()
        got = await client.post(f"/v2/models/{model}/infer", content=content, headers=headers)
        return got, time.perf_counter() - start

    return task


def draw_case(draw: random.Random) -> tuple[str, Any, int, Any]:
    """A model, a request, and the status and data that it must get."""
    rows = draw.choice([1, 1, 2, 5, 64, 150])
    number = draw.randrange(2**60)
    match draw.randrange(8):
        case 0:
            data = [number + k for k in range(2 * rows)]
            return "same", request(tensor("x", "INT64", [rows, 2], data)), 200, data
        case 1:
            data = [f"{number}-{k}" for k in range(rows)]
            return "texts", request(tensor("x", "BYTES", [rows], data)), 200, data
        case 2:
            width = draw.choice([1, 2, 7])
            data = [float(draw.randrange(2**20)) for _ in range(rows * width)]
            return "wide", request(tensor("x", "FP32", [rows, width], data)), 200, data
        case 3:
            data = [draw.randrange(5) for _ in range(rows)]
            body = request(tensor("index", "INT64", [rows], data))
            return "lookup", body, 200, [10.0 * index for index in data]
        case 4:
            data = [draw.randrange(5) for _ in range(rows)]
            data[draw.randrange(rows)] = draw.choice([5, 77, -9])
            return "lookup", request(tensor("index", "INT64", [rows], data)), 400, None
        case 5:
            data = [float(draw.randrange(2**20)) for _ in range(8)]
            body = request(tensor("x", "FP32", [4, 2], data))
            return "fixed", body, 200, [2 * value for value in data]
        case 6:
            return "same", request(tensor("x", "INT64", [rows, 2], [1] * rows)), 400, None
        case _:
            return "same", b'{"inputs": [nonsense', 400, None


@pytest.mark.parametrize("which", ["server", "patient"])
def test_64_clients_get_their_own_answers_among_good_and_bad_requests(
    request: pytest.FixtureRequest, which: str
) -> None:
    """Every status and every number is what the request alone would have got."""
    running: Server = request.getfixturevalue(which)

    def visitor(seed: int) -> Callable[[httpx.AsyncClient], Awaitable[int]]:
        draw = random.Random(seed)

        async def visit(client: httpx.AsyncClient) -> int:
            for k in range(12):
                model, body, status, data = draw_case(draw)
                if isinstance(body, dict):
                    body["id"] = f"{seed}-{k}"
                got, _ = await post(model, body)(client)
                assert got.status_code == status, (model, got.text[:300])
                if status == 200:
                    assert got.json()["id"] == f"{seed}-{k}"
                    assert got.json()["outputs"][0]["data"] == data
            return 12

        return visit

    assert sum(together(running, [visitor(seed) for seed in range(N_CLIENTS)])) == N_CLIENTS * 12


def test_a_failing_row_costs_its_neighbours_nothing(patient: Server) -> None:
    """Requests share a batch; the one with an impossible index fails, and no other."""
    before = counted(patient, "lookup", "driftgate_batch_rows_count")
    tasks = [
        post("lookup", request(tensor("index", "INT64", [1], [99 if k % 8 == 3 else k % 5])))
        for k in range(N_CLIENTS)
    ]
    answers = [got for got, _ in together(patient, tasks)]

    for k, got in enumerate(answers):
        if k % 8 == 3:
            assert got.status_code == 400
        else:
            assert got.json()["outputs"][0]["data"] == [10.0 * (k % 5)]
    n_batches = counted(patient, "lookup", "driftgate_batch_rows_count") - before
    assert n_batches < N_CLIENTS, "no two requests met, so nothing was shown"


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["FP32", "INT64", "INT32"])
def test_a_model_that_mixes_rows_never_sees_rows_of_two_requests(
    patient: Server, kind: str, width: int
) -> None:
    """Row minus largest row of the run: 0 for a request of one row, whatever else is in flight.

    That it cannot be batched is to be found out at warm-up, for every datatype and width.
    """
    tasks = [
        post(f"centred-{kind}-{width}", request(tensor("x", kind, [1, width], [1000 * k] * width)))
        for k in range(40)
    ]
    answers = [got.json()["outputs"][0]["data"] for got, _ in together(patient, tasks)]

    assert answers == [[0] * width] * 40


def test_large_and_small_requests_together_keep_their_rows_in_order(patient: Server) -> None:
    """Requests beyond a batch are split around small ones, and put together again."""
    sizes = [1, 300, 2, 64, 65, 1000, 7, 128]
    tasks = []
    for k, rows in enumerate(sizes * 4):
        data = [10_000 * k + row for row in range(2 * rows)]
        tasks.append(post("same", request(tensor("x", "INT64", [rows, 2], data))))
    for k, (got, _) in enumerate(together(patient, tasks)):
        rows = (sizes * 4)[k]
        expected = [10_000 * k + row for row in range(2 * rows)]
        assert got.json()["outputs"][0]["data"] == expected


# -- deadlines

ROW = request(tensor("x", "FP32", [1, 1], [21]))


def test_every_request_is_answered_within_its_deadline(server: Server) -> None:
    """40 requests for a model that runs one by one: answered or 504 in time, late ones not run."""
    timeout_s = 0.4
    ran = counted(server, "slow", "driftgate_batch_rows_sum")
    shed = counted(server, "slow", "driftgate_shed_total", reason="deadline_exceeded")
    answers = together(
        server, [post("slow", ROW, **{"x-request-timeout": str(timeout_s)}) for _ in range(40)]
    )
    codes = Counter(got.status_code for got, _ in answers)

    assert set(codes) == {200, 504}
    for got, seconds in answers:
        assert seconds < timeout_s + LATE_S_MAX
        if got.status_code == 200:
            assert got.json()["outputs"][0]["data"] == [42.0]
        else:
            assert got.json()["code"] == "deadline_exceeded"
            assert "0.4 s" in got.json()["error"]
    wait_until(
        lambda: counted(server, "slow", "driftgate_queued_rows") == 0, "the queue is empty again"
    )
    late = counted(server, "slow", "driftgate_shed_total", reason="deadline_exceeded") - shed
    assert late == codes[504]
    # Whose time was over while it ran has run: the last one, and perhaps one that came some
    # milliseconds later and began in them. The others must not.
    assert counted(server, "slow", "driftgate_batch_rows_sum") - ran <= codes[200] + 2


@pytest.mark.parametrize("how", ["header", "parameter"])
def test_a_deadline_shorter_than_the_run_is_kept(server: Server, how: str) -> None:
    """The answer does not wait for the model: a timer gives it."""
    if how == "header":
        task = post("slower", ROW, **{"x-request-timeout": "0.02"})
    else:
        task = post("slower", {**ROW, "parameters": {"timeout": 20_000}})
    ((got, seconds),) = together(server, [task])

    assert (got.status_code, got.json()["code"]) == (504, "deadline_exceeded")
    assert seconds < 0.02 + LATE_S_MAX


def test_the_shorter_of_two_deadlines_counts(server: Server) -> None:
    """Neither the header nor the body can lengthen what the other asks for."""
    for header, micros in (("10", 20_000), ("0.02", 10_000_000)):
        task = post(
            "slower",
            {**ROW, "parameters": {"timeout": micros}},
            **{"x-request-timeout": header},
        )
        ((got, seconds),) = together(server, [task])
        assert got.status_code == 504
        assert seconds < 0.02 + LATE_S_MAX


def test_a_split_request_keeps_its_deadline(server: Server) -> None:
    """500 rows at a batch of 64 take seconds: 504 in time, and the rest of the rows never runs."""
    before = counted(server, "rows", "driftgate_batch_rows_sum")
    body = request(tensor("x", "FP32", [500, 1], [1] * 500))
    ((got, seconds),) = together(server, [post("rows", body, **{"x-request-timeout": "0.3"})])
    wait_until(lambda: counted(server, "rows", "driftgate_queued_rows") == 0, "the rest is dropped")

    assert got.status_code == 504
    assert seconds < 0.3 + LATE_S_MAX
    assert counted(server, "rows", "driftgate_batch_rows_sum") - before <= 300


# -- too much


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(tight: Server) -> None:
    """429 with Retry-After in whole seconds; those in the queue are answered; then all is well."""
    before = counted(tight, "slow", "driftgate_shed_total", reason="queue_full")
    answers = together(tight, [post("slow", ROW) for _ in range(60)])
    codes = Counter(got.status_code for got, _ in answers)

    assert set(codes) == {200, 429}
    assert codes[200] >= QUEUE_ROWS_MAX
    for got, seconds in answers:
        if got.status_code == 429:
            assert got.json()["code"] == "queue_full"
            assert str(QUEUE_ROWS_MAX) in got.json()["error"]
            assert 1 <= int(got.headers["retry-after"]) <= 60
            assert seconds < 1
    refused = counted(tight, "slow", "driftgate_shed_total", reason="queue_full") - before
    assert refused == codes[429]
    ((after, _),) = together(tight, [post("slow", ROW)])
    assert after.status_code == 200


def test_a_request_that_no_queue_could_hold_is_413(tight: Server) -> None:
    """Coming back later would not help, so it is not told to."""
    rows = QUEUE_ROWS_MAX + 1
    body = request(tensor("x", "INT64", [rows, 2], [0] * 2 * rows))
    ((got, _),) = together(tight, [post("same", body)])

    assert (got.status_code, got.json()["code"]) == (413, "too_large")
    assert "retry-after" not in got.headers
    assert str(rows) in got.json()["error"]


def test_a_full_queue_of_one_model_leaves_the_others_alone(tight: Server) -> None:
    """Queues are per version, and health and metrics wait in none."""

    async def look(client: httpx.AsyncClient) -> float:
        slowest = 0.0
        for _ in range(10):
            for method, path, content in (
                ("GET", "/v2/health/live", None),
                ("GET", "/metrics", None),
                ("POST", "/v2/models/texts/infer",
                 json.dumps(request(tensor("x", "BYTES", [1], ["a"])))),
            ):  # fmt: skip
                start = time.perf_counter()
                got = await client.request(method, path, content=content)
                assert got.status_code == 200
                slowest = max(slowest, time.perf_counter() - start)
        return slowest

    *_, slowest = together(tight, [*(post("slower", ROW) for _ in range(30)), look])

    assert slowest < 1


# -- clients that leave


def test_rows_of_clients_that_left_do_not_run(server: Server) -> None:
    """Ten stay, twelve hang up while they wait: ten rows run, and twelve are counted as gone."""
    content = json.dumps(ROW).encode()
    head = b"POST /v2/models/slower/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    wait_until(lambda: counted(server, "slower", "driftgate_queued_rows") == 0, "it is quiet")
    wait_until(
        lambda: (
            counted(server, "slower", "driftgate_batch_rows_count")
            == counted(server, "slower", "driftgate_queue_seconds_count")
        ),
        "no run is on its way",
    )
    ran = counted(server, "slower", "driftgate_batch_rows_sum")
    gone = counted(server, "slower", "driftgate_shed_total", reason="client_gone")

    stay = [socket.create_connection(server.address, timeout=20) for _ in range(10)]
    for raw in stay:
        raw.sendall(head % len(content) + content)
    wait_until(lambda: counted(server, "slower", "driftgate_queued_rows") == 9, "they wait")
    leave = [socket.create_connection(server.address, timeout=20) for _ in range(12)]
    for raw in leave:
        raw.sendall(head % len(content) + content)
    wait_until(lambda: counted(server, "slower", "driftgate_queued_rows") >= 12, "all wait")
    for raw in leave:
        raw.close()
    for raw in stay:
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")
        raw.close()
    wait_until(lambda: counted(server, "slower", "driftgate_queued_rows") == 0, "all is done")

    left = counted(server, "slower", "driftgate_shed_total", reason="client_gone") - gone
    assert left == 12
    assert counted(server, "slower", "driftgate_batch_rows_sum") - ran == 10


def test_300_hang_ups_do_not_delay_the_next_answer(server: Server) -> None:
    """Whoever comes after them is served within a second or two, not after their rows."""
    content = json.dumps(ROW).encode()
    head = b"POST /v2/models/slower/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    for _ in range(300):
        with socket.create_connection(server.address, timeout=20) as raw:
            raw.sendall(head % len(content) + content)
    ((got, seconds),) = together(server, [post("slower", ROW)])

    assert got.status_code == 200
    assert seconds < 5


def test_two_requests_in_one_packet_are_answered_in_order(server: Server) -> None:
    """Pipelining: the first is slow, the second is not, and still comes second."""
    first, second = json.dumps({**ROW, "id": "first"}), json.dumps({**ROW, "id": "second"})
    content = b""
    for model, body in (("slower", first), ("slow", second)):
        content += b"POST /v2/models/%s/infer HTTP/1.1\r\nHost: localhost\r\n" % model.encode()
        content += b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
    with socket.create_connection(server.address, timeout=20) as raw:
        raw.sendall(content)
        answer = b""
        while answer.count(b"]}]}") < 2:
            part = raw.recv(65536)
            assert part, answer
            answer += part

    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert answer.index(b'"first"') < answer.index(b'"second"')


# -- versions that are opened by their first call


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[Server]:
    models.put(tmp_path, "m", 1, models.slow(rows=1))
    models.put(tmp_path, "m", 2, b"no model")
    models.put(tmp_path, "m", 3, models.constant(3))
    with serve(tmp_path) as running:
        yield running


def test_many_first_calls_open_a_version_once(cold: Server) -> None:
    """Twenty call version 1 at once, twenty the broken 2: each is opened or refused once."""
    answers = together(
        cold,
        [
            *(post("m/versions/1", ROW) for _ in range(20)),
            *(post("m/versions/2", ROW) for _ in range(20)),
        ],
    )

    assert Counter(got.status_code for got, _ in answers) == {200: 20, 503: 20}
    opened = [event["version"] for event in cold.events("version_opened")]
    refused = [event["version"] for event in cold.events("version_refused")]
    assert sorted(opened) == [1, 3]
    assert refused == [2]


def test_a_deadline_holds_also_while_a_version_is_opened(cold: Server) -> None:
    """The first caller of an old version may have little time: 504 then, not an answer too late."""
    ((got, seconds),) = together(cold, [post("m/versions/1", ROW, **{"x-request-timeout": "0.05"})])

    assert (got.status_code, got.json()["code"]) == (504, "deadline_exceeded")
    assert seconds < 0.05 + LATE_S_MAX
