"""One watched version: its rows become counts, counts of all workers become evidence.

Workers only add rows into arrays of counts. The one that holds the lease of the host takes what the
arrays have grown by and judges it, and keeps what it concluded in a file, together with how far it
had read: so every row counts once, whoever dies. The others answer from that file.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from gateway.columns import Column, answer, columns_of, fit, with_answers
from gateway.conclusions import Cells, Conclusions, Shared
from gateway.config import MonitorConfig
from gateway.counters import Counter
from gateway.errors import BadRequestError
from gateway.tap import Observation
from gateway.telemetry import TAP_DROPPED, event, series_name
from gateway.tensors import BFLOAT16, Array, widened
from monitors import Alarm, Budget, Monitor, MonitorError, Profile
from monitors.counts import Counts, share
from monitors.monitor import BLOCK_ROWS, BLOCK_S
from monitors.window import WindowName
from registry.errors import RegistryError
from registry.signature import Signature

Spend: TypeAlias = Callable[[float], None]
"""Is told the part of a model's budget that there is from now on."""
Scores = tuple[tuple[str, str, float, float], ...]
"""Channel, statistic, value, and the line that no drift would stay below."""

_STALE_S = 15.0
"""Rows that have waited so long for their verdict are a gap. A large state is written rarely."""


@dataclass(slots=True)
class WatchMeters:
    """What is counted about one watched version."""

    observed: Counter
    dropped: Counter
    errors: Counter
    pages: Counter
    warnings: Counter


@dataclass(frozen=True, slots=True)
class AlarmEvent:
    """Something happened to an alarm; told to whoever listens, by the holder of the lease."""

    what: str
    """opened, closed or acknowledged."""
    model: str
    version: int
    id: str
    """Name of the alarm on this host: model, version and number."""
    alarm: Alarm
    first: str = ""
    """The channel that the episode began with."""
    is_last: bool = False
    """Whether no alarm of the episode is open any more."""


@dataclass(slots=True)
class _Adoption:
    """Served rows on their way to become a reference profile."""

    rows_wanted: int
    rows: int = 0
    blocks: list[dict[str, Array]] = field(default_factory=list)


def budget_of(config: MonitorConfig, share: float) -> Budget:
    """A share of a model's budget, as settings have it."""
    return Budget(
        alarms=config.budget_alarms,
        days=None if config.budget_rows else config.budget_days,
        rows=config.budget_rows or None,
        share=config.budget_share * share,
    )


