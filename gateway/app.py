"""Builds every object once and returns the ASGI app; the only file that sees all."""

import asyncio
import gc
import logging
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from gateway import __version__
from gateway.access import Access
from gateway.alarms import AlarmLog
from gateway.capture.log import CaptureLog, CaptureMeters
from gateway.capture.record import HEAD_LINE
from gateway.capture.shelf import Shelf
from gateway.conclusions import Shared
from gateway.config import ServerConfig
from gateway.controller import HARD_SIGNALS, Controller, deaths_of, drifts_of, readiness
from gateway.endpoints import (
    about,
    admin,
    alarms,
    contracts,
    explain,
    labels,
    monitor,
    openapi,
    pages,
    performance,
    repository,
    revisions,
    rollouts,
    shadows,
)
from gateway.endpoints.predict import Predict, is_prediction
from gateway.endpoints.route import Endpoint, no_such_path, routes
from gateway.endpoints.stream import Stream, is_stream
from gateway.exposures import Exposures
from gateway.labelling import Labelling
from gateway.labels import PredictionLog
from gateway.labels.log import LogMeters
from gateway.labels.rows import Bounds
from gateway.limits import RATES_FILE, Rates
from gateway.observer import Observer
from gateway.outcomes import OutcomeReader
from gateway.place import Place
from gateway.prediction import DataPlane
from gateway.recorder import Recorders
from gateway.refusals import RefusalWatches
from gateway.shadow import Shadows
from gateway.sync import Sync
from gateway.tap import Tap
from gateway.telemetry import (
    BREAKER_OPEN,
    BUILD,
    CAPTURE_BYTES,
    CAPTURE_DROPPED,
    CAPTURE_REMOVED,
    CAPTURED,
    DEGRADED,
    PREDICTIONS_FORGOTTEN,
    PREDICTIONS_KEPT,
    PREDICTIONS_LOST,
    QUEUED_ROWS,
    READY,
    REFUSED,
    REVISION,
    ROLLOUT_WEIGHT,
    SESSION_BYTES,
    WEBHOOKS,
    WEBHOOKS_WAITING,
    Sample,
    Telemetry,
    event,
)

if TYPE_CHECKING:
    from gateway.alarms.webhooks import Webhooks
    from gateway.grpc.carrier import Carrier
    from gateway.grpc.http2 import HTTP2Carrier

_GC_OBJECTS = 50_000
_REFRESH_S = 1.0
_LABELS_S = 2.0
_JOIN_S_MAX = 5.0

Ready = Callable[[DataPlane], None]


