"""What two versions said to the same requests, as counts that add up over workers and restarts.

Two owners, so that nothing is locked on the way of an answer: the event loop counts what was
sampled and what was dropped (`Coverage`), the shadow's own thread what was compared (`Tally`).
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.comparison import Comparison
from gateway.tensors import Array
from monitors.guards.outcome import Sums
from monitors.guards.units import Units
from registry import store
from registry.errors import WriteError
from registry.revisions import ModelState
from registry.routes import Shadow

FORMAT = 1
UNITS_MAX = 16_384
"""Units of one worker that are remembered, so that each counts once."""
MINUTES_MAX = 120
BIASED = 0.01
"""Share of the sampled that may be dropped before what is left may not speak for all."""
_NUMBERS_MAX = 8
"""Columns of outputs whose difference is averaged."""
_AGREE, _DIFFER = b"\0", b"\1"

Integers = npt.NDArray[np.int64]


class Pairing(NamedTuple):
    """A shadow and whom it is compared with."""

    model: str
    to: str
    version: int
    against: int
    """The champion, whose answers clients get."""
    shadow: Shadow

    @property
    def key(self) -> str:
        """What evidence is kept under: other versions or tolerances are another question."""
        compared = msgspec.json.encode(self.shadow.compare, order="deterministic")
        return f"{self.against}-{self.version}-{blake2b(compared, digest_size=4).hexdigest()}"


class Places(NamedTuple):
    """Rows by bin of a reference profile."""

    reference: str
    """Digest of the profile."""
    labels: Mapping[str, tuple[str, ...]]
    """Of the bins, by channel."""
    place: Callable[[Sequence[Array], int], Mapping[str, npt.NDArray[np.intp]]]
    """(rows,) bin of every row, by channel, for the champion's inputs."""


