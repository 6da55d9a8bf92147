"""Raw tensors behind JSON, both ways, without a server; every wrong length is told as such."""

import struct
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError, TensorError
from gateway.protocol import raw, v2_json
from gateway.protocol.call import Call, OutputWanted, Served, classified
from gateway.protocol.v2_binary import V2, RawCall, json_length
from gateway.tensors import BFLOAT16, DTYPES, narrowed, widened
from registry.signature import Signature, TensorSpec

BYTES_MAX = 1_000_000
SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 2)),),
    (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("words", "BYTES", (-1,))),
)
SERVED = Served("m", 1, SIGNATURE, v2_json.answer_head("m", 1))


def body(tail: bytes, *inputs: dict[str, Any], **more: Any) -> tuple[bytes, int]:
    head = orjson.dumps({"inputs": list(inputs), **more})
    return head + tail, len(head)


def binary(name: str, kind: str, shape: list[int], size: Any, **more: Any) -> dict[str, Any]:
    parameters = {"binary_data_size": size}
    return {"name": name, "datatype": kind, "shape": shape, "parameters": parameters, **more}


def decode(content: bytes, length: int | None) -> Call:
    return V2(BYTES_MAX, length).decode(content)


def refusal(content: bytes, length: int | None) -> str:
    with pytest.raises(GatewayError) as refused:
        decode(content, length)
    assert refused.value.status in (400, 413)
    return str(refused.value)


# -- in


@pytest.mark.parametrize("kind", [kind for kind in DTYPES if kind != "BYTES"])
def test_numbers_are_read_bit_by_bit(kind: str) -> None:
    """Whatever the bytes are, they are the tensor: NaN payloads and signs of zero included."""
    size = DTYPES[kind].itemsize
    data = bytes([0, 1] * 6 * size) if kind == "BOOL" else np.random.default_rng(7).bytes(12 * size)
    data = data[: 12 * size]
    content, length = body(data, binary("x", kind, [3, 4], len(data)))

    tensor = decode(content, length).inputs[0]

    assert (tensor.array.dtype, tensor.array.shape) == (DTYPES[kind], (3, 4))
    assert tensor.array.tobytes() == data
    assert tensor.array.flags.aligned


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=9), max_size=9))
def test_texts_are_lengths_and_utf8(texts: list[str]) -> None:
    """Four bytes of length, little endian, then the text; written and read alike."""
    encoded = [text.encode() for text in texts]
    data = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    content, length = body(data, binary("x", "BYTES", [len(texts)], len(data)))

    array = decode(content, length).inputs[0].array

    assert array.tolist() == texts
    assert raw.write(array) == data


def test_json_and_binary_inputs_mix_in_the_order_of_the_json() -> None:
    """Raw tensors follow without gaps in the order in which the JSON names them."""
    a, b = np.float32([1, 2]).tobytes(), np.int64([-3]).tobytes()
    content, length = body(
        a + b,
        binary("a", "FP32", [2], 8),
        {"name": "j", "datatype": "UINT8", "shape": [1], "data": [7]},
        binary("b", "INT64", [1], 8),
    )

    assert [tensor.array.tolist() for tensor in decode(content, length).inputs] == [
        [1.0, 2.0],
        [7],
        [-3],
    ]


def test_a_large_tensor_is_a_view_of_the_body_wherever_that_is_aligned() -> None:
    """Nothing is copied that lies where a processor can read it."""
    for pad in range(16):
        content, length = body(bytes(4096), binary("x", "FP32", [1024], 4096), id="p" * pad)
        array = decode(content, length).inputs[0].array
        address = np.frombuffer(content, np.uint8).ctypes.data
        is_view = address <= array.ctypes.data < address + len(content)

        assert is_view == ((address + length) % 4 == 0)


@pytest.mark.parametrize("kind", ["FP32", "BYTES", "BOOL"])
def test_no_rows_need_no_bytes_and_no_header(kind: str) -> None:
    """A tensor of zero elements has a size of zero."""
    content, full = body(b"", binary("x", kind, [0, 2], 0))

    for length in (None, full):
        assert decode(content, length).inputs[0].array.shape == (0, 2)


