"""Performance without labels: against labels where scores are right, blind where they are not."""

import numpy as np
import pytest

from monitors import BlockError, cbpe, performance


def drawn(draw, n, *, lift=1.0):
    """Scores that are calibrated, and labels; `lift` below 1: the labels have lost their cause."""
    p = draw.beta(1.5, 3, n)
    truth = lift * p + (1 - lift) * p.mean()
    return p, (draw.random(n) < truth).astype(int)


@pytest.mark.parametrize("name", ["accuracy", "auc", "log_loss", "rate"])
def test_without_labels_calibrated_scores_tell_the_same(name) -> None:
    """And scores that lost their meaning tell the same as before: the estimate is blind to that."""
    draw = np.random.default_rng(3)
    scores = draw.beta(2, 3, 100_000)
    calibrated = draw.random(scores.size) < scores
    expected = cbpe.estimated(scores)[name]

    found = performance.binary(scores, calibrated)[name]
    assert found.value == pytest.approx(expected.value, abs=0.006)
    flipped = performance.binary(scores, ~calibrated)[name].value
    assert abs(flipped - expected.value) > 0.1


@pytest.mark.parametrize("name", ["accuracy", "auc", "log_loss", "rate"])
def test_scores_that_are_off_are_mended_by_labels_of_the_reference(name) -> None:
    """Squared probabilities: as they are the estimate is wrong, with the reference's labels right;
    also for rows that lie elsewhere (covariate shift)."""
    draw = np.random.default_rng(5)
    p, y = drawn(draw, 100_000)
    calibration = cbpe.Calibration.fit(p**2, y)
    other = draw.beta(3, 1.5, 50_000)
    real = performance.binary(other**2, draw.random(other.size) < other)[name]

    mended = cbpe.estimated(other**2, calibration=calibration)[name]
    assert mended.value == pytest.approx(real.value, abs=0.015)
    if name in {"log_loss", "rate"}:
        assert abs(cbpe.estimated(other**2)[name].value - real.value) > 0.05


def test_cbpe_is_blind_to_concept_drift_and_says_so() -> None:
    """Another meaning of the same inputs: labels see it, the estimate does not."""
    draw = np.random.default_rng(5)
    calibration = cbpe.Calibration.fit(*drawn(draw, 50_000))
    p, lost = drawn(draw, 20_000, lift=0.1)

    assert performance.binary(p, lost)["auc"].value < 0.58
    assert cbpe.estimated(p, calibration=calibration)["auc"].value > 0.7
    assert "concept drift" in cbpe.BLINDNESS


@pytest.mark.parametrize("name", ["accuracy", "rate"])
def test_intervals_hold_the_realised_figure_in_95_of_100(name) -> None:
    """Of 400 samples of 300 calibrated rows: within four standard errors of 95 %."""
    draw = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        scores = draw.beta(2, 3, 300)
        found = cbpe.estimated(scores)[name]
        real = performance.binary(scores, draw.random(300) < scores)[name].value
        held += found.low <= real <= found.high

    assert held / 400 == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 400))


def test_calibration_rises_and_needs_both_labels() -> None:
    """Squared probabilities come back as what they mean."""
    draw = np.random.default_rng(6)
    p = draw.random(100_000)
    calibration = cbpe.Calibration.fit(p**2, draw.random(100_000) < p)

    assert (np.diff(calibration.shares) >= 0).all()
    at = np.linspace(0.05, 0.95, 50)
    assert np.abs(calibration(at) - np.sqrt(at)).max() < 0.06
    for labels in ([1] * 60, [0] * 60):
        with pytest.raises(BlockError):
            cbpe.Calibration.fit([0.5] * 60, labels)
    with pytest.raises(BlockError):
        cbpe.Calibration.fit([0.5] * 10, [0, 1] * 5)
