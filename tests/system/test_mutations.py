"""Good messages of every protocol with bytes changed: answered or refused, by every decoder."""

import gzip
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import httpx
import msgpack
import numpy as np
import pytest

from gateway.protocol.stubs import inference_pb2 as pb
from tests import models
from tests.mutation import mutated
from tests.serving import Server, request, serve, tensor

ANSWER_S_MAX = 5.0
N_MUTATIONS = 400
ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
RAW = np.array(ROWS, "<f4").tobytes()
GOOD = request(tensor("x", "FP32", [2, 3], ROWS), id="some id")
X = {"name": "x", "shape": [2, 3], "datatype": "FP32"}
HEAD = json.dumps(request({**X, "parameters": {"binary_data_size": len(RAW)}})).encode()
PACKED = msgpack.packb(request({**X, "data": RAW}, id="some id"))
LABELS = [{"id": "some id/0", "label": 1}, {"id": "some id/1", "label": 0}]
MARKS = [b"NaN", b"null", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\u0000", b"-", b"1e999",
         b"9" * 25, b"\xff", b"\x00", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff",
         b"\xc6\xff\xff\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\n", b";"]  # fmt: skip


@dataclass(frozen=True)
class Message:
    """A good body, where it goes and what it says it is."""

    path: str
    body: bytes
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


INFER = "/v2/models/matrix/infer"
MESSAGES = {
    "v2 JSON": Message(INFER, json.dumps(GOOD).encode()),
    "v2 JSON, gzip": Message(
        INFER, gzip.compress(json.dumps(GOOD).encode()), headers={"content-encoding": "gzip"}
    ),
    "v2 binary": Message(
        INFER, HEAD + RAW, "application/octet-stream",
        {"inference-header-content-length": str(len(HEAD))},
    ),
    "MessagePack": Message(INFER, PACKED, "application/msgpack"),
    "MessagePack stream": Message(
        "/v2/models/matrix/infer_stream", PACKED * 3, "application/msgpack"
    ),
    "KServe v1": Message("/v1/models/matrix:predict", json.dumps({"instances": ROWS}).encode()),
    "TF Serving, columns": Message(
        "/v1/models/matrix/versions/1:predict", json.dumps({"inputs": {"x": ROWS}}).encode()
    ),
    "MLflow split": Message(
        "/invocations",
        json.dumps({"dataframe_split": {"columns": ["a", "b", "c"], "data": ROWS}}).encode(),
    ),
    "MLflow CSV": Message("/invocations", b'a,b,c\n1,2,3\n"4",5,6.5\n', "text/csv"),
    "labels JSON": Message("/labels?model=matrix", json.dumps(LABELS).encode()),
    "labels CSV": Message("/labels?model=matrix", b"id,label\nsome id/0,1\n", "text/csv"),
    "labels MessagePack": Message(
        "/labels?model=matrix", msgpack.packb(LABELS), "application/msgpack"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    with serve(registry, {"model": "matrix", "labels.sample": 100}) as running:
        yield running
    assert not running.events("worker_ended", "request_failed")


@pytest.mark.parametrize("name", MESSAGES)
def test_mutations_over_http_are_answered_or_refused(server: Server, name: str) -> None:
    """No 5xx, no silence, no trace; and most are refused, so that the decoder did see them."""
    message, draw = MESSAGES[name], random.Random(name)
    headers = {"content-type": message.kind, **message.headers}
    seen: dict[int, int] = {}
    with server.client(timeout=ANSWER_S_MAX) as client:
        good = client.post(message.path, content=message.body, headers=headers)
        assert good.status_code == 200, good.text
        for _ in range(N_MUTATIONS):
            body = mutated(message.body, draw, MARKS)
            got = client.post(message.path, content=body, headers=headers)
            assert got.status_code < 500, (body, got.text)
            if got.status_code != 200:
                check_sentence(got)
            seen[got.status_code] = seen.get(got.status_code, 0) + 1
        assert client.post(INFER, json=GOOD).json()["outputs"][0]["data"] == [*ROWS[0], *ROWS[1]]
    # A stream says 200 first, and then in each document what is wrong with it.
    assert "stream" in name or N_MUTATIONS - seen.get(200, 0) > N_MUTATIONS / 10, seen


def test_mutations_over_grpc_are_answered_or_refused(server: Server) -> None:
    """Each is told INVALID_ARGUMENT or NOT_FOUND, or, where it still means something, answered."""
    tensor_of = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[2, 3])
    raw = pb.ModelInferRequest(
        model_name="matrix", id="some id", inputs=[tensor_of], raw_input_contents=[RAW]
    ).SerializeToString()
    draw = random.Random("gRPC")
    fine = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    seen: dict[grpc.StatusCode, int] = {}
    with grpc.insecure_channel(server.wait_for("ready")["grpc_url"]) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(2 * N_MUTATIONS):
            body = mutated(raw, draw, MARKS)
            start = time.monotonic()
            try:
                infer(body, timeout=ANSWER_S_MAX)
            except grpc.RpcError as error:
                code = error.code()
            else:
                code = grpc.StatusCode.OK
            assert code in fine, (code, body)
            assert time.monotonic() - start < ANSWER_S_MAX
            seen[code] = seen.get(code, 0) + 1
        assert len(infer(raw, timeout=ANSWER_S_MAX)) > len(RAW)
    assert seen.get(grpc.StatusCode.INVALID_ARGUMENT, 0) > N_MUTATIONS / 10, seen


def check_sentence(got: httpx.Response) -> None:
    """A refusal says something in words, and nothing of the inside."""
    told = msgpack.unpackb(got.content) if "msgpack" in got.headers["content-type"] else got.json()
    assert isinstance(told, dict) and any("error" in key for key in told), got.text  # noqa: PT018
    for inside in ("Traceback", ".py", "site-packages", "0x7f"):
        assert inside not in got.text
