"""The controller: from what two workers met to the revisions that it writes."""

# ruff: noqa: ARG005  stand-ins take what they are given
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from gateway.controller import report
from gateway.decision import Readiness
from gateway.exposures import Slot, slot_path
from gateway.shadow import tally
from gateway.shadow.tally import Coverage, Kept, Pairing, Tally
from registry import rollouts
from tests.rollouts import Rig

STEPS = {"steps": [{"weight": 10, "for_s": 5, "units_min": 50}, {"weight": 50, "for_s": 5}]}


@pytest.fixture
def rig(tmp_path):
    made = []

    def make(plan, **kwargs):
        made.append(Rig(tmp_path / str(len(made)), plan, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.controller.close()


def test_an_equal_candidate_is_promoted_and_baked(rig) -> None:
    """Step by step, with the evidence of each step kept beside the revision that it led to."""
    it = rig(STEPS | {"bake_s": 5})

    done = it.until("done", requests=150)

    assert it.state.aliases["champion"] == 9
    assert it.state.aliases["previous"] == 7
    assert done.slow_s["slow_requests"] > 0.0
    assert set(done.edges) == {"input:x[0]", "output:score[0]"}
    steps = sorted((it.state_dir / "rollouts" / done.id / "steps").iterdir())
    assert [json.loads(path.read_bytes())["phase"] for path in steps] == [
        "step", "step", "baking", "done",
    ]  # fmt: skip
    actors = {revision.actor for revision in it.revisions.history()}
    assert actors == {"ana", f"rollout:{done.id}"}


def test_a_candidate_that_errs_is_aborted_with_the_counts_as_the_reason(rig) -> None:
    """One request in three fails."""
    it = rig(STEPS)

    ended = it.until(
        "aborted", requests=100, behave=lambda rng, c: (0.01, c and rng.random() < 0.33, 0.5)
    )

    assert "error_rate: candidate" in ended.reason
    assert it.state.aliases["champion"] == 7
    assert it.state.buckets == ""


def test_a_slow_candidate_is_aborted(rig) -> None:
    """Five times as slow as the champion."""
    it = rig(STEPS)

    ended = it.until(
        "aborted",
        requests=150,
        behave=lambda rng, c: (rng.lognormvariate(-5, 0.3) * (5 if c else 1), False, 0.5),
    )

    assert "slow_requests" in ended.reason


def test_shifted_scores_hold_and_somebody_may_resume_or_abort(rig) -> None:
    """Not an error: somebody must say whether it is meant. Abort works from there."""
    it = rig({"steps": [{"weight": 50, "for_s": 500, "units_min": 50}]})

    held = it.until("holding", requests=150, behave=lambda rng, c: (0.01, False, 2.0 * c))

    assert (held.cause, held.held) == ("breach", "step")
    assert "output_shift" in held.reason
    it.move(lambda s: rollouts.abort(s, "not meant", now=it.now))
    assert it.rollout.phase == "aborted"


def test_outputs_that_are_not_finite_abort_at_once_while_the_champion_has_none(rig) -> None:
    """One of them is enough."""
    it = rig(STEPS)

    ended = it.until(
        "aborted", requests=60, behave=lambda rng, c: (0.01, False, np.nan if c else 0)
    )

    assert "not finite" in ended.reason
    assert ended.step == 0


def test_without_traffic_nothing_is_promoted_and_nothing_aborted(rig) -> None:
    """No data is inconclusive: it holds at its deadline, and goes on when traffic comes."""
    it = rig(STEPS | {"deadline_s": 20})

    held = it.until("holding")

    assert held.cause == "inconclusive"
    assert "0 of 50 units" in held.reason
    assert it.until("done", "baking", requests=200).phase == "baking"


def test_a_drift_alarm_holds_until_it_is_closed(rig) -> None:
    """Evidence about an unusual population promotes nobody."""
    it = rig(STEPS)
    it.alarms = ["temperature"]
    assert it.until("holding", requests=100).cause == "drift"

    it.alarms = []

    assert it.until("baking", requests=150)


def test_weights_rise_only_when_all_workers_are_ready_and_a_refusal_fails(rig) -> None:
    """Prepared with weight 0 first."""
    it = rig(STEPS)
    it.ready = Readiness(behind=("host-1",))
    for _ in range(5):
        it.second(requests=5)
    assert it.rollout.phase == "preparing"
    assert it.rollout.weight == 0

    it.ready = Readiness(refused="version 9: golden case 2 differs")
    assert it.until("failed").reason == "version 9: golden case 2 differs"


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_in_hand(it, pid, candidate, control, running, ended=None):
    """What a worker that died leaves behind."""
    path = slot_path(it.run_dir, it.state_dir, it.rollout.id, "host-9")
    slot = Slot(path)
    slot._cells[0] = pid
    for at, n in ((0, candidate), (1, control)):
        for _ in range(n):
            slot.take(at)
    if running is not None:
        slot.run(running, 1)
    if ended is not None:
        slot.end(ended)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL"])
def test_a_candidate_that_kills_its_worker_is_aborted_at_once(rig, name) -> None:
    """Such a death with the candidate's run under way needs no statistics."""
    it = rig(STEPS)
    it.until("step", requests=50)
    pid = dead_pid()
    it.deaths[pid] = signal.Signals[name]
    leave_in_hand(it, pid, candidate=1, control=3, running=0)

    ended = it.until("aborted", seconds=2)

    assert name in ended.reason


def test_a_worker_killed_for_a_run_without_end_is_hard_though_any_kill_is_not(rig) -> None:
    """The supervisor kills what does not go round its loop; the watchdog had said why before."""
    it = rig(STEPS)
    it.until("step", requests=50)
    pid = dead_pid()
    it.deaths[pid] = signal.SIGKILL
    leave_in_hand(it, pid, candidate=1, control=3, running=0)
    it.second()
    it.second()
    assert it.rollout.phase == "step"

    leave_in_hand(it, pid, candidate=1, control=3, running=0, ended=0)
    ended = it.until("aborted", seconds=2)

    assert "watchdog" in ended.reason


@pytest.mark.parametrize(("versions", "phase"), [((9,), "aborted"), ((7, 9), "step")])
def test_a_run_that_had_to_be_ended_aborts_while_the_champion_has_none(
    rig, versions, phase
) -> None:
    """Input that no model comes back from says nothing about one."""
    it = rig(STEPS)
    it.until("step", requests=50)
    for version in versions:
        it.workers[0].ended("m", version)
    it.second()
    it.second()

    assert it.rollout.phase == phase
    assert ("did not end a run" in it.rollout.reason) == (phase == "aborted")


@pytest.mark.parametrize(("version", "phase"), [(9, "aborted"), (7, "step")])
def test_an_open_breaker_of_the_candidate_aborts_at_once(rig, version, phase) -> None:
    """That of the champion does not: it is the one to go back to."""
    it = rig(STEPS)
    it.until("step", requests=50)
    it.workers[1].opened("m", version)
    it.second()
    it.second()

    assert it.rollout.phase == phase
    assert ("breaker of version 9" in it.rollout.reason) == (phase == "aborted")


def test_outputs_that_are_not_finite_of_both_are_no_hard_breach(rig) -> None:
    """They are compared as errors are: equal shares are no sign against one."""
    it = rig({"steps": [{"weight": 50, "for_s": 500, "units_min": 50}]})
    it.until("step", requests=50)
    for _ in range(6):
        it.second(100, lambda rng, _: (0.01, False, np.nan if rng.random() < 0.1 else 0))

    assert it.rollout.phase == "step"
    found = next(each for each in it.status()["guards"] if each["guard"] == "not_finite")
    assert min(found["candidate"]["hits"], found["control"]["hits"]) > 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_any_other_death_is_one_bad_event_for_each_in_flight(rig, number) -> None:
    """Killed for want of memory, or by the champion's own run: both share the blame."""
    it = rig(STEPS)
    it.until("step", requests=50)
    pid = dead_pid()
    it.deaths[pid] = number
    leave_in_hand(it, pid, candidate=2, control=5, running=1)

    it.second()
    it.second()

    assert it.rollout.phase == "step"
    found = it.status()["guards"][0]
    assert found["guard"] == "error_rate"
    assert (found["candidate"]["hits"], found["control"]["hits"]) == (1, 1)


def test_evidence_goes_on_after_workers_and_controller_restart(rig) -> None:
    """Counts are read back; no unit is counted twice."""
    it = rig({"steps": [{"weight": 50, "for_s": 500, "units_min": 50}]})
    for _ in range(8):
        it.second(requests=100)
    before = it.status()

    it.controller.close()
    it.workers = [it.worker(k) for k in range(2)]
    it.controller = it.new_controller()
    it.second()
    after = it.status()

    assert after["requests"] == before["requests"]
    assert after["units"] == before["units"]
    assert [g["evidence"] for g in after["guards"]] == [g["evidence"] for g in before["guards"]]


def test_only_one_controller_of_a_host_looks_and_one_stands_by(rig) -> None:
    """The lease; and if nobody looks for long enough, the weight is taken back."""
    it = rig(STEPS | {"unattended_s_max": 30})
    it.until("step", requests=50)
    other = it.new_controller()
    for _ in range(40):
        other.tick()
        it.second()
    assert it.rollout.phase == "step"

    for _ in range(40):  # The first one hangs, with the lease in its hand.
        other.tick()
        it.now += 1
    assert it.rollout.phase == "aborted"
    assert "no controller" in it.rollout.reason


def test_a_pause_by_hand_stays_until_it_is_taken_back(rig) -> None:
    """The controller goes on judging: a breach aborts also while it is held."""
    it = rig(STEPS)
    it.until("step", requests=100)
    it.move(lambda s: rollouts.hold(s, "manual", "lunch", now=it.now))
    for _ in range(30):
        it.second(requests=100)
    assert it.rollout.cause == "manual"

    ended = it.until("aborted", requests=100, behave=lambda rng, c: (0.01, c, 0.5))
    assert "error_rate" in ended.reason


def test_what_a_guard_found_stays_found_when_the_worker_that_remembers_dies(rig) -> None:
    """Evidence falls back and its peak is lost with the memory: only people end such a hold."""
    it = rig({"steps": [{"weight": 50, "for_s": 12, "units_min": 10}]})
    held = it.until("holding", requests=150, behave=lambda rng, c: (0.01, False, 2.0 * c))
    assert held.cause == "breach"

    it.controller.close()
    (it.state_dir / "rollouts" / held.id / "controller-host.json").unlink()
    for path in (it.state_dir / "rollouts" / held.id / "evidence").iterdir():
        path.unlink()
    it.workers = [it.worker(k) for k in range(2)]
    it.controller = it.new_controller()
    for _ in range(15):
        it.second(requests=100)

    guards = {g["guard"]: g for g in it.status()["guards"]}
    assert not guards["output_shift"]["breach"]
    assert it.status()["verdict"] == "ok", it.status()["reason"]
    assert (it.rollout.phase, it.rollout.cause) == ("holding", "breach")


def at_hour(hour, day=0):
    """Seconds of UTC; day 0 is Monday, 5 January 1970."""
    return (4 + day) * 86_400 + hour * 3600.0


@pytest.mark.parametrize("policy", ["hold", "advance"])
def test_no_weight_rises_outside_the_window_not_even_the_first(rig, policy) -> None:
    """Preparing, stepping, and advancing at the deadline: all wait for the hour."""
    it = rig({
        "steps": [{"weight": 10, "for_s": 1, "units_min": 10**6 if policy == "advance" else 10}],
        "window": {"days": ["mon"], "from_h": 9, "to_h": 10},
        "on_inconclusive": policy,
        "deadline_s": 3,
    })  # fmt: skip
    it.now = at_hour(9, day=1)
    for _ in range(3):
        it.second(requests=20)
    assert (it.rollout.at, it.rollout.cause, it.rollout.weight) == ("preparing", "window", 0)

    it.now = at_hour(9.5)
    it.until("step")
    it.now = at_hour(10)
    for _ in range(8):
        it.second(requests=100)
    assert (it.rollout.at, it.rollout.cause, it.rollout.weight) == ("step", "window", 10)

    it.now = at_hour(9, day=7)
    assert it.until("baking", requests=20, seconds=10)


@pytest.mark.parametrize(
    ("policy", "phase"), [("hold", "holding"), ("abort", "aborted"), ("advance", "baking")]
)
def test_a_step_that_is_not_ok_at_its_deadline_does_as_the_plan_says(rig, policy, phase) -> None:
    """Too few units for ever."""
    it = rig({
        "steps": [{"weight": 10, "for_s": 1, "units_min": 10**6}],
        "on_inconclusive": policy,
        "deadline_s": 8,
    })  # fmt: skip
    began = it.now

    it.until(phase, requests=20)

    assert it.now - began >= 8
    if policy != "advance":
        assert "not ok after 8 s: the candidate has met" in it.rollout.reason


def test_no_worse_than_waits_until_it_is_shown(rig) -> None:
    """Units alone are not enough; without any bad event there is no ratio, and it says so."""
    it = rig({
        "steps": [{"weight": 50, "for_s": 1, "units_min": 10}],
        "no_worse_than": 2,
        "guards": {"slow_requests": {"action": "ignore"}},
    })  # fmt: skip
    it.until("step")
    for _ in range(5):
        it.second(requests=100)
    assert it.rollout.phase == "step"
    assert "no bad event of either variant" in it.status()["reason"]

    it.second(requests=50, behave=lambda rng, c: (0.01, rng.random() < 0.1, 0.5))
    assert "not yet shown that the ratio is below 2" in it.status()["reason"]
    it.until("baking", requests=200, behave=lambda rng, c: (0.01, rng.random() < 0.1, 0.5))


def test_ceilings_end_a_candidate_that_is_no_worse_than_its_champion(rig) -> None:
    """Both err one time in five, or are slow: comparison finds nothing, the objective is missed."""
    for ceiling, behave in (
        ({"error_share": 5}, lambda rng, c: (0.01, rng.random() < 0.2, 0.5)),
        ({"p99_s": 0.5}, lambda rng, c: (1.0 if rng.random() < 0.2 else 0.01, False, 0.5)),
    ):
        it = rig({
            "steps": [{"weight": 50, "for_s": 500, "units_min": 50}],
            "guards": {"ceiling": ceiling},
        })  # fmt: skip
        ended = it.until("aborted", requests=100, behave=behave)
        assert ended.reason.startswith("ceiling_")
        it.controller.close()


@pytest.mark.parametrize(
    ("guard", "behave"),
    [
        ("error_rate", lambda rng, c: (0.01, c and rng.random() < 0.4, 0.5)),
        ("slow_requests", lambda rng, c: (rng.lognormvariate(-5, 0.3) * (5 if c else 1), False, 0)),
        ("not_finite", lambda rng, c: (0.01, False, np.nan if c and rng.random() < 0.4 else 0)),
        ("output_shift", lambda rng, c: (0.01, False, 3.0 * c)),
    ],
)
def test_a_guard_does_as_its_action_says(rig, guard, behave) -> None:
    """Abort, hold, or nothing at all."""
    plan = {"steps": [{"weight": 50, "for_s": 1, "units_min": 300}], "bake_s": 0}
    others = {
        name: {"action": "ignore"}
        for name in ("error_rate", "slow_requests", "not_finite", "output_shift")
        if name != guard
    }
    for action, phase in (("abort", "aborted"), ("hold", "holding"), ("ignore", "done")):
        it = rig(plan | {"guards": others | {guard: {"action": action}}})
        it.ready = Readiness(behind=("host-1",))
        for _ in range(3):
            it.second(requests=100, behave=behave)  # thresholds are the champion's
        it.ready = Readiness()
        ended = it.until(phase, requests=120, behave=behave)
        assert action == "ignore" or guard.replace("_", " ") in ended.reason.replace("_", " ")
        it.controller.close()


def test_workers_that_stay_behind_hold_a_rollout_before_it_rises(rig) -> None:
    """One that is replaced is waited for; one that cannot open the candidate is named."""
    it = rig(STEPS)
    it.until("step", requests=50)
    it.ready = Readiness(behind=("host-1",), for_s=5)
    for _ in range(10):
        it.second(requests=100)
    assert (it.rollout.phase, it.rollout.step) == ("step", 0)

    it.ready = Readiness(behind=("host-1",), for_s=40)
    assert it.until("holding").cause == "workers"
    assert "host-1" in it.rollout.reason

    it.ready = Readiness()
    assert it.until("step", requests=50)


def test_units_of_a_step_taken_by_hand_count_from_there(rig) -> None:
    """Whoever advances by hand does not know how many there were."""
    it = rig({"steps": [
        {"weight": 10, "for_s": 1, "units_min": 10**6},
        {"weight": 50, "for_s": 1, "units_min": 400},
    ]})  # fmt: skip
    it.until("step", requests=50)
    for _ in range(12):
        it.second(requests=400)
    it.move(rollouts.asked("advance", now=it.now))
    it.second()
    assert it.status()["units"] == 0

    it.second(requests=600)
    it.second()
    assert 250 < it.status()["units"] < 350  # each unit once: 600 requests at 50 %
    assert it.rollout.phase == "step"
    assert it.until("baking", requests=200, seconds=5)


def test_baking_without_a_hold_back_takes_its_time_and_ends(rig) -> None:
    """Nobody is drawn any more, so nobody is counted."""
    it = rig(STEPS | {"hold_back": 0, "bake_s": 5})
    it.until("baking", requests=150)
    assert it.state.buckets == ""
    began = it.now

    it.until("done")

    assert it.now - began >= 5


def test_a_rollout_that_promotes_nobody_by_itself_waits_for_somebody(rig) -> None:
    """`auto_promote: false`: the last step holds, and says what to do."""
    it = rig(STEPS | {"auto_promote": False, "bake_s": 0})

    held = it.until("holding", requests=150)

    assert (held.cause, held.step) == ("manual", 1)
    assert "driftgate canary promote" in held.reason
    it.move(rollouts.asked("promote", now=it.now))
    assert (it.rollout.phase, it.state.aliases["champion"]) == ("done", 9)


def copies(rig, *, n, differ, sampled=None, dropped=0, barred="", worker="w"):
    """What a worker has written of the copies of a rollout that has them first."""
    rollout = rig.rollout
    pairing = Pairing("m", "challenger", 9, 7, rollout.plan.shadow_first.shadow)
    cover = Coverage(sampled=n if sampled is None else sampled, dropped={"inflight_max": dropped})
    counts = Tally(requests=n, rows=n, single=[n, differ])
    kept = Kept(pairing, 0.0, cover, counts, barred=barred)
    path = tally.directory(rig.state_dir, "m", pairing.key) / f"{worker}.json"
    assert tally.write(path, kept.to_json())


FIRST = STEPS | {"shadow_first": {"for_s": 3, "pairs_min": 100, "disagreement_max": 2}}


def test_copies_first_lead_to_the_first_step_when_enough_agree(rig) -> None:
    """Pairs of two workers add up; dropped ones hold it back; the evidence is kept."""
    it = rig(FIRST)
    it.until("shadowing", requests=20)
    assert (it.rollout.weight, it.state.route.shadow[0].to) == (0, "challenger")
    copies(it, n=60, differ=0)
    for _ in range(5):
        it.second(20)
    assert it.rollout.phase == "shadowing"
    copies(it, n=60, differ=1, dropped=9, sampled=69, worker="v")
    it.second(20)
    assert "copies were dropped" in it.status()["reason"]
    assert it.rollout.phase == "shadowing"
    copies(it, n=60, differ=1, worker="v")
    it.until("step", seconds=3)
    assert it.state.route.shadow == ()
    (moved,) = [m for m in report(it.state_dir, it.rollout)["moves"] if m["phase"] == "step"]
    (found,) = [g for g in moved["guards"] if g["guard"] == "disagreement"]
    assert found["candidate"] == {"hits": 1, "of": 120}


@pytest.mark.parametrize(("action", "phase"), [("abort", "aborted"), ("hold", "holding")])
def test_copies_that_disagree_do_as_the_plan_says(rig, action, phase) -> None:
    """Whatever else is fine."""
    first = FIRST["shadow_first"] | {"action": action}
    it = rig(FIRST | {"shadow_first": first})
    it.until("shadowing", requests=20)
    copies(it, n=200, differ=40)
    assert "disagreement" in it.until(phase, seconds=3).reason
    assert it.rollout.weight == 0


def test_a_shadow_that_took_its_worker_with_it_aborts(rig) -> None:
    """It needs no statistics."""
    it = rig(FIRST)
    it.until("shadowing", requests=20)
    copies(it, n=500, differ=0, barred="a worker died by SIGSEGV while it ran this shadow")
    assert "SIGSEGV" in it.until("aborted", seconds=3).reason
