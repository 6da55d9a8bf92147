"""The grammar of names: what a directory entry or a URL may call a model or a version."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import names


@pytest.mark.parametrize("name", ["fraud", "a", "0", "Fraud-2.model_x", "a" * 128])
def test_model_names_of_the_grammar_are_taken(name: str) -> None:
    """Letters, digits, dot, underscore and hyphen, starting with a letter or a digit."""
    assert names.is_model(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".git",
        "-x",
        "_x",
        "a b",
        "a/b",
        "..",
        "a..b",
        "../x",
        "a" * 129,
        "é",
        "a\n",
        "a\x00",
        "٣",
    ],
)
def test_other_model_names_are_refused(name: str) -> None:
    """Nothing that could leave the directory, hide in it, or break a log line."""
    assert not names.is_model(name)


@given(st.integers(1, 10**18 - 1))
def test_every_positive_integer_is_a_version(number: int) -> None:
    """And reads back as itself."""
    assert names.version(str(number)) == number


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "01",
        "-1",
        "+1",
        " 7",
        "7 ",
        "1_0",
        "1.0",
        "",
        "x",
        "٣",
        "\uff11",
        "9" * 19,
        "1\n",
        "1e3",
    ],
)
def test_what_int_would_take_but_is_no_version(text: str) -> None:
    """int() reads signs, spaces, underscores, zeros and other scripts' digits; versions do not."""
    assert names.version(text) is None
