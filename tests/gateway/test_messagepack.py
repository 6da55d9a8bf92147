"""MessagePack documents: what goes in comes out; what lies is refused before it costs anything."""

import contextlib
import struct
import time
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gateway.errors import BadRequestError, GatewayError, TensorError, TooLargeError
from gateway.protocol import v2_json
from gateway.protocol.call import Served
from gateway.protocol.messagepack import (
    Framer,
    MessagePack,
    decode,
    encode,
    encode_error,
    identity,
)
from registry.signature import Signature, TensorSpec

BYTES_MAX = 1 << 20
NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1",
    "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
"""Written down apart from the gateway's own table."""


def served(kind: str) -> Served:
    spec = TensorSpec("x", kind, (-1, -1))
    return Served("m", 3, Signature((spec,), (spec,)), v2_json.answer_head("m", 3))


def document(kind: str, shape: list[int], data: Any, **more: Any) -> bytes:
    given = {"name": "x", "datatype": kind, "shape": shape, "data": data}
    packed: bytes = msgpack.packb({"inputs": [given], **more})
    return packed


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    kind = draw(st.sampled_from(sorted(NUMPY)))
    shape = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return kind, draw(arrays.arrays(np.dtype(NUMPY[kind]), shape))


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_raw_tensors_of_every_datatype_arrive_bit_for_bit(given: tuple[str, np.ndarray]) -> None:
    """Any values, NaN and negative zero among them, of any shape, scalars and empty ones too."""
    kind, array = given

    tensor = decode(document(kind, list(array.shape), array.tobytes()), BYTES_MAX).inputs[0]

    assert (tensor.datatype, tensor.shape) == (kind, array.shape)
    assert tensor.array.dtype == np.dtype(NUMPY[kind])
    assert tensor.array.tobytes() == array.tobytes()
    assert tensor.array.flags.aligned


@settings(max_examples=200, deadline=None)
@given(tensors(), st.booleans())
def test_lists_mean_the_same_as_raw_bytes(given: tuple[str, np.ndarray], is_nested: bool) -> None:
    """Flat or nested, the elements are those of the raw form; NaN stays one."""
    kind, array = given
    data = array.tolist() if is_nested else array.ravel().tolist()

    tensor = decode(document(kind, list(array.shape), data), BYTES_MAX).inputs[0]

    assert tensor.shape == array.shape
    np.testing.assert_array_equal(tensor.array, array)


@settings(max_examples=100, deadline=None)
@given(tensors(), st.booleans())
def test_an_answer_read_by_plain_msgpack_holds_the_outputs(
    given: tuple[str, np.ndarray], is_raw: bool
) -> None:
    """Raw by default, as lists when asked; the reader is msgpack and numpy alone."""
    kind, array = given
    call = decode(document("FP32", [0], b"", id="é", parameters={"raw": is_raw}), BYTES_MAX)

    answer = msgpack.unpackb(encode(call, served(kind), [array], [0]))

    output = answer.pop("outputs")[0]
    assert answer == {"model_name": "m", "model_version": "3", "id": "é"}
    assert (output["name"], output["datatype"], output["shape"]) == ("x", kind, list(array.shape))
    if is_raw:
        assert output["data"] == array.tobytes()
    else:
        np.testing.assert_array_equal(np.array(output["data"], array.dtype), array.ravel())


@given(st.lists(st.text(max_size=8), max_size=6))
def test_texts_come_as_text_or_as_bytes_of_it_and_go_out_as_text(texts: list[str]) -> None:
    """A list of str, a list of bin, and the length-prefixed form of binary tensors are the same."""
    parts = [text.encode() for text in texts]
    prefixed = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    for data in (texts, parts, prefixed):
        call = decode(document("BYTES", [len(texts)], data), BYTES_MAX)
        assert call.inputs[0].array.tolist() == texts

    answer = msgpack.unpackb(encode(call, served("BYTES"), [call.inputs[0].array], [0]))
    assert answer["outputs"][0]["data"] == texts


@settings(max_examples=60, deadline=None)
@given(tensors())
def test_long_documents_are_read_like_short_ones(given: tuple[str, np.ndarray]) -> None:
    """From 64 KiB on a document is walked; an unknown field of that size changes nothing else."""
    kind, array = given
    short = document(kind, list(array.shape), array.tobytes(), id="7", outputs=[{"name": "x"}])
    long = msgpack.packb({**msgpack.unpackb(short), "unknown": "x" * 70_000})

    one, other = decode(short, BYTES_MAX), decode(long, BYTES_MAX)

    assert one.inputs[0].array.tobytes() == other.inputs[0].array.tobytes()
    assert (one.id, one.outputs, one.is_raw) == (other.id, other.outputs, other.is_raw)


