"""Tap to counts: one thread that watches what every version was asked and answered.

The monitors belong to this thread alone. Others ask it (`ask`), and are answered between two slices
of observations, after everything that was offered before they asked.
"""

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from gateway.alarms import AlarmLog, Crossing
from gateway.columns import columns_of, fit
from gateway.config import ADOPT_ROWS_MAX, ADOPT_ROWS_MIN
from gateway.counters import Counter
from gateway.errors import BadRequestError, NotFoundError
from gateway.tap import Observation, Tap
from gateway.telemetry import (
    ALARMS_OPEN,
    BIN_ROWS,
    DRIFT_LINE,
    DRIFT_SCORE,
    REFERENCE_SHARE,
    Family,
    Sample,
    event,
)
from gateway.tensors import BFLOAT16, Array, widened
from monitors import Monitor, MonitorError, Profile
from monitors.counts import share
from monitors.window import Alarm
from registry.signature import Signature

T = TypeVar("T")

_SLICE = 2048
"""Rows in one slice: short enough that the event loop is never held up for long."""
_PAUSE_S = 0.1
"""Slices are taken up at most so often: larger ones cost less a row."""
Scores = tuple[tuple[str, str, float, float], ...]
"""Channel, statistic, value, and the line that no drift would stay below."""
WindowName = Literal["last", "current", "total"]
WINDOWS: tuple[WindowName, ...] = get_args(WindowName)


@dataclass(slots=True)
class WatchMeters:
    """What is counted about one watched version."""

    observed: Counter
    dropped: Counter
    errors: Counter
    alarms: Counter


@dataclass(slots=True)
class _Adoption:
    """Served rows on their way to become a reference profile."""

    rows_wanted: int
    rows: int = 0
    blocks: list[dict[str, Array]] = field(default_factory=list)


