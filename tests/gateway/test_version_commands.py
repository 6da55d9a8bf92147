"""Commands about versions: what they print, and how they end."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway import cli
from tests import models


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command in an empty directory; its output, as JSON where it is that."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for k in range(3):
        Path(f"{k}.onnx").write_bytes(models.constant(k))

    def run(*words: str) -> tuple[int, Any]:
        monkeypatch.setattr("sys.argv", ["driftgate", *words])
        done = CliRunner().invoke(cli.app, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        try:
            return done.exit_code, json.loads(done.stdout)
        except ValueError:
            return done.exit_code, done.stdout

    return run


def test_a_life_of_versions(run: Any) -> None:
    """Published, named, looked at, verified, damaged, withdrawn, collected."""
    code, made = run("publish", "fraud", "0.onnx", "--lineage", "data=a", "--lineage", "data=b",
                     "--lineage", 'metrics={"auc": 0.9}', "--tag", "t=1", "--json")  # fmt: skip
    assert (code, made["version"], made["is_new"], made["revision"]) == (0, 1, True, None)
    _, made = run("publish", "fraud", "1.onnx", "--alias", "challenger", "--json")
    assert (made["version"], made["revision"]) == (2, 2)

    _, shown = run("show", "fraud", "--json")
    assert [one["aliases"] for one in shown["versions"]] == [["champion"], ["challenger"]]
    _, one = run("show", "fraud@challenger", "--json")
    assert one["version"] == 2
    _, one = run("show", "fraud@champion", "--json")
    assert one["lineage"]["data"] == ["a", "b"]
    assert one["lineage"]["metrics"] == {"auc": 0.9}
    assert one["tags"] == {"t": "1"}
    assert "champion" in run("show", "fraud")[1]
    _, told = run("lineage", "fraud@2", "--json")
    assert [move["aliases"] for move in told["moves"]] == [["challenger"]]

    assert run("verify")[0] == 0
    file = Path("models/fraud/2/model.onnx")
    file.chmod(0o644)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"x")
    code, told = run("verify", "--json")
    assert code == 2
    assert told["versions"][1]["state"] == "wrong"
    assert "model.onnx" in told["versions"][1]["reason"]
    assert run("verify", "fraud@1")[0] == 0
    file.write_bytes(data)

    run("publish", "fraud", "2.onnx")
    with pytest.raises(Exception, match="named by alias"):
        run("withdraw", "fraud", "2")
    assert run("withdraw", "fraud", "2", "--force", "--json")[1]["is_new"] is True
    assert run("gc", "--days", "0", "--keep", "1", "--json")[1]["trashed"] == []
    with pytest.raises(Exception, match="no version"):
        run("show", "fraud@2")


def test_a_model_without_revisions_follows_its_highest(run: Any) -> None:
    """Also a directory copied by hand, of which nothing states the digest."""
    models.put(Path("models"), "fraud", 7, models.identity())

    _, shown = run("show", "fraud", "--json")

    assert shown["versions"][0]["aliases"] == ["champion (followed)"]
    assert shown["versions"][0]["digest"] is None
    code, told = run("verify", "--json")
    assert (code, told["versions"][0]["state"]) == (0, "unknown")
    assert (
        "copied by hand" in run("lineage", "fraud")[1]
        or "no manifest" in run("lineage", "fraud")[1]
    )


def test_doctor_ends_well_here(run: Any) -> None:
    """A line for each look."""
    code, printed = run("doctor")

    assert code == 0
    assert "ok       state: rename: a directory is renamed whole" in printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["publish", "fraud", "0.onnx", "--lineage", "data"], "must be KEY=VALUE"),
        (["publish", "fraud", "0.onnx", "--tag", "a=1", "--tag", "a=2"], "given twice"),
        (["publish", "fraud", "no.onnx"], "no such file"),
        (["publish", "a/b", "0.onnx"], "no name of a model"),
        (["publish", "fraud", "0.onnx", "--sign", "0.onnx"], "others may read|no private key"),
        (["show", "fraud"], "no model 'fraud'"),
        (["verify", "-r", "nowhere"], "no such directory"),
        (["withdraw", "fraud", "1"], "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(run: Any, words: list[str], reason: str) -> None:
    """In a sentence."""
    with pytest.raises(Exception, match=reason):
        run(*words)
