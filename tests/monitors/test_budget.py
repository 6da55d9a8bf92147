"""What may be spent, by whom, and that it never adds up to more."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from monitors import BlockError, Budget, Profile
from monitors.budget import WEIGHTS, divide
from monitors.detector import Detector


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.sampled_from(sorted(WEIGHTS))))
def test_shares_of_a_model_add_up_to_its_budget(detectors) -> None:
    """Whatever detectors there are: all of it, never more, and equal parts to equals."""
    shares = divide(detectors)

    assert sum(shares.values()) == pytest.approx(1.0 if detectors else 0.0)
    for name, purpose in detectors.items():
        peers = {shares[other] for other in detectors if detectors[other] == purpose}
        assert len(peers) == 1
        assert shares[name] > 0


def test_all_purposes_have_the_parts_that_are_written_down() -> None:
    """60 for what is served (5 of them for what is refused), 15, 15 and 10 per cent."""
    assert divide({p: p for p in WEIGHTS}) == pytest.approx(
        {"serving": 0.55, "requests": 0.05, "segments": 0.15, "labels": 0.15, "canary": 0.1}
    )


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 90)), max_size=25))
@example([(0, 0, 1), (1, 0, 1), (0, 2, 1), (1, 2, 1), (1, 2, 90), (1, 1, 1), (0, 2, 1)])
def test_mass_that_is_divided_anew_never_exceeds_the_budget(steps) -> None:
    """Detectors come and go at any time: what all have taken is at most what time has brought.

    A detector's first block counts as a second, however short it was.
    """
    layout = Profile.fit({"x": np.arange(40.0)}).layout
    block = layout.counts
    purposes = sorted(WEIGHTS)
    whole = Budget(days=100)
    live: dict[int, Detector] = {}
    all_made, now = [], 0.0
    for which, what, seconds in steps:
        now += seconds
        if what == 0 and which not in live:
            live[which] = Detector(layout, whole.part(1e-9))
            all_made.append(live[which])
        elif what == 1:
            live.pop(which, None)
        elif which in live:
            live[which].fold(block, at=now)
        for key, share in divide({k: purposes[k] for k in live}).items():
            live[key].spend(whole.part(share))
    taken = sum(float(detector.state()["mass"][0, 0]) for detector in all_made)

    assert taken <= whole.spent(1, now) * (1 + 1e-9) + len(all_made) * whole.spent(1, 1.0)


def test_a_period_is_spent_once_whatever_it_is_cut_into() -> None:
    """Blocks of a period spend exactly one period; a silence at most a hundredth."""
    days, rows = Budget(days=90), Budget(rows=1000)

    assert sum(days.spent(1, 60.0) for _ in range(90 * 24 * 60)) == pytest.approx(1)
    assert sum(rows.spent(50, 0.0) for _ in range(20)) == pytest.approx(1)
    assert days.spent(1, 1e12) == 0.01
    assert days.spent(1, -5.0) == 0.0


def test_a_part_of_a_part_is_their_product() -> None:
    """Hosts, versions and segments share one after the other."""
    assert Budget(alarms=2, share=0.5).part(0.6).levels[0] == pytest.approx(0.6)
    assert Budget().levels[1] == pytest.approx(90 / 7)


@pytest.mark.parametrize(
    "given",
    [{"days": 1, "rows": 1}, {"alarms": 0}, {"share": 2}, {"rows": -1}, {"days": float("inf")}],
)
def test_a_budget_that_means_nothing_is_refused(given) -> None:
    """With the name of the setting."""
    with pytest.raises(BlockError, match="budget"):
        Budget(**given)
