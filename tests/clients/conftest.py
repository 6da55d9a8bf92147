"""Addresses of the server that a client is shown; set by `python -m tests.clients`."""

import os

import pytest


@pytest.fixture(scope="session")
def url() -> str:
    """`http://host:port`."""
    return os.environ["DRIFTGATE_URL"]


@pytest.fixture(scope="session")
def address(url: str) -> str:
    """`host:port`, as Triton's client wants it."""
    return url.removeprefix("http://")


@pytest.fixture(scope="session")
def grpc_address() -> str:
    """`host:port` of the gRPC listener."""
    given = os.environ["DRIFTGATE_GRPC"]
    if not given:
        pytest.fail("the server's `ready` event names no grpc_url")
    return given.rpartition("//")[2]
