"""Whether the carrier zttp loses a call.

Question  Is every gRPC call answered while connections are taken out of service under load, calls
          expire and are given up, connections lie idle, and the server is told to end?
Method    One server, grpc.aio clients as they come, each answer held against its own request.
          Calls in four shapes of channels by calls at a time, each far beyond what a connection
          carries; calls with deadlines of 0 to 4 ms and calls cancelled after 0 to 4 ms among good
          ones on the same connections; streams beside them; channels that were idle meanwhile;
          SIGTERM while calls are under way, which must be answered. Lost is what was neither
          answered nor given up by the client itself.
Budget    0 lost.
Run       make bench NAME=carrier
More      python -m bench carrier --calls 1000000 --given-up 10000
          --no-retries: clients may not send again what they had not sent yet when they were told
          to send it elsewhere; some such calls then fail in the client, and no server saw them
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from bench import BenchError
from bench.overhead import MODEL, N_FEATURES, READY, write_registry
from bench.processes import free_port, serve
from gateway.protocol.stubs import inference_pb2 as pb

SHAPES = ((16, 1), (16, 8), (4, 64), (1, 100))
"""Channels, and calls at a time on each."""
_SERVICE = "inference.GRPCInferenceService"
_UNARY, _STREAM = f"/{_SERVICE}/ModelInfer", f"/{_SERVICE}/ModelStreamInfer"
_GIVE_UP_S_MAX = 0.004
_IDLE = 8
_STREAMS = 4
_LATE_S = 60.0
_TURNS = 3
"""Of the loop, from a call's making to its leaving."""


@dataclass(slots=True)
class Tally:
    """What became of the calls."""

    answered: int = 0
    messages: int = 0
    """Answered in streams."""
    given_up: Counter[str] = field(default_factory=Counter)
    """Calls that the client let go, by how they ended."""
    under_way: int = 0
    """Calls that had left when the server was told to end."""
    lost: Counter[str] = field(default_factory=Counter)
    """Calls that should have been answered and were not, by what the client was told."""

    def __str__(self) -> str:
        ended = ", ".join(f"{n} {status}" for status, n in sorted(self.given_up.items()))
        text = f"{self.answered} calls and {self.messages} messages answered, given up: {ended}"
        text += f", {self.under_way} under way at the end"
        return f"{text}; lost: {sum(self.lost.values())} {dict(self.lost) or ''}".rstrip()


