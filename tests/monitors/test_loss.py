"""Loss and calibration under a budget: quiet where nothing changed, found where it did."""

import json

import numpy as np
import pytest

from monitors import BlockError, Budget, ProfileError
from monitors.loss import LossReference, Outcomes
from monitors.loss_monitor import LossMonitor

BUDGET = Budget(alarms=1, rows=100_000)


def binary(draw, n, *, a=1.5, lift=1.0, up=0.0):
    """Calibrated scores, and labels; `lift`: what is left of their meaning; `up`: more came."""
    p = draw.beta(a, 3, n)
    truth = np.clip(lift * p + (1 - lift) * p.mean() + up, 0, 1)
    return Outcomes.binary(p, (draw.random(n) < truth).astype(int))


def numbers(draw, n, *, sd=1.0, bias=0.0):
    x = draw.normal(size=n)
    return Outcomes.numbers(x, x + bias + sd * draw.normal(size=n))


def classes(draw, n, *, right=0.8):
    named = draw.choice(["cat", "dog", "owl"], n).astype(object)
    came = np.where(draw.random(n) < right, named, "cow").astype(object)
    return Outcomes.classes(named, came)


def pages(monitor):
    return [alarm for alarm in monitor.episodes if alarm.level == "page"]


def paged_after(monitor, make, *, rows_max=6000, step=100):
    for rows in range(step, rows_max + 1, step):
        monitor.update(make(step))
        if pages(monitor):
            return rows
    return None


@pytest.mark.parametrize("make", [binary, numbers, classes])
@pytest.mark.parametrize("is_small", [False, True])
def test_quiet_labels_raise_no_more_pages_than_the_budget(make, is_small) -> None:
    """12 worlds of 50,000 rows, half a period each: 6 pages are allowed in expectation.

    Also for a reference of 500 rows, which is itself off by chance. The bound is that on the
    number of pages of a Poisson law of mean 6: more than 16 has a probability below 2 in 10,000.
    """
    found = 0
    for seed in range(12):
        draw = np.random.default_rng(seed)
        reference = LossReference.fit(make(draw, 500 if is_small else 10_000))
        monitor = LossMonitor(reference, budget=BUDGET)
        for _ in range(100):
            monitor.update(make(draw, 500))
        found += len({alarm.episode for alarm in pages(monitor)})
    assert found <= 16


def test_rows_that_only_lie_elsewhere_are_no_lost_calibration() -> None:
    """Scores drift, and mean what they did: no part is named, however long it lasts."""
    draw = np.random.default_rng(3)
    monitor = LossMonitor(LossReference.fit(binary(draw, 20_000)), budget=BUDGET)
    for _ in range(40):
        monitor.update(binary(draw, 500, a=2.2))
    assert not [alarm for alarm in pages(monitor) if alarm.feature == "calibration"]


@pytest.mark.parametrize(
    ("make", "changed", "rows", "said"),
    [
        (binary, {"lift": 0.2}, 2000, "fell, by labels"),
        (binary, {"up": 0.2}, 1500, "came true of late"),
        (numbers, {"sd": 1.5}, 800, "accuracy fell, by labels: squared error"),
        (numbers, {"bias": 0.7}, 1000, "too low of late"),
        (classes, {"right": 0.6}, 800, "fell, by labels"),
    ],
)
def test_lost_meaning_is_paged_within_rows_and_says_what_fell(make, changed, rows, said) -> None:
    """Each against a reference of 5,000 rows; quiet ones before raise nothing."""
    draw = np.random.default_rng(7)
    monitor = LossMonitor(LossReference.fit(make(draw, 5000)), budget=BUDGET)
    for _ in range(40):
        monitor.update(make(draw, 100))
    assert not pages(monitor)

    delay = paged_after(monitor, lambda n: make(draw, n, **changed))

    assert delay is not None
    assert delay <= rows
    reasons = [monitor.reason(alarm) for alarm in monitor.alarms]
    assert any(said in reason for reason in reasons), reasons
    assert min(alarm.since_row for alarm in pages(monitor)) >= 3500


@pytest.mark.parametrize(("make", "changed"), [(classes, {"right": 0.97}), (numbers, {"sd": 0.5})])
def test_nobody_is_called_because_answers_became_better(make, changed) -> None:
    """Fewer wrong classes, smaller errors: a change, and no alarm; a worse one later is."""
    draw = np.random.default_rng(8)
    monitor = LossMonitor(LossReference.fit(make(draw, 5000)), budget=BUDGET)
    for _ in range(50):
        monitor.update(make(draw, 100, **changed))
    assert not monitor.episodes
    worse = {"right": 0.5} if make is classes else {"sd": 2.0}
    assert paged_after(monitor, lambda n: make(draw, n, **worse)) is not None


