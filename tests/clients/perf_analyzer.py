"""NVIDIA's load generator over HTTP and gRPC: it stops at any field that it misses."""

import csv
import subprocess
import tempfile
from pathlib import Path

from tests.clients.outcome import SkippedError
from tests.serving import Server

WINDOW = ("--measurement-mode", "count_windows", "--measurement-request-count", "100")
RUN_S_MAX = 60

CASES = {
    "HTTP, binary tensors": ("http", "matrix", ()),
    "HTTP, JSON both ways": (
        "http",
        "matrix",
        ("--input-tensor-format", "json", "--output-tensor-format", "json"),
    ),
    "HTTP, batches of 4": ("http", "matrix", ("-b", "4")),
    "HTTP, a shape for a free axis": ("http", "same-FP32", ("--shape", "x:4")),
    "HTTP, two inputs": ("http", "pair", ()),
    "HTTP, texts and numbers": (
        "http",
        "mixed",
        ("--shape", "amount:4", "--shape", "count:4", "--shape", "place:4"),
    ),
    "gRPC": ("grpc", "matrix", ()),
    "gRPC, asynchronous, 4 at once": ("grpc", "matrix", ("-a", "--concurrency-range", "4")),
    "gRPC, streaming": ("grpc", "matrix", ("-a", "--streaming", "--concurrency-range", "2")),
}


def run(environment: Path, server: Server) -> int:
    """Measure each case for a moment; 1 when one of them cannot be measured, or counts an error."""
    program, libraries = _found(environment)
    grpc_url = server.events("ready")[0]["grpc_url"].rpartition("//")[2]
    failed = 0
    for name, (protocol, model, options) in CASES.items():
        address = grpc_url if protocol == "grpc" else server.url.removeprefix("http://")
        with tempfile.TemporaryDirectory() as directory:
            table = Path(directory, "figures.csv")
            command = [program, "-m", model, "-i", protocol, "-u", address, "-f", table]
            ended = subprocess.run(
                [*command, *WINDOW, "--max-trials", "3", "-s", "1000", *options],
                env={"LD_LIBRARY_PATH": libraries},
                capture_output=True,
                text=True,
                timeout=RUN_S_MAX,
                check=False,
            )
            figures = next(csv.DictReader(table.open()), {}) if table.exists() else {}
        rate = float(figures.get("Inferences/Second", 0))
        is_measured = ended.returncode == 0 and rate > 0
        failed |= not is_measured
        print(f"perf_analyzer  {name:<32} {rate:8.0f} rows/s")  # noqa: T201  the report
        if not is_measured:
            print(ended.stdout[-1500:], ended.stderr[-1500:])  # noqa: T201
    return int(failed)


def _found(environment: Path) -> tuple[Path, str]:
    """The program, and where its libraries are; SkippedError says what is missing."""
    program = environment / "bin" / "perf_analyzer"
    if not program.exists():
        raise SkippedError("there is no perf_analyzer for this platform")
    places = [*environment.rglob("libcudart.so.12"), *environment.rglob("libb64.so.0d")]
    libraries = ":".join(str(place.parent) for place in places)
    program.chmod(0o755)
    try:
        ended = subprocess.run(
            [program, "--version"],
            env={"LD_LIBRARY_PATH": libraries},
            capture_output=True,
            text=True,
            timeout=RUN_S_MAX,
            check=False,
        )
    except OSError as error:
        raise SkippedError(f"perf_analyzer does not start: {error.strerror}") from None
    if ended.returncode != 0:
        said = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SkippedError(f"perf_analyzer does not start: {said.rpartition('/')[2]}")
    return program, libraries
