"""Who is told of alarms: a file of targets, and the hosts that may be called at all."""

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
import yaml

from gateway.alarms import presets
from gateway.errors import ConfigError, nearest
from gateway.outgoing import Allowed

On = Literal["opened", "passed", "acknowledged", "accepted"]
About = Literal["inputs", "labels"]


class Secret:
    """Text that no log, error or page shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "***"


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One receiver of alarms, as it is written in the file."""

    name: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    url: str
    preset: str = "cloudevents"
    options: dict[str, str] = {}
    """What the preset asks for."""
    models: tuple[str, ...] = ()
    """Only alarms of these; none: of all."""
    about: tuple[About, ...] = ()
    """Only alarms about these: `labels` are answers that got worse; none: about anything."""
    on: tuple[On, ...] = ("opened",)
    secret_file: str = ""
    """Signs the body."""
    token_file: str = ""
    """Goes as `Authorization: Bearer`."""

    @property
    def host(self) -> str:
        """The host of its URL."""
        return urlsplit(self.url).hostname or ""

    def wants(self, kind: str, model: str, about: str) -> bool:
        """Whether it is told of such an event of such a model."""
        return (
            kind in self.on
            and (not self.models or model in self.models)
            and (not self.about or about in self.about)
        )

    def secret(self) -> Secret | None:
        """What signs; read each time, so that it can be changed while the server runs."""
        return _read_secret(self.secret_file)

    def token(self) -> Secret | None:
        """What it is let in by."""
        return _read_secret(self.token_file)


class Targets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    targets: tuple[Target, ...] = ()
    allow: tuple[str, ...] = ()
    """Hosts, addresses and networks that may be called."""
    name: str = "driftgate"
    """Of this installation, in what is told."""
    link: str = ""
    """URL that people and programs reach it by, in what is told."""

    @property
    def allowed(self) -> Allowed:
        """The list of hosts in a form that can be asked."""
        return Allowed.of(self.allow)


def load(file: Path) -> Targets:
    """The targets of a file.

    Raises
    ------
    ConfigError : every problem of the file.
    """
    try:
        found = msgspec.convert(
            yaml.safe_load(file.read_text(encoding="utf-8")) or {}, Targets, strict=True
        )
    except FileNotFoundError:
        raise ConfigError(f"alarms.targets: {file.name}: no such file") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"alarms.targets: {file.name}: cannot be read as text") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = str(error) if isinstance(error, msgspec.ValidationError) else "not YAML"
        raise ConfigError(f"alarms.targets: {file.name}: {text[:1].lower()}{text[1:]}") from None
    if problems := [f"alarms.targets: {file.name}: {problem}" for problem in _problems(found)]:
        raise ConfigError(*problems)
    return found


def _problems(found: Targets) -> Iterator[str]:
    names = [target.name for target in found.targets]
    for name in {name for name in names if names.count(name) > 1}:
        yield f"target {name!r} is there twice"
    for entry in found.allow:
        if "/" in entry:
            try:
                ipaddress.ip_network(entry)
            except ValueError:
                yield f"allow: {entry!r} is no network"
    if found.link and urlsplit(found.link).scheme not in {"https", "http"}:
        yield f"link: {found.link!r}: must be a URL, https://HOST"
    for target in found.targets:
        yield from _problems_of(target, found)


def _problems_of(target: Target, found: Targets) -> Iterator[str]:
    where = f"target {target.name!r}"
    try:
        parts = urlsplit(target.url)
        has_port = parts.port != 0
    except ValueError:
        yield f"{where}: url is no URL"
        return
    if parts.scheme not in {"https", "http"} or not parts.hostname or not has_port:
        yield f"{where}: url must be https://HOST/..., or http:// on loopback"
        return
    if parts.username or parts.password:
        yield f"{where}: url holds a password; put it into token_file"
    if not found.allowed.names(parts.hostname):
        yield f"{where}: host {parts.hostname!r} is not in allow"
    yield from _problems_of_preset(target, where)
    for field in ("secret_file", "token_file"):
        path = getattr(target, field)
        if path and not Path(path).is_file():
            yield f"{where}: {field}: no such file"


def _problems_of_preset(target: Target, where: str) -> Iterator[str]:
    preset = presets.PRESETS.get(target.preset)
    if preset is None:
        match = nearest(target.preset, list(presets.PRESETS))
        hint = (
            f"; did you mean {match!r}?" if match else f"; there are: {', '.join(presets.PRESETS)}"
        )
        yield f"{where}: no preset {target.preset!r}{hint}"
    else:
        for option in preset.needs:
            if not target.options.get(option):
                yield f"{where}: preset {target.preset!r} needs options.{option}"
        for option in target.options:
            if option not in (*preset.needs, *preset.takes):
                yield f"{where}: preset {target.preset!r} takes no options.{option}"


def _read_secret(path: str) -> Secret | None:
    if not path:
        return None
    return Secret(Path(path).read_text(encoding="utf-8").strip())


def about(target: Target) -> dict[str, Any]:
    """One target for people, without its secrets."""
    return {"name": target.name, "host": target.host, "preset": target.preset, "on": target.on}
