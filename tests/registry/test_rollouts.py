"""Rollouts: plans say everything that is wrong, phases move as drawn, abort always succeeds."""

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import rollouts
from registry.buckets import Buckets
from registry.errors import RolloutError
from registry.revisions import ModelState
from registry.rollouts import Plan, Step, rollout_of
from registry.routes import Route, Share

PLAN = Plan(steps=(Step(weight=1), Step(weight=20)), hold_back=5)


def weights(state) -> dict[str, int]:
    return Buckets.parse(state.buckets).weights() if state.buckets else {"champion": 10_000}


def started(plan=PLAN, **state):
    return rollouts.start(ModelState(aliases={"champion": 7}, **state), 9, plan, now=0.0, control=7)


def test_a_plan_says_everything_that_is_wrong() -> None:
    """Where, what, and the name that was probably meant."""
    with pytest.raises(RolloutError) as refused:
        rollouts.parse_plan(
            {
                "steps": [{"weight": 5}, {"weight": 5, "units_min": 0}, {"weigth": 1}],
                "alpa": 0.1,
                "guards": {"slow_requests": {"quantile": "p95"}},
            }
        )
    said = "\n".join(refused.value.problems)
    assert "plan.steps[2].weigth: no such field" in said
    assert "weight" in said
    assert "alpha" in said
    assert "plan.guards.slow_requests.quantile" in said

    with pytest.raises(RolloutError) as refused:
        rollouts.parse_plan(
            """
            steps: [{weight: 5}, {weight: 5, units_min: 0}]
            alpha: 3
            window: {from_h: 17, to_h: 9}
            """
        )
    assert len(refused.value.problems) == 4


def test_the_page_of_plans_lists_every_field() -> None:
    """docs/reference/rollout-format.md, in the order of the code."""
    page = (Path(__file__).parents[2] / "docs/reference/rollout-format.md").read_text("utf-8")
    listed = re.findall(r"^\| ([A-Z]\w+) \| `(\w+)` \|", page, re.MULTILINE)

    assert listed == [
        (part.__name__, field.name)
        for part in rollouts.PARTS
        for field in msgspec.structs.fields(part)
    ]


def test_a_plan_reads_yaml_and_has_defaults_that_work() -> None:
    """Nothing given is the guarded ramp: 1, 5, 20, 50 per cent."""
    assert rollouts.parse_plan(None) == rollouts.parse_plan("{}") == Plan()
    assert [step.weight for step in Plan().steps] == [1, 5, 20, 50]
    assert rollouts.parse_plan("steps: [{weight: 2.5, for_s: 60}]").steps[0].weight == 2.5


def test_a_rollout_from_start_to_end() -> None:
    """Weight 0 until all are ready; then the steps, the hold-back, and everybody."""
    state = started()
    assert weights(state) == {"champion": 10_000}
    assert state.aliases == {"champion": 7, "challenger": 9}
    assert not state.follow

    seen = []
    state = rollouts.commit(state, now=1.0)
    for now in (2.0, 3.0, 4.0):
        seen.append(weights(state))
        state = rollouts.advance(state, now=now)
    assert seen == [
        {"champion": 9900, "challenger": 100},
        {"champion": 8000, "challenger": 2000},
        {"champion": 9500, "previous": 500},
    ]
    assert rollout_of(state).phase == "done"
    assert state.aliases["champion"] == 9
    assert state.aliases["previous"] == 7
    assert weights(state) == {"champion": 10_000}
    assert state.route is None


def test_who_has_the_candidate_keeps_it_all_the_way() -> None:
    """Raising a weight takes buckets from the champion only; promotion leaves them there."""
    state, had = rollouts.commit(started(), now=1.0), set()
    names = {"challenger": 9, "champion": 7}
    for now in (2.0, 3.0):
        table = Buckets.parse(state.buckets)
        has = {b for b in range(10_000) if state.aliases[table.owner(b)] == 9}
        assert had <= has
        had = has
        state = rollouts.advance(state, now=now)
    table = Buckets.parse(state.buckets)
    assert all(state.aliases[table.owner(b)] == 9 for b in had)
    assert names["challenger"] == 9


def test_every_rollout_draws_its_own_salt() -> None:
    """Whoever was first to try the last candidate is not the first again."""
    one, other = started(salts={"split": "00" * 16, "capture": "11" * 16}), started()

    assert one.salts["split"] != other.salts["split"] != "00" * 16
    assert one.salts["capture"] == "11" * 16
    assert rollout_of(one).id != rollout_of(other).id


ACTIONS = {
    "commit": lambda state: rollouts.commit(state, now=1.0),
    "advance": lambda state: rollouts.advance(state, now=2.0),
    "promote": lambda state: rollouts.promote(state, now=3.0),
    "hold": lambda state: rollouts.hold(state, "manual", "asked to", now=4.0),
    "resume": rollouts.resume,
    "freeze": lambda state: rollouts.freeze(state, slow_s={"slow_requests": 0.1}, edges={}),
}


