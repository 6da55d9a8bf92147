"""The one door: every change of what is in force, as a function from document to document.

A change is made on the newest revision, the whole document is checked, and the next number is
created if absent. Who was slower looks again: a change of another model is simply made anew, one
of the same model is refused with the name of who was faster. Undo is a change like any other.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import msgspec

from registry import buckets, catalog, names, routes
from registry.buckets import Buckets
from registry.errors import (
    ChangeError,
    ConflictError,
    NotThereError,
    PreconditionError,
    ProtectedError,
    RegistryError,
    RevisionError,
)
from registry.revisions import FORMAT, ModelState, Revision, Revisions, read
from registry.routes import CHAMPION, Route
from registry.signature import Signature, misfits

PREVIOUS = "previous"
FOLLOW = "follow"
"""The actor of revisions that only record which version is followed: they conflict with nothing."""
OVER = ("done", "aborted", "failed")
"""Phases in which a rollout owns nothing any more."""
_TRIES = 20
_MESSAGE_MAX = 1000

Models = Mapping[str, ModelState]
_replace = msgspec.structs.replace


class Known(Protocol):
    """What there is to point at."""

    def models(self) -> Iterable[str]:
        """Names of all models that have a version."""

    def versions(self, model: str) -> Sequence[int]:
        """Versions of a model that may be served, ascending; none for a model that is not there."""

    def digest(self, model: str, version: int) -> str:
        """The digest of a version's files."""

    def signature(self, model: str, version: int) -> Signature | None:
        """What a version takes and gives, where that is known."""

    def served(self, model: str) -> int | None:
        """The version that answers now, where that is known."""


class OnDisk:
    """What a registry directory holds: all there is to know with no server running."""

    def __init__(self, root: Path) -> None:
        """Look through the directory.

        Raises
        ------
        RegistryError : it cannot be read.
        """
        self._catalog = catalog.scan(root)

    def models(self) -> Iterable[str]:
        """Names of all models that have a version."""
        return self._catalog.models

    def versions(self, model: str) -> Sequence[int]:
        """Versions of a model, ascending."""
        return tuple(files.version for files in self._catalog.models.get(model, ()))

    def digest(self, model: str, version: int) -> str:
        """As its manifest states; of its bytes, where it has none.

        Raises
        ------
        RegistryError : a file cannot be read.
        """
        files = self._catalog.find(model, version)
        if files is None:
            raise NotThereError(f"model {model!r} has no version {version}")
        return files.digest or catalog.digest_of(files)

    def signature(self, model: str, version: int) -> Signature | None:
        """As its manifest states."""
        files = self._catalog.find(model, version)
        return files.manifest.tensors() if files and files.manifest else None

    def served(self, model: str) -> int | None:  # noqa: ARG002  part of Known
        """A directory does not know."""
        return None


class Change(Protocol):
    """A change: pure, so that it can be made again on another document."""

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it.

        Raises
        ------
        ChangeError : it cannot be made on this document.
        """


@dataclass(frozen=True, slots=True)
class Alias:
    """A name for a version. `champion` is promoted, as `Promote` does."""

    model: str
    alias: str
    version: int

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        if self.alias == CHAMPION:
            return Promote(self.model, self.version)(models, known)
        if not routes.is_alias(self.alias):
            raise ChangeError(
                f"{self.alias[:80]!r} is no alias (a letter, then letters, digits, '_', '-')"
            )
        state = managed(models, self.model, known)
        _require(self.model, self.version, known)
        return _put(models, self.model, state, aliases={**state.aliases, self.alias: self.version})


@dataclass(frozen=True, slots=True)
class DeleteAlias:
    """A name is given up."""

    model: str
    alias: str

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = _state(models, self.model, known)
        if self.alias == CHAMPION:
            raise ChangeError(
                "the champion answers: promote another, or let it follow the highest version"
                f" (driftgate follow {self.model})"
            )
        if self.alias not in state.aliases:
            raise NotThereError(
                f"model {self.model!r} has no alias {self.alias[:80]!r}"
                + _suggestion(self.alias, state.aliases)
            )
        left = {name: n for name, n in state.aliases.items() if name != self.alias}
        return _put(models, self.model, state, aliases=left)


@dataclass(frozen=True, slots=True)
class Promote:
    """A version becomes the champion; the one before is kept as `previous`."""

    model: str
    version: int

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = managed(models, self.model, known)
        _require(self.model, self.version, known)
        aliases = dict(state.aliases)
        if (before := aliases.get(CHAMPION)) not in (None, self.version):
            aliases[PREVIOUS] = before
        return _put(models, self.model, state, aliases={**aliases, CHAMPION: self.version})


@dataclass(frozen=True, slots=True)
class Rollback:
    """The previous champion answers again. A second one changes nothing: two may press at once."""

    model: str

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = managed(models, self.model, known)
        previous = state.aliases.get(PREVIOUS)
        if previous is None:
            raise ChangeError(f"model {self.model!r} has no previous champion; promote a version")
        rollout = state.rollout
        if rollout is not None and "baking" in (rollout.get("phase"), rollout.get("held")):
            rollout = rollout | {"phase": "aborted", "cause": "rolled back"}
        aliases = {**state.aliases, CHAMPION: previous}
        return _put(models, self.model, state, aliases=aliases, rollout=rollout)


@dataclass(frozen=True, slots=True)
class Follow:
    """The champion is the highest version again, whatever is published."""

    model: str

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        return _put(models, self.model, _state(models, self.model, known), follow=True)


@dataclass(frozen=True, slots=True)
class RecordFollow:
    """Which versions are followed: written by servers, so that history tells it."""

    moves: Mapping[str, int]

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it; one that no longer follows stays as it is."""
        for model, version in self.moves.items():
            state = models.get(model, ModelState())
            if state.follow and version in known.versions(model):
                aliases = dict(state.aliases)
                if (before := aliases.get(CHAMPION)) not in (None, version):
                    aliases[PREVIOUS] = before
                models = _put(models, model, state, aliases={**aliases, CHAMPION: version})
        return models


