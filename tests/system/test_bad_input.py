"""Whatever a client sends: a 4xx that says what is wrong; never a 500, a trace or a death."""

import json
import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests import models
from tests.mutation import mutated
from tests.serving import Server, request, serve, tensor, wait_until

BODY_BYTES_MAX = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    for kind in models.ELEMENTS:
        models.put(registry, f"same-{kind}", 1, models.identity(kind))
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    models.put(registry, "wide", 1, models.identity("FP32", ("n", "k")))
    models.put(registry, "pair", 1, models.sum_and_difference())
    models.put(registry, "fixed", 1, models.fixed_rows())
    models.put(registry, "lookup", 1, models.lookup())
    models.put(registry, "scalar", 1, models.scalar())
    with serve(registry, {"limits.body_bytes_max": BODY_BYTES_MAX}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _still_alive(client: httpx.Client) -> Iterator[None]:
    """After every test the server answers a good request."""
    yield
    got = client.post("/v2/models/matrix/infer", json=GOOD)
    assert (got.status_code, got.json()["outputs"][0]["data"]) == (200, [1.0, 2.0, 3.0])


GOOD = request(tensor("x", "FP32", [1, 3], [1, 2, 3]))


def one(kind: str, value: Any) -> dict[str, Any]:
    """A request of one element."""
    return request(tensor("x", kind, [1], [value]))


def check_refusal(got: httpx.Response, status: int, *words: str) -> dict[str, str]:
    """The rules for every error answer: JSON with a sentence and a code, nothing of the inside."""
    assert got.status_code == status, got.text
    assert got.headers["content-type"] == "application/json"
    body: dict[str, str] = got.json()
    assert set(body) == {"error", "code"}
    assert re.fullmatch(r"[a-z_]+", body["code"])
    assert len(body["error"]) < 2000
    said = body["error"]
    assert body["error"].isprintable(), said
    for forbidden in ("Traceback", ".py", "/work", "/tmp", "/home", "site-packages", "0x7f"):
        assert forbidden not in got.text, said
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"
    return body


# -- tables: the request, and what the sentence must name (the input, what is right, what came)

X = "'x'"
SHAPES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("wrong rank", request(tensor("x", "FP32", [3], [1, 2, 3])), (X, "[-1, 3]", "[3]")),
    ("wrong width", request(tensor("x", "FP32", [1, 4], [1] * 4)), (X, "[-1, 3]", "[1, 4]")),
    ("no axes", request(tensor("x", "FP32", [], [1])), (X, "[-1, 3]", "[]")),
    ("too few", request(tensor("x", "FP32", [1, 3], [1, 2])), (X, "3", "2")),
    ("too many", request(tensor("x", "FP32", [1, 3], [1, 2, 3, 4])), (X, "3", "4")),
    ("none", request(tensor("x", "FP32", [1, 3], [])), (X, "3", "0")),
    ("nested too short", request(tensor("x", "FP32", [2, 3], [[1, 2, 3], [1, 2]])), (X, "3", "2")),
    (
        "nested too deep",
        request(tensor("x", "FP32", [1, 3], [[[1], [2], [3]]])),
        (X, "[1]", "numbers"),
    ),
    ("ragged outside", request(tensor("x", "FP32", [2, 3], [[1, 2, 3]])), (X, "1", "2")),
    ("half nested", request(tensor("x", "FP32", [2, 3], [[1, 2, 3], 4])), (X, "a list", "integer")),
    ("half flat", request(tensor("x", "FP32", [1, 3], [1, [2], 3])), (X, "[2]")),
    ("negative size", request(tensor("x", "FP32", [-1, 3], [1, 2, 3])), (X, ">= 0", "-1")),
    ("two negatives", request(tensor("x", "FP32", [-1, -3], [1, 2, 3])), (X, ">= 0", "-3")),
    ("huge product", request(tensor("x", "FP32", [2**20, 2**20], [1])), (X, "1048576", "1")),
    ("overflow to 0", request(tensor("x", "FP32", [2**32, 2**32], [])), (X, "4294967296")),
    ("overflow to 3", request(tensor("x", "FP32", [2**63, 3], [1, 2, 3])), (X, "elements")),
    ("huge and empty", request(tensor("x", "FP32", [0, 2**63], [])), (X,)),
    ("huger and empty", request(tensor("x", "FP32", [0, 2**64 - 1], [])), (X,)),
    ("33 axes", request(tensor("x", "FP32", [1] * 33, [1])), (X, "32")),
    ("a thousand axes", request(tensor("x", "FP32", [1] * 1000, [1])), (X, "32")),
    ("a fraction", request(tensor("x", "FP32", [1.0, 3], [1, 2, 3])), (X, "integers", "1.0")),
    ("true as size", request(tensor("x", "FP32", [True, 3], [1, 2, 3])), (X, "integers", "True")),
    ("text as size", request(tensor("x", "FP32", ["1", 3], [1, 2, 3])), (X, "integers", "'1'")),
    ("shape is text", {"inputs": [{**GOOD["inputs"][0], "shape": "1,3"}]}, (X, "list", "'1,3'")),
    ("shape is null", {"inputs": [{**GOOD["inputs"][0], "shape": None}]}, (X, "list", "None")),
    ("data is an object", request(tensor("x", "FP32", [1, 3], {"0": 1})), (X, "list", "object")),
    ("data is text", request(tensor("x", "FP32", [1, 3], "1,2,3")), (X, "list", "text")),
    ("data is null", request(tensor("x", "FP32", [1, 3], None)), (X, "list", "null")),
    ("an object in it", request(tensor("x", "FP32", [1, 3], [1, {}, 3])), (X, "element 1", "{}")),
]


