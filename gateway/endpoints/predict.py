"""`POST /v2/models/{m}[/versions/{v}]/infer`: a raw ASGI endpoint in front of all routing.

A starlette route would cost as much as the whole HTTP server.
"""

import asyncio
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from gateway.access import ANYBODY, Access
from gateway.endpoints.route import CALLER, error_body, error_headers
from gateway.errors import (
    BadRequestError,
    ClientGoneError,
    EncodingError,
    GatewayError,
    MediaTypeError,
    MethodError,
    TooLargeError,
    shown,
)
from gateway.prediction import DataPlane, Head, infer
from gateway.protocol import compression
from gateway.protocol.call import Codec
from gateway.protocol.messagepack import MEDIA_TYPES, MessagePack
from gateway.protocol.v2_binary import LENGTH_HEADER, V2, json_length
from gateway.telemetry import event

DIRECT = "driftgate.direct"
"""The ASGI extension of a listener that hands over whole bodies and writes whole answers."""


class Direct(Protocol):
    """What the extension is."""

    def read(self) -> bytes | None:
        """The whole body, or None while parts are missing: then they are received."""

    async def write(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Status, headers in lower case without control characters, body."""


_NOTHING: dict[str, Any] = {}
_PREFIX, _SUFFIX = "/v2/models/", "/infer"
_LENGTH_MIN = len(_PREFIX + _SUFFIX)
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_JSON = (b"content-type", b"application/json")
_READ = frozenset((
    b"content-length", b"content-type", b"content-encoding", b"accept-encoding", b"x-request-id",
    b"x-request-timeout", b"x-driftgate-version",
    LENGTH_HEADER, b"authorization", b"origin", b"sec-fetch-site", b"host",
))  # fmt: skip
_SHORT_BYTES = 16 * 1024
"""A longer body is unpacked off the loop, and a longer answer packed there."""
_PLAIN = frozenset((b"application/json", b"application/octet-stream", b""))
_FOREIGN = re.compile(
    r"(multipart|image|audio|video|font|model)/|"
    r"(text|application)/(.*[+-])?(xml|html|csv|css|yaml|cbor|bson|avro|protobuf|parquet|arrow)\b|"
    r"application/(grpc|zip|gzip|pdf|vnd\.apache|x-(tar|zip|gzip|npy|npz|pickle|numpy))"
)
"""Types that are surely no inference request. All others are tried: clients say what they like."""


def is_prediction(path: str) -> bool:
    """Whether a path is this endpoint's."""
    # A model may be named infer: the slash of its metadata path must not serve both ends.
    return path.endswith(_SUFFIX) and path.startswith(_PREFIX) and len(path) >= _LENGTH_MIN


Plan = Callable[[Scope, dict[bytes, bytes]], tuple[str | None, str | None, Codec]]
"""What a path and headers ask for: model, version, and the format; raises GatewayError."""
Lines = tuple[tuple[bytes, bytes], ...]
ErrorBody = Callable[[GatewayError], bytes]


class Predict:
    """Predictions over HTTP; called with every path for which `is_prediction` holds."""

    def __init__(self, plane: DataPlane, access: Access) -> None:
        self._plane = plane
        self._access = access
        self._body_bytes_max = plane.config.limits.body_bytes_max
        self._ratio_max = plane.config.limits.unpacked_ratio_max
        self._json_bytes_max = plane.config.limits.json_bytes_max
        self._v2 = V2(self._json_bytes_max)
        self._messagepack = MessagePack(self._json_bytes_max)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer one request of the Open Inference Protocol."""
        return self.answer(scope, receive, send, self._plan)

    async def answer(  # noqa: C901, PLR0912  one request from start to end, on one screen
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        plan: Plan,
        error_body: ErrorBody = error_body,
    ) -> None:
        """Answer one prediction, whatever path and format it came by."""
        start = time.perf_counter()
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        request_id = headers.get(b"x-request-id")
        if request_id is None or not REQUEST_ID.fullmatch(request_id):
            request_id = self._plane.ids.make()
        direct: Direct | None = scope.get("extensions", _NOTHING).get(DIRECT)
        status, head = 200, None
        try:
            if scope["method"] != "POST":
                raise MethodError(scope["method"], ["POST"])  # noqa: TRY301  answered below
            model, version, codec = plan(scope, headers)
            body = direct.read() if direct is not None else None
            if body is None:
                body = await self._body(headers, receive)
            elif len(body) > self._body_bytes_max:
                raise self._too_large()  # noqa: TRY301  answered below
            if b"content-encoding" in headers:
                body = await self._unpacked(body, headers[b"content-encoding"])
            timeout_s = read_timeout_s(headers)
            head = Head(model, version, timeout_s, partial(_gone, receive), request_id)
            head.headers, head.wanted = scope["headers"], headers.get(b"x-driftgate-version")
            if CALLER in scope:
                head.caller = scope[CALLER].name
            answer = await infer(self._plane, codec, head, body, start)
            content, extra = answer.body, answer.headers
            if len(content) > compression.BYTES_MIN and b"accept-encoding" in headers:
                content, extra = await _packed(content, extra, headers[b"accept-encoding"])
        except ClientGoneError:
            return
        except GatewayError as error:
            if head is None:
                self._plane.rejected(error)
            status, content, extra = error.status, error_body(error), _error_lines(error)
        except Exception:  # noqa: BLE001  no trace may reach a client
            event("request_failed", logging.ERROR, path=scope["path"], exc=True)
            failure = GatewayError("internal error; the server's log says more")
            status, content, extra = 500, error_body(failure), _error_lines(failure)
        lines = [*extra, (b"content-length", b"%d" % len(content)), (b"x-request-id", request_id)]
        if head is not None and head.decision:
            lines.append((b"x-driftgate-decision", head.decision))
        if direct is not None:
            await direct.write(status, lines, content)
            return
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": content})

    def _plan(
        self, scope: Scope, headers: dict[bytes, bytes]
    ) -> tuple[str | None, str | None, Codec]:
        caller = self._access.guard("predict", "POST", headers)
        if caller is not ANYBODY:
            scope[CALLER] = caller
        path: str = scope["path"]
        model, _, version = path[len(_PREFIX) : -len(_SUFFIX)].partition("/versions/")
        codec: Codec = self._v2
        if LENGTH_HEADER in headers:
            codec = V2(self._json_bytes_max, json_length(headers[LENGTH_HEADER]))
        elif (content_type := headers.get(b"content-type", b"")) not in _PLAIN:
            codec = self._by_type(content_type)
        return model, version if path.count("/") > 4 else None, codec

    def _by_type(self, content_type: bytes) -> Codec:
        """The format of a type of content that is neither the usual one nor absent."""
        kind = content_type.decode("latin-1").partition(";")[0].strip().lower()
        if kind in MEDIA_TYPES:
            return self._messagepack
        if _FOREIGN.match(kind):
            raise MediaTypeError(
                f"content-type {shown(kind)} is not read here; send application/json,"
                " application/octet-stream (binary tensors) or application/msgpack"
            )
        return self._v2

    async def _unpacked(self, body: bytes, coding: bytes) -> bytes:
        """The body as it was before the client packed it."""
        if not compression.is_coded(coding):
            return body
        unpack = partial(
            compression.unpack,
            body,
            coding,
            bytes_max=self._body_bytes_max,
            ratio_max=self._ratio_max,
        )
        return unpack() if len(body) <= _SHORT_BYTES else await asyncio.to_thread(unpack)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body.

        Raises
        ------
        TooLargeError : longer than limits.body_bytes_max; known before it is read, if it can be.
        """
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._body_bytes_max:
            raise self._too_large()
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client hung up")
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(body) > self._body_bytes_max:
                raise self._too_large()
            return body
        chunks, size = [body], len(body)
        while message.get("more_body", False):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError("the client hung up")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._body_bytes_max:
                raise self._too_large()
        return b"".join(chunks)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"the body is longer than {self._body_bytes_max} bytes (limits.body_bytes_max)"
        )


