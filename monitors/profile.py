"""Reference profile: what each channel looked like in the training data; to and from JSON.

No rows are kept: edges, level names, means and counts only. The text is canonical, so that equal
profiles have equal digests, and every part of a text is checked before it is believed.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from monitors import season
from monitors.binner import Binner
from monitors.channel import (
    BooleanChannel,
    CategoricalChannel,
    Channel,
    Kind,
    NumericChannel,
    as_column,
    fit,
    only_extremes,
)
from monitors.counts import Counts
from monitors.document import COUNT_MAX, Part, parse
from monitors.errors import ProfileError
from monitors.layout import SPECIAL, Floats, Layout, Places
from monitors.season import Order
from monitors.summary import is_wide, summarised
from monitors.witness import (
    Group,
    Witness,
    candidates,
    fit_group,
    group_size,
    scores_of,
)

FORMAT = 2
"""Number of the format; a reader refuses larger ones. A profile that knows no more than format 1
can say is written as that, so that equal profiles keep their digests."""

Progress: TypeAlias = Callable[[float], None]
"""Is told the share done, 0 to 1."""

SEGMENTS_MAX = 8
"""Values of the segments' column that are watched by themselves, the most frequent ones."""

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False, kw_only=True)
class Segments:
    """Rows of the reference by the value of one column: the same bins, for each value."""

    field: str
    counts: Mapping[str, Counts]
    """Value -> (n_cells,) rows."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Bins and reference counts of every channel, in the order of the columns."""

    channels: Mapping[str, Channel]
    n_rows: int
    lineage: Mapping[str, object]
    """Where the reference came from; free, kept on the way through JSON."""
    witness: Witness | None = None
    """Channels that are made of the others."""
    witness_counts: Counts = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    """(n,) rows in the cells of the witness channels."""
    order: Order | None = None
    """What a reference in the order of time has taught: seasons and design effects."""
    segments: Segments | None = None

    @classmethod
    def fit(
        cls,
        columns: Mapping[str, npt.ArrayLike],
        *,
        n_bins: int = 10,
        levels_max: int = 50,
        lineage: Mapping[str, object] | None = None,
        times: npt.ArrayLike | None = None,
        is_ordered: bool = False,
        has_witness: bool = True,
        segments: str | None = None,
        progress: Progress = lambda _: None,
    ) -> "Profile":
        """Summarise reference columns of equal length.

        Parameters
        ----------
        columns : name -> (n_rows,) numbers, booleans or strings; None and nan are missing.
            Numbers must have the type in which they will be served. Arrays (n_rows, ...) of
            numbers, as embeddings and images are, are watched by their norm and eight projections.
        n_bins : bins of a numeric column, beside those for atoms, out of range and missing
        levels_max : levels of a categorical column with a bin of their own
        lineage : anything JSON can hold
        times : (n_rows,) seconds since 1970 (UTC) of each row; rows are then put in this order, and
            the hours of the day or week and the design effects are learnt from it
        is_ordered : the rows are in the order of time already, which is not known: design effects
            are learnt, seasons are not
        has_witness : whether to watch how columns lie among each other, too
        segments : the column whose most frequent values are watched by themselves, too
        progress : is told the share done

        Raises
        ------
        ProfileError : names the column that is empty, too short, or of a type without bins.
        """
        if n_bins < 2 or levels_max < 1:
            raise ProfileError(f"n_bins = {n_bins}, levels_max = {levels_max}: too few bins")
        if not columns:
            raise ProfileError("no columns")
        channels: dict[str, Channel] = {}
        kept: dict[str, npt.NDArray[Any]] = {}
        n_rows = -1
        for name, values in _expanded(columns).items():
            if not isinstance(name, str) or not name:
                raise ProfileError(f"a column's name must be a text, got {name!r}")
            column = _read_column(name, values)
            n_rows = column.size if n_rows < 0 else n_rows
            if column.size != n_rows:
                raise ProfileError(
                    f"{column.size} rows, the columns before it have {n_rows}", channel=name
                )
            if not n_rows:
                raise ProfileError("no rows", channel=name)
            kept[name] = column
            channels[name] = fit(name, column, n_bins=n_bins, levels_max=levels_max)
            progress(0.5 * len(channels) / len(columns))
        if segments is not None and segments not in channels:
            raise ProfileError("there is no such column to tell segments by", channel=segments)
        plain = cls(MappingProxyType(channels), n_rows, _read_lineage(lineage or {}))
        moments = None if times is None else _read_times(times, n_rows)
        learn = _Learn(plain, kept, moments, is_ordered, segments, progress)
        return learn.all(has_witness=has_witness)

    def select(self, names: Sequence[str]) -> "Profile":
        """The profile of these channels only, in this order.

        Witnesses stay where all columns that they are made of do.
        """
        for name in names:
            if name not in self.channels:
                raise ProfileError("there is no such channel", channel=name)
        chosen = {name: self.channels[name] for name in names}
        shell = Profile(MappingProxyType(chosen), self.n_rows, self.lineage)
        if self.witness is None:
            witness = None
        else:
            groups = [group for group in self.witness.groups if set(group.names) <= set(chosen)]
            is_whole = self.witness.has_quality and set(chosen) == set(self.channels)
            witness = Witness(groups=tuple(groups), has_quality=is_whole)
        shell = replace(shell, witness=witness)
        rows, cells = self._kept(shell)
        order, segments = self.order, self.segments
        n_marginal = sum(channel.n_bins for channel in shell)
        return replace(
            shell,
            witness_counts=self.layout.counts[cells][n_marginal:],
            order=None if order is None else Order(
                effects=order.effects[rows], pulls=order.pulls[rows], counts=order.counts[:, cells]
            ),
            segments=None if segments is None or segments.field not in chosen else Segments(
                field=segments.field,
                counts={value: counts[cells] for value, counts in segments.counts.items()},
            ),
        )  # fmt: skip

    def cells_in(self, whole: "Profile") -> Places:
        """(n_cells,) the cell in the layout of the whole of each that was selected of it."""
        return whole._kept(self)[1]  # noqa: SLF001  its own kind

    def _kept(self, part: "Profile") -> tuple[Places, Places]:
        """Channels and cells of this layout that a part of this profile has, in its order."""
        places = {name: k for k, name in enumerate(self.layout.names)}
        wanted = (*part.channels, *(part.witness.names if part.witness is not None else ()))
        rows = np.array([places[_whole_norm(name, places)] for name in wanted], np.intp)
        starts, sizes = self.layout.starts[rows], self.layout.sizes[rows]
        spans = [np.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)]
        return rows, np.concatenate(spans) if spans else np.zeros(0, np.intp)

    def rebased(self, counts: Counts, lineage: Mapping[str, object]) -> "Profile":
        """The same bins with other rows as the reference: a new normal, or another version's rows.

        Parameters
        ----------
        counts : (n_cells,) rows in the cells of `layout`, as a monitor counts them

        Raises
        ------
        ProfileError : no channel has rows. One without keeps those of this profile.
        """
        layout = self.layout
        if counts.shape != layout.counts.shape:
            raise ProfileError(f"{counts.size} cells, the profile has {layout.n_cells}")
        rows = layout.sums(counts)
        n_rows = int(rows.max(initial=0))
        if not n_rows:
            raise ProfileError("no rows to become the reference")
        kept = np.where(layout.spread(rows > 0), counts, layout.counts)
        channels = {}
        for k, (name, channel) in enumerate(self.channels.items()):
            start = int(layout.starts[k])
            own = kept[start : start + channel.n_bins].copy()
            own.flags.writeable = False
            channels[name] = replace(channel, counts=own)
        n_marginal = sum(channel.n_bins for channel in self)
        order = self.order and Order(
            effects=self.order.effects,
            pulls=np.full(layout.n_channels, np.inf),
            counts=np.zeros((0, layout.n_cells), np.int64),
        )
        return Profile(
            MappingProxyType(channels), n_rows, _read_lineage(lineage),
            witness=self.witness, witness_counts=kept[n_marginal:], order=order,
        )  # fmt: skip

    def to_json(self) -> str:
        """Write canonical JSON: equal profiles give equal texts."""
        document = {
            "format": 1,
            "n_rows": self.n_rows,
            "lineage": dict(self.lineage),
            "channels": [_write_channel(channel) for channel in self.channels.values()],
        }
        if self.witness is not None or self.order is not None or self.segments is not None:
            document |= {"format": FORMAT} | _write_learnt(self)
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Profile":
        """Read what to_json wrote; ProfileError says which part of anything else is wrong."""
        document = Part(parse(text))
        number = document.integer("format")
        if not 1 <= number <= FORMAT:
            raise ProfileError(
                f"format {number}, this driftgate reads formats 1 to {FORMAT}; fit the profile"
                " again, or use the driftgate that wrote it",
                field="format",
            )
        n_rows = document.integer("n_rows", low=1)
        lineage = document.get("lineage", dict)
        channels: dict[str, Channel] = {}
        for place, entry in enumerate(document.get("channels", list)):
            if not isinstance(entry, dict):
                raise ProfileError("must be an object", field=f"channels[{place}]")
            name = entry.get("name")
            if not isinstance(name, str) or not name:
                raise ProfileError("must be a text", field=f"channels[{place}].name")
            if name in channels:
                raise ProfileError("there are two of this name", channel=name)
            channels[name] = _read_channel(Part(entry, name), name, n_rows)
        fields = {"format", "n_rows", "lineage", "channels"}
        document.finish(fields | (set(_LEARNT) if number > 1 else set()))
        plain = cls(MappingProxyType(channels), n_rows, _read_lineage(lineage))
        return _read_learnt(document, plain) if number > 1 else plain

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical text, in hexadecimal."""
        return sha256(self.to_json().encode("ascii")).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Profile) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __iter__(self) -> Iterator[Channel]:
        return iter(self.channels.values())

    @cached_property
    def width(self) -> int:
        """Bins of the channel that has most of them."""
        return max((channel.n_bins for channel in self), default=1)

    @cached_property
    def counts(self) -> Counts:
        """(n_channels, width) reference rows per bin, zeros behind a channel's last bin."""
        table = np.zeros((len(self.channels), self.width), np.int64)
        for row, channel in zip(table, self, strict=True):
            row[: channel.n_bins] = channel.counts
        table.flags.writeable = False
        return table

    @cached_property
    def layout(self) -> Layout:
        """All channels side by side, witnesses behind the columns."""
        return _layout(self)

    @cached_property
    def binner(self) -> Binner:
        """Places rows into the cells of the layout."""
        return Binner(self.channels, self.witness)

    def of_segment(self, value: str) -> Layout:
        """The layout with the rows of one segment as the reference."""
        assert self.segments is not None  # noqa: S101  asked for by its own value
        counts = self.segments.counts[value]
        rows = self.layout.sums(counts)
        return replace(
            self.layout,
            counts=np.where(self.layout.spread(rows > 0), counts, self.layout.counts),
            seasons=None,
            pulls=None,
        )