GOOD = {"name": "x", "datatype": "FP32", "shape": [2], "data": struct.pack("<2f", 1, 2)}
PAD = {"pad": "x" * 70_000}
"""Makes a document long, which is read another way."""


def inputs(**changed: Any) -> dict[str, Any]:
    return {"inputs": [GOOD | changed]}


WRONG: list[tuple[str, Any, str]] = [
    ("number", 5, "must be a map, not an integer"),
    ("nil", None, "must be a map, not null"),
    ("list", [1], "must be a map, not a list"),
    ("no inputs", {}, "'inputs' must be a list"),
    ("inputs is a map", {"inputs": {}}, "'inputs' must be a list"),
    ("inputs is empty", {"inputs": []}, "'inputs' must be a list"),
    ("input is nil", {"inputs": [None]}, "inputs[0] must be an object, not null"),
    ("too many inputs", {"inputs": [GOOD] * 1025}, "1025 tensors; 1024 are allowed"),
    ("too many fields", {str(k): 0 for k in range(1025)} | inputs(), "1026 fields"),
    ("name is bin", inputs(name=b"x"), "inputs[0].name"),
    ("datatype is a list", inputs(datatype=["FP32"]), "datatype"),
    ("datatype unknown", inputs(datatype="FLOAT"), "'FLOAT' is none of"),
    ("shape is bin", inputs(shape=b"\2"), "shape must be a list"),
    ("shape negative", inputs(shape=[-2]), "integers >= 0"),
    ("shape overflows", inputs(shape=[2**63, 2]), "bytes, there are 8"),
    ("shape overflows to 8 bytes", inputs(shape=[2**62 + 2]), "bytes, there are 8"),
    ("empty and absurd", inputs(shape=[0, 2**63], data=b""), "no array can have shape"),
    ("too few bytes", inputs(data=b"\0" * 7), "needs 8 bytes, there are 7"),
    ("too many bytes", inputs(data=b"\0" * 9), "needs 8 bytes, there are 9"),
    ("no data", {"inputs": [{k: v for k, v in GOOD.items() if k != "data"}]}, "'data' is missing"),
    ("data is nil", inputs(data=None), "data must be a list, not null"),
    ("data is text", inputs(data="ab"), "data must be a list, not text"),
    ("data too short", inputs(data=[1.0]), "needs 2 elements, data has 1"),
    ("text in it", inputs(data=[1.0, "2"]), "element 1 is '2'; FP32 takes numbers"),
    ("bytes in it", inputs(data=[1.0, b"2"]), "element 1 is b'2'; FP32 takes numbers"),
    ("boolean in it", inputs(data=[1.0, True]), "element 1 is True"),
    ("BOOL of 2", inputs(datatype="BOOL", data=b"\1\2"), "a BOOL is a byte 0 or 1"),
    ("BYTES not UTF-8", inputs(datatype="BYTES", data=["a", b"\xff"]), "element 1 is not valid"),
    ("BYTES of a lie", inputs(datatype="BYTES", data=b"\xff\xff\xff\xff" * 2), "element 0 goes"),
    ("BYTES of numbers", inputs(datatype="BYTES", data=["a", 1]), "BYTES takes text"),
    ("id is bin", inputs() | {"id": b"1"}, "'id' must be text"),
    ("output has no name", inputs() | {"outputs": [{}]}, "outputs[0]"),
    ("raw is 1", inputs() | {"parameters": {"raw": 1}}, "parameters.raw must be true or false"),
    ("parameters is a list", inputs() | {"parameters": []}, "'parameters' must be an object"),
    ("bytes name a parameter", inputs() | {"parameters": {b"a": 1}}, "a field's name is no text"),
    ("an extension", inputs() | {"id": msgpack.ExtType(5, b"")}, "an extension type"),
]


