"""The year 2013 through a real server, month by month, and what its monitors make of it.

How it looks is in screen.py, what is said about it in story.py, the server in server.py.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

import numpy as np

from gateway.demo import challenger, sample, story
from gateway.demo.months import Alarm, Month, auc, auc_error
from gateway.demo.sample import Sample
from gateway.demo.screen import Screen
from gateway.demo.server import INFER, MODEL, Server, running
from gateway.errors import StartError
from gateway.outgoing import Connection

WINDOW_ROWS = 2000
"""As many as a month has flights in the sample: a window is a month."""
BUDGET_ROWS = 24_000
"""One false page in so many rows: a year of flights."""
REQUEST_ROWS = 40
MONTH_S = 2.5
"""How long a month takes when somebody watches."""

_CLOSE_S_MAX = 10.0
_DRIFT = f"/drift/{MODEL}"


def run(*, exit_at_end: bool, port: int, acts: int = 2) -> int:
    """Replay the year; the exit code.

    Parameters
    ----------
    exit_at_end : end after the replay, without pacing it; else serve on until Ctrl-C
    port : for the server; another is taken and named if it cannot be had
    acts : 1: the year and its drift; 2: then a challenger that wants the champion's place

    Raises
    ------
    StartError : the server did not start, or was lost on the way.
    """
    flights = sample.load()
    is_paced = sys.stdout.isatty() and not exit_at_end
    screen = Screen(flights.n_rows, is_paced=is_paced)
    months: list[Month] = []
    with _ended_by_signals():
        try:
            with running(port, WINDOW_ROWS, BUDGET_ROWS) as server:
                _introduce(screen, server, flights)
                with _blamed_on(server):
                    _replay(screen, server.url, flights, months, is_paced)
                screen.console.print("\n[bold]What was seen[/]")
                screen.say(story.told(months, len(sample.REFERENCE_MONTHS)))
                code = _verdict(screen, months)
                if acts > 1:
                    with _blamed_on(server):
                        code = max(code, _challenge(screen, server, flights))
                _conclude(screen)
                if not exit_at_end:
                    _serve_on(screen, server)
                    code = 0
        except KeyboardInterrupt:
            where = f"after {months[-1].name}" if months else "before the first month ended"
            screen.say(f"\nStopped {where}. The server and its files are gone.")
            return 130
    return code


def _introduce(screen: Screen, server: Server, flights: Sample) -> None:
    body = server.folder / "flight.json"
    hot = int(np.flatnonzero(flights.month == 7)[WINDOW_ROWS // 2])
    body.write_text(
        json.dumps(sample.request_of(flights, range(hot, hot + 1)), indent=1), encoding="utf-8"
    )

    screen.console.print("[bold]driftgate demo[/]: a year of real flights through a real server")
    screen.say(f"""
  model     {MODEL}, version 1: the chance that a flight from New York is late,
            trained on January to March 2013, which are its reference too
  traffic   {flights.n_rows:,} flights of 2013 in order of time, {REQUEST_ROWS} a request
  monitors  all inputs and answers, scores of the newest {WINDOW_ROWS:,}: a month
  outcomes  known to this client alone, which reckons late and AUC from them
""")
    if server.port_note:
        screen.say(f"  note      {server.port_note}\n")
    screen.say(f"Ready after {server.ready_s:.1f} s. While it runs, open {server.url}{_DRIFT}")
    screen.say("or paste: what the monitors see, the scores, a flight of July, a table\n")
    screen.verbatim(f"  curl -s {server.url}{_DRIFT}")
    screen.verbatim(f"  curl -s {server.url}/metrics | grep drift_score")
    screen.verbatim(f"  curl -s {server.url}{INFER} \\")
    screen.verbatim(f"       -d @{shlex.quote(str(body))}")
    screen.verbatim(f"  {_command()} drift {MODEL} --server {server.url}\n")


def _replay(screen: Screen, url: str, flights: Sample, months: list[Month], is_paced: bool) -> None:
    """Send every flight; a month is added when it is closed and shown."""
    screen.legend()
    screen.header()
    open_before: tuple[Alarm, ...] = ()
    has_alarmed = False
    with Connection(url) as connection, screen.moving():
        for number in np.unique(flights.month).tolist():
            first, stop = np.searchsorted(flights.month, (number, number + 1)).tolist()
            rows = range(first, stop)
            scores = _send(screen, connection, flights, rows, MONTH_S if is_paced else 0.0)
            month = _closed(connection, flights, rows, scores)
            months.append(month)
            screen.closed(month)
            if month.alarms and not has_alarmed:
                has_alarmed = True
                screen.alarm(story.alarm_lines(month.alarms, month))
            else:
                for line in story.change_lines(open_before, month):
                    screen.say(f"    {line}", "yellow")
            open_before = month.alarms


def _send(
    screen: Screen, connection: Connection, flights: Sample, rows: range, seconds: float
) -> list[float]:
    """Send one month's flights in order, spread over so many seconds; the scores of all."""
    scores: list[float] = []
    start = time.monotonic()
    for request in (rows[k : k + REQUEST_ROWS] for k in range(0, len(rows), REQUEST_ROWS)):
        answer = connection.call("POST", INFER, body=sample.request_of(flights, request))
        scores += answer["outputs"][0]["data"]
        late = flights.late[rows.start : request.stop]
        number = int(flights.month[rows.start])
        screen.filling(
            number, request.stop, len(late), float(late.mean()), sum(scores) / len(scores)
        )
        due = start + seconds * len(scores) / len(rows)
        time.sleep(max(0.0, due - time.monotonic()))
    return scores


