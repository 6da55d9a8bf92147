"""The Open Inference Protocol with tensors as raw bytes behind the JSON, both ways.

Source: Triton, "binary tensor data extension".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from gateway.errors import BadRequestError, TensorError, TooLargeError, shown
from gateway.protocol import raw, v2_json
from gateway.protocol.call import Answer, Call, Served, Tensor, choose
from gateway.tensors import DTYPES, Array, datatype
from registry.signature import Signature, TensorSpec

_JSON = ((b"content-type", b"application/json"),)
_OCTETS = (b"content-type", b"application/octet-stream")
LENGTH_HEADER = b"inference-header-content-length"
"""Bytes of JSON before the tensors; 0: the body is one tensor and nothing else."""


class V2:
    """The protocol over HTTP: JSON, with raw tensors behind it where a request or answer has some.

    Parameters
    ----------
    bytes_max : a longer JSON part is refused; its numbers would take some thirty times its size
    json_length : bytes of JSON at the start of the body; None: the body is JSON
    """

    def __init__(self, bytes_max: int, json_length: int | None = None) -> None:
        self._bytes_max = bytes_max
        self._json_length = json_length

    def decode(self, body: bytes) -> Call:
        """The body as a call; TooLargeError, BadRequestError or TensorError when it is none."""
        json_length = self._json_length
        size = len(body) if json_length is None else json_length
        if size > len(body):
            raise BadRequestError(
                f"Inference-Header-Content-Length is {size}, the body has {len(body)} bytes"
            )
        if size > self._bytes_max:
            raise TooLargeError(
                f"the JSON is longer than {self._bytes_max} bytes (limits.json_bytes_max)"
            )
        if json_length is None:
            return v2_json.decode(body)
        if not size and body:
            return RawCall([], is_binary=True, body=body)
        tail = _Tail(memoryview(body)[size:])
        call = v2_json.decode(body[:size], tail.take)
        tail.end()
        return call

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """The answer, with the outputs that the call asked for."""
        signature = served.signature
        chosen = choose(call, signature, served.model)
        if call.is_binary:
            return _encode(served.json_head, call, signature, outputs, chosen)
        return Answer(v2_json.encode(served.json_head, call, signature, outputs, chosen), _JSON)


def json_length(header: bytes) -> int:
    """The value of the header that tells how long the JSON is.

    Raises
    ------
    BadRequestError : not a whole number, or absurdly long.
    """
    if not header.isdigit() or len(header) > 18:
        text = shown(header.decode("latin-1"))
        raise BadRequestError(
            f"Inference-Header-Content-Length must be an integer >= 0, not {text}"
        )
    return int(header)


@dataclass(slots=True)
class RawCall(Call):
    """A body that is the one input of its model and nothing else: one row of it."""

    body: bytes = b""

    def bind(self, signature: Signature, model: str) -> list[Array]:
        """The body as the model's input; TensorError when the model or the size does not allow."""
        if len(signature.inputs) != 1:
            names = ", ".join(repr(spec.name) for spec in signature.inputs[:10])
            raise TensorError(
                f"a body without JSON can be one input only; model {model!r} takes: {names}"
            )
        spec = signature.inputs[0]
        shape = self._shape(spec, model, has_rows=signature.has_row_axis)
        if spec.datatype == "BYTES":
            array = raw.read_one_text(self.body, shape, spec.name)
        else:
            count = 1
            for size in shape:
                count *= size
            array = raw.read(self.body, spec.datatype, shape, count, spec.name)
        self.inputs = [Tensor(spec.name, spec.datatype, shape, array)]
        return [array]

    def _shape(self, spec: TensorSpec, model: str, *, has_rows: bool) -> tuple[int, ...]:
        """The input's shape for one row; one more free axis takes what the body has."""
        shape = list(spec.shape)
        if has_rows:
            shape[0] = 1
        free = [k for k, size in enumerate(shape) if size < 0]
        if len(free) > 1:
            raise TensorError(
                f"input {spec.name!r} of model {model!r} has {len(free)} free axes in"
                f" {list(spec.shape)}: a body without JSON cannot tell their sizes"
            )
        if free:
            row_bytes = 1 if spec.datatype == "BYTES" else DTYPES[spec.datatype].itemsize
            for size in shape:
                row_bytes *= abs(size)  # The free one counts as one.
            is_text = spec.datatype == "BYTES"
            shape[free[0]] = 1 if is_text else len(self.body) // row_bytes if row_bytes else 0
        return tuple(shape)


class _Tail:
    """The bytes behind the JSON, handed out from the first to the last."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int, name: str) -> memoryview:
        """The next bytes, for the input of this name; TensorError when fewer are left."""
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise TensorError(
                f"input {shown(name)}: binary_data_size is {size},"
                f" {len(self._data) - start} bytes are left behind the JSON"
            )
        return self._data[start : self._at]

    def end(self) -> None:
        """Nothing may be left."""
        if more := len(self._data) - self._at:
            raise BadRequestError(f"{more} bytes behind the JSON belong to no input")


def _encode(
    head: bytes,
    call: Call,
    signature: Signature,
    arrays: Sequence[Array],
    chosen: Sequence[int],
) -> Answer:
    """An answer with some output as raw bytes behind the JSON."""
    parts = v2_json.start(head, call)
    tensors: list[bytes] = []
    before = b',"outputs":['
    for at, k in enumerate(chosen):
        array = arrays[k]
        output: dict[str, object] = {
            "name": signature.outputs[k].name,
            "datatype": datatype(array),
            "shape": array.shape,
        }
        if not call.outputs or call.outputs[at].is_binary:
            tensors.append(raw.write(array))
            output["parameters"] = {"binary_data_size": len(tensors[-1])}
            parts += (before, orjson.dumps(output)[:-1])
        else:
            parts += (before, orjson.dumps(output)[:-1], b',"data":', v2_json.data(array))
        before = b"},"
    parts.append(b"}]}")
    json_part = b"".join(parts)
    if not any(tensors):
        return Answer(json_part, _JSON)
    length = (LENGTH_HEADER, b"%d" % len(json_part))
    return Answer(b"".join((json_part, *tensors)), (_OCTETS, length))
