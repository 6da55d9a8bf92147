"""Classes of a classifier: which one a row of probabilities stands for, and how sure that is.

A matrix of probabilities says little column by column: that one class took over another's place, or
that answers have become unsure, is plain in these two.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

CLASS = "class"
"""Ending of the channel of classes, behind the name of the output and a dot."""
CONFIDENCE = "confidence"
LABELS_MAX = 50
"""Different values of a column that may still be classes."""

_SLACK = 0.01
"""Half precision rounds a thousand probabilities to a sum that far from 1."""

Rows = npt.NDArray[Any]


def are_probabilities(rows: Rows) -> bool:
    """Whether (n_rows, n_classes) numbers are probabilities of classes that exclude each other.

    Rows with nan or infinities say nothing for or against it.
    """
    if rows.ndim != 2 or rows.shape[1] < 2 or rows.dtype.kind != "f":
        return False
    values = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
    if not values.size or values.min() < -_SLACK or values.max() > 1 + _SLACK:
        return False
    return bool((np.abs(values.sum(axis=1) - 1) <= _SLACK).all())


def are_labels(column: Rows) -> bool:
    """Whether (n_rows,) whole numbers are few enough values to be classes."""
    return column.dtype.kind in "iu" and 0 < np.unique(column).size <= LABELS_MAX


def classes(rows: Rows, names: Sequence[str] = ()) -> Rows:
    """(n_rows,) names of the most probable class, None where a probability is nan.

    Parameters
    ----------
    rows : (n_rows, n_classes) probabilities; the first of equal ones counts
    names : of the classes; without, they are called by their number

    >>> classes(np.array([[0.2, 0.8], [0.9, 0.1], [np.nan, 0.1]])).tolist()
    ['1', '0', None]
    """
    if not rows.size:
        return np.zeros(rows.shape[0], np.object_)
    table = np.empty(rows.shape[1] + 1, np.object_)
    table[:-1] = names or [str(k) for k in range(rows.shape[1])]
    # A sum is nan if any is; infinities of both signs are no probabilities either.
    with np.errstate(invalid="ignore"):
        is_missing = np.isnan(rows.sum(axis=1))
    found: Rows = table[np.where(is_missing, rows.shape[1], rows.argmax(axis=1))]
    return found


def confidence(rows: Rows) -> Rows:
    """(n_rows,) the largest probability of each row, nan where one is."""
    if not rows.size:
        return np.full(rows.shape[0], np.nan, rows.dtype)
    largest: Rows = rows.max(axis=1)
    return largest


def named(column: Rows) -> Rows:
    """(n_rows,) whole numbers as the names of classes.

    >>> named(np.array([1, 0, 1])).tolist()
    ['1', '0', '1']
    """
    values, place = np.unique(column, return_inverse=True)
    found: Rows = np.array([str(value) for value in values.tolist()], np.object_)[place]
    return found
