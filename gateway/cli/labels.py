"""`driftgate labels`: sends ground truth to a server, and says what it is compared with."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from gateway.cli import output
from gateway.cli.door import Running, takes
from gateway.errors import BadRequestError

_BATCH = 5_000
_SHOWN = 10
_JSON = frozenset((".jsonl", ".ndjson", ".json"))
_COLUMNS = ("id", "label", "model")

app = typer.Typer(help="Ground truth, by prediction id.", no_args_is_help=True)


@app.callback()
def _labels() -> None:
    """Ground truth, by prediction id."""


@app.command("import")
@takes(Running)
def import_(
    file: Annotated[Path, typer.Argument(help="CSV with columns id and label, or JSON lines.")],
    model: Annotated[str | None, typer.Option(help="The model of labels that name none.")] = None,
    *,
    running: Running,
) -> None:
    """Send the labels of a file; those that were sent before change nothing."""
    query = None if model is None else {"model": model}
    counts: Counter[str] = Counter()
    problems: list[dict[str, Any]] = []
    with output.progress("sending") as bar, running.connected() as connection:
        task = bar.add_task("", total=1.0)
        for first, batch, done in _batches(file):
            # A table goes as a table: the server knows whether a 7 in it is a number or a class.
            sent = (
                {"content": _table(batch)} if file.suffix.lower() not in _JSON else {"body": batch}
            )
            answer = connection.call("POST", "/labels", query=query, **sent)
            for problem in answer.pop("problems"):
                problem["at"] += first
                problems.append(problem)
            counts.update(answer)
            bar.update(task, completed=done)
    counts["problems_left_out"] += max(len(problems) - _SHOWN, 0)
    if running.as_json:
        output.print_json({**counts, "problems": problems})
    else:
        _print(counts, problems[:_SHOWN])
    if counts["invalid"]:
        raise typer.Exit(2)


@app.command("accept")
@takes(Running)
def accept(
    model: Annotated[str, typer.Argument(help="Its name.")],
    version: Annotated[int | None, typer.Option(help="Default: the version that answers.")] = None,
    days: Annotated[float, typer.Option(help="Predictions of the last so many days.")] = 30.0,
    *,
    running: Running,
) -> None:
    """Let labelled predictions be what later labels are compared with."""
    body = {"days": days} | ({} if version is None else {"version": version})
    path = f"/admin/models/{quote(model, safe='')}/labels/accept"
    found = running.call("POST", path, body=body)
    if running.as_json:
        output.print_json(found)
        return
    rows = found["reference"]["rows"]
    typer.echo(
        f"{model} version {found['version']}: {rows} labelled predictions are its reference now"
    )


def _print(counts: "Counter[str]", problems: list[dict[str, Any]]) -> None:
    left_out = counts.pop("problems_left_out")
    said = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in counts.items() if n)
    typer.echo(said or "no labels in the file")
    for problem in problems:
        typer.echo(
            f"label {problem['at'] + 1} ({problem['id']}): {problem['is']}: {problem['reason']}"
        )
    if left_out:
        typer.echo(f"and {left_out} more")


def _table(batch: list[dict[str, str]]) -> tuple[str, bytes]:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    writer.writerows(batch)
    return "text/csv", text.getvalue().encode()


def _batches(file: Path) -> Iterator[tuple[int, list[Any], float]]:
    """Number of the first label, labels, and the share of the file read."""
    try:
        size = max(file.stat().st_size, 1)
        first = 0
        batch: list[Any] = []
        for label, read in _labels_of(file):
            batch.append(label)
            if len(batch) == _BATCH:
                yield first, batch, min(read / size, 1.0)
                first, batch = first + len(batch), []
        if batch:
            yield first, batch, 1.0
    except FileNotFoundError:
        raise BadRequestError(f"{file}: no such file") from None
    except OSError as error:
        raise BadRequestError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadRequestError(f"{file}: not text in UTF-8") from None


def _labels_of(file: Path) -> Iterator[tuple[Any, int]]:
    """Each label, and the bytes read so far."""
    read = 0

    def lines(text: Iterator[str]) -> Iterator[str]:
        nonlocal read
        for line in text:
            read += len(line)
            yield line

    with file.open(encoding="utf-8-sig", newline="") as text:
        if file.suffix.lower() in _JSON:
            for k, line in enumerate(lines(text), 1):
                if line.strip():
                    try:
                        yield json.loads(line), read
                    except json.JSONDecodeError as error:
                        raise BadRequestError(f"{file} line {k}: not JSON ({error.msg})") from None
            return
        try:
            rows = csv.DictReader(lines(text), strict=True)
            missing = [name for name in ("id", "label") if name not in (rows.fieldnames or [])]
            if missing:
                raise BadRequestError(
                    f"{file}: no column {missing[0]!r}; it takes id, label, model"
                )
            for row in rows:
                yield {name: row.get(name) or "" for name in _COLUMNS}, read
        except csv.Error as error:
            raise BadRequestError(f"{file}: not CSV ({error})") from None
