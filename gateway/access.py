"""Who may do what: one function that every front end asks, on the route that was matched.

A key is 32 random bytes, shown once and kept as its SHA-256; a fast hash is right for a secret that
nobody can guess. Scopes do not contain each other: a key for `admin` predicts only if it says so.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

import msgspec

from gateway.config import ServerConfig
from gateway.errors import ForbiddenError, StartError, UnauthenticatedError
from gateway.telemetry import event
from registry import store
from registry.errors import WriteError

Scope = Literal["open", "predict", "monitor", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KeyScope = Literal["predict", "monitor", "admin"]
KEY_SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)
FORMAT = 1

_KEY = re.compile(r"dg_([0-9a-f]{8})_([0-9a-f]{64})", re.ASCII)
_CREDENTIALS_MAX = 256
_NOBODY = "0" * 64
_OF_OTHERS = stat.S_IROTH | stat.S_IWOTH | stat.S_IXOTH | stat.S_IWGRP


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key, without its secret."""

    id: str
    """Eight hexadecimal digits: what logs and revisions call its holder by."""
    sha256: str
    """Of the secret, in hexadecimal."""
    scopes: tuple[KeyScope, ...]
    note: str = ""
    created: float = 0.0
    """Seconds since 1970."""
    expires: float | None = None
    """Seconds since 1970; None: never."""


class KeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file of keys."""

    keys: tuple[Key, ...] = ()
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what the revision log calls its actor."""

    name: str
    """`key:<id>`, `local` (this machine, where no key is asked for), or `anybody`."""


ANYBODY = Caller("anybody")
LOCAL = Caller("local")
_admin: ContextVar[Caller] = ContextVar("admin", default=LOCAL)
Headers = Mapping[bytes, bytes]


class Access:
    """What is asked for by whom; built once, its keys replaced as a whole when the file changes.

    Without keys, this machine may do everything and others what `insecure` or a client certificate
    opens; `admin` beyond loopback always needs a key. With keys, everything but health needs one,
    unless `insecure` opens predictions and monitors.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Read the keys.

        Raises
        ------
        StartError : the file of keys cannot be used; nothing is served without it.
        """
        self._source = config.keys
        self._seen = _signature(self._source)
        self._keys = read(self._source) if self._source else None
        self._open = _opened(config, has_keys=self._keys is not None)

    @property
    def is_admin_open(self) -> bool:
        """Whether nobody has to show a key for anything."""
        return "admin" in self._open

    @property
    def can_admin(self) -> bool:
        """Whether anybody at all may change the server from outside."""
        return self.is_admin_open or self._keys is not None

    def guard(self, scope: Scope, method: str, headers: Headers) -> Caller:
        """The caller of an HTTP request, if it may have what it asks for.

        Parameters
        ----------
        scope : of the route that was matched, never of what a path looks like

        Raises
        ------
        UnauthenticatedError : no key, or none that is known.
        ForbiddenError : a key without this scope, or a web page of another origin.
        """
        if b"origin" in headers or b"sec-fetch-site" in headers:
            refuse_pages(scope, method, headers)
        return self.authorise(scope, headers.get(b"authorization"))

    def authorise(self, scope: Scope, credentials: bytes | None) -> Caller:
        """The caller who shows these credentials, if it may have what it asks for; as `guard`.

        Parameters
        ----------
        credentials : `Bearer dg_...`, as in the header or the metadata `authorization`
        """
        if scope == "admin":
            caller = self._caller(scope, credentials)
            _admin.set(caller)
            return caller
        return (
            ANYBODY
            if credentials is None and scope in self._open
            else (self._caller(scope, credentials))
        )

    def _caller(self, scope: Scope, credentials: bytes | None) -> Caller:
        is_open = scope in self._open
        key = self._find(credentials) if self._keys else None
        if key is not None and (is_open or scope in key.scopes):
            return Caller(f"key:{key.id}")
        if is_open:
            return LOCAL if scope == "admin" else ANYBODY
        if self._keys is None:
            raise ForbiddenError("admin calls are closed beyond loopback: no key protects them")
        if key is None:
            raise UnauthenticatedError(scope, was_given=credentials is not None)
        has = ", ".join(key.scopes) or "none"
        raise ForbiddenError(f"key {key.id} has no scope {scope!r}; it has: {has}")

    def refresh(self) -> None:
        """Read the keys again if their file has changed; a file that is wrong changes nothing."""
        seen = _signature(self._source)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = read(self._source)
        except StartError as error:
            event("keys_not_read", logging.ERROR, reason=str(error))
            return
        event("keys_read", keys=len(self._keys))

    def _find(self, credentials: bytes | None) -> Key | None:
        """The key of these credentials, in a time that does not tell how much of it is right."""
        text = (credentials or b"")[:_CREDENTIALS_MAX].decode("latin-1")
        kind, _, secret = text.partition(" ")
        parts = _KEY.fullmatch(secret.strip())
        if kind.lower() != "bearer" or parts is None:
            return None
        key = (self._keys or {}).get(parts[1])
        digest = hashlib.sha256(parts[2].encode()).hexdigest()
        is_it = hmac.compare_digest(digest, _NOBODY if key is None else key.sha256)
        if not is_it or key is None or (key.expires is not None and key.expires <= time.time()):
            return None
        return key


