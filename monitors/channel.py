"""One watched thing -> bin numbers: edges, atoms, levels, missing, out of range, unseen.

A channel is total: every value of every type lands in exactly one bin, so that nothing is dropped
before it is counted. Fitting is here too; JSON is in profile.py.
"""

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from monitors.counts import Counts
from monitors.errors import ProfileError

Kind: TypeAlias = Literal["numeric", "integer", "boolean", "categorical"]
Column: TypeAlias = npt.NDArray[Any]
BinNumbers: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float64]

KNOWN_LEVELS_MAX = 10_000
"""Level names a channel remembers at most, so that a column of ids stays a small profile."""
LEVEL_LENGTH_MAX = 256
"""Characters of a level name at most; a longer one is known by its beginning and its hash."""

_INT64 = np.iinfo(np.int64)
_WORDS = frozenset({"other", "unseen", "missing", "invalid"})


@dataclass(frozen=True, eq=False, kw_only=True)
class Channel(ABC):
    """One watched thing: its bins, and how often the reference fell into each."""

    name: str
    counts: Counts = field(repr=False)
    """(n_bins,) rows of the reference in each bin."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What the reference held."""

    @property
    @abstractmethod
    def bins(self) -> tuple[str, ...]:
        """A label for people per bin; no two are equal."""

    @property
    @abstractmethod
    def doubt(self) -> Floats:
        """(n_bins,) rows that the reference may have missed by chance, per bin.

        Added to the counts they give the Dirichlet weights of the shares behind the reference:
        1/2 for a bin in general (Jeffreys), 1 beyond either end of a range (the mass outside the
        range of n draws is Beta(1, n) exactly), 0 for what cannot happen without a fault; for
        levels see there. Never less than minus the counts.
        """

    @property
    def n_bins(self) -> int:
        """Number of bins."""
        return self.counts.size

    @property
    def n_ordered(self) -> int:
        """How many of the first bins stand in the order of their values; 0 without an order."""
        return 0

    @property
    def is_ordered(self) -> bool:
        """Whether the values have an order, so that cumulative shares mean something."""
        return self.n_ordered > 0

    @property
    def missing_bins(self) -> tuple[int, int]:
        """Bins of rows without a usable value: missing, and of a wrong type."""
        return self.n_bins - 2, self.n_bins - 1

    @property
    def unseen_bin(self) -> int | None:
        """Bin of levels that the reference did not hold, where there are levels."""
        return None

    @property
    def positions(self) -> Floats | None:
        """(n_ordered,) place of each bin in reference standard deviations; None without a scale."""
        return None

    def assign(self, values: npt.ArrayLike) -> BinNumbers:
        """(n,) bin number per row; never raises for content, whatever the type."""
        return self.place(as_column(values)).astype(np.int32)

    @abstractmethod
    def place(self, column: Column) -> npt.NDArray[np.intp]:
        """Do the same for what is a column already; in the type that numpy counts with."""


