"""gRPC in HTTP/2, against its document and against what grpcio says."""

import gzip
import zlib
from urllib.parse import unquote_to_bytes

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequestError, EncodingError, GatewayError, TooLargeError
from gateway.grpc import wire


def test_statuses_have_the_numbers_that_grpcio_has() -> None:
    """Another implementation's table."""
    assert {status.name: status.value[0] for status in grpc.StatusCode} == wire.CODES


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(b"1S", 1), (b"250m", 0.25), (b"99999999u", 99.999999), (b"2M", 120), (b"1H", 3600),
     (b"0n", 0), (b"1000000n", 0.001)],
)  # fmt: skip
def test_timeouts_are_read_in_every_unit(text: bytes, seconds: float) -> None:
    """Digits and a unit, as the document has them."""
    assert wire.timeout_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", [b"", b"1", b"S", b"-1S", b"1.5S", b"1s", b"123456789S", b" 1S"])
def test_what_is_no_timeout_is_refused(text: bytes) -> None:
    """With the name of the header."""
    with pytest.raises(BadRequestError, match="grpc-timeout"):
        wire.timeout_s(text)


@given(st.text(max_size=100))
def test_sentences_come_back_from_grpc_message(text: str) -> None:
    """By percent-decoding, and the header holds printable ASCII only."""
    made = wire.details(text)

    assert unquote_to_bytes(made).decode() == text
    assert all(0x20 <= byte <= 0x7E for byte in made)


def test_metadata_is_what_is_neither_http_nor_grpc() -> None:
    """Binary values are unpacked, padded or not, several in one."""
    headers = [
        (b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"grpc-timeout", b"1S"),
        (b"x-user", b"a"), (b"id-bin", b"AAE"), (b"id-bin", b"AA==, AQ"),
    ]  # fmt: skip

    found = [(b"x-user", b"a"), (b"id-bin", b"\0\1"), (b"id-bin", b"\0"), (b"id-bin", b"\1")]
    assert wire.metadata(headers) == found
    with pytest.raises(BadRequestError, match="id-bin"):
        wire.metadata([(b"id-bin", b"?")])


@pytest.mark.parametrize(
    ("coding", "pack"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)]
)
def test_packed_messages_are_bounded_by_what_they_unpack_to(coding: bytes, pack: object) -> None:
    """A byte more than allowed is refused, at whatever ratio."""
    assert callable(pack)
    assert wire.unpacked(pack(bytes(5_000_000)), coding, 5_000_000) == bytes(5_000_000)
    with pytest.raises(TooLargeError, match="grpc_message_bytes_max"):
        wire.unpacked(pack(bytes(5_000_001)), coding, 5_000_000)
    with pytest.raises(GatewayError) as damaged:
        wire.unpacked(pack(b"abc")[:-1], coding, 100)
    assert damaged.value.grpc_status == "INTERNAL"


def test_codings_that_are_not_spoken_are_unimplemented() -> None:
    """And a packed message without one is a fault of the client's library."""
    with pytest.raises(EncodingError) as unknown:
        wire.unpacked(b"x", b"snappy", 100)
    with pytest.raises(GatewayError) as unnamed:
        wire.unpacked(b"x", b"", 100)

    assert (unknown.value.grpc_status, unnamed.value.grpc_status) == ("UNIMPLEMENTED", "INTERNAL")


def test_prefixes_say_how_long_a_message_is() -> None:
    """Up to the limit, with 0 or 1 before it."""
    assert wire.size(wire.prefixed(b"abc"), 3) == 3
    with pytest.raises(TooLargeError):
        wire.size(wire.prefixed(b"abcd"), 3)
    with pytest.raises(GatewayError):
        wire.size(b"\2\0\0\0\0", 3)