X = binary("x", "FP32", [1, 2], 8)
LIES = {
    "no header": (b"\0" * 8, [X], None, "Inference-Header"),
    "too few behind": (b"\0" * 4, [X], 0, "4 bytes are left"),
    "nothing behind": (b"", [X], 0, "0 bytes are left"),
    "too many behind": (b"\0" * 12, [X], 0, "4 bytes behind"),
    "size for shape": (b"\0" * 8, [binary("x", "FP32", [1, 3], 8)], 0, "needs 12 bytes"),
    "size for type": (b"\0" * 8, [binary("x", "FP64", [1, 2], 8)], 0, "needs 16 bytes"),
    "negative": (b"\0" * 8, [binary("x", "FP32", [1, 2], -8)], 0, "integer >= 0"),
    "text": (b"\0" * 8, [binary("x", "FP32", [1, 2], "8")], 0, "integer >= 0"),
    "boolean": (b"\0" * 8, [binary("x", "FP32", [1, 2], size=True)], 0, "integer >= 0"),
    "huge": (b"\0" * 8, [binary("x", "FP32", [1, 2], 2**62)], 0, "8 bytes are left"),
    "huge shape": (b"\0" * 8, [binary("x", "FP32", [2**40, 2**40], 8)], 0, "needs"),
    "huge texts": (b"\0" * 8, [binary("x", "BYTES", [2**40], 8)], 0, "elements are expected"),
    "empty but wide": (b"", [binary("x", "FP32", [0, 2**62, 2**62], 0)], 0, "shape"),
    "both": (b"\0" * 8, [binary("x", "FP32", [1, 2], 8, data=[1, 2])], 0, "not both"),
    "bool 2": (b"\0\2", [binary("x", "BOOL", [2], 2)], 0, "0 or 1"),
    "text cut": (b"\5\0\0\0abc", [binary("x", "BYTES", [1], 7)], 0, "goes beyond"),
    "length cut": (b"\1\0\0", [binary("x", "BYTES", [1], 3)], 0, "goes beyond"),
    "more texts": (bytes(8), [binary("x", "BYTES", [1], 8)], 0, "4 bytes more"),
    "no utf-8": (b"\1\0\0\0\xff", [binary("x", "BYTES", [1], 5)], 0, "not valid UTF-8"),
    "shared": (b"", [{"name": "x", "datatype": "FP32", "shape": [1], "parameters":
               {"shared_memory_region": "r"}}], 0, "shared memory"),
    "parameters": (b"", [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": [1]}], 0,
                   "object"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_lie_about_sizes_is_told_before_anything_is_made_of_it(case: str) -> None:
    """Each names the tensor or the header, and what was expected."""
    tail, inputs, header, word = LIES[case]
    head = orjson.dumps({"inputs": inputs})
    if header is None:
        content, length = orjson.dumps({"inputs": inputs}), None
    else:
        content, length = head + tail, len(head)

    assert word in refusal(content, length)


@pytest.mark.parametrize("header", [b"-1", b"1.5", b"", b" 5", b"0x10", b"\xb2", b"9" * 19])
def test_a_header_that_is_no_size_is_refused(header: bytes) -> None:
    """Digits only, and no more than a size can have."""
    with pytest.raises(GatewayError, match="integer >= 0"):
        json_length(header)


def test_a_json_part_beyond_the_body_or_the_limit_is_refused() -> None:
    """The header counts bytes of the body; the limit is for JSON alone."""
    content, _ = body(b"", X)
    assert "the body has" in refusal(content, len(content) + 1)
    assert "json_bytes_max" in refusal(b" " * (BYTES_MAX + 1), BYTES_MAX + 1)
    big = bytes(2 * BYTES_MAX)
    content, length = body(big, binary("x", "UINT8", [len(big)], len(big)))
    assert decode(content, length).inputs[0].array.size == len(big)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutation_of_a_binary_request_does_more_than_be_refused(data: st.DataObject) -> None:
    """A GatewayError of status 400 or 413, or a call whose arrays fit their shapes."""
    words = b"\2\0\0\0ab\0\0\0\0"
    content, length = body(bytes(8) + words, X, binary("w", "BYTES", [2], len(words)))
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(changed)))
    claimed = data.draw(st.sampled_from([length, length - 1, length + 1, 0, 2**40, cut]))
    status, call = 200, Call([])
    try:
        call = decode(bytes(changed[: data.draw(st.sampled_from([cut, len(changed)]))]), claimed)
    except GatewayError as error:
        status = error.status
    assert status in (200, 400, 413)
    assert all(tensor.array.shape == tensor.shape for tensor in call.inputs)


# -- a body that is one tensor


def test_a_body_without_json_is_one_row_of_the_only_input() -> None:
    """The first axis counts rows; one more free axis takes what is there."""
    call = decode(np.float32([1, 2]).tobytes(), 0)
    assert isinstance(call, RawCall)
    assert call.bind(SIGNATURE, "m")[0].tolist() == [[1.0, 2.0]]
    wide = Signature((TensorSpec("x", "INT16", (-1, -1, 2)),), SIGNATURE.outputs)
    assert decode(bytes(24), 0).bind(wide, "m")[0].shape == (1, 6, 2)
    texts = Signature((TensorSpec("x", "BYTES", (-1, 1)),), SIGNATURE.outputs)
    assert decode("né".encode(), 0).bind(texts, "m")[0].tolist() == [["né"]]
    free = Signature((TensorSpec("x", "BYTES", (-1, -1)),), SIGNATURE.outputs)
    assert decode(b"a", 0).bind(free, "m")[0].shape == (1, 1)


@pytest.mark.parametrize(
    ("signature", "content", "word"),
    [
        (SIGNATURE, bytes(12), "needs 8 bytes"),
        (Signature(SIGNATURE.inputs * 2, SIGNATURE.outputs), bytes(8), "one input only"),
        (
            Signature((TensorSpec("x", "FP32", (-1, -1, -1)),), SIGNATURE.outputs),
            bytes(8),
            "free axes",
        ),
        (Signature((TensorSpec("x", "BYTES", (-1, 2)),), SIGNATURE.outputs), b"a", "one element"),
        (Signature((TensorSpec("x", "BYTES", (-1,)),), SIGNATURE.outputs), b"\xff", "UTF-8"),
        (Signature((TensorSpec("x", "FP32", (-1, -1)),), SIGNATURE.outputs), bytes(7), "needs"),
        (Signature((TensorSpec("x", "FP32", (-1, 0, -1)),), SIGNATURE.outputs), bytes(4), "needs"),
    ],
)
def test_a_body_that_cannot_be_the_input_is_refused(
    signature: Signature, content: bytes, word: str
) -> None:
    """The sentence says what the model takes."""
    with pytest.raises(TensorError, match=word):
        decode(content, 0).bind(signature, "m")


# -- out

OUTPUTS = [np.float32([[1, np.nan], [-0.0, np.inf]]), np.array(["a", "né"], object)]


def answer(call: Call, outputs: Any = OUTPUTS) -> tuple[dict[str, Any], bytes, dict[bytes, bytes]]:
    got = V2(BYTES_MAX).encode(call, SERVED, outputs)
    headers = dict(got.headers)
    length = int(headers.get(b"inference-header-content-length", len(got.body)))
    return orjson.loads(got.body[:length]), got.body[length:], headers


def test_all_outputs_are_raw_when_none_is_listed_and_raw_is_asked_for() -> None:
    """Sizes in the JSON, bytes behind it, and the two headers that say so; NaN is exact."""
    said, tail, headers = answer(Call([], is_binary=True, id="i"))

    words = b"\1\0\0\0a" + b"\3\0\0\0" + "né".encode()
    assert [output["parameters"] for output in said["outputs"]] == [
        {"binary_data_size": 16},
        {"binary_data_size": len(words)},
    ]
    assert not any("data" in output for output in said["outputs"])
    assert tail == OUTPUTS[0].tobytes() + words
    assert headers[b"content-type"] == b"application/octet-stream"
    assert (said["id"], said["model_name"], said["model_version"]) == ("i", "m", "1")


def test_a_listed_output_is_json_unless_it_asks_for_raw_itself() -> None:
    """As in Triton, binary_data_output speaks for outputs that are not listed."""
    request = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}],
        "outputs": [{"name": "words", "parameters": {"binary_data": True}}, {"name": "y"}],
        "parameters": {"binary_data_output": True},
    }
    said, tail, _ = answer(decode(orjson.dumps(request), None))

    assert [output["name"] for output in said["outputs"]] == ["words", "y"]
    assert said["outputs"][1]["data"] == [1.0, None, -0.0, None]
    assert "parameters" not in said["outputs"][1]
    assert tail == raw.write(OUTPUTS[1])
    request["outputs"] = [{"name": "y"}]
    _, tail, headers = answer(decode(orjson.dumps(request), None))
    assert (tail, headers) == (b"", {b"content-type": b"application/json"})


