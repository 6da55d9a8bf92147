"""Labels as clients send them: every format, every wrong value."""

import json
import math
import re
from typing import Any

import msgpack
import pytest

from gateway.errors import BadRequestError, TooLargeError
from gateway.labels import reading
from gateway.labels.reading import Given, Summary, place, read
from gateway.labels.rows import Label
from gateway.labels.target import Target

NUMBER, CLASS = Target("score"), Target("word", task="multiclass", takes_text=True)


def placed(
    *given: Given, target: Target | None = NUMBER, rows_of: Any = None, models: Any = None
) -> tuple[list[Label], Summary]:
    summary = Summary()
    found = place(given, summary, models=models or {"m": target}, rows_of=rows_of or {})
    return [entry.label for entry in found], summary


def test_all_formats_say_the_same() -> None:
    """JSON with and without an envelope, MessagePack and CSV give the same labels."""
    labels = [{"id": "a/0", "label": 1, "model": "m"}, {"id": "b/3", "label": 0.5, "model": "m"}]
    table = b"id,label,model\r\na/0,1,m\r\nb/3,0.5,m\r\n"
    expected = [Label("a", 0, "m", 1.0), Label("b", 3, "m", 0.5)]

    for body, kind in [
        (json.dumps(labels).encode(), "application/json"),
        (json.dumps({"labels": labels}).encode(), "application/json"),
        (msgpack.packb({"labels": labels}), "msgpack"),
        (msgpack.packb(labels), "msgpack"),
        (table, "text/csv"),
        (b"\xef\xbb\xbf" + table, "text/csv"),
    ]:
        assert placed(*read(body, kind))[0] == expected


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b'"a"', "application/json"),
        (b'{"lables": []}', "application/json"),
        (b'[{"id": "a", "label": 1, "lable": 2}]', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"\xc1", "msgpack"),
        (b"\xdd\xff\xff\xff\xff", "msgpack"),
        (b"\x91" * 100_000, "msgpack"),
        (b"\xff\xfe", "text/csv"),
        (b"key,label\na,1\n", "text/csv"),
        (b"", "text/csv"),
    ],
)
def test_a_body_that_is_none_is_refused_whole(body: bytes, kind: str) -> None:
    """One sentence, whatever is wrong with it."""
    with pytest.raises(BadRequestError):
        read(body, kind)


def test_more_labels_than_one_request_may_have_are_refused() -> None:
    """Also before they are all looked at."""
    with pytest.raises(TooLargeError):
        read(b"id,label\n" + b"a,1\n" * (reading.LABELS_MAX + 1), "text/csv")


@pytest.mark.parametrize(
    "label",
    [None, "yes", "", [], {}, math.nan, math.inf, 2**53 + 1, 10**400, [1, [2]], "0.5", b"x"],
)
def test_a_label_of_the_wrong_type_is_invalid_and_says_what_would_be_right(label: Any) -> None:
    """A number is wanted; the good label beside it is taken."""
    labels, summary = placed(Given("a/0", label), Given("b/0", label=True))

    assert labels == [Label("b", 0, "m", 1.0)]
    assert summary.counts["invalid"] == 1
    for problem in summary.problems:
        assert problem["is"] == "invalid"
        assert re.search("a finite number|one label", problem["reason"])


@pytest.mark.parametrize("label", [1, True, "", "a" * 257, "a\x00b", "\x1b[0m"])
def test_where_classes_have_names_a_label_is_a_printable_text(label: Any) -> None:
    """A name that is no text, too long, or would break a page is invalid."""
    labels, summary = placed(Given("a", label), Given("b", "späť"), target=CLASS)

    assert labels == [Label("b", 0, "m", "späť")]
    assert summary.counts["invalid"] == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1.0), (" 0.5 ", 0.5), ("true", 1.0), ("False", 0.0), ("-1e3", -1000.0), ("1_0", None),
     ("nan", None), ("inf", None), ("٣", None), ("x", None), ("", None)],
)  # fmt: skip
def test_a_text_of_a_table_stands_for_a_number_where_one_is_wanted(
    text: str, value: float | None
) -> None:
    """Where names are wanted, a 7 stays a text."""
    assert reading.value_of(text, NUMBER, is_text=True) == value
    assert reading.value_of("7", CLASS, is_text=True) == "7"


def test_a_list_labels_the_rows_of_a_request() -> None:
    """As many as it has; another number, or a single label for many rows, is invalid."""
    rows = {"a": {"m": 3}}

    assert placed(Given("a", [1, 0, 1]), rows_of=rows)[0] == [
        Label("a", 0, "m", 1.0), Label("a", 1, "m", 0.0), Label("a", 2, "m", 1.0)
    ]  # fmt: skip
    for wrong in (Given("a", [1, 0]), Given("a", 1), Given("a/0", [1])):
        labels, summary = placed(wrong, rows_of=rows)
        assert (labels, summary.counts["invalid"]) == ([], 1)


def test_the_model_is_the_one_named_or_the_only_one_that_can_be_meant() -> None:
    """Named, else the one with a prediction of this id, else the only one that is served."""
    two = {"m": NUMBER, "n": NUMBER}

    assert placed(Given("a", 1, "n"), models=two)[0][0].model == "n"
    assert placed(Given("a", 1), models=two, rows_of={"a": {"n": 1}})[0][0].model == "n"
    assert placed(Given("a", 1))[0][0].model == "m"
    for given, rows, verdict in [
        (Given("a", 1, "o"), {}, "invalid"),
        (Given("a", 1), {"a": {"m": 1, "n": 1}}, "invalid"),
        (Given("a", 1), {}, "unknown"),
    ]:
        labels, summary = placed(given, models=two, rows_of=rows)
        assert (labels, summary.problems[0]["is"]) == ([], verdict)


def test_reasons_are_bounded_and_counted_beyond_that() -> None:
    """A hundred are told; the counts hold all, and hostile ids are cut."""
    _, summary = placed(*[Given("x" * 5000, 1)] * 250)
    told = summary.to_dict()

    assert told["invalid"] == 250
    assert len(told["problems"]) == reading.PROBLEMS_MAX
    assert told["problems_left_out"] == 250 - reading.PROBLEMS_MAX
    assert len(json.dumps(told)) < 50_000
