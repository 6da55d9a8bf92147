"""The model repository: what is loaded or unloaded by one worker is so on all of them."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from gateway.protocol.stubs import inference_pb2 as pb
from tests import models
from tests.serving import Server, driftgate, request, serve, tensor, wait_until

ONE = request(tensor("x", "FP32", [1], [0]))
TWO = ("--port", "0", "--workers", "2")
CONNECTIONS = 6
"""New connections go to the worker that holds fewest: so many reach both."""


def answers(server: Server, path: str = "m") -> set[object]:
    """What new connections, held open together, are told: both workers are asked."""
    clients = [server.client() for _ in range(CONNECTIONS)]
    found: set[object] = set()
    for client in clients:
        told = client.post(f"/v2/models/{path}/infer", json=ONE).json()
        found.add(told["outputs"][0]["data"][0] if "outputs" in told else told["code"])
    for client in clients:
        client.close()
    return found


def told(server: Server, what: str, **parameters: Any) -> httpx.Response:
    """A load or an unload over HTTP, by a new connection."""
    with server.client(timeout=60) as client:
        path = f"/v2/repository/models/{what}"
        return client.post(path, json={"parameters": parameters})


def asked(server: Server, name: str, message: Any) -> Any:
    """The same over gRPC."""
    address = server.wait_for("ready", "no_model_opened")["grpc_url"]
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call: Callable[..., Any] = channel.unary_unary(
            f"/inference.GRPCInferenceService/{name}",
            request_serializer=lambda sent: sent.SerializeToString(),
            response_deserializer=getattr(pb, f"{name}Response").FromString,
        )
        return call(message, timeout=60)


def state(server: Server) -> dict[str, Any]:
    with server.client() as client:
        found: dict[str, Any] = client.get("/admin/state").json()
    return found


def open_versions(server: Server) -> list[set[str]]:
    """Open versions of each worker that lives."""
    alive = [beat for beat in state(server)["workers"] if Path(f"/proc/{beat['pid']}").exists()]
    return [{entry for entry in beat["loaded"] if entry.startswith("m@")} for beat in alive]


def test_loads_and_unloads_reach_every_worker_and_those_that_come_later(tmp_path: Path) -> None:
    """They are revisions: by HTTP or gRPC, both workers do it before it is answered; a new worker,
    and a new server, find it so; history tells who it was, and restore undoes it."""
    for version in (1, 2):
        models.put(tmp_path, "m", version, models.constant(version))
    models.put(tmp_path, "other", 1, models.constant(5))
    with serve(tmp_path, flags=TWO) as server:
        assert answers(server) == {2}
        assert told(server, "m/unload").status_code == 200
        assert (answers(server), answers(server, "other")) == ({"not_ready"}, {5})
        assert answers(server, "m/versions/1") == {"not_ready"}
        assert open_versions(server) == [set(), set()]
        written = state(server)["models"]["m"]
        assert (written["loaded"], written["follow"], written["served"]) == (False, True, None)

        os.kill(state(server)["workers"][0]["pid"], signal.SIGKILL)
        wait_until(lambda: server.events("worker_ready"), "a new worker")
        assert answers(server) == {"not_ready"}, "a worker that came later"

        asked(server, "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="m"))
        assert answers(server) == {2}
        message = pb.RepositoryModelLoadRequest(model_name="m")
        message.parameters["version"].int64_param = 1
        asked(server, "RepositoryModelLoad", message)
        assert open_versions(server) == [{"m@1", "m@2"}] * 2
        assert (state(server)["models"]["m"]["pins"], answers(server)) == ([1], {2})

        models.put(tmp_path, "m", 3, models.constant(3))
        assert told(server, "m/load").status_code == 200
        assert answers(server) == {3}, "a load finds what is new, on every worker"

        before = state(server)["revision"]
        models.put(tmp_path, "m", 4, b"no model")
        refused = told(server, "m/load")
        assert (refused.status_code, refused.json()["code"]) == (503, "version_refused")
        assert told(server, "m/load", version=9).status_code == 404
        assert (state(server)["revision"], answers(server)) == (before, {3})

        asked(server, "RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="m"))
        assert open_versions(server) == [set(), set()]
    (newest, *_) = json.loads(driftgate("history", "-r", str(tmp_path), "--json").stdout)[
        "revisions"
    ]
    assert (newest["actor"], newest["via"]) == ("local", "grpc")
    assert newest["diff"] == ["m loaded yes -> no", "m pin 1 on -> none"]

    with serve(tmp_path) as server:
        assert answers(server) == {"not_ready"}, "a server that starts"
        undone = driftgate(
            "restore", str(newest["revision"] - 1), "m", "-r", str(tmp_path), "--wait"
        )
        assert undone.returncode == 0, undone.stderr
        assert answers(server) == {3}


def test_where_no_revision_can_be_written_nothing_is_loaded_or_unloaded(tmp_path: Path) -> None:
    """507 or 503, with a reason; what serves serves on."""
    models.put(tmp_path, "m", 1, models.constant(1))
    with serve(tmp_path) as server:
        (tmp_path / ".driftgate").mkdir(exist_ok=True)
        (tmp_path / ".driftgate" / "revisions").write_text("in the way")
        refused = [told(server, "m/unload"), told(server, "m/load")]
        assert {answer.status_code for answer in refused} <= {503, 507}
        assert all(str(tmp_path) not in answer.text for answer in refused)
        assert answers(server) == {1}
        (tmp_path / ".driftgate" / "revisions").unlink()
        assert told(server, "m/unload").status_code == 200, "it heals by itself"


def test_a_start_opens_first_what_was_used_last(tmp_path: Path) -> None:
    """Pinned versions, then models by their last call, and what was called by number."""
    for name in ("a", "b", "c", "m"):
        for version in (1, 2):
            models.put(tmp_path, name, version, models.constant(version))

    def opened(server: Server) -> list[str]:
        return [f"{e['model']}@{e['version']}" for e in server.events("version_opened")]

    with serve(tmp_path) as server:
        assert opened(server) == ["a@2", "b@2", "c@2", "m@2"]
        assert answers(server, "c") == {2}
        assert answers(server, "m/versions/1") == {1}
    assert driftgate("pin", "b", "1", "-r", str(tmp_path)).returncode == 0
    with serve(tmp_path) as server:
        assert opened(server) == ["b@1", "m@2", "c@2", "a@2", "b@2", "m@1"]


@pytest.mark.parametrize("carrier", ["grpcio", "zttp"])
def test_calls_that_failed_hold_no_version_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carrier: str
) -> None:
    """What failed is let go at once, not when Python looks for cycles, which it never does here."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import gc\ngc.disable()\n")
    monkeypatch.setenv("PYTHONPATH", str(hook))
    registry = tmp_path / "models"
    models.put(registry, "m", 1, models.constant(1))
    wrong = [
        ("ModelReady", pb.ModelReadyRequest(name="nobody")),
        ("ModelMetadata", pb.ModelMetadataRequest(name="m", version="7")),
        ("ModelInfer", pb.ModelInferRequest(model_name="m")),
        ("ModelInfer", pb.ModelInferRequest(model_name="nobody")),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="nobody")),
    ]
    with serve(registry, {"grpc_carrier": carrier}) as server:
        for name, message in wrong:
            with pytest.raises(grpc.RpcError):
                asked(server, name, message)
        with server.client() as client:
            for path in ("m", "nobody", "m/versions/7"):
                assert client.post(f"/v2/models/{path}/infer", json={"inputs": []}).is_error

        assert told(server, "m/unload").status_code == 200
        assert open_versions(server) == [set()]
