"""Which variant answers a call. Tables are frozen: a request reads one and sees no change."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from gateway.counters import Counter, Histogram
from gateway.errors import (
    ModelNotFoundError,
    NotReadyError,
    VersionNotFoundError,
    VersionRefusedError,
)
from gateway.protocol.call import Served
from gateway.telemetry import REQUEST_SECONDS, REQUESTS, Telemetry
from gateway.tensors import Array
from registry import names
from registry.signature import Signature


class Queue(Protocol):
    """Where a variant's rows wait; a route knows no session."""

    @property
    def is_busy(self) -> bool:
        """Whether rows submitted now would have to wait."""

    def submit(
        self, inputs: list[Array], rows: int, timeout_s: float
    ) -> "asyncio.Future[list[Array]]":
        """Queue rows; the future holds the outputs."""


class Work(Protocol):
    """What one version's session has done."""

    @property
    def queue_s(self) -> Histogram:
        """Seconds from queued to started, by request."""

    @property
    def run_s(self) -> Histogram:
        """Seconds of each run."""

    @property
    def rows(self) -> Histogram:
        """Rows of each run."""

    @property
    def shared_n(self) -> int:
        """Requests, beyond one a run, that had their run together with others."""

    @property
    def shared_s(self) -> float:
        """Seconds of those runs, for each of these requests."""

    @property
    def ran_at(self) -> float:
        """When the newest run started, by `time.monotonic`; 0: none has."""


class Meters:
    """What one variant met in one kind of traffic."""

    __slots__ = ("_labels", "_telemetry", "failed_n", "failed_ns", "ok", "seconds")

    def __init__(
        self, telemetry: Telemetry, model: str, version: int, variant: str, traffic: str
    ) -> None:
        self._telemetry = telemetry
        self._labels = (model, str(version), variant, traffic)
        self.ok: Counter = self.failed("ok")
        self.failed_n = telemetry.cell()
        self.failed_ns = telemetry.cell()
        self.seconds: Histogram = telemetry.histogram(REQUEST_SECONDS, *self._labels)

    def failed(self, code: str) -> Counter:
        """Requests that ended with this code."""
        return self._telemetry.counter(REQUESTS, *self._labels, code)

    def fail(self, code: str, seconds: float) -> None:
        """Count one request that ended with an error after so many seconds."""
        self.failed(code).add()
        self.failed_n.add()
        self.failed_ns.add(int(seconds * 1e9))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Variant:
    """A version in a role: what answers. Its session is closed when nobody holds it any more."""

    served: Served
    queue: Queue
    observe: Callable[[list[Array], list[Array], int], None]
    """Offers inputs, outputs and their rows to the monitors. Never waits: drops when full."""
    meters: Meters
    """Counts of calls that named no version."""
    about: Mapping[str, Any]
    """What the warm-up found, for people."""
    work: Work
    can_batch: bool
    """Rows of several requests may share a run."""

    @property
    def model(self) -> str:
        """Its model."""
        return self.served.model

    @property
    def version(self) -> int:
        """Its number."""
        return self.served.version

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self.served.signature


@dataclass(frozen=True, slots=True)
class Model:
    """One name that clients call."""

    name: str
    versions: tuple[int, ...]
    """All that are in the registry, ascending."""
    variants: Mapping[int, Variant] = field(default_factory=dict)
    """Those that are open."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Those that could not be opened, with the reason."""
    held: Mapping[int, str] = field(default_factory=dict)
    """Those that the champion does not follow to, with the reason; they answer by number."""
    champion: Variant | None = None
    """What answers when no version is named."""
    default: int | None = None
    """The version that answers when none is named, where it is not open yet."""
    aliases: Mapping[str, int] = field(default_factory=dict)
    """Versions by name."""
    is_unloaded: bool = False
    """Somebody has closed it; nothing opens until it is loaded again."""

    def pick(self, version: str | None) -> Variant | int:
        """What answers, or the number of a version that must be opened first.

        Raises
        ------
        VersionNotFoundError, VersionRefusedError, NotReadyError
        """
        if self.is_unloaded:
            raise NotReadyError(f"model {self.name!r} is unloaded")
        if version is None:
            if self.champion is None:
                if self.default is not None:
                    return self.default
                if not self.refused:
                    raise NotReadyError(f"model {self.name!r} is still being opened; retry")
                why = "; ".join(f"{n}: {reason}" for n, reason in sorted(self.refused.items()))
                raise VersionRefusedError(f"no version of model {self.name!r} can answer: {why}")
            return self.champion
        number = names.version(version)
        if number is None or number not in self.versions:
            raise VersionNotFoundError(self.name, version, self.versions)
        if number in self.refused:
            raise VersionRefusedError(
                f"model {self.name!r} version {number} was refused: {self.refused[number]}"
            )
        return self.variants.get(number, number)


@dataclass(frozen=True, slots=True)
class Table:
    """Everything that can be called, at one moment."""

    models: Mapping[str, Model] = field(default_factory=dict)
    is_complete: bool = False
    """Whether the registry has been read and opened once."""

    def model(self, name: str) -> Model:
        """The model of this name.

        Raises
        ------
        ModelNotFoundError : with the nearest name there is.
        """
        try:
            return self.models[name]
        except KeyError:
            if not self.is_complete:
                raise NotReadyError("the registry is still being opened; retry") from None
            raise ModelNotFoundError(name, list(self.models)) from None

    def replaced(self, model: Model) -> "Table":
        """A copy with one model replaced."""
        return replace(self, models={**self.models, model.name: model})
