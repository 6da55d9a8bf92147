"""Settings of monitors through the one door: in force on a running server, and undone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitors import Profile
from tests import models
from tests.receiver import Receiver
from tests.serving import driftgate, request, serve, tensor, wait_until


def two_models(directory: Path, receiver: Receiver) -> tuple[Path, dict[str, object]]:
    """A registry of two that answer their input, and settings of a server that tells somebody."""
    for name in ("m", "other"):
        version = models.put(directory / "models", name, 1, models.identity())
        profile = Profile.fit({"input:x": np.linspace(0, 1, 2000, dtype=np.float32)})
        (version / "reference.json").write_text(profile.to_json())
    (directory / "targets.yaml").write_text(json.dumps({
        "allow": ["127.0.0.1"], "targets": [{"name": "one", "url": receiver.url}],
    }))  # fmt: skip
    return directory / "models", {
        "labels.sample": 100, "alarms.targets": directory / "targets.yaml",
    }  # fmt: skip


def test_what_is_said_about_monitors_is_in_force_within_a_second_and_undone(
    tmp_path: Path,
) -> None:
    """Tolerance, budget, window, webhooks, labels, target, sample; by command and over HTTP."""
    receiver = Receiver()
    root, settings = two_models(tmp_path, receiver)
    with serve(root, settings) as server, server.client() as client:

        def ask(name: str, x: float, head: str | None = None) -> None:
            headers = {"x-request-id": head} if head else {}
            body = request(tensor("x", "FP32", [100], [x] * 100))
            path = f"/v2/models/{name}/infer"
            assert client.post(path, json=body, headers=headers).status_code == 200

        def drift(name: str = "m") -> dict[str, Any]:
            found: dict[str, Any] = client.get(f"/drift/{name}").json()
            return found

        words = ("-r", str(root))
        said = driftgate("monitor", "set", "m", "tolerance=0.5", "window_rows=150",
                         "budget.days=7", "labels.sample=0", "webhooks=[]", *words)  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert "m monitor.tolerance none -> 0.5" in said.stdout
        wait_until(lambda: drift()["window_rows"] == 150, "it is in force")
        budgets = [drift(name)["budget"] for name in ("m", "other")]
        assert [(b["days"], b["tolerance"]) for b in budgets] == [(7.0, 0.5), (90.0, 0.01)]

        ask("m", 9.0, "kept")
        ask("other", 9.0)
        ask("other", 9.0)
        label = [{"id": "kept/0", "label": 1, "model": "m"}]
        assert client.post("/labels", json=label).json()["not_sampled"] == 1
        for _ in range(4):
            ask("m", 9.0)
            ask("other", 9.0)
        wait_until(lambda: drift()["report"]["alarms"], "an alarm of m")
        wait_until(lambda: receiver.requests, "an alarm of the other is told")
        told = {json.loads(body)["data"]["model"] for _, _, body in receiver.requests}
        assert told == {"other"}

        patch = {"labels": None, "target": {"positive": "late"}, "sample": 0}
        answer = client.patch("/admin/models/m/monitor?wait=applied", json=patch)
        assert answer.status_code == 200, answer.text
        assert answer.json()["undo"].startswith("driftgate restore 1")
        seen = drift()["rows_observed"]
        ask("m", 0.5, "named")
        labels = [{"id": "named", "label": ["late"] * 30 + ["punctual"] * 70, "model": "m"}]
        assert client.post("/labels", json=labels).json()["joined"] == 100
        found = client.get("/drift/m/performance").json()
        assert (found["task"], found["realised"]["rate"]["value"]) == ("binary", 0.3)
        assert drift()["rows_observed"] == seen

        for path, body in (
            ("/admin/models/m/monitor", {"segments": ["x"]}),
            ("/admin/models/m/monitor", {"target": {"output": "yy"}}),
        ):
            refused = client.patch(path, json=body)
            assert refused.status_code == 400, refused.text
        assert "did you mean 'y'" in refused.json()["error"]
        assert client.patch("/admin/models/no/monitor", json=patch).status_code == 404
        got = driftgate("monitor", "get", "m", "--server", server.url)
        assert "target.positive=late" in got.stdout
        assert driftgate("restore", "0", "m", "--server", server.url).returncode == 0
        wait_until(lambda: drift()["budget"]["days"] == 90.0, "as the server is set")
    receiver.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("set", "m", "tolerance"), "must be KEY=VALUE"),
        (("set", "no", "sample=1"), "no model 'no'"),
        (("set", "m", "--file", "missing.yaml"), "no such file"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    """With what would be right."""
    models.put(tmp_path, "m", 1, models.identity())
    done = driftgate("monitor", *words, "-r", str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
