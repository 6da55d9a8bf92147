"""The Python client: what it writes, how it reads, when it tries again, and what it raises."""

import asyncio
import inspect
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gateway import client, errors
from gateway.client import AsyncClient, Client, wire
from gateway.client.errors import ERRORS
from gateway.protocol import v2_json
from gateway.tensors import DTYPES

ANSWER = {
    "model_name": "m",
    "model_version": "7",
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [1.5]}],
}
X = np.zeros(1, np.float32)
Reply = httpx.Response | Exception


def scripted(*replies: Reply) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A server that gives these replies in turn, and what it was sent."""
    seen: list[httpx.Request] = []
    left = list(replies)

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        seen.append(request)
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    return httpx.MockTransport(answer), seen


def refusal(status: int, code: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": "a sentence", "code": code}, headers=headers)


def client_of(transport: httpx.MockTransport, **options: Any) -> Client:
    return Client("http://gate", transport=transport, **{"binary": False, **options})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have waited; nothing is waited for."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


# -- errors


def test_every_error_of_the_server_has_a_class_of_the_same_name() -> None:
    """Same code, status and place in the tree; `internal` is called ServerError here."""
    mine = {error.code: error for error in ERRORS}
    # Never sent, or by paths that this client does not use.
    others = {
        errors.ClientGoneError, errors.ModelNotNamedError, errors.IdleError,
        errors.LabelsOffError, errors.BreakerOpenError,
    }  # fmt: skip
    for theirs in set(errors.ALL) - others:
        here = mine[theirs.code]
        assert here.status == theirs.status or here is client.DeadlineError
        if theirs is not errors.GatewayError:
            assert here.__name__ == theirs.__name__
            above = theirs.__mro__[1].__name__
            assert above in {"GatewayError", here.__mro__[1].__name__}


def test_everything_that_is_raised_is_a_client_error() -> None:
    """One class to catch."""
    kinds = [getattr(client, name) for name in client.__all__ if name.endswith("Error")]

    assert len(kinds) >= len(ERRORS)
    assert all(issubclass(kind, client.ClientError) for kind in kinds)


@pytest.mark.parametrize(
    ("reply", "kind", "code"),
    [
        (refusal(404, "model_not_found"), client.ModelNotFoundError, "model_not_found"),
        (refusal(400, "newer_than_this_client"), client.BadRequestError, "newer_than_this_client"),
        (refusal(418, "teapot"), client.RefusedError, "teapot"),
        (refusal(502, "x"), client.ServerError, "x"),
        (httpx.Response(400, text="<html>"), client.BadRequestError, "bad_request"),
        (httpx.Response(302, headers={"location": "http://x"}), client.AnswerError, "bad_answer"),
        (httpx.Response(200, text="hello"), client.AnswerError, "bad_answer"),
        (httpx.Response(200, json={"outputs": 3}), client.AnswerError, "bad_answer"),
        (httpx.Response(200, json=[]), client.AnswerError, "bad_answer"),
    ],
)
def test_answers_become_errors_by_code_then_by_status(
    reply: httpx.Response, kind: type[client.ClientError], code: str
) -> None:
    """Codes of later releases and answers of other programs still have a class."""
    with client_of(scripted(reply)[0]) as gate, pytest.raises(kind) as raised:
        gate.predict("m", {"x": X})

    assert type(raised.value) is kind
    assert raised.value.code == code


# -- tries


def test_what_was_refused_for_now_is_sent_again_after_the_time_the_server_names(
    pauses: list[float],
) -> None:
    """429 and 503 were refused before any work; Retry-After is a lower bound of the pause."""
    full = refusal(429, "queue_full", **{"retry-after": "3"})
    transport, seen = scripted(full, refusal(503, "not_ready"), httpx.Response(200, json=ANSWER))

    with client_of(transport) as gate:
        answer = gate.predict("m", {"x": X})

    assert answer["y"].tolist() == [1.5]
    assert 3 <= pauses[0] <= 4
    assert 0 < pauses[1] < 0.2
    assert len({request.headers["x-request-id"] for request in seen}) == 1


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(pauses: list[float]) -> None:
    """The server's reason is worth more than a timeout later."""
    transport, seen = scripted(refusal(429, "queue_full", **{"retry-after": "60"}))

    with client_of(transport) as gate, pytest.raises(client.QueueFullError) as raised:
        gate.predict("m", {"x": X}, timeout_s=5)

    assert (pauses, len(seen), raised.value.retry_after_s) == ([], 1, 60)


