"""Kept predictions and labels, in SQLite or PostgreSQL; joined by prediction id.

Written in whole transactions, under SQLite by one process of a host at a time.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it comes without types
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from gateway.labels import tables
from gateway.labels.rows import (
    Bounds,
    Exported,
    Joined,
    Kept,
    Label,
    StoreError,
    Verdict,
)

_CHUNK = 400
"""Ids in one query: well below what either database takes."""
_ROW_BYTES = 160
"""What a row takes beside its texts and outputs, index included: measured with SQLite."""
_DAY_S = 86_400.0


class Store:
    """The tables. Every method opens a connection, works in one transaction, and gives it back.

    Parameters
    ----------
    url : of SQLAlchemy, `sqlite:///FILE` or `postgresql+psycopg://...`
    """

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)
        self.is_local = self._url.get_backend_name() == "sqlite"
        self._file = Path(self._url.database or "") if self.is_local else None
        self._is_open = False
        self._engine = sa.create_engine(self._url, **self._options())
        if self.is_local:
            sa.event.listen(self._engine, "connect", _prepare)
        self.insert: Any = sqlite.insert if self.is_local else postgresql.insert
        """An insert that can pass over what is there."""

    def _options(self) -> dict[str, Any]:
        if self.is_local:
            return {"connect_args": {"timeout": 10, "check_same_thread": False}}
        # A fleet's connections are few and dear; one that died unseen is replaced.
        return {
            "pool_size": 2,
            "max_overflow": 2,
            "pool_pre_ping": True,
            "connect_args": {"connect_timeout": 5},
        }

    # -- predictions and labels in

    def keep(self, rows: Sequence[Kept]) -> None:
        """Store predictions; those that are there already change nothing."""
        if not rows:
            return
        insert = self.insert(tables.predictions).on_conflict_do_nothing()
        with self.writing() as connection:
            connection.execute(insert, [row._asdict() for row in rows])

    def label(
        self, labels: Sequence[Label], now: float, *, is_kept: Sequence[bool]
    ) -> list[Verdict]:
        """Store labels; what became of each, in order. All of them, or none, are stored.

        Parameters
        ----------
        is_kept : of each, whether predictions of its id are kept at all
        """
        with self.writing() as connection:
            known = self._known(connection, labels)
            there = self._labels_of(connection, labels)
            verdicts: list[Verdict] = []
            fresh: list[dict[str, Any]] = []
            for label, kept in zip(labels, is_kept, strict=True):
                key = (label.request, label.row, label.model)
                if (before := there.get(key)) is not None:
                    verdicts.append("duplicate" if before == label.value else "conflict")
                    continue
                open_ = known.get(key)
                if open_ is None and not kept:
                    verdicts.append("not_sampled")
                    continue
                if open_ is False:
                    verdicts.append("late")
                    continue
                there[key] = label.value
                is_text = isinstance(label.value, str)
                fresh.append({
                    "request": label.request,
                    "row": label.row,
                    "model": label.model,
                    "number": None if is_text else label.value,
                    "text": label.value if is_text else None,
                    "arrived": now,
                })  # fmt: skip
                verdicts.append("joined" if open_ else "unknown")
            if fresh:
                connection.execute(self.insert(tables.labels).on_conflict_do_nothing(), fresh)
            return verdicts

    def rows_of(self, requests: Iterable[str]) -> dict[str, dict[str, int]]:
        """For each of these requests that is known: its rows, by model."""
        found: dict[str, dict[str, int]] = {}
        wanted = list(dict.fromkeys(requests))
        p = tables.predictions.c
        with self.reading() as connection:
            for start in range(0, len(wanted), _CHUNK):
                query = (
                    sa.select(p.request, p.model, sa.func.max(p.row) + 1)
                    .where(p.request.in_(wanted[start : start + _CHUNK]))
                    .group_by(p.request, p.model)
                )
                for request, model, n in connection.execute(query):
                    found.setdefault(request, {})[model] = n
        return found

    def _known(
        self, connection: sa.Connection, labels: Sequence[Label]
    ) -> dict[tuple[str, int, str], bool]:
        """Predictions of these ids: True while a label is in time."""
        p = tables.predictions.c
        query = sa.select(p.request, p.row, p.model, p.outputs.is_not(None))
        known: dict[tuple[str, int, str], bool] = {}
        for part in _requests(labels):
            for request, row, model, is_open in connection.execute(
                query.where(p.request.in_(part))
            ):
                key = (request, row, model)
                known[key] = known.get(key, False) or bool(is_open)
        return known

    def _labels_of(
        self, connection: sa.Connection, labels: Sequence[Label]
    ) -> dict[tuple[str, int, str], float | str]:
        c = tables.labels.c
        query = sa.select(c.request, c.row, c.model, c.number, c.text)
        return {
            (request, row, model): text if number is None else number
            for part in _requests(labels)
            for request, row, model, number, text in connection.execute(
                query.where(c.request.in_(part))
            )
        }

    # -- what is read

    def joined(
        self,
        model: str,
        version: int | None = None,
        *,
        since: float = 0.0,
        until: float = float("inf"),
        rows_max: int = 1_000_000,
    ) -> list[Joined]:
        """Predictions made in [since, until) with their labels; the newest `rows_max`, in order."""
        p, c = tables.predictions.c, tables.labels.c
        query = (
            sa.select(
                p.request, p.row, p.version, p.traffic, p.variant, p.time, p.sampled, p.assigned,
                p.unit, p.outputs, c.number, c.text, c.arrived,
            )
            .join(tables.labels, tables.is_pair)
            .where(p.model == model, p.outputs.is_not(None), p.time >= since, p.time < until)
            .order_by(p.time.desc())
            .limit(rows_max)
        )  # fmt: skip
        if version is not None:
            query = query.where(p.version == version)
        with self.reading() as connection:
            found = connection.execute(query).all()
        return [
            Joined._make((*row[:9], msgpack.unpackb(row[9]), value_of(row[10], row[11]), row[12]))
            for row in reversed(found)
        ]  # fmt: skip

    def outputs(
        self, model: str, version: int, *, since: float = 0.0, rows_max: int = 1_000_000
    ) -> list[tuple[dict[str, Any], float]]:
        """Outputs, and the probability of being kept, of the newest predictions of a version."""
        p = tables.predictions.c
        query = (
            sa.select(p.outputs, p.sampled)
            .where(p.model == model, p.version == version, p.time >= since, p.outputs.is_not(None))
            .order_by(p.time.desc())
            .limit(rows_max)
        )
        with self.reading() as connection:
            found = connection.execute(query).all()
        return [(msgpack.unpackb(outputs), sampled) for outputs, sampled in found]

    def exported(
        self, model: str, *, since: float = 0.0, until: float = float("inf"), chunk: int = 10_000
    ) -> Iterator[list[Exported]]:
        """Predictions made in [since, until), in the order of their time, in chunks."""
        p, c = tables.predictions.c, tables.labels.c
        query = (
            sa.select(
                p.request, p.row, p.version, p.traffic, p.variant, p.time, p.sampled, p.outputs,
                p.inputs, c.number, c.text, c.arrived,
            )
            .outerjoin(tables.labels, tables.is_pair)
            .where(p.model == model, p.outputs.is_not(None), p.time >= since, p.time < until)
            .order_by(p.time, p.request, p.row)
        )  # fmt: skip
        with self.reading() as connection:
            result = connection.execution_options(yield_per=chunk).execute(query)
            for rows in result.partitions():
                yield [
                    Exported._make(
                        (
                            *row[:7],
                            msgpack.unpackb(row[7]),
                            None if row[8] is None else msgpack.unpackb(row[8]),
                            value_of(row[9], row[10]),
                            row[11],
                        )
                    )
                    for row in rows
                ]

    def count(self, model: str) -> tuple[int, int]:
        """Predictions of a model that wait for a label or have one, and labels of it."""
        p, c = tables.predictions.c, tables.labels.c
        n = sa.func.count()
        with self.reading() as connection:
            kept = connection.scalar(
                sa.select(n)
                .where(p.model == model, p.outputs.is_not(None))
                .select_from(tables.predictions)
            )
            labels = connection.scalar(
                sa.select(n).where(c.model == model).select_from(tables.labels)
            )
        return int(kept or 0), int(labels or 0)

    def bytes_kept(self) -> int:
        """What the tables take on disk: measured for SQLite, estimated for PostgreSQL."""
        with self.reading() as connection:
            if self.is_local:
                size, pages, free = (
                    int(connection.exec_driver_sql(f"PRAGMA {name}").scalar() or 0)
                    for name in ("page_size", "page_count", "freelist_count")
                )
                return size * (pages - free)
            # Its files do not shrink when rows go: their content is what can be bounded.
            p, c = tables.predictions.c, tables.labels.c
            n_predictions, content = connection.execute(
                sa.select(
                    sa.func.count(),
                    _total(p.outputs) + _total(p.inputs),
                ).select_from(tables.predictions)
            ).one()
            n_labels, texts = connection.execute(
                sa.select(sa.func.count(), _total(c.text)).select_from(tables.labels)
            ).one()
            return (int(n_predictions) + int(n_labels)) * _ROW_BYTES + int(content) + int(texts)

    # -- what goes

    def forget(self, bounds: Bounds, now: float, days: Mapping[str, float] | None = None) -> int:
        """Let go what is beyond the bounds; how many predictions were let go.

        The outputs of a prediction go after `days`, its id after twice that; a label goes with its
        prediction, or after `wait_s` without one. Beyond `bytes_max` the oldest go first, ids and
        all.

        Parameters
        ----------
        days : of models that have others than the bounds
        """
        p = tables.predictions.c
        own = days or {}
        spans = [(p.model == model, span) for model, span in own.items()]
        spans.append((p.model.not_in(list(own)) if own else sa.true(), bounds.days))
        n_forgotten = 0
        with self.writing() as connection:
            for is_meant, span in spans:
                over, gone = now - span * _DAY_S, now - 2 * span * _DAY_S
                n_forgotten += connection.execute(
                    sa.update(tables.predictions)
                    .where(is_meant, p.time < over, p.outputs.is_not(None))
                    .values(outputs=None, inputs=None)
                ).rowcount
                connection.execute(sa.delete(tables.predictions).where(is_meant, p.time < gone))
            self._forget_labels(connection, now - bounds.wait_s, p.outputs.is_not(None))
        while (size := self.bytes_kept()) > bounds.bytes_max:
            with self.writing() as connection:
                total = (
                    connection.scalar(sa.select(sa.func.count()).select_from(tables.predictions))
                    or 0
                )
                if not total:
                    # What is left are labels without predictions.
                    connection.execute(sa.delete(tables.labels))
                    break
                excess = max(int(total * (1 - bounds.bytes_max / size) * 1.1), 1)
                edge = connection.scalar(
                    sa.select(p.time).order_by(p.time).offset(min(excess, total) - 1).limit(1)
                )
                deleted = connection.execute(
                    sa.delete(tables.predictions).where(p.time <= edge)
                ).rowcount
                n_forgotten += deleted
                self._forget_labels(connection, now - bounds.wait_s, sa.true())
            if self.is_local:
                with self.writing() as connection:
                    connection.exec_driver_sql("PRAGMA incremental_vacuum")
        return n_forgotten

    def _forget_labels(
        self, connection: sa.Connection, before: float, still: sa.ColumnElement[bool]
    ) -> None:
        p, c = tables.predictions.c, tables.labels.c
        is_there = (
            sa.select(sa.literal(1))
            .where(p.request == c.request, p.row == c.row, p.model == c.model, still)
            .exists()
        )
        connection.execute(sa.delete(tables.labels).where(c.arrived < before, ~is_there))

    # -- connections

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction; StoreError when it cannot be made."""
        try:
            with self._turn():
                self._open()
                with self._engine.begin() as connection:
                    yield connection
        except (SQLAlchemyError, OSError) as error:
            raise StoreError(_reason(error)) from error

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read from; StoreError when there is none."""
        try:
            if not self._is_open:
                with self._turn():
                    self._open()
            with self._engine.connect() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise StoreError(_reason(error)) from error

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process of the host writes at a time: it waits for its turn, it does not poll."""
        if self._file is None:
            yield
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)  # which gives the lock back

    def _open(self) -> None:
        """Make the tables, or see that they are ours."""
        if self._is_open:
            return
        if self._file is not None:
            # Before SQLite makes it: what it holds may be personal.
            os.close(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600))
        with self._engine.begin() as connection:
            if not self.is_local:
                # Several workers may meet a new database at once; CREATE IF NOT EXISTS can race.
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7226402)")
            tables.METADATA.create_all(connection)
            connection.execute(
                self.insert(tables.about).on_conflict_do_nothing(),
                [{"name": "format", "value": tables.FORMAT}],
            )
            found = connection.scalar(
                sa.select(tables.about.c.value).where(tables.about.c.name == "format")
            )
            found = tables.renew(connection, found)
        if found != tables.FORMAT:
            raise StoreError(f"its tables have format {found}; this release knows {tables.FORMAT}")
        self._is_open = True


def _prepare(connection: Any, _: object) -> None:
    """Settings of one SQLite connection."""
    for pragma in (
        "auto_vacuum = INCREMENTAL",  # before the first table; later it does nothing
        "journal_mode = WAL",
        "synchronous = FULL",  # who was answered that a label is kept may rely on it
        "journal_size_limit = 16777216",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _total(column: "sa.Column[Any]") -> "sa.ColumnElement[int]":
    """Bytes or characters of a column in all rows."""
    return sa.func.coalesce(sa.func.sum(sa.func.coalesce(sa.func.length(column), 0)), 0)


def value_of(number: float | None, text: str | None) -> float | str | None:
    """A label out of its two columns."""
    return text if number is None else number


def _requests(labels: Sequence[Label]) -> Iterator[list[str]]:
    wanted = list(dict.fromkeys(label.request for label in labels))
    for start in range(0, len(wanted), _CHUNK):
        yield wanted[start : start + _CHUNK]


def _reason(error: BaseException) -> str:
    """What went wrong, without a path, a statement or a value of a row."""
    original = getattr(error, "orig", None)
    text = str(original if original is not None else error)
    if isinstance(error, OSError):
        text = error.strerror or type(error).__name__
    return " ".join(text.split())[:200]
