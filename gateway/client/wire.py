"""Tensors to bytes and back, as JSON or as raw bytes behind JSON; what an answer is to a caller."""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from gateway.client.errors import AnswerError
from gateway.tensors import BFLOAT16, DTYPES, Array, datatype, narrowed, widened
from registry.signature import TensorSpec

JSON_LENGTH = "inference-header-content-length"
_FLOATS = frozenset(("FP16", "BF16", "FP32", "FP64"))


@dataclass(frozen=True, slots=True)
class Prediction(Mapping[str, Array]):
    """One answer: a mapping from output names to arrays, in the order asked for."""

    outputs: Mapping[str, Array]
    model: str
    version: int
    """The version that answered."""
    request_id: str
    """What labels, logs and metrics know this prediction by."""
    id: str | None = None
    """What the caller gave as `id`."""

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a model takes and gives."""

    name: str
    versions: tuple[int, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def write_json(
    arrays: Mapping[str, Array],
    outputs: Sequence[str] | None,
    id: str | None,  # noqa: A002
) -> tuple[bytes, dict[str, str]]:
    """A request with tensors as JSON, and its headers; NaN and infinities are written bare."""
    inputs = [
        {**_named(name, array), "data": _numbers(name, array)} for name, array in arrays.items()
    ]
    request: dict[str, Any] = {"inputs": inputs}
    if outputs is not None:
        request["outputs"] = [{"name": name} for name in outputs]
    if id is not None:
        request["id"] = id
    # orjson would turn NaN into null, which says less.
    body = json.dumps(request, separators=(",", ":")).encode()
    return body, {"content-type": "application/json"}


def write_binary(
    arrays: Mapping[str, Array],
    outputs: Sequence[str] | None,
    id: str | None,  # noqa: A002
) -> tuple[bytes, dict[str, str]]:
    """A request with tensors as raw bytes behind its JSON, and its headers."""
    blocks = [_raw(name, array) for name, array in arrays.items()]
    inputs = [
        {**_named(name, array), "parameters": {"binary_data_size": len(block)}}
        for (name, array), block in zip(arrays.items(), blocks, strict=True)
    ]
    request: dict[str, Any] = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    if outputs is not None:
        raw = {"binary_data": True}
        request["outputs"] = [{"name": name, "parameters": raw} for name in outputs]
    if id is not None:
        request["id"] = id
    head = orjson.dumps(request)
    headers = {"content-type": "application/octet-stream", JSON_LENGTH: str(len(head))}
    return b"".join((head, *blocks)), headers


def read_answer(body: bytes, headers: Mapping[str, str], who: str) -> Prediction:
    """An answer with tensors as JSON, as raw bytes, or both.

    Raises
    ------
    AnswerError : it is none.
    """
    try:
        length = int(headers.get(JSON_LENGTH, len(body)))
        if not 0 <= length <= len(body):
            raise ValueError("its JSON is longer than the answer")  # noqa: TRY301
        value = _lenient(body[:length])
        outputs: dict[str, Array] = {}
        at = length
        for tensor in value["outputs"]:
            kind, shape = tensor["datatype"], tuple(tensor["shape"])
            if any(axis < 0 for axis in shape):
                raise ValueError("a shape has a size below 0")  # noqa: TRY301
            size = (tensor.get("parameters") or {}).get("binary_data_size")
            if size is None:
                array = _from_numbers(kind, tensor["data"])
            else:
                if size < 0 or at + size > len(body):
                    raise ValueError("it is shorter than its tensors")  # noqa: TRY301
                array = _from_raw(kind, memoryview(body)[at : at + size])
                at += size
            outputs[str(tensor["name"])] = array.reshape(shape)
        return Prediction(
            outputs,
            str(value["model_name"]),
            int(value.get("model_version") or 0),
            headers.get("x-request-id", ""),
            value.get("id"),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, struct.error) as error:
        raise AnswerError(f"{who}: what came is no answer to a prediction: {error!r}") from None


def _named(name: str, array: Array) -> dict[str, Any]:
    return {"name": name, "datatype": _datatype(name, array), "shape": list(array.shape)}


def _datatype(name: str, array: Array) -> str:
    kind = datatype(array.astype(array.dtype.newbyteorder("="), copy=False))
    if kind == "BYTES" and array.dtype.kind not in "OUS":
        raise TypeError(f"input {name!r}: an array of {array.dtype} has no datatype to be sent as")
    return kind


def _numbers(name: str, array: Array) -> list[Any]:
    if _datatype(name, array) != "BYTES":
        flat: list[Any] = array.ravel().tolist()
        return flat
    return [_text_of(name, element).decode() for element in array.ravel().tolist()]


def _raw(name: str, array: Array) -> bytes:
    if _datatype(name, array) != "BYTES":
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    parts: list[bytes] = []
    for element in array.ravel().tolist():
        text = _text_of(name, element)
        parts += (struct.pack("<I", len(text)), text)
    return b"".join(parts)


def _text_of(name: str, element: object) -> bytes:
    if isinstance(element, str):
        return element.encode()
    if isinstance(element, bytes):
        element.decode()  # ValueError here is plainer than a refusal from afar.
        return element
    raise TypeError(f"input {name!r}: BYTES takes text, not {type(element).__name__}")


def _from_numbers(kind: str, data: list[Any]) -> Array:
    if kind == "BYTES":
        return np.array(data, dtype=np.object_)
    # JSON has neither NaN nor infinity: a server writes null for both. numpy reads None as NaN.
    return np.array(data, dtype=DTYPES[kind])


def _from_raw(kind: str, raw: memoryview) -> Array:
    if kind == "BYTES":
        texts: list[str] = []
        at = 0
        while at < len(raw):
            (size,) = struct.unpack_from("<I", raw, at)
            at += 4 + size
            if at > len(raw):
                raise ValueError("a text is longer than its tensor")
            texts.append(str(raw[at - size : at], "utf-8"))
        return np.array(texts, dtype=np.object_)
    if kind == "BF16":  # numpy cannot compute with it: the caller gets float32, which is exact.
        return widened(np.frombuffer(raw, BFLOAT16))
    # A copy: the caller's arrays can be written to, and do not hold on to the whole answer.
    return np.frombuffer(raw, DTYPES[kind].newbyteorder("<")).astype(DTYPES[kind])


def of_list(name: str, value: object, about: Metadata) -> Array:
    """An array as it is; a list or number as an array of the input's datatype."""
    if isinstance(value, np.ndarray):
        return value
    spec = next((spec for spec in about.inputs if spec.name == name), None)
    # The server names the input that it does not have better than this program could.
    return np.asarray(value) if spec is None else _cast(name, np.asarray(value), spec)


