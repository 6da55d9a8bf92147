"""The scoring protocol of MLflow, which SageMaker and Vertex AI containers speak as well.

A table in three ways (`dataframe_split`, `dataframe_records`, CSV), or `instances` or `inputs` as
in TensorFlow Serving; the answer is `{"predictions": ...}`. A body in the Open Inference Protocol
is told by its tensors' datatypes, and answered in kind, as Triton's SageMaker front end does.
Source: MLflow documentation, "Deploy MLflow model as a local inference server".
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from gateway.errors import BadRequestError, GatewayError, TensorError, TooLargeError, shown
from gateway.protocol.call import Answer, Call, Codec, Served
from gateway.protocol.v1 import JSON, ValuesCall, by_name, call_of, in_columns, in_rows
from gateway.protocol.v2_binary import LENGTH_HEADER
from gateway.protocol.v2_json import kind
from gateway.protocol.values import (
    COLUMNS_MAX,
    CSV,
    TABLE,
    Values,
    flat_values,
    read_json,
    text_values,
    values_of,
)
from gateway.tensors import Array

_FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
_ERROR_CODES = {
    400: "BAD_REQUEST",
    403: "PERMISSION_DENIED",
    404: "RESOURCE_DOES_NOT_EXIST",
    429: "REQUEST_LIMIT_EXCEEDED",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "TEMPORARILY_UNAVAILABLE",
}


class Invocations:
    """JSON bodies as a codec.

    Parameters
    ----------
    bytes_max : a longer body is refused
    v2 : reads and answers bodies in the Open Inference Protocol
    """

    def __init__(self, bytes_max: int, v2: Codec) -> None:
        self._bytes_max = bytes_max
        self._v2 = v2

    def decode(self, body: bytes) -> Call:
        """The body as a call; raises BadRequestError with what is wrong."""
        request = read_json(body, self._bytes_max)
        if _is_v2(request):
            return self._v2.decode(body)
        given = [form for form in _FORMS if form in request]
        if len(given) != 1:
            raise BadRequestError(
                f"send exactly one of {', '.join(_FORMS)}; the body has"
                f" {', '.join(given) if given else 'none of them'}"
            )
        if given[0] == "dataframe_split":
            return _split(request["dataframe_split"])
        if given[0] == "dataframe_records":
            return _records(request["dataframe_records"])
        return call_of(request)

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """`{"predictions": ...}`, or the Open Inference Protocol's answer to such a body."""
        if isinstance(call, ValuesCall):
            return _answer(call, served, outputs)
        return self._v2.encode(call, served, outputs)


class CSVInvocations:
    """CSV with a header line as a codec; answers are JSON.

    Parameters
    ----------
    bytes_max : a longer body is refused
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max

    def decode(self, body: bytes) -> Call:
        """The body as a call; raises BadRequestError with what is wrong."""
        if len(body) > self._bytes_max:
            raise TooLargeError(
                f"the CSV is longer than {self._bytes_max} bytes (limits.json_bytes_max)"
            )
        return _csv(body)

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """`{"predictions": ...}`."""
        return _answer(call, served, outputs)


class Tritons:
    """Raw tensors behind JSON for platforms that drop unknown headers: its length is in the type.

    Parameters
    ----------
    v2 : the Open Inference Protocol, told how long the JSON of this request is
    media : the platform's type of content
    """

    def __init__(self, v2: Codec, media: str) -> None:
        self._v2 = v2
        self._media = media

    def decode(self, body: bytes) -> Call:
        """The body as a call; raises BadRequestError with what is wrong."""
        return self._v2.decode(body)

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """The answer; where it holds raw tensors, its type says the length as well."""
        answer = self._v2.encode(call, served, outputs)
        headers = dict(answer.headers)
        if (length := headers.get(LENGTH_HEADER)) is not None:
            headers[b"content-type"] = f"{self._media};json-header-size=".encode() + length
        return Answer(answer.body, tuple(headers.items()))


def error_body(error: GatewayError) -> bytes:
    """An error as MLflow's clients read it, and as every other path here says it."""
    code = _ERROR_CODES.get(error.status, "BAD_REQUEST")
    if isinstance(error, TensorError):
        code = "INVALID_PARAMETER_VALUE"
    text = str(error)
    return orjson.dumps({"error_code": code, "message": text, "error": text, "code": error.code})


