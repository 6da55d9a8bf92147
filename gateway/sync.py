"""A worker's view of the registry: looks, opens and warms beside, then swaps one table.

Opening is done off the event loop, one version at a time. A version that cannot be opened is
refused with its reason, and the others serve on.
"""

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

from gateway.batcher import Batcher, BatchMeters, Observe
from gateway.columns import named
from gateway.config import ServerConfig
from gateway.errors import (
    ModelNotFoundError,
    NotReadyError,
    StartError,
    VersionNotFoundError,
    VersionRefusedError,
)
from gateway.observer import Observer, Watch, WatchMeters, adopted
from gateway.prediction import DataPlane
from gateway.protocol import v2_json
from gateway.protocol.call import Served
from gateway.router import Meters, Model, Variant
from gateway.runtime import Session, Trial
from gateway.tap import Observation
from gateway.telemetry import (
    ALARMS,
    BATCH_ROWS,
    OBSERVED,
    OBSERVER_ERRORS,
    QUEUE_SECONDS,
    RUN_SECONDS,
    SHED,
    TAP_DROPPED,
    Sample,
    event,
)
from gateway.tensors import DTYPES, Array, n_bytes
from monitors import MonitorError, Profile
from registry import catalog
from registry.catalog import VersionFiles
from registry.errors import RegistryError
from registry.signature import Signature


