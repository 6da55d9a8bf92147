"""Versions that are open in a worker: opened, watched over, taken out again, closed.

What is opened is put into the data plane's table; which version answers is decided elsewhere
(`gateway/sync.py`). A session is closed when nobody holds its variant any more: not the table, and
no request.
"""

import asyncio
import contextlib
import logging
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from gateway import memory
from gateway.batcher import Batcher, BatchMeters, Observe, Run
from gateway.config import ServerConfig
from gateway.errors import (
    ModelNotFoundError,
    NoMemoryError,
    UnloadedError,
    VersionNotFoundError,
    VersionRefusedError,
)
from gateway.labelling import Labelling
from gateway.limits import BatchLimits, batch_limits
from gateway.loader import Loaded, Loader, Opening
from gateway.memory import Key, Ledger
from gateway.monitored import monitor_config
from gateway.observer import Observer
from gateway.prediction import DataPlane
from gateway.protocol import v2_json
from gateway.protocol.call import Served
from gateway.quarantine import Quarantine
from gateway.router import NEWEST_RAN_MS, SHARED_N, SHARED_NS, Meters, Model, Variant
from gateway.runtime import Trial
from gateway.tap import Observation
from gateway.telemetry import (
    ALARMS,
    BATCH_ROWS,
    EVICTIONS,
    OBSERVED,
    OBSERVER_ERRORS,
    QUEUE_SECONDS,
    RUN_SECONDS,
    RUNS_ENDED,
    SHED,
    TAP_DROPPED,
    Sample,
    event,
)
from gateway.tensors import DTYPES, Array, n_bytes
from gateway.watch import Watch, WatchMeters, adopted
from gateway.watchdog import Watchdog
from monitors import Profile
from registry import catalog
from registry.catalog import VersionFiles
from registry.errors import RegistryError
from registry.monitoring import Monitoring
from registry.revisions import ModelState
from registry.signature import Signature

_BYTES_A_SECOND = 50_000_000
_GIVE_UP_S = 5.0
"""An opening that has not ended so long after it was asked to never will."""
_TURN_S = 0.0005
_EVICT_S_MAX = 2.0
"""A version that is evicted while a request holds it makes room later."""


