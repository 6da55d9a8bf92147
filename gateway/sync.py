"""A worker's view of the registry: looks, opens and warms beside, then swaps one table.

Opening is done off the event loop, one version at a time. A version that cannot be opened is
refused with its reason until its files change, and what served before serves on. What is in the
table is never taken out because a disk went away; it leaves when something else takes its place, or
when it is withdrawn, and its session is closed once the last request that holds it is answered.
"""

import asyncio
import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gateway import loader, memory
from gateway.config import ServerConfig
from gateway.errors import (
    GatewayError,
    ModelNotFoundError,
    NoMemoryError,
    NotReadyError,
    StartError,
    VersionNotFoundError,
)
from gateway.loader import Loader
from gateway.looks import Looks
from gateway.monitored import said_of
from gateway.observer import Observer
from gateway.place import Place
from gateway.prediction import DataPlane
from gateway.router import Model, Routing, Variant
from gateway.sessions import Sessions
from gateway.telemetry import SWAPS, Sample, event
from gateway.uses import Uses
from registry import catalog, changes, trust, workers
from registry.catalog import Catalog, VersionFiles
from registry.errors import RegistryError, WriteError
from registry.revisions import EMPTY, ModelState, Revision, Revisions
from registry.signature import Signature
from registry.store import Lease
from registry.workers import Heartbeat, Rejection

_FOLLOWED = ModelState()
"""A model that no revision speaks of follows its highest version."""
_BEAT_S = 2.0
_SAY_S = 1.0
"""How often other workers hear when versions ran last."""
_SETTLING_S = 0.1
_WARM_MAX = 64
"""So many sessions are opened before anybody asks; in larger registries the first call does it."""
_RETRY_S_MAX = 30.0


@dataclass(frozen=True, slots=True)
class _Brought:
    """What a model was last brought in line with; the same again needs no work."""

    versions: tuple[VersionFiles, ...]
    withdrawn: frozenset[int]
    state: ModelState


