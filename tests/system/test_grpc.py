"""gRPC over a real socket: the same answers, limits and sentences as over HTTP."""

import asyncio
import queue
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from gateway import __version__, errors
from gateway.protocol.stubs import inference_pb2 as pb
from tests import models
from tests.serving import (
    Server,
    driftgate,
    environment,
    free_port,
    request,
    serve,
    tensor,
    wait_until,
)

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@pytest.fixture(scope="module", params=["grpcio", "zttp"])
def carrier(request: pytest.FixtureRequest) -> str:
    """What carries the calls; clients must not be able to tell."""
    return str(request.param)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, carrier: str) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    models.put(registry, "wide", 1, models.identity("FP32", ("n", "k")))
    models.put(registry, "text", 1, models.identity("BYTES"))
    models.put(registry, "pair", 1, models.sum_and_difference())
    models.put(registry, "slow", 1, models.slow())
    for version in (2, 10):
        models.put(registry, "counted", version, models.constant(version))
    with serve(registry, {"grpc_carrier": carrier}) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address(server), UNLIMITED) as opened:
        yield opened


def address(server: Server) -> str:
    found: str = server.wait_for("ready")["grpc_url"]
    return found


def message(
    model: str, array: Any, name: str = "x", kind: str = "FP32", **fields: Any
) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name=model, **fields)
    made.inputs.add(name=name, datatype=kind, shape=array.shape)
    made.raw_input_contents.append(array.tobytes())
    return made


def wide(*rows: list[float], **fields: Any) -> pb.ModelInferRequest:
    return message("wide", np.array(rows, np.float32), **fields)


def call(channel: grpc.Channel, name: str, given: Any = b"", **options: Any) -> Any:
    """The answer to one unary call, as the message that belongs to it."""
    method = channel.unary_unary(f"/{SERVICE}/{name}")
    body = given if isinstance(given, bytes) else given.SerializeToString()
    answer = getattr(pb, f"{name}Response")
    return answer.FromString(method(body, **{"timeout": 20, **options}))


def refused(channel: grpc.Channel, name: str, given: Any = b"", **options: Any) -> Any:
    """The error of one unary call."""
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, name, given, **options)
    return caught.value


def stream(channel: grpc.Channel) -> Any:
    return channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )


def floats(answer: pb.ModelInferResponse, k: int = 0) -> Any:
    array = np.frombuffer(answer.raw_output_contents[k], np.float32)
    return array.reshape(answer.outputs[k].shape)


# -- predictions


def test_a_prediction_gives_back_what_the_model_does(channel: grpc.Channel) -> None:
    """Raw in, raw out; name, version and id; every bit, NaN included."""
    sent = np.array([[1.5, np.nan], [-0.0, np.inf]], np.float32)

    answer = call(channel, "ModelInfer", message("wide", sent, id="ü"))

    assert (answer.model_name, answer.model_version, answer.id) == ("wide", "1", "ü")
    assert floats(answer).tobytes() == sent.tobytes()
    assert not answer.outputs[0].HasField("contents")


def test_typed_contents_are_answered_raw_and_outputs_in_the_order_asked_for(
    channel: grpc.Channel,
) -> None:
    """What tritonclient and kserve read is the raw form."""
    asked = pb.ModelInferRequest(model_name="pair")
    for name, values in (("b", [10.0, 20.0]), ("a", [1.0, 2.0])):
        given = asked.inputs.add(name=name, datatype="FP32", shape=[1, 2])
        given.contents.fp32_contents.extend(values)
    asked.outputs.add(name="difference")
    asked.outputs.add(name="sum")

    answer = call(channel, "ModelInfer", asked)

    assert [output.name for output in answer.outputs] == ["difference", "sum"]
    assert floats(answer, 0).tolist() == [[-9.0, -18.0]]
    assert floats(answer, 1).tolist() == [[11.0, 22.0]]


def test_texts_keep_their_letters(channel: grpc.Channel) -> None:
    """BYTES go in and come out with their lengths in front."""
    asked = pb.ModelInferRequest(model_name="text")
    asked.inputs.add(name="x", datatype="BYTES", shape=[2]).contents.bytes_contents.extend(
        ["grün".encode(), b""]
    )

    answer = call(channel, "ModelInfer", asked)

    assert answer.raw_output_contents[0] == b"\5\0\0\0gr\xc3\xbcn\0\0\0\0"


