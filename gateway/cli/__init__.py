"""The command `driftgate`: commands and exit codes, no logic.

Exit codes: 0 ok, 2 invalid input or settings, or a server that said no, 3 a conflict with somebody
else's change, 4 written but not yet applied by all workers, 5 a guard found what must not be (or
would have). Imports stay lazy: a command that only prints a table does not open onnxruntime.
"""

import os
import sys
from typing import Annotated

import typer

from gateway import __version__
from gateway.cli import (
    alarm,
    canary,
    capture,
    change,
    demo,
    doctor,
    drift,
    export,
    keys,
    labels,
    models,
    monitor,
    profile,
    publish,
    replay,
    route,
    serve,
    shadow,
    versions,
)
from gateway.errors import ConfigError, GatewayError

_CONFLICT = (409, 412)
"""Statuses of what somebody else was faster with."""

app = typer.Typer(
    name="driftgate",
    help="Serves ONNX models and notices when they drift.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"driftgate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the release."
        ),
    ] = False,
) -> None:
    pass


app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("models")(models.models)
app.command("publish")(publish.publish)
app.command("show")(versions.show)
app.command("lineage")(versions.lineage)
app.command("verify")(versions.verify)
app.command("gc")(versions.gc_command)
app.command("withdraw")(versions.withdraw)
app.command("doctor")(doctor.doctor)
app.command("drift")(drift.drift)
app.command("profile")(profile.profile)
for _name in (
    "alias", "promote", "rollback", "follow", "pin", "unpin", "history", "diff", "restore",
):  # fmt: skip
    app.command(_name)(getattr(change, _name))
app.add_typer(route.app, name="route")
app.add_typer(canary.app, name="canary")
app.add_typer(shadow.app, name="shadow")
app.add_typer(monitor.app, name="monitor")
app.add_typer(labels.app, name="labels")
app.add_typer(capture.app, name="capture")
app.add_typer(alarm.app, name="alarm")
app.command("export")(export.export)
app.command("replay")(replay.replay)
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Run the command line; every failure is one line and an exit code."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        _end(_one_line(error.format_message()), 2)
    except ConfigError as error:
        _end("\n".join(error.problems), 2)
    except GatewayError as error:
        _end(str(error), 3 if error.status in _CONFLICT else 2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has left (head, less): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(code if isinstance(code, int) else 0)


def _end(text: str, code: int) -> None:
    for line in text.splitlines():
        typer.echo(f"driftgate: {line}", err=True)
    sys.exit(code)


def _one_line(text: str) -> str:
    return " ".join(text.split())
