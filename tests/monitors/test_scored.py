"""Figures from counts against scipy and rows, intervals against simulation, CBPE against truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from monitors import BlockError, Budget, cbpe
from monitors.detector import Detector
from monitors.scored import Errors, LossChannels, Scored


def drawn(draw, n, *, lift=1.0):
    """Scores that are calibrated, and labels; `lift` below 1: the labels have lost their cause."""
    p = draw.beta(1.5, 3, n)
    truth = lift * p + (1 - lift) * p.mean()
    return p, (draw.random(n) < truth).astype(int)


def test_figures_from_counts_are_those_of_the_rows() -> None:
    """Accuracy exactly, area, loss and Brier within what 200 bins round."""
    p, y = drawn(np.random.default_rng(1), 5000)
    found = Scored.of(p, y)
    area = mannwhitneyu(p[y == 1], p[y == 0]).statistic / ((y == 1).sum() * (y == 0).sum())

    assert found.n_rows == 5000
    assert found.accuracy().value == ((p >= 0.5) == y).mean()
    assert found.auc().value == pytest.approx(area, abs=0.002)
    loss = -np.where(y == 1, np.log(p), np.log1p(-p)).mean()
    assert found.log_loss().value == pytest.approx(loss, abs=0.005)
    assert found.brier().value == pytest.approx(((p - y) ** 2).mean(), abs=0.001)
    assert found.calibration_error() < 0.03


@pytest.mark.parametrize("figure", ["accuracy", "auc", "log_loss", "brier"])
def test_intervals_hold_the_truth_in_95_of_100(figure) -> None:
    """Of 400 samples of 500 rows: within four standard errors of 95 %."""
    draw = np.random.default_rng(2)
    truth = getattr(Scored.of(*drawn(draw, 1_000_000)), figure)().value
    found = [getattr(Scored.of(*drawn(draw, 500)), figure)() for _ in range(400)]

    share = np.mean([estimate.low <= truth <= estimate.high for estimate in found])

    assert share == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 400))


@given(st.integers(0, 10**6), st.integers(0, 200))
def test_labels_of_workers_add_up_exactly(seed, cut) -> None:
    """Classification and regression, in any split."""
    draw = np.random.default_rng(seed)
    p, y = drawn(draw, 200)
    x, z = draw.normal(size=200), draw.normal(size=200)

    together = Scored.of(p[:cut], y[:cut]) + Scored.of(p[cut:], y[cut:])
    errors = Errors.of(x[cut:], z[cut:], step=1e-3) + Errors.of(x[:cut], z[:cut], step=1e-3)

    assert np.array_equal(together.counts, Scored.of(p, y).counts)
    assert errors == Errors.of(x, z, step=1e-3)


def test_errors_of_a_regression_are_those_of_the_rows() -> None:
    """MAE and RMSE within a step, intervals about 1.96 standard errors."""
    draw = np.random.default_rng(3)
    error = draw.normal(size=20_000)
    found = Errors.of(error, np.zeros_like(error), step=1e-4)

    assert found.mae().value == pytest.approx(np.abs(error).mean(), abs=1e-4)
    assert found.rmse().value == pytest.approx(np.sqrt((error**2).mean()), abs=1e-4)
    half = (found.rmse().high - found.rmse().low) / 2
    assert half == pytest.approx(1.96 / np.sqrt(2 * 20_000), rel=0.05)
    with pytest.raises(BlockError, match="steps"):
        found + Errors.of([0.0], [1.0], step=1.0)


@pytest.mark.parametrize(
    ("scores", "labels"), [([0.5], [2]), ([1.5], [1]), ([np.nan], [0]), ([0.5, 0.5], [1])]
)
def test_what_is_no_score_or_label_is_refused(scores, labels) -> None:
    """Nothing of it is counted."""
    with pytest.raises(BlockError):
        Scored.of(scores, labels)


def test_nothing_is_said_of_no_rows() -> None:
    """Not a zero, not an error: nan."""
    empty = Scored.of([], [])
    for figure in ("accuracy", "auc", "log_loss", "base_rate"):
        assert np.isnan(getattr(empty, figure)().value)
    assert np.isnan(Errors.of([], [], step=1.0).mae().value)


def test_lost_labels_are_found_by_the_loss_and_quiet_ones_raise_nothing() -> None:
    """200 cohorts of 500 quiet rows: no page; when scores mean half as much: within 3,000 rows."""
    draw = np.random.default_rng(4)
    channels = LossChannels(Scored.of(*drawn(draw, 20_000)))
    budget = Budget(rows=500_000).part(0.15)
    detector = Detector(channels.layout, budget)
    for _ in range(200):
        found, _ = detector.fold(channels.cells(Scored.of(*drawn(draw, 500))))
        assert not [finding for finding in found if finding.level == "page"]

    rows = 0
    for _ in range(30):
        rows += 100
        found, _ = detector.fold(channels.cells(Scored.of(*drawn(draw, 100, lift=0.3))))
        if any(finding.level == "page" for finding in found):
            break
    assert rows < 3000
    assert {channels.layout.names[finding.channel] for finding in found} & {"loss", "calibration"}


def test_cbpe_is_right_under_covariate_shift_and_blind_to_concept_drift() -> None:
    """Other rows of the same meaning: the estimate follows. Another meaning: it does not."""
    draw = np.random.default_rng(5)
    calibration = cbpe.Calibration.fit(Scored.of(*drawn(draw, 50_000)))
    p = draw.beta(3, 1.5, 20_000)
    y = (draw.random(20_000) < p).astype(int)
    real = Scored.of(p, y)
    rows = real.counts.sum(axis=0)
    lost = Scored.of(p, (draw.random(20_000) < p.mean()).astype(int))

    assert cbpe.accuracy(rows, calibration).value == pytest.approx(real.accuracy().value, abs=0.01)
    assert cbpe.auc(rows, calibration).value == pytest.approx(real.auc().value, abs=0.015)
    assert lost.auc().value < 0.55
    assert cbpe.auc(rows, calibration).value > 0.7
    assert "concept drift" in cbpe.BLINDNESS


def test_calibration_rises_and_mends_scores_that_are_not() -> None:
    """Squared probabilities come back as what they mean."""
    draw = np.random.default_rng(6)
    p = draw.random(100_000)
    y = (draw.random(100_000) < p).astype(int)
    calibration = cbpe.Calibration.fit(Scored.of(p**2, y))

    assert (np.diff(calibration.shares) >= 0).all()
    centers = (np.arange(200) + 0.5) / 200
    assert np.abs(calibration.shares - np.sqrt(centers))[5:].max() < 0.06
    with pytest.raises(BlockError):
        cbpe.Calibration.fit(Scored.of([0.5] * 60, [1] * 60))
