"""Traffic over a real server: split, sticky, and said on every answer of every protocol."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgpack
import pytest

from gateway.protocol.stubs import inference_pb2 as pb
from registry.buckets import bucket_of
from registry.revisions import Revisions
from tests import models
from tests.serving import Server, request, serve, tensor, wait_until

ONE = request(tensor("x", "FP32", [1], [0]))
ROUTE: dict[str, Any] = {
    "unit": ["header:x-user-id", "field:customer", "request"],
    "rules": [
        {"name": "beta", "when": {"header": {"x-cohort": "beta"}}, "to": "challenger"},
        {"name": "big", "when": {"rows": {"gte": 100}}, "to": 1},
    ],
    "split": [{"to": "champion", "weight": "rest"}, {"to": "challenger", "weight": 40}],
    "allow_override": True,
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions that say their number, one of which fails."""
    root = tmp_path_factory.mktemp("registry")
    for name in ("m", "plain"):
        for number in (1, 2):
            models.put(root, name, number, models.constant(number))
    return root


@pytest.fixture(scope="module")
def server(registry: Path) -> Iterator[Server]:
    """Version 1 is the champion of m, 2 the challenger at 40 percent; plain has no route."""
    with serve(registry, {"sync.poll_s": 0.1}, flags=("--port", "0", "--grpc-port", "0")) as found:
        with found.client() as http:
            changed(http.post("/admin/models/m/promote", json={"version": 1}))
            changed(http.put("/admin/models/m/aliases/challenger", json={"version": 2}))
            changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=ROUTE))
        yield found


def changed(answer: httpx.Response) -> None:
    """A change that was made."""
    assert answer.status_code == 200, answer.text


def said(text: str) -> dict[str, str]:
    """A decision header as fields."""
    return dict(part.split("=", 1) for part in text.split("; "))


def test_a_unit_gets_its_variant_over_every_protocol(server: Server, registry: Path) -> None:
    """The same bucket, version and odds over JSON, binary, MessagePack, v1, gRPC and streams."""
    state = Revisions(registry / ".driftgate").head().models["m"]
    salt = bytes.fromhex(state.salts["split"])
    packed = msgpack.packb({"inputs": [{**ONE["inputs"][0]}]})
    channel = grpc.insecure_channel(server.wait_for("ready")["grpc_url"])
    unary = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype="FP32", shape=[1]).contents.fp32_contents.append(0)
    seen = set()
    with channel, server.client() as http:
        for k in range(40):  # All with the champion: once in 10^9 salts.
            user = {"x-user-id": f"u{k}"}
            answer = http.post("/v2/models/m/infer", json=ONE, headers=user)
            decision = said(answer.headers["x-driftgate-decision"])
            variant = decision["variant"]
            seen.add(variant)
            assert decision == {
                "rev": decision["rev"],
                "variant": variant,
                "version": {"champion": "1", "challenger": "2"}[variant],
                "reason": "SPLIT",
                "bucket": str(bucket_of(salt, f"u{k}")),
                "p": {"champion": "0.6", "challenger": "0.4"}[variant],
                "unit": "header:x-user-id",
            }
            assert answer.json()["model_version"] == decision["version"]
            assert answer.headers["x-request-id"]
            line = answer.headers["x-driftgate-decision"]

            kind = {**user, "content-type": "application/msgpack"}
            answer = http.post("/v2/models/m/infer", content=packed, headers=kind)
            assert answer.headers["x-driftgate-decision"] == line
            answer = http.post("/v2/models/m/infer_stream", content=packed * 2, headers=kind)
            for document in msgpack.Unpacker(io_of(answer.content)):
                assert document["parameters"]["x-driftgate-decision"] == line
            answer = http.post("/v1/models/m:predict", json={"instances": [0]}, headers=user)
            assert answer.headers["x-driftgate-decision"] == line

            metadata = (("x-user-id", f"u{k}"),)
            reply, call = unary.with_call(message.SerializeToString(), metadata=metadata)
            assert dict(call.trailing_metadata())["x-driftgate-decision"] == line
            assert pb.ModelInferResponse.FromString(reply).model_version == decision["version"]
            (reply,) = stream(iter([message.SerializeToString()]), metadata=metadata)
            found = pb.ModelStreamInferResponse.FromString(reply).infer_response
            assert found.parameters["x-driftgate-decision"].string_param == line
            assert found.model_version == decision["version"]
        by_field = http.post("/v2/models/m/infer", json={**ONE, "parameters": {"customer": 42}})
        decision = said(by_field.headers["x-driftgate-decision"])
        assert (decision["unit"], decision["bucket"]) == (
            "field:customer", str(bucket_of(salt, "42")),
        )  # fmt: skip
    assert seen == {"champion", "challenger"}


