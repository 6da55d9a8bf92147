"""`driftgate alarm`: what is open, who has seen it, and whether those who should be told can be."""

import asyncio
import getpass
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape

from gateway.cli import output
from gateway.cli.door import Running, takes
from gateway.errors import BadRequestError

app = typer.Typer(help="Alarms: list, acknowledge, test who is told.", no_args_is_help=True)


@app.command("list")
@takes(Running)
def list_(
    model: Annotated[str | None, typer.Argument(help="Of this model; else of all.")] = None,
    *,
    running: Running,
) -> None:
    """Alarms as episodes, the newest first."""
    query = None if model is None else {"model": model}
    found = running.call("GET", "/alarms", query=query)["alarms"]
    if running.as_json:
        output.print_json(found)
        return
    for episode in found:
        opened = time.strftime("%Y-%m-%d %H:%M", time.gmtime(episode["opened"]))
        typer.echo(f"{episode['id']}  {opened}  {episode['state']}  {episode['reason']}")
    if not found:
        typer.echo("no alarms")
    if found and found[0]["state"] == "open":
        typer.echo(f"what to do: {found[0]['runbook']}")


@app.command("ack")
@takes(Running)
def acknowledge(
    alarm: Annotated[str, typer.Argument(help="Its id.")],
    note: Annotated[str, typer.Option(help="What is done about it.")] = "",
    *,
    running: Running,
) -> None:
    """Say that an alarm has been seen."""
    path = f"/admin/alarms/{quote(alarm, safe='')}/ack"
    episode = running.call("POST", path, body={"by": _user(), "note": note})
    if running.as_json:
        output.print_json(episode)
    else:
        typer.echo(f"{episode['id']}: {episode['state']}")


@app.command("test")
def try_out(
    targets: Annotated[
        Path | None,
        typer.Option(help="The file of targets.", envvar="DRIFTGATE_ALARMS_TARGETS"),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tell every target of an alarm that is none, once, from this machine."""
    from gateway.alarms import targets as files

    if targets is None:
        raise BadRequestError("which file? --targets FILE, or $DRIFTGATE_ALARMS_TARGETS")
    read = files.load(targets)
    chosen = [one for one in read.targets if target in (None, one.name)]
    if not chosen:
        raise BadRequestError(f"{targets.name}: no target {target!r}" if target else "no targets")
    results = asyncio.run(_tell(read, chosen))
    if as_json:
        output.print_json(results)
    else:
        shown = output.table("target", "host", "preset", "answer")
        for one in results:
            shown.add_row(one["name"], escape(one["host"]), one["preset"], escape(one["answer"]))
        output.console.print(shown)
    if not all(one["is_taken"] for one in results):
        raise typer.Exit(2)


async def _tell(read: Any, chosen: list[Any]) -> list[dict[str, Any]]:
    from gateway.alarms import targets as files
    from gateway.alarms.log import Episode, identity
    from gateway.alarms.presets import Message
    from gateway.alarms.webhooks import attempt
    from gateway.outgoing import DeliveryError

    now = time.time()
    about = ("driftgate-test", 1, "test", int(now))
    reason = "a test: nothing is wrong"
    message = Message(
        "test", now, Episode(identity(*about), *about, reason, now, now, {}), read.name, read.link
    )

    async def one(target: Any) -> dict[str, Any]:
        try:
            answer, is_taken = str(await attempt(target, message, read.allowed)), True
        except DeliveryError as error:
            answer, is_taken = str(error), False
        return {**files.about(target), "answer": answer, "is_taken": is_taken}

    return await asyncio.gather(*(one(target) for target in chosen))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
