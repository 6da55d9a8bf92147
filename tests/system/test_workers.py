"""Several workers: one server to its clients, whatever ends one of them."""

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import httpx
import pytest

from bench import overhead
from gateway.protocol.stubs import inference_pb2 as pb
from registry import workers as heartbeats
from tests import models
from tests.serving import Server, driftgate, request, serve, tensor, wait_until

ONE = request(tensor("x", "FP32", [1], [1]))
TOTAL = re.compile(r"^driftgate_requests_total\{[^}]*\} (\S+)$", re.MULTILINE)
BIN = re.compile(r'_feature_bin_total\{[^}]*feature="input:x\[0\]"[^}]*\} (\S+)')
TWO = ("--port", "0", "--workers", "2")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registry")
    models.put(root, "m", 1, models.constant(1))
    return root


@pytest.fixture
def server(registry: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    carrier = getattr(request, "param", "grpcio")
    with serve(registry, {"grpc_carrier": carrier}, flags=TWO) as running:
        yield running


def workers(server: Server) -> list[int]:
    """Process ids of the children."""
    pid = server.process.pid
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def total(server: Server) -> float:
    """Requests counted, as a new connection to any worker says."""
    with server.client() as client:
        return sum(map(float, TOTAL.findall(client.get("/metrics").text)))


class Load:
    """Clients that keep their connections and ask as fast as they can."""

    def __init__(self, server: Server, n: int) -> None:
        self.address = server.address
        self.ok = self.failed = 0
        self.is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(n)]

    def _ask(self) -> None:
        body, connection = json.dumps(ONE), http.client.HTTPConnection(*self.address, timeout=20)
        while not self.is_over.is_set():
            try:
                connection.request("POST", "/v2/models/m/infer", body)
                answer = connection.getresponse()
                answer.read()
                is_ok = answer.status == 200
            except (OSError, http.client.HTTPException):
                is_ok = False
                connection.close()
            with self._lock:
                self.ok += is_ok
                self.failed += not is_ok
        connection.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            wait_until(lambda: self.ok > 200, "clients are answered")
            yield
        finally:
            self.is_over.set()
            for thread in self._threads:
                thread.join(30)