@dataclass(frozen=True, eq=False, kw_only=True)
class NumericChannel(Channel):
    """Numbers in right-closed bins between edges of the reference.

    The bins are: below the reference, those between its edges, above it, missing, invalid. A value
    that holds at least a bin's worth of rows has a bin of its own, whose lower edge is the number
    just before it. Edges have the type of the values: float32 is compared with float32.
    """

    edges: Column
    """(n,) float32, float64 or int64, rising: the number before the minimum ... the maximum; or
    empty when the reference held no finite value."""
    centers: Floats
    """(n - 1,) mean of the reference rows between two edges, the middle where there are none."""
    mean: float
    """Mean of the finite values, nan without any."""
    sd: float
    """Their standard deviation."""

    @property
    def kind(self) -> Kind:
        """Integer when every value of the reference was one by its type."""
        return "integer" if self.edges.dtype.kind == "i" else "numeric"

    @property
    def n_ordered(self) -> int:
        """All but missing and invalid."""
        return self.n_bins - 2

    @cached_property
    def bins(self) -> tuple[str, ...]:
        """A label per bin, with six digits or with as many as tell the bins apart."""
        if not self.edges.size:
            return ("any", "missing", "invalid")
        labels = self._labels(_brief)
        if len(set(labels)) < len(labels):
            labels = self._labels(_exact)
        return (*labels, "missing", "invalid")

    def _labels(self, write: Callable[[Any], str]) -> list[str]:
        labels = [f"below {write(_after(self.edges[0]))}"]
        for low, high in itertools.pairwise(self.edges):
            if low == _before(high):
                labels.append(f"= {write(high)}")
            else:
                first = low + 1 if self.kind == "integer" else low
                labels.append(f"{write(first)} .. {write(high)}")
        return [*labels, f"above {write(self.edges[-1])}"]

    @cached_property
    def doubt(self) -> Floats:
        """One beyond either end, one half elsewhere."""
        doubt = np.full(self.n_bins, 0.5)
        if self.edges.size:
            doubt[[0, self.n_ordered - 1]] = 1.0
        doubt[-1] = 0.0
        return doubt

    @cached_property
    def positions(self) -> Floats | None:
        """(n_ordered,) bin centers in reference standard deviations from the reference mean.

        Rows out of range count as one standard deviation beyond the edge: how far they are is not
        known from counts.
        """
        if not self.edges.size or not self.sd > 0:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            centers = self.centers / self.sd - self.mean / self.sd
            low = float(self.edges[0]) / self.sd - self.mean / self.sd
            high = float(self.edges[-1]) / self.sd - self.mean / self.sd
        positions = np.concatenate([[low - 1.0], centers, [high + 1.0]])
        return positions if np.isfinite(positions).all() else None

    @cached_property
    def bounds(self) -> Column:
        """Edges with the largest number of the type behind them, so that above ends somewhere."""
        last = _INT64.max if self.edges.dtype.kind == "i" else np.inf
        return np.append(self.edges, np.array(last, self.edges.dtype))

    @cached_property
    def _float_bounds(self) -> Column:
        """The same for floats that come to a channel of integers."""
        return np.append(self.edges.astype(np.float64), np.inf)

    def place(self, column: Column) -> npt.NDArray[np.intp]:
        """Bin number per row, by one search.

        Left of an equal edge means right-closed, and nan sorts behind infinity: the place of the
        missing bin.
        """
        bounds = self.bounds
        dtype = column.dtype
        if dtype is bounds.dtype or dtype == bounds.dtype:
            return bounds.searchsorted(column)
        if dtype.kind == "f" and bounds.dtype.kind == "i":
            return self._float_bounds.searchsorted(column)
        if dtype.kind in "fiub":
            return bounds.searchsorted(_cast(column, bounds.dtype))
        if dtype.kind == "O":
            return self._place_objects(column)
        return np.full(column.size, self.n_bins - 1, np.intp)

    def _place_objects(self, column: Column) -> npt.NDArray[np.intp]:
        objects = [_number(value) for value in column.tolist()]
        invalid = np.fromiter((value is None for value in objects), np.bool_, len(objects))
        if self.edges.dtype.kind == "i":
            # Large integers are not exact as floats, so each sort goes through its own edges.
            whole = np.fromiter((type(value) is int for value in objects), np.bool_, len(objects))
            integers = np.fromiter(
                (_clamp(v) if type(v) is int else 0 for v in objects), np.int64, len(objects)
            )
            floats = np.fromiter(
                (v if type(v) is float else 0.0 for v in objects), np.float64, len(objects)
            )
            bins = np.where(
                whole, self.bounds.searchsorted(integers), self._float_bounds.searchsorted(floats)
            )
        else:
            floats = np.fromiter(
                (0.0 if v is None else _float(v) for v in objects), np.float64, len(objects)
            )
            bins = self.bounds.searchsorted(_cast(floats, self.edges.dtype))
        return np.where(invalid, self.n_bins - 1, bins)


