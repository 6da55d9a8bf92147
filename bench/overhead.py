"""One request's own overhead over a bare echo.

Question  How much server CPU does a prediction cost, as a multiple of a bare uvicorn echo?
Method    Rounds of 3 s in turn, echo and driftgate, same bytes and connections, closed loop;
          CPU of the whole process tree from /proc, with the work left for after the answer;
          medians of 5 rounds. Model 30-64-32-1; its reference profile is on: each row observed.
Budget    2.0 x the echo at 64 connections, 1 row of 30 floats as v2 JSON.
Run       make bench NAME=overhead
More      python -m bench overhead --connections 1 16 64 --rows 1 32 --share --verbose
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench import BenchError
from bench.load import Report, run_apart
from bench.processes import Server, cpu_s, free_port, machine_cpu_s, serve, settle
from gateway import __version__
from monitors import Profile

BUDGET = 2.0
MODEL = "tabular"
N_FEATURES = 30
PATH = f"/v2/models/{MODEL}/infer"
READY = "/v2/health/ready"
_LAYERS = (N_FEATURES, 64, 32, 1)
_N_REFERENCE = 20_000
_SEED = 7
_COUNTED_S_MAX = 5.0  # How long rows that were answered may wait to be counted.
_OTHERS_MAX = 0.1  # Cores; above that a figure is for comparing within its run only.


class MeasurementError(BenchError):
    """What was measured is not what the question asks for, so its figure means nothing."""


class Options(argparse.Namespace):
    """What the command line asks for."""

    connections: list[int]
    rows: list[int]
    rounds: int
    seconds: float
    share: bool
    verbose: bool


@dataclass(frozen=True, slots=True)
class Round:
    """One run of load against one server."""

    cpu_us: float
    """Server CPU per request."""
    others: float
    """Cores that programs outside this benchmark used meanwhile."""
    dropped: float
    """Share of the rows that the tap dropped: work that was not paid for."""
    report: Report


def write_model(path: Path) -> None:
    """Write a small dense network with seeded weights: input x (n, 30), output y (n, 1)."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    random = np.random.default_rng(_SEED)
    nodes, weights, last = [], [], "x"
    for layer, (n_in, n_out) in enumerate(pairwise(_LAYERS)):
        is_last = layer == len(_LAYERS) - 2
        matrix = random.normal(0, n_in**-0.5, (n_in, n_out)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        weights.append(numpy_helper.from_array(np.zeros(n_out, np.float32), f"b{layer}"))
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}", f"b{layer}"], [f"g{layer}"]))
        last = "y" if is_last else f"a{layer}"
        nodes.append(helper.make_node("Sigmoid" if is_last else "Relu", [f"g{layer}"], [last]))
    graph = helper.make_graph(
        nodes,
        MODEL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", N_FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        weights,
    )
    # An older format than this onnx writes by default, so that every onnxruntime allowed opens it.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, str(path))


def predict(path: Path, rows: np.ndarray) -> np.ndarray:
    """Run the model file directly, without a server."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": rows})[0])


def write_registry(directory: Path, models: Sequence[str] = (MODEL,)) -> None:
    """Write version 1 of each model with the profile of seeded standard normal rows."""
    rows = _rows(_N_REFERENCE, np.random.default_rng(_SEED))
    for model in models:
        version = directory / model / "1"
        version.mkdir(parents=True)
        write_model(version / "model.onnx")
        columns = {f"input:x[{column}]": rows[:, column] for column in range(N_FEATURES)}
        columns["output:y[0]"] = predict(version / "model.onnx", rows)[:, 0]
        (version / "reference.json").write_text(Profile.fit(columns).to_json(), "utf-8")


def bodies(n_rows: int, n_bodies: int) -> list[bytes]:
    """Make requests of fresh rows, so that what is counted varies as it does in use."""
    random = np.random.default_rng(_SEED + 1)
    return [
        json.dumps(
            {
                "inputs": [
                    {
                        "name": "x",
                        "shape": [n_rows, N_FEATURES],
                        "datatype": "FP32",
                        "data": [round(float(value), 6) for value in _rows(n_rows, random).flat],
                    }
                ]
            },
            separators=(",", ":"),
        ).encode()
        for _ in range(n_bodies)
    ]


def driftgate(
    stack: ExitStack, registry: Path, environment: Mapping[str, str] | None = None
) -> Server:
    """Start the command as a user would, on a free port, until `stack` closes."""
    command = Path(sys.executable).with_name("driftgate")
    port = free_port()
    return stack.enter_context(
        serve(
            [str(command), "serve", str(registry), "--port", str(port), "--grpc-port", "0"],
            port=port,
            ready_path=READY,
            # The registry has just been written, and is complete: a server need not see it rest.
            environment={"DRIFTGATE_SYNC_SETTLE_S": "0", **(environment or {})},
        )
    )


def check_answer(server: Server, body: bytes, model: Path) -> int:
    """Compare one answer with the model run directly; return the answer's size in bytes."""
    status, answer = _post(server, body)
    if status != 200:
        raise MeasurementError(f"status {status}: {answer[:200]!r}")
    given = json.loads(body)["inputs"][0]
    expected = predict(model, np.array(given["data"], np.float32).reshape(given["shape"]))
    output = json.loads(answer)["outputs"][0]
    came = np.array(output["data"], np.float32).reshape(output["shape"])
    if came.shape != expected.shape or not np.allclose(came, expected, rtol=1e-5, atol=1e-6):
        raise MeasurementError(f"answer {came.ravel()[:4]}, the model gives {expected.ravel()[:4]}")
    return len(answer)


