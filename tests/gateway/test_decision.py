"""Whole plans, decided for a thousand rollouts: all guards together, on a ramp, with sticky users.

Users are drawn as they come: each keeps its place in the bucket table, comes back as it likes (a
few come all the time), and two in a hundred cause most of the errors. Everything gets worse for
everybody while the weights rise. Evidence of all looks is reckoned for all rollouts at once; then
the controller's own decision is asked about each of them, and look by look about a few.
"""

from functools import cache

import numpy as np
import pytest

from gateway.decision import Around, guards_of, judge, next_move
from monitors.guards import balance, difference, harm, shift
from monitors.guards.evidence import Evidence
from monitors.guards.labelled import Labelled
from monitors.guards.verdict import Peaks
from registry import rollouts
from registry.revisions import ModelState
from registry.rollouts import Rollout, rollout_of
from tests.monitors.guards.simulation import RAMP, four_errors

LOOKS = 3
"""In each step."""
N_USERS = 500
N_BINS = 10
PLAN = {
    "steps": [{"weight": float(100 * w), "for_s": 0, "units_min": 1} for w in RAMP],
    "guards": {"outcome": {"metric": "wrong", "margin": 0.0}},
}
WEIGHTS = [(round(w * 10_000), 10_000 - round(w * 10_000)) for w in RAMP]


