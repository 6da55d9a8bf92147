"""`driftgate demo`: a year of real flights."""

from typing import Annotated

import typer


def demo(
    exit_at_end: Annotated[
        bool, typer.Option("--exit", help="Do not pace the year, and end after it.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="HTTP port; 0 takes a free one.")
    ] = 8000,
    acts: Annotated[
        int, typer.Option(min=1, max=2, help="1: the drift; 2: then a challenger, too.")
    ] = 2,
) -> None:
    """Replay a year of real flights through a real server: watch the drift, then a canary."""
    from gateway.demo.replay import run

    raise typer.Exit(run(exit_at_end=exit_at_end, port=port, acts=acts))
