"""Every metric and log field, declared once; the text that Prometheus reads; the log lines.

Label values come from closed sets (served models and versions, error codes of this program, bins of
a profile): names that clients make up add no series.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gateway import counters
from gateway.counters import Counter, Gauge, Histogram, HostCounts, Region

log = logging.getLogger("driftgate")

_LATENCY_BOUNDS = tuple(
    step * decade for decade in (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0) for step in (1, 2.5, 5)
)[:-1]
_ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True, eq=False)  # Looked up often: by what it is, not by its text.
class Family:
    """One metric: a name, what it means, and the labels that tell its series apart."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    is_optional: bool = False
    """Only at /metrics/bins."""
    merge: Literal["sum", "max", "min", "latest"] = "max"
    """What a gauge is for the host, of what its live workers say. The others are added up."""


_VERSION = ("model", "version")
_FAMILIES: list[Family] = []


def _declare(family: Family) -> Family:
    _FAMILIES.append(family)
    return family


REQUESTS = _declare(
    Family(
        "driftgate_requests_total",
        "counter",
        "Requests answered.",
        (*_VERSION, "variant", "traffic", "code"),
    )
)
REJECTED = _declare(
    Family(
        "driftgate_rejected_total",
        "counter",
        "Requests refused before a version was picked: no such model, too large, not readable.",
        ("code",),
    )
)
UNIT_FALLBACK = _declare(
    Family(
        "driftgate_unit_fallback_total",
        "counter",
        "Requests without the first unit of their route, by the unit that was taken instead.",
        ("model", "unit"),
    )
)
REQUEST_SECONDS = _declare(
    Family(
        "driftgate_request_seconds",
        "histogram",
        "From the first byte read to the answer handed to the socket.",
        (*_VERSION, "variant", "traffic"),
        _LATENCY_BOUNDS,
    )
)
QUEUE_SECONDS = _declare(
    Family(
        "driftgate_queue_seconds",
        "histogram",
        "From a request's rows queued to their batch started.",
        _VERSION,
        _LATENCY_BOUNDS,
    )
)
RUN_SECONDS = _declare(
    Family(
        "driftgate_run_seconds",
        "histogram",
        "One batch run by its session.",
        _VERSION,
        _LATENCY_BOUNDS,
    )
)
BATCH_ROWS = _declare(
    Family("driftgate_batch_rows", "histogram", "Rows in one batch.", _VERSION, _ROWS_BOUNDS)
)
QUEUED_ROWS = _declare(
    Family("driftgate_queued_rows", "gauge", "Rows waiting for their batch.", _VERSION, merge="sum")
)
SHED = _declare(
    Family(
        "driftgate_shed_total",
        "counter",
        "Requests dropped before they ran: queue_full, deadline_exceeded, client_gone; by the"
        " limits of a model, whatever version (none is named): model_busy, rate_limited.",
        (*_VERSION, "reason"),
    )
)
SHADOW_PAIRS = _declare(
    Family(
        "driftgate_shadow_pairs_total",
        "counter",
        "Requests that a shadow was compared on, by what came of it: agree, differ, failed.",
        (*_VERSION, "is"),
    )
)
SHADOW_DROPPED = _declare(
    Family(
        "driftgate_shadow_dropped_total",
        "counter",
        "Copies that were not compared: inflight_max, bytes_max, champion_busy, deadline_exceeded,"
        " stuck, not_compared.",
        (*_VERSION, "reason"),
    )
)
BREAKER_OPEN = _declare(
    Family(
        "driftgate_breaker_open",
        "gauge",
        "Workers that leave a version alone, or only probe it, of routes with a breaker.",
        _VERSION,
        merge="sum",
    )
)
BREAKER_OPENED = _declare(
    Family(
        "driftgate_breaker_opened_total",
        "counter",
        "Times that a worker's breaker of a version opened, also again after a failed probe.",
        _VERSION,
    )
)
RUNS_ENDED = _declare(
    Family(
        "driftgate_runs_ended_total",
        "counter",
        "Runs that were asked to end, because nobody waited for them any more.",
        _VERSION,
    )
)
TAP_DROPPED = _declare(
    Family("driftgate_tap_dropped_rows_total", "counter", "Rows lost to a full tap.", _VERSION)
)
OBSERVED = _declare(
    Family("driftgate_observed_rows_total", "counter", "Rows counted by the monitors.", _VERSION)
)
OBSERVER_ERRORS = _declare(
    Family(
        "driftgate_observer_errors_total",
        "counter",
        "Blocks of rows that a monitor failed on.",
        _VERSION,
    )
)
DRIFT_SCORE = _declare(
    Family(
        "driftgate_drift_score",
        "gauge",
        "Score of one channel in the newest rows.",
        (*_VERSION, "feature", "statistic"),
    )
)
DRIFT_LINE = _declare(
    Family(
        "driftgate_drift_line",
        "gauge",
        "What 99 % of windows of that size would stay below without drift.",
        (*_VERSION, "feature", "statistic"),
    )
)
DRIFT_EVIDENCE = _declare(
    Family(
        "driftgate_drift_evidence",
        "gauge",
        "Odds against no drift of one channel or its witness: an e-value.",
        (*_VERSION, "feature"),
    )
)
ALARMS = _declare(
    Family(
        "driftgate_alarms_total",
        "counter",
        "Episodes of alarms opened, by level: page, warning.",
        (*_VERSION, "level"),
    )
)
ALARMS_OPEN = _declare(Family("driftgate_alarms_open", "gauge", "Alarms open now.", _VERSION))
LABELS = _declare(
    Family("driftgate_labels_total", "counter", "Labels received, by what became of them.", ("is",))
)
LABELS_JUDGED = _declare(
    Family(
        "driftgate_labels_judged_total",
        "counter",
        "Labelled predictions judged by loss and calibration.",
        _VERSION,
    )
)
LABEL_EVIDENCE = _declare(
    Family(
        "driftgate_label_evidence",
        "gauge",
        "Odds against labels as in the reference: loss, and calibration by part of the score.",
        (*_VERSION, "channel"),
    )
)
LABEL_LOSS = _declare(
    Family(
        "driftgate_label_loss",
        "gauge",
        "Mean loss of labelled predictions: late, and reference.",
        (*_VERSION, "of"),
    )
)
LABEL_ALARMS_OPEN = _declare(
    Family("driftgate_label_alarms_open", "gauge", "Alarms of labels open now.", _VERSION)
)
PREDICTIONS_KEPT = _declare(
    Family("driftgate_predictions_kept_total", "counter", "Rows written down to wait for labels.")
)
PREDICTIONS_LOST = _declare(
    Family(
        "driftgate_predictions_lost_total",
        "counter",
        "Rows that should have been written down and were not: queue_full, not_written.",
        ("reason",),
    )
)
PREDICTIONS_FORGOTTEN = _declare(
    Family(
        "driftgate_predictions_forgotten_total",
        "counter",
        "Rows let go after labels.days, or beyond labels.bytes_max.",
    )
)
CAPTURED = _declare(
    Family("driftgate_captured_total", "counter", "Requests written to a capture.", ("model",))
)
CAPTURE_DROPPED = _declare(
    Family(
        "driftgate_capture_dropped_total",
        "counter",
        "Requests that should have been captured and were not: queue_full, too_large, not_written.",
        ("model", "reason"),
    )
)
CAPTURE_REMOVED = _declare(
    Family(
        "driftgate_capture_removed_bytes_total",
        "counter",
        "Bytes of captures let go after capture.days, or beyond capture.bytes_max.",
    )
)
CAPTURE_BYTES = _declare(
    Family(
        "driftgate_capture_bytes",
        "gauge",
        "Bytes of all captures of this host.",
    )
)
WEBHOOKS = _declare(
    Family(
        "driftgate_webhooks_total",
        "counter",
        "Alarms told to a target, by what became of them.",
        ("is",),
    )
)
WEBHOOKS_WAITING = _declare(
    Family("driftgate_webhooks_waiting", "gauge", "Alarms that targets are still to be told.")
)
DEGRADED = _declare(
    Family(
        "driftgate_degraded",
        "gauge",
        "1 while a part does not work although predictions do: labels, alarms, captures, heartbeat"
        " (cannot be written), counters (some are in the memory of one worker), run_dir (cannot be"
        " had), registry, state (cannot be read), changed (files of an open version), quarantine"
        " (versions that ended workers).",
        ("what",),
    )
)
REFUSED = _declare(
    Family(
        "driftgate_versions_refused",
        "gauge",
        "Versions in the registry that could not be opened; no series before the first.",
        ("model",),
    )
)
WORKERS = _declare(Family("driftgate_workers", "gauge", "Workers that answer predictions."))
RESTARTS = _declare(
    Family(
        "driftgate_worker_restarts_total",
        "counter",
        "Workers replaced, by what ended the one before: signal, exit, frozen, recycled.",
        ("reason",),
    )
)
SESSION_BYTES = _declare(
    Family(
        "driftgate_session_bytes",
        "gauge",
        "Memory that an open version takes, as measured.",
        _VERSION,
    )
)
EVICTIONS = _declare(
    Family(
        "driftgate_evictions_total",
        "counter",
        "Versions closed to make room for others.",
        ("model",),
    )
)
SWAPS = _declare(
    Family(
        "driftgate_swaps_total",
        "counter",
        "Times that another version became the one that answers.",
        ("model",),
    )
)
REVISION = _declare(
    Family(
        "driftgate_revision",
        "gauge",
        "The revision in force (observed), and the newest that could not be (rejected).",
        ("state",),
    )
)
ROLLOUT_WEIGHT = _declare(
    Family(
        "driftgate_rollout_weight",
        "gauge",
        "Percent of units that the candidate of a rollout answers.",
        ("model",),
    )
)
READY = _declare(Family("driftgate_ready", "gauge", "1 when the server answers predictions."))
BUILD = _declare(
    Family(
        "driftgate_build_info",
        "gauge",
        "Always 1; the label says which release runs.",
        ("release",),
    )
)
BIN_ROWS = _declare(
    Family(
        "driftgate_feature_bin_total",
        "counter",
        "Rows per bin of a channel; at /metrics/bins.",
        (*_VERSION, "feature", "bin"),
        is_optional=True,
    )
)
REFERENCE_SHARE = _declare(
    Family(
        "driftgate_reference_share",
        "gauge",
        "Share of a bin in the reference profile; at /metrics/bins.",
        (*_VERSION, "feature", "bin"),
        is_optional=True,
    )
)

