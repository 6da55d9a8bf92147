"""What is asked of a server, when it is asked again, and what its answers mean.

Written as generators that ask for a request or a pause and are sent what came of it: nothing here
sends anything or waits, so that the sync and the async client are the same program.
"""

import math
import random
import re
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
import orjson

from gateway.client.errors import (
    AnswerError,
    ClientError,
    DeadlineError,
    NotFoundError,
    NotReadyError,
    RefusedError,
    TensorError,
    UnreachableError,
    error_of,
)
from gateway.client.wire import (
    Change,
    Metadata,
    Prediction,
    of_column,
    of_list,
    read_answer,
    read_change,
    write_binary,
    write_json,
)
from gateway.tensors import Array
from registry.signature import TensorSpec

_PAUSE_S, _PAUSE_S_MAX = 0.05, 2.0
_JITTER = 0.25
_TIMEOUT_S_MIN = 0.001
_BINARY = "binary_tensor_data"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Send:
    """One request to send now, with this much time for it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A time to let pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Got:
    """One whole answer."""

    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Lost:
    """No whole answer came."""

    why: httpx.HTTPError
    was_sent: bool
    """Whether the server may have seen the request."""
    is_late: bool = False
    """Whether it was the time that ended it."""


Step = Send | Pause
T = TypeVar("T")
Steps = Generator[Step, Got | Lost | None, T]
"""Asks for requests and pauses, is sent what came of them, and returns the result."""


def lost_by(why: httpx.HTTPError) -> Lost:
    """What an exception of httpx means for the request that met it."""
    before = isinstance(why, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return Lost(why, was_sent=not before, is_late=isinstance(why, httpx.TimeoutException))


@dataclass(slots=True)
class _Deadline:
    """One time limit over all tries of a call."""

    timeout_s: float
    ends: float = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s = {self.timeout_s}: must be seconds > 0")
        self.ends = time.monotonic() + self.timeout_s

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a change is made."""

    message: str = ""
    if_match: int | None = None
    dry_run: bool = False
    force: bool = False
    take_over: bool = False
    wait: bool = False
    timeout_s: float | None = None


def model_path(model: str, *more: str) -> str:
    """The admin path of a model, and what is below it."""
    return "/".join(["/admin/models", *(quote(part, safe="") for part in (model, *more))])


def route_path(model: str) -> str:
    """The admin path of a model's route."""
    return f"/admin/routes/{quote(model, safe='')}"


