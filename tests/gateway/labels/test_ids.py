"""The grammar of prediction ids, and the share of them that is kept."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.labels import ids

visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=100)


@given(visible, st.integers(0, ids.ROWS_MAX - 1))
def test_a_row_is_read_from_behind_the_last_slash(request: str, row: int) -> None:
    """Whatever an `x-request-id` holds, slashes included, `id/k` names row k of it."""
    assert ids.split(f"{request}/{row}") == (request, row)


@pytest.mark.parametrize("text", ["", " ", "a b", "ä", "a\n", "a" * 129, "a" * 129 + "/1", "\x00"])
def test_what_no_request_can_be_called_is_no_id(text: str) -> None:
    """As `x-request-id` itself: up to 128 visible ASCII characters."""
    assert ids.split(text) is None


@pytest.mark.parametrize("text", ["a/01", "a/-1", "a/1.0", "a/٣", "a/99999999", "a/", "/3"])
def test_what_is_no_row_belongs_to_the_request(text: str) -> None:
    """Leading zeros, signs, other scripts and numbers beyond the limit are part of the id."""
    assert ids.split(text) == ((text, None) if text.isascii() else None)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5])
def test_the_share_of_ids_that_are_kept_is_the_one_asked_for(share: float) -> None:
    """Binomial within five standard errors, of ids that differ in one digit only."""
    n = 20_000
    kept = sum(ids.is_kept(f"request-{k}", share) for k in range(n))

    assert abs(kept - n * share) < 5 * math.sqrt(n * share * (1 - share))


@given(visible)
def test_raising_the_share_keeps_what_was_kept(request: str) -> None:
    """A label is not called 'not sampled' because the share was raised in between."""
    kept = [ids.is_kept(request, share / 10) for share in range(11)]

    assert kept == sorted(kept)
    assert kept[-1]
    assert not kept[0]
