"""A server that is told whom to trust, and versions that nobody should."""

import subprocess
from pathlib import Path

import pytest

from gateway.publisher import publish
from tests import models
from tests.gateway.test_publisher import keys
from tests.serving import DRIFTGATE, Server, request, serve, tensor, wait_until

ONE = request(tensor("x", "FP32", [1], [0]))
QUICK = {"sync.poll_s": 0.1, "sync.settle_s": 0.2}


def answered(server: Server, version: str = "") -> tuple[int, str]:
    """The status, and the version or the sentence."""
    path = f"/v2/models/fraud{f'/versions/{version}' if version else ''}/infer"
    with server.client() as http:
        answer = http.post(path, json=ONE)
    said = answer.json()
    return answer.status_code, said.get("model_version") or said["error"]


def put(folder: Path, k: int) -> Path:
    (folder / f"{k}.onnx").write_bytes(models.constant(k))
    return folder / f"{k}.onnx"


def test_only_versions_that_a_trusted_key_signed_are_served(tmp_path: Path) -> None:
    """Unsigned, signed by another, copied by hand, changed: refused; the signed one serves on."""
    registry = tmp_path / "models"
    registry.mkdir()
    ours, public = keys(tmp_path, "ours")
    theirs, _ = keys(tmp_path, "theirs")
    publish(registry, "fraud", put(tmp_path, 1), sign=ours)
    with serve(registry, QUICK, flags=("--port", "0", "--trust", str(public))) as server:
        assert answered(server) == (200, "1")

        publish(registry, "fraud", put(tmp_path, 2), sign=theirs)
        publish(registry, "fraud", put(tmp_path, 3))
        models.put(registry, "fraud", 4, models.constant(4))
        wait_until(lambda: answered(server, "4")[0] == 503, "4 is refused")
        for version, reason in (("2", "none of the trusted"), ("3", "not signed"), ("4", "signed")):
            status, said = answered(server, version)
            assert status == 503
            assert reason in said
            assert str(tmp_path) not in said
        assert answered(server) == (200, "1")
        with server.client() as http:
            refused = http.get("/admin/models/fraud/versions/2").json()
            assert (refused["state"], refused["manifest"]["version"]) == ("refused", 2)
            assert http.get("/admin/models/fraud/versions/4").json()["manifest"] is None
            assert http.get("/admin/models/fraud/versions/9").status_code == 404
        shown = subprocess.run(
            [DRIFTGATE, "show", "fraud@3", "--server", server.url],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert shown.startswith("fraud version 3: refused: is not trusted: it is not signed")

        publish(registry, "fraud", put(tmp_path, 5), sign=ours)
        wait_until(lambda: answered(server) == (200, "5"), "5 answers")


def test_a_server_with_no_key_to_trust_does_not_start(tmp_path: Path) -> None:
    """Rather than trusting anybody."""
    models.put(tmp_path / "models", "fraud", 1, models.constant(1))
    (tmp_path / "empty").mkdir()

    done = subprocess.run(
        [DRIFTGATE, "serve", str(tmp_path / "models"), "--trust", str(tmp_path / "empty")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 2
    assert "holds no public key" in done.stderr


@pytest.mark.parametrize("kind", ["golden", "weights"])
def test_what_only_looks_like_a_version_is_refused_in_the_server_too(
    tmp_path: Path, kind: str
) -> None:
    """Copied in by hand, past all that publish asks: the server asks again."""
    registry = tmp_path / "models"
    models.put(registry, "fraud", 1, models.constant(1))
    with serve(registry, QUICK) as server:
        wait_until(lambda: answered(server) == (200, "1"), "1 answers")
        staged = registry / "fraud" / ".copying"
        staged.mkdir()
        if kind == "golden":
            (staged / "model.onnx").write_bytes(models.constant(2))
            wrong = '{"inputs": {"x": [0]}, "outputs": {"y": [3]}}'
            (staged / "golden.jsonl").write_text(wrong)
        else:
            (tmp_path / "secret").write_bytes(b"\0" * 8)
            (staged / "model.onnx").write_bytes(models.with_lost_weights())
            (staged / "weights.bin").hardlink_to(tmp_path / "secret")
        staged.rename(registry / "fraud" / "2")

        wait_until(lambda: answered(server, "2")[0] == 503, "2 is refused")

        reason = "golden.jsonl: line 1" if kind == "golden" else "second name somewhere"
        assert reason in answered(server, "2")[1]
        assert answered(server) == (200, "1")
