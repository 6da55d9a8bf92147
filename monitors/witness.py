"""Witness channels: what marginals miss. How a column lies among the others, and rows as a whole.

Every number of a row becomes the normal score of its bin. A column's witness is what is left of
its score when the others have said what they know of it (whitening), and the norm is how far the
row lies out, all together: when a correlation turns, no column changes, but these do. Integers
throughout, so that every way of cutting rows into batches gives the same bins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from monitors.channel import Channel
from monitors.layout import Floats, Places, normal_quantile

GROUP_MAX = 64
"""Columns that are whitened together at most: it costs so many multiplications a value."""
N_STEPS = 14
"""Bins of a witness: half standard deviations from -3.5 to 3.5, the outer ones open."""
NORM_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.99)
"""Quantiles of the reference between the bins of the norm."""
N_FAULTS = 6
"""Bins of the quality of rows: 0, 1, 2, 3, 4, and more values that cannot be right."""

_SCORE_STEPS = 2**8
_MATRIX_STEPS = 2**10
_RIDGE = 0.02
_ALONE_MAX = 250_000
_WIDTH = 0.5


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Columns that are whitened together."""

    names: tuple[str, ...]
    scores: tuple[npt.NDArray[np.int64], ...] = field(repr=False)
    """Per column: (n_bins,) score of each bin in steps of 1 / 256."""
    matrix: npt.NDArray[np.int64] = field(repr=False)
    """(n, n) inverse of the correlations of the scores, in steps of 1 / 1024."""
    scales: Floats = field(repr=False)
    """(n,) standard deviation of each witness in the reference, in steps."""
    edges: Floats = field(repr=False)
    """Edges between the bins of the norm, in steps, rising."""

    @property
    def n_channels(self) -> int:
        """A witness for each column, and the norm."""
        return len(self.names) + 1

    @cached_property
    def _matrix(self) -> Floats:
        return self.matrix.astype(np.float64)

    @cached_property
    def _factors(self) -> Floats:
        return (1 / (self.scales * _WIDTH))[:, np.newaxis]

    @cached_property
    def _table(self) -> tuple[Floats, Places]:
        """Scores of all columns one behind the other, and where each begins."""
        sizes = [scores.size for scores in self.scores]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.intp)
        return np.concatenate(self.scores).astype(np.float64), starts[:, np.newaxis]

    def place(self, bins: Places) -> Places:
        """(n + 1, n_rows) bin numbers of the witnesses and the norm.

        Parameters
        ----------
        bins : (n, n_rows) bin numbers of the columns
        """
        witnesses, norm = self.values(bins)
        witnesses *= self._factors
        witnesses += N_STEPS / 2
        np.clip(witnesses, 0, N_STEPS - 1, out=witnesses)
        places = np.empty((self.n_channels, bins.shape[1]), np.intp)
        places[:-1] = witnesses  # Rounds towards zero, which is down: nothing is below it.
        places[-1] = self.edges.searchsorted(norm)
        return places

    def values(self, bins: Places) -> tuple[Floats, Floats]:
        """(n, n_rows) witnesses and (n_rows,) norms, whole numbers of steps.

        Whole numbers below 2 ** 53 add up exactly in any order, and so do their products here.
        """
        table, starts = self._table
        scores = table[bins + starts]
        witnesses = np.empty_like(scores)
        # In parts too small for BLAS to start threads, which would fight the server's own.
        step = max(16, _ALONE_MAX // self.matrix.size)
        for start in range(0, scores.shape[1], step):
            part = slice(start, start + step)
            witnesses[:, part] = self._matrix @ scores[:, part]
        return witnesses, np.einsum("ij,ij->j", scores, witnesses)


@dataclass(frozen=True, eq=False, kw_only=True)
class Witness:
    """All witness channels of a profile."""

    groups: tuple[Group, ...]
    has_quality: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the channels, in the order of their cells."""
        names = [f"witness:{name}" for group in self.groups for name in (*group.names, "")]
        k = 0
        for place, name in enumerate(names):
            if name == "witness:":
                names[place] = f"witness:norm[{k}]" if len(self.groups) > 1 else "witness:norm"
                k += 1
        return (*names, "witness:quality") if self.has_quality else tuple(names)

    @property
    def features(self) -> tuple[str, ...]:
        """The column each is about, empty for the norm and the quality."""
        features = [name for group in self.groups for name in (*group.names, "")]
        return (*features, "") if self.has_quality else tuple(features)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bins of each channel."""
        sizes: list[int] = []
        for group in self.groups:
            sizes += [N_STEPS] * len(group.names) + [group.edges.size + 1]
        return (*sizes, N_FAULTS) if self.has_quality else tuple(sizes)

    @property
    def labels(self) -> tuple[str, ...]:
        """A label per cell."""
        steps = [_WIDTH * (k - N_STEPS / 2) for k in range(1, N_STEPS)]
        witness = [
            f"below {steps[0]:g} sd",
            *(f"{low:g} .. {low + _WIDTH:g} sd" for low in steps[:-1]),
            f"above {steps[-1]:g} sd",
        ]
        labels: list[str] = []
        for group in self.groups:
            labels += witness * len(group.names)
            labels += [f"norm rank {k}" for k in range(group.edges.size + 1)]
        if self.has_quality:
            labels += [f"{k} faults" for k in range(N_FAULTS - 1)] + [f"{N_FAULTS - 1}+ faults"]
        return tuple(labels)


def group_size(n_rows: int) -> int:
    """How many columns so many rows of a reference can whiten together.

    A matrix fitted on n rows leaves less than it will leave of other rows, by about 2 d / n of the
    variance; with n at least 2 d ^ 2 that is within what the reference's size allows for.
    """
    return min(GROUP_MAX, math.isqrt(n_rows // 2))


def scores_of(channel: Channel) -> npt.NDArray[np.int64]:
    """(n_bins,) normal scores of a channel's bins, in steps; 0 for bins without a place."""
    counts = channel.counts[: channel.n_ordered].astype(np.float64)
    scores = np.zeros(channel.n_bins)
    if counts.sum() > 0:
        shares = counts / counts.sum()
        raw = normal_quantile(np.cumsum(shares) - shares / 2)
        raw -= (shares * raw).sum()
        sd = math.sqrt(float((shares * raw**2).sum()))
        if sd > 0:
            scores[: channel.n_ordered] = np.clip(raw / sd, -3.9, 3.9)
    return np.rint(scores * _SCORE_STEPS).astype(np.int64)


def candidates(channels: Mapping[str, Channel]) -> list[str]:
    """Names of channels that have an order and more than one value in the reference."""
    return [
        name
        for name, channel in channels.items()
        if np.count_nonzero(channel.counts[: channel.n_ordered]) > 1
    ]


def fit_group(
    names: Sequence[str], scores: Sequence[npt.NDArray[np.int64]], bins: Sequence[npt.NDArray[Any]]
) -> Group:
    """Whiten these columns.

    Parameters
    ----------
    names, scores : of each column
    bins : parts of the reference, each (n_columns, n_rows) bin numbers
    """
    d = len(names)
    table = np.concatenate(scores).astype(np.float64)
    starts = np.concatenate([[0], np.cumsum([s.size for s in scores])[:-1]]).astype(np.intp)
    products = np.zeros((d, d))
    n_rows = 0
    for part in bins:
        rows = table[part + starts[:, np.newaxis]] / _SCORE_STEPS
        products += rows @ rows.T
        n_rows += part.shape[1]
    deviations = np.sqrt(np.maximum(np.diag(products) / n_rows, 1e-6))
    correlations = products / n_rows / np.outer(deviations, deviations)
    inverse = np.linalg.inv((1 - _RIDGE) * correlations + _RIDGE * np.eye(d))
    matrix = np.rint(inverse / np.outer(deviations, deviations) * _MATRIX_STEPS)
    # Steps of a matrix must stay small enough for exact products: rare columns are held back.
    limit = 2.0**20
    matrix = np.clip((matrix + matrix.T) // 2, -limit, limit).astype(np.int64)
    shell = Group(
        names=tuple(names),
        scores=tuple(scores),
        matrix=matrix,
        scales=np.ones(d),
        edges=np.zeros(0),
    )
    squares, norms = np.zeros(d), []
    for part in bins:
        witnesses, norm = shell.values(part)
        squares += (witnesses**2).sum(axis=1)
        norms.append(norm)
    edges = np.quantile(np.concatenate(norms), NORM_SHARES)
    return Group(
        names=tuple(names),
        scores=tuple(scores),
        matrix=matrix,
        scales=np.maximum(np.sqrt(squares / n_rows), 1.0),
        edges=np.unique(edges),
    )
