"""The bank of e-detectors: blocks of counts -> evidence -> alarms, for all channels at once.

Every channel is bet on by a number of experts. An expert's capital multiplies, block by block, by
what its bet earned; without drift no bet earns anything in expectation. What is counted are whole
blocks, so that equal counts in equal blocks give equal evidence, whoever counted the rows.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from monitors.budget import Budget
from monitors.counts import Counts
from monitors.errors import BlockError
from monitors.layout import SPECIAL, Floats, Layout

Level: TypeAlias = Literal["page", "warning"]
LEVELS: tuple[Level, Level] = ("page", "warning")

LOCATIONS = (-1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0)
"""Shifts, in standard deviations of the normal scores, that are bet on."""
SCALES = (-0.3, -0.12, 0.12, 0.3)
"""Tilts of the squared score that are bet on."""
RISES = (0.25, 1.5)
"""Rises of a special bin that are bet on, in standard deviations of one row."""
HALF_LIVES = (100.0, 500.0, 2_500.0, 25_000.0, 250_000.0)
"""Rows after which what was seen weighs half, for experts that bet on what they saw."""

_ATTRIBUTION = 0.05
_DOUBT = 0.001
_PRIOR_ROWS = 20.0
_SLEEP = math.log(0.99)
_LOG_MAX = 200.0
_OVER = math.log(1e4)
_WON = math.log(100)
_MOVED = 3
_FIRST_S = 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A channel that an alarm names."""

    level: Level
    channel: int
    evidence: float
    """An e-value: its expectation is at most 1 without drift."""
    since: float | None
    """Time of the block with which the evidence began."""
    since_row: int
    at: float | None
    at_row: int
    moved: tuple[tuple[str, float, float], ...]
    """Bins that moved most: label, share in the reference, share of late."""


