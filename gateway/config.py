"""Every setting of a server, declared once: flags, environment and docs are derived from here.

Flag over environment (`DRIFTGATE_BATCH_ROWS_MAX`) over file (`batch: {rows_max: 64}`) over default.
"""

import dataclasses
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from gateway.errors import ConfigError, nearest
from registry import names

ADOPT_ROWS_MIN = 100
"""Fewer rows make a reference that can see next to nothing."""
ADOPT_ROWS_MAX = 1_000_000
WORKERS_MAX = 256

PLATFORM_VARIABLES = {
    "port": ("SAGEMAKER_BIND_TO_PORT", "AIP_HTTP_PORT"),
    "predict_path": ("AIP_PREDICT_ROUTE",),
    "health_path": ("AIP_HEALTH_ROUTE",),
}
"""What SageMaker and Vertex AI tell a container: over the default, under everything else."""

_DATABASE = re.compile(r"sqlite:///.|postgres(ql(\+psycopg)?)?://")
_PATH = re.compile(r"/[A-Za-z0-9._~:@!$&'()*+,;=/-]{0,1023}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How long a request may wait for company, and how much company."""

    rows_max: int = 64
    """Rows in one batch at most; 1 turns batching off."""
    wait_s_max: float = 0.0
    """Longest time a first row waits although the session is idle; 0: it leaves at once."""

    def __post_init__(self) -> None:
        _refuse(
            _at_least("batch.rows_max", self.rows_max, 1),
            _within("batch.wait_s_max", self.wait_s_max, 0, 10),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What one request, and all waiting requests of a version, may take."""

    body_bytes_max: int = 64 * 1024 * 1024
    """Bytes in one request body; more is answered 413."""
    json_bytes_max: int = 12 * 1024 * 1024
    """Bytes in one JSON body, which takes some thirty times its size in memory; more is answered
    413."""
    unpacked_ratio_max: int = 100
    """How many times its packed size a compressed body of more than 1 MiB may be; more is answered
    413."""
    queue_rows_max: int = 8192
    """Rows that may wait for one version; more are answered 429. No request may have more."""
    timeout_s: float = 30.0
    """Longest time to an answer, unless the request asks for less; then 504."""
    grpc_message_bytes_max: int = 64 * 1024 * 1024
    """Bytes in one gRPC message, unpacked; more is answered RESOURCE_EXHAUSTED."""
    grpc_calls_max: int = 1000
    """gRPC calls and open streams at a time; more are answered RESOURCE_EXHAUSTED."""
    head_s_max: float = 10.0
    """Longest time for the headers of a request to arrive; then 408."""
    body_s_max: float = 30.0
    """Time for a body to arrive, however slowly; later it must have come with at least
    `body_rate_min` on average, or is answered 408."""
    body_rate_min: int = 10 * 1024
    """Bytes a second."""
    head_bytes_max: int = 16 * 1024
    """Bytes of all headers of a request; more are answered 431. Of its path, half as many."""
    headers_max: int = 100
    """Headers of a request; more are answered 431."""
    connections_max: int = 1000
    """HTTP connections of one worker; more are answered 503 and closed."""
    connections_per_address_max: int = 100
    """The same from one address beyond this machine. Raise it behind a proxy."""

    def __post_init__(self) -> None:
        _refuse(
            _at_least("limits.body_bytes_max", self.body_bytes_max, 1),
            _at_least("limits.json_bytes_max", self.json_bytes_max, 1),
            _at_least("limits.unpacked_ratio_max", self.unpacked_ratio_max, 1),
            _at_least("limits.queue_rows_max", self.queue_rows_max, 1),
            _within("limits.timeout_s", self.timeout_s, 0.001, 3600),
            _within("limits.grpc_message_bytes_max", self.grpc_message_bytes_max, 1, 2**31 - 1),
            _within("limits.grpc_calls_max", self.grpc_calls_max, 1, 1_000_000),
            _within("limits.head_s_max", self.head_s_max, 0.1, 3600),
            _within("limits.body_s_max", self.body_s_max, 0.1, 3600),
            _at_least("limits.body_rate_min", self.body_rate_min, 0),
            _within("limits.head_bytes_max", self.head_bytes_max, 1024, 1024 * 1024),
            _within("limits.headers_max", self.headers_max, 10, 10_000),
            _at_least("limits.connections_max", self.connections_max, 1),
            _at_least("limits.connections_per_address_max", self.connections_per_address_max, 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """What the monitors see, and in what portions they judge it."""

    sample: float = 100.0
    """Percent of requests whose inputs and outputs are monitored; 0 turns monitoring off."""
    window_rows: int = 1000
    """Rows of the window "last", which scores are given for; the half-life of "decayed"."""
    tolerance: float = 0.01
    """Distance from the reference, in units of PSI, that is no drift; 0: any distance is."""
    budget_alarms: float = 1.0
    """False pages of a model that are allowed in a period, in expectation; of warnings 13 times."""
    budget_days: float = 90.0
    """The period in days."""
    budget_rows: int = 0
    """The period in rows instead, for rows that do not come as time passes; 0: in days."""
    budget_share: float = 1.0
    """Part of the budget that this host spends: one over the number of hosts."""
    adopt_rows: int = 0
    """A version without a reference profile adopts its first so many served rows; 0: it waits for
    somebody to ask for that. At least 100."""
    refused_share: float = 1.0
    """Percent of a model's requests that may be refused for what they hold, with each code and in
    all, and are no alarm."""
    refused_learn: int = 1000
    """Requests that show what else is normal, before refusals are judged; 0: nothing else is."""
    tap_rows_max: int = 65_536
    """Rows that may wait between an answer and the monitors; more are dropped and counted."""
    tap_bytes_max: int = 64 * 1024 * 1024
    """Bytes of tensors that may wait there."""

    def __post_init__(self) -> None:
        _refuse(
            _within("monitor.sample", self.sample, 0, 100),
            _at_least("monitor.window_rows", self.window_rows, 2),
            _within("monitor.tolerance", self.tolerance, 0, 10),
            _within("monitor.budget_alarms", self.budget_alarms, 0.001, 1000),
            _within("monitor.budget_days", self.budget_days, 0.01, 10_000),
            _at_least("monitor.budget_rows", self.budget_rows, 0),
            _within("monitor.budget_share", self.budget_share, 0.0001, 1),
            _within("monitor.adopt_rows", self.adopt_rows, ADOPT_ROWS_MIN, ADOPT_ROWS_MAX)
            if self.adopt_rows
            else None,
            _within("monitor.refused_share", self.refused_share, 0.001, 95),
            _within("monitor.refused_learn", self.refused_learn, 0, 10_000_000),
            _at_least("monitor.tap_rows_max", self.tap_rows_max, 1),
            _at_least("monitor.tap_bytes_max", self.tap_bytes_max, 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelsConfig:
    """Which predictions are kept for the labels that arrive later, where and for how long."""

    sample: float = 0.0
    """Percent of requests whose predictions are kept, chosen by their id; 0: none, and labels are
    refused."""
    url: str = ""
    """The database: `sqlite:///FILE`, or `postgresql://...` for several hosts; empty:
    `labels.sqlite3` in the run directory."""
    days: float = 30.0
    """A prediction waits so many days for its label; its id is remembered for twice as long."""
    bytes_max: int = 1024 * 1024 * 1024
    """Bytes of the database; beyond it the oldest predictions go first."""
    wait_s: float = 3600.0
    """A label whose prediction is not there waits so long for it."""
    mature_s: float = 0.0
    """A prediction is judged by its label when it is so old, and not before: where labels come late
    because of what they say, so long as most of them take."""
    adopt_rows: int = 0
    """A version without a reference for its labels adopts its first so many labelled predictions,
    200 at least; 0: it waits for somebody to accept some."""
    inputs: bool = False
    """Keep inputs beside outputs, for an export."""
    elements_max: int = 64
    """Values of one row of a tensor; a wider tensor is not kept."""

    def __post_init__(self) -> None:
        # An address may hold a password: it is never repeated.
        is_known = not self.url or _DATABASE.match(self.url)
        _refuse(
            _within("labels.sample", self.sample, 0, 100),
            None if is_known else "labels.url: must start with sqlite:/// or postgresql://",
            _within("labels.days", self.days, 0.001, 3650),
            _at_least("labels.bytes_max", self.bytes_max, 1024 * 1024),
            _within("labels.wait_s", self.wait_s, 0, 30 * 86_400),
            _within("labels.mature_s", self.mature_s, 0, 365 * 86_400),
            _within("labels.adopt_rows", self.adopt_rows, 200, 100_000)
            if self.adopt_rows
            else None,
            _at_least("labels.elements_max", self.elements_max, 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureConfig:
    """How much the captures that routes ask for may take, of the disk and of memory."""

    bytes_max: int = 1024 * 1024 * 1024
    """Bytes of all captures of this host; beyond it files go, those not added to for longest
    first."""
    segment_bytes_max: int = 16 * 1024 * 1024
    """Bytes of one file of a capture, and of one captured request."""
    days: float = 7.0
    """A file to which nothing has been added for so many days is removed."""
    queue_bytes_max: int = 32 * 1024 * 1024
    """Bytes of tensors that may wait to be written, by worker; more are dropped and counted."""

    def __post_init__(self) -> None:
        _refuse(
            _at_least("capture.segment_bytes_max", self.segment_bytes_max, 64 * 1024),
            _at_least("capture.bytes_max", self.bytes_max, 2 * self.segment_bytes_max),
            _within("capture.days", self.days, 0.001, 3650),
            _at_least("capture.queue_bytes_max", self.queue_bytes_max, 64 * 1024),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmsConfig:
    """Who is told of alarms, and how often."""

    targets: str = ""
    """A file (YAML or JSON) of webhooks and the hosts that may be called; empty: nobody is told."""
    hold_off_s: float = 86_400.0
    """A monitor whose alarm is over or acknowledged opens no new one for so long."""

    def __post_init__(self) -> None:
        _refuse(_within("alarms.hold_off_s", self.hold_off_s, 0, 365 * 86_400))


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """How sessions are opened and where they run."""

    intra_op_threads: int = 1
    """Threads of one run of a model; more than 1 pays for models of milliseconds only."""
    inline_s_max: float = 0.0001
    """A model whose fullest batch ran faster than this at warm-up runs on the event loop; every
    other request waits that long at most. 0: every model has a thread of its own."""
    arena_bytes_max: int = 1 << 30
    """Memory that the runs of all models of a worker may take together, beside their weights; a run
    that wants more fails. 0: no bound."""

    def __post_init__(self) -> None:
        _refuse(
            _at_least("runtime.intra_op_threads", self.intra_op_threads, 1),
            _within("runtime.inline_s_max", self.inline_s_max, 0, 0.01),
            _at_least("runtime.arena_bytes_max", self.arena_bytes_max, 16 << 20)
            if self.arena_bytes_max
            else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConfig:
    """How a server ends that is told to."""

    linger_s: float = 0.0
    """Seconds that it goes on answering after SIGTERM, no longer ready: time for load balancers to
    notice."""
    grace_s: float = 30.0
    """Seconds that what is under way may take after that; then it is cut off."""

    def __post_init__(self) -> None:
        _refuse(
            _within("stop.linger_s", self.linger_s, 0, 3600),
            _within("stop.grace_s", self.grace_s, 0, 3600),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """How a worker follows the registry, and what its sessions may take."""

    poll_s: float = 0.4
    """Seconds between two looks at the registry."""
    settle_s: float = 2.0
    """How long the files of a version that was copied in by hand must have been still."""
    open_s_max: float = 60.0
    """Seconds that opening one version may take, and one more for each 50 MB of its files; then it
    is refused, and not tried again until somebody asks for that."""
    start_s_max: float = 3.0
    """Seconds that a start spends on opening versions that no route names; the others are opened
    by their first call."""
    memory_bytes_max: int = 0
    """Memory that the open sessions of one worker may take; 0: six tenths of what there is, shared
    among the workers."""

    def __post_init__(self) -> None:
        _refuse(
            _within("sync.poll_s", self.poll_s, 0.05, 60),
            _within("sync.settle_s", self.settle_s, 0, 3600),
            _within("sync.open_s_max", self.open_s_max, 0.1, 3600),
            _within("sync.start_s_max", self.start_s_max, 0, 3600),
            _at_least("sync.memory_bytes_max", self.memory_bytes_max, 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """What is written to standard error."""

    format: str = "auto"
    """json, text, or auto: text on a terminal, else JSON."""
    level: str = "info"
    """debug, info, warning or error."""

    def __post_init__(self) -> None:
        _refuse(
            _one_of("log.format", self.format, ("auto", "json", "text")),
            _one_of("log.level", self.level, ("debug", "info", "warning", "error")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All settings of `driftgate serve`."""

    registry: str = "./models"
    """The registry directory."""
    state_dir: str = ""
    """Where adopted reference profiles are kept; empty: `.driftgate` in the registry."""
    run_dir: str = ""
    """Where the workers of this host keep their counts, on a local disk; empty: `run/<host>` in the
    state directory."""
    workers: int = 1
    """Processes that answer, each with all models."""
    recycle_bytes: int = 0
    """A worker that has grown by so many bytes of memory since it was ready is replaced, after its
    successor is ready; 0: never."""
    trust: str = ""
    """File, or directory, of public keys: only versions signed by one of them are served."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback: see `insecure`."""
    port: int = 8000
    """HTTP port; 0 takes a free one."""
    grpc_port: int = 8001
    """gRPC port; 0 takes a free one."""
    no_grpc: bool = False
    """Do not listen for gRPC."""
    grpc_carrier: str = "grpcio"
    """What carries gRPC: `grpcio`, or `zttp`, a faster and younger one (extra `http2`)."""
    tls_cert: str = ""
    """PEM file of the certificate, and what it is signed by: HTTP and gRPC speak TLS only."""
    tls_key: str = ""
    """PEM file of its private key."""
    tls_client_ca: str = ""
    """PEM file of authorities: only clients with a certificate of theirs may connect."""
    keys: str = ""
    """File of keys (`driftgate keys add`), or its JSON: then all but health needs a key."""
    insecure: bool = False
    """Serve predictions and monitors to whoever can reach the port. Admin paths need a key."""
    hosts: str = ""
    """Names that requests may have in their Host header, with commas between them, or `*` for any;
    empty: this machine's own on loopback, any beyond it."""
    model: str = ""
    """The model that is asked by paths without a model's name, such as /invocations; empty: the
    only one there is."""
    predict_path: str = ""
    """One more path for what /invocations answers."""
    health_path: str = ""
    """One more path for what /ping answers."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        is_open = not (self.is_local or self.insecure or self.keys or self.tls_client_ca)
        _refuse(
            _within("workers", self.workers, 1, WORKERS_MAX),
            _at_least("recycle_bytes", self.recycle_bytes, 0),
            _within("port", self.port, 0, 65_535),
            _within("grpc_port", self.grpc_port, 0, 65_535),
            _one_of("grpc_carrier", self.grpc_carrier, ("grpcio", "zttp")),
            f"tls_cert = {self.tls_cert!r}, tls_key = {self.tls_key!r}: give both, or neither"
            if bool(self.tls_cert) != bool(self.tls_key)
            else None,
            *(
                f"{key} = {file!r}: no such file"
                for key, file in (
                    ("tls_cert", self.tls_cert),
                    ("tls_key", self.tls_key),
                    ("tls_client_ca", self.tls_client_ca),
                )
                if file and not Path(file).is_file()
            ),
            "tls_client_ca: clients show certificates over TLS only; give tls_cert and tls_key"
            if self.tls_client_ca and not self.tls_cert
            else None,
            f"model = {self.model!r}: cannot be the name of a model"
            if self.model and not names.is_model(self.model)
            else None,
            _path("predict_path", self.predict_path),
            _path("health_path", self.health_path),
            f"host = {self.host!r}: reachable beyond this machine, and nobody has to show a"
            " key; give --keys (driftgate keys add), serve on 127.0.0.1, or say --insecure to open"
            " predictions and monitors"
            if is_open
            else None,
        )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def state_path(self) -> Path:
        """The directory of adopted profiles."""
        return Path(self.state_dir) if self.state_dir else Path(self.registry) / ".driftgate"

    @property
    def run_path(self) -> Path:
        """The run directory that is asked for: a server may have to take one beside it."""
        if self.run_dir:
            return Path(self.run_dir)
        host = re.sub(r"[^A-Za-z0-9._-]", "_", socket.gethostname()) or "host"
        return self.state_path / "run" / host

    @property
    def labels_url(self) -> str:
        """The database of predictions and labels, as SQLAlchemy names it."""
        scheme, _, rest = self.labels.url.partition("://")
        if scheme.startswith("postgres"):
            return f"postgresql+psycopg://{rest}"
        return self.labels.url or f"sqlite:///{self.run_path / 'labels.sqlite3'}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree, as flags, environment and docs see it."""

    path: tuple[str, ...]
    type: type
    default: object

    @property
    def key(self) -> str:
        """As in a file: `batch.rows_max`."""
        return ".".join(self.path)

    @property
    def variable(self) -> str:
        """As in the environment: `DRIFTGATE_BATCH_ROWS_MAX`."""
        return "DRIFTGATE_" + "_".join(self.path).upper()


def settings(section: Any = ServerConfig, above: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every setting, in the order of declaration."""
    for entry in dataclasses.fields(section):
        if dataclasses.is_dataclass(entry.type):
            yield from settings(entry.type, (*above, entry.name))
        else:
            assert isinstance(entry.type, type)  # noqa: S101  a mistake in this file, not in input
            yield Setting((*above, entry.name), entry.type, entry.default)


def load(
    flags: Mapping[str, object],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> ServerConfig:
    """Settings from all four sources.

    Parameters
    ----------
    flags : by key (`batch.rows_max`); None stands for "not given"
    file : YAML or JSON
    environ : variables by name

    Raises
    ------
    ConfigError : every wrong key and value at once, each with its source.
    """
    problems: list[str] = []
    known = {setting.key: setting for setting in settings()}
    tree: dict[str, Any] = {}
    for key, (value, source) in _given(flags, file, environ, known, problems).items():
        try:
            converted: Any = msgspec.convert(value, known[key].type, strict=False)
        except msgspec.ValidationError as error:
            problems.append(f"{key} = {value!r} ({source}): {_lower(str(error))}")
            continue
        *above, last = known[key].path
        branch = tree
        for name in above:
            branch = branch.setdefault(name, {})
        branch[last] = converted
    config: ServerConfig | None = _build(ServerConfig, tree, problems)
    if problems or config is None:
        raise ConfigError(*problems)
    return config


def _given(
    flags: Mapping[str, object],
    file: Path | None,
    environ: Mapping[str, str],
    known: Mapping[str, Setting],
    problems: list[str],
) -> dict[str, tuple[object, str]]:
    """Value and source of every setting that was given; a later source covers an earlier one."""
    given: dict[str, tuple[object, str]] = {}
    if file is not None:
        for key, value in _flatten(_read(file)):
            if key in known:
                given[key] = (value, file.name)
            else:
                problems.append(_unknown(key, list(known), file.name))
    for setting in known.values():
        if (text := environ.get(setting.variable)) is not None:
            given[setting.key] = (text, setting.variable)
    for key, variables in PLATFORM_VARIABLES.items():
        named = [name for name in variables if environ.get(name)]
        if named and key not in given:
            given[key] = (environ[named[0]], named[0])
    given |= {key: (value, "flag") for key, value in flags.items() if value is not None}
    return given


def _build(kind: Any, tree: Mapping[str, Any], problems: list[str]) -> Any:
    """An instance of `kind`; its problems, and those of its sections, are added to `problems`."""
    values = dict(tree)
    for entry in dataclasses.fields(kind):
        if dataclasses.is_dataclass(entry.type):
            if (section := _build(entry.type, tree.get(entry.name, {}), problems)) is None:
                values.pop(entry.name, None)  # its own problems are said; judge the rest by default
                continue
            values[entry.name] = section
    try:
        return kind(**values)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _read(file: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {file.name}: no such file") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"--config {file.name}: cannot be read as text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"--config {file.name}{where}: not YAML") from None
    except (ValueError, RecursionError):
        # The YAML reader's own checks let through a thirteenth month, and any depth.
        raise ConfigError(f"--config {file.name}: not YAML that can be read") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file.name}: must be a mapping of settings")
    return content


def _flatten(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, object]]:
    sections = {entry.name for entry in dataclasses.fields(ServerConfig) if _is_section(entry)}
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, dict) and key in sections:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _is_section(entry: "dataclasses.Field[Any]") -> bool:
    return dataclasses.is_dataclass(entry.type)


def _unknown(key: str, known: list[str], source: str) -> str:
    match = nearest(key, known)
    return f"{key} ({source}): no such setting" + (f"; did you mean {match}?" if match else "")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _at_least(key: str, value: float, low: float) -> str | None:
    return f"{key} = {value}: must be at least {low}" if value < low else None


def _within(key: str, value: float, low: float, high: float) -> str | None:
    # NaN is within nothing.
    return None if low <= value <= high else f"{key} = {value}: must be from {low} to {high}"


def _path(key: str, path: str) -> str | None:
    if not path or _PATH.fullmatch(path):
        return None
    return f"{key} = {path!r}: must be a path of an URL that starts with /, without a query"


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> str | None:
    if value in choices:
        return None
    return f"{key} = {value!r}: must be one of {', '.join(choices)}"


def _refuse(*problems: str | None) -> None:
    """Raise ConfigError when any problem was found, with all of them."""
    if found := [problem for problem in problems if problem is not None]:
        raise ConfigError(*found)
