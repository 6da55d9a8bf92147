"""Triton's Python client over HTTP: gevent and asyncio, JSON and binary tensors."""

import asyncio
import json

import ml_dtypes
import numpy as np
import pytest
import tensors
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from deadline import wait_until
from tritonclient.utils import InferenceServerException


@pytest.fixture
def client(address):
    with triton.InferenceServerClient(address, concurrency=4) as opened:
        yield opened


def tensor(name, kind, array, *, is_binary=True):
    given = triton.InferInput(name, list(array.shape), kind)
    given.set_data_from_numpy(array, binary_data=is_binary)
    return given


def matrix(rows=2, *, is_binary=True):
    values = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
    return values, [tensor("x", "FP32", values, is_binary=is_binary)]


# -- tensors


@pytest.mark.parametrize("is_output_binary", [True, False], ids=["to-binary", "to-json"])
@pytest.mark.parametrize("is_binary", [True, False], ids=["from-binary", "from-json"])
@pytest.mark.parametrize("kind", tensors.KINDS)
def test_every_datatype_comes_back_as_it_was_sent(client, kind, is_binary, is_output_binary):
    """Values at the ends of each range, through either encoding in either direction."""
    # JSON has no NaN: answers write null, which is another case below.
    sent = tensors.array(kind, is_finite=not (is_binary and is_output_binary))
    wanted = [triton.InferRequestedOutput("y", binary_data=is_output_binary)]

    result = client.infer(
        f"same-{kind}", [tensor("x", kind, sent, is_binary=is_binary)], outputs=wanted
    )

    tensors.assert_same(result.as_numpy("y"), sent)
    assert ("parameters" in result.get_output("y")) == is_output_binary


@pytest.mark.parametrize("kind", tensors.FLOATS)
def test_nan_and_infinity_sent_bare_in_json_are_read(client, kind):
    """In JSON mode this client writes NaN and Infinity bare; the binary answer holds them."""
    sent = tensors.array(kind)
    wanted = [triton.InferRequestedOutput("y", binary_data=True)]

    result = client.infer(
        f"same-{kind}", [tensor("x", kind, sent, is_binary=False)], outputs=wanted
    )

    np.testing.assert_array_equal(result.as_numpy("y"), sent)


def test_nan_in_a_json_answer_reads_as_nan(client):
    """The answer's JSON says null, which the client makes NaN of."""
    sent = np.array([1.5, np.nan], dtype=np.float32)
    wanted = [triton.InferRequestedOutput("y", binary_data=False)]

    result = client.infer("same-FP32", [tensor("x", "FP32", sent)], outputs=wanted)

    np.testing.assert_array_equal(result.as_numpy("y"), sent)


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("kind", ["FP32", "BYTES", "INT64"])
def test_zero_rows_come_back_as_zero_rows(client, kind, is_binary):
    """An empty batch is legal, and in binary form nothing follows the JSON."""
    sent = tensors.array(kind)[:0]
    wanted = [triton.InferRequestedOutput("y", binary_data=is_binary)]

    result = client.infer(
        f"same-{kind}", [tensor("x", kind, sent, is_binary=is_binary)], outputs=wanted
    )

    assert result.as_numpy("y").shape == (0,)


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


def test_binary_and_json_tensors_mix_in_one_request_and_one_answer(client):
    """Raw parts follow in the order of the JSON list; the others stand in the JSON."""
    a = np.array([[5, 6]], dtype=np.float32)
    b = np.array([[1, 3]], dtype=np.float32)
    wanted = [
        triton.InferRequestedOutput("difference", binary_data=True),
        triton.InferRequestedOutput("sum", binary_data=False),
    ]

    result = client.infer(
        "pair",
        [tensor("b", "FP32", b, is_binary=False), tensor("a", "FP32", a)],
        outputs=wanted,
    )

    np.testing.assert_array_equal(result.as_numpy("sum"), a + b)
    np.testing.assert_array_equal(result.as_numpy("difference"), a - b)
    names = [output["name"] for output in result.get_response()["outputs"]]
    assert names == ["difference", "sum"]  # In the order asked for.


