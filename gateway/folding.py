"""What the workers of a rollout met, added up: each unit once, however many of them met it.

Kept by the controller between its looks, and in a file for the next controller.
"""

from dataclasses import dataclass, field

import msgspec
import numpy as np

from gateway import exposures, outcomes
from gateway.exposures import KINDS
from gateway.values import Bins
from monitors.guards.bets import CANDIDATE
from monitors.guards.evidence import Evidence, count, weight_of
from monitors.guards.labelled import Labelled
from monitors.guards.units import Units
from monitors.guards.verdict import Peaks
from registry import buckets
from registry.rollouts import Rollout

_UNITS_MAX = 32_768


@dataclass(slots=True)
class Folded:
    """What has been added up of one rollout: units once each, however many workers met them."""

    units: dict[str, Units] = field(
        default_factory=lambda: {
            name: Units(_UNITS_MAX) for name in ("seen", "met", "values", "outcomes", *KINDS)
        }
    )
    counted: Evidence = field(default_factory=Evidence)
    """Tallies of units. What was counted stays, also when a unit is no longer remembered."""
    labelled: Labelled = field(default_factory=Labelled)
    """First outcomes of units."""
    peaks: Peaks = field(default_factory=Peaks)
    hard: list[str] = field(default_factory=list)
    """What happened that needs no statistics."""
    began: tuple[float, int] = (0.0, 0)
    """When a step began that somebody has moved to by hand, and the units met until then."""

    def fold(self, found: exposures.Found, frozen: Bins) -> None:
        """Count the units of one worker's file that nobody has counted yet."""
        weights = [weight_of(text) for text in found.weights]
        for name, units in found.units.items():
            mine = self.units[name]
            for unit, code in units:
                if not mine.add(unit, code[:2]):
                    continue
                if name == "met":
                    continue
                weight, at = weights[code[0]], code[1]
                if name == "seen":
                    count(self.counted.units, weight, at)
                elif name == "values":
                    for channel, bin_ in zip(found.channels, code[2:], strict=False):
                        table = self.counted.bins.setdefault(channel, {})
                        bins = frozen.n(channel)
                        if bin_ < bins:
                            count(table, weight, at, bin_=bin_, bins=bins)
                else:
                    count(self.counted.events.setdefault(name, {}), weight, at)

    def fold_outcomes(self, found: outcomes.Found) -> None:
        """Count the outcomes that one host has read, of units that had none yet."""
        mine = self.units["outcomes"]
        weights = [weight_of(text) for text in found.weights]
        for unit, code in found.units:
            if mine.add(unit, code[:2]):
                self.labelled.add(weights[code[0]], code[1], outcomes.value_of(code))

    def died(self, rollout: Rollout, in_hand: tuple[int, int]) -> None:
        """A worker died: one bad event for each variant that it had a request of in hand."""
        candidate = round(rollout.weight * buckets.N / 100)
        weight = (candidate, buckets.N - candidate)
        for at, n in enumerate(in_hand):
            if n > 0:
                count(self.counted.events.setdefault("error", {}), weight, at)
                every = self.counted.all_events.setdefault("error", np.zeros(2, np.int64))
                every[at] += 1

    def units_met(self, evidence: Evidence) -> int:
        """Units that the candidate met: sticky ones by their hashes, others one by one.

        `evidence` is of all workers, with what is counted here.
        """
        met = self.units["met"]
        sticky = evidence.total(self.counted.units)[CANDIDATE]
        single = evidence.total(evidence.units)[CANDIDATE] - sticky
        return round(len(met) * (2**64 / met.threshold)) + int(single)

    def units_since(self, rollout: Rollout, met: int) -> int:
        """Units that the candidate met since the phase or step began."""
        if rollout.units_before >= 0:
            return met - rollout.units_before
        if self.began[0] != rollout.since:
            self.began = rollout.since, met
        return met - self.began[1]

    def to_json(self, beat: int) -> bytes:
        """As a file."""
        return msgspec.json.encode(
            {
                "beat": beat,
                "units": {name: units.to_dict() for name, units in self.units.items()},
                "counted": self.counted.to_dict(),
                "labelled": self.labelled.to_dict(),
                "peaks": self.peaks.highest,
                "hard": self.hard,
                "began": self.began,
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> "Folded":
        """What a file holds; ValueError, KeyError or TypeError when it is something else."""
        plain = msgspec.json.decode(data)
        return cls(
            {name: Units.from_dict(units) for name, units in plain["units"].items()},
            Evidence.from_dict(plain["counted"]),
            Labelled.from_dict(plain["labelled"]),
            Peaks({str(k): float(v) for k, v in plain["peaks"].items()}),
            [str(sentence) for sentence in plain["hard"]],
            (float(plain["began"][0]), int(plain["began"][1])),
        )
