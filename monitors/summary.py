"""Embeddings and images as a few columns: how long a row is, and how far it lies along fixed lines.

No learning and no state: the lines are drawn from the width alone, so that profile and served rows
meet the same ones wherever they are reckoned. An embedding of 768 numbers costs some 30 us a row,
an image of 3 x 224 x 224 some 3 ms: sample those.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

N_LINES = 8
"""Random projections of a row; with its norm, nine columns."""

_SEED = 20130101
_VALUES_AT_ONCE = 2**20


def names(name: str) -> list[str]:
    """What the columns of a summarised one are called."""
    return [f"{name}.norm", *(f"{name}.projection[{k}]" for k in range(N_LINES))]


def is_wide(values: object) -> bool:
    """Whether these are rows of several numbers each, to be summarised."""
    return (
        isinstance(values, np.ndarray)
        and values.ndim > 1
        and values.dtype.kind in "fiub"
        and values.size > values.shape[0]
    )


def summarised(name: str, rows: npt.NDArray[np.generic]) -> dict[str, npt.NDArray[np.float32]]:
    """Columns of (n_rows, ...) numbers: the Euclidean norm and eight projections.

    The lines are corners of a cube, so that a shift of few or of many coordinates moves several
    of them; a value that is missing or infinite makes its row missing in all.
    """
    flat = rows.reshape(rows.shape[0], -1).astype(np.float64)
    lines = _lines(flat.shape[1])
    found = np.empty((1 + N_LINES, flat.shape[0]))
    step = max(1, _VALUES_AT_ONCE // max(1, flat.shape[1] * N_LINES))
    with np.errstate(over="ignore", invalid="ignore"):
        found[0] = np.sqrt((flat**2).sum(axis=1))
        for start in range(0, flat.shape[0], step):
            part = flat[start : start + step]
            # Summed row by row, not by a product of matrices: the same in every batch.
            found[1:, start : start + step] = (part[:, np.newaxis] * lines).sum(axis=-1).T
        found[:, ~np.isfinite(found).all(axis=0)] = np.nan
        columns = found.astype(np.float32)
    return dict(zip(names(name), columns, strict=True))


@lru_cache(maxsize=16)
def _lines(width: int) -> npt.NDArray[np.float64]:
    """(N_LINES, width) directions of length 1."""
    draw = np.random.default_rng([_SEED, width])
    corners = 2.0 * draw.integers(0, 2, (N_LINES, width)) - 1.0
    lines: npt.NDArray[np.float64] = corners / np.sqrt(max(1, width))
    return lines
