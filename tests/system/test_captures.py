"""Captures of a real server with two workers: what is on disk is what was sent and answered."""

import contextlib
import io
import json
import os
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgpack
import numpy as np
import pytest

from gateway.capture.reading import find
from gateway.capture.record import Record, array_of
from gateway.cli import app as command_line
from gateway.protocol.stubs import inference_pb2 as pb
from registry.buckets import bucket_of
from registry.revisions import ModelState, Revisions
from tests import models
from tests.serving import Server, request, serve, tensor, wait_until

ROUTE: dict[str, Any] = {
    "unit": ["header:x-user-id", "request"],
    "rules": [
        {"name": "beta", "when": {"header": {"x-cohort": "beta"}}, "to": "challenger"},
        {"name": "vip", "when": {"field": {"tier": {"gte": 3}}}, "to": "champion"},
    ],
    "split": [{"to": "champion", "weight": "rest"}, {"to": "challenger", "weight": 40}],
    "capture": {
        "sample": 60,
        "also": ["header:x-plan", "header:x-secret"],
        "redact": ["header:x-secret"],
    },
    "allow_override": True,
}
N_USERS = 40
BODY = request(tensor("x", "FP32", [2], [7, 8]))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions that say their number; one that fails now and then."""
    root = tmp_path_factory.mktemp("registry")
    for name in ("m", "plain"):
        for number in (1, 2):
            models.put(root, name, number, models.constant(number))
    return root


@pytest.fixture(scope="module")
def server(registry: Path) -> Iterator[Server]:
    """Version 1 is the champion of m, 2 the challenger at 40 percent; plain asks for no capture."""
    settings = {"sync.poll_s": 0.1, "workers": 2}
    with serve(registry, settings, flags=("--port", "0", "--grpc-port", "0")) as found:
        with found.client() as http:
            for name in ("m", "plain"):
                changed(http.post(f"/admin/models/{name}/promote", json={"version": 1}))
                changed(http.put(f"/admin/models/{name}/aliases/challenger", json={"version": 2}))
            without = {key: part for key, part in ROUTE.items() if key != "capture"}
            changed(http.put("/admin/routes/plain", json=without))
            changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=ROUTE))
        yield found


def changed(answer: httpx.Response) -> None:
    """A change that was made."""
    assert answer.status_code == 200, answer.text


def state(registry: Path, model: str = "m") -> ModelState:
    """What is in force."""
    return Revisions(registry / ".driftgate").head().models[model]


def captures(registry: Path) -> Path:
    """The directory of captures."""
    (found,) = (registry / ".driftgate" / "run").glob("*/captures")
    return found


def said(text: str) -> dict[str, str]:
    """A decision header as fields."""
    return dict(part.split("=", 1) for part in text.split("; "))


def is_sampled(registry: Path, user: str) -> bool:
    """Whether a user is captured, as docs say it is drawn."""
    return bucket_of(bytes.fromhex(state(registry).salts["capture"]), user) < 6000


def ask(server: Server, users: list[str]) -> dict[str, dict[str, str]]:
    """Ask m as each user over five protocols; by user and request id, what was decided."""
    decisions: dict[str, dict[str, str]] = {}
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype="FP32", shape=[2]).contents.fp32_contents.extend([7, 8])
    packed, kind = msgpack.packb(BODY), {"content-type": "application/msgpack"}
    with grpc.insecure_channel(server.wait_for("ready")["grpc_url"]) as channel:
        unary = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for user in users:
            about = {"x-user-id": user, "x-plan": "gold", "x-secret": "hunter2"}
            with server.client(headers=about) as http:  # one each: both workers get some
                for answer in (
                    http.post("/v2/models/m/infer", json=BODY),
                    http.post("/v2/models/m/infer", content=packed, headers=kind),
                    http.post("/v1/models/m:predict", json={"instances": [7, 8]}),
                ):
                    assert answer.status_code == 200, answer.text
                    key = f"{user}/{answer.headers['x-request-id']}"
                    decisions[key] = said(answer.headers["x-driftgate-decision"])
                http.post("/v2/models/plain/infer", json=BODY)
                answer = http.post("/v2/models/m/infer_stream", content=packed * 2, headers=kind)
                for k, document in enumerate(msgpack.Unpacker(io.BytesIO(answer.content))):
                    key = f"{user}/{answer.headers['x-request-id']}.{k}"
                    decisions[key] = said(document["parameters"]["x-driftgate-decision"])
            about["x-request-id"] = f"grpc-{len(decisions)}"
            _, call = unary.with_call(message.SerializeToString(), metadata=[*about.items()])
            trailing = dict(call.trailing_metadata())
            decisions[f"{user}/{about['x-request-id']}"] = said(trailing["x-driftgate-decision"])
    return decisions


def test_captured_is_what_was_asked_and_answered(server: Server, registry: Path) -> None:
    """Over every protocol, by both workers: exactly the sampled users, with tensors, decision and
    odds as the client saw them; and on disk no unit, nothing redacted, nothing of another model.
    """
    users = [f"user-{k}-of-a-bank" for k in range(N_USERS)]
    wanted = [user for user in users if is_sampled(registry, user)]
    assert 10 < len(wanted) < 38
    decisions = {
        key: decision
        for key, decision in ask(server, users).items()
        if key.partition("/")[0] in wanted
    }
    with server.client(headers={"x-user-id": wanted[0]}) as http:
        beta = {"x-cohort": "beta"}
        ruled = http.post("/v2/models/m/infer", json=BODY, headers=beta)
        typed = {**BODY, "parameters": {"tier": 4, "name": "nobody asks"}}
        by_field = http.post("/v2/models/m/infer", json=typed)
        pinned = http.post("/v2/models/m/versions/2/infer", json=BODY)
        http.post("/v2/models/m/infer", json=request(tensor("x", "INT64", [1], [1])))
    n = len(decisions) + 3
    found = wait_until(lambda: all_of(registry, n), "all that is sampled is on disk", 20)

    assert len(found) == n
    for key, decision in decisions.items():
        check(found[key.partition("/")[2]], key.partition("/")[0], decision, state(registry))
    one = found[ruled.headers["x-request-id"]]
    assert (one.reason, one.version, one.odds) == ("RULE_MATCH(beta)", 2, {"challenger": 1.0})
    assert one.headers == {"x-cohort": "beta"}
    one = found[by_field.headers["x-request-id"]]
    assert (one.reason, one.parameters) == ("RULE_MATCH(vip)", {"tier": 4})
    one = found[pinned.headers["x-request-id"]]
    assert (one.reason, one.traffic, one.version) == ("PINNED", "pinned", 2)

    files = list(captures(registry).rglob("*.capture"))
    assert {path.parent.name for path in files} == {"m"}
    assert {path.stem.partition("-")[2] for path in files} == {"0", "1"}  # by both workers
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    on_disk = b"".join(path.read_bytes() for path in files)
    for hidden in (b"of-a-bank", b"hunter2", b"x-secret", b"nobody asks"):
        assert hidden not in on_disk
    with server.client() as http:
        text = http.get("/metrics").text
    assert f'driftgate_captured_total{{model="m"}} {n}.0' in text
    assert 'driftgate_degraded{what="captures"} 0.0' in text
    check_a_death(server, registry, wanted, n)


def check_a_death(server: Server, registry: Path, users: list[str], n: int) -> None:
    """A worker is killed while it captures: what it had written is whole, and another goes on."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    victim = int(children.read_text().split()[0])
    asked = ask(server, users[:3])
    os.kill(victim, signal.SIGKILL)
    server.wait_for("worker_ended")
    # Those that it had not written down yet are lost with it: at most a quarter of a second's.
    wait_until(lambda: victim not in map(int, children.read_text().split()), "it is replaced")
    again = ask(server, users[:3])
    names = {key.partition("/")[2] for key in again}
    wait_until(lambda: names <= {*(all_of(registry, 0) or ())}, "captures go on")
    reading = find("all", captures(registry), "m")
    assert n + len(again) <= len(list(reading)) <= n + len(asked) + len(again)
    assert reading.skipped == 0
    assert reading.torn <= 1