FAMILIES: tuple[Family, ...] = tuple(_FAMILIES)

Sample = tuple[tuple[str, ...], float]
SUPERVISOR = "supervisor"
"""The slot of the supervisor's own counts."""


class Telemetry:
    """All series of one worker, and the sum of all workers of its host.

    Parameters
    ----------
    run_dir : where the workers of a host keep their counts; None: in memory, there is one worker
    slot : whose place this worker has taken, and whose counts it continues
    """

    def __init__(self, run_dir: Path | None = None, slot: str = "0") -> None:
        self._run_dir = run_dir
        self._slot = slot
        self._regions: list[Region] = []
        self._loop_region = self.region("loop")
        self.host = HostCounts(counters.directory(run_dir) if run_dir else None, self._regions)
        """What all workers of the host have counted."""
        self._series: dict[Family, dict[tuple[str, ...], Counter | Histogram]] = {
            family: {} for family in FAMILIES
        }
        self._gauges: dict[tuple[Family, tuple[str, ...]], Gauge] = {}
        self._sources: dict[Family, list[Callable[[], Iterable[Sample]]]] = {}
        self._own: dict[Family, tuple[int, list[tuple[tuple[str, ...], memoryview[int], int]]]] = {}
        self._named: dict[str, tuple[Family, tuple[str, ...]] | None] = {}
        self.source(DEGRADED, lambda: [(("counters",), float(self.problem is not None))])

    @property
    def problem(self) -> str | None:
        """Why some counts are kept by this worker alone; None: they are not."""
        return next((region.problem for region in self._regions if region.problem), None)

    def region(self, thread: str) -> Region:
        """Memory for the counts of one more thread."""
        made = Region(
            counters.file_of(self._run_dir, self._slot, thread) if self._run_dir else None
        )
        self._regions.append(made)
        return made

    def counter(self, family: Family, *labels: str) -> Counter:
        """The count of this family with these label values, made when first asked for."""
        series = self._series[family]
        if (found := series.get(labels)) is None:
            found = series[labels] = self._loop_region.counter(series_name(family, labels))
        assert isinstance(found, Counter)  # noqa: S101  kinds are declared in this file
        return found

    def histogram(self, family: Family, *labels: str) -> Histogram:
        """The same for a histogram."""
        series = self._series[family]
        if (found := series.get(labels)) is None:
            found = series[labels] = self._loop_region.histogram(
                family.bounds, _scale(family), series_name(family, labels)
            )
        assert isinstance(found, Histogram)  # noqa: S101  kinds are declared in this file
        return found

    def own(self, family: Family) -> list[tuple[tuple[str, ...], int]]:
        """Labels and count of every series of a family in this worker's file.

        Those of whoever sat in the slot before are among them.
        """
        n_series, known = self._own.get(family, (-1, []))
        if n_series != self._loop_region.n_series:
            n_series = self._loop_region.n_series
            start = series_name(family, ()).removesuffix("]") + ","
            known = [
                (meaning[1], view, at)
                for name, view, at in self._loop_region.places(start)
                if (meaning := self._meaning(name)) is not None
            ]
            self._own[family] = (n_series, known)
        return [(labels, view[at]) for labels, view, at in known]

    def cell(self, name: str = "", *labels: str) -> Counter:
        """A count that belongs to no family: protocols ask for more than Prometheus is told.

        Without a name it is this process's alone. Of one whose name starts with `newest_` the
        highest of the host counts, not the sum.
        """
        return self._loop_region.counter(cell_name(name, *labels) if name else "")

    def totals(self) -> Iterator[tuple[str, tuple[str, ...], list[int]]]:
        """Name, labels and cells of every count and histogram, added up for the host.

        Gauges are among them, and mean nothing here. Takes its time, on any thread.
        """
        totals: dict[str, list[int]] = {}
        for series in self.host.files().values():
            for name, cells in series.items():
                before = totals.get(name)
                if before is None or len(before) != len(cells):
                    totals[name] = cells
                elif name.startswith('["newest_'):
                    totals[name] = max(before, cells)
                else:
                    totals[name] = [a + b for a, b in zip(before, cells, strict=True)]
        for name, cells in totals.items():
            if name.startswith("["):
                first, *labels = orjson.loads(name)
                yield first, tuple(labels), cells

    def source(self, family: Family, read: Callable[[], Iterable[Sample]]) -> None:
        """Let `read` say the samples of a gauge when somebody asks."""
        self._sources.setdefault(family, []).append(read)

    def refresh(self) -> None:
        """Ask the sources, and leave what they say where other workers find it."""
        said: set[tuple[Family, tuple[str, ...]]] = set()
        for family, reads in self._sources.items():
            for labels, value in (sample for read in reads for sample in read()):
                key = (family, labels)
                if (gauge := self._gauges.get(key)) is None:
                    gauge = self._gauges[key] = self._loop_region.gauge(series_name(family, labels))
                gauge.set(value)
                said.add(key)
        for key, gauge in self._gauges.items():
            if key not in said:
                gauge.clear()

    def set_live(self, slot: str, *, is_live: bool) -> None:
        """Say whether anybody sits in a slot: what a dead worker's gauges say no longer counts."""
        gauge = self._loop_region.gauge(f"live {slot}")
        if is_live:
            gauge.set(1.0)
        else:
            gauge.clear()

    def exposition(
        self, samples: Mapping[Family, Iterable[Sample]] | None = None, *, bins: bool = False
    ) -> tuple[bytes, str]:
        """Prometheus text of all families (or of those at /metrics/bins), and its content type.

        Parameters
        ----------
        samples : of families that somebody else keeps
        """
        self.refresh()
        return self.rendered(samples, bins=bins)

    def rendered(
        self, samples: Mapping[Family, Iterable[Sample]] | None = None, *, bins: bool = False
    ) -> tuple[bytes, str]:
        """The same of what the gauges said last: takes its time, on any thread."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Reader(list(self._collect(samples or {}, bins=bins))))
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _collect(
        self, samples: Mapping[Family, Iterable[Sample]], *, bins: bool
    ) -> Iterator[Metric]:
        found = self._of_host()
        for family in FAMILIES:
            if family.is_optional is not bins:
                continue
            metric = _METRICS[family.kind](family.name, family.help, labels=family.labels)
            for labels, cells in found.get(family, {}).items():
                _add(metric, family, labels, cells)
            for labels, value in samples.get(family, ()):
                metric.add_metric(labels, value)
            yield metric

    def _of_host(self) -> dict[Family, dict[tuple[str, ...], list[int]]]:
        """Cells of every series, merged over the workers."""
        files = self.host.files()
        live = _live(files)
        found: dict[Family, dict[tuple[str, ...], list[int]]] = {}
        for file, series in files.items():
            slot = file.rpartition("-")[0]
            for name, cells in series.items():
                if (known := self._meaning(name)) is None:
                    continue
                family, labels = known
                if family.kind == "gauge" and (not cells[0] or (live and slot not in live)):
                    continue
                merged = found.setdefault(family, {})
                before = merged.get(labels)
                merged[labels] = cells if before is None else _merged(family, before, cells)
        return found

    def _meaning(self, name: str) -> tuple[Family, tuple[str, ...]] | None:
        """Family and labels of a series by its name in a file; None: it is nobody's metric."""
        if name in self._named:
            return self._named[name]
        known = None
        if name.startswith("["):
            first, *labels = orjson.loads(name)
            family = _BY_NAME.get(first)
            known = None if family is None else (family, tuple(labels))
        self._named[name] = known
        return known


