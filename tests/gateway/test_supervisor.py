"""The supervisor alone, with workers that do as a script says instead of serving."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gateway.acceptor import Acceptor
from gateway.place import Board, Line
from gateway.telemetry import DEGRADED, QUEUED_ROWS, READY, REQUESTS, SUPERVISOR, WORKERS, Telemetry
from tests.serving import environment, wait_until

pytestmark = pytest.mark.alone

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from gateway import config, supervisor
from gateway.acceptor import Acceptor
from gateway.errors import GatewayError

root, mode = Path(sys.argv[1]), sys.argv[2]
supervisor._SILENCE_S_MAX = 2.0
supervisor._DEATHS_MAX = 3

def work(settings, place):
    with (root / "births").open("a") as births:
        births.write(f"{time.monotonic()} {os.getpid()} {place.slot} {place.is_joining}\\n")
    n = len((root / "births").read_text().splitlines())
    heavy = {"numpy", "onnxruntime", "starlette", "uvicorn", "grpc", "gateway.app"}
    if found := heavy & set(sys.modules):
        place.line.say(kind="cannot_start", reason=f"the supervisor holds {found}")
        return 2
    if mode == "refuse":
        place.line.say(kind="cannot_start", reason="the registry is empty")
        return 2
    if mode == "crash" or (mode == "crash later" and n > 1):
        os.kill(os.getpid(), signal.SIGSEGV)
    is_asked = []
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: is_asked.append(1))
    place.board.beat(place.slot)
    if mode == "slow successor" and n > 1:
        time.sleep(0.5)
    place.line.say(kind="ready", models=1, refused=0)
    if mode == "short lives":
        time.sleep(0.02)
        return 7
    if n == 1 and mode in ("slow successor", "crash later"):
        place.line.say(kind="recycle", reason="memory")
    while not is_asked:
        if not (mode == "holds the GIL" and n == 1):
            place.board.beat(place.slot)
        time.sleep(0.05)
    place.line.say(kind="leaving")
    return 0

flags = {"registry": str(root), "port": 0, "grpc_port": 0, "run_dir": str(root / "run")}
settings = config.load({**flags, "log.format": "json", "stop.grace_s": 0.2})
try:
    supervisor.serve(settings, work)
except GatewayError as error:
    sys.exit(f"driftgate: {error}")
"""


class Run:
    """One supervisor, what it logs, and the births that its workers note."""

    def __init__(self, root: Path, mode: str) -> None:
        self.root = root
        with (root / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(root), mode], stderr=log, env=environment()
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.root / "log").read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in found if event["event"] == name]

    @property
    def births(self) -> list[tuple[float, int]]:
        """When, and with which process id."""
        file = self.root / "births"
        rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(float(row[0]), int(row[1])) for row in rows]

    def wait_for(self, name: str) -> dict[str, Any]:
        return wait_until(lambda: self.events(name), name)[0]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(10)


@contextmanager
def supervised(root: Path, mode: str = "well") -> Iterator[Run]:
    run = Run(root, mode)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


def test_it_ends_with_the_reason_that_a_first_worker_gives(tmp_path: Path) -> None:
    """What will not change is not tried again: one line, no crash loop."""
    with supervised(tmp_path, "refuse") as run:
        assert run.process.wait(10) == 1
    assert (tmp_path / "log").read_text() == "driftgate: the registry is empty\n"
    assert len(run.births) == 1


def test_it_gives_up_when_no_first_worker_survives(tmp_path: Path) -> None:
    """Five in a row, each after a longer pause; then it says by what they ended."""
    with supervised(tmp_path, "crash") as run:
        assert run.process.wait(10) == 1
    assert "5 workers in a row" in (tmp_path / "log").read_text()
    assert "SIGSEGV" in (tmp_path / "log").read_text()
    assert len(run.births) == 5


def test_workers_that_end_again_and_again_wait_longer_each_time(tmp_path: Path) -> None:
    """From 0.1 s, doubled, with jitter of a half; the first is replaced at once."""
    with supervised(tmp_path, "short lives") as run:
        wait_until(lambda: len(run.births) >= 6, "six lives")
        assert run.end() == 0
    born = [at for at, _ in run.births[:6]]
    pauses = [b - a for a, b in pairwise(born)]

    assert pauses[0] < 0.6
    for k, pause in enumerate(pauses[1:]):
        least = 0.1 * 2**k * 0.5
        assert least <= pause, (k, pauses)
    ended = run.events("worker_ended")
    assert {event["by"] for event in ended} == {"exit code 7"}
    # A crash loop leaves as many notes as are kept, those of the last ones.
    (deaths,) = tmp_path.rglob("deaths")
    known = {int(note.name) for note in deaths.iterdir()}
    assert len(known) == 3
    assert known <= {pid for _, pid in run.births[-4:]}


def test_a_worker_whose_loop_stands_still_is_replaced(tmp_path: Path) -> None:
    """It is alive to the kernel, and deaf: only the board tells."""
    with supervised(tmp_path, "holds the GIL") as run:
        wait_until(lambda: run.events("worker_ready"), "another one is ready")
        assert run.end() == 0
    ended = run.events("worker_ended")[0]
    assert (ended["pid"], ended["reason"], ended["by"]) == (run.births[0][1], "frozen", "SIGKILL")