@pytest.mark.parametrize(("body", "words"), [c[1:] for c in SHAPES], ids=[c[0] for c in SHAPES])
def test_a_wrong_shape_is_named_with_the_right_one(
    client: httpx.Client, body: Any, words: tuple[str, ...]
) -> None:
    """The sentence has the input, what is expected and what came."""
    got = client.post("/v2/models/matrix/infer", json=body)

    assert check_refusal(got, 400, *words)["code"] == "bad_tensor"


@pytest.mark.parametrize("size", [2**40, 2**61, 2**62])
def test_an_empty_tensor_of_an_absurd_width_does_no_harm(client: httpx.Client, size: int) -> None:
    """No elements, and an axis that no machine could hold: an answer, at once, and not a 500."""
    start = time.monotonic()
    got = client.post("/v2/models/wide/infer", json=request(tensor("x", "FP32", [0, size], [])))

    assert got.status_code in (200, 400)
    assert time.monotonic() - start < 5


A, B = tensor("a", "FP32", [1, 2], [1, 2]), tensor("b", "FP32", [1, 2], [3, 4])
NAMES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("missing", request(A), ("'b'", "missing")),
    ("extra", request(A, B, tensor("c", "FP32", [1], [1])), ("'c'", "'a', 'b'")),
    ("misspelt", request(A, {**B, "name": "B"}), ("'B'", "'a', 'b'")),
    ("twice", request(A, B, A), ("'a'", "twice")),
    ("twice instead", request(A, A), ("'a'", "twice")),
    ("unequal rows", request(A, tensor("b", "FP32", [2, 2], [1] * 4)), ("'a'", "'b'", "1", "2")),
    ("no rows in one", request(A, tensor("b", "FP32", [0, 2], [])), ("'a'", "'b'", "1", "0")),
    ("output unknown", request(A, B, outputs=[{"name": "total"}]), ("'total'", "'sum'")),
    (
        "output twice",
        request(A, B, outputs=[{"name": "sum"}, {"name": "sum"}]),
        ("outputs", "twice"),
    ),
    ("input as output", request(A, B, outputs=[{"name": "a"}]), ("'a'", "'difference'")),
    ("integers", request({**A, "datatype": "INT32"}, B), ("'a'", "FP32", "INT32")),
    ("doubles", request({**A, "datatype": "FP64"}, B), ("'a'", "FP32", "FP64")),
    ("no such type", request({**A, "datatype": "FLOAT"}, B), ("'a'", "FP32", "'FLOAT'")),
    ("lower case", request({**A, "datatype": "fp32"}, B), ("'a'", "FP32", "'fp32'")),
    ("bfloat", request({**A, "datatype": "BF16"}, B), ("'a'", "FP32", "BF16")),
    ("type null", request({**A, "datatype": None}, B), ("'a'", "FP32", "None")),
    ("type list", request({**A, "datatype": ["FP32"]}, B), ("'a'", "FP32")),
    ("no data", request({k: v for k, v in A.items() if k != "data"}, B), ("'a'", "data")),
    (
        "binary",
        request({"name": "a", "datatype": "FP32", "shape": [1, 2],
                 "parameters": {"binary_data_size": 8}}, B),
        ("'a'", "binary"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), [c[1:] for c in NAMES], ids=[c[0] for c in NAMES])
