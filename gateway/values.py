"""What units were asked and answered first, as bins that are frozen before a candidate gets any.

Numbers fall between the champion's own deciles, classes (whole numbers of few values, texts) on its
own levels, with one more for what it had never said. Of texts only a hash is kept: a rollout is
part of a revision, and those are kept for ever.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

import numpy as np

from gateway.tensors import Array
from monitors.classes import are_probabilities
from monitors.guards.slow import ROWS_MIN

N_BINS = 10
MISSING = 255
"""In place of a bin, where a unit has no such value."""
CHANNELS_MAX = 8
"""Of inputs, and of outputs: the first ones there are."""
LEVELS_MAX = 32
"""Classes with a bin of their own, the most frequent ones; others share the last."""
_TEXTS_MAX = 100
"""Different texts among the champion's own; more are no classes."""

Value: TypeAlias = float | str
"""A number, or the hash of a text."""
_ARGMAX = -1


class Channel(NamedTuple):
    """One value of a request or an answer."""

    name: str
    """`input:x[0]`, `output:score[1]`; `output:probabilities.class` for the most probable one."""
    tensor: int
    column: int


class Frozen(NamedTuple):
    """Bins of all channels."""

    edges: Mapping[str, Sequence[float]]
    """Of numbers: upper edges of all bins but the last."""
    levels: Mapping[str, Sequence[str]]
    """Of classes: what each bin but the last stands for."""


class Bins:
    """Frozen bins, ready to be asked."""

    __slots__ = ("_edges", "_levels", "names")

    def __init__(self, frozen: Frozen) -> None:
        self._edges = {name: tuple(edges) for name, edges in frozen.edges.items()}
        self._levels = {
            name: {level: at for at, level in enumerate(levels)}
            for name, levels in frozen.levels.items()
        }
        self.names = [*self._edges, *self._levels]
        """Of the channels, in the order of `of`."""

    def __bool__(self) -> bool:
        return bool(self.names)

    def of(self, values: Mapping[str, Value]) -> list[int]:
        """The bin of each channel's value."""
        found = [
            bisect_right(edges, value)
            if isinstance(value := values.get(name), float | int)
            else MISSING
            for name, edges in self._edges.items()
        ]
        for name, levels in self._levels.items():
            missed = name not in values
            found.append(MISSING if missed else levels.get(_level(values[name]), len(levels)))
        return found

    def n(self, name: str) -> int:
        """Bins of a channel."""
        return len(self._edges.get(name) or self._levels.get(name) or ()) + 1


def freeze(samples: Iterable[Mapping[str, Sequence[Value]]]) -> Frozen:
    """Bins from values that the champion met, by channel; none before there are enough of them."""
    together: dict[str, list[Value]] = {}
    for each in samples:
        for channel, values in each.items():
            together.setdefault(channel, []).extend(values)
    edges: dict[str, tuple[float, ...]] = {}
    levels: dict[str, tuple[str, ...]] = {}
    if not together or max(map(len, together.values())) < ROWS_MIN:
        return Frozen(edges, levels)
    for channel, values in sorted(together.items()):
        counts = Counter(_level(value) for value in values)
        if any(isinstance(value, str) for value in values):
            if len(counts) > _TEXTS_MAX:
                continue
        elif len(counts) > LEVELS_MAX or not all(isinstance(value, int) for value in values):
            at = np.arange(1, N_BINS) / N_BINS
            numbers = [float(value) for value in values]
            edges[channel] = tuple(np.unique(np.quantile(numbers, at)).tolist())
            continue
        # Ties by name, so that every order of workers gives the same bins.
        ranked = sorted(counts, key=lambda level: (-counts[level], level))
        levels[channel] = tuple(ranked[:LEVELS_MAX])
    return Frozen(edges, levels)


def channels(prefix: str, tensors: Sequence[Array], names: Sequence[str]) -> list[Channel]:
    """The first few columns there are, and the most probable class of probabilities."""
    found: list[Channel] = []
    for place, (tensor, name) in enumerate(zip(tensors, names, strict=False)):
        if tensor.dtype.kind not in "fiubOUS":
            continue
        width = int(np.prod(tensor.shape[1:])) if tensor.ndim > 1 else 1
        if width > 2 and prefix == "output:" and are_probabilities(_rows(tensor)):
            found.append(Channel(f"{prefix}{name}.class", place, _ARGMAX))
        found += [Channel(f"{prefix}{name}[{j}]", place, j) for j in range(width)]
    return found[:CHANNELS_MAX]


def read(wanted: Sequence[Channel], tensors: Sequence[Array]) -> dict[str, Value]:
    """The first row's values; numbers that are not finite are none."""
    found: dict[str, Value] = {}
    for name, tensor, column in wanted:
        if tensor >= len(tensors) or not tensors[tensor].size:
            continue
        rows = _rows(tensors[tensor])
        if column >= rows.shape[1]:
            continue
        if column == _ARGMAX:
            found[name] = int(rows[0].argmax())
            continue
        value = rows[0, column]
        if rows.dtype.kind in "OUS":
            found[name] = _hash(value)
        elif rows.dtype.kind != "f":
            found[name] = int(value)
        elif value - value == 0:  # finite
            found[name] = float(value)
    return found


def _rows(tensor: Array) -> Array:
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def _level(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}" if value % 1 else str(int(value))


def _hash(text: object) -> str:
    data = text if isinstance(text, bytes) else str(text).encode()
    return f"#{blake2b(data, digest_size=6).hexdigest()}"