@dataclass(frozen=True, eq=False, kw_only=True)
class BooleanChannel(Channel):
    """False, true, missing, invalid. The numbers 0 and 1 count as false and true."""

    bins: ClassVar[tuple[str, ...]] = ("false", "true", "missing", "invalid")

    @property
    def kind(self) -> Kind:
        """Always boolean."""
        return "boolean"

    @cached_property
    def doubt(self) -> Floats:
        """One half, also for missing."""
        return np.array([0.5, 0.5, 0.5, 0.0])

    def place(self, column: Column) -> npt.NDArray[np.intp]:
        """Bin number per row, by value."""
        if column.dtype.kind == "b":
            return column.astype(np.intp)
        if column.dtype.kind == "O":
            objects = [_number(value) for value in column.tolist()]
            numbers = np.array([2.0 if v is None else _float(v) for v in objects], np.float64)
        elif column.dtype.kind in "iuf":
            numbers = column
        else:
            return np.full(column.size, 3, np.intp)
        bins = np.full(column.size, 3, np.intp)
        bins[numbers == 0] = 0
        bins[numbers == 1] = 1
        bins[np.isnan(numbers)] = 2
        return bins


@dataclass(frozen=True, eq=False, kw_only=True)
class CategoricalChannel(Channel):
    """The most frequent levels, other known ones, unseen ones, missing, invalid."""

    levels: tuple[str, ...]
    """Levels with a bin of their own, most frequent first."""
    rare: tuple[str, ...] = field(repr=False)
    """Names of the other levels of the reference, so that rare is told from unseen."""
    n_levels: int
    """How many levels the reference held, also those whose names are not kept."""
    n_single: int
    """How many of them it held exactly once."""

    @property
    def kind(self) -> Kind:
        """Always categorical."""
        return "categorical"

    @cached_property
    def bins(self) -> tuple[str, ...]:
        """The levels' own names, then our words, which no level's label equals."""
        return (*map(_level_label, self.levels), "other", "unseen", "missing", "invalid")

    @property
    def unseen_bin(self) -> int:
        """Behind the levels and the other known ones."""
        return len(self.levels) + 1

    @cached_property
    def doubt(self) -> Floats:
        """What unseen levels have to expect is taken from the levels that were seen.

        Levels seen once stand for the share of the unseen (Good and Turing), and every level seen
        gives an equal part of it: absolute discounting, as in models of language. Without it a
        column with a long tail, or one of ids, would drift from the first row on.
        """
        discount = self.n_single / self.n_levels if self.n_levels else 0.0
        each = 0.5 * (1 - discount)
        n_rare = len(self.rare)
        n_forgotten = self.n_levels - len(self.levels) - n_rare
        return np.array(
            [each - discount] * len(self.levels)
            + [each - discount * n_rare if self.rare else 0.0]
            + [0.5 + self.n_single - discount * n_forgotten, 0.5, 0.0]
        )

    @cached_property
    def _lookup(self) -> "_Lookup":
        lookup = _Lookup(unseen=self.unseen_bin)
        for number, level in enumerate(self.levels):
            lookup.add(level, number)
        for level in self.rare:
            lookup.add(level, len(self.levels))
        return lookup

    def place(self, column: Column) -> npt.NDArray[np.intp]:
        """Bin number per row, by name."""
        if column.dtype.kind in "OUST":
            objects = column.tolist()
            lookup = self._lookup
            try:
                return np.fromiter(map(lookup.__getitem__, objects), np.intp, len(objects))
            except TypeError:  # A value without a hash, such as a list, is no level.
                return np.array([lookup.find(value) for value in objects], np.intp)
        bins = np.full(column.size, self.n_bins - 1, np.intp)
        if column.dtype.kind == "f":
            bins[np.isnan(column)] = self.n_bins - 2
        return bins


