"""Rows that a version is run on before it serves: to warm it up, and to see that it is right.

`warmup.jsonl` holds a line `{"inputs": {"x": [[1, 2]]}}` for each run. `golden.jsonl` holds what
must come out as well: `{"inputs": {...}, "outputs": {"y": [0.5]}, "rtol": 1e-4, "atol": 1e-6}`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from gateway.errors import BadRequestError, GatewayError, VersionRefusedError, shown
from gateway.runtime import Session
from gateway.tensors import BFLOAT16, DTYPES, Array, narrowed, widened
from registry.signature import Signature, TensorSpec

LINES_MAX = 10_000
BYTES_MAX = 64 << 20


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    inputs: dict[str, Any]
    outputs: dict[str, Any] = {}
    rtol: float = 1e-4
    atol: float = 1e-6


@dataclass(frozen=True, slots=True)
class Case:
    """One line, as arrays."""

    line: int
    inputs: list[Array]
    outputs: dict[int, Array]
    """Expected, by the place of the output in the signature."""
    rtol: float
    atol: float


def read(data: bytes, name: str, signature: Signature) -> list[Case]:
    """The cases of a file, held against the signature.

    Raises
    ------
    BadRequestError : a line is no case, or does not fit, with its number.
    """
    if len(data) > BYTES_MAX:
        raise BadRequestError(f"{name}: {len(data)} bytes; at most {BYTES_MAX} are read")
    cases: list[Case] = []
    for number, text in enumerate(data.splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=_Line)
            cases.append(_case(number, line, signature))
        except (msgspec.DecodeError, ValueError, TypeError, OverflowError) as error:
            raise BadRequestError(f"{name}: line {number}: {error}") from None
        if len(cases) > LINES_MAX:
            raise BadRequestError(f"{name}: more than {LINES_MAX} lines")
    if not cases:
        raise BadRequestError(f"{name}: is empty")
    return cases


def run(session: Session, cases: Sequence[Case], name: str) -> None:
    """Run the cases, and compare what comes out with what must.

    Raises
    ------
    VersionRefusedError : the model fails on a case, or answers otherwise.
    """
    for case in cases:
        try:
            found = session.run(case.inputs)
        except GatewayError as error:
            raise VersionRefusedError(f"{name}: line {case.line}: {error}") from None
        for place, expected in case.outputs.items():
            problem = _difference(found[place], expected, case)
            if problem:
                output = session.signature.outputs[place].name
                raise VersionRefusedError(f"{name}: line {case.line}: output {output!r}: {problem}")


def _case(number: int, line: _Line, signature: Signature) -> Case:
    inputs = [_array(spec, line.inputs) for spec in signature.inputs]
    if more := line.inputs.keys() - {spec.name for spec in signature.inputs}:
        raise ValueError(f"the model has no input {shown(min(more))}")
    places = {spec.name: k for k, spec in enumerate(signature.outputs)}
    if more := line.outputs.keys() - places.keys():
        raise ValueError(f"the model has no output {shown(min(more))}")
    outputs = {
        places[name]: _array(signature.outputs[places[name]], line.outputs) for name in line.outputs
    }
    return Case(number, inputs, outputs, line.rtol, line.atol)


def _array(spec: TensorSpec, values: dict[str, Any]) -> Array:
    if spec.name not in values:
        raise ValueError(f"no values for {spec.name!r}")
    given = values[spec.name]
    if spec.datatype == "BYTES":
        array = np.array(given, dtype=np.object_)
    elif spec.datatype == "BF16":
        array = narrowed(np.array(given, dtype=np.float32))
    else:
        array = np.array(given, dtype=DTYPES[spec.datatype])
    if not spec.fits(array.shape):
        raise ValueError(
            f"{spec.name!r} has shape {list(array.shape)}, the model's is {list(spec.shape)}"
        )
    return array


def _difference(found: Array, expected: Array, case: Case) -> str:
    """What is wrong with an output; "" if nothing is."""
    if found.shape != expected.shape:
        return f"has shape {list(found.shape)} instead of {list(expected.shape)}"
    if found.dtype == BFLOAT16:
        found, expected = widened(found), widened(expected)
    if found.dtype.kind == "f":
        wide, wanted = found.astype(np.float64), expected.astype(np.float64)
        agrees = np.isclose(wide, wanted, rtol=case.rtol, atol=case.atol, equal_nan=True)
    else:
        agrees = np.asarray(found == expected)
    if agrees.all():
        return ""
    first = np.argwhere(~agrees)[0].tolist() if agrees.ndim else []
    at = tuple(first)
    return f"is {shown(found[at])} at {first} instead of {shown(expected[at])}"
