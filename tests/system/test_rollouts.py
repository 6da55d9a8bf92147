"""Rollouts against a real server: started, watched, told what to do, by HTTP and by command."""

import json
import time
from pathlib import Path

import pytest

from registry.revisions import Revisions
from tests import models
from tests.serving import driftgate, serve


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


def _at(http, path, phase):
    found = http.get(path).json()
    return found if found["phase"] == phase else None
