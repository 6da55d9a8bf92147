"""Protobuf: ModelInferRequest to a call, outputs to ModelInferResponse, raw tensors preferred.

A message may hold tensors raw, or as typed lists, which take many times their size as objects: a
large message is walked before anything is built from it, and refused when too much of it is lists.
Source: Open Inference Protocol, "GRPC"; wire types: Protocol Buffers, "Encoding".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from gateway.errors import BadRequestError, GatewayError, TensorError, TooLargeError, shown
from gateway.protocol import raw as raw_form
from gateway.protocol.call import Answer, Call, OutputWanted, Served, Tensor, choose
from gateway.protocol.stubs import inference_pb2 as pb
from gateway.protocol.v2_json import NO_SHARED_MEMORY, _sentence, read_rest, tensor_head
from gateway.tensors import DTYPES, Array, datatype

_LISTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents",
    "INT32": "int_contents", "INT64": "int64_contents", "UINT8": "uint_contents",
    "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""Which list holds a datatype's elements; the sixteen-bit floats come raw only."""
_FINAL = "triton_enable_empty_final_response"
_FINAL_ANSWER = "triton_final_response"
_DECISION = "x-driftgate-decision"
_TENSORS_MAX = 1024
_SMALL_BYTES = 65_536
"""What is shorter cannot grow into much."""
_FIELDS_MAX = 100_000
_RAW_OUTPUT, _INFER_RESPONSE = b"\x32", b"\x12"
"""Tags: raw_output_contents of an answer, infer_response of a stream's, each a length and bytes."""
_HEADERS = ((b"content-type", b"application/grpc"),)

_LAST = pb.ModelInferResponse(
    parameters={_FINAL_ANSWER: pb.InferParameter(bool_param=True)}
).SerializeToString()

# How much a field can grow: a number stands for "as many bytes as it has", a table for a message.
_FLAT = 0
_Plan = Mapping[int, "int | _Plan"]
_CONTENTS: _Plan = {1: _FLAT, 6: _FLAT, 7: _FLAT}
_REQUEST: _Plan = {5: {5: _CONTENTS}, 7: _FLAT}


@dataclass(slots=True)
class MessageCall(Call):
    """A call, and what its answer must say about being the last."""

    wants_final: bool = False
    """The answer says that no other follows."""


