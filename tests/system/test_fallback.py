"""Variants that fail, over a real server: another one answers in time, and is asked at once."""

import re
import time
from pathlib import Path
from typing import Any

import httpx

from tests import models
from tests.serving import request, serve, tensor, wait_until

TWO, FIVE = (request(tensor("x", "FP32", [n, 1], list(range(n)))) for n in (2, 5))
ENDLESS = request(tensor("n", "INT64", [1], [10**15]))
FALLBACK = {"on": ["error", "timeout", "breaker"], "to": ["champion"]}


def changed(answer: httpx.Response) -> None:
    """A change that was made."""
    assert answer.status_code == 200, answer.text


def routed(http: httpx.Client, model: str, **route: Any) -> None:
    """A route in force."""
    changed(http.put(f"/admin/routes/{model}?wait=applied&timeout=10", json=route))


def said(answer: httpx.Response) -> dict[str, str]:
    """The decision as fields."""
    return dict(part.split("=", 1) for part in answer.headers["x-driftgate-decision"].split("; "))


def metric(http: httpx.Client, name: str, **labels: object) -> float:
    """A series of the exposition; 0 where it is not there yet."""
    wanted = {key: str(value) for key, value in labels.items()}
    lines = re.findall(rf"^{name}{{(.*)}} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    values = [v for text, v in lines if dict(re.findall(r'(\w+)="([^"]*)"', text)) == wanted]
    return float(values[0]) if values else 0.0


def requests_of(
    http: httpx.Client, model: str, version: int, variant: str, traffic: str, code: str
) -> float:
    """Requests that ended so."""
    labels = {"model": model, "version": version, "variant": variant}
    return metric(http, "driftgate_requests_total", **labels, traffic=traffic, code=code)


def test_time_over_is_time_for_another_and_one_time_holds_both(tmp_path: Path) -> None:
    """`timeout_s` of the route, of a header, of the message: never longer than the least."""
    models.put(tmp_path, "m", 1, models.rounds(3))
    models.put(tmp_path, "m", 2, models.rounds())
    settings = {"sync.poll_s": 0.1, "runtime.inline_s_max": 0}
    with serve(tmp_path, settings) as server, server.client() as http:

        def timed(body: Any = ENDLESS, **headers: str) -> tuple[httpx.Response, float]:
            start = time.monotonic()
            answer = http.post("/v2/models/m/infer", json=body, headers=headers)
            return answer, time.monotonic() - start

        changed(http.post("/admin/models/m/promote", json={"version": 1}))
        to_2: Any = [{"to": 2, "weight": 100}]
        routed(http, "m", split=to_2, timeout_s=0.6)
        late, took_s = timed()
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert "0.6 s" in late.json()["error"]
        assert 0.6 <= took_s < 1.6

        routed(http, "m", split=to_2, timeout_s=1.2, fallback={"to": ["champion"]})
        asked_us = {**ENDLESS, "parameters": {"timeout": 600_000}}
        for body, headers, first_s, total_s in (
            (ENDLESS, {}, 0.8, 1.2),
            (ENDLESS, {"x-request-timeout": "0.6"}, 0.4, 0.6),
            (asked_us, {}, 0.4, 0.6),
        ):
            answer, took_s = timed(body, **headers)
            assert answer.status_code == 200, answer.text
            assert said(answer)["reason"] == "FALLBACK(2)"
            assert answer.json()["model_version"] == "1"
            assert first_s * 0.95 <= took_s < total_s + 0.2, (took_s, headers)
        pinned = http.post(
            "/v2/models/m/versions/2/infer", json=ENDLESS, headers={"x-request-timeout": "0.3"}
        )
        assert pinned.status_code == 504  # Who names a version is answered by it.

        # Nobody gets more than the one time, also when the other one does not answer either.
        routed(http, "m", split=[{"to": 1, "weight": 100}], timeout_s=0.6, fallback={"to": [2]})
        models.put(tmp_path, "n", 1, models.rounds())
        models.put(tmp_path, "n", 2, models.rounds())
        wait_until(lambda: http.get("/v2/models/n").status_code == 200, "n is served")
        changed(http.post("/admin/models/n/promote", json={"version": 1}))
        routed(http, "n", split=[{"to": 2, "weight": 100}], timeout_s=0.6, fallback={"to": [1]})
        start = time.monotonic()
        answer = http.post("/v2/models/n/infer", json=ENDLESS)
        assert answer.status_code == 504
        assert 0.55 <= time.monotonic() - start < 1.2
        assert requests_of(http, "n", 2, "2", "primary", "deadline_exceeded") == 1
        assert requests_of(http, "n", 1, "1", "fallback", "deadline_exceeded") == 1


def test_a_breaker_spares_a_variant_that_fails_and_finds_out_when_it_is_well(
    tmp_path: Path,
) -> None:
    """Open: said in the decision, by explain, in the admin pages and metrics, and not asked."""
    models.put(tmp_path, "m", 1, models.identity("FP32", ("n", 1)))
    models.put(tmp_path, "m", 2, models.four_rows_at_most())
    route = {
        "split": [{"to": 2, "weight": 100}],
        "fallback": FALLBACK,
        "breaker": {"requests_min": 4, "open_s": 60, "probes": 2},
    }
    with serve(tmp_path, {"sync.poll_s": 0.1}) as server, server.client() as http:

        def reason(body: Any, status: int = 200, path: str = "") -> str:
            answer = http.post(f"/v2/models/m{path}/infer", json=body)
            assert answer.status_code == status, answer.text
            return said(answer)["reason"]

        def states() -> list[str]:
            return [each["breaker"] for each in http.get("/admin/models/m").json()["versions"]]

        changed(http.post("/admin/models/m/promote", json={"version": 1}))
        routed(http, "m", **route)
        wrong = request(tensor("x", "FP32", [2, 2], [0] * 4))
        for _ in range(6):  # Neither what clients did nor calls by number.
            assert reason(wrong, 400) == "SPLIT"
            assert reason(FIVE, 500, "/versions/2") == "PINNED"
        assert [reason(FIVE) for _ in range(4)] == ["FALLBACK(2)"] * 4
        assert states() == ["closed", "open"]
        runs = metric(http, "driftgate_run_seconds_count", model="m", version=2)
        assert [reason(TWO) for _ in range(5)] == ["BREAKER(2)"] * 5
        explained = http.post("/admin/routes/m/explain", json={}).json()["decision"]
        assert (explained["reason"], explained["version"]) == ("BREAKER(2)", "1")
        assert metric(http, "driftgate_run_seconds_count", model="m", version=2) == runs
        assert metric(http, "driftgate_breaker_open", model="m", version=2) == 1
        assert metric(http, "driftgate_breaker_opened_total", model="m", version=2) == 1
        assert requests_of(http, "m", 2, "2", "primary", "breaker_open") == 5
        assert requests_of(http, "m", 2, "2", "primary", "model_failed") == 4
        assert requests_of(http, "m", 1, "champion", "fallback", "ok") == 9

        # Another route's rules count at once, whoever is open by those before.
        breaker = {"requests_min": 4, "open_s": 0.1, "probes": 2}
        routed(http, "m", **route | {"breaker": breaker})
        wait_until(lambda: reason(TWO) == "SPLIT", "a probe is let through")
        assert states() == ["closed", "half_open"]
        assert reason(TWO) == "SPLIT"
        assert states() == ["closed", "closed"]
        assert metric(http, "driftgate_breaker_open", model="m", version=2) == 0
        opened_event, closed_event = server.events("breaker_opened", "breaker_closed")
        assert (opened_event["event"], closed_event["event"]) == (
            "breaker_opened",
            "breaker_closed",
        )

        # The last that can answer is asked, however it fails: a 500 is an answer too.
        routed(http, "m", **route | {"fallback": FALLBACK | {"to": [2]}})
        assert {reason(FIVE, 500) for _ in range(8)} == {"SPLIT"}
        assert states() == ["closed", "closed"]


def test_an_open_breaker_and_a_run_without_end_take_a_candidate_out_at_once(
    tmp_path: Path,
) -> None:
    """No guard of errors is asked: one opens its breaker, the other holds up the event loop."""
    for name, first, second in (
        ("fails", models.identity("FP32", ("n", 1)), models.four_rows_at_most()),
        ("loops", models.rounds(3), models.rounds()),
    ):
        models.put(tmp_path, name, 1, first)
        models.put(tmp_path, name, 2, second)
    plan = {
        "steps": [{"weight": 50, "for_s": 0, "units_min": 10_000}],
        "guards": {"error_rate": {"action": "ignore"}, "slow_requests": {"action": "ignore"}},
    }
    breaker = {"requests_min": 3, "error_share": 100, "open_s": 60}
    with serve(tmp_path, {"sync.poll_s": 0.1}) as server, server.client() as http:
        for name in ("fails", "loops"):
            changed(http.post(f"/admin/models/{name}/promote", json={"version": 1}))
        routed(http, "fails", fallback=FALLBACK, breaker=breaker)
        for name in ("fails", "loops"):
            started = http.post("/admin/rollouts", json={"model": name, "version": 2, "plan": plan})
            changed(started)

        def phase(name: str, body: Any) -> dict[str, Any]:
            http.post(f"/v2/models/{name}/infer", json=body, headers={"x-request-timeout": "1.5"})
            found: dict[str, Any] = http.get(f"/admin/rollouts/{name}").json()
            return found if found["phase"] == "aborted" else {}

        aborted = wait_until(lambda: phase("fails", FIVE), "an aborted rollout", 30)
        assert "breaker of version 2 has opened" in aborted["reason"]
        aborted = wait_until(lambda: phase("loops", ENDLESS), "an aborted rollout", 30)
        assert "did not end a run" in aborted["reason"]
        assert http.post("/v2/models/fails/infer", json=FIVE).status_code == 200
