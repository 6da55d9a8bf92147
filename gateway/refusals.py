"""Requests of a model that were refused for what they hold: counted by code, judged for the host.

The hot path counts requests by code anyway. Once a second each worker adds what its counts have
grown by to counts that add up over the host, and whoever judges there bets on them.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gateway.conclusions import Cells, Shared
from gateway.config import MonitorConfig
from gateway.counters import Counter
from gateway.errors import (
    BadRequestError,
    EncodingError,
    InputRefusedError,
    MediaTypeError,
    TensorError,
    TooLargeError,
)
from gateway.telemetry import REQUESTS, Telemetry, event
from gateway.watch import AlarmEvent, Spend, WatchMeters, budget_of
from monitors import Alarm, MonitorError
from monitors.budget import Purpose
from monitors.monitor import BLOCK_ROWS, BLOCK_S
from monitors.refusals import Refusals
from registry.errors import RegistryError

CODES: tuple[str, ...] = tuple(
    error.code
    for error in (
        BadRequestError, TensorError, InputRefusedError, TooLargeError, EncodingError,
        MediaTypeError,
    )
)  # fmt: skip
"""Refusals that are about what a request holds, as opposed to who sent it, when, or how fast."""

_LOOK_MODELS = 40
"""Models that are looked at in one turn, as other workers may have been asked for them."""
_PLACES = {code: k for k, code in enumerate(("ok", *CODES))}
_NOTHING = np.zeros(len(_PLACES), np.int64)


def counted(series: Iterable[tuple[tuple[str, ...], int]]) -> dict[str, Cells]:
    """(1 + n_codes,) requests of each model that this worker has answered, or refused with a code.

    Requests that ended otherwise (too late, too many, a model that failed) say nothing about what
    they held, and are not among them.

    Parameters
    ----------
    series : labels and count of each series of REQUESTS
    """
    found: dict[str, Cells] = {}
    for labels, n in series:
        if (place := _PLACES.get(labels[-1])) is not None:
            cells = found.get(labels[0])
            if cells is None:
                cells = found[labels[0]] = np.zeros(len(_PLACES), np.int64)
            cells[place] += n
    return found


class RefusalWatch:
    """One model's requests. For the observer's thread only.

    Parameters
    ----------
    before : what `counted` said when this process began to watch: others have counted that
    """

    def __init__(
        self, model: str, before: Cells, *, config: MonitorConfig, shared: Shared, errors: Counter
    ) -> None:
        self.model = model
        self.version = 0
        """The champion of now: whom alarms are filed under."""
        self.meters: WatchMeters | None = None
        """Of the champion: where alarms are counted."""
        self.told: list[AlarmEvent] = []
        """What happened to alarms and has not been passed on yet."""
        self._config = config
        self._shared = shared
        self._errors = errors
        self._share = 1.0
        self._seen = before
        self._name = f"requests:{model}"
        self._cells = shared.cells(self._name, len(_PLACES))
        self._cursor = np.zeros(len(_PLACES), np.int64)
        self._kept = shared.conclusions(f"requests@{model}")
        # What was kept before anything was counted was read from counters that are gone.
        self._fresh_at = -np.inf if shared.total(self._name, self._cells).any() else time.time()
        self._refusals = self._new()
        self._folded_at = 0.0
        self._is_changed = False
        self._was_judge = False

    @property
    def has_alarms(self) -> bool:
        """Whether any is open."""
        return bool(self._refusals.alarms)

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Those that are open, pages first."""
        return self._refusals.alarms

    @property
    def evidence(self) -> dict[str, float]:
        """E-value of every channel; none while it learns."""
        return self._refusals.evidence

    def catch_up(self) -> None:
        """Judge everything that was counted, or read what the judge has concluded."""
        if self._shared.is_judge:
            self._folded_at = 0.0
            self.tick(time.time())
        else:
            self._restore()

    def spend(self, share: float) -> None:
        """Have this part of the model's budget from now on."""
        self._share = share
        self._refusals.spend(self._config.budget_share * share)

    def count(self, total: Cells) -> None:
        """Add what this worker has counted since it was last asked."""
        grown = total - self._seen
        if (grown > 0).any():
            self._cells += np.maximum(grown, 0)
            self._seen = total

    def tick(self, now: float) -> None:
        """Judge what has gathered, if it is enough or has waited long enough."""
        if not self._shared.is_judge:
            self._was_judge = False
            return
        if not self._was_judge:
            self._was_judge = True
            if self._shared.is_holder:
                self._restore()
        total = self._shared.total(self._name, self._cells, is_looking=False)
        if (total < self._cursor).any():  # The host's counters began anew.
            self._cursor = np.zeros_like(total)
        grown = total - self._cursor
        n = int(grown.sum())
        if n and (n >= BLOCK_ROWS or now - self._folded_at >= BLOCK_S):
            self._fold(grown, now)
            self._cursor = total
        if self._is_changed and self._kept.is_due:
            self.save()

    def save(self) -> None:
        """Write evidence and how far the counts were read, both at once."""
        if not self._shared.is_holder:
            return
        try:
            self._kept.save(self._cursor, self._refusals.to_bytes())
        except (OSError, RegistryError):
            self._errors.add()
        else:
            self._is_changed = False

    def acknowledge(self, channel: str, *, before: float) -> None:
        """Somebody has seen the alarm about this channel, at that time."""
        for alarm in self._refusals.alarms:
            is_meant = alarm.channel == channel and (alarm.at is None or alarm.at <= before)
            if is_meant and alarm.acknowledged_row is None:
                self._refusals.acknowledge(alarm.id, before)
                self._is_changed = True
                self._tell("acknowledged", alarm)

    def learn(self) -> None:
        """Let the next requests say what is normal: what is refused now is accepted."""
        was_open = self._refusals.alarms
        self._refusals.learn_anew()
        self._is_changed = True
        for alarm in was_open:
            self._tell("closed", alarm)

    def report(self) -> dict[str, Any]:
        """What `GET /drift/{model}` says of requests, in plain JSON types."""
        self.catch_up()
        return {**self._refusals.report(), "budget_share": self._refusals.budget.share}

    # -- inside

    def _new(self) -> Refusals:
        config = self._config
        return Refusals(
            CODES,
            budget=budget_of(config, self._share),
            allowed=config.refused_share / 100,
            learn=config.refused_learn,
        )

    def _fold(self, grown: Cells, now: float) -> None:
        self._folded_at = now
        self._is_changed = True
        was_open = self._refusals.alarms
        for alarm in self._refusals.fold(grown, now):
            event(
                "refusals_alarm_opened",
                logging.WARNING,
                model=self.model,
                severity=alarm.level,
                channel=alarm.channel,
                evidence=float(f"{min(alarm.evidence, 1e200):.3g}"),
                since=alarm.since,
            )
            if self.meters is not None and alarm.id == alarm.episode:
                (self.meters.pages if alarm.level == "page" else self.meters.warnings).add()
            self._tell("opened", alarm)
        for alarm in was_open:
            if not alarm.is_open:
                event(
                    "refusals_alarm_closed",
                    model=self.model,
                    channel=alarm.channel,
                    why=alarm.why_closed,
                )
                self._tell("closed", alarm)

    def _tell(self, what: str, alarm: Alarm) -> None:
        same = [one for one in self._refusals.episodes if one.episode == alarm.episode]
        first = next((one.channel for one in same if one.id == alarm.episode), alarm.channel)
        is_last = not any(one.is_open for one in same)
        name = f"{self.model}-requests-{alarm.id}"
        self.told.append(AlarmEvent(what, self.model, self.version, name, alarm, first, is_last))

    def _restore(self) -> None:
        """Take up what was concluded last, if it is of these bounds and can be read."""
        try:
            found = self._kept.read(self._cursor.size)
            if found is None:
                return
            cursor, concluded, written = found
            fresh = self._new()
            fresh.restore(concluded)
        except (OSError, ValueError, MonitorError) as error:
            event(
                "monitor_state_skipped",
                logging.WARNING,
                model=self.model,
                reason=str(error),
            )
            return
        self._refusals = fresh
        goes_on = self._shared.is_host_wide and written >= self._fresh_at
        self._cursor = cursor if goes_on else np.zeros_like(self._cursor)