@dataclass(frozen=True, slots=True)
class Pin:
    """A version stays in memory and on disk."""

    model: str
    version: int

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = _state(models, self.model, known)
        _require(self.model, self.version, known)
        pins = tuple(sorted({*state.pins, self.version}))
        return _put(models, self.model, state, pins=pins)


@dataclass(frozen=True, slots=True)
class Unpin:
    """A version may be evicted and removed again."""

    model: str
    version: int

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = _state(models, self.model, known)
        pins = tuple(version for version in state.pins if version != self.version)
        return _put(models, self.model, state, pins=pins)


@dataclass(frozen=True, slots=True)
class PutRoute:
    """A model's traffic is split like this; as few units as possible move."""

    model: str
    route: Route

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = managed(models, self.model, known)
        return _put(models, self.model, routed(state, self.route), follow=False)


@dataclass(frozen=True, slots=True)
class PutRoutes:
    """Routes of several models, in one revision."""

    routes: Mapping[str, Route]

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        for model, route in self.routes.items():
            models = PutRoute(model, route)(models, known)
        return models


@dataclass(frozen=True, slots=True)
class DeleteRoute:
    """The champion answers everything again. Salts stay: the same route later is the same split."""

    model: str

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = _state(models, self.model, known)
        if state.route is None:
            raise NotThereError(f"model {self.model!r} has no route")
        return _put(models, self.model, state, route=None, buckets="")


@dataclass(frozen=True, slots=True)
class SetRollout:
    """A step of a rollout, with what it does to route and aliases, in one revision.

    The rollout's owner makes these: they are not held up by the rollout that they are part of.
    """

    model: str
    rollout: Mapping[str, Any] | None
    route: Route | None = None
    """The new route; None leaves it as it is."""
    aliases: Mapping[str, int | None] = field(default_factory=dict)
    """Versions by name, None for one to give up; a new champion keeps the old one as previous."""

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = managed(models, self.model, known)
        aliases = dict(state.aliases)
        for alias, version in self.aliases.items():
            if version is None:
                aliases.pop(alias, None)
                continue
            _require(self.model, version, known)
            if alias == CHAMPION and aliases[CHAMPION] != version:
                aliases.setdefault(PREVIOUS, aliases[CHAMPION])
                if PREVIOUS not in self.aliases:
                    aliases[PREVIOUS] = aliases[CHAMPION]
            aliases[alias] = version
        state = _replace(state, aliases=aliases)
        if self.route is not None:
            state = routed(state, self.route)
        rollout = None if self.rollout is None else dict(self.rollout)
        return _put(models, self.model, state, rollout=rollout)


@dataclass(frozen=True, slots=True)
class SetReference:
    """A version is judged by an adopted profile; None: by its own again."""

    model: str
    version: int
    digest: str | None

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = _state(models, self.model, known)
        _require(self.model, self.version, known)
        reference = {key: text for key, text in state.reference.items() if key != str(self.version)}
        if self.digest is not None:
            reference[str(self.version)] = self.digest
        return _put(models, self.model, state, reference=reference)


