"""JSON under inspection: fields of a type, or a sentence about what is wrong and where."""

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from monitors.counts import Counts
from monitors.errors import ProfileError

TEXT_BYTES_MAX = 64 * 2**20
"""Longest text that is read as a profile."""

COUNT_MAX = 2**53


def parse(text: str | bytes) -> dict[str, Any]:
    """The object that a text holds; ProfileError for anything else."""
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


class Part:
    """One JSON object under inspection: gets a field of a type, or says what is wrong where."""

    def __init__(self, document: dict[str, Any], channel: str | None = None) -> None:
        self._document = document
        self._channel = channel

    def error(self, problem: str, name: str) -> ProfileError:
        """The error that names this part and field."""
        return ProfileError(problem, channel=self._channel, field=name)

    def get(self, name: str, kind: type) -> Any:
        """A field of exactly this type."""
        if name not in self._document:
            raise self.error("is lacking", name)
        value = self._document[name]
        if type(value) is not kind:
            words = {
                dict: "an object",
                list: "a list",
                str: "a text",
                int: "an integer",
                bool: "true or false",
            }
            raise self.error(f"must be {words[kind]}", name)
        return value

    def integer(self, name: str, *, low: int = 0) -> int:
        """An integer that floats can hold."""
        value: int = self.get(name, int)
        if not low <= value <= COUNT_MAX:
            raise self.error(f"must be between {low} and {COUNT_MAX}", name)
        return value

    def counts(self, n_bins: int, n_rows: int) -> Counts:
        """Rows per bin of a channel."""
        values = self.get("counts", list)
        if len(values) != n_bins:
            raise self.error(f"holds {len(values)} counts for {n_bins} bins", "counts")
        if any(type(value) is not int or not 0 <= value <= COUNT_MAX for value in values):
            raise self.error("must hold integers that are not negative", "counts")
        if sum(values) != n_rows:
            raise self.error(f"counts {sum(values)} rows of {n_rows}", "counts")
        counts = np.array(values, np.int64)
        counts.flags.writeable = False
        return counts

    def floats(self, name: str) -> list[float]:
        """Finite numbers."""
        values = self.get(name, list)
        if any(type(value) not in {int, float} for value in values):
            raise self.error("must hold numbers", name)
        return [self._float(value, name) for value in values]

    def float_or_none(self, name: str) -> float:
        """A finite number; null is nan."""
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
        """Texts."""
        values = self.get(name, list)
        if any(type(value) is not str for value in values):
            raise self.error("must hold texts", name)
        return tuple(values)

    def finish(self, names: set[str]) -> None:
        """Refuse fields of other names."""
        for name in self._document:
            if name not in names:
                raise self.error(f"is not known; known are {', '.join(sorted(names))}", name)

    def is_null(self, name: str) -> bool:
        """Whether a field is null or absent."""
        return self._document.get(name) is None

    def part(self, name: str) -> "Part | None":
        """An object within, or None where it is null or absent."""
        if self.is_null(name):
            return None
        return Part(self.get(name, dict), self._channel)

    def integers(self, name: str, shape: tuple[int, ...], *, low: int = 0) -> npt.NDArray[np.int64]:
        """Nested lists of integers of this shape; -1 in it stands for any length."""
        array = self._array(name, shape, {int})
        if any(not low <= value <= COUNT_MAX for value in array.ravel().tolist()):
            raise self.error(f"must be between {low} and {COUNT_MAX}", name)
        return array.astype(np.int64)

    def numbers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        """Nested lists of finite numbers of this shape; null is nan."""
        array = self._array(name, shape, {int, float, type(None)})
        flat = [math.nan if v is None else self._float(v, name) for v in array.ravel().tolist()]
        return np.array(flat, np.float64).reshape(array.shape)

    def _array(self, name: str, shape: tuple[int, ...], types: set[type]) -> npt.NDArray[Any]:
        array = np.array(self.get(name, list), object)
        if len(array.shape) != len(shape) or any(
            wanted not in (-1, found) for wanted, found in zip(shape, array.shape, strict=True)
        ):
            words = ", ".join("any" if length < 0 else str(length) for length in shape)
            raise self.error(f"must be a list of shape ({words})", name)
        if any(type(value) not in types for value in array.ravel().tolist()):
            raise self.error("must hold numbers", name)
        return array