def test_the_version_named_answers_else_the_highest(channel: grpc.Channel) -> None:
    """10 is above 2, by number."""
    x = np.zeros(1, np.float32)

    named = call(channel, "ModelInfer", message("counted", x, model_version="2"))
    default = call(channel, "ModelInfer", message("counted", x))

    assert (named.model_version, floats(named)[0]) == ("2", 2.0)
    assert (default.model_version, floats(default)[0]) == ("10", 10.0)


@pytest.mark.parametrize("packing", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_packed_messages_are_read(channel: grpc.Channel, packing: grpc.Compression) -> None:
    """A client packs what it sends, call by call."""
    sent = np.zeros((50, 40), np.float32)

    answer = call(channel, "ModelInfer", message("wide", sent), compression=packing)

    assert floats(answer).shape == (50, 40)


def test_large_messages_pass_both_ways(channel: grpc.Channel) -> None:
    """Far above gRPC's own limit of 4 MiB."""
    sent = np.random.default_rng(1).standard_normal((32, 1 << 18)).astype(np.float32)

    answer = call(channel, "ModelInfer", message("wide", sent))

    assert answer.raw_output_contents[0] == sent.tobytes()


@pytest.mark.parametrize("packing", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_messages_beyond_the_limit_are_refused_packed_or_not(
    channel: grpc.Channel, packing: grpc.Compression
) -> None:
    """The limit holds for what a message unpacks to; 100 MB of zeros are small when packed."""
    error = refused(channel, "ModelInfer", bytes(100_000_000), compression=packing)

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call(channel, "ServerLive").live


def test_the_request_id_comes_back(channel: grpc.Channel) -> None:
    """As initial metadata, with answers and with errors."""
    method = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    metadata = (("x-request-id", "abc-1"),)

    _, done = method.with_call(wide([1]).SerializeToString(), metadata=metadata, timeout=20)
    error = refused(channel, "ModelInfer", b"", metadata=metadata)

    assert ("x-request-id", "abc-1") in [tuple(one) for one in done.initial_metadata()]
    assert ("x-request-id", "abc-1") in [tuple(one) for one in error.initial_metadata()]


def test_a_prediction_without_an_id_is_told_the_one_that_was_made(channel: grpc.Channel) -> None:
    """As over HTTP: each another one, with answers and with errors, and once for a stream."""
    method = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    message = wide([1]).SerializeToString()
    made = []
    for metadata in (None, (("x-user-id", "u"),)):
        _, done = method.with_call(message, metadata=metadata, timeout=20)
        made.append(dict(done.trailing_metadata())["x-request-id"])
        assert "x-request-id" not in dict(done.initial_metadata())
    made.append(dict(refused(channel, "ModelInfer", b"").trailing_metadata())["x-request-id"])
    stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter([message]), timeout=20)
    assert len(list(stream)) == 1
    made.append(dict(stream.initial_metadata())["x-request-id"])

    assert len(set(made)) == 4
    assert all(0 < len(one) <= 128 for one in made)


def test_predictions_of_both_carriers_are_counted_alike(
    server: Server, channel: grpc.Channel
) -> None:
    """One path, two skins: the same series go up, whichever carried the call."""

    def counted(family: str) -> float:
        with server.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(family + "{") and 'model="pair"' in line
        )

    before = counted("driftgate_requests_total")
    asked = pb.ModelInferRequest(model_name="pair")
    for name in "ab":
        asked.inputs.add(name=name, datatype="FP32", shape=[1, 2])
        asked.raw_input_contents.append(bytes(8))
    call(channel, "ModelInfer", asked)

    assert counted("driftgate_requests_total") == before + 1
    with server.client() as client:
        body = request(*(tensor(name, "FP32", [1, 2], [0.0, 0.0]) for name in "ab"))
        assert client.post("/v2/models/pair/infer", json=body).status_code == 200
    assert counted("driftgate_requests_total") == before + 2
    assert counted("driftgate_request_seconds_count") == before + 2