class Watch:
    """One version's monitor, or what is missing for one. Used by the observer's thread only."""

    def __init__(
        self,
        model: str,
        version: int,
        signature: Signature,
        *,
        config: MonitorConfig,
        meters: WatchMeters,
        references: Path | None,
        shared: Shared | None = None,
    ) -> None:
        self.model = model
        self.version = version
        self.meters = meters
        self.monitor: Monitor | None = None
        self.source: str | None = None
        self.adoption: _Adoption | None = None
        self.problems: list[str] = []
        self.told: list[AlarmEvent] = []
        """What happened to alarms and has not been passed on yet."""
        self.has_adopted = False
        """Whether served rows have become the reference since somebody looked."""
        self.share = 1.0
        """Part of the model's budget that this version has."""
        self._scores: Scores = ()
        self._scored = -1
        self._signature = signature
        self.config = config
        self._references = references
        self._shared = shared or Shared()
        self._all, self._unwatched = columns_of(signature)
        self._columns = self._all
        self._cells: Cells = np.zeros(0, np.int64)
        self._cursor: Cells = np.zeros(0, np.int64)
        self._name = ""
        self._digest = ""
        self._folded_at = 0.0
        self._kept = Conclusions(None)
        self._is_changed = False
        self._was_judge = False
        self._fresh_at = -math.inf
        self._n_before = 0
        self._begun_at = time.time()

    def judge_by(self, profile: Profile, source: str) -> None:
        """Compare with this profile from now on, as far as it fits the model."""
        fitting, self.problems = fit(profile, self._all, self._signature)
        self.problems += self._unwatched
        self._n_before = self.n_observed
        self.adoption = None
        self.source = source
        self._columns = fitting
        self._scores, self._scored = (), -1
        self._digest = profile.digest
        self.monitor = None
        if not fitting:
            return
        self.monitor = self._new_monitor(profile.select([column.channel for column in fitting]))
        digest = self.monitor.profile.digest[:16]
        self._name = f"monitor:{self.model}:{self.version}:{digest}"
        size = 1 + self.monitor.n_layers * self.monitor.profile.layout.n_cells
        self._cells = self._shared.cells(self._name, size)
        self._cursor = np.zeros(size, np.int64)
        self._was_judge = False
        self._kept = self._shared.conclusions(f"{self.model}-{self.version}-{digest}")
        # Nothing counted yet: what was kept before now was read from counters that are gone.
        self._fresh_at = -math.inf
        if not self._shared.total(self._name, self._cells)[0]:
            self._fresh_at = time.time()

    def _new_monitor(self, profile: Profile) -> Monitor:
        config = self.config
        return Monitor(
            profile,
            budget=budget_of(config, self.share),
            tolerance=config.tolerance,
            window_rows=config.window_rows,
        )

    def spend(self, share: float) -> None:
        """Have this part of the model's budget from now on."""
        self.share = share
        if self.monitor is not None:
            self.monitor.spend(self.config.budget_share * share)

    def configure(self, config: MonitorConfig) -> None:
        """Judge under these settings from now on; what was concluded stays."""
        if config == self.config:
            return
        self.config = config
        if (monitor := self.monitor) is None:
            return
        self.monitor = self._new_monitor(monitor.profile)
        self.monitor.restore(monitor.to_bytes())
        self._scored, self._is_changed = -1, True

    @property
    def reference_digest(self) -> str | None:
        """Of the profile that is judged by, as it was given."""
        return self._digest if self.source is not None else None

    @property
    def reference(self) -> tuple[Sequence[Column], Profile] | None:
        """The profile that is judged by, and where its channels are. For any thread."""
        monitor, columns = self.monitor, self._columns
        return None if monitor is None else (columns, monitor.profile)

    @property
    def n_observed(self) -> int:
        """Rows that the host's workers have counted for this version."""
        if self.monitor is None or not self._shared.is_host_wide:
            return self.meters.observed.value
        return self._n_before + int(self._shared.total(self._name, self._cells)[0])

    @property
    def counted(self) -> Counts | None:
        """(n_cells,) rows of the host so far in the bins that it is judged by; None without."""
        if self.monitor is None:
            return None
        total = self._shared.total(self._name, self._cells, is_looking=False)
        rows: Counts = total[1:].reshape(self.monitor.n_layers, -1).sum(axis=0)
        return rows

    @property
    def channels(self) -> Iterable[str]:
        """Names of the columns that are judged."""
        return () if self.monitor is None else self.monitor.profile.channels

    def fit(self, profile: Profile) -> list[Column]:
        """The columns that another version's profile could be counted by."""
        return fit(profile, self._all, self._signature)[0]

    @property
    def n_dropped(self) -> int:
        """Rows of this version that full taps of the host's workers have dropped."""
        name = series_name(TAP_DROPPED, (self.model, str(self.version)))
        return self._shared.counted(name, self.meters.dropped)

    def coverage(self, now: float) -> dict[str, Any]:
        """How much of what is served the monitor really judges, and what is lost of it."""
        observed, dropped = self.n_observed, self.n_dropped
        monitor, waiting = self.monitor, 0
        if monitor is not None:
            total = self._shared.total(self._name, self._cells)
            waiting = max(int(total[0] - self._cursor[0]), 0)
        judged = monitor.at if monitor is not None else None
        return {
            "sample": self.config.sample,
            "share": observed / (observed + dropped) if observed + dropped else None,
            "judged": judged,
            "rows_waiting": waiting,
            "gaps": [
                *_if(monitor is None, "there is no reference that fits: nothing is judged"),
                *_if(
                    bool(self.problems or self._unwatched),
                    "not all of the model is watched, see problems",
                ),
                *_if(
                    self.config.sample < 100,
                    f"only {self.config.sample:g} % of requests are looked at",
                ),
                *_if(
                    dropped > 0,
                    f"{dropped} rows were dropped by full taps, {observed} were counted",
                ),
                *_if(
                    waiting > 0 and now - (judged or self._begun_at) > _STALE_S,
                    f"{waiting} rows have not been judged for more than {_STALE_S:.0f} s: no worker"
                    " judges, or its conclusions cannot be written",
                ),
                *_if(
                    self.meters.errors.value > 0,
                    f"{self.meters.errors.value} times this worker failed to count, judge or keep",
                ),
            ],
        }

    @property
    def can_adopt(self) -> bool:
        """Whether any tensor of the model can be watched."""
        return bool(self._all)

    def adopt(self, rows: int) -> None:
        """Let the next `rows` served rows become the reference.

        Raises
        ------
        BadRequestError : no tensor of the model can be watched.
        """
        if not self.can_adopt:
            raise BadRequestError(f"model {self.model!r}: {'; '.join(self._unwatched)}")
        self.adoption = _Adoption(rows)
        self.monitor = None
        self._columns = self._all

    def accept(self, window: WindowName) -> Profile:
        """Make the rows of a window the reference: what they show is the new normal.

        Raises
        ------
        BadRequestError : there is no reference yet, or the window holds too few rows.
        """
        self.catch_up()
        if self.monitor is None:
            raise BadRequestError(f"model {self.model!r}: there is no reference to replace")
        lineage = {
            **self.monitor.profile.lineage,
            "model": self.model,
            "version": self.version,
            "origin": f"accepted: served rows of window {window}",
            "adopted": time.time(),
            "before": self.monitor.profile.digest,
        }
        found = self.monitor.windows.window(window)
        if found.n_rows < BLOCK_ROWS:
            raise BadRequestError(
                f"model {self.model!r}: window {window} holds {found.n_rows} rows,"
                f" a reference needs {BLOCK_ROWS}"
            )
        profile = self.monitor.rebased(window, lineage)
        self._keep(profile)
        self.judge_by(profile, "accepted")
        return profile

    @property
    def has_alarms(self) -> bool:
        """Whether any is open."""
        return self.monitor is not None and bool(self.monitor.alarms)

    def acknowledge(self, channel: str, *, before: float) -> None:
        """Somebody has seen the episode that began with this channel, at that time."""
        if self.monitor is None:
            return
        first = {alarm.id: alarm for alarm in self.monitor.episodes}
        for alarm in self.monitor.alarms:
            origin = first.get(alarm.episode, alarm)
            is_meant = origin.channel == channel and (alarm.at is None or alarm.at <= before)
            if is_meant and alarm.acknowledged_row is None:
                self.monitor.acknowledge(alarm.id, before)
                self._is_changed = True
                self._tell("acknowledged", alarm)

    def count(self, observations: list[Observation]) -> None:
        """Count a slice of observations of this version."""
        if self.monitor is None and self.adoption is None:
            return
        block = self.block(observations)
        if self.adoption is not None:
            block = self._collect(block)
        if self.monitor is None or not block:
            return
        n_rows, counts = self.monitor.count(block)
        # Rows last: who reads meanwhile finds cells of rows that it will hear of.
        self._cells[1:] += counts.ravel()
        self._cells[0] += n_rows
        self.meters.observed.add(n_rows)

    def tick(self, now: float, *, is_looking: bool = True) -> None:
        """Judge what has gathered, if it is enough or has waited long enough; keep conclusions."""
        if self.monitor is None:
            return
        if not self._shared.is_judge:
            self._was_judge = False
            return
        if not self._was_judge:
            # The lease is new: whoever held it before has gone further than this worker knows.
            self._was_judge = True
            if self._shared.is_holder:
                self._restore()
        total = self._shared.total(self._name, self._cells, is_looking=is_looking)
        if (total < self._cursor).any():  # The host's counters began anew.
            self._cursor = np.zeros_like(total)
        n_rows = int(total[0] - self._cursor[0])
        if n_rows and (n_rows >= BLOCK_ROWS or now - self._folded_at >= BLOCK_S):
            self._fold(total, n_rows, now)
        if self._is_changed and self._kept.is_due:
            self.save()

    def catch_up(self) -> None:
        """Judge everything that was counted, for a report that misses nothing; or read it."""
        if self.monitor is None:
            return
        if not self._shared.is_judge:
            self._restore()
            return
        self._folded_at = 0.0
        self.tick(time.time())

    def _fold(self, total: Cells, n_rows: int, now: float) -> None:
        monitor = self.monitor
        assert monitor is not None  # noqa: S101  asked by tick
        layers = (total - self._cursor)[1:].reshape(monitor.n_layers, -1)
        self._cursor = total
        self._folded_at = now
        self._is_changed = True
        was_open = {alarm.id: alarm for alarm in monitor.alarms}
        for alarm in monitor.fold(layers, n_rows, now):
            self._opened(alarm)
        for number, alarm in was_open.items():
            if not alarm.is_open:
                self._closed(number, alarm)

    def _opened(self, alarm: Alarm) -> None:
        if alarm.id == alarm.episode:
            (self.meters.pages if alarm.level == "page" else self.meters.warnings).add()
        event(
            "drift_alarm_opened",
            logging.WARNING,
            alarm=self.id_of(alarm),
            severity=alarm.level,
            model=self.model,
            version=self.version,
            feature=alarm.feature,
            channel=alarm.channel,
            segment=alarm.segment,
            evidence=float(f"{min(alarm.evidence, 1e200):.3g}"),
            since=alarm.since,
            moved=[label for label, _, _ in alarm.moved],
        )
        self._tell("opened", alarm)

    def _closed(self, number: int, alarm: Alarm) -> None:
        event(
            "drift_alarm_closed",
            alarm=f"{self.model}-{self.version}-{number}",
            model=self.model,
            version=self.version,
            channel=alarm.channel,
            why=alarm.why_closed,
        )
        self._tell("closed", alarm)

    def _tell(self, what: str, alarm: Alarm) -> None:
        known = self.monitor.episodes if self.monitor is not None else ()
        same = [other for other in known if other.episode == alarm.episode]
        first = next((other.channel for other in same if other.id == alarm.episode), alarm.channel)
        is_last = not any(other.is_open for other in same)
        self.told.append(
            AlarmEvent(what, self.model, self.version, self.id_of(alarm), alarm, first, is_last)
        )

    def id_of(self, alarm: Alarm) -> str:
        """Name of an alarm on this host."""
        return f"{self.model}-{self.version}-{alarm.id}"

    # -- conclusions in a file

    def save(self) -> None:
        """Write evidence and how far the counts were read, both at once."""
        if self.monitor is None or not self._shared.is_holder:
            return
        try:
            self._kept.save(self._cursor, self.monitor.to_bytes())
        except (OSError, RegistryError):
            self.meters.errors.add()
        else:
            self._is_changed = False

    def _restore(self) -> None:
        """Take up what was concluded last, if it is of this profile and can be read."""
        monitor = self.monitor
        if monitor is None:
            return
        try:
            found = self._kept.read(self._cursor.size)
            if found is None:
                return
            cursor, concluded, written = found
            fresh = self._new_monitor(monitor.profile)
            fresh.restore(concluded)
        except (OSError, ValueError, MonitorError) as error:
            event(
                "monitor_state_skipped",
                logging.WARNING,
                model=self.model,
                version=self.version,
                reason=str(error),
            )
            return
        self.monitor = fresh
        self._scored = -1
        # Counts of this process alone begin at zero with it; those of a host go on.
        goes_on = self._shared.is_host_wide and written >= self._fresh_at
        self._cursor = cursor if goes_on else np.zeros_like(self._cells)

    # -- what is asked

    def report(self, window: WindowName) -> dict[str, Any]:
        """What `GET /drift/{model}` answers, in plain JSON types."""
        self.catch_up()
        monitor = self.monitor
        about: dict[str, Any] = {
            "model": self.model,
            "version": self.version,
            "reference": None,
            "problems": self.problems or self._unwatched,
            "rows_observed": self.n_observed,
            "rows_dropped": self.n_dropped,
            "coverage": self.coverage(time.time()),
            "window_rows": self.config.window_rows,
        }
        if monitor is not None:
            layout = monitor.profile.layout
            about["reference"] = {
                "source": self.source,
                "digest": self._digest,
                "rows": monitor.profile.n_rows,
                "hours": layout.n_slots,
            }
            about["budget"] = {
                "alarms": monitor.budget.alarms,
                "warnings": monitor.budget.warnings,
                "days": monitor.budget.days,
                "rows": monitor.budget.rows,
                "share": monitor.budget.share,
                "tolerance": monitor.tolerance,
            }
            report = monitor.report(window).to_dict()
            for alarm, told in zip(monitor.alarms, report["alarms"], strict=True):  # type: ignore[call-overload]  # a list
                told["id"] = self.id_of(alarm)
                told["episode"] = f"{self.model}-{self.version}-{alarm.episode}"
            about["report"] = report
            return about
        about["report"] = None
        if self.adoption is not None:
            about["adopting"] = {"rows": self.adoption.rows, "of": self.adoption.rows_wanted}
            about["message"] = (
                f"no reference yet: {self.adoption.rows} of {self.adoption.rows_wanted} served"
                " rows collected to become it"
            )
        elif self.source is not None:
            about["message"] = "no column of the reference fits the model; see problems"
        elif self.problems:
            about["message"] = "the reference cannot be used; see problems"
        elif not self.can_adopt:
            about["message"] = "no tensor of this model can be watched; see problems"
        else:
            about["message"] = (
                "no reference: put a reference.json beside the model (driftgate profile DATA), or"
                f" adopt the next served rows: driftgate drift adopt {self.model} --rows 1000"
            )
        return about

    def bins(self) -> Iterable[tuple[str, str, int, float]]:
        """Channel, bin, rows so far, share in the reference, for every bin."""
        self.catch_up()
        if self.monitor is None:
            return
        counted = self.monitor.counts
        for name, channel in self.monitor.profile.channels.items():
            shares = share(channel.counts)
            for bin_ in zip(channel.bins, counted[name].tolist(), shares.tolist(), strict=True):
                yield name, *bin_

    def scores(self) -> Scores:
        """Every score of the newest rows, computed when somebody asks and there are enough."""
        self.catch_up()
        monitor = self.monitor
        if monitor is None:
            return ()
        if self._scored != monitor.n_rows:
            self._scored = monitor.n_rows
            report = monitor.report("last")
            self._scores = () if report.is_partial else tuple(
                (channel.name, statistic, score.value, score.line)
                for channel in report.channels
                for statistic, score in channel.scores.items()
            )  # fmt: skip
        return self._scores

    def evidence(self) -> Mapping[str, float]:
        """E-value of every channel, witnesses included."""
        return self.monitor.evidence if self.monitor is not None else {}

    # -- rows

    def block(
        self, observations: list[Observation], columns: Iterable[Column] | None = None
    ) -> dict[str, Array]:
        """(n_rows,) values of every channel that is judged, or of these columns."""
        n = sum(observation.rows for observation in observations)
        tensors: dict[tuple[bool, int], Array] = {}
        block: dict[str, Array] = {}
        for column in self._columns if columns is None else columns:
            at = (column.is_output, column.tensor)
            if at not in tensors:
                tensors[at] = _rows_of(observations, *at)
            matrix = tensors[at]
            if column.made:
                if matrix.shape[1] == n:
                    block[column.channel] = answer(column, matrix.T)
            elif matrix.shape[1] == n and column.position < matrix.shape[0]:
                block[column.channel] = matrix[column.position]
        return block

    def _collect(self, block: dict[str, Array]) -> dict[str, Array]:
        """Keep rows for the adoption; the rows that are left over when it is complete."""
        adoption = self.adoption
        assert adoption is not None  # noqa: S101  asked by count
        adoption.blocks.append(block)
        adoption.rows += len(next(iter(block.values()), ()))
        surplus = adoption.rows - adoption.rows_wanted
        if surplus < 0:
            return {}
        columns = {
            channel: np.concatenate([part[channel] for part in adoption.blocks])
            for channel in adoption.blocks[0]
            if all(channel in part for part in adoption.blocks)
        }
        whole = {channel: values[: adoption.rows_wanted] for channel, values in columns.items()}
        profile = Profile.fit(
            with_answers(whole, self._signature),
            lineage={
                "model": self.model,
                "version": self.version,
                "origin": "adopted from served rows",
                "adopted": time.time(),
            },
            is_ordered=True,
        )
        self.judge_by(profile, "adopted")
        self.has_adopted = True
        is_kept = self._keep(profile)
        event(
            "reference_adopted",
            model=self.model,
            version=self.version,
            rows=profile.n_rows,
            is_kept=is_kept,
        )
        rest = {channel: values[len(values) - surplus :] for channel, values in block.items()}
        return with_answers(rest, self._signature, list(profile.channels))

    def _keep(self, profile: Profile) -> bool:
        return self._references is not None and _keep(profile, self._references)


