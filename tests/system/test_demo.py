"""`driftgate demo` as people run it: in a pipe, on a terminal, interrupted, killed."""

import calendar
import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from scipy.stats import mannwhitneyu

from gateway.demo import sample

COMMAND = Path(sysconfig.get_path("scripts")) / "driftgate"
MONTHS = list(calendar.month_abbr)[1:]
STARTS = ("", "Ready after", "Jan ", "Apr ")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short place for temporary files, so that printed paths stay short."""
    with tempfile.TemporaryDirectory(prefix="dg", dir="/tmp") as made:
        yield Path(made)


class Demo:
    """A running demo whose output is read as it comes, from a pipe or a terminal of 80 x 24."""

    def __init__(self, folder: Path, *options: str, terminal: bool = False, **environ: str):
        if terminal:
            self.reader, out = pty.openpty()
            ioctl(out, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        else:
            self.reader, out = os.pipe()
        hidden = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR")
        self.process = subprocess.Popen(
            [COMMAND, "demo", *options],
            stdin=out if terminal else subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k not in hidden}
            | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}", "TMPDIR": str(folder)}
            | {"TERM": "xterm-256color"}
            | environ,
        )
        os.close(out)
        self.raw = b""

    @property
    def text(self) -> str:
        """Everything so far, without what moves the cursor and sets colours."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode())
        return plain.replace("\r\n", "\n")

    def read_until(self, words: str, seconds: float = 60) -> str:
        """The text once `words` are in it; None of them ever come: fails with what came."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, f"no {words!r} in:\n{self.text}"
            assert self._more(deadline), f"ended without {words!r}:\n{self.text}"
        return self.text

    def end(self, seconds: float = 60) -> int:
        """The exit code, after reading the rest."""
        deadline = time.monotonic() + seconds
        while self._more(deadline):
            assert time.monotonic() < deadline, f"does not end:\n{self.text}"
        return self.process.wait(max(1, deadline - time.monotonic()))

    def server(self) -> int:
        """The process id of its server: of the supervisor, the only child of the demo."""
        demo_pid = self.process.pid
        children = Path(f"/proc/{demo_pid}/task/{demo_pid}/children").read_text("ascii").split()
        found = [pid for pid in running() if str(pid) in children]
        assert len(found) == 1, running()
        return found[0]

    def commands(self) -> list[str]:
        """The curl commands as printed, lines that go on joined as a shell does."""
        joined = self.text.replace("\\\n", "")
        return re.findall(r"^  (curl .*)$", joined, re.MULTILINE)

    def _more(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.reader], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return True
        try:
            read = os.read(self.reader, 65_536)
        except OSError:  # A terminal without a writer ends so.
            return False
        self.raw += read
        return bool(read)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.reader)


@contextlib.contextmanager
def demo(folder: Path, *options: str, terminal: bool = False, **environ: str) -> Iterator[Demo]:
    """Start one, and leave none behind."""
    started = Demo(folder, *options, terminal=terminal, **environ)
    try:
        yield started
    finally:
        started.close()


def running() -> dict[int, list[bytes]]:
    """Demo servers that are alive, with their arguments."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if b"gateway.demo.server" in words:
                found[int(entry.name)] = words
    return found


def gone(pid: int, folder: Path, seconds: float = 15) -> bool:
    """Whether the server ends, and nothing is left of its files."""
    deadline = time.monotonic() + seconds
    while pid in running() or list(folder.iterdir()):
        if time.monotonic() > deadline:
            return False
        select.select([], [], [], 0.02)
    return True


def rows_of(text: str) -> dict[str, str]:
    """The settled rows of the table by month."""
    found = re.findall(rf"^((?:{'|'.join(MONTHS)}) .*\d\.\d\d.*)$", text, re.MULTILINE)
    return {row[:3]: row for row in found}


