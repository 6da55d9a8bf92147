"""The Open Inference Protocol's JSON: request bodies to calls, outputs to answers.

Numbers are packed with `struct`, which is faster than numpy on lists and strict where numpy is not:
it takes no text for a number, no fraction for an integer, and nothing out of a datatype's range.
Source: Open Inference Protocol, "inference request JSON object".
"""

import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import orjson

from gateway.errors import BadRequestError, TensorError, TooLargeError, shown
from gateway.protocol.call import Answer, Call, OutputWanted, Served, Tensor, choose
from gateway.tensors import DTYPES, Array, datatype
from registry.signature import Signature

_CODES = {
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
_FLOATS = frozenset(("FP16", "FP32", "FP64"))
_RANK_MAX = 32
_JSON_KINDS = {
    bool: "true or false", str: "text", list: "a list", dict: "an object", type(None): "null",
    int: "an integer", float: "a number",
}  # fmt: skip


_JSON = ((b"content-type", b"application/json"),)


class V2JSON:
    """The protocol's JSON as a codec.

    Parameters
    ----------
    bytes_max : a longer body is refused; its numbers would take some thirty times its size
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max

    def decode(self, body: bytes) -> Call:
        """The body as a call; TooLargeError, BadRequestError or TensorError when it is none."""
        if len(body) > self._bytes_max:
            raise TooLargeError(
                f"the JSON is longer than {self._bytes_max} bytes (limits.json_bytes_max)"
            )
        return decode(body)

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """The answer, with the outputs that the call asked for."""
        chosen = choose(call, served.signature, served.model)
        return Answer(encode(served.json_head, call, served.signature, outputs, chosen), _JSON)


def decode(body: bytes) -> Call:
    """A request body as a call.

    Raises
    ------
    BadRequestError : not JSON, or not an inference request.
    TensorError : an input whose datatype, shape or data is wrong by itself.
    """
    request, is_lenient = _parse(body)
    if type(request) is not dict:
        raise BadRequestError(f"the body must be a JSON object, not {_kind(request)}")
    inputs = request.get("inputs")
    if type(inputs) is not list or not inputs:
        raise BadRequestError("'inputs' must be a list of at least one tensor")
    if len(inputs) > 1024:
        raise BadRequestError(f"'inputs' has {len(inputs)} tensors; 1024 are allowed")
    may_hold_booleans = _mentions_booleans(body)
    call = Call([_tensor(given, k, may_hold_booleans) for k, given in enumerate(inputs)])
    if len(request) > 1:
        _read_rest(request, call)
    if is_lenient:
        _refuse_lone_surrogates(call)
    return call


def encode(
    head: bytes,
    call: Call,
    signature: Signature,
    arrays: Sequence[Array],
    chosen: Sequence[int],
) -> bytes:
    """An answer as JSON: data flat, in row-major order.

    JSON has no NaN and no infinity: both are written as null.

    Parameters
    ----------
    head : `{"model_name":"m","model_version":"1"`, made once per version by `answer_head`
    arrays : all outputs, in the model's order
    chosen : positions of those wanted
    """
    parts = [head]
    if call.id is not None:
        parts += (b',"id":', orjson.dumps(call.id))
    before = b',"outputs":['
    for k in chosen:
        array = arrays[k]
        parts += (
            before,
            _output_head(signature.outputs[k].name, datatype(array), array.shape),
            _data(array),
        )
        before = b"},"
    parts.append(b"}]}")
    return b"".join(parts)


def answer_head(model: str, version: int) -> bytes:
    """The start of every answer of one version."""
    return orjson.dumps({"model_name": model, "model_version": str(version)})[:-1]


@lru_cache(maxsize=1024)
def _output_head(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    return orjson.dumps({"name": name, "datatype": kind, "shape": shape})[:-1] + b',"data":'


def _data(array: Array) -> bytes:
    if array.dtype == np.object_ or array.dtype.kind in "US":
        return orjson.dumps(array.ravel().tolist())
    return orjson.dumps(array.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)


def _parse(body: bytes) -> tuple[Any, bool]:
    """The body's JSON value, and whether the lenient parser had to read it."""
    try:
        return orjson.loads(body), False
    except orjson.JSONDecodeError as error:
        if not body.strip():
            raise BadRequestError("the body is empty; send an inference request") from None
        if b"NaN" not in body and b"Infinity" not in body:
            raise BadRequestError(f"the body is not JSON: {error}") from None
    # Bare NaN and Infinity are not JSON, but numeric clients write them, and a missing value is
    # worth counting: such a body is read by the standard library, which takes them.
    try:
        return json.loads(body.decode("utf-8")), True
    except UnicodeDecodeError:
        raise BadRequestError("the body is not JSON: not valid UTF-8") from None
    except RecursionError:
        raise BadRequestError("the body is not JSON: nested too deep") from None
    except ValueError as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None


def _tensor(given: Any, k: int, may_hold_booleans: bool) -> Tensor:
    if type(given) is not dict:
        raise BadRequestError(f"inputs[{k}] must be an object, not {_kind(given)}")
    name = given.get("name")
    if type(name) is not str or not name:
        raise BadRequestError(f"inputs[{k}].name must be the name of a tensor")
    kind = given.get("datatype")
    if type(kind) is not str or kind not in DTYPES:
        raise TensorError(
            f"input {shown(name)}: datatype {shown(kind)} is none of {', '.join(DTYPES)}"
        )
    shape: Any = given.get("shape")
    count = _n_elements(shape, name)
    if "data" not in given:
        parameters = given.get("parameters")
        if type(parameters) is dict and "binary_data_size" in parameters:
            raise TensorError(f"input {shown(name)}: binary tensors are not read here; send 'data'")
        raise TensorError(f"input {shown(name)}: 'data' is missing")
    flat = _flat(given["data"], shape, count, name)
    sizes = tuple(shape)
    return Tensor(name, kind, sizes, _array(flat, kind, sizes, name, may_hold_booleans))


def _n_elements(shape: Any, name: str) -> int:
    """Elements that a shape stands for."""
    if type(shape) is list and len(shape) <= _RANK_MAX:
        count = 1
        for size in shape:
            if type(size) is not int or size < 0:
                break
            count *= size
        else:
            return count
    raise TensorError(
        f"input {shown(name)}: shape must be a list of up to {_RANK_MAX} integers >= 0,"
        f" not {shown(shape)}"
    )


def _flat(data: Any, shape: list[int], count: int, name: str) -> list[Any]:
    """The elements in row-major order; `data` is flat, or nested as `shape` says."""
    if type(data) is not list:
        if shape:
            raise TensorError(f"input {shown(name)}: data must be a list, not {_kind(data)}")
        return [data]
    level = data
    if level and type(level[0]) is list:
        if not shape or len(level) != shape[0]:
            raise TensorError(
                f"input {shown(name)}: data has {len(level)} lists, shape says {shape}"
            )
        for size in shape[1:]:
            for inner in level:
                if type(inner) is not list or len(inner) != size:
                    got = f"{len(inner)} elements" if type(inner) is list else _kind(inner)
                    raise TensorError(
                        f"input {shown(name)}: data is not nested as shape {shape} says:"
                        f" a list of {size} is expected where {got} came"
                    )
            level = list(chain.from_iterable(level))
    if len(level) != count:
        raise TensorError(
            f"input {shown(name)}: shape {shape} needs {count} elements, data has {len(level)}"
        )
    return level


def _array(
    values: list[Any], kind: str, shape: tuple[int, ...], name: str, may_hold_booleans: bool
) -> Array:
    """The elements as an array of the datatype and shape."""
    if values and (code := _CODES.get(kind)) is not None:
        if may_hold_booleans and bool in set(map(type, values)):
            _refuse_others(values, {int, float} if kind in _FLOATS else {int}, kind, name)
        try:
            packed = _packer(code, len(values)).pack(*values)
        except (struct.error, OverflowError):
            raise _bad_value(values, kind, name) from None
        return np.ndarray(shape, DTYPES[kind], packed)
    if kind == "BYTES":
        _refuse_others(values, {str}, kind, name)
    elif kind == "BOOL":
        _refuse_others(values, {bool}, kind, name)
    try:
        return np.array(values, dtype=DTYPES[kind]).reshape(shape)
    except (ValueError, OverflowError):
        raise TensorError(f"input {shown(name)}: no array can have shape {shown(shape)}") from None


@lru_cache(maxsize=256)
def _packer(code: str, n: int) -> struct.Struct:
    return struct.Struct(f"<{n}{code}")


def _refuse_others(values: list[Any], kinds: set[type], kind: str, name: str) -> None:
    if set(map(type, values)) - kinds:
        k = next(k for k, value in enumerate(values) if type(value) not in kinds)
        raise TensorError(_sentence(name, k, values[k], kind))


def _bad_value(values: list[Any], kind: str, name: str) -> TensorError:
    """Says which element does not fit; finds it by halves, since there may be millions."""
    code, low, high = _CODES[kind], 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            struct.pack(f"<{middle - low}{code}", *values[low:middle])
            low = middle
        except (struct.error, OverflowError):
            high = middle
    return TensorError(_sentence(name, low, values[low], kind))


def _sentence(name: str, k: int, value: Any, kind: str) -> str:
    """Why element k is not what the datatype takes."""
    where = f"input {shown(name)}: element {k} is {shown(value) if value is not None else 'null'}"
    if kind == "BYTES":
        return f"{where}; BYTES takes text"
    if kind == "BOOL":
        return f"{where}; BOOL takes true or false"
    if type(value) in (int, float):
        if kind in _FLOATS:
            return f"{where}; {kind} cannot hold it: out of range"
        limits = np.iinfo(DTYPES[kind])
        return f"{where}; {kind} takes integers from {limits.min} to {limits.max}"
    hint = " (a missing value is NaN)" if value is None and kind in _FLOATS else ""
    return f"{where}; {kind} takes {'numbers' if kind in _FLOATS else 'integers'}{hint}"


def _mentions_booleans(body: bytes) -> bool:
    """Whether `true` or `false` stands anywhere: only then can a number be a boolean.

    Two single-byte searches, several times cheaper than looking at the type of every element. It
    gives up, and says yes, on bodies with many of these letters.
    """
    for letter, word, before in ((b"u", b"true", 2), (b"l", b"false", 2)):
        at = body.find(letter)
        for _ in range(64):
            if at < 0:
                break
            if body[at - before : at - before + len(word)] == word:
                return True
            at = body.find(letter, at + 1)
        else:
            return True
    return False


def _read_rest(request: dict[str, Any], call: Call) -> None:
    """Everything beside `inputs`; fields that the protocol does not know are passed over."""
    identity = request.get("id")
    if identity is not None:
        if type(identity) is not str:
            raise BadRequestError(f"'id' must be text, not {_kind(identity)}")
        call.id = identity
    outputs = request.get("outputs")
    if outputs is not None:
        if type(outputs) is not list or len(outputs) > 1024:
            raise BadRequestError("'outputs' must be a list of up to 1024 objects with a 'name'")
        call.outputs = tuple(
            OutputWanted(_output_name(output, k)) for k, output in enumerate(outputs)
        )
    parameters = request.get("parameters")
    if parameters is None:
        return
    if type(parameters) is not dict:
        raise BadRequestError(f"'parameters' must be an object, not {_kind(parameters)}")
    timeout = parameters.get("timeout")
    if timeout is not None:
        if type(timeout) is not int or timeout < 0:
            raise BadRequestError("parameters.timeout must be an integer >= 0, in microseconds")
        call.timeout_s = timeout / 1e6 if timeout else None


def _output_name(output: Any, k: int) -> str:
    name = output.get("name") if type(output) is dict else None
    if type(name) is not str:
        raise BadRequestError(f"outputs[{k}] must be an object with a 'name'")
    return name


def _refuse_lone_surrogates(call: Call) -> None:
    """The lenient parser lets half a surrogate pair through, which no answer could repeat."""
    texts = [call.id or ""]
    for tensor in call.inputs:
        if tensor.datatype == "BYTES":
            texts.extend(tensor.array.ravel().tolist())
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRequestError("the body is not JSON: half a surrogate pair in a text") from None


def _kind(value: Any) -> str:
    return _JSON_KINDS.get(type(value), "something else")
