"""`/docs` and `/openapi.json` of a real server: commands that work, no markup from names."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from onnx import helper
from openapi_spec_validator import validate

from tests import models
from tests.serving import Server, serve

EVIL = ("<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "$(touch /tmp/x)`id`'\\")


class Page(HTMLParser):
    """What a browser would make of the page: its tags, its commands, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.commands: list[str] = []
        self.text = ""
        self._is_command = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self._is_command = True
            self.commands.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self._is_command = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._is_command:
            self.commands[-1] += data


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Models with ordinary names, and one whose tensors are named to do harm."""
    registry = tmp_path_factory.mktemp("registry")
    models.put(registry, "mixed", 1, models.mixed())
    models.put(registry, "pair", 1, models.sum_and_difference())
    models.put(registry, "pair", 2, models.sum_and_difference())
    models.put(registry, "scalar", 1, models.scalar())
    models.put(registry, "fixed", 1, models.fixed_rows())
    models.put(registry, "bool", 1, models.identity("BOOL", ("n", 3)))
    models.put(registry, "zipmap", 1, models.classifier_with_zipmap())
    models.put(
        registry,
        "evil",
        1,
        models._model(
            [helper.make_node("Identity", [name], [f"{name} out"]) for name in EVIL],
            [models._info(name, "FP32", ("n",)) for name in EVIL],
            [models._info(f"{name} out", "FP32", ("n",)) for name in EVIL],
        ),
    )
    with serve(registry, {"hosts": "127.0.0.1,gate.example", "labels.sample": 100}) as server:
        yield server


@pytest.fixture(scope="module")
def page(server: Server) -> Page:
    with server.client() as http:
        return Page(http.get("/docs").text)


def test_every_command_on_the_page_gets_a_prediction(page: Page) -> None:
    """Pasted into a shell as it stands, hostile names and all."""
    if shutil.which("curl") is None:
        pytest.skip("this machine has no curl")
    answered = []
    for command in page.commands:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=20, check=True
        )
        answer = json.loads(done.stdout)
        assert "error" not in answer, (command, answer)
        answered.append(answer["model_name"])

    assert sorted(answered) == ["bool", "evil", "fixed", "mixed", "pair", "scalar"]


def test_names_of_tensors_are_text_and_nothing_else(page: Page) -> None:
    """No tag but the template's own; the names are there to be read."""
    template = resources.files("gateway.endpoints.pages").joinpath("docs.html").read_text("utf-8")
    known = {tag for tag, _ in Page(template).tags}

    assert {tag for tag, _ in page.tags} <= known
    assert not any(name.startswith("on") for _, given in page.tags for name in given)
    for name in EVIL:
        assert name in page.text


def test_the_page_asks_nobody_else_for_anything(server: Server, page: Page) -> None:
    """Every address is of the page's own origin, and the browser is told to hold it to that."""
    addresses = [given.get("href") or given.get("src") for _, given in page.tags]
    assert all(at.startswith(("/", "#")) and not at.startswith("//") for at in addresses if at)
    with server.client() as http:
        for path in {at for at in addresses if at and at.startswith("/")} | {"/docs"}:
            answer = http.get(path)
            assert answer.status_code == 200, path
        for path in ("/docs", "/docs/style.css"):
            headers = http.get(path).headers
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "script-src" not in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
        assert "url(" not in http.get("/docs/style.css").text


def test_the_page_says_what_is_served_and_what_was_refused(page: Page) -> None:
    """Models, the answering version, reasons, paths, errors."""
    assert "Version 2 answers; in the registry: 1, 2" in page.text
    assert "Version 1 was refused: cannot be served: output 'y'" in page.text
    assert "/v2/models/{model}/infer" in page.text
    assert "model_not_found" in page.text


@pytest.mark.parametrize("host", ['a"><script>', "x; rm -rf ~", "$(id)", "a/b", "u@h", "x'y"])
def test_a_hostile_host_header_is_not_repeated(server: Server, host: str) -> None:
    """The address on the page comes from that header only if it can be an address."""
    with server.client() as http:
        answer = http.get("/docs", headers={"host": host})

    assert answer.status_code == 400
    assert host not in Page(answer.text).text.replace(server.url, "")


