"""Server reflection: tools such as grpcurl ask which services and messages there are.

The two releases of the protocol differ in name only; grpcio's package answers for both.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from grpc_reflection.v1alpha import reflection_pb2 as pb
from grpc_reflection.v1alpha.reflection import ReflectionServicer

from gateway.protocol.protobuf import parsed

NAMES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class Reflection:
    """Answers from the descriptors of the generated stubs."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._servicer: Any = ReflectionServicer(services)

    async def stream(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """ServerReflectionInfo: an answer for each question."""
        async for message in messages:
            question = parsed(pb.ServerReflectionRequest, message)
            for answer in self._servicer.ServerReflectionInfo(iter((question,)), None):
                content: bytes = answer.SerializeToString()
                yield content