class Sessions:
    """The open versions of one worker.

    Parameters
    ----------
    state_of : what is in force for a model
    admit : told which bytes a version held when it was opened
    """

    def __init__(
        self,
        config: ServerConfig,
        plane: DataPlane,
        observer: Observer,
        loader: Loader,
        run_dir: Path | None,
        state_of: Callable[[str], ModelState],
        admit: Callable[[VersionFiles, str], None],
    ) -> None:
        self._config = config
        self._plane = plane
        self._observer = observer
        self._loader = loader
        self._state_of = state_of
        self._admit = admit
        self.ledger = Ledger(memory.budget(config.sync.memory_bytes_max, config.workers))
        self.turn = asyncio.Lock()
        """Held by whoever opens a version, or must not see one opened meanwhile."""
        self.files: dict[Key, VersionFiles] = {}
        """Where every version in the registry is."""
        self._refused: dict[Key, tuple[str, str]] = {}
        """Fingerprint of the files that were refused, and the reason."""
        self._batchers: dict[Key, Batcher] = {}
        self._adopted: dict[Key, Profile] = {}
        self._said: dict[str, Monitoring] = {}
        """What revisions say about the monitors of models, where they say anything."""
        self.labelling: Labelling | None = None
        """Told of every version that is opened, where labels are judged."""
        # Counts outlive a version that is closed and opened again: they never go backwards.
        self._work: dict[Key, BatchMeters] = {}
        self._meters: dict[Key, Meters] = {}
        self._watchdog = Watchdog()
        self._closing: set[asyncio.Task[None]] = set()
        self._left = asyncio.Event()
        self.quarantine = Quarantine(run_dir)
        self._alive: WeakValueDictionary[Key, Variant] = WeakValueDictionary()
        """Also those that have left the table, while somebody holds them."""

    def __len__(self) -> int:
        return len(self._batchers)

    async def configure(self, name: str, said: Monitoring) -> None:
        """Let the monitors of a model be as its revision says from now on."""
        if self._said.get(name, Monitoring()) == said:
            return
        self._said[name] = said
        await self._observer.configure(name, monitor_config(self._config.monitor, said))
        if self.labelling is not None:
            await asyncio.to_thread(self.labelling.configure, name, said)

    @property
    def open(self) -> tuple[Key, ...]:
        """Every version that is open."""
        return tuple(self._batchers)

    @property
    def _references(self) -> Path:
        return self._config.state_path / "references"

    async def start(self) -> None:
        """Read what was adopted; from now on versions can be opened."""
        self._loop = asyncio.get_running_loop()
        self._adopted = await asyncio.to_thread(adopted, self._references)

    async def close(self) -> None:
        """Finish what waits, and end the sessions' threads."""
        batchers = list(self._batchers.values())
        await asyncio.gather(*(batcher.close() for batcher in batchers), *self._closing)
        self._watchdog.stop()
        self.quarantine.under_way.close()

    def note(self, versions: Iterable[VersionFiles]) -> None:
        """Remember where files are; those that have changed since they were refused are new."""
        for files in versions:
            key = (files.model, files.version)
            self.files[key] = files
            if key in self._refused and self._refused[key][0] != files.fingerprint:
                del self._refused[key]

    def ran(self) -> list[tuple[Key, float]]:
        """When each version last ran, by `time.monotonic`; 0: never."""
        return [(key, work.ran_at) for key, work in list(self._work.items())]

    def say_ran(self) -> None:
        """Let other workers know when versions ran last; for the loop."""
        since = time.time() - time.monotonic()
        for (name, version), work in self._work.items():
            if work.ran_at:
                cell = self._plane.telemetry.cell(NEWEST_RAN_MS, name, str(version))
                cell.cells[cell.at] = int((since + work.ran_at) * 1000)

    def has_room(self, name: str, version: int) -> bool:
        """Whether a version can be opened and nothing has to leave for it."""
        wanted = memory.estimate(_size(self.files[name, version]))
        return self.ledger.victims(wanted, ()) is not None

    def forgive(self, name: str, version: int) -> None:
        """Try a version again that was refused, or is in quarantine."""
        self._refused.pop((name, version), None)
        self.quarantine.lift((name, version))

    def reasons(self, name: str, known: Iterable[int], state: ModelState) -> dict[int, str]:
        """Versions of a model that are not opened, or not by themselves, and why.

        One in quarantine answers on where a revision names it: people put it there.
        """
        named, found = state.needed, {}
        for number in known:
            held = self.quarantine.held.get((name, number))
            if held is not None and (held.is_of_opening or number not in named):
                found[number] = held.reason
            elif (name, number) in self._refused:
                found[number] = self._refused[name, number][1]
        return found

    async def opened(self, name: str, version: int, *, is_call: bool = False) -> Variant:
        """A version, opened now unless it is open already, and in the table.

        Parameters
        ----------
        is_call : somebody calls it; what is unloaded is opened for nobody but the registry

        Raises
        ------
        NotReadyError : its model is unloaded.
        VersionRefusedError : it cannot be opened; it is not tried again until its files change.
        NoMemoryError : there is no room for it beside what routes need.
        """
        async with self.turn:
            model = self._plane.table.models.get(name)
            if model is None:
                raise ModelNotFoundError(name, list(self._plane.table.models))
            if is_call and model.is_unloaded:
                raise UnloadedError(name)
            if (variant := model.variants.get(version)) is not None:
                return variant
            if version not in model.versions:
                raise VersionNotFoundError(name, str(version), model.versions)
            if version in model.refused:
                raise VersionRefusedError(
                    f"model {name!r} version {version} was refused: {model.refused[version]}"
                )
            del model  # Held while others leave the table, it would keep their sessions open.
            variant = self._alive.get((name, version)) or await self._open(name, version)
            model = self._plane.table.models[name]
            self.put(replace(model, variants={**model.variants, version: variant}))
            return variant

    async def tried(self, versions: Sequence[VersionFiles], version: int) -> Variant:
        """A version that is in the registry now, opened to see whether it can be; hold it.

        Where its model is unloaded it comes into the table only when a revision says so.

        Raises
        ------
        VersionRefusedError, NoMemoryError
        """
        name = versions[-1].model
        async with self.turn:
            self.note(versions)
            self.forgive(name, version)
            model = self._plane.table.models.get(name) or Model(name, ())
            known = sorted({*(files.version for files in versions), *model.variants})
            refused = self.reasons(name, known, self._state_of(name))
            self.put(replace(model, versions=tuple(known), refused=refused))
            del model
            return self._alive.get((name, version)) or await self._open(name, version)

    async def _open(self, name: str, version: int) -> Variant:
        files = self.files[name, version]
        await self._make_room(files)
        start = time.perf_counter()
        try:
            loaded = await self._loaded(files)
        except VersionRefusedError as error:
            self._refuse(files, str(error))
            raise
        self._admit(files, loaded.digest)
        is_new = (name, version) not in self._work
        variant = self._alive[name, version] = self._variant(files, loaded)
        self.ledger.enter((name, version), loaded.n_bytes)
        if is_new:
            await self._monitor(files, loaded)
        event(
            "version_opened",
            model=name,
            version=version,
            seconds=round(time.perf_counter() - start, 3),
            **variant.about,
        )
        return variant

    async def _loaded(self, files: VersionFiles) -> Loaded:
        """Open on a thread of its own, which is left behind if it does not end.

        Raises
        ------
        VersionRefusedError : it cannot be opened, or not in time.
        """
        name, version = files.model, files.version
        opening = Opening()
        done: asyncio.Future[None] = self._loop.create_future()
        outcomes: list[Loaded | Exception] = []

        def work() -> None:
            try:
                outcomes.append(self._loader.load(files, opening))
            except Exception as error:  # noqa: BLE001  raised again where it is waited for
                outcomes.append(error)
            with contextlib.suppress(RuntimeError):  # It took so long that the loop has ended.
                self._loop.call_soon_threadsafe(done.set_result, None)

        limit_s = self._config.sync.open_s_max + _size(files) // _BYTES_A_SECOND
        threading.Thread(target=work, name=f"open {name} {version}", daemon=True).start()
        with self.quarantine.under_way.opening((name, version)), _quick_turns():
            try:
                async with asyncio.timeout(limit_s):
                    await asyncio.shield(done)
                outcome = outcomes.pop()
                if isinstance(outcome, Loaded):
                    return outcome
                try:
                    raise outcome
                finally:
                    # An error that its own frames know holds them, and all versions they know.
                    del outcome
            except TimeoutError:
                opening.give_up()
                await asyncio.wait([done], timeout=_GIVE_UP_S)
        self.quarantine.note((name, version), "open_stuck")
        if not done.done() and self._plane.recycle is not None:
            self._plane.recycle("open_stuck")  # Only the end of its process ends it.
        raise VersionRefusedError(
            f"cannot be opened: it was not done after {limit_s:g} s (sync.open_s_max)"
        )

    def _refuse(self, files: VersionFiles, reason: str) -> None:
        name, version = files.model, files.version
        self._refused[name, version] = (files.fingerprint, reason)
        model = self._plane.table.models[name]
        refused = {**model.refused, version: reason}
        default = model.default
        if default == version:
            state = self._state_of(name)
            default = state.default([n for n in model.versions if n not in refused])
        self.put(replace(model, refused=refused, default=default))
        event("version_refused", logging.ERROR, model=name, version=version, reason=reason)

    async def _make_room(self, files: VersionFiles) -> None:
        """Close versions that no route needs, until there is room for this one.

        Raises
        ------
        NoMemoryError : even then there is none.
        """
        wanted = memory.estimate(_size(files))
        idle = [
            (variant.work.ran_at, (name, number))
            for name, model in self._plane.table.models.items()
            for number, variant in model.variants.items()
            if number not in self._needed(name)
        ]
        victims = self.ledger.victims(wanted, [key for _, key in sorted(idle)])
        if victims is None:
            used, allowed = self.ledger.used_bytes, self.ledger.budget_bytes
            raise NoMemoryError(files.model, files.version, wanted, used, allowed)
        for name, number in victims:
            self.take_out(name, {number})
            self._plane.telemetry.counter(EVICTIONS, name).add()
            event("version_evicted", model=name, version=number)
        await self.gone(victims, _EVICT_S_MAX)

    def _needed(self, name: str) -> set[int]:
        """Versions of a model that are never evicted."""
        state = self._state_of(name)
        champion = self._plane.table.models[name].champion
        return state.needed | ({champion.version} if champion is not None else set())

    def _by_use(self, name: str) -> list[int]:
        """Open versions of a model, the one least recently used first."""
        variants = self._plane.table.models[name].variants
        return sorted(variants, key=lambda number: variants[number].work.ran_at)

    def retire(self, name: str) -> None:
        """Take out of the table what nothing names any more, the newest of them excepted.

        The one that answered last stays for an instant way back, as long as memory allows.
        """
        needed = self._needed(name)
        idle = [number for number in self._by_use(name) if number not in needed]
        self.take_out(name, idle[:-1])

    def take_out(self, name: str, leaving: Container[int]) -> None:
        """Take open versions out of the table; nobody who awaits may hold the model before."""
        model = self._plane.table.models[name]
        variants = {n: v for n, v in model.variants.items() if n not in leaving}
        self.put(replace(model, variants=variants))

    async def gone(self, keys: Iterable[Key], timeout_s: float) -> None:
        """Return when the sessions of these versions are closed, or a while later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(key in self._batchers for key in keys):
                    self._left.clear()
                    await self._left.wait()
                await asyncio.gather(*self._closing)

    def _release(self, key: Key, batcher: Batcher) -> None:
        """Nobody holds a variant any more: close what is behind it. Called by any thread."""
        with contextlib.suppress(RuntimeError):  # The loop has ended, and everything with it.
            self._loop.call_soon_threadsafe(self._close_one, key, batcher)

    def _close_one(self, key: Key, batcher: Batcher) -> None:
        if self._batchers.get(key) is batcher:
            del self._batchers[key]
            self.ledger.leave(key)
            self._left.set()
        task = asyncio.create_task(_closed([batcher]))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # -- what is told about it

    def queued_samples(self) -> "list[Sample]":
        """Rows waiting by version, for the exposition."""
        return [
            ((name, str(version)), batcher.rows_queued)
            for (name, version), batcher in self._batchers.items()
        ]

    def session_samples(self) -> "list[Sample]":
        """Memory by open version, for the exposition."""
        return [
            ((name, str(version)), float(size))
            for (name, version), size in self.ledger.sessions.items()
        ]

    # -- a variant of what was opened

    def _variant(self, files: VersionFiles, loaded: Loaded) -> Variant:
        config, telemetry = self._config, self._plane.telemetry
        session, trial = loaded.session, loaded.trial
        name, version, signature = files.model, files.version, session.signature
        labels = (name, str(version))
        if (name, version) not in self._work:
            self._meters[name, version] = Meters(telemetry, name, version, "champion", "primary")
            self._work[name, version] = BatchMeters(
                queue_s=telemetry.histogram(QUEUE_SECONDS, *labels),
                run_s=telemetry.histogram(RUN_SECONDS, *labels),
                rows=telemetry.histogram(BATCH_ROWS, *labels),
                refused=telemetry.counter(SHED, *labels, "queue_full"),
                late=telemetry.counter(SHED, *labels, "deadline_exceeded"),
                gone=telemetry.counter(SHED, *labels, "client_gone"),
                ended=telemetry.counter(RUNS_ENDED, *labels),
                shared_n=telemetry.cell(SHARED_N, *labels),
                shared_ns=telemetry.cell(SHARED_NS, *labels),
            )
        observe, limits = self._tapped(name, version, signature), self._limits(name)
        batcher = Batcher(
            self._noted(name, version, session.run),
            model=name,
            version=version,
            can_batch=trial.can_batch,
            is_inline=trial.is_inline,
            **limits,
            inline_s_max=config.runtime.inline_s_max,
            inline_rows_max=trial.rows_within(config.runtime.inline_s_max),
            has_free_axes=any(-1 in spec.row_shape for spec in signature.inputs),
            observe=observe if self._plane.sample >= 1 else None,
            meters=self._work[name, version],
            stop=session.stop,
            watchdog=self._watchdog,
            on_stuck=partial(self._replace_process, name, version),
            on_ended=partial(self._ended, name, version),
        )
        self._batchers[name, version] = batcher
        variant = Variant(
            served=Served(name, version, signature, v2_json.answer_head(name, version)),
            queue=batcher,
            observe=observe,
            meters=self._meters[name, version],
            about=about(trial, limits["rows_max"]),
            work=self._work[name, version],
            can_batch=trial.can_batch,
            twin=session.twin,
        )
        weakref.finalize(variant, self._release, (name, version), batcher)
        return variant

    def limit(self, name: str) -> None:
        """Have the open versions of a model batch and queue as its route says; nothing reopens."""
        limits = self._limits(name)
        for (model, _), batcher in self._batchers.items():
            if model == name:
                batcher.set_limits(**limits)

    def _limits(self, name: str) -> BatchLimits:
        """Of the route in force, over the settings."""
        model = self._plane.table.models.get(name)
        return batch_limits(self._config, None if model is None else model.route)

    def _ended(self, name: str, version: int) -> None:
        """A run was asked to end. Called by any thread."""
        if self._plane.exposures is not None:
            self._plane.exposures.ended(name, version)

    def _replace_process(self, name: str, version: int) -> None:
        """A run does not end: only the end of its process ends it."""
        event("run_stuck", logging.ERROR, model=name, version=version)
        self.quarantine.note((name, version), "run_stuck")
        if self._plane.recycle is not None:
            self._plane.recycle("run_stuck")

    def _noted(self, name: str, version: int, run: Run) -> Run:
        """A run that says it is under way where that outlives the process."""
        cells, at = self.quarantine.under_way.cell((name, version))

        def noted(inputs: list[Array]) -> list[Array]:
            exposures = self._plane.exposures
            cells[at] += 1
            try:
                if exposures is None or name not in exposures.by_model:
                    return run(inputs)
                exposures.run(name, version, 1)
                try:
                    return run(inputs)
                finally:
                    exposures.run(name, version, -1)
            finally:
                cells[at] -= 1

        return noted

    def _tapped(self, name: str, version: int, signature: Signature) -> Observe:
        """Offers to the tap what ran: whole runs, whose rows are stacked already, or requests."""
        tap, bytes_a_row = self._plane.tap, row_bytes(signature)
        dropped = self._plane.telemetry.counter(TAP_DROPPED, name, str(version))

        said, all_ = self._said, self._plane.sample

        def observe(inputs: list[Array], outputs: list[Array], rows: int) -> None:
            # A share of what is offered here: the server has taken its own sample before.
            share = said[name].sample if name in said else None
            if share is not None and random.random() * all_ * 100 >= share:  # noqa: S311  no secret
                return
            size = bytes_a_row * rows or n_bytes(inputs) + n_bytes(outputs)
            tap.offer(Observation(name, version, inputs, outputs, rows, size), dropped)

        return observe

    async def _monitor(self, files: VersionFiles, loaded: Loaded) -> None:
        """Have the observer watch a version, by an adopted profile or its own."""
        labels = (files.model, str(files.version))
        telemetry = self._plane.telemetry
        watch = Watch(
            files.model,
            files.version,
            loaded.session.signature,
            config=monitor_config(self._config.monitor, self._said.get(files.model, Monitoring())),
            shared=self._observer.shared,
            references=self._references,
            meters=WatchMeters(
                observed=telemetry.counter(OBSERVED, *labels),
                dropped=telemetry.counter(TAP_DROPPED, *labels),
                errors=telemetry.counter(OBSERVER_ERRORS, *labels),
                pages=telemetry.counter(ALARMS, *labels, "page"),
                warnings=telemetry.counter(ALARMS, *labels, "warning"),
            ),
        )
        await asyncio.to_thread(self._give_reference, watch, loaded)
        for problem in watch.problems:
            event(
                "reference_problem",
                logging.WARNING,
                model=files.model,
                version=files.version,
                reason=problem,
            )
        self._observer.add(watch)
        if (labelling := self.labelling) is not None:
            signature = loaded.session.signature
            await asyncio.to_thread(
                labelling.opened,
                files.model,
                files.version,
                signature,
                loaded.labels,
                loaded.labels_problem,
            )

    def _give_reference(self, watch: Watch, loaded: Loaded) -> None:
        """Judge by an adopted profile, else by the version's own; else wait for one."""
        if (profile := self._adopted.get((watch.model, watch.version))) is not None:
            watch.judge_by(profile, "adopted")
        elif loaded.profile is not None:
            watch.judge_by(loaded.profile, "reference.json")
        elif loaded.problem:
            watch.problems = [loaded.problem]
        elif self._config.monitor.adopt_rows and watch.can_adopt:
            watch.adopt(self._config.monitor.adopt_rows)

    def put(self, model: Model) -> None:
        """Let a model in the table be this from now on."""
        self._plane.table = self._plane.table.replaced(model)


