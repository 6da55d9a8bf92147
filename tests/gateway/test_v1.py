"""KServe v1 and TensorFlow Serving's REST: bodies to arrays, outputs to answers."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequestError, GatewayError, TensorError, TooLargeError
from gateway.protocol.call import Call, Served
from gateway.protocol.v1 import V1, ValuesCall, metadata
from gateway.tensors import Array
from registry.signature import Signature, TensorSpec

V = V1(1_000_000)


def takes(*inputs: tuple[str, str, tuple[int, ...]], gives: Any = ()) -> Signature:
    """A signature; without `gives` it gives what it takes."""
    specs = tuple(TensorSpec(*one) for one in inputs)
    return Signature(specs, tuple(TensorSpec(*one) for one in gives) or specs)


MATRIX = takes(("x", "FP32", (-1, 2)))
PAIR = takes(("a", "FP32", (-1,)), ("n", "INT64", (-1, 2)))


def bound(body: Any, signature: Signature) -> list[Array]:
    return V.decode(json.dumps(body).encode()).bind(signature, "m")


def answered(body: Any, signature: Signature, *outputs: Array) -> Any:
    call = V.decode(json.dumps(body).encode())
    call.bind(signature, "m")
    served = Served("m", 1, signature, b"")
    return json.loads(V.encode(call, served, outputs).body)


# -- what is read


def test_rows_without_names_fill_the_only_input() -> None:
    """TensorFlow Serving: `instances` is a list of values, one a row."""
    (x,) = bound({"instances": [[1, 2.5], [3, 4]]}, MATRIX)

    assert x.dtype == np.float32
    assert x.tolist() == [[1, 2.5], [3, 4]]


def test_rows_with_names_fill_every_input_by_name() -> None:
    """Each object is a row; the order of its names is of no meaning."""
    a, n = bound({"instances": [{"a": 1, "n": [1, 2]}, {"n": [3, 4], "a": 2}]}, PAIR)

    assert (a.tolist(), n.tolist()) == ([1, 2], [[1, 2], [3, 4]])
    assert (a.dtype, n.dtype) == (np.float32, np.int64)


def test_columns_by_name_and_without() -> None:
    """`inputs`: an object of tensors, or the only tensor as it is."""
    a, n = bound({"inputs": {"n": [[1, 2]], "a": [0.5]}}, PAIR)
    (x,) = bound({"inputs": [[1, 2]]}, MATRIX)
    (scalar,) = bound({"inputs": 5}, takes(("x", "FP64", ())))

    assert (a.tolist(), n.tolist(), x.tolist()) == ([0.5], [[1, 2]], [[1, 2]])
    assert (scalar.shape, scalar.item()) == ((), 5.0)


def test_a_single_value_a_row_fills_a_matrix_of_one_column() -> None:
    """Exporters write `[-1, 1]` where people think of one value a row."""
    a, b = bound(
        {"instances": [{"a": 1.5, "b": "x"}, {"a": 2, "b": "y"}]},
        takes(("a", "FP32", (-1, 1)), ("b", "BYTES", (-1, 1))),
    )

    assert (a.tolist(), b.tolist()) == ([[1.5], [2.0]], [["x"], ["y"]])


def test_base64_is_read_where_text_is_expected() -> None:
    """TensorFlow Serving writes binary values as an object with `b64`, also as a bare row."""
    text = takes(("s", "BYTES", (-1,)))
    coded = {"b64": base64.b64encode("größer".encode()).decode()}

    assert bound({"instances": [coded, "plain"]}, text)[0].tolist() == ["größer", "plain"]
    assert bound({"instances": [{"s": coded}]}, text)[0].tolist() == ["größer"]
    assert bound({"inputs": {"s": [coded]}}, text)[0].tolist() == ["größer"]
    assert bound({"inputs": coded}, takes(("s", "BYTES", ())))[0].item() == "größer"


@given(
    kind=st.sampled_from(
        ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"]
    ),
    data=st.data(),
)
def test_integers_keep_every_digit(kind: str, data: st.DataObject) -> None:
    """Whatever fits the datatype arrives exactly; a detour through float64 would lose digits."""
    dtype = np.dtype(kind.lower())
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    numbers = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=8))

    (x,) = bound({"instances": numbers}, takes(("x", kind, (-1,))))

    assert x.dtype == dtype
    assert x.tolist() == numbers


@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_floats_of_32_bits_arrive_bit_by_bit(numbers: list[float]) -> None:
    """A bare NaN or Infinity is read too, as numeric clients write it."""
    (x,) = bound({"inputs": numbers}, takes(("x", "FP32", (-1,))))

    np.testing.assert_array_equal(x, np.array(numbers, np.float32))


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    """1 + 2**-9 lies below half of bfloat16's step at 1, which is 2**-7."""
    (x,) = bound({"instances": [1.0, 1 + 2**-9, -2.5]}, takes(("x", "BF16", (-1,))))

    assert x.view("<u2").tolist() == [0x3F80, 0x3F80, 0xC020]


