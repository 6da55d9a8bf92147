"""Two hosts, one PostgreSQL: a label meets its prediction wherever either arrived."""

import os
import signal
from pathlib import Path

from gateway.labels.store import Store
from tests import models
from tests.serving import request, serve, tensor, wait_until

URL = os.environ["DRIFTGATE_TEST_POSTGRES"]
PID = int(os.environ["DRIFTGATE_TEST_POSTGRES_PID"])
BODY = request(tensor("x", "FP32", [2], [0.25, 0.75]))


def children() -> list[int]:
    """Processes of the database that serve a connection, and its own."""
    text = Path(f"/proc/{PID}/task/{PID}/children").read_text(encoding="ascii")
    return [PID, *map(int, text.split())]


def test_a_label_meets_its_prediction_on_another_host_and_an_outage_costs_no_prediction(
    tmp_path: Path,
) -> None:
    """While the database hangs, predictions are answered; afterwards they are all there."""
    models.put(tmp_path, "m", 1, models.identity())
    one, other = ({"labels.sample": 100, "labels.url": URL, "state_dir": tmp_path / name}
                  for name in ("a", "b"))  # fmt: skip
    store = Store(URL)
    with (
        serve(tmp_path, one) as first,
        serve(tmp_path, other) as second,
        first.client() as here,
        second.client() as there,
    ):

        def ask(name: str) -> None:
            head = {"x-request-id": name}
            answer = here.post("/v2/models/m/infer", json=BODY, headers=head)
            assert answer.status_code == 200

        ask("before")
        wait_until(lambda: "before" in store.rows_of(["before"]), "the prediction is kept")
        label = [{"id": "before", "label": [0, 1], "model": "m"}]
        assert there.post("/labels", json=label).json()["joined"] == 2
        assert here.post("/labels", json=label).json()["duplicate"] == 2

        frozen = children()
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        try:
            for k in range(20):
                ask(f"during-{k}")
        finally:
            for pid in frozen:
                os.kill(pid, signal.SIGCONT)
        names = [f"during-{k}" for k in range(20)]
        wait_until(lambda: len(store.rows_of(names)) == 20, "what waited is kept", timeout_s=30)
        text = here.get("/metrics").text
    store.close()

    assert 'driftgate_predictions_lost_total{reason="queue_full"} 0.0' in text
    assert "postgres" not in first.stderr
