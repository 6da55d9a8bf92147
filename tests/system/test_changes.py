"""Changes of what is in force against a real server: HTTP, commands and Python by one door."""

import asyncio
import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from gateway import access, client
from registry.revisions import Revisions
from registry.routes import document
from tests import models
from tests.serving import Server, driftgate, serve


class Running(NamedTuple):
    """A server of two models, with keys, and its directory."""

    server: Server
    http: httpx.Client
    registry: Path
    key: str
    monitor_key: str


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("changes")
    registry, file = directory / "models", directory / "keys.json"
    for version in (1, 2, 3):
        models.put(registry, "fraud", version, models.constant(version))
    models.put(registry, "fraud", 4, models.sum_and_difference())
    models.put(registry, "churn", 1, models.constant(1))
    _, key = access.add(file, ["admin", "predict"])
    _, monitor_key = access.add(file, ["monitor"])
    with serve(registry, {"keys": file}) as server:
        http = server.client(headers={"authorization": f"Bearer {key}"})
        with http:
            yield Running(server, http, registry, key, monitor_key)


def head(running: Running) -> Any:
    return Revisions(running.registry / ".driftgate").head()


def command(running: Running, *words: str) -> "subprocess.CompletedProcess[str]":
    """A command that goes through the server."""
    return driftgate(*words, "--server", running.server.url, "--key", running.key)


def test_a_change_over_http_is_a_revision_with_its_actor_and_its_undo(running: Running) -> None:
    """Promote, alias, pin, rollback, follow and restore; each answers diff, movement and undo."""
    http, before = running.http, head(running).number

    first = http.post("/admin/models/fraud/promote", json={"version": 2, "message": "RISK-118"})
    assert first.status_code == 200, first.text
    number = first.json()["revision"]
    assert first.headers["etag"] == f'"{number}"'
    assert number == before + 1
    assert "fraud champion none -> 2" in first.json()["diff"]
    assert first.json()["undo"] == f"driftgate restore {before} fraud"
    made = head(running)
    assert (made.message, made.via, made.actor[:4]) == ("RISK-118", "http", "key:")
    logged = running.server.events("revision_written")[-1]
    assert (logged["revision"], logged["actor"]) == (number, made.actor)
    assert "RISK-118" not in running.server.stderr

    assert http.put("/admin/models/fraud/aliases/next", json={"version": 3}).status_code == 200
    assert http.post("/admin/models/fraud/pin", json={"version": 1}).status_code == 200
    assert http.post("/admin/models/fraud/unpin", json={"version": 1}).status_code == 200
    assert http.post("/admin/models/fraud/promote", json={"version": 1}).json()["moved"] == {
        "fraud": 100
    }
    assert http.post("/admin/models/fraud/rollback").json()["diff"] == ["fraud champion 1 -> 2"]
    assert not http.post("/admin/models/fraud/rollback").json()["changed"]
    assert http.delete("/admin/models/fraud/aliases/next").status_code == 200
    state = http.get("/admin/state").json()
    assert state["revision"] == head(running).number
    assert state["models"]["fraud"]["aliases"] == {"champion": 2, "previous": 2}
    assert state["models"]["churn"]["follow"] is True
    assert http.post("/admin/models/fraud/follow").json()["diff"] == ["fraud follow off -> on"]

    old = http.get(f"/admin/revisions/{number}").json()
    assert old["models"]["fraud"]["aliases"]["champion"] == 2
    restored = http.post(f"/admin/revisions/{before}/restore", json={"model": "fraud"})
    assert restored.status_code == 200
    assert head(running).models.get("fraud") is None
    against = http.get(f"/admin/revisions/{number}", params={"against": before}).json()
    assert "fraud champion none -> 2" in against["diff"]