def picture(raw: str) -> str:
    """What a terminal shows at last: carriage return, line feed, up, erase; colours are nothing."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", raw):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row >= len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part.startswith("\x1b"):
            assert part[-1] in "mhl", f"not known here: {part!r}"
        else:
            before = lines[row].ljust(column)
            lines[row] = before[:column] + part + before[column + len(part) :]
            column += len(part)
    return "\n".join(lines)


def settled(text: str) -> list[str]:
    """Lines without what differs from run to run: the port, the folder, the seconds.

    Nor the blocks in which an alarm begins and ends: they are cut by time, and may be those of
    another month.
    """
    same = re.sub(r"127\.0\.0\.1:\d+|/tmp/\S+|after \S+ s", "X", text)
    same = re.sub(r"^    [-+] .*\n", "", same, flags=re.MULTILINE)
    same = re.sub(rf"^((?:{'|'.join(MONTHS)}) .*) +[-\d]$", r"\1", same, flags=re.MULTILINE)
    same = re.sub(r"since [A-Z]\w+", "since X", same.replace("!", " "))
    return [line.rstrip() for line in same.rstrip().splitlines()]


def curl(command: str) -> str:
    """What a pasted command prints."""
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, (command, done)
    return done.stdout


def check_commands(commands: list[str]) -> None:
    """All three answer with what they promise."""
    drift, metrics, predict = commands
    assert json.loads(curl(drift))["model"] == "flights"
    assert "driftgate_drift_score" in curl(metrics)
    (answer,) = json.loads(curl(predict))["outputs"]
    assert answer["name"] == "probability"
    assert 0 < answer["data"][0] < 1


@pytest.fixture(scope="module")
def whole_year() -> Iterator[tuple[int, str, float]]:
    """Exit code, output and seconds of one run with --exit in a pipe."""
    with tempfile.TemporaryDirectory(prefix="dg", dir="/tmp") as made:
        start = time.monotonic()
        with demo(Path(made), "--exit", "--acts", "1", "--port", "0") as run:
            code = run.end()
            seconds = time.monotonic() - start
            assert b"\x1b" not in run.raw
            assert not list(Path(made).iterdir())
            yield code, run.text, seconds


def test_the_year_ends_by_itself_within_a_minute(whole_year) -> None:
    """Exit code 0, twelve rows in order, a closing paragraph, no trace."""
    code, text, seconds = whole_year

    assert code == 0
    assert seconds < 60
    assert list(rows_of(text)) == MONTHS
    assert "What was seen" in text
    assert "Traceback" not in text


def test_temperature_alarm_is_announced_between_april_and_august(whole_year) -> None:
    """The one announcement follows the row of a month of spring or summer, with its numbers."""
    _, text, _ = whole_year
    before, after = text.split(" ALARM ", 1)
    psi, line = re.search(r"PSI (\S+)\. Without drift, .* below (\S+)\.", after).groups()

    assert after.lstrip().startswith("Temperature has drifted")
    assert list(rows_of(before))[-1] in {"Apr", "May", "Jun", "Jul", "Aug"}
    assert float(psi) >= 0.25 > float(line)
    assert " ALARM " not in after


def test_distance_and_carrier_never_alarm(whole_year) -> None:
    """All year their PSI stays below 0.1, without a mark, and no line speaks of an alarm."""
    _, text, _ = whole_year
    header = next(line for line in text.splitlines() if "distance" in line and "carrier" in line)

    for name in ("distance", "carrier"):
        at = header.index(name)
        cells = [row[at : at + 8] for row in rows_of(text).values()]
        assert all("!" not in cell for cell in cells)
        assert max(float(cell[:4]) for cell in cells) < 0.1
        assert f"{name}: alarm" not in text
    assert "Distance and carrier never moved" in " ".join(text.split())


def test_outcomes_agree_with_the_model_run_by_hand(whole_year) -> None:
    """Rate, mean score and AUC of every month are those of onnxruntime and scipy, unserved."""
    import onnxruntime

    _, text, _ = whole_year
    flights = sample.load()
    session = onnxruntime.InferenceSession(sample.model_path("january_march"))
    feeds = {name: column.reshape(-1, 1) for name, column in flights.columns.items()}
    score = session.run(None, feeds)[0][:, 0]

    for number, row in enumerate(rows_of(text).values(), 1):
        chosen = flights.month == number
        late, said = flights.late[chosen], score[chosen]
        n_pairs = late.sum() * (~late).sum()
        area = mannwhitneyu(said[late], said[~late]).statistic / n_pairs
        n_flights, rate, mean, auc = re.match(
            r"... +([\d,]+) +(\d+) % +(\d+) % +(\S+)", row
        ).groups()

        assert int(n_flights.replace(",", "")) == chosen.sum()
        assert float(rate) == pytest.approx(100 * np.mean(late), abs=0.51)
        assert float(mean) == pytest.approx(100 * np.mean(said), abs=0.51)
        assert float(auc) == pytest.approx(area, abs=0.0051)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_printed_commands_work_while_it_serves_on_and_ctrl_c_ends_it(folder) -> None:
    """After the replay the commands still answer; Ctrl-C is then the proper end: code 0."""
    with demo(folder, "--acts", "1", "--port", "0") as run:
        run.read_until("until Ctrl-C")
        server = run.server()
        check_commands(run.commands())
        table = re.search(r"^  driftgate (drift .*)$", run.text, re.MULTILINE).group(1)
        shown = subprocess.run(
            [COMMAND, *table.split()], capture_output=True, text=True, timeout=30, check=False
        )
        assert shown.returncode == 0
        assert "input:temp" in shown.stdout

        run.process.send_signal(signal.SIGINT)

        assert run.end() == 0
        assert gone(server, folder)
        assert "Traceback" not in run.text


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_ctrl_c_in_the_middle_of_a_watched_year_ends_everything(folder) -> None:
    """On a terminal the year is paced; commands answer during it; Ctrl-C leaves nothing."""
    with demo(folder, "--acts", "1", "--port", "0", terminal=True) as run:
        run.read_until("Jan   2,000 23 %  23 %  0.")
        server = run.server()
        check_commands(run.commands())

        os.killpg(run.process.pid, signal.SIGINT)  # As a terminal does.

        assert run.end() == 130
        assert "Stopped after" in run.text
        assert "Traceback" not in run.text
        assert "\x1b[?25h" in run.raw.decode()  # The cursor is back.
        assert gone(server, folder)


@pytest.mark.parametrize("words", STARTS)
def test_ctrl_c_at_any_moment_leaves_nothing(words, folder) -> None:
    """Before the server, as it becomes ready, at the first row, at the alarm."""
    with demo(folder, "--acts", "1", "--port", "0") as run:
        run.read_until(words)
        # Not before the command itself runs: until then it is Python that is interrupted.
        deadline = time.monotonic() + 30
        while not list(folder.iterdir()) and time.monotonic() < deadline:
            select.select([], [], [], 0.005)

        run.process.send_signal(signal.SIGINT)

        assert run.end() in {0, 130}
        assert "Traceback" not in run.text
        assert gone(0, folder)
        assert not [1 for argv in running().values() if str(run.process.pid).encode() in argv]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_server_does_not_outlive_a_killed_demo(number, code, folder) -> None:
    """However the demo is killed, its server ends and its files go."""
    with demo(folder, "--acts", "1", "--port", "0") as run:
        run.read_until("Mar ")
        server = run.server()
        assert server in running()

        run.process.send_signal(number)

        assert run.end() == code
        assert gone(server, folder)
        assert "Traceback" not in run.text


def test_a_lost_server_is_named_as_the_reason(folder) -> None:
    """One line and exit code 2, not a complaint about an address."""
    with demo(folder, "--acts", "1", "--port", "0") as run:
        run.read_until("Ready after")
        os.kill(run.server(), signal.SIGKILL)

        assert run.end() == 2
        assert "driftgate: the demo's server ended by itself" in run.text
        assert "Traceback" not in run.text
        assert not list(folder.iterdir())


def test_a_taken_port_is_replaced_and_plain_text_suffices(folder) -> None:
    """Another port is taken and named; a terminal that knows ASCII alone gets ASCII alone."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with demo(
            folder, "--exit", "--acts", "1", "--port", str(port), PYTHONIOENCODING="ascii"
        ) as run:
            assert run.end() == 0
            assert f"port {port} cannot be had" in run.text
            assert f"127.0.0.1:{port}/" not in run.text
            assert run.text.isascii()
            assert "?" not in run.text


