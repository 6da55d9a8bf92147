"""One model behind every protocol: the same arrays come back, and the same sentences.

The clients here are written from the protocols' documents, on httpx, msgpack and grpcio alone.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.protocol.stubs import inference_pb2 as pb
from tests import models
from tests.serving import Server, serve

Array = np.ndarray[Any, Any]

NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32,
    "UINT64": np.uint64, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32,
    "INT64": np.int64, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
    "BYTES": np.object_,
}  # fmt: skip
FLOATS = ("FP16", "FP32", "FP64")
TYPED = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents",
    "INT32": "int_contents", "INT64": "int64_contents", "UINT8": "uint_contents",
    "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""FP16 has no list of its own in gRPC."""
BITS = {"BF16": np.uint16}
"""numpy has no BF16: here its bits."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    for kind in NUMPY:
        models.put(registry, f"same-{kind}", 1, models.identity(kind, ("n", 2)))
        models.put(registry, f"flat-{kind}", 1, models.identity(kind, ("n",)))
    models.put(registry, "half", 1, models.half())
    models.put(registry, "pair", 1, models.sum_and_difference())
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    models.put(registry, "table", 1, models.lookup())
    models.put(registry, "slow", 1, models.slow(n_rounds=2000))
    for version in (2, 10):
        models.put(registry, "counted", version, models.constant(version))
    settings = {"limits.queue_rows_max": 1000, "grpc_carrier": "zttp"}
    with serve(registry, settings) as running:
        yield running


@pytest.fixture(scope="module")
def carriers(server: Server) -> Iterator["Carriers"]:
    address = server.events("ready")[0]["grpc_url"].rpartition("//")[2]
    with server.client() as http, grpc.insecure_channel(address) as channel:
        yield Carriers(http, channel)


@dataclass
class Carriers:
    """What requests travel by."""

    http: httpx.Client
    channel: grpc.Channel


@dataclass
class Asked:
    """One prediction, whatever it will be written in."""

    model: str
    inputs: Sequence[tuple[str, str, Array]]
    outputs: Sequence[str] = ()
    version: str = ""
    id: str = ""
    timeout_us: int = 0
    shape: list[int] | None = None
    """Said of the first input in place of its array's own."""
    content: bytes | None = None
    """Sent as the first input's bytes in place of its array's own."""

    @property
    def path(self) -> str:
        version = f"/versions/{self.version}" if self.version else ""
        return f"/v2/models/{self.model}{version}/infer"

    def raw_of(self, k: int) -> bytes:
        _, kind, array = self.inputs[k]
        return self.content if self.content is not None and k == 0 else raw(kind, array)

    def shape_of(self, k: int) -> list[int]:
        return self.shape if self.shape is not None and k == 0 else list(self.inputs[k][2].shape)


@dataclass
class Got:
    """What came back: outputs, or a sentence and its code."""

    outputs: dict[str, tuple[str, Array]] = field(default_factory=dict)
    about: tuple[str, str, str] = ("", "", "")
    """Model, version, id."""
    sentence: str = ""
    code: str = ""
    status: int = 200


# -- reading and writing of tensors


