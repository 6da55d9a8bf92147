"""What Triton added to the protocol, over a real socket: binary tensors, packing, classes, counts,
configuration, the repository."""

import gzip
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ml_dtypes
import msgpack
import numpy as np
import pytest

from tests import models
from tests.serving import Server, request, serve, tensor, wait_until

LENGTH = "inference-header-content-length"
FP32 = np.dtype("<f4")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    for kind in models.ELEMENTS:
        models.put(registry, f"same-{kind}", 1, models.identity(kind))
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    models.put(registry, "pair", 1, models.sum_and_difference())
    models.put(registry, "fixed", 1, models.fixed_rows())
    models.put(registry, "scalar", 1, models.scalar())
    models.put(registry, "lookup", 1, models.lookup())
    models.put(registry, "half", 1, models.half())
    models.put(registry, "half-text", 1, models.half_and_text())
    for version in (2, 9, 10):
        models.put(registry, "counted", version, models.constant(version))
    (registry / "counted" / "11").mkdir()
    (registry / "counted" / "11" / "model.onnx").write_bytes(b"no model")
    with serve(registry, {"limits.body_bytes_max": 4_000_000}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client(headers={"accept-encoding": "identity"}) as opened:
        yield opened


def raw(name: str, kind: str, shape: list[int], data: bytes) -> tuple[dict[str, Any], bytes]:
    """One input behind the JSON."""
    parameters = {"binary_data_size": len(data)}
    return {"name": name, "datatype": kind, "shape": shape, "parameters": parameters}, data


def post(
    client: httpx.Client, model: str, *tensors: tuple[dict[str, Any], bytes], **more: Any
) -> httpx.Response:
    """A request whose tensors follow the JSON."""
    head = json.dumps({"inputs": [given for given, _ in tensors], **more}).encode()
    content = head + b"".join(data for _, data in tensors)
    headers = {LENGTH: str(len(head)), "content-type": "application/octet-stream"}
    return client.post(f"/v2/models/{model}/infer", content=content, headers=headers)


def parts(got: httpx.Response) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The JSON of an answer, and its raw outputs by name."""
    assert got.status_code == 200, got.text
    length = int(got.headers.get(LENGTH, len(got.content)))
    said, at, found = json.loads(got.content[:length]), length, {}
    for output in said["outputs"]:
        if "parameters" in output:
            # The C++ client fails on any other parameter.
            assert list(output["parameters"]) == ["binary_data_size"]
            to = at + output["parameters"]["binary_data_size"]
            found[output["name"]] = got.content[at:to]
            at = to
    assert at == len(got.content), "bytes that belong to no output"
    return said, found


# -- binary tensors

ALL_RAW = {"parameters": {"binary_data_output": True}}


@pytest.mark.parametrize("kind", [kind for kind in models.ELEMENTS if kind != "BYTES"])
def test_every_bit_of_a_datatype_comes_back(client: httpx.Client, kind: str) -> None:
    """Raw in, through ONNX, raw out: also what JSON has no word for."""
    size = {"BOOL": 1, "FP16": 2, "FP32": 4, "FP64": 8}.get(kind) or int(kind.strip("UINT")) // 8
    data = bytes([1, 0] * 8) if kind == "BOOL" else np.random.default_rng(1).bytes(16 * size)
    if kind.startswith("FP"):
        floats = np.frombuffer(data, f"<f{size}").copy()
        floats[:3] = np.nan, np.inf, -np.inf
        data = floats.tobytes()
    got = post(client, f"same-{kind}", raw("x", kind, [16], data), **ALL_RAW)
    said, found = parts(got)

    assert found == {"y": data}
    assert (said["outputs"][0]["datatype"], said["outputs"][0]["shape"]) == (kind, [16])
    assert got.headers["content-type"] == "application/octet-stream"


def test_texts_come_back(client: httpx.Client) -> None:
    """A length and UTF-8 for each; other bytes are refused, since ONNX has texts only."""
    data = b"".join(struct.pack("<I", len(t)) + t for t in (b"", "né\0".encode(), b"x" * 300))
    got = post(client, "same-BYTES", raw("x", "BYTES", [3], data), **ALL_RAW)
    assert parts(got)[1] == {"y": data}

    got = post(client, "same-BYTES", raw("x", "BYTES", [1], b"\1\0\0\0\xff"))
    assert (got.status_code, got.json()["code"]) == (400, "bad_tensor")
    assert "UTF-8" in got.json()["error"]


def test_each_output_is_written_as_it_was_asked_for(client: httpx.Client) -> None:
    """Raw and JSON side by side, in the order asked for."""
    ones = np.ones((1, 2), FP32).tobytes()
    got = post(
        client,
        "pair",
        raw("a", "FP32", [1, 2], ones),
        raw("b", "FP32", [1, 2], ones),
        outputs=[{"name": "difference"}, {"name": "sum", "parameters": {"binary_data": True}}],
    )
    said, found = parts(got)

    assert [output["name"] for output in said["outputs"]] == ["difference", "sum"]
    assert said["outputs"][0]["data"] == [0, 0]
    assert np.frombuffer(found["sum"], FP32).tolist() == [2, 2]


def test_a_request_of_json_may_ask_for_raw_outputs(client: httpx.Client) -> None:
    """No length header is needed where nothing follows; one that counts all the JSON is fine."""
    body = request(tensor("x", "FP32", [2], [1.5, 2]), **ALL_RAW)
    content = json.dumps(body).encode()
    for headers in ({}, {LENGTH: str(len(content))}):
        got = client.post("/v2/models/same-FP32/infer", content=content, headers=headers)
        assert np.frombuffer(parts(got)[1]["y"], FP32).tolist() == [1.5, 2]


def test_no_rows_make_an_answer_without_anything_behind_the_json(client: httpx.Client) -> None:
    """Then it is JSON and has no length header."""
    got = post(client, "matrix", raw("x", "FP32", [0, 3], b""), **ALL_RAW)
    said, found = parts(got)

    assert (said["outputs"][0]["shape"], found) == ([0, 3], {"y": b""})
    assert got.headers["content-type"] == "application/json"
    assert LENGTH not in got.headers


def test_a_body_may_be_one_tensor_and_nothing_else(client: httpx.Client) -> None:
    """Length 0: one row, and all outputs come back raw."""
    row = np.float32([1, 2, 3]).tobytes()
    got = client.post("/v2/models/matrix/infer", content=row, headers={LENGTH: "0"})
    said, found = parts(got)
    assert (said["outputs"][0]["shape"], found["y"]) == ([1, 3], row)
    got = client.post("/v2/models/scalar/infer", content=row[:4], headers={LENGTH: "0"})
    assert np.frombuffer(parts(got)[1]["y"], FP32).tolist() == [2]
    got = client.post("/v2/models/pair/infer", content=row, headers={LENGTH: "0"})
    assert (got.status_code, got.json()["code"]) == (400, "bad_tensor")


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999999999999999999", "999"])
def test_a_length_that_cannot_be_is_refused(client: httpx.Client, length: str) -> None:
    """400 with the header's name, whatever the body."""
    got = client.post("/v2/models/matrix/infer", content=b"{}", headers={LENGTH: length})

    assert got.status_code == 400
    assert "Inference-Header-Content-Length" in got.json()["error"]


def test_large_tensors_need_no_json_limit(client: httpx.Client) -> None:
    """Three megabytes behind a hundred bytes of JSON; the sum has a limit of its own."""
    data = np.arange(8190 * 3, dtype=FP32).tobytes()
    _, found = parts(post(client, "matrix", raw("x", "FP32", [8190, 3], data), **ALL_RAW))
    assert found["y"] == data
    got = post(client, "matrix", raw("x", "FP32", [400_000, 3], bytes(4_800_000)))
    assert (got.status_code, got.json()["code"]) == (413, "too_large")


def test_bf16_comes_and_goes_raw_or_as_numbers(client: httpx.Client) -> None:
    """Bits are kept, arithmetic is right, and rows of several requests may share a run."""
    values = np.float32([1.5, -2.25, 1e30, np.nan]).astype(ml_dtypes.bfloat16)
    ones = np.ones(4, FP32).tobytes()
    inputs = raw("b", "BF16", [4, 1], values.tobytes()), raw("f", "FP32", [4, 1], ones)
    _, found = parts(post(client, "half", *inputs, **ALL_RAW))
    assert found["same"] == values.tobytes()
    sums = np.frombuffer(found["sum"], FP32)
    assert np.array_equal(sums, values.astype(np.float32) + 1, equal_nan=True)

    body = request(tensor("b", "BF16", [1, 1], [2.5]), tensor("f", "FP32", [1, 1], [1]))
    outputs = client.post("/v2/models/half/infer", json=body).json()["outputs"]
    assert [(o["datatype"], o["data"]) for o in outputs] == [("BF16", [2.5]), ("FP32", [3.5])]
    about = client.get("/v2/models/half").json()
    assert about["inputs"][0]["datatype"] == "BF16"
    assert client.get("/admin/models/half").json()["versions"][0]["batched"].startswith("up to")
    got = client.get("/v2/models/half-text")
    assert (got.status_code, got.json()["code"]) == (503, "version_refused")
    assert "BF16" in got.json()["error"]


# -- formats by their content type

BODY = request(tensor("x", "FP32", [1, 3], [1, 2, 3]))


@pytest.mark.parametrize("kind", ["application/msgpack", "application/x-msgpack; v=5"])
def test_messagepack_is_known_by_its_type(client: httpx.Client, kind: str) -> None:
    """The same path, another format."""
    got = client.post(
        "/v2/models/matrix/infer", content=msgpack.packb(BODY), headers={"content-type": kind}
    )
    assert got.status_code == 200, got.text
    assert msgpack.unpackb(got.content)["model_name"] == "matrix"


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data; boundary=x", "application/xml", "text/xml", "image/png", "text/csv",
     "application/soap+xml", "application/x-protobuf", "application/grpc", "application/zip",
     "application/yaml", "Text/HTML", "application/vnd.apache.parquet"],
)  # fmt: skip
def test_another_format_is_415(client: httpx.Client, kind: str) -> None:
    """With a sentence that names what can be sent."""
    got = client.post("/v2/models/matrix/infer", json=BODY, headers={"content-type": kind})

    assert (got.status_code, got.json()["code"]) == (415, "unsupported_media_type")
    assert "application/json" in got.json()["error"]