class App:
    """The ASGI application of one worker."""

    def __init__(
        self,
        config: ServerConfig,
        on_ready: Ready | None = None,
        grpc_host: str | None = None,
        place: Place | None = None,
    ) -> None:
        """Build everything; nothing is opened before the server's lifespan starts.

        Parameters
        ----------
        grpc_host : the address to carry the same calls over gRPC at; None: over HTTP only
        place : where the worker sits; None: this is no worker, and counts in memory
        """
        self.config = config
        self.access = Access(config)
        self._is_joining = place is not None and place.is_joining
        self.telemetry = Telemetry() if place is None else Telemetry(place.run_dir, place.name)
        tap = Tap(config.monitor.tap_rows_max, config.monitor.tap_bytes_max)
        self.plane = DataPlane(config, self.telemetry, tap)
        if place is not None and place.run_dir is not None:
            self.plane.rates = Rates(place.run_dir / RATES_FILE)
        self.alarms = AlarmLog(
            config.state_path / "alarms.jsonl", hold_off_s=config.alarms.hold_off_s
        )
        self.webhooks = _webhooks(config, self.alarms, self.telemetry, self.plane)
        self.observer = Observer(
            tap,
            _shared(config, self.telemetry, place),
            config.state_path / "references",
            self.alarms,
        )
        if config.monitor.sample:
            self.observer.refusals = RefusalWatches(
                self.telemetry, config.monitor, self.observer.shared, self.observer.spend_on
            )
        self.observer.champion_of = _champions(self.plane)
        self.sync = Sync(config, self.plane, self.observer, place)
        self._on_ready = on_ready
        self.carrier: Carrier | HTTP2Carrier | None = None
        if place is not None and place.grpc_listening is not None:
            from gateway.grpc import http2  # noqa: PLC0415  an extra

            self.carrier = http2.HTTP2Carrier(
                self.plane, self.access, place.grpc_listening, place.turns
            )
        elif grpc_host is not None:
            from gateway.grpc import carrier  # noqa: PLC0415  grpcio takes its time to load

            self.carrier = carrier.Carrier(self.plane, self.access, grpc_host)
        self.predictions = _prediction_log(config, self.telemetry)
        self.plane.predictions = self.predictions
        self.labelling = _labelling(
            config, self.predictions, self.alarms, self.observer, self.telemetry
        )
        self.sync.sessions.labelling = self.labelling
        self.captures = _captures(config, self.telemetry, place)
        self.plane.recorders = Recorders(self.captures)
        self.exposures, self.controller, self.outcomes = _rollouts(
            config, self.plane, place, self.alarms, self.predictions
        )
        self.plane.exposures = self.exposures
        self.shadows = _shadows(config, self, place)
        self.plane.copies = self.shadows.by_model
        self.sync.on_change = self.shadows.stir
        self._predict = Predict(self.plane, self.access)
        self._stream = Stream(self.plane, self.access)
        door = revisions.Door(config, self.plane)
        self.endpoints: list[Endpoint] = [
            *about.endpoints(self.plane, self.access),
            *repository.endpoints(self.plane, door),
            *monitor.endpoints(self.plane, self.observer, self.telemetry, self.labelling),
            *alarms.endpoints(self.alarms),
            *performance.endpoints(self.plane, self.predictions, self.labelling),
            *labels.endpoints(self.plane, self.predictions, self.telemetry),
            *admin.endpoints(self.plane, self.observer),
            *revisions.endpoints(self.plane, door),
            *explain.endpoints(self.plane, door, self.captures.directory),
            *rollouts.endpoints(self.plane, door, drifts_of(self.alarms)),
            *shadows.endpoints(self.plane, door, self.predictions),
            *contracts.endpoints(self.plane, self._predict),
            *openapi.endpoints(self.plane, self.declared),
            *pages.endpoints(self.plane, self.declared),
        ]
        self._rest = Starlette(
            routes=routes(self.endpoints, self.access),
            lifespan=self._lifespan,
            exception_handlers={HTTPException: no_such_path},
        )
        # A redirect would repeat the Host header of a client; a path with a slash too many is none.
        self._rest.router.redirect_slashes = False
        self._declare_gauges()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Predictions first, before any routing; everything else to starlette."""
        if scope["type"] == "http" and is_prediction(scope["path"]):
            return self._predict(scope, receive, send)
        if scope["type"] == "http" and is_stream(scope["path"]):
            return self._stream(scope, receive, send)
        return self._rest(scope, receive, send)

    def declared(self) -> list[Endpoint]:
        """Every path that is answered, also those that starlette does not see."""
        return [*openapi.predictions(), *self.endpoints]

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        if self.webhooks is not None:
            self.webhooks.start()
        self._start_labels()
        self.captures.start_if_any()
        self.observer.start()
        loading = asyncio.create_task(self._load())
        refreshing = asyncio.create_task(self._refresh())
        rolling = asyncio.create_task(self._roll())
        shadowing = asyncio.create_task(self.shadows.run(lambda: self.plane.table))
        following = asyncio.create_task(self._follow_labels())
        if self._is_joining:
            # Others answer meanwhile, or clients wait in the queue of the socket: better than 503.
            await asyncio.wait([loading], timeout=_JOIN_S_MAX)
        if self.carrier is not None:
            await self.carrier.start()
        try:
            yield
        finally:
            if self.carrier is not None:
                await self.carrier.stop()
            tasks = (loading, refreshing, rolling, shadowing, following)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.shadows.close()
            self.exposures.close()
            self.controller.close()
            await self.sync.close()
            await self.observer.stop()
            await asyncio.to_thread(self._stop_labels)
            await asyncio.to_thread(self.captures.stop)
            if self.webhooks is not None:
                await asyncio.to_thread(self.webhooks.stop)

    def _start_labels(self) -> None:
        if self.predictions is not None:
            self.predictions.start()
        if self.labelling is not None:
            self.labelling.judge.start()

    def _stop_labels(self) -> None:
        if self.labelling is not None:
            self.labelling.judge.stop()
        if self.predictions is not None:
            self.predictions.stop()

    async def _refresh(self) -> None:
        """Look at the file of keys again and again: a revoked key ends without a restart.

        And tell the other workers what the gauges say here.
        """
        while True:
            await asyncio.sleep(_REFRESH_S)
            self.access.refresh()
            if self.config.workers > 1:
                self.telemetry.refresh()

    async def _roll(self) -> None:
        """Once a second: say what variants met, and look at the rollouts if it is our turn."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                for exposure, data in self.exposures.snapshots():
                    await asyncio.to_thread(exposure.write, data)
                self.exposures.follow(await asyncio.to_thread(self.controller.tick))
            except Exception:  # noqa: BLE001  fail static: weights stay where they are
                event("rollouts_failed", logging.ERROR, exc=True)

    async def _follow_labels(self) -> None:
        """Read what labels say of rollouts; beside the controller, which must not wait for it."""
        while True:
            await asyncio.sleep(_LABELS_S)
            if not self.controller.is_holder:
                continue
            rollouts = {
                model: exposure.rollout for model, exposure in self.exposures.by_model.items()
            }
            try:
                await asyncio.to_thread(self.outcomes.look, rollouts)
            except Exception:  # noqa: BLE001  a rollout waits; it is not moved by it
                event("outcomes_not_read", logging.ERROR, exc=True)

    async def _load(self) -> None:
        try:
            await self.sync.load()
        except Exception:  # noqa: BLE001  the server stays up and says that it is not ready
            event("load_failed", logging.ERROR, exc=True)
            return
        # What is there now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        # Requests leave no cycles behind; looking for them at every 700th object cost 6 % of CPU.
        gc.set_threshold(_GC_OBJECTS, 20, 100)
        if self._on_ready is not None:
            self._on_ready(self.plane)

    def _declare_gauges(self) -> None:
        telemetry = self.telemetry
        telemetry.source(READY, lambda: [((), float(self.plane.is_ready))])
        telemetry.source(BUILD, lambda: [((__version__,), 1.0)])
        telemetry.source(REFUSED, self.sync.refused_samples)
        telemetry.source(QUEUED_ROWS, self.sync.sessions.queued_samples)
        telemetry.source(SESSION_BYTES, self.sync.sessions.session_samples)
        telemetry.source(REVISION, self.sync.revision_samples)
        telemetry.source(ROLLOUT_WEIGHT, self.exposures.weight_samples)
        telemetry.source(CAPTURE_BYTES, lambda: [((), float(self.captures.n_bytes))])
        telemetry.source(BREAKER_OPEN, lambda: self.plane.breakers.samples(self.plane.route))
        telemetry.source(DEGRADED, self._degraded)
        if (webhooks := self.webhooks) is not None:
            telemetry.source(WEBHOOKS_WAITING, lambda: [((), float(webhooks.waiting))])

    def _degraded(self) -> list[Sample]:
        parts = {"alarms": self.alarms, "labels": self.predictions, "captures": self.captures}
        return [
            *(
                ((what,), float(part.problem is not None))
                for what, part in parts.items()
                if part is not None
            ),
            *self.sync.degraded_samples(),
        ]


