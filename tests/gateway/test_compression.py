"""Packed bodies: what zlib made is read back, everything else is refused within its bounds."""

import gzip
import random
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequestError, EncodingError, GatewayError, TooLargeError
from gateway.protocol import compression

MIB = 1024 * 1024
PACKERS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}


def unpack(body: bytes, coding: str, bytes_max: int = 64 * MIB, ratio_max: int = 100) -> bytes:
    return compression.unpack(body, coding.encode(), bytes_max=bytes_max, ratio_max=ratio_max)


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=3000), coding=st.sampled_from(sorted(PACKERS)))
def test_what_is_packed_is_unpacked(body: bytes, coding: str) -> None:
    """By the standard library's packers; names are read in any case, with spaces around."""
    assert unpack(PACKERS[coding](body), coding) == body
    assert unpack(PACKERS[coding](body), f" {coding.upper()} ") == body


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_our_own_packing_is_read_by_others(coding: str) -> None:
    """gzip and zlib of the standard library read it; what cannot get shorter is left alone."""
    body = b'{"data":[1.0,2.0,3.0]}' * 200
    packed = compression.pack(body, coding)

    assert packed is not None
    assert len(packed) < len(body) / 4
    assert (gzip.decompress if coding == "gzip" else zlib.decompress)(packed) == body
    assert compression.pack(random.Random(5).randbytes(5000), coding) is None


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_every_cut_and_every_changed_byte_of_the_checksum_is_noticed(coding: str) -> None:
    """A truncated body, bytes behind it and a wrong checksum are errors, not data."""
    packed = PACKERS[coding](b"row" * 500)
    for size in range(len(packed)):
        with pytest.raises(BadRequestError):
            unpack(packed[:size], coding)
    with pytest.raises(BadRequestError, match="followed by"):
        unpack(packed + b"x", coding)
    with pytest.raises(BadRequestError, match="followed by"):
        unpack(packed + packed, coding)
    for k in range(1, 5):
        changed = bytearray(packed)
        changed[-k] ^= 0xFF
        with pytest.raises(BadRequestError):
            unpack(bytes(changed), coding)


def test_deflate_is_the_zlib_format() -> None:
    """As HTTP defines it; bare deflate and gzip under its name are refused."""
    bare = zlib.compressobj(wbits=-15)
    for body in (bare.compress(b"x" * 99) + bare.flush(), gzip.compress(b"x" * 99)):
        with pytest.raises(BadRequestError):
            unpack(body, "deflate")


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip,deflate", "compress", "é"])
def test_other_codings_are_named_and_refused(coding: str) -> None:
    """One coding, and one that is spoken."""
    with pytest.raises(EncodingError, match="gzip, deflate"):
        compression.unpack(b"x", coding.encode("latin-1"), bytes_max=MIB, ratio_max=100)


def test_a_bomb_is_stopped_at_the_limit_and_not_after_it() -> None:
    """Neither the limit of a body nor the ratio is passed by more than a byte; it costs little."""
    bomb = zlib.compress(bytes(64 * MIB), 9)
    start = time.process_time()
    with pytest.raises(TooLargeError, match="unpacked_ratio_max"):
        unpack(bomb, "deflate")
    with pytest.raises(TooLargeError, match="body_bytes_max"):
        unpack(zlib.compress(bytes(4 * MIB), 1), "deflate", bytes_max=MIB, ratio_max=10_000)
    assert time.process_time() - start < 1


def test_the_limits_are_the_largest_sizes_that_are_fine() -> None:
    """A mebibyte of zeros packs a thousandfold and is no attack; bounds are inclusive."""
    assert len(unpack(zlib.compress(bytes(MIB)), "deflate")) == MIB
    with pytest.raises(TooLargeError):
        unpack(zlib.compress(bytes(MIB + 1)), "deflate", ratio_max=10)
    assert len(unpack(zlib.compress(bytes(1000)), "deflate", bytes_max=1000)) == 1000
    with pytest.raises(TooLargeError):
        unpack(zlib.compress(bytes(1001)), "deflate", bytes_max=1000)


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=300), coding=st.sampled_from(["gzip", "deflate"]), data=st.data())
def test_no_bytes_do_more_than_be_refused(body: bytes, coding: str, data: st.DataObject) -> None:
    """Made up, or packed and then changed at one place."""
    packed = bytearray(PACKERS[coding](body))
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    for candidate in (body, bytes(packed)):
        status = 200
        try:
            unpack(candidate, coding)
        except GatewayError as error:
            status = error.status
        assert status in (200, 400, 413)


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        (b"gzip", "gzip"),
        (b"deflate", "deflate"),
        (b"gzip, deflate, br", "gzip"),
        (b"gzip;q=0.2, deflate;q=0.8", "deflate"),
        (b"GZIP; Q=1", "gzip"),
        (b"*", "gzip"),
        (b"*;q=0.5, gzip;q=0", "deflate"),
        (b"gzip;q=0", None),
        (b"identity", None),
        (b"br, zstd", None),
        (b"identity;q=1, gzip;q=0.5", None),
        (b"*;q=0", None),
        (b"", None),
        (b"gzip;q=never", None),
        (b"\xff;;,=", None),
    ],
)
def test_the_coding_is_what_the_client_likes_best(header: bytes, coding: str | None) -> None:
    """Weights count, then gzip goes before deflate; nothing understood means no coding."""
    assert compression.accepted(header) == coding