@pytest.mark.parametrize(
    "kind",
    ["application/json; charset=utf-8", "application/vnd.custom+json", "text/json", "text/plain",
     "application/x-www-form-urlencoded", "application/octet-stream", "nonsense", "\xff", ""],
)  # fmt: skip
def test_any_other_type_is_read_as_the_protocol(client: httpx.Client, kind: str) -> None:
    """curl says form, tritonclient nothing: the type need not be right."""
    got = client.post(
        "/v2/models/matrix/infer", json=BODY, headers={"content-type": kind.encode("latin-1")}
    )
    assert got.status_code == 200, got.text


# -- packed bodies


@pytest.mark.parametrize(
    ("coding", "pack"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)],
)
def test_packed_bodies_are_read(client: httpx.Client, coding: str, pack: Any) -> None:
    """The header counts unpacked JSON; JSON and tensors are packed as one."""
    given, data = raw("x", "FP32", [2000, 3], np.arange(6000, dtype=FP32).tobytes())
    head = json.dumps({"inputs": [given], **ALL_RAW}).encode()
    got = client.post(
        "/v2/models/matrix/infer",
        content=pack(head + data),
        headers={LENGTH: str(len(head)), "content-encoding": coding},
    )
    assert parts(got)[1] == {"y": data}
    got = client.post(
        "/v2/models/matrix/infer",
        content=pack(json.dumps(BODY).encode()),
        headers={"content-encoding": coding},
    )
    assert got.json()["outputs"][0]["data"] == [1, 2, 3]


