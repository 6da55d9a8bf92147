"""The second act: a model trained on half a year wants the place of the one that answers.

Flights go by from July on, one a request, and whether they were late is told some hundred flights
later, as an airline would learn it. The server does the rest: copies first, then half of the
flights, then the place of the champion, each step only when the last one has shown enough.
"""

import shutil
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gateway.demo.months import name_of
from gateway.demo.sample import Sample, model_path, profile_path, request_of
from gateway.demo.screen import Screen
from gateway.demo.server import INFER, MODEL, Server
from gateway.errors import StartError
from gateway.outgoing import Connection

TRAINED_ON = "january_june"
VERSION = 2
FIRST_MONTH = 7
"""The first that it was not trained on."""
LATE_BY = 250
"""Flights that go by before it is known whether one was late."""
PLAN: dict[str, Any] = {
    "shadow_first": {
        "for_s": 0, "pairs_min": 300, "disagreement_max": 30,
        "compare": {"probability": {"threshold": 0.5}}, "inflight_max": 1000, "deadline_s": 10,
    },
    "steps": [{"weight": 50, "for_s": 0, "units_min": 300}],
    "guards": {
        "outcome": {"metric": "wrong", "margin": 0.05, "required": True},
        "output_shift": {"action": "ignore"},
        "drift": {"action": "ignore"},
    },
    "bake_s": 0,
}  # fmt: skip
"""It may answer otherwise, that is what it is for; the drift of the year is known by now."""

_FLIGHTS_A_SECOND = 400
"""The server looks at a rollout once a second: a month must not be over before it has looked."""
_ASKED_EVERY = 50
_OPEN_S_MAX = 30.0
_SHOWN_EVERY = 1000
_DONE = ("done", "baking")
_OVER = (*_DONE, "aborted", "failed", "holding")


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of the challenger."""

    status: dict[str, Any]
    """The rollout, as `GET /admin/rollouts/{model}` tells it."""
    shadow: dict[str, Any]
    """Its copies, as `GET /drift/{model}/shadows` tells them."""
    n_flights: int

    @property
    def is_promoted(self) -> bool:
        """Whether it has the champion's place."""
        return self.status["phase"] in _DONE


def play(screen: Screen, server: Server, flights: Sample) -> Ending:
    """Let the challenger try until it is promoted or stopped, or the year is over."""
    first = int(np.searchsorted(flights.month, FIRST_MONTH))
    screen.console.print("\n[bold]Second act: a challenger[/], trained on January to June")
    screen.say(
        f"Flights from {name_of(FIRST_MONTH)} on, one a request; whether they were late is told"
        f" {LATE_BY} flights later.\n"
    )
    with Connection(server.url) as connection:
        _start(connection, server.folder / "models" / MODEL)
        return _watched(screen, connection, flights, range(first, flights.n_rows))


def _start(connection: Connection, model: Path) -> None:
    """Keep the champion in its place, put version 2 beside it, and plan its rollout."""
    connection.call("POST", f"/admin/models/{MODEL}/promote", body={"version": 1})
    version = model / str(VERSION)
    version.mkdir()
    shutil.copyfile(profile_path(TRAINED_ON), version / "reference.json")
    shutil.copyfile(model_path(TRAINED_ON), version / "model.onnx")
    asked = {"model": MODEL, "version": VERSION, "plan": PLAN, "message": "retrained on June"}
    connection.call("POST", "/admin/rollouts", body=asked)
    deadline = time.monotonic() + _OPEN_S_MAX
    while connection.call("GET", f"/admin/rollouts/{MODEL}")["phase"] == "preparing":
        if time.monotonic() > deadline:
            raise StartError(f"the challenger was not opened within {_OPEN_S_MAX:g} s")
        time.sleep(0.05)


def _watched(screen: Screen, connection: Connection, flights: Sample, rows: range) -> Ending:
    """Send flight after flight, and labels behind; say when the rollout moves."""
    unknown: deque[int] = deque()
    stage: tuple[str, float] = ("", 0.0)
    status: dict[str, Any] = {}
    n_sent = 0
    start = time.monotonic()
    for n_sent, row in enumerate(rows, 1):
        time.sleep(max(0.0, start + n_sent / _FLIGHTS_A_SECOND - time.monotonic()))
        flight, name = request_of(flights, range(row, row + 1)), {"x-request-id": _id(row)}
        connection.call("POST", INFER, body=flight, headers=name)
        unknown.append(row)
        if len(unknown) >= 2 * LATE_BY:
            _label(connection, flights, [unknown.popleft() for _ in range(LATE_BY)])
        if n_sent % _ASKED_EVERY:
            continue
        status = connection.call("GET", f"/admin/rollouts/{MODEL}")
        if (now := (status["phase"], status["weight"])) != stage or n_sent % _SHOWN_EVERY == 0:
            stage = now
            screen.say(f"  {n_sent:6,} flights  {_stage(status)}")
        if status["phase"] in _OVER:
            break
    (shadow,) = connection.call("GET", f"/drift/{MODEL}/shadows")["shadows"]
    return Ending(status, shadow, n_sent)


def _label(connection: Connection, flights: Sample, rows: Sequence[int]) -> None:
    labels = [{"id": f"{_id(row)}/0", "label": int(flights.late[row])} for row in rows]
    connection.call("POST", "/labels", query={"model": MODEL}, body=labels)


def _id(row: int) -> str:
    return f"flight-{row}"


def _stage(status: dict[str, Any]) -> str:
    phase, weight = status["phase"], status["weight"]
    return {
        "shadowing": "gets copies of what the champion answers",
        "step": f"answers {weight:g} % of the flights",
        "baking": "is the champion",
        "done": "is the champion",
    }.get(phase, f"{phase}: {status['reason']}")


def told(ending: Ending) -> list[str]:
    """The evidence in sentences, a number only if the server told it."""
    shadow, evidence = ending.shadow, ending.status["evidence"]
    pairs = shadow["disagreement"]
    lines = [
        (
            f"Copies: of {pairs['n']:,} flights it called {pairs['differ']:,} otherwise, late or in"
            f" time ({100 * pairs['share']:.0f} %; {100 * pairs['allowed']:.0f} % were allowed)."
        )
    ]
    labels = shadow.get("labels") or {}
    if labels.get("units"):
        lines.append(
            f"Labels of {labels['units']:,} of them: the challenger alone was wrong on"
            f" {labels['shadow_alone']:,}, the champion alone on {labels['champion_alone']:,}."
        )
    for guard in evidence["guards"]:
        if (found := guard.get("outcome")) is None:
            continue
        best, low, high = found["difference"]
        lines.append(
            f"Its own answers: {100 * found['candidate']:.1f} % of {guard['candidate']['of']:,}"
            f" were wrong, {100 * found['control']:.1f} % of the champion's"
            f" {guard['control']['of']:,}. By the odds each flight was routed with, the difference"
            f" is {100 * best:+.1f} points, whenever one looks between {100 * low:+.1f} and"
            f" {100 * high:+.1f}."
        )
        if found["not_worse"]:
            lines.append(
                f"Not worse by {100 * found['margin']:.0f} points: odds of"
                f" {found['evidence_not_worse']:.0f} to 1, {found['evidence_needed']:.0f} needed."
            )
    if ending.is_promoted:
        lines.append(f"Promoted after {ending.n_flights:,} flights. Nobody had to watch.")
    else:
        lines.append(f"Not promoted: {ending.status['phase']}, {ending.status['reason']}.")
    return lines