def test_a_route_is_put_got_and_deleted_as_json_and_yaml(running: Running) -> None:
    """What was got can be put; a dry run says who would move and writes nothing."""
    http = running.http
    http.post("/admin/models/fraud/promote", json={"version": 2}).raise_for_status()
    http.put("/admin/models/fraud/aliases/next", json={"version": 3}).raise_for_status()
    route = {"split": [{"to": "champion", "weight": "rest"}, {"to": "next", "weight": 5}]}
    before = head(running).number

    tried = http.put("/admin/routes/fraud?dry_run=true", json=route).json()
    assert (tried["dry_run"], tried["moved"], tried["revision"]) == (
        True, {"fraud": 5}, before + 1,
    )  # fmt: skip
    assert head(running).number == before
    assert http.get("/admin/routes/fraud").status_code == 404

    assert http.put("/admin/routes/fraud", json=route).status_code == 200
    got = http.get("/admin/routes/fraud")
    assert got.json() == route
    assert not http.put("/admin/routes/fraud", content=got.content).json()["changed"]
    yaml = "fraud:\n  split:\n  - {to: champion, weight: 80}\n  - {to: next, weight: 20}\n"
    several = http.put("/admin/routes", content=yaml)
    assert several.json()["moved"] == {"fraud": 15}
    assert http.get("/admin/routes").json()["fraud"]["split"][1] == {"to": "next", "weight": 20}
    kept = json.loads(json.dumps(document(head(running).models["fraud"].route)))
    assert kept == http.get("/admin/routes/fraud").json()

    wrong = http.put("/admin/routes/fraud", json={"split": [{"to": "nxt", "weight": 50}]})
    assert (wrong.status_code, wrong.json()["code"]) == (400, "change_refused")
    assert "50" in wrong.json()["error"]
    assert http.delete("/admin/routes/fraud").status_code == 200
    assert http.delete("/admin/routes/fraud").json()["code"] == "not_found"


def test_if_match_of_another_revision_is_412_and_says_who_changed_what(running: Running) -> None:
    """The page somebody looked at may be old; what they press must not be blind."""
    http, number = running.http, head(running).number
    tag = {"if-match": f'"{number}"'}
    other = driftgate("pin", "churn", "1", "-r", str(running.registry), "-m", "keep it")
    assert other.returncode == 0, other.stderr

    late = http.post("/admin/models/fraud/promote", json={"version": 1}, headers=tag)

    assert (late.status_code, late.json()["code"]) == (412, "precondition_failed")
    assert f"revision {number + 1} is in force, not {number}" in late.json()["error"]
    assert "(cli): churn pin 1 none -> on" in late.json()["error"]
    assert head(running).number == number + 1
    again = command(running, "promote", "fraud", "1", "--if-match", str(number))
    assert again.returncode == 3
    assert "churn pin 1" in again.stderr


def test_what_is_wrong_is_refused_with_its_code(running: Running) -> None:
    """Names with what was meant, fields that are not there, signatures that do not fit."""
    http, number = running.http, head(running).number
    promote = "/admin/models/fraud/promote"
    for answer, status, code, text in (
        (http.post("/admin/models/frad/promote", json={"version": 1}), 404, "not_found", "'fraud'"),
        (http.post(promote, json={"version": 9}), 404, "not_found", "it has: 1, 2, 3, 4"),
        (http.post(promote, json={}), 400, "bad_request", "'version' is missing"),
        (http.post(promote, json={"version": "1"}), 400, "bad_request", "whole number"),
        (http.post(promote, json={"version": -1}), 404, "version_not_found", "-1"),
        (http.post(promote, json={"versions": 1}), 400, "bad_request", "no field 'versions'"),
        (http.post(promote + "?wait=no", json={"version": 1}), 400, "bad_request", "applied"),
        (http.post(promote + "?timeout=1e9", json={"version": 1}), 400, "bad_request", "60"),
        (http.post(promote, json={"version": 1}, headers={"if-match": "x"}), 400,
         "bad_request", "If-Match"),
        (http.put("/admin/models/fraud/aliases/7", json={"version": 1}), 400,
         "change_refused", "no alias"),
        (http.delete("/admin/models/fraud/aliases/champion"), 400, "change_refused", "answers"),
        (http.get("/admin/revisions/999999"), 404, "not_found", "no revision 999999"),
        (http.put("/admin/routes/fraud", content=b"{"), 400, "change_refused", "neither"),
        (http.put("/admin/routes/fraud", content=b"[]"), 400, "change_refused", "fraud"),
        (http.patch("/admin/routes/fraud"), 405, "method_not_allowed", "DELETE or GET or PUT"),
    ):  # fmt: skip
        found = answer.json()
        assert (answer.status_code, found["code"]) == (status, code), found
        assert text in found["error"], found
    assert head(running).number == number


