"""Every way a request or a start can fail, with its HTTP and gRPC status and a stable code.

    GatewayError
    |- BadRequestError          400  the request itself is wrong
    |  |- HostError             400  no host, several, or one that is not this server
    |  |- TensorError           400  one tensor of it is: name, datatype, shape or data
    |  |- InputRefusedError     400  it fits the signature, and the model still refuses its values
    |  `- ChangeRefusedError    400  a change of what is in force that cannot be made
    |- NotFoundError            404  no such model, version or path
    |- ProtectedError           409  a change that must be insisted on
    |- ConflictError            409  somebody else has changed the same meanwhile
    |  `- AliasConflictError    409  a version was published, but somebody else moved the alias
    |- PreconditionError        412  another revision is in force than the change was meant for
    |- StateError               503  what is in force cannot be read
    |- VersionTakenError        409  another has the number that was asked for
    |- VersionWithdrawnError    409  just these files must not be served again
    |- LabelsOffError           409  no predictions are kept, so labels would meet none
    |- MethodError              405  the path exists, the verb does not
    |- IdleError                408  a stream on which nothing moves
    |- SlowRequestError         408  a request that does not arrive in time
    |- HeadTooLargeError        431  too many headers, or too long ones
    |- BusyError                503  as many connections as may be
    |- TooLargeError            413  more bytes or rows than one request may have
    |- EncodingError            415  a content coding that is not spoken here
    |- MediaTypeError           415  a type of body that the path does not read
    |- UnsupportedError         501  part of a protocol that is not there
    |- ClientGoneError          499  nobody is left to answer (never sent)
    |- ModelFailedError         500  the model failed on input that fits its signature
    |- NotReadyError            503  nothing can answer yet, or any more
    |- UnauthenticatedError     401  no key, or none that is known
    |- ForbiddenError           403  not from here, or not with this key
    |- BreakerOpenError         503  the variant is left alone for a while (never sent)
    |- DeadlineError            504  the answer would come too late
    |- StorageError             507  the disk or the database says no
    |- QueueFullError           429  as many rows wait as may wait
    |- ModelBusyError           429  as many requests of the model are under way as may be
    |- RateLimitedError         429  the caller has made as many requests as it may
    |- ConfigError                   a setting is wrong; the server does not start
    `- StartError                    the server cannot start for a reason outside its settings

An error text says what, where, and what would be right. It holds no path of the machine and no
trace: it is shown to clients.
"""

import math
import reprlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from registry import errors as registry
from registry.routes import RouteError


class GatewayError(Exception):
    """What driftgate answers instead of a prediction."""

    code = "internal"
    status = 500
    grpc_status = "INTERNAL"
    retry_after_s: int | None = None


class BadRequestError(GatewayError):
    """The request is wrong, and would be wrong again."""

    code = "bad_request"
    status = 400
    grpc_status = "INVALID_ARGUMENT"


class TensorError(BadRequestError):
    """One tensor of a request does not fit what the model takes."""

    code = "bad_tensor"


class InputRefusedError(BadRequestError):
    """The tensors fit the signature, yet the model refuses their values (an index out of range)."""

    code = "input_refused"


class UnauthenticatedError(GatewayError):
    """A key is needed, and none that is known was shown."""

    code = "unauthenticated"
    status = 401
    grpc_status = "UNAUTHENTICATED"

    def __init__(self, scope: str, *, was_given: bool) -> None:
        why = "this key is not known, or not any more" if was_given else "a key is needed"
        super().__init__(f"{why}: send Authorization: Bearer KEY, with a key of scope {scope!r}")


class HostError(BadRequestError):
    """The request names no host, several, or one that is not this server."""

    code = "bad_host"


class SlowRequestError(GatewayError):
    """A request did not arrive in time; its connection is of use to others."""

    code = "slow_request"
    status = 408
    grpc_status = "DEADLINE_EXCEEDED"


class HeadTooLargeError(GatewayError):
    """More headers, or longer ones, than a request may have."""

    code = "head_too_large"
    status = 431
    grpc_status = "RESOURCE_EXHAUSTED"


