"""Keys, pages, hosts and slow senders against real servers."""

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import pytest

from gateway import access
from gateway.app import App
from gateway.config import ServerConfig
from gateway.grpc import carrier, reflection, service
from gateway.protocol.stubs import inference_pb2 as pb
from tests import models
from tests.serving import Server, driftgate, request, serve, tensor, wait_until

BODY = request(tensor("x", "FP32", [1, 3], [[1, 2, 3]]))


class Guarded(NamedTuple):
    """A server that asks for keys, and a key for each scope."""

    server: Server
    keys: dict[str, str]
    file: Path
    grpc_url: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    registry, file = directory / "models", directory / "keys.json"
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    keys = {scope: access.add(file, [scope])[1] for scope in access.KEY_SCOPES}
    # The younger carrier asks for keys; the older one is asked below.
    settings = {"keys": file, "model": "matrix", "grpc_carrier": "zttp"}
    with serve(registry, settings) as server:
        grpc_url = server.wait_for("ready")["grpc_url"]
        yield Guarded(server, keys, file, grpc_url)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    registry = tmp_path_factory.mktemp("models")
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    settings = {
        "limits.head_s_max": 0.6, "limits.body_s_max": 0.6, "limits.connections_max": 40,
    }  # fmt: skip
    with serve(registry, settings) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_path_needs_a_key_of_its_scope(guarded: Guarded) -> None:
    """Walk all that is declared: no key 401, another scope's key 403, the right one goes on."""
    declared = App(ServerConfig()).declared()
    refused = 0
    with guarded.server.client() as http:
        for endpoint in declared:
            path = endpoint.path.format(
                model="matrix", version=1, label="champion", n=1, alias="a", revision=1,
                rollout="r", id="r", a="a", m="matrix", v=1, alarm="a", to="1",
            )  # fmt: skip
            none = http.request(endpoint.method, path)
            if endpoint.scope == "open":
                assert none.status_code not in {401, 403}, path
                continue
            assert (none.status_code, none.json()["code"]) == (401, "unauthenticated"), path
            assert none.headers["www-authenticate"] == "Bearer"
            other = next(key for scope, key in guarded.keys.items() if scope != endpoint.scope)
            wrong = http.request(endpoint.method, path, headers=bearer(other))
            assert (wrong.status_code, wrong.json()["code"]) == (403, "forbidden"), path
            refused += 1
        right = bearer(guarded.keys["predict"])
        answer = http.post("/v2/models/matrix/infer", json=BODY, headers=right)
    assert refused > 30
    assert answer.status_code == 200


@pytest.mark.parametrize("carried", ["grpcio", "zttp"])
def test_every_grpc_call_needs_a_key_of_its_scope(guarded: Guarded, carried: str) -> None:
    """The same walk over gRPC, by what the carrier really registers; nobody is forgotten."""
    app = App(ServerConfig(), grpc_host="127.0.0.1")
    assert isinstance(app.carrier, carrier.Carrier)
    scopes = {name: call.scope for name, call in app.carrier._service.calls.items()}
    scopes |= {"ModelInfer": "predict", "ModelStreamInfer": "predict"}
    registered = {method.name for method in pb.DESCRIPTOR.services_by_name[
        "GRPCInferenceService"].methods}  # fmt: skip
    assert set(scopes) <= registered
    with ExitStack() as stack:
        grpc_url = guarded.grpc_url
        if carried == "grpcio":
            models_dir = guarded.file.parent / "models"
            other_one = stack.enter_context(serve(models_dir, {"keys": guarded.file}))
            grpc_url = other_one.wait_for("ready")["grpc_url"]
        channel = stack.enter_context(grpc.insecure_channel(grpc_url))

        def status(name: str, key: str | None) -> grpc.StatusCode:
            path = f"/{service.NAME}/{name}"
            metadata = [("authorization", f"Bearer {key}")] if key else []
            try:
                if name == "ModelStreamInfer":
                    list(channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=5))
                else:
                    channel.unary_unary(path)(b"", metadata=metadata, timeout=5)
            except grpc.RpcError as error:
                return error.code()  # type: ignore[no-any-return]  # grpcio has no types
            return grpc.StatusCode.OK

        for name, scope in scopes.items():
            if scope == "open":
                assert status(name, None) == grpc.StatusCode.OK
                continue
            other = next(key for known, key in guarded.keys.items() if known != scope)
            assert status(name, None) == grpc.StatusCode.UNAUTHENTICATED, name
            assert status(name, other) == grpc.StatusCode.PERMISSION_DENIED, name
            assert status(name, guarded.keys[scope]) not in {
                grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED,
            }  # fmt: skip
        reflect = channel.stream_stream(f"/{reflection.NAMES[0]}/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as refusal:
            list(reflect(iter([b""]), timeout=5))
        assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)


