"""The tables: predictions that wait for labels, labels, and what labels have shown.

Only what came is stored, and only once: a second prediction or label of the same id changes
nothing. Labels and predictions do not wait for each other; the join is made by whoever reads, so
that a label may be there before its prediction.
"""

import sqlalchemy as sa

FORMAT = 2
"""Of the tables; a newer one is refused by older programs. Format 1 did not know what was judged,
and becomes this one when it is opened."""

METADATA = sa.MetaData()
about = sa.Table(
    "driftgate_about",
    METADATA,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
predictions = sa.Table(
    "driftgate_predictions",
    METADATA,
    # A shadow answers under the same id as the primary: one label serves both.
    sa.Column("request", sa.String(128), primary_key=True),
    sa.Column("row", sa.Integer, primary_key=True),
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("traffic", sa.String(16), primary_key=True),
    sa.Column("variant", sa.String(128), nullable=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("sampled", sa.Double, nullable=False),
    sa.Column("assigned", sa.Double, nullable=False),
    sa.Column("unit", sa.String(32)),
    sa.Column("outputs", sa.LargeBinary),  # NULL: its time is over, and a label would be late
    sa.Column("inputs", sa.LargeBinary),
    sa.Index("driftgate_predictions_by_time", "model", "version", "time"),
    sqlite_with_rowid=False,
)
labels = sa.Table(
    "driftgate_labels",
    METADATA,
    sa.Column("request", sa.String(128), primary_key=True),
    sa.Column("row", sa.Integer, primary_key=True),
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("number", sa.Double),
    sa.Column("text", sa.String(256)),
    sa.Column("arrived", sa.Double, nullable=False),
    sa.Column("judged", sa.Double),  # NULL: its prediction is not there, or not old enough yet
    sa.Index("driftgate_labels_by_arrival", "arrived"),
    sqlite_with_rowid=False,
)
is_pair = sa.and_(
    predictions.c.request == labels.c.request,
    predictions.c.row == labels.c.row,
    predictions.c.model == labels.c.model,
)
"""A label is that of a prediction."""
unjudged = sa.Index(
    "driftgate_labels_unjudged",
    labels.c.model,
    labels.c.arrived,
    sqlite_where=labels.c.judged.is_(None),
    postgresql_where=labels.c.judged.is_(None),
)
evidence = sa.Table(
    "driftgate_evidence",
    METADATA,
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("reference", sa.Text),
    sa.Column("state", sa.LargeBinary),
    sa.Column("told", sa.BigInteger, nullable=False),
    sa.Column("changed", sa.Double, nullable=False),
)


def renew(connection: sa.Connection, found: int | None) -> int | None:
    """Tables of format 1 as those of today; the format that they have now."""
    if found != 1:
        return found
    known = {column["name"] for column in sa.inspect(connection).get_columns(labels.name)}
    if "judged" not in known:
        connection.exec_driver_sql(f"ALTER TABLE {labels.name} ADD COLUMN judged DOUBLE PRECISION")
    unjudged.create(connection, checkfirst=True)
    connection.execute(sa.update(about).where(about.c.name == "format").values(value=FORMAT))
    return FORMAT
