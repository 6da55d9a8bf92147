"""Limits of a model and its callers, over real servers."""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from gateway import access
from gateway.protocol.stubs import inference_pb2 as pb
from tests import models
from tests.serving import Server, request, serve, tensor, wait_until

ONE = request(tensor("x", "FP32", [1], [0]))


def changed(answer: httpx.Response) -> None:
    """A change that was made."""
    assert answer.status_code == 200, answer.text


def sentence(text: str) -> str:
    """All of it but how long the wait is, which is another one each time."""
    return text.rpartition("; the next one")[0]


def test_a_key_gets_its_rate_and_no_more_over_http_and_grpc(tmp_path: Path) -> None:
    """Two workers share the rate; who waits as it was told is let in; others are not touched."""
    models.put(tmp_path / "models", "m", 1, models.constant(1))
    file = tmp_path / "keys.json"
    admin = access.add(file, ["admin", "monitor"])[1]
    fast, slow = (access.add(file, ["predict"])[1] for _ in range(2))
    limits = {"rate_per_s_max": 4, "burst_max": 2}

    def bearer(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    flags = ("--port", "0", "--workers", "2")
    with (
        serve(tmp_path / "models", {"sync.poll_s": 0.1, "keys": file}, flags=flags) as server,
        server.client(headers=bearer(admin)) as http,
    ):
        path = "/admin/routes/m?wait=applied&timeout=10"
        changed(http.put(path, json={"limits": limits}))

        def ask(client: httpx.Client, key: str) -> httpx.Response:
            return client.post("/v2/models/m/infer", json=ONE, headers=bearer(key))

        with server.client() as one:
            refused = next(a for _ in range(9) if (a := ask(one, fast)).status_code != 200)
            assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
            assert refused.headers["retry-after"] == "1"
            said = (
                f"model 'm': key {fast.split('_')[1]} may make 4 requests a second"
                " (limits.rate_per_s_max)"
            )
            assert sentence(refused.json()["error"]) == said
            assert ask(one, slow).status_code == 200
            time.sleep(1.0)  # As it was told to: this is what is tested.
            assert ask(one, fast).status_code == 200

        # A new connection each time, so of either worker: both together let in the one rate.
        start, n_ok, n_refused = time.monotonic(), 0, 0
        with server.client(limits=httpx.Limits(max_keepalive_connections=0)) as fresh:
            while time.monotonic() - start < 1.5:
                ok = ask(fresh, slow).status_code == 200
                n_ok, n_refused = n_ok + ok, n_refused + (not ok)
        took_s = time.monotonic() - start
        assert 4 * 1.5 - 1 <= n_ok <= 2 + 4 * took_s, (n_ok, n_refused)
        assert n_refused > 0

        message = pb.ModelInferRequest(model_name="m")
        given = message.inputs.add(name="x", datatype="FP32", shape=[1])
        given.contents.fp32_contents.append(0)
        with grpc.insecure_channel(server.wait_for("ready")["grpc_url"]) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            metadata = tuple(bearer(fast).items())

            def call() -> None:
                for _ in range(8):
                    infer(message.SerializeToString(), metadata=metadata, timeout=20)

            with pytest.raises(grpc.RpcError) as error:
                call()
        found: Any = error.value
        assert found.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert sentence(found.details()) == said
        trailing = dict(found.trailing_metadata())
        assert (trailing["x-driftgate-code"], trailing["retry-after"]) == ("rate_limited", "1")

        text = http.get("/metrics").text
    shed = 'driftgate_shed_total{model="m",reason="rate_limited",version=""}'
    (counted,) = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(shed)]
    assert float(counted) == n_refused + 2


HEAVY = request(tensor("x", "FP32", [1, 1], [[1]]))
CROWD = 12


@contextmanager
def crowd(server: Server) -> Iterator[list[tuple[int, float]]]:
    """So many who ask the heavy model all the time: status and seconds of each answer.

    Who is refused comes back a moment later: it is the model that is to be busy, not this test.
    """
    answers: list[tuple[int, float]] = []
    is_over = threading.Event()

    def ask() -> None:
        with server.client(verify=False) as http:  # There is no TLS to be set up twelve times.
            while not is_over.is_set():
                start = time.perf_counter()
                status = http.post("/v2/models/heavy/infer", json=HEAVY).status_code
                answers.append((status, time.perf_counter() - start))
                if status == 429:
                    is_over.wait(0.02)

    threads = [threading.Thread(target=ask) for _ in range(CROWD)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(answers) > 2 * CROWD, "the crowd is there")
        answers.clear()
        yield answers
    finally:
        is_over.set()
        for thread in threads:
            thread.join(30)


def median_of_light(server: Server) -> float:
    """Seconds of an answer of the light model, as somebody notices who asks it now and then."""
    seconds = []
    with server.client() as http:
        for _ in range(60):
            start = time.perf_counter()
            answer = http.post("/v2/models/light/infer", json=ONE)
            seconds.append(time.perf_counter() - start)
            assert answer.status_code == 200, "the light model answers, whatever the heavy one does"
            time.sleep(0.005)  # at a rate that leaves the machine to the others
    return statistics.median(seconds)


def test_a_heavy_model_does_not_starve_a_light_one_and_its_limit_bounds_the_wait(
    tmp_path: Path,
) -> None:
    """Twelve at a time for a model of 5 ms and more, run one by one; with the limit two are let in.

    Either way every request of the light model is answered, about as fast as when all is quiet.
    Without the limit whoever asks the heavy one waits for all twelve; with it, for one other.
    """
    models.put(tmp_path, "light", 1, models.constant(1))
    models.put(tmp_path, "heavy", 1, models.slow(n_rounds=100))
    one_by_one = {"batch": {"rows_max": 1}}
    with serve(tmp_path, {"sync.poll_s": 0.1}) as server, server.client() as http:

        def routed(**route: Any) -> None:
            changed(http.put("/admin/routes/heavy?wait=applied&timeout=10", json=route))

        def run_s() -> float:
            start = time.perf_counter()
            changed(http.post("/v2/models/heavy/infer", json=HEAVY))
            return time.perf_counter() - start

        routed(**one_by_one)
        assert min(run_s() for _ in range(5)) > 0.005
        quiet_s = median_of_light(server)
        with crowd(server) as without:
            light_without_s = median_of_light(server)
        routed(**one_by_one, limits={"inflight_max": 2})
        with crowd(server) as limited:
            light_limited_s = median_of_light(server)

    assert {status for status, _ in without} == {200}
    assert {status for status, _ in limited} == {200, 429}
    waits = [
        statistics.median(seconds for status, seconds in answers if status == 200)
        for answers in (without, limited)
    ]
    assert waits[1] < 0.6 * waits[0], waits
    # Two cores shared with the crowd itself: a scheduler's slice or two beside the answer.
    assert max(light_without_s, light_limited_s) < 10 * quiet_s + 0.05
