"""Joined rows to reports: performance by task, outcomes by variant."""

import math
from typing import Any

import numpy as np
import pytest

from gateway.labels.report import Kept, outcomes_of, performance_of
from gateway.labels.rows import Joined
from gateway.labels.target import Target


def row(label: float | str, outputs: dict[str, Any], **changed: Any) -> Joined:
    values = {
        "request": "r", "row": 0, "version": 1, "traffic": "primary", "variant": "champion",
        "time": 0.0, "sampled": 1.0, "assigned": 0.5, "unit": None, "outputs": outputs,
        "label": label, "arrived": 0.0,
    } | changed  # fmt: skip
    return Joined(**values)


def kept(rows: list[Joined]) -> list[Kept]:
    return [Kept(joined.outputs, joined.sampled) for joined in rows]


def test_the_task_is_seen_in_scores_and_labels() -> None:
    """0 and 1 with scores within are binary, other numbers are errors, names are classes."""
    yes = [row(1.0, {"y": 0.9}), row(0.0, {"y": 0.4})]
    number = [row(3.0, {"y": 2.0}), row(-1.0, {"y": 0.4})]
    named = [row("a", {"y": "a"}), row("b", {"y": "a"})]
    chosen = [row(2.0, {"y": [0.1, 0.2, 0.7]}), row(0.0, {"y": [0.1, 0.8, 0.1]})]

    assert performance_of(yes, kept(yes), Target("y"))["realised"]["accuracy"]["value"] == 1.0
    found = performance_of(number, kept(number), Target("y"))
    assert (found["task"], found["estimated"]) == ("regression", None)
    assert found["realised"]["mae"]["value"] == pytest.approx(1.2)
    for rows in (named, chosen):
        found = performance_of(rows, kept(rows), Target("y", task="multiclass"))
        assert found["realised"]["accuracy"]["value"] == 0.5


def test_rows_that_cannot_be_compared_are_left_out() -> None:
    """A score that is missing or no number, a text for a number: the others count."""
    rows = [row(1.0, {"y": 0.9}), row(1.0, {}), row(0.0, {"y": math.nan}), row("x", {"y": 0.1})]

    found = performance_of(rows, kept(rows), Target("y", task="binary"))

    assert found["realised"]["rate"]["value"] == 1.0
    assert performance_of([], [], Target("y"))["realised"] is None


def test_cohorts_are_days_of_the_prediction() -> None:
    """Each by itself, in order."""
    rows = [row(float(k % 2), {"y": 0.9}, time=86_400.0 * (k // 2)) for k in range(6)]

    found = performance_of(rows, kept(rows), Target("y"))

    assert [(day["day"], day["n"]) for day in found["cohorts"]] == [
        ("1970-01-01", 2), ("1970-01-02", 2), ("1970-01-03", 2)
    ]  # fmt: skip


def split(n: int, rates: tuple[float, float], weight: float, seed: int) -> list[Joined]:
    """Units given to the challenger with this probability, of these rates."""
    random = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        is_candidate = bool(random.uniform() < weight)
        variant, assigned = ("challenger", weight) if is_candidate else ("champion", 1 - weight)
        label = float(random.uniform() < rates[is_candidate])
        rows.append(row(label, {}, request=f"r{k}", variant=variant, assigned=assigned))
    return rows


def test_a_better_variant_is_seen_and_an_equal_one_is_not() -> None:
    """The interval holds the true difference; no difference is never called one (20 seeds)."""
    better = outcomes_of(split(8000, (0.10, 0.20), 0.3, 1))["differences"]["challenger"]
    assert better["verdict"] == "higher"
    assert better["low"] < 0.1 < better["high"]

    for seed in range(20):
        equal = outcomes_of(split(1500, (0.1, 0.1), 0.3, seed))["differences"]["challenger"]
        assert equal["verdict"] == "inconclusive"
        assert equal["low"] < 0 < equal["high"]
        assert equal["detectable"] == pytest.approx((equal["high"] - equal["low"]) / 2, abs=1e-5)


def test_few_units_no_lot_shadows_and_calls_by_number_give_no_verdict() -> None:
    """What was not drawn by lot compares nothing, however much of it there is."""
    few = outcomes_of(split(50, (0.1, 0.9), 0.5, 1))["differences"]["challenger"]
    assert (few["verdict"], few["mean"]) == ("inconclusive", None)
    fixed = [row(1.0, {}, request=f"a{k}", variant=v, assigned=1.0)
             for k in range(500) for v in ("champion", "2")]  # fmt: skip
    assert outcomes_of(fixed)["differences"]["2"]["reason"] == "nothing was drawn by lot"
    others = [row(1.0, {}, request=f"a{k}", variant="2", traffic=t)
              for k in range(9) for t in ("shadow", "pinned")]  # fmt: skip
    assert outcomes_of(others)["variants"] == {}


def test_rows_and_requests_of_one_unit_count_once() -> None:
    """A sticky unit is one draw, whatever it asks."""
    rows = [row(float(k % 2), {}, request=f"r{k}", unit="u") for k in range(10)]

    about = outcomes_of(rows)["variants"]["champion"]

    assert (about["units"], about["labels"], about["mean"]) == (1, 10, 0.5)
