"""Protobuf as a codec: strict about what a message says, and cheap about what it lies about."""

import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequestError, GatewayError, TensorError, TooLargeError
from gateway.protocol.call import Served
from gateway.protocol.protobuf import Protobuf, StreamProtobuf
from gateway.protocol.stubs import inference_pb2 as pb
from registry.signature import Signature, TensorSpec

LIMIT = 1 << 20
CODEC = Protobuf(LIMIT)
KINDS: dict[str, tuple[Any, str | None]] = {
    "BOOL": (np.bool_, "bool_contents"),
    "UINT8": (np.uint8, "uint_contents"),
    "UINT16": (np.uint16, "uint_contents"),
    "UINT32": (np.uint32, "uint_contents"),
    "UINT64": (np.uint64, "uint64_contents"),
    "INT8": (np.int8, "int_contents"),
    "INT16": (np.int16, "int_contents"),
    "INT32": (np.int32, "int_contents"),
    "INT64": (np.int64, "int64_contents"),
    "FP16": (np.float16, None),
    "FP32": (np.float32, "fp32_contents"),
    "FP64": (np.float64, "fp64_contents"),
}
"""The protocol's table of datatypes, written down apart from the codec's."""


def message(
    kind: str = "FP32",
    shape: tuple[int, ...] = (2,),
    raw: bytes | None = None,
    **contents: Any,
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype=kind, shape=shape)
    if raw is not None:
        request.raw_input_contents.append(raw)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    return request


def decoded(request: pb.ModelInferRequest) -> Any:
    return CODEC.decode(request.SerializeToString())


def served(*outputs: TensorSpec) -> Served:
    return Served("m", 7, Signature((TensorSpec("x", "FP32", (-1,)),), outputs), b"")


# -- what is carried


@pytest.mark.parametrize("kind", KINDS)
def test_raw_elements_come_out_bit_for_bit(kind: str) -> None:
    """Little-endian bytes of every pattern are the array, NaN payloads included."""
    dtype = np.dtype(KINDS[kind][0])
    sent = np.frombuffer(random.Random(3).randbytes(6 * dtype.itemsize), dtype).reshape(3, 2)
    if kind == "BOOL":
        sent = np.array([[True, False], [False, False], [True, True]])

    tensor = decoded(message(kind, (3, 2), sent.tobytes())).inputs[0]

    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", kind, (3, 2))
    assert tensor.array.dtype == dtype
    assert tensor.array.tobytes() == sent.tobytes()


@pytest.mark.parametrize("kind", [kind for kind, (_, field) in KINDS.items() if field])
def test_typed_elements_come_out_as_the_numbers_they_are(kind: str) -> None:
    """Both ends of every datatype's range survive the list that carries it."""
    numpy_type, field = KINDS[kind]
    dtype = np.dtype(numpy_type)
    if dtype.kind == "b":
        sent = np.array([True, False])
    else:
        limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
        sent = np.array([limits.min, limits.max], dtype)
    assert field is not None

    tensor = decoded(message(kind, (2,), **{field: sent.tolist()})).inputs[0]

    assert tensor.array.dtype == dtype
    np.testing.assert_array_equal(tensor.array, sent)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
def test_texts_survive_raw_and_typed(texts: list[str]) -> None:
    """A text is its UTF-8 bytes: with a length of four bytes in front, or as a list element."""
    parts = [text.encode() for text in texts]
    raw = b"".join(len(part).to_bytes(4, "little") + part for part in parts)

    by_raw = decoded(message("BYTES", (len(texts),), raw)).inputs[0]
    by_list = decoded(message("BYTES", (len(texts),), bytes_contents=parts)).inputs[0]

    assert by_raw.array.tolist() == by_list.array.tolist() == texts


def test_zero_rows_and_scalars_are_tensors_too() -> None:
    """A shape with a zero needs no bytes, one without axes needs a single element."""
    assert decoded(message("FP32", (0, 3), b"")).inputs[0].array.shape == (0, 3)
    assert decoded(message("FP32", (0, 3))).inputs[0].array.shape == (0, 3)
    assert decoded(message("FP64", (), np.float64(2.5).tobytes())).inputs[0].array[()] == 2.5


def test_names_id_outputs_and_timeout_are_read() -> None:
    """What stands beside the tensors; empty text means not given, as proto3 has it."""
    request = message(raw=bytes(8))
    request.model_version, request.id = "3", "a"
    request.parameters["timeout"].uint64_param = 1500
    request.outputs.add(name="z")
    request.outputs.add(name="y").parameters["classification"].int64_param = 2

    call = decoded(request)
    plain = decoded(message(raw=bytes(8)))

    assert (call.model, call.version, call.id, call.timeout_s) == ("m", "3", "a", 0.0015)
    assert [(wanted.name, wanted.n_classes) for wanted in call.outputs] == [("z", 0), ("y", 2)]
    assert (plain.version, plain.id, plain.timeout_s, plain.outputs) == (None, None, None, ())