class Protobuf:
    """ModelInferRequest and ModelInferResponse as a codec.

    Parameters
    ----------
    bytes_max : bytes of a message beside raw tensors; lists take some thirty times their size
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max

    def decode(self, body: bytes) -> MessageCall:
        """The message as a call; TooLargeError, BadRequestError or TensorError when it is none."""
        return _call(self._parsed(body))

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """The answer, with the outputs that the call asked for."""
        return Answer(_response(call, served, outputs), _HEADERS)

    def _parsed(self, body: bytes) -> pb.ModelInferRequest:
        if len(body) > _SMALL_BYTES and _loose_bytes(body) > self._bytes_max:
            raise TooLargeError(
                f"the message has more than {self._bytes_max} bytes beside raw tensors"
                " (limits.json_bytes_max); send them as raw_input_contents"
            )
        request: pb.ModelInferRequest = parsed(pb.ModelInferRequest, body)
        return request


class StreamProtobuf(Protobuf):
    """The same for one message of a stream: answers and errors are ModelStreamInferResponse."""

    def __init__(self, bytes_max: int) -> None:
        super().__init__(bytes_max)
        self._id = ""

    def decode(self, body: bytes) -> MessageCall:
        """The message as a call; remembers its id, which an error must name."""
        request = self._parsed(body)
        self._id = request.id
        return _call(request)

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """The answer, with the outputs that the call asked for."""
        content = _response(call, served, outputs)
        if call.decision:  # Messages that follow each other are one: this adds a parameter.
            said = pb.ModelInferResponse()
            said.parameters[_DECISION].string_param = call.decision.decode()
            content += said.SerializeToString()
        return Answer(b"".join((_INFER_RESPONSE, _length(len(content)), content)), _HEADERS)

    def encode_error(self, error: GatewayError) -> bytes:
        """An error of one message: the stream goes on."""
        message = pb.ModelStreamInferResponse(error_message=str(error))
        message.infer_response.id = self._id
        content: bytes = message.SerializeToString()
        return content


def parsed(kind: Any, body: bytes) -> Any:
    """A message of this kind.

    Raises
    ------
    BadRequestError : the bytes are none.
    """
    try:
        return kind.FromString(body)
    except (DecodeError, RecursionError):
        raise BadRequestError(f"the message is no {kind.DESCRIPTOR.name}") from None


def _call(request: pb.ModelInferRequest) -> MessageCall:
    given, raw = request.inputs, request.raw_input_contents
    n_inputs = len(given)
    if not n_inputs:
        raise BadRequestError("'inputs' must be a list of at least one tensor")
    if n_inputs > _TENSORS_MAX or len(request.outputs) > _TENSORS_MAX:
        raise BadRequestError(f"the message has more than {_TENSORS_MAX} tensors")
    if raw:
        if len(raw) != n_inputs:
            raise BadRequestError(
                f"raw_input_contents has {len(raw)} entries for {n_inputs} inputs; each has one"
            )
        tensors = [_raw(tensor, raw[k], k) for k, tensor in enumerate(given)]
    else:
        tensors = [_typed(tensor, k) for k, tensor in enumerate(given)]
    call = MessageCall(
        tensors,
        id=request.id or None,
        model=request.model_name,
        version=request.model_version or None,
    )
    if request.outputs or request.parameters:
        _read_beside(request, call)
    return call


def _read_beside(request: pb.ModelInferRequest, call: MessageCall) -> None:
    """Outputs and parameters, with the same rules as in JSON."""
    parameters = values(request.parameters)
    wants_final = parameters.pop(_FINAL, False)
    if type(wants_final) is not bool:
        raise BadRequestError(f"parameters.{_FINAL} must be true or false")
    call.wants_final = wants_final
    if not parameters and not any(output.parameters for output in request.outputs):
        call.outputs = tuple(OutputWanted(output.name) for output in request.outputs)
        return
    outputs = [
        {"name": output.name, "parameters": values(output.parameters)} for output in request.outputs
    ]
    read_rest({"outputs": outputs, "parameters": parameters}, call)


def values(parameters: Any) -> dict[str, Any]:
    """Parameters by name; one that holds nothing is null."""
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        found[name] = None if choice is None else getattr(parameter, choice)
    return found


def _head(tensor: Any, k: int) -> tuple[str, str, tuple[int, ...], int]:
    """Name, datatype, shape and number of elements of an input, by the rules of JSON."""
    given = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    head = tensor_head(given, k)
    if tensor.parameters and "shared_memory_region" in tensor.parameters:
        raise TensorError(f"input {shown(tensor.name)}: {NO_SHARED_MEMORY}")
    return head


def _raw(tensor: Any, raw: bytes, k: int) -> Tensor:
    """An input whose elements are in `raw`, little endian and without gaps."""
    name, kind, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
    dtype = DTYPES.get(kind)
    if (
        dtype is not None
        and dtype.kind == "f"
        and name
        and 0 < len(shape) < 9
        and min(shape) > 0
        and prod(shape) * dtype.itemsize == len(raw)
        and not tensor.HasField("contents")
        and not tensor.parameters
    ):  # Nearly all tensors: nothing below has anything to say about them.
        return Tensor(name, kind, shape, np.ndarray(shape, dtype, raw))
    name, kind, shape, count = _head(tensor, k)
    if tensor.HasField("contents"):
        raise TensorError(
            f"input {shown(name)}: raw_input_contents and contents are given; give one of them"
        )
    return Tensor(name, kind, shape, raw_form.read(raw, kind, shape, count, name))


def _typed(tensor: Any, k: int) -> Tensor:
    """An input whose elements are in the list that belongs to its datatype."""
    name, kind, shape, count = _head(tensor, k)
    field = _LISTS.get(kind)
    filled = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if field is None:
        raise TensorError(f"input {shown(name)}: {kind} is sent in raw_input_contents only")
    if filled and filled != [field]:
        raise TensorError(f"input {shown(name)}: {kind} is sent in {field}, not {filled[0]}")
    elements = getattr(tensor.contents, field)
    if len(elements) != count:
        raise TensorError(
            f"input {shown(name)}: shape {list(shape)} needs {count} elements,"
            f" data has {len(elements)}"
        )
    array = _texts(elements, name) if kind == "BYTES" else _numbers(elements, kind, count, name)
    try:
        return Tensor(name, kind, shape, array.reshape(shape))
    except (ValueError, OverflowError):
        raise TensorError(
            f"input {shown(name)}: no array can have shape {shown(list(shape))}"
        ) from None


def _numbers(elements: Any, kind: str, count: int, name: str) -> Array:
    """A list of numbers, flat; the lists of integers are wider than the small datatypes."""
    dtype = DTYPES[kind]
    if dtype.itemsize > 2 or dtype.kind not in "iu":
        return np.fromiter(elements, dtype, count)
    wide: Array = np.fromiter(elements, np.int64, count)
    limits = np.iinfo(dtype)
    wrong = (wide < limits.min) | (wide > limits.max)
    if wrong.any():
        j = int(wrong.argmax())
        raise TensorError(_sentence(name, j, elements[j], kind))
    return wide.astype(dtype)


def _texts(elements: Any, name: str) -> Array:
    array: Array = np.empty(len(elements), np.object_)
    array[:] = [raw_form.text(value, k, name) for k, value in enumerate(elements)]
    return array


def _response(call: Call, served: Served, outputs: Sequence[Array]) -> bytes:
    """A ModelInferResponse in pieces, of which those that many answers share are made once.

    Messages of one kind, end to end, are one message with the fields of all.
    """
    parts = [_who(served.model, served.version)]
    if call.id:
        parts.append(pb.ModelInferResponse(id=call.id).SerializeToString())
    chosen = choose(call, served.signature, served.model)
    specs = served.signature.outputs
    for k in chosen:
        array = outputs[k]
        parts.append(_output_head(specs[k].name, datatype(array), array.shape))
    for k in chosen:
        # Always raw: the clients that most people use read nothing else.
        content = raw_form.write(outputs[k])
        parts += (_RAW_OUTPUT, _length(len(content)), content)
    if isinstance(call, MessageCall) and call.wants_final:
        parts.append(_LAST)
    return b"".join(parts)


@lru_cache(maxsize=1024)
def _who(model: str, version: int) -> bytes:
    content: bytes = pb.ModelInferResponse(
        model_name=model, model_version=str(version)
    ).SerializeToString()
    return content


@lru_cache(maxsize=1024)
def _output_head(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    head = pb.ModelInferResponse.InferOutputTensor(name=name, datatype=kind, shape=shape)
    content: bytes = pb.ModelInferResponse(outputs=[head]).SerializeToString()
    return content


def _length(size: int) -> bytes:
    """The length of what follows, in groups of seven bits."""
    parts = bytearray()
    while size > 0x7F:
        parts.append(size & 0x7F | 0x80)
        size >>= 7
    parts.append(size)
    return bytes(parts)


def _loose_bytes(body: bytes) -> int:
    """Bytes of a request that take more memory as objects: all that is not a flat tensor."""
    size, _ = _walked(body, 0, len(body), _REQUEST, _FIELDS_MAX)
    return size


def _walked(body: bytes, at: int, end: int, plan: _Plan, fields_left: int) -> tuple[int, int]:
    """Loose bytes of the message between two places, and how many more fields may be looked at.

    What cannot be understood counts as loose: whoever parses it will say what is wrong.
    """
    loose = 0
    while at < end:
        if fields_left <= 0:
            return loose + end - at, 0
        fields_left -= 1
        start = at
        tag, at = _varint(body, at, end)
        wire = tag & 7
        if wire == 2:
            size, at = _varint(body, at, end)
            inner = plan.get(tag >> 3)
            if at + size > end:
                return loose + end - start, fields_left
            if inner is None:
                loose += at + size - start
            elif inner == _FLAT:
                loose += at - start
            else:
                assert not isinstance(inner, int)  # noqa: S101  the plan is written above
                more, fields_left = _walked(body, at, at + size, inner, fields_left)
                loose += at - start + more
            at += size
        elif wire == 0:
            _, at = _varint(body, at, end)
            loose += at - start
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
            loose += at - start
        else:
            return loose + end - start, fields_left
    return loose, fields_left


def _varint(body: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of one to ten bytes, and where it ends; past the end when it has none."""
    value = shift = 0
    while at < end and shift < 70:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return 0, end + 1
