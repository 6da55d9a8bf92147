"""MessagePack over a real server: single documents, and streams of them over raw sockets."""

import itertools
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import msgpack
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import models
from tests.serving import Server, serve, wait_until

DEADLINE_S = 20.0
KINDS = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1",
    "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
TYPE = {"content-type": "application/msgpack"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registry")
    for kind in models.ELEMENTS:
        models.put(root, f"same-{kind}", 1, models.identity(kind))
    models.put(root, "matrix", 1, models.identity("FP32", ("n", 3)))
    models.put(root, "pair", 1, models.sum_and_difference())
    models.put(root, "one", 1, models.slow(rows=1))
    models.put(root, "versions", 1, models.constant(1))
    models.put(root, "versions", 2, models.constant(2))
    return root


@pytest.fixture(scope="module")
def server(registry: Path) -> Iterator[Server]:
    with serve(registry) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(registry: Path) -> Iterator[Server]:
    """One that waits for a second, and takes documents of 100 kB in streams."""
    with serve(registry, {"limits.timeout_s": 1, "limits.json_bytes_max": 100_000}) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as opened:
        yield opened


def document(data: np.ndarray, kind: str = "FP32", name: str = "x", **more: Any) -> bytes:
    given = {"name": name, "datatype": kind, "shape": list(data.shape), "data": data.tobytes()}
    packed: bytes = msgpack.packb({"inputs": [given], **more})
    return packed


def row(number: float, **more: Any) -> bytes:
    """One row of the model `matrix`."""
    return document(np.array([[number, 0, 0]], "<f4"), **more)


def number(answer: dict[str, Any]) -> float:
    """The first element of the first output."""
    return float(np.frombuffer(answer["outputs"][0]["data"], "<f4")[0])


class Line:
    """One stream on a socket of its own: documents out, documents in, each with a deadline."""

    def __init__(self, server: Server, model: str, **headers: str) -> None:
        self.socket = socket.socket()
        # Or the system itself takes tens of megabytes for a client that does not read.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(server.address)
        lines = [
            f"POST /v2/models/{model}/infer_stream HTTP/1.1",
            "host: localhost",
            "content-type: application/msgpack",
            "transfer-encoding: chunked",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
        self._came = b""
        self._unpacker = msgpack.Unpacker()
        self.has_ended = False

    def send(self, *parts: bytes) -> None:
        """One chunk of the body."""
        self.socket.sendall(b"".join(chunked(part) for part in parts))

    def end(self) -> None:
        """The body's last chunk."""
        self.socket.sendall(b"0\r\n\r\n")

    def head(self) -> str:
        """The answer's head."""
        while b"\r\n\r\n" not in self._came:
            self._more()
        head, _, self._came = self._came.partition(b"\r\n\r\n")
        return head.decode()

    def answers(self) -> Iterator[dict[str, Any]]:
        """Answers as they come, until the body's end."""
        while True:
            yield from self._unpacker
            if self.has_ended:
                return
            while b"\r\n" not in self._came:
                self._more()
            size_line, _, rest = self._came.partition(b"\r\n")
            size = int(size_line, 16)
            while len(rest) < size + 2:
                self._more()
                rest = self._came[len(size_line) + 2 :]
            self._unpacker.feed(rest[:size])
            self._came = rest[size + 2 :]
            self.has_ended = size == 0

    def _more(self) -> None:
        chunk = self.socket.recv(1 << 20)
        assert chunk, f"the server closed the stream; left: {self._came[:200]!r}"
        self._came += chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def chunked(part: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), part)


def samples(server: Server, name: str, **labels: str) -> float:
    """Sum of a metric over all that have these labels."""
    with server.client() as client:
        text = client.get("/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


# -- one document


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_datatype_comes_back_bit_for_bit(client: httpx.Client, kind: str) -> None:
    """Random bytes as numbers (a BOOL is 0 or 1), sent raw and as a list, through a real model."""
    random = np.random.default_rng(5)
    raw = random.integers(0, 2 if kind == "BOOL" else 256, 64, np.uint8).tobytes()
    values = np.frombuffer(raw, KINDS[kind])
    path = f"/v2/models/same-{kind}/infer"

    got = client.post(path, content=document(values, kind, id="q"), headers=TYPE)

    answer = msgpack.unpackb(got.content)
    assert got.headers["content-type"] == "application/msgpack"
    assert (answer["model_name"], answer["model_version"], answer["id"]) == (
        f"same-{kind}",
        "1",
        "q",
    )
    output = answer["outputs"][0]
    assert (output["datatype"], output["shape"]) == (kind, [len(values)])
    assert output["data"] == values.tobytes()
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    given = {"name": "x", "datatype": kind, "shape": [len(finite)], "data": finite.tolist()}
    body = msgpack.packb({"inputs": [given], "parameters": {"raw": False}})
    listed = msgpack.unpackb(client.post(path, content=body, headers=TYPE).content)
    np.testing.assert_array_equal(np.array(listed["outputs"][0]["data"], KINDS[kind]), finite)


def test_texts_come_back_as_texts(client: httpx.Client) -> None:
    """BYTES are a list, of str or of bin."""
    given = {"name": "x", "datatype": "BYTES", "shape": [3], "data": ["é", b"b", ""]}

    got = client.post(
        "/v2/models/same-BYTES/infer", content=msgpack.packb({"inputs": [given]}), headers=TYPE
    )

    assert msgpack.unpackb(got.content)["outputs"][0]["data"] == ["é", "b", ""]


@pytest.mark.parametrize(
    "media", ["application/msgpack", "application/x-msgpack", "Application/VND.msgpack; q=1"]
)
def test_the_format_is_known_by_its_names(client: httpx.Client, media: str) -> None:
    """Three names are in use; parameters and case do not matter."""
    got = client.post("/v2/models/matrix/infer", content=row(4), headers={"content-type": media})

    assert number(msgpack.unpackb(got.content)) == 4


def test_errors_say_the_same_as_over_json(client: httpx.Client) -> None:
    """One request that is wrong, in both formats: same status, sentence and code."""
    given = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}
    for changed in ({}, {"name": "y"}, {"datatype": "INT32", "data": [1, 2]}, {"shape": [-1]}):
        body = {"inputs": [given | changed]}
        one = client.post("/v2/models/matrix/infer", json=body)
        other = client.post("/v2/models/matrix/infer", content=msgpack.packb(body), headers=TYPE)
        assert (other.status_code, other.json()) == (400, one.json())


# -- streams


def test_a_stream_is_answered_in_order(client: httpx.Client) -> None:
    """Three thousand documents in one body, as an ordinary client sends them."""
    body = b"".join(row(k, id=str(k)) for k in range(3000))

    got = client.post("/v2/models/matrix/infer_stream", content=body, headers=TYPE)

    assert (got.status_code, got.headers["content-type"]) == (200, "application/msgpack")
    unpacker = msgpack.Unpacker()
    unpacker.feed(got.content)
    assert [(a["id"], number(a)) for a in unpacker] == [(str(k), k) for k in range(3000)]


def test_the_head_comes_first_and_each_answer_before_the_next_document(server: Server) -> None:
    """A client may wait for everything that it is owed before it says more."""
    with Line(server, "matrix") as line:
        assert line.head().startswith("HTTP/1.1 200")
        answers = line.answers()
        for k in range(20):
            sent = row(k)
            line.send(sent[:5])  # Neither chunks nor packets are documents.
            line.send(sent[5:])
            assert number(next(answers)) == k
        line.end()
        assert list(answers) == []
        # The connection is of use for another request.
        line.socket.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert line.head().startswith("HTTP/1.1 200")


def test_a_client_that_waits_to_be_told_to_go_on_is_told(server: Server) -> None:
    """`Expect: 100-continue` is answered before the head."""
    with Line(server, "matrix", expect="100-continue") as line:
        assert line.head() == "HTTP/1.1 100 Continue"
        assert line.head().startswith("HTTP/1.1 200")
        line.send(row(1))
        assert number(next(line.answers())) == 1


def test_a_wrong_document_is_answered_and_the_stream_goes_on(server: Server) -> None:
    """An error has the sentence, the code, the status and the document's id, and its place."""
    wrong = [
        msgpack.packb(None),
        msgpack.packb({"id": "a", "inputs": 5}),
        document(np.zeros((1, 2), "<f4"), id="b"),
        row(1, id="c", outputs=[{"name": "z"}]),
    ]
    with Line(server, "matrix") as line:
        line.send(*itertools.chain.from_iterable((w, row(k)) for k, w in enumerate(wrong)))
        line.end()
        line.head()
        answers = list(line.answers())

    assert [number(a) for a in answers[1::2]] == [0, 1, 2, 3]
    errors = answers[::2]
    assert [e.get("id") for e in errors] == [None, "a", "b", "c"]
    assert [e["code"] for e in errors] == ["bad_request"] * 2 + ["bad_tensor"] * 2
    assert {e["status"] for e in errors} == {400}
    assert "[-1, 3]" in errors[2]["error"]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (b"\xc1", "starts no value"),
        (b"\x91" * 10_000, "nested too deep"),
        (row(1)[:-1], "ends in the middle"),
    ],
    ids=["no start", "deep", "unterminated"],
)
def test_what_cannot_be_cut_into_documents_ends_the_stream(
    server: Server, end: bytes, words: str
) -> None:
    """What came before is answered; then one error, then the end of a whole HTTP answer."""
    with Line(server, "matrix") as line:
        line.send(row(1), row(2), end)
        line.end()
        line.head()
        first, second, last = line.answers()

    assert (number(first), number(second)) == (1, 2)
    assert (last["code"], last["status"]) == ("bad_request", 400)
    assert words in last["error"]