def test_several_datatypes_cross_in_one_request(client):
    """Texts of any length leave the numbers behind them unaligned, which must not matter."""
    amount = np.array([1.5, 2.5, -3], dtype=np.float32)
    count = np.array([1, 2**62, -5], dtype=np.int64)
    place = np.array([b"a", "Zürich".encode(), b""], dtype=object)

    result = client.infer(
        "mixed",
        [
            tensor("place", "BYTES", place),
            tensor("count", "INT64", count),
            tensor("amount", "FP32", amount),
        ],
    )

    np.testing.assert_array_equal(result.as_numpy("twice"), amount * 2)
    np.testing.assert_array_equal(result.as_numpy("n_seen"), count)
    tensors.assert_same(result.as_numpy("where"), place)


# -- compression


@pytest.mark.parametrize("answer_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
def test_compression_works_both_ways(client, coding, answer_coding, is_binary):
    """The whole body is packed, JSON and tensors; the length header counts what is unpacked."""
    values, inputs = matrix(2000, is_binary=is_binary)
    wanted = [triton.InferRequestedOutput("y", binary_data=is_binary)]

    result = client.infer(
        "matrix",
        inputs,
        outputs=wanted,
        request_compression_algorithm=coding,
        response_compression_algorithm=answer_coding,
    )

    np.testing.assert_array_equal(result.as_numpy("y"), values)


# -- options of a request


def test_the_id_is_echoed_and_the_version_named(client):
    """Clients match answers by id."""
    _, inputs = matrix()
    response = client.infer("matrix", inputs, request_id="r-17").get_response()

    assert (response["id"], response["model_name"], response["model_version"]) == (
        "r-17", "matrix", "1",
    )  # fmt: skip


@pytest.mark.parametrize("version", ["", "2", "9", "10"])
def test_a_version_is_asked_for_by_number(client, version):
    """Without one the highest number answers: 10, not 9."""
    sent = np.zeros(1, dtype=np.float32)

    result = client.infer("counted", [tensor("x", "FP32", sent)], model_version=version)

    assert result.as_numpy("y")[0] == float(version or 10)


def test_sequence_priority_timeout_and_own_parameters_are_tolerated(client):
    """Options that a stateless model has no use for are no reason to refuse."""
    values, inputs = matrix()

    result = client.infer(
        "matrix", inputs, sequence_id=7, sequence_start=True, sequence_end=True, priority=1,
        timeout=5_000_000, headers={"x-own": "1"}, parameters={"tenant": "blue", "trace": True},
    )  # fmt: skip

    np.testing.assert_array_equal(result.as_numpy("y"), values)


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
def test_classification_gives_the_highest_values_with_their_index(client, is_binary):
    """`value:index` with six decimals, highest first, capped at the number of classes."""
    values = np.array([[0.25, 4, -1], [9, 8, 7]], dtype=np.float32)
    for count, n in ((2, 2), (50, 3)):
        wanted = [triton.InferRequestedOutput("y", binary_data=is_binary, class_count=count)]
        got = client.infer("matrix", [tensor("x", "FP32", values)], outputs=wanted).as_numpy("y")
        texts = [[x.decode() if isinstance(x, bytes) else x for x in row] for row in got]
        order = np.argsort(-values, axis=1)[:, :n]
        assert texts == [
            [f"{values[row, k]:f}:{k}" for k in order[row]] for row in range(len(values))
        ]


def test_many_calls_at_once_get_their_own_answers(client):
    """`async_infer` runs in greenlets over several connections."""
    arrays = [np.full((1, 3), k, dtype=np.float32) for k in range(32)]
    waiting = [client.async_infer("matrix", [tensor("x", "FP32", array)]) for array in arrays]

    for array, call in zip(arrays, waiting, strict=True):
        np.testing.assert_array_equal(call.get_result().as_numpy("y"), array)


def test_a_body_made_offline_is_read_and_its_answer_parsed_offline(address):
    """Requests made and answers parsed without the client's own transport."""
    import urllib3

    values, inputs = matrix()
    body, json_length = triton.InferenceServerClient.generate_request_body(inputs)
    headers = {} if json_length is None else {"Inference-Header-Content-Length": str(json_length)}

    got = urllib3.request(
        "POST", f"http://{address}/v2/models/matrix/infer", body=body, headers=headers
    )
    length = got.headers.get("Inference-Header-Content-Length")
    result = triton.InferenceServerClient.parse_response_body(
        got.data, header_length=None if length is None else int(length)
    )

    np.testing.assert_array_equal(result.as_numpy("y"), values)


# -- about the server


def test_health_and_readiness_answer_per_version(client):
    """The client reads the status alone."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("counted")
    assert client.is_model_ready("counted", "9")
    assert not client.is_model_ready("counted", "3")
    assert not client.is_model_ready("nobody")


def test_metadata_names_tensors_and_versions(client):
    """Versions are text, in order of their numbers; free axes are -1."""
    about = client.get_model_metadata("counted")

    assert about["versions"] == ["2", "9", "10"]
    assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]


def test_server_metadata_announces_what_these_tests_use(client):
    """Clients decide by this list what they may send."""
    about = client.get_server_metadata()

    assert about["name"] == "driftgate"
    assert {
        "classification", "model_repository", "model_configuration", "binary_tensor_data",
        "statistics",
    } <= set(about["extensions"])  # fmt: skip
    for absent in ("cuda_shared_memory", "sequence"):
        assert absent not in about["extensions"]


@pytest.mark.parametrize("model", ["matrix", "pair", "mixed", "vector", "scalar"])
def test_config_and_metadata_agree_about_the_row_axis(client, model):
    """max_batch_size > 0 if and only if metadata shapes start with a -1 that dims lack."""
    config, about = client.get_model_config(model), client.get_model_metadata(model)

    assert config["name"] == model
    assert config["model_transaction_policy"]["decoupled"] is False
    for part in ("input", "output"):
        for ours, theirs in zip(config[part], about[part + "s"], strict=True):
            dims = [int(size) for size in ours["dims"]]
            rows = [-1] if config["max_batch_size"] > 0 else []
            assert ours["name"] == theirs["name"]
            assert rows + dims == theirs["shape"] or (theirs["shape"] == [] and dims == [1])
            assert ours["data_type"] == "TYPE_" + theirs["datatype"].replace("BYTES", "STRING")


def test_statistics_count_requests_rows_and_failures(client):
    """Numbers, not texts; success counts requests and inference_count rows."""

    def now():
        (one,) = client.get_inference_statistics("matrix", "1")["model_stats"]
        return one

    before = now()
    _, inputs = matrix(5)
    client.infer("matrix", inputs)
    wrong = [tensor("x", "FP32", np.zeros((1, 4), np.float32))]
    with pytest.raises(InferenceServerException):
        client.infer("matrix", wrong)
    after = now()

    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 1
    for name, by in (("success", 1), ("fail", 1)):
        gone = [at["inference_stats"][name]["count"] for at in (before, after)]
        assert gone[1] - gone[0] == by, name
    for name in (
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
        "cache_hit", "cache_miss",
    ):  # fmt: skip
        assert {type(after["inference_stats"][name][part]) for part in ("count", "ns")} == {int}
    assert after["last_inference"] > before["last_inference"] - 1
    every = client.get_inference_statistics()["model_stats"]
    assert {"matrix", "counted"} <= {one["name"] for one in every}


def test_a_model_is_unloaded_and_loaded_again(client):
    """The index tells the state; an unloaded model answers no more, a loaded one does."""

    def state(name):
        found = [one for one in client.get_model_repository_index() if one["name"] == name]
        return {one.get("state") for one in found}

    sent = [tensor("x", "FP32", np.zeros(1, np.float32))]
    assert state("spare") == {"READY"}
    client.unload_model("spare")
    try:
        wait_until(lambda: state("spare") == {"UNAVAILABLE"}, "spare is unavailable")
        assert not client.is_model_ready("spare")
        with pytest.raises(InferenceServerException):
            client.infer("spare", sent)
    finally:
        client.load_model("spare")
    wait_until(lambda: client.is_model_ready("spare"), "spare is ready")
    assert client.infer("spare", sent).as_numpy("y")[0] == 1


def test_loading_what_is_not_there_is_an_error_with_a_name(client):
    """A client of the repository API learns which name was wrong."""
    with pytest.raises(InferenceServerException, match="nobody"):
        client.load_model("nobody")


def test_shared_memory_is_refused_in_words(client):
    """It is not built and not announced; the sentence comes in the protocol's error shape."""
    with pytest.raises(InferenceServerException) as caught:
        client.register_system_shared_memory("region", "/key", 64)
    assert caught.value.status() in ("404", "501")

    given = triton.InferInput("x", [1, 3], "FP32")
    given.set_shared_memory("region", 12)
    with pytest.raises(InferenceServerException, match="shared memory") as caught:
        client.infer("matrix", [given])
    assert caught.value.status() in ("400", "501")


# -- errors


WRONG = {
    "shape": ("matrix", np.zeros((2, 4), np.float32), "FP32", "400", "[-1, 3]"),
    "datatype": ("matrix", np.zeros((2, 3), np.float64), "FP64", "400", "is FP32"),
    "model": ("matrx", np.zeros((2, 3), np.float32), "FP32", "404", "did you mean 'matrix'"),
}


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("case", WRONG)
def test_an_error_carries_our_sentence_and_status(client, case, is_binary):
    """The client shows the text of `error`, and the HTTP status."""
    model, array, kind, status, words = WRONG[case]

    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [tensor("x", kind, array, is_binary=is_binary)])

    assert caught.value.status() == status
    assert words in caught.value.message()


