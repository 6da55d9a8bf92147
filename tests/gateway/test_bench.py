"""The instruments of bench/ are themselves measured: what they count, refuse and charge for."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as front
from bench import load, overhead, processes

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\n{}"
BAD = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy"
LAST = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
ODD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"


class Scripted:
    """An HTTP server that counts requests and answers the n-th as its script says."""

    def __init__(self, script: list[bytes], delay_s: float = 0.0) -> None:
        self.script = script
        self.delay_s = delay_s
        self.n_seen = 0
        self.answers: Counter[bytes] = Counter()
        self.bodies: Counter[bytes] = Counter()
        self.port = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.bodies[await reader.readexactly(size)] += 1
                answer = self.script[self.n_seen % len(self.script)]
                self.n_seen += 1
                self.answers[answer] += 1
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                half = len(answer) // 2
                writer.write(answer[:half])  # In two pieces: an answer may arrive torn.
                await writer.drain()
                writer.write(answer[half:])
                await writer.drain()
                if answer in {b"", LAST}:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # The client went, or the test is over: asyncio would log the cancelling.
        finally:
            writer.close()


@contextmanager
def scripted(script: list[bytes], delay_s: float = 0.0) -> Iterator[Scripted]:
    """Run a scripted server in a thread of this process."""
    server = Scripted(script, delay_s)
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        listening.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(5)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(5)


def send(port: int, **bounds: Any) -> load.Report:
    """Load a scripted server from this process with two bodies in turn."""
    return load.run("127.0.0.1", port, "/p", [b"{}", b'{"a":1}'], **bounds)


def test_each_request_is_counted_as_the_server_answered_it() -> None:
    """Every request the server saw is ok, non-2xx or broken, as its answer was."""
    with scripted([GOOD, GOOD, BAD, GOOD, LAST, GOOD, b"", GOOD, ODD]) as server:
        report = send(server.port, connections=8, seconds=5.0, requests_max=1000)

    seen = server.answers
    assert report.requests == server.n_seen == 1000
    assert report.ok == seen[GOOD] + seen[LAST]
    assert report.non_2xx == seen[BAD]
    assert report.broken == seen[b""] + seen[ODD]
    assert set(server.bodies.values()) == {500}
    assert report.seconds < load._GRACE_S  # Each was known when it happened, not given up on.


def test_a_run_ends_at_its_seconds() -> None:
    """A slow server is left when the time is up, after its last answers came."""
    with scripted([GOOD], delay_s=0.02) as server:
        report = send(server.port, connections=2, seconds=0.3)

    assert 0.3 <= report.seconds < 0.6
    assert report.ok == report.requests == server.n_seen
    # Two connections at 20 ms a request send at most 2 x 0.3 / 0.02, and one more each.
    assert 2 <= report.requests <= 32


def test_latency_at_a_fixed_rate_includes_the_queue() -> None:
    """At twice the rate one connection can carry, the last request waits half the run."""
    with scripted([GOOD], delay_s=0.02) as server:
        report = send(server.port, connections=1, seconds=1.0, rate=100.0)

    # 100 requests at 20 ms each take 2 s at least, the last one was due at 0.99 s.
    assert report.requests == server.n_seen == 100
    assert report.unsent == 0
    assert report.latency_s["max"] >= 1.0
    assert report.latency_s["p50"] >= 0.45
    assert report.send_late_s_p99 >= 0.9


def test_a_fixed_rate_is_kept_when_the_server_can() -> None:
    """With room to spare a run lasts requests / rate and latency is the server's own."""
    with scripted([GOOD]) as server:
        report = send(server.port, connections=8, seconds=1.0, rate=200.0)

    assert report.requests == server.n_seen == 200
    assert 0.99 <= report.seconds < 1.1
    assert report.latency_s["p50"] < 0.01