@dataclass(frozen=True, slots=True)
class SetMonitor:
    """Settings of the monitors of a model; None: the server's."""

    model: str
    monitor: Mapping[str, Any] | None

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = _state(models, self.model, known)
        monitor = None if self.monitor is None else dict(self.monitor)
        return _put(models, self.model, state, monitor=monitor)


@dataclass(frozen=True, slots=True)
class Restore:
    """What an old revision said is in force again, for one model or for all.

    Salts and buckets come back with it, so that everybody is where they were. A rollout does not:
    what is over stays over.
    """

    old: Revision
    model: str | None = None

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        if self.model is not None:
            _state({**self.old.models, **models}, self.model, known)
        chosen = {*models, *self.old.models} if self.model is None else {self.model}
        after = dict(models)
        for model in sorted(chosen):
            now = after.pop(model, ModelState())
            was = self.old.models.get(model, ModelState())
            aliases = dict(was.aliases)
            if aliases.get(PREVIOUS) not in (None, *known.versions(model)):
                del aliases[PREVIOUS]  # a way back that is gone must not bar the way
            was = _replace(was, aliases=aliases, rollout=now.rollout)
            if was != ModelState():
                after[model] = was
        return after


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a change."""

    revision: Revision
    """In force now; of a dry run: what would be."""
    diff: tuple[str, ...]
    """A line for each thing that is different."""
    moved: Mapping[str, float]
    """By model: percent of its units that another version answers than before."""
    undo: str
    """The command that takes it back."""
    is_changed: bool
    """Whether there was anything to change."""

    def document(self, *, dry_run: bool = False) -> dict[str, Any]:
        """As programs are told it, by every way."""
        return {
            "revision": self.revision.number,
            "changed": self.is_changed,
            "dry_run": dry_run,
            "diff": list(self.diff),
            "moved": {model: round(percent, 2) for model, percent in self.moved.items()},
            "undo": self.undo,
        }


def apply(
    revisions: Revisions,
    change: Change,
    *,
    known: Known,
    actor: str,
    via: str,
    message: str = "",
    if_match: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    take_over: bool = False,
) -> Applied:
    """Make a change, and write it as the next revision.

    Parameters
    ----------
    if_match : the revision that must be in force; None: any
    dry_run : write nothing
    force : also to a version whose signature is another than the champion's
    take_over : also what a rollout owns; the rollout is over then

    Raises
    ------
    ChangeError : with every problem; NotThereError, ProtectedError for those kinds.
    ConflictError, PreconditionError : somebody else has changed it; says who, and what.
    WriteError : it could not be written; nothing is changed.
    RevisionError : what is in force cannot be read.
    """
    message = " ".join(message.split())
    if len(message) > _MESSAGE_MAX:
        raise ChangeError(f"message: {len(message)} characters; {_MESSAGE_MAX} are allowed")
    if not message.isprintable():
        raise ChangeError("message: holds characters that cannot be printed")
    head = revisions.head()
    if if_match is not None and head.number != if_match:
        raise PreconditionError(_since(revisions, if_match, head))
    for _ in range(_TRIES):
        models = _checked(head.models, change, known, force=force, take_over=take_over, actor=actor)
        touched = _touched(head.models, models)
        if not touched:
            return Applied(head, (), {}, "", is_changed=False)
        made = Revision(
            format=FORMAT,
            number=revisions.free_number,
            parent=head.number,
            parent_digest=head.digest,
            time=_now(),
            actor=actor,
            via=via,
            message=message,
            models=dict(models),
        )
        _check_readable(made)
        applied = Applied(
            made,
            tuple(differences(head.models, models)),
            {model: moved(model, head.models, models, known) for model in sorted(touched)},
            undo_of(head, touched),
            is_changed=True,
        )
        if dry_run or revisions.append(made):
            return applied
        newer = revisions.head()
        if if_match is not None:
            raise PreconditionError(_since(revisions, if_match, newer))
        is_record = isinstance(change, RecordFollow)  # passes by who has taken the wheel
        if not is_record and (others := _conflicting(revisions, head, newer, touched)):
            raise ConflictError("; ".join(others))
        head = newer
    raise ConflictError(f"{_TRIES} others were faster, one after the other; try again")


def log(
    revisions: Revisions, limit: int, model: str | None = None
) -> list[tuple[Revision, list[str]]]:
    """The newest revisions, each with what it changed; of one model, or of all.

    Raises
    ------
    RevisionError : what is in force cannot be read.
    """
    head = revisions.head()
    touched = None if model is None else {model}
    found = _changes_since(revisions, 0, head, touched)
    return [entry for entry, _ in zip(found, range(limit), strict=False)]


def record_follow(revisions: Revisions, moves: Mapping[str, int], known: Known) -> bool:
    """Write down which versions are followed, if that can be written; say whether it is.

    What is followed is served all the same: a registry may be read-only, or its disk full.
    """
    try:
        apply(revisions, RecordFollow(moves), known=known, actor=FOLLOW, via="sync", force=True)
    except RegistryError:
        return False
    return True


def routed(state: ModelState, route: Route) -> ModelState:
    """The state with another route: salts drawn once, buckets moved as little as possible."""
    salts = {
        purpose: state.salts.get(purpose) or secrets.token_hex(buckets.SALT_BYTES)
        for purpose in routes.PURPOSES
    }
    table = routes.table(route, state.buckets, bytes.fromhex(salts["split"]))
    return _replace(state, route=route, salts=salts, buckets=table.format() if route.split else "")


def managed(models: Models, model: str, known: Known) -> ModelState:
    """The state of a model that somebody takes the wheel of: its champion is what is served now.

    Raises
    ------
    NotThereError : there is no such model, or it has no version.
    """
    state = _state(models, model, known)
    if not state.follow:
        return state
    served = champion(model, state, known)
    if served is None:
        raise NotThereError(f"model {model!r} has no version that could answer")
    return _replace(state, follow=False, aliases={**state.aliases, CHAMPION: served})


def champion(model: str, state: ModelState, known: Known) -> int | None:
    """The version that answers: the champion; under follow what is served, recorded or highest."""
    recorded = state.aliases.get(CHAMPION)
    if not state.follow:
        return recorded
    there = known.versions(model)
    for version in (known.served(model), recorded):
        if version in there:
            return version
    return there[-1] if there else None


def moved(model: str, before: Models, after: Models, known: Known) -> float:
    """Percent of a model's units that another version answers than before, by its split."""
    was = _answering(model, before, known)
    now = _answering(model, after, known)
    if was[1] == now[1] or len(set(was[0])) == 1 or len(set(now[0])) == 1:
        n = sum(a != b for a, b in zip(was[0], now[0], strict=True))
        return n * 100 / buckets.N
    # Another salt shuffles everybody: who stays does so by chance.
    same = sum(was[0].count(version) * now[0].count(version) for version in {*was[0]} & {*now[0]})
    return 100 - same * 100 / buckets.N**2


