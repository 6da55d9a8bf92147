"""Shadows of a real server with two workers: whatever they do, everybody is answered."""

import itertools
import json
import os
import random
import signal
import threading

import httpx

from gateway.exposures import Slot
from registry import changes
from registry.revisions import Revisions
from registry.routes import Shadow
from tests import models
from tests.serving import driftgate, request, serve, tensor, wait_until

ROWS = 5
"""More than `four_rows_at_most` can take."""
SHADOWS = {
    "equal": models.plus(0),
    "differs": models.plus(3),
    "slow": models.slow(n_rounds=1500),
    "errs": models.four_rows_at_most(),
    "endless": models.round_and_round(),
}
ROLLOUTS = {"first_equal": "step", "first_differs": "aborted"}
"""Candidates whose plan has copies first, and where that leads to."""
FIRST = {"for_s": 0, "pairs_min": 100, "action": "abort"}


class Users:
    """Users who come and go, asking one model after the other, until told to stop."""

    def __init__(self, server, names, *, n=2):
        self.failed: list[str] = []
        self.answered = 0
        self.is_over = threading.Event()
        self.names = names
        self.threads = [threading.Thread(target=self._ask, args=(server, k)) for k in range(n)]

    def _ask(self, server, seed):
        rng = random.Random(seed)
        with server.client() as http:
            while not self.is_over.is_set():
                for name in self.names:
                    values = [[1e15 if name == "endless" else rng.gauss(0, 1)] for _ in range(ROWS)]
                    body = request(tensor("x", "FP32", [ROWS, 1], values))
                    headers = {"x-user-id": f"u{rng.randrange(10**9)}"}
                    try:
                        got = http.post(f"/v2/models/{name}/infer", json=body, headers=headers)
                    except httpx.HTTPError as error:
                        self.failed.append(repr(error))
                        continue
                    if got.status_code != 200 or (
                        name in SHADOWS and "; version=1;" not in said(got)
                    ):
                        self.failed.append(got.text)
                    self.answered += 1
                self.is_over.wait(0.01)  # a rate that leaves the machine to others

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        for thread in self.threads:
            thread.join(30)


def shadow_of(http, model):
    (found,) = http.get(f"/drift/{model}/shadows").json()["shadows"]
    return found


def made(tmp_path):
    """A registry with a champion and a shadow for each kind, and candidates for rollouts."""
    registry = tmp_path / "models"
    for name in (*SHADOWS, *ROLLOUTS):
        models.put(registry, name, 1, models.plus(0))
        other = models.plus(3 if name == "first_differs" else 0)
        models.put(registry, name, 2, SHADOWS.get(name, other))
    known, chain = changes.OnDisk(registry), Revisions(registry / ".driftgate")
    for name in (*SHADOWS, *ROLLOUTS):
        change(chain, changes.Promote(name, 1), known)
    for name in SHADOWS:
        # Each copy of some takes its time: few are enough.
        sample = 3 if name in ("slow", "endless") else 100
        # One takes 80 ms at the least, on an idle machine.
        deadline_s = 0.02 if name == "slow" else 0.3
        shadow = Shadow(to=2, deadline_s=deadline_s, inflight_max=64, sample=sample)
        if name != "equal":
            change(chain, changes.PutShadow(name, shadow), known)
    words = ("--deadline-s", "0.3", "--inflight-max", "64", "-r", str(registry))
    started = driftgate("shadow", "start", "equal", "2", *words)
    assert started.returncode == 0, started.stderr
    assert "equal route.shadow[0].to none -> 2" in started.stdout
    assert "undo: driftgate restore" in started.stdout
    return registry


def change(chain, made, known):
    changes.apply(chain, made, known=known, actor="ana", via="cli", force=True)