def admin() -> Caller:
    """Who makes the admin call that this task answers, by whatever front end it came."""
    return _admin.get()


def refuse_pages(scope: Scope, method: str, headers: Headers) -> None:
    """Refuse what a web page of another origin asks for, other than to look.

    No cookie is ever read here, so a page has no rights of its visitor to borrow; where no key is
    asked for, the visitor's place on this machine would be one.

    Raises
    ------
    ForbiddenError
    """
    site, origin = headers.get(b"sec-fetch-site", b"none"), headers.get(b"origin")
    if scope == "admin" and (origin is not None or site != b"none"):
        raise ForbiddenError("admin calls are not taken from web pages")
    if method in {"GET", "HEAD"}:
        return
    host = headers.get(b"host", b"").decode("latin-1").lower()
    is_own = origin is None or urlsplit(origin.decode("latin-1")).netloc.lower() == host
    if site not in {b"none", b"same-origin"} or not is_own:
        raise ForbiddenError("not taken from web pages of another origin")


def read(source: str) -> dict[str, Key]:
    """The keys of a file, or of JSON given instead of a file's name, by id.

    Raises
    ------
    StartError : not there, not readable, readable by others, or not a file of keys.
    """
    if source.lstrip().startswith("{"):
        return _parsed(source.encode(), "keys")
    file = Path(source)
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read()
    except OSError as error:
        raise StartError(f"keys {file.name!r}: {_reason(error)}") from None
    if mode & _OF_OTHERS:
        raise StartError(
            f"keys {file.name!r}: others may read or change it; chmod 600 (or 640) and start again"
        )
    return _parsed(content, f"keys {file.name!r}")


def add(
    file: Path, scopes: Iterable[KeyScope], *, note: str = "", expires: float | None = None
) -> tuple[Key, str]:
    """Make a key and add it to a file, which is made if it is not there; the key and its text.

    The text is told here and nowhere else.

    Raises
    ------
    StartError : the file is there and cannot be used, or cannot be written.
    """
    keys = read(str(file)) if file.exists() else {}
    key_id, secret = secrets.token_hex(4), secrets.token_hex(32)
    while key_id in keys:
        key_id = secrets.token_hex(4)
    key = Key(
        id=key_id,
        sha256=hashlib.sha256(secret.encode()).hexdigest(),
        scopes=tuple(sorted(set(scopes))),
        note=note,
        created=float(int(time.time())),
        expires=expires,
    )
    _write(file, (*keys.values(), key))
    return key, f"dg_{key_id}_{secret}"


def revoke(file: Path, key_id: str) -> Key:
    """Take a key out of a file; servers that read it notice within a second or two.

    Raises
    ------
    StartError : no such key there, or the file cannot be used.
    """
    keys = read(str(file))
    if (key := keys.pop(key_id, None)) is None:
        have = ", ".join(keys) or "none"
        raise StartError(f"no key {key_id[:32]!r} in {file.name!r}; there are: {have}")
    _write(file, keys.values())
    return key


def _write(file: Path, keys: Iterable[Key]) -> None:
    content = msgspec.json.format(msgspec.json.encode(KeyFile(keys=tuple(keys)))) + b"\n"
    try:
        store.replace(file, content, mode=0o600)
    except WriteError as error:
        raise StartError(f"keys {error}") from None


def _parsed(content: bytes, where: str) -> dict[str, Key]:
    try:
        held = msgspec.json.decode(content, type=KeyFile)
    except msgspec.DecodeError as error:
        raise StartError(f"{where}: not a file of keys: {error}") from None
    if held.format != FORMAT:
        raise StartError(f"{where}: format {held.format}, and this release reads {FORMAT}")
    return {key.id: key for key in held.keys}


def _opened(config: ServerConfig, *, has_keys: bool) -> frozenset[str]:
    """Scopes that need no key."""
    opened = {"open"}
    if config.insecure:
        opened |= {"predict", "monitor"}
    if not has_keys:
        if config.is_local:
            opened |= {"predict", "monitor", "admin"}
        elif config.tls_client_ca:
            opened |= {"predict", "monitor"}
    return frozenset(opened)


def _signature(source: str) -> tuple[int, int, int] | None:
    """What changes when a file does; None where there is none."""
    if not source or source.lstrip().startswith("{"):
        return None
    try:
        about = Path(source).stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size


def _reason(error: OSError) -> str:
    return (error.strerror or "cannot be read").lower()
