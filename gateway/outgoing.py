"""The only import of httpx: calls to a running driftgate server."""

from typing import Any

import httpx

from gateway.errors import GatewayError, StartError

TIMEOUT_S = 10.0


def call(
    server: str, method: str, path: str, *, body: object = None, query: dict[str, str] | None = None
) -> Any:
    """The JSON answer of a server.

    Raises
    ------
    StartError : nobody answers at that address.
    GatewayError : the server's own sentence.
    """
    try:
        answer = httpx.request(
            method,
            server.rstrip("/") + path,
            json=body,
            params=query,
            timeout=TIMEOUT_S,
            trust_env=False,
        )
        value = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL):
        raise StartError(
            f"no driftgate answers at {server}; start one (driftgate serve), or name it: --server"
        ) from None
    except ValueError:
        raise StartError(f"{server} answers, but is no driftgate server") from None
    if answer.is_error:
        error = value.get("error") if isinstance(value, dict) else None
        raise GatewayError(str(error or f"the server answered {answer.status_code}"))
    return value
