"""State that is torn or read-only under load: predictions go on, changes are refused whole."""

import os
from pathlib import Path

import pytest

from registry.revisions import Revisions
from tests import models
from tests.serving import Server, serve, wait_until
from tests.system.test_hot_swap import QUICK, answering, traffic


def degraded(server: Server) -> set[str]:
    """What the gauge says does not work."""
    with server.client() as http:
        lines = http.get("/metrics").text.splitlines()
    return {
        line.split('"')[1]
        for line in lines
        if line.startswith("driftgate_degraded{") and line.endswith(" 1.0")
    }


def promote(server: Server, version: int) -> tuple[int, str]:
    """Ask for a change over HTTP: the status and the code of its error."""
    with server.client() as http:
        answer = http.post(
            "/admin/models/counted/promote?wait=applied&timeout=10", json={"version": version}
        )
        return answer.status_code, answer.json().get("code", "")


@pytest.fixture
def state(tmp_path: Path):
    """A file system of its own for the state directory, where mounting is permitted."""
    place = tmp_path / "state"
    place.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=4m tmpfs {place} 2>/dev/null"):
        pytest.skip("mounting is not permitted here")
    yield place
    os.system(f"umount -l {place}")


def test_torn_and_read_only_state_stop_changes_only_and_heal(tmp_path: Path, state: Path) -> None:
    """Nobody who predicts notices; a change is refused, not half applied; no restart is needed."""
    registry = tmp_path / "models"
    for version in (1, 2, 3):
        models.put(registry, "counted", version, models.constant(version))
    settings = {**QUICK, "state_dir": state, "run_dir": tmp_path / "run"}
    with serve(registry, settings) as server, traffic(server, "counted", 2) as record:
        assert promote(server, 1)[0] == 200
        assert answering(server, "counted") == 1

        number = Revisions(state).head().number + 1
        torn = state / "revisions" / f"{number:08d}.json"
        torn.write_text('{"revision": 2, "par')  # what a crash of another program leaves behind
        wait_until(lambda: "state" in degraded(server), "the gauge says that a document is torn")
        assert answering(server, "counted") == 1
        assert promote(server, 2)[0] == 200, (
            "the last good document counts, the next number is free"
        )
        assert answering(server, "counted") == 2

        before = sorted((state / "revisions").iterdir())
        assert os.system(f"mount -o remount,ro {state}") == 0
        wait_until(lambda: "heartbeat" in degraded(server), "the gauge says it cannot be written")
        status, code = promote(server, 3)
        assert (status, code) == (507, "storage_unavailable"), (status, code)
        assert answering(server, "counted") == 2
        assert sorted((state / "revisions").iterdir()) == before
        with server.client() as http:
            assert http.get("/v2/health/ready").status_code == 200

        assert os.system(f"mount -o remount,rw {state}") == 0
        wait_until(lambda: "heartbeat" not in degraded(server), "it heals by itself")
        assert promote(server, 3)[0] == 200
        assert answering(server, "counted") == 3
    assert record.wrong == []
    assert {1, 2, 3} <= set(record.versions)
