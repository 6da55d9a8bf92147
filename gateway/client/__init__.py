"""The Python client, sync and async: numpy in, numpy out, typed errors, one deadline a call.

Imports httpx, as `outgoing` does, and nothing of the server: what it needs to know of one comes by
HTTP. `steps` decides, `wire` writes and reads, `errors` says why not; here things are carried out.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import httpx

from gateway.client.errors import (
    AnswerError,
    BadRequestError,
    BusyError,
    ChangeRefusedError,
    ClientError,
    ConflictError,
    DeadlineError,
    EncodingError,
    ForbiddenError,
    HeadTooLargeError,
    HostError,
    InputRefusedError,
    MediaTypeError,
    MethodError,
    ModelBusyError,
    ModelFailedError,
    ModelNotFoundError,
    NoMemoryError,
    NotAppliedError,
    NotFoundError,
    NotReadyError,
    OverrideError,
    PreconditionError,
    ProtectedError,
    QueueFullError,
    RateLimitedError,
    RefusedError,
    ServerError,
    SlowRequestError,
    StateError,
    StorageError,
    TensorError,
    TooLargeError,
    UnauthenticatedError,
    UnreachableError,
    UnsupportedError,
    VersionNotFoundError,
    VersionRefusedError,
)
from gateway.client.steps import (
    Core,
    Got,
    How,
    Lost,
    Pause,
    Send,
    Steps,
    T,
    lost_by,
    model_path,
    route_path,
    with_key,
)
from gateway.client.wire import Change, Metadata, Prediction

__all__ = [
    "AnswerError",
    "AsyncClient",
    "BadRequestError",
    "BusyError",
    "Change",
    "ChangeOptions",
    "ChangeRefusedError",
    "Client",
    "ClientError",
    "ConflictError",
    "DeadlineError",
    "EncodingError",
    "ForbiddenError",
    "HeadTooLargeError",
    "HostError",
    "InputRefusedError",
    "MediaTypeError",
    "Metadata",
    "MethodError",
    "ModelBusyError",
    "ModelFailedError",
    "ModelNotFoundError",
    "NoMemoryError",
    "NotAppliedError",
    "NotFoundError",
    "NotReadyError",
    "OverrideError",
    "PreconditionError",
    "Prediction",
    "ProtectedError",
    "QueueFullError",
    "RateLimitedError",
    "RefusedError",
    "ServerError",
    "SlowRequestError",
    "StateError",
    "StorageError",
    "TensorError",
    "TooLargeError",
    "UnauthenticatedError",
    "UnreachableError",
    "UnsupportedError",
    "VersionNotFoundError",
    "VersionRefusedError",
]

TIMEOUT_S = 30.0
RETRIES = 2


class ChangeOptions(TypedDict, total=False):
    """How a change of what is in force is made; all optional."""

    message: str
    if_match: int | None
    dry_run: bool
    force: bool
    take_over: bool
    wait: bool
    timeout_s: float | None


class Client:
    """A driftgate server, or another that speaks the Open Inference Protocol. Thread-safe.

    Parameters
    ----------
    url : with scheme and port, such as `http://127.0.0.1:8000`
    timeout_s : for one call with all of its tries; the server is told how much of it is left
    retries : tries after the first, where trying again is safe
    key : sent as `Authorization: Bearer`; a server that asks for none passes over it
    headers : sent with every request
    binary : whether tensors go as raw bytes; None asks the server once whether it can read them
    transport : an httpx transport, for a proxy, own certificates, or a test
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        binary: bool | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._core = Core(url, timeout_s, retries, with_key(headers, key), binary)
        self._http = httpx.Client(base_url=self._core.url, trust_env=False, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        id: str | None = None,  # noqa: A002  the protocol's own word
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """One prediction.

        Parameters
        ----------
        inputs : arrays by name, sent as they are; a list or a number becomes an array of the
            model's datatype
        version : by number; None: the one that answers
        outputs : names wanted, in the order wanted; None: all
        id : given back in the answer
        timeout_s : for this call; None: the client's
        request_id : the prediction's own id; None: one is made

        Raises
        ------
        ClientError : the server's reason, as one of its subclasses.
        TypeError, ValueError : the inputs cannot be sent at all.
        """
        return self._run(
            self._core.predict(model, inputs, version, outputs, id, timeout_s, request_id)
        )

    def predict_table(
        self,
        model: str,
        columns: Mapping[str, Any],
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """A prediction a row, for a table with a column per input: a mapping or a data frame.

        Each column is cast to its input's datatype (never from text to numbers or to whole ones)
        and shaped as the input is, `(n_rows,)` or `(n_rows, 1)`.
        """
        return self._run(
            self._core.predict_table(model, columns, version, outputs, timeout_s, request_id)
        )

    def metadata(
        self, model: str, version: int | str | None = None, *, timeout_s: float | None = None
    ) -> Metadata:
        """What a model takes and gives."""
        return self._run(self._core.metadata(model, version, timeout_s))

    def models(self, *, timeout_s: float | None = None) -> dict[str, tuple[int, ...]]:
        """Names of the models there, each with its versions that are ready."""
        return self._run(self._core.models(timeout_s))

    def is_ready(
        self,
        model: str | None = None,
        version: int | str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> bool:
        """Whether the server, or a model of it, answers predictions; asked once, never again."""
        return self._run(self._core.is_ready(model, version, timeout_s))

    def drift(
        self,
        model: str,
        version: int | str | None = None,
        *,
        window: str = "last",
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """What the monitors see of a version, as `GET /drift/{model}` tells it."""
        return self._run(self._core.drift(model, version, window, timeout_s))

    def alias(self, model: str, alias: str, version: int, **how: Unpack[ChangeOptions]) -> Change:
        """Name a version of a model.

        Parameters
        ----------
        how : as for every change: `message`, `if_match` (the revision that must be in force),
            `dry_run`, `force`, `take_over`, `wait` (until all live workers have applied it, or
            the time is over), `timeout_s`

        Raises
        ------
        ConflictError, PreconditionError : somebody else has changed it.
        ClientError : the server's reason, as one of its subclasses.
        """
        path = model_path(model, "aliases", alias)
        return self._run(self._core.change("PUT", path, {"version": version}, How(**how)))

    def promote(self, model: str, version: int, **how: Unpack[ChangeOptions]) -> Change:
        """Make a version the champion; the one before is kept as `previous`."""
        path = model_path(model, "promote")
        return self._run(self._core.change("POST", path, {"version": version}, How(**how)))

    def rollback(self, model: str, **how: Unpack[ChangeOptions]) -> Change:
        """Make the previous champion answer again."""
        path = model_path(model, "rollback")
        return self._run(self._core.change("POST", path, {}, How(**how)))

    def restore(
        self, revision: int, model: str | None = None, **how: Unpack[ChangeOptions]
    ) -> Change:
        """Put in force again what an old revision said, of one model or of all."""
        path, body = f"/admin/revisions/{revision}/restore", {"model": model} if model else {}
        return self._run(self._core.change("POST", path, body, How(**how)))

    def put_route(
        self, model: str, route: Mapping[str, Any], **how: Unpack[ChangeOptions]
    ) -> Change:
        """Split a model's traffic."""
        return self._run(self._core.change("PUT", route_path(model), route, How(**how)))

    def history(
        self, model: str | None = None, *, limit: int = 50, timeout_s: float | None = None
    ) -> list[dict[str, Any]]:
        """Who changed what, the newest first."""
        return self._run(self._core.history(model, limit, timeout_s))

    def _run(self, steps: Steps[T]) -> T:
        got: Got | Lost | None = None
        try:
            while True:
                step = steps.send(got)
                got = None
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                else:
                    got = self._send(step)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _send(self, step: Send) -> Got | Lost:
        ends = time.monotonic() + step.timeout_s
        try:
            with self._http.stream(
                step.method,
                step.path,
                params=step.query,
                headers=step.headers,
                content=step.body,
                timeout=step.timeout_s,
            ) as answer:
                chunks = []
                for chunk in answer.iter_bytes():
                    chunks.append(chunk)
                    # Each wait for a chunk has the whole time; together they have it once.
                    if time.monotonic() > ends:
                        raise httpx.ReadTimeout("the answer came too slowly")
                return Got(answer.status_code, answer.headers, b"".join(chunks))
        except httpx.HTTPError as error:
            return lost_by(error)


class AsyncClient:
    """The same for asyncio: every method of `Client`, awaited."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        binary: bool | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._core = Core(url, timeout_s, retries, with_key(headers, key), binary)
        self._http = httpx.AsyncClient(
            base_url=self._core.url, trust_env=False, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        id: str | None = None,  # noqa: A002  the protocol's own word
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """One prediction; see `Client.predict`."""
        return await self._run(
            self._core.predict(model, inputs, version, outputs, id, timeout_s, request_id)
        )

    async def predict_table(
        self,
        model: str,
        columns: Mapping[str, Any],
        *,
        version: int | str | None = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Prediction:
        """A prediction a row; see `Client.predict_table`."""
        return await self._run(
            self._core.predict_table(model, columns, version, outputs, timeout_s, request_id)
        )

    async def metadata(
        self, model: str, version: int | str | None = None, *, timeout_s: float | None = None
    ) -> Metadata:
        """What a model takes and gives."""
        return await self._run(self._core.metadata(model, version, timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> dict[str, tuple[int, ...]]:
        """Names of the models there, each with its versions that are ready."""
        return await self._run(self._core.models(timeout_s))

    async def is_ready(
        self,
        model: str | None = None,
        version: int | str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> bool:
        """Whether the server, or a model of it, answers predictions; asked once, never again."""
        return await self._run(self._core.is_ready(model, version, timeout_s))

    async def drift(
        self,
        model: str,
        version: int | str | None = None,
        *,
        window: str = "last",
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """What the monitors see of a version, as `GET /drift/{model}` tells it."""
        return await self._run(self._core.drift(model, version, window, timeout_s))

    async def alias(
        self, model: str, alias: str, version: int, **how: Unpack[ChangeOptions]
    ) -> Change:
        """Name a version of a model. See `Client.alias`."""
        path = model_path(model, "aliases", alias)
        return await self._run(self._core.change("PUT", path, {"version": version}, How(**how)))

    async def promote(self, model: str, version: int, **how: Unpack[ChangeOptions]) -> Change:
        """Make a version the champion; the one before is kept as `previous`."""
        path = model_path(model, "promote")
        return await self._run(self._core.change("POST", path, {"version": version}, How(**how)))

    async def rollback(self, model: str, **how: Unpack[ChangeOptions]) -> Change:
        """Make the previous champion answer again."""
        path = model_path(model, "rollback")
        return await self._run(self._core.change("POST", path, {}, How(**how)))

    async def restore(
        self, revision: int, model: str | None = None, **how: Unpack[ChangeOptions]
    ) -> Change:
        """Put in force again what an old revision said, of one model or of all."""
        path, body = f"/admin/revisions/{revision}/restore", {"model": model} if model else {}
        return await self._run(self._core.change("POST", path, body, How(**how)))

    async def put_route(
        self, model: str, route: Mapping[str, Any], **how: Unpack[ChangeOptions]
    ) -> Change:
        """Split a model's traffic."""
        return await self._run(self._core.change("PUT", route_path(model), route, How(**how)))

    async def history(
        self, model: str | None = None, *, limit: int = 50, timeout_s: float | None = None
    ) -> list[dict[str, Any]]:
        """Who changed what, the newest first."""
        return await self._run(self._core.history(model, limit, timeout_s))

    async def _run(self, steps: Steps[T]) -> T:
        got: Got | Lost | None = None
        try:
            while True:
                step = steps.send(got)
                got = None
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                else:
                    got = await self._send(step)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _send(self, step: Send) -> Got | Lost:
        try:
            async with asyncio.timeout(step.timeout_s):
                answer = await self._http.request(
                    step.method,
                    step.path,
                    params=step.query,
                    headers=step.headers,
                    content=step.body,
                    timeout=step.timeout_s,
                )
        except httpx.HTTPError as error:
            return lost_by(error)
        except TimeoutError:
            return lost_by(httpx.ReadTimeout("the answer came too slowly"))
        return Got(answer.status_code, answer.headers, answer.content)