def _closed(connection: Connection, flights: Sample, rows: range, scores: list[float]) -> Month:
    """What the month showed, once the monitors have closed its window."""
    number = int(flights.month[rows.start])
    deadline = time.monotonic() + _CLOSE_S_MAX
    while True:
        found = connection.call("GET", _DRIFT)
        if found["rows_observed"] >= rows.stop:
            break
        if time.monotonic() > deadline:
            raise StartError(f"the monitors have not seen all flights of month {number}")
        time.sleep(0.02)
    report = found["report"]
    late, score = flights.late[rows.start : rows.stop], np.array(scores)
    n_late, area = int(late.sum()), auc(late, score)
    psi = {channel["name"]: channel["scores"]["psi"] for channel in report["channels"]}
    pages = [alarm for alarm in report["alarms"] if alarm["level"] == "page"]
    return Month(
        number=number,
        n_flights=len(rows),
        late_rate=float(late.mean()),
        score_mean=float(score.mean()),
        auc=area,
        auc_error=auc_error(area, n_late, len(late) - n_late),
        psi={name: _number(found["value"]) for name, found in psi.items()},
        lines={name: _number(found["line"]) for name, found in psi.items()},
        alarms=tuple(
            Alarm(
                alarm["channel"],
                psi[alarm["channel"]]["value"],
                psi[alarm["channel"]]["line"],
                int(flights.month[min(alarm["since_row"], rows.stop - 1)]),
            )
            for alarm in pages
            if alarm["channel"] in psi
        ),
        n_witnesses=sum(alarm["channel"] not in psi for alarm in pages),
    )


def _challenge(screen: Screen, server: Server, flights: Sample) -> int:
    """The second act; 0 if the challenger is champion at its end, else 1."""
    ending = challenger.play(screen, server, flights)
    screen.say()
    for line in challenger.told(ending):
        screen.say(line)
    command = _command()
    screen.say("\nIts file, the evidence of each step, and the way back:\n")
    for words in (f"canary status {MODEL}", f"drift {MODEL} --against champion", "history"):
        screen.verbatim(f"  {command} {words} --server {server.url}")
    screen.verbatim(f"  {command} rollback {MODEL} --server {server.url}")
    return 0 if ending.is_promoted else 1


def _conclude(screen: Screen) -> None:
    command = _command()
    screen.console.print("\n[bold]Next: your own model[/] in models/NAME/1/model.onnx")
    screen.verbatim(f"  {command} profile training.csv --model models/NAME/1/model.onnx \\")
    screen.verbatim("       --out models/NAME/1/reference.json")
    screen.verbatim(f"  {command} serve models")


def _verdict(screen: Screen, months: Sequence[Month]) -> int:
    """0 if the monitors noticed the summer, else 1."""
    if any(alarm.channel == story.TEMPERATURE for month in months for alarm in month.alarms):
        return 0
    highest = max(month.psi[story.TEMPERATURE] for month in months)
    screen.say(f"\nNo temperature alarm was raised (highest PSI {highest:.2f}): one was due.")
    return 1


def _serve_on(screen: Screen, server: Server) -> None:
    """Keep the server until Ctrl-C."""
    screen.say(f"\nThe server stays at {server.url} until Ctrl-C.")
    try:
        server.process.wait()
    except KeyboardInterrupt:
        screen.say("\nEnded: the server and its files are gone.")
        return
    raise StartError(f"the demo's server ended by itself: {server.last_words}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _command() -> str:
    """How the reader would call this command again."""
    if shutil.which("driftgate"):
        return "driftgate"
    return shlex.quote(os.path.relpath(sys.argv[0]))


@contextlib.contextmanager
def _blamed_on(server: Server) -> Iterator[None]:
    """Say why the server went away, if that is why it does not answer."""
    try:
        yield
    except StartError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(1.0)
            raise StartError(f"the demo's server ended by itself: {server.last_words}") from None
        raise


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a kill or a closed terminal end the demo as orderly as Ctrl-C does."""

    def told(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