@pytest.mark.parametrize(
    ("value", "words", "is_long"),
    [(value, words, False) for _, value, words in WRONG]
    + [(value, words, True) for _, value, words in WRONG if isinstance(value, dict)],
    ids=[name for name, *_ in WRONG]
    + [f"{name}, long" for name, value, _ in WRONG if isinstance(value, dict)],
)
def test_what_is_no_request_is_refused_in_words(value: Any, words: str, is_long: bool) -> None:
    """A 400 that names what is wrong, the same for short and for long documents."""
    with pytest.raises(BadRequestError) as caught:
        decode(msgpack.packb(value | PAD if is_long else value), BYTES_MAX)

    assert words.replace("1026", "1027" if is_long else "1026") in str(caught.value)


BROKEN: list[tuple[str, bytes, str]] = [
    ("empty", b"", "empty"),
    ("cut", msgpack.packb(inputs())[:-1], "ends in the middle"),
    ("followed", msgpack.packb(inputs()) + b"\0\0", "followed by 2 more bytes"),
    ("no start", b"\xc1", "starts no value"),
    ("no start within", b"\x81\xa1a\xc1", "starts no value"),
    ("not UTF-8", b"\x81\xa2\xff\xfe\x00", "not valid UTF-8"),
    ("a number names", b"\x81\x01\x00", "a field's name is no text"),
    ("a list names", b"\x81\x90\x00", "a field's name is no text"),
    ("a timestamp", b"\x81\xa1a\xd6\xff\0\0\0\1", "of an extension type"),
    ("deep lists", b"\x91" * 100_000 + b"\xc0", "nested too deep"),
    ("deep maps", b"\x81\xa1a" * 100_000 + b"\xc0", "nested too deep"),
    ("a list that lies", b"\xdd\xff\xff\xff\xff", "ends in the middle"),
    ("lists that lie", b"\xdd\x00\xff\xff\xff" * 900, "ends in the middle"),
    ("a map that lies", b"\xdf\xff\xff\xff\xff", "ends in the middle"),
    ("a text that lies", b"\xdb\xff\xff\xff\xff", "ends in the middle"),
    ("a bin that lies", b"\x81\xa6inputs\x91\x81\xa4data\xc6\xff\xff\xff\xff", "in the middle"),
    ("an extension that lies", b"\xc9\xff\xff\xff\xfe\x01", "ends in the middle"),
    ("an extension that overflows", b"\xc9\xff\xff\xff\xff\x01", "of an extension type"),
]


@pytest.mark.parametrize(("body", "words"), [c[1:] for c in BROKEN], ids=[c[0] for c in BROKEN])
def test_what_is_not_messagepack_is_refused_at_once_and_for_little_memory(
    body: bytes, words: str
) -> None:
    """Lengths are compared with the bytes that are there before anything is allocated."""
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(BadRequestError, match=words):
            decode(body, BYTES_MAX)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 2 * len(body) + 1_000_000
    assert time.perf_counter() - start < 1


def test_a_walked_document_is_checked_like_one_that_is_unpacked() -> None:
    """Every way to be broken, behind an unknown field that makes the document long."""
    long = msgpack.packb("x" * 70_000)
    for body, words in [
        (b"\x82\xa1p" + long, "ends in the middle"),
        (b"\x82\xa1p" + long + b"\xa1q\xc1", "starts no value"),
        (b"\x82\xa1p" + long + b"\x01\x01", "a field's name is no text"),
        (b"\x82\xa1p" + long + b"\xa2\xff\xfe\x01", "not valid UTF-8"),
        (b"\x82\xa1p" + long + b"\xa6inputs\xdd\xff\xff\xff\xff", "tensors; 1024 are allowed"),
        (b"\x81\xa1p" + long + b"\x00", "followed by 1 more bytes"),
        (b"\xdf\xff\xff\xff\xff\xa1p" + long, "fields; 1024 are allowed"),
        (b"\x91" * 70_000, "nested too deep"),
    ]:
        with pytest.raises(BadRequestError, match=words):
            decode(body, BYTES_MAX)


def test_raw_tensors_do_not_count_against_the_limit_and_lists_do() -> None:
    """The limit is there because lists take many times their size; raw bytes do not."""
    n = 100_000
    raw = document("FP32", [n], bytes(4 * n))
    assert decode(raw, bytes_max=1000).inputs[0].array.shape == (n,)

    with pytest.raises(TooLargeError, match=r"1000 bytes beside raw tensors \(limits"):
        decode(document("FP32", [n], [0.0] * n), bytes_max=1000)
    with pytest.raises(TooLargeError, match="1000 bytes"):
        decode(msgpack.packb({"inputs": [GOOD], "unknown": "x" * 1001}), bytes_max=1000)


