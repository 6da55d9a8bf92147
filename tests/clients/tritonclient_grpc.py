"""Triton's Python client over gRPC: unary and streaming, sync and asyncio."""

import asyncio
import queue

import grpc
import ml_dtypes
import numpy as np
import pytest
import tensors
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from deadline import wait_until
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

ANSWER_S_MAX = 10


@pytest.fixture
def client(grpc_address):
    with triton.InferenceServerClient(grpc_address) as opened:
        yield opened


@pytest.fixture
def stub(grpc_address):
    with grpc.insecure_channel(grpc_address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name, kind, array):
    given = triton.InferInput(name, list(array.shape), kind)
    given.set_data_from_numpy(array)
    return given


def matrix(rows=2):
    values = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    return values, [tensor("x", "FP32", values)]


def slow_rows(n=1):
    return [tensor("x", "FP32", np.ones((n, 1), np.float32))]


# -- tensors


@pytest.mark.parametrize("kind", tensors.KINDS)
def test_every_datatype_comes_back_as_it_was_sent(client, kind):
    """Raw contents carry every bit, NaN and infinities too."""
    sent = tensors.array(kind)

    result = client.infer(f"same-{kind}", [tensor("x", kind, sent)])

    tensors.assert_same(result.as_numpy("y"), sent)


TYPED = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents",
    "INT32": "int_contents", "INT64": "int64_contents", "UINT8": "uint_contents",
    "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPED)
def test_typed_contents_are_read_and_answered_raw(stub, kind):
    """This client's as_numpy can read raw answers only, whatever the request held."""
    sent = tensors.array(kind)
    request = service_pb2.ModelInferRequest(model_name=f"same-{kind}")
    given = request.inputs.add(name="x", datatype=kind, shape=sent.shape)
    getattr(given.contents, TYPED[kind]).extend(sent.tolist())

    answer = stub.ModelInfer(request)

    assert len(answer.raw_output_contents) == 1
    assert not answer.outputs[0].HasField("contents")
    tensors.assert_same(triton.InferResult(answer).as_numpy("y"), sent)


@pytest.mark.parametrize("kind", ["FP32", "BYTES"])
def test_zero_rows_come_back_as_zero_rows(client, kind):
    """An empty raw part is still a part."""
    sent = tensors.array(kind)[:0]

    assert client.infer(f"same-{kind}", [tensor("x", kind, sent)]).as_numpy("y").shape == (0,)


def test_bf16_comes_back_as_it_was_sent(client):
    """The client takes and gives arrays of ml_dtypes; only raw tensors can hold them."""
    sent = np.array([[1], [-0.0], [np.inf], [3.389e38]], dtype=ml_dtypes.bfloat16)
    ones = np.ones(sent.shape, np.float32)

    result = client.infer("half", [tensor("b", "BF16", sent), tensor("f", "FP32", ones)])

    assert result.as_numpy("same").tobytes() == sent.tobytes()
    np.testing.assert_array_equal(result.as_numpy("sum"), sent.astype(np.float32) + 1)


def test_a_scalar_has_no_axes(client):
    """Rank 0 stays rank 0."""
    sent = np.array(1.25, dtype=np.float32)

    got = client.infer("scalar", [tensor("x", "FP32", sent)]).as_numpy("y")

    assert (got.shape, float(got)) == ((), 2.5)


def test_several_inputs_and_the_outputs_asked_for_in_their_order(client):
    """Inputs in any order; outputs in the order asked for."""
    a, b = np.array([[5, 6]], dtype=np.float32), np.array([[1, 3]], dtype=np.float32)
    wanted = [triton.InferRequestedOutput(name) for name in ("difference", "sum")]

    result = client.infer("pair", [tensor("b", "FP32", b), tensor("a", "FP32", a)], outputs=wanted)

    np.testing.assert_array_equal(result.as_numpy("sum"), a + b)
    np.testing.assert_array_equal(result.as_numpy("difference"), a - b)
    assert [output.name for output in result.get_response().outputs] == ["difference", "sum"]


def test_a_message_beyond_grpcs_own_default_passes(client):
    """Servers of this protocol lift the limit of 4 MiB that grpcio starts with."""
    text = np.array([b"x" * 1_000_000] * 6, dtype=object)

    got = client.infer("same-BYTES", [tensor("x", "BYTES", text)]).as_numpy("y")

    tensors.assert_same(got, text)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression_is_a_matter_of_the_call(client, coding):
    """The client packs its message; the answer comes back readable."""
    values, inputs = matrix(2000)

    result = client.infer("matrix", inputs, compression_algorithm=coding)

    np.testing.assert_array_equal(result.as_numpy("y"), values)


def test_the_id_is_echoed_and_the_version_named(client):
    """Clients match answers by id."""
    _, inputs = matrix()
    response = client.infer("matrix", inputs, request_id="r-17").get_response()

    assert (response.id, response.model_name, response.model_version) == ("r-17", "matrix", "1")


