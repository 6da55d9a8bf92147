"""What goes into the tables of labels and what comes out. Knows no database."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import msgpack  # type: ignore[import-untyped]  # it comes without types

Verdict = Literal["joined", "duplicate", "unknown", "late", "not_sampled", "conflict", "invalid"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""What can become of one label.

joined: its prediction is here. duplicate: the same label was here before. unknown: no prediction of
this id is here; the label waits for it. late: the prediction was here, and its time is over.
not_sampled: predictions of this id are not kept. conflict: another label of the same id is here and
stays. invalid: it is no label.
"""


class StoreError(Exception):
    """The database cannot be read or written now."""


class Kept(NamedTuple):
    """One row of one answer, as it is stored."""

    request: str
    row: int
    model: str
    version: int
    traffic: str
    variant: str
    time: float
    """When it was made, in seconds since 1970."""
    sampled: float
    """The probability with which it was kept: whoever counts weighs by its inverse."""
    assigned: float
    """The probability with which its variant was chosen."""
    unit: str | None
    """Hash of what its assignment is sticky to."""
    outputs: bytes
    inputs: bytes | None


class Label(NamedTuple):
    """One label that is well formed."""

    request: str
    row: int
    model: str
    value: float | str


class Joined(NamedTuple):
    """One prediction with its label."""

    request: str
    row: int
    version: int
    traffic: str
    variant: str
    time: float
    sampled: float
    assigned: float
    unit: str | None
    outputs: dict[str, Any]
    label: float | str
    arrived: float


class Exported(NamedTuple):
    """One prediction, with its label if there is one."""

    request: str
    row: int
    version: int
    traffic: str
    variant: str
    time: float
    sampled: float
    outputs: dict[str, Any]
    inputs: dict[str, Any] | None
    label: float | str | None
    arrived: float | None


class Evidence(NamedTuple):
    """What labels of one version have shown so far."""

    model: str
    version: int
    sequence: int = 0
    """Counts the times it was written; who writes says which one it has read."""
    reference: str | None = None
    """An accepted reference, as JSON; None: the version's own."""
    state: bytes | None = None
    """Of the monitor; None: nothing was judged yet."""
    told: int = 0
    """Number of the newest alarm that was told."""
    changed: float = 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept, and for how long."""

    days: float
    """A prediction waits so long for its label; its id is remembered for twice as long."""
    bytes_max: int
    wait_s: float
    """A label waits so long for its prediction."""


def pack(values: dict[str, Any]) -> bytes:
    """One row's tensors, by name, as they are stored."""
    packed: bytes = msgpack.packb(values)
    return packed
