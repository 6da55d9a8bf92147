"""Rows to cells: the only thing that is done row by row, and all that a worker has to do."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from monitors.channel import Channel, Column, NumericChannel, as_column
from monitors.counts import Counts
from monitors.errors import BlockError
from monitors.layout import Places
from monitors.summary import is_wide, summarised
from monitors.witness import N_FAULTS, Witness

_ROWS_AT_ONCE = 8192
_TOGETHER_MIN = 4
_TOGETHER_ROWS_MIN = 32
_TOGETHER_ROWS_MAX = 1024
_TOGETHER_BOUNDS_MAX = 32


class Binner:
    """Places rows into the cells of a profile's layout."""

    def __init__(self, channels: Mapping[str, Channel], witness: Witness | None) -> None:
        self._channels = channels
        self._witness = witness
        self._place = {name: k for k, name in enumerate(channels)}
        sizes = [channel.n_bins for channel in channels.values()]
        sizes += witness.sizes if witness is not None else ()
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.intp)
        self.n_cells = int(starts[-1])
        self._starts = starts[:-1]
        self._sheets = _sheets(channels)
        self._groups: list[tuple[Places, int]] = []
        at = len(channels)
        for group in witness.groups if witness is not None else ():
            self._groups.append((np.array([self._place[n] for n in group.names], np.intp), at))
            at += group.n_channels

    def rows(self, columns: Mapping[str, npt.ArrayLike]) -> dict[str, Column]:
        """The columns that the profile knows, as columns of one length.

        Raises
        ------
        BlockError : they differ in length.
        """
        found = {}
        for name, values in columns.items():
            if name in self._place:
                found[name] = as_column(values)
            elif self.is_summarised(name) and is_wide(values):
                found |= summarised(name, np.asarray(values))
        if len({column.size for column in found.values()}) > 1:
            first, n_rows = next((name, column.size) for name, column in found.items())
            name = next(name for name, column in found.items() if column.size != n_rows)
            raise BlockError(
                f"column {name!r} has {found[name].size} rows, column {first!r} has {n_rows}"
            )
        return found

    def is_summarised(self, name: str) -> bool:
        """Whether a column of this name is watched by its summary."""
        return f"{name}.norm" in self._place

    def count(
        self,
        columns: Mapping[str, Column],
        stops: Sequence[int] = (),
        layers: tuple[str, npt.NDArray[np.intp], int] | None = None,
    ) -> Counts:
        """(n_blocks, n_layers, n_cells) rows per cell of consecutive blocks.

        Parameters
        ----------
        columns : what `rows` gave
        stops : rows at which blocks end; without any all rows are one block
        layers : a column, the layer of each of its bins, and how many layers there are: rows are
            counted apart by it. Without, or without the column, all are in the first layer.
        """
        n_rows = next(iter(columns.values())).size if columns else 0
        ends = np.array(stops if len(stops) else [n_rows])
        n_layers = 1 if layers is None else layers[2]
        counts = np.zeros((ends.size, n_layers, self.n_cells), np.int64)
        for start in range(0, n_rows, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, n_rows)
            cells = self.cells(columns, start, stop)
            first = int(np.searchsorted(ends, start, side="right"))
            place = np.searchsorted(ends, np.arange(start, stop), side="right") - first
            n_blocks = int(place[-1]) + 1
            place *= n_layers
            if layers is not None and layers[0] in columns:
                place += layers[1][self._channels[layers[0]].place(columns[layers[0]][start:stop])]
            size = n_blocks * n_layers
            if size > 1:
                cells += place * self.n_cells
            found = np.bincount(cells.ravel(), minlength=size * self.n_cells)
            counts[first : first + n_blocks] += found.reshape(n_blocks, n_layers, self.n_cells)
        return counts

    def cells(self, columns: Mapping[str, Column], start: int, stop: int) -> Places:
        """(n_channels_present, n_rows) cell of every row in every channel that is there."""
        n = stop - start
        is_whole = len(columns) == len(self._channels)
        n_witness = len(self._starts) - len(self._channels)
        cells = np.empty((len(columns) + n_witness, n), np.intp)
        row_of: dict[int, int] = {}
        for row, name in enumerate(columns):
            row_of[self._place[name]] = row
        self._bins({name: column[start:stop] for name, column in columns.items()}, cells)
        n_marginal = filled = len(row_of)
        places: list[int] = list(row_of)
        if self._witness is not None:
            for group, (members, at) in zip(self._witness.groups, self._groups, strict=True):
                if all(place in row_of for place in members.tolist()):
                    rows = [row_of[place] for place in members.tolist()]
                    cells[filled : filled + group.n_channels] = group.place(cells[rows])
                    places += range(at, at + group.n_channels)
                    filled += group.n_channels
        cells[:filled] += self._starts[places][:, np.newaxis]
        if is_whole and self._witness is not None and self._witness.has_quality:
            faults = self._is_fault[cells[:n_marginal]].sum(axis=0)
            cells[filled] = np.minimum(faults, N_FAULTS - 1) + self._starts[-1]
            filled += 1
        return cells[:filled]

    def _bins(self, columns: Mapping[str, Column], bins: Places) -> None:
        """Fill in the bin of every row of the columns, a line for each in their order."""
        line_of = {name: line for line, name in enumerate(columns)}
        alone = set(columns)
        for sheet in self._sheets if bins.shape[1] >= _TOGETHER_ROWS_MIN else ():
            names = [name for name in sheet.rows if name in alone and sheet.takes(columns[name])]
            if len(names) >= _TOGETHER_MIN:
                lines = [line_of[name] for name in names]
                bins[lines] = sheet.place(names, [columns[name] for name in names])
                alone.difference_update(names)
        for name in alone:
            bins[line_of[name]] = self._channels[name].place(columns[name])

    @cached_property
    def _is_fault(self) -> npt.NDArray[np.int8]:
        """(n_cells,) 1 for missing, invalid, out of range and unseen."""
        faults = np.zeros(self.n_cells, np.int8)
        for start, channel in zip(self._starts.tolist(), self._channels.values(), strict=False):
            bins = list(channel.missing_bins)
            if channel.unseen_bin is not None:
                bins.append(channel.unseen_bin)
            if channel.n_ordered > 1:
                bins += [0, channel.n_ordered - 1]
            faults[[start + number for number in bins]] = 1
        return faults


