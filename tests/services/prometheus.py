"""Rules, alerts and dashboard, asked of a real Prometheus that scrapes real servers."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

import gateway
from monitors import Profile
from monitors.distance import psi
from tests import models
from tests.serving import Server, free_port, request, serve, tensor, wait_until

BINARIES = Path(os.environ["DRIFTGATE_TEST_PROMETHEUS"])
RULES = Path(gateway.__file__).with_name("dashboards")
FILES = [RULES / "recording.yaml", RULES / "alerts.yaml"]
QUIET = {"Versions refused", "Alarms told", "Predictions kept, lost, let go",
         "Labels by what became of them"}  # fmt: skip
"""Panels that may have nothing to show: what they count has not happened."""


def promtool(*words: object) -> None:
    ended = subprocess.run(
        [BINARIES / "promtool", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_rules_and_alerts_are_well_formed() -> None:
    """By Prometheus's own judgement."""
    promtool("check", "rules", *FILES)


def series(name: str, values: str, **labels: object) -> dict[str, str]:
    told = ", ".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{told}}}", "values": values}


def run_rules(tmp_path: Path, **test: Any) -> None:
    file = tmp_path / "test.yaml"
    document = {
        "rule_files": [str(file) for file in FILES],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", **test}],
    }
    file.write_text(yaml.safe_dump(document))
    promtool("test", "rules", file)


@pytest.mark.parametrize("seed", range(3))
def test_psi_over_replicas_is_that_of_the_monitors(tmp_path: Path, seed: int) -> None:
    """Three replicas with traffic of their own, an empty bin, and a reference: one formula."""
    random = np.random.default_rng(seed)
    reference = random.multinomial(20_000, random.dirichlet(np.ones(8)))
    a_minute = random.poisson(random.dirichlet(np.ones(8), size=3) * 500)
    a_minute[:, 2] = 0
    expected = psi(reference, a_minute.sum(axis=0))
    about = {"model": "m", "version": "1", "feature": "input:x"}
    given = []
    for replica in range(3):
        for k in range(8):
            labels = {**about, "bin": f"b{k}", "instance": replica}
            counts = f"0+{a_minute[replica, k]}x120"
            given.append(series("driftgate_feature_bin_total", counts, **labels))
            share = repr(float(reference[k] / reference.sum()))
            given.append(series("driftgate_reference_share", f"{share}+0x120", **labels))

    run_rules(
        tmp_path,
        input_series=given,
        promql_expr_test=[
            {
                "expr": f"abs(driftgate:psi:1h - {expected!r}) < bool 1e-9",
                "eval_time": "100m",
                "exp_samples": [
                    {"labels": '{model="m", version="1", feature="input:x"}', "value": 1}
                ],
            }
        ],
    )