@pytest.mark.parametrize("lost", [httpx.ConnectError("refused"), httpx.ReadError("reset")])
def test_a_lost_connection_is_tried_again_with_growing_pauses(
    lost: httpx.HTTPError, pauses: list[float]
) -> None:
    """Nothing was sent, or a prediction was, which changes nothing but counters."""
    transport, seen = scripted(lost, lost, lost, lost)

    with (
        client_of(transport, retries=3) as gate,
        pytest.raises(client.UnreachableError) as raised,
    ):
        gate.predict("m", {"x": X})

    assert len(seen) == 4
    assert isinstance(raised.value.__cause__, httpx.HTTPError | None)
    for k, pause_s in enumerate(pauses):
        assert 0.025 * 2**k <= pause_s <= 0.05 * 2**k


@pytest.mark.parametrize(
    "reply",
    [
        refusal(400, "bad_tensor"),
        refusal(404, "model_not_found"),
        refusal(413, "too_large"),
        refusal(500, "model_failed"),
        refusal(503, "version_refused"),
        refusal(504, "deadline_exceeded"),
        httpx.ReadTimeout("late"),
    ],
)
def test_what_would_fail_again_is_sent_once(reply: Reply, pauses: list[float]) -> None:
    """Refusals of the request itself, failures of the model, and time that is over."""
    transport, seen = scripted(reply)

    with client_of(transport) as gate, pytest.raises(client.ClientError):
        gate.predict("m", {"x": X})

    assert (len(seen), pauses) == (1, [])


def test_the_server_is_told_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One deadline over all tries: what pauses take is taken from the next try."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    full = refusal(429, "queue_full", **{"retry-after": "2"})
    transport, seen = scripted(full, httpx.Response(200, json=ANSWER))

    with client_of(transport) as gate:
        gate.predict("m", {"x": X}, timeout_s=10)

    first, second = (float(request.headers["x-request-timeout"]) for request in seen)
    assert first == 10
    assert 7.4 < second <= 8


def test_the_async_client_decides_as_the_sync_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same tries, same error, for the same replies."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    transport, seen = scripted(httpx.ConnectError("x"), refusal(404, "model_not_found"))

    async def ask() -> None:
        async with AsyncClient("http://gate", transport=transport, binary=False) as gate:
            await gate.predict("m", {"x": X})

    with pytest.raises(client.ModelNotFoundError):
        asyncio.run(ask())
    assert (len(seen), len(waited)) == (2, 1)


def test_both_clients_offer_the_same() -> None:
    """Every method and argument of one is the other's."""

    def offered(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in found
            if not name.startswith("_") and name not in {"close", "aclose"}
        }

    assert offered(Client) == offered(AsyncClient)
    assert set(offered(Client)) == {
        "predict", "predict_table", "models", "metadata", "is_ready", "drift",
        "alias", "promote", "rollback", "restore", "put_route", "history",
    }  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: Client("gate:8000"),
        lambda: Client("http://gate", timeout_s=0),
        lambda: Client("http://gate", timeout_s=float("nan")),
        lambda: Client("http://gate", retries=-1),
    ],
)
def test_a_client_that_could_never_work_is_refused_at_once(make: Callable[[], Client]) -> None:
    """Before a request fails in a stranger way."""
    with pytest.raises(ValueError, match="must"):
        make()


def test_an_id_that_would_break_a_header_is_refused() -> None:
    """A newline in a header would be a second header."""
    transport, seen = scripted()
    with client_of(transport) as gate, pytest.raises(ValueError, match="request_id"):
        gate.predict("m", {"x": X}, request_id="a\r\nb: c")
    assert seen == []


# -- formats

NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable())


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Any array of a datatype that numpy has."""
    kind = draw(st.sampled_from([kind for kind in DTYPES if kind != "BF16"]))
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    if kind == "BYTES":
        texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
        flat = draw(st.lists(texts, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        made: np.ndarray[Any, Any] = np.array(flat, dtype=np.object_).reshape(shape)
        return made
    return draw(arrays.arrays(DTYPES[kind], shape))


@given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=3))
def test_what_the_client_writes_as_json_is_what_the_server_reads(
    given_arrays: dict[str, np.ndarray[Any, Any]],
) -> None:
    """Every datatype, rank, NaN and infinity, through the server's own reader."""
    body, _ = wire.write_json(given_arrays, None, None)

    call = v2_json.decode(body)

    for tensor in call.inputs:
        sent = given_arrays[tensor.name]
        assert tensor.array.dtype == sent.dtype
        np.testing.assert_array_equal(tensor.array, sent)


