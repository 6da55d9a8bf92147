"""`inference.GRPCInferenceService`: bytes in, bytes out. Knows messages, and no gRPC library."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict

from gateway.access import Access, Scope
from gateway.endpoints import about, repository
from gateway.endpoints.revisions import Door
from gateway.errors import GatewayError, NotReadyError, UnsupportedError
from gateway.prediction import DataPlane, Head, infer
from gateway.protocol import metadata
from gateway.protocol.protobuf import Protobuf, StreamProtobuf, parsed, values
from gateway.protocol.stubs import inference_pb2 as pb
from gateway.protocol.v2_json import NO_SHARED_MEMORY
from gateway.router import Headers, Variant, wanted_of
from gateway.telemetry import event

NAME = "inference.GRPCInferenceService"
_IN_FLIGHT_MAX = 16
"""Messages of one stream that may be unanswered; the next is not read before."""


@dataclass(frozen=True, slots=True)
class Call:
    """One unary call: who may make it, and what answers."""

    scope: Scope
    answer: Callable[[bytes], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What all messages of one stream have in common."""

    headers: Headers
    """For their routes."""
    caller: str
    """Whose rates they count for."""
    request_id: bytes
    """Message n is called `id.n`."""


class Service:
    """All calls but the two that predict, by name; those two as methods."""

    def __init__(self, plane: DataPlane, access: Access) -> None:
        self._plane = plane
        self._door = Door(plane.config, plane)
        self._access = access
        self._json_bytes_max = plane.config.limits.json_bytes_max
        self._codec = Protobuf(self._json_bytes_max)
        self._readers: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self.calls: Mapping[str, Call] = self._calls()

    async def infer(self, message: bytes, head: Head) -> bytes:
        """ModelInfer; cancel it when nobody waits for the answer any more.

        Parameters
        ----------
        head : what came beside the message; its decision is set when a variant has been picked

        Raises
        ------
        GatewayError : what the client is told instead of an answer.
        """
        start = time.perf_counter()
        return (await infer(self._plane, self._codec, head, message, start)).body

    async def stream(
        self,
        messages: AsyncIterator[bytes],
        timeout_s: Callable[[], float | None],
        asked: Asked,
    ) -> AsyncGenerator[bytes, None]:
        """ModelStreamInfer: an answer for each message, in order, errors among them.

        Parameters
        ----------
        timeout_s : time left of the whole stream
        asked : what all its messages have in common

        Raises
        ------
        NotReadyError : the server ends; everything that was read has been answered.
        """
        answers: deque[asyncio.Task[bytes]] = deque()
        room = asyncio.Semaphore(_IN_FLIGHT_MAX)
        news = asyncio.Event()

        async def read() -> None:
            number = 0
            async for message in messages:
                name = b"%s.%d" % (asked.request_id, number)
                one = self._one(message, timeout_s(), asked, name)
                answers.append(asyncio.ensure_future(one))
                number += 1
                news.set()
                await room.acquire()

        await room.acquire()
        reader = asyncio.ensure_future(read())
        reader.add_done_callback(lambda _: news.set())
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        if self._is_closing:
            reader.cancel()
        try:
            while True:
                while not answers and not reader.done():
                    news.clear()
                    await news.wait()
                if not answers:
                    break
                yield await answers[0]
                answers.popleft()
                room.release()
        finally:
            reader.cancel()
            for answer in answers:
                answer.cancel()
        if reader.cancelled():
            raise NotReadyError("the server is stopping; connect again")
        reader.result()

    async def close(self) -> None:
        """Read no more from streams; they end when what was read is answered."""
        self._is_closing = True
        for reader in list(self._readers):
            reader.cancel()

    async def _one(
        self, message: bytes, timeout_s: float | None, asked: Asked, name: bytes
    ) -> bytes:
        start = time.perf_counter()
        codec = StreamProtobuf(self._json_bytes_max)
        try:
            head = Head(None, None, timeout_s, None, name, asked.headers, asked.caller)
            head.wanted = wanted_of(asked.headers)
            return (await infer(self._plane, codec, head, message, start)).body
        except GatewayError as error:
            return codec.encode_error(error)
        except Exception:  # noqa: BLE001  no trace may reach a client
            event("request_failed", logging.ERROR, path="ModelStreamInfer", exc=True)
            return codec.encode_error(GatewayError("internal error; the server's log says more"))

    def _calls(self) -> dict[str, Call]:
        table: dict[str, tuple[Scope, Any, Callable[[Any], Awaitable[Any]]]] = {
            "ServerLive": ("open", pb.ServerLiveRequest, self._server_live),
            "ServerReady": ("open", pb.ServerReadyRequest, self._server_ready),
            "ModelReady": ("predict", pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": ("predict", pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": ("predict", pb.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": ("monitor", pb.ModelConfigRequest, self._model_config),
            "ModelStatistics": ("monitor", pb.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": ("predict", pb.RepositoryIndexRequest, self._index),
            "RepositoryModelLoad": ("admin", pb.RepositoryModelLoadRequest, self._load),
            "RepositoryModelUnload": ("admin", pb.RepositoryModelUnloadRequest, self._unload),
            "SystemSharedMemoryStatus": (
                "predict", pb.SystemSharedMemoryStatusRequest, _system_status,
            ),
            "SystemSharedMemoryRegister": (
                "predict", pb.SystemSharedMemoryRegisterRequest, _no_shared_memory,
            ),
            "SystemSharedMemoryUnregister": (
                "predict", pb.SystemSharedMemoryUnregisterRequest, _system_unregister,
            ),
            "CudaSharedMemoryStatus": ("predict", pb.CudaSharedMemoryStatusRequest, _cuda_status),
            "CudaSharedMemoryRegister": (
                "predict", pb.CudaSharedMemoryRegisterRequest, _no_shared_memory,
            ),
            "CudaSharedMemoryUnregister": (
                "predict", pb.CudaSharedMemoryUnregisterRequest, _cuda_unregister,
            ),
            "TraceSetting": ("monitor", pb.TraceSettingRequest, _trace),
            "LogSettings": ("monitor", pb.LogSettingsRequest, _log),
        }  # fmt: skip
        return {
            name: Call(scope, _bytes_call(kind, answer))
            for name, (scope, kind, answer) in table.items()
        }

    async def _server_live(self, _: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._plane.is_ready)

    async def _model_ready(self, request: Any) -> Any:
        # A version that could be opened on demand is ready: the first call opens it.
        self._plane.table.model(request.name).pick(request.version or None)
        return pb.ModelReadyResponse(ready=True)

    async def _server_metadata(self, _: Any) -> Any:
        return ParseDict(
            metadata.server(can_admin=self._access.can_admin), pb.ServerMetadataResponse()
        )

    async def _model_metadata(self, request: Any) -> Any:
        variant = await self._variant(request)
        versions = self._plane.table.model(variant.model).versions
        about = metadata.model(variant.model, versions, variant.signature)
        return ParseDict(about, pb.ModelMetadataResponse())

    async def _model_config(self, request: Any) -> Any:
        config = about.configuration(self._plane, await self._variant(request))
        answer = pb.ModelConfigResponse()
        ParseDict(config, answer.config, ignore_unknown_fields=True)
        return answer

    async def _model_statistics(self, request: Any) -> Any:
        found = await about.statistics(self._plane, request.name or None, request.version or None)
        return ParseDict(found, pb.ModelStatisticsResponse())

    async def _index(self, request: Any) -> Any:
        models = repository.index(self._plane, only_ready=request.ready)
        return ParseDict({"models": models}, pb.RepositoryIndexResponse())

    async def _load(self, request: Any) -> Any:
        parameters = values(request.parameters)
        await repository.load(self._plane, self._door, request.model_name, parameters, "grpc")
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any) -> Any:
        parameters = values(request.parameters)
        await repository.unload(self._plane, self._door, request.model_name, parameters, "grpc")
        return pb.RepositoryModelUnloadResponse()

    async def _variant(self, request: Any) -> Variant:
        """The version that a request names, opened if it is not."""
        model = self._plane.table.model(request.name)
        picked = model.pick(request.version or None)
        if isinstance(picked, Variant):
            return picked
        if self._plane.open_version is None:
            raise NotReadyError(f"model {model.name!r} version {picked} is not open")
        return await self._plane.open_version(model.name, picked)


def _bytes_call(
    kind: Any, answer: Callable[[Any], Awaitable[Any]]
) -> Callable[[bytes], Awaitable[bytes]]:
    async def call(message: bytes) -> bytes:
        content: bytes = (await answer(parsed(kind, message))).SerializeToString()
        return content

    return call


# What clients ask before they decide; perf_analyzer first drops every region, also those of CUDA.


async def _system_status(_: Any) -> Any:
    return pb.SystemSharedMemoryStatusResponse()


async def _system_unregister(_: Any) -> Any:
    return pb.SystemSharedMemoryUnregisterResponse()


async def _cuda_status(_: Any) -> Any:
    return pb.CudaSharedMemoryStatusResponse()


async def _cuda_unregister(_: Any) -> Any:
    return pb.CudaSharedMemoryUnregisterResponse()


async def _no_shared_memory(_: Any) -> Any:
    raise UnsupportedError(NO_SHARED_MEMORY)


async def _trace(request: Any) -> Any:
    if request.settings:
        raise UnsupportedError("there are no trace settings here")
    return pb.TraceSettingResponse()


async def _log(request: Any) -> Any:
    if request.settings:
        raise UnsupportedError("the log is set at start, by log.level and log.format")
    return pb.LogSettingsResponse()
