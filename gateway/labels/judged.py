"""Which labels were judged, and what they have shown: written at once, so that each counts once.

Several processes may judge the same labels: whoever is slower finds another sequence than it has
read, writes nothing, and reads again.
"""

from collections.abc import Sequence

import msgpack  # type: ignore[import-untyped]  # it comes without types
import sqlalchemy as sa

from gateway.labels import tables
from gateway.labels.rows import Evidence, Joined
from gateway.labels.store import Store, value_of


class _BeatenError(Exception):
    """Somebody else has written evidence meanwhile."""


class Judged:
    """Evidence beside the labels that it comes from, in one database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def unjudged_models(self) -> list[str]:
        """Models with labels that nobody has judged yet."""
        c = tables.labels.c
        with self._store.reading() as connection:
            found = connection.scalars(sa.select(c.model).where(c.judged.is_(None)).distinct())
            return list(found)

    def unjudged(self, model: str, *, until: float, arrived: float, rows_max: int) -> list[Joined]:
        """Predictions whose labels nobody has judged yet, in the order in which they were made.

        Parameters
        ----------
        until : only labels of predictions made before
        arrived : only labels that came before
        rows_max : labels at most, the longest known first; all predictions of each
        """
        p, c = tables.predictions.c, tables.labels.c
        is_there = (
            sa.select(sa.literal(1))
            .where(tables.is_pair, p.outputs.is_not(None), p.time < until)
            .exists()
        )
        chosen = (
            sa.select(c.request, c.row, c.model, c.number, c.text, c.arrived)
            .where(c.model == model, c.judged.is_(None), c.arrived < arrived, is_there)
            .order_by(c.arrived, c.request, c.row)
            .limit(rows_max)
            .subquery()
        )
        w = chosen.c
        query = (
            sa.select(
                p.request, p.row, p.version, p.traffic, p.variant, p.time, p.sampled, p.assigned,
                p.unit, p.outputs, w.number, w.text, w.arrived,
            )
            .join(chosen, sa.and_(p.request == w.request, p.row == w.row, p.model == w.model))
            .where(p.outputs.is_not(None))
            .order_by(p.time, p.request, p.row)
        )  # fmt: skip
        with self._store.reading() as connection:
            found = connection.execute(query).all()
        return [
            Joined._make((*row[:9], msgpack.unpackb(row[9]), value_of(row[10], row[11]), row[12]))
            for row in found
        ]

    def all(self) -> dict[tuple[str, int], Evidence]:
        """What labels have shown, by model and version."""
        with self._store.reading() as connection:
            rows = connection.execute(sa.select(tables.evidence)).all()
        return {(row.model, row.version): Evidence._make(row) for row in rows}

    def sequences(self) -> dict[tuple[str, int], int]:
        """Which evidence is there, without reading it."""
        e = tables.evidence.c
        with self._store.reading() as connection:
            rows = connection.execute(sa.select(e.model, e.version, e.sequence)).all()
        return {(row.model, row.version): row.sequence for row in rows}

    def write(
        self,
        written: Sequence[Evidence],
        labels: Sequence[tuple[str, int, str]] = (),
        *,
        before: tuple[str, int, float] | None = None,
        now: float,
    ) -> bool:
        """Write evidence, and which labels are in it, at once; False: somebody else was faster.

        Parameters
        ----------
        written : each with the sequence that was read; nothing is written unless all hold
        labels : request, row and model of those that need not be judged again
        before : model, version and time: nor any whose prediction of it was made before
        """
        p, c = tables.predictions.c, tables.labels.c
        try:
            with self._store.writing() as connection:
                for one in written:
                    self._write(connection, one, now)
                if labels:
                    connection.execute(
                        sa.update(tables.labels)
                        .where(
                            c.request == sa.bindparam("r"), c.row == sa.bindparam("k"),
                            c.model == sa.bindparam("m"),
                        )
                        .values(judged=now),
                        [{"r": request, "k": row, "m": model} for request, row, model in labels],
                    )  # fmt: skip
                if before is not None:
                    model, version, until = before
                    of_it = (
                        sa.select(sa.literal(1))
                        .where(tables.is_pair, p.version == version, p.time < until)
                        .exists()
                    )
                    connection.execute(
                        sa.update(tables.labels)
                        .where(c.model == model, c.judged.is_(None), of_it)
                        .values(judged=now)
                    )
        except _BeatenError:
            return False
        return True

    def _write(self, connection: sa.Connection, one: Evidence, now: float) -> None:
        e = tables.evidence.c
        values = {**one._asdict(), "sequence": one.sequence + 1, "changed": now}
        if one.sequence:
            mine = sa.and_(
                e.model == one.model, e.version == one.version, e.sequence == one.sequence
            )
            done = connection.execute(sa.update(tables.evidence).where(mine).values(values))
        else:
            insert = self._store.insert(tables.evidence).on_conflict_do_nothing()
            done = connection.execute(insert.values(values))
        if done.rowcount != 1:
            raise _BeatenError
