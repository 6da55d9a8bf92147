"""`driftgate route`: how traffic is split."""

import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from gateway.cli import output
from gateway.cli.door import How, Where, change, takes
from gateway.errors import BadRequestError, ConfigError, NotFoundError

app = typer.Typer(no_args_is_help=True, help="How traffic is split.", rich_markup_mode=None)


@app.command("get")
@takes(Where)
def get(
    model: Annotated[str | None, typer.Argument(help="Its name; nothing: all.")] = None,
    *,
    where: Where,
) -> None:
    """Print routes, as `apply` reads them."""
    found = _routes(where)
    if model is not None:
        if model not in found:
            raise NotFoundError(f"model {model!r} has no route: its champion answers")
        found = {model: found[model]}
    if where.as_json:
        output.print_json(found)
        return
    import yaml

    typer.echo(yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip("\n"))


@app.command("apply")
@takes(Where, How)
def apply(
    file: Annotated[Path, typer.Argument(help="YAML or JSON, a route by model; - reads stdin.")],
    *,
    where: Where,
    how: How,
) -> None:
    """Split traffic as a file says; all of its models in one revision."""
    from registry import changes, routes

    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRequestError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadRequestError(f"{file}: is not text") from None
    try:
        parsed = routes.parse(text)
    except routes.RouteError as error:
        raise ConfigError(*(f"{file.name}: {problem}" for problem in error.problems)) from None
    documents = {name: routes.document(route) for name, route in parsed.items()}
    made = changes.PutRoutes(parsed)
    change(where, how, lambda _: made, ("PUT", "/admin/routes", documents))


@app.command("delete")
@takes(Where, How)
def delete(
    model: Annotated[str, typer.Argument(help="Its name.")], *, where: Where, how: How
) -> None:
    """Let the champion answer everything."""
    from registry import changes

    made = changes.DeleteRoute(model)
    path = f"/admin/routes/{quote(model, safe='')}"
    change(where, how, lambda _: made, ("DELETE", path, None))


def _routes(where: Where) -> dict[str, Any]:
    from registry import routes

    if where.server:
        found: dict[str, Any] = where.call("GET", "/admin/routes")
        return found
    head = where.read(lambda revisions: revisions.head())
    return {
        name: routes.document(state.route)
        for name, state in sorted(head.models.items())
        if state.route is not None
    }