def _layout(profile: Profile) -> Layout:
    channels = list(profile.channels.values())
    witness, order = profile.witness, profile.order
    sizes = [channel.n_bins for channel in channels]
    n_ordered = [channel.n_ordered for channel in channels]
    labels = [label for channel in channels for label in channel.bins]
    doubt = [channel.doubt for channel in channels]
    names, features = list(profile.channels), list(profile.channels)
    counts = [channel.counts for channel in channels]
    if witness is not None:
        sizes += witness.sizes
        n_ordered += witness.sizes
        labels += witness.labels
        doubt.append(np.full(sum(witness.sizes), 0.5))
        counts.append(profile.witness_counts)
        names += witness.names
        features += witness.features
    special = {word: np.full(len(sizes), -1) for word in SPECIAL}
    start = 0
    for k, channel in enumerate(channels):
        bins = dict(zip(("missing", "invalid"), channel.missing_bins, strict=True))
        if channel.n_ordered > 1:
            bins |= {"below": 0, "above": channel.n_ordered - 1}
        if channel.unseen_bin is not None:
            bins |= {"other": channel.unseen_bin - 1, "unseen": channel.unseen_bin}
        for word, number in bins.items():
            special[word][k] = start + number
        start += channel.n_bins
    return Layout(
        names=tuple(names),
        features=tuple(features),
        sizes=np.array(sizes, np.intp),
        n_ordered=np.array(n_ordered, np.intp),
        counts=np.concatenate(counts) if counts else np.zeros(0, np.int64),
        doubt=np.concatenate(doubt) if doubt else np.zeros(0),
        labels=tuple(labels),
        special={word: cells.tolist() for word, cells in special.items()},
        effects=np.ones(len(sizes)) if order is None else order.effects,
        seasons=order.counts if order is not None and order.n_slots else None,
        pulls=order.pulls if order is not None and order.n_slots else None,
    )


