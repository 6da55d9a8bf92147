"""MessagePack: the v2 request and answer as one document, tensors as raw bytes or as lists.

A document is passed over first, which allocates nothing, and only what is complete becomes Python
objects: a length that lies costs no memory. A large one is walked value by value, so that lists and
maps stay within limits while raw tensors may be as large as a body may.
Source: the MessagePack specification (github.com/msgpack/msgpack), "Formats".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgpack  # type: ignore[import-untyped]  # it comes without types

from gateway.errors import BadRequestError, GatewayError, TooLargeError
from gateway.protocol import raw
from gateway.protocol.call import Answer, Call, Served, Tensor, choose
from gateway.protocol.v2_json import kind, read_rest, tensor, tensor_head
from gateway.tensors import BFLOAT16, Array, datatype, widened

MEDIA_TYPES = frozenset(("application/msgpack", "application/x-msgpack", "application/vnd.msgpack"))
"""Names that clients know the format by; answers carry the first."""
HEADERS = ((b"content-type", b"application/msgpack"),)
"""What goes with every document that is answered."""

_TEXT = frozenset((*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB))
_RAW_START = {0xC4: 2, 0xC5: 3, 0xC6: 5}
"""Bytes before the content of a bin, by its first byte."""
_MAP = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_LIST = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_FIELDS_MAX = 1024
_TENSORS_MAX = 1024
_RANK_MAX = 32
_SMALL_BYTES = 64 * 1024
"""Shorter documents are unpacked whole: whatever they hold, it is little."""
_NO_START = "a byte that starts no value"
_NOT_JSON = "a field's name is no text, or a value is of an extension type"
_LISTS_MAX = 1 << 20
"""Lists and maps in one document: an empty one is a byte, and takes seventy as an object."""


@dataclass(slots=True)
class DocumentCall(Call):
    """A call, and how its answer is to be written."""

    is_raw: bool = True
    """Tensors as raw bytes; else as lists."""


class MessagePack:
    """MessagePack as a codec.

    Parameters
    ----------
    bytes_max : bytes of a document beside its raw tensors; lists take some thirty times their size
    in_stream : documents say themselves what an answer of its own says in headers
    """

    def __init__(self, bytes_max: int, *, in_stream: bool = False) -> None:
        self._bytes_max = bytes_max
        self._in_stream = in_stream

    def decode(self, body: bytes) -> DocumentCall:
        """A document as a call; TooLargeError, BadRequestError or TensorError when it is none."""
        return decode(body, self._bytes_max)

    def encode(self, call: Call, served: Served, outputs: Sequence[Array]) -> Answer:
        """The answer, with the outputs that the call asked for."""
        chosen = choose(call, served.signature, served.model)
        said = call.decision.decode() if self._in_stream else ""
        return Answer(encode(call, served, outputs, chosen, said), HEADERS)


def decode(body: bytes, bytes_max: int) -> DocumentCall:
    """A document as a call.

    Raises
    ------
    BadRequestError : not MessagePack, or not an inference request.
    TensorError : an input whose datatype, shape or data is wrong by itself.
    TooLargeError : more than `bytes_max` bytes beside raw tensors.
    """
    return _request(_document(body, bytes_max))


def identity(body: bytes, bytes_max: int) -> str | None:
    """The `id` of a document that is no request otherwise, if it has one."""
    try:
        document = _document(body, bytes_max)
    except GatewayError:
        return None
    value = document.get("id") if type(document) is dict else None
    return value if type(value) is str else None


def encode(
    call: Call, served: Served, arrays: Sequence[Array], chosen: Sequence[int], decision: str = ""
) -> bytes:
    """An answer as a document.

    Parameters
    ----------
    arrays : all outputs, in the model's order
    chosen : positions of those wanted
    decision : becomes a parameter of the document
    """
    is_raw = call.is_raw if isinstance(call, DocumentCall) else True
    document: dict[str, Any] = {
        "model_name": served.model,
        "model_version": str(served.version),
    }
    if call.id is not None:
        document["id"] = call.id
    if decision:
        document["parameters"] = {"x-driftgate-decision": decision}
    document["outputs"] = [
        {
            "name": served.signature.outputs[k].name,
            "datatype": datatype(arrays[k]),
            "shape": arrays[k].shape,
            "data": _data(arrays[k], is_raw),
        }
        for k in chosen
    ]
    packed: bytes = msgpack.packb(document)
    return packed


def encode_error(error: GatewayError, identity: str | None = None) -> bytes:
    """An error as a document: the sentence, its stable code, and the status it has over HTTP."""
    document: dict[str, Any] = {"error": str(error), "code": error.code, "status": error.status}
    if identity is not None:
        document["id"] = identity
    if error.retry_after_s is not None:
        document["retry_after_s"] = error.retry_after_s
    packed: bytes = msgpack.packb(document)
    return packed


class Framer:
    """Finds where documents end in a stream of bytes. Builds no objects.

    Parameters
    ----------
    bytes_max : a longer document is refused as soon as it is seen to be longer
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        # The unpacker's own buffer never holds more than what is kept here.
        self._unpacker = _unpacker(0x7FFF_FFFF, 4096)
        self._kept = bytearray()
        self._start = 0

    @property
    def is_between(self) -> bool:
        """Whether everything that was fed belongs to documents that have been given out."""
        return not self._kept

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes; take out all documents before more are fed."""
        self._unpacker.feed(chunk)
        self._kept += chunk

    def documents(self) -> Iterator[bytes]:
        """Every document that is complete, in order.

        Raises
        ------
        BadRequestError : what comes is no MessagePack, so nobody knows where it ends.
        TooLargeError : the document is longer than one may be.
        """
        while self._kept:
            try:
                self._unpacker.skip()
            except msgpack.OutOfData:
                if len(self._kept) > self._bytes_max:
                    raise self._too_large() from None
                return
            except msgpack.StackError:
                raise _broken("nested too deep") from None
            except ValueError:
                raise _broken(_NO_START) from None
            size = self._unpacker.tell() - self._start
            if size > self._bytes_max:
                raise self._too_large()
            self._start += size
            document = bytes(memoryview(self._kept)[:size])
            del self._kept[:size]
            yield document

    def end(self) -> None:
        """Nothing more comes; raises BadRequestError when a document is incomplete."""
        if self._kept:
            raise BadRequestError("the stream ends in the middle of a document")

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"a document of a stream is longer than {self._bytes_max} bytes (limits.json_bytes_max)"
        )


class _Walk:
    """Reads one document from its start to its end, value by value."""

    __slots__ = ("_body", "_bytes_left", "_bytes_max", "_lists_left", "_unpacker")

    def __init__(self, body: bytes, bytes_max: int) -> None:
        self._body = body
        self._bytes_max = self._bytes_left = bytes_max
        self._lists_left = _LISTS_MAX
        self._unpacker = _unpacker(len(body), len(body))
        self._unpacker.feed(body)

    def document(self) -> Any:
        """All of it; the data of an input may be bytes, and those are not counted."""
        if self._next() in _MAP:
            document: Any = {}
            for name in self._fields("the document"):
                is_inputs = name == "inputs" and self._next() in _LIST
                document[name] = self._inputs() if is_inputs else self._value()
        else:
            document = self._value()
        if (more := len(self._body) - self._unpacker.tell()) > 0:
            raise _followed(more)
        return document

    def _inputs(self) -> list[Any]:
        count = self._unpacker.read_array_header()
        _refuse_many(count, _TENSORS_MAX, "'inputs'", "tensors")
        return [self._input(k) for k in range(count)]

    def _input(self, k: int) -> Any:
        if self._next() not in _MAP:
            return self._value()
        given = {}
        for name in self._fields(f"inputs[{k}]"):
            is_raw = name == "data" and self._next() in _RAW_START
            given[name] = self._raw() if is_raw else self._value()
        return given

    def _fields(self, what: str) -> Iterator[Any]:
        """The names of a map's fields; each value is taken before the next name."""
        count = self._unpacker.read_map_header()
        _refuse_many(count, _FIELDS_MAX, what, "fields")
        for _ in range(count):
            if self._next() not in _TEXT:
                self._unpacker.skip()  # Which may find that nothing is left.
                raise ValueError  # As the unpacker refuses it.
            yield self._value()

    def _value(self) -> Any:
        """The next value as Python objects."""
        start = self._unpacker.tell()
        self._unpacker.skip()  # From here on it is known to be complete.
        end = self._unpacker.tell()
        self._bytes_left -= end - start
        if self._bytes_left < 0:
            raise TooLargeError(
                f"the document has more than {self._bytes_max} bytes beside raw tensors"
                " (limits.json_bytes_max)"
            )
        return _unpacked(
            memoryview(self._body)[start:end], list_hook=self._counted, object_hook=self._counted
        )

    def _raw(self) -> bytes:
        """The content of the bin that comes next."""
        start = self._unpacker.tell() + _RAW_START[self._next()]
        self._unpacker.skip()
        # A copy: numbers in the middle of a body are seldom where a processor wants them.
        return self._body[start : self._unpacker.tell()]

    def _next(self) -> int:
        """The first byte of the next value, which says what it is."""
        at = self._unpacker.tell()
        return self._body[at] if at < len(self._body) else -1

    def _counted(self, value: Any) -> Any:
        self._lists_left -= 1
        if self._lists_left < 0:
            raise TooLargeError(f"the document has more than {_LISTS_MAX} lists and maps")
        return value