def test_a_revoked_key_ends_and_a_new_one_begins_without_a_restart(guarded: Guarded) -> None:
    """By the command line, as an operator does it."""
    made = json.loads(
        driftgate("keys", "add", "--keys", str(guarded.file), "--scope", "monitor", "--json").stdout
    )
    listed = driftgate("keys", "list", "--keys", str(guarded.file), "--json").stdout
    assert made["id"] in listed
    assert made["key"].rpartition("_")[2] not in listed
    with guarded.server.client() as http:

        def status() -> int:
            return http.get("/drift", headers=bearer(made["key"])).status_code

        wait_until(lambda: status() == 200, "the new key works")
        assert driftgate("keys", "revoke", "--keys", str(guarded.file), made["id"]).returncode == 0
        wait_until(lambda: status() == 401, "the revoked key does not")


def test_five_hundred_wrong_keys_are_refused_and_not_logged(guarded: Guarded) -> None:
    """Guessing is as cheap for the server as any request, and leaves no trace of secrets."""
    with guarded.server.client() as http:
        for k in range(500):
            wrong = bearer(f"dg_{k:08x}_{k:064x}")
            assert http.get("/v2", headers=wrong).status_code == 401
    assert f"{499:064x}" not in guarded.server.stderr
    assert all(key not in guarded.server.stderr for key in guarded.keys.values())


def test_pages_of_another_origin_change_nothing(server: Server) -> None:
    """On loopback without keys: every path, by every method that could change something."""
    paths = {endpoint.path.format(
        model="matrix", version=1, label="a", n=1, alias="a", revision=1, rollout="r", id="r",
        a="a", m="matrix", v=1, alarm="a", to="1",
    ) for endpoint in App(ServerConfig()).declared()}  # fmt: skip
    with server.client() as http:
        before = http.get("/v2/models/stats").json()
        for path in sorted(paths):
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                for page in (
                    {"origin": "http://evil.example"},
                    {"sec-fetch-site": "cross-site", "origin": "null"},
                ):
                    status = http.request(method, path, headers=page, json=BODY).status_code
                    assert status in {403, 405}, (method, path)
        assert (
            http.get("/v2/models/stats").json()["model_stats"][0]["inference_count"]
            == (before["model_stats"][0]["inference_count"])
        )


def raw(server: Server, content: bytes, timeout_s: float = 5) -> bytes:
    """What comes back for these bytes, until the server closes or is silent."""
    with socket.create_connection(server.address, timeout=timeout_s) as connection:
        connection.sendall(content)
        got = b""
        try:
            while part := connection.recv(65536):
                got += part
        except TimeoutError:
            pass
        return got


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n", b"200"),
        (b"GET /v2 HTTP/1.1\r\nhost: 127.0.0.1:8000\r\n", b"200"),
        (b"GET /v2 HTTP/1.1\r\nhost: [::1]:8000\r\n", b"200"),
        (b"GET /v2 HTTP/1.1\r\nhost: LOCALHOST.\r\n", b"200"),
        (b"GET /v2 HTTP/1.0\r\n", b"200"),
        (b"GET http://localhost/v2 HTTP/1.1\r\nhost: localhost\r\n", b"200"),
        (b"GET /v2 HTTP/1.1\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nhost: localhost\r\nHost: evil.example\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nhost: evil.example\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nhost: localhost.evil.example\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nhost: x/?\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nhost: \r\n", b"400"),
        (b"GET http://evil.example/v2 HTTP/1.1\r\nhost: localhost\r\n", b"400"),
        (b"POST /v2/models/matrix/infer HTTP/1.1\r\nhost: evil.example\r\ncontent-length: 2\r\n",
         b"400"),
    ],
)  # fmt: skip
def test_a_request_names_this_server_once(server: Server, head: bytes, status: bytes) -> None:
    """Rebinding, doubled and absent hosts: refused before anything of ours sees them."""
    got = raw(server, head + b"connection: close\r\n\r\n{}")

    assert got.split(b" ", 2)[1] == status, got
    assert (b"bad_host" in got) == (status == b"400")


def test_each_bound_of_a_head_is_kept_on_both_sides(server: Server) -> None:
    """Just under passes, just over is 431 and closed."""

    def status(*lines: bytes, path: bytes = b"/v2") -> bytes:
        head = b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" % path
        return raw(server, head + b"".join(line + b"\r\n" for line in lines) + b"\r\n").split()[1]

    fixed = sum(len(n) for n in (b"host", b"localhost", b"connection", b"close"))
    room = 16 * 1024 - fixed - len(b"x")
    assert status(b"x: " + b"y" * room) == b"200"
    assert status(b"x: " + b"y" * (room + 1)) == b"431"
    assert status(*[b"x: y"] * 98) == b"200"
    assert status(*[b"x: y"] * 99) == b"431"
    assert status(path=b"/" + b"y" * (8 * 1024 - 1)) == b"404"
    assert status(path=b"/" + b"y" * (8 * 1024)) == b"431"


