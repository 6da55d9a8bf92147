"""`driftgate capture`: what is kept on disk of requests and answers."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli import output, places
from gateway.errors import BadRequestError, NotFoundError

if TYPE_CHECKING:
    from gateway.capture.reading import Reading
    from gateway.capture.record import Record
    from gateway.config import ServerConfig

app = typer.Typer(
    no_args_is_help=True,
    help="What is kept on disk of requests and answers.",
    rich_markup_mode=None,
)

_RunDir = Annotated[str | None, typer.Option(help="As of the server.")]


@app.command("list")
def listed(
    model: Annotated[str | None, typer.Argument(help="Its name; nothing: all.")] = None,
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    run_dir: _RunDir = None,
    as_json: places.AsJSON = False,
) -> None:
    """List the captures of this host: requests, bytes, times."""
    from gateway.capture import reading, shelf

    directory = settings_of(registry, state_dir, run_dir).run_path / "captures"
    found: list[dict[str, Any]] = []
    for name in sorted({path.parent.name for path in shelf.files(directory, model)}):
        records = reading.find("all", directory, name)
        times = []
        with output.progress(f"reading {name}") as bar:
            task = bar.add_task("", total=max(records.n_bytes, 1))
            for record in records:
                times.append(record.time)
                bar.update(task, completed=records.done_bytes)
        found.append({
            "model": name,
            "files": len(records.files),
            "bytes": records.n_bytes,
            "requests": len(times),
            "first": min(times, default=None),
            "last": max(times, default=None),
            "passed_over": records.said(),
        })  # fmt: skip
    if as_json:
        output.print_json({"captures": found})
        return
    if not found:
        typer.echo("nothing is captured here; ask for it in a route: capture")
        return
    right = ("files", "requests", "bytes")
    shown = output.table("model", *right, "first", "last", right=right)
    for entry in found:
        shown.add_row(
            entry["model"],
            *(f"{entry[name]:,}" for name in right),
            _moment(entry["first"]),
            _moment(entry["last"]),
        )
    output.console.print(shown)
    for entry in found:
        if entry["passed_over"]:
            typer.echo(f"{entry['model']}: passed over: {entry['passed_over']}")


@app.command("print")
def printed(
    capture: Annotated[
        str, typer.Argument(help="last-24h (s, m, h, d), all, or a file or directory of captures.")
    ],
    model: Annotated[str | None, typer.Argument(help="Its name; nothing: all.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many requests at most.")] = 100,
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    run_dir: _RunDir = None,
) -> None:
    """Print captured requests as JSON, one a line."""
    import orjson

    found = reading_of(capture, model, settings_of(registry, state_dir, run_dir))
    n = 0
    for record in found:
        if model is not None and record.model != model:
            continue
        # NaN becomes null: what JSON has no word for is in the file itself.
        typer.echo(orjson.dumps(_plain(record), option=orjson.OPT_NON_STR_KEYS).decode())
        n += 1
        if n == limit:
            break
    if not n:
        raise BadRequestError(f"{capture}: holds no such request")
    if said := found.said():
        sys.stderr.write(f"passed over: {said}\n")


def reading_of(capture: str, model: str | None, settings: "ServerConfig") -> "Reading":
    """The records of a capture.

    Parameters
    ----------
    capture : `last-24h`, `all`, the model's own name for all, a file, or a directory of files
    settings : of the server, which say where its captures are

    Raises
    ------
    GatewayError : there is none, or it is no capture.
    """
    from gateway.capture import reading, shelf

    path = Path(capture)
    if path.is_file():
        return reading.Reading([path])
    if path.is_dir():
        inside = sorted(path.rglob(f"*{shelf.SUFFIX}"), key=lambda file: (file.name, str(file)))
        if not inside:
            raise NotFoundError(f"{capture}: holds no file of a capture (*{shelf.SUFFIX})")
        return reading.Reading(inside)
    what = "all" if capture == model else capture
    return reading.find(what, settings.run_path / "captures", model)


def settings_of(registry: Path, state_dir: Path | None, run_dir: str | None) -> "ServerConfig":
    """The settings of a server of these directories; what is None is as they say."""
    from gateway import config

    return config.load({
        "registry": str(registry),
        "state_dir": None if state_dir is None else str(state_dir),
        "run_dir": run_dir,
    })  # fmt: skip


def _plain(record: "Record") -> dict[str, Any]:
    """A record as JSON can have it: tensors as nested lists, bytes as text."""
    import msgspec

    from gateway.capture.record import array_of
    from gateway.errors import TensorError
    from gateway.tensors import BFLOAT16, widened

    made: dict[str, Any] = {
        name: value
        for name, value in msgspec.structs.asdict(record).items()
        if value is not None and value not in ("", (), {})
    }
    made["units"] = [
        {
            "kind": unit.kind,
            "bucket": unit.bucket,
            "hash": unit.hash,
            "value": None if unit.value is None else unit.value.decode("utf-8", "replace"),
        }
        for unit in record.units
    ]
    for side in ("inputs", "outputs"):
        tensors = {}
        for tensor in getattr(record, side) or ():
            try:
                array = array_of(tensor)
            except TensorError as error:
                tensors[tensor.name] = str(error)
                continue
            array = widened(array) if array.dtype == BFLOAT16 else array
            tensors[tensor.name] = array.tolist()
        made[side] = tensors
    return made


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
