"""Labelled predictions as counts: how wrong each was, and what came of what was foreseen.

A labelled row has a loss, and something that was foreseen did or did not happen. The loss is
compared with the reference's. What was foreseen is cut into parts, and each part is a channel by
itself: how often it happened there, in the reference and of late. So rows that move from one part
to another, as they do when inputs drift, are no evidence; only what their scores mean is.
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from monitors import season
from monitors.cbpe import SCORE_BINS, Calibration
from monitors.counts import Counts
from monitors.document import Part, parse
from monitors.errors import BlockError, ProfileError
from monitors.layout import SPECIAL, Floats, Layout

Task: TypeAlias = Literal["binary", "multiclass", "regression"]
TASKS: tuple[Task, ...] = get_args(Task)

FORMAT = 1
"""Of the reference's JSON; a reader refuses larger ones."""
ROWS_MIN = 200
"""Labelled rows that a reference must have."""

_LOSS_BINS = 10
_PARTS_MAX = 5
_PART_ROWS_MIN = 200
_CLIP = 1e-7


@dataclass(frozen=True, eq=False, slots=True)
class Outcomes:
    """Labelled rows: how wrong each was, and whether what was foreseen happened."""

    task: Task
    loss: Floats
    """(n,) log loss in nats, 0 or 1 for classes without probabilities, or squared error."""
    foreseen: npt.NDArray[Any]
    """(n,) the score, the confidence, the number predicted; or the class, as text."""
    happened: npt.NDArray[np.bool_]
    """(n,) class 1 came; the class was right; the actual number lies above."""

    @property
    def n_rows(self) -> int:
        """Rows."""
        return self.loss.size

    def __getitem__(self, rows: slice) -> "Outcomes":
        return Outcomes(self.task, self.loss[rows], self.foreseen[rows], self.happened[rows])

    @classmethod
    def binary(cls, scores: npt.ArrayLike, labels: npt.ArrayLike) -> "Outcomes":
        """Of probabilities of class 1, and labels 0 and 1."""
        p, y = _alike(scores, labels)
        if not ((p >= 0) & (p <= 1)).all():
            raise BlockError("a score is not a probability: it must be from 0 to 1")
        if not np.isin(y, (0.0, 1.0)).all():
            raise BlockError("a label is neither 0 nor 1")
        sure = np.clip(p, _CLIP, 1 - _CLIP)
        loss = -np.where(y > 0, np.log(sure), np.log1p(-sure))
        return cls("binary", loss, p, y > 0)

    @classmethod
    def numbers(cls, predicted: npt.ArrayLike, actual: npt.ArrayLike) -> "Outcomes":
        """Of numbers predicted, and what they turned out to be."""
        p, a = _alike(predicted, actual)
        return cls("regression", (p - a) ** 2, p, a > p)

    @classmethod
    def probabilities(cls, scores: npt.ArrayLike, labels: npt.ArrayLike) -> "Outcomes":
        """Of (n, n_classes) probabilities, and the numbers of the classes that came."""
        p, y = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
        if p.ndim != 2 or y.shape != p.shape[:1]:
            raise BlockError(f"scores of shape {p.shape}, labels of shape {y.shape}")
        k = y.astype(np.intp)
        if ((k != y) | (k < 0) | (k >= p.shape[1])).any():
            raise BlockError(f"a label is no class: there are {p.shape[1]}, counted from 0")
        given = p[np.arange(k.size), k]
        return cls(
            "multiclass", -np.log(np.clip(given, _CLIP, 1.0)), p.max(axis=1), p.argmax(axis=1) == k
        )

    @classmethod
    def classes(cls, predicted: npt.ArrayLike, labels: npt.ArrayLike) -> "Outcomes":
        """Of classes by name, without probabilities."""
        named, came = (np.array([str(v) for v in np.asarray(a, object)], object)
                       for a in (predicted, labels))  # fmt: skip
        if named.shape != came.shape:
            raise BlockError(f"predictions of shape {named.shape}, labels of shape {came.shape}")
        right = (named == came).astype(np.bool_)
        return cls("multiclass", 1.0 - right, named, right)