def test_what_is_wrong_with_a_packed_body_is_told(client: httpx.Client) -> None:
    """Cut off, followed by more, damaged: 400; a bomb: 413; an unknown coding: 415."""
    packed = gzip.compress(json.dumps(BODY).encode())
    bomb = gzip.compress(bytes(3_900_000))
    huge = gzip.compress(np.random.default_rng(0).integers(0, 4, 5_000_000).astype("u1").tobytes())
    for content, coding, status in (
        (packed[:-9], "gzip", 400), (packed + b"more", "gzip", 400),
        (packed[:-8] + bytes(8), "gzip", 400), (packed, "deflate", 400), (b"", "gzip", 400),
        (bomb, "gzip", 413), (huge, "gzip", 413), (packed, "br", 415), (packed, "gzip, gzip", 415),
    ):  # fmt: skip
        got = client.post(
            "/v2/models/matrix/infer", content=content, headers={"content-encoding": coding}
        )
        assert got.status_code == status, (coding, got.text)
        assert (got.headers.get("accept-encoding") == "gzip, deflate") == (status == 415)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("rows", [500, 8000])
def test_answers_are_packed_when_asked_and_when_it_pays(
    server: Server, coding: str, rows: int
) -> None:
    """More than a kibibyte that gets shorter; the length header counts what was unpacked."""
    body = request(tensor("x", "FP32", [rows, 3], [1.5] * rows * 3))
    with server.client(headers={"accept-encoding": coding}) as client:
        got = client.post("/v2/models/matrix/infer", json=body)
        assert got.headers["content-encoding"] == coding
        assert int(got.headers["content-length"]) < 4000
        assert got.json()["outputs"][0]["data"] == body["inputs"][0]["data"]

        got = client.post("/v2/models/matrix/infer", json=body | ALL_RAW)
        assert got.headers["content-encoding"] == coding
        assert parts(got)[1]["y"] == np.full(rows * 3, 1.5, FP32).tobytes()

        short = client.post("/v2/models/matrix/infer", json=BODY)
        assert "content-encoding" not in short.headers
        noise = np.random.default_rng(0).bytes(12_000)
        got = post(client, "matrix", raw("x", "FP32", [1000, 3], noise), **ALL_RAW)
        assert "content-encoding" not in got.headers