# -- errors


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (request(tensor("x", "FP32", [1, 1], [1.0])), "model_not_found"),
        (request(tensor("x", "FP64", [1, 1], [1.0])), "bad_tensor"),
        (request(tensor("y", "FP32", [1, 1], [1.0])), "bad_tensor"),
        (request(tensor("x", "FP32", [1], [1.0])), "bad_tensor"),
        (request(tensor("x", "FP32", [2, 1], [1.0])), "bad_tensor"),
        (request(tensor("x", "FP32", [1, 1], [1.0]), outputs=[{"name": "z"}]), "bad_tensor"),
        (
            request(tensor("x", "FP32", [1, 1], [1.0]), parameters={"timeout": -1}),
            "bad_request",
        ),
    ],
)
def test_an_error_has_the_sentence_that_http_has(
    server: Server, channel: grpc.Channel, body: dict[str, Any], code: str
) -> None:
    """The same request over both: same sentence, same stable code, the status of one table."""
    model = "wid" if code == "model_not_found" else "wide"
    asked = pb.ModelInferRequest(model_name=model)
    for given in body["inputs"]:
        added = asked.inputs.add(name=given["name"], datatype=given["datatype"])
        added.shape.extend(given["shape"])
        field = "fp32_contents" if given["datatype"] == "FP32" else "fp64_contents"
        getattr(added.contents, field).extend(given["data"])
    for wanted in body.get("outputs", ()):
        asked.outputs.add(name=wanted["name"])
    if "parameters" in body:
        asked.parameters["timeout"].int64_param = body["parameters"]["timeout"]

    with server.client() as client:
        over_http = client.post(f"/v2/models/{model}/infer", json=body)
    error = refused(channel, "ModelInfer", asked)

    status = {one.code: one.grpc_status for one in errors.ALL}[code]
    assert over_http.json() == {"error": error.details(), "code": code}
    assert error.code().name == status
    assert ("x-driftgate-code", code) in [tuple(one) for one in error.trailing_metadata()]


def test_every_error_has_a_status_that_grpc_knows() -> None:
    """One table holds both statuses of every error."""
    known = {status.name for status in grpc.StatusCode}

    assert {error.grpc_status for error in errors.ALL} <= known - {"OK", "UNKNOWN"}


@pytest.mark.parametrize("name", ["ModelInfers", "modelInfer", ""])
def test_an_unknown_call_is_unimplemented(channel: grpc.Channel, name: str) -> None:
    """Names of calls are exact."""
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/{name}")(b"", timeout=20)

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_expired_deadline_is_told_apart_and_its_rows_do_not_run(
    server: Server, channel: grpc.Channel
) -> None:
    """The deadline of the call is the deadline of its rows, also while they wait."""
    x = np.zeros((1, 1), np.float32)
    method = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    body = message("slow", x).SerializeToString()
    ahead = [method.future(body, timeout=30) for _ in range(8)]

    error = refused(channel, "ModelInfer", message("slow", x), timeout=0.01)

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert all(one.result() for one in ahead)
    wait_until(lambda: shed(server, "slow") >= 1, "the late rows are dropped and counted")


def test_a_cancelled_call_leaves_the_queue(tmp_path: Path, carrier: str) -> None:
    """Rows that nobody waits for are dropped; the others of the queue are answered."""
    models.put(tmp_path, "slow", 1, models.slow())
    x = np.zeros((1, 1), np.float32)
    with (
        serve(tmp_path, {"batch.rows_max": 1, "grpc_carrier": carrier}) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        method = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        body = message("slow", x).SerializeToString()
        waiting = [method.future(body, timeout=30) for _ in range(30)]
        waiting[0].result()
        for one in waiting[6:]:
            one.cancel()

        assert [len(one.result()) > 0 for one in waiting[:6]] == [True] * 6
        wait_until(lambda: shed(server, "slow", "client_gone") >= 1, "dropped rows are counted")


def shed(server: Server, model: str, reason: str = "") -> float:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(f'driftgate_shed_total{{model="{model}"') and reason in line
    )