def check(record: Record, user: str, decision: dict[str, str], now: ModelState) -> None:
    """A record against what its client was told, and what docs say is kept."""
    salt = bytes.fromhex(now.salts["capture"])
    assert record.variant == decision["variant"]
    assert (record.version, record.bucket) == (int(decision["version"]), int(decision["bucket"]))
    assert (record.reason, record.unit) == ("SPLIT", "header:x-user-id")
    assert record.odds == {"champion": 0.6, "challenger": 0.4}
    assert record.p == float(decision["p"]) == record.odds[record.variant]
    assert record.digest == now.digests[decision["version"]]
    hashed = blake2b(user.encode(), digest_size=8, key=salt).hexdigest()
    assert record.units == (("header:x-user-id", record.bucket, hashed, None),)
    assert record.headers == {"x-plan": "gold"}
    assert record.looked == ("field:tier", "header:x-cohort", "header:x-plan")
    assert (record.code, record.traffic, record.sampled) == ("ok", "primary", 0.6)
    (asked,), (answered,) = record.inputs, record.outputs
    assert array_of(asked).tolist() == [7, 8]
    assert array_of(asked).dtype == np.float32
    assert array_of(answered).tolist() == [record.version] * 2
    assert (asked.name, answered.name, record.rows) == ("x", "y", 2)