async def _packed(content: bytes, extra: Lines, accept: bytes) -> tuple[bytes, Lines]:
    """The answer packed as the client likes best, if that pays."""
    coding = compression.accepted(accept)
    if coding is None:
        return content, extra
    if len(content) <= _SHORT_BYTES:
        packed = compression.pack(content, coding)
    else:
        packed = await asyncio.to_thread(compression.pack, content, coding)
    if packed is None:
        return content, extra
    coded = (b"content-encoding", coding.encode())
    return packed, (*extra, coded, (b"vary", b"accept-encoding"))


async def _gone(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _error_lines(error: GatewayError) -> tuple[tuple[bytes, bytes], ...]:
    extra = error_headers(error)
    if isinstance(error, EncodingError):
        extra["accept-encoding"] = ", ".join(compression.CODINGS)
    return (_JSON, *((name.encode(), value.encode()) for name, value in extra.items()))


def read_timeout_s(headers: dict[bytes, bytes]) -> float | None:
    """Seconds that `x-request-timeout` allows; raises BadRequestError when it says nothing."""
    text = headers.get(b"x-request-timeout")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BadRequestError(f"x-request-timeout must be seconds > 0, not {shown(text.decode('latin-1'))}")  # noqa: E501  # fmt: skip
    return seconds
