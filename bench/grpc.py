"""One gRPC call's own overhead over a bare echo.

Question  How much server CPU does a gRPC prediction cost, as a multiple of a bare grpc.aio echo?
Method    Rounds of 3 s in turn, echo and driftgate with either carrier, same bytes and
          connections, one call in flight on each, closed loop, generator in a process of its own;
          CPU of the whole process tree from /proc, with the work left for after the answer;
          medians of 5 rounds.
Budget    1.3 x the echo at 16 connections, unary, 1 row of 30 raw floats, with the carrier zttp.
Run       make bench NAME=grpc
More      python -m bench grpc --connections 1 16 64 --streaming
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench import BenchError
from bench.overhead import MODEL, N_FEATURES, READY, write_registry
from bench.processes import Server, cpu_s, free_port, serve, settle
from gateway.protocol.stubs import inference_pb2 as pb

BUDGET = 1.3
CARRIERS = ("grpcio", "zttp")
_SERVICE = "inference.GRPCInferenceService"
_UNARY, _STREAM = f"/{_SERVICE}/ModelInfer", f"/{_SERVICE}/ModelStreamInfer"
_ROOT = Path(__file__).parent.parent
_SEED = 8


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and where it speaks gRPC."""

    pid: int
    port: int


def request() -> bytes:
    """Make a request of one row."""
    row = np.random.default_rng(_SEED).standard_normal((1, N_FEATURES)).astype(np.float32)
    message = pb.ModelInferRequest(model_name=MODEL)
    message.inputs.add(name="x", datatype="FP32", shape=row.shape)
    message.raw_input_contents.append(row.tobytes())
    return message.SerializeToString()


@contextlib.contextmanager
def driftgate(home: Path, carrier: str) -> Iterator[Target]:
    """Start the command as a user would."""
    registry = home / "registry"
    write_registry(registry)
    port, grpc_port = free_port(), free_port()
    command = [str(Path(sys.executable).with_name("driftgate")), "serve", str(registry)]
    command += ["--port", str(port), "--grpc-port", str(grpc_port), "--grpc-carrier", carrier]
    with serve(command, port=port, ready_path=READY) as server:
        check(server, grpc_port)
        yield Target(server.pid, grpc_port)


def check(server: Server, port: int) -> None:
    """Refuse to measure a server that does not predict."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = pb.ModelInferResponse.FromString(channel.unary_unary(_UNARY)(request(), timeout=5))
    if answer.outputs[0].name != "y" or len(answer.raw_output_contents[0]) != 4:
        raise BenchError(f"the server on port {server.port} gives {answer}")


@contextlib.contextmanager
def echo() -> Iterator[Target]:
    """Start the yardstick."""
    command = [sys.executable, "-m", "bench.grpc", "--echo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_ROOT) as process:
        try:
            assert process.stdout is not None
            yield Target(process.pid, int(process.stdout.readline()))
        finally:
            process.terminate()


async def serve_echo() -> None:
    """Give back what comes, on a loop like driftgate's."""

    async def unary(message: bytes, _: Any) -> bytes:
        return message

    async def stream(messages: AsyncIterator[bytes], context: Any) -> None:
        async for message in messages:
            await context.write(message)

    server = grpc.aio.server()
    handlers = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(unary),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def load(port: int, connections: int, seconds: float, *, streaming: bool) -> int:
    """Send load to a loopback port from this process; how many answers came."""
    message = request()
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(connections)
    ]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    until = time.perf_counter() + seconds

    async def calls(channel: Any) -> int:
        call, n = channel.unary_unary(_UNARY), 0
        while time.perf_counter() < until:
            await call(message)
            n += 1
        return n

    async def messages(channel: Any) -> int:
        call, n = channel.stream_stream(_STREAM)(), 0
        while time.perf_counter() < until:
            await call.write(message)
            await call.read()
            n += 1
        await call.done_writing()
        return n

    one = messages if streaming else calls
    counts = await asyncio.gather(*(one(channel) for channel in channels))
    await asyncio.gather(*(channel.close() for channel in channels))
    return sum(counts)


def measure(target: Target, connections: int, seconds: float, *, streaming: bool) -> float:
    """Server CPU per answer, in microseconds."""
    command = [sys.executable, "-m", "bench.grpc", "--load", str(target.port)]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    before = cpu_s(target.pid)
    result = subprocess.run(
        [*command, *(["--streaming"] if streaming else [])],
        stdout=subprocess.PIPE,
        check=True,
        cwd=_ROOT,
        timeout=seconds + 60,
    )
    settle(target.pid)
    return 1e6 * (cpu_s(target.pid) - before) / json.loads(result.stdout)


def compare(
    targets: dict[str, Target], connections: int, options: argparse.Namespace, *, streaming: bool
) -> str:
    """Measure all in turn, so that whatever else the machine does meets each of them."""
    rounds: dict[str, list[float]] = {name: [] for name in targets}
    for target in targets.values():  # Caches and frequency settle unmeasured.
        measure(target, connections, 1.0, streaming=streaming)
    for number in range(options.rounds):
        for name in sorted(targets, reverse=bool(number % 2)):
            took = measure(targets[name], connections, options.seconds, streaming=streaming)
            rounds[name].append(took)
    cpu = {name: statistics.median(rounds[name]) for name in targets}
    text = f"grpc: {'stream' if streaming else 'unary'}, 1 row, {connections} connections:"
    text += f" grpc.aio echo {cpu['echo']:.0f} us of server CPU a call"
    for carrier in CARRIERS:
        text += (
            f", driftgate by {carrier} {cpu[carrier]:.0f} us = {cpu[carrier] / cpu['echo']:.2f} x"
        )
    if (connections, streaming) == (16, False):
        ratio = cpu["zttp"] / cpu["echo"]
        text += f" (budget {BUDGET} x: {'within' if ratio <= BUDGET else 'OVER'})"
    return text


def main() -> None:
    """Answer for each number of connections that was asked for."""
    parser = argparse.ArgumentParser(description="One gRPC call's own overhead over a bare echo.")
    parser.add_argument("--connections", type=int, nargs="+", default=[16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--streaming", action="store_true", help="measure streams too")
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.echo or options.load:
        import uvloop

        with contextlib.suppress(KeyboardInterrupt):
            if options.echo:
                uvloop.run(serve_echo())
            else:
                sending = load(
                    options.load,
                    options.connections[0],
                    options.seconds,
                    streaming=options.streaming,
                )
                print(uvloop.run(sending))
        return
    with contextlib.ExitStack() as stack:
        targets = {"echo": stack.enter_context(echo())}
        for carrier in CARRIERS:
            home = stack.enter_context(tempfile.TemporaryDirectory())
            targets[carrier] = stack.enter_context(driftgate(Path(home), carrier))
        for streaming in (False, True)[: 1 + options.streaming]:
            for connections in options.connections:
                print(compare(targets, connections, options, streaming=streaming), flush=True)


if __name__ == "__main__":
    main()
