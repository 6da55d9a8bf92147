"""Keys and scopes: what is let through, what is refused, and what a file of keys gives away."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import access
from gateway.access import ANYBODY, LOCAL, Access
from gateway.config import ServerConfig, load
from gateway.endpoints.route import Endpoint, routes
from gateway.errors import ConfigError, ForbiddenError, StartError, UnauthenticatedError

Headers = dict[bytes, bytes]


def bearer(text: str) -> Headers:
    return {b"authorization": f"Bearer {text}".encode()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def of(file: Path | str, **settings: Any) -> Access:
    return Access(ServerConfig(keys=str(file), **settings))


def test_a_key_opens_its_scopes_and_no_other(file: Path) -> None:
    """Admin does not imply predict: no scope contains another."""
    _, text = access.add(file, ["admin"])
    guard = of(file).guard

    assert guard("admin", "POST", bearer(text)).name.startswith("key:")
    for scope in ("predict", "monitor"):
        with pytest.raises(ForbiddenError, match=f"no scope '{scope}'; it has: admin"):
            guard(scope, "POST", bearer(text))
    assert guard("open", "GET", {}) == ANYBODY


@given(st.binary(max_size=300))
def test_what_is_no_key_is_never_let_through(credentials: bytes) -> None:
    """Any bytes at all: 401, and nothing else."""
    digest = "0" * 64
    source = json.dumps(
        {"format": 1, "keys": [{"id": "0" * 8, "sha256": digest, "scopes": ["predict"]}]}
    )
    with pytest.raises(UnauthenticatedError):
        Access(ServerConfig(keys=source)).authorise("predict", credentials)


def test_every_changed_digit_of_a_key_makes_it_wrong(file: Path) -> None:
    """One digit after the other."""
    _, text = access.add(file, ["predict"])
    asked = of(file)

    for k, digit in enumerate(text):
        changed = text[:k] + ("0" if digit != "0" else "1") + text[k + 1 :]
        with pytest.raises(UnauthenticatedError):
            asked.guard("predict", "POST", bearer(changed))
    asked.guard("predict", "POST", bearer(text))


def test_the_file_holds_no_secret(file: Path) -> None:
    """Neither the key nor any long part of it; and only its owner may read it."""
    _, text = access.add(file, ["predict"], note="checkout")
    secret = text.rpartition("_")[2]

    content = file.read_text()
    assert len(secret) == 64
    assert all(secret[k : k + 12] not in content for k in range(52))
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o620, 0o666])
def test_a_file_that_others_may_read_is_refused(file: Path, mode: int) -> None:
    """Or that a group may change; 640 is what a mounted secret has, and is taken."""
    access.add(file, ["predict"])
    file.chmod(mode)

    with pytest.raises(StartError, match="others may read or change it"):
        of(file)
    file.chmod(0o640)
    of(file)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"keys": 3}', '{"keys": [{"id": "a"}]}', '{"format": 2}', '{"kyes": []}',
     '{"keys": [{"id": "a", "sha256": "b", "scopes": ["root"]}]}'],
)  # fmt: skip
def test_a_file_that_is_none_is_refused_with_its_reason(file: Path, content: str) -> None:
    """At the start; nothing is served without the keys that were asked for."""
    file.write_text(content)
    file.chmod(0o600)

    with pytest.raises(StartError, match=r"keys 'keys\.json'"):
        of(file)


def test_an_expired_key_is_no_key(file: Path) -> None:
    """By the wall clock, which is what its maker meant."""
    _, over = access.add(file, ["predict"], expires=time.time() - 1)
    _, good = access.add(file, ["predict"], expires=time.time() + 1000)
    asked = of(file)

    asked.guard("predict", "POST", bearer(good))
    with pytest.raises(UnauthenticatedError, match="not known, or not any more"):
        asked.guard("predict", "POST", bearer(over))


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(file: Path) -> None:
    """Rotation by overlap: the new key works before the old one is revoked."""
    old, old_text = access.add(file, ["predict"])
    asked = of(file)
    _, new_text = access.add(file, ["predict"])

    asked.refresh()
    asked.guard("predict", "POST", bearer(old_text))
    asked.guard("predict", "POST", bearer(new_text))
    access.revoke(file, old.id)
    asked.refresh()
    with pytest.raises(UnauthenticatedError):
        asked.guard("predict", "POST", bearer(old_text))

    file.write_text("{")
    asked.refresh()
    file.unlink()
    asked.refresh()
    asked.guard("predict", "POST", bearer(new_text))


def test_keys_may_be_given_as_json_instead_of_a_file(file: Path) -> None:
    """For containers, whose secrets come by the environment."""
    _, text = access.add(file, ["predict"])

    of(file.read_text()).guard("predict", "POST", bearer(text))


@pytest.mark.parametrize(
    ("settings", "opened"),
    [
        ({}, {"predict", "monitor", "admin"}),
        ({"host": "10.0.0.1", "insecure": True}, {"predict", "monitor"}),
        ({"keys": '{"keys": []}'}, set()),
        ({"keys": '{"keys": []}', "insecure": True, "host": "0.0.0.0"}, {"predict", "monitor"}),
    ],
)
def test_what_is_open_depends_on_keys_and_place(settings: dict[str, Any], opened: set[str]) -> None:
    """Health is open everywhere; on loopback without keys everything is."""
    asked = Access(ServerConfig(**settings))

    asked.guard("open", "GET", {})
    for scope in access.KEY_SCOPES:
        if scope in opened:
            assert asked.guard(scope, "POST", {}) in {LOCAL, ANYBODY}
        else:
            with pytest.raises((UnauthenticatedError, ForbiddenError)):
                asked.guard(scope, "POST", {})


def test_beyond_loopback_somebody_must_be_asked_for_something() -> None:
    """Keys, or a certificate, or the word for neither."""
    with pytest.raises(ConfigError, match="give --keys"):
        load({"host": "0.0.0.0"}, environ={})
    load({"host": "0.0.0.0", "insecure": True}, environ={})
    load({"host": "0.0.0.0", "keys": "keys.json"}, environ={})


def test_a_route_without_a_scope_does_not_start() -> None:
    """Nothing is served that nobody guards."""

    async def answer(_: Any) -> Any:
        raise AssertionError

    wrong: Any = Endpoint("GET", "/x", "anybody", answer, "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no scope 'anybody'"):
        routes([wrong], Access(ServerConfig()))


@pytest.mark.parametrize(
    ("scope", "method", "headers", "is_let_through"),
    [
        ("predict", "POST", {b"origin": b"http://evil.example", b"host": b"127.0.0.1:8000"}, False),
        ("predict", "POST", {b"origin": b"null", b"host": b"127.0.0.1:8000"}, False),
        ("predict", "POST", {b"sec-fetch-site": b"cross-site"}, False),
        ("predict", "POST", {b"sec-fetch-site": b"same-site"}, False),
        ("predict", "DELETE", {b"sec-fetch-site": b"cross-site"}, False),
        ("predict", "POST", {b"origin": b"http://127.0.0.1:80", b"host": b"127.0.0.1:8000"}, False),
        ("predict", "POST", {b"origin": b"http://127.0.0.1:8000", b"host": b"127.0.0.1:8000",
                             b"sec-fetch-site": b"same-origin"}, True),
        ("monitor", "GET", {b"sec-fetch-site": b"cross-site"}, True),
        ("admin", "GET", {b"sec-fetch-site": b"same-origin"}, False),
        ("admin", "POST", {b"origin": b"http://127.0.0.1:8000", b"host": b"127.0.0.1:8000"}, False),
        ("admin", "POST", {b"sec-fetch-site": b"none"}, True),
    ],
)  # fmt: skip
def test_pages_may_look_and_not_touch(
    scope: Any, method: str, headers: Headers, is_let_through: bool
) -> None:
    """Where no key is asked for, the browser's own words decide."""
    asked = Access(ServerConfig())
    if is_let_through:
        asked.guard(scope, method, headers)
    else:
        with pytest.raises(ForbiddenError, match="web pages"):
            asked.guard(scope, method, headers)