def test_the_address_on_the_page_is_the_readers(server: Server) -> None:
    """Behind a port mapping the reader's own address works, the server's may not."""
    with server.client() as http:
        text = http.get("/docs", headers={"host": "gate.example:9000"}).text

    assert "http://gate.example:9000/v2/models/pair/infer" in text


def test_the_document_of_a_running_server_is_valid_and_describes_its_models(
    server: Server,
) -> None:
    """One document for all, one for a model, 404 for a model that is not there."""
    with server.client() as http:
        document = http.get("/openapi.json").json()
        one = http.get("/openapi.json", params={"model": "pair"}).json()
        none = http.get("/openapi.json", params={"model": "par"})

    validate(document)
    assert "/v2/models/evil/infer" in document["paths"]
    assert "/v2/models/zipmap/infer" not in document["paths"]
    assert "pair.Request" in one["components"]["schemas"]
    assert "mixed.Request" not in one["components"]["schemas"]
    assert (none.status_code, none.json()["code"]) == (404, "model_not_found")


class Names(dict[str, object]):
    """What stands for the names in a path; `none` for those that nothing here has."""

    def __missing__(self, _: str) -> str:
        return "none"


def test_real_answers_are_as_the_document_says(server: Server) -> None:
    """Predictions of every model against their schemas; plain paths and errors against theirs."""
    with server.client() as http:
        document = http.get("/openapi.json").json()

        def fits(value: Any, reference: str) -> None:
            Draft202012Validator({**document, "$ref": reference}).validate(value)

        n_models = 0
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                media = operation.get("requestBody", {}).get("content", {})
                shown = media.get("application/json", {}).get("example")
                good = next(iter(operation["responses"].values()))
                wanted = good.get("content", {}).get("application/json")
                if method == "post" and shown is not None:
                    n_models += 1
                    fits(shown, media["application/json"]["schema"]["$ref"])
                    answer = http.post(path, json=shown)
                elif method == "get":
                    answer = http.get(path.format_map(Names(model="pair", version=2, revision=1)))
                else:
                    continue
                if answer.status_code == 200 and wanted is not None:
                    fits(answer.json(), wanted["schema"]["$ref"])
                else:
                    assert answer.status_code in {200, 404, 501}, (path, answer.text)
        assert n_models == 6
        row = {"a": [1.0, 2.0], "b": [3.0, 4.0]}
        for path, template, body in (
            ("/v1/models/pair:predict", "/v1/models/{model}:predict", {"instances": [row]}),
            ("/v2/repository/index", "/v2/repository/index", {}),
        ):
            operation = document["paths"][template]["post"]
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            described = operation["responses"]["200"]["content"]["application/json"]
            fits(answer.json(), described["schema"]["$ref"])
            fits(body, operation["requestBody"]["content"]["application/json"]["schema"]["$ref"])
        wrong = http.post("/v2/models/pair/infer", content=b"{")
        fits(wrong.json(), "#/components/schemas/Error")


def test_an_answer_with_nan_is_as_the_document_says(server: Server) -> None:
    """Null stands for NaN in answers, and is allowed there only."""
    given = {"name": EVIL[0], "datatype": "FP32", "shape": [1]}
    others = [{"name": n, "datatype": "FP32", "shape": [1], "data": [0.0]} for n in EVIL[1:]]
    with server.client() as http:
        document = http.get("/openapi.json").json()
        body = json.dumps({"inputs": [{**given, "data": [np.nan]}, *others]})
        answer = http.post("/v2/models/evil/infer", content=body).json()

    schema = {**document, "$ref": "#/components/schemas/evil.Answer"}
    assert answer["outputs"][0]["data"] == [None]
    Draft202012Validator(schema).validate(answer)
    request = {"inputs": [{**given, "data": [None]}, *others]}
    schema = {**document, "$ref": "#/components/schemas/evil.Request"}
    assert not Draft202012Validator(schema).is_valid(request)