def is_gone(pid: int) -> bool:
    """Ended, whether somebody has waited for it or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_worker_killed_under_load_costs_what_it_held_and_no_count(server: Server) -> None:
    """Of eight connections it holds about half; the rest notices nothing, nor does the sum."""
    load, seen = Load(server, 8), [0.0]

    def scrape() -> None:
        while not load.is_over.is_set():
            with suppress(httpx.HTTPError):  # It may ask the worker that dies.
                seen.append(total(server))

    scraping = threading.Thread(target=scrape)
    with load.running():
        scraping.start()
        victim = workers(server)[0]
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        server.wait_for("worker_ready")
        assert time.monotonic() - start < 2
        before = load.ok
        wait_until(lambda: load.ok > before + 200, "load goes on")
    scraping.join(20)

    assert load.failed <= 5, load.failed
    assert seen == sorted(seen)
    assert load.ok <= total(server) <= load.ok + load.failed
    [ended] = server.events("worker_ended")
    assert (ended["pid"], ended["by"], ended["reason"]) == (victim, "SIGKILL", "signal")
    with server.client() as client:
        text = client.get("/metrics").text
    assert 'driftgate_worker_restarts_total{reason="signal"} 1.0' in text
    assert "driftgate_workers 2.0" in text


@pytest.mark.parametrize("server", ["grpcio", "zttp"], indirect=True)
def test_http_and_grpc_of_two_workers_add_up_exactly_and_share_the_work(server: Server) -> None:
    """Whoever is asked knows what all have counted, and connections are spread evenly."""
    n_connections, n_calls = 16, 25
    clients = [server.client() for _ in range(n_connections)]
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [
        grpc.insecure_channel(server.wait_for("ready")["grpc_url"], options) for _ in range(8)
    ]
    message = pb.ModelInferRequest(
        model_name="m",
        inputs=[
            {"name": "x", "datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1]}}
        ],
    ).SerializeToString()
    for _ in range(n_calls):
        for client in clients:
            assert client.post("/v2/models/m/infer", json=ONE).status_code == 200
        for channel in channels:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message, timeout=10)
    answers = {sum(map(float, TOTAL.findall(c.get("/metrics").text))) for c in clients}
    stats = [c.get("/v2/models/m/stats").json()["model_stats"][0] for c in clients]
    held = [connections_of(pid, server.address[1]) for pid in workers(server)]
    for closing in (*clients, *channels):
        closing.close()

    assert answers == {n_calls * (16 + 8)}
    # Load generators take differences of these, whichever worker they ask.
    for stage in ("success", "queue", "compute_infer"):
        assert {each["inference_stats"][stage]["count"] for each in stats} == answers, stage
        (ns,) = {each["inference_stats"][stage]["ns"] for each in stats}
        assert ns > 0
    assert {each["inference_count"] for each in stats} == answers
    (n_runs,) = {each["execution_count"] for each in stats}
    assert 0 < n_runs <= n_calls * (16 + 8)
    assert all(time.time() - 60 < each["last_inference"] / 1000 <= time.time() for each in stats)
    assert sum(held) == n_connections
    assert max(held) - min(held) <= 2, held


def test_drift_and_bins_of_any_worker_are_those_of_the_host(tmp_path: Path) -> None:
    """Rows that went to either are in every report, and counted once."""
    overhead.write_registry(tmp_path)
    with serve(tmp_path, flags=TWO) as server:
        clients = [server.client() for _ in range(4)]
        for k, body in enumerate(overhead.bodies(50, 20)):
            path = f"/v2/models/{overhead.MODEL}/infer"
            assert clients[k % 4].post(path, content=body).status_code == 200

        def seen() -> set[tuple[int, float]]:
            return {
                (
                    client.get(f"/drift/{overhead.MODEL}").json()["rows_observed"],
                    sum(map(float, BIN.findall(client.get("/metrics/bins").text))),
                )
                for client in clients
            }

        wait_until(lambda: seen() == {(1000, 1000.0)}, "all four know of all rows")
        for client in clients:
            client.close()


def connections_of(pid: int, port: int) -> int:
    """Open connections that a process holds on a port."""
    inodes = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", str(handle.readlink())))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = f":{port:04X}"
    return sum(row[1].endswith(local) and row[3] == "01" and row[9] in inodes for row in rows)


def test_a_frozen_worker_is_replaced_while_the_other_answers(server: Server) -> None:
    """Stopped by a signal, it does nothing and ends by nothing but SIGKILL."""
    victim = workers(server)[1]
    start = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    slowest = 0.0
    while not server.events("worker_ready"):
        assert time.monotonic() - start < 10
        asked = time.monotonic()
        with server.client() as client:
            assert client.post("/v2/models/m/infer", json=ONE).status_code == 200
        slowest = max(slowest, time.monotonic() - asked)

    assert slowest < 1
    assert server.events("worker_ended")[0]["reason"] == "frozen"
    assert is_gone(victim)


def test_all_workers_killed_are_back_and_go_on_counting(server: Server) -> None:
    """Clients wait in the queue of the socket that the supervisor holds: nobody is refused."""
    with server.client() as client:
        client.post("/v2/models/m/infer", json=ONE)
    for pid in workers(server):
        os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    with server.client() as client:
        assert client.post("/v2/models/m/infer", json=ONE).status_code == 200
    assert time.monotonic() - start < 10
    wait_until(lambda: len(server.events("worker_ready")) == 2, "both are back")
    assert total(server) == 2


def is_free(host: str, port: int) -> bool:
    """Whether somebody may listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError:
            return False
        return True


