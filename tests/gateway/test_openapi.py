"""The OpenAPI document: valid, complete, and as strict as the server about tensors."""

import asyncio
import json
import shlex
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from gateway.app import App
from gateway.config import ServerConfig
from gateway.endpoints import openapi, pages
from gateway.errors import GatewayError
from gateway.protocol import v2_json
from gateway.router import Model, Table
from registry.signature import DATATYPES, Signature, TensorSpec


class Fake(NamedTuple):
    """As much of an open version as the document reads."""

    model: str
    signature: Signature
    version: int = 1


def signature(*inputs: TensorSpec) -> Signature:
    return Signature(inputs, (TensorSpec("y", "FP32", (-1,)),))


EVERY = signature(*(TensorSpec(f"in {kind}", kind, (-1, 2)) for kind in DATATYPES))
PAIR = signature(TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT8", (-1,)))
TEXT = signature(TensorSpec("t", "BYTES", (-1, 1)))
SCALAR = signature(TensorSpec("s", "FP64", ()))


def document_of(*fakes: Fake) -> dict[str, Any]:
    variants: Any = fakes
    return openapi.document(App(ServerConfig()).declared(), variants)


def validator(document: dict[str, Any], name: str) -> Draft202012Validator:
    return Draft202012Validator({**document, "$ref": f"#/components/schemas/{name}"})


def test_the_document_is_valid_openapi() -> None:
    """Judged by a validator that is not ours, with models of every datatype and rank."""
    document = document_of(Fake("every.1-a_b", EVERY), Fake("pair", PAIR), Fake("scalar", SCALAR))

    validate(document)
    assert document["openapi"].startswith("3.1")
    json.dumps(document)


def test_the_document_has_every_path_and_no_other() -> None:
    """Verb by verb, from the same declarations as the routes; operation ids are unique."""
    declared = App(ServerConfig()).declared()
    document = openapi.document(declared)

    told = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert told == {(e.method, e.path) for e in declared}
    assert len(told) == len(declared), "two endpoints of one path and verb"
    ids = [op["operationId"] for item in document["paths"].values() for op in item.values()]
    assert len(ids) == len(set(ids))
    assert ("POST", "/v2/models/{model}/infer") in told


def test_every_declared_body_and_answer_is_described() -> None:
    """A name that is in no table would be a hole in the document; each scope has its tag."""
    for endpoint in App(ServerConfig()).declared():
        assert endpoint.answer in openapi.CONTENTS, endpoint.path
        assert endpoint.body is None or endpoint.body in openapi.CONTENTS, endpoint.path
    document = document_of()
    tags = {tag["name"] for tag in document["tags"]}
    assert {
        tag for i in document["paths"].values() for o in i.values() for tag in o["tags"]
    } <= tags


def test_every_component_is_referred_to_or_a_model_and_every_reference_leads_somewhere() -> None:
    """Nothing dangles in either direction."""
    document = document_of(Fake("every", EVERY))
    text = json.dumps(document)
    schemas = document["components"]["schemas"]

    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= set(schemas)
    # What an answer's datatypes never need stays in the table all the same.
    assert {name for name in schemas if not name.startswith("Data.")} <= used | {"Text", "Any"}


@pytest.mark.parametrize("model", [PAIR, TEXT, SCALAR])
def test_the_example_of_a_model_is_accepted_by_its_schema_and_by_the_server(
    model: Signature,
) -> None:
    """What the document and the page show can be sent as it stands."""
    document = document_of(Fake("m", model))
    operation = document["paths"]["/v2/models/m/infer"]["post"]
    shown = operation["requestBody"]["content"]["application/json"]["example"]

    validator(document, "m.Request").validate(shown)
    call = v2_json.decode(json.dumps(shown).encode())
    assert len(call.bind(model, "m")) == len(model.inputs)


GOOD_A = {"name": "a", "datatype": "FP32", "shape": [1, 2], "data": [0, 1.5]}
GOOD_B = {"name": "b", "datatype": "INT8", "shape": [1], "data": [-128]}


@pytest.mark.parametrize(
    ("inputs", "is_right"),
    [
        ([GOOD_A, GOOD_B], True),
        ([GOOD_B, GOOD_A], True),
        ([{**GOOD_A, "data": [[0, 1]]}, GOOD_B], True),
        ([{**GOOD_A, "shape": [0, 2], "data": []}, {**GOOD_B, "shape": [0], "data": []}], True),
        ([GOOD_A], False),
        ([GOOD_A, GOOD_B, {**GOOD_A, "name": "c"}], False),
        ([{**GOOD_A, "datatype": "FP64"}, GOOD_B], False),
        ([{**GOOD_A, "shape": [1, 3]}, GOOD_B], False),
        ([{**GOOD_A, "shape": [2]}, GOOD_B], False),
        ([{**GOOD_A, "shape": [-1, 2]}, GOOD_B], False),
        ([{**GOOD_A, "data": ["0", "1"]}, GOOD_B], False),
        ([{**GOOD_A, "data": [None, 1]}, GOOD_B], False),
        ([GOOD_A, {**GOOD_B, "data": [128]}], False),
        ([GOOD_A, {**GOOD_B, "data": [1.5]}], False),
        ([GOOD_A, {**GOOD_B, "data": [True]}], False),
        ([GOOD_A, {"name": "b", "datatype": "INT8", "shape": [1]}], False),
    ],
)
def test_the_schema_of_a_model_and_the_server_agree(inputs: list[Any], is_right: bool) -> None:
    """What one refuses, the other refuses; what one takes, the other takes."""
    document = document_of(Fake("m", PAIR))
    request = {"inputs": inputs}

    assert validator(document, "m.Request").is_valid(request) is is_right
    try:
        v2_json.decode(json.dumps(request).encode()).bind(PAIR, "m")
        is_taken = True
    except GatewayError:
        is_taken = False
    assert is_taken is is_right


def test_models_beyond_the_limit_are_said_to_be_left_out() -> None:
    """A registry of thousands must not make a document that no program reads."""
    document = openapi.document([], [], left_out=7)

    assert "7 models are left out" in document["info"]["description"]


def test_the_document_is_written_once_a_table() -> None:
    """However many ask at once; another table or address is written anew."""
    written: list[str] = []

    def write() -> str:
        written.append("x")
        return str(len(written))

    async def ask() -> None:
        latest, first = openapi.Latest(), Table()
        assert set(await asyncio.gather(*(latest.get(first, write) for _ in range(9)))) == {"1"}
        assert await latest.get(first, write, "other address") == "2"
        assert await latest.get(Table(), write, "other address") == "3"

    asyncio.run(ask())
    assert len(written) == 3


# -- the page


class Variantless(NamedTuple):
    """As much of a model as the page reads."""

    name: str
    versions: tuple[int, ...] = (1,)
    refused: Any = None
    champion: Fake | None = None


EVIL = st.text(alphabet="<>\"'&;`$(){}\\/ab\n\u2028é", min_size=1, max_size=12)


@given(EVIL, EVIL)
def test_no_name_can_leave_its_place_on_the_page(name: str, reason: str) -> None:
    """Tensor names and reasons come from files of others: only text, never markup."""
    model = Model(
        "m",
        (1, 2),
        refused={2: reason},
        champion=Fake("m", signature(TensorSpec(name, "FP32", (-1,)))),  # type: ignore[arg-type]
    )
    plain = Model(
        "m",
        (1, 2),
        refused={2: "x"},
        champion=Fake("m", signature(TensorSpec("x", "FP32", (-1,)))),  # type: ignore[arg-type]
    )

    page = pages.render("http://gate:8000", [model], [])

    assert page.count("<") == pages.render("http://gate:8000", [plain], []).count("<")
    assert page.count('"') == pages.render("http://gate:8000", [plain], []).count('"')


@given(EVIL)
def test_the_command_is_one_command_whatever_the_names_are(name: str) -> None:
    """A shell reads it as curl with six words, the last of them the request."""
    taken = signature(TensorSpec(name, "BYTES", (-1, 1)))

    words = shlex.split(pages.command("http://gate:8000", "m", taken).replace("\\\n", " "))

    assert words[:3] == ["curl", "-s", "http://gate:8000/v2/models/m/infer"]
    assert json.loads(words[6])["inputs"][0]["name"] == name
    assert len(words) == 7


def test_a_model_too_large_for_a_line_gets_none() -> None:
    """A million zeros would help nobody; BF16 cannot be written as JSON."""
    for spec in (TensorSpec("x", "FP32", (-1, 1_000_000)), TensorSpec("x", "BF16", (-1,))):
        model = Model("m", (1,), champion=Fake("m", signature(spec)))  # type: ignore[arg-type]
        page = pages.render("http://gate", [model], [])
        assert "curl" not in page
        assert "send them as binary tensors" in page
