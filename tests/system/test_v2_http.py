"""The Open Inference Protocol over a real socket: what goes in comes out as the protocol says."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway import __version__
from tests import models
from tests.serving import Server, request, serve, tensor

NUMPY = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    for kind in models.ELEMENTS:
        models.put(registry, f"same-{kind}", 1, models.identity(kind))
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    models.put(registry, "pixels", 1, models.identity("INT64", ("n", 2, 2)))
    models.put(registry, "wide", 1, models.identity("FP32", ("n", "k")))
    models.put(registry, "pair", 1, models.sum_and_difference())
    models.put(registry, "mixed", 1, models.mixed())
    models.put(registry, "fixed", 1, models.fixed_rows())
    models.put(registry, "vector", 1, models.vector())
    models.put(registry, "scalar", 1, models.scalar())
    models.put(registry, "centred", 1, models.centred())
    models.put(registry, "mean", 1, models.mean_of_rows())
    models.put(registry, "infer", 1, models.constant(77))
    for version in (2, 9, 10):
        models.put(registry, "counted", version, models.constant(version))
    with serve(registry) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


def infer(client: httpx.Client, model: str, body: Any, **options: Any) -> httpx.Response:
    # httpx would refuse NaN; numeric clients write it bare, as the standard library does.
    return client.post(f"/v2/models/{model}/infer", content=json.dumps(body), **options)


def answer(client: httpx.Client, model: str, body: Any) -> dict[str, Any]:
    got = infer(client, model, body)
    assert got.status_code == 200, got.text
    return got.json()  # type: ignore[no-any-return]  # JSON is Any


# -- health and metadata


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v2/health/live", {"live": True}), ("/v2/health/ready", {"ready": True})],
)
def test_health_answers_200_with_the_field_that_clients_read(
    client: httpx.Client, path: str, body: dict[str, bool]
) -> None:
    """The protocol asks for 200; KServe's client reads `live` and `ready` from a JSON body."""
    got = client.get(path)

    assert (got.status_code, got.json()) == (200, body)
    assert got.headers["content-type"] == "application/json"


def test_server_metadata_names_itself_and_announces_only_what_works(client: httpx.Client) -> None:
    """Clients decide by `extensions`: shared memory is not there, so it is not named."""
    about = client.get("/v2").json()

    assert about["name"] == "driftgate"
    assert about["version"] == __version__
    assert "system_shared_memory" not in about["extensions"]


def test_model_metadata_tells_tensors_with_free_axes_as_minus_one(client: httpx.Client) -> None:
    """`{name, versions, platform, inputs, outputs}`; datatypes in the protocol's words."""
    about = client.get("/v2/models/mixed").json()

    assert about["name"] == "mixed"
    assert about["versions"] == ["1"]
    assert isinstance(about["platform"], str)
    assert about["inputs"] == [
        {"name": "amount", "datatype": "FP32", "shape": [-1]},
        {"name": "count", "datatype": "INT64", "shape": [-1]},
        {"name": "place", "datatype": "BYTES", "shape": [-1]},
    ]
    assert [output["name"] for output in about["outputs"]] == ["twice", "where", "n_seen"]


def test_metadata_of_one_version_names_all_versions_as_text(client: httpx.Client) -> None:
    """Versions are ordered by number: 10 is after 9, not after 1."""
    about = client.get("/v2/models/counted/versions/2").json()

    assert about["versions"] == ["2", "9", "10"]


@pytest.mark.parametrize("path", ["counted", "counted/versions/9", "counted/versions/2", "infer"])
def test_model_ready_says_so(client: httpx.Client, path: str) -> None:
    """`GET .../ready` of what can be called is 200 with name and `ready`."""
    got = client.get(f"/v2/models/{path}/ready")

    assert (got.status_code, got.json()) == (
        200,
        {"name": path.partition("/")[0], "ready": True},
    )


def test_a_model_may_be_named_infer(client: httpx.Client) -> None:
    """No name that the grammar allows may collide with a path of the protocol."""
    about = client.get("/v2/models/infer")
    got = answer(client, "infer", request(tensor("x", "FP32", [1], [0])))

    assert (about.status_code, about.json().get("name")) == (200, "infer")
    assert got["outputs"][0]["data"] == [77.0]


# -- which version answers


@pytest.mark.parametrize(("path", "version"), [("", 10), ("/versions/9", 9), ("/versions/2", 2)])
def test_the_highest_version_answers_unless_one_is_named(
    client: httpx.Client, path: str, version: int
) -> None:
    """10 is higher than 9; older ones are called by number, and the answer names who answered."""
    got = answer(client, f"counted{path}", request(tensor("x", "FP32", [1], [0.5])))

    assert got["model_version"] == str(version)
    assert got["outputs"][0]["data"] == [float(version)]