def of_column(name: str, column: object, about: Metadata) -> Array:
    """A column in the datatype and shape of its input."""
    array = np.asarray(column)
    spec = next((spec for spec in about.inputs if spec.name == name), None)
    if spec is None:
        return array
    if array.ndim == 1 and spec.shape in {(-1, 1), (array.shape[0], 1)}:
        array = array.reshape(-1, 1)
    return _cast(name, array, spec)


def _cast(name: str, array: Array, spec: TensorSpec) -> Array:
    """The array in the input's datatype, where no value changes but by rounding of floats."""
    wanted = DTYPES.get(spec.datatype)
    if wanted is None:
        raise TypeError(f"input {name!r}: {spec.datatype} is not written by this client")
    if array.dtype == wanted or (spec.datatype == "BYTES" and array.dtype.kind in "OUS"):
        return array
    if array.dtype.kind == "O" and spec.datatype in _FLOATS:
        array = np.array(array, dtype=np.float64)  # a column with None in it
    if array.size == 0:
        return np.empty(array.shape, wanted)
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        info = np.iinfo(wanted)
        fits = info.min <= int(array.min()) and int(array.max()) <= info.max
    else:
        fits = spec.datatype in _FLOATS and array.dtype.kind in "iuf"
    if fits and wanted == BFLOAT16:
        return narrowed(array.astype(np.float32))
    if not fits:
        raise TypeError(f"input {name!r} takes {spec.datatype}, not values of {array.dtype}")
    return array.astype(wanted)


def _lenient(body: bytes) -> Any:
    """JSON, or what others write for it: with bare NaN and Infinity."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return json.loads(body)


@dataclass(frozen=True, slots=True)
class Change:
    """What came of a change of what is in force."""

    revision: int
    """In force now; of a dry run: what would be."""
    is_changed: bool
    """Whether there was anything to change."""
    diff: tuple[str, ...]
    """A line for each thing that is different."""
    moved: Mapping[str, float]
    """By model: percent of its units that another version answers than before."""
    undo: str
    """The command that takes it back."""
    is_applied: bool | None
    """Whether all live workers have it in force; None: not waited for."""
    laggards: tuple[str, ...]
    """Workers that have not, each with the revision it has."""


def read_change(value: Any) -> Change:
    """The answer to a change.

    Raises
    ------
    KeyError, TypeError, ValueError : it is none.
    """
    return Change(
        int(value["revision"]),
        bool(value["changed"]),
        tuple(value["diff"]),
        dict(value["moved"]),
        str(value["undo"]),
        value.get("applied"),
        tuple(value.get("laggards", ())),
    )
