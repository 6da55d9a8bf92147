"""Calls out of driftgate: of commands to a server, and of alarms to whoever is told.

Only this file and the client import httpx. A webhook goes where a file of settings says, so it
could be made to knock at doors inside the network: hosts must be listed, the address is looked up
once, judged, and connected to; no redirect is followed.
"""

import asyncio
import ipaddress
import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from gateway.errors import ConflictError, GatewayError, StartError

TIMEOUT_S = 10.0


class Connection:
    """One server, its connections kept open from call to call. For one thread at a time."""

    def __init__(
        self, server: str, *, key: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Nothing is opened before the first call.

        Parameters
        ----------
        key : shown with every call; None: `$DRIFTGATE_KEY`, if there is one
        """
        self._server = server.rstrip("/")
        key = os.environ.get("DRIFTGATE_KEY") if key is None else key
        headers = {"authorization": f"Bearer {key}"} if key else None
        self._client = httpx.Client(timeout=timeout_s, trust_env=False, headers=headers)

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
        headers: dict[str, str] | None = None,
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
        media, sent = content or ("", None)
        headers = {**(headers or {}), **({"content-type": media} if media else {})}
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
            sentence = str(error or f"the server answered {answer.status_code}")
            kind = ConflictError if answer.status_code in {409, 412} else GatewayError
            raise kind(sentence)
        return value


def call(
    server: str, method: str, path: str, *, body: object = None, query: dict[str, str] | None = None
) -> Any:
    """The JSON answer of a server, over a connection of its own; raises as `Connection.call`."""
    with Connection(server) as connection:
        return connection.call(method, path, body=body, query=query)


# -- webhooks

DELIVERY_S = 5.0
DELIVERY_BYTES_MAX = 64 * 1024
"""Of a request, and of what is read of its answer."""
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class DeliveryError(Exception):
    """A webhook was not taken."""

    def __init__(
        self, reason: str, *, is_final: bool = False, retry_after_s: float | None = None
    ) -> None:
        self.is_final = is_final
        """Whether trying again is of no use."""
        self.retry_after_s = retry_after_s
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Allowed:
    """Where webhooks may go: names of hosts, and networks."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[str]) -> Self:
        """From names, addresses and networks as they are written."""
        hosts: set[str] = set()
        networks: list[Network] = []
        for entry in entries:
            try:
                networks.append(ipaddress.ip_network(entry))
            except ValueError:
                hosts.add(entry.lower().rstrip("."))
        return cls(frozenset(hosts), tuple(networks))

    def names(self, host: str) -> bool:
        """Whether this host is listed: a name by name, an address by its network."""
        address = _address(host)
        if address is not None:
            return self._lists(address)
        return host.lower().rstrip(".") in self.hosts

    def takes(self, address: Address) -> bool:
        """Whether this address may be connected to: a public one, or one whose network is listed.

        A name that is listed does not open a network: it could be made to point anywhere.
        """
        return self._lists(address) or is_public(address)

    def _lists(self, address: Address) -> bool:
        return any(_inner(address) in network or address in network for network in self.networks)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet at large, also the one that it wraps."""
    inner = _inner(address)
    return inner.is_global and not inner.is_multicast and not inner.is_unspecified


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


async def deliver(
    url: str,
    content: bytes,
    headers: Mapping[str, str],
    allowed: Allowed,
    *,
    done: frozenset[int] = frozenset(),
    timeout_s: float = DELIVERY_S,
) -> int:
    """POST `content`; the status of an answer that says it was taken: 2xx, or one of `done`.

    Raises
    ------
    DeliveryError : not allowed, not reached, too slow, or not taken.
    """
    if len(content) > DELIVERY_BYTES_MAX:
        raise DeliveryError(f"more than {DELIVERY_BYTES_MAX} bytes", is_final=True)
    try:
        # One bound on all of it: name, connection, and an answer that comes byte by byte.
        async with asyncio.timeout(timeout_s):
            status, retry_after = await _post(url, content, headers, allowed)
    except TimeoutError:
        raise DeliveryError(f"no answer within {timeout_s:g} s") from None
    except httpx.HTTPError as error:
        raise DeliveryError(f"not reached: {type(error).__name__}") from None
    if 200 <= status < 300 or status in done:
        return status
    if 300 <= status < 400:
        raise DeliveryError(f"answered {status}: redirects are not followed", is_final=True)
    raise DeliveryError(
        f"answered {status}", is_final=status not in _AGAIN, retry_after_s=retry_after
    )


async def _post(
    url: str, content: bytes, headers: Mapping[str, str], allowed: Allowed
) -> tuple[int, float | None]:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in {"http", "https"} or not allowed.names(host):
        raise DeliveryError(f"host {host!r} is not allowed", is_final=True)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = await _resolve(host, port, allowed)
    if parts.scheme == "http" and not _inner(address).is_loopback:
        raise DeliveryError("beyond loopback only https", is_final=True)
    pinned = f"[{address}]" if address.version == 6 else str(address)
    path = parts.path or "/"
    target = f"{parts.scheme}://{pinned}:{port}{path}" + (f"?{parts.query}" if parts.query else "")
    sent = {**headers, "host": parts.netloc.rpartition("@")[2]}
    # The certificate must be that of the name, although the connection goes to the address.
    extensions = {"sni_hostname": host}
    async with (
        httpx.AsyncClient(timeout=DELIVERY_S, trust_env=False, follow_redirects=False) as client,
        client.stream(
            "POST", target, content=content, headers=sent, extensions=extensions
        ) as answer,
    ):
        n_bytes = 0
        async for chunk in answer.aiter_raw():
            n_bytes += len(chunk)
            if n_bytes > DELIVERY_BYTES_MAX:
                break  # Its status is all that is asked of it.
        return answer.status_code, _seconds(answer.headers.get("retry-after"))


async def _resolve(host: str, port: int, allowed: Allowed) -> Address:
    """The one address that is connected to."""
    if (literal := _address(host)) is not None:
        found = [literal]
    else:
        loop = asyncio.get_running_loop()
        try:
            infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise DeliveryError(f"host {host!r} has no address") from None
        found = [one for info in infos if (one := _address(str(info[4][0]))) is not None]
    for address in found:
        if allowed.takes(address):
            return address
    raise DeliveryError(
        f"host {host!r} has an address inside the network; list that network in allow to mean it",
        is_final=True,
    )


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() and len(text) < 6 else None
