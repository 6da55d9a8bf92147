"""Labels of real flights: what inputs miss, and what 24,000 labels of a year can show."""

import numpy as np
import pytest

from gateway import reference
from gateway.demo import sample
from monitors import Budget, cbpe, performance
from monitors.loss import LossReference, Outcomes
from monitors.loss_monitor import LossMonitor

SHARE = 0.2
"""Of a model's budget, for labels beside inputs."""


@pytest.fixture(scope="module")
def flights():
    """Scores and outcomes of the year, by the model of January to March."""
    from gateway.config import RuntimeConfig
    from gateway.runtime import Session

    rows = sample.load()
    session = Session(sample.model_path("january_march"), RuntimeConfig())
    inputs = reference._inputs(rows.columns, session.signature)
    place = [spec.name for spec in session.signature.outputs].index("probability")
    parts = [session.run([column[k : k + 1000] for column in inputs])[place]
             for k in range(0, rows.n_rows, 1000)]  # fmt: skip
    return np.concatenate(parts).ravel().astype(float), rows.late, rows.month, rows.time


@pytest.fixture(scope="module")
def judged() -> LossReference:
    """As `driftgate profile --target --ordered` makes it of January to March."""
    rows = sample.load()
    chosen = np.isin(rows.month, sample.REFERENCE_MONTHS)
    return reference.fit_labels(
        {name: column[chosen] for name, column in rows.columns.items()},
        rows.late[chosen],
        sample.model_path("january_march"),
        {},
        is_ordered=True,
    )


def replayed(flights, judged: LossReference, months: range) -> tuple[LossMonitor, dict]:
    p, late, month, time = flights
    monitor = LossMonitor(judged, budget=Budget(alarms=1, days=90).part(SHARE))
    raised: dict[int, list] = {number: [] for number in months}
    for number in months:
        rows = np.flatnonzero(month == number)
        for k in range(0, rows.size, 50):
            part = rows[k : k + 50]
            raised[number] += monitor.update(
                Outcomes.binary(p[part], late[part]), at=float(time[part[-1]])
            )
    return monitor, raised


def test_the_months_of_the_reference_raise_nothing(flights, judged: LossReference) -> None:
    """Delays of a day have one cause: without the order of time these months would page."""
    assert judged.effects.max() > 5
    monitor, _ = replayed(flights, judged, range(1, 4))
    assert not monitor.episodes


def test_the_year_is_paged_by_labels_also_in_december_which_inputs_miss(
    flights, judged: LossReference
) -> None:
    """From April on; autumn, whose flights are late less often, is warned of; December is open."""
    monitor, raised = replayed(flights, judged, range(4, 13))

    paged = [n for n, alarms in raised.items() if any(a.level == "page" for a in alarms)]
    assert paged[:1] == [4]
    autumn = [alarm for number in (9, 10) for alarm in raised[number]]
    assert autumn
    for alarm in autumn:
        (label, before, now), *_ = (m for m in alarm.moved if m[0] == "came true")
        assert now < before, label
    open_pages = [alarm for alarm in monitor.alarms if alarm.level == "page"]
    assert open_pages
    assert all("came true of late" in monitor.reason(alarm) for alarm in open_pages)


def test_scores_alone_believe_december_and_labels_do_not(flights, judged: LossReference) -> None:
    """The estimate without labels is blind; the realised rate lies far outside of its interval."""
    p, late, month, _ = flights
    december = month == 12
    believed = cbpe.estimated(p[december], calibration=judged.calibration)
    real = performance.binary(p[december], late[december])

    assert real["rate"].value - believed["rate"].value > 0.05
    assert real["rate"].low > believed["rate"].high
    autumn = np.isin(month, (9, 10))
    spring = np.isin(month, sample.REFERENCE_MONTHS)
    fallen = performance.binary(p[autumn], late[autumn])["auc"]
    assert fallen.high < performance.binary(p[spring], late[spring])["auc"].low
