"""Paths of other servers: KServe v1, TensorFlow Serving, MLflow, SageMaker, Vertex AI, Azure ML.

All of them end in the one prediction path; what is theirs is the format, the shape of an error,
and how a model is named.
"""

import re
from collections.abc import Awaitable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway import __version__
from gateway.endpoints.predict import ErrorBody, Plan, Predict
from gateway.endpoints.route import Endpoint, JSONAnswer, Raw, error_body
from gateway.errors import (
    MediaTypeError,
    ModelNotNamedError,
    NotReadyError,
    UnsupportedError,
    shown,
)
from gateway.prediction import DataPlane
from gateway.protocol import invocations, v1
from gateway.protocol.call import Codec
from gateway.protocol.invocations import CSVInvocations, Invocations, Tritons
from gateway.protocol.v1 import V1
from gateway.protocol.v2_binary import LENGTH_HEADER, V2, json_length
from gateway.router import Model, Variant

_ONE = "/v1/models/{model}"
_VERSION, _LABEL = _ONE + "/versions/{version}", _ONE + "/labels/{label}"
_TARGETS = (b"x-driftgate-model", b"x-amzn-sagemaker-target-model")
_READ = "application/json or text/csv, in UTF-8"
_TRITON = re.compile(
    r"(application/vnd\.(?:sagemaker-triton|vertex-ai-triton)\.binary\+json)"
    r"\s*;\s*json-header-size\s*=\s*([^;\s]*)"
)
_CHARSETS = frozenset(("utf-8", "utf8", "us-ascii"))


class Contract:
    """A raw endpoint: predictions by a plan, errors in the contract's own shape."""

    def __init__(self, predict: Predict, plan: Plan, body: ErrorBody) -> None:
        self._predict = predict
        self._plan = plan
        self._body = body

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer one request."""
        return self._predict.answer(scope, receive, send, self._plan, self._body)


def endpoints(plane: DataPlane, predict: Predict) -> list[Endpoint]:
    """All paths; those of a platform's own choice come from the settings."""
    return [*_v1(plane, predict), *_v1_about(plane), *_single(plane, predict), *_health(plane)]


def _v1(plane: DataPlane, predict: Predict) -> list[Endpoint]:
    codec = V1(plane.config.limits.json_bytes_max)

    def plan(scope: Scope, _: dict[bytes, bytes]) -> tuple[str | None, str | None, Codec]:
        given = scope["path_params"]
        version = given.get("version")
        if "label" in given:
            version = plane.table.model(given["model"]).labelled(given["label"])
        return given["model"], version, codec

    async def other(request: Request) -> Response:
        plane.table.model(request.path_params["model"])
        verb = request.scope["path"].rpartition(":")[2]
        raise UnsupportedError(f":{verb} is not there; a model answers :predict")

    found: list[Endpoint] = []
    answer = Raw(Contract(predict, plan, error_body))
    for path in (_ONE, _VERSION, _LABEL):
        found += [
            Endpoint("POST", path + ":predict", "predict", answer,
                     "A prediction, as KServe v1 and TensorFlow Serving ask.",
                     body="ValuesRequest", answer="ValuesAnswer"),
            *(Endpoint("POST", f"{path}:{verb}", "predict", other, "Not there: 501.")
              for verb in ("explain", "classify", "regress")),
        ]  # fmt: skip
    return found


def _v1_about(plane: DataPlane) -> list[Endpoint]:
    async def models(_: Request) -> Response:
        return JSONAnswer({"models": sorted(plane.table.models)})

    async def status(request: Request) -> Response:
        model = plane.table.model(request.path_params["model"])
        version = request.path_params.get("version")
        picked = model.pick(version)
        if version is None:
            states = [_state(model, number) for number in reversed(model.versions)]
        else:
            states = [_state(model, picked if isinstance(picked, int) else picked.version)]
        return JSONAnswer({"name": model.name, "ready": True, "model_version_status": states})

    async def metadata(request: Request) -> Response:
        model = plane.table.model(request.path_params["model"])
        picked = model.pick(request.path_params.get("version"))
        if not isinstance(picked, Variant):
            if plane.open_version is None:
                raise NotReadyError(f"model {model.name!r} version {picked} is not open")
            picked = await plane.open_version(model.name, picked)
        return JSONAnswer(v1.metadata(model.name, picked.version, picked.signature))

    found = [Endpoint("GET", "/v1/models", "predict", models, "Names of all models.")]
    for path in (_VERSION, _ONE):
        found += [
            Endpoint("GET", path, "predict", status, "Readiness, and the state of versions."),
            Endpoint("GET", path + "/metadata", "predict", metadata,
                     "Tensors, as TensorFlow Serving tells them."),
        ]  # fmt: skip
    return found