@given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=3))
def test_binary_tensors_come_back_as_they_were_sent(
    given_arrays: dict[str, np.ndarray[Any, Any]],
) -> None:
    """A server that echoes: its answer has the same layout as a request."""
    body, headers = wire.write_binary(given_arrays, None, None)
    length = int(headers[wire.JSON_LENGTH])
    request = json.loads(body[:length])
    head = json.dumps(
        {"model_name": "m", "model_version": "1", "outputs": request["inputs"]}
    ).encode()

    answer = wire.read_answer(head + body[length:], {wire.JSON_LENGTH: str(len(head))}, "gate")

    for name, sent in given_arrays.items():
        assert answer[name].dtype == sent.dtype
        np.testing.assert_array_equal(answer[name], sent)


def test_binary_tensors_are_little_endian_whatever_the_array_is() -> None:
    """Bytes written down by hand, from big-endian, strided and text arrays."""
    given_arrays = {
        "big": np.array([1, 258], ">i4"),
        "strided": np.arange(4, dtype=np.int16)[::2],
        "text": np.array(["é", ""]),
    }

    body, headers = wire.write_binary(given_arrays, ["y"], "7")

    head = json.loads(body[: int(headers[wire.JSON_LENGTH])])
    assert [tensor["datatype"] for tensor in head["inputs"]] == ["INT32", "INT16", "BYTES"]
    assert head["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]
    assert body[int(headers[wire.JSON_LENGTH]) :] == (
        b"\x01\x00\x00\x00\x02\x01\x00\x00" + b"\x00\x00\x02\x00"
        + b"\x02\x00\x00\x00\xc3\xa9" + b"\x00\x00\x00\x00"
    )  # fmt: skip


def test_bfloat16_is_given_as_float32() -> None:
    """Its bits are the upper half of a float32's: 1.5 is 0x3FC0."""
    head = json.dumps({
        "model_name": "m", "model_version": "1",
        "outputs": [{"name": "y", "datatype": "BF16", "shape": [2],
                     "parameters": {"binary_data_size": 4}}],
    }).encode()  # fmt: skip

    body = head + struct.pack("<HH", 0x3FC0, 0xC000)
    answer = wire.read_answer(body, {wire.JSON_LENGTH: str(len(head))}, "gate")

    assert answer["y"].dtype == np.float32
    assert answer["y"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [3], "parameters": {"binary_data_size": 8}},
        {"shape": [2], "parameters": {"binary_data_size": 800}},
        {"shape": [2], "parameters": {"binary_data_size": -8}},
        {"shape": [2], "parameters": {"binary_data_size": "8"}},
        {"shape": [-3], "parameters": {"binary_data_size": 8}},
        {"shape": [2], "datatype": "COMPLEX", "parameters": {"binary_data_size": 8}},
        {"shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 8}},
        {"shape": [2]},
        {},
    ],
)
def test_an_answer_whose_sizes_lie_is_an_answer_error(lie: dict[str, Any]) -> None:
    """Never another exception, never an array of the wrong size."""
    tensor = {"name": "y", "datatype": "FP32", **lie}
    head = json.dumps({"model_name": "m", "model_version": "1", "outputs": [tensor]}).encode()
    body = head + b"\xff" * 8

    with pytest.raises(client.AnswerError):
        wire.read_answer(body, {wire.JSON_LENGTH: str(len(head))}, "gate")
    with pytest.raises(client.AnswerError):
        wire.read_answer(body, {wire.JSON_LENGTH: "10000"}, "gate")


def test_null_in_an_answer_is_nan() -> None:
    """What JSON cannot hold is written as null."""
    tensor = {"name": "y", "datatype": "FP32", "shape": [2], "data": [None, 1.0]}
    body = json.dumps({**ANSWER, "outputs": [tensor]}).encode()

    np.testing.assert_array_equal(wire.read_answer(body, {}, "gate")["y"], [np.nan, 1.0])


METADATA = {
    "name": "m",
    "versions": ["1"],
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 1]},
        {"name": "k", "datatype": "INT8", "shape": [-1]},
        {"name": "w", "datatype": "BYTES", "shape": [-1, 1]},
    ],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
}


