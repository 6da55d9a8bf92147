"""Predictions that would take for ever, or all memory: what becomes of them, and of the others."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from gateway.quarantine import UnderWay
from tests import models
from tests.serving import Server, driftgate, request, serve, tensor, wait_until

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


def _answering(server: Server, path: str = "rounds") -> object:
    with server.client() as http:
        told = ask(http, path, 1)
        return (
            told.headers.get("x-driftgate-decision", "").partition("version=")[2].partition(";")[0]
            or told.json()["code"]
        )


def test_a_version_that_kills_workers_is_left_alone_until_somebody_means_it(
    tmp_path: Path,
) -> None:
    """Three faults with it under way: no model follows it, a call by number says why, a restart
    changes nothing; a pin tries it again."""
    for version in (1, 2):
        models.put(tmp_path, "rounds", version, models.rounds())
    with serve(tmp_path) as server:
        assert _answering(server) == "2"
        (run_dir,) = (tmp_path / ".driftgate" / "run").iterdir()
        for k in range(3):
            _die_with_a_run_under_way(server, run_dir)
            wait_until(lambda k=k: len(server.events("worker_ready")) > k, "a new worker")
        wait_until(lambda: _answering(server) == "1", "version 1 answers")
        assert "3 workers died" in server.wait_for("degraded")["reason"]
        with server.client() as http:
            refused = ask(http, "rounds/versions/2", 1)
            assert (refused.status_code, refused.json()["code"]) == (503, "version_refused")
            assert "in quarantine" in refused.json()["error"]
            shown = http.get("/admin/models/rounds/versions/2").json()
            assert (shown["state"], "in quarantine" in shown["reason"]) == ("refused", True)
            assert 'driftgate_degraded{what="quarantine"} 1' in http.get("/metrics").text
    with serve(tmp_path) as server:
        assert _answering(server) == "1", "a server that starts finds it so"
        pinned = driftgate("pin", "rounds", "2", "-r", str(tmp_path), "--wait")
        assert pinned.returncode == 0, pinned.stderr
        wait_until(lambda: _answering(server) == "2", "version 2 answers again")
        assert server.wait_for("recovered")["what"] == "quarantine"


def _die_with_a_run_under_way(server: Server, run_dir: Path) -> None:
    """A worker ends by a fault in the middle of a run."""
    pid = _worker(server)
    thread = threading.Thread(target=_ask_for_ever, args=(server,))
    thread.start()
    wait_until(
        lambda: UnderWay.read(run_dir / "under_way" / str(pid)) == {("rounds", 2): "died_running"},
        "a run is under way",
    )
    os.kill(pid, signal.SIGSEGV)
    thread.join(30)


def _ask_for_ever(server: Server) -> None:
    body = request(tensor("n", "INT64", [1], [10**15]))
    with server.client() as http, suppress(httpx.HTTPError):
        http.post("/v2/models/rounds/infer", json=body)


def _worker(server: Server) -> int:
    pid = server.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_an_opening_that_does_not_end_is_given_up_and_holds_up_nobody(tmp_path: Path) -> None:
    """Bounded in time, reported, its processor time given back; the old version answers all the
    while, other models follow, and nobody tries again by himself."""
    models.put(tmp_path, "good", 1, models.constant(1))
    models.put(tmp_path, "rounds", 1, models.rounds())
    with (
        serve(tmp_path, {"sync.open_s_max": 2, "sync.poll_s": 0.1}) as server,
        neighbours(server) as answers,
    ):
        new = models.put(tmp_path, ".rounds", 2, models.rounds())
        (new / "warmup.jsonl").write_text('{"inputs": {"n": [1000000000000000]}}\n')
        new.rename(tmp_path / "rounds" / "2")
        refused = server.wait_for("version_refused")
        assert "not done after 2 s (sync.open_s_max)" in refused["reason"]
        models.put(tmp_path, "good", 2, models.constant(2))
        wait_until(lambda: server.events("version_swapped"), "another model follows")
        assert _answering(server) == "1"
        assert "opening it did not end" in server.wait_for("degraded")["reason"]
        pid, spent = _worker(server), cpu_s(_worker(server))
        wait_until(lambda: len(server.events("version_opened")) >= 3, "no new opening is stuck")
        with server.client() as http:
            assert ask(http, "rounds/versions/2", 1).json()["code"] == "version_refused"
        assert not server.events("worker_recycled", "worker_ended")
        assert _worker(server) == pid
        start = time.monotonic()
        wait_until(lambda: time.monotonic() - start > 1, "a second")
        assert cpu_s(pid) - spent < 0.9 * (time.monotonic() - start) + 0.5
    assert {status for status, _ in answers} == {200}
    assert max(seconds for _, seconds in answers) < 2
