"""KServe's SDK: its REST client with v1 and v2, and its gRPC client."""

import asyncio

import grpc
import httpx
import numpy as np
import pytest
import tensors
from kserve import (
    InferenceGRPCClient,
    InferenceRESTClient,
    InferInput,
    InferRequest,
    RESTConfig,
)
from kserve.protocol.infer_type import RequestedOutput


def rest(protocol):
    return InferenceRESTClient(RESTConfig(protocol=protocol))


def request(model, *arrays, is_binary=True, **more):
    """An infer request of (name, datatype, array)."""
    inputs = []
    for name, kind, array in arrays:
        given = InferInput(name, list(array.shape), kind)
        given.set_data_from_numpy(array, binary_data=is_binary)
        inputs.append(given)
    return InferRequest(model, inputs, **more)


def rows(n=2):
    return np.arange(3 * n, dtype=np.float32).reshape(n, 3)


# -- v2


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("kind", tensors.KINDS)
def test_every_datatype_comes_back_over_v2(url, kind, is_binary):
    """Each way in; the answer in the way the request asked for."""
    if kind == "FP16" and not is_binary:
        pytest.skip("this client does not write FP16 as JSON")
    sent = tensors.array(kind, is_finite=True)
    outputs = [RequestedOutput("y", {"binary_data": is_binary})]

    async def run():
        body = request(f"same-{kind}", ("x", kind, sent), is_binary=is_binary,
                       request_outputs=outputs)  # fmt: skip
        return await rest("v2").infer(url, body, model_name=f"same-{kind}")

    tensors.assert_same(asyncio.run(run()).outputs[0].as_numpy(), sent)


def test_v2_health_and_readiness_are_read_from_json_bodies(url):
    """This client calls `.json()` on health, and reads `live` and `ready`."""

    async def run():
        client = rest("v2")
        assert await client.is_server_live(url) is True
        assert await client.is_server_ready(url) is True
        assert await client.is_model_ready(url, "matrix") is True
        assert await client.is_model_ready(url, "nobody") is False

    asyncio.run(run())


def test_v2_errors_show_our_sentence(url):
    """It shows the text of `error` in an HTTPStatusError."""

    async def run():
        body = request("matrix", ("x", "FP32", np.zeros((1, 4), np.float32)))
        await rest("v2").infer(url, body, model_name="matrix")

    with pytest.raises(httpx.HTTPStatusError, match=r"shape \[-1, 3\]") as caught:
        asyncio.run(run())
    assert caught.value.response.status_code == 400


def test_v2_without_outputs_answers_all_with_the_id(url):
    """An answer names model and id; its version this client does not keep."""

    async def run():
        a, b = np.ones((1, 2), np.float32), np.full((1, 2), 3, np.float32)
        body = request("pair", ("a", "FP32", a), ("b", "FP32", b), request_id="r-1")
        return await rest("v2").infer(url, body, model_name="pair")

    answer = asyncio.run(run())

    assert (answer.id, answer.model_name) == ("r-1", "pair")
    assert [output.name for output in answer.outputs] == ["sum", "difference"]
    np.testing.assert_array_equal(answer.outputs[0].as_numpy(), [[4, 4]])


# -- v1


def test_v1_predicts_from_instances(url):
    """Bare rows for one input, objects for several."""

    async def run():
        client = rest("v1")
        sent = rows().tolist()
        one = await client.infer(url, {"instances": sent}, model_name="matrix")
        assert one == {"predictions": sent}
        several = await client.infer(
            url,
            {"instances": [{"amount": 1.5, "count": 3, "place": "Zürich"}]},
            model_name="mixed",
        )
        assert several == {"predictions": [{"twice": 3.0, "where": "Zürich", "n_seen": 3}]}

    asyncio.run(run())


def test_v1_liveness_and_readiness(url):
    """GET / says alive; GET /v1/models/{m} says ready."""

    async def run():
        client = rest("v1")
        assert await client.is_server_live(url) is True
        assert await client.is_model_ready(url, "matrix") is True
        with pytest.raises(httpx.HTTPStatusError, match="nobody"):
            await client.is_model_ready(url, "nobody")

    asyncio.run(run())


def test_v1_errors_show_our_sentence(url):
    """The same sentence as over v2."""
    with pytest.raises(httpx.HTTPStatusError, match="no model 'matrx' here; did you mean"):
        asyncio.run(rest("v1").infer(url, {"instances": [1]}, model_name="matrx"))


# -- gRPC


def grpc_run(address, work):
    async def run():
        async with InferenceGRPCClient(address) as client:
            return await work(client)

    return asyncio.run(run())


@pytest.mark.parametrize("is_binary", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("kind", tensors.KINDS)
def test_every_datatype_comes_back_over_grpc(grpc_address, kind, is_binary):
    """Raw and typed contents in; this client reads either in answers."""
    if kind == "FP16" and not is_binary:
        pytest.skip("the protocol has no typed contents for FP16")
    sent = tensors.array(kind)

    answer = grpc_run(
        grpc_address,
        lambda client: client.infer(
            request(f"same-{kind}", ("x", kind, sent), is_binary=is_binary)
        ),
    )

    tensors.assert_same(answer.outputs[0].as_numpy(), sent)


def test_grpc_health_and_readiness(grpc_address):
    """Server and model, ready and unknown."""

    async def work(client):
        assert await client.is_server_live() is True
        assert await client.is_server_ready() is True
        assert await client.is_model_ready("matrix") is True

    grpc_run(grpc_address, work)


def test_grpc_errors_show_our_sentence(grpc_address):
    """The code is INVALID_ARGUMENT, the details are the sentence."""

    async def work(client):
        await client.infer(request("matrix", ("x", "FP32", np.zeros((1, 4), np.float32))))

    with pytest.raises(grpc.RpcError) as caught:
        grpc_run(grpc_address, work)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "shape [-1, 3]" in caught.value.details()