def test_a_wrong_tensor_is_named_with_the_right_ones(
    client: httpx.Client, body: Any, words: tuple[str, ...]
) -> None:
    """Names and datatypes: what the model takes, and what was given."""
    got = client.post("/v2/models/pair/infer", json=body)

    assert check_refusal(got, 400, *words)["code"] == "bad_tensor"


WHOLE: list[tuple[str, Any, tuple[str, ...]]] = [
    ("null", None, ("object", "null")),
    ("a list", [], ("object", "list")),
    ("a number", 7, ("object", "integer")),
    ("text", "hello", ("object", "text")),
    ("nothing in it", {}, ("inputs",)),
    ("inputs null", {"inputs": None}, ("inputs",)),
    ("inputs empty", {"inputs": []}, ("inputs", "at least one")),
    ("inputs an object", {"inputs": {"x": 1}}, ("inputs", "list")),
    ("inputs of numbers", {"inputs": [1]}, ("inputs[0]", "object", "integer")),
    ("inputs of null", {"inputs": [GOOD["inputs"][0], None]}, ("inputs[1]", "null")),
    ("no name", request({**GOOD["inputs"][0], "name": None}), ("inputs[0].name",)),
    ("empty name", request({**GOOD["inputs"][0], "name": ""}), ("inputs[0].name",)),
    ("a number as name", request({**GOOD["inputs"][0], "name": 1}), ("inputs[0].name",)),
    ("two thousand", {"inputs": GOOD["inputs"] * 2000}, ("2000", "1024")),
    ("id a number", {**GOOD, "id": 7}, ("'id'", "text", "integer")),
    ("id a list", {**GOOD, "id": []}, ("'id'", "text", "list")),
    ("id false", {**GOOD, "id": False}, ("'id'", "text", "true or false")),
    ("outputs text", {**GOOD, "outputs": "y"}, ("'outputs'", "list")),
    ("outputs an object", {**GOOD, "outputs": {"name": "y"}}, ("'outputs'", "list")),
    ("outputs empty object", {**GOOD, "outputs": {}}, ("'outputs'", "list")),
    ("outputs false", {**GOOD, "outputs": False}, ("'outputs'", "list")),
    ("outputs zero", {**GOOD, "outputs": 0}, ("'outputs'", "list")),
    ("outputs of text", {**GOOD, "outputs": ["y"]}, ("outputs[0]", "name")),
    ("outputs of null", {**GOOD, "outputs": [None]}, ("outputs[0]", "name")),
    ("parameters a list", {**GOOD, "parameters": [1]}, ("'parameters'", "object", "list")),
    ("timeout text", {**GOOD, "parameters": {"timeout": "1"}}, ("timeout", "integer")),
    ("timeout negative", {**GOOD, "parameters": {"timeout": -1}}, ("timeout", ">= 0")),
    ("timeout true", {**GOOD, "parameters": {"timeout": True}}, ("timeout", "integer")),
    ("timeout a fraction", {**GOOD, "parameters": {"timeout": 1.5}}, ("timeout", "integer")),
]


@pytest.mark.parametrize(("body", "words"), [c[1:] for c in WHOLE], ids=[c[0] for c in WHOLE])
def test_a_body_that_is_no_request_says_which_part(
    client: httpx.Client, body: Any, words: tuple[str, ...]
) -> None:
    """The field, what it must be, and what it is."""
    check_refusal(client.post("/v2/models/matrix/infer", content=json.dumps(body)), 400, *words)