class Client:
    """Calls of one test, each with a name of its own."""

    def __init__(
        self,
        address: str,
        model: str = MODEL,
        n_features: int = N_FEATURES,
        *,
        has_retries: bool = True,
    ) -> None:
        self._address = address
        self._options = [("grpc.use_local_subchannel_pool", 1)]
        if not has_retries:
            self._options.append(("grpc.enable_retries", 0))
        self._model = model
        self._row = np.zeros((1, n_features), np.float32)
        self._names: Iterator[int] = itertools.count()
        self.tally = Tally()
        self._part = "idle"
        """Of the method, for what is lost in it."""

    def _lose(self, why: str) -> None:
        self.tally.lost[f"{self._part}: {why}"] += 1

    async def channels(self, stack: AsyncExitStack, n: int) -> list[Any]:
        """Open connections, each its own."""
        opened = [grpc.aio.insecure_channel(self._address, options=self._options) for _ in range(n)]
        for channel in opened:
            await stack.enter_async_context(channel)
        await asyncio.gather(*(channel.channel_ready() for channel in opened))
        return opened

    def request(self) -> tuple[bytes, bytes]:
        """Make a request, and the name that its answer must have."""
        name = f"call-{next(self._names)}-"
        made = pb.ModelInferRequest(model_name=self._model, id=name)
        made.inputs.add(name="x", datatype="FP32", shape=self._row.shape)
        made.raw_input_contents.append(self._row.tobytes())
        return made.SerializeToString(), name.encode()

    async def ask(self, call: Any) -> None:
        """Make one call that must be answered."""
        message, name = self.request()
        try:
            answer = await call(message, timeout=_LATE_S)
        except grpc.aio.AioRpcError as error:
            self._lose(f"{error.code().name}: {error.details()}")
            return
        if name in answer:
            self.tally.answered += 1
        else:
            self._lose("another one's answer")

    async def give_up(self, call: Any, generator: random.Random) -> None:
        """Make one call that is let go: by its deadline, or by being cancelled."""
        message, _ = self.request()
        wait_s = generator.uniform(0, _GIVE_UP_S_MAX)
        is_deadline = generator.random() < 0.5
        made = call(message, timeout=wait_s if is_deadline else _LATE_S)
        if not is_deadline:
            await asyncio.sleep(wait_s)
            made.cancel()
        try:
            await made
            self.tally.given_up["OK"] += 1
        except asyncio.CancelledError:
            self.tally.given_up["CANCELLED"] += 1
        except grpc.aio.AioRpcError as error:
            wanted = "DEADLINE_EXCEEDED" if is_deadline else "CANCELLED"
            if error.code().name == wanted:
                self.tally.given_up[wanted] += 1
            else:
                self._lose(f"{error.code().name}: {error.details()}")

    async def many(self, n_channels: int, at_a_time: int, n_calls: int) -> None:
        """So many calls that must be answered."""
        self._part = f"{n_channels} x {at_a_time}"
        async with AsyncExitStack() as stack:
            opened = await self.channels(stack, n_channels)
            left = iter(range(n_calls))

            async def one_after_the_other(call: Any) -> None:
                for _ in left:
                    await self.ask(call)

            calls = [channel.unary_unary(_UNARY) for channel in opened]
            await asyncio.gather(*(one_after_the_other(call) for call in calls * at_a_time))

    async def among(self, n_given_up: int) -> None:
        """Calls that are given up, and as many good ones on the same connections."""
        self._part = "given up"
        async with AsyncExitStack() as stack:
            opened = await self.channels(stack, 8)
            left = iter(range(n_given_up))

            async def mixed(call: Any, seed: int) -> None:
                generator = random.Random(seed)
                for _ in left:
                    await asyncio.gather(self.ask(call), self.give_up(call, generator))

            calls = [channel.unary_unary(_UNARY) for channel in opened]
            await asyncio.gather(*(mixed(call, k) for k, call in enumerate(calls * 8)))

    async def stream(self, channel: Any, n_messages: int) -> None:
        """One stream: every message answered, in order."""
        made = channel.stream_stream(_STREAM)(timeout=_LATE_S + n_messages / 100)
        names: asyncio.Queue[bytes] = asyncio.Queue(32)

        async def write() -> None:
            for _ in range(n_messages):
                message, name = self.request()
                await names.put(name)
                await made.write(message)
            await made.done_writing()

        writing = asyncio.ensure_future(write())
        try:
            async for answer in made:
                if names.get_nowait() in answer:
                    self.tally.messages += 1
                else:
                    self._lose("a message out of order")
            await writing
        except grpc.aio.AioRpcError as error:
            self._lose(f"stream: {error.code().name}: {error.details()}")
            writing.cancel()

    async def until_told(self, n_channels: int, at_a_time: int, pid: int) -> None:
        """Calls all the time; those under way when SIGTERM is sent must be answered."""
        is_told = False
        self._part = "SIGTERM"

        async def one_after_the_other(call: Any) -> None:
            while not is_told:
                await self.ask(call)

        async with AsyncExitStack() as stack:
            opened = await self.channels(stack, n_channels)
            calls = [channel.unary_unary(_UNARY) for channel in opened]
            asking = [asyncio.ensure_future(one_after_the_other(one)) for one in calls * at_a_time]
            await asyncio.sleep(0.5)
            is_told = True
            # A call is under way when it has left: the client sends it some turns after it is made,
            # and what has not left when the server says goodbye has nobody to go to.
            for _ in range(_TURNS):
                await asyncio.sleep(0)
            self.tally.under_way = sum(not one.done() for one in asking)
            os.kill(pid, signal.SIGTERM)
            await asyncio.gather(*asking)


async def run(
    client: Client,
    *,
    n_calls: int,
    n_given_up: int,
    n_messages: int = 2000,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    pid: int | None = None,
) -> Tally:
    """All of it.

    Parameters
    ----------
    pid : whom to tell to end, at the end; None: nobody
    """
    async with AsyncExitStack() as stack:
        idle = [one.unary_unary(_UNARY) for one in await client.channels(stack, _IDLE)]
        await asyncio.gather(*(client.ask(call) for call in idle))
        streaming = await client.channels(stack, _STREAMS)
        streams = [asyncio.ensure_future(client.stream(one, n_messages)) for one in streaming]
        for channels, at_a_time in shapes:
            await client.many(channels, at_a_time, n_calls // len(shapes))
        await client.among(n_given_up)
        await asyncio.gather(*streams)
        await asyncio.gather(*(client.ask(call) for call in idle))
        if pid is not None:
            await client.until_told(16, 8, pid)
    return client.tally


def main() -> None:
    """Answer once."""
    parser = argparse.ArgumentParser(description="Whether the carrier zttp loses a call.")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--given-up", type=int, default=2_000)
    parser.add_argument("--carrier", default="zttp")
    parser.add_argument("--no-retries", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        registry = Path(home) / "registry"
        write_registry(registry)
        port, grpc_port = free_port(), free_port()
        command = [str(Path(sys.executable).with_name("driftgate")), "serve", str(registry)]
        command += ["--port", str(port), "--grpc-port", str(grpc_port)]
        command += ["--grpc-carrier", options.carrier]
        with serve(command, port=port, ready_path=READY) as server:
            began = time.monotonic()
            tally = asyncio.run(
                run(
                    Client(f"127.0.0.1:{grpc_port}", has_retries=not options.no_retries),
                    n_calls=options.calls,
                    n_given_up=options.given_up,
                    pid=server.pid,
                )
            )
    took = time.monotonic() - began
    print(f"carrier: {options.carrier}, {took:.0f} s: {tally} (budget 0)")
    if tally.lost:
        raise BenchError("calls were lost")


if __name__ == "__main__":
    main()
