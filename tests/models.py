"""Small ONNX models, each with one property that a server could get wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]

ELEMENTS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""The protocol's datatypes in ONNX; written down here apart from the server's own table."""


def identity(kind: str = "FP32", shape: Shape = ("n",)) -> bytes:
    """Gives back what it gets."""
    return _model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [_info("x", kind, shape)],
        [_info("y", kind, shape)],
    )


def half() -> bytes:
    """A BF16 and an FP32 column in; the first as it came, and both added up as FP32, out."""
    shape: Shape = ("n", 1)
    bfloat = helper.make_tensor_value_info("b", TensorProto.BFLOAT16, list(shape))
    same = helper.make_tensor_value_info("same", TensorProto.BFLOAT16, list(shape))
    return _model(
        [
            helper.make_node("Identity", ["b"], ["same"]),
            helper.make_node("Cast", ["b"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["wide", "f"], ["sum"]),
        ],
        [bfloat, _info("f", "FP32", shape)],
        [same, _info("sum", "FP32", shape)],
    )


def half_and_text() -> bytes:
    """BF16 beside BYTES: onnxruntime for Python has no way to be given both."""
    bfloat = helper.make_tensor_value_info("b", TensorProto.BFLOAT16, ["n"])
    return _model(
        [
            helper.make_node("Cast", ["b"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Identity", ["t"], ["said"]),
        ],
        [bfloat, _info("t", "BYTES", ("n",))],
        [_info("wide", "FP32", ("n",)), _info("said", "BYTES", ("n",))],
    )


def constant(number: float) -> bytes:
    """Answers the same number for every row: shows which version has answered."""
    return _model(
        [
            helper.make_node("Mul", ["x", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "number"], ["y"]),
        ],
        [_info("x", "FP32", ("n",))],
        [_info("y", "FP32", ("n",))],
        {"zero": np.float32([0.0]), "number": np.float32([number])},
    )


def plus(number: float) -> bytes:
    """Adds the same number to every row."""
    return _model(
        [helper.make_node("Add", ["x", "number"], ["y"])],
        [_info("x", "FP32", ("n", 1))],
        [_info("y", "FP32", ("n", 1))],
        {"number": np.float32([[number]])},
    )


def not_negative() -> bytes:
    """The number, or 0 if it is negative: differs from `plus(0)` there alone."""
    return _model(
        [helper.make_node("Relu", ["x"], ["y"])],
        [_info("x", "FP32", ("n", 1))],
        [_info("y", "FP32", ("n", 1))],
    )


def sum_and_difference() -> bytes:
    """Two inputs of two columns, two outputs."""
    return _model(
        [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("Sub", ["a", "b"], ["difference"]),
        ],
        [_info("a", "FP32", ("n", 2)), _info("b", "FP32", ("n", 2))],
        [_info("sum", "FP32", ("n", 2)), _info("difference", "FP32", ("n", 2))],
    )


def mixed() -> bytes:
    """A number, a whole number and a text a row; the answer is twice the number, and the text."""
    return _model(
        [
            helper.make_node("Add", ["amount", "amount"], ["twice"]),
            helper.make_node("Identity", ["place"], ["where"]),
            helper.make_node("Identity", ["count"], ["n_seen"]),
        ],
        [
            _info("amount", "FP32", ("n",)),
            _info("count", "INT64", ("n",)),
            _info("place", "BYTES", ("n",)),
        ],
        [
            _info("twice", "FP32", ("n",)),
            _info("where", "BYTES", ("n",)),
            _info("n_seen", "INT64", ("n",)),
        ],
    )


def fixed_rows() -> bytes:
    """Takes exactly four rows of two."""
    return _model(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [_info("x", "FP32", (4, 2))],
        [_info("y", "FP32", (4, 2))],
    )


def vector() -> bytes:
    """No batch axis: three numbers in, their sum out."""
    return _model(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1)],
        [_info("x", "FP32", (3,))],
        [_info("y", "FP32", (1,))],
    )


def scalar() -> bytes:
    """One number without any axis; twice the number."""
    return _model(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [_info("x", "FP32", ())],
        [_info("y", "FP32", ())],
    )


def centred(kind: str = "FP32", width: int = 2) -> bytes:
    """Subtracts the largest row from each: an answer depends on all rows of the run."""
    return _model(
        [
            helper.make_node("ReduceMax", ["x"], ["top"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "top"], ["y"]),
        ],
        [_info("x", kind, ("n", width))],
        [_info("y", kind, ("n", width))],
    )


def mean_of_rows() -> bytes:
    """However many rows come, one row goes out."""
    return _model(
        [helper.make_node("ReduceMean", ["x"], ["y"], axes=[0], keepdims=1)],
        [_info("x", "FP32", ("n", 2))],
        [_info("y", "FP32", ("m", 2))],
    )


def lookup() -> bytes:
    """Ten times the index, for an index from 0 to 4; the graph fails on any other."""
    return _model(
        [helper.make_node("Gather", ["table", "index"], ["y"])],
        [_info("index", "INT64", ("n",))],
        [_info("y", "FP32", ("n",))],
        {"table": np.arange(5, dtype=np.float32) * 10},
    )


def heavy(mebibytes: int) -> bytes:
    """A table of so many mebibytes, and the row of it that is asked for."""
    return _model(
        [helper.make_node("Gather", ["table", "index"], ["y"])],
        [_info("index", "INT64", ("n",))],
        [_info("y", "FP32", ("n",))],
        {"table": np.arange(mebibytes * 262_144, dtype=np.float32)},
    )


def even_rows() -> bytes:
    """Two rows become one: a single row cannot be answered."""
    return _model(
        [helper.make_node("Reshape", ["x", "four"], ["y"])],
        [_info("x", "FP32", ("n", 2))],
        [_info("y", "FP32", ("m", 4))],
        {"four": np.int64([-1, 4])},
    )


def four_rows_at_most() -> bytes:
    """Rows are independent, but the graph fails on more than four (as with learned positions)."""
    return _model(
        [
            helper.make_node("Shape", ["x"], ["size"], start=0, end=1),
            helper.make_node("Slice", ["places", "zero", "size"], ["used"]),
            helper.make_node("Add", ["x", "used"], ["y"]),
        ],
        [_info("x", "FP32", ("n", 1))],
        [_info("y", "FP32", ("n", 1))],
        {"places": np.zeros((4, 1), np.float32), "zero": np.int64([0])},
    )


def slow(rows: int | None = None, n_rounds: int = 500) -> bytes:
    """Twice the number, after some tens of milliseconds; with `rows` it takes that many only."""
    size = 1024
    weights = np.eye(size, dtype=np.float32)
    spread, gather = np.zeros((1, size), np.float32), np.zeros((size, 1), np.float32)
    spread[0, :2] = gather[:2, 0] = 1.0
    # A loop, because onnxruntime keeps a copy of the weights for each product in the graph.
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["before", "weights"], ["after"]),
            helper.make_node("Identity", ["goes_on"], ["still"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(weights, "weights")],
    )
    first = "n" if rows is None else rows
    return _model(
        [
            helper.make_node("MatMul", ["x", "spread"], ["start"]),
            helper.make_node("Loop", ["n_rounds", "always", "start"], ["end"], body=body),
            helper.make_node("MatMul", ["end", "gather"], ["y"]),
        ],
        [_info("x", "FP32", (first, 1))],
        [_info("y", "FP32", (first, 1))],
        {
            "spread": spread,
            "gather": gather,
            "n_rounds": np.array(n_rounds, np.int64),
            "always": np.array(1, np.bool_),
        },
    )


