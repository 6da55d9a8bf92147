"""From labels to somebody being told: two real workers, keys, a real receiver, the commands."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitors import Profile
from monitors.loss import LossReference, Outcomes
from tests import models
from tests.receiver import Receiver
from tests.serving import Server, driftgate, request, serve, tensor, wait_until

ROWS = 100


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


class Clients:
    """Ask for predictions, and know what became of them."""

    def __init__(self, server: Server, key: str) -> None:
        self.server = server
        self.headers = {"authorization": f"Bearer {key}"}
        self.draw = np.random.default_rng(3)
        self.n = 0

    def call(self, path: str, body: Any = None) -> Any:
        """Over a connection of its own, so that either worker may answer."""
        with self.server.client(headers=self.headers) as client:
            answer = client.get(path) if body is None else client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

    def predict_and_label(self, n: int, lift: float, a: float = 1.5) -> None:
        """Requests of ROWS rows; labels have `lift` of their cause in the score."""
        for _ in range(n):
            p = self.draw.beta(a, 3, ROWS).astype(np.float32)
            truth = self.draw.random(ROWS) < lift * p + (1 - lift) * p.mean()
            self.n += 1
            name = f"r{self.n}"
            body = request(tensor("x", "FP32", [ROWS], p.tolist()))
            head = {**self.headers, "x-request-id": name}
            with self.server.client(headers=head) as client:
                assert client.post("/v2/models/m/infer", json=body).status_code == 200
            labels = [{"id": name, "label": truth.astype(int).tolist(), "model": "m"}]
            self.call("/labels", labels)

    def judged(self) -> dict[str, Any]:
        found: dict[str, Any] = self.call("/drift/m/performance")["judged"]
        return found

    def wait_for_all(self) -> None:
        def is_there() -> bool:
            return self.judged().get("rows") == self.n * ROWS

        wait_until(is_there, "all labels are judged", timeout_s=30)


def referenced(root: Path) -> Path:
    """A registry with a model that answers its input, calibrated, and both its references."""
    directory = models.put(root, "m", 1, models.identity())
    draw = np.random.default_rng(1)
    p = draw.beta(1.5, 3, 8000)
    profile = Profile.fit({"input:x": p.astype(np.float32)})
    (directory / "reference.json").write_text(profile.to_json())
    reference = LossReference.fit(Outcomes.binary(p, draw.random(p.size) < p))
    (directory / "labels.json").write_text(reference.to_json())
    return root


def told_to(receiver: Receiver, directory: Path) -> tuple[dict[str, object], str]:
    """Settings of a server that asks for keys and tells the receiver, and a key."""
    file = directory / "keys"
    words = ("--scope", "predict", "--scope", "monitor", "--scope", "admin", "--json")
    key = json.loads(driftgate("keys", "add", "--keys", str(file), *words).stdout)["key"]
    (directory / "targets.yaml").write_text(json.dumps({
        "allow": ["127.0.0.1"],
        "targets": [{"name": "retrain", "url": receiver.url, "on": ["opened", "accepted"]}],
    }))  # fmt: skip
    return {
        "keys": file, "labels.sample": 100, "monitor.budget_rows": 100_000,
        "alarms.targets": directory / "targets.yaml", "state_dir": directory / "state",
    }, key  # fmt: skip


def test_labels_call_somebody_when_inputs_look_as_ever_once_over_workers_and_a_death(
    tmp_path: Path, receiver: Receiver
) -> None:
    """The judge is killed in between; then the cohort is accepted, and inputs drift for once."""
    root = referenced(tmp_path / "models")
    settings, key = told_to(receiver, tmp_path)
    with serve(root, settings, flags=("--port", "0", "--workers", "2")) as server:
        clients = Clients(server, key)
        clients.predict_and_label(5, lift=1.0)
        clients.wait_for_all()
        assert not receiver.requests
        clients.predict_and_label(3, lift=0.0)
        clients.wait_for_all()  # What waits to be written would be lost with the worker.
        pid = server.process.pid
        first = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        os.kill(int(first), signal.SIGKILL)
        for _ in range(15):
            clients.predict_and_label(2, lift=0.0)
            if receiver.requests:
                break
        wait_until(lambda: receiver.requests, "somebody is told", timeout_s=20)
        clients.wait_for_all()
        (episode,) = clients.call("/alarms")["alarms"]
        drift = ("drift", "m", "--server", server.url, "--key", key)
        # By any worker: who has just taken the place of the judge reads its evidence first.
        wait_until(lambda: "fell, by labels" in driftgate(*drift).stdout, "the alarm is shown")
        listed = driftgate("alarm", "list", "--server", server.url, "--key", key)
        refused = driftgate("alarm", "list", "--server", server.url)
        with server.client(headers=clients.headers) as client:
            metrics = client.get("/metrics").text
        words = ("labels", "accept", "m", "--days", "1", "--server", server.url, "--key", key)
        accepted = driftgate(*words)
        wait_until(lambda: len(receiver.requests) == 2, "told that it was accepted")
        wait_until(
            lambda: clients.judged()["reference"]["source"] == "accepted", "judged by the cohort"
        )
        clients.predict_and_label(4, lift=0.0, a=6.0)
        wait_until(lambda: len(receiver.requests) > 2, "told that inputs drift", timeout_s=20)

    told = [json.loads(body)["data"] for _, _, body in receiver.requests]
    assert (told[0]["model"], told[0]["version"]) == ("m", 1)
    assert told[0]["monitor"].startswith("labels:")
    assert "fell, by labels" in told[0]["reason"]
    assert [(one["event"], one["monitor"].partition(":")[0]) for one in told] == [
        ("opened", "labels"), ("accepted", "labels"), ("opened", "drift")
    ]  # fmt: skip
    assert episode["id"] in listed.stdout
    assert refused.returncode == 2
    assert "reference now" in accepted.stdout
    assert 'driftgate_label_evidence{channel="loss",model="m",version="1"}' in metrics
    assert 'driftgate_label_alarms_open{model="m",version="1"}' in metrics
    written = (tmp_path / "state" / "alarms.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    opened = [line["monitor"] for line in lines if line["event"] == "opened"]
    assert len(opened) == len(set(opened)) == 2