def raw(kind: str, array: Array) -> bytes:
    """Little endian without gaps; a text is four bytes of length and UTF-8."""
    if kind != "BYTES":
        return array.astype(array.dtype.newbyteorder("<")).tobytes()
    texts = [text.encode() for text in array.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def from_raw(kind: str, shape: Sequence[int], content: bytes) -> Array:
    if kind != "BYTES":
        dtype = np.dtype((NUMPY | BITS)[kind]).newbyteorder("<")
        return np.frombuffer(content, dtype).reshape(shape)
    texts, at = [], 0
    while at < len(content):
        (size,) = struct.unpack_from("<I", content, at)
        texts.append(content[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return of_texts(texts, shape)


def of_texts(texts: Sequence[str], shape: Sequence[int]) -> Array:
    array = np.empty(len(texts), np.object_)
    array[:] = texts
    return array.reshape(shape)


def from_list(kind: str, shape: Sequence[int], data: Sequence[Any]) -> Array:
    if kind == "BYTES":
        return of_texts(data, shape)
    numbers = [math.nan if value is None else value for value in data]
    with np.errstate(over="ignore"):
        return np.array(numbers, NUMPY[kind]).reshape(shape)


# -- the protocols


def send_v2(carriers: Carriers, asked: Asked, *, is_binary: bool, is_output_binary: bool) -> Got:
    """The Open Inference Protocol, with or without raw tensors behind the JSON."""
    inputs, tail = [], b""
    for k, (name, kind, array) in enumerate(asked.inputs):
        about: dict[str, Any] = {"name": name, "datatype": kind, "shape": asked.shape_of(k)}
        if is_binary:
            content = asked.raw_of(k)
            about["parameters"] = {"binary_data_size": len(content)}
            tail += content
        else:
            about["data"] = array.ravel().tolist()
        inputs.append(about)
    parameters: dict[str, Any] = {"binary_data_output": True} if is_output_binary else {}
    if asked.timeout_us:
        parameters["timeout"] = asked.timeout_us
    body: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    if asked.id:
        body["id"] = asked.id
    if asked.outputs:
        per_output = {"parameters": {"binary_data": True}} if is_output_binary else {}
        body["outputs"] = [{"name": name, **per_output} for name in asked.outputs]
    head = json.dumps(body).encode()  # Writes NaN bare, as numeric clients do.
    headers = {"inference-header-content-length": str(len(head))} if is_binary else {}
    answer = carriers.http.post(asked.path, content=head + tail, headers=headers)
    if answer.status_code != 200:
        return http_error(answer)
    length = answer.headers.get("inference-header-content-length")
    size = len(answer.content) if length is None else int(length)
    read, at = json.loads(answer.content[:size]), size
    outputs = {}
    for output in read["outputs"]:
        kind, shape = output["datatype"], output["shape"]
        if "data" in output:
            outputs[output["name"]] = kind, from_list(kind, shape, output["data"])
        else:
            taken = output["parameters"]["binary_data_size"]
            outputs[output["name"]] = (
                kind,
                from_raw(kind, shape, answer.content[at : at + taken]),
            )
            at += taken
    assert at == len(answer.content)
    return Got(outputs, (read["model_name"], read["model_version"], read.get("id", "")))


def messagepack_document(asked: Asked, *, is_raw: bool) -> bytes:
    inputs = []
    for k, (name, kind, array) in enumerate(asked.inputs):
        is_list = not is_raw or (kind == "BYTES" and asked.content is None)
        data: Any = array.ravel().tolist() if is_list else asked.raw_of(k)
        inputs.append({"name": name, "datatype": kind, "shape": asked.shape_of(k), "data": data})
    body: dict[str, Any] = {"inputs": inputs, "parameters": {"raw": is_raw}}
    if asked.timeout_us:
        body["parameters"]["timeout"] = asked.timeout_us
    if asked.id:
        body["id"] = asked.id
    if asked.outputs:
        body["outputs"] = [{"name": name} for name in asked.outputs]
    return msgpack.packb(body)  # type: ignore[no-any-return]  # it comes without types


def from_document(read: dict[str, Any]) -> Got:
    if "error" in read:
        return Got(sentence=read["error"], code=read["code"], status=read["status"])
    outputs = {}
    for output in read["outputs"]:
        kind, shape, data = output["datatype"], output["shape"], output["data"]
        array = from_raw(kind, shape, data) if isinstance(data, bytes) else None
        outputs[output["name"]] = kind, from_list(kind, shape, data) if array is None else array
    return Got(outputs, (read["model_name"], read["model_version"], read.get("id", "")))


def send_messagepack(carriers: Carriers, asked: Asked, *, is_raw: bool) -> Got:
    """One MessagePack document."""
    answer = carriers.http.post(
        asked.path,
        content=messagepack_document(asked, is_raw=is_raw),
        headers={"content-type": "application/msgpack"},
    )
    if answer.status_code != 200:
        return http_error(answer)
    return from_document(msgpack.unpackb(answer.content))


def send_messagepack_stream(carriers: Carriers, asked: Asked) -> Got:
    """A stream of one document."""
    answer = carriers.http.post(
        asked.path + "_stream",
        content=messagepack_document(asked, is_raw=True),
        headers={"content-type": "application/msgpack"},
    )
    if answer.status_code != 200:
        return http_error(answer)
    return from_document(msgpack.unpackb(answer.content))


def grpc_message(asked: Asked, *, is_raw: bool) -> Any:
    message = pb.ModelInferRequest(model_name=asked.model, model_version=asked.version, id=asked.id)
    if asked.timeout_us:
        message.parameters["timeout"].int64_param = asked.timeout_us
    for k, (name, kind, array) in enumerate(asked.inputs):
        about = message.inputs.add(name=name, datatype=kind, shape=asked.shape_of(k))
        if is_raw:
            message.raw_input_contents.append(asked.raw_of(k))
        else:
            values = array.ravel().tolist()
            values = [text.encode() for text in values] if kind == "BYTES" else values
            getattr(about.contents, TYPED[kind]).extend(values)
    for name in asked.outputs:
        message.outputs.add(name=name)
    return message


def from_message(answer: Any) -> Got:
    assert len(answer.raw_output_contents) == len(answer.outputs)
    outputs = {
        output.name: (output.datatype, from_raw(output.datatype, output.shape, content))
        for output, content in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
    return Got(outputs, (answer.model_name, answer.model_version, answer.id))


HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""The statuses of one table: which HTTP status means the same as a gRPC code."""


def send_grpc(carriers: Carriers, asked: Asked, *, is_raw: bool) -> Got:
    """ModelInfer."""
    call = carriers.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    try:
        return from_message(call(grpc_message(asked, is_raw=is_raw), timeout=20))
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata())  # type: ignore[attr-defined]  # a Call as well
        return Got(
            sentence=error.details(),  # type: ignore[attr-defined]  # same
            code=str(trailing.get("x-driftgate-code", "")),
            status=HTTP_STATUS[error.code()],  # type: ignore[attr-defined]  # same
        )


def send_grpc_stream(carriers: Carriers, asked: Asked) -> Got:
    """ModelStreamInfer with one message; its error has a sentence, and no code beside it."""
    call = carriers.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )
    (answer,) = call(iter([grpc_message(asked, is_raw=True)]), timeout=20)
    if answer.error_message:
        return Got(sentence=answer.error_message)
    return from_message(answer.infer_response)


def http_error(answer: httpx.Response) -> Got:
    read = answer.json()
    return Got(sentence=read["error"], code=read["code"], status=answer.status_code)


Send = Callable[[Carriers, Asked], Got]

RAW: dict[str, Send] = {
    "binary": lambda c, a: send_v2(c, a, is_binary=True, is_output_binary=True),
    "MessagePack": lambda c, a: send_messagepack(c, a, is_raw=True),
    "MessagePack stream": send_messagepack_stream,
    "gRPC raw": lambda c, a: send_grpc(c, a, is_raw=True),
    "gRPC stream": send_grpc_stream,
}
"""Tensors as bytes both ways: every bit is kept."""
LISTS: dict[str, Send] = {
    "JSON": lambda c, a: send_v2(c, a, is_binary=False, is_output_binary=False),
    "MessagePack lists": lambda c, a: send_messagepack(c, a, is_raw=False),
    "gRPC typed": lambda c, a: send_grpc(c, a, is_raw=False),
}
MIXED: dict[str, Send] = {
    "JSON to binary": lambda c, a: send_v2(c, a, is_binary=False, is_output_binary=True),
    "binary to JSON": lambda c, a: send_v2(c, a, is_binary=True, is_output_binary=False),
}
EVERY = RAW | LISTS | MIXED
WITHOUT_NAN = {"JSON", "binary to JSON"}
"""JSON has no NaN and no infinity: these answers hold null in their place."""


def speaks(name: str, kind: str) -> bool:
    return not (name == "gRPC typed" and kind == "FP16")


# -- every datatype, every encoding, both ways


def elements(kind: str) -> st.SearchStrategy[Any]:
    """Values of a datatype, its limits among them."""
    if kind == "BOOL":
        return st.booleans()
    if kind == "BYTES":
        return st.text(max_size=12)
    if kind in FLOATS:
        return st.floats(width=np.finfo(NUMPY[kind]).bits)
    limits = np.iinfo(NUMPY[kind])
    ends = st.sampled_from([int(limits.min), int(limits.max), 0])
    return ends | st.integers(int(limits.min), int(limits.max))


def rows(kind: str) -> st.SearchStrategy[Array]:
    """None to five rows of two."""
    pairs = st.lists(st.tuples(elements(kind), elements(kind)), max_size=5)
    return pairs.map(lambda drawn: _array(kind, [x for pair in drawn for x in pair]))


def _array(kind: str, values: list[Any]) -> Array:
    if kind == "BYTES":
        return of_texts(values, (-1, 2) if values else (0, 2))
    return np.array(values, NUMPY[kind]).reshape(-1, 2)


def assert_same(kind: str, got: Array, sent: Array, name: str) -> None:
    """Bit for bit, but for the payload of a NaN that went through a number of a list."""
    assert got.shape == sent.shape, name
    if kind == "BYTES":
        assert got.tolist() == sent.tolist(), name
    elif kind not in FLOATS or name in RAW:
        assert got.tobytes() == sent.tobytes(), name
    else:
        expected = sent
        if name in WITHOUT_NAN:
            expected = np.where(np.isfinite(sent), sent, np.nan).astype(sent.dtype)
        np.testing.assert_array_equal(got, expected, err_msg=name)
        np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(expected[got == 0]))


@pytest.mark.parametrize("kind", NUMPY)
def test_every_encoding_gives_back_the_same_arrays(carriers: Carriers, kind: str) -> None:
    """Limits, NaN, infinities, negative zeros, empty batches and any text, through all of them."""

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(rows(kind))
    def check(sent: Array) -> None:
        for name, send in EVERY.items():
            if not speaks(name, kind):
                continue
            got = send(carriers, Asked(f"same-{kind}", [("x", kind, sent)]))
            assert not got.sentence, f"{name}: {got.sentence}"
            given_kind, array = got.outputs["y"]
            assert given_kind == kind, name
            assert_same(kind, array, sent, name)

    check()


def test_a_nan_keeps_its_bits_where_tensors_are_bytes(carriers: Carriers) -> None:
    """Some pipelines mark missing values by the payload of a NaN."""
    sent = np.array([0x7FC00001, 0xFFC12345], np.uint32).view(np.float32)

    for name, send in RAW.items():
        got = send(carriers, Asked("flat-FP32", [("x", "FP32", sent)]))
        assert got.outputs["y"][1].tobytes() == sent.tobytes(), name


@pytest.mark.parametrize("name", RAW)
def test_bf16_keeps_its_bits_where_tensors_are_bytes(carriers: Carriers, name: str) -> None:
    """Zeros of both signs, one, infinity, a NaN, the largest and the smallest number."""
    bits = np.uint16([[0], [0x8000], [0x3F80], [0x7F80], [0x7FC1], [0xFF7F], [1]])
    nothing = np.zeros(bits.shape, np.float32)

    got = RAW[name](carriers, Asked("half", [("b", "BF16", bits), ("f", "FP32", nothing)]))

    assert not got.sentence
    assert got.outputs["same"][0] == "BF16"
    assert got.outputs["same"][1].tolist() == bits.tolist()
    # BF16 is the upper half of a float32, so adding nothing gives that float32.
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(got.outputs["sum"][1], wide)


@pytest.mark.parametrize("name", EVERY)
def test_model_version_and_id_are_named_by_every_protocol(carriers: Carriers, name: str) -> None:
    """And the version asked for is the one that answers: 10 without asking, not 2."""
    sent = np.zeros(1, np.float32)

    for version, expected in (("", 10), ("2", 2)):
        asked = Asked("counted", [("x", "FP32", sent)], version=version, id="r-17")
        got = EVERY[name](carriers, asked)

        assert got.about == ("counted", str(expected), "r-17")
        assert got.outputs["y"][1].tolist() == [expected]


@pytest.mark.parametrize("name", EVERY)
def test_outputs_come_in_the_order_asked_for(carriers: Carriers, name: str) -> None:
    """All of them in the model's order when none is named; inputs in any order."""
    a, b = np.float32([[5, 6]]), np.float32([[1, 3]])
    inputs = [("b", "FP32", b), ("a", "FP32", a)]

    for outputs, expected in (
        ((), ["sum", "difference"]),
        (("difference", "sum"), ["difference", "sum"]),
        (("sum",), ["sum"]),
    ):
        got = EVERY[name](carriers, Asked("pair", inputs, outputs))
        assert list(got.outputs) == expected
        np.testing.assert_array_equal(got.outputs["sum"][1], a + b)


# -- the same mistake, the same sentence


THREE = np.zeros((2, 3), np.float32)
X = ("x", "FP32", THREE)
PAIR = [(name, "FP32", np.zeros((1, 2), np.float32)) for name in "ab"]

WRONG = {
    "unknown model": (Asked("matrx", [X]), 404, "model_not_found"),
    "unknown version": (Asked("matrix", [X], version="7"), 404, "version_not_found"),
    "version that is no number": (Asked("matrix", [X], version="new"), 404, "version_not_found"),
    "wrong datatype": (
        Asked("matrix", [("x", "FP64", THREE.astype(np.float64))]), 400, "bad_tensor",
    ),
    "unknown datatype": (Asked("matrix", [("x", "FP31", THREE)]), 400, "bad_tensor"),
    "wrong width": (
        Asked("matrix", [("x", "FP32", np.zeros((2, 4), np.float32))]), 400, "bad_tensor",
    ),
    "wrong rank": (Asked("matrix", [("x", "FP32", np.zeros(3, np.float32))]), 400, "bad_tensor"),
    "negative size": (Asked("matrix", [X], shape=[-2, 3]), 400, "bad_tensor"),
    "size beyond all memory": (Asked("matrix", [X], shape=[2**40, 2**40]), 400, "bad_tensor"),
    "rank beyond reason": (Asked("matrix", [X], shape=[1] * 40), 400, "bad_tensor"),
    "too few elements": (Asked("matrix", [X], shape=[3, 3]), 400, "bad_tensor"),
    "too many elements": (Asked("matrix", [X], shape=[1, 3]), 400, "bad_tensor"),
    "wrong name": (Asked("matrix", [("z", "FP32", THREE)]), 400, "bad_tensor"),
    "no name": (Asked("matrix", [("", "FP32", THREE)]), 400, "bad_request"),
    "one too many": (Asked("matrix", [X, ("z", "FP32", THREE)]), 400, "bad_tensor"),
    "one missing": (Asked("pair", PAIR[:1]), 400, "bad_tensor"),
    "none at all": (Asked("pair", []), 400, "bad_request"),
    "given twice": (Asked("pair", [PAIR[0], PAIR[0]]), 400, "bad_tensor"),
    "rows disagree": (
        Asked("pair", [PAIR[0], ("b", "FP32", np.zeros((3, 2), np.float32))]), 400, "bad_tensor",
    ),
    "unknown output": (Asked("matrix", [X], ["z"]), 400, "bad_tensor"),
    "output twice": (Asked("matrix", [X], ["y", "y"]), 400, "bad_tensor"),
    "index out of range": (
        Asked("table", [("index", "INT64", np.array([77], np.int64))]), 400, "input_refused",
    ),
    "more rows than may wait": (
        Asked("flat-UINT8", [("x", "UINT8", np.zeros(1001, np.uint8))]), 413, "too_large",
    ),
    "too late": (
        Asked("slow", [("x", "FP32", np.ones((1, 1), np.float32))], timeout_us=1000),
        504,
        "deadline_exceeded",
    ),
}  # fmt: skip
COUNTED = {"too few elements", "too many elements", "size beyond all memory"}
"""Here raw tensors are told in bytes, lists in elements: the sentence is one for each."""


@pytest.mark.parametrize("case", WRONG)
def test_the_same_mistake_gets_the_same_sentence_everywhere(carriers: Carriers, case: str) -> None:
    """Only the wrapping differs: status, code and text are those of one error."""
    asked, status, code = WRONG[case]
    sentences = {}

    for name, send in EVERY.items():
        if case == "unknown datatype" and name == "gRPC typed":
            continue  # No list of elements belongs to a datatype that there is not.
        got = send(carriers, asked)
        assert not got.outputs, f"{name} answered"
        sentences[name] = got.sentence
        if name != "gRPC stream":  # Which has room for the sentence alone.
            assert (got.status, got.code) == (status, code), f"{name}: {got.sentence}"

    groups = [RAW | {"binary to JSON": 0}, LISTS | {"JSON to binary": 0}]
    for group in groups if case in COUNTED else [EVERY]:
        told = {sentence for name, sentence in sentences.items() if name in group}
        assert len(told) == 1, sentences
    assert all(sentences.values())


@pytest.mark.parametrize(
    "case",
    [
        "unknown model", "unknown version", "wrong width", "one missing",
        "index out of range", "more rows than may wait",
    ],
)  # fmt: skip
def test_the_untyped_contracts_say_the_same(carriers: Carriers, case: str) -> None:
    """KServe v1, TensorFlow Serving and MLflow bring no shapes or datatypes; the rest is same."""
    asked, status, code = WRONG[case]
    sentence = EVERY["JSON"](carriers, asked).sentence
    body = {"inputs": {name: array.tolist() for name, _, array in asked.inputs}}

    path = asked.path.replace("/v2/", "/v1/").replace("/infer", ":predict")
    answers = [carriers.http.post(path, json=body)]
    if not asked.version:  # A path without a model's name has none for a version either.
        headers = {"x-driftgate-model": asked.model}
        answers.append(carriers.http.post("/invocations", json=body, headers=headers))

    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
        assert answer.json()["error"] == sentence


@pytest.mark.parametrize(
    ("kind", "value"),
    [("UINT8", 300), ("UINT8", -1), ("INT8", -129), ("INT16", 2**15), ("UINT16", 2**16)],
)
def test_a_number_out_of_range_gets_one_sentence(carriers: Carriers, kind: str, value: int) -> None:
    """It never wraps around, in any encoding that could hold it."""
    sent = np.array([0, value], np.int64)
    names = [name for name in LISTS if name != "gRPC typed" or value >= 0 or kind[0] == "I"]

    got = [LISTS[name](carriers, Asked(f"flat-{kind}", [("x", kind, sent)])) for name in names]

    assert {(one.status, one.code) for one in got} == {(400, "bad_tensor")}
    assert len({one.sentence for one in got}) == 1
    assert f"element 1 is {value}" in got[0].sentence


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("BYTES", b"\x02\x00\x00\x00\xff\xfe"),
        ("BYTES", b"\x01\x00\x00\x00"),
        ("BYTES", b"\xff\xff\xff\xffab"),
        ("BYTES", b"\x01\x00\x00"),
        ("BYTES", b"\x00\x00\x00\x00\x00\x00\x00\x00"),
        ("BYTES", b""),
        ("BOOL", b"\x02"),
        ("FP32", b"\x00\x00\x00"),
        ("FP32", b"\x00" * 5),
        ("FP16", b""),
    ],
    ids=[
        "no-utf8", "text-is-missing", "length-that-lies", "length-cut-off", "one-text-too-many",
        "no-text", "bool-of-two", "byte-missing", "byte-too-many", "no-bytes",
    ],
)  # fmt: skip
def test_bytes_that_are_no_tensor_get_one_sentence(
    carriers: Carriers, kind: str, content: bytes
) -> None:
    """One element is said to come; whichever message carries the bytes, the mistake is the same."""
    one = of_texts([""], (1,)) if kind == "BYTES" else np.zeros(1, NUMPY[kind])
    asked = Asked(f"flat-{kind}", [("x", kind, one)], content=content)

    got = {name: send(carriers, asked) for name, send in RAW.items()}

    assert len({one.sentence for one in got.values()}) == 1, got
    assert all("input 'x'" in one.sentence for one in got.values())
    del got["gRPC stream"]  # Its errors have no code beside the sentence.
    assert {(one.status, one.code) for one in got.values()} == {(400, "bad_tensor")}


# -- the shapes of the official examples


def test_the_first_example_of_the_protocol_text_is_answered(carriers: Carriers) -> None:
    """Two inputs, one nested and one flat, a parameter that nobody knows, one output."""
    body = {
        "id": "42",
        "inputs": [
            {"name": "a", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2], [3, 4]]},
            {"name": "b", "shape": [2, 2], "datatype": "FP32", "data": [1, 1, 1, 1],
             "parameters": {"content_type": "np"}},
        ],
        "outputs": [{"name": "sum"}],
        "parameters": {"of_my_own": True},
    }  # fmt: skip

    got = carriers.http.post("/v2/models/pair/infer", json=body)

    assert got.status_code == 200, got.text
    assert got.json() == {
        "model_name": "pair", "model_version": "1", "id": "42",
        "outputs": [{"name": "sum", "shape": [2, 2], "datatype": "FP32", "data": [2, 3, 4, 5]}],
    }  # fmt: skip


