"""Kept predictions with their labels as Parquet, for tools that judge, plot or train.

Read twice: once to learn the types of all columns, once to write them, so that memory holds a
chunk whatever the size. pyarrow is an extra, imported here only.
"""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from gateway.errors import BadRequestError, StartError
from gateway.labels.rows import Exported, StoreError

SCHEMA_VERSION = 1
"""Of the columns; a column may be added, none changes its meaning within a version."""

_KINDS = ("bool", "int", "float", "text", "floats", "texts")
"""In this order each takes the one before it, where that makes sense."""
Progress = Callable[[float], None]


class Source(Protocol):
    """Where predictions are: the database, or a capture."""

    def exported(
        self, model: str, *, since: float = ..., until: float = ...
    ) -> Iterator[list[Exported]]:
        """Predictions made in [since, until), in chunks; may be asked again.

        Raises
        ------
        StoreError : it cannot be read.
        """


def write(
    store: Source,
    model: str,
    file: Path,
    *,
    since: float,
    until: float,
    score: str | None = None,
    progress: Progress = lambda _: None,
) -> int:
    """Write the predictions of a model made in [since, until); how many there were.

    Parameters
    ----------
    score : the output that is the score; None: the only one that is a single floating-point number

    Raises
    ------
    BadRequestError : pyarrow is not installed, there is nothing to write, or no such output.
    StartError : the database cannot be read, or the file not written.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415  an extra
        import pyarrow.parquet as pq  # noqa: PLC0415  same
    except ImportError:
        raise BadRequestError("Parquet needs pyarrow: pip install 'driftgate[parquet]'") from None
    try:
        kinds, total = _learn(store, model, since, until)
        if not total:
            raise BadRequestError(f"no predictions of model {model!r} are kept in this time")
        score = _score(kinds, score)
        schema = pa.schema(_fields(pa, kinds))
        staged = file.with_name(f".{file.name}.{os.getpid()}")
        done = 0
        try:
            with pq.ParquetWriter(staged, schema, compression="zstd") as writer:
                for chunk in store.exported(model, since=since, until=until):
                    columns = _columns(chunk, model, kinds, score)
                    writer.write_table(pa.table(columns, schema=schema))
                    done += len(chunk)
                    progress(min(done / total, 1.0))
            staged.replace(file)
        finally:
            staged.unlink(missing_ok=True)
    except StoreError as error:
        raise StartError(f"the database of predictions cannot be read: {error}") from None
    except OSError as error:
        raise StartError(f"{file}: cannot be written ({error.strerror})") from None
    return done


def _learn(store: Source, model: str, since: float, until: float) -> tuple[dict[str, str], int]:
    """The kind of every column that depends on the model, and the number of rows."""
    kinds: dict[str, str] = {}
    total = 0
    for chunk in store.exported(model, since=since, until=until):
        total += len(chunk)
        for row in chunk:
            for name, value in _values(row):
                kind = _kind(value)
                kinds[name] = kind if name not in kinds else _joint(kinds[name], kind)
    return kinds, total


def _values(row: Exported) -> Iterator[tuple[str, Any]]:
    for name, value in (row.inputs or {}).items():
        yield f"features.{name}", value
    for name, value in row.outputs.items():
        yield f"output.{name}", value
    if row.label is not None:
        yield "actual", row.label


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list):
        return "texts" if any(isinstance(entry, str) for entry in value) else "floats"
    return "text"


def _joint(one: str, other: str) -> str:
    """The kind that holds both; text holds anything."""
    if one == other:
        return one
    low, high = sorted((one, other), key=_KINDS.index)
    return high if high == "float" or (low, high) == ("bool", "int") else "text"


def _score(kinds: dict[str, str], asked: str | None) -> str | None:
    numbers = [name for name, kind in kinds.items() if name.startswith("output.")]
    if asked is not None:
        if f"output.{asked}" not in numbers:
            names = ", ".join(name.removeprefix("output.") for name in numbers)
            raise BadRequestError(f"no output {asked!r} is kept; there are: {names}")
        return asked
    floats = [name for name in numbers if kinds[name] == "float"]
    return floats[0].removeprefix("output.") if len(floats) == 1 else None


def _fields(pa: Any, kinds: dict[str, str]) -> list[Any]:
    types = {
        "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string(),
        "floats": pa.list_(pa.float64()), "texts": pa.list_(pa.string()),
    }  # fmt: skip
    moment = pa.timestamp("us", tz="UTC")
    fixed = {
        "prediction_id": pa.string(), "request_id": pa.string(), "row": pa.int32(), "ts": moment,
        "model": pa.string(), "version": pa.int64(), "variant": pa.string(),
        "traffic": pa.string(), "status": pa.string(),
    }  # fmt: skip
    last = {
        "score": pa.float64(), "actual": types[kinds.get("actual", "float")], "actual_ts": moment,
        "sample_weight": pa.float64(), "schema_version": pa.int32(),
    }  # fmt: skip
    own = {name: types[kind] for name, kind in sorted(kinds.items()) if name != "actual"}
    return [pa.field(name, kind) for name, kind in (fixed | own | last).items()]


def _columns(
    chunk: list[Exported], model: str, kinds: dict[str, str], score: str | None
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "prediction_id": [f"{row.request}/{row.row}" for row in chunk],
        "request_id": [row.request for row in chunk],
        "row": [row.row for row in chunk],
        "ts": [datetime.fromtimestamp(row.time, UTC) for row in chunk],
        "model": [model] * len(chunk),
        "version": [row.version for row in chunk],
        "variant": [row.variant for row in chunk],
        "traffic": [row.traffic for row in chunk],
        "status": ["ok"] * len(chunk),
        "score": [_float(row.outputs.get(score)) if score else None for row in chunk],
        "actual_ts": [
            None if row.arrived is None else datetime.fromtimestamp(row.arrived, UTC)
            for row in chunk
        ],
        "sample_weight": [1 / row.sampled for row in chunk],
        "schema_version": [SCHEMA_VERSION] * len(chunk),
    }
    for name, kind in kinds.items():
        if name == "actual":
            columns[name] = [_as(kind, row.label) for row in chunk]
        else:
            side, _, tensor = name.partition(".")
            rows = [row.outputs if side == "output" else row.inputs or {} for row in chunk]
            columns[name] = [_as(kind, values.get(tensor)) for values in rows]
    columns.setdefault("actual", [None] * len(chunk))
    return columns


def _as(kind: str, value: Any) -> Any:
    if value is None:
        return None
    if kind == "text":
        return value if isinstance(value, str) else str(value)
    if kind == "float":
        return float(value)
    return int(value) if kind == "int" else value


def _float(value: Any) -> float | None:
    """A score; the second of two is the probability of class 1."""
    if isinstance(value, list) and len(value) == 2:
        value = value[1]
    return float(value) if isinstance(value, bool | int | float) else None