class _Lookup(dict[object, int]):
    """Bin number of a level, as text or as its UTF-8 bytes; anything else is told apart on a miss.

    Misses are not kept: clients make up names, and memory must not grow with them.
    """

    def __init__(self, *, unseen: int) -> None:
        super().__init__()
        self._unseen = unseen

    def add(self, level: str, number: int) -> None:
        self[level] = number
        try:
            self[level.encode("utf-8", "surrogateescape")] = number
        except UnicodeEncodeError:  # Half a surrogate pair has no bytes.
            return

    def __missing__(self, value: object) -> int:
        if isinstance(value, bytes):
            value = level_of(value)
        if isinstance(value, str):
            return self.get(level_of(value), self._unseen)
        return self._unseen + (1 if _is_missing(value) else 2)

    def find(self, value: object) -> int:
        try:
            return self[value]
        except TypeError:
            return self._unseen + 2


def as_column(values: object) -> Column:
    """(n,) array of whatever came; what has no rows of single values becomes objects."""
    if type(values) is np.ndarray and values.ndim == 1:
        return values
    if isinstance(values, np.ma.MaskedArray):
        values = values.tolist()  # None where it is masked.
    if isinstance(values, list | tuple):
        # Never through numpy's guess: one long string would widen every row, a None change types.
        return np.fromiter(values, np.dtype(object), len(values))
    column = values if isinstance(values, np.ndarray) else np.asarray(values)
    if column.ndim == 1:
        return column
    if column.ndim == 0:
        return column.reshape(1)
    if column.size == column.shape[0]:
        return column.reshape(-1)
    return np.fromiter(iter(column), np.dtype(object), column.shape[0])


def fit(name: str, values: object, *, n_bins: int, levels_max: int) -> Channel:
    """Bins of a reference column, and its counts; ProfileError names the channel."""
    column = as_column(values)
    family, resolved = _resolve(name, column)
    shell: Channel
    if family == "boolean":
        shell = BooleanChannel(name=name, counts=np.zeros(4, np.int64))
    elif family == "number":
        shell = _fit_numbers(name, resolved, n_bins)
    else:
        shell = _fit_levels(name, resolved, levels_max)
    # Counted by the same road that served rows will take: equal data give equal counts.
    shell.counts[:] = np.bincount(shell.place(column), minlength=shell.n_bins)
    shell.counts.flags.writeable = False
    return shell


def _resolve(name: str, column: Column) -> tuple[Literal["number", "boolean", "string"], Column]:
    """What a reference column holds, and numbers among objects as an array of numbers."""
    by_kind: dict[str, Literal["number", "boolean", "string"]] = {
        **dict.fromkeys("iuf", "number"),
        **dict.fromkeys("b", "boolean"),
        **dict.fromkeys("UST", "string"),
    }
    if column.dtype.kind in by_kind:
        return by_kind[column.dtype.kind], column
    if column.dtype.kind != "O":
        raise ProfileError(f"values of type {column.dtype} cannot be watched", channel=name)
    objects = column.tolist()
    families = _families(name, objects)
    if families <= {"string"}:
        return "string", column
    if families == {"boolean"}:
        return "boolean", column
    if families == {"integer"} and not any(map(_is_missing, objects)):
        return "number", np.array([_clamp(int(value)) for value in objects], np.int64)
    if families <= {"integer", "float"}:
        numbers = [_number(value) for value in objects]
        return "number", np.array([math.nan if v is None else _float(v) for v in numbers])
    raise ProfileError(f"mixes {' and '.join(sorted(families))} values", channel=name)


def _families(name: str, objects: list[object]) -> set[str]:
    """Sorts of values among objects; floats that are all nan only mark what is missing."""
    families = {_family(name, each, objects) for each in set(map(type, objects))} - {"missing"}
    if "float" in families and len(families) > 1:
        floats = (value for value in objects if isinstance(value, float | np.floating))
        if all(map(_is_missing, floats)):
            families.discard("float")
    return families


