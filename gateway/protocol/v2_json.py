"""The Open Inference Protocol's JSON: request bodies to calls, outputs to answers.

Numbers are packed with `struct`, which is faster than numpy on lists and strict where numpy is not:
it takes no text for a number, no fraction for an integer, and nothing out of a datatype's range.
Source: Open Inference Protocol, "inference request JSON object".
"""

import json
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any

import msgspec
import numpy as np
import orjson

from gateway.errors import BadRequestError, TensorError, shown
from gateway.protocol import raw
from gateway.protocol.call import Call, OutputWanted, Tensor
from gateway.tensors import BFLOAT16, DTYPES, Array, datatype, narrowed, widened
from registry.signature import Signature

_CODES = {
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
_FLOATS = frozenset(("FP16", "FP32", "FP64"))
_RANK_MAX = 32
_INPUTS_MAX = 1024
_USUAL_BYTES_MAX = 16 * 1024
"""Of longer bodies the numbers are all that counts, and orjson reads those faster."""
_JSON_KINDS = {
    bool: "true or false", str: "text", list: "a list", dict: "an object", type(None): "null",
    int: "an integer", float: "a number",
}  # fmt: skip


NO_SHARED_MEMORY = "shared memory is not offered here; send the tensor itself"

Tail = Callable[[int, str], memoryview]
"""Takes so many bytes for the input of this name; raises TensorError when fewer are left."""


def decode(body: bytes, tail: Tail | None = None) -> Call:
    """A request body as a call.

    Parameters
    ----------
    tail : gives the bytes of one input after the other, where tensors follow the JSON

    Raises
    ------
    BadRequestError : not JSON, or not an inference request.
    TensorError : an input whose datatype, shape or data is wrong by itself.
    """
    if tail is None and len(body) <= _USUAL_BYTES_MAX and (usual := _usual(body)) is not None:
        return usual
    request, is_lenient = parse(body, "an inference request")
    if type(request) is not dict:
        raise BadRequestError(f"the body must be a JSON object, not {kind(request)}")
    inputs = request.get("inputs")
    if type(inputs) is not list or not inputs:
        raise BadRequestError("'inputs' must be a list of at least one tensor")
    if len(inputs) > _INPUTS_MAX:
        raise BadRequestError(f"'inputs' has {len(inputs)} tensors; {_INPUTS_MAX} are allowed")
    may_hold_booleans = _mentions_booleans(body)
    call = Call([tensor(given, k, may_hold_booleans, tail) for k, given in enumerate(inputs)])
    if len(request) > 1:
        read_rest(request, call)
    if is_lenient:
        _refuse_lone_surrogates(call)
    return call


class _Input(msgspec.Struct, gc=False):
    name: str
    shape: tuple[int, ...]
    datatype: str
    data: list[int | float | list[int | float]]
    parameters: Any = msgspec.UNSET


class _Request(msgspec.Struct, gc=False):
    inputs: list[_Input]
    id: Any = msgspec.UNSET
    outputs: Any = msgspec.UNSET
    parameters: Any = msgspec.UNSET


_USUAL = msgspec.json.Decoder(_Request)
_REST = ("id", "outputs", "parameters")


def _usual(body: bytes) -> Call | None:
    """A call with nothing but numbers, as nearly all are, checked while it is read.

    None for every other body, and for whatever is wrong: `decode` takes another look at it, step by
    step, and finds the words. That costs a third of this function's time on top, this function
    saves half of the other's.
    """
    try:
        request = _USUAL.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    given = request.inputs
    if not 0 < len(given) <= _INPUTS_MAX:
        return None
    tensors: list[Tensor] = []
    for one in given:
        code, shape = _CODES.get(one.datatype), one.shape
        data: list[Any] = one.data
        if code is None or not data or not one.name or one.parameters is not msgspec.UNSET:
            return None
        if type(data[0]) is list:
            data = list(chain.from_iterable(data)) if _is_matrix(data, shape) else []
        if len(shape) > _RANK_MAX or len(data) != prod(shape) or min(shape, default=0) < 0:
            return None
        try:
            packed = _packer(code, len(data)).pack(*data)
            array: Array = np.ndarray(shape, DTYPES[one.datatype], packed)
        except (struct.error, OverflowError, ValueError):  # The last: a size is beyond numpy's.
            return None
        tensors.append(Tensor(one.name, one.datatype, shape, array))
    call = Call(tensors)
    if not (request.id is request.outputs is request.parameters is msgspec.UNSET):
        read_rest({k: v for k in _REST if (v := getattr(request, k)) is not msgspec.UNSET}, call)
    return call


def _is_matrix(data: list[Any], shape: tuple[int, ...]) -> bool:
    """Whether `data` is a list of lists, as a shape of two axes says."""
    return (
        len(shape) == 2
        and len(data) == shape[0]
        and all(type(row) is list and len(row) == shape[1] for row in data)
    )


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
    parts = start(head, call)
    before = b',"outputs":['
    for k in chosen:
        array = arrays[k]
        parts += (
            before,
            _output_head(signature.outputs[k].name, datatype(array), array.shape),
            data(array),
        )
        before = b"},"
    parts.append(b"}]}")
    return b"".join(parts)


def start(head: bytes, call: Call) -> list[bytes]:
    """The first parts of an answer: who answers, and the request's id."""
    return [head] if call.id is None else [head, b',"id":', orjson.dumps(call.id)]


def answer_head(model: str, version: int) -> bytes:
    """The start of every answer of one version."""
    return orjson.dumps({"model_name": model, "model_version": str(version)})[:-1]


@lru_cache(maxsize=1024)
def _output_head(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    return orjson.dumps({"name": name, "datatype": kind, "shape": shape})[:-1] + b',"data":'


def data(array: Array) -> bytes:
    """The elements as a flat list."""
    if array.dtype.kind in "OUSV":
        if array.dtype != BFLOAT16:
            return orjson.dumps(array.ravel().tolist())
        array = widened(array)
    return orjson.dumps(array.ravel(), option=orjson.OPT_SERIALIZE_NUMPY)


def parse(body: bytes, wanted: str) -> tuple[Any, bool]:
    """The body's JSON value, and whether the lenient parser had to read it.

    Parameters
    ----------
    wanted : what to send in place of an empty body, in words

    Raises
    ------
    BadRequestError : it is not JSON.
    """
    try:
        return orjson.loads(body), False
    except orjson.JSONDecodeError as error:
        if not body.strip():
            raise BadRequestError(f"the body is empty; send {wanted}") from None
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


def tensor(given: Any, k: int, may_hold_booleans: bool, tail: Tail | None = None) -> Tensor:
    """Input k; its data is in the JSON, or next in `tail`."""
    name, datatype, shape, count = tensor_head(given, k)
    if "parameters" in given and (size := _binary_size(given, name)) is not None:
        if tail is None and size:
            raise TensorError(
                f"input {shown(name)}: no binary data follows the JSON; its length is told by the"
                " header Inference-Header-Content-Length"
            )
        found = tail(size, name) if tail is not None else b""
        return Tensor(name, datatype, shape, raw.read(found, datatype, shape, count, name))
    if "data" not in given:
        raise TensorError(f"input {shown(name)}: 'data' is missing")
    flat = _flat(given["data"], given["shape"], count, name)
    return Tensor(name, datatype, shape, _array(flat, datatype, shape, name, may_hold_booleans))


def tensor_head(given: Any, k: int) -> tuple[str, str, tuple[int, ...], int]:
    """Name, datatype and shape of input k, and how many elements that are."""
    if type(given) is not dict:
        raise BadRequestError(f"inputs[{k}] must be an object, not {kind(given)}")
    name = given.get("name")
    if type(name) is not str or not name:
        raise BadRequestError(f"inputs[{k}].name must be the name of a tensor")
    datatype = given.get("datatype")
    if type(datatype) is not str or datatype not in DTYPES:
        raise TensorError(
            f"input {shown(name)}: datatype {shown(datatype)} is none of {', '.join(DTYPES)}"
        )
    shape: Any = given.get("shape")
    count = _n_elements(shape, name)
    return name, datatype, tuple(shape), count


def _binary_size(given: dict[str, Any], name: str) -> int | None:
    """Bytes of an input that come after the JSON; None when its data is in the JSON."""
    parameters = given["parameters"]
    if parameters is None:
        return None
    if type(parameters) is not dict:
        raise BadRequestError(
            f"input {shown(name)}: 'parameters' must be an object, not {kind(parameters)}"
        )
    if "shared_memory_region" in parameters:
        raise TensorError(f"input {shown(name)}: {NO_SHARED_MEMORY}")
    if (size := parameters.get("binary_data_size")) is None:
        return None
    if type(size) is not int or size < 0:
        raise TensorError(f"input {shown(name)}: binary_data_size must be an integer >= 0")
    if "data" in given:
        raise TensorError(f"input {shown(name)}: give 'data' or binary_data_size, not both")
    return size


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
            raise TensorError(f"input {shown(name)}: data must be a list, not {kind(data)}")
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
                    got = f"{len(inner)} elements" if type(inner) is list else kind(inner)
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
    elif values and kind == "BF16":
        return _rounded(_array(values, "FP32", shape, name, may_hold_booleans), name)
    try:
        return np.array(values, dtype=DTYPES[kind]).reshape(shape)
    except (ValueError, OverflowError):
        raise TensorError(f"input {shown(name)}: no array can have shape {shown(shape)}") from None


def _rounded(array: Array, name: str) -> Array:
    """Numbers as BF16; JSON has them in decimal, so nearly all are rounded."""
    rounded = narrowed(array)
    lost = np.flatnonzero(np.isinf(widened(rounded)) & np.isfinite(array))
    if len(lost):
        raise TensorError(
            f"input {shown(name)}: element {lost[0]} is {array.ravel()[lost[0]]};"
            " BF16 cannot hold it: out of range"
        )
    return rounded


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


def read_rest(request: dict[str, Any], call: Call) -> None:
    """Everything beside `inputs`; fields that the protocol does not know are passed over."""
    identity = request.get("id")
    if identity is not None:
        if type(identity) is not str:
            raise BadRequestError(f"'id' must be text, not {kind(identity)}")
        call.id = identity
    outputs = request.get("outputs")
    if outputs is not None:
        if type(outputs) is not list or len(outputs) > 1024:
            raise BadRequestError("'outputs' must be a list of up to 1024 objects with a 'name'")
        call.outputs = tuple(_wanted(output, k) for k, output in enumerate(outputs))
        call.is_binary = any(wanted.is_binary for wanted in call.outputs)
    if (parameters := request.get("parameters")) is not None:
        _read_parameters(parameters, call)


def _read_parameters(parameters: Any, call: Call) -> None:
    """Those with a meaning here; of the rest, Triton's own are refused, as it does itself."""
    if type(parameters) is not dict:
        raise BadRequestError(f"'parameters' must be an object, not {kind(parameters)}")
    for name in parameters:
        if name.startswith("triton_"):
            raise BadRequestError(f"parameter {shown(name)} is reserved and may not be sent")
    call.parameters = parameters
    if parameters.get("binary_data_output") is not None and not call.outputs:
        call.is_binary = _flag(parameters, "binary_data_output", "parameters")
    timeout = parameters.get("timeout")
    if timeout is not None:
        if type(timeout) is not int or timeout < 0:
            raise BadRequestError("parameters.timeout must be an integer >= 0, in microseconds")
        call.timeout_s = timeout / 1e6 if timeout else None


def _wanted(output: Any, k: int) -> OutputWanted:
    name = output.get("name") if type(output) is dict else None
    if type(name) is not str:
        raise BadRequestError(f"outputs[{k}] must be an object with a 'name'")
    parameters = output.get("parameters")
    if parameters is None:
        return OutputWanted(name)
    where = f"outputs[{k}].parameters"
    if type(parameters) is not dict:
        raise BadRequestError(f"{where} must be an object, not {kind(parameters)}")
    if "shared_memory_region" in parameters:
        raise BadRequestError(f"outputs[{k}]: {NO_SHARED_MEMORY}")
    n_classes = parameters.get("classification")
    if n_classes is None:
        n_classes = 0
    elif type(n_classes) is not int or n_classes < 1:
        raise BadRequestError(f"{where}.classification must be an integer >= 1")
    return OutputWanted(name, _flag(parameters, "binary_data", where), n_classes)


def _flag(parameters: dict[str, Any], name: str, where: str) -> bool:
    value = parameters.get(name)
    if value is not None and type(value) is not bool:
        raise BadRequestError(f"{where}.{name} must be true or false")
    return value is True


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


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return _JSON_KINDS.get(type(value), "something else")