@settings(deadline=None, max_examples=100)
@given(
    names=st.lists(st.sampled_from(sorted(ACTIONS)), max_size=8),
    shadow=st.booleans(),
)
def test_abort_always_succeeds_and_leaves_the_candidate_nothing(names, shadow) -> None:
    """After any sequence of actions, twice in a row, and never with more weight than before."""
    plan = rollouts.parse_plan(
        {"steps": [{"weight": 1}, {"weight": 20}], "shadow_first": {} if shadow else None}
    )
    state = started(plan)
    for name in names:
        try:
            state = ACTIONS[name](state)
        except RolloutError:
            continue
    ended = rollout_of(state).phase == "done"

    aborted = rollouts.abort(state, "no good", now=9.0)

    assert rollouts.abort(aborted, "again", now=10.0) == aborted
    assert weights(aborted) == {"champion": 10_000}
    assert aborted.route is None
    assert aborted.aliases["champion"] == (9 if ended else 7)
    assert rollout_of(aborted).phase == ("done" if ended else "aborted")


def test_holding_keeps_the_weight_and_resuming_goes_on_there() -> None:
    """A hold by hand is not overwritten by one of the controller."""
    state = rollouts.advance(rollouts.commit(started(), now=1.0), now=2.0)
    held = rollouts.hold(state, "manual", "lunch", now=3.0)

    assert weights(held) == weights(state)
    assert rollouts.hold(held, "drift", "an alarm", now=4.0) == held
    assert rollout_of(rollouts.resume(held)).step == 1
    assert rollout_of(rollouts.resume(held)).phase == "step"


def test_copies_come_first_if_the_plan_says_so() -> None:
    """Shadowing answers nobody; the copies stop with the first step."""
    plan = rollouts.parse_plan({"shadow_first": {"sample": 50}})
    shadowing = rollouts.commit(started(plan), now=1.0)

    assert rollout_of(shadowing).phase == "shadowing"
    assert weights(shadowing) == {"champion": 10_000}
    assert shadowing.route.shadow[0].sample == 50
    assert rollouts.commit(shadowing, now=2.0).route.shadow == ()


def test_copies_first_are_compared_as_the_plan_says() -> None:
    """Everything that is wrong with it is said at once."""
    plan = {"shadow_first": {"compare": {"score": {"threshold": 0.5}}, "inflight_max": 8}}
    shadow = rollouts.commit(started(rollouts.parse_plan(plan)), now=1.0).route.shadow[0]
    assert (shadow.to, shadow.inflight_max, shadow.compare["score"].threshold) == (
        "challenger", 8, 0.5,
    )  # fmt: skip
    wrong = {"pairs_min": 0, "deadline_s": 0, "sample": 0, "inflight_max": 0}
    with pytest.raises(RolloutError) as caught:
        rollouts.parse_plan({"shadow_first": wrong})
    for name in wrong:
        assert f"shadow_first.{name}" in str(caught.value)


def test_rollback_while_baking_needs_no_analysis() -> None:
    """The old champion is champion again in one step."""
    state = rollouts.commit(started(), now=1.0)
    baking = rollouts.promote(state, now=2.0)

    back = rollouts.abort(baking, "labels say no", now=3.0)

    assert rollout_of(baking).weight == 95
    assert back.aliases == {"champion": 7, "challenger": 9}


@pytest.mark.parametrize(
    ("state", "candidate", "words"),
    [
        (ModelState(aliases={"champion": 7}), 7, "champion already"),
        (
            ModelState(
                route=Route(
                    split=(Share(to="champion", weight="rest"), Share(to="other", weight=5))
                )
            ),
            9,
            "take them out first",
        ),
        (started(), 9, "is under way"),
    ],
)
def test_what_cannot_be_started_is_refused_with_the_reason(state, candidate, words) -> None:
    """One rollout owns a split."""
    with pytest.raises(RolloutError, match=words):
        rollouts.start(state, candidate, PLAN, now=0.0, control=7)


def test_promotion_of_what_answered_nobody_is_refused() -> None:
    """That is an alias, not a rollout."""
    with pytest.raises(RolloutError, match="answered nobody"):
        rollouts.promote(started(), now=1.0)


def test_a_rollout_survives_json_in_a_revision() -> None:
    """What a revision holds is what was written."""
    state = rollouts.freeze(
        rollouts.commit(started(), now=1.0),
        slow_s={"slow_requests": 0.012},
        edges={"output:y[0]": (0.1, 0.5)},
    )
    again = msgspec.json.decode(msgspec.json.encode(state), type=ModelState)

    assert rollout_of(again) == rollout_of(state)
    assert rollouts.is_open(Plan().window, 2, 3.0)
    assert not rollouts.is_open(rollouts.Window(days=("mon",)), 2, 3.0)