# -- classes


def test_classes_of_an_output(client: httpx.Client) -> None:
    """BYTES of `value:index`, the largest first, as JSON and raw; the monitors see numbers."""
    outputs = [{"name": "y", "parameters": {"classification": 2}}]
    body = request(tensor("x", "FP32", [2, 3], [1, 4, 2.5, -1, -3, -2]), outputs=outputs)
    output = client.post("/v2/models/matrix/infer", json=body).json()["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    assert output["data"] == ["4.000000:1", "2.500000:2", "-1.000000:0", "-2.000000:2"]

    outputs[0]["parameters"] = {"classification": 1, "binary_data": True}  # type: ignore[dict-item]
    got = client.post("/v2/models/matrix/infer", json=body)
    element = b"4.000000:1"
    assert parts(got)[1]["y"].startswith(struct.pack("<I", len(element)) + element)


def test_texts_cannot_be_classified(client: httpx.Client) -> None:
    """Told before anything runs."""
    outputs = [{"name": "y", "parameters": {"classification": 2}}]
    body = request(tensor("x", "BYTES", [1], ["a"]), outputs=outputs)
    got = client.post("/v2/models/same-BYTES/infer", json=body)

    assert (got.status_code, got.json()["code"]) == (400, "bad_tensor")


# -- metadata, configuration, statistics


def test_only_what_works_is_announced(client: httpx.Client) -> None:
    """Each of these names has its tests in this file."""
    assert client.get("/v2").json()["extensions"] == [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "model_repository",
        "statistics",
    ]


@pytest.mark.parametrize("model", ["matrix", "pair", "same-BYTES", "fixed", "scalar", "half"])
def test_the_configuration_agrees_with_the_metadata(client: httpx.Client, model: str) -> None:
    """max_batch_size > 0 exactly where shapes have a first -1 that dims lack."""
    about = client.get(f"/v2/models/{model}").json()
    config = client.get(f"/v2/models/{model}/versions/1/config").json()

    assert config["name"] == model
    assert config["model_transaction_policy"]["decoupled"] is False
    assert config["response_cache"]["enable"] is False
    for role in ("input", "output"):
        for spec, configured in zip(about[f"{role}s"], config[role], strict=True):
            kind = {"BYTES": "STRING"}.get(spec["datatype"], spec["datatype"])
            before = [-1] if config["max_batch_size"] > 0 else []
            assert (configured["name"], configured["data_type"]) == (spec["name"], f"TYPE_{kind}")
            assert before + configured["dims"] == spec["shape"]
            assert configured["is_shape_tensor"] is False
    assert (config["max_batch_size"] > 0) == (model in ("matrix", "pair", "half"))
    assert ("dynamic_batching" in config) == (config["max_batch_size"] > 0)


STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
          "cache_hit", "cache_miss")  # fmt: skip