def test_five_shadows_are_judged_and_everybody_is_answered(tmp_path) -> None:
    """Equal: ok. Differs, errs: breach. Slow, endless: dropped at the deadline, load-biased. Nobody
    fails; counts add up over two workers and survive the death of one; a crash bars its shadow.
    """
    registry = made(tmp_path)
    with (
        serve(
            registry,
            flags=("--port", "0", "--workers", "2"),
            expected_failures=("worker_ended",),
        ) as server,
        server.client() as http,
    ):
        for name in ROLLOUTS:
            body = {"model": name, "version": 2, "plan": {"shadow_first": FIRST}}
            assert http.post("/admin/rollouts", json=body).status_code == 200
        with Users(server, [*SHADOWS, *ROLLOUTS]) as users:
            wait_until(lambda: shadow_of(http, "equal")["verdict"] == "ok", "equal is ok", 40)
            for name in ("slow", "endless"):
                wait_until(lambda name=name: late(http, name), f"{name} is late", 20)
            for name, phase in ROLLOUTS.items():
                wait_until(lambda name=name, phase=phase: at(http, name) == phase, name, 20)
            found = {name: shadow_of(http, name) for name in SHADOWS}
        assert not users.failed, users.failed[:3]
        assert found["equal"]["disagreement"]["differ"] == 0
        assert found["differs"]["verdict"] == found["errs"]["verdict"] == "breach"
        assert found["differs"]["outputs"]["y"]["rows_differ"] == found["differs"]["rows"]["differ"]
        apart = found["differs"]["differences"]["y"]
        assert abs(apart["mean"] - 3) < 1e-3
        assert apart["low"] is None or apart["low"] <= apart["mean"] <= apart["high"]
        assert found["errs"]["requests"]["failed"] == found["errs"]["requests"]["compared"] > 0
        for name in ("slow", "endless"):
            assert found[name]["verdict"] == "inconclusive", found[name]
            assert found[name]["coverage"]["load_biased"]
        # By any worker: what both have counted, once each.
        text = http.get("/metrics").text
        counted = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("driftgate_shadow_") and 'model="equal"' in line
        }
        pairs = shadow_of(http, "equal")["requests"]["compared"]
        assert (
            sum(n for name, n in counted.items() if "pairs_total" in name) >= pairs - users.answered
        )
        assert 'traffic="shadow",variant="2"' in text

        told = driftgate("shadow", "report", "differs", "-r", str(registry))
        assert told.returncode == 5, told.stdout
        assert "units disagree" in told.stdout
        plain = json.loads(
            driftgate("shadow", "report", "equal", "--json", "-r", str(registry)).stdout
        )
        assert plain["shadows"][0]["verdict"] == "ok"

        # kill -9: what was counted stays, and is added to.
        before = shadow_of(http, "equal")["disagreement"]["n"]
        kill(http, beats(http)[0], signal.SIGKILL)
        with Users(server, ["equal"]) as users, server.client() as other:
            wait_until(lambda: compared(other, "equal") > before, "more pairs", 20)
        assert not users.failed, users.failed[:3]
        assert shadow_of(http, "equal")["verdict"] == "ok"

        # A crash while a shadow runs: it took its worker with it, and is not run again by any.
        with Users(server, ["slow"], n=1):
            victim = wait_until(lambda: running(registry, "slow"), "a run")
            kill(http, victim, signal.SIGSEGV)
            with server.client() as other:
                wait_until(lambda: barred(other, "slow"), "the shadow is barred", 20)
        assert "SIGSEGV" in shadow_of(http, "slow")["reason"]
        with Users(server, ["slow"]) as users:
            wait_until(lambda: users.answered > 200, "answers", 20)
        assert not users.failed, users.failed[:3]
    assert Revisions(registry / ".driftgate").head().models["equal"].aliases["champion"] == 1


