"""What each variant of a rollout met, as one worker counts it; and the slot that outlives a crash.

Counted on the loop, for models with a rollout only; written once a second as one file per worker,
which adds up with those of others (`monitors.guards`). Only requests that the split assigned count:
calls by number, by rule and overrides say nothing about the draw.
"""

import contextlib
import mmap
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from gateway import values
from gateway.protocol.call import Served
from gateway.telemetry import Sample
from gateway.tensors import Array
from gateway.values import Bins, Channel, Frozen, Value
from monitors.guards import slow
from monitors.guards.bets import CANDIDATE, CONTROL
from monitors.guards.evidence import Evidence, Weight, count, weight_text
from monitors.guards.units import Units
from registry import buckets, store
from registry.errors import WriteError
from registry.rollouts import Rollout
from registry.routes import UNIT_REQUEST

FORMAT = 1
KINDS = ("error", "slow", "not_finite")
"""Kinds of bad events that are compared; each has a first one per unit."""
BREAKER, RUN_ENDED = "breaker", "run_ended"
"""What happens to a variant and not to a unit, counted among all events: hard breaches."""
_SAMPLES_MAX = 500
_WEIGHTS_MAX = 255
_OURS = 500
"""Statuses from here on are ours to answer for, not the client's."""
_UNIT_KEY = b"exposures"


class Met(NamedTuple):
    """A request in the hands of a variant."""

    at: int
    """`CANDIDATE` or `CONTROL`."""
    unit: int | None
    weight: Weight


class InHand(NamedTuple):
    """What a process has in hand, by variant: `CANDIDATE` and `CONTROL`."""

    pid: int
    requests: tuple[int, int]
    running: tuple[int, int]
    ended: tuple[int, int]
    """How often the watchdog has asked the run under way to end."""


