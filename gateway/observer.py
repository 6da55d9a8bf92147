"""Tap to counts: one thread that watches what every version was asked and answered.

The monitors belong to this thread alone. Others ask it (`ask`), and are answered between two slices
of observations, after everything that was offered before they asked. Of several workers of a host
the one that holds the lease judges for all.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gateway.alarms import AlarmLog, Crossing
from gateway.columns import Column
from gateway.conclusions import Shared
from gateway.config import ADOPT_ROWS_MAX, ADOPT_ROWS_MIN, MonitorConfig
from gateway.errors import BadRequestError, NotFoundError
from gateway.pair import Pair
from gateway.refusals import RefusalWatch, RefusalWatches, reason
from gateway.tap import Observation, Tap
from gateway.telemetry import (
    ALARMS_OPEN,
    BIN_ROWS,
    DRIFT_EVIDENCE,
    DRIFT_LINE,
    DRIFT_SCORE,
    REFERENCE_SHARE,
    Family,
    Sample,
    event,
)
from gateway.watch import AlarmEvent, Spend, Watch, adopted
from monitors import Alarm, Profile
from monitors.budget import Purpose, divide
from monitors.refusals import FEATURE
from monitors.window import WINDOWS, WindowName
from registry import store
from registry.errors import RegistryError

T = TypeVar("T")

__all__ = ["WINDOWS", "Observer", "WindowName"]

_SLICE = 2048
"""Rows in one slice: short enough that the event loop is never held up for long."""
_PAUSE_S = 0.2
"""Slices are taken up at most so often: larger ones cost less a row."""
_MONITOR = "drift:"
_LOOK_S = 1.0
"""How often the lease, acknowledged alarms and new references are looked for."""


class Observer:
    """The thread between the tap and the monitors."""

    def __init__(
        self,
        tap: Tap,
        shared: Shared | None = None,
        references: Path | None = None,
        alarms: AlarmLog | None = None,
    ) -> None:
        self._tap = tap
        self._alarms = alarms
        self.shared = shared or Shared()
        self._references = references
        self._lease: store.Lease | None = None
        self._next_look = 0.0
        self._references_seen: float | None = None
        self.listeners: list[Callable[[AlarmEvent], None]] = []
        """Called by the observer's thread with what happens to alarms, on the worker that judges;
        they must not wait."""
        self._watches: dict[tuple[str, int], Watch] = {}
        self._models: tuple[str, ...] = ()
        self._rivals: frozenset[Watch] = frozenset()
        """Watches of models of which several versions are watched."""
        self._pairs: dict[tuple[str, int], Pair] = {}
        self.champion_of: Callable[[str], int | None] = lambda _: None
        """The version of a model that others are compared with."""
        self.refusals: RefusalWatches | None = None
        """Requests that models refuse, where they are watched."""
        self._others: dict[str, dict[str, tuple[Purpose, Spend]]] = {}
        self._asked: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._lock = threading.Lock()
        self._called = threading.Event()
        self._is_ending = False
        self._thread = threading.Thread(target=self._work, name="observer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Count what still waits, then end the thread."""
        self._is_ending = True
        self._called.set()
        self._tap.called.set()
        await asyncio.to_thread(self._thread.join, 5)

    def add(self, watch: Watch) -> None:
        """Watch one more version. A new dictionary, so that readers never see a change."""
        self._watches = {**self._watches, (watch.model, watch.version): watch}
        known = Counter(model for model, _ in self._watches)
        self._models = tuple(known)
        self._rivals = frozenset(w for w in self._watches.values() if known[w.model] > 1)
        self._divide(watch.model)

    async def configure(self, model: str, config: MonitorConfig) -> None:
        """Judge all versions of a model under these settings from now on."""
        watches = [watch for (name, _), watch in self._watches.items() if name == model]

        def configure() -> None:
            for watch in watches:
                watch.configure(config)

        if watches:
            await self.ask(configure)

    def spend_on(self, model: str, name: str, purpose: Purpose, spend: Spend) -> None:
        """Let somebody else raise alarms about a model, too: `spend` is told what part he has.

        Parameters
        ----------
        name : of this one among those of the model; who comes again under it takes its place
        """
        others = {**self._others.get(model, {}), name: (purpose, spend)}
        self._others = {**self._others, model: others}
        self._divide(model)

    def spend_no_more(self, model: str, name: str) -> None:
        """Give the part of this one to the others."""
        others = {key: one for key, one in self._others.get(model, {}).items() if key != name}
        self._others = {**self._others, model: others}
        self._divide(model)

    def _divide(self, model: str) -> None:
        """All versions of a model, and whoever else watches it, draw on one budget."""
        spenders: dict[str, tuple[Purpose, Spend]] = {
            f"version {watch.version}": ("serving", watch.spend)
            for watch in self._watches.values()
            if watch.model == model
        }
        spenders |= self._others.get(model, {})
        shares = divide({name: purpose for name, (purpose, _) in spenders.items()})
        for name, (_, spend) in spenders.items():
            spend(shares[name])

    async def ask(self, question: Callable[[], T]) -> T:
        """The answer of `question`, called by the observer's thread."""
        answer: Future[T] = Future()
        with self._lock:
            self._asked.append((question, answer))
        self._called.set()
        self._tap.called.set()
        return await asyncio.wrap_future(answer)

    async def report(self, model: str, version: int, window: WindowName) -> dict[str, Any]:
        """The report of one version."""
        watch = self._watch(model, version)

        def found() -> dict[str, Any]:
            requests = self.refusals.get(model) if self.refusals is not None else None
            return watch.report(window) | {"requests": requests.report() if requests else None}

        return await self.ask(found)

    async def against(
        self, model: str, version: int | None, champion: int, window: WindowName
    ) -> dict[str, Any]:
        """A version beside the champion; without one the only other that has had rows.

        Raises
        ------
        BadRequestError : the champion itself is meant, or there are several.
        NotFoundError : there is nothing to compare with.
        """
        return await self.ask(lambda: self._against(model, version, champion).report(window))

    def _against(self, model: str, version: int | None, champion: int) -> Pair:
        if self._watch(model, champion).monitor is None:
            raise NotFoundError(
                f"model {model!r}: its champion, version {champion}, has no reference, whose bins"
                " versions are compared in"
            )
        if version is None:
            found = [w.version for w in self._rivals if w.model == model if w.version != champion]
            pairs = [pair for n in found if (pair := self._pairs.get((model, n))) and pair.n_rows]
            if len(pairs) == 1:
                return pairs[0]
            said = ", ".join(map(str, sorted(found))) or "none"
            raise BadRequestError(
                f"model {model!r}: name the version to compare with the champion; beside it there"
                f" are open: {said}"
            )
        if version == champion:
            raise BadRequestError(f"model {model!r} version {version} is the champion itself")
        pair = self._pair(self._watch(model, version))
        if pair is None:
            raise NotFoundError(f"model {model!r} version {version}: nothing to compare it with")
        return pair

    async def summary(self) -> list[dict[str, Any]]:
        """One line for every watched version."""
        return await self.ask(
            lambda: [_summary(w, self._requests_of(w)) for w in self._watches.values()]
        )

    async def adopt(self, model: str, version: int, rows: int) -> dict[str, Any]:
        """Let the next `rows` served rows of a version become its reference."""
        if not ADOPT_ROWS_MIN <= rows <= ADOPT_ROWS_MAX:
            raise BadRequestError(
                f"rows = {rows}: must be from {ADOPT_ROWS_MIN} to {ADOPT_ROWS_MAX}"
            )
        watch = self._watch(model, version)
        await self.ask(lambda: watch.adopt(rows))
        return {"model": model, "version": version, "adopting": {"rows": 0, "of": rows}}

    async def accept(self, model: str, version: int, window: WindowName) -> dict[str, Any]:
        """Let the rows of a window be the reference from now on."""
        watch = self._watch(model, version)
        profile = await self.ask(lambda: watch.accept(window))
        await self.ask(lambda: self._learn(model))
        if self._alarms is not None:
            note = f"the rows of window {window} became the reference"
            await asyncio.to_thread(self._alarms.accept, model, version, "", note, prefix=_MONITOR)
        return {
            "model": model,
            "version": version,
            "reference": {"source": "accepted", "digest": profile.digest, "rows": profile.n_rows},
        }

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
        evidence: list[Sample] = []
        for watch in self._watches.values():
            labels = (watch.model, str(watch.version))
            for feature, statistic, value, line in watch.scores():
                scores.append(((*labels, feature, statistic), value))
                lines.append(((*labels, feature, statistic), line))
            requests = self._requests_of(watch)
            if watch.monitor is not None or requests is not None:
                n_open = len(watch.monitor.alarms) if watch.monitor is not None else 0
                alarms.append((labels, n_open + len(requests.alarms if requests else ())))
            for odds in (watch.evidence(), requests.evidence if requests else {}):
                evidence += [((*labels, channel), value) for channel, value in odds.items()]
        return {
            DRIFT_SCORE: scores,
            DRIFT_LINE: lines,
            DRIFT_EVIDENCE: evidence,
            ALARMS_OPEN: alarms,
        }

    def _requests_of(self, watch: Watch) -> RefusalWatch | None:
        """The requests of its model, at the version that their alarms are filed under."""
        found = self.refusals.get(watch.model) if self.refusals is not None else None
        if found is None or (found.version or self.champion_of(watch.model)) != watch.version:
            return None
        found.catch_up()
        return found

    def reference(self, model: str, version: int) -> tuple[Sequence[Column], Profile] | None:
        """The profile that a version is judged by; None while it has none. For any thread."""
        watch = self._watches.get((model, version))
        return None if watch is None else watch.reference

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
            self._judge()
            self._answer()
            # Let rows gather, unless somebody waits for an answer.
            pause_s = _PAUSE_S - (time.monotonic() - start)
            if pause_s > 0:
                self._called.wait(pause_s)
            self._called.clear()
        self._drain()
        self._answer()
        for watch in self._watches.values():
            watch.catch_up()
            watch.save()
        if self.refusals is not None:
            self.refusals.look(())
        for kept in (*self._pairs.values(), *(self.refusals or ())):
            kept.tick(time.time())
            kept.save()
        self._pass_on()
        if self._lease is not None:
            self._lease.release()

    def _judge(self) -> None:
        """Turn counts into evidence where this worker does that, and pass on what came of it."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            self._look()
        now = time.time()
        # New workers are looked for once a pass: with a thousand models that is what counts.
        is_first = True
        for watch in [w for w in self._watches.values() if w.monitor is not None]:
            self._guarded(watch, partial(watch.tick, now, is_looking=is_first))
            is_first = False
        for watch in self._rivals:
            if (pair := self._pair(watch)) is not None:
                self._guarded(watch, partial(self._compare, pair, now))
        for refusals in self.refusals or ():
            if not refusals.has_alarms:  # They are filed where they were opened.
                refusals.version = self.champion_of(refusals.model) or refusals.version
            if (champion := self._watches.get((refusals.model, refusals.version))) is not None:
                refusals.meters = champion.meters
                self._guarded(champion, partial(refusals.tick, now))
        self._pass_on()

    def _compare(self, pair: Pair, now: float) -> None:
        name = f"version {pair.version} against {pair.against}"
        if pair.n_rows and name not in self._others.get(pair.model, {}):
            self.spend_on(pair.model, name, "canary", pair.spend)
        pair.tick(now)

    def _pair(self, watch: Watch) -> Pair | None:
        """A version beside the champion of now, if it is not itself the champion."""
        key = (watch.model, watch.version)
        champion = self._watches.get((watch.model, self.champion_of(watch.model) or 0))
        pair = self._pairs.get(key)
        if pair is not None and (champion is None or not pair.is_of(champion)):
            del self._pairs[key]
            self.spend_no_more(pair.model, f"version {pair.version} against {pair.against}")
            pair = None
        if champion is None or champion is watch or champion.monitor is None:
            return None
        if pair is None:
            pair = Pair(watch, champion, config=watch.config, shared=self.shared)
            self._pairs[key] = pair
        return pair

    def _pass_on(self) -> None:
        watches = self._watches.values()
        for watch in [w for w in watches if w.has_adopted]:
            if self._alarms is not None:
                self._alarms.accept(
                    watch.model, watch.version, note="a reference was adopted", prefix=_MONITOR
                )
            watch.has_adopted = False
        tellers = [w for w in (*watches, *(self.refusals or ())) if w.told]
        for teller in tellers:
            told, teller.told = teller.told, []
            for happened in told:
                if self._alarms is not None:
                    _tell(self._alarms, happened)
                for listener in self.listeners:
                    try:
                        listener(happened)
                    except Exception:  # noqa: BLE001  who listens must not end monitoring
                        event("alarm_listener_failed", logging.ERROR, exc=True)

    def _look(self) -> None:
        """Take the lease if it is free; do what other workers asked for; see new references."""
        directory = self.shared.directory
        if directory is not None:
            try:
                if self._lease is None:
                    directory.mkdir(parents=True, exist_ok=True)
                    self._lease = store.Lease(directory / "lease")
                self.shared.is_holder = self._lease.is_held or self._lease.acquire()
            except (OSError, RegistryError):
                self.shared.is_holder = False
        self._see_references()
        if self.refusals is not None:
            self.refusals.look(self._models)
        if self._alarms is not None and self.shared.is_judge:
            self._see_acknowledged(self._alarms)

    def _see_acknowledged(self, log: AlarmLog) -> None:
        """Let alarms be quiet whose episode somebody has acknowledged, at whatever worker."""
        refusals = {one.model: one for one in self.refusals or () if one.has_alarms}
        watches = [watch for watch in self._watches.values() if watch.monitor is not None]
        if not refusals and not any(watch.has_alarms for watch in watches):
            return
        for episode in log.episodes():
            channel = episode.monitor.removeprefix(_MONITOR)
            if episode.state != "acknowledged" or channel == episode.monitor:
                continue
            if (watch := self._watches.get((episode.model, episode.version))) is not None:
                watch.acknowledge(channel, before=episode.changed)
            if (one := refusals.get(episode.model)) is not None:
                one.acknowledge(channel, before=episode.changed)

    def _see_references(self) -> None:
        """Judge by a reference that another worker has adopted or accepted."""
        if self._references is None or not self.shared.is_host_wide:
            return
        try:
            changed = self._references.stat().st_mtime
        except OSError:
            return
        if changed == self._references_seen:
            return
        self._references_seen = changed
        for key, profile in adopted(self._references).items():
            watch = self._watches.get(key)
            if watch is not None and watch.reference_digest != profile.digest:
                watch.judge_by(profile, "adopted")
                self._learn(watch.model)

    def _learn(self, model: str) -> None:
        """What is served now is accepted: also how many requests are refused."""
        if self.refusals is not None and (requests := self.refusals.get(model)) is not None:
            requests.learn()

    @staticmethod
    def _guarded(watch: Watch, work: Callable[[], None]) -> None:
        """One bad block must not end all monitoring."""
        try:
            work()
        except Exception:  # noqa: BLE001  counted and logged, then the next
            watch.meters.errors.add()
            event(
                "observer_failed",
                logging.ERROR,
                model=watch.model,
                version=watch.version,
                exc=True,
            )

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
                self._guarded(watch, partial(watch.count, block))
                if watch in self._rivals and (pair := self._pair(watch)) is not None:
                    self._guarded(watch, partial(pair.count, block))
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


def _summary(watch: Watch, requests: RefusalWatch | None) -> dict[str, Any]:
    monitor = watch.monitor
    alarms = [*(monitor.alarms if monitor else ()), *(requests.alarms if requests else ())]
    psi = {feature: value for feature, statistic, value, _ in watch.scores() if statistic == "psi"}
    highest = max(psi, key=lambda feature: psi[feature], default=None)
    return {
        "model": watch.model,
        "version": watch.version,
        "reference": watch.source if monitor is not None else None,
        "rows_observed": watch.n_observed,
        "rows_dropped": watch.n_dropped,
        "gaps": watch.coverage(time.time())["gaps"],
        "alarms": _paged(alarms),
        "highest": {"feature": highest, "psi": round(psi[highest], 4)} if highest else None,
        "problems": len(watch.problems),
    }


def _paged(alarms: Iterable[Alarm]) -> list[str]:
    """Columns with an open page, each once; a page about all of them by its channel."""
    pages = [alarm for alarm in alarms if alarm.level == "page"]
    return list(dict.fromkeys(alarm.feature or alarm.channel for alarm in pages))


def _tell(log: AlarmLog, happened: AlarmEvent) -> None:
    """A page in the words of the event log: one episode, however many channels it names."""
    alarm = happened.alarm
    if alarm.level != "page":
        return
    if happened.what == "closed" and happened.is_last:
        log.passed(happened.model, happened.version, f"{_MONITOR}{happened.first}")
    if happened.what == "opened" and alarm.id == alarm.episode:
        log.crossed(
            Crossing(
                happened.model,
                happened.version,
                f"{_MONITOR}{alarm.channel}",
                _reason(alarm),
                alarm.since if alarm.since is not None else time.time(),
                {
                    "channel": alarm.channel,
                    "feature": alarm.feature,
                    "segment": alarm.segment,
                    "evidence": min(alarm.evidence, 1e200),
                    "alarm": happened.id,
                },
            )
        )


def _reason(alarm: Alarm) -> str:
    """A sentence for people."""
    odds = f"odds of {alarm.evidence:.3g} to 1 against"
    if alarm.feature == FEATURE:
        return f"{reason(alarm)}; {odds} that"
    where = "" if alarm.segment is None else f", in segment {alarm.segment}"
    moved = ", ".join(label for label, _, _ in alarm.moved) or "none by itself"
    return f"{alarm.channel}{where}: {odds} no drift; bins that moved: {moved}"