_BY_NAME = {family.name: family for family in FAMILIES}


def cell_name(name: str, *labels: str) -> str:
    """Of a count that is no metric, in a file of counts."""
    return orjson.dumps([name, *labels]).decode()


def series_name(family: Family, labels: tuple[str, ...]) -> str:
    """Of a series, in a file of counts."""
    return orjson.dumps([family.name, *labels]).decode()


def _scale(family: Family) -> int:
    return 1_000_000_000 if family.name.endswith("_seconds") else 1


def _live(files: Mapping[str, Mapping[str, Sequence[int]]]) -> set[str]:
    """Slots that somebody sits in, as the supervisor says; none: there is no supervisor."""
    said = files.get(f"{SUPERVISOR}-loop", {})
    live = {name.removeprefix("live ") for name, cells in said.items() if cells[0]}
    return {*live, SUPERVISOR, ""} if said else set()


def _merged(family: Family, a: list[int], b: list[int]) -> list[int]:
    """Two workers' cells of one series as those of their host."""
    if family.kind != "gauge":
        return [x + y for x, y in zip(a, b, strict=True)] if len(a) == len(b) else a
    if family.merge == "latest":
        return max(a, b)
    one, other = counters.gauge_value(a), counters.gauge_value(b)
    merged = {"sum": one + other, "max": max(one, other), "min": min(one, other)}[family.merge]
    return [max(a[0], b[0]), counters.bits_of(merged)]


