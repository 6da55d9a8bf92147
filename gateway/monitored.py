"""How the monitors of a model are set: what its revision says, over the settings of the server."""

import logging
from dataclasses import replace
from typing import Any

from gateway.config import LabelsConfig, MonitorConfig
from gateway.telemetry import event
from registry import monitoring
from registry.errors import ChangeError
from registry.monitoring import Monitoring
from registry.revisions import ModelState


def said_of(model: str, state: ModelState) -> Monitoring:
    """What a revision says; nothing where it cannot be read, which is logged."""
    try:
        return monitoring.read(state.monitor)
    except ChangeError as error:
        event("monitor_part_ignored", logging.WARNING, model=model, reason=str(error))
        return Monitoring()


def monitor_config(config: MonitorConfig, said: Monitoring) -> MonitorConfig:
    """The settings of a model's monitors."""
    budget = said.budget or monitoring.BudgetPart()
    changed: dict[str, Any] = {
        "tolerance": said.tolerance,
        "window_rows": said.window_rows,
        "budget_alarms": budget.alarms,
        "budget_days": budget.days,
        # Who names days means days, also where the server counts rows.
        "budget_rows": 0 if budget.days is not None else budget.rows,
    }
    return replace(config, **{name: value for name, value in changed.items() if value is not None})


def labels_config(config: LabelsConfig, said: Monitoring) -> LabelsConfig:
    """The settings of a model's labels."""
    labels = said.labels or monitoring.LabelsPart()
    changed: dict[str, Any] = {
        "days": labels.days,
        "sample": labels.sample,
        "mature_s": labels.mature_s,
        "adopt_rows": labels.adopt_rows,
    }
    return replace(config, **{name: value for name, value in changed.items() if value is not None})
