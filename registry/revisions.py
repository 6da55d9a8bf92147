"""The chain of revisions: what is in force, what was, and the next one, created if absent.

One file per revision, `revisions/00000042.json`, immutable, each with the digest of the one before
it. Creating the next number is the compare-and-swap between all writers, of one host or of many.
`HEAD` only says where to start looking: missing, torn, too low or too high, it costs a few more
looks and changes nothing. All revisions stay as files; nothing here removes one.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec

from registry import names, store
from registry.errors import (
    DamagedRevisionError,
    NewerFormatError,
    RevisionError,
    RevisionNotFoundError,
    WriteError,
)
from registry.routes import CHAMPION, Route, targets

FORMAT = 1
"""Number of the format written; a reader refuses a higher one, and whoever cannot read the newest
revision writes none."""
DIRECTORY = "revisions"
HEAD = "HEAD"
BYTES_MAX = 64 << 20
PREVIOUS = "previous"
"""The alias of the champion before; whoever promotes keeps it."""
_FILE = re.compile(r"([0-9]{8,18})\.json", re.ASCII)
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


class ModelState(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What is in force for one model."""

    follow: bool = True
    """Whether the champion follows the highest admitted version; nobody has taken the wheel yet."""
    aliases: dict[str, int] = {}
    """Versions by name: `champion` answers, `previous` answered before, others are free."""
    digests: dict[str, str] = {}
    """By version: the digest of its files when it was first named here."""
    loaded: bool | None = None
    """`true`: the champion is open on every worker, also before anybody asks; `false`: nothing of
    the model is open, and nothing of it answers, until it is loaded."""
    pins: tuple[int, ...] = ()
    """Versions that are never evicted or removed."""
    reference: dict[str, str] = {}
    """By version: the digest of an adopted profile that it is judged by, instead of its own."""
    monitor: dict[str, Any] | None = None
    """Over settings of servers: sampling, tolerance, budget, window, webhooks, labels, target."""
    route: Route | None = None
    """How the traffic is split; none: the champion answers."""
    rollout: dict[str, Any] | None = None
    """The rollout that owns the split for now, or the last one."""
    salts: dict[str, str] = {}
    """By purpose (`split`, `shadow`, `capture`): 32 hexadecimal digits."""
    buckets: str = ""
    """Which variant has which bucket: `0-499:challenger,500-9999:champion`; empty: no split."""

    @property
    def needed(self) -> set[int]:
        """Versions that every worker has open."""
        return self._named(self.aliases)

    @property
    def required(self) -> set[int]:
        """Those without which it is not put in force: a way back that is gone bars no way on."""
        return self._named({alias: n for alias, n in self.aliases.items() if alias != PREVIOUS})

    def _named(self, aliases: Mapping[str, int]) -> set[int]:
        if self.loaded is False:
            return set()
        routed = () if self.route is None else (to for _, to in targets(self.route))
        found = {aliases.get(to) if isinstance(to, str) else to for to in routed if to != CHAMPION}
        found |= set(self.pins)
        if not self.follow:  # Else names are of those that answered; they stay if there is room.
            found |= set(aliases.values())
        return {number for number in found if number is not None}

    def default(self, versions: Sequence[int]) -> int | None:
        """The version that answers when none is named, of those that there are."""
        number = max(versions, default=None) if self.follow else self.aliases.get(CHAMPION)
        return number if number in versions else None


