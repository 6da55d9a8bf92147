"""What each receiver is sent, and how its owner can trust it."""

import base64
import hashlib
import hmac
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.alarms import presets, targets
from gateway.alarms.log import Episode, identity
from gateway.alarms.presets import PRESETS, Body, Message
from gateway.alarms.targets import Secret
from gateway.alarms.webhooks import signed
from gateway.errors import ConfigError

ABOUT = ("fraud", 7, "drift:input:<amount>", 2)
EPISODE = Episode(identity(*ABOUT), *ABOUT, "PSI 0.41 <b>", 1e9, 1e9 - 60, {"score": 0.41})
MESSAGE = Message("opened", 1e9, EPISODE, "shop")


def written(preset: str, **options: str) -> tuple[dict[str, Any], dict[str, str]]:
    body = PRESETS[preset].write(MESSAGE, options)
    return json.loads(body.content), body.headers


def test_the_default_is_a_cloud_event() -> None:
    """The attributes that CloudEvents 1.0 requires, its media type, and the alarm as data."""
    event, headers = written("cloudevents")

    assert headers["content-type"] == "application/cloudevents+json"
    assert {"id", "source", "specversion", "type"} <= set(event)
    assert (event["specversion"], event["type"]) == ("1.0", "io.driftgate.alarm.opened")
    assert event["source"] == "/shop/models/fraud/versions/7"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
    assert event["data"]["reason"] == "PSI 0.41 <b>"
    assert "driftgate drift" in event["data"]["runbook"]


def test_what_is_told_says_what_of_what_when_and_where_to_look() -> None:
    """Model, version, monitor, episode, reason, window and a link: enough to start a retraining."""
    data, _ = written("airflow")
    conf = data["conf"]
    assert (conf["model"], conf["version"], conf["episode"]) == ("fraud", 7, 2)
    assert (conf["about"], conf["link"]) == ("inputs", "/drift/fraud?version=7")
    assert conf["window"]["since"] < conf["window"]["until"] == conf["opened"]
    about = ("fraud", 7, "labels:loss", 1)
    details = {"until": 1e9 - 30}
    labels = Episode(identity(*about), *about, "accuracy fell", 1e9, 1e9 - 60, details)
    told = Message("opened", 1e9, labels, "shop", "https://serving.example.com/").data
    assert told["about"] == "labels"
    assert told["link"] == "https://serving.example.com/drift/fraud/performance?version=7"
    assert told["window"]["until"] < told["opened"]


def test_the_same_episode_has_the_same_key_everywhere() -> None:
    """Model, version, monitor and episode; where the receiver has a place, it is there."""
    key = EPISODE.id

    assert written("cloudevents")[0]["id"] == key
    assert written("airflow")[0]["dag_run_id"] == key
    assert written("prefect")[0]["idempotency_key"] == key
    assert written("github")[0]["client_payload"]["key"] == key
    dagster = written("dagster", location="l", repository="r", job="j")[0]
    tags = dagster["variables"]["params"]["executionMetadata"]["tags"]
    assert {"key": "driftgate/alarm", "value": key} in tags
    assert written("argo")[0]["id"] == key
    assert Message("acknowledged", 1e9, EPISODE, "shop").key != key


def test_receivers_get_what_their_interface_asks_for() -> None:
    """Fields that must be there, even when they are empty."""
    run, _ = written("airflow")
    assert run["logical_date"] is None
    assert run["conf"]["model"] == "fraud"
    assert PRESETS["airflow"].done == {409}
    flow, _ = written("prefect", parameter="why")
    assert flow["parameters"]["why"]["version"] == 7
    dispatch, headers = written("github", event_type="retrain")
    assert dispatch["event_type"] == "retrain"
    assert len(dispatch["client_payload"]) <= 10
    assert headers["accept"] == "application/vnd.github+json"
    query, _ = written("dagster", location="l", repository="r", job="j")
    assert "launchRun" in query["query"]


