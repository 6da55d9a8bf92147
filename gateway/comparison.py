"""Whether two versions' answers to one request agree, output by output and row by row. Pure.

The same for copies that ran in a shadow and for captures that are replayed. A row of an output
disagrees when any of its values does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.tensors import BFLOAT16, Array, datatype, widened
from registry.routes import Tolerance

DEFAULT = Tolerance()
_EXACT = Tolerance(atol=0.0, rtol=0.0)

Rows = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Difference:
    """How one output of two versions differs on one request."""

    differs: Rows
    """(n_rows,) whether the row disagrees."""
    distance: Distances
    """(n_rows,) the largest distance of two numbers in the row; infinite where they have none: a
    NaN or an infinity against something else, two texts that differ, or no such row."""
    problem: str = ""
    """Why nothing could be compared: the output is missing, or of another shape or datatype."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two answers to one request differ."""

    outputs: Mapping[str, Difference]
    """By output of the first; outputs that only the second has are passed over."""
    differs: Rows
    """(n_rows,) whether any output of the row disagrees."""

    @property
    def is_agreed(self) -> bool:
        """Whether no row disagrees: the request as one case."""
        return not self.differs.any()


def compare(
    first: Mapping[str, Array],
    second: Mapping[str, Array],
    rows: int,
    tolerances: Mapping[str, Tolerance] | None = None,
) -> Comparison:
    """The differences of two answers to the same request.

    Parameters
    ----------
    first, second : outputs by name; the first one's values are what relative distances refer to
    rows : of the request; an output without a row for each of them is compared as a whole, and
        what is found counts for every row
    tolerances : by output. Floating-point numbers of an output that is not named agree within the
        default tolerance; whole numbers when they are equal, since they may be classes. Texts and
        truth values agree when they are equal, whatever is named.

    Notes
    -----
    Numbers agree when |second - first| <= atol + rtol * |first|, or, where a threshold is given,
    when both are below it or both are not. Two NaN agree, two equal infinities too.

    >>> one, other = np.array([0.5, 0.5, np.nan]), np.array([0.5, 0.6, np.nan])
    >>> found = compare({"score": one}, {"score": other}, 3)
    >>> found.differs.tolist(), found.outputs["score"].distance.round(6).tolist()
    ([False, True, False], [0.0, 0.1, 0.0])
    """
    named = tolerances or {}
    outputs = {
        name: _difference(array, second.get(name), rows, named.get(name))
        for name, array in first.items()
    }
    differs = np.zeros(rows, np.bool_)
    for difference in outputs.values():
        differs |= difference.differs
    return Comparison(outputs, differs)


def _difference(
    one: Array, other: Array | None, rows: int, tolerance: Tolerance | None
) -> Difference:
    if other is None:
        return _nothing(rows, "the second has no such output")
    if one.shape != other.shape:
        return _nothing(rows, f"shape {list(one.shape)} against {list(other.shape)}")
    kinds = datatype(one), datatype(other)
    if kinds[0] != kinds[1] and "BYTES" in kinds:
        return _nothing(rows, f"{kinds[0]} against {kinds[1]}")
    if BFLOAT16 in (one.dtype, other.dtype):
        one = widened(one) if one.dtype == BFLOAT16 else one
        other = widened(other) if other.dtype == BFLOAT16 else other
    differs, distance = _values(one, other, tolerance)
    if one.ndim and one.shape[0] == rows:
        within = tuple(range(1, one.ndim))
        largest = distance.max(axis=within, initial=0.0)
        return Difference(np.asarray(differs.any(axis=within)), largest)
    return Difference(
        np.full(rows, differs.any()), np.full(rows, distance.max(initial=0.0), np.float64)
    )


def _values(one: Array, other: Array, tolerance: Tolerance | None) -> tuple[Rows, Distances]:
    """Whether the values disagree, and how far they are apart; both in the shape of the output."""
    kinds = one.dtype.kind + other.dtype.kind
    if not set(kinds) <= set("iuf"):
        differs = np.asarray(one != other, np.bool_)
        return differs, np.where(differs, math.inf, 0.0)
    if "f" not in kinds:
        tolerance = tolerance or _EXACT
        if one.dtype != other.dtype:
            one, other = one.astype(object), other.astype(object)
            distance = np.abs(other - one).astype(np.float64)
        else:
            distance = _apart(one, other)
        reference = one.astype(np.float64)
        equal = np.asarray(one == other, np.bool_)
        both_nan: Any = False
        if tolerance.threshold is not None:
            sides = np.asarray(one >= tolerance.threshold, np.bool_)
            return sides != np.asarray(other >= tolerance.threshold, np.bool_), distance
    else:
        tolerance = tolerance or DEFAULT
        reference, second = one.astype(np.float64), other.astype(np.float64)
        equal = reference == second
        both_nan = np.isnan(reference) & np.isnan(second)
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.abs(second - reference)
        distance = np.where(equal | both_nan, 0.0, distance)
        distance = np.where(np.isnan(distance), math.inf, distance)
        if tolerance.threshold is not None:
            one_nan = np.isnan(reference) != np.isnan(second)
            sides = (reference >= tolerance.threshold) != (second >= tolerance.threshold)
            return sides | one_nan, distance
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = tolerance.atol + tolerance.rtol * np.abs(reference)
    # An infinite number allows an infinite distance: it agrees with its equal only.
    agrees = equal | both_nan | ((distance <= allowed) & np.isfinite(allowed))
    return np.asarray(~agrees), distance


def _apart(one: Array, other: Array) -> Distances:
    """Distances of whole numbers of one type, which a subtraction could wrap around."""
    with np.errstate(over="ignore"):
        wrapped = np.where(one > other, one - other, other - one)
    return wrapped.view(f"u{one.dtype.itemsize}").astype(np.float64)


def _nothing(rows: int, problem: str) -> Difference:
    return Difference(np.ones(rows, np.bool_), np.full(rows, math.inf), problem)
