"""Named arrays: their datatypes, and rows of several requests stacked into one batch and back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from registry.signature import DATATYPES

Array = np.ndarray[Any, np.dtype[Any]]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""The upper half of a float32. numpy has no such number: this keeps its bits apart from UINT16."""

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
"""numpy's type for each datatype; BYTES are Python strings."""

DATATYPE_OF: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}

assert tuple(DTYPES) == DATATYPES  # noqa: S101  two rooms must name the same datatypes


def datatype(array: Array) -> str:
    """The protocol's name for an array's type; text of any width is BYTES."""
    return DATATYPE_OF.get(array.dtype) or "BYTES"


def widened(array: Array) -> Array:
    """BF16 as float32; exact."""
    wide: Array = np.left_shift(array.view("<u2"), 16, dtype=np.uint32).view(np.float32)
    return wide


def narrowed(array: Array) -> Array:
    """Float32 as BF16, rounded to the nearest, ties to even; what is too large becomes infinite."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # Rounding could carry a NaN into infinity or zero: it keeps its upper half, and stays quiet.
    kept = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded)
    return kept.astype("<u2").view(BFLOAT16).reshape(array.shape)


def stack(requests: Sequence[Sequence[Array]]) -> list[Array]:
    """Tensor k of every request, one above the other, for every k."""
    if len(requests) == 1:
        return list(requests[0])
    return [np.concatenate(tensors) for tensors in zip(*requests, strict=True)]


def n_bytes(tensors: Sequence[Array]) -> int:
    """Memory the arrays point to; a text counts as 64 bytes."""
    return sum(array.nbytes if array.dtype != np.object_ else 64 * array.size for array in tensors)
