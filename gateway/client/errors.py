"""Why there is no answer: one class for each code of a server, and for each way to get none.

ClientError
|- RefusedError             4xx  the server refused the request
|  |- BadRequestError       400  the request itself is wrong
|  |  |- TensorError        400  one tensor of it is
|  |  |- InputRefusedError  400  it fits the signature, the model refuses its values
|  |  |- ChangeRefusedError 400  a change that cannot be made
|  |  `- HostError          400  the address named is not that server's
|  |- UnauthenticatedError  401  no key, or none that is known
|  |- ForbiddenError        403  not from here, or not with this key
|  |- NotFoundError         404  ModelNotFoundError, VersionNotFoundError below it
|  |- MethodError           405  the path exists, the verb does not
|  |- ConflictError         409  somebody else changed the same; ProtectedError: insist on it
|  |- PreconditionError     412  another revision is in force
|  |- SlowRequestError      408  the request did not arrive in time
|  |- TooLargeError         413  more than one request may carry
|  |- EncodingError         415  a format that is not spoken there
|  |- QueueFullError        429  as many rows wait as may wait; two more below it
|  `- HeadTooLargeError     431  too many headers, or too long ones
|- ServerError              5xx  the server could not answer
|  |- ModelFailedError      500  the model failed on input that fits its signature
|  `- NotReadyError         503  nothing can answer this now; with three of its own below
|- DeadlineError            504  the time is over, here or there
|- UnreachableError              nobody answered: refused, or the connection was lost
`- AnswerError                   an answer came that is none of this protocol
"""

import math

import httpx
import orjson