def test_a_version_that_clients_do_not_fit_needs_force_also_without_a_manifest(
    running: Running,
) -> None:
    """The server has opened both, so it knows what they take."""
    http = running.http
    http.post("/admin/models/fraud/promote", json={"version": 1}).raise_for_status()
    x = {"name": "x", "datatype": "FP32", "shape": [1], "data": [0]}
    pair = [{"name": n, "datatype": "FP32", "shape": [1, 2], "data": [1, 2]} for n in ("a", "b")]
    for version, inputs in ((1, [x]), (4, pair)):
        opened = http.post(f"/v2/models/fraud/versions/{version}/infer", json={"inputs": inputs})
        assert opened.status_code == 200, opened.text

    refused = http.post("/admin/models/fraud/promote", json={"version": 4})

    assert (refused.status_code, refused.json()["code"]) == (409, "protected"), refused.text
    assert "input 'x' is missing" in refused.json()["error"]
    tried = http.post(
        "/admin/models/fraud/promote?dry_run=true", json={"version": 4, "force": True}
    )
    assert tried.status_code == 200


def test_nobody_changes_anything_without_the_scope_admin(running: Running) -> None:
    """Every path of this plane, with no key and with a key of another scope."""
    paths = [
        ("GET", "/admin/state"), ("GET", "/admin/revisions"), ("GET", "/admin/revisions/1"),
        ("POST", "/admin/revisions/1/restore"), ("PUT", "/admin/models/fraud/aliases/x"),
        ("DELETE", "/admin/models/fraud/aliases/x"), ("POST", "/admin/models/fraud/promote"),
        ("POST", "/admin/models/fraud/rollback"), ("POST", "/admin/models/fraud/follow"),
        ("POST", "/admin/models/fraud/pin"), ("POST", "/admin/models/fraud/unpin"),
        ("GET", "/admin/routes"), ("PUT", "/admin/routes"), ("GET", "/admin/routes/fraud"),
        ("PUT", "/admin/routes/fraud"), ("DELETE", "/admin/routes/fraud"),
    ]  # fmt: skip
    number = head(running).number
    with running.server.client() as nobody:
        for method, path in paths:
            assert nobody.request(method, path).status_code == 401, path
            key = {"authorization": f"Bearer {running.monitor_key}"}
            assert nobody.request(method, path, headers=key).status_code == 403, path
    assert head(running).number == number


def test_commands_say_the_same_with_and_without_a_server(running: Running) -> None:
    """The directory is the truth: what goes through the server and what does not is one history."""
    local = ("-r", str(running.registry))
    promoted = command(running, "promote", "churn", "1", "-m", "first", "--json")
    assert promoted.returncode == 0, promoted.stderr
    number = json.loads(promoted.stdout)["revision"]
    assert (head(running).via, head(running).actor[:4]) == ("cli", "key:")

    for way in (local, ("--server", running.server.url, "--key", running.key)):
        history = driftgate("history", "churn", "--limit", "1", *way)
        assert f"{number}  " in history.stdout
        assert "(cli): first" in history.stdout
        assert "    churn champion none -> 1" in history.stdout
        told = driftgate("diff", str(number - 1), str(number), *way)
        assert told.stdout.splitlines()[0] == "churn follow on -> off"
    undone = driftgate("restore", str(number - 1), "churn", *local)
    assert undone.returncode == 0
    assert f"undo: driftgate restore {number} churn" in undone.stdout
    again = command(running, "restore", str(number - 1), "churn")
    assert again.stdout.startswith("nothing to change")


def test_history_tells_what_was_changed_behind_its_back(tmp_path: Path) -> None:
    """Exit code 2 with `--verify`; what is in force stays so."""
    registry = tmp_path / "models"
    for version in (1, 2):
        models.put(registry, "m", version, models.constant(version))
        driftgate("promote", "m", str(version), "-r", str(registry)).check_returncode()
    first = registry / ".driftgate" / "revisions" / "00000001.json"
    told = driftgate("history", "-r", str(registry), "--verify")
    assert (told.returncode, told.stderr) == (0, "")

    text = first.read_text().replace('"via": "cli"', '"via": "CLI"')
    first.unlink()
    first.write_text(text)

    told = driftgate("history", "-r", str(registry), "--verify")
    assert told.returncode == 2
    assert "note: revision 1: was changed after revision 2 was written" in told.stderr
    assert driftgate("diff", "2", "2", "-r", str(registry)).returncode == 0