def test_requests_left_unanswered_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers ends the run after the grace, and all counts as broken."""
    monkeypatch.setattr(load, "_GRACE_S", 0.2)
    with scripted([GOOD], delay_s=60.0) as server:
        report = send(server.port, connections=3, seconds=0.1)

    assert (report.requests, report.ok, report.broken) == (3, 0, 3)


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0", "::", "localhost", "example.org"])
def test_load_goes_to_loopback_addresses_only(host: str) -> None:
    """Another machine, the wildcard and any name are refused before a socket is opened."""
    with pytest.raises(load.NotLoopbackError, match="loopback"):
        load.run(host, 9, "/p", [b"{}"])


def test_the_command_refuses_another_machine_with_one_sentence() -> None:
    """The command line has the same refusal, with exit code 2 and no trace."""
    command = [sys.executable, "-m", "bench.load", "--port", "9", "--path", "/", "--host"]
    result = subprocess.run(
        [*command, "192.0.2.1"], input=b"{}", capture_output=True, cwd=ROOT, check=False
    )

    assert result.returncode == 2
    assert b"loopback" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("percent", "expected"), [(1, 1), (50, 50), (90, 90), (99, 99), (99.9, 100), (100, 100)]
)
def test_a_percentile_is_the_nearest_rank(percent: float, expected: int) -> None:
    """Of 1 to 100 the p-th percentile is p itself, and the next one up between two ranks."""
    assert load.percentile(list(range(1, 101)), percent) == expected


def test_the_echo_answers_all_that_a_generator_apart_sends() -> None:
    """Generator and echo as the benchmarks run them: two processes, nothing lost."""
    port = processes.free_port()
    command = [sys.executable, "-m", "bench.echo", "--port", str(port), "--answer-bytes", "300"]
    with processes.serve(command, port=port, ready_path="/", directory=ROOT) as server:
        before = processes.cpu_s(server.pid)
        report = load.run_apart(port, "/p", [b"{}"], connections=8, seconds=5, requests_max=20_000)
        used = processes.cpu_s(server.pid) - before

    assert report.ok == report.requests == 20_000
    # One process answered one after another: it cannot have used more than the time it took.
    assert 0 < used <= report.seconds + 0.05


BURN = """
import subprocess, sys, threading, time
def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
if sys.argv[1] == "parent":
    # Work in a thread, in a child that is waited for, and in one that stays.
    thread = threading.Thread(target=burn, args=(0.3,))
    thread.start()
    thread.join()
    gone = subprocess.run([sys.executable, __file__, "child"], stdout=subprocess.PIPE, text=True)
    stays = subprocess.Popen(
        [sys.executable, __file__, "stays"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print(time.process_time() + float(gone.stdout) + float(stays.stdout.readline()), flush=True)
    sys.stdin.read()
    stays.stdin.close()
    stays.wait()
else:
    burn(0.3)
    print(time.process_time(), flush=True)
    if sys.argv[1] == "stays":
        sys.stdin.read()
"""


def test_cpu_of_a_tree_is_what_its_members_say_they_used(tmp_path: Path) -> None:
    """Threads, living children and children already waited for are all charged."""
    script = tmp_path / "burn.py"
    script.write_text(BURN)
    with subprocess.Popen(
        [sys.executable, script, "parent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        own_words = float(process.stdout.readline())
        measured = processes.cpu_s(process.pid)
        members = processes.tree(process.pid)
        process.communicate()

    assert len(members) == 2
    assert own_words >= 0.9
    # Ticks of 10 ms for each of three processes, and what each did after it had looked.
    assert measured == pytest.approx(own_words, abs=0.1)


def test_settling_waits_for_work_left_for_later() -> None:
    """A process that still works is waited for until it is quiet."""
    code = "import sys, time\nprint(flush=True)\nwhile time.process_time() < 0.5: pass\n"
    code += "print(time.process_time(), flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        processes.settle(process.pid, settle_s_max=10.0)
        used = processes.cpu_s(process.pid)
        process.communicate()

    assert used >= 0.48


def test_memory_of_a_tree_grows_by_what_a_process_touches() -> None:
    """64 MiB more in use are 64 MiB more of PSS."""
    code = "import sys\nprint(flush=True)\nsys.stdin.readline()\nheld = b'x' * 2**26\n"
    code += "print(flush=True)\nsys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        before = processes.pss_bytes(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        grown = processes.pss_bytes(process.pid) - before
        process.communicate()

    assert grown == pytest.approx(2**26, rel=0.05)


def test_a_server_that_ends_early_is_told_with_its_last_words() -> None:
    """The reason a server gave is in the error, and nobody waits for the deadline."""
    began = time.monotonic()
    command = [sys.executable, "-c", "raise SystemExit('port in use')"]
    with (
        pytest.raises(processes.ServerError, match="port in use"),
        processes.serve(command, port=processes.free_port(), ready_path="/"),
    ):
        pytest.fail("there is no server")

    assert time.monotonic() - began < 10


def test_nothing_of_a_server_is_left_running() -> None:
    """Descendants end with the server, also those it forgot."""
    port = processes.free_port()
    code = "import subprocess, sys\nchild = subprocess.Popen(['sleep', '60'])\n"
    code += f"import runpy\nsys.argv = ['echo', '--port', '{port}']\n"
    code += "runpy.run_module('bench.echo', run_name='__main__')"
    command = [sys.executable, "-c", code]
    with processes.serve(command, port=port, ready_path="/", directory=ROOT) as server:
        members = processes.tree(server.pid)
        assert len(members) == 2

    # An orphan that was killed may wait a moment for the process that collects it.
    deadline = time.monotonic() + 5
    while (left := [one for one in members if _is_running(one)]) and time.monotonic() < deadline:
        pass
    assert left == []


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_the_questions_are_found_by_their_docstrings() -> None:
    """Instruments are not questions; each question says its first line."""
    found = front.questions()

    assert found["overhead"] == "One request's own overhead over a bare echo."
    assert "start" in found
    assert not {"load", "echo", "processes"} & set(found)


def test_an_unknown_question_is_refused_with_the_names_there_are() -> None:
    """A slip in NAME ends with exit code 2 and the list."""
    command = [sys.executable, "-m", "bench", "overhaed"]
    result = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)

    assert result.returncode == 2
    assert b"overhead, " in result.stderr


def test_the_report_of_the_command_is_json() -> None:
    """What the command prints is one document with every count."""
    with scripted([GOOD]) as server:
        command = [sys.executable, "-m", "bench.load", "--port", str(server.port)]
        command += ["--path", "/p", "--requests", "10", "--connections", "2"]
        result = subprocess.run(command, input=b"{}", capture_output=True, cwd=ROOT, check=True)

    report = json.loads(result.stdout)
    assert (report["ok"], report["requests"], server.n_seen) == (10, 10, 10)


def test_the_model_under_load_is_the_network_it_is_said_to_be(tmp_path: Path) -> None:
    """30-64-32-1 with rectifiers inside and a sigmoid at the end, computed by hand in float64."""
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "model.onnx"
    overhead.write_model(path)
    weights = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    rows = np.random.default_rng(1).standard_normal((5, 30)).astype(np.float32)

    given = overhead.predict(path, rows)

    hidden = rows.astype(np.float64)
    for layer in (0, 1):
        hidden = np.maximum(hidden @ weights[f"w{layer}"] + weights[f"b{layer}"], 0)
    expected = 1 / (1 + np.exp(-(hidden @ weights["w2"] + weights["b2"])))
    assert [weights[f"w{layer}"].shape for layer in range(3)] == [(30, 64), (64, 32), (32, 1)]
    np.testing.assert_allclose(given, expected, rtol=1e-5)
    assert given.std() > 0.01  # A constant would leave the output's monitor nothing to bin.


def test_an_answer_that_is_not_the_model_s_ends_the_measurement(tmp_path: Path) -> None:
    """The echo answers 200 with a well-formed document, and is found out all the same."""
    path = tmp_path / "model.onnx"
    overhead.write_model(path)
    with echo() as server, pytest.raises(overhead.MeasurementError, match="the model gives"):
        overhead.check_answer(server, overhead.bodies(1, 1)[0], path)


def test_rows_that_no_monitor_saw_end_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers but observes nothing is not what the question asks about."""
    monkeypatch.setattr(overhead, "_COUNTED_S_MAX", 0.2)
    with echo() as server, pytest.raises(overhead.MeasurementError, match="saw 0 rows"):
        overhead.measure(server, overhead.bodies(1, 4), 2, 0.2, 1)


def test_the_line_gives_medians_and_what_spoils_them() -> None:
    """Ratio of medians, share of the monitors, rows that were dropped, company on the machine."""
    report = load.Report(
        mode="closed", connections=64, requests=1, ok=1, non_2xx=0, broken=0, unsent=0,
        seconds=1.0, requests_per_s=1.0, latency_s={}, send_late_s_p99=0.0, cpu_us_per_request=1.0,
    )  # fmt: skip
    rounds = {
        name: [overhead.Round(cpu, 0.5, 0.25 if name == "driftgate" else 0.0, report) for cpu in of]
        for name, of in {
            "driftgate": (48.0, 44.0, 90.0),
            "unmonitored": (40.0, 41.0, 39.0),
            "echo": (20.0, 10.0, 24.0),
        }.items()
    }

    line = overhead.line(1, 64, rounds)

    assert "driftgate 48.0 us, echo 20.0 us" in line
    assert "2.40 x (budget 2.0 x: OVER)" in line
    assert "monitors 8.0 us, 20 % of the rest" in line
    assert "dropped 25.0 %" in line
    assert "others used 0.5 cores" in line


@contextmanager
def echo() -> Iterator[processes.Server]:
    """Run the echo as the benchmarks do."""
    port = processes.free_port()
    command = [sys.executable, "-m", "bench.echo", "--port", str(port)]
    with processes.serve(command, port=port, ready_path="/", directory=ROOT) as server:
        yield server
