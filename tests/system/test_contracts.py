"""Contracts of other servers over a real socket, as their clients send and read them."""

import gzip
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gateway import __version__, config
from gateway.errors import ConfigError
from tests import models
from tests.serving import Server, driftgate, free_port, serve, wait_until

FRAME = {"columns": ["amount", "count", "place"], "data": [[1.5, 2, "Ö"], [None, 3.0, "b"]]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    models.put(registry, "mixed", 1, models.mixed())
    models.put(registry, "vector", 1, models.vector())
    models.put(registry, "text", 1, models.identity("BYTES"))
    for version in (2, 10):
        models.put(registry, "counted", version, models.constant(version))
    models.put(registry, "counted", 11, b"no model")
    with serve(registry, {"limits.body_bytes_max": 200_000}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


def score(client: httpx.Client, model: str, body: Any, **options: Any) -> httpx.Response:
    headers = {"x-driftgate-model": model} | options.pop("headers", {})
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    headers = {"content-type": "application/json"} | headers
    return client.post("/invocations", content=content, headers=headers, **options)


# -- KServe v1 and TensorFlow Serving


def test_rows_are_answered_with_predictions_and_columns_with_outputs(client: httpx.Client) -> None:
    """TensorFlow Serving's two forms; several outputs are named in both."""
    rows = {"instances": [{"amount": 1.5, "count": 2, "place": "Ö"}]}
    columns = {"inputs": {"amount": [1.5], "count": [2], "place": ["Ö"]}}

    by_row = client.post("/v1/models/mixed:predict", json=rows)
    by_column = client.post("/v1/models/mixed:predict", json=columns)

    assert by_row.json() == {"predictions": [{"twice": 3.0, "where": "Ö", "n_seen": 2}]}
    assert by_column.json() == {"outputs": {"twice": [3.0], "where": ["Ö"], "n_seen": [2]}}
    assert by_row.headers["content-type"] == "application/json"
    assert by_row.headers["x-request-id"]


def test_one_output_is_answered_without_its_name(client: httpx.Client) -> None:
    """The shape of the official examples: `{"predictions": [...]}`."""
    got = client.post("/v1/models/matrix:predict", json={"instances": [[1, 2, 3], [4, 5, 6]]})
    text = client.post("/v1/models/text:predict", json={"instances": [{"b64": "YWJj"}, "d"]})
    vector = client.post("/v1/models/vector:predict", json={"inputs": [1, 2, 3]})

    assert got.json() == {"predictions": [[1, 2, 3], [4, 5, 6]]}
    assert text.json() == {"predictions": ["abc", "d"]}
    assert vector.json() == {"outputs": [6.0]}


@pytest.mark.parametrize(
    ("path", "answer"),
    [("", 10.0), ("/versions/2", 2.0), ("/versions/10", 10.0), ("/labels/champion", 10.0)],
)
def test_a_version_or_label_in_the_path_picks_who_answers(
    client: httpx.Client, path: str, answer: float
) -> None:
    """The highest that opens is the champion; any other is called by its number."""
    got = client.post(f"/v1/models/counted{path}:predict", json={"instances": [0.5]})

    assert got.json() == {"predictions": [answer]}


@pytest.mark.parametrize(
    ("verb", "path", "status", "word"),
    [
        ("POST", "/v1/models/counte:predict", 404, "did you mean 'counted'"),
        ("POST", "/v1/models/counted/versions/3:predict", 404, "version '3'"),
        ("POST", "/v1/models/counted/versions/x:predict", 404, "version 'x'"),
        ("POST", "/v1/models/counted/versions/11:predict", 503, "refused"),
        ("POST", "/v1/models/counted/labels/stable:predict", 404, "label 'stable'"),
        ("POST", "/v1/models/counted:explain", 501, ":predict"),
        ("POST", "/v1/models/counted:classify", 501, ":predict"),
        ("POST", "/v1/models/counted/versions/2:regress", 501, ":predict"),
        ("GET", "/v1/models/counted:predict", 405, "POST"),
        ("GET", "/v1/models/counte", 404, "did you mean 'counted'"),
        ("GET", "/v1/models/counted/versions/11", 503, "refused"),
        ("GET", "/v1/models/counte/metadata", 404, "did you mean 'counted'"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(
    client: httpx.Client, verb: str, path: str, status: int, word: str
) -> None:
    """`error` is the field that these clients read; `code` is for programs."""
    got = client.request(verb, path, json={"instances": [1]} if verb == "POST" else None)

    assert got.status_code == status, got.text
    assert set(got.json()) == {"error", "code"}
    assert word in got.json()["error"]


def test_models_and_versions_tell_their_state(client: httpx.Client) -> None:
    """KServe's list and readiness, TensorFlow Serving's states, in one body."""
    listed = client.get("/v1/models").json()
    one = client.get("/v1/models/counted").json()

    assert listed == {"models": ["counted", "matrix", "mixed", "text", "vector"]}
    assert (one["name"], one["ready"]) == ("counted", True)
    states = {s["version"]: s["state"] for s in one["model_version_status"]}
    assert states == {"2": "AVAILABLE", "10": "AVAILABLE", "11": "END"}
    only = client.get("/v1/models/counted/versions/2").json()["model_version_status"]
    assert [status["version"] for status in only] == ["2"]


def test_metadata_tells_the_signature(client: httpx.Client) -> None:
    """TensorFlow Serving's shape, of the champion or of a version."""
    about = client.get("/v1/models/counted/metadata").json()
    older = client.get("/v1/models/counted/versions/2/metadata").json()

    assert about["model_spec"]["version"] == "10"
    assert older["model_spec"]["version"] == "2"
    definition = about["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert definition["inputs"]["x"]["dtype"] == "DT_FLOAT"


# -- MLflow


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": FRAME},
        {"dataframe_records": [dict(zip(FRAME["columns"], r, strict=True)) for r in FRAME["data"]]},
    ],
    ids=["split", "records"],
)
def test_data_frames_are_answered_with_records(client: httpx.Client, body: Any) -> None:
    """A missing number comes as null, and goes back as null."""
    got = score(client, "mixed", body, headers={"content-type": "application/json; charset=UTF-8"})

    assert got.json() == {
        "predictions": [
            {"twice": 3.0, "where": "Ö", "n_seen": 2},
            {"twice": None, "where": "b", "n_seen": 3},
        ]
    }


def test_csv_is_answered_like_the_data_frame_it_is(client: httpx.Client) -> None:
    """The header names the columns, in any order."""
    text = "place,count,amount\nÖ,2,1.5\nb,3,\n"

    got = score(client, "mixed", text.encode(), headers={"content-type": "text/csv"})

    assert got.json() == score(client, "mixed", {"dataframe_split": FRAME}).json()


def test_a_packed_body_is_read(client: httpx.Client) -> None:
    """What every prediction path can do, these can too."""
    body = gzip.compress(json.dumps({"instances": [[1, 2, 3]]}).encode())

    got = score(client, "matrix", body, headers={"content-encoding": "gzip"})

    assert got.json() == {"predictions": [[1, 2, 3]]}


@pytest.mark.parametrize("path", ["/ping", "/health"])
def test_ping_is_a_line_feed_when_predictions_are_answered(client: httpx.Client, path: str) -> None:
    """MLflow's body; SageMaker looks at the status only."""
    assert (client.get(path).status_code, client.get(path).text) == (200, "\n")
    assert client.get("/version").text == __version__
    assert client.get("/").json() == {"status": "alive"}


@pytest.mark.parametrize(
    ("content_type", "word"),
    [
        ("text/plain", "text/plain"),
        ("application/x-npy", "application/x-npy"),
        ("multipart/form-data; boundary=x", "multipart"),
        ("application/json; charset=latin-1", "latin-1"),
        ("text/csv; charset=utf-16", "utf-16"),
    ],
)
def test_other_types_and_charsets_are_415(
    client: httpx.Client, content_type: str, word: str
) -> None:
    """MLflow answers so too; the sentence says what is read."""
    got = score(client, "matrix", "{}", headers={"content-type": content_type})

    assert got.status_code == 415
    assert got.json()["code"] == "unsupported_media_type"
    assert word in got.json()["message"]
    assert "text/csv" in got.json()["message"]


@pytest.mark.parametrize(
    ("body", "status", "error_code", "word"),
    [
        ({}, 400, "BAD_REQUEST", "exactly one"),
        ("[1]", 400, "BAD_REQUEST", "a list"),
        ("{", 400, "BAD_REQUEST", "not JSON"),
        ({"instances": [["a", 2, 3]]}, 400, "INVALID_PARAMETER_VALUE", "'a'"),
        ({"dataframe_split": {"columns": ["a"], "data": [[1]]}}, 400, "INVALID_PARAMETER_VALUE",
         "takes 3 columns"),
        ("x" * 300_000, 413, "BAD_REQUEST", "longer than"),
    ],
)  # fmt: skip
def test_errors_are_told_as_mlflow_clients_and_as_ours_read_them(
    client: httpx.Client, body: Any, status: int, error_code: str, word: str
) -> None:
    """`error_code` and `message` beside `error` and `code`."""
    got = score(client, "matrix", body)

    told = got.json()
    assert (got.status_code, told["error_code"]) == (status, error_code)
    assert word in told["message"]
    assert told["error"] == told["message"]
    assert told["code"]


# -- which model


def test_without_a_name_several_models_are_listed(client: httpx.Client) -> None:
    """404, with the names there are."""
    got = client.post("/invocations", json={"instances": [1]})

    assert (got.status_code, got.json()["code"]) == (404, "model_not_named")
    assert "counted, matrix, mixed, text, vector" in got.json()["message"]


@pytest.mark.parametrize("named", ["counted", "/counted", "counted.tar.gz"])
def test_sagemakers_target_model_names_the_model(client: httpx.Client, named: str) -> None:
    """It names an archive there; the other headers of the platform are of no meaning here."""
    headers = {
        "X-Amzn-SageMaker-Target-Model": named,
        "X-Amzn-SageMaker-Custom-Attributes": "trace=1",
        "X-Amzn-SageMaker-Inference-Id": "7",
    }

    got = client.post("/invocations", json={"instances": [1]}, headers=headers)

    assert got.json() == {"predictions": [10.0]}


@pytest.mark.parametrize("named", ["../../etc/passwd", "count", "%2e%2e", "a" * 5000])
def test_a_name_that_nothing_has_is_404(client: httpx.Client, named: str) -> None:
    """Names are looked up, never joined to a path."""
    got = score(client, named, {"instances": [1]})

    assert (got.status_code, got.json()["code"]) == (404, "model_not_found")
    assert len(got.text) < 1000


def test_the_setting_names_the_model(tmp_path: Path) -> None:
    """And a header goes before it."""
    for k, name in enumerate(("one", "two")):
        models.put(tmp_path, name, 1, models.constant(k + 1))

    with serve(tmp_path, {"model": "two"}) as running, running.client() as client:
        by_setting = client.post("/score", json={"instances": [0]})
        by_header = score(client, "one", {"instances": [0]})

    assert by_setting.json() == {"predictions": [2.0]}
    assert by_header.json() == {"predictions": [1.0]}


# -- SageMaker and Vertex AI

V2 = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}


def test_invocations_answers_the_open_inference_protocol_in_kind(client: httpx.Client) -> None:
    """Triton's SageMaker front end takes such bodies there."""
    got = score(client, "matrix", V2)

    assert got.json()["model_name"] == "matrix"
    assert got.json()["outputs"][0]["data"] == [1, 2, 3]


@pytest.mark.parametrize("platform", ["sagemaker", "vertex-ai"])
def test_raw_tensors_go_through_a_platform_that_drops_headers(
    client: httpx.Client, platform: str
) -> None:
    """The length of the JSON part stands in the content type, both ways."""
    rows = np.float32([[1, 2, 3]])
    told = {
        "name": "x",
        "datatype": "FP32",
        "shape": [1, 3],
        "parameters": {"binary_data_size": 12},
    }
    head = json.dumps({"inputs": [told], "parameters": {"binary_data_output": True}}).encode()
    media = f"application/vnd.{platform}-triton.binary+json;json-header-size="

    got = score(
        client, "matrix", head + rows.tobytes(), headers={"content-type": f"{media}{len(head)}"}
    )

    assert got.status_code == 200, got.text
    assert got.headers["content-type"].startswith(media)
    size = int(got.headers["content-type"].removeprefix(media))
    assert json.loads(got.content[:size])["outputs"][0]["name"] == "y"
    assert got.content[size:] == rows.tobytes()


@pytest.mark.parametrize("size", ["", "-1", "9" * 30, "999999", "1e3", "0x10"])
def test_a_length_of_json_that_lies_is_refused(client: httpx.Client, size: str) -> None:
    """Longer than the body, or no number."""
    media = f"application/vnd.sagemaker-triton.binary+json;json-header-size={size}"

    got = score(client, "matrix", b"{}", headers={"content-type": media})

    assert got.status_code == 400, got.text


def test_a_platforms_own_port_and_paths_are_read_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vertex AI says all three in the environment of the container."""
    models.put(tmp_path, "matrix", 1, models.identity("FP32", ("n", 3)))
    port = free_port()
    route = "/v1/endpoints/17/deployedModels/42"
    monkeypatch.setenv("AIP_HTTP_PORT", str(port))
    monkeypatch.setenv("AIP_HEALTH_ROUTE", route)
    monkeypatch.setenv("AIP_PREDICT_ROUTE", route + ":predict")

    with serve(tmp_path, flags=()) as running, running.client() as client:
        assert running.address[1] == port
        assert client.get(route).text == "\n"
        got = client.post(
            route + ":predict", json={"instances": [[1, 2, 3]], "parameters": {"a": 1}}
        )

    assert got.json() == {"predictions": [[1, 2, 3]]}


def test_a_platforms_variables_go_over_defaults_only(tmp_path: Path) -> None:
    """A file, our own variable and a flag each say more than the platform does."""
    sagemaker = {"SAGEMAKER_BIND_TO_PORT": "8080"}
    file = tmp_path / "driftgate.yaml"
    file.write_text("port: 1234")

    assert config.load({}, environ=sagemaker).port == 8080
    assert config.load({}, environ={"AIP_HTTP_PORT": "8081"}).port == 8081
    assert config.load({}, environ=sagemaker, file=file).port == 1234
    assert config.load({}, environ=sagemaker | {"DRIFTGATE_PORT": "9"}).port == 9
    assert config.load({"port": 10}, environ=sagemaker).port == 10


@pytest.mark.parametrize(
    ("key", "value"),
    [("predict_path", "predict"), ("health_path", "/a?b"), ("predict_path", "/{x}"),
     ("health_path", "/a b"), ("model", "../up"), ("model", "a b")],
)  # fmt: skip
def test_paths_and_names_that_cannot_be_are_refused_at_start(key: str, value: str) -> None:
    """With the key."""
    with pytest.raises(ConfigError, match=key):
        config.load({key: value}, environ={})


def test_a_path_that_is_there_already_keeps_its_meaning(tmp_path: Path) -> None:
    """Vertex AI containers often name /ping and /invocations themselves."""
    models.put(tmp_path, "matrix", 1, models.identity("FP32", ("n", 3)))
    chosen = {"health_path": "/v2/health/ready", "predict_path": "/invocations"}

    with serve(tmp_path, chosen) as running, running.client() as client:
        assert client.get("/v2/health/ready").json() == {"ready": True}
        got = client.post("/invocations", json={"instances": [[1, 2, 3]]})

    assert got.json() == {"predictions": [[1, 2, 3]]}


# -- the same path as every prediction


def test_nothing_is_ready_while_no_model_opens(tmp_path: Path) -> None:
    """A container is not given traffic before it can answer some."""
    models.put(tmp_path, "broken", 1, b"no model")

    with serve(tmp_path) as running, running.client() as client:
        ping = client.get("/ping")
        status = client.get("/v1/models/broken")
        alive = client.get("/")

    assert (ping.status_code, status.status_code, alive.status_code) == (503, 503, 200)
    assert ping.json()["code"] == "not_ready"


def test_columns_in_another_order_are_the_same_rows_and_are_observed(tmp_path: Path) -> None:
    """The profile of a matrix keeps the names of the training data's columns; the tap sees all."""
    place = models.put(tmp_path, "matrix", 1, models.identity("FP32", ("n", 3)))
    data = tmp_path / "training.csv"
    data.write_text("width,height,depth\n" + "\n".join(f"{k},{k * 2},{k * 3}" for k in range(50)))
    made = driftgate("profile", str(data), "--model", str(place / "model.onnx"),
                     "-o", str(place / "reference.json"))  # fmt: skip
    assert made.returncode == 0, made.stderr

    with serve(tmp_path) as running, running.client() as client:
        frame = {"columns": ["depth", "width", "height"], "data": [[3, 1, 2]]}
        got = client.post("/invocations", json={"dataframe_split": frame})
        csv = client.post("/invocations", content=b"height,more,depth,width\n2,x,3,1\n",
                          headers={"content-type": "text/csv"})  # fmt: skip
        named = client.post("/v1/models/matrix:predict",
                            json={"instances": [{"height": 2, "depth": 3, "width": 1}]},
                            )  # fmt: skip
        lost = client.post("/invocations", json={"dataframe_records": [{"width": 1, "depth": 3}]})
        wait_until(
            lambda: client.get("/drift/matrix").json()["rows_observed"] == 3,
            "the three rows that were answered are observed",
        )

    assert got.json() == csv.json() == named.json() == {"predictions": [[1, 2, 3]]}
    assert lost.status_code == 400
    assert "column 'height' is missing" in lost.json()["message"]


def test_predictions_of_every_contract_are_counted(client: httpx.Client) -> None:
    """One path, many skins: the same counters."""

    def answered() -> float:
        name = 'driftgate_requests_total{code="ok",model="vector",'
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = answered()
    client.post("/v1/models/vector:predict", json={"inputs": [1, 2, 3]}).raise_for_status()
    score(client, "vector", {"inputs": [1, 2, 3]}).raise_for_status()

    assert answered() == before + 2


def test_mutilated_bodies_are_refused_and_never_fail_the_server(client: httpx.Client) -> None:
    """Bytes changed, cut and doubled at random, with seed 5: an answer or a refusal, and soon."""
    chance = random.Random(5)
    seeds = [
        (json.dumps({"dataframe_split": FRAME}).encode(), "application/json"),
        (json.dumps({"instances": [{"amount": 1, "count": 2, "place": "b"}]}).encode(), ""),
        (b"amount,count,place\n1.5,2,b\n", "text/csv"),
        (json.dumps({"inputs": {"amount": [1], "count": [2], "place": [{"b64": "YQ=="}]}}).encode(),
         "application/json"),
    ]  # fmt: skip
    for _ in range(300):
        body, content_type = chance.choice(seeds)
        changed = bytearray(body)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(changed) or 1)
            piece = chance.choice(
                [b"", b"[", b"{", b"\x00", b"null", b"NaN", b"1e999", b"\xff", b'"']
            )
            changed[at : at + chance.randint(0, 3)] = piece
        start = time.monotonic()
        got = score(client, "mixed", bytes(changed), headers={"content-type": content_type})
        assert got.status_code in {200, 400}, (bytes(changed), got.text)
        assert time.monotonic() - start < 5