class Detector:
    """Evidence about every channel of a layout, under a budget.

    Parameters
    ----------
    layout : channels and their reference
    budget : false alarms that may be raised
    tolerance : distance from the reference, in units of psi, that is no drift; 0: any distance is
    is_rising : channels have two bins, and only more in the second is bet on: its share in the
        reference is a bound. All bets lose where the truth is below it.

    Notes
    -----
    With reference shares p and a bet on shares q, r = q / p earns on a block of counts N

        log e = sum_b N_b (log r_b - log(1 + tau s)),   s^2 = sum_b p_b (r_b - 1)^2.

    For every truth p' within sum (p' - p)^2 / p <= tau^2 it follows by Cauchy and Schwarz that
    sum p' r <= 1 + tau s, so that E[e] <= 1. tau is sqrt(tolerance), as psi is near this distance,
    and what the reference may be off by sampling. Capital follows R <- e (R + mass), and an alarm
    is raised when the weighted sum of R reaches 1: then it loses at least 1, while without drift
    it gains at most the mass, so that expected false alarms are at most the mass taken, at every
    look, whatever the channels depend on. The exponent 1 / d, with d the design effect of rows
    that follow each other, makes a geometric mean of d valid bets.

    Sources: Shin, Ramdas, Rinaldo (2023), arXiv 2203.03532 (e-detectors); Roberts (1966),
    Technometrics 8; Wang, Ramdas (2022), J. R. Stat. Soc. B 84 (e-BH); Grunwald, de Heide,
    Koolen (2024), J. R. Stat. Soc. B 86 (safe testing).
    """

    def __init__(
        self, layout: Layout, budget: Budget, *, tolerance: float = 0.01, is_rising: bool = False
    ) -> None:
        if not 0 <= tolerance < math.inf:
            raise BlockError(f"tolerance = {tolerance}: must be at least 0 and finite")
        self.layout = layout
        self.budget = budget
        self._owed = budget
        self.tolerance = tolerance
        self._slot: int | None = None
        self._is_rising = is_rising
        self._bets = _Bets(layout, tolerance, is_rising=is_rising)
        channels, experts = self._bets.weights.shape
        cells, memories = layout.n_cells, len(HALF_LIVES)
        self._capital = np.zeros((2, channels, experts))
        self._armed = np.ones((2, channels), np.bool_)
        self._mass = np.zeros((2, channels))
        # Since when each expert's bets have been worth anything (a cumulated sum, as in CUSUM).
        self._run = np.zeros((channels, experts))
        self._run_at = np.full((channels, experts), np.nan)
        self._run_row = np.zeros((channels, experts), np.int64)
        self._seen = np.zeros((memories, cells))
        self._due = np.zeros((memories, cells))
        self._n_seen = np.zeros((memories, channels))
        self._n_squared = np.zeros((memories, channels))
        # For channels that are held: the bet that won, until its opposite has won as clearly.
        self._undo = np.zeros(cells)
        self._undone = np.zeros(channels)
        self._rows = 0
        self._at: float | None = None

    @property
    def evidence(self) -> Floats:
        """(n_channels,) e-value of each channel; 1 before anything was bet."""
        gains = (self._capital[0] * self._bets.within).sum(axis=1)
        mass = self._mass[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(mass > 0, gains / mass, 1.0)

    @property
    def level(self) -> Floats:
        """(2,) how much of an alarm there is, a page and a warning; each is raised at 1."""
        level: Floats = (self._capital * self._bets.weights).sum(axis=(1, 2))
        return level

    @property
    def held(self) -> npt.NDArray[np.bool_]:
        """(2, n_channels) channels that raise no alarm of that level now, as they have one."""
        return ~self._armed

    def spend(self, budget: Budget) -> None:
        """Have this budget from now on.

        The time since the last block is paid for by the smaller of the two: it was somebody
        else's in part, who may have spent his by now. So what all spend never exceeds the whole.
        """
        if budget.share < self._owed.share:
            self._owed = budget
        self.budget = budget

    def fold(
        self, counts: Counts, *, at: float | None = None, slot: int | None = None
    ) -> tuple[list[Finding], list[int]]:
        """Judge one block.

        Parameters
        ----------
        counts : (n_cells,) rows of the block
        at : its time in seconds; needed under a budget in days
        slot : of the season that it belongs to

        Returns
        -------
        Channels for which an alarm is raised now, strongest first, and channels whose drift is
        over: their last alarm is held no longer.
        """
        layout, bets = self.layout, self._bets
        n = layout.sums(counts.astype(np.float64))
        rows = int(n.max(initial=0))
        if rows == 0:
            return [], []
        # The first block has taken some time, too: nothing that is seen in it may go unspent for.
        seconds = _FIRST_S if at is None or self._at is None else at - self._at
        spent = self.budget.spent(rows, seconds)
        levels, self._owed = self._owed.levels, self.budget
        if slot != self._slot:
            self._slot = slot
            bets.turn(slot)
        learnt, is_awake = self._learnt()
        block = counts.astype(np.float64)
        gains = np.concatenate(
            [layout.sums(bets.fixed * block), layout.sums(learnt * block)], axis=0
        ).T
        gains /= layout.effects[:, np.newaxis]
        gains[:, bets.n_fixed :][~is_awake.T] = _SLEEP
        np.clip(gains, -_LOG_MAX, _LOG_MAX, out=gains)
        has_rows = n > 0
        gains[~has_rows] = 0.0
        mass = np.array(levels)[:, np.newaxis] * spent * (self._armed & has_rows)
        self._mass += mass
        self._capital += mass[:, :, np.newaxis]
        self._capital *= np.exp(gains)
        np.minimum(self._capital, 1e200, out=self._capital)
        self._follow(gains, at)
        over = self._release(block) if not self._armed.all() else []
        self._remember(block, n)
        self._rows += rows
        self._at = at if at is not None else self._at
        findings = [finding for k in (0, 1) for finding in self._judge(k, learnt, at)]
        return findings, over

    def rearm(self, channel: int) -> None:
        """Let a channel raise alarms again, from no evidence on."""
        for k in (0, 1):
            if not self._armed[k, channel]:
                self._armed[k, channel] = True
                self._capital[k, channel] = 0.0
                self._mass[k, channel] = 0.0
        self._undone[channel] = 0.0
        self._undo[self._cells(channel)] = 0.0

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that a restart must not lose, as arrays by name."""
        return {
            "capital": self._capital,
            "armed": self._armed,
            "mass": self._mass,
            "run": self._run,
            "run_at": self._run_at,
            "run_row": self._run_row,
            "seen": self._seen,
            "due": self._due,
            "n_seen": self._n_seen,
            "n_squared": self._n_squared,
            "undo": self._undo,
            "undone": self._undone,
            "rows": np.array(self._rows, np.int64),
            "at": np.array(math.nan if self._at is None else self._at),
        }

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` gave.

        Raises
        ------
        BlockError : it is of another layout.
        """
        mine = self.state()
        for name, array in mine.items():
            given = state.get(name)
            if given is None or given.shape != array.shape or given.dtype != array.dtype:
                raise BlockError(f"state of a detector: {name!r} is not as this profile has it")
        for name in mine.keys() - {"rows", "at"}:
            setattr(self, f"_{name}", state[name].copy())
        self._rows = int(state["rows"])
        at = float(state["at"])
        self._at = None if math.isnan(at) else at

    def _learnt(self) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(n_memories, n_cells) log of what the bets on what was seen earn; which are placed.

        A bet goes part of the way from the reference to what was seen: less of it when that could
        be chance or tolerated.
        """
        layout, bets = self.layout, self._bets
        total = self._n_seen + _PRIOR_ROWS
        shares = bets.shares
        away = (self._seen - self._due) / (self._due + _PRIOR_ROWS * shares)
        away -= layout.spread(layout.sums(shares * away))
        norm = np.sqrt(layout.sums(shares * away**2))
        noise = np.sqrt((layout.sizes - 1) * self._n_squared * layout.effects) / total
        with np.errstate(invalid="ignore", divide="ignore"):
            part = np.maximum(0.0, 1.0 - (noise + bets.tau_learnt) / norm)
        part[~(norm > 0)] = 0.0
        if self._is_rising:
            part[away[:, 1::2] <= 0] = 0.0
        away *= layout.spread(part)
        # The mean of a ratio may take it below nothing: no bet may cost more than there is.
        np.maximum(away, -0.999, out=away)
        log = np.log1p(away)
        log -= layout.spread(np.log1p(layout.sums(shares * away) + bets.tau_learnt * part * norm))
        return log, part > 0

    def _follow(self, gains: Floats, at: float | None) -> None:
        """Keep where each expert's luck began."""
        was_down = self._run <= 0
        self._run += gains
        np.maximum(self._run, 0.0, out=self._run)
        begins = was_down & (self._run > 0)
        self._run_at[begins] = math.nan if at is None else at
        self._run_row[begins] = self._rows

    def _remember(self, block: Floats, n: Floats) -> None:
        rows = float(n.max())
        keep = 0.5 ** (rows / np.array(HALF_LIVES))[:, np.newaxis]
        self._seen = self._seen * keep + block
        self._due = self._due * keep + self._bets.shares * self.layout.spread(n)
        self._n_seen = self._n_seen * keep + n
        self._n_squared = self._n_squared * keep**2 + n

    def _judge(self, k: int, learnt: Floats, at: float | None) -> list[Finding]:
        """Raise the alarm of a level, name its channels and hold them."""
        if (self._capital[k] * self._bets.weights).sum() < 1.0:
            return []
        # Capital alone also grows by the mass. An alarm needs somebody whose bets were won: that
        # raises fewer alarms than the sum does, so the promise holds.
        won = np.where(self._run >= _WON, self._capital[k] * self._bets.weights, 0.0)
        weighted = won.sum(axis=1)
        if weighted.sum() < 1.0:
            return []
        order = np.argsort(-weighted, kind="stable")
        needed = int(np.searchsorted(np.cumsum(weighted[order]), 1.0)) + 1
        with np.errstate(invalid="ignore", divide="ignore"):
            values = (self._capital[k] * self._bets.within).sum(axis=1) / self._mass[k]
        values = np.where(weighted > 0, np.nan_to_num(values, nan=0.0), 0.0)
        named = set(order[: min(needed, order.size)].tolist()) | set(discoveries(values))
        findings = []
        for channel in sorted(named, key=lambda c: (-float(values[c]), c)):
            expert = int(
                (self._run[channel] + np.log(self._bets.within[channel] + 1e-300)).argmax()
            )
            since = float(self._run_at[channel, expert])
            findings.append(
                Finding(
                    level=LEVELS[k],
                    channel=channel,
                    evidence=float(values[channel]),
                    since=None if math.isnan(since) else since,
                    since_row=int(self._run_row[channel, expert]),
                    at=at,
                    at_row=self._rows,
                    moved=self._moved(channel),
                )
            )
            self._hold(k, channel, expert, learnt)
        return findings

    def _hold(self, k: int, channel: int, expert: int, learnt: Floats) -> None:
        """A page holds the warning too: who is woken need not be warned."""
        for level in range(k, 2):
            self._armed[level, channel] = False
            self._capital[level, channel] = 0.0
            self._mass[level, channel] = 0.0
        cells = self._cells(channel)
        bets = self._bets
        bet = bets.fixed[expert] if expert < bets.n_fixed else learnt[expert - bets.n_fixed]
        self._undo[cells] = -bet[cells] / self.layout.effects[channel]
        self._undone[channel] = 0.0

    def _release(self, block: Floats) -> list[int]:
        """Channels for which the reference has become as much better than the bet that won."""
        self._undone += self.layout.sums(self._undo * block)
        np.maximum(self._undone, 0.0, out=self._undone)
        over: list[int] = np.flatnonzero(self._undone >= _OVER).tolist()
        for channel in over:
            self.rearm(channel)
        return over

    def _moved(self, channel: int) -> tuple[tuple[str, float, float], ...]:
        cells = self._cells(channel)
        seen = self._seen[1, cells]
        total = seen.sum()
        if total <= 0:
            return ()
        late, before = seen / total, self._bets.shares[cells]
        by_move = (late - before) * np.log(np.maximum(late, 1e-4) / np.maximum(before, 1e-4))
        labels = self.layout.labels[cells]
        return tuple(
            (labels[b], float(before[b]), float(late[b]))
            for b in np.argsort(-by_move, kind="stable")[:_MOVED].tolist()
            if by_move[b] > 0
        )

    def _cells(self, channel: int) -> slice:
        start = int(self.layout.starts[channel])
        return slice(start, start + int(self.layout.sizes[channel]))


class _Bets:
    """What is bet on without having seen anything, for one slot of the season."""

    def __init__(self, layout: Layout, tolerance: float, *, is_rising: bool) -> None:
        self._layout = layout
        self._is_rising = is_rising
        level = 1 - _DOUBT / max(layout.n_channels, 1)
        tolerated = math.sqrt(tolerance)
        self._z = NormalDist().inv_cdf(level)
        self._tolerated = tolerated
        self._slots: dict[int | None, tuple[Floats, Floats, Floats]] = {}
        self.turn(None)
        self.n_fixed = self.fixed.shape[0]
        is_placed = layout.sums(np.abs(self.fixed)) > 0
        placed = np.concatenate([is_placed, np.ones((len(HALF_LIVES), layout.n_channels), bool)]).T
        self.within = placed / placed.sum(axis=1, keepdims=True)
        """(n_channels, n_experts) weight of each expert in its channel."""
        self.weights = self.within / max(layout.n_channels, 1)

    def turn(self, slot: int | None) -> None:
        """Go to a slot of the season."""
        if slot not in self._slots:
            if len(self._slots) > 1:
                self._slots = {None: self._slots[None]}
            shares, rows = self._layout.at_slot(slot)
            effective = np.maximum(rows / self._layout.effects, 1.0)
            freedom = np.maximum(self._layout.sizes - 1.0, 1.0)
            off = np.sqrt(chi2_quantile(freedom, self._z) / effective)
            self._slots[slot] = (shares, self._fixed(shares, effective), self._tolerated + off)
        self.shares, self.fixed, self.tau_learnt = self._slots[slot]

    def _fixed(self, shares: Floats, effective: Floats) -> Floats:
        """(n_experts, n_cells) log of what each bet earns per row of a bin, discount included."""
        layout = self._layout
        scores = layout.scores(shares)
        squares = np.where(layout.ordered, scores**2 - 1, 0.0)
        # Rows without a place in the order earn the mean, so that only the order is bet on.
        tau = self._tolerated + self._z / np.sqrt(effective)
        locations = [theta for theta in LOCATIONS if theta > 0 or not self._is_rising]
        bets = [self._tilt(theta * scores, shares, tau) for theta in locations]
        if self._is_rising:
            return np.array(bets)
        bets += [self._tilt(theta * squares, shares, tau) for theta in SCALES]
        for word in SPECIAL:
            cells = np.asarray(layout.special[word], np.intp)
            bets += [self._rise(cells, rise, shares, effective) for rise in RISES]
        return np.array(bets)

    def _tilt(self, exponent: Floats, shares: Floats, tau: Floats) -> Floats:
        layout = self._layout
        ratio = np.exp(np.clip(exponent, -20, 20))
        mean = layout.sums(np.where(layout.ordered, shares * ratio, 0.0))
        total = layout.sums(np.where(layout.ordered, shares, 0.0))
        with np.errstate(invalid="ignore", divide="ignore"):
            normed = np.where(layout.ordered, ratio * layout.spread(total / mean), 1.0)
        return self._discounted(np.nan_to_num(normed, nan=1.0), shares, tau)

    def _rise(
        self, cells: npt.NDArray[np.intp], rise: float, shares: Floats, effective: Floats
    ) -> Floats:
        """A bet on one bin, where the channel has it."""
        layout = self._layout
        chosen = np.flatnonzero(cells >= 0)
        at = cells[chosen]
        before = shares[at]
        target = np.minimum(before + rise * np.sqrt(before * (1 - before)), 0.5 + before / 2)
        factor = np.ones(layout.n_channels)
        factor[chosen] = (1 - target) / (1 - before)
        ratio = layout.spread(factor)
        ratio[at] = target / before
        # How far above its share in the reference the truth may be, for bins of few rows.
        n = effective[chosen]
        highest = chi2_quantile(2 * (before * n + 1), self._z) / 2 / n
        off = (highest - before) / np.sqrt(before * (1 - before))
        tau = np.full(layout.n_channels, self._tolerated)
        tau[chosen] += np.maximum(self._z / np.sqrt(n), off)
        return self._discounted(ratio, shares, tau)

    def _discounted(self, ratio: Floats, shares: Floats, tau: Floats) -> Floats:
        layout = self._layout
        size = np.sqrt(layout.sums(shares * (ratio - 1) ** 2))
        discounted: Floats = np.log(ratio) - layout.spread(np.log1p(tau * size))
        discounted[layout.spread(size) < 1e-9] = 0.0
        return discounted


def discoveries(values: Floats, *, alpha: float = _ATTRIBUTION) -> list[int]:
    """Places of the e-values that e-BH calls discoveries, largest first.

    Notes
    -----
    The largest k for which the k-th largest value is at least n / (k alpha): at most a share alpha
    of what is named is false, in expectation, whatever the values depend on.
    Source: Wang, Ramdas (2022), J. R. Stat. Soc. B 84.

    >>> discoveries(np.array([0.4, 90.0, 1.0, 45.0]), alpha=0.05)
    [1, 3]
    """
    order = np.argsort(-values, kind="stable")
    n = values.size
    reached = np.flatnonzero(values[order] * np.arange(1, n + 1) * alpha >= n)
    found: list[int] = order[: int(reached[-1]) + 1].tolist() if reached.size else []
    return found


def chi2_quantile(freedom: Floats, z: float) -> Floats:
    """Quantile of the chi-square distribution at that of the normal one, by cube roots.

    Notes
    -----
    Source: Wilson, Hilferty (1931), PNAS 17.
    """
    part = 2 / (9 * freedom)
    quantile: Floats = freedom * np.maximum(1 - part + z * np.sqrt(part), 0.0) ** 3
    return quantile
