"""Labels of a rollout's predictions, read from a host's store into a file that adds up.

Each host follows the labels that its store gets, in a thread of its own, so that nothing waits for
a database. A unit counts once: by the first of its labels that came. Calls by number, copies and
replays say nothing about the draw, and are passed over.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from gateway.exposures import unit_hash
from gateway.labels import StoreError
from gateway.labels.rows import Joined
from gateway.labels.target import Target
from monitors.guards.bets import CANDIDATE, CONTROL
from monitors.guards.evidence import weight_text
from monitors.guards.units import Units
from registry import buckets, store
from registry.errors import WriteError
from registry.rollouts import Outcome, Rollout

if TYPE_CHECKING:
    from gateway.labels.store import Store  # SQLAlchemy takes its time to load

FORMAT = 1
_UNITS_MAX = 16_384
_ROWS_MAX = 2_000
_PAGES_MAX = 20
_AGAIN_S = 60.0
"""Each label is looked at when it came, and once more so much later: by then its prediction is
written too, should it have come after it."""
_VALUE = struct.Struct("<d")
_HALF = 0.5
_OFF = "no predictions are kept for labels here (labels.sample is 0)"


class Found(NamedTuple):
    """What one host's file holds."""

    weights: list[str]
    units: Units
    n: int
    """Units with an outcome, also those that are no longer remembered."""
    unusable: int
    """Times that a label was met with which the metric cannot be reckoned."""
    problem: str


@dataclass(slots=True)
class _Following:
    """One rollout's labels, as far as they are read."""

    weights: list[str] = field(default_factory=list)
    units: Units = field(default_factory=lambda: Units(_UNITS_MAX))
    front: tuple[float, str, int] = (0.0, "", -1)
    again: tuple[float, str, int] = (0.0, "", -1)
    n: int = 0
    """Units that have got an outcome."""
    unusable: int = 0
    """Times that a label was met with which the metric cannot be reckoned."""
    problem: str = ""
    is_changed: bool = True

    def count(self, rollout: Rollout, outcome: Outcome, row: Joined, target: Target | None) -> None:
        """Count one label, if it says something."""
        met = _draw(rollout, row)
        if met is None or row.arrived - row.time > outcome.labels_within_s:
            return
        value = outcome_of(outcome.metric, row, target)
        if value is None:
            self.unusable += 1
            self.is_changed = True
            return
        at, text = met
        if text not in self.weights:
            self.weights.append(text)
        unit = unit_hash((row.unit or row.request).encode())
        if self.units.add(unit, bytes((self.weights.index(text), at)) + _VALUE.pack(value)):
            self.n += 1
            self.is_changed = True

    def to_json(self, rollout: Rollout) -> bytes:
        """As a file."""
        return msgspec.json.encode(
            {
                "format": FORMAT,
                "rollout": rollout.id,
                "weights": self.weights,
                "units": self.units.to_dict(),
                "front": self.front,
                "again": self.again,
                "n": self.n,
                "unusable": self.unusable,
                "problem": self.problem,
            }
        )

    @classmethod
    def from_file(cls, path: Path, rollout: Rollout) -> "_Following":
        """Go on where this host's file ends; from the start of the rollout without one."""
        plain = _read(path, rollout.id)
        try:
            if plain is None:
                return cls()
            return cls(
                [str(text) for text in plain["weights"]],
                Units.from_dict(plain["units"]),
                _place(plain["front"]),
                _place(plain["again"]),
                int(plain["n"]),
                int(plain["unusable"]),
            )
        except (ValueError, KeyError, TypeError):
            return cls()