def test_a_supervisor_that_was_stopped_itself_blames_nobody(tmp_path: Path) -> None:
    """A suspended machine, or a debugger: its own silence is not that of its workers."""
    with supervised(tmp_path) as run:
        run.wait_for("ready")
        run.process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)  # Longer than a worker may be silent here; nothing can be waited for.
        run.process.send_signal(signal.SIGCONT)
        run.process.send_signal(signal.SIGHUP)  # Kept for later, and ends nothing.
        time.sleep(0.3)
        assert run.end() == 0
    assert len(run.births) == 1
    assert not run.events("worker_ended")


@pytest.mark.parametrize("n_signals", [1, 2])
def test_a_worker_that_will_not_leave_is_made_to(tmp_path: Path, n_signals: int) -> None:
    """After the grace; by a second signal at once."""
    with supervised(tmp_path, "stubborn") as run:
        run.wait_for("ready")
        start = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
        run.wait_for("stop_asked")
        if n_signals == 2:
            run.process.send_signal(signal.SIGINT)
        assert run.process.wait(10) == 0
        took_s = time.monotonic() - start

    assert took_s < 1 if n_signals == 2 else 2 < took_s < 4
    with pytest.raises(ProcessLookupError):
        os.kill(run.births[0][1], 0)


def test_a_worker_is_recycled_only_after_its_successor_is_ready(tmp_path: Path) -> None:
    """For half a second there are two; never none."""
    with supervised(tmp_path, "slow successor") as run:
        run.wait_for("worker_ready")
        wait_until(lambda: not _is_alive(run.births[0][1]), "the first has left")
        assert _is_alive(run.births[1][1])
        assert run.end() == 0
    assert len(run.births) == 2
    assert not run.events("worker_ended")


def test_a_worker_whose_successor_dies_stays(tmp_path: Path) -> None:
    """To ask for a successor is no promise to leave."""
    with supervised(tmp_path, "crash later") as run:
        ended = run.wait_for("worker_ended")
        assert ended["pid"] == run.births[1][1]
        time.sleep(0.3)  # Were another one due, it would be born by now.
        assert _is_alive(run.births[0][1])
        assert len(run.births) == 2
        assert run.end() == 0


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_line_keeps_messages_whole_and_ends_with_its_other_end() -> None:
    """Nothing is waited for, on either side."""
    one, other = Line.pair()
    assert other.hear() == ([], False)
    one.say(kind="ready", models=3)
    one.say(kind="leaving")
    assert other.hear() == ([{"kind": "ready", "models": 3}, {"kind": "leaving"}], False)
    one.close()
    assert other.hear() == ([], True)
    other.say(kind="nobody listens")
    other.close()


def test_whoever_holds_most_connections_steps_back() -> None:
    """Slots where nobody takes connections do not count."""
    board = Board(4)
    board.say_connections(0, 2)
    board.say_connections(2, 1)
    assert [board.is_behind_all(slot) for slot in (0, 2)] == [False, True]
    assert board.connections() == {0: 2, 2: 1}
    board.clear(2)
    assert board.is_behind_all(0)


def test_connections_that_nobody_else_takes_are_taken_after_all() -> None:
    """Stepping back is a courtesy of 2 ms: a frozen neighbour holds up nobody."""

    class Greedy:
        n = 0

        def is_mine(self) -> bool:
            return False

        def took_one(self) -> None:
            self.n += 1
            if self.n == 5:
                is_done.set()

    is_done = asyncio.Event()

    async def scenario() -> int:
        turn = Greedy()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)  # noqa: FBT003  the socket module's own signature
            acceptor = Acceptor(listening, asyncio.Protocol, None, turn)
            clients = [socket.create_connection(listening.getsockname()) for _ in range(5)]
            await asyncio.wait_for(is_done.wait(), 5)
            acceptor.close()
            for client in clients:
                client.close()
            await asyncio.sleep(0.01)
        return turn.n

    assert asyncio.run(scenario()) == 5


def test_metrics_of_several_workers_are_merged_by_kind(tmp_path: Path) -> None:
    """Counts add up for ever, gauges of those that live by their mode, of the dead not at all."""
    boss = Telemetry(tmp_path, SUPERVISOR)
    boss.source(WORKERS, lambda: [((), 2.0)])
    first, second, dead = (Telemetry(tmp_path, slot) for slot in "012")
    for worker, slot, rows in ((first, "0", 3), (second, "1", 4), (dead, "2", 100)):
        boss.set_live(slot, is_live=worker is not dead)
        worker.counter(REQUESTS, "m", "1", "champion", "primary", "ok").add(rows)
        worker.source(QUEUED_ROWS, lambda rows=rows: [(("m", "1"), rows)])
        worker.source(READY, lambda rows=rows: [((), float(rows == 3))])
        worker.source(DEGRADED, lambda rows=rows: [(("labels",), rows == 100)])
        worker.refresh()
    boss.refresh()
    for asked in (first, second):
        text = asked.exposition()[0].decode()
        assert 'traffic="primary",variant="champion",version="1"} 107.0' in text
        assert 'driftgate_queued_rows{model="m",version="1"} 7.0' in text
        assert "driftgate_ready 1.0" in text
        assert "driftgate_workers 2.0" in text
        assert 'driftgate_degraded{what="labels"} 0.0' in text