def _webhooks(
    config: ServerConfig, log: AlarmLog, telemetry: Telemetry, plane: DataPlane
) -> "Webhooks | None":
    """Who is told of alarms; None when nobody is."""
    if not config.alarms.targets:
        return None
    from gateway.alarms import targets  # noqa: PLC0415  httpx takes its time to load
    from gateway.alarms.webhooks import WebhookMeters, Webhooks  # noqa: PLC0415  same

    return Webhooks(
        targets.load(Path(config.alarms.targets)),
        log,
        config.state_path / "alarms.dead.jsonl",
        WebhookMeters(
            delivered=telemetry.counter(WEBHOOKS, "delivered"),
            retried=telemetry.counter(WEBHOOKS, "retried"),
            dead=telemetry.counter(WEBHOOKS, "dead"),
            refused=telemetry.counter(WEBHOOKS, "refused"),
        ),
        chosen=lambda model: (
            plane.table.models[model].monitoring.webhooks if model in plane.table.models else None
        ),
    )


def _champions(plane: DataPlane) -> Callable[[str], int | None]:
    """The version of a model that answers now, whoever asks."""

    def champion_of(name: str) -> int | None:
        model = plane.table.models.get(name)
        return None if model is None or model.champion is None else model.champion.version

    return champion_of


def _shared(config: ServerConfig, telemetry: Telemetry, place: Place | None) -> Shared:
    """Where monitor counts add up: over the workers of the host, or in this process alone."""
    if place is None or place.run_dir is None:
        return Shared(config.run_path / "monitors")
    region = telemetry.region("observer")
    return Shared(place.run_dir / "monitors", region.array, telemetry.host.array)