class Watch:
    """One version's monitor, or what is missing for one. Used by the observer's thread only."""

    def __init__(
        self,
        model: str,
        version: int,
        signature: Signature,
        *,
        window_rows: int,
        meters: WatchMeters,
        references: Path | None,
    ) -> None:
        self.model = model
        self.version = version
        self.meters = meters
        self.monitor: Monitor | None = None
        self.source: str | None = None
        self.adoption: _Adoption | None = None
        self.problems: list[str] = []
        self.alarms: AlarmLog | None = None
        """Where alarms become episodes, and somebody is told."""
        self._alarmed: set[str] = set()
        self._scores: Scores = ()
        self._scored = 0
        self._signature = signature
        self._window_rows = window_rows
        self._references = references
        self._all, self._unwatched = columns_of(signature)
        self._columns = self._all

    def judge_by(self, profile: Profile, source: str) -> None:
        """Compare with this profile from now on, as far as it fits the model."""
        fitting, self.problems = fit(profile, self._all, self._signature)
        self.problems += self._unwatched
        self.adoption = None
        self.source = source
        self._columns = fitting
        self._scores, self._scored = (), 0
        self.monitor = (
            Monitor(
                profile.select([column.channel for column in fitting]),
                window_rows=self._window_rows,
            )
            if fitting
            else None
        )

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

    def count(self, observations: list[Observation]) -> None:
        """Count a slice of observations of this version."""
        if self.monitor is None and self.adoption is None:
            return
        block = self._block(observations)
        if self.adoption is not None:
            block = self._collect(block)
        if self.monitor is None or not block:
            return
        closed = self.monitor.update(block, at=time.time())
        self.meters.observed.add(len(next(iter(block.values()))))
        if closed:
            self._judge({window.index for window in closed})

    def report(self, window: WindowName) -> dict[str, Any]:
        """What `GET /drift/{model}` answers, in plain JSON types."""
        monitor = self.monitor
        about: dict[str, Any] = {
            "model": self.model,
            "version": self.version,
            "reference": None,
            "problems": self.problems or self._unwatched,
            "rows_observed": self.meters.observed.value,
            "rows_dropped": self.meters.dropped.value,
            "window_rows": self._window_rows,
        }
        if monitor is not None:
            about["reference"] = {
                "source": self.source,
                "digest": monitor.profile.digest,
                "rows": monitor.profile.n_rows,
            }
            about["report"] = monitor.report(window).to_dict()
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
        if self.monitor is None:
            return
        counted = self.monitor.counts
        for name, channel in self.monitor.profile.channels.items():
            shares = share(channel.counts)
            for bin_ in zip(channel.bins, counted[name].tolist(), shares.tolist(), strict=True):
                yield name, *bin_

    def _block(self, observations: list[Observation]) -> dict[str, Array]:
        """(n_rows,) values of every channel."""
        n = sum(observation.rows for observation in observations)
        tensors: dict[tuple[bool, int], Array] = {}
        block: dict[str, Array] = {}
        for column in self._columns:
            at = (column.is_output, column.tensor)
            if at not in tensors:
                tensors[at] = _rows_of(observations, *at)
            matrix = tensors[at]
            if matrix.shape[1] == n and column.position < matrix.shape[0]:
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
        profile = Profile.fit(
            {channel: values[: adoption.rows_wanted] for channel, values in columns.items()},
            lineage={
                "model": self.model,
                "version": self.version,
                "origin": "adopted from served rows",
                "adopted": time.time(),
            },
        )
        self.judge_by(profile, "adopted")
        self._alarmed = set()
        if self.alarms is not None:
            self.alarms.accept(self.model, self.version, note="a reference was adopted")
        is_kept = self._references is not None and _keep(profile, self._references)
        event(
            "reference_adopted",
            model=self.model,
            version=self.version,
            rows=profile.n_rows,
            is_kept=is_kept,
        )
        return {channel: values[len(values) - surplus :] for channel, values in block.items()}

    def scores(self) -> Scores:
        """Every score of the newest closed window, computed when somebody asks."""
        monitor = self.monitor
        if monitor is None:
            return ()
        report = monitor.report("last")
        if report.is_partial:
            return ()
        if self._scored != report.index:
            self._scored = report.index
            self._scores = tuple(
                (channel.name, statistic, score.value, score.line)
                for channel in report.channels
                for statistic, score in channel.scores.items()
            )
        return self._scores

    def _judge(self, closed: set[int]) -> None:
        """Say which alarms the windows opened that have just closed."""
        monitor = self.monitor
        assert monitor is not None  # noqa: S101  only a monitor closes windows
        open_ = {alarm.channel for alarm in monitor.alarms}
        for channel in self._alarmed - open_:
            if self.alarms is not None:
                self.alarms.passed(self.model, self.version, f"drift:{channel}")
        self._alarmed = open_
        for alarm in monitor.alarms:
            if alarm.window not in closed:
                continue
            if self.alarms is not None:
                self.alarms.crossed(_crossing(self.model, self.version, alarm))
            self.meters.alarms.add()
            event(
                "drift_alarm_opened",
                logging.WARNING,
                model=self.model,
                version=self.version,
                feature=alarm.channel,
                statistic=alarm.statistic,
                score=round(alarm.value, 4),
                line=round(alarm.line, 4),
                since_window=alarm.since,
                window=alarm.window,
            )


def _crossing(model: str, version: int, alarm: Alarm) -> Crossing:
    """An alarm of a monitor in the words of the event log."""
    numbers = {"score": round(alarm.value, 4), "line": round(alarm.line, 4)}
    return Crossing(
        model,
        version,
        f"drift:{alarm.channel}",
        f"{alarm.channel}: {alarm.statistic} {alarm.value:.2f}, without drift below"
        f" {alarm.line:.3f}, in two windows running",
        time.time(),
        {"channel": alarm.channel, "statistic": alarm.statistic, **numbers,
         "since_window": alarm.since, "window": alarm.window},
    )  # fmt: skip


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


