"""A prediction asked for, whatever it was written in, and its fit to what a model takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gateway.errors import TensorError, shown
from gateway.tensors import BFLOAT16, Array, widened
from registry.signature import Signature, TensorSpec


@dataclass(slots=True)
class Tensor:
    """One named array of a request."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    array: Array


@dataclass(slots=True)
class OutputWanted:
    """One output that the client asked for."""

    name: str
    is_binary: bool = False
    """As raw bytes, where the format has a choice."""
    n_classes: int = 0
    """Only the so many largest elements of a row, as texts `value:index`; 0: all, as they are."""


@dataclass(slots=True)
class Call:
    """One prediction as the client asked for it."""

    inputs: list[Tensor]
    outputs: tuple[OutputWanted, ...] = ()
    """In the order wanted; empty: all, in the model's order."""
    id: str | None = None
    timeout_s: float | None = None
    model: str = ""
    """Named by the message itself, where the carrier does not name it."""
    version: str | None = None
    is_binary: bool = False
    """Some output is wanted as raw bytes; all of them, when `outputs` is empty."""
    parameters: Mapping[str, Any] | None = None
    """Of the request as a whole; routes may look at them."""
    decision: bytes = b""
    """What was decided for it, where the answer itself must say so (streams)."""

    def bind(self, signature: Signature, model: str) -> list[Array]:
        """The request's arrays in the model's own order.

        Raises
        ------
        TensorError : a tensor is missing, extra, twice there, or of another datatype or shape.
        """
        return _bound(self.inputs, signature, model)


@dataclass(frozen=True, slots=True)
class Served:
    """Who answers, as an answer names it."""

    model: str
    version: int
    signature: Signature
    json_head: bytes
    """The start of every JSON answer: `{"model_name":"m","model_version":"1"`."""


@dataclass(slots=True)
class Answer:
    """What goes back to the client."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    """Lower-case names; the content type, and what belongs to the format."""


class Codec(Protocol):
    """A format of requests and answers. Holds what the headers of one request said, or nothing."""

    def decode(self, body: bytes) -> Call:
        """The body as a call; raises BadRequestError with what is wrong."""

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """The answer to a call; `outputs` are all, in the model's order."""


def _bound(given: list[Tensor], signature: Signature, model: str) -> list[Array]:
    specs = signature.inputs
    # Nearly every client sends the tensors in the model's order: compare in place first.
    if len(given) == len(specs):
        arrays: list[Array] = []
        for tensor, spec in zip(given, specs, strict=True):
            if tensor.name != spec.name:
                break
            if tensor.datatype == spec.datatype and spec.fits(tensor.shape):
                arrays.append(tensor.array)
            else:
                arrays.append(_checked(tensor, spec, model))
        else:
            return arrays
    by_name: dict[str, Tensor] = {}
    for tensor in given:
        if tensor.name in by_name:
            raise TensorError(f"input {shown(tensor.name)} is given twice; give it once")
        by_name[tensor.name] = tensor
    names = [spec.name for spec in specs]
    for name in by_name:
        if name not in names:
            raise TensorError(
                f"model {model!r} has no input {shown(name)}; it takes: {_list(names)}"
            )
    if missing := [name for name in names if name not in by_name]:
        raise TensorError(
            f"input {_list(missing)} is missing; model {model!r} takes: {_list(names)}"
        )
    return [_checked(by_name[spec.name], spec, model) for spec in specs]


def n_rows(arrays: Sequence[Array], signature: Signature, model: str) -> int:
    """Rows of a request: the common length of the first axis.

    Raises
    ------
    TensorError : two inputs disagree.
    """
    rows: int = arrays[0].shape[0]
    if len(arrays) == 1:
        return rows
    for array, spec in zip(arrays, signature.inputs, strict=True):
        if array.shape[0] != rows:
            raise TensorError(
                f"input {spec.name!r} of model {model!r} has {array.shape[0]} rows,"
                f" input {signature.inputs[0].name!r} has {rows}; they must agree"
            )
    return rows


def choose(call: Call, signature: Signature, model: str) -> Sequence[int]:
    """Positions of the outputs asked for, in the order asked for.

    Raises
    ------
    TensorError : no such output, or one asked for twice.
    """
    if not call.outputs:
        return range(len(signature.outputs))
    positions = {spec.name: k for k, spec in enumerate(signature.outputs)}
    names = [wanted.name for wanted in call.outputs]
    for name in names:
        if name not in positions:
            raise TensorError(
                f"model {model!r} has no output {shown(name)}; it gives: {_list(list(positions))}"
            )
    if len(set(names)) < len(names):
        raise TensorError("outputs: one is asked for twice; ask for it once")
    return [positions[name] for name in names]


def refuse_texts(call: Call, signature: Signature) -> None:
    """Refuse to classify texts, before anything runs.

    Raises
    ------
    TensorError : classes of an output of texts are asked for.
    """
    for wanted in call.outputs:
        if wanted.n_classes and any(
            spec.name == wanted.name and spec.datatype == "BYTES" for spec in signature.outputs
        ):
            raise TensorError(f"output {wanted.name!r} holds texts: it cannot be classified")


def classified(call: Call, signature: Signature, outputs: Sequence[Array]) -> Sequence[Array]:
    """The outputs, each whose classes were asked for as texts `value:index`, largest first."""
    if not any(wanted.n_classes for wanted in call.outputs):
        return outputs
    changed = list(outputs)
    names = [spec.name for spec in signature.outputs]
    for wanted in call.outputs:
        if wanted.n_classes:
            k = names.index(wanted.name)
            changed[k] = _classes(outputs[k], wanted, has_rows=signature.has_row_axis)
    return changed


def _classes(array: Array, wanted: OutputWanted, *, has_rows: bool) -> Array:
    if array.dtype == BFLOAT16:
        array = widened(array)
    n_rows = array.shape[0] if has_rows else 1
    rows = array.reshape(n_rows, -1) if array.size else np.zeros((n_rows, 0), array.dtype)
    n_classes = min(wanted.n_classes, rows.shape[1])
    # Largest first, the lower index among equals; NaN is no largest value and comes last.
    if rows.dtype.kind == "f":
        keys = np.where(np.isnan(rows), np.inf, -rows)
        places = np.lexsort((np.isnan(rows), keys), axis=-1)
    else:
        places = np.argsort(rows[:, ::-1], axis=-1, kind="stable")[:, ::-1]
        places = rows.shape[1] - 1 - places
    form = "{:.6f}:{}" if rows.dtype.kind == "f" else "{:d}:{}"
    texts = np.empty((n_rows, n_classes), np.object_)
    for k in range(n_rows):
        chosen = places[k, :n_classes]
        values = rows[k, chosen].tolist()
        pairs = zip(values, chosen.tolist(), strict=True)
        texts[k] = [form.format(value, place) for value, place in pairs]
    return texts if has_rows else texts[0]


def _checked(tensor: Tensor, spec: TensorSpec, model: str) -> Array:
    if tensor.datatype != spec.datatype:
        raise TensorError(
            f"input {spec.name!r} of model {model!r} is {spec.datatype},"
            f" the request gives {tensor.datatype}"
        )
    shape = tensor.shape
    # A model may leave the rank of an input open, which reads as a shape without axes.
    if spec.shape and not spec.fits(shape):
        raise TensorError(
            f"input {spec.name!r} of model {model!r} has shape {_shape(spec.shape)}"
            f"{' (-1: any size)' if -1 in spec.shape else ''}, the request gives {_shape(shape)}"
        )
    return tensor.array


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(repr(name) for name in names[:10]) + more
