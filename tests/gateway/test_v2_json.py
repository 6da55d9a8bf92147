"""The usual body is checked while it is read, every other step by step: they say the same."""

import json
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.protocol import v2_json
from gateway.protocol.call import Call
from gateway.tensors import DTYPES

NUMBERS = st.one_of(
    st.integers(-300, 300),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
)
OTHERS = st.one_of(st.booleans(), st.none(), st.text(max_size=2), st.just({}), st.just([]))
KINDS = st.sampled_from([*DTYPES, "FP128"])


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    """One input: as it should be, or with something about it that is not."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape)) if shape else 1
    elements = NUMBERS if draw(st.integers(0, 4)) else st.one_of(NUMBERS, OTHERS)
    data: Any = draw(st.lists(elements, min_size=count, max_size=count))
    if draw(st.booleans()) and len(shape) >= 2:
        data = np.array([*data, None], object)[:-1].reshape(shape).tolist()
    given_: dict[str, Any] = {
        "name": draw(st.sampled_from(["x", "y", ""])),
        "datatype": draw(KINDS),
        "shape": shape,
        "data": data,
    }
    wrong = draw(st.integers(0, 9))
    if wrong == 0:
        del given_[draw(st.sampled_from(sorted(given_)))]
    elif wrong == 1:
        given_[draw(st.sampled_from(sorted(given_)))] = draw(st.one_of(OTHERS, NUMBERS))
    elif wrong == 2:
        given_["shape"] = [*shape, draw(st.sampled_from([-1, 2, True, 1.0]))]
    elif wrong == 3:
        given_["parameters"] = draw(st.sampled_from([None, {}, {"content_type": "np"}, 1]))
    return given_


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request with an input or two, and perhaps more."""
    request: dict[str, Any] = {"inputs": draw(st.lists(inputs(), max_size=2))}
    if draw(st.booleans()):
        request["id"] = draw(st.one_of(st.text(max_size=3), OTHERS))
    if draw(st.integers(0, 3)) == 0:
        request["parameters"] = draw(st.one_of(OTHERS, st.just({"timeout": 1000, "a": True})))
    if draw(st.integers(0, 3)) == 0:
        request["outputs"] = draw(st.one_of(OTHERS, st.just([{"name": "y"}])))
    if draw(st.integers(0, 3)) == 0:
        request["unknown"] = draw(OTHERS)
    return request


def outcome(body: bytes, tail: v2_json.Tail | None) -> Any:
    """What `decode` makes of a body: everything about the call, or the error's sentence."""
    try:
        call: Call = v2_json.decode(body, tail)
    except GatewayError as error:
        return (error.code, str(error))
    tensors = [
        (tensor.name, tensor.datatype, tensor.shape, tensor.array.dtype, tensor.array.tolist())
        for tensor in call.inputs
    ]
    return tensors, call.id, call.timeout_s, call.outputs, call.parameters


def no_tail(size: int, name: str) -> memoryview:
    """Where tensors may follow the JSON a body is read step by step; none follow here."""
    raise AssertionError(f"{size} bytes of {name} were asked for")


@settings(max_examples=400, deadline=None)
@example({"inputs": [{"name": "x", "datatype": "UINT8", "shape": [1, 0, -1], "data": [[]]}]})
@given(requests())
@example({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, True]}]})
@example({"inputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [1.0]}]})
@example({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1e39]}]})
@example({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 1], "data": [[[1]]]}]})
@example({"inputs": [{"name": "x", "datatype": "FP64", "shape": [-1, -1], "data": [1]}]})
def test_both_ways_to_read_a_body_say_the_same(request: dict[str, Any]) -> None:
    """Tensors, or the sentence about what is wrong."""
    body = json.dumps(request).encode()

    assert outcome(body, None) == outcome(body, no_tail)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'{"inputs":null}', b'{"inputs":[]}', b"\xff", b'{"id":"\xff"}',
        b'{"inputs":[{"name":"\\ud800","shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1e999]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[01]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}]} 1',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}],"inputs":3}',
        b'{"inputs":[{"name":"x","name":"z","shape":[1],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[' + b"1," * 40 + b'1],"datatype":"FP32","data":[1]}]}',
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b',"inputs":[]}',
    ],
)  # fmt: skip
def test_a_body_that_is_none_is_the_same_either_way(body: bytes) -> None:
    """Bytes that no writer of JSON makes."""
    # As they are written: NaN is no equal of itself.
    assert repr(outcome(body, None)) == repr(outcome(body, no_tail))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["FP32", "FP64"]), st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_numbers_are_those_that_were_sent(kind: str, values: list[float]) -> None:
    """Against numpy's own conversion; NaN and infinity as the standard library writes them."""
    request = {"name": "x", "datatype": kind, "shape": [len(values)], "data": values}

    array = v2_json.decode(json.dumps({"inputs": [request]}).encode()).inputs[0].array

    np.testing.assert_array_equal(array, np.array(values, DTYPES[kind]))


def test_a_long_body_is_read_by_the_parser_that_is_faster_with_numbers() -> None:
    """A row of 30 numbers and ten thousand of them: the same numbers."""
    values = np.random.default_rng(7).normal(size=(2_000, 5))
    for rows in (values[:6], values):
        given_ = {"name": "x", "datatype": "FP64", "shape": list(rows.shape), "data": rows.tolist()}
        body = orjson.dumps({"inputs": [given_]})

        np.testing.assert_array_equal(v2_json.decode(body).inputs[0].array, rows)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_sizes_and_no_nesting_are_more_than_a_bad_request(rank) -> None:
    """Of none, below none and beyond 64 bits, with lists of every depth: a tensor or words."""
    sizes = (0, 1, 2, 2**31, 2**62, 2**63 - 1, 2**63, -1, -(2**63))
    n_read = 0
    for shape in product(sizes, repeat=rank):
        for data in ([], [[]], [1], [[1]], [[], []], ["a"], [[[]]]):
            for datatype in ("UINT8", "FP64", "BYTES"):
                one = {"name": "x", "datatype": datatype, "shape": list(shape), "data": data}
                with suppress(GatewayError):
                    call = v2_json.decode(json.dumps({"inputs": [one]}).encode(), None)
                    assert call.inputs[0].array.shape == shape
                    n_read += 1
    assert n_read