class _Reader(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


_METRICS: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
    "gauge": GaugeMetricFamily,
}


def _add(metric: Any, family: Family, labels: tuple[str, ...], cells: list[int]) -> None:
    if family.kind == "gauge":
        metric.add_metric(labels, counters.gauge_value(cells))
    elif family.kind == "counter":
        metric.add_metric(labels, cells[0])
    elif len(cells) == len(family.bounds) + 2:
        seen = 0
        buckets = []
        for bound, count in zip((*family.bounds, float("inf")), cells[:-1], strict=True):
            seen += count
            buckets.append((floatToGoString(bound), seen))  # type: ignore[no-untyped-call]  # theirs
        metric.add_metric(labels, buckets, cells[-1] / _scale(family))


class _LogFormat(logging.Formatter):
    """One event a line: JSON, or text for people. Control characters never get through."""

    def __init__(self, more: Mapping[str, object], *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json
        self._more = more

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = {**getattr(record, "fields", {}), **self._more}
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event = record.getMessage()
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        if self._is_json:
            line = {"time": f"{moment}Z", "level": record.levelname.lower(), "event": event}
            return orjson.dumps({**line, **fields}, default=str).decode()
        said = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        return f"{moment[11:]} {record.levelname.lower():7} {_plain(event)} {said}".rstrip()


def start_logging(style: str, level: str, **more: object) -> None:
    """Write log lines to standard error from now on, each with these fields too."""
    is_json = style == "json" or (style == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormat(more, is_json=is_json))
    for name in ("driftgate", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        # uvicorn's own start and stop lines say what driftgate's say better.
        logger.setLevel(level.upper() if name == "driftgate" else logging.WARNING)


def event(name: str, level: int = logging.INFO, *, exc: bool = False, **fields: object) -> None:
    """Log one event in the past tense with its fields; `exc`: and the exception being handled."""
    log.log(level, name, exc_info=exc, extra={"fields": fields})


def _plain(value: object) -> str:
    text = str(value) if not isinstance(value, float) else f"{value:.4g}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