class BusyError(GatewayError):
    """As many connections are open as may be."""

    code = "busy"
    status = 503
    grpc_status = "UNAVAILABLE"
    retry_after_s = 1


class ChangeRefusedError(BadRequestError):
    """A change of what is in force that cannot be made; says everything that is wrong with it."""

    code = "change_refused"


class ProtectedError(GatewayError):
    """A change that can be made, by whoever says that it is meant."""

    code = "protected"
    status = 409
    grpc_status = "FAILED_PRECONDITION"


class ConflictError(GatewayError):
    """Somebody else has changed the same thing meanwhile."""

    code = "conflict"
    status = 409
    grpc_status = "ABORTED"


class AliasConflictError(ConflictError):
    """A version was published, and somebody else moved the alias meanwhile."""

    def __init__(self, model: str, version: int, alias: str, why: str) -> None:
        super().__init__(
            f"{model} version {version} is published, but alias {alias!r} does not name it: {why}"
        )


class PreconditionError(GatewayError):
    """Another revision is in force than the change was meant for."""

    code = "precondition_failed"
    status = 412
    grpc_status = "FAILED_PRECONDITION"


class StateError(GatewayError):
    """What is in force cannot be read: damaged, of a later release, or the disk says no."""

    code = "state_unreadable"
    status = 503
    grpc_status = "UNAVAILABLE"


class ForbiddenError(GatewayError):
    """The caller may not do this from where it is, or with the key it has."""

    code = "forbidden"
    status = 403
    grpc_status = "PERMISSION_DENIED"


class NotFoundError(GatewayError):
    """A name that nothing has."""

    code = "not_found"
    status = 404
    grpc_status = "NOT_FOUND"


class ModelNotFoundError(NotFoundError):
    """No model of this name is served."""

    code = "model_not_found"

    def __init__(self, model: str, known: Sequence[str]) -> None:
        super().__init__(f"no model {shown(model)} here{_suggestion(model, known)}")


class ModelNotNamedError(NotFoundError):
    """The path names no model, and nothing else says which one is meant."""

    code = "model_not_named"

    def __init__(self, known: Sequence[str]) -> None:
        more = f" and {len(known) - 20} more" if len(known) > 20 else ""
        super().__init__(
            "which model? Send its name in the header x-driftgate-model, or serve with the setting"
            f" 'model'; there are: {', '.join(sorted(known)[:20])}{more}"
        )


class VersionNotFoundError(NotFoundError):
    """The model is there, this version of it is not."""

    code = "version_not_found"

    def __init__(
        self, model: str, version: str, known: Sequence[int], labels: Iterable[str] | None = None
    ) -> None:
        have = ", ".join(map(str, known[-10:])) or "none"
        what = "version"
        if labels is not None:
            what, have = "label", ", ".join(sorted({"champion", *labels})[:20])
        super().__init__(f"model {model!r} has no {what} {shown(version)}; it has: {have}")


class OverrideError(ForbiddenError):
    """A client named a variant, which its route does not allow."""

    code = "override_not_allowed"

    def __init__(self, sentence: str = "") -> None:
        super().__init__(
            sentence
            or "x-driftgate-version: the model's route does not allow clients to name a variant"
            " (allow_override); call a version by its number instead"
        )


class MethodError(GatewayError):
    """The path exists, but not for this verb."""

    code = "method_not_allowed"
    status = 405
    grpc_status = "UNIMPLEMENTED"

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        self.allowed = tuple(allowed)
        super().__init__(f"{method} is not allowed here; use {' or '.join(allowed)}")


class VersionTakenError(GatewayError):
    """Another version has the number that was asked for."""

    code = "version_taken"
    status = 409
    grpc_status = "ALREADY_EXISTS"

    def __init__(self, model: str, version: int) -> None:
        super().__init__(
            f"model {model!r}: there is a version {version} already, with other files;"
            " name another number, or none to take the next"
        )


