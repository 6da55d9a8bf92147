"""What is kept of one captured request, and the frame of bytes that it lies in.

A file starts with a line of text that names the format. Frames follow, each a head of 16 bytes
(mark, length, checksum of the content, checksum of the head) and a content in MessagePack. A frame
that was cut off or damaged is known by its checksums, and the next one is found by its mark.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from gateway.errors import TensorError
from gateway.protocol import raw
from gateway.tensors import Array, datatype
from registry.signature import TensorSpec

FORMAT = 1
"""Number of the format written; a reader refuses a higher one."""
TITLE = b"driftgate capture "
HEAD_LINE = TITLE + b"%d\n" % FORMAT
MARK = b"\xd5DGc"
HEAD = struct.Struct("<4sIII")
_CHECKED = struct.Struct("<4sII")


class Unit(NamedTuple):
    """One of the units of a route that a request has."""

    kind: str
    """`header:NAME`, `field:NAME` or `request`."""
    bucket: int
    """By the salt of the split that was in force."""
    hash: str = ""
    """16 hexadecimal digits, by the salt of captures; empty where the unit is redacted."""
    value: bytes | None = None
    """The unit itself, where the route says so."""


class TensorKept(msgspec.Struct, frozen=True, array_like=True):
    """A tensor as raw bytes, little endian, as the protocol's binary extension has them."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request with its answer.

    Fields may be added within a format; none changes its meaning.
    """

    time: float
    """When it was answered, in seconds since 1970."""
    id: str
    """Its `x-request-id`; row k of it is the prediction `id/k`."""
    model: str
    revision: int
    """In force when its variant was picked."""
    variant: str
    """That it was assigned to, as the route's `to` says it."""
    version: int
    """Of that variant."""
    traffic: str
    """As in the metrics: primary, pinned."""
    reason: str
    """Of the decision: `SPLIT`, `RULE_MATCH(name)`, ..."""
    sampled: float
    """Probability with which its unit is captured."""
    rows: int
    seconds: float
    """From the first byte read to the answer."""
    code: str = "ok"
    """What it ended with: ok, or the code of an error."""
    served: int | None = None
    """The version that answered or failed last, where that is another one: there was a hop."""
    digest: str = ""
    """Of the files of the version that answered, where it is known without reading them."""
    p: float = 1.0
    """Probability with which such a unit is given this variant."""
    odds: dict[str, float] = {}
    """The same for every variant that it could have been given."""
    bucket: int | None = None
    """That decided, where one did."""
    unit: str = ""
    """The kind of the unit that decided."""
    kinds: tuple[str, ...] = ()
    """Kinds of units that its route asks for, in this order."""
    units: tuple[Unit, ...] = ()
    """Those of them that it has."""
    salt: str = ""
    """Tells which salt made the buckets; not the salt itself."""
    looked: tuple[str, ...] = ()
    """`header:NAME` and `field:NAME` that are kept if they were there: a route that looks at
    others cannot be simulated exactly."""
    headers: dict[str, str] = {}
    """Of these, the headers that were there."""
    parameters: dict[str, bool | int | float | str] = {}
    """Of these, the parameters of the request that were there."""
    inputs: tuple[TensorKept, ...] | None = None
    outputs: tuple[TensorKept, ...] | None = None


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Record)


def pack(record: Record) -> bytes:
    """A record as the content of a frame."""
    return _ENCODER.encode(record)


def unpack(content: bytes) -> Record | None:
    """The record in the content of a frame; None if it holds none that makes sense."""
    try:
        return _DECODER.decode(content)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def framed(content: bytes) -> bytes:
    """Content with its head."""
    checked = _CHECKED.pack(MARK, len(content), zlib.crc32(content))
    return checked + zlib.crc32(checked).to_bytes(4, "little") + content


def read_head(head: bytes) -> tuple[int, int] | None:
    """(length, checksum) of the content, as a head of 16 bytes says; None if it is no head."""
    mark, length, checksum, own = HEAD.unpack(head)
    is_whole = mark == MARK and own == zlib.crc32(head[: _CHECKED.size])
    return (length, checksum) if is_whole else None


def kept(specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> tuple[TensorKept, ...]:
    """Arrays as they are kept."""
    return tuple(
        TensorKept(spec.name, datatype(array), array.shape, raw.write(array))
        for spec, array in zip(specs, arrays, strict=True)
    )


def array_of(tensor: TensorKept) -> Array:
    """The array that was kept; a view of the record's bytes.

    Raises
    ------
    TensorError : the bytes are not what datatype and shape say.
    """
    if min(tensor.shape, default=0) < 0:
        raise TensorError(f"{tensor.name!r}: no array can have shape {list(tensor.shape)}")
    count = math.prod(tensor.shape)
    try:
        return raw.read(tensor.data, tensor.datatype, tensor.shape, count, tensor.name)
    except KeyError:
        raise TensorError(f"{tensor.name!r}: there is no datatype {tensor.datatype!r}") from None
