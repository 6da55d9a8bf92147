"""Rollouts: one worker of a host holds the lease, adds up what all met, and writes what follows.

Once a second: evidence of all workers -> guards -> the next revision. Safety never depends on the
lease: creating a revision is the compare-and-swap, so two controllers waste work and do no harm.
When none is there weights stay where they are; after `unattended_s_max` any worker takes them from
the candidate.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from gateway import exposures
from gateway.exposures import KINDS, N_BINS, Slot
from gateway.telemetry import event
from monitors.guards import slow, verdict
from monitors.guards.bets import CANDIDATE, CONTROL
from monitors.guards.evidence import Evidence, Weight, count
from monitors.guards.units import Units
from monitors.guards.verdict import Exposure as Seen
from monitors.guards.verdict import Guard, Peaks, Verdict
from registry import buckets, changes, rollouts, store, workers
from registry.changes import Known
from registry.errors import ConflictError, RegistryError, RolloutError, WriteError
from registry.revisions import ModelState, Revision, Revisions
from registry.rollouts import Roll, Rollout

HARD_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
"""Deaths that a model causes: with the candidate's run under way they need no statistics."""
_UNITS_MAX = 32_768
_TRIES = 10
_DEATH_WAIT_S = 3.0


class Readiness(NamedTuple):
    """Whether the live workers could follow a revision."""

    behind: tuple[str, ...] = ()
    """Workers that have not observed it yet."""
    refused: str = ""
    """Why one of them refused it."""


Workers = Callable[[Revision, str, int], Readiness]
"""Given a revision, a model and a version: whether all live workers serve it, warm."""
Deaths = Callable[[int], int | None]
"""The signal that ended a process; 0 for none, None while nobody knows."""