def _single(plane: DataPlane, predict: Predict) -> list[Endpoint]:
    config = plane.config
    bytes_max = config.limits.json_bytes_max
    as_json, as_csv = Invocations(bytes_max, V2(bytes_max)), CSVInvocations(bytes_max)

    def plan(scope: Scope, _: dict[bytes, bytes]) -> tuple[str | None, str | None, Codec]:
        headers = dict(scope["headers"])
        content_type = headers.get(b"content-type", b"").decode("latin-1").lower()
        codec: Codec
        if (triton := _TRITON.match(content_type)) is not None:
            length = json_length(triton[2].encode("latin-1"))
            codec = Tritons(V2(bytes_max, length), triton[1])
        elif LENGTH_HEADER in headers:
            codec = V2(bytes_max, json_length(headers[LENGTH_HEADER]))
        else:
            codec = _codec(content_type, as_json, as_csv)
        return _target(plane, headers), None, codec

    answer = Raw(Contract(predict, plan, invocations.error_body))

    def scoring(path: str) -> Endpoint:
        return Endpoint("POST", path, "predict", answer,
                        "A prediction by the model that is set or named in a header.",
                        body="TableRequest", answer="TableAnswer")  # fmt: skip

    found = [scoring("/invocations"), scoring("/score")]
    if config.predict_path not in ("", "/invocations", "/score"):
        found.append(scoring(config.predict_path))
    return found


def _health(plane: DataPlane) -> list[Endpoint]:
    async def ping(_: Request) -> Response:
        if not plane.is_ready:
            raise NotReadyError("no model is ready yet")
        return Response("\n", media_type="text/plain")

    async def release(_: Request) -> Response:
        return Response(__version__, media_type="text/plain")

    async def alive(_: Request) -> Response:
        return JSONAnswer({"status": "alive"})

    found = [
        Endpoint("GET", "/ping", "open", ping, "200 when predictions are answered.", answer="Text"),
        Endpoint("GET", "/health", "open", ping, "As /ping.", answer="Text"),
        Endpoint("GET", "/version", "open", release, "The release, as text.", answer="Text"),
        Endpoint("GET", "/", "open", alive, "The process answers."),
    ]
    if (path := plane.config.health_path) not in ("", *(endpoint.path for endpoint in found)):
        found.append(Endpoint("GET", path, "open", ping, "As /ping.", answer="Text"))
    return found


def _target(plane: DataPlane, headers: dict[bytes, bytes]) -> str:
    """The model meant by a path without a name.

    Raises
    ------
    ModelNotNamedError : none is named, and there are several.
    NotReadyError : the registry has not been read yet.
    """
    known = plane.table.models
    for header in _TARGETS:
        if named := headers.get(header, b"").decode("latin-1").strip().removeprefix("/"):
            # SageMaker names the archive that a model came in.
            return named if named in known else named.removesuffix(".tar.gz")
    if plane.config.model:
        return plane.config.model
    if len(known) == 1:
        return next(iter(known))
    if not plane.table.is_complete:
        raise NotReadyError("the registry is still being opened; retry")
    raise ModelNotNamedError(list(known))


def _codec(content_type: str, as_json: Codec, as_csv: Codec) -> Codec:
    """The format that a Content-Type names; without one it is JSON.

    Raises
    ------
    MediaTypeError : another type or charset.
    """
    kind, *parameters = (part.strip() for part in content_type.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip(' "') not in _CHARSETS:
            raise MediaTypeError(f"charset {shown(value)} is not read here; send {_READ}")
    if kind in ("", "application/json"):
        return as_json
    if kind == "text/csv":
        return as_csv
    raise MediaTypeError(f"content type {shown(kind)} is not read here; send {_READ}")


def _state(model: Model, version: int) -> dict[str, object]:
    """One version in TensorFlow Serving's words; one that opens at its first call is available."""
    reason = model.refused.get(version)
    return {
        "version": str(version),
        "state": "AVAILABLE" if reason is None else "END",
        "status": {
            "error_code": "OK" if reason is None else "UNKNOWN",
            "error_message": reason or "",
        },
    }