def test_a_call_by_number_does_not_change_who_answers(client: httpx.Client) -> None:
    """Opening an older version on demand is no promotion."""
    for path in ("/versions/2", "", "/versions/9", ""):
        got = answer(client, f"counted{path}", request(tensor("x", "FP32", [1], [0])))
        assert got["model_version"] == (path[-1:] or "10")


# -- answers


def test_an_answer_has_the_fields_of_the_protocol_and_no_others(client: httpx.Client) -> None:
    """`model_name, model_version, id?, outputs[{name, datatype, shape, data}]`."""
    got = infer(client, "same-FP32", request(tensor("x", "FP32", [2], [1.5, -2])))

    assert got.headers["content-type"] == "application/json"
    assert got.json() == {
        "model_name": "same-FP32",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1.5, -2.0]}],
    }


@pytest.mark.parametrize("identity", ["", "a", 'quo"te', "ü\u2028\U0001f600", "\x00\n", "x" * 5000])
def test_the_id_is_echoed_as_it_came(client: httpx.Client, identity: str) -> None:
    """Any text is an id."""
    got = answer(client, "same-FP32", request(tensor("x", "FP32", [1], [1]), id=identity))

    assert got["id"] == identity


def test_an_absent_id_stays_absent(client: httpx.Client) -> None:
    """Nothing is invented in its place; null is the same as absent."""
    for more in ({}, {"id": None}):
        assert "id" not in answer(
            client, "same-FP32", request(tensor("x", "FP32", [1], [1]), **more)
        )


def test_several_inputs_are_told_apart_by_name_in_any_order(client: httpx.Client) -> None:
    """A client may list tensors in an order of its own."""
    a = tensor("a", "FP32", [2, 2], [1, 2, 3, 4])
    b = tensor("b", "FP32", [2, 2], [10, 20, 30, 40])
    for body in (request(a, b), request(b, a)):
        outputs = answer(client, "pair", body)["outputs"]

        assert [output["name"] for output in outputs] == ["sum", "difference"]
        assert outputs[0]["data"] == [11, 22, 33, 44]
        assert outputs[1]["data"] == [-9, -18, -27, -36]


@pytest.mark.parametrize(
    ("asked", "given_back"),
    [
        (["difference"], ["difference"]),
        (["sum"], ["sum"]),
        (["difference", "sum"], ["difference", "sum"]),
        ([], ["sum", "difference"]),
    ],
)
def test_outputs_are_those_asked_for_in_the_order_asked_for(
    client: httpx.Client, asked: list[str], given_back: list[str]
) -> None:
    """An empty list means all, in the model's order."""
    ones = [1, 1]
    body = request(
        tensor("a", "FP32", [1, 2], ones),
        tensor("b", "FP32", [1, 2], ones),
        outputs=[{"name": name, "parameters": {"binary_data": False}} for name in asked],
    )
    outputs = answer(client, "pair", body)["outputs"]

    assert [output["name"] for output in outputs] == given_back
    assert [output["data"] for output in outputs] == [
        [2, 2] if name == "sum" else [0, 0] for name in given_back
    ]


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize(
    ("model", "kind", "shape"),
    [("matrix", "FP32", (4, 3)), ("pixels", "INT64", (3, 2, 2)), ("wide", "FP32", (2, 5))],
)
def test_nested_and_flat_data_mean_the_same(
    client: httpx.Client, model: str, kind: str, shape: tuple[int, ...], is_nested: bool
) -> None:
    """Both are legal and row-major; answers are flat."""
    values = np.arange(math.prod(shape)).reshape(shape)
    data = values.tolist() if is_nested else values.ravel().tolist()
    output = answer(client, model, request(tensor("x", kind, list(shape), data)))["outputs"][0]

    assert output["shape"] == list(shape)
    assert output["data"] == values.ravel().tolist()


@pytest.mark.parametrize(
    ("model", "kind", "shape"),
    [
        ("same-FP32", "FP32", [0]),
        ("same-BYTES", "BYTES", [0]),
        ("same-BOOL", "BOOL", [0]),
        ("matrix", "FP32", [0, 3]),
        ("pixels", "INT64", [0, 2, 2]),
        ("wide", "FP32", [3, 0]),
    ],
)
def test_no_rows_in_give_no_rows_out(
    client: httpx.Client, model: str, kind: str, shape: list[int]
) -> None:
    """An empty batch is a batch."""
    output = answer(client, model, request(tensor("x", kind, shape, [])))["outputs"][0]

    assert (output["shape"], output["data"]) == (shape, [])


def test_more_rows_than_one_batch_holds_come_back_in_order(client: httpx.Client) -> None:
    """A request beyond rows_max is split and put together again."""
    values = list(range(1000))
    output = answer(client, "same-INT64", request(tensor("x", "INT64", [1000], values)))["outputs"]

    assert output[0]["data"] == values