def rounds(most: int = 2**62) -> bytes:
    """The number itself, after so many rounds, `most` at most: some inputs take for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["still"]),
            helper.make_node("Add", ["before", "before"], ["after"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    return _model(
        [
            helper.make_node("ReduceMax", ["n"], ["largest"], keepdims=0),
            helper.make_node("Min", ["largest", "limit"], ["most"]),
            helper.make_node("Loop", ["most", "always", "zero"], ["end"], body=body),
            helper.make_node("Cast", ["n"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["number", "end"], ["y"]),
        ],
        [_info("n", "INT64", ("n",))],
        [_info("y", "FP32", ("n",))],
        {
            "always": np.array(1, np.bool_),
            "zero": np.array(0, np.float32),
            "limit": np.array(most, np.int64),
        },
    )


def round_and_round() -> bytes:
    """The number itself, after going round so many times; takes what `plus` takes."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["still"]),
            helper.make_node("Add", ["before", "before"], ["after"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    return _model(
        [
            helper.make_node("ReduceMax", ["x"], ["highest"], keepdims=0),
            helper.make_node("Cast", ["highest"], ["most"], to=TensorProto.INT64),
            helper.make_node("Loop", ["most", "always", "zero"], ["end"], body=body),
            helper.make_node("Add", ["x", "end"], ["y"]),
        ],
        [_info("x", "FP32", ("n", 1))],
        [_info("y", "FP32", ("n", 1))],
        {"always": np.array(1, np.bool_), "zero": np.array(0, np.float32)},
    )


def expansion() -> bytes:
    """As many ones as it is told, added up: a short request can ask for any amount of memory."""
    return _model(
        [
            helper.make_node("Expand", ["one", "n"], ["ones"]),
            helper.make_node("ReduceSum", ["ones"], ["y"], keepdims=1),
        ],
        [_info("n", "INT64", (1,))],
        [_info("y", "FP32", (1,))],
        {"one": np.float32([1.0])},
    )


def one_long_kernel() -> bytes:
    """So many boxes compared with each other in one operator, which nothing can end."""
    return _model(
        [
            helper.make_node("Concat", ["one", "n", "four"], ["shape_of_boxes"], axis=0),
            helper.make_node("Concat", ["one", "one", "n"], ["shape_of_scores"], axis=0),
            helper.make_node("Expand", ["box", "shape_of_boxes"], ["boxes"]),
            helper.make_node("Expand", ["score", "shape_of_scores"], ["scores"]),
            helper.make_node(
                "NonMaxSuppression", ["boxes", "scores", "n", "overlap"], ["selected"]
            ),
            helper.make_node("Shape", ["selected"], ["y"], start=0, end=1),
        ],
        [_info("n", "INT64", (1,))],
        [_info("y", "INT64", (1,))],
        {
            "one": np.int64([1]),
            "four": np.int64([4]),
            "box": np.float32([[[0, 0, 1, 1]]]),
            "score": np.float32([[[0.5]]]),
            "overlap": np.float32([1.0]),
        },
    )


def classifier(shape: Shape = ("n", 3)) -> bytes:
    """Takes scores; gives the probabilities of classes, and the number of the likeliest."""
    return _model(
        [
            helper.make_node("Softmax", ["x"], ["probabilities"], axis=1),
            helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        ],
        [_info("x", "FP32", shape)],
        [_info("probabilities", "FP32", shape), _info("label", "INT64", ("n",))],
    )


def classifier_with_zipmap() -> bytes:
    """What a scikit-learn classifier exports by default: its answer is no tensor."""
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    pair = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    output = helper.make_value_info("y", helper.make_sequence_type_proto(pair))
    return _model([node], [_info("x", "FP32", ("n", 2))], [output])


def with_lost_weights() -> bytes:
    """Its weights are said to be in a file that is not there."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [_info("x", "FP32", ("n", 2))],
        [_info("y", "FP32", ("n", 2))],
        [tensor],
    )
    return _serialized(graph)


def put(registry: Path, name: str, version: int | str, content: bytes) -> Path:
    """Write one version into a registry directory; its directory."""
    directory = registry / name / str(version)
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_bytes(content)
    return directory


def _info(name: str, kind: str, shape: Shape) -> Any:
    return helper.make_tensor_value_info(name, ELEMENTS[kind], list(shape))


def _model(
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[Any],
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
) -> bytes:
    tensors = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    return _serialized(helper.make_graph(nodes, "g", inputs, outputs, tensors))


def _serialized(graph: Any) -> bytes:
    # Old enough for every onnxruntime that driftgate supports.
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    content: bytes = helper.make_model(
        graph, opset_imports=opsets, ir_version=8
    ).SerializeToString()
    return content
