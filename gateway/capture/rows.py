"""A capture row by row, for whoever exports kept predictions."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gateway.capture.reading import Reading
from gateway.capture.record import Record, TensorKept, array_of
from gateway.errors import TensorError
from gateway.labels.rows import Exported
from gateway.tensors import BFLOAT16, widened


class CapturedRows:
    """The answers in a capture, as a database of predictions gives those it keeps.

    Parameters
    ----------
    read : opens the capture anew; an export reads it twice
    """

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self.said = ""
        """What was passed over when it was last read to its end."""

    def exported(
        self, model: str, *, since: float = 0.0, until: float = math.inf, chunk: int = 10_000
    ) -> Iterator[list[Exported]]:
        """Rows of requests that were answered in [since, until), file by file, in chunks."""
        found: list[Exported] = []
        reading = self._read()
        for record in reading:
            if record.model == model and record.code == "ok" and since <= record.time < until:
                found += rows_of(record)
            while len(found) >= chunk:
                yield found[:chunk]
                found = found[chunk:]
        self.said = reading.said()
        if found:
            yield found


def rows_of(record: Record) -> list[Exported]:
    """One for each row; a tensor without a row for each is left out."""
    inputs = None if record.inputs is None else _columns(record.inputs, record.rows)
    outputs = _columns(record.outputs or (), record.rows)
    version = record.version if record.served is None else record.served
    traffic = record.traffic if record.served is None else "fallback"
    return [
        Exported(
            record.id,
            k,
            version,
            traffic,
            record.variant,
            record.time,
            record.sampled,
            {name: values[k] for name, values in outputs.items()},
            None if inputs is None else {name: values[k] for name, values in inputs.items()},
            None,
            None,
        )
        for k in range(record.rows)
    ]


def _columns(tensors: Sequence[TensorKept], rows: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for tensor in tensors:
        try:
            array = array_of(tensor)
        except TensorError:
            continue
        if not array.ndim or array.shape[0] != rows:
            continue
        if array.dtype == BFLOAT16:
            array = widened(array)
        is_flat = array.size == rows
        found[tensor.name] = (array.reshape(rows) if is_flat else array.reshape(rows, -1)).tolist()
    return found
