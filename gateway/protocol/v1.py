"""KServe's protocol v1 and TensorFlow Serving's REST: `instances` in rows, `inputs` in columns.

Sources: KServe, "V1 inference protocol"; TensorFlow Serving, "RESTful API", predict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import orjson

from gateway.errors import BadRequestError, TensorError, shown
from gateway.protocol.call import Answer, Call, Served, choose
from gateway.protocol.v2_json import kind
from gateway.protocol.values import (
    COLUMNS_MAX,
    TENSORS,
    Origin,
    Values,
    bare,
    bound,
    flat_values,
    read_json,
    values_of,
)
from gateway.tensors import BFLOAT16, Array, widened
from registry.signature import Signature, TensorSpec

JSON = ((b"content-type", b"application/json"),)
_SIGNATURE = "serving_default"
_DTYPES = {
    "BOOL": "DT_BOOL", "UINT8": "DT_UINT8", "UINT16": "DT_UINT16", "UINT32": "DT_UINT32",
    "UINT64": "DT_UINT64", "INT8": "DT_INT8", "INT16": "DT_INT16", "INT32": "DT_INT32",
    "INT64": "DT_INT64", "FP16": "DT_HALF", "BF16": "DT_BFLOAT16", "FP32": "DT_FLOAT",
    "FP64": "DT_DOUBLE", "BYTES": "DT_STRING",
}  # fmt: skip


@dataclass(slots=True)
class ValuesCall(Call):
    """A call whose values have no datatypes before the model is known."""

    columns: dict[str, Values] | None = None
    """By name, or:"""
    bare: Values | None = None
    """without one, for a model with one input."""
    form: Literal["rows", "columns"] = "rows"
    """How the answer is laid out."""
    origin: Origin = field(default=TENSORS)

    def bind(self, signature: Signature, model: str) -> list[Array]:
        """The values in the datatypes and the order of the model."""
        if self.form == "rows":
            _refuse_without_rows(signature, model)
        if self.columns is not None:
            return bound(self.columns, signature, model, self.origin)
        assert self.bare is not None  # noqa: S101  one of the two is always there
        return bare(self.bare, signature, model)


class V1:
    """The format as a codec.

    Parameters
    ----------
    bytes_max : a longer body is refused
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max

    def decode(self, body: bytes) -> Call:
        """The body as a call; raises BadRequestError with what is wrong."""
        request = read_json(body, self._bytes_max)
        name = request.get("signature_name", _SIGNATURE)
        if name not in (_SIGNATURE, "", None):
            raise BadRequestError(f"no signature {shown(name)}; a model has one: {_SIGNATURE}")
        return call_of(request)

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """`predictions` to rows, `outputs` to columns."""
        if isinstance(call, ValuesCall) and call.form == "columns":
            return Answer(_dumped({"outputs": in_columns(call, served, outputs)}), JSON)
        return Answer(_dumped({"predictions": in_rows(call, served, outputs)}), JSON)


def call_of(request: Mapping[str, Any]) -> ValuesCall:
    """`instances` or `inputs` as a call.

    Raises
    ------
    BadRequestError : none or both are there, or not what they should be.
    """
    if ("instances" in request) == ("inputs" in request):
        raise BadRequestError(
            "send exactly one of 'instances' (a list of rows) and 'inputs' (a column per input)"
        )
    if "instances" in request:
        return _rows(request["instances"])
    return _columns(request["inputs"])


def by_name(rows: list[Any], noun: str) -> dict[str, list[Any]]:
    """Rows that are objects with the same names, as a list per name.

    Raises
    ------
    BadRequestError : a row is no object, or has other names than the first.
    """
    names = rows[0].keys()
    _refuse_many(len(names), noun)
    for k, row in enumerate(rows):
        if type(row) is not dict:
            raise BadRequestError(
                f"row {k} is {kind(row)}, row 0 is an object; all must be objects"
            )
        if row.keys() != names:
            missing = next((name for name in names if name not in row), None)
            if missing is not None:
                raise BadRequestError(f"row {k} has no {noun} {shown(missing)}, row 0 has")
            extra = next(name for name in row if name not in names)
            raise BadRequestError(f"row {k} has {noun} {shown(extra)}, row 0 has not")
    return {name: [row[name] for row in rows] for name in names}