def _family(name: str, each: type, objects: list[object]) -> str:
    for family, types in (
        ("boolean", (bool, np.bool_)),
        ("integer", (int, np.integer)),
        ("float", (float, np.floating)),
        ("string", (str, bytes)),
    ):
        if issubclass(each, types):
            return family
    if _is_missing(next(value for value in objects if type(value) is each)):
        return "missing"
    raise ProfileError(f"holds {each.__name__} objects, which cannot be watched", channel=name)


def only_extremes(column: Column, dtype: np.dtype[Any]) -> list[int]:
    """Rows that alone hold the smallest or the largest finite number of a column."""
    if column.dtype.kind == "O":
        numbers = [_number(value) for value in column.tolist()]
        column = np.array([math.nan if v is None else _float(v) for v in numbers])
    values = _cast(column, dtype)
    finite = np.isfinite(values)
    if not finite.any():
        return []
    ends = {values[finite].min(), values[finite].max()}
    rows = [np.flatnonzero(values == end) for end in ends]
    return [int(found[0]) for found in rows if found.size == 1]


def _fit_numbers(name: str, column: Column, n_bins: int) -> NumericChannel:
    is_float = column.dtype.kind == "f"
    is_short = is_float and column.dtype.itemsize <= 4
    dtype: np.dtype[Any] = np.dtype(("float32" if is_short else "float64") if is_float else "int64")
    numbers = _cast(column, dtype)
    ordered = np.sort(numbers if dtype.kind == "i" else numbers[np.isfinite(numbers)])
    if not ordered.size:
        return NumericChannel(
            name=name,
            counts=np.zeros(3, np.int64),
            edges=ordered,
            centers=np.zeros(0),
            mean=math.nan,
            sd=math.nan,
        )
    edges = _edges(ordered, n_bins)
    # Scaled while they are summed: squares and sums of the largest floats are not finite.
    scale = max(abs(float(ordered[0])), abs(float(ordered[-1])), np.finfo(np.float64).tiny)
    scaled = ordered.astype(np.float64) / scale
    ends = ordered.searchsorted(edges, side="right")
    centers = np.array(
        [
            scaled[start:stop].mean() if stop > start else low / 2 + high / 2
            for (start, stop), (low, high) in zip(
                itertools.pairwise(ends),
                itertools.pairwise(edges.astype(np.float64) / scale),
                strict=True,
            )
        ]
    )
    return NumericChannel(
        name=name,
        counts=np.zeros(edges.size + 3, np.int64),
        edges=edges,
        # A mean may leave its bin by a rounding; neighbours would then be out of order.
        centers=np.clip(centers * scale, edges[:-1].astype(np.float64), edges[1:]),
        mean=float(scaled.mean() * scale),
        sd=0.0 if ordered[0] == ordered[-1] else float(scaled.std() * scale),
    )


def _edges(ordered: Column, n_bins: int) -> Column:
    """Rising edges, the first one just before the minimum: quantiles, and both sides of atoms."""
    n_rows = ordered.size
    heavy = max(2, math.ceil(n_rows / n_bins))
    # A run of that many equal values covers one of these places for certain.
    candidates = np.unique(ordered[heavy - 1 :: heavy])
    starts = ordered.searchsorted(candidates, side="left")
    stops = ordered.searchsorted(candidates, side="right")
    edges = [_before(ordered[0])]
    done = 0
    for start, stop in zip(starts, stops, strict=True):
        if stop - start >= heavy:
            edges += _quantiles(ordered[done:start], n_rows, n_bins)[:-1]
            edges += [_before(ordered[start]), ordered[start]]
            done = stop
    edges += _quantiles(ordered[done:], n_rows, n_bins)
    return np.unique(np.array(edges, ordered.dtype))


