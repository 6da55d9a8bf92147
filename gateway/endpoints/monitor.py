"""What the monitors see: drift reports and metrics."""

import asyncio
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoints.route import Endpoint, JSONAnswer, query
from gateway.errors import (
    BadRequestError,
    NotFoundError,
    VersionNotFoundError,
    VersionRefusedError,
    shown,
)
from gateway.labelling import Labelling
from gateway.observer import WINDOWS, Observer, WindowName
from gateway.prediction import DataPlane
from gateway.telemetry import Family, Sample, Telemetry
from registry import names


def endpoints(
    plane: DataPlane,
    observer: Observer,
    telemetry: Telemetry,
    labelling: Labelling | None = None,
) -> list[Endpoint]:
    """Reports and metrics, all read-only."""

    async def summary(request: Request) -> Response:
        query(request)
        return JSONAnswer({"models": await observer.summary()})

    async def drift(request: Request) -> Response:
        given = query(request, "version", "window", "against")
        name, window = request.path_params["model"], window_of(given.get("window", "last"))
        if "against" not in given:
            version = version_of(plane, name, given.get("version"))
            return JSONAnswer(await observer.report(name, version, window))
        champion = version_of(plane, name, None)
        if given["against"] not in {"champion", str(champion)}:
            raise BadRequestError(
                f"against {shown(given['against'])}: versions are compared with the champion only,"
                f" version {champion}"
            )
        asked = given.get("version")
        other = None if asked is None else version_of(plane, name, asked)
        return JSONAnswer(await observer.against(name, other, champion, window))

    async def metrics(_: Request) -> Response:
        labelled = labelling.samples() if labelling is not None else {}
        return await exposition({**await observer.samples(), **labelled})

    async def bins(_: Request) -> Response:
        return await exposition(await observer.bins(), bins=True)

    async def exposition(samples: Mapping[Family, list[Sample]], *, bins: bool = False) -> Response:
        telemetry.refresh()
        # A text of a thousand series takes milliseconds: the loop serves on.
        text, content_type = await asyncio.to_thread(telemetry.rendered, samples, bins=bins)
        return Response(text, headers={"content-type": content_type})

    return [
        Endpoint("GET", "/drift", "monitor", summary, "All versions, a line each.",
                 answer="DriftSummary"),
        Endpoint("GET", "/drift/{model}", "monitor", drift, "Scores of one version.",
                 query=("version", "window", "against"), answer="Drift"),
        Endpoint("GET", "/metrics", "monitor", metrics, "Counters, latencies, scores.",
                 answer="Text"),
        Endpoint("GET", "/metrics/bins", "monitor", bins, "Rows per bin of every channel.",
                 answer="Text"),
    ]  # fmt: skip


def window_of(asked: object) -> WindowName:
    """The window of that name.

    Raises
    ------
    BadRequestError : there is none; with those that there are.
    """
    window = next((known for known in WINDOWS if known == asked), None)
    if window is None:
        raise BadRequestError(f"window {shown(asked)} is none of {', '.join(WINDOWS)}")
    return window


def version_of(plane: DataPlane, name: str, version: str | None) -> int:
    """The open version meant: the one named, else the one that answers.

    Raises
    ------
    ModelNotFoundError, VersionNotFoundError, VersionRefusedError
    """
    model = plane.table.model(name)
    if version is None:
        if model.champion is None and model.default is not None:
            raise NotFoundError(
                f"model {name!r} version {model.default} is not open: nobody has called it"
            )
        if model.champion is None:
            raise VersionRefusedError(f"no version of model {name!r} could be opened")
        return model.champion.version
    number = names.version(version)
    if number is None or number not in model.versions:
        raise VersionNotFoundError(name, version, model.versions)
    if number in model.refused:
        raise VersionRefusedError(
            f"model {name!r} version {number} was refused: {model.refused[number]}"
        )
    if number not in model.variants:
        raise NotFoundError(f"model {name!r} version {number} is not open: nobody has called it")
    return number