def stats(client: httpx.Client, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get(f"/v2/models{path}/stats").json()["model_stats"]
    for entry in found:
        assert set(entry["inference_stats"]) == set(STAGES)
        for numbers in entry["inference_stats"].values():
            assert {type(numbers["count"]), type(numbers["ns"])} == {int}
    return found


def test_statistics_count_requests_rows_and_runs(client: httpx.Client) -> None:
    """Differences of two samples, as load generators read them; a call by number counts too."""
    for model, ok in (("lookup", 1), ("lookup/versions/1", 2)):
        body = request(tensor("index", "INT64", [3], [0, 1, 2]))
        before = stats(client, "/lookup")[0]
        for _ in range(ok):
            assert client.post(f"/v2/models/{model}/infer", json=body).status_code == 200
        wrong = request(tensor("index", "INT64", [1], [99]))
        assert client.post(f"/v2/models/{model}/infer", json=wrong).status_code == 400
        after = stats(client, "/lookup/versions/1")[0]

        was, now = before["inference_stats"], after["inference_stats"]
        assert now["success"]["count"] - was["success"]["count"] == ok
        assert now["fail"]["count"] - was["fail"]["count"] == 1
        assert now["fail"]["ns"] > was["fail"]["ns"]
        assert now["queue"]["count"] - was["queue"]["count"] == ok + 1
        assert after["inference_count"] - before["inference_count"] == ok
        assert after["execution_count"] - before["execution_count"] == ok + 1
        spent = {stage: now[stage]["ns"] - was[stage]["ns"] for stage in STAGES}
        assert 0 < spent["compute_infer"] < spent["success"] + spent["fail"]
        assert after["last_inference"] > 1.7e12
    before = stats(client, "/matrix")[0]
    body = request(tensor("x", "FP32", [5, 3], [0] * 15))
    assert client.post("/v2/models/matrix/infer", json=body).status_code == 200
    after = stats(client, "/matrix")[0]
    assert after["inference_count"] - before["inference_count"] == 5, "rows, where rows count"


def test_statistics_of_all_models_are_those_of_each(client: httpx.Client) -> None:
    """Open versions, by name and number; a version that nobody has called has counted nothing."""
    every = {(entry["name"], entry["version"]) for entry in stats(client, "")}

    assert {("matrix", "1"), ("counted", "10"), ("scalar", "1")} <= every
    assert stats(client, "/counted/versions/2")[0]["inference_stats"]["success"]["count"] == 0
    assert client.get("/v2/models/absent/stats").status_code == 404
    assert client.get("/v2/models/counted/versions/7/stats").status_code == 404


# -- the repository


def index(client: httpx.Client, **body: Any) -> dict[tuple[str, str], dict[str, str]]:
    listed = client.post("/v2/repository/index", json=body).json()
    return {(entry["name"], entry["version"]): entry for entry in listed}


def test_the_index_lists_every_version_with_its_state(client: httpx.Client) -> None:
    """A body is optional; `ready` leaves out what cannot be called."""
    listed = index(client)
    assert client.post("/v2/repository/index").json() == list(listed.values())
    assert listed["counted", "11"]["state"] == "UNAVAILABLE"
    assert listed["counted", "11"]["reason"]
    assert {listed["counted", version]["state"] for version in ("2", "9", "10")} == {"READY"}
    assert ("counted", "11") not in index(client, ready=True)
    for (name, version), entry in listed.items():
        ready = client.get(f"/v2/models/{name}/versions/{version}/ready").status_code == 200
        assert ready == (entry["state"] == "READY"), entry
    assert client.post("/v2/repository/index", json={"ready": "yes"}).status_code == 400


def test_an_unloaded_model_answers_nothing_until_it_is_loaded(tmp_path: Path) -> None:
    """Its versions are unavailable, others answer on; loading finds what is new in the registry."""
    models.put(tmp_path, "counted", 1, models.constant(1))
    models.put(tmp_path, "other", 1, models.constant(5))
    body = request(tensor("x", "FP32", [1], [0]))
    with serve(tmp_path) as server, server.client() as client:

        def asked(path: str = "counted") -> Any:
            got = client.post(f"/v2/models/{path}/infer", json=body).json()
            return got["outputs"][0]["data"][0] if "outputs" in got else got["code"]

        def told(what: str, **parameters: Any) -> int:
            path = f"/v2/repository/models/{what}"
            return client.post(path, json={"parameters": parameters}).status_code

        assert asked() == 1
        assert told("counted/unload", unload_dependents=True) == 200
        assert (asked(), asked("counted/versions/1"), asked("other")) == (
            "not_ready",
            "not_ready",
            5,
        )
        assert client.get("/v2/models/counted/ready").status_code == 503
        assert index(client)["counted", "1"]["state"] == "UNAVAILABLE"
        assert told("counted/unload") == 200, "twice is once"
        assert told("counted/load", version=1) == 200
        assert asked() == 1
        models.put(tmp_path, "counted", 2, models.constant(2))
        before = stats(client, "/counted/versions/1")[0]["inference_stats"]["success"]["count"]
        assert before == 2, "counts outlive unloading"
        assert client.post("/v2/repository/models/counted/load").status_code == 200
        assert (asked(), asked("counted/versions/1")) == (2, 1)
        models.put(tmp_path, "new", 3, models.constant(3))
        assert told("new/load") == 200
        assert asked("new") == 3
        assert told("counted/load", version=9) == 404
        assert told("absent/load") == 404
        assert told("absent/unload") == 404
        assert told("counted/load", config="{}") == 400
        assert told("counted/load", **{"file:1/model.onnx": "AA=="}) == 400
        assert told("counted/unload", version=1) == 400
        (tmp_path / "bad" / "1").mkdir(parents=True)
        (tmp_path / "bad" / "1" / "model.onnx").write_bytes(b"no model")
        assert told("bad/load") == 503
        assert index(client)["bad", "1"]["state"] == "UNAVAILABLE"


def test_unloading_frees_memory_and_threads(tmp_path: Path) -> None:
    """Loaded and unloaded again and again, a model leaves nothing behind."""
    models.put(tmp_path, "heavy", 1, models.heavy(32))
    with serve(tmp_path, {"runtime.inline_s_max": 0}) as server, server.client() as client:
        body = request(tensor("index", "INT64", [1], [7]))

        def measure() -> tuple[int, int]:
            status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="ascii")
            fields = dict(line.split(":", 1) for line in status.splitlines())
            return int(fields["VmRSS"].split()[0]) // 1024, int(fields["Threads"])

        sizes = []
        for _ in range(8):
            assert client.post("/v2/repository/models/heavy/load").status_code == 200
            assert client.post("/v2/models/heavy/infer", json=body).status_code == 200
            assert client.post("/v2/repository/models/heavy/unload").status_code == 200
            sizes.append(measure())
        # Six more tables of 32 MiB would be there.
        assert sizes[-1][0] - sizes[1][0] < 64, sizes
        assert sizes[-1][1] <= sizes[1][1] + 1, sizes


