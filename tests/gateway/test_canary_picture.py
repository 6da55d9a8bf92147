"""What `driftgate canary status` shows: where a rollout is, what it waits for, who can end that."""

import io
import time

import pytest
from rich.console import Console

from gateway.cli import picture
from registry.rollouts import Cause

FOUND = {
    "model": "m", "id": "r-1", "candidate": 9, "control": 7, "phase": "step", "weight": 5.0,
    "step": 1, "reason": "5 %",
    "plan": {"steps": [
        {"weight": 1, "for_s": 60}, {"weight": 5},
    ]},
    "evidence": {
        "verdict": "inconclusive", "units": 120, "reason": "the candidate has met 120 of 200 units",
        "needs": ["the candidate has met 120 of 200 units", "the step has not lasted long enough"],
        "labels": {"host": {"units": 3, "unusable": 0, "problem": "the server is away"}},
        "guards": [
            {
                "guard": "error_rate", "action": "abort", "evidence": 22.4, "evidence_needed": 500,
                "share_of_bound": 0.5, "breach": False, "candidate": {"hits": 3, "of": 120},
                "control": {"hits": 9, "of": 2280}, "ratio": [6.3, 1.2, None],
            },
            {
                "guard": "outcome", "action": "abort", "evidence": 1.0, "evidence_needed": 500,
                "share_of_bound": 0.0, "breach": False, "candidate": {"hits": 30, "of": 110},
                "control": {"hits": 500, "of": 2000}, "ratio": None,
                "outcome": {
                    "candidate": 0.27, "control": 0.25, "better": "lower", "margin": 0.01,
                    "difference": [0.02, -0.08, 0.12], "detectable": 0.1,
                    "evidence_not_worse": 0.4, "evidence_needed": 20, "not_worse": False,
                },
            },
        ],
    },
}  # fmt: skip


def shown(**changed):
    """The lines, as wide as they like."""
    said = io.StringIO()
    console = Console(width=240, file=said)
    found = FOUND | {"since": time.time() - 300} | changed
    console.print(picture.of_rollout(found))
    return said.getvalue()


def test_a_step_shows_its_time_its_units_each_guard_and_what_is_still_needed() -> None:
    """Half of its time, three fifths of its units."""
    text = shown()

    assert "m: r-1, version 9 against 7: step 2 of 2, 5 %" in text
    assert "██████████░░░░░░░░░░ 30" in text
    assert "████████████░░░░░░░░ 120 of 200 of the candidate" in text
    assert "next: the next step, after: the candidate has met 120 of 200 units; the step" in text
    assert "22.4 of 500" in text
    assert "3 of 120" in text
    assert "6.3 (1.2 to ∞)" in text
    assert "difference 0.02, between -0.08 and 0.12 at every look; one below 0.1 could not" in text
    assert "labels of host: the server is away" in text


@pytest.mark.parametrize("cause", Cause.__args__)
def test_every_hold_says_why_and_what_to_do(cause) -> None:
    """The reason of the hold, not what the guards say meanwhile."""
    text = shown(phase="holding", held="step", cause=cause, reason="because of that")

    assert f"holding ({cause}) in step 2 of 2, 5 %" in text
    assert "because of that" in text
    assert "driftgate" in text.split("next: ")[1] or cause == "window"


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("preparing", "once every live worker has the candidate warm"),
        ("shadowing", "the first step, after"),
        ("baking", "done, after"),
    ],
)
def test_other_phases_say_what_comes_next(phase, words) -> None:
    """And those that are over say nothing more."""
    assert words in shown(phase=phase)
    ended = shown(phase="aborted", reason="error_rate: candidate 9 of 30", evidence=None)
    assert "error_rate: candidate 9 of 30" in ended
    assert "next" not in ended
