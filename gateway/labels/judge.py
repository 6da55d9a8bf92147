"""Judges labels as they arrive: loss and calibration of each version, against its reference.

One worker of a host does it, on a thread of its own. What it concludes lies in the database beside
the labels, written in the transaction that marks them as judged: each label counts once, whoever
dies. The other workers only read. A reference is the version's own, made of labelled data when it
was published, else a cohort of labelled predictions that was accepted.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gateway.alarms import AlarmLog
from gateway.errors import BadRequestError, ConflictError, NotFoundError
from gateway.labels.judged import Judged
from gateway.labels.labelled import MONITOR, Labelled, View
from gateway.labels.rows import Evidence, Joined, StoreError
from gateway.labels.store import Store
from gateway.telemetry import event
from monitors import Alarm, MonitorError
from monitors.budget import Purpose
from monitors.loss import LossReference

_PAUSE_S = 2.0
_BUSY = 20
"""A pass that took long is followed by a pause of so many times that."""
_SETTLE_S = 1.0
"""Predictions are written within it, also the second one of an id that a shadow answers, too."""
_LABELS_MAX = 5_000
_COHORT_ROWS_MAX = 200_000
_UNTOLD_S = 60.0
"""After so long an alarm that nobody has told is told by whoever sees it."""
_DAY_S = 86_400.0


class Judge:
    """The thread.

    Parameters
    ----------
    is_judge : whether this worker judges; the others read what it has concluded
    spends, spends_not : tells the model's budget who raises alarms about labels; see `Observer`
    """

    def __init__(
        self,
        store: Store,
        log: AlarmLog,
        *,
        is_judge: Callable[[], bool],
        spends: Callable[[str, str, Purpose, Callable[[float], None]], None],
        spends_not: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._judged = Judged(store)
        self._log = log
        self._is_judge = is_judge
        self._spends, self._spends_not = spends, spends_not
        self._spending: set[tuple[str, int]] = set()
        self._clock = clock
        self._versions: dict[tuple[str, int], Labelled] = {}
        self.views: Mapping[tuple[str, int], View] = {}
        """Replaced as a whole."""
        self._turn = threading.Lock()
        self._is_ending = False
        self._called = threading.Event()
        self._thread = threading.Thread(target=self._work, name="labels-judge", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End it; what is not judged yet is judged after the next start."""
        self._is_ending = True
        self._called.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def add(self, labelled: Labelled) -> None:
        """Judge one more version, or one in another way; its evidence goes on."""
        with self._turn:
            self._spending.discard(labelled.key)
            self._versions = {**self._versions, labelled.key: labelled}

    @property
    def _all(self) -> tuple[Labelled, ...]:
        return tuple(self._versions.values())

    def find(self, model: str, version: int) -> Labelled | None:
        """A version whose labels are judged."""
        return self._versions.get((model, version))

    async def accept(self, model: str, version: int, days: float, by: str = "") -> dict[str, Any]:
        """Let the labelled predictions of the last days be the reference from now on.

        Raises
        ------
        NotFoundError : no labels of this version are judged here.
        BadRequestError : too few predictions have labels.
        ConflictError : somebody else was faster.
        StoreError : the database cannot be read or written.
        """
        return await asyncio.to_thread(self._accept, model, version, days, by)

    # -- the thread

    def _work(self) -> None:
        problem = ""
        while not self._is_ending:
            start = time.monotonic()
            try:
                self.tick()
                problem = ""
            except StoreError as error:
                if not problem:
                    event("labels_not_judged", logging.WARNING, reason=str(error))
                problem = str(error)
            except Exception:  # noqa: BLE001  one bad label must not end the thread
                event("labels_judge_failed", logging.ERROR, exc=True)
            self._called.wait(max(_PAUSE_S, _BUSY * (time.monotonic() - start)))

    def tick(self) -> None:
        """One pass: judge what is there if it is our turn, and read what others concluded."""
        with self._turn:
            if not self._versions:
                return
            self._read()
            if self._is_judge():
                self._share()
                self._see_acknowledged()
                for model in self._judged.unjudged_models():
                    self._judge(model)
                self._see_untold()
            self.views = {one.key: one.view() for one in self._versions.values()}

    def _read(self) -> None:
        """Take up what somebody else has written, and what is new here."""
        found = self._judged.sequences()
        stale = [
            one for one in self._versions.values()
            if one.read is None or one.read.sequence != found.get(one.key, 0)
        ]  # fmt: skip
        written = self._judged.all() if stale and found else {}
        for one in stale:
            one.take_up(written.get(one.key, Evidence(*one.key)))

    def _share(self) -> None:
        """Have a part of the model's budget for each version whose labels can be judged."""
        for one in self._all:
            name = f"labels of version {one.version}"
            if one.monitor is None and one.key in self._spending:
                self._spending.discard(one.key)
                self._spends_not(one.model, name)
            elif one.monitor is not None and one.key not in self._spending:
                self._spending.add(one.key)
                self._spends(one.model, name, "labels", one.spend)

    def _judge(self, model: str) -> None:
        """What labels of a model say that nobody has judged yet, a portion at a time."""
        versions = {one.version: one for one in self._versions.values() if one.model == model}
        for one in versions.values():
            if one.waits:
                self._adopt(one)
        self._share()
        watched = [one for one in versions.values() if one.monitor is not None]
        if not watched:
            return
        mature_s = max(one.settings.mature_s for one in watched)
        while not self._is_ending:
            now = self._clock()
            rows = self._judged.unjudged(
                model, until=now - mature_s, arrived=now - _SETTLE_S, rows_max=_LABELS_MAX
            )
            if not rows or not self._fold(model, versions, rows, now):
                return

    def _fold(
        self, model: str, versions: Mapping[int, Labelled], rows: list[Joined], now: float
    ) -> bool:
        """Judge rows and write down that they were; False: somebody else was faster."""
        by_version: dict[int, list[Joined]] = {}
        for row in rows:
            if row.traffic != "replay":
                by_version.setdefault(row.version, []).append(row)
        touched: list[tuple[Labelled, int, list[Alarm]]] = []
        for version, own in by_version.items():
            one = versions.get(version)
            if one is not None and one.monitor is not None:
                touched.append((one, *one.fold(own)))
        labels = list(dict.fromkeys((row.request, row.row, model) for row in rows))
        return self._write(touched, labels, now)

    def _write(
        self,
        touched: Sequence[tuple[Labelled, int, list[Alarm]]],
        labels: Sequence[tuple[str, int, str]],
        now: float,
    ) -> bool:
        """Write what was concluded; what was not written is read again and begun anew."""
        written = [
            one.read._replace(state=one.monitor.to_bytes(), changed=now)
            for one, _, _ in touched
            if one.read is not None and one.monitor is not None
        ]
        is_written = False
        try:
            is_written = self._judged.write(written, labels, now=now)
        finally:
            for (one, n_rows, raised), evidence in zip(touched, written, strict=True):
                one.read = evidence._replace(sequence=evidence.sequence + 1) if is_written else None
                if is_written:
                    one.meters.judged.add(n_rows)
                    self._told(one, raised)
        if not is_written:
            self._read()
        return is_written

    def _see_acknowledged(self) -> None:
        """Let alarms be quiet whose episode somebody has acknowledged, at whatever worker."""
        if not any(one.monitor is not None and one.monitor.alarms for one in self._all):
            return
        newest: dict[tuple[str, int, str], str] = {}
        for episode in self._log.episodes():
            newest.setdefault((*episode.key, episode.monitor), episode.state)
        for one in self._all:
            monitor, is_seen = one.monitor, False
            first = {alarm.id: alarm for alarm in (monitor.episodes if monitor else ())}
            for alarm in monitor.alarms if monitor else ():
                origin = first.get(alarm.episode, alarm)
                state = newest.get((*one.key, f"{MONITOR}{origin.channel}"))
                if state == "acknowledged" and alarm.acknowledged_row is None:
                    assert monitor is not None  # noqa: S101  it has alarms
                    monitor.acknowledge(alarm.id)
                    is_seen = True
            if is_seen:
                self._write([(one, 0, [])], [], self._clock())

    # -- telling

    def _told(self, one: Labelled, alarms: Sequence[Alarm]) -> None:
        """Put into the log of alarms what was raised, and write down that it is there."""
        if one.read is None or not alarms:
            return
        for alarm in alarms:
            self._opened(one, alarm)
        told = one.read._replace(told=max(alarm.id for alarm in alarms))
        is_written = self._judged.write([told], now=told.changed)
        one.read = told._replace(sequence=told.sequence + 1) if is_written else None

    def _see_untold(self) -> None:
        """What was raised by a process that died before it could tell; what is over by now."""
        now = self._clock()
        watched = [one for one in self._all if one.monitor is not None and one.monitor.episodes]
        for one in watched:
            if one.read is not None and now - one.read.changed > _UNTOLD_S:
                assert one.monitor is not None  # noqa: S101  chosen by it
                told = one.read.told
                self._told(one, [alarm for alarm in one.monitor.episodes if alarm.id > told])
        lasting = {(*e.key, e.monitor) for e in self._log.episodes() if e.state == "open"} if (
            watched
        ) else set()  # fmt: skip
        for one in watched:
            assert one.monitor is not None  # noqa: S101  chosen by it
            alarms = one.monitor.episodes
            on = {alarm.episode for alarm in alarms if alarm.is_open}
            for first in alarms:
                name = f"{MONITOR}{first.channel}"
                is_over = first.id == first.episode and first.id not in on
                is_other = any(a.id in on and a.channel == first.channel for a in alarms)
                if is_over and not is_other and (*one.key, name) in lasting:
                    self._log.passed(one.model, one.version, name)
                    lasting.discard((*one.key, name))

    def _opened(self, one: Labelled, alarm: Alarm) -> None:
        crossing = one.crossing(alarm)
        if alarm.id == alarm.episode:
            (one.meters.pages if alarm.level == "page" else one.meters.warnings).add()
        event(
            "label_alarm_opened",
            logging.WARNING,
            severity=alarm.level,
            model=one.model,
            version=one.version,
            channel=alarm.channel,
            reason=crossing.reason,
            evidence=float(f"{min(alarm.evidence, 1e200):.3g}"),
            since=alarm.since,
        )
        if alarm.level == "page" and alarm.id == alarm.episode:
            self._log.crossed(crossing)

    # -- references

    def _adopt(self, one: Labelled) -> None:
        """Make the first labelled predictions the reference, once there are enough."""
        until = self._clock() - one.settings.mature_s
        rows = self._store.joined(one.model, one.version, until=until, rows_max=_COHORT_ROWS_MAX)
        chosen = rows[: one.settings.adopt_rows]
        if len(chosen) < one.settings.adopt_rows:
            return
        try:
            self._put(one, chosen, "adopted: the first labelled predictions")
        except MonitorError as error:
            event("label_reference_not_adopted", logging.WARNING, model=one.model,
                  version=one.version, reason=str(error))  # fmt: skip

    def _put(self, one: Labelled, rows: Sequence[Joined], origin: str) -> LossReference | None:
        """Judge by these rows from now on; None: somebody else was faster."""
        now = self._clock()
        before = one.monitor.reference.digest if one.monitor is not None else None
        lineage = {
            "model": one.model,
            "version": one.version,
            "origin": origin,
            "adopted": now,
            "before": before,
        }
        reference = one.reference_of(rows, lineage)
        read = one.read or Evidence(*one.key)
        is_written = self._judged.write(
            [read._replace(reference=reference.to_json(), state=None, told=0)],
            before=(one.model, one.version, rows[-1].time + 1e-6),
            now=now,
        )
        one.read = None
        self._read()
        if not is_written:
            return None
        event("label_reference_accepted", model=one.model, version=one.version,
              rows=reference.n_rows, origin=origin)  # fmt: skip
        return reference

    def _accept(self, model: str, version: int, days: float, by: str) -> dict[str, Any]:
        with self._turn:
            one = self._versions.get((model, version))
            if one is None:
                raise NotFoundError(f"labels of model {model!r} version {version} are not judged")
            self._read()
            now = self._clock()
            rows = self._store.joined(
                model,
                version,
                since=now - days * _DAY_S,
                until=now - one.settings.mature_s,
                rows_max=_COHORT_ROWS_MAX,
            )
            try:
                reference = self._put(one, rows, f"accepted: labelled predictions of {days:g} days")
            except MonitorError as error:
                raise BadRequestError(f"model {model!r} version {version}: {error}") from None
            if reference is None:
                raise ConflictError("labels were judged meanwhile; try again")
            self._log.accept(
                model, version, by, f"labels of {days:g} days became the reference", prefix=MONITOR
            )
            self.views = {**self.views, one.key: one.view()}
        return {
            "model": model,
            "version": version,
            "reference": {"source": "accepted", "digest": reference.digest,
                          "rows": reference.n_rows, "task": reference.task},
        }  # fmt: skip
