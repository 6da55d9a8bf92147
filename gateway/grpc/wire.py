"""gRPC as it lies in HTTP/2: messages with their prefix, timeouts, statuses, metadata. Pure.

Source: the document "gRPC over HTTP2" (PROTOCOL-HTTP2.md of grpc/grpc).
"""

import base64
import binascii
import re

from gateway.errors import BadRequestError, EncodingError, GatewayError, TooLargeError
from gateway.protocol.compression import unpack
from gateway.router import Headers

CODES = {
    name: number
    for number, name in enumerate((
        "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
        "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
        "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
        "UNAUTHENTICATED",
    ))
}  # fmt: skip
"""Numbers of the statuses."""
PREFIX_BYTES = 5
"""Before each message: whether it is packed, and its length."""
CODINGS = b"identity, deflate, gzip"

_DETAILS_MAX = 2000
"""An error's text travels in a header, of which all together may have 8 KiB with most clients."""
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_QUOTED = re.compile(rb"[^ -$&-~]")
"""Bytes of grpc-message that are written as %XX: all but printable ASCII, and the % itself."""
_PLAIN = re.compile(rb"[!-~](?:[ -~]*[!-~])?")
_OWN = frozenset((b"te", b"content-type", b"host", b"content-length", b"accept-encoding"))
"""What belongs to HTTP, and is no metadata."""


class StatusError(GatewayError):
    """What gRPC says of its own accord, beyond the table of errors: a status and a sentence."""

    code = "protocol"

    def __init__(self, status: str, sentence: str) -> None:
        super().__init__(sentence)
        self.grpc_status = status


def prefixed(message: bytes) -> bytes:
    """A message as it is sent: not packed, with its length."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def timeout_s(text: bytes) -> float:
    """The value of grpc-timeout in seconds.

    Raises
    ------
    BadRequestError : it is none.
    """
    parts = _TIMEOUT.fullmatch(text)
    if parts is None:
        raise BadRequestError("grpc-timeout: up to eight digits and a unit, such as 250m")
    return int(parts[1]) * _UNIT_S[parts[2].decode()]


def details(sentence: str) -> bytes:
    """A sentence as the value of grpc-message."""
    return _QUOTED.sub(
        lambda one: b"%%%02X" % one[0][0], sentence[:_DETAILS_MAX].encode("utf-8", "replace")
    )


def is_plain(value: bytes) -> bool:
    """Whether a client's own text may stand in a header of ours as it is."""
    return _PLAIN.fullmatch(value) is not None


def metadata(headers: Headers) -> Headers:
    """What the client sent beside the message; values of names in -bin are unpacked.

    Raises
    ------
    BadRequestError : such a value is not base64.
    """
    found = []
    for name, value in headers:
        if name in _OWN or name.startswith(b"grpc-"):
            continue
        if not name.endswith(b"-bin"):
            found.append((name, value))
            continue
        try:
            for part in value.split(b","):
                padded = part.strip() + b"=" * (-len(part.strip()) % 4)
                found.append((name, base64.b64decode(padded, validate=True)))
        except (binascii.Error, ValueError):
            name_shown = name.decode("latin-1")
            raise BadRequestError(f"metadata {name_shown!r}: the value is not base64") from None
    return found


def size(prefix: bytes | bytearray, bytes_max: int) -> int:
    """Bytes of the message that a prefix announces.

    Raises
    ------
    StatusError : the message is longer than allowed, or the prefix is none.
    """
    if prefix[0] > 1:
        raise StatusError("INTERNAL", "a message begins with neither 0 nor 1")
    length = int.from_bytes(prefix[1:PREFIX_BYTES], "big")
    if length > bytes_max:
        raise TooLargeError(
            f"the message has {length} bytes, at most {bytes_max} are taken"
            " (limits.grpc_message_bytes_max)"
        )
    return length


def unpacked(message: bytes, coding: bytes, bytes_max: int) -> bytes:
    """A message whose prefix says that it is packed, as it was before.

    Raises
    ------
    GatewayError : it cannot be read, or is longer than allowed.
    """
    if coding in (b"", b"identity"):
        raise StatusError("INTERNAL", "the message is packed, and grpc-encoding does not say how")
    try:
        return unpack(message, coding, bytes_max=bytes_max, ratio_max=bytes_max)
    except TooLargeError:
        raise TooLargeError(
            f"the unpacked message is longer than {bytes_max} bytes (limits.grpc_message_bytes_max)"
        ) from None
    except EncodingError:
        raise
    except BadRequestError as error:
        raise StatusError("INTERNAL", str(error)) from None