BYTES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty", b"", ("empty",)),
    ("blank", b" \n\t ", ("empty",)),
    ("cut", b'{"inputs": [{"name": "x"', ("not JSON",)),
    ("two values", b'{"inputs": []} {}', ("not JSON",)),
    ("single quotes", b"{'inputs': []}", ("not JSON",)),
    ("trailing comma", b'{"inputs": [],}', ("not JSON",)),
    ("a comment", b'{"inputs": [] /* here */}', ("not JSON",)),
    ("a form", b"inputs=1&name=x", ("not JSON",)),
    ("no UTF-8", b'{"inputs": [{"name": "\xff\xfe"}]}', ("not JSON",)),
    ("overlong UTF-8", b'{"inputs": [{"name": "\xc0\xaf"}]}', ("not JSON",)),
    ("UTF-16", '{"inputs": []}'.encode("utf-16"), ("not JSON",)),
    ("no UTF-8 beside NaN", b'{"inputs": [NaN, "\xff"]}', ("not JSON", "UTF-8")),
    ("a bare surrogate", b'{"inputs": [{"name": "\\ud800"}]}', ("not JSON",)),
    ("zero bytes", b"\x00" * 1000, ("not JSON",)),
    ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ("not JSON",)),
    ("100,000 lists", b"[" * 100_000, ("not JSON",)),
    ("100,000 closed lists", b"[" * 100_000 + b"]" * 100_000, ("not JSON",)),
    ("100,000 objects", b'{"a":' * 100_000, ("not JSON",)),
    ("100,000 lists and NaN", b"[" * 100_000 + b"NaN" + b"]" * 100_000, ("not JSON", "deep")),
    ("900 lists", b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}", ("inputs[0]", "list")),
    ("a number of 5,000 digits and NaN", b'{"a":NaN,"b":' + b"9" * 5000 + b"}", ("not JSON",)),
]


@pytest.mark.parametrize(("body", "words"), [c[1:] for c in BYTES], ids=[c[0] for c in BYTES])
def test_a_body_that_is_no_json_is_400_at_once(
    client: httpx.Client, body: bytes, words: tuple[str, ...]
) -> None:
    """No parser dies, and none takes long."""
    start = time.monotonic()
    got = client.post("/v2/models/matrix/infer", content=body)

    check_refusal(got, 400, *words)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "body",
    [
        (
            b'{"id":"\\udc00","inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["a"]}],'
            b'"n":NaN}'
        ),
        b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[2],"data":["\\ud83d","a"]}],"n":NaN}',
        b'{"inputs":[{"name":"\\ud83d","datatype":"BYTES","shape":[1],"data":["a"]}],"n":NaN}',
        (
            b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["a"]}],"n":NaN,'
            b'"outputs":[{"name":"\\ud83d"}]}'
        ),
        b'{"inputs":[{"name":"x","datatype":"\\ud83d","shape":[1],"data":["a"]}],"n":NaN}',
    ],
    ids=["id", "data", "name", "output", "datatype"],
)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(
    client: httpx.Client, body: bytes
) -> None:
    """No answer could repeat it in UTF-8; beside NaN a second parser reads the body."""
    check_refusal(client.post("/v2/models/same-BYTES/infer", content=body), 400)


INTEGERS = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
FLOATS = ("FP16", "FP32", "FP64")
VALUES: list[tuple[str, Any, tuple[str, ...]]] = [
    *((kind, int(np.iinfo(kind.lower()).max) + 1, ("integers",)) for kind in INTEGERS),
    *((kind, int(np.iinfo(kind.lower()).min) - 1, ("integers",)) for kind in INTEGERS),
    *((kind, 10**30, ("integers",)) for kind in INTEGERS),
    *((kind, 1.5, ("integers", "1.5")) for kind in INTEGERS),
    *((kind, float("nan"), ("integers", "nan")) for kind in INTEGERS),
    *((kind, float("inf"), ("integers", "inf")) for kind in INTEGERS),
    *((kind, 1e300, ("integers",)) for kind in INTEGERS),
    *((kind, True, ("True",)) for kind in (*INTEGERS, *FLOATS)),
    *((kind, "7", ("'7'",)) for kind in (*INTEGERS, *FLOATS)),
    *((kind, None, ("null",)) for kind in (*INTEGERS, *FLOATS)),
    *((kind, {}, ("{}",)) for kind in (*INTEGERS, *FLOATS)),
    ("FP16", 65520, ("out of range",)),
    ("FP16", -1e6, ("out of range",)),
    ("FP32", 3.5e38, ("out of range",)),
    ("FP32", 10**39, ("out of range",)),
    ("BOOL", 1, ("true or false", "1")),
    ("BOOL", 0, ("true or false", "0")),
    ("BOOL", "true", ("true or false", "'true'")),
    ("BOOL", None, ("true or false", "null")),
    ("BOOL", 0.0, ("true or false", "0.0")),
    ("BYTES", 1, ("text", "1")),
    ("BYTES", None, ("text", "null")),
    ("BYTES", True, ("text", "True")),
    ("BYTES", {}, ("text", "{}")),
    ("BYTES", float("nan"), ("text", "nan")),
]