def differences(before: Models, after: Models) -> list[str]:
    """A line for each thing that two documents say differently; tables and salts are left out."""
    lines: list[str] = []
    for model in sorted({*before, *after}):
        was, now = (dict(_leaves(side.get(model, ModelState()))) for side in (before, after))
        for key in dict.fromkeys([*was, *now]):
            old, new = was.get(key, "none"), now.get(key, "none")
            if old != new:
                lines.append(f"{model} {key} {old} -> {new}")
    return lines


def undo_of(head: Revision, touched: Iterable[str]) -> str:
    """The command that takes a change back which was made on `head`."""
    changed = sorted(touched)
    of_one = f" {changed[0]}" if len(changed) == 1 else ""
    return f"driftgate restore {head.number}{of_one}"


# -- inside


def _checked(
    before: Models,
    change: Change,
    known: Known,
    *,
    force: bool,
    take_over: bool,
    actor: str,
) -> Models:
    """The models after a change that may be made.

    Raises
    ------
    ChangeError, ProtectedError
    """
    after = dict(change(before, known))
    problems: list[str] = []
    held: list[str] = []
    for model in sorted(_touched(before, after)):
        was, now = before.get(model, ModelState()), after.get(model, ModelState())
        after[model] = now = _with_digests(model, was, now, known, problems)
        problems += _misfits(model, now, known, was)
        if now == ModelState():
            del after[model]
        if not isinstance(change, SetRollout) and _takes_over(was, now):
            if take_over:
                over = {"phase": "aborted", "cause": f"taken over by {actor}"}
                after[model] = _replace(now, rollout={**(now.rollout or {}), **over})
            else:
                held.append(
                    f"model {model!r}: rollout {(was.rollout or {}).get('id', '?')} owns its"
                    " traffic; abort it (driftgate canary abort), or --take-over"
                )
        if not force:
            held += _incompatible(model, was, now, known)
    if problems:
        raise ChangeError(*problems)
    if held:
        raise ProtectedError(*held)
    return after


