"""MLflow's scoring protocol: tables and CSV to arrays, outputs to predictions."""

import csv
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequestError, GatewayError, ModelNotFoundError, TensorError
from gateway.protocol.call import Call, Served
from gateway.protocol.invocations import CSVInvocations, Invocations, error_body
from gateway.tensors import Array
from registry.signature import Signature, TensorSpec


class Apart:
    """Stands for the Open Inference Protocol's codec."""

    def decode(self, body: bytes) -> Call:
        return Call([], id=body.decode())

    def encode(self, call: Call, *_: Any) -> Any:
        return call.id


I = Invocations(1_000_000, Apart())  # noqa: E741
C = CSVInvocations(1_000_000)
FLIGHT = Signature(
    (
        TensorSpec("temp", "FP32", (-1, 1)),
        TensorSpec("hour", "INT64", (-1, 1)),
        TensorSpec("carrier", "BYTES", (-1, 1)),
        TensorSpec("late", "BOOL", (-1,)),
    ),
    (TensorSpec("p", "FP32", (-1,)),),
)
NAMES = ["temp", "hour", "carrier", "late"]
MATRIX = Signature((TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1,)),))
NAMED = Signature(
    (TensorSpec("x", "FP32", (-1, 3), columns=("a", "b", "c")),),
    MATRIX.outputs,
)


def bound(body: Any, signature: Signature) -> list[Array]:
    return I.decode(json.dumps(body).encode()).bind(signature, "m")


def from_csv(text: str, signature: Signature) -> list[Array]:
    return C.decode(text.encode()).bind(signature, "m")


def split(columns: list[Any], *rows: list[Any]) -> dict[str, Any]:
    return {"dataframe_split": {"columns": columns, "data": list(rows), "index": [0]}}


ROWS = [[41.5, 6, "B6", True], [None, 7.0, "UA", False]]


@pytest.mark.parametrize(
    "body",
    [
        split(NAMES, *ROWS),
        split(NAMES[::-1], *[row[::-1] for row in ROWS]),
        {"dataframe_records": [dict(zip(NAMES, row, strict=True)) for row in ROWS]},
        split([*NAMES, "extra"], *[[*row, "?"] for row in ROWS]),
        split(NAMES, *ROWS) | {"params": {"threshold": 0.5}},
    ],
    ids=["split", "other order", "records", "column too many", "params"],
)
def test_columns_of_a_table_go_to_inputs_by_name(body: Any) -> None:
    """Null is a missing number, 7.0 is the integer 7, and what the model does not take is left."""
    temp, hour, carrier, late = bound(body, FLIGHT)

    assert temp.shape == hour.shape == carrier.shape == (2, 1)
    assert (temp.dtype, hour.dtype) == (np.float32, np.int64)
    assert temp[0, 0] == 41.5
    assert math.isnan(temp[1, 0])
    assert hour.ravel().tolist() == [6, 7]
    assert carrier.ravel().tolist() == ["B6", "UA"]
    assert late.tolist() == [True, False]


def test_csv_is_read_by_the_models_datatypes_not_by_its_looks() -> None:
    """A carrier named 9 is text, `NA` is a missing number, and a quoted comma is no border."""
    text = 'hour,temp,carrier,late\r\n6,41.5,9,true\r\n7.0, NA ,"U,A",False\r\n'

    temp, hour, carrier, late = from_csv(text, FLIGHT)

    np.testing.assert_array_equal(temp.ravel(), np.float32([41.5, np.nan]))
    assert hour.ravel().tolist() == [6, 7]
    assert carrier.ravel().tolist() == ["9", "U,A"]
    assert late.tolist() == [True, False]


@given(
    st.lists(
        st.tuples(st.floats(width=32), st.integers(-(2**63), 2**63 - 1), st.text(max_size=8)),
        min_size=1,
        max_size=5,
    )
)
def test_csv_of_the_standard_library_comes_back_exactly(rows: list[tuple[Any, ...]]) -> None:
    """Any row written with quoting arrives as it was, every digit of it."""
    signature = Signature(
        (
            TensorSpec("f", "FP32", (-1,)),
            TensorSpec("i", "INT64", (-1,)),
            TensorSpec("s", "BYTES", (-1,)),
        ),
        MATRIX.outputs,
    )
    written = io.StringIO()
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([["f", "i", "s"], *rows])

    f, i, s = from_csv(written.getvalue(), signature)

    np.testing.assert_array_equal(f, np.float32([row[0] for row in rows]))
    assert i.tolist() == [row[1] for row in rows]
    assert s.tolist() == [row[2] for row in rows]