@pytest.mark.parametrize(("kind", "value", "words"), VALUES)
def test_a_value_that_the_datatype_cannot_hold_is_named(
    client: httpx.Client, kind: str, value: Any, words: tuple[str, ...]
) -> None:
    """Nothing wraps, nothing is rounded, nothing is taken for something else."""
    got = client.post(f"/v2/models/same-{kind}/infer", content=json.dumps(one(kind, value)))

    body = check_refusal(got, 400, X, kind, "element 0", *words)
    assert body["code"] == "bad_tensor"


@pytest.mark.parametrize("kind", FLOATS)
def test_a_number_beyond_every_float_is_no_infinity(client: httpx.Client, kind: str) -> None:
    """1e400 written out: a client that means infinity writes Infinity."""
    body = b'{"inputs":[{"name":"x","datatype":"%s","shape":[1],"data":[1e400]}]}' % kind.encode()

    check_refusal(client.post(f"/v2/models/same-{kind}/infer", content=body), 400)


def test_the_wrong_element_among_many_is_found(client: httpx.Client) -> None:
    """The position is that of the flat, row-major data."""
    values: list[Any] = [1] * 30_000
    values[23_456] = 300
    got = client.post(
        "/v2/models/same-UINT8/infer", json=request(tensor("x", "UINT8", [30_000], values))
    )

    check_refusal(got, 400, X, "element 23456", "300", "255")


def test_a_value_that_the_graph_refuses_is_the_clients_fault(client: httpx.Client) -> None:
    """An index out of range fits the signature, and is no failure of the server."""
    for index in (5, -6, 2**40):
        body = request(tensor("index", "INT64", [2], [0, index]))
        check_refusal(client.post("/v2/models/lookup/infer", json=body), 400)


def test_a_vector_for_a_scalar_is_no_failure_of_the_server(client: httpx.Client) -> None:
    """onnxruntime tells a scalar and any rank alike: refused, or answered in the shape it has."""
    body = request(tensor("x", "FP32", [3], [1, 2, 3]))
    got = client.post("/v2/models/scalar/infer", json=body)

    if got.status_code == 200:
        assert got.json()["outputs"][0] == tensor("y", "FP32", [3], [2, 4, 6])
    else:
        check_refusal(got, 400)


def test_other_rows_than_the_fixed_ones_are_refused(client: httpx.Client) -> None:
    """Four rows are expected, three came."""
    body = request(tensor("x", "FP32", [3, 2], [0] * 6))
    check_refusal(client.post("/v2/models/fixed/infer", json=body), 400, X, "[4, 2]", "[3, 2]")


# -- paths, headers, limits


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v2/models/absent/infer", 404, ("'absent'",)),
        ("/v2/models/Matrix/infer", 404, ("'Matrix'", "'matrix'")),
        ("/v2/models//infer", 404, ()),
        ("/v2/models/matrix/versions/2/infer", 404, ("'matrix'", "'2'", "1")),
        ("/v2/models/matrix/versions/0/infer", 404, ("'0'",)),
        ("/v2/models/matrix/versions/-1/infer", 404, ("'-1'",)),
        ("/v2/models/matrix/versions/01/infer", 404, ("'01'",)),
        ("/v2/models/matrix/versions/1.0/infer", 404, ("'1.0'",)),
        ("/v2/models/matrix/versions/latest/infer", 404, ("'latest'",)),
        ("/v2/models/matrix/versions//infer", 404, ()),
        ("/v2/models/matrix/versions/%D9%A1/infer", 404, ()),
        ("/v2/models/matrix/versions/" + "9" * 24 + "/infer", 404, ()),
        ("/v2/models/matrix/versions/1/versions/1/infer", 404, ()),
        ("/v2/models/../../etc/passwd/infer", 404, ()),
        ("/v2/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd/infer", 404, ()),
        ("/v2/models/matrix%00/infer", 404, ()),
        ("/v2/models/%0d%0aset-cookie:%20a=b/infer", 404, ()),
        ("/v2/models/" + "m" * 5000 + "/infer", 404, ()),
        ("/v2/models/%F0%9F%98%80/infer", 404, ()),
        ("/v2/models/%ff%fe/infer", 404, ()),
        ("/v2/models/matrix/infer/", 404, ()),
        ("/v2/models/matrix/generate", 404, ()),
    ],
)
def test_a_prediction_from_nobody_is_404(
    client: httpx.Client, path: str, status: int, words: tuple[str, ...]
) -> None:
    """Unknown models and versions, in every spelling; names never become paths."""
    check_refusal(client.post(path, json=GOOD), status, *words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/drift?model=matrix", ("'model'",)),
        ("/drift/matrix?windows=last", ("'windows'", "version, window")),
        ("/drift/matrix?window=yesterday", ("'yesterday'", "last")),
        ("/drift/matrix?window=", ("''", "last")),
        ("/drift/matrix?window=last&window=total", ("window", "twice")),
        ("/drift/matrix?" + "a" * 3000, ("1024",)),
    ],
)
def test_a_wrong_query_is_told_the_right_one(
    client: httpx.Client, path: str, words: tuple[str, ...]
) -> None:
    """A misspelt parameter that was passed over would answer another question."""
    check_refusal(client.get(path), 400, *words)


