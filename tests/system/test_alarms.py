"""From shifted rows to somebody being told: a real server, a real receiver, the commands."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from monitors import Profile
from tests import models
from tests.receiver import Receiver
from tests.serving import Server, driftgate, request, serve, tensor, wait_until


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    directory = models.put(root, "m", 1, models.identity())
    profile = Profile.fit({"input:x": np.linspace(0, 1, 2000, dtype=np.float32)})
    (directory / "reference.json").write_text(profile.to_json())
    return root


def targets(directory: Path, *urls: str) -> Path:
    """A file that tells each of these URLs."""
    (directory / "secret").write_text("s3cret")
    file = directory / "targets.yaml"
    file.write_text(json.dumps({
        "allow": ["127.0.0.1"],
        "targets": [
            {"name": f"t{k}", "url": url, "secret_file": str(directory / "secret"),
             "on": ["opened", "acknowledged"]}
            for k, url in enumerate(urls)
        ],
    }))  # fmt: skip
    return file


def shift(server: Server, windows: int = 2) -> float:
    """Send rows far off the reference; the longest time to an answer."""
    body = json.dumps(request(tensor("x", "FP32", [500], [7.0] * 500)))
    longest = 0.0
    with server.client() as client:
        for _ in range(2 * windows):
            start = time.perf_counter()
            assert client.post("/v2/models/m/infer", content=body).status_code == 200
            longest = max(longest, time.perf_counter() - start)
    return longest


def test_an_alarm_is_told_once_listed_acknowledged_and_outlives_a_restart(
    registry: Path, receiver: Receiver, tmp_path: Path
) -> None:
    """Signed, with its runbook; a second crossing tells nobody; the log knows it afterwards."""
    settings = {"alarms.targets": targets(tmp_path, receiver.url)}
    with serve(registry, settings) as server:
        shift(server, windows=4)
        wait_until(lambda: receiver.requests, "somebody is told")
        listed = json.loads(driftgate("alarm", "list", "--server", server.url, "--json").stdout)
        (alarm,) = listed
        seen = driftgate("alarm", "ack", alarm["id"], "--note", "looking", "--server", server.url)
        wait_until(lambda: len(receiver.requests) == 2, "told of the acknowledgement")
        with server.client() as client:
            metrics = client.get("/metrics").text
        nobody = driftgate("alarm", "ack", "no-such-alarm", "--server", server.url)
    with serve(registry, settings) as server:
        again = driftgate("alarm", "list", "m", "--server", server.url)
        time.sleep(0.3)  # nothing more may come, and nothing to wait for shows that

    _, headers, body = receiver.requests[0]
    event = json.loads(body)
    assert event["id"] == headers["webhook-id"] == alarm["id"]
    assert event["type"] == "io.driftgate.alarm.opened"
    assert event["subject"] == alarm["monitor"] == "drift:input:x"
    assert headers["webhook-signature"].startswith("v1,")
    assert "driftgate alarm ack" in event["data"]["runbook"]
    assert json.loads(receiver.requests[1][2])["type"] == "io.driftgate.alarm.acknowledged"
    assert 'driftgate_webhooks_total{is="delivered"} 2.0' in metrics
    assert seen.stdout == f"{alarm['id']}: acknowledged\n"
    assert "acknowledged" in again.stdout
    assert (nobody.returncode, "no alarm" in nobody.stderr) == (2, True)
    assert len(receiver.requests) == 2


def test_a_receiver_that_hangs_costs_no_prediction_anything(
    registry: Path, receiver: Receiver, tmp_path: Path
) -> None:
    """It is given up after five seconds; meanwhile everybody is answered."""
    receiver.answers = [lambda _: time.sleep(30)]
    with serve(registry, {"alarms.targets": targets(tmp_path, receiver.url)}) as server:
        shift(server)
        wait_until(lambda: receiver.requests, "the receiver has been asked")
        assert shift(server, windows=20) < 2
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < 10


def test_who_should_be_told_is_tried_out_by_command(receiver: Receiver, tmp_path: Path) -> None:
    """One line for each target; exit code 2 when one is not reached."""
    good = driftgate("alarm", "test", "--targets", str(targets(tmp_path, receiver.url)))
    bad = driftgate(
        "alarm", "test", "--targets", str(targets(tmp_path, receiver.url, "http://127.0.0.1:9/"))
    )
    (tmp_path / "wrong.yaml").write_text("targets: [{name: a, url: 'https://10.0.0.1/'}]")
    wrong = driftgate("alarm", "test", "--targets", str(tmp_path / "wrong.yaml"))

    assert (good.returncode, "204" in good.stdout) == (0, True)
    assert (bad.returncode, "not reached" in bad.stdout) == (2, True)
    assert json.loads(receiver.requests[0][2])["data"]["is_test"] is True
    assert (wrong.returncode, "is not in allow" in wrong.stderr) == (2, True)


def test_a_wrong_file_of_targets_keeps_the_server_from_starting(tmp_path: Path) -> None:
    """One line, exit code 2: nobody finds out at the first alarm."""
    models.put(tmp_path / "models", "m", 1, models.identity())
    ended = driftgate(
        "serve", str(tmp_path / "models"), "--port", "0",
        settings={"alarms.targets": tmp_path / "none.yaml"},
    )  # fmt: skip

    assert (ended.returncode, ended.stderr) == (
        2, "driftgate: alarms.targets: none.yaml: no such file\n"
    )  # fmt: skip
