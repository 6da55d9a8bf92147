"""The changes there are: each a pure function, so that it can be made again on another document."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from registry import buckets, monitoring, routes
from registry.changes.known import Known, Models, managed, require, state_of, suggestion
from registry.errors import ChangeError, NotThereError
from registry.revisions import PREVIOUS, ModelState, Revision
from registry.routes import CHAMPION, Route

_replace = msgspec.structs.replace


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
        require(self.model, self.version, known)
        return _put(models, self.model, state, aliases={**state.aliases, self.alias: self.version})


@dataclass(frozen=True, slots=True)
class DeleteAlias:
    """A name is given up."""

    model: str
    alias: str

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = state_of(models, self.model, known)
        if self.alias == CHAMPION:
            raise ChangeError(
                "the champion answers: promote another, or let it follow the highest version"
                f" (driftgate follow {self.model})"
            )
        if self.alias not in state.aliases:
            raise NotThereError(
                f"model {self.model!r} has no alias {self.alias[:80]!r}"
                + suggestion(self.alias, state.aliases)
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
        require(self.model, self.version, known)
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
        return _put(models, self.model, state_of(models, self.model, known), follow=True)


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
        state = state_of(models, self.model, known)
        require(self.model, self.version, known)
        pins = tuple(sorted({*state.pins, self.version}))
        return _put(models, self.model, state, pins=pins)


@dataclass(frozen=True, slots=True)
class Unpin:
    """A version may be evicted and removed again."""

    model: str
    version: int

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = state_of(models, self.model, known)
        pins = tuple(version for version in state.pins if version != self.version)
        return _put(models, self.model, state, pins=pins)


@dataclass(frozen=True, slots=True)
class Load:
    """A model is open on every worker: its champion, and the version named, which is pinned."""

    model: str
    version: int | None = None

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = state_of(models, self.model, known)
        if self.version is not None:
            state = Pin(self.model, self.version)(models, known)[self.model]
        return _put(models, self.model, state, loaded=True)


@dataclass(frozen=True, slots=True)
class Unload:
    """Nothing of a model is open or pinned anywhere, until it is loaded; its names stay."""

    model: str

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = state_of(models, self.model, known)
        return _put(models, self.model, state, loaded=False, pins=())


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
        state = state_of(models, self.model, known)
        if state.route is None:
            raise NotThereError(f"model {self.model!r} has no route")
        return _put(models, self.model, state, route=None, buckets="")


@dataclass(frozen=True, slots=True)
class PutShadow:
    """A version gets copies of a model's requests. A new one is a new draw: with a salt of its own.

    One that is there already goes on with the same units, under new settings.
    """

    model: str
    shadow: routes.Shadow

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = managed(models, self.model, known)
        route = state.route or Route()
        to = str(self.shadow.to)
        if to in [str(shadow.to) for shadow in route.shadow]:
            shadows = tuple(self.shadow if str(s.to) == to else s for s in route.shadow)
        else:
            shadows = (*route.shadow, self.shadow)
            salts = {**state.salts, "shadow": secrets.token_hex(buckets.SALT_BYTES)}
            state = _replace(state, salts=salts)
        route = _replace(route, shadow=shadows)
        return _put(models, self.model, routed(state, route), follow=False)


@dataclass(frozen=True, slots=True)
class DeleteShadow:
    """A version gets no copies any more. What was compared stays."""

    model: str
    to: str

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = state_of(models, self.model, known)
        there = () if state.route is None else state.route.shadow
        left = tuple(shadow for shadow in there if str(shadow.to) != self.to)
        if state.route is None or len(left) == len(there):
            raise NotThereError(
                f"model {self.model!r} has no shadow {self.to[:80]!r}"
                + suggestion(self.to, [str(shadow.to) for shadow in there])
            )
        route = _replace(state.route, shadow=left)
        return _put(models, self.model, state, route=None if route == Route() else route)


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
            require(self.model, version, known)
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
        state = state_of(models, self.model, known)
        require(self.model, self.version, known)
        reference = {key: text for key, text in state.reference.items() if key != str(self.version)}
        if self.digest is not None:
            reference[str(self.version)] = self.digest
        return _put(models, self.model, state, reference=reference)


@dataclass(frozen=True, slots=True)
class AlterMonitor:
    """Settings of the monitors of a model, laid over those that there are; null takes one away."""

    model: str
    patch: Mapping[str, Any]

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        state = state_of(models, self.model, known)
        document = monitoring.merged(state.monitor, self.patch)
        target = monitoring.read(document).target
        signature = known.signature(self.model, max(known.versions(self.model), default=0))
        if target is not None and target.output is not None and signature is not None:
            outputs = [spec.name for spec in signature.outputs]
            if target.output not in outputs:
                raise ChangeError(
                    f"monitor.target.output: no output {target.output[:80]!r}"
                    + suggestion(target.output, outputs)
                )
        return _put(models, self.model, state, monitor=document)


@dataclass(frozen=True, slots=True)
class DeleteMonitor:
    """The monitors of a model are as the servers are set."""

    model: str

    def __call__(self, models: Models, known: Known) -> Models:
        """The models after it."""
        return _put(models, self.model, state_of(models, self.model, known), monitor=None)


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
            state_of({**self.old.models, **models}, self.model, known)
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


def routed(state: ModelState, route: Route) -> ModelState:
    """The state with another route: salts drawn once, buckets moved as little as possible."""
    salts = {
        purpose: state.salts.get(purpose) or secrets.token_hex(buckets.SALT_BYTES)
        for purpose in routes.PURPOSES
    }
    table = routes.table(route, state.buckets, bytes.fromhex(salts["split"]))
    return _replace(state, route=route, salts=salts, buckets=table.format() if route.split else "")


def _put(models: Models, model: str, state: ModelState, **changed: Any) -> Models:
    return {**models, model: _replace(state, **changed)}
