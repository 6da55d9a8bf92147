"""`driftgate monitor`: how the monitors of a model are set, as a part of what is in force."""

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from gateway.cli import output
from gateway.cli.door import How, Where, change, takes
from gateway.errors import BadRequestError

app = typer.Typer(no_args_is_help=True, help="How the monitors of a model are set.")

_Model = Annotated[str, typer.Argument(help="Its name.")]


@app.command("get")
@takes(Where)
def get(model: _Model, *, where: Where) -> None:
    """Print what is said about the monitors of a model."""
    if where.server:
        found = where.call("GET", _path(model))
    else:
        head = where.read(lambda revisions: revisions.head())
        state = head.models.get(model)
        found = (state.monitor if state is not None else None) or {}
    if where.as_json:
        output.print_json(found)
        return
    for name, value in _flat(found):
        typer.echo(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    if not found:
        typer.echo(f"{model}: as the servers are set")


@app.command("set")
@takes(Where, How)
def set_(
    model: _Model,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Such as tolerance=0.02 or target.positive=late; KEY= takes one away.",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Settings as YAML or JSON.")
    ] = None,
    *,
    where: Where,
    how: How,
) -> None:
    """Set what the monitors of a model do, over the settings of the servers."""
    from registry import changes

    patch = _document(file) if file is not None else {}
    for text in settings or []:
        _put(patch, text)
    if not patch:
        raise BadRequestError("monitor set takes KEY=VALUE, or --file")
    made = changes.AlterMonitor(model, patch)
    change(where, how, lambda _: made, ("PATCH", _path(model), patch))


@app.command("delete")
@takes(Where, How)
def delete(model: _Model, *, where: Where, how: How) -> None:
    """Let the monitors of a model be as the servers are set."""
    from registry import changes

    made = changes.DeleteMonitor(model)
    change(where, how, lambda _: made, ("DELETE", _path(model), None))


def _put(patch: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator or not all(key.split(".")):
        raise BadRequestError(f"{text!r}: must be KEY=VALUE, such as tolerance=0.02")
    *above, last = key.split(".")
    branch = patch
    for name in above:
        inner = branch.setdefault(name, {})
        if not isinstance(inner, dict):
            raise BadRequestError(f"{text!r}: {name} is set to a value already")
        branch = inner
    branch[last] = _value(value)


def _value(text: str) -> Any:
    """A value as it was typed: JSON where it is that, else text; nothing is null."""
    if not text:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _document(file: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadRequestError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError):
        raise BadRequestError(f"{file}: cannot be read as YAML") from None
    if not isinstance(found, dict):
        raise BadRequestError(f"{file}: must be a mapping of settings")
    return found


def _flat(found: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in found.items():
        key = f"{above}{name}"
        flat += _flat(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
    return flat


def _path(model: str) -> str:
    return f"/admin/models/{quote(model, safe='')}/monitor"
