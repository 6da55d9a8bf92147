"""Labels over HTTP and by command: every format, every verdict, and a disk that says no."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest

from gateway.labels.rows import Kept, pack
from gateway.labels.store import Store
from tests import models
from tests.serving import Server, driftgate, request, serve, tensor, wait_until

NOTHING = dict.fromkeys(
    ("joined", "duplicate", "unknown", "late", "not_sampled", "conflict", "invalid"), 0
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("labels")
    models.put(registry, "m", 1, models.identity())
    models.put(registry, "words", 1, models.identity("BYTES"))
    models.put(registry, "judged", 1, models.identity())
    settings = {"run_dir": registry / "run", "labels.sample": 100}
    with serve(registry, settings) as running:
        running.store = Store(f"sqlite:///{registry / 'run' / 'labels.sqlite3'}")
        yield running
        running.store.close()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def keep(server: Server, request: str, rows: int = 1, model: str = "m") -> None:
    """A prediction, written by another process: as by another worker of the host."""
    server.store.keep([
        Kept(request, k, model, 1, "primary", "champion", time.time(), 1.0, 1.0, None,
             pack({"y": 0.5}), None)
        for k in range(rows)
    ])  # fmt: skip


def send(client: httpx.Client, labels: Any, **query: str) -> dict[str, Any]:
    answer = client.post("/labels", json=labels, params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def counts(answer: dict[str, Any]) -> dict[str, int]:
    return {name: n for name, n in answer.items() if name in NOTHING and n}


def test_labels_join_by_prediction_id_in_every_format(server: Server, client: httpx.Client) -> None:
    """JSON, MessagePack and CSV; the second time each is a duplicate."""
    label = {"id": "j/0", "label": 1, "model": "m"}
    for name, kind, body in [
        ("j", "application/json", json.dumps([label])),
        ("p", "application/msgpack", msgpack.packb({"labels": [{**label, "id": "p/0"}]})),
        ("c", "text/csv", "id,label,model\nc/0,1,m\n"),
    ]:
        keep(server, name)
        for verdict in ("joined", "duplicate"):
            answer = client.post("/labels", content=body, headers={"content-type": kind})
            assert counts(answer.json()) == {verdict: 1}, (kind, answer.text)


def test_predictions_are_kept_under_the_id_that_was_answered(
    server: Server, client: httpx.Client
) -> None:
    """Over HTTP, in a stream and over gRPC; by the version that answers, and by number."""
    body = request(tensor("x", "FP32", [3], [0.25, 0.5, 1.0]))
    made = client.post("/v2/models/m/infer", json=body).headers["x-request-id"]
    given = client.post(
        "/v2/models/m/versions/1/infer", json=body, headers={"x-request-id": "own/4711"}
    )
    assert given.headers["x-request-id"] == "own/4711"
    document = msgpack.packb({
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0.125]}]
    })  # fmt: skip
    streamed = client.post(
        "/v2/models/m/infer_stream",
        content=document * 2,
        headers={"content-type": "application/msgpack", "x-request-id": "stream"},
    )
    assert streamed.status_code == 200
    made_by_grpc = ask_by_grpc(server.wait_for("ready")["grpc_url"], "by-grpc")

    answer = send(client, [
        {"id": made, "label": [0, 1, 1]},
        {"id": "own/4711/2", "label": 1},
        {"id": "stream.1", "label": 0, "model": "m"},
        {"id": "by-grpc/0", "label": 1, "model": "m"},
        {"id": made_by_grpc, "label": 1, "model": "m"},
        {"id": "by-grpc.1/0", "label": 1, "model": "m"},
    ])  # fmt: skip

    assert counts(answer) == {"joined": 8}
    found = {(row.request, row.row): row for row in server.store.joined("m")}
    assert [found[made, k].outputs for k in range(3)] == [{"y": 0.25}, {"y": 0.5}, {"y": 1.0}]
    assert (found[made, 0].variant, found[made, 0].traffic) == ("champion", "primary")
    assert (found["own/4711", 2].variant, found["own/4711", 2].traffic) == ("1", "pinned")
    assert found["stream.1", 0].outputs == {"y": 0.125}
    assert found["by-grpc", 0].outputs == {"y": 0.5}


def ask_by_grpc(address: str, name: str) -> str:
    """By this id, without one, and in a stream of two; the id that was made."""
    import grpc

    from gateway.protocol.stubs import inference_pb2 as pb

    message = pb.ModelInferRequest(model_name="m")
    given = message.inputs.add(name="x", datatype="FP32", shape=[1])
    given.contents.fp32_contents.append(0.5)
    with grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        sent, metadata = message.SerializeToString(), (("x-request-id", name),)
        infer(sent, metadata=metadata, timeout=20)
        _, call = infer.with_call(sent, timeout=20)
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        assert len(list(stream(iter([sent, sent]), metadata=metadata, timeout=20))) == 2
        return str(dict(call.trailing_metadata())["x-request-id"])


def test_every_verdict_is_told_with_its_reason(server: Server, client: httpx.Client) -> None:
    """One bad label never refuses the others."""
    keep(server, "v", rows=3)
    keep(server, "w", model="words")
    answer = send(client, [
        {"id": "v/0", "label": 1, "model": "m"},
        {"id": "v/0", "label": 0, "model": "m"},
        {"id": "v/1", "label": True},
        {"id": "v", "label": [1, 1]},
        {"id": "w", "label": "a cat"},
        {"id": "w", "label": 3},
        {"id": "nobody/0", "label": 1, "model": "m"},
        {"id": "nobody", "label": 1},
        {"id": "v/2", "label": "much", "model": "m"},
        {"id": "v/2", "label": 1, "model": "mm"},
        {"id": 7, "label": 1},
        {"id": "no label"},
    ])  # fmt: skip

    assert counts(answer) == {"joined": 3, "conflict": 1, "unknown": 2, "invalid": 6}
    assert {problem["at"]: problem["is"] for problem in answer["problems"]} == {
        1: "conflict", 3: "invalid", 5: "invalid", 6: "unknown", 7: "unknown", 8: "invalid",
        9: "invalid", 10: "invalid", 11: "invalid",
    }  # fmt: skip
    assert [found.label for found in server.store.joined("words")] == ["a cat"]
    metrics = client.get("/metrics").text
    assert 'driftgate_labels_total{is="conflict"} 1.0' in metrics
    assert 'driftgate_degraded{what="labels"} 0.0' in metrics


def test_performance_is_told_by_labels_and_without(client: httpx.Client) -> None:
    """Scores that mean what they say: realised accuracy near the estimate; by day; by command."""
    random = np.random.default_rng(3)
    scores = random.uniform(0.01, 0.99, 400).round(4)
    truth = (random.uniform(size=400) < scores).astype(int).tolist()
    body = request(tensor("x", "FP32", [400], scores.tolist()))
    head = {"x-request-id": "judged"}
    assert client.post("/v2/models/judged/infer", json=body, headers=head).status_code == 200
    before = client.get("/drift/judged/performance").json()
    assert counts(send(client, [{"id": "judged", "label": truth}])) == {"joined": 400}
    after = client.get("/drift/judged/performance", params={"days": 1}).json()

    assert (before["n_labelled"], before["realised"]) == (0, None)
    assert (after["n_predictions"], after["n_labelled"], after["task"]) == (400, 400, "binary")
    realised, estimated = after["realised"]["accuracy"], after["estimated"]["accuracy"]
    right = np.mean((scores >= 0.5) == truth)
    assert realised["value"] == pytest.approx(right, abs=1e-6)
    assert realised["low"] < estimated["value"] < realised["high"]
    assert "blind to concept drift" in after["estimated_means"]
    assert [day["n"] for day in after["cohorts"]] == [400]
    shown = driftgate("drift", "judged", "--server", str(client.base_url)).stdout
    assert "400 of 400 predictions have labels" in shown
    for path, status in (("/drift/judged/performance?days=0", 400), ("/drift/no/performance", 404)):
        assert client.get(path).status_code == status
    outcomes = client.get("/drift/judged/outcomes").json()
    assert outcomes["variants"]["champion"]["labels"] == 400


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "bad_request"),
        (b"\xc1", "application/msgpack", 400, "bad_request"),
        (b"a,b\n1,2\n", "text/csv", 400, "bad_request"),
        (b"[]", "multipart/form-data", 415, "unsupported_media_type"),
        (b" " * 13_000_000, "application/json", 413, "too_large"),
    ],
)
def test_a_wrong_body_is_refused_whole(
    client: httpx.Client, body: bytes, kind: str, status: int, code: str
) -> None:
    """With a sentence and a code, as everywhere."""
    answer = client.post("/labels", content=body, headers={"content-type": kind})

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_file_of_labels_is_sent_by_command(server: Server, tmp_path: Path) -> None:
    """Twelve thousand in several requests; what is wrong is told by its place in the file."""
    for k in range(120):
        keep(server, f"f{k}", rows=100)
    lines = [f"f{k // 100}/{k % 100},{k % 2}" for k in range(12_000)]
    lines[7_000] = "f70/0,perhaps"
    table = tmp_path / "labels.csv"
    table.write_text("id,label\n" + "\n".join(lines) + "\n")
    words = ("labels", "import", str(table), "--model", "m", "--server", server.url)

    first, again = driftgate(*words), driftgate(*words, "--json")

    assert first.returncode == 2
    assert "11999 joined, 1 invalid" in first.stdout
    assert "label 7001 (f70/0): invalid" in first.stdout
    assert json.loads(again.stdout)["duplicate"] == 11_999
    lines = tmp_path / "labels.jsonl"
    lines.write_text('{"id": "w2", "label": "dog", "model": "words"}\n\n')
    sent = driftgate("labels", "import", str(lines), "--server", server.url)
    assert sent.returncode == 0
    assert sent.stdout.startswith("1 unknown\nlabel 1 (w2): unknown: no prediction of this id")


def test_without_a_place_for_labels_predictions_go_on_and_it_is_shown(tmp_path: Path) -> None:
    """A file where the directory should be: 507 for labels, 200 for predictions, a gauge at 1."""
    models.put(tmp_path / "models", "m", 1, models.identity())
    (tmp_path / "file").touch()
    settings = {
        "labels.sample": 100,
        "labels.url": f"sqlite:///{tmp_path}/file/labels.sqlite3",
    }
    with serve(tmp_path / "models", settings) as server, server.client() as client:
        label = client.post("/labels", json=[{"id": "a/0", "label": 1, "model": "m"}])
        body = request(tensor("x", "FP32", [1], [1.0]))
        prediction = client.post("/v2/models/m/infer", json=body)

    assert (label.status_code, label.json()["code"]) == (507, "storage_unavailable")
    assert str(tmp_path) not in label.text
    assert prediction.status_code == 200


def test_where_no_predictions_are_kept_labels_are_refused(tmp_path: Path) -> None:
    """With the setting that would change that."""
    models.put(tmp_path, "m", 1, models.identity())
    with serve(tmp_path) as server, server.client() as client:
        answer = client.post("/labels", json=[{"id": "a", "label": 1}])

    assert (answer.status_code, answer.json()["code"]) == (409, "labels_off")
    assert "--labels-sample" in answer.json()["error"]
    assert not list(tmp_path.rglob("labels*"))


def test_workers_of_a_host_share_what_is_kept(tmp_path: Path) -> None:
    """Whichever worker answers and whichever takes the labels: all meet within seconds."""
    models.put(tmp_path / "models", "m", 1, models.identity())
    settings = {"workers": 2, "labels.sample": 100, "run_dir": tmp_path / "run"}
    body = request(tensor("x", "FP32", [1], [0.5]))
    with serve(tmp_path / "models", settings) as server:
        for k in range(24):
            with server.client(headers={"x-request-id": f"w{k}"}) as client:  # a connection each
                assert client.post("/v2/models/m/infer", json=body).status_code == 200
        for k in range(24):
            with server.client() as client:
                answer = client.post("/labels", json=[{"id": f"w{k}/0", "label": k % 2}]).json()
                assert set(counts(answer)) <= {"joined", "unknown"}
        store = Store(f"sqlite:///{tmp_path / 'run' / 'labels.sqlite3'}")
        wait_until(lambda: len(store.joined("m")) == 24, "all labels have met their predictions")
        store.close()


def test_a_split_is_judged_by_what_its_labels_say(tmp_path: Path) -> None:
    """Sticky units, odds of the split, labels by id: the variant with better outcomes is seen."""
    registry = tmp_path / "models"
    for number in (1, 2):
        models.put(registry, "m", number, models.constant(number))
    route = {
        "unit": ["header:x-user-id", "request"],
        "split": [{"to": "champion", "weight": "rest"}, {"to": "challenger", "weight": 40}],
    }
    body = request(tensor("x", "FP32", [1], [0.0]))
    with serve(registry, {"labels.sample": 100}) as server, server.client() as client:
        steps = (
            ("POST", "/admin/models/m/promote", {"version": 1}),
            ("PUT", "/admin/models/m/aliases/challenger", {"version": 2}),
            ("PUT", "/admin/routes/m?wait=applied&timeout=10", route),
        )
        for method, path, change in steps:
            assert client.request(method, path, json=change).status_code == 200
        labels = []
        for k in range(1200):
            head = {"x-user-id": f"user-{k // 2}", "x-request-id": f"s{k}"}
            answer = client.post("/v2/models/m/infer", json=body, headers=head).json()
            is_second = answer["model_version"] == "2"
            labels.append({"id": f"s{k}/0", "label": int(k % 10 < (6 if is_second else 2))})
        assert counts(send(client, labels)) == {"joined": 1200}
        found = client.get("/drift/m/outcomes").json()

    units = {name: about["units"] for name, about in found["variants"].items()}
    assert sum(units.values()) == 600
    assert abs(units["challenger"] - 240) < 5 * (600 * 0.4 * 0.6) ** 0.5
    difference = found["differences"]["challenger"]
    assert difference["verdict"] == "higher"
    assert difference["low"] < 0.4 < difference["high"]
