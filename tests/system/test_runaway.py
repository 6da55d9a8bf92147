"""Predictions that would take for ever, or all memory: what becomes of them, and of the others."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests import models
from tests.serving import Server, request, serve, tensor, wait_until

pytestmark = pytest.mark.alone

ONE = request(tensor("x", "FP32", [1], [0]))
LONG = {"x-request-timeout": "0.5"}


@contextmanager
def neighbours(server: Server) -> Iterator[list[tuple[int, float]]]:
    """Somebody asks another model all the while: status and seconds of each request."""
    answers: list[tuple[int, float]] = []
    is_over = threading.Event()

    def ask() -> None:
        with server.client() as http:
            while not is_over.is_set():
                start = time.monotonic()
                try:
                    status = http.post("/v2/models/good/infer", json=ONE).status_code
                except httpx.HTTPError:
                    status = 0
                answers.append((status, time.monotonic() - start))
                time.sleep(0.005)  # at a rate that leaves the machine to others

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        is_over.set()
        thread.join(30)


def ask(http: httpx.Client, model: str, n: int) -> httpx.Response:
    body = request(tensor("n", "INT64", [1], [n]))
    return http.post(f"/v2/models/{model}/infer", json=body, headers=LONG)


def cpu_s(pid: int) -> float:
    """Seconds of processor time of a process and the children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_runaway_predictions_end_and_the_others_are_answered(tmp_path: Path) -> None:
    """An endless loop ends at its deadline, a short request for 40 GB fails, nobody else does."""
    models.put(tmp_path, "good", 1, models.constant(1))
    models.put(tmp_path, "rounds", 1, models.rounds())
    models.put(tmp_path, "expansion", 1, models.expansion())
    with serve(tmp_path) as server, neighbours(server) as answers, server.client() as http:
        (opened,) = [e for e in server.events("version_opened") if e["model"] == "rounds"]
        assert opened["runs"] == "inline", "the case of interest is a model that looks light"
        root = server.process.pid
        (worker,) = map(int, Path(f"/proc/{root}/task/{root}/children").read_text().split())
        # By measure it is light, so it runs on the loop: it is ended there, and on a thread later.
        first, second = ask(http, "rounds", 10**15), ask(http, "rounds", 10**15)
        assert [first.status_code, second.status_code] == [504, 504]
        assert ask(http, "rounds", 3).json()["outputs"][0]["data"] == [3.0]
        before = cpu_s(worker)
        huge = ask(http, "expansion", 10**10)
        assert (huge.status_code, huge.json()["code"]) == (500, "model_failed")
        assert "runtime.arena_bytes_max" in huge.json()["error"]
        assert ask(http, "expansion", 5).json()["outputs"][0]["data"] == [5.0]
        assert cpu_s(worker) - before < 3
        text = http.get("/metrics").text
    assert 'driftgate_runs_ended_total{model="rounds",version="1"} 2.0' in text
    assert {status for status, _ in answers} == {200}
    assert max(seconds for _, seconds in answers) < 5
    assert not server.events("worker_ended", "run_stuck")


def test_a_kernel_that_does_not_return_costs_its_worker_and_no_request(tmp_path: Path) -> None:
    """Nothing ends it but the end of its process: a successor takes over before that."""
    models.put(tmp_path, "good", 1, models.constant(1))
    models.put(tmp_path, "kernel", 1, models.one_long_kernel())
    with (
        serve(tmp_path, {"runtime.inline_s_max": 0}) as server,
        neighbours(server) as answers,
        server.client() as http,
    ):
        assert ask(http, "kernel", 10).json()["outputs"][0]["data"] == [10]
        assert ask(http, "kernel", 10**5).status_code == 504
        stuck = server.wait_for("run_stuck")
        assert (stuck["model"], stuck["version"]) == ("kernel", 1)
        server.wait_for("worker_ready")
        wait_until(lambda: _answers(server), "the successor answers for the same model", 20)
    failed = [status for status, _ in answers if status != 200]
    assert len(failed) <= 1, "at most the request that was under way when its connection ended"


def _answers(server: Server) -> bool:
    with server.client() as http:
        return ask(http, "kernel", 10).status_code == 200