class VersionWithdrawnError(GatewayError):
    """Just these files were withdrawn."""

    code = "version_withdrawn"
    status = 409
    grpc_status = "FAILED_PRECONDITION"

    def __init__(self, model: str, version: int) -> None:
        super().__init__(f"model {model!r}: just these files were withdrawn as version {version}")


class LabelsOffError(GatewayError):
    """No predictions are kept, so labels would meet none."""

    code = "labels_off"
    status = 409
    grpc_status = "FAILED_PRECONDITION"

    def __init__(self) -> None:
        super().__init__(
            "no predictions are kept here, so labels would meet none;"
            " serve with --labels-sample 100"
        )


class IdleError(GatewayError):
    """Nothing came on a stream for too long: it is ended, its connection is of use to others."""

    code = "idle"
    status = 408
    grpc_status = "DEADLINE_EXCEEDED"

    def __init__(self, silence_s_max: float) -> None:
        super().__init__(f"the stream was silent for {silence_s_max:g} s (limits.timeout_s)")


class TooLargeError(GatewayError):
    """More than one request may carry."""

    code = "too_large"
    status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class EncodingError(GatewayError):
    """A body in a coding that is not spoken here."""

    code = "unsupported_encoding"
    status = 415
    grpc_status = "UNIMPLEMENTED"


class MediaTypeError(GatewayError):
    """A body of a type that this path does not read."""

    code = "unsupported_media_type"
    status = 415
    grpc_status = "UNIMPLEMENTED"


class UnsupportedError(GatewayError):
    """Part of a protocol that is not there, and is not meant to be."""

    code = "unsupported"
    status = 501
    grpc_status = "UNIMPLEMENTED"


class QueueFullError(GatewayError):
    """The queue of one version holds as many rows as it may."""

    code = "queue_full"
    status = 429
    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, model: str, version: int, rows_max: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            f"model {model!r} version {version}: the queue may hold {rows_max} rows and is full;"
            " retry later, or raise limits.queue_rows_max"
        )


class ModelBusyError(GatewayError):
    """As many requests of one model are under way as its route allows."""

    code = "model_busy"
    status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    retry_after_s = 1

    def __init__(self, model: str, inflight_max: int) -> None:
        super().__init__(
            f"model {model!r}: {inflight_max} requests are under way in this worker, as many as its"
            " route allows (limits.inflight_max); retry later"
        )


class RateLimitedError(GatewayError):
    """A caller has made as many requests of one model as its route allows."""

    code = "rate_limited"
    status = 429
    grpc_status = "RESOURCE_EXHAUSTED"

    def __init__(self, model: str, caller: str, rate_per_s: float, wait_s: float) -> None:
        self.retry_after_s = math.ceil(wait_s)
        kind, _, key = caller.partition(":")
        who = f"key {key}" if kind == "key" else "all who show no key, together,"
        super().__init__(
            f"model {model!r}: {who} may make {rate_per_s:g} requests a second"
            f" (limits.rate_per_s_max); the next one in {wait_s:.3g} s"
        )


class ClientGoneError(GatewayError):
    """The client hung up before its rows ran: they are dropped, and nobody is answered."""

    code = "client_gone"
    status = 499
    grpc_status = "CANCELLED"


class ModelFailedError(GatewayError):
    """The model failed on input that fits its signature."""

    code = "model_failed"


class NotReadyError(GatewayError):
    """Nothing can answer this now."""

    code = "not_ready"
    status = 503
    grpc_status = "UNAVAILABLE"


class UnloadedError(NotReadyError):
    """Somebody has unloaded the model."""

    def __init__(self, model: str) -> None:
        super().__init__(f"model {model!r} is unloaded")


class NotAppliedError(NotReadyError):
    """A change is written, and not every live worker has put it in force."""

    code = "not_applied"


