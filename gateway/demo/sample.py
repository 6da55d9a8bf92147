"""The vendored flights of 2013 and where the demo's models are.

Reads with numpy alone. Nothing here changes a value; what the file holds and where it comes from is
in NOTICE, how it was made in make.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = (
    "temp",
    "dewp",
    "humid",
    "wind_speed",
    "precip",
    "pressure",
    "visib",
    "distance",
    "hour",
)
"""Inputs of the models that are float32; NaN where the weather station reported nothing."""

LEVELS = ("carrier", "origin")
"""Inputs of the models that are strings."""

MODELS = ("january_march", "january_june")
"""Each named after the months it was trained on."""

REFERENCE_MONTHS = (1, 2, 3)
"""What the first model knows of the year."""

TRAINING_MONTHS = {"january_march": REFERENCE_MONTHS, "january_june": (1, 2, 3, 4, 5, 6)}
"""What each model knows of the year, and is compared with."""

SAMPLE_PATH = Path(__file__).with_name("flights.npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Flights in order of their scheduled departure, one row each; the arrays are read-only."""

    n_rows: int
    month: NDArray[np.int64]
    """(n_rows,) 1 to 12, as on the calendar of New York."""
    time: NDArray[np.float64]
    """(n_rows,) scheduled departure in seconds since 1970-01-01 UTC, never decreasing."""
    columns: dict[str, NDArray[np.generic]]
    """Each (n_rows,): the models' inputs by name, float32 or object holding str."""
    late: NDArray[np.bool_]
    """(n_rows,) the outcome: arrived more than 15 minutes after schedule."""


def load(path: Path = SAMPLE_PATH) -> Sample:
    """Read the whole sample, 2,000 flights of each month."""
    with np.load(path, allow_pickle=False) as stored:
        columns: dict[str, NDArray[np.generic]] = {name: stored[name] for name in NUMBERS}
        # The file holds ASCII of fixed width; onnxruntime wants str objects.
        columns |= {name: stored[name].astype(np.str_).astype(object) for name in LEVELS}
        sample = Sample(
            n_rows=len(stored["late"]),
            month=stored["month"].astype(np.int64),
            time=stored["time"].astype(np.float64),
            columns=columns,
            late=stored["late"],
        )
    for array in (sample.month, sample.time, sample.late, *columns.values()):
        array.setflags(write=False)
    return sample


def reference() -> dict[str, NDArray[np.generic]]:
    """Return the columns of January to March: what later rows are compared with."""
    sample = load()
    chosen = np.isin(sample.month, REFERENCE_MONTHS)
    return {name: column[chosen] for name, column in sample.columns.items()}


def model_path(name: str) -> Path:
    """Return the ONNX file of one of `MODELS`; raises ValueError for any other name."""
    if name not in MODELS:
        raise ValueError(f"no demo model {name!r}; there are: {', '.join(MODELS)}")
    return Path(__file__).with_name(f"{name}.onnx")


def profile_path(name: str) -> Path:
    """Return the reference profile of one of `MODELS`; raises ValueError for any other name."""
    return model_path(name).with_suffix(".json")


def request_of(sample: Sample, rows: range) -> dict[str, Any]:
    """Flights as a request of the Open Inference Protocol."""
    return {
        "inputs": [
            {
                "name": name,
                "shape": [len(rows), 1],
                "datatype": "BYTES" if name in LEVELS else "FP32",
                "data": column[rows.start : rows.stop].tolist(),
            }
            for name, column in sample.columns.items()
        ]
    }