def test_the_example_of_the_binary_extension_is_answered(carriers: Carriers) -> None:
    """One raw input and one in the JSON; one output raw and one not, as they are asked for."""
    first = np.float32([[1, 2]])
    body = {
        "inputs": [
            {"name": "a", "shape": [1, 2], "datatype": "FP32",
             "parameters": {"binary_data_size": 8}},
            {"name": "b", "shape": [1, 2], "datatype": "FP32", "data": [[5, 7]]},
        ],
        "outputs": [
            {"name": "sum", "parameters": {"binary_data": True}},
            {"name": "difference"},
        ],
    }  # fmt: skip
    head = json.dumps(body).encode()

    got = carriers.http.post(
        "/v2/models/pair/infer",
        content=head + first.tobytes(),
        headers={
            "content-type": "application/octet-stream",
            "inference-header-content-length": str(len(head)),
        },
    )

    length = int(got.headers["inference-header-content-length"])
    read = json.loads(got.content[:length])
    assert got.headers["content-type"] == "application/octet-stream"
    assert read["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert "data" not in read["outputs"][0]
    assert "parameters" not in read["outputs"][1]
    assert read["outputs"][1]["data"] == [-4, -5]
    assert np.frombuffer(got.content[length:], np.float32).tolist() == [6, 9]


def test_the_raw_binary_request_needs_no_json_at_all(carriers: Carriers) -> None:
    """Length header 0: the body is one row of the only input; the answer is raw too."""
    sent = np.float32([[1, 2, 3]])

    got = carriers.http.post(
        "/v2/models/matrix/infer",
        content=sent.tobytes(),
        headers={"inference-header-content-length": "0"},
    )

    assert got.status_code == 200, got.text
    length = int(got.headers["inference-header-content-length"])
    assert got.content[length:] == sent.tobytes()


def test_a_typed_grpc_request_is_answered_raw(carriers: Carriers) -> None:
    """Triton's clients cannot read numbers from typed answers."""
    message = grpc_message(Asked("matrix", [X]), is_raw=False)
    call = carriers.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    answer = pb.ModelInferResponse.FromString(call(message.SerializeToString(), timeout=20))

    assert not answer.outputs[0].HasField("contents")
    assert answer.raw_output_contents == [THREE.tobytes()]