class Slot:
    """Requests in hand, in a file that is mapped: it outlives the process, whatever ends it.

    Cells: process id, requests in hand of candidate and control, runs under way of each, how often
    the watchdog has asked each one's run to end.
    """

    _CELLS = 7

    def __init__(self, path: Path) -> None:
        """Make the file; without one (disk full, read-only) it counts in memory."""
        self._path = path
        self._cells = memoryview(bytearray(8 * self._CELLS)).cast("q")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as file:
                os.posix_fallocate(file.fileno(), 0, 8 * self._CELLS)
                self._cells = memoryview(mmap.mmap(file.fileno(), 8 * self._CELLS)).cast("q")
        self._cells[0] = os.getpid()

    def take(self, at: int) -> None:
        """A request comes into a variant's hand."""
        self._cells[1 + at] += 1

    def give(self, at: int) -> None:
        """It has left."""
        self._cells[1 + at] -= 1

    def run(self, at: int, change: int) -> None:
        """A run of this variant begins (1) or has ended (-1)."""
        self._cells[3 + at] += change
        self._cells[5 + at] = 0

    def end(self, at: int) -> None:
        """A run of this variant was asked to end: should its process go with it, this is why."""
        self._cells[5 + at] += 1

    def close(self) -> None:
        """Nothing is in hand any more: the worker ends of its own will."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    @classmethod
    def read(cls, path: Path) -> "InHand | None":
        """What a file says; None if it is none."""
        try:
            cells = memoryview(path.read_bytes()).cast("q")
            pairs = ((cells[1], cells[2]), (cells[3], cells[4]), (cells[5], cells[6]))
            return InHand(cells[0], *pairs)
        except (OSError, TypeError, IndexError):
            return None


class Exposure:
    """One rollout, counted by one worker. For the loop's thread only, but for `write`."""

    def __init__(self, rollout: Rollout, file: Path, slot: Slot) -> None:
        """Go on from the file, if this worker's predecessor left one."""
        self.rollout = rollout
        self._file = file
        self._slot = slot
        self._weights: list[str] = []
        self.evidence = Evidence(seconds=np.zeros((slow.N_BINS, 2), np.int64))
        self.units: dict[str, Units] = {name: Units() for name in ("seen", "met", "values", *KINDS)}
        self.samples: dict[str, list[Value]] = {}
        self._bins = Bins(Frozen(rollout.edges, rollout.levels))
        self._channels: dict[str, list[Channel]] = {}
        self._ended = [0, 0]
        self._is_changed = True
        self._continue()

    def adopt(self, rollout: Rollout) -> None:
        """The rollout has moved on."""
        if not self._bins:
            self._bins = Bins(Frozen(rollout.edges, rollout.levels))
        self.rollout = rollout

    def begin(self, version: int, p: float, unit: int | None) -> Met | None:
        """A request is assigned; None if it is none of this rollout's.

        Parameters
        ----------
        version : that answers
        p : probability with which the split gave it the request
        unit : hash of the sticky unit, None where the request is its own unit
        """
        if version == self.rollout.candidate:
            at, candidate = CANDIDATE, round(p * buckets.N)
        elif version == self.rollout.control:
            at, candidate = CONTROL, buckets.N - round(p * buckets.N)
        else:
            return None
        self._slot.take(at)
        return Met(at, unit, (candidate, buckets.N - candidate))

    def end(
        self,
        met: Met,
        seconds: float,
        *,
        is_error: bool,
        inputs: Sequence[Array] = (),
        outputs: Sequence[Array] = (),
        names: tuple[Sequence[str], Sequence[str]] = ((), ()),
    ) -> None:
        """A request is answered, or has failed by no fault of its client.

        Parameters
        ----------
        names : of the inputs and of the outputs
        """
        self._slot.give(met.at)
        self._is_changed = True
        count(self.evidence.requests, met.weight, met.at)
        self.evidence.seconds[slow.bin_of(seconds), met.at] += 1
        threshold = self.rollout.slow_s.get("slow_requests")
        p99_s = self.rollout.plan.guards.ceiling.p99_s
        if is_error:
            self._event("error", met)
        elif not all(_is_finite(output) for output in outputs):
            self._event("not_finite", met)
        if threshold is not None and seconds > threshold:
            self._event("slow", met)
        if p99_s is not None and seconds > p99_s:
            self._all("late", met.at)
        if met.at == CANDIDATE and met.unit is not None:
            self.units["met"].add(met.unit, b"\0")
        is_drawn = min(met.weight) > 0
        if is_drawn and met.unit is None:
            count(self.evidence.units, met.weight, met.at)
        elif is_drawn and met.unit is not None:
            self.units["seen"].add(met.unit, self._code(met))
        # Inputs of failed requests too: left out, the other bins would look out of balance.
        self._values(met, is_drawn, inputs, outputs, names)

    def dropped(self, met: Met) -> None:
        """The request ended by its client's doing, or before it ran: it says nothing."""
        self._slot.give(met.at)

    def run(self, version: int, change: int) -> None:
        """A run of a version begins (1) or has ended (-1)."""
        if version == self.rollout.candidate:
            self._slot.run(CANDIDATE, change)
        elif version == self.rollout.control:
            self._slot.run(CONTROL, change)

    def ended(self, version: int) -> None:
        """The watchdog has asked a run of a version to end. Called by any thread."""
        at = self._at(version)
        if at is not None:
            self._slot.end(at)
            self._ended[at] += 1
            self._is_changed = True

    def opened(self, version: int) -> None:
        """The breaker of a version has opened."""
        at = self._at(version)
        if at is not None:
            self._all(BREAKER, at)
            self._is_changed = True

    def _at(self, version: int) -> int | None:
        rollout = self.rollout
        return {rollout.candidate: CANDIDATE, rollout.control: CONTROL}.get(version)

    def snapshot(self) -> bytes | None:
        """What the file shall hold; None if nothing has changed."""
        for at in (CANDIDATE, CONTROL):
            for _ in range(self._ended[at]):
                self._all(RUN_ENDED, at)
                self._ended[at] -= 1
        if not self._is_changed:
            return None
        self._is_changed = False
        return msgspec.json.encode(
            {
                "format": FORMAT,
                "rollout": self.rollout.id,
                "weights": self._weights,
                "channels": self._bins.names,
                "evidence": self.evidence.to_dict(),
                "units": {name: units.to_dict() for name, units in self.units.items()},
                "samples": {} if self._bins else self.samples,
            }
        )

    def write(self, data: bytes) -> bool:
        """Replace the file; whether it could be. Evidence is kept in memory all the same."""
        try:
            store.make_directory(self._file.parent)
            store.replace(self._file, data, is_durable=False)
        except WriteError:
            self._is_changed = True
            return False
        return True

    def close(self) -> None:
        """The worker ends, or the rollout has."""
        self._slot.close()

    def _continue(self) -> None:
        found = read(self._file, self.rollout.id)
        if found is None:
            return
        self._weights = found.weights
        self.evidence = found.evidence
        self.units.update(found.units)
        self.samples = {name: list(each) for name, each in found.samples.items()}

    def _event(self, kind: str, met: Met) -> None:
        self._all(kind, met.at)
        if min(met.weight) == 0:
            return
        if met.unit is None:
            count(self.evidence.events.setdefault(kind, {}), met.weight, met.at)
        else:
            self.units[kind].add(met.unit, self._code(met))

    def _all(self, kind: str, at: int) -> None:
        counts = self.evidence.all_events.setdefault(kind, np.zeros(2, np.int64))
        counts[at] += 1

    def _code(self, met: Met) -> bytes:
        text = weight_text(met.weight)
        if text not in self._weights:
            self._weights.append(text)
        return bytes((min(self._weights.index(text), _WEIGHTS_MAX), met.at))

    def _values(
        self,
        met: Met,
        is_drawn: bool,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        names: tuple[Sequence[str], Sequence[str]],
    ) -> None:
        bins = self._bins
        if not bins:
            if met.at == CONTROL:
                self._sample(inputs, outputs, names)
            return
        if not is_drawn:
            return
        units = self.units["values"]
        if met.unit is not None and (met.unit in units or met.unit >= units.threshold):
            return
        found = bins.of(
            self._read("input:", inputs, names[0]) | self._read("output:", outputs, names[1])
        )
        if met.unit is not None:
            units.add(met.unit, self._code(met) + bytes(found))
            return
        for name, bin_ in zip(bins.names, found, strict=True):
            if bin_ != values.MISSING:
                table = self.evidence.bins.setdefault(name, {})
                count(table, met.weight, met.at, bin_=bin_, bins=bins.n(name))

    def _sample(
        self,
        inputs: Sequence[Array],
        outputs: Sequence[Array],
        names: tuple[Sequence[str], Sequence[str]],
    ) -> None:
        for prefix, tensors, of in (("input:", inputs, names[0]), ("output:", outputs, names[1])):
            for name, value in self._read(prefix, tensors, of).items():
                kept = self.samples.setdefault(name, [])
                if len(kept) < _SAMPLES_MAX:
                    kept.append(value)

    def _read(
        self, prefix: str, tensors: Sequence[Array], names: Sequence[str]
    ) -> dict[str, Value]:
        """The first row's values, of the first few columns there are."""
        wanted = self._channels.get(prefix)
        if wanted is None and tensors:
            wanted = self._channels[prefix] = values.channels(prefix, tensors, names)
        return values.read(wanted or (), tensors)