class _Sheet:
    """Numeric channels of one type, whose bins are found for all of them at once.

    Comparing with every edge beats searching among a dozen: a processor compares eight numbers at a
    time, and guesses wrong at every step of a search.
    """

    def __init__(self, dtype: np.dtype[Any], bounds: Mapping[str, Column]) -> None:
        self.rows = {name: row for row, name in enumerate(bounds)}
        self._dtype = dtype
        self._sizes = np.array([[each.size] for each in bounds.values()], np.uint8)
        self._width = max(each.size for each in bounds.values())
        self._bounds = np.full((len(bounds), self._width), np.inf, dtype)
        for row, each in zip(self._bounds, bounds.values(), strict=True):
            row[: each.size] = each

    def takes(self, column: Column) -> bool:
        """Whether its values are compared in their own type."""
        return column.dtype == self._dtype

    def place(self, names: Sequence[str], columns: Sequence[Column]) -> npt.NDArray[np.uint8]:
        """(n_columns, n_rows) bin numbers, the same as each channel finds by its search."""
        chosen = [self.rows[name] for name in names]
        bounds, sizes = self._bounds[chosen], self._sizes[chosen]
        n = columns[0].size
        found = np.empty((len(columns), n), np.uint8)
        for start in range(0, n, _TOGETHER_ROWS_MAX):
            part = slice(start, start + _TOGETHER_ROWS_MAX)
            values = np.stack([column[part] for column in columns])
            below = np.zeros(values.shape, np.uint8)
            is_within = np.empty(values.shape, np.bool_)
            for k in range(self._width):
                np.less_equal(values, bounds[:, k : k + 1], out=is_within)
                below += is_within.view(np.uint8)
            # nan is within no bound, and comes to the bin behind the last one.
            np.minimum(self._width - below, sizes, out=found[:, part])
        return found


def _sheets(channels: Mapping[str, Channel]) -> list[_Sheet]:
    by_type: dict[np.dtype[Any], dict[str, Column]] = {}
    for name, channel in channels.items():
        if not isinstance(channel, NumericChannel) or channel.kind != "numeric":
            continue
        if channel.bounds.size <= _TOGETHER_BOUNDS_MAX:
            by_type.setdefault(channel.bounds.dtype, {})[name] = channel.bounds
    return [_Sheet(dtype, bounds) for dtype, bounds in by_type.items()]
