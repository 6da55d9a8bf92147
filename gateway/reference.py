"""Reference data to a reference profile: read columns, make them what the model sees, fit.

The reference is cast to the signature's datatypes before it is binned, and output channels come
from running the model on it: a value rounded differently would fall into another bin, and look
like drift.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from gateway.columns import NAMES, Column, columns_of, with_answers
from gateway.config import RuntimeConfig
from gateway.errors import BadRequestError, ConfigError, shown
from gateway.labels.pairs import pairs_of, task_of
from gateway.labels.rows import Joined
from gateway.labels.target import of as target_of
from gateway.runtime import Session
from gateway.tensors import BFLOAT16, DTYPES, Array, narrowed, widened
from monitors import MonitorError, Profile
from monitors.loss import LossReference
from registry.signature import Signature, TensorSpec

Progress = Callable[[float], None]
"""Is told the share done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is known of the order of the reference's rows."""

    is_ordered: bool = False
    """They are in the order of time."""
    times: Array | None = None
    """(n_rows,) seconds since 1970 (UTC)."""
    segments: str | None = None
    """The column whose most frequent values are watched by themselves."""


_NO_ORDER = Order()
_MISSING = frozenset(("", "na", "n/a", "nan", "null", "none"))
_RUN_ROWS = 1024


def read(file: Path, progress: Progress = lambda _: None) -> dict[str, Array]:
    """Columns of a CSV file with a header line, or of an NPZ file of arrays.

    A CSV column whose values are all numbers (or missing: empty, NA, NaN, null) is numeric.

    Raises
    ------
    BadRequestError : the file is missing, empty, or a line has another number of fields.
    """
    try:
        if file.suffix == ".npz":
            return _read_npz(file)
        return _read_csv(file, progress)
    except FileNotFoundError:
        raise BadRequestError(f"{file.name}: no such file") from None
    except IsADirectoryError:
        raise BadRequestError(f"{file.name}: is a directory") from None
    except (UnicodeDecodeError, csv.Error):
        raise BadRequestError(f"{file.name}: not CSV in UTF-8") from None
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise BadRequestError(f"{file.name}: cannot be read ({error})") from None