def _answer(call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
    is_rows = isinstance(call, ValuesCall) and call.form == "rows"
    predictions = (in_rows if is_rows else in_columns)(call, served, outputs)
    body = orjson.dumps({"predictions": predictions}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Answer(body, JSON)


def _is_v2(request: Mapping[str, Any]) -> bool:
    inputs = request.get("inputs")
    return (
        type(inputs) is list
        and bool(inputs)
        and type(inputs[0]) is dict
        and {"name", "datatype", "shape"} <= inputs[0].keys()
    )


def _split(table: Any) -> ValuesCall:
    if type(table) is not dict or type(table.get("data")) is not list:
        raise BadRequestError("'dataframe_split' must be an object with 'columns' and 'data'")
    if unknown := [name for name in table if name not in ("columns", "data", "index")]:
        raise BadRequestError(
            f"'dataframe_split' has no field {shown(unknown[0])}; there are: columns, data, index"
        )
    rows: list[Any] = table["data"]
    if not rows:
        raise BadRequestError("'dataframe_split' has no rows")
    given = table.get("columns")
    if given is None and type(rows[0]) is list:
        given = list(range(len(rows[0])))
    if type(given) is not list or any(type(name) not in (str, int) for name in given):
        raise BadRequestError("'dataframe_split.columns' must be a list of names")
    names = _names([str(name) for name in given], "'dataframe_split.columns'")
    width = len(names)
    for k, row in enumerate(rows):
        if type(row) is not list or len(row) != width:
            got = f"{len(row)} values" if type(row) is list else kind(row)
            raise BadRequestError(f"row {k} has {got}, 'dataframe_split.columns' names {width}")
    return _table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def _records(rows: Any) -> ValuesCall:
    if type(rows) is not list or not rows or type(rows[0]) is not dict or not rows[0]:
        raise BadRequestError(
            "'dataframe_records' must be a list of at least one object with a value per column"
        )
    return _table(by_name(rows, "column"))


def _table(columns: Mapping[str, list[Any]]) -> ValuesCall:
    values = {name: _column(cells, name) for name, cells in columns.items()}
    return ValuesCall([], columns=values, origin=TABLE)


def _column(cells: list[Any], name: str) -> Values:
    if type(cells[0]) is list:
        return values_of(cells, name, "column")
    return flat_values(cells, (len(cells),))


def _csv(body: bytes) -> ValuesCall:
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequestError("the body is not CSV: not valid UTF-8") from None
    if not text.strip():
        raise BadRequestError("the body is empty; the first line must name the columns")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = _names(next(lines), "the first line")
        rows = [row for row in lines if row]
    except csv.Error as error:
        raise BadRequestError(f"the body is not CSV: line {lines.line_num}: {error}") from None
    if not rows:
        raise BadRequestError("the CSV has a first line, but no rows")
    width = len(names)
    for k, row in enumerate(rows):
        if len(row) != width:
            raise BadRequestError(f"row {k} has {len(row)} values, the first line names {width}")
    columns = zip(names, zip(*rows, strict=True), strict=True)
    values = {name: text_values(list(texts)) for name, texts in columns}
    return ValuesCall([], columns=values, origin=CSV)


def _names(names: list[str], where: str) -> list[str]:
    """Names of columns, each once."""
    if not names or len(names) > COLUMNS_MAX:
        raise BadRequestError(f"{where}: from 1 to {COLUMNS_MAX} columns, not {len(names)}")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # add gives nothing, which is false
        raise BadRequestError(f"{where}: two columns are named {shown(twice)}")
    return names