def _with_digests(
    model: str, was: ModelState, now: ModelState, known: Known, problems: list[str]
) -> ModelState:
    """The state with the digest of every version that it names, and of no other."""
    digests: dict[str, str] = {}
    there = known.versions(model)
    old = {**now.digests, **was.digests}
    for version in sorted(_named(now)):
        key = str(version)
        # What was named before may stay, also if it is gone: else nothing else could be mended.
        if version in _named(was):
            if key in was.digests:
                digests[key] = was.digests[key]
            continue
        if version not in there:
            problems.append(f"model {model!r} has no version {version}{_have(there)}")
            continue
        try:
            digests[key] = known.digest(model, version)
        except RegistryError as error:
            problems.append(f"model {model!r} version {version}: {error}")
            continue
        if old.get(key, digests[key]) != digests[key]:
            problems.append(
                f"model {model!r} version {version}: its files are not those it had when it was"
                " named before; publish them under a number of their own"
            )
    return _replace(now, digests=digests)


def _misfits(model: str, state: ModelState, known: Known, was: ModelState) -> Iterator[str]:
    """What is wrong with a state."""
    for alias in state.aliases:
        if not routes.is_alias(alias):
            yield f"model {model!r}: {alias[:80]!r} is no alias"
    for version in _named(state):
        if names.version(str(version)) is None:
            yield f"model {model!r}: {version} is no version (1, 2, 3, ...)"
    if not state.follow and CHAMPION not in state.aliases:
        yield f"model {model!r}: has no champion"
    if state.route is not None:
        there = {*known.versions(model), *_named(was)}
        yield from routes.check_targets(model, state.route, state.aliases, there)
    if state.buckets:
        try:
            shares = Buckets.parse(state.buckets).weights()
        except RegistryError as error:
            yield f"model {model!r}: {error}"
            return
        wanted = routes.weights(state.route) if state.route and state.route.split else {}
        if shares != {name: n for name, n in wanted.items() if n}:
            yield f"model {model!r}: its buckets are not those of its split"


def _incompatible(model: str, was: ModelState, now: ModelState, known: Known) -> Iterator[str]:
    """Versions that would answer clients of the champion, and cannot."""
    reference = champion(model, was, known)
    expected = None if reference is None else known.signature(model, reference)
    if expected is None or reference is None:
        return
    before = {reference, *_answers(was)}
    for version in sorted({*_answers(now), *filter(None, [_champion(now)])} - before):
        found = known.signature(model, version)
        if found is not None and (wrong := misfits(expected, found)):
            yield (
                f"model {model!r} version {version} does not fit clients of version {reference}:"
                f" {', '.join(wrong)}; --force if that is meant"
            )


def _answers(state: ModelState) -> set[int]:
    """Versions that the route of a state names."""
    if state.route is None:
        return set()
    found = {_version(state, to) for _, to in routes.targets(state.route)}
    return {version for version in found if version is not None}


def _answering(model: str, models: Models, known: Known) -> tuple[list[int | None], str]:
    """(10 000,) the version that answers each bucket, and the salt of the split."""
    state = models.get(model, ModelState())
    answers = champion(model, state, known)
    if not state.buckets:
        return [answers] * buckets.N, ""
    table = Buckets.parse(state.buckets)
    versions = [
        answers if name == CHAMPION else _version(state, int(name) if name.isdigit() else name)
        for name in table.names
    ]
    return [versions[index] for index in table.owners], state.salts.get("split", "")


def _version(state: ModelState, to: int | str) -> int | None:
    return to if isinstance(to, int) else state.aliases.get(to)


def _champion(state: ModelState) -> int | None:
    return state.aliases.get(CHAMPION)


def _named(state: ModelState) -> set[int]:
    """Every version that a state names."""
    named = {*state.aliases.values(), *state.pins}
    if state.route is not None:
        named |= {to for _, to in routes.targets(state.route) if isinstance(to, int)}
    named |= {n for n in map(names.version, state.reference) if n is not None}
    return named


def _owns(state: ModelState) -> bool:
    return state.rollout is not None and state.rollout.get("phase") not in OVER


def _check_readable(made: Revision) -> None:
    """See that others will read what is written: JSON has no infinity, for one.

    Raises
    ------
    ChangeError
    """
    try:
        is_same = read(made.to_json(), made.number) == made
    except (RevisionError, ValueError, TypeError, OverflowError):
        is_same = False
    if not is_same:
        raise ChangeError("it holds what cannot be written down (infinity, or half a character)")