def test_a_document_beyond_the_limit_ends_the_stream(hasty: Server) -> None:
    """413, as soon as more has come than a document may have; the rest is not waited for."""
    with Line(hasty, "matrix") as line:
        line.send(row(1), b"\xc6\xff\xff\xff\xff" + b"x" * 100_000)
        line.head()
        first, last = line.answers()

    assert number(first) == 1
    assert (last["code"], last["status"]) == ("too_large", 413)


@pytest.mark.parametrize(
    ("path", "method", "headers", "status", "code"),
    [
        ("matrixx", "POST", {}, 404, "model_not_found"),
        ("matrix/versions/7", "POST", {}, 404, "version_not_found"),
        ("matrix", "GET", {}, 405, "method_not_allowed"),
        ("matrix", "POST", {"content-type": "application/json"}, 415, "unsupported_media_type"),
        ("matrix", "POST", {"content-encoding": "gzip"}, 415, "unsupported_encoding"),
        ("matrix", "POST", {"x-request-timeout": "soon"}, 400, "bad_request"),
    ],
)
def test_a_stream_that_nobody_could_answer_never_begins(
    client: httpx.Client, path: str, method: str, headers: dict[str, str], status: int, code: str
) -> None:
    """A plain HTTP error in place of a stream."""
    got = client.request(method, f"/v2/models/{path}/infer_stream", headers=headers)

    assert (got.status_code, got.json()["code"]) == (status, code)