def io_of(content: bytes) -> Any:
    """A file of these bytes."""
    import io

    return io.BytesIO(content)


def test_who_was_picked_is_said_on_every_answer_and_counted_by_role(server: Server) -> None:
    """Rules, calls by number, labels, overrides, errors after the pick, models without a route."""
    with server.client() as http:

        def decided(path: str, body: Any = ONE, **headers: str) -> tuple[int, dict[str, str]]:
            answer = http.post(path, json=body, headers=headers)
            return answer.status_code, said(answer.headers.get("x-driftgate-decision", "x=x"))

        infer = "/v2/models/m/infer"
        assert decided(infer, **{"x-cohort": "beta"})[1]["reason"] == "RULE_MATCH(beta)"
        many = request(tensor("x", "FP32", [100], [0] * 100))
        assert decided(infer, many)[1]["reason"] == "RULE_MATCH(big)"
        status, decision = decided("/v2/models/m/versions/2/infer")
        assert (decision["reason"], decision["version"]) == ("PINNED", "2")
        status, decision = decided("/v1/models/m/labels/challenger:predict", {"instances": [0]})
        assert (status, decision["version"]) == (200, "2")
        assert decided("/v1/models/m/labels/stable:predict", {"instances": [0]})[0] == 404
        status, decision = decided(infer, **{"x-driftgate-version": "challenger"})
        assert (decision["reason"], decision["version"]) == ("TARGET_OVERRIDE", "2")
        bad = request(tensor("wrong", "FP32", [1], [0]))
        status, decision = decided("/v2/models/plain/infer", bad)
        assert (status, decision["reason"], decision["version"]) == (400, "DEFAULT", "2")
        refused = http.post(
            "/v2/models/plain/infer", json=ONE, headers={"x-driftgate-version": "1"}
        )
        assert (refused.status_code, refused.json()["code"]) == (403, "override_not_allowed")
        counts, text = requests_of(http), http.get("/metrics").text
    assert counts["2", "challenger", "primary", "ok"]
    assert counts["2", "2", "pinned", "ok"]
    assert counts["2", "challenger", "pinned", "ok"]
    assert "driftgate_unit_fallback_total" in text


def test_explain_says_what_a_prediction_would_say_and_runs_nothing(server: Server) -> None:
    """The same decision for the same headers and body; no request is counted."""
    with server.client() as http:
        before = requests_of(http)
        for user in ("a", "b", "c"):
            body = {"headers": {"X-User-Id": user}, "request": ONE}
            explained = http.post("/admin/routes/m/explain", json=body)
            assert explained.status_code == 200, explained.text
            assert requests_of(http) == before
            answer = http.post("/v2/models/m/infer", json=ONE, headers={"x-user-id": user})
            before = requests_of(http)
            line = answer.headers["x-driftgate-decision"]
            assert explained.json() == {"decision": said(line), "is_open": True}
        assert http.post("/admin/routes/m/explain", json={"header": {}}).status_code == 400


def test_a_heavier_weight_moves_units_one_way_only(server: Server) -> None:
    """From 40 to 60 percent: nobody who had the challenger is taken back."""

    def with_challenger(http: httpx.Client) -> set[int]:
        return {
            k
            for k in range(150)
            if http.post("/v2/models/m/infer", json=ONE, headers={"x-user-id": f"w{k}"}).json()[
                "model_version"
            ]
            == "2"
        }

    with server.client() as http:
        before = with_challenger(http)
        split = [{"to": "champion", "weight": 40}, {"to": "challenger", "weight": "rest"}]
        body = json.loads(json.dumps({**ROUTE, "split": split}))
        changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=body))
        after = with_challenger(http)
        changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=ROUTE))

        assert before < after
        assert with_challenger(http) == before


def test_one_other_answers_when_the_variant_fails_and_the_blame_stays(tmp_path: Path) -> None:
    """A hop within one time; the failure counts for the assigned variant; limits come first."""
    models.put(tmp_path, "m", 1, models.identity("FP32", ("n", 1)))
    models.put(tmp_path, "m", 2, models.four_rows_at_most())
    route = {
        "split": [{"to": 2, "weight": 100}],
        "fallback": {"to": [2, "champion"]},
        "limits": {"rows_max": 8, "inflight_max": 64},
        "timeout_s": 5,
    }
    few, five, many = (request(tensor("x", "FP32", [n, 1], list(range(n)))) for n in (2, 5, 9))
    with serve(tmp_path, {"sync.poll_s": 0.1}) as server, server.client() as http:
        changed(http.post("/admin/models/m/promote", json={"version": 1}))
        changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=route))

        answer = http.post("/v2/models/m/infer", json=few)
        assert said(answer.headers["x-driftgate-decision"])["version"] == "2"
        answer = http.post("/v2/models/m/infer", json=five)
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == [0, 1, 2, 3, 4]
        decision = said(answer.headers["x-driftgate-decision"])
        assert (decision["reason"], decision["version"]) == ("FALLBACK(2)", "1")
        pinned = http.post("/v2/models/m/versions/2/infer", json=five)
        assert pinned.status_code == 500
        refused = http.post("/v2/models/m/infer", json=many)
        assert (refused.status_code, refused.json()["code"]) == (413, "too_large")
        counts = requests_of(http)
    assert counts["2", "2", "primary", "model_failed"] == 1
    assert counts["1", "champion", "fallback", "ok"] == 1
    assert counts["2", "2", "pinned", "model_failed"] == 1


