"""The protocol's model repository: what is there, loaded and unloaded by name.

Loading and unloading are revisions like all other changes, so that every worker follows, and those
that come later; an answer comes when all that live have it in force.
"""

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.access import admin
from gateway.endpoints.revisions import Door
from gateway.endpoints.route import Endpoint, JSONAnswer, json_object
from gateway.errors import (
    BadRequestError,
    NotAppliedError,
    NotReadyError,
    VersionNotFoundError,
    shown,
)
from gateway.prediction import DataPlane
from gateway.router import Model
from registry import changes, names
from registry.changes import Change
from registry.workers import Heartbeat

_APPLIED_S_MAX = 30.0


def endpoints(plane: DataPlane, door: Door) -> list[Endpoint]:
    """The index for everybody who predicts; loading and unloading for admins."""

    async def list_all(request: Request) -> Response:
        only_ready = (await json_object(request)).get("ready", False)
        if type(only_ready) is not bool:
            raise BadRequestError("'ready' must be true or false")
        return JSONAnswer(index(plane, only_ready=only_ready))

    async def load_one(request: Request) -> Response:
        parameters = await _parameters(request)
        await load(plane, door, request.path_params["model"], parameters, "http")
        return JSONAnswer({})

    async def unload_one(request: Request) -> Response:
        parameters = await _parameters(request)
        await unload(plane, door, request.path_params["model"], parameters, "http")
        return JSONAnswer({})

    one = "/v2/repository/models/{model}"
    return [
        Endpoint("POST", "/v2/repository/index", "predict", list_all,
                 "Every version in the registry and its state.", body="Any",
                 answer="Index"),
        Endpoint("POST", one + "/load", "admin", load_one,
                 "Open a model on every worker: the version that answers, or the one named.",
                 body="Any"),
        Endpoint("POST", one + "/unload", "admin", unload_one,
                 "Close all versions of a model on every worker until it is loaded again.",
                 body="Any"),
    ]  # fmt: skip


def index(plane: DataPlane, *, only_ready: bool = False) -> list[dict[str, str]]:
    """Name, version and state of every version in the registry.

    READY is what can be called. A version that nobody has called is: its first call opens it.
    """
    is_complete = plane.table.is_complete
    entries = [
        {"name": model.name, "version": str(version)} | _state(model, version, is_complete)
        for model in plane.table.models.values()
        for version in model.versions
    ]
    return [entry for entry in entries if entry["state"] == "READY" or not only_ready]


async def load(
    plane: DataPlane, door: Door, name: str, parameters: Mapping[str, Any], via: str
) -> None:
    """Have a model open on every worker: the version that answers, and `parameters.version`.

    It is opened here first: what cannot be opened changes nothing.

    Raises
    ------
    BadRequestError : a parameter that means something else here than in Triton.
    ModelNotFoundError, VersionNotFoundError, VersionRefusedError, NotReadyError
    StorageError : the state cannot be written.
    NotAppliedError : it is written, and not every worker has it in force in time.
    """
    for parameter in parameters:
        if parameter == "config" or parameter.startswith("file:"):
            raise BadRequestError(
                f"parameter {shown(parameter)} is not taken: models are served as the registry"
                " holds them"
            )
    _refuse_unknown(parameters, "version")
    version = parameters.get("version")
    number = None if version is None else names.version(str(version))
    if version is not None and number is None:
        raise VersionNotFoundError(name, str(version), plane.table.model(name).versions)
    if plane.try_version is None:
        raise NotReadyError("the registry is still being opened; retry")
    variant = await plane.try_version(name, number)
    entry = f"{name}@{variant.version}"
    await _put_in_force(door, changes.Load(name, number), via, lambda beat: entry in beat.loaded)
    del variant  # Held until others hold it.


async def unload(
    plane: DataPlane, door: Door, name: str, parameters: Mapping[str, Any], via: str
) -> None:
    """Close every version of a model on every worker, once what waits there is answered.

    Raises
    ------
    BadRequestError, ModelNotFoundError, NotReadyError, StorageError, NotAppliedError
    """
    _refuse_unknown(parameters, "unload_dependents")
    plane.table.model(name)
    await _put_in_force(
        door,
        changes.Unload(name),
        via,
        lambda beat: not any(entry.startswith(f"{name}@") for entry in beat.loaded),
    )


async def _put_in_force(
    door: Door, change: Change, via: str, is_done: Callable[[Heartbeat], bool]
) -> None:
    """Write a change, and wait until every live worker has it in force and has done it."""
    applied = await door.change(lambda _: change, actor=admin().name, via=via, dry_run=False)
    number = applied.revision.number
    is_applied, laggards = await door.laggards(number, _APPLIED_S_MAX, is_done)
    if not is_applied:
        undo = f"; undo: {applied.undo}" if applied.undo else ""
        behind = "; ".join(laggards) or "no worker is known to live"
        raise NotAppliedError(f"revision {number} is not in force everywhere: {behind}{undo}")


async def _parameters(request: Request) -> Mapping[str, Any]:
    parameters = (await json_object(request)).get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequestError("'parameters' must be an object")
    return parameters


def _refuse_unknown(parameters: Mapping[str, Any], known: str) -> None:
    for parameter in parameters:
        if parameter != known:
            raise BadRequestError(f"no parameter {shown(parameter)} here; there is: {known}")


def _state(model: Model, version: int, is_complete: bool) -> dict[str, str]:
    if model.is_unloaded:
        return {"state": "UNAVAILABLE", "reason": "unloaded"}
    if version in model.refused:
        return {"state": "UNAVAILABLE", "reason": model.refused[version]}
    if not is_complete and version not in model.variants:
        return {"state": "LOADING", "reason": ""}
    return {"state": "READY", "reason": ""}
