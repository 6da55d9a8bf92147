"""Commands that change what is in force, and those that tell what was."""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from gateway.cli import output
from gateway.cli.door import How, Where, change, takes
from gateway.errors import BadRequestError

Model = Annotated[str, typer.Argument(help="Its name.")]
Version = Annotated[int, typer.Argument(min=1, help="Its number.")]


@takes(Where, How)
def alias(
    model: Model,
    name: Annotated[str, typer.Argument(help="The alias.")],
    version: Annotated[int | None, typer.Argument(min=1, help="The version it names.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Give the name up.")] = False,
    *,
    where: Where,
    how: How,
) -> None:
    """Name a version of a model."""
    from registry import changes

    path = f"{_of(model)}/aliases/{quote(name, safe='')}"
    if delete == (version is not None):
        raise BadRequestError("alias takes a version, or --delete")
    if version is None:
        made = changes.DeleteAlias(model, name)
        change(where, how, lambda _: made, ("DELETE", path, None))
        return
    named = changes.Alias(model, name, version)
    change(where, how, lambda _: named, ("PUT", path, {"version": version}))


@takes(Where, How)
def promote(model: Model, version: Version, *, where: Where, how: How) -> None:
    """Make a version the champion; the one before is kept as `previous`."""
    from registry import changes

    made = changes.Promote(model, version)
    change(where, how, lambda _: made, ("POST", f"{_of(model)}/promote", {"version": version}))


@takes(Where, How)
def rollback(model: Model, *, where: Where, how: How) -> None:
    """Make the previous champion answer again."""
    from registry import changes

    made = changes.Rollback(model)
    change(where, how, lambda _: made, ("POST", f"{_of(model)}/rollback", {}))


@takes(Where, How)
def follow(model: Model, *, where: Where, how: How) -> None:
    """Let the champion follow the highest version again."""
    from registry import changes

    made = changes.Follow(model)
    change(where, how, lambda _: made, ("POST", f"{_of(model)}/follow", {}))


@takes(Where, How)
def pin(model: Model, version: Version, *, where: Where, how: How) -> None:
    """Keep a version in memory and on disk."""
    from registry import changes

    made = changes.Pin(model, version)
    change(where, how, lambda _: made, ("POST", f"{_of(model)}/pin", {"version": version}))


@takes(Where, How)
def unpin(model: Model, version: Version, *, where: Where, how: How) -> None:
    """Let a version be evicted and removed again."""
    from registry import changes

    made = changes.Unpin(model, version)
    change(where, how, lambda _: made, ("POST", f"{_of(model)}/unpin", {"version": version}))


@takes(Where, How)
def restore(
    revision: Annotated[int, typer.Argument(min=0, help="As `history` says.")],
    model: Annotated[str | None, typer.Argument(help="Only this one; nothing: all.")] = None,
    *,
    where: Where,
    how: How,
) -> None:
    """Put in force again what an old revision said, as a new one."""
    from registry import changes

    change(
        where,
        how,
        lambda revisions: changes.Restore(revisions.get(revision), model),
        ("POST", f"/admin/revisions/{revision}/restore", {"model": model} if model else {}),
    )


@takes(Where)
def history(
    model: Annotated[str | None, typer.Argument(help="Only this one; nothing: all.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Revisions at most.")] = 20,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every digest, down to the first revision.")
    ] = False,
    *,
    where: Where,
) -> None:
    """List who changed what, the newest first."""
    if verify and where.server:
        raise BadRequestError("--verify reads the directory itself: leave --server out")
    found = _history(where, model, limit, verify=verify)
    if where.as_json:
        output.print_json(found)
    for entry in [] if where.as_json else found["revisions"]:
        when = entry["time"][:19].replace("T", " ")
        why = f": {entry['message']}" if entry["message"] else ""
        typer.echo(f"{entry['revision']}  {when}  {entry['actor']} ({entry['via']}){why}")
        for line in entry["diff"]:
            typer.echo(f"    {line}")
    for problem in [] if where.as_json else found["problems"]:
        typer.echo(f"note: {problem}", err=True)
    if verify and found["problems"]:
        raise typer.Exit(2)


@takes(Where)
def diff(
    a: Annotated[int, typer.Argument(min=0, help="A revision.")],
    b: Annotated[int, typer.Argument(min=0, help="Another.")],
    *,
    where: Where,
) -> None:
    """Say what is different between two revisions."""
    from registry import changes

    if where.server:
        answer = where.call("GET", f"/admin/revisions/{b}", query={"against": str(a)})
        lines = list(answer["diff"])
    else:
        lines = where.read(
            lambda revisions: changes.differences(revisions.get(a).models, revisions.get(b).models)
        )
    if where.as_json:
        output.print_json({"a": a, "b": b, "diff": lines})
        return
    for line in lines:
        typer.echo(line)
    if not lines:
        typer.echo(f"revisions {a} and {b} say the same")


def _history(
    where: Where, model: str | None, limit: int, *, verify: bool = False
) -> dict[str, Any]:
    from registry import changes

    if where.server:
        query = {"limit": str(limit)} | ({"model": model} if model else {})
        found: dict[str, Any] = where.call("GET", "/admin/revisions", query=query)
        return found
    entries, problems = where.read(
        lambda revisions: (
            changes.log(revisions, limit, model),
            revisions.verify() if verify else list(revisions.problems),
        )
    )
    return {
        "revisions": [
            {
                "revision": revision.number,
                "time": revision.time,
                "actor": revision.actor,
                "via": revision.via,
                "message": revision.message,
                "diff": lines,
            }
            for revision, lines in entries
        ],
        "problems": problems,
    }


def _of(model: str) -> str:
    return f"/admin/models/{quote(model, safe='')}"