@pytest.mark.parametrize("version", ["", "2", "9", "10"])
def test_a_version_is_asked_for_by_number(client, version):
    """Without one the highest number answers: 10, not 9."""
    sent = np.zeros(1, dtype=np.float32)

    result = client.infer("counted", [tensor("x", "FP32", sent)], model_version=version)

    assert result.as_numpy("y")[0] == float(version or 10)


def test_sequence_priority_timeout_and_own_parameters_are_tolerated(client):
    """priority comes as uint64_param, a fraction as double_param: kinds that Triton added."""
    values, inputs = matrix()

    result = client.infer(
        "matrix", inputs, sequence_id=7, sequence_start=True, sequence_end=True, priority=1,
        timeout=5_000_000, headers={"x-own": "1"}, parameters={"tenant": "blue", "share": 0.5},
    )  # fmt: skip

    np.testing.assert_array_equal(result.as_numpy("y"), values)


def test_classification_gives_the_highest_values_with_their_index(client):
    """`value:index` with six decimals, highest first."""
    values = np.array([[0.25, 4, -1]], dtype=np.float32)
    wanted = [triton.InferRequestedOutput("y", class_count=2)]

    got = client.infer("matrix", [tensor("x", "FP32", values)], outputs=wanted).as_numpy("y")

    assert [bytes(x) for x in got[0]] == [b"4.000000:1", b"0.250000:0"]


# -- about the server


def test_health_and_readiness_answer_per_version(client):
    """Unknown models and versions are NOT_FOUND."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("counted")
    assert client.is_model_ready("counted", "9")
    for name, version in (("counted", "3"), ("nobody", "")):
        with pytest.raises(InferenceServerException) as caught:
            client.is_model_ready(name, version)
        assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_the_health_service_of_grpc_answers(grpc_address):
    """grpc.health.v1 is what orchestrators probe; SERVING is 1 in field 1."""
    with grpc.insecure_channel(grpc_address) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=ANSWER_S_MAX) == b"\x08\x01"


def test_metadata_config_and_index_name_the_models(client):
    """The same facts as over HTTP, in messages."""
    assert client.get_server_metadata().name == "driftgate"
    about = client.get_model_metadata("counted", as_json=True)
    assert about["versions"] == ["2", "9", "10"]
    assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1"]}]
    config = client.get_model_config("matrix").config
    assert config.name == "matrix"
    assert config.max_batch_size > 0
    assert [list(given.dims) for given in config.input] == [[3]]
    assert config.model_transaction_policy.decoupled is False
    index = client.get_model_repository_index(as_json=True)["models"]
    assert {"matrix", "counted"} <= {one["name"] for one in index}


def test_statistics_count_requests_and_rows(client):
    """success counts requests and inference_count rows."""

    def now():
        (one,) = client.get_inference_statistics("matrix", "1").model_stats
        return one.inference_count, one.inference_stats.success.count

    before = now()
    _, inputs = matrix(5)
    client.infer("matrix", inputs)
    rows, calls = now()

    assert (rows - before[0], calls - before[1]) == (5, 1)


def test_a_model_is_unloaded_and_loaded_again(client):
    """An unloaded model answers UNAVAILABLE, a loaded one answers."""
    sent = [tensor("x", "FP32", np.zeros(1, np.float32))]

    def status():
        try:
            client.infer("spare", sent)
        except InferenceServerException as error:
            return error.status()
        return "OK"

    client.unload_model("spare")
    try:
        wait_until(lambda: status() == "StatusCode.UNAVAILABLE", "spare stops answering")
    finally:
        client.load_model("spare")
    wait_until(lambda: status() == "OK", "spare answers again")


def test_shared_memory_has_no_regions_and_takes_none(client):
    """perf_analyzer drops all regions before it starts, and wants an answer to that."""
    assert not client.get_system_shared_memory_status().regions
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException, match="shared memory") as caught:
        client.register_system_shared_memory("region", "/key", 64)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


# -- errors, time and cancellation


@pytest.mark.parametrize(
    ("model", "version", "array", "kind", "status", "words"),
    [
        ("matrix", "", np.zeros((2, 4), np.float32), "FP32", "INVALID_ARGUMENT", "[-1, 3]"),
        ("matrix", "", np.zeros((2, 3), np.float64), "FP64", "INVALID_ARGUMENT", "is FP32"),
        ("matrx", "", np.zeros((2, 3), np.float32), "FP32", "NOT_FOUND", "mean 'matrix'"),
        ("matrix", "7", np.zeros((2, 3), np.float32), "FP32", "NOT_FOUND", "no version '7'"),
    ],
    ids=["shape", "datatype", "model", "version"],
)
def test_an_error_carries_our_sentence_and_status(
    client, model, version, array, kind, status, words
):
    """details are the sentence; the code is gRPC's own for the case."""
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [tensor("x", kind, array)], model_version=version)

    assert caught.value.status() == f"StatusCode.{status}"
    assert words in caught.value.message()