def test_what_is_under_way_when_a_model_is_unloaded_is_answered(tmp_path: Path) -> None:
    """Draining: rows that were queued run; nobody is dropped."""
    models.put(tmp_path, "slow", 1, models.slow())
    with serve(tmp_path, {"runtime.inline_s_max": 0}) as server, server.client() as client:
        body = request(tensor("x", "FP32", [4, 1], [1, 2, 3, 4]))
        codes: list[int] = []

        def ask() -> None:
            codes.append(client.post("/v2/models/slow/infer", json=body).status_code)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: codes or _rows_wait(client), "a request under way")
        assert client.post("/v2/repository/models/slow/unload").status_code == 200
        for thread in threads:
            thread.join()
        # Who came before is answered, who came after is told; nobody hangs and nobody gets a 500.
        assert set(codes) <= {200, 503}
        assert 200 in codes


def _rows_wait(client: httpx.Client) -> bool:
    """Whether rows wait behind a run: four requests cannot fit into what runs at once."""
    lines = client.get("/metrics").text.splitlines()
    waiting = [line for line in lines if line.startswith("driftgate_queued_rows{")]
    return any(float(line.split()[-1]) > 0 for line in waiting)


@pytest.mark.parametrize("what", ["load", "unload"])
def test_web_pages_cannot_load_or_unload(client: httpx.Client, what: str) -> None:
    """As all that changes the server: programs of this machine only."""
    got = client.post(
        f"/v2/repository/models/matrix/{what}", headers={"origin": "http://evil.example"}
    )
    assert (got.status_code, got.json()["code"]) == (403, "forbidden")