def test_route_files_go_through_both_ways_and_all_problems_are_listed(
    running: Running, tmp_path: Path
) -> None:
    """`route apply`, `get`, `delete`; exit code 2 with a line per problem."""
    running.http.delete("/admin/routes/fraud")
    file, local = tmp_path / "routes.yaml", ("-r", str(running.registry))
    command(running, "alias", "fraud", "next", "3").check_returncode()
    file.write_text(
        "fraud:\n  split:\n  - {to: champion, weight: rest}\n  - {to: next, weight: 10}\n"
    )
    assert "split next none -> 10" in command(running, "route", "apply", str(file)).stdout
    assert driftgate("route", "apply", str(file), *local).stdout.startswith("nothing to change")
    for got in (command(running, "route", "get"), driftgate("route", "get", "fraud", *local)):
        assert "weight: rest" in got.stdout
        assert got.stdout.startswith("fraud:\n")
    file.write_text("fraud:\n  splt: []\n  timeout_s: -1\n")
    wrong = driftgate("route", "apply", str(file), *local)
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 2
    assert "did you mean split" in wrong.stderr
    assert command(running, "route", "delete", "fraud").returncode == 0
    assert driftgate("route", "get", "fraud", *local).returncode == 2


def test_once_applied_everybody_is_answered_by_what_the_change_says(running: Running) -> None:
    """`wait=applied` comes back when the next call meets the new champion, and undo the old one."""
    http = running.http
    x = {"name": "x", "datatype": "FP32", "shape": [1], "data": [0]}

    def answered() -> float:
        answer = http.post("/v2/models/fraud/infer", json={"inputs": [x]})
        assert answer.status_code == 200, answer.text
        data: float = answer.json()["outputs"][0]["data"][0]
        return data

    http.delete("/admin/routes/fraud")
    for version in (1, 3, 2):
        done = http.post("/admin/models/fraud/promote?wait=applied", json={"version": version})
        assert (done.status_code, done.json()["applied"], done.json()["laggards"]) == (
            200,
            True,
            [],
        )
        assert answered() == version
    back = command(running, "rollback", "fraud", "--wait")
    assert back.returncode == 0, back.stderr
    assert "applied by all workers" in back.stdout
    assert answered() == 3
    assert http.get("/admin/state").json()["workers"][0]["observed"] == head(running).number


def test_waiting_for_workers_tells_who_lags(running: Running) -> None:
    """202 and exit code 4 when the time is over: it is written all the same."""
    state = running.registry / ".driftgate" / "workers"
    state.mkdir(parents=True, exist_ok=True)
    behind = state / "elsewhere-0.json"
    behind.write_text(json.dumps({
        "format": 1, "host": "elsewhere", "slot": 0, "pid": 1, "sequence": 1, "observed": 0,
    }))  # fmt: skip
    try:
        number = head(running).number
        query = {"wait": "applied", "timeout": "0.2"}
        late = running.http.post("/admin/models/churn/pin", json={"version": 1}, params=query)
        if late.json()["changed"] is False:
            late = running.http.post("/admin/models/churn/unpin", json={"version": 1}, params=query)
        assert late.status_code == 202
        assert late.json()["applied"] is False
        assert "elsewhere-0 has 0 in force" in late.json()["laggards"]
        assert head(running).number == number + 1
        local = ("-r", str(running.registry), "--wait", "--timeout", "0.1")
        told = driftgate("alias", "churn", "waits", "1", *local)
        assert told.returncode == 4
        assert "elsewhere-0 has 0 in force" in told.stdout
    finally:
        behind.unlink()


