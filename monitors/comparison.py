"""Two versions side by side: whether rows of one lie as rows of the other do, at the same time.

There is no reference here that could be out of date: each block is rows of both, counted in the
same bins while the same things happened outside. So a daily rhythm, a holiday or a drift of all
traffic is no difference. What is bet on is which of the two a row belongs to, given its bin.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from monitors.budget import Budget
from monitors.counts import Counts, share
from monitors.detector import chi2_quantile, discoveries
from monitors.distance import jensen_shannon, l_infinity, psi
from monitors.errors import BlockError
from monitors.layout import Floats, Layout
from monitors.window import WINDOWS, WindowName, Windows

TILTS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)
"""Shifts, in standard deviations of the normal scores, that are bet on."""
HALF_LIVES = (100.0, 1_000.0, 20_000.0)
"""Rows of the candidate after which what was seen weighs half."""

_RATIO_MAX = 3.0
_PRIOR_ROWS = 20.0
_SLEEP = math.log(0.99)
_LOG_MAX = 200.0
_WON = math.log(100)
_LEAST = 0.05
_FIRST_S = 1.0
_Z_99 = 2.326348
_MOVED = 3
_STATE_FORMAT = 1
_KEPT = (
    "capital", "mass", "is_named", "run", "run_at", "run_row", "seen", "rows_seen", "rows_squared"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """A channel in which two versions differ, from the block that showed it on."""

    channel: str
    evidence: float
    """An e-value: its expectation is at most 1 while there is no difference."""
    since: float | None
    """Time of the block with which the evidence began."""
    since_row: int
    """Rows of the candidate before it."""
    at: float | None
    row: int
    moved: tuple[tuple[str, float, float], ...]
    """Bins that differ most: label, share of the other version, share of this one."""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        plain: dict[str, object] = {name: getattr(self, name) for name in self.__slots__}
        plain["evidence"] = min(self.evidence, 1e200)
        plain["moved"] = [
            {"bin": label, "against": theirs, "current": ours} for label, theirs, ours in self.moved
        ]
        return plain


class Comparison:
    """Evidence that one version's rows differ from another's, under its part of a budget.

    Parameters
    ----------
    layout : the bins that both are counted in
    budget : differences that may be told although there are none
    tolerance : distance between the two, in units of psi, that is no difference
    window_rows : rows of the candidate in the window "last"

    Notes
    -----
    The promise: while rows of both come from distributions within the tolerance of each other at
    any time, and sizes of blocks do not depend on what is in them, expected differences told are at
    most the budget's, however both move together. A difference is told once.

    In a block with n_a rows of one and n_b of the other, w = n_a / (n_a + n_b), and any guess r of
    the ratio of their shares per bin, bets on rows of either are

        a = r / (1 + w (r - 1)),   b = 1 / (1 + w (r - 1)) - w / (1 - w) kappa (a - 1)^2,

        log e = sum N_a log a + sum N_b log b - (n_a + n_b) log(1 + w tau^2 / (4 kappa)).

    With shares p of the other version and p' of this one, sum (p' - p)^2 / p <= tau^2, and
    s^2 = sum p (a - 1)^2: E[e] is at most the power n of (w sum p' a + (1 - w) sum p b) over the
    last bracket, by the means of numbers; sum p' a <= sum p a + tau s by Cauchy and Schwarz; and
    tau s <= tau^2 / (4 kappa) + kappa s^2. So E[e] <= 1 for whatever p is in that block. kappa is
    chosen where the last two meet for the s that is expected.

    Sources: Turner, Ly, Grunwald (2024), J. Stat. Plan. Inference 230 (e-values of two samples);
    Shin, Ramdas, Rinaldo (2023), arXiv 2203.03532.
    """

    def __init__(
        self, layout: Layout, budget: Budget, *, tolerance: float = 0.01, window_rows: int = 1000
    ) -> None:
        self.layout = layout
        self.budget = budget
        self.tolerance = tolerance
        self._owed = budget
        self._tau = math.sqrt(tolerance)
        scores = layout.scores(layout.shares)
        self._tilts = np.exp(np.clip(np.outer(TILTS, scores), -5, 5))
        channels, cells, memories = layout.n_channels, layout.n_cells, len(HALF_LIVES)
        experts = len(TILTS) + memories
        is_placed = np.ones((channels, experts), np.bool_)
        is_placed[:, : len(TILTS)] = (layout.sums(np.abs(scores)) > 0)[:, np.newaxis]
        self._within = is_placed / is_placed.sum(axis=1, keepdims=True)
        self._weights = self._within / max(channels, 1)
        self._capital = np.zeros((channels, experts))
        self._mass = np.zeros(channels)
        self._is_named = np.zeros(channels, np.bool_)
        self._run = np.zeros((channels, experts))
        self._run_at = np.full((channels, experts), np.nan)
        self._run_row = np.zeros((channels, experts), np.int64)
        # What was seen of late, of this version and of the other.
        self._seen = np.zeros((2, memories, cells))
        self._rows_seen = np.zeros((2, memories, channels))
        self._rows_squared = np.zeros((2, memories, channels))
        self._windows = Windows(2 * cells, window_rows)
        self._n_rows = 0
        self._at: float | None = None
        self._found: list[Difference] = []

    @property
    def n_rows(self) -> int:
        """Rows of the candidate that were judged."""
        return self._n_rows

    @property
    def at(self) -> float | None:
        """Time of the newest block."""
        return self._at

    @property
    def differences(self) -> tuple[Difference, ...]:
        """What was found, oldest first."""
        return tuple(self._found)

    @property
    def evidence(self) -> dict[str, float]:
        """E-value of every channel, 1 before anything was bet."""
        return dict(zip(self.layout.names, self._values().tolist(), strict=True))

    def spend(self, share: float) -> None:
        """Have this share of the budget from now on; see `Detector.spend`."""
        self.budget = self.budget.with_share(share)
        if share < self._owed.share:
            self._owed = self.budget

    def fold(self, ours: Counts, theirs: Counts, at: float | None = None) -> list[Difference]:
        """Judge one block.

        Parameters
        ----------
        ours, theirs : (n_cells,) rows of the candidate, and of the other version meanwhile
        at : time in seconds; needed under a budget in days

        Returns
        -------
        Differences that have just been found, strongest first.
        """
        layout = self.layout
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        n_a, n_b = layout.sums(a), layout.sums(b)
        rows = int(n_a.max(initial=0))
        if rows == 0:
            return []
        if at is None and self.budget.days is not None:
            raise BlockError("a budget in days needs the time of the rows: fold(..., at=...)")
        seconds = _FIRST_S if at is None or self._at is None else at - self._at
        spent = self.budget.spent(rows, seconds) * self._owed.levels[0]
        self._owed = self.budget
        is_judged = (n_a > 0) & (n_b > 0)
        gains = self._gains(a, b, n_a, n_b)
        gains /= layout.effects[:, np.newaxis]
        np.clip(gains, -_LOG_MAX, _LOG_MAX, out=gains)
        gains[~is_judged] = 0.0
        mass = spent * (is_judged & ~self._is_named)
        self._mass += mass
        self._capital += mass[:, np.newaxis]
        self._capital *= np.exp(gains)
        np.minimum(self._capital, 1e200, out=self._capital)
        self._follow(gains, at)
        self._remember((a, b), (n_a, n_b))
        self._windows.add(np.concatenate([ours, theirs]), rows, at)
        self._n_rows += rows
        self._at = at if at is not None else self._at
        found = self._judge()
        self._found += found
        return found

    def report(self, window: WindowName = "last") -> dict[str, object]:
        """Both versions in the same stretch of time, channel by channel, in plain JSON types.

        A score's `line` is what 99 % of such windows stay below while there is no difference.
        """
        if window not in WINDOWS:
            raise BlockError(f"window {window!r}: must be one of {', '.join(WINDOWS)}")
        chosen = self._windows.window(window)
        ours, theirs = np.split(chosen.counts, 2)
        values = self._values()
        return {
            "window": window,
            "n_rows": chosen.n_rows,
            "n_against": int(self.layout.sums(theirs).max(initial=0)),
            "is_partial": chosen.is_partial,
            "since": chosen.since,
            "until": chosen.until,
            "level": float((self._capital * self._weights).sum()),
            "channels": [
                self._channel(k, ours, theirs, float(values[k]))
                for k in range(self.layout.n_channels)
            ],
            "differences": [found.to_dict() for found in self._found],
        }

    def to_bytes(self) -> bytes:
        """Everything that it has seen and concluded; `restore` goes on from there."""
        about = {
            "format": _STATE_FORMAT,
            "names": list(self.layout.names),
            "n_rows": self._n_rows,
            "at": self._at,
            "found": [
                {name: getattr(found, name) for name in Difference.__slots__}
                for found in self._found
            ],
        }
        stream = io.BytesIO()
        np.savez(
            stream,
            allow_pickle=False,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            **{name: getattr(self, f"_{name}") for name in _KEPT},
            **{f"windows.{name}": array for name, array in self._windows.state().items()},
        )
        return stream.getvalue()

    def restore(self, state: bytes) -> None:
        """Go on from what `to_bytes` gave, to the last bit.

        Raises
        ------
        BlockError : it is of other bins, of another format, or damaged.
        """
        try:
            with np.load(io.BytesIO(state), allow_pickle=False) as file:
                arrays: Mapping[str, npt.NDArray[Any]] = {name: file[name] for name in file.files}
            about = json.loads(arrays["about"].tobytes())
            if about["format"] != _STATE_FORMAT or tuple(about["names"]) != self.layout.names:
                raise BlockError("state of a comparison: it is of another format or other bins")
            for name in _KEPT:
                mine = getattr(self, f"_{name}")
                setattr(self, f"_{name}", arrays[name].reshape(mine.shape).astype(mine.dtype))
            self._windows.restore(
                {n.removeprefix("windows."): a for n, a in arrays.items() if n[:8] == "windows."}
            )
            self._n_rows, self._at = about["n_rows"], about["at"]
            self._found = [
                Difference(**{**found, "moved": tuple(tuple(moved) for moved in found["moved"])})
                for found in about["found"]
            ]
        except (ValueError, KeyError, TypeError, OSError, BadZipFile, EOFError) as error:
            raise BlockError(f"state of a comparison: cannot be read ({error})") from error

    # -- inside

    def _values(self) -> Floats:
        gains = (self._capital * self._within).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            values: Floats = np.where(self._mass > 0, gains / self._mass, 1.0)
        return values

    def _gains(self, a: Floats, b: Floats, n_a: Floats, n_b: Floats) -> Floats:
        """(n_channels, n_experts) log of what each bet earned."""
        layout = self.layout
        learnt, is_awake = self._learnt()
        ratios = np.concatenate([self._tilted(), learnt])
        with np.errstate(invalid="ignore", divide="ignore"):
            w = np.nan_to_num(n_a / (n_a + n_b))
        log_a, log_b, log_cost, is_placed = bets(layout, ratios, w, self._theirs(1), self._tau)
        gains = layout.sums(log_a * a + log_b * b) - (n_a + n_b) * log_cost
        gains = np.where(is_placed, gains, 0.0).T
        gains[:, len(TILTS) :][~is_awake.T] = _SLEEP
        return np.asarray(gains, np.float64)

    def _theirs(self, memory: int) -> Floats:
        """(n_cells,) shares of the other version of late, those of the reference at first."""
        layout = self.layout
        rows = layout.spread(self._rows_seen[1, memory]) + _PRIOR_ROWS
        shares: Floats = (self._seen[1, memory] + _PRIOR_ROWS * layout.shares) / rows
        return shares

    def _tilted(self) -> Floats:
        """(n_tilts, n_cells) ratios of shifted scores; bins without a place keep theirs."""
        layout = self.layout
        shares = np.where(layout.ordered, self._theirs(1), 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = layout.sums(shares * self._tilts) / layout.sums(shares)
            ratios = np.where(layout.ordered, self._tilts / layout.spread(mean), 1.0)
        return np.nan_to_num(ratios, nan=1.0)

    def _learnt(self) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """(n_memories, n_cells) ratios that were seen, drawn to 1 by what chance would show."""
        layout = self.layout
        theirs = np.stack([self._theirs(m) for m in range(len(HALF_LIVES))])
        (seen, _), (n_a, n_b) = self._seen, self._rows_seen
        away = seen - layout.spread(n_a) * theirs
        away /= (layout.spread(n_a) + _PRIOR_ROWS) * theirs
        norm = np.sqrt(layout.sums(theirs * away**2))
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.nan_to_num(self._rows_squared[0] / (n_a + _PRIOR_ROWS) ** 2)
            spread += np.nan_to_num(self._rows_squared[1] / n_b**2)
            noise = np.sqrt((layout.sizes - 1) * spread * layout.effects)
            part = np.maximum(0.0, 1.0 - (noise + self._tau) / norm)
        part[~(norm > 0)] = 0.0
        return 1.0 + layout.spread(part) * away, part > 0

    def _follow(self, gains: Floats, at: float | None) -> None:
        """Keep where each expert's luck began."""
        was_down = self._run <= 0
        self._run += gains
        np.maximum(self._run, 0.0, out=self._run)
        begins = was_down & (self._run > 0)
        self._run_at[begins] = math.nan if at is None else at
        self._run_row[begins] = self._n_rows

    def _remember(self, blocks: tuple[Floats, Floats], rows: tuple[Floats, Floats]) -> None:
        keep = 0.5 ** (float(rows[0].max()) / np.array(HALF_LIVES))[:, np.newaxis]
        for side in (0, 1):
            self._seen[side] = self._seen[side] * keep + blocks[side]
            self._rows_seen[side] = self._rows_seen[side] * keep + rows[side]
            self._rows_squared[side] = self._rows_squared[side] * keep**2 + rows[side]

    def _judge(self) -> list[Difference]:
        won = np.where(self._run >= _WON, self._capital * self._weights, 0.0).sum(axis=1)
        if won.sum() < 1.0:
            return []
        order = np.argsort(-won, kind="stable")
        needed = int(np.searchsorted(np.cumsum(won[order]), 1.0)) + 1
        values = np.where(won > 0, self._values(), 0.0)
        named = set(order[: min(needed, order.size)].tolist()) | set(discoveries(values))
        found = []
        for k in sorted(named, key=lambda c: (-float(values[c]), c)):
            expert = int(self._run[k].argmax())
            since = float(self._run_at[k, expert])
            found.append(
                Difference(
                    channel=self.layout.names[k],
                    evidence=float(values[k]),
                    since=None if math.isnan(since) else since,
                    since_row=int(self._run_row[k, expert]),
                    at=self._at,
                    row=self._n_rows,
                    moved=self._moved(k),
                )
            )
            self._is_named[k] = True
            self._capital[k] = 0.0
        return found

    def _moved(self, channel: int) -> tuple[tuple[str, float, float], ...]:
        cells = self._cells(channel)
        rows = self._seen[0, 1, cells]
        if not rows.sum() > 0:
            return ()
        ours, theirs = rows / rows.sum(), self._theirs(1)[cells]
        by_move = (ours - theirs) * np.log(np.maximum(ours, 1e-4) / np.maximum(theirs, 1e-4))
        labels = self.layout.labels[cells]
        return tuple(
            (labels[b], float(theirs[b]), float(ours[b]))
            for b in np.argsort(-by_move, kind="stable")[:_MOVED].tolist()
            if by_move[b] > 0
        )

    def _channel(
        self, channel: int, ours: Counts, theirs: Counts, evidence: float
    ) -> dict[str, object]:
        cells = self._cells(channel)
        a, b = ours[cells], theirs[cells]
        n, m = int(a.sum()), int(b.sum())
        scores: dict[str, object] = {}
        if n and m:
            freedom = np.array([max(int(np.count_nonzero(a + b)) - 1, 1)], np.float64)
            line = float(chi2_quantile(freedom, _Z_99)[0]) * (1 / n + 1 / m)
            value = float(psi(b, a))
            scores = {
                "psi": {"value": value, "line": line, "is_above": value > line},
                "jensen_shannon": {"value": float(jensen_shannon(b, a))},
                "l_infinity": {"value": float(l_infinity(b, a))},
            }
        return {
            "name": self.layout.names[channel],
            "feature": self.layout.features[channel],
            "n_rows": n,
            "n_against": m,
            "scores": scores,
            "evidence": min(evidence, 1e200),
            "bins": list(self.layout.labels[cells]),
            "against": share(b).tolist() if m else [],
            "current": share(a).tolist() if n else [],
        }

    def _cells(self, channel: int) -> slice:
        start = int(self.layout.starts[channel])
        return slice(start, start + int(self.layout.sizes[channel]))


def bets(
    layout: Layout, ratios: Floats, w: Floats, theirs: Floats, tau: float
) -> tuple[Floats, Floats, Floats, npt.NDArray[np.bool_]]:
    """What bets on the ratios of shares earn, so that E[e] <= 1 for any shares within tau.

    Parameters
    ----------
    ratios : (n_bets, n_cells) share of this version over share of the other, guessed
    w : (n_channels,) part of the rows of a block that are this version's
    theirs : (n_cells,) shares of the other version, guessed: they only say how to bet, not whether
        it is fair
    tau : distance that is no difference: sum (p' - p)^2 / p <= tau^2

    Returns
    -------
    (n_bets, n_cells) log of what a row of this version earns, and one of the other; (n_bets,
    n_channels) log of what each row costs, and whether the bet is placed.
    """
    ratios = np.clip(ratios, 1 / _RATIO_MAX, _RATIO_MAX)
    part = layout.spread(w)
    b = 1.0 / (1.0 + part * (ratios - 1.0))
    a = ratios * b
    size = np.maximum(np.sqrt(layout.sums(theirs * (a - 1.0) ** 2)), 1e-3)
    kappa = tau / (2.0 * size)
    with np.errstate(invalid="ignore", divide="ignore"):
        charge = layout.spread(np.where(w < 1, w / (1.0 - w), 0.0)) * layout.spread(kappa)
    b = b - charge * (a - 1.0) ** 2
    # A bet that could lose everything on one row is not placed.
    is_placed = np.minimum.reduceat(b, layout.starts, axis=-1) >= _LEAST
    log_b = np.log(np.maximum(b, _LEAST))
    return np.log(a), log_b, np.log1p(w * tau * size / 2.0), is_placed