# -- models that cannot batch


def test_a_model_with_fixed_rows_takes_exactly_those(client: httpx.Client) -> None:
    """The first axis says four."""
    data = list(range(8))
    output = answer(client, "fixed", request(tensor("x", "FP32", [4, 2], data)))["outputs"][0]

    assert output["data"] == [2 * value for value in data]


def test_a_model_without_a_batch_axis_is_served(client: httpx.Client) -> None:
    """Three numbers are one example."""
    output = answer(client, "vector", request(tensor("x", "FP32", [3], [1, 2, 3])))["outputs"][0]

    assert (output["shape"], output["data"]) == ([1], [6.0])


@pytest.mark.parametrize("data", [21, [21]])
def test_a_scalar_is_a_tensor_without_axes(client: httpx.Client, data: object) -> None:
    """Shape [] holds one element, written bare or as a list of one."""
    output = answer(client, "scalar", request(tensor("x", "FP32", [], data)))["outputs"][0]

    assert (output["shape"], output["data"]) == ([], [42.0])


def test_rows_that_depend_on_each_other_stay_with_their_request(client: httpx.Client) -> None:
    """Row minus largest row: known in closed form for each request by itself."""
    output = answer(client, "centred", request(tensor("x", "FP32", [3, 2], [1, 5, 2, 4, 3, 3])))[
        "outputs"
    ][0]
    alone = answer(client, "centred", request(tensor("x", "FP32", [1, 2], [7, 9])))["outputs"][0]

    assert output["data"] == [-2, 0, -1, -1, 0, -2]
    assert alone["data"] == [0, 0]


def test_many_rows_may_become_one(client: httpx.Client) -> None:
    """The mean over rows has one row, and the answer's shape says so."""
    output = answer(client, "mean", request(tensor("x", "FP32", [2, 2], [1, 2, 3, 6])))["outputs"]

    assert (output[0]["shape"], output[0]["data"]) == ([1, 2], [2.0, 4.0])


# -- every datatype


def integers(kind: str) -> st.SearchStrategy[int]:
    limits = np.iinfo(kind.lower())
    low, high = int(limits.min), int(limits.max)
    return st.integers(low, high) | st.sampled_from([low, high, 0, high - 1, low + 1])


def floats(width: int) -> st.SearchStrategy[float]:
    limits = np.finfo(f"float{width}")
    edges = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal, -0.0]
    return st.floats(width=width) | st.sampled_from([float(edge) for edge in edges])


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    "BYTES": st.text(max_size=20)
    | st.sampled_from(["", "\x00", "a\x00b", "\u2028", "é", "\U0001f600", '"\\', "null", "NaN"]),
    "FP16": floats(16),
    "FP32": floats(32),
    "FP64": floats(64),
} | {
    kind: integers(kind)
    for kind in ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
}


@pytest.mark.parametrize("kind", list(models.ELEMENTS))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_every_value_of_a_datatype_comes_back_exactly(
    client: httpx.Client, kind: str, data: st.DataObject
) -> None:
    """Through JSON, numpy and ONNX, to the limits of the type; what is not finite becomes null.

    JSON has no NaN and no infinity: they are taken bare in a request, and answered as null.
    """
    values = data.draw(st.lists(VALUES[kind], min_size=1, max_size=20))
    output = answer(client, f"same-{kind}", request(tensor("x", kind, [len(values)], values)))[
        "outputs"
    ][0]

    assert output["datatype"] == kind
    assert output["shape"] == [len(values)]
    assert len(output["data"]) == len(values)
    for sent, got in zip(values, output["data"], strict=True):
        if isinstance(sent, float) and not math.isfinite(sent):
            assert got is None
        elif kind in NUMPY:
            assert NUMPY[kind](got) == NUMPY[kind](sent)
            assert math.copysign(1, got) == math.copysign(1, sent)
        else:
            assert got == sent
            assert type(got) is type(sent)


def test_whole_numbers_are_numbers_for_float_tensors(client: httpx.Client) -> None:
    """JSON writes 1 and 1.0 for the same number."""
    output = answer(client, "same-FP32", request(tensor("x", "FP32", [3], [1, 2.5, -3])))

    assert output["outputs"][0]["data"] == [1.0, 2.5, -3.0]


def test_integers_beyond_what_a_float_holds_are_exact(client: httpx.Client) -> None:
    """2^53 + 1 and the ends of the range: nothing goes through a double on the way."""
    values = [2**53 + 1, 2**63 - 1, -(2**63)]
    output = answer(client, "same-INT64", request(tensor("x", "INT64", [3], values)))

    assert output["outputs"][0]["data"] == values


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_bare_not_finite_numbers_are_read(client: httpx.Client, text: str) -> None:
    """They are not JSON, but Python's clients write them, and a missing value is worth counting."""
    body = '{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1.0,' + text + "]}]}"
    got = client.post("/v2/models/same-FP32/infer", content=body)

    assert got.json()["outputs"][0]["data"] == [1.0, None]