def measure(
    server: Server, requests: Sequence[bytes], connections: int, seconds: float, n_rows: int
) -> Round:
    """Load one server, and charge it for what it does until it is quiet again.

    `n_rows` is how many rows of each request its monitors have to see: zero for none.
    """
    began, machine, own = time.perf_counter(), machine_cpu_s(), cpu_s(os.getpid())
    counts, before = _watched(server), cpu_s(server.pid)
    report = run_apart(server.port, PATH, requests, connections=connections, seconds=seconds)
    settle(server.pid)
    used = cpu_s(server.pid) - before
    # This process is the parent of the servers and of the generator: its tree is the benchmark.
    others = (machine_cpu_s() - machine) - (cpu_s(os.getpid()) - own)
    others = max(0.0, others / (time.perf_counter() - began))
    if report.ok != report.requests:
        raise MeasurementError(f"{report.non_2xx} answers not 2xx, {report.broken} broken")
    due = report.requests * n_rows
    now = _watched_after(server, sum(counts) + due)
    observed, dropped = (after - first for after, first in zip(now, counts, strict=True))
    if observed + dropped != due:
        raise MeasurementError(f"monitors saw {observed} rows and lost {dropped} of {due}")
    return Round(1e6 * used / report.requests, others, dropped / due if due else 0.0, report)