class Sync:
    """Brings what is in the registry into the table of the data plane."""

    def __init__(self, config: ServerConfig, plane: DataPlane, observer: Observer) -> None:
        self._config = config
        self._plane = plane
        self._observer = observer
        self._files: dict[tuple[str, int], VersionFiles] = {}
        self._batchers: dict[tuple[str, int], Batcher] = {}
        self._adopted: dict[tuple[str, int], Profile] = {}
        # Counts outlive a version that is closed and opened again: they never go backwards.
        self._work: dict[tuple[str, int], BatchMeters] = {}
        self._meters: dict[tuple[str, int], Meters] = {}
        self._opening = asyncio.Lock()
        self.problems: tuple[str, ...] = ()
        plane.open_version = self.open_version
        plane.load_model = self.load_model
        plane.unload_model = self.unload_model

    @property
    def _references(self) -> Path:
        return self._config.state_path / "references"

    async def load(self) -> None:
        """Open the highest version of every model that can be opened, then be ready."""
        found = await asyncio.to_thread(look, Path(self._config.registry))
        self._adopted = await asyncio.to_thread(adopted, self._references)
        self.problems = found.problems
        for problem in found.problems:
            event("entry_skipped", logging.WARNING, reason=problem)
        for name, versions in found.models.items():
            self._files.update({(name, files.version): files for files in versions})
            numbers = tuple(files.version for files in versions)
            self._put(Model(name, numbers))
        for name, versions in found.models.items():
            for files in reversed(versions):
                try:
                    await self.open_version(name, files.version)
                except VersionRefusedError:
                    continue  # said and kept by open_version; the next lower one is tried
                break
        self._plane.table = replace(self._plane.table, is_complete=True)
        self._plane.is_ready = any(
            model.champion is not None for model in self._plane.table.models.values()
        )

    async def open_version(self, name: str, version: int) -> Variant:
        """Open one version unless it is open already, and put it into the table.

        Raises
        ------
        VersionRefusedError : it cannot be opened; it is not tried again.
        """
        async with self._opening:
            model = self._plane.table.models[name]
            picked = model.pick(str(version))
            if isinstance(picked, Variant):
                return picked
            files = self._files[name, version]
            start = time.perf_counter()
            try:
                session, trial = await asyncio.to_thread(self._open, files)
            except VersionRefusedError as error:
                self._put(replace(model, refused={**model.refused, version: str(error)}))
                event(
                    "version_refused",
                    logging.ERROR,
                    model=name,
                    version=version,
                    reason=str(error),
                )
                raise
            is_new = (name, version) not in self._work
            variant = self._variant(files, session, trial)
            if is_new:
                await self._watch(files, session.signature)
            champion = model.champion
            if champion is None or champion.version < version:
                champion = variant
            variants = {**model.variants, version: variant}
            self._put(replace(model, variants=variants, champion=champion))
            event(
                "version_opened",
                model=name,
                version=version,
                seconds=round(time.perf_counter() - start, 3),
                **variant.about,
            )
            return variant

    async def load_model(self, name: str, version: int | None = None) -> Variant:
        """Open a version that is in the registry now: the highest one, unless one is named.

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
        number = numbers[-1] if version is None else version
        if number not in numbers:
            raise VersionNotFoundError(name, str(number), numbers)
        async with self._opening:
            self._files.update({(name, files.version): files for files in versions})
            model = self._plane.table.models.get(name) or Model(name, ())
            known = tuple(sorted({*numbers, *model.variants}))
            refused = {n: reason for n, reason in model.refused.items() if n != number}
            self._put(replace(model, versions=known, refused=refused, is_unloaded=False))
        variant = await self.open_version(name, number)
        self._plane.is_ready = True
        return variant

    async def unload_model(self, name: str) -> None:
        """Close every open version of a model, once what waits there is answered.

        Raises
        ------
        ModelNotFoundError : no such model.
        """
        async with self._opening:
            model = self._plane.table.model(name)
            self._put(replace(model, variants={}, champion=None, is_unloaded=True))
            batchers = [self._batchers.pop((name, version)) for version in model.variants]
        await asyncio.gather(*(batcher.close() for batcher in batchers))
        event("model_unloaded", model=name, versions=list(model.variants))

    async def close(self) -> None:
        """Finish what waits, and end the sessions' threads."""
        self._plane.is_ready = False
        await asyncio.gather(*(batcher.close() for batcher in self._batchers.values()))

    def refused_samples(self) -> "list[Sample]":
        """Refused versions by model, for the exposition."""
        return [((model.name,), len(model.refused)) for model in self._plane.table.models.values()]

    def queued_samples(self) -> "list[Sample]":
        """Rows waiting by version, for the exposition."""
        return [
            ((name, str(version)), batcher.rows_queued)
            for (name, version), batcher in self._batchers.items()
        ]

    def _open(self, files: VersionFiles) -> tuple[Session, Trial]:
        session = Session(files.model_file, self._config.runtime)
        session.signature = named(session.signature, files.reference_file)
        return session, session.try_out(self._config.batch, self._config.runtime)

    def _variant(self, files: VersionFiles, session: Session, trial: Trial) -> Variant:
        config, telemetry = self._config, self._plane.telemetry
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
            )
        observe = self._tapped(name, version, signature)
        batcher = Batcher(
            session.run,
            model=name,
            version=version,
            can_batch=trial.can_batch,
            is_inline=trial.is_inline,
            rows_max=config.batch.rows_max,
            wait_s_max=config.batch.wait_s_max,
            queue_rows_max=config.limits.queue_rows_max,
            inline_s_max=config.runtime.inline_s_max,
            has_free_axes=any(-1 in spec.row_shape for spec in signature.inputs),
            observe=observe if self._plane.sample >= 1 else None,
            meters=self._work[name, version],
        )
        self._batchers[name, version] = batcher
        return Variant(
            served=Served(name, version, signature, v2_json.answer_head(name, version)),
            queue=batcher,
            observe=observe,
            meters=self._meters[name, version],
            about=about(trial, config.batch.rows_max),
            work=self._work[name, version],
            can_batch=trial.can_batch,
        )

    def _tapped(self, name: str, version: int, signature: Signature) -> Observe:
        """Offers to the tap what ran: whole runs, whose rows are stacked already, or requests."""
        tap, bytes_a_row = self._plane.tap, row_bytes(signature)
        dropped = self._plane.telemetry.counter(TAP_DROPPED, name, str(version))

        def observe(inputs: list[Array], outputs: list[Array], rows: int) -> None:
            size = bytes_a_row * rows or n_bytes(inputs) + n_bytes(outputs)
            tap.offer(Observation(name, version, inputs, outputs, rows, size), dropped)

        return observe

    async def _watch(self, files: VersionFiles, signature: Signature) -> None:
        labels = (files.model, str(files.version))
        telemetry = self._plane.telemetry
        watch = Watch(
            files.model,
            files.version,
            signature,
            window_rows=self._config.monitor.window_rows,
            references=self._references,
            meters=WatchMeters(
                observed=telemetry.counter(OBSERVED, *labels),
                dropped=telemetry.counter(TAP_DROPPED, *labels),
                errors=telemetry.counter(OBSERVER_ERRORS, *labels),
                alarms=telemetry.counter(ALARMS, *labels),
            ),
        )
        await asyncio.to_thread(self._give_reference, watch, files)
        for problem in watch.problems:
            event(
                "reference_problem",
                logging.WARNING,
                model=files.model,
                version=files.version,
                reason=problem,
            )
        self._observer.add(watch)

    def _give_reference(self, watch: Watch, files: VersionFiles) -> None:
        """Judge by an adopted profile, else by the version's own; else wait for one."""
        if (profile := self._adopted.get((files.model, files.version))) is not None:
            watch.judge_by(profile, "adopted")
            return
        try:
            watch.judge_by(Profile.from_json(files.reference_file.read_bytes()), "reference.json")
        except FileNotFoundError:
            if self._config.monitor.adopt_rows and watch.can_adopt:
                watch.adopt(self._config.monitor.adopt_rows)
        except OSError:
            watch.problems = ["reference.json cannot be read"]
        except MonitorError as error:
            watch.problems = [f"reference.json: {error}"]

    def _put(self, model: Model) -> None:
        self._plane.table = self._plane.table.replaced(model)


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