def _quantiles(ordered: Column, n_rows: int, n_bins: int) -> list[Any]:
    """Upper edges that cut these rows into bins of nearly n_rows / n_bins each."""
    parts = max(1, round(ordered.size * n_bins / n_rows))
    if not ordered.size:
        return []
    return [ordered[-(-part * ordered.size // parts) - 1] for part in range(1, parts + 1)]


def _fit_levels(name: str, column: Column, levels_max: int) -> CategoricalChannel:
    rows: Counter[str] = Counter()
    for value, n_rows in Counter(column.tolist()).items():
        if isinstance(value, str | bytes):
            rows[level_of(value)] += n_rows
    by_rows = sorted(rows, key=lambda level: (-rows[level], level))
    levels = tuple(by_rows[:levels_max])
    return CategoricalChannel(
        name=name,
        counts=np.zeros(len(levels) + 4, np.int64),
        levels=levels,
        rare=tuple(sorted(by_rows[levels_max : levels_max + KNOWN_LEVELS_MAX])),
        n_levels=len(rows),
        n_single=sum(n_rows == 1 for n_rows in rows.values()),
    )


def level_of(value: str | bytes) -> str:
    """Name under which a level is known: text, and not longer than LEVEL_LENGTH_MAX."""
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    if len(text) <= LEVEL_LENGTH_MAX:
        return text
    return (
        f"{text[:64]}~{blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"
    )


def _level_label(level: str) -> str:
    """The name itself, in quotes where it could be taken for a word of ours or for nothing."""
    return json.dumps(level) if level in _WORDS or not level or level[0] == '"' else level


def _number(value: object) -> int | float | None:
    """A number, nan for what is missing, None for any other thing."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int | np.integer | np.bool_):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    return math.nan if _is_missing(value) else None


def _is_missing(value: object) -> bool:
    """None, nan, and the marks of pandas, which is not imported to ask."""
    if value is None:
        return True
    if isinstance(value, float | np.floating):
        return bool(value != value)  # noqa: PLR0124  # only nan differs from itself
    return type(value).__name__ in {"NAType", "NaTType"}


def _float(number: float) -> float:
    """A number as a float, beyond its range as an infinity."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _clamp(number: int) -> int:
    return min(max(number, -(2**63)), 2**63 - 1)


def _cast(column: Column, dtype: np.dtype[Any]) -> Column:
    """Numbers in the type of the edges; what is too large for it goes to its end."""
    if dtype.kind == "i" and column.dtype.kind == "u" and column.dtype.itemsize == 8:
        column = np.minimum(column, np.array(_INT64.max, column.dtype))
    with np.errstate(over="ignore"):
        return column.astype(dtype, copy=False)


def _before(number: Any) -> Any:
    """The number just before this one, in its own type.

    Never below the smallest finite one, and never one between zero and the smallest normal number:
    a runtime in the same process may tell the processor to take those for zero.
    """
    if isinstance(number, np.integer):
        return _clamp(int(number) - 1)
    kind = np.finfo(number.dtype)
    if number == -kind.max:
        return number
    before = np.nextafter(number, np.array(-np.inf, number.dtype), dtype=number.dtype)
    if abs(before) < kind.tiny:
        return -kind.tiny if number <= 0 else number.dtype.type(0)
    return before


def _after(number: Any) -> Any:
    """The number just after, for labels."""
    if isinstance(number, np.integer):
        return int(number) + 1
    if number == -np.finfo(number.dtype).tiny:
        return number.dtype.type(0)
    return np.nextafter(number, np.array(np.inf, number.dtype), dtype=number.dtype)


def _brief(number: Any) -> str:
    """Six digits, enough for people."""
    if isinstance(number, int | np.integer):
        return str(int(number))
    return f"{_plain(number):.6g}"


def _exact(number: Any) -> str:
    """As many digits as tell this number from its neighbours in its type."""
    if isinstance(number, int | np.integer):
        return str(int(number))
    return str(number.dtype.type(_plain(number)))


def _plain(number: Any) -> Any:
    """Zero for the number that stands just before it."""
    return 0.0 if number == -np.finfo(number.dtype).tiny else number + 0.0