def test_a_simulation_says_what_the_route_then_does(tmp_path: Path) -> None:
    """Who answers each of 120 requests by a new route, by its rules and shares: the simulation's
    counts are those of the same requests sent again once it is in force; over HTTP and by command,
    with a server and without.
    """
    for number in (1, 2, 3):
        models.put(tmp_path, "m", number, models.constant(number))
    now: dict[str, Any] = {
        "unit": ["header:x-user-id", "request"],
        "rules": ROUTE["rules"],
        "split": ROUTE["split"],
        "capture": {"sample": 100},
    }
    new: dict[str, Any] = {
        "unit": ["header:x-user-id", "request"],
        "rules": [{"name": "vip", "when": {"field": {"tier": {"gte": 2}}}, "to": 3}],
        "split": [{"to": "champion", "weight": "rest"}, {"to": "challenger", "weight": 75}],
        "capture": {"sample": 100},
    }
    (tmp_path / "new.yaml").write_text(json.dumps({"m": new}))
    with serve(tmp_path, {"sync.poll_s": 0.1}) as server, server.client() as http:
        changed(http.post("/admin/models/m/promote", json={"version": 1}))
        changed(http.put("/admin/models/m/aliases/challenger", json={"version": 2}))
        changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=now))
        before = send(http)
        http.post("/v2/models/m/versions/3/infer", json=BODY)
        wait_until(lambda: all_of(tmp_path, 121), "all are captured")
        answer = http.post("/admin/routes/m/simulate", json={"route": new, "capture": "last-1h"})
        assert answer.status_code == 200, answer.text
        said_of = answer.json()
        words = ["route", "simulate", "-f", str(tmp_path / "new.yaml"), "-r", str(tmp_path)]
        by_server, alone = (
            command(*words, *more) for more in (("--server", server.url), ("--capture", "all"))
        )
        assert by_server == alone == {"m": said_of}
        changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=new))
        after = send(http)

        assert (said_of["requests"], said_of["pinned"]) == (120, 1)
        for side, decisions in (("before", before), ("after", after)):
            counted = Counter((d["variant"], int(d["version"])) for d in decisions)
            simulated = {
                (entry["variant"], entry["version"]): entry[side] for entry in said_of["variants"]
            }
            assert {key: n for key, n in simulated.items() if n} == counted
            rules = Counter(d["reason"] for d in decisions)
            for entry in said_of["rules"]:
                assert entry[side] == rules[f"RULE_MATCH({entry['name']})"]
            (unit,) = said_of["units"]
            assert (unit["name"], unit[side]) == ("header:x-user-id", rules["SPLIT"])
        pairs = list(zip(before, after, strict=True))
        moved = [k for k, (one, other) in enumerate(pairs) if one["version"] != other["version"]]
        assert said_of["moved"]["requests"] == len(moved) > 10
        assert said_of["moved"]["units"] == len({k % 40 for k in moved})
        assert said_of["moved"]["of_units"] == 40
        assert (said_of["stand_ins"], said_of["not_captured"]) == (0, {})

        vip = json.dumps({**BODY, "parameters": {"tier": 3}})
        (tmp_path / "row.json").write_text(vip)
        about = {"x-user-id": "u7"}
        words = ["route", "explain", "m", "--header", "X-User-Id=u7", "-r", str(tmp_path)]
        for data, body in (([], BODY), (["--data", str(tmp_path / "row.json")], json.loads(vip))):
            told = http.post("/v2/models/m/infer", json=body, headers=about)
            wanted = {"decision": said(told.headers["x-driftgate-decision"])}
            assert command(*words, *data) == command(*words, *data, "--server", server.url)
            assert command(*words, *data) == wanted

        wait_until(lambda: all_of(tmp_path, 243), "all are captured")
        check_replays(tmp_path, [*before, *after])

        unseen = {**now, "unit": ["header:x-account", "request"]}
        answer = http.post("/admin/routes/m/simulate", json={"route": unseen, "capture": "all"})
        n_split = sum(d["reason"] == "SPLIT" for d in before)
        assert answer.json()["not_captured"]["header:x-account"] >= n_split
        check_refusals(http, new)