def users(random, n_rollouts, worse):
    """Counts so far at every look, each (n_rollouts, looks, n_weights, ..., 2).

    `worse`: factor on the candidate's errors, slow requests, wrong answers.
    """
    n_looks = LOOKS * RAMP.size
    step = np.repeat(np.arange(RAMP.size), LOOKS)
    place = random.random((n_rollouts, N_USERS))
    usage = random.pareto(1.2, (n_rollouts, N_USERS)) * 0.8
    is_trouble = random.random((n_rollouts, N_USERS)) < 0.02
    is_late = random.random((n_rollouts, N_USERS)) < 0.3
    score = random.integers(0, N_BINS, (n_rollouts, N_USERS))
    made = {
        "units": np.zeros((n_rollouts, n_looks, RAMP.size, 2), int),
        "error": np.zeros((n_rollouts, n_looks, RAMP.size, 2), int),
        "slow": np.zeros((n_rollouts, n_looks, RAMP.size, 2), int),
        "bins": np.zeros((n_rollouts, n_looks, RAMP.size, N_BINS, 2), int),
        "outcomes": np.zeros((n_rollouts, n_looks, RAMP.size, 2, 2), int),
    }
    is_new = dict.fromkeys(made, np.ones((n_rollouts, N_USERS), bool))
    for look in range(n_looks):
        k, trend = step[look], 2.0 ** step[look]
        is_candidate = place < RAMP[k]
        factor = np.where(is_candidate, worse, 1.0)
        n = random.poisson(usage)
        rate = np.minimum(np.where(is_trouble, 0.05, 0.0005) * trend * factor, 0.9)
        came = {
            "units": n > 0,
            "error": random.random(n.shape) > (1 - rate) ** n,
            "slow": random.random(n.shape) > (1 - np.minimum(0.01 * trend * factor, 0.9)) ** n,
            "bins": n > 0,
            "outcomes": (n > 0) & (~is_late | (look > n_looks // 2)),
        }
        for name, table in made.items():
            first = came[name] & is_new[name]
            is_new[name] = is_new[name] & ~first
            for variant, mine in enumerate((is_candidate, ~is_candidate)):
                hit = first & mine
                if name == "bins":
                    for bin_ in range(N_BINS):
                        table[:, look, k, bin_, variant] = (hit & (score == bin_)).sum(axis=1)
                elif name == "outcomes":
                    wrong = random.random(n.shape) < 0.1 * (1 + k / 2) * factor
                    table[:, look, k, 0, variant] = (hit & ~wrong).sum(axis=1)
                    table[:, look, k, 1, variant] = (hit & wrong).sum(axis=1)
                else:
                    table[:, look, k, variant] = hit.sum(axis=1)
    return {name: table.cumsum(axis=1) for name, table in made.items()}


def logs_of(seen):
    """(n_rollouts, looks) evidence of each guard, by the functions that the verdict uses."""
    units, wrong = seen["units"], seen["outcomes"]
    plan = rollouts.parse_plan(PLAN).guards
    harms = {
        "error_rate": ("error", plan.error_rate),
        "slow_requests": ("slow", plan.slow_requests),
    }
    return {
        **{
            name: harm.log_evidence(seen[kind], RAMP, ratio_allowed=guard.ratio_max)
            for name, (kind, guard) in harms.items()
        },
        "output_shift": shift.log_evidence(seen["bins"], RAMP),
        "input_balance": shift.log_evidence(seen["bins"], RAMP),
        "srm": balance.log_evidence(units, RAMP),
        "outcome": difference.log_evidence_binary(wrong, RAMP, margin=0.0, side=1),
        "outcome:shown": difference.log_evidence_binary(wrong, RAMP, margin=0.0, side=-1),
        "labelled_ratio": balance.log_evidence(wrong.sum(axis=-2), RAMP),
    }


def at_look(seen, rollout, look):
    """The same counts as the controller has them."""
    k = look // LOOKS + 1

    def table(name):
        return {w: seen[name][rollout, look, at] for at, w in enumerate(WEIGHTS[:k])}

    wrong = seen["outcomes"][rollout, look]
    labelled = Labelled(
        {w: wrong[at].sum(axis=0) for at, w in enumerate(WEIGHTS[:k])},
        {w: wrong[at, 1] for at, w in enumerate(WEIGHTS[:k])},
    )
    evidence = Evidence(
        requests=table("units"),
        units=table("units"),
        events={"error": table("error"), "slow": table("slow")},
        bins={"output:y[0]": table("bins"), "input:x[0]": table("bins")},
    )
    return evidence, labelled


@cache
def at_step(step):
    """A rollout of the plan in this step."""
    state = rollouts.start(
        ModelState(aliases={"champion": 7}), 9, rollouts.parse_plan(PLAN), now=0.0, control=7
    )
    state = rollouts.commit(state, now=0.0)
    for _ in range(step):
        state = rollouts.advance(state, now=0.0)
    return state


def decide(seen, rollout, look, peaks):
    """Where the controller would take the rollout: `aborted`, `holding`, `step` or `baking`."""
    state = at_step(look // LOOKS)
    now = rollout_of(state)
    evidence, labelled = at_look(seen, rollout, look)
    said = judge(now, evidence, units=100, now=10.0, peaks=peaks, labelled=labelled)
    move = next_move(now, said, met=100, around=Around(now=10.0))
    return "step" if move is None else rollout_of(move(state)).phase


def outcome_of(worse, n_rollouts, seed):
    """(share aborted, share stopped at all) over all looks; the logs, and what they come from."""
    random = np.random.default_rng(seed)
    ends = []
    for _ in range(n_rollouts // 100):
        seen = users(random, 100, worse)
        logs = logs_of(seen)
        ends += [
            decide(
                seen, at, LOOKS * RAMP.size - 1,
                Peaks({name: float(log[at].max()) for name, log in logs.items()}),
            )
            for at in range(100)
        ]  # fmt: skip
    aborted, held = ends.count("aborted"), ends.count("holding")
    return aborted / len(ends), (aborted + held) / len(ends), seen, logs


def test_a_candidate_without_fault_is_aborted_in_one_rollout_of_a_hundred_at_most() -> None:
    """All guards of a plan together, outcomes too: a thousand rollouts, twelve looks at each."""
    n_rollouts = 1000
    aborted, stopped, seen, logs = outcome_of(1.0, n_rollouts, 1)

    assert aborted <= 0.01
    # The two sample ratios have a level of their own, a tenth of a per cent each.
    assert stopped <= 0.012 + four_errors(n_rollouts, 0.012)

    # Look by look the verdict finds the very evidence that was reckoned for all at once.
    plan = rollouts.parse_plan(PLAN)
    for at in range(3):
        peaks = Peaks()
        for look in range(LOOKS * RAMP.size):
            decide(seen, at, look, peaks)
        assert {name: peaks.highest[name] for name in logs} == pytest.approx(
            {name: float(log[at].max()) for name, log in logs.items()}, abs=1e-6
        )
    names = {guard.name for guard in guards_of(Rollout("r", 9, 7, "step", plan))}
    assert names - {"not_finite"} == set(logs) - {"outcome:shown"}


def test_a_candidate_with_a_fault_is_aborted() -> None:
    """Four times as many errors, slow requests and wrong answers: the same looks find it."""
    aborted, *_ = outcome_of(4.0, 100, 2)

    assert aborted >= 0.95