class Revision(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Everything that is in force, for all models, and who made it so."""

    format: int = 0
    """Number of this format."""
    number: int = msgspec.field(name="revision")
    """1, 2, 3, ...: also the name of the file."""
    parent: int
    """The revision that this one changed: the one before, unless that one's file is damaged."""
    parent_digest: str
    """`sha256:` of the parent's file; empty where the parent is 0."""
    time: str
    """When it was written (UTC); for people, nothing is decided by it."""
    actor: str
    """Who: a user of this machine, `key:<id>`, `local`, `follow` or `rollout:<id>`."""
    via: str
    """By which way: `cli`, `http`, `grpc`, `python`, `sync` or `controller`."""
    message: str = ""
    """Why, in the actor's own words."""
    models: dict[str, ModelState] = {}
    """By name; a model that is not here follows its highest version."""

    @property
    def digest(self) -> str:
        """`sha256:` of its file, empty for revision 0."""
        return digest_of(self.to_json()) if self.number else ""

    def to_json(self) -> bytes:
        """The bytes of its file: equal revisions are equal bytes."""
        packed = msgspec.json.encode(self, order="deterministic")
        return msgspec.json.format(packed, indent=1) + b"\n"


EMPTY = Revision(number=0, parent=0, parent_digest="", time="", actor="", via="")
"""What is in force before the first revision: every model follows its highest version."""


def digest_of(data: bytes) -> str:
    """The digest of a revision's file."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def read(data: bytes, number: int) -> Revision:
    """The revision that a file holds.

    Raises
    ------
    NewerFormatError : a later release has written it.
    DamagedRevisionError : it is damaged: no JSON, not what a revision must be, or another's number.
    """
    try:
        about = _ABOUT.decode(data)
        if about.format > FORMAT:
            raise NewerFormatError(f"revision {number}", about.format, FORMAT)
        revision = _READER.decode(data)
    except msgspec.DecodeError as error:
        raise DamagedRevisionError(f"revision {number}: {_plain(str(error))}") from None
    except (RecursionError, UnicodeDecodeError):
        raise DamagedRevisionError(f"revision {number}: not JSON") from None
    if revision.format != FORMAT:
        raise DamagedRevisionError(f"revision {number}: has no format number {FORMAT}")
    if revision.number != number or not 0 <= revision.parent < number:
        raise DamagedRevisionError(
            f"revision {number}: says it is {revision.number}, after {revision.parent}"
        )
    if revision.to_json() != data:
        raise DamagedRevisionError(f"revision {number}: not the bytes that driftgate writes")
    for name in revision.models:
        if not names.is_model(name):
            raise DamagedRevisionError(
                f"revision {number}: {name[:80]!r} cannot be the name of a model"
            )
    return revision


@dataclass(frozen=True, slots=True)
class _Found:
    """One file of the chain that could be read."""

    revision: Revision
    digest: str


class Revisions:
    """The revisions of one state directory. Remembers the newest it has seen, and never goes back.

    For one thread at a time. Nothing is written before `append`, so that a registry that may only
    be read can be served.
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._directory = state_dir / DIRECTORY
        self._head = _Found(EMPTY, "")
        self._next = ""  # the file that a newer revision would have, as text: asked for often
        self._set_aside: dict[int, str] = {}

    @property
    def problems(self) -> tuple[str, ...]:
        """What was set aside when the head was last looked for, and why."""
        return tuple(self._set_aside[number] for number in sorted(self._set_aside))

    @property
    def free_number(self) -> int:
        """The number that the next revision takes: the first above all files there are."""
        return max(self._head.revision.number, *self._set_aside, 0) + 1

    def head(self) -> Revision:
        """The newest revision that is whole and follows from the one before it; 0 if there is none.

        While nothing is new this is one attempt to open a file.

        Raises
        ------
        NewerFormatError : the newest is of a later release. What was in force stays so.
        RevisionError : the directory cannot be read.
        """
        if not self._next:
            self._head = self._start()
        elif not self._set_aside:
            try:
                os.close(os.open(self._next, os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError:
                return self._head.revision
            except OSError:
                pass  # said below, in a sentence
        self._climb()
        return self._head.revision

    def get(self, number: int) -> Revision:
        """One revision, whether or not it is in the chain; 0 is the empty one.

        Raises
        ------
        RevisionNotFoundError, NewerFormatError, RevisionError
        """
        return self._get(number).revision

    def history(self, limit: int = 1_000_000) -> list[Revision]:
        """The head and its ancestors, the newest first; one that is damaged is passed over."""
        return [found.revision for found, _ in zip(self._chain([]), range(limit), strict=False)]

    def verify(self) -> list[str]:
        """Everything that is wrong with the chain, from the head to its first revision."""
        problems: list[str] = []
        self.head()
        for _ in self._chain(problems):
            pass
        return [*reversed(problems), *self.problems]

    def append(self, revision: Revision) -> bool:
        """Make this the newest revision; False if another writer has taken its number.

        Raises
        ------
        WriteError : it could not be written, and is not there.
        """
        data = revision.to_json()
        path = self._path(revision.number)
        store.make_directory(self._directory)
        store.sweep(self._directory)
        try:
            is_made = store.create_if_absent(path, data)
        except WriteError:
            # If only the last fsync failed, others have seen it: what is in force is no failure.
            if not self._holds(path, data):
                raise
            is_made = True
        if is_made:
            line = f"{revision.number} {digest_of(data)}\n"
            with contextlib.suppress(WriteError):
                store.replace(self._state_dir / HEAD, line.encode(), is_durable=False)
        return is_made

    # -- inside

    def _start(self) -> _Found:
        """A revision to climb from: where HEAD says, else the highest file there is."""
        number = self._said()[0]
        with contextlib.suppress(DamagedRevisionError, RevisionNotFoundError, NewerFormatError):
            if number > 0 and self._follows(found := self._get(number)):
                return found
        for number in self._numbers():
            with contextlib.suppress(DamagedRevisionError, NewerFormatError):
                if self._follows(found := self._get(number)):
                    return found
        return _Found(EMPTY, "")

    def _climb(self) -> None:
        """Go up from the head as long as there are files; those that do not fit are set aside."""
        found, self._set_aside = self._head, {}
        number = found.revision.number
        while True:
            number += 1
            try:
                candidate = self._get(number)
            except RevisionNotFoundError:
                break
            except NewerFormatError:
                self._head = found
                raise
            except DamagedRevisionError as error:
                self._set_aside[number] = str(error)
                continue
            if self._follows(candidate):
                found = candidate
                self._set_aside = {}
            else:
                self._set_aside[number] = (
                    f"revision {number}: does not follow from revision"
                    f" {candidate.revision.parent} as that is now"
                )
        self._head = found
        self._next = str(self._path(number))

    def _follows(self, found: _Found) -> bool:
        """Whether its link to its parent holds.

        Where the parent is gone or damaged there is nothing to hold it against. Where the parent
        is another than it was, HEAD decides: it was written with this revision, so the parent has
        been changed afterwards; without its word this one came from elsewhere.
        """
        revision = found.revision
        if self._head.revision.number == revision.parent and self._head.digest:
            parent_digest = self._head.digest
        else:
            try:
                parent_digest = self._get(revision.parent).digest
            except RevisionError:
                return True
        said = (revision.number, found.digest)
        return parent_digest == revision.parent_digest or self._said() == said

    def _chain(self, problems: list[str]) -> Iterator[_Found]:
        """The head and its ancestors; what is wrong on the way is added to `problems`."""
        self.head()
        found = self._head
        while found.revision.number:
            yield found
            child = found
            number = child.revision.parent
            found = _Found(EMPTY, "")
            while number:
                try:
                    found = self._get(number)
                    break
                except RevisionError as error:
                    problems.append(str(error))
                    number -= 1
            if number == child.revision.parent and found.digest != child.revision.parent_digest:
                problems.append(
                    f"revision {number}: was changed after revision {child.revision.number}"
                    " was written"
                )

    def _get(self, number: int) -> _Found:
        if number == 0:
            return _Found(EMPTY, "")
        if number == self._head.revision.number:
            return self._head
        data = self._bytes(self._path(number), number)
        return _Found(read(data, number), digest_of(data))

    def _bytes(self, path: Path, number: int) -> bytes:
        try:
            with path.open("rb") as stream:
                return stream.read(BYTES_MAX)
        except FileNotFoundError:
            raise RevisionNotFoundError(number) from None
        except OSError as error:
            raise RevisionError(
                f"revision {number}: cannot be read ({os.strerror(error.errno or 0)})"
            ) from None

    def _holds(self, path: Path, data: bytes) -> bool:
        try:
            return path.read_bytes() == data
        except OSError:
            return False

    def _said(self) -> tuple[int, str]:
        """Number and digest in HEAD; 0 where it says nothing."""
        try:
            with (self._state_dir / HEAD).open("rb") as stream:
                number, _, digest = stream.read(256).decode("ascii").strip().partition(" ")
        except (OSError, UnicodeDecodeError):
            return 0, ""
        return (names.version(number) or 0), digest

    def _numbers(self) -> list[int]:
        """Numbers of all files there are, the highest first."""
        try:
            found = [entry.name for entry in self._directory.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RevisionError(
                f"revisions: cannot be read ({os.strerror(error.errno or 0)})"
            ) from None
        matches = (_FILE.fullmatch(name) for name in found)
        return sorted({int(match[1]) for match in matches if match}, reverse=True)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08d}.json"


class _About(msgspec.Struct):
    """As much of any revision as tells whether the rest can be read."""

    format: int = 0


_ABOUT = msgspec.json.Decoder(_About)
_READER = msgspec.json.Decoder(Revision)


def _plain(text: str) -> str:
    """The sentence of msgspec, with the field that was probably meant."""
    if match := _UNKNOWN.search(text):
        fields = [f.encode_name for s in (Revision, ModelState) for f in msgspec.structs.fields(s)]
        if near := get_close_matches(match[1][:128], fields, n=1):
            return f"{text}; did you mean {near[0]!r}?"
    return text