MODEL = {"model": "m"}
VERSION = {**MODEL, "version": "1"}
TRAFFIC = {**VERSION, "variant": "champion", "traffic": "primary"}
CASES: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    # What makes it fire, and what looks alike and must not.
    "DriftgateDown": (
        [series("up", "0x90", job="driftgate-bins")], [series("up", "0x90", job="node")]
    ),
    "DriftgateNotReady": (
        [series("driftgate_ready", "0x90")], [series("driftgate_ready", "0 0 1x90")]
    ),
    "DriftgateErrors": (
        [series("driftgate_requests_total", "0+97x90", **TRAFFIC, code="ok"),
         series("driftgate_requests_total", "0+3x90", **TRAFFIC, code="model_failed")],
        [series("driftgate_requests_total", "0+97x90", **TRAFFIC, code="ok"),
         series("driftgate_requests_total", "0+90x90", **TRAFFIC, code="bad_tensor"),
         series("driftgate_requests_total", "0+99x90", **{**TRAFFIC, "traffic": "shadow"},
                code="model_failed")],
    ),
    "DriftgateSlow": (
        [series("driftgate_request_seconds_bucket", f"0+{n}x90", **TRAFFIC, le=le)
         for le, n in (("1.0", 90), ("2.5", 100), ("+Inf", 100))],
        [series("driftgate_request_seconds_bucket", f"0+{n}x90", **TRAFFIC, le=le)
         for le, n in (("0.1", 100), ("1.0", 100), ("+Inf", 100))],
    ),
    "DriftgateShedding": (
        [series("driftgate_shed_total", "0+60x90", **VERSION, reason="queue_full")],
        [series("driftgate_shed_total", "0+60x90", **VERSION, reason="client_gone"),
         series("driftgate_shed_total", "0+60x90", model="m", version="", reason="rate_limited")],
    ),
    "DriftgateBreakerOpen": (
        [series("driftgate_breaker_open", "1x90", **VERSION)],
        [series("driftgate_breaker_open", "0x90", **VERSION)],
    ),
    "DriftgateVersionRefused": (
        [series("driftgate_versions_refused", "1x90", **MODEL)],
        [series("driftgate_versions_refused", "0x90", **MODEL)],
    ),
    "DriftgateDegraded": (
        [series("driftgate_degraded", "1x90", what="labels")],
        [series("driftgate_degraded", "0x90", what="labels")],
    ),
    "DriftgateDrift": (
        [series("driftgate_alarms_open", "2x90", **VERSION)],
        [series("driftgate_alarms_open", "0x90", **VERSION)],
    ),
    "DriftgateFleetDrift": (
        [*(series("driftgate_feature_bin_total", f"0+{n}x90", **VERSION, feature="f", bin=k)
           for k, n in enumerate((90, 10))),
         *(series("driftgate_reference_share", "0.5x90", **VERSION, feature="f", bin=k)
           for k in (0, 1))],
        # The same shares, of few rows.
        [*(series("driftgate_feature_bin_total", f"0+{n}x90", **VERSION, feature="f", bin=k)
           for k, n in enumerate((9, 1))),
         *(series("driftgate_reference_share", "0.5x90", **VERSION, feature="f", bin=k)
           for k in (0, 1))],
    ),
    "DriftgateBlind": (
        [series("driftgate_requests_total", "0+97x90", **TRAFFIC, code="ok"),
         series("driftgate_observed_rows_total", "0x90", **VERSION)],
        [series("driftgate_requests_total", "0+97x90", **TRAFFIC, code="ok"),
         series("driftgate_observed_rows_total", "0+97x90", **VERSION)],
    ),
    "DriftgateTapDropping": (
        [series("driftgate_tap_dropped_rows_total", "0+9x90", **VERSION)],
        [series("driftgate_tap_dropped_rows_total", "7x90", **VERSION)],
    ),
    "DriftgateMonitorFailed": (
        [series("driftgate_observer_errors_total", "0+1x90", **VERSION)],
        [series("driftgate_observer_errors_total", "3x90", **VERSION)],
    ),
    "DriftgatePredictionsLost": (
        [series("driftgate_predictions_lost_total", "0+1x90", reason="queue_full")],
        [series("driftgate_predictions_lost_total", "9x90", reason="queue_full")],
    ),
    "DriftgateLabelsStopped": (
        [series("driftgate_labels_total", "0+1x30 30x1800", **{"is": "joined"})],
        [series("driftgate_labels_total", "0+1x1900", **{"is": "joined"})],
    ),
    "DriftgateNobodyTold": (
        [series("driftgate_webhooks_total", "0+1x90", **{"is": "dead"})],
        [series("driftgate_webhooks_total", "0+1x90", **{"is": "delivered"})],
    ),
}  # fmt: skip


def test_every_alert_has_a_case() -> None:
    """One that makes it fire and one that must not."""
    named = {
        rule["alert"]
        for group in yaml.safe_load(FILES[1].read_text())["groups"]
        for rule in group["rules"]
    }
    assert named == set(CASES)


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    """Two cases each, in one run of promtool."""
    tests = []
    for alert, cases in CASES.items():
        at = "1700m" if alert == "DriftgateLabelsStopped" else "85m"
        for given, is_firing in zip(cases, (1, 0), strict=True):
            count = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)'
            tests.append({
                "interval": "1m",
                "input_series": given,
                "promql_expr_test": [{
                    "expr": f"({count}) >= bool 1",
                    "eval_time": at,
                    "exp_samples": [{"labels": "{}", "value": is_firing}],
                }],
            })  # fmt: skip
    file = tmp_path / "alerts.yaml"
    file.write_text(yaml.safe_dump({
        "rule_files": [str(file) for file in FILES], "evaluation_interval": "1m", "tests": tests,
    }))  # fmt: skip
    promtool("test", "rules", file)


# -- a real server