@pytest.mark.parametrize("version", ["2", "0", "01", "%D9%A1", "one", "9" * 30])
def test_drift_of_an_unknown_version_is_404(client: httpx.Client, version: str) -> None:
    """The same grammar as everywhere."""
    check_refusal(client.get(f"/drift/matrix?version={version}"), 404)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400", "soon", "", "1,5", "\xff"])
def test_a_wrong_deadline_is_refused(client: httpx.Client, value: str) -> None:
    """Seconds above zero."""
    got = client.post(
        "/v2/models/matrix/infer",
        json=GOOD,
        headers={"x-request-timeout": value.encode("latin-1")},
    )
    check_refusal(got, 400, "x-request-timeout")


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip"])
def test_a_coding_that_is_not_spoken_is_415(client: httpx.Client, coding: str) -> None:
    """Better said than read as broken JSON."""
    got = client.post("/v2/models/matrix/infer", json=GOOD, headers={"content-encoding": coding})
    body = check_refusal(got, 415, coding)
    assert body["code"] == "unsupported_encoding"


def test_identity_is_no_coding(client: httpx.Client) -> None:
    """`content-encoding: identity` means none."""
    got = client.post(
        "/v2/models/matrix/infer", json=GOOD, headers={"content-encoding": "identity"}
    )
    assert got.status_code == 200


def test_bytes_that_no_tensor_claims_are_refused(client: httpx.Client) -> None:
    """A JSON part shorter than the body: what follows it must be a tensor."""
    got = client.post(
        "/v2/models/matrix/infer",
        content=json.dumps(GOOD).encode() + b"\x00" * 12,
        headers={"inference-header-content-length": str(len(json.dumps(GOOD)))},
    )
    check_refusal(got, 400, "12 bytes")


def test_a_body_of_just_the_limit_is_read(client: httpx.Client) -> None:
    """The limit is the largest size that is fine."""
    body = json.dumps(GOOD).encode().ljust(BODY_BYTES_MAX)

    assert client.post("/v2/models/matrix/infer", content=body).status_code == 200
    check_refusal(client.post("/v2/models/matrix/infer", content=body + b" "), 413)


def test_a_body_beyond_the_limit_is_413_whether_announced_or_not(server: Server) -> None:
    """With Content-Length before a byte is read, chunked as soon as it is too much."""
    body = b" " * (BODY_BYTES_MAX * 3)
    with server.client() as client:
        got = client.post("/v2/models/matrix/infer", content=body)
        assert check_refusal(got, 413, str(BODY_BYTES_MAX))["code"] == "too_large"
    with server.client() as client:
        got = client.post("/v2/models/matrix/infer", content=(body[:50_000] for _ in range(60)))
        assert check_refusal(got, 413, str(BODY_BYTES_MAX))["code"] == "too_large"


