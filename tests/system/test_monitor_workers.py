"""Monitors of several workers: one host, one judge, and nothing lost with the judge."""

import os
import signal
from pathlib import Path

import numpy as np

from monitors import Profile
from tests import models
from tests.serving import driftgate, request, serve, tensor, wait_until

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


def test_a_version_is_compared_with_the_champion_over_all_workers(tmp_path: Path) -> None:
    """Rows of the same time, in the champion's bins; only the answers differ, and it is said so.

    Both drift together meanwhile, far from the reference: that is no difference. What is asked for
    in vain is told why.
    """
    for version, added in ((1, 1.0), (2, 0.0)):
        directory = models.put(tmp_path / "registry", "m", version, models.plus(added))
        x = np.random.default_rng(1).normal(size=(5000, 1)).astype(np.float32)
        columns = {"input:x": x[:, 0], "output:y": x[:, 0] + np.float32(added)}
        (directory / "reference.json").write_text(Profile.fit(columns).to_json())
    models.put(tmp_path / "registry", "lonely", 1, models.identity("FP32"))
    draw = np.random.default_rng(2)

    with serve(tmp_path / "registry", {"monitor.budget_rows": 50_000}, flags=TWO) as server:

        def ask(**query) -> tuple[int, dict]:
            with server.client() as client:
                got = client.get("/drift/m", params={"against": "champion", **query})
            return got.status_code, got.json()

        for part in range(25):
            for version, rows in ((1, 20), (2, 60)):
                x = draw.normal(part / 10, 1, (rows, 1)).astype(np.float32).tolist()
                with server.client() as client:
                    got = client.post(
                        f"/v2/models/m/versions/{version}/infer",
                        json=request(tensor("x", "FP32", [rows, 1], x)),
                    )
                assert got.status_code == 200
            if part == 0:
                assert ask()[0] in {200, 400}
        wait_until(
            lambda: all(ask(window="total")[1].get("report", {}).get("n_rows") == 500
                        for _ in range(6)),
            "each worker tells of all rows of the version",
        )  # fmt: skip
        status, found = ask(window="total", version="1")
        assert (status, found["version"], found["against"]) == (200, 1, 2)
        channels = {channel["name"]: channel for channel in found["report"]["channels"]}
        named = {one["channel"] for one in found["report"]["differences"]}
        assert ("output:y" in named, "input:x" in named) == (True, False)
        assert channels["input:x"]["evidence"] < 100
        assert 0 < found["budget"]["share"] < 0.2

        for query, code in (
            ({"version": "2"}, 400),
            ({"against": "1"}, 400),
            ({"version": "3"}, 404),
            ({"against": "2", "window": "x"}, 400),
        ):
            assert ask(**query)[0] == code
        with server.client() as client:
            alone = client.get("/drift/lonely", params={"against": "champion"})
            assert (alone.status_code, "no reference" in alone.text) == (404, True)
            both = client.get("/drift").json()["models"]
        # A difference calls nobody: what pages there are, are about the reference.
        assert all("against" not in str(line["alarms"]) for line in both)
        ended = driftgate("drift", "m", "--against", "champion", "--server", server.url)
        assert (ended.returncode, "differs" in ended.stdout) == (0, True), ended.stderr


def test_refused_requests_of_all_workers_are_judged_for_their_model(tmp_path: Path) -> None:
    """Two in a hundred are normal, as the first requests show; then a client sends a wrong shape.

    The page names the code, is over when the client is mended, and no other model hears of it. A
    restart counts nothing twice.
    """
    for name in ("m", "other"):
        models.put(tmp_path / "registry", name, 1, models.identity("FP32"))
    settings = {"monitor.refused_learn": 300, "monitor.budget_rows": 50_000}
    good = request(tensor("x", "FP32", [1], [1.0]))
    wrong = request(tensor("x", "FP32", [1, 1], [1.0]))
    n_sent = 0

    def send(server, n: int, every: int) -> None:
        nonlocal n_sent
        for start in range(0, n, 50):
            with server.client() as client:  # A connection each time: of either worker.
                for k in range(start, start + 50):
                    is_wrong = k % every == 0
                    got = client.post("/v2/models/m/infer", json=wrong if is_wrong else good)
                    assert got.status_code == (400 if is_wrong else 200)
                client.post("/v2/models/other/infer", json=good)
        n_sent += n

    def said(server, name: str = "m") -> list[dict]:
        found = []
        for _ in range(4):
            with server.client() as client:
                found.append(client.get(f"/drift/{name}").json().get("requests") or {})
        return found

    def all_say(server, what) -> bool:
        return all(found and what(found) for found in said(server))

    with serve(tmp_path / "registry", settings, flags=TWO) as server:
        send(server, 400, 50)
        wait_until(lambda: all_say(server, lambda r: r["n_requests"] == n_sent), "all are counted")
        codes = said(server)[0]["codes"]
        assert codes["bad_tensor"]["n_refused"] == 8
        assert 0.02 < codes["bad_tensor"]["bound"] < 0.08
        send(server, 200, 2)
        wait_until(lambda: all_say(server, lambda r: r["alarms"]), "more is an alarm")
        assert {a["channel"] for a in said(server)[0]["alarms"]} <= {
            "requests:bad_tensor", "requests:any"
        }  # fmt: skip
        with server.client() as client:
            (episode,) = client.get("/alarms").json()["alarms"]
        assert "are refused" in episode["reason"]
        with server.client() as client:
            found = client.get("/drift").json()["models"]
            metrics = client.get("/metrics").text.splitlines()
        lines = {line["model"]: line["alarms"] for line in found}
        assert lines == {"m": ["requests"], "other": []}
        assert 'driftgate_alarms_total{level="page",model="m",version="1"} 1.0' in metrics
        (n_open,) = (
            float(line.rpartition(" ")[2])
            for line in metrics
            if line.startswith('driftgate_alarms_open{model="m"')
        )
        assert n_open >= 1
        assert any("drift_evidence" in x and "requests:bad_tensor" in x for x in metrics)
        assert not said(server, "other")[0]["alarms"]
        wait_until(lambda: all_say(server, lambda r: r["n_requests"] == n_sent), "all, again")
    with serve(tmp_path / "registry", settings, flags=TWO) as server:
        wait_until(lambda: all_say(server, lambda r: r["alarms"]), "it is still known")
        send(server, 400, 1000)
        wait_until(lambda: all_say(server, lambda r: r["n_requests"] == n_sent), "each once")
        wait_until(lambda: all_say(server, lambda r: not r["alarms"]), "it is over")
