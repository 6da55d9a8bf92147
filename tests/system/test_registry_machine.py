"""A real server against a model of what must answer: any sequence of changes, good and bad."""

import json
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gateway import publisher
from tests import models
from tests.serving import request, serve, tensor, wait_until

ONE = request(tensor("x", "FP32", [1], [0]))
MANY = 40
"""Requests under a split into halves: nobody is missed but once in 5e11."""
VERSIONS = st.integers(1, 9)


@dataclass(frozen=True)
class State:
    """What a revision says of the model: written here apart from the registry's own."""

    follow: bool = True
    aliases: dict[str, int] = field(default_factory=dict)
    pins: frozenset[int] = frozenset()
    half: int | None = None
    """The version that gets half of the traffic."""
    loaded: bool | None = None

    @property
    def must_open(self) -> set[int]:
        """Without these it is not put in force. A way back that is gone bars no way forward."""
        if self.loaded is False:
            return set()
        named = {n for alias, n in self.aliases.items() if alias != "previous"}
        if self.follow:
            named = set()
        return named | self.pins | ({self.half} if self.half else set())


class Registry(RuleBasedStateMachine):
    """Every step goes through the server or the directory; then what answers is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.root = Path(tempfile.mkdtemp(prefix="driftgate-machine-"))
        self.good: set[int] = {1}
        self.bad: set[int] = set()
        self.head = State()
        self.in_force = State()
        self.served: int | None = 1
        self.told: dict[int, State] = {0: State()}

    @initialize()
    def start(self) -> None:
        """One server for the whole sequence."""
        models.put(self.root, "m", 1, models.constant(1))
        models.put(self.root, "still", 1, models.constant(7))
        self.server = self.stack.enter_context(serve(self.root, {"sync.poll_s": 0.05}))
        self.client = self.stack.enter_context(self.server.client(timeout=60))
        self._check()

    def teardown(self) -> None:
        """End it; it must end well."""
        self.stack.close()
        shutil.rmtree(self.root)

    # -- what comes into the directory

    @rule(kind=st.sampled_from(["copied", "published", "no model", "cut"]))
    def add(self, kind: str) -> None:
        """One more version, by hand or published, whole or not."""
        number = max(self.good | self.bad) + 1
        content = models.constant(number)
        if kind == "published":
            file = self.root / ".next.onnx"
            file.write_bytes(content)
            assert publisher.publish(self.root, "m", file).version == number
        else:
            whole = {"no model": b"no model", "cut": content[: len(content) // 2]}
            staged = models.put(self.root, ".staged", number, whole.get(kind, content))
            staged.rename(self.root / "m" / str(number))
        is_good = kind in {"copied", "published"}
        (self.good if is_good else self.bad).add(number)
        wait_until(lambda: number in self._versions(), f"version {number} is seen", 30)
        self._bring()
        self._check()

    # -- changes

    @precondition(lambda self: self.head.loaded is not False)
    @rule(version=VERSIONS)
    def promote(self, version: int) -> None:
        """Also to what is not there, and to what cannot be opened."""
        answer = self._post("/admin/models/m/promote", {"version": version})
        if self._is_there(version, answer):
            state = self._managed()
            self._written(answer, replace(state, aliases=_promoted(state.aliases, version)))

    @precondition(lambda self: self.head.loaded is not False)
    @rule()
    def rollback(self) -> None:
        """To the champion before, if there is one."""
        answer = self._post("/admin/models/m/rollback", {})
        state = self._managed()
        if "previous" not in state.aliases:
            assert answer.status_code == 400, answer.text
            self._check()
            return
        aliases = state.aliases | {"champion": state.aliases["previous"]}
        self._written(answer, replace(state, aliases=aliases))

    @precondition(lambda self: self.head.loaded is not False)
    @rule(version=VERSIONS)
    def name(self, version: int) -> None:
        """An alias that answers nobody, and must be open."""
        answer = self.client.put(
            "/admin/models/m/aliases/blue?wait=applied", json={"version": version}
        )
        if self._is_there(version, answer):
            state = self._managed()
            self._written(answer, replace(state, aliases=state.aliases | {"blue": version}))

    @precondition(lambda self: self.head.loaded is not False)
    @rule(version=st.one_of(st.none(), VERSIONS))
    def split(self, version: int | None) -> None:
        """Half of the traffic to a version by its number; or the route goes."""
        path = "/admin/routes/m?wait=applied"
        if version is None:
            answer = self.client.delete(path)
            if self.head.half is None:
                assert answer.status_code == 404
                return
            self._written(answer, replace(self.head, half=None))
            return
        shares = [{"to": "champion", "weight": "rest"}, {"to": version, "weight": 50}]
        answer = self.client.put(path, json={"split": shares})
        if self._is_there(version, answer):
            self._written(answer, replace(self._managed(), half=version))

    @precondition(lambda self: self.head.loaded is not False)
    @rule()
    def follow(self) -> None:
        """The highest version that can be opened answers again; a route stays."""
        answer = self._post("/admin/models/m/follow", {})
        self._written(answer, replace(self.head, follow=True))

    @rule(version=VERSIONS, keep=st.booleans())
    def pin(self, version: int, keep: bool) -> None:
        """Kept in memory, or let go."""
        what = "pin" if keep else "unpin"
        answer = self._post(f"/admin/models/m/{what}", {"version": version})
        if not keep:
            self._written(answer, replace(self.head, pins=self.head.pins - {version}))
        elif self._is_there(version, answer):
            self._written(answer, replace(self.head, pins=self.head.pins | {version}))

    @rule(back=st.integers(1, 5))
    def restore(self, back: int) -> None:
        """What one of the last revisions said."""
        known = sorted(self.told)
        number = known[max(0, len(known) - 1 - back)]
        answer = self._post(f"/admin/revisions/{number}/restore", {"model": "m"})
        if answer.status_code == 404:  # nothing was said of it, and nothing is now
            assert number == 0
            return
        self._written(answer, self.told[number])

    @rule(version=st.one_of(st.none(), VERSIONS))
    def load(self, version: int | None) -> None:
        """What cannot be opened changes nothing."""
        body = {"parameters": {} if version is None else {"version": version}}
        answer = self.client.post("/v2/repository/models/m/load", json=body)
        tried = version or self._would_answer()
        if tried not in self.good | self.bad:
            assert answer.status_code == 404, answer.text
        elif tried in self.bad:
            assert answer.status_code == 503, answer.text
        else:
            pins = self.head.pins | ({version} if version else set())
            self._repository(answer, replace(self.head, loaded=True, pins=frozenset(pins)))
            return
        self._check()

    @rule()
    def unload(self) -> None:
        """Nothing of it answers, whatever was said before."""
        answer = self.client.post("/v2/repository/models/m/unload")
        self._repository(answer, replace(self.head, loaded=False, pins=frozenset()))

    # -- the model

    def _would_answer(self) -> int:
        state = self.in_force
        there = self.good | self.bad
        return max(there) if state.follow else state.aliases["champion"]

    def _managed(self) -> State:
        """Who takes the wheel finds it where it is."""
        if not self.head.follow:
            return self.head
        champion = self.served or self.head.aliases.get("champion") or max(self.good | self.bad)
        return replace(self.head, follow=False, aliases=self.head.aliases | {"champion": champion})

    def _bring(self) -> None:
        """Put the head in force if it can be; who follows moves, and that is written down."""
        if self.head.must_open <= self.good:
            self.in_force = self.head
        state, before = self.in_force, self.served
        if state.loaded is False:
            self.served = None
            return
        self.served = max(self.good) if state.follow else state.aliases["champion"]
        if state.follow and self.head.follow and before not in {None, self.served}:
            aliases = self.head.aliases
            if aliases.get("champion") != self.served:
                self.head = replace(self.head, aliases=_promoted(aliases, self.served))
                wait_until(
                    lambda: self._said()["models"]["m"].get("aliases") == self.head.aliases,
                    "the move is written down",
                )
                self.told[self._said()["revision"]] = self.head
                if self.head.must_open <= self.good:
                    self.in_force = self.head

    def _written(self, answer: httpx.Response, state: State) -> None:
        """A change was made, whether or not it can be put in force."""
        can_be = state.must_open <= self.good
        assert answer.status_code == (200 if can_be else 202), (answer.text, state)
        self.head = state
        self.told[answer.json()["revision"]] = state
        self._bring()
        self._check()

    def _repository(self, answer: httpx.Response, state: State) -> None:
        can_be = state.must_open <= self.good
        assert answer.status_code == (200 if can_be else 503), (answer.text, state)
        self.head = state
        self.told[self._said()["revision"]] = state
        self._bring()
        self._check()

    def _is_there(self, version: int, answer: httpx.Response) -> bool:
        if version in self.good | self.bad:
            return True
        assert answer.status_code in {400, 404}, answer.text
        self._check()
        return False

    # -- the server

    def _check(self) -> None:
        """Who answers, what is in force, and that nobody else was touched."""
        is_whole = self.head.must_open <= self.good
        wait_until(lambda: self._is_observed() == is_whole, f"in force: {is_whole}")
        # What has just come is opened a moment after it is seen.
        wait_until(
            lambda: self._said()["models"]["m"]["served"] == self.served,
            f"{self.served} answers: {self.head}, {self.in_force}",
        )
        about = self._said()["models"]["m"]
        assert about["follow"] == self.head.follow
        assert about.get("aliases", {}) == self.head.aliases
        assert set(about.get("pins", ())) == self.head.pins
        assert about.get("loaded") == self.head.loaded
        expected: set[object] = {self.served or "not_ready"}
        if self.in_force.half and self.served:
            expected = {self.served, self.in_force.half}
        n = MANY if len(expected) > 1 else 2
        assert {self._ask("m") for _ in range(n)} == expected
        assert self._ask("still") == 7
        for number in self.bad:
            is_open = self.in_force.loaded is not False
            assert self._ask(f"m/versions/{number}") == (
                "version_refused" if is_open else "not_ready"
            )

    def _ask(self, path: str) -> object:
        told = self.client.post(f"/v2/models/{path}/infer", json=ONE).json()
        return int(told["outputs"][0]["data"][0]) if "outputs" in told else told["code"]

    def _said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.client.get("/admin/state").content)
        return found

    def _is_observed(self) -> bool:
        said = self._said()
        (worker,) = said["workers"]
        return bool(worker["observed"] == said["revision"])

    def _versions(self) -> list[int]:
        return list(self._said()["models"]["m"]["versions"])

    def _post(self, path: str, body: dict[str, object]) -> httpx.Response:
        return self.client.post(f"{path}?wait=applied", json=body)


def _promoted(aliases: dict[str, int], version: int) -> dict[str, int]:
    before = aliases.get("champion")
    kept = {"previous": before} if before not in {None, version} else {}
    return {**aliases, **{k: n for k, n in kept.items() if n is not None}, "champion": version}


class TestRegistry(Registry.TestCase):
    """Eight sequences of twenty steps."""

    settings = settings(
        max_examples=8,
        stateful_step_count=20,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