def test_an_unknown_version_and_an_unknown_output_are_named(client):
    """404 for the one, 400 for the other."""
    _, inputs = matrix()
    with pytest.raises(InferenceServerException, match="no version '7'") as caught:
        client.infer("matrix", inputs, model_version="7")
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match="no output 'z'") as caught:
        client.infer("matrix", inputs, outputs=[triton.InferRequestedOutput("z")])
    assert caught.value.status() == "400"


def test_a_raw_part_that_is_too_short_is_refused(client):
    """A size that does not fit shape and datatype is the client's error."""
    given = triton.InferInput("x", [2, 3], "FP32")
    given.set_data_from_numpy(np.zeros((2, 3), np.float32))
    given._shape = [3, 3]

    with pytest.raises(InferenceServerException) as caught:
        client.infer("matrix", [given])

    assert caught.value.status() == "400"


# -- asyncio


def test_the_asyncio_client_does_the_same(address):
    """aiohttp with its own unpacking switched off: both codings, many calls at once."""

    async def run():
        async with triton_aio.InferenceServerClient(address) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("matrix", "1")
            for coding in (None, "gzip", "deflate"):
                values, inputs = matrix(2000)
                result = await client.infer(
                    "matrix",
                    inputs,
                    request_compression_algorithm=coding,
                    response_compression_algorithm=coding,
                )
                np.testing.assert_array_equal(result.as_numpy("y"), values)

            async def one(k):
                sent = np.full((1, 3), k, np.float32)
                result = await client.infer("matrix", [tensor("x", "FP32", sent)])
                return float(result.as_numpy("y")[0, 0])

            assert await asyncio.gather(*map(one, range(32))) == list(range(32))
            wrong = [tensor("x", "FP32", np.zeros((1, 4), np.float32))]
            with pytest.raises(InferenceServerException, match="shape"):
                await client.infer("matrix", wrong)
            index = await client.get_model_repository_index()
            assert "matrix" in {one["name"] for one in index}
            stats = await client.get_inference_statistics("matrix")
            assert stats["model_stats"][0]["version"] == "1"
            config = await client.get_model_config("matrix")
            assert json.dumps(config)

    asyncio.run(run())