def _document(body: bytes, bytes_max: int) -> Any:
    """A document as Python objects.

    Raises
    ------
    BadRequestError, TooLargeError
    """
    try:
        if len(body) > min(_SMALL_BYTES, bytes_max):
            return _Walk(body, bytes_max).document()
        complete = _unpacker(len(body) or 1, len(body) or 1)
        complete.feed(body)
        complete.skip()  # Or a length that lies would be believed.
        return _unpacked(body)
    except msgpack.ExtraData as error:
        raise _followed(len(error.extra)) from None
    except msgpack.OutOfData:
        why = "it ends in the middle of a value" if body else "it is empty"
    except msgpack.StackError:
        why = "nested too deep"
    except msgpack.FormatError:
        why = _NO_START
    except UnicodeDecodeError:
        why = "a text is not valid UTF-8"
    except ValueError:
        why = _NOT_JSON
    raise _broken(why)


def _unpacked(document: bytes | memoryview, **hooks: Any) -> Any:
    """What is known to be complete, as Python objects.

    The limit of extensions must stay: one that claims 2**32 - 1 bytes is passed over as an empty
    one, and would be read far beyond the end of the document.
    """
    return msgpack.unpackb(document, ext_hook=_no_extension, max_ext_len=0, **hooks)


def _unpacker(buffer_bytes_max: int, read_size: int) -> msgpack.Unpacker:
    return msgpack.Unpacker(
        None,
        raw=False,
        strict_map_key=True,
        max_buffer_size=buffer_bytes_max,
        read_size=read_size,
    )


