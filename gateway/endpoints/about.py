"""What is served here: health, and the protocol's metadata, configuration and statistics."""

import asyncio
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.access import Access
from gateway.endpoints.route import Endpoint, JSONAnswer
from gateway.errors import NotReadyError
from gateway.limits import batch_limits
from gateway.prediction import DataPlane
from gateway.protocol import metadata
from gateway.router import (
    FAILED_N,
    FAILED_NS,
    NEWEST_RAN_MS,
    SHARED_N,
    SHARED_NS,
    Model,
    Variant,
    Work,
)
from gateway.telemetry import (
    BATCH_ROWS,
    QUEUE_SECONDS,
    REQUEST_SECONDS,
    REQUESTS,
    RUN_SECONDS,
)


def endpoints(plane: DataPlane, access: Access) -> list[Endpoint]:
    """Health is open; metadata belongs to predictions."""

    async def live(_: Request) -> Response:
        return JSONAnswer({"live": True})

    async def ready(_: Request) -> Response:
        return JSONAnswer({"ready": plane.is_ready}, status_code=200 if plane.is_ready else 503)

    return [
        Endpoint("GET", "/v2/health/live", "open", live, "The process answers.", answer="Live"),
        Endpoint("GET", "/v2/health/ready", "open", ready, "Predictions are answered.",
                 answer="Ready"),
        Endpoint("GET", "/healthz", "open", ready, "The same, for load balancers.", answer="Ready"),
        *_about_models(plane, access),
    ]  # fmt: skip


def _about_models(plane: DataPlane, access: Access) -> list[Endpoint]:
    async def server(_: Request) -> Response:
        return JSONAnswer(metadata.server(can_admin=access.can_admin))

    async def variant_of(request: Request) -> Variant:
        model = plane.table.model(request.path_params["model"])
        picked = model.pick(request.path_params.get("version"))
        if isinstance(picked, Variant):
            return picked
        if plane.open_version is None:
            raise NotReadyError(f"model {model.name!r} version {picked} is not open")
        return await plane.open_version(model.name, picked)

    async def model(request: Request) -> Response:
        variant = await variant_of(request)
        versions = plane.table.model(variant.model).versions
        return JSONAnswer(metadata.model(variant.model, versions, variant.signature))

    async def model_ready(request: Request) -> Response:
        # A version that could be opened on demand is ready: the first call opens it.
        found = plane.table.model(request.path_params["model"])
        found.pick(request.path_params.get("version"))
        return JSONAnswer({"name": found.name, "ready": True})

    async def config(request: Request) -> Response:
        return JSONAnswer(configuration(plane, await variant_of(request)))

    async def stats(request: Request) -> Response:
        named = request.path_params
        return JSONAnswer(await statistics(plane, named.get("model"), named.get("version")))

    of_model = "/v2/models/{model}"
    of_version = of_model + "/versions/{version}"
    return [
        Endpoint("GET", "/v2", "predict", server, "Name, release and extensions.", answer="Server"),
        Endpoint("GET", "/v2/models/stats", "monitor", stats, "Counts of all open versions.",
                 answer="Statistics"),
        Endpoint("GET", of_model, "predict", model, "Tensors and versions of a model.",
                 answer="Model"),
        Endpoint("GET", of_version, "predict", model, "The same of one version.", answer="Model"),
        Endpoint("GET", of_model + "/ready", "predict", model_ready, "The model answers.",
                 answer="ModelReady"),
        Endpoint("GET", of_version + "/ready", "predict", model_ready, "The version answers.",
                 answer="ModelReady"),
        Endpoint("GET", of_model + "/config", "monitor", config, "Configuration, as in Triton.",
                 answer="Configuration"),
        Endpoint("GET", of_version + "/config", "monitor", config, "The same of one version.",
                 answer="Configuration"),
        Endpoint("GET", of_model + "/stats", "monitor", stats, "Counts of its open versions.",
                 answer="Statistics"),
        Endpoint("GET", of_version + "/stats", "monitor", stats, "The same of one version.",
                 answer="Statistics"),
    ]  # fmt: skip


