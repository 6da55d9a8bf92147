"""A version beside the champion of its model: rows of both in the champion's bins, compared.

Workers only count the version's rows a second time, in other bins; the champion's are counted
anyway. The judge of the host compares what both have grown by. Nobody is called for a difference,
and it holds no rollout: whether a candidate is good is for guards to say.
"""

import logging
import time
from typing import Any

import numpy as np

from gateway.columns import Column
from gateway.conclusions import Cells, Shared
from gateway.config import MonitorConfig
from gateway.counters import Counter
from gateway.tap import Observation
from gateway.telemetry import event
from gateway.watch import Watch, budget_of
from monitors import MonitorError, Profile
from monitors.comparison import Comparison, Difference
from monitors.monitor import BLOCK_ROWS, BLOCK_S
from monitors.window import WindowName
from registry.errors import RegistryError


class Pair:
    """One version, and the champion that it is compared with. For the observer's thread only.

    Parameters
    ----------
    ours, theirs : the version and the champion, which has a reference
    """

    def __init__(
        self, ours: Watch, theirs: Watch, *, config: MonitorConfig, shared: Shared
    ) -> None:
        assert theirs.monitor is not None  # noqa: S101  asked by who makes pairs
        self.ours, self.theirs = ours, theirs
        self.model, self.version, self.against = ours.model, ours.version, theirs.version
        self.share = 1.0
        """Part of the model's budget that it has."""
        self._config = config
        self._shared = shared
        self._errors: Counter = ours.meters.errors
        whole = theirs.monitor.profile
        self._digest = whole.digest
        self._columns: list[Column] = ours.fit(whole)
        self.profile: Profile = whole.select([column.channel for column in self._columns])
        self._places = self.profile.cells_in(whole)
        self._comparison: Comparison | None = None
        name = f"{self.model}-{self.version}-against-{self.against}-{self.profile.digest[:16]}"
        self._name = f"pair:{name}"
        self._kept = shared.conclusions(name)
        n = self.profile.layout.n_cells
        self._cells: Cells = shared.cells(self._name, 1 + n)
        self._cursor: Cells = np.zeros(1 + 2 * n, np.int64)
        # What was kept before anything was counted was read from counters that are gone.
        self._fresh_at = -np.inf if self.n_rows else time.time()
        self._folded_at = 0.0
        self._is_changed = False
        self._was_judge = False

    def is_of(self, theirs: Watch) -> bool:
        """Whether this is still the champion, judged by the same reference."""
        return (
            self.theirs is theirs
            and theirs.monitor is not None
            and theirs.monitor.profile.digest == self._digest
        )

    @property
    def n_rows(self) -> int:
        """Rows of the version that the host's workers have counted here."""
        return int(self._shared.total(self._name, self._cells, is_looking=False)[0])

    def spend(self, share: float) -> None:
        """Have this part of the model's budget from now on."""
        self.share = share
        if self._comparison is not None:
            self._comparison.spend(self._config.budget_share * share)

    def count(self, observations: list[Observation]) -> None:
        """Count a slice of observations of the version."""
        if not self._columns:
            return
        rows = self.profile.binner.rows(self.ours.block(observations, self._columns))
        if not rows:
            return
        counts = self.profile.binner.count(rows)[0, 0]
        self._cells[1:] += counts
        self._cells[0] += next(iter(rows.values())).size

    def tick(self, now: float) -> None:
        """Compare what has gathered, if it is enough or has waited long enough."""
        if not self._shared.is_judge:
            self._was_judge = False
            return
        total = self._total()
        if not self._was_judge:
            self._was_judge = True
            # What the champion answered before there was anything to compare it with is past.
            self._cursor = total.copy()
            self._cursor[: self._cells.size] = 0
            if self._shared.is_holder:
                self._restore()
        if (total < self._cursor).any():  # The host's counters began anew.
            self._cursor = np.zeros_like(total)
        n_rows = int(total[0] - self._cursor[0])
        if n_rows and (n_rows >= BLOCK_ROWS or now - self._folded_at >= BLOCK_S):
            self._fold(total, now)
        if self._is_changed and self._kept.is_due:
            self.save()

    def save(self) -> None:
        """Write evidence and how far the counts were read, both at once."""
        if self._comparison is None or not self._shared.is_holder:
            return
        try:
            self._kept.save(self._cursor, self._comparison.to_bytes())
        except (OSError, RegistryError):
            self._errors.add()
        else:
            self._is_changed = False

    def report(self, window: WindowName) -> dict[str, Any]:
        """What `GET /drift/{model}?against=champion` answers, in plain JSON types."""
        if self._shared.is_judge:
            self._folded_at = 0.0
            self.tick(time.time())
        else:
            self._restore()
        comparison = self._comparison or self._new()
        budget = comparison.budget
        return {
            "model": self.model,
            "version": self.version,
            "against": self.against,
            "budget": {
                "alarms": budget.alarms,
                "days": budget.days,
                "rows": budget.rows,
                "share": self._config.budget_share * self.share,
                "tolerance": comparison.tolerance,
            },
            "problems": [
                f"{name!r} is not compared: version {self.version} has no such column"
                for name in self.theirs.channels
                if name not in self.profile.channels
            ],
            "report": comparison.report(window),
        }

    # -- inside

    def _new(self) -> Comparison:
        return Comparison(
            self.profile.layout,
            budget_of(self._config, self.share),
            tolerance=self._config.tolerance,
            window_rows=self._config.window_rows,
        )

    def _total(self) -> Cells:
        """Rows of the version, its cells, and those of the champion."""
        ours = self._shared.total(self._name, self._cells, is_looking=False)
        theirs = self.theirs.counted
        if theirs is None:
            return np.concatenate([ours, np.zeros(ours.size - 1, np.int64)])
        return np.concatenate([ours, theirs[self._places]])

    def _fold(self, total: Cells, now: float) -> None:
        grown = (total - self._cursor)[1:]
        ours, theirs = np.split(grown, 2)
        if not theirs.any():  # Nothing to compare with yet: these rows wait.
            return
        self._cursor = total
        self._folded_at = now
        self._is_changed = True
        if self._comparison is None:
            self._comparison = self._new()
        for found in self._comparison.fold(ours, theirs, now):
            self._say(found)

    def _say(self, found: Difference) -> None:
        event(
            "versions_differed",
            logging.WARNING,
            model=self.model,
            version=self.version,
            against=self.against,
            channel=found.channel,
            evidence=float(f"{min(found.evidence, 1e200):.3g}"),
            since=found.since,
            moved=[label for label, _, _ in found.moved],
        )

    def _restore(self) -> None:
        """Take up what was concluded last, if it is of these bins and can be read."""
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
                version=self.version,
                reason=str(error),
            )
            return
        self._comparison = fresh
        if self._shared.is_host_wide and written >= self._fresh_at:
            self._cursor = cursor
