"""How commands print: tables, small bars, progress, or JSON."""

import json
import os
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SERVER_DEFAULT = "http://127.0.0.1:8000"
_BLOCKS = " ▁▂▃▄▅▆▇█"

console = Console(highlight=False, emoji=False)  # A channel named input:x: is no picture.


def server_default() -> str:
    """The server that commands talk to unless one is named."""
    return os.environ.get("DRIFTGATE_SERVER", SERVER_DEFAULT)


def print_json(value: Any) -> None:
    """A value as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(*headers: str, right: Sequence[str] = ()) -> Table:
    """An empty table; columns named in `right` are aligned there."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        made.add_column(header, justify="right" if header in right else "left", no_wrap=True)
    return made


def bars(shares: Sequence[float | None]) -> str:
    """A histogram in one line of text, its highest bar full."""
    heights = [share or 0.0 for share in shares]
    top = max(heights, default=0.0)
    if top <= 0:
        return " " * len(heights)
    return "".join(_BLOCKS[round(height / top * (len(_BLOCKS) - 1))] for height in heights)


def gauge(value: float, full: float, width: int = 10) -> str:
    """A horizontal bar: `value` of `full`, never longer than `width`."""
    filled = round(min(max(value / full, 0.0), 1.0) * width)
    return "█" * filled + "░" * (width - filled)


def progress(title: str) -> Progress:
    """A progress bar on standard error that leaves nothing behind when it is done."""
    terminal = Console(stderr=True)
    return Progress(
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,  # in a file it would leave empty lines
    )
