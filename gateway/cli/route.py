"""`driftgate route`: how traffic is split."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from gateway.cli import output
from gateway.cli.door import How, Where, change, takes
from gateway.errors import BadRequestError, ConfigError, NotFoundError

if TYPE_CHECKING:
    from registry.revisions import Revisions
    from registry.routes import Route

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

    parsed = _parsed(file)
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


@app.command("explain")
@takes(Where)
def explain(
    model: Annotated[str, typer.Argument(help="Its name.")],
    header: Annotated[
        list[str] | None, typer.Option("--header", metavar="NAME=VALUE", help="Any number.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A v2 request as JSON; - reads stdin.")] = None,
    *,
    where: Where,
) -> None:
    """Say who would answer a request, and why; nothing is executed."""
    headers = dict(_header(text) for text in header or ())
    body = None if data is None else _text(data)
    if where.server:
        import json

        asked: dict[str, Any] = {"headers": headers}
        if body is not None:
            try:
                asked["request"] = json.loads(body)
            except ValueError:
                raise BadRequestError(f"{data}: is not JSON") from None
        path = f"/admin/routes/{quote(model, safe='')}/explain"
        said = where.call("POST", path, body=asked)["decision"]
    else:
        said = _explained(where, model, headers, body)
    if where.as_json:
        output.print_json({"decision": said})
        return
    for name, value in said.items():
        typer.echo(f"{name + ':':10} {value}")


@app.command("simulate")
@takes(Where)
def simulate(
    file: Annotated[
        Path, typer.Option("-f", "--file", help="YAML or JSON, a route by model; - reads stdin.")
    ],
    capture: Annotated[
        str, typer.Option(help="last-24h (s, m, h, d), all, or a file or directory of captures.")
    ] = "last-24h",
    run_dir: Annotated[str | None, typer.Option(help="As of the server.")] = None,
    *,
    where: Where,
) -> None:
    """Say what routes would make of captured requests: who moves, by which rule; nothing runs."""
    from registry import routes

    parsed = _parsed(file)
    found: dict[str, Any] = {}
    for model, route in parsed.items():
        if where.server:
            path = f"/admin/routes/{quote(model, safe='')}/simulate"
            asked = {"route": routes.document(route), "capture": capture}
            found[model] = where.call("POST", path, 120.0, body=asked)
        else:
            found[model] = _simulated(where, model, route, capture, run_dir)
    if where.as_json:
        output.print_json(found)
        return
    for model, made in found.items():
        _print_simulated(model, made)


def _simulated(
    where: Where, model: str, route: "Route", capture: str, run_dir: str | None
) -> dict[str, Any]:
    from gateway.cli.capture import reading_of, settings_of
    from gateway.simulation import Way
    from gateway.simulation import simulate as through
    from registry import changes
    from registry.revisions import ModelState

    def states(revisions: "Revisions") -> tuple[ModelState, ModelState]:
        known = changes.OnDisk(where.registry)
        change = changes.PutRoute(model, route)
        would = changes.apply(
            revisions, change, known=known, actor="", via="cli",
            dry_run=True, force=True, take_over=True,
        )  # fmt: skip
        now = revisions.head().models
        return now.get(model, ModelState()), would.revision.models.get(model, ModelState())

    before, after = where.read(states)
    found = reading_of(capture, model, settings_of(where.registry, where.state_dir, run_dir))
    with output.progress("reading") as bar:
        task = bar.add_task("", total=max(found.n_bytes, 1))
        made = through(
            found,
            Way(model, before),
            Way(model, after),
            rest=lambda: bar.update(task, completed=found.done_bytes),
        )
    return {**made.document(), "passed_over": found.said()}


def _print_simulated(model: str, made: dict[str, Any]) -> None:
    say = output.console.print
    say(f"{model}: {made['requests']} captured requests, {made['pinned']} more called by number")
    shares = output.table("variant", "version", "now", "would be", right=("now", "would be"))
    for entry in made["variants"]:
        shares.add_row(
            entry["variant"],
            str(entry["version"] or "-"),
            f"{entry['before']} ({entry['percent_before']:g} %)",
            f"{entry['after']} ({entry['percent_after']:g} %)",
        )
    say(shares)
    moved = made["moved"]
    say(
        f"another version answers {moved['requests']} requests ({moved['percent']:g} %),"
        f" {moved['units']} of {moved['of_units']} units"
    )
    for way in moved["ways"]:
        say(f"  {way['before']} -> {way['after']}: {way['requests']}")
    for title, entries in (("rule", made["rules"]), ("unit", made["units"])):
        for entry in entries:
            say(f"{title} {entry['name']}: {entry['before']} now, {entry['after']} then")
    if made["stand_ins"]:
        say(f"of {made['stand_ins']} only the share is right, not who: their salt was another")
    for source, n in made["not_captured"].items():
        say(f"{source}: not captured in {n} requests, taken as absent")
    if made["passed_over"]:
        say(f"passed over: {made['passed_over']}")


def _explained(
    where: Where, model: str, headers: dict[str, str], body: str | None
) -> dict[str, str]:
    from gateway.protocol import v2_json
    from gateway.simulation import explain as said_of
    from registry import changes
    from registry.changes.known import state_of

    def look(revisions: "Revisions") -> bytes:
        known = changes.OnDisk(where.registry)
        head = revisions.head()
        state = state_of(head.models, model, known)
        champion = changes.champion(model, state, known)
        signature = None if champion is None else known.signature(model, champion)
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        call = None if body is None else v2_json.decode(body.encode())
        return said_of(model, state, head.number, champion, pairs, call, signature)

    header = where.read(look).decode()
    return dict(part.split("=", 1) for part in header.split("; "))


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise BadRequestError(f"--header {text!r}: write NAME=VALUE")
    return name, value


def _parsed(file: Path) -> "dict[str, Route]":
    from registry import routes

    try:
        return routes.parse(_text(file))
    except routes.RouteError as error:
        raise ConfigError(*(f"{file.name}: {problem}" for problem in error.problems)) from None


def _text(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRequestError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadRequestError(f"{file}: is not text") from None


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
