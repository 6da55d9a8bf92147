"""A rollout in process: two workers' exposures, one controller, a clock that is moved by hand.

Requests are drawn here as the gateway would: a sticky unit, the candidate with its weight.
"""

# ruff: noqa: ARG002, ARG005  stand-ins take what they are given
import json
from random import Random

import numpy as np
import pytest

from gateway.controller import Controller
from gateway.decision import Readiness
from gateway.exposures import Exposures, unit_hash
from registry import changes, rollouts
from registry.revisions import Revisions
from registry.rollouts import Roll, rollout_of


class Known:
    """Versions 7 and 9 of a model, alike."""

    def models(self):
        return ["m"]

    def versions(self, model):
        return (7, 9)

    def digest(self, model, version):
        return f"sha256:{version:064}"

    def signature(self, model, version):
        return None

    def served(self, model):
        return 7


class Rig:
    """Two workers and a controller, with a clock that is moved by hand."""

    def __init__(self, tmp_path, plan, seed=1):
        self.state_dir, self.run_dir = tmp_path / "state", tmp_path / "run"
        self.now, self.random = 1000.0, Random(seed)
        self.ready = Readiness()
        self.deaths: dict[int, int | None] = {}
        self.alarms: list[str] = []
        self.revisions = Revisions(self.state_dir)
        self.plan = rollouts.parse_plan(plan)
        self.move(lambda s: rollouts.start(s, 9, self.plan, now=self.now, control=7))
        self.workers = [self.worker(k) for k in range(2)]
        self.controller = self.new_controller()

    def worker(self, k):
        return Exposures(self.state_dir, self.run_dir, f"host-{k}")

    def new_controller(self):
        return Controller(
            self.state_dir,
            self.run_dir,
            Known,
            "host",
            workers=lambda revision, model, version: self.ready,
            deaths=lambda pid: self.deaths.get(pid, 0),
            drifts=lambda model, versions: self.alarms,
            now=lambda: self.now,
            monotonic=lambda: self.now,
        )

    def move(self, move):
        changes.apply(
            self.revisions, Roll("m", None, move=move), known=Known(), actor="ana", via="cli"
        )

    @property
    def state(self):
        return self.revisions.head().models["m"]

    @property
    def rollout(self):
        return rollout_of(self.state)

    def second(self, requests=0, behave=lambda rng, is_candidate: (0.01, False, 0.5)):
        """One second: requests of sticky units, evidence written, one look."""
        rollout = self.rollout
        p = rollout.weight / 100
        for worker in self.workers:
            worker.follow({"m": rollout})
        for _ in range(requests):
            name = f"u{self.random.randrange(10**6)}"
            is_candidate = Random(f"{self.state.salts['split']}{name}").random() < p
            exposure = self.random.choice(self.workers).by_model["m"]
            met = exposure.begin(
                9 if is_candidate else 7, p if is_candidate else 1 - p, unit_hash(name.encode())
            )
            self.drawn(name, p if is_candidate else 1 - p, is_candidate=is_candidate)
            seconds, is_error, score = behave(self.random, is_candidate)
            x = np.array([[self.random.random()]])
            exposure.end(
                met,
                seconds,
                is_error=is_error,
                inputs=[x],
                outputs=[] if is_error else [self.answer(score)],
                names=(["x"], ["score"]),
            )
        for worker in self.workers:
            for exposure, data in worker.snapshots():
                assert exposure.write(data)
        self.controller.tick()
        self.now += 1.0

    def answer(self, score):
        """The one output of one row."""
        return np.array([[score + self.random.gauss(0, 1)]])

    def drawn(self, name, p, *, is_candidate):
        """A unit was given to a variant with a probability; for whoever looks."""

    def until(self, *phases, seconds=200, **kwargs):
        for _ in range(seconds):
            self.second(**kwargs)
            if self.rollout.phase in phases:
                return self.rollout
        pytest.fail(f"still {self.rollout.phase}: {self.status()}")

    def status(self):
        path = self.state_dir / "rollouts" / self.rollout.id / "status.json"
        return json.loads(path.read_bytes())
