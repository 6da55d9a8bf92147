"""`driftgate keys`: who may call a server. Works on the file, which servers read again."""

import time
from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.output import console, print_json, table
from gateway.errors import ConfigError

_DAY_S = 86_400.0

app = typer.Typer(no_args_is_help=True, help="Who may call a server.", rich_markup_mode=None)
File = Annotated[
    Path, typer.Option("--keys", envvar="DRIFTGATE_KEYS", help="File of keys that serve reads.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("add")
def add(
    file: File,
    scope: Annotated[
        list[str], typer.Option(help="predict, monitor or admin; may be given several times.")
    ],
    note: Annotated[str, typer.Option(help="Whose it is, for people.")] = "",
    days: Annotated[float | None, typer.Option(help="Days until it expires.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Make a key and print it, this once."""
    from gateway import access

    known = [known for known in access.SCOPES if known != "open"]
    if unknown := [given for given in scope if given not in known]:
        raise ConfigError(f"--scope {unknown[0]}: must be one of {', '.join(known)}")
    if days is not None and days <= 0:
        raise ConfigError(f"--days {days:g}: must be more than 0")
    expires = None if days is None else time.time() + days * _DAY_S
    scopes = [known for known in access.KEY_SCOPES if known in scope]
    key, text = access.add(file, scopes, note=note, expires=expires)
    if as_json:
        print_json({"id": key.id, "key": text, "scopes": list(key.scopes)})
        return
    typer.echo(text)
    typer.echo(
        f"key {key.id} may {', '.join(key.scopes)}; it is shown only now. Undo: driftgate keys"
        f" revoke {key.id}",
        err=True,
    )


@app.command("list")
def list_all(file: File, as_json: AsJSON = False) -> None:
    """Keys by id, without their secrets."""
    from gateway import access

    keys = access.read(str(file)).values()
    if as_json:
        print_json([
            {"id": key.id, "scopes": list(key.scopes), "note": key.note, "created": key.created,
             "expires": key.expires}
            for key in keys
        ])  # fmt: skip
        return
    shown = table("id", "scopes", "created", "expires", "note")
    for key in keys:
        expires = "never" if key.expires is None else _day(key.expires)
        shown.add_row(key.id, ", ".join(key.scopes), _day(key.created), expires, key.note)
    console.print(shown)


@app.command("revoke")
def revoke(
    file: File, key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` says.")]
) -> None:
    """Take a key out of the file; servers notice within two seconds."""
    from gateway import access

    key = access.revoke(file, key_id)
    typer.echo(f"key {key.id} is revoked")


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))
