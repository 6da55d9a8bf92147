"""Rules, alerts and dashboard: every name in them is one that driftgate tells or that they record.

What they mean is tested against a real Prometheus: `make test-services`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import gateway
from gateway import telemetry

HERE = Path(gateway.__file__).with_name("dashboards")
_METRIC = re.compile(r"\bdriftgate_[a-z_]+\b")
_RECORDED = re.compile(r"\bdriftgate:[a-z0-9_:]+\b")
_MATCHERS = re.compile(r"\b(driftgate[_:][a-z0-9_:]+)\{([^}]*)\}")


def rules(name: str) -> list[dict[str, Any]]:
    document = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    document = json.loads((HERE / "grafana.json").read_text(encoding="utf-8"))
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    for name in ("recording.yaml", "alerts.yaml"):
        yield from (rule["expr"] for rule in rules(name))
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])


def test_every_metric_that_is_asked_for_is_told() -> None:
    """By its declared name, or as a part of a histogram; labels too."""
    families = {family.name: family for family in telemetry.FAMILIES}
    parts = {
        f"{family.name}{suffix}": family
        for family in telemetry.FAMILIES
        if family.kind == "histogram"
        for suffix in ("_bucket", "_sum", "_count")
    }
    known = families | parts
    asked = {name for text in expressions() for name in _METRIC.findall(text)}

    assert asked
    assert asked - set(known) == set()
    for text in expressions():
        for name, matchers in _MATCHERS.findall(text):
            if name in known:
                labels = set(re.findall(r"(\w+)\s*[=!]", matchers))
                assert labels <= {*known[name].labels, "le"}, (name, labels)


def test_what_is_recorded_is_used_and_what_is_used_is_recorded() -> None:
    """A rule that nobody reads costs; a name that nobody records shows nothing."""
    recorded = {rule["record"] for rule in rules("recording.yaml")}
    used = {name for text in expressions() for name in _RECORDED.findall(text)}

    assert used <= recorded
    assert recorded - used <= {"driftgate:requests:rate5m"}  # for people's own dashboards


def test_every_alert_says_what_and_what_to_do() -> None:
    """One sentence, one thing to look at first, and how urgent it is."""
    names = [rule["alert"] for rule in rules("alerts.yaml")]

    assert len(set(names)) == len(names) >= 12
    for rule in rules("alerts.yaml"):
        assert rule["labels"]["severity"] in {"page", "warning"}
        assert len(rule["annotations"]["summary"]) > 15
        assert len(rule["annotations"]["runbook"]) > 30


def test_panels_have_titles_units_and_no_overlap() -> None:
    """Each cell of the grid belongs to one panel."""
    cells: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        at = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not mine & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= mine