def test_settings_of_the_users_own_servers_do_not_reach_it(folder) -> None:
    """A sampling switched off and another host in the environment change nothing."""
    environ = {"DRIFTGATE_MONITOR_SAMPLE": "0", "DRIFTGATE_HOST": "0.0.0.0"}
    with demo(folder, "--exit", "--acts", "1", "--port", "0", **environ) as run:
        assert run.end() == 0
        assert " ALARM " in run.text


def test_a_terminal_ends_with_the_same_picture_as_a_pipe(whole_year, folder) -> None:
    """No line reaches column 80, so none wraps; what moved is gone; nothing is overdrawn."""
    with demo(folder, "--exit", "--acts", "1", "--port", "0", terminal=True) as run:
        assert run.end() == 0
        lines = re.split(r"[\r\n]", run.text)

        assert b"\x1b[1A" in run.raw, "nothing has moved"
        assert max(map(cell_len, lines)) < 80, max(lines, key=cell_len)
        assert settled(picture(run.raw.decode())) == settled(whole_year[1])


def test_a_challenger_is_promoted_by_evidence_that_agrees_with_the_models_run_by_hand(
    folder,
) -> None:
    """Copies, half of the flights, champion: and what is said of both is what onnxruntime finds."""
    import onnxruntime

    with demo(folder, "--exit", "--port", "0") as run:
        assert run.end() == 0
        text = run.text.partition("Second act")[2]
    flat = " ".join(text.split())

    stages = ["gets copies", "answers 50 %", "is the champion"]
    assert [text.index(stage) for stage in stages] == sorted(map(text.index, stages))
    assert max(len(line) for line in text.splitlines() if "driftgate" not in line) < 80
    n, differ = numbers(r"of ([\d,]+) flights it called ([\d,]+) otherwise", flat)
    labelled, new, old = numbers(
        r"Labels of ([\d,]+) of them: the challenger alone was wrong on ([\d,]+),"
        r" the champion alone on ([\d,]+)", flat,
    )  # fmt: skip
    own, of, champions, among = numbers(
        r"answers: ([\d.]+) % of ([\d,]+) were wrong, ([\d.]+) % of the champion's ([\d,]+)", flat
    )
    flights = sample.load()
    chosen = (flights.month >= 7) & (flights.month <= 12)
    feeds = {name: column[chosen].reshape(-1, 1) for name, column in flights.columns.items()}
    is_late = flights.late[chosen]
    called = [
        onnxruntime.InferenceSession(sample.model_path(name)).run(None, feeds)[0][:, 0] >= 0.5
        for name in ("january_march", "january_june")
    ]
    # Copies are of the first flights, answers of its own of those between the step and the end.
    (stepped,) = numbers(r"([\d,]+) flights answers 50 %", flat)
    (ended,) = numbers(r"Promoted after ([\d,]+) flights", flat)
    otherwise = float((called[0] != called[1])[: int(stepped)].mean())
    assert abs(differ / n - otherwise) < error(otherwise, n)
    assert n >= 300
    assert labelled <= n
    assert new + old <= differ
    told = slice(int(stepped), int(ended) - 250)
    for share, rows, by_hand in ((champions, among, called[0]), (own, of, called[1])):
        wrong = float((by_hand != is_late)[told].mean())
        assert abs(share / 100 - wrong) < error(wrong, rows)
        assert rows >= 100  # The step wants 300 flights; labels come later.
    assert re.search(r"Not worse by 5 points: odds of [\d,]{2,} to 1, 20 needed", flat)