def test_a_million_empty_lists_are_refused() -> None:
    """Each is one byte in a document, and seventy as an object."""
    body = b"\x81\xa6inputs\x91\x81\xa4data\xdd\x00\x20\x00\x00" + b"\x90" * (1 << 21)

    with pytest.raises(TooLargeError, match="lists and maps"):
        decode(body, bytes_max=1 << 24)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_get_past_the_errors_of_the_gateway(body: bytes) -> None:
    """Whatever comes is a call or a GatewayError, never anything else."""
    with contextlib.suppress(GatewayError):
        decode(body, BYTES_MAX)
    identity(body, BYTES_MAX)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_good_document_with_changed_bytes_is_a_call_or_an_error(data: st.DataObject) -> None:
    """Flipped, cut and doubled bytes of a request, short and long."""
    body = bytearray(msgpack.packb({**inputs(), "id": "a", "parameters": {"timeout": 5}}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    long = bytes(body[:1]) + msgpack.packb("pad") + msgpack.packb("x" * 70_000) + bytes(body[1:])
    for changed in (bytes(body), bytes(body[: at + 1]), bytes(body) * 2, long):
        with contextlib.suppress(BadRequestError, TooLargeError):
            decode(changed, BYTES_MAX)


def test_the_codec_gives_the_outputs_asked_for_in_the_order_asked_for() -> None:
    """By name; the format's headers go with it."""
    specs = (TensorSpec("a", "FP32", (-1,)), TensorSpec("b", "INT64", (-1,)))
    owner = Served("m", 1, Signature(specs, specs), b"")
    codec = MessagePack(BYTES_MAX)
    call = codec.decode(msgpack.packb(inputs() | {"outputs": [{"name": "b"}, {"name": "a"}]}))

    answer = codec.encode(call, owner, [np.float32([1]), np.int64([2])])

    assert [o["name"] for o in msgpack.unpackb(answer.body)["outputs"]] == ["b", "a"]
    assert answer.headers == ((b"content-type", b"application/msgpack"),)


def test_an_error_is_a_document_with_code_status_and_id() -> None:
    """What a stream answers to a document that it cannot answer otherwise."""
    body = document("FP32", [1], b"", id="q1")

    answer = msgpack.unpackb(encode_error(TensorError("no"), identity(body, BYTES_MAX)))

    assert answer == {"error": "no", "code": "bad_tensor", "status": 400, "id": "q1"}
    assert identity(msgpack.packb({"id": 1}), BYTES_MAX) is None
    assert identity(b"\xc1", BYTES_MAX) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text(max_size=5) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=6), st.integers(1, 60))
def test_a_stream_falls_into_its_documents_wherever_it_is_cut(values: list[Any], step: int) -> None:
    """Whatever the sizes of the pieces, the documents are those that were written."""
    parts = [msgpack.packb(value) for value in values]
    whole = b"".join(parts)
    framer, found = Framer(BYTES_MAX), []
    for at in range(0, len(whole), step):
        framer.feed(whole[at : at + step])
        found += framer.documents()
    framer.end()

    assert found == parts


def test_a_stream_that_ends_within_a_document_or_holds_none_is_an_error() -> None:
    """Who sends half a document is told."""
    framer = Framer(BYTES_MAX)
    framer.feed(msgpack.packb("whole") + b"\xa5hal")
    assert len(list(framer.documents())) == 1
    with pytest.raises(BadRequestError, match="ends in the middle of a document"):
        framer.end()

    for bad, words in [(b"\xc1", "starts no value"), (b"\x91" * 5000, "nested too deep")]:
        framer = Framer(BYTES_MAX)
        framer.feed(msgpack.packb("whole") + bad)
        documents = framer.documents()
        assert next(documents) == msgpack.packb("whole")
        with pytest.raises(BadRequestError, match=words):
            next(documents)


@pytest.mark.parametrize("claimed", [1001, 2**32 - 1])
def test_a_document_of_a_stream_is_refused_when_more_came_than_it_may_have(claimed: int) -> None:
    """Neither its claim nor its rest is waited for."""
    framer = Framer(1000)
    framer.feed(b"\xc6" + claimed.to_bytes(4, "big"))
    assert list(framer.documents()) == []
    framer.feed(b"x" * 1001)
    with pytest.raises(TooLargeError, match="1000 bytes"):
        list(framer.documents())