class _Learn:
    """What is learnt of a reference beyond its columns: witnesses, order, segments.

    In passes over parts of the rows, so that memory is bounded.
    """

    def __init__(
        self,
        profile: Profile,
        columns: dict[str, npt.NDArray[Any]],
        times: Floats | None,
        is_ordered: bool,
        segments: str | None,
        progress: Progress,
    ) -> None:
        self._profile = profile
        self._columns = columns
        self._times = times
        self._is_ordered = is_ordered or times is not None
        self._segments = segments
        self._progress = progress
        if times is not None:
            sequence = np.argsort(times, kind="stable")
            if not np.array_equal(sequence, np.arange(sequence.size)):
                self._columns = {name: column[sequence] for name, column in columns.items()}
                self._times = times[sequence]

    def all(self, *, has_witness: bool) -> Profile:
        """The profile with everything."""
        profile = self._profile
        if has_witness:
            profile = replace(profile, witness=self._witness())
        if profile.witness is None and not self._is_ordered and self._segments is None:
            return profile
        binner = profile.binner
        n = profile.n_rows
        slots = season.n_slots(self._times) if self._times is not None else 0
        base = season.base_rows(n) if self._is_ordered else n
        blocks = np.zeros((n // base if self._is_ordered else 0, binner.n_cells), np.int64)
        hours = np.zeros((slots, binner.n_cells), np.int64)
        total = np.zeros(binner.n_cells, np.int64)
        values, of_row = self._segment_values()
        by_value = np.zeros((len(values), binner.n_cells), np.int64)
        exposed = np.zeros((blocks.shape[0], slots), np.int64)
        step = max(1, _ROWS_AT_ONCE // base) * base if self._is_ordered else _ROWS_AT_ONCE
        for start in range(0, n, step):
            stop = min(start + step, n)
            cells = binner.cells(self._columns, start, stop)
            self._judge(profile, cells[-1], start)
            total += _counted(cells, None, 1, binner.n_cells)[0]
            rows = np.arange(start, stop)
            if blocks.size:
                first = start // base
                last = min(-(-stop // base), blocks.shape[0])
                if last > first:
                    whole = (last * base - start) if last * base < stop else stop - start
                    blocks[first:last] += _counted(
                        cells[:, :whole], (rows[:whole] // base) - first, last - first,
                        binner.n_cells,
                    )  # fmt: skip
            if slots:
                moments = self._times[start:stop]  # type: ignore[index]  # slots need times
                slot = (moments // season.HOUR_S).astype(np.int64) % slots
                hours += _counted(cells, slot, slots, binner.n_cells)
                np.add.at(exposed, (np.minimum(rows // base, len(exposed) - 1), slot), 1)
            if values:
                by_value += _counted(cells, of_row[start:stop], len(values) + 1, binner.n_cells)[
                    : len(values)
                ]
            self._progress(0.6 + 0.4 * stop / n)
        n_marginal = sum(channel.n_bins for channel in profile)
        profile = replace(profile, witness_counts=total[n_marginal:])
        if self._is_ordered:
            profile = replace(profile, order=_order(profile, blocks, hours, exposed))
        if self._segments is not None:
            chosen = dict(zip(values, by_value, strict=True))
            profile = replace(profile, segments=Segments(field=self._segments, counts=chosen))
        return profile

    def _judge(self, profile: Profile, last: npt.NDArray[np.intp], start: int) -> None:
        """Judge the quality of rows, the last channel, as a reference without them would have.

        Its last bin, the last cell of all, is "and more".
        """
        if profile.witness is not None and profile.witness.has_quality:
            last += self._outermost[start : start + last.size]
            np.minimum(last, profile.binner.n_cells - 1, out=last)

    @cached_property
    def _outermost(self) -> npt.NDArray[np.int8]:
        """(n_rows,) in how many columns a row would be a fault, had the reference been without it.

        The only row of the largest value, of the smallest, or of a level. A reference does not lie
        beyond its own range, but as many rows as it has will, by as many columns as these.
        """
        faults = np.zeros(self._profile.n_rows, np.int8)
        for name, channel in self._profile.channels.items():
            column = self._columns[name]
            if isinstance(channel, NumericChannel) and channel.edges.size:
                for only in only_extremes(column, channel.edges.dtype):
                    faults[only] = min(faults[only] + 1, 100)
            if isinstance(channel, CategoricalChannel) and channel.n_single:
                values = column.tolist()
                single = {value for value, rows in Counter(values).items() if rows == 1}
                faults += np.fromiter(map(single.__contains__, values), np.bool_, len(values))
        return faults

    def _witness(self) -> Witness | None:
        channels, n = self._profile.channels, self._profile.n_rows
        names = candidates(channels)
        size = group_size(n)
        groups = []
        n_groups = -(-len(names) // size) if size > 1 else 0
        for k in range(n_groups):
            chosen = names[k::n_groups] if n_groups == 1 else names[k * size : (k + 1) * size]
            if len(chosen) < 2:
                continue
            placed = np.empty((len(chosen), n), np.int16)
            for row, name in enumerate(chosen):
                placed[row] = channels[name].place(self._columns[name])
            parts = [placed[:, at : at + _ROWS_AT_ONCE] for at in range(0, n, _ROWS_AT_ONCE)]
            groups.append(fit_group(chosen, [scores_of(channels[name]) for name in chosen], parts))
        self._progress(0.6)
        has_quality = len(channels) > 1
        return Witness(groups=tuple(groups), has_quality=has_quality) if (
            groups or has_quality
        ) else None  # fmt: skip

    def _segment_values(self) -> tuple[list[str], npt.NDArray[np.intp]]:
        """The values that are watched by themselves, and which of them each row has."""
        if self._segments is None:
            return [], np.zeros(0, np.intp)
        channel = self._profile.channels[self._segments]
        values = segment_bins(channel)
        places = {number: k for k, number in enumerate(values.values())}
        table = np.array([places.get(k, len(values)) for k in range(channel.n_bins)], np.intp)
        return list(values), table[channel.place(self._columns[self._segments])]


def segment_bins(channel: Channel) -> dict[str, int]:
    """The bins of a column that are segments: its most frequent ones, by label."""
    order = np.argsort(-channel.counts, kind="stable")
    return {
        channel.bins[number]: number
        for number in order[:SEGMENTS_MAX].tolist()
        if channel.counts[number] > 0
    }


def _counted(
    cells: npt.NDArray[np.intp], of_row: npt.NDArray[Any] | None, n_blocks: int, n_cells: int
) -> Counts:
    """(n_blocks, n_cells) rows per cell, by the block of each row."""
    if of_row is not None:
        cells = cells + of_row * n_cells
    return np.bincount(cells.ravel(), minlength=n_blocks * n_cells).reshape(n_blocks, n_cells)


def _order(profile: Profile, blocks: Counts, hours: Counts, exposed: Counts) -> Order:
    """Seasons first, then the design effects of what they leave."""
    layout = profile.layout
    rows = layout.sums(blocks.astype(np.float64))
    if hours.shape[0]:
        # Sums over hours vary with their neighbours, too; so the effect within days is asked
        # first, with the hours taken out as they are.
        pulls = season.strength(layout, hours)
        is_season = np.isfinite(pulls)
        hours = np.where(layout.spread(is_season), hours, 0)
    else:
        pulls = np.full(layout.n_channels, np.inf)
        is_season = np.zeros(layout.n_channels, np.bool_)
    if not is_season.any():
        hours = np.zeros((0, layout.n_cells), np.int64)
    seasonal = replace(layout, seasons=hours if hours.size else None, pulls=pulls)
    if seasonal.n_slots:
        tables = np.array([seasonal.at_slot(slot)[0] for slot in range(seasonal.n_slots)])
        weights = exposed / np.maximum(exposed.sum(axis=1, keepdims=True), 1)
        shares = weights @ tables
    else:
        # The reference as it is, without what keeps shares above nothing: blocks add up to it.
        shares = np.broadcast_to(
            layout.counts / np.maximum(layout.spread(layout.n_reference), 1), blocks.shape
        )
    expected = shares * layout.spread(rows)
    effects = season.design_effects(layout, blocks, expected)
    return Order(effects=effects, pulls=pulls, counts=hours)


def _read_times(times: npt.ArrayLike, n_rows: int) -> Floats:
    try:
        moments = np.asarray(times, np.float64)
    except (TypeError, ValueError) as error:
        raise ProfileError(f"not seconds: {error}", field="times") from error
    if moments.shape != (n_rows,):
        raise ProfileError(f"shape {moments.shape}, must be ({n_rows},)", field="times")
    if not np.isfinite(moments).all():
        raise ProfileError("must be finite", field="times")
    return moments


def _whole_norm(name: str, places: Mapping[str, int]) -> str:
    """The name of the norm when there are fewer groups than there were: numbers may be gone."""
    return name if name in places else "witness:norm[0]"


def _expanded(columns: Mapping[str, npt.ArrayLike]) -> dict[str, npt.ArrayLike]:
    """Embeddings and images as their summaries, in the place of each."""
    expanded: dict[str, npt.ArrayLike] = {}
    for name, values in columns.items():
        if is_wide(values) and isinstance(name, str) and name:
            expanded |= summarised(name, np.asarray(values))
        else:
            expanded[name] = values
    return expanded


def _read_column(name: str, values: object) -> npt.NDArray[Any]:
    try:
        shape = np.shape(values) if isinstance(values, np.ndarray) else None
        column = as_column(values)
    except (TypeError, ValueError) as error:
        raise ProfileError(f"not a column of values: {error}", channel=name) from error
    if shape is not None and len(shape) != 1:
        raise ProfileError(f"shape {shape}, must be (n_rows,)", channel=name)
    return column


def _read_lineage(lineage: Mapping[str, object]) -> Mapping[str, object]:
    """Copy through JSON, so that nobody changes it from outside and it reads back equal."""
    try:
        if any(not isinstance(key, str) for key in lineage):
            raise TypeError("keys must be text")  # noqa: TRY301  # joins json's own errors
        copied = json.loads(json.dumps(dict(lineage), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(f"not JSON: {error}", field="lineage") from error
    return MappingProxyType(copied)


_LEARNT = ("witness", "order", "segments")


def _write_learnt(profile: Profile) -> dict[str, object]:
    """The fields that format 1 does not have."""
    witness, order, segments = profile.witness, profile.order, profile.segments
    return {
        "witness": None if witness is None else {
            "quality": witness.has_quality,
            "counts": profile.witness_counts.tolist(),
            "groups": [
                {
                    "names": list(group.names),
                    "scores": [scores.tolist() for scores in group.scores],
                    "matrix": group.matrix.tolist(),
                    "scales": group.scales.tolist(),
                    "edges": group.edges.tolist(),
                }
                for group in witness.groups
            ],
        },
        "order": None if order is None else {
            "effects": order.effects.tolist(),
            "pulls": [None if math.isinf(pull) else pull for pull in order.pulls.tolist()],
            "n_slots": order.n_slots,
            "counts": order.counts[:, _seasonal_cells(profile.layout, order.pulls)].tolist(),
        },
        "segments": None if segments is None else {
            "field": segments.field,
            "counts": {value: counts.tolist() for value, counts in segments.counts.items()},
        },
    }  # fmt: skip


def _seasonal_cells(layout: Layout, pulls: Floats) -> npt.NDArray[np.bool_]:
    """Cells of the channels that have a season: only theirs are written."""
    cells: npt.NDArray[np.bool_] = layout.spread(np.isfinite(pulls))
    return cells


def _read_learnt(document: Part, profile: Profile) -> Profile:
    if (part := document.part("witness")) is not None:
        profile = _read_witness(part, profile)
    layout = profile.layout
    if (part := document.part("order")) is not None:
        effects = part.numbers("effects", (layout.n_channels,))
        pulls = part.numbers("pulls", (layout.n_channels,))
        pulls[np.isnan(pulls)] = np.inf
        n_slots = part.integer("n_slots")
        if (effects < 1).any() or np.isnan(effects).any() or (pulls <= 0).any():
            raise part.error("must be at least 1, and pulls above 0", "effects")
        if n_slots not in (0, season.DAY_HOURS, season.WEEK_HOURS):
            raise part.error("must be 0, 24 or 168", "n_slots")
        cells = _seasonal_cells(layout, pulls)
        counts = np.zeros((n_slots, layout.n_cells), np.int64)
        if n_slots:
            counts[:, cells] = part.integers("counts", (n_slots, int(cells.sum())))
        part.finish({"effects", "pulls", "n_slots", "counts"})
        profile = replace(profile, order=Order(effects=effects, pulls=pulls, counts=counts))
    if (part := document.part("segments")) is not None:
        column = part.get("field", str)
        if column not in profile.channels:
            raise part.error("is no channel", "field")
        entries = Part(part.get("counts", dict))
        known = profile.channels[column].bins
        by_value = {}
        for value in part.get("counts", dict):
            if value not in known:
                raise part.error(f"{value[:40]!r} is no bin of {column!r}", "counts")
            by_value[value] = entries.integers(value, (layout.n_cells,))
        part.finish({"field", "counts"})
        profile = replace(profile, segments=Segments(field=column, counts=by_value))
    return profile


def _read_witness(part: Part, profile: Profile) -> Profile:
    groups = []
    for entry in part.get("groups", list):
        if not isinstance(entry, dict):
            raise part.error("must hold objects", "groups")
        one = Part(entry)
        names = one.texts("names")
        if not names or len(set(names)) < len(names) or set(names) - set(profile.channels):
            raise one.error("must be channels, each once", "names")
        rows = one.get("scores", list)
        if len(rows) != len(names):
            raise one.error(f"must be {len(names)} lists", "scores")
        scores = []
        for name, row in zip(names, rows, strict=True):
            values = Part({"scores": row})
            n_bins = profile.channels[name].n_bins
            scores.append(values.integers("scores", (n_bins,), low=-COUNT_MAX))
        matrix = one.integers("matrix", (len(names), len(names)), low=-COUNT_MAX)
        if np.abs(matrix).max() > 2**20 or any(np.abs(row).max() > 2**10 for row in scores):
            raise one.error("holds numbers too large to be exact", "matrix")
        scales, edges = one.numbers("scales", (len(names),)), one.numbers("edges", (-1,))
        if not (scales > 0).all() or not (np.diff(edges) > 0).all():
            raise one.error("must be positive, and edges rise", "scales")
        one.finish({"names", "scores", "matrix", "scales", "edges"})
        groups.append(
            Group(names=names, scores=tuple(scores), matrix=matrix, scales=scales, edges=edges)
        )
    has_quality = part.get("quality", bool)
    witness = Witness(groups=tuple(groups), has_quality=has_quality)
    counts = part.integers("counts", (sum(witness.sizes),))
    part.finish({"quality", "counts", "groups"})
    return replace(profile, witness=witness, witness_counts=counts)


def _write_channel(channel: Channel) -> dict[str, object]:
    document: dict[str, object] = {
        "name": channel.name,
        "kind": channel.kind,
        "counts": channel.counts.tolist(),
    }
    if isinstance(channel, NumericChannel):
        document |= {
            "dtype": channel.edges.dtype.name,
            "edges": channel.edges.tolist(),
            "centers": channel.centers.tolist(),
            "mean": None if math.isnan(channel.mean) else channel.mean,
            "sd": None if math.isnan(channel.sd) else channel.sd,
        }
    elif isinstance(channel, CategoricalChannel):
        document |= {
            "levels": list(channel.levels),
            "rare": list(channel.rare),
            "n_levels": channel.n_levels,
            "n_single": channel.n_single,
        }
    return document


_FIELDS: Mapping[Kind, set[str]] = {
    "numeric": {"dtype", "edges", "centers", "mean", "sd"},
    "integer": {"dtype", "edges", "centers", "mean", "sd"},
    "boolean": set(),
    "categorical": {"levels", "rare", "n_levels", "n_single"},
}


def _read_channel(part: Part, name: str, n_rows: int) -> Channel:
    kind = part.get("kind", str)
    if kind not in _FIELDS:
        raise part.error(f"{kind[:40]!r}, must be one of {', '.join(_FIELDS)}", "kind")
    part.finish({"name", "kind", "counts"} | _FIELDS[kind])
    if kind == "boolean":
        return BooleanChannel(name=name, counts=part.counts(4, n_rows))
    if kind == "categorical":
        return _read_levels(part, name, n_rows)
    return _read_numbers(part, name, n_rows)


def _read_levels(part: Part, name: str, n_rows: int) -> CategoricalChannel:
    levels, rare = part.texts("levels"), part.texts("rare")
    if len(set(levels + rare)) < len(levels) + len(rare):
        raise part.error("names a level twice", "levels")
    n_levels, n_single = part.integer("n_levels"), part.integer("n_single")
    counts = part.counts(len(levels) + 4, n_rows)
    seen, other, forgotten = counts[: len(levels)], int(counts[-4]), int(counts[-3])
    n_forgotten = n_levels - len(levels) - len(rare)
    if not n_single <= n_levels <= n_rows or n_forgotten < 0:
        raise part.error("is at odds with the names, n_single or n_rows", "n_levels")
    if (seen < 1).any() or other < len(rare) or forgotten < n_forgotten:
        raise part.error("holds fewer rows than there are levels", "counts")
    return CategoricalChannel(
        name=name, counts=counts, levels=levels, rare=rare, n_levels=n_levels, n_single=n_single
    )


def _read_numbers(part: Part, name: str, n_rows: int) -> NumericChannel:
    dtype = part.get("dtype", str)
    allowed = {"numeric": ("float32", "float64"), "integer": ("int64",)}[part.get("kind", str)]
    if dtype not in allowed:
        raise part.error(f"must be {' or '.join(allowed)}", "dtype")
    edges = _read_edges(part, dtype)
    centers = part.floats("centers")
    if len(centers) != max(0, edges.size - 1):
        raise part.error(f"holds {len(centers)} numbers for {edges.size} edges", "centers")
    if any(late < early for early, late in itertools.pairwise(centers)):
        raise part.error("must not fall", "centers")
    mean, sd = part.float_or_none("mean"), part.float_or_none("sd")
    if sd < 0:
        raise part.error("must not be negative", "sd")
    return NumericChannel(
        name=name,
        counts=part.counts(edges.size + 3, n_rows),
        edges=edges,
        centers=np.array(centers, np.float64),
        mean=mean,
        sd=sd,
    )


def _read_edges(part: Part, dtype: str) -> npt.NDArray[Any]:
    if dtype == "int64":
        values = part.get("edges", list)
        if any(type(value) is not int or not -(2**63) <= value < 2**63 for value in values):
            raise part.error("must hold integers of 64 bits", "edges")
        edges: npt.NDArray[Any] = np.array(values, np.int64)
    else:
        exact = np.array(part.floats("edges"), np.float64)
        with np.errstate(over="ignore"):
            edges = exact.astype(dtype)
        if not np.array_equal(edges, exact):
            raise part.error(f"holds a number that is not a {dtype}", "edges")
    if any(late <= early for early, late in itertools.pairwise(edges)):
        raise part.error("must rise", "edges")
    return edges