class RefusalWatches:
    """All models whose requests are watched. For the observer's thread only.

    Parameters
    ----------
    spend_on : takes a part of a model's budget for somebody, see `Observer.spend_on`
    """

    def __init__(
        self,
        telemetry: Telemetry,
        config: MonitorConfig,
        shared: Shared,
        spend_on: Callable[[str, str, Purpose, Spend], None],
    ) -> None:
        self._telemetry = telemetry
        self._config = config
        self._shared = shared
        self._spend_on = spend_on
        self._errors = telemetry.cell()
        self._series = telemetry.own(REQUESTS)
        self._before = counted(self._series)
        self._watches: dict[str, RefusalWatch] = {}
        self._turn = 0
        self._without_file: set[str] = set()
        """Models of which nothing was concluded before this worker first looked."""

    def __iter__(self) -> Iterator[RefusalWatch]:
        return iter(tuple(self._watches.values()))

    def get(self, model: str) -> RefusalWatch | None:
        """The requests of a model, if any worker was asked for it."""
        if model not in self._watches and self._is_known(model):
            self._add(model)
        return self._watches.get(model)

    def look(self, models: Sequence[str]) -> None:
        """Count what has come, and see what other workers have counted of these models."""
        series = self._telemetry.own(REQUESTS)
        if series != self._series:
            self._series = series
            for model, total in counted(series).items():
                if model not in self._watches and not (total == self._first(model)).all():
                    self._add(model)
                if (watch := self._watches.get(model)) is not None:
                    watch.count(total)
        if self._shared.is_judge:
            # Some at a time, in turn: a look at a thousand would be noticed by whoever is served.
            self._turn += _LOOK_MODELS
            for model in (*models, *models)[self._turn % max(len(models), 1) :][:_LOOK_MODELS]:
                self.get(model)

    def _is_known(self, model: str) -> bool:
        """Whether there are counts of it, or conclusions of an earlier time."""
        if self._shared.total(f"requests:{model}", _NOTHING, is_looking=False).any():
            return True
        if model in self._without_file:  # What is concluded from now on is concluded from counts.
            return False
        file = self._shared.conclusions(f"requests@{model}").file
        if file is not None and file.exists():
            return True
        self._without_file.add(model)
        return False

    def _first(self, model: str) -> Cells:
        return self._before.get(model, np.zeros(len(_PLACES), np.int64))

    def _add(self, model: str) -> None:
        watch = RefusalWatch(
            model,
            self._first(model),
            config=self._config,
            shared=self._shared,
            errors=self._errors,
        )
        self._watches[model] = watch
        self._spend_on(model, "requests", "requests", watch.spend)


def reason(alarm: Alarm) -> str:
    """A sentence for people: how many are refused, with what, and what is normal."""
    code = alarm.channel.partition(":")[2]
    label = "refused" if code == "any" else code
    before, late = next(((b, n) for name, b, n in alarm.moved if name == label), (0.0, 0.0))
    what = "" if code == "any" else f" with {code}"
    return f"{late:.1%} of requests of late are refused{what}; up to {before:.1%} is normal"
