"""Calls of commands to a running driftgate server. Only this file and the client import httpx."""

import json
from types import TracebackType
from typing import Any, Self

import httpx

from gateway.errors import GatewayError, StartError

TIMEOUT_S = 10.0


class Connection:
    """One server, its connections kept open from call to call. For one thread at a time."""

    def __init__(self, server: str) -> None:
        self._server = server.rstrip("/")
        self._client = httpx.Client(timeout=TIMEOUT_S, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        query: dict[str, str] | None = None,
        content: tuple[str, bytes] | None = None,
    ) -> Any:
        """The JSON answer of the server; a NaN in `body` is sent as the server reads it: bare.

        Parameters
        ----------
        content : instead of `body`, what is no JSON: its type and bytes

        Raises
        ------
        StartError : nobody answers at that address.
        GatewayError : the server's own sentence.
        """
        if content is None and body is not None:
            content = ("application/json", json.dumps(body, separators=(",", ":")).encode())
        kind, sent = content or ("", None)
        headers = {"content-type": kind} if kind else None
        try:
            answer = self._client.request(
                method, self._server + path, content=sent, params=query, headers=headers
            )
            value = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL):
            raise StartError(
                f"no driftgate answers at {self._server};"
                " start one (driftgate serve), or name it: --server"
            ) from None
        except ValueError:
            raise StartError(f"{self._server} answers, but is no driftgate server") from None
        if answer.is_error:
            error = value.get("error") if isinstance(value, dict) else None
            raise GatewayError(str(error or f"the server answered {answer.status_code}"))
        return value


def call(
    server: str, method: str, path: str, *, body: object = None, query: dict[str, str] | None = None
) -> Any:
    """The JSON answer of a server, over a connection of its own; raises as `Connection.call`."""
    with Connection(server) as connection:
        return connection.call(method, path, body=body, query=query)