class Core:
    """What is asked of a server and how its answers are read; sends nothing itself."""

    def __init__(
        self,
        url: str,
        timeout_s: float,
        retries: int,
        headers: Mapping[str, str] | None,
        is_binary: bool | None,
    ) -> None:
        if retries < 0:
            raise ValueError(f"retries = {retries}: must be at least 0")
        _Deadline(timeout_s)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url = {url!r}: must start with http:// or https://")
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        # Unpacking a compressed answer would cost more than it saves on the way.
        self._headers = {"accept-encoding": "identity", **(headers or {})}
        self._is_binary = is_binary
        self._metadata: dict[tuple[str, str | None], Metadata] = {}

    # -- one exchange

    def exchange(
        self,
        method: str,
        path: str,
        deadline: _Deadline,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        retries: int | None = None,
    ) -> Steps[Got]:
        """Send until it is answered, refused, or the time is over.

        It is sent again when the server cannot have seen it (no connection), when the server
        refused it before any work (429; 503 that names a time or is `not_ready`), and when the
        connection was lost underway: nothing that this client asks for changes more than counters.

        Raises
        ------
        ClientError
        """
        # One id for all tries: the server can tell that they are one request.
        sent = {**self._headers, "x-request-id": secrets.token_hex(8), **(headers or {})}
        tries = 1 + (self._retries if retries is None else retries)
        error: ClientError | None = None
        for k in range(tries):
            left_s = deadline.left_s
            if left_s < _TIMEOUT_S_MIN:
                break
            sent["x-request-timeout"] = f"{left_s:.3f}"
            got = yield Send(method, path, dict(query or {}), sent, body, left_s)
            if isinstance(got, Got):
                if got.status < 300:
                    return got
                error = error_of(got.status, got.headers, got.body, sent["x-request-id"])
                if not _may_come_back(error):
                    raise error
            else:
                assert got is not None  # noqa: S101  a request is answered or lost
                if got.is_late and got.was_sent:
                    break
                error = UnreachableError(
                    f"{self.url}: {_reason(got)}", request_id=sent["x-request-id"]
                )
            pause_s = _pause_s(k, error.retry_after_s)
            # Waiting past the end would only hide what the server has said.
            if k + 1 == tries or pause_s >= deadline.left_s:
                raise error
            yield Pause(pause_s)
        raise DeadlineError(
            f"{self.url}: no answer within {deadline.timeout_s:g} s",
            request_id=sent["x-request-id"],
        ) from error

    def json(
        self, method: str, path: str, timeout_s: float | None = None, **more: Any
    ) -> Steps[Any]:
        """The JSON value that a path answers."""
        got = yield from self.exchange(method, path, self.deadline(timeout_s), **more)
        return _json(got.body, self.url)

    def deadline(self, timeout_s: float | None) -> _Deadline:
        """The limit of one call that starts now."""
        return _Deadline(self._timeout_s if timeout_s is None else timeout_s)

    # -- what the clients offer

    def predict(
        self,
        model: str,
        inputs: Mapping[str, Any],
        version: int | str | None,
        outputs: Sequence[str] | None,
        id: str | None,  # noqa: A002  the protocol's own word
        timeout_s: float | None,
        request_id: str | None,
    ) -> Steps[Prediction]:
        """One prediction; lists become arrays of the datatypes that the model takes."""
        deadline = self.deadline(timeout_s)
        arrays = dict(inputs)
        if any(not isinstance(value, np.ndarray) for value in arrays.values()):
            about = yield from self._known(model, version, deadline)
            arrays = {name: of_list(name, value, about) for name, value in arrays.items()}
        return (yield from self._infer(model, arrays, version, outputs, id, deadline, request_id))

    def predict_table(
        self,
        model: str,
        columns: Mapping[str, Any],
        version: int | str | None,
        outputs: Sequence[str] | None,
        timeout_s: float | None,
        request_id: str | None,
    ) -> Steps[Prediction]:
        """A prediction a row, from columns."""
        deadline = self.deadline(timeout_s)
        about = yield from self._known(model, version, deadline)
        arrays = {str(name): of_column(str(name), columns[name], about) for name in columns}
        return (yield from self._infer(model, arrays, version, outputs, None, deadline, request_id))

    def metadata(
        self, model: str, version: int | str | None, timeout_s: float | None
    ) -> Steps[Metadata]:
        """What a model takes and gives."""
        return (yield from self._ask_metadata(model, version, self.deadline(timeout_s)))

    def models(self, timeout_s: float | None) -> Steps[dict[str, tuple[int, ...]]]:
        """Names, each with the versions that are ready."""
        value = yield from self.json("POST", "/v2/repository/index", timeout_s, body=b"{}")
        found: dict[str, list[int]] = {}
        try:
            for entry in value:
                versions = found.setdefault(str(entry["name"]), [])
                if entry.get("state") == "READY" and "version" in entry:
                    versions.append(int(entry["version"]))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise AnswerError(f"{self.url}: its repository index is none") from None
        return {name: tuple(sorted(versions)) for name, versions in found.items()}

    def is_ready(
        self, model: str | None, version: int | str | None, timeout_s: float | None
    ) -> Steps[bool]:
        """Whether predictions are answered; a server that is not there is not ready."""
        path = "/v2/health/ready" if model is None else f"{_model_path(model, version)}/ready"
        try:
            yield from self.exchange("GET", path, self.deadline(timeout_s), retries=0)
        except (NotFoundError, NotReadyError, UnreachableError, DeadlineError):
            return False
        return True

    def drift(
        self, model: str, version: int | str | None, window: str, timeout_s: float | None
    ) -> Steps[dict[str, Any]]:
        """One report of the monitors."""
        query = {"window": window}
        if version is not None:
            query["version"] = str(version)
        path = f"/drift/{quote(model, safe='')}"
        value: dict[str, Any] = yield from self.json("GET", path, timeout_s, query=query)
        return value

    def change(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        how: "How",
    ) -> Steps[Change]:
        """One change of what is in force.

        Asked again as any call, since the same change twice changes nothing; but not under
        `if_match`, which the first try may have made untrue.
        """
        query = {
            name: "true"
            for name, is_meant in (
                ("dry_run", how.dry_run), ("force", how.force), ("take_over", how.take_over),
            )
            if is_meant
        }  # fmt: skip
        if how.message:
            query["message"] = how.message
        deadline = self.deadline(how.timeout_s)
        if how.wait:
            query |= {"wait": "applied", "timeout": f"{min(deadline.timeout_s * 0.9, 60):.3f}"}
        headers = {"x-driftgate-via": "python", "content-type": "application/json"}
        if how.if_match is not None:
            headers["if-match"] = f'"{how.if_match}"'
        got = yield from self.exchange(
            method,
            path,
            deadline,
            body=None if body is None else orjson.dumps(body),
            headers=headers,
            query=query,
            retries=None if how.if_match is None else 0,
        )
        try:
            return read_change(_json(got.body, self.url))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise AnswerError(f"{self.url}: its answer to a change is none") from None

    def history(
        self, model: str | None, limit: int, timeout_s: float | None
    ) -> Steps[list[dict[str, Any]]]:
        """The newest revisions."""
        query = {"limit": str(limit)} | ({} if model is None else {"model": model})
        value = yield from self.json("GET", "/admin/revisions", timeout_s, query=query)
        try:
            return list(value["revisions"])
        except (TypeError, KeyError):
            raise AnswerError(f"{self.url}: its history is none") from None

    # -- inside

    def _infer(
        self,
        model: str,
        arrays: Mapping[str, Array],
        version: int | str | None,
        outputs: Sequence[str] | None,
        id: str | None,  # noqa: A002  the protocol's own word
        deadline: _Deadline,
        request_id: str | None,
    ) -> Steps[Prediction]:
        if self._is_binary is None:
            self._is_binary = yield from self._speaks_binary(deadline)
        write = write_binary if self._is_binary else write_json
        body, headers = write(arrays, outputs, id)
        if request_id is not None:
            if not _REQUEST_ID.fullmatch(request_id):
                raise ValueError("request_id must be up to 128 visible ASCII characters")
            headers["x-request-id"] = request_id
        path = f"{_model_path(model, version)}/infer"
        try:
            got = yield from self.exchange("POST", path, deadline, body=body, headers=headers)
        except TensorError:
            # The model may have changed since it was asked what it takes.
            self._metadata.pop((model, _text(version)), None)
            raise
        return read_answer(got.body, got.headers, self.url)

    def _speaks_binary(self, deadline: _Deadline) -> Steps[bool]:
        try:
            got = yield from self.exchange("GET", "/v2", deadline)
        except RefusedError:
            return False
        value = _json(got.body, self.url)
        announced = value.get("extensions") if isinstance(value, dict) else None
        return isinstance(announced, list) and _BINARY in announced

    def _known(self, model: str, version: int | str | None, deadline: _Deadline) -> Steps[Metadata]:
        key = (model, _text(version))
        if (known := self._metadata.get(key)) is None:
            known = yield from self._ask_metadata(model, version, deadline)
            self._metadata[key] = known
        return known

    def _ask_metadata(
        self, model: str, version: int | str | None, deadline: _Deadline
    ) -> Steps[Metadata]:
        got = yield from self.exchange("GET", _model_path(model, version), deadline)
        value = _json(got.body, self.url)
        try:
            return Metadata(
                str(value["name"]),
                tuple(int(number) for number in value.get("versions") or ()),
                tuple(_spec(tensor) for tensor in value["inputs"]),
                tuple(_spec(tensor) for tensor in value["outputs"]),
            )
        except (TypeError, KeyError, ValueError, AttributeError):
            raise AnswerError(f"{self.url}: its metadata of model {model!r} is none") from None