class OutcomeReader:
    """Follows the labels of rollouts whose plan asks for outcomes; for one thread at a time."""

    def __init__(
        self,
        kept: "Store | None",
        state_dir: Path,
        host: str,
        *,
        target: Callable[[str], Target | None],
        now: Callable[[], float],
    ) -> None:
        """`kept`: predictions and labels of this host; None where none are kept."""
        self._store = kept
        self._state_dir = state_dir
        self._host = host
        self._target = target
        self._now = now
        self._following: dict[str, _Following] = {}

    def look(self, rollouts: Mapping[str, Rollout]) -> None:
        """Read what has come for each of these, by model; others are let go."""
        wanted = {
            model: (rollout, outcome)
            for model, rollout in rollouts.items()
            if (outcome := rollout.plan.guards.outcome) is not None and not rollout.is_over
        }
        ids = {rollout.id for rollout, _ in wanted.values()}
        self._following = {id_: each for id_, each in self._following.items() if id_ in ids}
        for model, (rollout, outcome) in wanted.items():
            path = outcomes_dir(self._state_dir, rollout.id) / f"{self._host}.json"
            following = self._following.get(rollout.id)
            if following is None:
                following = _Following.from_file(path, rollout)
                self._following[rollout.id] = following
            self._follow(model, rollout, outcome, following)
            if following.is_changed:
                following.is_changed = not _write(path, following.to_json(rollout))

    def _follow(
        self, model: str, rollout: Rollout, outcome: Outcome, following: _Following
    ) -> None:
        problem = ""
        if self._store is None:
            problem = _OFF
        else:
            now = self._now()
            try:
                for which, until in (("front", math.inf), ("again", now - _AGAIN_S)):
                    self._pass(model, rollout, outcome, following, which, until)
            except StoreError as error:
                problem = f"labels cannot be read now: {error}"
        following.is_changed = following.is_changed or problem != following.problem
        following.problem = problem

    def _pass(
        self,
        model: str,
        rollout: Rollout,
        outcome: Outcome,
        following: _Following,
        which: str,
        until: float,
    ) -> None:
        from gateway.labels import arrivals  # noqa: PLC0415  SQLAlchemy takes its time to load

        assert self._store is not None  # noqa: S101  asked for before
        target = self._target(model)
        for _ in range(_PAGES_MAX):
            rows = arrivals.after(
                self._store,
                model,
                (rollout.candidate, rollout.control),
                arrivals.Place(*getattr(following, which)),
                since=rollout.began,
                until=until,
                rows_max=_ROWS_MAX,
            )
            for row in rows:
                following.count(rollout, outcome, row, target)
            if rows:
                setattr(following, which, (rows[-1].arrived, rows[-1].request, rows[-1].row))
            if len(rows) < _ROWS_MAX:
                return


def outcome_of(metric: str, row: Joined, target: Target | None) -> float | None:
    """The outcome that a label says of an answer; None when it cannot be reckoned."""
    if metric == "label":
        return _finite(row.label)
    value = None if target is None else target.value(row.outputs)
    if metric == "wrong":
        return _wrong(value, row.label)
    score, label = _finite(value), _finite(row.label)
    if score is None or label is None:
        return None
    miss = abs(score - label)
    return miss if metric == "absolute_error" else miss * miss


def _wrong(value: Any, label: float | str) -> float | None:
    """1 where the class that is answered is another than the label."""
    if isinstance(value, list):
        return float(int(np.argmax(value)) != label) if value else None
    if isinstance(value, str) or isinstance(label, str):
        return None if value is None else float(value != label)
    score = _finite(value)
    if score is None:
        return None
    # A score between 0 and 1 is that of class 1; anything else is a class.
    return float((score >= _HALF) != (label == 1)) if 0 < score < 1 else float(score != label)


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, bool | int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _draw(rollout: Rollout, row: Joined) -> tuple[int, str] | None:
    """The variant and the weight under which it was drawn; None if it was not."""
    if row.version not in {rollout.candidate, rollout.control} or row.traffic != "primary":
        return None
    at = CANDIDATE if row.version == rollout.candidate else CONTROL
    share = round(row.assigned * buckets.N)
    candidate = share if at == CANDIDATE else buckets.N - share
    if not 0 < candidate < buckets.N:
        return None
    return at, weight_text((candidate, buckets.N - candidate))


def value_of(code: bytes) -> float:
    """The outcome in the code of a unit."""
    found: float = _VALUE.unpack(code[2:])[0]
    return found


def outcomes_dir(state_dir: Path, rollout: str) -> Path:
    """Where the hosts' files of a rollout are."""
    return state_dir / "rollouts" / rollout / "outcomes"


def read(path: Path, rollout: str) -> Found | None:
    """What a host's file holds; None if there is none of this rollout that can be read."""
    plain = _read(path, rollout)
    try:
        return plain and Found(
            [str(text) for text in plain["weights"]],
            Units.from_dict(plain["units"]),
            int(plain["n"]),
            int(plain["unusable"]),
            str(plain["problem"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _read(path: Path, rollout: str) -> Any:
    try:
        plain = msgspec.json.decode(path.read_bytes())
        return plain if plain["format"] == FORMAT and plain["rollout"] == rollout else None
    except (OSError, KeyError, TypeError, msgspec.DecodeError):
        return None


def _write(path: Path, data: bytes) -> bool:
    try:
        store.make_directory(path.parent)
        store.replace(path, data, is_durable=False)
    except WriteError:
        return False
    return True


def _place(plain: Any) -> tuple[float, str, int]:
    arrived, request, row = plain
    return float(arrived), str(request), int(row)
