"""Performance: against definitions, against scipy, and intervals by how often they hold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from monitors import performance
from monitors.errors import BinMismatchError

pairs = st.lists(st.tuples(st.floats(0, 1).map(lambda p: round(p, 2)), st.booleans()),
                 min_size=1, max_size=40)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_binary_metrics_are_their_definitions(rows: list[tuple[float, bool]]) -> None:
    """Each by a loop over rows, or pairs of rows; intervals hold their values."""
    scores, labels = [s for s, _ in rows], [float(y) for _, y in rows]
    found = performance.binary(scores, labels)

    assert found["accuracy"].value == pytest.approx(
        sum((s >= 0.5) == bool(y) for s, y in rows) / len(rows)
    )
    assert found["brier"].value == pytest.approx(
        sum((s - y) ** 2 for s, y in zip(scores, labels, strict=True)) / len(rows)
    )
    ones, zeros = [s for s, y in rows if y], [s for s, y in rows if not y]
    if ones and zeros:
        wins = sum((a > b) + (a == b) / 2 for a in ones for b in zeros)
        assert found["auc"].value == pytest.approx(wins / len(ones) / len(zeros))
    else:
        assert math.isnan(found["auc"].value)
    for name, estimate in found.items():
        if name != "auc" or (ones and zeros):
            assert estimate.low <= estimate.value <= estimate.high, name


def test_auc_is_that_of_mann_and_whitney() -> None:
    """U over the number of pairs, ties included."""
    random = np.random.default_rng(1)
    scores, labels = random.integers(0, 20, 500) / 20, random.integers(0, 2, 500)
    u = stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic

    auc = performance.binary(scores, labels)["auc"].value

    assert auc == pytest.approx(u / (labels == 1).sum() / (labels == 0).sum())


def test_weights_count_as_repeated_rows() -> None:
    """A row that stands for three is worth three; by values, not by confidence."""
    scores, labels, weights = [0.9, 0.2, 0.4, 0.6], [1, 0, 1, 0], [3, 1, 2, 1]
    repeated = [np.repeat(column, weights) for column in (scores, labels)]

    weighted, plain = performance.binary(scores, labels, weights), performance.binary(*repeated)

    for name in plain:
        assert weighted[name].value == pytest.approx(plain[name].value), name
        assert weighted[name].high >= plain[name].high - 1e-9, name


@pytest.mark.parametrize("name", ["accuracy", "auc", "log_loss", "brier", "calibration", "rate"])
def test_intervals_hold_as_often_as_they_say(name: str) -> None:
    """Of calibrated scores the truth is known: it is inside in 95 % of 400 draws, at 300 rows."""
    random = np.random.default_rng(7)
    big = random.beta(2, 3, 200_000)
    truth = performance.binary(big, random.uniform(size=big.size) < big)[name].value
    held = 0
    for _ in range(400):
        scores = random.beta(2, 3, 300)
        found = performance.binary(scores, random.uniform(size=300) < scores)[name]
        held += found.low <= truth <= found.high

    assert held / 400 > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 400)


def test_errors_of_numbers_are_their_definitions() -> None:
    """MAE, RMSE and bias; normal errors of one standard deviation have a known mean."""
    random = np.random.default_rng(5)
    actual = random.normal(size=50_000)
    found = performance.regression(actual + random.normal(0.5, 1, actual.size), actual)

    assert found["bias"].value == pytest.approx(0.5, abs=0.02)
    assert found["rmse"].value == pytest.approx(math.sqrt(1.25), abs=0.02)
    folded = math.sqrt(2 / math.pi) * math.exp(-0.125) + 0.5 * math.erf(0.5 / math.sqrt(2))
    assert found["mae"].value == pytest.approx(folded, abs=0.02)
    assert found["rmse"].low < found["rmse"].value < found["rmse"].high


def test_lengths_that_differ_and_no_rows_are_refused() -> None:
    """Rather than a number about nothing."""
    for scores, labels in (([], []), ([0.5], [1, 0]), ([[0.5]], [[1]])):
        with pytest.raises(BinMismatchError):
            performance.binary(scores, labels)


def test_what_is_not_finite_is_null_in_json() -> None:
    """One row has no interval; one class has no AUC."""
    found = performance.binary([0.9], [1])

    assert found["auc"].to_dict() == {"value": None, "low": None, "high": None}
    assert found["log_loss"].to_dict()["low"] is None