def test_a_route_batches_and_queues_over_the_settings_and_nothing_is_opened_again(
    tmp_path: Path,
) -> None:
    """Rows of a run, as the histogram counts them; what is larger than the queue is refused."""
    models.put(tmp_path, "m", 1, models.identity("FP32", ("n", 1)))
    ten = request(tensor("x", "FP32", [10, 1], list(range(10))))
    with serve(tmp_path, {"sync.poll_s": 0.1}) as server, server.client() as http:

        def runs() -> tuple[float, float]:
            """Runs so far, and the rows in them."""
            text = http.get("/metrics").text
            return tuple(
                float(
                    re.findall(rf"^driftgate_batch_rows_{part}{{.*}} (\S+)$", text, re.MULTILINE)[0]
                )
                for part in ("count", "sum")
            )  # type: ignore[return-value]  # there are two

        def asked(status: int) -> tuple[float, float]:
            before = runs()
            answer = http.post("/v2/models/m/infer", json=ten)
            assert answer.status_code == status, answer.text
            after = runs()
            return after[0] - before[0], after[1] - before[1]

        def routed(**route: Any) -> None:
            changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=route))

        assert asked(200) == (1, 10)
        routed(batch={"rows_max": 4})
        assert asked(200) == (3, 10)
        (about,) = http.get("/admin/models/m").json()["versions"]
        assert about["batched"] == "up to 4 rows"
        config = http.get("/v2/models/m/config").json()
        assert config["dynamic_batching"]["preferred_batch_size"] == [4]
        routed(limits={"queue_rows_max": 9}, batch={"rows_max": 1})
        assert asked(413) == (0, 0)
        assert http.get("/v2/models/m/config").json()["max_batch_size"] == 9
        routed(batch={"rows_max": 1})
        assert asked(200) == (1, 10)
        changed(http.delete("/admin/routes/m?wait=applied&timeout=10"))
        assert asked(200) == (1, 10)
        (about,) = http.get("/admin/models/m").json()["versions"]
        assert about["batched"] == "up to 64 rows"

        refused = http.put("/admin/routes/m", json={"fallback": {"on": ["breaker"], "to": [1]}})
        assert (refused.status_code, refused.json()["code"]) == (400, "change_refused")
        assert refused.json()["error"].startswith("m.fallback.on: breaker: there is none")
    assert len(server.events("version_opened")) == 1


def requests_of(http: httpx.Client) -> dict[tuple[str, str, str, str], float]:
    """Requests by version, variant, traffic and code."""
    found = {}
    for labels, value in re.findall(
        r"^driftgate_requests_total\{(.*)\} (\S+)$", http.get("/metrics").text, flags=re.MULTILINE
    ):
        given = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if given["model"] == "m":
            key = given["version"], given["variant"], given["traffic"], given["code"]
            found[key] = float(value)
    return found


def test_a_candidate_that_fails_is_taken_out_by_the_traffic_it_gets(tmp_path: Path) -> None:
    """What the split assigned is counted for the rollout; nobody has to look at it."""
    models.put(tmp_path, "m", 1, models.identity("FP32", ("n", 1)))
    models.put(tmp_path, "m", 2, models.four_rows_at_most())
    five = request(tensor("x", "FP32", [5, 1], list(range(5))))
    plan = {"steps": [{"weight": 10, "for_s": 0, "units_min": 10_000}]}
    with serve(tmp_path, {"sync.poll_s": 0.1}) as server, server.client() as http:
        changed(http.post("/admin/models/m/promote?wait=applied&timeout=10", json={"version": 1}))
        body = {"model": "m", "version": 2, "plan": plan}
        started = http.post("/admin/rollouts", json=body)
        assert started.status_code == 200, started.text
        (listed,) = http.get("/admin/rollouts").json()["rollouts"]
        at = f"/admin/rollouts/{listed['id']}"

        def is_aborted() -> bool:
            for _ in range(50):
                http.post("/v2/models/m/infer", json=five)
            return bool(http.get(at).json()["phase"] == "aborted")

        wait_until(is_aborted, "an aborted rollout", timeout_s=40)
        assert http.get("/admin/state").json()["models"]["m"]["aliases"]["champion"] == 1