def configuration(plane: DataPlane, variant: Variant) -> dict[str, object]:
    """A variant's configuration in Triton's shape."""
    route = plane.table.model(variant.model).route
    limits = batch_limits(plane.config, route)
    rows_max = route.limits.rows_max if route is not None and route.limits is not None else None
    can_batch = variant.can_batch and limits["rows_max"] > 1
    return metadata.configuration(
        variant.model,
        variant.signature,
        rows_max=min(limits["queue_rows_max"], rows_max or limits["queue_rows_max"]),
        batch_rows_max=limits["rows_max"] if can_batch else None,
        wait_s_max=limits["wait_s_max"],
    )


async def statistics(plane: DataPlane, name: str | None, version: str | None) -> dict[str, Any]:
    """`model_stats` of one version, of all open versions of a model, or of all models.

    They are the host's: any worker tells the same, whoever counted it.

    Raises
    ------
    ModelNotFoundError, VersionNotFoundError, VersionRefusedError, NotReadyError
    """
    if name is None:
        variants = [found for model in plane.table.models.values() for found in _open(model)]
    else:
        model = plane.table.model(name)
        picked = model.pick(version)
        if not isinstance(picked, Variant):  # It is opened by its first call, not by a look.
            return {"model_stats": [metadata.statistics(name, picked, metadata.Counts())]}
        variants = _open(model) if version is None else [picked]
    entries = [
        (variant.model, variant.version, metadata.has_batches(variant.signature), variant.work)
        for variant in variants
    ]
    totals = await asyncio.to_thread(_totals, plane, {(name, str(n)) for name, n, _, _ in entries})
    return {
        "model_stats": [
            metadata.statistics(name, number, _counts(totals[name, str(number)], work, has_batches))
            for name, number, has_batches, work in entries
        ]
    }


def _open(model: Model) -> list[Variant]:
    return [model.variants[version] for version in sorted(model.variants)]


_Totals = dict[str, list[int]]
"""Cells by the name of their family, over all other labels."""


def _totals(plane: DataPlane, versions: set[tuple[str, str]]) -> dict[tuple[str, str], _Totals]:
    """What the workers of the host have counted for these versions."""
    found: dict[tuple[str, str], _Totals] = {version: {} for version in versions}
    for name, labels, cells in plane.telemetry.totals():
        if (of_version := found.get(labels[:2])) is None:  # type: ignore[arg-type]  # or not two
            continue
        if name == REQUESTS.name and labels[-1] != "ok":
            continue
        before = of_version.get(name)
        of_version[name] = (
            cells if before is None else [a + b for a, b in zip(before, cells, strict=True)]
        )
    return found


def _counts(totals: _Totals, work: Work, has_batches: bool) -> metadata.Counts:
    def cell(name: str) -> int:
        return totals.get(name, [0])[0]

    def histogram(name: str) -> tuple[int, int]:
        """Values, and their sum in the scale that it is kept in: nanoseconds."""
        cells = totals.get(name, [0])
        return sum(cells[:-1]), cells[-1]

    n_ok = cell(REQUESTS.name)
    n_runs, ran_ns = histogram(RUN_SECONDS.name)
    own_ms = (time.time() - time.monotonic() + work.ran_at) * 1000 if work.ran_at else 0
    return metadata.Counts(
        last_ms=max(int(own_ms), cell(NEWEST_RAN_MS)),
        rows=histogram(BATCH_ROWS.name)[1] if has_batches else n_ok,
        runs=n_runs,
        ok=(n_ok, histogram(REQUEST_SECONDS.name)[1]),
        failed=(cell(FAILED_N), cell(FAILED_NS)),
        queued=histogram(QUEUE_SECONDS.name),
        ran=(n_runs + cell(SHARED_N), ran_ns + cell(SHARED_NS)),
    )