def _may_come_back(error: ClientError) -> bool:
    """Whether the server refused for now, before any work."""
    if error.status == 429:
        return True
    return error.status == 503 and (error.retry_after_s is not None or error.code == "not_ready")


def _pause_s(k: int, retry_after_s: float | None) -> float:
    """How long to wait after try k; at random, so that many clients do not come back at once."""
    if retry_after_s is not None:
        return retry_after_s * (1 + _JITTER * random.random())  # noqa: S311  no secret
    grown_s: float = min(_PAUSE_S_MAX, _PAUSE_S * 2**k)
    return grown_s * random.uniform(0.5, 1)  # noqa: S311  no secret


def _reason(lost: Lost) -> str:
    if not lost.was_sent:
        return f"no connection ({lost.why})"
    return f"the connection was lost before the answer came ({lost.why})"


def _json(body: bytes, who: str) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise AnswerError(f"{who}: what came is not JSON") from None


def _spec(tensor: Any) -> TensorSpec:
    return TensorSpec(
        str(tensor["name"]), str(tensor["datatype"]), tuple(int(n) for n in tensor["shape"])
    )


def _model_path(model: str, version: int | str | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(str(version), safe='')}"


def _text(version: int | str | None) -> str | None:
    return None if version is None else str(version)


def with_key(headers: Mapping[str, str] | None, key: str | None) -> Mapping[str, str] | None:
    """Headers that show a key, where there is one."""
    return headers if key is None else {**(headers or {}), "authorization": f"Bearer {key}"}