def test_answers_are_raw_in_the_order_asked_for() -> None:
    """Nearly all clients read raw contents only; each output has one entry."""
    request = message(raw=bytes(8))
    request.id = "a"
    request.outputs.add(name="t")
    request.outputs.add(name="y")
    y = np.array([[1.5], [np.nan]], np.float32)
    t = np.array(["ä", ""], object)
    to = served(TensorSpec("y", "FP32", (-1, 1)), TensorSpec("t", "BYTES", (-1,)))

    answer = CODEC.encode(decoded(request), to, [y, t])

    got = pb.ModelInferResponse.FromString(answer.body)
    assert (got.model_name, got.model_version, got.id) == ("m", "7", "a")
    heads = [(output.name, output.datatype, list(output.shape)) for output in got.outputs]
    assert heads == [("t", "BYTES", [2]), ("y", "FP32", [2, 1])]
    assert list(got.raw_output_contents) == [b"\2\0\0\0\xc3\xa4\0\0\0\0", y.tobytes()]
    assert not got.parameters
    assert not any(output.HasField("contents") for output in got.outputs)


def test_an_answer_says_that_it_is_the_last_when_that_is_asked_for() -> None:
    """Streaming clients wait for the flag; it is not sent unasked."""
    request = message(raw=bytes(8))
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    codec = StreamProtobuf(LIMIT)

    call = codec.decode(request.SerializeToString())
    answer = codec.encode(call, served(TensorSpec("y", "FP32", (-1,))), [np.zeros(2, np.float32)])

    got = pb.ModelStreamInferResponse.FromString(answer.body)
    assert got.infer_response.parameters["triton_final_response"].bool_param
    assert got.error_message == ""


def test_an_error_in_a_stream_names_the_message_that_it_is_about() -> None:
    """Also when the tensors of the message are what is wrong."""
    codec = StreamProtobuf(LIMIT)
    request = message(raw=b"short")
    request.id = "the fourth"

    with pytest.raises(TensorError) as caught:
        codec.decode(request.SerializeToString())

    got = pb.ModelStreamInferResponse.FromString(codec.encode_error(caught.value))
    assert got.infer_response.id == "the fourth"
    assert "needs 8 bytes" in got.error_message


# -- what is refused


def both() -> pb.ModelInferRequest:
    return message(raw=bytes(8), fp32_contents=[1, 2])


def two_inputs_one_raw() -> pb.ModelInferRequest:
    request = message(raw=bytes(8))
    request.inputs.add(name="z", datatype="FP32", shape=[2])
    return request


def nameless() -> pb.ModelInferRequest:
    request = message(raw=bytes(8))
    request.inputs[0].name = ""
    return request


def shared() -> pb.ModelInferRequest:
    request = message()
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    return request


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (pb.ModelInferRequest, "at least one tensor"),
        (both, "give one of them"),
        (two_inputs_one_raw, "1 entries for 2 inputs"),
        (nameless, "inputs[0].name"),
        (shared, "shared memory"),
        (lambda: message("FP33", raw=bytes(8)), "'FP33' is none of"),
        (lambda: message(shape=(-1,), raw=b""), ">= 0"),
        (lambda: message(shape=(1,) * 40, raw=bytes(4)), "up to 32"),
        (lambda: message(shape=(3,), raw=bytes(8)), "needs 12 bytes"),
        (lambda: message(shape=(1 << 40, 1 << 40), raw=bytes(8)), "needs"),
        (lambda: message(shape=(1 << 62, 1 << 62, 0), raw=b""), "no array can have shape"),
        (lambda: message(shape=(3,), fp32_contents=[1, 2]), "needs 3 elements, data has 2"),
        (message, "needs 2 elements, data has 0"),
        (lambda: message(fp64_contents=[1, 2]), "fp32_contents, not fp64_contents"),
        (lambda: message("INT8", int_contents=[1, 300]), "element 1 is 300; INT8 takes integers"),
        (lambda: message("UINT16", uint_contents=[70000, 1]), "element 0 is 70000"),
        (lambda: message("FP16", fp32_contents=[1, 2]), "raw_input_contents only"),
        (lambda: message("BOOL", raw=b"\1\2"), "byte 0 or 1"),
        (lambda: message("BYTES", raw=b"\1\0\0\0a"), "2 BYTES elements"),
        (lambda: message("BYTES", (1,), b"\xff\xff\xff\xffa"), "goes beyond"),
        (lambda: message("BYTES", (1,), b"\1\0\0\0\xff"), "not valid UTF-8"),
        (lambda: message("BYTES", (1,), bytes_contents=[b"\xff"]), "not valid UTF-8"),
        (lambda: message("BYTES", (1 << 50,), bytes(8)), "BYTES elements"),
    ],
)
def test_a_message_that_contradicts_itself_is_refused_with_the_reason(
    make: Callable[[], pb.ModelInferRequest], says: str
) -> None:
    """Counts, datatypes, sizes and places must agree; nothing is guessed or cut."""
    with pytest.raises(BadRequestError) as caught:
        decoded(make())

    assert says in str(caught.value)


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xff", b"\x2b" * 500])
def test_bytes_that_are_no_message_are_refused(body: bytes) -> None:
    """Broken tags, lengths, text and groups without an end."""
    with pytest.raises(BadRequestError, match="no ModelInferRequest"):
        CODEC.decode(body)