async def _closed(held: list[Batcher]) -> None:
    """Finish what waits, and free the session on a thread: that of a large model takes its time."""
    await held[0].close()
    await asyncio.to_thread(held.clear)


@contextlib.contextmanager
def _quick_turns() -> Iterator[None]:
    """While a thread works beside the loop, let the loop have its turn soon.

    The interpreter takes turns of 5 ms by default: as long would a request wait for whoever hashes,
    parses and measures.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _size(files: VersionFiles) -> int:
    if files.manifest is not None:
        return files.manifest.bytes
    try:
        return sum(
            (files.directory / name).stat().st_size for name in catalog.content(files.directory)
        )
    except (OSError, RegistryError):
        return 0


def about(trial: Trial, rows_max: int) -> dict[str, object]:
    """What the warm-up found, in words and numbers for people."""
    return {
        "batched": f"up to {rows_max} rows" if trial.can_batch else f"no: {trial.reason}",
        "runs": "inline" if trial.is_inline else "on a thread",
        "run_us": {str(rows): round(run_s * 1e6, 1) for rows, run_s in trial.run_s.items()},
    }


def row_bytes(signature: Signature) -> int:
    """Memory of one row of all tensors; 0 when that differs from request to request."""
    total = 0
    for spec in (*signature.inputs, *signature.outputs):
        if spec.datatype == "BYTES" or -1 in spec.row_shape or spec.shape[:1] != (-1,):
            return 0
        elements = 1
        for size in spec.row_shape:
            elements *= size
        total += elements * DTYPES[spec.datatype].itemsize
    return total
