"""`/openapi.json`: the paths as they are declared, and the models as they are now.

Written from the declarations of the endpoints (verb, path, scope, query, names of schemas) and from
the signatures of the open versions, so that neither can say something else than the server does.
"""

import asyncio
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from gateway import __version__, errors
from gateway.endpoints.route import Endpoint, JSONAnswer, query
from gateway.observer import WINDOWS
from gateway.prediction import DataPlane
from gateway.router import Table, Variant
from registry.signature import Signature, TensorSpec

JSON = "application/json"
_EXAMPLE_MAX = 1024
"""Elements of a tensor in an example; more would help nobody."""
_MODELS_MAX = 100
"""Models with schemas of their own in one document; `?model=` gives any of them."""
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_INTEGERS = {
    f"{sign}INT{bits}": (-(2 ** (bits - 1)) if not sign else 0, 2 ** (bits - (not sign)) - 1)
    for sign in ("", "U")
    for bits in (8, 16, 32, 64)
}

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Content:
    """What a body or an answer is made of."""

    media: str
    schema: Schema
    also: tuple[str, ...] = ()
    """Other formats of the same, which no JSON schema describes."""


class Latest:
    """What was last written from a table, until there is another table or key.

    A hundred models take a tenth of a second to write down: off the loop, and once a table.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._of: tuple[Table, str] | None = None
        self._content: bytes | str = b""

    async def get(
        self, table: Table, write: Callable[[], bytes | str], key: str = ""
    ) -> bytes | str:
        """What `write` gives for this table and key."""
        async with self._turn:
            if self._of is None or self._of[0] is not table or self._of[1] != key:
                self._content = await asyncio.to_thread(write)
                self._of = (table, key)
            return self._content


def endpoints(plane: DataPlane, declared: Callable[[], Sequence[Endpoint]]) -> list[Endpoint]:
    """The document itself; `declared` gives all endpoints of the server, this one too."""
    latest = Latest()

    def whole(table: Table) -> bytes:
        models = list(table.models.values())
        shown = [model.champion for model in models[:_MODELS_MAX] if model.champion is not None]
        left_out = max(len(models) - _MODELS_MAX, 0)
        return orjson.dumps(document(declared(), shown, left_out))

    async def answer(request: Request) -> Response:
        wanted, table = query(request, "model").get("model"), plane.table
        if wanted is not None:
            champion = table.model(wanted).champion
            return JSONAnswer(document(declared(), [] if champion is None else [champion]))
        content = await latest.get(table, lambda: whole(table))
        return Response(content, media_type=JSON)

    return [
        Endpoint("GET", "/openapi.json", "predict", answer,
                 "This interface as OpenAPI 3.1, with the tensors of every open model.",
                 query=("model",)),
    ]  # fmt: skip


def predictions() -> list[Endpoint]:
    """The paths of predictions, which are answered before any routing: declared for readers."""

    async def elsewhere(_: Request) -> Response:
        raise errors.NotFoundError("predictions are answered by their own endpoint")

    of_model = "/v2/models/{model}"
    return [
        Endpoint("POST", of_model + "/infer", "predict", elsewhere,
                 "A prediction by the version that answers: the highest that could be opened.",
                 body="InferRequest", answer="InferAnswer"),
        Endpoint("POST", of_model + "/versions/{version}/infer", "predict", elsewhere,
                 "A prediction by this version.", body="InferRequest", answer="InferAnswer"),
        Endpoint("POST", of_model + "/infer_stream", "predict", elsewhere,
                 "Predictions as a stream of MessagePack documents, answered in order.",
                 body="Stream", answer="Stream"),
        Endpoint("POST", of_model + "/versions/{version}/infer_stream", "predict", elsewhere,
                 "The same by this version.", body="Stream", answer="Stream"),
    ]  # fmt: skip


def document(
    declared: Iterable[Endpoint], variants: Iterable[Variant] = (), left_out: int = 0
) -> dict[str, Any]:
    """The whole document.

    Parameters
    ----------
    declared : every endpoint
    variants : what answers for each model that gets schemas of its own
    left_out : models that get none, because there are too many
    """
    paths: dict[str, dict[str, Any]] = {}
    schemas = {name: content.schema for name, content in CONTENTS.items()}
    for endpoint in declared:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        # The first of two equal ones counts, as it does for the routes.
        paths.setdefault(path, {}).setdefault(endpoint.method.lower(), _operation(endpoint))
    for variant in variants:
        name = variant.model
        schemas |= {
            f"{name}.Request": request_schema(variant.signature),
            f"{name}.Answer": answer_schema(name, variant.signature),
        }
        paths[f"/v2/models/{name}/infer"] = {"post": _infer(name, variant.signature)}
    about = {
        "title": "driftgate",
        "version": __version__,
        "summary": "Serves ONNX models, and notices when they drift.",
        "description": "Every error is JSON with a sentence for people (`error`) and a stable"
        " code for programs (`code`)."
        + (f" {left_out} models are left out here: ask with ?model=NAME." if left_out else ""),
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    }
    return {
        "openapi": "3.1.0",
        "info": about,
        "servers": [{"url": "/"}],
        "tags": [{"name": scope, "description": text} for scope, text in _TAGS.items()],
        "paths": paths,
        "components": {"schemas": schemas, "responses": {"Error": _ERROR}},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    words = re.findall(r"\w+", _PARAMETER.sub(r"\1", endpoint.path))
    operation: dict[str, Any] = {
        "operationId": "_".join([endpoint.method.lower(), *words]) or "root",
        "summary": endpoint.summary,
        "tags": [endpoint.scope],
    }
    parameters = (
        [
            {"name": name, "in": "path", "required": True, "schema": _PATH_SCHEMAS.get(name, _TEXT)}
            for name in _PARAMETER.findall(endpoint.path)
        ]
        + [
            {"name": name, "in": "query", "schema": _QUERY_SCHEMAS.get(name, _TEXT)}
            for name in endpoint.query
        ]
        + [{"name": name, "in": "header", "schema": _TEXT} for name in endpoint.headers]
    )
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        operation["requestBody"] = _body(endpoint.body, CONTENTS[endpoint.body])
    operation["responses"] = _responses(
        endpoint.answer, CONTENTS[endpoint.answer], str(endpoint.status)
    )
    return operation


def _infer(model: str, signature: Signature) -> dict[str, Any]:
    of_all = CONTENTS["InferRequest"]
    request = {**_body(f"{model}.Request", of_all), "required": True}
    if has_example(signature):
        request["content"][JSON]["example"] = example(signature)
    return {
        "operationId": f"infer {model}",
        "summary": f"A prediction by {model}.",
        "tags": ["predict"],
        "requestBody": request,
        "responses": _responses(f"{model}.Answer", CONTENTS["InferAnswer"]),
    }


def _body(name: str, content: Content) -> dict[str, Any]:
    described: dict[str, Any] = {content.media: {"schema": _ref(name)}}
    return {"content": described | {media: {} for media in content.also}}


def _responses(name: str, content: Content, status: str = "200") -> dict[str, Any]:
    return {
        status: {"description": "Done.", **_body(name, content)},
        "default": {"$ref": "#/components/responses/Error"},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


# -- one model


def request_schema(signature: Signature) -> Schema:
    """A request to a model: each of its inputs once, in any order."""
    count = len(signature.inputs)
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            **_REQUEST_FIELDS,
            "inputs": {
                "type": "array",
                "minItems": count,
                "maxItems": count,
                "items": {"oneOf": [_tensor_schema(spec) for spec in signature.inputs]},
            },
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {"name": {"enum": [spec.name for spec in signature.outputs]}},
                },
            },
        },
    }


def answer_schema(model: str, signature: Signature) -> Schema:
    """An answer of a model: the outputs asked for."""
    outputs = [_tensor_schema(spec, is_answer=True) for spec in signature.outputs]
    return {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"const": model},
            "model_version": _VERSION,
            "id": _TEXT,
            "outputs": {"type": "array", "items": {"oneOf": outputs}},
        },
    }


def example(signature: Signature) -> dict[str, Any]:
    """A request with one row of zeros and empty texts, which is what a warm-up tries first."""
    return {
        "inputs": [
            {
                "name": spec.name,
                "datatype": spec.datatype,
                "shape": [1 if size < 0 else size for size in spec.shape],
                "data": [_zero(spec.datatype)] * _size(spec),
            }
            for spec in signature.inputs
        ]
    }


def has_example(signature: Signature) -> bool:
    """Whether `example` can be sent as it is: JSON has no BF16, and pages have an end."""
    return all(spec.datatype != "BF16" and _size(spec) <= _EXAMPLE_MAX for spec in signature.inputs)


def _size(spec: TensorSpec) -> int:
    """Elements of one row, with one where any number may be."""
    return math.prod(1 if size < 0 else size for size in spec.shape)


def _zero(kind: str) -> Any:
    if kind == "BYTES":
        return ""
    if kind == "BOOL":
        return False
    return 0 if kind in _INTEGERS else 0.0


def _tensor_schema(spec: TensorSpec, *, is_answer: bool = False) -> Schema:
    shape: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    if spec.shape:  # A shape without axes may also be one of any rank.
        sizes = [
            {"const": size} if size >= 0 else {"type": "integer", "minimum": 0}
            for size in spec.shape
        ]
        shape = {
            "type": "array",
            "prefixItems": sizes,
            "minItems": len(sizes),
            "maxItems": len(sizes),
        }
    kind = "Numbers" if spec.datatype in _FLOATS and is_answer else spec.datatype
    return {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": shape,
            "data": _ref(f"Data.{kind}"),
        },
    }


# -- what all models share

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_ANY: Schema = {"type": "object"}
_NAME: Schema = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}
_VERSION: Schema = {"type": "string", "pattern": "^[1-9][0-9]*$"}
_NUMBER: Schema = {"type": "string", "pattern": "^(0|[1-9][0-9]{0,17})$"}
_ALIAS: Schema = {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_-]{0,63}$"}
_BOOLEAN: Schema = {"type": "boolean", "default": False}
_PATH_SCHEMAS: Mapping[str, Schema] = {
    "model": _NAME,
    "version": _VERSION,
    "revision": _NUMBER,
    "alias": _ALIAS,
}
_QUERY_SCHEMAS: Mapping[str, Schema] = {
    "against": _NUMBER,
    "dry_run": _BOOLEAN,
    "force": _BOOLEAN,
    "take_over": _BOOLEAN,
    "wait": {"const": "applied"},
    "timeout": {"type": "number", "minimum": 0, "maximum": 60, "default": 10},
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 50},
    "message": {"type": "string", "maxLength": 1000},
    "model": _NAME,
    "version": _VERSION,
    "window": {"enum": list(WINDOWS), "default": "last"},
}
_TAGS = {
    "predict": "Predictions, and what there is to predict with.",
    "monitor": "What the monitors see.",
    "admin": "What changes the server, or tells its inside.",
    "open": "Health: nobody has to show a key.",
}
_FLOATS = frozenset(("FP16", "BF16", "FP32", "FP64"))


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def _list_of(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _nested(kind: str, element: Schema) -> Schema:
    """Elements flat in row-major order, or nested as the shape says."""
    return _list_of({"anyOf": [element, _ref(f"Data.{kind}")]})


_DATA: dict[str, Schema] = {
    "BOOL": {"type": "boolean"},
    "BYTES": _TEXT,
    **{kind: {"type": "number"} for kind in sorted(_FLOATS)},
    **{
        kind: {"type": "integer", "minimum": low, "maximum": high}
        for kind, (low, high) in _INTEGERS.items()
    },
    # Not a datatype: floats of an answer, with null for NaN and infinity, which JSON has not.
    "Numbers": {"type": ["number", "null"]},
}
_DATATYPE: Schema = {"enum": [kind for kind in _DATA if kind != "Numbers"]}
_TENSOR = _object(
    {"name": _TEXT, "datatype": _DATATYPE, "shape": _list_of({"type": "integer"})},
)
_REQUEST_FIELDS: dict[str, Schema] = {
    "id": {"type": "string", "description": "Given back in the answer."},
    "parameters": _object(
        {}, {"timeout": {"type": "integer", "description": "Microseconds until it is too late."}}
    ),
}
_INPUT: Schema = {
    **_object(_TENSOR["properties"], {"data": {"type": "array"}, "parameters": _ANY}),
    "description": "`data` flat in row-major order, or nested as `shape` says; or raw bytes behind"
    " the JSON, by the binary tensor extension.",
}
_OUTPUT = _object(_TENSOR["properties"], {"data": {"type": "array"}, "parameters": _ANY})
_MODEL = _object({"name": _NAME, "ready": {"type": "boolean"}})
_METADATA = _object({
    "name": _NAME,
    "versions": _list_of(_VERSION),
    "platform": _TEXT,
    "inputs": _list_of(_TENSOR),
    "outputs": _list_of(_TENSOR),
})  # fmt: skip
_ABOUT_VERSION = _object(
    {"version": _COUNT, "state": _TEXT, "reason": {"type": ["string", "null"]}},
    {"breaker": {"enum": ["closed", "open", "half_open"]}},
)
_ABOUT_MODEL = _object({
    "name": _NAME,
    "champion": {"type": ["integer", "null"]},
    "versions": _list_of(_ABOUT_VERSION),
})  # fmt: skip
_DRIFT_LINE = _object(
    {
        "model": _NAME,
        "version": _COUNT,
        "rows_observed": _COUNT,
        "rows_dropped": _COUNT,
        "gaps": _list_of(_TEXT),
    }
)
_DRIFT = _object(
    {
        "model": _NAME,
        "version": _COUNT,
        "reference": {"type": ["object", "null"]},
        "problems": _list_of(_TEXT),
        "rows_observed": _COUNT,
        "rows_dropped": _COUNT,
        "coverage": _object({"gaps": _list_of(_TEXT)}),
        "window_rows": _COUNT,
        "report": {"type": ["object", "null"]},
    },
    {
        "message": _TEXT,
        "budget": {"type": "object"},
        "adopting": _ANY,
        "requests": {"type": ["object", "null"]},
    },
)
_COMPARED = _object({
    "model": _NAME,
    "version": _COUNT,
    "against": _COUNT,
    "budget": {"type": "object"},
    "problems": _list_of(_TEXT),
    "report": {"type": "object"},
})  # fmt: skip

_TRUTH: Schema = {"type": ["number", "boolean", "string"]}
_LABEL: Schema = {
    **_object(
        {"id": _TEXT, "label": {"anyOf": [_TRUTH, {"type": "array", "items": _TRUTH}]}},
        {"model": _NAME},
    ),
    "additionalProperties": False,
}

_ALARM = _object({
    "id": _TEXT,
    "model": _NAME,
    "version": _COUNT,
    "monitor": _TEXT,
    "episode": _COUNT,
    "reason": _TEXT,
    "state": {"enum": ["open", "passed", "acknowledged", "accepted"]},
    "opened": {"type": "number"},
    "since": {"type": "number"},
    "runbook": _TEXT,
})  # fmt: skip

_INSISTING: dict[str, Schema] = {
    "message": {"type": "string", "maxLength": 1000, "description": "Why."},
    "force": _BOOLEAN,
    "take_over": _BOOLEAN,
}
_ENTRY = _object({
    "revision": _COUNT, "time": _TEXT, "actor": _TEXT, "via": _TEXT, "message": _TEXT,
    "diff": _list_of(_TEXT),
})  # fmt: skip


def _change(
    required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None
) -> Content:
    """The body of a change."""
    schema = _object(required, {**(optional or {}), **_INSISTING})
    return Content(JSON, {**schema, "additionalProperties": False})


CONTENTS: Mapping[str, Content] = {
    **{f"Data.{kind}": Content(JSON, _nested(kind, element)) for kind, element in _DATA.items()},
    "Any": Content(JSON, {}),
    "Text": Content("text/plain", _TEXT),
    "Page": Content("text/html", _TEXT),
    "Style": Content("text/css", _TEXT),
    "Error": Content(
        JSON,
        _object({
            "error": {"type": "string", "description": "A sentence for people."},
            "code": {"enum": sorted({error.code for error in errors.ALL})},
        }),
    ),
    "Live": Content(JSON, _object({"live": {"type": "boolean"}})),
    "Ready": Content(JSON, _object({"ready": {"type": "boolean"}})),
    "Server": Content(
        JSON, _object({"name": _TEXT, "version": _TEXT, "extensions": _list_of(_TEXT)})
    ),
    "Model": Content(JSON, _METADATA),
    "ModelReady": Content(JSON, _MODEL),
    "InferRequest": Content(
        JSON,
        _object(
            {"inputs": {**_list_of(_INPUT), "minItems": 1}},
            {"outputs": _list_of(_object({"name": _TEXT}, {"parameters": _ANY})),
             **_REQUEST_FIELDS},
        ),
        also=("application/octet-stream", "application/msgpack"),
    ),
    "InferAnswer": Content(
        JSON,
        _object(
            {"model_name": _NAME, "model_version": _VERSION, "outputs": _list_of(_OUTPUT)},
            {"id": _TEXT},
        ),
        also=("application/octet-stream", "application/msgpack"),
    ),
    "Stream": Content("application/msgpack", {}),
    "Index": Content(JSON, _list_of(_object(
        {"name": _NAME},
        {"version": _VERSION, "state": _TEXT, "reason": _TEXT},
    ))),
    "Configuration": Content(JSON, _object({
        "name": _NAME,
        "platform": _TEXT,
        "max_batch_size": _COUNT,
        "input": _list_of(_object({"name": _TEXT, "data_type": _TEXT})),
        "output": _list_of(_object({"name": _TEXT, "data_type": _TEXT})),
    })),
    "Statistics": Content(JSON, _object({"model_stats": _list_of(_object({
        "name": _NAME,
        "version": _VERSION,
        "inference_count": _COUNT,
        "execution_count": _COUNT,
        "inference_stats": _ANY,
    }))})),
    "DriftSummary": Content(JSON, _object({"models": _list_of(_DRIFT_LINE)})),
    "Drift": Content(JSON, {"anyOf": [_DRIFT, _COMPARED]}),
    "LabelsRequest": Content(
        JSON,
        {"anyOf": [
            _list_of(_LABEL),
            {
                **_object({"labels": _list_of(_LABEL)}, {"model": _NAME}),
                "additionalProperties": False,
            },
        ]},
        also=("text/csv", "application/msgpack"),
    ),
    "LabelsAnswer": Content(JSON, _object({
        **dict.fromkeys(
            ("joined", "duplicate", "unknown", "late", "not_sampled", "conflict", "invalid"), _COUNT
        ),
        "problems": _list_of(_object({"at": _COUNT, "id": _TEXT, "is": _TEXT, "reason": _TEXT})),
        "problems_left_out": _COUNT,
    })),
    "Alarms": Content(JSON, _object({"alarms": _list_of(_ALARM)})),
    "Alarm": Content(JSON, _ALARM),
    "AckRequest": Content(
        JSON, {**_object({}, {"by": _TEXT, "note": _TEXT}), "additionalProperties": False}
    ),
    "Performance": Content(JSON, _object({
        "model": _NAME,
        "version": _COUNT,
        "since": {"type": "number"},
        "output": _TEXT,
        "task": {"enum": ["binary", "multiclass", "regression"]},
        "n_predictions": _COUNT,
        "n_labelled": _COUNT,
        "realised": {"type": ["object", "null"]},
        "coverage": _ANY,
        "estimated": {"type": ["object", "null"]},
        "cohorts": _list_of(_ANY),
        "judged": {"type": ["object", "null"]},
    })),
    "Monitor": Content(JSON, {
        **_object({}, {
            "sample": {"type": ["number", "null"]},
            "tolerance": {"type": ["number", "null"]},
            "window_rows": {"type": ["integer", "null"]},
            "budget": {"type": ["object", "null"]},
            "webhooks": {"type": ["array", "null"], "items": _TEXT},
            "labels": {"type": ["object", "null"]},
            "target": {"type": ["object", "null"]},
        }),
        "additionalProperties": False,
    }),
    "LabelsAcceptRequest": Content(
        JSON,
        {
            **_object({}, {
                "days": {"type": "number", "exclusiveMinimum": 0, "default": 30},
                "version": {"type": "integer", "minimum": 1},
            }),
            "additionalProperties": False,
        },
    ),
    "Outcomes": Content(JSON, _object({
        "model": _NAME,
        "since": {"type": "number"},
        "control": _TEXT,
        "variants": _ANY,
        "differences": _ANY,
    })),
    "Shadows": Content(JSON, _object({"model": _NAME, "shadows": _list_of(_ANY)})),
    "ShadowRequest": _change({}, {
        "to": _ANY,
        "sample": {"type": "number", "minimum": 0, "maximum": 100},
        "inflight_max": {"type": "integer", "minimum": 1},
        "bytes_max": {"type": "integer", "minimum": 1},
        "deadline_s": {"type": "number", "exclusiveMinimum": 0},
        "disagreement_max": {
            "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100,
        },
        "compare": {"type": "object", "additionalProperties": _ANY},
    }),
    "AdminModels": Content(JSON, _object({"models": _list_of(_ABOUT_MODEL)})),
    "AdminModel": Content(JSON, _ABOUT_MODEL),
    "AdminVersion": Content(
        JSON,
        {
            "allOf": [
                _ABOUT_VERSION,
                _object({"model": _NAME, "manifest": {"type": ["object", "null"]}}),
            ]
        },
    ),
    "AdoptRequest": Content(
        JSON,
        {
            **_object({}, {
                "rows": {"type": "integer", "minimum": 100, "maximum": 1_000_000, "default": 1000},
                "version": {"type": "integer", "minimum": 1},
            }),
            "additionalProperties": False,
        },
    ),
    "ValuesRequest": Content(JSON, {
        "type": "object",
        "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
        "properties": {
            "instances": {"type": "array", "minItems": 1},
            "inputs": {},
            "signature_name": {"const": "serving_default"},
        },
    }),
    "ValuesAnswer": Content(JSON, _object({}, {"predictions": {"type": "array"}, "outputs": {}})),
    "TableRequest": Content(
        JSON,
        {
            "type": "object",
            "oneOf": [
                {"required": [name]}
                for name in ("dataframe_split", "dataframe_records", "instances", "inputs")
            ],
        },
        also=("text/csv",),
    ),
    "TableAnswer": Content(JSON, _object({"predictions": {}})),
    "State": Content(JSON, _object({
        "revision": _COUNT,
        "models": {"type": "object", "additionalProperties": _ANY},
        "workers": _list_of(_ANY),
    })),
    "Revisions": Content(
        JSON, _object({"revisions": _list_of(_ENTRY), "problems": _list_of(_TEXT)})
    ),
    "Revision": Content(JSON, _object(
        {"revision": _COUNT, "parent": _COUNT, "parent_digest": _TEXT, "diff": _list_of(_TEXT)},
        {"format": _COUNT, "models": {"type": "object", "additionalProperties": _ANY}},
    )),
    "VersionRequest": _change({"version": {"type": "integer", "minimum": 1}}),
    "ChangeRequest": _change({}),
    "RolloutRequest": _change(
        {"model": _NAME, "version": {"type": "integer", "minimum": 1}}, {"plan": _ANY}
    ),
    "RolloutAction": Content(JSON, {**_object({}, {"message": _TEXT}),
                                    "additionalProperties": False}),
    "Rollout": Content(JSON, _object({"model": _NAME, "id": _TEXT, "phase": _TEXT})),
    "Rollouts": Content(JSON, _object({"rollouts": _list_of(_ANY)})),
    "RestoreRequest": _change({}, {"model": _NAME}),
    "Route": Content(JSON, _ANY, also=("application/yaml",)),
    "Routes": Content(
        JSON, {"type": "object", "additionalProperties": _ANY}, also=("application/yaml",)
    ),
    "ExplainRequest": Content(JSON, _object({}, {
        "headers": {"type": "object", "additionalProperties": _TEXT}, "request": _ANY,
    })),
    "Explained": Content(JSON, _object({
        "decision": {"type": "object", "additionalProperties": _TEXT},
        "is_open": {"type": "boolean"},
    })),
    "SimulateRequest": Content(JSON, _object({"route": _ANY}, {"capture": _TEXT})),
    "Simulated": Content(JSON, _object({
        "requests": _COUNT,
        "pinned": _COUNT,
        "first": {"type": ["number", "null"]},
        "last": {"type": ["number", "null"]},
        "variants": _list_of(_ANY),
        "moved": _ANY,
        "rules": _list_of(_ANY),
        "units": _list_of(_ANY),
        "stand_ins": _COUNT,
        "not_captured": {"type": "object", "additionalProperties": _COUNT},
        "passed_over": _TEXT,
    })),
    "Changed": Content(JSON, _object(
        {
            "revision": _COUNT,
            "changed": {"type": "boolean"},
            "dry_run": {"type": "boolean"},
            "diff": _list_of(_TEXT),
            "moved": {"type": "object", "additionalProperties": {"type": "number"}},
            "undo": _TEXT,
        },
        {
            "applied": {"type": "boolean"},
            "laggards": _list_of(_TEXT),
            "notes": _list_of(_TEXT),
        },
    )),
    "AcceptRequest": Content(
        JSON,
        {
            **_object({}, {
                "window": {"enum": ["last", "1h", "24h", "decayed", "total"], "default": "24h"},
                "version": {"type": "integer", "minimum": 1},
            }),
            "additionalProperties": False,
        },
    ),
    "Accepted": Content(JSON, _object({"model": _NAME, "version": _COUNT, "reference": _ANY})),
    "Adopting": Content(
        JSON, _object({"model": _NAME, "version": _COUNT, "adopting": _ANY})
    ),
}  # fmt: skip
"""Every body and answer that an endpoint can name."""

_ERROR = {
    "description": "Refused, or failed; the status is that of the code.",
    "content": {JSON: {"schema": _ref("Error")}},
}