class Sync:
    """Brings what the registry holds, and what revisions say of it, into the data plane's table.

    Parameters
    ----------
    place : where the worker sits; None: this is no worker
    """

    def __init__(
        self,
        config: ServerConfig,
        plane: DataPlane,
        observer: Observer,
        place: Place | None = None,
    ) -> None:
        self._config = config
        self._plane = plane
        self._observer = observer
        self._slot = 0 if place is None else place.slot
        self._server = "" if place is None else place.server
        others = None if place is None or place.n_workers == 1 else place.run_dir
        self._looks = Looks(Path(config.registry), config.sync.settle_s, others)
        self._revisions = Revisions(config.state_path)
        self._revision = EMPTY
        run_dir = None if place is None else place.run_dir
        self._uses = Uses((run_dir or config.run_path) / "uses", str(self._slot))
        self._scratch = (run_dir or config.run_path) / "versions"
        keys = read_trusted(config) if config.trust else None
        self.sessions = Sessions(
            config,
            plane,
            observer,
            Loader(config, self._scratch, keys),
            run_dir,
            lambda name: self._revision.models.get(name, _FOLLOWED),
            self._looks.reader.admit,
        )
        self._found = Catalog({}, ())
        self._brought: dict[str, _Brought] = {}
        self._moves: dict[str, int] = {}
        """Models that follow another version since that was last written down."""
        self._is_stale = False
        self._had_refused: set[str] = set()
        self._forgiven = 0
        """The revision whose newly named versions were last given another try."""
        self._watching: asyncio.Task[None] | None = None
        self._rejected: Rejection | None = None
        self._retry_at = 0.0
        self._retry_s = 0.0
        self._beats = 0
        self._said_at = 0.0
        self.on_change: Callable[[], None] = lambda: None
        """Called on the loop when the table has become another one."""
        self._beaten: tuple[float, object] = (0.0, None)
        self.problems: tuple[str, ...] = ()
        self.degraded: dict[str, str] = {}
        """What does not work now, and why: `registry`, `state`, `heartbeat`, `changed`,
        `quarantine`."""
        plane.open_version = self.open_version
        plane.find_files = lambda name, version: self.sessions.files.get((name, version))
        plane.try_version = self.try_version

    @property
    def revision(self) -> int:
        """The revision in force here; 0 while none is in force as a whole."""
        is_whole = self._rejected is None or self._rejected.revision != self._revision.number
        return self._revision.number if is_whole else 0

    # -- from start to end

    async def load(self) -> None:
        """Open what routes need, then as much else as the start may take; then be ready."""
        await asyncio.to_thread(loader.sweep, self._scratch)
        await self.sessions.start()
        await asyncio.to_thread(self._uses.start)
        self._requalify(await asyncio.to_thread(self.sessions.quarantine.look))
        found, revision = await asyncio.to_thread(self._look_first)
        settled_by = time.monotonic() + self._config.sync.settle_s + 0.2
        while found.pending and time.monotonic() < settled_by:
            await asyncio.sleep(_SETTLING_S)  # Somebody has just copied them in.
            found, revision = await asyncio.to_thread(self._look_first)
        self.problems = found.problems
        for problem in found.problems:
            event("entry_skipped", logging.WARNING, reason=problem)
        until = time.monotonic() + self._config.sync.start_s_max
        await self._bring(found, revision, until)
        await self._open_recent(until)
        table = replace(self._plane.table, is_complete=True)
        self._plane.table = table
        self.on_change()
        self._say_ready()
        await asyncio.to_thread(self._beat)
        self._watching = asyncio.create_task(self._watch())

    async def _open_recent(self, until: float) -> None:
        """Open what was called last before the start, as long as there is time and room."""
        for name, number in self._uses.recent():
            model = self._plane.table.models.get(name)
            is_free = model is not None and number in model.versions and not model.is_unloaded
            if model is None or not is_free or number in {*model.variants, *model.refused}:
                continue
            del model
            if time.monotonic() > until or not self.sessions.has_room(name, number):
                return
            with contextlib.suppress(GatewayError):  # said and kept by open_version
                await self.open_version(name, number)

    async def close(self) -> None:
        """Finish what waits, and end the sessions' threads."""
        self._plane.is_ready = False
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.to_thread(self._uses.note, self.sessions.ran(), at_once=True)
        await self.sessions.close()
        workers.forget(self._config.state_path, self._heartbeat().name)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.sync.poll_s * random.uniform(0.8, 1.2))  # noqa: S311  no secret
            try:
                await self.refresh()
            except Exception:  # noqa: BLE001  one bad look must not end all looking
                event("sync_failed", logging.ERROR, exc=True)

    async def refresh(self) -> None:
        """Look at registry and revisions once, and bring the table in line with them."""
        found, revision, suspected, is_news = await asyncio.to_thread(self._survey)
        self._requalify(suspected)
        self._say_ran()
        if is_news or self._is_stale:
            self._is_stale = False
            await self._bring(found, revision)
            self._say_ready()
        elif not await self._warm_one():
            return
        if self._moves:
            await asyncio.to_thread(self._record_moves)
        await asyncio.to_thread(self._beat)

    def _say_ran(self) -> None:
        if (moment := time.monotonic()) - self._said_at >= _SAY_S:
            self._said_at = moment
            self.sessions.say_ran()

    def _survey(self) -> tuple[Catalog, Revision, set[str], bool]:
        """All that a thread does while nothing is new: most of the time that is all there is."""
        found, revision = self._look()
        suspected = self.sessions.quarantine.look()
        if self._uses.is_due:
            self._uses.note(self.sessions.ran())
        is_news = found != self._found or revision.number != self._seen_revision()
        if not is_news:
            self._beat()
        return found, revision, suspected, is_news

    def _requalify(self, models: Iterable[str]) -> None:
        """Choose anew for models of which a version has come into quarantine, or left it."""
        for name in models:
            if (brought := self._brought.get(name)) is not None:
                self._brought[name] = replace(brought, versions=())
                self._is_stale = True
        held = self.sessions.quarantine.held
        told = "; ".join(f"model {name!r} version {n}: {held[name, n].reason}" for name, n in held)
        self._degrade("quarantine", told)

    def _say_ready(self) -> None:
        """Be ready once something can answer, or was unloaded on purpose; from then on always."""
        if any(
            model.champion is not None or model.default is not None or model.is_unloaded
            for model in self._plane.table.models.values()
        ):
            self._plane.is_ready = True

    def _record_moves(self) -> None:
        """Write down whom models follow by now: one worker of a host, once for all moves there are.

        At best effort: what is followed is served all the same.
        """
        moves, self._moves = self._moves, {}
        lease = Lease(self._scratch.parent / "follow.lock")
        with contextlib.suppress(RegistryError, OSError):
            if not lease.acquire():
                return  # Another worker is at it, and has seen the same.
            try:
                chain = Revisions(self._config.state_path)
                states = chain.head().models
                news = {
                    name: number
                    for name, number in moves.items()
                    if states.get(name, _FOLLOWED).aliases.get("champion") != number
                }
                if news:
                    known = changes.OnDisk(Path(self._config.registry), self._found)
                    changes.record_follow(chain, news, known)
            finally:
                lease.release()

    async def _warm_one(self) -> bool:
        """Open one version that would answer and is not open yet, as long as these are few."""
        if len(self.sessions) >= _WARM_MAX:
            return False
        for name, model in self._plane.table.models.items():
            if model.champion is None and model.default is not None:
                with contextlib.suppress(GatewayError):  # said and kept by open_version
                    await self.open_version(name, model.default)
                return True
        return False

    def _seen_revision(self) -> int:
        """The newest revision that there is nothing left to do about, for now."""
        if self._rejected is None:
            return self._revision.number
        return self._rejected.revision if time.monotonic() < self._retry_at else -1

    # -- looking

    def _look_first(self) -> tuple[Catalog, Revision]:
        """As `_look`; a registry that cannot be read at the start is an error."""
        try:
            found = self._looks.look(at_once=True)
        except RegistryError as error:
            raise StartError(f"registry {self._config.registry!r}: {error}") from None
        return found, self._head()

    def _look(self) -> tuple[Catalog, Revision]:
        """What is there now; where it cannot be read, what was there before."""
        found = self._found
        try:
            found = self._looks.look()
        except RegistryError as error:
            self._degrade("registry", str(error))
        else:
            changed = ", ".join(f"{name} {number}" for name, number in sorted(found.changed))
            self._degrade("registry", "")
            self._degrade("changed", changed)
        return found, self._head()

    def _head(self) -> Revision:
        try:
            revision = self._revisions.head()
        except RegistryError as error:
            self._degrade("state", str(error))
            return self._revision
        self._degrade("state", "; ".join(self._revisions.problems))
        return revision

    def _degrade(self, what: str, why: str) -> None:
        """Note what does not work, or that it works again; say each change once."""
        if self.degraded.get(what, "") == why:
            return
        if why:
            self.degraded[what] = why
            event("degraded", logging.WARNING, what=what, reason=why)
        else:
            del self.degraded[what]
            event("recovered", what=what)

    # -- bringing the table in line

    async def _bring(self, found: Catalog, revision: Revision, until: float | None = None) -> None:
        """Open what is needed beside what serves; when all of a revision is there, swap at once.

        Parameters
        ----------
        until : time by `monotonic` after which versions that no route names are left to their
            first call
        """
        if self._brought and any(
            (name, number) in found.pending
            for name, state in revision.models.items()
            for number in state.needed
        ):
            revision = self._revision  # It waits until the files of what it names are still.
        wanted = {
            name: _Brought(
                found.models.get(name, ()),
                frozenset(number for model, number in found.withdrawn if model == name),
                revision.models.get(name, _FOLLOWED),
            )
            for name in sorted({*found.models, *self._plane.table.models})
        }
        changed = [name for name in wanted if self._brought.get(name) != wanted[name]]
        if until is not None:
            order = {name: -k for k, (name, _) in enumerate(reversed(self._uses.recent()))}
            changed.sort(key=lambda name: order.get(name, 1))
        if revision.number > self._forgiven:
            self._forgiven = revision.number
            self._forgive(wanted)
        for name in changed:
            await self._list(name, wanted[name])
        states = revision.models
        named = {name: state for name, state in states.items() if name in wanted}
        problems = await self._prepare(named)
        is_new = revision.number != self._revision.number or self._rejected is not None
        if problems and is_new:
            self._reject(revision.number, "; ".join(problems))
            if self._brought and revision.number != self._revision.number:
                states = self._revision.models  # What was in force serves on.
            else:
                # Nothing was: the others are served as it says, not by whatever is highest.
                self._revision = revision
        elif revision.number >= self._revision.number:
            self._revision, self._rejected, self._retry_s = revision, None, 0.0
            if is_new:
                event("revision_applied", revision=revision.number, actor=revision.actor)
        self._stamp()
        for name in changed:
            brought = replace(wanted[name], state=states.get(name, _FOLLOWED))
            is_late = until is not None and time.monotonic() > until
            await self._choose(name, brought.state, is_late=is_late)
            self._brought[name] = brought
        self._found = found
        self.on_change()

    def _forgive(self, wanted: Mapping[str, _Brought]) -> None:
        """Try again what a revision names that was not named before: somebody means it."""
        for name, new in wanted.items():
            if (old := self._brought.get(name)) is not None:
                for number in new.state.needed - old.state.needed:
                    self.sessions.forgive(name, number)

    def _stamp(self) -> None:
        """Let every model say the revision in force: also those that it did not change."""
        number, table = self._revision.number, self._plane.table
        if all(model.revision == number for model in table.models.values()):
            return
        stamped = {
            name: replace(model, revision=number, routing=self._routing(name, model.routing))
            for name, model in table.models.items()
        }
        self._plane.table = replace(table, models=stamped)

    def _routing(self, name: str, before: Routing | None) -> Routing | None:
        if before is None:
            return None
        return Routing(name, before.state, self._revision.number, self._plane.telemetry)

    async def _prepare(self, states: Mapping[str, ModelState]) -> list[str]:
        """Open every version that these states need; why some could not be that must."""
        problems: list[str] = []
        for name, state in states.items():
            for number in sorted(state.needed):
                try:
                    await self.sessions.opened(name, number)
                except GatewayError as error:
                    if number in state.required:
                        problems.append(f"model {name!r} version {number}: {error}")
        return problems

    def _reject(self, number: int, reason: str) -> None:
        is_new = self._rejected is None or self._rejected.revision != number
        self._rejected = Rejection(number, reason)
        self._retry_s = 1.0 if is_new else min(2 * self._retry_s, _RETRY_S_MAX)
        self._retry_at = time.monotonic() + self._retry_s
        if is_new:
            event("revision_rejected", logging.ERROR, revision=number, reason=reason)

    async def _list(self, name: str, wanted: _Brought) -> None:
        """Put into the table which versions there are; who answers stays, unless it may not."""
        async with self.sessions.turn:
            self.sessions.note(wanted.versions)
            model = self._plane.table.models.get(name) or Model(name, ())
            variants = {n: v for n, v in model.variants.items() if n not in wanted.withdrawn}
            known = sorted({*(files.version for files in wanted.versions), *variants})
            champion = model.champion
            if champion is not None and champion.version in wanted.withdrawn:
                champion = None
                event("version_withdrawn", logging.WARNING, model=name)
            refused = self.sessions.reasons(name, known, wanted.state)
            default = wanted.state.default([n for n in known if n not in refused])
            self.sessions.put(replace(
                model,
                versions=tuple(known),
                variants=variants,
                refused=refused,
                champion=champion,
                default=default if champion is None and not model.is_unloaded else None,
            ))  # fmt: skip

    async def _choose(self, name: str, state: ModelState, *, is_late: bool) -> None:
        """Let the version answer that should."""
        model = self._plane.table.models[name]
        number = self._revision.number
        routing = None
        if state.route is not None:
            routing = Routing(name, state, number, self._plane.telemetry)
        monitoring = said_of(name, state)
        model = replace(
            model, aliases=state.aliases, routing=routing, revision=number, monitoring=monitoring
        )
        if model.is_unloaded and state.loaded is not False:
            default = state.default([n for n in model.versions if n not in model.refused])
            model = replace(model, is_unloaded=False, default=default)
        self.sessions.put(model)
        self.sessions.limit(name)
        await self.sessions.configure(name, monitoring)
        if state.loaded is False:
            del model
            await self._unload(name)
        elif not state.follow:
            await self._hand_over(name, state.aliases.get("champion"))
        elif state.loaded or not is_late:
            await self._follow(name, model.versions)

    async def _unload(self, name: str) -> None:
        """Let nothing of a model answer; its sessions close when what waits there is answered."""
        async with self.sessions.turn:
            model = self._plane.table.models[name]
            if not model.is_unloaded:
                event("model_unloaded", model=name, versions=list(model.variants))
            self.sessions.put(
                replace(model, variants={}, champion=None, default=None, is_unloaded=True)
            )

    async def _follow(self, name: str, known: Iterable[int]) -> None:
        """Let the highest version that can be opened, and fits, answer."""
        for number in sorted(known, reverse=True):
            model = self._plane.table.models[name]
            champion = model.champion
            if number in model.held or number in model.refused:
                continue
            if champion is not None and champion.version == number:
                return
            try:
                variant = await self.sessions.opened(name, number)
            except NoMemoryError:
                return  # Its first call asks for the room again; a lower version is no answer.
            except GatewayError:
                continue  # said and kept by open_version; the next lower one is tried
            if champion is not None and (why := _misfit(champion.signature, variant.signature)):
                held = {**model.held, number: why}
                self.sessions.put(replace(self._plane.table.models[name], held=held))
                event("version_held", logging.WARNING, model=name, version=number, reason=why)
                continue
            self._swap(name, variant)
            return

    async def _hand_over(self, name: str, number: int | None) -> None:
        """Let the version that the champion's alias names answer."""
        if number is None:
            return
        with contextlib.suppress(GatewayError):  # said and kept; what answers serves on
            self._swap(name, await self.sessions.opened(name, number))

    def _swap(self, name: str, variant: Variant) -> None:
        model = self._plane.table.models[name]
        before = model.champion
        if before is variant:
            return
        self.sessions.put(replace(model, champion=variant, default=None))
        if before is None:
            return
        self._plane.telemetry.counter(SWAPS, name).add()
        event("version_swapped", model=name, version=variant.version, before=before.version)
        if self._revision.models.get(name, _FOLLOWED).follow:
            self._moves[name] = variant.version
        self.sessions.retire(name)

    # -- opening

    async def open_version(self, name: str, version: int) -> Variant:
        """Open one version unless it is open already, and put it into the table.

        Raises
        ------
        NotReadyError : its model is unloaded.
        VersionRefusedError : it cannot be opened; it is not tried again until its files change.
        NoMemoryError : there is no room for it beside what routes need.
        """
        variant = await self.sessions.opened(name, version, is_call=True)
        model = self._plane.table.models[name]
        if model.champion is None and model.default == version:
            self.sessions.put(replace(model, champion=variant, default=None))
        self.on_change()
        return variant

    async def try_version(self, name: str, version: int | None = None) -> Variant:
        """Open what a load would open: the version named, else the one that would answer.

        Raises
        ------
        ModelNotFoundError, VersionNotFoundError : not in the registry.
        VersionRefusedError : it cannot be opened.
        NotReadyError : the registry cannot be read, or is being read for the first time.
        """
        if not self._plane.table.is_complete:
            raise NotReadyError("the registry is still being opened; retry")
        try:
            found = await asyncio.to_thread(catalog.scan, Path(self._config.registry))
        except RegistryError as error:
            raise NotReadyError(f"the registry cannot be read: {error}") from None
        versions = found.models.get(name)
        if versions is None:
            raise ModelNotFoundError(name, list(found.models))
        numbers = [files.version for files in versions]
        state = (await asyncio.to_thread(self._head)).models.get(name, _FOLLOWED)
        number = version or state.default(numbers) or numbers[-1]
        if number not in numbers:
            raise VersionNotFoundError(name, str(number), numbers)
        return await self.sessions.tried(versions, number)

    # -- what is told about it

    def refused_samples(self) -> "list[Sample]":
        """Refused versions of each model that ever had one, for the exposition."""
        models = self._plane.table.models
        self._had_refused |= {name for name, model in models.items() if model.refused}
        # Not a zero for each of a thousand models: with several workers it is said every second.
        return [((name,), len(models[name].refused)) for name in self._had_refused & {*models}]

    def revision_samples(self) -> "list[Sample]":
        """The revision in force, and the newest that was refused."""
        rejected = 0 if self._rejected is None else self._rejected.revision
        return [(("observed",), self.revision), (("rejected",), rejected)]

    def degraded_samples(self) -> "list[Sample]":
        """What does not work now."""
        return [((what,), 1.0) for what in self.degraded]

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            host=socket.gethostname(),
            server=self._server,
            slot=self._slot,
            pid=os.getpid(),
            sequence=self._beats,
            observed=self.revision,
            rejected=self._rejected,
            loaded=tuple(f"{name}@{number}" for name, number in self.sessions.open),
            rss_bytes=memory.resident(),
        )

    def _beat(self) -> None:
        """Say what is in force here, at once when it has changed."""
        moment, said = self._beaten
        news = (self._revision.number, self._rejected, self.sessions.open)
        if news == said and time.monotonic() - moment < _BEAT_S:
            return
        self._beats += 1
        self._beaten = (time.monotonic(), news)
        try:
            workers.beat(self._config.state_path, self._heartbeat())
        except (WriteError, OSError) as error:
            self._degrade("heartbeat", str(error))
        else:
            self._degrade("heartbeat", "")

    # -- pieces