def test_a_stream_may_name_a_version(client: httpx.Client) -> None:
    """By the path, as for one prediction."""
    for path, answered in [("versions/versions/1", 1), ("versions/versions/2", 2), ("versions", 2)]:
        got = client.post(
            f"/v2/models/{path}/infer_stream", content=document(np.zeros(1, "<f4")), headers=TYPE
        )
        answer = msgpack.unpackb(got.content)
        assert (answer["model_version"], number(answer)) == (str(answered), answered)


def test_documents_in_flight_share_batches(server: Server) -> None:
    """Sixteen documents that come at once are one run, or few; not sixteen."""
    before = samples(server, "driftgate_run_seconds_count", model="matrix")
    with Line(server, "matrix") as line:
        line.send(*(row(k) for k in range(16)))
        line.end()
        line.head()
        answers = list(line.answers())

    assert [number(a) for a in answers] == list(range(16))
    assert samples(server, "driftgate_run_seconds_count", model="matrix") - before <= 4


def test_each_document_has_the_deadline_that_the_head_gives(server: Server) -> None:
    """Sixteen runs of some 10 ms one after the other: the last ones are late, and say so."""
    with Line(server, "one", **{"x-request-timeout": "0.05"}) as line:
        line.send(*(document(np.ones((1, 1), "<f4")) for _ in range(16)))
        line.end()
        line.head()
        answers = list(line.answers())

    assert len(answers) == 16
    assert answers[-1]["code"] == "deadline_exceeded"
    assert answers[-1]["status"] == 504