@dataclass(slots=True)
class Folded:
    """What has been added up of one rollout: units once each, however many workers met them."""

    units: dict[str, Units] = field(
        default_factory=lambda: {
            name: Units(_UNITS_MAX) for name in ("seen", "met", "values", *KINDS)
        }
    )
    counted: Evidence = field(default_factory=Evidence)
    """Tallies of units. What was counted stays, also when a unit is no longer remembered."""
    peaks: Peaks = field(default_factory=Peaks)
    hard: list[str] = field(default_factory=list)
    """What happened that needs no statistics."""

    def fold(self, found: exposures.Found, edges: Mapping[str, tuple[float, ...]]) -> None:
        """Count the units of one worker's file that nobody has counted yet."""
        weights = [_weight(text) for text in found.weights]
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
                        bins = len(edges.get(channel, ())) + 1
                        if bin_ < bins:
                            count(table, weight, at, bin_=bin_, bins=bins)
                else:
                    count(self.counted.events.setdefault(name, {}), weight, at)

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
        """Units that the candidate met: sticky ones by their hashes, others one by one."""
        met = self.units["met"]
        single = evidence.total(evidence.units)[CANDIDATE]
        return round(len(met) * (2**64 / met.threshold)) + int(single)

    def to_json(self, beat: int) -> bytes:
        """As a file."""
        return msgspec.json.encode(
            {
                "beat": beat,
                "units": {name: units.to_dict() for name, units in self.units.items()},
                "counted": self.counted.to_dict(),
                "peaks": self.peaks.highest,
                "hard": self.hard,
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> "Folded":
        """What a file holds; ValueError, KeyError or TypeError when it is something else."""
        plain = msgspec.json.decode(data)
        return cls(
            {name: Units.from_dict(units) for name, units in plain["units"].items()},
            Evidence.from_dict(plain["counted"]),
            Peaks({str(k): float(v) for k, v in plain["peaks"].items()}),
            [str(sentence) for sentence in plain["hard"]],
        )


_FOR_PEOPLE = ("manual", "breach", "invalid")
"""Holds that only somebody ends. What a guard once found stays found, also when the worker that
remembered its highest evidence is no more."""


class Controller:
    """Looks at every rollout once a second, if it holds the lease. For one thread at a time."""

    def __init__(
        self,
        state_dir: Path,
        run_dir: Path | None,
        known: Callable[[], Known],
        host: str,
        *,
        workers: Workers,
        deaths: Deaths = lambda _: 0,
        drifts: Callable[[str], Sequence[str]] = lambda _: (),
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is read or locked before the first `tick`.

        Parameters
        ----------
        known : what there is to point at
        drifts : alarms that are open for a model, as sentences
        now : seconds of UTC, for the durations of steps, which outlive processes
        """
        self._state_dir = state_dir
        self._run_dir = run_dir
        self._known = known
        self._host = host
        self._workers = workers
        self._deaths = deaths
        self._drifts = drifts
        self._now = now
        self._monotonic = monotonic
        self._revisions = Revisions(state_dir)
        self._lease = store.Lease((run_dir or state_dir / "run") / "controller.lock")
        self._folded: dict[str, Folded] = {}
        self._beat = 0
        self._seen_beats: dict[str, tuple[int, float]] = {}
        self._first_missed: dict[int, float] = {}

    def tick(self) -> dict[str, Rollout]:
        """One look; the rollouts that are under way, by model.

        Whatever goes wrong with one rollout leaves the others alone.
        """
        try:
            head = self._revisions.head()
            under_way = {
                model: rollout
                for model, state in head.models.items()
                if (rollout := _rollout(state)) is not None and not rollout.is_over
            }
            if not under_way:
                self._lease.release()
                return {}
            if not self._lease.is_held:
                store.make_directory(self._lease.path.parent)
            is_mine = self._lease.acquire()
        except RegistryError as error:
            event("controller_cannot_look", logging.WARNING, reason=str(error))
            return {}
        self._beat += 1
        for model, rollout in under_way.items():
            try:
                if is_mine:
                    self._look(model, rollout, head)
                else:
                    self._stand_by(model, rollout)
            except (RegistryError, OSError) as error:
                event("rollout_not_moved", logging.WARNING, model=model, reason=str(error))
        return under_way

    def close(self) -> None:
        """Give the lease back."""
        self._lease.release()

    # -- holding the lease

    def _look(self, model: str, rollout: Rollout, head: Revision) -> None:
        folded = self._remembered(rollout)
        found = self._files(rollout)
        evidence = Evidence()
        for each in found:
            folded.fold(each, rollout.edges)
            evidence = evidence + each.evidence
        evidence = evidence + folded.counted
        self._count_deaths(rollout, folded)
        if not rollout.slow_s or not rollout.edges:
            self._freeze(model, rollout, evidence, found)
        met = folded.units_met(evidence)
        said = self._judge(rollout, evidence, folded, met)
        self._write(rollout, said, evidence, folded, met)
        self._act(model, rollout, said, head, met, evidence)

    def _judge(self, rollout: Rollout, evidence: Evidence, folded: Folded, met: int) -> Verdict:
        plan = rollout.plan
        elapsed_s = self._now() - rollout.since
        units = met - rollout.units_before
        units_min, for_s = 1, 0.0
        if rollout.at == "step":
            step = plan.steps[rollout.step]
            units_min, for_s = step.units_min, step.for_s
        elif rollout.at == "shadowing" and plan.shadow_first is not None:
            units = evidence.pairs.get("n", 0)
            units_min, for_s = plan.shadow_first.pairs_min, plan.shadow_first.for_s
        elif rollout.at == "baking":
            for_s = plan.bake_s
        guards = guards_of(rollout)
        hard = [*folded.hard, *_not_finite(rollout, evidence)]
        return verdict.judge(
            evidence,
            guards,
            alpha=plan.alpha,
            exposure=Seen(
                is_long_enough=elapsed_s >= for_s,
                units=units,
                units_min=units_min,
                no_worse_than=plan.no_worse_than,
            ),
            hard=hard,
            peaks=folded.peaks,
        )

    def _act(
        self,
        model: str,
        rollout: Rollout,
        said: Verdict,
        head: Revision,
        met: int,
        evidence: Evidence,
    ) -> None:
        now = self._now()
        if said.kind == "breach" and said.action == "abort":
            self._move(model, rollout, lambda s: rollouts.abort(s, said.reason, now=now), said)
            return
        if rollout.phase == "preparing":
            self._prepare(model, rollout, head, said)
            return
        if rollout.cause in _FOR_PEOPLE:
            return
        cause, why = self._hindrance(model, rollout, said, evidence)
        if cause is not None:
            if rollout.phase != "holding" or rollout.cause != cause:
                self._move(model, rollout, lambda s: rollouts.hold(s, cause, why, now=now), said)
            return
        if said.kind == "inconclusive":
            self._wait(model, rollout, said, met)
            return
        if rollout.phase == "holding":
            self._move(model, rollout, rollouts.resume, said)
            return
        self._go_on(model, rollout, said, met)

    def _go_on(self, model: str, rollout: Rollout, said: Verdict, met: int) -> None:
        now = self._now()
        is_last = rollout.at == "step" and rollout.step + 1 >= len(rollout.plan.steps)
        if is_last and not rollout.plan.auto_promote:
            why = "the last step is ok; promote it (driftgate canary promote)"
            self._move(model, rollout, lambda s: rollouts.hold(s, "manual", why, now=now), said)
            return
        self._move(model, rollout, lambda s: rollouts.advance(s, now=now, units=met), said)

    def _hindrance(
        self, model: str, rollout: Rollout, said: Verdict, evidence: Evidence
    ) -> tuple[rollouts.Cause | None, str]:
        """Why nothing may rise now, if there is something."""
        if said.kind in ("invalid", "breach"):
            return ("invalid" if said.kind == "invalid" else "breach"), said.reason
        if rollout.plan.guards.drift.action != "ignore":
            alarms = self._drifts(model)
            if alarms:
                return "drift", f"drift alarms are open: {'; '.join(alarms)}"
        del evidence
        at = time.gmtime(self._now())
        if (
            not rollouts.is_open(rollout.plan.window, at.tm_wday, at.tm_hour + at.tm_min / 60)
            and said.kind == "ok"
        ):
            return "window", "outside the window in which weights may rise"
        return None, ""

    def _wait(self, model: str, rollout: Rollout, said: Verdict, met: int) -> None:
        """Too little seen: go on waiting, and after the deadline do as the plan says."""
        if rollout.phase == "holding" and rollout.cause != "inconclusive":
            self._move(model, rollout, rollouts.resume, said)
            return
        now = self._now()
        if now - rollout.since < rollout.plan.deadline_s or rollout.at == "baking":
            return
        why = f"not ok after {rollout.plan.deadline_s:g} s: {said.reason}"
        policy = rollout.plan.on_inconclusive
        if policy == "abort":
            self._move(model, rollout, lambda s: rollouts.abort(s, why, now=now), said)
        elif policy == "advance":
            self._go_on(model, rollout, said, met)
        elif rollout.phase != "holding":
            self._move(
                model, rollout, lambda s: rollouts.hold(s, "inconclusive", why, now=now), said
            )

    def _prepare(self, model: str, rollout: Rollout, head: Revision, said: Verdict) -> None:
        ready = self._workers(head, model, rollout.candidate)
        now = self._now()
        if ready.refused:
            self._move(model, rollout, lambda s: rollouts.fail(s, ready.refused, now=now), said)
        elif not ready.behind:
            self._move(model, rollout, lambda s: rollouts.commit(s, now=now), said)

    def _freeze(
        self,
        model: str,
        rollout: Rollout,
        evidence: Evidence,
        found: Sequence[exposures.Found],
    ) -> None:
        slow_s: dict[str, float] = {}
        if not rollout.slow_s and len(evidence.seconds):
            level = rollout.plan.guards.slow_requests.quantile
            if (threshold := slow.threshold(evidence.seconds[:, CONTROL], level)) is not None:
                slow_s["slow_requests"] = threshold
        edges: dict[str, tuple[float, ...]] = {}
        if not rollout.edges:
            edges = edges_of([each.samples for each in found])
        if slow_s or edges:
            self._move(
                model, rollout, lambda s: rollouts.freeze(s, slow_s=slow_s, edges=edges), None
            )

    def _move(
        self,
        model: str,
        rollout: Rollout,
        move: Callable[[ModelState], ModelState],
        said: Verdict | None,
    ) -> None:
        """Write the next revision; somebody else's change is looked at first, then made again."""

        def only_this(state: ModelState) -> ModelState:
            found = _rollout(state)
            if found is None or found.id != rollout.id or found.is_over:
                raise RolloutError(f"rollout {rollout.id} has ended meanwhile")
            return move(state)

        for _ in range(_TRIES):
            try:
                applied = changes.apply(
                    self._revisions,
                    Roll(model, None, move=only_this),
                    known=self._known(),
                    actor=f"rollout:{rollout.id}",
                    via="controller",
                    message=(said.reason if said else "thresholds frozen")[:900],
                    force=True,
                )
            except ConflictError:
                continue
            if applied.is_changed:
                self._record(rollout, applied.revision, model, said)
            return

    def _record(
        self, rollout: Rollout, revision: Revision, model: str, said: Verdict | None
    ) -> None:
        after = _rollout(revision.models[model])
        phase = after.phase if after else "?"
        event(
            "rollout_moved",
            model=model,
            rollout=rollout.id,
            phase=phase,
            revision=revision.number,
            reason=said.reason if said else "thresholds frozen",
        )
        if said is None:
            return
        path = self._directory(rollout) / "steps" / f"{revision.number:08}.json"
        data = msgspec.json.encode(
            {"format": 1, "revision": revision.number, "phase": phase, **said.to_dict()}
        )
        with contextlib.suppress(WriteError):
            store.make_directory(path.parent)
            store.replace(path, data)

    # -- files

    def _directory(self, rollout: Rollout) -> Path:
        return self._state_dir / "rollouts" / rollout.id

    def _files(self, rollout: Rollout) -> list[exposures.Found]:
        directory = exposures.evidence_dir(self._state_dir, rollout.id)
        paths = sorted(directory.glob("*.json")) if directory.is_dir() else []
        read = (exposures.read(path, rollout.id) for path in paths)
        return [found for found in read if found is not None]

    def _remembered(self, rollout: Rollout) -> Folded:
        folded = self._folded.get(rollout.id)
        if folded is None:
            try:
                folded = Folded.from_json(self._memory(rollout).read_bytes())
            except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
                folded = Folded()
            self._folded = {rollout.id: folded, **self._folded}
        return folded

    def _memory(self, rollout: Rollout) -> Path:
        return self._directory(rollout) / f"controller-{self._host}.json"

    def _write(
        self, rollout: Rollout, said: Verdict, evidence: Evidence, folded: Folded, met: int
    ) -> None:
        """Evidence so far, for whoever looks, and for the next controller."""
        totals = evidence.total(evidence.requests)
        report = {
            "format": 1,
            "beat": self._beat,
            "rollout": rollout.id,
            "phase": rollout.phase,
            "step": rollout.step,
            "elapsed_s": round(max(self._now() - rollout.since, 0.0), 1),
            "units": met - rollout.units_before,
            "requests": {
                "candidate": int(totals[CANDIDATE]),
                "control": int(totals[CONTROL]),
            },
            "p99_s": {
                "candidate": _quantile(evidence, CANDIDATE),
                "control": _quantile(evidence, CONTROL),
            },
            "pairs": evidence.pairs,
            **said.to_dict(),
        }
        with contextlib.suppress(WriteError):
            store.make_directory(self._directory(rollout))
            store.replace(
                self._directory(rollout) / "status.json",
                msgspec.json.encode(report),
                is_durable=False,
            )
            store.replace(self._memory(rollout), folded.to_json(self._beat), is_durable=False)

    # -- workers that died

    def _count_deaths(self, rollout: Rollout, folded: Folded) -> None:
        """Each worker that died with requests in hand counts once: its file is then removed."""
        directory = exposures.slot_path(self._run_dir, self._state_dir, rollout.id, "x").parent
        for path in sorted(directory.glob(f"{rollout.id}.*")) if directory.is_dir() else []:
            read = Slot.read(path)
            if read is None or _is_alive(read[0]):
                continue
            pid, in_hand, running = read
            number = self._deaths(pid)
            if number is None:
                first = self._first_missed.setdefault(pid, self._monotonic())
                if self._monotonic() - first < _DEATH_WAIT_S:
                    continue
            path.unlink(missing_ok=True)
            self._first_missed.pop(pid, None)
            if not any(in_hand):
                continue
            is_candidate = running[CANDIDATE] > 0 or (
                in_hand[CANDIDATE] > 0 and in_hand[CONTROL] == 0 and running[CONTROL] == 0
            )
            if number in HARD_SIGNALS and is_candidate:
                name = signal.Signals(number).name
                folded.hard.append(
                    f"a worker died by {name} while it ran version {rollout.candidate}"
                )
            else:
                folded.died(rollout, in_hand)
            event(
                "worker_died_in_rollout",
                logging.WARNING,
                rollout=rollout.id,
                pid=pid,
                signal=number or 0,
                candidate=in_hand[CANDIDATE],
                control=in_hand[CONTROL],
            )

    # -- without the lease

    def _stand_by(self, model: str, rollout: Rollout) -> None:
        """See that somebody looks; if nobody does for too long, take the weight back."""
        try:
            status = msgspec.json.decode((self._directory(rollout) / "status.json").read_bytes())
            beat = int(status["beat"])
        except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
            beat = -1
        before = self._seen_beats.get(rollout.id)
        now = self._monotonic()
        if before is None or before[0] != beat:
            self._seen_beats[rollout.id] = (beat, now)
            return
        limit_s = rollout.plan.unattended_s_max
        if limit_s and rollout.weight and now - before[1] > limit_s:
            why = f"no controller for {limit_s:g} s"
            wall = self._now()
            self._move(model, rollout, lambda s: rollouts.abort(s, why, now=wall), None)


def report(state_dir: Path, rollout: Rollout) -> dict[str, Any]:
    """What the controller last said of a rollout, and the evidence each move was made on."""
    directory = state_dir / "rollouts" / rollout.id

    def load(path: Path) -> Any:
        try:
            return msgspec.json.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError):
            return None

    steps = sorted((directory / "steps").glob("*.json")) if directory.is_dir() else []
    return {
        "evidence": load(directory / "status.json"),
        "moves": [found for path in steps if (found := load(path)) is not None],
    }


def readiness(state_dir: Path) -> Workers:
    """Workers as their heartbeats tell: alive, following, with the candidate open."""
    watch = workers.Watch(state_dir)

    def ready(head: Revision, model: str, version: int) -> Readiness:
        alive = watch.look()
        for beat in alive.values():
            if beat.rejected is not None and beat.rejected.revision >= head.number:
                return Readiness(refused=f"{beat.name}: {beat.rejected.reason}")
        behind = tuple(
            name
            for name, beat in alive.items()
            if beat.observed < head.number or f"{model}@{version}" not in beat.loaded
        )
        return Readiness(behind if alive else ("no worker is there",))

    return ready


def deaths_of(run_dir: Path | None) -> Deaths:
    """Signals as the supervisor has noted them; without one every death is like any other."""

    def signal_of(pid: int) -> int | None:
        if run_dir is None:
            return 0
        try:
            return int((run_dir / "deaths" / str(pid)).read_text())
        except (OSError, ValueError):
            return None

    return signal_of


def guards_of(rollout: Rollout) -> tuple[Guard, ...]:
    """The guards of a rollout, as its plan states them."""
    guards, plan = rollout.plan.guards, rollout.plan
    found = [
        Guard(name=name, kind="harm", event=kind, ratio_max=guard.ratio_max, action=guard.action)
        for name, kind, guard in (
            ("error_rate", "error", guards.error_rate),
            ("slow_requests", "slow", guards.slow_requests),
            ("not_finite", "not_finite", guards.not_finite),
        )
        if guard.action != "ignore"
    ]
    for name, kind, watch in (
        ("output_shift", "shift", guards.output_shift),
        ("input_balance", "inputs", guards.input_balance),
    ):
        if watch.action != "ignore":
            action: Any = "invalid" if kind == "inputs" and watch.action == "hold" else watch.action
            found.append(Guard(name=name, kind=kind, action=action))  # type: ignore[arg-type]  # a literal
    if guards.srm.action != "ignore":
        found.append(Guard(name="srm", kind="balance", action="invalid", alpha=guards.srm.alpha))
    if guards.ceiling.error_share is not None:
        share = guards.ceiling.error_share / 100
        found.append(
            Guard(name="ceiling_error_share", kind="ceiling", event="error", share_max=share)
        )
    if guards.ceiling.p99_s is not None:
        found.append(Guard(name="ceiling_p99", kind="ceiling", event="late", share_max=0.01))
    if plan.shadow_first is not None:
        share = plan.shadow_first.disagreement_max / 100
        found.append(
            Guard(name="disagreement", kind="disagreement", action="hold", share_max=share)
        )
    return tuple(found)


def edges_of(samples: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, tuple[float, ...]]:
    """Deciles of the champion's own values, by channel; none before there are enough of them."""
    together: dict[str, list[float]] = {}
    for each in samples:
        for channel, values in each.items():
            together.setdefault(channel, []).extend(values)
    if not together or max(map(len, together.values())) < slow.ROWS_MIN:
        return {}
    levels = np.arange(1, N_BINS) / N_BINS
    return {
        channel: tuple(np.unique(np.quantile(values, levels)).tolist())
        for channel, values in sorted(together.items())
    }


def _not_finite(rollout: Rollout, evidence: Evidence) -> list[str]:
    """Hard only while the champion has none."""
    bad = evidence.all_events.get("not_finite")
    if bad is None or bad[CONTROL] or not bad[CANDIDATE]:
        return []
    if rollout.plan.guards.not_finite.action != "abort":
        return []
    return [f"version {rollout.candidate} gave outputs that are not finite: {bad[CANDIDATE]}"]


def _rollout(state: ModelState) -> Rollout | None:
    try:
        return rollouts.rollout_of(state)
    except RolloutError:
        return None


def _weight(text: str) -> Weight:
    candidate, control = text.split("/")
    return int(candidate), int(control)


def _quantile(evidence: Evidence, at: int) -> float | None:
    if not len(evidence.seconds) or not evidence.seconds[:, at].any():
        return None
    return round(slow.quantile(evidence.seconds[:, at], 0.99), 6)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
