"""What nothing refers to: found, moved to the trash, later removed. And what must not be served.

A version stays if anything may still want it: it is among a model's newest, named by any alias,
pin, route or rollout of the recent revisions, or young. Only what is none of these moves to
`<model>/.trash/`, from where `mv` brings it back; a later run empties the trash.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from registry import names, store
from registry.catalog import WITHDRAWN, Catalog, VersionFiles, is_withdrawn, numbers
from registry.errors import RegistryError, WriteError
from registry.revisions import ModelState, Revision, Revisions

TRASH = ".trash"
KEEP_MIN = 1
"""A model's highest number stays in any case: it must not be given to other files."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A version that nothing refers to."""

    files: VersionFiles
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What would go, and why the rest stays."""

    leaving: tuple[Leaving, ...]
    staying: dict[tuple[str, int], str]

    @property
    def bytes(self) -> int:
        """What the versions that would go take."""
        return sum(one.bytes for one in self.leaving)


def plan(
    found: Catalog, revisions: Iterable[Revision], *, keep: int, age_s_min: float, now: float
) -> Plan:
    """Find what nothing refers to.

    Parameters
    ----------
    revisions : the recent ones, the head included
    keep : so many of a model's newest versions stay
    age_s_min : versions younger than this stay
    now : the file system's time, see `now_of`
    """
    named = references(revisions)
    leaving: list[Leaving] = []
    staying: dict[tuple[str, int], str] = {}
    for model, versions in found.models.items():
        newest = {files.version for files in versions[-max(keep, KEEP_MIN) :]}
        for files in versions:
            key = (model, files.version)
            if key in named:
                staying[key] = named[key]
            elif files.version in newest:
                staying[key] = "among the newest"
            elif (age_s := now - _changed(files.directory)) < age_s_min:
                staying[key] = f"{max(age_s, 0) / 86_400:.1f} days old"
            else:
                leaving.append(Leaving(files, size_of(files.directory)))
    return Plan(tuple(leaving), staying)


def references(revisions: Iterable[Revision]) -> dict[tuple[str, int], str]:
    """Every version that a revision names in any way, and by what."""
    named: dict[tuple[str, int], str] = {}
    for revision in revisions:
        for model, state in revision.models.items():
            for version, by in _named(state):
                named.setdefault((model, version), f"{by} of revision {revision.number}")
    return named


def collect(planned: Plan, revisions: Revisions) -> list[Leaving]:
    """Move what is planned to the trash; what somebody named meanwhile comes back.

    Raises
    ------
    WriteError : the disk says no; what was moved is in the trash.
    """
    moved = [(one, trash(one.files)) for one in planned.leaving]
    named = references([revisions.head()])
    gone: list[Leaving] = []
    for one, place in moved:
        if (one.files.model, one.files.version) in named:
            place.rename(one.files.directory)
        else:
            gone.append(one)
    return gone


def trash(files: VersionFiles) -> Path:
    """Move a version out of sight; where it is now.

    Whoever is reading it reads on: the files are the same.

    Raises
    ------
    WriteError : it could not be moved; it is still there.
    """
    root = files.directory.parent / TRASH
    store.make_directory(root)
    target = root / f"{files.version}-{secrets.token_hex(4)}"
    try:
        files.directory.rename(target)
        os.utime(target)  # from now on it counts how long it has been in the trash
        store.sync_directory(files.directory.parent)
    except OSError as error:
        raise WriteError(f"{files.model}/{files.version}", error) from error
    return target


def empty(root: Path, models: Iterable[str], *, age_s_min: float, now: float) -> int:
    """Remove what has been in the trash for long enough, and what dead publishers left; bytes."""
    n_bytes = 0
    for model in models:
        store.sweep(root / model / store.STAGING)
        with contextlib.suppress(FileNotFoundError):
            for directory in sorted((root / model / TRASH).iterdir()):
                if now - _changed(directory) >= age_s_min:
                    n_bytes += size_of(directory)
                    shutil.rmtree(directory, ignore_errors=True)
    return n_bytes


def withdraw(root: Path, model: str, version: int, *, reason: str, by: str, time: str) -> bool:
    """Say that a version must not be served again, by anybody who reads this directory.

    False if it was said before. Its files stay, so that what it did can be looked into.

    Raises
    ------
    RegistryError : there is no such version.
    WriteError : it could not be written.
    """
    directory = root / model
    if not names.is_model(model) or version not in numbers(directory):
        raise RegistryError(f"model {model!r} has no version {version}")
    if is_withdrawn(directory, version):
        return False
    said = {"format": 1, "version": version, "reason": reason, "by": by, "time": time}
    data = json.dumps(said, indent=2, ensure_ascii=False).encode() + b"\n"
    return store.create_if_absent(directory / f"{WITHDRAWN}{version}", data)


def now_of(directory: Path) -> float:
    """The time by the clock that stamps files here; it may be another host's.

    Raises
    ------
    WriteError : nothing can be written here.
    """
    path = directory / f".clock.{secrets.token_hex(4)}.tmp"
    try:
        path.touch()
        try:
            return path.stat().st_mtime
        finally:
            path.unlink()
    except OSError as error:
        raise WriteError(path.name, error) from error


def size_of(directory: Path) -> int:
    """Bytes of the files of a directory."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def _named(state: ModelState) -> Iterator[tuple[int, str]]:
    for alias, version in state.aliases.items():
        yield version, f"alias {alias!r}"
    for version in state.pins:
        yield version, "pinned, as"
    for version in _targets(msgspec.to_builtins(state.route)):
        yield version, "the route"
    # Whatever number a rollout names may be a version: too many stay, rather than one too few.
    for version in _integers(state.rollout):
        yield version, "the rollout"
    for text in state.reference:
        if (number := names.version(text)) is not None:
            yield number, "the adopted reference"


def _targets(part: Any) -> Iterator[int]:
    """Versions under any `to` of a route."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "to":
                yield from _integers(value)
            else:
                yield from _targets(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _targets(value)


def _integers(part: Any) -> Iterator[int]:
    if isinstance(part, bool) or part is None:
        return
    if isinstance(part, int):
        yield part
    elif isinstance(part, str):
        if (number := names.version(part)) is not None:
            yield number
    elif isinstance(part, dict):
        for value in part.values():
            yield from _integers(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _integers(value)


def _changed(directory: Path) -> float:
    about = directory.stat()
    return max(about.st_mtime, about.st_ctime)
