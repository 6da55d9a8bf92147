"""Outcomes of units that have got one, as counts and sums that add up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from monitors.guards import difference
from monitors.guards.bets import CANDIDATE, CONTROL, Floats, Integers
from monitors.guards.evidence import Table, Weight, both, count, weight_of, weight_text
from monitors.guards.outcome import Sums

_NONE = np.zeros((0, 2), np.int64)


class Side(NamedTuple):
    """What is asked of a difference: by how much worse, and which way is worse."""

    margin: float
    """Worse by so much is nobody's concern; in units of the outcome."""
    is_lower_better: bool


@dataclass(slots=True)
class Labelled:
    """First outcomes of units, of candidate and control, by weight."""

    units: Table = field(default_factory=dict)
    """Units with an outcome, under the weight of the prediction that it belongs to."""
    ones: Table = field(default_factory=dict)
    """Those among them whose outcome is 1."""
    effects: dict[Weight, Sums] = field(default_factory=dict)
    """What each unit says about the difference, candidate minus control."""
    outcomes: tuple[Sums, Sums] = (Sums(), Sums())
    """Of candidate and control, as they are."""
    is_binary: bool = True
    """Whether all outcomes were 0 or 1."""

    def add(self, weight: Weight, at: int, outcome: float) -> None:
        """Count one unit's outcome; once a unit."""
        share = weight[0] / (weight[0] + weight[1])
        # What earlier units had on average is taken off: right or wrong, it does no harm.
        n = self.outcomes[0].n + self.outcomes[1].n
        expected = (self.outcomes[0].total + self.outcomes[1].total) / n if n else outcome
        draw = 1 / share if at == CANDIDATE else -1 / (1 - share)
        effect = (outcome - expected) * draw
        self.effects[weight] = self.effects.get(weight, Sums()) + _one(effect)
        pair = list(self.outcomes)
        pair[at] += _one(outcome)
        self.outcomes = (pair[0], pair[1])
        count(self.units, weight, at)
        if outcome == 1:
            count(self.ones, weight, at)
        self.is_binary = self.is_binary and outcome in {0.0, 1.0}

    def n(self) -> Integers:
        """(2,) units of candidate and control that have an outcome."""
        return np.array([self.outcomes[CANDIDATE].n, self.outcomes[CONTROL].n], np.int64)

    def log_evidence(self, side: Side) -> tuple[float, float]:
        """Logarithms of the evidence for "worse than the margin", and for "not so much worse"."""
        weights, units = both(self.units)
        if not weights.size:
            return 0.0, 0.0
        worse = 1 if side.is_lower_better else -1
        if self.is_binary:
            ones = np.array([self.ones.get(weight, _NONE.sum(axis=0)) for weight in self._drawn()])
            bad = ones if side.is_lower_better else units - ones
            counts = np.stack([units - bad, bad], axis=-2)
            return (
                float(difference.log_evidence_binary(counts, weights, margin=side.margin, side=1)),
                float(difference.log_evidence_binary(counts, weights, margin=side.margin, side=-1)),
            )
        if not difference.is_enough(self.n()):
            return 0.0, 0.0
        sums = self._sums()
        margin = worse * side.margin
        return (
            float(difference.log_evidence_mean(*sums, weights, margin=margin, side=worse)),
            float(difference.log_evidence_mean(*sums, weights, margin=margin, side=-worse)),
        )

    def interval(self, alpha: float = 0.05) -> tuple[float, float, float] | None:
        """(best, low, high) of candidate minus control; None before there are units enough."""
        weights, _ = both(self.units)
        if not weights.size or not difference.is_enough(self.n()):
            return None
        return difference.interval(*self._sums(), weights, alpha=alpha)

    def _drawn(self) -> list[Weight]:
        return [weight for weight in sorted(self.units) if min(weight) > 0]

    def _sums(self) -> tuple[Floats, Floats, Floats]:
        found = [self.effects[weight] for weight in self._drawn()]
        n, total, squares = np.array([(s.n, s.total, s.squares) for s in found], np.float64).T
        return n, total, squares

    def __add__(self, other: "Labelled") -> "Labelled":
        return Labelled(
            _added(self.units, other.units),
            _added(self.ones, other.ones),
            _added(self.effects, other.effects),
            (self.outcomes[0] + other.outcomes[0], self.outcomes[1] + other.outcomes[1]),
            self.is_binary and other.is_binary,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "units": {weight_text(w): counts.tolist() for w, counts in self.units.items()},
            "ones": {weight_text(w): counts.tolist() for w, counts in self.ones.items()},
            "effects": {weight_text(w): _plain(sums) for w, sums in self.effects.items()},
            "outcomes": [_plain(sums) for sums in self.outcomes],
            "is_binary": self.is_binary,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Labelled":
        """What `to_dict` gave; ValueError, KeyError or TypeError when it is something else."""
        candidate, control = (_sums(each) for each in plain["outcomes"])
        return cls(
            {weight_of(w): np.array(counts, np.int64) for w, counts in plain["units"].items()},
            {weight_of(w): np.array(counts, np.int64) for w, counts in plain["ones"].items()},
            {weight_of(w): _sums(each) for w, each in plain["effects"].items()},
            (candidate, control),
            bool(plain["is_binary"]),
        )


def _one(value: float) -> Sums:
    return Sums(1, value, value * value)


def _plain(sums: Sums) -> list[float]:
    return [sums.n, sums.total, sums.squares]


def _sums(plain: Any) -> Sums:
    n, total, squares = plain
    return Sums(int(n), float(total), float(squares))


def _added(one: Mapping[Weight, Any], other: Mapping[Weight, Any]) -> dict[Weight, Any]:
    total = dict(one)
    for weight, found in other.items():
        total[weight] = total[weight] + found if weight in total else found
    return total