def _if(is_so: bool, sentence: str) -> list[str]:
    return [sentence] if is_so else []


def _rows_of(observations: list[Observation], is_output: bool, k: int) -> Array:
    """(n_columns, n_rows) values of tensor k of all observations, rows side by side."""
    arrays = [
        (observation.outputs if is_output else observation.inputs)[k]
        for observation in observations
    ]
    array = np.concatenate([part if part.ndim else part.reshape(1) for part in arrays])
    if array.dtype == BFLOAT16:
        array = widened(array)
    if array.ndim == 1:
        return array.reshape(1, -1)
    # Not -1: numpy cannot tell the width of a batch without rows.
    return np.ascontiguousarray(array.reshape(array.shape[0], math.prod(array.shape[1:])).T)


def _keep(profile: Profile, directory: Path) -> bool:
    """Write an adopted profile beside the others; False when the disk says no."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staged = directory / f".{profile.digest}.{os.getpid()}"
        staged.write_text(profile.to_json(), encoding="utf-8")
        staged.replace(directory / f"{profile.digest}.json")
    except OSError:
        return False
    return True


def adopted(directory: Path) -> dict[tuple[str, int], Profile]:
    """The newest adopted profile of every version that has one."""
    newest: dict[tuple[str, int], Profile] = {}
    try:
        files = sorted(directory.glob("[0-9a-f]*.json"))
    except OSError:
        return {}
    for file in files:
        try:
            profile = Profile.from_json(file.read_bytes())
            lineage = profile.lineage
            key = (str(lineage["model"]), int(str(lineage["version"])))
            moment = float(str(lineage["adopted"]))
        except (OSError, MonitorError, KeyError, ValueError) as error:
            event("reference_skipped", logging.WARNING, file=file.name, reason=str(error))
            continue
        before = newest.get(key)
        if before is None or float(str(before.lineage["adopted"])) <= moment:
            newest[key] = profile
    return newest