def _misfit(now: Signature, then: Signature) -> str | None:
    """Why clients of one version could not call another; None when they can."""
    for role, ours, theirs in (
        ("input", now.inputs, then.inputs), ("output", now.outputs, then.outputs),
    ):  # fmt: skip
        was, comes = ({spec.name: spec for spec in specs} for specs in (ours, theirs))
        if was.keys() != comes.keys():
            return f"its {role}s are {sorted(comes)}, and were {sorted(was)}"
        for name, spec in was.items():
            other = comes[name]
            if (spec.datatype, spec.row_shape) != (other.datatype, other.row_shape):
                return (
                    f"its {role} {name!r} is {other.datatype} {list(other.shape)}, and was"
                    f" {spec.datatype} {list(spec.shape)}"
                )
    return None


def read_trusted(config: ServerConfig) -> trust.Keys:
    """Public keys of those whose versions are served.

    Raises
    ------
    StartError : the file cannot be used.
    """
    try:
        return trust.read_keys(Path(config.trust))
    except RegistryError as error:
        raise StartError(f"trust: {error}") from None


def look(root: Path) -> catalog.Catalog:
    """What the registry holds.

    Raises
    ------
    StartError : it cannot be read, or holds no model.
    """
    try:
        found = catalog.scan(root)
    except RegistryError as error:
        raise StartError(f"registry {str(root)!r}: {error}") from None
    if not found.models:
        why = f" ({found.problems[0]})" if found.problems else ""
        raise StartError(
            f"registry {str(root)!r}: holds no model; expected <model>/<version>/model.onnx{why}"
        )
    return found