class ClientError(Exception):
    """Why there is no answer. Catch this for all of them."""

    code: str = "client_error"
    """The server's stable code, where the server said one."""
    status: int | None = None
    """The HTTP status, where there was an answer."""

    def __init__(
        self,
        sentence: str,
        *,
        code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(sentence)
        self.code = code or self.code
        self.status = status or self.status
        self.request_id = request_id
        """What the server's log and metrics know the request by."""
        self.retry_after_s = retry_after_s
        """When to come back, where the server said so."""


class RefusedError(ClientError):
    """The server refused the request, and would refuse it again (but see QueueFullError)."""

    code = "refused"


class BadRequestError(RefusedError):
    """The request is wrong."""

    code = "bad_request"
    status = 400


class TensorError(BadRequestError):
    """One tensor does not fit what the model takes."""

    code = "bad_tensor"


class InputRefusedError(BadRequestError):
    """The tensors fit the signature, yet the model refuses their values."""

    code = "input_refused"


class HostError(BadRequestError):
    """The request names no host, several, or one that is not this server."""

    code = "bad_host"


class UnauthenticatedError(RefusedError):
    """A key is needed, and none that is known was shown."""

    code = "unauthenticated"
    status = 401


class ChangeRefusedError(BadRequestError):
    """A change that cannot be made; says everything that is wrong with it."""

    code = "change_refused"


class ProtectedError(RefusedError):
    """A change that must be insisted on: `force`, `take_over`."""

    code = "protected"
    status = 409


class ConflictError(RefusedError):
    """Somebody else has changed the same thing meanwhile; says who, and what."""

    code = "conflict"
    status = 409


class PreconditionError(RefusedError):
    """Another revision is in force than `if_match`; says who changed what."""

    code = "precondition_failed"
    status = 412


class ForbiddenError(RefusedError):
    """The caller may not do this from where it is, or with the key it has."""

    code = "forbidden"
    status = 403


class NotFoundError(RefusedError):
    """A name that nothing there has."""

    code = "not_found"
    status = 404


class ModelNotFoundError(NotFoundError):
    """No model of this name is served."""

    code = "model_not_found"


class VersionNotFoundError(NotFoundError):
    """The model is there, this version of it is not."""

    code = "version_not_found"


class MethodError(RefusedError):
    """The path exists, but not for this verb: another program, or another release."""

    code = "method_not_allowed"
    status = 405


class SlowRequestError(RefusedError):
    """The request did not arrive in time."""

    code = "slow_request"
    status = 408


class HeadTooLargeError(RefusedError):
    """More headers, or longer ones, than a request may have."""

    code = "head_too_large"
    status = 431


class TooLargeError(RefusedError):
    """More than one request may carry."""

    code = "too_large"
    status = 413


class EncodingError(RefusedError):
    """A content coding that is not spoken there."""

    code = "unsupported_encoding"
    status = 415


class MediaTypeError(RefusedError):
    """A type of body that the path does not read."""

    code = "unsupported_media_type"
    status = 415


class QueueFullError(RefusedError):
    """As many rows wait as may wait; every try met that."""

    code = "queue_full"
    status = 429


class ServerError(ClientError):
    """The server could not answer a request that may be right."""

    code = "internal"
    status = 500


class StateError(ServerError):
    """The server cannot read what is in force."""

    code = "state_unreadable"
    status = 503


class StorageError(ServerError):
    """The server cannot write it; nothing is changed."""

    code = "storage_unavailable"
    status = 507


class ModelFailedError(ServerError):
    """The model failed on input that fits its signature."""

    code = "model_failed"


class NotReadyError(ServerError):
    """Nothing can answer this now; every try met that."""

    code = "not_ready"
    status = 503


class BusyError(NotReadyError):
    """As many connections are open as may be; every try met that."""

    code = "busy"


class NotAppliedError(NotReadyError):
    """A change is written, and not every live worker has put it in force yet."""

    code = "not_applied"


class NoMemoryError(NotReadyError):
    """Opening the version would take more memory than there is for it."""

    code = "no_memory"


class OverrideError(ForbiddenError):
    """The route does not let clients choose the version."""

    code = "override_not_allowed"


class ModelBusyError(QueueFullError):
    """As many requests of the model are under way as its route allows; every try met that."""

    code = "model_busy"


class RateLimitedError(QueueFullError):
    """The caller has made as many requests as its key may; every try met that."""

    code = "rate_limited"


class VersionRefusedError(NotReadyError):
    """The version is in the registry, but could not be opened."""

    code = "version_refused"


class UnsupportedError(ServerError):
    """Part of the protocol that is not there."""

    code = "unsupported"
    status = 501


class DeadlineError(ClientError):
    """The time allowed is over. `status` is 504 when the server said so, else None."""

    code = "deadline_exceeded"


class UnreachableError(ClientError):
    """Nobody answered: the connection was refused or lost."""

    code = "unreachable"


class AnswerError(ClientError):
    """What came is no answer of this protocol."""

    code = "bad_answer"


ERRORS: tuple[type[ClientError], ...] = (
    BadRequestError,
    TensorError,
    InputRefusedError,
    ChangeRefusedError,
    ProtectedError,
    ConflictError,
    PreconditionError,
    StateError,
    StorageError,
    HostError,
    UnauthenticatedError,
    ForbiddenError,
    NotFoundError,
    ModelNotFoundError,
    VersionNotFoundError,
    MethodError,
    SlowRequestError,
    HeadTooLargeError,
    TooLargeError,
    EncodingError,
    MediaTypeError,
    QueueFullError,
    ModelBusyError,
    RateLimitedError,
    OverrideError,
    ServerError,
    ModelFailedError,
    NotReadyError,
    BusyError,
    NoMemoryError,
    NotAppliedError,
    VersionRefusedError,
    UnsupportedError,
    DeadlineError,
)
"""Those that a server's answer becomes, by code; a code that is not here goes by its status."""

_BY_CODE = {error.code: error for error in ERRORS}
_BY_STATUS: dict[int, type[ClientError]] = {
    400: BadRequestError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    405: MethodError,
    413: TooLargeError,
    415: EncodingError,
    429: QueueFullError,
    503: NotReadyError,
    504: DeadlineError,
}


def error_of(status: int, headers: httpx.Headers, body: bytes, request_id: str) -> ClientError:
    """What an answer that is not 2xx says."""
    code, sentence = None, f"the server answered {status}"
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        if isinstance(value.get("error"), str):
            sentence = value["error"]
        if isinstance(value.get("code"), str):
            code = value["code"]
    kind = _BY_CODE.get(code or "") or _BY_STATUS.get(status)
    if kind is None:  # Another program's status: a redirect is no answer either.
        kind = AnswerError if status < 400 else RefusedError if status < 500 else ServerError
    return kind(
        sentence,
        code=code,
        status=status,
        request_id=headers.get("x-request-id", request_id),
        retry_after_s=_seconds(headers.get("retry-after")),
    )


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:
        return None  # A date: clocks differ, so it is passed over.
    return seconds if 0 <= seconds < math.inf else None