class Found(NamedTuple):
    """What one worker's file holds."""

    weights: list[str]
    channels: list[str]
    evidence: Evidence
    units: dict[str, Units]
    samples: dict[str, list[Value]]


def read(path: Path, rollout: str) -> Found | None:
    """What a worker's file holds; None if there is none of this rollout that can be read."""
    try:
        plain = msgspec.json.decode(path.read_bytes())
        if plain["format"] != FORMAT or plain["rollout"] != rollout:
            return None
        return Found(
            [str(text) for text in plain["weights"]],
            [str(name) for name in plain["channels"]],
            Evidence.from_dict(plain["evidence"]),
            {name: Units.from_dict(units) for name, units in plain["units"].items()},
            {name: [_sampled(v) for v in found] for name, found in plain["samples"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, msgspec.DecodeError):
        return None


class Choice(Protocol):
    """What of a choice is counted by."""

    @property
    def version(self) -> int:
        """That answers."""

    @property
    def reason(self) -> str:
        """`SPLIT`: drawn with the probability `p`."""

    @property
    def p(self) -> float:
        """With which such a unit is given to this variant."""


class Decision(Protocol):
    """What of a decision is counted by."""

    @property
    def choice(self) -> Choice:
        """The variant, and why."""

    @property
    def unit(self) -> bytes | None:
        """What is sticky."""

    @property
    def unit_kind(self) -> str:
        """`request` where nothing is."""


class Watched:
    """A request of a rollout under way, until it has ended one way or another."""

    __slots__ = ("_exposure", "_met", "_served")

    def __init__(self, exposure: Exposure, met: Met, served: Served) -> None:
        self._exposure = exposure
        self._met = met
        self._served = served

    def answered(self, seconds: float, inputs: list[Array], outputs: list[Array]) -> None:
        """It got its answer."""
        signature = self._served.signature
        names = (
            [spec.name for spec in signature.inputs],
            [spec.name for spec in signature.outputs],
        )
        self._exposure.end(
            self._met, seconds, is_error=False, inputs=inputs, outputs=outputs, names=names
        )

    def failed(self, seconds: float, status: int, inputs: Sequence[Array] = ()) -> None:
        """It failed; what is its client's doing, or was refused for want of room, says nothing."""
        if status >= _OURS:
            names = ([spec.name for spec in self._served.signature.inputs], ())
            self._exposure.end(self._met, seconds, is_error=True, inputs=inputs, names=names)
        else:
            self._exposure.dropped(self._met)

    def dropped(self) -> None:
        """Its client has left."""
        self._exposure.dropped(self._met)


class Exposures:
    """The rollouts that a worker counts, by model."""

    def __init__(self, state_dir: Path, run_dir: Path | None, worker: str) -> None:
        """`worker`: host and slot, as in the names of its files."""
        self._state_dir = state_dir
        self._run_dir = run_dir
        self._worker = worker
        self.by_model: dict[str, Exposure] = {}

    def follow(self, rollouts: Mapping[str, Rollout]) -> None:
        """These rollouts are under way, by model; those that are not are let go."""
        for model in [*self.by_model]:
            new = rollouts.get(model)
            if new is None or new.id != self.by_model[model].rollout.id:
                self.by_model.pop(model).close()
        for model, rollout in rollouts.items():
            if (known := self.by_model.get(model)) is not None:
                known.adopt(rollout)
            else:
                self.by_model[model] = Exposure(
                    rollout,
                    evidence_dir(self._state_dir, rollout.id) / f"{self._worker}.json",
                    Slot(slot_path(self._run_dir, self._state_dir, rollout.id, self._worker)),
                )

    def begin(self, served: Served, decision: Decision) -> "Watched | None":
        """A request of a model with a rollout, if the split has assigned it."""
        exposure = self.by_model.get(served.model)
        choice = decision.choice
        if exposure is None or choice.reason != "SPLIT":
            return None
        unit = None
        if decision.unit and decision.unit_kind not in ("", UNIT_REQUEST):
            unit = unit_hash(decision.unit)
        met = exposure.begin(choice.version, choice.p, unit)
        return None if met is None else Watched(exposure, met, served)

    def run(self, model: str, version: int, change: int) -> None:
        """A run of a version begins (1) or has ended (-1)."""
        if (exposure := self.by_model.get(model)) is not None:
            exposure.run(version, change)

    def ended(self, model: str, version: int) -> None:
        """The watchdog has asked a run of a version to end. Called by any thread."""
        if (exposure := self.by_model.get(model)) is not None:
            exposure.ended(version)

    def opened(self, model: str, version: int) -> None:
        """The breaker of a version has opened."""
        if (exposure := self.by_model.get(model)) is not None:
            exposure.opened(version)

    def snapshots(self) -> list[tuple[Exposure, bytes]]:
        """What is to be written, taken on the loop; write it anywhere."""
        found = [(exposure, exposure.snapshot()) for exposure in self.by_model.values()]
        return [(exposure, data) for exposure, data in found if data is not None]

    def weight_samples(self) -> list[Sample]:
        """For the gauge of weights."""
        return [((model,), each.rollout.weight) for model, each in self.by_model.items()]

    def close(self) -> None:
        """The worker ends of its own will."""
        for exposure in self.by_model.values():
            exposure.close()
        self.by_model.clear()


def evidence_dir(state_dir: Path, rollout: str) -> Path:
    """Where the workers' files of a rollout are."""
    return state_dir / "rollouts" / rollout / "evidence"


def slot_path(run_dir: Path | None, state_dir: Path, rollout: str, worker: str) -> Path:
    """Where a worker says what it has in hand: on this host."""
    return (run_dir or state_dir / "run") / "in_hand" / f"{rollout}.{worker}"


def unit_hash(unit: bytes) -> int:
    """64 bits of a unit for counting; not the hash that assigns it."""
    return int.from_bytes(blake2b(unit, digest_size=8, key=_UNIT_KEY).digest(), "big")


def _sampled(value: object) -> Value:
    if isinstance(value, int | float | str):
        return value
    raise TypeError("a sample is a number or a text")


def _is_finite(output: Array) -> bool:
    return output.dtype.kind != "f" or bool(np.isfinite(output).all())