def test_workers_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    """kill -9 of it frees the ports within 2 s, and a new server takes the same directories."""
    models.put(tmp_path / "registry", "m", 1, models.constant(1))
    run_dir = ("--run-dir", str(tmp_path / "run"))
    state_dir = tmp_path / "registry" / ".driftgate"
    with serve(tmp_path / "registry", flags=(*TWO, *run_dir)) as server:
        children = workers(server)
        os.kill(children[0], signal.SIGSTOP)
        address = server.address
        grpc_port = int(server.wait_for("ready")["grpc_url"].rpartition(":")[2])
        server.process.kill()
        server.process.wait()
        server.code = 0  # As far as `serve` is concerned.
        start = time.monotonic()
        wait_until(lambda: all(map(is_gone, children)), "the workers are gone", 2)
        for port in (address[1], grpc_port):
            left_s = start + 2 - time.monotonic()
            wait_until(lambda port=port: is_free(address[0], port), f"port {port} is free", left_s)
    again = ("--port", str(address[1]), "--workers", "2", *run_dir)
    with serve(tmp_path / "registry", flags=again) as server:
        with server.client() as client:
            assert client.post("/v2/models/m/infer", json=ONE).status_code == 200
        assert total(server) == 1
        ended = driftgate("serve", str(tmp_path / "registry"), "--port", "0", *run_dir)
        assert ended.returncode == 2
        assert ended.stderr.splitlines() == [
            f"driftgate: run_dir {str(tmp_path / 'run')!r}: in use by another server; name another"
        ]
        # Without a name, a second server on the registry takes a directory beside the first's.
        with serve(tmp_path / "registry") as first, serve(tmp_path / "registry") as second:
            with second.client() as client:
                client.post("/v2/models/m/infer", json=ONE)
            assert (total(first), total(second)) == (0, 1)
            pids = {beat.pid for beat in heartbeats.read(state_dir).values()}
            assert {*workers(first), *workers(second)} <= pids


def test_sigterm_under_load_loses_nothing_while_it_lingers(registry: Path) -> None:
    """Not ready at once, yet answering, so that balancers can turn away; then exit code 0."""
    with serve(registry, {"stop.linger_s": 1.0}, flags=TWO) as server:
        load = Load(server, 8)
        with load.running(), server.client() as client:
            server.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            wait_until(
                lambda: client.get("/v2/health/ready").status_code == 503, "it is not ready", 0.5
            )
        assert (load.failed, time.monotonic() - start < 1) == (0, True)
        server.code = server.process.wait(10)
        server.join()
        assert server.code == 0
        assert time.monotonic() - start < 5


def test_a_worker_that_has_grown_is_replaced_without_a_failed_request(tmp_path: Path) -> None:
    """Its successor is ready before it leaves, and has not grown: it began with what came late."""
    models.put(tmp_path, "m", 1, models.constant(1))
    settings = {"recycle_bytes": 16 << 20, "stop.linger_s": 0.2, "sync.poll_s": 0.1}
    with serve(tmp_path, settings) as server:
        load = Load(server, 2)
        with load.running():
            [before] = workers(server)
            models.put(tmp_path, "late", 1, models.heavy(64))
            recycled = server.wait_for("worker_recycled", timeout_s=30)
            assert recycled["reason"] == "memory"
            server.wait_for("worker_ready")
            wait_until(lambda: before not in workers(server), "the old one has left")
        with server.client() as client:
            assert 'restarts_total{reason="recycled"} 1.0' in client.get("/metrics").text
    # Who asks on a kept connection in the moment it is closed must ask again.
    assert load.failed <= 2
    assert not server.events("worker_ended")


def test_a_grpc_port_in_use_is_named(registry: Path) -> None:
    """Even when whoever has it would share it."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = driftgate("serve", str(registry), "--port", "0", "--grpc-port", port)

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"driftgate: port {port} on 127.0.0.1: in use")
    assert len(ended.stderr.splitlines()) == 1
