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
from pathlib import Path
from typing import Any

import msgspec

from gateway import exposures, outcomes, values
from gateway.alarms import AlarmLog
from gateway.decision import Around, Move, Readiness, judge, next_move
from gateway.exposures import Slot
from gateway.folding import Folded
from gateway.shadow.report import cases_of
from gateway.shadow.tally import Pairing
from gateway.telemetry import event
from gateway.values import Bins, Frozen
from monitors.guards import slow
from monitors.guards.bets import CANDIDATE, CONTROL
from monitors.guards.evidence import Evidence
from monitors.guards.verdict import Verdict
from registry import changes, rollouts, store, workers
from registry.changes import Known
from registry.errors import ConflictError, RegistryError, RolloutError, WriteError
from registry.revisions import ModelState, Revision, Revisions
from registry.rollouts import Roll, Rollout

HARD_SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
"""Deaths that a model causes: with the candidate's run under way they need no statistics."""
_TRIES = 10
_DEATH_WAIT_S = 3.0

Workers = Callable[[Revision, str, int], Readiness]
"""Given a revision, a model and a version: whether all live workers serve it, warm."""
Deaths = Callable[[int], int | None]
"""The signal that ended a process; 0 for none, None while nobody knows."""
Drifts = Callable[[str, Sequence[int]], Sequence[str]]
"""Given a model and versions: drift alarms of these that are open, as sentences."""


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
        drifts: Drifts = lambda _, __: (),
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is read or locked before the first `tick`.

        Parameters
        ----------
        known : what there is to point at
        drifts : alarms that are open for some versions of a model, as sentences
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
        self._read_files: dict[Path, tuple[tuple[int, int], outcomes.Found | None]] = {}
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
            ids = {rollout.id for rollout in under_way.values()}
            self._folded = {id_: folded for id_, folded in self._folded.items() if id_ in ids}
            self._read_files = {
                path: found for path, found in self._read_files.items() if path.parts[-3] in ids
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

    @property
    def is_holder(self) -> bool:
        """Whether this is the one that looks, of the workers of its host."""
        return self._lease.is_held

    def close(self) -> None:
        """Give the lease back."""
        self._lease.release()

    # -- holding the lease

    def _look(self, model: str, rollout: Rollout, head: Revision) -> None:
        folded = self._remembered(rollout)
        found = self._files(rollout)
        evidence = Evidence()
        bins = Bins(Frozen(rollout.edges, rollout.levels))
        for each in found:
            folded.fold(each, bins)
            evidence = evidence + each.evidence
        labels = self._outcomes(rollout, folded)
        evidence = evidence + folded.counted
        self._count_deaths(rollout, folded)
        barred = self._shadowed(model, rollout, evidence)
        if not rollout.slow_s or not bins:
            self._freeze(model, rollout, evidence, found)
        met = folded.units_met(evidence)
        now = self._now()
        units = folded.units_since(rollout, met)
        said = judge(
            rollout,
            evidence,
            units=units,
            now=now,
            peaks=folded.peaks,
            hard=[*folded.hard, *barred],
            labelled=folded.labelled,
        )
        self._write(rollout, said, evidence, folded, units, labels)
        around = Around(
            now=now,
            alarms=lambda: self._drifts(model, (rollout.candidate, rollout.control)),
            ready=lambda: self._workers(head, model, rollout.candidate),
        )
        if (move := next_move(rollout, said, met=met, around=around)) is not None:
            self._move(model, rollout, move, said)

    def _shadowed(self, model: str, rollout: Rollout, evidence: Evidence) -> list[str]:
        """Take in what copies said, where the plan has them first; why they were ended."""
        first = rollout.plan.shadow_first
        if first is None:
            return []
        pairing = Pairing(
            model, rollouts.CANDIDATE, rollout.candidate, rollout.control, first.shadow
        )
        evidence.pairs, barred = cases_of(self._state_dir, pairing)
        return [barred] if barred else []

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
        frozen = Frozen({}, {})
        if not (rollout.edges or rollout.levels):
            frozen = values.freeze(each.samples for each in found)
        if slow_s or frozen.edges or frozen.levels:
            self._move(
                model,
                rollout,
                lambda s: rollouts.freeze(
                    s, slow_s=slow_s, edges=frozen.edges, levels=frozen.levels
                ),
                None,
            )

    def _move(
        self,
        model: str,
        rollout: Rollout,
        move: Move,
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

    def _outcomes(self, rollout: Rollout, folded: Folded) -> dict[str, Any]:
        """Add up what all hosts have read of labels; what each of them says, by host."""
        if rollout.plan.guards.outcome is None:
            return {}
        said = {}
        directory = outcomes.outcomes_dir(self._state_dir, rollout.id)
        for path in sorted(directory.glob("*.json")) if directory.is_dir() else []:
            found = self._read_outcomes(path, rollout)
            if found is not None:
                said[path.stem] = {
                    "units": found.n,
                    "unusable": found.unusable,
                    "problem": found.problem or None,
                }
                folded.fold_outcomes(found)
        return said

    def _read_outcomes(self, path: Path, rollout: Rollout) -> outcomes.Found | None:
        """What a host's file holds; read again only when it has been replaced."""
        try:
            about = path.stat()
        except OSError:
            return None
        seen = (about.st_mtime_ns, about.st_size)
        known = self._read_files.get(path)
        if known is None or known[0] != seen:
            known = self._read_files[path] = seen, outcomes.read(path, rollout.id)
        return known[1]

    def _remembered(self, rollout: Rollout) -> Folded:
        folded = self._folded.get(rollout.id)
        if folded is None:
            try:
                folded = Folded.from_json(self._memory(rollout).read_bytes())
            except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError):
                folded = Folded()
            self._folded[rollout.id] = folded
        return folded

    def _memory(self, rollout: Rollout) -> Path:
        return self._directory(rollout) / f"controller-{self._host}.json"

    def _write(
        self,
        rollout: Rollout,
        said: Verdict,
        evidence: Evidence,
        folded: Folded,
        units: int,
        labels: Mapping[str, Any],
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
            "units": units,
            "requests": {
                "candidate": int(totals[CANDIDATE]),
                "control": int(totals[CONTROL]),
            },
            "p99_s": {
                "candidate": _quantile(evidence, CANDIDATE),
                "control": _quantile(evidence, CONTROL),
            },
            "pairs": evidence.pairs,
            "labels": labels,
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
            if read is None or _is_alive(read.pid):
                continue
            pid, in_hand, running, stopped = read
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
            if is_candidate and stopped[CANDIDATE] > 0:
                folded.hard.append(
                    f"a worker died with a run of version {rollout.candidate} that the watchdog"
                    " had asked to end"
                )
            elif is_candidate and number in HARD_SIGNALS:
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


def readiness(state_dir: Path, clock: Callable[[], float] = time.monotonic) -> Workers:
    """Workers as their heartbeats tell: alive, following, with the candidate open."""
    watch = workers.Watch(state_dir)
    since: dict[tuple[str, int], float] = {}

    def ready(head: Revision, model: str, version: int) -> Readiness:
        alive = watch.look()
        refused = next(
            (
                f"{beat.name}: {beat.rejected.reason}"
                for beat in alive.values()
                if beat.rejected is not None and beat.rejected.revision >= head.number
            ),
            "",
        )
        behind = tuple(
            name
            for name, beat in alive.items()
            if beat.observed < head.number or f"{model}@{version}" not in beat.loaded
        )
        if alive and not behind and not refused:
            since.pop((model, version), None)
            return Readiness()
        began = since.setdefault((model, version), clock())
        return Readiness(behind if alive else ("no worker is there",), refused, clock() - began)

    return ready


def drifts_of(log: AlarmLog) -> Drifts:
    """Alarms of the log that nobody has acknowledged and nothing has ended."""

    def open_of(model: str, versions: Sequence[int]) -> list[str]:
        return [
            f"{episode.id} ({episode.monitor} of version {episode.version})"
            for episode in log.episodes()
            if episode.model == model and episode.version in versions and episode.state == "open"
        ]

    return open_of


def notes_of(drifts: Drifts, model: str, versions: Sequence[int]) -> list[str]:
    """What whoever starts a rollout should know: what will hold it before its first weight."""
    return [
        f"drift alarm {alarm} is open: the rollout holds before its first weight until none is"
        for alarm in drifts(model, versions)
    ]


def deaths_of(run_dir: Path | None) -> Deaths:
    """Signals as the supervisor has noted them; without one every death is like any other."""

    def signal_of(pid: int) -> int | None:
        if run_dir is None:
            return 0
        try:
            return int((run_dir / "deaths" / str(pid)).read_text().partition(" ")[0])
        except (OSError, ValueError):
            return None

    return signal_of


def _rollout(state: ModelState) -> Rollout | None:
    try:
        return rollouts.rollout_of(state)
    except RolloutError:
        return None


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