def check_refusals(http: httpx.Client, new: dict[str, Any]) -> None:
    """What cannot be simulated is refused with a sentence."""
    for wrong, status in (
        ({"route": new, "capture": "../../m"}, 404),
        ({"route": new, "capture": 7}, 400),
        ({"route": {**new, "split": [{"to": "champion", "weight": 7}]}}, 400),
        ({"route": {**new, "split": [{"to": 9, "weight": 100}]}}, 400),
        ({"routes": new}, 400),
        ({}, 400),
    ):
        answer = http.post("/admin/routes/m/simulate", json=wrong)
        assert (answer.status_code, bool(answer.json()["error"])) == (status, True), answer.text
    assert http.post("/admin/routes/n/simulate", json={"route": new}).status_code == 404


def check_replays(root: Path, decisions: list[dict[str, str]]) -> None:
    """The same capture through versions 1 and 2, whose answers differ by one, with no server."""
    words = ["replay", "m", "-r", str(root), "--target"]
    same = command(*words, "m@1")
    assert (same["rows"]["differ"], same["verdict"]) == (0, "inconclusive")  # 40 units are few
    # What version 1 has answered is taken as it was captured.
    assert same["ran"]["against"]["captured"] >= sum(d["version"] == "1" for d in decisions)
    other = command(*words, "m@challenger", "--against", "1", code=5)
    n_rows = 2 * same["replayed"]
    assert other["rows"] == {"compared": n_rows, "differ": n_rows}
    assert same["rows"] == {"compared": n_rows, "differ": 0}
    assert (other["outputs"]["y"]["largest"], other["differences"]["y"]["mean"]) == (1.0, 1.0)
    assert "disagreement" in {guard["guard"] for guard in other["guards"] if guard["breach"]}
    assert command(*words, "m@2", "--against", "1", "--atol", "1")["rows"]["differ"] == 0

    (listed,) = command("capture", "list", "-r", str(root))["captures"]
    assert (listed["model"], listed["requests"]) == ("m", same["replayed"])
    assert listed["bytes"] == sum(path.stat().st_size for path in captures(root).rglob("*.capture"))
    one = command("capture", "print", "all", "--limit", "1", "-r", str(root), is_json=False)
    assert (one["inputs"], one["outputs"]) == ({"x": [7.0, 7.0 + 1]}, {"y": [one["version"]] * 2})
    assert one["units"][0]["kind"] == "header:x-user-id"