def test_names_of_clients_call_nobody_in_slack() -> None:
    """Its markup begins with < and &."""
    text = written("slack")[0]["text"]

    assert "<" not in text
    assert "&lt;b&gt;" in text


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """HMAC-SHA256 over id, time and body: computed here by the specification, and bound to all."""
    body = Body(b'{"a":1}', {"content-type": "application/json"})
    headers = signed(body, "key-1", 1_700_000_000, Secret("s3cret"))

    expected = hmac.new(b"s3cret", b'key-1.1700000000.{"a":1}', hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(expected).decode()
    assert (headers["webhook-id"], headers["idempotency-key"]) == ("key-1", "key-1")
    for other in (
        signed(body, "key-2", 1_700_000_000, Secret("s3cret")),
        signed(body, "key-1", 1_700_000_001, Secret("s3cret")),
        signed(Body(b'{"a":2}', {}), "key-1", 1_700_000_000, Secret("s3cret")),
        signed(body, "key-1", 1_700_000_000, Secret("other")),
    ):
        assert other["webhook-signature"] != headers["webhook-signature"]
    assert "webhook-signature" not in signed(body, "key-1", 1_700_000_000, None)
    assert "s3cret" not in repr(Secret("s3cret"))


# -- the file of targets


def load(tmp_path: Path, text: str) -> targets.Targets:
    file = tmp_path / "targets.yaml"
    file.write_text(text)
    return targets.load(file)


def test_a_file_of_targets_is_read(tmp_path: Path) -> None:
    """With secrets in files of their own, read when they are used."""
    (tmp_path / "secret").write_text("one\n")
    found = load(
        tmp_path,
        f"""
        name: shop
        allow: [hooks.example.com, 10.1.0.0/16]
        targets:
          - {{name: retrain, url: "https://hooks.example.com/x", secret_file: {tmp_path}/secret,
             models: [fraud], "on": [opened, acknowledged]}}
        """,
    )
    (target,) = found.targets
    secret = target.secret()
    assert secret is not None
    assert secret.reveal() == "one"
    assert target.wants("opened", "fraud", "inputs")
    assert not target.wants("opened", "other", "inputs")
    assert not target.wants("passed", "fraud", "inputs")
    only = msgspec.structs.replace(target, about=("labels",))
    assert only.wants("opened", "fraud", "labels")
    assert not only.wants("opened", "fraud", "inputs")
    (tmp_path / "secret").write_text("two")
    assert (changed := target.secret()) is not None
    assert changed.reveal() == "two"


def test_every_problem_of_the_file_is_told_at_once(tmp_path: Path) -> None:
    """Not just the first, and never a secret."""
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path,
            """
            allow: [a.example.com, 10.0.0.0/33]
            targets:
              - {name: a, url: "https://b.example.com/"}
              - {name: a, url: "ftp://a.example.com/"}
              - {name: c, url: "https://u:hunter2@a.example.com/", preset: airflw}
              - {name: d, url: "https://a.example.com:99999/"}
              - {name: e, url: "https://a.example.com/", preset: dagster, options: {job: j}}
              - {name: f, url: "https://a.example.com/", token_file: /nowhere}
              - {name: g, url: "https://a.example.com/", options: {dag: x}}
            """,
        )
    said = "\n".join(caught.value.problems)
    for part in (
        "target 'a' is there twice", "'10.0.0.0/33' is no network", "'b.example.com' is not in",
        "url must be https", "put it into token_file", "did you mean 'airflow'", "url is no URL",
        "needs options.location", "needs options.repository", "token_file: no such file",
        "takes no options.dag",
    ):  # fmt: skip
        assert part in said, part
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("targets: [{name: a}]", "missing required field"),
        ("targts: []", "unknown field"),
        ("targets: [{name: 'a b', url: x}]", "matching regex"),
        ("[", "not YAML"),
        ("2026-13-01", "not YAML"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    """What is wrong, and in which file."""
    with pytest.raises(ConfigError, match=rf"targets\.yaml: .*{said}"):
        load(tmp_path, text)


def test_presets_all_write_within_bounds() -> None:
    """Each stays below what may be sent, whatever the reason holds."""
    for name, preset in presets.PRESETS.items():
        options = dict.fromkeys(preset.needs, "x")
        assert len(preset.write(MESSAGE, options).content) < 8192, name