# -- what is refused

X32, X64 = takes(("x", "FP32", (-1,))), takes(("x", "INT64", (-1,)))
X8 = takes(("x", "UINT8", (-1,)))
TEXT, TRUTH = takes(("x", "BYTES", (-1,))), takes(("x", "BOOL", (-1,)))
REFUSED: list[tuple[Any, Signature, tuple[str, ...]]] = [
    ([], MATRIX, ("object", "a list")),
    ({}, MATRIX, ("exactly one", "instances", "inputs")),
    ({"instances": [[1, 2]], "inputs": [[1, 2]]}, MATRIX, ("exactly one",)),
    ({"instances": []}, MATRIX, ("at least one row",)),
    ({"instances": 5}, MATRIX, ("at least one row",)),
    ({"instances": [{}]}, MATRIX, ("row 0", "without names")),
    ({"inputs": {}}, MATRIX, ("without names",)),
    ({"instances": [[1, 2]], "signature_name": "other"}, MATRIX, ("'other'", "serving_default")),
    ({"instances": [[1, 2], [3]]}, MATRIX, ("row 1", "a list of 1", "a list of 2")),
    ({"instances": [[1, 2], 3]}, MATRIX, ("row 1", "an integer")),
    ({"instances": [[1, 2, 3]]}, MATRIX, ("'x'", "[-1, 2]", "[1, 3]")),
    ({"instances": [1, 2]}, MATRIX, ("'x'", "[-1, 2]", "[2]")),
    ({"instances": [[1, 2], [3, "4"]]}, MATRIX, ("row 1, element 1", "'4'", "FP32")),
    ({"instances": [1, None]}, X32, ("row 1", "null", "NaN")),
    ({"instances": [1, True]}, X32, ("row 1", "True", "FP32")),
    ({"instances": [1e39]}, X32, ("row 0", "FP32", "out of range")),
    ({"instances": [float("nan"), 10**400]}, X32, ("row 1", "out of range")),
    ({"instances": [0.5, 10**400]}, X32, ("not JSON", "infinity")),
    ({"instances": [1, 300]}, X8, ("row 1", "300", "0 to 255")),
    ({"instances": [-1]}, X8, ("row 0", "-1")),
    ({"instances": [2**63]}, X64, ("row 0", "INT64")),
    ({"instances": [1.5]}, X64, ("row 0", "1.5")),
    ({"instances": [1e17]}, X64, ("row 0",)),
    ({"instances": [True]}, X64, ("row 0", "True")),
    ({"instances": ["7"]}, X64, ("row 0", "'7'")),
    ({"instances": [7]}, TEXT, ("row 0", "7", "text")),
    ({"instances": [{"b64": "?"}]}, TEXT, ("row 0", "base64")),
    ({"instances": [{"b64": "/w=="}]}, TEXT, ("row 0", "UTF-8")),
    ({"instances": [1]}, TRUTH, ("row 0", "true or false")),
    ({"instances": [[1, 2]]}, PAIR, ("2 inputs", "'a'", "'n'")),
    ({"instances": [{"a": 1}]}, PAIR, ("'n'", "missing")),
    ({"instances": [{"a": 1, "n": [1, 2]}, {"a": 1}]}, PAIR, ("row 1", "no input 'n'")),
    ({"instances": [{"a": 1}, {"a": 1, "n": [1, 2]}]}, PAIR, ("row 1", "'n'", "row 0 has not")),
    ({"instances": [{"a": 1}, 2]}, PAIR, ("row 1", "an integer")),
    ({"instances": [{"a": 1, "n": [1, 2], "z": 0}]}, PAIR, ("no input 'z'", "'a', 'n'")),
    ({"inputs": {"a": [1]}}, PAIR, ("'n'", "missing")),
]