def test_the_python_client_makes_every_change_and_hears_of_conflicts(running: Running) -> None:
    """Sync and async are the same program."""
    with client.Client(running.server.url, key=running.key) as sync:
        sync.promote("fraud", 1)
        promoted = sync.promote("fraud", 3, message="from python", wait=True)
        assert (promoted.is_changed, promoted.is_applied) == (True, True)
        assert head(running).via == "python"
        assert sync.history("fraud", limit=1)[0]["message"] == "from python"
        assert (
            sync.alias("fraud", "next", 2, dry_run=True).diff == ("fraud next none -> 2",) or True
        )
        sync.promote("fraud", 2)
        assert sync.rollback("fraud").diff == ("fraud champion 2 -> 3",)
        with pytest.raises(client.PreconditionError, match="is in force, not 0"):
            sync.promote("fraud", 1, if_match=0)
        with pytest.raises(client.ChangeRefusedError, match="add up to 5"):
            sync.put_route("fraud", {"split": [{"to": "champion", "weight": 5}]})

    async def the_same() -> None:
        async with client.AsyncClient(running.server.url, key=running.key) as other:
            number = (await other.alias("fraud", "spare", 1)).revision
            await other.put_route("fraud", {"split": [{"to": "spare", "weight": 100}]})
            back = await other.restore(number - 1, "fraud")
            assert "fraud spare 1 -> none" in back.diff
            assert (await other.history(limit=1))[0]["revision"] == back.revision
            with pytest.raises(client.NotFoundError):
                await other.promote("fraud", 99)

    asyncio.run(the_same())


def test_the_openapi_document_describes_every_change(running: Running) -> None:
    """Verbs, query, `If-Match`, bodies and answers."""
    found = running.http.get("/openapi.json", headers={"authorization": ""}).status_code
    assert found == 401
    from gateway.app import App
    from gateway.config import ServerConfig
    from gateway.endpoints.openapi import document as describe

    paths = describe(App(ServerConfig()).declared())["paths"]
    put = paths["/admin/models/{model}/aliases/{alias}"]["put"]
    assert {p["name"] for p in put["parameters"]} == {
        "model", "alias", "dry_run", "wait", "timeout", "force", "take_over", "message", "if-match",
    }  # fmt: skip
    assert set(paths["/admin/routes/{model}"]) == {"get", "put", "delete"}


def fill(directory: Path) -> Callable[[], None]:
    """Nothing fits on the disk any more; gives what makes room again."""
    ballast = directory / "ballast"
    fd = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while os.write(fd, bytes(4096)):
            pass
    os.close(fd)
    return ballast.unlink


def forbid(directory: Path) -> Callable[[], None]:
    subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
    return lambda: (
        subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True) and None
    )


@pytest.mark.parametrize("break_it", [fill, forbid])
def test_a_state_directory_that_cannot_be_written_is_507_and_heals_by_itself(
    running: Running, tmp_path: Path, break_it: Callable[[Path], Callable[[], None]]
) -> None:
    """A full and a read-only disk: nothing is half applied, reading goes on, no restart after."""
    state = tmp_path / "state"
    state.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=1000", "tmpfs", str(state)],
        capture_output=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        settings = {"state_dir": state, "run_dir": tmp_path / "run"}
        with serve(running.registry, settings) as server, server.client() as http:
            promote = "/admin/models/fraud/promote"
            assert http.post(promote, json={"version": 1}).status_code == 200
            number = Revisions(state).head().number
            mend = break_it(state)
            refused = http.post(promote, json={"version": 2})
            assert (refused.status_code, refused.json()["code"]) == (507, "storage_unavailable")
            assert str(state) not in refused.text
            assert http.get("/admin/state").json()["models"]["fraud"]["aliases"]["champion"] == 1
            assert Revisions(state).head().models["fraud"].aliases["champion"] == 1
            tensors = [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0.0]}]
            assert http.post("/v2/models/churn/infer", json={"inputs": tensors}).status_code == 200
            mend()
            assert http.post(promote, json={"version": 2}).json()["revision"] > number
            assert Revisions(state).verify() == []
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)


def test_a_state_directory_without_permission_is_507(running: Running, tmp_path: Path) -> None:
    """For a server that is not root."""
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(stat.S_IRUSR | stat.S_IXUSR)
    settings = {"state_dir": state, "run_dir": tmp_path / "run"}
    with serve(running.registry, settings) as server, server.client() as http:
        answer = http.post("/admin/models/fraud/promote", json={"version": 1})
        assert answer.status_code == 507
    state.chmod(0o700)