class NoMemoryError(NotReadyError):
    """Opening the version would take more memory than the sessions may have."""

    code = "no_memory"
    retry_after_s = 10

    def __init__(self, model: str, version: int, wanted: int, used: int, allowed: int) -> None:
        mib = 1 << 20
        super().__init__(
            f"model {model!r} version {version} is not open and would take about"
            f" {wanted // mib} MiB; {used // mib} of {allowed // mib} MiB are taken by versions"
            " that routes need (sync.memory_bytes_max)"
        )


class VersionRefusedError(NotReadyError):
    """The version is in the registry, but was refused when it was opened."""

    code = "version_refused"


class BreakerOpenError(GatewayError):
    """A variant that keeps failing is left alone for a while: another one is asked."""

    code = "breaker_open"
    status = 503
    grpc_status = "UNAVAILABLE"

    def __init__(self, model: str, version: int) -> None:
        super().__init__(f"model {model!r} version {version}: its breaker is open")


class DeadlineError(GatewayError):
    """The time the caller allowed is over."""

    code = "deadline_exceeded"
    status = 504
    grpc_status = "DEADLINE_EXCEEDED"

    def __init__(self, model: str, timeout_s: float) -> None:
        shown_s = timeout_s if timeout_s < 0.01 else round(timeout_s, 3)
        super().__init__(f"model {model!r}: no answer within {shown_s:g} s")


class StorageError(GatewayError):
    """What must be on disk before it is answered cannot be written now."""

    code = "storage_unavailable"
    status = 507
    grpc_status = "UNAVAILABLE"


class ConfigError(GatewayError):
    """A setting is wrong. `problems` holds every one that was found."""

    code = "bad_config"

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class StartError(GatewayError):
    """The server cannot start: the directory, the port or the machine says no."""

    code = "cannot_start"


ALL = (
    BadRequestError,
    TensorError,
    InputRefusedError,
    ChangeRefusedError,
    ProtectedError,
    ConflictError,
    PreconditionError,
    StateError,
    HostError,
    UnauthenticatedError,
    ForbiddenError,
    NotFoundError,
    ModelNotFoundError,
    ModelNotNamedError,
    VersionNotFoundError,
    OverrideError,
    MethodError,
    LabelsOffError,
    IdleError,
    SlowRequestError,
    HeadTooLargeError,
    BusyError,
    TooLargeError,
    EncodingError,
    MediaTypeError,
    UnsupportedError,
    QueueFullError,
    ModelBusyError,
    RateLimitedError,
    ClientGoneError,
    GatewayError,
    ModelFailedError,
    NotReadyError,
    NotAppliedError,
    NoMemoryError,
    VersionRefusedError,
    BreakerOpenError,
    DeadlineError,
    StorageError,
)
"""Every error that can reach a client: docs/reference/errors.md lists them, a test compares."""


def of_registry(error: registry.RegistryError) -> GatewayError:
    """What the registry says, with its status and code."""
    sentence = str(error)
    for kind, made in _OF_REGISTRY:
        if isinstance(error, kind):
            return made(sentence)
    return StateError(sentence)


_OF_REGISTRY: tuple[tuple[type[registry.RegistryError], type[GatewayError]], ...] = (
    (registry.PreconditionError, PreconditionError),
    (registry.ConflictError, ConflictError),
    (registry.ProtectedError, ProtectedError),
    (registry.NotThereError, NotFoundError),
    (registry.RevisionNotFoundError, NotFoundError),
    (registry.ChangeError, ChangeRefusedError),
    (RouteError, ChangeRefusedError),
    (registry.RolloutError, ChangeRefusedError),
    (registry.WriteError, StorageError),
)
"""The first that fits counts."""


def shown(value: object) -> str:
    """A client's own value, printable and short enough to be repeated in an answer."""
    return _SHORT.repr(value).encode("ascii", "backslashreplace").decode("ascii")


def _short() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlevel = 2
    return short


_SHORT = _short()


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    matches = get_close_matches(name[:128], known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _suggestion(name: str, known: Sequence[str]) -> str:
    if (match := nearest(name, known)) is not None:
        return f"; did you mean {match!r}?"
    if not known:
        return "; the registry has none"
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return f"; there are: {', '.join(sorted(known)[:5])}{more}"