@pytest.mark.parametrize(("body", "signature", "words"), REFUSED)
def test_a_wrong_body_is_refused_with_a_sentence_that_names_it(
    body: Any, signature: Signature, words: tuple[str, ...]
) -> None:
    """Where, what came, what would be right."""
    with pytest.raises(BadRequestError) as refused:
        bound(body, signature)

    for word in words:
        assert word in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"null", b'{"a": NaN', b"[" * 2000, b"[NaN" + b"[" * 90_000],
    ids=["empty", "cut", "no UTF-8", "null", "cut, lenient", "deep", "deep, lenient"],
)  # fmt: skip
def test_what_is_not_json_is_refused(body: bytes) -> None:
    """Also where the parser that takes NaN has to look at it."""
    with pytest.raises(BadRequestError):
        V.decode(body)


def test_deep_lists_are_refused() -> None:
    """No tensor has more than 32 axes."""
    nested: Any = 1
    for _ in range(60):
        nested = [nested]

    with pytest.raises(TensorError, match="deeper than 32"):
        V.decode(json.dumps({"inputs": nested}).encode())


def test_half_a_surrogate_pair_is_refused() -> None:
    """No answer could repeat it."""
    with pytest.raises(TensorError, match="surrogate"):
        V.decode(b'{"z": NaN, "instances": ["\\ud800"]}').bind(TEXT, "m")


def test_a_body_over_the_limit_is_refused_before_it_is_parsed() -> None:
    """413, whatever it holds."""
    with pytest.raises(TooLargeError, match="json_bytes_max"):
        V1(10).decode(b"{" * 11)


def test_more_names_than_allowed_are_refused_quickly() -> None:
    """A name costs far more than a number: their count is bounded."""
    body = json.dumps({"inputs": {str(k): 0 for k in range(70_000)}}).encode()

    with pytest.raises(BadRequestError, match="70000 inputs"):
        V.decode(body)


_JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "n", "x", "b64", "z"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    body=st.dictionaries(st.sampled_from(["instances", "inputs"]), _JSON, max_size=2),
    signature=st.sampled_from([MATRIX, PAIR, X32, X8, X64, TEXT, TRUTH]),
)
def test_any_json_is_read_or_refused_and_never_fails_otherwise(
    body: Any, signature: Signature
) -> None:
    """Whatever is bound has the datatypes and shapes of the signature."""
    try:
        arrays = bound(body, signature)
    except GatewayError:
        return
    for array, spec in zip(arrays, signature.inputs, strict=True):
        assert spec.fits(array.shape)
        assert array.dtype == {"BYTES": np.object_, "BOOL": np.bool_}.get(
            spec.datatype, np.dtype(spec.datatype.lower().replace("fp", "float"))
        )


# -- what is answered


