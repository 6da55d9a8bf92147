"""What the demo looks like: 79 columns, readable without colour, line by line in a pipe."""

import calendar
import math
import textwrap
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from gateway.demo.months import Month

WIDTH = 79
SHOWN = {
    "input:temp": "temp",
    "input:dewp": "dewp",
    "input:distance": "distance",
    "input:carrier": "carrier",
    "output:probability": "score",
}
"""Channels with a column of their own, and what it is called."""

_CELL = 8
_BAR = 3
_BAR_FROM, _BAR_TO = 0.02, 20.0
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_ALARM_PSI = 0.25
_DRAW_S = 0.06


class Screen:
    """Prints what is settled, and keeps one line below it moving while a terminal watches."""

    def __init__(self, n_flights: int, *, is_paced: bool) -> None:
        self.console = Console(highlight=False)
        self._is_unicode = self.console.encoding.lower().startswith("utf")
        self._live: Live | None = None
        self._next_draw = 0.0
        columns = [
            TextColumn("{task.description:9}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} flights"),
            *([TimeRemainingColumn(compact=True)] if is_paced else []),
        ]
        self._progress = Progress(*columns, console=self.console, auto_refresh=False)
        self._task = self._progress.add_task("", total=n_flights)

    def moving(self) -> AbstractContextManager[Any]:
        """While inside, the month being replayed is shown as it fills, if anybody can see it."""
        # Asked of the stream itself: rich also calls a pipe a terminal if colour is forced on it.
        if not self.console.file.isatty():
            return nullcontext()
        # Drawn by this thread alone: a second one, drawing between two lines of output, would
        # count from the wrong line.
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        return self._live

    def say(self, text: str = "", style: str = "") -> None:
        """Print lines as they are, or folded at a blank where one is too long."""
        for line in text.split("\n"):
            folded = textwrap.wrap(line, WIDTH, break_long_words=False, break_on_hyphens=False)
            for part in folded or [""]:
                self.console.print(Text(part, style), soft_wrap=True)

    def verbatim(self, text: str) -> None:
        """Print a command in one piece, however long, so that it can be copied."""
        self.console.print(Text(text, "cyan"), soft_wrap=True)

    def header(self) -> None:
        """Name the columns."""
        client = _ruled("the client knows", 24)
        server = _ruled("PSI: what the monitors see", 41)
        names = " ".join(f"{name:{_CELL}}" for name in SHOWN.values())
        self.console.print(Text(f"    {client}  {server}  alarms", "dim"), soft_wrap=True)
        self.console.print(
            Text(f"    flights late score   AUC  {names} open", "bold"), soft_wrap=True
        )

    def filling(
        self, number: int, n_sent: int, n_flights: int, late_rate: float, score_mean: float
    ) -> None:
        """Show how far month and year are; AUC and PSI wait for all flights of the month."""
        name = calendar.month_name[number]
        self._progress.update(self._task, description=name, completed=n_sent)
        if self._live is not None and time.monotonic() >= self._next_draw:
            self._next_draw = time.monotonic() + _DRAW_S
            row = Text(_outcomes(number, n_flights, late_rate, score_mean), "dim")
            self._live.update(self._below(row), refresh=True)

    def closed(self, month: Month) -> None:
        """Print a month for good."""
        alarmed = {alarm.channel for alarm in month.alarms}
        row = Text(_outcomes(month.number, month.n_flights, month.late_rate, month.score_mean))
        row.append(f" {month.auc:5.2f} ")
        for channel in SHOWN:
            psi, line = month.psi[channel], month.lines[channel]
            row.append(" ")
            row.append(self._cell(psi, channel in alarmed), _style(psi, line, channel in alarmed))
        row.append(f" {len(alarmed) or '-':>4}", "bold red" if alarmed else "")
        if self._live is not None:
            self._live.update(self._below(Text()))
        self.console.print(row, soft_wrap=True)

    def alarm(self, lines: Sequence[str]) -> None:
        """Announce an alarm so that nobody overlooks it."""
        edge = "▌" if self._is_unicode else "|"
        self.console.print()
        for k, line in enumerate(lines):
            for part in textwrap.wrap(line, WIDTH - 11):
                text = Text(f"{edge} ", "bold red")
                text.append(" ALARM " if k == 0 else "       ", "bold white on red" * (k == 0))
                text.append(f"  {part}", "bold" if k == 0 else "")
                self.console.print(text, soft_wrap=True)
        self.console.print()

    def legend(self) -> None:
        """Explain the marks."""
        self.say(
            "! alarm open: evidence enough for one false page in a year of flights.\n"
            f"Bars: PSI {_BAR_FROM} to {_BAR_TO:.0f} on a logarithmic scale."
            " Score: the model's output.",
            "dim",
        )

    def _below(self, row: Text) -> Group:
        """What is drawn again and again, always as high: the month, and how far the year is."""
        return Group(row, Text(), self._progress.get_renderable())

    def _cell(self, psi: float, is_alarmed: bool) -> str:
        if math.isnan(psi):
            return f"{'-':>4}{'':{_CELL - 4}}"
        number = f"{psi:.2f}" if psi < 9.995 else f"{psi:.1f}"
        return f"{number:>4}{'!' if is_alarmed else ' '}{self._bar(psi)}"

    def _bar(self, psi: float) -> str:
        """A horizontal bar; every tenfold is as long as the last."""
        span = math.log(_BAR_TO / _BAR_FROM)
        share = min(max(math.log(max(psi, _BAR_FROM) / _BAR_FROM) / span, 0.0), 1.0)
        if not self._is_unicode:
            return f"{'#' * round(share * _BAR):{_BAR}}"
        whole, eighths = divmod(round(share * _BAR * 8), 8)
        return f"{'█' * whole + _EIGHTHS[eighths] * (whole < _BAR):{_BAR}}"


def _outcomes(number: int, n_flights: int, late_rate: float, score_mean: float) -> str:
    name = calendar.month_abbr[number]
    return f"{name} {n_flights:7,} {100 * late_rate:2.0f} % {100 * score_mean:3.0f} %"


def _style(psi: float, line: float, is_alarmed: bool) -> str:
    if is_alarmed:
        return "bold red"
    return "yellow" if psi >= _ALARM_PSI else "dim" if psi <= line else ""


def _ruled(title: str, width: int) -> str:
    return f"{f'-- {title} ':-<{width}}"