def test_raw_outputs_of_no_bytes_make_an_answer_of_json() -> None:
    """A size of 0, and neither header: there is nothing behind the JSON."""
    empty = [np.zeros((0, 2), np.float32), np.empty(0, object)]
    said, tail, headers = answer(Call([], is_binary=True), empty)

    assert [output["parameters"]["binary_data_size"] for output in said["outputs"]] == [0, 0]
    assert (tail, headers) == (b"", {b"content-type": b"application/json"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": {"binary_data_output": 1}},
        {"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
        {"outputs": [{"name": "y", "parameters": {"classification": 0}}]},
        {"outputs": [{"name": "y", "parameters": {"classification": True}}]},
        {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
        {"outputs": [{"name": "y", "parameters": 3}]},
        {"parameters": {"triton_enable_empty_final_response": True}},
    ],
)
def test_parameters_of_the_wrong_kind_are_refused(wrong: dict[str, Any]) -> None:
    """A parameter with a meaning is checked; those without are passed over."""
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]

    refusal(orjson.dumps({"inputs": inputs, **wrong}), None)


# -- classes


def classes(array: Any, n: int, *, has_rows: bool = True) -> Any:
    axis = (-1,) if has_rows else ()
    spec = TensorSpec("y", "FP32", (*axis, 3))
    signature = Signature((TensorSpec("x", "FP32", (*axis, 1)),), (spec,))
    return classified(Call([], (OutputWanted("y", n_classes=n),)), signature, [array])[0]


def test_classes_are_the_largest_of_each_row_as_value_and_index() -> None:
    """Six decimals, largest first, no more than there are; equal ones by index, NaN last."""
    array = np.float32([[0.1, 4, 2.5], [1, 1, np.nan]])

    assert classes(array, 2).tolist() == [
        ["4.000000:1", "2.500000:2"],
        ["1.000000:0", "1.000000:1"],
    ]
    assert classes(array, 9).tolist()[1][-1] == "nan:2"
    assert classes(array[0], 1, has_rows=False).tolist() == ["4.000000:1"]
    assert classes(np.int64([[5, 9, 9]]), 2).tolist() == [["9:1", "9:2"]]
    assert classes(np.uint8([[0, 255, 1]]), 1).tolist() == [["255:1"]]
    assert classes(narrowed(np.float32([[1, 2]])), 1).tolist() == [["2.000000:1"]]
    assert classes(np.zeros((0, 3), np.float32), 2).shape[0] == 0


# -- BF16


def test_bf16_is_rounded_as_its_reference_implementation_does() -> None:
    """Nearest, ties to even, for all bit patterns alike; widening is exact."""
    bits = np.random.default_rng(3).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, 1e-45])])
    with np.errstate(invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)

    rounded = narrowed(values)
    is_nan = np.isnan(values)
    assert np.array_equal(rounded.view("<u2")[~is_nan], expected.view("<u2")[~is_nan])
    assert np.isnan(widened(rounded)[is_nan]).all()
    assert np.array_equal(narrowed(widened(rounded)), rounded)
    assert narrowed(np.float32(1.5).reshape(())).shape == ()


def test_bf16_in_json_is_a_number_and_out_of_range_is_refused() -> None:
    """Rounded on the way in, exact on the way out."""
    given = {"name": "x", "datatype": "BF16", "shape": [3], "data": [1.0, 3.140625, 1e-3]}
    array = decode(orjson.dumps({"inputs": [given]}), None).inputs[0].array

    assert array.dtype == BFLOAT16
    assert orjson.loads(v2_json.data(array))[:2] == [1.0, 3.140625]
    given["data"] = [1.0, 3.4e38, 1.0]
    assert "element 1" in refusal(orjson.dumps({"inputs": [given]}), None)