class Prometheus:
    """A running one."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=20, trust_env=False)

    def is_ready(self) -> bool:
        """By its own word: before, it answers 503."""
        try:
            return self.client.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def ask(self, query: str) -> list[dict[str, Any]]:
        answer = self.client.get("/api/v1/query", params={"query": query})
        assert answer.status_code == 200, f"{query}\n{answer.text}"
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    registry = tmp_path_factory.mktemp("models")
    directory = models.put(registry, "m", 1, models.identity())
    values = np.random.default_rng(5).normal(size=5000).astype(np.float32)
    (directory / "reference.json").write_text(Profile.fit({"input:x": values}).to_json())
    settings = {"monitor.window_rows": 500, "labels.sample": 100}
    with (
        serve(registry, {**settings, "state_dir": registry / "a"}) as one,
        serve(registry, {**settings, "state_dir": registry / "b"}) as other,
    ):
        yield [one, other]


@pytest.fixture(scope="module")
def scraping(
    replicas: list[Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    directory, port = tmp_path_factory.mktemp("prometheus"), free_port()
    directory.chmod(0o777)
    addresses = [server.url.removeprefix("http://") for server in replicas]
    static = [{"targets": addresses}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump({
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(file) for file in FILES],
        "scrape_configs": [
            {"job_name": "driftgate", "static_configs": static},
            {"job_name": "driftgate-bins", "metrics_path": "/metrics/bins",
             "static_configs": static},
        ],
    }))  # fmt: skip
    # The interval of the group for people is a minute; here nobody wants to wait for it.
    rules = directory / "recording.yaml"
    rules.write_text(FILES[0].read_text().replace("interval: 1m", "interval: 1s"))
    config = directory / "prometheus.yml"
    config.write_text(config.read_text().replace(str(FILES[0]), str(rules)))
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [BINARIES / "prometheus", f"--config.file={config}",
             f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{port}"],
            stdout=log, stderr=log, cwd=directory,
        )  # fmt: skip
    made = Prometheus(f"http://127.0.0.1:{port}")
    try:
        wait_until(made.is_ready, f"it answers: {directory / 'log'}", timeout_s=30)

        def is_scraping() -> bool:
            return len(made.ask("up == 1")) == 4

        wait_until(is_scraping, f"four targets are up: {directory / 'log'}", timeout_s=30)
        yield made
    finally:
        made.client.close()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def send_shifted(replicas: list[Server]) -> None:
    """Four thousand rows, those of the second replica shifted; a label for each."""
    random = np.random.default_rng(9)
    for server, shift in zip(replicas, (0.0, 1.5), strict=True):
        values = (random.normal(size=2000) + shift).astype(np.float32)
        with server.client() as client:
            for part in values.reshape(4, 500):
                body = request(tensor("x", "FP32", [500], part.tolist()))
                headers = {"x-request-id": f"r{shift}"}
                client.post("/v2/models/m/infer", json=body, headers=headers)
            client.post("/v2/models/m/infer", json=request(tensor("y", "FP32", [1], [1.0])))
            client.post("/labels", json=[{"id": f"r{shift}/0", "label": 1, "model": "m"}])


def psi_of_all(replicas: list[Server]) -> float:
    """By the monitors' own function, of the counts that the replicas tell, added up."""
    counts: dict[str, int] = {}
    shares: dict[str, float] = {}
    for server in replicas:
        with server.client() as client:
            text = client.get("/metrics/bins").text
        for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            if 'feature="input:x"' not in labels:
                continue
            if name == "driftgate_feature_bin_total":
                counts[labels] = counts.get(labels, 0) + int(float(value))
            else:
                shares[labels] = float(value)
    assert sum(counts.values()) == 4000
    reference = np.array([round(shares[labels] * 1e12) for labels in counts])
    return float(psi(reference, np.array(list(counts.values()))))


def test_the_fleet_is_seen_as_one(replicas: list[Server], scraping: Prometheus) -> None:
    """Two replicas with different traffic: the PSI that Prometheus finds is that of their sum."""
    send_shifted(replicas)
    expected = psi_of_all(replicas)
    query = 'driftgate:psi:1h{feature="input:x"}'

    def found() -> float:
        answer = scraping.ask(query)
        return float(answer[0]["value"][1]) if answer else 0.0

    # An increase is stretched to the ends of its range, alike for all bins of a replica.
    wait_until(lambda: abs(found() / expected - 1) < 0.03, f"PSI {expected}", timeout_s=40)


def test_every_panel_has_an_answer(scraping: Prometheus) -> None:
    """Each query is understood; each panel shows something, but for what has not happened."""
    document = json.loads((RULES / "grafana.json").read_text())
    variables = {"$__rate_interval": "1m", "$model": ".*", "$version": ".*"}
    for panel in document["panels"]:
        answers = []
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in variables.items():
                query = query.replace(name, value)
            answers.append(scraping.ask(query))
        if panel["type"] != "row" and panel["title"] not in QUIET:
            assert any(answers), f"panel {panel['title']!r} shows nothing"
    scraping.ask(document["annotations"]["list"][0]["expr"].replace("$model", ".*"))


def test_every_rule_is_healthy(scraping: Prometheus) -> None:
    """By Prometheus's own word, after it has evaluated them."""
    groups = scraping.client.get("/api/v1/rules").json()["data"]["groups"]

    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
