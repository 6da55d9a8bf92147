"""Labels in the order in which they came, each with its predictions: for whoever follows them."""

from collections.abc import Sequence
from typing import NamedTuple

import msgpack  # type: ignore[import-untyped]  # it comes without types
import sqlalchemy as sa

from gateway.labels import tables
from gateway.labels.rows import Joined
from gateway.labels.store import Store, value_of


class Place(NamedTuple):
    """Where somebody is who reads labels in order."""

    arrived: float = 0.0
    request: str = ""
    row: int = -1


def after(
    store: Store,
    model: str,
    versions: Sequence[int],
    place: Place,
    *,
    since: float,
    until: float,
    rows_max: int,
) -> list[Joined]:
    """Primary answers of these versions with a label that came after a place, in that order.

    Parameters
    ----------
    since : only predictions made from then on
    until : only labels that came before

    Raises
    ------
    StoreError : the database cannot be read now.
    """
    p, c = tables.predictions.c, tables.labels.c
    query = (
        sa.select(
            p.request, p.row, p.version, p.traffic, p.variant, p.time, p.sampled, p.assigned,
            p.unit, p.outputs, c.number, c.text, c.arrived,
        )
        .join(tables.labels, tables.is_pair)
        .where(
            c.model == model,
            c.arrived >= place.arrived,
            c.arrived < until,
            sa.tuple_(c.arrived, c.request, c.row) > sa.tuple_(*place),
            p.version.in_(versions),
            p.traffic == "primary",
            p.time >= since,
            p.outputs.is_not(None),
        )
        .order_by(c.arrived, c.request, c.row)
        .limit(rows_max)
    )  # fmt: skip
    with store.reading() as connection:
        found = connection.execute(query).all()
    return [
        Joined._make((*row[:9], msgpack.unpackb(row[9]), value_of(row[10], row[11]), row[12]))
        for row in found
    ]  # fmt: skip
