"""Counts of a rollout, by weight and variant: they add up over workers in any order.

A weight is a pair of bucket numbers (candidate's, control's), so that equal weights are equal keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from monitors.guards.bets import Floats, Integers

Weight: TypeAlias = tuple[int, int]
"""Buckets of the candidate and of the control."""
Table: TypeAlias = dict[Weight, Integers]
"""(2,) or (n_bins, 2) counts under each weight."""


def weight_text(weight: Weight) -> str:
    """A weight as a key of JSON."""
    return f"{weight[0]}/{weight[1]}"


def weight_of(text: str) -> Weight:
    """A weight from a key of JSON."""
    candidate, control = text.split("/")
    return int(candidate), int(control)


def count(table: Table, weight: Weight, at: int, *, bin_: int | None = None, bins: int = 0) -> None:
    """Count one observation of the variant at place `at`, in a bin if the table has bins."""
    counts = table.get(weight)
    if counts is None:
        counts = table[weight] = np.zeros((2,) if bin_ is None else (bins, 2), np.int64)
    if bin_ is None:
        counts[at] += 1
    else:
        counts[bin_, at] += 1


def both(table: Table) -> tuple[Floats, Integers]:
    """((n_weights,) the candidate's share, (n_weights, ...) counts), where both could be picked."""
    found = [
        (weight, counts)
        for weight, counts in sorted(table.items())
        if weight[0] > 0 and weight[1] > 0
    ]
    weights = np.array([weight[0] / max(sum(weight), 1) for weight, _ in found])
    return weights, np.array([counts for _, counts in found], np.int64)


def _added(one: Mapping[Any, Integers], other: Mapping[Any, Integers]) -> dict[Any, Integers]:
    total = {key: counts.copy() for key, counts in one.items()}
    for key, counts in other.items():
        total[key] = total[key] + counts if key in total else counts.copy()
    return total


@dataclass(slots=True)
class Evidence:
    """What the variants of one rollout have met."""

    requests: Table = field(default_factory=dict)
    """Requests, for people."""
    units: Table = field(default_factory=dict)
    """Units under the weight they were first seen with; a request without a unit is one."""
    events: dict[str, Table] = field(default_factory=dict)
    """First bad events of units, by kind: `error`, `slow`, `not_finite`."""
    all_events: dict[str, Integers] = field(default_factory=dict)
    """(2,) bad events of any request, by kind; for people and for what counts without a control."""
    bins: dict[str, Table] = field(default_factory=dict)
    """First values of units, by channel: `output:score[0]`, `input:x[0]`."""
    seconds: Integers = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(n_bins, 2) requests by duration, in the bins of `slow`."""
    pairs: dict[str, int] = field(default_factory=dict)
    """Shadow pairs: `n`, `differ`, `candidate_alone`, `champion_alone`, `dropped`."""

    def __add__(self, other: "Evidence") -> "Evidence":
        return Evidence(
            _added(self.requests, other.requests),
            _added(self.units, other.units),
            {
                kind: _added(self.events.get(kind, {}), other.events.get(kind, {}))
                for kind in {**self.events, **other.events}
            },
            _added(self.all_events, other.all_events),
            {
                channel: _added(self.bins.get(channel, {}), other.bins.get(channel, {}))
                for channel in {**self.bins, **other.bins}
            },
            _longer(self.seconds, other.seconds),
            {
                name: self.pairs.get(name, 0) + other.pairs.get(name, 0)
                for name in {**self.pairs, **other.pairs}
            },
        )

    def total(self, table: Table) -> Integers:
        """(2,) counts of candidate and control over all weights and bins."""
        parts = [counts.reshape(-1, 2).sum(axis=0) for counts in table.values()]
        return np.sum(parts, axis=0, dtype=np.int64) if parts else np.zeros(2, np.int64)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "requests": _plain(self.requests),
            "units": _plain(self.units),
            "events": {kind: _plain(table) for kind, table in self.events.items()},
            "all_events": {kind: counts.tolist() for kind, counts in self.all_events.items()},
            "bins": {channel: _plain(table) for channel, table in self.bins.items()},
            "seconds": {
                str(at): counts.tolist() for at, counts in enumerate(self.seconds) if counts.any()
            },
            "seconds_bins": len(self.seconds),
            "pairs": self.pairs,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Evidence":
        """What `to_dict` gave; ValueError, KeyError or TypeError when it is something else."""
        seconds = np.zeros((int(plain["seconds_bins"]), 2), np.int64)
        for at, counts in plain["seconds"].items():
            seconds[int(at)] = counts
        return cls(
            _table(plain["requests"]),
            _table(plain["units"]),
            {kind: _table(table) for kind, table in plain["events"].items()},
            {kind: np.array(counts, np.int64) for kind, counts in plain["all_events"].items()},
            {channel: _table(table) for channel, table in plain["bins"].items()},
            seconds,
            {name: int(n) for name, n in plain["pairs"].items()},
        )


def _longer(one: Integers, other: Integers) -> Integers:
    if len(one) < len(other):
        one, other = other, one
    total = one.copy()
    total[: len(other)] += other
    return total


def _plain(table: Table) -> dict[str, Any]:
    return {weight_text(weight): counts.tolist() for weight, counts in table.items()}


def _table(plain: Mapping[str, Any]) -> Table:
    return {weight_of(text): np.array(counts, np.int64) for text, counts in plain.items()}