def test_a_client_that_does_not_read_is_not_read_from(server: Server) -> None:
    """Of 200 MB it can send a small part; when it reads at last, every document is answered.

    Two documents fill the queue of the model: the stream waits for its own rows to leave it.
    """
    sent = chunked(document(np.zeros((8_000, 3), "<f4")))
    whole = memoryview(sent * (200_000_000 // len(sent)))
    with Line(server, "matrix") as line:
        line.head()
        line.socket.setblocking(False)  # noqa: FBT003  the socket module's own signature
        at = 0
        while at < len(whole) and select.select((), (line.socket,), (), 1.0)[1]:
            at += line.socket.send(whole[at:])
        assert at < 60_000_000, "the server goes on reading"

        n_documents = -(-at // len(sent))
        left = memoryview(bytes(whole[at : n_documents * len(sent)]) + b"0\r\n\r\n")
        n_bytes, until = 0, time.monotonic() + DEADLINE_S
        tail = b""
        while not tail.endswith(b"\r\n0\r\n\r\n") and time.monotonic() < until:
            writers = (line.socket,) if left else ()
            can_read, can_write, _ = select.select((line.socket,), writers, (), 1.0)
            if can_write:
                left = left[line.socket.send(left) :]
            if can_read:
                came = line.socket.recv(1 << 20)
                n_bytes += len(came)
                tail = (tail + came)[-16:]
    assert n_documents > 16
    assert n_documents * 96_000 < n_bytes < n_documents * 96_300


def test_a_silent_stream_is_ended_with_a_word(hasty: Server) -> None:
    """After `limits.timeout_s`, and not before; half a document is silence too."""
    for start in (b"", row(1)[:-1]):
        with Line(hasty, "matrix") as line:
            began = time.monotonic()
            if start:
                line.send(start)
            line.head()
            (last,) = line.answers()
            assert (last["code"], last["status"]) == ("idle", 408)
            assert 0.9 < time.monotonic() - began < 5


def test_a_stream_on_which_something_moves_is_not_ended(hasty: Server) -> None:
    """Longer than the limit altogether, but never silent for so long."""
    with Line(hasty, "matrix") as line:
        line.head()
        answers, until = line.answers(), time.monotonic() + 1.6
        while time.monotonic() < until:
            line.send(row(3))
            assert number(next(answers)) == 3
            assert not select.select((line.socket,), (), (), 0.3)[0]


def test_a_client_that_never_reads_is_dropped(hasty: Server) -> None:
    """After `limits.timeout_s` in which it took nothing: it cannot hold a connection for ever."""
    sent = chunked(document(np.zeros((8_000, 3), "<f4")))
    with Line(hasty, "matrix") as line:
        line.socket.settimeout(DEADLINE_S)
        began = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            line.socket.sendall(sent * 2000)
        assert time.monotonic() - began > 0.9


def test_rows_of_a_client_that_hangs_up_are_dropped(server: Server) -> None:
    """Sixteen runs are due; the client leaves, and most of them never happen."""
    runs = samples(server, "driftgate_run_seconds_count", model="one")
    gone = samples(server, "driftgate_requests_total", model="one", code="client_gone")
    with Line(server, "one") as line:
        line.send(*(document(np.ones((1, 1), "<f4")) for _ in range(16)))
        line.head()
        next(line.answers())

    def n_gone() -> float:
        return samples(server, "driftgate_requests_total", model="one", code="client_gone") - gone

    wait_until(lambda: n_gone() > 5, "queued documents are dropped")
    n_runs = samples(server, "driftgate_run_seconds_count", model="one") - runs
    assert n_runs <= 16 - n_gone() + 1, "one at most was running when the client left"


def test_a_server_with_an_open_stream_ends_when_told(registry: Path) -> None:
    """Whoever keeps a stream open cannot keep the server from ending well and soon."""
    with serve(registry) as running, Line(running, "matrix") as line:
        line.head()
        line.send(row(1))
        assert number(next(line.answers())) == 1
        start = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - start < 10
