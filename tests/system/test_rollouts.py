"""Rollouts against a real server: started, watched, told what to do, by HTTP and by command."""

import itertools
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from gateway.alarms import AlarmLog, Crossing
from gateway.exposures import Slot
from registry.revisions import Revisions
from tests import models
from tests.serving import driftgate, request, serve, tensor


@pytest.fixture
def registry(tmp_path) -> Path:
    for version in (1, 2):
        models.put(tmp_path / "models", "m", version, models.constant(version))
    assert driftgate("promote", "m", "1", "-r", str(tmp_path / "models")).returncode == 0
    return tmp_path / "models"


def until(condition, timeout_s=30):
    """What `condition` gives, once it is something."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return found


def test_a_rollout_is_prepared_stepped_paused_and_aborted_over_http(registry) -> None:
    """Weight 0 until the worker has the candidate; abort answers 200 the second time too."""
    plan = {"steps": [{"weight": 10, "for_s": 0, "units_min": 10_000}]}
    with serve(registry) as server, server.client() as http:
        wrong = {"model": "m", "version": 2, "plan": {"steps": [{"weigth": 1}], "alpha": 5}}
        refused = http.post("/admin/rollouts", json=wrong)
        assert refused.status_code == 400
        assert "plan.steps[0].weigth" in refused.json()["error"]

        started = http.post("/admin/rollouts", json={"model": "m", "version": 2, "plan": plan})
        assert started.status_code == 200, started.text
        (listed,) = http.get("/admin/rollouts").json()["rollouts"]
        assert (listed["candidate"], listed["control"]) == (2, 1)

        at = f"/admin/rollouts/{listed['id']}"
        found = until(lambda: _at(http, at, "step"))
        assert found["weight"] == 10
        assert http.get("/admin/rollouts/m").json()["id"] == listed["id"]
        assert until(lambda: http.get(at).json()["evidence"])["verdict"] == "inconclusive"
        assert http.post("/admin/rollouts", json={"model": "m", "version": 2}).status_code == 400
        assert http.post("/admin/models/m/promote", json={"version": 2}).status_code == 409

        assert http.post(at + "/pause", json={"message": "lunch"}).status_code == 200
        assert _at(http, at, "holding")["cause"] == "manual"
        assert http.post(at + "/resume").status_code == 200

        for _ in range(2):
            assert http.post(at + "/abort", json={"message": "no"}).status_code == 200
        assert _at(http, at, "aborted")["reason"] == "no"
        assert http.get("/admin/rollouts/none").status_code == 404
    state = Revisions(registry / ".driftgate").head().models["m"]
    assert (state.aliases["champion"], state.buckets) == (1, "")


def test_labels_decide_a_rollout_that_an_open_alarm_has_held(registry) -> None:
    """Told at the start, on both doors; it goes on when the alarm is acknowledged; then what the
    labels say of real answers ends it. The command says what it waits for.
    """
    log = AlarmLog(registry / ".driftgate" / "alarms.jsonl", hold_off_s=60)
    log.crossed(Crossing("m", 1, "drift:input:x", "odds of 1e6 to 1", time.time(), {}))
    words = ("canary", "start", "m", "2", "-r", str(registry))
    said = driftgate(*words, "--dry-run")
    assert "note: drift alarm" in said.stdout
    assert "holds before its first weight" in said.stdout

    guards = {
        "output_shift": {"action": "ignore"},
        "outcome": {"metric": "wrong", "margin": 0.1, "required": True},
    }
    plan = {"steps": [{"weight": 50, "for_s": 0, "units_min": 5}], "guards": guards}
    flags = ("--port", "0", "--labels-sample", "100")
    with serve(registry, flags=flags) as server, server.client() as http:
        started = http.post("/admin/rollouts", json={"model": "m", "version": 2, "plan": plan})
        (note,) = started.json()["notes"]
        alarm = http.get("/alarms").json()["alarms"][0]["id"]
        assert alarm in note
        held = until(lambda: _at(http, "/admin/rollouts/m", "holding"))
        assert (held["cause"], held["held"], held["weight"]) == ("drift", "preparing", 0)
        shown = driftgate("canary", "status", "m", "--server", server.url)
        assert alarm in shown.stdout.replace("\n", "")
        assert "driftgate alarm ack ID" in " ".join(shown.stdout.split())

        assert http.post(f"/admin/alarms/{alarm}/ack", json={}).status_code == 200
        until(lambda: _at(http, "/admin/rollouts/m", "step"))
        ids = itertools.count()

        def aborted():
            labels = []
            for k in itertools.islice(ids, 60):
                body = request(tensor("x", "FP32", [1], [0]))
                asked = http.post(
                    "/v2/models/m/infer", json=body, headers={"x-request-id": f"q{k}"}
                )
                assert asked.status_code == 200
                labels.append({"id": f"q{k}/0", "label": 1, "model": "m"})
            assert http.post("/labels", json=labels).json()["joined"] == 60
            return _at(http, "/admin/rollouts/m", "aborted")

        ended = until(aborted)
        assert ended["reason"].startswith("outcome: candidate 1 of")
        told = json.loads(driftgate("canary", "status", "m", "--json", "-r", str(registry)).stdout)
        assert told["next"] == "nothing: it is over"
        (outcome,) = [g for g in told["evidence"]["guards"] if g["guard"] == "outcome"]
        assert outcome["outcome"]["candidate"] == 1
        assert outcome["outcome"]["control"] == 0
        assert driftgate("canary", "status", "m", "-r", str(registry)).returncode == 5


def test_commands_do_the_same_on_the_directory(registry) -> None:
    """No server needed; a plan that is wrong says everything."""

    def canary(*words):
        return driftgate("canary", *words, "-r", str(registry))

    (registry.parent / "plan.yaml").write_text("steps: [{weight: 0}, {weight: 5, units_min: 0}]")
    wrong = canary("start", "m", "2", "--plan", str(registry.parent / "plan.yaml"))
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 2

    assert canary("start", "m", "2").returncode == 0
    status = canary("status", "m", "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["phase"] == "preparing"
    assert canary("promote", "m").returncode == 2
    assert canary("abort", "m", "-m", "no").returncode == 0
    assert "aborted" in canary("status", "m").stdout

    said = driftgate("canary", "plan", "--requests-per-h", "200")
    assert said.returncode == 0
    assert said.stdout.startswith("1 % of 200 requests/h: within 100 h this step sees")


PLAN = {
    "steps": [
        {"weight": 20, "for_s": 1, "units_min": 150},
        {"weight": 50, "for_s": 1, "units_min": 400},
    ],
    "bake_s": 1,
}
CANDIDATES = {
    "errs": (models.four_rows_at_most(), {}),
    "slow": (models.slow(n_rounds=30), {"output_shift": {"action": "ignore"}}),
    "shifts": (models.plus(3), {"slow_requests": {"action": "ignore"}}),
    "equal": (models.plus(0), {"slow_requests": {"action": "ignore"}}),
    "kills": (models.slow(n_rounds=1500), {}),
}
ROWS = 5
"""More than `four_rows_at_most` can take."""


def ask(url, model, stop):
    """Users who come and go, until `stop` is set."""
    rng = random.Random(model)
    with httpx.Client(base_url=url, timeout=30) as http:
        while not stop.is_set():
            values = [[rng.gauss(0, 1)] for _ in range(ROWS)]
            try:
                http.post(
                    f"/v2/models/{model}/infer",
                    json=request(tensor("x", "FP32", [ROWS, 1], values)),
                    headers={"x-user-id": f"u{rng.randrange(10**9)}"},
                )
            except httpx.HTTPError:
                time.sleep(0.1)  # its worker has died, or is being replaced


def test_five_candidates_are_judged_by_two_workers(tmp_path) -> None:
    """One errs, one is slow, one shifts, one is equal, one kills its worker: abort, abort, hold,
    promote, abort; each says why.
    """
    registry = tmp_path / "models"
    for name, (content, _) in CANDIDATES.items():
        models.put(registry, name, 1, models.plus(0))
        assert driftgate("promote", name, "1", "-r", str(registry)).returncode == 0
        models.put(registry, name, 2, content)
    flags = ("--port", "0", "--workers", "2")
    failures = ("worker_ended", "worker_died_in_rollout")
    with (
        serve(registry, flags=flags, expected_failures=failures) as server,
        server.client() as http,
    ):
        for name, (_, guards) in CANDIDATES.items():
            route = {"unit": ["header:x-user-id", "request"]}
            assert http.put(f"/admin/routes/{name}", json=route).status_code == 200
            body = {"model": name, "version": 2, "plan": PLAN | {"guards": guards}}
            assert http.post("/admin/rollouts", json=body).status_code == 200
        stop = threading.Event()
        clients = [
            threading.Thread(target=ask, args=(server.url, name, stop)) for name in CANDIDATES
        ]
        for client in clients[:-1]:
            client.start()
        try:
            ended = {
                "errs": ("aborted", "error_rate"),
                "slow": ("aborted", "slow_requests"),
                "shifts": ("holding", "output_shift"),
                "equal": ("done", ""),
            }
            for name, (phase, words) in ended.items():
                at = f"/admin/rollouts/{name}"
                found = until(lambda at=at, phase=phase: _at(http, at, phase), timeout_s=60)
                assert words in found["reason"], found
            clients[-1].start()  # It takes a whole core, which the others were better off with.
            kill_with_the_candidate_in_hand(registry, http)
            found = until(lambda: _at(http, "/admin/rollouts/kills", "aborted"), timeout_s=20)
            assert "SIGSEGV" in found["reason"]
        finally:
            stop.set()
            for client in clients:
                if client.ident:
                    client.join()
    heads = Revisions(registry / ".driftgate").head().models
    champions = {name: state.aliases["champion"] for name, state in heads.items()}
    assert champions == {"errs": 1, "slow": 1, "shifts": 1, "equal": 2, "kills": 1}


def kill_with_the_candidate_in_hand(registry, http) -> None:
    """SIGSEGV, while a worker runs nothing but the candidate of `kills`."""
    rollout = http.get("/admin/rollouts/kills").json()["id"]

    def victim():
        for path in (registry / ".driftgate").rglob(f"in_hand/{rollout}.*"):
            found = Slot.read(path)
            if found and found[2][0] > 0:
                return found[0]
        return None

    os.kill(until(victim), signal.SIGSEGV)


def _at(http, path, phase):
    """The rollout, once it is in this phase."""
    try:
        found = http.get(path).json()
    except httpx.HTTPError:  # the worker behind this connection was killed
        return None
    return found if found["phase"] == phase else None
