"""Real services from Debian, started here for the tests and ended after them.

`make test-services` makes the environment and calls this: `python -m tests.services [suite ...]`.
A service that cannot be had here (no root, no Debian, no network) is skipped, with the reason.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.serving import free_port, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOOLS = ROOT / ".venv-services"
SUITE_S_MAX = 150


class SkippedError(Exception):
    """A service that is not to be had on this machine."""


def main(names: list[str]) -> int:
    """Run the suites; 1 when one of them failed, 2 for a name that is none."""
    if unknown := [name for name in names if name not in SUITES]:
        print(f"no suite {unknown[0]!r}; there are: {', '.join(SUITES)}")  # noqa: T201
        return 2
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    lines: list[str] = []
    for name in names or list(SUITES):
        start = time.monotonic()
        try:
            code = SUITES[name]()
            outcome = "passed" if code == 0 else f"failed: exit code {code}"
        except SkippedError as reason:
            outcome = f"skipped: {reason}"
        except subprocess.TimeoutExpired as error:
            outcome = f"failed: no end after {error.timeout:.0f} s"
        except AssertionError as error:
            outcome = f"failed: {error}"
        counts[outcome.partition(":")[0]] += 1
        lines.append(f"{name:<12} {outcome} ({time.monotonic() - start:.0f} s)")
    said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    print("\n".join(["", *lines, "", f"services: {said}"]))  # noqa: T201  this is the report
    return int(counts["failed"] > 0)


def pytest(*files: str, **environ: str) -> int:
    """Run test files of this project against a service."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, timeout=SUITE_S_MAX, check=False
    ).returncode


# -- PostgreSQL


def postgres() -> int:
    """The tables of labels, and two hosts that share them."""
    with tempfile.TemporaryDirectory(prefix="driftgate-pg-") as directory:
        Path(directory).chmod(0o755)
        with running_postgres(Path(directory)) as (url, pid):
            return pytest(
                "tests/gateway/labels/test_store.py",
                "tests/services/postgres.py",
                DRIFTGATE_TEST_POSTGRES=url,
                DRIFTGATE_TEST_POSTGRES_PID=str(pid),
            )


def postgres_binaries() -> Path:
    """Where Debian has put the server's programs, installing them if it may."""

    def found() -> list[Path]:
        return sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))

    if not found():
        apt("install", "-y", "--no-install-recommends", "postgresql")
    if not found():
        raise SkippedError("PostgreSQL is not there and could not be installed")
    return found()[-1].parent


@contextmanager
def running_postgres(directory: Path) -> Iterator[tuple[str, int]]:
    """A new cluster on a free port of loopback, as a user without rights; its URL and process."""
    binaries, port = postgres_binaries(), free_port()
    user = "postgres" if os.geteuid() == 0 else None
    data = directory / "data"
    data.mkdir()
    if user is not None:
        shutil.chown(data, user)
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "driftgate", "--auth=trust", "-E", "UTF8",
         "--no-sync"],
        user=user, group=user, extra_groups=[] if user else None, cwd="/", check=True,
        stdout=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    command = [
        binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", data,
        "-c", "shared_buffers=16MB", "-c", "max_connections=40",
    ]  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command, user=user, group=user, extra_groups=[] if user else None, cwd="/",
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        ask = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        wait_until(
            lambda: subprocess.run(ask, check=False).returncode == 0,
            (directory / "log").read_text(),
            timeout_s=30,
        )
        yield f"postgresql+psycopg://driftgate@127.0.0.1:{port}/postgres", process.pid
    finally:
        process.send_signal(signal.SIGINT)  # fast shutdown: its children end with it
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- Prometheus


def prometheus() -> int:
    """Rules, alerts, and every query of the dashboard."""
    return pytest("tests/services/prometheus.py", DRIFTGATE_TEST_PROMETHEUS=str(programs()))


def programs() -> Path:
    """Debian's prometheus and promtool, unpacked beside the environment: nothing is installed."""
    directory = TOOLS / "debian" / "usr" / "bin"
    if not (directory / "promtool").exists():
        with tempfile.TemporaryDirectory() as download:
            apt("download", "prometheus", cwd=download)
            packages = list(Path(download).glob("prometheus_*.deb"))
            if not packages:
                raise SkippedError("Prometheus could not be downloaded from Debian")
            subprocess.run(["dpkg", "-x", packages[0], TOOLS / "debian"], check=True, timeout=60)
    return directory


_is_updated = False


def apt(*words: str, cwd: str | None = None) -> None:
    """One command of apt-get, after the first update; what it cannot do is seen by its absence."""
    global _is_updated  # noqa: PLW0603  once a run
    if shutil.which("apt-get") is None:
        raise SkippedError("there is no apt-get here")
    if os.geteuid() != 0:
        raise SkippedError("only root may install packages")
    # Its services are not to be started by Debian, but by the tests.
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    options = ["-qq", "-o", "APT::Sandbox::User=root", "-o", "Dpkg::Use-Pty=0"]
    calls = [list(words)] if _is_updated else [["update"], list(words)]
    _is_updated = True
    for call in calls:
        subprocess.run(
            ["apt-get", *options, *call], env=environ, cwd=cwd, check=False, timeout=100,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def parquet() -> int:
    """The exported file, by pyarrow and DuckDB."""
    return pytest("tests/services/parquet.py")


def readers() -> int:
    """The recipes of the page on exports, by Evidently and NannyML in environments of their own."""
    if not list((ROOT / ".venv-readers").glob("*/.installed")):
        raise SkippedError("neither Evidently nor NannyML could be installed")
    return pytest("tests/services/readers.py")


SUITES: dict[str, Callable[[], int]] = {
    "postgres": postgres,
    "prometheus": prometheus,
    "parquet": parquet,
    "readers": readers,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