def test_calls_beyond_the_limit_are_refused_at_once(tmp_path: Path, carrier: str) -> None:
    """A stream that stays open counts as one."""
    models.put(tmp_path, "wide", 1, models.identity("FP32", ("n", "k")))
    with (
        serve(tmp_path, {"limits.grpc_calls_max": 1, "grpc_carrier": carrier}) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        asked: queue.Queue[Any] = queue.Queue()
        asked.put(wide([1]))
        answers = stream(channel)(iter(asked.get, None), timeout=30)
        assert next(answers).infer_response.model_name == "wide"

        with grpc.insecure_channel(address(server), [("grpc.use_local_subchannel_pool", 1)]) as two:
            error = refused(two, "ServerLive")
        asked.put(None)

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert list(answers) == []
        wait_until(lambda: is_live(channel), "the place is free again")


def is_live(channel: grpc.Channel) -> bool:
    try:
        return bool(call(channel, "ServerLive").live)
    except grpc.RpcError:
        return False


# -- streams


def test_a_stream_answers_in_order_and_goes_on_after_errors(channel: grpc.Channel) -> None:
    """Every message has one answer; one that fails is told by its id, in its place."""
    asked = [
        wide([float(k)], id=str(k)) if k % 3 else message("none", np.zeros(1, "f4"), id=str(k))
        for k in range(60)
    ]

    answers = list(stream(channel)(iter(asked), timeout=30))

    assert [answer.infer_response.id for answer in answers] == [str(k) for k in range(60)]
    for k, answer in enumerate(answers):
        assert bool(answer.error_message) == (k % 3 == 0), k
        if k % 3:
            assert floats(answer.infer_response).tolist() == [[k]]
    assert "no model 'none' here" in answers[0].error_message


def test_a_stream_answers_each_message_while_it_is_open(channel: grpc.Channel) -> None:
    """An answer does not wait for the next message, nor for the end."""
    asked: queue.Queue[Any] = queue.Queue()
    answers = stream(channel)(iter(asked.get, None), timeout=30)

    for k in range(3):
        asked.put(wide([k]))
        assert floats(next(answers).infer_response).tolist() == [[k]]
    asked.put(None)

    assert list(answers) == []
    assert answers.code() is grpc.StatusCode.OK


def test_a_stream_says_which_answer_is_the_last_if_asked(channel: grpc.Channel) -> None:
    """One answer to a message: the flag is on it."""
    asked = wide([1])
    asked.parameters["triton_enable_empty_final_response"].bool_param = True

    flagged, plain = stream(channel)(iter([asked, wide([1])]), timeout=30)

    assert flagged.infer_response.parameters["triton_final_response"].bool_param
    assert "triton_final_response" not in plain.infer_response.parameters


def test_a_client_that_does_not_read_its_answers_is_not_read_from(server: Server) -> None:
    """A stream holds a bounded number of messages, however many are sent."""

    async def flood() -> int:
        options = [("grpc.http2.max_frame_size", 16_384), ("grpc.http2.lookahead_bytes", 65_536)]
        async with grpc.aio.insecure_channel(address(server), options=options) as channel:
            opened = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(timeout=60)
            body = message("wide", np.zeros((1, 1 << 18), np.float32)).SerializeToString()
            sent = 0
            try:
                while sent < 400:
                    async with asyncio.timeout(2):
                        await opened.write(body)
                    sent += 1
            except TimeoutError:
                pass
            opened.cancel()
            return sent

    sent = asyncio.run(flood())

    assert 1 <= sent < 100
    assert peak_bytes(server) < 1 << 30


def peak_bytes(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_streams_end_with_the_server_and_what_was_read_is_answered(
    tmp_path: Path, carrier: str
) -> None:
    """On SIGTERM an open stream does not hold the server; the client is told why."""
    models.put(tmp_path, "wide", 1, models.identity("FP32", ("n", "k")))
    with (
        serve(tmp_path, {"grpc_carrier": carrier}) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        asked: queue.Queue[Any] = queue.Queue()
        answers = stream(channel)(iter(asked.get, None), timeout=30)
        asked.put(wide([7]))
        assert floats(next(answers).infer_response).tolist() == [[7]]
        watched = health_watch(channel)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING

        # Read as it comes: what is unread when its connection ends, a client may never hand out.
        with ThreadPoolExecutor(1) as beside:
            told = beside.submit(lambda: [one.status for one in watched])
            began = time.monotonic()
            assert server.stop() == 0
            took = time.monotonic() - began
            assert told.result(10) == [health_pb2.HealthCheckResponse.NOT_SERVING]

        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        asked.put(None)
    assert took < 10


def test_calls_in_flight_are_answered_when_the_server_ends(tmp_path: Path, carrier: str) -> None:
    """SIGTERM loses nothing that was accepted."""
    models.put(tmp_path, "slow", 1, models.slow())
    x = np.zeros((1, 1), np.float32)
    with (
        serve(tmp_path, {"grpc_carrier": carrier}) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        method = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        body = message("slow", x).SerializeToString()
        method(body, timeout=30)
        first = method.future(body, timeout=30)
        waiting = [method.future(body, timeout=30) for _ in range(5)]
        first.result()

        assert server.stop() == 0

        assert [len(one.result()) > 0 for one in waiting] == [True] * 5


# -- the other calls


def test_the_server_tells_about_itself_and_its_models(channel: grpc.Channel) -> None:
    """Health, metadata, configuration and statistics: what HTTP says, as messages."""
    about = call(channel, "ServerMetadata")
    model = call(channel, "ModelMetadata", pb.ModelMetadataRequest(name="counted"))
    config = call(channel, "ModelConfig", pb.ModelConfigRequest(name="pair")).config
    call(channel, "ModelInfer", message("counted", np.zeros(1, np.float32)))
    asked = pb.ModelStatisticsRequest(name="counted", version="10")
    (counts,) = call(channel, "ModelStatistics", asked).model_stats

    assert call(channel, "ServerLive").live
    assert call(channel, "ServerReady").ready
    assert call(channel, "ModelReady", pb.ModelReadyRequest(name="pair", version="1")).ready
    assert (about.name, about.version) == ("driftgate", __version__)
    assert "binary_tensor_data" in about.extensions
    assert (model.name, list(model.versions)) == ("counted", ["2", "10"])
    assert [(one.name, one.datatype, list(one.shape)) for one in model.inputs] == [
        ("x", "FP32", [-1])
    ]
    assert config.max_batch_size > 0
    assert [(one.name, list(one.dims)) for one in config.input] == [("a", [2]), ("b", [2])]
    assert config.input[0].data_type == pb.DataType.TYPE_FP32
    assert not config.model_transaction_policy.decoupled
    assert counts.inference_stats.success.count >= 1
    assert counts.inference_stats.HasField("cache_hit")


def test_metadata_is_what_http_says(server: Server, channel: grpc.Channel) -> None:
    """Statistics and configuration come from the same functions."""
    from google.protobuf.json_format import MessageToDict

    with server.client() as client:
        over_http = client.get("/v2/models/pair").json()
    given = call(channel, "ModelMetadata", pb.ModelMetadataRequest(name="pair"))

    written = MessageToDict(given, preserving_proto_field_name=True)
    for one in (*written["inputs"], *written["outputs"]):
        one["shape"] = [int(size) for size in one["shape"]]  # JSON of protobuf has int64 as text.
    assert written == over_http


def test_models_are_listed_unloaded_and_loaded(tmp_path: Path, carrier: str) -> None:
    """The repository calls do what the HTTP paths do."""
    models.put(tmp_path, "one", 1, models.constant(1))
    with (
        serve(tmp_path, {"grpc_carrier": carrier}) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        x = np.zeros(1, np.float32)
        (listed,) = call(channel, "RepositoryIndex").models
        call(channel, "RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="one"))
        unloaded = refused(channel, "ModelInfer", message("one", x))
        call(channel, "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="one"))

        assert (listed.name, listed.version, listed.state) == ("one", "1", "READY")
        assert unloaded.code() is grpc.StatusCode.UNAVAILABLE
        assert floats(call(channel, "ModelInfer", message("one", x)))[0] == 1.0


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("SystemSharedMemoryStatus", None),
        ("SystemSharedMemoryUnregister", None),
        ("CudaSharedMemoryStatus", None),
        ("CudaSharedMemoryUnregister", None),
        ("TraceSetting", None),
        ("LogSettings", None),
        ("SystemSharedMemoryRegister", "UNIMPLEMENTED"),
        ("CudaSharedMemoryRegister", "UNIMPLEMENTED"),
        ("ModelReady", "NOT_FOUND"),
        ("ModelMetadata", "NOT_FOUND"),
        ("ModelConfig", "NOT_FOUND"),
        ("RepositoryModelUnload", "NOT_FOUND"),
    ],
)
def test_empty_questions_have_the_answers_that_clients_rely_on(
    channel: grpc.Channel, name: str, status: str | None
) -> None:
    """Load generators first drop every shared region; nothing is there, and that is no error."""
    if status is None:
        assert call(channel, name) == getattr(pb, f"{name}Response")()
    else:
        assert refused(channel, name).code().name == status


def test_every_call_of_the_protocol_is_there(channel: grpc.Channel) -> None:
    """What the description lists is answered: none says that it is unknown."""
    described = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name

    for name in described:
        try:
            channel.unary_unary(f"/{SERVICE}/{name}")(b"", timeout=20)
        except grpc.RpcError as error:
            assert error.details() != "Method not found!", name  # noqa: PT017  some must fail
    assert len(described) == 20


def health_watch(channel: grpc.Channel, name: str = "") -> Any:
    watch = channel.unary_stream(
        f"/{HEALTH}/Watch", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    return watch(health_pb2.HealthCheckRequest(service=name).SerializeToString(), timeout=30)


def test_health_is_asked_in_the_standard_way(channel: grpc.Channel) -> None:
    """Check of the whole, of the service, and of one that is not here; Watch says it at once."""
    check = channel.unary_unary(
        f"/{HEALTH}/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    status = health_pb2.HealthCheckResponse

    for name in ("", SERVICE):
        assert check(health_pb2.HealthCheckRequest(service=name)).status == status.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        check(health_pb2.HealthCheckRequest(service="other"))
    unknown = health_watch(channel, "other")

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert next(unknown).status == status.SERVICE_UNKNOWN
    unknown.cancel()


@pytest.mark.parametrize("release", ["v1", "v1alpha"])
def test_reflection_gives_the_description_of_the_service(
    channel: grpc.Channel, release: str
) -> None:
    """Tools such as grpcurl need no file to call a server."""
    ask = channel.stream_stream(
        f"/grpc.reflection.{release}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such"),
    ]

    listed, found, missing = ask(iter(questions), timeout=20)

    assert SERVICE in [one.name for one in listed.list_services_response.service]
    assert b"ModelStreamInfer" in found.file_descriptor_response.file_descriptor_proto[0]
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


# -- bad input


def test_no_lie_of_a_message_is_the_server_s_fault(server: Server, channel: grpc.Channel) -> None:
    """Mutated messages of every call: a refusal in 5 s, never INTERNAL, UNKNOWN or an end.

    One that says how long it may take, in microseconds, may be told that this was too short.
    """
    chance = random.Random(11)
    whole = wide([1, 2], id="a", model_version="1")
    whole.parameters["timeout"].int64_param = 1000
    whole.outputs.add(name="y")
    body = whole.SerializeToString()
    names = list(pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
    codes, slowest_s = set(), 0.0
    for k in range(400):
        mutated = bytearray(body)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(mutated))
            mutated[at : at + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 3))
            mutated = mutated or bytearray(b"\0")
        name = names[k % len(names)] if k % 4 == 0 else "ModelInfer"
        began = time.monotonic()
        try:
            channel.unary_unary(f"/{SERVICE}/{name}")(bytes(mutated), timeout=20)
        except grpc.RpcError as error:
            codes.add(error.code().name)
        slowest_s = max(slowest_s, time.monotonic() - began)
    answers = stream(channel)(iter([wide([1])] * 2), timeout=20)

    assert codes <= {
        "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "UNAVAILABLE", "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED",
    }  # fmt: skip
    assert slowest_s < 5
    assert "INVALID_ARGUMENT" in codes
    assert len(list(answers)) == 2
    assert server.process.poll() is None


def test_messages_that_are_none_are_answered_in_a_stream_too(channel: grpc.Channel) -> None:
    """What cannot be read has an answer of its own, and the stream goes on."""
    raw = channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )

    bad, good = raw(iter([b"\xff\xff", wide([1]).SerializeToString()]), timeout=20)

    assert bad.error_message == "the message is no ModelInferRequest"
    assert good.error_message == ""


@pytest.mark.parametrize("unit", [b"\x2a\x00", b"\x3a\x00", b"\x2a\x04\x2a\x02\x42\x00"])
def test_a_message_made_to_grow_costs_neither_memory_nor_time(
    server: Server, channel: grpc.Channel, unit: bytes
) -> None:
    """60 MB of tensors of nothing: refused within 5 s and 512 MiB."""
    bomb = unit * (60_000_000 // len(unit))
    before = peak_bytes(server)

    began = time.monotonic()
    error = refused(channel, "ModelInfer", bomb)

    assert error.code().name in {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}
    assert time.monotonic() - began < 5
    assert peak_bytes(server) - before < 512 << 20


# -- ports and certificates


def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path: Path, carrier: str) -> None:
    """Before anything has started; the line names the flag."""
    models.put(tmp_path, "one", 1, models.constant(1))
    with serve(tmp_path, {"grpc_carrier": carrier}) as server:
        taken = address(server).rpartition(":")[2]
        ended = driftgate("serve", str(tmp_path), "--port", "0", "--grpc-port", taken)

    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "--grpc-port" in ended.stderr
    assert taken in ended.stderr


def test_without_grpc_nothing_listens(tmp_path: Path) -> None:
    """--no-grpc leaves the port alone, and the ready line does not name one."""
    models.put(tmp_path, "one", 1, models.constant(1))
    port = free_port()
    with serve(tmp_path, {"grpc_port": port}, flags=("--port", "0", "--no-grpc")) as server:
        ready = server.wait_for("ready")
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(f"/{SERVICE}/ServerLive")(b"", timeout=5)

    assert "grpc_url" not in ready
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("this machine has no openssl command to make a certificate with")
    directory = tmp_path_factory.mktemp("tls")
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", cert,
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True, env=environment(),
    )  # fmt: skip
    return cert, key


def test_both_listeners_speak_tls_and_nothing_else(
    tmp_path: Path, certificate: tuple[Path, Path], carrier: str
) -> None:
    """The same two files; who does not trust the certificate, or speaks plainly, gets nothing."""
    cert, key = certificate
    models.put(tmp_path, "wide", 1, models.identity("FP32", ("n", "k")))
    trusted = grpc.ssl_channel_credentials(cert.read_bytes())
    with serve(tmp_path, {"tls_cert": cert, "tls_key": key, "grpc_carrier": carrier}) as server:
        with grpc.secure_channel(address(server), trusted) as channel:
            answer = call(channel, "ModelInfer", wide([3]))
        with grpc.insecure_channel(address(server)) as channel:
            plain = refused(channel, "ServerLive", timeout=5)
        import ssl

        context = ssl.create_default_context(cafile=str(cert))
        with server.client(verify=context) as client:
            live = client.get("/v2/health/live")
        port = server.url.rpartition(":")[2]
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/v2/health/live", trust_env=False)

    assert floats(answer).tolist() == [[3]]
    assert plain.code() is grpc.StatusCode.UNAVAILABLE
    assert (server.url[:8], live.json()) == ("https://", {"live": True})


def test_a_certificate_that_is_none_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """Missing, half given, or not a certificate."""
    models.put(tmp_path, "one", 1, models.constant(1))
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for settings, says in (
        ({"tls_cert": text}, "give both"),
        ({"tls_cert": text, "tls_key": tmp_path / "none.pem"}, "no such file"),
        ({"tls_cert": text, "tls_key": text}, "PEM"),
    ):
        ended = driftgate("serve", str(tmp_path), "--port", "0", settings=settings)

        assert ended.returncode == 2, ended.stderr
        assert len(ended.stderr.splitlines()) == 1
        assert says in ended.stderr


def test_many_clients_at_once_get_their_own_answers(server: Server) -> None:
    """Rows that share a batch do not get mixed up."""
    wrong: list[Any] = []

    def client(start: int) -> None:
        with grpc.insecure_channel(address(server), [("grpc.use_local_subchannel_pool", 1)]) as own:
            for k in range(start, start + 25):
                got = floats(call(own, "ModelInfer", wide([k, -k])))
                if got.tolist() != [[k, -k]]:
                    wrong.append((k, got))

    threads = [threading.Thread(target=client, args=(1000 * k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