def test_unknown_fields_and_parameters_are_passed_over(client: httpx.Client) -> None:
    """Every server of the protocol does, so clients send some."""
    body = request(
        {**tensor("x", "FP32", [1], [1]), "parameters": {"content_type": "np"}, "extra": 1},
        parameters={"priority": 3, "sequence_id": "s"},
        anything={"at": ["all"]},
    )
    assert answer(client, "same-FP32", body)["outputs"][0]["data"] == [1.0]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_the_content_type_is_not_looked_at(client: httpx.Client, content_type: str | None) -> None:
    """tritonclient for Python sends none with JSON bodies."""
    headers = {"content-type": content_type} if content_type else {}
    body = request(tensor("x", "FP32", [1], [1]))

    assert infer(client, "same-FP32", body, headers=headers).status_code == 200


# -- verbs, paths, headers


def test_head_is_get_without_a_body(client: httpx.Client) -> None:
    """Load balancers probe with HEAD."""
    for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/matrix", "/metrics"):
        got = client.head(path)
        assert (got.status_code, got.content) == (200, b""), path


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v2/models/matrix/infer", "POST"),
        ("PUT", "/v2/models/matrix/infer", "POST"),
        ("DELETE", "/v2/models/matrix/versions/1/infer", "POST"),
        ("POST", "/v2", "GET"),
        ("POST", "/v2/models/matrix", "GET"),
        ("DELETE", "/v2/models/matrix", "GET"),
        ("POST", "/v2/health/live", "GET"),
        ("PATCH", "/metrics", "GET"),
        ("OPTIONS", "/drift", "GET"),
        ("TRACE", "/v2", "GET"),
        ("PROPFIND", "/v2/models/matrix", "GET"),
        ("MKCOL", "/drift/matrix", "GET"),
    ],
)
def test_a_wrong_verb_is_405_and_told_the_right_one(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    """405 with `Allow`, for every verb of HTTP that a client can write."""
    got = client.request(method, path)

    assert got.status_code == 405
    assert got.json()["code"] == "method_not_allowed"
    assert allowed in got.headers["allow"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v3", "not_found"),
        ("/v2/", "not_found"),
        ("/v2/health/live/", "not_found"),
        ("/v2/models", "not_found"),
        ("/v2/models/matrix/nothing", "not_found"),
        ("/v2/models/absent", "model_not_found"),
        ("/v2/models/absent/ready", "model_not_found"),
        ("/v2/models/matrix/versions/2", "version_not_found"),
        ("/v2/models/matrix/versions/2/ready", "version_not_found"),
        ("/v2/models/matrix/versions/01", "version_not_found"),
        ("/v2/models/matrix/versions/%D9%A1", "version_not_found"),
        ("/v2/models/..%2f..%2fetc", "not_found"),
        ("/drift/absent", "model_not_found"),
        ("/admin/models/absent", "model_not_found"),
        ("/%ff%00", "not_found"),
    ],
)
def test_a_name_that_nothing_has_is_404_with_a_stable_code(
    client: httpx.Client, path: str, code: str
) -> None:
    """Programs read `code`, people read `error`."""
    got = client.get(path)

    assert got.status_code == 404
    assert got.json()["code"] == code
    assert set(got.json()) == {"error", "code"}


def test_the_request_id_comes_back(client: httpx.Client) -> None:
    """It is the prediction's id: the client's own if it has one, also with an error."""
    for body, status in ((request(tensor("x", "FP32", [1], [1])), 200), ({}, 400)):
        got = infer(client, "same-FP32", body, headers={"x-request-id": "abc-123"})
        assert (got.status_code, got.headers["x-request-id"]) == (status, "abc-123")


def test_a_request_without_an_id_gets_one_of_its_own(client: httpx.Client) -> None:
    """No two are equal."""
    body = request(tensor("x", "FP32", [1], [1]))
    seen = {infer(client, "same-FP32", body).headers["x-request-id"] for _ in range(50)}

    assert len(seen) == 50
    assert all(re.fullmatch(r"[\x21-\x7e]{1,128}", name) for name in seen)


def test_one_connection_carries_answers_and_errors_alike(server: Server) -> None:
    """An error in the request does not cost the client its connection."""
    body = json.dumps(request(tensor("x", "FP32", [1], [1])))
    with server.client(limits=httpx.Limits(max_connections=1)) as client:
        ports = set()
        for content in (body, "nonsense", body, "{}", body):
            got = client.post("/v2/models/same-FP32/infer", content=content)
            ports.add(got.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(ports) == 1