def test_slow_senders_are_closed_and_the_others_served(server: Server) -> None:
    """Silent, slow in its headers, slow in its body: 408 and closed; a keep-alive client stays."""
    infer = b"POST /v2/models/matrix/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n"
    openings = [b"", b"GET /v2 HTTP/1.1\r\nhost: loc", infer, infer + b"\r\n{"]

    async def drip(opening: bytes) -> tuple[bytes, float]:
        host, port = server.address
        reader, writer = await asyncio.open_connection(host, port)
        start = time.monotonic()
        writer.write(opening)
        reading = asyncio.ensure_future(reader.read())
        while not reading.done() and time.monotonic() - start < 10:
            await asyncio.wait((reading,), timeout=0.2)
            if opening:
                writer.write(b" " if opening.endswith(b"{") else b"x")
        writer.close()
        return await reading, time.monotonic() - start

    async def all_of_them() -> list[tuple[bytes, float]]:
        return await asyncio.gather(*(drip(opening) for opening in openings))

    with server.client() as http:
        assert http.post("/v2/models/matrix/infer", json=BODY).status_code == 200
        for got, seconds in asyncio.run(all_of_them()):
            assert got.startswith(b"HTTP/1.1 408 "), got
            assert b'"code":"slow_request"' in got
            assert seconds < 8
        assert http.post("/v2/models/matrix/infer", json=BODY).status_code == 200
        assert len(http._transport._pool.connections) == 1  # type: ignore[attr-defined]


def test_a_slow_answer_is_no_slow_request(tmp_path: Path) -> None:
    """The time that the server takes is not the client's: a wait outlasts both bounds."""
    models.put(tmp_path, "slow", 1, models.slow(rows=1, n_rounds=1500))
    settings = {"limits.head_s_max": 0.1, "limits.body_s_max": 0.1, "runtime.inline_s_max": 0}
    row = request(tensor("x", "FP32", [1, 1], [[1.5]]))

    async def ask(n: int) -> list[int]:
        async with httpx.AsyncClient(base_url=running.url, timeout=60, trust_env=False) as http:
            asked = (http.post("/v2/models/slow/infer", json=row) for _ in range(n))
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    with serve(tmp_path, settings) as running:
        for n in (10, 20, 40, 80):
            start = time.monotonic()
            assert asyncio.run(ask(n)) == [200] * n
            if time.monotonic() - start > 2:
                return
    pytest.skip("this machine is too fast for the queue to outlast two looks at the clock")


def test_one_connection_too_many_is_told_so(server: Server) -> None:
    """Forty are served; the next is 503 with a time to come back, until one has gone."""
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(server.address, timeout=5))
            for _ in range(40)
        ]
        got = raw(server, b"")
        assert got.startswith(b"HTTP/1.1 503 "), got
        assert b'"code":"busy"' in got
        assert b"retry-after: 1" in got
        for connection in connections:
            connection.close()

    def is_served() -> bool:
        with server.client() as http:
            return http.get("/v2").status_code == 200

    wait_until(is_served, "a place is free again")


def certificate(directory: Path, name: str, authority: str | None = None) -> tuple[Path, Path]:
    """A key and a certificate by openssl, of itself or of an authority made before."""
    key, made = directory / f"{name}.key", directory / f"{name}.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-keyout", str(key), "-out", str(made), "-days", "2", "-subj", f"/CN={name}",
        "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    if authority is not None:
        command += ["-CA", str(directory / f"{authority}.pem"),
                    "-CAkey", str(directory / f"{authority}.key"),
                    "-addext", "basicConstraints=critical,CA:FALSE"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return key, made


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
@pytest.mark.parametrize("carried", ["grpcio", "zttp"])
def test_without_a_certificate_of_ours_nobody_connects(tmp_path: Path, carried: str) -> None:
    """HTTP and gRPC; with one predictions are answered, and admin calls still ask for a key."""
    models.put(tmp_path / "models", "matrix", 1, models.identity("FP32", ("n", 3)))
    certificate(tmp_path, "ours")
    server_key, server_pem = certificate(tmp_path, "server", "ours")
    client_key, client_pem = certificate(tmp_path, "client", "ours")
    authority = tmp_path / "ours.pem"
    settings = {
        "tls_cert": server_pem, "tls_key": server_key, "tls_client_ca": authority,
        "grpc_carrier": carried,
    }  # fmt: skip
    with serve(tmp_path / "models", settings) as running:
        port = running.url.rpartition(":")[2]
        url = f"https://127.0.0.1:{port}"
        trust = ssl.create_default_context(cafile=str(authority))
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/v2", verify=trust, trust_env=False)
        trust.load_cert_chain(client_pem, client_key)
        with httpx.Client(base_url=url, verify=trust, trust_env=False) as http:
            assert http.post("/v2/models/matrix/infer", json=BODY).status_code == 200

        grpc_url = running.wait_for("ready")["grpc_url"]
        call = f"/{service.NAME}/ServerLive"
        for key, pem in ((None, None), (client_key.read_bytes(), client_pem.read_bytes())):
            credentials = grpc.ssl_channel_credentials(authority.read_bytes(), key, pem)
            with grpc.secure_channel(grpc_url, credentials) as channel:
                try:
                    channel.unary_unary(call)(b"", timeout=5)
                    is_let_in = True
                except grpc.RpcError:
                    is_let_in = False
                assert is_let_in == (key is not None)
