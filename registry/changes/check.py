"""What must hold of a document after a change: nothing is written that does not pass here."""

from collections.abc import Iterator

import msgspec

from registry import names, routes
from registry.buckets import Buckets
from registry.changes.differences import models_touched, version_of
from registry.changes.kinds import Change, SetRollout
from registry.changes.known import Known, Models, champion, have
from registry.errors import ChangeError, ProtectedError, RegistryError, RevisionError
from registry.revisions import ModelState, Revision, read
from registry.routes import CHAMPION
from registry.signature import misfits

OVER = ("done", "aborted", "failed")
"""Phases in which a rollout owns nothing any more."""
_replace = msgspec.structs.replace


def checked(
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
    for model in sorted(models_touched(before, after)):
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
            problems.append(f"model {model!r} has no version {version}{have(there)}")
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
    found = {version_of(state, to) for _, to in routes.targets(state.route)}
    return {version for version in found if version is not None}


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


def check_readable(made: Revision) -> None:
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
    is_other = is_other or (now.loaded is False and was.loaded is not False)
    return is_other and _owns(was) and _owns(now)