def test_an_announced_gigabyte_is_refused_before_it_is_sent(server: Server) -> None:
    """The answer comes while the client has sent nothing but headers."""
    with socket.create_connection(server.address, timeout=5) as raw:
        raw.sendall(
            b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 1000000000\r\n\r\n"
        )
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 202),
        (b"[]", 400),
        (b"nonsense", 400),
        (b'{"rows": "many"}', 400),
        (b'{"rows": true}', 400),
        (b'{"rows": 0}', 400),
        (b'{"rows": -5}', 400),
        (b'{"rows": 99999999999999999999}', 400),
        (b'{"rows": 1000, "version": 7}', 404),
        (b'{"rows": 1000, "version": {}}', 404),
        (b'{"row": 1000}', 400),
        (b"[" * 50_000, 400),
        (b" " * 70_000, 413),
    ],
)
def test_a_wrong_wish_to_adopt_is_refused(client: httpx.Client, body: bytes, status: int) -> None:
    """The admin path reads its body as strictly as the others."""
    got = client.post("/admin/models/same-FP32/reference", content=body)
    if status == 202:
        assert got.status_code == 202, got.text
    else:
        check_refusal(got, status)


@pytest.mark.parametrize(
    "headers", [{"origin": "http://127.0.0.1"}, {"sec-fetch-site": "same-origin"}]
)
def test_admin_paths_do_not_answer_web_pages(client: httpx.Client, headers: dict[str, str]) -> None:
    """A page in a browser on this machine reaches loopback: it must not change a thing."""
    for method, path in (("POST", "/admin/models/matrix/reference"), ("GET", "/admin/models")):
        check_refusal(client.request(method, path, headers=headers), 403)


# -- injection


@pytest.mark.parametrize("value", [b"a b", b"a\tb", b"\xc3\xbc", b"", b"x" * 129, b"a\xffb"])
def test_a_request_id_that_is_no_token_is_replaced(client: httpx.Client, value: bytes) -> None:
    """It goes into headers, logs and label files: printable ASCII without spaces, or our own."""
    got = client.post("/v2/models/matrix/infer", json=GOOD, headers={"x-request-id": value})

    assert got.status_code == 200
    assert re.fullmatch(r"[\x21-\x7e]{1,128}", got.headers["x-request-id"])
    assert got.headers["x-request-id"].encode("latin-1") != value


def test_no_header_can_be_injected_through_the_request_id(server: Server) -> None:
    """Line breaks in raw bytes: refused, or gone from the answer."""
    for poison in (
        b"a\r\n set-cookie: b=c",
        b"a\nset-cookie: b=c",
        b"a\rset-cookie: b=c",
        b"a\x00b",
    ):
        head = (
            b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\nx-request-id: " + poison
        )
        body = json.dumps(GOOD).encode()
        answer = talk(server, head + b"\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert b"set-cookie" not in answer.lower()
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))


def test_names_of_clients_do_not_break_an_answer(client: httpx.Client) -> None:
    """Control characters, markup and other scripts come back readable and harmless."""
    for name in ("\x1b[31m", "<script>", "a\nb", "\u202e", "\U0001f600", '"', "\x00", "é" * 4000):
        body = request(tensor(name, "FP32", [1, 3], [1, 2, 3]))
        check_refusal(client.post("/v2/models/matrix/infer", json=body), 400)


def test_nothing_of_a_client_is_written_to_the_log(server: Server, client: httpx.Client) -> None:
    """A client cannot fill a disk or forge a line: its errors are counted, not logged."""
    before = len(server.lines)
    for path in ("/v2/models/secret-name/infer", "/secret-path", "/drift/secret-model"):
        client.request("POST", path, content=b"secret-content", headers={"x-key": "secret-key"})
    client.post("/v2/models/matrix/infer", content=b"secret-content")

    assert "secret" not in "\n".join(server.lines[before:])


# -- many


def test_a_thousand_mutations_of_a_good_body_get_no_500(client: httpx.Client) -> None:
    """Bytes flipped, cut, doubled, swapped for JSON's own marks: 200 or 4xx, each within 5 s."""
    draw = random.Random(20260101)
    good = json.dumps(
        request(
            tensor("a", "FP32", [2, 2], [[1.5, 2], [3, 4e-3]]),
            tensor("b", "FP32", [2, 2], [5, 6, 7, 8]),
            id="some id",
            outputs=[{"name": "sum"}],
            parameters={"timeout": 1_000_000},
        )
    ).encode()
    marks = [b"NaN", b"null", b"true", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\u0000", b"-",
             b"1e999", b"9" * 25, b"\xff", b"\\", b"0", b".", b"Infinity",
             b'"shape"', b"-1"]  # fmt: skip
    seen: dict[int, int] = {}
    for _ in range(1000):
        body = mutated(good, draw, marks)
        start = time.monotonic()
        got = client.post("/v2/models/pair/infer", content=body)
        assert time.monotonic() - start < 5, body
        seen[got.status_code] = seen.get(got.status_code, 0) + 1
        if got.status_code != 200:
            check_refusal(got, 400)
    assert seen.get(400, 0) > 500, seen


