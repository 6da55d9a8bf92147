"""Which versions' labels are judged, and how: settings and files into what the judge takes."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gateway.config import ServerConfig
from gateway.errors import ConfigError
from gateway.labels.labelled import JudgeMeters, Labelled, Settings, View
from gateway.labels.target import Target
from gateway.labels.target import of as target_of
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
from registry.signature import Signature

if TYPE_CHECKING:
    from gateway.labels.judge import Judge  # SQLAlchemy takes its time to load

_NOTHING = View({"reference": None, "message": "labels of this version are not judged",
                 "alarms": []})  # fmt: skip


class Labelling:
    """What stands between versions that are opened and the judge of their labels.

    Parameters
    ----------
    is_shared : one database serves all hosts, so one judge spends what all of them may
    """

    def __init__(
        self, config: ServerConfig, telemetry: Telemetry, judge: "Judge", *, is_shared: bool
    ) -> None:
        self.judge = judge
        self._config = config
        self._telemetry = telemetry
        self._is_shared = is_shared

    def opened(
        self,
        model: str,
        version: int,
        signature: Signature,
        own: LossReference | None,
        problem: str,
    ) -> None:
        """Judge the labels of a version from now on, if it has something to compare them with."""
        target = self._target(model, version, signature)
        if target is None:
            return
        if problem:
            event("label_reference_problem", logging.WARNING, model=model, version=version,
                  reason=problem)  # fmt: skip
        telemetry, labels = self._telemetry, (model, str(version))
        meters = JudgeMeters(
            telemetry.counter(LABELS_JUDGED, *labels),
            telemetry.counter(ALARMS, *labels, "page"),
            telemetry.counter(ALARMS, *labels, "warning"),
        )
        self.judge.add(Labelled(model, version, target, self._settings(), meters, own, problem))

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
            return target_of(signature)
        except ConfigError as error:
            event("target_problem", logging.WARNING, model=model, version=version,
                  reason=str(error))  # fmt: skip
            return None

    def _settings(self) -> Settings:
        monitor, labels = self._config.monitor, self._config.labels
        return Settings(
            alarms=monitor.budget_alarms,
            days=monitor.budget_days,
            rows=monitor.budget_rows,
            share=1.0 if self._is_shared else monitor.budget_share,
            tolerance=monitor.tolerance,
            mature_s=labels.mature_s,
            adopt_rows=labels.adopt_rows,
        )
