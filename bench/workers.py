"""What a second worker brings.

Question  How many times the requests of one worker do two answer, on a model of 5 ms?
Method    Rounds of 3 s in turn on a server with one worker and a server with two, one row a request
          that is never batched, 16 and 64 keep-alive connections, closed loop, generator in a
          process of its own (it takes part of a core from the second worker); the median of the
          ratios of neighbouring rounds. Printed with it: how the connections were spread.
Budget    1.8 x at 16 connections, on two quiet cores.
Run       make bench NAME=workers
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from bench.load import Report, run_apart
from bench.overhead import READY
from bench.processes import Server, free_port, serve, tree

RATIO_MIN = 1.8
RUN_S = 0.005
_PATH = "/v2/models/heavy/infer"
_BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [0.5]}]}
).encode()


def write_model(path: Path, n_rounds: int) -> None:
    """Write a network that multiplies 64 x 512 by 512 x 512 so many times, for one row."""
    from onnx import TensorProto, helper, numpy_helper, save

    random = np.random.default_rng(7)
    shared = random.normal(0, 512**-0.5, (512, 512)).astype(np.float32)
    weights = [numpy_helper.from_array(shared, "w")] if n_rounds else []
    nodes = [helper.make_node("MatMul", ["x", "spread"], ["h0"])]
    for k in range(n_rounds):
        nodes += [
            helper.make_node("MatMul", [f"h{k}", "w"], [f"g{k}"]),
            helper.make_node("Tanh", [f"g{k}"], [f"h{k + 1}"]),
        ]
    nodes.append(helper.make_node("ReduceMean", [f"h{n_rounds}"], ["m"], keepdims=1))
    nodes.append(helper.make_node("Reshape", ["m", "one"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [
            *weights,
            numpy_helper.from_array(np.ones((64, 1, 512), np.float32), "spread"),
            numpy_helper.from_array(np.array([1, 1], np.int64), "one"),
        ],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        str(path),
    )


def seconds_of(path: Path) -> float:
    """Of the fastest of some runs, directly."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        session.run(None, {"x": np.ones((1, 1), np.float32)})
        taken.append(time.perf_counter() - start)
    return min(taken)


def write_registry(directory: Path) -> float:
    """Write a model of about 5 ms; return its seconds."""
    version = directory / "heavy" / "1"
    version.mkdir(parents=True)
    write_model(version / "model.onnx", 4)
    n_rounds = max(1, round(4 * RUN_S / seconds_of(version / "model.onnx")))
    write_model(version / "model.onnx", n_rounds)
    return seconds_of(version / "model.onnx")


def spread(server: Server) -> list[int]:
    """Connections that each worker holds now."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = f":{server.port:04X}"
    held = {row[9] for row in rows if row[1].endswith(local) and row[3] == "01"}
    counts = []
    for worker in tree(server.pid)[1:]:
        inodes = set()
        for handle in Path(f"/proc/{worker}/fd").iterdir():
            with suppress(OSError):
                inodes |= set(re.findall(r"socket:\[(\d+)\]", str(handle.readlink())))
        counts.append(len(inodes & held))
    return counts


def measure(server: Server, connections: int, seconds: float) -> tuple[Report, list[int]]:
    """One round, and how its connections were spread half-way."""
    seen: list[int] = []
    looking = threading.Timer(seconds / 2 + 0.5, lambda: seen.extend(spread(server)))
    looking.start()
    report = run_apart(server.port, _PATH, [_BODY], connections=connections, seconds=seconds)
    looking.join()
    return report, seen


def main() -> None:
    """Measure in turn and print a line for each number of connections."""
    parser = argparse.ArgumentParser(description="What a second worker brings.")
    parser.add_argument("--connections", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    with ExitStack() as stack:
        registry = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run_s = write_registry(registry)
        servers = []
        for n_workers in (1, 2):
            port = free_port()
            command = [str(Path(sys.executable).with_name("driftgate")), "serve", str(registry)]
            command += ["--port", str(port), "--grpc-port", "0", "--workers", str(n_workers)]
            servers.append(stack.enter_context(serve(command, port=port, ready_path=READY)))
        for connections in options.connections:
            ratios, rates, spreads = [], [], []
            for _ in range(options.rounds):
                one, _ = measure(servers[0], connections, options.seconds)
                two, held = measure(servers[1], connections, options.seconds)
                ratios.append(two.requests_per_s / one.requests_per_s)
                rates.append((one.requests_per_s, two.requests_per_s))
                spreads.append("+".join(map(str, held)))
            ratio = statistics.median(ratios)
            first, second = (statistics.median(rate[k] for rate in rates) for k in (0, 1))
            print(
                f"workers: two answer {ratio:.2f} x one at {connections} connections"
                f" ({first:.0f} and {second:.0f} requests/s, model {run_s * 1e3:.1f} ms;"
                f" connections {', '.join(spreads)};"
                f" budget {RATIO_MIN:g} x: {'within' if ratio >= RATIO_MIN else 'UNDER'})",
                flush=True,
            )


if __name__ == "__main__":
    main()
