"""What changes the server, or tells its inside: for callers with the scope `admin`."""

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoints.monitor import version_of, window_of
from gateway.endpoints.route import Endpoint, JSONAnswer, json_object, query
from gateway.errors import BadRequestError, VersionNotFoundError, shown
from gateway.limits import batch_limits
from gateway.observer import Observer
from gateway.prediction import DataPlane
from gateway.router import Model, Variant
from registry import names


def endpoints(plane: DataPlane, observer: Observer) -> list[Endpoint]:
    """Models with what their warm-up found; adoption of a reference."""

    async def models(request: Request) -> Response:
        query(request)
        return JSONAnswer(
            {"models": [_about(plane, model) for model in plane.table.models.values()]}
        )

    async def model(request: Request) -> Response:
        query(request)
        return JSONAnswer(_about(plane, plane.table.model(request.path_params["model"])))

    async def one_version(request: Request) -> Response:
        query(request)
        name = request.path_params["model"]
        model = plane.table.model(name)
        text = request.path_params["version"]
        number = names.version(text)
        if number is None or number not in model.versions:
            raise VersionNotFoundError(name, text, model.versions)
        (about,) = [each for each in _about(plane, model)["versions"] if each["version"] == number]
        files = None if plane.find_files is None else plane.find_files(name, number)
        described = None if files is None else files.manifest
        manifest = None if described is None else orjson.Fragment(described.to_json())
        return JSONAnswer({"model": name, **about, "manifest": manifest})

    async def adopt(request: Request) -> Response:
        given = await json_object(request)
        _only(given, "rows", "version")
        rows = given.get("rows", 1000)
        if type(rows) is not int:
            raise BadRequestError("'rows' must be an integer")
        version = given.get("version")
        name = request.path_params["model"]
        number = version_of(plane, name, None if version is None else str(version))
        return JSONAnswer(await observer.adopt(name, number, rows), status_code=202)

    async def accept(request: Request) -> Response:
        given = await json_object(request)
        _only(given, "window", "version")
        version = given.get("version")
        name = request.path_params["model"]
        number = version_of(plane, name, None if version is None else str(version))
        window = window_of(given.get("window", "24h"))
        return JSONAnswer(await observer.accept(name, number, window))

    one = "/admin/models/{model}"
    return [
        Endpoint("GET", "/admin/models", "admin", models, "Models and versions.",
                 answer="AdminModels"),
        Endpoint("GET", one, "admin", model, "One model.", answer="AdminModel"),
        Endpoint("GET", one + "/versions/{version}", "admin", one_version,
                 "One version: its state here, and its manifest.", answer="AdminVersion"),
        Endpoint("POST", one + "/reference", "admin", adopt,
                 "Adopt the next served rows as the reference profile.",
                 body="AdoptRequest", answer="Adopting", status=202),
        Endpoint("POST", one + "/accept", "admin", accept,
                 "Accept a window's rows as the new normal: the reference profile from now on.",
                 body="AcceptRequest", answer="Accepted"),
    ]  # fmt: skip


def _only(given: dict[str, Any], *fields: str) -> None:
    """Refuse a field of any other name."""
    for field in given:
        if field not in fields:
            there = ", ".join(fields)
            raise BadRequestError(f"no field {shown(field)} here; there are: {there}")


def _about(plane: DataPlane, model: Model) -> dict[str, Any]:
    versions = {
        version: _open(plane, model, variant) for version, variant in model.variants.items()
    }
    return {
        "name": model.name,
        "champion": model.champion.version if model.champion else None,
        "versions": [
            {
                "version": version,
                "state": _state(model, version),
                "reason": model.refused.get(version),
                **versions.get(version, {}),
            }
            for version in model.versions
        ],
    }


def _open(plane: DataPlane, model: Model, variant: Variant) -> dict[str, Any]:
    """What the warm-up of an open version found, under the route in force; and its breaker here."""
    about, route = dict(variant.about), model.route
    rows_max = batch_limits(plane.config, route)["rows_max"]
    if variant.can_batch:
        about["batched"] = f"up to {rows_max} rows" if rows_max > 1 else "no: batch.rows_max is 1"
    if route is not None and route.breaker is not None:
        about["breaker"] = plane.breakers.state(model.name, variant.version)
    return about


def _state(model: Model, version: int) -> str:
    if version in model.variants:
        return "active"
    return "refused" if version in model.refused else "unopened"