@pytest.mark.parametrize(
    ("unit", "says"),
    [
        (b"\x2a\x00", "beside raw tensors"),  # an input of nothing, over and over
        (b"\x32\x00", "beside raw tensors"),  # an output
        (b"\x3a\x00", "beside raw tensors"),  # raw contents of nothing
        (b"\x2a\x04\x2a\x02\x42\x00", "beside raw tensors"),  # an element of nothing
        (b"\x2a\x02\x1a\x00", "beside raw tensors"),  # a shape of nothing
    ],
)
def test_a_message_that_would_grow_is_refused_before_it_does(unit: bytes, says: str) -> None:
    """Two bytes can stand for an object of a hundred: such a message is not even parsed."""
    bomb = unit * ((8 << 20) // len(unit))

    tracemalloc.start()
    with pytest.raises(GatewayError, match=says):
        CODEC.decode(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 8 << 20


def test_typed_lists_that_do_not_grow_may_be_long() -> None:
    """A packed list of float32 takes in memory what it takes in the message."""
    count = 2 * LIMIT
    body = message(shape=(count,), fp32_contents=np.ones(count)).SerializeToString()

    assert CODEC.decode(body).inputs[0].array.sum() == count


def test_typed_lists_that_grow_have_the_limit_of_json() -> None:
    """A small integer is a byte in the message and eight in memory."""
    body = message("INT64", (2 * LIMIT,), int64_contents=[1] * (2 * LIMIT)).SerializeToString()

    with pytest.raises(TooLargeError, match=r"limits\.json_bytes_max"):
        CODEC.decode(body)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutation_of_a_message_ends_in_anything_but_a_call_or_a_refusal(
    data: st.DataObject,
) -> None:
    """Bytes changed, cut and doubled: what comes is a GatewayError, or a call that fits."""
    request = message("INT8", (2, 2), int_contents=[1, 2, 3, 4])
    if data.draw(st.booleans()):
        request = message("BYTES", (2,), b"\1\0\0\0a\0\0\0\0")
    request.parameters["timeout"].int64_param = 5
    body = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "double"]))
        if kind == "change":
            body[at] = data.draw(st.integers(0, 255))
        elif kind == "cut" and len(body) > 1:
            del body[at]
        else:
            body[at:at] = body[at : at + 5]

    try:
        call = CODEC.decode(bytes(body))
    except GatewayError:
        return
    assert all(tensor.array.shape == tensor.shape for tensor in call.inputs)


def test_numbers_of_messages_and_fields_are_those_of_the_public_protocol() -> None:
    """The bytes of a request, written down by hand from the specification."""
    by_hand = (
        b"\x0a\x01m" b"\x12\x012" b"\x1a\x01i"  # model_name 1, model_version 2, id 3
        b"\x22\x0a\x0a\x04rate\x12\x02\x28\x09"  # parameters 4: uint64_param 5
        b"\x2a\x0d\x0a\x01x\x12\x04FP32\x1a\x02\x01\x02"  # inputs 5: name 1, datatype 2, shape 3
        b"\x32\x03\x0a\x01y"  # outputs 6
        b"\x3a\x08\0\0\x80\x3f\0\0\0\x40"  # raw_input_contents 7
    )  # fmt: skip

    call = CODEC.decode(by_hand)

    assert (call.model, call.version, call.id) == ("m", "2", "i")
    assert call.inputs[0].array.tolist() == [[1.0, 2.0]]
    assert call.outputs[0].name == "y"