@contextmanager
def servers(n_rows: int, *, share: bool) -> Iterator[dict[str, Server]]:
    """Run the echo, driftgate, and (for the monitors' share) driftgate that samples nothing."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body = bodies(n_rows, 1)[0]
        found = {}
        settings = {"driftgate": "100"} | ({"unmonitored": "0"} if share else {})
        for name, sample in settings.items():
            registry = home / name
            write_registry(registry)
            found[name] = driftgate(stack, registry, {"DRIFTGATE_MONITOR_SAMPLE": sample})
            size = check_answer(found[name], body, registry / MODEL / "1" / "model.onnx")
            # The row of that check is counted a moment later; no round may find it.
            _watched_after(found[name], n_rows if name == "driftgate" else 0)
        port = free_port()
        echo = [sys.executable, "-m", "bench.echo", "--port", str(port)]
        found["echo"] = stack.enter_context(
            serve(
                [*echo, "--answer-bytes", str(size)],
                port=port,
                ready_path=READY,
                directory=Path(__file__).parent.parent,
            )
        )
        yield found


def compare(
    targets: Mapping[str, Server],
    requests: Sequence[bytes],
    connections: int,
    n_rows: int,
    options: Options,
) -> dict[str, list[Round]]:
    """Measure all servers in turn, so that whatever else the machine does meets each of them."""
    rounds: dict[str, list[Round]] = {name: [] for name in targets}
    watched = {name: n_rows if name == "driftgate" else 0 for name in targets}
    for name, server in targets.items():  # Caches, batch sizes and frequency settle unmeasured.
        measure(server, requests, connections, 1.0, watched[name])
    for number in range(options.rounds):
        # Who goes first changes, so that a slow drift of the machine favours nobody.
        for name in sorted(targets, reverse=bool(number % 2)):
            one = measure(targets[name], requests, connections, options.seconds, watched[name])
            rounds[name].append(one)
    return rounds


def line(n_rows: int, connections: int, rounds: Mapping[str, Sequence[Round]]) -> str:
    """Say what the rounds showed."""
    cpu = {name: statistics.median(one.cpu_us for one in all_) for name, all_ in rounds.items()}
    ratio = cpu["driftgate"] / cpu["echo"]
    text = (
        f"overhead: {_count(n_rows, 'row')}, {_count(connections, 'connection')}:"
        f" driftgate {cpu['driftgate']:.1f} us, echo {cpu['echo']:.1f} us"
        f" of server CPU a request: {ratio:.2f} x"
    )
    if (n_rows, connections) == (1, 64):
        text += f" (budget {BUDGET} x: {'within' if ratio <= BUDGET else 'OVER'})"
    if "unmonitored" in cpu:
        cost = cpu["driftgate"] - cpu["unmonitored"]
        text += f"; monitors {cost:.1f} us, {100 * cost / cpu['unmonitored']:.0f} % of the rest"
    if dropped := max(one.dropped for one in rounds["driftgate"]):
        text += f"; the tap dropped {100 * dropped:.1f} % of the rows of a round"
    others = statistics.median(one.others for all_ in rounds.values() for one in all_)
    if others > _OTHERS_MAX:
        text += f"; machine not quiet, others used {others:.1f} cores"
    return text


def main() -> None:
    """Answer for each number of rows and of connections that was asked for."""
    parser = argparse.ArgumentParser(description="One request's own overhead over a bare echo.")
    parser.add_argument("--connections", type=int, nargs="+", default=[64])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--share", action="store_true", help="measure the monitors' share too")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(namespace=Options())
    for n_rows in options.rows:
        requests = bodies(n_rows, max(64, 1024 // n_rows))
        with servers(n_rows, share=options.share) as targets:
            for connections in options.connections:
                rounds = compare(targets, requests, connections, n_rows, options)
                print(line(n_rows, connections, rounds), flush=True)
                if options.verbose:
                    _explain(rounds, len(requests[0]))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _rows(n_rows: int, random: np.random.Generator) -> np.ndarray:
    return random.standard_normal((n_rows, N_FEATURES)).astype(np.float32)


def _post(server: Server, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{PATH}",
        body,
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def _watched(server: Server) -> tuple[int, int]:
    """Rows that the monitors of a server have counted, and rows its tap has dropped."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    observed, dropped = (
        sum(
            int(float(line.rpartition(" ")[2]))
            for line in lines
            if line.startswith(f'{name}{{model="{MODEL}"')
        )
        for name in ("driftgate_observed_rows_total", "driftgate_tap_dropped_rows_total")
    )
    return observed, dropped


def _watched_after(server: Server, due: int) -> tuple[int, int]:
    """Wait, with a deadline, until so many rows are accounted for; the caller judges."""
    deadline = time.monotonic() + _COUNTED_S_MAX
    while sum(now := _watched(server)) < due and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def _explain(rounds: Mapping[str, Sequence[Round]], body_bytes: int) -> None:
    print(f"  driftgate {__version__}, Python {sys.version.split()[0]}, bodies {body_bytes} bytes")
    pairs = zip(rounds["driftgate"], rounds["echo"], strict=True)
    ratios = [own.cpu_us / echo.cpu_us for own, echo in pairs]
    print(f"  ratio round by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    for name, all_ in rounds.items():
        low, high = min(one.cpu_us for one in all_), max(one.cpu_us for one in all_)
        others = statistics.median(one.others for one in all_)
        reports = [one.report for one in all_]
        rate = statistics.median(report.requests_per_s for report in reports)
        p50, p99 = (
            1e3 * statistics.median(report.latency_s[key] for report in reports)
            for key in ("p50", "p99")
        )
        client = statistics.median(report.cpu_us_per_request for report in reports)
        print(
            f"  {name:12} {low:.1f} to {high:.1f} us, {rate:,.0f} requests/s,"
            f" p50 {p50:.2f} ms, p99 {p99:.2f} ms; load generator {client:.1f} us,"
            f" others {others:.2f} cores"
        )


if __name__ == "__main__":
    main()
