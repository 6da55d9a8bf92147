"""Monitors of several workers: one host, one judge, and nothing lost with the judge."""

import os
import signal
from pathlib import Path

import numpy as np

from monitors import Profile
from tests import models
from tests.serving import request, serve, tensor, wait_until

TWO = ("--port", "0", "--workers", "2")
ROWS = 40


def reference() -> str:
    x = np.random.default_rng(1).normal(size=5000).astype(np.float32)
    return Profile.fit({"input:x": x}).to_json()


def test_any_worker_tells_what_all_have_seen_and_evidence_outlives_the_judge(
    tmp_path: Path,
) -> None:
    """Rows over many connections add up; the judge is killed, and its alarms are still there.

    After a restart of the whole server, too.
    """
    directory = models.put(tmp_path / "registry", "m", 1, models.identity("FP32"))
    (directory / "reference.json").write_text(reference())
    draw = np.random.default_rng(2)
    n_sent = 0

    def send(server, shift: float, n: int) -> None:
        nonlocal n_sent
        for _ in range(n):
            x = draw.normal(shift, 1, ROWS).astype(np.float32).tolist()
            with server.client() as client:
                got = client.post(
                    "/v2/models/m/infer", json=request(tensor("x", "FP32", [ROWS], x))
                )
            assert got.status_code == 200
            n_sent += ROWS

    def reports(server) -> list[dict]:
        found = []
        for _ in range(6):
            with server.client() as client:
                found.append(client.get("/drift/m?window=total").json())
        return found

    def all_say(server, n: int) -> bool:
        return all(found["report"]["n_rows"] == n for found in reports(server))

    with serve(tmp_path / "registry", flags=TWO) as server:
        send(server, 0.0, 20)
        send(server, 1.5, 10)
        wait_until(lambda: all_say(server, n_sent), "all workers tell of all rows")
        pages = [
            {alarm["channel"] for alarm in found["report"]["alarms"] if alarm["level"] == "page"}
            for found in reports(server)
        ]
        assert all(page == {"input:x"} for page in pages)
        assert {found["rows_observed"] for found in reports(server)} == {n_sent}

        pid = server.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lease = next((tmp_path / "registry/.driftgate/run").glob("*/monitors/lease"))
        holder = next(
            int(child)
            for child in children
            if any(
                os.path.realpath(file) == str(lease) for file in Path(f"/proc/{child}/fd").iterdir()
            )
        )
        os.kill(holder, signal.SIGKILL)
        wait_until(lambda: all_say(server, n_sent), "the other one goes on with every row")
        send(server, 1.5, 5)
        wait_until(lambda: all_say(server, n_sent), "and counts on, each row once")
        assert {a["channel"] for a in reports(server)[0]["report"]["alarms"]} >= {"input:x"}
    with serve(tmp_path / "registry", flags=TWO) as server:
        send(server, 1.5, 5)
        wait_until(lambda: all_say(server, n_sent), "a restart forgets nothing")
