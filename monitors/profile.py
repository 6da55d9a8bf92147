"""Reference profile: what each channel looked like in the training data; to and from JSON.

No rows are kept: edges, level names, means and counts only. The text is canonical, so that equal
profiles have equal digests, and every part of a text is checked before it is believed.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from monitors.channel import (
    BooleanChannel,
    CategoricalChannel,
    Channel,
    Kind,
    NumericChannel,
    as_column,
    fit,
)
from monitors.counts import Counts
from monitors.errors import ProfileError

FORMAT = 1
"""Number of the format written; a reader refuses any other."""
TEXT_BYTES_MAX = 64 * 2**20
"""Longest text that is read as a profile."""

_COUNT_MAX = 2**53


@dataclass(frozen=True, eq=False)
class Profile:
    """Bins and reference counts of every channel, in the order of the columns."""

    channels: Mapping[str, Channel]
    n_rows: int
    lineage: Mapping[str, object]
    """Where the reference came from; free, kept on the way through JSON."""

    @classmethod
    def fit(
        cls,
        columns: Mapping[str, npt.ArrayLike],
        *,
        n_bins: int = 10,
        levels_max: int = 50,
        lineage: Mapping[str, object] | None = None,
    ) -> "Profile":
        """Summarise reference columns of equal length.

        Parameters
        ----------
        columns : name -> (n_rows,) numbers, booleans or strings; None and nan are missing.
            Numbers must have the type in which they will be served.
        n_bins : bins of a numeric column, beside those for atoms, out of range and missing
        levels_max : levels of a categorical column with a bin of their own
        lineage : anything JSON can hold

        Raises
        ------
        ProfileError : names the column that is empty, too short, or of a type without bins.
        """
        if n_bins < 2 or levels_max < 1:
            raise ProfileError(f"n_bins = {n_bins}, levels_max = {levels_max}: too few bins")
        if not columns:
            raise ProfileError("no columns")
        channels: dict[str, Channel] = {}
        n_rows = -1
        for name, values in columns.items():
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
            channels[name] = fit(name, column, n_bins=n_bins, levels_max=levels_max)
        return cls(MappingProxyType(channels), n_rows, _read_lineage(lineage or {}))

    def select(self, names: Sequence[str]) -> "Profile":
        """The profile of these channels only, in this order."""
        for name in names:
            if name not in self.channels:
                raise ProfileError("there is no such channel", channel=name)
        chosen = {name: self.channels[name] for name in names}
        return Profile(MappingProxyType(chosen), self.n_rows, self.lineage)

    def to_json(self) -> str:
        """Write canonical JSON: equal profiles give equal texts."""
        document = {
            "format": FORMAT,
            "n_rows": self.n_rows,
            "lineage": dict(self.lineage),
            "channels": [_write_channel(channel) for channel in self.channels.values()],
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Profile":
        """Read what to_json wrote; ProfileError says which part of anything else is wrong."""
        document = _Part(_parse(text))
        number = document.integer("format")
        if number != FORMAT:
            raise ProfileError(
                f"format {number}, this driftgate reads format {FORMAT}; fit the profile again,"
                " or use the driftgate that wrote it",
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
            channels[name] = _read_channel(_Part(entry, name), name, n_rows)
        document.finish({"format", "n_rows", "lineage", "channels"})
        return cls(MappingProxyType(channels), n_rows, _read_lineage(lineage))

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


def _parse(text: str | bytes) -> dict[str, Any]:
    if len(text) > TEXT_BYTES_MAX:
        raise ProfileError(f"text of {len(text)} bytes, at most {TEXT_BYTES_MAX} are read")
    try:
        document = json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ProfileError("not a JSON object")
    return document


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("an object names a field twice")
    return document


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


class _Part:
    """One JSON object under inspection: gets a field of a type, or says what is wrong where."""

    def __init__(self, document: dict[str, Any], channel: str | None = None) -> None:
        self._document = document
        self._channel = channel

    def error(self, problem: str, name: str) -> ProfileError:
        return ProfileError(problem, channel=self._channel, field=name)

    def get(self, name: str, kind: type) -> Any:
        if name not in self._document:
            raise self.error("is lacking", name)
        value = self._document[name]
        if type(value) is not kind:
            words = {dict: "an object", list: "a list", str: "a text", int: "an integer"}
            raise self.error(f"must be {words[kind]}", name)
        return value

    def integer(self, name: str, *, low: int = 0) -> int:
        value: int = self.get(name, int)
        if not low <= value <= _COUNT_MAX:
            raise self.error(f"must be between {low} and {_COUNT_MAX}", name)
        return value

    def counts(self, n_bins: int, n_rows: int) -> Counts:
        values = self.get("counts", list)
        if len(values) != n_bins:
            raise self.error(f"holds {len(values)} counts for {n_bins} bins", "counts")
        if any(type(value) is not int or not 0 <= value <= _COUNT_MAX for value in values):
            raise self.error("must hold integers that are not negative", "counts")
        if sum(values) != n_rows:
            raise self.error(f"counts {sum(values)} rows of {n_rows}", "counts")
        counts = np.array(values, np.int64)
        counts.flags.writeable = False
        return counts

    def floats(self, name: str) -> list[float]:
        values = self.get(name, list)
        if any(type(value) not in {int, float} for value in values):
            raise self.error("must hold numbers", name)
        return [self._float(value, name) for value in values]

    def float_or_none(self, name: str) -> float:
        if name in self._document and self._document[name] is None:
            return math.nan
        if name not in self._document or type(self._document[name]) not in {int, float}:
            raise self.error("must be a number or null", name)
        return self._float(self._document[name], name)

    def _float(self, value: float, name: str) -> float:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error("is beyond the range of a float", name)
        return number

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.get(name, list)
        if any(type(value) is not str for value in values):
            raise self.error("must hold texts", name)
        return tuple(values)

    def finish(self, names: set[str]) -> None:
        for name in self._document:
            if name not in names:
                raise self.error(f"is not known; known are {', '.join(sorted(names))}", name)


_FIELDS: Mapping[Kind, set[str]] = {
    "numeric": {"dtype", "edges", "centers", "mean", "sd"},
    "integer": {"dtype", "edges", "centers", "mean", "sd"},
    "boolean": set(),
    "categorical": {"levels", "rare", "n_levels", "n_single"},
}


def _read_channel(part: _Part, name: str, n_rows: int) -> Channel:
    kind = part.get("kind", str)
    if kind not in _FIELDS:
        raise part.error(f"{kind[:40]!r}, must be one of {', '.join(_FIELDS)}", "kind")
    part.finish({"name", "kind", "counts"} | _FIELDS[kind])
    if kind == "boolean":
        return BooleanChannel(name=name, counts=part.counts(4, n_rows))
    if kind == "categorical":
        return _read_levels(part, name, n_rows)
    return _read_numbers(part, name, n_rows)


def _read_levels(part: _Part, name: str, n_rows: int) -> CategoricalChannel:
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


def _read_numbers(part: _Part, name: str, n_rows: int) -> NumericChannel:
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


def _read_edges(part: _Part, dtype: str) -> npt.NDArray[Any]:
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