def _takes_over(was: ModelState, now: ModelState) -> bool:
    """Whether what a running rollout owns is changed, and the rollout itself is not ended."""
    is_other = now.route != was.route or _champion(now) != _champion(was) or now.follow
    return is_other and _owns(was) and _owns(now)


def _touched(before: Models, after: Models) -> set[str]:
    """Models that two documents say different things of."""
    return {model for model in {*before, *after} if before.get(model) != after.get(model)}


def _conflicting(
    revisions: Revisions, base: Revision, newer: Revision, touched: set[str]
) -> list[str]:
    """What others changed of the same models since `base`."""
    return [
        _told(revision, lines)
        for revision, lines in _changes_since(revisions, base.number, newer, touched)
        if revision.actor != FOLLOW
    ]


def _changes_since(
    revisions: Revisions, number: int, head: Revision, touched: set[str] | None
) -> Iterator[tuple[Revision, list[str]]]:
    """Revisions after `number`, newest first, that changed these models (None: any), and how."""
    while head.number > number:
        try:
            parent = revisions.get(head.parent)
        except RevisionError:
            return
        changed = _touched(parent.models, head.models)
        if touched is None or changed & touched:
            chosen = changed if touched is None else changed & touched
            yield head, differences(_only(chosen, parent.models), _only(chosen, head.models))
        head = parent


def _only(chosen: set[str], models: Models) -> Models:
    return {model: state for model, state in models.items() if model in chosen}


def _since(revisions: Revisions, wanted: int, head: Revision) -> str:
    """The sentence of a precondition that does not hold."""
    first = f"revision {head.number} is in force, not {wanted}"
    told = []
    for revision, lines in _changes_since(revisions, wanted, head, None):
        told.append(_told(revision, lines))
        if len(told) == 5:
            break
    return "; ".join([first, *told])


def _told(revision: Revision, lines: Sequence[str]) -> str:
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    what = ", ".join(lines[:3]) or "nothing that shows"
    return f"revision {revision.number} by {revision.actor} ({revision.via}): {what}{more}"


def _leaves(state: ModelState) -> Iterator[tuple[str, str]]:
    """What people see of a state, flat."""
    yield "follow", "on" if state.follow else "off"
    yield from ((alias, str(n)) for alias, n in sorted(state.aliases.items()))
    yield from ((f"pin {version}", "on") for version in state.pins)
    yield from ((f"reference {n}", text[:19]) for n, text in sorted(state.reference.items()))
    if state.route is not None:
        document = routes.document(state.route)
        for share in document.pop("split", []):
            yield f"split {share['to']}", str(share["weight"])
        yield from _flat("route", document)
    yield from _flat("monitor", state.monitor)
    yield from _flat("rollout", state.rollout)


def _flat(where: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{where}.{key}", inner)
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        for k, inner in enumerate(value):
            yield from _flat(f"{where}[{k}]", inner)
    elif value is not None:
        yield where, msgspec.json.encode(value).decode()


def _state(models: Models, model: str, known: Known) -> ModelState:
    """The state of a model that is there.

    Raises
    ------
    NotThereError
    """
    if model in models:
        return models[model]
    if not known.versions(model):
        there = sorted({*models, *known.models()})
        raise NotThereError(f"no model {model[:128]!r} here{_suggestion(model, there)}")
    return ModelState()


def _put(models: Models, model: str, state: ModelState, **changed: Any) -> Models:
    return {**models, model: _replace(state, **changed)}


def _require(model: str, version: int, known: Known) -> None:
    there = known.versions(model)
    if version not in there:
        raise NotThereError(f"model {model!r} has no version {version}{_have(there)}")


def _have(versions: Sequence[int]) -> str:
    return f"; it has: {', '.join(map(str, versions[-10:]))}" if versions else ""


def _suggestion(name: str, known: Iterable[str]) -> str:
    listed = sorted(known)
    if match := get_close_matches(name[:128], listed, n=1):
        return f"; did you mean {match[0]!r}?"
    return f"; there are: {', '.join(listed[:5])}" if listed else "; there are none"


def _utc() -> datetime:
    return datetime.now(UTC)


clock: Callable[[], datetime] = _utc
"""What tells the time of a revision; tests set it."""


def _now() -> str:
    return clock().isoformat(timespec="milliseconds").replace("+00:00", "Z")