def test_a_deadline_of_the_client_ends_the_call(client):
    """`client_timeout` travels as the call's deadline."""
    with pytest.raises(InferenceServerException) as caught:
        client.infer("slow", slow_rows(), client_timeout=0.01)

    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert client.is_server_live()


def test_a_cancelled_call_ends_as_cancelled(client):
    """And the server answers the next one."""
    outcomes = queue.Queue()
    call = client.async_infer(
        "slow", slow_rows(), callback=lambda result, error: outcomes.put((result, error))
    )
    call.cancel()

    result, error = outcomes.get(timeout=ANSWER_S_MAX)

    assert result is None
    assert error.status() == "StatusCode.CANCELLED"
    assert client.is_model_ready("slow")


def test_many_calls_at_once_get_their_own_answers(client):
    """`async_infer` calls back from its own threads."""
    outcomes = queue.Queue()
    for k in range(32):
        client.async_infer(
            "matrix",
            [tensor("x", "FP32", np.full((1, 3), k, np.float32))],
            callback=lambda result, error: outcomes.put((result, error)),
            request_id=str(k),
        )

    for _ in range(32):
        result, error = outcomes.get(timeout=ANSWER_S_MAX)
        assert error is None
        assert float(result.as_numpy("y")[0, 0]) == float(result.get_response().id)


# -- streams


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_a_stream_answers_in_order_and_survives_a_wrong_request(client, coding):
    """An error goes to its own request; those behind it are answered."""
    outcomes = queue.Queue()
    client.start_stream(
        lambda result, error: outcomes.put((result, error)), compression_algorithm=coding
    )
    for k in range(20):
        width = 4 if k == 7 else 3
        rows = [tensor("x", "FP32", np.full((1, width), k, np.float32))]
        client.async_stream_infer("matrix", rows, request_id=str(k))

    got = [outcomes.get(timeout=ANSWER_S_MAX) for _ in range(20)]
    client.stop_stream()

    assert [k for k, (_, error) in enumerate(got) if error is not None] == [7]
    assert "[-1, 3]" in got[7][1].message()
    for k, (result, error) in enumerate(got):
        if error is None:
            assert result.get_response().id == str(k)
            assert float(result.as_numpy("y")[0, 0]) == k


def test_a_stream_marks_the_final_answer_when_asked(client):
    """A model of one answer sends one message, marked as final."""
    outcomes = queue.Queue()
    client.start_stream(lambda result, error: outcomes.put((result, error)))
    _, inputs = matrix()
    client.async_stream_infer("matrix", inputs, enable_empty_final_response=True)

    result, error = outcomes.get(timeout=ANSWER_S_MAX)
    client.stop_stream()

    assert error is None
    assert result.get_response().parameters["triton_final_response"].bool_param is True
    assert outcomes.empty()


def test_a_cancelled_stream_leaves_the_server_answering(client):
    """Dropping a stream with requests in it harms nobody else."""
    outcomes = queue.Queue()
    client.start_stream(lambda result, error: outcomes.put((result, error)))
    for _ in range(8):
        client.async_stream_infer("slow", slow_rows())
    client.stop_stream(cancel_requests=True)

    values, inputs = matrix()
    np.testing.assert_array_equal(client.infer("matrix", inputs).as_numpy("y"), values)


# -- asyncio


def test_the_asyncio_client_does_the_same(grpc_address):
    """Unary calls at once, compression, errors by status."""

    async def run():
        async with triton_aio.InferenceServerClient(grpc_address) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("matrix", "1")

            async def one(k):
                sent = np.full((1, 3), k, np.float32)
                result = await client.infer(
                    "matrix", [tensor("x", "FP32", sent)], compression_algorithm="gzip"
                )
                return float(result.as_numpy("y")[0, 0])

            assert await asyncio.gather(*map(one, range(32))) == list(range(32))
            with pytest.raises(InferenceServerException) as caught:
                await client.infer("nobody", matrix()[1])
            assert caught.value.status() == "StatusCode.NOT_FOUND"
            with pytest.raises(InferenceServerException) as caught:
                await client.infer("slow", slow_rows(), client_timeout=0.01)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"

    asyncio.run(run())


def test_the_asyncio_stream_gives_results_and_errors_in_order(grpc_address):
    """`stream_infer` takes an iterator of requests and is one of answers."""

    async def run():
        async def requests():
            for k in range(10):
                rows = np.full((1, 4 if k == 3 else 3), k, np.float32)
                yield {
                    "model_name": "matrix",
                    "inputs": [tensor("x", "FP32", rows)],
                    "request_id": str(k),
                }

        async with triton_aio.InferenceServerClient(grpc_address) as client:
            return [(result, error) async for result, error in client.stream_infer(requests())]

    got = asyncio.run(run())

    assert [k for k, (_, error) in enumerate(got) if error is not None] == [3]
    assert [result.get_response().id for result, _ in got if result is not None] == [
        str(k) for k in range(10) if k != 3
    ]
