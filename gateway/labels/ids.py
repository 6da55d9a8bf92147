"""Prediction ids, and which of them are kept. Pure.

The id of a request is its `x-request-id`; row k of it is `id/k`. Which requests are kept is a
function of the id alone, so that a label for one that was not kept can be told from a label for one
that nobody has made.
"""

import hashlib
import re

ID_CHARS_MAX = 128
"""As many as an `x-request-id` may have."""
ROWS_MAX = 1_000_000
"""Rows of one request that labels can name."""

_ID = re.compile(r"[\x21-\x7e]{1,128}")
_ROW = re.compile(r"(0|[1-9][0-9]{0,6})", re.ASCII)
_SCALE = 2.0**64


def split(text: str) -> tuple[str, int | None] | None:
    """The request and the row that a prediction id names; None when it is no such id.

    A row of None stands for all rows of the request. A request's own id may hold a slash: what
    follows its last one is a row only if it is a number.

    >>> split("0a1b-7/2"), split("0a1b-7"), split("team/7"), split("a b")
    (('0a1b-7', 2), ('0a1b-7', None), ('team', 7), None)
    """
    request, slash, row = text.rpartition("/")
    if slash and request and _ROW.fullmatch(row) and int(row) < ROWS_MAX:
        return (request, int(row)) if _ID.fullmatch(request) else None
    return (text, None) if _ID.fullmatch(text) else None


def is_kept(request: str, share: float) -> bool:
    """Whether predictions of this request are kept, when `share` (0 to 1) of all are.

    Uniform over ids, and every process decides alike: the first 8 bytes of BLAKE2b of the id, as a
    fraction, against the share.
    """
    if share >= 1:
        return True
    digest = hashlib.blake2b(request.encode(), digest_size=8, person=b"labels").digest()
    return int.from_bytes(digest, "big") < share * _SCALE
