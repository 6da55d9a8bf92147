"""How a server starts and ends: what it serves, what it refuses and says, and how it says no."""

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import __version__
from tests import models
from tests.serving import Server, driftgate, free_port, request, serve, tensor, wait_until

ONE = request(tensor("x", "FP32", [1], [0]))


# -- a registry in which nearly everything is wrong


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("registry")
    good = models.constant(1)
    models.put(registry, "good", 1, good)
    models.put(registry, "older", 1, models.constant(1))
    models.put(registry, "older", 2, models.constant(2))
    models.put(registry, "older", 3, b"this is no model")
    models.put(registry, "empty", 1, b"")
    models.put(registry, "text", 1, b"# ONNX\nnot really\n")
    models.put(registry, "cut", 1, good[: len(good) // 2])
    models.put(registry, "noise", 1, bytes(range(256)) * 40)
    models.put(registry, "zipmap", 1, models.classifier_with_zipmap())
    models.put(registry, "weightless", 1, models.with_lost_weights())
    models.put(registry, "even", 1, models.even_rows())
    models.put(registry, "four", 1, models.four_rows_at_most())
    # Names that a careless scan would read as versions, or models.
    for stray in ("٣", "01", "v1", "-1", "+5", "1_0", "1.0", ".git", "4" * 30):
        models.put(registry, "stray", stray, models.constant(99))
    models.put(registry, "stray", 2, models.constant(2))
    for name in (".hidden", "two words", "ünder", "a..b"):
        models.put(registry, name, 1, models.constant(99))
    (registry / "good" / "7").mkdir()
    (registry / "good" / "8" / "model.onnx").mkdir(parents=True)
    (registry / "good" / "9").write_text("a file")
    (registry / "good" / "notes.txt").write_text("read me")
    (registry / "README.md").write_text("read me")
    (registry / "hollow").mkdir()
    with serve(registry) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


@pytest.mark.parametrize("name", ["empty", "text", "cut", "noise", "zipmap", "weightless"])
def test_a_file_that_is_no_model_is_refused_with_its_reason_everywhere(
    server: Server, client: httpx.Client, name: str
) -> None:
    """In the admin answer, the metric, the log and to its callers; no path of the machine in it."""
    (about,) = client.get(f"/admin/models/{name}").json()["versions"]
    called = client.post(f"/v2/models/{name}/infer", json=ONE)
    (logged,) = [e for e in server.events("version_refused") if e["model"] == name]

    assert about["state"] == "refused"
    assert len(about["reason"]) > 15
    assert logged["reason"] == about["reason"]
    assert (logged["version"], logged["level"]) == (1, "error")
    assert (called.status_code, called.json()["code"]) == (503, "version_refused")
    assert about["reason"] in called.json()["error"]
    assert refused(client)[name] == 1
    for text in (about["reason"], called.text):
        assert "/" not in text
        assert "onnxruntime::" not in text
        assert "Traceback" not in text


def test_a_classifier_that_answers_dictionaries_is_told_the_remedy(client: httpx.Client) -> None:
    """The commonest wrong export of scikit-learn: the reason says how to export it."""
    (about,) = client.get("/admin/models/zipmap").json()["versions"]

    assert "zipmap" in about["reason"]
    assert "'y'" in about["reason"]


def test_bad_models_do_not_keep_good_ones_from_serving(client: httpx.Client) -> None:
    """Ready is ready although others were refused."""
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for name in ("good", "older", "stray"):
        assert client.post(f"/v2/models/{name}/infer", json=ONE).status_code == 200
    assert refused(client).get("good", 0) == 0


def test_the_next_lower_version_answers_when_the_highest_is_broken(client: httpx.Client) -> None:
    """3 is no model: 2 answers, 1 can be called, and calling 3 says why not."""
    answered = client.post("/v2/models/older/infer", json=ONE).json()
    by_number = client.post("/v2/models/older/versions/1/infer", json=ONE).json()
    broken = client.post("/v2/models/older/versions/3/infer", json=ONE)
    ready = {n: client.get(f"/v2/models/older/versions/{n}/ready").status_code for n in (1, 2, 3)}

    assert answered["model_version"] == "2"
    assert by_number["outputs"][0]["data"] == [1.0]
    assert (broken.status_code, broken.json()["code"]) == (503, "version_refused")
    assert ready == {1: 200, 2: 200, 3: 503}
    assert client.get("/admin/models/older").json()["champion"] == 2


def test_a_model_that_cannot_take_one_row_is_served_for_what_it_can(client: httpx.Client) -> None:
    """The trial runs fail on one row: that is found out, not a reason to serve nobody."""
    body = request(tensor("x", "FP32", [2, 2], [1, 2, 3, 4]))
    odd = request(tensor("x", "FP32", [1, 2], [1, 2]))

    output = client.post("/v2/models/even/infer", json=body).json()["outputs"][0]
    assert (output["shape"], output["data"]) == ([1, 4], [1, 2, 3, 4])
    assert client.post("/v2/models/even/infer", json=odd).status_code in (400, 500)


def test_a_model_that_cannot_take_a_full_batch_is_served_for_what_it_can(
    client: httpx.Client,
) -> None:
    """It takes four rows at most, the batch has room for 64: four rows are answered."""
    body = request(tensor("x", "FP32", [4, 1], [1, 2, 3, 4]))

    output = client.post("/v2/models/four/infer", json=body).json()["outputs"][0]
    assert output["data"] == [1, 2, 3, 4]


def test_only_plain_numbers_are_versions(server: Server, client: httpx.Client) -> None:
    """`int` and `str.isdigit` take much more: other scripts, signs, leading zeros, 30 digits."""
    (about,) = client.get("/admin/models/stray").json()["versions"]
    skipped = " ".join(event["reason"] for event in server.events("entry_skipped"))

    assert about["version"] == 2
    assert client.get("/v2/models/stray").json()["versions"] == ["2"]
    for stray in ("٣", "01", "v1", "-1", "+5", "1_0", "1.0"):
        assert f"{stray!r}" in skipped
    assert ".git" not in skipped


def test_only_names_of_the_grammar_are_models(server: Server, client: httpx.Client) -> None:
    """What cannot be called is said in the log, and hidden entries are nobody's business."""
    names = {model["name"] for model in client.get("/admin/models").json()["models"]}
    skipped = " ".join(event["reason"] for event in server.events("entry_skipped"))

    assert names == {
        "good", "older", "empty", "text", "cut", "noise", "zipmap", "weightless", "even", "four",
        "stray",
    }  # fmt: skip
    for name in ("two words", "ünder", "a..b", "hollow"):
        assert f"{name!r}" in skipped
    assert ".hidden" not in skipped
    assert "README" not in skipped


def test_a_directory_without_a_model_file_is_no_version(
    server: Server, client: httpx.Client
) -> None:
    """7 is empty, and in 8 the model file is a directory: both are passed over, and said."""
    skipped = [event["reason"] for event in server.events("entry_skipped")]

    assert client.get("/v2/models/good").json()["versions"] == ["1"]
    for number in (7, 8):
        assert any("'good'" in reason and f"version {number}" in reason for reason in skipped)


def refused(client: httpx.Client) -> dict[str, float]:
    """Refused versions by model, as the metric has them."""
    return {
        sample.labels["model"]: sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "driftgate_versions_refused"
    }


def test_a_registry_of_broken_models_is_live_but_not_ready(tmp_path: Path) -> None:
    """There is something to repair, and the server says so instead of ending in a loop."""
    models.put(tmp_path, "broken", 1, b"nothing")
    with serve(tmp_path) as server, server.client() as client:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 503
        assert client.post("/v2/models/broken/infer", json=ONE).status_code == 503


def test_a_model_is_never_unknown_while_the_server_starts(tmp_path: Path) -> None:
    """Until ready a call is 503, as load balancers expect: 404 would say it will never be there."""
    for name in ("a", "b", "c", "late"):
        models.put(tmp_path, name, 1, models.slow() if name != "late" else models.constant(5))
    port, seen, codes = free_port(), [], set()
    with serve(tmp_path, flags=("--port", str(port)), is_ready=False) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            until = time.monotonic() + 20
            while 200 not in seen and time.monotonic() < until:
                try:
                    got = client.post("/v2/models/late/infer", json=ONE)
                except httpx.ConnectError:
                    continue
                seen.append(got.status_code)
                codes.add(got.json().get("code"))
        server.wait_for("ready")

    assert set(seen) == {503, 200}, set(seen)
    assert codes == {"not_ready", None}, codes


# -- how it says no


def wrong_starts(tmp: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Words of a wrong command line, and what its one line must name."""
    (tmp / "file").write_text("I am a file")
    (tmp / "nothing").mkdir()
    (tmp / "strays" / "m" / "v1").mkdir(parents=True)
    models.put(tmp / "good", "m", 1, models.constant(1))
    good = str(tmp / "good")
    return {
        "no such directory": ([str(tmp / "absent")], ["absent", "no such directory"]),
        "a file": ([str(tmp / "file")], ["file", "not a directory"]),
        "empty": ([str(tmp / "nothing")], ["nothing", "no model"]),
        "strays": ([str(tmp / "strays")], ["no model", "v1"]),
        "an unknown option": ([good, "--prot", "1"], ["--prot", "--port"]),
        "two directories": ([good, good], ["unexpected"]),
        "a port that is text": ([good, "--port", "http"], ["--port", "integer"]),
        "a port too high": ([good, "--port", "70000"], ["port", "70000", "65535"]),
        "a port below zero": ([good, "--port", "-1"], ["port", "-1"]),
        "no such host": ([good, "--insecure", "--host", "nowhere.invalid"], ["nowhere.invalid"]),
        "not our address": ([good, "--insecure", "--host", "192.0.2.1", "--port", "0"], ["192.0."]),
        "beyond loopback": ([good, "--host", "0.0.0.0"], ["0.0.0.0", "--insecure"]),
        "all of IPv6": ([good, "--host", "::"], ["::", "--insecure"]),
        "an odd log format": ([good, "--log-format", "xml"], ["log.format", "xml", "json"]),
        "no rows in a batch": ([good, "--batch-rows-max", "0"], ["batch.rows_max", "0"]),
        "more than all": ([good, "--monitor-sample", "101"], ["monitor.sample", "101"]),
        "not a number": ([good, "--monitor-sample", "nan"], ["monitor.sample", "nan"]),
        "no such config": ([good, "--config", str(tmp / "absent.yaml")], ["absent.yaml"]),
        "a directory as config": ([good, "--config", good], ["config"]),
    }


@pytest.mark.parametrize("case", [
    "no such directory", "a file", "empty", "strays", "an unknown option", "two directories",
    "a port that is text", "a port too high", "a port below zero", "no such host",
    "not our address", "beyond loopback", "all of IPv6", "an odd log format", "no rows in a batch",
    "more than all", "not a number", "no such config", "a directory as config",
])  # fmt: skip
def test_a_wrong_start_is_one_line_and_exit_code_2(tmp_path: Path, case: str) -> None:
    """The cause in one line, no trace, no half-started server, within three seconds."""
    words, said = wrong_starts(tmp_path)[case]
    start = time.monotonic()
    ended = driftgate("serve", *words)

    check_no(ended, said)
    assert time.monotonic() - start < 3


def check_no(ended: "subprocess.CompletedProcess[str]", said: list[str], n_lines: int = 1) -> None:
    """Exit code 2 and so many lines, all ours."""
    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == n_lines, ended.stderr
    assert all(line.startswith("driftgate: ") for line in lines)
    assert "Traceback" not in ended.stderr
    for word in said:
        assert word in ended.stderr, f"{word!r} is not in: {ended.stderr}"


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    """Somebody else listens there: the number, and the way out."""
    models.put(tmp_path, "m", 1, models.constant(1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        check_no(driftgate("serve", str(tmp_path), "--port", port), [port, "in use", "--port"])


CONFIGS = {
    "unknown keys": (
        "batch: {row_max: 5}\nlimit: {timeout_s: 1}\nprot: 80\n",
        ["batch.row_max", "batch.rows_max", "limit", "prot", "port"],
        3,
    ),
    "wrong values": (
        "limits: {queue_rows_max: many}\nbatch: {rows_max: 1.5}\nmonitor: {sample: [1]}\n",
        [
            "limits.queue_rows_max",
            "many",
            "batch.rows_max",
            "1.5",
            "monitor.sample",
        ],
        3,
    ),
    "out of range": (
        "batch: {rows_max: 0}\nlimits: {timeout_s: -1}\nmonitor: {window_rows: 1, sample: 300}\n",
        ["batch.rows_max", "limits.timeout_s", "monitor.window_rows", "monitor.sample"],
        4,
    ),
    "both kinds": ("nonsense: 1\nbatch: {rows_max: 0}\n", ["nonsense", "batch.rows_max"], 2),
    "not YAML": ("batch: {rows_max: 5\nport: [", ["c.yaml", "line", "not YAML"], 1),
    "a list": ("- port\n- 80\n", ["c.yaml", "mapping"], 1),
    "a word": ("hello", ["c.yaml", "mapping"], 1),
    "an object of Python": ("host: !!python/object/apply:os.getpid []\n", ["c.yaml"], 1),
    "an impossible date": ("host: 2001-99-99\n", ["c.yaml"], 1),
    "too deep": ("[" * 5000, ["c.yaml"], 1),
    "a boolean as number": ("batch: {rows_max: true}\n", ["batch.rows_max", "True"], 1),
    "null": ("limits: {timeout_s: null}\n", ["limits.timeout_s"], 1),
    "a section as number": ("batch: 5\n", ["batch"], 1),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_a_wrong_config_file_has_every_problem_listed(tmp_path: Path, case: str) -> None:
    """A line for each, with the key, what came, and the nearest key that exists."""
    text, said, n_lines = CONFIGS[case]
    models.put(tmp_path / "registry", "m", 1, models.constant(1))
    (tmp_path / "c.yaml").write_text(text)
    registry, config = str(tmp_path / "registry"), str(tmp_path / "c.yaml")
    ended = driftgate("serve", registry, "--port", "0", "--config", config)

    check_no(ended, said, n_lines)


def test_a_wrong_variable_is_named_as_it_is_written(tmp_path: Path) -> None:
    """The environment is a source like the others."""
    models.put(tmp_path, "m", 1, models.constant(1))
    ended = driftgate("serve", str(tmp_path), settings={"limits.queue_rows_max": "lots"})

    check_no(ended, ["limits.queue_rows_max", "lots", "DRIFTGATE_LIMITS_QUEUE_ROWS_MAX"])


def test_a_flag_covers_the_environment_which_covers_the_file(tmp_path: Path) -> None:
    """Shown by the limit that a request meets."""
    models.put(tmp_path / "registry", "m", 1, models.constant(1))
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"limits": {"queue_rows_max": 3}, "monitor": {"window_rows": 10}}))
    settings = {"limits.queue_rows_max": 5, "monitor.window_rows": 20}
    flags = ("--port", "0", "--config", str(config), "--monitor-window-rows", "30")
    with serve(tmp_path / "registry", settings, flags=flags) as server, server.client() as client:
        statuses = {
            n: client.post(
                "/v2/models/m/infer", json=request(tensor("x", "FP32", [n], [0] * n))
            ).status_code
            for n in (5, 6)
        }
        window_rows = client.get("/drift/m").json()["window_rows"]

    assert statuses == {5: 200, 6: 413}
    assert window_rows == 30


def test_version_is_printed() -> None:
    """One line on standard output."""
    ended = driftgate("--version")

    assert (ended.returncode, ended.stdout) == (0, f"driftgate {__version__}\n")
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sevre"], ["sevre", "serve"]),
        (["models", "-r", "/nowhere/at/all"], ["no such directory"]),
        (["drift", "--server", "http://127.0.0.1:9"], ["http://127.0.0.1:9", "driftgate"]),
        (["drift", "--server", "nonsense://"], ["nonsense:"]),
        (["drift", "a", "b", "c"], ["drift"]),
        (["profile", "/nowhere/data.csv"], ["data.csv", "no such file"]),
        (["models", "--jsno"], ["--jsno", "--json"]),
    ],
)
def test_every_wrong_command_is_one_line_and_exit_code_2(words: list[str], said: list[str]) -> None:
    """No command shows a trace to its user."""
    check_no(driftgate(*words), said)


def test_beyond_loopback_with_insecure_admin_stays_closed(tmp_path: Path) -> None:
    """Predictions and monitors are open, admin is not: no key protects it."""
    models.put(tmp_path, "m", 1, models.constant(1))
    port = free_port()
    flags = ("--port", str(port), "--host", "0.0.0.0", "--insecure")
    with serve(tmp_path, flags=flags) as server, server.client() as client:
        client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        assert client.post("/v2/models/m/infer", json=ONE).status_code == 200
        assert client.get("/drift").status_code == 200
        for method, path in (
            ("GET", "/admin/models"),
            ("GET", "/admin/models/m"),
            ("POST", "/admin/models/m/reference"),
        ):
            got = client.request(method, path)
            assert (got.status_code, got.json()["code"]) == (403, "forbidden")


# -- how it ends


@pytest.fixture
def slow_server(tmp_path: Path) -> Iterator[Server]:
    models.put(tmp_path, "slow", 1, models.slow(rows=1, n_rounds=4000))
    with serve(tmp_path) as running:
        yield running


def in_flight(client: httpx.Client) -> bool:
    """Whether the request has left the queue for its run."""
    return 'driftgate_queue_seconds_count{model="slow",version="1"} 1.0' in (
        client.get("/metrics").text
    )


def test_sigterm_lets_a_request_in_flight_finish(slow_server: Server) -> None:
    """It is answered in full; then the server ends with 0, and its port is free."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        with slow_server.client() as client:
            answers.append(
                client.post("/v2/models/slow/infer", json=request(tensor("x", "FP32", [1, 1], [3])))
            )

    asking = threading.Thread(target=ask)
    asking.start()
    with slow_server.client() as client:
        wait_until(lambda: in_flight(client), "the request runs")
    assert not answers, "the model was too fast to be interrupted"
    assert slow_server.stop() == 0
    asking.join(20)

    assert answers[0].status_code == 200
    assert answers[0].json()["outputs"][0]["data"] == [6.0]
    assert slow_server.events("stop_asked")
    assert slow_server.events("stopped")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(slow_server.address)


def test_idle_connections_do_not_hold_a_server_that_is_told_to_end(tmp_path: Path) -> None:
    """Kept-alive and silent connections are closed at once."""
    models.put(tmp_path, "m", 1, models.constant(1))
    with serve(tmp_path) as server, server.client() as client:
        client.post("/v2/models/m/infer", json=ONE)
        with (
            socket.create_connection(server.address, timeout=5),
            socket.create_connection(server.address, timeout=5) as halfway,
        ):
            halfway.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHo")
            client.get("/v2/health/live")
            start = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - start < 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_still_loads_ends_when_told(tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 0, no trace, as soon as the version being opened is done."""
    for name in ("a", "b", "c"):
        models.put(tmp_path, name, 1, models.slow(rows=1, n_rounds=2000))
    port = free_port()
    with serve(tmp_path, flags=("--port", str(port)), is_ready=False) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_until(lambda: is_live(client), "the server is live")
            is_loaded = client.get("/v2/health/ready").status_code == 200
        assert not is_loaded, "the models were too small to be interrupted"
        assert server.stop(number) == 0
        assert "Traceback" not in server.stderr


def is_live(client: httpx.Client) -> bool:
    """Whether somebody listens already."""
    try:
        return client.get("/v2/health/live").status_code == 200
    except httpx.ConnectError:
        return False
