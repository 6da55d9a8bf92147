"""Real clients, each in an environment of its own, against real servers of this tree.

`make test-clients` makes the environments and calls this: `python -m tests.clients [suite ...]`.
The files named here are pytest files that run in a client's environment, where driftgate is not
installed: what they know of the server is two addresses and the models listed in `publish`.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests import models
from tests.clients import perf_analyzer, schemathesis
from tests.clients.outcome import SkippedError
from tests.serving import Server, serve

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-clients"
SUITE_S_MAX = 240


@dataclass(frozen=True)
class Suite:
    """One client and what it is asked to show."""

    environment: str
    files: tuple[str, ...] = ()
    """Run by pytest in the client's environment."""
    program: Callable[[Path, Server], int] | None = None
    """Where the client is a program: environment and server to exit code."""
    settings: dict[str, object] = field(default_factory=dict)


SUITES = {
    "tritonclient": Suite("tritonclient", ("tritonclient_http.py", "tritonclient_grpc.py")),
    "kserve": Suite("kserve", ("kserve_sdk.py",)),
    "zttp-tritonclient": Suite(
        "tritonclient", ("tritonclient_grpc.py",), settings={"grpc_carrier": "zttp"}
    ),
    "zttp-kserve": Suite("kserve", ("kserve_sdk.py",), settings={"grpc_carrier": "zttp"}),
    "mlflow": Suite("mlflow", ("mlflow_scoring.py",), settings={"model": "mixed"}),
    "perf_analyzer": Suite("perf_analyzer", program=perf_analyzer.run),
    "zttp-perf_analyzer": Suite(
        "perf_analyzer", program=perf_analyzer.run, settings={"grpc_carrier": "zttp"}
    ),
    "schemathesis": Suite("schemathesis", program=schemathesis.run, settings={"model": "matrix"}),
}


def publish(registry: Path) -> None:
    """The models that the clients know."""
    for kind in models.ELEMENTS:
        models.put(registry, f"same-{kind}", 1, models.identity(kind))
    models.put(registry, "matrix", 1, models.identity("FP32", ("n", 3)))
    models.put(registry, "half", 1, models.half())
    models.put(registry, "pair", 1, models.sum_and_difference())
    models.put(registry, "mixed", 1, models.mixed())
    models.put(registry, "vector", 1, models.vector())
    models.put(registry, "scalar", 1, models.scalar())
    models.put(registry, "slow", 1, models.slow(n_rounds=2000))
    models.put(registry, "spare", 1, models.constant(1))
    for version in (2, 9, 10):
        models.put(registry, "counted", version, models.constant(version))


def main(names: list[str]) -> int:
    """Run the suites; 1 when one of them failed, 2 for a name that is none."""
    if unknown := [name for name in names if name not in SUITES]:
        print(f"no suite {unknown[0]!r}; there are: {', '.join(SUITES)}")  # noqa: T201
        return 2
    lines: list[str] = []
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    with tempfile.TemporaryDirectory() as directory:
        registry = Path(directory, "models")
        publish(registry)
        for name in names or list(SUITES):
            start = time.monotonic()
            outcome = run(SUITES[name], registry)
            counts[outcome.partition(":")[0]] += 1
            lines.append(f"{name:<14} {outcome} ({time.monotonic() - start:.0f} s)")
    # The last line says what ran, for a CI that reads closing lines: some clients end with none.
    said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    print("\n".join(["", *lines, "", f"suites: {said}"]))  # noqa: T201  this is the report
    return int(counts["failed"] > 0)


def run(suite: Suite, registry: Path) -> str:
    """One suite against a server of its own: passed, failed or skipped, and why."""
    environment = ENVIRONMENTS / suite.environment
    if not (environment / ".installed").exists():
        return "skipped: its environment could not be installed here"
    try:
        with serve(registry, {"grpc_port": 0, **suite.settings}) as server:
            if suite.program is not None:
                code = suite.program(environment, server)
            else:
                code = pytest(environment, suite.files, server)
    except SkippedError as reason:
        return f"skipped: {reason}"
    except subprocess.TimeoutExpired as error:
        return f"failed: no end after {error.timeout:.0f} s"
    except AssertionError as error:  # The server died, or logged a fault of its own.
        return f"failed: {error}"
    return "passed" if code == 0 else f"failed: exit code {code}"


def pytest(environment: Path, files: tuple[str, ...], server: Server) -> int:
    """Run test files with the client's own Python, away from this project's configuration."""
    grpc_url = server.wait_for("ready", "no_model_opened").get("grpc_url", "")
    command = [
        environment / "bin" / "python", "-m", "pytest", "-q", "-rs", "--timeout=60",
        "--import-mode=importlib", "-p", "no:cacheprovider", "-W", "ignore",
        "-c", HERE / "pytest.ini", "--confcutdir", HERE, "--rootdir", HERE,
        *(HERE / file for file in files),
    ]  # fmt: skip
    environ = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": os.environ.get("HOME", ""),
        "NO_PROXY": "127.0.0.1",
        "DRIFTGATE_URL": server.url,
        "DRIFTGATE_GRPC": grpc_url,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(command, env=environ, timeout=SUITE_S_MAX, check=False).returncode


if __name__ == "__main__":
    if not ENVIRONMENTS.is_dir():
        sys.exit("no .venv-clients here; run: make test-clients")
    sys.exit(main(sys.argv[1:]))