@pytest.mark.parametrize(
    ("columns", "signature", "row"),
    [
        (["a", "b", "c"], MATRIX, [1, 2, 3]),
        (["c", "a", "b"], MATRIX, [1, 2, 3]),
        (["x[2]", "x[0]", "x[1]"], MATRIX, [2, 3, 1]),
        ([0, 1, 2], MATRIX, [1, 2, 3]),
        (["c", "a", "b"], NAMED, [2, 3, 1]),
        (["c", "a", "more", "b"], NAMED, [2, 4, 1]),
    ],
)
def test_columns_fill_a_matrix_by_the_profiles_names_else_as_given(
    columns: list[Any], signature: Signature, row: list[float]
) -> None:
    """A data frame with its columns in another order must not be another row."""
    given_row = list(range(1, len(columns) + 1))

    (x,) = bound(split(columns, given_row, given_row), signature)

    assert x.tolist() == [row, row]


def test_a_column_of_lists_fills_an_input_of_its_name() -> None:
    """Records may hold a whole row of a matrix in one cell."""
    (x,) = bound({"dataframe_records": [{"x": [1, 2, 3]}, {"x": [4, 5, 6]}]}, MATRIX)

    assert x.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_instances_and_inputs_are_read_as_in_tensorflow_serving() -> None:
    """MLflow takes both forms too."""
    assert bound({"instances": [[1, 2, 3]]}, MATRIX)[0].tolist() == [[1, 2, 3]]
    assert bound({"inputs": {"x": [[1, 2, 3]]}}, MATRIX)[0].tolist() == [[1, 2, 3]]
    assert bound({"inputs": {"a": [1], "b": [2], "c": [3]}}, NAMED)[0].tolist() == [[1, 2, 3]]


REFUSED: list[tuple[Any, Signature, tuple[str, ...]]] = [
    ({}, FLIGHT, ("exactly one", "dataframe_split", "none of them")),
    ({"instances": [1], "inputs": [1]}, FLIGHT, ("instances, inputs",)),
    ({"dataframe_split": []}, FLIGHT, ("'columns' and 'data'",)),
    ({"dataframe_split": {"columns": [], "data": []}}, FLIGHT, ("no rows",)),
    ({"dataframe_split": {"columns": "a", "data": [[1]]}}, FLIGHT, ("list of names",)),
    ({"dataframe_split": {"data": [[1]], "colums": ["a"]}}, FLIGHT, ("'colums'",)),
    (split(["a", "a", "b"], [1, 2, 3]), MATRIX, ("two columns", "'a'")),
    (split(["a", "b", "c"], [1, 2, 3], [1, 2]), MATRIX, ("row 1", "2 values", "3")),
    (split(["a", "b", "c"], [1, 2, 3], 7), MATRIX, ("row 1", "an integer")),
    (split(["a", "b"], [1, 2]), MATRIX, ("takes 3 columns", "gives 2")),
    (split(["a", "b", "d"], [1, 2, 3]), NAMED, ("'c'", "missing", "'a', 'b', 'c'")),
    (split(["a", "b", "c"], [1, 2, 3], [1, "2", 3]), MATRIX, ("column 'b'", "row 1", "'2'")),
    (split(["a", "b", "c"], [1, [2], 3]), MATRIX, ("'b'", "[1, 1]")),
    (split(["temp"], [1]), FLIGHT, ("'hour', 'carrier', 'late'", "missing")),
    (split(NAMES, [1, None, "B6", True]), FLIGHT, ("column 'hour'", "row 0", "null", "INT64")),
    (split(NAMES, [1, 6.5, "B6", True]), FLIGHT, ("column 'hour'", "6.5")),
    (split(NAMES, [1, 6, None, True]), FLIGHT, ("column 'carrier'", "null", "text")),
    (split(NAMES, [1, 6, "B6", 1]), FLIGHT, ("column 'late'", "true or false")),
    (split(NAMES, [[1, 2], 6, "B6", True]), FLIGHT, ("'temp'", "[-1, 1]", "[1, 2]")),
    ({"dataframe_records": []}, FLIGHT, ("at least one",)),
    ({"dataframe_records": [{"temp": 1}, {}]}, FLIGHT, ("row 1", "no column 'temp'")),
    ({"dataframe_records": [{"temp": 1}, 3]}, FLIGHT, ("row 1", "an integer")),
]  # fmt: skip