def numbers(pattern: str, text: str) -> list[float]:
    """What the groups of a pattern say."""
    found = re.search(pattern, text)
    assert found, text
    return [float(group.replace(",", "")) for group in found.groups()]


def error(share: float, n: float) -> float:
    """Four standard errors."""
    return 4 * (share * (1 - share) / n) ** 0.5


def test_the_command_it_recommends_profiles_a_model(whole_year, folder) -> None:
    """Pasted with files of these names in place, it writes a profile of inputs and output."""
    version = folder / "models" / "NAME" / "1"
    version.mkdir(parents=True)
    shutil.copy(sample.model_path("january_march"), version / "model.onnx")
    columns = {name: column[:500].tolist() for name, column in sample.load().columns.items()}
    rows = [
        ",".join(columns),
        *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True)),
    ]
    (folder / "training.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    joined = whole_year[1].replace("\\\n", "")
    command = re.search(r"^  driftgate (profile .*)$", joined, re.MULTILINE).group(1)

    subprocess.run([COMMAND, *command.split()], cwd=folder, timeout=30, check=True)

    written = json.loads((version / "reference.json").read_text(encoding="utf-8"))
    assert written["n_rows"] == 500
    assert written["channels"][-1]["name"] == "output:probability"
    assert "  driftgate serve models\n" in whole_year[1]