def _prediction_log(config: ServerConfig, telemetry: Telemetry) -> PredictionLog | None:
    """Where predictions wait for labels; None when none are kept."""
    if not config.labels.sample:
        return None
    from gateway.labels.store import Store  # noqa: PLC0415  SQLAlchemy takes its time to load

    kept = config.labels
    return PredictionLog(
        Store(config.labels_url),
        share=kept.sample / 100,
        bounds=Bounds(kept.days, kept.bytes_max, kept.wait_s),
        meters=LogMeters(
            kept=telemetry.counter(PREDICTIONS_KEPT),
            lost_full=telemetry.counter(PREDICTIONS_LOST, "queue_full"),
            lost_unwritten=telemetry.counter(PREDICTIONS_LOST, "not_written"),
            forgotten=telemetry.counter(PREDICTIONS_FORGOTTEN),
        ),
        elements_max=kept.elements_max,
        with_inputs=kept.inputs,
    )


def _captures(config: ServerConfig, telemetry: Telemetry, place: Place | None) -> CaptureLog:
    """Where captured requests go, if a route asks for any."""
    run_dir = (place.run_dir if place else None) or config.run_path
    worker = "0" if place is None else f"{place.server.removeprefix('.')}-{place.name}".strip("-")
    shelf = Shelf(
        run_dir / "captures",
        worker,
        bytes_max=config.capture.bytes_max,
        segment_bytes_max=config.capture.segment_bytes_max,
        days=config.capture.days,
        on_removed=telemetry.counter(CAPTURE_REMOVED).add,
    )
    return CaptureLog(
        shelf,
        lambda model: CaptureMeters(
            written=telemetry.counter(CAPTURED, model),
            full=telemetry.counter(CAPTURE_DROPPED, model, "queue_full"),
            large=telemetry.counter(CAPTURE_DROPPED, model, "too_large"),
            unwritten=telemetry.counter(CAPTURE_DROPPED, model, "not_written"),
        ),
        queue_bytes_max=config.capture.queue_bytes_max,
        record_bytes_max=config.capture.segment_bytes_max - len(HEAD_LINE),
    )


def _labelling(
    config: ServerConfig,
    predictions: PredictionLog | None,
    alarms: AlarmLog,
    observer: Observer,
    telemetry: Telemetry,
) -> Labelling | None:
    """What judges labels; None where no predictions wait for any."""
    if predictions is None:
        return None
    from gateway.labels.judge import Judge  # noqa: PLC0415  SQLAlchemy takes its time to load

    judge = Judge(
        predictions.store,
        alarms,
        is_judge=lambda: observer.shared.is_judge,
        spends=observer.spend_on,
        spends_not=observer.spend_no_more,
    )
    return Labelling(config, telemetry, predictions, judge)


def _rollouts(
    config: ServerConfig,
    plane: DataPlane,
    place: Place | None,
    log: AlarmLog,
    predictions: PredictionLog | None,
) -> tuple[Exposures, Controller, OutcomeReader]:
    """What counts for rollouts, what moves them, and what follows their labels."""
    run_dir = None if place is None else place.run_dir
    host, worker = _names(place)
    return (
        Exposures(config.state_path, run_dir or config.run_path, worker),
        Controller(
            config.state_path,
            run_dir or config.run_path,
            lambda: revisions.Known(Path(config.registry), plane),
            host,
            workers=readiness(config.state_path),
            deaths=deaths_of(run_dir),
            drifts=drifts_of(log),
        ),
        OutcomeReader(
            predictions.store if predictions else None,
            config.state_path,
            host,
            target=lambda model: labels.targets(plane).get(model),
            now=time.time,
        ),
    )


def _shadows(config: ServerConfig, app: App, place: Place | None) -> Shadows:
    """What runs copies of requests."""
    run_dir = None if place is None else place.run_dir
    deaths = deaths_of(run_dir)

    def crashed(pid: int) -> str:
        number = deaths(pid)
        return signal.Signals(number).name if number in HARD_SIGNALS else ""

    return Shadows(
        config.state_path,
        run_dir or config.run_path,
        _names(place)[1],
        telemetry=app.telemetry,
        reference=app.observer.reference,
        rows_max=config.batch.rows_max,
        sample=config.monitor.sample / 100,
        crashed=crashed,
        predictions=app.predictions,
    )


def _names(place: Place | None) -> tuple[str, str]:
    """Host, and host and slot, as files are called after them."""
    server = "" if place is None else place.server
    # As in heartbeats: two servers of one host must not write one file.
    host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname() + server)
    return host, f"{host}-{'0' if place is None else place.name}"