def _request(document: Any) -> DocumentCall:
    if type(document) is not dict:
        raise BadRequestError(f"the document must be a map, not {kind(document)}")
    inputs = document.get("inputs")
    if type(inputs) is not list or not inputs:
        raise BadRequestError("'inputs' must be a list of at least one tensor")
    _refuse_many(len(document), _FIELDS_MAX, "the document", "fields")
    _refuse_many(len(inputs), _TENSORS_MAX, "'inputs'", "tensors")
    call = DocumentCall([_tensor(given, k) for k, given in enumerate(inputs)])
    if len(document) > 1:
        parameters = document.get("parameters")
        if type(parameters) is dict and set(map(type, parameters)) - {str}:
            raise _broken(_NOT_JSON)
        read_rest(document, call)
        is_raw = parameters.get("raw") if parameters is not None else None
        if is_raw is not None and type(is_raw) is not bool:
            raise BadRequestError("parameters.raw must be true or false")
        call.is_raw = is_raw is not False
    return call


def _tensor(given: Any, k: int) -> Tensor:
    data = given.get("data") if type(given) is dict else None
    if type(data) is bytes:
        name, datatype, shape, count = tensor_head(given, k)
        return Tensor(name, datatype, shape, raw.read(data, datatype, shape, count, name))
    if type(data) is list and given.get("datatype") == "BYTES":
        given["data"] = _texts(data, given.get("name"))
    return tensor(given, k, may_hold_booleans=True)


def _texts(values: list[Any], name: Any, depth: int = 0) -> list[Any]:
    """Elements of a BYTES tensor, or lists of them; those that came as bytes become text."""
    kinds = set(map(type, values))
    if list in kinds and depth < _RANK_MAX:
        return [_texts(v, name, depth + 1) if type(v) is list else v for v in values]
    if bytes not in kinds:
        return values
    return [raw.text(v, k, name) if type(v) is bytes else v for k, v in enumerate(values)]


def _data(array: Array, is_raw: bool) -> bytes | list[Any]:
    if array.dtype == BFLOAT16 and not is_raw:
        array = widened(array)
    if is_raw and array.dtype.kind not in "OUS":
        return array.tobytes()
    values: list[Any] = array.ravel().tolist()
    return values


def _no_extension(_: int, __: bytes) -> NoReturn:
    raise ValueError  # As the unpacker refuses what it knows not to be allowed.


def _refuse_many(count: int, count_max: int, what: str, of: str) -> None:
    if count > count_max:
        raise BadRequestError(f"{what} has {count} {of}; {count_max} are allowed")


def _broken(why: str) -> BadRequestError:
    return BadRequestError(f"the document is not MessagePack: {why}")


def _followed(n_bytes: int) -> BadRequestError:
    return BadRequestError(f"the document is followed by {n_bytes} more bytes")
