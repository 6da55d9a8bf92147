"""Rollouts over HTTP: start one, look at its evidence, and tell it what to do."""

import asyncio
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.controller import Drifts, notes_of, report
from gateway.endpoints.revisions import Door, Handlers, declared
from gateway.endpoints.route import Endpoint, JSONAnswer, json_object, query
from gateway.errors import BadRequestError, ChangeRefusedError, NotFoundError, shown
from gateway.prediction import DataPlane
from registry import names, rollouts
from registry.errors import RolloutError
from registry.revisions import Revision
from registry.rollouts import Roll, Rollout

_FIELDS = {"model": str, "version": int, "message": str, "force": bool, "take_over": bool}


class _Handlers(Handlers):
    """What each path does."""

    def __init__(self, plane: DataPlane, door: Door, drifts: Drifts) -> None:
        super().__init__(plane, door)
        self._drifts = drifts

    async def list_all(self, request: Request) -> Response:
        """The rollout of every model that has had one."""
        query(request)
        head = await self.door.read(lambda revisions: revisions.head())
        found = [rollouts.find(head.models, model) for model in sorted(head.models)]
        return JSONAnswer({"rollouts": [_brief(*each) for each in found if each is not None]})

    async def one(self, request: Request) -> Response:
        """One rollout, with its evidence."""
        query(request)
        model, rollout = await self._found(request.path_params["rollout"])
        said = await asyncio.to_thread(report, self.door.state_path, rollout)
        return JSONAnswer(
            {**_brief(model, rollout), "plan": msgspec.to_builtins(rollout.plan), **said}
        )

    async def start(self, request: Request) -> Response:
        """A new rollout."""
        given = await json_object(request)
        for name, value in given.items():
            if name != "plan" and name not in _FIELDS:
                there = ", ".join([*_FIELDS, "plan"])
                raise BadRequestError(f"no field {shown(name)} here; there are: {there}")
            if name != "plan" and type(value) is not _FIELDS[name]:
                raise BadRequestError(f"{name!r} must be of type {_FIELDS[name].__name__}")
        model, version = given.get("model"), given.get("version")
        if not model or names.version(str(version)) is None:
            raise BadRequestError("a rollout needs 'model' and 'version'")
        try:
            plan = rollouts.parse_plan(given.get("plan"))
        except RolloutError as error:
            raise ChangeRefusedError(str(error)) from None
        move = rollouts.starting(int(version or 0), plan, now=time.time())

        def notes(made: Revision) -> list[str]:
            champion = made.models[model].aliases.get("champion", 0)
            said = notes_of(self._drifts, model, (int(version or 0), champion))
            if plan.guards.outcome is not None and not self._plane.config.labels.sample:
                said.append("no predictions are kept for labels here (labels.sample is 0)")
            return said

        return await self.changed(request, given, lambda _: Roll(model, None, move=move), notes)

    def act(self, action: str) -> Any:
        """What somebody asks of a rollout."""

        async def answer(request: Request) -> Response:
            given = await json_object(request)
            for name in given:
                if name != "message":
                    raise BadRequestError(f"no field {shown(name)} here; there are: message")
            model, rollout = await self._found(request.path_params["rollout"])
            reason = str(given.get("message", ""))[:500]
            move = rollouts.asked(action, now=time.time(), reason=reason)
            del rollout
            return await self.changed(request, given, lambda _: Roll(model, None, move=move))

        return answer

    async def _found(self, name: str) -> tuple[str, Rollout]:
        head = await self.door.read(lambda revisions: revisions.head())
        found = rollouts.find(head.models, name)
        if found is None:
            raise NotFoundError(f"no rollout {shown(name)}; ask by its id, or by its model")
        return found


def endpoints(plane: DataPlane, door: Door, drifts: Drifts) -> list[Endpoint]:
    """Everything about rollouts; `drifts`: alarms that are open."""
    h = _Handlers(plane, door, drifts)
    one = "/admin/rollouts/{rollout}"
    admin: Any = declared
    return [
        Endpoint("GET", "/admin/rollouts", "admin", h.list_all,
                 "The newest rollout of every model.", answer="Rollouts"),
        admin("POST", "/admin/rollouts", h.start,
              "Start a rollout of a version, by a plan.", "RolloutRequest"),
        Endpoint("GET", one, "admin", h.one,
                 "One rollout (by id or model) with its evidence.", answer="Rollout"),
        admin("POST", one + "/pause", h.act("pause"), "Hold where it is.", "RolloutAction"),
        admin("POST", one + "/resume", h.act("resume"), "Go on.", "RolloutAction"),
        admin("POST", one + "/advance", h.act("advance"),
              "Take the next step now.", "RolloutAction"),
        admin("POST", one + "/abort", h.act("abort"),
              "Take all traffic from the candidate; always succeeds.", "RolloutAction"),
        admin("POST", one + "/promote", h.act("promote"),
              "Make the candidate champion now.", "RolloutAction"),
    ]  # fmt: skip


def _brief(model: str, rollout: Rollout) -> dict[str, Any]:
    tree: dict[str, Any] = msgspec.to_builtins(rollout)
    del tree["plan"]
    return {"model": model, "weight": rollout.weight, **tree}