def test_a_report_says_where_they_differ_and_by_labels_who_is_right(tmp_path) -> None:
    """They differ below zero alone, where the shadow is right; its rows are in its own monitors."""
    registry = tmp_path / "models"
    models.put(registry, "m", 1, models.plus(0))
    models.put(registry, "m", 2, models.not_negative())
    assert driftgate("promote", "m", "1", "-r", str(registry)).returncode == 0
    shadow = {"inflight_max": 500, "deadline_s": 20, "compare": {"y": {"atol": 0.001}}}
    settings = {"labels.sample": 100, "monitor.adopt_rows": 100}
    with serve(registry, settings) as server, server.client() as http:
        rng = random.Random(1)

        def ask(k):
            x = rng.gauss(0, 1)
            body = request(tensor("x", "FP32", [1, 1], [[x]]))
            headers = {"x-request-id": f"r{k}"}
            assert http.post("/v2/models/m/infer", json=body, headers=headers).status_code == 200
            return {"id": f"r{k}", "label": max(x, 0.0) + 0.01}

        for k in range(120):  # What the champion's reference is made of.
            ask(f"before-{k}")
        wait_until(lambda: http.get("/drift/m").json().get("reference"), "a reference")
        url = "/admin/models/m/shadows/2?wait=applied"
        assert http.put(url, json={"sample": 101}).status_code == 400
        assert http.put("/admin/models/m/shadows/none", json={}).status_code == 400
        assert http.put(url, json=shadow).status_code == 200
        assert http.put(url, json=shadow).json()["changed"] is False
        numbers = itertools.count()
        wait_until(lambda: ask(next(numbers)) and sampled(http, "m"), "the first copy")
        labels = [ask(next(numbers)) for _ in range(250)]
        wait_until(lambda: shadow_of(http, "m")["requests"]["compared"] > 250, "pairs", 20)
        assert http.post("/labels", json=labels).status_code == 200

        found = shadow_of(http, "m")
        text = http.get("/metrics").text
        adopted = "/drift/m?version=2"
        wait_until(lambda: http.get(adopted).json().get("reference"), "of its own rows")
        told = driftgate("shadow", "report", "m", "2", "--server", server.url)
        assert told.returncode == 5
        assert f"wrong alone, the champion {found['labels']['champion_alone']}" in told.stdout
        assert "worst      input:x" in told.stdout
        ended = driftgate("shadow", "stop", "m", "2", "--server", server.url)
        assert "m route.shadow[0].to 2 -> none" in ended.stdout
        assert http.delete(url).status_code == 404
    below = sum(label["label"] == 0.01 for label in labels)
    assert found["verdict"] == "breach"
    assert found["disagreement"]["differ"] >= below - 1
    assert found["labels"]["shadow_alone"] == 0
    assert found["labels"]["champion_alone"] >= below - 1
    assert found["labels"]["better"]
    assert found["worst_bins"][0]["channel"] == "input:x"
    assert found["worst_bins"][0]["share"] == 1
    low, mean, high = (found["differences"]["y"][name] for name in ("low", "mean", "high"))
    assert low < 0.4 < high  # the mean of the negative half of a normal: 1 / sqrt(2 pi)
    assert low < mean < high
    assert 'driftgate_requests_total{code="ok",model="m",traffic="shadow"' in text


def sampled(http, model):
    return shadow_of(http, model)["coverage"]["sampled"]


def said(got):
    return got.headers["x-driftgate-decision"]


def late(http, model):
    """Copies that were not done by their deadline."""
    return shadow_of(http, model)["coverage"]["dropped"].get("deadline_exceeded", 0)


def at(http, model):
    """The phase of its rollout."""
    return http.get(f"/admin/rollouts/{model}").json()["phase"]


def compared(http, model):
    try:
        return shadow_of(http, model)["disagreement"]["n"]
    except httpx.HTTPError:  # its worker is gone
        return 0


def barred(http, model):
    try:
        return "SIGSEGV" in shadow_of(http, model)["reason"]
    except httpx.HTTPError:
        return False


def running(registry, model):
    """The process that runs a shadow at this moment."""
    for path in (registry / ".driftgate").rglob(f"in_hand/shadow.{model}.*"):
        found = Slot.read(path)
        if found and found.running[0] > 0:
            return found.pid
    return None


def kill(http, victim, number):
    """End a worker, and wait for the one that takes its place."""
    os.kill(victim, number)
    wait_until(lambda: len(beats(http)) == 2 and victim not in beats(http), "a new worker", 20)


def beats(http):
    try:
        return [each["pid"] for each in http.get("/admin/state").json()["workers"]]
    except httpx.HTTPError:
        return []
