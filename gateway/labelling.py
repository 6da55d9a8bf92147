"""Which versions' labels are judged, and how: settings and files into what the judge takes."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gateway.config import ServerConfig
from gateway.errors import ConfigError
from gateway.labels import PredictionLog
from gateway.labels.labelled import JudgeMeters, Labelled, Settings, View
from gateway.labels.target import Target
from gateway.labels.target import of as target_of
from gateway.monitored import labels_config, monitor_config
from gateway.telemetry import (
    ALARMS,
    LABEL_ALARMS_OPEN,
    LABEL_EVIDENCE,
    LABEL_LOSS,
    LABELS_JUDGED,
    Family,
    Sample,
    Telemetry,
    event,
)
from monitors.loss import LossReference
from registry import monitoring
from registry.monitoring import Monitoring
from registry.signature import Signature

if TYPE_CHECKING:
    from gateway.labels.judge import Judge  # SQLAlchemy takes its time to load

_NOTHING = View({"reference": None, "message": "labels of this version are not judged",
                 "alarms": []})  # fmt: skip


class Labelling:
    """What stands between versions that are opened and the judge of their labels."""

    def __init__(
        self, config: ServerConfig, telemetry: Telemetry, log: PredictionLog, judge: "Judge"
    ) -> None:
        self.judge = judge
        self._log = log
        self._opened: dict[tuple[str, int], tuple[Signature, LossReference | None, str]] = {}
        self._said: dict[str, Monitoring] = {}
        self._config = config
        self._telemetry = telemetry
        # One database of all hosts has one judge, who spends what all of them may.
        self._is_shared = not log.store.is_local

    def opened(
        self,
        model: str,
        version: int,
        signature: Signature,
        own: LossReference | None,
        problem: str,
    ) -> None:
        """Judge the labels of a version from now on, if it has something to compare them with."""
        if problem:
            event("label_reference_problem", logging.WARNING, model=model, version=version,
                  reason=problem)  # fmt: skip
        self._opened[model, version] = (signature, own, problem)
        self._judge(model, version)

    def configure(self, model: str, said: Monitoring) -> None:
        """Keep and judge labels of a model as its revision says from now on."""
        self._said[model] = said
        labels = {name: labels_config(self._config.labels, one) for name, one in self._said.items()}
        self._log.shares = {name: one.sample / 100 for name, one in labels.items()}
        self._log.days = {name: one.days for name, one in labels.items()}
        for name, version in list(self._opened):
            if name == model:
                self._judge(name, version)

    def _judge(self, model: str, version: int) -> None:
        signature, own, problem = self._opened[model, version]
        target = self._target(model, version, signature)
        if target is None:
            return
        telemetry, labels = self._telemetry, (model, str(version))
        meters = JudgeMeters(
            telemetry.counter(LABELS_JUDGED, *labels),
            telemetry.counter(ALARMS, *labels, "page"),
            telemetry.counter(ALARMS, *labels, "warning"),
        )
        settings = self._settings(self._said.get(model, Monitoring()))
        self.judge.add(Labelled(model, version, target, settings, meters, own, problem))

    def view(self, model: str, version: int) -> View:
        """What is known about the labels of a version."""
        return self.judge.views.get((model, version), _NOTHING)

    def samples(self) -> Mapping[Family, list[Sample]]:
        """Evidence, losses and open alarms, for the exposition."""
        evidence: list[Sample] = []
        losses: list[Sample] = []
        alarms: list[Sample] = []
        for (model, version), view in self.judge.views.items():
            labels = (model, str(version))
            evidence += [((*labels, name), value) for name, value in view.evidence.items()]
            losses += [((*labels, name), value) for name, value in view.losses.items()]
            if view.evidence:
                alarms.append((labels, view.n_open))
        return {LABEL_EVIDENCE: evidence, LABEL_LOSS: losses, LABEL_ALARMS_OPEN: alarms}

    def _target(self, model: str, version: int, signature: Signature) -> Target | None:
        try:
            declared = monitoring.target(self._said.get(model, Monitoring()))
            return target_of(signature, declared)
        except ConfigError as error:
            event("target_problem", logging.WARNING, model=model, version=version,
                  reason=str(error))  # fmt: skip
            return None

    def _settings(self, said: Monitoring) -> Settings:
        monitor = monitor_config(self._config.monitor, said)
        labels = labels_config(self._config.labels, said)
        return Settings(
            alarms=monitor.budget_alarms,
            days=monitor.budget_days,
            rows=monitor.budget_rows,
            share=1.0 if self._is_shared else monitor.budget_share,
            tolerance=monitor.tolerance,
            mature_s=labels.mature_s,
            adopt_rows=labels.adopt_rows,
        )
