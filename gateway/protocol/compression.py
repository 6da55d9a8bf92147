"""Packed bodies, gzip and deflate: in, with every bound checked on the way; out, when it pays."""

import zlib
from functools import lru_cache

from gateway.errors import BadRequestError, EncodingError, TooLargeError, shown

BYTES_MIN = 1024
"""Shorter answers are never packed: they fit into a packet as they are."""
CODINGS = ("gzip", "deflate")
"""What is spoken, the liked first. `deflate` is the zlib format, as HTTP says; not bare deflate."""

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_FREE_BYTES = 1024 * 1024
"""Up to this size a body may be packed as tightly as it will: columns of zeros are no attack."""
_LEVEL = 1
_CHUNK_BYTES = 1024 * 1024


def is_coded(header: bytes | None) -> bool:
    """Whether a content-encoding says that a body is packed."""
    return header is not None and header.strip().lower() not in (b"", b"identity")


def unpack(body: bytes, header: bytes, *, bytes_max: int, ratio_max: int) -> bytes:
    """The body as it was before it was packed.

    Parameters
    ----------
    header : the value of content-encoding
    bytes_max : of the body unpacked; no more is ever unpacked
    ratio_max : a body of more than a mebibyte may be so many times its packed size

    Raises
    ------
    EncodingError : not one of the codings that are spoken.
    TooLargeError : longer than allowed.
    BadRequestError : cut off, damaged, or followed by more bytes.
    """
    coding = header.decode("latin-1").strip().lower()
    if (bits := _WINDOW_BITS.get(coding)) is None:
        raise EncodingError(
            f"content-encoding {shown(coding)} is not read here; send one of:"
            f" {', '.join(CODINGS)}, identity"
        )
    by_ratio = max(_FREE_BYTES, ratio_max * len(body))
    size_max = min(bytes_max, by_ratio)
    unpacker = zlib.decompressobj(bits)
    chunks: list[bytes] = []
    size, rest = 0, body
    try:
        while not unpacker.eof and size <= size_max:
            # One byte more than allowed shows that there are more.
            chunk = unpacker.decompress(rest, min(_CHUNK_BYTES, size_max + 1 - size))
            rest = unpacker.unconsumed_tail
            if not chunk and not rest and not unpacker.eof:
                raise BadRequestError(f"the {coding} body is cut off")
            chunks.append(chunk)
            size += len(chunk)
    except zlib.error:
        raise BadRequestError(f"the body is not {coding}, or it is damaged") from None
    if size > bytes_max:
        raise TooLargeError(
            f"the unpacked body is longer than {bytes_max} bytes (limits.body_bytes_max)"
        )
    if size > by_ratio:
        raise TooLargeError(
            f"the body is more than {ratio_max} times as long as it was packed"
            " (limits.unpacked_ratio_max)"
        )
    if unpacker.unused_data:
        raise BadRequestError(f"the {coding} body is followed by {len(unpacker.unused_data)} bytes")
    return b"".join(chunks)


def pack(body: bytes, coding: str) -> bytes | None:
    """The body packed; None when that saves less than a tenth."""
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[coding])
    packed = packer.compress(body) + packer.flush()
    return packed if len(packed) < 0.9 * len(body) else None


@lru_cache(maxsize=64)
def accepted(header: bytes) -> str | None:
    """The coding that an accept-encoding likes best; None: as it is."""
    weights: dict[str, float] = {}
    for part in header.decode("latin-1").lower().split(","):
        name, _, parameter = part.partition(";")
        key, _, value = parameter.partition("=")
        try:
            weights[name.strip()] = float(value) if key.strip() == "q" else 1.0
        except ValueError:
            weights[name.strip()] = 0.0
    every = weights.get("*", 0.0)
    best = max(CODINGS, key=lambda coding: weights.get(coding, every))
    weight = weights.get(best, every)
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else None
