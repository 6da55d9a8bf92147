"""`grpc.health.v1.Health`, as load balancers and Kubernetes ask it: bytes in, bytes out."""

import asyncio
from collections.abc import AsyncGenerator

from grpc_health.v1 import health_pb2 as pb

from gateway.errors import NotFoundError, shown
from gateway.prediction import DataPlane
from gateway.protocol.protobuf import parsed

NAME = pb.DESCRIPTOR.services_by_name["Health"].full_name
_LOOK_EVERY_S = 0.25


class Health:
    """The server as a whole (the empty name) and each service that it carries."""

    def __init__(self, plane: DataPlane, services: tuple[str, ...]) -> None:
        self._plane = plane
        self._names = frozenset(("", *services))
        self._closing = asyncio.Event()

    async def check(self, message: bytes) -> bytes:
        """The status now; NotFoundError for a service that is not here."""
        name = parsed(pb.HealthCheckRequest, message).service
        if name not in self._names:
            raise NotFoundError(f"no service {shown(name)} here")
        return _answer(self._status(name))

    async def watch(self, message: bytes) -> AsyncGenerator[bytes, None]:
        """The status now, and again whenever it changes; ends with the server."""
        name = parsed(pb.HealthCheckRequest, message).service
        said = None
        while True:
            if (status := self._status(name)) != said:
                said = status
                yield _answer(status)
            if self._closing.is_set():
                return
            try:
                await asyncio.wait_for(self._closing.wait(), _LOOK_EVERY_S)
            except TimeoutError:
                continue

    def close(self) -> None:
        """Say that nothing is served any more, and end all watches."""
        self._closing.set()

    def _status(self, name: str) -> int:
        status = pb.HealthCheckResponse
        if name not in self._names:
            return int(status.SERVICE_UNKNOWN)
        is_serving = self._plane.is_ready and not self._closing.is_set()
        return int(status.SERVING if is_serving else status.NOT_SERVING)


def _answer(status: int) -> bytes:
    content: bytes = pb.HealthCheckResponse(status=status).SerializeToString()
    return content