@dataclass(frozen=True, eq=False, kw_only=True)
class LossReference:
    """Labelled rows of a healthy time, as counts."""

    task: Task
    n_rows: int
    loss_mean: float
    loss_edges: Floats
    """(n_bins - 1,) a row is in the first bin whose edge is not below its loss."""
    loss_counts: Counts
    parts: Floats | tuple[str, ...]
    """Edges between parts of what was foreseen, or the classes that are parts."""
    part_counts: Counts
    """(n_parts, 2) rows of each part for which it did not happen, and did."""
    effects: Floats = field(repr=False)
    """(n_channels,) rows that are worth one independent row."""
    calibration: Calibration | None = field(default=None, repr=False)
    """What scores are worth, of a binary task."""
    lineage: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        rows: Outcomes,
        *,
        is_ordered: bool = False,
        lineage: Mapping[str, object] | None = None,
    ) -> "LossReference":
        """Summarise labelled rows.

        Parameters
        ----------
        rows : that the model was not trained on: on others it is better than it will ever be
        is_ordered : they are in the order of time, so that it can be learnt how much they repeat
            each other

        Raises
        ------
        BlockError : there are fewer than ROWS_MIN, or a loss is not finite.
        """
        if rows.n_rows < ROWS_MIN:
            raise BlockError(f"{rows.n_rows} labelled rows; a reference needs {ROWS_MIN}")
        if not np.isfinite(rows.loss).all():
            raise BlockError("a loss is not finite: a prediction or a label is missing")
        edges = np.unique(np.quantile(rows.loss, np.arange(1, _LOSS_BINS) / _LOSS_BINS))
        edges = edges[edges < rows.loss.max()]
        n_parts = int(np.clip(rows.n_rows // _PART_ROWS_MIN, 1, _PARTS_MAX))
        parts: Floats | tuple[str, ...]
        if rows.foreseen.dtype == object:
            names, counts = np.unique(rows.foreseen.astype(str), return_counts=True)
            parts = tuple(names[np.argsort(-counts, kind="stable")][:n_parts].tolist())
        else:
            parts = np.unique(np.quantile(rows.foreseen, np.arange(1, n_parts) / n_parts))
            parts = parts[parts < rows.foreseen.max()]
        n_channels = 1 + (len(parts) if isinstance(parts, tuple) else parts.size + 1)
        shell = cls(
            task=rows.task,
            n_rows=rows.n_rows,
            loss_mean=float(rows.loss.mean()),
            loss_edges=edges,
            loss_counts=np.zeros(edges.size + 1, np.int64),
            parts=parts,
            part_counts=np.zeros((n_channels - 1, 2), np.int64),
            effects=np.ones(n_channels),
            calibration=_calibration(rows),
            lineage=MappingProxyType(json.loads(json.dumps(dict(lineage or {})))),
        )
        cells = shell.cells(rows)
        plain = replace(
            shell,
            loss_counts=cells[: edges.size + 1],
            part_counts=cells[edges.size + 1 :].reshape(-1, 2),
        )
        return replace(plain, effects=_effects(plain, rows)) if is_ordered else plain

    @cached_property
    def layout(self) -> Layout:
        """A channel for the loss, and one for each part."""
        edges = [f"{edge:.3g}" for edge in (0.0, *self.loss_edges)]
        labels = [f"{a} .. {b}" for a, b in zip(edges, [*edges[1:], "..."], strict=True)]
        words = _WORDS[self.task]
        labels += [word for _ in range(len(self.part_counts)) for word in words]
        sizes = [self.loss_counts.size, *[2] * len(self.part_counts)]
        counts = np.concatenate([self.loss_counts, self.part_counts.ravel()])
        return Layout(
            names=("loss", *(f"calibration:{part}" for part in self.part_names)),
            features=("loss", *["calibration"] * len(self.part_counts)),
            sizes=np.array(sizes, np.intp),
            n_ordered=np.array(sizes, np.intp),
            counts=counts,
            doubt=np.full(counts.size, 0.5),
            labels=tuple(labels),
            special={word: [-1] * len(sizes) for word in SPECIAL},
            effects=self.effects,
        )

    @cached_property
    def part_names(self) -> tuple[str, ...]:
        """What each part is called."""
        if isinstance(self.parts, tuple):
            return self.parts
        edges = ["", *(f"{edge:.3g}" for edge in self.parts), ""]
        return tuple(f"{a}..{b}" for a, b in itertools.pairwise(edges))

    def cells(self, rows: Outcomes) -> Counts:
        """(n_cells,) rows in the cells of the layout; those of no part are in the loss only."""
        loss = np.searchsorted(self.loss_edges, rows.loss)
        if isinstance(self.parts, tuple):
            places = {name: k for k, name in enumerate(self.parts)}
            part = np.array([places.get(name, -1) for name in rows.foreseen.tolist()], np.intp)
        else:
            part = np.searchsorted(self.parts, rows.foreseen.astype(np.float64))
        n_parts = len(self.part_counts)
        cells = 2 * part + rows.happened
        by_part = np.bincount(cells[part >= 0], minlength=2 * n_parts)
        return np.concatenate([np.bincount(loss, minlength=self.loss_counts.size), by_part])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical text, in hexadecimal."""
        return sha256(self.to_json().encode("ascii")).hexdigest()

    def to_json(self) -> str:
        """Write canonical JSON: equal references give equal texts."""
        document = {
            "format": FORMAT,
            "task": self.task,
            "n_rows": self.n_rows,
            "loss": {
                "mean": self.loss_mean,
                "edges": self.loss_edges.tolist(),
                "counts": self.loss_counts.tolist(),
            },
            "parts": list(self.parts) if isinstance(self.parts, tuple) else self.parts.tolist(),
            "part_counts": self.part_counts.tolist(),
            "effects": self.effects.tolist(),
            "calibration": None if self.calibration is None else self.calibration.shares.tolist(),
            "lineage": dict(self.lineage),
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "LossReference":
        """Read what to_json wrote; ProfileError says which part of anything else is wrong."""
        document = Part(parse(text))
        task = document.get("task", str)  # first: a profile of inputs has none
        number = document.integer("format")
        if number != FORMAT:
            raise ProfileError(f"format {number}, this driftgate reads {FORMAT}", field="format")
        if task not in TASKS:
            raise document.error(f"must be one of {', '.join(TASKS)}", "task")
        loss = Part(document.get("loss", dict))
        edges, parts = _edges(loss, "edges"), _parts(document)
        n_parts = len(parts) if isinstance(parts, tuple) else parts.size + 1
        effects = document.numbers("effects", (n_parts + 1,))
        if np.isnan(effects).any() or (effects < 1).any():
            raise document.error("must be at least 1", "effects")
        mean = loss.float_or_none("mean")
        if math.isnan(mean):
            raise loss.error("must be a number", "mean")
        found = cls(
            task=task,
            n_rows=document.integer("n_rows", low=ROWS_MIN),
            loss_mean=mean,
            loss_edges=edges,
            loss_counts=loss.integers("counts", (edges.size + 1,)),
            parts=parts,
            part_counts=document.integers("part_counts", (n_parts, 2)),
            effects=effects,
            calibration=_shares(document),
            lineage=MappingProxyType(document.get("lineage", dict)),
        )
        loss.finish({"mean", "edges", "counts"})
        document.finish({
            "format", "task", "n_rows", "loss", "parts", "part_counts", "effects", "calibration",
            "lineage",
        })  # fmt: skip
        if int(found.loss_counts.sum()) != found.n_rows:
            raise loss.error(f"must add up to {found.n_rows} rows", "counts")
        return found

    def is_worse(self, channel: int, late: Floats) -> bool:
        """Whether what moved is for the worse.

        A lower loss is not; nor are more right answers. That other things happen than scores say
        always is.

        Parameters
        ----------
        late : (n_cells,) rows of late
        """
        start, size = int(self.layout.starts[channel]), int(self.layout.sizes[channel])
        cells = slice(start, start + size)
        order = np.arange(size)
        before = float(np.average(order, weights=self.layout.shares[cells]))
        rows = late[cells]
        now = float(np.average(order, weights=rows)) if rows.sum() > 0 else before
        if channel == 0:
            return now >= before
        return self.task != "multiclass" or now <= before


_WORDS: Mapping[Task, tuple[str, str]] = {
    "binary": ("did not come true", "came true"),
    "multiclass": ("were wrong", "were right"),
    "regression": ("were too high", "were too low"),
}


def _alike(a: npt.ArrayLike, b: npt.ArrayLike) -> tuple[Floats, Floats]:
    one, other = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if one.shape != other.shape or one.ndim != 1:
        raise BlockError(f"predictions of shape {one.shape}, labels of shape {other.shape}")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise BlockError("a prediction or a label is not finite")
    return one, other


def _calibration(rows: Outcomes) -> Calibration | None:
    if rows.task != "binary" or rows.happened.all() or not rows.happened.any():
        return None
    return Calibration.fit(rows.foreseen, rows.happened)


def _effects(reference: LossReference, rows: Outcomes) -> Floats:
    """How much rows that follow each other repeat each other."""
    layout = reference.layout
    base = season.base_rows(rows.n_rows)
    blocks = np.array([
        reference.cells(rows[start : start + base])
        for start in range(0, rows.n_rows - base + 1, base)
    ])  # fmt: skip
    shares = layout.counts / np.maximum(layout.spread(layout.n_reference), 1)
    expected = shares * layout.spread(layout.sums(blocks.astype(np.float64)))
    return season.design_effects(layout, blocks, expected)


def _edges(part: Part, name: str) -> Floats:
    values = part.numbers(name, (-1,)) if part.get(name, list) else np.zeros(0)
    if np.isnan(values).any() or not (np.diff(values) > 0).all():
        raise part.error("must rise", name)
    return values


def _parts(document: Part) -> Floats | tuple[str, ...]:
    values = document.get("parts", list)
    is_named = bool(values) and isinstance(values[0], str)
    return document.texts("parts") if is_named else _edges(document, "parts")


def _shares(document: Part) -> Calibration | None:
    if document.is_null("calibration"):
        return None
    shares = document.numbers("calibration", (SCORE_BINS,))
    if not ((shares >= 0) & (shares <= 1)).all():
        raise document.error("must hold shares", "calibration")
    return Calibration(shares)