def _read_npz(file: Path) -> dict[str, Array]:
    with np.load(file, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    for name, values in columns.items():
        if values.ndim != 1:
            raise BadRequestError(
                f"{file.name}: {name!r} has shape {list(values.shape)}; a column has one axis"
            )
    return columns


def fit(
    columns: Mapping[str, Array],
    lineage: Mapping[str, object],
    progress: Progress = lambda _: None,
    *,
    order: Order = _NO_ORDER,
) -> Profile:
    """A profile of the columns as inputs, each named `input:NAME`.

    Raises
    ------
    BadRequestError : a column that cannot be profiled, by name.
    """
    named = {f"input:{name}": values for name, values in columns.items()}
    return _fitted(named, lineage, progress, order)


def fit_to_model(
    columns: Mapping[str, Array],
    model: Path,
    lineage: Mapping[str, object],
    progress: Progress = lambda _: None,
    *,
    order: Order = _NO_ORDER,
) -> Profile:
    """A profile of a model's inputs and, by running it, its outputs.

    Columns go to inputs by name; to one matrix input in their order.

    Raises
    ------
    BadRequestError : a column is missing, superfluous, or not what the model takes.
    VersionRefusedError : the model cannot be opened.
    """
    signature, inputs, outputs = _run(columns, model, lambda done: progress(0.5 * done))
    channels, _ = columns_of(signature)
    n = len(inputs[0])
    values = {channel.channel: _column(channel, inputs, outputs) for channel in channels}
    if len(inputs) == 1 and list(columns) != [signature.inputs[0].name]:
        # So that a table with its columns in another order is put in order when it is served.
        lineage = {**lineage, NAMES: list(columns)}
    whole = {name: column for name, column in values.items() if len(column) == n}
    whole = with_answers(whole, signature)
    return _fitted(whole, lineage, lambda done: progress(0.5 + 0.5 * done), order)


def fit_labels(
    columns: Mapping[str, Array],
    truth: Array,
    model: Path,
    lineage: Mapping[str, object],
    progress: Progress = lambda _: None,
    *,
    declared: Mapping[str, Any] | None = None,
    is_ordered: bool = False,
) -> LossReference:
    """What labels are compared with: how wrong a model is on labelled rows.

    Parameters
    ----------
    columns : inputs of rows that the model was not trained on
    truth : (n_rows,) what turned out to be true
    declared : output, column, task and positive label, where they cannot be seen

    Raises
    ------
    BadRequestError : a column is not what the model takes, or a label not what it answers.
    VersionRefusedError : the model cannot be opened.
    """
    signature, inputs, outputs = _run(columns, model, progress)
    n = len(inputs[0])
    if len(truth) != n:
        raise BadRequestError(f"{len(truth)} labels for {n} rows")
    try:
        target = target_of(signature, declared)
    except ConfigError as error:
        raise BadRequestError(str(error)) from None
    if target is None:
        raise BadRequestError("the model has no output that a label could be compared with")
    place = [spec.name for spec in signature.outputs].index(target.output)
    answers = outputs[place]
    answers = widened(answers) if answers.dtype == BFLOAT16 else answers
    if len(answers) != n:
        raise BadRequestError(f"output {target.output!r} has no row for each row")
    named = [{target.output: value} for value in answers.tolist()]
    labels = [_label(value) for value in truth.tolist()]
    rows = [
        Joined("", k, 1, "primary", "", 0.0, 1.0, 1.0, None, output, label, 0.0)
        for k, (output, label) in enumerate(zip(named, labels, strict=True))
        if label is not None
    ]
    known = (label for label in labels if label is not None)
    task = task_of((target.value(output) for output in named), known, target)
    pairs = pairs_of(rows, target, task)
    if len(pairs.rows) < len(rows):
        fitting = {row.row for row in pairs.rows}
        left = next(row for row in rows if row.row not in fitting)
        raise BadRequestError(
            f"row {left.row + 1}: label {shown(left.label)} does not fit output {target.output!r}"
            f" ({task}); say which label is class 1: --positive"
        )
    try:
        return LossReference.fit(pairs.outcomes(), is_ordered=is_ordered, lineage=lineage)
    except MonitorError as error:
        raise BadRequestError(str(error)) from None


def _label(value: Any) -> float | str | None:
    """A label of a table; None where it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else float(value)


def _run(
    columns: Mapping[str, Array], model: Path, progress: Progress
) -> tuple[Signature, list[Array], list[Array]]:
    """What the model takes and gives, and both for these rows."""
    session = Session(model, RuntimeConfig())
    inputs = _inputs(columns, session.signature)
    n = len(inputs[0])
    parts: list[list[Array]] = []
    for start in range(0, n, _RUN_ROWS):
        parts.append(session.run([array[start : start + _RUN_ROWS] for array in inputs]))
        progress(min(1.0, (start + _RUN_ROWS) / n))
    return session.signature, inputs, [np.concatenate(each) for each in zip(*parts, strict=True)]


def _fitted(
    columns: Mapping[str, Array], lineage: Mapping[str, object], progress: Progress, order: Order
) -> Profile:
    segments = order.segments
    if segments is not None and segments not in columns:
        segments = f"input:{segments}"
    try:
        return Profile.fit(
            columns,
            lineage=lineage,
            times=order.times,
            is_ordered=order.is_ordered,
            segments=segments,
            progress=progress,
        )
    except MonitorError as error:
        raise BadRequestError(str(error)) from None


def _inputs(columns: Mapping[str, Array], signature: Signature) -> list[Array]:
    specs = signature.inputs
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        most, least = max(lengths, key=lengths.__getitem__), min(lengths, key=lengths.__getitem__)
        raise BadRequestError(
            f"column {most!r} has {lengths[most]} rows, column {least!r} has {lengths[least]};"
            " they must agree"
        )
    if any(spec.shape[:1] != (-1,) or len(spec.shape) > 2 for spec in specs):
        raise BadRequestError("the model has an input that is neither a column nor a matrix")
    names = list(columns)
    if len(specs) == 1 and len(specs[0].shape) == 2 and specs[0].shape[1] != 1:
        width = specs[0].shape[1]
        if width not in (-1, len(names)):
            raise BadRequestError(
                f"input {specs[0].name!r} takes {width} columns, the data has {len(names)}"
            )
        return [np.stack([_cast(columns[name], specs[0], name) for name in names], axis=1)]
    wanted = [spec.name for spec in specs]
    if missing := [name for name in wanted if name not in columns]:
        raise BadRequestError(f"the data has no column {missing[0]!r}, which the model takes")
    return [
        _cast(columns[spec.name], spec, spec.name).reshape((-1, *spec.row_shape)) for spec in specs
    ]


def truth_of(columns: dict[str, Array], name: str) -> Array:
    """Take the column of labels out of the others.

    Raises
    ------
    BadRequestError : there is no such column.
    """
    if name not in columns:
        raise BadRequestError(f"the data has no column {shown(name)} of labels")
    return columns.pop(name)


def times_of(columns: dict[str, Array], name: str) -> Array:
    """Take the column of times out of the others, as seconds since 1970.

    Numbers are seconds; texts are dates as ISO 8601 writes them, in UTC unless they say otherwise.

    Raises
    ------
    BadRequestError : there is no such column, or a value is no time.
    """
    if name not in columns:
        raise BadRequestError(f"the data has no column {name!r} to tell the time by")
    values = columns.pop(name)
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    moments: list[float] = []
    for k, value in enumerate(values.tolist()):
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            raise BadRequestError(
                f"column {name!r}: row {k + 1} is {shown(value)}; not a time as 2026-01-31T12:00:00"
            ) from None
        moments.append((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    return np.array(moments)


def _cast(values: Array, spec: TensorSpec, name: str) -> Array:
    """The column in the datatype that the model will be given."""
    if spec.datatype == "BYTES":
        texts = ["" if value is None else str(value) for value in values.tolist()]
        return np.array(texts, dtype=np.object_)
    if values.dtype.kind not in "biuf":
        k = next(k for k, value in enumerate(values.tolist()) if not isinstance(value, int | float))
        raise BadRequestError(
            f"column {name!r}: row {k + 1} is {shown(values[k])}; the model takes {spec.datatype}"
        )
    is_half = spec.datatype == "BF16"
    dtype = np.dtype(np.float32) if is_half else DTYPES[spec.datatype]
    if dtype.kind in "iub" and values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BadRequestError(
            f"column {name!r} has missing values; {spec.datatype} cannot hold them"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype)
    if dtype.kind in "iub":
        changed = np.flatnonzero(cast != values)
    else:
        changed = np.flatnonzero(np.isinf(cast) & np.isfinite(values))
    if len(changed):
        raise BadRequestError(
            f"column {name!r}: row {changed[0] + 1} is {shown(values[changed[0]].item())};"
            f" {spec.datatype} cannot hold it"
        )
    return narrowed(cast) if is_half else cast


def _column(column: Column, inputs: Sequence[Array], outputs: Sequence[Array]) -> Array:
    array = (outputs if column.is_output else inputs)[column.tensor]
    matrix = array.reshape(len(array), -1) if len(array) else array.reshape(0, 1)
    return matrix[:, column.position]


def _read_csv(file: Path, progress: Progress) -> dict[str, Array]:
    size = max(file.stat().st_size, 1)
    with file.open(newline="", encoding="utf-8-sig") as stream:
        lines = csv.reader(stream, strict=True)
        header = next(lines, None)
        if not header:
            raise BadRequestError(f"{file.name}: is empty; the first line must name the columns")
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise BadRequestError(f"{file.name}: two columns are named {shown(twice)}")
        columns: list[list[str]] = [[] for _ in header]
        width, read_bytes = len(header), 0
        for fields in lines:
            if not fields:
                continue
            if len(fields) != width:
                raise BadRequestError(
                    f"{file.name}: line {lines.line_num} has {len(fields)} fields,"
                    f" the header has {width}"
                )
            for column, field in zip(columns, fields, strict=True):
                column.append(field)
            read_bytes += sum(map(len, fields)) + width
            if lines.line_num % 10_000 == 0:
                progress(min(1.0, read_bytes / size))
    if not columns[0]:
        raise BadRequestError(f"{file.name}: has a header, but no rows")
    progress(1.0)
    return {name: _typed(column) for name, column in zip(header, columns, strict=True)}


def _typed(texts: list[str]) -> Array:
    """Numbers where every value is one or missing, else text with None for missing."""
    plain = [text.strip() for text in texts]
    cleaned: list[Any] = [None if text.lower() in _MISSING else text for text in plain]
    if all(value is None for value in cleaned):
        return np.full(len(cleaned), np.nan)
    try:
        numbers = [np.nan if value is None else float(value) for value in cleaned]
    except ValueError:
        return np.array(cleaned, dtype=np.object_)
    if None not in cleaned:
        try:
            return np.array([int(value) for value in cleaned], dtype=np.int64)
        except (ValueError, OverflowError):
            pass
    return np.array(numbers)