def test_beyond_loopback_the_repository_is_closed_and_not_announced(tmp_path: Path) -> None:
    """Predictions and the index stay; nobody loads or unloads without a key."""
    models.put(tmp_path, "m", 1, models.constant(1))
    flags = ("--port", "0", "--host", "0.0.0.0", "--insecure", "--no-grpc")
    with serve(tmp_path, flags=flags) as server:
        port = int(server.url.rpartition(":")[2])
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for what in ("load", "unload"):
                assert client.post(f"/v2/repository/models/m/{what}").status_code == 403
            assert "model_repository" not in client.get("/v2").json()["extensions"]
            assert client.post("/v2/repository/index").status_code == 200


def test_a_packed_body_in_pieces_is_read(server: Server) -> None:
    """Chunked and packed at once, as streaming clients send it."""
    packed = gzip.compress(json.dumps(BODY).encode())
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(
            b"POST /v2/models/matrix/infer HTTP/1.1\r\nhost: localhost\r\n"
            b"content-encoding: gzip\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        )
        for byte in packed:
            connection.sendall(b"1\r\n%c\r\n" % byte)
        connection.sendall(b"0\r\n\r\n")
        got = b"".join(iter(lambda: connection.recv(65536), b""))
    assert got.startswith(b"HTTP/1.1 200")
    assert b'"data":[1.0,2.0,3.0]' in got