def test_what_is_over_is_closed_and_an_alarm_is_raised_once() -> None:
    """While it lasts no channel is paged twice; when labels are as before, it is over."""
    draw = np.random.default_rng(9)
    monitor = LossMonitor(LossReference.fit(binary(draw, 10_000)), budget=BUDGET)
    for _ in range(60):
        monitor.update(binary(draw, 100, lift=0.0))
    channels = [alarm.channel for alarm in pages(monitor)]
    assert channels
    assert len(set(channels)) == len(channels)
    for _ in range(200):
        monitor.update(binary(draw, 100))
    assert not [alarm for alarm in monitor.alarms if alarm.level == "page"]


def test_state_goes_on_to_the_last_bit() -> None:
    """Cut anywhere: the same evidence and alarms as without the cut."""
    draw = np.random.default_rng(10)
    reference = LossReference.fit(binary(draw, 5000), is_ordered=True, lineage={"a": 1})
    whole, cut = (LossMonitor(reference, budget=Budget(days=90)) for _ in range(2))
    for k in range(40):
        rows = binary(draw, 100, lift=0.4)
        for monitor in (whole, cut):
            monitor.update(rows, at=3600.0 * k)
        if k % 7 == 0:
            state = cut.to_bytes()
            cut = LossMonitor(reference, budget=Budget(days=90))
            cut.restore(state)
    assert cut.evidence == whole.evidence
    assert cut.episodes == whole.episodes
    assert whole.episodes
    with pytest.raises(BlockError, match="another"):
        LossMonitor(LossReference.fit(binary(draw, 300)), budget=BUDGET).restore(state)


def test_earlier_cohorts_take_no_time_from_the_budget_twice() -> None:
    """A month of labels that comes back to its first day spends a month, not two."""
    draw = np.random.default_rng(11)
    monitor = LossMonitor(LossReference.fit(binary(draw, 1000)), budget=Budget(days=90))
    for at in (0.0, 30.0, 1.0, 30.0, 2.0):
        monitor.update(binary(draw, 100), at=at * 86_400)
    assert monitor.at == 30 * 86_400


def test_rows_that_repeat_each_other_teach_a_design_effect() -> None:
    """Labels that come in runs of 40: evidence is tempered; independent ones are not."""
    draw = np.random.default_rng(12)
    p = draw.beta(1.5, 3, 20_000)
    runs = np.repeat(draw.random(500), 40)
    repeated = LossReference.fit(Outcomes.binary(p, runs < p), is_ordered=True)
    free = LossReference.fit(binary(draw, 20_000), is_ordered=True)

    assert repeated.effects.max() > 4
    assert free.effects.max() == 1


def test_references_are_read_back_and_what_is_wrong_is_named() -> None:
    """Canonical JSON; every part is looked at."""
    draw = np.random.default_rng(13)
    for rows in (binary(draw, 1000), numbers(draw, 1000), classes(draw, 1000)):
        reference = LossReference.fit(rows, lineage={"days": 3})
        again = LossReference.from_json(reference.to_json())
        assert again.digest == reference.digest
        assert np.array_equal(again.layout.counts, reference.layout.counts)
    good = json.loads(LossReference.fit(binary(draw, 1000)).to_json())
    for name, value in (
        ("format", 2), ("task", "ranking"), ("n_rows", 999), ("parts", [0.2, 0.1, 0.3, 0.4]),
        ("effects", [0.5] * 6), ("calibration", [2.0] * 200), ("more", 1), ("loss", {}),
        ("part_counts", [[1, -1]] * 5), ("lineage", None),
    ):  # fmt: skip
        with pytest.raises(ProfileError):
            LossReference.from_json(json.dumps({**good, name: value}))


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (Outcomes.binary, ([0.5], [2])), (Outcomes.binary, ([1.5], [1])),
        (Outcomes.binary, ([np.nan], [0])), (Outcomes.binary, ([0.5, 0.5], [1])),
        (Outcomes.numbers, ([1.0], [np.inf])), (Outcomes.classes, (["a"], ["a", "b"])),
        (Outcomes.probabilities, ([[0.5, 0.5]], [2])), (Outcomes.probabilities, ([[1.0]], [0.5])),
    ],
)  # fmt: skip
def test_what_is_no_prediction_or_label_is_refused(make, given) -> None:
    """Nothing of it is counted."""
    with pytest.raises(BlockError):
        make(*given)


def test_few_rows_are_no_reference() -> None:
    """199 are refused, 200 are one."""
    draw = np.random.default_rng(14)
    with pytest.raises(BlockError, match="200"):
        LossReference.fit(binary(draw, 199))
    assert LossReference.fit(binary(draw, 200)).n_rows == 200


def test_losses_are_their_definitions() -> None:
    """Row by row, by hand."""
    assert Outcomes.binary([0.25, 0.25], [1, 0]).loss == pytest.approx([np.log(4), -np.log(0.75)])
    assert Outcomes.numbers([1.0, 2.0], [3.0, 2.0]).loss.tolist() == [4.0, 0.0]
    assert Outcomes.classes(["a", "b"], ["a", "c"]).loss.tolist() == [0.0, 1.0]
    found = Outcomes.probabilities([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], [1, 2])
    assert found.loss == pytest.approx([-np.log(0.3), -np.log(0.7)])
    assert found.foreseen.tolist() == [0.5, 0.7]
    assert found.happened.tolist() == [False, True]
