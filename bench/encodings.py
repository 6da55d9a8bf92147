"""What each encoding of one request costs.

Question  How many bytes, and how much server CPU, does a prediction take as JSON, as JSON with
          binary tensors, and as MessagePack?
Method    One server and its model of bench/overhead.py, 30 floats a row, 16 connections in a closed
          loop; the encodings in turn, rounds of 2 s; CPU of the process tree from /proc; medians
          of 3 rounds. Streams: documents of one row in one request, one connection.
Budget    None: it informs the choice of an encoding.
Run       make bench NAME=encodings
"""

import http.client
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgpack
import numpy as np

from bench.load import run_apart
from bench.overhead import MODEL, N_FEATURES, PATH, MeasurementError, driftgate, write_registry
from bench.processes import Server, cpu_s, machine_cpu_s, settle

CONNECTIONS = 16
ROUNDS = 3
SECONDS = 2.0
N_STREAMED = 20_000
_SEED = 7


def encodings(rows: np.ndarray) -> dict[str, tuple[bytes, dict[str, str]]]:
    """The same request in each encoding: its body, and the headers that say what it is."""
    head = {"name": "x", "shape": list(rows.shape), "datatype": "FP32"}
    data = rows.tobytes()
    numbers = [round(float(value), 6) for value in rows.flat]
    listed = json.dumps({"inputs": [{**head, "data": numbers}]}, separators=(",", ":")).encode()
    binary = json.dumps(
        {
            "inputs": [{**head, "parameters": {"binary_data_size": len(data)}}],
            "parameters": {"binary_data_output": True},
        },
        separators=(",", ":"),
    ).encode()
    packed = msgpack.packb({"inputs": [{**head, "data": data}]})
    return {
        "JSON": (listed, {"content-type": "application/json"}),
        "binary": (
            binary + data,
            {
                "content-type": "application/octet-stream",
                "inference-header-content-length": str(len(binary)),
            },
        ),
        "MessagePack": (packed, {"content-type": "application/msgpack"}),
    }


def answer_bytes(server: Server, body: bytes, headers: dict[str, str]) -> int:
    """Size of the body of one answer; a round of errors would measure something else."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request("POST", PATH, body, headers)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise MeasurementError(f"status {answer.status}: {content[:200]!r}")
    return len(content)


def cpu_us(server: Server, body: bytes, headers: dict[str, str]) -> float:
    """Server CPU per request of one round."""
    before = cpu_s(server.pid)
    report = run_apart(
        server.port, PATH, [body], connections=CONNECTIONS, seconds=SECONDS, headers=headers
    )
    settle(server.pid)
    if report.ok != report.requests:
        raise MeasurementError(f"{report.non_2xx} answers not 2xx, {report.broken} broken")
    return 1e6 * (cpu_s(server.pid) - before) / report.requests


def stream_cpu_us(server: Server, document: bytes) -> float:
    """Server CPU per document of one stream."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    before = cpu_s(server.pid)
    connection.request(
        "POST", f"{PATH}_stream", document * N_STREAMED, {"content-type": "application/msgpack"}
    )
    answers = msgpack.Unpacker()
    answers.feed(connection.getresponse().read())
    n_answered = sum("outputs" in answer for answer in answers)
    connection.close()
    settle(server.pid)
    if n_answered != N_STREAMED:
        raise MeasurementError(f"{n_answered} of {N_STREAMED} documents were answered")
    return 1e6 * (cpu_s(server.pid) - before) / N_STREAMED


def main() -> None:
    """Print a line for each number of rows and encoding."""
    random = np.random.default_rng(_SEED)
    with ExitStack() as stack:
        registry = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_registry(registry)
        server = driftgate(stack, registry)
        began, machine, own = time.perf_counter(), machine_cpu_s(), cpu_s(os.getpid())
        for n_rows in (1, 32):
            rows = random.standard_normal((n_rows, N_FEATURES)).astype(np.float32)
            made = encodings(rows)
            sizes = {name: (len(one[0]), answer_bytes(server, *one)) for name, one in made.items()}
            used: dict[str, list[float]] = {name: [] for name in made}
            for number in range(ROUNDS):
                # Who goes first changes, so that a slow drift of the machine favours nobody.
                for name in sorted(made, reverse=bool(number % 2)):
                    used[name].append(cpu_us(server, *made[name]))
            for name, (asked, answered) in sizes.items():
                print(
                    f"encodings: {n_rows:2} rows {name:11} {asked:6} bytes in, {answered:5} out,"
                    f" {statistics.median(used[name]):6.1f} us of server CPU",
                    flush=True,
                )
            if n_rows == 1:
                document = made["MessagePack"][0]
                streamed = statistics.median(stream_cpu_us(server, document) for _ in range(ROUNDS))
                print(f"encodings:  1 row  streamed    {streamed:.1f} us of server CPU")
        others = (machine_cpu_s() - machine) - (cpu_s(os.getpid()) - own)
        others /= time.perf_counter() - began
        print(f"encodings: model {MODEL}; others used {max(others, 0):.1f} cores")


if __name__ == "__main__":
    main()