def in_rows(call: Call, served: Served, outputs: Sequence[Array]) -> Any:
    """One output: its rows; several: one object per row."""
    chosen = choose(call, served.signature, served.model)
    arrays = [_serializable(outputs[k]) for k in chosen]
    if len(arrays) == 1:
        return arrays[0]
    if len({len(array) for array in arrays}) > 1:
        raise TensorError(
            f"the outputs of model {served.model!r} differ in rows; ask with 'inputs', by columns"
        )
    names = [served.signature.outputs[k].name for k in chosen]
    # The JSON writer knows numpy's floats one by one, but not every one of its integers.
    arrays = [
        a.tolist() if isinstance(a, np.ndarray) and a.dtype.kind != "f" else a for a in arrays
    ]
    return [dict(zip(names, row, strict=True)) for row in zip(*arrays, strict=True)]


def in_columns(call: Call, served: Served, outputs: Sequence[Array]) -> Any:
    """One output: its values; several: an object of them."""
    chosen = choose(call, served.signature, served.model)
    arrays = {served.signature.outputs[k].name: _serializable(outputs[k]) for k in chosen}
    return next(iter(arrays.values())) if len(arrays) == 1 else arrays


def metadata(model: str, version: int, signature: Signature) -> dict[str, object]:
    """`GET /v1/models/{m}/metadata` of TensorFlow Serving; free axes are -1."""
    definition = {
        "inputs": {spec.name: _tensor_info(spec) for spec in signature.inputs},
        "outputs": {spec.name: _tensor_info(spec) for spec in signature.outputs},
        "method_name": "tensorflow/serving/predict",
    }
    return {
        "model_spec": {"name": model, "signature_name": "", "version": str(version)},
        "metadata": {"signature_def": {"signature_def": {_SIGNATURE: definition}}},
    }


def _rows(rows: Any) -> ValuesCall:
    if type(rows) is not list or not rows:
        raise BadRequestError("'instances' must be a list of at least one row")
    # An object with nothing but b64 is a value in TensorFlow Serving, not a row with a name.
    if type(rows[0]) is not dict or rows[0].keys() == {"b64"}:
        return ValuesCall([], bare=values_of(rows, "instances"))
    if not rows[0]:
        raise BadRequestError("row 0 of 'instances' is an object without names")
    columns = by_name(rows, "input")
    return ValuesCall([], columns={name: _column(cells, name) for name, cells in columns.items()})


def _columns(inputs: Any) -> ValuesCall:
    if type(inputs) is not dict or inputs.keys() == {"b64"}:
        return ValuesCall([], bare=values_of(inputs, "inputs"), form="columns")
    if not inputs:
        raise BadRequestError("'inputs' is an object without names")
    _refuse_many(len(inputs), "input")
    columns = {name: values_of(nested, name) for name, nested in inputs.items()}
    return ValuesCall([], columns=columns, form="columns")


def _refuse_many(n: int, noun: str) -> None:
    if n > COLUMNS_MAX:
        raise BadRequestError(f"{n} {noun}s are named; {COLUMNS_MAX} are allowed")


def _column(cells: list[Any], name: str) -> Values:
    if type(cells[0]) is list:
        return values_of(cells, name)
    return flat_values(cells, (len(cells),))


def _refuse_without_rows(signature: Signature, model: str) -> None:
    """Several outputs make objects per row, which only outputs that have rows can."""
    outputs = signature.outputs
    if len(outputs) > 1 and any(not spec.shape for spec in outputs):
        raise TensorError(
            f"an output of model {model!r} has no rows; ask with 'inputs', by columns"
        )


def _serializable(array: Array) -> Any:
    """What the JSON writer takes: text as lists, numbers as they are, in row-major order."""
    if array.dtype == BFLOAT16:
        array = widened(array)
    if array.dtype == np.object_ or array.dtype.kind in "US" or array.ndim == 0:
        return array.tolist()
    return np.ascontiguousarray(array)


def _dumped(value: Any) -> bytes:
    # JSON has no NaN and no infinity: both become null, as in every other JSON answer.
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _tensor_info(spec: TensorSpec) -> dict[str, object]:
    return {
        "dtype": _DTYPES[spec.datatype],
        "tensor_shape": {
            "dim": [{"size": str(size), "name": ""} for size in spec.shape],
            "unknown_rank": False,
        },
        "name": spec.name,
    }
