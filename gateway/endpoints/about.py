"""What is served here: health, and the protocol's metadata, configuration and statistics."""

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
from gateway.router import Model, Variant


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
        return JSONAnswer(statistics(plane, named.get("model"), named.get("version")))

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


def statistics(plane: DataPlane, name: str | None, version: str | None) -> dict[str, Any]:
    """`model_stats` of one version, of all open versions of a model, or of all models.

    Raises
    ------
    ModelNotFoundError, VersionNotFoundError, VersionRefusedError, NotReadyError
    """
    if name is None:
        models = list(plane.table.models.values())
        variants = [variant for model in models for variant in _open(model)]
    else:
        model = plane.table.model(name)
        picked = model.pick(version)
        if not isinstance(picked, Variant):  # It is opened by its first call, not by a look.
            return {"model_stats": [metadata.statistics(name, picked, metadata.Counts())]}
        variants = _open(model) if version is None else [picked]
    return {
        "model_stats": [
            metadata.statistics(variant.model, variant.version, _counts(plane, variant))
            for variant in variants
        ]
    }


def _open(model: Model) -> list[Variant]:
    return [model.variants[version] for version in sorted(model.variants)]


def _counts(plane: DataPlane, variant: Variant) -> metadata.Counts:
    work, traffic = variant.work, plane.meters_of(variant)
    n_ok = sum(meters.ok.value for meters in traffic)
    n_runs = sum(work.run_s.counts)
    ran_s = work.run_s.total + work.shared_s
    age_s = time.monotonic() - work.ran_at
    return metadata.Counts(
        last_ms=int((time.time() - age_s) * 1000) if work.ran_at else 0,
        rows=int(work.rows.total) if metadata.has_batches(variant.signature) else n_ok,
        runs=n_runs,
        ok=(n_ok, _ns(sum(meters.seconds.total for meters in traffic))),
        failed=(
            sum(meters.failed_n.value for meters in traffic),
            sum(meters.failed_ns.value for meters in traffic),
        ),
        queued=(sum(work.queue_s.counts), _ns(work.queue_s.total)),
        ran=(n_runs + work.shared_n, _ns(ran_s)),
    )


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
