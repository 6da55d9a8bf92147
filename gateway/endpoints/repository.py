"""The protocol's model repository: what is there, loaded and unloaded by name."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoints.route import Endpoint, JSONAnswer, json_object
from gateway.errors import BadRequestError, NotReadyError, VersionNotFoundError, shown
from gateway.prediction import DataPlane
from gateway.router import Model
from registry import names


def endpoints(plane: DataPlane) -> list[Endpoint]:
    """The index for everybody who predicts; loading and unloading for admins."""

    async def list_all(request: Request) -> Response:
        only_ready = (await json_object(request)).get("ready", False)
        if type(only_ready) is not bool:
            raise BadRequestError("'ready' must be true or false")
        return JSONAnswer(index(plane, only_ready=only_ready))

    async def load_one(request: Request) -> Response:
        await load(plane, request.path_params["model"], await _parameters(request))
        return JSONAnswer({})

    async def unload_one(request: Request) -> Response:
        await unload(plane, request.path_params["model"], await _parameters(request))
        return JSONAnswer({})

    one = "/v2/repository/models/{model}"
    return [
        Endpoint("POST", "/v2/repository/index", "predict", list_all,
                 "Every version in the registry and its state.", body="Any",
                 answer="Index"),
        Endpoint("POST", one + "/load", "admin", load_one,
                 "Open the highest version in the registry, or the one named.", body="Any"),
        Endpoint("POST", one + "/unload", "admin", unload_one,
                 "Close all versions of a model until it is loaded again.", body="Any"),
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


async def load(plane: DataPlane, name: str, parameters: Mapping[str, Any]) -> None:
    """Open the highest version of a model that the registry holds now, or `parameters.version`.

    Raises
    ------
    BadRequestError : a parameter that means something else here than in Triton.
    ModelNotFoundError, VersionNotFoundError, VersionRefusedError, NotReadyError
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
    if plane.load_model is None:
        raise NotReadyError("the registry is still being opened; retry")
    await plane.load_model(name, number)


async def unload(plane: DataPlane, name: str, parameters: Mapping[str, Any]) -> None:
    """Close every version of a model, once what waits there is answered.

    Raises
    ------
    BadRequestError, ModelNotFoundError, NotReadyError
    """
    _refuse_unknown(parameters, "unload_dependents")
    if plane.unload_model is None:
        raise NotReadyError("the registry is still being opened; retry")
    await plane.unload_model(name)


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