@dataclass(slots=True)
class Coverage:
    """How much of what was sampled has been compared; counted by the event loop."""

    sampled: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """By reason."""
    minutes: dict[str, list[int]] = field(default_factory=dict)
    """Sampled and dropped, by minute since 1970."""

    def sample(self, now: float) -> None:
        """One request was drawn."""
        self.sampled += 1
        self._minute(now)[0] += 1

    def drop(self, reason: str, now: float, n: int = 1) -> None:
        """So many of them will not be compared."""
        self.dropped[reason] = self.dropped.get(reason, 0) + n
        self._minute(now)[1] += n

    def add(self, other: "Coverage") -> None:
        """Count what another worker has counted, too."""
        self.sampled += other.sampled
        for reason, n in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + n
        for minute, (sampled, dropped) in other.minutes.items():
            mine = self.minutes.setdefault(minute, [0, 0])
            mine[0] += sampled
            mine[1] += dropped

    def _minute(self, now: float) -> list[int]:
        key = str(int(now // 60))
        found = self.minutes.get(key)
        if found is None:
            if len(self.minutes) >= MINUTES_MAX:
                kept = sorted(self.minutes.items(), key=lambda item: int(item[0]))
                self.minutes = dict(kept[1 - MINUTES_MAX :])
            found = self.minutes[key] = [0, 0]
        return found


@dataclass(slots=True)
class Tally:
    """What was compared; counted by the thread that compares."""

    requests: int = 0
    failed: int = 0
    """Requests that the shadow failed on: all of their rows differ."""
    rows: int = 0
    rows_differ: int = 0
    outputs: dict[str, int] = field(default_factory=dict)
    """Rows that differ in an output."""
    single: list[int] = field(default_factory=lambda: [0, 0])
    """Pairs that are a unit of their own, and how many of these differ."""
    units: Units = field(default_factory=lambda: Units(UNITS_MAX))
    """Sticky units, by whether their first pair differed."""
    numbers: dict[str, list[float]] = field(default_factory=dict)
    """Number, sum and sum of squares of shadow minus champion, one per unit, by column."""
    reference: str = ""
    labels: dict[str, list[str]] = field(default_factory=dict)
    bins: dict[str, Integers] = field(default_factory=dict)
    """(2, n_bins) rows compared, and rows that differ, by channel of that reference."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why an output could not be compared."""

    @property
    def cases(self) -> tuple[int, int]:
        """Pairs that the tests count, one per unit, and how many of them differ."""
        differ = sum(code == _DIFFER for _, code in self.units)
        return self.single[0] + len(self.units), self.single[1] + differ

    def pair(self, unit: int | None, found: Comparison, rows: int, *, columns: "Columns") -> None:
        """Count one request that both have answered.

        Of a request with several rows the tests count one, which the unit's hash draws: rows that
        came together are no independent cases. Everything that only describes counts all rows.

        Parameters
        ----------
        unit : hash of the sticky unit; None where the request is its own
        columns : the request's values of numeric outputs, of both
        """
        self.requests += 1
        self.rows += rows
        self.rows_differ += int(found.differs.sum())
        for name, difference in found.outputs.items():
            self.outputs[name] = self.outputs.get(name, 0) + int(difference.differs.sum())
            if difference.problem:
                self.problems[name] = difference.problem
        if not rows:
            return
        row = (random.randrange(rows) if unit is None else unit % rows) if rows > 1 else 0  # noqa: S311  no secret
        if not self._case(unit, is_different=bool(found.differs[row])):
            return
        for name, first, second in columns:
            apart = float(second[row]) - float(first[row])
            if apart - apart == 0:  # finite
                sums = self.numbers.setdefault(name, [0, 0.0, 0.0])
                sums[0] += 1
                sums[1] += apart
                sums[2] += apart * apart

    def fail(self, unit: int | None, rows: int) -> None:
        """Count one request that the champion has answered and the shadow failed on."""
        self.requests += 1
        self.failed += 1
        self.rows += rows
        self.rows_differ += rows
        self._case(unit, is_different=True)

    def place(
        self, places: Places, inputs: Sequence[Array], differs: npt.NDArray[np.bool_]
    ) -> None:
        """Count rows by where their inputs lie in the reference."""
        if places.reference != self.reference:
            self.reference, self.bins = places.reference, {}
            self.labels = {name: list(labels) for name, labels in places.labels.items()}
        for name, bins in places.place(inputs, len(differs)).items():
            size = len(self.labels[name])
            counts = self.bins.get(name)
            if counts is None:
                counts = self.bins[name] = np.zeros((2, size), np.int64)
            counts[0] += np.bincount(bins, minlength=size)
            counts[1] += np.bincount(bins[differs], minlength=size)

    def add(self, other: "Tally") -> None:
        """Count what another worker has counted, too; units that both have met count once."""
        for name in ("requests", "failed", "rows", "rows_differ"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, n in other.outputs.items():
            self.outputs[name] = self.outputs.get(name, 0) + n
        self.single = [a + b for a, b in zip(self.single, other.single, strict=True)]
        for name, sums in other.numbers.items():
            mine = self.numbers.get(name, [0, 0.0, 0.0])
            self.numbers[name] = [a + b for a, b in zip(mine, sums, strict=True)]
        threshold = min(self.units.threshold, other.units.threshold)
        together = Units(max(len(self.units) + len(other.units), UNITS_MAX), threshold)
        for units in (self.units, other.units):
            for unit, code in units:
                together.add(unit, code)
        self.units = together
        if not self.reference:
            self.reference, self.labels = other.reference, other.labels
        if self.reference == other.reference:
            for name, counts in other.bins.items():
                self.bins[name] = self.bins[name] + counts if name in self.bins else counts
        self.problems |= other.problems

    def sums(self) -> dict[str, Sums]:
        """Differences for `monitors.guards.outcome`."""
        return {
            name: Sums(int(n), total, squares) for name, (n, total, squares) in self.numbers.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "requests": self.requests,
            "failed": self.failed,
            "rows": self.rows,
            "rows_differ": self.rows_differ,
            "outputs": self.outputs,
            "single": self.single,
            "units": self.units.to_dict(),
            "numbers": self.numbers,
            "reference": self.reference,
            "labels": self.labels,
            "bins": {name: counts.tolist() for name, counts in self.bins.items()},
            "problems": self.problems,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Tally":
        """What `to_dict` gave; ValueError, KeyError or TypeError when it is something else."""
        counts = {name: int(plain[name]) for name in ("requests", "failed", "rows", "rows_differ")}
        differ, of = (int(n) for n in reversed(plain["single"]))
        return cls(
            **counts,
            outputs={str(name): int(n) for name, n in plain["outputs"].items()},
            single=[of, differ],
            units=Units.from_dict(plain["units"]),
            numbers={
                str(name): [int(sums[0]), float(sums[1]), float(sums[2])]
                for name, sums in plain["numbers"].items()
            },
            reference=str(plain["reference"]),
            labels={str(name): [str(x) for x in found] for name, found in plain["labels"].items()},
            bins={str(name): np.array(rows, np.int64) for name, rows in plain["bins"].items()},
            problems={str(name): str(why) for name, why in plain["problems"].items()},
        )

    def _case(self, unit: int | None, *, is_different: bool) -> bool:
        """Count a pair as a case of the tests, unless its unit has been; whether it is new."""
        if unit is None:
            self.single[0] += 1
            self.single[1] += is_different
            return True
        return self.units.add(unit, _DIFFER if is_different else _AGREE)


Columns = list[tuple[str, Array, Array]]
"""(rows,) values of a numeric output's column, champion's and shadow's."""


def numeric(first: Mapping[str, Array], second: Mapping[str, Array], rows: int) -> Columns:
    """The first columns of outputs that are floating-point numbers in both, one for each row."""
    found: Columns = []
    for name, one in first.items():
        other = second.get(name)
        if other is None or one.shape != other.shape or one.shape[:1] != (rows,):
            continue
        if one.dtype.kind != "f" or other.dtype.kind != "f" or not rows:
            continue
        ours, theirs = one.reshape(rows, -1), other.reshape(rows, -1)
        for j in range(min(ours.shape[1], _NUMBERS_MAX - len(found))):
            label = name if ours.shape[1] == 1 else f"{name}[{j}]"
            found.append((label, ours[:, j], theirs[:, j]))
    return found


# -- files


@dataclass(slots=True)
class Kept:
    """What one worker's file holds."""

    pairing: Pairing
    since: float
    """When the first pair could have come, in seconds of UTC."""
    coverage: Coverage = field(default_factory=Coverage)
    tally: Tally = field(default_factory=Tally)
    problem: str = ""
    """Why nothing is copied there."""
    barred: str = ""
    """Why it is run no more: it took a worker with it."""

    def to_json(self) -> bytes:
        """As a file. The loop may go on counting meanwhile: what is copied is copied at once."""
        coverage = self.coverage
        return msgspec.json.encode(
            {
                "format": FORMAT,
                "model": self.pairing.model,
                "to": self.pairing.to,
                "version": self.pairing.version,
                "against": self.pairing.against,
                "shadow": self.pairing.shadow,
                "since": self.since,
                "coverage": {
                    "sampled": coverage.sampled,
                    "dropped": dict(coverage.dropped),
                    "minutes": {name: list(both) for name, both in dict(coverage.minutes).items()},
                },
                "tally": self.tally.to_dict(),
                "problem": self.problem,
                "barred": self.barred,
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> "Kept":
        """What a file holds.

        Raises
        ------
        ValueError, KeyError, TypeError, AttributeError, msgspec.DecodeError : something else.
        """
        plain = msgspec.json.decode(data)
        if plain["format"] != FORMAT:
            raise ValueError("another format")
        return cls(
            Pairing(
                str(plain["model"]),
                str(plain["to"]),
                int(plain["version"]),
                int(plain["against"]),
                msgspec.convert(plain["shadow"], Shadow),
            ),
            float(plain["since"]),
            msgspec.convert(plain["coverage"], Coverage),
            Tally.from_dict(plain["tally"]),
            str(plain["problem"]),
            str(plain["barred"]),
        )


_ELSE = (OSError, ValueError, KeyError, TypeError, AttributeError, msgspec.DecodeError)


def directory(state_dir: Path, model: str, key: str = "") -> Path:
    """Where the workers' files of a model's shadows are; of one pairing."""
    return state_dir / "shadows" / model / key


def read(path: Path) -> Kept | None:
    """What a worker's file holds; None if it cannot be read as one."""
    try:
        return Kept.from_json(path.read_bytes())
    except _ELSE:
        return None


def write(path: Path, data: bytes) -> bool:
    """Replace a worker's file; whether it could be."""
    try:
        store.make_directory(path.parent)
        store.replace(path, data, is_durable=False)
    except WriteError:
        return False
    return True


def together(paths: Iterable[Path]) -> list[Kept]:
    """What all workers have counted: one for each pairing, added up in the order of their names."""
    found: dict[str, Kept] = {}
    for path in sorted(paths):
        kept = read(path)
        if kept is None:
            continue
        mine = found.setdefault(path.parent.name, Kept(kept.pairing, kept.since))
        mine.since = min(mine.since, kept.since)
        mine.coverage.add(kept.coverage)
        mine.tally.add(kept.tally)
        mine.problem = mine.problem or kept.problem
        mine.barred = mine.barred or kept.barred
    return list(found.values())


def pairings(model: str, state: ModelState) -> list[Pairing]:
    """The shadows that a state names, each with whom it is compared."""
    champion = state.aliases.get("champion", 0)
    found = []
    for shadow in state.route.shadow if state.route is not None else ():
        version = shadow.to if isinstance(shadow.to, int) else state.aliases.get(shadow.to, 0)
        found.append(Pairing(model, str(shadow.to), version, champion, shadow))
    return found