def command(*words: str, code: int = 0, is_json: bool = True) -> Any:
    """What a command says with --json, run in this process: starting one takes a second."""
    said_to = io.StringIO()
    with contextlib.redirect_stdout(said_to):
        ended = command_line([*words, *["--json"] * is_json], standalone_mode=False)
    assert (ended or 0) == code
    return json.loads(said_to.getvalue())


def send(http: httpx.Client) -> list[dict[str, str]]:
    """120 requests of 40 users, every third in a cohort, some with a tier; what was decided."""
    decisions = []
    for k in range(120):
        about = {"x-user-id": f"u{k % 40}"} | ({"x-cohort": "beta"} if k % 3 == 0 else {})
        body = {**BODY, "parameters": {"tier": k % 5}} if k % 7 == 0 else BODY
        answer = http.post("/v2/models/m/infer", json=body, headers=about)
        assert answer.status_code == 200, answer.text
        decisions.append(said(answer.headers["x-driftgate-decision"]))
    return decisions


def test_failures_and_hops_are_captured_as_what_they_were(tmp_path: Path) -> None:
    """The variant that failed stays the one assigned; who answered is said, or the error's code."""
    models.put(tmp_path, "m", 1, models.identity(shape=("n", 1)))
    models.put(tmp_path, "m", 2, models.four_rows_at_most())
    route = {
        "unit": ["header:x-user-id"],
        "split": [{"to": 2, "weight": 100}],
        "fallback": {"to": [1]},
        "capture": {"sample": 100, "units": True},
    }
    few, five = (request(tensor("x", "FP32", [n, 1], list(range(n)))) for n in (2, 5))
    with serve(tmp_path, {"sync.poll_s": 0.1}) as server, server.client() as http:
        changed(http.post("/admin/models/m/promote", json={"version": 1}))
        changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=route))
        ids = [
            http.post("/v2/models/m/infer", json=body, headers={"x-user-id": "ana"}).headers[
                "x-request-id"
            ]
            for body in (few, five)
        ]
        del route["fallback"]
        changed(http.put("/admin/routes/m?wait=applied&timeout=10", json=route))
        answer = http.post("/v2/models/m/infer", json=five)
        assert answer.status_code == 500
        ids.append(answer.headers["x-request-id"])
    found = all_of(tmp_path, 3)

    assert found is not None
    plain, hop, failed = (found[name] for name in ids)
    assert (plain.code, plain.version, plain.served) == ("ok", 2, None)
    assert (hop.code, hop.variant, hop.version, hop.served) == ("ok", "2", 2, 1)
    assert array_of(hop.outputs[0]).ravel().tolist() == [0, 1, 2, 3, 4]
    assert (failed.code, failed.version, failed.outputs) == (answer.json()["code"], 2, None)
    assert array_of(failed.inputs[0]).ravel().tolist() == [0, 1, 2, 3, 4]
    assert plain.units[0].value == b"ana"
    assert failed.units[0].kind == "request"


def all_of(registry: Path, n: int) -> dict[str, Record] | None:
    """The records of m by id, once there are so many."""
    if not [*(registry / ".driftgate" / "run").glob("*/captures/m")]:
        return None
    found = {record.id: record for record in find("all", captures(registry), "m")}
    return found if len(found) >= n else None
