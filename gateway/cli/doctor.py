"""`driftgate doctor`: what this host and these directories can do."""

from typing import Annotated

import typer
from rich.markup import escape

from gateway.cli import output, places

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


def doctor(
    registry: places.Registry = places.REGISTRY,
    state_dir: places.State = None,
    workers: Annotated[int, typer.Option(min=1, help="Plan memory for so many.")] = 1,
    as_json: places.AsJSON = False,
) -> None:
    """Try out what driftgate needs of the file system, the clock and the memory."""
    from gateway.doctor import examine

    found = examine(registry, places.state_of(registry, state_dir), workers=workers)
    if as_json:
        output.print_json(
            [{"what": one.what, "state": one.state, "detail": one.detail} for one in found]
        )
    else:
        for one in found:
            output.console.print(
                f"[{_COLOURS[one.state]}]{one.state:8}[/] {one.what}: {escape(one.detail)}",
                soft_wrap=True,
            )
    if any(one.state == "failure" for one in found):
        raise typer.Exit(2)