class Observer:
    """The thread between the tap and the monitors."""

    def __init__(self, tap: Tap, alarms: AlarmLog | None = None) -> None:
        self._tap = tap
        self._alarms = alarms
        self._watches: dict[tuple[str, int], Watch] = {}
        self._asked: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._lock = threading.Lock()
        self._is_ending = False
        self._thread = threading.Thread(target=self._work, name="observer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Count what still waits, then end the thread."""
        self._is_ending = True
        self._tap.called.set()
        await asyncio.to_thread(self._thread.join, 5)

    def add(self, watch: Watch) -> None:
        """Watch one more version. A new dictionary, so that readers never see a change."""
        watch.alarms = self._alarms
        self._watches = {**self._watches, (watch.model, watch.version): watch}

    async def ask(self, question: Callable[[], T]) -> T:
        """The answer of `question`, called by the observer's thread."""
        answer: Future[T] = Future()
        with self._lock:
            self._asked.append((question, answer))
        self._tap.called.set()
        return await asyncio.wrap_future(answer)

    async def report(self, model: str, version: int, window: WindowName) -> dict[str, Any]:
        """The report of one version."""
        watch = self._watch(model, version)
        return await self.ask(lambda: watch.report(window))

    async def summary(self) -> list[dict[str, Any]]:
        """One line for every watched version."""
        return await self.ask(lambda: [_summary(watch) for watch in self._watches.values()])

    async def adopt(self, model: str, version: int, rows: int) -> dict[str, Any]:
        """Let the next `rows` served rows of a version become its reference."""
        if not ADOPT_ROWS_MIN <= rows <= ADOPT_ROWS_MAX:
            raise BadRequestError(
                f"rows = {rows}: must be from {ADOPT_ROWS_MIN} to {ADOPT_ROWS_MAX}"
            )
        watch = self._watch(model, version)
        await self.ask(lambda: watch.adopt(rows))
        return {"model": model, "version": version, "adopting": {"rows": 0, "of": rows}}

    async def bins(self) -> dict[Family, list[Sample]]:
        """Rows per bin of every channel and their shares in the reference, for the exposition."""
        return await self.ask(self._bins)

    def _bins(self) -> dict[Family, list[Sample]]:
        rows: list[Sample] = []
        shares: list[Sample] = []
        for watch in self._watches.values():
            for channel, label, count, reference in watch.bins():
                labels = (watch.model, str(watch.version), channel, label)
                rows.append((labels, count))
                shares.append((labels, reference))
        return {BIN_ROWS: rows, REFERENCE_SHARE: shares}

    async def samples(self) -> dict[Family, list[Sample]]:
        """Scores, lines and open alarms of every watched version, for the exposition."""
        return await self.ask(self._samples)

    def _samples(self) -> dict[Family, list[Sample]]:
        scores: list[Sample] = []
        lines: list[Sample] = []
        alarms: list[Sample] = []
        for watch in self._watches.values():
            labels = (watch.model, str(watch.version))
            for feature, statistic, value, line in watch.scores():
                scores.append(((*labels, feature, statistic), value))
                lines.append(((*labels, feature, statistic), line))
            if watch.monitor is not None:
                alarms.append((labels, len(watch.monitor.alarms)))
        return {DRIFT_SCORE: scores, DRIFT_LINE: lines, ALARMS_OPEN: alarms}

    def _watch(self, model: str, version: int) -> Watch:
        try:
            return self._watches[model, version]
        except KeyError:
            raise NotFoundError(f"model {model!r} version {version} is not monitored") from None

    # -- the thread

    def _work(self) -> None:
        while not self._is_ending:
            self._tap.rest(1.0)
            start = time.monotonic()
            self._drain()
            self._answer()
            # Let rows gather, unless somebody waits for an answer.
            pause_s = _PAUSE_S - (time.monotonic() - start)
            if pause_s > 0 and not self._asked and not self._is_ending:
                time.sleep(pause_s)
        self._drain()
        self._answer()

    def _drain(self) -> None:
        while observations := self._tap.take(_SLICE):
            by_version: dict[tuple[str, int], list[Observation]] = {}
            for observation in observations:
                by_version.setdefault((observation.model, observation.version), []).append(
                    observation
                )
            for key, block in by_version.items():
                watch = self._watches.get(key)
                if watch is None:
                    continue
                try:
                    watch.count(block)
                except Exception:  # noqa: BLE001  one bad block must not end all monitoring
                    watch.meters.errors.add()
                    event(
                        "observer_failed",
                        logging.ERROR,
                        model=watch.model,
                        version=watch.version,
                        exc=True,
                    )
            time.sleep(0)  # the event loop first

    def _answer(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, []
        if asked:
            self._drain()
        for question, answer in asked:
            try:
                answer.set_result(question())
            except Exception as error:  # noqa: BLE001  whoever asked is told
                answer.set_exception(error)


def _summary(watch: Watch) -> dict[str, Any]:
    monitor = watch.monitor
    psi = {feature: value for feature, statistic, value, _ in watch.scores() if statistic == "psi"}
    highest = max(psi, key=lambda feature: psi[feature], default=None)
    return {
        "model": watch.model,
        "version": watch.version,
        "reference": watch.source if monitor is not None else None,
        "rows_observed": watch.meters.observed.value,
        "rows_dropped": watch.meters.dropped.value,
        "alarms": [alarm.channel for alarm in monitor.alarms] if monitor is not None else [],
        "highest": {"feature": highest, "psi": round(psi[highest], 4)} if highest else None,
        "problems": len(watch.problems),
    }