def test_columns_and_lists_take_the_datatype_and_shape_of_the_input() -> None:
    """Float64 becomes FP32, a column becomes (n, 1) where the model has it so, None is NaN."""
    transport, seen = scripted(
        httpx.Response(200, json=METADATA),
        httpx.Response(200, json=ANSWER),
        httpx.Response(200, json=ANSWER),
    )

    with client_of(transport) as gate:
        columns = {"x": np.array([0.5, None]), "k": [1, 2], "w": np.array(["a", "b"])}
        gate.predict_table("m", columns)
        gate.predict("m", {"x": [[0.5]], "k": [1], "w": np.array([["a"]], object)})

    assert [request.method for request in seen] == ["GET", "POST", "POST"]  # asked once
    table, lists = (v2_json.decode(request.content).inputs for request in seen[1:])
    assert [(t.datatype, t.shape) for t in table] == [
        ("FP32", (2, 1)), ("INT8", (2,)), ("BYTES", (2, 1)),
    ]  # fmt: skip
    assert np.isnan(table[0].array[1, 0])
    assert [(t.datatype, t.shape) for t in lists] == [
        ("FP32", (1, 1)), ("INT8", (1,)), ("BYTES", (1, 1)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "columns", [{"k": [300]}, {"k": [1.5]}, {"x": ["a"]}, {"w": [1]}, {"k": [-129]}]
)
def test_a_column_that_would_change_its_values_is_refused(columns: dict[str, Any]) -> None:
    """No wrapping of integers, no cutting of fractions, no text for numbers."""
    transport, seen = scripted(httpx.Response(200, json=METADATA))

    with client_of(transport) as gate, pytest.raises(TypeError, match=r"input '[kxw]' takes"):
        gate.predict_table("m", columns)

    assert len(seen) == 1


def test_arrays_without_a_datatype_are_refused_before_anything_is_sent() -> None:
    """Complex numbers, dates, objects that are no text."""
    for array in (np.zeros(1, complex), np.zeros(1, "M8[s]"), np.array([object()])):
        for write in (wire.write_json, wire.write_binary):
            with pytest.raises(TypeError, match="'x'"):
                write({"x": array}, None, None)


def test_binary_is_spoken_where_it_is_announced_and_asked_about_once() -> None:
    """The server's own list of extensions decides."""
    for announced, kind in (
        ([], "application/json"),
        (
            ["binary_tensor_data"],
            "application/octet-stream",
        ),
    ):
        about = {"name": "s", "version": "1", "extensions": announced}
        answer = httpx.Response(200, json=ANSWER)
        transport, seen = scripted(httpx.Response(200, json=about), answer, answer)

        with client_of(transport, binary=None) as gate:
            gate.predict("m", {"x": X})
            gate.predict("m", {"x": X})

        assert [request.url.path for request in seen[:2]] == ["/v2", "/v2/models/m/infer"]
        assert [request.headers["content-type"] for request in seen[1:]] == [kind, kind]


def test_names_cannot_leave_their_place_in_a_path() -> None:
    """A slash, a question mark or dots in a name stay in the name."""
    transport, seen = scripted(refusal(404, "model_not_found"))

    with client_of(transport) as gate, pytest.raises(client.ModelNotFoundError):
        gate.predict("../admin?x#y", {"x": X})

    assert seen[0].url.raw_path == b"/v2/models/..%2Fadmin%3Fx%23y/infer"


def test_the_client_pulls_in_no_server_and_no_runtime() -> None:
    """It can be imported where no model is ever run."""
    code = (
        "import sys, gateway.client;"
        "bad = {'onnxruntime', 'starlette', 'uvicorn', 'grpc', 'scipy'} & set(sys.modules);"
        "sys.exit(' '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_the_page_of_the_client_lists_every_error_and_method() -> None:
    """Class, code and place in the tree; every argument of every method."""
    text = (Path(__file__).parents[2] / "docs/reference/client.md").read_text(encoding="utf-8")
    kinds = {name for name in client.__all__ if name.endswith("Error")} - {"ClientError"}

    listed = dict(re.findall(r"^\| `(\w+Error)` \| .* \| `(\w+)` \|$", text, re.MULTILINE))
    assert listed == {name: getattr(client, name).__mro__[1].__name__ for name in kinds}
    for name, method in inspect.getmembers(Client, inspect.isfunction):
        if not name.startswith("_") and name != "close":
            arguments = list(inspect.signature(method).parameters.values())[1:]
            words = [
                f"**{a.name}" if a.kind is a.VAR_KEYWORD
                else a.name if a.default is a.empty
                else f"{a.name}={json.dumps(a.default)}"
                for a in arguments
            ]  # fmt: skip
            first = next((k for k, a in enumerate(arguments) if a.kind is a.KEYWORD_ONLY), None)
            if first is not None:
                words.insert(first, "*")
            assert f"`{name}({', '.join(words).replace('null', 'None')})`" in text