@pytest.mark.parametrize(("body", "signature", "words"), REFUSED)
def test_a_wrong_table_is_refused_with_column_and_row(
    body: Any, signature: Signature, words: tuple[str, ...]
) -> None:
    """Where, what came, what would be right."""
    with pytest.raises(BadRequestError) as refused:
        bound(body, signature)

    for word in words:
        assert word in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("empty",)),
        ("\n\n", ("empty",)),
        ("a,b,c\n", ("no rows",)),
        ("a,b,a\n1,2,3\n", ("two columns", "'a'")),
        ("a,b,c\n1,2\n", ("row 0", "2 values", "3")),
        ('a,b,c\n1,2,"3\n', ("not CSV",)),
        ("a,b,c\n1,warm,3\n", ("column 'b'", "row 0", "'warm'", "FP32")),
        ("a,b,c\n1,1_0,3\n", ("column 'b'", "'1_0'")),
        ("a,b,c\n1,\u0663,3\n", ("column 'b'", "row 0")),
        ("a,b,c\n1,1e39,3\n", ("column 'b'", "out of range")),
    ],
)
def test_wrong_csv_is_refused_with_column_and_row(text: str, words: tuple[str, ...]) -> None:
    """What `float` reads beyond plain numbers is no number here."""
    with pytest.raises(BadRequestError) as refused:
        from_csv(text, MATRIX)

    for word in words:
        assert word in str(refused.value), str(refused.value)


@given(st.binary(max_size=60) | st.text("abc,\n\"'1.\x00é").map(str.encode))
def test_any_bytes_as_csv_are_read_or_refused(body: bytes) -> None:
    """No other error comes out of the reader."""
    try:
        C.decode(body).bind(MATRIX, "m")
    except GatewayError:
        return


def test_a_body_in_the_open_inference_protocol_is_answered_in_kind() -> None:
    """Triton's SageMaker front end takes such bodies on the same path."""
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'

    call = I.decode(body)

    assert call.id == body.decode()
    assert I.encode(call, Served("m", 1, MATRIX, b""), []) == body.decode()


def test_predictions_are_values_or_records() -> None:
    """One output: a list; several: a record per row."""
    two = Signature(MATRIX.inputs, (*MATRIX.outputs, TensorSpec("z", "BYTES", (-1,))))
    call = I.decode(json.dumps(split(["a", "b", "c"], [1, 2, 3])).encode())
    y, z = np.float32([0.1]), np.array(["late"], np.object_)

    one = I.encode(call, Served("m", 1, MATRIX, b""), [y])
    several = I.encode(call, Served("m", 1, two, b""), [y, z])

    assert json.loads(one.body) == {"predictions": [0.1]}
    assert json.loads(several.body) == {"predictions": [{"y": 0.1, "z": "late"}]}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TensorError("no"), "INVALID_PARAMETER_VALUE"),
        (BadRequestError("no"), "BAD_REQUEST"),
        (ModelNotFoundError("m", []), "RESOURCE_DOES_NOT_EXIST"),
        (GatewayError("no"), "INTERNAL_ERROR"),
    ],
)
def test_errors_are_told_in_both_shapes(error: GatewayError, code: str) -> None:
    """MLflow's clients read `error_code` and `message`; everybody else `error` and `code`."""
    body = json.loads(error_body(error))

    assert body == {
        "error_code": code,
        "message": str(error),
        "error": str(error),
        "code": error.code,
    }
