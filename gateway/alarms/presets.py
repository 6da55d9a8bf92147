"""What each receiver understands: an alarm as the request that starts a run there. Pure.

One webhook with small bodies instead of an SDK for each. The id of the episode is what keeps a
second delivery from starting a second run, where the receiver has a place for it.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.alarms.log import Episode

_DAGSTER = """
mutation DriftgateAlarm($params: ExecutionParams!) {
  launchRun(executionParams: $params) { __typename ... on PythonError { message } }
}
"""


@dataclass(frozen=True, slots=True)
class Message:
    """What is told."""

    kind: str
    """opened, passed, acknowledged, accepted or test."""
    time: float
    episode: Episode
    source: str
    """Name of this installation."""
    link: str = ""
    """Where people and programs reach it; empty: they know."""

    @property
    def key(self) -> str:
        """The idempotency key: the episode, and what became of it when it is not its opening."""
        return self.episode.id if self.kind == "opened" else f"{self.episode.id}-{self.kind}"

    @property
    def until(self) -> float:
        """Time of the newest row that the alarm was raised by."""
        until = self.episode.details.get("until")
        return until if isinstance(until, int | float) else self.episode.opened

    @property
    def data(self) -> dict[str, Any]:
        """The alarm in plain JSON types."""
        episode = self.episode
        return {
            "alarm": episode.id,
            "event": self.kind,
            "model": episode.model,
            "version": episode.version,
            "monitor": episode.monitor,
            "about": episode.about,
            "episode": episode.episode,
            "reason": episode.reason,
            "window": {"since": rfc3339(episode.since), "until": rfc3339(self.until)},
            "link": self.link.rstrip("/") + episode.report,
            "opened": rfc3339(episode.opened),
            "since": rfc3339(episode.since),
            "details": episode.details,
            "by": episode.by,
            "note": episode.note,
            "runbook": episode.runbook,
            "is_test": self.kind == "test",
        }


@dataclass(frozen=True, slots=True)
class Body:
    """A request's content."""

    content: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of receiver."""

    write: Callable[[Message, Mapping[str, str]], Body]
    needs: tuple[str, ...] = ()
    """Options without which it cannot be."""
    takes: tuple[str, ...] = ()
    done: frozenset[int] = field(default_factory=frozenset)
    """Statuses, beside 2xx, that say: it was told before."""


def rfc3339(moment: float) -> str:
    """A time in UTC with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
    return f"{whole}.{int(moment % 1 * 1000):03}Z"


def _json(value: Any, kind: str = "application/json", **headers: str) -> Body:
    content = json.dumps(value, ensure_ascii=True, separators=(",", ":"), default=str).encode()
    return Body(content, {"content-type": kind, **headers})


def _event(message: Message) -> dict[str, Any]:
    """CloudEvents 1.0."""
    episode = message.episode
    return {
        "specversion": "1.0",
        "id": message.key,
        "source": f"/{message.source}/models/{episode.model}/versions/{episode.version}",
        "type": f"io.driftgate.alarm.{message.kind}",
        "subject": episode.monitor,
        "time": rfc3339(message.time),
        "datacontenttype": "application/json",
        "data": message.data,
    }


def _cloudevents(message: Message, _: Mapping[str, str]) -> Body:
    return _json(_event(message), "application/cloudevents+json")


def _airflow(message: Message, _: Mapping[str, str]) -> Body:
    """`POST /api/v2/dags/{dag}/dagRuns`; a run of this id that is there is answered 409."""
    run = {"dag_run_id": message.key, "logical_date": None, "conf": message.data}
    return _json(run)


def _prefect(message: Message, options: Mapping[str, str]) -> Body:
    """`POST /api/deployments/{id}/create_flow_run`; the key gives back the run that is there."""
    parameter = options.get("parameter", "alarm")
    return _json({
        "parameters": {parameter: message.data},
        "idempotency_key": message.key,
        "tags": ["driftgate"],
    })  # fmt: skip


def _dagster(message: Message, options: Mapping[str, str]) -> Body:
    """GraphQL. It knows no idempotency: the tag lets the job see that it ran for this alarm."""
    params = {
        "selector": {
            "repositoryLocationName": options["location"],
            "repositoryName": options["repository"],
            "jobName": options["job"],
        },
        "runConfigData": {},
        "executionMetadata": {
            "tags": [
                {"key": "driftgate/alarm", "value": message.key},
                {"key": "driftgate/model", "value": message.episode.model},
                {"key": "driftgate/version", "value": str(message.episode.version)},
                {"key": "driftgate/monitor", "value": message.episode.monitor},
            ]
        },
    }
    return _json({"query": _DAGSTER, "variables": {"params": params}})


def _github(message: Message, options: Mapping[str, str]) -> Body:
    """`POST /repos/{owner}/{repo}/dispatches`; the payload may have ten fields at the top."""
    payload = {"key": message.key, "alarm": message.data}
    return _json(
        {"event_type": options.get("event_type", "driftgate-alarm"), "client_payload": payload},
        accept="application/vnd.github+json",
        **{"x-github-api-version": "2022-11-28", "user-agent": "driftgate"},
    )


def _argo(message: Message, _: Mapping[str, str]) -> Body:
    """A webhook event source of Argo Events: the body arrives as it is."""
    return _json(_event(message))


def _slack(message: Message, _: Mapping[str, str]) -> Body:
    episode = message.episode
    text = (
        f"*{episode.model}* version {episode.version}: alarm {message.kind}\n"
        f"{_plain(episode.reason)}\n`{episode.id}`\n{_plain(episode.runbook)}"
    )
    return _json({"text": text})


def _plain(text: str) -> str:
    """Names come from clients: nobody is to be called, and no link to be made of them."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


PRESETS: Mapping[str, Preset] = {
    "cloudevents": Preset(_cloudevents),
    "airflow": Preset(_airflow, done=frozenset((409,))),
    "prefect": Preset(_prefect, takes=("parameter",)),
    "dagster": Preset(_dagster, needs=("location", "repository", "job")),
    "github": Preset(_github, takes=("event_type",)),
    "argo": Preset(_argo),
    "slack": Preset(_slack),
}
