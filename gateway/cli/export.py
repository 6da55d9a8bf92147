"""`driftgate export`: kept predictions with their labels as Parquet."""

import math
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.cli import output
from gateway.errors import BadRequestError

if TYPE_CHECKING:
    from gateway.labels.export import Source

_AGO = re.compile(r"(\d+(?:\.\d+)?)(m|h|d)", re.ASCII)
_SECONDS = {"m": 60, "h": 3600, "d": 86_400}


def export(  # noqa: PLR0917  typer reads options from the parameters
    model: Annotated[str, typer.Argument(help="Whose predictions.")],
    to: Annotated[Path, typer.Option(help="The Parquet file to write.")],
    since: Annotated[
        str, typer.Option(help="A time in UTC, or how long ago: 90m, 12h, 7d.")
    ] = "30d",
    until: Annotated[str, typer.Option(help="The same; now unless given.")] = "",
    score: Annotated[
        str | None, typer.Option(help="The output that is the score; else the only number.")
    ] = None,
    registry: Annotated[
        str | None, typer.Option("-r", "--registry", help="The directory that is served.")
    ] = None,
    state_dir: Annotated[str | None, typer.Option(help="As of the server.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="As of the server.")] = None,
    capture: Annotated[
        str | None,
        typer.Option(help="A capture instead: last-24h, all, or a file or directory of captures."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="The database; $DRIFTGATE_LABELS_URL, else as the server's.")
    ] = None,
) -> None:
    """Write kept predictions, with labels where they have one, or a capture, as Parquet."""
    from gateway import config

    settings = config.load({
        "registry": registry, "state_dir": state_dir, "run_dir": run_dir, "labels.url": url
    })  # fmt: skip
    now = time.time()
    start, end = _moment(since, now), _moment(until, now) if until else math.inf
    if capture is not None:
        from gateway.capture.rows import CapturedRows
        from gateway.cli.capture import reading_of

        reading_of(
            capture, model, settings
        )  # Before anything is written: it says if there is none.
        rows = CapturedRows(lambda: reading_of(capture, model, settings))
        _write(rows, model, to, start, end, score)
        if rows.said:
            typer.echo(f"passed over: {rows.said}")
        return
    where = settings.labels_url
    if where.startswith("sqlite:///") and not Path(where.removeprefix("sqlite:///")).is_file():
        raise BadRequestError(
            "no predictions are kept there; name the directory (-r) or the database (--url), and"
            " serve with --labels-sample"
        )
    from gateway.labels.store import Store

    store = Store(where)
    try:
        _write(store, model, to, start, end, score)
    finally:
        store.close()


def _write(
    source: "Source", model: str, to: Path, since: float, until: float, score: str | None
) -> None:
    from gateway.labels import export as parquet

    with output.progress("writing") as bar:
        task = bar.add_task("", total=1.0)
        n = parquet.write(
            source, model, to, since=since, until=until, score=score,
            progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    typer.echo(f"{to}: {n} predictions")


def _moment(text: str, now: float) -> float:
    if ago := _AGO.fullmatch(text):
        return now - float(ago[1]) * _SECONDS[ago[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequestError(
            f"{text!r} is no time: write 2026-03-31, 2026-03-31T12:00, or 90m, 12h, 7d ago"
        ) from None
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