# -- raw connections


def talk(server: Server, content: bytes) -> bytes:
    """All that the server sends back until it closes, or has been silent for half a second."""
    with socket.create_connection(server.address, timeout=0.5) as raw:
        raw.sendall(content)
        answer = b""
        try:
            while part := raw.recv(65536):
                answer += part
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"FOO /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        (
            b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        ),
        (
            b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
            b"Content-Length: 2\r\n\r\nab"
        ),
        (
            b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
        ),
    ],
    ids=["tls", "no path", "version", "verb", "negative", "both lengths", "two lengths", "chunk"],
)
def test_what_is_no_http_is_refused_and_closed(server: Server, content: bytes) -> None:
    """400 in plain HTTP, and no second guess at where the next request begins."""
    answer = talk(server, content)

    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")


def test_clients_that_leave_in_the_middle_cost_nothing(
    server: Server, client: httpx.Client
) -> None:
    """Half a head, half a body, half a chunk, and gone: no error in the log, no descriptor kept."""
    body = json.dumps(GOOD).encode()
    head = b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\n"
    halves = [
        head[:20],
        head,
        head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body[:20]),
        head + b"Content-Length: 900000\r\n\r\n" + b" " * 70_000,
        head + b"Transfer-Encoding: chunked\r\n\r\n10\r\nabc",
        (
            b"POST /admin/models/matrix/reference HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 50\r\n\r\n{"
        ),
    ]
    before = n_descriptors(server)
    for half in halves * 20:
        with socket.create_connection(server.address, timeout=5) as raw:
            raw.sendall(half)

    wait_until(lambda: n_descriptors(server) <= before + 2, "their descriptors are free again")
    assert client.get("/v2/health/ready").status_code == 200
    assert not server.events("request_failed")


def test_a_request_that_comes_byte_by_byte_is_answered(
    server: Server, client: httpx.Client
) -> None:
    """A slow sender is served, and nobody waits for it."""
    body = json.dumps(GOOD).encode()
    content = (
        b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    with socket.create_connection(server.address, timeout=5) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for k in range(len(content)):
            raw.sendall(content[k : k + 1])
            if k % 50 == 0:
                assert client.post("/v2/models/matrix/infer", json=GOOD).status_code == 200
        answer = b""
        while part := raw.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200 ")


def n_descriptors(server: Server) -> int:
    """Open files of the server's process."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_a_refused_body_does_not_confuse_the_next_request(server: Server) -> None:
    """The rest of a body that nobody wanted is passed over: the connection stays in step."""
    body = json.dumps(GOOD).encode()
    good = (
        b"POST /v2/models/matrix/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
    )
    smuggled = good % (len(body), body)
    for start in (
        b"POST /v2/models/absent/infer",
        b"POST /nowhere",
        b"PUT /v2/models/matrix/infer",
    ):
        head = start + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(smuggled)
        answer = talk(server, head + smuggled + good % (len(body), body))

        assert answer.count(b"HTTP/1.1 4") == 1, answer
        assert answer.count(b"HTTP/1.1 200 ") == 1, answer


def test_the_largest_body_costs_less_than_five_seconds_and_half_a_gigabyte(tmp_path: Path) -> None:
    """Of the size that the default limit of JSON allows, in its most expensive spelling."""
    models.put(tmp_path, "m", 1, models.identity())
    n = 3_145_000
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d],"data":[' % n
    body += b"[1]," * (n - 1) + b"[1]]}]}"
    with serve(tmp_path) as running, running.client(timeout=60) as client:
        before = peak_bytes(running)
        start = time.monotonic()
        answer = client.post("/v2/models/m/infer", content=body)
        assert answer.status_code == 400, answer.text
        seconds = time.monotonic() - start
        longer = client.post("/v2/models/m/infer", content=body * 2)
        assert (longer.status_code, longer.json()["code"]) == (413, "too_large")
        assert "limits.json_bytes_max" in longer.json()["error"]
        grown = peak_bytes(running) - before

    assert grown < 512 * 2**20
    assert seconds < 5


def peak_bytes(server: Server) -> int:
    """The most memory that the server's process has had so far."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]  # is there
