"""Every metric and log field, declared once; the text that Prometheus reads; the log lines.

Label values come from closed sets (served models and versions, error codes of this program, bins of
a profile): names that clients make up add no series.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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

from gateway.counters import Counter, Histogram, Region

log = logging.getLogger("driftgate")

_LATENCY_BOUNDS = tuple(
    step * decade for decade in (1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0) for step in (1, 2.5, 5)
)[:-1]
_ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: a name, what it means, and the labels that tell its series apart."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    is_optional: bool = False
    """Only at /metrics/bins."""


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
    Family("driftgate_queued_rows", "gauge", "Rows waiting for their batch.", _VERSION)
)
SHED = _declare(
    Family(
        "driftgate_shed_total",
        "counter",
        "Requests dropped before they ran: queue_full, deadline_exceeded, client_gone.",
        (*_VERSION, "reason"),
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
        "Score of one channel in the newest closed window.",
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
ALARMS = _declare(Family("driftgate_alarms_total", "counter", "Alarms opened.", _VERSION))
ALARMS_OPEN = _declare(Family("driftgate_alarms_open", "gauge", "Alarms open now.", _VERSION))
LABELS = _declare(
    Family("driftgate_labels_total", "counter", "Labels received, by what became of them.", ("is",))
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
        "1 while a part does not work although predictions do: labels, alarms (cannot be written).",
        ("what",),
    )
)
REFUSED = _declare(
    Family(
        "driftgate_versions_refused",
        "gauge",
        "Versions in the registry that could not be opened.",
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


class Telemetry:
    """All series of one worker."""

    def __init__(self) -> None:
        self._loop_region = Region()
        self._series: dict[Family, dict[tuple[str, ...], Counter | Histogram]] = {
            family: {} for family in FAMILIES
        }
        self._sources: dict[Family, Callable[[], Iterable[Sample]]] = {}

    def counter(self, family: Family, *labels: str) -> Counter:
        """The count of this family with these label values, made when first asked for."""
        series = self._series[family]
        if (found := series.get(labels)) is None:
            found = series[labels] = self._loop_region.counter()
        assert isinstance(found, Counter)  # noqa: S101  kinds are declared in this file
        return found

    def histogram(self, family: Family, *labels: str) -> Histogram:
        """The same for a histogram."""
        series = self._series[family]
        if (found := series.get(labels)) is None:
            scale = 1_000_000_000 if family.name.endswith("_seconds") else 1
            found = series[labels] = self._loop_region.histogram(family.bounds, scale)
        assert isinstance(found, Histogram)  # noqa: S101  kinds are declared in this file
        return found

    def cell(self) -> Counter:
        """A count that belongs to no family: protocols ask for more than Prometheus is told."""
        return self._loop_region.counter()

    def source(self, family: Family, read: Callable[[], Iterable[Sample]]) -> None:
        """Let `read` say the samples of a family when somebody asks."""
        self._sources[family] = read

    def exposition(
        self, samples: Mapping[Family, Iterable[Sample]] | None = None, *, bins: bool = False
    ) -> tuple[bytes, str]:
        """Prometheus text of all families (or of those at /metrics/bins), and its content type.

        Parameters
        ----------
        samples : of families that somebody else keeps
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Reader(list(self._collect(samples or {}, bins=bins))))
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _collect(
        self, samples: Mapping[Family, Iterable[Sample]], *, bins: bool
    ) -> Iterator[Metric]:
        for family in FAMILIES:
            if family.is_optional is not bins:
                continue
            metric = _METRICS[family.kind](family.name, family.help, labels=family.labels)
            for labels, series in self._series[family].items():
                _add(metric, labels, series)
            if (read := self._sources.get(family)) is not None:
                for labels, value in read():
                    metric.add_metric(labels, value)
            for labels, value in samples.get(family, ()):
                metric.add_metric(labels, value)
            yield metric


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


def _add(metric: Any, labels: tuple[str, ...], series: Counter | Histogram) -> None:
    if isinstance(series, Counter):
        metric.add_metric(labels, series.value)
        return
    seen = 0
    buckets = []
    for bound, count in zip((*series.bounds, float("inf")), series.counts, strict=True):
        seen += count
        buckets.append((floatToGoString(bound), seen))  # type: ignore[no-untyped-call]  # theirs
    metric.add_metric(labels, buckets, series.total)


class _LogFormat(logging.Formatter):
    """One event a line: JSON, or text for people. Control characters never get through."""

    def __init__(self, *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event = record.getMessage()
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        if self._is_json:
            line = {"time": f"{moment}Z", "level": record.levelname.lower(), "event": event}
            return orjson.dumps({**line, **fields}, default=str).decode()
        said = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        return f"{moment[11:]} {record.levelname.lower():7} {_plain(event)} {said}".rstrip()


def start_logging(style: str, level: str) -> None:
    """Write log lines to standard error from now on."""
    is_json = style == "json" or (style == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormat(is_json=is_json))
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
