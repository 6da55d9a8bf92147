"""What is served here: health, the protocol's metadata."""

from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoints.route import Endpoint, JSONAnswer
from gateway.errors import NotReadyError
from gateway.prediction import DataPlane
from gateway.protocol import metadata
from gateway.router import Variant


def endpoints(plane: DataPlane) -> list[Endpoint]:
    """Health is open; metadata belongs to predictions."""

    async def live(_: Request) -> Response:
        return JSONAnswer({"live": True})

    async def ready(_: Request) -> Response:
        return JSONAnswer({"ready": plane.is_ready}, status_code=200 if plane.is_ready else 503)

    async def server(_: Request) -> Response:
        return JSONAnswer(metadata.server())

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

    of_model = "/v2/models/{model}"
    of_version = of_model + "/versions/{version}"
    return [
        Endpoint("GET", "/v2/health/live", "open", live, "The process answers."),
        Endpoint("GET", "/v2/health/ready", "open", ready, "Predictions are answered."),
        Endpoint("GET", "/healthz", "open", ready, "The same, for load balancers."),
        Endpoint("GET", "/v2", "predict", server, "Name, release and extensions."),
        Endpoint("GET", of_model, "predict", model, "Tensors and versions of a model."),
        Endpoint("GET", of_version, "predict", model, "The same of one version."),
        Endpoint("GET", of_model + "/ready", "predict", model_ready, "The model answers."),
        Endpoint("GET", of_version + "/ready", "predict", model_ready, "The version answers."),
    ]