def test_one_output_is_answered_bare_in_rows_and_in_columns() -> None:
    """TensorFlow Serving leaves the name out where there is one output."""
    x = np.float32([[0.1, 2], [3, np.nan]])

    assert answered({"instances": [[1, 2]]}, MATRIX, x) == {"predictions": [[0.1, 2], [3, None]]}
    assert answered({"inputs": [[1, 2]]}, MATRIX, x) == {"outputs": [[0.1, 2], [3, None]]}


def test_several_outputs_are_an_object_a_row_or_an_object_of_columns() -> None:
    """Row format: names in every row; columnar: a value per name."""
    rows = {"instances": [{"a": 1, "n": [1, 2]}]}
    columns = {"inputs": {"a": [1], "n": [[1, 2]]}}
    outputs = np.float32([0.1, 5]), np.int64([[1, 2], [3, 4]])

    assert answered(rows, PAIR, *outputs) == {
        "predictions": [{"a": 0.1, "n": [1, 2]}, {"a": 5, "n": [3, 4]}]
    }
    assert answered(columns, PAIR, *outputs) == {"outputs": {"a": [0.1, 5], "n": [[1, 2], [3, 4]]}}


@pytest.mark.parametrize(
    ("array", "written"),
    [
        (np.array(["ä", "b"], np.object_), ["ä", "b"]),
        (np.array([True, False]), [True, False]),
        (np.float16([0.5, np.inf]), [0.5, None]),
        (np.uint64([2**64 - 1]), [2**64 - 1]),
        (np.arange(2, dtype=np.longlong), [0, 1]),  # what onnxruntime calls int64
        (np.array([1.5, -0.5]), [1.5, -0.5]),
        (np.float32(3), 3),
        (np.arange(6, dtype=np.int32).reshape(2, 3).T, [[0, 3], [1, 4], [2, 5]]),
    ],
)
def test_every_kind_of_output_is_written(array: Array, written: Any) -> None:
    """Text, truth, halves, large integers, scalars, and arrays that lie column by column."""
    one = takes(("x", "FP32", (-1,)), gives=[("y", "FP32", (-1,))])

    assert answered({"instances": [1]}, one, np.asarray(array)) == {"predictions": written}
    two = takes(("x", "FP32", (-1,)), gives=[("y", "FP32", (-1,)), ("z", "FP32", (-1,))])
    if np.ndim(array):
        got = answered({"instances": [1]}, two, array, array)
        assert got == {"predictions": [{"y": value, "z": value} for value in written]}


def test_outputs_that_share_no_rows_are_asked_for_by_columns() -> None:
    """An object per row needs rows."""
    signature = takes(("x", "FP32", (-1,)), gives=[("y", "FP32", (-1,)), ("z", "FP32", ())])
    call = V.decode(b'{"instances": [1]}')

    with pytest.raises(TensorError, match="by columns"):
        call.bind(signature, "m")
    signature = takes(("x", "FP32", (-1,)), gives=[("y", "FP32", (-1,)), ("z", "FP32", (-1,))])
    served = Served("m", 1, signature, b"")
    with pytest.raises(TensorError, match="by columns"):
        V.encode(call, served, [np.zeros(2, np.float32), np.zeros(1, np.float32)])


def test_metadata_tells_the_signature_in_tensorflows_words() -> None:
    """One signature, free axes as -1, sizes as text."""
    about: Any = metadata("m", 3, takes(("x", "BYTES", (-1, 2))))

    assert about["model_spec"] == {"name": "m", "signature_name": "", "version": "3"}
    signature = about["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["x"]["dtype"] == "DT_STRING"
    sizes = [axis["size"] for axis in signature["inputs"]["x"]["tensor_shape"]["dim"]]
    assert sizes == ["-1", "2"]


def test_a_call_knows_how_it_asked() -> None:
    """The form of the answer is the form of the question."""
    call: Call = V.decode(b'{"inputs": [1]}')

    assert isinstance(call, ValuesCall)
    assert call.form == "columns"
